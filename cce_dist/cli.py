"""The command ``cce-dist``."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from cce_dist import __version__

_USAGE = """usage: cce-dist [--version] COMMAND ...

commands:
  train --config FILE [key=value ...]   train a causal language model; under torchrun: torchrun ... -m cce_dist.train
  compare RUN RUN [...]                 compare output folders: sharded heads with the plain one of the same engine
  report RUN [...]                      draw loss, speed and memory of output folders: report.png and report.html
"""

_OPTIONAL = {"accelerate", "matplotlib", "numpy", "rich", "tokenizers", "transformers", "yaml"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    commands = {"train": train, "compare": compare, "report": report}
    if arguments and arguments[0] in commands:
        try:
            return commands[arguments[0]](arguments[1:])
        except ModuleNotFoundError as error:
            if error.name not in _OPTIONAL:
                raise
            needs = f"cce-dist {arguments[0]} needs the package {error.name}: pip install 'cce_dist[train]'"
            print(needs, file=sys.stderr)
            return 2
    if list(arguments) == ["--version"]:
        print(__version__)
        return 0
    asked = not arguments or arguments[0] in ("-h", "--help")
    print(_USAGE if asked else f"cce-dist: unknown command {arguments[0]!r}\n{_USAGE}", end="", file=sys.stderr)
    return 0 if asked else 2


def train(arguments: Sequence[str]) -> int:
    """``train``: 0 when all steps are done, 130 when Ctrl-C stopped it, 2 when the settings are wrong."""
    parser = argparse.ArgumentParser("cce-dist train", description="Train a causal language model.")
    parser.add_argument("--config", required=True, type=Path, help="YAML; the keys are in cce_dist/train/settings.py")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that replace those of the file")
    parsed = parser.parse_args(arguments)

    from cce_dist.train.loop import run
    from cce_dist.train.settings import load

    try:
        settings = load(parsed.config, parsed.overrides)
    except ValueError as error:
        print(f"cce-dist train: {error}", file=sys.stderr)
        return 2
    return 0 if run(settings) else 130


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


def report(arguments: Sequence[str]) -> int:
    """``report``: 0 when both files are written, 2 for folders that no run wrote."""
    parser = argparse.ArgumentParser("cce-dist report", description="Draw what runs of the trainer logged.")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="an output folder of the trainer")
    parser.add_argument("--out", type=Path, help="folder for report.png and report.html (default: the first RUN)")
    parsed = parser.parse_args(arguments)

    from cce_dist.report import write_report

    try:
        written = write_report(parsed.runs, parsed.out or parsed.runs[0])
    except (OSError, ValueError) as error:
        print(f"cce-dist report: {error}", file=sys.stderr)
        return 2
    print(f"wrote {' and '.join(map(str, written))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
