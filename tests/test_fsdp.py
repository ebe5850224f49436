"""FSDP2 training with a vocabulary-sharded head against the plain model in a single process."""

import copy
import io
import logging
import random
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from ranks import RankPool
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_module, distribute_tensor
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
from cce_dist.fsdp import adopt, private, shard_head

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
        seen = torch.arange(first, first + own)[:, None] >= torch.arange(every)
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
    past_head: bool = False
    """The first loss of a backward is of logits made of the head's weight, past its call."""

    @property
    def config(self) -> CCEConfig:
        changes: dict[str, Any] = {"vocab_parallel_size": self.vocab_parallel}
        if self.past_head:
            changes["materialize"] = "warn"
        return EXACT.model_copy(update=changes)

    def __str__(self) -> str:
        changed = {k: v for k, v in vars(self).items() if v != getattr(Case, k)}
        return ",".join(f"{k}={v}" for k, v in changed.items()) or "default"


def _build(case: Case) -> nn.Module:
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


def _batch(case: Case, step: int, micro: int, rank: int) -> tuple[Tensor, Tensor]:
    """Another length on every rank, and another share of ignored labels."""
    generator = torch.Generator().manual_seed(1000 * step + 100 * micro + rank)
    shape = (2, (4 + (rank + step) % 3) * max(case.cp, case.tp if case.sequence else 1))
    ids = torch.randint(min(case.vocab, case.input_vocab), shape, generator=generator)
    labels = torch.randint(case.vocab, shape, generator=generator)
    labels[torch.rand(shape, generator=generator) < 0.2 * rank] = -100
    labels[0, 0] = 1
    return ids, labels


def _loss(model: nn.Module, case: Case, ids: Tensor, labels: Tensor, past_head: bool = False) -> Tensor:
    if not isinstance(model, PlainLM):
        return model(input_ids=ids, labels=labels, shift_labels=labels).loss
    valid = (labels != -100).sum()
    if dist.is_initialized() and case.cp > 1:
        ids, labels = _slice(ids, case.cp), _slice(labels, case.cp)
    if dist.is_initialized() and case.sequence == "own":
        labels = _slice(labels, case.tp)
    logits = model(ids, past_head=past_head)
    return F.cross_entropy(logits.view(-1, logits.shape[-1]), labels.reshape(-1), reduction="sum") / valid


def _slice(x: Tensor, parts: int) -> Tensor:
    """This rank's part of the sequence."""
    return x.chunk(parts, dim=1)[dist.get_rank() % parts]


def _losses(model: nn.Module, case: Case, step: int, micro: int, rank: int) -> Tensor:
    """The loss of a micro-batch; of two forwards with other data, weighted, where a case has two losses."""
    total = _loss(model, case, *_batch(case, step, micro, rank), past_head=case.past_head)
    for extra in range(1, case.losses_per_backward):
        total = total + 0.5 * _loss(model, case, *_batch(case, step, 50 + micro, rank + extra))
    return total / case.micro_batches


@dataclass
class Record:
    losses: list[list[float]]  # by step, by rank with data of its own
    norms: list[float]
    weights: dict[str, Tensor]


def _finish_step(model: nn.Module, optimizer: torch.optim.Optimizer) -> float:
    norm = nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    optimizer.step()
    optimizer.zero_grad()
    return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)


def _train_plain(case: Case, world: int) -> Record:
    model = _build(case)
    readers = world // (case.tp * case.cp)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    record = Record([], [], {})
    for step in range(STEPS):
        losses = [0.0] * readers
        for micro in range(case.micro_batches):
            for rank in range(readers):
                loss = _losses(model, case, step, micro, rank)
                (loss / (case.divide_factor or readers)).backward()
                losses[rank] += float(loss.detach())
        record.losses.append(losses)
        record.norms.append(_finish_step(model, optimizer))
    record.weights = {name: p.detach() for name, p in model.named_parameters()}
    return record


