"""Files that come with the package: the job scripts of slurm/ and the example configs of configs/.

In the repository, `ecar_dist/shipped/` has links to these top-level folders; in a wheel, it has copies of them.
"""

from __future__ import annotations

import importlib.resources
import shutil
from pathlib import Path

from ecar_dist.errors import ConfigError, reason_of

SLURM, CONFIGS = "slurm", "configs"


def package_folder(name: str) -> Path:
    """The folder SLURM or CONFIGS of the installed package."""
    return Path(str(importlib.resources.files("ecar_dist"))) / "shipped" / name


def copy_package_folder(name: str, out: Path) -> list[Path]:
    """Copy the files of SLURM or CONFIGS to the folder `out`, to be edited there; returns the copies.

    Existing files are not replaced. Raises ConfigError if there are any, or if the folder cannot be written.
    """
    files = sorted(path for path in package_folder(name).iterdir() if path.is_file())
    taken = [path.name for path in files if (out / path.name).exists()]
    if taken:
        raise ConfigError(f"{out} already has {', '.join(taken)}; choose another folder, or remove them")
    try:
        out.mkdir(parents=True, exist_ok=True)
        return [Path(shutil.copy(path, out / path.name)) for path in files]
    except OSError as error:
        raise ConfigError(f"cannot copy {name}/ to {out} ({reason_of(error)}); choose another folder") from None
