"""Does it train as well: the same small decoder with every loss, the same data in the same order, seed by seed.

    python benchmarks/convergence.py --tokens tokens.npz --seconds 280 --out benchmarks/results

Two settings. "scratch": a Llama of 4 layers is trained from random weights on sequences of 1024 real tokens.
"finetune": one that the exact loss has trained so goes on with text that it has not seen, of which the first 70 % of
each sequence are ignored, as a prompt is. Weights are fp32 with bf16 autocast, the head's bf16 with an fp32 master;
AdamW, clipping, a learning rate that rises and falls to 0. A seed is one of weights (scratch) and of the data's order;
methods of one seed differ in the head's loss alone, and `report.py` compares them in pairs.

A run's record: training loss; held-out loss at intervals, by stock logits whatever the method, and at the end by tenths
of the held-out tokens, rarest labels in training first; at intervals cosine and ratio of norms of the head's two
gradients to those of "exact" (torch.compile of logits and cross-entropy) on the same batch; milliseconds of the head,
forward and backward, within training (median of the second half), and its peak memory beyond the gradients it returns.

It writes after each run what is found so far. ``--seconds`` ends a call before the run that would take longer; the next
call goes on with what is missing, more ``--seeds`` too. A method that cannot run says why.

Shapes: N tokens, D hidden, V vocabulary; L tokens of a sequence, S sequences.
"""

import argparse
import functools
import gc
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import mean, median
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from inputs import load_tokens
from loss import environment, result_path
from methods import RIVALS, Method, eager
from torch import Tensor, nn

from cce_dist import linear_cross_entropy

IGNORED = 0.7
REFERENCE = "exact"
BASE_SEED = 1000
"""Of the model that is fine-tuned."""
TIMED_AFTER = 0.5
LONGEST_RUN = 60.0
"""Seconds that the first run of a call is expected to take at most, compilation included."""


class Setting(NamedTuple):
    steps: int
    rate: float
    ignored: float


class Data(NamedTuple):
    """Sequences [S, L + 1] to train on and to evaluate on, and how often each id is a label in pretraining, [V]."""

    train_SL: Tensor
    held_out_SL: Tensor
    counts_V: Tensor


def methods(device: str) -> dict[str, Callable[[], Method]]:
    """What makes each method; it raises where the method cannot run."""
    ours = {
        "cce_dist exact": {"gradient": "exact"},
        "unbiased": {"gradient": "unbiased"},
        "filtered": {"gradient": "filtered"},
        "filtered, tail=False": {"gradient": "filtered", "tail": False},
    }
    exact = functools.cache(lambda: torch.compile(eager) if device == "cuda" else eager)
    return {
        REFERENCE: exact,
        **{name: lambda given=given: functools.partial(linear_cross_entropy, **given) for name, given in ours.items()},
        "Apple": RIVALS["Apple cut-cross-entropy"],
    }


def plan(names: list[str], settings: list[str], seeds: int) -> list[tuple[str, str, int]]:
    """(setting, method, seed) in their order: all seeds of exact and unbiased, half as many of the others."""
    return [
        (setting, name, seed)
        for seed in range(seeds)
        for setting in settings
        for name in names
        if name in (REFERENCE, "unbiased") or seed < (seeds + 1) // 2
    ]


