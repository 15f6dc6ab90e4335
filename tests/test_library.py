"""The functions without a run directory: they give what a run gives, agree with plain transformers, and their examples
and those of docs/library.md run.
"""

from __future__ import annotations

import doctest
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import kvopt
from kvopt.config.document import load_config
from kvopt.contexts import load_context
from kvopt.contexts.context import KVContext
from kvopt.errors import InputError
from kvopt.run.run import Run
from tests.jobs import SYSTEM, rows, write_job
from tests.tiny import tiny_base, tiny_folder

ROOT = Path(__file__).resolve().parents[1]
TEMPLATE = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": "Message: {{text}}"}]
OTHER = "Please sort the message into weather, music or book."
QUICK: dict[str, Any] = {"steps": 6, "batch_size": 4, "eval_every": 2}
BUILT_IN = '"smollm2-135m"'


def in_place_of_the_built_in(code: str) -> str:
    assert "smollm2" not in code.replace(BUILT_IN, "")
    return code.replace(BUILT_IN, repr(str(tiny_folder("llama"))))


@pytest.fixture(scope="module")
def base() -> kvopt.Base:
    return tiny_base("llama")


@pytest.fixture
def task() -> kvopt.Task:
    return kvopt.Task(TEMPLATE, rows()[:14], rows()[14:])


def test_the_examples_of_the_docstrings_run(base: kvopt.Base, task: kvopt.Task) -> None:
    context = kvopt.learn(base, task, tokens=8, **QUICK)
    names = {name: getattr(kvopt, name) for name in kvopt.__all__} | {"base": base, "task": task, "context": context}
    for thing in (kvopt.Base.load, kvopt.Task, kvopt.learn, kvopt.score, kvopt.kl):
        text = in_place_of_the_built_in(thing.__doc__ or "")
        found = doctest.DocTestParser().get_doctest(text, dict(names), thing.__name__, None, 0)
        assert found.examples
        assert doctest.DocTestRunner(verbose=False).run(found).failed == 0


def test_the_page_runs_from_its_first_line_to_its_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/library.md").read_text("utf-8"), flags=re.S)
    space: dict[str, Any] = {"rows": rows()}
    for block in blocks:
        exec(compile(in_place_of_the_built_in(block), "docs/library.md", "exec"), space)
    printed = capsys.readouterr().out.splitlines()
    assert len(blocks) >= 4
    assert printed[0].startswith("original")
    assert {path.name for path in tmp_path.iterdir()} == {"my-context"}


def test_importing_the_functions_by_name_stays_lazy_and_learn_is_the_function() -> None:
    from kvopt import learn

    assert callable(learn)
    assert {"Base", "Task", "learn", "score", "kl"} <= set(dir(kvopt))


def test_a_run_gives_the_same_context_and_the_same_scores(base: kvopt.Base, task: kvopt.Task, tmp_path: Path) -> None:
    def plain(config: dict[str, Any]) -> None:
        config["contexts"] = [c for c in config["contexts"] if c["name"] != "kv-best"]
        config["mutations"] = {"count": 0}

    loaded, base_dir = load_config(write_job(tmp_path / "job", plain))
    with Run(loaded, base_dir, tmp_path / "run", say=lambda line: None, bars=False).opened() as run:
        theirs = {context.name: (context, run.score(context)) for context in run.learned()}
    kv = kvopt.learn(base, task, "kv", 8, "strided", **QUICK)
    soft = kvopt.learn(base, task, "soft", 6, "template", **(QUICK | {"steps": 3}))
    scores = kvopt.score(base, task, [kv, soft])
    for ours in (kv, soft):
        context, expected = theirs[ours.name]
        torch.testing.assert_close(ours.tensor, context.tensor, rtol=1e-4, atol=1e-4)
        assert scores[ours.name].kl_forward.mean == pytest.approx(expected.kl_forward.mean, rel=1e-3)
        assert scores[ours.name].gold_nll.mean == pytest.approx(expected.gold_nll.mean, rel=1e-4)


