"""Where the time of a step goes: the share of GPU time by stage of the loss, for each shape and mode.

    python benchmarks/stages.py --tokens tokens.npz --shapes gemma small --out benchmarks/results

torch's profiler records the kernels of some steps (forward+backward); each is put to a stage by its name. Our own
kernels are of the stage whose file in kernels/triton holds them (summarise, select, tail, differentiate, exact; R's
rows, in select.py, are the tail's). Library products belong to what calls them in that mode: the tail's two, or exact
mode's dE and dC. What torch does besides is "small torch operations" and "memset and copies"; what no rule knows is
"other", with its name. Kernels that overlap count in full, so the sum may exceed the step's time; gaps between kernels
count nowhere.
"""

import argparse
import functools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from inputs import Inputs, load_tokens, set_counts, trained_inputs
from loss import SHAPES, dtype_on, environment, result_path, shape_name, shape_of
from timing import Phases, interleaved_ms
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from cce_dist import linear_cross_entropy

MODES = ("unbiased", "filtered", "exact")
KERNELS = Path(__file__).parent.parent / "kernels/triton"
# In this order; names of cuBLAS's and torch's kernels on CUDA, and of their operators on a CPU.
RULES = (
    ("memset and copies", r"memset|memcpy|direct_copy|FillFunctor|aten::(copy_|zero_|fill_|clone)$"),
    ("products", r"gemm|nvjet|cutlass|cublas|splitk|aten::(mm|addmm|addmm_|matmul)$"),
    ("small torch operations", r"at::|at_cuda|aten::|cub::|thrust|triton_(poi|red|per)_"),
)


@functools.cache
def own_kernels() -> dict[str, str]:
    """The stage of each Triton kernel, by its function's name."""
    return {
        name: "tail" if name.startswith("_tail") else path.stem
        for path in sorted(KERNELS.glob("*.py"))
        for name in re.findall(r"^@triton\.jit.*\ndef (\w+_kernel)\(", path.read_text(), re.M)
    }


def stage_of(kernel: str, mode: str) -> str:
    """The stage of a kernel of that name in a step of that mode."""
    for name, stage in own_kernels().items():
        if kernel.startswith(name):
            return stage
    for stage, pattern in RULES:
        if re.search(pattern, kernel, re.I):
            return ("exact's products" if mode == "exact" else "tail's products") if stage == "products" else stage
    return "other"


def profile_step(step: Callable[[], Any], steps: int, device: str) -> list[tuple[str, float, float]]:
    """(kernel, its milliseconds in a step, its launches in a step), the longest first."""
    step()
    if device == "cuda":
        torch.cuda.synchronize()
    on_cuda = device == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if on_cuda else ProfilerActivity.CPU]) as recorded:
        for _ in range(steps):
            step()
        if on_cuda:
            torch.cuda.synchronize()
    kernels = []
    for event in recorded.key_averages():
        is_device = event.device_type == torch.autograd.DeviceType.CUDA
        microseconds = event.self_device_time_total if on_cuda else event.self_cpu_time_total
        if microseconds > 0 and is_device == on_cuda:
            kernels.append((event.key, microseconds / 1e3 / steps, event.count / steps))
    if not kernels:
        raise RuntimeError("torch's profiler recorded no kernel; is CUPTI there, and may this user profile the GPU?")
    return sorted(kernels, key=lambda kernel: -kernel[1])


def by_stage(kernels: list[tuple[str, float, float]], mode: str) -> dict[str, dict[str, float]]:
    """Milliseconds, share and launches of each stage, the longest first."""
    stages: dict[str, dict[str, float]] = {}
    for name, ms, launches in kernels:
        stage = stages.setdefault(stage_of(name, mode), {"ms": 0.0, "launches": 0.0})
        stage["ms"] += ms
        stage["launches"] += launches
    total = sum(stage["ms"] for stage in stages.values())
    for stage in stages.values():
        stage["share"] = stage["ms"] / total
    return dict(sorted(stages.items(), key=lambda item: -item[1]["ms"]))


def print_table(shape: str, mode: str, result: dict[str, Any]) -> None:
    print(f"\n{shape}, {mode}: {result['both_ms']:.2f} ms a step, {result['kernels_ms']:.2f} ms of it in kernels")
    for name, stage in result["stages"].items():
        print(f"  {name:24s}{stage['ms']:9.3f} ms{stage['share']:7.1%}{stage['launches']:7.0f} launches")
    unknown = [row["name"] for row in result["kernels"] if stage_of(row["name"], mode) == "other"]
    if unknown:
        print(f"  other: {', '.join(name[:60] for name in unknown)}")


def both(hidden_ND: Tensor, weight_VD: Tensor, inputs: Inputs, mode: str) -> tuple[Tensor, ...]:
    set_counts(weight_VD, inputs)
    loss = linear_cross_entropy(hidden_ND, weight_VD, inputs.labels_N, gradient=mode)
    return torch.autograd.grad(loss, (hidden_ND, weight_VD))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=Path, required=True, help=".npy or .npz of token ids")
    parser.add_argument("--shapes", nargs="+", type=shape_name, default=["gemma", "small"], help=", ".join(SHAPES))
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--steps", type=int, default=400, help="training steps for the inputs; 0: at initialisation")
    parser.add_argument("--cache", type=Path, help="folder of trained inputs, shared by the commands")
    parser.add_argument("--rounds", type=int, default=5, help="steps that are profiled, and that are timed")
    parser.add_argument("--out", type=Path, help="folder for the JSON file")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: to try the command out")
    arguments = parser.parse_args()
    device, phases = arguments.device, Phases()
    report: dict[str, Any] = {**environment(), "steps": arguments.steps, "stages": {}}
    for name in arguments.shapes:
        shape = shape_of(name)
        ids = load_tokens(arguments.tokens, shape.vocab_size)
        inputs = trained_inputs(
            ids, *shape, steps=arguments.steps, dtype=dtype_on(device), device=device, cache=arguments.cache
        )
        torch.cuda.empty_cache()
        phases.done(f"{name}: training, {arguments.steps} steps")
        hidden_ND, weight_VD = (x.detach().requires_grad_() for x in inputs[:2])
        steps = {
            mode: lambda mode=mode, inputs=inputs, factors=(hidden_ND, weight_VD): both(*factors, inputs, mode)
            for mode in arguments.modes
        }
        times = interleaved_ms(steps, arguments.rounds, device)
        modes = {}
        for mode, step in steps.items():
            kernels = profile_step(step, arguments.rounds, device)
            modes[mode] = {
                "both_ms": times[mode],
                "kernels_ms": sum(ms for _, ms, _ in kernels),
                "stages": by_stage(kernels, mode),
                "kernels": [{"name": key[:120], "ms": ms, "launches": launches} for key, ms, launches in kernels[:30]],
            }
            print_table(name, mode, modes[mode])
        report["stages"][name] = {**shape._asdict(), "model_loss": inputs.loss, "modes": modes}
        del inputs, hidden_ND, weight_VD, steps
        phases.done(f"{name}: profiles")
        if arguments.out:
            path = result_path(arguments.out, "stages", arguments.steps, "-".join(arguments.shapes))
            path.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
