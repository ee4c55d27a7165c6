"""Tiny environments for the tests, registered on import: `gym.make("fake_envs:TinyPixels-v0")` works in any process."""

import ctypes
import importlib
import os
import sys
import time

import gymnasium as gym
import numba
import numpy as np


class TinyPixels(gym.Env):
    """A white bar shows a target in [-1, 1]; reward is -5 times the action's distance to it."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 30}

    def __init__(self, render_mode=None, discrete=False, deadly=False, nan_after=None):
        self.render_mode, self.deadly, self.nan_after = render_mode, deadly, nan_after
        self.observation_space = gym.spaces.Box(0, 255, (64, 64, 3), np.uint8)
        self.action_space = gym.spaces.Discrete(3) if discrete else gym.spaces.Box(-1, 1, (1,), np.float32)
        self.total_steps = 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.target = self.np_random.uniform(-1, 1)
        return self.render(), {}

    def step(self, action):
        self.total_steps += 1
        choice = action - 1 if isinstance(self.action_space, gym.spaces.Discrete) else action[0]
        distance = abs(float(choice) - self.target)
        poisoned = self.nan_after is not None and self.total_steps > self.nan_after
        died = self.deadly and self.np_random.random() < 0.2
        return self.render(), float("nan") if poisoned else -5 * distance, died, False, {}

    def render(self):
        image = np.zeros((64, 64, 3), np.uint8)
        column = int((self.target + 1) / 2 * 52)
        image[:, column : column + 12] = 255
        return image


class MovingPixels(TinyPixels):
    """The same, and the bar is pushed by the action."""

    def step(self, action):
        result = super().step(action)
        self.target = float(np.clip(self.target + 0.2 * action[0], -1, 1))
        return self.render(), *result[1:]


class FarPixels(TinyPixels):
    """A white bar, moved by the action from the left, pays where it stands in [0, 1]; beyond 0.7, where random play
    does not come, it costs 5."""

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.target = -1.0
        return self.render(), {}

    def step(self, action):
        self.target = float(np.clip(self.target + 0.16 * action[0], -1, 1))
        place = (self.target + 1) / 2
        return self.render(), -5.0 if place > 0.7 else place, False, False, {}


class Counter(gym.Env):
    """Shows (episode, step, last action); the reward is the number of the step; step `fatal` terminates the episode."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 30}

    observation_space = gym.spaces.Box(-np.inf, np.inf, (3,), np.float32)

    def __init__(self, render_mode=None, fatal=None, discrete=False, nan_after=None):
        self.render_mode, self.fatal, self.nan_after, self.total_steps = render_mode, fatal, nan_after, 0
        self.action_space = gym.spaces.Discrete(3) if discrete else gym.spaces.Box(-2, 2, (1,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.episode, self.count = self.np_random.integers(10**6), 0
        return np.array([self.episode, 0, 0], np.float32), {}

    def step(self, action):
        self.count += 1
        self.total_steps += 1
        poisoned = self.nan_after is not None and self.total_steps > self.nan_after
        obs = np.array([self.episode, self.count, np.ravel(action)[0]], np.float32)
        return obs, float("nan") if poisoned else float(self.count), self.count == self.fatal, False, {}

    def render(self):
        image = np.zeros((64, 64, 3), np.uint8)
        image[64 - 5 * self.count :] = 255
        return image


class Ladder(gym.Env):
    """Shows 2 * step + a coin; an action of 1 earns the step's number; step `fatal` terminates and shows 0 or 1 again.

    `first` is the smallest observation and action. Without a table of its dynamics.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 30}

    def __init__(self, render_mode=None, fatal=None, nan_after=None, first=0):
        self.render_mode, self.fatal, self.nan_after, self.first = render_mode, fatal, nan_after, first
        self.observation_space = gym.spaces.Discrete(26, start=first)
        self.action_space = gym.spaces.Discrete(2, start=first)
        self.total_steps = 0

    def _observe(self, count: int) -> int:
        self.obs = self.first + 2 * count + int(self.np_random.integers(2))
        return self.obs

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.count = 0
        return self._observe(0), {}

    def step(self, action):
        self.count += 1
        self.total_steps += 1
        poisoned = self.nan_after is not None and self.total_steps > self.nan_after
        reward = float("nan") if poisoned else float(self.count * (action - self.first))
        died = self.count == self.fatal
        return self._observe(0 if died else self.count), reward, died, False, {}

    def render(self):
        image = np.zeros((64, 64, 3), np.uint8)
        image[64 - 5 * self.count :] = 255
        return image


class OneState(gym.Env):
    """One state, one action, reward 1: every value that is learned can be written down."""

    observation_space = action_space = gym.spaces.Discrete(1)

    def __init__(self, render_mode=None):
        self.render_mode = render_mode

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return 0, {}

    def step(self, action):
        return 0, 1.0, False, False, {}


POINT_ENDS = {"NanPoint": np.inf, "DeadlyPoint": 1.2}  # how far from 0 a point may be; else everywhere


class Point(gym.Env):
    """A point on a line (position, speed, step / 12) that actions push; reward is minus its distance to 0.

    Beyond `edge` the episode terminates. mbpo.py and dhmbpo.py, which must know it, are told when a point is made.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 30}

    observation_space = gym.spaces.Box(-np.inf, np.inf, (3,), np.float64)
    action_space = gym.spaces.Box(-2, 2, (1,), np.float32)

    def __init__(self, render_mode=None, edge=np.inf, nan_after=None):
        self.render_mode, self.edge, self.nan_after = render_mode, edge, nan_after
        self.total_steps = 0
        for script in map(sys.modules.get, ("__main__", "mbpo", "dhmbpo")):
            if hasattr(script, "TERMINATIONS"):
                ends = dict.fromkeys(POINTS, np.inf) | POINT_ENDS
                script.TERMINATIONS.update({name: beyond(edge) for name, edge in ends.items()})

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.state = np.array([self.np_random.uniform(-0.5, 0.5), 0.0, 0.0])
        return self.state, {}

    def step(self, action):
        self.total_steps += 1
        position, speed, time = self.state
        speed += 0.1 * float(action[0])
        self.state = np.array([position + speed, speed, time + 1 / 12])
        poisoned = self.nan_after is not None and self.total_steps > self.nan_after
        reward = float("nan") if poisoned else -abs(self.state[0])
        return self.state, reward, bool(abs(self.state[0]) > self.edge), False, {}

    def render(self):
        image = np.zeros((64, 64, 3), np.uint8)
        image[:, int(np.clip(32 + 20 * self.state[0], 0, 63))] = 255
        return image


def beyond(edge: float):
    return lambda obs: obs[..., 0].abs() > edge


class OddSpaces(gym.Env):
    """An environment with the spaces it is given."""

    metadata = {"render_modes": ["rgb_array"]}

    def __init__(self, observation_space, action_space, render_mode=None):
        self.observation_space, self.action_space, self.render_mode = observation_space, action_space, render_mode


def missing_package(**kwargs):
    """Stands for an environment whose package is not installed."""
    return importlib.import_module("package_that_nobody_has")


def register(name: str, entry_point, max_episode_steps: int | None, **kwargs) -> None:
    """Without the checks that Gymnasium wraps around an environment."""
    plain = {"disable_env_checker": True, "order_enforce": False}
    gym.register(name, entry_point, max_episode_steps=max_episode_steps, kwargs=kwargs, **plain)


WHEN = {"": 30, "Early": 0, "Quarter": 225, "Late": 900}  # how many steps are good


class FaultyPixels(MovingPixels):
    """Fails in its eighteenth step, as long as there is a file `fault`."""

    steps = 0

    def step(self, action):
        self.steps += 1
        if self.steps == 18 and os.path.exists("fault"):
            raise RuntimeError("no more")
        return super().step(action)


class Faulty(gym.Wrapper):
    """An environment that does `fault` after the first `last_good` steps of its life."""

    def __init__(self, env, fault: str, last_good: int):
        super().__init__(env)
        self.fault, self.last_good, self.total_steps = fault, last_good, 0

    def reset(self, *, seed=None, options=None):
        assert self.fault != "options" or options is None or options["level"]
        obs, _ = self.env.reset(seed=seed)
        masks = {"action_mask": np.ones(2, np.int8)} if self.fault == "mask" else {}
        return obs if self.fault == "old reset" and not self.last_good else (obs, masks | {"episode": self.total_steps})

    def step(self, action):
        obs, reward, terminated, truncated, _ = self.env.step(action)
        self.total_steps += 1
        if self.total_steps <= self.last_good:
            return obs, reward, terminated, truncated, {"episode": self.total_steps}
        if self.fault == "hang":
            open("hanging", "w").close()
            time.sleep(1e6)
        if self.fault == "deaf":
            open("hanging", "w").close()
            ctypes.PyDLL(None).sleep(10**6)  # with the interpreter's lock: no handler and no other thread runs
        if self.fault == "exit":
            sys.exit("the road has ended")
        if self.fault == "die":
            os._exit(9)
        if self.fault == "raise":
            raise KeyError("the road has ended\nsecond line")
        if self.fault == "longer" and isinstance(obs, np.ndarray):
            return np.concatenate([obs, obs]), reward, terminated, truncated, {}
        if self.fault == "nan" and isinstance(obs, np.ndarray) and obs.dtype.kind == "f":
            return obs * np.nan, reward, terminated, truncated, {}
        if self.fault in ("longer", "nan"):
            return None, reward, terminated, truncated, {}
        if self.fault == "old step":
            return obs, reward, terminated or truncated, {}
        rewards = {"array": np.array([reward]), "none": None, "two": np.ones(2), "text": "1", "huge": 1e30}
        return obs, rewards.get(self.fault, reward), terminated, truncated, {"episode": self.total_steps}

    def render(self):
        if self.fault == "render" and self.total_steps > self.last_good:
            raise RuntimeError("no light")
        return self.env.render()

    def close(self):
        if self.fault == "close":
            time.sleep(1e6)
        if self.fault == "close raises":
            raise RuntimeError("the door is stuck")
        super().close()


def faulty(of: str, fault: str, last_good: int, render_mode=None) -> gym.Env:
    return Faulty(gym.make(f"fake_envs:{of}", render_mode=render_mode).unwrapped, fault, last_good)


def slow(**kwargs):
    open("making", "w").close()
    time.sleep(3600)


# What a fault says; nothing, where it is none.
FAULTS = {
    "raise": "the road has ended",
    "longer": "observation",
    "nan": "observation",
    "old step": "step must return observation, reward, terminated, truncated, info",
    "old reset": "reset must return observation, info",
    "none": "reward must be numbers",
    "two": "reward must be numbers of shape (), not float64 of shape (2,)",
    "text": "reward must be numbers",
    "huge": "reward is not finite, or absurd: 1e+30",
    "exit": "the road has ended",
    "die": "the process of an environment has died",
    "deaf": "",
    "render": "",
    "close": "",
    "close raises": "",
    "hang": "",
    "array": "",
    "options": "",
    "mask": "",
}
BOX, VECTOR = gym.spaces.Box(-1, 1, (2,), np.float32), gym.spaces.Box(-1, 1, (3,), np.float32)
PIXELS = gym.spaces.Box(0, 255, (64, 64, 3), np.uint8)
PAIR, THREE = gym.spaces.MultiDiscrete([2, 3]), gym.spaces.Discrete(3)
register("TinyPixels-v0", TinyPixels, 12)
register("FarPixels-v0", FarPixels, 16)
register("TinyPixelsDiscrete-v0", TinyPixels, 12, discrete=True, deadly=True)
register("CalmPixelsDiscrete-v0", TinyPixels, 12, discrete=True)
register("MovingPixels-v0", MovingPixels, 12)
register("FaultyPixels-v0", FaultyPixels, 12)
register("NanReward-v0", TinyPixels, 12, nan_after=30)
register("Counter-v0", Counter, 12)
register("DeadlyCounter-v0", Counter, 12, fatal=8)
register("BothEndsCounter-v0", Counter, 12, fatal=12)
register("DiscreteCounter-v0", Counter, 12, discrete=True)
register("DeadlyDiscreteCounter-v0", Counter, 12, discrete=True, fatal=8)
register("BothEndsDiscreteCounter-v0", Counter, 12, discrete=True, fatal=12)
register("NanCounter-v0", Counter, 12, discrete=True, nan_after=30)
register("Ladder-v0", Ladder, 12)
register("DeadlyLadder-v0", Ladder, 12, fatal=6)
register("BothEndsLadder-v0", Ladder, 12, fatal=12)
register("ShiftedLadder-v0", Ladder, 12, first=5)
register("NanLadder-v0", Ladder, 12, nan_after=30)
register("Point-v0", Point, 12)
register("DeadlyPoint-v0", Point, 12, edge=POINT_ENDS["DeadlyPoint"])
register("NanPoint-v0", Point, 12, nan_after=30)
register("OneState-v0", OneState, 12)
register("DictObservation-v0", OddSpaces, 12, observation_space=gym.spaces.Dict(a=VECTOR), action_space=BOX)
register("MultiDiscreteAction-v0", OddSpaces, 12, observation_space=VECTOR, action_space=PAIR)
register("PixelsMultiDiscrete-v0", OddSpaces, 12, observation_space=PIXELS, action_space=PAIR)
register("BoxAction-v0", OddSpaces, 12, observation_space=THREE, action_space=BOX)
register("MissingPackage-v0", missing_package, 12)


for kind in (TinyPixels, Counter, Ladder, Point):
    kind._max_episode_steps = None  # the name of TimeLimit's own attribute, which an environment may have, too


POINTS = {"Point", "EndlessPoint"}
for name in ("TinyPixels-v0", "MovingPixels-v0", "DiscreteCounter-v0", "Ladder-v0", "Point-v0"):
    register("Slow" + name, slow, 12)
    register("Endless" + name, gym.spec(name).entry_point, None, **gym.spec(name).kwargs)
    for fault in FAULTS:
        for when, last_good in WHEN.items():
            prefix = "Faulty" + when + fault.title().replace(" ", "")
            register(prefix + name, faulty, 12, of=name, fault=fault, last_good=last_good)
            POINTS.add(prefix + "Point")


def run_script(stem: str, settings: dict) -> None:
    """Body of a process that trains until it is killed."""
    numba.config.DISABLE_JIT = True  # compiling takes seconds each time
    module = importlib.reload(importlib.import_module(stem))
    module.main(module.Args(**settings))
