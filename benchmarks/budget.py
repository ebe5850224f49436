"""Times the exact loss at several budgets, in one process with torch.compile, with the errors beside the times.

    python benchmarks/budget.py --tokens tokens.npz --shapes gemma llama3 small --out benchmarks/results

Per budget (``workspace_mb``; "logits": all that forward can keep): megabytes that forward keeps for backward, forward
and forward + backward as multiples of one cuBLAS bf16 product hidden · weightᵀ, peak bytes beyond the returned
gradients, and the relative errors of loss, dE and dC against fp32 logits, as `benchmarks/loss.py` has them. With
``--old-tree`` the exact loss of another checkout takes turns. The result is a JSON file named after GPU and shapes.
"""

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from inputs import load_tokens, trained_inputs
from loss import Shape, dtype_on, environment, measure_accuracy, reference, result_path, shape_name, shape_of
from methods import OWN_TREE, Method, eager
from timing import Phases, interleaved_ms
from torch import Tensor
from trees import Tree

COMPILED, OLD = "torch.compile", "old tree's exact"


def budget(text: str) -> int | str:
    """A number of megabytes, or "logits"."""
    if text != "logits" and not (text.isdecimal() and int(text) > 0):
        raise argparse.ArgumentTypeError(f'must be a whole number of MB, 1 or more, or "logits"; got {text!r}.')
    return text if text == "logits" else int(text)


def saved_mb(method: Method, hidden_ND: Tensor, weight_VD: Tensor, labels_N: Tensor) -> float:
    """Megabytes that autograd holds for backward, but for the inputs."""
    held: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        held[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        method(hidden_ND, weight_VD, labels_N)
    for x in (hidden_ND, weight_VD, labels_N):
        held.pop(x.untyped_storage().data_ptr(), None)
    return sum(held.values()) / 1e6


def benchmark(shape: Shape, arguments: argparse.Namespace) -> dict[str, Any]:
    phases, device = Phases(), arguments.device
    ids = load_tokens(arguments.tokens, shape.vocab_size)
    inputs = trained_inputs(
        ids, *shape, steps=arguments.steps, device=device, dtype=dtype_on(device), cache=arguments.cache
    )
    phases.done(f"training, {arguments.steps} steps")
    true = reference(inputs)
    exact = partial(OWN_TREE.linear_cross_entropy, gradient="exact", backend=arguments.backend)
    methods: dict[str, Method] = {
        f"{size} MB" if size != "logits" else "logits": partial(exact, workspace_mb=size) for size in arguments.budgets
    }
    if device == "cuda":
        methods[COMPILED] = torch.compile(eager)
    if arguments.old_tree is not None:
        old = Tree(arguments.old_tree)
        methods[OLD] = partial(old.linear_cross_entropy, gradient="exact", backend=arguments.backend)
    hidden_ND, weight_VD = (x.detach().requires_grad_() for x in inputs[:2])
    results: dict[str, dict[str, Any]] = {}
    runs: dict[str, Callable[[], Any]] = {"gemm": lambda: hidden_ND.detach() @ weight_VD.detach().T}
    for name, method in methods.items():
        try:
            results[name] = measure_accuracy(method, inputs, true)
            results[name]["saved_mb"] = saved_mb(method, hidden_ND, weight_VD, inputs.labels_N)
        except torch.OutOfMemoryError as error:
            results[name] = {"failed": str(error)[:200]}
            continue
        runs[f"{name} forward"] = lambda method=method: method(hidden_ND, weight_VD, inputs.labels_N)
        runs[f"{name} both"] = lambda method=method: torch.autograd.grad(
            method(hidden_ND, weight_VD, inputs.labels_N), (hidden_ND, weight_VD)
        )
    del true
    if device == "cuda":
        torch.cuda.empty_cache()
    phases.done("errors and memory")
    times = interleaved_ms(runs, arguments.rounds, device)
    phases.done("times")
    OWN_TREE.enter()
    for name, row in results.items():
        for part in ("forward", "both"):
            if f"{name} {part}" in times:
                row[f"{part}_ms"] = times[f"{name} {part}"]
                row[f"{part}_x"] = times[f"{name} {part}"] / times["gemm"]
    return {**shape._asdict(), "model_loss": inputs.loss, "gemm_ms": times["gemm"], "budgets": results}


def print_table(name: str, result: dict[str, Any]) -> None:
    print(f"\n{name}: N, V, D = {result['num_tokens']}, {result['vocab_size']}, {result['hidden_size']}; ", end="")
    print(f"1.00x = {result['gemm_ms']:.2f} ms")
    print(
        f"{'budget':18s}{'fwd':>8s}{'both':>8s}{'saved MB':>10s}{'peak MB':>9s}" + f"{'loss':>9s}{'dE':>9s}{'dC':>9s}"
    )
    for budget_, row in result["budgets"].items():
        if "failed" in row:
            print(f"{budget_:18s} {row['failed'][:90]}")
            continue
        cells = "".join(f"{row[f'{x}_error']:9.1e}" for x in ("loss", "hidden", "weight"))
        times = f"{row['forward_x']:7.2f}x{row['both_x']:7.2f}x"
        print(f"{budget_:18s}{times}{row['saved_mb']:10.0f}{row['peak_mb']:9.0f}{cells}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=Path, required=True, help=".npy or .npz of token ids")
    parser.add_argument("--shapes", nargs="+", type=shape_name, default=["gemma", "llama3", "small"])
    parser.add_argument("--budgets", nargs="+", type=budget, default=[256, 1024, 2048, "logits"])
    parser.add_argument("--steps", type=int, default=400, help="training steps for the inputs; 0: at initialisation")
    parser.add_argument("--cache", type=Path, help="folder of trained inputs, shared by the commands")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--old-tree", type=Path, help="another checkout, whose exact loss takes turns with this one's")
    parser.add_argument("--backend", choices=("auto", "triton", "torch"), default="auto")
    parser.add_argument("--out", type=Path, help="folder for the JSON file")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: to try the command out")
    arguments = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = False
    report: dict[str, Any] = {**environment(), "steps": arguments.steps, "shapes": {}}
    for name in arguments.shapes:
        report["shapes"][name] = benchmark(shape_of(name), arguments)
        print_table(name, report["shapes"][name])
        if arguments.out:
            path = result_path(arguments.out, "budget", arguments.steps, "-".join(arguments.shapes))
            path.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
