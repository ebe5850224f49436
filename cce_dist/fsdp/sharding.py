"""A classifier put on FSDP's mesh, outside of its groups: on the way to `fully_shard`, or taken out of what that made.

In: a model, before, between or after the calls of `fully_shard`. Out: the same parameters as DTensors that FSDP neither
gathers nor reduces, the head lazy, embeddings tied to it vocabulary-parallel. What cannot be is refused before.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard

from cce_dist.config import CCEConfig, choose_config
from cce_dist.fsdp.in_full import in_full_in_forward
from cce_dist.fsdp.owner import FSDPOwner
from cce_dist.fsdp.private import check_torch, fsdp_mesh, holding_group, is_of_tensor_parallelism, release, reshard
from cce_dist.heads.announce import announce_active
from cce_dist.heads.embedding import check_embedding, make_vocab_parallel
from cce_dist.heads.find import holders, is_lora, lora_attribute, output_layer, tied_to
from cce_dist.heads.hooks import after_hooks, pre_hooks, remove
from cce_dist.heads.lazy import check_adapter, make_adapted, make_lazy
from cce_dist.heads.liger import refuse_liger_forward
from cce_dist.shard.rows import even_parts


def shard_head(
    model: nn.Module,
    mesh: DeviceMesh,
    *,
    tp: DeviceMesh | None = None,
    sequence_parallel: bool = False,
    head: nn.Module | None = None,
    config: CCEConfig | None = None,
    **settings: Any,
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
        settings: the same by keyword, as in ``shard_head(model, mesh, gradient="exact")``.

    Raises:
        TypeError: no head was found, or it is no plain nn.Linear; a mesh or a config of another type.
        ValueError: a bad setting, both config and settings, or a mesh, a sharding or a use of the weight that is not
            supported.
        RuntimeError: a torch whose FSDP2 this version does not know, or ranks with unequal settings.
    """
    config = choose_config(config, settings, where="shard_head")
    if not config.enabled:
        return
    for name, given in {"mesh": mesh, "tp": tp}.items():
        if not isinstance(given, DeviceMesh | None) or (given is None and name == "mesh"):
            raise TypeError(f"{name} of shard_head must be a DeviceMesh, got {type(given).__name__}: {given!r}.")
    head = _find_head(model, head)
    if mesh.ndim not in (1, 2):
        raise ValueError(f"mesh must be 1-D, or 2-D (replicas, shards) for HSDP, got {mesh.ndim} dimensions.")
    if tp is not None and tp.ndim != 1:
        raise ValueError(f"tp must be a 1-D mesh, got {tp.ndim} dimensions; take one of them, as in mesh['tp'].")
    _check_support(model, head, mesh, sequence_parallel, config)
    if tp is not None and _lora_around(model, head) is not None:
        raise TypeError(_NO_LORA)
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
    **settings: Any,
) -> None:
    """`shard_head` for a model that a framework has sharded with FSDP2: accelerate, the HF Trainer, torchtitan.

    The head's parameters are taken out of whichever FSDP group holds them. The objects stay the same, so an optimizer
    built before works on. Best called before the first forward; never between a forward and its backward.

    Args:
        model, sequence_parallel, head, config, settings: as in `shard_head`. The meshes are found on the head.

    Raises:
        TypeError, ValueError, RuntimeError: as `shard_head`.
    """
    config = choose_config(config, settings, where="adopt")
    if not config.enabled:
        return
    head = _find_head(model, head)
    reshard(model)
    if not isinstance(head.weight, DTensor):
        raise ValueError(
            "the head's weight is not sharded yet: call adopt after the framework has applied fully_shard "
            "(accelerate's prepare, the Trainer's on_train_begin), or call shard_head(model, mesh)."
        )
    _check_support(model, head, _first_dimension(head.weight.device_mesh), sequence_parallel, config)
    group = holding_group(model, head)
    if group is None:
        raise ValueError(
            f"FSDP2 does not manage the head's weight, {_described(head)}. Call fully_shard on the model first, with "
            "the head's parameters not in ignored_params, or call shard_head(model, mesh)."
        )
    mesh = fsdp_mesh(group)
    if _tp_of(head, mesh) is not None and _lora_around(model, head) is not None:
        raise TypeError(_NO_LORA)
    _check_sizes(mesh, _tp_of(head, mesh), sequence_parallel, config)
    release(model, head)
    _install(model, head, mesh, group, sequence_parallel, config)


