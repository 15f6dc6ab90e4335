"""A run directory made by hand, with every part of a report in it and no model behind it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from kvopt.task.template import Template

EVIL = "</script><script>window.hacked = 1</script><img src=x onerror='window.hacked = 1'>{{ 7 * 7 }}"
SYSTEM = "You sort messages.\n\n- Read the request twice.\n- Answer in one line.\n"


def score(kl: float, *, spread: float = 0.2, nll: float = 2.0, count: int = 12) -> dict[str, Any]:
    """The numbers of one context on one split."""
    return {
        "kl_forward": {"mean": kl, "ci95": [kl * (1 - spread), kl * (1 + spread)], "p95": kl * 3},
        "gold_nll": nll + kl,
        "gold_nll_ci95": [nll, nll + 1],
        "top1_agreement": 1 - min(kl, 1) / 2,
        "examples": count,
        "gold_tokens": count * 4,
    }


def row(name: str, kind: str, tokens: int, kl: float, **more: Any) -> dict[str, Any]:
    return {"name": name, "kind": kind, "tokens": tokens, **score(kl), **more}


def template(system: str = SYSTEM) -> dict[str, Any]:
    return {"messages": [{"role": "system", "content": system}, {"role": "user", "content": "Message: {{text}}"}]}


def leaderboard() -> dict[str, Any]:
    lineage = {"id": "a1", "family": "lexical", "operators": ["synonyms"], "parents": [], "seed": 1}
    other = lineage | {"id": "a2", "operators": ["add-please"], "parents": ["a1"]}
    third = lineage | {"id": "a3", "family": "structure", "operators": ["headings"], "parents": []}
    return {
        "name": "made",
        "base": "tiny",
        "template_tokens": 40,
        "rows": {"train": 30, "selection": 8, "validation": 12},
        "split": "validation",
        "selected_on": "selection",
        "template": template(),
        "rows_sha256": {"train": "t" * 8, "selection": "s" * 8, "validation": "v" * 8},
        "noise_floor": {"kl_forward": 0.0005, "batch_sizes": [16, 5], "dtype": "bfloat16"},
        "contexts": [
            row("original", "text", 40, 0.0004),
            row("kv-full", "kv", 40, 0.004),
            row("m002", "text", 42, 0.0045, selection=score(0.004), lineage=other, separable_from_best=False),
            row("m001", "text", 41, 0.012, selection=score(0.010), lineage=lineage, separable_from_best=True),
            row("kv-16", "kv", 16, 0.02, separable_from_best=True),
            row("soft-16", "soft", 16, 0.3, separable_from_best=True),
            row("none", "text", 0, 0.8, separable_from_best=True),
        ],
        "other_mutations": [
            {"name": "m003", "kind": "text", "tokens": 44, "selection": score(0.05), "lineage": third},
        ],
    }


def id_of(text: str) -> str:
    """The id of a mutation with this system message."""
    return Template.from_json(template(text)).sha256[:12]


def mutations() -> list[dict[str, Any]]:
    def one(attempt: int, name: str | None, text: str, **more: Any) -> dict[str, Any]:
        return {
            "id": id_of(text), "name": name, "attempt": attempt, "accepted": name is not None, "reason": None,
            "detail": None, "family": "lexical", "operators": ["synonyms"], "lineage": [], "seed": attempt,
            "template": template(text), "search": "s",
        } | more  # fmt: skip

    first = SYSTEM.replace("twice", "two times")
    second = SYSTEM.replace("twice", "two times, please")
    return [
        one(0, "m001", first),
        one(1, None, "You sort.", reason="slot-lost", detail="the slot {{text}} is gone"),
        one(2, "m002", second, lineage=[id_of(first)], operators=["add-please"]),
        one(3, "m003", "# Task\n" + SYSTEM, family="structure", operators=["headings"]),
        one(4, None, SYSTEM, reason="unchanged"),
    ]


def samples() -> dict[str, Any]:
    top = [{"token": " rain", "p": 0.6}, {"token": "\n", "p": 0.1}]

    def on(kl: list[float], answer: str, says: str | None = None) -> dict[str, Any]:
        mine = None if says is None else [{"token": says, "p": 0.7}, {"token": " rain", "p": 0.2}]
        return {"kl": kl, "nll": [0.5, 0.25], "agree": [True, says is None], "answer": answer, "top": [None, mine]}

    def example(number: int, place: str, kl: float) -> dict[str, Any]:
        original = on([0.0, 0.0], "rain")
        del original["top"]
        return {
            "id": f"validation:{number}",
            "place": place,
            "values": {"text": f"Will it rain? ({number})"},
            "output": "rain",
            "gold": [" rain", "<|end|>"],
            "gold_tokens": 2,
            "reference": {"nll": [0.5, 0.25], "top": [top, top]},
            "contexts": {
                "original": original,
                "m002": on([kl, kl / 2], "rain"),
                "kv-16": on([kl * 2, kl], "snow\tfalls", " snow"),
                "none": on([3.5, 1.0], "Hello!", "!"),
            },
        }

    kinds = [("original", "text", 40), ("m002", "text", 42), ("kv-16", "kv", 16), ("none", "text", 0)]
    return {
        "key": "k",
        "split": "validation",
        "contexts": [{"name": name, "kind": kind, "tokens": tokens} for name, kind, tokens in kinds],
        "ranked_by": ["m002", "kv-16"],
        "rows": 12,
        "max_new_tokens": 8,
        "examples": [example(3, "worst", 0.5), example(1, "median", 0.02), example(7, "best", 0.0005)],
    }


HEADLINES = ["json-valid", "rouge-l"]


def own_prompt() -> dict[str, Any]:
    """A board's row of a short wording that the user wrote."""
    text = {"messages": [{"role": "system", "content": "Sort it.\n"}, {"role": "user", "content": "Message: {{text}}"}]}
    return row("mine", "text", 12, 0.06, separable_from_best=True, template=text)


