"""What is exported: a context named on the command line, with what its folder and its run say about it. No weights are
loaded unless an exporter asks for them.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from safetensors.torch import save
from torch import Tensor

from kvopt.base.identity import check_base, config_sha256, tokenizer_sha256
from kvopt.base.loading import Base, load_base, load_tokenizer
from kvopt.base.places import locate
from kvopt.config.model import ModelConfig
from kvopt.contexts.adapter import adapter_config, check_finite, kind_of, read_record, read_tensor
from kvopt.documents.context_record import ContextRecord
from kvopt.documents.export_record import ContextMetrics
from kvopt.documents.leaderboard_file import LeaderboardDocument, LeaderboardRow, UnreportedMutation
from kvopt.documents.manifest import RunManifest
from kvopt.documents.part import ContextKind
from kvopt.documents.scores_file import MeanKL, SplitScores
from kvopt.documents.validated import read_document, read_leaderboard
from kvopt.errors import InputError
from kvopt.mutate.mutation import read_mutations
from kvopt.storage.files import write_bytes
from kvopt.task.examples import Example
from kvopt.task.render import Rendered
from kvopt.task.seam import Encoder
from kvopt.task.template import Template
from kvopt.task.template_files import configured_template


@dataclass(frozen=True)
class RunFacts:
    """What a run directory says about its template and base."""

    path: Path
    template: Template
    base: str
    chat_kwargs: Mapping[str, Any]
    scope: str
    board: LeaderboardDocument | None = None
    answer_prefix: str | None = None
    now: datetime | None = None

    def row(self, name: str) -> LeaderboardRow | UnreportedMutation | None:
        """The context's row of the leaderboard, None where it has none."""
        rows: list[LeaderboardRow | UnreportedMutation] = []
        if self.board is not None:
            rows = [*self.board.contexts, *self.board.other_mutations]
        return next((row for row in rows if row.name == name), None)

    def metrics(self, name: str) -> ContextMetrics | None:
        """How good the context is: on the validation rows, or on the selection rows for a mutation that was scored
        there alone; None where it has no row.
        """
        row = self.row(name)
        if row is None or self.board is None:
            return None
        if isinstance(row, LeaderboardRow):
            return _metrics(self.board.split, row)
        return _metrics(self.board.selected_on, row.selection)


@dataclass(frozen=True)
class PromptExample:
    """A whole prompt with its slots left as ``{{name}}``, and how a body comes of its ids.

    Attributes:
        text: what is tokenized.
        special: whether the tokenizer adds its own special tokens.
        replaced: ids at the start that the context stands for.
        ends_with_eos: whether the tokenizer adds an EOS that no prompt has.
    """

    text: str
    special: bool
    replaced: int
    ends_with_eos: bool


