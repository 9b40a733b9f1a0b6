"""Config on resume: every key is classed, and a difference is said with what it changes."""

import pytest
import yaml
from pydantic import BaseModel

from ecar_dist.config.read import config_from_dict, config_to_yaml
from ecar_dist.config.run import RunConfig
from ecar_dist.runtime.run.drift import _LEAVES, KINDS, Kind, drift, resume_lines

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


def leaves(section, prefix=""):
    """Every dotted field of the config's classes, found without an instance."""
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from leaves(field.annotation, f"{prefix}{name}.")
        else:
            yield prefix + name


def test_every_leaf_of_the_config_is_classed_once():
    assert sorted(KINDS) == sorted(leaves(RunConfig))
    assert len(KINDS) == sum(len(names.split()) for sections in _LEAVES.values() for names in sections.values())


def test_what_a_checkpoint_refuses_is_classed_as_the_model():
    identity = set(config().model_identity)
    ours = {key for key, kind in KINDS.items() if kind is Kind.MODEL}
    assert identity <= ours
    assert ours - identity == {"vae.kind", "vae.downsample"}  # the encoder's own hash stands for them


@pytest.mark.parametrize(
    ("section", "old", "new", "line"),
    [
        (
            "optim",
            {},
            {"learning_rate": 5e-4},
            "optim.learning_rate 0.001 -> 0.0005 (changes optimisation)",
        ),
        ("optim", {}, {"betas": [0.9, 0.99]}, "optim.betas [0.9, 0.95] -> [0.9, 0.99] (changes optimisation)"),
        ("batch", {}, {"micro_batch_size": 16}, "batch.micro_batch_size 32 -> 16 (safe)"),
        ("deepspeed", {}, {"zero_stage": 3}, "deepspeed.zero_stage 2 -> 3 (safe)"),
        ("run", {}, {"seed": 1}, "run.seed 0 -> 1 (changes data order: needs --new-data-order)"),
        ("model", {}, {"preset": "S"}, "model.preset T -> S (another model: its checkpoints are refused)"),
        (
            "data",
            {"latents": "s3://key:hunter2@bucket/a?X-Amz-Signature=1"},
            {"latents": "s3://bucket/b"},
            "data.latents s3://bucket/a -> s3://bucket/b (changes data order: needs --new-data-order)",
        ),
        ("vae", {}, {"path": "a\u202fb"}, 'vae.path null -> "a\\u202fb" (safe)'),
    ],
)
def test_a_difference_is_one_line(section, old, new, line):
    (difference,) = drift(config(**{section: old}), config(**{section: new}))
    assert str(difference) == f"config on resume: {line}"


def test_no_difference_and_a_default_that_is_written_out_are_none():
    assert drift(config(), config()) == []
    written = {"ends": [1 / 3, 2 / 3, 1.0], "stage_weights": [1 / 3] * 3}
    assert drift(config(), config(flow=written, data={"max_bad": 1e-5})) == []


def kinds(old, new, **more):
    return {difference.key: difference.kind for difference in drift(old, new, **more)}


def test_the_end_of_training_matters_only_to_a_schedule_that_looks_at_it():
    more = {"train": {"total_samples": 20_000}}
    assert kinds(config(), config(**more)) == {"train.total_samples": Kind.SAFE}
    cosine = {"optim": {"schedule": "cosine"}}
    assert kinds(config(**cosine), config(**cosine, **more)) == {"train.total_samples": Kind.OPTIMISATION}
    assert kinds(config(), config(**cosine, **more))["train.total_samples"] is Kind.OPTIMISATION


def test_the_same_data_elsewhere_are_no_other_order():
    moved = config(data={"latents": "y"})
    assert kinds(config(), moved) == {"data.latents": Kind.DATA_ORDER}
    assert kinds(config(), moved, same_data=True) == {"data.latents": Kind.SAFE}
    mixed = config(data=MIXTURE)
    there = {"mixture": [{"latents": "z", "weight": 1.0}, {"latents": "y", "weight": 2.0}]}
    assert kinds(mixed, config(data={**MIXTURE, **there}), same_data=True) == {"data.mixture": Kind.SAFE}
    there["mixture"][0]["weight"] = 3.0
    assert kinds(mixed, config(data={**MIXTURE, **there}), same_data=True) == {"data.mixture": Kind.DATA_ORDER}


def test_a_global_batch_that_comes_from_one_set_is_part_of_the_order():
    batch = {"batch": {"global_batch_size": 128}}
    assert kinds(config(), config(**batch)) == {"batch.global_batch_size": Kind.OPTIMISATION}
    by_step = {"data": {**MIXTURE, "mixture_by": "step"}}
    assert kinds(config(**by_step), config(**by_step, **batch)) == {"batch.global_batch_size": Kind.DATA_ORDER}


def test_the_config_on_disk_is_compared_and_one_that_cannot_be_read_is_a_warning(tmp_path):
    path = tmp_path / "config.yaml"
    assert resume_lines(path, config()) == []
    path.write_text(config_to_yaml(config()))
    assert resume_lines(path, config()) == []
    assert resume_lines(path, config(ema={"rampup": 0.2})) == [
        "config on resume: ema.rampup 0.1 -> 0.2 (changes optimisation)"
    ]
    for content in (b"\xff\xfe", b"run: {", b"{}", yaml.safe_dump({**TREE, "gone": 1}).encode()):
        path.write_bytes(content)
        (line,) = resume_lines(path, config())
        assert line.startswith("warning: the config of the last attempt cannot be compared with this one: ")


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
