import dataclasses

import pytest
import torch

from ecar_dist.errors import DataError
from ecar_dist.vae.codec import EncoderIdentity, check_same_encoder, denormalise, hash_state_dict, normalise

KL = EncoderIdentity("kl", "here", "w", "c", 4, 8, scaling_factor=0.5, shift_factor=0.25, deterministic=False)


def test_identity_survives_json():
    assert EncoderIdentity.from_dict(KL.to_dict()) == KL
    tree = KL.to_dict()
    del tree["downsample"]
    with pytest.raises(DataError, match="encoder identity"):
        EncoderIdentity.from_dict(tree)


def test_normalise_samples_the_posterior_then_shifts_then_scales():
    mean, logvar = torch.randn(2, 4, 3, 3).half(), torch.randn(2, 4, 3, 3).half()
    noise = torch.randn(2, 4, 3, 3)
    latents = normalise(KL, torch.cat((mean, logvar), 1), noise)
    assert latents.dtype == torch.float32
    expected = (mean.double() + (logvar.double() / 2).exp() * noise.double() - 0.25) * 0.5
    torch.testing.assert_close(latents.double(), expected, rtol=1e-5, atol=1e-6)


def test_a_deterministic_encoder_ignores_the_noise():
    identity = dataclasses.replace(KL, deterministic=True)
    moments = torch.randn(2, 4, 3, 3)
    latents = normalise(identity, moments, torch.full((2, 4, 3, 3), torch.nan))
    torch.testing.assert_close(latents, (moments - 0.25) * 0.5)
    torch.testing.assert_close(denormalise(identity, latents), moments)


@pytest.mark.parametrize("field", ["weights_sha256", "config_sha256", "scaling_factor", "shift_factor", "downsample"])
def test_another_encoder_is_refused_by_field(field):
    value = "x" if isinstance(getattr(KL, field), str) else 7
    other = dataclasses.replace(KL, name="there", **{field: value})
    with pytest.raises(DataError, match=rf"latents: .*there has {field}={value}, here has "):
        check_same_encoder(KL, other, "latents")


def test_the_name_is_not_compared():
    check_same_encoder(KL, dataclasses.replace(KL, name="owner/hub-name"), "latents")


def test_weights_hash_sees_names_types_shapes_and_values_but_not_order():
    base = {"a": torch.arange(6.0), "b": torch.ones(2)}
    same = {"b": torch.ones(2), "a": torch.arange(6.0)}
    assert hash_state_dict(base) == hash_state_dict(same)
    others = [
        {"a": torch.arange(6.0), "c": torch.ones(2)},
        {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2)},
        {"a": torch.arange(6.0).bfloat16(), "b": torch.ones(2)},
        {"a": torch.arange(6.0), "b": torch.tensor([1.0, 1.0001])},
    ]
    assert len({hash_state_dict(tree) for tree in [base, *others]}) == 5
    assert hash_state_dict({"x": torch.zeros(2, 3).t()}) == hash_state_dict({"x": torch.zeros(3, 2)})
