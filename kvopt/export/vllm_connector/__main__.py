"""Prints the chat template of a server: ``python -m kvopt_vllm_connector --base MODEL FOLDER … > chat.jinja``."""

from __future__ import annotations

import argparse
import sys

from .chat import chat_template
from .stored_context import open_contexts


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m kvopt_vllm_connector", description="Print a chat template.")
    parser.add_argument("contexts", nargs="+", metavar="FOLDER | NAME=FOLDER", help="as given to the server")
    parser.add_argument("--base", required=True, help="the model that is served")
    options = parser.parse_args()
    from transformers import AutoTokenizer

    try:
        original = AutoTokenizer.from_pretrained(options.base).chat_template
        if isinstance(original, dict):
            original = original.get("default")
        named = all("=" in context for context in options.contexts)
        pairs = dict(context.split("=", 1) for context in options.contexts) if named else options.contexts
        print(chat_template(open_contexts(pairs), original))
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
