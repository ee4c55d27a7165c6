"""Return against environment steps on three tasks, from results/dhmbpo: ours, the published curve and the claim.

Run:  python benchmark/dhmbpo_figure.py docs/dhmbpo_returns.png
"""

import csv
import sys
from collections import defaultdict
from pathlib import Path

from matplotlib.figure import Figure

PUBLISHED_STEPS = (10_000, 20_000, 30_000, 50_000, 75_000, 100_000)
# Means over 8 seeds at these steps (the authors' results/t_roll_len/3), MBPO's at 100K, the claim within 100K steps.
PUBLISHED = {
    "Hopper-v5": ((587, 1_688, 2_264, 2_830, 3_450, 3_603), 3_315, 3_000),
    "HalfCheetah-v5": ((4_366, 6_697, 6_987, 8_588, 9_433, 10_681), 9_553, 10_000),
    "Humanoid-v5": ((347, 431, 654, 3_239, 4_699, 6_490), 579, 5_000),
}


def curves(path: Path) -> dict[str, list[tuple[int, float]]]:
    """Seed -> [(step, return)] of a file of results."""
    found = defaultdict(list)
    with open(path) as file:
        for row in csv.DictReader(line for line in file if not line.startswith("#")):
            found[row["seed"]].append((int(row["step"]), float(row["return"])))
    return found


def main(picture: str) -> None:
    figure = Figure(figsize=(12, 3.5), layout="constrained")
    for axis, (task, (returns, mbpo, claim)) in zip(figure.subplots(1, 3), PUBLISHED.items(), strict=True):
        axis.plot(PUBLISHED_STEPS, returns, "k--", label="DHMBPO, published (mean of 8 seeds)")
        axis.plot(100_000, mbpo, "kx", label="MBPO at 100K, published")
        axis.axhline(claim, color="gray", linewidth=0.8)
        for name, color in ((task, "C0"), (f"{task}_small_batches", "C1")):
            label = f"dhmbpo.py, {'published settings' if name == task else 'small batches'}, each a seed"
            for points in curves(Path("results/dhmbpo") / f"{name}.csv").values():
                axis.plot(*zip(*points, strict=True), color=color, linewidth=1.2, label=label)
        handles = dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
        axis.set(title=task, xlabel="environment steps", ylim=(0, None))
    figure.axes[0].set_ylabel("return of an evaluation")
    figure.axes[0].legend(handles.values(), handles.keys(), fontsize=7, loc="lower right")
    figure.savefig(picture, dpi=120)


if __name__ == "__main__":
    main(sys.argv[1])
