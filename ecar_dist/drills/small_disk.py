"""A disk of a chosen size: a tmpfs in a mount namespace of its own. It needs no root, and ends with its one process."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

WAYS = (("--mount",), ("--mount", "--map-root-user"))  # as root; as a user, where the kernel lets users


class NoSmallDiskError(Exception):
    """This machine lets nobody mount one."""


class SmallDisk:
    """Mounted at `folder` for processes that are started behind `prefix`. As a context manager it ends itself."""

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
        raise NoSmallDiskError("neither root nor a user namespace may mount a tmpfs here")

    @property
    def prefix(self) -> list[str]:
        """Runs the command that follows it where the disk is mounted, in this working directory."""
        return [*self._enter, "sh", "-c", 'cd "$0" && exec "$@"', os.getcwd()]

    @property
    def seen_from_outside(self) -> Path:
        """The mounted folder, for a process that was not started behind `prefix`."""
        return Path(f"/proc/{self._holder.pid}/root{self.folder}")

    def resize(self, size: int) -> None:
        # with a source named, mount leaves out the options it finds in place: a user id that may mean nothing in there
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
    """Mount it and stay: what `unshare` runs keeps its process id, so killing it ends the namespace."""
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
        raise NoSmallDiskError("there is no `unshare` here, which mounts a tmpfs") from None
