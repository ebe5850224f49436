"""Trains a decoder with a large vocabulary for some steps on all ranks: what the head costs a whole training step.

    torchrun --nproc-per-node 2 benchmarks/train.py --tokens tokens.npz --method fsdp2-cce_dist --out benchmarks/results

Methods: FSDP2 or DeepSpeed's ZeRO-3, each stock, with Liger's fused loss, or with cce_dist, by default and exact. The
model is a Llama of 8 layers (hidden size 2304), in bf16 with fp32 masters, on sequences of 2048 real tokens; AdamW,
clipping. Of each number of sequences a rank, until memory is out: tokens/s of all ranks (median of the steps after the
fourth), peak GB, milliseconds of the first step (with the first number, that is with what is compiled), first and last
loss of the ranks' mean, and of one more step on rank 0 when its GPU computes, and when it waits for collectives and for
the host. With cce_dist any operation of the head's forward and backward that makes a tensor as large as
the classifier is an error (looked at with embedded tokens, since the embedding, as large, is gathered as ever).
Rank 0 adds what was found to the JSON of the machine, the vocabulary and the number of ranks.

Shapes: b sequences of a rank, L tokens of a sequence.
"""

import argparse
import json
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from inputs import load_tokens
from loss import environment, result_path
from overlap import profiled_ms
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

METHODS = [f"{engine}-{loss}" for engine in ("fsdp2", "zero3") for loss in ("stock", "liger", "cce_dist", "exact")]
SETTLED = 4
"""Steps before those that are timed."""

Step = Callable[[Tensor], Tensor]
Probe = Callable[[Tensor, Tensor], None]
"""(embedded tokens [b, L, D], labels [b, L]): a forward and backward that the optimizer does not see."""


def make_model(vocab_size: int, layers: int, hidden_size: int, length: int, liger: bool) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    if liger:
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        off = dict.fromkeys(("rope", "swiglu", "rms_norm", "cross_entropy"), False)
        apply_liger_kernel_to_llama(**off, fused_linear_cross_entropy=True)
    heads = max(hidden_size // 128, 1)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=4 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=max(heads // 3, 1) if heads % 3 == 0 else heads,
        head_dim=128,
        max_position_embeddings=length,
        tie_word_embeddings=False,
        use_cache=False,
        attn_implementation="sdpa",
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).float().train()


def with_fsdp2(model: nn.Module, loss: str, device: str) -> tuple[Step, Probe]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    from cce_dist import CCEConfig
    from cce_dist.fsdp import shard_head

    mesh = init_device_mesh(device, (dist.get_world_size(),))
    policy = MixedPrecisionPolicy(torch.bfloat16, reduce_dtype=torch.float32)
    if loss in ("cce_dist", "exact"):
        shard_head(model, mesh, config=CCEConfig(gradient="exact" if loss == "exact" else None))
    apart = [*model.model.layers, model.model.embed_tokens]  # type: ignore[union-attr,operator,misc]
    if loss == "stock":
        apart.append(model.lm_head)
    for module in apart:
        fully_shard(module, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, fused=device == "cuda")

    def step(ids_bL: Tensor) -> Tensor:
        loss = model(input_ids=ids_bL, labels=ids_bL).loss
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    def probe(embeds_bLD: Tensor, labels_bL: Tensor) -> None:
        model(inputs_embeds=embeds_bLD, labels=labels_bL).loss.backward()

    return step, probe


def with_zero3(model: nn.Module, loss: str, device: str) -> tuple[Step, Probe]:
    import deepspeed

    import cce_dist.deepspeed

    if device == "cpu":  # a collective that would be compiled for a minute
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": True},
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": 3, "overlap_comm": True},
        "steps_per_print": 10**9,
    }
    initialize = deepspeed.initialize
    if loss in ("cce_dist", "exact"):
        config["cce_dist"] = {"enabled": True, **({"gradient": "exact"} if loss == "exact" else {})}
        initialize = cce_dist.deepspeed.initialize
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, fused=device == "cuda")
    engine = initialize(model=model, optimizer=optimizer, config=config)[0]

    def step(ids_bL: Tensor) -> Tensor:
        loss = engine(input_ids=ids_bL, labels=ids_bL).loss
        engine.backward(loss)
        engine.step()
        return loss.detach()

    def probe(embeds_bLD: Tensor, labels_bL: Tensor) -> None:
        engine.backward(engine(inputs_embeds=embeds_bLD.bfloat16(), labels=labels_bL).loss)

    return step, probe