def _mesh(case: Case) -> DeviceMesh:
    """FSDP's and, in a case with tp, beside it tensor parallelism's."""
    _clear_sharding_prop_cache()  # it finds meshes by equality: those of earlier cases, whose process groups are gone
    ranks = case.mesh or (dist.get_world_size() // case.tp,)
    names = ("replicate", "shard") if len(ranks) == 2 else ("shard",)
    if case.tp > 1:
        return init_device_mesh("cpu", (*ranks, case.tp), mesh_dim_names=(*names, "tp"))
    return init_device_mesh("cpu", ranks, mesh_dim_names=names)


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


def _shard(model: nn.Module, case: Case, mesh: DeviceMesh, config: CCEConfig | None = None, **settings: Any) -> None:
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
        every = init_device_mesh("cpu", (mesh.size() // case.cp, case.cp), mesh_dim_names=("dp", "cp"))
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


def _train_sharded(case: Case) -> Record:
    model, rank = _build(case), _reader(case)
    _shard(model, case, _mesh(case))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=case.fused, foreach=not case.fused)
    record = Record([], [], {})
    for step in range(STEPS):
        own = 0.0
        for micro in range(case.micro_batches):
            if not case.sync_every_micro_batch:
                assert isinstance(model, FSDPModule)
                model.set_requires_gradient_sync(micro == case.micro_batches - 1)
            loss = _losses(model, case, step, micro, rank)
            (loss * case.cp).backward()  # FSDP's average is over the slices too
            own += float(loss.detach())
        record.losses.append(_by_reader(own, case))
        record.norms.append(_finish_step(model, optimizer))
    record.weights = _full_weights(model)
    return record


def _reader(case: Case) -> int:
    """Whose data this rank has; those with parts of one model or slices of one sequence share it."""
    return dist.get_rank() // (case.tp * case.cp)


def _by_reader(own: float, case: Case) -> list[float]:
    """The losses of all ranks: slices of a sequence add up, and ranks that have all of it say the same."""
    losses: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(losses, own)
    parts = case.tp * case.cp
    grouped = [losses[first : first + parts] for first in range(0, len(losses), parts)]
    if case.sequence == "own" or case.cp > 1:
        return [sum(group) for group in grouped]
    assert all(loss == group[0] for group in grouped for loss in group)
    return [group[0] for group in grouped]


def _full_weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().full_tensor().clone() for name, p in model.named_parameters()}  # type: ignore[operator]


def _assert_equal(actual: Record, expected: Record) -> None:
    torch.testing.assert_close(torch.tensor(actual.losses), torch.tensor(expected.losses), rtol=1e-5, atol=0)
    torch.testing.assert_close(torch.tensor(actual.norms), torch.tensor(expected.norms), rtol=1e-5, atol=0)
    assert actual.weights.keys() == expected.weights.keys()
    floor = 1e-6 * float(torch.stack([w.norm() for w in expected.weights.values()]).norm())
    for name, weight in expected.weights.items():
        error = float((actual.weights[name] - weight).norm()) / max(float(weight.norm()), floor)
        assert error < 1e-4, f"{name}: {error:.1e}"


FAST = [
    (4, Case(tp=2, divide_factor=1.0)),
    (4, Case(tp=2, tied=True, vocab=5, micro_batches=2)),
    (4, Case(tp=2, entry="adopt", head_in_plan=True, sequence="gathered")),
    (4, Case(tp=2, sequence="own", micro_batches=2, sync_every_micro_batch=False)),
    (4, Case(vocab_parallel=2, losses_per_backward=2)),
    (4, Case(model="gemma", tied=True, entry="adopt", vocab_parallel=2, micro_batches=2)),
    (4, Case(cp=2)),
    (2, Case(model="llama")),
    (4, Case(entry="after", micro_batches=2, sync_every_micro_batch=False)),
    (4, Case(model="llama", mesh=(2, 2), entry="adopt, norm and head", micro_batches=2)),
    (4, Case(model="gemma", tied=True, losses_per_backward=2)),
    (4, Case(vocab=5, tied=True, mesh=(2, 2), entry="adopt")),
    (2, Case(entry="between", divide_factor=1.0)),
    (2, Case(entry="adopt, norm and head", losses_per_backward=2)),
    (2, Case(past_head=True)),
    (4, Case(past_head=True, tied=True, entry="adopt", mesh=(2, 2), losses_per_backward=2)),
    (4, Case(past_head=True, tp=2, losses_per_backward=2)),
]
FULL = [
    (2, Case(past_head=True, entry="adopt, norm and head", divide_factor=1.0, micro_batches=2)),
    (4, Case(past_head=True, vocab_parallel=2, vocab=5, losses_per_backward=2)),
    (2, Case(past_head=True, entry="adopt, own group", offload=True)),
    (4, Case(past_head=True, tp=2, sequence="own")),
    (2, Case(tp=2)),  # one shard
    (4, Case(tp=4, vocab=5)),
    (4, Case(tp=2, mesh=(2, 1), entry="before")),  # replicas of one shard
    (4, Case(tp=2, mesh=(1, 2), entry="adopt", head_in_plan=True)),
    (4, Case(tp=2, entry="after", head_in_plan=True, losses_per_backward=2)),
    (4, Case(tp=2, entry="between", head_in_plan=True, vocab_parallel=2)),
    (4, Case(tp=2, vocab_parallel=2, tied=True, micro_batches=2, sync_every_micro_batch=False)),
    (4, Case(tp=2, sequence="own", vocab_parallel=2, entry="adopt", head_in_plan=True)),
    (4, Case(tp=2, sequence="gathered", fused=True)),
    (4, Case(vocab_parallel=1, vocab=5)),
    (2, Case(vocab_parallel=1, tied=True)),
    (4, Case(vocab_parallel=2, vocab=5, divide_factor=1.0)),
    (4, Case(mesh=(2, 2), vocab_parallel=1, micro_batches=2, sync_every_micro_batch=False)),
    (4, Case(mesh=(1, 4), vocab_parallel=2, tied=True, entry="after")),
    (4, Case(vocab_parallel=2, offload=True, entry="adopt, own group")),
    (4, Case(cp=4, tied=True, micro_batches=2)),
    (4, Case(cp=2, mesh=(2, 2), entry="adopt", vocab_parallel=1)),
    (2, Case(fused=True)),
    (4, Case(fused=True, mesh=(2, 2), entry="adopt", micro_batches=2, sync_every_micro_batch=False)),
    (4, Case(vocab=5)),  # 2, 2, 1 and 0 rows
    (2, Case(vocab=5, entry="adopt", micro_batches=2, sync_every_micro_batch=False)),
    (4, Case(mesh=(2, 2), micro_batches=2, sync_every_micro_batch=False, losses_per_backward=2)),
    (4, Case(mesh=(2, 2), entry="adopt", divide_factor=1.0)),
    (4, Case(model="llama", tied=True, entry="adopt, tied group", losses_per_backward=2)),
    (4, Case(model="llama", tied=True, entry="after", mesh=(2, 2))),
    (2, Case(model="gemma", tied=True, entry="adopt, tied group", micro_batches=2)),
    (3, Case(model="llama", entry="adopt, own group", micro_batches=3)),
    (1, Case(model="llama", tied=True)),
    (2, Case(entry="adopt, own group", offload=True)),
]


@pytest.mark.parametrize(
    ("world", "case"),
    [pytest.param(world, case, id=f"{world} ranks,{case}") for world, case in FAST]
    + [pytest.param(world, case, id=f"{world} ranks,{case}", marks=pytest.mark.full) for world, case in FULL],
)
def test_clipped_adamw_steps_equal_the_plain_model(ranks: RankPool, world: int, case: Case) -> None:
    expected = _train_plain(case, world)
    for record in ranks.run(world, _train_sharded, case, timeout=SLOW_START):
        _assert_equal(record, expected)


class _LargestTensor(TorchDispatchMode):
    """The size, as a number of fp32 elements, of the largest plain tensor that any operation made in training."""

    elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and not isinstance(result, DTensor):
            self.elements = max(self.elements, result.nbytes // torch.float32.itemsize)
        return result


def _largest_tensor(case: Case) -> int:
    model = _build(case)
    _shard(model, case, _mesh(case))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    watch = _LargestTensor()
    for step in range(2):
        with watch:
            _losses(model, case, step, 0, _reader(case)).backward()
            _finish_step(model, optimizer)
    assert private.holding_group(model, model.lm_head) is None or case.entry == "stock"  # type: ignore[arg-type]
    return watch.elements


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    ("changes", "share"),
    [
        ({}, 1 / 2),
        ({"entry": "adopt"}, 1 / 2),
        ({"tp": 2}, 1 / 2),
        ({"vocab_parallel": 2}, 2 / 3),  # half of the rows, by its own choice
    ],
    ids=str,
)
def test_no_rank_ever_holds_the_classifier_in_training(
    ranks: RankPool, changes: dict[str, Any], share: float, tied: bool
) -> None:
    # Untied, FSDP gathers the embedding: that one has few rows here.
    vocab = 4001
    case = Case(vocab=vocab, tied=tied, input_vocab=vocab if tied else 50, **changes)
    assert max(ranks.run(4, _largest_tensor, case)) < vocab * HIDDEN * share


def test_the_watch_sees_the_classifier_of_stock_fsdp(ranks: RankPool) -> None:
    assert max(ranks.run(2, _largest_tensor, Case(vocab=4001, input_vocab=50, entry="stock"))) >= 4001 * HIDDEN


def _evaluate(case: Case) -> dict[str, Any]:
    model = _build(case)
    plain = copy.deepcopy(model).eval()
    _shard(model, case, _mesh(case))
    ids, labels = _batch(case, 0, 0, _reader(case))
    prompt = ids[:, :3]
    model.eval()
    with torch.no_grad():
        logits, expected = _logits(model, ids), _logits(plain, ids)
    if case.sequence == "own":
        expected = _slice(expected, case.tp)
    same_tokens = True
    if not isinstance(model, PlainLM):
        tokens = model.generate(prompt, max_new_tokens=4, do_sample=False, synced_gpus=True)  # type: ignore[operator]
        same_tokens = torch.equal(tokens, plain.generate(prompt, max_new_tokens=4, do_sample=False))  # type: ignore[operator]
    whole = replace(case, sequence="gathered" if case.sequence else "")
    expected_loss = float(_loss(plain, whole, ids, labels))
    model.train()
    loss = _loss(model, case, ids, labels)
    loss.backward()
    whole_loss = _by_reader(float(loss.detach()), case)[_reader(case)]
    return {
        "logits": float((logits - expected).norm() / expected.norm()),
        "tokens": same_tokens,
        "loss": abs(whole_loss / expected_loss - 1),
    }


def _logits(model: nn.Module, ids: Tensor) -> Tensor:
    return model(ids) if isinstance(model, PlainLM) else model(input_ids=ids).logits


@pytest.mark.parametrize(
    ("world", "case"),
    [
        (2, Case(model="llama")),
        (4, Case(model="llama", tied=True, mesh=(2, 2), entry="adopt, tied group")),
        (4, Case(model="llama", tied=True, entry="adopt", vocab_parallel=2)),
        (4, Case(tp=2)),
        (4, Case(tp=2, entry="adopt", head_in_plan=True, sequence="gathered")),
        (4, Case(tp=2, sequence="own")),
        pytest.param(4, Case(model="gemma", tied=True, entry="after"), marks=pytest.mark.full),
        pytest.param(2, Case(model="llama", entry="adopt, norm and head"), marks=pytest.mark.full),
    ],
    ids=str,
)
def test_evaluation_and_generation_are_those_of_the_plain_model_and_training_goes_on(
    ranks: RankPool, world: int, case: Case
) -> None:
    for result in ranks.run(world, _evaluate, case, timeout=SLOW_START):
        assert result["tokens"] and result["logits"] < 1e-6 and result["loss"] < 1e-5


def _real_logits_norms(case: Case) -> list[tuple[float, float]]:
    """Gradient norms, ours and the plain model's, of a loss that also needs real logits in training."""

    def loss(model: nn.Module, case: Case, step: int, rank: int) -> Tensor:
        entropy = torch.logsumexp(model(_batch(case, step, 0, rank)[0]), dim=-1).sum()
        return entropy + _losses(model, case, step, 1, rank)

    model, plain, rank, readers = _build(case), _build(case), _reader(case), dist.get_world_size() // case.tp
    _shard(model, case, _mesh(case), case.config.model_copy(update={"materialize": "warn"}))
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-3) for m in (model, plain)]
    norms = []
    whole = replace(case, sequence="gathered" if case.sequence else "")
    for step in range(2):
        loss(model, case, step, rank).backward()
        for other in range(readers):
            (loss(plain, whole, step, other) / readers).backward()
        norms.append((_finish_step(model, optimizers[0]), _finish_step(plain, optimizers[1])))
    return norms


