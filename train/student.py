"""Students: a base's own module tree with LoRA injected, or a full copy of it, as a
:class:`kvopt.base.loading.Base` that can stand wherever a base can.

A student folder ``students/NAME/`` is a PEFT adapter (LoRA) or a transformers model folder with its tokenizer (full),
plus ``kvopt-student.json`` for what neither has a field for and neither checks.

LoRA goes through ``get_peft_model`` and not through ``inject_adapter_in_model``: both change the modules in place, but
the first casts adapters to fp32 under a 16-bit base and writes folders that ``PeftModel.from_pretrained`` reads.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn
from transformers import PreTrainedModel

from kvopt.base.devices import is_out_of_memory, seeded
from kvopt.base.hub import weight_files
from kvopt.base.identity import check_base, weights_sha256
from kvopt.base.loading import Base, StoredBase, quiet
from kvopt.documents.student_record import StudentFacts, StudentRecord
from kvopt.documents.validated import read_record_of, write_document
from kvopt.errors import InputError, KvoptError, counted
from kvopt.storage.files import read_json, replacing_directory, sha256_json
from kvopt.version import VERSION

FORMAT_VERSION = 1
RECORD = "kvopt-student.json"
ADAPTER = "adapter_model.safetensors"
RENAMED = ("base_model_name_or_path", "revision", "peft_version")
"""Entries of ``adapter_config.json`` that do not change what the adapter does."""


@dataclass(frozen=True)
class Student:
    """A model in training.

    Attributes:
        base: the student as a Base: its own model, the base's tokenizer, device and geometry.
        method: "lora" or "full".
        peft: the PEFT model around ``base.model`` (LoRA), else None.
    """

    base: Base
    method: str
    peft: PeftModel | None = None

    @property
    def model(self) -> nn.Module:
        return self.base.model

    def trainable(self) -> dict[str, nn.Parameter]:
        """The parameters that are trained, by name; a tied one stands once."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}


def twin(base: Base, name: str | None = None) -> Base:
    """A copy of the base's module tree that shares its (frozen) parameters: modules can be injected into it, and the
    base stays as it is, at the price of the buffers alone.
    """
    base.check_whole("a student")
    shared: dict[int, Any] = {id(p): p for p in base.model.parameters()}
    return replace(base, model=copy.deepcopy(base.model, shared), name=name or base.name)


def lora_student(
    base: Base,
    name: str,
    *,
    rank: int = 16,
    alpha: float = 32,
    dropout: float = 0.0,
    targets: str | list[str] = "all-linear",
    seed: int = 0,
) -> Student:
    """LoRA on a twin of the base; starts as the base itself (B = 0). Adapters are fp32 under a 16-bit base.

    Args:
        targets: "all-linear" (without the head), or names of linear modules.
        seed: of the initial A.

    Raises:
        InputError: no module has such a name, or the head or the embeddings are among them.
    """
    config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=targets, task_type="CAUSAL_LM")  # type: ignore[arg-type]
    copied = twin(base, name)
    with seeded(base.device, seed):
        try:
            peft = _injected(copied.model, config)
        except ValueError as error:
            fix = "all-linear, or names of linear modules such as q_proj"
            raise InputError(
                " ".join(str(error).split())[:200], where=f"students.{name}.lora.targets", fix=fix
            ) from None
    _refuse_head(copied, f"students.{name}.lora.targets")
    return Student(copied, "lora", peft)


def _injected(model: PreTrainedModel, config: LoraConfig) -> PeftModel:
    with warnings.catch_warnings():  # PEFT asks transformers by a name that is about to go
        warnings.simplefilter("ignore", FutureWarning)
        return get_peft_model(model, config)


def _refuse_head(student: Base, where: str) -> None:
    for module in (student.model.get_output_embeddings(), student.model.get_input_embeddings()):
        if isinstance(module, BaseTunerLayer):
            raise InputError("an adapter on the head or the embeddings is not supported", where=where)


def full_student(base: Base, name: str, dtype: torch.dtype = torch.float32) -> Student:
    """A copy of all weights in ``dtype`` (the masters), each trainable; tied weights stay tied. Weights are copied one
    by one into ``dtype``, so that no copy in the base's own stands beside them.
    """
    base.check_whole("a student")
    masters: dict[int, Any] = {id(p): nn.Parameter(p.detach().to(dtype, copy=True)) for p in base.model.parameters()}
    model = copy.deepcopy(base.model, masters).to(dtype).requires_grad_(True)
    return Student(replace(base, model=model, name=name, dtype=dtype), "full")


