"""The figures and tables of docs/dyna_q.md: learners side by side, one PNG or Markdown table each.

Run:  python benchmark/dyna_q_figures.py 8.2|8.4|8.5|sweeping|ice|tasks [PNG]     (8.x: figures of Sutton & Barto)
The learners are those of dyna_q.py; only what is recorded differs from its main loop.
"""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).parent.parent))
import dyna_q


class Trial:
    """args.num_envs learners that play and learn as in dyna_q.main, one call of step for a step of each."""

    def __init__(self, **settings):
        self.args = dyna_q.with_task_defaults(dyna_q.Args(**settings))
        self.envs = dyna_q.make_vector_env(self.args, self.args.num_envs)
        self.settings = dyna_q.make_settings(self.args)
        size = self.args.num_envs, self.envs.single_observation_space.n, self.envs.single_action_space.n
        self.q, self.model, self.sums = np.zeros(size), dyna_q.make_model(*size), np.zeros((size[0], 3))
        self.rng = {
            name: np.random.default_rng([self.args.seed, i]) for i, name in enumerate(("reset", "act", "planning"))
        }
        self.dones, self.time = np.ones(size[0], bool), 0
        world = dyna_q.known_dynamics(self.envs)
        self.P, self.start = world.P, np.array(world.initial_state_distrib, float)
        self.limit = getattr(world.spec, "max_episode_steps", None) or self.args.max_episode_steps

    def step(self) -> tuple[np.ndarray, dict]:
        """Rewards (N,) and infos; self.dones tells whose episode has ended."""
        n = self.args.num_envs
        if self.dones.any():
            seeds = self.rng["reset"].integers(2**31, size=n).tolist()
            self.obs, _ = self.envs.reset(seed=seeds, options={"reset_mask": self.dones, "time": self.time})
        actions = dyna_q.act(self.q, self.obs, self.args.epsilon, self.rng["act"].random((n, 2)))
        obs, rewards, terminations, truncations, infos = self.envs.step(actions)
        self.time += 1
        self.transition, rng = (self.obs, actions, rewards, obs, terminations), self.rng["planning"]
        self.model = dyna_q.update(self.q, self.model, self.sums, self.transition, self.time, rng, self.settings)
        self.obs, self.dones = obs, terminations | truncations
        return rewards, infos

    def episodes(self, num_episodes: int) -> np.ndarray:
        """Lengths (N, num_episodes) of the first episodes of each learner, whose Q is kept as it was after them."""
        lengths, finished = np.zeros((self.args.num_envs, num_episodes), int), np.zeros(self.args.num_envs, int)
        kept = self.q.copy()
        while finished.min() < num_episodes:
            _, infos = self.step()
            for i in np.flatnonzero(self.dones & (finished < num_episodes)):
                lengths[i, finished[i]] = infos["episode"]["l"][i]
                kept[i] = self.q[i]
            finished += self.dones
        self.q = kept
        return lengths

    def updates(self) -> np.ndarray:
        """Updates made so far by each learner (N,), direct ones included."""
        return self.sums[:, 2] + (0 if self.args.prioritized else self.time)

    def dynamics(self) -> tuple[np.ndarray, np.ndarray]:
        """The environment's own table as transition probabilities of going on (S, A, S) and mean rewards (S, A)."""
        going_on, rewards = np.zeros((*self.q.shape[1:], self.q.shape[1])), np.zeros(self.q.shape[1:])
        for s, row in self.P.items():
            for a, outcomes in row.items():
                for probability, next_s, reward, terminated in outcomes:
                    rewards[s, a] += probability * reward
                    going_on[s, a, next_s] += probability * (not terminated)
        return going_on, rewards

    def greedy_returns(self) -> np.ndarray:
        """Exact expected return (N,) of each learner's greedy policy under the time limit, from the start states."""
        going_on, rewards = self.dynamics()
        best = self.q == self.q.max(2, keepdims=True)
        policy = best / best.sum(2, keepdims=True)
        returns = []
        for pi in policy:
            transition, reward = np.einsum("sa,san->sn", pi, going_on), (pi * rewards).sum(1)
            value = np.zeros(len(reward))
            for _ in range(self.limit):
                value = reward + transition @ value
            returns.append(self.start @ value / self.start.sum())
        return np.array(returns)

    def optimal_policy_return(self) -> float:
        """The same of the policy that is optimal for gamma without a time limit, by value iteration."""
        going_on, rewards = self.dynamics()
        q = np.zeros_like(rewards)
        for _ in range(20_000):
            q = rewards + self.args.gamma * going_on @ q.max(1)
        best, saved = q >= q.max(1, keepdims=True) - 1e-9, self.q
        self.q = np.where(best, 1.0, 0.0)[None]
        value, self.q = self.greedy_returns()[0], saved
        return value


