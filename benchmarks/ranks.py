"""Times the loss on several GPUs, one process each, beside what one GPU takes, with errors and peak memory.

    torchrun --nproc-per-node 2 benchmarks/ranks.py --tokens tokens.npz --shapes gemma llama3 --out benchmarks/results

Layouts: "one" (each rank alone, the whole vocabulary), "same tokens" (tensor parallel: N tokens on all ranks together),
"own tokens" (N on each rank). Methods: cce_dist unbiased, with and without frequent rows, and exact at three budgets
(``workspace_mb``); with the same tokens, logits that are kept in bf16 on each rank (Megatron-style: column-parallel
product, all-reduces of a number a token, its elementwise parts compiled), and DeepSpeed's vocabulary-parallel loss
where that is installed; with own tokens, the classifier gathered from its shards and the loss compiled, as under FSDP.
Per layout and method: milliseconds of forward and of both (median; of each run the slowest rank, all started together
behind work that hides their launches), multiples of one cuBLAS product hidden · weightᵀ and of its W-th part, peak MB
beyond the returned gradients, errors of dE and dC against fp32 logits, the largest of the ranks; and, of each rank,
what `overlap` sees. Efficiency: of W ranks with the same tokens, time of one / (W · time); with own tokens, time of one
/ time. Rank 0 writes the JSON after each shape.

Shapes: N tokens of a rank, D hidden, V vocabulary, W ranks, v rows of a rank.
"""

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from inputs import Inputs, load_tokens, set_counts, trained_inputs
from loss import dtype_on, environment, peak_mb, reference, relative_error, result_path, shape_name, shape_of
from methods import eager
from overlap import OnTheWire, profiled_ms
from timing import WARM_UP, once_ms
from torch import Tensor, nn

from cce_dist import VocabShard, linear_cross_entropy

LAYOUTS = ("one", "same tokens", "own tokens")
_LINK_BYTES = 64 << 20


class Case(NamedTuple):
    """This rank's part of a layout, and the gradients that it should get."""

    shard: VocabShard
    hidden_ND: Tensor
    weight_vD: Tensor
    labels_N: Tensor
    true_hidden_ND: Tensor
    true_weight_vD: Tensor


def case_of(layout: str, inputs: Inputs, tokens: int) -> Case:
    """``inputs``: the tokens of all ranks. The mean's gradient with own tokens is W times that of the mean."""
    rank, world, group = dist.get_rank(), dist.get_world_size(), dist.group.WORLD
    vocab = inputs.weight_VD.shape[0]
    own = slice(rank * tokens, (rank + 1) * tokens) if layout == "own tokens" else slice(0, tokens)
    if layout == "one":
        shard = VocabShard.whole(vocab)
    else:
        shard = VocabShard.even(vocab, group, group if layout == "own tokens" else None)
    rows = slice(shard.start, shard.stop)
    first = inputs if layout == "own tokens" else first_tokens(inputs, tokens)
    true, times = reference(first), world if layout == "own tokens" else 1
    return Case(
        shard,
        inputs.hidden_ND[own].clone().requires_grad_(),
        nn.Parameter(inputs.weight_VD[rows].clone()),
        inputs.labels_N[own].clone(),
        true.hidden_ND[own] * times,
        true.weight_VD[rows] * times,
    )


def first_tokens(inputs: Inputs, count: int) -> Inputs:
    return inputs._replace(hidden_ND=inputs.hidden_ND[:count], labels_N=inputs.labels_N[:count])


