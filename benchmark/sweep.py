"""Runs a script over tasks, settings and seeds, on this machine or as one SLURM array, and tabulates what came of it.

python benchmark/sweep.py run --script dyna_q.py --env-ids FrozenLake-v1 Taxi-v4 --seeds 1 2 3 --jobs 2 \
  --vary "--kappa 0" "--kappa 1e-3" -- --total-timesteps 20000          # what follows -- is for every run
python benchmark/sweep.py run --cluster slurm --partition gpu --script dreamer.py ...
python benchmark/sweep.py table runs/*

Needs submitit (pip install submitit), which queues the jobs. On a cluster a job that is taken away, or that is out of
time, saves, is queued again and continues its run folder (--resume auto); the same command, given again, does what is
missing.
"""

import contextlib
import itertools
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import tyro
from export import evaluations


@dataclass
class Args:
    script: str  # script to run
    env_ids: tuple[str, ...]  # tasks
    seeds: tuple[int, ...] = (1, 2, 3)  # seeds of each task and setting
    vary: tuple[str, ...] = ("",)  # settings to compare, each the flags of one: "--kappa 1e-3", " --no-save-buffer"
    cluster: Literal["local", "slurm"] = "local"  # where
    jobs: int = 1  # runs at a time
    minutes: int = 24 * 60  # time limit of a job; a run that needs more continues in the next one
    partition: str | None = None  # of the cluster
    gpus: int = 1  # of a job on the cluster
    cpus: int = 8  # of a job on the cluster


def quoted(words: list[str]) -> list[str]:
    """Words of a command line whose settings, "--kappa 1e-3", are not taken for flags of this program."""
    return [f" {word}" if word.startswith("-") and re.search(r"\s", word) else word for word in words]


def commands(args: Args, flags: list[str]) -> list[list[str]]:
    """One command for each task, setting and seed; the setting is part of --exp-name, and so of the folder's name."""
    stem = Path(args.script).stem
    names = ["-".join([stem, *re.findall(r"[\w.+][\w.+-]*", setting)]) for setting in args.vary]
    if len(set(names)) < len(names):
        raise SystemExit(f"error: settings of one name: {names}")
    found = []
    for env_id, (name, setting), seed in itertools.product(
        args.env_ids, zip(names, args.vary, strict=True), args.seeds
    ):
        which = ["--env-id", env_id, "--seed", str(seed), "--exp-name", name, "--resume", "auto"]
        found.append([sys.executable, args.script, *which, *flags, *shlex.split(setting)])
    return found


class Job:
    """What submitit runs, and asks for a checkpoint before the job is taken away."""

    def __call__(self, command: list[str]) -> None:
        """The run has a session of its own: the cluster's signal is for submitit, which calls `checkpoint`."""
        self.process = subprocess.Popen(command, start_new_session=True)
        while self.process.poll() is None:
            time.sleep(0.5)
        if self.process.returncode:
            raise RuntimeError(f"exit code {self.process.returncode}")

    def checkpoint(self, command: list[str]):
        """Has the run save and end; what is queued in its place continues it."""
        import submitit

        os.kill(self.process.pid, signal.SIGTERM)
        with contextlib.suppress(ChildProcessError):  # not process.wait, which this signal may have interrupted
            os.waitpid(self.process.pid, 0)
        return submitit.helpers.DelayedSubmission(Job(), command)


def run(args: Args, flags: list[str]) -> None:
    """Queues all runs, at most `jobs` at a time, and waits for them; exit code 1 if one has failed."""
    import submitit

    executor = submitit.AutoExecutor(folder="runs/jobs", cluster=args.cluster, slurm_max_num_timeout=1000)
    executor.update_parameters(timeout_min=args.minutes)
    if args.cluster == "slurm":
        executor.update_parameters(gpus_per_node=args.gpus, cpus_per_task=args.cpus, slurm_partition=args.partition)
        executor.update_parameters(slurm_array_parallelism=args.jobs, slurm_signal_delay_s=120)
    todo, jobs, failed = commands(args, flags), {}, 0
    if args.cluster == "slurm":
        jobs = dict(zip(executor.map_array(Job(), todo), todo, strict=True))
        todo = []
    while todo or jobs:
        while todo and len(jobs) < args.jobs:
            command = todo.pop(0)
            jobs[executor.submit(Job(), command)] = command
        for job in [job for job in jobs if job.done()]:
            error = job.exception()
            failed += error is not None
            said = "done" if error is None else f"FAILED, see {job.paths.stderr}"
            print(f"{shlex.join(jobs.pop(job)[1:])}: {said}", flush=True)
        time.sleep(1)
    raise SystemExit(failed > 0)


def interquartile_mean(scores: list[float]) -> float:
    """The mean without the lowest and the highest quarter (rounded down) of the scores."""
    cut = len(scores) // 4
    return float(np.mean(sorted(scores)[cut : len(scores) - cut]))


def table(folders: list[str]) -> str:
    """One row for each task and experiment: the returns of its runs at the last evaluation that all of them have made.

    A run's score is the mean return of that evaluation's episodes. Mean and standard deviation (divided by n) are over
    runs; the interquartile mean, from four runs on, is that of one task, of returns that are not normalized. Of two
    folders of one seed the later counts.
    """
    groups = defaultdict(dict)
    for folder in sorted(folders, key=lambda folder: Path(folder).name.split("__")[-1]):
        parts = Path(folder).name.split("__")
        if len(parts) == 4 and (points := evaluations(folder)):
            groups[tuple(parts[:2])][parts[2]] = {step: mean for step, mean, _ in points}
    lines = ["| task | experiment | runs | step | mean | std | interquartile mean |", "|---|---|---|---|---|---|---|"]
    for (task, experiment), curves in sorted(groups.items()):
        row = f"| {task} | {experiment} | {len(curves)} "
        if common := set.intersection(*map(set, curves.values())):
            scores = [curve[max(common)] for curve in curves.values()]
            middle = f"{interquartile_mean(scores):.1f}" if len(scores) >= 4 else ""
            lines.append(f"{row}| {max(common):,} | {np.mean(scores):.1f} | {np.std(scores):.1f} | {middle} |")
        else:
            lines.append(f"{row}| no evaluation in common | | | |")
    return "\n".join(lines)


if __name__ == "__main__":
    if sys.argv[1:2] == ["table"]:
        print(table(sys.argv[2:]))
    elif sys.argv[1:2] == ["run"]:
        split = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
        run(tyro.cli(Args, args=quoted(sys.argv[2:split])), sys.argv[split + 1 :])
    else:
        raise SystemExit(__doc__)
