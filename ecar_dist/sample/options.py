"""Sampler settings that are given to one command: every knob of `sample.*` by its name. Does not import torch.

guidance_scale -> --guidance-scale, and `--sweep guidance-scale=1,2,4`
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any, get_origin

from ecar_dist.config.knob import Knob
from ecar_dist.config.knobs_model import SampleSection
from ecar_dist.config.read import override_value, with_overrides
from ecar_dist.config.run import RunConfig
from ecar_dist.errors import ConfigError
from ecar_dist.storage.untrusted import printable

# All knobs of `sample.*` but the interval of previews, by the name of the option without leading dashes.
SAMPLING_KNOBS: dict[str, Knob] = {
    knob.key.replace("_", "-"): knob for knob in SampleSection.knobs() if knob.key != "every_samples"
}
WEIGHTS = ("step", "ema")  # which weights; can be swept too
MOST_ROWS = 64  # of a sweep


def with_settings(config: RunConfig, settings: Mapping[str, Any]) -> RunConfig:
    """The config with other values of `sample.*`, by knob or option; strings are parsed as on the command line.

    Raises ConfigError for an unknown name, or a value that breaks a rule.
    """
    values = {}
    for given, value in settings.items():
        option = given.replace("_", "-")
        if option not in SAMPLING_KNOBS:
            raise ConfigError(f"unknown setting {printable(given, 60)}{_nearest(option, [*SAMPLING_KNOBS])}")
        knob = SAMPLING_KNOBS[option]
        values[f"sample.{knob.key}"] = _parse(knob, value) if isinstance(value, str) else value
    try:
        return with_overrides(config, values) if values else config
    except ConfigError as error:
        raise ConfigError(_as_options(str(error))) from None


def parse_sweep(text: str) -> tuple[str, list[str]]:
    """Parse `guidance-scale=1,2,4` into the option and its values. Raises ConfigError.

    A value that is a list uses colons: `steps-per-stage=4,8,2:4:8`.
    """
    option, _, rest = text.partition("=")
    option = option.removeprefix("--").replace("_", "-")
    known = [*SAMPLING_KNOBS, *WEIGHTS]
    if option not in known:
        raise ConfigError(f"--sweep of unknown option {printable(option, 60)}{_nearest(option, known)}")
    values = [value.strip() for value in rest.split(",")]
    if not all(values):
        raise ConfigError(f"--sweep {printable(text, 60)} has an empty value; give e.g. guidance-scale=1,2,4")
    if len(values) > MOST_ROWS:
        raise ConfigError(f"--sweep has {len(values)} values, but a sheet has at most {MOST_ROWS} rows; give fewer")
    return option, values


def parse_step(text: str) -> int:
    """Parse an optimizer step. Raises ConfigError."""
    digits = text.replace("_", "").replace(",", "")
    if not (digits.isascii() and digits.isdigit() and len(digits) < 19):
        raise ConfigError(f"--step {printable(text, 60)} is not a step; give a whole number, such as 5000")
    return int(digits)


def _parse(knob: Knob, text: str) -> Any:
    """The value of a knob from text; the items of a list are separated by commas or colons."""
    if get_origin(knob.field.annotation) is tuple:
        text = f"[{text.strip('[] ').replace(':', ',')}]"
    return override_value(f"sample.{knob.key}", text)


def _as_options(message: str) -> str:
    """Turn a message about `sample.time_shift` into one about `--time-shift`."""
    for option, knob in SAMPLING_KNOBS.items():
        message = message.replace(f"sample.{knob.key}", f"--{option}")
    return message


def _nearest(word: str, known: list[str]) -> str:
    close = difflib.get_close_matches(word[:80], known, 1, 0.5)
    return f"; did you mean {close[0]}?" if close else f"; choose one of {', '.join(known)}"
