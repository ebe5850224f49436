"""Memory that cce_dist allocates without a value holds NaN in the tests, and integers a large number.

So what is read before it was written shows, where fresh memory would often hold zeros.
"""

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._device import _device_constructors

LARGE = {torch.int64: 2**40 + 7, torch.int32: 2**30 + 7, torch.int16: 2**14 + 7, torch.uint8: 251, torch.int8: 123}


def poison() -> None:
    """Replaces torch's allocating functions by some that fill, for calls out of cce_dist; once a process."""
    if not hasattr(torch.empty, "poisons"):
        _device_constructors()  # torch.device as a context knows functions by their identity, from the first call on
        torch.empty = _filling(torch.empty)
        torch.empty_like = _filling(torch.empty_like)
        Tensor.new_empty = _filling(Tensor.new_empty)  # type: ignore[method-assign]


def _filling(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def allocate_and_fill(*args: Any, **kwargs: Any) -> Tensor:
        x = allocate(*args, **kwargs)
        if sys._getframe(1).f_globals.get("__name__", "").startswith("cce_dist") and not x.is_meta:
            x.fill_(torch.nan if x.is_floating_point() else LARGE[x.dtype])
        return x

    allocate_and_fill.poisons = True  # type: ignore[attr-defined]
    return allocate_and_fill
