"""FSDP2: each rank's rows of the classifier are its vocabulary shard, and no rank gathers them in training.

Stock FSDP2 all-gathers the classifier for the forward and again for the backward. Here its parameters stay DTensors,
sharded over FSDP's own mesh as FSDP shards them, but outside of FSDP's unshard and reduce cycle. Optimizers,
`clip_grad_norm_`, state dicts and checkpoints therefore see what they see with stock FSDP2. `shard_head` does this to a
model on its way to `fully_shard`, `adopt` to one that a framework has sharded already.

The gradient that FSDP would have reduced arrives complete: summed over the tokens of the shard's ranks by the loss,
over the replicas of an HSDP mesh here, and divided by what FSDP divides by.

Shapes: D hidden, V rows of the whole classifier, R local rows.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.distributed.tensor.placement_types import Placement
from torch.nn import functional as F

from cce_dist.config import CCEConfig
from cce_dist.embedding import check_embedding, make_vocab_parallel
from cce_dist.fsdp_groups import check_torch, governing_group, release, reshard
from cce_dist.lazy_logits import make_lazy
from cce_dist.owner import divide_gradient, local_rows
from cce_dist.shard import VocabShard, dtensor_runs, new_subgroup


def shard_head(
    model: nn.Module, mesh: DeviceMesh, *, head: nn.Module | None = None, config: CCEConfig | None = None
) -> None:
    """Makes the model's classifier a vocabulary shard, in place, beside the user's own `fully_shard` calls.

    Call it before the optimizer is built, before or after the `fully_shard` calls. In training the head then returns
    lazy logits, whose `F.cross_entropy` is the vocabulary-parallel loss; its forward otherwise gives real logits, for
    which it gathers the classifier. Embeddings tied to it become vocabulary-parallel. As with `fully_shard`, each rank
    slices its own copy of the weights, and every rank of the mesh must make the call. A head that `fully_shard` has not
    taken yet goes to the mesh's device and stays there; one that it has taken stays where its offload policy put it.

    Args:
        model: to be, or being, sharded by `fully_shard` over this mesh.
        mesh: 1-D, or 2-D (replicas, shards) for HSDP; the one given to `fully_shard`.
        head: the classifier, an nn.Linear. None: ``model.get_output_embeddings()``, or else ``model.lm_head``.
        config: settings of the loss; with ``enabled=False`` nothing is done.

    Raises:
        TypeError: no head was found, or it is no plain nn.Linear.
        ValueError: a mesh, a sharding or a use of the weight that is not supported.
        RuntimeError: a torch whose FSDP2 this version does not know.
    """
    config = CCEConfig() if config is None else config
    if not config.enabled:
        return
    head = _find_head(model, head)
    _check_mesh(mesh, config)
    reshard(model)
    if not isinstance(head.weight, DTensor):
        _check_support(model, head, mesh)
        _distribute(model, head, mesh)
    else:
        if head.weight.device_mesh != mesh:
            raise ValueError(
                f"the head is sharded over {head.weight.device_mesh}, not over mesh, {mesh}. Pass that mesh."
            )
        _take_from_fsdp(model, head, mesh)
    _install(model, head, mesh, config)


def adopt(model: nn.Module, *, head: nn.Module | None = None, config: CCEConfig | None = None) -> None:
    """`shard_head` for a model that a framework has sharded with FSDP2: accelerate, the HF Trainer, torchtitan.

    The head's parameters are taken out of whichever FSDP group holds them. The objects stay the same, so an optimizer
    built before works on. Best called before the first forward; never between a forward and its backward.

    Args:
        model, head, config: as in `shard_head`.

    Raises:
        TypeError, ValueError, RuntimeError: as `shard_head`.
    """
    config = CCEConfig() if config is None else config
    if not config.enabled:
        return
    head = _find_head(model, head)
    reshard(model)
    if not isinstance(head.weight, DTensor):
        raise ValueError(
            "the head's weight is not sharded yet: call adopt after the framework has applied fully_shard "
            "(accelerate's prepare, the Trainer's on_train_begin), or call shard_head(model, mesh)."
        )
    mesh = head.weight.device_mesh
    _check_mesh(mesh, config)
    _take_from_fsdp(model, head, mesh)
    _install(model, head, mesh, config)


class FSDPOwner:
    """The owner of rows that are DTensors on FSDP's mesh, outside of FSDP's groups."""

    def __init__(self, model: nn.Module, head: nn.Linear, mesh: DeviceMesh) -> None:
        assert isinstance(head.weight, DTensor)
        self._model = model
        self._head = head
        self._mesh = mesh
        self._replica_group = mesh.get_group(0) if mesh.ndim == 2 else None
        # Groups of the loss's own: on FSDP's, its collectives would queue behind the all-gathers that FSDP prefetches.
        fsdp_group = mesh.get_group(mesh.ndim - 1)
        shard_group = new_subgroup(dist.get_process_group_ranks(fsdp_group), fsdp_group)
        self.shard = VocabShard(
            dtensor_runs(head.weight),
            head.weight.shape[0],
            vocab_group=shard_group,
            token_group=shard_group,
            count_group=shard_group if mesh.ndim == 1 else _new_group(mesh.mesh.flatten().tolist()),
            grad_divisor=float(mesh.size()),
        )

    def local_weight(self) -> Tensor:
        """The rank's rows [R, D] on the compute device; the gradient is averaged as FSDP averages."""
        return self._local(self._head.weight)

    def local_bias(self) -> Tensor | None:
        """The rank's bias [R], likewise."""
        return None if self._head.bias is None else self._local(self._head.bias)

    def gathered_forward(self, hidden: Tensor) -> Tensor:
        """The head's forward where real logits [..., V] are wanted: the classifier is gathered in hidden's dtype."""
        weight_VD, bias_V = (
            None if p is None else self._whole(p, hidden.dtype) for p in (self._head.weight, self._head.bias)
        )
        assert weight_VD is not None
        return F.linear(hidden, weight_VD, bias_V)

    def compute_dtype(self) -> torch.dtype | None:
        """What FSDP's mixed-precision policy computes in; None: the parameters' own dtype."""
        group = governing_group(self._modules())
        return None if group is None else group.mp_policy.param_dtype

    def _modules(self) -> Iterator[nn.Module]:
        """Where FSDP's settings for the head are looked for, first the group that would hold or held it."""
        yield self._head
        yield from self._model.modules()

    def _divisor(self) -> float:
        group = governing_group(self._modules())
        factor = None if group is None else group.gradient_divide_factor
        return self.shard.grad_divisor if factor is None else factor

    def _local(self, parameter: Tensor) -> Tensor:
        rows = local_rows(parameter).to(self._mesh.device_type)  # from the CPU, where FSDP offloads
        if self._replica_group is not None:
            rows = _SumOverReplicas.apply(rows, self._replica_group)
        return divide_gradient(rows, self._divisor())

    def _whole(self, parameter: Tensor, dtype: torch.dtype) -> Tensor:
        assert isinstance(parameter, DTensor)
        rows = local_rows(parameter).to(self._mesh.device_type, dtype)
        sharded = DTensor.from_local(
            rows,
            self._mesh,
            parameter.placements,
            run_check=False,
            shape=parameter.shape,
            stride=parameter.stride(),
        )
        # Each rank's gradient is of its own tokens: they are summed on the way back to the shards.
        whole = sharded.full_tensor(grad_placements=[Partial()] * self._mesh.ndim)
        return divide_gradient(whole, self._divisor())


