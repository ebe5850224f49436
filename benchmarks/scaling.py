"""How kept pairs and time of the loss grow with tokens, vocabulary and shards, on trained inputs.

    python benchmarks/scaling.py --tokens tokens.npz --out benchmarks/results

Three series, all in the default mode (unbiased), each row with the milliseconds of one cuBLAS product of its shape:
  tokens      N from 2k to 64k at the largest V: the first N tokens after one training run.
  vocabulary  V from 32k to 256k at 8k tokens: a model trained anew for each V with as many steps, on ids mapped to V
              (distinct ids spread evenly in their order; where there are more than V, the rarest become one id).
  shards      W = 1, 2, 4, 8 contiguous shards at 8k tokens, each run alone with the log-sum-exp of all shards: ms of
              every shard's first pass, refinement and backward, its share of the frequent rows' work included, the
              largest of each, and their sum, of which what collectives take is no part; largest / mean, the imbalance.
Pairs are counted from exact softmax masses in plain torch: large ones (kept whatever is drawn), and the expected number
of kept ones. For the shards also a simulation, from those counts alone, of classifier rows permuted in tiles of 256:
dealt to the shards in turn, or greedily by load with as many tiles for each shard; "held out" deals by the loads of the
first half of the tokens and is judged by those of the second.

The JSON is written after each series, and the seconds of each phase are printed.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from inputs import Inputs, set_counts, tokens_for, trained_inputs
from loss import dtype_on, environment, result_path
from shards import count_pairs, differentiate, first_pass, merge, refine, shard_of
from timing import Phases, interleaved_ms
from torch import Tensor

from cce_dist import linear_cross_entropy

SERIES = ("tokens", "vocabulary", "shards")
PHASES = ("first_pass", "refine", "backward")


def measure_whole(inputs: Inputs, rounds: int) -> dict[str, Any]:
    """Pairs and times of the whole loss on one device."""
    hidden_ND, weight_VD = (x.detach().requires_grad_() for x in inputs[:2])
    shard = shard_of(inputs)
    tokens, eps = hidden_ND.shape[0], shard.method.filter_eps
    pairs = count_pairs(inputs, eps, frequent_K=shard.frequent_K)

    def loss() -> Tensor:
        set_counts(weight_VD, inputs)
        return linear_cross_entropy(hidden_ND, weight_VD, inputs.labels_N)

    runs = {
        "gemm": lambda: hidden_ND.detach() @ weight_VD.detach().T,
        "forward": loss,
        "both": lambda: torch.autograd.grad(loss(), (hidden_ND, weight_VD)),
    }
    times = interleaved_ms(runs, rounds, hidden_ND.device.type)
    return {
        "num_tokens": tokens,
        "vocab_size": weight_VD.shape[0],
        "filter_eps": eps,
        "frequent_rows": shard.method.frequent_rows,
        "large_pairs": pairs.large_T.sum().item(),
        "expected_pairs": pairs.expected_T.sum().item(),
        "expected_pairs_per_token": pairs.expected_T.sum().item() / tokens,
        **{f"{name}_ms": ms for name, ms in times.items()},
        "both_x": times["both"] / times["gemm"],
    }


def measure_shards(inputs: Inputs, world: int, rounds: int) -> dict[str, Any]:
    """Times of each of ``world`` shards alone, phase by phase; where ranks wait for each other, the slowest counts."""
    shards = [shard_of(inputs, rank, world) for rank in range(world)]
    firsts = [first_pass(shard) for shard in shards]
    estimates = merge([first.summary for first in firsts])
    summaries = [refine(shard, first, estimates) for shard, first in zip(shards, firsts, strict=True)]
    normaliser = merge(summaries)
    seed = torch.zeros(1, dtype=torch.int64, device=normaliser.max_N.device)
    hidden_ND, weight_VD = inputs.hidden_ND.detach(), inputs.weight_VD.detach()
    runs: dict[str, Any] = {"gemm": lambda: hidden_ND @ weight_VD.T}
    for rank, (shard, first, summary) in enumerate(zip(shards, firsts, summaries, strict=True)):
        runs[f"first_pass {rank}"] = lambda shard=shard: first_pass(shard)
        runs[f"refine {rank}"] = lambda shard=shard, first=first: refine(shard, first, estimates)
        runs[f"backward {rank}"] = lambda shard=shard, summary=summary: differentiate(shard, summary, normaliser, seed)
    times = interleaved_ms(runs, rounds, hidden_ND.device.type)
    result: dict[str, Any] = {"world": world, "gemm_ms": times["gemm"], "filter_eps": shards[0].method.filter_eps}
    result["frequent_rows"] = shards[0].method.frequent_rows
    for stage in PHASES:
        ms = [times[f"{stage} {rank}"] for rank in range(world)]
        result |= {f"{stage}_ms": ms, f"{stage}_max_ms": max(ms), f"{stage}_imbalance": imbalance(ms)}
    slowest = sum(result[f"{stage}_max_ms"] for stage in PHASES)
    mean = sum(sum(result[f"{stage}_ms"]) for stage in PHASES) / world
    return {
        **result,
        "both_max_ms": slowest,
        "both_imbalance": slowest / mean,
        "of_gemm": slowest * world / times["gemm"],
    }


def imbalance(loads: list[float]) -> float:
    """Largest / mean."""
    return max(loads) * len(loads) / sum(loads)


def contiguous(load_T: np.ndarray, world: int) -> np.ndarray:
    """The shard of each tile, in runs as even as tiles allow."""
    return np.arange(len(load_T)) // -(-len(load_T) // world)


def in_turn(load_T: np.ndarray, world: int) -> np.ndarray:
    return np.arange(len(load_T)) % world


def greedy(load_T: np.ndarray, world: int) -> np.ndarray:
    """The heaviest tile first, each to the lightest shard that has room: all shards hold as many tiles."""
    room = np.full(world, -(-len(load_T) // world))
    load_W, shard_T = np.zeros(world), np.empty(len(load_T), dtype=np.int64)
    for tile in np.argsort(-load_T, kind="stable"):
        shard = np.where(room > 0, load_W, np.inf).argmin()
        shard_T[tile] = shard
        load_W[shard] += load_T[tile]
        room[shard] -= 1
    return shard_T


def simulate_permutation(first_T: np.ndarray, second_T: np.ndarray, world: int) -> dict[str, Any]:
    """Expected kept pairs per shard, and their imbalance, for ways to deal tiles; the loads of two halves of tokens."""
    whole_T = first_T + second_T
    ways = {
        "contiguous": (contiguous(whole_T, world), whole_T),
        "in turn": (in_turn(whole_T, world), whole_T),
        "greedy": (greedy(whole_T, world), whole_T),
        "greedy, held out": (greedy(first_T, world), second_T),
    }
    result = {}
    for name, (shard_T, load_T) in ways.items():
        pairs = np.bincount(shard_T, weights=load_T, minlength=world).tolist()
        result[name] = {"expected_pairs": pairs, "imbalance": imbalance(pairs)}
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=Path, required=True, help=".npy or .npz of token ids")
    parser.add_argument("--series", nargs="+", choices=SERIES, default=list(SERIES))
    parser.add_argument("--counts", nargs="+", type=int, default=[2048 << k for k in range(6)], help="N of the series")
    parser.add_argument("--vocabularies", nargs="+", type=int, default=[32768 << k for k in range(4)])
    parser.add_argument("--worlds", nargs="+", type=int, default=[1, 2, 4, 8])
    parser.add_argument("--num-tokens", type=int, default=8192, help="N of the other two series")
    parser.add_argument("--hidden", type=int, default=2304, help="hidden size")
    parser.add_argument("--steps", type=int, default=400, help="training steps for the inputs; 0: at initialisation")
    parser.add_argument("--cache", type=Path, help="folder of trained inputs, shared by the commands")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="folder for the JSON file")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: to try the command out")
    arguments = parser.parse_args()
    largest = max(arguments.vocabularies)
    if largest % max(arguments.worlds):
        parser.error(f"the largest vocabulary must be a multiple of {max(arguments.worlds)}, the most shards")
    phases = Phases()

    def train(vocab_size: int, num_tokens: int) -> Inputs:
        inputs = trained_inputs(
            tokens_for(arguments.tokens, vocab_size),
            num_tokens,
            vocab_size,
            arguments.hidden,
            steps=arguments.steps,
            dtype=dtype_on(arguments.device),
            device=arguments.device,
            cache=arguments.cache,
        )
        torch.cuda.empty_cache()
        phases.done(f"training at V = {vocab_size}: loss {inputs.loss:.3f}")
        return inputs

    most = max(*arguments.counts, arguments.num_tokens) if "tokens" in arguments.series else arguments.num_tokens
    all_inputs = train(largest, most)
    inputs = first_tokens(all_inputs, arguments.num_tokens)
    report: dict[str, Any] = {
        **environment(), "steps": arguments.steps, "hidden_size": arguments.hidden,
        "model_loss": inputs.loss,
    }  # fmt: skip

    def write(series: str) -> None:
        phases.done(f"series {series}")
        if arguments.out:
            path = result_path(arguments.out, "scaling", arguments.steps, f"{largest}x{arguments.hidden}")
            path.write_text(json.dumps(report, indent=2) + "\n")

    if "tokens" in arguments.series:
        report["tokens"] = []
        for count in arguments.counts:
            report["tokens"].append(measure_whole(first_tokens(all_inputs, count), arguments.rounds))
            print_row(report["tokens"][-1])
        write("tokens")
    del all_inputs
    if "shards" in arguments.series:
        whole = shard_of(inputs)
        half, eps = arguments.num_tokens // 2, whole.method.filter_eps
        halves = [
            count_pairs(inputs, eps, rows, whole.frequent_K).expected_T.cpu().numpy()
            for rows in (slice(None, half), slice(half, None))
        ]
        report["shards"] = []
        for world in arguments.worlds:
            row = measure_shards(inputs, world, arguments.rounds)
            row["expected_pairs"] = simulate_permutation(*halves, world)
            report["shards"].append({"num_tokens": arguments.num_tokens, "vocab_size": largest, **row})
            print_shards(row)
        write("shards")
    if "vocabulary" in arguments.series:
        report["vocabulary"] = []
        for vocab_size in sorted(arguments.vocabularies, reverse=True):
            if vocab_size != largest:
                del inputs
                inputs = train(vocab_size, arguments.num_tokens)
            row = measure_whole(inputs, arguments.rounds)
            report["vocabulary"].insert(0, {**row, "model_loss": inputs.loss})
            print_row(row)
        write("vocabulary")


def first_tokens(inputs: Inputs, count: int) -> Inputs:
    return inputs._replace(hidden_ND=inputs.hidden_ND[:count], labels_N=inputs.labels_N[:count])


def print_row(row: dict[str, Any]) -> None:
    pairs = f"{row['expected_pairs_per_token']:.2f} pairs a token ({row['large_pairs'] / row['num_tokens']:.2f} large)"
    times = f"forward {row['forward_ms']:.2f} ms, both {row['both_ms']:.2f} ms = {row['both_x']:.2f}x"
    print(f"N = {row['num_tokens']}, V = {row['vocab_size']}: {pairs}; {times}", flush=True)


def print_shards(row: dict[str, Any]) -> None:
    for stage in PHASES:
        shown = " ".join(f"{ms:.2f}" for ms in row[f"{stage}_ms"])
        print(f"W = {row['world']}, {stage} ms: {shown}; max/mean {row[f'{stage}_imbalance']:.2f}")
    both = f"both: {row['both_max_ms']:.2f} ms = {row['of_gemm']:.2f} times GEMM / W"
    print(f"W = {row['world']}, {both}, max/mean {row['both_imbalance']:.2f}")
    shown = ", ".join(f"{name} {way['imbalance']:.2f}" for name, way in row["expected_pairs"].items())
    print(f"W = {row['world']}, max/mean of expected pairs: {shown}", flush=True)


if __name__ == "__main__":
    main()