def answers() -> dict[str, Any]:
    """Three rows under five contexts, with one metric of pass or fail and one that is a number."""
    texts = {
        "original": ["rain", "sun", "snow"],
        "kv-16": ["rain", "sun", "snow and ice"],
        "kv-full": ["rain", "sun", "snow"],
        "mine": ["rain", "It is sun", "hail"],
        "none": ["Hello!", "Hi!", "Good day"],
    }
    fails = {("kv-16", 2), ("mine", 1), ("mine", 2), ("none", 0), ("none", 1), ("none", 2)}
    kinds = {"original": ("text", 40), "kv-16": ("kv", 16), "kv-full": ("kv", 40), "mine": ("text", 12)}

    def answer(name: str, n: int) -> dict[str, Any]:
        metrics = {"json-valid": float((name, n) not in fails), "rouge-l": None if name == "none" else 0.5}
        return {"text": texts[name][n], "cut": (name, n) == ("none", 2), "metrics": metrics}

    return {
        "split": "validation",
        "max_new_tokens": 8,
        "headlines": HEADLINES,
        "pass_or_fail": ["json-valid"],
        "contexts": [
            {"name": name, "kind": kinds.get(name, ("text", 0))[0], "tokens": kinds.get(name, ("text", 0))[1]}
            for name in texts
        ],
        "examples": [
            {
                "id": f"validation:{n}",
                "values": {"text": f"Will it rain? ({n})"},
                "output": texts["original"][n],
                "answers": {name: answer(name, n) for name in texts},
            }
            for n in range(3)
        ],
    }


def add_metrics(folder: Path) -> None:
    """Give a run that was made here metrics on its board, answers, and a prompt of the user's own."""
    board, document = leaderboard(), answers()
    board["contexts"].insert(-1, own_prompt())
    shares = {"kv-full": 1.0, "m002": 0.9, "m001": 0.7, "kv-16": 0.8, "mine": 0.4, "soft-16": 0.3, "original": 1.0}
    for one in board["contexts"]:
        share = shares.get(one["name"], 0.0)
        one["metrics"] = {
            "json-valid": {"mean": share, "ci95": [max(0.0, share - 0.1), min(1.0, share + 0.1)]},
            "rouge-l": {"mean": None, "ci95": None} if one["name"] == "none" else {"mean": 0.5, "ci95": [0.5, 0.5]},
        }
    put(folder / "leaderboard.json", board | {"headlines": HEADLINES, "answered": 12})
    put(folder / "answers.json", document)


