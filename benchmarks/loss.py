"""Times the loss against every peer, in one process, on the same trained inputs, with the errors beside the times.

    python benchmarks/loss.py --tokens tokens.npz --shapes gemma llama3 --out benchmarks/results

Per method: milliseconds of forward and of forward+backward (median of CUDA-event timings, the methods taking turns),
the same as multiples of one cuBLAS bf16 product hidden · weightᵀ, peak bytes beyond the returned gradients, and the
relative errors of loss, dE, dC and of dC on rows that no label hits, against fp32 logits (TF32 off). The result is a
JSON file named after GPU and shapes; `benchmarks/report.py` draws it.

Shapes: N tokens, D hidden, V vocabulary.
"""

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
import triton
from inputs import Inputs, load_tokens, trained_inputs
from methods import Method, available_methods
from torch import Tensor

import cce_dist


class Shape(NamedTuple):
    num_tokens: int
    vocab_size: int
    hidden_size: int


SHAPES = {
    "gemma": Shape(8192, 262144, 2304),
    "llama3": Shape(8192, 128256, 4096),
    "qwen2.5": Shape(8192, 151936, 3584),
    "small": Shape(16384, 50304, 768),
}


class Reference(NamedTuple):
    loss: Tensor
    hidden_ND: Tensor
    weight_VD: Tensor
    unlabelled_V: Tensor


def reference(inputs: Inputs) -> Reference:
    """Loss and gradients of the mean loss from fp32 logits, a chunk of tokens at a time."""
    hidden_ND, weight_VD, labels_N = inputs.hidden_ND, inputs.weight_VD.float(), inputs.labels_N
    num_tokens = labels_N.shape[0]
    grad_hidden_ND = torch.empty(hidden_ND.shape, dtype=torch.float32, device=hidden_ND.device)
    grad_weight_VD = torch.zeros_like(weight_VD)
    losses = []
    for first in range(0, num_tokens, 2048):
        n = slice(first, first + 2048)
        logits_nV = hidden_ND[n].float() @ weight_VD.T
        losses.append(torch.nn.functional.cross_entropy(logits_nV, labels_N[n], reduction="none").double())
        p_nV = torch.softmax(logits_nV, 1, out=logits_nV)
        p_nV[torch.arange(p_nV.shape[0], device=p_nV.device), labels_N[n]] -= 1
        p_nV /= num_tokens
        grad_hidden_ND[n] = p_nV @ weight_VD
        grad_weight_VD += p_nV.T @ hidden_ND[n].float()
    unlabelled_V = torch.ones(weight_VD.shape[0], dtype=torch.bool, device=weight_VD.device)
    unlabelled_V[labels_N] = False
    return Reference(torch.cat(losses).mean(), grad_hidden_ND, grad_weight_VD, unlabelled_V)


def relative_error(x: Tensor, true: Tensor) -> float:
    return ((x.float() - true).norm() / true.norm()).item()


def measure_accuracy(method: Method, inputs: Inputs, true: Reference) -> dict[str, float]:
    """Errors and peak memory of one forward and backward."""
    hidden_ND, weight_VD = (x.detach().requires_grad_() for x in inputs[:2])
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loss = method(hidden_ND, weight_VD, inputs.labels_N)
    gradients = torch.autograd.grad(loss, (hidden_ND, weight_VD))
    torch.cuda.synchronize()
    returned = sum(x.numel() * x.element_size() for x in gradients)
    peak = torch.cuda.max_memory_allocated() - before - returned
    return {
        "peak_mb": peak / 1e6,
        "loss_error": abs(loss.double() - true.loss).item() / true.loss.item(),
        "hidden_error": relative_error(gradients[0], true.hidden_ND),
        "weight_error": relative_error(gradients[1], true.weight_VD),
        "unlabelled_weight_error": relative_error(gradients[1][true.unlabelled_V], true.weight_VD[true.unlabelled_V]),
    }


