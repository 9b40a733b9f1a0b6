"""The progress bar of all commands: a bar on a terminal, a line every 30 seconds in a log."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm

_LOG_SECONDS = 30.0


def progress(total: int, unit: str, label: str, initial: int = 0) -> tqdm[Any]:
    """A tqdm bar on stderr.

    `unit` is the singular of what is counted, or "B" for bytes, which are shown as kB, MB or GB. `initial` of them were
    done by an earlier run and do not count towards the rate.
    """
    in_bytes = unit == "B"
    if sys.stderr.isatty():
        return tqdm(total=total, initial=initial, unit=unit, desc=label, mininterval=0.2, unit_scale=in_bytes)

    # stderr is a file or a pipe.
    counted = "{n_fmt}B of {total_fmt}B" if in_bytes else "{n_fmt} of {total_fmt} {unit}s"
    return _LogLines(
        total=total,
        initial=initial,
        unit=unit,
        desc=label,
        mininterval=_LOG_SECONDS,
        maxinterval=_LOG_SECONDS,
        unit_scale=in_bytes,
        bar_format=f"{{desc}}: {counted}, {{rate_fmt}}, {{elapsed}} elapsed, {{remaining}} left{{postfix}}",
    )


class _LogLines(tqdm):
    """Prints complete lines, without a bar or carriage returns."""

    disable: bool  # tqdm's; set once it is closed

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        """tqdm passes a `msg` only to erase the bar."""
        if msg is None:
            print(self, file=self.fp, flush=True)

    def close(self) -> None:
        if not self.disable:
            self.refresh()
        self.leave = False
        super().close()
