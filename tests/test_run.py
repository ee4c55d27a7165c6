"""Whole runs of every script, tiny and on the CPU: logs, determinism, resuming, interruptions, bad input, playing."""

import ctypes
import dataclasses
import importlib
import math
import multiprocessing
import os
import pickle
import platform
import random
import re
import signal
import subprocess
import sys
import time
import types
import zipfile
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from runs import (
    LAKE,
    ROOT,
    SCRIPTS,
    TINY,
    TRAITS,
    TWO_ENVS,
    VECTORS,
    WRITERS,
    Started,
    assert_healthy,
    command_line,
    copy_of,
    differences,
    each,
    error_of,
    finished,
    flags_of,
    load,
    losses,
    only,
    processes_in,
    resume,
    run,
    scalars,
    start,
    tiny,
    wait_for,
)
from torch.utils.tensorboard import SummaryWriter


@pytest.mark.parametrize("count", [1, 2, 17])
def test_episodes_that_end_together_are_one_line(script, count):
    """Their mean is printed and logged; those that go on do not count."""
    returns, lengths, dones = np.full(40, 1e6), np.full(40, 10**6), np.arange(40) % 2 == np.zeros(40)
    dones &= np.cumsum(dones) <= count
    returns[dones], lengths[dones] = np.arange(count), 2 * np.arange(count)
    said, logged = [], {}
    progress = types.SimpleNamespace(set_postfix=lambda *args, **kwargs: None)
    run = types.SimpleNamespace(step=80, say=said.append, log=logged.update, progress=progress)
    script.Run.log_episodes(run, {"episode": {"r": returns, "l": lengths}}, dones)
    number = f", {count} episodes" if count > 1 else ""
    assert said == [f"global_step=80, episodic_return={(count - 1) / 2:.1f}, length={count - 1}{number}"]
    assert logged == {"charts/episodic_return": (count - 1) / 2, "charts/episodic_length": count - 1}


def test_weights_alone_on_request(script):
    """--save-model: what the checkpoint holds of the agent, named after the experiment; else no file."""
    run_dir = run(script, save_model=True, exp_name="mine")
    weights = torch.load(Path(run_dir, "mine.pt"), weights_only=True)
    assert differences(dict(weights), dict(load(run_dir)["parts"]["agent"])) == [] and weights
    assert {Path(finished(script), name).exists() for name in (f"{script.__name__}.pt", "mine.pt")} == {False}


# === Determinism ===


@pytest.mark.parametrize("two", [False, True], ids=["one", "two"])
def test_same_seed_same_run(script, two):
    """The seed fixes losses, parameters, replay and generators; another seed changes them."""
    changes = TRAITS[script.__name__]["two"] if two else {}
    first, again = finished(script, **changes), run(script, **changes)
    assert losses(first) == losses(again)
    assert differences(load(first), load(again)) == []
    if not two:
        other = run(script, seed=2)
        assert losses(first) != losses(other)
        found = differences(load(first)["parts"], load(other)["parts"])
        assert any("agent" in path for path in found) and any("replay" in path for path in found)


def test_evaluation_does_not_change_training(script):
    """With and without evaluations, bit for bit."""
    often, never = run(script, eval_frequency=18), finished(script)
    assert "eval/episodic_return" in scalars(often) and "eval/episodic_return" not in scalars(never)
    a, b = load(often), load(never)
    assert a["args"].pop("eval_frequency") != b["args"].pop("eval_frequency")
    assert differences(a, b) == []


# === Resuming ===


RESUMED = {
    "dreamer": {"pixels": {}, "discrete": {"env_id": "CartPole-v1"}, "vectors": VECTORS},
    "dyna_q": {
        "counts": {},
        "last": {"model": "last"},
        "kappa": {"kappa": 1e-2},
        "prioritized": {"prioritized": True},
        "terminations": {"env_id": "fake_envs:DeadlyLadder-v0"},
    },
}


RESUMED["mbpo"] = {
    "plain": {},
    "no model": {"real_ratio": 1.0},
    "all model": {"real_ratio": 0.0},
    "longer rollouts": {"rollout_schedule": (0, 3, 1, 4), "model_retain_epochs": 2},
    "two": TWO_ENVS,
}


RESUMED["dhmbpo"] = {"plain": {}, "two": TWO_ENVS}
RESUMED["muzero"] = {
    "gumbel": {},
    "puct": {"search": "puct", "priority_alpha": 0.5},
    "uniform": {"priority_alpha": 0.0},
    "reanalyzed": {"reanalyze_ratio": 0.5},
    "pixels": {"env_id": "fake_envs:CalmPixelsDiscrete-v0", "unroll_steps": 1},
    "two": TWO_ENVS,
}


RESUMED["dreamer_v3"] = {
    "pixels": {"env_id": "fake_envs:CalmPixelsDiscrete-v0"},
    "vectors": {},
    "continuous": {"env_id": "fake_envs:Counter-v0"},
    "wrapped": {"buffer_size": 30},
}


RESUMED["world_models"] = {"dream": {}, "real": {"controller_env": "real"}, "two": TWO_ENVS}
RESUMED["world_models"] |= {"repeated": {"action_repeat": 2}}


RESUMED["dyna_q"] |= {"prioritized last": {"prioritized": True, "model": "last"}, "two": TWO_ENVS}


