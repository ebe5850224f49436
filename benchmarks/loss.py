"""Times the loss against every peer, in one process, on the same trained inputs, with the errors beside the times.

    python benchmarks/loss.py --tokens tokens.npz --shapes gemma llama3 --out benchmarks/results

Per method: milliseconds of forward and of forward+backward (median of CUDA-event timings, the methods taking turns;
each run is launched behind about 30 ms of torch.cuda._sleep, so that its launches are not what is timed), the same as
multiples of one cuBLAS bf16 product hidden · weightᵀ, host milliseconds to launch forward+backward on an idle GPU, peak
bytes beyond the returned gradients (of cce_dist unbiased also with the least workspace_mb), and the relative errors of
loss, dE, dC and of dC on rows that no label hits, against fp32 logits (TF32 off); where ours are larger than their mode
allows, nothing is timed or written, and a peer of which they are says so in place of times. The result is a JSON file
named after GPU and shapes; `benchmarks/report.py` draws it. With ``--steps 0`` the inputs are those at random
initialisation. Where the text has more distinct ids than the vocabulary, the rarest become one.

Shapes: N tokens, D hidden, V vocabulary.
"""

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from inputs import SEQUENCE, Inputs, load_tokens, set_counts, tokens_for, trained_inputs
from methods import OWN_TREE, Method, available_methods
from timing import Phases, interleaved_launch_ms, interleaved_ms
from torch import Tensor

import cce_dist
from cce_dist.loss.settings import least_workspace_mb

OWN = "cce_dist"
UNBIASED = f"{OWN} unbiased"


class Shape(NamedTuple):
    num_tokens: int
    vocab_size: int
    hidden_size: int


SHAPES = {
    "gemma": Shape(8192, 262144, 2304),
    "llama3": Shape(8192, 128256, 4096),
    "qwen2.5": Shape(8192, 151936, 3584),
    "small": Shape(16384, 50304, 768),
    "qwen3.5": Shape(8192, 248320, 4096),
    "apple": Shape(8192, 256000, 2304),
    "llama_2_7b": Shape(2048, 32000, 4096),
    "llama_3_8b": Shape(2048, 128256, 4096),
    "qwen2.5_7b": Shape(2048, 152064, 3584),
    "qwen2.5_14b": Shape(2048, 152064, 5120),
    "qwen2.5_72b": Shape(2048, 152064, 8192),
    "deepseek_v2_lite": Shape(2048, 102400, 2048),
    "deepseek_v3": Shape(2048, 129280, 7168),
}
"""apple: that of table 1 of arXiv 2411.09009. From llama_2_7b on: Liger's benchmark models, with its 2048 tokens."""
GROUPS = {"liger": [name for name in SHAPES if "_" in name]}
DEFAULT_SHAPES = ["gemma", "llama3", "qwen2.5", "small"]
LARGEST_ERROR = {"unbiased": 1e-2, "filtered": 3e-2, "exact": 4e-3}
"""Of dE and dC, of our modes on trained inputs in bf16: with a larger one nothing is reported."""
OF_PEERS = 0.2
OF_LOSS = 1e-3


def shape_of(name: str) -> Shape:
    """A shape by its name, or one written as 8192x262144x2304 (tokens in whole sequences of 512).

    Raises:
        ValueError: for anything else.
    """
    if name in SHAPES:
        return SHAPES[name]
    numbers = [int(part) for part in name.split("x") if part.isdigit()]
    if len(numbers) != 3 or numbers[0] % SEQUENCE or min(numbers) < 1:
        raise ValueError(f"shape must be one of {', '.join(SHAPES)}, or NxVxD with N in 512s; got {name!r}.")
    return Shape(*numbers)


def check(name: str, row: dict[str, float]) -> None:
    """The gate before any time is taken: a loss that is wrong has no speed.

    Raises:
        ArithmeticError: the loss or a gradient is further off than the method's mode allows, or not finite.
    """
    mode = name.split()[-1]
    bound = LARGEST_ERROR.get(mode, OF_PEERS)
    for key, allowed in (("hidden_error", bound), ("weight_error", bound), ("loss_error", OF_LOSS)):
        if not row[key] <= allowed:  # NaN is not
            raise ArithmeticError(f"{name}: {key} is {row[key]:.1e}, and may be {allowed:.0e}")


def shape_name(name: str) -> str:
    """An argument that `shape_of` understands."""
    try:
        shape_of(name)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return name


def dtype_on(device: str) -> torch.dtype:
    """bf16; on a CPU, where the commands can be tried out on a tiny shape, fp32."""
    return torch.bfloat16 if device == "cuda" else torch.float32


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


