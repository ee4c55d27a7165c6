"""What the tests of whole runs share: tiny settings of each script, running, resuming, reading what a run left."""

import dataclasses
import math
import multiprocessing
import multiprocessing.connection
import multiprocessing.context
import multiprocessing.forkserver
import os
import random
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numba
import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

ROOT = Path(__file__).parent.parent


SCRIPTS = ["dyna_q", "mbpo", "dhmbpo", "world_models", "dreamer", "dreamer_v3", "muzero"]


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
    "dreamer_v3": {
        "env_id": "fake_envs:DiscreteCounter-v0",
        "cuda": False,
        "total_timesteps": 48,
        "eval_frequency": 0,
        "eval_episodes": 2,
        "checkpoint_frequency": 24,
        "size": "laptop",
        "learning_starts": 12,
        "train_ratio": 4.0,
        "batch_size": 2,
        "batch_length": 6,
        "buffer_size": 200,
        "horizon": 3,
        "warmup": 1,
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
    "dhmbpo": {
        "env_id": "fake_envs:Point-v0",
        "cuda": False,
        "total_timesteps": 48,
        "eval_frequency": 0,
        "eval_episodes": 2,
        "checkpoint_frequency": 24,
        "buffer_size": 200,
        "learning_starts": 24,
        "model_train_frequency": 12,
        "num_nets": 4,
        "model_hidden_size": 8,
        "hidden_size": 8,
        "model_batch_size": 16,
        "batch_size": 8,
        "critic_warmup": 2,
        "first_block": 2,
        "rollout_length": 3,
        "rollout_frequency": 2,
        "rollout_retain": 2,
        "model_patience": 1.0,
        "model_max_epochs": 3.0,
        "holdout_ratio": 0.5,
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
        "fixed": "batch_size",  # one of the settings that a resume may not change
    },
    "dreamer_v3": {
        "quick": {},
        "two": TWO_ENVS,
        "workers": True,
        "kills": 4,
        "fixed": "batch_size",
    },
    "dyna_q": {
        "quick": {},
        "two": TWO_ENVS,
        "workers": False,
        "kills": 4,
        "fixed": "planning_steps",
    },
    "mbpo": {
        "quick": {},
        "two": TWO_ENVS,
        "workers": True,
        "kills": 4,
        "fixed": "batch_size",
    },
    "dhmbpo": {
        "quick": {},
        "two": TWO_ENVS,
        "workers": True,
        "kills": 4,
        "fixed": "batch_size",
    },
    "muzero": {
        "quick": {},
        "two": TWO_ENVS,
        "workers": False,
        "kills": 4,
        "fixed": "batch_size",
    },
    "world_models": {
        "quick": {},
        "two": TWO_ENVS,
        "workers": True,
        "kills": 4,
        "fixed": "vae_batch_size",
    },
}


WRITERS: list[SummaryWriter] = []


def close_writers() -> None:
    """While the folder that their paths are relative to is still the current one."""
    while WRITERS:
        WRITERS.pop().close()


def each(cases: dict[str, dict]) -> pytest.MarkDecorator:
    """Parametrizes a test that takes `name` and `kind` over {script: {kind: ...}}."""
    return pytest.mark.parametrize(("name", "kind"), [(name, kind) for name in SCRIPTS for kind in cases[name]])


def only(*names: str) -> pytest.MarkDecorator:
    """Makes a test that takes `script` for these alone."""
    return pytest.mark.parametrize("script", names, indirect=True)


def without(*names: str) -> pytest.MarkDecorator:
    """Makes a test that takes `script` for all others."""
    return only(*(name for name in SCRIPTS if name not in names))


def having(text: str) -> pytest.MarkDecorator:
    """Makes a test that takes `script` for those in whose text this stands."""
    return only(*(name for name in SCRIPTS if text in (ROOT / f"{name}.py").read_text()))


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


FINISHED: dict[str, str] = {}  # the runs that `finished` has made


def finished(script, **changes) -> str:
    """A copy of what `run` leaves, which is made once: for tests that look at what comes after it."""
    key = f"{script.__name__} {sorted(changes.items())}"
    if key not in FINISHED:
        FINISHED[key] = shutil.copytree(run(script, **changes), Path(tempfile.mkdtemp(), "run"))
    return shutil.copytree(FINISHED[key], Path.cwd() / f"finished_{len(os.listdir())}" / "runs" / "run").as_posix()


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


