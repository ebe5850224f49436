"""Prints the results of a benchmark as Markdown tables, and draws those of loss.py, scaling.py and convergence.py.

python benchmarks/report.py benchmarks/results/loss-*.json --plot benchmarks/results/loss.png
python benchmarks/report.py benchmarks/results/scaling-*.json --plot benchmarks/results/scaling.png
python benchmarks/report.py benchmarks/results/ranks-*.json
python benchmarks/report.py benchmarks/results/budget-*.json
python benchmarks/report.py benchmarks/results/train-*.json
python benchmarks/report.py benchmarks/results/shards-*-262144x2304.json
python benchmarks/report.py benchmarks/results/stages-*.json
python benchmarks/report.py benchmarks/results/hostile-*.json --page docs/accuracy.md
python benchmarks/report.py benchmarks/results/convergence-*.json --plot benchmarks/results/convergence.png \
    --page docs/accuracy.md
"""

import argparse
import json
from pathlib import Path
from statistics import mean, median, stdev
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
            if name.startswith("old tree's"):
                continue
            if "failed" in row:
                lines.append(f"| {shape} | {name} | {row['failed'].replace('|', '/')} | | | | | |")
                continue
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


ENGINES = {"fsdp2": "FSDP2", "zero3": "ZeRO-3"}
LOSSES = {
    "stock": "stock head",
    "liger": "Liger's fused loss",
    "cce_dist": "**cce_dist**",
    "exact": "cce_dist, exact gradient",
}


def train_summary(result: dict[str, Any]) -> str:
    """The same in README's words, beside the engine's stock head, at the number of sequences that all methods have."""
    lines = ["| | tokens/s, all GPUs | memory of a GPU | loss |", "|---|---|---|---|"]
    number = min(set.intersection(*(set(method["sequences"]) for method in result["methods"].values())), key=int)
    for name, method in result["methods"].items():
        engine, loss = name.split("-")
        row, stock = (x["sequences"][number] for x in (method, result["methods"][f"{engine}-stock"]))
        keys = "tokens_per_s", "peak_gb"
        speed, memory = ("" if row is stock else f" ({row[key] / stock[key]:.2f}x)" for key in keys)
        cells = [f"{row['tokens_per_s']:,.0f}{speed}", f"{row['peak_gb']:.1f} GB{memory}", f"{row['last_loss']:.2f}"]
        lines.append(f"| {ENGINES[engine]}, {LOSSES[loss]} | {' | '.join(cells)} |")
    return "\n".join(lines)


def hostile_table(result: dict[str, Any]) -> str:
    """What `hostile.py` found: of each input the errors of dE and dC by mode; first the largest of each, with losses'
    and log-sum-exps'."""
    cases = result["hostile"]
    modes = list(dict.fromkeys(mode for of in cases.values() for mode in of["modes"]))
    lines = ["| mode | largest error of the loss | of a log-sum-exp, rms | of dE | of dC |", "|---|---|---|---|---|"]
    for mode in modes:
        rows = [of["modes"][mode] for of in cases.values()]
        largest = (max(row[key] for row in rows) for key in ("loss_error", "lse_rms", "hidden_error", "weight_error"))
        lines.append(f"| {mode} | {' | '.join(f'{x:.1e}' for x in largest)} |")
    lines += ["", f"| input | loss | {' | '.join(modes)} |", "|---" * (2 + len(modes)) + "|"]
    for name, of in cases.items():
        cells = (f"{row['hidden_error']:.1e}, {row['weight_error']:.1e}" for row in of["modes"].values())
        lines.append(f"| {name} | {of['loss']:.2f} | {' | '.join(cells)} |")
    return "\n".join(lines)


CONVERGENCE_HEADER = """\
| setting | method | seeds | held-out loss | difference to exact, by seed | mean, 95 % interval | verdict \
| rarest tenth | dE cosine, ratio | dC cosine, ratio | head | head's peak MB |
|---|---|---|---|---|---|---|---|---|---|---|---|"""
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.16, 2.145, 2.131)
"""The 97.5 % quantile of Student's t with 1, 2, ... degrees of freedom."""
EQUAL, WITHIN = 0.015, 0.03


