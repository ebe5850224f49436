"""Training runs through DeepSpeed's engine, and the same steps in one process: what the tests of DeepSpeed share.

A case trains a tiny model for three AdamW steps of two micro-steps, with clipping, on ragged batches, and is compared
with the same steps of the plain model on all ranks' batches in one process.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import deepspeed
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from deepspeed.runtime.sequence_parallel import parallel_state_sp
from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload
from ranks import RankPool, device
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import cce_dist.deepspeed as cce_deepspeed
from cce_dist.heads.lazy import fused_evaluation

STEPS, ACCUMULATION = 3, 2  # an error of the state that steps leave shows in the third one's loss
CLIP = 0.5
ADAMW = {"lr": 1e-3, "weight_decay": 0.1, "eps": 1e-6}  # eps: rounding of a gradient that is almost zero is no update
HIDDEN = 32
EXACT = {"gradient": "exact"}


@dataclass(frozen=True)
class Case:
    """One training run."""

    vocab_size: int = 96
    stage: int = 3
    tied: bool = False
    biased: bool = False
    two_losses: bool = False
    of_logprobs: bool = False  # the second loss is a policy's: log-probabilities and an entropy bonus, in TRL's words
    trained: str = ""  # only parameters whose name contains this
    evaluates: bool = False
    checkpoints: bool = False  # recomputes activations, the reentrant way
    zero_init: bool = False
    groups: str = ""  # weight decay on matrices only, by a client's "optimizer" or by "model_parameters"
    sequence_parallel: int = 1
    tensor_parallel: int = 1
    mpu: bool = False  # tensor parallelism of the classifier alone, by an mpu; else AutoTP's, of the whole model
    marked: bool = False  # with an mpu: the client has cut the classifier itself
    section: dict[str, Any] | None = field(default_factory=lambda: dict(EXACT))
    zero: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)


class CausalLM(nn.Module):
    """A tiny Llama (or Phi, whose classifier has a bias), with a second loss on the same logits if asked for."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        kind, config = ("Phi", transformers.PhiConfig) if case.biased else ("Llama", transformers.LlamaConfig)
        self.lm = getattr(transformers, f"{kind}ForCausalLM")(
            config(
                vocab_size=case.vocab_size,
                hidden_size=HIDDEN,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=2,
                max_position_embeddings=32,
                tie_word_embeddings=case.tied,
            )
        )
        if case.checkpoints:
            self.lm.gradient_checkpointing_enable({"use_reentrant": True})
            self.lm.enable_input_require_grads()
        self.two_losses, self.of_logprobs = case.two_losses, case.of_logprobs

    def get_output_embeddings(self) -> nn.Module:
        return self.lm.get_output_embeddings()

    def forward(self, labels: Tensor, **inputs: Tensor) -> Tensor:
        output = self.lm(**inputs, labels=labels)
        return _policy_loss(output, labels) if self.of_logprobs else _loss(output, labels, self.two_losses)


def _policy_loss(output: Any, labels: Tensor) -> Tensor:
    log_p, valid = output.logits[:, :-1].log_softmax(-1), labels[:, 1:] != -100
    chosen = log_p.gather(-1, labels[:, 1:].clamp(min=0)[..., None])[..., 0]
    entropy = -(log_p.exp() * log_p).sum(-1)
    return output.loss - ((chosen + 0.3 * entropy) * valid).sum() / valid.sum()


def _loss(output: Any, labels: Tensor, two_losses: bool) -> Tensor:
    if isinstance(output, Tensor) or not two_losses:
        return output if isinstance(output, Tensor) else output.loss
    ahead = F.cross_entropy(output.logits[:, :-2].flatten(0, 1), labels[:, 2:].flatten())
    return output.loss + 0.3 * ahead


def make_model(case: Case) -> Any:
    """The model that the engine gets; AutoTP wants a model that it knows."""
    torch.manual_seed(1)
    model: Any = CausalLM(case)
    if case.tensor_parallel > 1 and not case.mpu:
        model = model.lm
    for name, parameter in model.named_parameters():
        parameter.requires_grad = case.trained in name
        if name.endswith("lm_head.bias"):
            nn.init.normal_(parameter)
    return model


def make_batch(case: Case, micro_step: int, rank: int) -> dict[str, Tensor]:
    """Ragged over ranks and micro-steps, a third of the labels ignored."""
    draws = torch.Generator().manual_seed(100 * micro_step + rank)
    ids = torch.randint(case.vocab_size, (2, 6 + (3 * rank + micro_step) % 7), generator=draws)
    labels = torch.where(torch.rand(ids.shape, generator=draws) < 0.3, -100, ids)
    return {"input_ids": ids.to(device()), "labels": labels.to(device())}


