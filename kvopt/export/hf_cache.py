"""``--to hf-cache``: keys and values as safetensors, and a script of plain transformers that generates behind them."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from safetensors.torch import save
from torch import Tensor

from kvopt.documents.export_record import ExportFacts
from kvopt.export.exporter import Options, Written, base_lines, body_line
from kvopt.export.source import Source, fp32
from kvopt.storage.files import write_bytes

SNIPPET = """\
from generate import generate, load_prefix  # generate.py of this folder; it needs transformers alone
from transformers import AutoModelForCausalLM, AutoTokenizer

{base}
tokenizer = AutoTokenizer.from_pretrained(base)
model = AutoModelForCausalLM.from_pretrained(base).eval()
{body}
bodies = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in [body]]
for answer in generate(model, load_prefix(), bodies, max_new_tokens=64):
    print(tokenizer.decode(answer, skip_special_tokens=True))
"""


def write(source: Source, place: Path, options: Options) -> Written:
    """``prefix.safetensors`` (fp32) and ``generate.py``. A soft prompt is prefilled, which loads the base."""
    states = source.states
    write_prefix(states, place)
    script = resources.files("kvopt.export.scripts") / "generate.py"
    write_bytes(place / "generate.py", script.read_bytes())
    return Written(
        summary=f"A KV prefix of {states.shape[0]} slots in {states.shape[1]} layers, and a script that uses it.",
        snippet=SNIPPET.format(base=base_lines(source.base_name), body=body_line(source)),
        library="transformers",
        notes=(
            "`prefix.safetensors` holds `layers.i.keys` and `layers.i.values`, [heads, slots, head_dim], fp32; keys are"
            " rotated for positions 0 and up, so bodies start at the number of slots.",
            '`python generate.py --base MODEL "text" "text"` answers from a shell.',
        ),
        facts=ExportFacts(layers=states.shape[1], kv_heads=states.shape[3], head_dim=states.shape[4]),
    )


def write_prefix(states: Tensor, place: Path) -> None:
    """``prefix.safetensors`` of states [T, L, 2, H, d]: ``layers.i.keys`` and ``layers.i.values`` [H, T, d] in fp32."""
    tensors = {}
    for layer in range(states.shape[1]):
        tensors[f"layers.{layer}.keys"] = fp32(states[:, layer, 0].transpose(0, 1))
        tensors[f"layers.{layer}.values"] = fp32(states[:, layer, 1].transpose(0, 1))
    write_bytes(place / "prefix.safetensors", save(tensors, metadata={"format": "pt"}))
