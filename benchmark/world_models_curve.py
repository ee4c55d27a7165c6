"""Dream score beside real score of the cars evolved in dreams, from the committed evaluations.

Run:  python benchmark/world_models_curve.py
Reads results/world_models/CarRacing-v3_dream.csv, draws docs/world_models_car_dream.png.
"""

import csv
from pathlib import Path

from matplotlib.figure import Figure

ROOT = Path(__file__).parent.parent


def last_of_rounds(lines: list[str]) -> dict[tuple[str, str], list[dict]]:
    """(run, seed) -> the last evaluation of each of its rounds."""
    found: dict[tuple[str, str], dict] = {}
    for row in csv.DictReader(line for line in lines if not line.startswith("#")):
        if row["dream"]:  # else on more tracks, a second time
            found.setdefault((row["run"], row["seed"]), {})[row["round"]] = row
    return {run: list(rounds.values()) for run, rounds in found.items()}


def main() -> None:
    lines = (ROOT / "results/world_models/CarRacing-v3_dream.csv").read_text().splitlines()
    titles = {"whole": "dreams as long as episodes, three seeds", "short": "short dreams, two seeds"}
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for axis, (name, title) in zip(axes, titles.items(), strict=True):
        found = last_of_rounds(lines)
        runs = [rows for (run, _), rows in found.items() if run == name]
        if name == "whole":
            runs[1] += found["whole_control", "2"]  # its rounds 41 to 46
        for i, rows in enumerate(runs):
            steps = [int(row["step"]) / 1000 for row in rows]
            for kind, style in (("real", "o-"), ("dream", "--")):
                scores = [float(row[kind]) for row in rows]
                axis.plot(steps, scores, style, color=f"C{i}", alpha=0.7, markersize=3, label=f"seed {i + 1}, {kind}")
        axis.axhline(-65, color="grey", linestyle=":", label="random play, real")
        axis.set(title=title, xlabel="thousand real steps recorded")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("return of C's mean")
    axes[0].legend(fontsize="small")
    figure.savefig(ROOT / "docs/world_models_car_dream.png", dpi=120)


if __name__ == "__main__":
    main()
