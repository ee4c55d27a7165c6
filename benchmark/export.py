"""Writes the evaluations of run folders as results/<script>/<task>.csv: seed, step, return, std of the episodes.

python benchmark/export.py results/dreamer/walker-walk.csv "comment: command, commit" runs/walker-walk__dreamer__*
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
    return [(mean.step, mean.value, std.value) for mean, std in pairs]


def export(path: str, comment: str, run_dirs: list[str]) -> None:
    """One row an evaluation; the seed is read from the folder's name <task>__<script>__<seed>__<time>."""
    lines = [f"# {comment}", "seed,step,return,std"]
    for run_dir in sorted(run_dirs):
        seed = Path(run_dir).name.split("__")[2]
        lines += [f"{seed},{step},{mean:.2f},{std:.2f}" for step, mean, std in evaluations(run_dir)]
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    export(sys.argv[1], sys.argv[2], sys.argv[3:])
