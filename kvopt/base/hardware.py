"""Devices that work can be planned for: memory, products a second and bandwidth, from their makers' data sheets."""

from __future__ import annotations

from dataclasses import dataclass

from kvopt.errors import InputError

EFFICIENCY = 0.4
"""Share of a data sheet's products a second that a plan counts on: layers of a transformer reach 0.3 to 0.6 of them."""


@dataclass(frozen=True)
class Hardware:
    """One device.

    Attributes:
        name: as ``kvopt plan --device`` takes it.
        memory: bytes.
        bfloat16, float32: dense products, in FLOP/s; of bfloat16 None where the device does not multiply in it.
        bandwidth: of its memory, bytes/s.
        source: where the figures are from.
    """

    name: str
    memory: float
    bfloat16: float | None
    float32: float
    bandwidth: float
    source: str

    def rate(self, dtype: str) -> float:
        """FLOP/s that a plan counts on for products in ``dtype``."""
        peak = self.bfloat16 if dtype != "float32" and self.bfloat16 else self.float32
        return EFFICIENCY * peak


def _gpu(name: str, gb: float, bfloat16: float | None, float32: float, bandwidth: float, source: str) -> Hardware:
    """From the units of data sheets: GB, TFLOP/s, GB/s."""
    peak = None if bfloat16 is None else bfloat16 * 1e12
    return Hardware(name, gb * 1e9, peak, float32 * 1e12, bandwidth * 1e9, source)


DEVICES = {
    device.name: device
    for device in (
        _gpu("t4-16gb", 16, None, 8.1, 320, "NVIDIA T4 data sheet"),
        _gpu("l4-24gb", 24, 121, 30.3, 300, "NVIDIA L4 data sheet (dense: half of the sparse figure)"),
        _gpu("rtx4090-24gb", 24, 165.2, 82.6, 1008, "NVIDIA Ada architecture white paper, float32 accumulation"),
        _gpu("a100-40gb", 40, 312, 19.5, 1555, "NVIDIA A100 data sheet, PCIe and SXM 40 GB"),
        _gpu("l40s-48gb", 48, 362, 91.6, 864, "NVIDIA L40S data sheet (dense)"),
        _gpu("a100-80gb", 80, 312, 19.5, 2039, "NVIDIA A100 data sheet, SXM 80 GB"),
        _gpu("h100-80gb", 80, 989, 67, 3350, "NVIDIA H100 data sheet, SXM (dense)"),
        _gpu("h200-141gb", 141, 989, 67, 4800, "NVIDIA H200 data sheet, SXM (dense)"),
        _gpu("b200-180gb", 180, 2250, 75, 7700, "NVIDIA DGX B200 data sheet, an eighth of it (dense)"),
        _gpu("mi300x-192gb", 192, 1307, 163.4, 5300, "AMD Instinct MI300X data sheet (dense)"),
    )
}
HERE = "here"
"""The device of the config on this machine, measured for some seconds."""


def named_hardware(name: str) -> Hardware:
    """The device of this name. Raises InputError, with all names, for an unknown one."""
    if name not in DEVICES:
        raise InputError(f"no such device: {name}", where="--device", fix="known: " + ", ".join((HERE, *DEVICES)))
    return DEVICES[name]
