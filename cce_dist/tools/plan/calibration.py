"""Milliseconds of one GPU: a model of two terms a pass, fitted to the results of `benchmarks/loss.py`; and what links
reach, from those of `benchmarks/ranks.py`.

In: result files. Out: a `Calibration`, from which `compute_ms` gives the time of other shapes and GPUs.
"""

import itertools
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from cce_dist.tools.plan.job import GPUS
from cce_dist.tools.plan.links import Links, measured_links

MEASURED = Path(__file__).parents[2] / "measured"
"""The result files of the benchmarks: a link to benchmarks/results."""


STOCK = "torch.compile"
"""The measured method that the heads with logits are planned with."""


class Calibration(NamedTuple):
    """Fitted coefficients, in seconds for each unit of a term (`_dense_terms`, `_sparse_terms`), by method.

    Attributes:
        gpu: a key of `GPUS`, the one that was measured.
        product: of hidden · weightᵀ alone, in seconds a FLOP.
        logit_bytes: peak memory per logit of the methods that form logits.
        error: the largest relative deviation of a fitted forward or forward + backward from its measurement.
    """

    gpu: str
    product: float
    forward: dict[str, tuple[float, float]]
    backward: dict[str, tuple[float, float]]
    logit_bytes: dict[str, float]
    error: float
    shapes: tuple[str, ...]
    links: Links


def calibrate(files: Sequence[Path], gpu: str) -> Calibration:
    """Fits the model to result files of `benchmarks/loss.py` and `ranks.py`: of ``gpu``, or else of any known GPU.

    Raises:
        ValueError: no usable measurement; a file that is not such a result.
    """
    by_gpu: dict[str, dict[str, Any]] = {}
    of_ranks: list[tuple[str, dict[str, Any]]] = []
    for file in sorted(files):
        try:
            content = json.loads(file.read_text())
            key = next((key for key in GPUS if re.search(rf"\b{key}\b", content["gpu"].lower())), None)
            shapes = content["shapes"]
        except (OSError, ValueError, LookupError, AttributeError, TypeError) as fault:
            raise ValueError(f"{file} is not a result of benchmarks/loss.py or ranks.py: {fault!r}.") from None
        if key is not None and "ranks" in content:
            of_ranks.append((key, content))
        elif key is not None and content.get("steps") != 0:  # 0: inputs of an untrained model, flat softmaxes
            by_gpu.setdefault(key, {}).update(shapes)  # of a shape that several files hold, the last one's
    if not by_gpu:
        raise ValueError(
            f"no measurement of a GPU among {', '.join(GPUS)} in {[str(file) for file in files]}; pass result files of "
            "benchmarks/loss.py with --measured."
        )
    measured = gpu if gpu in by_gpu else max(by_gpu, key=lambda key: len(by_gpu[key]))
    results = by_gpu[measured]
    forward, backward, logit_bytes, error = {}, {}, {}, 0.0
    names = [name for name in next(iter(results.values()))["methods"] if name == STOCK or name.startswith("cce_dist")]
    for name in names:
        rows = [(_shape(r), r["methods"][name]) for r in results.values() if "both_ms" in r["methods"].get(name, {})]
        if not rows:
            continue
        forward_ms, both_ms = ([row[key] for _, row in rows] for key in ("forward_ms", "both_ms"))
        terms = _sparse_terms if _is_sparse(name) else _dense_terms
        forward[name] = _fit([_dense_terms(*shape) for shape, _ in rows], forward_ms)
        backward_ms = [both - first for both, first in zip(both_ms, forward_ms, strict=True)]
        backward[name] = _fit([terms(*shape) for shape, _ in rows], backward_ms)
        if name == STOCK:
            logit_bytes[name] = sum(r["peak_mb"] * 1e6 / (n * v) for (n, v, _), r in rows) / len(rows)
        for (shape, _), first, both in zip(rows, forward_ms, both_ms, strict=True):
            fitted = 1e3 * _dot(forward[name], _dense_terms(*shape))
            whole = fitted + 1e3 * _dot(backward[name], terms(*shape))
            error = max(error, abs(fitted / first - 1), abs(whole / both - 1))
    flops = [(2 * math.prod(_shape(r)), r["gemm_ms"] / 1e3) for r in results.values()]
    product = sum(seconds / count for count, seconds in flops) / len(flops)
    return Calibration(
        measured, product, forward, backward, logit_bytes, error, tuple(results), measured_links(of_ranks, gpu)
    )


