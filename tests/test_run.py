"""Whole runs of every script, tiny and on the CPU: logs, determinism, resuming, interruptions, bad input, playing."""

import dataclasses
import importlib
import math
import multiprocessing
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

ROOT = Path(__file__).parent.parent
SCRIPTS = [name for name in ("dyna_q", "mbpo", "world_models", "dreamer", "muzero") if (ROOT / f"{name}.py").exists()]

# Settings of a tiny run of each script: 12-step episodes, updates from step 24 on, everything else as small as it goes.
TINY = {
    "dreamer": {
        "env_id": "fake_envs:TinyPixels-v0",
        "cuda": False,
        "total_timesteps": 48,
        "eval_frequency": 0,
        "eval_episodes": 2,
        "checkpoint_frequency": 24,
        "learning_starts": 24,
        "train_frequency": 12,
        "train_steps": 2,
        "pretrain_steps": 2,
        "batch_size": 3,
        "batch_length": 8,
        "buffer_size": 200,
        "horizon": 3,
        "cnn_depth": 2,
        "stoch_size": 4,
        "deter_size": 8,
        "dense_size": 8,
        "free_nats": 0.0,
    },
}
VECTORS = {"env_id": "fake_envs:Counter-v0"}
TWO_ENVS = {"num_envs": 2}


WRITERS: list[SummaryWriter] = []


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path, monkeypatch):
    """Runs write into an empty folder; what a failed run leaves open, writers and signal handlers, is put in order."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MUJOCO_GL", "")  # so that what a run sets is undone
    monkeypatch.delenv("MUJOCO_GL")
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    init = SummaryWriter.__init__
    monkeypatch.setattr(SummaryWriter, "__init__", lambda self, *a, **k: (WRITERS.append(self), init(self, *a, **k))[1])
    yield
    close_writers()
    for number, handler in handlers.items():
        signal.signal(number, handler)


def close_writers() -> None:
    """While the folder that their paths are relative to is still the current one."""
    while WRITERS:
        WRITERS.pop().close()


@pytest.fixture(params=SCRIPTS)
def script(request):
    """Each script as a module."""
    return importlib.import_module(request.param)


def tiny(script, **changes):
    return script.Args(**TINY[script.__name__] | changes)


def run(script, **changes) -> str:
    """A tiny run in a folder of its own; returns the run folder's absolute path."""
    here = Path.cwd()
    folder = here / f"run_{len(list(here.glob('run_*')))}"
    folder.mkdir()
    os.chdir(folder)
    try:
        return os.path.abspath(script.main(tiny(script, **changes)))
    finally:
        close_writers()
        os.chdir(here)


def resume(script, run_dir: str, **changes) -> str:
    return script.main(tiny(script, **changes | {"resume": run_dir}))


def copy_of(run_dir: str) -> str:
    return shutil.copytree(run_dir, f"{run_dir}_copy{random.random()}")


def load(run_dir: str) -> dict:
    return torch.load(os.path.join(run_dir, "checkpoint.pt"), weights_only=True)


def differences(a, b, path: str = "") -> list[str]:
    """Paths of the leaves in which two nested states differ in type, shape or any bit."""
    if type(a) is not type(b):
        return [path]
    if isinstance(a, dict):
        if list(a) != list(b):
            return [path]
        return [found for key in a for found in differences(a[key], b[key], f"{path}/{key}")]
    if isinstance(a, list | tuple):
        if len(a) != len(b):
            return [path]
        return [found for i, pair in enumerate(zip(a, b, strict=True)) for found in differences(*pair, f"{path}/{i}")]
    if isinstance(a, torch.Tensor):
        same = a.dtype == b.dtype and a.shape == b.shape and a.numpy().tobytes() == b.numpy().tobytes()
        return [] if same else [path]
    return [] if a == b or a != a and b != b else [path]


