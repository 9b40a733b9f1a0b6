"""`ecar-data import`: latents of other programs become latent shards, unscaled, with their labels."""

import os
import pickle
import re

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from data_tools.cli import main
from data_tools.foreign import run
from ecar_dist.cli import main as ecar_dist
from ecar_dist.data.shards.manifest import load_manifest
from ecar_dist.data.shards.read import open_latent_shard
from ecar_dist.vae.pretrained import new_autoencoder, save_autoencoder
from tests.data_tools.image_folders import content

SHAPE = (12, 4, 4)  # of dct-f8 for 32 pixels
GENERATOR = np.random.default_rng(0)


def latents(count, shape=SHAPE):
    return GENERATOR.normal(size=(count, *shape)).astype(np.float16).astype(np.float32)


def imported(source, out, *more, vae="dct-f8"):
    return main(["import", str(source), str(out), "--vae", str(vae), "--samples-per-shard", "4", *more])


def samples_of(out):
    """All samples of a set, sorted by label and first value: moments, mirrored moments or None, labels."""
    manifest = load_manifest(out)
    shards = [open_latent_shard(out / entry.name, entry, manifest) for entry in manifest.shards]
    moments = np.concatenate([shard.moments for shard in shards]).astype(np.float32)
    labels = np.concatenate([shard.labels for shard in shards])
    order = np.lexsort([moments[:, 0, 0, 0], labels])
    flipped = np.concatenate([shard.mirrored for shard in shards])[order] if manifest.has_flip else None
    return moments[order], flipped, labels[order]


def in_order(moments, labels):
    return moments[np.lexsort([moments[:, 0, 0, 0], labels])]


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    """A KL autoencoder of 2 channels that shrinks by 2."""
    folder = tmp_path_factory.mktemp("vae")
    save_autoencoder(new_autoencoder([8, 8], 2, layers_per_block=1), folder, scaling_factor=0.5, shift_factor=0.1)
    return folder


def save(path, array):
    tensor = torch.from_numpy(array)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".npy":
        np.save(path, array)
    elif path.suffix == ".pt":
        torch.save(tensor.bfloat16() if path.stem == "bf16" else tensor, path)
    elif path.suffix == ".safetensors":
        save_file({"latents": tensor}, path)
    else:
        np.savez(path, moments=array)


@pytest.mark.parametrize("extension", ["npy", "pt", "safetensors", "npz"])
def test_one_file_a_sample_in_class_folders(tmp_path, extension):
    given = latents(6)
    for place, array in enumerate(given):
        save(tmp_path / "in" / ("dog" if place % 2 else "cat") / "deep" / f"{place}.{extension}", array)
    assert imported(tmp_path / "in", tmp_path / "out") == 0
    assert load_manifest(tmp_path / "out").class_names == ["cat", "dog"]
    moments, flipped, labels = samples_of(tmp_path / "out")
    assert flipped is None
    assert labels.tolist() == [0, 0, 0, 1, 1, 1]
    np.testing.assert_array_equal(moments, in_order(given, np.arange(6) % 2))
    assert main(["verify", str(tmp_path / "out")]) == 0


@pytest.mark.parametrize("kind", ["npy", "pt", "txt"])
def test_arrays_with_a_file_of_labels(tmp_path, kind):
    given, labels = latents(9), np.arange(9) % 3
    (tmp_path / "in").mkdir()
    save(tmp_path / "in/0.npy", given[:4])
    save(tmp_path / "in/1.pt", given[4:])
    file = tmp_path / f"labels.{kind}"
    if kind == "npy":
        np.save(file, labels)
    elif kind == "pt":
        torch.save(torch.from_numpy(labels), file)
    else:
        file.write_text("\n".join(map(str, labels)))
    names = tmp_path / "names.txt"
    names.write_text("a\nb\nc\n")
    assert imported(tmp_path / "in", tmp_path / "out", "--labels", str(file), "--classes", str(names)) == 0
    assert load_manifest(tmp_path / "out").class_names == ["a", "b", "c"]
    moments, _, found = samples_of(tmp_path / "out")
    assert found.tolist() == sorted(labels)
    np.testing.assert_array_equal(moments, in_order(given, labels))