@torch.no_grad()
def test_kl_and_score_are_those_of_plain_transformers(base: kvopt.Base, task: kvopt.Task) -> None:
    encoded = task.on(base)

    def log_probs(messages: list[dict[str, str]], gold: tuple[int, ...]) -> torch.Tensor:
        ids = base.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        logits = base.model(torch.tensor([[*ids, *gold]])).logits[0, len(ids) - 1 : -1]
        return logits.double().log_softmax(-1)

    divergences, nll = [], []
    for example in task.dataset.validation:
        gold = encoded.gold[example.id]
        user = {"role": "user", "content": f"Message: {example.values['text']}"}
        p = log_probs([{"role": "system", "content": SYSTEM}, user], gold)
        q = log_probs([{"role": "system", "content": OTHER}, user], gold)
        divergences.append((p.exp() * (p - q)).sum(-1))
        nll.append(-q.gather(1, torch.tensor(gold)[:, None])[:, 0])
    expected = float(torch.cat(divergences).mean())
    wording = kvopt.score(base, task, {"other": OTHER})["other"]
    assert wording.kl_forward.mean == pytest.approx(expected, rel=1e-4)
    assert wording.gold_nll.mean == pytest.approx(float(torch.cat(nll).mean()), rel=1e-4)
    assert float(kvopt.kl(base, task, OTHER, split="validation")) == pytest.approx(expected, rel=1e-4)
    third = float(kvopt.kl(base, task, OTHER, split="validation", rows=[2]))
    assert third == pytest.approx(float(divergences[2].mean()), rel=1e-4)


@pytest.mark.parametrize("kind", ["kv", "soft"])
def test_a_descent_of_ones_own_lowers_what_score_measures(base: kvopt.Base, task: kvopt.Task, kind: Any) -> None:
    begun = kvopt.learn(base, task, kind, 6, "strided", steps=0)
    tensor = begun.tensor.clone().requires_grad_(True)
    optimizer = torch.optim.Adam([tensor], lr=0.02)
    for _ in range(8):
        optimizer.zero_grad()
        kvopt.kl(base, task, tensor).backward()
        optimizer.step()
    moved = type(begun)("moved", tensor.detach())
    scores = kvopt.score(base, task, [begun, moved], split="train")
    assert scores["moved"].kl_forward.mean < 0.9 * scores[begun.name].kl_forward.mean
    assert float(kvopt.kl(base, task, moved)) == pytest.approx(scores["moved"].kl_forward.mean, rel=1e-4)


def test_learning_goes_on_from_a_context_and_reports_each_step(base: kvopt.Base, task: kvopt.Task) -> None:
    first = kvopt.learn(base, task, tokens=6, **QUICK)
    seen: list[tuple[Any, ...]] = []
    second = kvopt.learn(base, task, tokens=None, start=first, report=lambda *of: seen.append(of), name="more", **QUICK)
    assert [step for step, _, _ in seen] == list(range(7))
    assert (second.name, second.tokens) == ("more", 6)
    before = seen[0][2]
    assert min(held for _, _, held in seen if held is not None) <= before
    untouched = kvopt.learn(base, task, tokens=None, start=first, steps=0)
    assert torch.equal(untouched.tensor, first.tensor)


