"""Writes configs/snips-long.yaml: the template of configs/snips.yaml with 40 worked examples in it, some 2,500 tokens.

    python tools/make_long_template.py ../shared/data/snips/train.jsonl

The examples are the last rows of the training file, so many of each intent as of any other; the config's limit keeps
them out of the rows that are learned on.
"""

from __future__ import annotations

import json
import sys
from itertools import zip_longest
from pathlib import Path
from typing import Any

import yaml

EXAMPLES = 40
CONFIGS = Path(__file__).resolve().parents[1] / "configs"
HEAD = (
    "# configs/snips.yaml with 40 worked examples in the template (tools/make_long_template.py): how short can a long"
    " prompt get?\n"
)


class _Block(yaml.SafeDumper):
    """Writes text of several lines as it is."""


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Block.add_representer(str, _text)


def main(source: str) -> None:
    rows = [json.loads(line) for line in Path(source).read_text("utf-8").splitlines()][::-1]
    by_intent: dict[str, list[dict[str, str]]] = {}
    for row in rows:
        by_intent.setdefault(json.loads(row["output"])["intent"], []).append(row)
    mixed = [row for group in zip_longest(*(by_intent[name] for name in sorted(by_intent))) for row in group if row]
    shown = "\n\n".join(f"Request: {row['utterance']}\n{row['output']}" for row in mixed[:EXAMPLES])
    config: dict[str, Any] = yaml.safe_load((CONFIGS / "snips.yaml").read_text("utf-8"))
    system = config["template"]["messages"][0]
    system["content"] = system["content"].rstrip() + f"\n\n## Examples\n\n{shown}\n"
    config["name"] = "snips-long"
    config["data"]["limit"] = {"train": 256, "selection": 16, "validation": 32}
    config["mutations"] = {"count": 0}
    config["contexts"] = [
        {"name": f"kv-{tokens}", "kind": "kv", "tokens": tokens, "init": "matched", "steps": 0}
        for tokens in (1024, 256, 64)
    ]
    config["report"] = {"examples": 0}
    config.pop("evaluate")
    body = yaml.dump(config, Dumper=_Block, sort_keys=False, allow_unicode=True, width=120)
    (CONFIGS / "snips-long.yaml").write_text(HEAD + body, "utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
