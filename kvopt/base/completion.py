"""The base as a chat model: sampled completions for the local paraphraser."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from kvopt.base.devices import seeded
from kvopt.base.loading import Base
from kvopt.task.chat_template import ChatTemplate

Messages = list[dict[str, str]]


def local_completion(
    chat: ChatTemplate, base: Base, usage: dict[str, int] | None = None
) -> Callable[[Sequence[Messages], int, int, float], list[str]]:
    """``complete(prompts, seed, max_tokens, temperature)``: one sampled answer for each prompt, a function of its
    arguments alone.

    Args:
        chat: renders each prompt; without a chat template, contents are joined by newlines.
        base: the model that answers.
        usage: counters ``model_calls``, ``tokens_in``, ``tokens_out`` to add to.
    """

    def complete(prompts: Sequence[Messages], seed: int, max_tokens: int, temperature: float) -> list[str]:
        texts = [_text(chat, prompt) for prompt in prompts]
        encoded = [base.tokenizer(text, add_special_tokens=chat.source is None)["input_ids"] for text in texts]
        width, pad = max(map(len, encoded)), _pad_id(base)
        ids = torch.tensor([[pad] * (width - len(row)) + row for row in encoded], device=base.device)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in encoded], device=base.device)
        with seeded(base.device, seed), torch.no_grad():
            out = base.model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=max_tokens,
                do_sample=True,
                temperature=temperature,
                top_p=0.95,
                top_k=0,
                pad_token_id=pad,
            )
        answers = out[:, width:]
        if usage is not None:
            usage["model_calls"] += 1
            usage["tokens_in"] += int(mask.sum())
            usage["tokens_out"] += int((answers != pad).sum())
        return base.tokenizer.batch_decode(answers, skip_special_tokens=True)

    return complete


def _text(chat: ChatTemplate, prompt: Messages) -> str:
    if chat.source is None:
        return "\n".join(message["content"] for message in prompt) + "\n"
    return chat.render_own(prompt)


def _pad_id(base: Base) -> int:
    for token in (base.tokenizer.pad_token_id, base.tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    return 0
