"""An export as a diffusers pipeline: `DiffusionPipeline.from_pretrained(EXPORT, trust_remote_code=True)`.

The `pipeline.py` in each export imports this class, so ecar_dist has to be installed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput

from ecar_dist.api import Labels, Model, load


class EcarPipeline(DiffusionPipeline):
    """Draws the images of `ecar-dist sample`, bit for bit. The model is opened by the first call."""

    def __init__(self) -> None:
        super().__init__()
        self._model: Model | None = None
        self._device: torch.device | None = None  # None: a GPU if there is one

    def to(self, *args: Any, **kwargs: Any) -> EcarPipeline:
        """Choose the device. The precision is that of the run: a dtype is ignored."""
        for value in (*args, *kwargs.values()):
            if isinstance(value, str | torch.device | int) and not isinstance(value, bool):
                self._device = torch.device(value)
                self._model = None
        return self

    @property
    def _name_or_path(self) -> str:
        """The argument of `from_pretrained`."""
        config: Any = self.config  # type: ignore[attr-defined]  # ConfigMixin finds it on access
        return str(config._name_or_path)

    @property
    def model(self) -> Model:
        """The model behind the pipeline, see docs/api.md."""
        if self._model is None:
            self._model = load(_local_folder(self._name_or_path), device=self._device)
        return self._model

    def __call__(
        self,
        class_labels: Labels = None,
        *,
        num_images: int | None = None,
        seed: int = 0,
        batch_size: int = 64,
        return_dict: bool = True,
        **settings: Any,
    ) -> Any:
        """Draw images.

        class_labels: class numbers or names, or None for the unconditional model.
        num_images: number of images, cycling through the labels; one for each label by default.
        settings: as for `Model.sample`, e.g. guidance_scale=3.

        Returns an ImagePipelineOutput, or a tuple without `return_dict`.
        """
        images = self.model.sample(class_labels, count=num_images, seed=seed, batch_size=batch_size, **settings)
        return ImagePipelineOutput(images=images) if return_dict else (images,)


def _local_folder(name: str) -> Path:
    """The folder of an export: local, or downloaded from the hub."""
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(name))
