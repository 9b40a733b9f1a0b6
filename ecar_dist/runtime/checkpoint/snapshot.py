"""A copy of this rank's state in host memory: the only part of a save that training has to wait for."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch

Partitions = Sequence[torch.Tensor]


class HostSnapshot:
    """Host buffers, allocated once and used again by every save; pinned where the state lies on a GPU.

    While a save still reads them, no other may be taken.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, int], torch.Tensor] = {}

    def reserve(self, state: Mapping[str, Partitions], wanted: Collection[int]) -> None:
        """Allocate, and touch, the memory of `take` ahead of the first save."""
        for kind, partitions in state.items():
            for index in wanted:
                self._buffer(kind, index, partitions[index])

    @torch.no_grad()
    def take(self, state: Mapping[str, Partitions], wanted: Collection[int]) -> dict[str, list[torch.Tensor]]:
        """Flat copies of partitions number `wanted` of every kind; the others are empty. Waits for the copies alone."""
        copies: dict[str, list[torch.Tensor]] = {}
        devices = set()
        for kind, partitions in state.items():
            copies[kind] = [torch.empty(0)] * len(partitions)
            for index in wanted:
                copies[kind][index] = self._buffer(kind, index, partitions[index])
                copies[kind][index].copy_(partitions[index].detach().view(-1), non_blocking=True)
                devices.add(partitions[index].device)
        for device in devices:
            if device.type == "cuda":
                torch.cuda.current_stream(device).synchronize()
        return copies

    def _buffer(self, kind: str, index: int, like: torch.Tensor) -> torch.Tensor:
        found = self._buffers.get((kind, index))
        if found is None or found.numel() != like.numel():
            pinned = like.device.type == "cuda"
            found = torch.empty(like.numel(), dtype=torch.float32, pin_memory=pinned).zero_()  # its pages exist now
            self._buffers[kind, index] = found
        return found