def peak_mb(run: Callable[[], tuple[Tensor, ...]], device: str) -> tuple[tuple[Tensor, ...], float]:
    """What ``run`` returns, and the peak memory beyond it (0 on a CPU).

    After a first run, with which libraries take workspace that they keep.
    """
    if device != "cuda":
        return run(), 0.0
    run()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    returned = run()
    torch.cuda.synchronize()
    size = sum(x.numel() * x.element_size() for x in returned)
    return returned, (torch.cuda.max_memory_allocated() - before - size) / 1e6


def measure_accuracy(method: Method, inputs: Inputs, true: Reference) -> dict[str, float]:
    """Errors and peak memory of one forward and backward."""
    hidden_ND, weight_VD = (x.detach().requires_grad_() for x in inputs[:2])

    def run() -> tuple[Tensor, ...]:
        loss = method(hidden_ND, weight_VD, inputs.labels_N)
        losses.append(loss.detach())
        return torch.autograd.grad(loss, (hidden_ND, weight_VD))

    losses: list[Tensor] = []
    gradients, peak = peak_mb(run, hidden_ND.device.type)
    return {
        "peak_mb": peak,
        "loss_error": abs(losses[0].double() - true.loss).item() / true.loss.item(),
        "hidden_error": relative_error(gradients[0], true.hidden_ND),
        "weight_error": relative_error(gradients[1], true.weight_VD),
        "unlabelled_weight_error": relative_error(gradients[1][true.unlabelled_V], true.weight_VD[true.unlabelled_V]),
    }


def least_workspace_peak_mb(unbiased: Callable[..., Tensor], inputs: Inputs) -> float:
    """Peak memory of cce_dist unbiased with the least ``workspace_mb`` that it takes: one tile of probabilities."""
    hidden_ND, weight_VD = (x.detach().requires_grad_() for x in inputs[:2])
    least = least_workspace_mb(hidden_ND.shape[0], hidden_ND.element_size())

    def run() -> tuple[Tensor, ...]:
        loss = unbiased(hidden_ND, weight_VD, inputs.labels_N, workspace_mb=least)
        return torch.autograd.grad(loss, (hidden_ND, weight_VD))

    return peak_mb(run, hidden_ND.device.type)[1]


def _counted(method: Method, inputs: Inputs) -> Method:
    """The method of a classifier whose labels were counted in training."""

    def call(hidden_ND: Tensor, weight_VD: Tensor, labels_N: Tensor, **settings: Any) -> Tensor:
        set_counts(weight_VD, inputs)
        return method(hidden_ND, weight_VD, labels_N, **settings)

    return call


def benchmark(
    shape: Shape,
    tokens: Path,
    steps: int,
    rounds: int,
    only: list[str] | None,
    device: str = "cuda",
    cache: Path | None = None,
    old_tree: Path | None = None,
    dense: bool = False,
) -> dict[str, Any]:
    phases = Phases()
    ids = load_tokens(tokens, shape.vocab_size, dense) if dense else tokens_for(tokens, shape.vocab_size)
    inputs = trained_inputs(
        ids,
        shape.num_tokens,
        shape.vocab_size,
        shape.hidden_size,
        steps=steps,
        device=device,
        dtype=dtype_on(device),
        cache=cache,
    )
    phases.done(f"training, {steps} steps")
    torch.cuda.empty_cache()
    true = reference(inputs)
    methods, missing = available_methods(old_tree)
    for name in [name for name in methods if name.startswith(OWN)]:
        methods[name] = _counted(methods[name], inputs)
    if only:
        methods = {name: method for name, method in methods.items() if any(part in name for part in only)}
    results: dict[str, dict[str, Any]] = {name: {"failed": why} for name, why in missing.items()}
    hidden_ND, weight_VD = (x.detach().requires_grad_() for x in inputs[:2])
    forward: dict[str, Callable[[], Any]] = {"gemm": lambda: hidden_ND.detach() @ weight_VD.detach().T}
    both: dict[str, Callable[[], Any]] = {}
    for name, method in methods.items():
        try:
            row = measure_accuracy(method, inputs, true)
            check(name, row)
            results[name] = dict(row)
            if name == UNBIASED:
                results[name]["least_workspace_peak_mb"] = least_workspace_peak_mb(method, inputs)
        except Exception as error:  # a peer that cannot take the shape has that as its result
            if isinstance(error, ArithmeticError) and name.startswith(OWN):
                raise
            results[name] = {"failed": f"{type(error).__name__}: {str(error)[:200]}"}
            continue
        forward[name] = lambda method=method: method(hidden_ND, weight_VD, inputs.labels_N)
        both[name] = lambda method=method: torch.autograd.grad(
            method(hidden_ND, weight_VD, inputs.labels_N), (hidden_ND, weight_VD)
        )
    del true
    torch.cuda.empty_cache()
    phases.done("errors and memory")
    # Together, so that every method's rounds see the clock speeds that the others see.
    times = interleaved_ms(forward | {f"{name} both": run for name, run in both.items()}, rounds, device)
    if UNBIASED in both:  # 70 % of the labels ignored
        labels_N = inputs.labels_N.clone()
        labels_N[torch.rand(labels_N.shape, device=device) < 0.7] = -100
        masked = {
            "masked": lambda: torch.autograd.grad(
                methods[UNBIASED](hidden_ND, weight_VD, labels_N), (hidden_ND, weight_VD)
            ),
            "all": both[UNBIASED],
        }
        masked_ms = interleaved_ms(masked, rounds, device)
        results[UNBIASED]["masked_70_percent"] = masked_ms["masked"] / masked_ms["all"]
    for name in both:
        results[name] |= {"forward_ms": times[name], "both_ms": times[f"{name} both"]}
        results[name] |= {"forward_x": times[name] / times["gemm"], "both_x": times[f"{name} both"] / times["gemm"]}
    for name, ms in interleaved_launch_ms(both, rounds, device).items():
        results[name]["launch_ms"] = ms
    phases.done("times")
    OWN_TREE.enter()
    return {**shape._asdict(), "model_loss": inputs.loss, "gemm_ms": times["gemm"], "methods": results}


