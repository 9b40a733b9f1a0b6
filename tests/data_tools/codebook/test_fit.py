"""`ecar-data fit-codebook`: k-means whose codes depend only on the set, and the files next to the shards."""

import dataclasses
import shutil

import pytest
import torch

from data_tools.cli import main
from data_tools.codebook import fit
from data_tools.codebook.kmeans import assign, from_fixed, updated
from ecar_dist.config.read import config_from_dict
from ecar_dist.data.codebook import codebook_of, read_codebook
from ecar_dist.data.fit import check_fits
from ecar_dist.data.shards.manifest import load_manifest, write_manifest
from ecar_dist.errors import ConfigError, DataError
from ecar_dist.flow.discrete.nearest_code import nearest_codes
from tests.runtime.checkpoint.worlds import Ranks, ThreadWorld

SIZE = 32


class SummingWorld(ThreadWorld):
    def sum(self, values):
        total = torch.stack([part.clone() for part in self._ranks.exchange(self.rank, values.clone())]).sum(0)
        return values.copy_(total)


@pytest.fixture
def latents(digits, tmp_path):
    """A copy of the digits' latents, 12 x 4 x 4."""
    return shutil.copytree(digits / "latents", tmp_path / "latents")


def fitted(folder, ranks=1, **options):
    """The codes after a fit by `ranks` processes."""
    settings = {"size": SIZE, "patch_size": 1, "iterations": 3, "max_samples": 900, "seed": 0} | options
    together = Ranks(ranks)
    worlds = [SummingWorld(together, rank) for rank in range(ranks)]
    together(lambda world: fit.fit_on_ranks(worlds[world.rank], folder, **settings))
    manifest = load_manifest(folder)
    return codebook_of([str(folder)], [manifest], settings["size"], settings["patch_size"]).codes


def test_three_processes_find_the_codes_of_one_to_the_bit(latents, monkeypatch):
    monkeypatch.setattr(fit, "SAMPLES_PER_BLOCK", 70)
    alone = fitted(latents)
    assert torch.equal(fitted(latents, ranks=3), alone)
    assert not torch.equal(fitted(latents, seed=1), alone)
    assert alone.shape == (SIZE, 12)


def test_codes_are_numbers_of_bfloat16_and_the_samples_stay_the_same_set(latents):
    before = load_manifest(latents)
    codes = fitted(latents, patch_size=2)
    after = load_manifest(latents)
    assert codes.shape == (SIZE, 48)
    assert torch.equal(codes, codes.bfloat16().float())
    assert after.dataset_id == before.dataset_id
    assert [(one.size, one.patch_size) for one in after.codebooks] == [(SIZE, 2)]
    fitted(latents, patch_size=1)
    fitted(latents, patch_size=2, iterations=1)  # replaces the first
    assert [(one.size, one.patch_size) for one in load_manifest(latents).codebooks] == [(SIZE, 1), (SIZE, 2)]


