"""Real logits of a sharded classifier are collective: whoever waits for a rank that never comes is told so.

In goes a group of the hosts; the call returns once all of its ranks are there, or raises, before any rows move.
"""

from datetime import timedelta

import torch.distributed as dist
from torch.distributed import ProcessGroup

from cce_dist.shard.groups import timeout_of


def await_ranks(group: ProcessGroup, what: str) -> None:
    """Returns when all ranks of a group have come here; for evaluation, not for the steps of a training.

    The host waits, not the device: one small message to the first rank and back.

    Args:
        group: moves CPU tensors, as `cce_dist.shard.host_group` does.
        what: is collective, such as "the logits of a sharded classifier", for the text.

    Raises:
        RuntimeError: after the group's timeout, on every rank that came; on the group's first one it names those that
            did not.
    """
    timeout = timeout_of(group) or timedelta(minutes=30)  # torch's default
    try:
        group.monitored_barrier(timeout, wait_all_ranks=True)  # type: ignore[attr-defined]
    except RuntimeError as error:
        raise RuntimeError(
            f"{what} are collective over ranks {dist.get_process_group_ranks(group)}, but within {timeout} not all of "
            f"them came (by their place in this list: {error}). Make the call (a forward in evaluation, generate) on "
            "every rank, and use what it returns on one."
        ) from error
