"""The engines: who holds the parameters, reduces the gradients and takes the optimizer step.

Both kinds average gradients over the ranks, so the loop hands them losses that are multiplied by the number of ranks.
"""

import importlib.metadata
import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module
from transformers import PreTrainedModel

from cce_dist.config import CCEConfig
from cce_dist.train import restricted
from cce_dist.train.place import Place
from cce_dist.train.settings import MeshSettings, OptimizerSettings, Settings
from cce_dist.train.together import on_rank_0, together


class Engine(Protocol):
    """What the loop needs of one."""

    model: nn.Module
    """To be called; in evaluation too."""

    layout: dict[str, Any]
    """What must be the same for `load`, beyond the model."""

    def backward(self, loss: Tensor) -> None:
        """Adds to the gradients."""

    def step(self, learning_rate: float) -> float:
        """Clips, updates, clears the gradients; returns their norm before clipping, NaN if it is not finite."""

    def save(self, folder: Path) -> None:
        """Collective: writes parameters and optimizer state."""

    def load(self, folder: Path) -> None:
        """Collective: reads what `save` wrote, as data; the optimizer's settings stay this run's."""


@torch.no_grad()
def weights_are_finite(engine: Engine) -> bool:
    """Collective."""
    held = (getattr(parameter, "ds_tensor", parameter) for parameter in engine.model.parameters())
    local = (tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in held)
    faults = torch.tensor(sum(not bool(tensor.isfinite().all()) for tensor in local))
    dist.all_reduce(faults)
    return not faults


def build(model: PreTrainedModel, settings: Settings, place: Place) -> Engine:
    """Shards the model as the settings say.

    Raises:
        ValueError: engine "none" with several ranks, and what the engines themselves refuse.
    """
    if settings.engine == "deepspeed":
        return DeepSpeedEngine(model, settings)
    if settings.engine == "fsdp2":
        _fsdp2(model, settings, place)
    else:
        _single_process(model, settings, place)
    return TorchEngine(model.to(place.device), settings)


class TorchEngine:
    """A plain module, or one sharded by FSDP2."""

    def __init__(self, model: nn.Module, settings: Settings) -> None:
        self.model = model
        self.layout: dict[str, Any] = {}
        self._settings = settings.optimizer
        self._optimizer = _adamw(model.parameters(), settings.optimizer)

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(self, learning_rate: float) -> float:
        norm = _clip(self.model.parameters(), self._settings.clip)
        _set_learning_rate(self._optimizer, learning_rate)
        self._optimizer.step()
        self._optimizer.zero_grad()
        return norm

    def save(self, folder: Path) -> None:
        with _plain_errors(folder):
            dcp.save(self._state(), checkpoint_id=folder)

    def load(self, folder: Path) -> None:
        state = self._state()
        together(restricted.Reader(folder).read_metadata)  # DCP would hide the error
        with _plain_errors(folder), restricted.data_only():
            dcp.load(state, storage_reader=restricted.Reader(folder))
        set_state_dict(
            self.model, self._optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
        )
        _apply(self._settings, self._optimizer)

    def _state(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self.model, self._optimizer)
        return {"model": model, "optimizer": optimizer}


@contextmanager
def _plain_errors(folder: Path) -> Iterator[None]:
    """DCP gathers the errors of all ranks in one that is no `Exception`, whose text is all their tracebacks."""
    try:
        yield
    except dcp.CheckpointException as error:
        failures = "; ".join(f"rank {rank}: {fault[0]!r}" for rank, fault in sorted(error.failures.items())[:4])
        raise RuntimeError(f"{folder}: {failures}") from error


class DeepSpeedEngine:
    """DeepSpeed, from its JSON."""

    def __init__(self, model: nn.Module, settings: Settings) -> None:
        import deepspeed

        import cce_dist.deepspeed

        if not torch.cuda.is_available():  # an optional CPU collective that DeepSpeed would compile for a minute
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        self._engine, *_ = cce_dist.deepspeed.initialize(
            model=model,
            optimizer=_adamw(model.parameters(), settings.optimizer),
            config=_deepspeed_config(settings),
        )
        self.model: nn.Module = self._engine
        stage = int(self._engine.zero_optimization_stage())
        # Only stage 0 has no rank's own part of the optimizer's state.
        self.layout: dict[str, Any] = {"zero_stage": stage, **({"ranks": dist.get_world_size()} if stage else {})}
        self._settings = settings.optimizer
        self._accumulation, self._micro_steps = settings.batch.accumulation, 0

    def backward(self, loss: Tensor) -> None:
        self._engine.backward(loss, scale_wrt_gas=False)
        self._micro_steps += 1
        if self._micro_steps % self._accumulation:
            self._engine.step()  # DeepSpeed counts micro-steps in its step; the last one is taken in ours

    def step(self, learning_rate: float) -> float:
        _set_learning_rate(self._engine.optimizer, learning_rate)
        averaged = torch.zeros(())
        if self._engine.zero_optimization_stage() == 0:  # keeps no norm in fp32, but has averaged the gradients by now
            averaged = nn.utils.get_total_norm([p.grad for p in self._engine.module.parameters() if p.grad is not None])
        self._engine.step()
        norm = self._engine.get_global_grad_norm()
        norm = float(averaged if norm is None else norm)
        return norm if norm >= 0 else math.nan  # DeepSpeed's -1 stands for what is not finite

    def save(self, folder: Path) -> None:
        # What writes files; rank 0 alone copies its scripts, and writes "latest", which is done here.
        writers = [(self._engine.checkpoint_engine, "save"), (self._engine, "_copy_recovery_script")]
        with _faults_later(writers) as check:
            self._engine.save_checkpoint(str(folder), tag="deepspeed", save_latest=False)
        together(check)
        on_rank_0(lambda: (folder / "latest").write_text("deepspeed"))

    def load(self, folder: Path) -> None:
        mine = slice(dist.get_rank(), None, dist.get_world_size())
        together(lambda: restricted.check_deepspeed(sorted(folder.rglob("*.pt"))[mine]))
        with restricted.data_only(restricted.deepspeed_classes()):
            path, _ = self._engine.load_checkpoint(str(folder), tag="deepspeed")
        if path is None:  # DeepSpeed says no more than that
            raise ValueError(f"DeepSpeed finds no checkpoint of its own in {folder}.")
        _apply(self._settings, self._engine.optimizer)