@each(RESUMED)
def test_stopped_and_resumed_equals_never_stopped(name, kind):
    """Parameters, optimizers, replay, counters and generators of the two final checkpoints, bit for bit."""
    script, changes = importlib.import_module(name), RESUMED[name][kind]
    num_envs = changes.get("num_envs", 1)
    half, full = 36 * num_envs, 60 * num_envs
    whole = run(script, **changes, total_timesteps=full)
    halfway = run(script, **changes, total_timesteps=half)
    resumed = resume(script, halfway, **changes, total_timesteps=full)
    if changes.get("env_id") == "CartPole-v1":  # stopped in the middle of an episode, which a resume does not replay
        assert load(resumed)["global_step"] == full
        return
    assert differences(load(whole), load(resumed)) == []
    after = {tag: [value for value in values if value[0] > half] for tag, values in losses(whole).items()}
    assert any(values for tag, values in after.items() if tag.startswith("losses/"))
    for tag, values in after.items():
        assert set(values) <= set(losses(resumed)[tag]), tag
    assert_healthy(resumed)


@pytest.mark.parametrize("changes", [{}, TWO_ENVS], ids=["one", "two"])
def test_two_resumes_of_a_checkpoint_are_equal(script, changes):
    """Also in the middle of an episode, or of one each in two environments."""
    run_dir = run(script, **changes, total_timesteps=24 + 6 * changes.get("num_envs", 1))
    copy = copy_of(run_dir)
    first, second = (load(resume(script, folder, **changes, total_timesteps=48)) for folder in (run_dir, copy))
    assert differences(first, second) == []


def test_resuming_equals_what_was_saved(script):
    """A resumed run that has nothing left to do writes the checkpoint it has read."""
    run_dir = finished(script)
    before = load(run_dir)
    assert differences(before, load(resume(script, run_dir))) == []


def test_resume_replaces_what_was_logged_after_the_checkpoint(script):
    """A run killed after its checkpoint has logged steps that the resumed run logs again: curves show them once."""
    run_dir = run(script, total_timesteps=24)
    early = Path(run_dir, "checkpoint.pt").read_bytes()
    resume(script, run_dir, total_timesteps=48)
    Path(run_dir, "checkpoint.pt").write_bytes(early)
    resume(script, run_dir, total_timesteps=60)
    assert_healthy(run_dir)
    steps = [step for step, _ in scalars(run_dir)["charts/episodic_return"]]
    assert steps == [12, 24, 36, 48, 60]


def test_logs_are_flushed_before_a_checkpoint(script, monkeypatch):
    """What a resume will not log again is handed to the disk first."""
    waiting, left, save = [], {}, script.save_checkpoint
    add_scalar, flush = SummaryWriter.add_scalar, SummaryWriter.flush

    def save_and_look(run_dir, args, global_step, parts, rng):
        left[global_step] = list(waiting)
        save(run_dir, args, global_step, parts, rng)

    monkeypatch.setattr(SummaryWriter, "add_scalar", lambda *args: (waiting.append(args[1]), add_scalar(*args)))
    monkeypatch.setattr(SummaryWriter, "flush", lambda self: (flush(self), waiting.clear()))
    monkeypatch.setattr(script, "save_checkpoint", save_and_look)
    run_dir = run(script)
    assert left == {0: [], 24: [], 48: []} and scalars(run_dir)


def test_without_saved_buffer_a_resume_goes_on(script):
    """--no-save-buffer: the replay is not in the file, the rest is; a resume keeps what was learned."""
    settings = TRAITS[script.__name__]["quick"]
    run_dir, kept = run(script, **settings, save_buffer=False), load(finished(script, **settings))
    saved = load(run_dir)
    assert not {"replay", "open_episodes"} & set(saved["parts"])
    for part in saved["parts"]:
        assert differences(saved["parts"][part], kept["parts"][part]) == [], part
    resume(script, run_dir, **settings, save_buffer=False)
    assert differences(saved, load(run_dir)) == []
    resume(script, run_dir, **settings, save_buffer=False, total_timesteps=84)
    assert load(run_dir)["global_step"] == 84
    assert_healthy(run_dir)


def test_command_line_resume_takes_the_runs_own_settings(script, monkeypatch, capsys):
    """--resume needs no other flag; total_timesteps may be given anew; any setting that clashes is named."""
    run_dir = finished(script)
    before = load(run_dir)["args"]
    anew = {"total_timesteps": 60} | ({"buffer_on_gpu": False} if "buffer_on_gpu" in before else {})
    flags = ["--total-timesteps", "60"] + ["--no-buffer-on-gpu"] * (len(anew) - 1)
    command_line(monkeypatch, script, "--resume", run_dir, *flags)
    state = load(run_dir)
    assert state["global_step"] == 60 and state["args"] == before | anew
    name = TRAITS[script.__name__]["fixed"]
    flag = f"--{name.replace('_', '-')}"
    assert before[name] == TINY[script.__name__][name]
    line = error_of(capsys, command_line, monkeypatch, script, "--resume", run_dir, flag, "7")
    assert f"{flag} 7" in line
    assert differences(state, load(run_dir)) == []


# === Interruptions ===