def data_rank(case: Case) -> int:
    """Which batches a rank gets: those of a tensor-parallel group are the same."""
    return dist.get_rank() // case.tensor_parallel


def make_config(case: Case) -> dict[str, Any]:
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": ACCUMULATION,
        "gradient_clipping": CLIP,
        "optimizer": {"type": "AdamW", "params": {**ADAMW, "torch_adam": True}},
        "zero_optimization": {"stage": case.stage, **case.zero},
        **case.config,
    }
    if case.tensor_parallel > 1 and not case.mpu:
        config["tensor_parallel"] = {"autotp_size": case.tensor_parallel}
    return config if case.section is None else {**config, "cce_dist": case.section}


def fresh_deepspeed() -> None:
    """DeepSpeed keeps groups and counters of an earlier case; and its shared-memory collectives need a compiler."""
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.comm.comm.cdb = None
    deepspeed.zero.Init.param_id = 0
    DeepSpeedZeRoOffload._register_deepspeed_module.__defaults__[0][0] = 0
    deepspeed.utils.groups._release_process_group_references()
    deepspeed.runtime.torch_autocast.TORCH_AUTOCAST_INITIALIZED = False


def make_engine(case: Case, prepare: Callable[[Any], Any] = lambda model: model) -> Any:
    """``prepare``: what is done to the model before."""
    fresh_deepspeed()
    config, mpu = make_config(case), None
    if case.sequence_parallel > 1:
        deepspeed.init_distributed("gloo")
        parallel_state_sp.initialize_sequence_parallel(case.sequence_parallel)
        mpu = parallel_state_sp
    if case.mpu:
        deepspeed.init_distributed("gloo")
        mpu = deepspeed.utils.groups
        mpu._init_tp_mesh_device(case.tensor_parallel)
    model = make_model(case)
    prepare(model)
    if case.zero_init:
        plain = model.state_dict()
        with deepspeed.zero.Init(config_dict_or_path=config):
            model = make_model(case)
        for name, parameter in model.named_parameters():
            with deepspeed.zero.GatheredParameters(parameter, modifier_rank=0):
                parameter.data.copy_(plain[name])
    if case.marked:
        weight = model.get_output_embeddings().weight
        weight.data = weight.data.chunk(case.tensor_parallel)[mpu.get_tensor_model_parallel_rank()].clone()
        weight.tensor_model_parallel = True
    parameters: Any = trained_parameters(case, model)
    what = {"model_parameters": parameters}
    if case.groups == "optimizer":
        what = {"optimizer": torch.optim.AdamW(parameters, **ADAMW)}
    return cce_deepspeed.initialize(model=model, config=config, mpu=mpu, **what)[0]


