"""The manifest alone: the content of the golden one, and bounds that no file on disk can show."""

import json
from pathlib import Path

import pytest

from ecar_dist.runtime.checkpoint.manifest import header_limit, parse_manifest
from ecar_dist.storage.untrusted import UntrustedError

GOLDEN = Path(__file__).parent / "golden/run/checkpoints/step-00000004/checkpoint.json"


def test_the_golden_manifest():
    manifest = parse_manifest(GOLDEN.read_bytes())
    assert (manifest.progress.samples_seen, manifest.progress.step, manifest.world_size) == (64, 4, 2)
    assert manifest.shapes == {"ar.weight": (4, 6), "ar.bias": (10,), "flow.scale": ()}
    assert [piece.numel for file in manifest.files for piece in file.pieces(manifest.shapes)] == [18, 6, 10, 1]
    assert set(manifest.ema_kinds) == {"ema", "ema1"}


@pytest.mark.parametrize("size", [10_000, 40 << 30, 2**62])
def test_a_file_larger_than_its_fragments_is_rejected(size):
    """Nothing is downloaded or hashed if the shapes do not account for the size."""
    tree = json.loads(GOLDEN.read_text())
    tree["files"][0]["bytes"] = size
    with pytest.raises(UntrustedError, match=f"{size:,}"):
        parse_manifest(json.dumps(tree).encode())


def test_written_headers_are_within_their_limit():
    """For names of any length and every kind of state that the writer has."""
    manifest = parse_manifest(GOLDEN.read_bytes())
    for file in manifest.files:
        header = int.from_bytes((GOLDEN.parent / file.name).read_bytes()[:8], "little")
        limit = header_limit(file.pieces(manifest.shapes), manifest.most_kinds)
        assert 0 < header < limit < 12 * header