def compute_ms(
    calibration: Calibration, method: str, gpu: str, tokens: int, rows: int, hidden: int, share: float = 1.0
) -> float:
    """Forward and backward of one GPU's loss on ``tokens`` by ``rows`` of the classifier.

    Args:
        share: of the (token, tile) pairs that the sparse backward keeps, those that fall on this GPU's rows.

    Raises:
        ValueError: the method was not measured.
    """
    if method not in calibration.forward:
        raise ValueError(f"{method!r} was not measured; there is {', '.join(calibration.forward)}.")
    measured, planned = GPUS[calibration.gpu], GPUS[gpu]
    arithmetic, memory = measured.flops / planned.flops, measured.bandwidth / planned.bandwidth
    dense = _dense_terms(tokens, rows, hidden)
    seconds = _dot(calibration.forward[method], dense) * arithmetic
    if _is_sparse(method):
        pairs, passes = _sparse_terms(tokens, rows, hidden)
        seconds += _dot(calibration.backward[method], (share * pairs, passes)) * memory
    else:
        seconds += _dot(calibration.backward[method], dense) * arithmetic
    return seconds * 1e3


def spared_ms(calibration: Calibration, method: str, gpu: str, tokens: int, kept: int, hidden: int) -> float:
    """What an exact backward spares on ``kept`` rows of which forward keeps exponentials: one of three products, less
    the memory traffic of a number that is written beside the products. Derived, not measured."""
    measured, planned = GPUS[calibration.gpu], GPUS[gpu]
    backward = _dot(calibration.backward[method], _dense_terms(tokens, kept, hidden)) * measured.flops / planned.flops
    return max(backward / 3 - 2 * tokens * kept / planned.bandwidth, 0.0) * 1e3


def _is_sparse(method: str) -> bool:
    return method in ("cce_dist unbiased", "cce_dist filtered")


def _dense_terms(tokens: int, vocab: int, hidden: int) -> tuple[float, float]:
    """Products of hidden · weightᵀ's size, and passes over the logits."""
    return float(tokens) * vocab * hidden, float(tokens) * vocab


def _sparse_terms(tokens: int, vocab: int, hidden: int) -> tuple[float, float]:
    """Kept pairs, a number of them for each token, times D; and passes over the classifier."""
    return float(tokens) * hidden, float(vocab) * hidden


def _shape(result: Mapping[str, Any]) -> tuple[int, int, int]:
    return result["num_tokens"], result["vocab_size"], result["hidden_size"]


def _dot(coefficients: Sequence[float], terms: Sequence[float]) -> float:
    return sum(a * b for a, b in zip(coefficients, terms, strict=True))


def _fit(terms: Sequence[Sequence[float]], ms: Sequence[float]) -> tuple[float, float]:
    """Non-negative coefficients, in seconds, by least squares of the relative deviations."""
    relative = torch.tensor(terms, dtype=torch.float64) / torch.tensor(ms, dtype=torch.float64)[:, None] * 1e3
    columns = relative.shape[1]
    best, least = (0.0, 0.0), math.inf
    subsets = itertools.chain.from_iterable(itertools.combinations(range(columns), k) for k in range(1, columns + 1))
    for chosen in subsets:
        if len(chosen) > len(ms):
            continue  # as many measurements as coefficients are needed
        scale = relative[:, chosen].amax(0)
        found = torch.linalg.lstsq(relative[:, chosen] / scale, torch.ones(len(ms), 1, dtype=torch.float64)).solution
        solution = found[:, 0] / scale
        deviation = float((relative[:, chosen] @ solution - 1).square().sum())
        if bool((solution >= 0).all()) and deviation < least:
            filled = [0.0] * columns
            for column, value in zip(chosen, solution.tolist(), strict=True):
                filled[column] = value
            best, least = (filled[0], filled[1]), deviation
    return best
