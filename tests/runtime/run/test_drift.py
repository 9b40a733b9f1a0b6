"""Config on resume: each difference is printed with its effect."""

import pytest
import yaml

from ecar_dist.config.knob import OnResume
from ecar_dist.config.read import config_from_dict, config_to_yaml
from ecar_dist.runtime.run.drift import drift, resume_lines

TREE = {
    "run": {"name": "a"},
    "vae": {"kind": "dct"},
    "data": {"latents": "x", "num_classes": 10},
    "train": {"total_samples": 10_000},
    "optim": {"learning_rate": 1e-3},
}
MIXTURE = {"latents": None, "mixture": [{"latents": "x", "weight": 1.0}, {"latents": "y", "weight": 2.0}]}


def config(**sections):
    return config_from_dict({**TREE, **{name: {**TREE.get(name, {}), **changes} for name, changes in sections.items()}})


@pytest.mark.parametrize(
    ("section", "old", "new", "change", "on_resume"),
    [
        ("optim", {}, {"learning_rate": 5e-4}, "optim.learning_rate 0.001 -> 0.0005", OnResume.OPTIMISATION),
        ("optim", {}, {"betas": [0.9, 0.99]}, "optim.betas [0.9, 0.95] -> [0.9, 0.99]", OnResume.OPTIMISATION),
        ("batch", {}, {"micro_batch_size": 16}, "batch.micro_batch_size 32 -> 16", OnResume.SAFE),
        ("deepspeed", {}, {"zero_stage": 3}, "deepspeed.zero_stage 2 -> 3", OnResume.SAFE),
        ("run", {}, {"seed": 1}, "run.seed 0 -> 1", OnResume.DATA_ORDER),
        ("model", {}, {"preset": "S"}, "model.preset T -> S", OnResume.MODEL),
        ("data", {}, {"resize": "adm"}, "data.resize cubic -> adm", OnResume.LATENTS),
        (
            "data",
            {"latents": "s3://key:hunter2@bucket/a?X-Amz-Signature=1"},
            {"latents": "s3://bucket/b"},
            "data.latents s3://bucket/a -> s3://bucket/b",
            OnResume.DATA_ORDER,
        ),
        ("vae", {}, {"path": "a\u202fb"}, 'vae.path null -> "a\\u202fb"', OnResume.SAFE),
    ],
)
def test_a_difference_is_one_line(section, old, new, change, on_resume):
    (difference,) = drift(config(**{section: old}), config(**{section: new}))
    assert str(difference) == f"config on resume: {change} ({on_resume.value})"


def test_a_default_that_is_written_out_is_not_a_difference():
    assert drift(config(), config()) == []
    written = {"ends": [1 / 3, 2 / 3, 1.0], "stage_weights": [1 / 3] * 3}
    assert drift(config(), config(flow=written, data={"max_bad": 1e-5})) == []


def changes(old, new, **more):
    return {difference.key: difference.on_resume for difference in drift(old, new, **more)}


def test_the_end_of_training_matters_only_to_a_schedule_that_looks_at_it():
    more = {"train": {"total_samples": 20_000}}
    assert changes(config(), config(**more)) == {"train.total_samples": OnResume.SAFE}
    cosine = {"optim": {"schedule": "cosine"}}
    assert changes(config(**cosine), config(**cosine, **more)) == {"train.total_samples": OnResume.OPTIMISATION}
    assert changes(config(), config(**cosine, **more))["train.total_samples"] is OnResume.OPTIMISATION


def test_the_same_data_elsewhere_do_not_change_the_order():
    moved = config(data={"latents": "y"})
    assert changes(config(), moved) == {"data.latents": OnResume.DATA_ORDER}
    assert changes(config(), moved, same_data=True) == {"data.latents": OnResume.SAFE}
    mixed = config(data=MIXTURE)
    there = {"mixture": [{"latents": "z", "weight": 1.0}, {"latents": "y", "weight": 2.0}]}
    assert changes(mixed, config(data={**MIXTURE, **there}), same_data=True) == {"data.mixture": OnResume.SAFE}
    there["mixture"][0]["weight"] = 3.0
    assert changes(mixed, config(data={**MIXTURE, **there}), same_data=True) == {"data.mixture": OnResume.DATA_ORDER}


def test_a_global_batch_that_comes_from_one_set_is_part_of_the_order():
    batch = {"batch": {"global_batch_size": 128}}
    assert changes(config(), config(**batch)) == {"batch.global_batch_size": OnResume.OPTIMISATION}
    by_step = {"data": {**MIXTURE, "mixture_by": "step"}}
    assert changes(config(**by_step), config(**by_step, **batch)) == {"batch.global_batch_size": OnResume.DATA_ORDER}


def test_a_config_on_disk_that_cannot_be_read_is_a_warning(tmp_path):
    path = tmp_path / "config.yaml"
    assert resume_lines(path, config()) == []
    path.write_text(config_to_yaml(config()))
    assert resume_lines(path, config()) == []
    (line,) = resume_lines(path, config(ema={"rampup": 0.2}))
    assert "ema.rampup 0.1 -> 0.2" in line
    for content in (b"\xff\xfe", b"run: {", b"{}", yaml.safe_dump({**TREE, "gone": 1}).encode()):
        path.write_bytes(content)
        (line,) = resume_lines(path, config())
        assert line.startswith("warning: ")


def test_a_run_on_images_from_before_backgrounds_is_told_of_its_background(tmp_path):
    path = tmp_path / "config.yaml"
    images, latents = config(data={"latents": None, "images": "shards"}), config()
    for run, told in ((images, 1), (latents, 0)):
        tree = yaml.safe_load(config_to_yaml(run))
        path.write_text(yaml.safe_dump(tree))
        assert resume_lines(path, run) == []
        del tree["data"]["background"]
        path.write_text(yaml.safe_dump(tree))
        assert [("data.background=white" in line) for line in resume_lines(path, run)] == [True] * told
