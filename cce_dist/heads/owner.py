"""Shard owners: where the rows of a vocabulary shard live, and where their gradient goes.

The loss knows only local rows and a `VocabShard`. An owner finds the rows inside a framework and delivers their
gradient: `local_weight` returns a differentiable tensor whose backward hands dC on. Each framework's module has one;
`ModuleOwner`, here, is the one of plain PyTorch.

Shapes: V local rows of the classifier, D hidden.
"""

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from cce_dist.shard import VocabShard
from cce_dist.shard.rows import local_rows


class ShardOwner(Protocol):
    """The one interface between a framework that stores the classifier and the loss."""

    shard: VocabShard

    def local_weight(self) -> Tensor:
        """The rank's rows [V, D]; its backward delivers dC, divided by ``shard.grad_divisor``."""

    def local_bias(self) -> Tensor | None:
        """The rank's bias [V], or None."""


class OnTheseRanks:
    """Goes before what holds process groups, which neither pickle nor deepcopy can take: it says so."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError(
            f"a {type(self).__name__} is part of a classifier whose rows the ranks of this run share: it can neither "
            "be pickled (torch.save of a module does that) nor copied. Save model.state_dict(), on every rank, or copy "
            "the model before its classifier is sharded."
        )


class ModuleOwner:
    """Rows held by a module as a plain parameter or a DTensor Shard(0): autograd itself delivers the gradient.

    Args:
        module: has ``weight`` [V, D] and, possibly, ``bias`` [V].
        shard: which global rows those are; None: all of them, in a single process.
    """

    def __init__(self, module: nn.Module, shard: VocabShard | None = None) -> None:
        self.module = module
        self.shard = shard if shard is not None else VocabShard.whole(_parameter(module, "weight").shape[0])

    def local_weight(self) -> Tensor:
        return divide_gradient(local_rows(_parameter(self.module, "weight")), self.shard.grad_divisor)

    def shard_of(self, weight_RD: Tensor) -> VocabShard:
        """The shard of these rows: a vocabulary that a single process holds may have been resized.

        Raises:
            RuntimeError: another number of rows than that of a shard that other ranks share, or that has padding.
        """
        if weight_RD.shape[0] == self.shard.num_rows:
            return self.shard
        if self.shard.vocab_group is not None or self.shard.runs != ((0, self.shard.vocab_size),):
            raise RuntimeError(
                f"the output layer has {weight_RD.shape[0]} rows on this rank, of which its shard has "
                f"{self.shard.num_rows}: it was resized since. Resize the vocabulary before the layer is sharded."
            )
        self.shard = VocabShard.whole(weight_RD.shape[0])
        return self.shard

    def local_bias(self) -> Tensor | None:
        bias = getattr(self.module, "bias", None)
        return None if bias is None else divide_gradient(local_rows(bias), self.shard.grad_divisor)


def _parameter(module: nn.Module, name: str) -> Tensor:
    parameter = getattr(module, name, None)
    if not isinstance(parameter, Tensor):
        raise TypeError(f"{type(module).__name__} has no tensor {name!r}: a classifier such as nn.Linear is needed.")
    return parameter


class _DivideGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, divisor: float) -> Tensor:
        ctx.divisor = divisor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad / ctx.divisor, None


def divide_gradient(x: Tensor, divisor: float) -> Tensor:
    """Identity whose backward divides by ``divisor``: does for a shard what a framework does for the rest."""
    return x if divisor == 1.0 else _DivideGradient.apply(x, divisor)
