"""Asks a real vLLM, in process, for what ``expected.json`` holds; needs vLLM and not kvopt.

    python engine.py FOLDER [--block-size 128]

All contexts and the plain prompt go into one batch, then once more (from vLLM's own prefix cache). Greedy answers must
be the same ids; the first token's log-probability must agree to 1e-3. The exit code is 1 where they do not.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

LOGPROB_TOLERANCE = 1e-3


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--block-size", type=int)
    parser.add_argument("--max-model-len", type=int, default=1024)
    options = parser.parse_args()
    expected = json.loads((options.folder / "expected.json").read_text("utf-8"))
    connector = expected["contexts"][0]
    sys.path.insert(0, connector)
    os.environ["PYTHONPATH"] = os.pathsep.join([connector, os.environ.get("PYTHONPATH", "")])
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    from vllm import LLM, SamplingParams  # type: ignore[import-not-found]
    from vllm.config import KVTransferConfig  # type: ignore[import-not-found]

    settings: dict[str, Any] = {"block_size": options.block_size} if options.block_size else {}
    engine = LLM(
        model=expected["base"],
        dtype="float32",
        max_model_len=options.max_model_len,
        enforce_eager=True,
        kv_transfer_config=KVTransferConfig(
            kv_connector="KvoptConnector",
            kv_role="kv_consumer",
            kv_connector_module_path="kvopt_vllm_connector",
            kv_connector_extra_config={"contexts": expected["contexts"]},
        ),
        **settings,
    )
    sampling = SamplingParams(temperature=0.0, max_tokens=expected["new_tokens"], ignore_eos=True, logprobs=1)
    prompts = [{"prompt_token_ids": request["prompt"]} for request in expected["requests"]]
    wrong = 0
    for again in (False, True):
        for request, output in zip(expected["requests"], engine.generate(prompts, sampling), strict=True):
            answer = output.outputs[0]
            first = answer.logprobs[0][answer.token_ids[0]].logprob
            same = list(answer.token_ids) == request["answer"]
            near = abs(first - request["first_logprob"]) <= LOGPROB_TOLERANCE
            wrong += not (same and near)
            differs = f"first log-probability off by {abs(first - request['first_logprob']):.1e}"
            said = "same ids" if same else f"OTHER IDS {list(answer.token_ids)} for {request['answer']}"
            print(f"{request['context']}{' again' if again else ''}: {said}, {differs}", flush=True)
    print(f"{2 * len(prompts) - wrong} of {2 * len(prompts)} answers are kvopt's")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
