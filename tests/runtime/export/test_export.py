"""Export: any EMA, in shards, complete or not at all, in bounded memory; and what a reader refuses."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import xxhash
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import ecar_dist.runtime.export.ema as export_ema
from ecar_dist.averaging import profile
from ecar_dist.config.knobs_training import EmaSection
from ecar_dist.config.read import config_to_yaml, load_config
from ecar_dist.errors import CheckpointError, ConfigError
from ecar_dist.runtime.ema import tracked_decays
from ecar_dist.runtime.export.card import _steps
from ecar_dist.runtime.export.ema import WantedEma, open_ema_weights
from ecar_dist.runtime.export.files import INDEX, WEIGHTS, ExportReader
from ecar_dist.runtime.export.write import export_run
from ecar_dist.storage.untrusted import MAX_JSON_BYTES
from tests.runtime.checkpoint.edited_checkpoints import device, folder, in_time, link_out, loop, pipe, sparse
from tests.runtime.made_runs import make_checkpoint, make_run

SHAPES = {"a.weight": (64, 32), "a.bias": (64,), "b.weight": (48, 64), "c.scale": ()}
GIB = 2**30


def state(seed=0, kinds=("ema", "ema1", "master")):
    generator = torch.Generator().manual_seed(seed)
    return {kind: {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()} for kind in kinds}


@pytest.fixture
def run(tmp_path):
    """A run that keeps two EMAs, with one checkpoint; its state is `state()`."""
    folder, config = make_run(tmp_path, ema={"half_life_samples": [1000], "sigma_rel": [0.1]})
    make_checkpoint(folder / "checkpoints", 100, state(), ema=config.ema)
    return folder


def test_one_file_where_it_fits(run, tmp_path):
    exported = export_run(run, tmp_path / "out/new")
    assert exported.path == tmp_path / "out/new"
    names = {path.name for path in exported.path.iterdir()}
    texts = {"config.json", "config.yaml", "README.md", "model_index.json", "pipeline.py"}
    assert names == texts | {"model.safetensors"}
    weights = load_file(exported.path / WEIGHTS)
    assert weights.keys() == SHAPES.keys()
    assert all(torch.equal(weights[name], value) for name, value in state()["ema"].items())
    with safe_open(exported.path / WEIGHTS, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert exported.summary.startswith(
        "export of step-00000100: ema (half_life_samples=1000), 5,185 parameters in fp32, 1 files, "
    )


def test_shards_and_index_have_the_names_of_the_hub(run, tmp_path):
    out = export_run(run, tmp_path / "out", max_shard_gib=12_290 / GIB).path
    index = json.loads((out / INDEX).read_text())
    names = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert index["weight_map"] == dict(zip(SHAPES, (names[0], names[0], names[1], names[2]), strict=True))
    assert index["metadata"]["total_size"] == 4 * sum(torch.Size(shape).numel() for shape in SHAPES.values())
    together = {name: value for shard in names for name, value in load_file(out / shard).items()}
    read = ExportReader(out)
    assert read.keys() == SHAPES.keys()
    for name, value in state()["ema"].items():
        assert torch.equal(together[name], value)
        assert torch.equal(read[name], value)


def test_a_tensor_larger_than_a_shard_has_its_own(run, tmp_path):
    out = export_run(run, tmp_path / "out", max_shard_gib=1 / GIB).path
    assert len(list(out.glob("*.safetensors"))) == len(SHAPES)
    assert len(ExportReader(out)) == len(SHAPES)


def test_bf16_is_rounded_once(run, tmp_path):
    out = export_run(run, tmp_path / "out", dtype="bf16").path
    weights = load_file(out / WEIGHTS)
    assert all(torch.equal(weights[name], value.bfloat16()) for name, value in state()["ema"].items())
    assert json.loads((out / "config.json").read_text())["dtype"] == "bf16"


@pytest.mark.parametrize("wanted", [WantedEma(sigma_rel=0.1), WantedEma(half_life=1000)])
def test_a_kept_ema_is_exported_unchanged(run, tmp_path, wanted):
    out = export_run(run, tmp_path / "out", wanted=wanted).path
    kind = "ema1" if wanted.sigma_rel else "ema"
    weights = load_file(out / WEIGHTS)
    assert all(torch.equal(weights[name], value) for name, value in state()[kind].items())
    assert json.loads((out / "config.json").read_text())["average"]["kind"] == kind


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        ({"half_life": 3, "sigma_rel": 0.1}, "--half-life and --sigma-rel"),
        ({"half_life": 0}, "must be at least 1 sample"),
        ({"sigma_rel": 0.3}, r"must lie in \(0, 0.28\)"),
    ],
)
def test_an_invalid_choice_of_ema(wanted, said):
    with pytest.raises(ConfigError, match=said):
        WantedEma(**wanted)


def test_facts_and_model_card(run, tmp_path):
    out = export_run(run, tmp_path / "out").path
    facts = json.loads((out / "config.json").read_text())
    assert facts["model"] == {
        "preset": "T",
        "stage_sizes": [1, 2, 4],
        "stage_ends": [1 / 3, 2 / 3, 1],
        "parameters": 5185,
    }
    assert facts["progress"] == {"samples_seen": 1600, "step": 100}
    assert facts["source"]["dataset_ids"] == ["sha-of-the-data"]
    assert facts["config"]["ema"]["half_life_samples"] == [1000]
    card = (out / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front["library_name"] == "ecar_dist"
    assert "license" not in front
    for text in (
        "1,600 of 16,000",
        "sha-of-the-data",
        "half-life of 1,000 samples",
        "ZeRO-2",
        "no scores.json",
    ):
        assert text in card
    (run / "scores.json").write_text(json.dumps({"FD-digits": 12.25, "samples": 128, "samples_seen": 1600}))
    card = (export_run(run, tmp_path / "scored").path / "README.md").read_text()
    assert "| FD-digits | 12.25 |" in card
    assert "Of these weights, at 1600 samples seen, with samples=128" in card
    card = (export_run(run, tmp_path / "other", dtype="bf16").path / "README.md").read_text()
    assert "not exactly these weights" in card


def test_the_model_card_gives_the_steps_of_each_stage():
    each = {(8,): "8 midpoint steps", (4, 8): "4 and 8 midpoint steps", (4, 8, 16): "4, 8 and 16 midpoint steps"}
    assert {steps: f"{_steps(list(steps))} midpoint steps" for steps in each} == each


def test_an_export_has_no_credentials(run, tmp_path):
    out = export_run(run, tmp_path / "out").path
    assert "hunter2" in (run / "config.yaml").read_text()
    assert not [path for path in out.iterdir() if b"hunter2" in path.read_bytes()]
    assert load_config(out / "config.yaml").data.latents == "s3://bucket/latents"


def test_nothing_is_overwritten_and_no_partial_export_stays(run, tmp_path, monkeypatch):
    (tmp_path / "there").mkdir()
    with pytest.raises(CheckpointError, match="exists already"):
        export_run(run, tmp_path / "there")

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ecar_dist.runtime.export.write.write_json", full_disk)
    with pytest.raises(CheckpointError, match=r"cannot write .*out: No space left on device; free space"):
        export_run(run, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["there", "tiny"]
    with pytest.raises(ConfigError, match="--max-shard-gib 0 must be above 0"):
        export_run(run, tmp_path / "out", max_shard_gib=0)


# Post-hoc EMA: the weights follow a known path, so every EMA of them is known.
FACTORS = torch.tensor([1.0, -2.0, 3.0])


def keep_emas(run, config, steps, kinds=("ema", "ema1"), snapshot_every=25, since=None):
    """Snapshots and a last checkpoint of a run whose weights, after step i, are path[i] x FACTORS."""
    path = torch.cumsum(torch.randn(steps + 1, generator=torch.Generator().manual_seed(0)), 0).double()

    def emas_at(step):
        profiles = {kind: profile(decay, step, 16) for kind, decay in tracked_decays(config.ema).items()}
        return {kind: {"w": (torch.tensor(profiles[kind]) @ path[: step + 1]).float() * FACTORS} for kind in kinds}

    for step in range(snapshot_every, steps, snapshot_every):
        make_checkpoint(run / "ema", step, emas_at(step), ranks=1, ema=config.ema, since=since)
    whole = {**emas_at(steps), "master": {"w": path[-1].float() * FACTORS}}
    make_checkpoint(run / "checkpoints", steps, whole, ema=config.ema, since=since)
    return path


@pytest.mark.parametrize("wanted", [WantedEma(half_life=800), WantedEma(sigma_rel=0.15)])
def test_an_ema_that_was_not_kept_is_rebuilt(tmp_path, wanted, monkeypatch):
    monkeypatch.setattr(export_ema, "BLOCK", 2)
    run, config = make_run(tmp_path, ema={"half_life_samples": [400], "sigma_rel": [0.1]})
    path = keep_emas(run, config, 400, snapshot_every=10)
    exported = export_run(run, tmp_path / "out", wanted=wanted)
    truth = float(torch.tensor(profile(wanted.decay(config.ema), 400, 16)) @ path)
    average = json.loads((exported.path / "config.json").read_text())["average"]
    assert average["relative_residual"] < 0.02
    assert average["snapshots"] == 80
    rebuilt = load_file(exported.path / WEIGHTS)["w"] / FACTORS
    assert rebuilt.tolist() == pytest.approx([truth] * 3, abs=0.02 * float(path.std()))
    assert "relative_residual=0.0" in exported.summary
    assert "from 80 EMA snapshots" in (exported.path / "README.md").read_text()


def test_too_few_kept_emas_are_rejected_with_the_fix(tmp_path):
    run, config = make_run(tmp_path, ema={"half_life_samples": [400], "sigma_rel": [0.1]})
    keep_emas(run, config, 400, snapshot_every=400)
    with pytest.raises(CheckpointError, match=r"half_life_samples=32 .* 2 .* 3%; .*ema\.snapshot_every_samples"):
        export_run(run, tmp_path / "out", wanted=WantedEma(half_life=32))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("half_life", "allowed"), [(300, True), (200, False)])  # residuals of .016 and .089
def test_a_poor_fit_is_refused(tmp_path, half_life, allowed):
    run, config = make_run(tmp_path, ema={"half_life_samples": [400], "sigma_rel": [0.1]})
    keep_emas(run, config, 400, snapshot_every=80)
    if allowed:
        assert 0.01 < open_ema_weights(run, WantedEma(half_life=half_life)).facts["relative_residual"] < 0.03
    else:
        with pytest.raises(CheckpointError, match=r"half_life_samples=200 .* 8\.9%.* 3%"):
            open_ema_weights(run, WantedEma(half_life=half_life))


def test_a_damaged_snapshot_is_left_out_and_a_changed_batch_refused(tmp_path, capsys):
    run, config = make_run(tmp_path, ema={"half_life_samples": [400], "sigma_rel": [0.1]})
    keep_emas(run, config, 400, snapshot_every=20)
    with (run / "ema/step-00000200/state-00000-of-00001.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\xff")
    assert open_ema_weights(run, WantedEma(half_life=800)).facts["snapshots"] == 38
    assert "step-00000200 is damaged" in capsys.readouterr().err
    make_checkpoint(run / "ema", 399, state(kinds=("ema",)), batch=8)
    with pytest.raises(CheckpointError, match="the batch size changed"):
        open_ema_weights(run, WantedEma(half_life=800))


FOUND = {"tracked": {"half_life": 400}, "power": {"sigma_rel": 0.1}, "rebuilt": {"half_life": 800}}


def test_emas_are_found_by_description_not_by_number(tmp_path):
    """The config got a new half-life in front of the old ones; the newest checkpoint is older than that edit."""
    run, config = make_run(tmp_path, ema={"half_life_samples": [400], "sigma_rel": [0.1]})
    keep_emas(run, config, 400, snapshot_every=10)
    before = {name: open_ema_weights(run, WantedEma(**wanted)) for name, wanted in FOUND.items()}
    new = config.model_copy(update={"ema": EmaSection(half_life_samples=(99, 400), sigma_rel=(0.1,))})
    (run / "config.yaml").write_text(config_to_yaml(new))
    after = {name: open_ema_weights(run, WantedEma(**wanted)) for name, wanted in FOUND.items()}
    for name, average in before.items():
        assert torch.equal(average["w"], after[name]["w"]), name
    assert not torch.equal(after["tracked"]["w"], after["power"]["w"])


def test_an_export_describes_the_ema_of_the_checkpoint_not_of_a_later_config(tmp_path):
    run, config = make_run(tmp_path, ema={"half_life_samples": [50]})
    make_checkpoint(run / "checkpoints", 100, state(), ema=config.ema)
    new = config.model_copy(update={"ema": EmaSection(half_life_samples=(100_000,))})
    (run / "config.yaml").write_text(config_to_yaml(new))
    exported = export_run(run, tmp_path / "out")
    assert "meaning=half-life 50, ramp-up 0.1" in exported.summary
    assert "an EMA of the weights (half-life 50, ramp-up 0.1)" in (exported.path / "README.md").read_text()


def test_an_ema_that_started_later_is_not_part_of_a_fit(tmp_path):
    run, config = make_run(tmp_path, ema={"half_life_samples": [400], "sigma_rel": [0.1]})
    keep_emas(run, config, 400, snapshot_every=10, since={"ema1": 40})
    assert open_ema_weights(run, WantedEma(half_life=300)).facts["snapshots"] == 40  # only those of the other EMA
    run, config = make_run(tmp_path / "both", ema={"half_life_samples": [400], "sigma_rel": [0.1]})
    keep_emas(run, config, 400, snapshot_every=10, since={"ema": 40, "ema1": 40})
    with pytest.raises(CheckpointError, match="no EMA that started at step 0"):
        open_ema_weights(run, WantedEma(half_life=800))


# What a reader refuses.


def refused(out, match):
    with pytest.raises(CheckpointError, match=match) as caught:
        ExportReader(out)
    assert "\n" not in str(caught.value)


@pytest.fixture
def out(run, tmp_path):
    return export_run(run, tmp_path / "out", max_shard_gib=12_290 / GIB).path


def rewrite(path, change):
    tree = json.loads(path.read_text())
    change(tree)
    path.write_text(json.dumps(tree))


@pytest.mark.parametrize("name", ["../tiny/config.yaml", "/etc/passwd", "a/b", "..", "", ".hidden", None, 3, "a\nb"])
def test_a_name_that_leads_elsewhere_is_refused(out, name):
    rewrite(out / "config.json", lambda tree: tree["files"][0].update(name=name))
    refused(out, r"files\.0\.name")


def test_a_link_out_of_the_folder_is_refused_and_one_inside_is_not(out, tmp_path):
    shard = out / "model-00001-of-00003.safetensors"
    shard.rename(out / "inside")
    shard.symlink_to("inside")
    ExportReader(out)
    (out / "inside").rename(tmp_path / "outside")
    shard.unlink()
    shard.symlink_to(tmp_path / "outside")
    refused(out, "is a link out of its folder")
    shard.unlink()
    os.mkfifo(shard)
    refused(out, "is not a regular file")


def test_a_damaged_shard_is_rejected_before_it_is_read(out):
    shard = out / "model-00002-of-00003.safetensors"
    content = shard.read_bytes()
    shard.write_bytes(content[:-1])
    refused(out, r"has 12\d+ bytes, expected 12\d+")
    shard.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    refused(out, r"xxh3_128 [0-9a-f]{32}\b.* [0-9a-f]{32}\b")
    shard.unlink()
    refused(out, "No such file")


def test_an_index_that_differs_from_the_files_is_refused(out):
    rewrite(out / INDEX, lambda tree: tree["weight_map"].update({"a.bias": "../../secret"}))
    refused(out, "does not match the files next to it")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"{", "it is not JSON"),
        (b"[]", "a JSON list, not an object"),
        (b'{"a": ' * 100_000, "it is nested deeper than 32"),
        (b'{"a": ' * 40 + b"1" + b"}" * 40, "it is nested deeper than 32"),
        (b'{"a": ' + b"9" * 5000 + b"}", "it is not JSON"),
        (b'{"schema": "other"}', "schema: "),
        (b'{"schema": "ecar-export-v1", "files": 3}', "dtype: "),
        (b"\xff\xfe", "not UTF-8"),
    ],
)
def test_invalid_json(out, content, said):
    (out / "config.json").write_bytes(content)
    refused(out, said)


@pytest.mark.parametrize(
    "change",
    [
        lambda held: held["a.bias"].fill_(float("nan")),
        lambda held: held["a.bias"].fill_(float("inf")),
        lambda held: held.update({"a.bias": held["a.bias"].view(torch.int32)}),
        lambda held: held.update({"a.bias": held["a.bias"].half()}),
        lambda held: held.update({"b.weight": held["a.bias"]}),  # it is in the second file too
    ],
)
def test_values_of_another_type_or_that_are_not_finite_are_refused(out, change):
    """The hashes are right, and so is the index."""
    file = out / "model-00001-of-00003.safetensors"
    held = load_file(file)
    change(held)
    save_file({name: value.clone() for name, value in held.items()}, file)
    content = file.read_bytes()
    said = {"bytes": len(content), "xxh3_128": xxhash.xxh3_128_hexdigest(content)}
    rewrite(out / "config.json", lambda tree: tree["files"][0].update(said))
    with pytest.raises(CheckpointError) as caught:
        dict(ExportReader(out))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        lambda tree: tree["progress"].update(samples_seen=10**30),
        lambda tree: tree["progress"].update(step=-1),
        lambda tree: tree["files"][0].update(bytes=-1),
        lambda tree: tree["files"][0].update(xxh3_128=None),
        lambda tree: tree.update(identity=[]),
        lambda tree: tree.update(dtype="int8"),
        lambda tree: tree.update(files=[]),
        *(lambda tree, name=name: tree.pop(name) for name in ("schema", "files", "progress", "identity", "dtype")),
    ],
)
def test_facts_that_are_missing_or_odd_are_refused(out, change):
    rewrite(out / "config.json", change)
    refused(out, r"config\.json")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json", "model-00001-of-00003.safetensors"])
@pytest.mark.parametrize("make", [pipe, folder, device, loop, link_out, sparse])
def test_pipes_folders_and_links_are_refused_without_waiting(out, name, make):
    content = (out / name).read_bytes()
    (out / name).unlink()
    make(out / name, content)
    with in_time(), pytest.raises(CheckpointError) as caught:
        ExportReader(out)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("scores", [b"[]", b"\xff", b"{", b'{"FD": 1' + b"0" * 400 + b"}"])
def test_scores_that_are_damaged_end_in_one_line_or_are_left_out(run, tmp_path, scores):
    (run / "scores.json").write_bytes(scores)
    if scores.startswith(b'{"'):
        assert "no scores.json" in (export_run(run, tmp_path / "out").path / "README.md").read_text()
        return
    with pytest.raises(CheckpointError, match=r"scores\.json"):
        export_run(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_json_is_bounded_before_it_is_parsed(out):
    os.truncate(out / "config.json", MAX_JSON_BYTES + 1)
    refused(out, f"{MAX_JSON_BYTES:,} are read")
    (out / "config.json").unlink()
    refused(out, "cannot read")


MEMORY = """
import re, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from ecar_dist.runtime.export import write as module

