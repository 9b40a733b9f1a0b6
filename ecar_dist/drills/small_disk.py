"""A disk of a chosen size: a tmpfs in its own mount namespace. Needs no root if user namespaces are allowed."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

# Options of unshare: as root; as a user, if the kernel allows user namespaces.
WAYS = (("--mount",), ("--mount", "--map-root-user"))


class NoSmallDiskError(Exception):
    """A tmpfs cannot be mounted on this machine."""


class SmallDisk:
    """A tmpfs at `folder`, seen only by commands that start with `prefix`. As a context manager it unmounts itself."""

    def __init__(self, folder: Path, size: int) -> None:
        folder.mkdir(parents=True)
        self.folder = folder
        for way in WAYS:
            self._holder = _hold(folder, size, way)
            assert self._holder.stdout is not None
            if self._holder.stdout.readline() == "mounted\n":
                user = ["--user", "--preserve-credentials"] if "--map-root-user" in way else []
                self._enter = ["nsenter", "--target", str(self._holder.pid), *user, "--mount"]
                return
            self.close()
        raise NoSmallDiskError("a tmpfs cannot be mounted here, neither as root nor in a user namespace")

    @property
    def prefix(self) -> list[str]:
        """Words in front of a command that make it run where the disk is mounted, in this working directory."""
        return [*self._enter, "sh", "-c", 'cd "$0" && exec "$@"', os.getcwd()]

    @property
    def seen_from_outside(self) -> Path:
        """The mounted folder, for a process that was not started with `prefix`."""
        return Path(f"/proc/{self._holder.pid}/root{self.folder}")

    def resize(self, size: int) -> None:
        # With the source given, mount drops the current options, whose user id may not exist in the namespace.
        command = ["mount", "-o", f"remount,size={size}", "tmpfs", str(self.folder)]
        subprocess.run([*self._enter, *command], check=True, capture_output=True)

    def close(self) -> None:
        self._holder.kill()
        self._holder.wait()

    def __enter__(self) -> SmallDisk:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _hold(folder: Path, size: int, way: tuple[str, ...]) -> subprocess.Popen[str]:
    """Mount the tmpfs and keep the namespace open: unshare keeps its process id, so killing it ends the namespace."""
    script = f'mount -t tmpfs -o size={size} tmpfs "$0" && echo mounted && exec sleep infinity'
    try:
        return subprocess.Popen(
            ["unshare", *way, "sh", "-c", script, str(folder)],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
        )
    except FileNotFoundError:
        raise NoSmallDiskError("unshare is not installed; it is needed to mount a tmpfs") from None
