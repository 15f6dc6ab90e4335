"""``--to mlx``: keys and values as a prompt cache of mlx-lm (0.32 or later), and a script that answers after it.

The layout was read in ``mlx_lm.models.cache.save_prompt_cache`` 0.32.2; what 0.31 wrote is another one, and neither
version reads the other's.
"""

from __future__ import annotations

import json
from importlib import resources
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from kvopt.documents.export_record import ExportFacts
from kvopt.errors import InputError, counted
from kvopt.export.export_format import ExportFormat, Written, base_lines, ids_lines

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from kvopt.export.source import Source

FILE = "prompt_cache.safetensors"
SNIPPET = """\
from mlx_generate import generate, load_model  # mlx_generate.py of this folder; it needs mlx-lm alone
from transformers import AutoTokenizer

{base}
tokenizer = AutoTokenizer.from_pretrained(base)
{ids}
print(tokenizer.decode(generate(*load_model({model}), ids, max_tokens=64), skip_special_tokens=True))
"""


ROPE = (
    "The base's `config.json` is as transformers 5 writes it, with its RoPE under `rope_parameters`, where most models"
    " of mlx-lm 0.32 do not look: they then run with a RoPE of their own, with or without this cache. `load_model` of"
    " `mlx_generate.py` gives mlx-lm {} from `mlx.json`; for `mlx_lm.generate`, write it into the top of `config.json`."
)


class MlxFormat(ExportFormat):
    """A KV prefix for mlx-lm."""

    takes: ClassVar[tuple[str, ...]] = ("kv", "soft")
    rank: ClassVar[int] = 4
    kind: Literal["mlx"] = "mlx"
    dtype: Literal["float32", "float16", "bfloat16"] = Field("float32", description="of the stored keys and values")
    mlx_model: str | None = Field(
        None,
        description="what mlx_lm loads in place of the base, such as a conversion of the same weights; mlx_lm.generate"
        " refuses the cache under another name. Default: the base",
    )

    def write(self, source: Source, place: Path) -> Written:
        """``prompt_cache.safetensors`` and ``mlx_generate.py``. Raises InputError for a base with other than full
        attention, whose caches mlx-lm keeps in another form.
        """
        import torch
        from safetensors.torch import save

        from kvopt.base.loading import load_settings
        from kvopt.base.places import locate
        from kvopt.base.probe import layer_types, text_config
        from kvopt.config.model import BUILTIN_BASE, ModelConfig
        from kvopt.storage.files import write_bytes, write_json

        folder = locate(source.base_name, None, lambda line: None, weights=False)
        kinds = set(layer_types(text_config(load_settings(folder, ModelConfig(base=source.base_name)))))
        if other := sorted(kinds - {"full_attention"}):
            what = f"the base has layers of {other[0]}, for which mlx-lm keeps more than keys and values"
            raise InputError(what, where=source.base_name, fix="use --to hf-cache")
        converted = source.base_name == BUILTIN_BASE or source.base_name.lower().endswith(".gguf")
        model = self.mlx_model or (str(folder) if converted else source.base_name)
        states = source.states.to(getattr(torch, self.dtype))
        stored = save(cache_tensors(states), metadata=cache_metadata(states.shape[1], model))
        write_bytes(place / FILE, in_fixed_order(stored))
        script = resources.files("kvopt.export.scripts") / "mlx_generate.py"
        write_bytes(place / "mlx_generate.py", script.read_bytes())
        rope = rope_settings(json.loads((folder / "config.json").read_text("utf-8")))
        write_json(place / "mlx.json", {"model_config": rope})
        loaded = repr(self.mlx_model) if self.mlx_model else "base"
        return Written(
            summary=f"A prompt cache of {counted(states.shape[0], 'slot')} in {counted(states.shape[1], 'layer')} for"
            " mlx-lm (0.32 or later), and a script that uses it.",
            snippet=SNIPPET.format(base=base_lines(source.base_name), ids=ids_lines(source), model=loaded),
            library="mlx",
            notes=(
                f"`{FILE}` is what `mlx_lm.models.cache.load_prompt_cache` reads: keys, rotated for positions 0 and up,"
                " and values [1, heads, slots, head_dim] of each layer. A cache grows with what it reads: load a fresh"
                " one for each answer. mlx-lm before 0.32 has another format, which `mlx_generate.py` refuses by name.",
                '`python mlx_generate.py --model MODEL --replaced N "prompt"` answers whole prompts; N is how many ids'
                " of a prompt the context stands for.",
                f"`mlx_lm.generate --prompt-cache-file {FILE} --prompt TEXT` wants the model to be {model!r}, and"
                " feeds what the chat template puts from the user's text on, tokenized by itself: its answers are those"
                " of the whole prompt only where the context ends right before that text, and no token straddles the"
                " two.",
                *((ROPE.format(", ".join(rope)),) if rope else ()),
            ),
            facts=ExportFacts(layers=states.shape[1], kv_heads=states.shape[3], head_dim=states.shape[4]),
        )


def in_fixed_order(stored: bytes) -> bytes:
    """A safetensors file with its metadata sorted: the library writes several entries in no fixed order."""
    from kvopt.storage.tensors import FACTS, header_of

    length = int.from_bytes(stored[:8], "little")
    table = json.loads(stored[8 : 8 + length])
    table[FACTS] = dict(sorted(table[FACTS].items()))
    return header_of(table) + stored[8 + length :]


def rope_settings(config: dict[str, Any]) -> dict[str, Any]:
    """What a ``config.json`` says of RoPE under ``rope_parameters`` alone, as mlx-lm's models are told it."""
    nested = config.get("rope_parameters")
    if not isinstance(nested, dict) or "rope_theta" in config:
        return {}
    lifted = {name: nested[name] for name in ("rope_theta", "partial_rotary_factor") if name in nested}
    if (kind := nested.get("rope_type", "default")) != "default":
        lifted["rope_scaling"] = {**nested, "type": kind}
    return lifted


def cache_tensors(states: Tensor) -> dict[str, Tensor]:
    """States [T, L, 2, H, d] as mlx-lm names them: ``i.0`` keys and ``i.1`` values [1, H, T, d], ``i.2`` int32 T."""
    import torch
    from einops import rearrange

    tensors: dict[str, Tensor] = {}
    for layer in range(states.shape[1]):
        for part in (0, 1):
            tensors[f"{layer}.{part}"] = rearrange(states[:, layer, part], "t h d -> 1 h t d").contiguous()
        tensors[f"{layer}.2"] = torch.tensor(states.shape[0], dtype=torch.int32)
    return tensors


def cache_metadata(layers: int, model: str) -> dict[str, Any]:
    """Three flattened trees: the user's entries, each layer's class, and the tensors that stand for plain numbers."""
    metadata = {"0.model": model, "0.tokenizer_config": json.dumps({"trust_remote_code": None}), "2.0": ""}
    for layer in range(layers):
        metadata |= {f"1.{layer}": "KVCache", f"2.{layer + 1}.0": f"{layer}.2", f"2.{layer + 1}.1": "scalar"}
    return metadata
