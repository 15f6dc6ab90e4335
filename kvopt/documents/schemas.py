"""The JSON schemas that ``kvopt config --schema DOCUMENT`` prints, one for each file that kvopt writes."""

from __future__ import annotations

import difflib
from typing import Any

from kvopt.documents.answers_file import AnswersDocument
from kvopt.documents.context_record import ContextRecord
from kvopt.documents.evaluation_file import EvaluationDocument
from kvopt.documents.export_record import ExportRecord
from kvopt.documents.frontier_file import FrontierDocument
from kvopt.documents.leaderboard_file import LeaderboardDocument
from kvopt.documents.ledger import LedgerEntry
from kvopt.documents.manifest import RunManifest
from kvopt.documents.part import DocumentPart
from kvopt.documents.samples_file import SamplesDocument
from kvopt.documents.scores_file import ScoreLine
from kvopt.documents.sequence_file import SequenceDocument
from kvopt.documents.shortened_file import ShortenedDocument
from kvopt.documents.student_record import StudentRecord
from kvopt.documents.study_file import StudyDocument
from kvopt.errors import InputError

DIALECT = "https://json-schema.org/draft/2020-12/schema"
DOCUMENTS: dict[str, type[DocumentPart]] = {
    "leaderboard": LeaderboardDocument,
    "scores": ScoreLine,
    "samples": SamplesDocument,
    "answers": AnswersDocument,
    "evaluation": EvaluationDocument,
    "study": StudyDocument,
    "sequence": SequenceDocument,
    "frontier": FrontierDocument,
    "shortened": ShortenedDocument,
    "context": ContextRecord,
    "student": StudentRecord,
    "export": ExportRecord,
    "manifest": RunManifest,
    "ledger": LedgerEntry,
}
"""By name. ``scores`` and ``ledger`` describe one line of their files."""


def schema_of(name: str) -> dict[str, Any]:
    """The JSON schema of a document (draft 2020-12). Raises InputError for a name that is not in :data:`DOCUMENTS`."""
    if name not in DOCUMENTS:
        close = difflib.get_close_matches(name, DOCUMENTS, n=1)
        known = f"known: {', '.join(DOCUMENTS)}"
        fix = f"did you mean {close[0]!r}? {known}" if close else known
        raise InputError(f"no document {name!r}", where="--schema", fix=fix)
    return {"$schema": DIALECT, **DOCUMENTS[name].model_json_schema()}
