"""Three ways to draw sequences from dreamer.py's replay, compared where episodes differ in length.

python benchmark/dreamer_replay.py episodes|ends|entries <flags of dreamer.py>    one run; all: dreamer.sh replay
python benchmark/dreamer_replay.py table runs/*                                  mean and best evaluation of each run
  episodes   an episode uniformly, then a start in it uniformly
  ends       an episode uniformly, then min(uniform over its entries, last start): the reference's `dataset_balance`
  entries    a start uniformly over all entries; sequences run on from episode to episode
"""

import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import dreamer


class Replay(dreamer.ReplayBuffer):
    """dreamer.py's, with the starts drawn by `draw`."""

    draw = None

    def sample(self, batch_size: int, length: int, rng: np.random.Generator, device: torch.device) -> dict:
        start = np.minimum(self.draw(batch_size, length, rng), self.end - length)
        slots = torch.from_numpy((start + np.arange(length)[:, None]) % self.capacity).to(self.device)
        return {name: tensor[slots].to(device) for name, tensor in self.data.items()}


class Episodes(Replay):
    def draw(self, batch_size: int, length: int, rng: np.random.Generator) -> np.ndarray:
        i = rng.integers(len(self.starts), size=batch_size)
        return self.starts[i] + rng.integers(np.maximum(self.lengths[i] - length, 0) + 1)


class Ends(Replay):
    def draw(self, batch_size: int, length: int, rng: np.random.Generator) -> np.ndarray:
        i = rng.integers(len(self.starts), size=batch_size)
        return self.starts[i] + np.minimum(rng.integers(self.lengths[i]), np.maximum(self.lengths[i] - length, 0))


class Entries(Replay):
    def draw(self, batch_size: int, length: int, rng: np.random.Generator) -> np.ndarray:
        return rng.integers(self.end - len(self), self.end - length + 1, size=batch_size)


def table(run_dirs: list[str]) -> None:
    """One line a task and sampler: each seed's mean over the second half of its evaluations, the mean of all seeds."""
    sys.path.insert(0, str(Path(__file__).parent))
    from export import evaluations

    rows = {}
    for run_dir in run_dirs:
        task, sampler, *rest = [*Path(run_dir).name.split("__"), ""]  # and seed, time
        if len(rest) == 3 and (returns := [mean for _, mean, _ in evaluations(run_dir)]):
            late = returns[len(returns) // 2 :]
            rows.setdefault((task, sampler), []).append((np.mean(late), returns[-1], max(returns), len(returns)))
    for (task, sampler), seeds in sorted(rows.items()):
        late, last, best, number = (np.array(column) for column in zip(*seeds, strict=True))
        print(f"{task} {sampler}: second half {late.mean():.1f} ({' '.join(f'{value:.1f}' for value in late)}), "
              f"last {last.mean():.1f}, best {best.mean():.1f}, evaluations {number.tolist()}")  # fmt: skip


if __name__ == "__main__":
    kind, *flags = sys.argv[1:]
    if kind == "table":
        table(flags)
    else:
        dreamer.ReplayBuffer = {"episodes": Episodes, "ends": Ends, "entries": Entries}[kind]
        sys.argv[1:] = ["--exp-name", kind, *flags]
        dreamer.main(dreamer.parse_args())
