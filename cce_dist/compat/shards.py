"""The shards of functions that are told rows and a group in each call.

Ranks compare their rows at the first use of a shard, so that equal arguments must give the same one.
"""

from torch.distributed import ProcessGroup

from cce_dist.shard import VocabShard
from cce_dist.shard.groups import ranks_of

_shards: dict[tuple[tuple[int, ...], int, int, int], VocabShard] = {}
"""By the group's ranks, this one's rows and the vocabulary."""


def shard_of(start: int, stop: int, vocab_size: int, group: ProcessGroup) -> VocabShard:
    """Rows start to stop of a vocabulary that the ranks of ``group`` share, which bring the same tokens."""
    key = tuple(ranks_of(group)), start, stop, vocab_size
    if key not in _shards or _shards[key].vocab_group is not group:  # of an earlier run, it may be
        _shards[key] = VocabShard(((start, stop),), vocab_size, group)
    return _shards[key]
