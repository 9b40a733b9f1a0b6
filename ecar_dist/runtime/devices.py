"""Peak rates of known devices. An unknown device has no MFU and no time estimate, rather than a wrong one."""

PEAK_BF16_FLOPS = {"A100": 312e12, "H100": 989e12, "H200": 989e12}  # dense, per second, NVIDIA data sheets (SXM)
MEMORY_GIB = {"A100": 80, "H100": 80, "H200": 141}  # GB of the largest model by its data sheet; less is free


def peak_bf16_flops(device_name: str) -> float | None:
    """FLOP/s of the first known device that `device_name` contains, e.g. "NVIDIA H200"; else None."""
    return next((peak for name, peak in PEAK_BF16_FLOPS.items() if name in device_name.upper()), None)


def device_memory(device_name: str) -> int | None:
    """Bytes of the largest model of a known device; else None."""
    return next((gib << 30 for name, gib in MEMORY_GIB.items() if name in device_name.upper()), None)
