"""Probe prompts: what a student does on prompts that have nothing to do with the task, against the base.

The base's hidden states on their gold tokens are kept in ``RUN/probes/`` as a reference, so that every student is
compared with the same numbers.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch

from kvopt.attention import Prefix, prefill
from kvopt.columns import Columns, NoValue
from kvopt.dataset import Example
from kvopt.encoding import Encoded
from kvopt.errors import InputError
from kvopt.files import sha256_json
from kvopt.model import Base
from kvopt.progress import advance
from kvopt.records import read_records
from kvopt.reference import Reference, build_reference
from kvopt.run import Run
from kvopt.template import Template
from kvopt.train.evaluation.config import ProbesConfig


@dataclass(frozen=True)
class Probes:
    """Encoded probe rows, how many were too long, and the base's reference on them."""

    run: Run
    encoded: Encoded
    too_long: int
    batch_size: int

    def prefix(self, model: Base) -> Prefix:
        """What all probe prompts begin with (a chat template's opening), as the model sees it."""
        with torch.no_grad():
            ids = torch.tensor(self.encoded.prefix, device=model.device, dtype=torch.int64)
            return prefill(model, ids=ids)

    @cached_property
    def reference(self) -> Reference:
        """The base's hidden states; made on first use, kept in the run directory."""
        with self.run.progress.bar("probes", len(self.encoded.rows)) as bar:
            return build_reference(
                self.run.base,
                self.prefix(self.run.base),
                self.encoded,
                self.run.directory / "probes",
                batch_size=self.batch_size,
                progress=advance(bar),
            )

    def sha256(self) -> str:
        return sha256_json([self.encoded.sha256(), self.batch_size])


def load_probes(run: Run, settings: ProbesConfig, batch_size: int) -> Probes:
    """Read and encode the probe rows; those over ``max_tokens`` are left out. Raises InputError."""
    where = f"evaluate.probes.file {settings.file}"
    examples = probe_examples(run, settings)
    chat = run.base.tokenizer.chat_template is not None
    template = (
        Template.from_messages([{"role": "user", "content": "{{prompt}}"}])
        if chat
        else Template.from_text("{{prompt}}\n")
    )
    encoded = run.encoder.encode(template, examples)
    limit = min(settings.max_tokens, run.base.geometry.window)
    kept = tuple(row for row in encoded.rows if len(encoded.prefix) + len(row) <= limit)
    if not kept:
        what = f"every row has more than {limit} tokens"
        raise InputError(what, where=where, mend="raise evaluate.probes.max_tokens")
    return Probes(run, replace(encoded, rows=kept), len(examples) - len(kept), batch_size)


def probe_examples(run: Run, settings: ProbesConfig) -> list[Example]:
    """The rows of the file, as many as are asked for. Raises InputError."""
    columns = Columns(("prompt",), {"prompt": settings.prompt}, settings.output)
    found: list[Example] = []
    for number, record in enumerate(read_records(settings.file, run.base_dir, "train")):
        if settings.rows is not None and number == settings.rows:
            break
        try:
            values, output = columns.values(record.fields), columns.gold(record.fields)
        except NoValue as error:
            mend = "name the columns in evaluate.probes.prompt and evaluate.probes.output"
            raise InputError(str(error), where=record.where, mend=mend) from None
        found.append(Example(f"probe:{number}", values, output, record.where))
    if not found:
        raise InputError("has no rows", where=f"evaluate.probes.file {settings.file}")
    return found
