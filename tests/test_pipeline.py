"""An export as a diffusers pipeline."""

import numpy as np
import pytest
from diffusers import DiffusionPipeline
from PIL import Image

from ecar_dist.cli import main
from tests.sample.made_models import make_model_run


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline")
    run = make_model_run(folder)
    assert main(["checkpoint", "export", str(run), "--out", str(folder / "export")]) == 0
    return folder / "export"


@pytest.mark.parametrize("custom", [False, True])
def test_images_are_those_of_the_command_line(export, custom, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    options = ["--labels", "faces,none", "--count", "3", "--seed", "2", "--guidance-scale", "3"]
    assert main(["sample", str(export), *options, "--out", str(tmp_path / "a")]) == 0
    theirs = [np.asarray(Image.open(path)) for path in sorted((tmp_path / "a/images").iterdir())]

    more = {"custom_pipeline": str(export)} if custom else {}
    pipe = DiffusionPipeline.from_pretrained(str(export), trust_remote_code=True, **more).to("cpu")
    ours = pipe(["faces", None], num_images=3, seed=2, guidance_scale=3).images
    assert np.array_equal([np.asarray(image) for image in ours], theirs)
    (images,) = pipe("faces", seed=2, return_dict=False)
    assert len(images) == 1
