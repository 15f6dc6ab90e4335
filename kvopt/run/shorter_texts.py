"""The stage that shortens the template's text: for ``kvopt shorten``, the generator ``extract``, and starts from it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml

from kvopt.config.shortening import ShorteningConfig, ShortText
from kvopt.contexts.context import TextContext
from kvopt.documents.leaderboard_file import MutationLineage, StoredTemplate
from kvopt.documents.shortened_file import SHORTENED, LostLiteral, ShortenedDocument
from kvopt.documents.validated import write_document
from kvopt.errors import InputError, counted
from kvopt.measure.reference import Reference
from kvopt.measure.score import score_prefix
from kvopt.mutate.spans import compile_protect
from kvopt.run.directory import Workspace
from kvopt.run.encoded_task import EncodedTask
from kvopt.run.validate import check_length
from kvopt.shorten.cutting import CutSearch, Shorter
from kvopt.shorten.importance import Sensitivity, largest_attention, sensitivity
from kvopt.shorten.pieces import Pieces, take_apart
from kvopt.shorten.trials import TRIALS_VERSION, Trials, spread_order
from kvopt.storage.files import key_of, sha256_json, write_text
from kvopt.task.template import Template

JOURNAL = ".trials.jsonl"
ATTENTION_ROWS = 32
SHOWN = 5


@dataclass(frozen=True)
class Shortened:
    """A text that was found: its ``template``, what is recorded of it, and the ``key`` of all that it depends on."""

    template: Template
    document: ShortenedDocument
    key: str

    def context(self, task: EncodedTask) -> TextContext:
        """The text as a context, with a lineage that says what was asked for."""
        lineage = MutationLineage(family="extract", operators=[self.document.asked])
        return task.text_context(self.document.name, self.template, lineage)


class Shortener:
    """Shorter texts of one task's template, each from the one before: ask for lengths in falling order.

    What was tried is in ``shortened/.trials.jsonl`` of the run directory, so an interrupted search goes on where it
    stopped.

    Args:
        task: what the template is of.
        reference: holds the selection rows.
        config: which rows decide, and what must stay.
        at: the run directory.
    """

    def __init__(self, task: EncodedTask, reference: Reference, config: ShorteningConfig, at: Workspace) -> None:
        self._task, self._reference, self._at = task, reference, at
        dataset, base = task.dataset, task.base
        if not dataset.selection:
            raise InputError("shortening needs selection rows", where="data", fix="give data.limit.selection")
        gold = {example.id: task.gold[example.id] for example in dataset.selection}
        self._examples = spread_order(dataset.selection, gold)[: config.rows]
        self._rows = task.rows("selection").select([example.id for example in self._examples]).rows
        self.pieces: Pieces = take_apart(
            task.template,
            self._examples[0],
            task.encoder,
            task.encoded.prefix,
            protect=compile_protect(task.inputs.mutations.protect),
            gold_texts=[example.output for example in (*dataset.train, *dataset.selection)],
            literals=config.literals,
        )
        identity = [base.identity, str(base.dtype), task.template.to_json(), task.encoded.sha256()]
        key = key_of(TRIALS_VERSION, [*identity, self._rows_identity(), config.literals])
        self._key = sha256_json([key, config.exchanges, task.config.seed])
        self._trials = Trials(
            base,
            task.encoder,
            self.pieces,
            self._examples,
            gold,
            reference,
            journal=at.directory / SHORTENED / JOURNAL,
            key=key[:12],
        )
        self._estimates = self._differentiated = 0
        self._search: CutSearch | None = None
        self._exchanges = config.exchanges

    def _rows_identity(self) -> list[str]:
        return [example.id for example in self._examples]

    @property
    def search(self) -> CutSearch:
        """The search, begun at the whole template."""
        if self._search is None:
            if not len(self.pieces):
                raise InputError("nothing can be cut: there is no static text before the first slot", where="template")
            base = self._task.base
            self._at.say("shortening: what the rows look at")
            rows = self._task.rows("train").rows[:ATTENTION_ROWS] or self._rows
            attention = largest_attention(base, self.pieces.prefix, rows)
            self._search = CutSearch(
                self.pieces,
                self._trials,
                attention,
                self._sensitivity,
                exchanges=self._exchanges,
                seed=self._task.config.seed,
            )
        return self._search

    def _sensitivity(self, kept: torch.Tensor, probes: int) -> Sensitivity:
        self._estimates += 1
        base, ids, seed = self._task.base, self.pieces.prefix, self._estimates
        self._differentiated += (1 + probes) * sum(len(ids) + len(row) for row in self._rows)
        return sensitivity(base, ids, kept, self._rows, self._reference, probes=probes, seed=seed)

    # ---- what can be asked for

    def to_tokens(self, tokens: int, where: str = "tokens") -> Shortened:
        """The best text of at most ``tokens`` tokens. Raises InputError where the template is not longer, or where what
        must stay is.
        """
        whole = len(self.pieces.prefix)
        check_length(tokens, whole, where)
        shortest = self.search.shortest()
        if tokens < shortest:
            raise InputError(
                f"{counted(tokens, 'token')} wanted, but {shortest} stay: {self._what_stays()}",
                where=where,
                fix=f"ask for {shortest} or more, or unmark some of it",
            )
        with self._reported(f"shortening to {tokens}", whole - tokens):
            found = self.search.down_to(tokens)
        if found is None:
            raise InputError(f"no text of {counted(tokens, 'token')} was found", where=where, fix="ask for more")
        return self._recorded(found, f"short-{tokens}", f"tokens {tokens}")

    def reached(self) -> Shortened:
        """The text that the search is at."""
        return self._recorded(self.search.current, f"short-{self.search.current.tokens}", "the shortest there is")

    def to_kl(self, kl: float, asked: str = "") -> Shortened:
        """The shortest text found with a forward KL of at most ``kl`` on the rows that decide. Raises InputError where
        there is none but the template itself.
        """
        whole = len(self.pieces.prefix)
        with self._reported(f"shortening to KL {kl:.4g}", whole):
            found = self.search.down_while(kl)
        if found.tokens >= whole:
            nearest = self.search.nearest
            near = f"; the nearest has {nearest.tokens} tokens and {nearest.kl:.4f}" if nearest else ""
            raise InputError(
                f"no shorter text has a forward KL of at most {kl:.4g}{near}", where=asked or "max-kl", fix="allow more"
            )
        return self._recorded(found, f"short-{found.tokens}", asked or f"max-kl {kl:g}")

    def to_keep(self, share: float) -> Shortened:
        """As :meth:`to_kl`, for the share of the template's effect that is kept: 1 − KL / KL of no context."""
        return self.to_kl((1 - share) * self.kl_of_none(), f"keep {share:g}")

    def kl_of_none(self) -> float:
        """Forward KL without any context, on the rows that decide."""
        task = self._task
        rows = task.bare_rows("selection").select(self._rows_identity()).rows
        scores = score_prefix(task.base, task.none.prefix(task.base), rows, self._reference)
        return float(scores.kl.double().mean())

    # ---- what must stay

    def _what_stays(self) -> str:
        marked = [literal.text for literal in self.pieces.literals if literal.why == "marked"]
        needed = [literal.text for literal in self.pieces.needed]
        parts = []
        if marked:
            parts.append(f"what you marked ({some(marked)})")
        if needed:
            parts.append(f"literals that gold outputs have, or all with literals: all ({some(needed)})")
        markup = len(self.pieces.prefix) - sum(map(len, self.pieces.tokens))
        if markup:
            parts.append(f"{counted(markup, 'token')} of chat markup")
        return ", ".join(parts) or "one piece of each message"

    # ---- records

    @contextmanager
    def _reported(self, title: str, total: int) -> Iterator[None]:
        """While a search runs, its best text so far is told."""
        search, last = self.search, self.search.current.tokens
        rows, tokens, back = self._trials.rows_run, self._trials.tokens_run, self._differentiated
        with self._at.directory.ledger(SHORTENED) as entry, self._at.progress.bar(title, total, "token") as bar:

            def tell(tokens: int, kl: float) -> None:
                nonlocal last
                bar.facts |= {"now": counted(tokens, "token"), "KL": f"{kl:.4f}"}
                bar.update(max(0, last - tokens))
                last = min(last, tokens)

            search.progress = tell
            try:
                yield
            finally:
                search.progress = None
                entry.rows, entry.tokens_back = self._trials.rows_run - rows, self._differentiated - back
                entry.tokens_in = self._trials.tokens_run - tokens + entry.tokens_back
                if not entry.tokens_in:
                    entry.leave_out()

    def _recorded(self, found: Shorter, name: str, asked: str) -> Shortened:
        template = self.pieces.written(found.kept)
        document = ShortenedDocument(
            name=name,
            asked=asked,
            tokens=found.tokens,
            original_tokens=len(self.pieces.prefix),
            kl_selection=found.kl,
            rows=len(self._examples),
            trials=self._trials.rows_tried,
            cut=_stretches(self.pieces, found.kept),
            lost_literals=[LostLiteral(text=text, state=state) for text, state in self.pieces.broken(found.kept)],  # type: ignore[arg-type]
            template=StoredTemplate.model_validate(template.to_json()),
        )
        return Shortened(template, document, sha256_json([self._key, asked]))