@contextmanager
def _faults_later(writers: Sequence[tuple[Any, str]]) -> Iterator[Callable[[], None]]:
    """Errors of methods that write files of this rank are raised by what is yielded, once all ranks are there.

    Raises:
        RuntimeError: this version of DeepSpeed has no such method.
    """
    faults: list[Exception] = []

    def noting(write: Callable[..., None]) -> Callable[..., None]:
        def write_or_note(*args: Any, **kwargs: Any) -> None:
            try:
                write(*args, **kwargs)
            except Exception as error:
                faults.append(error)

        return write_or_note

    def check() -> None:
        if faults:
            raise faults[0]

    for owner, name in writers:
        if not hasattr(owner, name):
            version = importlib.metadata.version("deepspeed")
            raise RuntimeError(f"DeepSpeed {version} writes its files in another way: {type(owner)} has no {name}.")
        setattr(owner, name, noting(getattr(owner, name)))
    try:
        yield check
    finally:
        for owner, name in writers:
            delattr(owner, name)


def _single_process(model: PreTrainedModel, settings: Settings, place: Place) -> None:
    from cce_dist.transformers import patch

    if place.world > 1:
        raise ValueError(f"engine: none is for a single process, got {place.world} ranks; use fsdp2 or deepspeed.")
    if settings.dtype == "bf16":
        model.forward = torch.autocast(place.device.type, torch.bfloat16)(model.forward)
    if settings.head == "cce":
        patch(model, head_settings(settings))


def _fsdp2(model: PreTrainedModel, settings: Settings, place: Place) -> None:
    from cce_dist.fsdp import shard_head

    mesh, tp = _meshes(settings.mesh, place)
    if tp is not None:
        _split_layers(model, tp)
    bf16 = settings.dtype == "bf16"
    precision = MixedPrecisionPolicy(torch.bfloat16, reduce_dtype=torch.float32) if bf16 else MixedPrecisionPolicy()
    blocks = set(model._no_split_modules or ())
    for module in list(model.modules()):
        if type(module).__name__ in blocks:
            fully_shard(module, mesh=mesh, mp_policy=precision)
    if settings.head == "cce":
        shard_head(model, mesh, tp=tp, config=head_settings(settings))
    elif model.get_output_embeddings().weight is not model.get_input_embeddings().weight:
        fully_shard(model.get_output_embeddings(), mesh=mesh, mp_policy=precision)
    fully_shard(model, mesh=mesh, mp_policy=precision)


def _meshes(settings: MeshSettings, place: Place) -> tuple[DeviceMesh, DeviceMesh | None]:
    """The mesh of FSDP2, and that of tensor parallelism if there is any."""
    shards, left = divmod(place.world, settings.replicas * settings.tensor_parallel)
    if left or not shards:
        raise ValueError(
            f"mesh.replicas x mesh.tensor_parallel = {settings.replicas} x {settings.tensor_parallel} must divide the "
            f"number of ranks, {place.world}."
        )
    sizes = {"replicate": settings.replicas, "shard": shards, "tp": settings.tensor_parallel}
    names = tuple(name for name, size in sizes.items() if size > 1 or name == "shard")
    mesh = init_device_mesh(place.device.type, tuple(sizes[name] for name in names), mesh_dim_names=names)
    if "tp" not in names:
        return mesh, None
    return mesh[names[:-1]], mesh["tp"]


