"""The command ``cce-dist``."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from cce_dist import __version__
from cce_dist.missing import named

_USAGE = """usage: cce-dist [--version] COMMAND ...

commands:
  train --config FILE [key=value ...]   train a causal language model; under torchrun: torchrun ... -m cce_dist.train
  compare RUN RUN [...]                 compare output folders: sharded heads with the plain one of the same engine
  doctor [--config FILE]                check every rank before a run; under torchrun: torchrun ... -m cce_dist.doctor
  plan --vocab V --hidden D --tokens N --gpus W [...]    bytes and milliseconds of the head, before a run
  report RUN [...]                      draw loss, speed and memory of output folders: report.png and report.html
"""

_OPTIONAL = {"accelerate", "matplotlib", "tokenizers", "transformers", "yaml"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    commands = {"train": train, "compare": compare, "doctor": doctor, "plan": plan, "report": report}
    if arguments and arguments[0] in commands:
        try:
            with named(f"cce-dist {arguments[0]}", *_OPTIONAL, extra="train"):
                return commands[arguments[0]](arguments[1:])
        except ModuleNotFoundError as error:
            if error.name not in _OPTIONAL:
                raise
            print(error, file=sys.stderr)
            return 2
    if list(arguments) == ["--version"]:
        print(__version__)
        return 0
    asked = not arguments or arguments[0] in ("-h", "--help")
    usage = _USAGE if asked else f"cce-dist: unknown command {arguments[0]!r}\n{_USAGE}"
    print(usage, end="", file=sys.stdout if asked else sys.stderr)
    return 0 if asked else 2


def train(arguments: Sequence[str]) -> int:
    """``train``: 0 when all steps are done, 130 when Ctrl-C stopped it, 2 when the settings are wrong. With --check 0
    when they are right."""
    parser = argparse.ArgumentParser("cce-dist train", description="Train a causal language model.")
    parser.add_argument("--config", required=True, type=Path, help="YAML; the keys are in cce_dist/train/settings.py")
    parser.add_argument("--check", action="store_true", help="only tell whether the settings are valid")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that replace those of the file")
    parsed = parser.parse_intermixed_args(arguments)

    from cce_dist.train.loop import check, run
    from cce_dist.train.settings import load

    try:
        settings = load(parsed.config, parsed.overrides)
        if parsed.check:
            check(settings)
            return 0
    except (OSError, ValueError) as error:
        print(f"cce-dist train: {error}", file=sys.stderr)
        return 2
    try:
        return 0 if run(settings) else 130
    except KeyboardInterrupt:
        print("cce-dist train: interrupted before the first step; there is nothing to save", file=sys.stderr)
        return 130


def compare(arguments: Sequence[str]) -> int:
    """``compare``: 0 when the exact runs agree with the plain ones, 1 when not, 2 for folders that do not fit."""
    parser = argparse.ArgumentParser("cce-dist compare", description="Compare sharded heads with the plain one.")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="an output folder of the trainer")
    parser.add_argument("--tolerance", type=float, default=1e-4, help="of the final loss, relative (default 1e-4)")
    parsed = parser.parse_args(arguments)

    from cce_dist.train.compare import compare_runs

    try:
        return 0 if compare_runs(parsed.runs, parsed.tolerance) else 1
    except ValueError as error:
        print(f"cce-dist compare: {error}", file=sys.stderr)
        return 2


def doctor(arguments: Sequence[str]) -> int:
    """``doctor``: 0 when nothing is wrong on any rank, 1 for any fault, 2 for wrong arguments."""
    from cce_dist.tools.doctor.command import main

    return main(arguments)


def plan(arguments: Sequence[str]) -> int:
    """``plan``: 0 with a recommendation, 1 when nothing fits the memory, 2 for arguments that do not fit together."""
    parser = argparse.ArgumentParser("cce-dist plan", description="Bytes and milliseconds of the head on each rank.")
    parser.add_argument("--model", type=Path, help="folder with config.json, for --vocab and --hidden")
    parser.add_argument("--config", type=Path, help='DeepSpeed JSON: its section "cce_dist" and micro-batch size')
    parser.add_argument("--sequence-length", type=_positive, help="with --config, for --tokens")
    parser.add_argument("--vocab", type=_positive, help="rows of the classifier")
    parser.add_argument("--hidden", type=_positive, help="its columns")
    parser.add_argument("--tokens", type=_positive, help="tokens of one GPU in one micro-step")
    parser.add_argument("--gpus", type=_positive, required=True)
    parser.add_argument("--gpu", default="h100", help="a100, b200, h100 or h200 (default h100)")
    parser.add_argument("--gpus-per-node", type=_positive, default=8)
    parser.add_argument("--network-gbit", type=_positive, help="a GPU's share of its node's network, Gbit/s")
    parser.add_argument("--gradient", choices=("unbiased", "filtered", "exact"), help="default unbiased")
    parser.add_argument("--head-gb", type=float, help="what the head may take of a GPU (default: all its memory)")
    parser.add_argument(
        "--measured", nargs="+", type=Path, help="results of benchmarks/loss.py and ranks.py (default: the shipped)"
    )
    parser.add_argument("--plot", type=Path, metavar="PNG", help="draw memory and time against the number of GPUs")
    parsed = parser.parse_args(arguments)

    from cce_dist.tools.plan.calibration import MEASURED, calibrate
    from cce_dist.tools.plan.job import GPUS, Job, check, read_deepspeed, read_model
    from cce_dist.tools.plan.table import print_plan

    try:
        section, micro = (None, None) if parsed.config is None else read_deepspeed(parsed.config)
        vocab, hidden = (None, None) if parsed.model is None else read_model(parsed.model)
        from_batch = micro * parsed.sequence_length if micro and parsed.sequence_length else None
        job = Job(
            vocab=_given("--vocab or --model", parsed.vocab, vocab),
            hidden=_given("--hidden or --model", parsed.hidden, hidden),
            tokens=_given(
                "--tokens, or --sequence-length with a --config that has train_micro_batch_size_per_gpu",
                parsed.tokens,
                from_batch,
            ),
            gpus=parsed.gpus,
            gpu=parsed.gpu.lower(),
            gpus_per_node=parsed.gpus_per_node,
            gradient=parsed.gradient or (section and section.gradient) or "unbiased",
            workspace_mb=section.workspace_mb if section else None,
            network=parsed.network_gbit and parsed.network_gbit * 1e9 / 8,
        )
        check(job)
        gpu_memory = GPUS[job.gpu].memory
        memory = gpu_memory if parsed.head_gb is None else parsed.head_gb * 1e9
        if not 0 < memory <= gpu_memory:
            raise ValueError(f"--head-gb must be above 0 and at most {gpu_memory / 1e9:g}, got {parsed.head_gb:g}.")
        own = (path for kind in ("loss", "ranks") for path in sorted(MEASURED.glob(f"{kind}-*.json")))
        files = list(own) if parsed.measured is None else parsed.measured
        calibration = calibrate(files, job.gpu)
        best = print_plan(job, calibration, memory)
        if parsed.plot is not None:
            from cce_dist.tools.plan.plot import plot

            plot(job, calibration, parsed.plot)
            print(f"wrote {parsed.plot}")
    except (OSError, ValueError) as error:
        print(f"cce-dist plan: {error}", file=sys.stderr)
        return 2
    return 0 if best is not None else 1


def _positive(text: str) -> int:
    digits = text.replace("_", "").replace(",", "")
    if not digits.isdecimal() or int(digits) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number, 1 or more, got {text!r}")
    return int(digits)


def _given(name: str, *values: int | None) -> int:
    for value in values:
        if value is not None:
            return value
    raise ValueError(f"give {name}.")


def report(arguments: Sequence[str]) -> int:
    """``report``: 0 when both files are written, 2 for folders that no run wrote."""
    parser = argparse.ArgumentParser("cce-dist report", description="Draw what runs of the trainer logged.")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="an output folder of the trainer")
    parser.add_argument("--out", type=Path, help="folder for report.png and report.html (default: the first RUN)")
    parsed = parser.parse_args(arguments)

    from cce_dist.tools.report import write_report

    try:
        written = write_report(parsed.runs, parsed.out or parsed.runs[0])
    except (OSError, ValueError) as error:
        print(f"cce-dist report: {error}", file=sys.stderr)
        return 2
    print(f"wrote {' and '.join(map(str, written))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