class ShorterTexts:
    """The shorter texts that a run asks for, each found once; those that are found alike come from one search, longest
    first, whatever is asked for first.

    Args:
        task: what the template is of.
        reference: holds the selection rows; called at the first search.
        at: the run directory.
    """

    def __init__(self, task: EncodedTask, reference: Callable[[], Reference], at: Workspace) -> None:
        self._task, self._reference, self._at = task, reference, at
        self._lengths = {how: list(lengths) for how, lengths in task.config.shortened.items()}
        self._searches: dict[ShorteningConfig, Shortener] = {}
        self._found: dict[tuple[ShorteningConfig, int], Shortened | InputError] = {}

    def text(self, how: ShorteningConfig, tokens: int, where: str) -> Shortened:
        """The best text of at most ``tokens`` tokens. Raises InputError where there is none."""
        self._search(how, tokens, where)
        found = self._found[how, tokens]
        if isinstance(found, InputError):
            raise found
        return found

    def of_frontiers(self) -> list[TextContext]:
        """The texts of the config's frontiers, which are written to files too. A length that no text can have is left
        out, with a line that says why.
        """
        contexts = []
        for item in self._task.config.frontiers:
            for name, length in item.texts.items():
                try:
                    found = self.text(item.how, length, f"contexts.{item.name}.tokens")
                except InputError as error:
                    self._at.say(f"no {name}: {error.what}")
                    break
                write_shortened(found, self._at)
                contexts.append(found.context(self._task))
        return contexts

    def start(self, asked: ShortText, where: str) -> tuple[int, ...]:
        """Token ids of the text; where no text is so short, of the shortest one that was found."""
        how = asked.how
        self._search(how, asked.tokens, where)
        found = self._found[how, asked.tokens]
        if isinstance(found, InputError):
            check_length(asked.tokens, len(self._task.encoded.prefix), where)
            self._at.say(f"{where}: {found.what}; it starts from the most attended tokens of a longer text")
            found = self._searches[how].reached()
        return self._task.text_context(found.document.name, found.template).encoded.prefix

    def _search(self, how: ShorteningConfig, tokens: int, where: str) -> None:
        """All lengths down to this one."""
        lengths = self._lengths.setdefault(how, [])
        if tokens not in lengths:
            lengths.append(tokens)
        if how not in self._searches:
            self._searches[how] = Shortener(self._task, self._reference(), how, self._at)
        for length in sorted(lengths, reverse=True):
            if length >= tokens and (how, length) not in self._found:
                try:
                    self._found[how, length] = self._searches[how].to_tokens(length, where)
                except InputError as error:
                    self._found[how, length] = error


