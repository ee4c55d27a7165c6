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
import zipfile
from pathlib import Path

import fake_envs
import gymnasium as gym
import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer import event_file_writer
from torch.utils.tensorboard import SummaryWriter

ROOT = Path(__file__).parent.parent
SCRIPTS = [name for name in ("dyna_q", "mbpo", "world_models", "dreamer", "muzero") if (ROOT / f"{name}.py").exists()]

# Settings of a tiny run of each script: 12-step episodes, updates from step 24 on or earlier, everything else as small
# as it goes.
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
    "dyna_q": {
        "env_id": "fake_envs:Ladder-v0",
        "total_timesteps": 48,
        "eval_frequency": 0,
        "eval_episodes": 2,
        "checkpoint_frequency": 24,
        "planning_steps": 3,
        "report_frequency": 5,  # neither of an episode nor of a checkpoint
    },
    "mbpo": {
        "env_id": "fake_envs:Point-v0",
        "cuda": False,
        "total_timesteps": 48,
        "eval_frequency": 0,
        "eval_episodes": 2,
        "checkpoint_frequency": 24,
        "buffer_size": 200,
        "learning_starts": 24,
        "epoch_length": 12,
        "updates_per_step": 1,
        "batch_size": 16,
        "real_ratio": 0.25,
        "hidden_size": 8,
        "num_nets": 3,
        "num_elites": 2,
        "model_hidden_size": 8,
        "model_batch_size": 16,
        "model_train_frequency": 12,
        "model_max_epochs": 2,
        "rollout_batch_size": 20,
    },
    "muzero": {
        "env_id": "fake_envs:DiscreteCounter-v0",
        "cuda": False,
        "total_timesteps": 48,
        "num_envs": 1,
        "eval_frequency": 0,
        "eval_episodes": 2,
        "checkpoint_frequency": 24,
        "buffer_size": 200,
        "learning_starts": 12,
        "replay_ratio": 0.25,
        "batch_size": 4,
        "td_steps": 3,
        "unroll_steps": 2,
        "support_size": 20,
        "hidden_size": 8,
        "num_simulations": 3,
        "target_network_frequency": 2,
    },
    "world_models": {
        "env_id": "fake_envs:MovingPixels-v0",
        "cuda": False,
        "total_timesteps": 48,
        "eval_episodes": 2,
        "eval_frequency": 0,
        "checkpoint_frequency": 24,
        "latent_size": 4,
        "vae_depth": 2,
        "vae_epochs": 2,
        "vae_batch_size": 8,
        "hidden_size": 8,
        "num_mixtures": 2,
        "sequence_length": 8,
        "model_batch_size": 3,
        "model_updates": 6,
        "population": 4,
        "episodes": 2,
        "generations": 2,
        "eval_generations": 1,
    },
}
VECTORS = {"env_id": "fake_envs:Counter-v0"}
TWO_ENVS = {"num_envs": 2}
# What else the shared tests must know of a script.
TRAITS = {
    "dreamer": {
        "quick": VECTORS,  # what is learned from in the least time
        "two": VECTORS | TWO_ENVS,  # two environments side by side
        "workers": True,  # each of which has a process of its own
        "kills": 12,
        "nan reward": {"env_id": "fake_envs:NanReward-v0"},  # from step 31 on
        "spoiled": "losses/reward_loss",  # by such a reward
        "fixed": "batch_size",  # one of the settings that a resume may not change
    },
    "dyna_q": {
        "quick": {},
        "two": TWO_ENVS,
        "workers": False,
        "kills": 4,  # each costs a compilation
        "nan reward": {"env_id": "fake_envs:NanLadder-v0"},
        "spoiled": "losses/td_error",
        "fixed": "planning_steps",
    },
    "mbpo": {
        "quick": {},
        "two": TWO_ENVS,
        "workers": True,
        "kills": 6,
        "nan reward": {"env_id": "fake_envs:NanPoint-v0"},
        "spoiled": "the environment's observation or reward",
        "fixed": "batch_size",
    },
    "muzero": {
        "quick": {},
        "two": TWO_ENVS,
        "workers": False,
        "kills": 6,
        "nan reward": {"env_id": "fake_envs:NanCounter-v0"},
        "spoiled": "the environment's observation or reward",
        "fixed": "batch_size",
    },
    "world_models": {
        "quick": {},
        "two": TWO_ENVS,
        "workers": True,
        "kills": 6,
        "nan reward": {"env_id": "fake_envs:NanReward-v0"},
        "spoiled": "the environment's reward",
        "fixed": "vae_batch_size",
    },
}


