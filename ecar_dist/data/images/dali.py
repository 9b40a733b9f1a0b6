"""The one import of NVIDIA DALI: its dynamic mode for images (`images.py`), an external source for latents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ecar_dist.errors import ConfigError


@dataclass(frozen=True)
class Dali:
    """DALI's modules, imported."""

    version: str
    dynamic: Any
    fn: Any
    types: Any
    pipeline_def: Any


def import_dali() -> Dali:
    """Takes about half a second. Raises ConfigError where DALI does not import."""
    try:
        import nvidia.dali
        import nvidia.dali.experimental.dynamic as dynamic
        from nvidia.dali import fn, pipeline_def, types
    except ImportError as error:
        raise ConfigError(
            f"DALI does not import ({error}); install nvidia-dali-cuda130, or do without: --decoder pil, "
            "data.backend=gather"
        ) from None
    return Dali(nvidia.dali.__version__, dynamic, fn, types, pipeline_def)


class NpyDecoder:
    """Encoded npy arrays of one shape -> one tensor, by a DALI pipeline that is fed from outside.

    The feed decides on the order, so DALI keeps no state of its own. `device` is the torch device of the results.
    """

    def __init__(self, max_batch_size: int, device: torch.device) -> None:
        dali = import_dali()
        on_gpu = device.type == "cuda"

        @dali.pipeline_def(
            batch_size=max_batch_size, num_threads=1, device_id=device.index or 0 if on_gpu else None,
            prefetch_queue_depth=1,
        )  # fmt: skip
        def graph() -> Any:
            arrays = dali.fn.decoders.numpy(dali.fn.external_source(name="npy", dtype=dali.types.UINT8, ndim=1))
            return arrays.gpu() if on_gpu else arrays

        self._pipeline = graph()
        self._pipeline.build()

    def decode(self, encoded: Sequence[np.ndarray]) -> torch.Tensor:
        """uint8 [nbytes] each, all of one shape inside -> [n, *shape], memory of its own."""
        self._pipeline.feed_input("npy", list(encoded))
        (arrays,) = self._pipeline.run()
        return torch.from_dlpack(arrays.as_tensor()).clone()  # whether DALI writes there again is not ours to know
