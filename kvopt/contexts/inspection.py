"""What a context folder is, read without loading any model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kvopt.contexts.folder import adapter_config, read_record, read_tensor
from kvopt.errors import InputError


def describe(folder: Path) -> dict[str, Any]:
    """Kind, slots, base, objective, learning and use of a context folder. Raises InputError for anything else."""
    config = adapter_config(folder)
    tensor = read_tensor(folder)
    if not tensor.isfinite().all():
        raise InputError("has values that are not finite", where=str(folder))
    record = read_record(folder) or {}
    history = record.get("history") or []
    best = min(history, key=lambda point: point["held_out_kl"]) if history else None
    return {
        "folder": str(folder),
        "name": record.get("name", folder.name),
        "kind": "soft" if config["peft_type"] == "PROMPT_TUNING" else "kv",
        "tokens": tensor.shape[0],
        "bytes": tensor.numel() * tensor.element_size(),
        "peft_type": config["peft_type"],
        "base": record.get("base") or {"name": config.get("base_model_name_or_path")},
        "written_by": f"kvopt {record.get('kvopt_version', '(unknown version)')}"
        if record
        else "not kvopt (its base cannot be checked)",
        "settings": record.get("settings"),
        "best": best,
        "start": history[0] if history else None,
    }


def describe_text(facts: dict[str, Any]) -> str:
    """The facts as a few lines for people, with the Python that uses the context."""
    lines = [
        f"{facts['name']}: a {facts['kind']} context of {facts['tokens']} slots"
        f" ({facts['bytes'] / 2**20:.1f} MiB, PEFT {facts['peft_type']})",
        f"base: {facts['base']['name']}; written by {facts['written_by']}",
    ]
    if facts["best"]:
        lines.append(
            f"held-out forward KL {facts['best']['held_out_kl']:.4f} nats per gold token"
            f" at step {facts['best']['step']}"
            f" (start: {facts['start']['held_out_kl']:.4f}, init {(facts['settings'] or {}).get('init')})"
        )
    lines += [
        "use it:",
        "  from peft import PeftModel",
        f"  model = PeftModel.from_pretrained(base_model, {facts['folder']!r})",
        "  # then feed the rest of the prompt: everything from the first slot on",
    ]
    return "\n".join(lines)
