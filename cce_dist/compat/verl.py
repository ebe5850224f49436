"""The linear cross-entropy of verl (`verl.utils.kernel.linear_cross_entropy`), which slime and SkyRL have too.

    from cce_dist.compat.verl import linear_cross_entropy

    logprobs, entropy = linear_cross_entropy(hidden, weight, labels, temperature, "none", tensor_parallel_group)

Shapes: N tokens, D hidden, V local rows of the classifier.
"""

from torch import Tensor
from torch.distributed import ProcessGroup

from cce_dist.compat.shards import shard_of
from cce_dist.heads.owner import divide_gradient
from cce_dist.loss import linear_logprobs
from cce_dist.shard import VocabShard

_NONE_IS_IGNORED = -(2**31)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    temperature: float | None = 1.0,
    reduction: str | None = "none",
    dist_process_group: ProcessGroup | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of labels under softmax(hidden · weightᵀ / temperature), and the entropies.

    As there, the hidden gradient of a sharded vocabulary is each rank's part, which the caller sums: what gathered the
    sequence does that in its backward, by a reduce-scatter. What each rank gets here is the sum, divided by the number
    of ranks. As nothing else of verl's, shapes need not be multiples of 128, and tokens without a label are an error.

    Args:
        hidden: [N, D] or [..., D], such as [L, 1, D]; the same tokens on all ranks of the group.
        weight: [V, D]: equal parts of the vocabulary, in the order of ranks.
        labels: [N], or any shape of as many, such as [1, L], over the whole vocabulary.
        temperature: a positive float; None: 1.
        reduction: "none" or None.
        dist_process_group: of the ranks that share the vocabulary; None: ``weight`` is all of it.

    Returns:
        (log-probabilities, entropies), each [N], in the order of labels, in fp32, differentiable.

    Raises:
        ValueError, TypeError: as `linear_logprobs`; another reduction.
    """
    if (reduction or "none").lower() != "none":
        raise ValueError(f'reduction must be "none", got {reduction!r}: sum what it returns.')
    shard: VocabShard | None = None
    if dist_process_group is not None:
        ranks, rows = dist_process_group.size(), weight.shape[0]
        start = dist_process_group.rank() * rows
        shard = shard_of(start, start + rows, ranks * rows, dist_process_group)
        hidden = divide_gradient(hidden, ranks)
    found = linear_logprobs(
        hidden.reshape(-1, hidden.shape[-1]) if isinstance(hidden, Tensor) and hidden.ndim else hidden,
        weight,
        labels.reshape(-1) if isinstance(labels, Tensor) else labels,
        shard=shard,
        temperature=1.0 if temperature is None else float(temperature),
        entropy=True,
        ignore_index=_NONE_IS_IGNORED,
    )
    assert found.entropy is not None
    return found.logprob, found.entropy
