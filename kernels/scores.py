"""Everything a context is scored by, in one pass over the logits: KL, gold NLL, top-1 agreement, entropy.

With z_t, z_s the logits, u = z_s − z_t and Z = Σ e^z, the candidate's NLL of gold token y follows from what the
divergence needs anyway: −log q_y = log Z_t − z_t,y − u_y + log(Z_s / Z_t). Where 16-bit products are fast they are
enough for u and for p. Gold tokens and the likeliest tokens of both models are then computed again exactly (refine.py),
and so are all logits of rows whose divergence is large or whose likeliest token is in doubt. log Z_t must be exact; it
depends on the reference alone and is computed once (``reference_facts``).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kvopt.kernels.options import Head, KernelInputError, KLOptions
from kvopt.kernels.plan import Plan, make_plan
from kvopt.kernels.products import has_float32_output
from kvopt.kernels.rows import divergence_rows, normalize_
from kvopt.kernels.torch_backend import LogitChunks, RowBlock, balanced

NLL_LIMIT = 0.02
"""Forward KL in nats beyond which 16-bit products may leave an NLL off by more than 1e-3 (SmolLM2: 4e-4 below it)."""

PROBE_ROWS = 64
"""Rows spread over a call that show whether most have to be computed in float32 anyway."""


@dataclass(frozen=True)
class Scores:
    """Per gold token, [N] each, float32 in nats (float64 for float64 inputs); no gradients.

    kl: the divergence that the options ask for. nll, reference_nll: −log q and −log p of the gold token.
    agree: bool, candidate and reference have the same most likely token. entropy: H(p) of the reference.
    """

    kl: Tensor
    nll: Tensor
    reference_nll: Tensor
    agree: Tensor
    entropy: Tensor


@dataclass(frozen=True)
class ReferenceFacts:
    """What scores need of the reference alone, whatever the candidate and the gold tokens, [N] each, float32.

    log_partition: log Σ_v e^z of its final logits. entropy: H(p) in nats.
    """

    log_partition: Tensor
    entropy: Tensor

    def __len__(self) -> int:
        return len(self.entropy)

    def __getitem__(self, rows: Tensor | slice) -> ReferenceFacts:
        return ReferenceFacts(self.log_partition[rows], self.entropy[rows])


@torch.compiler.disable
@torch.no_grad()
def reference_facts(reference_hidden: Tensor, head: Head, options: KLOptions | None = None) -> ReferenceFacts:
    """Facts of reference_hidden [N, D] under its own ``head`` and the options' temperature; one product in float32."""
    options = replace(options or KLOptions(), products="float32", backend="torch", form="auto")
    plan = replace(make_plan(reference_hidden, reference_hidden, head, head, options), form="direct")
    count, device = len(reference_hidden), reference_hidden.device
    facts = ReferenceFacts(*(torch.empty(count, dtype=plan.accumulate, device=device) for _ in range(2)))
    if count == 0:
        return facts
    with torch.autocast(device.type, enabled=False):
        chunks, rows = LogitChunks(plan, device, count), balanced(count, plan.rows_per_chunk)
        for start in range(0, count, rows):
            part = slice(start, start + rows)
            for block, z in chunks.reference_blocks(reference_hidden[part]):
                facts.log_partition[part][block], facts.entropy[part][block] = normalize_(z)
    return facts


