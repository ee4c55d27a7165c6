"""What every script says in one line besides its faults: no update, no time limit."""

import contextlib
import functools
import importlib
import io
import signal
import types

import fake_envs
import gymnasium as gym
import numpy as np
import pytest
import torch
from runs import TINY, differences, finished, having, load, only, run


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
    said = capsys.readouterr().out
    assert ("no update was made\n" in said) == (not updates) and "no time limit" not in said


def test_an_environment_without_a_time_limit_is_named_and_gets_one(script, capsys):
    """--max-episode-steps, with which all is as if it were the environment's own."""
    env_id = TINY[script.__name__]["env_id"].replace(":", ":Endless")
    folder = run(script, env_id=env_id, max_episode_steps=12)
    if script.__name__ != "dyna_q":  # whose limit holds for all environments
        name = env_id.partition(":")[2]
        said = f"{name} has no time limit: episodes are truncated after 12 steps (--max-episode-steps)\n"
        assert capsys.readouterr().out.count(said) == 1
    assert differences(load(folder)["parts"], load(finished(script))["parts"]) == []


def test_an_environment_with_a_time_limit_gets_a_shorter_one(script):
    """--max-episode-steps are the most steps of an episode: beyond the task's own limit they change nothing."""
    env_id = TINY[script.__name__]["env_id"]
    cases = (env_id, 5), (env_id.replace(":", ":Endless"), 5), (env_id, 12), (env_id, 10**6)
    parts = [load(run(script, env_id=name, max_episode_steps=limit))["parts"] for name, limit in cases]
    same = [differences(parts[0], others) == [] for others in parts]
    assert same == [True, True, False, False] and differences(parts[2], parts[3]) == []


LIMITS = [("Long-v0", None, 3_000), ("Long-v0", 4_000, 3_000), ("EndlessPoint-v0", None, 1_000), ("walker-walk", 5, 5)]


@pytest.mark.parametrize(("env_id", "given", "limit"), LIMITS)
def test_a_time_limit_is_told_by_the_specification(env_id, given, limit):
    """The shorter one of two, also beyond the default of 1,000; dm_control's tasks have none."""
    mbpo = importlib.import_module("mbpo")
    if env_id == "walker-walk":
        pytest.importorskip("dm_control", reason="dm_control is not installed.")
    gym.register("Long-v0", fake_envs.Point, max_episode_steps=3_000)
    env = mbpo.make_env(mbpo.Args(env_id=env_id, max_episode_steps=given))()
    assert env.get_wrapper_attr("_max_episode_steps") == limit
    assert env.spec is None if env_id == "walker-walk" else env.spec.max_episode_steps == limit
    env.reset(seed=0)
    ends = [env.step(env.action_space.sample())[3] for _ in range(limit)]
    assert ends == [False] * (limit - 1) + [True]


