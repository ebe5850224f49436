"""What it costs that the hosts agree on every call: microseconds of the exchange alone, and of a step bound by hosts.

    torchrun --nproc-per-node 8 benchmarks/agreement.py --device cpu --out benchmarks/results
    torchrun --nproc-per-node 2 benchmarks/agreement.py --out benchmarks/results

The exchange alone is a hundredth of a hundred of them, one after the other. The step is forward and backward of the
loss on so few tokens that the host's launches take longer than the device's work, once with agreement="every_call" and
once with "first_call", in turns. Both layouts; the slowest rank's medians.
"""

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from loss import environment

from cce_dist import VocabShard, linear_cross_entropy
from cce_dist.shard.agreement import A_LOSS, agree
from cce_dist.train.place import local_device

WARM_UP, IN_A_ROW = 20, 100


def microseconds(runs: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median of each run on the host, one of each per round, after a barrier; the largest over ranks."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds + WARM_UP):
        for name, run in runs.items():
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            dist.barrier()
            start = time.perf_counter()
            repeats = IN_A_ROW if name == "exchange" else 1
            for _ in range(repeats):
                run()
            if turn >= WARM_UP:
                times[name].append((time.perf_counter() - start) * 1e6 / repeats)
    medians = torch.tensor([median(values) for values in times.values()])
    dist.all_reduce(medians, dist.ReduceOp.MAX)
    return dict(zip(runs, medians.tolist(), strict=True))


def measure(layout: str, device: torch.device, rounds: int, tokens: int, vocab: int, dim: int) -> dict[str, float]:
    world = dist.group.WORLD
    shard = VocabShard.even(vocab, world, world if layout == "sharded" else None)
    draw = torch.Generator().manual_seed(0 if layout == "replicated" else dist.get_rank())
    hidden = torch.randn(tokens, dim, generator=draw).to(device, torch.bfloat16).requires_grad_()
    weight = torch.randn(shard.num_rows, dim).to(device).requires_grad_()
    labels = torch.randint(vocab, (tokens,), generator=draw).to(device)

    def step(agreement: Any) -> None:
        loss = linear_cross_entropy(hidden, weight, labels, shard=shard, max_tokens=tokens, agreement=agreement)
        loss.backward()

    alike = {f"setting {number}": number for number in range(24)}
    return microseconds(
        {
            "exchange": lambda: agree(shard, A_LOSS, tokens, alike),
            "step, every call": lambda: step("every_call"),
            "step, first call": lambda: step("first_call"),
        },
        rounds,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=300)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--out", type=Path, help="folder for the JSON")
    given = parser.parse_args()
    torch.set_num_threads(1)
    device, backend = local_device() if given.device == "cuda" else (torch.device("cpu"), "gloo")
    dist.init_process_group(backend)
    sizes = (given.rounds, given.tokens, given.vocab, given.dim)
    layouts = {layout: measure(layout, device, *sizes) for layout in ("replicated", "sharded")}
    if dist.get_rank() == 0:
        about = {**environment(), "ranks": dist.get_world_size(), "cores": os.cpu_count()}
        result = {
            **about,
            "tokens a rank": given.tokens,
            "vocab": given.vocab,
            "dim": given.dim,
            "microseconds": layouts,
        }
        print(json.dumps(result, indent=2))
        if given.out is not None:
            given.out.mkdir(parents=True, exist_ok=True)
            name = f"agreement-{given.device}-{dist.get_world_size()}-ranks.json"
            (given.out / name).write_text(json.dumps(result, indent=2) + "\n")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
