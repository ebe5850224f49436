"""Class weights: what each label's row of the classifier says its token's loss is to count.

In: this rank's labels, and a weight for each of its rows. Out: a number of each token. Collectives: a SUM [N] over the
vocabulary group; where each rank has its own tokens, the labels are gathered before, as for the loss.

Shapes: n tokens of this rank, N of the token group, V local rows.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from cce_dist.loss.autograd import Call
from cce_dist.loss.tokens import gather_values, own


def weights_of_labels(class_weights_V: Tensor, call: Call, dtype: torch.dtype) -> Tensor:
    """[n], 0 where ignored."""
    shard, labels_n, ignore_index = call.shard, call.labels_n, call.settings.ignore_index
    labels_N = gather_values(labels_n, shard, call.padded_to, ignore_index)
    column_N = shard.local_columns(labels_N)
    here_N = (column_N >= 0) & (labels_N != ignore_index)
    weights_N = torch.zeros(labels_N.shape, dtype=dtype, device=labels_N.device)
    if class_weights_V.shape[0]:
        own_N = class_weights_V.to(dtype).index_select(0, column_N.clamp(min=0))
        weights_N = torch.where(here_N, own_N, weights_N)
    if shard.vocab_group is not None:
        dist.all_reduce(weights_N, group=shard.vocab_group)
    return own(weights_N, labels_n.shape[0], call.padded_to, shard)