def save_student(student: Student, folder: Path, of: Base, record: StudentFacts | None = None) -> None:
    """Write a student folder atomically.

    Args:
        folder: replaced if it is there.
        of: the base that it was trained from; its identity is stored.
        record: further entries of ``kvopt-student.json``.

    Raises:
        KvoptError: a value is not finite; nothing is written.
    """
    for name, parameter in student.trainable().items():
        if not torch.isfinite(parameter).all():
            raise KvoptError(f"student {student.base.name}: {name} has values that are not finite; it is not written")

    def write(place: Path) -> None:
        if student.peft is None:
            try:
                with quiet():
                    student.base.model.save_pretrained(str(place))
            except SafetensorError as error:  # what safetensors makes of a full disk
                raise KvoptError(f"{folder}: the weights cannot be written: {error}; is the disk full?") from error
            student.base.tokenizer.save_pretrained(str(place))
            return
        config = copy.deepcopy(student.peft.peft_config["default"])
        config.base_model_name_or_path, config.inference_mode = of.name, True
        config.target_modules = sorted(config.target_modules)  # a set, whose order differs between processes
        config.save_pretrained(str(place))
        tensors = {name: t.detach().cpu().contiguous() for name, t in get_peft_model_state_dict(student.peft).items()}
        (place / ADAPTER).write_bytes(save(tensors, metadata={"format": "pt"}))

    write_student_folder(folder, of, name=student.base.name, method=student.method, record=record, write=write)


def write_student_folder(
    folder: Path,
    of: Base | StoredBase,
    *,
    name: str,
    method: str,
    record: StudentFacts | None,
    write: Callable[[Path], None],
) -> None:
    """A student folder whose files ``write`` puts into an empty one; ``kvopt-student.json`` is added and pins them."""
    with replacing_directory(folder) as place:
        write(place)
        files = [place / ADAPTER] if method == "lora" else weight_files(place)
        whole = StudentRecord(
            format_version=FORMAT_VERSION,
            kvopt_version=VERSION,
            name=name,
            method=method,
            weights_sha256=weights_sha256(files),
            base=of.document,
            **(record.given() if record else {}),
        )
        if method == "lora":
            whole.adapter_sha256 = adapter_sha256(place)
        write_document(place / RECORD, whole)


def adapter_sha256(folder: Path) -> str:
    """Hash of what ``adapter_config.json`` says of the adapter (rank, alpha, modules, …): the name of the base may be
    changed by hand, and PEFT adds its version. Raises InputError.
    """
    config = read_json(folder / "adapter_config.json")
    return sha256_json({name: value for name, value in config.items() if name not in RENAMED})


def weights_of(folder: Path) -> str:
    """Hash of a student's weights. Raises InputError for a folder that is no student."""
    files = [folder / ADAPTER] if (folder / "adapter_config.json").is_file() else []
    files = files or (weight_files(folder) if (folder / RECORD).is_file() else [])
    if not files or not files[0].is_file():
        raise InputError("is not a student folder", where=str(folder), fix="give a folder from students/")
    return weights_sha256(files)


def start_from(student: Student, folder: Path, base: Base) -> None:
    """Give an untrained student the weights of the one in ``folder``, in the precision that it is trained in.

    Raises:
        InputError: as :func:`load_student`, or a student of another method, or LoRA of another rank, alpha or targets.
    """
    before = load_student(folder, replace(base, dtype=student.base.dtype) if student.method == "full" else base)
    is_lora = (folder / "adapter_config.json").is_file()
    if is_lora != (student.method == "lora"):
        what = f"is a {'lora' if is_lora else 'full'} student and cannot be trained further as a {student.method} one"
        raise InputError(what, where=str(folder), fix="use its method")
    start = dict(before.model.named_parameters())
    trained = student.trainable()
    shapes = {name: p.shape for name, p in start.items() if name in trained or ".lora_" in name}
    same_scale = student.peft is None or _scale(read_json(folder / "adapter_config.json")) == _scale(
        student.peft.peft_config["default"].to_dict()
    )
    if shapes != {name: p.shape for name, p in trained.items()} or not same_scale:
        raise InputError("has LoRA of another rank, alpha or targets", where=str(folder), fix="use the same settings")
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(start[name])


def _scale(config: dict[str, Any]) -> tuple[float, bool]:
    return config["lora_alpha"] / config["r"], bool(config.get("use_rslora"))


def read_student_record(folder: Path) -> StudentRecord | None:
    """``kvopt-student.json`` of a folder, None where there is none. Raises InputError for a damaged or newer one."""
    return read_record_of(StudentRecord, folder / RECORD, FORMAT_VERSION)


