"""`ecar-dist` as a user sees it: what works, and one line with the fix for what does not."""

import contextlib
import dataclasses
import io
import json
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from ecar_dist.cli import main
from ecar_dist.commands.training import on_record
from ecar_dist.data.shards.manifest import load_manifest, write_manifest
from ecar_dist.data.shards.read import open_latent_shard
from ecar_dist.data.shards.write import ShardContent, write_latent_shard
from ecar_dist.errors import DataError, FruitlessError, NodeError
from ecar_dist.runtime.checkpoint.files import committed
from tests.conftest import read_metrics, train_on_ranks, write_yaml
from tests.fork_server import run_forked


def fails(capsys, *arguments, status=1):
    """Run a command that must fail; returns its one error line. Training runs in its own process, as in real use."""
    command = [str(argument) for argument in arguments]
    if command[0] == "train":
        done = run_forked(*command)
        ended, said = done.returncode, done.stderr
    else:
        capsys.readouterr()
        ended, said = main(command), capsys.readouterr().err
    lines = [line for line in said.splitlines() if line.startswith("ecar-dist: ")]
    assert ended == status, said
    assert len(lines) == 1, said
    assert "Traceback" not in said
    return lines[0]


@pytest.fixture(scope="module")
def trained(digits, make_tree, tmp_path_factory):
    """A finished tiny run: config path and run directory."""
    folder = tmp_path_factory.mktemp("trained")
    tree = make_tree(folder)
    tree["data"].update(train_images=str(digits / "images/train"), heldout_images=str(digits / "images/heldout"))
    tree["sample"] = {"steps_per_stage": 2, "every_samples": 48}
    tree["log"]["tensorboard"] = True
    config = write_yaml(tree, folder)
    done = run_forked("train", str(config))
    assert done.returncode == 0, done.stderr
    return config, folder / "runs/tiny", done.stdout


def test_training_says_what_it_does_and_leaves_the_documented_directory(trained):
    _, run, out = trained
    assert "\n1 rank on cpu, ZeRO-2, fp32; global batch 16 = 4 x 4 x 1 rank\n" in out
    assert "step 6/6" in out
    assert "left" in out
    assert {path.name for path in run.iterdir()} >= {
        "config.yaml",
        "lineage.json",
        "metrics.jsonl",
        "tb",
        "checkpoints",
    }
    line = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert {"step", "samples_seen", "train/loss", "train/loss_stage0", "train/loss_stage2", "train/grad_norm"} <= set(
        line
    )
    assert {"train/lr", "perf/samples_per_second", "perf/data_wait_fraction", "mem/peak_gib"} <= set(line)


def test_tensorboard_holds_the_curve_and_the_stage_strips(trained):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(trained[1] / "tb"))
    events.Reload()
    assert [point.step for point in events.Scalars("train/loss")] == [1, 2, 3, 4, 5, 6]
    assert [point.step for point in events.Images("samples/stages")] == [3, 6]
    shown = [Image.open(io.BytesIO(point.encoded_image_string)) for point in events.Images("samples/stages")]
    kept = [Image.open(trained[1] / f"samples/step-{step:08d}.png") for step in (3, 6)]
    assert [np.asarray(one).tolist() for one in kept] == [np.asarray(one).tolist() for one in shown]
    logged = [json.loads(line) for line in (trained[1] / "metrics.jsonl").read_text().splitlines()]
    assert [point.value for point in events.Scalars("train/loss")] == pytest.approx([x["train/loss"] for x in logged])


def test_tensorboard_has_the_config_as_yaml_and_a_layout_of_charts(trained):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.custom_scalar.layout_pb2 import Layout

    events = EventAccumulator(str(trained[1] / "tb"))
    events.Reload()
    (text,) = events.Tensors("config/text_summary")
    shown = text.tensor_proto.string_val[0].decode()
    assert shown.startswith("```yaml\n")
    assert yaml.safe_load(shown.removeprefix("```yaml\n").removesuffix("```\n"))["run"]["name"] == "tiny"
    (layout,) = events.Tensors("custom_scalars__config__")
    groups = Layout.FromString(layout.tensor_proto.string_val[0]).category
    patterns = {tag for group in groups for chart in group.chart for tag in chart.multiline.tag}
    tags = events.Tags()["scalars"]
    assert groups[0].title == "loss"
    for pattern in ("^train/loss$", r"^train/loss_stage\d+$", "^perf/samples_per_second$"):
        assert pattern in patterns
        assert any(re.match(pattern, tag) for tag in tags)


