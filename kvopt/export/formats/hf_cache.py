"""``--to hf-cache``: keys and values as safetensors, and a script of plain transformers that generates after them."""

from __future__ import annotations

from importlib import resources
from typing import TYPE_CHECKING, ClassVar, Literal

from kvopt.documents.export_record import ExportFacts
from kvopt.errors import counted
from kvopt.export.export_format import ExportFormat, Written, base_lines, ids_lines

if TYPE_CHECKING:
    from pathlib import Path

    from kvopt.export.source import Source

SNIPPET = """\
from generate import generate, load_prefix  # generate.py of this folder; it needs transformers alone
from transformers import AutoModelForCausalLM, AutoTokenizer

{base}
tokenizer = AutoTokenizer.from_pretrained(base)
model = AutoModelForCausalLM.from_pretrained(base).eval()
{ids}
for answer in generate(model, load_prefix(), [ids], max_new_tokens=64):
    print(tokenizer.decode(answer, skip_special_tokens=True))
"""


class CacheFormat(ExportFormat):
    """A KV prefix for plain transformers."""

    takes: ClassVar[tuple[str, ...]] = ("kv", "soft")
    rank: ClassVar[int] = 3
    kind: Literal["hf-cache"] = "hf-cache"

    def write(self, source: Source, place: Path) -> Written:
        """``prefix.safetensors`` (fp32) and ``generate.py``. A soft prompt is prefilled, which loads the base."""
        from kvopt.export.source import write_prefix
        from kvopt.storage.files import write_bytes

        states = source.states
        write_prefix(states, place)
        script = resources.files("kvopt.export.scripts") / "generate.py"
        write_bytes(place / "generate.py", script.read_bytes())
        return Written(
            summary=f"A KV prefix of {counted(states.shape[0], 'slot')} in {counted(states.shape[1], 'layer')}, and a"
            " script that uses it.",
            snippet=SNIPPET.format(base=base_lines(source.base_name), ids=ids_lines(source)),
            library="transformers",
            notes=(
                "`prefix.safetensors` holds `layers.i.keys` and `layers.i.values`, [heads, slots, head_dim], fp32; keys"
                " are rotated for positions 0 and up, so bodies start at the number of slots.",
                '`python generate.py --base MODEL --replaced N "prompt" "prompt"` answers whole prompts from a shell;'
                " N is how many ids of a prompt the context stands for.",
            ),
            facts=ExportFacts(layers=states.shape[1], kv_heads=states.shape[3], head_dim=states.shape[4]),
        )
