"""What sees a wrong wording? Precision and recall of each check, on wordings that somebody has judged.

    python tools/validate_checks.py CONFIG.yaml --out RUN --right pool.jsonl --wrong negative.jsonl
    python tools/validate_checks.py configs/lmentry-letters.yaml --out RUN --judged wordings.jsonl

A wording is a line with ``messages`` or ``text``; in a ``--judged`` file ``correct`` says whether it means the same.
The checks:

- slots and literals: what ``kvopt mutate`` refuses under ``scope: all``;
- KL: the forward KL to the template on the selection rows, nats a gold token; far is wrong;
- pre-update loss: the NLL of the gold tokens under the wording; high is wrong;
- literals, then KL: what the first refuses ranks last, the rest by KL;
- restated: how much easier the base predicts each of the two texts after the other than alone, in nats a token, the
  mean of both ways: a small local score in the manner of entailment; little is wrong;
- words: the share of the template's words that the wording has; few is wrong.

``AUC``: how often a right wording ranks before a wrong one; 0.5 is a guess. Precision and recall are of "right": for
the first check as it decides, for a score at the limit that keeps 90 % of the right ones that have one. ``base rate``:
the share of right ones, which is the precision of accepting all. With ``--judge CONFIG2``, whose ``mutations.check``
names an endpoint, its verdict is a row more.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kvopt.base.loading import Base
from kvopt.config.document import load_config
from kvopt.config.mutations import MeaningCheck
from kvopt.errors import InputError
from kvopt.measure.reference import Reference
from kvopt.measure.score import score_tokens
from kvopt.mutate.meaning import MeaningJudge, shown
from kvopt.mutate.validity import Checker
from kvopt.run.encoded_task import EncodedTask
from kvopt.run.run import Run
from kvopt.task.template import Template

WORD = re.compile(r"\w+")
RECALL = 0.9


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("config", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="the run directory: what is scored stays there")
    parser.add_argument("--right", type=Path, nargs="*", default=[], help="files of wordings that mean the same")
    parser.add_argument("--wrong", type=Path, nargs="*", default=[], help="files of wordings with a fault")
    parser.add_argument("--judged", type=Path, nargs="*", default=[], help="files of wordings with `correct`")
    parser.add_argument("--judge", type=Path, help="a config whose mutations.check is a judge")
    parser.add_argument("--set", action="append", default=[], dest="sets")
    options = parser.parse_args()
    config, base_dir = load_config(options.config, options.sets)
    judge = _judge(options.judge) if options.judge else None
    with Run(config, base_dir, options.out).opened() as run:
        measure(run, _wordings(options), options.out / "checks.jsonl", judge)


def measure(
    run: Run, wordings: Sequence[tuple[str, dict[str, Any], bool]], path: Path, judge: MeaningJudge | None
) -> None:
    """Scores every wording that is not in ``path`` yet, and prints the table."""
    task = run.task()
    checker = Checker(task.template, scope="all")
    reference = run.reference()
    known = {}
    if path.is_file():
        known = {line["name"]: line for line in map(json.loads, path.read_text("utf-8").splitlines())}
    found = []
    for name, entry, right in wordings:
        template = _template(task.template, entry)
        if name not in known:
            fact: dict[str, Any] = {"name": name, "right": right, "kl": None, "nll": None}
            if template is not None:
                fact["restated"] = restated(task.base, shown(task.template), shown(template))
                fact["words"] = shared_words(shown(task.template), shown(template))
                fact |= _scores(task, name, template, reference)
                if judge:
                    opinion = judge(task.template, template)
                    fact["judge"], fact["reason"] = opinion.same, opinion.reason
            known[name] = fact
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(fact, ensure_ascii=False) + "\n")
        refusal = checker.check(template, written=True) if template is not None else None
        found.append(known[name] | {"refused": template is None or refusal is not None})
    print(table(found, len(task.rows("selection").rows)))


def _scores(task: EncodedTask, name: str, template: Template, reference: Reference) -> dict[str, Any]:
    """KL and pre-update loss; nothing where the wording cannot stand before these rows."""
    try:
        scores = score_tokens(task.base, task.text_context(name, template), task.rows("selection"), reference)
    except InputError as error:
        return {"unscored": str(error)}
    return {"kl": float(scores.kl.mean()), "nll": float(scores.nll.mean())}


def table(found: Sequence[dict[str, Any]], rows: int) -> str:
    """The table in Markdown."""
    right = np.array([fact["right"] for fact in found])
    worst = float("inf")
    kl = np.array([worst if fact.get("kl") is None else fact["kl"] for fact in found])
    nll = np.array([worst if fact.get("nll") is None else fact["nll"] for fact in found])
    refused = np.array([fact["refused"] for fact in found])
    scores = {
        "KL": kl,
        "pre-update loss": nll,
        "literals, then KL": np.where(refused, worst, kl),
        "restated": -np.array([fact.get("restated", -worst) for fact in found]),
        "words": -np.array([fact.get("words", -worst) for fact in found]),
    }
    lines = [
        f"{right.sum()} right and {(~right).sum()} wrong wordings, {rows} rows; base rate {right.mean():.1%}",
        "",
        "| check | AUC | kept of the right (recall) | kept of the wrong | precision |",
        "|---|---|---|---|---|",
        _row("slots and literals", None, right, ~refused),
    ]
    for name, values in scores.items():
        known = np.sort(values[right & np.isfinite(values)])  # what the literals refuse has no score to be limited
        limit = known[int(np.ceil(RECALL * len(known))) - 1]
        lines.append(_row(name, auc(-values, right), right, values <= limit))
    if any("judge" in fact for fact in found):
        same = np.array([fact.get("judge") is True for fact in found])
        lines.append(_row("judge", None, right, same))
        lines.append(_row("judge, and slots and literals", None, right, same & ~refused))
    return "\n".join(lines)


def _row(name: str, area: float | None, right: np.ndarray, kept: np.ndarray) -> str:
    good, bad = int((kept & right).sum()), int((kept & ~right).sum())
    cells = [
        name,
        "–" if area is None else f"{area:.2f}",
        f"{good} of {right.sum()} ({good / right.sum():.0%})",
        f"{bad} of {(~right).sum()} ({bad / max(1, (~right).sum()):.0%})",
        f"{good / max(1, good + bad):.1%}",
    ]
    return "| " + " | ".join(cells) + " |"


def auc(values: np.ndarray, right: np.ndarray) -> float:
    """How often a right wording has the larger value than a wrong one; ties count half."""
    pairs = values[right][:, None], values[~right][None, :]
    larger = np.greater(*pairs) + 0.5 * np.equal(*pairs)
    return float(larger.mean()) if larger.size else float("nan")


@torch.no_grad()
def restated(base: Base, one: str, other: str) -> float:
    """Nats a token by which each text is easier to predict after the other than alone; the mean of both ways."""
    return (_eased(base, one, other) + _eased(base, other, one)) / 2


def _eased(base: Base, before: str, text: str) -> float:
    ids = base.tokenizer(text, add_special_tokens=False)["input_ids"]
    means = []
    for start in (
        "The instructions:\n\n",
        f"Some instructions:\n\n{before}\n\nThe same instructions in other words:\n\n",
    ):
        head = base.tokenizer(start, add_special_tokens=False)["input_ids"]
        hidden = base.backbone(input_ids=torch.tensor([head + ids], device=base.device)).last_hidden_state[0]
        log_p = base.head.logits(hidden[len(head) - 1 : -1]).float().log_softmax(-1).cpu()
        means.append(float(log_p.gather(1, torch.tensor(ids)[:, None]).mean()))
    return means[1] - means[0]


def shared_words(template: str, wording: str) -> float:
    """The share of the template's words, with their number, that the wording has."""
    ours, theirs = (set(WORD.findall(text.lower())) for text in (template, wording))
    return len(ours & theirs) / max(1, len(ours))


def _template(original: Template, entry: dict[str, Any]) -> Template | None:
    if "messages" in entry:
        same = [m["role"] for m in entry["messages"]] == [m.role for m in original.messages]
        fields = [m["content"] for m in entry["messages"]] if same else None
    else:
        fields = [entry["text"]] if len(original.fields) == 1 else None
    return original.with_fields(fields) if fields else None


def _wordings(options: argparse.Namespace) -> list[tuple[str, dict[str, Any], bool]]:
    found = []
    for right, files in ((True, options.right), (False, options.wrong), (None, options.judged)):
        for path in files:
            for i, line in enumerate(path.read_text("utf-8").splitlines()):
                entry = json.loads(line)
                if not entry.get("default"):  # a benchmark's own wordings, one of which is the template
                    is_right = bool(entry["correct"]) if right is None else right
                    found.append((f"{path.parent.name}.{path.stem}.{i + 1}", entry, is_right))
    return found


def _judge(path: Path) -> MeaningJudge:
    check = load_config(path)[0].mutations.check
    if not isinstance(check, MeaningCheck):
        raise SystemExit(f"{path}: mutations.check is no judge")
    return MeaningJudge(check)


if __name__ == "__main__":
    main()
