"""Training runs with FSDP2, and the same steps of the plain model in one process: what the tests of FSDP2 share.

A case trains a tiny model for three AdamW steps with clipping, on batches of unequal length, and is compared with the
same steps on all ranks' batches.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from ranks import device
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_module
from torch.distributed.tensor.debug import _clear_sharding_prop_cache
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from cce_dist.config import CCEConfig
from cce_dist.fsdp import adopt, shard_head

EXACT = CCEConfig(gradient="exact", materialize="raise")
STEPS = 3  # an error of the state that steps leave shows in the third one's loss
SLOW_START = 240.0  # a rank's first case imports transformers
HIDDEN = 32


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(HIDDEN)
        self.up = nn.Linear(HIDDEN, 2 * HIDDEN)
        self.down = nn.Linear(2 * HIDDEN, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm(x))))


class CausalBlock(Block):
    """A block that looks back; with ``context`` each rank of that mesh has a slice of the sequence."""

    context: DeviceMesh | None = None

    def __init__(self) -> None:
        super().__init__()
        self.query, self.value = nn.Linear(HIDDEN, HIDDEN), nn.Linear(HIDDEN, HIDDEN)
        self.key = nn.Linear(HIDDEN, HIDDEN, bias=False)  # its gradient would be rounding alone

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        query, key, value = self.query(y), self._whole(self.key(y)), self._whole(self.value(y))
        own, every = query.shape[1], key.shape[1]
        first = 0 if self.context is None else own * self.context.get_local_rank()
        place = torch.arange(every, device=x.device)
        seen = place[first : first + own, None] >= place
        return super().forward(x + F.scaled_dot_product_attention(query, key, value, attn_mask=seen))

    def _whole(self, x: Tensor) -> Tensor:
        if self.context is None:
            return x
        return DTensor.from_local(x, self.context, [Shard(1)]).full_tensor(grad_placements=[Partial()])


class PlainLM(nn.Module):
    """A language model that knows nothing of any framework; its embedding has a padding token."""

    def __init__(self, vocab: int, tied: bool, input_vocab: int = 11, block: type[Block] = Block) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab if tied else input_vocab, HIDDEN, padding_idx=2)
        self.layers = nn.ModuleList([block(), block()])
        self.norm = nn.LayerNorm(HIDDEN)
        self.lm_head = nn.Linear(HIDDEN, vocab, bias=not tied)
        self.tied = tied
        if tied:
            self.lm_head.weight = self.embed.weight

    def forward(self, ids: Tensor, past_head: bool = False) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self._past_head(self.norm(x)) if past_head else self.lm_head(self.norm(x))

    def _past_head(self, x: Tensor) -> Tensor:
        """Logits as TRL's distillation computes them, here in a checkpoint: from the weight, past the head's call."""

        def logits(x: Tensor) -> Tensor:
            weight, bias = (
                p.full_tensor() if isinstance(p, DTensor) else p
                for p in (self.embed.weight if self.tied else self.lm_head.weight, self.lm_head.bias)
            )
            return F.linear(x, weight, bias)

        return checkpoint(logits, x.to_local() if isinstance(x, DTensor) else x, use_reentrant=False)


@dataclass(frozen=True)
class Case:
    model: str = "plain"
    vocab: int = 103
    tied: bool = False
    input_vocab: int = 103
    mesh: tuple[int, ...] = ()
    entry: str = "before"
    micro_batches: int = 1
    sync_every_micro_batch: bool = True
    losses_per_backward: int = 1
    divide_factor: float | None = None
    offload: bool = False
    fused: bool = False
    vocab_parallel: int | None = None
    tp: int = 1
    head_in_plan: bool = False
    sequence: str = ""
    """With tp: "gathered" or "own", by who gathers a sequence that the body splits; "": all ranks have all of it."""
    cp: int = 1
    frequent: int = 0
    """With a filter that leaves nothing out, so many rows are computed apart."""
    past_head: bool = False
    """The first loss of a backward is of logits made of the head's weight, past its call."""
    of_logprobs: bool = False
    """The loss is that of a policy: log-probabilities and an entropy bonus, in the words of TRL."""

    @property
    def config(self) -> CCEConfig:
        changes: dict[str, Any] = {"vocab_parallel_size": self.vocab_parallel}
        if self.frequent:
            changes |= {"gradient": "filtered", "filter_eps": 1e-30, "frequent_rows": self.frequent}
        if self.past_head:
            changes["materialize"] = "warn"
        return EXACT.model_copy(update=changes)

    def __str__(self) -> str:
        changed = {k: v for k, v in vars(self).items() if v != getattr(Case, k)}
        return ",".join(f"{k}={v}" for k, v in changed.items()) or "default"


def build(case: Case) -> nn.Module:
    """With weights drawn on the CPU, the same wherever it then is."""
    return model_of(case).to(device())


