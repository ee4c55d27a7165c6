"""Writes the evaluations of run folders as results/<script>/<task>.csv: seed, step, return, std of the episodes.

python benchmark/export.py results/dreamer/walker-walk.csv "comment: command, commit" runs/walker-walk__dreamer__*
Where dhmbpo.py logs them: mean x velocity, share of full-length episodes, whether it walks.
A file that ends in _training.csv gets the training episodes: seed, step, return (mean of those that ended at a step).
A file that has more points than these runs is left as it is.
"""

import sys
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


def evaluations(run_dir: str) -> list[tuple[int, float, float]]:
    """(step, mean return, standard deviation) of each evaluation in a run folder's event files."""
    events = EventAccumulator(run_dir, size_guidance={"scalars": 0})
    events.Reload()
    if "eval/episodic_return" not in events.Tags()["scalars"]:
        return []
    pairs = zip(events.Scalars("eval/episodic_return"), events.Scalars("eval/episodic_return_std"), strict=True)
    points = {mean.step: (mean.value, std.value) for mean, std in pairs}  # one that was made again counts once
    return [(step, *values) for step, values in points.items()]


WALKING = "x_velocity", "full_length_share", "walks"  # of tasks that have a velocity


def walking(run_dir: str) -> dict[int, list[float]]:
    """What else an evaluation says at each step: dhmbpo.py's measures of walking, where there are any."""
    events = EventAccumulator(run_dir, size_guidance={"scalars": 0})
    events.Reload()
    found = {}
    for name in WALKING if "eval/walks" in events.Tags()["scalars"] else ():
        for event in events.Scalars(f"eval/{name}"):
            found.setdefault(event.step, {})[name] = event.value  # one that was made again counts once
    return {step: [values[name] for name in WALKING] for step, values in found.items()}


def training_episodes(run_dir: str) -> list[tuple[int, float]]:
    """(step, mean return of the episodes that ended at it) in a run folder's event files."""
    events = EventAccumulator(run_dir, size_guidance={"scalars": 0})
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars("charts/episodic_return")]


def export(path: str, comment: str, run_dirs: list[str]) -> None:
    """One row an evaluation or episode; the seed is in the folder's name, <task>__<script>__<seed>__<time>."""
    training = path.endswith("_training.csv")
    more = {} if training else {run_dir: walking(run_dir) for run_dir in run_dirs}
    columns = ["seed", "step", "return", *([] if training else ["std"]), *(WALKING if any(more.values()) else ())]
    lines = [f"# {comment}", ",".join(columns)]
    for run_dir in sorted(run_dirs):
        seed, points = Path(run_dir).name.split("__")[2], (training_episodes if training else evaluations)(run_dir)
        for step, *numbers in points:
            numbers += more.get(run_dir, {}).get(step, [])
            lines.append(",".join([seed, str(step), *(f"{number:.2f}" for number in numbers)]))
    old = Path(path).read_text().splitlines() if Path(path).exists() else []
    if sum(not line.startswith("#") for line in old) > len(lines) - 1:  # comments are no points
        print(f"{path} has more points than these runs and stays: move it away first", file=sys.stderr)
        return
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    export(sys.argv[1], sys.argv[2], sys.argv[3:])
