"""`hybrid`: a token is its code and a residual, what the trunk and the head see, and that the weights learn."""

import pytest
import torch

from ecar_dist.flow.loss import masked_code_loss, token_loss
from ecar_dist.flow.masking import arccosine_ratio
from ecar_dist.kinds.flow_head import TrunkSize
from ecar_dist.models.tokens.hybrid import Hybrid

CHANNELS, NUM_CLASSES, TOKENS, CODES, DRAWS = 3, 5, 16, 8, 2  # 8 x 8 latents in patches of 2: 12 numbers per token


def make_model(*, trained=True):
    torch.manual_seed(0)
    model = Hybrid(
        TrunkSize(2, 32, 2, 2),
        num_codes=CODES,
        latent_size=8,
        latent_channels=CHANNELS,
        patch_size=2,
        num_classes=NUM_CLASSES,
    )
    with torch.no_grad():
        model.residual_scale.scale.fill_(0.25)
        for name, parameter in model.named_parameters():
            if trained and name not in ("codebook.codes", "residual_scale.scale"):
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.fixture
def batch():
    """(tokens, mask, noise, u, times, labels): the first sample has 5 tokens masked, the second 9."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randn(2, TOKENS, 12, generator=generator)
    mask = torch.arange(TOKENS)[None] < torch.tensor([[5], [9]])
    noise = torch.randn(2, DRAWS, TOKENS, 12, generator=generator)
    u = torch.rand(2, DRAWS, TOKENS, generator=generator)
    return tokens, mask, noise, u, u, torch.tensor([2, NUM_CLASSES])


def test_code_and_residual_are_the_token(batch):
    model, tokens = make_model(), batch[0]
    codes, vectors, residuals = model.split(tokens)
    torch.testing.assert_close(model.join(vectors, residuals), tokens, atol=1e-6, rtol=0)
    assert torch.equal(vectors, model.codebook.codes[codes])
    torch.testing.assert_close(residuals, (tokens - vectors) / 0.25)


def test_the_logits_see_the_codes_of_unmasked_tokens_alone(batch):
    model, (tokens, mask, *rest) = make_model(), batch
    logits, codes, *_ = model(tokens, mask, *rest)
    other = torch.where(mask[..., None], model.codebook((codes + 1) % CODES), tokens)
    assert torch.equal(model(other, mask, *rest)[0], logits)
    nudged = model.codebook(codes) + 1e-3  # the same codes, different residuals
    assert torch.equal(model(nudged, mask, *rest)[0], logits)
    other = torch.where(mask[..., None], tokens, model.codebook((codes + 1) % CODES))
    assert (model(other, mask, *rest)[0] - logits).abs().max() > 1e-3


def test_the_targets_are_the_residuals_less_their_noise(batch):
    model, (tokens, mask, noise, *rest) = make_model(), batch
    _, _, velocities, targets = model(tokens, mask, noise, *rest)
    _, _, residuals = model.split(tokens)
    torch.testing.assert_close(targets, residuals[:, None] - noise)
    assert velocities.shape == targets.shape


def test_a_residual_is_told_the_code_of_its_own_token(batch):
    """Even where the trunk sees it masked."""
    model, (tokens, mask, *_, labels) = make_model(), batch
    codes, vectors, _ = model.split(tokens)
    hidden = model.hidden(codes, torch.ones_like(mask), labels)
    before = model.conditions(hidden, vectors)
    after = model.conditions(hidden, model.codebook((codes + 1) % CODES))
    assert ((after - before).abs().amax(-1) > 1e-4).all()


def test_every_weight_but_the_fitted_ones_learns(batch):
    model = make_model(trained=False)
    before = {name: value.clone() for name, value in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0)
    for _ in range(5):
        optimizer.zero_grad()
        logits, codes, velocities, targets = model(*batch)
        (masked_code_loss(logits, codes, batch[1]) + token_loss(velocities, targets)).mean().backward()
        optimizer.step()
    same = {name for name, value in model.named_parameters() if torch.equal(value, before[name])}
    assert same == {"codebook.codes", "residual_scale.scale"}
    assert torch.isfinite(logits).all()


def test_the_loss_of_codes_is_that_of_masked_tokens(batch):
    model, mask = make_model(), batch[1]
    logits, codes, *_ = model(*batch)
    chosen = -logits.log_softmax(-1).gather(-1, codes[..., None])[..., 0]
    expected = [chosen[0, :5].mean(), chosen[1, :9].mean()]
    torch.testing.assert_close(masked_code_loss(logits, codes, mask), torch.stack(expected))


def test_shares_that_are_masked_follow_the_arccosine():
    u = torch.tensor([0.0, 0.5, 0.999999])
    assert arccosine_ratio(u)[:2].tolist() == pytest.approx([1.0, 2 / 3])
    assert 0 < float(arccosine_ratio(u)[2]) < 0.002
