"""Triton's decorator, with types a checker can follow."""

from collections.abc import Callable
from typing import Any

import triton


def jit(function: Callable[..., Any]) -> Any:
    """Make a function that kernels call."""
    return triton.jit(function)


def kernel(*numbers: str) -> Callable[[Callable[..., Any]], Any]:
    """Compile a kernel once for all values of `numbers`: they change from launch to launch."""
    return lambda function: triton.jit(function, do_not_specialize=[*numbers])
