"""Times log-probabilities and entropies beside what computes them with logits, in one process, on trained inputs.

    python benchmarks/logprobs.py --tokens tokens.npz --shapes qwen3 --out benchmarks/results

Per method: milliseconds and multiples of one cuBLAS bf16 product of the log-probabilities without a gradient, and of a
forward and backward of a policy's loss, Σ u·logprob + v·entropy with random u and v; peak bytes beyond the gradients;
the largest and the relative errors of both, and the relative errors of dE and dC, against fp64 logits. ``--eps`` adds
the default mode at those values of filter_eps, from which its own is chosen. Of ``exact_sums``, which gives no entropy:
the time without a gradient, and the largest error. Of ``fp32_head``, a classifier in fp32 beside the same hidden
states: times of both modes beside those of a head in bf16, and errors against fp64 logits of the fp32 rows, also of a
head whose rows are rounded to bf16, and of the library's fp32 product. The result is a JSON file.

Shapes: N tokens, D hidden, V vocabulary; n tokens of a chunk.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from inputs import Inputs, load_tokens, set_counts, trained_inputs
from loss import SHAPES, Shape, dtype_on, environment, peak_mb, relative_error, result_path, shape_of
from timing import Phases, interleaved_launch_ms, interleaved_ms
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from cce_dist import linear_logprobs

QWEN3 = Shape(8192, 151936, 4096)
_CHUNK = 512
_COEFFICIENT = 0.01
"""Of the entropy, as policies have it; and 1, of which the errors of its own gradient are."""

Outputs = tuple[Tensor, Tensor]
Method = Callable[[Tensor, Tensor, Tensor], Outputs]
"""(hidden_ND, weight_VD, labels_N) → (log-probabilities, entropies)."""


class Truth(NamedTuple):
    logprob_N: Tensor
    entropy_N: Tensor
    gradients: dict[str, tuple[Tensor, Tensor]]


def upstream(labels_N: Tensor) -> Outputs:
    draw = torch.Generator().manual_seed(0)
    u_N, v_N = torch.randn(2, labels_N.shape[0], generator=draw).to(labels_N.device)
    return u_N, v_N


OBJECTIVES = {"policy": (1.0, _COEFFICIENT), "entropy": (0.0, 1.0)}
"""What the log-probabilities and the entropies count."""


def objective(found: Outputs, labels_N: Tensor, name: str) -> Tensor:
    return sum((c * u_N * x_N).sum() for c, u_N, x_N in zip(OBJECTIVES[name], upstream(labels_N), found, strict=True))


def _of_logits(logits_nV: Tensor, labels_n: Tensor) -> Outputs:
    log_p_nV = logits_nV.log_softmax(-1)
    return log_p_nV.gather(-1, labels_n[:, None])[:, 0], -(log_p_nV.exp() * log_p_nV).sum(-1)


def truth(inputs: Inputs) -> Truth:
    """From fp64 logits, a chunk of tokens at a time."""
    weight_VD, parts = inputs.weight_VD.double(), []
    grads = {
        name: [
            torch.empty(inputs.hidden_ND.shape, dtype=torch.float32, device=weight_VD.device),
            torch.zeros(weight_VD.shape, dtype=torch.float32, device=weight_VD.device),
        ]
        for name in OBJECTIVES
    }
    whole = upstream(inputs.labels_N)
    for first in range(0, inputs.labels_N.shape[0], _CHUNK):
        n = slice(first, first + _CHUNK)
        hidden_nD = inputs.hidden_ND[n].double()
        log_p_nV = (hidden_nD @ weight_VD.T).log_softmax(-1)
        p_nV, labels_n = log_p_nV.exp(), inputs.labels_N[n]
        entropy_n = -(p_nV * log_p_nV).sum(-1)
        parts.append((log_p_nV.gather(-1, labels_n[:, None])[:, 0], entropy_n))
        for name, (a, b) in OBJECTIVES.items():
            u_n, v_n = a * whole[0][n].double(), b * whole[1][n].double()
            gradient_nV = -p_nV * (u_n[:, None] + v_n[:, None] * (log_p_nV + entropy_n[:, None]))
            gradient_nV[torch.arange(labels_n.shape[0], device=labels_n.device), labels_n] += u_n
            grads[name][0][n] = (gradient_nV @ weight_VD).float()
            grads[name][1] += (gradient_nV.T @ hidden_nD).float()
    logprobs, entropies = (torch.cat(x) for x in zip(*parts, strict=True))
    return Truth(logprobs, entropies, {name: (g[0], g[1]) for name, g in grads.items()})


def _ours(gradient: str | None, inputs: Inputs, entropy: bool, **settings: Any) -> Method:
    def call(hidden_ND: Tensor, weight_VD: Tensor, labels_N: Tensor) -> Outputs:
        set_counts(weight_VD, inputs)
        found = linear_logprobs(hidden_ND, weight_VD, labels_N, gradient=gradient, entropy=entropy, **settings)
        return found.logprob, found.logprob if found.entropy is None else found.entropy

    return call


def _chunks(hidden_ND: Tensor, weight_VD: Tensor, labels_N: Tensor) -> Outputs:
    """As trainers do: a chunk of logits at a time, computed again in backward."""

    def of_chunk(hidden_nD: Tensor, weight_VD: Tensor, labels_n: Tensor) -> Outputs:
        return _of_logits((hidden_nD @ weight_VD.T).float(), labels_n)

    parts = []
    for hidden_nD, labels_n in zip(hidden_ND.split(_CHUNK), labels_N.split(_CHUNK), strict=True):
        parts.append(checkpoint(of_chunk, hidden_nD, weight_VD, labels_n, use_reentrant=False))
    logprobs, entropies = (torch.cat(x) for x in zip(*parts, strict=True))
    return logprobs, entropies


_compiled = torch.compile(lambda e, c, y: _of_logits((e @ c.T).float(), y))


def fp32_logprobs(hidden_ND: Tensor, weight_VD: Tensor, labels_N: Tensor) -> Tensor:
    """The library's product with fp32 sums, then fp64: what the largest error is compared with."""
    parts = []
    for hidden_nD, labels_n in zip(hidden_ND.split(_CHUNK), labels_N.split(_CHUNK), strict=True):
        if hidden_nD.is_cuda and hidden_nD.dtype != torch.float32:
            logits_nV = torch.mm(hidden_nD, weight_VD.T, out_dtype=torch.float32)
        else:
            logits_nV = hidden_nD.float() @ weight_VD.float().T
        parts.append(logits_nV.double().log_softmax(-1).gather(-1, labels_n[:, None])[:, 0])
    return torch.cat(parts)


