"""Mistakes of a user on the way from pictures to a run: exit status 1, and one line with the fix."""

import re
import shutil

import numpy as np
import pytest
from PIL import Image

from data_tools.cli import main as ecar_data
from ecar_dist.cli import main as ecar_dist

CROPPED = 40  # bytes of a JPEG that was not downloaded to its end
SIDE = 24


def write_pictures(root):
    """cat and dog with four pictures each, a text file next to them, and what the mistakes below need."""
    generator = np.random.default_rng(0)
    for name in ("pictures/cat", "pictures/dog", "flat"):
        (root / name).mkdir(parents=True)
        for place in range(4):
            pixels = generator.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{place}.png")
    (root / "pictures/notes.txt").write_text("mine")
    (root / "empty").mkdir()
    (root / "empty-classes/cat").mkdir(parents=True)
    (root / "one").mkdir()
    shutil.copytree(root / "pictures/cat", root / "one/cat", ignore=shutil.ignore_patterns("[123].png"))
    shutil.copytree(root / "pictures", root / "loose")
    shutil.copy(root / "flat/0.png", root / "loose/0.png")
    shutil.copytree(root / "pictures", root / "broken")
    Image.open(root / "flat/0.png").save(root / "broken/cat/torn.jpg")
    torn = (root / "broken/cat/torn.jpg").read_bytes()
    (root / "broken/cat/torn.jpg").write_bytes(torn[: len(torn) // 2])
    (root / "broken/dog/page.png").write_text("<html>404</html>")
    shutil.copytree(root / "pictures", root / "line\nbreak")
    (root / "bad-names").mkdir()
    shutil.copytree(root / "pictures/cat", root / "bad-names/cat\nfish")
    (root / "set.tar.gz").write_bytes(b"\x1f\x8b")
    (root / "names.txt").write_text("cat\n")
    (root / "twice.txt").write_text("cat\ncat\n")
    (root / "occupied").mkdir()
    (root / "occupied/mine.txt").write_text("mine")
    (root / "vae").mkdir()  # an autoencoder's folder without an autoencoder
    (root / "latents.npy").write_bytes(b"no array")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Pictures, and what the commands make of them."""
    root = tmp_path_factory.mktemp("made")
    write_pictures(root)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        assert ecar_data(["prepare", "pictures", "data", "--holdout", "0.25", "--image-size", "16"]) == 0
        shutil.copytree("pictures", "moved")
        assert ecar_data(["index", "moved", "index"]) == 0
        (root / "moved/cat/1.png").unlink()
        shutil.copytree("pictures", "edited")
        assert ecar_data(["index", "edited", "edited-index"]) == 0
        (root / "edited/cat/1.png").write_bytes(b"longer or shorter than before")
        shutil.copytree("data", "unfinished")
        (root / "unfinished/latents/manifest.json").unlink()
        shutil.copytree("data/latents", "lacking")
        (root / "lacking/manifest.json").unlink()
        (root / "lacking/000000.json").unlink()
    return root


ENCODE = "encode data/images/train out --vae dct-f8 --image-size 16"
DATA = {  # ecar-data WORDS -> what the line must contain
    # the folder
    "shard pictres out": "pictres is not a folder; give a folder",
    "shard pictures/cat/0.png out": "not a folder; give a folder",
    "shard empty out": "no class folders .* --flat",
    "shard empty --flat out": r"empty has no images \(png, jpg",
    "shard empty-classes out": "none of its 1 class folders has images .*check the source",
    "shard flat out": "flat has no class folders .*--flat",
    "shard loose out": r"0\.png is next to the class folders; move it .* or give --flat",
    "shard bad-names out": "bad-names .*rename it",
    "shard set.tar.gz out": "is compressed, .*gunzip it to a .tar",
    "shard pictures/*.tar out": "no file matches .*check the pattern",
    "shard a-{0..9 out": "brace pattern|is not a folder|no file matches",
    "shard s3:/bucket/set out": "did you mean s3://bucket/set",
    "index pictres out": "pictres is not a folder; give",
    "prepare pictres out": "pictres is not a folder; give",
    # what is in it
    "shard broken out": r"torn\.jpg.*page\.png.*bad images: 2, --max-bad allows 0; remove them, or raise --max-bad",
    "prepare pictures out": r"--holdout 0\.1 puts all 8 images into one part; give at least 0\.1[0-9], or 0",
    "prepare broken out --holdout 0.3": r"torn\.jpg.*page\.png.*raise --max-bad",
    "encode index out --vae dct-f8 --image-size 16": r"1\.png does not exist.*index is out of date.*ecar-data index",
    "encode edited-index out --vae dct-f8 --image-size 16": r"1\.png .*has bytes|1\.png.*restore it, or run",
    "train-vae one-index out": "one-index/manifest.json does not exist; make it with `ecar-data",
    # options
    "shard pictures out --holdout 1": r"--holdout 1\.0 is outside \[0, 1\); give",
    "shard one out --holdout 0.5": "puts all 1 images into one part; give another share",
    "shard pictures out --max-bad 2": r"--max-bad 2\.0 is outside",
    "shard pictures out --label txt": "--label txt: captions .*give none",
    "shard pictures out --label clas": "--label clas is not known; give cls, json:FIELD or none",
    "shard pictures out --classes names.txt": "dog is not in --classes; add it",
    "shard pictures out --classes twice.txt": "2 names, 1 different; give",
    "shard pictures out --classes nothing.txt": "cannot read --classes nothing.txt .*give a text file",
    "shard digits out --flat": "already has labels; leave out .*--flat",
    "shard pictures occupied": "occupied is not empty; remove it or give another folder",
    "prepare pictures occupied": r"occupied contains mine\.txt .*remove it or give another folder",
    "prepare pictures data --image-size 16": "data was started with --holdout 0.25, .* 0.1; repeat the first command",
    "prepare pictures out --image-size 50": "--image-size 50 .*multiple of 8.*give e.g. 48",
    # autoencoders
    f"{ENCODE.replace('dct-f8', 'dct-f16')}": "--vae dct-f16 is not known; give dct-f8, dct-f32",
    f"{ENCODE.replace('dct-f8', 'DCT-f8')}": "--vae DCT-f8 is not known; give dct-f8, dct-f32",
    f"{ENCODE.replace('dct-f8', './vea')}": "./vea does not exist; give a local folder, or .*train-vae",
    f"{ENCODE.replace('dct-f8', 'vae')}": r"vae has no readable config\.json .*train-vae",
    "prepare pictures out --vae dctf8": "--vae dctf8 is not known; give dct-f8, dct-f32",
    "train-vae data/images/train out --image-size 30": "--downsample 4 .* divide --image-size 30; change one",
    "train-vae data/images/train out --downsample 3": "--downsample 3 must be a power of 2",
    "train-vae data/images/train out --channels 10": "--channels 10 is not a multiple of 8; give",
    "train-vae pictures out": r"pictures/manifest\.json does not exist; make it with `ecar-data shard",
    # encoding
    ENCODE.replace("16", "20"): "--image-size 20 is not a positive multiple of 8.*give e.g.",
    ENCODE.replace(" --image-size 16", ""): "--image-size is missing; .*give e.g. --image-size 16",
    f"{ENCODE} --background pinkish": "--background 'pinkish' is not a colour; give white, black or #rrggbb",
    f"{ENCODE} --task 3 --tasks 2": r"--task 3 is outside 0\.\.1 .*count tasks from 0",
    f"{ENCODE} --decoder dali --resize adm": "resize 'adm' with decoder dali: use cubic, or adm with decoder pil",
    f"{ENCODE} --device cuda": "--device cuda, but torch sees no GPU here; use --device cpu",
    ENCODE.replace("train out", "train data/latents --seed 3"): "different plan: its seed is 0, .*give another folder",
    ENCODE.replace("data/images/train", "data/latents"): "schema ecar-latents-v1.*give the folder made by",
    ENCODE.replace("data/images/train", "pictures"): r"pictures/manifest\.json does not exist; make it with",
    "finalize out": r"out/plan\.json does not exist; make the shards with `ecar-data encode",
    "finalize lacking": "lacks 1 of 1 shards .*make them with: ecar-data encode",
    "status data": r"data/plan\.json does not exist",
    "stats data/images/train": "schema ecar-images-v1, expected ecar-latents-v1; give",
    "preview data/latents --out sheet": r"does not have the extension of an image format; give e\.g\. sheet\.png",
    "verify pictures": r"pictures/manifest\.json does not exist; make it",
    "push data/latents elsewhere": "push uploads to a URL such as s3://bucket/set, .*use cp",
    # import
    "import latents.npy out --vae dct-f8": r"latents\.npy cannot be read .*write it again",
    "import nowhere out --vae dct-f8": "nowhere does not exist; give a file or folder",
    "import pictures out --vae dct-f8": r"pictures has no latents \(\.npy",
}
DIST = {  # ecar-dist WORDS -> what the line must contain
    "init pictures": "pictures has no latents; make them with `ecar-data prepare pictures OUT`",
    "init pictres": "pictres does not exist; make it with `ecar-data prepare PICTURES pictres`",
    "init unfinished": "unfinished is not finished; repeat the `ecar-data` command",
    "init data/images/train": "contains images, not latents; encode them with `ecar-data encode",
    "check mine.yaml data.num_classes=3": "data.num_classes=3, but .*set data.num_classes=2",
    "check mine.yaml data.num_classes=3 data.latent_channels=4 data.latent_size=4": (
        "set data.num_classes=2 data.latent_size=2 data.latent_channels=12"
    ),
    "check mine.yaml vae.kind=kl vae.path=data/vae vae.downsample=16": "set vae.kind=dct vae.downsample=8",
    "check mine.yml": "cannot read config mine.yml: .*give the path of a YAML file",
    "check empty.yaml": r"empty\.yaml is empty; write the sections",
    "check mine.yaml data.num_clases=2": "did you mean data.num_classes",
    "check mine.yaml data.latents=data/latentz": None,  # not made yet, which `check` allows and reports
}


@pytest.fixture
def at_home(made, tmp_path, monkeypatch, capsys):
    """The current folder has links to what was made, so that each mistake starts from the same files."""
    for path in made.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    assert ecar_dist(["init", "data", "--device", "cpu"]) == 0
    (tmp_path / "mine.yaml").write_text(capsys.readouterr().out)
    (tmp_path / "empty.yaml").touch()
    return tmp_path


def test_the_table_is_long_enough():
    assert len(DATA) + len(DIST) >= 70


@pytest.mark.parametrize(
    ("program", "words", "said"),
    [
        *((ecar_data, words, said) for words, said in DATA.items()),
        *((ecar_dist, words, said) for words, said in DIST.items() if said),
    ],
)
def test_a_mistake_is_one_line_with_its_fix(at_home, capsys, program, words, said):
    assert program(words.split(" ")) == 1
    printed = capsys.readouterr().err
    assert "Traceback" not in printed
    lines = [line for line in printed.splitlines() if re.match("ecar-da?i?[st]a?t?: ", line)]
    assert len(lines) == 1, printed
    assert re.search(said, lines[0]), lines[0]
    assert not (at_home / "out/manifest.json").exists()


def test_data_that_are_not_made_yet_are_no_mistake_of_the_config(at_home, capsys):
    assert ecar_dist(["check", "mine.yaml", "data.latents=data/latentz"]) == 0
    assert "not compared" in capsys.readouterr().out
