"""What goes wrong around a run: bad numbers of an environment, second processes, hangups, closed pipes, full disks."""

import contextlib
import ctypes.util
import dataclasses
import fcntl
import functools
import importlib
import itertools
import math
import os
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
from fake_envs import FAULTS
from runs import (
    ROOT,
    SCRIPTS,
    TINY,
    TRAITS,
    Started,
    close_writers,
    command_line,
    differences,
    error_of,
    finished,
    flags_of,
    having,
    load,
    not_finite,
    only,
    processes_in,
    resume,
    run,
    scalars,
    start,
    tiny,
    wait_for,
    without,
)

UNKNOWN = ["/agent/bounds"]  # what may be not finite: dhmbpo.py's bounds of values, before the first block

# === Environments that misbehave ===


def faulty(script, fault: str) -> str:
    """The id of the tiny environment of a script with a fault."""
    return TINY[script.__name__]["env_id"].replace(":", f":Faulty{fault.title().replace(' ', '')}")


def fault_of(capsys, script, folder: str) -> str:
    """The one line in which a run ended, whose checkpoint resumes and is finite."""
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert len(lines) == 1 and "Traceback" not in lines[0], lines
    assert set(not_finite(load(folder)["parts"])) <= set(UNKNOWN)
    return lines[0]


SAID = [name for name, said in FAULTS.items() if said and name not in ("die", "old reset")]
ONE_OR_FOUR = pytest.mark.parametrize("num_envs", [1, pytest.param(4, marks=pytest.mark.slow)])
WITH_WORKERS = [name for name in SCRIPTS if TRAITS[name]["workers"]]
ONE_OR_SEVERAL = [(name, num_envs) for name in SCRIPTS for num_envs in (1, 4) if num_envs == 1 or name in WITH_WORKERS]
ONCE = pytest.mark.stands_for_all("muzero")  # CheckedEnv is one text: for the other scripts two kinds are enough
SAID = [name if name in ("raise", "nan", "exit") else pytest.param(name, marks=ONCE) for name in SAID]


@pytest.mark.parametrize("fault", SAID)
def test_a_fault_of_an_environment_is_a_line_and_the_run_is_saved(script, fault, capsys):
    """At step 31: what was before it is in the checkpoint, exit code 1."""
    env_id = faulty(script, fault)
    with pytest.raises(SystemExit) as stopped:
        run(script, env_id=env_id, total_timesteps=240)
    folder = str(next(Path.cwd().glob("run_0/runs/*")))
    line = fault_of(capsys, script, folder)
    assert stopped.value.code == 1 and FAULTS[fault] in line and f"{env_id}: step 31: " in line and "\n" not in line
    assert load(folder)["global_step"] >= 30 and f"checkpoint at step {load(folder)['global_step']}" in line
    with pytest.raises(SystemExit):  # 30 healthy steps of the new environment, then again
        resume(script, folder, env_id=env_id, total_timesteps=240)
    assert load(folder)["global_step"] >= 60


@pytest.mark.parametrize("fault", [name for name, said in FAULTS.items() if said and name != "die"])
def test_a_fault_at_the_first_step_is_refused_before_there_is_a_folder(script, fault, capsys):
    """Exit code 2, one line."""
    line = error_of(capsys, run, script, env_id=faulty(script, "early " + fault))
    assert FAULTS[fault] in line and not list(Path.cwd().glob("run_0/runs/*"))


@pytest.mark.stands_for_all("dyna_q", "muzero")
@pytest.mark.parametrize("num_envs", [1, 4])
@pytest.mark.parametrize("when", [pytest.param("in the prefill", marks=pytest.mark.slow), "long after it"])
def test_a_fault_between_checkpoints(script, when, num_envs, capsys):
    """NaN among the random steps, or at step 900: no checkpoint holds it, and the last one resumes."""
    fault, last_good = {1: ("late nan", 900), 4: ("quarter nan", 225)}[num_envs]
    settings = {"checkpoint_frequency": 100, "buffer_size": 2000, "num_envs": num_envs}
    if when == "in the prefill":
        (fault, last_good), settings["learning_starts"] = ("nan", 30), 32 * num_envs
    settings = {name: value for name, value in settings.items() if hasattr(script.Args, name)}
    settings["env_id"] = faulty(script, fault)
    with pytest.raises(SystemExit):
        run(script, **settings, total_timesteps=10**4)
    folder = str(next(Path.cwd().glob("run_0/runs/*")))
    line, step = fault_of(capsys, script, folder), load(folder)["global_step"]
    assert f"step {last_good + 1}: " in line and num_envs * last_good - 10 <= step <= num_envs * last_good
    resume(script, folder, **settings, total_timesteps=step + 24 * num_envs)
    assert load(folder)["global_step"] == step + 24 * num_envs


@pytest.mark.parametrize("fault", ["array", "options", pytest.param("close raises", marks=ONCE)])
def test_what_is_no_fault(script, fault):
    """Rewards of one element, an `episode` of the environment's own in info; options are None where there are none."""
    folder, plain = run(script, env_id=faulty(script, fault)), finished(script)
    assert differences(load(folder)["parts"], load(plain)["parts"]) == []