class ClassifierStaysCut(TorchDispatchMode):
    """Within, it is an error when the classifier's parameter holds all of its elements, as ZeRO-3 gathers one, or, but
    for ZeRO-3, which prefetches the embedding, when an operation makes a tensor of so many: not a view of other memory,
    which the loss keeps lists of narrower numbers in."""

    def __init__(self, weight: Tensor, elements: int, engine: str) -> None:
        super().__init__()
        self.weight, self.elements, self.engine = weight, elements, engine

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = op(*args, **(kwargs or {}))
        known = {_memory(x) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        local = self.weight.to_local() if isinstance(self.weight, DTensor) else self.weight
        held = [local]
        if self.engine != "zero3":
            held += [x for x in tree_leaves(made) if isinstance(x, Tensor) and _memory(x) not in known]
        for x in held:
            if not isinstance(x, DTensor) and _memory(x) and x.numel() >= self.elements:
                raise AssertionError(f"{op}: a tensor of shape {list(x.shape)} on rank {dist.get_rank()}.")
        return made


def _memory(x: Tensor) -> int:
    """Where it lies; 0 for one that lies nowhere, of a meta device, or wraps others."""
    return 0 if x.is_meta or isinstance(x, DTensor) else x.untyped_storage().data_ptr()


def train(step: Step, batch: Callable[[int], Tensor], steps: int, device: str) -> dict[str, float]:
    """Times the steps on ``batch(number)``; the slowest rank's."""
    times, losses = [], []
    for number in range(steps):
        ids_bL = batch(number)
        if number == SETTLED and device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        _finish(device)
        start = time.perf_counter()
        losses.append(step(ids_bL))
        _finish(device)
        times.append(time.perf_counter() - start)
    of_ranks = torch.stack(losses).float()
    dist.all_reduce(of_ranks)
    of_ranks /= dist.get_world_size()
    seconds = median(times[SETTLED:])
    peak = torch.tensor(torch.cuda.max_memory_allocated() / 1e9 if device == "cuda" else 0.0, device=device)
    dist.all_reduce(peak, dist.ReduceOp.MAX)
    return {
        "tokens_per_s": dist.get_world_size() * ids_bL.numel() / seconds,
        "step_ms": 1e3 * seconds,
        "first_step_ms": 1e3 * times[0],
        "peak_gb": float(peak),
        "first_loss": float(of_ranks[0]),
        "last_loss": float(of_ranks[-1]),
    }


def _finish(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
    dist.barrier()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=Path, required=True, help=".npy or .npz of token ids")
    parser.add_argument("--method", required=True, choices=METHODS)
    parser.add_argument("--vocab", type=int, default=262144)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--hidden", type=int, default=2304)
    parser.add_argument("--length", type=int, default=2048, help="tokens of a sequence")
    parser.add_argument("--sequences", type=int, nargs="+", default=[4, 8, 16], help="of a rank, one after the other")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--out", type=Path, help="folder for the JSON file")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: to try the command out")
    arguments = parser.parse_args()
    device = arguments.device
    engine, loss = arguments.method.split("-", 1)
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo")
    rank, world, length = dist.get_rank(), dist.get_world_size(), arguments.length
    ids = torch.from_numpy(load_tokens(arguments.tokens, arguments.vocab))
    text_SL = ids[: len(ids) // length * length].view(-1, length)
    text_SL = text_SL[torch.randperm(len(text_SL), generator=torch.Generator().manual_seed(0))]
    with torch.device(device):
        model = make_model(arguments.vocab, arguments.layers, arguments.hidden, length, loss == "liger")
    step, probe = (with_fsdp2 if engine == "fsdp2" else with_zero3)(model, loss, device)
    results: dict[str, Any] = {}
    for sequences in arguments.sequences:

        def batch(number: int, sequences: int = sequences) -> Tensor:
            first = (number * world + rank) * sequences % (len(text_SL) - sequences + 1)
            return text_SL[first : first + sequences].to(device)

        try:
            found: dict[str, Any] = train(step, batch, arguments.steps, device)
            if device == "cuda":
                found["rank_0"] = profiled_ms(partial(step, batch(arguments.steps)), launches_hidden=False)
        except torch.cuda.OutOfMemoryError:
            found = {"out_of_memory": True}
        results[str(sequences)] = found
        if rank == 0:
            print(f"{arguments.method}, {sequences} sequences: {found}", flush=True)
        if "out_of_memory" in found:  # on every rank: they hold the same
            break
    if rank == 0 and arguments.out:
        path = result_path(arguments.out, "train", arguments.steps, f"{world}-{arguments.vocab}")
        report = json.loads(path.read_text()) if path.exists() else {**environment(), "methods": {}}
        shape = {key: getattr(arguments, key) for key in ("vocab", "layers", "hidden", "length", "steps")}
        report["methods"][arguments.method] = {**shape, "sequences": results}
        path.write_text(json.dumps(report, indent=2) + "\n")
    if any("out_of_memory" in found for found in results.values()):
        os._exit(1)  # another rank may be in a collective: the launcher ends it
    if loss in ("cce_dist", "exact"):
        ids_bL = batch(arguments.steps, arguments.sequences[0])
        embeds_bLD = torch.randn(*ids_bL.shape, arguments.hidden, device=device, requires_grad=True)
        weight = model.get_output_embeddings().weight  # type: ignore[operator]
        with ClassifierStaysCut(weight, arguments.vocab * arguments.hidden, engine):
            probe(embeds_bLD, ids_bL)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
