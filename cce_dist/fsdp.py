"""FSDP2: each rank's rows of the classifier are its vocabulary shard, and no rank gathers them in training.

Stock FSDP2 all-gathers the classifier for the forward and again for the backward. Here its parameters stay DTensors,
sharded over FSDP's own mesh as FSDP shards them, but outside of FSDP's unshard and reduce cycle. Optimizers,
`clip_grad_norm_`, state dicts and checkpoints therefore see what they see with stock FSDP2. `shard_head` does this to a
model on its way to `fully_shard`, `adopt` to one that a framework has sharded already.

Which ranks share a loss, on a mesh of replicas x shards x tensor parallelism, of which only shards is needed:

- The rows are cut over tensor parallelism first, each part over the shards: the vocabulary group is shards x tp.
- Every data-parallel rank brings its own tokens, the ranks of a tensor-parallel group the same ones. With
  ``sequence_parallel`` each of those brings its slice of the sequence too. Context parallelism needs no word: its ranks
  are among those that FSDP shards over, each with its own tokens; as FSDP averages over them too, a loss that divides
  the sum over a slice by the tokens of the whole sequence is to be multiplied by the number of slices. Where a sequence
  is split, shift the labels before splitting it (``shift_labels`` of Hugging Face models), or each slice loses the
  label of its last token.
- ``vocab_parallel_size`` makes the group smaller. The parameters stay where they are; each rank gathers the rows at its
  place of the other vocabulary groups, and their gradients are reduce-scattered back.

The gradient that FSDP would have reduced arrives complete: summed over the tokens of the vocabulary group by the loss,
over the other vocabulary groups and the replicas of an HSDP mesh here, and divided by what FSDP divides by.

Shapes: D hidden, V rows of the whole classifier, R local rows, S shards, T tensor-parallel ranks.
"""

import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.nn import functional as F

from cce_dist.announce import announce_active
from cce_dist.collective_logits import await_ranks
from cce_dist.config import CCEConfig
from cce_dist.embedding import check_embedding, make_vocab_parallel
from cce_dist.find import output_layer
from cce_dist.fsdp_groups import (
    check_torch,
    forward_root,
    fsdp_mesh,
    governing_group,
    holding_group,
    in_backward,
    parallel_hooks,
    release,
    reshard,
)
from cce_dist.fsdp_in_full import in_full_in_forward, unshard
from cce_dist.lazy_logits import make_lazy
from cce_dist.liger import refuse_liger_forward
from cce_dist.owner import OnTheseRanks, divide_gradient, local_rows
from cce_dist.shard import VocabShard, host_group, new_subgroup
from cce_dist.shard.rows import even_parts, gather_rows, scatter_rows, size_of


