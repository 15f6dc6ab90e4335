"""Writes what the engine's check compares with: contexts exported for vLLM, prompts, and kvopt's own greedy answers.

    python -m tests.serving.expected OUT [--tokens 64 40 32] [--rows 4]

The contexts are the demo's template, compacted to so many slots without a step; one length fills no block of 16. Bodies
are those of validation rows. ``OUT/expected.json`` holds the base's folder, the exported folders, and for each request
the ids to send, the ids of the answer, and the log-probability of its first token; with a context also the user's
message of a chat. ``chat`` is a conversation without a context, and its ids.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from kvopt.base.builtin import builtin_folder
from kvopt.base.generate import generate
from kvopt.base.prefix import Prefix, run_bodies
from kvopt.config.document import load_config
from kvopt.export.writing import export
from kvopt.run.run import Run
from kvopt.task.seam import Row, make_batch

NEW_TOKENS = 24
DEMO = Path(__file__).parents[2] / "configs" / "demo.yaml"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--tokens", type=int, nargs="+", default=[64, 40, 32])
    parser.add_argument("--rows", type=int, default=4)
    options = parser.parse_args()
    learned = [{"name": f"kv-{n}", "tokens": n, "init": "matched", "steps": 0} for n in options.tokens]
    sets = ["model.dtype=float32", f"contexts={json.dumps(learned)}", "mutations={count: 0}"]
    config, base_dir = load_config(DEMO, sets)
    with Run(config, base_dir, options.out / "run").opened() as run:
        base, task = run.load_base(), run.task()
        contexts = run.learned()
        bodies = [row.body for row in task.bare_rows("validation").rows[: options.rows]]
        folders, requests = [], []
        for context in contexts:
            folder = options.out / context.name
            export(f"{options.out / 'run'}#{context.name}", "vllm", folder)
            folders.append(str(folder.resolve()))
            facts = json.loads((folder / "vllm.json").read_text("utf-8"))
            placeholders, after = facts["placeholder_ids"], facts["chat"]["after"]
            prefix = context.prefix(base)
            answers = generate(base, prefix, bodies, max_new_tokens=NEW_TOKENS, stop=frozenset())
            requests += [
                {"context": context.name, "prompt": [*placeholders, *body], "answer": list(answer)}
                | {"first_logprob": _first_logprob(base, prefix, body)}
                | {"message": base.tokenizer.decode(body).removesuffix(after)}
                for body, answer in zip(bodies, answers, strict=True)
            ]
        whole = task.original.prefix(base)
        answers = generate(base, whole, bodies, max_new_tokens=NEW_TOKENS, stop=frozenset())
        requests += [
            {"context": "original", "prompt": [*task.encoded.prefix, *body], "answer": list(answer)}
            | {"first_logprob": _first_logprob(base, whole, body)}
            for body, answer in zip(bodies, answers, strict=True)
        ]
        plain = [{"role": "user", "content": "Where is Bern?"}]
        ids = base.tokenizer.apply_chat_template(plain, add_generation_prompt=True, return_dict=False)
    chat = {"messages": plain, "ids": list(ids)}
    facts = {
        "chat": chat,
        "base": str(builtin_folder(print)),
        "contexts": folders,
        "new_tokens": NEW_TOKENS,
        "requests": requests,
    }
    (options.out / "expected.json").write_text(json.dumps(facts), "utf-8")
    print(f"{len(requests)} requests, {len(folders)} contexts: {options.out / 'expected.json'}")


def _first_logprob(base: object, prefix: Prefix, body: tuple[int, ...]) -> float:
    """The greedy first token's log-probability behind a body."""
    with torch.no_grad():
        hidden = run_bodies(base, prefix, make_batch([Row("r", body, (0,))], [0]))  # type: ignore[arg-type]
        logits = base.head.logits(hidden[0, len(body) - 1 : len(body)])  # type: ignore[attr-defined]
    return float(logits.float().log_softmax(-1).max())


if __name__ == "__main__":
    main()
