"""Classifiers whose module holds a rank's own rows: cut before by others (`GatheringOwner`), or here, out of a
replicated one (`CutClassifierOwner`).

The parameters stay the same objects, so optimizers and parameter groups built before remain right, and autograd
delivers their gradients. State dicts hold all rows, whatever the ranks hold: saving gathers them over a group of CPUs,
loading takes the rank's own. Embeddings tied to the classifier look up in the shards.

Shapes: V rows of the classifier, R local rows, D hidden.
"""

import weakref
from collections.abc import Sequence
from datetime import timedelta
from functools import partial
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn import functional as F

from cce_dist.heads.collective_logits import await_ranks
from cce_dist.heads.embedding import check_embedding, make_vocab_parallel
from cce_dist.heads.find import tied_to
from cce_dist.heads.owner import OnTheseRanks
from cce_dist.shard import VocabShard, host_group, new_subgroup
from cce_dist.shard.rows import even_parts, gather_rows, size_of

SECONDS_TO_SAVE = 600
"""How long the first rank that wants a state dict waits for the others before it raises."""


class GatheringOwner(OnTheseRanks):
    """Shard owner of a classifier whose module holds this rank's rows alone: for real logits it gathers the others'.

    Args:
        head: has ``weight`` [R, D] and, possibly, ``bias`` [R].
        shard: with ``token_group=None`` all ranks of its vocabulary group bring the same tokens.
        sizes: rows of each rank of the vocabulary group, in its order.
    """

    def __init__(self, head: nn.Module, shard: VocabShard, sizes: Sequence[int]) -> None:
        self.head = head
        self.shard = shard
        self._sizes = tuple(sizes)
        assert shard.vocab_group is not None
        host_group(shard.vocab_group)  # made now, not in the first call

    def local_weight(self) -> Tensor:
        weight: Tensor = self.head.weight  # type: ignore[assignment]
        return weight

    def local_bias(self) -> Tensor | None:
        bias: Tensor | None = getattr(self.head, "bias", None)
        return bias

    def logits(self, hidden: Tensor) -> Tensor:
        """Real logits [..., V], differentiable; collective over the vocabulary group, which gathers the rows.

        It takes the place of the head's forward: evaluation and generation get there.
        """
        await_ranks(self.shard, hidden, "the logits of a classifier that cce_dist shards")
        group, same_tokens = self.shard.vocab_group, self.shard.token_group is None
        assert group is not None
        weight_VD, bias_V = (
            None if p is None else gather_rows(p.to(hidden.dtype), self._sizes, group, same_tokens=same_tokens)
            for p in (self.local_weight(), self.local_bias())
        )
        assert weight_VD is not None
        return F.linear(hidden, weight_VD, bias_V)


class CutClassifierOwner(GatheringOwner):
    """The same of a classifier that was whole until `shard_classifier` cut it: what is saved and loaded stays whole."""

    def __init__(self, head: nn.Linear, shard: VocabShard, sizes: Sequence[int]) -> None:
        super().__init__(head, shard, sizes)
        assert shard.vocab_group is not None
        ranks = dist.get_process_group_ranks(shard.vocab_group)
        # A group for this alone: if a rank never comes, no other collective can take its place.
        self._save_group = new_subgroup(ranks, shard.vocab_group, "gloo", timedelta(seconds=SECONDS_TO_SAVE))
        self._saved_weight: weakref.ref[Tensor] | None = None

    def own_rows(self, whole: Tensor) -> Tensor:
        """This rank's rows of [V, ...]."""
        return whole[self.shard.start : self.shard.stop]

    def all_rows(self, rows: Tensor) -> Tensor:
        """[V, ...] on the CPU, on every rank of the group.

        Raises:
            RuntimeError: not all ranks of the group came.
        """
        try:
            return gather_rows(rows.detach().cpu(), self._sizes, self._save_group)
        except RuntimeError as error:
            raise RuntimeError(
                f"the rows of the sharded classifier could not be gathered from ranks "
                f"{dist.get_process_group_ranks(self._save_group)}: {error}. state_dict() and save_checkpoint() are "
                "collective for this model: call them on every rank, and write the result on one."
            ) from error

    def put_all_rows(self, _module: nn.Module, state_dict: dict[str, Any], prefix: str, _metadata: Any) -> None:
        """Hook after ``state_dict`` of the head or of an embedding tied to it. ZeRO-3's own state has no rows there."""
        if hasattr(self.head.weight, "ds_id"):
            return
        weight = None if self._saved_weight is None else self._saved_weight()
        if weight is None or not any(value is weight for value in state_dict.values()):
            weight = self.all_rows(state_dict[prefix + "weight"])
            self._saved_weight = weakref.ref(weight)
        state_dict[prefix + "weight"] = weight  # of a tied module too: both entries are one tensor, as they were
        if prefix + "bias" in state_dict:
            state_dict[prefix + "bias"] = self.all_rows(state_dict[prefix + "bias"])

    def take_own_rows(self, _module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
        """Hook before ``load_state_dict`` of the same modules."""
        for key in (prefix + "weight", prefix + "bias"):
            if key in state_dict and state_dict[key].shape[0] == self.shard.vocab_size:
                state_dict[key] = self.own_rows(state_dict[key])


def shard_classifier(
    model: nn.Module, head: nn.Linear, group: ProcessGroup, token_group: ProcessGroup | None, count_group: ProcessGroup
) -> CutClassifierOwner:
    """Cuts the classifier of a model into equal runs of rows, in place; every rank of the group calls it.

    Args:
        model: its embeddings that share the classifier's weight become vocabulary-parallel.
        head: weight [V, D], the same on every rank of the group.
        group: the ranks that share one copy of the rows.
        token_group: the group itself where each rank brings its own tokens, None where all bring the same.
        count_group: all ranks that bring different tokens.

    Raises:
        ValueError: it was cut before, it has fewer rows than ranks, or an embedding that cannot be vocabulary-parallel.
        TypeError: something else than an embedding shares the classifier's weight.
    """
    if head.weight.shape[0] != head.out_features:
        raise ValueError(
            f"the classifier's weight has {head.weight.shape[0]} of its {head.out_features} rows: an engine has "
            "sharded this model before. Build the model anew for another engine."
        )
    shard = VocabShard.even(head.out_features, group, token_group, count_group=count_group)
    sizes = [size_of(part) for part in even_parts((0, head.out_features), dist.get_world_size(group))]
    if min(sizes) == 0:
        raise ValueError(
            f"the classifier's {head.out_features} rows, {max(sizes)} a rank, do not reach all {len(sizes)} ranks of "
            "its group."
        )
    embeddings = tied_to(model, head)
    for embedding in embeddings:
        check_embedding(embedding)
    owner = CutClassifierOwner(head, shard, sizes)
    for parameter in head.parameters(recurse=False):
        parameter.data = owner.own_rows(parameter.data).clone()
    for module in (head, *embeddings):
        module.register_state_dict_post_hook(partial(owner.put_all_rows))  # torch marks the hook: no bound method
        module.register_load_state_dict_pre_hook(owner.take_own_rows)
    for embedding in embeddings:
        make_vocab_parallel(embedding, owner, lambda: None)  # type: ignore[arg-type]
    return owner


def cut_before(head: nn.Module) -> CutClassifierOwner | None:
    """The owner of the rows that an engine before has cut out of this classifier; None where it is whole."""
    owner = getattr(vars(head).get("forward"), "__self__", None)
    return owner if isinstance(owner, CutClassifierOwner) else None
