"""``--to prompt-embeds``: a soft prompt as a tensor, as the base64 text that vLLM takes, and a script that joins it
with the rest of a prompt.

vLLM's ``--enable-prompt-embeds`` takes the whole prompt as one [tokens, hidden] tensor, base64 of ``torch.save``: under
``prompt_embeds`` for completions, as a content part ``{"type": "prompt_embeds", "data": …}`` for chat, where the
server's chat template is put around it (vLLM's documentation, features/prompt_embeds, and its example client at
41c5903d of the main branch; not run here).
"""

from __future__ import annotations

from importlib import resources
from typing import TYPE_CHECKING, ClassVar, Literal

from kvopt.documents.export_record import ExportFacts
from kvopt.export.export_format import ExportFormat, Written, base_lines, ids_lines

if TYPE_CHECKING:
    from pathlib import Path

    from kvopt.export.source import Source

PASSTHROUGH = "{% for message in messages %}{{ message['content'] }}{% endfor %}"

SNIPPET = """\
import torch
from prompt_embeds import load_soft_prompt, request, whole_prompt  # prompt_embeds.py of this folder
from transformers import AutoModelForCausalLM, AutoTokenizer

{base}
tokenizer = AutoTokenizer.from_pretrained(base)
model = AutoModelForCausalLM.from_pretrained(base).eval()
{ids}
embeddings = whole_prompt(load_soft_prompt(), model.get_input_embeddings(), ids)
to_post = request(base, embeddings, max_tokens=64, temperature=0.0)  # the JSON for vLLM's /v1/completions
answer = model.generate(  # the same, here
    inputs_embeds=embeddings[None].to(model.dtype),
    attention_mask=torch.ones(1, len(embeddings)),
    max_new_tokens=64,
    do_sample=False,
)
print(tokenizer.decode(answer[0], skip_special_tokens=True))
"""


class PromptEmbedsFormat(ExportFormat):
    """Input embeddings for vLLM."""

    takes: ClassVar[tuple[str, ...]] = ("soft",)
    rank: ClassVar[int] = 2
    kind: Literal["prompt-embeds"] = "prompt-embeds"

    def write(self, source: Source, place: Path) -> Written:
        """``soft_prompt.safetensors`` [T, D] fp32, ``soft_prompt.b64``, ``prompt_embeds.py``, ``passthrough.jinja``."""
        from safetensors.torch import save

        from kvopt.export.scripts.prompt_embeds import encode
        from kvopt.export.source import fp32
        from kvopt.storage.files import write_bytes, write_text

        tensor = fp32(source.tensor)
        write_bytes(place / "soft_prompt.safetensors", save({"soft_prompt": tensor}, metadata={"format": "pt"}))
        write_text(place / "soft_prompt.b64", encode(tensor))
        write_text(place / "passthrough.jinja", PASSTHROUGH)
        script = resources.files("kvopt.export.scripts") / "prompt_embeds.py"
        write_bytes(place / "prompt_embeds.py", script.read_bytes())
        return Written(
            summary=f"A soft prompt of {tensor.shape[0]} input embeddings of width {tensor.shape[1]}.",
            snippet=SNIPPET.format(base=base_lines(source.base_name), ids=ids_lines(source)),
            library="transformers",
            notes=(
                "Embeddings are in the space of `model.get_input_embeddings()(ids)` (Gemma's scale is in them).",
                "vLLM wants the whole prompt as embeddings: `soft_prompt.b64` alone is the prompt without its body;"
                " `prompt_embeds.py` joins both. vLLM refuses `echo` and `prompt_logprobs` with embeddings.",
                "The soft prompt stands for everything before the first slot, chat marks included. Use /v1/completions;"
                " for /v1/chat/completions serve with `--chat-template passthrough.jinja`, which adds nothing.",
            ),
            facts=ExportFacts(hidden_size=tensor.shape[1]),
        )
