"""Training a student: ``transformers.Trainer`` over a stream of (row, context) items.

The stream is one long epoch in a fixed order, so the trainer's own resuming, accumulation and sharing among processes
are exact; epochs over the rows are the schedule's. A checkpoint counts only when its last file, ``complete.json``, is
there and belongs to this job, so a process may be killed while it writes one.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import SequentialSampler
from transformers import PrinterCallback, Trainer, TrainerCallback

from kvopt.base.launch import LAUNCH
from kvopt.base.loading import Base, enable_checkpointing
from kvopt.config.students import StudentConfig
from kvopt.errors import InputError, KvoptError
from kvopt.storage.files import parsed_json, write_error, write_json
from kvopt.train.context_loss import ContextLoss
from kvopt.train.distill.drawn_answers import OnPolicyLoss
from kvopt.train.gold import gold_nll
from kvopt.train.half import HalfFineTuning
from kvopt.train.job import Job, Trained
from kvopt.train.losses.on_policy import OnPolicyDivergence
from kvopt.train.pool import PoolContext
from kvopt.train.settings import arguments, trackers
from kvopt.train.student import Student, full_student, lora_student, start_from

TRAINING_VERSION = 1
"""Raise it when the same inputs give another student."""
COMPLETE = "complete.json"
WEIGHTS = "trained.safetensors"
MEASUREMENTS = 5
"""How often the held-out rows are measured, beside once before the first step."""


def train_student(job: Job) -> Trained:
    """Train one student, going on from the job's last complete checkpoint.

    Raises:
        InputError: settings that do not fit together or this machine.
        KvoptError: the loss or the gradient is not finite; the last checkpoint is kept.
    """
    student = make_student(job.base, job.config, job.seed)
    if job.start is not None:
        start_from(student, job.start, job.base)
    if job.config.gradient_checkpointing:
        enable_checkpointing(student.base.model)
    trainer = StudentTrainer(job, student)
    last = last_checkpoint(job.folder, job.key)
    resumed = int(last.name.rpartition("-")[2]) if last else 0
    trainer.train(resume_from_checkpoint=str(last) if last else None)
    student.model.eval()
    steps = trainer.state.global_step
    items = [item for step in range(steps) for item in job.plan.step_items(step, trainer.kept_at(step))]
    return Trained(
        student,
        steps,
        resumed,
        *trainer.loss.spent(items),
        [_entry(log) for log in trainer.state.log_history if "loss" in log],
        trainer.stages,
        trainer.held_out,
    )


def _entry(log: dict[str, Any]) -> dict[str, Any]:
    return {name: log[name] for name in ("step", "epoch", "loss", "grad_norm", "learning_rate") if name in log}


def make_student(base: Base, config: StudentConfig, seed: int) -> Student:
    """The untrained student of a config. Raises InputError where the base's weights cannot be trained so."""
    base.check_gradients(f"students.{config.name}")
    if config.method == "lora":
        lora = config.lora
        return lora_student(
            base, config.name, rank=lora.rank, alpha=lora.alpha, dropout=lora.dropout, targets=lora.targets, seed=seed
        )
    if (how := base.quantized_by) is not None:
        raise InputError(
            f"all weights are trained, and those of the base are quantized ({how})",
            where=f"students.{config.name}.method",
            fix="use method: lora, or leave out model.quantization",
        )
    return full_student(base, config.name, torch.float32 if config.masters == "float32" else base.dtype)


def make_loss(job: Job, student: Student) -> ContextLoss:
    """The module that is trained: the student with the loss of its config."""
    loss = job.config.loss
    if isinstance(loss, OnPolicyDivergence):
        if job.teacher is None:
            raise KvoptError("on-policy distillation needs a teacher")
        return OnPolicyLoss(student.base, job.base, job.pool, loss, job.teacher, job.seed)
    dropout = job.config.context_dropout
    return ContextLoss(student.base, job.base, job.pool, loss, job.reference, seed=job.seed, dropout=dropout)


