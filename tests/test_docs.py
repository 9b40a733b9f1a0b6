"""The numbers that README.md quotes from the demo are those of docs/demo_result.json, which a real `make demo` wrote.

tests/drills/test_every_drill.py compares docs/drills.md with the drills themselves.
"""

import json
import re
from pathlib import Path

import pytest

from ecar_dist.config.read import load_config

ROOT = Path(__file__).parents[1]
RESULT = json.loads((ROOT / "docs/demo_result.json").read_text())
BLOCK = next(part for part in (ROOT / "README.md").read_text().split("```") if "[1/7] image shards" in part)


def quoted_scores(text):
    return {name: float(value) for name, value in re.findall(r'^ "([^"]+)": ([\d.]+),?$', text, re.MULTILINE)}


def quoted_losses(text):
    return dict(re.findall(r"^step (\d+)/1200  loss ([\d.]+) ", text, re.MULTILINE))


def test_the_readme_quotes_the_scores_of_the_last_demo():
    scores = quoted_scores(BLOCK)
    assert {"FD-digits", "FD-digits real-vs-real floor", "FD-digits reconstructions", "ratio to floor"} <= set(scores)
    assert scores == {name: RESULT["scores"][name] for name in scores}


def test_the_readme_quotes_the_losses_and_the_data_of_the_last_demo():
    losses = quoted_losses(BLOCK)
    assert {"50", "1200"} <= set(losses)
    assert losses == {step: f"{RESULT['losses'][step]:.4f}" for step in losses}
    assert f"dataset_id {RESULT['dataset_id']}" in BLOCK
    found = re.search(r"scaling_factor ([\d.]+), shift_factor (-?[\d.]+)", BLOCK)
    assert found
    assert found.groups() == tuple(f"{RESULT['autoencoder'][name]:.5f}" for name in ("scaling_factor", "shift_factor"))


def test_the_readme_quotes_the_time_of_the_last_demo():
    found = re.search(r"^done in (\d+)m(\d+)s$", BLOCK, re.MULTILINE)
    assert found
    minutes, seconds = map(int, found.groups())
    assert 60 * minutes + seconds == pytest.approx(sum(RESULT["seconds"].values()), abs=60)
    assert len(RESULT["seconds"]) == 7


def steps_of(script, demo):
    body = script.partition(f"{demo}() {{")[2].partition("\n}")[0]
    return re.findall(r'^  step "([^"]+)"', body, re.MULTILINE)


def test_the_emoji_demo_makes_the_steps_that_its_page_shows():
    page = (ROOT / "docs/emoji.md").read_text()
    script = (ROOT / "demo.sh").read_text()
    assert re.findall(r"^\| ([\w, ]+) \| `", page, re.MULTILINE) == steps_of(script, "emoji")
    config = load_config(ROOT / "configs/emoji_cpu.yaml")
    (quoted,) = re.findall(r"a run of ([\d,]+) samples", page)
    assert int(quoted.replace(",", "")) == config.train.total_samples
    assert f"--vae-channels {config.data.latent_channels} " in script


def test_the_demo_makes_the_steps_that_the_readme_shows():
    script = (ROOT / "demo.sh").read_text()
    named = steps_of(script, "digits")
    assert re.findall(r"^\[\d/7\] ([\w ]+) \(", BLOCK, re.MULTILINE) == named == list(RESULT["seconds"])
