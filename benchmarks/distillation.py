"""Times distillation beside what computes it with logits, in one process, on trained inputs.

    python benchmarks/distillation.py --tokens tokens.npz --shapes llama3 --out benchmarks/results

The student is the trained head, its teacher the same with noise in both factors. Per method: milliseconds and multiples
of one cuBLAS bf16 product of forward and backward, peak bytes beyond the gradients, and the relative errors of loss,
dE and dC against fp64 logits. Then the same of logits of the teacher's top 64, alone and with the log-sum-exp, of the
log-sum-exp alone, and of the loss from them. The result is a JSON file.

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
from timing import Phases, interleaved_ms
from torch import Tensor
from torch.nn.functional import kl_div

from cce_dist import linear_kl_div, linear_logprobs, linear_selected_logits, linear_topk, linear_topk_kl

_CHUNK, _K = 512, 64
KINDS = ("forward", "reverse", "jsd")

Method = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""(student's hidden_ND and weight_VD, teacher's) → the mean divergence."""


class Truth(NamedTuple):
    loss: Tensor
    gradients: tuple[Tensor, Tensor]


def teacher_of(inputs: Inputs) -> tuple[Tensor, Tensor]:
    draw = torch.Generator(inputs.hidden_ND.device).manual_seed(0)

    def noisy(x: Tensor) -> Tensor:
        noise = torch.randn(x.shape, generator=draw, device=x.device, dtype=torch.float32)
        return (x + 0.3 * x.float().std() * noise).to(x.dtype)

    return noisy(inputs.hidden_ND), noisy(inputs.weight_VD)


def of_logits(kind: str, student_NV: Tensor, teacher_NV: Tensor) -> Tensor:
    """Σ over tokens, as TRL computes it from logits."""
    log_s, log_t = student_NV.log_softmax(-1), teacher_NV.log_softmax(-1)
    if kind == "forward":
        return kl_div(log_s, log_t, reduction="sum", log_target=True)
    if kind == "reverse":
        return kl_div(log_t, log_s, reduction="sum", log_target=True)
    log_m = torch.logaddexp(log_s, log_t) - torch.log(torch.tensor(2.0, dtype=log_s.dtype))
    return sum(kl_div(log_m, log_p, reduction="sum", log_target=True) for log_p in (log_s, log_t)) / 2


def truth(kind: str, inputs: Inputs, teacher: tuple[Tensor, Tensor]) -> Truth:
    """From fp64 logits, a chunk of tokens at a time."""
    weight_VD, teacher_VD = inputs.weight_VD.double().requires_grad_(), teacher[1].double()
    total, grads, number = torch.zeros((), dtype=torch.float64, device=teacher_VD.device), [], len(inputs.hidden_ND)
    for hidden_nD, teacher_nD in zip(inputs.hidden_ND.split(_CHUNK), teacher[0].split(_CHUNK), strict=True):
        hidden_nD = hidden_nD.double().requires_grad_()
        loss = of_logits(kind, hidden_nD @ weight_VD.T, teacher_nD.double() @ teacher_VD.T) / number
        loss.backward()
        total += loss.detach()
        grads.append(hidden_nD.grad.float())
    return Truth(total, (torch.cat(grads), weight_VD.grad.float()))


def ours(kind: Any) -> Method:
    return lambda *heads: linear_kl_div(*heads, kind=kind)


def with_logits(kind: str) -> Method:
    def loss(e: Tensor, c: Tensor, teacher_e: Tensor, teacher_c: Tensor) -> Tensor:
        return of_logits(kind, (e @ c.T).float(), (teacher_e @ teacher_c.T).float()) / e.shape[0]

    return torch.compile(loss) if torch.cuda.is_available() else loss


