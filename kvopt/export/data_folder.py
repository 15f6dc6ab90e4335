"""What ``kvopt export-data`` writes: the rows, a page beside them that says how other trainers read them, and adapter
folders of the learned contexts that have no rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kvopt.errors import InputError
from kvopt.export.row_formats import end_token_of
from kvopt.export.stanzas import guide
from kvopt.export.training_rows import choices_of, encoder_of, export_rows, learned_choices
from kvopt.export.trl_check import RowDifference, trl_differences
from kvopt.run.inputs import Inputs
from kvopt.storage.files import write_jsonl, write_text


@dataclass(frozen=True)
class WrittenData:
    """What was written.

    Attributes:
        file, rows: the JSONL file and its rows.
        guide: the page beside it.
        adapters: folders of learned contexts.
        differences: rows that TRL makes other ids or labels of; None where it was not asked.
    """

    file: Path
    rows: list[dict[str, Any]]
    guide: Path
    adapters: list[Path]
    differences: list[RowDifference] | None = None

    def to_json(self) -> dict[str, Any]:
        """As the command prints it."""
        names = [row["context_id"] for row in self.rows]
        report = {
            "file": str(self.file),
            "rows": len(self.rows),
            "contexts": {name: names.count(name) for name in dict.fromkeys(names)},
            "guide": str(self.guide),
            "adapters": [str(folder) for folder in self.adapters],
        }
        return report if self.differences is None else report | {"trl": [asdict(d) for d in self.differences]}


def write_data(
    inputs: Inputs,
    run: Path,
    file: Path,
    student: str | None,
    contexts: Sequence[str],
    format: str,
    *,
    verify: bool = False,
) -> WrittenData:
    """Write the rows under the contexts that are named, or those of a student.

    Args:
        inputs, run: the config's, and the run directory with its mutations and learned contexts.
        file: the JSONL file; ``FILE.md`` and ``NAME-peft/`` are written beside it.
        student, contexts: as for :func:`kvopt.export.training_rows.choices_of`.
        format: of the rows.
        verify: also compare what TRL makes of the rows with ours.

    Raises:
        InputError: as for the rows; a learned context that is named itself, that the run does not have, or that stands
            alone.
    """
    choices, seed = choices_of(inputs, student, contexts)
    learned = [] if contexts else learned_choices(inputs, choices)
    texts = [choice for choice in choices if choice.context not in learned]
    if learned and not texts:
        what = "all contexts of the student are learned and have no rows"
        raise InputError(what, where=", ".join(learned), fix="kvopt export RUN#NAME --to peft writes each")
    folders = {name: _folder_of(inputs, run, name) for name in learned}
    rows = list(export_rows(inputs, run, texts, seed, format))
    encoder = encoder_of(inputs, run)
    end = end_token_of(inputs.template, encoder)
    eos = end if end != encoder.tokenizer.eos_token else None
    differences = None
    if verify:
        ours = rows if format == "tokens" else list(export_rows(inputs, run, texts, seed, "tokens"))
        differences = trl_differences(rows, ours, encoder.tokenizer, format, eos)
    write_jsonl(file, rows)
    adapters = []
    for name, folder in folders.items():
        from kvopt.export.writing import export

        adapters.append(file.parent / f"{Path(name).name}-peft")
        export(folder, "peft", adapters[-1])
    page = file.with_name(file.name + ".md")
    write_text(page, guide(format, file.name, inputs.config.model.base, eos, [folder.name for folder in adapters]))
    return WrittenData(file, rows, page, adapters, differences)


def _folder_of(inputs: Inputs, run: Path, name: str) -> Path:
    plain = name.removeprefix("context:")
    if plain in inputs.context_names:
        folder = run / "contexts" / plain
        if not folder.is_dir():
            raise InputError("is not learned yet", where=plain, fix="kvopt run or kvopt optimize learns it")
        return folder
    return inputs.base_dir / plain
