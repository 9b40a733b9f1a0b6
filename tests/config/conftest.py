import pytest


@pytest.fixture
def path(tmp_path):
    """A small valid config file."""
    path = tmp_path / "config.yaml"
    path.write_text(
        "run: {name: a}\nvae: {kind: dct}\ndata: {latents: x, num_classes: 10}\ntrain: {total_samples: 1e4}\n"
        "optim: {learning_rate: 1e-4}\n"
    )
    return path
