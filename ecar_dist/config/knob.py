"""How a knob is defined: its default, meaning and unit, and the effect of a new value on a resumed run.

The knob's definition contains all of this. Validation, the comparison on resume (`runtime/run/drift.py`), the
identity of a model (`RunConfig.model_identity`) and the reference page (`docs/config.md`) read it from there.
"""

from __future__ import annotations

import enum
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any, cast

from pydantic import BaseModel, ConfigDict, Field
from pydantic.fields import FieldInfo
from pydantic_core import CoreSchema, core_schema

REQUIRED: Any = ...  # the default of a knob that the user must set


class OnResume(enum.Enum):
    """The effect of a new value on a resumed run. The text is shown to users."""

    SAFE = "safe"
    OPTIMISATION = "changes optimisation"
    DATA_ORDER = "changes data order: needs --new-data-order"
    LATENTS = "different latents: checkpoints are refused"
    MODEL = "different model: checkpoints are refused"


def knob(
    default: Any,
    meaning: str,
    *,
    on_resume: OnResume,
    unit: str = "",
    allowed: str = "",
    per_node: bool = False,
    added_later: bool = False,
    **rules: Any,
) -> Any:
    """A pydantic field that documents itself.

    allowed: description of the permitted values, for rules that a validator checks.
    per_node: the ranks of a run may have different values.
    added_later: older checkpoints were written before the knob existed, that is, with its default.
    rules: the constraints of `pydantic.Field`, e.g. `ge=0`.
    """
    extra = {
        "unit": unit,
        "allowed": allowed,
        "on_resume": on_resume.value,
        "per_node": per_node,
        "added_later": added_later,
    }
    return Field(default, description=meaning, json_schema_extra=cast(Any, extra), **rules)


@dataclass(frozen=True)
class OneOf:
    """Annotated[str, OneOf(TABLE)]: one of the keys of a table; like Literal, without a written-out list of names."""

    names: Collection[str]

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> CoreSchema:
        return core_schema.literal_schema(list(self.names))


@dataclass(frozen=True)
class Knob:
    """One leaf of the config: its dotted key and its definition."""

    key: str
    field: FieldInfo

    @property
    def meaning(self) -> str:
        return self.field.description or ""

    @property
    def unit(self) -> str:
        return self._extra["unit"]

    @property
    def allowed(self) -> str:
        return self._extra["allowed"]

    @property
    def on_resume(self) -> OnResume:
        return OnResume(self._extra["on_resume"])

    @property
    def per_node(self) -> bool:
        return self._extra["per_node"]

    @property
    def added_later(self) -> bool:
        return self._extra["added_later"]

    @property
    def _extra(self) -> dict[str, Any]:
        return cast(dict[str, Any], self.field.json_schema_extra)


class Section(BaseModel):
    """Base class of all sections: frozen, no unknown keys, finite numbers only."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)

    @classmethod
    def knobs(cls, prefix: str = "") -> Iterator[Knob]:
        """All knobs of this section and of its subsections, in the order of their definition."""
        for name, field in cls.model_fields.items():
            if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
                yield from field.annotation.knobs(f"{prefix}{name}.")
            else:
                yield Knob(prefix + name, field)

    def values(self, prefix: str = "") -> Iterator[tuple[str, Any]]:
        """(dotted key, JSON value) of every knob; a null is replaced by `resolved_*`, if there is one."""
        dumped = self.model_dump(mode="json")
        for name in type(self).model_fields:
            value = getattr(self, name)
            if isinstance(value, Section):
                yield from value.values(f"{prefix}{name}.")
                continue
            resolved = getattr(self, f"resolved_{name}", None) if value is None else dumped[name]
            yield prefix + name, list(resolved) if isinstance(resolved, tuple) else resolved