def ledger() -> list[dict[str, Any]]:
    def entry(stage: str, seconds: float, outcome: str = "done", **more: Any) -> dict[str, Any]:
        return {"stage": stage, "outcome": outcome, "seconds": seconds, "peak_memory_bytes": 2**30} | more

    return [
        entry("reference", 20, tokens_in=5000),
        entry("mutations", 10, tokens_in=900, tokens_out=100, model_calls=6),
        entry("scores/m001.selection", 1, tokens_in=50),
        entry("scores/m002.selection", 2, tokens_in=60),
        entry("scores/m003.selection", 3, tokens_in=70),
        entry("contexts/kv-16", 100, tokens_in=7),
        entry("contexts/kv-16", 5, "interrupted", tokens_in=10),
        entry("contexts/kv-16", 7, tokens_in=30),
        entry("scores/kv-16.validation", 1, tokens_in=40),
    ]


def learned(name: str, kind: str, tokens: int) -> dict[str, Any]:
    history = [
        {"step": 0, "train_kl": None, "held_out_kl": 0.2},
        {"step": 4, "train_kl": 0.1, "held_out_kl": 0.025},
        {"step": 8, "train_kl": 0.05, "held_out_kl": 0.03},
    ]
    settings = {"init": "matched", "learning_rate": 0.001}
    return {
        "name": name, "kind": kind, "tokens": tokens, "settings": settings, "best_step": 4, "history": history,
    }  # fmt: skip


def evaluation(name: str, f1: float) -> dict[str, Any]:
    def quantities(shift: float) -> dict[str, Any]:
        return {
            "slots.f1": {"mean": f1 + shift, "ci95": [f1 + shift - 0.05, f1 + shift + 0.05]},
            "gold_nll": {"mean": 1.0 - f1, "ci95": None},
        }

    spread = {"min": f1 - 0.1, "max": f1, "std": 0.05, "spread": 0.1, "spread_ci95": [0.05, 0.2]}
    share = {"mean": 0.25, "ci95": [0.1, 0.4]}
    return {
        "format_version": 1,
        "name": name,
        "student": None if name == "base" else {"method": "lora"},
        "rows": {"answered": 12, "scored": 12},
        "headlines": ["slots.f1"],
        "quantities": ["slots.f1", "gold_nll", "kl_from_base", "top1_agreement"],
        "contexts": [
            {"name": "original", "group": "original", "kind": "text", "tokens": 40, "quantities": quantities(0)},
            {"name": "m002", "group": "held-out", "kind": "text", "tokens": 42, "quantities": quantities(-0.1)},
            {"name": "none", "group": "none", "kind": "text", "tokens": 0, "quantities": {"slots.f1": {"mean": None}}},
        ],
        "groups": [
            {"group": "original", "contexts": ["original"], "quantities": quantities(0), "consistency": None},
            {
                "group": "wordings",
                "contexts": ["original", "m002"],
                "quantities": {"slots.f1": quantities(-0.05)["slots.f1"] | spread},
                "consistency": share,
            },
        ],
        "no_context": {"same_as_original": share, "valid_json": None, "looks_like_task": share},
        "frozen_prompt": None,
        "forgetting": None
        if name == "base"
        else {"rows": 64, "kl_from_base": {"mean": 0.03, "ci95": [0.02, 0.04]}, "gold_nll_change": {"mean": -0.01}},
    }


