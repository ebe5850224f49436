"""Prints the results of a benchmark as Markdown tables, and draws those of loss.py and scaling.py.

python benchmarks/report.py benchmarks/results/loss-*.json --plot benchmarks/results/loss.png
python benchmarks/report.py benchmarks/results/scaling-*.json --plot benchmarks/results/scaling.png
python benchmarks/report.py benchmarks/results/ranks-*.json
python benchmarks/report.py benchmarks/results/budget-*.json
python benchmarks/report.py benchmarks/results/train-*.json
python benchmarks/report.py benchmarks/results/shards-*-262144x2304.json
python benchmarks/report.py benchmarks/results/stages-*.json
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
            if "failed" not in row and not name.startswith("old tree's"):
                times = f"{row['forward_x']:.2f}x | {row['both_x']:.2f}x | {row['peak_mb']:.0f}"
                errors = " | ".join(f"{row[f'{x}_error']:.1e}" for x in ("hidden", "weight", "unlabelled_weight"))
                lines.append(f"| {shape} | {name} | {times} | {errors} |")
    return "\n".join(lines)


def plot(shapes: dict[str, dict[str, Any]], path: Path) -> None:
    figure, axes = plt.subplots(1, len(shapes), figsize=(5 * len(shapes), 4.5), squeeze=False, sharey=True)
    for ax, (shape, result) in zip(axes[0], shapes.items(), strict=True):
        rows = {
            name: row
            for name, row in result["methods"].items()
            if "failed" not in row and not name.startswith("old tree's")
        }
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


RANKS_HEADER = """\
| shape | layout | method | forward + backward | of one GEMM | efficiency | busy ms, by rank | exposed ms, by rank \
| peak MB |
|---|---|---|---|---|---|---|---|---|"""


def ranks_table(result: dict[str, Any]) -> str:
    """What `ranks.py` found: a line for each shape, layout and method."""
    lines = [RANKS_HEADER]
    for shape, of in result["shapes"].items():
        for layout, methods in of["layouts"].items():
            for name, row in methods.items():
                gained = of["efficiency"].get(layout, {}).get(name)
                seen = [", ".join(f"{r[f'{x}_ms']:.1f}" for r in row.get("ranks", ())) for x in ("busy", "exposed")]
                cells = [shape, layout, name, f"{row['both_ms']:.1f} ms", f"{row['both_x']:.2f}x"]
                cells += ["" if gained is None else f"{gained:.2f}", *seen, f"{row['peak_mb']:.0f}"]
                lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


BUDGET_HEADER = """\
| shape | `workspace_mb` | kept MB | forward | forward + backward | peak MB | dE error | dC error |
|---|---|---|---|---|---|---|---|"""


def budget_table(result: dict[str, Any]) -> str:
    """What `budget.py` found: a line for each shape and budget."""
    lines = [BUDGET_HEADER]
    for shape, of in result["shapes"].items():
        for name, row in of["budgets"].items():
            cells = [shape, name, *["failed"] * 6]
            if "failed" not in row:
                cells[2:] = [f"{row['saved_mb']:.0f}", f"{row['forward_x']:.2f}x", f"{row['both_x']:.2f}x"]
                cells += [f"{row['peak_mb']:.0f}", f"{row['hidden_error']:.1e}", f"{row['weight_error']:.1e}"]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


TRAIN_HEADER = """\
| method | sequences a GPU | tokens/s | step | peak GB | first step | last loss |
|---|---|---|---|---|---|---|"""


def train_table(result: dict[str, Any]) -> str:
    """What `train.py` found: a line for each method and number of sequences."""
    lines = [TRAIN_HEADER]
    for name, method in result["methods"].items():
        for sequences, row in method["sequences"].items():
            cells = [name, sequences]
            if "out_of_memory" in row:
                cells += ["out of memory", "", "", "", ""]
            else:
                cells += [f"{row['tokens_per_s']:,.0f}", f"{row['step_ms']:.0f} ms", f"{row['peak_gb']:.1f}"]
                cells += [f"{row['first_step_ms'] / 1e3:.1f} s", f"{row['last_loss']:.2f}"]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


SCALING_HEADER = """\
| N | V | kept pairs a token, expected | of these large | 1.00x | forward | forward + backward |
|---|---|---|---|---|---|---|"""

SHARDS_HEADER = """\
| W | first pass, slowest shard | max/mean | refinement | max/mean | backward | max/mean | sum | of GEMM / W \
| pairs max/mean: contiguous | tiles in turn | greedy | greedy, other tokens |
|---|---|---|---|---|---|---|---|---|---|---|---|---|"""
PHASES = ("first_pass", "refine", "backward")


def scaling_table(result: dict[str, Any]) -> str:
    """The two series of `scaling.py` over tokens and vocabulary, and the one over shards."""
    lines = [SCALING_HEADER] if {"tokens", "vocabulary"} & set(result) else []
    for row in result.get("tokens", []) + result.get("vocabulary", []):
        large = row["large_pairs"] / row["num_tokens"]
        multiples = (f"{row[f'{name}_ms'] / row['gemm_ms']:.2f}x" for name in ("forward", "both"))
        pairs = f"{row['expected_pairs_per_token']:.2f} | {large:.2f} | {row['gemm_ms']:.2f} ms"
        lines.append(f"| {row['num_tokens']} | {row['vocab_size']} | {pairs} | {' | '.join(multiples)} |")
    if "shards" in result:
        lines += ["", SHARDS_HEADER] if lines else [SHARDS_HEADER]
    for row in result.get("shards", []):
        stages = (f"{row[f'{x}_max_ms']:.2f} ms | {row[f'{x}_imbalance']:.2f}" for x in PHASES)
        both = f"{row['both_max_ms']:.2f} ms | {row['of_gemm']:.2f}"
        ways = (f"{way['imbalance']:.2f}" for way in row["expected_pairs"].values())
        lines.append(f"| {row['world']} | {' | '.join(stages)} | {both} | {' | '.join(ways)} |")
    return "\n".join(lines)


def stages_table(result: dict[str, Any]) -> str:
    """The share of GPU time of each stage, a line for each shape and mode."""
    rows = [(shape, mode, row) for shape, of in result["stages"].items() for mode, row in of["modes"].items()]
    names = list(dict.fromkeys(name for _, _, row in rows for name in row["stages"]))
    lines = [f"| shape | mode | step | {' | '.join(names)} |", "|---" * (3 + len(names)) + "|"]
    for shape, mode, row in rows:
        shares = (f"{row['stages'][name]['share']:.1%}" if name in row["stages"] else "" for name in names)
        lines.append(f"| {shape} | {mode} | {row['both_ms']:.2f} ms | {' | '.join(shares)} |")
    return "\n".join(lines)


def plot_scaling(result: dict[str, Any], path: Path) -> None:
    series = [name for name in ("tokens", "vocabulary", "shards") if name in result]
    figure, axes = plt.subplots(1, len(series), figsize=(5 * len(series), 4.5), squeeze=False)
    for ax, name in zip(axes[0], series, strict=True):
        rows = result[name]
        if name == "shards":
            worlds = [row["world"] for row in rows]
            for stage, color in zip(PHASES, ("C0", "C1", "C2"), strict=True):
                ax.plot(worlds, [row[f"{stage}_max_ms"] for row in rows], "o-", color=color, label=f"{stage}, slowest")
                mean = [sum(row[f"{stage}_ms"]) / row["world"] for row in rows]
                ax.plot(worlds, mean, "s--", color=color, label=f"{stage}, mean")
            ax.set(xlabel="shards W, each run alone", ylabel="ms", title=f"N, V = {_size(rows[0])}")
            ax.set_yscale("log")
        else:
            x = [row["num_tokens" if name == "tokens" else "vocab_size"] for row in rows]
            ax.plot(x, [row["both_x"] for row in rows], "o-", label="forward + backward, in logits products")
            ax.plot(x, [row["expected_pairs_per_token"] for row in rows], "s--", label="kept pairs a token")
            ax.set(xlabel="tokens N" if name == "tokens" else "vocabulary V", ylim=(0, None))
            fixed = f"V = {rows[0]['vocab_size']}" if name == "tokens" else f"N = {rows[0]['num_tokens']}"
            ax.set_title(f"{fixed}, D = {result['hidden_size']}")
        ax.set_xscale("log", base=2)
        ax.grid(alpha=0.3, which="both")
        ax.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def _size(row: dict[str, Any]) -> str:
    return f"{row['num_tokens']}, {row['vocab_size']}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", type=Path, help="JSON files of one of the benchmarks")
    parser.add_argument("--plot", type=Path, help="PNG to write")
    arguments = parser.parse_args()
    contents = [json.loads(path.read_text()) for path in arguments.results]
    if all("ranks" in content for content in contents):
        print("\n\n".join(ranks_table(content) for content in contents))
    elif all(content["command"].startswith("benchmarks/train.py") for content in contents):
        print("\n\n".join(train_table(content) for content in contents))
    elif all(content["command"].startswith("benchmarks/budget.py") for content in contents):
        print("\n\n".join(budget_table(content) for content in contents))
    elif all("shapes" in content for content in contents):
        shapes = load(arguments.results)
        print(table(shapes))
        if arguments.plot:
            plot(shapes, arguments.plot)
    elif arguments.plot and (len(contents) > 1 or "stages" in contents[0]):
        parser.error("--plot draws results of loss.py, or one result of scaling.py")
    else:
        for content in contents:
            print((stages_table if "stages" in content else scaling_table)(content))
        if arguments.plot:
            plot_scaling(contents[0], arguments.plot)


if __name__ == "__main__":
    main()