def last_checkpoint(folder: Path, key: str) -> Path | None:
    """The newest whole checkpoint of this job, None without one."""
    checkpoints = []
    for path in folder.glob("checkpoint-*"):
        try:
            complete = parsed_json((path / COMPLETE).read_text("utf-8"))
        except (OSError, ValueError):
            continue
        if complete.get("key") == key:
            checkpoints.append((int(path.name.rpartition("-")[2]), path))
    return max(checkpoints)[1] if checkpoints else None


class StudentTrainer(Trainer):
    """``transformers.Trainer`` with our loss, our stream, and checkpoints of the trained weights alone."""

    loss_is_scaled_for_ga = True  # by the gold tokens of the whole step

    def __init__(self, job: Job, student: Student) -> None:
        self.job, self.plan = job, job.plan
        self.student, self.trained = student.base, student.trainable()
        self.stages: list[dict[str, Any]] = []
        self.held_out: list[dict[str, Any]] = []
        self.half = HalfFineTuning(job.seed) if job.config.half else None
        callbacks = [*([self.half] if self.half else []), _Conduct(self), *trackers(job.config, job.logs)]
        self.loss = make_loss(job, student)
        super().__init__(
            model=self.loss,
            args=arguments(job, student),
            train_dataset=range(job.plan.steps * job.plan.batch_size),  # type: ignore[arg-type]
            data_collator=self._collate,
            callbacks=callbacks,
        )
        self.remove_callback(PrinterCallback)

    # ---- the stream

    def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)  # type: ignore[arg-type]

    def _collate(self, positions: Sequence[int]) -> dict[str, Tensor]:
        """Positions of a micro-batch; ``labels`` lets the trainer count what the loss of a step is divided by."""
        gold = sum(self.loss.weight_of(self.plan.stream.row(p)) for p in positions)
        return {"positions": torch.tensor(positions), "labels": torch.zeros(gold, dtype=torch.int64)}

    def kept_at(self, step: int) -> tuple[int, ...]:
        """The contexts that a schedule which adapts had chosen by a step."""
        names = [item.name for item in self.job.pool.contexts]
        past = [stage["kept"] for stage in self.stages if stage["step"] <= step]
        return tuple(names.index(name) for name in past[-1]) if past else ()

    def rescore(self) -> None:
        """Score the pool under the student as it is now, and choose."""
        step, schedule = self.state.global_step, self.job.config.schedule
        if not schedule.adapts or any(stage["step"] == step for stage in self.stages):
            return
        contexts = self.job.pool.contexts
        self.model.eval()
        with self.compute_loss_context_manager():
            nll = LAUNCH.agreed([self._gold_nll(item, schedule.scored_rows) for item in contexts])
        kept = schedule.choose(nll)
        scores = {item.name: value for item, value in zip(contexts, nll, strict=True)}
        self.stages.append({"step": step, "gold_nll": scores, "kept": [contexts[i].name for i in kept]})

    def measure(self) -> None:
        """The gold NLL of the student as it is now on the held-out rows."""
        job, step = self.job, self.state.global_step
        if job.held_out is None or any(point["step"] == step for point in self.held_out):
            return
        self.model.eval()
        with self.compute_loss_context_manager():
            value = job.held_out.nll(self.student, self.plan.batch_size)
        self.held_out.append({"step": step, "gold_nll": value})
        if job.report:
            job.report(step, None, value)

    def _gold_nll(self, item: PoolContext, rows: int) -> float:
        encoded = replace(item.encoded, rows=item.encoded.rows[:rows])
        return gold_nll(self.student, item.context, encoded, batch_size=self.plan.batch_size).mean

    # ---- the loss

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Sum over the micro-batch divided by the gold tokens of the whole step; times the number of processes, whose
        gradients are averaged.
        """
        step = self.state.global_step
        positions = inputs["positions"].tolist()
        loss = model(self.plan.items(positions, self.kept_at(step)), positions[0])
        loss = loss * self.args.world_size / num_items_in_batch
        self._check_finite("loss", loss.detach())
        return loss

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        norm = super()._clip_grad_norm(model)
        if not self.args.fp16:  # float16 overflows now and then, and its loss scaler skips such steps
            self._check_finite("gradient norm", norm)
        return norm

    def _check_finite(self, what: str, value: Any) -> None:
        number = float(value)
        if math.isfinite(number):
            return
        last = last_checkpoint(self.job.folder, self.job.key)
        kept = (
            f"the state of step {last.name.rpartition('-')[2]} is kept in {last}" if last else "nothing was saved yet"
        )
        name, step = self.job.config.name, self.state.global_step
        raise KvoptError(f"students.{name}: {what} {number} at step {step}; {kept}; lower learning_rate")

    # ---- checkpoints

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """The trained weights; the base's are not copied."""
        if output_dir is None or not self.args.should_save:
            return
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        tensors = {name: p.detach().cpu().contiguous() for name, p in self.trained.items()}
        save_file(tensors, str(Path(output_dir) / WEIGHTS))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = self.job.folder / f"checkpoint-{self.state.global_step}"
        try:
            super()._save_checkpoint(model, trial)
        except OSError as error:
            raise write_error(error, folder) from error
        except (RuntimeError, SafetensorError) as error:  # what torch and safetensors make of a full disk
            reason = str(error).splitlines()[0][:200]
            raise KvoptError(f"{folder}: the checkpoint cannot be written: {reason}; is the disk full?") from error
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            state = {"key": self.job.key, "counted": self.loss.counted}
            state |= {"stages": self.stages, "held_out": self.held_out}
            write_json(folder / COMPLETE, state)
            for older in self.job.folder.glob("checkpoint-*"):
                if older != folder:
                    shutil.rmtree(older, ignore_errors=True)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        try:
            super()._load_optimizer_and_scheduler(checkpoint)
        except (RuntimeError, EOFError, OSError, UnpicklingError) as error:  # what torch makes of a cut file
            raise _damaged(checkpoint, error) from error

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        folder = Path(resume_from_checkpoint)
        try:
            tensors = load_file(str(folder / WEIGHTS))
        except (SafetensorError, OSError) as error:
            raise _damaged(folder, error) from error
        with torch.no_grad():
            for name, parameter in self.trained.items():
                parameter.copy_(tensors[name])
        state = parsed_json((folder / COMPLETE).read_text("utf-8"))
        self.stages, self.loss.counted = state["stages"], state["counted"]
        self.held_out = state.get("held_out", [])


