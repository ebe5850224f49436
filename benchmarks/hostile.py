"""Errors of loss and gradients in every mode, on inputs that are hard on it, beside those of 16-bit logits.

    python benchmarks/hostile.py --tokens tokens.npz --shape 2048x128256x2304 --out benchmarks/results

Each input (noise and trained ones as in first_pass.py, and some more) goes through each mode, with the 8-bit pass where
the loss would take it and without, and through plain logits in the inputs' dtype. Errors are against fp32 logits: of
the mean loss (relative), of log-sum-exps (root mean square and largest), of dE and dC (relative norm). A gradient of
which the reference is 0 has the norm itself. `report.py` prints the table.

Shapes: N tokens, D hidden, V vocabulary.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from first_pass import noise, spoilt
from inputs import Inputs, load_tokens, set_counts, trained_inputs
from loss import dtype_on, environment, reference, result_path, shape_name, shape_of
from timing import Phases
from torch import Tensor

from cce_dist import linear_cross_entropy

MODES: dict[str, dict[str, Any]] = {
    "exact": {"gradient": "exact"},
    "unbiased": {"gradient": "unbiased"},
    "unbiased, full pass": {"gradient": "unbiased", "first_pass": "full"},
    "filtered": {"gradient": "filtered"},
    "filtered, full pass": {"gradient": "filtered", "first_pass": "full"},
    "filtered, tail=False": {"gradient": "filtered", "tail": False},
}
LOGITS = "16-bit logits"
"""Where the inputs are of 16 bits, that is on a GPU."""


def more(inputs: Inputs) -> Iterator[tuple[str, Inputs]]:
    """Trained inputs whose rows, features or labels are odd ones."""
    hidden_ND, weight_VD, labels_N = inputs.hidden_ND.float(), inputs.weight_VD.float(), inputs.labels_N
    vocab, hidden = weight_VD.shape
    draw = torch.Generator(weight_VD.device).manual_seed(0)
    is_kept_ND = torch.rand(hidden_ND.shape, device=hidden_ND.device, generator=draw) < 0.01
    yield "trained, 99 % of the numbers 0", inputs._replace(hidden_ND=10 * is_kept_ND * hidden_ND)
    size_D = torch.exp(torch.randn(hidden, device=hidden_ND.device, generator=draw))
    yield "trained, features of log-normal size", inputs._replace(hidden_ND=size_D * hidden_ND)
    twice_VD = torch.cat([weight_VD[: vocab - vocab // 2], weight_VD[: vocab // 2]])
    yield "trained, each row twice", inputs._replace(weight_VD=twice_VD)
    yield "trained, one label for all tokens", inputs._replace(labels_N=labels_N[:1].expand_as(labels_N).contiguous())
    rare_N = torch.randint(vocab, labels_N.shape, device=labels_N.device, generator=draw)
    yield "trained, labels at random", inputs._replace(labels_N=rare_N)
    yield "hidden states of 0", inputs._replace(hidden_ND=torch.zeros_like(hidden_ND))
    yield "all tokens the same", inputs._replace(hidden_ND=hidden_ND[:1].expand_as(hidden_ND).contiguous())


def cases(inputs: Inputs, num_noise: int) -> Iterator[tuple[str, Inputs]]:
    """All of them; noise of at most ``num_noise`` tokens, with random labels and nothing counted."""
    device, vocab = inputs.weight_VD.device, inputs.weight_VD.shape[0]
    for name, hidden_ND, weight_VD in spoilt(inputs):
        yield name, inputs._replace(hidden_ND=hidden_ND, weight_VD=weight_VD)
    yield from more(inputs)
    tokens = min(num_noise, inputs.labels_N.shape[0])
    labels_N = torch.randint(vocab, (tokens,), generator=torch.Generator().manual_seed(0)).to(device)
    for name, hidden_ND, weight_VD in noise(tokens, vocab, inputs.weight_VD.shape[1], str(device)):
        yield name, Inputs(hidden_ND, weight_VD, labels_N, 0.0)


def relative(x: Tensor, true: Tensor) -> float:
    """The relative error; the norm itself where the true one is 0."""
    size = true.norm().item()
    return (x.float() - true).norm().item() / (size or 1.0)


def measure(inputs: Inputs) -> dict[str, Any]:
    """Errors by mode of one input, and its loss."""
    hidden_ND, weight_VD, labels_N = inputs.hidden_ND, inputs.weight_VD, inputs.labels_N
    true = reference(inputs)
    true_lse_N = torch.cat([(part_nD.float() @ weight_VD.float().T).logsumexp(1) for part_nD in hidden_ND.split(1024)])
    on_gpu = hidden_ND.is_cuda
    modes: dict[str, Any] = ({LOGITS: None} if on_gpu else {}) | MODES
    found: dict[str, Any] = {}
    for name, given in modes.items():
        if "first_pass" in (given or {}) and not on_gpu:
            continue  # the torch backend has no other
        leaves = hidden_ND.clone().requires_grad_(), weight_VD.clone().requires_grad_()
        if given is None:
            logits_NV = (leaves[0] @ leaves[1].T).float()
            losses_N, lse_N = F.cross_entropy(logits_NV, labels_N, reduction="none"), logits_NV.logsumexp(1)
        else:
            set_counts(leaves[1], inputs)
            losses_N, lse_N = linear_cross_entropy(*leaves, labels_N, reduction="none", return_lse=True, **given)
        gradients = torch.autograd.grad(losses_N.mean(), leaves)
        off_N = lse_N.detach().double() - true_lse_N.double()
        found[name] = {
            "loss_error": ((losses_N.detach().double().mean() - true.loss).abs() / true.loss.abs()).item(),
            "lse_rms": off_N.square().mean().sqrt().item(),
            "lse_max": off_N.abs().max().item(),
            "hidden_error": relative(gradients[0], true.hidden_ND),
            "weight_error": relative(gradients[1], true.weight_VD),
        }
        del gradients, leaves, losses_N, lse_N
    return {"loss": true.loss.item(), "modes": found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=Path, required=True, help=".npy or .npz of token ids")
    parser.add_argument("--shape", type=shape_name, default="2048x128256x2304", help="NxVxD, or a name of loss.py's")
    parser.add_argument("--steps", type=int, default=150, help="training steps for the inputs; 0: at initialisation")
    parser.add_argument("--cache", type=Path, help="folder of trained inputs, shared by the commands")
    parser.add_argument("--only", help="measure the cases with this in their names")
    parser.add_argument("--out", type=Path, help="folder for the JSON file")
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda", help="cpu: to try the command out, in fp32"
    )
    arguments = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = False
    device, shape, phases = arguments.device, shape_of(arguments.shape), Phases()
    dtype = dtype_on(device)
    ids = load_tokens(arguments.tokens, shape.vocab_size)
    inputs = trained_inputs(ids, *shape, steps=arguments.steps, dtype=dtype, device=device, cache=arguments.cache)
    phases.done(f"training, {arguments.steps} steps")
    report: dict[str, Any] = {**environment(), "steps": arguments.steps, **shape._asdict(), "hostile": {}}
    for name, case in cases(inputs, 1024):
        if arguments.only is not None and arguments.only not in name:
            continue
        case = case._replace(hidden_ND=case.hidden_ND.to(dtype), weight_VD=case.weight_VD.to(dtype))
        report["hostile"][name] = found = measure(case)
        print(f"\n{name}: loss {found['loss']:.3f}")
        for mode, row in found["modes"].items():
            print(f"  {mode:22s}" + "".join(f"{key} {x:8.1e}  " for key, x in row.items()), flush=True)
    phases.done("errors")
    if arguments.out:
        path = result_path(arguments.out, "hostile", arguments.steps, f"{shape.vocab_size}x{shape.hidden_size}")
        path.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
