"""The ``contexts`` section: the soft prompts and KV caches to learn, where each starts, and wordings of one's own."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from kvopt.config.faults import build_model
from kvopt.config.kinds import Family, Options
from kvopt.config.names import ContextName
from kvopt.config.section import NAME, Section
from kvopt.config.shortening import ShortText
from kvopt.errors import InputError

STARTS: Family[Start] = Family("kvopt.learning.starts", "init")
_ON_TEXTS = {
    "template": "",
    "text": "a file",
    "mutation": "a mutation's name",
    "best-mutation": "",
    "extract": "a number of tokens",
}
"""Texts that the start ``first-tokens`` can take, with what must stand after their colon."""


class Start(Options):
    """Where a learned context starts: the options of one member of :data:`STARTS`.

    ``version`` is raised when the same options give another start.
    """

    version: ClassVar[int] = 1

    def tensor(self, task: Any) -> Any:
        """The starting value, on the base's device: kv [T, L, 2, H, d], soft [T, D] (a torch tensor).

        Args:
            task: the :class:`kvopt.learning.start_task.StartTask` to start.
        """
        raise NotImplementedError


class Init:
    """An ``init`` taken apart: ``strided``, ``text:FILE``, ``context:NAME``, ``extract:N``, or a mapping with ``kind``
    and options.

    Attributes:
        kind: what stands before the colon.
        argument: what stands after it: a file, a mutation's or a context's name, or a folder.
        start: the start with its options.
    """

    def __init__(self, value: str | dict[str, Any], where: str = "init") -> None:
        """Raises InputError, at ``where``, for an unknown start, or an argument that is missing or one too many."""
        self.argument = ""
        if isinstance(value, dict):
            self.kind = str(value.get("kind"))
            self.start = self._built(value, where)
            return
        self.kind, _, self.argument = value.partition(":")
        tree: dict[str, Any] = {"kind": self.kind}
        wanted = _ON_TEXTS.get(self.kind, "a context's name or folder" if self.kind == "context" else "")
        if self.kind not in known_starts():
            raise InputError(f"unknown init {value!r}", where=where, fix="one of " + ", ".join(known_starts()))
        if self.kind == "extract" and self.argument and not (self.argument.isdecimal() and int(self.argument) > 0):
            raise InputError(f"init {value!r}: {self.argument!r} is no number of tokens", where=where)
        if bool(wanted) != bool(self.argument):
            what = f"{self.kind}:… needs {wanted}" if wanted else f"{self.kind} takes no argument"
            raise InputError(f"init {value!r}: {what}", where=where)
        if self.kind == "extract":
            tree = {"kind": "shortened", "tokens": int(self.argument)}
        elif self.kind in _ON_TEXTS or self.kind == "context":
            tree = {"kind": "existing" if self.kind == "context" else "first-tokens"}
        self.start = self._built(tree, where)

    @staticmethod
    def _built(tree: dict[str, Any], where: str) -> Start:
        if "kind" not in tree:
            raise InputError(f"init {tree!r} has no kind", where=where, fix="write kind: NAME in it, or plain text")
        kind = tree["kind"]
        if kind not in STARTS.kinds:
            raise InputError(f"unknown init {kind!r}", where=where, fix="one of " + ", ".join(STARTS.kinds))
        return build_model(STARTS.options(str(kind)), tree, where)

    @property
    def settings(self) -> Any:
        """What an identity takes of it: the kind, with the options that are not at their defaults, if any."""
        changed = self.start.model_dump(mode="json", exclude_defaults=True, exclude={"kind"})
        if self.start.version > 1:
            changed["version"] = self.start.version
        return {"kind": self.kind, **changed} if changed else self.kind

    @property
    def text(self) -> ShortText | None:
        """With ``extract:N``: the shorter text of the template that it starts from."""
        return self.start if isinstance(self.start, ShortText) else None

    @property
    def source(self) -> ContextName | None:
        """The context that the start takes its text or tensor from; None for the original template."""
        if self.kind == "best-mutation":
            return ContextName.parse("best-mutations:1", "init")
        if self.kind in ("text", "mutation", "context"):
            return ContextName.parse(f"{self.kind}:{self.argument}", "init")
        return None


def known_starts() -> tuple[str, ...]:
    """Everything that may stand before the colon of an ``init``."""
    own = [kind for kind in STARTS.kinds if kind not in ("first-tokens", "existing", "shortened")]
    return (*_ON_TEXTS, *own, "context")


class ContextConfig(Section):
    """A context to learn, or a wording of your own (``text``) that is scored beside them."""

    name: str = Field(pattern=NAME, description="name of the context, and of its folder under contexts/")
    text: str | None = Field(
        None,
        description="a file with another wording of the template, such as your own shorter prompt: it is scored and"
        " ranked as it is, and nothing is learned; no other key but name goes with it. A text file without slots takes"
        " the place of the text before the first slot; one with slots, or a .yaml with messages or text, is the whole"
        " prompt",
    )
    kind: Literal["kv", "soft"] = Field("kv", description="kv: a KV cache; soft: a soft prompt (input embeddings)")
    tokens: int | None = Field(
        None, ge=1, description="length in slots; default: as long as the text (or context) that it starts from"
    )
    init: str | dict[str, Any] = Field(
        "template",
        description="where it starts; default: with tokens, matched for kv and salient for soft, else template."
        " template (its first tokens), strided (tokens spread evenly over it), matched"
        " (fitted to its attention; kv only), salient (the tokens that rows look at most), extract:N (the template"
        " shortened to N tokens), random-text, random, text:FILE, mutation:NAME, best-mutation, or context:NAME; or a"
        " mapping with kind and options",
    )
    steps: int = Field(200, ge=0, description="optimizer steps")
    batch_size: int = Field(16, ge=1, description="rows in each step")
    micro_batch_size: int | None = Field(
        None,
        ge=1,
        description="rows whose activations are held at once: less memory, the same step; default: batch_size",
    )
    optimizer: Literal["adamw", "muon"] = Field(
        "adamw", description="muon moves all slots of a soft prompt together; KV caches take adamw"
    )
    learning_rate: float = Field(
        0.005, gt=0, description="peak learning rate; muon's steps are as large as adamw's with it"
    )
    warmup: float = Field(
        0.05, ge=0, le=1, description="share of the steps with a rising learning rate; a cosine to 0 follows"
    )
    weight_decay: float = Field(0.0, ge=0, description="decoupled weight decay")
    clip: float = Field(1.0, gt=0, description="larger gradient norms are scaled down to this")
    frozen: int = Field(1, ge=0, description="how many leading slots are not trained (slot 0 is the attention sink)")
    eval_every: int = Field(
        20, ge=1, description="steps between measurements of the KL on selection rows; the best state is kept"
    )
    patience: int | None = Field(None, ge=1, description="stop after this many measurements without a better one")
    seed: int | None = Field(
        None, description="decides the order of rows and random starts; default: the config's seed"
    )

    @model_validator(mode="before")
    @classmethod
    def _nearest_start(cls, tree: Any) -> Any:
        """The start that was measured to be the nearest of its kind that takes seconds, where none is named."""
        if isinstance(tree, dict) and tree.get("tokens") is not None and "init" not in tree:
            return {**tree, "init": "salient" if tree.get("kind") == "soft" else "matched"}
        return tree

    @field_validator("init")
    @classmethod
    def _known(cls, value: str | dict[str, Any]) -> str | dict[str, Any]:
        try:
            Init(value)
        except InputError as error:
            raise ValueError(f"{error.what} ({error.fix})" if error.fix else error.what) from None
        return value

    @model_validator(mode="after")
    def _text_alone(self) -> ContextConfig:
        others = sorted(self.model_fields_set - {"name", "text"})
        if self.text is not None and others:
            raise ValueError(f"{others[0]} is for contexts that are learned; with text, give only name and text")
        return self

    @model_validator(mode="after")
    def _something_is_trained(self) -> ContextConfig:
        if self.steps and self.tokens is not None and self.frozen >= self.tokens:
            raise ValueError(f"frozen: {self.frozen} of {self.tokens} slots leaves nothing to train; lower frozen")
        return self

    @model_validator(mode="after")
    def _muon_is_for_matrices(self) -> ContextConfig:
        if self.kind == "kv" and self.optimizer == "muon":
            raise ValueError("optimizer: muon is for soft prompts; KV caches take adamw")
        return self

    @property
    def start(self) -> Init:
        """``init``, taken apart."""
        return Init(self.init, f"contexts.{self.name}")