def errors(found: Outputs, true: Truth) -> dict[str, float]:
    off_N = (found[0].double() - true.logprob_N).abs()
    return {
        "logprob_largest_error": off_N.max().item(),
        "logprob_error": relative_error(found[0].double(), true.logprob_N),
        "entropy_error": relative_error(found[1].double(), true.entropy_N),
    }


def measure_accuracy(method: Method, inputs: Inputs, true: Truth) -> dict[str, float]:
    hidden_ND, weight_VD = (x.detach().requires_grad_() for x in inputs[:2])
    values: dict[str, float] = {}
    for name in OBJECTIVES:

        def run(name: str = name) -> tuple[Tensor, ...]:
            found = method(hidden_ND, weight_VD, inputs.labels_N)
            return torch.autograd.grad(objective(found, inputs.labels_N, name), (hidden_ND, weight_VD))

        gradients, peak = peak_mb(run, hidden_ND.device.type)
        values["peak_mb"] = peak
        for which, got, wanted in zip(("hidden", "weight"), gradients, true.gradients[name], strict=True):
            values[f"{name}_{which}_error"] = relative_error(got, wanted)
    found = method(hidden_ND, weight_VD, inputs.labels_N)
    return values | errors((found[0].detach(), found[1].detach()), true)


def _fp32_chunks(hidden_ND: Tensor, weight_VD: Tensor, labels_N: Tensor) -> Outputs:
    """As trainers do with a head in fp32."""
    return _chunks(hidden_ND.float(), weight_VD, labels_N)


