"""Conditions that only the device knows: an error without waiting for it.

torch has no public name for its asynchronous assertion; it is used here alone.
"""

import torch
from torch import Tensor


def device_check(holds: Tensor, message: str) -> None:
    """Where ``holds`` (0-d, on CUDA) turns out false, a device-side assertion with this message ends the process.

    Raises:
        RuntimeError: this torch has no such assertion.
    """
    assert_async = getattr(torch, "_assert_async", None)
    if assert_async is None:
        raise RuntimeError(
            f"torch {torch.__version__} has no _assert_async, by which cce_dist checks what only the GPU knows without "
            "waiting for it. torch 2.11 and 2.13 are tested; use one of them."
        )
    assert_async(holds, message)