@without("muzero")
def test_action_masks_that_are_not_obeyed_are_named(script, capsys):
    """Only muzero.py obeys them."""
    run(script, env_id=faulty(script, "mask"))
    assert capsys.readouterr().err.count("action masks, which this script does not obey") == 1


@only(*WITH_WORKERS)
@pytest.mark.stands_for_all("mbpo")
@pytest.mark.parametrize("fault", ["die", "exit", pytest.param("nan", marks=pytest.mark.slow)])  # told as exit is
def test_a_fault_in_a_worker_process(script, fault):
    """One line, exit code 1, saved, and no process is left."""
    flags = flags_of(tiny(script, env_id=faulty(script, fault), num_envs=4, total_timesteps=10**6))
    process = Started(script, *flags)
    _, err = process.communicate()
    lines = [line for line in err.splitlines() if line.startswith("error")]
    assert process.returncode == 1 and len(lines) == 1 and FAULTS[fault] in lines[0] and "Traceback" not in err, err
    assert load(str(next(Path("runs").iterdir())))["global_step"] > 0
    wait_for(lambda: not processes_in(str(Path.cwd())))


HANGS = [("hang", 1, signal.SIGTERM), ("hang", 4, signal.SIGTERM), ("deaf", 4, signal.SIGTERM)]
HANGS += [("hang", 4, signal.SIGKILL), ("deaf", 4, signal.SIGKILL)]
HANGS = [(name, *hang) for name, num_envs in ONE_OR_SEVERAL for hang in HANGS if hang[1] == num_envs]


@pytest.mark.stands_for_all("dyna_q", "mbpo")
@pytest.mark.parametrize(("script", "fault", "num_envs", "number"), HANGS, indirect=["script"])
def test_an_environment_that_hangs_holds_nothing(script, fault, num_envs, number):
    """Five seconds (here: half of one) after a request the run is saved and ends; no process is left, after a kill
    neither: also where a worker hangs in foreign code, which hears no signal."""
    settings = {"env_id": faulty(script, fault), "num_envs": num_envs, "total_timesteps": 10**6}
    own_server = (fault, number) == ("hang", signal.SIGKILL)  # which is to end with the run, too
    process = Started(script, *flags_of(tiny(script, **settings)), own_server=own_server)
    wait_for(Path("hanging").exists)
    process.send_signal(number)
    _, err = process.communicate(timeout=30)
    assert process.returncode == (128 + number if number == signal.SIGTERM else -number), err
    assert "Traceback" not in err and (number == signal.SIGKILL or "does not return" in err)
    wait_for(lambda: not processes_in(str(Path.cwd())))


def test_an_alarm_leaves_steps_and_resets_alone(script):
    """Not what makes or closes environments, which may take their time."""
    path = gym.vector.sync_vector_env.__file__
    for name in ("reset", "step", "step_async", "reset_wait", "__init__", "close"):
        found = {}
        exec(compile(f"def {name}(call): call()", path, "exec"), found)
        alarm = functools.partial(script.StopRequest.give_up, None, signal.SIGALRM)
        if name in ("__init__", "close"):
            found[name](lambda alarm=alarm: alarm(sys._getframe()))
        else:
            with pytest.raises(TimeoutError, match="does not return"):
                found[name](lambda alarm=alarm: alarm(sys._getframe()))


@without("world_models")  # which makes environments for an evaluation only to film it
@pytest.mark.parametrize("fault", ["raises", "is refused"])
def test_an_evaluation_whose_environments_cannot_be_made(script, monkeypatch, capsys, fault):
    """Ends the run like a fault of theirs: exit code 1, and what was before it is saved."""
    make, calls = script.make_vector_env, []

    def failing(*args, **kwargs):
        calls.append(args)
        if len(calls) > 2:  # to rehearse, to train, to evaluate
            raise RuntimeError("no room") if fault == "raises" else script.fail("no display")
        return make(*args, **kwargs)

    monkeypatch.setattr(script, "make_vector_env", failing)
    with pytest.raises(SystemExit) as stopped:
        run(script, eval_frequency=12, checkpoint_frequency=0, total_timesteps=48)
    err, folder = capsys.readouterr().err, str(next(Path.cwd().glob("run_0/runs/*")))
    step, reason = load(folder)["global_step"], ": RuntimeError: no room" if fault == "raises" else ""
    assert stopped.value.code == 1 and step >= 12
    line = f"of an evaluation (--eval-frequency 0 makes none){reason}; checkpoint at step {step}"
    assert err.splitlines()[-1].endswith(line) and ("error: no display" in err) == (fault != "raises")


@pytest.mark.parametrize("alive", [True, False])
def test_a_worker_of_a_run_that_is_gone_ends_at_once(alive, monkeypatch):
    """The kernel tells it when the pipe closes, not that it was closed before."""
    mbpo, (reader, writer), ended = importlib.import_module("mbpo"), os.pipe(), []
    monkeypatch.setattr(mbpo.multiprocessing, "parent_process", lambda: types.SimpleNamespace(sentinel=reader))
    monkeypatch.setattr(mbpo.os, "setsid", lambda: None)
    monkeypatch.setattr(mbpo.os, "_exit", ended.append)
    if not alive:
        os.close(writer)
    mbpo.be_a_worker()
    assert ended == [] if alive else ended == [1]
    fcntl.fcntl(reader, fcntl.F_SETFL, 0)  # this process is not to end with it
    os.close(reader)
    if alive:
        os.close(writer)