def load_student(folder: Path, base: Base) -> Base:
    """A student folder as a Base, frozen and in eval mode: its own model; the base's tokenizer, device, dtype,
    geometry; ``identity`` is the base's with one entry ``student`` more, so that nothing cached for one is taken for
    the other. A LoRA student shares the base's weights.

    A LoRA adapter that kvopt did not write is accepted when its keys and shapes fit; its base cannot be checked then.

    Raises:
        InputError: no student, another base, missing or foreign or misshaped tensors, values that are not finite, a
            damaged file.
    """
    base.check_whole("a student")
    name, digest = check_student(folder, base)
    adapter = (folder / "adapter_config.json").is_file()
    student = _load_lora(folder, base, name) if adapter else _load_full(folder, base, name)
    student.model.requires_grad_(False).eval()
    return replace(student, identity={**base.identity, "student": digest})


def check_student(folder: Path, base: Base | StoredBase) -> tuple[str, str]:
    """The name of the student in a folder and the hash of its weights, which are not loaded. Raises InputError for no
    student, another base, and files that are not those of its record.
    """
    record = read_student_record(folder)
    adapter = (folder / "adapter_config.json").is_file()
    if record is None and not adapter:
        fix = "give a folder from students/"
        raise InputError(f"is not a student folder, it has no {RECORD}", where=str(folder), fix=fix)
    if record is not None:
        check_base(record.base, base.name, base.identity, folder, "trained from")
    files = [folder / ADAPTER] if adapter else weight_files(folder)
    if not files or not files[0].is_file():
        raise InputError("has no weights", where=str(folder), fix="restore or train it again")
    digest = weights_sha256(files)
    if record is not None and record.weights_sha256 != digest:
        what = f"the weights are not those that {RECORD} describes"
        raise InputError(what, where=str(folder), fix="restore or train it again")
    if record is not None and record.adapter_sha256 not in (None, adapter_sha256(folder) if adapter else None):
        what = f"adapter_config.json is not the one that {RECORD} describes"
        raise InputError(what, where=str(folder), fix="restore or train it again")
    return (record and record.name) or folder.name, digest


def _load_lora(folder: Path, base: Base, name: str) -> Base:
    kind = read_json(folder / "adapter_config.json").get("peft_type")
    if kind != "LORA":
        what = f"a PEFT adapter of type {kind} is not a student"
        raise InputError(what, where=str(folder), fix="a LoRA adapter is; contexts go to --context")
    tensors = _read_adapter(folder / ADAPTER)
    copied = twin(base, name)
    try:
        config = LoraConfig.from_pretrained(str(folder))
        config.base_model_name_or_path = None  # PEFT would warn of another name, which is no other base
        peft = _injected(copied.model, config)
    except (
        Exception
    ) as error:  # PEFT checks little of its config, so a damaged one fails in as many ways as it has keys
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise InputError(f"its adapter does not fit {base.name!r}: {reason}", where=str(folder)) from None
    _refuse_head(copied, str(folder))
    expected = {key: t.shape for key, t in get_peft_model_state_dict(peft).items()}
    if wrong := sorted(k for k in expected.keys() | tensors.keys() if expected.get(k) != _shape(tensors.get(k))):
        what = f"{counted(len(wrong), 'tensor')} missing, foreign or of another shape, first {wrong[0]}"
        raise InputError(what, where=str(folder / ADAPTER), fix="use the base that it was trained from")
    set_peft_model_state_dict(peft, tensors)
    return copied


def _shape(tensor: Tensor | None) -> torch.Size | None:
    return None if tensor is None else tensor.shape


def _read_adapter(path: Path) -> dict[str, Tensor]:
    try:
        tensors = load_file(str(path))
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"is damaged or truncated: {error}", where=str(path), fix="restore or train it again"
        ) from None
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise InputError(f"{name} has values that are not finite", where=str(path), fix="train it again")
    return tensors


def _load_full(folder: Path, base: Base, name: str) -> Base:
    try:
        with quiet():
            model, info = type(base.model).from_pretrained(
                str(folder),
                dtype=base.dtype,
                attn_implementation=base.model.config._attn_implementation,
                output_loading_info=True,
                **({} if base.device.type == "cpu" else {"device_map": {"": str(base.device)}}),
            )
    except Exception as error:  # a damaged folder fails in as many ways as there are formats
        if is_out_of_memory(error):
            raise
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"cannot be loaded: {type(error).__name__}: {reason}", where=str(folder)) from error
    if missing := sorted(info["missing_keys"]):
        raise InputError(f"its weights lack {counted(len(missing), 'tensor')}, first {missing[0]}", where=str(folder))
    for parameter_name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise InputError(f"{parameter_name} has values that are not finite", where=str(folder))
    return replace(base, model=model, name=name)


def layer_of(name: str) -> int | None:
    """The number of the layer in a dotted parameter or module name; None for what lies outside the layers
    (embeddings, final norm, head).

    The layers of every decoder that transformers has are a numbered list (``model.layers.3.…``, ``transformer.h.3.…``),
    so it is the first part of the name that is a number; later ones count experts or sub-blocks inside the layer.
    """
    return next((int(part) for part in name.split(".") if part.isascii() and part.isdigit()), None)
