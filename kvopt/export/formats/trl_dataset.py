"""``--to trl-dataset``: the training rows under a text context, as prompt-completion JSONL that TRL's trainers read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from kvopt.documents.export_record import ExportFacts
from kvopt.errors import counted
from kvopt.export.export_format import ExportFormat, Written

if TYPE_CHECKING:
    from kvopt.export.source import Source

FILE = "train.jsonl"

SNIPPET = """\
from datasets import load_dataset

rows = load_dataset("json", data_files="train.jsonl", split="train")
print(len(rows), rows[0]["prompt"], rows[0]["completion"])
# trl.SFTTrainer(model=MODEL, train_dataset=rows).train()
"""


class TrlFormat(ExportFormat):
    """Training rows for TRL."""

    takes: ClassVar[tuple[str, ...]] = ("text",)
    rank: ClassVar[int] = 5
    kind: Literal["trl-dataset"] = "trl-dataset"
    config: Path | None = Field(
        None,
        description="the run's own config, where its data were moved",
        json_schema_extra={"metavar": "CONFIG.yaml"},
    )

    def write(self, source: Source, place: Path) -> Written:
        """``train.jsonl``: ``prompt`` and ``completion`` (messages under a chat template), ``context_id``,
        ``example_id``.

        Raises:
            InputError: the data are not where the config says, or are not those of the run.
        """
        from kvopt.config.students import ContextChoice
        from kvopt.export.training_rows import export_rows
        from kvopt.run.inputs import inputs_of_run
        from kvopt.storage.files import write_text

        if source.run is None:
            raise ValueError("a text context belongs to a run")
        inputs = inputs_of_run(source.run.path, self.config)
        rows = list(export_rows(inputs, source.run.path, [ContextChoice(context=source.name)], inputs.config.seed))
        write_text(place / FILE, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        return Written(
            summary=f"{counted(len(rows), 'training row')} under the context {source.name}, as prompt and completion.",
            snippet=SNIPPET,
            library="datasets",
            notes=(
                "Gold outputs are the bytes of the data; `context_id` and `example_id` say where a row comes from.",
                "`kvopt export-data` writes the rows under several contexts at once.",
            ),
            facts=ExportFacts(rows=len(rows)),
        )
