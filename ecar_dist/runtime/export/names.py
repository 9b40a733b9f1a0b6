"""The names of a model's classes: stored with its weights, or in the data that it was trained on."""

from __future__ import annotations

from ecar_dist.config.run import RunConfig
from ecar_dist.data.fit import local_sets
from ecar_dist.errors import DataError
from ecar_dist.storage.untrusted import is_one_line

CLASS_NAMES = "class_names"  # key in a checkpoint's client state and in an export's config.json


def class_names(config: RunConfig, stored: object) -> list[str] | None:
    """The names stored with the weights, else those of the data set if it is on this machine, else None."""
    num_classes = config.data.num_classes
    if stored is not None:
        return _proven(stored, num_classes)
    try:
        sets = local_sets(config, absent_ok=True)
    except (DataError, OSError):  # a run from before names were stored, whose data is gone
        return None
    return _proven(sets[0][1].class_names, num_classes) if sets else None


def _proven(value: object, num_classes: int) -> list[str] | None:
    """The names; None for anything but one printable line per class."""
    if not isinstance(value, list) or len(value) != num_classes:
        return None
    names = [name for name in value if isinstance(name, str) and is_one_line(name)]
    return names if len(names) == num_classes else None
