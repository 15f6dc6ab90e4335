"""Loading a base, the frozen causal LM that everything is measured on, from the built-in model, a hub id, a folder or
a GGUF file."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from kvopt.base import hub
from kvopt.base.devices import automatic_dtype, choose_device, device_name, dtype_warning, is_out_of_memory
from kvopt.base.identity import chat_template_sha256, config_sha256, tokenizer_sha256, weights_sha256
from kvopt.base.implementation import check_implementation, implementation, is_refusal, reason, refused
from kvopt.base.places import checked_folder, locate, source_of
from kvopt.base.probe import Capability, Geometry, check_config, context_window, probe, text_config
from kvopt.base.quantization import identity_of, keep_gradients, method_of, quantization_config
from kvopt.base.rope import Rope
from kvopt.config.faults import build_model
from kvopt.config.model import BUILTIN_BASE, ModelConfig
from kvopt.documents.part import BaseIdentity
from kvopt.errors import InputError, KvoptError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from kvopt.base.sharding import Shards
    from kvopt.kernels import Head

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class Base:
    """A frozen causal LM in eval mode, with what the rest needs to know of it.

    Attributes:
        model: the transformers model; no parameter requires a gradient.
        tokenizer: its tokenizer.
        name: ``model.base`` of the config.
        device, dtype: where and in what it runs.
        geometry: sizes and layer types.
        identity: sha256 of ``weights``, ``config``, ``tokenizer``, ``chat_template`` (None without one), and
            ``source``, where the built-in or a converted base came from (None otherwise), and for a base that was
            quantized on loading, ``quantization``.
        capability: what running it showed (head scale, softcap, how keys rotate, whether rows can be packed).
        attention: ``model.attention`` of the config: whether rows are packed or padded.
        shards: of a base whose layers are shared out over processes, None where it is whole.
    """

    model: PreTrainedModel
    tokenizer: Any
    name: str
    device: torch.device
    dtype: torch.dtype
    geometry: Geometry
    identity: dict[str, str | None]
    capability: Capability
    attention: Literal["auto", "packed", "padded"] = "auto"
    shards: Shards | None = None

    @classmethod
    def load(cls, base: str, **settings: Any) -> Base:
        """:func:`load_base` of a name, folder or file, with settings of the config's ``model`` section by their names
        (``dtype="float32"``, ``device="cuda:1"``, …). Raises InputError for an unknown one, too.

        Examples:
            >>> base = Base.load("smollm2-135m", dtype="float32")
        """
        return load_base(build_model(ModelConfig, {"base": base, **settings}, "Base.load"))

    @property
    def document(self) -> BaseIdentity:
        """Name and identity as documents hold them."""
        return BaseIdentity(name=self.name, **self.identity)

    @property
    def backbone(self) -> nn.Module:
        """The module under the head: ids or embeddings to ``last_hidden_state`` [B, n, H] after the final norm."""
        return self.model.get_decoder()

    @property
    def embed(self) -> nn.Module:
        """Token ids [B, n] to input embeddings [B, n, H], the space soft prompts live in."""
        return self.model.get_input_embeddings()

    @cached_property
    def head(self) -> Head:
        """The output head (shares the model's weight)."""
        from kvopt.kernels import Head  # loads torch's compiler, which a tokenizer alone does not need

        head = self.model.get_output_embeddings()
        bias: Tensor | None = getattr(head, "bias", None)
        return Head(head.weight, bias=bias, scale=self.capability.scale, softcap=self.capability.softcap)

    @property
    def rope(self) -> Rope:
        """How keys rotate in each layer."""
        return self.capability.rope

    @property
    def quantized_by(self) -> str | None:
        """The method that its weights are quantized with, None for plain ones."""
        return method_of(self.model)

    def check_gradients(self, what: str) -> None:
        """Raises InputError where no gradients come through the base, for ``what`` needs them, such as a key of the
        config.
        """
        if (reason := self.capability.no_gradient) is not None:
            raise InputError(
                f"needs gradients through the base {self.name}: {reason}",
                where=what,
                fix="set model.quantization to nf4 or int8, or use a base with 16-bit weights",
            )

    def check_whole(self, what: str) -> None:
        """Raises InputError where the base's layers are shared out over processes, for ``what`` needs them whole."""
        if self.shards is not None:
            fix = "use a base that fits one device, without model.shard"
            raise InputError(f"{what} needs the whole base", where="model.shard fsdp2", fix=fix)


def load_base(config: ModelConfig, *, say: Callable[[str], None] | None = None) -> Base:
    """Load ``config.base``, check by running it that kvopt can work with it, and hash it.

    The built-in base and GGUF files are converted to bf16 safetensors in kvopt's cache on first use. Hub models that
    are cached are not looked up again. Relative paths are relative to the working directory. ``say`` gets progress
    lines (default: stderr).

    Raises InputError, one line, for a base that does not exist, has no tokenizer or config, is no causal LM, needs
    code that was not trusted, or cannot be run; KvoptError when no source of the built-in base can be reached.
    """
    from kvopt.base.flex import with_flex  # loads torch's compiler, which a tokenizer alone does not need
    from kvopt.base.merged import with_merged

    say, device, dtype = say or _to_stderr, choose_device(config.device), config.dtype
    torch_dtype = automatic_dtype(device) if dtype == "auto" else DTYPES[dtype]
    if warning := dtype_warning(device, torch_dtype, dtype == "auto"):
        say(f"warning: {warning}")
    with quiet():
        folder = locate(config.base, config.revision, say)
        settings = load_settings(folder, config)
        if config.shard is not None:
            from kvopt.base.sharding import check_sharding

            check_sharding(device, getattr(settings, "quantization_config", None) is not None)
        tokenizer = _load_tokenizer(folder, config)
        model = _load_model(folder, config, settings, torch_dtype, device)
    model.requires_grad_(False).eval()
    _check_vocabulary(model, tokenizer, config.base)
    shards = None
    if config.shard is not None:
        from kvopt.base.sharding import Shards  # loads torch.distributed

        shards = Shards(model, device)
    ids = _ordinary_ids(model, tokenizer)
    capability = with_flex(model, ids, probe(model, ids, config.base), config, say)
    with_merged(model, ids, capability, config)
    if config.gradient_checkpointing:
        enable_checkpointing(model)
    identity = _identity(folder, tokenizer, config)
    return Base(
        model,
        tokenizer,
        config.base,
        device,
        torch_dtype,
        capability.geometry,
        identity,
        capability,
        config.attention,
        shards,
    )


def _identity(folder: Path, tokenizer: Any, config: ModelConfig) -> dict[str, str | None]:
    identity = {
        "weights": weights_sha256(hub.weight_files(folder)),
        "config": config_sha256(folder),
        "tokenizer": tokenizer_sha256(tokenizer),
        "chat_template": chat_template_sha256(tokenizer),
        "source": source_of(folder),
    }
    if config.quantization is not None:
        identity["quantization"] = identity_of(config.quantization)
    return identity


@dataclass(frozen=True)
class StoredBase:
    """A base on disk, which nothing has to run: ``layers`` is how many decoder layers it has; the rest as in
    :class:`Base`.
    """

    name: str
    folder: Path
    tokenizer: Any
    identity: dict[str, str | None]
    layers: int

    @property
    def document(self) -> BaseIdentity:
        """Name and identity as documents hold them."""
        return BaseIdentity(name=self.name, **self.identity)


def stored_base(config: ModelConfig, *, say: Callable[[str], None] | None = None) -> StoredBase:
    """The files of ``config.base``, found, fetched and hashed, but not loaded. Raises InputError as :func:`load_base`
    does.
    """
    folder = locate(config.base, config.revision, say or _to_stderr)
    with quiet():
        settings, tokenizer = load_settings(folder, config), _load_tokenizer(folder, config)
    layers = text_config(settings).num_hidden_layers
    return StoredBase(config.base, folder, tokenizer, _identity(folder, tokenizer, config), layers)


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def load_tokenizer(config: ModelConfig, *, say: Callable[[str], None] | None = None) -> tuple[Any, int]:
    """The tokenizer of ``config.base`` and its context window in tokens, without its weights. Raises InputError as
    :func:`load_base` does."""
    folder = locate(config.base, config.revision, say or _to_stderr, weights=False)
    with quiet():
        if config.base == BUILTIN_BASE:  # known to work, and the class of its config takes seconds to import
            window = json.loads((folder / "config.json").read_text("utf-8"))["max_position_embeddings"]
            return PreTrainedTokenizerFast.from_pretrained(str(folder)), int(window)
        settings = load_settings(folder, config)
        check_implementation(config, settings)
        return _load_tokenizer(folder, config), context_window(text_config(settings))


def load_empty(
    config: ModelConfig, dtype: torch.dtype, *, say: Callable[[str], None] | None = None
) -> tuple[PreTrainedModel, Any]:
    """The model of ``config.base`` without weights, on torch's meta device, and its tokenizer; weights of a hub model
    are not fetched. Raises InputError as :func:`load_base` does.
    """
    from transformers import AutoModelForCausalLM  # takes seconds, and a tokenizer alone does not need it

    path = Path(config.base).expanduser()
    with quiet():
        if path.is_dir():  # config and tokenizer are enough
            folder = checked_folder(path, f"model.base {config.base}", weights=False)
        else:
            folder = locate(config.base, config.revision, say or _to_stderr, weights=False)
        settings, tokenizer = load_settings(folder, config), _load_tokenizer(folder, config)
        try:
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(
                    settings, dtype=dtype, attn_implementation="eager", trust_remote_code=config.trust_remote_code
                )
        except Exception as error:  # architectures fail in their own ways
            raise _fault(config, "cannot be built as a causal LM", error) from error
    return model.requires_grad_(False).eval(), tokenizer


def enable_checkpointing(model: PreTrainedModel) -> None:
    """Recompute each decoder layer in the backward pass, with a read-only cache and in eval mode.

    transformers checkpoints only layers in train mode; here only the layer's own flag is set, so dropout inside it
    stays off.
    """
    with warnings.catch_warnings():  # transformers 6 will know it by another name
        warnings.simplefilter("ignore", FutureWarning)
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for module in model.modules():
        if hasattr(module, "_can_checkpoint_with_cache"):
            module._can_checkpoint_with_cache = True
            module.training = True


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars of transformers inside."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def _fault(config: ModelConfig, what: str, error: BaseException) -> InputError:
    """The one-line error for what transformers raised while it read a folder."""
    text, where = " ".join(str(error).split()), f"model.base {config.base}"
    if "trust_remote_code" in text and not config.trust_remote_code:
        fix = "read that code, then set model.trust_remote_code: true"
        return InputError(
            "the model comes with Python code, which kvopt does not run unless you allow it",
            where=where,
            fix=fix,
        )
    return InputError(f"{what}: {type(error).__name__}: {text}", where=where)


def load_settings(folder: Path, config: ModelConfig) -> Any:
    """The transformers configuration of a base's folder, checked. Raises InputError as :func:`load_base` does."""
    try:
        settings = AutoConfig.from_pretrained(str(folder), trust_remote_code=config.trust_remote_code)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _fault(config, "its config.json cannot be used", error) from error
    check_config(settings, config.base)
    return settings


def _load_tokenizer(folder: Path, config: ModelConfig) -> Any:
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=config.trust_remote_code)
    except Exception as error:  # tokenizer files fail in many ways, and every one is the base's fault
        raise _fault(config, "its tokenizer cannot be loaded", error) from error
    if len(tokenizer) < 2:
        raise InputError("its tokenizer is empty", where=f"model.base {config.base}")
    return tokenizer


