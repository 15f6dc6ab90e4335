"""The multiplied training set as JSONL, which plain SFT trainers read: every training row under every text context.

Nothing is computed: no model is loaded and no answer generated; gold outputs are the bytes of the data. Mutations are
those that a run has already found, in the order in which it ranked them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from kvopt.config.names import ContextName, unknown_context
from kvopt.config.students import ContextChoice, StudentConfig
from kvopt.documents.manifest import RunManifest
from kvopt.documents.scores_file import ScoreLine
from kvopt.documents.validated import first_fault, read_document, reason_of
from kvopt.errors import InputError
from kvopt.mutate.mutation import read_mutations
from kvopt.mutate.orders import first_mutations
from kvopt.run.inputs import Inputs
from kvopt.run.race import check_raced
from kvopt.task.examples import Example
from kvopt.task.template import Template
from kvopt.task.template_files import name_of_file, template_from_file

FORMATS = ("prompt-completion", "messages")
RUN_FIRST = "kvopt run makes and ranks them"


def export_rows(
    inputs: Inputs, run: Path, choices: Sequence[ContextChoice], seed: int, format: str = "prompt-completion"
) -> Iterator[dict[str, Any]]:
    """One row for each training example and context, contexts in order, as often as their (whole) weight says.

    ``run`` is the run directory whose mutations the choices name. A row has ``context_id``, ``example_id`` and, as
    ``prompt-completion``, ``prompt`` and ``completion`` (text, or messages under a chat template), or, as ``messages``,
    ``messages`` that end with the assistant's.

    Raises:
        InputError: a context that is no text or not there, a weight that is no whole number, messages of a template
            that is plain text.
    """
    if format not in FORMATS:
        raise InputError(f"no format {format!r}", where="--format", fix=" or ".join(FORMATS))
    if format == "messages" and not inputs.template.is_chat:
        fix = "use --format prompt-completion"
        raise InputError("a template of plain text has no messages", where="--format messages", fix=fix)
    templates = text_templates(inputs, run, choices, seed)
    for name, template, copies in templates:
        for _ in range(copies):
            for example in inputs.dataset.train:
                yield {"context_id": name, "example_id": example.id, **_row(template, example, format)}


def _row(template: Template, example: Example, format: str) -> dict[str, Any]:
    prompt: Any = template.fill(example.values)
    if not template.is_chat:
        return {"prompt": prompt, "completion": example.output}
    answer = [{"role": "assistant", "content": example.output}]
    if format == "messages":
        return {"messages": prompt + answer}
    return {"prompt": prompt, "completion": answer}


def text_templates(
    inputs: Inputs, run: Path, choices: Sequence[ContextChoice], seed: int
) -> list[tuple[str, Template, int]]:
    """(name, template, copies) of each context that the choices name. Raises InputError."""
    wordings: list[tuple[str, Template, int]] = []
    for choice in choices:
        if choice.weight != int(choice.weight):
            raise InputError(f"weight {choice.weight} is no whole number", where=choice.context)
        taken = {name for name, _, _ in wordings}
        for name, template in _named(inputs, run, choice.context, seed, taken):
            if name in taken:
                raise InputError(f"{name!r} is given twice", where=choice.context, fix="give it once, with a weight")
            wordings.append((name, template, int(choice.weight)))
    return wordings


def _named(inputs: Inputs, run: Path, spec: str, seed: int, taken: set[str]) -> list[tuple[str, Template]]:
    name = ContextName.parse(spec, "export-data")
    if name.form == "original":
        return [(spec, inputs.template)]
    if name.form == "none":
        raise InputError("has no prompt to write", where=spec, fix="kvopt train trains under it")
    if name.form == "text":
        path = inputs.base_dir / name.argument
        return [(name_of_file(name.argument), template_from_file(path, inputs.template))]
    if name.argument in inputs.written:
        return [(name.argument, inputs.written[name.argument])]
    if name.argument in inputs.context_names or (name.argument and (inputs.base_dir / name.argument).is_dir()):
        fix = "kvopt train trains under it; text contexts can be exported"
        raise InputError("a learned context has no text", where=spec, fix=fix)
    mutations = _mutations(inputs, run)
    if name.form == "counted":
        check_raced(inputs.config, name, spec)
        limit = inputs.config.score.max_kl
        names = first_mutations(
            name.order,
            name.count,
            mutations,
            lambda: _ranked(run, mutations, limit),
            inputs.template,
            seed=seed,
            taken=taken,
            where=spec,
            whole=limit is not None,
        )
        return [(key, mutations[key]) for key in names]
    if name.argument in mutations:
        return [(name.argument, mutations[name.argument])]
    raise unknown_context(spec, "export-data", ["original"], ("counted", "text", "mutation"))


def _mutations(inputs: Inputs, run: Path) -> dict[str, Template]:
    """Accepted mutations by name. Raises InputError where the run has none of this template."""
    _check_same_task(inputs, run)
    accepted = [m for m in read_mutations(run / "mutations.jsonl") if m.accepted]
    return {m.name: m.template for m in accepted if m.name is not None and m.template is not None}


def _ranked(run: Path, known: Collection[str], limit: float | None) -> list[str]:
    """Names of mutations by forward KL on the selection rows, lowest first and up to ``limit``, as the run wrote them
    down.
    """
    path = run / "scores.jsonl"
    try:
        rows = [ScoreLine.model_validate_json(line) for line in path.read_text("utf-8").splitlines()]
    except FileNotFoundError:
        raise InputError("mutations are not ranked yet", where=str(path), fix=RUN_FIRST) from None
    except ValidationError as error:
        place, what = first_fault(error)
        raise InputError(
            f"is damaged: {place}: {what}" if place else f"is damaged: {what}",
            where=str(path),
            fix="run kvopt run again",
        ) from None
    except (OSError, ValueError) as error:
        raise InputError(f"is damaged: {reason_of(error)}", where=str(path), fix="run kvopt run again") from None
    scored = sorted((row.kl_forward.mean, row.context) for row in rows if row.split == "selection")
    return [name for kl, name in scored if name in known and (limit is None or kl <= limit)]


def _check_same_task(inputs: Inputs, run: Path) -> None:
    path = run / "manifest.json"
    if not path.exists():
        raise InputError("there is no run with mutations", where=str(run), fix=RUN_FIRST)
    manifest = read_document(RunManifest, path)
    wanted = {
        "another template": (manifest.template_sha256, inputs.template.sha256),
        "other data": (manifest.data_sha256, inputs.dataset.sha256),
    }
    for difference, (recorded, digest) in wanted.items():
        if recorded != digest:
            what = f"the run was made with {difference} than the config's"
            raise InputError(what, where=str(run), fix="give its own config, or run kvopt run again")


def choices_of(inputs: Inputs, student: str | None, contexts: Sequence[str]) -> tuple[list[ContextChoice], int]:
    """What to export and the seed of random choices: the named contexts, or those of a student (default: the config's
    only one, else the original). Raises InputError.
    """
    students: dict[str, StudentConfig] = {config.name: config for config in inputs.config.students}
    if student is not None and student not in students:
        raise InputError(f"no student {student!r}", where="--student", fix="known: " + (", ".join(students) or "none"))
    if contexts and student is not None:
        raise InputError("give --student or --context, not both", where="export-data")
    if contexts:
        return [ContextChoice(context=_from_here(spec)) for spec in contexts], inputs.config.seed
    if student is None and len(students) > 1:
        raise InputError("the config has several students", where="export-data", fix="choose one with --student")
    chosen = students[student] if student else next(iter(students.values()), None)
    if chosen is None:
        return [ContextChoice(context="original")], inputs.config.seed
    return chosen.contexts, inputs.config.seed if chosen.seed is None else chosen.seed


def _from_here(spec: str) -> str:
    """On the command line a file is relative to the working directory, not to the config."""
    name = ContextName.parse(spec, "--context")
    return f"text:{Path(name.argument).absolute()}" if name.form == "text" else spec
