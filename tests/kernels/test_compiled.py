"""The kernels compile for every GPU that they are meant for, which the interpreter does not show: types of loop
variables, registers, shared memory.

In a process of its own, without a GPU: Triton compiles for a target that a stand-in for its driver names, and every
launch becomes a compilation. Nothing runs.
"""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from triton.backends import backends

from cce_dist.kernels.triton.operands import LAUNCH

KERNELS = Path(__file__).parents[2] / "kernels/triton"

PROGRAM = """
import json, subprocess, sys, tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import jit
from triton.runtime.driver import driver

kind, arch, threads, DTYPE, BIAS, D = json.loads(sys.argv[1])
DTYPE, N = getattr(torch, DTYPE), 600


class Target:
    get_current_target = staticmethod(lambda: GPUTarget(kind, arch, threads))
    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device=None: 0)
    get_active_torch_device = staticmethod(lambda: torch.device("cpu"))


driver.set_active(Target())
launch, compiled = jit.JITFunction.run, {}


def compile_only(self, *arguments, grid, warmup, **options):
    kernel = launch(self, *arguments, grid=grid, warmup=True, **options)
    assert options["enable_fp_fusion"] and kernel.metadata.enable_fp_fusion, self.__name__
    compiled.setdefault(self.__name__, {})[kernel.hash] = kernel
    return kernel


jit.JITFunction.run = compile_only
from cce_dist.kernels.triton import (
    chosen_pairs, compact, differentiate, exact, exact_sums, parts, quantise, refine, select, summarise, tail, tokens,
    tuning, two_heads,
)
from cce_dist.kernels.triton.operands import Tail
from cce_dist.kernels.problem import (
    TILE, Estimate, Filter, GlobalTiles, Gradients, Keep, Logits, Normaliser, OutputGradients, Share, Upstream
)

V = 16 * TILE
table = tuning.choose((f"sm_{arch}" if kind == "cuda" else arch,), DTYPE.itemsize, D)
floats = lambda *shape: torch.zeros(shape)
ints = lambda n: torch.zeros(n, dtype=torch.int32)
hidden, weight = floats(N, D).to(DTYPE), floats(V, D).to(DTYPE)
logits = Logits(
    hidden,
    weight,
    floats(V) if BIAS else None,
    *(ints(N) for _ in range(3)),
    ints(V // TILE),
    ints(1),
    1.0,
    30.0 if BIAS else None,
    ints(V) if BIAS else None,
)
with tuning.forced(table):
    summary = summarise.summarise(logits, True)
    in_8_bits = DTYPE.itemsize == 2 and kind == "cuda" and arch >= 89
    if in_8_bits:
        quantise.storage_dtype = lambda x: torch.float8_e4m3fn
        moments = quantise.moments(weight), quantise.moments(hidden, ints(N), ints(1))
        form = 1.0, logits.softcap is not None
        e = quantise.quantise_hidden(hidden, *moments, ints(N), ints(1), *form)
        copy = weight.to(torch.float8_e4m3fn)
        common = quantise.Common(floats(D), floats(D), floats(1))
        c = quantise.quantise_weight(weight, logits.bias_V, logits.frequent_V, common, *form, floats(1), copy)
        e.margin(floats(1))
        numbers = e.scale_N, c.scale_V, e.offset_N, c.offset_V, e.variance_N, e.hopeless_N, floats(1)
        copies = {"hidden_ND": e.rows_ND, "weight_VD": c.rows_VD, "bias_V": None}
        places = summarise.Partials(*(floats(16, N) for _ in range(3))), summary.tiles.lse_TN, 1
        summarise.launch(logits._replace(**copies), quantise.InEightBits(*numbers), *places, table.for_8_bits())
    summarise.join(summary, summary, None)
    summarise.join(summary, summary, Share(ints(1), ints(1), 0, 2))
    normaliser = Normaliser(floats(N), floats(N), 0.69)
    refine.refine(logits, Estimate(summary, floats(N)), normaliser, 0.01)
    filter_ = Filter("unbiased", 0.01, most_drawn=4.0, seed=torch.zeros(1, dtype=torch.int64))
    pairs = select.select(logits, summary.tiles, floats(N), filter_)
    upstream = Upstream(floats(N), floats(N), torch.ones(()))
    select.tail_rows(logits, pairs, upstream, floats(V), DTYPE, 1.0)
    tail.tail_means(logits, pairs, torch.ones(()))
    whole_tail = Tail(floats(V), floats(V // TILE, D).to(DTYPE), floats(V // TILE) if BIAS else None)
    for dhidden, dweight in ((floats(N, D), weight.clone()), (floats(N, D), None), (None, weight.clone())):
        dbias = floats(V) if BIAS and dweight is not None else None
        out = Gradients(dhidden, dweight, dbias)
        for of_tail in (whole_tail, Tail()) if dhidden is not None and dweight is not None else (whole_tail,):
            differentiate.differentiate(logits, pairs, normaliser, upstream, out, of_tail, 1.0, 1 << 20)
    exact.differentiate_exactly(logits, normaliser, upstream, None, None, floats(V), 1.0, 1 << 20)
    plain = logits._replace(bias_V=None, frequent_V=None)
    for sloped in (True, False):
        kept = summarise.summarise(plain, False, False, Keep(V, sloped)).exponentials
        out = floats(N, D), weight.clone(), None
        exact.differentiate_exactly(plain, normaliser, upstream, *out, 1.0, 1 << 20, exponentials=kept)
    if arch in (80, 90, 100) and D > 1000:
        # With an entropy and temperatures, as `linear_logprobs` has them; of others the same kernels stand for these.
        warm, of_entropy = logits._replace(inverse_temperature_N=floats(N)), upstream._replace(log_N=floats(N))
        summarise.summarise(warm, True, True)
        select.tail_rows(warm, pairs, of_entropy, floats(V), DTYPE, 1.0)
        tail.tail_means(warm, pairs, torch.ones(()))
        out = Gradients(floats(N, D), weight.clone(), floats(V) if BIAS else None)
        differentiate.differentiate(warm, pairs, normaliser, of_entropy, out, whole_tail, 1.0, 1 << 20)
        exact.differentiate_exactly(warm, normaliser, of_entropy, None, None, floats(V), 1.0, 1 << 20)
        # With an adapter, whose rows are trained in place of the classifier's.
        adapted = logits._replace(adapter_NR=floats(N, 16).to(DTYPE), adapter_VR=floats(V, 16).to(DTYPE))
        summary = summarise.summarise(adapted, True)
        if in_8_bits:
            summarise.launch(adapted._replace(**copies), quantise.InEightBits(*numbers), *places, table.for_8_bits())
        refine.refine(adapted, Estimate(summary, floats(N)), normaliser, 0.01)
        tail.tail_means(adapted, pairs, torch.ones(()))
        exact.differentiate_exactly(adapted, normaliser, upstream, None, None, floats(V), 1.0, 1 << 20)
    for rows, tokens_now in ((V, N), (V - 5, 1)):  # one binary serves every shard and every number of tokens
        some = logits._replace(weight_VD=weight[:rows], frequent_V=None, inverse_temperature_N=floats(tokens_now))
        some = some._replace(**{name: ints(tokens_now) for name in ("target_N", "token_N", "place_N")})
        sums = exact_sums.sum_tiles(some, GlobalTiles(((0, TILE),) * tokens_now, ints(tokens_now), ints(tokens_now)))
        exact_sums.exact_units(sums, sums.max_N, ints(1))
    labels = torch.zeros(N, dtype=torch.int64)
    order = tokens.valid_first(labels, labels, -100, V).order
    tokens.losses(normaliser, floats(N), order)
    tokens.upstream(OutputGradients(floats(N), None), order, DTYPE)
    tokens.upstream(OutputGradients(floats(N), floats(N), floats(N)), order, DTYPE, floats(N), floats(N))
    parts.in_parts(floats(V, D), floats(V, 3 * D).to(DTYPE))
    compact.compacted(logits)
    compact.scatter_rows(floats(N, D), ints(N), ints(1), DTYPE)
    compact.write_rows(weight, floats(N, D), ints(N))
    index = torch.zeros(N, dtype=torch.int64)
    chosen_pairs.products(hidden, weight, index, index)
    chosen_pairs.sum_of_tokens(floats(N), weight, index, index, N, DTYPE)
    chosen_pairs.add_to_rows(weight.clone(), floats(N), hidden, index, index)
    cap = 30.0 if BIAS else None
    side = two_heads.Side(floats(N, V), floats(V) if BIAS else None, 1.0, cap)
    for divergence in ("forward", "reverse", "jsd"):
        two_heads.add(floats(5, N), side, side, divergence)
        two_heads.slope(side, side, floats(2, N), floats(N), floats(N), divergence, 0.5, floats(N, V).to(DTYPE))
    two_heads.add_mixture(floats(2, N), side, side, floats(2, N), 0.5)


def usage(kernel):
    # (registers of a thread, bytes that it spills), as the assembler wrote them into the binary
    if kind != "cuda":
        text = kernel.asm["amdgcn"]
        numbers = {name: text.rsplit(name, 1)[1].split()[0] for name in (".vgpr_count:", ".vgpr_spill_count:")}
        return int(numbers[".vgpr_count:"]), 4 * int(numbers[".vgpr_spill_count:"])
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    numbers = dict(part.split(":") for part in said.split() if part.startswith(("REG:", "STACK:", "LOCAL:")))
    return int(numbers["REG"]), int(numbers["STACK"]) + int(numbers["LOCAL"])


used = {name: [(k.metadata.shared, *usage(k)) for k in kernels.values()] for name, kernels in compiled.items()}
if arch in (80, 90, 100) and D > 1000:
    # With an adapter, compiled alone too: on sm_90 it spills up to 290 bytes.
    with tuning.forced(table):
        out = Gradients(floats(N, D), floats(V, 16).to(DTYPE), floats(V) if BIAS else None, floats(N, 16))
        of_rows = whole_tail._replace(sum_TD=floats(V // TILE, 16).to(DTYPE))
        differentiate.differentiate(adapted, pairs, normaliser, upstream, out, of_rows, 1.0, 1 << 20)
if arch == 90 and D > 1000:
    # Onto what is there, in fp32: compiled alone, since it takes up to 152 bytes of stack, 24 more than the others.
    with tuning.forced(table):
        compact.write_rows(floats(V, D), floats(N, D), ints(N), True)
        onto = Gradients(floats(N, D), floats(V, D), floats(V) if BIAS else None)
        differentiate.differentiate(logits, pairs, normaliser, upstream, onto, whole_tail, 1.0, 1 << 20, None, True)
    compiled.clear()
    wide = logits._replace(weight_VD=floats(V, D))
    with tuning.forced(table):  # beside hidden states in bf16: of copies in bf16
        summarise.summarise(wide, True)
        exact.differentiate_exactly(wide, normaliser, upstream, None, None, floats(V), 1.0, 1 << 20)
    with tuning.forced(table.for_fp32_rows()):  # of the rows themselves: one program a multiprocessor
        refine.refine(wide, Estimate(summary, floats(N)), normaliser, 0.01)
        tail.tail_means(wide, pairs, torch.ones(()))
        out = Gradients(floats(N, D), floats(V, D), floats(V) if BIAS else None)
        differentiate.differentiate(wide, pairs, normaliser, upstream, out, whole_tail, 1.0, 1 << 20)
        exact_sums.sum_tiles(wide, GlobalTiles(((0, TILE),), ints(1), ints(1)))
    for name, kernels in compiled.items():
        for kernel in kernels.values():
            assert kernel.metadata.shared <= 227 << 10 and usage(kernel)[1] <= 128, (name, usage(kernel))
print(json.dumps(used))
"""


