"""The sets that the start-up benchmark measures are accepted by the loader."""

import importlib
from pathlib import Path

import numpy as np

from ecar_dist.data.shards.manifest import load_manifest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def test_a_hollow_set_opens_like_a_real_one(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    contenders, growth = importlib.import_module("contenders"), importlib.import_module("growth")
    growth.write_hollow_set(tmp_path / "set", 10_000)
    assert load_manifest(tmp_path / "set").count == 10_000
    source, stream = contenders.ours_at_rest(tmp_path / "set")
    assert len(stream.locate(np.arange(5_000, 9_096))) == 4_096
    source.close()
