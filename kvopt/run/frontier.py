"""A run that compares the three kinds of context at the same lengths: how short can it get, and what does it cost?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from kvopt.config.contexts import ContextConfig
from kvopt.config.document import Config
from kvopt.config.shortening import ShorteningConfig
from kvopt.documents.leaderboard_file import LeaderboardDocument, LeaderboardRow
from kvopt.errors import InputError, counted
from kvopt.run.compact import bare
from kvopt.run.run import Run
from kvopt.run.shorter_texts import write_shortened
from kvopt.run.validate import check_length

KINDS = ("text", "soft", "kv")
SHARES = (2, 4, 8)
"""The lengths that are taken when none is asked for: the template's, divided by these."""
BATCH = 8
RATES = {"kv": 0.002, "soft": 0.01}
EVERY = 10


def make_frontier(
    config: Config,
    base_dir: Path,
    out: Path,
    *,
    tokens: Sequence[int] = (),
    kinds: Sequence[str] = KINDS,
    steps: int = 40,
    shortening: ShorteningConfig | None = None,
    say: Callable[[str], None] | None = None,
    shown: Callable[[LeaderboardDocument], None] | None = None,
) -> LeaderboardDocument:
    """The leaderboard of texts ``short-N``, soft prompts ``soft-N`` and KV caches ``kv-N``, with the original, no
    context and the wordings of the user's own.

    A text is found as by ``kvopt shorten``, each from the longer one; a soft prompt starts from the text of its length,
    a KV cache from attention matching. A length that no text can have is left out, with a line that says why.

    Args:
        tokens: the lengths; none: a half, a quarter and an eighth of the template.
        kinds: which of :data:`KINDS`.
        steps: of each soft prompt and KV cache.
        shortening: which rows decide of texts, and what stays.
        shown: called with the leaderboard after each context.

    Raises:
        InputError: a length that is not shorter than the template.
    """
    first = Run(bare(config), base_dir, out, say=say)
    with first.opened():
        whole = len(first.task().encoded.prefix)
        lengths = sorted(set(tokens), reverse=True) or [max(1, whole // share) for share in SHARES]
        check_length(lengths[0], whole, "--tokens")
        texts = _texts(first, lengths, shortening or ShorteningConfig()) if {"text", "soft"} & set(kinds) else {}
        if "text" in kinds:
            first.put_on_board([first.task().none, *(context for context, _ in texts.values())])
    contexts = [
        _learned(kind, length, steps, texts[length][1] if length in texts else None)
        for kind in KINDS[1:]
        if kind in kinds
        for length in lengths
    ]
    run = Run(bare(config, contexts), base_dir, out, say=say)
    run.use_base(first.load_base())
    with run.opened():
        return run.run(shown)


def _texts(run: Run, lengths: Sequence[int], config: ShorteningConfig):  # type: ignore[no-untyped-def]
    """By length: the text as a context, and the file that it is in."""
    shortener, found = run.shortener(config), {}
    for length in lengths:
        try:
            text = shortener.to_tokens(length)
        except InputError as error:
            run.at.say(f"no text: {error.what}")
            break
        found[length] = text.context(run.task()), write_shortened(text, run.at)
    return found


def _learned(kind: str, length: int, steps: int, text: Path | None) -> ContextConfig:
    settings = {"steps": steps, "batch_size": BATCH, "learning_rate": RATES[kind], "eval_every": EVERY}
    if kind == "kv":
        return ContextConfig(name=f"kv-{length}", kind="kv", tokens=length, init="matched", **settings)  # type: ignore[arg-type]
    if text is None:
        return ContextConfig(name=f"soft-{length}", kind="soft", tokens=length, init="strided", **settings)  # type: ignore[arg-type]
    return ContextConfig(name=f"soft-{length}", kind="soft", init=f"text:{text.resolve()}", **settings)  # type: ignore[arg-type]


def shortest(board: LeaderboardDocument, keep: float) -> dict[str, LeaderboardRow | None]:
    """For each kind the shortest context that keeps this share of the template's effect; None where none does."""
    none = next(row.kl_forward.mean for row in board.contexts if row.name == "none")
    rows = [row for row in board.contexts if row.name not in ("original", "none")]
    fit = [row for row in rows if 1 - row.kl_forward.mean / none >= keep] if none > 0 else []
    kinds = [kind for kind in KINDS if any(row.kind == kind for row in rows)]
    return {
        kind: min((row for row in fit if row.kind == kind), key=lambda row: row.tokens, default=None) for kind in kinds
    }


def in_words(board: LeaderboardDocument, keep: float) -> str:
    """``163 tokens -> 24 KV slots, 64 soft slots or 70 tokens of text keep 97 %``."""
    names = {"text": "token of text", "soft": "soft slot", "kv": "KV slot"}
    plurals = {"text": "tokens of text"}
    found = shortest(board, keep)
    reached = [counted(row.tokens, names[kind], plurals.get(kind)) for kind, row in found.items() if row is not None]
    missing = [kind for kind, row in found.items() if row is None]
    if not reached:
        none = next(row.kl_forward.mean for row in board.contexts if row.name == "none")
        rows = [row for row in board.contexts if row.name not in ("original", "none")]
        nearest = min(rows, key=lambda row: row.kl_forward.mean)
        return f"nothing here keeps {keep:.1%}; {nearest.name} keeps {1 - nearest.kl_forward.mean / none:.1%}"
    said = f"{counted(board.template_tokens, 'token')} -> {' or '.join(reached)} keep {keep:.1%}"
    return said + (f" ({', '.join(missing)}: none that is this close)" if missing else "")
