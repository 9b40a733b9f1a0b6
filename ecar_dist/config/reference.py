"""The reference page of all knobs: `python -m ecar_dist.config.reference > docs/config.md`, or `make docs`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from ecar_dist.config.knob import Knob, OneOf, OnResume, Section
from ecar_dist.config.run import RunConfig

OPENING = """\
# Configuration

<!-- Written by `make docs` from the definitions in ecar_dist/config/knobs_*.py. Do not edit. -->

One YAML file defines a run. `ecar-dist check CONFIG` validates it, and prints every value and the derived numbers.

Precedence: **defaults < YAML < overrides**. An override is `section.knob=value` on the command line; the last one wins.

```yaml
# mine.yaml: the required knobs, and a few others
run: {name: first}
model: {kind: ecar, preset: B}
vae: {kind: dct, downsample: 8}
data: {latents: data/latents, num_classes: 10, latent_channels: 12, latent_size: 32}
optim: {learning_rate: 1e-4, warmup_samples: 100_000}
train: {total_samples: 10_000_000}
```

```
ecar-dist train mine.yaml optim.learning_rate=2e-4 'ema.half_life_samples=[100_000, 1_000_000]'
```

- Values are YAML. Numbers may be written as `1e6` or `1_000_000`. An override of a text knob is taken literally:
  `run.name=1` is the text `1`.
- An unknown key is an error that names the nearest known one. For an invalid value, the error states the rule.
- The resolved values are written to `config.yaml` in the run directory.
- \\* marks knobs that may differ between nodes. All others must be the same on all ranks; this is checked at start.

## On resume

To resume a run, run the same command again. The config is compared with that of the last attempt, and each
difference is printed with its class:

| class | what a new value does |
|---|---|
| safe | Training continues as before. |
| optimisation | Training continues from the checkpoint, and the loss curve changes from there. |
| data order | Checkpoints are refused unless `--new-data-order` is given; then training continues in the new order. |
| latents | Checkpoints are refused: their latents were made differently. Undo the change, or set a new `run.name`. |
| model | Checkpoints are refused: their weights are of a different model. Undo the change, or set a new `run.name`. |

Exceptions:

- `train.total_samples` is safe with `optim.schedule=constant`.
- `data.latents`, `data.mixture` and `data.images` are safe if the new path contains the same data set.
- `batch.global_batch_size` changes the data order with `data.mixture_by=step`.
"""

CLASSES = {
    OnResume.SAFE: "safe",
    OnResume.OPTIMISATION: "optimisation",
    OnResume.DATA_ORDER: "data order",
    OnResume.LATENTS: "latents",
    OnResume.MODEL: "model",
}


def page() -> str:
    """The complete text of docs/config.md."""
    parts = [OPENING]
    for name, field in RunConfig.model_fields.items():
        assert isinstance(field.annotation, type)
        assert issubclass(field.annotation, Section)
        parts += _section(field.annotation, name, "##")
    return "\n".join(parts)


def _section(section: type[Section], name: str, heading: str) -> Iterator[str]:
    """Heading, description and table of a section, then the same for its subsections."""
    rows = ["| knob | default | type | unit | allowed | meaning | on resume |", "|---|---|---|---|---|---|---|"]
    inner: dict[str, type[Section]] = {}
    for key, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            inner[f"{name}.{key}"] = field.annotation
            continue
        rows.append(_row(Knob(f"{name}.{key}", field)))
        # a list of sections, such as data.mixture
        for part in get_args(field.annotation):
            if isinstance(part, type) and issubclass(part, Section):
                inner[f"{name}.{key}[]"] = part

    yield "\n".join([f"{heading} {name}", "", section.__doc__ or "", "", *rows, ""])
    for inner_name, inner_section in inner.items():
        yield from _section(inner_section, inner_name, f"{heading}#")


def _row(knob: Knob) -> str:
    cells = [
        f"`{knob.key}`" + (" \\*" if knob.per_node else ""),
        _default(knob.field),
        _type(knob.field.annotation),
        knob.unit,
        knob.allowed or _allowed(knob.field),
        knob.meaning,
        CLASSES[knob.on_resume],
    ]
    return f"| {' | '.join(cells)} |"


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    if isinstance(field.default, str):
        return f"`{field.default}`"
    if isinstance(field.default, tuple):
        return f"`[{', '.join(map(_number, field.default))}]`"
    return f"`{_number(field.default)}`"


def _number(value: Any) -> str:
    return f"{value:_}" if type(value) is int else json.dumps(value)


def _type(annotation: Any) -> str:
    """The type in YAML terms: `list of float`, `str or null`."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin in (Union, UnionType):
        return " or ".join("null" if part is NoneType else _type(part) for part in parts)
    if origin is Annotated:
        return _type(parts[0])
    if origin is Literal:
        return type(parts[0]).__name__
    if origin is tuple:
        return f"list of {_type(parts[0])}"
    if origin is dict or issubclass(annotation, Section):
        return "section"
    return annotation.__name__


def _allowed(field: FieldInfo) -> str:
    """The allowed values, as far as the field's type and constraints define them."""
    if get_origin(field.annotation) is Literal:
        return ", ".join(f"`{value}`" for value in get_args(field.annotation))
    bounds: dict[str, Any] = {}
    for rule in field.metadata:
        if isinstance(rule, OneOf):
            return ", ".join(f"`{name}`" for name in rule.names)
        bounds |= {name: getattr(rule, name) for name in ("ge", "gt", "le", "lt") if hasattr(rule, name)}
    signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
    return " and ".join(f"{sign} {bounds[name]}" for name, sign in signs.items() if name in bounds)


if __name__ == "__main__":
    print(page(), end="")