def gpu_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def result_path(folder: Path, stem: str, steps: int, detail: str) -> Path:
    """folder/stem-GPU-inputs-detail.json; makes the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    gpu = gpu_name().lower().replace(" ", "-")
    return folder / f"{stem}-{gpu}-{'trained' if steps else 'initial'}-{detail}.json"


def environment() -> dict[str, Any]:
    return {
        "gpu": gpu_name(),
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
    head = f"{'method':26s}{'fwd':>7s}{'both':>7s}{'launch':>10s}{'peak MB':>9s}{'least MB':>9s}"
    print(head + "".join(f"{name:>9s}" for name in ("loss", "dE", "dC", "dC unl.")))
    for method, row in result["methods"].items():
        if "failed" in row:
            print(f"{method:26s} {row['failed'][:90]}")
            continue
        errors = (row[f"{x}_error"] for x in ("loss", "hidden", "weight", "unlabelled_weight"))
        cells = "".join(f"{error:9.1e}" for error in errors)
        least = f"{row['least_workspace_peak_mb']:.0f}" if "least_workspace_peak_mb" in row else ""
        times = f"{row['forward_x']:6.2f}x{row['both_x']:6.2f}x{row['launch_ms']:7.2f} ms"
        print(f"{method:26s}{times}{row['peak_mb']:9.0f}{least:>9s}{cells}")
    masked = result["methods"].get(UNBIASED, {}).get("masked_70_percent")
    if masked:
        print(f"70 % of the labels ignored: {masked:.2f} of the time")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=Path, required=True, help=".npy or .npz of token ids")
    parser.add_argument(
        "--shapes",
        nargs="+",
        type=lambda name: name if name in GROUPS else shape_name(name),
        default=DEFAULT_SHAPES,
        help=f"{', '.join(SHAPES)}, NxVxD; liger: its seven models",
    )
    parser.add_argument("--steps", type=int, default=400, help="training steps for the inputs; 0: at initialisation")
    parser.add_argument("--cache", type=Path, help="folder of trained inputs, shared by the commands")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--old-tree", type=Path, help="another checkout, whose loss takes turns with this one's")
    parser.add_argument("--dense", action="store_true", help="the ids that occur are the first of the vocabulary")
    parser.add_argument("--only", nargs="+", help="methods whose names contain one of these")
    parser.add_argument("--out", type=Path, help="folder for the JSON file")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: to try the command out")
    arguments = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = False
    report: dict[str, Any] = {**environment(), "steps": arguments.steps, "shapes": {}}
    for name in [shape for given in arguments.shapes for shape in GROUPS.get(given, [given])]:
        result = benchmark(
            shape_of(name),
            arguments.tokens,
            arguments.steps,
            arguments.rounds,
            arguments.only,
            arguments.device,
            arguments.cache,
            arguments.old_tree,
            arguments.dense,
        )
        report["shapes"][name] = result
        print_table(name, result)
        torch.cuda.empty_cache()
        if arguments.out:
            spread = ["dense"] if arguments.dense else []
            path = result_path(arguments.out, "loss", arguments.steps, "-".join([*arguments.shapes, *spread]))
            path.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