@pytest.mark.stands_for_all("dyna_q", "mbpo", "world_models")
@pytest.mark.parametrize("num_envs", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_kill_at_random_moments_keeps_a_loadable_checkpoint(script, num_envs):
    """Again and again kill -9: what is there always loads, its step never goes back, and a resume goes on from it."""
    traits = TRAITS[script.__name__]
    settings = TINY[script.__name__] | traits["quick"] | {"num_envs": num_envs}
    settings |= {"total_timesteps": 10**6, "checkpoint_frequency": 1}
    context = multiprocessing.get_context("forkserver")
    body = importlib.import_module("fake_envs").run_script
    generator, step, run_dir = random.Random(0), -1, None
    for _ in range(traits["kills"]):
        process = context.Process(target=body, args=(script.__name__, settings))
        process.start()
        if run_dir is None:
            wait_for(lambda: list(Path("runs").glob("*/checkpoint.pt")))
            run_dir = str(next(Path("runs").iterdir()))
            settings["resume"] = run_dir
        else:
            writes = Path(run_dir, "checkpoint.pt").stat().st_mtime_ns
            wait_for(lambda: Path(run_dir, "checkpoint.pt").stat().st_mtime_ns != writes)  # noqa: B023
        time.sleep(generator.uniform(0, 0.3))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert process.exitcode == -signal.SIGKILL, "the run must not have ended by itself"
        state = load(run_dir)
        assert state["global_step"] >= step
        step = state["global_step"]
    assert step > 24, "the kills were too early to see any training"
    wait_for(lambda: not processes_in(os.getcwd()))
    final = resume(script, run_dir, **settings | {"total_timesteps": step + 24, "checkpoint_frequency": 24})
    assert load(final)["global_step"] == step + 24
    assert_healthy(run_dir)


@pytest.mark.parametrize("where", ["save", "fsync", "replace"])
def test_a_crash_while_saving_leaves_the_old_checkpoint(script, monkeypatch, where):
    """The process dies midway through writing, before the disk has it all, or just before the new file is in place."""
    run_dir = finished(script)
    old = Path(run_dir, "checkpoint.pt").read_bytes()
    save = torch.save

    def half(state, file):
        save(state, file)
        file.truncate(len(old) // 2)
        raise KeyboardInterrupt

    def crash(*args):
        raise KeyboardInterrupt

    target, replacement = {"save": (torch, half), "fsync": (os, crash), "replace": (os, crash)}[where]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(target, where, replacement)
        resume(script, run_dir, total_timesteps=60)
    assert Path(run_dir, "checkpoint.pt").read_bytes() == old
    assert load(resume(script, run_dir, total_timesteps=60))["global_step"] == 60


SIGNALS = [(1, signal.SIGINT), (2, signal.SIGTERM), (1, signal.SIGTERM), (2, signal.SIGINT)]


SIGNALS = [(name, *case) for name in SCRIPTS for case in SIGNALS[: 4 if name == "dreamer" else 2]]


@pytest.mark.stands_for_all("dyna_q", "dreamer", "world_models")
@pytest.mark.parametrize(("name", "num_envs", "number"), SIGNALS)
def test_interrupt_writes_a_checkpoint_and_says_how_to_go_on(name, num_envs, number):
    """Signals to the whole process group: a checkpoint, the usual exit code, no traceback, no worker left."""
    script = importlib.import_module(name)
    changes = {"total_timesteps": 10**6, "checkpoint_frequency": 0, "num_envs": num_envs}
    before = set(processes_in(os.getcwd()))
    own_server = (name, num_envs, number) == ("dreamer", 2, signal.SIGTERM)  # of which it dies, unlike of SIGINT
    process = Started(script, *flags_of(tiny(script, **changes)), own_server=own_server)
    process.wait_for("episodic_return")
    assert len(set(processes_in(os.getcwd())) - before) >= (num_envs if TRAITS[name]["workers"] else 1)
    os.killpg(process.pid, number)
    out, err = process.communicate()
    assert process.returncode == 128 + number
    assert "Traceback" not in err and "Error" not in err, err
    called = rf"continue with: {re.escape(sys.orig_argv[0])} \S*{script.__name__}\.py"
    run_dir = re.search(rf"{called} --resume (\S+)", out).group(1)
    step = load(run_dir)["global_step"]
    assert step >= 12 and f"step {step}" in out
    wait_for(lambda: not set(processes_in(os.getcwd())) - before, seconds=10)
    time.sleep(1 - time.time() % 1)  # event files of one second are read in the order of their process numbers
    resume(script, run_dir, **changes | {"total_timesteps": step + 24})
    assert load(run_dir)["global_step"] >= step + 24
    assert_healthy(run_dir)


@only("mbpo", "dreamer", "muzero")  # the others' checkpoints hold no torch optimizer between their stages
def test_a_run_of_a_gpu_goes_on_without_one(script):
    """Optimizers remember the kind of device that they were saved on, and must not."""
    run_dir = finished(script)
    state, found = load(run_dir), 0
    for part in state["parts"].values():
        for group in part.get("param_groups", ()) if isinstance(part, dict) else ():
            group["capturable"], found = True, found + 1
    torch.save(state, os.path.join(run_dir, "checkpoint.pt"))
    parts = load(resume(script, run_dir, total_timesteps=60))["parts"].values()
    groups = [group for part in parts if isinstance(part, dict) for group in part.get("param_groups", ())]
    assert len(groups) == found > 0 and not any(group["capturable"] for group in groups)


# === Damaged and foreign checkpoints ===


def damage(name: str, path: Path, script) -> None:
    """Turns a good checkpoint into one of the bad kinds."""
    good = path.read_bytes()
    state = torch.load(path, weights_only=True)
    if name == "truncated":
        path.write_bytes(good[: len(good) // 2])
    elif name == "empty":
        path.write_bytes(b"")
    elif name == "random bytes":
        path.write_bytes(random.Random(0).randbytes(10_000))
    elif name == "zeros inside":
        middle, reach = len(good) // 2, min(20_000, len(good) // 4)
        path.write_bytes(good[: middle - reach] + bytes(2 * reach) + good[middle + reach :])
    elif name == "one wrong bit":
        with zipfile.ZipFile(path) as archive:
            tensors = [entry for entry in archive.infolist() if "/data/" in entry.filename]
            data = archive.read(max(tensors, key=lambda entry: entry.file_size))
        middle = good.index(data) + len(data) // 2
        path.write_bytes(good[:middle] + bytes([good[middle] ^ 1]) + good[middle + 1 :])
    elif name == "foreign pickle":
        path.write_bytes(pickle.dumps(Path("somewhere")))
    elif name == "foreign object":
        torch.save(gym.spaces.Discrete(3), path)
    elif name == "tensor":
        torch.save(torch.zeros(3), path)
    elif name == "weights":
        torch.save(state["parts"]["agent"], path)
    elif name == "other version":
        torch.save(state | {"version": 99}, path)
    elif name == "other settings":
        torch.save(state | {"args": {"env_id": "walker-walk"}}, path)
    elif name == "version only":
        torch.save({"version": 1}, path)
    elif name == "folder":
        path.unlink()
        path.mkdir()
    elif name == "missing":
        path.unlink()


DAMAGES = ("truncated", "empty", "random bytes", "zeros inside", "one wrong bit", "foreign pickle", "foreign object")


DAMAGES += ("tensor", "weights", "other version", "other settings", "version only", "folder", "missing")


@pytest.mark.parametrize("name", DAMAGES)
@pytest.mark.parametrize("flag", ["resume", "evaluate"])
def test_bad_checkpoint_is_named_in_one_line(script, capsys, name, flag, monkeypatch):
    """Whatever is wrong with the file, resuming and evaluating say its path and nothing else."""
    folder = finished(script)
    damage(name, Path(folder, "checkpoint.pt"), script)
    line = error_of(capsys, command_line, monkeypatch, script, f"--{flag}", folder)
    assert f"{folder}/checkpoint.pt" in line


# === Bad input ===


BAD_INPUT = {
    "unknown Gymnasium id": ({"env_id": "CartPoole-v1"}, "CartPole-v1"),
    "unknown module": ({"env_id": "no_such_module:Thing-v0"}, "no_such_module"),
    "a module that is not named": ({"env_id": "Reach-v0"}, "my_module:Reach-v0"),
    "unknown version": ({"env_id": "CartPole-v99"}, "CartPole-v1"),
    "package of the environment": ({"env_id": "fake_envs:MissingPackage-v0"}, "package_that_nobody_has"),
    "no environment": ({"num_envs": 0}, "--num-envs"),
    "negative length": ({"total_timesteps": -5}, "--total-timesteps"),
    "negative seed": ({"seed": -1}, "--seed"),
    "negative frequency": ({"eval_frequency": -1}, "--eval-frequency"),
    "checkpoint frequency": ({"checkpoint_frequency": -1}, "--checkpoint-frequency"),
    "no evaluation episode": ({"eval_episodes": 0}, "--eval-episodes"),
}


BAD_DREAMS = {
    "no batch": ({"batch_size": 0}, "--batch-size"),
    "gamma that is no number": ({"gamma": math.nan}, "--gamma"),
    "unknown task": ({"env_id": "walker-wlak", "obs_mode": "state"}, "walker-walk"),
    "discrete observations": ({"env_id": "FrozenLake-v1"}, "observations"),
    "Dict observations": ({"env_id": "fake_envs:DictObservation-v0"}, "observations"),
    "MultiDiscrete actions": ({"env_id": "fake_envs:MultiDiscreteAction-v0"}, "actions"),
    "two environments": ({"env_id": "fake_envs:MultiDiscreteAction-v0", "num_envs": 2}, "actions"),
    "chunk": ({"batch_length": 201, "learning_starts": 300}, "--batch-length"),
    "start": ({"learning_starts": 7}, "--learning-starts"),
    "horizon": ({"horizon": 1}, "--horizon"),
    "cudagraphs": ({"cudagraphs": True}, "GPU"),
    "gamma": ({"gamma": 1.5}, "--gamma"),
    "epsilon without steps": ({"expl_epsilon": (0.4, 0.1, 0)}, "--expl-epsilon"),
    "learning rate": ({"model_lr": -1e-3}, "--model-lr"),
    "buffer": ({"buffer_size": 10**15}, "--buffer-size"),
    "no repeat": ({"action_repeat": 0}, "--action-repeat"),
    "negative repeat": ({"action_repeat": -1}, "--action-repeat"),
    "no train_steps": ({"train_steps": -1}, "--train-steps"),
}


BAD_TABLES = {
    "Box observations": ({"env_id": "CartPole-v1"}, "observations must be Discrete"),
    "Box both": ({"env_id": "Pendulum-v1"}, "observations must be Discrete"),
    "Tuple observations": ({"env_id": "Blackjack-v1"}, "observations must be Discrete"),
    "Dict observations": ({"env_id": "fake_envs:DictObservation-v0"}, "observations must be Discrete"),
    "Box actions": ({"env_id": "fake_envs:BoxAction-v0"}, "actions must be Discrete"),
    "two with Box actions": ({"env_id": "fake_envs:BoxAction-v0", "num_envs": 2}, "actions must be Discrete"),
    "old version": ({"env_id": "Taxi-v3"}, "Taxi-v4"),
    "a maze that does not exist": ({"env_id": "DinaMaze-v0"}, "DynaMaze-v0"),
    "gamma": ({"gamma": 1.5}, "--gamma"),
    "negative gamma": ({"gamma": -0.1}, "--gamma"),
    "gamma that is no number": ({"gamma": math.nan}, "--gamma"),
    "learning rate": ({"learning_rate": 1.1}, "--learning-rate"),
    "negative learning rate": ({"learning_rate": -0.1}, "--learning-rate"),
    "epsilon": ({"epsilon": 1.1}, "--epsilon"),
    "negative epsilon": ({"epsilon": -0.1}, "--epsilon"),
    "planning": ({"planning_steps": -1}, "--planning-steps"),
    "kappa": ({"kappa": -1e-3}, "--kappa"),
    "theta": ({"theta": math.nan}, "--theta"),
    "no step": ({"max_episode_steps": 0}, "--max-episode-steps"),
    "no report": ({"report_frequency": 0}, "--report-frequency"),
    "prioritized with a bonus": ({"prioritized": True, "kappa": 1e-3}, "--kappa"),
    "prioritized without planning": ({"prioritized": True, "planning_steps": 0}, "--planning-steps"),
    "no value": ({"env_kwargs": ("is_slippery",), **LAKE}, "--env-kwargs takes name=value, not 'is_slippery'"),
    "no name": ({"env_kwargs": ("=True",), **LAKE}, "'=True'"),
    "no word": ({"env_kwargs": ("is slippery=True",), **LAKE}, "'is slippery=True'"),
    "second of two": ({"env_kwargs": ("is_slippery=True", "8x8"), **LAKE}, "'8x8'"),
    "unknown setting": ({"env_kwargs": ("slippery=True",), **LAKE}, "slippery"),
    "unknown setting of a maze": ({"env_kwargs": ("slippery=True",), "env_id": "DynaMaze-v0"}, "slippery"),
    "unknown map": ({"env_kwargs": ("map_name=9x9",), **LAKE}, "9x9"),
    "a maze of nothing": ({"env_kwargs": ("refine=0",), "env_id": "DynaMaze-v0"}, "{'refine': 0}"),
    "two settings in one": ({"env_kwargs": ("is_slippery=true map_name=8x8",), **LAKE}, "unquoted"),
    "many large tables": (
        {"env_id": "DynaMaze-v0", "env_kwargs": ("refine=100",), "num_envs": 10_000},
        "tables and --planning-steps: ",
    ),
    "no learning": ({"learning_rate": 0.0}, "--learning-rate"),
    "a setting that is the script's": ({"env_kwargs": ("num_envs=2",), "env_id": "DynaMaze-v0"}, "num_envs"),
}


BAD_MODELS = {
    "discrete actions": ({"env_id": "CartPole-v1"}, "actions must be"),
    "two with discrete actions": ({"env_id": "CartPole-v1", "num_envs": 2}, "actions must be"),
    "images": ({"env_id": "fake_envs:TinyPixels-v0"}, "observations must be vectors"),
    "discrete observations": ({"env_id": "FrozenLake-v1"}, "observations must be vectors"),
    "Dict observations": ({"env_id": "fake_envs:DictObservation-v0"}, "observations must be vectors"),
    "MultiDiscrete actions": ({"env_id": "fake_envs:MultiDiscreteAction-v0"}, "actions must be"),
    "unknown termination": ({"env_id": "fake_envs:Counter-v0"}, "to TERMINATIONS in "),
    "two with unknown termination": ({"env_id": "fake_envs:Counter-v0", "num_envs": 2}, "to TERMINATIONS in "),
    "unknown task": ({"env_id": "walker-wlak"}, "walker-walk"),
    "full observations": ({"env_id": "Humanoid-v4"}, "use Humanoid-v5"),
    "no batch": ({"batch_size": 0}, "--batch-size"),
    "no model batch": ({"model_batch_size": 0}, "--model-batch-size"),
    "no rollouts": ({"rollout_batch_size": 0}, "--rollout-batch-size"),
    "no epoch": ({"epoch_length": 0}, "--epoch-length"),
    "no training": ({"model_train_frequency": 0}, "--model-train-frequency"),
    "no epochs": ({"model_max_epochs": 0}, "--model-max-epochs"),
    "no networks": ({"num_nets": 0}, "--num-nets"),
    "more elites than networks": ({"num_elites": 4}, "--num-elites"),
    "no elites": ({"num_elites": 0}, "--num-elites"),
    "gamma": ({"gamma": 1.5}, "--gamma"),
    "gamma that is no number": ({"gamma": math.nan}, "--gamma"),
    "tau": ({"tau": 1.1}, "--tau"),
    "share": ({"real_ratio": 1.1}, "--real-ratio"),
    "negative share": ({"real_ratio": -0.1}, "--real-ratio"),
    "learning rate": ({"model_lr": -1e-3}, "--model-lr"),
    "start": ({"learning_starts": 1}, "--learning-starts"),
    "nothing to hold out": ({"learning_starts": 4}, "--learning-starts 4 must be from 5"),
    "small buffer": ({"buffer_size": 11}, "--buffer-size 11 does not hold the 24 steps"),
    "no length": ({"rollout_schedule": (0, 1, 0, 1)}, "--rollout-schedule"),
    "negative updates": ({"updates_per_step": -1}, "--updates-per-step"),
    "no step to the critics": ({"tau": 0.0}, "--tau"),
    "large networks": ({"num_nets": 1024, "model_hidden_size": 2**16}, "do not fit"),
    "large rollouts": ({"rollout_batch_size": 10**9, "model_retain_epochs": 10**6}, "do not fit"),
    "cudagraphs": ({"cudagraphs": True}, "GPU"),
}


BAD_GAMES = {
    "actions from 5": ({"env_id": "fake_envs:ShiftedLadder-v0"}, "actions must be Discrete starting at 0"),
    "MultiDiscrete actions": ({"env_id": "fake_envs:MultiDiscreteAction-v0"}, "actions must be"),
    "unknown game": ({"env_id": "tictactoo"}, "tictactoe"),
    "unknown Atari game": ({"env_id": "ALE/Pongg-v5"}, "ALE/Pong-v5"),
    "openings that fill the board": (
        {"env_id": "tictactoe", "opening_moves": 9},
        "--opening-moves of tictactoe must be at most 8",
    ),
    "openings that fill the columns": (
        {"env_id": "connect_four", "opening_moves": 42},
        "--opening-moves of connect_four must be at most 41",
    ),
    "openings of no game": ({"opening_moves": 1}, "must be at most 0, not 1"),
    "less than no opening": ({"env_id": "connect_four", "opening_moves": -1}, "--opening-moves must be at least 0"),
    "film of a board": (
        {"env_id": "tictactoe", "support_size": 1, "capture_video": True, "eval_frequency": 6},
        "tictactoe has no use for --capture-video",
    ),
    "limit of a board": (
        {"env_id": "tictactoe", "support_size": 1, "max_episode_steps": 9},
        "tictactoe has no use for --max-episode-steps",
    ),
    "support": ({"env_id": "CartPole-v1", "support_size": 10}, "--support-size 10 holds values up to 117"),
    "support of a board": ({"env_id": "tictactoe", "support_size": 0}, "--support-size"),
    "buffer": ({"buffer_size": 10**15}, "--buffer-size"),
    "small buffer": ({"buffer_size": 11}, "--buffer-size 11 is too small"),
    "no batch": ({"batch_size": 0}, "--batch-size"),
    "no simulation": ({"num_simulations": 0}, "--num-simulations"),
    "no unroll": ({"unroll_steps": 0}, "--unroll-steps"),
    "no step": ({"td_steps": 0}, "--td-steps"),
    "gamma": ({"gamma": 1.5}, "--gamma"),
    "gamma that is no number": ({"gamma": math.nan}, "--gamma"),
    "learning rate": ({"learning_rate": -1e-3}, "--learning-rate"),
    "share": ({"reanalyze_ratio": 1.1}, "--reanalyze-ratio"),
    "noise": ({"dirichlet_alpha": 0.0}, "--dirichlet-alpha"),
    "no updates": ({"replay_ratio": 0.0}, "--replay-ratio must be at least"),
    "late start": ({"learning_starts": 10**6}, "--learning-starts 1000000 must be within --total-timesteps"),
    "large networks": ({"hidden_size": 2**16, "batch_size": 2**16, "num_simulations": 2**16}, "do not fit"),
    "cudagraphs": ({"cudagraphs": True}, "GPU"),
}


BAD_WORLDS = {
    "no repeat": ({"action_repeat": 0}, "--action-repeat"),
    "negative repeat": ({"action_repeat": -1}, "--action-repeat"),
    "vectors": ({"env_id": "CartPole-v1"}, "observations must be images"),
    "two with vectors": ({"env_id": "CartPole-v1", "num_envs": 2}, "--render-obs"),
    "Dict observations": ({"env_id": "fake_envs:DictObservation-v0"}, "observations must be images"),
    "MultiDiscrete actions": ({"env_id": "fake_envs:PixelsMultiDiscrete-v0"}, "actions must be"),
    "stage without a run": ({"from_stage": "m"}, "--from-stage needs --resume"),
    "no temperature": ({"temperature": 0.0}, "--temperature"),
    "temperature that is no number": ({"temperature": math.nan}, "--temperature"),
    "no step size": ({"sigma": 0.0}, "--sigma"),
    "population": ({"population": 1}, "--population"),
    "no episodes": ({"episodes": 0}, "--episodes"),
    "no latents": ({"latent_size": 0}, "--latent-size"),
    "no mixture": ({"num_mixtures": 0}, "--num-mixtures"),
    "no dream": ({"dream_length": 0}, "--dream-length"),
    "no hold": ({"max_hold": 0}, "--max-hold"),
    "learning rate": ({"vae_lr": -1e-3}, "--vae-lr"),
    "decay": ({"model_lr_decay": 1.1}, "--model-lr-decay"),
    "nothing but holdout": ({"holdout_ratio": 1.1}, "--holdout-ratio"),
}


BAD_HORIZONS = {
    "large networks": ({"num_nets": 1024, "batch_size": 1024, "model_hidden_size": 2**16}, "do not fit"),
    "many rollouts": ({"rollout_retain": 10**9}, "do not fit"),
    "gamma": ({"gamma": 1.5}, "--gamma"),
    "unknown termination": ({"env_id": "fake_envs:Counter-v0"}, "TERMINATIONS"),
    "discrete actions": ({"env_id": "CartPole-v1"}, "actions"),
    "no batch": ({"batch_size": 0}, "--batch-size"),
    "learning rate": ({"learning_rate": -1e-3}, "--learning-rate"),
}
BAD_LATENTS = {
    "no batch": ({"batch_size": 0}, "--batch-size"),
    "one step": ({"batch_length": 1}, "--batch-length"),
    "gamma": ({"gamma": 1.5}, "--gamma"),
    "gamma that is no number": ({"gamma": math.nan}, "--gamma"),
    "unknown task": ({"env_id": "walker-wlak", "obs_mode": "state"}, "walker-walk"),
    "discrete observations": ({"env_id": "FrozenLake-v1"}, "observations"),
    "MultiDiscrete actions": ({"env_id": "fake_envs:MultiDiscreteAction-v0"}, "actions"),
    "start": ({"learning_starts": 0}, "--learning-starts"),
    "a start that never comes": ({"buffer_size": 17}, "--buffer-size 17 must hold the --learning-starts 12"),
    "two that never start": ({"buffer_size": 23, "num_envs": 2}, "--buffer-size 23"),
    "too short to start": ({"total_timesteps": 17}, "--learning-starts 12 sequences never come"),
    "horizon": ({"horizon": 0}, "--horizon"),
    "no repeat": ({"action_repeat": 0}, "--action-repeat"),
    "dreams of one state": ({"imag_last": 1}, "--imag-last"),
    "dreams of too many": ({"imag_last": 7}, "--imag-last"),
    "learning rate": ({"learning_rate": -1e-3}, "--learning-rate"),
    "cudagraphs": ({"cudagraphs": True}, "GPU"),
    "buffer": ({"buffer_size": 10**15}, "--buffer-size"),
}
BAD = {"dreamer": BAD_DREAMS, "dyna_q": BAD_TABLES, "mbpo": BAD_MODELS, "dhmbpo": BAD_HORIZONS}


BAD |= {"dreamer_v3": BAD_LATENTS, "muzero": BAD_GAMES, "world_models": BAD_WORLDS}


@pytest.mark.parametrize("kind", BAD_INPUT)
def test_bad_input_gets_one_line(script, capsys, kind):
    """Exit code 2, one line that names the flag or the near matches, nothing written."""
    changes, words = BAD_INPUT[kind]
    assert words in error_of(capsys, script.main, tiny(script, **changes))
    assert os.listdir() == []


@each(BAD)
@pytest.mark.filterwarnings("ignore:.*out of date")
def test_what_a_script_cannot_use_gets_one_line(name, kind, capsys):
    """The same for the spaces, sizes, combinations and devices of each."""
    script = importlib.import_module(name)
    changes, words = BAD[name][kind]
    assert words in error_of(capsys, script.main, tiny(script, **changes))
    assert os.listdir() == [] or kind == "buffer"  # whose lack of memory shows when the run folder exists


def test_tracking_starts_before_the_log_that_it_listens_to(script, monkeypatch):
    """W&B patches the event writer, so wandb.init must come first; it gets the run's name and all settings."""
    calls = []
    writers = len(WRITERS)
    fake = types.SimpleNamespace(__spec__=importlib.machinery.ModuleSpec("wandb", None))
    fake.init = lambda **settings: calls.append((len(WRITERS) - writers, settings))
    monkeypatch.setitem(sys.modules, "wandb", fake)
    run_dir = run(script, track=True)
    [(made, settings)] = calls
    assert made == 0 and settings["name"] == Path(run_dir).name and settings["sync_tensorboard"]
    given = TINY[script.__name__] | {"track": True}
    assert {name: settings["config"][name] for name in given} == given
    assert list(settings["config"]) == [field.name for field in dataclasses.fields(script.Args)]


def test_missing_optional_packages_are_named(script, capsys, monkeypatch):
    """--track without wandb: the pip command."""
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert "pip install wandb" in error_of(capsys, script.main, tiny(script, track=True))


def test_run_folder_that_cannot_be_written(script, capsys):
    """A file where the folder should be."""
    Path("runs").write_text("in the way")
    assert "run folder" in error_of(capsys, script.main, tiny(script))


@pytest.mark.stands_for_all("dyna_q", "mbpo")
def test_bad_input_as_a_command(script):
    """The same as processes: exit code 2, no traceback, also for a flag that does not exist."""
    bad_id = Started(script, *flags_of(tiny(script, env_id="CartPoole-v1", num_envs=2)))
    bad_flag = start(script, "--no-such-flag", "3")
    nothing = Started(script, "--resume", "runs/none")
    for process, words in ((bad_id, "CartPole-v1"), (bad_flag, "no-such-flag"), (nothing, "runs/none/checkpoint.pt")):
        _, err = process.communicate(timeout=60)
        assert process.returncode == 2
        assert words in err and "Traceback" not in err
        assert process is bad_flag or len(err.strip().splitlines()) == 1, err


def test_a_full_disk_is_said_in_one_line(script, monkeypatch):
    """A checkpoint that cannot be written ends the run; the one before stays."""
    run_dir = finished(script)
    before = Path(run_dir, "checkpoint.pt").read_bytes()

    def full(state, file):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(script.torch, "save", full)
    with pytest.raises(SystemExit, match="No space left on device"):
        resume(script, run_dir, total_timesteps=60)
    assert Path(run_dir, "checkpoint.pt").read_bytes() == before


# === Losses that are not finite ===


# === Evaluation and videos ===


def test_resume_and_evaluate_are_two_things(script, monkeypatch, capsys):
    """Not both in one command."""
    run_dir = finished(script)
    line = error_of(capsys, command_line, monkeypatch, script, "--resume", run_dir, "--evaluate", run_dir)
    assert "--resume" in line and "--evaluate" in line


def test_any_seed_evaluates(script):
    """Large seeds too: training episodes and evaluation episodes come from different seeds of the simulator."""
    run_dir = run(script, seed=2**32 + 123456789, eval_frequency=24, total_timesteps=24)
    assert scalars(run_dir)["eval/episodic_return"]


def test_speed_flags_do_not_bind_a_resume(monkeypatch):
    """A run made with CUDA graphs goes on without a GPU, if asked to."""
    script = importlib.import_module("mbpo")
    run_dir = finished(script)
    state = load(run_dir)
    state["args"] |= {"cudagraphs": True}
    torch.save(state, Path(run_dir, "checkpoint.pt"))
    command_line(monkeypatch, script, "--resume", run_dir, "--no-cudagraphs", "--total-timesteps", "60")
    assert load(run_dir)["global_step"] == 60


@pytest.mark.parametrize("changes", [{}, TWO_ENVS], ids=["one", "two"])
def test_evaluate_prints_mean_and_std_and_changes_nothing(script, monkeypatch, capsys, changes):
    """`--evaluate` plays as many episodes as asked for, twice the same, and leaves the checkpoint as it was."""
    run_dir = finished(script, **changes)
    before = Path(run_dir, "checkpoint.pt").read_bytes()
    files = set(os.listdir(run_dir))
    lines = []
    for _ in range(2):
        capsys.readouterr()
        command_line(monkeypatch, script, "--evaluate", run_dir, "--eval-episodes", "3")
        lines.append(capsys.readouterr().out.strip().splitlines()[-1])
    assert lines[0] == lines[1]
    mean, std = map(float, re.search(r"return (-?[\d.]+) \+- ([\d.]+)", lines[0]).groups())
    returns = [float(x) for x in re.search(r"3 episodes: (.*)\)", lines[0]).group(1).split()]
    assert len(returns) == 3
    assert mean == pytest.approx(np.mean(returns), abs=0.11) and std == pytest.approx(np.std(returns), abs=0.11)
    assert Path(run_dir, "checkpoint.pt").read_bytes() == before and set(os.listdir(run_dir)) == files


@pytest.mark.stands_for_all("dyna_q", "mbpo", "dreamer")
def test_capture_video_films_the_evaluation(script, monkeypatch):
    """An MP4 of every evaluation while training, and of `--evaluate`."""
    pytest.importorskip("moviepy", reason="moviepy is not installed.")
    frequency = 1 if script.__name__ == "world_models" else 12  # of whose C's steps, which are few
    run_dir = run(script, total_timesteps=24, eval_frequency=frequency, eval_episodes=1, capture_video=True)
    videos = list(Path(run_dir).rglob("*.mp4"))
    assert len(videos) == 2 and all(video.stat().st_size > 500 for video in videos)
    folder = finished(script)
    command_line(monkeypatch, script, "--evaluate", folder, "--eval-episodes", "1", "--capture-video")
    videos = list(Path(folder).rglob("*.mp4"))
    assert len(videos) == 1 and videos[0].stat().st_size > 500


@pytest.mark.parametrize("name", ["dreamer", "dreamer_v3", "muzero", "world_models"])
def test_a_film_shows_every_step_of_repeated_actions(name):
    """At the rate of the environment: 12 steps and the first picture, whatever an action lasts."""
    pytest.importorskip("moviepy", reason="moviepy is not installed.")
    cv2 = pytest.importorskip("cv2", reason="opencv is not installed.")
    script = importlib.import_module(name)
    settings = {"env_id": "fake_envs:MovingPixels-v0"} if name in ("dreamer", "dreamer_v3") else {}
    settings |= {"action_repeat": 3, "total_timesteps": 96, "eval_frequency": 1, "eval_episodes": 1}
    run_dir = run(script, **settings, capture_video=True)
    film = cv2.VideoCapture(str(next(Path(run_dir).rglob("*.mp4"))))
    assert film.get(cv2.CAP_PROP_FRAME_COUNT) in (12, 13) and film.get(cv2.CAP_PROP_FPS) == 30


LARGE = ["dreamer", "dreamer_v3", "world_models"]  # those whose updates free hundreds of MB


@only(*LARGE)
def test_a_run_keeps_freed_memory(script, monkeypatch):
    """As its device asks, once."""
    devices = []
    monkeypatch.setattr(script, "keep_freed_memory", devices.append)
    run(script, **TRAITS[script.__name__]["quick"])
    assert devices == [torch.device("cpu")]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="Another C library has no mallopt.")
@pytest.mark.parametrize(("device", "kept"), [("cpu", True), ("cuda", False)])
def test_freed_memory_is_kept_on_a_cpu(device, kept):
    """64 MB that were used and freed are used again without a page fault, or not."""
    code = f"""if True:
        import ctypes, dreamer, resource, torch
        dreamer.keep_freed_memory(torch.device("{device}"))
        libc = ctypes.CDLL(None)
        libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
        for _ in range(4):
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            block = libc.malloc(ctypes.c_size_t(2**26))
            ctypes.memset(block, 1, 2**26)
            libc.free(block)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)"""
    told = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert (int(told.stdout) < 10) == kept  # of the fourth time


@only(*LARGE)
def test_no_mallopt_is_no_fault(script, monkeypatch):
    """musl and macOS have none."""
    for library in (lambda _: object(), lambda _: ctypes.CDLL("there_is_no_such_library.so")):
        monkeypatch.setattr(script, "ctypes", types.SimpleNamespace(CDLL=library))
        script.keep_freed_memory(torch.device("cpu"))


def test_writing_checkpoints_is_not_training(script, monkeypatch):
    """Steps per second of a run whose every checkpoint takes eleven days."""
    days, clock, write = [0.0], time.perf_counter, script.save_checkpoint

    def slow(*given) -> None:
        write(*given)
        days[0] += 1e6

    monkeypatch.setattr(script.time, "perf_counter", lambda: clock() + days[0])
    monkeypatch.setattr(script, "save_checkpoint", slow)
    folder = run(script, checkpoint_frequency=12)
    assert days[0] > 1e6 and min(speed for _, speed in scalars(folder)["charts/SPS"]) > 0.01
