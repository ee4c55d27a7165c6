"""CarRacing-v3 drawn by EnvPool's C++ renderer, 8 times faster: the Gymnasium environment EnvPool/CarRacing-v3.

Run:  PYTHONPATH=benchmark python world_models.py --env-id envpool_car:EnvPool/CarRacing-v3      (pip install envpool)
Its pictures have harder edges and slightly other colours and its tracks are others: a score says which one it is of.
"""

import functools

import gymnasium as gym
import numpy as np


class EnvPoolCarRacing(gym.Env):
    """A pool of one environment is made for each episode: EnvPool takes a seed there, at no reset, and C's candidates
    play the same seeds. Each pool leaves 26 KB behind in its process (envpool 1.2.5, 1,200 episodes), 26 MB in 1,000
    episodes; one pool reset 900 times leaves nothing, but then an episode depends on those before it.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 50}
    observation_space = gym.spaces.Box(0, 255, (96, 96, 3), np.uint8)
    action_space = gym.spaces.Box(np.array([-1, 0, 0], np.float32), np.ones(3, np.float32))

    def __init__(self, render_mode: str | None = None):
        import envpool

        self.render_mode = render_mode
        self.make = functools.partial(envpool.make, "CarRacing-v3", env_type="gymnasium", num_envs=1)

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        super().reset(seed=seed)
        self.pool = self.make(seed=int(self.np_random.integers(2**31)))
        obs, _ = self.pool.reset()
        self.frame = obs[0]
        return self.frame, {}

    def step(self, action: np.ndarray):
        obs, rewards, terminations, truncations, _ = self.pool.step(np.asarray(action, np.float32)[None])
        self.frame = obs[0]
        return self.frame, float(rewards[0]), bool(terminations[0]), bool(truncations[0]), {}

    def render(self) -> np.ndarray:
        return self.frame


gym.register("EnvPool/CarRacing-v3", EnvPoolCarRacing, max_episode_steps=1000)
