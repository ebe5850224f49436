"""`linear_cross_entropy` of Apple's cut-cross-entropy (github.com/apple/ml-cross-entropy), on cce_dist.

    from cce_dist.compat.apple import VocabParallelOptions, linear_cross_entropy

What differs: filtered gradients are unbiased, sums are always in fp32 (``accum_e_fp32`` and ``accum_c_fp32`` ask for
what is so anyway), 0 tokens are no error, and a classifier may be a DTensor.

Shapes: L tokens of a sequence, D hidden, V local rows of the classifier.
"""

from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from cce_dist.compat.shards import shard_of
from cce_dist.heads.owner import divide_gradient
from cce_dist.loss import linear_cross_entropy as loss_of_shards
from cce_dist.shard import VocabShard
from cce_dist.shard.groups import host_group

_FILTERED = ("cce", "cce_kahan", "cce_kahan_full_c", "cce_kahan_full_e", "cce_kahan_full_c_full_e")
_EXACT = ("cce_exact", "torch_compile")


@dataclass
class VocabParallelOptions:
    """Which global rows this rank's classifier holds.

    Args:
        start, stop: of the rows.
        group: of the ranks that hold the others; None: all ranks.
        reduce_e_grad: False: the hidden gradient is left for the caller to sum over the ranks; each gets the sum,
            divided by their number.
        vocab_size: of all ranks together; given on all of them, or on none: then each call asks the others for theirs.
    """

    start: int
    stop: int
    group: ProcessGroup | None = None
    reduce_e_grad: bool = True
    vocab_size: int | None = None

    @classmethod
    def from_vocab(
        cls, vocab_size: int, group: ProcessGroup | None = None, reduce_e_grad: bool = True
    ) -> "VocabParallelOptions":
        """Rows split as evenly as can be, the first ranks with one more."""
        rank, ranks = dist.get_rank(group), dist.get_world_size(group)
        start = rank * (vocab_size // ranks) + min(rank, vocab_size % ranks)
        stop = start + vocab_size // ranks + int(rank < vocab_size % ranks)
        return cls(start, stop, group, reduce_e_grad, vocab_size)

    for_vocab = from_vocab  # its name for a while


def linear_cross_entropy(
    e: Tensor,
    c: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    softcap: float | None = None,
    reduction: str = "mean",
    shift: bool | int = 0,
    return_lse: bool = False,
    filter_eps: float | str | None = "auto",
    accum_e_fp32: bool = False,
    accum_c_fp32: bool = False,
    filter_e_grad: bool = True,
    filter_c_grad: bool = True,
    impl: str = "cce",
    vocab_parallel_options: VocabParallelOptions | None = None,
) -> Any:
    """See `cce_dist.linear_cross_entropy`.

    Args:
        e: [..., L, D].
        c: [V, D], this rank's rows.
        targets: [..., L], global ids; all ranks bring the same tokens.
        bias: [V].
        ignore_index, softcap, reduction, shift, return_lse: as there; True as ``shift`` is 1.
        filter_eps: "auto" or a float, as there; None: exact.
        accum_e_fp32, accum_c_fp32: sums are in fp32 either way.
        filter_e_grad, filter_c_grad: False: both gradients are exact.
        impl: "cce" or one of its "cce_kahan" kin: the default gradient of cce_dist. "cce_exact" and "torch_compile":
            exact.
        vocab_parallel_options: None: ``c`` is the whole classifier.

    Returns:
        The loss, or (loss, lse).

    Raises:
        ValueError, TypeError: as there; another ``impl``.
    """
    name = str(getattr(impl, "name", impl)).lower()
    if name not in (*_FILTERED, *_EXACT):
        raise ValueError(f"impl must be one of {', '.join((*_FILTERED, *_EXACT))}; got {impl!r}.")
    exact = name in _EXACT or filter_eps is None or not (filter_e_grad and filter_c_grad)
    shard: VocabShard | None = None
    if vocab_parallel_options is not None:
        shard = _shard_of(vocab_parallel_options)
        if not vocab_parallel_options.reduce_e_grad:
            e = divide_gradient(e, dist.get_world_size(shard.vocab_group))
    function: Any = loss_of_shards
    return function(
        e,
        c,
        targets,
        bias=bias,
        shard=shard,
        ignore_index=ignore_index,
        softcap=softcap,
        reduction=reduction,
        shift=int(shift),
        return_lse=return_lse,
        gradient="exact" if exact else None,
        filter_eps=None if exact else filter_eps,
    )


def _shard_of(options: VocabParallelOptions) -> VocabShard:
    group = dist.group.WORLD if options.group is None else options.group
    if group is None:
        raise ValueError("vocab_parallel_options need process groups: call torch.distributed.init_process_group first.")
    vocab_size = options.vocab_size
    if vocab_size is None:  # it ends where the last rank's rows do; asked in each call, as another rank may have to
        hosts = host_group(group)
        said: list[Any] = [None] * dist.get_world_size(hosts)
        dist.all_gather_object(said, options.stop, group=hosts)
        vocab_size = max(said)
    return shard_of(options.start, options.stop, vocab_size, group)