class _KeptLogits(torch.autograd.Function):
    """The mean loss of tokens that all ranks bring, from this rank's columns of the logits, which are kept."""

    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, weight_vD: Tensor, column_N: Tensor) -> Tensor:
        logits_Nv = hidden_ND @ weight_vD.T
        max_N = logits_Nv.amax(1).float()
        dist.all_reduce(max_N, dist.ReduceOp.MAX)
        own_sum_N, own_target_N = _sums(logits_Nv, max_N, column_N)
        sums_2N = torch.stack((own_sum_N, own_target_N))
        dist.all_reduce(sums_2N)
        lse_N = max_N + sums_2N[0].log()
        ctx.save_for_backward(hidden_ND, weight_vD, column_N, logits_Nv, lse_N)
        return (lse_N - sums_2N[1]).mean()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        hidden_ND, weight_vD, column_N, logits_Nv, lse_N = ctx.saved_tensors
        p_Nv = _probabilities(logits_Nv, lse_N, column_N, upstream / column_N.shape[0])
        grad_hidden_ND = p_Nv @ weight_vD
        work = dist.all_reduce(grad_hidden_ND, async_op=True)
        grad_weight_vD = p_Nv.T @ hidden_ND
        work.wait()
        return grad_hidden_ND, grad_weight_vD, None


def _sums(logits_Nv: Tensor, max_N: Tensor, column_N: Tensor) -> tuple[Tensor, Tensor]:
    sum_N = torch.exp(logits_Nv.float() - max_N[:, None]).sum(1)
    target_N = logits_Nv.gather(1, column_N.clamp(min=0).long()[:, None])[:, 0].float()
    return sum_N, torch.where(column_N >= 0, target_N, 0.0)


def _probabilities(logits_Nv: Tensor, lse_N: Tensor, column_N: Tensor, scale: Tensor) -> Tensor:
    columns_v = torch.arange(logits_Nv.shape[1], device=logits_Nv.device)
    p_Nv = torch.exp(logits_Nv.float() - lse_N[:, None]) - (column_N[:, None] == columns_v).float()
    return (p_Nv * scale).to(logits_Nv.dtype)