@pytest.mark.stands_for_all("mbpo")
@pytest.mark.parametrize("former", [OSError("No space left"), ValueError("of the environment")])
def test_what_cannot_be_written_says_why(script, former, monkeypatch):
    """Torch puts a full disk behind an error of its own; a fault that is being handled is not the reason."""

    def save(state, file):
        try:
            raise former
        except Exception:
            raise RuntimeError("enforce fail")  # noqa: B904

    monkeypatch.setattr(script.torch, "save", save)
    with pytest.raises(SystemExit) as stopped:
        script.write_file("checkpoint.pt", {})
    assert str(stopped.value).endswith("No space left" if isinstance(former, OSError) else "enforce fail")
    assert os.listdir() == []


@pytest.mark.stands_for_all("dyna_q", "mbpo")
@pytest.mark.parametrize(("script", "num_envs"), ONE_OR_SEVERAL, indirect=["script"])
def test_an_environment_that_hangs_in_close_holds_nothing(script, num_envs):
    """The run ends as any other, with a warning; no process is left."""
    process = Started(script, *flags_of(tiny(script, env_id=faulty(script, "early close"), num_envs=num_envs)))
    out, err = process.communicate()
    assert process.returncode == 0 and "continue with" in out and "warning: close failed" in err, err
    wait_for(lambda: not processes_in(str(Path.cwd())))


@pytest.mark.stands_for_all("dyna_q", "mbpo")
def test_a_picture_that_an_environment_cannot_draw(script, capsys, monkeypatch):
    """At the start: why, in one line, and no run. Later: a warning, and the run goes on."""
    pytest.importorskip("moviepy", reason="moviepy is not installed.")
    films = {"capture_video": True, "eval_frequency": 24, "total_timesteps": 24, "eval_episodes": 4, "num_envs": 1}
    with pytest.raises(SystemExit) as stopped:
        run(script, env_id=faulty(script, "early render"), **films)
    warning, error = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2 and "no light" in warning and error.startswith("error: a film could not be written")
    assert not list(Path.cwd().glob("run_0/runs/*"))
    monkeypatch.setattr(script, "rehearse", lambda *args, **kwargs: None)
    folder = run(script, env_id=faulty(script, "early render"), **films)
    assert load(folder)["global_step"] == 24 and "no light" in capsys.readouterr().err


GAMES = {"mbpo": {}, "dhmbpo": {}, "dreamer": {}, "dreamer_v3": {}, "muzero": {}, "world_models": {"render_obs": True}}


@pytest.mark.stands_for_all("dreamer")
@pytest.mark.skipif(ctypes.util.find_library("EGL") is None, reason="There is no OpenGL library (EGL) on this machine.")
@pytest.mark.parametrize("name", GAMES)
@pytest.mark.parametrize("chosen", [pytest.param(None, marks=pytest.mark.slow), "egl"])
def test_mujoco_is_filmed_where_opengl_is(name, chosen, monkeypatch):
    """Gymnasium's tasks, without a display: OpenGL is chosen before the first environment, or by the user."""
    monkeypatch.setenv("MUJOCO_GL", chosen) if chosen else monkeypatch.delenv("MUJOCO_GL", raising=False)
    settings = {"env_id": "InvertedPendulum-v5", "total_timesteps": 24, "eval_frequency": 24, "eval_episodes": 1}
    script = importlib.import_module(name)
    process = start(script, *flags_of(tiny(script, capture_video=True, **settings, **GAMES[name])))
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0 and list(Path("runs").glob("*/videos/*.mp4")), err


# === One process for each run folder ===


@pytest.mark.stands_for_all("dyna_q", "mbpo")
@ONE_OR_FOUR
def test_a_second_process_is_turned_away(script, num_envs):
    """One line, exit code 2, and the first run notices nothing."""
    settings = {"num_envs": num_envs, "checkpoint_frequency": 12}
    first = Started(script, *flags_of(tiny(script, total_timesteps=10**6, **settings)))
    wait_for(lambda: list(Path("runs").glob("*/checkpoint.pt")))
    run_dir = str(next(Path("runs").iterdir()))
    second = Started(script, "--resume", run_dir)
    _, err = second.communicate()
    assert second.returncode == 2 and err.strip().splitlines() == [f"error: another process works on {run_dir}"]
    assert first.returncode is None
    first.send_signal(signal.SIGTERM)
    _, err = first.communicate()
    assert first.returncode == 128 + signal.SIGTERM and "Traceback" not in err
    step = load(run_dir)["global_step"]
    assert load(resume(script, run_dir, total_timesteps=step + 12, **settings))["global_step"] >= step + 12


def test_runs_of_one_second_have_folders_of_their_own(script, monkeypatch):
    """The name of each later one is longer by a sign."""
    monkeypatch.setattr(time, "time", lambda: 1e9)
    folders = [script.new_folder(tiny(script)) for _ in range(3)]
    assert [folder.rpartition("__")[2] for folder in folders] == ["1000000000", "1000000000+", "1000000000++"]


