"""Asks a real ``vllm serve``, started by the exported README's own commands; needs vLLM and not kvopt.

    python server.py FOLDER [--port 8123]

Three contexts and none are asked for at once, through completions and through chat completions; greedy answers must be
the ids of ``expected.json``. Then every misuse must be an error, and the next request right again. Last, another base
must not start. The exit code is 1 where anything differs.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

START_SECONDS = 900
FLAGS = "--dtype float32 --max-model-len 1024 --enforce-eager"


def commands(folder: Path, contexts: list[str], base: str, flags: str) -> tuple[str, str]:
    """The README's commands that write the chat template and start the server, for all contexts and this base."""
    (shell,) = re.findall(r"```sh\n(.*?)```", (folder / "README.md").read_text("utf-8"), flags=re.S)
    template, serve, _ = re.split(r"(?m)^(?=PYTHONPATH=|curl )", shell)
    template = template.replace("MODEL", base).replace(" . >", f" {' '.join(contexts)} >")
    serve = serve.replace("MODEL", base).replace('["."]', json.dumps(contexts))
    assert all(c in template and c in serve for c in contexts), "the README has other commands than this test knows"
    return template, f"{serve.strip()} {flags}"


class Server:
    """A running ``vllm serve``, stopped at the end of a ``with``; what it says goes into a log file."""

    def __init__(self, folder: Path, contexts: list[str], base: str, port: int, log: Path) -> None:
        template, serve = commands(folder, contexts, base, f"{FLAGS} --port {port}")
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        environment = {"VLLM_CPU_KVCACHE_SPACE": "1"} | os.environ | {"PATH": path}
        subprocess.run(template, shell=True, check=True, cwd=folder, env=environment)
        self.url, self.log = f"http://127.0.0.1:{port}", log
        with log.open("wb") as out:
            self.process = subprocess.Popen(
                "exec env " + serve, shell=True, cwd=folder, env=environment, stdout=out, stderr=subprocess.STDOUT
            )

    def started(self) -> bool:
        """Whether it answers, waited for; False where it ended."""
        for _ in range(START_SECONDS):
            if self.process.poll() is not None:
                return False
            try:
                urllib.request.urlopen(self.url + "/health", timeout=5).read()
                return True
            except OSError:
                time.sleep(1)
        raise TimeoutError(f"no answer after {START_SECONDS} s: see {self.log}")

    def ask(self, path: str, **body: Any) -> tuple[int, dict[str, Any]]:
        """Status and answer of one request."""
        data = json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=600) as answer:
                return answer.status, json.loads(answer.read())
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read())

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *error: object) -> None:
        self.process.terminate()
        self.process.wait(timeout=60)


class Check:
    """Counts what is right and prints what is not."""

    def __init__(self) -> None:
        self.right = self.wrong = 0

    def __call__(self, what: str, holds: bool, seen: object) -> None:
        self.right += holds
        self.wrong += not holds
        print(f"{what}: {'right' if holds else f'WRONG: {seen}'}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--port", type=int, default=8123)
    options = parser.parse_args()
    expected = json.loads((options.folder / "expected.json").read_text("utf-8"))
    contexts, base = expected["contexts"], expected["base"]
    check, first = Check(), Path(contexts[0])
    with Server(first, contexts, base, options.port, options.folder / "server.log") as server:
        if not server.started():
            print(f"the server ended: see {server.log}")
            return 1
        settings = {"model": base, "temperature": 0.0, "max_tokens": expected["new_tokens"], "ignore_eos": True}
        settings |= {"return_token_ids": True}
        answers(server, check, settings, expected)
        misuse(server, check, settings, expected)
    other = options.folder / "other-base"
    shutil.rmtree(other, ignore_errors=True)
    shutil.copytree(base, other)
    config = json.loads((other / "config.json").read_text("utf-8"))
    (other / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}), "utf-8")
    with Server(first, contexts, str(other), options.port, options.folder / "other-base.log") as server:
        started = server.started()
        said = "was made for another base than" in server.log.read_text("utf-8", "replace")
        check("another base does not start, and the log says why", not started and said, (started, said))
    print(f"{check.right} of {check.right + check.wrong} right")
    return int(check.wrong > 0)


