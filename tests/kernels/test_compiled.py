"""The kernels compile for Hopper, which the interpreter does not show: types of loop variables, shared memory.

In a process of its own, without a GPU: Triton compiles for a target that a stand-in for its driver names, and every
launch becomes a compilation. Nothing runs.
"""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from cce_dist.kernels.blocks import LAUNCH

KERNELS = Path(__file__).parents[2] / "kernels"

PROGRAM = """
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import jit
from triton.runtime.driver import driver


class Hopper:
    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))
    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device=None: 0)
    get_active_torch_device = staticmethod(lambda: torch.device("cpu"))


driver.set_active(Hopper())
launch, shared = jit.JITFunction.run, {}


def compile_only(self, *arguments, grid, warmup, **options):
    kernel = launch(self, *arguments, grid=grid, warmup=True, **options)
    assert options["enable_fp_fusion"] and kernel.metadata.enable_fp_fusion, self.__name__
    shared.setdefault(self.__name__, []).append(kernel.metadata.shared)
    return kernel


jit.JITFunction.run = compile_only
from cce_dist.kernels import compact, differentiate, exact, quantise, refine, select, summarise, tail, tuning
from cce_dist.kernels.problem import TILE, Estimate, Filter, Logits, Normaliser, Summary, Tiles, Upstream

DTYPE, BIAS, D, N, V = DTYPE_, BIAS_, D_, 600, 16 * TILE
table = tuning.choose(("sm_90",), DTYPE.itemsize, D)
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
)
with tuning.forced(table):
    summary = summarise.summarise(logits, True)
    if DTYPE.itemsize == 2:
        quantise.storage_dtype = lambda x: torch.float8_e4m3fn
        moments = quantise.moments(weight), quantise.moments(hidden, ints(N), ints(1))
        form = 1.0, logits.softcap is not None
        e = quantise.quantise_hidden(hidden, *moments, ints(N), ints(1), *form)
        copy = weight.to(torch.float8_e4m3fn)
        commons = floats(D), floats(D), floats(1)
        c = quantise.quantise_weight(weight, logits.bias_V, *commons, *form, floats(1), copy)
        numbers = e.scale_N, c.scale_V, e.offset_N, c.offset_V, e.variance_N, e.hopeless_N, floats(1)
        summarise._launch(
            logits._replace(hidden_ND=e.rows_ND, weight_VD=c.rows_VD, bias_V=None),
            summarise.InEightBits(*numbers),
            tuple(floats(16, N) for _ in range(3)),
            summary.tiles.lse_TN,
            1,
            table.for_8_bits(),
        )
    normaliser = Normaliser(floats(N), floats(N), 0.69)
    refine.refine(logits, Estimate(summary, floats(N)), normaliser, 0.01)
    filter_ = Filter("unbiased", 0.01, most_drawn=4.0, seed=torch.zeros(1, dtype=torch.int64))
    selection = select.Selection(logits, summary.tiles, floats(N), filter_)
    upstream = Upstream(floats(N), floats(N), torch.ones(()))
    selection.tail_rows(upstream, DTYPE, 1.0)
    tail.tail_means(logits, selection, torch.ones(()))
    whole_tail = (floats(V), floats(V // TILE, D), floats(V // TILE))
    for dhidden, dweight in ((floats(N, D), weight.clone()), (floats(N, D), None), (None, weight.clone())):
        differentiate.differentiate(
            logits, selection, normaliser, upstream, dhidden, dweight, None, whole_tail, 1.0, 1 << 20
        )
    exact.differentiate_exactly(logits, normaliser, upstream, None, None, floats(V), 1.0, 1 << 20)
    compact.compacted(logits)
    compact.scatter_rows(floats(N, D), torch.arange(N), ints(1), DTYPE)
most = 232448 // (table.pair_programs if DTYPE.itemsize == 2 else 1) - 1024  # a program's own 1 KB
assert max(shared["_differentiate_kernel"]) <= most, shared
assert max(max(sizes) for sizes in shared.values()) <= 232448, shared
print(*shared)
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


@pytest.mark.full
@pytest.mark.parametrize(
    ("dtype", "bias", "hidden_size"),
    [("bfloat16", False, 2304), ("float16", True, 100)],  # by tensor descriptors, and by pointers
)
def test_the_kernels_compile_for_hopper_and_fit_its_shared_memory(dtype: str, bias: bool, hidden_size: int) -> None:
    program = PROGRAM.replace("DTYPE_", f"torch.{dtype}").replace("BIAS_", str(bias)).replace("D_,", f"{hidden_size},")
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    files = [file.read_text() for file in KERNELS.glob("*.py")]
    assert set(done.stdout.split()) == {name for text in files for name in re.findall(r"\ndef (\w+_kernel)\(", text)}