@dataclass(frozen=True)
class Source:
    """A context to export.

    Attributes:
        name, kind: of the context; kind is text, soft or kv.
        base_name: the model it belongs to.
        folder, config, record: of a learned context: its folder, PEFT config, and kvopt.json (None for another's).
        template: of a text context.
        run: the run that it comes from, where known.
    """

    name: str
    kind: ContextKind
    base_name: str
    folder: Path | None = None
    config: dict[str, Any] = field(default_factory=dict)
    record: ContextRecord | None = None
    template: Template | None = None
    run: RunFacts | None = None

    @cached_property
    def tensor(self) -> Tensor:
        """``prompt_embeddings`` [T, …] in fp32. Raises InputError for a damaged one."""
        folder = self._folder()
        tensor = read_tensor(folder)
        check_finite(tensor, folder)
        if tensor.ndim != 2 or tensor.shape[0] != self.config.get("num_virtual_tokens"):
            raise InputError(f"its tensor has shape {list(tensor.shape)}", where=str(folder), fix="rebuild it")
        return tensor.float()

    @property
    def tokens(self) -> int | None:
        """Slots; for text, the tokens that the leaderboard gives."""
        if self.kind == "text":
            row = self.run.row(self.name) if self.run else None
            return row.tokens if row else None
        return self.tensor.shape[0]

    @cached_property
    def base(self) -> Base:
        """The base in fp32 on the CPU, loaded when an exporter asks for it."""
        return load_base(ModelConfig(base=self.base_name, dtype="float32", device="cpu"))

    @cached_property
    def states(self) -> Tensor:
        """Keys and values [T, L, 2, H, d] that a learned context puts in front of bodies, at positions 0 … T − 1.

        A soft prompt is prefilled, and a moved context moved back: both load the base.
        """
        first = self.record.first_position if self.record else 0
        if self.kind == "soft" or first:
            from kvopt.contexts.folder import load_context
            from kvopt.contexts.moving import states_of

            return states_of(load_context(self._folder(), self.base), self.base)
        layers, heads, width = (self.config.get(k) for k in ("num_layers", "num_attention_heads", "token_dim"))
        tensor = self.tensor
        if not (layers and heads and width) or width % heads or tensor.shape[1] != 2 * layers * width:
            raise InputError(
                "adapter_config.json does not say how its tensor divides into layers and heads", where=str(self.folder)
            )
        return rearrange(tensor, "t (l two h d) -> t l two h d", l=layers, two=2, h=heads)

    @property
    def template_tokens(self) -> int | None:
        """Tokens of the original template that the context stands for, None where nothing says it."""
        known = self.record.template_tokens if self.record else None
        return known or (self.run.board.template_tokens if self.run and self.run.board else None) or None

    @property
    def scope(self) -> str:
        """What the context replaces: static text before the first slot (leading), or all of it."""
        return (self.record.scope if self.record else None) or (self.run.scope if self.run else "leading")

    @cached_property
    def metrics(self) -> ContextMetrics | None:
        """How good it is: by the leaderboard, else by its own record, else None."""
        return (self.run.metrics(self.name) if self.run else None) or recorded_metrics(self.record)

    def check_base(self) -> None:
        """Compare the base that was chosen with the one that the context's record names, by their configuration and
        tokenizer, which needs no weights. Raises InputError for another one.
        """
        if self.record is None or self.record.base is None:
            return
        model = ModelConfig(base=self.base_name)
        tokenizer, _ = load_tokenizer(model)
        loaded = {
            "config": config_sha256(locate(self.base_name, None, lambda line: None, weights=False)),
            "tokenizer": tokenizer_sha256(tokenizer),
        }
        check_base(self.record.base, self.base_name, loaded, self._folder())

    def prompt_example(self) -> PromptExample | None:
        """A prompt of the run's template; None where the template is not known."""
        if self.run is None or self.kind == "text":
            return None
        template = self.run.template
        template = template.without_trailing_static() if self.scope == "all" else template
        values = {name: "{{" + name + "}}" for name in template.slots}
        try:
            tokenizer, _ = load_tokenizer(ModelConfig(base=self.base_name))
            encoder = Encoder(tokenizer, self.run.chat_kwargs, False, self.run.answer_prefix, self.run.now)
            ids, leading, _ = encoder.prompt_and_gold(template, Example("", values, "answer", self.name))
            text = encoder.renderer.render(template, values).text
        except InputError:  # a card can do without an example
            return None
        spoken = self.run.answer_prefix or ""
        if encoder.tokenized(template, Rendered(text + spoken, ()))[0] != ids:
            spoken = spoken.rstrip()  # white space that becomes part of the answer's first token
        known = self.record.replaced_ids if self.record else None
        if known is None and self.scope == "leading":
            known = self.template_tokens
        replaced = leading if known is None else known
        return PromptExample(text + spoken, not template.is_chat, replaced, encoder.appends_eos)

    def _folder(self) -> Path:
        if self.folder is None:
            raise ValueError(f"{self.name} is a text context and has no folder")
        return self.folder


def recorded_metrics(record: ContextRecord | None) -> ContextMetrics | None:
    """What ``kvopt.json`` says of a context's quality: its scores, else the best point of its learning curve."""
    if record is None:
        return None
    for split, scores in (record.scores or {}).items():
        return _metrics(split, scores)
    best = record.best_point
    if best is None:
        return None
    return ContextMetrics(split="selection", kl_forward=MeanKL(mean=best.held_out_kl, ci95=None), step=best.step)


def _metrics(split: str, scores: SplitScores) -> ContextMetrics:
    return ContextMetrics(
        split=split,
        kl_forward=scores.kl_forward,
        gold_nll=scores.gold_nll,
        top1_agreement=scores.top1_agreement,
        examples=scores.examples,
        gold_tokens=scores.gold_tokens,
    )


