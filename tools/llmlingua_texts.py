"""Shortened texts by LLMLingua's causal mode, for tools/compare_shortening.py --texts.

It runs in an environment of its own, because llmlingua 0.2.2 needs transformers below 5:

    pip install torch==2.13.0 transformers==4.46.3 accelerate nltk tiktoken && pip install --no-deps llmlingua==0.2.2
    python tools/llmlingua_texts.py MODEL_FOLDER TEXT_FILE OUT.json

LLMLingua works through a text 200 tokens at a time and leaves a text that is shorter than that as it is, so smaller
windows are tried too: every rate from 0.05 to 0.95 with windows of 10, 20, 40 and 200 tokens. Its token counter, which
it would download, is replaced by the model's own tokenizer; it is used for a statistic alone.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main(model: str, source: str, out: str) -> None:
    import tiktoken
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast.from_pretrained(model)
    tiktoken.encoding_for_model = lambda name: tokenizer
    from llmlingua import prompt_compressor

    prompt_compressor.AutoTokenizer = PreTrainedTokenizerFast
    compressor = prompt_compressor.PromptCompressor(model, device_map="cpu", model_config={"trust_remote_code": False})
    text = Path(source).read_text("utf-8")
    texts = []
    for window in (10, 20, 40, 200):
        for rate in (step / 20 for step in range(1, 20)):
            result = compressor.compress_prompt(
                [text],
                rate=rate,
                iterative_size=window,
                use_context_level_filter=False,
                use_sentence_level_filter=False,
            )
            texts.append({"how": f"llmlingua, window {window}, rate {rate:g}", "text": result["compressed_prompt"]})
    Path(out).write_text(json.dumps(texts, ensure_ascii=False, indent=1), "utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
