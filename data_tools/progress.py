"""One progress bar for all commands: redrawn on a terminal, a line now and then in a log."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm

_LOG_SECONDS = 30.0


def progress(total: int, unit: str, label: str, initial: int = 0) -> tqdm[Any]:
    """`unit` is one thing, or "B" for bytes, which are shown as kB, MB, GB; `initial` of them were done before."""
    in_bytes = unit == "B"
    if sys.stderr.isatty():
        return tqdm(total=total, initial=initial, unit=unit, desc=label, mininterval=0.2, unit_scale=in_bytes)
    counted = "{n_fmt}B of {total_fmt}B" if in_bytes else "{n_fmt} of {total_fmt} {unit}s"
    return _LogLines(
        total=total,
        initial=initial,
        unit=unit,
        desc=label,
        mininterval=_LOG_SECONDS,
        maxinterval=_LOG_SECONDS,
        unit_scale=in_bytes,
        bar_format=f"{{desc}}: {counted}, {{rate_fmt}}, {{elapsed}} gone, {{remaining}} left{{postfix}}",
    )


class _LogLines(tqdm):
    """Whole lines, for a file that nobody watches: no carriage returns, no bar."""

    disable: bool  # tqdm's; set once it is closed

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        """tqdm gives a `msg` only to rub out what is there."""
        if msg is None:
            print(self, file=self.fp, flush=True)

    def close(self) -> None:
        if not self.disable:
            self.refresh()
        self.leave = False
        super().close()