def _stretches(pieces: Pieces, kept: frozenset[int]) -> list[str]:
    """The text of the runs of pieces that were cut."""
    result: list[str] = []
    before = None
    for i, piece in enumerate(pieces.pieces):
        if i in kept:
            before = None
            continue
        together = before is not None and (before.field, before.part) == (piece.field, piece.part)
        if together:
            result[-1] += pieces.text(i)
        else:
            result.append(pieces.text(i))
        before = piece
    return result


def some(texts: Sequence[str]) -> str:
    """A few of these texts, and how many more there are."""
    shown = ", ".join(text if len(text) <= 40 else text[:39] + "…" for text in texts[:SHOWN])
    more = len(texts) - SHOWN
    return shown + (f" and {more} more" if more > 0 else "")


def write_shortened(found: Shortened, at: Workspace) -> Path:
    """Write ``shortened/NAME.json`` (the record) and ``shortened/NAME.yaml`` (the template, for ``contexts.text`` or
    ``template``); returns the latter's path.
    """
    folder, name = at.directory / SHORTENED, found.document.name
    at.directory.begin(f"{SHORTENED}/{name}", found.key, f"{SHORTENED}/{name}.json", f"{SHORTENED}/{name}.yaml")
    write_document(folder / f"{found.document.name}.json", found.document)
    path = folder / f"{found.document.name}.yaml"
    write_text(path, yaml.safe_dump(found.template.to_json(), sort_keys=False, allow_unicode=True, width=10_000))
    return path