def open_source(spec: str, *, base: str | None = None) -> Source:
    """The context that a command names: a folder, ``RUN/contexts/NAME``, or ``RUN#NAME`` (a learned context, a
    mutation, or ``original``).

    Args:
        spec: as above.
        base: the model to use instead of the one that the context names.

    Raises:
        InputError: nothing of that name, or a folder that is no context.
    """
    path = Path(spec)
    if "#" in spec and not path.exists():
        folder, _, name = spec.rpartition("#")
        return _of_run(Path(folder), name, base)
    if not path.exists():
        raise InputError("no such context", where=spec, fix="give a context's folder, or RUN#NAME")
    if (path / "manifest.json").is_file() and not (path / "adapter_config.json").is_file():
        raise InputError("is a run directory", where=spec, fix=f"name one of its contexts: {spec}#NAME")
    return _learned(path, None, base)


def _learned(folder: Path, run: RunFacts | None, base: str | None) -> Source:
    config, record = adapter_config(folder), read_record(folder)
    parent = folder.resolve().parent
    if run is None and parent.name == "contexts" and (parent.parent / "manifest.json").is_file():
        with suppress(InputError):  # the context stands without its run
            run = read_run(parent.parent)
    name = record.name if record else folder.resolve().name
    recorded = record.base.name if record and record.base else None
    chosen = base or recorded or config.get("base_model_name_or_path")
    if not chosen:
        raise InputError("does not name its base", where=str(folder), fix="give it with --base")
    return Source(name, kind_of(config), chosen, folder=folder, config=config, record=record, run=run)


def _of_run(folder: Path, name: str, base: str | None) -> Source:
    run = read_run(folder)
    learned = folder / "contexts" / name
    if learned.is_dir() and name:
        return _learned(learned, run, base)
    if name == "original":
        return Source(name, "text", base or run.base, template=run.template, run=run)
    journal = folder / "mutations.jsonl"
    mutations = [m for m in read_mutations(journal) if m.accepted] if journal.is_file() else []
    for mutation in mutations:
        if mutation.name == name and mutation.template is not None:
            return Source(name, "text", base or run.base, template=mutation.template, run=run)
    written = [row for row in run.board.contexts if row.template is not None] if run.board else []
    for row in written:
        if row.name == name and row.template is not None:
            template = Template.from_json(row.template.to_json(), where=f"{folder} {name}")
            return Source(name, "text", base or run.base, template=template, run=run)
    names = [row.name for row in written]
    names += sorted(p.name for p in (folder / "contexts").glob("*") if p.is_dir() and not p.name.startswith("."))
    names += [str(m.name) for m in mutations]
    shown = ", ".join(["original", *names][:12]) + (", …" if len(names) > 11 else "")
    raise InputError(f"no context {name!r}", where=str(folder), fix=f"there are {shown}")


def read_run(folder: Path) -> RunFacts:
    """Template, base and leaderboard of a run directory. Raises InputError for a folder that is none, or a damaged
    file in it.
    """
    from kvopt.config.document import load_config

    path = folder / "config.yaml"
    if not path.is_file():
        raise InputError("is not a run directory", where=str(folder), fix="it has no config.yaml")
    config, base_dir = load_config(path)
    place = folder / "leaderboard.json"
    board = read_leaderboard(place) if place.is_file() else None
    template = configured_template(config.template, base_dir)[0]
    manifest = folder / "manifest.json"
    began = read_document(RunManifest, manifest).prompt_time if manifest.is_file() else None
    return RunFacts(
        folder,
        template,
        config.model.base,
        config.template.chat_kwargs,
        config.template.scope,
        board,
        config.template.answer_prefix,
        datetime.fromisoformat(began) if began else None,
    )


def fp32(tensor: Tensor) -> Tensor:
    """A contiguous fp32 copy on the CPU, as files hold it."""
    return tensor.detach().to("cpu", torch.float32).contiguous()


def write_prefix(states: Tensor, place: Path) -> None:
    """``prefix.safetensors`` of states [T, L, 2, H, d]: ``layers.i.keys`` and ``layers.i.values`` [H, T, d] in fp32."""
    tensors = {}
    for layer in range(states.shape[1]):
        tensors[f"layers.{layer}.keys"] = fp32(states[:, layer, 0].transpose(0, 1))
        tensors[f"layers.{layer}.values"] = fp32(states[:, layer, 1].transpose(0, 1))
    write_bytes(place / "prefix.safetensors", save(tensors, metadata={"format": "pt"}))