WRITERS: list[SummaryWriter] = []


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path, monkeypatch):
    """Runs write into an empty folder; what a failed run leaves open, writers and signal handlers, is put in order."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MUJOCO_GL", "")  # so that what a run sets is undone
    monkeypatch.delenv("MUJOCO_GL")
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(100))  # names sort by age
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


def each(cases: dict[str, dict]) -> pytest.MarkDecorator:
    """Parametrizes a test that takes `name` and `kind` over {script: {kind: ...}}."""
    return pytest.mark.parametrize(("name", "kind"), [(name, kind) for name in SCRIPTS for kind in cases[name]])


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


def not_finite(state, path: str = "") -> list[str]:
    """Paths of the tensors and numbers of a nested state that are not finite."""
    if isinstance(state, dict | list | tuple):
        items = state.items() if isinstance(state, dict) else enumerate(state)
        return [found for key, value in items for found in not_finite(value, f"{path}/{key}")]
    numbers = torch.as_tensor(state) if isinstance(state, torch.Tensor | float) else torch.zeros(1)
    return [] if numbers.isfinite().all() else [path]


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
    assert {Path(run(script), name).exists() for name in (f"{script.__name__}.pt", "mine.pt")} == {False}


# === Determinism ===


@pytest.mark.parametrize("two", [False, True], ids=["one", "two"])
def test_same_seed_same_run(script, two):
    """The seed fixes losses, parameters, replay and generators; another seed changes them."""
    changes = TRAITS[script.__name__]["two"] if two else {}
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
RESUMED["muzero"] = {
    "gumbel": {},
    "puct": {"search": "puct", "priority_alpha": 0.5},
    "uniform": {"priority_alpha": 0.0},
    "reanalyzed": {"reanalyze_ratio": 0.5},
    "pixels": {"env_id": "fake_envs:CalmPixelsDiscrete-v0", "unroll_steps": 1},
    "two": TWO_ENVS,
}
RESUMED["world_models"] = {"dream": {}, "real": {"controller_env": "real"}, "two": TWO_ENVS}
RESUMED["dyna_q"] |= {"prioritized last": {"prioritized": True, "model": "last"}, "two": TWO_ENVS}


@each(RESUMED)
def test_stopped_and_resumed_equals_never_stopped(name, kind):
    """Parameters, optimizers, replay, counters and generators of the two final checkpoints, bit for bit."""
    script, changes = importlib.import_module(name), RESUMED[name][kind]
    num_envs = changes.get("num_envs", 1)
    half, full = 36 * num_envs, 72 * num_envs
    whole = run(script, **changes, total_timesteps=full)
    stopped = run(script, **changes, total_timesteps=full)
    halfway = run(script, **changes, total_timesteps=half)
    resumed = resume(script, halfway, **changes, total_timesteps=full)
    assert differences(load(whole), load(stopped)) == []
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
    first, second = (load(resume(script, folder, **changes, total_timesteps=60)) for folder in (run_dir, copy))
    assert differences(first, second) == []


@pytest.mark.parametrize("changes", [{}, TWO_ENVS], ids=["one", "two"])
def test_dreamer_keeps_open_episodes_as_truncated(dreamer, changes):
    """One environment, and two, stopped in the middle of their episodes."""
    steps = 24 + 6 * changes.get("num_envs", 1)
    run_dir = run(dreamer, **changes, total_timesteps=steps)
    before = episodes(run_dir)
    open_now = load(run_dir)["parts"]["open_episodes"]
    assert len(open_now) == changes.get("num_envs", 1)
    resume(dreamer, run_dir, **changes, total_timesteps=60)
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
    run_dir, kept = run(script, **settings, save_buffer=False), load(run(script, **settings))
    saved = load(run_dir)
    assert not {"replay", "open_episodes"} & set(saved["parts"])
    for part in saved["parts"]:
        assert differences(saved["parts"][part], kept["parts"][part]) == [], part
    resume(script, run_dir, **settings, save_buffer=False)
    assert differences(saved, load(run_dir)) == []
    resume(script, run_dir, **settings, save_buffer=False, total_timesteps=108)
    assert load(run_dir)["global_step"] == 108
    assert_healthy(run_dir)


def test_dreamer_refills_a_replay_that_was_not_saved(dreamer):
    """Random actions until learning_starts steps are stored again, then the updates that are due."""
    settings = {"save_buffer": False, **VECTORS}
    run_dir = run(dreamer, **settings)
    saved = load(run_dir)
    resume(dreamer, run_dir, **settings, total_timesteps=108)
    values = scalars(run_dir)["losses/value_loss"]
    new = [step for step, _ in values if step > 48]
    assert new and min(new) >= 48 + 24 and max(new) == 108
    state = load(run_dir)
    assert state["global_step"] == 108
    assert differences(saved["rng"]["prefill"], state["rng"]["prefill"]) != []


def test_command_line_resume_takes_the_runs_own_settings(script, monkeypatch, capsys):
    """--resume needs no other flag; total_timesteps may be given anew; any setting that clashes is named."""
    run_dir = run(script)
    before = load(run_dir)["args"]
    command_line(monkeypatch, script, "--resume", run_dir, "--total-timesteps", "60")
    state = load(run_dir)
    assert state["global_step"] == 60 and state["args"] == before | {"total_timesteps": 60}
    name = TRAITS[script.__name__]["fixed"]
    flag = f"--{name.replace('_', '-')}"
    assert before[name] == TINY[script.__name__][name]
    line = error_of(capsys, command_line, monkeypatch, script, "--resume", run_dir, flag, "7")
    assert f"{flag} 7" in line
    assert differences(state, load(run_dir)) == []


# === Interruptions ===


def test_kill_at_random_moments_keeps_a_loadable_checkpoint(script):
    """Again and again kill -9: what is there always loads, its step never goes back, and a resume goes on from it."""
    traits = TRAITS[script.__name__]
    settings = TINY[script.__name__] | traits["quick"] | {"total_timesteps": 10**6, "checkpoint_frequency": 1}
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


SIGNALS = [(1, signal.SIGINT), (2, signal.SIGTERM), (1, signal.SIGTERM), (2, signal.SIGINT)]
SIGNALS = [(name, *case) for name in SCRIPTS for case in SIGNALS[: 4 if TRAITS[name]["workers"] else 2]]


@pytest.mark.parametrize(("name", "num_envs", "number"), SIGNALS)
def test_interrupt_writes_a_checkpoint_and_says_how_to_go_on(name, num_envs, number):
    """Signals to the whole process group: a checkpoint, the usual exit code, no traceback, no worker left."""
    script = importlib.import_module(name)
    changes = {"total_timesteps": 10**6, "checkpoint_frequency": 0, "num_envs": num_envs}
    before = set(processes_in(os.getcwd()))
    process = start(script, *flags_of(tiny(script, **changes)))
    for line in process.stdout:
        if "episodic_return" in line:
            break
    assert len(set(processes_in(os.getcwd())) - before) >= (num_envs if TRAITS[name]["workers"] else 1)
    os.killpg(process.pid, number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert "Traceback" not in err and "Error" not in err, err
    run_dir = re.search(rf"python {script.__name__}\.py --resume (\S+)", out).group(1)
    step = load(run_dir)["global_step"]
    assert step >= 12 and f"step {step}" in out
    wait_for(lambda: not set(processes_in(os.getcwd())) - before, seconds=10)
    time.sleep(1)  # event files of one second are read in the order of their process numbers, and this one is the lower
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
LAKE = {"env_id": "FrozenLake-v1"}
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
    "a maze of nothing": ({"env_kwargs": ("refine=0",), "env_id": "DynaMaze-v0"}, "refine=0"),
    "two settings in one": ({"env_kwargs": ("is_slippery=true map_name=8x8",), **LAKE}, "unquoted"),
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
    "no holdout": ({"holdout_ratio": 0.0}, "--holdout-ratio"),
    "nothing but holdout": ({"holdout_ratio": 1.0}, "--holdout-ratio"),
    "no length": ({"rollout_schedule": (0, 1, 0, 1)}, "--rollout-schedule"),
    "negative updates": ({"updates_per_step": -1}, "--updates-per-step"),
    "cudagraphs": ({"cudagraphs": True}, "GPU"),
}
BAD_GAMES = {
    "continuous actions": ({"env_id": "Pendulum-v1"}, "actions must be Discrete"),
    "two with continuous actions": ({"env_id": "Pendulum-v1", "num_envs": 2}, "actions must be Discrete"),
    "actions from 5": ({"env_id": "fake_envs:ShiftedLadder-v0"}, "actions must be Discrete starting at 0"),
    "MultiDiscrete actions": ({"env_id": "fake_envs:MultiDiscreteAction-v0"}, "actions must be"),
    "discrete observations": ({"env_id": "FrozenLake-v1"}, "observations must be"),
    "unknown game": ({"env_id": "tictactoo"}, "tictactoe"),
    "unknown Atari game": ({"env_id": "ALE/Pongg-v5"}, "ALE/Pong-v5"),
    "openings that win": (
        {"env_id": "tictactoe", "opening_moves": 5},
        "--opening-moves of tictactoe must be at most 4",
    ),
    "openings of no game": ({"opening_moves": 1}, "must be at most 0, not 1"),
    "less than no opening": ({"env_id": "connect_four", "opening_moves": -1}, "--opening-moves must be at least 0"),
    "film of a board": (
        {"env_id": "tictactoe", "support_size": 1, "capture_video": True, "eval_frequency": 6},
        "pictures",
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
    "share of noise": ({"dirichlet_fraction": -0.1}, "--dirichlet-fraction"),
    "cudagraphs": ({"cudagraphs": True}, "GPU"),
}
BAD_WORLDS = {
    "vectors": ({"env_id": "CartPole-v1"}, "observations must be images"),
    "two with vectors": ({"env_id": "CartPole-v1", "num_envs": 2}, "--render-obs"),
    "Dict observations": ({"env_id": "fake_envs:DictObservation-v0"}, "observations must be images"),
    "MultiDiscrete actions": ({"env_id": "fake_envs:PixelsMultiDiscrete-v0"}, "actions must be"),
    "envpool elsewhere": ({"envpool": True}, "--envpool is for CarRacing-v3"),
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
BAD = {"dreamer": BAD_DREAMS, "dyna_q": BAD_TABLES, "mbpo": BAD_MODELS}
BAD |= {"muzero": BAD_GAMES, "world_models": BAD_WORLDS}


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
    given = TINY[script.__name__] | {"track": True}
    assert {name: settings["config"][name] for name in given} == given
    assert list(settings["config"]) == [field.name for field in dataclasses.fields(script.Args)]


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
    traits = TRAITS[script.__name__]
    with pytest.raises(SystemExit) as stopped:
        run(script, **traits["nan reward"], total_timesteps=240, checkpoint_frequency=12)
    assert stopped.value.code not in (0, None)
    message = str(stopped.value.code)
    assert traits["spoiled"] in message and "not finite" in message
    run_dir = str(next(Path.cwd().glob("run_0/runs/*")))
    state = load(run_dir)
    assert 0 < state["global_step"] <= 36
    assert not_finite(state["parts"]) == []
    if script.__name__ == "dyna_q":  # its replay is bytes
        assert np.isfinite(model_of(script, run_dir).pairs["reward"]).all()


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


def test_resume_and_evaluate_are_two_things(script, monkeypatch, capsys):
    """Not both in one command."""
    run_dir = run(script)
    line = error_of(capsys, command_line, monkeypatch, script, "--resume", run_dir, "--evaluate", run_dir)
    assert "--resume" in line and "--evaluate" in line


def test_any_seed_evaluates(script):
    """Large seeds too: training episodes and evaluation episodes come from different seeds of the simulator."""
    run_dir = run(script, seed=2**32 + 123456789, eval_frequency=24)
    assert len(scalars(run_dir)["eval/episodic_return"]) == 2


def test_speed_flags_do_not_bind_an_evaluation(dreamer, monkeypatch, capsys):
    """A run made with CUDA graphs can be played without a GPU."""
    run_dir = run(dreamer)
    state = load(run_dir)
    state["args"] |= {"cudagraphs": True, "bfloat16": True}
    torch.save(state, Path(run_dir, "checkpoint.pt"))
    command_line(monkeypatch, dreamer, "--evaluate", run_dir)
    assert "(2 episodes:" in capsys.readouterr().out


def test_speed_flags_do_not_bind_a_resume(monkeypatch):
    """A run made with CUDA graphs goes on without a GPU, if asked to."""
    script = importlib.import_module("mbpo")
    run_dir = run(script)
    state = load(run_dir)
    state["args"] |= {"cudagraphs": True}
    torch.save(state, Path(run_dir, "checkpoint.pt"))
    command_line(monkeypatch, script, "--resume", run_dir, "--no-cudagraphs", "--total-timesteps", "60")
    assert load(run_dir)["global_step"] == 60


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


# === Dyna-Q ===


@pytest.fixture
def dyna_q():
    return importlib.import_module("dyna_q")


@pytest.fixture
def played(monkeypatch):
    """What the ladders of a run play: {environment: [(obs, action, reward, next_obs, terminated)]}, in their order."""
    logs, step = {}, fake_envs.Ladder.step

    def recorded(self, action):
        before, result = self.obs, step(self, action)
        logs.setdefault(self, []).append((before, int(action), result[1], result[0], result[2]))
        return result

    monkeypatch.setattr(fake_envs.Ladder, "step", recorded)
    return logs


def model_of(dyna_q, run_dir: str):
    return dyna_q.load_model(load(run_dir)["parts"]["replay"], dyna_q.make_model(1, 1, 1))


def q_of(run_dir: str) -> np.ndarray:
    return load(run_dir)["parts"]["agent"]["q_table"].numpy()


def q_learning(steps: list[tuple], shape: tuple[int, int], learning_rate: float, gamma: float):
    """The book's Q-learning on transitions (s, a, r, s', terminated): Q and the absolute TD errors."""
    q, errors = np.zeros(shape), []
    for s, a, reward, next_s, terminated in steps:
        td_error = reward + (0 if terminated else gamma * max(q[next_s])) - q[s, a]
        q[s, a] += learning_rate * td_error
        errors.append(abs(td_error))
    return q, errors


def table_errors(model, P: dict, start) -> tuple[float, float]:
    """model/missing and model/wrong, outcome by outcome."""
    live, todo = set(), [int(s) for s in np.flatnonzero(start)]
    while todo:
        if (s := todo.pop()) not in live:
            live.add(s)
            todo += [n for row in P[s].values() for chance, n, _, end in row if chance > 0 and not end]
    num_real = num_missing = num_known = num_wrong = 0
    for i, s, a in np.ndindex(model.pairs.shape):
        visits, num_outcomes, mean_reward = model.pairs[i, s, a].item()
        known = [outcome.item() for outcome in model.outcomes[i, s, a, :num_outcomes]]
        assert sum(count for _, count, _ in known) == visits
        seen = {(n, True) for n, _, ends in known if ends} | {(n, False) for n, count, ends in known if count > ends}
        real = [(n, bool(end)) for chance, n, _, end in P[s][a] if chance > 0]
        rewards = [reward for chance, _, reward, _ in P[s][a] if chance > 0]
        possible = min(rewards) - 1e-9 <= mean_reward <= max(rewards) + 1e-9
        num_real += len(real) if s in live else 0
        num_missing += sum(outcome not in seen for outcome in real) if s in live else 0
        num_known += num_outcomes
        num_wrong += sum(not possible or any(o not in real for o in seen if o[0] == n) for n, _, _ in known)
    return num_missing / num_real, num_wrong / num_known


LONG = {"checkpoint_frequency": 0, "report_frequency": 500}  # for runs of thousands of steps
BLOCKED = "........G ......... ......... .######## ......... ...S....."  # S&B example 8.2, from step 1000 on


def maze_table(rows: list[str]) -> tuple[dict, list[bool]]:
    """P of a drawing, cell by cell, and where it begins."""
    cells = {(y, x): (y * len(rows[0]) + x, cell) for y, row in enumerate(rows) for x, cell in enumerate(row)}
    P = {s: {} for s, _ in cells.values()}
    for (y, x), (s, cell) in cells.items():
        for a, (dy, dx) in enumerate(((-1, 0), (1, 0), (0, -1), (0, 1))):
            n, ahead = cells.get((y + dy, x + dx), (s, cell))
            n, ahead = (s, cell) if ahead == "#" else (n, ahead)
            P[s][a] = [(1.0, n, float(ahead == "G"), ahead == "G")]
    return P, [cell == "S" for _, cell in cells.values()]


SLIPPERY = {"env_id": "FrozenLake-v1", "env_kwargs": ("is_slippery=True",)}
TABLES = {
    "ladder": {"total_timesteps": 600},
    "lake": {**SLIPPERY, "total_timesteps": 600},
    "two lakes": {**SLIPPERY, "num_envs": 2, "total_timesteps": 1200},
    "lakes that forget": {**SLIPPERY, "model": "last", "num_envs": 3, "total_timesteps": 1800},
    "changing maze": {"env_id": "BlockingMaze-v0", "max_episode_steps": 60, "total_timesteps": 1800},
    "taxi": {"env_id": "Taxi-v4", "epsilon": 1.0, "total_timesteps": 600},
}


@pytest.mark.parametrize("kind", TABLES)
def test_dyna_q_logs_everything(dyna_q, kind):
    """Each kind of environment: tags, finite values, growing steps; the model beside the environment's own table."""
    settings = TABLES[kind] | LONG | {"report_frequency": 100, "eval_frequency": 600}
    args, run_dir = tiny(dyna_q, **settings), run(dyna_q, **settings)
    expected = {"charts/episodic_return", "charts/episodic_length", "charts/SPS"}
    expected |= {"eval/episodic_return", "eval/episodic_return_std"}
    expected |= {"losses/td_error", "model/planning_td_error", "model/states_visited"}
    tags = scalars(run_dir)
    assert set(tags) == expected | (set() if kind == "ladder" else {"model/missing", "model/wrong"})
    assert_healthy(run_dir)
    reports = list(range(100 * args.num_envs, args.total_timesteps + 1, 100 * args.num_envs))
    for tag in set(tags) - {"charts/episodic_return", "charts/episodic_length"}:
        steps = reports if not tag.startswith("eval/") else list(range(600, args.total_timesteps + 1, 600))
        assert [step for step, _ in tags[tag]] == steps, tag
    assert all(value > 0 for _, value in tags["charts/SPS"])

    model, visits = model_of(dyna_q, run_dir), model_of(dyna_q, run_dir).pairs["visits"]
    if dyna_q.with_task_defaults(args).model == "last":
        assert visits.max() == model.pairs["num_outcomes"].max() == 1
    else:
        assert visits.sum() == args.total_timesteps
    visited = (visits > 0).any(-1).sum(-1)
    assert tags["model/states_visited"][-1][1] == pytest.approx(visited.mean())
    if kind == "ladder":
        return
    if kind == "changing maze":
        table = maze_table(BLOCKED.split())
    else:
        world = gym.make(args.env_id, **dyna_q.parse_kwargs(dyna_q.with_task_defaults(args))).unwrapped
        table = world.P, world.initial_state_distrib
    missing, wrong = table_errors(model, *table)
    assert tags["model/missing"][-1][1] == pytest.approx(missing) and 0 < missing < 1
    assert tags["model/wrong"][-1][1] == pytest.approx(wrong) and (wrong > 0) == (kind == "changing maze")
    if kind != "changing maze" and args.model != "last":
        assert all(a >= b for (_, a), (_, b) in zip(tags["model/missing"][:-1], tags["model/missing"][1:], strict=True))


