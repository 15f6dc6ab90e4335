"""What an evaluation measures, against plain transformers; what it does again and what not."""

from __future__ import annotations

import io
import json
import shutil

import httpx
import pytest
import torch
from rich.console import Console

from kvopt.base.generate import generate, stop_ids
from kvopt.config.names import ContextName
from kvopt.config.students import StudentConfig
from kvopt.contexts import KVContext
from kvopt.documents.evaluation_file import EvaluationDocument, GroupEstimate
from kvopt.errors import InputError
from kvopt.storage.files import write_json
from kvopt.train.commands import evaluate_all, evaluator_of, train_chosen
from kvopt.train.evaluation.conditions import hand_written, held_out_mutations, mutations_in_use
from kvopt.train.evaluation.models import subject
from kvopt.train.evaluation.tables import further_quantities, tables
from kvopt.train.metrics.judge import Judge
from kvopt.train.training import chosen
from tests.jobs import artefacts, entries, stages_in, write_rows
from tests.train.evaluated import WORDS, open_evaluated, student, write_evaluated


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """(config, run directory, documents of base, s1 (LoRA) and s2 (full)); do not change them, copy them."""
    place = tmp_path_factory.mktemp("evaluated")
    config = write_evaluated(place)
    run = open_evaluated(config, place / "out")
    configs = chosen(run.inputs)
    with run.opened():
        train_chosen(run, configs)
        documents = [document.to_json() for document in evaluate_all(run)]
    return config, place / "out", {document["name"]: document for document in documents}


