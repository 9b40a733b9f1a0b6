"""`ecar-data fit-codebook --hybrid`: tune an autoencoder's decoder for codes as well as for latents.

DC-AR (arXiv 2507.04947) tunes the decoder of its tokenizer on either the latents z or their codes z_q, so that both
decode well. Its loss has perceptual and adversarial terms; here it is only L1, the mean absolute difference. The
encoder and the normalisation do not change, so existing sets of latents and runs on them stay valid.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional

from data_tools.autoencoder.pictures import Pictures
from data_tools.autoencoder.state import Training, TrainingFolder
from data_tools.autoencoder.steps import one_cycle, run_steps, update
from data_tools.failures import MAX_BAD, FailureTally
from ecar_dist.data.codebook import codebook_of
from ecar_dist.data.images.decode import RESIZES, open_decoder
from ecar_dist.data.images.formats import parse_background
from ecar_dist.data.images.shards import ImageShards
from ecar_dist.data.shards.entries import CodebookEntry
from ecar_dist.data.shards.manifest import Manifest, load_manifest
from ecar_dist.errors import ConfigError, DataError
from ecar_dist.flow.discrete.nearest_code import nearest_codes
from ecar_dist.models.layers import patchify, unpatchify
from ecar_dist.vae.build import open_codec_by_spec
from ecar_dist.vae.codec import EncoderIdentity, check_same_encoder, denormalise, normalise, normalised_mean
from ecar_dist.vae.pretrained import PretrainedCodec, save_tuned

CODED_SHARE = 0.5  # share of the samples that the decoder receives as z_q

Quantise = Callable[[torch.Tensor], torch.Tensor]  # z -> z_q, both [B, C, h, w]


@dataclass(frozen=True)
class DecoderTuning:
    """The options. vae: as for `ecar-data encode`; None: the autoencoder that the manifest of the latents names."""

    images: Path
    seed: int = 0
    vae: str | None = None
    steps: int = 500
    batch_size: int = 32
    learning_rate: float = 5e-4


def nearest_latents(latents: torch.Tensor, codes: torch.Tensor, patch_size: int) -> torch.Tensor:
    """z_q: normalised latents [B, C, h, w] with each token replaced by its nearest code of [V, c]."""
    return unpatchify(codes[nearest_codes(patchify(latents, patch_size), codes)], patch_size)


def decode(codec: PretrainedCodec, latents: torch.Tensor) -> torch.Tensor:
    """Normalised latents [B, C, h, w] -> images [B, 3, H, W], not clamped, with gradients of the decoder."""
    return codec.model.decode(denormalise(codec.identity, latents)).sample


def open_tunable(latents: Path, vae: str | None, device: torch.device) -> PretrainedCodec:
    """The autoencoder of a set. Raises ConfigError if it has no weights, DataError if `vae` is a different one."""
    identity = EncoderIdentity.from_dict(load_manifest(latents).encoder)
    codec = open_codec_by_spec(vae or identity.name, device)
    check_same_encoder(identity, codec.identity, str(latents))
    if not isinstance(codec, PretrainedCodec):
        raise ConfigError(
            f"--hybrid tunes the decoder of an autoencoder, and {identity.name} has no weights; leave it out"
        )
    return codec


def decoder_folder(latents: Path, size: int, patch_size: int) -> Path:
    """The folder of the tuned decoder. Raises DataError if it already has one."""
    folder = latents / f"decoder-p{patch_size}-v{size}"
    if (folder / "config.json").exists():
        raise DataError(f"{folder} exists; remove it to tune the decoder again, or leave out --hybrid")
    return folder


def tune_decoder(
    latents: Path, size: int, patch_size: int, tuning: DecoderTuning, codec: PretrainedCodec, device: torch.device
) -> None:
    """Tune the decoder of `codec` to a codebook of a set. Write it, with the unchanged encoder, next to that codebook.

    Prints the L1 error on images that were held back, before and after. The same command resumes after a kill.
    """
    out = decoder_folder(latents, size, patch_size)
    manifest = load_manifest(latents)
    (entry,) = (one for one in manifest.codebooks if (one.size, one.patch_size) == (size, patch_size))
    codes = codebook_of([str(latents)], [manifest], size, patch_size).codes.to(device)
    quantise = functools.partial(nearest_latents, codes=codes, patch_size=patch_size)
    images = ImageShards(tuning.images)
    folder = TrainingFolder(out, _identity(tuning, images, codec, entry, device))
    out.mkdir(exist_ok=True)

    # The images, prepared as they were for the encoding.
    torch.manual_seed(tuning.seed)
    tally = FailureTally(out, len(images), MAX_BAD)
    pictures = _open_pictures(images, manifest, codec.identity.downsample, device, tuning.seed, tally)
    before = held_back_errors(codec, pictures, quantise, tuning.batch_size)

    # Only the weights of the decoder are trained.
    weights = codec.decoder_parameters()
    for weight in weights:
        weight.requires_grad_(True)
    training = Training(codec.model, *one_cycle(weights, tuning.learning_rate, tuning.steps), device)
    done, bad = folder.restore(training)
    pictures.recall_bad(bad)
    try:
        run_steps(
            training,
            pictures,
            folder,
            range(done, tuning.steps),
            tuning.batch_size,
            step=functools.partial(_step, codec=codec, quantise=quantise, weights=weights),
            label="decoder",
            shown=lambda error: f"L1={error:.4f}",
        )
    finally:
        pictures.list_bad(out)
    folder.finish(lambda path: save_tuned(codec, path, {"loss": "L1", "codebook_sha256": entry.sha256}))
    after = held_back_errors(codec, pictures, quantise, tuning.batch_size)
    print(
        f"{out}: L1 on {len(pictures.held_back)} held-back images before and after: {before[0]:.4f} and {after[0]:.4f} "
        f"from latents, {before[1]:.4f} and {after[1]:.4f} from codes; next: vae.path={out}"
    )


@torch.no_grad()
def held_back_errors(
    codec: PretrainedCodec, pictures: Pictures, quantise: Quantise, batch_size: int
) -> tuple[float, float]:
    """The mean absolute error of values in [-1, 1], decoded from z and from z_q; z is the mean of the posterior."""
    errors = torch.zeros(2, dtype=torch.float64)
    number = 0
    for images in pictures.held_back_batches(batch_size):
        z = normalised_mean(codec.identity, codec.encode(images))
        for place, latents in enumerate((z, quantise(z))):
            errors[place] += (decode(codec, latents).clamp(-1.0, 1.0) - images).abs().double().sum().item()
        number += images.numel()
    by_latents, by_codes = (errors / number).tolist()
    return by_latents, by_codes


def _step(
    training: Training,
    images: torch.Tensor,
    *,
    codec: PretrainedCodec,
    quantise: Quantise,
    weights: Sequence[nn.Parameter],
) -> torch.Tensor:
    """One optimizer step. Returns the L1 error before it, a scalar on the device."""
    moments = codec.encode(images)
    noise = torch.randn(len(moments), codec.identity.latent_channels, *moments.shape[2:], device=moments.device)
    z = normalise(codec.identity, moments, noise)  # a sample of the posterior
    coded = torch.rand(len(z), 1, 1, 1, device=z.device) < CODED_SHARE
    error = functional.l1_loss(decode(codec, torch.where(coded, quantise(z), z)), images)
    update(training, error, weights)
    return error.detach()


def _open_pictures(
    images: ImageShards, manifest: Manifest, downsample: int, device: torch.device, seed: int, tally: FailureTally
) -> Pictures:
    """The images, with the size, the resize filter and the background of the encoding of the set."""
    made = manifest.preprocessing
    resize = str(made.get("resize", "")).partition(":")[0]
    background = None if made.get("background") is None else parse_background(str(made["background"]))
    decoder = open_decoder("pil", resize=resize if resize in RESIZES else "cubic", background=background)
    return Pictures(images, decoder, manifest.moments_shape[-1] * downsample, device, seed, tally)


def _identity(
    tuning: DecoderTuning, images: ImageShards, codec: PretrainedCodec, codebook: CodebookEntry, device: torch.device
) -> dict[str, object]:
    """The state of an unfinished tuning must agree with this."""
    options = {name: value for name, value in dataclasses.asdict(tuning).items() if name not in ("images", "vae")}
    return {
        **options,
        "source": images.manifest.dataset_id,
        "autoencoder": codec.identity.weights_sha256,
        "codebook": codebook.sha256,
        "device": device.type,
    }
