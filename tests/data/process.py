"""Wait for threads and processes, and look at the files that are open."""

import contextlib
import time
from pathlib import Path


def wait_until(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def open_files(folder):
    """Names of the files in the folder that this process has open. A memory map counts as open."""
    links = set()
    for descriptor in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # the descriptor of this listing
            links.add(descriptor.readlink())
    return {link.name for link in links if link.parent == folder}
