"""Errors of log-sum-exps after the first pass in 8 bits, on inputs that are hard on it, and its time.

    python benchmarks/first_pass.py --tokens tokens.npz --shapes gemma llama3 --out benchmarks/results

The errors are against fp64, beside those of the full pass and of logits rounded to bf16: mean (a bias), root mean
square and largest; with the share of (token, tile) pairs that were computed in full. The inputs are noise of several
shapes, and the first of ``--shapes``, trained and then spoilt. Times are of the first pass alone (estimate and
refinement) and of the whole forward. With ``--before FOLDER`` the kernels of another tree (its folder kernels/) are
measured beside these, in turns.

Shapes: N tokens, D hidden, V vocabulary.
"""

import argparse
import importlib.util
import json
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from inputs import Inputs, load_tokens, trained_inputs
from loss import SHAPES, environment, result_path, shape_name, shape_of
from shards import merge, shard_of
from timing import Phases, interleaved_ms
from torch import Tensor

from cce_dist import linear_cross_entropy
from cce_dist.kernels.problem import Logits
from cce_dist.kernels.triton import backend as triton_backend

Case = tuple[str, Tensor, Tensor]
_CHUNK = 256


def backend_of(folder: Path) -> ModuleType:
    """The triton backend of another tree's kernels/, which older ones call pipeline."""
    name = "kernels_before"
    spec = importlib.util.spec_from_file_location(
        name, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None and spec.loader is not None
    sys.modules[name] = importlib.util.module_from_spec(spec)
    is_folder = (folder / "triton").exists()
    return importlib.import_module(f"{name}.triton.backend" if is_folder else f"{name}.pipeline")


def noise(num_tokens: int, vocab: int, hidden: int, device: str) -> Iterator[Case]:
    """Hidden states and classifiers of random numbers; "std" is the standard deviation of the logits."""
    draw = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, generator=draw)

    weight_VD, hidden_ND = normal(vocab, hidden), normal(num_tokens, hidden) / math.sqrt(hidden)
    common_D = normal(hidden) / math.sqrt(hidden)
    for std in (1, 2, 3, 4):
        yield f"noise, std {std}", std * hidden_ND, weight_VD
    for std in (2, 4):
        cosine = 0.9
        yield (
            f"tokens of cosine {cosine}, std {std}",
            std * (math.sqrt(cosine) * common_D + math.sqrt(1 - cosine) * hidden_ND),
            weight_VD,
        )
    yield "features 100 times larger, std 100", 100 * hidden_ND, weight_VD
    massive_ND = hidden_ND.clone()
    massive_ND[:, :4] = 100 * common_D[:4]
    yield "4 constant features 100 times larger", 2 * massive_ND, weight_VD
    uneven_N1 = torch.exp(0.5 * normal(num_tokens, 1))
    yield "tokens of uneven size", uneven_N1 * hidden_ND, weight_VD
    size_V1 = torch.exp(torch.linspace(-1.2, 1.1, vocab, device=device))[:, None]
    yield "rows from 0.3 to 3 times", hidden_ND, size_V1 * weight_VD
    heavy_V1 = torch.rand(vocab, 1, device=device, generator=draw) < 0.01
    yield "1 % of the rows 4 times", hidden_ND, torch.where(heavy_V1, 4 * weight_VD, weight_VD)


