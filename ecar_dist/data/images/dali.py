"""The only import of NVIDIA DALI. Images use its dynamic mode (`decode.py`), latents a pipeline (`NpyDecoder`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ecar_dist.errors import ConfigError


@dataclass(frozen=True)
class Dali:
    """The modules of DALI."""

    version: str
    dynamic: Any
    fn: Any
    types: Any
    pipeline_def: Any


def import_dali() -> Dali:
    """Import DALI, which takes about half a second. Raises ConfigError if that fails."""
    try:
        import nvidia.dali
        import nvidia.dali.experimental.dynamic as dynamic
        from nvidia.dali import fn, pipeline_def, types
    except ImportError as error:
        raise ConfigError(
            f"cannot import DALI ({error}); install nvidia-dali-cuda130, or do not use it: --decoder pil, "
            "data.backend=gather"
        ) from None
    return Dali(nvidia.dali.__version__, dynamic, fn, types, pipeline_def)


class NpyDecoder:
    """Decodes npy files of equal shape to one tensor, with a DALI pipeline that has an external source.

    The caller feeds it batch by batch, so DALI has no state that a resumed run would need. `device` is the torch device
    of the results.
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
        """Decode n npy files, uint8 [nbytes] each, to one tensor [n, *shape] in its own memory."""
        self._pipeline.feed_input("npy", list(encoded))
        (arrays,) = self._pipeline.run()
        return torch.from_dlpack(arrays.as_tensor()).clone()  # DALI may reuse its memory for the next batch