def test_shards_of_lightningdit(tmp_path, vae):
    """safetensors with samples of the posterior, mirrored ones and labels, with the statistics next to them."""
    given = latents(7, (2, 4, 4))
    (tmp_path / "in").mkdir()
    for number, part in enumerate((given[:3], given[3:])):
        labels = torch.arange(len(part)) % 2
        straight = torch.from_numpy(part)
        tensors = {"latents": straight, "latents_flip": straight.flip(-1).contiguous(), "labels": labels}
        save_file(tensors, tmp_path / f"in/latents_rank00_shard{number:03d}.safetensors")
    torch.save({"mean": torch.zeros(1, 2, 1, 1), "std": torch.ones(1, 2, 1, 1)}, tmp_path / "in/latents_stats.pt")
    assert imported(tmp_path / "in", tmp_path / "out", vae=vae) == 0
    moments, flipped, labels = samples_of(tmp_path / "out")
    assert labels.tolist() == [0, 0, 0, 0, 1, 1, 1]
    np.testing.assert_array_equal(moments[:, :2], in_order(given, np.array([0, 1, 0, 0, 1, 0, 1])))
    np.testing.assert_array_equal(flipped[:, :2], moments[:, :2, :, ::-1])
    assert (moments[:, 2:] == -30).all(), "a sample has no variance"


def test_cached_moments_of_mar(tmp_path, vae):
    given = latents(3, (4, 4, 4))
    for place, array in enumerate(given):
        path = tmp_path / "in" / f"n0{place % 2}" / f"{place}.JPEG.npz"
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez(path, moments=array, moments_flip=array[..., ::-1])
    assert imported(tmp_path / "in", tmp_path / "out", vae=vae) == 0
    moments, flipped, labels = samples_of(tmp_path / "out")
    assert labels.tolist() == [0, 0, 1]
    np.testing.assert_array_equal(moments, in_order(given, np.array([0, 1, 0])))
    np.testing.assert_array_equal(flipped, moments[..., ::-1])


def test_a_scale_is_taken_off(tmp_path, vae):
    raw = latents(2, (4, 2, 2))
    stored = raw.copy()
    stored[:, :2] = (raw[:, :2] - 0.5) * 4.0
    stored[:, 2:] += 2 * np.log(4.0)
    np.save(tmp_path / "in.npy", stored)
    assert (
        imported(tmp_path / "in.npy", tmp_path / "out", "--labels", "none", "--scale", "4", "--shift", "0.5", vae=vae)
        == 0
    )
    np.testing.assert_allclose(samples_of(tmp_path / "out")[0], in_order(raw, np.zeros(2)), atol=2e-3)
    assert load_manifest(tmp_path / "out").preprocessing["scale"] == 4.0


def test_a_scale_that_is_not_that_of_the_autoencoder_is_reported(tmp_path, capsys):
    np.save(tmp_path / "in.npy", latents(4) * 0.01)
    assert imported(tmp_path / "in.npy", tmp_path / "out", "--labels", "none") == 0
    assert re.search(r"deviation of 0\.0\d+, about 1 is expected", capsys.readouterr().out)


def test_the_same_command_continues(tmp_path, monkeypatch):
    np.save(tmp_path / "in.npy", latents(11))
    assert imported(tmp_path / "in.npy", tmp_path / "whole", "--labels", "none") == 0
    original = run.commit
    with monkeypatch.context() as patch:
        patch.setattr(run, "commit", lambda out, index, *more: original(out, index, *more) if index < 1 else 1 / 0)
        with pytest.raises(ZeroDivisionError):
            imported(tmp_path / "in.npy", tmp_path / "out", "--labels", "none")
    kept = (tmp_path / "out/000000.tar").stat().st_mtime_ns
    assert not (tmp_path / "out/manifest.json").exists()
    assert imported(tmp_path / "in.npy", tmp_path / "out", "--labels", "none") == 0
    assert (tmp_path / "out/000000.tar").stat().st_mtime_ns == kept
    assert content(tmp_path / "out") == content(tmp_path / "whole")


def test_init_and_check_accept_it(tmp_path, capsys):
    np.save(tmp_path / "in.npy", latents(20))
    assert imported(tmp_path / "in.npy", tmp_path / "out", "--labels", "none") == 0
    capsys.readouterr()
    assert ecar_dist(["init", str(tmp_path / "out")]) == 0
    (tmp_path / "mine.yaml").write_text(capsys.readouterr().out)
    assert ecar_dist(["check", str(tmp_path / "mine.yaml")]) == 0


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


def in_folders(change):
    """Class folders with two good files and a changed one, c/bad.npy."""

    def write(root):
        for place, array in enumerate(latents(2)):
            save(root / "in/a" / f"{place}.npy", array)
        (root / "in/c").mkdir()
        change(root / "in/c")
        return root / "in"

    return write


