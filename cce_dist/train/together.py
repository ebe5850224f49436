"""Errors that reach every rank: none goes on to wait for one that has raised."""

from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

T = TypeVar("T")


def together(action: Callable[[], T], what: str = "") -> T:
    """Collective: calls ``action`` on every rank, which must not wait for other ranks; returns each rank's own result.

    Raises:
        ValueError: on every rank, if the action has raised on any; names the ranks and their errors, after ``what``.
    """
    result: T
    cause, fault = None, None
    try:
        result = action()
    except Exception as error:
        cause, fault = error, str(error) if type(error) is ValueError else f"{type(error).__name__}: {error}"
    faults: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(faults, fault)
    found = [f"rank {rank}: {text}" for rank, text in enumerate(faults) if text is not None]
    if not found:
        return result
    if len(set(faults)) == 1 and fault is not None:  # all of them say the same
        found = [fault]
    raise ValueError(
        what + "; ".join(found[:4]) + (f"; and {len(found) - 4} more" if len(found) > 4 else "")
    ) from cause


def on_rank_0(action: Callable[[], T]) -> T:
    """Collective: calls ``action`` on rank 0 alone; returns its result on every rank.

    Raises:
        ValueError: on every rank, if it has raised.
    """
    result = [together(lambda: action() if dist.get_rank() == 0 else None)]
    dist.broadcast_object_list(result)
    return result[0]  # type: ignore[return-value]
