"""Plots the learning curves of runs from their metrics: `python docs/runs/plot.py`.

Writes NAME.png for every NAME.jsonl (metrics.jsonl of a run) in this folder; needs matplotlib.
"""

import json
import pathlib

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

FOLDER = pathlib.Path(__file__).parent


def plot(path: pathlib.Path) -> None:
    """Plots errors over steps as in the paper's Figure 6: training thin, held-out images bold."""
    records = [json.loads(line) for line in path.read_text().splitlines()]
    figure, axes = plt.subplots(figsize=(4.5, 2.8), dpi=100, layout="constrained")
    train = [record for record in records if record["split"] == "train"]
    held_out = [r for r in records if r["split"] != "train" and "weights" not in r]
    for name, chosen, width in (("training", train, 1.0), ("held out", held_out, 2.0)):
        steps = [record["step"] for record in chosen]
        errors = [100 * (1 - record["top1"]) for record in chosen]
        axes.plot(steps, errors, linewidth=width, label=name)
    axes.set(title=path.stem, xlabel="step", ylabel="top-1 error in %", yscale="log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.legend()
    axes.grid(alpha=0.3, which="both")
    figure.savefig(path.with_suffix(".png"))
    plt.close(figure)


if __name__ == "__main__":
    for metrics in sorted(FOLDER.glob("*.jsonl")):
        plot(metrics)
