"""A distributed trainer of ECAR image generators. The names of `__all__` are its Python interface; see docs/api.md."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ecar_dist.api import Dataset, Model, fit, load

__version__ = "0.1.0"
__all__ = ["Dataset", "Model", "__version__", "fit", "load"]


def __getattr__(name: str) -> Any:
    # They import torch, so they are imported when they are first used.
    if name in __all__:
        from ecar_dist import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