@pytest.mark.filterwarnings("ignore::cce_dist.lazy_logits.MaterializedLogitsWarning")
@pytest.mark.parametrize(
    ("world", "case"),
    [
        (2, Case()),
        (2, Case(entry="adopt, norm and head")),
        (4, Case(tied=True, mesh=(2, 2), entry="adopt")),
        (4, Case(vocab_parallel=2)),
        (4, Case(tp=2, tied=True)),
        (4, Case(tp=2, sequence="own")),
    ],
    ids=str,
)
def test_real_logits_in_training_have_the_gradient_of_the_plain_model(ranks: RankPool, world: int, case: Case) -> None:
    for norms in ranks.run(world, _real_logits_norms, case):
        for ours, plain in norms:
            assert abs(ours / plain - 1) < 1e-5


def _adopted_late(case: Case) -> Record:
    """A step of stock FSDP2 and an evaluation, then the head is adopted."""
    model, rank = _build(case), dist.get_rank()
    _shard(model, replace(case, entry="stock"), _mesh(case))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    record = Record([], [], {})
    for step in range(STEPS):
        if step == 1:
            with torch.no_grad():
                model(_batch(case, step, 0, rank)[0])
            adopt(model, config=EXACT)
        loss = _losses(model, case, step, 0, rank)
        loss.backward()
        record.losses.append(_by_reader(float(loss.detach()), case))
        record.norms.append(_finish_step(model, optimizer))
    record.weights = _full_weights(model)
    return record


