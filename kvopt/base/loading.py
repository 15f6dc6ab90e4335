"""Loading a base, the frozen causal LM that everything is measured on, from the built-in model, a hub id, a folder or
a GGUF file."""

from __future__ import annotations

import json
import re
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

from kvopt.base import builtin, hub
from kvopt.base.gguf import save_gguf_as_folder
from kvopt.base.identity import chat_template_sha256, config_sha256, tokenizer_sha256, weights_sha256
from kvopt.base.probe import Capability, Geometry, check_config, context_window, probe, text_config
from kvopt.base.rope import Rope
from kvopt.config.model import BUILTIN_BASE, ModelConfig
from kvopt.documents.part import BaseIdentity
from kvopt.errors import InputError
from kvopt.storage.files import sha256_file

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from kvopt.kernels import Head

HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
GGUF_LAYOUT = 2  # part of the folder's name; raise it when the conversion changes
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
            ``source``, where the built-in or a converted base came from (None otherwise).
        capability: what running it showed (head scale, softcap, how keys rotate, whether rows can be packed).
        attention: ``model.attention`` of the config: whether rows are packed or padded.
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


def load_base(config: ModelConfig, *, say: Callable[[str], None] | None = None) -> Base:
    """Load ``config.base``, check by running it that kvopt can work with it, and hash it.

    The built-in base and GGUF files are converted to bf16 safetensors in kvopt's cache on first use. Hub models that
    are cached are not looked up again. Relative paths are relative to the working directory. ``say`` gets progress
    lines (default: stderr).

    Raises InputError, one line, for a base that does not exist, has no tokenizer or config, is no causal LM, needs
    code that was not trusted, or cannot be run; KvoptError when no source of the built-in base can be reached.
    """
    from kvopt.base.flex import with_flex  # loads torch's compiler, which a tokenizer alone does not need

    device, dtype = choose_device(config.device), config.dtype
    torch_dtype = automatic_dtype(device) if dtype == "auto" else DTYPES[dtype]
    with quiet():
        folder = locate(config.base, config.revision, say or _to_stderr)
        settings = _load_config(folder, config)
        tokenizer = _load_tokenizer(folder, config)
        model = _load_model(folder, config, settings, torch_dtype).to(device)
    model.requires_grad_(False).eval()
    _check_vocabulary(model, tokenizer, config.base)
    ids = _ordinary_ids(model, tokenizer)
    capability = with_flex(model, ids, probe(model, ids, config.base), config, say or _to_stderr)
    if config.gradient_checkpointing:
        enable_checkpointing(model)
    identity = {
        "weights": weights_sha256(hub.weight_files(folder)),
        "config": config_sha256(folder),
        "tokenizer": tokenizer_sha256(tokenizer),
        "chat_template": chat_template_sha256(tokenizer),
        "source": _source(folder),
    }
    return Base(
        model, tokenizer, config.base, device, torch_dtype, capability.geometry, identity, capability, config.attention
    )


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
        settings = text_config(_load_config(folder, config))
        return _load_tokenizer(folder, config), context_window(settings)


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
            folder = _checked_folder(path, f"model.base {config.base}", weights=False)
        else:
            folder = locate(config.base, config.revision, say or _to_stderr, weights=False)
        settings, tokenizer = _load_config(folder, config), _load_tokenizer(folder, config)
        try:
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(
                    settings, dtype=dtype, attn_implementation="eager", trust_remote_code=config.trust_remote_code
                )
        except Exception as error:  # architectures fail in their own ways
            raise _fault(config, "cannot be built as a causal LM", error) from error
    return model.requires_grad_(False).eval(), tokenizer


def locate(base: str, revision: str | None, say: Callable[[str], None], *, weights: bool = True) -> Path:
    """The local folder with the config, tokenizer and weights of ``base``, fetched or converted if need be; without
    ``weights``, those of a hub model are not fetched. Raises InputError."""
    if base == BUILTIN_BASE:
        return builtin.builtin_folder(say)
    path, where = Path(base).expanduser(), f"model.base {base}"
    if base.lower().endswith(".gguf"):
        if not path.is_file():
            raise InputError(f"no such GGUF file: {path.resolve()}", where=where)
        return _converted(path, say)
    if path.is_dir():
        return _checked_folder(path, where)
    if path.exists():
        raise InputError("is a file; a base is a model folder, a hub id or a .gguf file", where=where)
    if base.startswith((".", "/", "~")) or not HUB_ID.fullmatch(base):
        raise InputError(
            f"no such folder: {path.resolve()}", where=where, fix=f"give a model folder, a hub id or {BUILTIN_BASE}"
        )
    return _checked_folder(hub.snapshot(base, revision, weights=weights), where, weights=weights)


