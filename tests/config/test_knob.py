"""Every knob has a meaning, a unit, and a class: the effect of a new value on a resumed run."""

from typing import get_args

import pytest
from pydantic import BaseModel

from ecar_dist.config.knob import OnResume, Section
from ecar_dist.config.knobs_data import MixtureSource
from ecar_dist.config.read import config_from_dict
from ecar_dist.config.run import RunConfig

KNOBS = {knob.key: knob for knob in RunConfig.knobs()}
IDENTITY = [  # as in every checkpoint on disk
    "model.kind",
    "model.preset",
    "model.ar_depth",
    "model.flow_depth",
    "model.patch_size",
    "flow.num_stages",
    "flow.ends",
    "flow.gamma",
    "flow.context.mode",
    "flow.context.tau",
    "data.num_classes",
    "data.latent_channels",
    "data.latent_size",
]


@pytest.fixture
def config():
    return config_from_dict(
        {
            "run": {"name": "a"},
            "vae": {"kind": "dct"},
            "data": {"latents": "x", "num_classes": 10},
            "train": {"total_samples": 10_000},
        }
    )


def leaves(section, prefix=""):
    """Dotted key and field of every leaf, found without `Section.knobs`."""
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            assert issubclass(field.annotation, Section)
            yield from leaves(field.annotation, f"{prefix}{name}.")
        else:
            yield prefix + name, field


def kinds_of(annotation):
    return {annotation} | {kind for part in get_args(annotation) for kind in kinds_of(part)}


def test_every_leaf_has_a_meaning_and_a_class():
    found = dict(leaves(RunConfig)) | {f"data.mixture[].{key}": field for key, field in leaves(MixtureSource)}
    assert set(KNOBS) <= set(found)
    assert len(KNOBS) > 70
    for key, field in found.items():
        extra = field.json_schema_extra
        assert extra, f"{key} is not defined by knob()"
        assert OnResume(extra["on_resume"])
        assert field.description, f"{key} has no meaning"


def test_every_number_has_a_unit():
    without = [key for key, knob in KNOBS.items() if {int, float} & kinds_of(knob.field.annotation) and not knob.unit]
    assert without == ["run.seed"]


def test_a_section_says_what_it_is_about():
    undocumented = [name for name, field in RunConfig.model_fields.items() if not field.annotation.__doc__]
    assert undocumented == []


def test_every_class_is_used():
    assert {knob.on_resume for knob in KNOBS.values()} == set(OnResume)


def test_the_values_have_the_keys_of_the_knobs(config):
    assert [key for key, _ in config.values()] == list(KNOBS)


def test_a_null_is_given_as_what_it_stands_for(config):
    values = dict(config.values())
    assert values["flow.ends"] == [1 / 3, 2 / 3, 1.0]
    assert values["data.max_bad"] == 1e-5
    assert values["data.lanes"] is None


def test_the_identity_of_a_model_has_the_keys_of_old_checkpoints(config):
    assert list(config.model_identity) == IDENTITY
    assert config.model_identity["flow.ends"] == [1 / 3, 2 / 3, 1.0]


def test_a_knob_added_later_is_part_of_the_identity_where_it_is_not_at_its_default():
    tree = {"run": {"name": "a"}, "flow": {"objective": "mean_velocity"}, "train": {"total_samples": 1}}
    data = {"latents": "none", "num_classes": 10, "latent_channels": 4, "latent_size": 8}
    config = config_from_dict({**tree, "vae": {"kind": "dct"}, "data": data})
    assert config.model_identity["flow.objective"] == "mean_velocity"
    assert set(config.model_identity) == {*IDENTITY, "flow.objective"}


def test_what_changes_the_latents_is_refused_by_the_encoder_not_by_the_identity():
    latents = [key for key, knob in KNOBS.items() if knob.on_resume is OnResume.LATENTS]
    assert latents == ["vae.kind", "vae.downsample", "data.resize"]