class _OwnTokens(nn.Module):
    """Goes before the class of a lazy head of a tensor-parallel body, whose hidden states may be DTensors."""

    _cce_owner: ClassVar[FSDPOwner]

    def __call__(self, input: Tensor) -> Any:
        return super().__call__(self._cce_owner.own_tokens(input))


def _find_head(model: nn.Module, head: nn.Module | None) -> nn.Linear:
    if head is None:
        head = output_layer(model, "Give it one of the two, or name it: head=model.my_classifier.", TypeError)
    if not isinstance(head, nn.Linear) or type(head).forward is not nn.Linear.forward:
        raise TypeError(
            f"the head must be an nn.Linear with its stock forward, got {type(head).__name__}; the loss computes "
            "hidden · weightᵀ + bias and nothing else."
        )
    if "forward" in vars(head) and not is_of_tensor_parallelism(head.forward):
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


def _lora_around(model: nn.Module, head: nn.Module) -> nn.Module | None:
    """PEFT's LoRA layer of which the head is the layer within."""
    layers = (module for module in model.modules() if is_lora(module))
    return next((layer for layer in layers if lora_attribute(layer, "base_layer") is head), None)


_NO_LORA = (
    "a LoRA adapter on the output layer is not supported with tp, over which nobody sums its gradients: leave the "
    "output layer out of the adapter's target_modules."
)


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
        allowed = [n for n in range(parts, shards * parts + 1, parts) if (shards * parts) % n == 0]
        raise ValueError(
            f"vocab_parallel_size must be {' or '.join(map(str, allowed))}, got {size}: a divisor of the {shards} x "
            f"{parts} ranks that the classifier's rows are sharded over, and a multiple of the {parts} tensor-parallel "
            "ones."
        )


def _check_support(
    model: nn.Module, head: nn.Linear, mesh: DeviceMesh, sequence_parallel: bool, config: CCEConfig
) -> None:
    refuse_liger_forward(model)
    check_adapter(_lora_around(model, head), config)
    if sequence_parallel and _lora_around(model, head) is not None:
        raise TypeError(_NO_LORA)
    for embedding in tied_to(model, head):
        check_embedding(embedding)
        if sequence_parallel:
            raise ValueError("sequence_parallel needs an embedding that is not tied to the head; untie it.")
        hooks = (*pre_hooks(embedding), *after_hooks(embedding))
        if any(map(is_of_tensor_parallelism, hooks)) or "forward" in vars(embedding):
            raise ValueError("leave the embedding that is tied to the head out of the plan of tensor parallelism.")
    check_torch(mesh)


def _distribute(model: nn.Module, head: nn.Linear, mesh: DeviceMesh, tp: DeviceMesh | None) -> None:
    """Shards the head's parameters as FSDP would, and keeps a later `fully_shard` of the model away from them."""
    modules = [head, *tied_to(model, head)]
    for parameter in list(head.parameters(recurse=False)):
        sharded = nn.Parameter(_own_rows(parameter.detach(), mesh, tp), requires_grad=parameter.requires_grad)
        for module, name in holders(model, parameter):
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
    for embedding in tied_to(model, head):
        make_vocab_parallel(embedding, owner, owner.compute_dtype)  # type: ignore[arg-type]
    remove(head, is_of_tensor_parallelism)
    vars(head).pop("forward", None)  # torchtitan's, which moves hidden states and logits between layouts
    make_lazy(head, owner, config)
    assert isinstance(head.weight, DTensor)
    if head.weight.device_mesh.ndim > mesh.ndim:
        head.__class__ = type(type(head).__name__, (_OwnTokens, type(head)), {"_cce_owner": owner})
    make_adapted(_lora_around(model, head))
    head.forward = owner.gathered_forward  # type: ignore[assignment,method-assign]
    for module in (head, *tied_to(model, head)):
        in_full_in_forward(module, owner.in_full)
    shard = owner.shard
    assert shard.vocab_group is not None
    gradient = config.gradient_on(torch.device(head.weight.device_mesh.device_type))
    announce_active(
        f"FSDP2, gradient={gradient}, {shard.vocab_size} vocabulary rows over {shard.vocab_group.size()} "
        f"rank(s), {shard.num_rows} of them on this one",
        rank=int(head.weight.device_mesh.mesh.min()),
    )