def shard_head(
    model: nn.Module,
    mesh: DeviceMesh,
    *,
    tp: DeviceMesh | None = None,
    sequence_parallel: bool = False,
    head: nn.Module | None = None,
    config: CCEConfig | None = None,
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
        tp: the 1-D mesh of the tensor parallelism of the model's body, of the same root as ``mesh``: the head's rows
            are cut over it as well. Not needed for a head that `parallelize_module` has made column-parallel; the
            hooks that it put on the head are taken off.
        sequence_parallel: each rank of ``tp`` gives the head its own slice of the sequence, and the loss the labels of
            that slice; the losses of ``tp`` then add up to the whole one. False: every one brings all tokens, and
            hidden states that are DTensors, split along the sequence, are gathered. Not with tied embeddings.
        head: the classifier, an nn.Linear. None: ``model.get_output_embeddings()``, or else ``model.lm_head``; of a
            layer in PEFT's ``modules_to_save``, the active adapter's copy.
        config: settings of the loss; with ``enabled=False`` nothing is done. ``vocab_parallel_size`` counts the ranks
            that share one copy of the rows: a multiple of tp's size, and a divisor of shards x tp.

    Raises:
        TypeError: no head was found, or it is no plain nn.Linear.
        ValueError: a mesh, a sharding or a use of the weight that is not supported.
        RuntimeError: a torch whose FSDP2 this version does not know, or ranks with unequal settings.
    """
    config = CCEConfig() if config is None else config
    if not config.enabled:
        return
    head = _find_head(model, head)
    if mesh.ndim not in (1, 2):
        raise ValueError(f"mesh must be 1-D, or 2-D (replicas, shards) for HSDP, got {mesh.ndim} dimensions.")
    if tp is not None and tp.ndim != 1:
        raise ValueError(f"tp must be a 1-D mesh, got {tp.ndim} dimensions; take one of them, as in mesh['tp'].")
    _check_support(model, head, mesh, sequence_parallel)
    reshard(model)
    group = holding_group(model, head)
    if group is None:
        tp = _parallel_mesh(head, mesh, tp)
        _check_sizes(mesh, tp, sequence_parallel, config)
        _distribute(model, head, mesh, tp)
    else:
        if fsdp_mesh(group) != mesh:
            raise ValueError(f"the head is sharded over {fsdp_mesh(group)}, not over mesh, {mesh}. Pass that mesh.")
        found = _tp_of(head, mesh)
        if tp is not None and tp != found:
            raise ValueError(
                f"fully_shard has taken the head with {_described(head)}, which has no part over tp, {tp}. Call "
                "shard_head before fully_shard takes the head."
            )
        _check_sizes(mesh, found, sequence_parallel, config)
        release(model, head)
    _install(model, head, mesh, group, sequence_parallel, config)


def adopt(
    model: nn.Module,
    *,
    sequence_parallel: bool = False,
    head: nn.Module | None = None,
    config: CCEConfig | None = None,
) -> None:
    """`shard_head` for a model that a framework has sharded with FSDP2: accelerate, the HF Trainer, torchtitan.

    The head's parameters are taken out of whichever FSDP group holds them. The objects stay the same, so an optimizer
    built before works on. Best called before the first forward; never between a forward and its backward.

    Args:
        model, sequence_parallel, head, config: as in `shard_head`. The meshes are found on the head.

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
    _check_support(model, head, _first_dimension(head.weight.device_mesh), sequence_parallel)
    group = holding_group(model, head)
    if group is None:
        raise ValueError(
            f"FSDP2 does not manage the head's weight, {_described(head)}. Call fully_shard on the model first, with "
            "the head's parameters not in ignored_params, or call shard_head(model, mesh)."
        )
    mesh = fsdp_mesh(group)
    _check_sizes(mesh, _tp_of(head, mesh), sequence_parallel, config)
    release(model, head)
    _install(model, head, mesh, group, sequence_parallel, config)


class FSDPOwner(OnTheseRanks):
    """The owner of rows that are DTensors on FSDP's mesh, outside of FSDP's groups.

    Args:
        fsdp_dimensions: of the weight's mesh, the first ones, 1 or 2 (HSDP); one of tensor parallelism may follow.
        fsdp_group: the FSDPParamGroup that held the head, for what the user has set on it; None where there was none.
        sequence_parallel: as in `shard_head`.
        config: ``vocab_parallel_size`` and ``materialize`` of it.
    """

    def __init__(
        self,
        model: nn.Module,
        head: nn.Linear,
        fsdp_dimensions: int,
        fsdp_group: Any | None,
        sequence_parallel: bool,
        config: CCEConfig,
    ) -> None:
        assert isinstance(head.weight, DTensor)
        self._model = model
        self._head = head
        self._fsdp_group = fsdp_group
        self._materialize = config.materialize
        self._in_full: dict[tuple[str, bool], Tensor] = {}
        self._roots: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        mesh = head.weight.device_mesh
        self._device_type = mesh.device_type
        place, groups = mesh.get_coordinate(), [mesh.get_group(dimension) for dimension in range(mesh.ndim)]
        assert place is not None
        ranks_ST = mesh.mesh
        self._replica_group, self._tp_group = None, None
        if fsdp_dimensions == 2:
            ranks_ST, self._replica_group = ranks_ST[place[0]], groups[0]
        if mesh.ndim > fsdp_dimensions:
            self._tp_group = groups[-1]
        self._shard_group = groups[fsdp_dimensions - 1]
        shards = ranks_ST.shape[0]
        ranks_ST = ranks_ST.reshape(shards, -1)
        parts = ranks_ST.shape[1]
        s, t = place[fsdp_dimensions - 1], place[-1] if self._tp_group is not None else 0
        num_rows = head.weight.shape[0]
        self._parts = even_parts((0, num_rows), parts)
        self._shards = even_parts(self._parts[t], shards)
        assert head.weight.to_local().shape[0] == size_of(self._shards[s])

        # Groups of the loss's own: on FSDP's, its collectives would queue behind the all-gathers that FSDP prefetches.
        def group(ranks: Tensor) -> ProcessGroup:
            return new_subgroup(ranks.flatten().tolist(), groups)

        # Of the S shards, these have the same rows as this rank's vocabulary group, and those the same place in it.
        d = shards if config.vocab_parallel_size is None else config.vocab_parallel_size // parts
        together, alike = slice(s // d * d, s // d * d + d), slice(s % d, None, d)
        self._held = self._shards[alike]
        self._held_group = None if d == shards else group(ranks_ST[alike, t])
        vocab_group = group(ranks_ST[together])
        own_tokens = self._tp_group is None or sequence_parallel
        token_group = vocab_group if own_tokens else group(ranks_ST[together, t])
        # All ranks with tokens of their own: those of the mesh, but for other parts of tp that bring the same.
        counted = mesh.mesh if own_tokens else mesh.mesh[..., t]
        count_group = token_group if counted.numel() == dist.get_world_size(token_group) else group(counted)
        self._token_copies = 1 if own_tokens else parts
        # All ranks that gather the rows for real logits, on the hosts.
        self._host_group = host_group(vocab_group if d == shards else group(ranks_ST))
        self.shard = VocabShard(
            tuple(self._held),
            num_rows,
            vocab_group=vocab_group,
            token_group=token_group,
            count_group=count_group,
            grad_divisor=float(mesh.size() // parts),
        )

    def local_weight(self) -> Tensor:
        """The rank's rows [R, D] on the compute device; the gradient is averaged as FSDP averages."""
        return self._local(self._parameter("weight"))

    def local_bias(self) -> Tensor | None:
        """The rank's bias [R], likewise."""
        return None if self._head._parameters["bias"] is None else self._local(self._parameter("bias"))

    def gathered_forward(self, hidden: Tensor) -> Tensor:
        """The head's forward where real logits [..., V] are wanted: the classifier is gathered in hidden's dtype."""
        await_ranks(self._host_group, "the logits of a classifier that FSDP2 shards")
        hidden = self.own_tokens(hidden)
        weight_VD, bias_V = (
            None if p is None else self._whole(p, hidden.dtype) for p in self._head._parameters.values()
        )
        assert weight_VD is not None
        return F.linear(hidden, weight_VD, bias_V)

    def in_full(self, parameter: Tensor) -> Tensor | None:
        """What a parameter of the head is inside a forward, to code that reads it as an attribute; None outside.

        A recomputation in backward counts as inside. One forward gathers a parameter at most once.
        """
        root = forward_root(self._modules())
        name = next((name for name, p in self._head._parameters.items() if p is parameter), None)
        if name is None or (root is None and not in_backward()):
            return None
        key = (name, torch.is_grad_enabled())
        if key in self._in_full:
            return self._in_full[key]
        unsharded = _Unsharded(self, parameter.shape, self.compute_dtype() or parameter.dtype)
        whole = unshard(self._stored(parameter), unsharded, self._materialize, name)
        if root is not None:
            self._in_full[key] = whole
            self._forget_after(root)
        return whole

    def _forget_after(self, root: nn.Module) -> None:
        """Lets go of what a forward of this module has gathered when it ends, also by an exception."""
        if root not in self._roots:
            self._roots.add(root)
            root.register_forward_hook(lambda *_: self._in_full.clear(), always_call=True)

    def _parameter(self, name: str) -> Tensor:
        """The sharded parameter itself, which the attribute is not inside a forward."""
        parameter = self._head._parameters[name]
        assert parameter is not None
        return parameter

    def own_tokens(self, hidden: Tensor) -> Tensor:
        """Plain hidden states of the tokens that this rank brings, out of what a tensor-parallel body gives."""
        if not isinstance(hidden, DTensor):
            return hidden
        if self._token_copies == 1 and self._tp_group is not None:  # sequence parallel
            if not all(isinstance(placement, Shard) for placement in hidden.placements):
                raise ValueError(
                    f"sequence_parallel=True, but the head's hidden states are {hidden.placements}: every rank of tp "
                    "would count the same tokens as its own. Drop sequence_parallel, or give the head sharded tokens."
                )
            return hidden.to_local(grad_placements=hidden.placements)
        return hidden.full_tensor()

    def compute_dtype(self) -> torch.dtype | None:
        """What FSDP's mixed-precision policy computes in; None: the parameters' own dtype."""
        group = self._fsdp_group or governing_group(self._modules())
        return None if group is None else group.mp_policy.param_dtype

    def _modules(self) -> Iterator[nn.Module]:
        """Where FSDP's settings for the head are looked for, first the group that would hold or held it."""
        yield self._head
        yield from self._model.modules()

    def _divisor(self) -> float:
        for group in (self._fsdp_group, governing_group(self._modules())):
            if group is not None and group.gradient_divide_factor is not None:
                return float(group.gradient_divide_factor)
        return self.shard.grad_divisor

    def _local(self, parameter: Tensor) -> Tensor:
        rows = self._stored(parameter)
        if self._held_group is not None:
            rows = gather_rows(rows, [size_of(run) for run in self._held], self._held_group)
        return divide_gradient(rows, self._divisor())

    def _whole(self, parameter: Tensor, dtype: torch.dtype) -> Tensor:
        rows = self.gather(self._stored(parameter).to(dtype))
        return divide_gradient(rows, self._divisor() * self._token_copies)

    def gather(self, rows: Tensor) -> Tensor:
        """All rows, of what `_stored` gives on each rank."""
        for group, sizes in self._cuts():
            rows = gather_rows(rows, sizes, group)
        return rows

    def scatter(self, grad: Tensor) -> Tensor:
        """The gradient of this rank's rows, of each rank's gradient of all of them; averaged as FSDP averages."""
        for group, sizes in reversed(self._cuts()):
            grad = scatter_rows(grad, sizes, group)
        return grad / (self._divisor() * self._token_copies)

    def _cuts(self) -> list[tuple[ProcessGroup, list[int]]]:
        """The groups that the rows are cut over, from the last cut to the first, with the rows of each rank."""
        cuts = [(self._shard_group, [size_of(run) for run in self._shards])]
        if self._tp_group is not None:
            cuts.append((self._tp_group, [size_of(run) for run in self._parts]))
        return cuts

    def _stored(self, parameter: Tensor) -> Tensor:
        """The rows that FSDP stores on this rank, on the compute device: from the CPU, where FSDP offloads."""
        rows = local_rows(parameter).to(self._device_type)
        return rows if self._replica_group is None else _SumOverReplicas.apply(rows, self._replica_group)


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


@dataclass(frozen=True)
class _Unsharded:
    """A parameter of the owner's head as it is inside a forward."""

    owner: FSDPOwner
    shape: torch.Size
    dtype: torch.dtype

    def gather(self, rows: Tensor) -> Tensor:
        return self.owner.gather(rows)

    def scatter(self, grad: Tensor) -> Tensor:
        return self.owner.scatter(grad)


class _OwnTokens(nn.Module):
    """Goes before the class of a lazy head of a tensor-parallel body, whose hidden states may be DTensors."""

    _cce_owner: ClassVar[FSDPOwner]

    def __call__(self, input: Tensor) -> Any:
        return super().__call__(self._cce_owner.own_tokens(input))


def _find_head(model: nn.Module, head: nn.Module | None) -> nn.Linear:
    if head is None:
        head = output_layer(model)
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
        raise ValueError(
            "the head's forward is replaced already: shard_head or adopt was called on this model before, or "
            "transformers made the head tensor-parallel; leave it out of its plan, and pass tp to shard_head."
        )
    others = sorted(set(dict(head.named_parameters())) - {"weight", "bias"})
    if others:
        raise ValueError(
            f"the head must own a weight and a bias only, got {others} too; merge adapters into the weight."
        )
    if head not in model.modules():
        raise ValueError("head must be a submodule of model.")
    return head


def _described(head: nn.Linear) -> str:
    assert isinstance(head.weight, DTensor)
    mesh = head.weight.device_mesh
    return f"{tuple(head.weight.placements)} on a mesh {mesh.mesh_dim_names or ''}{tuple(mesh.shape)}"


def _first_dimension(mesh: DeviceMesh) -> DeviceMesh:
    return mesh if mesh.ndim == 1 or mesh.mesh_dim_names is None else mesh[mesh.mesh_dim_names[0]]


def _parallel_mesh(head: nn.Linear, mesh: DeviceMesh, tp: DeviceMesh | None) -> DeviceMesh | None:
    """The tensor-parallel mesh of a head that FSDP has not taken."""
    if not isinstance(head.weight, DTensor):
        return tp
    found = head.weight.device_mesh
    if tuple(head.weight.placements) != (Shard(0),) or found == mesh or tp not in (None, found):
        raise ValueError(
            f"the head's weight is {_described(head)}, neither sharded by fully_shard nor column-parallel over tp. "
            "Leave the head out of the parallelize_module plan, and pass tp."
        )
    return found


def _tp_of(head: nn.Linear, mesh: DeviceMesh) -> DeviceMesh | None:
    """The tensor-parallel mesh of a head that FSDP has sharded over ``mesh``."""
    assert isinstance(head.weight, DTensor)
    whole, placements = head.weight.device_mesh, head.weight.placements
    replicas, cut = placements[: mesh.ndim - 1], placements[mesh.ndim - 1 :]
    if (
        len(cut) not in (1, 2)
        or not all(isinstance(placement, Replicate) for placement in replicas)
        or any(getattr(placement, "dim", None) != 0 for placement in cut)
    ):
        raise ValueError(
            f"the head's rows must be sharded over FSDP's mesh and, possibly, one dimension of tensor parallelism, got "
            f"{_described(head)}. A head that tensor parallelism replicates, or cuts along another dimension, is not "
            "supported: leave it out of the plan, and pass tp to shard_head."
        )
    return None if len(cut) == 1 else whole[whole.mesh_dim_names[-1]]  # type: ignore[index]


def _check_sizes(mesh: DeviceMesh, tp: DeviceMesh | None, sequence_parallel: bool, config: CCEConfig) -> None:
    if sequence_parallel and tp is None:
        raise ValueError("sequence_parallel is about the ranks of a tensor-parallel mesh; pass tp, or leave it out.")
    shards, parts = mesh.size(mesh.ndim - 1), 1 if tp is None else tp.size()
    size = config.vocab_parallel_size
    if size is not None and (size % parts or (shards * parts) % size):
        raise ValueError(
            f"vocab_parallel_size must be a multiple of the {parts} tensor-parallel ranks and divide the {shards} x "
            f"{parts} ranks that the classifier's rows are sharded over, got {size}."
        )


def _holders(model: nn.Module, parameter: Tensor) -> list[tuple[nn.Module, str]]:
    """Every module that has this parameter, with the name it has there."""
    return [(m, name) for m in model.modules() for name, p in m._parameters.items() if p is parameter]


def _tied(model: nn.Module, head: nn.Linear) -> list[nn.Module]:
    return [module for module, _ in _holders(model, head.weight) if module is not head]


def _check_support(model: nn.Module, head: nn.Linear, mesh: DeviceMesh, sequence_parallel: bool) -> None:
    refuse_liger_forward(model)
    for embedding in _tied(model, head):
        check_embedding(embedding)
        if sequence_parallel:
            raise ValueError("sequence_parallel needs an embedding that is not tied to the head; untie it.")
        if parallel_hooks(embedding) or "forward" in vars(embedding):
            raise ValueError("leave the embedding that is tied to the head out of the plan of tensor parallelism.")
    check_torch(mesh)


def _distribute(model: nn.Module, head: nn.Linear, mesh: DeviceMesh, tp: DeviceMesh | None) -> None:
    """Shards the head's parameters as FSDP would, and keeps a later `fully_shard` of the model away from them."""
    modules = [head, *_tied(model, head)]
    for parameter in list(head.parameters(recurse=False)):
        sharded = nn.Parameter(_own_rows(parameter.detach(), mesh, tp), requires_grad=parameter.requires_grad)
        for module, name in _holders(model, parameter):
            setattr(module, name, sharded)
    for module in modules:
        fully_shard(module, mesh=mesh, ignored_params=set(module.parameters()))


def _own_rows(parameter: Tensor, mesh: DeviceMesh, tp: DeviceMesh | None) -> DTensor:
    """A copy of this rank's rows: a view of them would keep the whole tensor alive."""
    part = parameter.to_local() if isinstance(parameter, DTensor) else parameter
    if tp is not None and part is parameter:
        start, stop = even_parts((0, len(parameter)), tp.size())[tp.get_local_rank()]
        part = parameter[start:stop]
    start, stop = even_parts((0, len(part)), mesh.size(mesh.ndim - 1))[mesh.get_local_rank(mesh.ndim - 1)]
    device = part.device if part.is_meta else torch.device(mesh.device_type)
    # FSDP itself says on which mesh and how the DTensor lies, on a parameter without memory.
    probe = nn.Module()
    probe.like = nn.Parameter(_on_meta(parameter, tp))
    fully_shard(probe, mesh=mesh)
    assert isinstance(probe.like, DTensor)
    return DTensor.from_local(
        part[start:stop].to(device, copy=True),
        probe.like.device_mesh,
        probe.like.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )


def _on_meta(parameter: Tensor, tp: DeviceMesh | None) -> Tensor:
    whole = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
    if tp is None:
        return whole
    start, stop = even_parts((0, len(whole)), tp.size())[tp.get_local_rank()]
    return DTensor.from_local(
        whole[start:stop], tp, [Shard(0)], run_check=False, shape=whole.shape, stride=whole.stride()
    )


def _install(
    model: nn.Module, head: nn.Linear, mesh: DeviceMesh, group: Any | None, sequence_parallel: bool, config: CCEConfig
) -> None:
    owner = FSDPOwner(model, head, mesh.ndim, group, sequence_parallel, config)
    for embedding in _tied(model, head):
        make_vocab_parallel(embedding, owner, owner.compute_dtype)  # type: ignore[arg-type]
    for hooks, key in parallel_hooks(head):
        del hooks[key]
    make_lazy(head, owner, config)
    assert isinstance(head.weight, DTensor)
    if head.weight.device_mesh.ndim > mesh.ndim:
        head.__class__ = type(type(head).__name__, (_OwnTokens, type(head)), {"_cce_owner": owner})
    head.forward = owner.gathered_forward  # type: ignore[assignment,method-assign]
    for module in (head, *_tied(model, head)):
        in_full_in_forward(module, owner.in_full)
    shard = owner.shard
    assert shard.vocab_group is not None
    gradient = config.gradient_on(torch.device(head.weight.device_mesh.device_type))
    announce_active(
        f"FSDP2, gradient={gradient}, {shard.vocab_size} vocabulary rows over {shard.vocab_group.size()} "
        f"rank(s), {shard.num_rows} of them on this one",
        rank=int(head.weight.device_mesh.mesh.min()),
    )