def fp32_head(inputs: Inputs, arguments: argparse.Namespace) -> dict[str, Any]:
    """Times and errors of a head in fp32, whose rows are those of the inputs and bits that bf16 has not."""
    device, labels_N = arguments.device, inputs.labels_N
    draw = torch.Generator(device).manual_seed(0)
    of_bf16_VD = inputs.weight_VD.float()
    below_VD = torch.rand(of_bf16_VD.shape, generator=draw, device=device).sub_(0.5).mul_(2.0**-8)
    wide = inputs._replace(weight_VD=of_bf16_VD.addcmul_(of_bf16_VD, below_VD))
    del below_VD
    true = truth(wide)
    sparse = None if device == "cuda" else "unbiased"
    settings: dict[str, dict[str, Any]] = {"default": {"gradient": sparse}, "exact": {"gradient": "exact"}}
    methods: dict[str, Method] = {
        f"fp32_head {x}": _ours(inputs=wide, entropy=True, fp32_head=True, **settings[x]) for x in settings
    }
    methods |= {f"rounded rows {x}": _ours(inputs=wide, entropy=True, **settings[x]) for x in settings}
    results: dict[str, dict[str, Any]] = {name: dict(measure_accuracy(m, wide, true)) for name, m in methods.items()}
    error = (fp32_logprobs(wide.hidden_ND.float(), wide.weight_VD, labels_N) - true.logprob_N).abs().max().item()
    del true
    plain = {f"bf16 head {x}": _ours(inputs=inputs, entropy=True, first_pass="full", **settings[x]) for x in settings}
    runs: dict[str, Callable[[], Any]] = {"gemm": lambda: inputs.hidden_ND @ inputs.weight_VD.T}
    for name, of in (("bf16 head", inputs), ("fp32_head", wide)):
        only = _ours(None, of, False, fp32_head=of is wide)
        runs[f"{name} without"] = lambda only=only, of=of: _without_gradient(only, of)
    for name, method, of in (
        *((name, method, inputs) for name, method in plain.items()),
        *((name, methods[name], wide) for name in ("fp32_head default", "fp32_head exact")),
        ("chunks of fp32 logits", _fp32_chunks, wide),
    ):
        hidden_ND, weight_VD = (x.detach().requires_grad_() for x in of[:2])
        runs[name] = lambda m=method, e=hidden_ND, c=weight_VD: torch.autograd.grad(
            objective(m(e, c, labels_N), labels_N, "policy"), (e, c)
        )
    times = interleaved_ms(runs, arguments.rounds, device)
    return {
        "times_x": {name: ms / times["gemm"] for name, ms in times.items()},
        "of_bf16": {x: times[f"fp32_head {x}"] / times[f"bf16 head {x}"] for x in ("without", *settings)},
        "fp32_product_largest_error": error,
        "methods": results,
    }


def benchmark(shape: Shape, arguments: argparse.Namespace) -> dict[str, Any]:
    device, phases = arguments.device, Phases()
    inputs = trained_inputs(
        load_tokens(arguments.tokens, shape.vocab_size),
        *shape,
        steps=arguments.steps,
        device=device,
        dtype=dtype_on(device),
        cache=arguments.cache,
    )
    phases.done(f"training, {arguments.steps} steps")
    true = truth(inputs)
    methods: dict[str, Method] = {
        "cce_dist": _ours(None if device == "cuda" else "unbiased", inputs, True),
        "cce_dist exact": _ours("exact", inputs, True),
        "chunks of logits": _chunks,
    }
    if device == "cuda":
        methods["torch.compile"] = _compiled
    for eps in arguments.eps:
        methods[f"cce_dist eps 2^{eps}"] = _ours("unbiased", inputs, True, filter_eps=2.0**eps)
    hidden_ND, weight_VD = (x.detach().requires_grad_() for x in inputs[:2])
    labels_N, results = inputs.labels_N, dict[str, dict[str, Any]]()
    product = {"gemm": lambda: hidden_ND.detach() @ weight_VD.detach().T}
    without: dict[str, Callable[[], Any]] = {}
    both: dict[str, Callable[[], Any]] = {}
    for name, method in methods.items():
        try:
            results[name] = dict(measure_accuracy(method, inputs, true))
        except Exception as error:  # one that has no memory for the shape has that as its result
            results[name] = {"failed": f"{type(error).__name__}: {str(error)[:200]}"}
            continue
        plain = _ours(None, inputs, False) if name == "cce_dist" else method
        if name in ("cce_dist", "chunks of logits", "torch.compile"):
            without[name] = lambda plain=plain: _without_gradient(plain, inputs)
        both[name] = lambda method=method: torch.autograd.grad(
            objective(method(hidden_ND, weight_VD, labels_N), labels_N, "policy"), (hidden_ND, weight_VD)
        )
    exact_sums = _ours(None, inputs, False, exact_sums=True)
    exact_error = (_without_gradient(exact_sums, inputs)[0] - true.logprob_N).abs().max().item()
    fp32_error = (fp32_logprobs(inputs.hidden_ND, inputs.weight_VD, labels_N) - true.logprob_N).abs().max().item()
    del true
    phases.done("errors and memory")
    runs = product | {f"{name} without": run for name, run in without.items()} | both
    runs["exact_sums"] = lambda: _without_gradient(exact_sums, inputs)
    times = interleaved_ms(runs, arguments.rounds, device)
    launches = interleaved_launch_ms(both, arguments.rounds, device)
    for name in both:
        results[name] |= {"both_ms": times[name], "both_x": times[name] / times["gemm"], "launch_ms": launches[name]}
    for name in without:
        results[name]["without_gradient_x"] = times[f"{name} without"] / times["gemm"]
    phases.done("times")
    both.clear(), without.clear(), runs.clear()
    in_fp32 = fp32_head(inputs, arguments)
    phases.done("a head in fp32")
    return {
        **shape._asdict(),
        "model_loss": inputs.loss,
        "gemm_ms": times["gemm"],
        "fp32_logits_largest_error": fp32_error,
        "exact_sums": {
            "without_gradient_x": times["exact_sums"] / times["gemm"],
            "logprob_largest_error": exact_error,
        },
        "fp32_head": in_fp32,
        "methods": results,
    }


