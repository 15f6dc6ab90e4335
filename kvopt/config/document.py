"""The config file: one strict YAML document, checked whole before any work starts.

Unknown keys are errors with a suggestion; paths are relative to the config file; ``--set a.b=c`` changes one value.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Discriminator, Field, Tag, model_validator

from kvopt.config.contexts import ContextConfig
from kvopt.config.data import DataConfig
from kvopt.config.evaluation import EvaluateConfig
from kvopt.config.faults import build_model
from kvopt.config.frontiers import FrontierConfig
from kvopt.config.model import BUILTIN_BASE, ModelConfig
from kvopt.config.mutations import MutationsConfig
from kvopt.config.names import MUTATION
from kvopt.config.section import NAME, Section, refuse_repeats
from kvopt.config.sections import ReferenceConfig, ReportConfig, ScoreConfig, TemplateConfig
from kvopt.config.shortening import ExtractGenerator, ShorteningConfig
from kvopt.config.students import StudentConfig
from kvopt.config.study import StudyConfig
from kvopt.config.yaml_file import read_tree


def _item(value: Any) -> str:
    """One of the kinds of the section that an item of ``contexts`` is."""
    kind = value.get("kind") if isinstance(value, dict) else getattr(value, "kind", None)
    return "frontier" if kind == "frontier" else "kv"


ContextItem = Annotated[
    Annotated[ContextConfig, Tag("kv")] | Annotated[FrontierConfig, Tag("frontier")], Discriminator(_item)
]


class Config(Section):
    """Everything that the result of a run depends on."""

    name: str = Field("run", pattern=NAME, description="names the run directory, runs/NAME")
    seed: int = Field(0, ge=0, lt=2**31, description="decides everything that is random")
    model: ModelConfig = Field(ModelConfig(), description="the base, the frozen model")
    template: TemplateConfig = Field(description="the prompt template whose behaviour is to be kept")
    data: DataConfig = Field(description="rows with slot values and gold outputs (expected answers)")
    reference: ReferenceConfig = Field(
        ReferenceConfig(), description="how the base's distributions under the template are stored"
    )
    mutations: MutationsConfig = Field(
        MutationsConfig(), description="other wordings of the template, written by rules or a model"
    )
    score: ScoreConfig = Field(ScoreConfig(), description="how contexts are scored")
    contexts: list[ContextItem] = Field(
        default_factory=list,
        description="soft prompts and KV caches to learn, wordings of your own to score, and frontiers (kind: frontier)"
        " of all kinds at many lengths",
    )
    report: ReportConfig = Field(ReportConfig(), description="which single rows the report shows")
    students: list[StudentConfig] = Field(
        default_factory=list, description="models to train under contexts of the run, in order"
    )
    evaluate: EvaluateConfig = Field(
        EvaluateConfig(), description="how kvopt evaluate measures the base and the students"
    )
    study: StudyConfig | None = Field(None, description="which students kvopt study compares, and how")

    @model_validator(mode="after")
    def _unique_names(self) -> Config:
        texts = [name for item in self.frontiers for name in item.texts]
        names = [*(context.name for context in self.written), *(context.name for context in self.learned), *texts]
        refuse_repeats(names, "contexts")
        for name in names:
            if name in ("original", "none"):
                raise ValueError(f"{name!r} is the name of a built-in context")
            if MUTATION.fullmatch(name):
                raise ValueError(f"{name!r} is the name of a mutation; give the context another name")
        learned = [context.name for context in self.learned]
        for context in self.learned:
            kind, argument = context.start.kind, context.start.argument
            if kind == "context" and argument in learned and names.index(argument) >= names.index(context.name):
                raise ValueError(f"context {context.name!r} starts from {argument!r}, which must come before it")
        refuse_repeats([student.name for student in self.students], "students")
        return self

    @model_validator(mode="after")
    def _gradients_do_not_vanish(self) -> Config:
        if self.model.dtype == "float16":
            for context in self.learned:
                if context.steps:
                    raise ValueError(
                        f"context {context.name!r} is learned through float16, where small gradients become 0; set"
                        " model.dtype to bfloat16 or float32, or its steps to 0"
                    )
        return self

    @model_validator(mode="after")
    def _selects_by_what_is_measured(self) -> Config:
        select, evaluate = self.score.select, self.evaluate
        if select in ("kl", "gold_nll"):
            return self
        own = evaluate.metrics if "metrics" in evaluate.model_fields_set else []
        labels = [metric.label for metric in own if not metric.remote]
        if select not in labels:
            known = ", ".join(["kl", "gold_nll", *labels])
            raise ValueError(f"score.select {select!r} is not measured (known: {known}; others go to evaluate.metrics)")
        return self

    @property
    def learned(self) -> list[ContextConfig]:
        """The contexts that are learned, in order."""
        learned: list[ContextConfig] = []
        for item in self.contexts:
            if isinstance(item, FrontierConfig):
                learned += item.learned()
            elif item.text is None:
                learned.append(item)
        return learned

    @property
    def written(self) -> list[ContextConfig]:
        """The contexts that are wordings of the user's own, in order."""
        return [item for item in self.contexts if isinstance(item, ContextConfig) and item.text is not None]

    @property
    def frontiers(self) -> list[FrontierConfig]:
        """The items of ``contexts`` that stand for many."""
        return [item for item in self.contexts if isinstance(item, FrontierConfig)]

    @property
    def shortened(self) -> dict[ShorteningConfig, tuple[int, ...]]:
        """The lengths, longest first, of the shorter texts that the config asks for, by how they are to be found."""
        asked: dict[ShorteningConfig, set[int]] = {}
        for item in self.frontiers:
            asked.setdefault(item.how, set()).update(item.texts.values())
        for context in self.learned:
            if (text := context.start.text) is not None:
                asked.setdefault(text.how, set()).add(text.tokens)
        if isinstance(generator := self.mutations.generator, ExtractGenerator):
            asked.setdefault(generator.how, set()).update(generator.tokens)
        return {how: tuple(sorted(lengths, reverse=True)) for how, lengths in asked.items() if lengths}


def load_config(path: Path, overrides: Sequence[str] = ()) -> tuple[Config, Path]:
    """Read a config file; also return the folder that its paths are relative to.

    Args:
        path: a YAML file.
        overrides: ``a.b=value`` assignments, values in YAML; ``contexts.NAME.steps=5`` finds list items by their name
            or position.

    Raises:
        InputError: the file cannot be read, or something in it is wrong.
    """
    config = build_config(read_tree(path, overrides), str(path))
    base_dir = path.resolve().parent
    return _with_local_base(config, base_dir), base_dir


def _with_local_base(config: Config, base_dir: Path) -> Config:
    """A base in a folder or file beside the config, by its whole path (hub ids and the built-in name stay)."""
    place = base_dir / config.model.base
    if config.model.base == BUILTIN_BASE or Path(config.model.base).is_absolute() or not place.exists():
        return config
    return config.model_copy(update={"model": config.model.model_copy(update={"base": str(place.resolve())})})


def build_config(tree: dict[str, Any], where: str) -> Config:
    """The checked config of a parsed document. Raises InputError, one line, for the first thing that is wrong."""
    return build_model(Config, tree, where)