def scalars(run_dir: str) -> dict[str, list[tuple[int, float]]]:
    """Scalar events of a run folder, tag -> [(step, value)], what a resume has purged left out."""
    events = EventAccumulator(run_dir, size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def image_tags(run_dir: str) -> set[str]:
    events = EventAccumulator(run_dir)
    events.Reload()
    return set(events.Tags()["images"])


def losses(run_dir: str) -> dict:
    """All logged values but the speed, which no seed fixes."""
    return {tag: values for tag, values in scalars(run_dir).items() if tag != "charts/SPS"}


def assert_healthy(run_dir: str) -> None:
    """Every logged value is finite and every tag's steps increase strictly."""
    for tag, values in scalars(run_dir).items():
        steps = [step for step, _ in values]
        assert all(math.isfinite(value) for _, value in values), tag
        assert all(a < b for a, b in zip(steps[:-1], steps[1:], strict=True)), (tag, steps)


def episodes(run_dir: str) -> list[dict[str, np.ndarray]]:
    """The episodes in a checkpoint's replay, oldest first, and then the open ones."""
    parts = load(run_dir)["parts"]
    replay = parts["replay"]
    assert replay["end"] <= len(replay["data"]["reward"]), "the ring has wrapped round"
    spans = zip(replay["starts"], replay["lengths"], strict=True)
    closed = [{k: v[start : start + length].numpy() for k, v in replay["data"].items()} for start, length in spans]
    return closed + [
        {k: v.numpy().astype(replay["data"][k].numpy().dtype) for k, v in episode.items()}
        for episode in parts["open_episodes"]
    ]


def error_of(capsys, function, *args, **kwargs) -> str:
    """Runs what must fail with exit code 2; returns the one line it says."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        function(*args, **kwargs)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
    assert stopped.value.code == 2
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[0]


def command_line(monkeypatch, script, *flags: str) -> None:
    """What `python script.py flags` does."""
    monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *flags])
    script.main(script.parse_args())


def flags_of(args) -> list[str]:
    """The settings that differ from the defaults, as command-line flags."""
    flags = []
    for field in dataclasses.fields(args):
        value, name = getattr(args, field.name), field.name.replace("_", "-")
        if value == field.default:
            continue
        flags += [f"--{'' if value else 'no-'}{name}"] if isinstance(value, bool) else [f"--{name}", str(value)]
    return flags


def start(script, *flags: str) -> subprocess.Popen:
    """The script in a process, and a session, of its own."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    return subprocess.Popen(
        [sys.executable, str(ROOT / f"{script.__name__}.py"), *flags],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def processes_in(folder: str) -> list[str]:
    """Ids of the living processes that work in a folder (Linux), the tests' own left out."""
    found = []
    for link in Path("/proc").glob("[0-9]*/cwd"):
        try:
            if os.readlink(link) == folder and int(link.parent.name) != os.getpid():
                found.append(link.parent.name)
        except OSError:  # it has just ended
            continue
    return found


def wait_for(condition, seconds: float = 60):
    """Polls until the condition holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


# === What a run leaves behind ===

WALKER = {"env_id": "walker-walk", "action_repeat": 20, "total_timesteps": 2000, "learning_starts": 1000}
WALKER |= {"train_frequency": 500, "eval_frequency": 2000, "eval_episodes": 1, "checkpoint_frequency": 0}
CLASSIC = {"learning_starts": 200, "total_timesteps": 400, "train_frequency": 100, "eval_frequency": 200}
DREAMS = {
    "pixels": {"env_id": "fake_envs:TinyPixels-v0"},
    "discrete pixels": {"env_id": "fake_envs:TinyPixelsDiscrete-v0", "total_timesteps": 72},
    "two environments": {"env_id": "fake_envs:TinyPixels-v0", "num_envs": 2, "total_timesteps": 72},
    "CartPole": {"env_id": "CartPole-v1", **CLASSIC},
    "Pendulum": {"env_id": "Pendulum-v1", "eval_episodes": 1, **CLASSIC},
    "walker state": {"obs_mode": "state", **WALKER},
    "walker pixels": {"renderer": "raycast", **WALKER},
}


@pytest.fixture
def dreamer():
    return importlib.import_module("dreamer")


@pytest.mark.parametrize("kind", DREAMS)
def test_dreamer_logs_everything_and_moves_all_parameters(dreamer, kind):
    """Each kind of environment: tags, finite values, growing steps, files in the run folder, trained parameters."""
    settings = {"eval_frequency": 24} | DREAMS[kind]
    run_dir = run(dreamer, **settings)
    vectors, suite = kind in ("CartPole", "Pendulum", "walker state"), kind.startswith("walker")
    expected = {"charts/episodic_return", "charts/episodic_length", "charts/SPS"}
    expected |= {"eval/episodic_return", "eval/episodic_return_std"}
    expected |= {f"losses/{name}_loss" for name in ("model", "image", "reward", "kl", "actor", "value")}
    expected |= set() if suite else {"losses/cont_loss"}
    expected |= {f"grad_norm/{name}" for name in ("model", "actor", "value")}
    expected |= {"model/kl", "model/prior_entropy", "model/post_entropy"}
    expected |= {"model/imag_reward", "model/imag_value", "model/actor_entropy"}
    if "discrete" not in kind:  # its episodes may be too short for a prediction
        expected |= {"open_loop/obs_mse_horizon_1", "open_loop/reward_error_horizon_1"}
    tags = scalars(run_dir)
    assert expected <= set(tags), expected - set(tags)
    assert_healthy(run_dir)
    if "discrete" not in kind:
        strips = set() if vectors else {"open_loop/truth_model_error", "eval/episode"}
        assert image_tags(run_dir) == {"open_loop/error"} | strips
        files = {re.sub(r"\d+", "N", name) for name in os.listdir(run_dir)}
        assert "open_loop_error_N.png" in files
        assert ("open_loop_truth_model_error_N.gif" in files) == ("eval_episode_N.gif" in files) == (not vectors)
    state = load(run_dir)
    args, saved = tiny(dreamer, **settings), state["parts"]
    assert state["global_step"] == args.total_timesteps
    assert saved["counters"]["num_updates"] == dreamer.updates_due(args.total_timesteps, args) > 0
    torch.manual_seed(args.seed)
    envs = dreamer.make_vector_env(args, dreamer.choose_renderer(args, None), 1)
    untrained = dreamer.Agent(envs.single_observation_space, envs.single_action_space, args).state_dict()
    envs.close()
    assert untrained.keys() == saved["agent"].keys()
    still = [name for name, tensor in untrained.items() if torch.equal(tensor, saved["agent"][name])]
    assert not still


def test_steps_increase_where_many_updates_fall_on_one_step(dreamer):
    """Hundreds of updates may be due at one environment step: that is one point of each curve, not three."""
    run_dir = run(dreamer, **VECTORS, pretrain_steps=201, batch_size=1)
    assert_healthy(run_dir)
    assert all(value > 0 for _, value in scalars(run_dir)["charts/SPS"])


# === Determinism ===


@pytest.mark.parametrize("changes", [{}, VECTORS | TWO_ENVS], ids=["one", "two"])
def test_same_seed_same_run(script, changes):
    """The seed fixes losses, parameters, replay and generators; another seed changes them."""
    first, again, other = (run(script, **changes, seed=seed) for seed in (1, 1, 2))
    assert losses(first) == losses(again)
    assert differences(load(first), load(again)) == []
    assert losses(first) != losses(other)
    found = differences(load(first)["parts"], load(other)["parts"])
    assert any("agent" in path for path in found) and any("replay" in path for path in found)


def test_evaluation_does_not_change_training(script):
    """With and without evaluations, bit for bit."""
    often, never = run(script, eval_frequency=6), run(script, eval_frequency=0)
    assert "eval/episodic_return" in scalars(often) and "eval/episodic_return" not in scalars(never)
    a, b = load(often), load(never)
    assert a["args"].pop("eval_frequency") != b["args"].pop("eval_frequency")
    assert differences(a, b) == []


# === Resuming ===


@pytest.mark.parametrize("changes", [{}, {"env_id": "CartPole-v1"}, VECTORS], ids=["pixels", "discrete", "vectors"])
def test_stopped_and_resumed_equals_never_stopped(script, changes):
    """Parameters, optimizers, replay, counters and generators of the two final checkpoints, bit for bit."""
    whole = run(script, **changes, total_timesteps=72)
    stopped = run(script, **changes, total_timesteps=72)
    halfway = run(script, **changes, total_timesteps=36)
    resumed = resume(script, halfway, **changes, total_timesteps=72)
    if changes.get("env_id") == "CartPole-v1":  # stopped in the middle of an episode, which a resume does not replay
        assert differences(load(whole), load(stopped)) == []
        assert load(resumed)["global_step"] == 72
        return
    assert differences(load(whole), load(stopped)) == []
    assert differences(load(whole), load(resumed)) == []
    after = {tag: [value for value in values if value[0] > 36] for tag, values in losses(whole).items()}
    assert any(values for tag, values in after.items() if tag.startswith("losses/"))
    for tag, values in after.items():
        assert set(values) <= set(losses(resumed)[tag]), tag
    assert_healthy(resumed)


@pytest.mark.parametrize("changes", [{}, TWO_ENVS], ids=["one", "two"])
def test_two_resumes_of_a_checkpoint_are_equal(script, changes):
    """One environment, and two of which the open episodes are stored as truncated."""
    steps = 24 + 6 * changes.get("num_envs", 1)  # in the middle of an episode
    run_dir = run(script, **changes, total_timesteps=steps)
    before = episodes(run_dir)
    open_now = load(run_dir)["parts"]["open_episodes"]
    assert len(open_now) == changes.get("num_envs", 1)
    copy = copy_of(run_dir)
    first, second = (load(resume(script, folder, **changes, total_timesteps=60)) for folder in (run_dir, copy))
    assert differences(first, second) == []
    after = episodes(run_dir)
    for old, new in zip(before, after, strict=False):
        assert all(np.array_equal(old[name], new[name]) for name in old)
    assert all(episode["cont"].all() for episode in after), "a stopped episode is not a terminated one"
    assert all(episode["is_first"][0] == 1 and episode["is_first"][1:].sum() == 0 for episode in after)
    assert len(after) > len(before)


def test_resuming_equals_what_was_saved(script):
    """A resumed run that has nothing left to do writes the checkpoint it has read."""
    run_dir = run(script)
    before = load(run_dir)
    assert differences(before, load(resume(script, run_dir))) == []


def test_resumed_networks_share_no_storage(dreamer):
    """No two of the agent's loaded tensors are one; the frozen twins are the live ones."""
    run_dir = run(dreamer)
    args = tiny(dreamer)
    envs = dreamer.make_vector_env(args, "none", 1)
    agent = dreamer.Agent(envs.single_observation_space, envs.single_action_space, args).freeze_twins()
    agent.load_state_dict(load(run_dir)["parts"]["agent"])
    pointers = [parameter.data_ptr() for parameter in agent.parameters()]
    assert len(set(pointers)) == len(pointers)
    live = [*agent.world_model.parameters(), *agent.value.parameters()]
    frozen = [*agent.frozen["model"].parameters(), *agent.frozen["value"].parameters()]
    for a, b in zip(live, frozen, strict=True):
        assert a.data_ptr() == b.data_ptr() and a.requires_grad and not b.requires_grad


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


def test_without_saved_buffer_a_resume_refills_it(script):
    """--no-save-buffer: random actions until learning_starts steps are stored again, then the updates that are due."""
    settings = {"save_buffer": False, **VECTORS}
    run_dir = run(script, **settings)
    saved = load(run_dir)
    assert "replay" not in saved["parts"] and "open_episodes" not in saved["parts"]
    resume(script, run_dir, **settings, total_timesteps=108)
    values = scalars(run_dir)["losses/value_loss"]
    new = [step for step, _ in values if step > 48]
    assert new and min(new) >= 48 + 24 and max(new) == 108
    state = load(run_dir)
    assert state["global_step"] == 108
    assert differences(saved["rng"]["prefill"], state["rng"]["prefill"]) != []
    assert_healthy(run_dir)


def test_command_line_resume_takes_the_runs_own_settings(script, monkeypatch, capsys):
    """--resume needs no other flag; total_timesteps may be given anew; any setting that clashes is named."""
    run_dir = run(script)
    command_line(monkeypatch, script, "--resume", run_dir, "--total-timesteps", "60")
    state = load(run_dir)
    assert state["global_step"] == 60 and state["args"]["batch_size"] == TINY[script.__name__]["batch_size"]
    line = error_of(capsys, command_line, monkeypatch, script, "--resume", run_dir, "--batch-size", "7")
    assert "--batch-size" in line and "7" in line
    assert differences(state, load(run_dir)) == []


# === Interruptions ===


def test_kill_at_random_moments_keeps_a_loadable_checkpoint(script):
    """Twelve times kill -9: what is there always loads, its step never goes back, and a resume goes on from it."""
    settings = TINY[script.__name__] | VECTORS | {"total_timesteps": 10**6, "checkpoint_frequency": 1}
    context = multiprocessing.get_context("forkserver")
    body = importlib.import_module("fake_envs").run_script
    generator, step, run_dir = random.Random(0), -1, None
    for _ in range(12):
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
    final = resume(script, run_dir, **settings | {"total_timesteps": step + 24})
    assert load(final)["global_step"] == step + 24
    assert_healthy(run_dir)


@pytest.mark.parametrize("where", ["save", "fsync", "replace"])
def test_a_crash_while_saving_leaves_the_old_checkpoint(script, monkeypatch, where):
    """The process dies midway through writing, before the disk has it all, or just before the new file is in place."""
    run_dir = run(script)
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
        resume(script, run_dir, total_timesteps=72)
    assert Path(run_dir, "checkpoint.pt").read_bytes() == old
    assert load(resume(script, run_dir, total_timesteps=72))["global_step"] == 72


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("num_envs", [1, 2])
def test_interrupt_writes_a_checkpoint_and_says_how_to_go_on(script, number, num_envs):
    """Signals to the whole process group: a checkpoint, the usual exit code, no traceback, no worker left."""
    changes = {"total_timesteps": 10**6, "checkpoint_frequency": 0, "num_envs": num_envs}
    before = set(processes_in(os.getcwd()))
    process = start(script, *flags_of(tiny(script, **changes)))
    for line in process.stdout:
        if "episodic_return" in line:
            break
    assert len(set(processes_in(os.getcwd())) - before) > num_envs - 1
    os.killpg(process.pid, number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert "Traceback" not in err and "Error" not in err, err
    run_dir = re.search(rf"python {script.__name__}\.py --resume (\S+)", out).group(1)
    step = load(run_dir)["global_step"]
    assert step >= 12 and f"step {step}" in out
    wait_for(lambda: not set(processes_in(os.getcwd())) - before, seconds=10)
    resume(script, run_dir, **changes | {"total_timesteps": step + 24})
    assert load(run_dir)["global_step"] >= step + 24
    assert_healthy(run_dir)


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
        middle = len(good) // 2
        path.write_bytes(good[: middle - 20_000] + bytes(40_000) + good[middle + 20_000 :])
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


DAMAGES = ("truncated", "empty", "random bytes", "zeros inside", "foreign pickle", "foreign object", "tensor")
DAMAGES += ("weights", "other version", "other settings", "version only", "folder", "missing")


@pytest.fixture(scope="module", params=SCRIPTS)
def finished(request, tmp_path_factory):
    """(module, run folder) of a finished run, to be copied before it is changed."""
    script = importlib.import_module(request.param)
    here = os.getcwd()
    os.chdir(tmp_path_factory.mktemp("finished"))
    try:
        return script, run(script)
    finally:
        os.chdir(here)


@pytest.mark.parametrize("name", DAMAGES)
@pytest.mark.parametrize("flag", ["resume", "evaluate"])
def test_bad_checkpoint_is_named_in_one_line(finished, capsys, name, flag, tmp_path, monkeypatch):
    """Whatever is wrong with the file, resuming and evaluating say its path and nothing else."""
    script, run_dir = finished
    folder = shutil.copytree(run_dir, tmp_path / "run")
    damage(name, folder / "checkpoint.pt", script)
    line = error_of(capsys, command_line, monkeypatch, script, f"--{flag}", str(folder))
    assert str(folder / "checkpoint.pt") in line


# === Bad input ===

BAD_INPUT = {
    "unknown Gymnasium id": ({"env_id": "CartPoole-v1"}, "CartPole-v1"),
    "unknown module": ({"env_id": "no_such_module:Thing-v0"}, "no_such_module"),
    "unknown version": ({"env_id": "CartPole-v99"}, "CartPole-v1"),
    "package of the environment": ({"env_id": "fake_envs:MissingPackage-v0"}, "package_that_nobody_has"),
    "no environment": ({"num_envs": 0}, "--num-envs"),
    "negative length": ({"total_timesteps": -5}, "--total-timesteps"),
    "no batch": ({"batch_size": 0}, "--batch-size"),
}
BAD_DREAMS = {
    "unknown task": ({"env_id": "walker-wlak", "obs_mode": "state"}, "walker-walk"),
    "discrete observations": ({"env_id": "FrozenLake-v1"}, "observations"),
    "Dict observations": ({"env_id": "fake_envs:DictObservation-v0"}, "observations"),
    "MultiDiscrete actions": ({"env_id": "fake_envs:MultiDiscreteAction-v0"}, "actions"),
    "two environments": ({"env_id": "fake_envs:MultiDiscreteAction-v0", "num_envs": 2}, "actions"),
    "chunk": ({"batch_length": 201, "learning_starts": 300}, "--batch-length"),
    "start": ({"learning_starts": 7}, "--learning-starts"),
    "horizon": ({"horizon": 1}, "--horizon"),
    "cudagraphs": ({"cudagraphs": True}, "GPU"),
    "negative seed": ({"seed": -1}, "--seed"),
    "gamma": ({"gamma": 1.5}, "--gamma"),
    "epsilon without steps": ({"expl_epsilon": (0.4, 0.1, 0)}, "--expl-epsilon"),
    "learning rate": ({"model_lr": -1e-3}, "--model-lr"),
    "buffer": ({"buffer_size": 10**15}, "--buffer-size"),
    "no repeat": ({"action_repeat": 0}, "--action-repeat"),
    "negative repeat": ({"action_repeat": -1}, "--action-repeat"),
    "no train_steps": ({"train_steps": -1}, "--train-steps"),
    "negative frequency": ({"eval_frequency": -1}, "--eval-frequency"),
    "checkpoint frequency": ({"checkpoint_frequency": -1}, "--checkpoint-frequency"),
}


@pytest.mark.parametrize("kind", BAD_INPUT)
def test_bad_input_gets_one_line(script, capsys, kind):
    """Exit code 2, one line that names the flag or the near matches, nothing written."""
    changes, words = BAD_INPUT[kind]
    assert words in error_of(capsys, script.main, tiny(script, **changes))


@pytest.mark.parametrize("kind", BAD_DREAMS)
def test_dreamer_refuses_in_one_line(dreamer, capsys, kind):
    """Spaces, sizes and devices that Dreamer cannot use."""
    changes, words = BAD_DREAMS[kind]
    assert words in error_of(capsys, dreamer.main, tiny(dreamer, **changes))


def test_gl_without_opengl_names_the_packages(dreamer, capsys, monkeypatch):
    """--renderer gl on a machine without OpenGL; auto takes the ray-caster there, and stays with a saved run's."""

    def broken(command, **kwargs):
        raise subprocess.CalledProcessError(1, command)

    monkeypatch.setattr(dreamer.subprocess, "run", broken)
    line = error_of(capsys, dreamer.main, tiny(dreamer, env_id="walker-walk", renderer="gl"))
    assert "libegl1" in line and "--renderer raycast" in line
    assert dreamer.choose_renderer(tiny(dreamer, env_id="walker-walk"), None) == "raycast"
    saved = {"parts": {"counters": {"renderer": "gl"}}}
    assert "libegl1" in error_of(capsys, dreamer.choose_renderer, tiny(dreamer, env_id="walker-walk"), saved)


def test_a_run_made_by_ray_casting_stays_with_it(dreamer, monkeypatch):
    """`auto` means what the run began with, also once OpenGL has been installed."""
    monkeypatch.setattr(dreamer.subprocess, "run", lambda command, **kwargs: None)
    args, saved = tiny(dreamer, env_id="walker-walk"), {"parts": {"counters": {"renderer": "raycast"}}}
    monkeypatch.delenv("MUJOCO_GL", raising=False)
    assert dreamer.choose_renderer(args, saved) == "raycast"
    monkeypatch.delenv("MUJOCO_GL", raising=False)
    assert dreamer.choose_renderer(args, None) == "gl"


def test_tracking_starts_before_the_log_that_it_listens_to(script, monkeypatch):
    """W&B patches the event writer, so wandb.init must come first; it gets the run's name and all settings."""
    calls = []
    writers = len(WRITERS)
    fake = types.SimpleNamespace(init=lambda **settings: calls.append((len(WRITERS) - writers, settings)))
    monkeypatch.setitem(sys.modules, "wandb", fake)
    run_dir = run(script, track=True)
    [(made, settings)] = calls
    assert made == 0 and settings["name"] == Path(run_dir).name and settings["sync_tensorboard"]
    assert settings["config"]["batch_size"] == TINY[script.__name__]["batch_size"]


def test_missing_optional_packages_are_named(script, capsys, monkeypatch):
    """--track without wandb: the pip command."""
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert "pip install wandb" in error_of(capsys, script.main, tiny(script, track=True))


@pytest.mark.parametrize(("env_id", "package"), [("ALE/Pong-v5", "ale_py"), ("walker-walk", "dm_control")])
def test_missing_simulators_are_named(dreamer, capsys, monkeypatch, env_id, package):
    """The pip command of a simulator that is not installed."""
    monkeypatch.setitem(sys.modules, package, None)
    line = error_of(capsys, dreamer.main, tiny(dreamer, env_id=env_id, obs_mode="state"))
    assert f"pip install {package}" in line


def test_run_folder_that_cannot_be_written(script, capsys):
    """A file where the folder should be."""
    Path("runs").write_text("in the way")
    assert "run folder" in error_of(capsys, script.main, tiny(script))


def test_bad_input_as_a_command(script):
    """The same as processes: exit code 2, no traceback, also for a flag that does not exist."""
    bad_id = start(script, *flags_of(tiny(script, env_id="CartPoole-v1", num_envs=2)))
    bad_flag = start(script, "--no-such-flag", "3")
    nothing = start(script, "--resume", "runs/none")
    for process, words in ((bad_id, "CartPole-v1"), (bad_flag, "no-such-flag"), (nothing, "runs/none/checkpoint.pt")):
        _, err = process.communicate(timeout=60)
        assert process.returncode == 2
        assert words in err and "Traceback" not in err
        assert process is bad_flag or len(err.strip().splitlines()) == 1, err


def test_a_full_disk_is_said_in_one_line(script, monkeypatch):
    """A checkpoint that cannot be written ends the run; the one before stays."""
    run_dir = run(script)
    before = Path(run_dir, "checkpoint.pt").read_bytes()

    def full(state, file):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(script.torch, "save", full)
    with pytest.raises(SystemExit, match="No space left on device"):
        resume(script, run_dir, total_timesteps=72)
    assert Path(run_dir, "checkpoint.pt").read_bytes() == before


# === Losses that are not finite ===


def test_nan_reward_stops_the_run_and_keeps_the_last_checkpoint(script):
    """The losses are named; the checkpoint from before is finite and loads."""
    with pytest.raises(SystemExit) as stopped:
        run(script, env_id="fake_envs:NanReward-v0", total_timesteps=240, checkpoint_frequency=12)
    assert stopped.value.code not in (0, None)
    message = str(stopped.value.code)
    assert "losses/reward_loss" in message and "not finite" in message
    run_dir = str(next(Path.cwd().glob("run_0/runs/*")))
    state = load(run_dir)
    assert 0 < state["global_step"] <= 36
    for name, tensor in state["parts"]["agent"].items():
        assert tensor.isfinite().all(), name
    for episode in episodes(run_dir):
        assert np.isfinite(episode["reward"]).all()


@pytest.mark.parametrize("changes", [VECTORS, WALKER | {"obs_mode": "state"}], ids=["vectors", "walker"])
def test_poisoned_parameter_stops_before_anything_is_played_or_saved(dreamer, changes):
    """A parameter that is not finite is reported as a loss, not as a simulator's complaint about its actions."""
    settings = {"obs_mode": "pixels"} | changes
    run_dir = run(dreamer, **settings)
    path = Path(run_dir, "checkpoint.pt")
    state = torch.load(path, weights_only=True)
    state["parts"]["agent"]["actor.net.0.weight"][0, 0] = math.nan
    torch.save(state, path)
    poisoned = path.read_bytes()
    with pytest.raises(SystemExit, match=r"not finite at step \d+: (losses/actor_loss|action)"):
        resume(dreamer, run_dir, **settings | {"total_timesteps": 2 * settings.get("total_timesteps", 48)})
    assert path.read_bytes() == poisoned


# === Evaluation and videos ===


def test_any_seed_evaluates(script):
    """Large seeds too: training episodes and evaluation episodes come from different seeds of the simulator."""
    run_dir = run(script, seed=123456789, eval_frequency=24)
    assert len(scalars(run_dir)["eval/episodic_return"]) == 2


def test_speed_flags_do_not_bind_an_evaluation(dreamer, monkeypatch, capsys):
    """A run made with CUDA graphs can be played without a GPU."""
    run_dir = run(dreamer)
    state = load(run_dir)
    state["args"] |= {"cudagraphs": True, "bfloat16": True}
    torch.save(state, Path(run_dir, "checkpoint.pt"))
    command_line(monkeypatch, dreamer, "--evaluate", run_dir)
    assert "(2 episodes:" in capsys.readouterr().out


def test_resume_on_another_kind_of_device(dreamer, capsys):
    """The state of a GPU's random generator does not fit a CPU's: it starts anew, and says so."""
    run_dir = run(dreamer)
    state = load(run_dir)
    state["rng"]["act"] = torch.zeros(16, dtype=torch.uint8)
    torch.save(state, Path(run_dir, "checkpoint.pt"))
    resume(dreamer, run_dir, total_timesteps=72)
    assert "act starts anew" in capsys.readouterr().out and load(run_dir)["global_step"] == 72


def test_lqr_ends_and_is_the_same_system_every_time(dreamer):
    """The one task without a time limit of its own, whose springs are drawn when it is loaded."""
    args = tiny(dreamer, env_id="lqr-lqr-2-1", obs_mode="state")
    first, second = (dreamer.make_env(args, "none")() for _ in range(2))
    stiffness = [env.unwrapped.env.physics.model.jnt_stiffness.copy() for env in (first, second)]
    assert np.array_equal(*stiffness) and stiffness[0].any()
    first.action_space.seed(1)
    for seed in range(5):
        first.reset(seed=seed)
        steps, done = 0, False
        while not done:
            obs, _, terminated, truncated, _ = first.step(first.action_space.sample())
            steps, done = steps + 1, terminated or truncated
        assert steps <= 500 and np.abs(obs).max() < 100  # its bounds of 1e10 mean none: actions stay in [-1, 1]


def test_environment_without_a_render_mode(dreamer):
    """Rendering is asked for only where a video is."""
    gym.register("Plain-v0", lambda: gym.make("Counter-v0").unwrapped, max_episode_steps=12)
    assert dreamer.make_env(tiny(dreamer, env_id="Plain-v0"), "none")().reset(seed=1)[0].shape == (3,)


@pytest.mark.parametrize("changes", [{}, TWO_ENVS], ids=["one", "two"])
def test_evaluate_prints_mean_and_std_and_changes_nothing(script, monkeypatch, capsys, changes):
    """`--evaluate` plays as many episodes as asked for, twice the same, and leaves the checkpoint as it was."""
    run_dir = run(script, **changes)
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


def test_capture_video_films_the_evaluation(script, monkeypatch):
    """An MP4 of every evaluation while training, and of `--evaluate`."""
    pytest.importorskip("moviepy")
    run_dir = run(script, total_timesteps=24, eval_frequency=12, eval_episodes=1, capture_video=True)
    videos = list(Path(run_dir).rglob("*.mp4"))
    assert len(videos) == 2 and all(video.stat().st_size > 500 for video in videos)
    folder = run(script, total_timesteps=12)
    command_line(monkeypatch, script, "--evaluate", folder, "--eval-episodes", "2", "--capture-video")
    videos = list(Path(folder).rglob("*.mp4"))
    assert len(videos) == 1 and videos[0].stat().st_size > 500


# === What the replay holds ===


@pytest.mark.parametrize("repeat", [1, 2, 5])
@pytest.mark.parametrize("num_envs", [1, 2])
def test_replay_holds_what_was_played(dreamer, repeat, num_envs):
    """Each episode is of one environment, from first to last entry; rewards of repeated actions are summed."""
    run_dir = run(dreamer, **VECTORS, num_envs=num_envs, action_repeat=repeat, total_timesteps=120, learning_starts=48)
    stored = episodes(run_dir)
    seen = [episode["obs"][0, 0] for episode in stored]
    assert len(set(seen)) == len(seen) >= 120 // (-(-12 // repeat) * repeat)
    for i, episode in enumerate(stored):
        obs, length = episode["obs"], len(episode["reward"])
        steps = np.minimum(np.arange(length) * repeat, 12)
        assert (obs[:, 0] == obs[0, 0]).all() and (obs[:, 1] == steps).all()
        sums = [sum(range(steps[t - 1] + 1, steps[t] + 1)) for t in range(1, length)]
        assert episode["reward"].tolist() == [0, *sums]
        assert episode["is_first"].tolist() == [1] + [0] * (length - 1)
        assert episode["action"][0] == 0 and np.abs(episode["action"]).max() <= 1
        np.testing.assert_allclose(obs[1:, 2], 2 * episode["action"][1:, 0], rtol=1e-5)  # the Box is [-2, 2]
        assert episode["cont"].all(), "a time limit is not a termination"
        assert steps[-1] == 12 or i >= len(stored) - num_envs
    assert load(run_dir)["global_step"] == 120


@pytest.mark.parametrize(("env_id", "length"), [("DeadlyCounter-v0", 8), ("BothEndsCounter-v0", 12)])
@pytest.mark.parametrize("num_envs", [1, 2])
def test_terminations_are_stored_as_such(dreamer, env_id, length, num_envs):
    """cont is 0 on the last entry alone, also where the time limit falls on the same step."""
    run_dir = run(dreamer, env_id=f"fake_envs:{env_id}", num_envs=num_envs, total_timesteps=96, learning_starts=48)
    closed = [episode for episode in episodes(run_dir) if episode["obs"][-1, 1] == length]
    assert len(closed) == 96 // length
    for episode in closed:
        assert episode["cont"].tolist() == [1] * length + [0]


def test_cartpole_terminates_and_the_head_learns_from_it(dreamer):
    """Random play ends by falling, never by the time limit of 500."""
    run_dir = run(dreamer, env_id="CartPole-v1", total_timesteps=200, learning_starts=200, buffer_size=400)
    closed = [episode for episode in episodes(run_dir) if episode["cont"][-1] == 0]
    assert len(closed) >= 3
    for episode in closed:
        assert episode["cont"][:-1].all()
        assert (episode["action"][1:].sum(-1) == 1).all() and set(np.unique(episode["action"])) == {0, 1}


@pytest.mark.parametrize(("repeat", "num_envs"), [(1, 1), (4, 1), (1, 2)])
def test_global_step_counts_steps_of_the_environment(dreamer, repeat, num_envs):
    """The lengths of the episodes, action repeats counted and all environments together, add up to the step."""
    run_dir = run(dreamer, **VECTORS, action_repeat=repeat, num_envs=num_envs, total_timesteps=72, learning_starts=72)
    events = scalars(run_dir)
    step = 12 * num_envs
    assert events["charts/episodic_length"] == [(step * (i + 1), 12) for i in range(72 // step)]
    assert events["charts/episodic_return"] == [(step * (i + 1), sum(range(13))) for i in range(72 // step)]


# === Learning ===


@pytest.mark.slow
def test_dreamer_learns_a_tiny_pixel_task(dreamer):
    """The picture shows the right action: random play returns -40 an episode, the best constant one -30, perfect 0."""
    run_dir = run(
        dreamer, total_timesteps=1800, learning_starts=720, pretrain_steps=300, train_frequency=12, train_steps=8,
        batch_size=16, batch_length=6, buffer_size=5000, horizon=3, cnn_depth=4, stoch_size=8, deter_size=64,
        dense_size=64, free_nats=1.0, gamma=0.5, model_lr=2e-3, actor_lr=4e-4, value_lr=1e-3, eval_frequency=1800,
        eval_episodes=20, checkpoint_frequency=0,
    )  # fmt: skip
    mean = scalars(run_dir)["eval/episodic_return"][-1][1]
    print(f"evaluation return {mean:.1f}")
    assert mean > -20