def _split_layers(model: PreTrainedModel, tp: DeviceMesh) -> None:
    """Tensor parallelism of the layers, by the plan that Hugging Face's config of the model has."""
    plan: dict[str, str] = getattr(model.config, "base_model_tp_plan", None) or {}
    unknown = sorted(set(plan.values()) - set(_STYLES))
    if unknown or not plan:
        raise ValueError(
            f"mesh.tensor_parallel needs a model whose tensor-parallel plan splits by {' and '.join(_STYLES)} alone; "
            f"{model.config.model_type} has {', '.join(unknown) or 'no plan'}. Set it to 1."
        )
    for name in ("num_attention_heads", "num_key_value_heads"):
        heads = getattr(model.config, name, tp.size())
        if heads % tp.size():
            raise ValueError(f"mesh.tensor_parallel = {tp.size()} must divide the model's {name}, {heads}.")
    parallelize_module(model.base_model, tp, {where: _STYLES[style]() for where, style in plan.items()})


_STYLES: dict[str, type[ParallelStyle]] = {"colwise": ColwiseParallel, "rowwise": RowwiseParallel}


def _clip(parameters: Iterable[nn.Parameter], max_norm: float) -> float:
    """Clips the gradients by their norm over all meshes: tensor parallelism leaves the norms' weights on FSDP's own."""
    meshes: dict[DeviceMesh | None, list[nn.Parameter]] = {}
    for parameter in parameters:
        if parameter.grad is not None:
            meshes.setdefault(getattr(parameter, "device_mesh", None), []).append(parameter)
    norms = [nn.utils.get_total_norm([p.grad for p in group if p.grad is not None]) for group in meshes.values()]
    norm = torch.stack([norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]).norm()
    for mesh, group in meshes.items():
        nn.utils.clip_grads_with_norm_(group, max_norm, norm if mesh is None else DTensor.from_local(norm, mesh))
    return float(norm)


def _read_json(file: Path) -> dict[str, Any]:
    try:
        config = json.loads(file.read_text())
        if not isinstance(config, dict):
            raise ValueError(f"it holds a {type(config).__name__}, not a JSON object")
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} is no DeepSpeed config: {error}.") from None
    return config


def _deepspeed_config(settings: Settings) -> dict[str, Any]:
    """The JSON, with the trainer's own settings where both could say something."""
    assert settings.deepspeed is not None
    config = _read_json(settings.deepspeed)
    if shared := [name for name in ("tensor_parallel", "sequence_parallel_size") if name in config]:
        raise ValueError(f"{settings.deepspeed} has {shared[0]}, but the trainer gives each rank a batch of its own.")
    precision, section = _precision(config)
    if precision not in ("fp32", settings.dtype):
        remedy = "set dtype: bf16" if precision == "bf16" else "the trainer does not do fp16. Name another file"
        raise ValueError(
            f"{settings.deepspeed} has the model compute in {precision}, the trainer's dtype is {settings.dtype}: "
            f"{remedy}, or take {section} out of the file."
        )
    for replaced in ("optimizer", "scheduler", "train_batch_size"):
        config.pop(replaced, None)
    config |= {
        "train_micro_batch_size_per_gpu": settings.batch.micro,
        "gradient_accumulation_steps": settings.batch.accumulation,
        "gradient_clipping": settings.optimizer.clip,
        "bf16": {"enabled": settings.dtype == "bf16" and "torch_autocast" not in config},
    }
    config["cce_dist"] = head_settings(settings).model_dump()
    return config


def _precision(config: dict[str, Any]) -> tuple[str, str]:
    """What DeepSpeed's JSON has the model compute in, and the section that says so."""
    for section in ("bf16", "fp16"):
        if config.get(section, {}).get("enabled"):
            return section, section
    autocast = config.get("torch_autocast", {})
    if autocast.get("enabled"):
        return ("bf16" if "bf" in str(autocast.get("dtype")) else "fp16"), "torch_autocast"
    return "fp32", ""


def check(settings: Settings) -> None:
    """What is wrong in DeepSpeed's JSON can be told before anything is built from it.

    Raises:
        ValueError: naming the file and the section.
    """
    head_settings(settings)
    if settings.engine == "deepspeed":
        _deepspeed_config(settings)


def head_settings(settings: Settings) -> CCEConfig:
    """Key by key the trainer's settings of the head, else those of the DeepSpeed JSON's section, else the defaults."""
    file = {} if settings.deepspeed is None else _read_json(settings.deepspeed)
    config = CCEConfig.from_mapping(file.get("cce_dist", {}), f'the section "cce_dist" of {settings.deepspeed}')
    if settings.cce is not None:
        config = config.model_copy(update=settings.cce.model_dump(exclude_unset=True))
    # All ranks bring the same number of tokens, so they need not ask each other.
    tokens = settings.batch.micro * settings.data.sequence_length
    return config.model_copy(update={"enabled": settings.head == "cce", "max_tokens": config.max_tokens or tokens})


def _adamw(parameters: Iterable[nn.Parameter], settings: OptimizerSettings) -> torch.optim.AdamW:
    return torch.optim.AdamW(
        parameters, lr=settings.learning_rate, betas=settings.betas, weight_decay=settings.weight_decay
    )


def _apply(settings: OptimizerSettings, optimizer: Any) -> None:
    """What a checkpoint has brought of the optimizer's settings makes way for this run's."""
    for group in optimizer.param_groups:
        group["betas"], group["weight_decay"] = settings.betas, settings.weight_decay


def _set_learning_rate(optimizer: Any, learning_rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
