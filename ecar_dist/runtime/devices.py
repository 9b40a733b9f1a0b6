"""What is known about GPU models. An unknown one has no MFU and no time estimate, rather than a wrong one."""

from __future__ import annotations

from dataclasses import dataclass

# Dense bf16 matrix products reach 790e12 of the 989e12 FLOP/s in the data sheet of an H200, measured on large square
# matrices. The same share is assumed for the other models.
ATTAINABLE_SHARE = 790 / 989


@dataclass(frozen=True)
class Device:
    """A GPU model, from NVIDIA's data sheet of its SXM version.

    peak_flops: dense bf16 FLOP/s.
    memory: bytes.
    memory_bandwidth: bytes/s.
    link_bandwidth: bytes/s to the other GPUs of a node, in each direction.
    """

    peak_flops: float
    memory: int
    memory_bandwidth: float
    link_bandwidth: float

    @property
    def attainable_flops(self) -> float:
        """FLOP/s that large matrix products reach; measured only on an H200."""
        return self.peak_flops * ATTAINABLE_SHARE


DEVICES = {
    "A100": Device(312e12, 80_000_000_000, 2.04e12, 300e9),
    "H100": Device(989e12, 80_000_000_000, 3.35e12, 450e9),
    "H200": Device(989e12, 141_000_000_000, 4.8e12, 450e9),
}


def find_device(name: str) -> Device | None:
    """The first known device that `name` contains, e.g. "NVIDIA H200"; else None."""
    return next((device for model, device in DEVICES.items() if model in name.upper()), None)


def peak_bf16_flops(device_name: str) -> float | None:
    """Dense bf16 FLOP/s of a known device, from its data sheet; else None."""
    device = find_device(device_name)
    return None if device is None else device.peak_flops