def model_of(case: Case) -> nn.Module:
    torch.manual_seed(3)
    sizes = {"vocab_size": case.vocab, "hidden_size": HIDDEN, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": case.tied}
    if case.model == "llama":
        from transformers import LlamaConfig, LlamaForCausalLM

        return LlamaForCausalLM(LlamaConfig(**sizes, **heads))
    if case.model == "gemma":  # its embedding is a subclass that scales
        from transformers import GemmaConfig, GemmaForCausalLM

        return GemmaForCausalLM(GemmaConfig(**sizes, **heads, head_dim=8, pad_token_id=0))
    return PlainLM(case.vocab, case.tied, case.input_vocab, CausalBlock if case.cp > 1 else Block)


def _layers(model: nn.Module) -> nn.ModuleList:
    return model.layers if isinstance(model, PlainLM) else model.model.layers  # type: ignore[return-value,union-attr]


def _norm(model: nn.Module) -> nn.Module:
    return model.norm if isinstance(model, PlainLM) else model.model.norm  # type: ignore[return-value,union-attr]


def batch(case: Case, step: int, micro: int, rank: int) -> tuple[Tensor, Tensor]:
    """Another length on every rank, and another share of ignored labels."""
    generator = torch.Generator().manual_seed(1000 * step + 100 * micro + rank)
    shape = (2, (4 + (rank + step) % 3) * max(case.cp, case.tp if case.sequence else 1))
    ids = torch.randint(min(case.vocab, case.input_vocab), shape, generator=generator)
    labels = torch.randint(case.vocab, shape, generator=generator)
    labels[torch.rand(shape, generator=generator) < 0.2 * rank] = -100
    labels[0, 0] = 1
    return ids.to(device()), labels.to(device())


def loss_of(model: nn.Module, case: Case, ids: Tensor, labels: Tensor, past_head: bool = False) -> Tensor:
    if not isinstance(model, PlainLM):
        return model(input_ids=ids, labels=labels, shift_labels=labels).loss
    valid = (labels != -100).sum()
    if dist.is_initialized() and case.cp > 1:
        ids, labels = slice_of(ids, case.cp), slice_of(labels, case.cp)
    if dist.is_initialized() and case.sequence == "own":
        labels = slice_of(labels, case.tp)
    logits = model(ids, past_head=past_head)
    if case.of_logprobs:
        log_p = logits.log_softmax(-1)
        chosen, entropy = log_p.gather(-1, labels.clamp(min=0)[..., None])[..., 0], -(log_p.exp() * log_p).sum(-1)
        return -((chosen + 0.3 * entropy) * (labels != -100)).sum() / valid
    return F.cross_entropy(logits.view(-1, logits.shape[-1]), labels.reshape(-1), reduction="sum") / valid


def slice_of(x: Tensor, parts: int) -> Tensor:
    """This rank's part of the sequence."""
    return x.chunk(parts, dim=1)[dist.get_rank() % parts]


def losses_of(model: nn.Module, case: Case, step: int, micro: int, rank: int) -> Tensor:
    """The loss of a micro-batch; of two forwards with other data, weighted, where a case has two losses."""
    total = loss_of(model, case, *batch(case, step, micro, rank), past_head=case.past_head)
    for extra in range(1, case.losses_per_backward):
        total = total + 0.5 * loss_of(model, case, *batch(case, step, 50 + micro, rank + extra))
    return total / case.micro_batches


@dataclass
class Record:
    losses: list[list[float]]  # by step, by rank with data of its own
    norms: list[float]
    weights: dict[str, Tensor]


def finish_step(model: nn.Module, optimizer: torch.optim.Optimizer) -> float:
    norm = nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    optimizer.step()
    optimizer.zero_grad()
    return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)


def train_plain(case: Case, world: int) -> Record:
    model = build(case)
    readers = world // (case.tp * case.cp)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    record = Record([], [], {})
    for step in range(STEPS):
        losses = [0.0] * readers
        for micro in range(case.micro_batches):
            for rank in range(readers):
                loss = losses_of(model, case, step, micro, rank)
                (loss / (case.divide_factor or readers)).backward()
                losses[rank] += float(loss.detach())
        record.losses.append(losses)
        record.norms.append(finish_step(model, optimizer))
    record.weights = {name: p.detach() for name, p in model.named_parameters()}
    return record


