"""Prints the wheels of a folder that this interpreter needs for `gpu.sh`, one per line. Standard library only.

`python gpu_packages.py FOLDER` prints nothing if all packages are installed, and ends with an error if one is neither
installed nor in the folder.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import find_spec
from pathlib import Path

# What training, sampling and their tests import, by module.
MODULES = (
    "torch", "numpy", "deepspeed", "einops", "hjson", "msgpack", "packaging", "psutil", "cpuinfo", "pydantic",
    "pydantic_core", "annotated_types", "typing_inspection", "yaml", "filelock", "fsspec", "safetensors", "xxhash",
    "tqdm", "PIL", "tensorboard", "pytest",
)  # fmt: skip


def main(arguments: Sequence[str]) -> None:
    folder = Path(arguments[0])
    lacking = [name for name in MODULES if find_spec(name) is None]
    if not lacking:
        return

    # Every wheel whose package is not installed, because a missing package may need others.
    wheels = [path for path in sorted(folder.glob("*.whl")) if not _installed(_package(path))]
    absent = [name for name in lacking if not any(_provides(path, name) for path in wheels)]
    if absent:
        sys.exit(
            f"gpu.sh: {sys.executable} lacks {', '.join(absent)}, and {folder} has no wheel with them; "
            "fill it as described in benchmarks/README.md ('Wheels')"
        )
    print("\n".join(map(str, wheels)))


def _package(wheel: Path) -> str:
    return wheel.name.partition("-")[0]


def _provides(wheel: Path, module: str) -> bool:
    """Whether the wheel contains the module."""
    import zipfile

    with zipfile.ZipFile(wheel) as file:
        return any(re.match(rf"{module}(/|\.py$|\..*\.so$)", name) for name in file.namelist())


def _installed(package: str) -> bool:
    try:
        distribution(package)
    except PackageNotFoundError:
        return False
    return True


if __name__ == "__main__":
    main(sys.argv[1:])