def test_numbers_of_every_width_are_looked_at(script):
    """But bytes, which are finite, such as pictures."""
    for kind in ("float32", "float64"):
        for absurd in (math.nan, math.inf):
            with pytest.raises(ValueError, match="x is not finite"):
                script.finite("x", np.array([0, absurd], kind), (2,))
    with pytest.raises(ValueError, match="absurd"):
        script.finite("x", np.array([0, 2**40]), (2,))
    for kind in ("uint8", "int8", "bool", "float32"):
        values = np.ones((2, 2), kind)
        assert np.array_equal(script.finite("x", values, (2, 2)), values)


def test_names_of_run_folders_suit_every_file_system(script):
    """No colon of a module, no slash, no blank."""
    folder = script.new_folder(tiny(script, exp_name="a.b-c_1"))
    assert os.path.dirname(folder) == "runs" and set(os.path.basename(folder)) & set(" :/\\") == set()


# === Requests to stop ===


@pytest.mark.stands_for_all("dyna_q", "mbpo")
@ONE_OR_FOUR
@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGUSR1])
def test_hangups_and_warnings_of_schedulers_save(script, number, num_envs):
    """Like SIGTERM."""
    settings = {"num_envs": num_envs, "total_timesteps": 10**6, "checkpoint_frequency": 0}
    process = Started(script, *flags_of(tiny(script, **settings)))
    process.wait_for("episodic_return")
    process.send_signal(number)
    _, err = process.communicate()
    assert process.returncode == 128 + number and "Traceback" not in err
    assert load(str(next(Path("runs").iterdir())))["global_step"] >= 12


@pytest.mark.stands_for_all("dyna_q")
@pytest.mark.parametrize("streams", ["2>err", "2>&1"])
def test_a_closed_pipe_saves(script, streams):
    """`python script.py | head -2`, with and without the progress bar in the pipe."""
    flags = " ".join(flags_of(tiny(script, total_timesteps=10**6, checkpoint_frequency=0)))
    command = f"{sys.executable} {ROOT}/{script.__name__}.py {flags} {streams} | head -2; exit ${{PIPESTATUS[0]}}"
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]), "NUMBA_DISABLE_JIT": "1"}
    done = subprocess.run(["bash", "-c", command], env=env, capture_output=True, text=True, timeout=120)
    said = Path("err").read_text() if streams == "2>err" else done.stderr
    assert done.returncode == 128 + signal.SIGPIPE and "Traceback" not in said
    assert load(str(next(Path("runs").iterdir())))["global_step"] >= 12


def test_nohup_is_respected(script):
    """Where the hangup is ignored on purpose it stays so."""
    previous = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    stop = script.StopRequest()
    try:
        os.kill(os.getpid(), signal.SIGHUP)
        assert stop.requested == 0
        os.kill(os.getpid(), signal.SIGUSR1)
        assert stop.requested == signal.SIGUSR1
    finally:
        with pytest.raises(SystemExit):
            stop.exit()
        signal.signal(signal.SIGHUP, previous)


# === Resuming ===


@pytest.mark.parametrize("name", ["resume", "evaluate"])
def test_an_empty_folder_is_no_folder(script, monkeypatch, capsys, name):
    """`--resume "$RUN"` with RUN unset must not begin another run."""
    monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", f"--{name}", ""])
    assert "no readable checkpoint" in error_of(capsys, script.parse_args)


def test_the_checkpoint_names_its_folder(script, monkeypatch):
    """A shell completes runs/.../checkpoint.pt."""
    folder = finished(script)
    monkeypatch.setattr(sys, "argv", ["x", "--resume", f"{folder}/checkpoint.pt", "--total-timesteps", "60"])
    assert script.main(script.parse_args()) == folder and load(folder)["global_step"] == 60


def test_a_replaced_checkpoint_leaves_the_disk(script, monkeypatch):
    """A resumed run holds no file that has been deleted."""
    folder, seen = finished(script), []
    save, name = script.save_checkpoint, f"{folder}/checkpoint.pt (deleted)"
    looks = lambda *args: (save(*args), seen.append(name in Path("/proc/self/maps").read_text()))  # noqa: E731
    monkeypatch.setattr(script, "save_checkpoint", looks)
    resume(script, folder, total_timesteps=96)
    assert len(seen) >= 2 and not seen[-1]


def test_what_touches_no_learning_may_change(script):
    """Films, weights, evaluation, names."""
    folder = finished(script)
    changes = {"save_model": True, "eval_episodes": 1, "exp_name": "other", "eval_frequency": 12}
    resume(script, folder, total_timesteps=60, **changes)
    assert load(folder)["global_step"] == 60 and Path(folder, "other.pt").exists()


# === Checkpoints and pictures ===


