"""From a student's config to the arguments, precision and trackers of ``transformers.Trainer``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainingArguments
from transformers.integrations import (
    TensorBoardCallback,
    get_reporting_integration_callbacks,
    is_tensorboard_available,
)

from kvopt.base.launch import SECONDS_TO_WAIT, processes
from kvopt.base.loading import DTYPES, Base
from kvopt.config.students import StudentConfig
from kvopt.errors import InputError, missing_extra
from kvopt.train.job import Job
from kvopt.train.student import Student

DEFAULT_TRACKERS = ["tensorboard"]


def arguments(job: Job, student: Student) -> TrainingArguments:
    """The trainer's arguments. Raises InputError for settings that do not fit together or this machine."""
    config, steps = job.config, job.plan.steps
    autocast = autocast_dtype(job.base, student.base.dtype, config)
    decay = {"constant": "constant_with_warmup"}.get(config.decay, config.decay)
    arguments = TrainingArguments(
        output_dir=str(job.folder),
        per_device_train_batch_size=rows_a_process(config),
        gradient_accumulation_steps=config.accumulation,
        max_steps=steps,
        learning_rate=config.rate,
        warmup_steps=round(config.warmup * steps),
        lr_scheduler_type=decay,
        weight_decay=config.weight_decay,
        max_grad_norm=config.clip,
        seed=job.seed,
        data_seed=job.seed,
        bf16=autocast == torch.bfloat16,
        fp16=autocast == torch.float16,
        use_cpu=job.base.device.type == "cpu",
        logging_steps=config.log_every,
        logging_nan_inf_filter=False,
        save_strategy="no",  # a callback says when it is due
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=job.base.device.type == "cuda",
        ddp_find_unused_parameters=config.half,
        ddp_timeout=SECONDS_TO_WAIT,
    )
    # Several GPUs are used by several processes, never by torch's DataParallel.
    arguments._n_gpu = min(arguments._n_gpu, 1)
    stay_on(arguments, job.base.device)
    return arguments


def stay_on(arguments: TrainingArguments, device: torch.device) -> None:
    """Let a trainer of one process work where the base is: on its own it takes the first GPU and makes it the current
    one. Several processes have a GPU each, and keep it.
    """
    if device.type not in ("cuda", "xpu") or arguments.world_size > 1:
        return
    getattr(torch, device.type).set_device(device)
    arguments.__dict__["_setup_devices"] = device
    arguments.distributed_state.device = device  # type: ignore[union-attr]


def rows_a_process(config: StudentConfig) -> int:
    """Rows of a micro-batch in this process. Raises InputError."""
    together = processes()
    if config.batch_size % (config.accumulation * together):
        parts = f"accumulation {config.accumulation} x {together} processes"
        what = f"batch_size {config.batch_size} is not a multiple of {parts}"
        raise InputError(what, where=f"students.{config.name}", fix="change batch_size or accumulation")
    return config.batch_size // (config.accumulation * together)


def autocast_dtype(base: Base, weights: torch.dtype, config: StudentConfig) -> torch.dtype | None:
    """The dtype of mixed precision, None where everything is computed in the weights' own. Raises InputError."""
    wanted, where = base.dtype if config.dtype == "auto" else DTYPES[config.dtype], f"students.{config.name}.dtype"
    if wanted == torch.float16 and base.device.type != "cuda":
        raise InputError("float16 can be trained only on a GPU", where=where, fix="use bfloat16 or float32")
    if wanted == torch.float16:
        return wanted  # with its loss scaler, also where the frozen weights are float16
    if wanted == weights:
        return None
    if weights != torch.float32:
        what = f"{config.dtype} cannot be computed on weights in {str(weights).removeprefix('torch.')}"
        raise InputError(what, where=where, fix="use auto, or set model.dtype: float32")
    return wanted


def trackers(config: StudentConfig, logs: Path) -> list[TrainerCallback]:
    """Callbacks of the trackers that ``report_to`` names; TensorBoard events go to ``logs``. Raises InputError."""
    callbacks: list[Any] = []
    for name in config.report_to:
        where = f"students.{config.name}.report_to"
        if untracked(config) is not None:
            continue
        try:
            if name == "tensorboard" and not is_tensorboard_available():
                raise missing_extra("tracking", "TensorBoard", where)
            if name == "tensorboard":
                callback = TensorBoardCallback()
                callback.logging_dir = str(logs)
                callbacks.append(callback)
            else:
                callbacks += [kind() for kind in get_reporting_integration_callbacks([name])]
        except (RuntimeError, ValueError, ImportError) as error:
            reason = " ".join(str(error).split())[:200]
            raise InputError(f"{name!r}: {reason}", where=where, fix="install it, or set report_to: []") from None
    return callbacks


def untracked(config: StudentConfig) -> str | None:
    """A line for a student whose trackers are the default and not installed, which then trains without; else None."""
    if config.report_to != DEFAULT_TRACKERS or "report_to" in config.model_fields_set or is_tensorboard_available():
        return None
    return f"student {config.name}: no TensorBoard events are written (pip install 'kvopt[tracking]')"