def _damaged(folder: Path | str | None, error: Exception) -> KvoptError:
    reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
    return KvoptError(f"{folder}: the checkpoint is damaged: {reason}; delete it to start over")


class _Conduct(TrainerCallback):
    """What happens between steps: scoring of the pool and of held-out rows, half fine-tuning, checkpoints, progress."""

    def __init__(self, trainer: StudentTrainer) -> None:
        self.trainer = trainer
        self.epoch: int | None = None
        config, steps = trainer.job.config, trainer.plan.steps
        every = config.checkpoint_every or max(1, steps // 10)
        self.save_every = (
            math.ceil(every / config.log_every) * config.log_every
        )  # the loss since the last log is not kept
        self.measure_every = math.ceil(steps / MEASUREMENTS)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        report, measured = self.trainer.job.report, self.trainer.held_out
        if report:
            report(state.global_step, None, measured[-1]["gold_nll"] if measured else None)
        if state.global_step == 0:
            self.trainer.measure()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        trainer, epoch = self.trainer, self.trainer.plan.epoch(state.global_step)
        if trainer.job.config.schedule.rescores_at(state.global_step):
            trainer.rescore()
        if trainer.half is not None and self.epoch != math.floor(epoch):
            state.epoch = epoch
            trainer.half.on_epoch_begin(args, state, control, **kwargs)
        self.epoch = math.floor(epoch)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        step, steps = state.global_step, self.trainer.plan.steps
        state.epoch = self.trainer.plan.epoch(step)
        control.should_save = step % self.save_every == 0 and step < steps
        control.should_log = control.should_log or step == steps
        if self.trainer.job.report:
            self.trainer.job.report(step, None, None)
        if step % self.measure_every == 0 or step == steps:
            self.trainer.measure()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **kwargs: Any) -> None:
        if self.trainer.job.report and "loss" in logs:
            self.trainer.job.report(state.global_step, logs["loss"], None)
