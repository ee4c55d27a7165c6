"""What random actions return: results/random.csv, the baseline of the tables.

Run:  python benchmark/random_play.py
"""

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import dreamer

# task, how often an action is played, episodes
TASKS = [
    ("CartPole-v1", 1, 100), ("Pendulum-v1", 1, 100), ("InvertedPendulum-v5", 1, 100), ("Hopper-v5", 1, 100),
    ("HalfCheetah-v5", 1, 20), ("cartpole-swingup", 1, 10), ("cartpole-swingup", 4, 30), ("walker-walk", 2, 10),
    ("reacher-easy", 4, 30), ("cup-catch", 4, 30), ("LunarLander-v3", 4, 100), ("Acrobot-v1", 4, 30),
    ("MountainCar-v0", 8, 100),
]  # fmt: skip


def returns(task: str, repeat: int, episodes: int) -> np.ndarray:
    """Of `episodes` episodes on seeds 0, 1, 2, ..., actions drawn uniformly."""
    args = dreamer.with_task_defaults(dreamer.Args(env_id=task, obs_mode="state", action_repeat=repeat, cuda=False))
    envs, found = dreamer.make_vector_env(args, "none", 1), []
    envs.action_space.seed(1)
    for seed in range(episodes):
        envs.reset(seed=[seed], options={"reset_mask": np.ones(1, bool)})
        done = False
        while not done:
            _, _, terminations, truncations, infos = envs.step(envs.action_space.sample())
            done = terminations[0] or truncations[0]
        found.append(infos["episode"]["r"][0])
    return np.array(found)


if __name__ == "__main__":
    lines = ["# python benchmark/random_play.py: actions drawn uniformly and played `repeat` times; over episodes"]
    lines.append("task,repeat,episodes,return,std")
    for task, repeat, episodes in TASKS:
        found = returns(task, repeat, episodes)
        lines.append(f"{task},{repeat},{episodes},{found.mean():.1f},{found.std():.1f}")
        print(lines[-1])
    Path("results/random.csv").write_text("\n".join(lines) + "\n")