@pytest.mark.parametrize("tied", [False, True])
def test_a_model_can_be_adopted_in_the_middle_of_a_run(ranks: RankPool, tied: bool) -> None:
    case = Case(tied=tied)
    expected = _train_plain(case, 2)
    for record in ranks.run(2, _adopted_late, case):
        _assert_equal(record, expected)


def _mixed_precision(case: Case) -> list[float]:
    """Relative distance of our bf16 run's weights, and of stock FSDP2's, from fp32 weights after the same steps."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    finals = []
    for entry, settings in ((case.entry, {"mp_policy": policy}), ("stock", {"mp_policy": policy}), ("stock", {})):
        model = _build(case)
        _shard(model, replace(case, entry=entry), _mesh(case), **settings)
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        for step in range(3):
            for micro in range(2):
                assert isinstance(model, FSDPModule)
                model.set_requires_gradient_sync(micro == 1)
                _losses(model, case, step, micro, _reader(case)).backward()
            _finish_step(model, optimizer)
        finals.append(torch.cat([w.flatten() for w in _full_weights(model).values()]))
    return [float((final - finals[2]).norm() / finals[2].norm()) for final in finals[:2]]


@pytest.mark.parametrize(
    "case",
    [
        Case(entry="before"),
        Case(entry="adopt, own group"),
        Case(tied=True, entry="adopt"),
        Case(tied=True, vocab_parallel=1),
        Case(tp=2, head_in_plan=True, entry="adopt"),
    ],
    ids=str,
)
def test_mixed_precision_is_as_close_to_fp32_as_stock_fsdp(ranks: RankPool, case: Case) -> None:
    for ours, stock in ranks.run(2, _mixed_precision, case):
        assert 0 < ours < 1.5 * stock


def _steps_between_checkpoints(case: Case, read: str, write: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What was read from one folder, if given, and what is written into another after an optimizer step."""
    torch.manual_seed(dist.get_world_size())
    model = _build(case)
    _shard(model, case, _mesh(case))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    loaded = {}
    if read:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        model_state, optimizer_state = get_state_dict(model, optimizer)
        state = {"model": model_state, "optimizer": optimizer_state}
        dcp.load(state, checkpoint_id=read)
        set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        loaded = _full_weights(model) | _full_moments(model, optimizer)
    _losses(model, case, 0, 0, _reader(case)).backward()
    _finish_step(model, optimizer)
    model_state, optimizer_state = get_state_dict(model, optimizer)
    dcp.save({"model": model_state, "optimizer": optimizer_state}, checkpoint_id=write)
    return loaded, _full_weights(model) | _full_moments(model, optimizer)


