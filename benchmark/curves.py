"""The learning curves of the docs, drawn from the evaluations in results/, with the published points in the same plot.

Run:  python benchmark/curves.py [picture ...]        all of FIGURES, or the named ones, into docs/
A file of results has the columns seed, step (or generation), return, std. Lines with # say what was run; those in the
middle of a file begin another group of runs. A group is one curve: a thin line for each seed, and their mean
(interpolated) over the steps that all have; a band where only mean, lowest and highest of the seeds are known.
`benchmark/export.py` writes such files.
"""

import csv
import sys
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

ROOT = Path(__file__).parent.parent
SIZES = "laptop, ray-caster", "published size, OpenGL", None, "on a CPU, OpenGL", None, None


@dataclass
class Panel:
    title: str
    curves: list[
        tuple[str, str | tuple]
    ]  # (file in results/, label of its runs, or of each of its groups; None = left out)
    published: list[tuple[str, str]] = field(default_factory=list)  # (task, method) in results/published.csv
    until: float | None = None  # last published step shown
    xlabel: str = "environment steps"
    ylabel: str = "return of an evaluation"  # of a figure's first panel
    marks: dict[str, float] = field(default_factory=dict)  # horizontal lines


AIMS = {"Hopper": 3_000, "HalfCheetah": 10_000, "Humanoid": 5_000}  # within 100,000 steps
FIGURES = {
    "mbpo_cheap": [
        Panel(
            "InvertedPendulum-v5",
            [("mbpo/InvertedPendulum-v5", "MBPO"), ("mbpo/InvertedPendulum-v5_no_model", "no model")],
        ),
        Panel("Pendulum-v1", [("mbpo/Pendulum-v1", "MBPO")]),
    ],
    "mbpo_hopper": [Panel("Hopper-v5", [("mbpo/Hopper-v5", "mbpo.py")], [("Hopper", "MBPO")], until=40_000)],
    "dhmbpo_returns": [
        Panel(
            f"{task}-v5",
            [(f"dhmbpo/{task}-v5", "published settings"), (f"dhmbpo/{task}-v5_small_batches", "small batches")]
            + [(f"dhmbpo/{task}-v5_laptop", "laptop, one CPU thread")] * (task != "Hopper")
            + [("mbpo/HalfCheetah-v5_no_model", "no model: SAC")] * (task == "HalfCheetah"),
            [(task, "DHMBPO T = 3"), (task, "MBPO")], until=100_000, marks={f"the aim, {aim:,}": aim},
        )
        for task, aim in AIMS.items()
    ],
    "dreamer_cpu": [Panel("cartpole-swingup from state", [("dreamer/cartpole-swingup", (None, "small networks"))])],
    "dreamer_walker_walk": [
        Panel("walker-walk from pixels", [("dreamer/walker-walk", SIZES)], [("walker-walk", "Dreamer")], until=210_000)
    ],
    "dreamer_v3_returns": [
        Panel(
            "cartpole-swingup from state",
            [
                ("dreamer_v3/cartpole-swingup", "evaluations"),
                ("dreamer_v3/cartpole-swingup_training", "training episodes"),
            ],
            [("cartpole-swingup state", "DreamerV3")], until=100_000, ylabel="return",
        ),
        Panel(
            "walker-walk from state",
            [
                ("dreamer_v3/walker-walk_state", ["laptop, ratio 256", "1m, ratio 512"]),
                ("dreamer_v3/walker-walk_state_training", ["laptop, training", "1m, training"]),
            ],
            [("walker-walk state", "DreamerV3")], until=100_000,
        ),
        Panel(
            "walker-walk from pixels",
            [
                ("dreamer_v3/walker-walk", ["1m, ratio 256", None, "laptop, ratio 64"]),
                ("dreamer_v3/walker-walk_training", ["1m, training", "laptop, training"]),
            ],
            [("walker-walk pixels", "DreamerV3")], until=100_000,
        ),
    ],
    "muzero_cartpole": [Panel("CartPole-v1", [("muzero/CartPole-v1_2K", "20 episodes every 2K steps")])],
    "world_models_scores": [
        Panel(
            "CarRacing-v3, C in the real environment\n(100K steps recorded, from a dream's C 580K)",
            [
                (
                    "world_models/CarRacing-v3_real",
                    ["an action for each step", "an action for four steps", "four steps, from a dream's C"],
                )
            ],
            [("CarRacing generations", "World Models")], until=50, xlabel="generation",
        ),
        Panel(
            "TakeCover, C in its dream alone\n(400K real steps recorded, no others)",
            [("world_models/VizdoomTakeCover-v1_dream", "real game")],
            xlabel="generation", marks={"counts as solved": 750, "published": 1092},
        ),
    ],
}  # fmt: skip


