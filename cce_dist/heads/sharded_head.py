"""A head that owns its vocabulary shard: the module that takes the place of a model's lm_head.

In go the classifier's rows as a DTensor, and in a call hidden states and labels; out comes the loss, or, where one asks
for them, real logits.

Shapes: D hidden, V rows of the whole classifier, R local rows.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn import functional as F

from cce_dist.config import CCEConfig
from cce_dist.heads.collective_logits import await_ranks
from cce_dist.heads.owner import ModuleOwner
from cce_dist.loss import TokenLogprobs, linear_cross_entropy, linear_logprobs, linear_next_token
from cce_dist.shard import Group, VocabShard, as_group


class ShardedCCEHead(nn.Module):
    """Classifier and cross-entropy in one module; each rank of a mesh stores a shard of the rows.

    ``head(hidden, labels)`` is the loss, ``head.logprobs(hidden, labels)`` gives log-probabilities of tokens,
    ``head.logits(hidden)`` the real logits. The state dict has the keys of an
    ``nn.Linear``: ``weight`` and, possibly, ``bias``, as DTensors; save that, since a pickle of the module is refused
    (its shard holds process groups). A deepcopy shares the shard.

    Args:
        weight: [V, D], a DTensor that is Shard(0) on a 1-D mesh.
        bias: [V], likewise, or None.
        token_group: each of its ranks brings its own tokens (data, sequence or context parallelism): usually the mesh
            itself. None: all ranks of the mesh bring the same tokens (tensor parallelism).
        count_group: ``reduction="mean"`` counts the valid tokens of this group; None: ``token_group``.
        grad_divisor: the gradients of weight and bias, sums over the tokens of all ranks, are divided by it. None: the
            size of ``token_group``, which goes with a model whose other gradients are averaged over those ranks (DDP,
            FSDP); 1.0 goes with summed ones.
        vocab_size: number of real rows; the rows from there on are padding. None: V.
        softcap, logit_scale: the logits are softcap·tanh(logit_scale·(hidden · weightᵀ + bias) / softcap).
        config: settings of the loss.

    Raises:
        ValueError: weight or bias that is not Shard(0) on a 1-D mesh, or a bias of another length or mesh.
    """

    def __init__(
        self,
        weight: DTensor,
        bias: DTensor | None = None,
        *,
        token_group: Group | None = None,
        count_group: Group | None = None,
        grad_divisor: float | None = None,
        vocab_size: int | None = None,
        softcap: float | None = None,
        logit_scale: float | None = None,
        config: CCEConfig | None = None,
    ) -> None:
        super().__init__()
        if bias is not None and (bias.device_mesh != weight.device_mesh or bias.shape != weight.shape[:1]):
            raise ValueError(
                f"bias must be [{weight.shape[0]}] and sharded on weight's mesh {weight.device_mesh}, got "
                f"{list(bias.shape)} on {bias.device_mesh}."
            )
        config, standard = CCEConfig() if config is None else config, CCEConfig()
        for name in ("enabled", "vocab_parallel_size", "materialize"):
            if getattr(config, name) != getattr(standard, name):
                raise ValueError(
                    f"config sets {name} = {getattr(config, name)!r}, which a ShardedCCEHead does not look at: it "
                    "always computes the loss, over all ranks of weight's mesh. Leave it out."
                )
        tokens = as_group(token_group, "token_group")
        if grad_divisor is None:
            grad_divisor = 1.0 if tokens is None else float(dist.get_world_size(tokens))
        self.shard = VocabShard.from_dtensor(
            weight, tokens, vocab_size=vocab_size, count_group=count_group, grad_divisor=grad_divisor
        )
        self.weight = nn.Parameter(weight, requires_grad=weight.requires_grad)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=bias.requires_grad)
        self.softcap = softcap
        self.logit_scale = logit_scale
        self.config = config

    @classmethod
    def from_linear(cls, linear: nn.Linear, mesh: DeviceMesh, **settings: Any) -> "ShardedCCEHead":
        """Shards a linear layer, bias included, over a 1-D mesh; the layer itself is left as it is.

        Every rank of the mesh calls it. The values of the mesh's first rank count, as with `distribute_tensor`.

        Args:
            linear: weight [V, D]; on the meta device too.
            settings: keyword arguments of `ShardedCCEHead`.

        Raises:
            TypeError: ``linear`` is no nn.Linear, or is sharded already.
            ValueError: the mesh has more than one dimension.
        """
        if not isinstance(linear, nn.Linear) or isinstance(linear.weight, DTensor):
            raise TypeError(
                f"linear must be an nn.Linear with an unsharded weight, got {type(linear).__name__} "
                f"with a {type(getattr(linear, 'weight', None)).__name__}."
            )
        as_group(mesh, "mesh")
        bias = None if linear.bias is None else _distribute(linear.bias, mesh)
        return cls(_distribute(linear.weight, mesh), bias, **settings)

    def forward(self, hidden: Tensor, labels: Tensor, **overrides: Any) -> Any:
        """The loss of this rank's tokens, see `linear_cross_entropy`. Every rank of the mesh must call it.

        Args:
            hidden: [..., D].
            labels: [...].
            overrides: keyword arguments of `linear_cross_entropy`, such as ``shift`` or ``reduction``.

        Returns:
            The loss; (loss, lse) with ``return_lse=True``; with ``statistics=("top1",)`` and the like also these.
        """
        return self._compute(linear_cross_entropy, hidden, labels, {**self.config.loss_kwargs(), **overrides})

    def logprobs(self, hidden: Tensor, labels: Tensor, **overrides: Any) -> TokenLogprobs:
        """Log-probabilities of this rank's tokens, see `linear_logprobs`. Every rank of the mesh must call it.

        Args:
            hidden: [..., D].
            labels: [...].
            overrides: keyword arguments of `linear_logprobs`, such as ``entropy`` or ``temperature``.
        """
        settings = {**self.config.logprobs_kwargs(), **overrides}
        found: TokenLogprobs = self._compute(linear_logprobs, hidden, labels, settings)
        return found

    def _compute(self, function: Callable[..., Any], hidden: Tensor, labels: Tensor, settings: dict[str, Any]) -> Any:
        owner, form = ModuleOwner(self, self.shard), {"softcap": self.softcap, "logit_scale": self.logit_scale}
        weight, bias = owner.local_weight(), owner.local_bias()
        return function(hidden, weight, labels, bias=bias, shard=self.shard, **{**form, **settings})

    def next_token(self, hidden: Tensor, temperature: float = 1.0, seed: int | Tensor | None = None) -> Tensor:
        """A token drawn for each hidden state, see `linear_next_token`; without logits, on every rank of the mesh.

        Args:
            hidden: [..., D].
            temperature: 0: the most likely token.
            seed: of the draws.
        """
        with self._in_fp32(hidden):
            return linear_next_token(
                self._wide(hidden),
                self.weight,
                bias=self.bias,
                shard=self.shard,
                softcap=self.softcap,
                logit_scale=self.logit_scale,
                temperature=temperature,
                seed=seed,
            )

    @torch.no_grad()
    def logits(self, hidden: Tensor) -> Tensor:
        """Real logits [..., vocab_size] of this rank's tokens, for evaluation and generation; without a gradient.

        Every rank of the mesh must call it; one that waits in vain is told so within the timeout of the mesh's group.
        With replicated tokens each rank computes its own columns and the columns are gathered. With sharded tokens
        every rank needs all columns of its own tokens: the whole classifier, in hidden's dtype, is gathered for the
        duration of the call, and ranks may bring different numbers of tokens.

        Args:
            hidden: [..., D].
        """
        replicated, hidden = self.shard.token_group is None, self._wide(hidden)
        await_ranks(self.shard, hidden, "the logits of a ShardedCCEHead")

        def rows(parameter: Tensor) -> Tensor:
            in_dtype = cast(DTensor, parameter.to(hidden.dtype))
            return in_dtype.to_local() if replicated else in_dtype.full_tensor()

        with self._in_fp32(hidden):
            logits_V = F.linear(hidden, rows(self.weight), None if self.bias is None else rows(self.bias))
        if replicated:
            logits_V = _join_columns(logits_V, cast(DTensor, self.weight))
        logits_V = logits_V[..., : self.shard.vocab_size]
        if self.logit_scale is not None:
            logits_V = logits_V * self.logit_scale
        if self.softcap is not None:
            logits_V = self.softcap * torch.tanh(logits_V / self.softcap)
        return logits_V

    def _wide(self, hidden: Tensor) -> Tensor:
        """In the dtype that real logits are computed in, where `CCEConfig.fp32_head` asks for one."""
        return hidden.to(torch.promote_types(hidden.dtype, torch.float32)) if self.config.fp32_head else hidden

    def _in_fp32(self, hidden: Tensor) -> AbstractContextManager[object]:
        """Without autocast, where `CCEConfig.fp32_head` asks for it."""
        return torch.autocast(hidden.device.type, enabled=False) if self.config.fp32_head else nullcontext()

    def extra_repr(self) -> str:
        rows, hidden = self.weight.shape
        return (
            f"in_features={hidden}, out_features={rows}, bias={self.bias is not None}, local_rows={self.shard.num_rows}"
        )


def _distribute(parameter: Tensor, mesh: DeviceMesh) -> DTensor:
    sharded = distribute_tensor(parameter.detach(), mesh, [Shard(0)])
    sharded.requires_grad_(parameter.requires_grad)
    return sharded


def _join_columns(columns_R: Tensor, weight: DTensor) -> Tensor:
    """All-gathers each rank's columns [..., R], of uneven numbers, into [..., V]."""
    shape = torch.Size((*columns_R.shape[:-1], weight.shape[0]))
    stride = torch.empty(shape, device="meta").stride()
    sharded = DTensor.from_local(
        columns_R, weight.device_mesh, [Shard(len(shape) - 1)], run_check=False, shape=shape, stride=stride
    )
    return sharded.redistribute(placements=[Replicate()]).to_local()