def test_every_launch_asks_for_fused_multiply_adds() -> None:
    """Triton's default is changing: without them every kernel is slower, and rounds otherwise."""
    launches = [
        (file.name, node)
        for file in sorted(KERNELS.glob("*.py"))
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Subscript)
        and ast.unparse(node.func.value).endswith("_kernel")
    ]
    assert len(launches) > 10
    plain = [
        f"{name}:{node.lineno}"
        for name, node in launches
        if not any(word.arg is None and ast.unparse(word.value) == "LAUNCH" for word in node.keywords)
    ]
    assert not plain, f"launched without **LAUNCH: {plain}"
    assert LAUNCH["enable_fp_fusion"] is True


SHARED = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99, "gfx942": 64}
"""Kilobytes of shared memory that a program may have, by target."""
CASES = [
    ("cuda", 90, "bfloat16", False, 2304),  # by tensor descriptors
    ("cuda", 90, "float16", True, 100),  # by pointers
    *(("cuda", arch, "bfloat16", True, 2304) for arch in (80, 86, 89, 100, 120)),
    ("hip", "gfx942", "bfloat16", True, 2304),
]


@pytest.mark.full
@pytest.mark.parametrize(("kind", "arch", "dtype", "bias", "hidden_size"), CASES)
def test_the_kernels_compile_for_every_gpu_within_its_limits(
    kind: str, arch: int | str, dtype: str, bias: bool, hidden_size: int
) -> None:
    if {"cuda": "nvidia", "hip": "amd"}[kind] not in backends:
        pytest.skip(f"this Triton has no backend for {kind}")
    case = json.dumps([kind, arch, 64 if kind == "hip" else 32, dtype, bias, hidden_size])
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, case], env=environment, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    used = json.loads(done.stdout)
    in_8_bits = kind == "cuda" and int(arch) >= 89
    files = {file.stem: file.read_text() for file in KERNELS.glob("*.py") if in_8_bits or file.stem != "quantise"}
    assert set(used) == {name for text in files.values() for name in re.findall(r"\ndef (\w+_kernel)\(", text)}
    programs = 2 if arch == 90 else 1  # a multiprocessor's, of the sparse backward
    assert len(used["_sum_tiles_kernel"]) == len(used["_exact_units_kernel"]) == 1
    for name, kernels in used.items():
        most = SHARED[arch] << 10
        if name == "_differentiate_kernel":
            most = most // programs - 1024  # a program's own
        for shared, registers, spilled in kernels:
            assert shared <= most, (name, shared)
            assert registers <= (512 if kind == "hip" else 255), (name, registers)
            # By pointers, where rows do not begin at multiples of 16 bytes, a block's addresses do not fit either.
            assert spilled <= (128 if hidden_size % 8 == 0 else 2048), (name, spilled)
