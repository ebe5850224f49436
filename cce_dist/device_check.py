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


def check_token_ids(ids: Tensor, vocab_size: int, spared: int, must_be: str) -> None:
    """Raises ValueError for an id outside of the vocabulary that is not ``spared``; on CUDA `device_check` does.

    Args:
        must_be: what is legal, for the text.
    """
    legal = ((ids >= 0) & (ids < vocab_size)) | (ids == spared)
    if ids.is_cuda:
        device_check(legal.all(), f"{must_be}.")
    elif not legal.all():
        raise ValueError(f"{must_be}, got {ids[~legal].unique()[:8].tolist()}; check the tokenizer's vocabulary size.")
