"""Tables that a compiled network stores as constants. If it traced them, it would compute them in each call."""

from collections.abc import Callable
from typing import Any, TypeVar

_Function = TypeVar("_Function", bound=Callable[..., Any])


def constant_when_compiled(function: _Function) -> _Function:
    """`torch.compiler.assume_constant_result`, for a function that depends only on sizes and devices.

    torch's decorator sets this attribute, but imports the compiler first. That takes as long as the rest of torch, and
    most commands compile nothing.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