@pytest.fixture
def copied(evaluated, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(evaluated[1], out)
    (out / "ledger.jsonl").unlink()
    return evaluated[0], out


def again(config, out, names=(), specs=(), sets=()):
    run = open_evaluated(config, out, sets)
    with run.opened():
        return [document.to_json() for document in evaluate_all(run, names, specs)], run


def answers_of(out, name, context):
    lines = (out / "students" / name / "evaluation" / f"{context}.jsonl").read_text("utf-8").splitlines()
    return [json.loads(line) for line in lines]


def everything(run):
    """The catalogue of a run with its mutations, ranked."""
    return run.catalogue([ContextName.parse("best-mutations:1", "test")])


def plain_logits(model, ids, count):
    """[count, V] float64: the model's own logits at the positions that predict the last ``count`` ids."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([list(ids)[:-1]]), use_cache=False).logits[0]
    return logits[-count:].double()


@pytest.mark.parametrize("name", ["base", "s1", "s2"])
@pytest.mark.parametrize("context", ["original", "whole", "none"])
def test_gold_likelihoods_equal_plain_transformers_on_full_prompts(evaluated, name, context):
    config, out, _ = evaluated
    run = open_evaluated(config, out)
    with run.opened():
        model = subject(run.task(), name, run.at).model
        evaluation = evaluator_of(run, run.config.students)
        condition = next(c for c in evaluation.conditions if c.name == context)
        rows = condition.context.bodies(run.task().rows_for(condition.context, "validation")).rows
        prefix = condition.context.bos if context == "none" else condition.context.encoded.prefix
        originals = run.task().rows("validation").rows
        for row, original, stored in zip(rows, originals, answers_of(out, name, context), strict=True):
            log_q = plain_logits(model.model, [*prefix, *row.body, *row.gold], len(row.gold)).log_softmax(-1)
            whole = [*run.task().encoded.prefix, *original.body, *original.gold]
            log_p = plain_logits(run.load_base().model, whole, len(row.gold)).log_softmax(-1)
            nll = -log_q.gather(1, torch.tensor(row.gold)[:, None]).sum()
            assert stored["nll"] == pytest.approx(nll.item(), rel=1e-4)
            assert stored["kl"] == pytest.approx((log_p.exp() * (log_p - log_q)).sum().item(), rel=1e-3, abs=1e-5)
            assert stored["agree"] == (log_p.argmax(-1) == log_q.argmax(-1)).sum()


def test_answers_are_the_students_own_greedy_ones(evaluated):
    config, out, _ = evaluated
    run = open_evaluated(config, out)
    with run.opened():
        model = subject(run.task(), "s1", run.at).model
        for row, stored in zip(run.task().rows("validation").rows, answers_of(out, "s1", "original")[:4], strict=False):
            ids = torch.tensor([[*run.task().encoded.prefix, *row.body]])
            found = model.model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False,
                eos_token_id=sorted(stop_ids(model) | run.task().answer_ends), pad_token_id=0,
            )  # fmt: skip
            answer = [t for t in found[0, ids.shape[1] :].tolist() if t not in run.task().answer_ends]
            assert stored["answer"] == model.tokenizer.decode(answer, skip_special_tokens=True)


def test_a_kv_context_is_the_same_prefix_for_base_and_student(evaluated):
    config, out, documents = evaluated
    run = open_evaluated(config, out)
    with run.opened():
        context = run.learned(["kv-8"])[0]
        assert isinstance(context, KVContext)
        board = run.score(context)
    learned = next(c for c in documents["base"]["contexts"] if c["name"] == "kv-8")
    assert learned["quantities"]["gold_nll"]["mean"] == pytest.approx(board.gold_nll.mean, rel=1e-4)
    assert learned["quantities"]["kl_from_base"]["mean"] == pytest.approx(board.kl_forward.mean, rel=1e-3)
    assert answers_of(out, "s1", "kv-8") != answers_of(out, "base", "kv-8")


def test_the_base_has_no_distance_from_itself_and_the_student_has(evaluated):
    _, _, documents = evaluated
    at = {name: document["contexts"][0]["quantities"]["kl_from_base"] for name, document in documents.items()}
    assert abs(at["base"]["mean"]) < 1e-6
    assert at["s1"]["mean"] > 1e-3
    assert abs(documents["base"]["forgetting"]["kl_from_base"]["mean"]) < 1e-6
    assert documents["base"]["forgetting"]["gold_nll_change"]["mean"] == 0


def test_forgetting_equals_the_formulas_on_full_probe_prompts(evaluated):
    config, out, documents = evaluated
    run = open_evaluated(config, out)
    kl = change = tokens = 0.0
    with run.opened():
        model = subject(run.task(), "s1", run.at).model
        probes = evaluator_of(run, run.config.students).probes
        assert len(probes.encoded.rows) == len(WORDS)
        for row in probes.encoded.rows:
            ids = [*probes.encoded.prefix, *row.body, *row.gold]
            log_p = plain_logits(run.load_base().model, ids, len(row.gold)).log_softmax(-1)
            log_q = plain_logits(model.model, ids, len(row.gold)).log_softmax(-1)
            kl += (log_p.exp() * (log_p - log_q)).sum().item()
            change += (log_p - log_q).gather(1, torch.tensor(row.gold)[:, None]).sum().item()
            tokens += len(row.gold)
    forgetting = documents["s1"]["forgetting"]
    assert forgetting["gold_tokens"] == tokens
    assert forgetting["kl_from_base"]["mean"] == pytest.approx(kl / tokens, rel=1e-3)
    assert forgetting["gold_nll_change"]["mean"] == pytest.approx(change / tokens, rel=1e-3)


def test_contexts_stand_in_groups_and_the_trained_mutations_are_not_held_out(evaluated):
    document = evaluated[2]["s1"]
    groups = {group["group"]: group["contexts"] for group in document["groups"]}
    assert list(groups) == ["original", "held-out", "templates", "none", "learned", "wordings"]
    assert groups["templates"] == ["terse", "whole"]
    assert groups["wordings"] == ["original", *groups["held-out"], "terse", "whole"]
    trained = {context["name"] for context in document["student"]["contexts"]}
    assert len(trained) == 3
    assert len(groups["held-out"]) == 2
    assert not trained & set(groups["held-out"])


def test_group_statistics_come_from_the_contexts_means(evaluated):
    document = evaluated[2]["s1"]
    by_name = {context["name"]: context["quantities"]["gold_nll"]["mean"] for context in document["contexts"]}
    for group in document["groups"]:
        values = [by_name[name] for name in group["contexts"]]
        quantity = group["quantities"]["gold_nll"]
        assert quantity["mean"] == pytest.approx(sum(values) / len(values))
        assert (quantity["min"], quantity["max"]) == (min(values), max(values))
        assert quantity["spread"] == pytest.approx(max(values) - min(values))


SOME_LETTER = "evaluate.metrics=[{kind: regex, name: early, pattern: '[a-h]'}]"


def test_wordings_have_their_lowest_their_share_near_the_best_and_what_is_kept(copied):
    config, out = copied
    documents, _ = again(config, out, ["base"], ["original", "held-out", "templates"], (SOME_LETTER,))
    contexts = {context["name"]: context for context in documents[0]["contexts"]}
    group = next(group for group in documents[0]["groups"] if group["group"] == "wordings")
    values = [contexts[name]["quantities"]["early"]["mean"] for name in group["contexts"]]
    quantity, original = group["quantities"]["early"], contexts["original"]["quantities"]["early"]["mean"]
    assert original > 0
    assert quantity["min"] == min(values)
    assert quantity["near_best"] == sum(value >= max(values) - 0.05 - 1e-12 for value in values) / len(values)
    kept = [contexts[name]["retention"]["early"]["mean"] for name in group["contexts"]]
    assert kept == pytest.approx([value / original for value in values])
    assert quantity["retention"]["mean"] == pytest.approx(sum(values) / len(values) / original)
    assert "near_best" not in group["quantities"]["gold_nll"]
    assert "posix" not in group


def test_posix_is_that_of_plain_transformers_on_full_prompts(copied):
    config, out = copied
    documents, run = again(config, out, ["base"], ["original", "templates"], ("evaluate.posix=2",))
    names, base = ["original", "terse", "whole"], run.load_base()
    asked = {name: answers_of(out, "base", name) for name in names}
    wanted = []
    for row, example in enumerate(run.task().dataset.validation[:2]):
        prompts = {}
        for name in names:
            context = run.task().original if name == "original" else template_context(run, name)
            line = next(line for line in context.encoded.rows if line.example_id == example.id)
            prompts[name] = [*context.encoded.prefix, *line.body]

        def log_prob(asks, of, row=row, prompts=prompts):
            answer = asked[of][row]["answer_ids"]
            logits = plain_logits(base.model, [*prompts[asks], *answer], len(answer)).log_softmax(-1)
            return logits.gather(-1, torch.tensor(answer)[:, None]).sum().item() / len(answer)

        pairs = [abs(log_prob(i, j) - log_prob(j, j)) for i in names for j in names if i != j]
        wanted.append(sum(pairs) / len(pairs))
    group = next(group for group in documents[0]["groups"] if group["group"] == "wordings")
    assert group["posix"]["mean"] == pytest.approx(sum(wanted) / 2, rel=1e-3)
    assert group["posix"]["mean"] > 0.01
    console = Console(file=io.StringIO(), width=200)
    for table in tables([EvaluationDocument.model_validate(documents[0])]):
        console.print(table)
    assert "POSIX" in console.file.getvalue()
    (out / "ledger.jsonl").unlink()
    repeated, _ = again(config, out, ["base"], ["original", "templates"], ("evaluate.posix=2",))
    assert repeated == documents
    assert not (out / "ledger.jsonl").exists(), "what is stored is not computed again"


def template_context(run, name):
    templates = hand_written(run.inputs, run.config.evaluate)
    return run.task().text_context(name, templates[name])


def test_a_mutation_that_a_learned_context_starts_from_is_not_held_out(tmp_path):
    def start_from_mutations(config):
        first = config["contexts"][0]
        config["contexts"] = [
            {**first, "name": "a", "init": "best-mutation", "tokens": None},
            {**first, "name": "b", "init": "mutation:m005", "tokens": None},
        ]
        config["students"] = [student("s", "original", "m001", "random-mutations:1", seed=3)]

    run = open_evaluated(write_evaluated(tmp_path, start_from_mutations), tmp_path / "out")
    with run.opened():
        used = mutations_in_use(everything(run), run.config.students)
        best = run.ranked_mutations()[0][0].name
    assert {"m001", "m005", best} <= used


def test_a_mutation_that_a_teacher_sees_is_not_held_out(tmp_path):
    def distilled(config):
        loss = {"kind": "on-policy", "teacher": {"context": "m004"}}
        config["students"] = [student("s", "original", loss=loss)]

    run = open_evaluated(write_evaluated(tmp_path, distilled), tmp_path / "out")
    with run.opened():
        assert mutations_in_use(everything(run), run.config.students) == {"m004"}


def test_quantities_are_shown_as_a_metric_names_them(evaluated):
    renamed = json.loads(json.dumps(list(evaluated[2].values())).replace("rouge-l", "own.[/x]"))
    documents = [EvaluationDocument.model_validate(document) for document in renamed]
    console = Console(file=io.StringIO(), width=400)
    for table in tables(documents):
        console.print(table)
    assert "own.[/x]" in console.file.getvalue()


def test_every_key_of_a_metric_is_shown(evaluated):
    documents = [EvaluationDocument.model_validate(document) for document in evaluated[2].values()]
    assert further_quantities(documents) == []
    for document in documents:
        document.quantities += ["own.short", "own.polite"]
        for group in document.groups:
            group.quantities["own.short"] = GroupEstimate(mean=0.125, ci95=(0.0, 0.25), spread=0.0)
            group.quantities["own.polite"] = GroupEstimate(mean=0.75, ci95=(0.75, 0.75), spread=0.0)
    console = Console(file=io.StringIO(), width=400)
    for table in tables(documents):
        console.print(table)
    shown = console.file.getvalue()
    assert all(text in shown for text in ("own.short", "own.polite", "0.125±0.125"))
    assert "0.750 " in shown, "an interval without width is not shown"
    assert "0.750±" not in shown


def test_forgetting_has_no_empty_column(evaluated):
    documents = [EvaluationDocument.model_validate(document) for document in evaluated[2].values()]
    whole = [str(column.header) for column in tables(documents)[-1].columns]
    assert {"probe KL(base ‖ model)", "frozen prompt", "no context"} <= set(whole)
    for document in documents:
        document.forgetting = document.frozen_prompt = None
    table = tables(documents)[-1]
    assert [str(column.header) for column in table.columns] == ["model", "task KL", "no context"]
    assert table.caption == "shares of answers that still look like the task's"


def test_another_student_moves_only_the_held_out_mutations_that_it_is_trained_on(tmp_path):
    run = open_evaluated(write_evaluated(tmp_path), tmp_path / "out")

    def held_out(count, *taken):
        settings = run.config.evaluate.model_copy(update={"held_out_mutations": count})
        students = [StudentConfig.model_validate(student(f"on-{name}", name)) for name in taken]
        return {context.name for context in held_out_mutations(everything(run), settings, students)}

    with run.opened():
        accepted = {context.name for context in run.mutation_contexts().values()}
        for count in (1, 2, 3, 4):
            before = held_out(count)
            assert len(before) == count
            assert all(held_out(count, name) == before for name in accepted - before)
            assert all(before - {name} < held_out(count, name) for name in before)


def test_too_few_mutations_to_hold_out_are_one_clear_warning(copied):
    config, out = copied
    _, run = again(config, out, ["base"], ["held-out"], ("evaluate.held_out_mutations=5",))
    warnings = [line for line in run.lines if "held out" in line]
    assert warnings == ["warning: 4 mutations held out, not 5: 2 of 6 accepted are trained on; raise mutations.count"]


def test_a_second_evaluation_does_nothing_again_and_leaves_the_same_bytes(evaluated, copied):
    config, out = copied
    times = {path: path.stat().st_mtime_ns for path in (out / "students").rglob("*.jsonl")}
    documents, _ = again(config, out)
    assert documents == list(evaluated[2].values())
    assert not (out / "ledger.jsonl").exists()
    assert {path: path.stat().st_mtime_ns for path in (out / "students").rglob("*.jsonl")} == times
    assert artefacts(out) == artefacts(evaluated[1])


@pytest.mark.parametrize("damage", ["delete", "truncate"])
def test_what_a_kill_left_undone_is_done_and_ends_in_the_same_bytes(evaluated, copied, damage):
    config, out = copied
    place = out / "students" / "s1"
    (place / "evaluation.json").unlink()
    for name in ("m001.jsonl", "probes.jsonl", "frozen-prompt.jsonl", "terse.jsonl"):
        if (path := place / "evaluation" / name).exists():
            path.unlink() if damage == "delete" else path.write_bytes(path.read_bytes()[:50])
    again(config, out)
    done = stages_in(out)
    assert done[-2:] == ["evaluate/s1/frozen-prompt", "evaluate/s1/probes"]
    assert all(stage.startswith("evaluate/s1/") for stage in done)
    assert "evaluate/s1/original" not in done
    assert artefacts(out) == artefacts(evaluated[1])


def test_shorter_answers_are_given_again_but_probes_are_kept(copied):
    config, out = copied
    again(config, out, ["base"], sets=("evaluate.max_new_tokens=5",))
    done = stages_in(out)
    assert "evaluate/base/original" in done
    assert "evaluate/base/probes" not in done


def test_another_metric_needs_no_model(copied):
    config, out = copied
    documents, _ = again(config, out, sets=("evaluate.metrics=[json-valid]",))
    assert not (out / "ledger.jsonl").exists()
    assert documents[1]["headlines"] == ["json-valid"]


def test_slots_that_no_gold_output_has_are_one_warning(copied):
    config, out = copied
    metrics = "[{kind: slots, path: slot}]"
    documents, run = again(config, out, ["base"], ["original"], (f"evaluate.metrics={metrics}",))
    warnings = [line for line in run.lines if "slots" in line]
    assert warnings == ["warning: slots: no gold output has key/value pairs under 'slot', so there is no recall"]
    assert documents[0]["contexts"][0]["quantities"]["slots.recall"]["mean"] is None


def test_another_student_of_the_same_name_is_measured_anew(copied):
    config, out = copied
    record = entries(out / "students" / "s1" / "kvopt-student.json")
    record["weights_sha256"] = "0" * 64
    write_json(out / "students" / "s1" / "kvopt-student.json", record)
    with pytest.raises(InputError, match="weights are not those"):  # nothing stored is taken for it
        again(config, out, ["s1"])


def test_chosen_contexts_are_measured_alone_and_nothing_is_overwritten(evaluated, copied):
    config, out = copied
    documents, _ = again(config, out, ["s1"], ["original", "templates"])
    assert [context["name"] for context in documents[0]["contexts"]] == ["original", "terse", "whole"]
    assert documents[0]["forgetting"] is None
    assert artefacts(out) == artefacts(evaluated[1])


def test_a_chosen_context_makes_nothing_that_it_does_not_need(tmp_path):
    config, out = write_evaluated(tmp_path), tmp_path / "out"
    documents, _ = again(config, out, ["base"], ["original", "none", "templates"])
    assert [c["name"] for c in documents[0]["contexts"]] == ["original", "none", "terse", "whole"]
    assert not (out / "mutations.jsonl").exists()
    assert not (out / "contexts").exists()
    documents, _ = again(config, out, ["base"], ["kv-8"])
    assert [(c["name"], c["group"]) for c in documents[0]["contexts"]] == [("kv-8", "learned")]
    assert not (out / "mutations.jsonl").exists()
    documents, run = again(config, out, ["base"], ["held-out"])
    held_out = [c["name"] for c in documents[0]["contexts"]]
    assert len(held_out) == 2
    trained = next(m.name for m in run.mutation_contexts().values() if m.name not in held_out)
    documents, _ = again(config, out, ["base"], [held_out[1], trained])
    assert [(c["name"], c["group"]) for c in documents[0]["contexts"]] == [
        (held_out[1], "held-out"), (trained, "other"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["probes.txt"], "--context: 'probes' is the name of a probe"),
        (["a b.txt", "a_b.txt"], "answers under 'a b' and 'a_b' would be stored in one file"),
    ],
)
def test_contexts_whose_answers_would_overwrite_others_are_refused(copied, tmp_path, files, message):
    config, out = copied
    for name in files:
        (tmp_path / name).write_text("Which label fits?")
    with pytest.raises(InputError, match=message):
        again(config, out, ["base"], [f"text:{tmp_path / name}" for name in files])
    templates = "- {name: frozen-prompt, text: 'Label?'}"
    (tmp_path / "t.yaml").write_text(templates)
    with pytest.raises(InputError, match=r"evaluate\.templates: 'frozen-prompt' is the name of a probe"):
        again(config, out, ["base"], sets=(f"evaluate.templates={tmp_path / 't.yaml'}",))


def test_probes_that_cannot_be_read_are_told_before_any_work(tmp_path):
    config, out = write_evaluated(tmp_path), tmp_path / "out"
    with pytest.raises(InputError, match="no such file"):
        again(config, out, ["base"], sets=("evaluate.probes.file=nothing.jsonl",))
    assert not (out / "mutations.jsonl").exists()
    assert not (out / "students").exists()


def test_a_context_of_the_command_line_alone(copied, tmp_path):
    config, out = copied
    (tmp_path / "mine.txt").write_text("Which label fits?")
    documents, _ = again(config, out, ["base"], [f"text:{tmp_path / 'mine.txt'}"])
    assert [(c["name"], c["group"]) for c in documents[0]["contexts"]] == [("mine", "other")]


def test_students_that_are_not_there_are_named(copied):
    config, out = copied
    with pytest.raises(InputError, match=r"no student 'nobody' \(known: base, s1, s2\)"):
        again(config, out, ["nobody"])
    shutil.rmtree(out / "students" / "s1")
    with pytest.raises(InputError, match="student s1: is not trained yet"):
        again(config, out, ["s1"])
    documents, run = again(config, out)
    assert [document["name"] for document in documents] == ["base", "s2"]
    assert any("student s1: is not trained yet" in line for line in run.lines)


def test_a_judge_is_asked_once_for_each_answer_and_again_only_where_it_failed(copied):
    config, out = copied
    asked: list[str] = []

    def handle(request: httpx.Request) -> httpx.Response:
        asked.append(request.content.decode())
        if len(asked) == 2:
            return httpx.Response(400, text="no")
        return httpx.Response(200, json={"choices": [{"message": {"content": "3"}}]})

    settings = "[{kind: judge, base_url: 'http://judge.invalid/v1', model: m, retries: 0, concurrency: 1}]"
    counts, values, warnings = [], [], []
    for _ in range(3):
        run = open_evaluated(config, out, (f"evaluate.metrics={settings}",))
        with run.opened():
            whole = evaluator_of(run, run.config.students).conditions[:1]
            evaluation = evaluator_of(run, run.config.students, only=whole)
            judge = evaluation.metrics[0]
            assert isinstance(judge, Judge)
            evaluation.__dict__["metrics"] = [judge.through(httpx.MockTransport(handle))]
            document = evaluation.evaluate(subject(run.task(), "base", run.at)).to_json()
        counts.append(len(asked))
        warnings.append([line for line in run.lines if "judge" in line and line.startswith("warning")])
        values.append({q: v["mean"] for q, v in document["contexts"][0]["quantities"].items() if q.startswith("judge")})
    assert counts == [4, 5, 5]
    what = "judge has no score for 1 of 4 answers (original.judge), for the first because of: failed: status 400: no"
    assert warnings == [[f"warning: {what}"], [], []]
    assert values == [{"judge": 0.5, "judge.failed": 0.25}, *[{"judge": 0.5, "judge.failed": 0.0}] * 2]


def test_probe_rows_that_are_too_long_are_left_out_and_counted(copied, tmp_path):
    config, out = copied
    write_rows(
        tmp_path / "long.jsonl",
        [{"prompt": "Say " + "rain " * 80, "output": "rain"}, {"prompt": "a", "output": "b"}],
    )
    sets = (f"evaluate.probes.file={tmp_path / 'long.jsonl'}", "evaluate.probes.max_tokens=64")
    documents, _ = again(config, out, ["base"], sets=sets)
    assert (documents[0]["forgetting"]["rows"], documents[0]["forgetting"]["too_long"]) == (1, 1)
    with pytest.raises(InputError, match="every row has more than 9 tokens"):
        again(config, out, ["base"], sets=(sets[0], "evaluate.probes.max_tokens=9"))


def test_a_probe_row_without_the_column_is_named(copied):
    config, out = copied
    with pytest.raises(InputError, match=r"probes\.jsonl:1: .*question"):
        again(config, out, ["base"], sets=("evaluate.probes.prompt=question",))


def test_a_student_of_another_template_is_told(copied):
    config, out = copied
    path = out / "students" / "s1" / "kvopt-student.json"
    write_json(path, entries(path) | {"template_sha256": "0" * 64})
    _, run = again(config, out, ["s1"], ["original"])
    assert "warning: student s1 was trained for another template than the config's" in run.lines


def test_answers_may_be_drawn_and_are_then_a_function_of_the_seed(copied):
    config, out = copied
    greedy = answers_of(out, "base", "original")
    drawn = []
    for seed in (1, 2, 1):
        again(config, out, ["base"], ["original"], ("evaluate.temperature=1.5", f"seed={seed}"))
        drawn.append([row.get("answer") for row in answers_of(out, "base", "original")])
    assert drawn[0] == drawn[2]
    assert drawn[0] != drawn[1]
    assert drawn[0] != [row.get("answer") for row in greedy]


def test_an_answer_stops_at_the_token_that_gold_outputs_end_with(copied):
    config, out = copied
    run = open_evaluated(config, out)
    with run.opened():
        row, prefix = run.task().rows("validation").rows[0], run.task().original.prefix(run.load_base())
        whole = generate(run.load_base(), prefix, [row.body], max_new_tokens=6, stop=frozenset())[0]
        run.task().__dict__["answer_ends"] = frozenset({whole[3]})
        conditions = evaluator_of(run, run.config.students).conditions[:1]
        evaluation = evaluator_of(run, run.config.students, only=conditions)
        evaluation.evaluate(subject(run.task(), "base", run.at))
    first = answers_of(out, "base", "original")[0]
    assert first["answer_tokens"] == whole.index(whole[3])
    assert first["cut"] is False