def interval(differences: list[float]) -> tuple[float, float, float]:
    """Their mean, and the 95 % interval of what it estimates; unbounded for a single one."""
    middle, degrees = mean(differences), len(differences) - 1
    if degrees == 0:
        return middle, float("-inf"), float("inf")
    half = STUDENT[min(degrees, len(STUDENT)) - 1] * stdev(differences) / len(differences) ** 0.5
    return middle, middle - half, middle + half


def verdict(low: float, high: float) -> str:
    """What the interval of a difference in loss shows."""
    for bound, words in ((EQUAL, f"equal within ±{EQUAL}"), (WITHIN, f"within ±{WITHIN}")):
        if -bound < low and high < bound:
            return words
    return "worse" if low > 0 else "better" if high < 0 else "open: more seeds"


def by_method(result: dict[str, Any]) -> dict[tuple[str, str], dict[int, dict[str, Any]]]:
    """The runs of `convergence.py`, by setting and method, then seed."""
    found: dict[tuple[str, str], dict[int, dict[str, Any]]] = {}
    for key, row in result["runs"].items():
        setting, method, seed = key.split("/")
        found.setdefault((setting, method), {})[int(seed)] = row
    return {key: dict(sorted(found[key].items())) for key in sorted(found, key=lambda key: key[0], reverse=True)}


def beside_exact(rows: dict[int, dict[str, Any]], exact: dict[int, dict[str, Any]]) -> list[tuple[Any, Any]]:
    """The runs and exact's of the same seeds.

    Raises:
        ValueError: two did not start from the same weights: the fine-tuned model was trained again between them.
    """
    pairs = [(row, exact[seed]) for seed, row in rows.items() if seed in exact]
    for run, other in pairs:
        starts = [of["held_out_curve"][0][1] for of in (run, other)]
        if abs(starts[0] - starts[1]) > 1e-4:
            raise ValueError(
                f"Runs of one seed start at held-out losses {starts}: remove one of them, and run it again."
            )
    return pairs