@torch.no_grad()
def _without_gradient(method: Method, inputs: Inputs) -> Outputs:
    return method(inputs.hidden_ND, inputs.weight_VD, inputs.labels_N)


def print_table(name: str, result: dict[str, Any]) -> None:
    print(f"\n{name}: 1.00x = {result['gemm_ms']:.2f} ms; ", end="")
    print(
        f"largest error of fp32 logits {result['fp32_logits_largest_error']:.1e}; exact_sums without a gradient ",
        end="",
    )
    exact_sums = result["exact_sums"]
    print(f"{exact_sums['without_gradient_x']:.2f}x, largest error {exact_sums['logprob_largest_error']:.1e}")
    print(f"{'method':22s}{'no grad':>9s}{'both':>8s}{'launch':>9s}{'MB':>7s}", end="")
    columns = ("logprob_largest", "logprob", "entropy", *(f"{x}_{y}" for x in OBJECTIVES for y in ("hidden", "weight")))
    print("".join(f"{column:>16s}" for column in columns))
    for method, row in result["methods"].items():
        if "failed" in row:
            print(f"{method:22s} {row['failed'][:90]}")
            continue
        without = f"{row['without_gradient_x']:8.2f}x" if "without_gradient_x" in row else " " * 9
        print(f"{method:22s}{without}{row['both_x']:7.2f}x{row['launch_ms']:6.1f} ms{row['peak_mb']:7.0f}", end="")
        print("".join(f"{row[f'{column}_error']:16.1e}" for column in columns))
    wide = result["fp32_head"]
    print(
        f"a head in fp32: {', '.join(f'{key} {x:.2f}' for key, x in wide['of_bf16'].items())} times a head in bf16; ",
        end="",
    )
    print(", ".join(f"{key} {x:.2f}x" for key, x in wide["times_x"].items()))
    print(f"largest error of the library's fp32 product {wide['fp32_product_largest_error']:.1e}")
    for method, row in wide["methods"].items():
        print(f"{method:22s}{'':17s}{'':9s}{row['peak_mb']:7.0f}", end="")
        print("".join(f"{row[f'{column}_error']:16.1e}" for column in columns))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=Path, required=True, help=".npy or .npz of token ids")
    parser.add_argument("--shapes", nargs="+", default=["qwen3"], help=f"qwen3, {', '.join(SHAPES)}, NxVxD")
    parser.add_argument("--steps", type=int, default=400, help="training steps for the inputs; 0: at initialisation")
    parser.add_argument("--eps", nargs="*", type=float, default=[], help="binary logarithms of filter_eps")
    parser.add_argument("--cache", type=Path, help="folder of trained inputs, shared by the commands")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, help="folder for the JSON file")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: to try the command out")
    arguments = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = False
    report: dict[str, Any] = {**environment(), "steps": arguments.steps, "shapes": {}}
    for name in arguments.shapes:
        result = report["shapes"][name] = benchmark(QWEN3 if name == "qwen3" else shape_of(name), arguments)
        print_table(name, result)
        if arguments.out:
            path = result_path(arguments.out, "logprobs", arguments.steps, "-".join(arguments.shapes))
            path.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
