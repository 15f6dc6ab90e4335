"""Join a soft prompt with the embeddings of what follows it, and make the request body that vLLM takes.

    vllm serve MODEL --enable-prompt-embeds
    python prompt_embeds.py --base MODEL --replaced N "a whole prompt" > request.json
    curl -s localhost:8000/v1/completions -H "Content-Type: application/json" -d @request.json

N is how many ids at the start of a prompt the soft prompt stands for, as README.md says; the prompt is cut as ids,
because text that is cut there can have other ids.

vLLM takes the embeddings of the whole prompt, one [tokens, hidden] tensor, as the base64 text of ``torch.save``. The
completions endpoint feeds them as they are. The chat endpoint puts its chat template around a ``prompt_embeds`` part,
and the soft prompt already stands for that text: serve with ``--chat-template passthrough.jinja`` (beside this file)
there. Needs torch, safetensors and transformers only.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

FOLDER = Path(__file__).resolve().parent


def load_soft_prompt(folder: Path | str = FOLDER) -> torch.Tensor:
    """The soft prompt [slots, hidden], in the space of ``model.get_input_embeddings()(ids)``."""
    return load_file(Path(folder) / "soft_prompt.safetensors")["soft_prompt"]


@torch.no_grad()
def whole_prompt(soft_prompt: torch.Tensor, embed: Any, body: list[int]) -> torch.Tensor:
    """Embeddings [slots + tokens, hidden] of the soft prompt and of a body's token ids after it, in the wider of their
    dtypes: a 16-bit base does not round a soft prompt here. A server rounds it to the dtype that it computes in.
    """
    rest = embed(torch.tensor(body, device=embed.weight.device))
    dtype = torch.promote_types(soft_prompt.dtype, rest.dtype)
    return torch.cat([soft_prompt.to(rest.device, dtype), rest.to(dtype)])


def encode(embeddings: torch.Tensor) -> str:
    """The base64 text that vLLM reads (with ``torch.load(..., weights_only=True)``)."""
    buffer = io.BytesIO()
    torch.save(embeddings.detach().cpu().contiguous(), buffer)
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def decode(text: str) -> torch.Tensor:
    """The inverse of :func:`encode`."""
    return torch.load(io.BytesIO(base64.b64decode(text)), map_location="cpu", weights_only=True)


def request(model: str, embeddings: torch.Tensor, endpoint: str = "completions", **options: Any) -> dict:
    """The JSON body for ``/v1/completions`` or ``/v1/chat/completions``; ``options`` are sampling parameters."""
    if endpoint == "chat":
        part = {"type": "prompt_embeds", "data": encode(embeddings)}
        return {"model": model, "messages": [{"role": "user", "content": [part]}], **options}
    return {"model": model, "prompt_embeds": encode(embeddings), **options}


def main() -> None:
    parser = argparse.ArgumentParser(description="Print a vLLM request with a soft prompt in it.")
    parser.add_argument("prompt", help="a whole prompt, chat marks included")
    parser.add_argument("--replaced", type=int, required=True, help="ids of a prompt that the soft prompt stands for")
    parser.add_argument("--special-tokens", action="store_true", help="let the tokenizer add its own (BOS)")
    parser.add_argument("--base", required=True, help="the model that the soft prompt was made for")
    parser.add_argument("--served-as", help="the name that the server gives the model (default: as --base)")
    parser.add_argument("--endpoint", choices=("completions", "chat"), default="completions")
    parser.add_argument("--max-tokens", type=int, default=64)
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.base)
    embed = AutoModelForCausalLM.from_pretrained(args.base).get_input_embeddings()
    body = tokenizer(args.prompt, add_special_tokens=args.special_tokens)["input_ids"][args.replaced :]
    embeddings = whole_prompt(load_soft_prompt(), embed, body)
    name = args.served_as or args.base
    print(json.dumps(request(name, embeddings, args.endpoint, max_tokens=args.max_tokens, temperature=0.0)))


if __name__ == "__main__":
    main()