def test_what_is_printed_is_also_in_the_run_directory(trained):
    _, run, out = trained
    (log,) = (run / "logs").glob("console-*.log")
    assert log.name == f"console-{json.loads((run / 'lineage.json').read_text())[0]['attempt']}.log"
    assert set(out.splitlines()) <= set(log.read_text().splitlines())


def test_a_finished_run_is_done_when_run_again(trained):
    config, run, _ = trained
    before = (run / "metrics.jsonl").read_text()
    done = run_forked("train", str(config))
    assert done.returncode == 0
    assert "resuming at step 6" in done.stdout
    assert (run / "metrics.jsonl").read_text() == before


def test_one_process_needs_no_port(write_config):
    """Two single-process runs on one machine must not share the default port. A closed stdout does no harm."""
    with socket.socket() as taken:
        with contextlib.suppress(OSError):  # if another process has it, that is fine too
            taken.bind(("127.0.0.1", 29500))
            taken.listen()
        command = [sys.executable, "-m", "ecar_dist", "train", str(write_config()), "train.total_samples=16"]
        done = subprocess.run(["bash", "-c", 'exec "$@" >&-', "bash", *command], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_sample_from_a_run_and_from_its_export_gives_the_same_pictures(trained, tmp_path):
    _, run, _ = trained
    assert main(["checkpoint", "export", str(run), "--out", str(tmp_path / "export")]) == 0
    for source, out in ((run, "a"), (tmp_path / "export", "b")):
        options = ["--labels", "3,1", "--count", "6", "--out", str(tmp_path / out), "--seed", "5", "--batch-size", "4"]
        assert main(["sample", str(source), *options]) == 0
    names = sorted(path.name for path in (tmp_path / "a/images").iterdir())
    assert names == [f"{i:06d}-class{(3, 1)[i % 2]}.png" for i in range(6)]
    for name in ("grid.png", "stages.png", *(f"images/{name}" for name in names)):
        ours, theirs = (np.asarray(Image.open(tmp_path / out / name)) for out in ("a", "b"))
        assert np.array_equal(ours, theirs), name
    assert Image.open(tmp_path / "a/images" / names[0]).size == (32, 32)


def test_a_grid_stays_small_whatever_is_drawn(trained, tmp_path, monkeypatch):
    monkeypatch.setattr("ecar_dist.sample.pictures.GRID_ROWS", 2)
    monkeypatch.setattr("ecar_dist.sample.pictures.GRID_COLUMNS", 3)
    options = ["--count", "40", "--batch-size", "16", "--out", str(tmp_path / "many")]
    assert main(["sample", str(trained[1]), *options]) == 0
    assert len(list((tmp_path / "many/images").iterdir())) == 40
    side, margin = 64, 2  # only classes 0 to 2, two of each; the same three in the strip
    assert Image.open(tmp_path / "many/grid.png").size == (
        margin + 3 * (side + margin),
        14 + margin + 2 * (side + margin),
    )
    assert 0 < Image.open(tmp_path / "many/stages.png").width - (margin + 3 * (side + margin)) < 100  # names of stages


def test_sample_compiles_where_it_is_told_to_and_leaves_nothing_where_it_cannot(trained, tmp_path, monkeypatch, capsys):
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    from ecar_dist.runtime import compiler
    from ecar_dist.sample import fast

    def sample(out, *more):
        return main(["sample", str(trained[1]), "--count", "6", "--batch-size", "4", "--out", str(out), *more])

    compiled, batches, folders = [], [], set()

    def keep(function, mode=None):
        compiled.append(function.__name__)
        folders.add(cache_dir())

        def called(x, *rest, **more):
            if torch.is_tensor(x):
                batches.append(len(x))
            return function(x, *rest, **more)

        return called

    for module in (fast, compiler):
        monkeypatch.setattr(module, "compiled", keep)
    assert sample(tmp_path / "plain") == 0
    assert not compiled
    assert sample(tmp_path / "compiled", "--compile") == 0
    assert compiled == ["sin", "begin_stage", "velocity"]
    (folder,) = folders
    assert "ecar-compiled-" in folder
    assert not Path(folder).exists()
    assert set(batches) == {4, 8}  # the last batch, of two, is filled up
    grids = [np.asarray(Image.open(tmp_path / out / "grid.png")).astype(int) for out in ("plain", "compiled")]
    assert np.abs(grids[0] - grids[1]).max() <= 1
    monkeypatch.setattr(fast, "compiler_fault", lambda device: "no compiler")
    said = fails(capsys, "sample", trained[1], "--out", tmp_path / "none", "--compile")
    assert "nothing can be compiled on cpu here (no compiler)" in said
    assert not (tmp_path / "none").exists()


def test_evaluate_writes_scores(trained, quick_classifier, tmp_path):
    _, run, _ = trained
    more = ["--out", str(tmp_path / "scores.json"), "--neighbours", str(tmp_path / "near.png")]
    assert main(["evaluate", str(run), "--count", "128", *more]) == 0
    near = np.asarray(Image.open(tmp_path / "near.png"))
    assert near.shape[0] == 14 + 2 + 4 * (64 + 2)  # a sample and three training images, under the names
    assert near.shape[1] > 2 + 10 * (64 + 2)  # all classes, even with fewer samples than training images
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores["FD-digits"] > scores["FD-digits real-vs-real floor"] > 0
    assert 0 <= scores["class accuracy"] < 0.9 < scores["class accuracy real heldout"]
    assert (scores["samples"], scores["heldout"], scores["samples_seen"]) == (128, 359, 96)


def test_checkpoint_verbs(trained, capsys):
    _, run, _ = trained
    assert main(["checkpoint", "list", str(run)]) == 0
    assert capsys.readouterr().out.count("samples") == 3
    assert main(["checkpoint", "verify", str(run)]) == 0
    assert main(["checkpoint", "inspect", str(run)]) == 0
    assert "flow.num_stages: 3" in capsys.readouterr().out
    assert main(["checkpoint", "inspect", str(run), "--step", "4", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["progress"] == {"samples_seen": 64, "step": 4}
    assert main(["checkpoint", "diff", str(run), str(run / "checkpoints/step-00000004")]) == 0
    assert re.search(r"^all +\d", capsys.readouterr().out, re.MULTILINE)
    assert main(["checkpoint", "diff", str(run), str(run)]) == 0
    assert "equal" in capsys.readouterr().out


def test_check_names_what_is_not_a_default(tree, write_config, capsys):
    assert main(["check", str(write_config()), "flow.context.tau=0.4"]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("# non-default values: "))
    assert "run.name=tiny, " in line
    assert ", flow.context.tau=0.4, " in line
    assert "flow.gamma" not in line


def test_check_says_what_a_typo_meant(write_config, capsys):
    assert "did you mean train.total_samples?" in fails(capsys, "check", write_config(), "train.total_sample=1")


def test_check_tells_a_job_script_where_the_run_is_and_how_many_nodes_it_can_use(write_config, tmp_path, capsys):
    config = write_config()
    for nodes, usable in (("4", 2), ("2", 2), ("1", 1)):  # 16 samples in micro-batches of 4, on 2 ranks a node
        assert main(["check", str(config), "--job", nodes, "2"]) == 0
        assert capsys.readouterr().out == f"{tmp_path}/runs/tiny\n{usable}\n"
    assert main(["check", str(config), "run.dir=elsewhere", "--job", "3", "1"]) == 0
    assert capsys.readouterr().out == f"{Path.cwd()}/elsewhere/tiny\n2\n"
    assert "batch.global_batch_size=" in fails(capsys, "check", config, "--job", "4", "3")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("end", "status"),
    [
        (0, 0),
        (75, 75),
        (DataError("a shard is cut"), 1),
        (FruitlessError("again"), 93),
        (NodeError("n2"), 75),
        (KeyboardInterrupt(), 130),
        (ZeroDivisionError(), 1),
    ],
    ids=str,
)
def test_the_first_rank_leaves_its_exit_status_for_the_job_script(tmp_path, monkeypatch, end, status):
    file = tmp_path / "exit-status"
    monkeypatch.setenv("ECAR_JOB_LOGS", str(tmp_path))

    def action():
        assert file.read_text() == ""
        if isinstance(end, BaseException):
            raise end
        return end

    for variable in ("RANK", "SLURM_PROCID"):
        monkeypatch.delenv(variable, raising=False)
    with contextlib.suppress(type(end)) if isinstance(end, BaseException) else contextlib.nullcontext():
        assert on_record(action) == status
    assert file.read_text() == f"{status}\n"
    file.unlink()
    for variable in ("RANK", "SLURM_PROCID"):
        monkeypatch.setenv(variable, "1")
        assert on_record(lambda: 0) == 0
        assert not file.exists()


@pytest.mark.parametrize("damage", ["gone", "cut"])
def test_a_missing_or_truncated_shard(write_config, tree, digits, tmp_path, capsys, damage):
    latents = shutil.copytree(digits / "latents", tmp_path / "latents")
    shard = latents / "000001.tar"
    if damage == "gone":
        shard.unlink()
    else:
        shard.write_bytes(shard.read_bytes()[:-512])
    tree["data"]["latents"] = str(latents)
    assert "000001.tar" in fails(capsys, "train", write_config())
    assert not (tmp_path / "runs/tiny/checkpoints").exists() or not committed(tmp_path / "runs/tiny/checkpoints")


def test_no_manifest(write_config, tree, tmp_path, capsys):
    tree["data"]["latents"] = str(tmp_path)
    assert "make it with `ecar-data finalize" in fails(capsys, "train", write_config())
    assert not (tmp_path / "runs").exists()


def test_latents_of_another_autoencoder(write_config, tree, digits, tmp_path, capsys):
    latents = shutil.copytree(digits / "latents", tmp_path / "latents")
    manifest = load_manifest(latents)
    write_manifest(latents, dataclasses.replace(manifest, encoder={**manifest.encoder, "scaling_factor": 7.0}))
    tree["data"]["latents"] = str(latents)
    said = fails(capsys, "train", write_config())
    assert "scaling_factor=7.0" in said
    assert "encode them again" in said
    assert not (tmp_path / "runs").exists()


def test_latents_of_another_shape(write_config, tree, capsys):
    tree["data"]["latent_channels"] = 4
    assert "set data.latent_channels=12" in fails(capsys, "train", write_config())


def test_a_label_outside_the_range(write_config, tree, digits, tmp_path, capsys):
    source, folder = load_manifest(digits / "latents"), tmp_path / "latents"
    folder.mkdir()
    shard = open_latent_shard(digits / "latents/000000.tar", source.shards[0], source)
    labels = shard.labels.copy()
    labels[17] = 10
    entry = write_latent_shard(folder, 0, ShardContent(0, np.array(shard.moments), labels), {})
    write_manifest(folder, dataclasses.replace(source, count=len(labels), shards=[entry]))
    tree["data"]["latents"] = str(folder)
    said = fails(capsys, "train", write_config())
    assert "000000000017" in said
    assert "10" in said
    assert not committed(tmp_path / "runs/tiny/checkpoints")


def test_an_occupied_directory(write_config, tmp_path, capsys):
    (tmp_path / "runs/tiny").mkdir(parents=True)
    (tmp_path / "runs/tiny/thesis.tex").write_text("mine")
    assert "is not empty and contains no run" in fails(capsys, "train", write_config())
    assert [path.name for path in (tmp_path / "runs/tiny").iterdir()] == ["thesis.tex"]


def test_a_batch_that_does_not_multiply_out(write_config, capsys):
    said = fails(capsys, "train", write_config(), "batch.global_batch_size=18")
    assert "batch.global_batch_size=16 or 20" in said


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("flow.num_stages=2", "flow.num_stages"),
        ("flow.context.tau=0.5", "flow.context.tau"),
    ],
)
def test_a_checkpoint_of_another_model(trained, capsys, override, key):
    config, run, _ = trained
    before = {path: path.read_bytes() for path in (run / "config.yaml", run / "metrics.jsonl")}
    said = fails(capsys, "train", config, override)
    assert key in said
    assert "choose another run.name" in said
    assert {path: path.read_bytes() for path in before} == before


