"""Sweeps: the commands, the table, a job that is taken away, the lines of docs/sweeps.md for SLURM."""

import os
import re
import shlex
import subprocess
import sys
import types
from pathlib import Path

import pytest
import tyro
from runs import ROOT, load
from torch.utils.tensorboard import SummaryWriter

sys.path.append(str(ROOT / "benchmark"))
import sweep


def logged(name: str, returns: dict[int, float]) -> str:
    """A run folder with these evaluations."""
    writer = SummaryWriter(f"runs/{name}")
    for step, value in returns.items():
        writer.add_scalar("eval/episodic_return", value, step)
        writer.add_scalar("eval/episodic_return_std", 0.0, step)
    writer.close()
    return f"runs/{name}"


def test_one_command_for_each_task_setting_and_seed():
    """Settings have experiments of their own; flags come before them, so that they may override."""
    args = sweep.Args(script="dyna_q.py", env_ids=("A-v0", "B-v0"), seeds=(1, 2), vary=("", "--kappa 1e-3"))
    found = sweep.commands(args, ["--kappa", "0"])
    assert len(found) == len({" ".join(command) for command in found}) == 8
    assert found[3][1:] == (
        "dyna_q.py --env-id A-v0 --seed 2 --exp-name dyna_q-kappa-1e-3 --resume auto --kappa 0 --kappa 1e-3".split()
    )
    with pytest.raises(SystemExit, match="one name"):
        sweep.commands(sweep.Args(script="dyna_q.py", env_ids=("A-v0",), vary=("--a 1", "--a=1")), [])


def test_table_at_the_last_step_that_all_have_reached():
    """By hand: 1, 2, 3, 10 at step 20; the first folder of seed 4 is another try. The middle half is 2 and 3."""
    scores = {
        "1__5": {10: 0, 20: 1},
        "2__5": {10: 0, 20: 2},
        "3__5": {20: 3, 30: 9},
        "4__5": {20: 77},
        "4__6": {20: 10},
    }
    folders = [logged(f"A-v0__x__{name}", returns) for name, returns in scores.items()]
    folders += [logged("A-v0__y__1__5", {10: 1.0}), logged("A-v0__y__2__5", {20: 1.0}), logged("A-v0__z__1__5", {})]
    assert sweep.table([*folders, "runs/jobs"]).splitlines()[2:] == [
        "| A-v0 | x | 4 | 20 | 4.0 | 3.5 | 2.5 |",
        "| A-v0 | y | 2 | no evaluation in common | | | |",
    ]


def test_a_job_that_is_taken_away_saves_and_is_queued_again(monkeypatch):
    """Job without its queue: `checkpoint` comes while the run is waited for, as from a signal's handler."""
    queued = types.SimpleNamespace(helpers=types.SimpleNamespace(DelayedSubmission=lambda *what: what))
    monkeypatch.setitem(sys.modules, "submitit", queued)
    monkeypatch.setenv("NUMBA_DISABLE_JIT", "1")
    flags = "--env-id FrozenLake-v1 --total-timesteps 1000000 --eval-frequency 0 --resume auto".split()
    command = [sys.executable, str(ROOT / "dyna_q.py"), *flags]
    job, again = sweep.Job(), []

    def taken_away(seconds):
        if list(Path("runs").glob("*/checkpoint.pt")) and not again:
            again.extend(job.checkpoint(command))

    monkeypatch.setattr(sweep.time, "sleep", taken_away)
    job(command)
    assert isinstance(again[0], sweep.Job) and again[1] == command and not hasattr(again[0], "process")
    (folder,) = Path("runs").iterdir()
    assert load(str(folder))["global_step"] < 10**6


@pytest.mark.parametrize("cluster", ["local", "slurm"])
def test_every_command_is_queued_once(cluster, monkeypatch, capsys):
    """With a stand-in for submitit; of three runs the second fails, which is said."""
    queued = []

    class Queued:
        def __init__(self, command):
            queued.append(command)
            self.failed, self.paths = "2" in command, types.SimpleNamespace(stderr="its log")

        def done(self):
            return True

        def exception(self):
            return RuntimeError() if self.failed else None

    class Executor:
        def __init__(self, **settings):
            assert settings["cluster"] == cluster

        def update_parameters(self, **settings):
            pass

        def submit(self, job, command):
            return Queued(command)

        def map_array(self, job, commands):
            return [self.submit(job, command) for command in commands]

    monkeypatch.setitem(sys.modules, "submitit", types.SimpleNamespace(AutoExecutor=Executor))
    monkeypatch.setattr(sweep.time, "sleep", lambda seconds: None)
    args = sweep.Args(script="dyna_q.py", env_ids=("A-v0",), cluster=cluster, jobs=2)
    with pytest.raises(SystemExit) as stopped:
        sweep.run(args, [])
    said = capsys.readouterr().out
    assert queued == sweep.commands(args, []) and stopped.value.code == 1
    assert said.count(": done") == 2 and said.count("FAILED, see its log") == 1


@pytest.mark.parametrize("code", [0, 143])
def test_the_array_of_the_page(code):
    """With stand-ins for srun and scontrol: task and seed of index 5, and a requeue after SIGTERM alone."""
    (text,) = re.findall(r"```bash\n(#!/bin/bash.*?)```", (ROOT / "docs/sweeps.md").read_text(), re.DOTALL)
    assert len(text.splitlines()) <= 13
    stand_ins = f'srun() {{ echo "$@"; return {code}; }}; scontrol() {{ echo "$@"; }}\n'
    env = os.environ | {"SLURM_ARRAY_TASK_ID": "5", "SLURM_ARRAY_JOB_ID": "77", "SLURM_CPUS_PER_TASK": "8"}
    done = subprocess.run(["bash", "-c", stand_ins + text], env=env, capture_output=True, text=True, check=False)
    said = ["python dreamer.py --env-id cheetah-run --seed 3 --resume auto"] + ["requeue 77_5"] * (code == 143)
    assert done.stdout.splitlines() == said and not done.stderr


def test_the_commands_of_the_docs_are_understood():
    """Settings begin with a dash, as flags of the sweep itself do."""
    page = (ROOT / "docs" / "sweeps.md").read_text().replace("\\\n", " ")
    found = [shlex.split(line) for line in page.splitlines() if "sweep.py run" in line]
    settings = []
    for words in found:
        words = words[words.index("run") + 1 :]
        end = words.index("--") if "--" in words else len(words)
        args = tyro.cli(sweep.Args, args=sweep.quoted(words[:end]))
        settings.append([command[-2:] for command in sweep.commands(args, [])[:: len(args.seeds)]])
    assert ["--kappa", "0"] in settings[0] and ["--kappa", "1e-3"] in settings[0] and len(found) == 2