def interleaved_ms(runs: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median milliseconds of each run; one of each per round, after two rounds of warm-up."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds + 2):
        for name, run in runs.items():
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            torch.cuda._sleep(2_000_000)  # about a millisecond of queue, so that launches are not what is timed
            start.record()
            run()
            stop.record()
            stop.synchronize()
            if turn >= 2:
                times[name].append(start.elapsed_time(stop))
    return {name: median(values) for name, values in times.items()}


def benchmark(shape: Shape, tokens: Path, steps: int, rounds: int, only: list[str] | None) -> dict[str, Any]:
    ids = load_tokens(tokens, shape.vocab_size)
    inputs = trained_inputs(ids, shape.num_tokens, shape.vocab_size, shape.hidden_size, steps=steps)
    torch.cuda.empty_cache()
    true = reference(inputs)
    methods, missing = available_methods()
    results: dict[str, dict[str, Any]] = {name: {"failed": why} for name, why in missing.items()}
    hidden_ND, weight_VD = (x.detach().requires_grad_() for x in inputs[:2])
    forward: dict[str, Callable[[], Any]] = {"gemm": lambda: hidden_ND.detach() @ weight_VD.detach().T}
    both: dict[str, Callable[[], Any]] = {}
    for name, method in methods.items():
        if only and not any(part in name for part in only):
            continue
        try:
            results[name] = dict(measure_accuracy(method, inputs, true))
        except Exception as error:  # a peer that cannot take the shape has that as its result
            results[name] = {"failed": f"{type(error).__name__}: {str(error)[:200]}"}
            continue
        forward[name] = lambda method=method: method(hidden_ND, weight_VD, inputs.labels_N)
        both[name] = lambda method=method: torch.autograd.grad(
            method(hidden_ND, weight_VD, inputs.labels_N), (hidden_ND, weight_VD)
        )
    del true
    torch.cuda.empty_cache()
    # Together, so that every method's rounds see the clock speeds that the others see.
    times = interleaved_ms(forward | {f"{name} both": run for name, run in both.items()}, rounds)
    if not only:  # 70 % of the labels ignored
        labels_N = inputs.labels_N.clone()
        labels_N[torch.rand(labels_N.shape, device="cuda") < 0.7] = -100
        unbiased = methods["cce_dist unbiased"]
        masked = {
            "masked": lambda: torch.autograd.grad(unbiased(hidden_ND, weight_VD, labels_N), (hidden_ND, weight_VD)),
            "all": both["cce_dist unbiased"],
        }
        masked_ms = interleaved_ms(masked, rounds)
        results["cce_dist unbiased"]["masked_70_percent"] = masked_ms["masked"] / masked_ms["all"]
    for name, result in results.items():
        if name in both:
            result |= {"forward_ms": times[name], "both_ms": times[f"{name} both"]}
            result |= {"forward_x": times[name] / times["gemm"], "both_x": times[f"{name} both"] / times["gemm"]}
    return {**shape._asdict(), "model_loss": inputs.loss, "gemm_ms": times["gemm"], "methods": results}


def environment() -> dict[str, Any]:
    return {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "cce_dist": cce_dist.__version__,
        "command": " ".join(sys.argv),
        "date": time.strftime("%Y-%m-%d"),
    }


def print_table(name: str, result: dict[str, Any]) -> None:
    print(f"\n{name}: N, V, D = {result['num_tokens']}, {result['vocab_size']}, {result['hidden_size']}; ", end="")
    print(f"model loss {result['model_loss']:.3f}; 1.00x = {result['gemm_ms']:.2f} ms")
    print(f"{'method':26s}{'fwd':>7s}{'both':>7s}{'peak MB':>9s}{'loss':>9s}{'dE':>9s}{'dC':>9s}{'dC unl.':>9s}")
    for method, row in result["methods"].items():
        if "failed" in row:
            print(f"{method:26s} {row['failed'][:90]}")
            continue
        errors = (row[f"{x}_error"] for x in ("loss", "hidden", "weight", "unlabelled_weight"))
        cells = "".join(f"{error:9.1e}" for error in errors)
        print(f"{method:26s}{row['forward_x']:6.2f}x{row['both_x']:6.2f}x{row['peak_mb']:9.0f}{cells}")
    masked = result["methods"].get("cce_dist unbiased", {}).get("masked_70_percent")
    if masked:
        print(f"70 % of the labels ignored: {masked:.2f} of the time")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=Path, required=True, help=".npy or .npz of token ids")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--steps", type=int, default=400, help="training steps for the inputs; 0: at initialisation")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", nargs="+", help="methods whose names contain one of these")
    parser.add_argument("--out", type=Path, help="folder for the JSON file")
    arguments = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = False
    report: dict[str, Any] = {**environment(), "steps": arguments.steps, "shapes": {}}
    for name in arguments.shapes:
        shape = SHAPES[name]
        result = benchmark(shape, arguments.tokens, arguments.steps, arguments.rounds, arguments.only)
        report["shapes"][name] = result
        print_table(name, result)
        torch.cuda.empty_cache()
        if arguments.out:
            arguments.out.mkdir(parents=True, exist_ok=True)
            gpu = report["gpu"].lower().replace(" ", "-")
            inputs = "trained" if arguments.steps else "initial"
            shapes = "-".join(arguments.shapes)
            (arguments.out / f"loss-{gpu}-{inputs}-{shapes}.json").write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
