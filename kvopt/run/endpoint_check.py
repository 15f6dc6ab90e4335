"""``kvopt check-endpoint``: one question for every endpoint of a config, as kvopt would ask it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from kvopt.config.metrics import Item
from kvopt.config.mutations import EndpointGenerator
from kvopt.mutate.generators.endpoint import EndpointParaphraser
from kvopt.mutate.meaning import MeaningJudge
from kvopt.mutate.proposals import Request
from kvopt.mutate.spans import compile_protect
from kvopt.run.inputs import Inputs


@dataclass(frozen=True)
class EndpointAnswer:
    """What came of one question.

    Attributes:
        where: the config key of the endpoint. model: its model.
        seconds: from the question to the answer, both questions of a judge of meaning included.
        tokens_in, tokens_out: as the endpoint counts them; None where it does not.
        answer: what was made of the answer. fault: why it cannot be used; None where it can.
        said: what kvopt adapted to, such as a setting that was refused.
    """

    where: str
    model: str
    seconds: float
    tokens_in: int | None
    tokens_out: int | None
    answer: str
    fault: str | None
    said: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def check_endpoints(inputs: Inputs, transport: Any = None) -> list[EndpointAnswer]:
    """Asks each endpoint of the config once: for one paraphrase of the template, whether the template means the same as
    itself, and for the score of a gold output as an answer.

    Args:
        transport: an httpx transport in the place of the network's.

    Raises InputError for a key that is not set, or an extra that is not installed.
    """
    section, found = inputs.config.mutations, []
    if isinstance(section.generator, EndpointGenerator):
        found.append(_paraphrase(inputs, transport))
    if section.check is not None:
        found.append(_meaning(inputs, transport))
    found += [_verdict(metric, inputs, transport) for metric in inputs.config.evaluate.metrics if metric.remote]
    return found


def _paraphrase(inputs: Inputs, transport: Any) -> EndpointAnswer:
    section, said = inputs.config.mutations, list[str]()
    assert isinstance(section.generator, EndpointGenerator)
    model = EndpointParaphraser(section.generator, transport=transport, say=said.append)
    request = Request(
        inputs.template, inputs.config.template.scope, compile_protect(section.protect), 0, inputs.config.seed, 0
    )

    def ask() -> tuple[str, str | None]:
        [proposal] = model.propose([request])
        if proposal.template is not None:
            return "\n".join(proposal.template.fields), None
        assert proposal.rejection is not None
        return "", f"{proposal.rejection.reason}: {proposal.rejection.detail}"

    return _asked("mutations.generator", section.generator.model, ask, model.chat, said)


def _meaning(inputs: Inputs, transport: Any) -> EndpointAnswer:
    check, said = inputs.config.mutations.check, list[str]()
    assert check is not None
    judge = MeaningJudge(check, transport, said.append)

    def ask() -> tuple[str, str | None]:
        opinion = judge(inputs.template, inputs.template)
        if opinion.same is None:
            return "", opinion.reason
        fault = None if opinion.same else f"it finds the template different from itself: {opinion.reason}"
        return "the template means the same as itself" if opinion.same else "", fault

    return _asked("mutations.check", check.model, ask, judge.chat, said)


def _verdict(metric: Any, inputs: Inputs, transport: Any) -> EndpointAnswer:
    example, said = inputs.examples[0], list[str]()
    judge = metric.prepared(inputs.base_dir)
    judge = judge.through(transport, said.append)

    def ask() -> tuple[str, str | None]:
        verdict = judge.verdict(Item(example.id, example.values, example.output, example.output))
        value, known = verdict.ratios[judge.label]
        if not known:
            return "", verdict.note
        fault = None if value > 0.5 else f"it gives a gold output {verdict.note}, on {judge.lowest} to {judge.highest}"
        return f"a gold output gets {verdict.note}, on {judge.lowest} to {judge.highest}", fault

    return _asked(judge.place, judge.model, ask, judge.chat, said)


def _asked(
    where: str, model: str, ask: Callable[[], tuple[str, str | None]], chat: Any, said: list[str]
) -> EndpointAnswer:
    began = time.perf_counter()
    answer, fault = ask()
    seconds = time.perf_counter() - began
    used = chat.usage
    return EndpointAnswer(
        where, model, seconds, used.get("prompt_tokens"), used.get("completion_tokens"), answer, fault, tuple(said)
    )