def answers(server: Server, check: Check, settings: dict[str, Any], expected: dict[str, Any]) -> None:
    """All requests at once, then once more from vLLM's own prefix cache, then all contexts through chat."""
    requests = expected["requests"]
    for again in ("", ", again"):
        with ThreadPoolExecutor(len(requests)) as pool:
            given = list(pool.map(lambda r: server.ask("/v1/completions", prompt=r["prompt"], **settings), requests))
        for request, (status, answer) in zip(requests, given, strict=True):
            check(f"{request['context']}{again}", _ids(status, answer) == request["answer"], answer)
    chats = [request for request in requests if "message" in request]
    with ThreadPoolExecutor(len(chats)) as pool:
        given = list(pool.map(lambda r: server.ask("/v1/chat/completions", **_chat(r), **settings), chats))
    for request, (status, answer) in zip(chats, given, strict=True):
        _, tokenized = server.ask("/tokenize", model=settings["model"], **_chat(request, xargs=False))
        check(f"{request['context']}, chat ids", tokenized.get("tokens") == request["prompt"], tokenized)
        check(f"{request['context']}, chat", _ids(status, answer) == request["answer"], answer)
    plain = expected["chat"]
    _, tokenized = server.ask("/tokenize", model=settings["model"], messages=plain["messages"])
    check("a chat without a context has the base's own template", tokenized.get("tokens") == plain["ids"], tokenized)


def misuse(server: Server, check: Check, settings: dict[str, Any], expected: dict[str, Any]) -> None:
    """What must be an error, each followed by a right request; what is harmless must be right."""
    request = expected["requests"][0]
    other = next(r for r in expected["requests"] if r["context"] not in (request["context"], "original"))
    name, prompt = request["context"], request["prompt"]
    facts = json.loads((Path(expected["contexts"][0]) / "vllm.json").read_text("utf-8"))
    ids, text = facts["placeholder_ids"], facts["placeholder_text"]
    body = request["message"] + facts["chat"]["after"]
    refused: dict[str, Callable[[], tuple[int, dict[str, Any]]]] = {
        "prompt_logprobs": lambda: complete(prompt=prompt, prompt_logprobs=1),
        "echo with logprobs": lambda: complete(prompt=prompt, echo=True, logprobs=1),
        "placeholders alone": lambda: complete(prompt=ids),
        "a BOS before them": lambda: complete(prompt=[ids[-1], *prompt]),
        "a placeholder that became another": lambda: complete(prompt=[*ids[:20], ids[20] + 1, *prompt[21:]]),
        "a context that is not here": lambda: complete(prompt=prompt, vllm_xargs={"kvopt": "kv-99"}),
        "another context than the named": lambda: complete(prompt=prompt, vllm_xargs={"kvopt": other["context"]}),
        "a named context without placeholders": lambda: complete(prompt=[5, 6, 7], vllm_xargs={"kvopt": name}),
        "a chat with a context that is not here": lambda: chat(chat_template_kwargs={"kvopt": "kv-99"}),
        "a chat with two messages": lambda: chat(messages=_chat(request)["messages"] * 2),
    }

    def complete(**body: Any) -> tuple[int, dict[str, Any]]:
        return server.ask("/v1/completions", **settings | body)

    def chat(**body: Any) -> tuple[int, dict[str, Any]]:
        return server.ask("/v1/chat/completions", **settings | _chat(request) | body)

    for what, send in refused.items():
        status, answer = send()
        check(f"{what} is an error", status >= 400 and "choices" not in answer, (status, answer))
        status, answer = complete(prompt=prompt)
        check("and the next request is right", _ids(status, answer) == request["answer"], answer)
    status, answer = complete(prompt=text + body)
    check("placeholders as text", _ids(status, answer) == request["answer"], answer)
    _, plain = complete(prompt=prompt)
    status, answer = complete(prompt=prompt, echo=True, return_token_ids=False)
    said = answer["choices"][0]["text"] if status == 200 else ""
    right = said.strip().startswith(text.strip()[:30]) and said.endswith(plain["choices"][0]["text"])
    check("echo alone gives the placeholders' text before the answer", right, answer)


def _chat(request: dict[str, Any], xargs: bool = True) -> dict[str, Any]:
    body: dict[str, Any] = {"messages": [{"role": "user", "content": request["message"]}]}
    body |= {"chat_template_kwargs": {"kvopt": request["context"]}}
    return body | ({"vllm_xargs": {"kvopt": request["context"]}} if xargs else {})


def _ids(status: int, answer: dict[str, Any]) -> list[int] | None:
    return answer["choices"][0]["token_ids"] if status == 200 else None


if __name__ == "__main__":
    sys.exit(main())
