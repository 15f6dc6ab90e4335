"""What makes a soft prompt better at equal cost: starts, optimizers, and refinements of the descent, over seeds.

    python tools/compare_soft_prompts.py configs/snips.yaml --out runs/soft --tokens 64 --seeds 0 1 2

Every arm is a soft prompt that takes ``steps × rows`` training rows (an arm with fewer rows a step takes more steps),
is measured on selection rows 4 times on its way, and reports the state that was best there on the validation rows.
Prints a Markdown table: forward KL at step 0 and at the end for each seed, and CPU seconds of the process. A seed
decides the order of the rows. Results go to ``soft_arms.jsonl`` in the run directory; the same command goes on from it.

Arms, each one change to the first:

- *extract, muon*: from the template shortened to so many tokens (``init: extract:N``), Muon at 0.02.
- *extract, adamw*; *adamw 0.01*: the same with AdamW at 0.02, and at 0.01.
- *salient*, *strided*: other starts (``init: …``).
- *half the rows*, *twice the rows*: in each step.
- *averaged*: the mean of the states of the last half of the steps, each weighing as much as any other.
- *trust region*: after each step a slot goes back to half its norm from where it started, where it went further.
- *no warm-up*.
- *reconstructed*: a fourth of the rows' cost first teaches the slots to have the base write the template's text
  (arXiv 2511.23271), the rest distils.
- *kv, matched*: for comparison a KV cache of the same length, AdamW at 0.003.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvopt.base.loading import Base
from kvopt.base.prefix import gold_hidden
from kvopt.config.document import load_config
from kvopt.contexts.folder import TensorContext
from kvopt.learning.descent import batch_at, context_prefix, differentiated_loss, learning_rate_at, make_optimizer
from kvopt.measure.reference import Reference
from kvopt.measure.score import score_prefix
from kvopt.run.run import Run
from kvopt.task.seam import Row, make_batch

LOOKS = 4


@dataclass(frozen=True)
class Arm:
    """One way to learn a context."""

    name: str
    start: str = "extract"
    optimizer: str = "muon"
    learning_rate: float = 0.02
    rows: float = 1.0
    warmup: float = 0.05
    averaged: bool = False
    trust: float = 0.0
    reconstruct: float = 0.0
    kind: str = "soft"


ARMS = (
    Arm("extract, muon"),
    Arm("extract, adamw", optimizer="adamw"),
    Arm("extract, adamw 0.01", optimizer="adamw", learning_rate=0.01),
    Arm("salient", start="salient"),
    Arm("strided", start="strided"),
    Arm("half the rows", rows=0.5),
    Arm("twice the rows", rows=2.0),
    Arm("averaged", averaged=True),
    Arm("trust region", trust=0.5),
    Arm("no warm-up", warmup=0.0),
    Arm("reconstructed", reconstruct=0.25),
    Arm("kv, matched", start="matched", optimizer="adamw", learning_rate=0.003, kind="kv"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("config", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="run directory")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rows", type=int, default=8, help="training rows in a step")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--only", nargs="*", default=[arm.name for arm in ARMS], help="arms; default: all")
    parser.add_argument("--set", action="append", default=[], dest="sets")
    options = parser.parse_args()
    arms = [arm for arm in ARMS if arm.name in options.only]
    starts = {
        arm.start: {
            "name": f"{arm.start}-{options.tokens}",
            "kind": arm.kind,
            "tokens": options.tokens,
            "init": f"extract:{options.tokens}" if arm.start == "extract" else arm.start,
            "steps": 0,
        }
        for arm in arms
    }
    contexts = f"contexts={json.dumps(list(starts.values()))}"
    config, base_dir = load_config(options.config, [*options.sets, contexts, "mutations={count: 0}"])
    with Run(config, base_dir, options.out).opened() as run:
        study = Study(run, options.steps, options.rows)
        journal = options.out / "soft_arms.jsonl"
        found = [json.loads(line) for line in journal.read_text().splitlines()] if journal.is_file() else []
        for seed in options.seeds:
            for arm in arms:
                job = {"arm": asdict(arm), "seed": seed, "steps": options.steps, "rows": options.rows}
                job["tokens"] = options.tokens
                if any(all(old[name] == value for name, value in job.items()) for old in found):
                    continue
                result = {**job, **study.learn(arm, f"{arm.start}-{options.tokens}", seed)}
                print(f"{arm.name}, seed {seed}: {result['held_out']:.4f}, {result['cpu_seconds']:.0f} s", flush=True)
                found.append(result)
                with journal.open("a") as file:
                    file.write(json.dumps(result) + "\n")
    print(_table(found, arms, options))


class Study:
    """Arms on one task: each learned from its stored start."""

    def __init__(self, run: Run, steps: int, rows: int) -> None:
        task = run.task()
        self._base: Base = task.base
        self._rows = {split: task.bare_rows(split).rows for split in ("train", "selection", "validation")}
        self._ids = tuple(task.encoded.prefix)
        self._reference: Reference = run.whole_reference()
        self._starts: dict[str, TensorContext] = {context.name: context for context in run.learned()}
        self._configs = {config.name: config for config in task.config.learned}
        self._steps, self._batch = steps, rows

    def learn(self, arm: Arm, start: str, seed: int) -> dict[str, Any]:
        """Descend; returns KL per gold token on validation rows before and after, and the CPU seconds."""
        first = self._starts[start].tensor.detach().float().clone()
        before = self._kl(arm.kind, first, "validation")
        began = _cpu_seconds()
        size = max(1, round(self._batch * arm.rows))
        steps = self._steps * self._batch // size
        written = round(steps * arm.reconstruct)
        config = self._configs[start].model_copy(
            update={
                "steps": steps - written,
                "optimizer": arm.optimizer,
                "learning_rate": arm.learning_rate,
                "warmup": arm.warmup,
            }
        )
        if written:
            first = self._reconstructed(first, written * size, arm.learning_rate)
        frozen, trainable = first[:1], first[1:].clone().requires_grad_(True)
        optimizer = make_optimizer(trainable, config)
        best, mean, count = (math.inf, first), torch.zeros_like(first), 0
        for step in range(config.steps):
            rows = [self._rows["train"][i] for i in batch_at(step, len(self._rows["train"]), size, seed)]
            optimizer.zero_grad()
            differentiated_loss(
                self._base, arm.kind, torch.cat([frozen, trainable]), rows, self._reference, leaf=trainable
            )
            assert trainable.grad is not None
            trainable.grad.mul_(min(1.0, config.clip / (float(trainable.grad.norm()) + 1e-12)))
            for group in optimizer.param_groups:
                group["lr"] = learning_rate_at(step, config)
            optimizer.step()
            with torch.no_grad():
                if arm.trust:
                    moved = trainable - first[1:]
                    limit = arm.trust * first[1:].norm(dim=1, keepdim=True)
                    moved *= (limit / moved.norm(dim=1, keepdim=True).clamp_min(1e-12)).clamp_max(1.0)
                    trainable.copy_(first[1:] + moved)
                now = torch.cat([frozen, trainable]).detach().clone()
                if arm.averaged and step >= config.steps // 2:
                    count += 1
                    mean += (now - mean) / count
                    now = mean.clone()
            if (step + 1) % max(1, config.steps // LOOKS) == 0 or step + 1 == config.steps:
                best = min(best, (self._kl(arm.kind, now, "selection"), now), key=lambda pair: pair[0])
        seconds = _cpu_seconds() - began
        return {"start": before, "held_out": self._kl(arm.kind, best[1], "validation"), "cpu_seconds": seconds}

    def _kl(self, kind: str, tensor: Tensor, split: str) -> float:
        with torch.no_grad():
            prefix = context_prefix(self._base, kind, tensor)
        rows: Sequence[Row] = self._rows[split]
        return float(score_prefix(self._base, prefix, rows, self._reference, batch_size=16).kl.double().mean())

    def _reconstructed(self, first: Tensor, rows: int, learning_rate: float) -> Tensor:
        """Slots that make the base write the template's text after them. The text takes as long as a few rows: it is
        seen as often as costs ``rows`` rows.
        """
        row = Row("template", self._ids[:1], self._ids[1:])
        mean = sum(len(r) for r in self._rows["train"]) / len(self._rows["train"])
        steps = max(1, round(rows * (mean + len(first)) / (len(self._ids) + len(first))))
        frozen, trainable = first[:1], first[1:].clone().requires_grad_(True)
        optimizer = torch.optim.AdamW([trainable], lr=learning_rate / 2, weight_decay=0.0)
        for _ in range(steps):
            optimizer.zero_grad()
            prefix = context_prefix(self._base, "soft", torch.cat([frozen, trainable]))
            hidden = gold_hidden(self._base, prefix, make_batch([row], [0]))
            loss = torch.nn.functional.cross_entropy(self._base.head.logits(hidden).float(), torch.tensor(row.gold))
            loss.backward(inputs=[trainable])
            torch.nn.utils.clip_grad_norm_([trainable], 1.0)
            optimizer.step()
        return torch.cat([frozen, trainable]).detach()


def _cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def _table(found: list[dict[str, Any]], arms: list[Arm], options: argparse.Namespace) -> str:
    lines = [
        f"| {options.tokens} slots, {options.steps} steps of {options.rows} rows | step 0 |"
        + "".join(f" seed {seed} |" for seed in options.seeds)
        + " CPU s |",
        "|---|" + "---|" * (len(options.seeds) + 2),
    ]
    for arm in arms:
        mine = {
            old["seed"]: old
            for old in found
            if old["arm"] == asdict(arm)
            and (old["tokens"], old["steps"], old["rows"]) == (options.tokens, options.steps, options.rows)
        }
        some = [mine[seed] for seed in options.seeds]
        seconds = sum(one["cpu_seconds"] for one in some) / len(some)
        ends = "".join(f" {one['held_out']:.4f} |" for one in some)
        lines.append(f"| {arm.name} | {some[0]['start']:.4f} |{ends} {seconds:.0f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