def test_each_iteration_lowers_the_error_and_no_code_stays_dead():
    """Three clouds, two codes near them and one far off, which restarts where nearly all the error is."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.tensor([[0.0, 0.0], [8.0, 0.0], [0.0, 8.0]])
    tokens = (centres[:, None] + 0.1 * torch.randn(3, 50, 2, generator=generator)).flatten(0, 1)
    blocks = [(torch.arange(start, start + 30), tokens[start : start + 30]) for start in range(0, 150, 30)]
    codes = torch.tensor([[0.5, 0.0], [7.5, 0.0], [100.0, 100.0]])
    errors, dead = [], []
    for iteration in range(6):
        found = assign(blocks, codes, seed=0, iteration=iteration)
        errors.append(found.mean_squared_error)
        dead.append(found.dead)
        codes = updated(found, codes)
    assert errors == sorted(errors, reverse=True)
    assert dead[0] == 1
    assert dead[-1] == 0
    assert errors[-1] == pytest.approx(0.01, rel=0.2)
    assert torch.cdist(centres, codes).min(1).values.max() < 0.1


def test_the_update_is_the_mean_of_the_nearest_tokens():
    generator = torch.Generator().manual_seed(0)
    tokens, codes = torch.randn(200, 5, generator=generator), torch.randn(7, 5, generator=generator)
    nearest = torch.cdist(tokens, codes).argmin(1)
    assert torch.equal(nearest_codes(tokens, codes), nearest)
    found = assign([(torch.arange(200), tokens)], codes, 0, 0)
    means = torch.stack([tokens[nearest == code].mean(0) for code in range(7)])
    torch.testing.assert_close(updated(found, codes), means, atol=1e-6, rtol=0)
    assert found.counts.tolist() == torch.bincount(nearest, minlength=7).tolist()
    assert found.mean_squared_error == pytest.approx(float((tokens - codes[nearest]).square().mean()), rel=1e-5)
    torch.testing.assert_close(from_fixed(found.sums).sum(0), tokens.sum(0), atol=1e-4, rtol=0)


def test_tokens_that_equal_their_codes_restart_nothing():
    codes = torch.tensor([[0.0], [1.0], [5.0]])
    found = assign([(torch.arange(4), torch.tensor([[0.0], [1.0], [0.0], [1.0]]))], codes, 0, 0)
    assert found.dead == 1
    assert torch.equal(updated(found, codes), codes)


def make_config(latents, **model):
    return config_from_dict(
        {
            "run": {"name": "test"},
            "model": {"kind": "par", "patch_size": 1, "codebook_size": SIZE, **model},
            "flow": {"num_stages": 1},
            "vae": {"kind": "dct"},
            "data": {"latents": str(latents), "num_classes": 10, "latent_channels": 12, "latent_size": 4},
            "train": {"total_samples": 1},
        }
    )


def test_a_run_without_its_codebook_is_told_the_command(latents):
    sets = [(str(latents), load_manifest(latents))]
    with pytest.raises(DataError, match=f"has none; .*fit-codebook {latents} --size {SIZE} --patch-size 1"):
        check_fits(make_config(latents), sets)
    fitted(latents)
    sets = [(str(latents), load_manifest(latents))]
    check_fits(make_config(latents), sets)
    with pytest.raises(DataError, match=f"64 codes .* has {SIZE} codes for tokens of 1 x 1"):
        check_fits(make_config(latents, codebook_size=64), sets)


def test_a_codebook_of_another_encoder_or_with_other_bytes_is_refused(latents, capsys):
    fitted(latents)
    manifest = load_manifest(latents)
    (entry,) = manifest.codebooks
    rescaled = dataclasses.replace(manifest, encoder={**manifest.encoder, "scaling_factor": 3.0})
    with pytest.raises(DataError, match=r"a different autoencoder or normalisation .* --size 32 --patch-size 1`"):
        read_codebook(latents, rescaled, entry)
    with pytest.raises(DataError, match=r"does not contain 32 finite codes of 48 numbers"):
        read_codebook(latents, manifest, dataclasses.replace(entry, patch_size=2))
    assert main(["verify", str(latents)]) == 0
    path = latents / entry.name
    path.write_bytes(path.read_bytes()[:-1] + bytes(1))
    assert main(["verify", str(latents)]) == 1
    assert f"{entry.name} has sha256" in capsys.readouterr().err.splitlines()[-1]


def test_a_manifest_with_two_codebooks_of_one_kind_is_refused(latents):
    fitted(latents)
    manifest = load_manifest(latents)
    with pytest.raises(DataError, match="two codebooks"):
        write_manifest(latents, dataclasses.replace(manifest, codebooks=manifest.codebooks * 2))


@pytest.mark.parametrize(
    ("options", "said"),
    [({"patch_size": 3}, "--patch-size 3 .* 4 x 4"), ({"size": 50_000}, "--size 50000 .* 23008")],
)
def test_mistakes(latents, options, said):
    with pytest.raises(ConfigError, match=said):
        fit.fit_codebook(latents, **{"size": SIZE, "patch_size": 1} | options)
