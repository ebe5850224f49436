"""Refreshes kernels/triton/tuning.json for this GPU: block shapes and launch parameters, one at a time.

    python benchmarks/tune.py --tokens tokens.npz --shapes gemma small llama3 --write

For each shape, on trained inputs: coordinate descent from the row in use, first over what forward (summarise) looks at,
then over what the sparse backward (select, tail, differentiate) looks at. Candidates of one parameter take turns with
the current value; one that the GPU cannot hold is skipped, one whose result differs from the current row's is refused,
and one is taken when it is at least 1 % faster. The row is written under the GPU's name, the element size and the class
of hidden sizes (to 1024, to 3072, above) as soon as a shape is done. Without --write the row is only printed.

On a CPU (``--device cpu`` with TRITON_INTERPRET=1) the interpreter's row is tuned, which only tries out this command.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from inputs import load_tokens, trained_inputs
from loss import dtype_on, relative_error, shape_name, shape_of
from shards import Shard, differentiate, merge, shard_of, summarise
from timing import Phases, interleaved_ms
from torch import Tensor

from cce_dist.kernels.triton import tuning
from cce_dist.kernels.triton.tuning import FILE, Row, Tuning

FORWARD = {
    "row_group": (4, 8, 16, 32),
    "splits": (8, 16, 32),
    "flat_below": (0, 1 << 16),
    "stages": (3, 4),
    "block_d": (64, 128),
}
BACKWARD = {
    "pair_stages": (2, 3, 4),
    "weight_block_k": (32, 64, 128),
    "weight_block_d": (64, 128),
    "chunk_d": (256, 512, 1024),
    "hidden_block_d": (32, 64),
    "pair_block_d": (32, 64, 128),
    "pair_rows": (64, 128),
    "pair_programs": (1, 2),
}
HIDDEN_CLASSES = ((None, 1024), (1024, 3072), (3072, None))
FASTER_BY = 0.99


class Stage(NamedTuple):
    """``run`` returns tensors that must not depend on the parameters, within ``tolerance`` (relative norm)."""

    name: str
    candidates: dict[str, tuple[int, ...]]
    run: Callable[[], tuple[Tensor, ...]]
    tolerance: float


def hidden_class(hidden_size: int) -> tuple[int | None, int | None]:
    """The (above, up to) of the row for this hidden size."""
    return next(limits for limits in HIDDEN_CLASSES if limits[1] is None or hidden_size <= limits[1])


def stages(shard: Shard) -> list[Stage]:
    """Forward, and the sparse backward of the mean loss on what forward leaves with the current row."""
    summary = summarise(shard)
    normaliser = merge([summary])
    seed = torch.zeros(1, dtype=torch.int64, device=normaliser.max_N.device)

    def forward() -> tuple[Tensor, ...]:
        again = summarise(shard)
        return merge([again]).lse_N, again.target_N

    def backward() -> tuple[Tensor, ...]:
        gradients = differentiate(shard, summary, normaliser, seed)
        assert gradients.hidden_ND is not None and gradients.weight_VD is not None
        return gradients.hidden_ND, gradients.weight_VD

    # Sums in another order flip the rounding of a few 16-bit probabilities; a wrong block is off by far more.
    return [Stage("forward", FORWARD, forward, 1e-5), Stage("backward", BACKWARD, backward, 1e-3)]


def descend(stage: Stage, row: Tuning, only: list[str] | None, rounds: int, device: str) -> Tuning:
    """The row after each of the stage's parameters was tried once."""
    with tuning.forced(row):
        expected = stage.run()
    for parameter, values in stage.candidates.items():
        if only and parameter not in only:
            continue
        current = getattr(row, parameter)
        runs: dict[str, Callable[[], object]] = {str(current): _under(row, stage.run)}
        for value in values:
            if value == current:
                continue
            candidate = row._replace(**{parameter: value})
            try:
                with tuning.forced(candidate):
                    got = stage.run()
                if device == "cuda":
                    torch.cuda.synchronize()
            except Exception as error:  # too much shared memory, or a shape that Triton cannot compile
                print(f"  {parameter}={value}: skipped, {type(error).__name__}: {str(error)[:100]}", flush=True)
                if device == "cuda":
                    torch.cuda.synchronize()  # raises where the error has left the device unusable
                continue
            off = max(relative_error(x, true.float()) for x, true in zip(got, expected, strict=True))
            if not off <= stage.tolerance:
                print(f"  {parameter}={value}: REFUSED, its result is off by {off:.1e}", flush=True)
                continue
            runs[str(value)] = _under(candidate, stage.run)
        times = interleaved_ms(runs, rounds, device)
        best = min(times, key=lambda value: times[value] * (1 if value == str(current) else 1 / FASTER_BY))
        print(f"  {parameter}: " + ", ".join(f"{value} {ms:.3f} ms" for value, ms in times.items()), end="")
        print(f"; {f'{current} -> {best}' if best != str(current) else f'{best} stays'}", flush=True)
        row = row._replace(**{parameter: int(best)})
    return row


def _under(row: Tuning, run: Callable[[], object]) -> Callable[[], object]:
    def forced() -> object:
        with tuning.forced(row):
            return run()

    return forced


def replace_row(rows: tuple[Row, ...], new: Row) -> list[Row]:
    """The table with ``new`` in the place of the row of its key, or at the end."""
    kept = [new if row[:4] == new[:4] else row for row in rows]
    return kept if new in kept else [*kept, new]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=Path, required=True, help=".npy or .npz of token ids")
    parser.add_argument("--shapes", nargs="+", type=shape_name, default=["gemma", "small", "llama3"])
    parser.add_argument("--steps", type=int, default=200, help="training steps for the inputs")
    parser.add_argument("--cache", type=Path, help="folder of trained inputs, shared by the commands")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--parameters", nargs="+", choices=[*FORWARD, *BACKWARD], help="only these")
    parser.add_argument("--write", action="store_true", help="write the rows into --table")
    parser.add_argument("--table", type=Path, default=FILE)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    arguments = parser.parse_args()
    device = arguments.device
    classes = {name: hidden_class(shape_of(name).hidden_size) for name in arguments.shapes}
    if len(set(classes.values())) < len(classes):
        parser.error(f"two of the shapes are of one class of hidden sizes, and would share a row: {classes}")
    phases = Phases()
    for name in arguments.shapes:
        shape, dtype = shape_of(name), dtype_on(device)
        ids = load_tokens(arguments.tokens, shape.vocab_size)
        inputs = trained_inputs(ids, *shape, steps=arguments.steps, dtype=dtype, device=device, cache=arguments.cache)
        phases.done(f"{name}: training, {arguments.steps} steps")
        first = row = tuning.tuning_for(inputs.hidden_ND, inputs.weight_VD)
        for stage in stages(shard_of(inputs, backend="triton")):
            print(f"{name}, {stage.name}:")
            row = descend(stage, row, arguments.parameters, arguments.rounds, device)
            phases.done(f"{name}: {stage.name}")
        changed = {key: value for key, value in row._asdict().items() if value != getattr(first, key)}
        print(f"{name}: changed {changed or 'nothing'}", flush=True)
        if arguments.write:
            gpu = tuning.gpu_names(inputs.hidden_ND.device)[0]
            new = Row(gpu, dtype.itemsize, *classes[name], row)
            tuning.save(replace_row(tuning.load(arguments.table), new), arguments.table)
            print(f"{name}: row of {gpu} written to {arguments.table}", flush=True)
        del inputs


if __name__ == "__main__":
    main()
