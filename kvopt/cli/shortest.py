"""Commands that look for the shortest context: compact, shorten, frontier."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from kvopt.cli.common import (
    ConfigPath,
    Json,
    Out,
    Sets,
    next_export,
    next_of_board,
    open_run,
    print_json,
    say,
    show_board,
)
from kvopt.cli.growing_board import growing_board
from kvopt.cli.report import leave_page
from kvopt.errors import InputError, counted

if TYPE_CHECKING:
    from kvopt.config.frontiers import FrontierKind
    from kvopt.run.shorter_texts import Shortened, Shortener

Lengths = Annotated[
    list[int] | None,
    typer.Option("--tokens", metavar="N", min=1, help="A length in tokens, or slots; may be repeated."),
]
Keep = Annotated[
    float | None,
    typer.Option(
        "--keep",
        metavar="SHARE",
        min=0,
        max=1,
        help="Find the shortest that keeps this share of the template's effect, such as 0.97 (1 - KL / KL of no"
        " context).",
    ),
]
MaxKL = Annotated[
    float | None,
    typer.Option(
        "--max-kl",
        metavar="KL",
        min=0,
        help="Find the shortest whose forward KL on the selection rows is at most this.",
    ),
]
Rows = Annotated[int, typer.Option("--rows", metavar="N", min=1, help="Selection rows that decide of texts.")]
Exchanges = Annotated[
    int, typer.Option("--exchanges", metavar="N", min=0, help="Rounds of exchanges at each text's length, at most.")
]
OwnOut = Annotated[
    Path | None, typer.Option("--out", metavar="DIR", help="The run directory (default: runs/NAME-COMMAND).")
]


def compact(
    config: ConfigPath,
    tokens: Lengths = None,
    sets: Sets = None,
    out: OwnOut = None,
    as_json: Json = False,
) -> None:
    """Make the template a short KV cache at once, without training, and say what it costs.

    Without --tokens it has a quarter of the template's length.
    The cache is fitted to what your rows attend to (init: matched, zero steps). This takes seconds, and is the quickest
    way to see how far a template can be shortened. Learned contexts, mutations and students of the config are left out;
    wordings of your own are scored beside it.
    """
    from kvopt.config.document import load_config
    from kvopt.run.compact import only_compact

    settings, base_dir = load_config(config, sets or ())
    folder = out or Path("runs") / f"{settings.name}-compact"
    with only_compact(settings, base_dir, folder, tokens or (), say=say) as run, growing_board(folder) as show:
        board = run.run(show)
    show_board(board, folder, as_json)
    leave_page(folder)
    if not as_json:
        rows = [row for row in board.contexts if row.name.startswith("compact-")]
        best = min(rows, key=lambda row: row.kl_forward.mean)
        next_export(folder, best.name, best.kind)


def shorten(
    config: ConfigPath,
    tokens: Lengths = None,
    keep: Keep = None,
    max_kl: MaxKL = None,
    literals: Annotated[
        Literal["needed", "all"],
        typer.Option(
            help="Which of the template's literals (labels, keys, quoted text) stay: those in a gold output, or all."
        ),
    ] = "needed",
    rows: Rows = 16,
    exchanges: Exchanges = 6,
    sets: Sets = None,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Shorten the template's text: cut what matters least to the gold outputs, decided by the exact KL on your rows.

    The text before the first slot is shortened. Slots, roles, what you marked with {{keep:...}}, and labels that stand
    in gold outputs stay. Every text is scored as it is written, tokenized again. The result takes its place on the
    leaderboard and the page of the run. After an interruption, give the same command again to continue.
    """
    if sum((bool(tokens), keep is not None, max_kl is not None)) != 1:
        raise InputError("say what is wanted", where="shorten", fix="give one of --tokens, --keep and --max-kl")
    run = open_run(config, sets, out)
    from kvopt.config.shortening import ShorteningConfig
    from kvopt.run.shorter_texts import some, write_shortened

    with run.opened():
        shortener = run.shortener(ShorteningConfig(literals=literals, rows=rows, exchanges=exchanges))
        found = _found(shortener, tokens, keep, max_kl)
        contexts = [text.context(run.task()) for text in found]
        paths = [write_shortened(text, run.at) for text in found]
        scores = [run.score(context) for context in contexts]
        board = run.put_on_board(contexts)
    assert board is not None
    if as_json:
        texts = [
            text.document.to_json() | {"validation": score.to_json()} for text, score in zip(found, scores, strict=True)
        ]
        print_json({"texts": texts})
        return
    none = next((row.kl_forward.mean for row in board.contexts if row.name == "none"), None)
    for text, path, score in zip(found, paths, scores, strict=True):
        document, kl = text.document, score.kl_forward.mean
        kept = f", {100 * (1 - kl / none):.1f} % kept" if none else ""
        print(
            f"{document.name}: {document.original_tokens} -> {counted(document.tokens, 'token')}, forward KL {kl:.4f}"
            f" on validation rows ({document.kl_selection:.4f} on those that decided){kept}"
        )
        for state in ("cut", "broken"):
            lost = [literal.text for literal in document.lost_literals if literal.state == state]
            if lost:
                print(f"  literals {state}: {some(lost)}")
        print(f"  {path}")
        print()
        for message in text.template.messages:
            print(f"{message.role}: {message.content}".rstrip())
        if text.template.text is not None:
            print(text.template.text.rstrip())
        print()
    show_board(board, run.directory.path, False)
    leave_page(run.directory.path)
    next_export(run.directory.path, found[-1].document.name, "text")


