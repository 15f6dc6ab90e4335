"""``ledger.jsonl`` of a run directory: what every stage cost, one line for each time that it worked."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, PrivateAttr

from kvopt.documents.part import DocumentPart
from kvopt.errors import InputError
from kvopt.storage.files import parsed_json


class LedgerEntry(DocumentPart):
    """One line of ``ledger.jsonl``: one stage, worked on once."""

    stage: str = Field(description="such as contexts/NAME or scores/NAME.validation")
    outcome: str = Field(description="done, failed or interrupted")
    seconds: float = Field(description="wall-clock seconds")
    peak_memory_bytes: int = Field(0, description="the most memory in use up to then, of the kind in peak_memory_of")
    peak_memory_of: str = Field(
        "resident", description="resident, of the process; or allocated on cuda:0, by torch, where the base is on a GPU"
    )
    tokens_in: int = Field(0, description="tokens through the model")
    tokens_back: int = Field(
        0, description="tokens that gradients went back through: each takes about the work of another one of tokens_in"
    )
    tokens_out: int = Field(0, description="tokens that the model generated")
    model_calls: int = Field(0, description="requests to a model that writes mutations")
    gold_tokens: int = Field(0, description="gold tokens among tokens_in")
    rows: int = Field(0, description="rows that the stage worked on")
    steps: int = Field(0, description="optimizer steps of the stage's result")
    resumed_from: int = Field(0, description="steps that an earlier process had done")
    processes: int = Field(1, description="processes that worked together")
    contexts: int = Field(0, description="of samples: contexts that were shown")
    accepted: int = Field(0, description="of mutations: candidates that were accepted")
    tried: int = Field(0, description="of mutations: candidates")

    _nothing_new: bool = PrivateAttr(False)

    def leave_out(self) -> None:
        """Say that there was nothing to do: the entry is not written."""
        self._nothing_new = True

    @property
    def is_left_out(self) -> bool:
        """Whether :meth:`leave_out` was called."""
        return self._nothing_new


def read_ledger(path: Path) -> list[LedgerEntry]:
    """Every whole line of a ledger; a torn last one, which a kill may leave, is left out. Empty where there is no file.

    Raises:
        InputError: a line is damaged.
    """
    if not path.is_file():
        return []
    entries = []
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines[:-1], start=1):
        try:
            entries.append(LedgerEntry.model_validate(parsed_json(line)))
        except ValueError:
            raise InputError("the line is damaged", where=f"{path}:{number}", fix="delete that line") from None
    return entries
