"""The simulation fetches what real runs have downloaded (docs/scale.md); the benchmark repeats these runs."""

import importlib
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
DOWNLOADED = {
    4: [942080, 901120, 880640, 901120],
    8: [491520, 491520, 450560, 491520, 471040, 430080, 491520, 471040],
}


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setattr("os.fsync", lambda _: None)
    return importlib.import_module("scale_simulation")


def test_the_walk_fetches_what_real_runs_have_downloaded(benchmark, tmp_path):
    benchmark.synthetic_run.write_latents(tmp_path / "set", 4, benchmark.SAMPLES, benchmark.SHARDS)
    for ranks, downloaded in DOWNLOADED.items():
        walked, forecast = benchmark.walk(tmp_path / "set", ranks)
        assert walked == downloaded
        assert 128 * 20480 <= forecast <= sum(downloaded)
