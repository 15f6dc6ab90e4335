"""What differs between runs: config, data, base and versions, and what became of contexts with the same name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from kvopt.documents.choosing import BUILT_IN
from kvopt.documents.leaderboard_file import LeaderboardRow
from kvopt.report.choice import share_kept, shown_interval
from kvopt.report.reading import RunFiles

RENDERING = ("template.chat_kwargs", "template.end_token")


def compare_runs(runs: Sequence[RunFiles]) -> dict[str, Any]:
    """``comparable`` (bool, or None where an old run does not say), ``why`` (sentences), ``config`` and ``identity``
    (what differs, by key and run), ``contexts`` (:func:`merged_contexts`), ``results`` (those in several runs).
    """
    labels, contexts = [run.label for run in runs], merged_contexts(runs)
    identities = [identity(run) for run in runs]
    comparable, why = _comparable([one | _rendering(run) for one, run in zip(identities, runs, strict=True)])
    return {
        "runs": labels,
        "comparable": comparable,
        "why": why,
        "identity": _differing(identities),
        "config": _differing([flatten(run.config) for run in runs]),
        "results": [one for one in contexts if sum(kl is not None for kl in one["kl_forward"]) > 1],
        "contexts": contexts,
    }


def identity(run: RunFiles) -> dict[str, Any]:
    """What a run's numbers depend on beside its config, flat."""
    manifest = run.manifest
    facts = {key: manifest.get(key) for key in ("seed", "device", "threads", "dtype", "kvopt_version")}
    facts |= {f"base.{key}": value for key, value in run.of_manifest("base").items()}
    facts |= {"template_sha256": manifest.get("template_sha256"), "data_sha256": manifest.get("data_sha256")}
    facts |= {f"rows_sha256.{split}": value for split, value in run.board.rows_sha256.items()}
    facts |= {f"rows.{split}": count for split, count in run.board.rows.model_dump().items()}
    return facts | {f"versions.{key}": value for key, value in run.of_manifest("versions").items()}


def _rendering(run: RunFiles) -> dict[str, str]:
    """How the template becomes tokens: settings that its hash does not hold."""
    template = run.config.get("template")
    settings = template if isinstance(template, Mapping) else {}
    return {key: repr(settings.get(key.partition(".")[2])) for key in RENDERING}


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """``{"a": {"b": 1}}`` as ``{"a.b": 1}``; items of a list by their name, or their position from 0."""
    if isinstance(tree, Mapping):
        pairs = [(str(key), value) for key, value in tree.items()]
    elif isinstance(tree, list) and any(isinstance(item, Mapping | list) for item in tree):
        pairs = [(_item_name(item, position), item) for position, item in enumerate(tree)]
    else:
        return {prefix: tree}
    if not pairs:
        return {prefix: tree} if prefix else {}
    flat: dict[str, Any] = {}
    for key, value in pairs:
        flat |= flatten(value, f"{prefix}.{key}" if prefix else key)
    return flat


def _item_name(item: Any, position: int) -> str:
    name = item.get("name") if isinstance(item, Mapping) else None
    return str(name) if name else str(position)


def _differing(facts: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    keys = dict.fromkeys(key for one in facts for key in one)
    return [
        {"key": key, "values": [one.get(key) for one in facts]}
        for key in keys
        if any(one.get(key) != facts[0].get(key) for one in facts[1:])
    ]


def _comparable(identities: Sequence[Mapping[str, Any]]) -> tuple[bool | None, list[str]]:
    """Whether KLs of these runs measure the distance to the same thing on the same rows."""
    parts = {
        "the template": ("template_sha256", *RENDERING),
        "the base": ("base.weights", "base.config", "base.tokenizer", "base.chat_template"),
        "the validation rows": ("rows_sha256.validation",),
    }
    unknown = [words for words, keys in parts.items() if any(one.get(keys[0]) is None for one in identities)]
    data = {one.get("data_sha256") for one in identities}
    if "the validation rows" in unknown and len(data) == 1 and None not in data:
        unknown.remove("the validation rows")  # of older runs: the same data set has the same validation rows
    differ = [
        words
        for words, keys in parts.items()
        if words not in unknown and any(len({one.get(key) for one in identities}) > 1 for key in keys)
    ]
    if differ:
        verb = "differ" if len(differ) > 1 or differ[0].endswith("s") else "differs"
        return False, [
            f"{_list(differ).capitalize()} {verb} between the runs: a KL of one is no better or worse than a KL of"
            " another, because each measures the distance to its own reference."
        ]
    if unknown:
        return None, [f"Not every run records {_list(unknown)}, so they may differ: compare KLs with care."]
    return True, ["Template, base and validation rows are the same, so KLs can be compared across the runs."]


def _list(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def merged_contexts(runs: Sequence[RunFiles]) -> list[dict[str, Any]]:
    """Every context of any run, once: ``name``, ``kind``, and by run ``kl_forward``, ``tokens``, ``share_kept`` (None
    where a run lacks it); ``apart`` says whether intervals do not overlap, None without intervals or a second run.

    Mutations are the same context where their texts are the same, whatever each run calls them; others by their names.
    """
    rows = [{row.lineage.id or row.name: row for row in run.board.contexts} for run in runs]
    merged = []
    for key in dict.fromkeys(key for one in rows for key in one):
        mine = [one.get(key) for one in rows]
        there = [row for row in mine if row is not None]
        merged.append(
            {
                "name": " / ".join(dict.fromkeys(row.name for row in there)),
                "kind": there[0].kind,
                "kl_forward": [row.kl_forward.mean if row else None for row in mine],
                "ci95": [shown_interval(row.kl_forward.ci95) if row else None for row in mine],
                "tokens": [row.tokens if row else None for row in mine],
                "share_kept": [
                    share_kept(row, run.board) if row else None for row, run in zip(mine, runs, strict=True)
                ],
                "apart": _apart(there) if len(there) > 1 else None,
            }
        )
    return sorted(merged, key=_changed_first)


def _changed_first(context: Mapping[str, Any]) -> tuple[int, float]:
    """What changed for certain, then what is in several runs, then what is in one, each by its lowest KL; what is not
    learned or written, the original and no context, comes last.
    """
    known = [kl for kl in context["kl_forward"] if kl is not None]
    if context["name"] in BUILT_IN:
        return 3, min(known)
    return (0 if context["apart"] else 1 if len(known) > 1 else 2), min(known)


def _apart(rows: Sequence[LeaderboardRow]) -> bool | None:
    """Whether some two intervals have nothing in common; None without intervals."""
    intervals = [row.kl_forward.ci95 for row in rows]
    known = [interval for interval in intervals if interval is not None]
    if len(known) < len(intervals):
        return None
    return max(low for low, _ in known) > min(high for _, high in known)