class _SumOverReplicas(torch.autograd.Function):
    """Identity; the gradient is summed over the replicas of the shard."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return rows.view_as(rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        total = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=ctx.group)
        return total, None


def _find_head(model: nn.Module, head: nn.Module | None) -> nn.Linear:
    if head is None:
        getter = getattr(model, "get_output_embeddings", None)
        head = getter() if callable(getter) else getattr(model, "lm_head", None)
    if head is None:
        raise TypeError(
            f"{type(model).__name__} has no output embeddings: neither get_output_embeddings() nor .lm_head gives a "
            "module. Pass a language model with a classifier, or name the classifier: head=model.my_classifier."
        )
    if not isinstance(head, nn.Linear) or type(head).forward is not nn.Linear.forward:
        raise TypeError(
            f"the head must be an nn.Linear with its stock forward, got {type(head).__name__}; the loss computes "
            "hidden · weightᵀ + bias and nothing else."
        )
    if "forward" in vars(head):
        raise ValueError("the head's forward is replaced already: shard_head or adopt was called on this model before.")
    others = sorted(set(dict(head.named_parameters())) - {"weight", "bias"})
    if others:
        raise ValueError(
            f"the head must own a weight and a bias only, got {others} too; merge adapters into the weight."
        )
    if head not in model.modules():
        raise ValueError("head must be a submodule of model.")
    return head


def _check_mesh(mesh: DeviceMesh, config: CCEConfig) -> None:
    if mesh.ndim not in (1, 2):
        raise ValueError(f"mesh must be 1-D, or 2-D (replicas, shards) for HSDP, got {mesh.ndim} dimensions.")
    shards = mesh.size(mesh.ndim - 1)
    if config.vocab_parallel_size not in (None, shards):
        raise ValueError(
            f"vocab_parallel_size = {config.vocab_parallel_size} is not supported with FSDP2 yet: the vocabulary is "
            f"sharded over the {shards} ranks that FSDP shards over. Leave it out."
        )


def _placements(mesh: DeviceMesh) -> tuple[Placement, ...]:
    return (Shard(0),) if mesh.ndim == 1 else (Replicate(), Shard(0))


def _holders(model: nn.Module, parameter: Tensor) -> list[tuple[nn.Module, str]]:
    """Every module that has this parameter, with the name it has there."""
    return [(m, name) for m in model.modules() for name, p in m._parameters.items() if p is parameter]


def _tied(model: nn.Module, head: nn.Linear) -> list[nn.Module]:
    return [module for module, _ in _holders(model, head.weight) if module is not head]


def _check_support(model: nn.Module, head: nn.Linear, mesh: DeviceMesh) -> None:
    for embedding in _tied(model, head):
        check_embedding(embedding)
    check_torch(mesh)


def _distribute(model: nn.Module, head: nn.Linear, mesh: DeviceMesh) -> None:
    """Shards the head's parameters as FSDP would, and keeps a later `fully_shard` of the model away from them."""
    modules = [head, *_tied(model, head)]
    for parameter in list(head.parameters(recurse=False)):
        sharded = nn.Parameter(_own_rows(parameter.detach(), mesh), requires_grad=parameter.requires_grad)
        for module, name in _holders(model, parameter):
            setattr(module, name, sharded)
    for module in modules:
        fully_shard(module, mesh=mesh, ignored_params=set(module.parameters()))