class _Gathered(torch.autograd.Function):
    """The whole classifier from the ranks' rows; its gradient is summed and cut again. As FSDP does, in bf16."""

    @staticmethod
    def forward(ctx: Any, weight_vD: Tensor, vocab: int) -> Tensor:
        ctx.own, ctx.rows = weight_vD.shape[0], -(-vocab // dist.get_world_size())
        weight_VD = weight_vD.new_empty((ctx.rows * dist.get_world_size(), weight_vD.shape[1]))
        dist.all_gather_into_tensor(weight_VD, _padded(weight_vD, ctx.rows))
        return weight_VD[:vocab]

    @staticmethod
    def backward(ctx: Any, grad_VD: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        grad_vD = grad_VD.new_empty((ctx.rows, grad_VD.shape[1]))
        dist.reduce_scatter_tensor(grad_vD, _padded(grad_VD, ctx.rows * dist.get_world_size()))
        return grad_vD[: ctx.own], None


def _padded(rows_vD: Tensor, rows: int) -> Tensor:
    if rows_vD.shape[0] == rows:
        return rows_vD.contiguous()
    return torch.cat([rows_vD, rows_vD.new_zeros((rows - rows_vD.shape[0], rows_vD.shape[1]))])


def methods_of(layout: str, device: str) -> dict[str, Callable[[Case, Inputs], Tensor]]:
    """Functions (case, inputs) -> mean loss. On a CPU the torch backend, to try the command out."""
    settings: dict[str, Any] = (
        {"gradient": "unbiased"} if device == "cuda" else {"backend": "torch", "filter_eps": 0.01}
    )

    def loss(case: Case, inputs: Inputs, **more: Any) -> Tensor:
        set_counts(case.weight_vD, inputs, case.shard)
        return linear_cross_entropy(
            case.hidden_ND, case.weight_vD, case.labels_N, shard=case.shard, **{**settings, **more}
        )

    methods = {
        "cce_dist": loss,
        "cce_dist, no frequent rows": lambda case, inputs: loss(case, inputs, frequent_rows=0),
    }
    for name, size in (("exact", None), ("exact, 1024 MB", 1024), ("exact, logits kept", "logits")):
        methods[f"cce_dist {name}"] = lambda case, inputs, size=size: loss(
            case, inputs, gradient="exact", workspace_mb=size
        )
    if layout == "same tokens":
        methods["logits kept"] = lambda case, _: _KeptLogits.apply(
            case.hidden_ND, case.weight_vD, case.shard.local_columns(case.labels_N)
        )
        # On a CPU it would compile collectives of its own for a minute.
        if device == "cuda" and (deepspeed_loss := _deepspeed_loss()) is not None:
            methods["DeepSpeed"] = deepspeed_loss
    if layout == "own tokens":
        methods["classifier gathered"] = lambda case, _: eager(
            case.hidden_ND, _Gathered.apply(case.weight_vD, case.shard.vocab_size), case.labels_N
        )
    return methods


def _deepspeed_loss() -> Callable[[Case, Inputs], Tensor] | None:
    """Of tensor parallelism; None where it is not installed."""
    try:
        from deepspeed import comm
        from deepspeed.sequence.linear_cross_entropy import vocab_parallel_linear_cross_entropy as function
    except ImportError:
        return None
    if not comm.is_initialized():
        comm.init_distributed()

    def loss(case: Case, _: Inputs) -> Tensor:
        bounds = {"vocab_start_index": case.shard.start, "vocab_end_index": case.shard.stop}
        return function(case.hidden_ND, case.weight_vD, case.labels_N, tp_group=dist.group.WORLD, **bounds)

    return loss


def slowest(number: float, device: str) -> float:
    """The largest over the ranks."""
    largest = torch.tensor([number], dtype=torch.float64, device=device)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return float(largest.item())


def slowest_ms(run: Callable[[], Any], rounds: int, device: str) -> float:
    times = []
    for _ in range(rounds + WARM_UP):
        dist.barrier()
        times.append(slowest(once_ms(run, device), device))
    return median(times[WARM_UP:])


def measure(layout: str, inputs: Inputs, tokens: int, rounds: int, gemm_ms: float, device: str) -> dict[str, Any]:
    case, world = case_of(layout, inputs, tokens), dist.get_world_size()
    result = {}
    for name, method in methods_of(layout, device).items():

        def both(method: Callable[[Case, Inputs], Tensor] = method) -> tuple[Tensor, ...]:
            return torch.autograd.grad(method(case, inputs), (case.hidden_ND, case.weight_vD))

        (hidden, weight), peak = peak_mb(both, device)
        errors = relative_error(hidden, case.true_hidden_ND), relative_error(weight, case.true_weight_vD)
        del hidden, weight
        row = {
            "forward_ms": slowest_ms(lambda method=method: method(case, inputs), rounds, device),
            "both_ms": slowest_ms(both, rounds, device),
            "peak_mb": slowest(peak, device),
            **{f"{x}_error": slowest(error, device) for x, error in zip(("hidden", "weight"), errors, strict=True)},
        }
        if device == "cuda":
            seen: list[Any] = [None] * world
            dist.all_gather_object(seen, profiled_ms(both))
            row["ranks"] = seen
        with OnTheWire() as wire:
            both()
        torch.compiler.reset()  # within, what is compiled ran eagerly, and would do so from then on
        row["wire_mb"] = slowest(wire.bytes / 1e6, device)
        row["both_x"], row["of_share"] = row["both_ms"] / gemm_ms, row["both_ms"] * world / gemm_ms
        result[name] = row
        if dist.get_rank() == 0:
            times = f"forward {row['forward_ms']:.2f} ms, both {row['both_ms']:.2f} ms = {row['both_x']:.2f}x"
            accuracy = f"dE {row['hidden_error']:.1e}, dC {row['weight_error']:.1e}"
            print(f"  {layout}, {name}: {times}; {row['peak_mb']:.0f} MB; {accuracy}", flush=True)
            for seen in row.get("ranks", ()):
                print("    " + ", ".join(f"{key} {ms:.2f}" for key, ms in seen.items()), flush=True)
    return result


def links(rounds: int, device: str) -> dict[str, float]:
    """What a collective reaches, as docs/plan.md counts it: GB/s in one direction of (W - 1) / W of the bytes that each
    rank ends with or began with (an all-reduce moves them twice), and milliseconds of one that moves next to nothing.
    """
    world = dist.get_world_size()
    large = torch.zeros(_LINK_BYTES // 2, dtype=torch.bfloat16, device=device)
    share = large[: large.numel() // world].clone()
    moved = share.numel() * 2 * (world - 1) / 1e6  # GB/s times ms

    def rate(run: Callable[[], Any], times: int = 1) -> float:
        return times * moved / slowest_ms(run, rounds, device)

    return {
        "all_gather_gb_s": rate(lambda: dist.all_gather_into_tensor(large, share)),
        "reduce_scatter_gb_s": rate(lambda: dist.reduce_scatter_tensor(share, large)),
        "all_reduce_gb_s": rate(lambda: dist.all_reduce(large), 2),
        "all_reduce_ms": slowest_ms(lambda: dist.all_reduce(share[:64]), rounds, device),
    }


def efficiencies(layouts: dict[str, dict[str, Any]], world: int) -> dict[str, dict[str, float]]:
    """Of each method that also ran alone; see the head of this file."""
    return {
        layout: {
            name: layouts["one"][name]["both_ms"] / row["both_ms"] / (world if layout == "same tokens" else 1)
            for name, row in rows.items()
            if name in layouts["one"]
        }
        for layout, rows in layouts.items()
        if layout != "one"
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=Path, required=True, help=".npy or .npz of token ids")
    parser.add_argument("--shapes", nargs="+", type=shape_name, default=["gemma", "llama3"])
    parser.add_argument("--steps", type=int, default=300, help="training steps for the inputs, on each rank the same")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, help="folder for the JSON file")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: to try the command out")
    arguments = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = False
    device = arguments.device
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        global _sums, _probabilities, eager
        _sums, _probabilities, eager = (torch.compile(f) for f in (_sums, _probabilities, eager))
    dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo")
    world = dist.get_world_size()
    report: dict[str, Any] = {**environment(), "ranks": world, "steps": arguments.steps, "shapes": {}}
    report["links"] = links(arguments.rounds, device)
    if dist.get_rank() == 0:
        print(f"links: {report['links']}", flush=True)
    for name in arguments.shapes:
        shape = shape_of(name)
        ids = load_tokens(arguments.tokens, shape.vocab_size)
        inputs = trained_inputs(
            ids,
            world * shape.num_tokens,
            shape.vocab_size,
            shape.hidden_size,
            steps=arguments.steps,
            dtype=dtype_on(device),
            device=device,
        )
        for x in inputs[:3]:  # training is not repeatable bit by bit
            dist.broadcast(x, 0)
        one_ND, weight_VD = inputs.hidden_ND[: shape.num_tokens], inputs.weight_VD
        gemm_ms = slowest_ms(lambda a=one_ND, b=weight_VD: a @ b.T, arguments.rounds, device)
        if dist.get_rank() == 0:
            print(f"{name}: loss {inputs.loss:.3f}; 1.00x = {gemm_ms:.2f} ms", flush=True)
        layouts = {
            layout: measure(layout, inputs, shape.num_tokens, arguments.rounds, gemm_ms, device) for layout in LAYOUTS
        }
        report["shapes"][name] = {
            **shape._asdict(),
            "gemm_ms": gemm_ms,
            "layouts": layouts,
            "efficiency": efficiencies(layouts, world),
        }
        del inputs, one_ND, weight_VD
        if dist.get_rank() == 0:
            print(f"  efficiency: {report['shapes'][name]['efficiency']}", flush=True)
            if arguments.out:
                path = result_path(arguments.out, "ranks", arguments.steps, f"{world}-{'-'.join(arguments.shapes)}")
                path.write_text(json.dumps(report, indent=2) + "\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