def test_the_checkpoint_comes_before_the_evaluation(script, monkeypatch):
    """Where both are due, an evaluation that fails costs nothing."""

    def fail(*args, **kwargs):
        raise RuntimeError("the evaluation failed")

    by_generation = script.__name__ == "world_models"
    monkeypatch.setattr(script, "log_scores" if by_generation else "evaluate", fail)
    with pytest.raises(RuntimeError, match="the evaluation failed"):
        run(script, eval_frequency=1 if by_generation else 24, checkpoint_frequency=24)
    folder = str(next(Path.cwd().glob("run_0/runs/*/c" if by_generation else "run_0/runs/*")))
    state = load(folder)
    assert state["parts"]["counters"]["units_done"] == 1 if by_generation else state["global_step"] == 24
    if by_generation:
        return
    none = shutil.copytree(folder, "none")  # where evaluations fail a run may go on without
    resume(script, none, eval_frequency=0, checkpoint_frequency=24, total_timesteps=36)
    assert load(none)["global_step"] == 36
    monkeypatch.undo()  # and it is made by the resume
    before = Path(folder, "checkpoint.pt").read_bytes()
    for total in (36, 48):  # a kill after the evaluation: the checkpoint is still the one from before it
        Path(folder, "checkpoint.pt").write_bytes(before)
        resume(script, folder, eval_frequency=24, checkpoint_frequency=24, total_timesteps=total)
    assert [step for step, _ in scalars(folder)["eval/episodic_return"]] == [24, 48]


def test_a_picture_that_fails_is_a_line(script, capsys):
    """And not the end of the run."""

    def draw():
        raise ValueError("no ink")

    script.warn_of_failure(draw)
    assert capsys.readouterr().err == "warning: draw failed: ValueError: no ink\n"


def test_half_a_checkpoint_is_not_left_behind(script, monkeypatch):
    """A write that failed removes its temporary file."""
    folder = finished(script)

    def full(state, file):
        file.write(b"x" * 1000)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(script.torch, "save", full)
    with pytest.raises(SystemExit, match="No space"):
        resume(script, folder, total_timesteps=60)
    assert not list(Path(folder).glob("*.tmp"))


@pytest.mark.parametrize("name", ["checkpoint", "a/b", ""])
def test_names_of_experiments_that_no_file_can_have(script, capsys, name):
    """They would overwrite the checkpoint, or fail after the training."""
    assert "--exp-name" in error_of(capsys, script.main, tiny(script, exp_name=name, save_model=True))
    assert os.listdir() == []


def test_a_checkpoint_that_was_replaced_meanwhile_is_not_continued(script, monkeypatch, capsys):
    """Between its reading and the lock another process may have finished: its work must not be undone."""
    folder = finished(script)
    load_checkpoint = script.load_checkpoint

    def load_and_replace(*args, **kwargs):
        state = load_checkpoint(*args, **kwargs)
        newer = Path(folder, "newer.pt")
        newer.write_bytes(Path(folder, "checkpoint.pt").read_bytes())
        newer.replace(Path(folder, "checkpoint.pt"))
        return state

    monkeypatch.setattr(script, "load_checkpoint", load_and_replace)
    assert "has gone on meanwhile" in error_of(capsys, resume, script, folder, total_timesteps=60)


# === Continuing what there is ===


@pytest.mark.stands_for_all("dyna_q", "muzero", "world_models")
def test_resume_auto_continues_the_newest_run_of_its_kind(script, monkeypatch):
    """The same script, task and seed; where there is none, a run begins."""
    flags = flags_of(tiny(script, total_timesteps=24))
    first = command_line_of(script, monkeypatch, *flags, "--resume", "auto")
    again = command_line_of(script, monkeypatch, *flags, "--resume", "auto", "--total-timesteps", "36")
    assert again == first and load(first)["global_step"] == 36
    other = command_line_of(script, monkeypatch, *flags, "--resume", "auto", "--seed", "2")
    assert other != first and load(other)["global_step"] == 24
    newest = command_line_of(script, monkeypatch, *flags)
    os.utime(f"{newest}/checkpoint.pt", (2e9, 2e9))
    assert command_line_of(script, monkeypatch, *flags, "--resume", "auto", "--total-timesteps", "36") == newest
    assert len(os.listdir("runs")) == 3 and load(other)["global_step"] == 24


def command_line_of(script, monkeypatch, *flags: str) -> str:
    """The run folder of `python script.py flags`."""
    monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *flags])
    return script.main(script.parse_args())


@without("world_models")  # which evaluates by generations
@pytest.mark.parametrize("eval_frequency, made", [pytest.param(12, False, marks=ONCE), (24, False), (24, True)])
def test_an_evaluation_that_was_due_is_made_after_the_resume(script, monkeypatch, eval_frequency, made):
    """Asked to stop at the step of an evaluation, the run leaves it to the one that continues it; and only then.

    One that stands in evaluations.csv was made before a kill: the checkpoint of its step does not know of it.
    """
    evaluate, stopped = script.evaluate, []

    def interrupted(*args):
        if not stopped:
            stopped.append(os.kill(os.getpid(), signal.SIGUSR1))
        return evaluate(*args)

    monkeypatch.setattr(script, "evaluate", interrupted)
    with pytest.raises(SystemExit):
        run(script, eval_frequency=eval_frequency, total_timesteps=48)
    folder = str(next(Path.cwd().glob("run_0/runs/*")))
    assert load(folder)["global_step"] == eval_frequency and load(folder)["parts"]["eval_owed"]
    listed = Path(folder, "evaluations.csv")
    if made:
        listed.write_text(f"step,return,std\n{eval_frequency},1,2\n")
    resume(script, folder, eval_frequency=eval_frequency, total_timesteps=48)
    wanted, logged = list(range(eval_frequency, 49, eval_frequency)), scalars(folder)
    assert [step for step, _ in logged["eval/episodic_return"]] == wanted[made:]
    assert not load(folder)["parts"]["eval_owed"]
    means, stds = (dict(logged[f"eval/{name}"]) for name in ("episodic_return", "episodic_return_std"))
    rows = {int(step): values for step, *values in np.loadtxt(listed, delimiter=",", skiprows=1, ndmin=2)}
    assert list(rows) == wanted and rows.pop(made and eval_frequency, [1, 2]) == [1, 2]
    assert rows == {step: pytest.approx([means[step], stds[step]], rel=1e-5) for step in means}