ONE_STATE = {"plain": {}, "bonus": {"kappa": 1.0}, "two": TWO_ENVS, "no planning": {"planning_steps": 0}}
ONE_STATE |= {"prioritized": {"prioritized": True, "theta": 0.5}}
ONE_STATE |= {"two prioritized": ONE_STATE["prioritized"] | TWO_ENVS}


@pytest.mark.parametrize("kind", ONE_STATE)
def test_reported_errors_are_those_of_the_steps_since_the_last_report(dyna_q, kind):
    """One state, one action, reward 1: each update takes the same share off the error, so every report is known.

    A run that ends reports the two steps since the last report; the resumed one reports all five.
    """
    settings = {"env_id": "fake_envs:OneState-v0", "learning_rate": 0.5, "gamma": 0.9, **ONE_STATE[kind]}
    args = tiny(dyna_q, **settings)
    run_dir = run(dyna_q, **settings, total_timesteps=12 * args.num_envs)
    resume(dyna_q, run_dir, **settings, total_timesteps=20 * args.num_envs)
    error, errors, expected = 1.0, [], {"losses/td_error": [], "model/planning_td_error": []}
    for _ in range(4):
        direct, planning = [], []
        for _ in range(5):
            direct.append(error)
            if not args.prioritized:
                error *= 0.95
            for _ in range(args.planning_steps):
                if not args.prioritized or error > args.theta:
                    planning.append(error)
                    error *= 0.95
        errors += direct
        expected["losses/td_error"].append(np.mean(direct))
        expected["model/planning_td_error"].append(np.mean(planning) if planning else 0)
    assert (expected["model/planning_td_error"][-1] == 0) == (args.prioritized or not args.planning_steps)
    tags = scalars(run_dir)
    for tag, values in expected.items():
        regular = [value for step, value in tags[tag] if step % (5 * args.num_envs) == 0]
        assert regular == pytest.approx(values, rel=1e-5), tag
    assert dict(tags["losses/td_error"])[12 * args.num_envs] == pytest.approx(np.mean(errors[10:12]), rel=1e-5)
    assert [value for _, value in tags["model/states_visited"]] == [1] * 5
    np.testing.assert_allclose(q_of(run_dir), (1 - error) / (1 - 0.9))


