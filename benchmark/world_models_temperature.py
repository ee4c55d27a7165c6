"""Score in the dream and in the real environment of controllers evolved at several temperatures, as a Markdown table.

Run:  python benchmark/world_models_temperature.py runs/<run folder> --temperatures 0.1 0.5 1.0 1.15 1.3
The run must have finished M. Its folder stays as it is: C is evolved in copies of it (runs/<run folder>_tau<...>) that
share the recorded frames by hard links. Figures are the last evaluation of the distribution's mean.
"""

import argparse
import os
import shutil
import sys
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

sys.path.insert(0, str(Path(__file__).parent.parent))
import world_models


def evolve_at(folder: str, temperature: float, changes: dict) -> dict[str, float]:
    """Evolves C anew at this temperature in a copy of the run; returns the last value of every scalar."""
    copy = f"{folder.rstrip('/')}_tau{temperature}"
    if not os.path.exists(copy):  # else it is evolved anew in the copy of before
        shutil.copytree(folder, copy, copy_function=lambda a, b: (os.link if a.endswith(".bin") else shutil.copy)(a, b))
    saved = world_models.load_checkpoint(copy, world_models.Args())["args"]
    settings = saved | changes | {"resume": copy, "from_stage": "c", "temperature": temperature}
    world_models.main(world_models.Args(**settings))
    events = EventAccumulator(copy)
    events.Reload()
    return {name: events.Scalars(name)[-1].value for name in events.Tags()["scalars"]}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.1, 0.5, 1.0, 1.15, 1.3])
    parser.add_argument("--generations", type=int)
    parser.add_argument("--eval-episodes", type=int, default=100)
    flags = parser.parse_args()
    changes = {"eval_episodes": flags.eval_episodes, "eval_frequency": 1}
    if flags.generations:
        changes["generations"] = flags.generations
    lines = [f"| temperature | dream (100 dreams) | real ({flags.eval_episodes} episodes) |", "|---|---|---|"]
    for temperature in flags.temperatures:
        last = evolve_at(flags.folder, temperature, changes)
        dream, real = (
            f"{last[f'{name}/episodic_return']:.0f} ± {last[f'{name}/episodic_return_std']:.0f}"
            for name in ("dream", "eval")
        )
        lines.append(f"| {temperature} | {dream} | {real} |")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