def test_the_list_of_evaluations_outlives_faults(script, tmp_path):
    """A full disk cuts a row, a kill makes an evaluation again: the whole rows count, the later of a step."""
    run = types.SimpleNamespace(folder=str(tmp_path))
    assert script.Run.evaluations(run) == {}
    (tmp_path / "evaluations.csv").write_text("step,return,std\n10,1.5,0.5\n20,2,1\n30,3,126,9,9\n20,-1e+06,nan\n40,7")
    assert str(script.Run.evaluations(run)) == "{10: (1.5, 0.5), 20: (-1000000.0, nan)}"


@pytest.mark.parametrize("interrupted", [False, True])
def test_an_evaluation_that_was_interrupted_says_no_return(script, monkeypatch, capsys, interrupted):
    """Short episodes end first: the mean of some is not that of all."""
    folder, evaluate = finished(script), "real_and_dream_scores" if script.__name__ == "world_models" else "evaluate"
    played = getattr(script, evaluate)

    def stopped(*args, **kwargs):
        found = played(*args, **kwargs)
        os.kill(os.getpid(), signal.SIGUSR1)
        return found

    if interrupted:
        monkeypatch.setattr(script, evaluate, stopped)
    with pytest.raises(SystemExit) if interrupted else contextlib.nullcontext():
        command_line(monkeypatch, script, "--evaluate", folder)
    assert ("return " in capsys.readouterr().out) != interrupted


# === What is said in one line ===


def test_files_that_fail_are_one_line(script, capsys):
    """In the main thread and in others; a mistake in the code keeps its traceback."""

    def raised(error) -> str:
        try:
            raise error
        except BaseException as caught:
            script.print_exception(type(caught), caught, caught.__traceback__)
        return capsys.readouterr().err

    disk = raised(OSError(28, "No space left on device"))
    assert disk == "\nerror: OSError: [Errno 28] No space left on device; the last checkpoint stays as it is\n"
    assert "DefaultCPUAllocator" in raised(RuntimeError("DefaultCPUAllocator: can't allocate memory")).splitlines()[1]
    assert raised(ValueError("a mistake")).startswith("Traceback")


@pytest.mark.stands_for_all("dyna_q", "mbpo")
def test_a_folder_that_is_removed_is_one_line(script):
    """While the run writes into it, threads of TensorBoard too."""
    process = Started(script, *flags_of(tiny(script, total_timesteps=10**6, checkpoint_frequency=12)))
    wait_for(lambda: list(Path("runs").glob("*/checkpoint.pt")))
    Path("runs").rename("gone")
    _, err = process.communicate()
    assert process.returncode == 1 and "Traceback" not in err
    assert err.count("error: ") == 1, err


@pytest.mark.stands_for_all("dyna_q")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_during_the_imports_leaves_nothing(script, number):
    """No traceback, no folder."""
    process = start(script, *flags_of(tiny(script)))
    wait_for(lambda: "numpy" in Path(f"/proc/{process.pid}/maps").read_text())
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    assert process.returncode in (-number, 128 + number) and (out, err) == ("", "") and os.listdir() == []


@pytest.mark.stands_for_all("dyna_q", "mbpo")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_before_there_is_a_run_leaves_nothing(script, number):
    """While packages are imported and environments made: no traceback, no folder."""
    process = Started(script, *flags_of(tiny(script, env_id=slow_of(script))))
    wait_for(Path("making").exists)
    process.send_signal(number)
    _, err = process.communicate(timeout=30)
    assert process.returncode in (-number, 128 + number) and "Traceback" not in err, err
    assert os.listdir() == ["making"]


def slow_of(script) -> str:
    """The tiny environment of a script, which takes an hour to be made."""
    return TINY[script.__name__]["env_id"].replace(":", ":Slow")


def test_a_package_that_is_missing_is_named_before_there_is_a_folder(script, monkeypatch, capsys):
    """Those that are imported where they are used, and those of a flag."""
    for name in [*script.LATE_IMPORTS, "moviepy"]:
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, name, None)
            line = error_of(capsys, script.main, tiny(script, capture_video=name == "moviepy"))
        assert f"pip install {'pillow' if name == 'PIL' else name}" in line and os.listdir() == []


@pytest.mark.stands_for_all("dyna_q")
def test_a_package_that_is_broken_is_named(script, monkeypatch, capsys):
    """What is installed may still fail to be imported."""
    Path("moviepy.py").write_text("raise ImportError('a library of another version')")
    monkeypatch.syspath_prepend(os.getcwd())
    for name in [name for name in sys.modules if name.split(".")[0] == "moviepy"]:
        monkeypatch.delitem(sys.modules, name)
    line = error_of(capsys, script.main, tiny(script, capture_video=True))
    assert "(ImportError: a library of another version): pip install moviepy" in line and not Path("runs").exists()