def benchmark(shape: Shape, arguments: argparse.Namespace) -> dict[str, Any]:
    device, phases = arguments.device, Phases()
    tokens = load_tokens(arguments.tokens, shape.vocab_size)
    given = {"steps": arguments.steps, "device": device, "dtype": dtype_on(device), "cache": arguments.cache}
    inputs = trained_inputs(tokens, *shape, **given)
    teacher = teacher_of(inputs)
    phases.done(f"training, {arguments.steps} steps")
    hidden_ND, weight_VD = (x.detach().requires_grad_() for x in inputs[:2])
    results, runs = dict[str, dict[str, Any]](), dict[str, Callable[[], Any]]()

    def timed(name: str, loss: Callable[[], Tensor]) -> tuple[Tensor, tuple[Tensor, ...]] | None:
        def run() -> tuple[Tensor, ...]:
            return torch.autograd.grad(loss(), (hidden_ND, weight_VD))

        try:
            gradients, peak = peak_mb(run, device)
        except torch.OutOfMemoryError as error:
            results[name] = {"failed": str(error)[:200]}
            return None
        results[name], runs[name] = {"peak_mb": peak}, run
        return loss().detach(), gradients

    for kind in KINDS:
        true = truth(kind, inputs, teacher)
        for name, method in ((f"cce_dist {kind}", ours(kind)), (f"logits {kind}", with_logits(kind))):
            found = timed(name, lambda method=method: method(hidden_ND, weight_VD, *teacher))
            if found is not None:
                pairs = zip(("hidden", "weight"), found[1], true.gradients, strict=True)
                results[name]["loss_error"] = relative_error(found[0], true.loss.float())
                results[name] |= {f"{which}_error": relative_error(got, wanted) for which, got, wanted in pairs}
        del true
    phases.done("errors and memory")
    top = linear_topk(*teacher, _K, return_lse=True)
    first_N = top.ids[:, 0].contiguous()

    def chosen(return_lse: bool) -> Tensor:
        set_counts(weight_VD, inputs)
        found = linear_selected_logits(hidden_ND, weight_VD, top.ids, return_lse=return_lse)
        return sum(x.sum() for x in (found if isinstance(found, tuple) else (found,)))

    def lse() -> Tensor:
        set_counts(weight_VD, inputs)
        return linear_logprobs(hidden_ND, weight_VD, first_N).lse.sum()

    timed("lse", lse)
    timed(f"logits of the top {_K}", lambda: chosen(False))
    timed("the same and lse", lambda: chosen(True))
    timed("top-k KL", lambda: linear_topk_kl(hidden_ND, weight_VD, top.ids, top.logprobs))
    runs["top-k, no gradient"] = lambda: linear_topk(*teacher, _K)
    results["top-k, no gradient"] = {}
    runs = {"gemm": lambda: hidden_ND.detach() @ weight_VD.detach().T, **runs}
    times = interleaved_ms(runs, arguments.rounds, device)
    for name in runs.keys() - {"gemm"}:
        results[name] |= {"both_ms": times[name], "both_x": times[name] / times["gemm"]}
    phases.done("times")
    return {**shape._asdict(), "gemm_ms": times["gemm"], "methods": results}


def print_table(name: str, result: dict[str, Any]) -> None:
    print(f"\n{name}: 1.00x = {result['gemm_ms']:.2f} ms")
    columns = ("both_x", "peak_mb", "loss_error", "hidden_error", "weight_error")
    print(f"{'method':24s}" + "".join(f"{column:>14s}" for column in columns))
    for method, row in result["methods"].items():
        shown = (f"{row[column]:14.3g}" if column in row else " " * 14 for column in columns)
        print(f"{method:24s}" + (row["failed"][:90] if "failed" in row else "".join(shown)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=Path, required=True, help=".npy or .npz of token ids")
    parser.add_argument("--shapes", nargs="+", default=["llama3"], help=f"{', '.join(SHAPES)}, NxVxD")
    parser.add_argument("--steps", type=int, default=400, help="training steps for the inputs; 0: at initialisation")
    parser.add_argument("--cache", type=Path, help="folder of trained inputs, shared by the commands")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, help="folder for the JSON file")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: to try the command out")
    arguments = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = False
    report: dict[str, Any] = {**environment(), "steps": arguments.steps, "shapes": {}}
    for name in arguments.shapes:
        result = report["shapes"][name] = benchmark(shape_of(name), arguments)
        print_table(name, result)
        if arguments.out:
            path = result_path(arguments.out, "distillation", arguments.steps, "-".join(arguments.shapes))
            path.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
