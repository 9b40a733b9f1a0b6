"""The settings that test_zero_matrix.py compares: `section.key=value` overrides of one tiny config."""

STEPS, BATCH = 4, 16
REFERENCE = "zero 0"

_BF16 = ("deepspeed.precision=bf16",)
_RECOMPUTE = ("train.activation_checkpointing=true",)
_COMPILE = ("train.compile=true",)  # with a backend that keeps every operation as it is
_OFFLOAD = ("deepspeed.offload_optimizer=true",)
_OFFLOAD_ALL = (*_OFFLOAD, "deepspeed.offload_params=true")
# The tiny model's parameters are all too small for ZeRO-3 to split; this setting splits and gathers every one.
_SPLIT_ALL = ("deepspeed.raw={zero_optimization: {stage3_param_persistence_threshold: 0}}",)


def _zero(stage: int, *overrides: str) -> tuple[str, ...]:
    return (f"deepspeed.zero_stage={stage}", *overrides)


FP32: dict[str, tuple[str, ...]] = {
    REFERENCE: _zero(0),
    "zero 1": _zero(1),
    "zero 2": _zero(2),
    "zero 3": _zero(3),
    "zero 2, optimizer offload": _zero(2, *_OFFLOAD),
    "zero 3, optimizer offload": _zero(3, *_OFFLOAD, *_SPLIT_ALL),
    "zero 3, parameter offload": _zero(3, *_OFFLOAD_ALL, *_SPLIT_ALL),
    "zero 2, recompute": _zero(2, *_RECOMPUTE),
    "zero 3, recompute": _zero(3, *_RECOMPUTE, *_SPLIT_ALL),
    "zero 0, compiled": _zero(0, *_COMPILE),
    "zero 1, compiled": _zero(1, *_COMPILE),
    "zero 2, recompute, compiled": _zero(2, *_RECOMPUTE, *_COMPILE),
    "zero 3, recompute, compiled": _zero(3, *_RECOMPUTE, *_SPLIT_ALL, *_COMPILE),
}
BF16: dict[str, tuple[str, ...]] = {
    "zero 0, bf16": _zero(0, *_BF16, "batch.micro_batch_size=8"),  # it does not accumulate in bf16
    "zero 1, bf16": _zero(1, *_BF16),
    "zero 2, bf16": _zero(2, *_BF16),
    "zero 3, bf16": _zero(3, *_BF16),
    "zero 2, bf16, compiled": _zero(2, *_BF16, *_COMPILE),
    "zero 3, bf16, all together": _zero(3, *_BF16, *_OFFLOAD_ALL, *_RECOMPUTE, *_SPLIT_ALL),
}
SETTINGS = {**FP32, **BF16}
COMPILED = [name for name in SETTINGS if name.endswith("compiled")]
