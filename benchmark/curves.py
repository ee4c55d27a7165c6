"""Evaluation curves of run folders as one PNG, and their last evaluation as a Markdown table.

Run:  python benchmark/curves.py docs/dreamer_cpu.png runs/cheetah-run__dreamer__*
Runs of the same task and experiment are one curve: the mean over seeds, a thin line for each seed; experiments of the
same task share a picture. Figures come from the event files.
"""

import json
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


def read_run(folder: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Steps, mean and standard deviation of the evaluations of a run."""
    events = EventAccumulator(folder, size_guidance={"scalars": 0})
    events.Reload()
    mean, std = (events.Scalars(f"eval/episodic_return{suffix}") for suffix in ("", "_std"))
    return np.array([e.step for e in mean]), np.array([e.value for e in mean]), np.array([e.value for e in std])


def main(picture: str, folders: list[str]) -> None:
    tasks = defaultdict(lambda: defaultdict(list))
    for folder in sorted(folders):
        task, experiment, seed, _ = Path(folder).name.split("__")
        tasks[task][experiment].append((seed, *read_run(folder)))
    figure = Figure(figsize=(5 * len(tasks), 3.5), layout="constrained")
    for axis, (task, experiments) in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks.items(), strict=True):
        for i, (experiment, runs) in enumerate(experiments.items()):
            shortest = min(len(steps) for _, steps, _, _ in runs)
            for _, steps, mean, _ in runs:
                assert (steps[:shortest] == runs[0][1][:shortest]).all(), f"{task}: evaluations at different steps"
                axis.plot(steps, mean, color=f"C{i}", alpha=0.35, linewidth=1)
            label = f"{experiment}, {len(runs)} seed{'s' if len(runs) > 1 else ''}"
            average = np.mean([mean[:shortest] for _, _, mean, _ in runs], 0)
            axis.plot(runs[0][1][:shortest], average, color=f"C{i}", label=label)
        axis.set(title=task, xlabel="environment steps", ylabel="evaluation return")
        axis.legend()
        axis.grid(alpha=0.3)
    figure.savefig(picture, dpi=120)
    print("| task | experiment | seed | steps | last evaluation (mean +- std over episodes) |\n|---|---|---|---|---|")
    for task, experiments in tasks.items():
        for experiment, runs in experiments.items():
            for seed, steps, mean, std in runs:
                print(f"| {task} | {experiment} | {seed} | {steps[-1]:,} | {mean[-1]:.1f} +- {std[-1]:.1f} |")
            last = [mean[-1] for _, _, mean, _ in runs]
            over = f"{np.mean(last):.1f} +- {np.std(last):.1f} over seeds"
            print(f"| {task} | {experiment} | all {len(last)} | | {over} |")
    for task, experiments in tasks.items():
        for experiment, runs in experiments.items():
            for seed, steps, mean, _ in runs:
                points = dict(zip(steps.tolist(), mean.round(1).tolist(), strict=True))
                print(json.dumps({"task": task, "experiment": experiment, "seed": seed, "returns": points}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
