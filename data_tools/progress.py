"""One progress bar for all commands: redrawn on a terminal, a line now and then in a log."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm


def progress(total: int, unit: str, label: str) -> tqdm[Any]:
    terminal = sys.stderr.isatty()
    return tqdm(
        total=total, unit=unit, desc=label, mininterval=0.2 if terminal else 30.0, ascii=not terminal, leave=True
    )