def anonymous():
    return int(re.search(r"RssAnon:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024

peak, before = 0.0, anonymous()
original = module.write_tensor_file

def watched(path, entries, metadata):
    def watch(make):
        def made():
            global peak
            tensor = make()
            peak = max(peak, anonymous() - before)
            return tensor
        return made
    return original(path, [type(e)(e.name, e.dtype, e.shape, watch(e.make)) for e in entries], metadata)

module.write_tensor_file = watched
module.export_run(Path(sys.argv[1]), Path(sys.argv[2]))
print(peak)
"""


def test_memory_does_not_grow_with_the_model(tmp_path):
    """32 tensors of 4 MiB, 128 in all. glibc returns freed memory to the system, so that only live memory is seen."""
    run, _ = make_run(tmp_path)
    value = torch.zeros(1 << 20)
    make_checkpoint(run / "checkpoints", 1, {"ema": {f"p{i}": value for i in range(32)}})
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(run), str(tmp_path / "out")],
        capture_output=True,
        text=True,
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "MALLOC_MMAP_THRESHOLD_": "65536",
            "PYTHONPATH": str(Path(__file__).parents[3]),
        },
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / WEIGHTS).stat().st_size > 128 << 20
    assert 3 < float(done.stdout.splitlines()[-1]) < 10  # MiB; the peak includes the current tensor