def _full_moments(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {
        f"{name} moment": optimizer.state[p]["exp_avg"].full_tensor().clone() for name, p in model.named_parameters()
    }


@pytest.mark.parametrize(
    ("four", "two", "four_again"),
    [
        (Case(model="llama"), Case(model="llama", entry="adopt"), Case(model="llama", entry="stock")),
        (
            Case(model="llama", tied=True, mesh=(2, 2)),
            Case(model="llama", tied=True, entry="after"),
            Case(model="llama", tied=True, vocab_parallel=2),
        ),
        (Case(entry="stock"), Case(vocab_parallel=1), Case(tp=2)),
        (Case(tp=2, entry="adopt", head_in_plan=True), Case(tp=2), Case(mesh=(2, 2), vocab_parallel=1)),
    ],
    ids=str,
)
def test_checkpoints_go_from_four_ranks_to_two_and_back_to_four(
    ranks: RankPool, tmp_path: Path, four: Case, two: Case, four_again: Case
) -> None:
    folders = [str(tmp_path / name) for name in ("four", "two", "four_again")]
    runs = [(4, four, "", folders[0]), (2, two, folders[0], folders[1]), (4, four_again, folders[1], folders[2])]
    written: dict[str, Tensor] = {}
    for world, *arguments in runs:
        results = ranks.run(world, _steps_between_checkpoints, *arguments, timeout=SLOW_START)
        for loaded, _ in results:
            assert loaded.keys() == written.keys()
            for name, value in written.items():
                assert torch.equal(loaded[name], value), name
        written = results[0][1]


def _pretrained(case: Case, read: str, write: str) -> bool:
    """A model from the folder that `save_pretrained` wrote, sharded, and written as it would have been unsharded."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(read)
    _shard(model, case, _mesh(case))
    _losses(model, case, 0, 0, dist.get_rank()).backward()
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    expected = set(_build(case).state_dict()) if dist.get_rank() == 0 else set()
    as_expected = set(state) == expected
    if dist.get_rank() == 0:
        AutoModelForCausalLM.from_config(model.config).save_pretrained(write, state_dict=state)
    return as_expected


@pytest.mark.parametrize("tied", [False, True])
def test_from_pretrained_reads_what_was_written_and_the_other_way_round(
    ranks: RankPool, tmp_path: Path, tied: bool
) -> None:
    from transformers import AutoModelForCausalLM

    case = Case(model="llama", tied=tied, mesh=(2, 2), vocab_parallel=1)
    plain: Any = _build(case)
    plain.save_pretrained(tmp_path / "plain")
    arguments = (case, str(tmp_path / "plain"), str(tmp_path / "ours"))
    assert all(ranks.run(4, _pretrained, *arguments, timeout=SLOW_START))
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "ours").state_dict()
    assert read.keys() == plain.state_dict().keys()
    assert all(torch.equal(read[name], value) for name, value in plain.state_dict().items())


def _full_state(case: Case) -> bool:
    model = _build(case)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    _shard(model, case, _mesh(case))
    _load_full(model, case)
    _losses(model, case, 0, 0, dist.get_rank()).backward()
    written = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
    expected = _build(case).state_dict()
    return written.keys() == expected.keys() and all(torch.equal(written[name], expected[name]) for name in expected)


def _load_full(model: nn.Module, case: Case) -> None:
    """The plain model's state dict from rank 0, as after `from_pretrained` there."""
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(model, _build(case).state_dict() if dist.get_rank() == 0 else {}, options=options)


@pytest.mark.parametrize("entry", ["before", "adopt"])
@pytest.mark.parametrize("tied", [False, True])
def test_the_full_state_dict_is_that_of_the_plain_model(ranks: RankPool, entry: str, tied: bool) -> None:
    assert all(ranks.run(2, _full_state, Case(model="llama", tied=tied, entry=entry), timeout=SLOW_START))


def _meta(case: Case) -> tuple[bool, float]:
    with torch.device("meta"):
        model = _build(case)
    _shard(model, case, _mesh(case))
    on_meta = all(p.is_meta for p in model.parameters())
    model.to_empty(device="cpu")
    _load_full(model, case)
    return on_meta, float(_losses(model, case, 0, 0, _reader(case)))


@pytest.mark.parametrize(
    ("world", "case"), [(2, Case()), (2, Case(tied=True)), (4, Case(tp=2)), (4, Case(vocab_parallel=2))], ids=str
)
def test_a_model_built_on_the_meta_device_trains_after_loading(ranks: RankPool, world: int, case: Case) -> None:
    expected = _train_plain(case, world).losses[0]
    for rank, (on_meta, loss) in enumerate(ranks.run(world, _meta, case)):
        assert on_meta and abs(loss / expected[rank // case.tp] - 1) < 1e-5


def _saved_and_copied(case: Case) -> list[str]:
    """What saving and copying the sharded modules says; the state dict is saved and read again."""
    model = _build(case)
    _shard(model, case, _mesh(case))
    _losses(model, case, 0, 0, _reader(case)).backward()
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    for name, value in torch.load(file, weights_only=False).items():
        assert torch.equal(value.to_local(), model.state_dict()[name].to_local()), name
    texts = []
    with pytest.raises(TypeError, match="cannot be copied") as caught:
        copy.deepcopy(model.lm_head)
    texts.append(str(caught.value))
    for module in (model.lm_head, model.embed) if case.tied else (model.lm_head,):
        with pytest.raises(TypeError, match="neither be pickled") as caught:
            torch.save(module, io.BytesIO())
        texts.append(str(caught.value))
    return texts


@pytest.mark.parametrize("case", [Case(), Case(tied=True)], ids=str)
def test_state_dicts_can_be_saved_and_modules_say_that_they_cannot(ranks: RankPool, case: Case) -> None:
    for texts in ranks.run(2, _saved_and_copied, case):
        assert len(texts) == 2 + case.tied and all("before" in text for text in texts)


def _logits_on_one_rank(alone: int) -> tuple[str, float]:
    """What a rank is told that wants real logits which no other wants, and after how many seconds."""
    group = dist.new_group(timeout=timedelta(seconds=3))
    model = PlainLM(103, tied=False).eval()
    shard_head(model, DeviceMesh.from_group(group, "cpu", mesh_dim_names=("shard",)), config=EXACT)
    hidden = torch.randn(2, 4, HIDDEN)
    with torch.no_grad():
        model.lm_head(hidden)
        if dist.get_rank() != alone:
            return "", 0.0
        start = time.monotonic()
        with pytest.raises(RuntimeError, match="collective over ranks") as caught:
            model.lm_head(hidden)
    return str(caught.value), time.monotonic() - start


@pytest.mark.parametrize("alone", [0, 1])
def test_logits_that_one_rank_alone_wants_are_an_error_within_the_groups_timeout(ranks: RankPool, alone: int) -> None:
    text, seconds = ranks.run(2, _logits_on_one_rank, alone)[alone]
    assert "the logits of a classifier that FSDP2 shards are collective over ranks [0, 1]" in text
    assert ("Ranks 1 failed", "from rank 0")[alone] in text and 2 < seconds < 10


def _what_entering_leaves_behind(entry: str) -> tuple[bool, list[str]]:
    """Whether random numbers go on as if nothing had been, and what was logged."""
    model, mesh, case = _build(Case()), _mesh(Case()), Case(entry=entry)
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("cce_dist").addHandler(handler)
    before = torch.random.get_rng_state(), random.getstate()
    _shard(model, case, mesh)
    same = torch.equal(torch.random.get_rng_state(), before[0]) and random.getstate() == before[1]
    logging.getLogger("cce_dist").removeHandler(handler)
    return same, lines


@pytest.mark.parametrize("entry", ["before", "adopt"])
def test_sharding_takes_no_random_numbers_and_says_once_that_it_is_active(ranks: RankPool, entry: str) -> None:
    (same, lines), (others_same, others_lines) = ranks.run(2, _what_entering_leaves_behind, entry)
    assert same and others_same
    assert others_lines == []
    assert lines == [
        "cce_dist is active: FSDP2, gradient=exact, 103 vocabulary rows over 2 rank(s), 52 of them on this one"
    ]


def _attributes_inside_a_forward(materialize: str) -> tuple[Any, ...]:
    """What code in the body sees of the head's weight, the largest tensor then, and what comes of computing with it."""
    case = Case(vocab=4001, input_vocab=50)
    model = _build(case)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    _shard(model, case, _mesh(case), EXACT.model_copy(update={"materialize": materialize}), mp_policy=policy)
    seen: list[Any] = []

    def read(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        weight = model.lm_head.weight
        assert weight is model.lm_head.weight
        seen.append((weight.dtype, weight.shape, weight.device.type))  # type: ignore[union-attr]

    model.norm.register_forward_pre_hook(read)
    watch = _LargestTensor()
    with watch:
        _losses(model, case, 0, 0, _reader(case)).backward()
    assert isinstance(model.lm_head.weight, DTensor)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            _losses(model, replace(case, past_head=True), 0, 0, _reader(case)).backward()
            said = "; ".join(str(warning.message) for warning in caught)
            assert isinstance(model.lm_head.weight, DTensor)
        except RuntimeError as error:
            said = str(error)
    with torch.no_grad():
        whole = model(_batch(case, 0, 0, 0)[0], past_head=True)
        real = model.eval()(_batch(case, 0, 0, 0)[0])
    return *seen[0], watch.elements, said, float((whole - real).norm() / real.norm())


@pytest.mark.parametrize(("materialize", "says"), [("warn", "is gathered on every rank"), ("raise", "forbids")])
def test_reading_the_dtype_of_the_heads_weight_gathers_nothing_and_computing_with_it_says_so(
    ranks: RankPool, materialize: str, says: str
) -> None:
    for dtype, shape, device, elements, said, error in ranks.run(2, _attributes_inside_a_forward, materialize):
        assert (dtype, shape, device) == (torch.bfloat16, (4001, HIDDEN), "cpu")
        assert elements < 0.6 * 4001 * HIDDEN
        assert says in said and "test_fsdp.py" in said and error < 1e-6


class ScaledLinear(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2


def _refusals() -> list[str]:
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("dp",))

    def plain(**changes: Any) -> nn.Module:
        model = PlainLM(11, tied=False)
        for name, module in changes.items():
            setattr(model, name, module)
        return model

    def twice() -> None:
        model = plain()
        shard_head(model, mesh)
        shard_head(model, mesh)

    def shared_with_a_linear() -> None:
        model = plain(norm=nn.Linear(HIDDEN, 11))
        model.norm.weight = model.lm_head.weight  # type: ignore[union-attr]
        shard_head(model, mesh)

    def column_parallel() -> None:
        model = plain()
        weight = distribute_tensor(model.lm_head.weight, mesh, [Shard(1)])  # type: ignore[union-attr,arg-type]
        model.lm_head.weight = nn.Parameter(weight)  # type: ignore[union-attr]
        adopt(model)

    def unmanaged() -> None:
        model = plain()
        weight = distribute_tensor(model.lm_head.weight, mesh, [Shard(0)])  # type: ignore[union-attr,arg-type]
        model.lm_head.weight = nn.Parameter(weight)  # type: ignore[union-attr]
        adopt(model)

    both = init_device_mesh("cpu", (1, 2), mesh_dim_names=("shard", "tp"))

    def replicated_over_tp() -> None:
        model = plain()
        distribute_module(model.lm_head, both["tp"])  # type: ignore[arg-type]
        fully_shard(model, mesh=both["shard"])
        adopt(model)

    def tied_embedding_in_the_plan() -> None:
        model = PlainLM(11, tied=True)
        parallelize_module(model, both["tp"], {"embed": RowwiseParallel(input_layouts=Replicate())})
        model.lm_head.weight = model.embed.weight
        shard_head(model, both["shard"], tp=both["tp"])

    attempts: list[Callable[[], None]] = [
        lambda: shard_head(plain(), both["shard"], tp=both),
        lambda: shard_head(plain(), both["shard"], sequence_parallel=True),
        lambda: shard_head(PlainLM(11, tied=True), both["shard"], tp=both["tp"], sequence_parallel=True),
        replicated_over_tp,
        tied_embedding_in_the_plan,
        lambda: shard_head(plain(), both["shard"], tp=both["tp"], config=CCEConfig(vocab_parallel_size=1)),
        lambda: shard_head(nn.Sequential(nn.Linear(2, 2)), mesh),
        lambda: shard_head(plain(lm_head=ScaledLinear(HIDDEN, 11)), mesh),
        lambda: shard_head(plain(), mesh, head=nn.Linear(HIDDEN, 11)),
        lambda: shard_head(plain(), mesh, config=CCEConfig(vocab_parallel_size=3)),
        lambda: adopt(plain()),
        twice,
        shared_with_a_linear,
        column_parallel,
        unmanaged,
    ]
    texts = []
    for attempt in attempts:
        with pytest.raises((TypeError, ValueError)) as caught:
            attempt()
        texts.append(str(caught.value))
    return texts


def test_what_is_not_supported_is_refused_by_name(ranks: RankPool) -> None:
    parts = [
        "mesh['tp']",
        "pass tp",
        "untie",
        "replicates",
        "leave the embedding",
        "multiple of the 2 tensor-parallel ranks",
        "head=",
        "ScaledLinear",
        "submodule",
        "vocab_parallel_size",
        "prepare",
        "before",
        "Linear",
        "Shard(dim=1)",
        "fully_shard",
    ]
    for texts in ranks.run(2, _refusals):
        for text, part in zip(texts, parts, strict=True):
            assert part in text


def _ranks_apart(unequal_groups: bool) -> str:
    """What shard_head says on an HSDP mesh where rank 0 is in a group more, or has another setting."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    size = None
    if dist.get_rank() == 0 and unequal_groups:
        dist.new_group([0], use_local_synchronization=True)
    elif dist.get_rank() == 0:
        size = 1
    with pytest.raises(RuntimeError) as caught:
        shard_head(PlainLM(11, tied=False), mesh, config=EXACT.model_copy(update={"vocab_parallel_size": size}))
    return str(caught.value)


def test_ranks_in_unequal_numbers_of_groups_are_told_and_do_not_wait(ranks: RankPool) -> None:
    for text in ranks.run(4, _ranks_apart, True):
        assert "process groups" in text


def test_ranks_with_unequal_settings_are_told_and_do_not_wait(ranks: RankPool) -> None:
    for text in ranks.run(4, _ranks_apart, False):
        assert "do not agree" in text


@contextmanager
def _torch_that_moved_the_state() -> Iterator[None]:
    stock = private._holders
    private._holders = lambda fsdp_param: fsdp_param._renamed  # type: ignore[assignment]
    try:
        yield
    finally:
        private._holders = stock


def _unknown_torch() -> str:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = PlainLM(11, tied=False)
    with _torch_that_moved_the_state(), pytest.raises(RuntimeError) as caught:
        shard_head(model, mesh)
    assert not isinstance(model.lm_head.weight, DTensor)
    return str(caught.value)


def test_a_torch_with_another_fsdp_is_refused_before_anything_changes(ranks: RankPool) -> None:
    for text in ranks.run(2, _unknown_torch):
        assert torch.__version__ in text


def test_a_disabled_config_leaves_the_model_alone(ranks: RankPool) -> None:
    assert ranks.run(1, _disabled) == [nn.Linear]


def _disabled() -> type:
    model = PlainLM(11, tied=False)
    shard_head(model, init_device_mesh("cpu", (1,)), config=CCEConfig(enabled=False))
    return type(model.lm_head)


def _sequence_parallel_refusal() -> str:
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("dp", "tp"))
    head = nn.Linear(8, 20, bias=False)
    model = nn.Sequential(nn.Linear(8, 8), head)
    model.lm_head = head
    shard_head(model, mesh["dp"], tp=mesh["tp"], sequence_parallel=True, head=head)
    hidden = DTensor.from_local(torch.randn(2, 3, 8), mesh["tp"], [Replicate()], run_check=False)
    with pytest.raises(ValueError, match="every rank of tp would count the same tokens") as error:
        head(hidden)
    return str(error.value)


def test_replicated_hidden_states_of_a_sequence_parallel_head_are_refused(ranks: RankPool) -> None:
    """Counted by each rank of tp as its own, they would make the gradient as many times too large."""
    for text in ranks.run(2, _sequence_parallel_refusal):
        assert "sequence_parallel=True" in text