def convergence_table(result: dict[str, Any]) -> str:
    """A line for each setting and method; differences are of runs with the same seed."""
    lines, runs = [CONVERGENCE_HEADER], by_method(result)
    for (setting, method), of_seeds in runs.items():
        rows = {seed: row for seed, row in of_seeds.items() if "failed" not in row}
        if not rows:
            lines.append(f"| {setting} | {method} | 0 | {next(iter(of_seeds.values()))['failed']} |" + " |" * 8)
            continue
        exact = runs.get((setting, "exact"), {})
        pairs = [row["held_out"] - other["held_out"] for row, other in beside_exact(rows, exact)]
        cells = [setting, method, str(len(rows)), f"{mean(row['held_out'] for row in rows.values()):.4f}"]
        if method == "exact" or not pairs:
            cells += ["", "", ""]
        else:
            middle, low, high = interval(pairs)
            shown = f"{middle:+.4f}" if len(pairs) == 1 else f"{middle:+.4f} [{low:+.4f}, {high:+.4f}]"
            cells += [", ".join(f"{x:+.4f}" for x in pairs), shown]
            cells += [verdict(low, high)]
        cells += [f"{mean(row['held_out_tenths'][0] for row in rows.values()):.3f}"]
        last = [row["gradients"][-1] for row in rows.values() if row["gradients"]]
        for x in ("hidden", "weight"):
            of = [mean(row[f"{x}_{key}"] for row in last) for key in ("cosine", "ratio")] if last else []
            cells += [f"{of[0]:.5f}, {of[1]:.4f}" if of else ""]
        cells += [f"{median(row['head_ms'] for row in rows.values()):.1f} ms"]
        cells += [f"{max(row['head_peak_mb'] for row in rows.values()):.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def plot_convergence(result: dict[str, Any], path: Path) -> None:
    """Of each setting: training loss, differences of held-out loss by seed, and by tenths of the tokens."""
    runs = by_method(result)
    settings = list(dict.fromkeys(setting for setting, _ in runs))
    figure, axes = plt.subplots(len(settings), 3, figsize=(15, 4.5 * len(settings)), squeeze=False)
    for setting, (curves, ends, tenths) in zip(settings, axes, strict=True):
        exact = runs[setting, "exact"]
        methods = [method for of, method in runs if of == setting]
        for at, method in enumerate(methods):
            rows = {seed: row for seed, row in runs[setting, method].items() if "failed" not in row and seed in exact}
            if not rows:
                continue
            first = next(iter(rows.values()))
            curves.plot(*zip(*first["train_curve"], strict=True), color=f"C{at}", label=method, linewidth=1)
            if method == "exact":
                continue
            pairs = beside_exact(rows, exact)
            differences = [row["held_out"] - other["held_out"] for row, other in pairs]
            middle, low, high = interval(differences)
            ends.plot(differences, [at] * len(rows), "o", color=f"C{at}", alpha=0.5)
            if len(rows) > 1:
                ends.errorbar(middle, at, xerr=[[middle - low], [high - middle]], fmt="|", color=f"C{at}", capsize=4)
            key = "held_out_tenths"
            of_tenths = [mean(row[key][i] - other[key][i] for row, other in pairs) for i in range(10)]
            tenths.plot(range(1, 11), of_tenths, "o-", color=f"C{at}", label=method)
        curves.set(title=f"{setting}: training loss, the first seed", xlabel="step")
        ends.set(title="held-out loss less exact's, by seed; 95 % interval", yticks=range(len(methods)))
        ends.set_yticklabels(methods)
        ends.axvspan(-WITHIN, WITHIN, color="C7", alpha=0.15)
        ends.axvspan(-EQUAL, EQUAL, color="C7", alpha=0.25)
        tenths.set(title="the same by tenths of the tokens, rarest labels first", xlabel="tenth")
        for ax in (curves, ends, tenths):
            ax.grid(alpha=0.3)
            if ax is not ends and ax.has_data():
                ax.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


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


def write_into(page: Path, kind: str, text: str) -> None:
    """Puts the text between the page's marks of this kind of report, in place of what is there.

    Raises:
        ValueError: the page has no such marks.
    """
    start, end = f"<!-- report: {kind} -->\n", "<!-- end of report -->"
    before, found, rest = page.read_text().partition(start)
    if not found or end not in rest:
        raise ValueError(f"{page} has no lines {start.strip()} and {end}.")
    page.write_text(f"{before}{start}\n{text}\n\n{end}{rest.partition(end)[2]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", type=Path, help="JSON files of one of the benchmarks")
    parser.add_argument("--plot", type=Path, help="PNG to write")
    parser.add_argument("--page", type=Path, help="page to write the tables into: of convergence.py and hostile.py")
    arguments = parser.parse_args()
    contents = [json.loads(path.read_text()) for path in arguments.results]
    if all("ranks" in content for content in contents):
        print("\n\n".join(ranks_table(content) for content in contents))
    elif all(content["command"].startswith("benchmarks/train.py") for content in contents):
        print("\n\n".join(f"{train_table(content)}\n\n{train_summary(content)}" for content in contents))
    elif all("hostile" in content for content in contents):
        text = "\n\n".join(hostile_table(content) for content in contents)
        print(text)
        if arguments.page:
            write_into(arguments.page, "hostile", text)
    elif all("runs" in content for content in contents):
        text = "\n\n".join(convergence_table(content) for content in contents)
        print(text)
        if arguments.plot:
            plot_convergence(contents[0], arguments.plot)
            text += f"\n\n![training, seed by seed](../benchmarks/results/{arguments.plot.name})"
        if arguments.page:
            write_into(arguments.page, "convergence", text)
    elif all(content["command"].startswith("benchmarks/budget.py") for content in contents):
        print("\n\n".join(budget_table(content) for content in contents))
    elif all("shapes" in content for content in contents):
        shapes = load(arguments.results)
        print(table(shapes))
        if arguments.plot:
            plot(shapes, arguments.plot)
    elif arguments.plot and (len(contents) > 1 or "stages" in contents[0]):
        parser.error("--plot draws results of loss.py, or one result of scaling.py or convergence.py")
    else:
        for content in contents:
            print((stages_table if "stages" in content else scaling_table)(content))
        if arguments.plot:
            plot_scaling(contents[0], arguments.plot)


if __name__ == "__main__":
    main()
