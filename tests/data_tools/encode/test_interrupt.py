"""Ctrl-C ends a command quickly, even if its threads wait for a store that refuses connections or stalls."""

import dataclasses
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from data_tools.images.index import index
from ecar_dist.data.shards.manifest import load_image_manifest, write_manifest
from tests.data.image_sets import members_of, samples, write_tar
from tests.data.latent_sets import write_set
from tests.data.object_store import SECRETS

SECONDS = 15.0  # retries last for 600, a stalled request for 30 or more; the exit itself takes one or two


@pytest.fixture
def listener():
    """A socket that listens on a free local port."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server


def serve(server, stalls):
    """Accept connections and close them, or keep them open; the returned event is set after the first."""
    connected, kept = threading.Event(), []

    def take():
        while True:
            try:
                connection, _ = server.accept()
            except OSError:
                return
            if stalls:
                kept.append(connection)
            else:
                connection.close()
            connected.set()

    threading.Thread(target=take, daemon=True).start()
    return connected


def index_elsewhere(folder):
    """An index whose tars are at a URL."""
    (folder / "tars").mkdir()
    write_tar(folder / "tars/0.tar", members_of(samples(20)))
    index(str(folder / "tars"), folder / "index")
    write_manifest(
        folder / "index", dataclasses.replace(load_image_manifest(folder / "index"), location="s3://bucket/t")
    )


def latents(folder):
    (folder / "set").mkdir()
    write_set(folder / "set")


ENCODE = ["encode", "index", "latents", "--vae", "dct-f8", "--image-size", "16", "--decoder", "pil"]
COMMANDS = {
    "listing": (["index", "s3://bucket/images", "out"], None, False),
    "looking up": (["index", "s3://bucket/{0..9}.tar", "out"], None, False),
    "encoding": (ENCODE, index_elsewhere, False),
    "encoding from a store that stalls": (ENCODE, index_elsewhere, True),
    "copying": (["shard", "index", "copy"], index_elsewhere, True),
    "pushing": (["push", "set", "s3://bucket/set"], latents, True),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_an_interrupt_ends_a_command_quickly(tmp_path, listener, name):
    arguments, prepare, stalls = COMMANDS[name]
    if prepare:
        prepare(tmp_path)
    connected, before = serve(listener, stalls), sorted(os.listdir(tmp_path))
    endpoint = f"http://127.0.0.1:{listener.getsockname()[1]}"
    path = os.pathsep.join([os.getcwd(), *filter(None, [os.environ.get("PYTHONPATH")])])
    settings = {"AWS_ENDPOINT_URL": endpoint, "AWS_DEFAULT_REGION": "us-east-1", "PYTHONPATH": path}
    command = [sys.executable, "-m", "data_tools", *arguments]
    with subprocess.Popen(
        command, cwd=tmp_path, env={**os.environ, **SECRETS, **settings}, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert connected.wait(60)
        time.sleep(0.5)
        assert process.poll() is None, process.communicate()
        process.send_signal(signal.SIGINT)
        began = time.monotonic()
        try:
            process.wait(30)
        finally:
            process.kill()
        assert time.monotonic() - began < SECONDS
        assert process.returncode not in (0, -signal.SIGKILL, -signal.SIGABRT, -signal.SIGSEGV)
    after = set(os.listdir(tmp_path)) - set(before)
    assert after <= {"latents"}, "nothing half-made is left"
