"""Compares the config of a resumed run with that of the previous attempt: what differs, and what each change means.

Nothing is refused here. The checkpoint itself refuses a different model or a different order of the data; these lines
tell the user what has changed before training continues.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ecar_dist.config.knob import OnResume
from ecar_dist.config.read import load_config
from ecar_dist.config.run import RunConfig
from ecar_dist.errors import ConfigError
from ecar_dist.storage.redaction import redact_tree


@dataclass(frozen=True)
class Difference:
    """One knob whose value has changed, with both values as in JSON."""

    key: str
    old: Any
    new: Any
    on_resume: OnResume

    def __str__(self) -> str:
        change = f"{_shown(self.old)} -> {_shown(self.new)}"
        return f"config on resume: {self.key} {change} ({self.on_resume.value})"


def shared_settings(config: RunConfig) -> dict[str, str]:
    """The values that all ranks of a run must share, as text without credentials: all knobs that are not `per_node`.

    For a mixture, only the weights are compared.
    """
    per_node = {knob.key for knob in RunConfig.knobs() if knob.per_node}
    values = {key: value for key, value in config.values() if key not in per_node}
    values["data.mixture"] = [source.weight for source in config.data.latent_sources]
    return {key: _shown(value) for key, value in values.items()}


def drift(old: RunConfig, new: RunConfig, *, same_data: bool = False) -> list[Difference]:
    """Every knob whose value differs, in the order of their definition.

    same_data: the data sets have the same ids in both configs, so a different path does not change the order.
    """
    before, after = dict(old.values()), dict(new.values())
    defined = {knob.key: knob.on_resume for knob in RunConfig.knobs()}
    return [
        Difference(key, before[key], after[key], _special_case(key, old, new, same_data) or defined[key])
        for key in after
        if before[key] != after[key]
    ]


def _special_case(key: str, old: RunConfig, new: RunConfig, same_data: bool) -> OnResume | None:
    """What a change means if that also depends on other knobs; None: as in the knob's definition."""
    # a different path to the same data
    if same_data and key in ("data.latents", "data.images"):
        return OnResume.SAFE
    if same_data and key == "data.mixture" and _weights(old) == _weights(new):
        return OnResume.SAFE

    # a constant learning rate does not depend on where the run ends
    if key == "train.total_samples" and old.optim.schedule == new.optim.schedule == "constant":
        return OnResume.SAFE

    # each set fills whole global batches
    if key == "batch.global_batch_size" and new.data.mixture and new.data.mixture_by == "step":
        return OnResume.DATA_ORDER
    return None


def _weights(config: RunConfig) -> list[float]:
    return [source.weight for source in config.data.mixture]


def resume_lines(old_config: Path, new: RunConfig, *, same_data: bool = False) -> list[str]:
    """What to print when a run resumes: a line for each difference from the previous config.yaml, if there is one.

    A file that cannot be read, e.g. from a release with other knobs, only gives a warning: the checkpoint has its own
    identity.
    """
    if not old_config.exists():
        return []
    try:
        old = load_config(old_config)
    except ConfigError as error:
        return [f"warning: the config of the last attempt cannot be compared with this one: {error}"]
    lines = [str(difference) for difference in drift(old, new, same_data=same_data)]

    # a config.yaml from a release without the knob
    if new.data.images is not None and "background" not in old.data.model_fields_set:
        lines.append(
            "warning: the release that began this run dropped the transparency of images; from here on transparent "
            f"pixels are drawn over data.background={new.data.background}"
        )
    return lines


def _shown(value: Any) -> str:
    """On one line, and without the credentials that a URL may contain."""
    shown = redact_tree(value)
    return shown if isinstance(shown, str) and shown.isprintable() else json.dumps(shown, sort_keys=True)
