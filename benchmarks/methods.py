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


def _torch_chunks() -> Method:
    function: Any = F.linear_cross_entropy  # type: ignore[attr-defined,unused-ignore]
    options = torch.nn.LinearCrossEntropyOptions()  # type: ignore[attr-defined,unused-ignore]
    return lambda hidden_ND, weight_VD, labels_N: function(hidden_ND, weight_VD, labels_N, options=options)


def _apple() -> Method:
    from cut_cross_entropy import linear_cross_entropy as apple

    return lambda hidden_ND, weight_VD, labels_N: apple(hidden_ND, weight_VD, labels_N)


def _liger() -> Method:
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction as Liger

    return lambda hidden_ND, weight_VD, labels_N: _first(Liger.apply(hidden_ND, weight_VD, labels_N))


def _liger_sm90() -> Method:
    from liger_kernel.ops.cutedsl.ops.fused_linear_cross_entropy_sm90 import liger_fused_linear_cross_entropy_sm90

    return lambda hidden_ND, weight_VD, labels_N: liger_fused_linear_cross_entropy_sm90(hidden_ND, weight_VD, labels_N)


def _liger_scaled() -> Method:
    from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction as Liger

    return lambda hidden_ND, weight_VD, labels_N: _first(Liger.apply(hidden_ND, weight_VD, labels_N)).mean()


def _quack() -> Method:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy as quack

    return lambda hidden_ND, weight_VD, labels_N: quack(hidden_ND, weight_VD, labels_N)


def _trl() -> Method:
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer.utils import maybe_gather_lm_head_ctx  # noqa: F401  # its backward imports it

    chunk = 32768  # that of its trainers

    def loss(hidden_ND: Tensor, weight_VD: Tensor, labels_N: Tensor) -> Tensor:
        settings = (1.0, chunk, None, 1.0, ())  # temperature; neither softcap, scale nor further outputs
        return -_first(ChunkedLogProbFunction.apply(hidden_ND, weight_VD, None, labels_N, *settings)).mean()

    return loss


def _deepspeed() -> Method:
    from deepspeed.sequence.linear_cross_entropy import vocab_parallel_linear_cross_entropy as deepspeed

    return lambda hidden_ND, weight_VD, labels_N: deepspeed(hidden_ND, weight_VD, labels_N)


def _fla() -> Method:
    from fla.modules.fused_linear_cross_entropy import fused_linear_cross_entropy_loss as fla

    return lambda hidden_ND, weight_VD, labels_N: fla(hidden_ND, labels_N, weight_VD)


def _first(result: Any) -> Tensor:
    return result[0] if isinstance(result, tuple) else result


RIVALS: dict[str, Callable[[], Method]] = {
    "F.linear_cross_entropy": _torch_fused,
    "F.linear_cross_entropy, chunks": _torch_chunks,
    "Apple cut-cross-entropy": _apple,
    "Liger": _liger,
    "Liger, SM90": _liger_sm90,
    "Liger, scaled": _liger_scaled,
    "QuACK": _quack,
    "TRL, chunks": _trl,
    "DeepSpeed": _deepspeed,
    "flash-linear-attention": _fla,
}
"""What finds each peer; it raises where the peer cannot be used."""