@torch.compiler.disable
@torch.no_grad()
def linear_scores(
    candidate_hidden: Tensor,
    reference_hidden: Tensor,
    head: Head,
    gold_ids: Tensor,
    options: KLOptions | None = None,
    reference_head: Head | None = None,
    facts: ReferenceFacts | None = None,
) -> Scores:
    """Scores of candidate_hidden [N, D] against reference_hidden [N, D_t] on gold_ids [N] (int64).

    ``kl`` is as precise as that of ``linear_kl``; NLLs are within 1e-3 nats for 16-bit inputs (1e-5 for float32 ones),
    and ``agree`` is that of float32 logits. Equal hidden states give a KL of exactly 0 and equal NLLs.

    Args:
        facts: ``reference_facts(reference_hidden, reference_head or head, options)`` where the same reference is scored
            against more than once; computed here otherwise.
    """
    options = options or KLOptions()
    plan = make_plan(candidate_hidden, reference_hidden, head, reference_head or head, _scoring(head, options))
    count, device = len(candidate_hidden), candidate_hidden.device
    if gold_ids.shape != (count,) or gold_ids.dtype != torch.int64:
        raise KernelInputError(f"gold_ids is {gold_ids.dtype} {tuple(gold_ids.shape)}; it must be int64 [{count}]")
    if facts is not None and len(facts) != count:
        raise KernelInputError(f"facts are of {len(facts)} tokens; reference_hidden has {count}")
    if facts is None and plan.rounded:
        facts = reference_facts(reference_hidden, reference_head or head, options)
    names = ("kl", "nll", "reference_nll", "entropy")
    out = Scores(
        agree=torch.empty(count, dtype=torch.bool, device=device),
        **{name: torch.empty(count, dtype=plan.accumulate, device=device) for name in names},
    )
    job = _Job(candidate_hidden, reference_hidden, gold_ids, facts, out)
    with torch.autocast(device.type, enabled=False):
        job.run(plan)
    return out


def _scoring(head: Head, options: KLOptions) -> KLOptions:
    """Products that can return float32 sums of 16-bit operands give exact logits, by the direct form; others do not."""
    if has_float32_output(head.weight.device) and options.form == "auto":
        return replace(options, form="direct", backend="torch")
    return replace(options, backend="torch")


@dataclass(frozen=True)
class _Job:
    """One call: what is given, and where the results go."""

    candidate: Tensor
    reference: Tensor
    gold: Tensor
    facts: ReferenceFacts | None
    out: Scores

    def run(self, plan: Plan) -> None:
        rows = torch.arange(len(self.candidate), device=self.candidate.device)
        if not plan.rounded:
            self._score(plan, rows)
            return
        stride = max(1, len(rows) // PROBE_ROWS)
        again = self._score(plan, rows[::stride])
        rest = rows[rows % stride != 0]
        if len(again) > 0.6 * len(rows[::stride]):
            again = torch.cat([again, rest])
        else:
            again = torch.cat([again, self._score(plan, rest)])
        self._score(plan.precise, again)

    def _score(self, plan: Plan, rows: Tensor) -> Tensor:
        """Scores these rows; returns those that need exact logits."""
        doubtful = torch.zeros(len(rows), dtype=torch.bool, device=rows.device)
        if len(rows) == 0:
            return rows
        chunks, size = LogitChunks(plan, rows.device, len(rows)), balanced(len(rows), plan.rows_per_chunk)
        for start in range(0, len(rows), size):
            part = rows[start : start + size]
            gold = self.gold[part]
            z_t, u, _ = chunks.fill(self.candidate[part], self.reference[part])
            for block in chunks.blocks(z_t, u, gold):
                certain = self._block(block, part[block.rows], gold[block.rows], plan)
                if certain is not None:
                    doubtful[start : start + size][block.rows] = ~certain
        return rows[doubtful]

    def _block(self, block: RowBlock, rows: Tensor, gold: Tensor, plan: Plan) -> Tensor | None:
        """Writes the scores of a block; which of them are good enough (None for all)."""
        z_t, u, out, options = block.z_t, block.u, self.out, plan.options
        gold_t, gold_u = z_t.gather(1, gold[:, None])[:, 0], u.gather(1, gold[:, None])[:, 0]
        certain: Tensor | None = None
        if block.refined is not None:
            out.agree[rows], certain = block.refined.agreement()
        else:
            out.agree[rows] = z_t.argmax(-1) == (z_t + u).argmax(-1)
        if self.facts is not None:
            log_partition, entropy = self.facts.log_partition[rows], self.facts.entropy[rows]
        else:
            log_partition, entropy = normalize_(z_t.clone())
        work = divergence_rows(z_t, u, options.formula, False, block.center, block.scratch)
        out.kl[rows], out.entropy[rows] = work.value, entropy
        out.reference_nll[rows] = log_partition - gold_t
        out.nll[rows] = log_partition - gold_t - gold_u + work.shift
        if certain is None:
            return None
        return certain & (work.value < options.formula.at_kl(NLL_LIMIT))
