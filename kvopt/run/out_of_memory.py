"""What is said where memory runs out: the stage, the peak, and the setting with which it needs about half."""

from __future__ import annotations

import torch

from kvopt.config.document import Config
from kvopt.errors import KvoptError
from kvopt.kernels.memory import peak, what_is_counted

GIB = 2**30


def out_of_memory(stage: str, device: torch.device, mend: str = "") -> KvoptError:
    """The one-line error for a stage that needed more memory than there is."""
    fix = f"set {mend} and run the same command again" if mend else "give it a device with more memory"
    return KvoptError(f"{stage}: out of memory, at a peak of {in_use(device)}; what is finished is kept; {fix}")


def in_use(device: torch.device) -> str:
    """``71.25 of 79.11 GiB allocated on cuda:0``: the peak until now, and where there is one, the limit."""
    used = f"{peak(device) / GIB:.2f}"
    if device.type in ("cuda", "xpu"):
        used += f" of {torch.get_device_module(device).get_device_properties(device).total_memory / GIB:.2f}"
    return f"{used} GiB {what_is_counted(device)}"


def halving(config: Config, stage: str) -> str:
    """The setting of a config, with its value, with which a stage needs about half the memory; it costs time alone."""
    room, _, rest = stage.partition("/")
    if room == "contexts":
        for context in config.learned:
            if context.name == rest and (rows := context.micro_batch_size or context.batch_size) > 1:
                return f"contexts.{rest}.micro_batch_size={rows // 2}"
    if room == "students":
        for student in config.students:
            rows = student.batch_size // student.accumulation
            if student.name == rest.partition("/")[0] and rows > 1 and rows % 2 == 0:
                return f"students.{student.name}.accumulation={student.accumulation * 2}"
    if stage == "reference/moments":
        return "reference.storage=hidden"
    sizes = {
        "reference": ("reference", config.reference.batch_size),
        "scores": ("score", config.score.batch_size),
        "answers": ("evaluate", config.evaluate.batch_size),
        "evaluate": ("evaluate", config.evaluate.batch_size),
    }
    if room in sizes and sizes[room][1] > 1:
        return f"{sizes[room][0]}.batch_size={sizes[room][1] // 2}"
    if room in ("contexts", "students") and not config.model.gradient_checkpointing:
        return "model.gradient_checkpointing=true"
    return "model.quantization=nf4" if config.model.quantization is None else ""