class Started:
    """`python script.py flags` in a process and a session of its own, in the folder where it was begun.

    It is forked from a process that has imported the packages already (conftest.py), so are its workers if `own_server`
    does not ask for a fork server of its own; numba's functions run as Python, alarms come ten times as early: all that
    takes seconds each time. What it says goes into files beside the folder, but for what workers say on their way in.
    """

    count = 0

    def __init__(self, script, *flags: str, own_server: bool = False):
        Started.count += 1
        self.streams = [f"{os.getcwd()}.{Started.count}.{name}" for name in ("out", "err")]
        path = str(ROOT / f"{script.__name__}.py")
        context = multiprocessing.get_context("forkserver")
        self.process = context.Process(target=be_a_script, args=([path, *flags], self.streams, own_server))
        self.process.start()
        self.pid = self.process.pid

    def said(self) -> tuple[str, str]:
        """Standard output and error so far."""
        return tuple(Path(name).read_text() if os.path.exists(name) else "" for name in self.streams)

    def wait_for(self, text: str) -> None:
        """Until standard output or error has this text."""
        wait_for(lambda: text in "".join(self.said()) or not self.process.is_alive())
        assert text in "".join(self.said()), self.said()

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def communicate(self, timeout: float = 60) -> tuple[str, str]:
        """Waits for the end; what was said."""
        self.process.join(timeout)
        if self.process.is_alive():
            self.process.kill()
            raise TimeoutError(f"still running: {self.said()}")
        return self.said()

    @property
    def returncode(self) -> int | None:
        return self.process.exitcode


def be_a_script(argv: list[str], streams: list[str], own_server: bool) -> None:
    """Body of the process of Started: what the interpreter does with a script."""
    os.setsid()
    hear_signals()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    say_into(streams)
    tests = [multiprocessing.parent_process().sentinel]
    threading.Thread(target=lambda: (multiprocessing.connection.wait(tests), os._exit(1)), daemon=True).start()
    if not own_server:
        multiprocessing.forkserver.ensure_running = multiprocessing.forkserver._forkserver.ensure_running = lambda: None
        multiprocessing.context.ForkServerContext.Process, Worker.streams = Worker, streams
    numba.config.DISABLE_JIT = True
    be_impatient()
    sys.argv = argv
    try:
        runpy.run_path(argv[0], run_name="__main__")
    except Exception:
        sys.excepthook(*sys.exc_info())
        sys.exit(1)


class Worker(multiprocessing.context.ForkServerProcess):
    """A worker that comes from the tests' fork server; a script's own would hand it streams and environment."""

    streams: list[str]

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.inherited = self.streams, dict(os.environ)

    def run(self) -> None:
        streams, environ = self.inherited
        say_into(streams)
        os.environ.update(environ)
        be_impatient()
        super().run()


def be_impatient() -> None:
    """Alarms come ten times as early; what is left of one is told in the script's own seconds."""
    wait = signal.setitimer
    signal.setitimer = lambda which, *seconds: tuple(10 * left for left in wait(which, *(s / 10 for s in seconds)))


def say_into(streams: list[str]) -> None:
    """Standard output and error go into these files from now on, behind what is there."""
    for stream, name in zip((sys.stdout, sys.stderr), streams, strict=True):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream.fileno())


def start(script, *flags: str) -> subprocess.Popen:
    """The same from nothing, with pipes: for what happens while packages are imported, and after the last line."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    return subprocess.Popen(
        [sys.executable, str(ROOT / f"{script.__name__}.py"), *flags],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        env=os.environ | {"PYTHONPATH": paths, "NUMBA_DISABLE_JIT": "1"}, preexec_fn=hear_signals,
    )  # fmt: skip


def hear_signals() -> None:
    """Signals that the tests themselves were started to ignore (nohup) are not ignored by what they start."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


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


LAKE = {"env_id": "FrozenLake-v1"}


def model_of(dyna_q, run_dir: str):
    return dyna_q.load_model(load(run_dir)["parts"]["replay"])