def _load_model(
    folder: Path, config: ModelConfig, settings: Any, dtype: torch.dtype, device: torch.device
) -> PreTrainedModel:
    """The model on its device. Weights go there tensor by tensor as they are read, so that no second copy of them ever
    stands in memory; with a quantization, each is packed on its way.
    """
    from transformers import AutoModelForCausalLM  # takes seconds, and a tokenizer alone does not need it

    attention = implementation(config, settings)
    method: Any = getattr(settings, "quantization_config", None) or {}
    wanted: dict[str, Any] = {}
    if config.quantization is not None:
        if method:
            raise InputError(
                f"the base is stored quantized already{_quantisation(method)}",
                where="model.quantization",
                fix="leave it out, or give the base that it was made of",
            )
        method = wanted["quantization_config"] = quantization_config(config.quantization, dtype)
    if (device.type != "cpu" and config.shard is None) or method:  # layers to be sharded go there one by one
        wanted["device_map"] = {"": str(device)}
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            str(folder),
            config=settings,
            dtype=dtype,
            attn_implementation=attention,
            trust_remote_code=config.trust_remote_code,
            output_loading_info=True,
            **wanted,
        )
    except Exception as error:  # a broken or unknown folder fails in as many ways as there are formats
        if is_out_of_memory(error):
            half = "" if config.quantization else "set model.quantization: nf4 (a quarter of 16-bit weights), or "
            raise KvoptError(
                f"model.base {config.base}: its weights do not fit the memory of {device_name(device)}; {half}use a"
                " smaller base or another model.device"
            ) from error
        if is_refusal(error) and config.attn_implementation not in ("auto", "eager"):
            raise refused(config, settings, reason(error)) from error
        what = f"cannot be loaded as a causal LM{_quantisation(method)}"
        raise _fault(config, what, error) from error
    if missing := sorted(info["missing_keys"]):
        what = f"its weights lack {len(missing)} tensors of a {type(model).__name__}, first {missing[0]}"
        raise InputError(what, where=f"model.base {config.base}", fix="is it a causal LM, and complete?")
    keep_gradients(model)
    return model


def _quantisation(method: Any) -> str:
    name = method.get("quant_method") if isinstance(method, dict) else getattr(method, "quant_method", None)
    return f" (quantised with {getattr(name, 'value', name)})" if name else ""


def _check_vocabulary(model: PreTrainedModel, tokenizer: Any, name: str) -> None:
    rows = model.get_input_embeddings().weight.shape[0]
    if (highest := max(tokenizer.get_vocab().values())) >= rows:
        what = f"its tokenizer has ids up to {highest}, but the model has {rows} embeddings"
        raise InputError(what, where=f"model.base {name}", fix="is it the tokenizer of this model?")


def _ordinary_ids(model: PreTrainedModel, tokenizer: Any) -> list[int]:
    """Five token ids that are neither special nor padding, spread over the vocabulary."""
    special, size = set(tokenizer.all_special_ids), min(len(tokenizer), text_config(model.config).vocab_size)
    spread = ((position * 7919 + size // 3) % size for position in range(size))
    return list(islice((token for token in spread if token not in special), 5))
