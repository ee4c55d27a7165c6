"""What every script says in one line besides its faults: no update, no time limit."""

import contextlib
import copy
import signal
import time
import types

import gymnasium as gym
import numpy as np
import pytest
from runs import load, run, tiny


@pytest.mark.parametrize("updates", [0, 1])
def test_a_run_without_an_update_says_so(script, monkeypatch, capsys, updates):
    """At its end, and only then."""
    begin = script.StopRequest.__init__

    def stopped(self):
        begin(self)
        self.requested = signal.SIGTERM * (not updates)

    monkeypatch.setattr(script.StopRequest, "__init__", stopped)
    with contextlib.nullcontext() if updates else pytest.raises(SystemExit):
        run(script, eval_frequency=0)
    assert ("no update was made\n" in capsys.readouterr().out) == (not updates)


def test_an_environment_without_a_time_limit_is_named(script, capsys, monkeypatch):
    """With the limit that it gets; one that has its own is not."""
    if script.__name__ == "dyna_q":
        pytest.skip("--max-episode-steps holds for all environments, and says so")
    args = script.with_task_defaults(tiny(script))
    run(script)
    assert "no time limit" not in capsys.readouterr().out
    renderer = {"renderer": None} if script.__name__.startswith("dreamer") else {}
    envs = script.make_vector_env(args, num_envs=1, **renderer)
    env = envs.envs[0].unwrapped
    env.spec = copy.copy(env.spec)
    env.spec.id = "Endless-v0"
    monkeypatch.setitem(gym.registry, "Endless-v0", types.SimpleNamespace(id="Endless-v0", max_episode_steps=None))
    script.rehearse(lambda video: envs, False)
    limit = envs.envs[0].get_wrapper_attr("_max_episode_steps")
    assert f"Endless-v0 has no time limit: its episodes are truncated after {limit} steps" in capsys.readouterr().out


def test_steps_per_second_are_those_of_training(script):
    """An evaluation of 100 seconds does not count."""
    quiet = lambda *args, **kwargs: None  # noqa: E731
    run = types.SimpleNamespace(step=5, reported=(3, 7.0), eval_began=time.perf_counter() - 100, say=quiet, log=quiet)
    run.args, run.progress = types.SimpleNamespace(eval_frequency=2), types.SimpleNamespace(set_description=quiet)
    script.Run.log_evaluation(run, np.ones(2))
    assert run.next_eval == 6 and run.reported[0] == 3 and 107 <= run.reported[1] < 110


def test_an_id_that_names_a_module_is_not_one_of_dm_control(script):
    """With a version or without."""
    if not hasattr(script, "is_dm_control"):
        pytest.skip("plays none of its tasks")
    ids = "walker-walk", "my_tasks:Reach", "my_tasks:Reach-v0", "CartPole-v1"
    assert [script.is_dm_control(env_id) for env_id in ids] == [True, False, False, False]


def test_a_stop_outlives_the_end_of_an_environment(script):
    """Its alarm is not taken back with that of close."""

    class Closing(gym.Env):
        def close(self):
            signal.setitimer(signal.ITIMER_REAL, 5, 1)  # what StopRequest does

    script.CheckedEnv(Closing()).close()
    assert signal.setitimer(signal.ITIMER_REAL, 0)[1] == 1
    script.CheckedEnv(gym.Env()).close()
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)


def test_an_exception_in_one_line(script):
    """Its type, and the first line that says something."""
    errors = KeyError("x"), ValueError("\n\nbad\nworse"), TimeoutError()
    assert [script.one_line(error) for error in errors] == ["KeyError: 'x'", "ValueError: bad", "TimeoutError"]


def test_a_finished_run_that_is_begun_again_has_learned(script, capsys):
    """Before."""
    folder = run(script, eval_frequency=0)
    capsys.readouterr()
    script.main(script.Args(**load(folder)["args"] | {"resume": folder}))
    assert "no update was made" not in capsys.readouterr().out