def frontier(
    config: ConfigPath,
    tokens: Lengths = None,
    kind: Annotated[
        list[str] | None,
        typer.Option("--kind", metavar="KIND", help="text, soft or kv; may be repeated. Default: all three."),
    ] = None,
    steps: Annotated[
        int,
        typer.Option("--steps", metavar="N", min=0, help="Training steps of each soft prompt and KV cache, at most."),
    ] = 40,
    keep: Keep = None,
    max_kl: MaxKL = None,
    seconds: Annotated[
        float | None,
        typer.Option(
            "--seconds",
            metavar="S",
            min=1,
            help="About how long it may take: training steps are made fewer to fit. Texts come first, whole.",
        ),
    ] = None,
    rows: Rows = 16,
    exchanges: Exchanges = 6,
    sets: Sets = None,
    out: OwnOut = None,
    as_json: Json = False,
) -> None:
    """How short can the template get? Text, soft prompt and KV cache at the same lengths, on one board and page.

    Without --tokens these are a half, a quarter and an eighth of the template's length. With --keep or --max-kl and no
    --tokens, the shortest context of each kind is looked for instead; with both, --keep (0.97 unless given) is only
    what the summary asks for. Each text is cut from the longer one (as kvopt shorten does), a soft prompt starts from
    the text of its length, and a KV cache from attention matching. Learned contexts, mutations and students of the
    config are left out; wordings of your own are scored beside them. After an interruption, give the
    same command again to continue.
    """
    from kvopt.config.document import load_config
    from kvopt.config.shortening import ShorteningConfig
    from kvopt.report.frontier_words import KEPT_IN_WORDS, as_found, in_words
    from kvopt.run.frontier import Question, make_frontier

    if max_kl is not None and (tokens or keep is not None):
        raise InputError("is a question of its own", where="--max-kl", fix="give it without --tokens and --keep")
    settings, base_dir = load_config(config, sets or ())
    question = Question(
        tokens=tuple(sorted(set(tokens or ()), reverse=True)),
        kinds=_kinds(kind),
        steps=steps,
        max_kl=max_kl,
        keep=keep,
        seconds=seconds,
        how=ShorteningConfig(rows=rows, exchanges=exchanges),
    )
    folder = out or Path("runs") / f"{settings.name}-frontier"
    with growing_board(folder) as show:
        board, found = make_frontier(settings, base_dir, folder, question, say=say, shown=show)
    show_board(board, folder, as_json)
    leave_page(folder)
    if not as_json:
        if found:
            limit = f"a forward KL of at most {max_kl:g}" if max_kl is not None else f"{keep:.1%} kept"
            print(as_found(board, found, limit))
        elif sentence := in_words(board, KEPT_IN_WORDS if keep is None else keep):
            print(sentence)
        next_of_board(board, folder)


def _kinds(asked: list[str] | None) -> tuple[FrontierKind, ...]:
    from kvopt.config.frontiers import FRONTIER_KINDS

    if unknown := [kind for kind in asked or () if kind not in FRONTIER_KINDS]:
        raise InputError(f"no kind {unknown[0]!r}", where="--kind", fix="one of " + ", ".join(FRONTIER_KINDS))
    return tuple(kind for kind in FRONTIER_KINDS if not asked or kind in asked)


def _found(shortener: Shortener, tokens: list[int] | None, keep: float | None, max_kl: float | None) -> list[Shortened]:
    if tokens:
        return [shortener.to_tokens(length) for length in sorted(set(tokens), reverse=True)]
    return [shortener.to_keep(keep) if keep is not None else shortener.to_kl(max_kl or 0.0)]
