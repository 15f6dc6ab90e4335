"""Families of the config: members load without torch, and a new file alone adds one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kvopt.config.contexts import STARTS
from kvopt.config.kinds import Family
from kvopt.config.losses import LOSSES
from kvopt.config.metrics import METRICS
from kvopt.config.schedules import SCHEDULES
from kvopt.config.students import StudentConfig

ROOT = Path(__file__).resolve().parents[1]
HEAVY = ("torch", "transformers", "numpy", "rouge_score", "jsonschema", "referencing", "httpx", "tenacity")

FOCAL = '''
from __future__ import annotations
from typing import TYPE_CHECKING, ClassVar, Literal
from pydantic import Field
from kvopt.config.losses import Anchor, Loss
if TYPE_CHECKING:
    from torch import Tensor
    from kvopt.train.gold_tokens import Gold

class Focal(Loss):
    """Cross-entropy in which likely tokens count less: −(1 − p)^gamma log p."""
    kind: Literal["focal"]
    gamma: float = Field(2.0, ge=0, description="how much less")
    anchor: ClassVar[Anchor] = "none"

    def __call__(self, gold: Gold) -> Tensor:
        log_p = gold.log_probs()
        return -((1 - log_p.exp()) ** self.gamma) * log_p
'''
IN_TURN = '''
from __future__ import annotations
from typing import TYPE_CHECKING, Literal
from kvopt.config.schedules import Schedule
if TYPE_CHECKING:
    from kvopt.train.stream import Stream

class InTurn(Schedule):
    """Every row once an epoch; from epoch to epoch it meets the contexts in turn."""
    kind: Literal["in-turn"]

    def context(self, stream: Stream, position: int, kept: tuple[int, ...]) -> int:
        return (stream.shuffled_row(position) + position // stream.rows) % len(stream.weights)
'''
MAX_WORDS = '''
from __future__ import annotations
from typing import ClassVar, Literal
from pydantic import Field
from kvopt.config.metrics import Item, Metric, Verdict

class MaxWords(Metric):
    """Share of answers that are short enough."""
    kind: Literal["max-words"]
    words: int = Field(50, ge=1, description="the most words of an answer")
    pass_or_fail: ClassVar[bool] = True

    def verdict(self, item: Item) -> Verdict:
        return self.share(len(item.answer.split()) <= self.words)
'''

JUDGE = {"kind": "judge", "base_url": "http://judge.invalid/v1", "model": "m"}

DROPPED = """
import sys, {package}
{package}.__path__.append({folder!r})
import kvopt.config.document
assert "torch" not in sys.modules
"""


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def run_with(folder: Path, package: str, name: str, source: str, code: str) -> Any:
    """What ``code`` prints as JSON, in a process in which the family's folder also holds this file."""
    (folder / name).write_text(source, "utf-8")
    return json.loads(run(DROPPED.format(package=package, folder=str(folder)) + code))


@pytest.mark.parametrize("family", [LOSSES, SCHEDULES, METRICS, STARTS], ids=lambda family: family.title)
def test_a_kind_is_the_name_of_its_file(family: Family[Any]) -> None:
    assert len(family.members) > 2
    for kind, member in family.members.items():
        assert member.model_fields["kind"].annotation.__args__ == (kind,)


def test_every_member_of_every_family_loads_without_torch_and_what_only_some_need() -> None:
    code = f"""
import sys
import kvopt.config.document
from kvopt.config.contexts import STARTS
from kvopt.config.losses import LOSSES
from kvopt.config.metrics import METRICS
from kvopt.config.mutations import OPERATORS
from kvopt.config.schedules import SCHEDULES
loaded = [family.members for family in (STARTS, LOSSES, METRICS, SCHEDULES)]
assert OPERATORS.values() and all(loaded)
print([name for name in {HEAVY!r} if name in sys.modules])
"""
    assert run(code) == "[]"


@pytest.mark.parametrize("module", ["losses.ce", "schedules.expand", "metrics.exact_match"])
def test_a_member_may_be_imported_before_the_config(module: str) -> None:
    code = f"import kvopt.train.{module}, kvopt.config.document; print(kvopt.config.document.Config.__name__)"
    assert run(code) == "Config"


@pytest.mark.parametrize("kind", LOSSES.kinds)
def test_every_loss_says_what_the_base_sees(kind: str) -> None:
    loss = StudentConfig.model_validate({"name": "s", "contexts": ["original"], "loss": kind}).loss
    assert loss.anchor in ("none", "original", "same", "other")


