"""Which rows of the classifier a rank holds, which process groups its loss talks to, and how the ranks agree on a call.

groups, rows ← agreement ← vocab_shard.
"""

from cce_dist.shard.groups import Group, as_group, host_group, new_subgroup
from cce_dist.shard.vocab_shard import VocabShard

__all__ = ["Group", "VocabShard", "as_group", "host_group", "new_subgroup"]