def _checked_folder(folder: Path, where: str, *, weights: bool = True) -> Path:
    if not (folder / "config.json").is_file():
        fix = "an adapter or context folder is not a base; give the model that it belongs to"
        raise InputError("the folder has no config.json", where=where, fix=fix)
    if not hub.has_tokenizer(folder):
        raise InputError("the base has no tokenizer", where=where, fix="save its tokenizer into the folder")
    if weights and not hub.weight_files(folder):
        raise InputError("the folder has no weights (*.safetensors or pytorch_model*.bin)", where=where)
    if (folder / "adapter_config.json").is_file():  # transformers would put the adapter on top of the weights
        raise InputError(
            "the folder holds a whole model and an adapter (adapter_config.json), which would be applied to it",
            where=where,
            fix="move the adapter_* files away if they are merged, else merge them first",
        )
    return folder


def _converted(file: Path, say: Callable[[str], None]) -> Path:
    digest = sha256_file(file)
    folder = hub.cache_folder() / "bases" / f"gguf-{digest[:32]}-v{GGUF_LAYOUT}"
    if (folder / "source.json").is_file():
        return folder
    with hub.locked(folder):
        if not (folder / "source.json").is_file():
            say(f"converting {file.name} to bf16 safetensors (once)")
            save_gguf_as_folder(file, folder, {"source": f"gguf:{digest}"})
    return folder


def _source(folder: Path) -> str | None:
    file = folder / "source.json"
    return json.loads(file.read_text(encoding="utf-8"))["source"] if file.is_file() else None


def choose_device(name: str) -> torch.device:
    """The torch device of ``name``, or the best one for "auto". Raises InputError for one that is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0][:200]
        raise InputError(f"cannot be used: {reason}", where=f"model.device {name}", fix="use auto or cpu") from error
    return device


def automatic_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the hardware multiplies in it, else float32."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    fast = device.type == "cpu" and any(getattr(torch.cpu, name, lambda: False)() for name in names)
    return torch.bfloat16 if fast else torch.float32


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


def _load_config(folder: Path, config: ModelConfig) -> Any:
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


def _load_model(folder: Path, config: ModelConfig, settings: Any, dtype: torch.dtype) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM  # takes seconds, and a tokenizer alone does not need it

    method = (getattr(settings, "quantization_config", None) or {}) if not isinstance(settings, dict) else {}
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            str(folder),
            config=settings,
            dtype=dtype,
            attn_implementation=_attention(config, settings),
            trust_remote_code=config.trust_remote_code,
            output_loading_info=True,
        )
    except Exception as error:  # a broken or unknown folder fails in as many ways as there are formats
        if "attn_implementation" in str(error) and config.attn_implementation != "auto":
            raise InputError(
                f"{type(settings).__name__.removesuffix('Config')} cannot be computed with this attention",
                where=f"model.attn_implementation {config.attn_implementation}",
                fix="set model.attn_implementation: eager, or auto",
            ) from error
        what = f"cannot be loaded as a causal LM{_quantisation(method)}"
        raise _fault(config, what, error) from error
    if missing := sorted(info["missing_keys"]):
        what = f"its weights lack {len(missing)} tensors of a {type(model).__name__}, first {missing[0]}"
        raise InputError(what, where=f"model.base {config.base}", fix="is it a causal LM, and complete?")
    return model


def _attention(config: ModelConfig, settings: Any) -> str | None:
    """What transformers is asked for; None leaves it the choice, which is sdpa for the models that can and eager for
    those that cannot (attention sinks). A softcap of the attention's logits is in eager alone.
    """
    if config.attn_implementation != "auto":
        return config.attn_implementation
    return "eager" if getattr(text_config(settings), "attn_logit_softcapping", None) else None


def _quantisation(method: Any) -> str:
    name = method.get("quant_method") if isinstance(method, dict) else getattr(method, "quant_method", None)
    return f" (quantised with {name})" if name else ""


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
