"""Latent-diffusion autoencoders of diffusers, AutoencoderKL and AutoencoderDC, from a hub name or a local folder.

diffusers takes seconds to import, so it is imported where it is used.
"""

from __future__ import annotations

import dataclasses
import json
import warnings
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ecar_dist.errors import ConfigError
from ecar_dist.storage.untrusted import (
    MAX_JSON_BYTES,
    UntrustedError,
    parse_json,
    plain_name,
    printable,
    read_plain_file,
)
from ecar_dist.vae.codec import LOGVAR_RANGE, EncoderIdentity, LatentCodec, denormalise, hash_config, hash_state_dict

NORM_GROUPS = 8  # of `new_autoencoder`: its widths must be multiples of it
CLASSES = {"kl": "AutoencoderKL", "dc": "AutoencoderDC"}
TUNED_NAME = "tuned_decoder.json"  # in a folder with a fine-tuned decoder: names the encoder whose latents it decodes
_DECODER = ("decoder.", "post_quant_conv.")  # names of the weights that latents do not depend on
_MAX_CONFIG_BYTES = 1 << 20
_MAKE_ONE = "make one with `ecar-data train-vae SHARDS FOLDER`"


class PretrainedCodec(ABC):
    """Common to both kinds: computes in `dtype`, returns float32. `model` is the autoencoder of diffusers."""

    def __init__(self, model: Any, identity: EncoderIdentity, device: torch.device, dtype: torch.dtype) -> None:
        if dtype == torch.float16:
            raise ConfigError("fp16 overflows inside autoencoders and gives NaN; compute in fp32 or bf16")
        self.identity = identity
        self._dtype = dtype
        self.model = model.to(device, dtype).eval().requires_grad_(False)

    @abstractmethod
    def encode(self, images: torch.Tensor) -> torch.Tensor: ...

    def decoder_parameters(self) -> list[nn.Parameter]:
        """The parameters that latents do not depend on."""
        return [value for name, value in self.model.named_parameters() if name.startswith(_DECODER)]

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        raw = denormalise(self.identity, latents)
        return self.model.decode(raw.to(self._dtype)).sample.float().clamp(-1.0, 1.0)


class KlCodec(PretrainedCodec):
    """An AutoencoderKL behind `LatentCodec`: moments are mean and logvar."""

    def __init__(self, model: Any, name: str, device: torch.device, dtype: torch.dtype) -> None:
        downsample = 2 ** (len(model.config["block_out_channels"]) - 1)
        super().__init__(model, _identity("kl", model, name, downsample), device, dtype)

    @torch.no_grad()
    def encode(self, images: torch.Tensor) -> torch.Tensor:
        posterior = self.model.encode(images.to(self._dtype)).latent_dist
        mean, logvar = posterior.mean.float(), posterior.logvar.float().clamp(*LOGVAR_RANGE)
        return torch.cat((mean, logvar), dim=1)  # [B, 2C, h, w]


class DcCodec(PretrainedCodec):
    """An AutoencoderDC behind `LatentCodec`: deterministic, so the moments are the latent itself."""

    def __init__(self, model: Any, name: str, device: torch.device, dtype: torch.dtype) -> None:
        downsample = 2 ** (len(model.config["encoder_block_out_channels"]) - 1)
        super().__init__(model, _identity("dc", model, name, downsample), device, dtype)

    @torch.no_grad()
    def encode(self, images: torch.Tensor) -> torch.Tensor:
        return self.model.encode(images.to(self._dtype)).latent.float()  # [B, C, h, w]


_CODECS: dict[str, type[KlCodec | DcCodec]] = {"kl": KlCodec, "dc": DcCodec}


def open_pretrained(path: str, device: torch.device, dtype: torch.dtype, kind: str | None = None) -> LatentCodec:
    """Load from a local folder or a hub name. Its config names its class; `kind` requires a particular one.

    Raises ConfigError, in one line, if there is no such autoencoder.
    """
    # Refuse what does not fit, or could escape from its folder, before diffusers opens it.
    found = _kind_of(path)
    _check_weight_files(Path(path))
    if kind is not None and found != kind:
        raise ConfigError(f"{path} is an {CLASSES[found]}, vae.kind={kind} needs {CLASSES[kind]}; set vae.kind={found}")
    try:
        # A pickle can run code, so only safetensors are loaded.
        model = _autoencoder_class(CLASSES[found]).from_pretrained(path, low_cpu_mem_usage=False, use_safetensors=True)
        return _CODECS[found](model, path, device, dtype)
    except (OSError, ValueError, RuntimeError, TypeError, LookupError, AttributeError, ArithmeticError) as error:
        raise _not_loaded(path, error) from None


def new_autoencoder(channels: Sequence[int], latent_channels: int, layers_per_block: int) -> Any:
    """An untrained AutoencoderKL for RGB, downsampling by 2^(len(channels) - 1); `channels` go from fine to coarse."""
    depth = len(channels)
    return _autoencoder_class("AutoencoderKL")(
        down_block_types=("DownEncoderBlock2D",) * depth,
        up_block_types=("UpDecoderBlock2D",) * depth,
        block_out_channels=tuple(channels),
        layers_per_block=layers_per_block,
        latent_channels=latent_channels,
        norm_num_groups=NORM_GROUPS,
        scaling_factor=1.0,
        shift_factor=0.0,
        mid_block_add_attention=False,
    )


def save_autoencoder(model: Any, folder: Path, scaling_factor: float, shift_factor: float) -> None:
    """Write a folder for `open_pretrained`. The normalisation becomes part of the autoencoder's own config."""
    model.register_to_config(scaling_factor=scaling_factor, shift_factor=shift_factor)
    model.save_pretrained(folder)


