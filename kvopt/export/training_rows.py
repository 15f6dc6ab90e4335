"""The multiplied training set as JSONL, which plain SFT trainers read: every training row under every text context.

Nothing is computed: no model is loaded and no answer generated; gold outputs are the bytes of the data. Mutations are
those that a run has already found, in the order in which it ranked them. ``row_formats.py`` has what a row looks like.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from kvopt.config.names import ContextName, unknown_context
from kvopt.config.students import ContextChoice, StudentConfig
from kvopt.documents.manifest import RunManifest
from kvopt.documents.scores_file import ScoreLine
from kvopt.documents.validated import first_fault, read_document, read_leaderboard, reason_of
from kvopt.errors import InputError
from kvopt.export.row_formats import TOKENIZED, check_format, formatted
from kvopt.mutate.mutation import read_mutations
from kvopt.mutate.orders import first_mutations
from kvopt.run.inputs import Inputs
from kvopt.run.race import check_raced
from kvopt.task.seam import Encoder
from kvopt.task.template import Template
from kvopt.task.template_files import name_of_file, template_from_file

RUN_FIRST = "kvopt run makes and ranks them"


def export_rows(
    inputs: Inputs, run: Path, choices: Sequence[ContextChoice], seed: int, format: str = "prompt-completion"
) -> Iterator[dict[str, Any]]:
    """One row for each training example and context, contexts in order, as often as their (whole) weight says.

    ``run`` is the run directory whose mutations the choices name. A row has ``context_id``, ``example_id`` and what
    ``format`` says (see :mod:`kvopt.export.row_formats`).

    Raises:
        InputError: an unknown format, a context that is no text or not there, a weight that is no whole number, a
            template or row that the format cannot hold.
    """
    check_format(format, inputs.template)
    encoder = encoder_of(inputs, run) if format in TOKENIZED else None
    for name, template, copies in whole_weights(text_templates(inputs, run, choices, seed)):
        rows = formatted(format, template, inputs.dataset.train, encoder, name)
        for _ in range(copies):
            yield from ({"context_id": name, "example_id": example_id, **row} for example_id, row in rows)


def encoder_of(inputs: Inputs, run: Path) -> Encoder:
    """What encodes the rows as the run does: the base's tokenizer, without its weights, and the run's clock."""
    from kvopt.base.loading import load_tokenizer

    path = run / "manifest.json"
    began = read_document(RunManifest, path).prompt_time if path.is_file() else None
    now = datetime.fromisoformat(began) if began else None
    return Encoder.of(load_tokenizer(inputs.config.model)[0], inputs.config.template, now)


def whole_weights(templates: Sequence[tuple[str, Template, float]]) -> list[tuple[str, Template, int]]:
    """The same with weights as numbers of copies. Raises InputError for one that is no whole number."""
    for name, _, weight in templates:
        if weight != int(weight):
            raise InputError(f"weight {weight} is no whole number", where=name)
    return [(name, template, int(weight)) for name, template, weight in templates]


def learned_choices(inputs: Inputs, choices: Sequence[ContextChoice]) -> list[str]:
    """Those of the choices that have no text: names of learned contexts, and folders of them."""
    named = [(choice.context, ContextName.parse(choice.context, "export-data")) for choice in choices]
    return [spec for spec, name in named if _is_learned(inputs, name)]


def _is_learned(inputs: Inputs, name: ContextName) -> bool:
    if name.form not in ("plain", "context") or name.argument in inputs.written:
        return False
    return name.argument in inputs.context_names or (inputs.base_dir / name.argument).is_dir()


def text_templates(
    inputs: Inputs, run: Path, choices: Sequence[ContextChoice], seed: int
) -> list[tuple[str, Template, float]]:
    """(name, template, weight) of each context that the choices name. Raises InputError."""
    wordings: list[tuple[str, Template, float]] = []
    for choice in choices:
        taken = {name for name, _, _ in wordings}
        for name, template in _named(inputs, run, choice.context, seed, taken):
            if name in taken:
                raise InputError(f"{name!r} is given twice", where=choice.context, fix="give it once, with a weight")
            wordings.append((name, template, choice.weight))
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
    if _is_learned(inputs, name):
        fix = "kvopt train trains under it; kvopt export writes it as an adapter"
        raise InputError("a learned context has no text", where=spec, fix=fix)
    mutations = _mutations(inputs, run)
    if name.form == "counted":
        check_raced(inputs.config, name, spec)
        limit = inputs.config.score.max_kl
        names = first_mutations(
            name.order,
            name.count,
            mutations,
            lambda: _ranked(run, mutations, limit, inputs.config.score.select),
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


def _ranked(run: Path, known: Collection[str], limit: float | None, select: str) -> list[str]:
    """Names of mutations as the run ordered them: by what ``score.select`` says on the selection rows, then by forward
    KL; those up to ``limit``.
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
    rows = [row for row in rows if row.split == "selection" and row.context in known]
    values = _selected_by(run, rows, select)
    ordered = sorted(rows, key=lambda row: (values[row.context], row.kl_forward.mean, row.context))
    return [row.context for row in ordered if limit is None or row.kl_forward.mean <= limit]


def _selected_by(run: Path, rows: Sequence[ScoreLine], select: str) -> dict[str, float]:
    """What the run ordered these contexts by, lowest first, by name. Raises InputError where it did not write it
    down.
    """
    if select == "kl":
        return {row.context: row.kl_forward.mean for row in rows}
    if select == "gold_nll":
        return {row.context: row.gold_nll for row in rows}
    path = run / "leaderboard.json"
    order = read_leaderboard(path).mutations_in_order if path.is_file() else None
    if order is None or {row.context for row in rows} - set(order):
        what = f"the order of the mutations by {select} is not written down"
        raise InputError(what, where=str(path), fix="give kvopt run again")
    return {name: float(place) for place, name in enumerate(order)}


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
