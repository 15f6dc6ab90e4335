"""What a folder is, read without loading any model: a context (kvopt's or another PEFT's), an export, a student, or a
run directory with what it has put aside.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvopt.console.tables import has_width
from kvopt.contexts.adapter import STUDENT, check_finite, kind_of, read_tensor
from kvopt.documents.export_record import ExportRecord
from kvopt.documents.manifest import RunManifest
from kvopt.documents.student_record import StudentRecord
from kvopt.documents.validated import validated_record
from kvopt.errors import InputError, counted
from kvopt.export.source import open_source
from kvopt.run.put_aside import Kept
from kvopt.storage.files import read_json

EXPORT = "kvopt-export.json"
MANIFEST = "manifest.json"


def describe(folder: Path) -> dict[str, Any]:
    """What the folder is, for which base, how good, and how to use it; ``what`` is context, export, student or run.

    ``RUN#NAME`` is the context NAME of a run. Raises InputError for anything else.
    """
    if "#" in str(folder) and not folder.exists():
        folder = _folder_of(str(folder))
    if (folder / STUDENT).is_file():
        return _student(folder)
    if (folder / EXPORT).is_file():
        return _export(folder)
    if (folder / MANIFEST).is_file() and not (folder / "adapter_config.json").is_file():
        return _run(folder)
    return _context(folder)


def _run(folder: Path) -> dict[str, Any]:
    manifest = validated_record(RunManifest, read_json(folder / MANIFEST), folder / MANIFEST)
    kept = [
        {
            "stage": result.record.stage,
            "folder": str(result.folder),
            "why": result.record.why,
            "paths": result.paths,
            "bytes": result.bytes,
        }
        for result in Kept(folder).results()
    ]
    return {
        "what": "run",
        "folder": str(folder),
        "base": manifest.base.to_json() if manifest.base else None,
        "kvopt_version": manifest.kvopt_version,
        "stages": sorted(manifest.stages),
        "kept": kept,
    }


def _folder_of(spec: str) -> Path:
    """The folder of ``RUN#NAME``."""
    source = open_source(spec, base="unknown")
    if source.folder is None:
        raise InputError(
            "is a text context, which has no folder", where=spec, fix=f"kvopt export {spec} --to text writes it"
        )
    return source.folder


def _context(folder: Path) -> dict[str, Any]:
    source = open_source(str(folder), base="unknown")
    config, record = source.config, source.record
    tensor = read_tensor(folder)
    check_finite(tensor, folder)
    known = record.to_json() if record else {}
    history = known.get("history") or []
    best = record.best_point if record else None
    by = f"kvopt {known.get('kvopt_version', '(unknown version)')}"
    return {
        "what": "context",
        "folder": str(folder),
        "name": source.name,
        "kind": kind_of(config),
        "tokens": tensor.shape[0],
        "bytes": tensor.numel() * tensor.element_size(),
        "peft_type": config["peft_type"],
        "base": known.get("base") or {"name": config.get("base_model_name_or_path")},
        "written_by": by if record else "not kvopt (its base cannot be checked)",
        "positions": known.get("positions") or {"first": 0, "body": tensor.shape[0]},
        "template_tokens": source.template_tokens,
        "settings": known.get("settings"),
        "origin": known.get("origin"),
        "metrics": source.metrics.to_json() if source.metrics else None,
        "best": best.to_json() if best else None,
        "start": history[0] if history else None,
    }


def _export(folder: Path) -> dict[str, Any]:
    path = folder / EXPORT
    facts = read_json(path)
    if missing := [key for key in ("to", "name", "kind", "base", "summary", "snippet") if key not in facts]:
        raise InputError(f"has no {missing[0]!r}", where=str(path), fix="export it again")
    return {"what": "export", "folder": str(folder), **validated_record(ExportRecord, facts, path).to_json()}


def _student(folder: Path) -> dict[str, Any]:
    facts = validated_record(StudentRecord, read_json(folder / STUDENT), folder / STUDENT).to_json()
    history = facts.get("history") or []
    adapter = (folder / "adapter_config.json").is_file()
    known = ("name", "method", "base", "contexts", "settings", "steps", "epochs", "kvopt_version")
    return {
        "what": "student",
        "folder": str(folder),
        **{key: facts.get(key) for key in known},
        "library": "peft" if adapter else "transformers",
        "last": history[-1] if history else None,
    }


def describe_text(facts: dict[str, Any]) -> str:
    """The facts as a few lines for people, with the Python that uses the folder."""
    describe_kind = {
        "context": _context_lines,
        "export": _export_lines,
        "student": _student_lines,
        "run": _run_lines,
    }
    return "\n".join(describe_kind[facts["what"]](facts))


def _run_lines(facts: dict[str, Any]) -> list[str]:
    base = (facts["base"] or {}).get("name")
    return [
        f"{facts['folder']}: a run directory; base: {base}, written by kvopt {facts['kvopt_version']}",
        f"holds: {', '.join(facts['stages']) or 'nothing yet'}",
        *kept_lines(facts["kept"]),
        f"look at it: kvopt compare {facts['folder']}, or kvopt inspect {facts['folder']}#NAME for a context",
    ]