def test_one_task_serves_several_bases_and_nothing_is_written(
    task: kvopt.Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    llama, gemma = tiny_base("llama"), tiny_base("gemma3")
    context = kvopt.learn(llama, task, tokens=4, start="strided", **QUICK)
    one = kvopt.score(llama, task, [context, "none"])
    assert kvopt.score(gemma, task, ["none"])["none"].kl_forward.mean > 0
    again = kvopt.score(llama, task, [context, "none"])
    assert {name: s.kl_forward for name, s in again.items()} == {name: s.kl_forward for name, s in one.items()}
    with pytest.raises(InputError, match=r"a tensor of shape \[4, 3, 2, 2, 8\] is no context of"):
        kvopt.score(gemma, task, [context])
    assert list(tmp_path.iterdir()) == []


def test_a_saved_context_is_scored_from_its_folder(base: kvopt.Base, task: kvopt.Task, tmp_path: Path) -> None:
    from kvopt.contexts import save_context

    context = kvopt.learn(base, task, tokens=4, start="strided", **QUICK)
    save_context(context, tmp_path / "c", base)
    scores = kvopt.score(base, task, [context, tmp_path / "c"])
    assert scores["c"].kl_forward == scores["kv-4"].kl_forward
    assert load_context(tmp_path / "c", base).sha256() == context.sha256()


def test_what_is_only_worth_a_look_is_a_warning() -> None:
    with pytest.warns(UserWarning, match="columns that no slot uses: extra"):
        kvopt.Task(TEMPLATE, [row | {"extra": 1} for row in rows()])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kvopt.Task(TEMPLATE, rows())


def test_numbers_in_rows_are_their_json_text() -> None:
    data = [{"text": i, "output": i * 0.5} for i in range(12)]
    examples = kvopt.Task("Halve {{text}}:\n", data).dataset
    every = {e.values["text"]: e.output for e in (*examples.train, *examples.selection, *examples.validation)}
    assert every["3"] == "1.5"


def test_bad_input_is_one_line(base: kvopt.Base, task: kvopt.Task) -> None:
    tensor = torch.zeros(3, 5)
    moved = KVContext("kv-4", torch.zeros(4, 3, 2, 2, 8))
    for call, message in [
        (lambda: kvopt.Base.load("smollm2-135m", dtyp="float32"), "did you mean 'dtype'"),
        (lambda: kvopt.Task("no slot", rows()), "no slots"),
        (lambda: kvopt.Task(TEMPLATE, "rows.jsonl"), "must be rows in memory"),
        (lambda: kvopt.Task(TEMPLATE, [*rows(), "row"]), "rows:21: the row is text"),
        (lambda: kvopt.Task(TEMPLATE, [*rows(), {"text": float("nan"), "output": "x"}]), "rows:21: .*is null"),
        (lambda: kvopt.Task(TEMPLATE, rows(), settings={"contexts": []}), "a task has no 'contexts'"),
        (lambda: kvopt.Task(TEMPLATE, rows()[:3], rows()[:3]), "has the same values as the validation row"),
        (lambda: kvopt.learn(base, task, "lora"), "no kind 'lora'"),  # type: ignore[arg-type]
        (lambda: kvopt.learn(base, task, text="mine.txt"), "a wording is not learned"),
        (lambda: kvopt.learn(base, task, stepz=3), "did you mean 'steps'"),
        (lambda: kvopt.learn(base, task, start="best-mutation"), "needs what a run has made"),
        (lambda: kvopt.learn(base, task, start="extract:8"), "needs what a run has made"),
        (lambda: kvopt.learn(base, task, tokens=500, start="random"), "do not fit the window"),
        (lambda: kvopt.score(base, task, "original"), "must be a list of contexts"),
        (lambda: kvopt.score(base, task, ["none", "none"]), "two contexts are called 'none'"),
        (lambda: kvopt.score(base, task, ["Only {{this}}"]), "has the slots this, the template has text"),
        (lambda: kvopt.score(base, task, ["none"], split="test"), "no split 'test'"),  # type: ignore[arg-type]
        (lambda: kvopt.score(base, task, [KVContext("x", moved.states[:, :1])]), "is no context of"),
        (lambda: kvopt.kl(base, task, tensor), r"a tensor of shape \[3, 5\] is no context"),
        (lambda: kvopt.kl(base, task, moved, rows=[99]), "rows \\[99\\] of train, which has 11"),
        (lambda: kvopt.kl(base, task, moved, rows=[]), "rows \\[\\] of train"),
    ]:
        with pytest.raises(InputError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)