@pytest.mark.parametrize("num_envs", [1, 2, 40])
@pytest.mark.parametrize(("env_id", "length"), [("Ladder-v0", 12), ("DeadlyLadder-v0", 6), ("BothEndsLadder-v0", 12)])
def test_each_environment_has_a_learner_of_its_own(dyna_q, played, capsys, num_envs, env_id, length):
    """Without planning every table is Q-learning on what its own environment played: a truncated episode goes on."""
    settings = {"env_id": f"fake_envs:{env_id}", "num_envs": num_envs, "planning_steps": 0, "epsilon": 0.5}
    settings |= {"total_timesteps": 60 * num_envs, "learning_rate": 0.5, "gamma": 0.9, **LONG, "report_frequency": 20}
    run_dir = run(dyna_q, **settings)
    said, tags = capsys.readouterr().out, scalars(run_dir)
    assert len(played) == num_envs and {len(steps) for steps in played.values()} == {60}
    assert load(run_dir)["global_step"] == 60 * num_envs
    q, model = q_of(run_dir), model_of(dyna_q, run_dir)
    assert q.shape == (num_envs, 26, 2)
    td_errors = []
    for i, steps in enumerate(played.values()):
        expected, errors = q_learning(steps, (26, 2), 0.5, 0.9)
        np.testing.assert_allclose(q[i], expected)
        td_errors.append(errors)
        visits, last_tried = np.zeros((2, 26, 2), int)
        for step, (s, a, *_) in enumerate(steps, 1):
            visits[s, a] += 1
            last_tried[s, a] = step
        assert np.array_equal(model.pairs["visits"][i], visits) and np.array_equal(model.last_tried[i], last_tried)
    reports = [(20 * num_envs * (j + 1), part.mean()) for j, part in enumerate(np.split(np.array(td_errors), 3, 1))]
    np.testing.assert_allclose(tags["losses/td_error"], reports, rtol=1e-6)

    returns = np.array([[step[2] for step in steps] for steps in played.values()]).reshape(num_envs, -1, length).sum(-1)
    ends = [length * num_envs * (j + 1) for j in range(60 // length)]
    assert tags["charts/episodic_length"] == [(step, length) for step in ends]
    np.testing.assert_allclose(tags["charts/episodic_return"], list(zip(ends, returns.mean(0), strict=True)), rtol=1e-6)
    number = f", {num_envs} episodes" if num_envs > 1 else ""
    shown = [f"episodic_return={mean:.1f}, length={length}{number}" for mean in returns.mean(0)]
    lines = [line.split(", ", 1) for line in said.splitlines() if "episodic_return" in line]
    assert [words for _, words in lines] == shown
    assert [step for step, _ in lines] == [f"global_step={step}" for step in ends for _ in shown[:: len(ends)]]


@pytest.mark.parametrize("checkpoint", [0, 12])
def test_a_td_error_that_is_not_finite_is_found_at_once(dyna_q, checkpoint):
    """A reward of step 31 that is no number stops the run there, and the checkpoint from before stays."""
    settings = TRAITS["dyna_q"]["nan reward"] | {"checkpoint_frequency": checkpoint}
    with pytest.raises(SystemExit, match="not finite at step 31: losses/td_error"):
        run(dyna_q, **settings, total_timesteps=240)
    run_dir = str(next(Path.cwd().glob("run_0/runs/*")))
    assert load(run_dir)["global_step"] == (24 if checkpoint else 0)


def test_spaces_that_do_not_begin_with_0(dyna_q):
    """Observations and actions from 5 on are learned as if they began with 0."""
    plain, shifted = run(dyna_q), run(dyna_q, env_id="fake_envs:ShiftedLadder-v0")
    assert differences(load(plain)["parts"], load(shifted)["parts"]) == []
    assert losses(plain) == losses(shifted)


def test_dyna_q_begins_new_episodes_after_a_stop_in_the_middle(dyna_q):
    """Nothing of an open episode is stored; what was played of it has been learned."""
    run_dir = run(dyna_q, total_timesteps=30)
    assert list(load(run_dir)["parts"]) == ["agent", "sums", "replay"]
    assert model_of(dyna_q, run_dir).pairs["visits"].sum() == 30
    resume(dyna_q, run_dir, total_timesteps=60)
    assert scalars(run_dir)["charts/episodic_length"] == [(step, 12) for step in (12, 24, 42, 54)]
    assert model_of(dyna_q, run_dir).pairs["visits"].sum() == 60


def test_a_model_that_was_not_saved_is_learned_anew(dyna_q):
    """--no-save-buffer: the model knows the steps since the resume alone."""
    forgets, keeps = (run(dyna_q, save_buffer=saves) for saves in (False, True))
    visits = {}
    for saves, run_dir in ((False, forgets), (True, keeps)):
        resume(dyna_q, run_dir, save_buffer=saves, total_timesteps=60)
        visits[saves] = scalars(run_dir)["model/states_visited"]
    assert [step for step, _ in visits[False]] == [step for step, _ in visits[True]] == sorted([*range(5, 61, 5), 48])
    before, after = (max(value for step, value in visits[False] if (step <= 48) == early) for early in (True, False))
    assert after <= 12 < before
    assert [value for _, value in visits[True]] == sorted(value for _, value in visits[True])


WALLS = {"env_id": "BlockingMaze-v0", "max_episode_steps": 30}
CHECKPOINTS = {
    "lake": ({**SLIPPERY, "total_timesteps": 600}, [100, 300]),
    "prioritized lake": ({**SLIPPERY, "prioritized": True, "total_timesteps": 600}, [300]),
    "before and after the walls change": ({**WALLS, "total_timesteps": 1500}, [900, 1100]),
    "bonus": ({**WALLS, "kappa": 1e-3, "total_timesteps": 1500}, [900]),
}


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_resume_from_the_end_of_an_episode_equals_never_stopped(dyna_q, monkeypatch, kind):
    """Bit for bit from checkpoints on the way; the clock that moves the walls goes on."""
    settings, wanted = CHECKPOINTS[kind]
    settings = {"checkpoint_frequency": 1, "planning_steps": 10, **settings}
    copies, save = {}, dyna_q.save_checkpoint

    def save_and_copy(run_dir, args, global_step, parts, rng):
        save(run_dir, args, global_step, parts, rng)
        if len(copies) < len(wanted) and global_step >= wanted[len(copies)]:
            copies[global_step] = copy_of(os.path.abspath(run_dir))

    with monkeypatch.context() as patch:
        patch.setattr(dyna_q, "save_checkpoint", save_and_copy)
        whole = run(dyna_q, **settings)
    assert len(copies) == len(wanted) and max(copies) < max(wanted) + 200
    assert "walls" not in kind or min(copies) < 1000 < max(copies)
    for step, folder in copies.items():
        assert load(folder)["global_step"] == step
        resume(dyna_q, folder, **settings)
        assert differences(load(whole), load(folder)) == [], step
        assert losses(whole) == losses(folder), step
        assert_healthy(folder)


VARIANTS = {"counts": {}, "last": {"model": "last"}, "kappa": {"kappa": 1e-4}, "prioritized": {"prioritized": True}}


def test_every_variant_finds_the_way_through_the_maze(dyna_q):
    """S&B example 8.1: 14 steps. Where nothing is random, counts are the book's table to the last bit."""
    tables = {}
    for kind, changes in VARIANTS.items():
        settings = {"env_id": "DynaMaze-v0", "learning_rate": 0.5, "epsilon": 0.5, "planning_steps": 30, **changes}
        run_dir = run(dyna_q, **settings, **LONG, total_timesteps=6000, eval_frequency=6000)
        maze = dyna_q.MazeVector(1, dyna_q.MAZES["DynaMaze-v0"])
        obs, _ = maze.reset()
        tables[kind], path = q_of(run_dir), []
        while not maze.goal[obs[0]] and len(path) < 20:
            obs = maze.step(np.array([tables[kind][0, obs[0]].argmax()]))[0]
            path.append(int(obs[0]))
        assert len(path) == 14 and path[-1] == 8, kind
        assert scalars(run_dir)["eval/episodic_return"] == [(6000, 1)], kind
        assert scalars(run_dir)["eval/episodic_return_std"] == [(6000, 0)], kind
    assert np.array_equal(tables["counts"], tables["last"])
    for a, b in (("counts", "kappa"), ("counts", "prioritized"), ("kappa", "prioritized")):
        assert not np.array_equal(tables[a], tables[b]), (a, b)


def test_evaluations_show_known_returns(dyna_q):
    """The best returns of the non-slippery lake and of the cliff; wins and losses on the slippery lake."""
    lake = scalars(run(dyna_q, **LAKE, **LONG, total_timesteps=3000, eval_frequency=3000))
    assert lake["eval/episodic_return"] == [(3000, 1)] and lake["eval/episodic_return_std"] == [(3000, 0)]
    cliff = {"env_id": "CliffWalking-v1", "planning_steps": 10, "total_timesteps": 4000, "max_episode_steps": 500}
    tags = scalars(run(dyna_q, **cliff, **LONG, eval_frequency=4000))
    assert tags["eval/episodic_return"] == [(4000, -13)] and tags["eval/episodic_return_std"] == [(4000, 0)]
    tags = scalars(run(dyna_q, **SLIPPERY, **LONG, total_timesteps=4000, eval_frequency=2000, eval_episodes=50))
    for (_, mean), (_, std) in zip(tags["eval/episodic_return"], tags["eval/episodic_return_std"], strict=True):
        assert 0 < mean < 1 and mean * 50 == pytest.approx(round(mean * 50), abs=1e-4)
        assert std == pytest.approx((mean * (1 - mean)) ** 0.5)


def test_every_learner_is_evaluated(dyna_q, monkeypatch, capsys):
    """The episodes that were asked for are shared out evenly, to the first learners if there are fewer."""
    run_dir = run(dyna_q, num_envs=3)
    for asked, played in ((1, 1), (3, 3), (7, 7)):
        capsys.readouterr()
        command_line(monkeypatch, dyna_q, "--evaluate", run_dir, "--eval-episodes", str(asked))
        assert f"({played} episodes: " in capsys.readouterr().out


FILMS = {
    "lake": {**SLIPPERY, "total_timesteps": 1000},
    "maze": {**WALLS, "max_episode_steps": 200, "planning_steps": 50, "kappa": 1e-4, "total_timesteps": 1000},
}


@pytest.mark.parametrize("kind", FILMS)
def test_films_change_no_figure(dyna_q, monkeypatch, capsys, kind):
    """Training and evaluations are the same with and without; the maze's way is blocked on the evaluation's clock."""
    pytest.importorskip("moviepy")
    settings = FILMS[kind] | LONG | {"eval_frequency": 500}
    filmed, plain = run(dyna_q, **settings, capture_video=True), run(dyna_q, **settings)
    assert losses(filmed) == losses(plain)
    assert differences(load(filmed)["parts"], load(plain)["parts"]) == []
    videos = list(Path(filmed).rglob("*.mp4"))
    assert len(videos) == 2 and all(video.stat().st_size > 500 for video in videos)
    assert not list(Path(plain).rglob("*.mp4"))
    if kind == "maze":
        assert scalars(plain)["eval/episodic_return"] == [(500, 1), (1000, 0)]
    said = []
    for flags in ((), ("--capture-video",)):
        capsys.readouterr()
        command_line(monkeypatch, dyna_q, "--evaluate", plain, *flags)
        said.append(capsys.readouterr().out.splitlines()[-1])
    assert said[0] == said[1] and "(2 episodes: " in said[0]
    assert kind != "maze" or "return 0.0 +- 0.0" in said[0]
    assert len(list(Path(plain).rglob("*.mp4"))) == 1


def test_the_clock_of_the_walls_is_that_of_the_run(dyna_q, monkeypatch):
    """In the middle of an episode, over its end, over a stop and beside evaluations, for all learners at once."""
    times, step = [], dyna_q.MazeVector.step

    def recorded(self, actions):
        times.extend([self.time] if not self.frozen else [])
        return step(self, actions)

    monkeypatch.setattr(dyna_q.MazeVector, "step", recorded)
    settings = {"env_id": "BlockingMaze-v0", "max_episode_steps": 30, "num_envs": 2, "eval_frequency": 40}
    run_dir = run(dyna_q, **settings, total_timesteps=100)
    resume(dyna_q, run_dir, **settings, total_timesteps=200)
    assert times == list(range(100))


@pytest.mark.parametrize("video", [None, "videos/film"], ids=["plain", "filmed"])
def test_the_walls_stand_still_while_an_evaluation_plays(dyna_q, video):
    """Two learners on the way that is open until step 1000, one of them late at times, evaluated 5 steps before it."""
    if video:
        pytest.importorskip("moviepy")
    settings = {"env_id": "BlockingMaze-v0", "max_episode_steps": 60, "eval_episodes": 10}
    args, stop = dyna_q.with_task_defaults(tiny(dyna_q, **settings)), types.SimpleNamespace(requested=0)
    q = np.zeros((2, 54, 4))
    q[:, 45:53, 3] = q[:, [53, 44, 35, 26, 17], 0] = 1  # right along the last row, then up
    q[1, 48] = 0  # where it begins, any direction is as good
    q[1, 39, 1] = 1
    for evaluated, expected in ((995, 1.0), (1000, 0.0)):
        envs = dyna_q.make_vector_env(args, 2, video)
        assert dyna_q.evaluate(q, envs, args, evaluated, stop).tolist() == [expected] * 10
        envs.close()


def test_settings_of_the_environment_on_the_command_line(dyna_q, monkeypatch, capsys):
    """--env-kwargs replaces the task's own; a resume takes the run's."""
    flags = ("--total-timesteps", "400", "--eval-frequency", "0", "--eval-episodes", "2", "--save-model")
    command_line(monkeypatch, dyna_q, "--env-kwargs", "is_slippery=True", "map_name=8x8", *flags)
    (run_dir,) = map(str, Path("runs").iterdir())
    assert load(run_dir)["args"]["env_kwargs"] == ("is_slippery=True", "map_name=8x8")
    model = model_of(dyna_q, run_dir)
    assert model.pairs.shape == (1, 64, 4) and model.pairs["num_outcomes"].max() > 1
    command_line(monkeypatch, dyna_q, "--resume", run_dir, "--total-timesteps", "500")
    state = load(run_dir)
    assert state["global_step"] == 500 and state["args"]["env_kwargs"] == ("is_slippery=True", "map_name=8x8")
    for setting in ("is_slippery=False", "is_slippery=True"):
        line = error_of(capsys, command_line, monkeypatch, dyna_q, "--resume", run_dir, "--env-kwargs", setting)
        assert "--env-kwargs" in line and setting in line
    command_line(monkeypatch, dyna_q, "--evaluate", run_dir)
    assert "(2 episodes: " in capsys.readouterr().out
    assert differences(state, load(run_dir)) == []


def test_settings_are_added_to_those_of_the_task(dyna_q):
    """An id without its version is the task's; what is set anew replaces the task's own setting, the rest stays."""
    for given, in_force in (
        (("map_name=8x8",), ("is_slippery=False", "map_name=8x8")),
        (("is_slippery=true",), ("is_slippery=true",)),
        (("is_slippery=false",), ("is_slippery=false",)),
    ):
        run_dir = run(dyna_q, env_id="FrozenLake", env_kwargs=given, epsilon=1.0, total_timesteps=400)
        args, model = load(run_dir)["args"], model_of(dyna_q, run_dir)
        assert args["env_id"] == "FrozenLake-v1" and args["env_kwargs"] == in_force
        assert model.pairs.shape == (1, 64 if "8x8" in given[0] else 16, 4)
        assert (model.pairs["num_outcomes"].max() > 1) == ("true" in given[0])


def test_settings_of_the_task_stay_in_force(dyna_q, monkeypatch, capsys):
    """What was left open is filled in and saved: a resume need not give it, may give the same, and nothing else."""
    short = ("--total-timesteps", "100", "--eval-frequency", "0")
    command_line(monkeypatch, dyna_q, *short)
    command_line(monkeypatch, dyna_q, "--env-id", "BlockingMaze-v0", "--learning-rate", "0.5", *short)
    lake, maze = (str(next(Path("runs").glob(f"{name}*"))) for name in ("FrozenLake", "BlockingMaze"))
    in_force = {"env_kwargs": ("is_slippery=False",), "gamma": 0.99, "learning_rate": 0.1, "model": "counts"}
    assert in_force.items() <= load(lake)["args"].items()
    in_force = {"env_kwargs": (), "gamma": 0.95, "learning_rate": 0.5, "model": "last"}
    assert in_force.items() <= load(maze)["args"].items()
    assert model_of(dyna_q, lake).pairs["num_outcomes"].max() == 1
    for step, flags in ((120, ()), (140, ("--gamma", "0.99", "--env-kwargs", "is_slippery=False"))):
        command_line(monkeypatch, dyna_q, "--resume", lake, "--total-timesteps", str(step), *flags)
        assert load(lake)["global_step"] == step
    for flag, value, saved in (("gamma", "0.5", "0.99"), ("learning-rate", "1.0", "0.1"), ("model", "last", "counts")):
        line = error_of(capsys, command_line, monkeypatch, dyna_q, "--resume", lake, f"--{flag}", value)
        assert f"--{flag} {value} clashes" in line and saved in line
    resume(dyna_q, lake, **LAKE, **dict.fromkeys(("planning_steps",), 10), report_frequency=100, eval_episodes=10,
           checkpoint_frequency=50_000, total_timesteps=160)  # fmt: skip
    assert load(lake)["global_step"] == 160


# === MBPO ===

CONTROL = {"learning_starts": 200, "total_timesteps": 400, "epoch_length": 100, "model_train_frequency": 100}
CONTROL |= {"eval_frequency": 400, "eval_episodes": 1, "checkpoint_frequency": 0}
LATE = CONTROL | {"total_timesteps": 1000, "learning_starts": 800, "eval_frequency": 1000}
MODELS = {
    "point": {"eval_frequency": 24},
    "two points": {"eval_frequency": 24, "total_timesteps": 72, **TWO_ENVS},
    "deadly": {"env_id": "fake_envs:DeadlyPoint-v0", "eval_frequency": 24},
    "Pendulum": {"env_id": "Pendulum-v1", **CONTROL},
    "Hopper": {"env_id": "Hopper-v5", **CONTROL},
    "walker": {"env_id": "walker-walk", **LATE, "buffer_size": 1000},
}


@pytest.fixture
def mbpo():
    return importlib.import_module("mbpo")


@pytest.mark.parametrize("kind", MODELS)
def test_mbpo_logs_everything_and_moves_all_parameters(mbpo, kind):
    """Each kind of environment: tags, finite values, growing steps, files in the run folder, trained parameters."""
    settings = MODELS[kind]
    args, run_dir = mbpo.with_task_defaults(tiny(mbpo, **settings)), run(mbpo, **settings)
    expected = {"charts/episodic_return", "charts/episodic_length", "charts/SPS"}
    expected |= {"eval/episodic_return", "eval/episodic_return_std"}
    expected |= {f"losses/{name}" for name in ("qf1_loss", "qf2_loss", "qf_loss", "actor_loss", "alpha_loss", "alpha")}
    expected |= {"losses/qf_values", "losses/model_nll", "losses/model_holdout_mse"}
    expected |= {f"model/{name}" for name in ("weighted_mse", "disagreement", "max_logvar", "min_logvar", "epochs")}
    expected |= {"model/rollout_length", "model/mean_rollout"}
    expected |= {f"model/{name}_{i}" for name in ("holdout_mse", "weighted_mse") for i in range(3)}
    curves = {f"open_loop/{name}_error_{k}" for name in ("obs", "reward") for k in range(1, 26)}
    tags = scalars(run_dir)
    assert expected <= set(tags) <= expected | curves
    assert curves <= set(tags) or kind not in ("Pendulum", "walker")
    assert image_tags(run_dir) == {"open_loop/error"}
    assert_healthy(run_dir)
    trained = list(range(args.learning_starts, args.total_timesteps, args.model_train_frequency))
    assert [step for step, _ in tags["losses/model_nll"]] == [step + args.num_envs for step in trained]
    state = load(run_dir)
    saved = state["parts"]
    assert state["global_step"] == args.total_timesteps
    assert saved["counters"]["num_updates"] == args.total_timesteps - args.learning_starts > 0
    envs = mbpo.make_vector_env(args, 1)
    torch.manual_seed(args.seed)
    spaces = envs.single_observation_space, envs.single_action_space
    untrained = mbpo.Agent(*(space.shape[0] for space in spaces), args).state_dict()
    envs.close()
    assert untrained.keys() == saved["agent"].keys()
    still = [name for name, tensor in untrained.items() if torch.equal(tensor, saved["agent"][name])]
    assert set(still) <= {"ensemble.elites"}


def test_mbpo_begins_where_its_random_steps_end(mbpo):
    """A model's curves begin one step after learning_starts; rollouts of one step are as long as that."""
    run_dir = run(mbpo)
    tags = scalars(run_dir)
    for tag in ("model/rollout_length", "model/mean_rollout"):
        assert tags[tag] == [(25, 1), (37, 1)]
    assert [step for step, _ in tags["losses/model_nll"]] == [25, 37]
    for name in ("max_logvar", "min_logvar"):
        bounds = load(run_dir)["parts"]["agent"][f"ensemble.{name}"]
        assert tags[f"model/{name}"][-1][1] == pytest.approx(bounds.mean().item())
    errors = [[value for _, value in tags[f"model/holdout_mse_{i}"]] for i in range(3)]
    assert np.mean(errors, 0) == pytest.approx([value for _, value in tags["losses/model_holdout_mse"]])


def test_mbpo_trains_again_once_a_replay_is_refilled(mbpo):
    """Without the saved buffers there is nothing to sample from: the ensemble is trained although it is not yet due."""
    settings = {"save_buffer": False, "learning_starts": 6, "model_train_frequency": 24}
    run_dir = run(mbpo, **settings, total_timesteps=36)
    resume(mbpo, run_dir, **settings, total_timesteps=48)
    assert [step for step, _ in scalars(run_dir)["losses/model_nll"]] == [7, 31, 43]


def test_mbpo_rollouts_end_where_everything_dies(mbpo, monkeypatch):
    """The mean length of rollouts is what was rolled, not what was planned."""
    monkeypatch.setitem(fake_envs.POINT_ENDS, "Point", -1.0)
    tags = scalars(run(mbpo, rollout_schedule=(0, 1, 3, 3)))
    assert tags["model/rollout_length"] == [(25, 3), (37, 3)] and tags["model/mean_rollout"] == [(25, 1), (37, 1)]


def test_mbpo_resumes_from_the_step_of_a_training(mbpo, monkeypatch):
    """Killed right after the checkpoint that follows a training: its curves are kept and it is not done again."""
    whole = run(mbpo, checkpoint_frequency=12)
    folders, save = [], mbpo.save_checkpoint

    def save_and_die(run_dir, args, global_step, *rest):
        save(run_dir, args, global_step, *rest)
        if global_step == 36:
            folders.append(os.path.abspath(run_dir))
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(mbpo, "save_checkpoint", save_and_die)
        run(mbpo, checkpoint_frequency=12)
    resume(mbpo, folders[0], checkpoint_frequency=12)
    assert differences(load(whole)["parts"], load(folders[0])["parts"]) == []
    assert scalars(folders[0])["losses/model_nll"] == scalars(whole)["losses/model_nll"]


@pytest.mark.parametrize("num_envs", [1, 2])
def test_mbpo_replay_holds_what_was_played(mbpo, monkeypatch, num_envs):
    """Each environment's steps in their order; a time limit is no termination, death is."""
    for name, fatal in (("Counter", None), ("DeadlyCounter", 8), ("BothEndsCounter", 12)):
        ends = (lambda o: o[..., 1] == 8) if fatal == 8 else mbpo.never
        monkeypatch.setitem(mbpo.TERMINATIONS, name, ends)
        settings = {"env_id": f"fake_envs:{name}-v0", "num_envs": num_envs, "total_timesteps": 96}
        run_dir = run(mbpo, **settings, learning_starts=95, updates_per_step=0)
        rows = load(run_dir)["parts"]["replay"]["rows"].reshape(-1, num_envs, 9)
        obs, action, reward, next_obs, terminated = rows.split([3, 1, 1, 3, 1], -1)
        length = 8 if fatal == 8 else 12
        count = (torch.arange(96 // num_envs) % length + 1)[:, None].expand(-1, num_envs)
        assert (obs[..., 1] == count - 1).all() and (next_obs[..., 1] == count).all()
        assert (reward[..., 0] == count).all() and (obs[..., 0] == next_obs[..., 0]).all()
        assert torch.equal(terminated[..., 0].bool(), count == (fatal or -1))
        torch.testing.assert_close(next_obs[..., 2], 2 * action[..., 0])  # the Box is [-2, 2]
        assert (obs[1:, :, 2] == next_obs[:-1, :, 2])[count[1:, 0] > 1].all() and (action.abs() <= 1).all()


@pytest.mark.parametrize("kind", ["actor.net.0.weight", "ensemble.layers.0.weight"])
def test_mbpo_stops_where_a_loss_is_not_finite(mbpo, kind):
    """A poisoned parameter is reported as a loss; the checkpoint from before stays."""
    run_dir = run(mbpo)
    path = Path(run_dir, "checkpoint.pt")
    state = load(run_dir)
    state["parts"]["agent"][kind][:] = math.nan
    torch.save(state, path)
    poisoned = path.read_bytes()
    with pytest.raises(SystemExit) as stopped:
        resume(mbpo, run_dir, total_timesteps=96)
    assert re.search(r"not finite at step \d+: ", str(stopped.value.code))
    assert path.read_bytes() == poisoned


# === MuZero ===

FOUR_ENVS = {"num_envs": 4, "learning_starts": 24, "total_timesteps": 120}
GAMES = {
    "counter": {},
    "two": TWO_ENVS,
    "puct": {"search": "puct", "priority_alpha": 0.6},
    "reanalyzed": {"reanalyze_ratio": 0.5, "bootstrap": "search"},
    "deadly": {"env_id": "fake_envs:DeadlyDiscreteCounter-v0"},
    "pixels": {"env_id": "fake_envs:CalmPixelsDiscrete-v0", "total_timesteps": 36},
    "CartPole": {"env_id": "CartPole-v1", **FOUR_ENVS},
    "tictactoe": {"env_id": "tictactoe", **FOUR_ENVS},
    "connect_four": {"env_id": "connect_four", "search": "puct", **FOUR_ENVS},
}


@pytest.fixture
def muzero():
    return importlib.import_module("muzero")


@pytest.mark.parametrize("kind", GAMES)
def test_muzero_logs_everything_and_moves_all_parameters(muzero, kind):
    """Each kind of task: tags, finite values, growing steps, files in the run folder, trained parameters."""
    settings = {"total_timesteps": 60, "eval_frequency": 24} | GAMES[kind]
    args, run_dir = muzero.with_task_defaults(tiny(muzero, **settings)), run(muzero, **settings)
    expected = {"charts/episodic_return", "charts/episodic_length", "charts/SPS"}
    expected |= {"eval/episodic_return", "eval/episodic_return_std", "grad_norm/agent"}
    expected |= {f"losses/{name}" for name in ("policy_loss", "value_loss", "reward_loss", "loss", "clipped_targets")}
    expected |= {"search/depth", "search/root_value_error", "search/root_value_bias"}
    expected |= {"open_loop/value_error_0", "open_loop/policy_error_0"}
    expected |= {f"open_loop/{name}_error_1" for name in ("value", "policy", "reward")}
    tags = scalars(run_dir)
    assert expected <= set(tags), expected - set(tags)
    beyond = {f"open_loop/{name}_error_{k}" for name in ("value", "policy", "reward") for k in (2, 4)}
    assert set(tags) <= expected | beyond and beyond <= set(tags)
    assert image_tags(run_dir) == {"open_loop/error"}
    assert f"open_loop_error_{args.total_timesteps // 24 * 24}.png" in os.listdir(run_dir)
    assert_healthy(run_dir)
    state = load(run_dir)
    saved = state["parts"]
    assert state["global_step"] == args.total_timesteps
    assert saved["counters"]["num_updates"] == muzero.updates_due(args.total_timesteps, args) > 0
    torch.manual_seed(args.seed)
    untrained = muzero.Agent(muzero.make_vector_env(args, 1), args).state_dict()
    assert untrained.keys() == saved["agent"].keys() == saved["target"].keys()
    still = [name for name, tensor in untrained.items() if torch.equal(tensor, saved["agent"][name])]
    assert set(still) <= {"network.action_planes"}
    assert any(not torch.equal(tensor, saved["target"][name]) for name, tensor in untrained.items())


@pytest.mark.parametrize("num_envs", [1, 2])
@pytest.mark.parametrize(("name", "length"), [("", 12), ("Deadly", 8), ("BothEnds", 12)])
def test_muzero_replay_holds_what_was_played(muzero, name, length, num_envs):
    """Each environment's steps in their order, the final observation after them; a time limit is no termination."""
    settings = {"env_id": f"fake_envs:{name}DiscreteCounter-v0", "num_envs": num_envs, "total_timesteps": 48 * num_envs}
    run_dir = run(muzero, **settings, buffer_size=200 * num_envs)
    replay = load(run_dir)["parts"]["replay"]
    data = {key: column[: replay["ends"][0]] for key, column in replay["data"].items()}
    count = torch.arange(replay["ends"][0])[:, None].expand(-1, num_envs) % (length + 1)
    assert replay["ends"] == [48 + 48 // length] * num_envs == replay["ready"]
    closing = count == length
    assert (data["obs"][..., 1] == count).all() and torch.equal(data["age"], count)
    assert (data["reward"] == torch.where(closing, 0, count + 1)).all()
    kind = muzero.TRUNCATED if name == "" else muzero.TERMINATED
    assert (data["end"] == torch.where(closing, kind, muzero.STEP)).all()
    assert (data["value"][closing] == 0).all() == (kind == muzero.TERMINATED)
    steps = ~closing[:-1]
    assert (data["action"][:-1][steps] == data["obs"][1:, :, 2][steps]).all()
    assert (data["priority"] > 0).eq(~closing).all()
    torch.testing.assert_close(data["policy"].sum(-1), (~closing).float())


def test_muzero_stores_what_its_searches_found(muzero, monkeypatch):
    """Action, policy and root value of each search, drawn with new noise, beside the moves that the rules allowed."""
    act, temperature_of, results, noises, moves = muzero.act, muzero.temperature_of, [], [], []

    def recorded_act(agent, obs, legal, noise, temperature, **kwargs):
        noises.append(noise)
        results.append(act(agent, obs, legal, noise, temperature, **kwargs))
        return results[-1]

    def recorded_temperature(counts, global_step, args):
        moves.append(counts.copy())
        return temperature_of(counts, global_step, args)

    monkeypatch.setattr(muzero, "act", recorded_act)
    monkeypatch.setattr(muzero, "temperature_of", recorded_temperature)
    run_dir, openings = run(muzero, **FOUR_ENVS | {"env_id": "tictactoe", "total_timesteps": 100}), []
    replay = load(run_dir)["parts"]["replay"]
    assert len(results) == 25 and all(noise.any() for noise in noises)
    assert not any(torch.equal(*pair) for pair in zip(noises[:-1], noises[1:], strict=True))
    for i, end in enumerate(replay["ends"]):
        data = {name: column[:end, i] for name, column in replay["data"].items()}
        data = {name: column[data["end"] == muzero.STEP] for name, column in data.items()}
        for name in ("action", "policy", "value"):
            assert torch.equal(data[name], torch.stack([getattr(result, name)[i] for result in results])), name
        assert torch.equal(data["legal"], data["obs"].sum(1).flatten(1) == 0) and not data["legal"].all()
        openings.append(data["obs"].flatten(1).sum(1).numpy() - [count[i] for count in moves])
    starts = np.array(moves).T == 0
    assert all((opening[1:] == opening[:-1])[~start[1:]].all() for opening, start in zip(openings, starts, strict=True))
    assert np.min(openings) == 0 and np.max(openings) == 4 and np.max(moves) <= 8 and starts.sum() > 8


@pytest.mark.parametrize(
    ("settings", "fresh"),
    [({}, 4), ({"bootstrap": "search"}, 0), ({"bootstrap": "search", "reanalyze_ratio": 0.3}, 2)],
)
def test_muzero_bootstraps_from_the_target_network(muzero, monkeypatch, settings, fresh):
    """How many of a batch of 4 end in the target network's value now; the target network is another than the agent."""
    fresh_values, update, counts, networks = muzero.fresh_values, muzero.update, [], []

    def recorded_fresh_values(target, rb, rows, count, td_steps):
        networks.append(target)
        counts.append(count)
        return fresh_values(target, rb, rows, count, td_steps)

    def recorded_update(agent, *rest):
        assert all(target is not agent for target in networks)
        return update(agent, *rest)

    monkeypatch.setattr(muzero, "fresh_values", recorded_fresh_values)
    monkeypatch.setattr(muzero, "update", recorded_update)
    run_dir = run(muzero, **settings)
    num_updates = load(run_dir)["parts"]["counters"]["num_updates"]
    assert counts == [fresh] * (num_updates if fresh else 0)


def test_muzero_keeps_open_episodes_as_truncated(muzero):
    """Stopped in the middle of its episodes: the resumed run closes them with the observation that came last."""
    run_dir = run(muzero, **TWO_ENVS, total_timesteps=36)
    saved = load(run_dir)["parts"]
    assert saved["open_episodes"]["obs"][:, 1].tolist() == [6, 6]
    resume(muzero, run_dir, **TWO_ENVS, total_timesteps=60)
    data = load(run_dir)["parts"]["replay"]["data"]
    row = saved["replay"]["ends"][0]
    assert data["end"][row].tolist() == [muzero.TRUNCATED] * 2 and data["obs"][row, :, 1].tolist() == [6, 6]
    assert torch.equal(data["value"][row], saved["open_episodes"]["value"]) and data["value"][row].all()
    assert data["obs"][row + 1, :, 1].tolist() == [0, 0]


@pytest.mark.parametrize("key", ["network.encoder.0.weight", "network.reward.bias"])
def test_muzero_stops_where_a_loss_is_not_finite(muzero, key):
    """A poisoned parameter is reported as a loss; the checkpoint from before stays."""
    run_dir = run(muzero)
    path = Path(run_dir, "checkpoint.pt")
    state = load(run_dir)
    state["parts"]["agent"][key][:] = math.nan
    torch.save(state, path)
    poisoned = path.read_bytes()
    with pytest.raises(SystemExit, match=r"not finite at step \d+: losses/"):
        resume(muzero, run_dir, total_timesteps=96)
    assert path.read_bytes() == poisoned


# === World Models ===

WORLDS = {
    "pixels": {},
    "deadly discrete": {"env_id": "fake_envs:TinyPixelsDiscrete-v0", "total_timesteps": 96},
    "real": {"controller_env": "real"},
    "two": TWO_ENVS,
    "drawn": {"env_id": "CartPole-v1", "render_obs": True, "total_timesteps": 120, "dream_length": 20},
}


@pytest.fixture
def world_models():
    return importlib.import_module("world_models")


@pytest.mark.parametrize("kind", WORLDS)
def test_world_models_logs_everything_and_moves_all_parameters(world_models, kind):
    """Each kind of environment and of evolution: tags and their steps, files in the run folder, trained parameters."""
    settings = WORLDS[kind] | {"eval_frequency": 24}
    args, run_dir = world_models.with_task_defaults(tiny(world_models, **settings)), run(world_models, **settings)
    dreaming, constants = kind != "real", 2 if kind == "drawn" else 3
    heads = {"losses/done_loss", "losses/reward_loss", "dream/episodic_return", "dream/episodic_return_std"}
    heads |= {f"model/deaths_{name}" for name in ("true", "predicted", "recall")}
    policies = ["recording", *(f"constant_{i}" for i in range(constants))]
    heads |= {f"calibration/{policy}_{where}" for policy in policies for where in ("dream", "real")}
    expected = {"charts/episodic_return", "charts/episodic_length", "charts/SPS"} | (heads if dreaming else set())
    expected |= {"eval/episodic_return", "eval/episodic_return_std", "model/live_dims", "model/holdout_mdn_nll"}
    expected |= {"losses/vae_recon_loss", "losses/vae_kl_loss", "losses/mdn_nll"}
    expected |= {f"controller/{name}" for name in ("mean", "best", "std", "sigma", "length")}
    horizons = {f"open_loop/image_mse_horizon_{k}" for k in (1, 5, 15, 45)}
    tags = scalars(run_dir)
    assert expected <= set(tags) <= expected | horizons
    assert_healthy(run_dir)
    pictures = {"vae/reconstructions", "dream/episode"}
    assert pictures <= image_tags(run_dir) <= pictures | {"open_loop/error", "open_loop/truth_dream"}
    files = {re.sub(r"\d+", "N", name) for name in os.listdir(run_dir)}
    assert {"frames.bin", "latents.bin", "scalars.jsonl", "reconstructions.png", "dream_episode_N.gif"} <= files
    if kind in ("pixels", "real", "two"):  # whose held-out episode is long enough
        assert "open_loop/image_mse_horizon_5" in tags
        assert {"open_loop_error.png", "open_loop_truth_dream_N.gif"} <= files
    state = load(run_dir)
    recorded, saved = state["parts"]["counters"]["collected"], state["parts"]
    assert recorded == args.total_timesteps and saved["counters"]["stage"] == "done"
    lengths = [value for tag, *value in [(t, *v) for t in ("controller/length",) for v in tags[t]]]
    made = 0 if dreaming else round(sum(length for _, length in lengths) * args.population * args.episodes)
    assert state["global_step"] == recorded + made
    steps = [step for step, _ in tags["controller/mean"]]
    assert steps[-1] == state["global_step"] + 2 and len(steps) == 2
    assert [step for step, _ in tags["eval/episodic_return"]] == steps
    assert tags["losses/mdn_nll"][-1][0] == recorded + args.model_updates
    torch.manual_seed(args.seed)
    envs = world_models.make_vector_env(args, 1)
    untrained = world_models.Agent(world_models.make_spec(envs, args), args).state_dict()
    envs.close()
    assert untrained.keys() == saved["agent"].keys()
    still = [name for name, tensor in untrained.items() if torch.equal(tensor, saved["agent"][name])]
    assert set(still) <= {"model.start_c", "model.start_h"}  # zero where an episode begins
    rows = np.fromfile(Path(run_dir, "frames.bin"), np.uint8)
    assert len(rows) == len(saved["replay"]["reward"]) * 64 * 64 * 3


@pytest.mark.parametrize("stage", ["v", "encode", "m", "c", "evaluate"])
def test_interrupted_in_any_stage_and_resumed_equals_never_interrupted(world_models, monkeypatch, stage):
    """A kill after some of the stage's work: what was saved of it is not done again, and the end is the same."""
    settings = {"eval_frequency": 24, "checkpoint_frequency": 8, "model_updates": 9, "generations": 3}
    whole = run(world_models, **settings)
    places = {"v": "update_vae", "encode": "preprocess", "m": "update_model", "c": "dream", "evaluate": "log_gif"}
    function, calls = getattr(world_models, places[stage]), []

    def killed(*args, **kwargs):
        run_now = world_models.RUNNING[-1]
        calls.append(run_now.stage)
        if run_now.stage == stage and calls.count(stage) == (7 if stage in ("v", "m") else 1):
            raise KeyboardInterrupt
        return function(*args, **kwargs)

    init = world_models.Run.__init__
    running = []
    monkeypatch.setattr(world_models, "RUNNING", running, raising=False)
    monkeypatch.setattr(world_models.Run, "__init__", lambda self, *a: (running.append(self), init(self, *a))[1])
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(world_models, places[stage], killed)
        run(world_models, **settings)
    close_writers()
    run_dir = str(next(Path.cwd().glob("run_1/runs/*")))
    counters = load(run_dir)["parts"]["counters"]
    assert counters["stage"] == stage
    resume(world_models, run_dir, **settings)
    assert differences(load(whole), load(run_dir)) == []
    assert losses(run_dir) == losses(whole)
    assert_healthy(run_dir)


def test_stages_are_done_again_on_purpose(world_models, capsys):
    """--from-stage keeps what comes before, takes new settings of what comes after, and purges its curves."""
    run_dir = run(world_models, eval_frequency=24)
    before, tags = load(run_dir), scalars(run_dir)
    again = copy_of(run_dir)
    resume(world_models, again, eval_frequency=24, from_stage="m")
    assert differences(before, load(again)) == [] and losses(again) == losses(run_dir)
    resume(world_models, again, eval_frequency=24, from_stage="m", model_updates=8, temperature=0.5)
    after = load(again)
    found = differences(before["parts"]["agent"], after["parts"]["agent"])
    changed = {path.removeprefix("/") for path in found}
    assert changed and all(name.startswith(("model.", "controller")) for name in changed)
    assert after["args"] == before["args"] | {"model_updates": 8, "temperature": 0.5}
    assert scalars(again)["losses/vae_kl_loss"] == tags["losses/vae_kl_loss"]
    assert [step for step, _ in scalars(again)["losses/mdn_nll"]] == [56]
    assert_healthy(again)
    for stage, flags in (("c", {"model_updates": 9}), ("v", {"env_id": "fake_envs:TinyPixelsDiscrete-v0"})):
        line = error_of(capsys, resume, world_models, again, from_stage=stage, **flags)
        assert "clashes" in line
    assert differences(after, load(again)) == []


def test_more_generations_go_on_where_the_others_ended(world_models):
    """As if all had been asked for at once, curves included; both scores of the old end stay."""
    whole = run(world_models, generations=4, eval_frequency=24)
    run_dir = run(world_models, generations=2, eval_frequency=24)
    resume(world_models, run_dir, generations=4, eval_frequency=24)
    assert differences(load(whole), load(run_dir)) == []
    assert losses(whole) == losses(run_dir)


def test_not_further_than_it_has_come(world_models, capsys):
    """A later stage than the one in progress cannot be done again."""
    run_dir = run(world_models)
    state = load(run_dir)
    state["parts"]["counters"]["stage"] = "v"
    torch.save(state, Path(run_dir, "checkpoint.pt"))
    assert "not come further than v" in error_of(capsys, resume, world_models, run_dir, from_stage="m")
    assert "no controller yet" in error_of(capsys, world_models.main, tiny(world_models, evaluate=run_dir))


@pytest.mark.parametrize("what", ["foreign frames", "no frames", "half of the latents"])
def test_data_that_is_not_this_runs_is_refused(world_models, capsys, what):
    """One line that names the file and the stage to repeat; the checkpoint stays."""
    run_dir, other = run(world_models), run(world_models, env_id="fake_envs:TinyPixelsDiscrete-v0")
    before = Path(run_dir, "checkpoint.pt").read_bytes()
    frames, latents = Path(run_dir, "frames.bin"), Path(run_dir, "latents.bin")
    if what == "foreign frames":
        shutil.copy(Path(other, "frames.bin"), frames)
        with open(frames, "ab") as file:
            file.write(bytes(10**6))
    elif what == "no frames":
        frames.unlink()
    else:
        latents.write_bytes(latents.read_bytes()[:100])
    line = error_of(capsys, resume, world_models, run_dir, from_stage="m")
    assert (str(latents) if "latents" in what else str(frames)) in line
    assert ("--from-stage encode" if "latents" in what else "--from-stage collect") in line
    assert Path(run_dir, "checkpoint.pt").read_bytes() == before
    repeated = resume(world_models, run_dir, from_stage="encode" if "latents" in what else "collect")
    assert load(repeated)["parts"]["counters"]["stage"] == "done"


def test_data_that_was_not_kept_is_missed(world_models, capsys):
    """--no-save-buffer: C can be evolved anew, V and M cannot."""
    run_dir = run(world_models, save_buffer=False)
    line = error_of(capsys, resume, world_models, run_dir, save_buffer=False, from_stage="m")
    assert "--no-save-buffer" in line and "--from-stage collect" in line
    resume(world_models, run_dir, save_buffer=False, from_stage="c")
    assert load(run_dir)["parts"]["counters"]["stage"] == "done"


@pytest.mark.parametrize(
    ("poison", "words"), [(math.nan, "not finite: latents of V"), (0.0, "latents of V are constant")]
)
def test_latents_that_cannot_be_learned_from_stop_the_run(world_models, poison, words):
    """Not finite, or the same for every frame: one message, and the stage can be repeated."""
    run_dir = run(world_models)
    state = load(run_dir)
    state["parts"]["agent"]["vae.mu.weight"][:] = poison
    torch.save(state, Path(run_dir, "checkpoint.pt"))
    with pytest.raises(SystemExit, match=words):
        resume(world_models, run_dir, from_stage="encode")
    resume(world_models, run_dir, from_stage="v")
    assert load(run_dir)["parts"]["counters"]["stage"] == "done"


@pytest.mark.parametrize(("package", "changes"), [("vizdoom", {"env_id": "VizdoomTakeCover-v1"}), ("envpool", {})])
def test_missing_simulators_of_world_models_are_named(world_models, capsys, monkeypatch, package, changes):
    """The pip command of a simulator that is not installed."""
    monkeypatch.setitem(sys.modules, package, None)
    changes = changes or {"env_id": "CarRacing-v3", "envpool": True}
    assert f"pip install {package}" in error_of(capsys, world_models.main, tiny(world_models, **changes))
    assert os.listdir() == []


def test_a_bad_dream_is_said_before_anything_is_evolved_in_it(world_models, capsys):
    """After six updates M knows nothing: the report names the policies that disagree and what to raise."""
    run_dir = run(world_models)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("calibration: ")]
    assert "NOT like the real environment (recording" in lines[-1] and "--total-timesteps" in lines[-1]
    tags = scalars(run_dir)
    real = tags["calibration/recording_real"][0][1]
    returns = [value for _, value in tags["charts/episodic_return"]]
    assert real == pytest.approx(np.mean(returns), rel=1e-5)
    assert f"real {real:.1f} +- {np.std(returns):.1f}" in lines[1]


def test_a_stage_begun_anew_is_remembered_before_the_old_one_is_given_up(world_models, monkeypatch):
    """Killed in the first update of --from-stage m: a plain resume goes on with it, and V's curves are there once."""
    run_dir = run(world_models)
    before = [line for line in Path(run_dir, "scalars.jsonl").read_text().splitlines() if '"v"' in line]

    def killed(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(world_models, "update_model", killed)
        with pytest.raises(KeyboardInterrupt):
            resume(world_models, run_dir, from_stage="m", model_updates=9)
    state = load(run_dir)
    assert state["parts"]["counters"]["stage"] == "m" and state["args"]["model_updates"] == 9
    resume(world_models, run_dir, model_updates=9)
    lines = Path(run_dir, "scalars.jsonl").read_text().splitlines()
    assert [line for line in lines if '"v"' in line] == before
    assert load(run_dir)["parts"]["counters"]["stage"] == "done" and any('["m", 9, ' in line for line in lines)


def test_a_run_that_kept_no_buffer_records_anew(world_models):
    """More steps than were recorded: all of them again, not only those that are missing."""
    run_dir = run(world_models, save_buffer=False)
    resume(world_models, run_dir, save_buffer=False, total_timesteps=72)
    state = load(run_dir)
    assert state["global_step"] == state["parts"]["counters"]["collected"] == 72
    assert os.path.getsize(Path(run_dir, "frames.bin")) == 72 * 64 * 64 * 3


def test_temperature_table(world_models, monkeypatch, capsys):
    """Two temperatures, each evolved in a copy of the run, which itself stays as it is; once more over the copies."""
    monkeypatch.syspath_prepend(ROOT / "benchmark")
    table = importlib.import_module("world_models_temperature")
    run_dir = run(world_models)
    kept = {path.name: path.read_bytes() for path in Path(run_dir).iterdir()}
    for _ in range(2):
        monkeypatch.setattr(sys, "argv", ["", run_dir, "--temperatures", "0.5", "1.3", "--eval-episodes", "2"])
        table.main()
        lines = capsys.readouterr().out.splitlines()[-4:]
        assert lines[0] == "| temperature | dream (100 dreams) | real (2 episodes) |"
        assert [line.split(" ")[1] for line in lines[2:]] == ["0.5", "1.3"] and all("±" in line for line in lines[2:])
    assert kept == {path.name: path.read_bytes() for path in Path(run_dir).iterdir()}
    for temperature in (0.5, 1.3):
        assert load(f"{run_dir}_tau{temperature}")["args"]["temperature"] == temperature


# === Learning ===


@pytest.mark.slow
def test_world_models_learn_a_tiny_pixel_task_in_their_dream(world_models, capsys):
    """The picture shows the right action: random play returns -40 an episode, the best constant one -30, perfect 0."""
    run_dir = run(
        world_models, env_id="fake_envs:TinyPixels-v0", total_timesteps=6000, vae_depth=8, vae_batch_size=32,
        vae_epochs=12, vae_lr=1e-3, hidden_size=32, num_mixtures=3, sequence_length=24, model_batch_size=16,
        model_updates=3000, model_lr=3e-3, model_lr_decay=0.999, temperature=1.0, population=24, episodes=8,
        generations=40, sigma=0.3, eval_frequency=1, eval_generations=20, eval_episodes=20, checkpoint_frequency=0,
    )  # fmt: skip
    tags = scalars(run_dir)
    real, dreamed = (tags[f"{name}/episodic_return"][-1][1] for name in ("eval", "dream"))
    print(f"dream {dreamed:.1f}, real {real:.1f}")
    assert real > -20 and abs(real - dreamed) < 10
    assert "NOT like" not in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_muzero_learns_cartpole(muzero, seed):
    """The default command: at least 475 over 100 episodes, and 20K steps later still."""
    run_dir = muzero.main(muzero.Args(cuda=False, seed=seed, eval_episodes=100, eval_frequency=20_000))
    evaluations = [value for _, value in scalars(run_dir)["eval/episodic_return"]]
    print(f"evaluation returns {evaluations}")
    assert min(evaluations[-2:]) >= 475


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