def test_a_film_of_a_run_needs_its_package(script, monkeypatch, capsys):
    """--evaluate --capture-video without moviepy: the pip command."""
    folder = finished(script)
    monkeypatch.setitem(sys.modules, "moviepy", None)
    line = error_of(capsys, command_line, monkeypatch, script, "--evaluate", folder, "--capture-video")
    assert "pip install moviepy" in line and not list(Path(folder).glob("videos/*"))


def test_what_fits_no_memory_is_refused(script, capsys):
    """In one line with what it needs and what there is."""
    cpu = torch.device("cpu")
    script.require_memory(1e6, "--buffer-size", cpu)
    room = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")  # of which some is in use
    line = error_of(capsys, script.require_memory, room, "--buffer-size", cpu)
    free = float(re.fullmatch(r"error: --buffer-size: .* GB do not fit into the free (.*) GB of cpu", line)[1])
    assert 0 < free < room / 1e9


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="Only root can make a small disk.")
@pytest.mark.parametrize("share", [0.0, 0.5, 1.6])
def test_a_disk_that_fills_up(script, share):
    """With room for this share of what a tiny run leaves: one line, the checkpoint that was there stays and nothing of
    the one that did not fit; with room again, the run goes on."""
    size = 20_000 + share * sum(path.stat().st_size for path in Path(finished(script)).rglob("*"))
    Path("disk").mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size:.0f}", "tmpfs", "disk"], check=False).returncode:
        pytest.skip("This machine lets nobody mount a small disk.")
    try:
        os.chdir("disk")
        process = Started(script, *flags_of(tiny(script, total_timesteps=10**6, checkpoint_frequency=1)))
        _, err = process.communicate(timeout=120)
        lines = [line for line in err.splitlines() if line.startswith("error: ")]
        assert process.returncode in (1, 2) and len(lines) == 1 and "Traceback" not in err, err
        assert re.search("No space|do not fit on the disk", lines[0]) and not list(Path("runs").rglob("*.tmp"))
        subprocess.run(["mount", "-o", "remount,size=50m", os.getcwd()], check=True)
        checkpoints = list(Path("runs").glob("*/checkpoint.pt"))
        assert checkpoints or share < 1 or script.__name__ == "world_models"  # which looks at the disk first
        for path in checkpoints:
            step = load(str(path.parent))["global_step"]
            resume(script, str(path.parent), total_timesteps=step + 24, checkpoint_frequency=1)
            assert load(str(path.parent))["global_step"] == step + 24
    finally:
        close_writers()
        os.chdir("..")
        subprocess.run(["umount", "-l", "disk"], check=True)


# === Pictures ===


def test_the_newest_pictures_stay(script):
    """Of each kind keep_pictures; those of another kind, and other files, are not touched."""
    Path("videos").mkdir()
    Path("policy_1.txt").touch()
    for step in range(1, 6):
        state = types.SimpleNamespace(folder=os.getcwd(), step=step, args=types.SimpleNamespace(keep_pictures=2))
        for kind in ("policy.png", "videos/evaluation.mp4"):
            path = Path(script.Run.picture(state, kind))
            path.touch()
            os.utime(path, (step, step))
    names = {str(path.relative_to(Path.cwd())) for path in Path.cwd().rglob("*.*")}
    kept = {f"policy_{step}.png" for step in (4, 5)} | {f"videos/evaluation_{step}.mp4" for step in (4, 5)}
    assert names == kept | {"policy_1.txt"}


@having("    bfloat16: bool")
def test_bfloat16_without_its_arithmetic_is_said(script, monkeypatch, capsys):
    """On processors of AVX2 alone, or AVX-512 without it, it is slower than float32. What is not known is not said."""
    args = script.with_task_defaults(tiny(script)) if hasattr(script, "with_task_defaults") else tiny(script)
    lacking, having_it = {"avx512_bf16": False, "amx_bf16": False}, {"avx512_bf16": True, "amx_bf16": False}
    for kind, known, lacks in (
        ("AVX2", {}, True), ("AVX512", lacking, True), ("AVX512", having_it, False), ("DEFAULT", {"sve": True}, False),
    ):  # fmt: skip
        monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda kind=kind: kind)
        monkeypatch.setattr("torch.cpu.get_capabilities", lambda known=known: known, raising=False)
        for wanted in (False, True):
            script.check_args(dataclasses.replace(args, bfloat16=wanted))
            assert ("no bfloat16 arithmetic" in capsys.readouterr().err) == (wanted and lacks)


