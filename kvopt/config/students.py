"""The ``students:`` section of a config: what a student is trained on, how, and for how long."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from kvopt.config.evaluation import CheckConfig
from kvopt.config.losses import LOSSES, Loss
from kvopt.config.schedules import SCHEDULES, Schedule
from kvopt.config.section import NAME, Section, Shorthand


class ContextChoice(Shorthand):
    """Contexts to train under; plain text is ``context`` with weight 1."""

    context: str = Field(
        min_length=1,
        description="original, none, best-mutations:K, diverse-mutations:K, spread-mutations:K, "
        "random-mutations:K, text:FILE, a learned context, a mutation's name, or a context folder",
    )
    weight: float = Field(1, gt=0, description="how often each of these contexts is drawn; expand takes whole numbers")

    @model_validator(mode="before")
    @classmethod
    def _plain(cls, value: Any) -> Any:
        return {"context": value} if isinstance(value, str) else value


class LoraSettings(Section):
    """LoRA through PEFT."""

    rank: int = Field(16, ge=1, description="rank of the LoRA update")
    alpha: float = Field(32, gt=0, description="the update is scaled by alpha / rank")
    dropout: float = Field(
        0.0, ge=0, lt=1, description="share of the adapters' input that is set to zero while training"
    )
    targets: str | list[str] = Field(
        "all-linear", description="modules that get an adapter: all-linear, or names of linear modules"
    )


if TYPE_CHECKING:
    ScheduleConfig = Schedule
    LossConfig = Loss
else:
    ScheduleConfig = SCHEDULES.union()
    LossConfig = LOSSES.union()


class OwnAnswersConfig(Section):
    """Gold outputs replaced by the base's own answers where these are right (S3FT)."""

    accept: list[CheckConfig] = Field(min_length=1, description="checks that an answer must pass, all of them")
    max_new_tokens: int = Field(128, ge=1, description="most tokens of an answer; a longer one is not used")


