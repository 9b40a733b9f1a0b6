"""The scoring classifier: a small convolutional network, trained on the user's real images and never on samples.

Its penultimate layer is the feature space of the Frechet distance. Its name is stored with every score.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from ecar_dist.vae.pixels import from_pixels

CLASSIFIER_NAME = "convnet64-v1"
INPUT_SIDE = 32
FEATURES = 64
TRAINING_THREADS = 2
CHUNK = 256  # images on the device at once, at their own size


class ScoringClassifier(nn.Module):
    """uint8 [B, H, W, 3] -> 64 features, and logits over the classes."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.trunk = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(64 * (INPUT_SIDE // 8) ** 2, FEATURES), nn.ReLU(),
        )  # fmt: skip
        self.head = nn.Linear(FEATURES, num_classes)

    def features(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.trunk(at_input_side(pixels))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.head(self.features(pixels))


def at_input_side(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 [B, H, W, 3] -> float [B, 3, 32, 32]: the size at which all scores are computed."""
    x = from_pixels(pixels)
    if x.shape[-1] != INPUT_SIDE:
        x = F.interpolate(x, size=(INPUT_SIDE, INPUT_SIDE), mode="bilinear", antialias=True)
    return x


def inputs_of(images: np.ndarray, device: torch.device) -> torch.Tensor:
    """All images uint8 [N, H, W, 3] as the classifier sees them, float [N, 3, 32, 32] on the device."""
    return torch.cat([at_input_side(chunk.to(device)) for chunk in torch.from_numpy(images).split(CHUNK)])


def train_classifier(
    images: np.ndarray,
    labels: np.ndarray,
    num_classes: int,
    device: torch.device,
    seed: int = 0,
    epochs: int = 20,
    batch_size: int = 64,
) -> ScoringClassifier:
    """Train on real images uint8 [N, H, W, 3] with labels [N]; small shifts are the only augmentation.

    The model is on `device`. The images stay on the host, which sends one batch at a time.

    The order of sums is fixed: TRAINING_THREADS threads on a CPU, cuDNN's deterministic kernels on a GPU. Training
    amplifies a difference in the last bit to up to 4 % of a Frechet distance.
    """
    with torch.random.fork_rng(devices=[]), _fixed_sums():
        # The seed determines the weights, the order and the shifts. All are drawn on the host, so they are the same on
        # every device. The caller's generator is not touched.
        torch.manual_seed(seed)
        model = ScoringClassifier(num_classes).to(device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=1e-2)

        # One cycle of the learning rate over all steps.
        steps = epochs * -(-len(images) // batch_size)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=steps)
        pixels, targets = torch.from_numpy(images), torch.from_numpy(labels).long()

        for _ in range(epochs):
            for rows in torch.randperm(len(pixels)).split(batch_size):
                batch = _shift(pixels[rows].to(device))
                loss = F.cross_entropy(model(batch), targets[rows].to(device))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
    return model.eval()


@contextlib.contextmanager
def _fixed_sums() -> Iterator[None]:
    """Sums in the same order in each run, on a CPU and on a GPU."""
    before = torch.get_num_threads()
    torch.set_num_threads(TRAINING_THREADS)
    try:
        with _exact_kernels():
            yield
    finally:
        torch.set_num_threads(before)


def _exact_kernels() -> contextlib.AbstractContextManager[None]:
    """On a GPU: deterministic kernels, in full fp32. cuDNN's default is TF32."""
    return torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False)


def _shift(pixels: torch.Tensor) -> torch.Tensor:
    """Roll the whole batch by a few pixels. The borders of the images are background, or continue smoothly."""
    reach = max(1, pixels.shape[1] // 16)
    down, right = torch.randint(-reach, reach + 1, (2,)).tolist()
    return pixels.roll((down, right), dims=(1, 2))


@torch.no_grad()
def features_and_predictions(model: ScoringClassifier, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Features [N, 64] and predicted classes [N] of images uint8 [N, H, W, 3], computed on the model's device."""
    device = model.head.weight.device
    with _exact_kernels():
        chunks = torch.from_numpy(images).split(CHUNK)
        features = torch.cat([model.features(chunk.to(device)) for chunk in chunks])
    return features.cpu().numpy(), model.head(features).argmax(1).cpu().numpy()
