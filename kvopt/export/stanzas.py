"""The page beside exported rows: what to write into TRL, axolotl, LLaMA-Factory and unsloth to train on them."""

from __future__ import annotations

import json
from collections.abc import Sequence

from kvopt.config.model import BUILTIN_BASE

EXACT = "The trainer takes these ids and labels as they are: they are those that `kvopt train` trains on."
RENDERED = (
    "The trainer renders and tokenizes these rows with its own chat template, so tokens at the seam can differ from"
    " those of `kvopt train`: `kvopt export-data … --verify trl` says where."
)
ABOUT = {
    "tokens": EXACT,
    "text": "Prompts are rendered already and end where the output begins; the output has its end token. TRL masks the"
    " prompt, since the rows have `prompt` and `completion`.",
    "messages": f"{RENDERED}\n\n**TRL trains on whole messages, the prompt too**, unless `assistant_only_loss=True`,"
    " which needs a chat template that marks the assistant's part. `--format prompt-completion` trains on the"
    " completion alone.",
    "prompt-completion": f"{RENDERED} TRL masks the prompt, since the rows have `prompt` and `completion`.",
    "sharegpt": f"{RENDERED}\n\nTRL takes `human` and `gpt` as names of roles, which few chat templates know, and"
    " trains on the prompt too: for TRL, use another format.",
    "alpaca": f"{RENDERED} TRL has no reader for these rows.",
}
INSTEAD = dict.fromkeys(("TRL", "axolotl", "unsloth"), "tokens") | {"LLaMA-Factory": "messages"}
MESSAGE_KEYS = {"messages": ("messages", "role", "content"), "sharegpt": ("conversations", "from", "value")}


def guide(format: str, file: str, base: str, eos: str | None, adapters: Sequence[str] = ()) -> str:
    """The page, in Markdown.

    Args:
        format: of the rows in ``file``.
        base: the model's name.
        eos: the end token where it is not the tokenizer's EOS; TRL would put that behind it.
        adapters: folders beside the file with learned contexts.
    """
    if base == BUILTIN_BASE or base.endswith(".gguf"):
        base = "MODEL"  # what from_pretrained does not find by that name
    parts = [f"# How to train on {file}\n\nRows in the format `{format}`. {ABOUT[format]}"]
    parts += [_section("TRL", "python", _trl(format, file, base, eos))]
    parts += [_section("axolotl", "yaml", _axolotl(format, file, base, eos))]
    parts += [_section("LLaMA-Factory", "json", _llama_factory(format, file))]
    parts += [_section("unsloth", "python", _unsloth(format, file, base, eos))]
    if adapters:
        names = ", ".join(f"`{name}/`" for name in adapters)
        what = (
            "A learned context has no rows. These folders are PEFT adapters, which are part of a prompt, not of weights"
        )
        parts.append(f"## Learned contexts\n\n{what}: {names}. Only `kvopt train` trains a student under them.")
    return "\n\n".join(parts) + "\n"


def _section(name: str, language: str, lines: str | None) -> str:
    if lines is None:
        return f"## {name}\n\nIt does not read this format; use `--format {INSTEAD[name]}`."
    return f"## {name}\n\n```{language}\n{lines}\n```"


def _trl(format: str, file: str, base: str, eos: str | None) -> str | None:
    if format in ("alpaca", "sharegpt"):
        return None
    options = "max_length=None"
    options += f", eos_token={eos!r}" if eos and format == "text" else ""
    options += ", assistant_only_loss=True" if format == "messages" else ""
    return (
        "from datasets import load_dataset\nfrom trl import SFTConfig, SFTTrainer\n\n"
        f'rows = load_dataset("json", data_files={file!r}, split="train")\n'
        f'settings = SFTConfig("student", {options})  # its own max_length cuts rows at 1,024 tokens\n'
        f"SFTTrainer(model={base!r}, args=settings, train_dataset=rows).train()"
    )


def _axolotl(format: str, file: str, base: str, eos: str | None) -> str | None:
    lines = [f"base_model: {json.dumps(base)}", "datasets:", f"  - path: {file}", "    ds_type: json"]
    if format == "tokens":
        return "\n".join([*lines, "    type:  # empty: the rows are tokenized"])
    if format == "alpaca":
        return "\n".join([*lines, "    type: alpaca  # its own prompt around the instruction, not the chat template"])
    if format not in MESSAGE_KEYS:
        return None
    field, role, content = MESSAGE_KEYS[format]
    lines += ["    type: chat_template", f"    field_messages: {field}", "    message_property_mappings:"]
    lines += [f"      role: {role}", f"      content: {content}", "    roles_to_train: [assistant]"]
    return "\n".join([*lines, "train_on_inputs: false"])


def _llama_factory(format: str, file: str) -> str | None:
    entry: dict[str, object] = {"file_name": file}
    if format == "alpaca":
        columns = ("instruction", "input", "output", "system", "history")
        entry["columns"] = dict(zip(("prompt", "query", "response", "system", "history"), columns, strict=True))
    elif format in MESSAGE_KEYS:
        field, role, content = MESSAGE_KEYS[format]
        user, assistant = ("human", "gpt") if format == "sharegpt" else ("user", "assistant")
        tags = {"role_tag": role, "content_tag": content, "user_tag": user, "assistant_tag": assistant}
        entry |= {"formatting": "sharegpt", "columns": {"messages": field}, "tags": tags | {"system_tag": "system"}}
    else:
        return None
    return json.dumps({"kvopt": entry}, indent=2)


def _unsloth(format: str, file: str, base: str, eos: str | None) -> str | None:
    lines = _trl(format, file, base, eos)
    if lines is None:
        return None
    load = "from unsloth import FastLanguageModel  # before trl\n\nmodel, tokenizer = "
    load += f"FastLanguageModel.from_pretrained({base!r})"
    adapt = "model = FastLanguageModel.get_peft_model(model)"
    return f"{load}\n{adapt}\n" + lines.replace(f"model={base!r}", "model=model, processing_class=tokenizer")