def save(picture: str, curves: dict[str, tuple], title: str, xlabel: str, ylabel: str, **limits) -> None:
    """curves: label -> (x, mean, standard error); also printed as JSON."""
    figure = Figure(figsize=(6.5, 4), layout="constrained")
    axis = figure.subplots()
    for label, (x, mean, error) in curves.items():
        axis.plot(x, mean, label=label)
        axis.fill_between(x, mean - error, mean + error, alpha=0.2)
    axis.set(title=title, xlabel=xlabel, ylabel=ylabel, **limits)
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(picture, dpi=120)
    thin = {
        label: [round(float(v), 2) for v in mean[:: max(len(mean) // 60, 1)]] for label, (_, mean, _) in curves.items()
    }
    print(json.dumps(thin))


def mean_error(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean over learners (first axis) and its standard error."""
    return values.mean(0), values.std(0, ddof=1) / np.sqrt(len(values))


def figure_8_2(picture: str) -> None:
    """Steps per episode in the Dyna maze, 30 learners, beside those of 2,000 runs of another implementation."""
    expected = {  # episode: n = 0, 5, 50
        1: (868.7, 868.7, 868.7), 2: (677, 148, 39.4), 3: (500, 61.6, 17.5), 5: (262, 23.4, 17.0),
        10: (130, 17.0, 16.9), 20: (49, 16.8, 16.7), 25: (25.1, 16.8, 16.7), 30: (18.8, 16.7, 16.8),
        50: (17.9, 16.7, 16.6),
    }  # fmt: skip
    for n in (0, 5):  # compile before the clock starts
        Trial(env_id="DynaMaze-v0", planning_steps=n, num_envs=30).step()
    start = time.perf_counter()
    lengths = {n: Trial(env_id="DynaMaze-v0", planning_steps=n, num_envs=30).episodes(50) for n in (0, 5, 50)}
    seconds = time.perf_counter() - start
    curves = {}
    for n, values in lengths.items():
        mean, error = mean_error(values)
        curves[f"n = {n}"] = np.arange(2, 51), mean[1:], error[1:]
    save(picture, curves, "Dyna maze, 30 learners (S&B Figure 8.2)", "episode", "steps per episode", ylim=(14, 800))
    print("| episode | " + " | ".join(f"n = {n} | expected" for n in lengths) + " |\n" + "|---" * 7 + "|")
    for episode, row in expected.items():
        cells = []
        for values, value in zip(lengths.values(), row, strict=True):
            mean, error = mean_error(values)
            cells.append(f"{mean[episode - 1]:.1f} +- {error[episode - 1]:.1f} | {value}")
        print(f"| {episode} | {' | '.join(cells)} |")
    sums = [f"{values[:, 1:].sum(1).mean():.0f} +- {values[:, 1:].sum(1).std():.0f}" for values in lengths.values()]
    print(f"| sum 2-50 (sd of a run) | {sums[0]} | 4061 (1000) | {sums[1]} | 1028 (80) | {sums[2]} | 847 (68) |")
    print(f"{seconds:.2f} s for 30 learners and n = 0, 5, 50, without import and compilation")


def changing_maze(picture: str, env_id: str, steps: int, marks: tuple, slope: float, variants: dict, title: str):
    """Cumulative reward over time, 300 learners, and how many earn more than `slope` a step in the last 500.

    variants: label -> (settings, expected at the marks).
    """
    curves, rows = {}, []
    for label, (settings, expected) in variants.items():
        trial = Trial(env_id=env_id, num_envs=300, **settings)
        total = np.cumsum([trial.step()[0] for _ in range(steps)], 0).T  # (N, steps)
        curves[label] = np.arange(1, steps + 1), *mean_error(total)
        cells = [
            f"{total[:, t - 1].mean():.0f} ({total[:, t - 1].std():.0f}) | {value}"
            for t, value in zip(marks, expected, strict=True)
        ]
        share = (total[:, -1] - total[:, -501] > 500 * slope).mean()
        rows.append(f"| {label} | {' | '.join(cells)} | {share:.1%} |")
    save(picture, curves, title, "time steps", "cumulative reward")
    print("| | " + " | ".join(f"t = {t} | expected" for t in marks) + f" | over {slope} a step in the last 500 |")
    print("|---" * (2 + 2 * len(marks)) + "|")
    print("\n".join(rows))


def figure_8_4(picture: str) -> None:
    variants = {
        "Dyna-Q": ({}, ("41 (24)", "52 (27)", "75 (41)")),
        "Dyna-Q+, kappa 1e-4": ({"kappa": 1e-4}, ("61 (10)", "82 (13)", "134 (14)")),
        "Dyna-Q+, kappa 1e-3": ({"kappa": 1e-3}, ("61 (11)", "93 (10)", "141 (10)")),
    }
    title = "Blocking maze, 300 learners, alpha 1, n = 10 (S&B Figure 8.4)"
    changing_maze(picture, "BlockingMaze-v0", 3000, (1000, 2000, 3000), 0.0, variants, title)


def figure_8_5(picture: str) -> None:
    variants = {
        "Dyna-Q": ({"planning_steps": 50}, ("121 (33)", "176 (33)", "286 (33)")),
        "Dyna-Q+, kappa 1e-3": ({"planning_steps": 50, "kappa": 1e-3}, ("136 (4)", "204 (8)", "365 (8)")),
        "Dyna-Q+, kappa 1e-4": ({"planning_steps": 50, "kappa": 1e-4}, ("150 (5)", "206 (6)", "316 (7)")),
    }
    title = "Shortcut maze, 300 learners, alpha 1, n = 50 (S&B Figure 8.5)"
    changing_maze(picture, "ShortcutMaze-v0", 6000, (3000, 4000, 6000), 0.07, variants, title)


def shortest_path(moves: np.ndarray, start: int, goal: np.ndarray) -> int:
    reached, steps = {start}, 0
    while not goal[list(reached)].any():
        reached |= {int(n) for s in reached for n in moves[s]}
        steps += 1
    return steps


def updates_until_near_optimal(refine: int, **settings) -> np.ndarray:
    """Updates (N,) until the greedy path is at most 1.2 times the shortest, looked at after each episode."""
    trial = Trial(env_id="DynaMaze-v0", num_envs=20, planning_steps=5, env_kwargs=(f"refine={refine}",), **settings)
    maze = trial.envs.unwrapped
    moves, goal, limit = maze.moves[0], maze.goal, 1.2 * shortest_path(maze.moves[0], maze.start, maze.goal)
    needed = np.full(20, np.nan)
    while np.isnan(needed).any():
        trial.step()
        for i in np.flatnonzero(trial.dones & np.isnan(needed)):
            cell, steps = maze.start, 0
            while not goal[cell] and steps < limit:
                cell, steps = moves[cell, trial.q[i, cell].argmax()], steps + 1
            if goal[cell] and steps <= limit:
                needed[i] = trial.updates()[i]
    return needed


def sweeping(picture: str) -> None:
    """Prioritized sweeping beside Dyna-Q on the refined Dyna maze (S&B example 8.4)."""
    expected = {1: (1.5e3, 7.5e3, 156, 7.5e3), 2: (9.1e3, 38e3, 657, 37e3), 3: (29e3, 64e3, 1366, 63e3)}
    expected |= {4: (54e3, 187e3, None, None), 5: (114e3, 228e3, None, None)}
    variants = {
        f"{name}, alpha {alpha}": {"prioritized": prioritized, "learning_rate": alpha}
        for alpha in (0.5, 1.0)
        for name, prioritized in (("prioritized sweeping", True), ("Dyna-Q", False))
    }
    results = {
        label: [updates_until_near_optimal(k, **settings) for k in expected] for label, settings in variants.items()
    }
    figure = Figure(figsize=(6.5, 4), layout="constrained")
    axis = figure.subplots()
    for label, values in results.items():
        mean, error = mean_error(np.array(values).T)
        axis.errorbar([54 * k * k for k in expected], mean, error, label=label, marker="o", capsize=3)
    axis.set(title="Updates until near-optimal, 20 learners (S&B example 8.4)", xlabel="cells", ylabel="updates")
    axis.set(xscale="log", yscale="log")
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(picture, dpi=120)
    print("| refinement | " + " | ".join(f"{label} | expected" for label in variants) + " |\n" + "|---" * 9 + "|")
    for i, (k, row) in enumerate(expected.items()):
        cells = []
        for values, value in zip(results.values(), row, strict=True):
            mean, error = mean_error(values[i])
            cells.append(f"{mean:,.0f} +- {error:,.0f} | {'' if value is None else f'{value:,.0f}'}")
        print(f"| {k} ({54 * k * k} cells) | {' | '.join(cells)} |")


def ice(_: str) -> None:
    """Slippery FrozenLake: exact success probability of the greedy policy, by model and planning steps."""
    variants = {
        "Q-learning, n = 0": ({"planning_steps": 0}, "0.639 (.17)", "0.811 (.07)"),
        "last outcome, n = 10": ({"model": "last"}, "0.311 (.28)", "0.432 (.23)"),
        "counts, n = 10": ({}, "0.739 (.01)", "0.853 (.04)"),
        "counts, n = 50": ({"planning_steps": 50}, "", ""),
    }
    print("| | 4x4, 2,000 episodes, 100 learners | expected | 8x8, 10,000 episodes, 20 learners | expected |")
    print("|---|---|---|---|---|")
    for label, (settings, *expected) in variants.items():
        cells = []
        for env_id, learners, episodes, value in (
            ("FrozenLake-v1", 100, 2_000, expected[0]),
            ("FrozenLake8x8-v1", 20, 10_000, expected[1]),
        ):
            trial = Trial(env_id=env_id, num_envs=learners, env_kwargs=("is_slippery=True",), **settings)
            trial.episodes(episodes)
            returns = trial.greedy_returns()
            cells.append(f"{returns.mean():.3f} ({returns.std():.3f}) | {value}")
        print(f"| {label} | {' | '.join(cells)} |", flush=True)


def tasks(_: str) -> None:
    """Default settings on each task, 20 learners: exact greedy returns beside the best policy for that gamma."""
    rows = {
        "FrozenLake-v1": ({}, 20_000), "FrozenLake-v1, slippery": ({"env_kwargs": ("is_slippery=True",)}, 100_000),
        "FrozenLake8x8-v1": ({}, 200_000), "FrozenLake8x8-v1, kappa 1e-4": ({"kappa": 1e-4}, 20_000),
        "FrozenLake8x8-v1, slippery": ({"env_kwargs": ("is_slippery=True",)}, 400_000), "CliffWalking-v1": ({}, 20_000),
        "CliffWalkingSlippery-v1": ({}, 100_000), "Taxi-v4": ({}, 50_000), "DynaMaze-v0": ({}, 10_000),
    }  # fmt: skip
    print(
        "| task | steps of each learner | mean of 20 learners | worst | best | optimal for gamma |\n" + "|---" * 6 + "|"
    )
    for label, (settings, steps) in rows.items():
        trial = Trial(env_id=label.split(",")[0], num_envs=20, **settings)
        for _ in range(steps):
            trial.step()
        returns, optimum = trial.greedy_returns(), trial.optimal_policy_return()
        spread = f"{returns.mean():.3f} | {returns.min():.3f} | {returns.max():.3f}"
        print(f"| {label} | {steps:,} | {spread} | {optimum:.3f} |", flush=True)


FIGURES: dict[str, Callable[[str], None]] = {
    "8.2": figure_8_2, "8.4": figure_8_4, "8.5": figure_8_5, "sweeping": sweeping, "ice": ice, "tasks": tasks,
}  # fmt: skip

if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in FIGURES:
        sys.exit(f"usage: python {sys.argv[0]} {'|'.join(FIGURES)} [PNG]")
    FIGURES[sys.argv[1]](sys.argv[2] if len(sys.argv) > 2 else "figure.png")