def test_parts_of_an_observation_are_looked_at(script):
    """What is not finite or of another form inside a Dict, a Tuple or a OneOf is no observation either."""
    box = gym.spaces.Box(-np.inf, np.inf, (2,))
    pair, either = gym.spaces.Tuple((gym.spaces.Discrete(2), box)), gym.spaces.OneOf((gym.spaces.Discrete(2), box))
    env = script.CheckedEnv(gym.Env())
    env.observation_space = gym.spaces.Dict(a=gym.spaces.Discrete(2), b=pair, c=either)

    def returned(**changed):
        good = {"a": 1, "b": (0, numbers), "c": (1, numbers)}
        obs = {name: value for name, value in (good | changed).items() if value is not None}
        return env.checked("reset", (), lambda: (obs, {}))[0]

    numbers = np.array([0.0, 1], np.float32)
    for pair in ((0, numbers), [0, numbers], [0, numbers.astype(np.float16)]):
        obs = returned(b=pair)
        assert (*obs,) == ("a", "b", "c") and obs["a"] == 1 and obs["b"][0] == 0 and obs["c"][0] == 1
        for vector in (obs["b"][1], obs["c"][1]):
            np.testing.assert_array_equal(vector, numbers)
    parts = [{"b": 0}, {"b": (0,)}, {"b": (2, numbers)}, {"b": (0, numbers, 0)}, {"b": [0]}, {"b": (0, [0.0, 1.0])}]
    for bad in [{"b": None}, {"a": 2}, {"d": 1}, {"c": (2, numbers)}, {"c": (0, numbers)}, *parts]:
        with pytest.raises(gym.error.Error, match="is not in"):
            returned(**bad)
    for value, text in [(np.inf, "not finite"), (1e20, "absurd"), (np.nan, "not finite"), ("x", "must be numbers")]:
        vector = np.array([0, value]) if value == "x" else np.array([0, value], np.float32)
        for bad in ({"b": (0, vector)}, {"b": [0, vector]}):
            with pytest.raises(gym.error.Error, match=text):
                returned(**bad)
        with pytest.raises(gym.error.Error, match=f"{text}|is not in"):
            returned(c=(1, vector))
    with pytest.raises(gym.error.Error, match="of shape"):
        returned(b=(0, np.zeros(3, np.float32)))


@pytest.mark.parametrize(
    ("box", "value"),
    [
        (gym.spaces.Box(0, 255, (2,), np.uint8), np.array([300, -1])),
        (gym.spaces.Box(0, 255, (2,), np.uint8), np.array([1.5, 2])),
        (gym.spaces.Box(-np.inf, np.inf, (2,), np.float16), np.array([1e6, 0])),
    ],
)
def test_numbers_that_flattening_would_change_are_refused(script, box, value):
    """In a part; alone they are kept as they are."""
    env = script.CheckedEnv(gym.Env())
    env.observation_space = box
    np.testing.assert_array_equal(env.checked("reset", (), lambda: (value, {}))[0], value)
    env.observation_space = gym.spaces.Dict(a=box)
    with pytest.raises(gym.error.Error, match="is not in"):
        env.checked("reset", (), lambda: ({"a": value}, {}))


@pytest.mark.parametrize("flag", ["resume", "evaluate"])
@pytest.mark.parametrize(
    ("name", "value"), [("total_timesteps", "many"), ("seed", [1]), ("eval_episodes", None), ("env_id", 7)]
)
def test_settings_of_another_type_in_a_checkpoint_are_a_line(script, capsys, monkeypatch, flag, name, value):
    """Right names outside, wrong values inside."""
    folder = finished(script)
    state = load(folder)
    state["args"][name] = value
    torch.save(state, os.path.join(folder, "checkpoint.pt"))
    line = error_of(capsys, command_line, monkeypatch, script, f"--{flag}", folder)
    assert line == f"error: {folder}/checkpoint.pt is damaged or was written by another script or version"


OTHER_TYPES = itertools.product(["version", "args", "global_step", "parts", "rng"], [None, 5, "text", []])
OTHER_TYPES = [case for case in OTHER_TYPES if case != ("global_step", 5)]  # which is a step


@pytest.mark.parametrize("flag", ["resume", "evaluate"])
@pytest.mark.parametrize(("name", "value"), OTHER_TYPES)
def test_what_is_of_another_type_in_a_checkpoint_is_a_line(capsys, monkeypatch, flag, name, value):
    """At its top level."""
    import dyna_q

    folder = finished(dyna_q)
    state = load(folder)
    state[name] = value
    torch.save(state, os.path.join(folder, "checkpoint.pt"))
    line = error_of(capsys, command_line, monkeypatch, dyna_q, f"--{flag}", folder)
    assert "is damaged or was written by another script" in line


@without("dyna_q", "world_models")  # which read their tables, and stages, by themselves
@pytest.mark.parametrize("damage", ["nothing", "shapes"])
@pytest.mark.parametrize("flag", ["resume", "evaluate"])
def test_a_checkpoint_that_does_not_fit_is_a_line(script, capsys, monkeypatch, damage, flag):
    """Of the right form outside, but another one inside, as after a change of the environment."""
    folder = finished(script)
    state = load(folder)
    parts = [name for name, part in state["parts"].items() if isinstance(part, dict) and part]
    name = next(name for name in parts if all(map(torch.is_tensor, state["parts"][name].values())))
    networks = state["parts"][name]
    del state["parts"][name]
    if damage == "shapes":
        state["parts"][name] = {key: torch.zeros(3, 1, 4, 1) for key in networks}
    torch.save(state, os.path.join(folder, "checkpoint.pt"))
    longer = ["--total-timesteps", "60"] if flag == "resume" else []
    line = error_of(capsys, command_line, monkeypatch, script, f"--{flag}", folder, *longer)
    assert "does not fit this script" in line
