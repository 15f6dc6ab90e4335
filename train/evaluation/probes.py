"""Probe prompts: what a student does on prompts that have nothing to do with the task, against the base.

The base's hidden states on their gold tokens are kept in ``RUN/probes/`` as a reference, so that every student is
compared with the same numbers.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from kvopt.base.loading import Base
from kvopt.base.prefix import Prefix, prefill
from kvopt.config.evaluation import ProbesConfig
from kvopt.console.progress import advance
from kvopt.errors import InputError
from kvopt.measure.reference import Reference, build_reference
from kvopt.run.directory import Workspace
from kvopt.run.encoded_task import EncodedTask
from kvopt.run.inputs import Inputs
from kvopt.storage.files import sha256_json
from kvopt.task.columns import Columns, NoValue
from kvopt.task.examples import Example
from kvopt.task.readers import read_records
from kvopt.task.seam import Encoded
from kvopt.task.template import Template


@dataclass(frozen=True)
class Probes:
    """Encoded probe rows, how many were too long, and the base's reference on them."""

    base: Base
    encoded: Encoded
    too_long: int
    batch_size: int

    def prefix(self, model: Base) -> Prefix:
        """What all probe prompts begin with (a chat template's opening), as the model sees it."""
        with torch.no_grad():
            ids = torch.tensor(self.encoded.prefix, device=model.device, dtype=torch.int64)
            return prefill(model, ids=ids)

    def make_reference(self, at: Workspace) -> Reference:
        """The base's hidden states, kept in the run directory."""
        with at.progress.bar("probes", len(self.encoded.rows)) as bar:
            return build_reference(
                self.base,
                self.prefix(self.base),
                self.encoded,
                at.directory / "probes",
                batch_size=self.batch_size,
                progress=advance(bar),
                stored=bar.take_over,
            )

    def sha256(self) -> str:
        return sha256_json([self.encoded.sha256(), self.batch_size])


def load_probes(task: EncodedTask, settings: ProbesConfig, batch_size: int) -> Probes:
    """Read and encode the probe rows; those over ``max_tokens`` are left out. Raises InputError."""
    where = f"evaluate.probes.file {settings.file}"
    examples = probe_examples(task.inputs, settings)
    chat = task.base.tokenizer.chat_template is not None
    template = (
        Template.from_messages([{"role": "user", "content": "{{prompt}}"}])
        if chat
        else Template.from_text("{{prompt}}\n")
    )
    encoded = task.encoder.encode(template, examples)
    limit = min(settings.max_tokens, task.base.geometry.window)
    kept = tuple(row for row in encoded.rows if len(encoded.prefix) + len(row) <= limit)
    if not kept:
        what = f"every row has more than {limit} tokens"
        raise InputError(what, where=where, fix="raise evaluate.probes.max_tokens")
    return Probes(task.base, replace(encoded, rows=kept), len(examples) - len(kept), batch_size)


def probe_examples(inputs: Inputs, settings: ProbesConfig) -> list[Example]:
    """The rows of the file, as many as are asked for. Raises InputError."""
    columns = Columns(("prompt",), {"prompt": settings.prompt}, settings.output)
    examples: list[Example] = []
    for number, record in enumerate(read_records(settings.file, inputs.base_dir, "train")):
        if settings.rows is not None and number == settings.rows:
            break
        try:
            values, output = columns.values(record.fields), columns.gold(record.fields)
        except NoValue as error:
            fix = "name the columns in evaluate.probes.prompt and evaluate.probes.output"
            raise InputError(str(error), where=record.where, fix=fix) from None
        examples.append(Example(f"probe:{number}", values, output, record.where))
    if not examples:
        raise InputError("has no rows", where=f"evaluate.probes.file {settings.file}")
    return examples
