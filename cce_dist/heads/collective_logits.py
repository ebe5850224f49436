"""Real logits of a sharded classifier are collective: whoever waits for a rank that never comes is told so."""

from datetime import timedelta

from torch import Tensor
from torch.distributed import ProcessGroup

from cce_dist.shard import VocabShard
from cce_dist.shard.agreement import agree
from cce_dist.shard.groups import ranks_of, timeout_of


def await_ranks(shard: VocabShard, hidden: Tensor, what: str, gathered_over: ProcessGroup | None = None) -> None:
    """Returns when all ranks have come to compute real logits; where some compute a loss instead, all raise.

    The hosts wait, not the devices.

    Args:
        hidden: [..., D], what the logits are of.
        what: is collective, such as "the logits of a classifier that FSDP2 shards", for the text.
        gathered_over: a group of CPU tensors over all ranks that give rows, where those are more than the shard's.

    Raises:
        RuntimeError: after the group's timeout, on every rank that came; it names one that did not.
        ValueError: on every rank of the vocabulary group, where they want different things.
    """
    group = shard.vocab_group
    try:
        agree(shard, "real logits", hidden[..., 0].numel(), {})
        if gathered_over is not None:
            group, wait = gathered_over, timeout_of(gathered_over) or timedelta(minutes=30)  # torch's default
            gathered_over.monitored_barrier(wait, wait_all_ranks=True)  # type: ignore[attr-defined]
    except RuntimeError as error:
        assert group is not None
        raise RuntimeError(
            f"{what} are collective over ranks {ranks_of(group)}, but within {timeout_of(group)} not all of them came "
            f"({error}). Make the call (a forward in evaluation, generate) on every rank, and use what it returns on "
            "one."
        ) from error