def trained_parameters(case: Case, model: nn.Module) -> list[Any]:
    """What an optimizer gets: parameters or groups of them."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not case.groups:
        return trained
    matrices, vectors = [p for p in trained if p.ndim > 1], [p for p in trained if p.ndim == 1]
    return [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]


def weights_of(engine: Any) -> dict[str, Tensor]:
    """All weights; under tensor parallelism those of this rank."""
    if engine.zero_optimization_stage() < 3:
        whole = engine.module.state_dict()
        return {name: whole[name].detach().float().cpu().clone() for name, _ in engine.module.named_parameters()}
    weights = {}
    for name, parameter in engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters(parameter):
            weights[name] = parameter.detach().float().cpu().clone()
    return weights


def take_steps(engine: Any, case: Case, micro_steps: range) -> list[float]:
    losses = []
    for micro_step in micro_steps:
        batch = make_batch(case, micro_step, data_rank(case))
        loss = _loss(engine(**batch), batch["labels"], case.two_losses)
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


def train(case: Case) -> dict[str, Any]:
    """What one rank sees of a run: its losses, the norms that DeepSpeed reports, the weights."""
    engine, rank = make_engine(case), data_rank(case)
    losses, norms, evaluated = [], [], []
    for micro_step in range(STEPS * ACCUMULATION):
        losses += take_steps(engine, case, range(micro_step, micro_step + 1))
        if micro_step % ACCUMULATION:
            norm = engine.get_global_grad_norm()
            norms.append(norm if norm is None else torch.as_tensor(norm).cpu())
            if case.evaluates:
                evaluated += _evaluate(engine, make_batch(case, 1000, rank))
    return {"losses": losses, "norms": norms, "evaluated": evaluated, "weights": weights_of(engine)}


def _evaluate(engine: Any, batch: dict[str, Tensor]) -> list[float]:
    """The loss through the stock classifier, and fused."""
    engine.eval()
    with torch.no_grad():
        stock = _loss(engine(**batch), batch["labels"], two_losses=False).item()
        with fused_evaluation(engine.module.get_output_embeddings()):
            fused = _loss(engine(**batch), batch["labels"], two_losses=False).item()
    engine.train()
    return [stock, fused]


def train_plain(case: Case, world: int) -> dict[str, Any]:
    """The same steps in one process: the mean of the ranks' losses, so of their gradients."""
    model = make_model(case)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained_parameters(case, model), **ADAMW)
    losses, norms, evaluated = [], [], []
    for micro_step in range(STEPS * ACCUMULATION):
        batches = [make_batch(case, micro_step, rank) for rank in range(world)]
        for_ranks = [_loss(model(**batch), batch["labels"], case.two_losses) for batch in batches]
        (torch.stack(for_ranks).mean() / ACCUMULATION).backward()
        losses.append([loss.item() for loss in for_ranks])
        if micro_step % ACCUMULATION:
            norms.append(float(nn.utils.clip_grad_norm_(trained, CLIP)))
            optimizer.step()
            optimizer.zero_grad()
            if case.evaluates:
                with torch.no_grad():
                    batches = [make_batch(case, 1000, rank) for rank in range(world)]
                    losses_of = [_loss(model(**batch), batch["labels"], two_losses=False) for batch in batches]
                    evaluated += 2 * [[loss.item() for loss in losses_of]]
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    return {"losses": losses, "norms": norms, "evaluated": evaluated, "weights": weights}


def assert_trains_as_one_process(pool: RankPool, world: int, case: Case) -> None:
    tensor = case.tensor_parallel
    expected, ranks = train_plain(case, world // tensor), pool.run(world, train, case, timeout=200)
    for rank, got in enumerate(ranks):
        data = rank // tensor
        assert got["losses"] == pytest.approx([step[data] for step in expected["losses"]], rel=1e-5)
        assert got["evaluated"] == pytest.approx([step[data] for step in expected["evaluated"]], rel=1e-5)
        reports = case.stage > 0 or (case.section or {}).get("vocab_parallel_size", 1) > 1
        if reports:  # stock stage 0 does not
            assert [float(norm) for norm in got["norms"]] == pytest.approx(expected["norms"], rel=1e-5)
    for first in range(0, world, tensor):
        weights = _join([got["weights"] for got in ranks[first : first + tensor]], expected["weights"])
        assert distance(weights, expected["weights"]) < 1e-5


def _join(parts: list[dict[str, Tensor]], whole: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights from the parts of tensor-parallel ranks, put together along the dimension that was split."""
    joined = {}
    for name, weight in whole.items():
        pieces = [part[name] for part in parts]
        split = [dim for dim in range(weight.ndim) if pieces[0].shape[dim] != weight.shape[dim]]
        for piece in pieces[:1] if split else pieces:  # what is replicated must be equal everywhere
            assert split or torch.equal(piece, pieces[0]), name
        joined[name] = torch.cat(pieces, split[0]) if split else pieces[0]
    return joined


def distance(got: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Largest relative difference of a tensor; the key biases of Phi have no gradient but noise, and are left out."""
    floor = 1e-6 * torch.stack([weight.norm() for weight in expected.values()]).norm()
    return max(
        float((got[name] - weight).norm() / torch.maximum(weight.norm(), floor))
        for name, weight in expected.items()
        if not name.endswith("k_proj.bias")
    )


class Meter(TorchDispatchMode):
    """The elements of the largest tensor made, and the elements that all-gathers deliver."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = self.gathered = 0

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = op(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.largest = max(self.largest, result.numel())
        if "allgather" in str(op):
            self.gathered += args[0].numel() if isinstance(args[0], Tensor) else 0
        return result


def measure_a_step(case: Case) -> dict[str, Any]:
    engine = make_engine(case)
    inputs = torch.randn(2, 8, HIDDEN, device=device()), torch.randint(case.vocab_size, (2, 8), device=device())
    with Meter() as meter:
        loss = engine(inputs_embeds=inputs[0], labels=inputs[1])
        engine.backward(loss)
    engine.step()
    return {"largest": meter.largest, "gathered": meter.gathered, "tables": case.vocab_size * HIDDEN}