def _own_rows(full: Tensor, mesh: DeviceMesh) -> DTensor:
    """A copy of this rank's rows: a view of them would keep the whole tensor alive."""
    placements = _placements(mesh)
    shape, offset = compute_local_shape_and_global_offset(full.shape, mesh, placements)
    device = full.device if full.is_meta else torch.device(mesh.device_type)
    rows = full[offset[0] : offset[0] + shape[0]].to(device, copy=True)
    return DTensor.from_local(rows, mesh, placements, run_check=False, shape=full.shape, stride=full.stride())


def _take_from_fsdp(model: nn.Module, head: nn.Linear, mesh: DeviceMesh) -> None:
    assert isinstance(head.weight, DTensor)
    if tuple(head.weight.placements) != _placements(mesh):
        raise ValueError(
            f"the head's weight must be sharded as {_placements(mesh)}, got {tuple(head.weight.placements)} on a mesh "
            f"{mesh.mesh_dim_names}. FSDP2 together with tensor parallelism of the head is not supported yet."
        )
    _check_support(model, head, mesh)
    release(model, head)


def _install(model: nn.Module, head: nn.Linear, mesh: DeviceMesh, config: CCEConfig) -> None:
    owner = FSDPOwner(model, head, mesh)
    for embedding in _tied(model, head):
        make_vocab_parallel(embedding, owner, owner.compute_dtype)  # type: ignore[arg-type]
    make_lazy(head, owner, config)
    head.forward = owner.gathered_forward  # type: ignore[assignment,method-assign]


def _new_group(ranks: list[int]) -> ProcessGroup:
    group = dist.new_group(ranks, use_local_synchronization=True, group_desc="cce_dist")
    assert isinstance(group, ProcessGroup)
    return group
