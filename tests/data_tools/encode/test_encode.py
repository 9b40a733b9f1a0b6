import itertools
import json
import os
import re
import shlex

import fsspec
import numpy as np
import pytest
import torch
from PIL import Image

from data_tools.encode.plan import EncodePlan, read_plan
from data_tools.encode.run import encode
from data_tools.encode.settings import plan
from data_tools.finalize import finalize
from data_tools.images.shard import shard
from ecar_dist.data.images.decode import open_decoder
from ecar_dist.data.images.shards import ImageShards
from ecar_dist.data.shards.manifest import load_manifest
from ecar_dist.data.shards.read import open_latent_shard
from ecar_dist.errors import ConfigError, DataError
from ecar_dist.storage.remote import join
from ecar_dist.vae.codec import hash_config
from ecar_dist.vae.dct import DctCodec
from ecar_dist.vae.pixels import from_pixels
from ecar_dist.vae.pretrained import new_autoencoder, save_autoencoder
from tests.data_tools.image_folders import content, encode_small, write_image_shards


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_image_shards(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def whole(images, tmp_path_factory):
    """One task from start to end."""
    out = tmp_path_factory.mktemp("whole") / "latents"
    encode_small(images, out)
    finalize(out)
    return out


def rows_of(folder):
    manifest = load_manifest(folder)
    shards = [open_latent_shard(folder / entry.name, entry, manifest) for entry in manifest.shards]
    return [np.concatenate([getattr(shard, name) for shard in shards]) for name in ("moments", "labels")]


def test_rows_are_the_shuffled_source(images, whole):
    source, plan, decoder = ImageShards(images), read_plan(whole), open_decoder("pil")
    order = np.concatenate([plan.source_indices(index) for index in range(plan.num_shards)])
    assert sorted(order) == list(range(24))
    assert list(order) != list(range(24))
    moments, labels = rows_of(whole)
    records = [source.read(int(index)) for index in order]
    pixels = decoder.decode_to_batch([record.data for record in records], [record.key for record in records], 16)
    expected = DctCodec(8, torch.device("cpu")).encode(from_pixels(pixels)).numpy()
    np.testing.assert_allclose(moments, expected, rtol=1e-3, atol=1e-3)
    assert labels.tolist() == [record.label for record in records]


@pytest.mark.parametrize("order", list(itertools.permutations(range(3)))[1::2])
def test_any_number_of_tasks_in_any_order_gives_the_same_bytes(images, whole, tmp_path, order):
    for task in order:
        encode_small(images, tmp_path / "out", task=task, tasks=3)
    finalize(tmp_path / "out")
    assert content(tmp_path / "out") == content(whole)


def test_a_cut_shard_is_made_again(images, whole, tmp_path):
    encode_small(images, tmp_path / "out")
    os.truncate(tmp_path / "out/000001.tar", 1000)
    with pytest.raises(DataError, match=r"lacks 1 of 5 shards \(000001\)"):
        finalize(tmp_path / "out")
    encode_small(images, tmp_path / "out")
    finalize(tmp_path / "out")
    assert content(tmp_path / "out") == content(whole)


CHANGES = {
    "image_size": 24,
    "seed": 1,
    "samples_per_shard": 6,
    "flip": "store",
    "decoder": "dali",
    "precision": "bf16",
    "resize": "adm",
    "background": "black",
}


@pytest.mark.parametrize("name", CHANGES)
def test_another_plan_is_refused_and_nothing_touched(images, whole, name):
    before = content(whole)
    with pytest.raises(DataError, match=rf"its {name} is .*{CHANGES[name]}"):
        encode_small(images, whole, **{name: CHANGES[name]})
    assert content(whole) == before


def as_an_earlier_version_left_it(out):
    """plan.json without the key `background`, and with the id that such a plan has."""
    tree = json.loads((out / "plan.json").read_text())
    del tree["background"], tree["plan_id"]
    old = EncodePlan(**tree)
    (out / "plan.json").write_text(json.dumps({**tree, "plan_id": old.plan_id}))
    return old


def test_a_folder_of_an_earlier_version_continues_to_drop_transparency(tmp_path, capsys):
    red = Image.new("RGBA", (16, 16), (255, 0, 0, 0))
    (tmp_path / "in/a").mkdir(parents=True)
    for place in range(4):
        red.save(tmp_path / f"in/a/{place}.png")
    shard(str(tmp_path / "in"), tmp_path / "images")
    plan(tmp_path / "images", tmp_path / "old", vae="dct-f8", image_size=16, samples_per_shard=2, decoder="pil")
    old = as_an_earlier_version_left_it(tmp_path / "old")
    assert old.plan_id == hash_config({key: value for key, value in old.content().items() if key != "background"})
    with pytest.raises(DataError, match=r"background is None, .* black"):
        encode_small(tmp_path / "images", tmp_path / "old", samples_per_shard=2, background="black")
    encode_small(tmp_path / "images", tmp_path / "old", samples_per_shard=2)
    assert "dropped transparency" in capsys.readouterr().out
    finalize(tmp_path / "old")
    assert load_manifest(tmp_path / "old").preprocessing["plan_id"] == old.plan_id
    assert "background" not in load_manifest(tmp_path / "old").preprocessing
    channel_means = {}
    for name, background in (("white", "white"), ("black", "#000000")):
        encode_small(tmp_path / "images", tmp_path / name, samples_per_shard=2, background=background)
        finalize(tmp_path / name)
        assert load_manifest(tmp_path / name).preprocessing["background"] == name
    for name in ("old", "white", "black"):
        moments, _ = rows_of(tmp_path / name)
        brightness = moments[:, ::4].mean(axis=(0, 2, 3)) / 8  # the first of a colour's four frequencies
        channel_means[name] = brightness.round().tolist()
    assert channel_means == {"old": [1, -1, -1], "white": [1, 1, 1], "black": [-1, -1, -1]}


def test_without_an_image_size_one_is_proposed(images, tmp_path):
    with pytest.raises(ConfigError, match=r" 10 images .* 20 to 20 pixels, .* --image-size 16$"):
        encode_small(images, tmp_path / "out", image_size=None)
    assert not (tmp_path / "out").exists()


def test_a_warning_if_most_images_are_enlarged(images, tmp_path, capsys):
    encode_small(images, tmp_path / "small")
    assert "warning" not in capsys.readouterr().err
    encode_small(images, tmp_path / "large", image_size=32)
    assert re.search(r"warning: 10 of 10 .* --image-size 32", capsys.readouterr().err)


def test_another_decoder_is_often_another_device(images, tmp_path):
    plan(images, tmp_path / "out", vae="dct-f8", image_size=16, device="cuda")
    with pytest.raises(DataError, match=r"decoder is dali-mixed, .* dali-cpu; .*--device"):
        plan(images, tmp_path / "out", vae="dct-f8", image_size=16, device="cpu")


def test_the_last_line_has_the_next_command(images, tmp_path, capsys):
    encode_small(images, tmp_path / "out", task=0, tasks=2)
    assert "; 3 of 5 shards " in capsys.readouterr().out
    encode_small(images, tmp_path / "out", task=1, tasks=2, max_bad=0.25)
    printed = capsys.readouterr().out
    assert printed.endswith(f" ecar-data finalize {tmp_path}/out --max-bad 0.25\n")
    assert "failed images in its shards: 0" in printed


def test_an_occupied_folder_is_refused(images, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(DataError, match=r"is not empty and has no plan\.json"):
        encode_small(images, tmp_path)
    assert content(tmp_path) == {"mine.txt": b"mine"}


def test_flips_are_moments_of_mirrored_images(images, tmp_path):
    encode_small(images, tmp_path / "out", flip="store")
    finalize(tmp_path / "out")
    manifest = load_manifest(tmp_path / "out")
    shard = open_latent_shard(tmp_path / "out/000000.tar", manifest.shards[0], manifest)
    # mirroring an image mirrors its blocks and flips the sign of odd horizontal frequencies (every second channel)
    signs = np.array([1, -1] * 6, np.float32)[:, None, None]
    np.testing.assert_allclose(shard.mirrored, shard.moments[..., ::-1] * signs, atol=0.02)


def test_settings_that_do_not_fit(images, tmp_path):
    with pytest.raises(ConfigError, match=r"--image-size 20 .* multiple of 8, .* 16$"):
        encode_small(images, tmp_path / "out", image_size=20)
    for image_size in (0, -8):
        with pytest.raises(ConfigError, match=f"--image-size {image_size} .* multiple of 8, .* 8$"):
            encode_small(images, tmp_path / "out", image_size=image_size)
    with pytest.raises(ConfigError, match=r"--image-size 100000 .* 65536"):
        encode_small(images, tmp_path / "out", image_size=100_000)
    assert not (tmp_path / "out").exists()
    with pytest.raises(ConfigError, match=r"--task 3 is outside 0\.\.2"):
        encode_small(images, tmp_path / "out", task=3, tasks=3)
    with pytest.raises(ConfigError, match=r"--max-bad 1.5 is outside \[0, 1\]"):
        encode_small(images, tmp_path / "out", max_bad=1.5)
    with pytest.raises(ConfigError, match="resize 'adm' with decoder dali"):
        encode_small(images, tmp_path / "out", decoder="dali", resize="adm")
    assert not (tmp_path / "out").exists()


def test_a_plan_is_written_and_printed_without_reading_images(images, whole, tmp_path, capsys):
    settings = {"vae": "dct-f8", "image_size": 16, "samples_per_shard": 5, "decoder": "pil", "device": "cpu"}
    plan(images, tmp_path / "out", tasks=3, **settings)
    printed = capsys.readouterr().out
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["plan.json"]
    lines = {line.split()[0]: line for line in printed.splitlines()}
    assert "24 of 12x2x2 fp16" in lines["samples"]
    assert re.search(r" 5 .* 5 samples", lines["shards"])
    assert "0.000 GB, 2048 " in lines["bytes"]
    assert re.search(r" 3, .* 2 shards", lines["tasks"])
    command = shlex.split(printed.splitlines()[-1])
    assert command[:4] == ["ecar-data", "encode", str(images), str(tmp_path / "out")]
    assert command[-4:] == ["--task", "i", "--tasks", "3"]
    named = dict(zip(command[4::2], command[5::2], strict=True))
    for task in range(3):
        values = {name[2:].replace("-", "_"): value for name, value in named.items()}
        numbers = {name: int(values[name]) for name in ("image_size", "samples_per_shard", "seed", "tasks")}
        encode(images, tmp_path / "out", **{**values, **numbers, "task": task, "device": "cpu", "batch_size": 3})
    finalize(tmp_path / "out")
    assert content(tmp_path / "out") == content(whole)


def test_a_plan_for_gpus_does_not_need_a_gpu(images, tmp_path, capsys):
    plan(images, tmp_path / "out", vae="dct-f8", image_size=16, device="cuda")
    assert read_plan(tmp_path / "out").decoder == "dali-mixed"
    printed = capsys.readouterr().out
    assert "--decoder dali --resize cubic" in printed
    assert "workers" not in printed


def test_a_plan_made_without_a_gpu_is_for_the_cpu_and_prints_it(images, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    plan(images, tmp_path / "out", vae="dct-f8", image_size=16)
    assert re.search(r"^workers .* CPU, .* --device cuda", capsys.readouterr().out, re.MULTILINE)


@pytest.mark.parametrize(
    ("decoder", "resize", "device", "name"),
    [
        ("auto", "cubic", "cpu", "dali-cpu"),
        ("dali", "cubic", "cuda", "dali-mixed"),
        ("dali-cpu", "cubic", "cuda", "dali-cpu"),
        ("auto", "adm", "cuda", "pil"),
    ],
)
def test_which_decoder_a_plan_has(images, tmp_path, decoder, resize, device, name):
    plan(images, tmp_path / "out", vae="dct-f8", image_size=16, decoder=decoder, resize=resize, device=device)
    settled = read_plan(tmp_path / "out")
    assert (settled.decoder, settled.resize) == (name, resize)


def test_adm_decides_on_the_bytes_and_is_in_the_manifest(images, whole, tmp_path):
    encode_small(images, tmp_path / "out", resize="adm", image_size=8)
    encode_small(images, tmp_path / "cubic", image_size=8)
    for name in ("out", "cubic"):
        finalize(tmp_path / name)
    ours, theirs = load_manifest(tmp_path / "out"), load_manifest(tmp_path / "cubic")
    assert ours.preprocessing["resize"].startswith("adm: halved by box means")
    assert ours.preprocessing["plan_id"] != theirs.preprocessing["plan_id"]
    assert np.abs(rows_of(tmp_path / "out")[0] - rows_of(tmp_path / "cubic")[0]).max() > 0.01


def test_a_signed_url_of_the_source_is_not_written(images, tmp_path, capsys):
    url = "memory://user:s3cret@host/bucket/images?X-Amz-Signature=s3cret"
    memory = fsspec.filesystem("memory")
    for path in images.iterdir():
        memory.pipe_file(join(url, path.name), path.read_bytes())
    plan(url, tmp_path / "out", vae="dct-f8", image_size=16)
    assert "s3cret" not in capsys.readouterr().out + (tmp_path / "out/plan.json").read_text()
    assert read_plan(tmp_path / "out").source_folder == "memory://host/bucket/images"
    memory.store.clear()


def test_an_autoencoder_from_diffusers(images, tmp_path):
    """bf16 arithmetic on a 16-channel KL autoencoder: moments are fp16, finite, and close to those of fp32."""
    save_autoencoder(new_autoencoder((8, 8), 16, layers_per_block=1), tmp_path / "vae", 0.5, 0.0)
    found = {}
    for precision in ("fp32", "bf16"):
        out = tmp_path / precision
        encode_small(images, out, vae=str(tmp_path / "vae"), precision=precision)
        finalize(out)
        assert load_manifest(out).moments_shape == (32, 8, 8)
        assert "diffusers" in load_manifest(out).preprocessing["versions"]
        found[precision] = rows_of(out)[0].astype(np.float32)
    assert 0 < np.abs(found["bf16"] - found["fp32"]).max() < 0.2


def test_a_gpu_that_is_not_there(tmp_path, digits):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(ConfigError, match="--device cuda, but torch sees no GPU here; use --device cpu"):
        encode(digits / "images/train", tmp_path / "out", vae="dct-f8", image_size=32, device="cuda")
    assert not (tmp_path / "out").exists()
