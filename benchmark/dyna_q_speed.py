"""Speed of dyna_q.py on one core: planning updates per second of 1, 30 and 1,000 learners in the Dyna maze, as JSON.

Run:  python benchmark/dyna_q_speed.py
"planner" is the compiled step alone (direct update, model learning, planning), "loop" a whole step of the learners:
environment, actions, random numbers, learning. Medians of several stretches; compilation is timed by itself.
"""

import json
import os
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from dyna_q_figures import Trial, dyna_q


def seconds_per_call(function: Callable, calls: int) -> float:
    """Median of five stretches."""
    stretches = []
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(calls):
            function()
        stretches.append((time.perf_counter() - start) / calls)
    return float(np.median(stretches))


def main() -> None:
    start = time.perf_counter()
    Trial(env_id="DynaMaze-v0").step()
    rows = [{"python": platform.python_version(), "numpy": np.__version__, "compile_s": time.perf_counter() - start}]
    settings = [(learners, n, {}) for learners in (1, 30, 1000) for n in (5, 50)]
    settings += [(1, 50, {"env_id": "FrozenLake-v1"}), (1, 50, {"kappa": 1e-4}), (1, 50, {"prioritized": True})]
    for learners, n, changes in settings:
        trial = Trial(**{"env_id": "DynaMaze-v0", "num_envs": learners, "planning_steps": n} | changes)
        for _ in range(2000):  # the model is complete, the values have settled
            trial.step()
        loop = seconds_per_call(trial.step, 20_000 // (4 * learners) + 20)
        row = {"learners": learners, "n": n, **changes, "loop_us": loop * 1e6, "loop_steps_per_s": learners / loop}
        if not trial.args.prioritized:  # which updates only what has changed
            uniforms = trial.rng["planning"].random((learners, n, 2))
            arguments = trial.q, trial.model, trial.sums, *trial.transition, uniforms, trial.time, trial.settings
            assert not dyna_q.learn_by_dyna_q(*arguments)  # there is room for what has been seen already
            planner = seconds_per_call(lambda a=arguments: dyna_q.learn_by_dyna_q(*a), 20_000 // (4 * learners) + 20)
            row |= {"loop_updates_per_s": learners * n / loop, "planner_updates_per_s": learners * n / planner}
        rows.append(row)
    rows[0]["load"] = os.getloadavg()[0]  # processes that wanted to compute meanwhile, this one among them
    for row in rows:
        print(json.dumps({k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in row.items()}))


if __name__ == "__main__":
    main()