def test_a_new_file_alone_adds_a_loss(tmp_path: Path) -> None:
    code = """
from kvopt.config.students import StudentConfig
student = StudentConfig.model_validate({"name": "s", "contexts": ["none"], "loss": {"kind": "focal", "gamma": 1}})
import json, torch
from kvopt.kernels import Head
from kvopt.train.gold_tokens import Gold
gold = Gold(torch.eye(2), torch.tensor([0, 1]), Head(torch.zeros(4, 2)))
schema = json.dumps(kvopt.config.document.Config.model_json_schema())
print(json.dumps([student.model_dump()["loss"], student.loss(gold).tolist(), '"focal"' in schema]))
"""
    dump, values, in_schema = run_with(tmp_path, "kvopt.train.losses", "focal.py", FOCAL, code)
    assert dump == {"kind": "focal", "gamma": 1}
    assert values == pytest.approx([0.75 * 1.386294] * 2)
    assert in_schema


def test_a_new_file_alone_adds_a_schedule(tmp_path: Path) -> None:
    code = """
from kvopt.config.students import StudentConfig
schedule = StudentConfig.model_validate({"name": "s", "contexts": ["none"], "schedule": "in-turn"}).schedule
import json
from kvopt.train.stream import Stream
stream = Stream(schedule, 4, (1.0, 1.0), 0)
print(json.dumps([(stream.row(p), stream.context(p, ())) for p in range(2 * stream.per_epoch)]))
"""
    items = run_with(tmp_path, "kvopt.train.schedules", "in_turn.py", IN_TURN, code)
    assert sorted(map(tuple, items[:4])) == [(0, 0), (1, 1), (2, 0), (3, 1)]
    assert sorted(map(tuple, items[4:])) == [(0, 1), (1, 0), (2, 1), (3, 0)]


def test_a_new_file_alone_adds_a_metric_that_is_also_a_check(tmp_path: Path) -> None:
    code = """
import json, pathlib
from kvopt.config.evaluation import EvaluateConfig
from kvopt.config.metrics import Item
from kvopt.config.students import OwnAnswersConfig
short = {"kind": "max-words", "words": 2}
checks = {"kind": "checks", "checks": ["max-words", short | {"name": "two"}]}
metrics = EvaluateConfig.model_validate({"metrics": [short, checks]}).metrics
assert OwnAnswersConfig.model_validate({"accept": ["max-words"]}).accept[0].words == 50
item = Item("v:0", {}, "gold", "one two three")
print(json.dumps([metric.prepared(pathlib.Path()).verdict(item).ratios for metric in metrics]))
"""
    short, checks = run_with(tmp_path, "kvopt.train.metrics", "max_words.py", MAX_WORDS, code)
    assert short == {"max-words": [0, 1]}
    assert checks == {"checks": [1, 1], "checks.all": [0, 1], "checks.max-words": [1, 1], "checks.two": [0, 1]}


def test_only_metrics_that_pass_or_fail_are_checks() -> None:
    checks = {kind for kind, member in METRICS.members.items() if member.pass_or_fail}
    assert {"exact-match", "json-schema", "json-valid", "python", "regex"} <= checks
    for kind in ("slots", "rouge-l", "checks"):
        with pytest.raises(ValueError, match="does not match any of the expected tags"):
            StudentConfig.model_validate({"name": "s", "contexts": ["none"], "own_answers": {"accept": [kind]}})


@pytest.mark.parametrize(
    ("settings", "package", "what", "extra"),
    [
        ({"kind": "rouge-l"}, "rouge_score", "ROUGE-L", "metrics"),
        ({"kind": "json-schema", "definition": {}}, "jsonschema", "checking a JSON schema", "metrics"),
        ({"kind": "json-schema", "definition": {}}, "referencing", "checking a JSON schema", "metrics"),
        (JUDGE, "httpx", "asking a judge", "endpoint"),
        (JUDGE, "tenacity", "asking a judge", "endpoint"),
    ],
)
def test_an_absent_package_is_one_line_that_says_what_to_install(
    settings: dict[str, Any], package: str, what: str, extra: str
) -> None:
    code = f"""
import sys, pathlib
sys.modules[{package!r}] = None
from kvopt.config.evaluation import EvaluateConfig
from kvopt.errors import InputError
[metric] = EvaluateConfig.model_validate({{"metrics": [{settings!r}]}}).metrics
try:
    metric.prepared(pathlib.Path())
except InputError as error:
    print(error)
"""
    needs = f"{what} needs the extra {extra!r} (pip install 'kvopt[{extra}]')"
    assert run(code) == f"evaluate.metrics.{settings['kind']}: {needs}"
