"""Compiles every Triton kernel ahead of time for devices that are not here: matrix units, no spills, memory."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from pathlib import Path

import pytest

triton = pytest.importorskip("triton", reason="the triton package is optional")
pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="nothing is compiled there")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from kvopt.kernels import triton_backend, triton_kernels  # noqa: E402
from tests.kernels.cases import DIVERGENCES  # noqa: E402

TARGETS = {
    "sm_80": (GPUTarget("cuda", 80, 32), "mma.sync", 166912),
    "sm_90": (GPUTarget("cuda", 90, 32), "wgmma", 232448),
    "sm_100": (GPUTarget("cuda", 100, 32), "tcgen05.mma", 232448),
    "gfx942": (GPUTarget("hip", "gfx942", 64), "v_mfma", 65536),
}
"""Target, its matrix instruction, its shared memory per program in bytes."""

POINTERS = {
    "reference": "A", "difference": "A", "weight": "A", "bias": "A", "partial": "fp32", "lse": "fp32", "shift": "fp32",
    "factor": "fp32", "out": "A", "x_t": "fp32", "x_s": "fp32", "value": "fp32", "rescale": "fp32", "bias_t": "A",
    "bias_s": "A",
}  # fmt: skip
WAYS = [("bf16", True), ("fp16", True), ("fp32", False)]
"""Dtype of the gradient and whether the form is the difference: divergences take them in turn."""

FLOATS = {"scale_t", "scale_s", "cap_t", "cap_s", "beta"}
STRIDES = {"h_stride", "w_stride", "out_stride", "stride", "features", "per_split"}


def compiled(kernel, dtype: str, aligned: bool, target, constants: dict, warps: int, stages: int):
    """The kernel compiled with pointers to ``dtype`` and, where aligned, strides and pointers divisible by 16."""
    signature, attributes = {}, {}
    for index, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name in POINTERS:
            signature[name] = "*" + (dtype if POINTERS[name] == "A" else POINTERS[name])
            attributes[(index,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32" if name in FLOATS else "i32"
            if aligned and name in STRIDES:
                attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=target, options={"num_warps": warps, "num_stages": stages})


def spilled_bytes(binary) -> int:
    """Local memory per thread that the assembled kernel uses."""
    if "cubin" not in binary.asm:
        found = re.findall(r"\.(?:vgpr|sgpr)_spill_count:\s*(\d+)", binary.asm["amdgcn"])
        assert found
        return sum(map(int, found))
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        text = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    found = re.search(r"STACK:(\d+)", text.stdout)
    assert found, text.stdout
    return int(found.group(1))


def check(binary, name: str, matrix: bool) -> None:
    _, instruction, shared = TARGETS[name]
    assembly = binary.asm.get("ptx") or binary.asm["amdgcn"]
    if matrix:
        assert instruction in assembly, f"no {instruction}"
    assert spilled_bytes(binary) == 0
    assert binary.metadata.shared <= shared


def tile_constants(name: str, bias: bool) -> tuple[dict, int, int]:
    arguments = triton_backend.tile_for(name.startswith("gfx")).arguments()
    warps, stages = arguments.pop("num_warps"), arguments.pop("num_stages")
    return {"BIAS": bias, **arguments}, warps, stages


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("kernel", ["statistics_kernel", "gradient_kernel"])
@pytest.mark.parametrize(
    ("dtype", "aligned", "bias"), [("bf16", True, False), ("fp16", True, True), ("bf16", False, False)]
)
def test_store_free_kernels_use_matrix_units_and_do_not_spill(name, kernel, dtype, aligned, bias):
    constants, warps, stages = tile_constants(name, bias)
    binary = compiled(getattr(triton_kernels, kernel), dtype, aligned, TARGETS[name][0], constants, warps, stages)
    check(binary, name, matrix=True)


@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("capped", [False, True])
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("aligned", [True, False])
def test_row_kernel_does_not_spill(name, divergence, aligned, capped):
    dtype, difference = WAYS[DIVERGENCES.index(divergence) % len(WAYS)]
    constants = {
        "DIFFERENCE": difference, "BIAS_T": not difference, "BIAS_S": not difference, "CAP_T": capped,
        "CAP_S": capped, "GRADIENT": True, "RESCALE": dtype == "fp16", "BLOCK": triton_backend.ROW_BLOCK,
        **triton_backend.row_constants(divergence),
    }  # fmt: skip
    binary = compiled(
        triton_kernels.rows_kernel, dtype, aligned, TARGETS[name][0], constants, triton_backend.ROW_WARPS, 3
    )
    check(binary, name, matrix=False)