def test_overrides_may_stand_after_a_flag(write_config, capsys):
    plan = ["plan", str(write_config()), "batch.micro_batch_size=8", "--world-size", "2", "batch.global_batch_size=32"]
    assert main(plan) == 0
    capsys.readouterr()
    for wrong in (["plan", "x.yaml", "--nope"], ["checkpoint", "list", "x", "a.b=c"]):
        with pytest.raises(SystemExit):
            main(wrong)
        assert "unrecognized arguments" in capsys.readouterr().err


def test_a_fault_on_purpose_that_is_none_is_refused(write_config, capsys, monkeypatch):
    for point in ("train.loss:step=5:nann", "garbage", "train.loss:step=x:nan"):
        monkeypatch.setenv("ECAR_FAILPOINT", point)
        assert f"ECAR_FAILPOINT: '{point}' is not SITE" in fails(capsys, "train", write_config())


def test_another_order_of_the_data_needs_the_word(write_config, tmp_path, capsys):
    config = write_config()
    train_on_ranks(1, config, "train.total_samples=32")
    said = fails(capsys, "train", config, "run.seed=1")
    assert re.search("run.seed=0.* run.seed=1.* --new-data-order", said)
    done = run_forked("train", str(config), "run.seed=1", "optim.learning_rate=5e-4", "--new-data-order")
    assert done.returncode == 0, done.stderr
    assert "new data order from here on: run.seed=0 -> 1" in done.stdout
    assert "config on resume: optim.learning_rate 0.001 -> 0.0005 (changes optimisation)" in done.stdout
    assert [line["step"] for line in read_metrics(config)] == [1, 2, 3, 4, 5, 6]


