"""Knobs of the training data: what is read, in which order, and how each node caches it."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from ecar_dist.config.knob import REQUIRED, OnResume, Section, knob


class MixtureSource(Section):
    """One entry of `data.mixture`."""

    latents: str = knob(REQUIRED, "folder or URL of one set of latent shards", on_resume=OnResume.DATA_ORDER)
    weight: float = knob(
        REQUIRED,
        "share of the samples that come from this set, relative to the other weights",
        unit="weight",
        on_resume=OnResume.DATA_ORDER,
        gt=0,
    )


class CacheSection(Section):
    """Where each node keeps the shards that it downloads."""

    dir: str | None = knob(
        None,
        "folder on a local disk; null: $ECAR_CACHE_DIR, or the temporary folder",
        per_node=True,
        on_resume=OnResume.SAFE,
    )
    gib: float | None = knob(
        None,
        "size limit per data set; above it, the shards whose next use is farthest away are deleted; null: no limit",
        unit="GiB",
        per_node=True,
        on_resume=OnResume.SAFE,
        gt=0,
    )
    threads: int = knob(
        8,
        "number of 8 MiB ranges that a rank downloads in parallel",
        unit="threads",
        per_node=True,
        on_resume=OnResume.SAFE,
        ge=1,
        le=64,
    )


class DataSection(Section):
    """The training data: exactly one of latents, mixture and images."""

    latents: str | None = knob(
        None,
        "folder or URL of latent shards with their manifest.json. A copy at another path is fine: data sets are "
        "compared by id",
        per_node=True,
        on_resume=OnResume.DATA_ORDER,
    )
    mixture: tuple[MixtureSource, ...] = knob(
        (),
        "several sets of latents with weights; the paths may differ between ranks, the weights must not",
        allowed="list of {latents, weight}",
        on_resume=OnResume.DATA_ORDER,
    )
    mixture_by: Literal["sample", "step"] = knob(
        "sample",
        "sample: the sets are mixed within each global batch; step: each global batch comes from one set, as "
        "resolution buckets require",
        on_resume=OnResume.DATA_ORDER,
    )
    images: str | None = knob(
        None,
        "folder or URL of image shards, to be encoded during training",
        per_node=True,
        on_resume=OnResume.DATA_ORDER,
    )
    flip_images: bool = knob(
        False,
        "images only: mirror half of the images (for latents use `ecar-data encode --flip store`)",
        on_resume=OnResume.DATA_ORDER,
    )
    resize: Literal["cubic", "adm"] = knob(
        "cubic",
        "images only: resizing. cubic: antialiased cubic; adm: the PIL reference of ADM and DiT",
        on_resume=OnResume.LATENTS,
    )
    background: str = knob(
        "white",
        "images only: color behind transparent pixels (for latents use `ecar-data encode --background`)",
        allowed="`white`, `black`, `#rrggbb`",
        on_resume=OnResume.DATA_ORDER,
        pattern=r"^(white|black|#[0-9a-fA-F]{6})$",
    )
    num_classes: int = knob(
        REQUIRED,
        "number of classes; labels are 0 to num_classes-1, and the null label is num_classes",
        unit="classes",
        on_resume=OnResume.MODEL,
        ge=1,
    )
    latent_channels: int = knob(4, "number of latent channels", unit="channels", on_resume=OnResume.MODEL, ge=1)
    latent_size: int = knob(
        32,
        "side length of the latents at the finest stage",
        unit="latent pixels",
        allowed="a multiple of model.patch_size x 2^(flow.num_stages-1)",
        on_resume=OnResume.MODEL,
        ge=1,
    )
    train_images: str | None = knob(
        None, "image shards on which the classifier for scoring is trained", per_node=True, on_resume=OnResume.SAFE
    )
    heldout_images: str | None = knob(
        None, "image shards that samples are scored against", per_node=True, on_resume=OnResume.SAFE
    )
    heldout_latents: str | None = knob(
        None,
        "folder or URL of latent shards for the validation loss, encoded like data.latents; null: no validation",
        per_node=True,
        on_resume=OnResume.SAFE,
    )
    backend: Literal["gather", "dali"] = knob(
        "gather",
        "reader of the shards: gather is numpy for latents and PIL for images, dali is NVIDIA DALI",
        on_resume=OnResume.SAFE,
    )
    prefetch: int = knob(
        2,
        "number of micro-batches that each rank reads ahead; more than fit in the CPU cache are slower",
        unit="micro-batches",
        per_node=True,
        on_resume=OnResume.SAFE,
        ge=1,
    )
    lanes: int | None = knob(
        None,
        "number of parallel streams that make up the sample order; null: chosen from the number of shards",
        unit="lanes",
        on_resume=OnResume.DATA_ORDER,
        ge=1,
    )
    window_shards: int = knob(
        4,
        "number of shards of a lane that are shuffled together; 0: all of them",
        unit="shards",
        on_resume=OnResume.DATA_ORDER,
        ge=0,
    )
    cache: CacheSection = CacheSection()
    on_bad: Literal["fail", "substitute"] = knob(
        "fail",
        "fail: a damaged sample ends the run; substitute: it is replaced by another sample and listed",
        on_resume=OnResume.OPTIMISATION,
    )
    max_bad: float | None = knob(
        None,
        "substitute only: maximum share of replaced samples; null: 1e-5 for latents, 1e-3 for images",
        unit="fraction",
        on_resume=OnResume.OPTIMISATION,
        ge=0,
        le=1,
    )

    @property
    def latent_sources(self) -> tuple[MixtureSource, ...]:
        """The sets of latents, one or several; empty if the run reads images."""
        return (MixtureSource(latents=self.latents, weight=1.0),) if self.latents else self.mixture

    @property
    def resolved_max_bad(self) -> float:
        if self.max_bad is not None:
            return self.max_bad
        return 1e-3 if self.images else 1e-5

    @model_validator(mode="after")
    def _check(self) -> DataSection:
        given = [name for name in ("latents", "mixture", "images") if getattr(self, name)]
        if len(given) != 1:
            raise ValueError(f"data has {' and '.join(given) or 'no source'}; give one of latents, mixture and images")
        if self.flip_images and not self.images:
            raise ValueError(
                "data.flip_images=True mirrors images, but the data are latents; set data.flip_images=false, and "
                "encode with `ecar-data encode --flip store`"
            )
        return self