def test_steps_per_second_are_those_of_training(script, monkeypatch, tmp_path):
    """An evaluation of 100 seconds and a checkpoint of 50 do not count, each once, also one within the other."""
    clock = [0.0]

    def write(*_) -> None:
        clock[0] += 50

    def quiet(*_, **__) -> None:
        pass

    monkeypatch.setattr(script.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(script, "save_checkpoint", write)
    run = types.SimpleNamespace(step=5, reported=(3, 7.0), eval_began=None, say=quiet, log=quiet, report=quiet)
    run.args = types.SimpleNamespace(eval_frequency=2, checkpoint_frequency=2, total_timesteps=9)
    run.progress = types.SimpleNamespace(set_description_str=quiet)
    run.writer = types.SimpleNamespace(flush=quiet)
    run.stop, run.next_save, run.next_eval = types.SimpleNamespace(requested=False), 6, 5
    run.folder, run.saved = str(tmp_path), None
    run.parts, run.rng = {}, {}
    for name in ("goes_on", "save", "leave_out"):
        setattr(run, name, functools.partial(getattr(script.Run, name), run))
    assert script.Run.eval_due(run, np.ones(1)) and run.saved is None
    clock[0] += 100
    script.Run.log_evaluation(run, np.ones(2))
    assert script.Run.evaluations(run) == {5: (1.0, 0.0)}  # it is remembered that it was made
    for _ in range(2):
        assert run.goes_on(np.ones(1)) and run.next_eval == 6 and run.reported == (3, 107.0)
    run.step = 6
    for _ in range(2):
        assert run.goes_on(np.ones(1)) and run.saved[0] == 6 and run.reported == (3, 157.0)
    assert script.Run.eval_due(run, np.ones(1))
    run.saved = None
    run.save()  # as where the environments of an evaluation fail
    assert run.reported == (3, 157.0) and run.goes_on(np.ones(1)) and run.reported == (3, 207.0)


@only("mbpo")
@pytest.mark.parametrize(("env_id", "camera"), [("Humanoid-v5", "track"), ("InvertedPendulum-v5", None)])
def test_a_film_follows_the_body(script, env_id, camera):
    """Gymnasium 1.4 looks from where a body begins, even where its model has a camera that goes along."""
    pytest.importorskip("mujoco", reason="MuJoCo is not installed.")
    renderer = script.make_gymnasium(env_id, render_mode="rgb_array").unwrapped.mujoco_renderer
    assert renderer.camera_id == -1 if camera is None else renderer.model.camera(renderer.camera_id).name == camera


AFTER_THE_ENVIRONMENTS = {  # what evaluate_and_log takes: "run" is the run
    "mbpo": ["run", True], "dhmbpo": ["run"], "dreamer": ["none", "run"], "dreamer_v3": ["none", "run"],
    "muzero": ["run", None],
}  # fmt: skip


@only(*AFTER_THE_ENVIRONMENTS)
def test_an_evaluation_is_remembered_before_its_pictures_are_made(script, monkeypatch):
    """Whatever happens to them."""
    made, is_dhmbpo = [], script.__name__ == "dhmbpo"
    run = types.SimpleNamespace(stop=types.SimpleNamespace(requested=False), device=None, log=lambda values: None)
    run.args = types.SimpleNamespace(capture_video=False, eval_episodes=2, two_player=False, num_envs=1)
    run.log_evaluation = lambda returns: made.append("the returns")
    agent = types.SimpleNamespace(bounds=torch.zeros(2))
    monkeypatch.setattr(script, "evaluate", lambda *_: (*[np.ones(2, int)] * (3 if is_dhmbpo else 1), []))
    monkeypatch.setattr(script, "warn_of_failure", lambda *_: made.append("pictures"))
    others = [run if other == "run" else other for other in AFTER_THE_ENVIRONMENTS[script.__name__]]
    assert script.evaluate_and_log(agent, "environments", *others) == "environments"
    assert made == ["the returns"] + ["pictures"] * (2 if "dreamer" in script.__name__ else 1)


@only("mbpo", "dhmbpo", "muzero")  # the others have no such actions, or tests of their own
def test_whole_numbers_are_rounded_not_cut(script):
    """Of actions 0 to 3 the highest is played by more than exactly 1."""
    env, played = gym.Env(), []
    env.observation_space, env.action_space = gym.spaces.Box(0, 1, (2,)), gym.spaces.Box(0, 3, (1,), np.int64)
    env.step = lambda action: (played.append(action), np.zeros(2), 0.0, False, False, {})[1:]
    env = script.fit_spaces(env, "Whole-v0")
    for number in (-1.0, -0.7, 0.3, 0.9):
        env.step(np.array([number], np.float32))
    assert np.concatenate(played).tolist() == [0, 0, 2, 3] and played[0].dtype == np.int64


@having("\ndef is_dm_control")
def test_an_id_that_names_a_module_is_not_one_of_dm_control(script):
    """With a version or without."""
    ids = "walker-walk", "my_tasks:Reach", "my_tasks:Reach-v0", "CartPole-v1"
    assert [script.is_dm_control(env_id) for env_id in ids] == [True, False, False, False]


@pytest.mark.parametrize("again", [signal.SIGTERM, signal.SIGINT])
def test_a_second_request_stops_at_once(script, again, monkeypatch):
    """But not one within half a second: launchers such as `uv run` hand on what the whole group was sent."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background job ignores
    stop, now = script.StopRequest(), [100.0]
    monkeypatch.setattr(script.time, "monotonic", lambda: now[0])
    for now[0] in (100.0, 100.4):
        signal.raise_signal(signal.SIGTERM if now[0] == 100 else again)
        assert stop.requested == signal.SIGTERM
    now[0] = 100.6
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(again)


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


def test_a_progress_bar_beyond_its_end_has_one_colon(script):
    """What takes its time, and the steps: 16 environments pass the last step that was asked for."""
    run = types.SimpleNamespace(stop=types.SimpleNamespace(requested=0))
    for done in (3, 8):
        run.progress = script.Bar(total=5, initial=done, unit="step", file=io.StringIO())
        assert not script.Run.tick(run, "evaluating")
        assert str(run.progress).startswith("evaluating: ") and str(run.progress).count(": ") == 1


@pytest.mark.stands_for_all("dyna_q")
def test_pictures_need_no_window(script, monkeypatch, capfd):
    """No word of SDL about a display that is not there."""
    for name in ("XDG_RUNTIME_DIR", "DISPLAY", "SDL_VIDEODRIVER"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    env = script.make_gymnasium("FrozenLake-v1", render_mode="rgb_array")
    env.reset(seed=0)
    assert env.render().shape[-1] == 3
    env.close()
    assert capfd.readouterr().err == ""