def study() -> dict[str, Any]:
    """A study of two arms and a curve over 0, 2 and 8 mutations."""

    def over(mean: float) -> dict[str, Any]:
        return {"mean": mean, "ci95": [mean - 0.1, mean + 0.1], "std": 0.02, "seeds": [mean - 0.02, mean + 0.02]}

    def arm(name: str, n: int | None, f1: float) -> dict[str, Any]:
        values = {
            "original/slots.f1": over(f1),
            "wordings/slots.f1/spread": over(0.1),
            "forgetting/kl_from_base": over(0.05),
        }
        against = None
        if name != "fixed":
            difference = over(0.1) | {"ci95_bootstrap": [0.06, 0.14]}
            against = {path: {"difference": difference, "separable": f1 > 0.8} for path in values}
        return {
            "name": name, "budget": "steps", "contexts": ["original"], "mutations": n,
            "runs": [{"seed": 0, "student": f"{name}--seed-0"}], "steps": 10.0,
            "tokens": 100.0, "seconds": None, "values": values, "against_reference": against,
        }  # fmt: skip

    values = {"0": [0.5, 0.52], "2": [0.7, 0.72], "8": [0.8, 0.82]}
    curve = {
        "counts": [0, 2, 8], "values": values, "fit": {"a": -0.4, "b": 1.0, "c": 0.9}, "ci95": None, "r2": 0.98,
        "converged": None,
    }  # fmt: skip
    return {
        "format_version": 1, "name": "made", "base": "tiny", "rows": {}, "seeds": [0, 1], "budget": "steps",
        "reference": "fixed", "complete": True, "headlines": ["slots.f1"],
        "interval": "95 % Student t over seeds", "bootstrap": "95 % over rows",
        "base_values": {"original/slots.f1": 0.4}, "arms": [arm("fixed", 0, 0.5), arm("mixed", 8, 0.85)],
        "curve": {"original/slots.f1": curve, "held-out/slots.f1": curve | {"fit": None, "r2": None}},
        "sweep": {
            "task_kl_to_probe_kl": {"points": 4, "slope": 1.0, "intercept": 0.0, "r2": 0.5, "p": 0.1},
            "context_kl_to_probe_kl": None,
        },
    }  # fmt: skip


def manifest() -> dict[str, Any]:
    return {
        "format_version": 1,
        "kvopt_version": "0.1.0",
        "versions": {"python": "3.11", "torch": "2.13.0"},
        "seed": 0,
        "device": "cpu",
        "base": {"name": "tiny", "weights": "w" * 8, "config": "c", "tokenizer": "k", "chat_template": "h"},
        "template_sha256": "p" * 8,
        "data_sha256": "d" * 8,
    }


def write_run(folder: Path, *, students: bool = False) -> Path:
    """Write the whole run into ``folder`` and return it."""
    (folder / "contexts").mkdir(parents=True)
    put(folder / "leaderboard.json", leaderboard())
    put(folder / "manifest.json", manifest())
    put(folder / "samples.json", samples())
    config = {"name": "made", "template": template(), "contexts": [{"name": "kv-16", "steps": 8}]}
    (folder / "config.yaml").write_text(yaml.safe_dump(config), "utf-8")
    put_lines(folder / "mutations.jsonl", mutations())
    put_lines(folder / "ledger.jsonl", ledger())
    for name, kind, tokens in (("kv-full", "kv", 40), ("kv-16", "kv", 16), ("soft-16", "soft", 16)):
        put(folder / "contexts" / name / "kvopt.json", learned(name, kind, tokens))
    if students:
        put(folder / "students" / "base" / "evaluation.json", evaluation("base", 0.4))
        put(folder / "students" / "lora-mixed" / "evaluation.json", evaluation("lora-mixed", 0.7))
        put(folder / "students" / "mixed--seed-0" / "evaluation.json", evaluation("mixed--seed-0", 0.85))
        put(folder / "study.json", study())
    return folder


def put(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), "utf-8")


def put_lines(path: Path, values: list[Any]) -> None:
    path.write_text("".join(json.dumps(value) + "\n" for value in values), "utf-8")


def change(path: Path, **values: Any) -> None:
    """Set keys of a JSON file."""
    put(path, json.loads(path.read_text("utf-8")) | values)
