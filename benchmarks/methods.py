"""The losses that `benchmarks.loss` compares: ours in its modes, and every peer that is installed.

Each is a function (hidden_ND, weight_VD, labels_N) -> mean loss, differentiable.

Shapes: N tokens, D hidden, V vocabulary.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from trees import Tree

Method = Callable[..., Tensor]
OWN_TREE = Tree()


def eager(hidden_ND: Tensor, weight_VD: Tensor, labels_N: Tensor) -> Tensor:
    return F.cross_entropy((hidden_ND @ weight_VD.T).float(), labels_N)


def available_methods(old_tree: Path | None = None) -> tuple[dict[str, Method], dict[str, str]]:
    """The methods by name, also those of another checkout, and why each missing one is missing."""
    trees = {"cce_dist": OWN_TREE} | ({} if old_tree is None else {"old tree's": Tree(old_tree)})
    methods: dict[str, Method] = {
        f"{name} {mode}": partial(tree.linear_cross_entropy, gradient=mode)
        for mode in ("unbiased", "filtered", "exact")
        for name, tree in trees.items()
    }
    methods |= {"torch eager": eager, "torch.compile": torch.compile(eager)}
    missing: dict[str, str] = {}
    for name, find in RIVALS.items():
        try:
            methods[name] = find()
        except Exception as error:  # whatever keeps a peer from being imported is its entry in the table
            missing[name] = f"{type(error).__name__}: {error}"
    return methods, missing


def _torch_fused() -> Method:
    function: Any = F.linear_cross_entropy  # type: ignore[attr-defined,unused-ignore]
    return lambda hidden_ND, weight_VD, labels_N: function(hidden_ND, weight_VD, labels_N)


def _apple() -> Method:
    from cut_cross_entropy import linear_cross_entropy as apple

    return lambda hidden_ND, weight_VD, labels_N: apple(hidden_ND, weight_VD, labels_N)


def _liger() -> Method:
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction as Liger

    def loss(hidden_ND: Tensor, weight_VD: Tensor, labels_N: Tensor) -> Tensor:
        result = Liger.apply(hidden_ND, weight_VD, labels_N)
        return result[0] if isinstance(result, tuple) else result

    return loss


RIVALS: dict[str, Callable[[], Method]] = {
    "F.linear_cross_entropy": _torch_fused,
    "Apple cut-cross-entropy": _apple,
    "Liger": _liger,
}
"""What finds each peer; it raises where the peer cannot be used."""