def save_tuned(codec: PretrainedCodec, folder: Path, notes: Mapping[str, Any]) -> None:
    """Write a codec whose decoder was trained further, for `open_pretrained`.

    Its latents are those of `codec.identity`, and it keeps that identity as long as its encoder has the same weights.
    `notes` say how the decoder was trained.
    """
    codec.model.register_to_config(_name_or_path="")  # else the config reveals the codec's path on this machine
    codec.model.save_pretrained(folder)
    of = {"weights_sha256": codec.identity.weights_sha256, "encoder_sha256": encoder_sha256(codec.model)}
    (folder / TUNED_NAME).write_text(json.dumps({**of, **notes}, indent=1) + "\n")


def encoder_sha256(model: Any) -> str:
    """The sha256 of the weights that latents depend on."""
    return hash_state_dict({name: value for name, value in model.state_dict().items() if not name.startswith(_DECODER)})


def _autoencoder_class(name: str) -> Any:
    import diffusers
    from huggingface_hub.utils import logging as hub_logging

    diffusers.utils.logging.set_verbosity_error()  # its advice is about pipelines
    hub_logging.set_verbosity_error()  # one line per attempt; we report the last
    warnings.filterwarnings("ignore", message=".*local_dir_use_symlinks", module="huggingface_hub")
    return getattr(diffusers, name)


def _kind_of(path: str) -> str:
    """The kind of the class that the autoencoder's config names."""
    name = _class_name(path)
    for kind, class_name in CLASSES.items():
        if name == class_name:
            return kind
    raise ConfigError(f"{path} contains {name}, not {' or '.join(CLASSES.values())}; {_MAKE_ONE}")


def _class_name(path: str) -> str | None:
    folder = Path(path)
    if not folder.exists():
        # A hub name is `owner/name`; anything else is a folder.
        if path.startswith(("/", ".", "~")) or path.count("/") > 1:
            raise ConfigError(f"autoencoder folder {path} does not exist; give a local folder, or {_MAKE_ONE}")
        try:
            return _autoencoder_class("AutoencoderKL").load_config(path).get("_class_name")
        except (OSError, ValueError, RuntimeError) as error:
            raise _not_loaded(path, error) from None
    try:
        name = parse_json(read_plain_file(folder / "config.json", _MAX_CONFIG_BYTES), foreign=True).get("_class_name")
        return name if name is None else printable(str(name), 80)
    except (OSError, ValueError, AttributeError):
        raise ConfigError(f"{path} has no readable config.json of an autoencoder; {_MAKE_ONE}") from None


def _check_weight_files(folder: Path) -> None:
    """An index names the files of sharded weights, and diffusers opens any path in it: allow plain names only."""
    for index in folder.glob("*.index.json"):
        try:
            for name in set(parse_json(read_plain_file(index, MAX_JSON_BYTES))["weight_map"].values()):
                plain_name(name)
        except (OSError, UntrustedError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"{index} names no weights next to it ({error}); restore it, or {_MAKE_ONE}") from None


def _not_loaded(path: str, error: Exception) -> ConfigError:
    reason = str(error).strip().split("\n")[0].rstrip(".")
    if Path(path).exists():
        return ConfigError(f"cannot load autoencoder {path!r} ({reason}); give a local folder, or {_MAKE_ONE}")
    chain = _chain(error)
    if any(type(link).__name__ == "LocalEntryNotFoundError" for link in chain):
        # diffusers says that a file is missing there, which is not the cause
        reason = f"cannot reach the hub ({str(chain[-1]).strip()})"
    return ConfigError(f"no local folder {path!r}, and as a hub name: {reason}; give a local folder, or {_MAKE_ONE}")


def _chain(error: BaseException) -> list[BaseException]:
    """The error and its causes, the root last."""
    before = error.__cause__ or error.__context__
    return [error] if before is None else [error, *_chain(before)]


def _identity(kind: str, model: Any, name: str, downsample: int) -> EncoderIdentity:
    config = {key: value for key, value in model.config.items() if not key.startswith("_")}
    identity = EncoderIdentity(
        kind=kind,
        name=name,
        weights_sha256=hash_state_dict(model.state_dict()),
        config_sha256=hash_config(config),
        latent_channels=config["latent_channels"],
        downsample=downsample,
        scaling_factor=float(config["scaling_factor"]),
        shift_factor=float(config.get("shift_factor") or 0.0),
        deterministic=kind == "dc",
    )
    record = Path(name) / TUNED_NAME
    return _tuned_from(record, model, identity) if record.is_file() else identity


def _tuned_from(record: Path, model: Any, identity: EncoderIdentity) -> EncoderIdentity:
    """The identity of the autoencoder from which a decoder was tuned. Raises ConfigError for a different encoder."""
    try:
        stated = parse_json(read_plain_file(record, _MAX_CONFIG_BYTES), foreign=True)
        weights, encoder = str(stated["weights_sha256"]), str(stated["encoder_sha256"])
    except (OSError, ValueError, KeyError, TypeError):
        raise ConfigError(f"{record} cannot be read; tune the decoder again") from None
    found = encoder_sha256(model)
    if found != encoder:
        raise ConfigError(
            f"the encoder of {record.parent} has sha256 {found}, {TUNED_NAME} says {printable(encoder, 64)}; tune the "
            "decoder again, or remove that file to use it as an autoencoder of its own"
        )
    return dataclasses.replace(identity, weights_sha256=weights)
