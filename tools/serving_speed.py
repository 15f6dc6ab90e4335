"""Time to first token and tokens per second of a context against the whole template, both from vLLM's prefix cache.

    python tools/serving_speed.py FOLDER [--at 1 8 32] [--port 8123]

FOLDER is what ``python -m tests.serving.expected FOLDER`` wrote. Run it with the Python of vLLM's environment, on a
machine that does nothing else: it prints wall-clock times. Each prompt is asked for once before it is timed, so that
the prefix cache holds the template, and the context, as it does in a server that has run for a while. Bodies are those
of ``expected.json``, in turn, each with one more token of its own, so that none is cached whole.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "serving"))

from server import Server  # type: ignore[import-not-found]

NEW_TOKENS = 64


def timed(url: str, body: dict[str, Any]) -> tuple[float, float]:
    """Seconds to the first token and to the last of one streamed completion."""
    data = json.dumps(body | {"stream": True, "max_tokens": NEW_TOKENS, "ignore_eos": True, "temperature": 0.0})
    request = urllib.request.Request(url + "/v1/completions", data.encode(), {"Content-Type": "application/json"})
    start, first = time.perf_counter(), None
    with urllib.request.urlopen(request, timeout=3600) as answer:
        for line in answer:
            if line.startswith(b"data: {") and first is None:
                first = time.perf_counter() - start
    if first is None:
        raise RuntimeError("no token came")
    return first, time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--at", type=int, nargs="+", default=[1, 8, 32], help="requests at once")
    parser.add_argument("--port", type=int, default=8123)
    options = parser.parse_args()
    expected = json.loads((options.folder / "expected.json").read_text("utf-8"))
    contexts, base = expected["contexts"], expected["base"]
    names = [Path(contexts[0]).name, "original"]
    print("context | at once | first token, median s | tokens per s")
    with Server(Path(contexts[0]), contexts, base, options.port, options.folder / "speed.log") as server:
        if not server.started():
            raise SystemExit(f"the server ended: see {server.log}")
        extra = 100
        for at in options.at:
            for name in names:
                prompts = [request["prompt"] for request in expected["requests"] if request["context"] == name]
                for prompt in prompts:
                    timed(server.url, {"model": base, "prompt": prompt})
                bodies = [{"model": base, "prompt": [*prompts[i % len(prompts)], extra + i]} for i in range(at)]
                extra += at
                start = time.perf_counter()
                with ThreadPoolExecutor(at) as pool:
                    times = list(pool.map(lambda body: timed(server.url, body), bodies))
                whole = time.perf_counter() - start
                print(f"{name} | {at} | {median(first for first, _ in times):.3f} | {at * NEW_TOKENS / whole:.1f}")


if __name__ == "__main__":
    main()