def kept_lines(kept: Sequence[dict[str, Any]]) -> list[str]:
    """What a run directory has put aside, one line each."""
    if not kept:
        return ["nothing is put aside"]
    total = size_of(sum(one["bytes"] for one in kept))
    head = f"put aside ({counted(len(kept), 'result')}, {total}; named again as they were, they are taken up):"
    return [head, *(f"  {one['stage']}: {size_of(one['bytes'])}, {one['why']}, {one['folder']}" for one in kept)]


def _context_lines(facts: dict[str, Any]) -> list[str]:
    lines = [
        f"{facts['name']}: a {facts['kind']} context of {counted(facts['tokens'], 'slot')}"
        f" ({size_of(facts['bytes'])}, PEFT {facts['peft_type']})",
        f"base: {facts['base']['name']}; written by {facts['written_by']}",
    ]
    if facts["template_tokens"]:
        lines.append(f"stands for {counted(facts['template_tokens'], 'token')} of its template")
    if facts["origin"]:
        sources = ", ".join(part["name"] for part in facts["origin"].get("of", []))
        lines.append(f"made by {facts['origin'].get('operation')} of {sources}")
    lines += _metric_lines(facts.get("metrics"))
    if facts["best"]:
        lines.append(
            f"held-out forward KL {facts['best']['held_out_kl']:.4f} nats per gold token"
            f" at step {facts['best']['step']}"
            f" (start: {facts['start']['held_out_kl']:.4f}, init {(facts['settings'] or {}).get('init')})"
        )
    if facts["positions"].get("first"):
        lines.append(
            f"its keys stand at positions {facts['positions']['first']} and up, where PEFT does not look:"
            f" kvopt export {facts['folder']} --to peft moves them back"
        )
        return lines
    return [
        *lines,
        "use it:",
        "  from peft import PeftModel",
        f"  model = PeftModel.from_pretrained(base_model, {facts['folder']!r})",
        "  # then feed the prompt's ids without those that the context stands for (an export's card cuts them)",
        f"  # other tools: kvopt export {facts['folder']} --to " + _formats(facts["kind"]),
    ]


def size_of(count: int) -> str:
    """``900 B``, ``12.5 KiB`` or ``3.0 MiB``."""
    if count < 1024:
        return f"{count} B"
    return f"{count / 2**10:.1f} KiB" if count < 2**20 else f"{count / 2**20:.1f} MiB"


def _formats(kind: str) -> str:
    return "hf-cache (plain transformers), mlx or vllm" if kind == "kv" else "prompt-embeds (vLLM) or hf-cache"


def _export_lines(facts: dict[str, Any]) -> list[str]:
    slots = f", {counted(facts['tokens'], 'slot')}" if facts.get("tokens") and facts["kind"] != "text" else ""
    return [
        f"{facts['name']}: an export for {facts['to']} of a {facts['kind']} context{slots}",
        facts["summary"],
        f"base: {facts['base'].get('name')}; written by kvopt {facts.get('kvopt_version', '(unknown version)')}",
        *_metric_lines(facts.get("metrics")),
        "use it (in this folder; README.md says more):",
        *("  " + line for line in facts["snippet"].rstrip("\n").splitlines()),
    ]


def _student_lines(facts: dict[str, Any]) -> list[str]:
    contexts = facts["contexts"] or []
    names = [str(c.get("name")) if isinstance(c, dict) else str(c) for c in contexts]
    lines = [
        f"{facts['name']}: a student trained by {facts['method']}"
        + (
            f" ({counted(facts['steps'], 'step')}, {facts['epochs']:.3g} epochs)"
            if facts["steps"] and facts["epochs"]
            else ""
        ),
        f"base: {(facts['base'] or {}).get('name')}; written by kvopt {facts['kvopt_version']}",
    ]
    if names:
        lines.append(
            f"trained on {counted(len(names), 'context')}: {', '.join(names[:8])}" + (", …" if len(names) > 8 else "")
        )
    if facts["last"]:
        shown = {k: v for k, v in facts["last"].items() if isinstance(v, int | float) and not isinstance(v, bool)}
        lines.append("last measurement: " + ", ".join(f"{key} {value:.4g}" for key, value in shown.items()))
    if facts["library"] == "peft":
        use = ["from peft import PeftModel", f"model = PeftModel.from_pretrained(base_model, {facts['folder']!r})"]
    else:
        use = [
            "from transformers import AutoModelForCausalLM",
            f"model = AutoModelForCausalLM.from_pretrained({facts['folder']!r})",
        ]
    return [*lines, "use it:", *("  " + line for line in use), "  # then feed whole prompts"]


def _metric_lines(metrics: dict[str, Any] | None) -> list[str]:
    if not metrics or "gold_nll" not in metrics:
        return []
    kl = metrics["kl_forward"]
    interval = f" ({kl['ci95'][0]:.4f} to {kl['ci95'][1]:.4f})" if kl.get("ci95") and has_width(kl["ci95"]) else ""
    return [
        f"{metrics['split']} rows: forward KL {kl['mean']:.4f}{interval} nats per gold token, gold NLL"
        f" {metrics['gold_nll']:.4f}, top-1 agreement {metrics['top1_agreement']:.1%}"
    ]