def mesh_of(case: Case) -> DeviceMesh:
    """FSDP's and, in a case with tp, beside it tensor parallelism's."""
    _clear_sharding_prop_cache()  # it finds meshes by equality: those of earlier cases, whose process groups are gone
    ranks = case.mesh or (dist.get_world_size() // case.tp,)
    names = ("replicate", "shard") if len(ranks) == 2 else ("shard",)
    if case.tp > 1:
        return init_device_mesh(device(), (*ranks, case.tp), mesh_dim_names=(*names, "tp"))
    return init_device_mesh(device(), ranks, mesh_dim_names=names)


def _parallelize(model: PlainLM, case: Case, tp: DeviceMesh) -> None:
    """Tensor parallelism of the body, the embedding and norms included: all parameters are on one mesh then."""

    def replicate(module: nn.Module) -> None:
        distribute_module(
            module,
            tp,
            None,
            lambda _, args, mesh: (DTensor.from_local(args[0], mesh, [Replicate()], run_check=False),),
            lambda _, output, mesh: output.to_local(),
        )

    split = Shard(1) if case.sequence else Replicate()
    plan: dict[str, ParallelStyle] = {
        "layers.*.up": ColwiseParallel(input_layouts=split),
        "layers.*.down": RowwiseParallel(output_layouts=split),
    }
    if case.sequence:
        plan |= {"embed": RowwiseParallel(input_layouts=Replicate(), output_layouts=split)}
        plan |= {"layers.*.norm": SequenceParallel(use_local_output=False), "norm": SequenceParallel()}
    if case.head_in_plan:
        plan["lm_head"] = ColwiseParallel(input_layouts=split, output_layouts=Replicate())
    parallelize_module(model, tp, plan)
    if not case.sequence:
        for module in [model.norm, *(layer.norm for layer in model.layers), *([] if case.tied else [model.embed])]:
            replicate(module)  # type: ignore[arg-type]


def shard_model(
    model: nn.Module, case: Case, mesh: DeviceMesh, config: CCEConfig | None = None, **settings: Any
) -> None:
    """The user's parallelize_module and fully_shard calls, and ours where ``case.entry`` puts it."""
    ours: dict[str, Any] = {"config": case.config if config is None else config}
    if case.sequence == "own":
        ours["sequence_parallel"] = True
    tp: dict[str, Any] = {}
    if case.tp > 1:
        assert isinstance(model, PlainLM) and mesh.mesh_dim_names is not None
        tp = {} if case.head_in_plan else {"tp": mesh["tp"]}
        _parallelize(model, case, mesh["tp"])
        mesh = mesh[mesh.mesh_dim_names[:-1]]
    if case.cp > 1:
        every = init_device_mesh(device(), (mesh.size() // case.cp, case.cp), mesh_dim_names=("dp", "cp"))
        for layer in _layers(model):
            layer.context = every["cp"]  # type: ignore[assignment]
    if case.offload:
        settings["offload_policy"] = CPUOffloadPolicy(pin_memory=False)
    if case.entry == "before":
        shard_head(model, mesh, **tp, **ours)
    for layer in _layers(model):
        fully_shard(layer, mesh=mesh, **settings)
    if case.entry == "between":
        shard_head(model, mesh, **tp, **ours)
    if case.entry == "adopt, own group":
        fully_shard(model.lm_head, mesh=mesh, **settings)
    if case.entry == "adopt, norm and head":  # as accelerate does, which has the root reshard too
        settings["reshard_after_forward"] = True
        fully_shard([_norm(model), model.lm_head], mesh=mesh, **settings)  # type: ignore[list-item]
    if case.entry == "adopt, tied group":
        fully_shard([model.get_input_embeddings(), _norm(model), model.lm_head], mesh=mesh, **settings)  # type: ignore[operator,list-item]
    fully_shard(model, mesh=mesh, **settings)
    if case.entry == "after":
        shard_head(model, mesh, **ours)
    if case.entry.startswith("adopt"):
        adopt(model, **ours)
    if case.divide_factor is not None:
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(case.divide_factor)
                module.set_force_sum_reduction_for_comms(True)  # gloo cannot scale while it sums


def reader(case: Case) -> int:
    """Whose data this rank has; those with parts of one model or slices of one sequence share it."""
    return dist.get_rank() // (case.tp * case.cp)


def by_reader(own: float, case: Case) -> list[float]:
    """The losses of all ranks: slices of a sequence add up, and ranks that have all of it say the same."""
    losses: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(losses, own)
    parts = case.tp * case.cp
    grouped = [losses[first : first + parts] for first in range(0, len(losses), parts)]
    if case.sequence == "own" or case.cp > 1:
        return [sum(group) for group in grouped]
    assert all(loss == group[0] for group in grouped for loss in group)
    return [group[0] for group in grouped]


def full_weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().full_tensor().cpu().clone() for name, p in model.named_parameters()}  # type: ignore[operator]


def assert_equal(actual: Record, expected: Record) -> None:
    torch.testing.assert_close(torch.tensor(actual.losses), torch.tensor(expected.losses), rtol=1e-5, atol=0)
    torch.testing.assert_close(torch.tensor(actual.norms), torch.tensor(expected.norms), rtol=1e-5, atol=0)
    assert actual.weights.keys() == expected.weights.keys()
    floor = 1e-6 * float(torch.stack([w.norm() for w in expected.weights.values()]).norm())
    for name, weight in expected.weights.items():
        error = float((actual.weights[name] - weight).norm()) / max(float(weight.norm()), floor)
        assert error < 1e-4, f"{name}: {error:.1e}"


class LargestTensor(TorchDispatchMode):
    """The size, as a number of fp32 elements, of the largest plain tensor that any operation made in training."""

    elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and not isinstance(result, DTensor):
            self.elements = max(self.elements, result.nbytes // torch.float32.itemsize)
        return result
