"""A chain of equal actions: how certain do muzero.py's policies become where there is nothing to be certain of?

Run (from the repository root, 40 s each):  python benchmark/muzero_chain.py
Writes results/muzero/Chain-v0_floor.csv: for each floor (--q-floor) and seed the share of the replay's policies whose
largest chance is above 0.99, by quarters of 8,000 steps.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
STEPS = 8_000


class Chain(gym.Env):
    """Twenty states in a row, shown one-hot; both actions go on and earn 1."""

    observation_space, action_space = gym.spaces.Box(0, 1, (20,), np.float32), gym.spaces.Discrete(2)

    def observe(self) -> np.ndarray:
        return np.eye(20, dtype=np.float32)[min(self.count, 19)]

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.count = 0
        return self.observe(), {}

    def step(self, action):
        self.count += 1
        return self.observe(), 1.0, self.count == 20, False, {}


gym.register("Chain-v0", Chain)


def shares(folder: str) -> list[float]:
    """Of the run in a folder: shares of certain policies by quarters."""
    (path,) = Path(folder).glob("runs/*/checkpoint.pt")
    rows = torch.load(path, weights_only=True)["parts"]["replay"]["data"]
    found = []
    for kind, policy in zip(rows["kind"].chunk(4), rows["policy"].chunk(4), strict=True):
        steps = policy[(kind == 0) & (policy.sum(-1) > 0.5)]  # neither closing rows nor empty ones
        found.append((steps.amax(-1) > 0.99).float().mean().item())
    return found


def main() -> None:
    lines = [
        "# python benchmark/muzero_chain.py: share of policies whose largest chance is above 0.99",
        "floor,seed,step,share",
    ]
    for floor in ("0", "0.01", "0.05", "0.1"):
        for seed in ("1", "2", "3"):
            flags = ["--env-id", "muzero_chain:Chain-v0", "--q-floor", floor, "--seed", seed, "--eval-frequency", "0"]
            command = [sys.executable, str(ROOT / "muzero.py"), *flags, "--total-timesteps", str(STEPS)]
            with tempfile.TemporaryDirectory() as folder:
                environ = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
                subprocess.run(command, cwd=folder, env=environ, check=True, stdout=subprocess.DEVNULL)
                quarters = shares(folder)
            lines += [f"{floor},{seed},{(i + 1) * STEPS // 4},{share:.3f}" for i, share in enumerate(quarters)]
    (ROOT / "results/muzero/Chain-v0_floor.csv").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
