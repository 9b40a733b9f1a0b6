"""`ecar-data fit-codebook`: k-means on the tokens of a set of latents, in one or several processes.

The tokens are those that a model sees: patches of normalised latents, each a sample of the autoencoder's posterior.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data_tools.codebook.decoder import DecoderTuning, decoder_folder, open_tunable, tune_decoder
from data_tools.codebook.kmeans import (
    Assignment,
    Block,
    assign,
    best_candidates,
    from_fixed,
    to_fixed,
    updated,
)
from ecar_dist.data.codebook import Fitted, write_codebook
from ecar_dist.data.shards.manifest import Manifest, load_manifest
from ecar_dist.data.shards.read import open_latent_shard
from ecar_dist.errors import ConfigError
from ecar_dist.models.layers import patchify
from ecar_dist.rng import Purpose, normal, uniform
from ecar_dist.runtime.placement import placement_from_environment
from ecar_dist.runtime.start.rendezvous import local_device, start_world, stop_world
from ecar_dist.runtime.world import World
from ecar_dist.storage.remote import file_in
from ecar_dist.vae.codec import EncoderIdentity, normalise

SAMPLES_PER_BLOCK = 256  # a block is assigned in one piece; processes take blocks round-robin


def fit_codebook(
    out: Path,
    *,
    size: int,
    patch_size: int = 2,
    iterations: int = 20,
    max_samples: int = 20_000,
    seed: int = 0,
    hybrid: Path | None = None,
    **tuning: Any,
) -> None:
    """Fit `size` codes to the tokens of a finished set, and list them in its manifest.

    hybrid: image shards on which the first process then tunes the decoder. `tuning`: the fields of DecoderTuning.

    The same set, options and kind of machine give the same codes, with any number of processes. Raises DataError
    if the set is damaged, ConfigError if it has fewer tokens than codes or its latents cannot be split into patches.
    """
    with contextlib.ExitStack() as ends:
        world = _open_world(ends)
        codec = None
        if hybrid is not None:
            chosen = DecoderTuning(hybrid, seed=seed, **tuning)
            world.on_first_rank(lambda: decoder_folder(out, size, patch_size))
            codec = world.on_first_rank(lambda: open_tunable(out, chosen.vae, world.device))
        fit_on_ranks(world, out, size, patch_size, iterations, max_samples, seed)
    if codec is not None:
        tune_decoder(out, size, patch_size, chosen, codec, world.device)


def fit_on_ranks(
    world: World, out: Path, size: int, patch_size: int, iterations: int, max_samples: int, seed: int
) -> None:
    """`fit_codebook` on the processes of a world. Collective."""
    manifest = world.together(lambda: load_manifest(out))
    world.together(lambda: _check(manifest, size, patch_size, max_samples))
    blocks = world.together(lambda: list(_read_blocks(out, manifest, patch_size, max_samples, seed, world)))
    tokens = _num_tokens(manifest, patch_size, max_samples)
    channels = EncoderIdentity.from_dict(manifest.encoder).latent_channels * patch_size**2
    codes = _first_codes(blocks, (size, channels), tokens, seed, world)

    # Lloyd's iterations.
    for iteration in range(iterations):
        found = _assign_all(blocks, codes, seed, iteration, world)
        _say(world, f"iteration {iteration + 1}: {_described(found)}")
        before, codes = codes, updated(found, codes)
        if torch.equal(before, codes):
            break

    # The codes as training reads them, and how well they fit.
    codes = codes.bfloat16().float()
    found = _assign_all(blocks, codes, seed, iterations, world)
    std = torch.tensor([found.mean_squared_error**0.5]).bfloat16().float()
    entry = world.on_first_rank(lambda: write_codebook(out, manifest, Fitted(codes.cpu(), std), patch_size))
    if entry is not None:
        print(f"{out / entry.name}: {size} codes for {tokens:,} tokens, {_described(found)}; sha256 {entry.sha256}")


def _open_world(ends: contextlib.ExitStack) -> World:
    """All processes that torchrun or srun started; a single one without a launcher."""
    placement = placement_from_environment(os.environ)
    if placement.size == 1:
        return World(placement, local_device(placement))
    ends.callback(stop_world)
    return start_world()


def _check(manifest: Manifest, size: int, patch_size: int, max_samples: int) -> None:
    height, width = manifest.moments_shape[-2:]
    if height % patch_size or width % patch_size:
        raise ConfigError(f"--patch-size {patch_size} does not divide latents of {height} x {width}; give another one")
    tokens = _num_tokens(manifest, patch_size, max_samples)
    if tokens < size:
        raise ConfigError(
            f"--size {size} is more than the {tokens} tokens that are read; give fewer codes, or more --max-samples"
        )


def _used(manifest: Manifest, max_samples: int) -> list[int]:
    """How many samples to read from each shard: equal shares. The first ones are read; they are a random choice."""
    share = min(1.0, max_samples / manifest.count)
    return [max(1, int(entry.count * share)) for entry in manifest.shards]


def _num_tokens(manifest: Manifest, patch_size: int, max_samples: int) -> int:
    height, width = manifest.moments_shape[-2:]
    return sum(_used(manifest, max_samples)) * (height // patch_size) * (width // patch_size)


def _read_blocks(
    out: Path, manifest: Manifest, patch_size: int, max_samples: int, seed: int, world: World
) -> Iterator[Block]:
    """This process's blocks of tokens, in memory. Tokens are numbered across all blocks."""
    identity = EncoderIdentity.from_dict(manifest.encoder)
    block = 0
    first_token = 0
    for entry, used in zip(manifest.shards, _used(manifest, max_samples), strict=True):
        shard = None
        for start in range(0, used, SAMPLES_PER_BLOCK):
            rows = slice(start, min(start + SAMPLES_PER_BLOCK, used))
            count = rows.stop - rows.start
            height, width = manifest.moments_shape[-2:]
            num_tokens = count * (height // patch_size) * (width // patch_size)
            if block % world.size == world.rank:
                shard = shard or open_latent_shard(file_in(out, entry.name), entry, manifest)
                indices = torch.arange(count) + entry.first_index + start
                tokens = _tokens(shard.moments[rows], shard.mirrored[rows], indices, identity, patch_size, seed)
                numbers = torch.arange(first_token, first_token + num_tokens)
                yield numbers.to(world.device), tokens.to(world.device)
            block += 1
            first_token += num_tokens


def _tokens(
    moments: np.ndarray,
    mirrored: np.ndarray,
    indices: torch.Tensor,
    identity: EncoderIdentity,
    patch_size: int,
    seed: int,
) -> torch.Tensor:
    """Tokens float32 [n, c] of samples, half of them mirrored, with the noise of the posterior keyed by index."""
    flips = uniform(seed, indices, Purpose.FLIP) < 0.5
    chosen = np.where(flips.numpy()[:, None, None, None], mirrored, moments)
    noise = normal(seed, indices, Purpose.POSTERIOR, (identity.latent_channels, *moments.shape[2:]))
    latents = normalise(identity, torch.from_numpy(chosen), noise)
    return patchify(latents, patch_size).flatten(0, 1)


def _first_codes(blocks: list[Block], shape: tuple[int, int], num_tokens: int, seed: int, world: World) -> torch.Tensor:
    """[V, c] random tokens, each at most once; the same ones on all processes."""
    size, _ = shape
    chosen = torch.from_numpy(np.random.default_rng(seed).choice(num_tokens, size, replace=False)).to(world.device)

    # Each process fills in the tokens of its own blocks; the sum over processes has all of them.
    codes = torch.zeros(shape, dtype=torch.int64, device=world.device)
    for numbers, tokens in blocks:
        inside = ((chosen >= numbers[0]) & (chosen <= numbers[-1])).nonzero()[:, 0]
        codes[inside] = to_fixed(tokens[chosen[inside] - numbers[0]])
    return from_fixed(world.sum(codes))


def _assign_all(blocks: list[Block], codes: torch.Tensor, seed: int, iteration: int, world: World) -> Assignment:
    """One pass over the tokens of all processes; the same result on each."""
    found = assign(blocks, codes, seed, iteration)
    for values in (found.sums, found.counts, found.error):
        world.sum(values)
    device = world.device
    for rank, parts in enumerate(world.gather([part.cpu() for part in (found.keys, found.numbers, found.tokens)])):
        if rank != world.rank:
            found = best_candidates(found, *(part.to(device) for part in parts))
    return found


def _described(found: Assignment) -> str:
    return (
        f"mean squared error {found.mean_squared_error:.4f} per number, perplexity {found.perplexity:.0f}, dead codes "
        f"{found.dead}"
    )


def _say(world: World, line: str) -> None:
    if world.is_first:
        print(line, flush=True)