class StudentConfig(Section):
    """One student to train on contexts of the run."""

    name: str = Field(pattern=NAME, description="folder name under students/")
    method: Literal["lora", "full"] = Field("lora", description="train LoRA adapters, or all weights")
    lora: LoraSettings = Field(LoraSettings(), description="the adapters that method: lora trains")
    masters: Literal["float32", "base"] = Field(
        "float32", description="dtype of the trained weights of method: full: float32, or that of the base"
    )
    half: bool = Field(
        False, description="half fine-tuning (method: full): every epoch freezes a random half of the matrices"
    )
    start: str | None = Field(
        None, description="folder of a student of the same method to go on from; default: the base"
    )
    contexts: list[ContextChoice] = Field(
        min_length=1,
        description="the contexts that it is trained under: original, none, best-mutations:K, diverse-mutations:K, "
        "spread-mutations:K, random-mutations:K, text:FILE (or FILE#NAME), a mutation, a learned context, a context "
        "folder; or {context: …, weight: …}",
    )
    context_dropout: float = Field(
        0.0,
        ge=0,
        lt=1,
        exclude_if=lambda share: share == 0,  # students were stored before there was any
        description="probability with which a row does not see a slot of its soft or KV context, drawn for each row"
        " and step: between the whole context and none",
    )
    own_answers: OwnAnswersConfig | None = Field(
        None, description="train on the base's own answer where it is right; default: on gold outputs alone"
    )
    schedule: ScheduleConfig = Field(
        SCHEDULES.options("expand")(kind="expand"), description="which row meets which context when; default: expand"
    )
    loss: LossConfig = Field(LOSSES.options("ce")(kind="ce"), description="on gold tokens; default: ce")
    steps: int | None = Field(
        None, ge=1, description="optimizer steps to train for; give one of steps, epochs and tokens"
    )
    epochs: float | None = Field(
        None, gt=0, description="passes over the rows, rounded up to a whole step (default: 1)"
    )
    tokens: int | None = Field(
        None, ge=1, description="tokens that pass through the student, rounded up to a whole step"
    )
    batch_size: int = Field(8, ge=1, description="rows per optimizer step, over all micro-batches and processes")
    accumulation: int = Field(
        1, ge=1, description="micro-batches per optimizer step: more need less memory and give the same result"
    )
    learning_rate: float | None = Field(
        None, gt=0, description="highest learning rate of AdamW; default: 2e-4 (lora), 2e-5 (full)"
    )
    warmup: float = Field(
        0.05, ge=0, le=1, description="share of the steps in which the learning rate rises to its peak"
    )
    decay: Literal["linear", "cosine", "constant"] = Field(
        "linear", description="how the learning rate falls after the warmup"
    )
    weight_decay: float = Field(0.0, ge=0, description="AdamW's decoupled weight decay")
    clip: float = Field(1.0, gt=0, description="gradients with a larger norm are scaled down to it")
    seed: int | None = Field(
        None, ge=0, lt=2**31, description="seed of the order of rows and of all draws; default: the config's seed"
    )
    max_length: int | None = Field(
        None, ge=2, description="most tokens of a row with its context; default: the model's window"
    )
    too_long: Literal["error", "drop"] = Field(
        "error",
        description="what happens to rows over max_length: an error, or they are left out and counted; "
        "gold outputs are never cut",
    )
    gradient_checkpointing: bool = Field(False, description="recompute activations: less memory, more time")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="dtype of the computation; auto: the base's. Trained weights stay float32 (mixed precision)",
    )
    log_every: int = Field(1, ge=1, description="steps between entries of the history")
    checkpoint_every: int | None = Field(
        None, ge=1, description="steps between checkpoints; default: a tenth of all steps"
    )
    report_to: list[str] = Field(
        ["tensorboard"], description="experiment trackers, by their names in transformers.Trainer; [] for none"
    )

    @model_validator(mode="before")
    @classmethod
    def _plain_kinds(cls, value: Any) -> Any:
        """``loss: dft`` stands for ``loss: {kind: dft}``, and so does ``schedule: resample``."""
        if not isinstance(value, dict):
            return value
        plain = {key: {"kind": value[key]} for key in ("schedule", "loss") if isinstance(value.get(key), str)}
        return value | plain

    @model_validator(mode="after")
    def _fits(self) -> StudentConfig:
        if self.name in ("original", "none", "base"):
            raise ValueError(f"{self.name!r} is the name of something built in")
        given = [name for name in ("steps", "epochs", "tokens") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"give one of steps, epochs and tokens (given: {', '.join(given)})")
        if self.tokens is not None and self.schedule.adapts:
            raise ValueError(
                f"{self.schedule.kind} cannot tell how many steps so many tokens are; give steps or epochs"
            )
        if self.tokens is not None and self.loss.draws:
            raise ValueError(f"{self.loss.kind} cannot tell how many steps so many tokens are; give steps or epochs")
        if self.tokens is not None and self.loss.anchor == "other":
            raise ValueError(
                f"{self.loss.kind} runs two wordings of a row, which tokens does not count; give steps or epochs"
            )
        if self.context_dropout and self.loss.draws:
            raise ValueError(f"{self.loss.kind} answers under whole contexts; leave out context_dropout")
        if self.own_answers is not None and self.loss.anchor == "original":
            raise ValueError(
                "own_answers and a loss that is anchored in the original cannot be combined: the stored "
                "reference is that of the gold outputs; set loss.anchor: same"
            )
        if self.own_answers is not None and self.loss.draws:
            raise ValueError(f"{self.loss.kind} distillation uses no gold outputs; leave out own_answers")
        if self.batch_size % self.accumulation:
            raise ValueError(f"batch_size {self.batch_size} is no multiple of accumulation {self.accumulation}")
        if self.half and self.method != "full":
            raise ValueError("half is an option of method: full")
        if self.schedule.whole_weights:
            for choice in self.contexts:
                if choice.weight != int(choice.weight):
                    raise ValueError(
                        f"weight {choice.weight} of {choice.context!r}: {self.schedule.kind} takes whole numbers"
                    )
        return self

    @property
    def rate(self) -> float:
        """The peak learning rate."""
        return self.learning_rate or (2e-4 if self.method == "lora" else 2e-5)