def spoilt(inputs: Inputs) -> Iterator[Case]:
    """Trained inputs, with what is hard on 8 bits."""
    hidden_ND, weight_VD = inputs.hidden_ND.float(), inputs.weight_VD.float()
    vocab, hidden = weight_VD.shape
    draw = torch.Generator(weight_VD.device).manual_seed(0)
    yield "trained", hidden_ND, weight_VD
    for factor in (0.05, 2, 5, 20):
        yield f"trained, logits {factor} times", factor * hidden_ND, weight_VD
    features = torch.tensor([7, 30, 111, 200], device=weight_VD.device) % hidden
    outlier_ND = hidden_ND.clone()
    outlier_ND[:, features] *= 60
    yield "trained, 4 features 60 times", outlier_ND, weight_VD
    constant_ND = hidden_ND.clone()
    constant_ND[:, features[:2]] = 200
    yield "trained, 2 features constant 200", constant_ND, weight_VD
    single_ND = hidden_ND.clone()
    single_ND[::7, 3] = 400
    yield "trained, one number 400 in a seventh of the tokens", single_ND, weight_VD
    rows = torch.randperm(vocab, device=weight_VD.device, generator=draw)[: vocab // 100]
    heavy_VD = weight_VD.clone()
    heavy_VD[rows] *= 8
    yield "trained, 1 % of the rows 8 times", hidden_ND, heavy_VD
    single_VD = weight_VD.clone()
    single_VD[rows, 5] = 20
    yield "trained, one number 20 in 1 % of the rows", hidden_ND, single_VD


def first_pass(backend: ModuleType, logits: Logits, eps: float) -> Any:
    """The summary of the 8-bit pass, and the estimate's."""
    estimate = backend.estimate(logits)
    return backend.refine(logits, estimate, merge([estimate.summary]), eps), estimate.summary


def true_lse(hidden_ND: Tensor, weight_VD: Tensor) -> tuple[Tensor, Tensor]:
    """Log-sum-exps in fp64 (products too, on a GPU), and those of logits rounded to the inputs' dtype."""
    exact, rounded = [], []
    for part_nD in hidden_ND.split(_CHUNK):
        chunks = [part_nD.double() @ rows_vD.double().T for rows_vD in weight_VD.split(16384)]
        exact.append(torch.stack([chunk.logsumexp(1) for chunk in chunks]).logsumexp(0))
        rounded.append((part_nD @ weight_VD.T).float().logsumexp(1))
    return torch.cat(exact), torch.cat(rounded)


def errors(lse_N: Tensor, true_N: Tensor) -> dict[str, float]:
    off_N = lse_N.double() - true_N
    return {
        "mean": off_N.mean().item(),
        "rms": off_N.square().mean().sqrt().item(),
        "max": off_N.abs().max().item(),
    }


def measure_case(backends: dict[str, ModuleType], case: Case, labels_N: Tensor, dtype: torch.dtype) -> dict[str, Any]:
    """Errors by backend, of bf16 logits and of the full pass; the share of pairs that a backend computes in full."""
    _, hidden_ND, weight_VD = case
    inputs = Inputs(hidden_ND.to(dtype), weight_VD.to(dtype), labels_N, 0.0)
    logits, settings = shard_of(inputs, backend="triton", frequent_rows=0)[:2]
    exact_N, rounded_N = true_lse(inputs.hidden_ND, inputs.weight_VD)
    full_N = merge([triton_backend.summarise(logits, False, 1 << 20)]).lse_N
    result: dict[str, Any] = {
        "lse_mean": exact_N.mean().item(),
        "errors": {"rounded logits": errors(rounded_N, exact_N), "full": errors(full_N, exact_N)},
        "refined": {},
    }
    for name, backend in backends.items():
        estimate = backend.estimate(logits)
        before_TN = estimate.summary.tiles.lse_TN.clone()
        summary = backend.refine(logits, estimate, merge([estimate.summary]), settings.refine_eps)
        result["errors"][name] = errors(merge([summary]).lse_N, exact_N)
        result["refined"][name] = (before_TN != summary.tiles.lse_TN).float().mean().item()
    return result


def measure_times(backends: dict[str, ModuleType], inputs: Inputs, rounds: int, device: str) -> dict[str, Any]:
    logits, settings = shard_of(inputs, backend="triton", frequent_rows=0)[:2]
    runs: dict[str, Callable[[], Any]] = {
        f"first pass, {name}": lambda backend=backend: first_pass(backend, logits, settings.refine_eps)
        for name, backend in backends.items()
    }
    runs["first pass, full"] = lambda: triton_backend.summarise(logits, True, 1 << 20)
    weight_VD = inputs.weight_VD.clone().requires_grad_()
    for way in ("fp8", "full"):
        runs[f"forward, {way}"] = lambda way=way: linear_cross_entropy(
            inputs.hidden_ND, weight_VD, inputs.labels_N, backend="triton", first_pass=way
        )
    runs["product"] = lambda: inputs.hidden_ND @ inputs.weight_VD.T
    return interleaved_ms(runs, rounds, device)


def print_case(name: str, result: dict[str, Any]) -> None:
    print(f"\n{name}: mean log-sum-exp {result['lse_mean']:.2f}")
    for way, row in result["errors"].items():
        refined = result["refined"].get(way)
        share = "" if refined is None else f"{refined:8.3f} refined"
        print(f"  {way:16s} mean {row['mean']:+9.1e}  rms {row['rms']:8.1e}  max {row['max']:8.1e}{share}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=Path, required=True, help=".npy or .npz of token ids")
    parser.add_argument("--shapes", nargs="+", type=shape_name, default=["llama3", "gemma"], help=", ".join(SHAPES))
    parser.add_argument("--noise", type=shape_name, default="1024x131072x2304", help="the shape of the noise")
    parser.add_argument("--steps", type=int, default=150, help="training steps for the inputs; 0: at initialisation")
    parser.add_argument("--cache", type=Path, help="folder of trained inputs, shared by the commands")
    parser.add_argument("--only", help="measure the cases with this in their names")
    parser.add_argument("--before", type=Path, help="the folder kernels/ of another tree, to compare with")
    parser.add_argument("--rounds", type=int, default=20, help="runs that are timed")
    parser.add_argument("--out", type=Path, help="folder for the JSON file")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: to try the command out")
    arguments = parser.parse_args()
    device, phases = arguments.device, Phases()
    dtype = torch.bfloat16 if device == "cuda" else torch.float16
    backends = {"fp8": triton_backend}
    if arguments.before is not None:
        backends["fp8 before"] = backend_of(arguments.before)
    report: dict[str, Any] = {**environment(), "steps": arguments.steps, "cases": {}, "times": {}}

    def measure(cases: Iterator[Case], labels_N: Tensor) -> None:
        for case in cases:
            if arguments.only is not None and arguments.only not in case[0]:
                continue
            report["cases"][case[0]] = measure_case(backends, case, labels_N, dtype)
            print_case(case[0], report["cases"][case[0]])

    tokens, vocab, hidden = shape_of(arguments.noise)
    labels_N = torch.randint(vocab, (tokens,), generator=torch.Generator().manual_seed(0)).to(device)
    measure(noise(tokens, vocab, hidden, device), labels_N)
    phases.done("noise")
    for name in arguments.shapes:
        shape = shape_of(name)
        ids = load_tokens(arguments.tokens, shape.vocab_size)
        inputs = trained_inputs(ids, *shape, steps=arguments.steps, dtype=dtype, device=device, cache=arguments.cache)
        if device == "cuda":
            torch.cuda.empty_cache()
        phases.done(f"{name}: training, {arguments.steps} steps")
        few = Inputs(inputs.hidden_ND[:tokens], inputs.weight_VD, inputs.labels_N[:tokens], inputs.loss)
        cases = spoilt(few) if name == arguments.shapes[0] else iter([("trained", few.hidden_ND, few.weight_VD)])
        measure(((f"{name}, {case}", *factors) for case, *factors in cases), few.labels_N)
        phases.done(f"{name}: errors")
        report["times"][name] = {**shape._asdict(), **measure_times(backends, inputs, arguments.rounds, device)}
        print(f"{name}, ms: {json.dumps(report['times'][name])}")
        phases.done(f"{name}: times")
        del inputs, few
    if arguments.out:
        path = result_path(arguments.out, "first-pass", arguments.steps, "-".join(arguments.shapes))
        path.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
