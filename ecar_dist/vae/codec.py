"""The interface of an autoencoder: its identity, its two directions, and the normalisation of latents.

Stored data are *moments*: raw and unscaled. The model sees *latents*: (sample of the posterior - shift) x scale. So a
different normalisation does not require a new data set.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Protocol

import torch
from pydantic import ConfigDict, Field, ValidationError

from ecar_dist.errors import DataError
from ecar_dist.storage.untrusted import adapter_of, first_violation

LOGVAR_RANGE = (-30.0, 20.0)  # the clamp that latent-diffusion autoencoders apply to their own posterior


@dataclass(frozen=True)
class EncoderIdentity:
    """Everything that determines which numbers an encoder produces, and how they are normalised.

    Two encoders are the same if every field but `name` agrees: a hub name and its local copy are the same encoder.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", allow_inf_nan=False)

    kind: str  # key of vae/table.py
    name: str  # hub name or folder, for messages
    weights_sha256: str  # of the sorted state dict, see `hash_state_dict`
    config_sha256: str  # of the canonical JSON of the architecture
    latent_channels: Annotated[int, Field(ge=1)]  # C
    downsample: Annotated[int, Field(ge=1)]  # image pixels per latent pixel side
    scaling_factor: Annotated[float, Field(gt=0)]
    shift_factor: float
    deterministic: bool  # True: moments are [C, H, W]; False: mean and logvar, [2C, H, W]
    input_range: tuple[float, float] = (-1.0, 1.0)

    def to_dict(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "input_range": list(self.input_range)}

    @staticmethod
    def from_dict(tree: Mapping[str, Any]) -> EncoderIdentity:
        """Raises DataError if a field is missing, unknown, of the wrong type or out of range."""
        try:
            # As JSON, because otherwise strict mode does not accept an array for a tuple.
            return adapter_of(EncoderIdentity).validate_json(json.dumps(tree), strict=True)
        except ValidationError as error:
            reason = first_violation(error)
        except (TypeError, ValueError) as error:
            reason = str(error)
        raise DataError(f"encoder identity is corrupted ({reason}); encode the latents again")

    @property
    def moments_channels(self) -> int:
        return self.latent_channels if self.deterministic else 2 * self.latent_channels


class LatentCodec(Protocol):
    """An autoencoder on one device. Both directions run without gradients and return float32."""

    @property
    def identity(self) -> EncoderIdentity: ...

    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Images [B, 3, H, W] in [-1, 1] -> raw moments [B, 2C, h, w] (mean, logvar), or [B, C, h, w]."""
        ...

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """NORMALISED latents [B, C, h, w] -> images [B, 3, H, W] clamped to [-1, 1]."""
        ...


def sample_posterior(identity: EncoderIdentity, moments: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Raw latents, float32 [B, C, h, w]: mean + exp(logvar / 2) x noise, or the stored latent itself."""
    if identity.deterministic:
        return moments.float()
    mean, logvar = moments.float().chunk(2, dim=1)
    return mean + torch.exp(0.5 * logvar) * noise


def normalise(identity: EncoderIdentity, moments: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Raw moments -> what the model sees, float32 [B, C, h, w]. `noise` is N(0, 1) of that same shape."""
    return (sample_posterior(identity, moments, noise) - identity.shift_factor) * identity.scaling_factor


def normalised_mean(identity: EncoderIdentity, moments: torch.Tensor) -> torch.Tensor:
    """`normalise` of the mean of the posterior, without noise."""
    return normalise(identity, moments, moments.new_zeros(()))


def denormalise(identity: EncoderIdentity, latents: torch.Tensor) -> torch.Tensor:
    """The inverse of `normalise`'s scale and shift: what a decoder takes."""
    return latents.float() / identity.scaling_factor + identity.shift_factor


def check_same_encoder(expected: EncoderIdentity, found: EncoderIdentity, where: str) -> None:
    """Raises DataError naming the first field (of all but `name`) in which the two encoders differ."""
    for field in dataclasses.fields(EncoderIdentity):
        ours, theirs = getattr(expected, field.name), getattr(found, field.name)
        if field.name != "name" and ours != theirs:
            raise DataError(
                f"{where}: autoencoder {found.name} has {field.name}={theirs}, {expected.name} has {ours}; "
                "use the autoencoder that encoded the latents, or encode them again with this one"
            )


def hash_state_dict(state_dict: Mapping[str, torch.Tensor]) -> str:
    """sha256 over (name, dtype, shape, bytes) of the tensors, sorted by name."""
    digest = hashlib.sha256()
    for name in sorted(state_dict):
        tensor = state_dict[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def hash_config(config: Mapping[str, Any]) -> str:
    """sha256 of the canonical JSON of an architecture."""
    return hashlib.sha256(json.dumps(config, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