def test_adopting_nothing_fails_and_leaves_nothing(write_config, tmp_path, capsys):
    config = write_config()
    kept = tmp_path / "kept"
    (kept / "other/step-00000050").mkdir(parents=True)
    (kept / "other/step-00000050/COMMITTED").touch()
    words = ["run.name=ft2", f"checkpoint.dir={kept}", "--adopt"]
    said = fails(capsys, "train", config, *words)
    assert f"{kept}/ft2" in said
    assert f"step-00000050 in {kept}/other" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.yaml", "kept"]
    assert [path.name for path in kept.iterdir()] == ["other"]


def test_a_loss_that_is_never_finite_ends_the_run_with_93(write_config, tmp_path, capsys):
    said = fails(
        capsys, "train", write_config(), "optim.learning_rate=1e30", "checkpoint.every_samples=1000", status=93
    )
    assert "step 4 " in said
    assert "bad_steps.jsonl" in said
    assert not committed(tmp_path / "runs/tiny/checkpoints")
    attempt = json.loads((tmp_path / "runs/tiny/lineage.json").read_text())[-1]
    assert attempt["reason"].startswith("gave up: step 4 is bad like those before it")


def test_sampling_what_is_no_run(tmp_path, capsys):
    assert "contains no config.yaml" in fails(capsys, "sample", tmp_path, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_sampling_a_class_that_does_not_exist(trained, tmp_path, capsys):
    said = fails(capsys, "sample", trained[1], "--labels", "3,10", "--out", tmp_path / "out")
    assert "label 10 is outside 0..9" in said


def test_sampling_into_an_occupied_folder(trained, tmp_path, capsys):
    (tmp_path / "mine").write_text("")
    assert "is not empty" in fails(capsys, "sample", trained[1], "--out", tmp_path)


def test_the_deepspeed_launchers_argument_is_accepted(write_config, capsys):
    assert main(["--local_rank=1", "check", str(write_config())]) == 0


def test_help_of_every_command(capsys):
    for command in (
        [],
        ["train"],
        ["preflight"],
        ["sample"],
        ["evaluate"],
        ["plan"],
        ["checkpoint"],
        ["checkpoint", "export"],
    ):
        with pytest.raises(SystemExit) as caught:
            main([*command, "--help"])
        assert caught.value.code == 0
