"""Draws the results of `benchmarks/loss.py`, time against error, and prints them as a Markdown table.

python benchmarks/report.py benchmarks/results/loss-*.json --plot benchmarks/results/loss.png
"""

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

HEADER = """\
| shape | method | forward | forward + backward | peak MB | dE error | dC error | dC error, unlabelled rows |
|---|---|---|---|---|---|---|---|"""


def load(paths: list[Path]) -> dict[str, dict[str, Any]]:
    """Results by shape; of a shape that several files hold, the last one's."""
    shapes: dict[str, dict[str, Any]] = {}
    for path in paths:
        shapes |= json.loads(path.read_text())["shapes"]
    return shapes


def table(shapes: dict[str, dict[str, Any]]) -> str:
    lines = [HEADER]
    for shape, result in shapes.items():
        for name, row in result["methods"].items():
            if "failed" not in row:
                times = f"{row['forward_x']:.2f}x | {row['both_x']:.2f}x | {row['peak_mb']:.0f}"
                errors = " | ".join(f"{row[f'{x}_error']:.1e}" for x in ("hidden", "weight", "unlabelled_weight"))
                lines.append(f"| {shape} | {name} | {times} | {errors} |")
    return "\n".join(lines)


def plot(shapes: dict[str, dict[str, Any]], path: Path) -> None:
    figure, axes = plt.subplots(1, len(shapes), figsize=(5 * len(shapes), 4.5), squeeze=False, sharey=True)
    for ax, (shape, result) in zip(axes[0], shapes.items(), strict=True):
        rows = {name: row for name, row in result["methods"].items() if "failed" not in row}
        for name, row in rows.items():
            ours = name.startswith("cce_dist")
            ax.plot(row["both_x"], row["hidden_error"], "o" if ours else "s", color="C0" if ours else "C7")
            at = (row["both_x"], row["hidden_error"])
            ax.annotate(name, at, fontsize=8, rotation=35, xytext=(4, 4), textcoords="offset points")
        size = ", ".join(str(result[key]) for key in ("num_tokens", "vocab_size", "hidden_size"))
        ax.set(title=f"{shape} (N, V, D = {size})", xscale="log", yscale="log")
        ax.set_xlim(1, 2.5 * max(row["both_x"] for row in rows.values()))
        ax.set_xlabel("forward + backward, in cuBLAS logits products")
        ax.set_ylim(1e-3, 2e-1)
        ax.grid(alpha=0.3, which="both")
    axes[0][0].set_ylabel("relative error of dE")
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", type=Path, help="JSON files of benchmarks/loss.py")
    parser.add_argument("--plot", type=Path, help="PNG to write")
    arguments = parser.parse_args()
    shapes = load(arguments.results)
    print(table(shapes))
    if arguments.plot:
        plot(shapes, arguments.plot)


if __name__ == "__main__":
    main()