def split(ids: Tensor, length: int, vocab_size: int) -> dict[str, Data]:
    """The first three quarters of the text for pretraining, the last for fine-tuning; a part of each is held out.

    At most 128 sequences are, from all over the text.
    """
    sequences = (ids.shape[0] - 1) // length
    text_SL = ids.as_strided((sequences, length + 1), (length, 1))
    parts = {"scratch": text_SL[: sequences * 3 // 4], "finetune": text_SL[sequences * 3 // 4 :]}
    found: dict[str, Data] = {}
    for name, part_SL in parts.items():
        every = max(8, part_SL.shape[0] // 128)
        is_held_S = torch.arange(part_SL.shape[0], device=ids.device) % every == every - 1
        train_SL = part_SL[~is_held_S]
        if name == "scratch":
            counts_V = torch.bincount(train_SL[:, 1:].flatten(), minlength=vocab_size)
        found[name] = Data(train_SL, part_SL[is_held_S][:128], counts_V)
    return found


def labels_of(ids_SL: Tensor, ignored: float) -> Tensor:
    """The next ids, [S · L]; −100 for the first part of each sequence."""
    labels_SL = ids_SL[:, 1:].clone()
    labels_SL[:, : round(ignored * labels_SL.shape[1])] = -100
    return labels_SL.flatten()


class Decoder(nn.Module):
    """A Llama without head, its head's fp32 master, and the bf16 weight that losses take, always the same tensor."""

    def __init__(self, vocab_size: int, hidden_size: int, layers: int, length: int, dtype: torch.dtype) -> None:
        from transformers import LlamaConfig, LlamaModel

        super().__init__()
        heads = max(hidden_size // 128, 1)
        config = LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            intermediate_size=2 * hidden_size,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            max_position_embeddings=length,
            use_cache=False,
            attn_implementation="sdpa",
        )
        self.body = LlamaModel(config).float()
        self.master_VD = nn.Parameter(torch.randn(vocab_size, hidden_size) * 0.02)
        self.weight_VD = self.master_VD.detach().to(dtype, copy=True).requires_grad_()

    def hidden(self, ids_SL: Tensor) -> Tensor:
        with torch.autocast(ids_SL.device.type, torch.bfloat16):
            hidden_SLD = self.body(input_ids=ids_SL).last_hidden_state
        return hidden_SLD.flatten(0, 1).to(self.weight_VD.dtype)

    def take_master(self) -> None:
        with torch.no_grad():
            self.weight_VD.copy_(self.master_VD)


@torch.no_grad()
def held_out_losses(model: Decoder, data: Data, ignored: float, batch: int) -> tuple[Tensor, Tensor]:
    """The loss of each held-out token with a label, from stock logits, and how often its label was one in training."""
    losses, labels = [], []
    for ids_SL in data.held_out_SL.split(batch):
        labels_N = labels_of(ids_SL, ignored)
        is_valid_N = labels_N != -100
        hidden_ND, labels_N = model.hidden(ids_SL[:, :-1])[is_valid_N], labels_N[is_valid_N]
        labels.append(labels_N)
        losses += [
            F.cross_entropy((hidden_nD @ model.weight_VD.T).float(), labels_n, reduction="none")
            for hidden_nD, labels_n in zip(hidden_ND.split(2048), labels_N.split(2048), strict=True)
        ]
    return torch.cat(losses), data.counts_V[torch.cat(labels)]


def by_tenths(losses_N: Tensor, counts_N: Tensor) -> list[float]:
    """Mean losses of ten equal parts of the tokens, those of the rarest labels first."""
    return [part.mean().item() for part in losses_N[counts_N.argsort(stable=True)].tensor_split(10)]


def compare(ours: Tensor, exact: Tensor) -> dict[str, Tensor]:
    """Cosine, and ratio of norms."""
    ours, exact = ours.float(), exact.float()
    norms = ours.norm(), exact.norm()
    return {"cosine": (ours * exact).sum() / (norms[0] * norms[1]), "ratio": norms[0] / norms[1]}


def train(
    model: Decoder, data: Data, setting: Setting, head: Method, exact: Method | None, seed: int, batch: int, looks: int
) -> dict[str, Any]:
    """One run; ``exact``: the loss whose gradients are compared with. It looks ``looks`` times at held-out loss and at
    gradients."""
    device = data.train_SL.device
    on_gpu = device.type == "cuda"
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.1, fused=on_gpu)
    order_S = torch.randperm(data.train_SL.shape[0], generator=torch.Generator().manual_seed(seed)).to(device)
    needed = setting.steps * batch
    if needed > len(order_S):
        raise ValueError(f"{setting.steps} steps of {batch} sequences need {needed}; the text has {len(order_S)}.")
    warm_up, every = max(setting.steps // 10, 1), max(setting.steps // looks, 1)
    losses, times, held_out, gradients = [], [], [], []
    peak = 0

    def evaluate(steps: int) -> Tensor:
        losses_N, counts_N = held_out_losses(model, data, setting.ignored, batch)
        held_out.append((steps, losses_N.mean()))
        return torch.stack([losses_N, counts_N.float()])

    evaluate(0)
    for step in range(setting.steps):
        for group in optimizer.param_groups:
            left = (setting.steps - step) / (setting.steps - warm_up)
            group["lr"] = setting.rate * min((step + 1) / warm_up, left)
        ids_SL = data.train_SL[order_S[step * batch : (step + 1) * batch]]
        labels_N, body_ND = labels_of(ids_SL, setting.ignored), model.hidden(ids_SL[:, :-1])
        leaves = body_ND.detach().requires_grad_(), model.weight_VD
        mark = Mark(on_gpu)
        loss = head(*leaves, labels_N)
        found = torch.autograd.grad(loss, leaves)
        mark.stop(found)
        if step >= TIMED_AFTER * setting.steps:
            times.append(mark)
            peak = max(peak, mark.peak)
        losses.append(loss.detach())
        if exact is not None and step % every == every - 1:
            wanted = torch.autograd.grad(exact(*leaves, labels_N), leaves)
            of = {name: compare(a, b) for name, a, b in zip(("hidden", "weight"), found, wanted, strict=True)}
            gradients.append((step + 1, of))
            del wanted
        optimizer.zero_grad(set_to_none=True)
        body_ND.backward(found[0])
        model.master_VD.grad = found[1].float()
        del found
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        model.take_master()
        if step % every == every - 1 and step + 1 < setting.steps:
            evaluate(step + 1)
    of_tokens = evaluate(setting.steps)
    curve = torch.stack(losses).float().tolist()
    tenth = max(setting.steps // 30, 1)
    return {
        "held_out": held_out[-1][1].item(),
        "held_out_tenths": by_tenths(*of_tokens),
        "held_out_curve": [(steps, value.item()) for steps, value in held_out],
        "train_curve": [(i + tenth, mean(curve[i : i + tenth])) for i in range(0, len(curve), tenth)],
        "gradients": [
            {"step": steps, **{f"{x}_{key}": value.item() for x, row in of.items() for key, value in row.items()}}
            for steps, of in gradients
        ],
        "head_ms": median(mark.ms() for mark in times),
        "head_peak_mb": peak / 1e6,
    }


class Mark:
    """The time of a head's forward and backward, without waiting for it, and its peak memory."""

    def __init__(self, on_gpu: bool) -> None:
        self.on_gpu, self.peak = on_gpu, 0
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
            self.events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            self.events[0].record()
        else:
            self.start = time.perf_counter()

    def stop(self, returned: tuple[Tensor, ...]) -> None:
        if self.on_gpu:
            self.events[1].record()
            size = sum(x.numel() * x.element_size() for x in returned)
            self.peak = torch.cuda.max_memory_allocated() - self.before - size
        else:
            self.seconds = time.perf_counter() - self.start

    def ms(self) -> float:
        """Once all has run."""
        return self.events[0].elapsed_time(self.events[1]) if self.on_gpu else 1e3 * self.seconds


def main() -> None:
    start = time.perf_counter()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=Path, required=True, help=".npy or .npz of token ids")
    parser.add_argument("--methods", nargs="+", choices=list(methods("cpu")), default=list(methods("cpu")))
    parser.add_argument("--settings", nargs="+", choices=("scratch", "finetune"), default=["scratch", "finetune"])
    parser.add_argument("--seeds", type=int, default=4, help="of exact and unbiased; the others have half as many")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="that this call may take")
    parser.add_argument("--steps", type=int, default=300, help="from scratch; fine-tuning takes two fifths of them")
    parser.add_argument("--batch", type=int, default=16, help="sequences of a step")
    parser.add_argument("--length", type=int, default=1024, help="tokens of a sequence")
    parser.add_argument("--vocab", type=int, default=262144)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--looks", type=int, default=4, help="times that held-out loss and gradients are looked at")
    parser.add_argument("--cache", type=Path, default=Path("build"), help="folder for the model that is fine-tuned")
    parser.add_argument("--out", type=Path, required=True, help="folder for the JSON file")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: to try the command out")
    arguments = parser.parse_args()
    device, length, vocab_size = arguments.device, arguments.length, arguments.vocab
    settings = {
        "scratch": Setting(arguments.steps, 1e-3, 0.0),
        "finetune": Setting(max(arguments.steps * 2 // 5, 1), 2e-4, IGNORED),
    }
    ids = torch.from_numpy(load_tokens(arguments.tokens, vocab_size)).to(device)
    data = split(ids, length, vocab_size)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    makers = methods(device)
    size = f"{vocab_size}x{arguments.hidden}"
    path = result_path(arguments.out, "convergence", arguments.steps, size)
    shape = {key: getattr(arguments, key) for key in ("vocab", "hidden", "layers", "length", "batch", "steps", "looks")}
    report: dict[str, Any] = {**environment(), "shape": shape, "runs": {}}
    if path.exists():
        report = json.loads(path.read_text())
        if report["shape"] != shape:
            parser.error(f"{path} holds runs of another shape, {report['shape']}: move it away, or use another --out.")

    def make(seed: int) -> Decoder:
        torch.manual_seed(seed)
        with torch.device(device):
            return Decoder(vocab_size, arguments.hidden, arguments.layers, length, dtype)

    def run(setting: str, head: Method, seed: int, model: Decoder, exact: Method | None) -> dict[str, Any]:
        return train(model, data[setting], settings[setting], head, exact, seed, arguments.batch, arguments.looks)

    def base() -> dict[str, Tensor]:
        """The weights that fine-tuning starts from, of the cache if it holds them."""
        stored = arguments.cache / f"convergence-base-{size}-{arguments.layers}-{arguments.steps}x{arguments.batch}.pt"
        if not stored.exists():
            model = make(BASE_SEED)
            run("scratch", makers[REFERENCE](), BASE_SEED, model, None)
            stored.parent.mkdir(parents=True, exist_ok=True)
            torch.save(model.state_dict(), stored.with_suffix(".part"))
            stored.with_suffix(".part").rename(stored)
            del model
        return torch.load(stored, map_location=device, weights_only=True)

    longest, cannot = LONGEST_RUN, set()
    for setting, name, seed in plan(arguments.methods, arguments.settings, arguments.seeds):
        key = f"{setting}/{name}/{seed}"
        if name in cannot or "held_out" in report["runs"].get(key, {}):
            continue
        began = time.perf_counter()
        if began - start + longest > arguments.seconds:
            print(f"{key} is for the next call: the same command.")
            break
        model = None
        try:
            head = makers[name]()
            weights = base() if setting == "finetune" else {}
            model = make(seed)
            if weights:
                model.load_state_dict(weights)
                model.take_master()
            del weights
            row = run(setting, head, seed, model, None if name == REFERENCE else makers[REFERENCE]())
        except Exception as error:  # a peer that cannot run has that as its result
            if name == REFERENCE:
                raise
            cannot.add(name)
            row = {"failed": f"{type(error).__name__}: {str(error)[:300]}"}
        del model
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()
        seconds = time.perf_counter() - began
        longest = max(1.3 * seconds, 0.0 if longest == LONGEST_RUN else longest)
        report["runs"][key] = {**row, "seconds": seconds}
        whole = path.with_suffix(".part")
        whole.write_text(json.dumps(report, indent=1) + "\n")
        whole.replace(path)
        told = row.get("failed") or f"held-out {row['held_out']:.4f}, head {row['head_ms']:.2f} ms"
        print(f"[{time.perf_counter() - start:6.1f} s] {key}: {told}", flush=True)


if __name__ == "__main__":
    main()