def read(name: str) -> list[dict[str, list[tuple[float, float]]]]:
    """The groups of results/<name>.csv: for each seed its points (step, return), the last of several at a step."""
    lines = [line for line in (ROOT / "results" / f"{name}.csv").read_text().splitlines() if line]
    header = next(line for line in lines if not line.startswith("#"))
    groups = [[]]
    for line in lines[lines.index(header) + 1 :]:
        if not line.startswith("#"):
            groups[-1].append(line)
        elif groups[-1]:
            groups.append([])
    found = []
    for group in groups:
        points = defaultdict(dict)
        for row in csv.DictReader([header, *group]):
            points[row["seed"]][float(row.get("step") or row.get("generation"))] = float(row["return"])
        found.append({seed: sorted(of.items()) for seed, of in points.items()})
    return found


def draw(axis: Axes, runs: dict[str, list[tuple[float, float]]], label: str, color: str) -> None:
    """One group: thin lines and their mean, or mean and band."""
    if "mean" in runs:
        steps, mean = np.array(runs["mean"]).T
        axis.fill_between(
            steps, *(np.array(runs[edge])[:, 1] for edge in ("lowest", "highest")), color=color, alpha=0.2
        )
        axis.plot(steps, mean, color=color, label=f"{label}, 3 seeds: mean and range")
        return
    for points in runs.values():
        axis.plot(
            *np.array(points).T, color=color, alpha=0.45 if len(runs) > 1 else 1, linewidth=1, marker=".", markersize=4
        )
    lines = [np.array(points) for points in runs.values()]
    first, last = max(line[0, 0] for line in lines), min(line[-1, 0] for line in lines)
    steps = sorted({step for line in lines for step in line[:, 0] if first <= step <= last})
    mean = np.mean([np.interp(steps, *line.T) for line in lines], 0)
    number = "one seed" if len(runs) == 1 else f"{len(runs)} seeds"
    axis.plot(steps, mean, color=color, linewidth=2, label=f"{label}, {number}")


def published(axis: Axes, task: str, method: str, until: float | None, marker: str, color: str) -> None:
    lines = (line for line in open(ROOT / "results/published.csv") if not line.startswith("#"))
    rows = [row for row in csv.DictReader(lines) if (row["task"], row["method"]) == (task, method)]
    rows = [row for row in rows if until is None or float(row["step"]) <= until]
    steps, mean, std = (np.array([float(row[key] or "nan") for row in rows]) for key in ("step", "return", "std"))
    label = f"{method}, published" + (f", {rows[0]['seeds']} seeds" if rows[0]["seeds"] != "1" else "")
    axis.errorbar(steps, mean, std, color=color, linestyle="--", marker=marker, linewidth=1, capsize=2, label=label)


def figure_of(panels: list[Panel]) -> Figure:
    figure = Figure(figsize=(max(4.4 * len(panels), 5.5), 3.4), layout="constrained")
    for axis, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        colors = iter(f"C{i}" for i in range(10))
        for name, labels in panel.curves:
            groups = read(name)
            for runs, label in zip(groups, [labels] * len(groups) if isinstance(labels, str) else labels, strict=False):
                if label:
                    draw(axis, runs, label, next(colors))
        for (task, method), marker, color in zip(panel.published, "xs", ("k", "0.6"), strict=False):
            published(axis, task, method, panel.until, marker, color)
        for i, (label, value) in enumerate(panel.marks.items()):
            axis.axhline(value, color="k", linestyle=(":", "-.")[i], linewidth=0.8, label=label)
        axis.set(title=panel.title, xlabel=panel.xlabel)
        axis.xaxis.set_major_formatter(EngFormatter(sep=""))
        axis.grid(alpha=0.3)
    longest = max(len(axis.get_legend_handles_labels()[0]) for axis in figure.axes)
    below = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.2)} if longest > 3 else {}  # there it covers no curve
    for axis in figure.axes:
        axis.legend(fontsize=7, **below)
    figure.set_figheight(3.4 + 0.2 * longest * bool(below))
    figure.axes[0].set_ylabel(panels[0].ylabel)
    return figure


if __name__ == "__main__":
    for picture in sys.argv[1:] or FIGURES:
        figure_of(FIGURES[Path(picture).stem]).savefig(ROOT / "docs" / f"{Path(picture).stem}.png", dpi=110)