def array(values, name="bad.npy"):
    return in_folders(lambda folder: np.save(folder / name, values))


def one_array(values=None, **labels):
    def write(root):
        np.save(root / "in.npy", latents(3) if values is None else values)
        for name, text in labels.items():
            (root / f"{name}.txt").write_text(text)
        return root / "in.npy"

    return write


def both(root):
    save(root / "in/a/0.npy", latents(1)[0])
    save(root / "in/1.npy", latents(2))
    return root / "in"


BAD = {
    "NaN": (array(np.full(SHAPE, np.nan, np.float32)), [], r"c/bad\.npy .*not finite"),
    "another shape": (array(np.zeros((12, 4, 8), np.float32)), [], r"c/bad\.npy .*\[12, 4, 8\].*\[12, 4, 4\]"),
    "integers": (array(np.zeros(SHAPE, np.int64)), [], r"c/bad\.npy has dtype int64"),
    "a flat array": (array(np.zeros(192, np.float32)), [], r"c/bad\.npy has shape \[192\]"),
    "many in one file": (array(latents(2)), [], r"c/bad\.npy has 2 samples.*--labels"),
    "empty": (in_folders(lambda folder: (folder / "bad.npy").touch()), [], r"c/bad\.npy cannot be read"),
    "objects": (array(np.array([{}])), [], r"c/bad\.npy cannot be read"),
    "a pickle": (
        in_folders(lambda folder: (folder / "bad.pt").write_bytes(pickle.dumps(Bomb()))),
        [],
        r"c/bad\.pt cannot be read",
    ),
    "other names": (
        in_folders(lambda folder: np.savez(folder / "bad.npz", x=np.zeros(3))),
        [],
        r"c/bad\.npz has x, needs .*latents",
    ),
    "labels for folders": (array(latents(1)[0]), ["--labels", "l.txt"], "leave out --labels"),
    "no labels": (one_array(), [], r"in\.npy has no labels; give --labels FILE"),
    "too few labels": (one_array(l="0 1"), ["--labels", "l.txt"], "2 labels for 3 samples"),
    "words": (one_array(l="cat dog cat"), ["--labels", "l.txt"], r"--labels l\.txt"),
    "negative": (one_array(l="0 -1 2"), ["--labels", "l.txt"], "integers from 0"),
    "more classes": (one_array(l="0 1 2", c="a b"), ["--labels", "l.txt", "--classes", "c.txt"], "--classes has 1"),
    "another autoencoder": (one_array(latents(3, (5, 4, 4))), ["--labels", "none"], "5 channels.*--vae"),
    "beyond fp16": (one_array(latents(3) * 1e9), ["--labels", "none"], "65504.*--scale"),
    "scale 0": (one_array(), ["--labels", "none", "--scale", "0"], "--scale 0"),
    "both layouts": (both, [], "either class folders"),
    "nothing": (lambda root: root / "nowhere", [], "does not exist"),
    "pictures": (in_folders(lambda folder: None), ["--vae", "dct-f9"], "dct-f8, dct-f32"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_used_is_named(tmp_path, monkeypatch, capsys, name):
    write, more, said = BAD[name]
    monkeypatch.chdir(tmp_path)
    source = write(tmp_path)
    assert main(["import", str(source), "out", "--vae", "dct-f8", *more]) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("ecar-data: ")]
    assert re.search(said, line), line
    assert not (tmp_path / "exploded").exists()
    assert not (tmp_path / "out/manifest.json").exists()


def test_all_bad_files_of_a_shard_are_named_at_once(tmp_path, capsys):
    for place, given in enumerate(latents(4)):
        given[0, 0, 0] = np.nan if place > 1 else 0
        save(tmp_path / "in/a" / f"{place}.npy", given)
    assert imported(tmp_path / "in", tmp_path / "out") == 1
    said = capsys.readouterr().err
    assert "a/2.npy" in said
    assert "a/3.npy" in said


def test_another_import_into_the_same_folder_is_refused(tmp_path, capsys):
    np.save(tmp_path / "in.npy", latents(4))
    assert imported(tmp_path / "in.npy", tmp_path / "out", "--labels", "none") == 0
    capsys.readouterr()
    assert imported(tmp_path / "in.npy", tmp_path / "out", "--labels", "none", "--scale", "2") == 1
    assert "another folder" in capsys.readouterr().err
