# /// script
# requires-python = ">=3.11,<3.13"
# dependencies = [
#     "gymnasium>=1.4", "moviepy>=2.2", "numba>=0.68", "numpy>=2.1", "pygame-ce>=2.5", "tensorboard>=2.20",
#     "torch>=2.6", "tqdm>=4.67", "tyro>=1.0",
# ]
# ///
"""Dyna-Q: a table of action values learned from real steps and, many times more often, from steps of a learned model.

The algorithm (S&B box "Tabular Dyna-Q"), with the functions that are its steps, at every environment step:
  (b) act                an epsilon-greedy action of Q
  (d) dyna_q_step        direct update: Q(s, a) towards r + gamma max Q(s', .)
  (e) record             model learning: count that a in s has led to s', with r on average
  (f) dyna_q_step        planning, n times: a pair tried before, Q towards what the model expects (expected_target)
prioritized_sweeping_step does (f) in the order of the largest changes. The first part of the file is the algorithm, up
to main; environments, evaluation and the run folder follow it.

Paper:      Sutton 1990, Integrated Architectures for Learning, Planning, and Reacting, ICML
            Sutton & Barto 2018, Reinforcement Learning, 2nd edition, chapter 8 (cited as S&B)
Run:        python dyna_q.py --env-id FrozenLake-v1          (or: uv run dyna_q.py --env-id FrozenLake-v1)
Resume:     python dyna_q.py --resume runs/<run folder>
Evaluate:   python dyna_q.py --evaluate runs/<run folder> [--capture-video]
Watch:      tensorboard --logdir runs
Deviations from the book, each also marked at the line it concerns:
  1. The model counts outcomes and planning backs up their expectation (S&B exercise 8.5). Where the world is
     deterministic this is the book's model; --model last is the book's table, which holds the last outcome alone.
  2. Prioritized sweeping takes its priorities from the same expectation.
  3. An episode ends after max_episode_steps, truncated, not terminated: the value of its last state counts.
It runs on the CPU, compiled: the updates of a learner follow one another, there is nothing to spread over a GPU.
"""

import ast
import difflib
import inspect
import math
import os
import random
import signal
import sys
import time
import zipfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from typing import Literal, NamedTuple, NoReturn

import gymnasium as gym
import numpy as np
import torch
import tyro
from numba import njit
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


@dataclass
class Args:
    exp_name: str = os.path.basename(__file__)[: -len(".py")]  # name of the experiment, part of the run folder's name
    seed: int = 1  # seed of every random generator of the run
    torch_deterministic: bool = True  # ask cuDNN for deterministic algorithms
    cuda: bool = True  # train on the GPU if there is one
    track: bool = False  # also log to Weights and Biases
    wandb_project_name: str = "model-based-rl"  # the project name at Weights and Biases
    wandb_entity: str | None = None  # the team at Weights and Biases
    capture_video: bool = False  # write an MP4 of the first episode of every evaluation into the run folder
    save_model: bool = False  # write the weights alone to {exp_name}.pt in the run folder at the end
    eval_frequency: int = 10_000  # environment steps between evaluations, 0 = none
    eval_episodes: int = 10  # episodes of one evaluation
    checkpoint_frequency: int = 50_000  # environment steps between checkpoints, 0 = only at the end or when interrupted
    save_buffer: bool = True  # keep the replay buffer in the checkpoint
    resume: str | None = None  # run folder to continue
    evaluate: str | None = None  # run folder to evaluate: plays eval_episodes, prints their returns, trains nothing

    # Algorithm specific arguments
    env_id: str = "FrozenLake-v1"  # Gymnasium id with Discrete observations and actions, or one of MAZES below
    total_timesteps: int = 20_000  # environment steps of the run, summed over all learners: each gets its share
    num_envs: int = 1  # environments side by side, each with a learner of its own: num_envs independent runs
    env_kwargs: tuple[str, ...] | None = None  # settings of the environment (map_name=8x8), added to those in TASKS
    max_episode_steps: int = 10_000  # an episode is truncated here at the latest, in environment steps
    gamma: float | None = None  # discount per step; default by task, 0.99 elsewhere
    learning_rate: float | None = None  # step size (alpha); default by task, 0.1 elsewhere
    epsilon: float = 0.1  # share of random actions
    planning_steps: int = 10  # updates from the model after each real step (n); 0 = Q-learning
    model: Literal["counts", "last"] | None = None  # all outcomes of a state and action, or the last; default by task
    kappa: float = 0.0  # Dyna-Q+ if > 0: planning adds kappa * sqrt(steps since the pair was tried) to the reward
    prioritized: bool = False  # prioritized sweeping: planning takes the pair that would change most
    theta: float = 1e-4  # prioritized sweeping: changes up to this size are not queued
    report_frequency: int = 100  # steps of each environment between reports of losses and model errors


# === Model ===

PAIR = np.dtype([("visits", np.int32), ("num_outcomes", np.int32), ("reward", np.float64)])  # reward: the mean
OUTCOME = np.dtype([("next_obs", np.int32), ("count", np.int32), ("terminations", np.int32)])


class Model(NamedTuple):
    """What N learners know of their worlds: S states, A actions, up to K outcomes of a pair, up to P predecessors.

    It takes the place of a replay buffer. In queue and predecessors the pair (s, a) is the number s * A + a.
    """

    pairs: np.ndarray  # (N, S, A) of PAIR
    outcomes: np.ndarray  # (N, S, A, K) of OUTCOME: the states a pair led to, how often, how often by a termination
    last_tried: np.ndarray  # (N, S, A) step of the run, 0 = never
    visited: np.ndarray  # (N, S) the states in which an action was taken, in order of appearance
    num_visited: np.ndarray  # (N,)
    tried: np.ndarray  # (N, S, A) the actions taken in a state, in order of appearance
    num_tried: np.ndarray  # (N, S)
    priority: np.ndarray  # (N, S * A) of the pairs in the queue, 0 = not queued
    predecessors: np.ndarray  # (N, S, P) the pairs that lead to a state, as far as known
    num_predecessors: np.ndarray  # (N, S)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The arrays as tensors of bytes (torch has no records); they share memory with the model."""
        return {name: torch.from_numpy(array.view(np.uint8)) for name, array in self._asdict().items()}


def make_model(num_learners: int, num_states: int, num_actions: int) -> Model:
    """A model that knows nothing, with room for one outcome of each pair. Small types: the CPU's cache is the limit."""
    n, s, a = num_learners, num_states, num_actions
    return Model(
        pairs=np.zeros((n, s, a), PAIR),
        outcomes=np.zeros((n, s, a, 1), OUTCOME),
        last_tried=np.zeros((n, s, a), np.int64),
        visited=np.zeros((n, s), np.int32),
        num_visited=np.zeros(n, np.int32),
        tried=np.zeros((n, s, a), np.int32),
        num_tried=np.zeros((n, s), np.int32),
        priority=np.zeros((n, s * a)),
        predecessors=np.zeros((n, s, 1), np.int32),
        num_predecessors=np.zeros((n, s), np.int32),
    )


def grow(model: Model) -> Model:
    """Twice the room for outcomes and predecessors."""
    outcomes, predecessors = (np.concatenate([x, np.zeros_like(x)], -1) for x in (model.outcomes, model.predecessors))
    return model._replace(outcomes=outcomes, predecessors=predecessors)


def load_model(state: dict[str, torch.Tensor], like: Model) -> Model:
    """The inverse; `like` tells the types."""
    return Model(**{name: state[name].numpy().copy().view(array.dtype) for name, array in like._asdict().items()})


@njit
def find_outcome(model, i, s, a, next_s):
    """Index of an outcome of the pair, num_outcomes if it has not been seen."""
    for k in range(model.pairs[i, s, a].num_outcomes):
        if model.outcomes[i, s, a, k].next_obs == next_s:
            return k
    return model.pairs[i, s, a].num_outcomes


@njit
def has_room(model, i, s, a, next_s, rule):
    """Whether `record` can store this transition without more room."""
    k, num_outcomes = find_outcome(model, i, s, a, next_s), model.pairs[i, s, a].num_outcomes
    full = rule.prioritized and model.num_predecessors[i, next_s] == model.predecessors.shape[2]
    return k < num_outcomes or ((rule.overwrite or k < model.outcomes.shape[3]) and not full)


@njit
def record(model, i, s, a, reward, next_s, terminated, step, rule):
    """Model learning, S&B box "Tabular Dyna-Q" step (e), with counts in place of the last outcome (deviation 1)."""
    pair = model.pairs[i, s, a]
    if pair.visits == 0:
        if model.num_tried[i, s] == 0:
            model.visited[i, model.num_visited[i]] = s
            model.num_visited[i] += 1
        model.tried[i, s, model.num_tried[i, s]] = a
        model.num_tried[i, s] += 1
    elif rule.overwrite:
        forget(model, i, s, a, rule)
    k = find_outcome(model, i, s, a, next_s)
    outcome = model.outcomes[i, s, a, k]
    if k == pair.num_outcomes:
        outcome.next_obs, outcome.count, outcome.terminations = next_s, 0, 0
        pair.num_outcomes += 1
        if rule.prioritized:
            model.predecessors[i, next_s, model.num_predecessors[i, next_s]] = s * model.pairs.shape[2] + a
            model.num_predecessors[i, next_s] += 1
    outcome.count += 1
    outcome.terminations += terminated
    pair.visits += 1
    pair.reward += (reward - pair.reward) / pair.visits
    model.last_tried[i, s, a] = step


@njit
def forget(model, i, s, a, rule):
    """Drops the one outcome that is known of a pair, and the pair from the predecessors of the state it led to."""
    pair = model.pairs[i, s, a]
    pair.visits, pair.num_outcomes, pair.reward = 0, 0, 0.0
    if rule.prioritized:
        next_s = model.outcomes[i, s, a, 0].next_obs
        for j in range(model.num_predecessors[i, next_s]):
            if model.predecessors[i, next_s, j] == s * model.pairs.shape[2] + a:
                model.num_predecessors[i, next_s] -= 1
                model.predecessors[i, next_s, j] = model.predecessors[i, next_s, model.num_predecessors[i, next_s]]
                break


# === Targets ===


@njit
def max_value(q, i, s):
    best = q[i, s, 0]
    for a in range(1, q.shape[2]):
        best = max(best, q[i, s, a])
    return best


@njit
def expected_target(q, pairs, outcomes, i, s, a, gamma):
    """Expected update of a pair under the model, S&B section 8.5: r + gamma * sum_s' p(s') max_a' Q(s', a').

    Nothing is added beyond a termination. An untried pair leads back to its state with reward 0 (S&B section 8.3).
    """
    pair = pairs[i, s, a]
    if pair.visits == 0:
        return gamma * max_value(q, i, s)
    value = 0.0
    for k in range(pair.num_outcomes):
        outcome = outcomes[i, s, a, k]
        value += (outcome.count - outcome.terminations) / pair.visits * max_value(q, i, outcome.next_obs)
    return pair.reward + gamma * value


# === Acting ===


@njit
def act(q, obs, epsilon, uniforms):
    """Epsilon-greedy actions (N,) in Q (N, S, A) for obs (N,), ties broken at random; uniforms (N, 2) in [0, 1)."""
    actions = np.zeros(len(obs), np.int64)
    for i in range(len(obs)):
        values = q[i, obs[i]]
        if uniforms[i, 0] < epsilon:
            actions[i] = int(uniforms[i, 1] * len(values))
            continue
        best, ties = max_value(q, i, obs[i]), 0
        for value in values:
            ties += value == best
        rank = int(uniforms[i, 1] * ties)
        for a in range(len(values)):
            if values[a] == best:
                if rank == 0:
                    actions[i] = a
                rank -= 1
    return actions


# === Updates ===


class Rule(NamedTuple):
    """The settings of an update."""

    gamma: float
    learning_rate: float
    planning_steps: int
    kappa: float
    prioritized: bool
    theta: float
    overwrite: bool


def make_rule(args: Args) -> Rule:
    return Rule(**{name: getattr(args, name) for name in Rule._fields[:-1]}, overwrite=args.model == "last")


@njit
def dyna_q_step(q, model, sums, obs, actions, rewards, next_obs, terminations, uniforms, step, rule):
    """One real step of each learner: direct update, model learning, planning; S&B box "Tabular Dyna-Q" (d) to (f).

    Arrays of the transition (N,), uniforms (N, n, 2) in [0, 1), step of the run counted from 1. Changes in place q
    (N, S, A), model and sums (N, 3), which adds up the absolute TD error of the real step, those of planning, and the
    updates of planning. Returns False, with nothing changed, if the model must grow first.
    """
    for i in range(len(obs)):
        if not has_room(model, i, obs[i], actions[i], next_obs[i], rule):
            return False
    pairs, outcomes, _, visited, num_visited, tried, num_tried, _, _, _ = model  # model.x in the loop: half the speed
    for i in range(len(obs)):
        s, a = obs[i], actions[i]
        value = 0.0 if terminations[i] else max_value(q, i, next_obs[i])
        td_error = rewards[i] + rule.gamma * value - q[i, s, a]
        q[i, s, a] += rule.learning_rate * td_error
        sums[i, 0] += abs(td_error)
        record(model, i, s, a, rewards[i], next_obs[i], terminations[i], step, rule)
        for j in range(rule.planning_steps):  # uniformly: first a visited state, then an action tried in it
            s = visited[i, int(uniforms[i, j, 0] * num_visited[i])]
            if rule.kappa > 0:  # Dyna-Q+ (S&B section 8.3): untried actions too, and a bonus for the time since
                a = int(uniforms[i, j, 1] * q.shape[2])
                bonus = rule.kappa * math.sqrt(step - model.last_tried[i, s, a])
            else:
                a, bonus = tried[i, s, int(uniforms[i, j, 1] * num_tried[i, s])], 0.0
            td_error = bonus + expected_target(q, pairs, outcomes, i, s, a, rule.gamma) - q[i, s, a]
            q[i, s, a] += rule.learning_rate * td_error
            sums[i, 1] += abs(td_error)
        sums[i, 2] += rule.planning_steps
    return True


@njit
def push(q, model, i, s, a, rule):
    """Queues a pair by its absolute TD error if that exceeds theta; one that is queued is raised, never lowered."""
    priority = abs(expected_target(q, model.pairs, model.outcomes, i, s, a, rule.gamma) - q[i, s, a])  # deviation 2
    if priority > rule.theta:
        pair = s * q.shape[2] + a
        model.priority[i, pair] = max(priority, model.priority[i, pair])


@njit
def prioritized_sweeping_step(q, model, sums, obs, actions, rewards, next_obs, terminations, uniforms, step, rule):
    """One real step of each learner, S&B box "Prioritized sweeping" (d) to (g). As dyna_q_step; uniforms are not used.

    The highest priority is found by looking at all S * A of them: for tables, shorter than a heap and fast enough.
    """
    for i in range(len(obs)):
        if not has_room(model, i, obs[i], actions[i], next_obs[i], rule):
            return False
    for i in range(len(obs)):
        s, a = obs[i], actions[i]
        value = 0.0 if terminations[i] else max_value(q, i, next_obs[i])
        sums[i, 0] += abs(rewards[i] + rule.gamma * value - q[i, s, a])
        record(model, i, s, a, rewards[i], next_obs[i], terminations[i], step, rule)
        push(q, model, i, s, a, rule)
        for _ in range(rule.planning_steps):
            pair = np.argmax(model.priority[i])
            if model.priority[i, pair] == 0:
                break
            model.priority[i, pair] = 0
            s, a = pair // q.shape[2], pair % q.shape[2]
            td_error = expected_target(q, model.pairs, model.outcomes, i, s, a, rule.gamma) - q[i, s, a]
            q[i, s, a] += rule.learning_rate * td_error
            sums[i, 1] += abs(td_error)
            sums[i, 2] += 1
            for j in range(model.num_predecessors[i, s]):
                before = model.predecessors[i, s, j]
                push(q, model, i, before // q.shape[2], before % q.shape[2], rule)
    return True


def update(q: np.ndarray, model: Model, sums: np.ndarray, transition: tuple, step: int, rng, rule: Rule) -> Model:
    """One real step of all learners, see dyna_q_step; rng is a NumPy generator. Returns the model, grown or not."""
    learn = prioritized_sweeping_step if rule.prioritized else dyna_q_step
    uniforms = rng.random((len(q), 0 if rule.prioritized else rule.planning_steps, 2))
    while not learn(q, model, sums, *transition, uniforms, step, rule):
        model = grow(model)
    return model


# === Training ===


def main(args: Args) -> str:
    args = with_task_defaults(args)
    check_args(args)
    if args.evaluate:
        return evaluate_run(args)
    checkpoint = load_checkpoint(args.resume, args) if args.resume else None
    envs = make_vector_env(args, args.num_envs)
    run = Run(args, checkpoint)

    # what a checkpoint holds: tables, what is known of the worlds, sums since the last report, generators
    num_states, num_actions = int(envs.single_observation_space.n), int(envs.single_action_space.n)
    try:
        q = np.zeros((args.num_envs, num_states, num_actions))
        model, rule = make_model(*q.shape), make_rule(args)
    except MemoryError as error:
        fail(f"the tables do not fit into memory: {error}")
    sums = np.zeros((args.num_envs, 3))  # see dyna_q_step
    rng = {name: np.random.default_rng([args.seed, i]) for i, name in enumerate(("reset", "act", "planning"))}
    if checkpoint:
        q[:], sums[:] = checkpoint["parts"]["agent"]["q_table"], checkpoint["parts"]["sums"]
        model = load_model(checkpoint["parts"]["replay"], model) if args.save_buffer else model
    parts = {"agent": {"q_table": torch.from_numpy(q)}, "sums": torch.from_numpy(sums)}  # they share memory
    run.keep(parts | ({"replay": model} if args.save_buffer else {}), rng)
    print(f"{run.folder}: {args.num_envs} learners, {math.ceil(args.total_timesteps / args.num_envs)} steps each, "
          f"{num_states} states, {num_actions} actions, gamma {args.gamma}, alpha {args.learning_rate}, "
          f"{args.model}, {' '.join(args.env_kwargs)}")  # fmt: skip

    def report() -> None:
        """TD errors since the last report, and the model beside the environment's own table, if it has one."""
        direct, planning, updates = sums.sum(0)
        steps = (step - 1) % args.report_frequency + 1
        run.metrics = {"losses/td_error": direct / steps / args.num_envs}
        run.metrics |= {"model/planning_td_error": planning / max(updates, 1)}
        run.metrics |= {"model/states_visited": model.num_visited.mean()}
        if (world := known_dynamics(envs)) is not None:
            run.metrics |= model_errors(model, world.P, world.initial_state_distrib)
        run.report()
        run.metrics, sums[:] = {}, 0

    dones, step = np.ones(args.num_envs, bool), run.step // args.num_envs
    eval_envs = None
    while run.goes_on(dones):
        if dones.any():
            seeds = rng["reset"].integers(2**31, size=args.num_envs).tolist()
            obs, _ = envs.reset(seed=seeds, options={"reset_mask": dones, "time": step})
        actions = act(q, obs, args.epsilon, rng["act"].random((args.num_envs, 2)))
        next_obs, rewards, terminations, truncations, infos = envs.step(actions)
        step, run.step = step + 1, run.step + args.num_envs
        transition = obs, actions, rewards, next_obs, terminations
        model = update(q, model, sums, transition, step, rng["planning"], rule)
        if args.save_buffer:
            run.parts["replay"] = model  # it may have grown
        if not math.isfinite(sums.sum()):
            raise SystemExit(f"error: not finite at step {run.step}: losses/td_error; the last checkpoint is intact")
        obs, dones = next_obs, terminations | truncations
        run.progress.update(args.num_envs)
        if dones.any():
            run.log_episodes(infos, dones)
        if step % args.report_frequency == 0:
            report()
        if run.eval_due():
            players = min(args.num_envs, args.eval_episodes)
            if eval_envs is None:
                video = f"{run.folder}/videos/step-{run.step}" if args.capture_video else None
                eval_envs = make_vector_env(args, players, video)
            returns = evaluate(q[:players], eval_envs, args, step, run.stop)
            if args.capture_video:  # the film is written when its environment closes
                eval_envs.close()
                eval_envs = None
            if not run.stop.requested:
                run.log_evaluation(returns)

    if step % args.report_frequency and run.step > run.reported[0]:
        report()  # the rest; what was saved has the sums that a resumed run goes on with
    envs.close()
    if eval_envs is not None:
        eval_envs.close()
    return run.close(parts["agent"])


# === Environment ===

# S start, G goal (reward 1, the end), # wall. Where two mazes stand side by side, the second holds from CHANGES_AT on.
MAZES = {
    "DynaMaze-v0": """
        . . . . . . . # G
        . . # . . . . # .
        S . # . . . . # .
        . . # . . . . . .
        . . . . . # . . .
        . . . . . . . . .
    """,  # S&B example 8.1
    "BlockingMaze-v0": """
        . . . . . . . . G    . . . . . . . . G
        . . . . . . . . .    . . . . . . . . .
        . . . . . . . . .    . . . . . . . . .
        # # # # # # # # .    . # # # # # # # #
        . . . . . . . . .    . . . . . . . . .
        . . . S . . . . .    . . . S . . . . .
    """,  # S&B example 8.2
    "ShortcutMaze-v0": """
        . . . . . . . . G    . . . . . . . . G
        . . . . . . . . .    . . . . . . . . .
        . . . . . . . . .    . . . . . . . . .
        . # # # # # # # #    . # # # # # # # .
        . . . . . . . . .    . . . . . . . . .
        . . . S . . . . .    . . . S . . . . .
    """,  # S&B example 8.3
}
CHANGES_AT = {"BlockingMaze-v0": 1000, "ShortcutMaze-v0": 3000}  # steps of the run

# What a task needs other than the defaults; a flag given on the command line wins.
CHANGING = {"gamma": 0.95, "learning_rate": 1.0, "model": "last"}  # counts would remember walls that are gone
TASKS = {
    "FrozenLake-v1": {"env_kwargs": ("is_slippery=False",)},
    "FrozenLake8x8-v1": {"env_kwargs": ("is_slippery=False",)},
    "CliffWalking-v1": {"gamma": 1.0, "learning_rate": 0.5},
    "CliffWalkingSlippery-v1": {"gamma": 1.0},
    "Taxi-v4": {"learning_rate": 0.5},
    "DynaMaze-v0": {"gamma": 0.95},
    "BlockingMaze-v0": CHANGING,
    "ShortcutMaze-v0": CHANGING,
}


def with_task_defaults(args: Args) -> Args:
    """The settings in force: what was not given is filled in from TASKS, an id without its version completed."""
    env_id = next((name for name in TASKS if args.env_id in (name, name.rpartition("-v")[0])), args.env_id)
    task = {"env_kwargs": (), "gamma": 0.99, "learning_rate": 0.1, "model": "counts"} | TASKS.get(env_id, {})
    given = args.env_kwargs or ()
    names = {setting.partition("=")[0] for setting in given}
    env_kwargs = (*(setting for setting in task["env_kwargs"] if setting.partition("=")[0] not in names), *given)
    missing = {name: value for name, value in task.items() if getattr(args, name) is None}
    return replace(args, **missing | {"env_id": env_id, "env_kwargs": env_kwargs})


def maze_moves(grid: np.ndarray) -> np.ndarray:
    """The cell that each action leads to, (S, A), for a grid of characters."""
    here = np.arange(grid.size).reshape(grid.shape)
    framed = np.pad(here, 1, mode="edge")
    ahead = np.stack([framed[:-2, 1:-1], framed[2:, 1:-1], framed[1:-1, :-2], framed[1:-1, 2:]], -1)
    return np.where(grid.ravel()[ahead] == "#", here[..., None], ahead).reshape(-1, 4)


class MazeVector(gym.vector.VectorEnv):
    """Copies of a maze, stepped at once: four moves (up, down, left, right), a wall or border leaves you where you are.

    refine splits each cell into refine x refine. The walls follow the clock `time`; at a reset options["time"] sets it
    and options["frozen"] stops it.
    """

    metadata = {"autoreset_mode": gym.vector.AutoresetMode.DISABLED}

    def __init__(self, num_envs: int = 1, drawing: str = "", change_at: float = math.inf, refine: int = 1):
        self.num_envs, self.change_at = num_envs, float(change_at)
        rows = [row.split("    ") for row in inspect.cleandoc(drawing).splitlines()]  # a drawing, or two side by side
        grids = [np.array([cells.split() for cells in grid]) for grid in zip(*rows, strict=True)]
        self.grids = [grid.repeat(refine, 0).repeat(refine, 1) for grid in grids]
        self.moves, cells = [maze_moves(grid) for grid in self.grids], self.grids[0].ravel()
        self.start, self.goal = np.argmax(cells == "S"), cells == "G"
        self.initial_state_distrib = np.arange(len(cells)) == self.start
        self.single_observation_space = gym.spaces.Discrete(len(cells))
        self.single_action_space = gym.spaces.Discrete(4)
        self.observation_space = gym.vector.utils.batch_space(self.single_observation_space, num_envs)
        self.action_space = gym.vector.utils.batch_space(self.single_action_space, num_envs)
        self.position, self.time, self.frozen = np.full(num_envs, self.start), 0, False

    @property
    def layout(self) -> int:
        return int(len(self.moves) > 1 and self.time >= self.change_at)

    @property
    def P(self) -> dict:
        """The dynamics in the form of Gymnasium's toy_text: P[s][a] = [(probability, next, reward, terminated)]."""
        rows = enumerate(self.moves[self.layout].tolist())
        return {
            s: {a: [(1.0, n, float(self.goal[n]), bool(self.goal[n]))] for a, n in enumerate(row)} for s, row in rows
        }

    def reset(self, *, seed=None, options=None):
        options = options or {}
        self.time, self.frozen = options.get("time", self.time), options.get("frozen", False)
        self.position = np.where(options.get("reset_mask", True), self.start, self.position)
        return self.position, {}

    def step(self, actions):
        self.position = self.moves[self.layout][self.position, actions]
        self.time += not self.frozen
        terminations = self.goal[self.position]
        return self.position, terminations.astype(float), terminations, np.zeros(self.num_envs, bool), {}


class Maze(gym.Env):
    """One maze, for gym.make."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 8}

    def __init__(self, render_mode: str | None = None, **kwargs):
        self.vector, self.render_mode = MazeVector(1, **kwargs), render_mode
        self.observation_space = self.vector.single_observation_space
        self.action_space = self.vector.single_action_space

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return int(self.vector.reset(options=options)[0][0]), {}

    def step(self, action):
        obs, rewards, terminations, _, _ = self.vector.step(np.array([action]))
        return int(obs[0]), float(rewards[0]), bool(terminations[0]), False, {}

    def render(self) -> np.ndarray:
        """Walls black, goal green, agent blue; (H, W, 3) uint8, 16 pixels a cell."""
        grid = self.vector.grids[self.vector.layout]
        image = np.full((*grid.shape, 3), 255, np.uint8)
        image[grid == "#"], image[grid == "G"] = 0, (90, 200, 90)
        image.reshape(-1, 3)[self.vector.position[0]] = 70, 110, 220
        return image.repeat(16, 0).repeat(16, 1)


def register_mazes() -> None:
    """Makes the mazes known to gym.make and gym.make_vec."""
    for env_id, drawing in MAZES.items():
        if env_id not in gym.registry:
            kwargs = {"drawing": drawing, "change_at": CHANGES_AT.get(env_id, math.inf)}
            plain = {"disable_env_checker": True, "order_enforce": False}
            gym.register(env_id, Maze, vector_entry_point=MazeVector, kwargs=kwargs, **plain)


class EpisodeStatistics(gym.vector.VectorWrapper):
    """Returns and lengths of the episodes that end, in infos["episode"]; truncates them at max_episode_steps.

    Gymnasium's own RecordEpisodeStatistics loses the other episodes' sums when one of them is reset by a mask.
    """

    def __init__(self, envs: gym.vector.VectorEnv, max_episode_steps: int):
        super().__init__(envs)
        self.max_episode_steps, self.num_states = max_episode_steps, envs.single_observation_space.n
        self.returns, self.lengths = np.zeros(envs.num_envs), np.zeros(envs.num_envs, np.int64)

    def reset(self, *, seed=None, options=None):
        self.returns[options["reset_mask"]] = 0
        self.lengths[options["reset_mask"]] = 0
        obs, infos = self.env.reset(seed=seed, options=options)
        return self.checked(obs), infos

    def checked(self, obs: np.ndarray) -> np.ndarray:
        """Compiled code does not look where it writes: states outside of the space end the run here."""
        if obs.dtype.kind != "i" or obs.min() < 0 or obs.max() >= self.num_states:
            raise SystemExit(f"error: an observation is not in Discrete({self.num_states}): {obs}")
        return obs

    def step(self, actions):
        obs, rewards, terminations, truncations, infos = self.env.step(actions)
        self.checked(obs)
        self.returns += rewards
        self.lengths += 1
        truncations = truncations | (self.lengths >= self.max_episode_steps)  # deviation 3
        return obs, rewards, terminations, truncations, infos | {"episode": {"r": self.returns, "l": self.lengths}}


def make_env(args: Args, video: str | None = None) -> Callable[[], gym.Env]:
    """Thunk of one environment; observations and actions are counted from 0."""

    def thunk() -> gym.Env:
        film = {"render_mode": "rgb_array"} if video else {}
        env = gym.make(args.env_id, **film, **parse_kwargs(args))
        obs, action = env.observation_space, env.action_space
        if isinstance(obs, gym.spaces.Discrete) and obs.start:
            env = gym.wrappers.TransformObservation(env, lambda o: o - obs.start, gym.spaces.Discrete(obs.n))
        if isinstance(action, gym.spaces.Discrete) and action.start:
            env = gym.wrappers.TransformAction(env, lambda a: a + action.start, gym.spaces.Discrete(action.n))
        if video:  # folder/prefix of the MP4
            folder, prefix = os.path.split(video)
            first = {"episode_trigger": lambda i: i == 0, "disable_logger": True}
            env = gym.wrappers.RecordVideo(env, folder, name_prefix=prefix, **first)
        return env

    return thunk


def parse_kwargs(args: Args) -> dict:
    """--env-kwargs name=value ... as keyword arguments; what is no Python literal is a string."""
    kwargs = {}
    for setting in args.env_kwargs:
        name, equals, value = setting.partition("=")
        if not (name.isidentifier() and equals):
            fail(f"--env-kwargs takes name=value, not {setting!r}")
        try:
            kwargs[name] = ast.literal_eval(value.title() if value.lower() in ("true", "false", "none") else value)
        except (ValueError, SyntaxError):
            if " " in value:
                fail(f"--env-kwargs takes name=value name=value ..., unquoted, not {setting!r}")
            kwargs[name] = value
    return kwargs


def make_vector_env(args: Args, num_envs: int, video: str | None = None) -> gym.vector.VectorEnv:
    """Environments that the caller resets one by one, each episode with a seed (autoreset off)."""
    register_mazes()
    try:
        if args.env_id in MAZES and not video:
            envs = gym.make_vec(args.env_id, num_envs, "vector_entry_point", **parse_kwargs(args))
        else:
            thunks = [make_env(args, video if i == 0 else None) for i in range(num_envs)]
            envs = gym.vector.SyncVectorEnv(thunks, autoreset_mode=gym.vector.AutoresetMode.DISABLED)
    except gym.error.DependencyNotInstalled as error:
        fail(str(error).replace("\n", " "))
    except ModuleNotFoundError as error:
        missing = f"pip install {error.name}" if error.name else str(error).partition(".")[0]
        fail(f"{args.env_id} needs a package that is not installed: {missing}")
    except Exception as error:  # many types, by environment and settings
        close = difflib.get_close_matches(args.env_id, gym.registry, n=3, cutoff=0.5)
        hint = "" if args.env_id.split(":")[-1] in gym.registry else f" Close: {', '.join(close) or 'none'}"
        reason = (str(error) or repr(error)).splitlines()[0]
        fail(f"cannot make {' '.join([repr(args.env_id), *args.env_kwargs])}: {reason}{hint}")
    for kind, space in (("observations", envs.single_observation_space), ("actions", envs.single_action_space)):
        if not isinstance(space, gym.spaces.Discrete):
            fail(f"{args.env_id}: {kind} must be Discrete, not {space}")
    return EpisodeStatistics(envs, args.max_episode_steps)


# === Evaluation ===


def evaluate(q: np.ndarray, envs: gym.vector.VectorEnv, args: Args, step: int, stop: "StopRequest") -> np.ndarray:
    """Returns of args.eval_episodes greedy episodes, dealt to the first learners, in the world as it is at this step.

    q (N, S, A) of as many learners as there are environments. Seeds of its own: training does not notice.
    """
    rng, seeds, num_envs = np.random.default_rng([args.seed, 98]), np.random.default_rng([args.seed, 99]), len(q)
    quota = np.bincount(np.arange(args.eval_episodes) % num_envs)  # fixed, so that short episodes do not win
    returns, dones = [], np.ones(num_envs, bool)
    while quota.any() and not stop.requested:
        if dones.any():
            seed = seeds.integers(2**31, size=num_envs).tolist()
            obs, _ = envs.reset(seed=seed, options={"reset_mask": dones, "time": step, "frozen": True})
        actions = act(q, obs, 0.0, rng.random((num_envs, 2)))
        obs, _, terminations, truncations, infos = envs.step(actions)
        dones = terminations | truncations | (infos["episode"]["l"] >= 1_000)  # a greedy policy may go in circles
        for i in np.flatnonzero(dones & (quota > 0)):
            quota[i] -= 1
            returns.append(float(infos["episode"]["r"][i]))
    return np.array(returns)


def evaluate_run(args: Args) -> str:
    """Plays the greedy policy of a run folder and prints its returns; with args.capture_video one episode is filmed."""
    checkpoint = load_checkpoint(args.evaluate, args)
    refuse_changes(args, checkpoint, "evaluate eval_episodes capture_video cuda seed")
    stop, step = StopRequest(), checkpoint["global_step"] // args.num_envs
    players = min(args.num_envs, args.eval_episodes)
    envs = make_vector_env(args, players, f"{args.evaluate}/videos/evaluate" if args.capture_video else None)
    returns = evaluate(checkpoint["parts"]["agent"]["q_table"].numpy()[:players], envs, args, step, stop)
    envs.close()
    if len(returns):
        single = " ".join(f"{episodic_return:.1f}" for episodic_return in returns)
        print(f"{args.env_id} at step {checkpoint['global_step']}:")
        print(f"return {returns.mean():.1f} +- {returns.std():.1f} ({len(returns)} episodes: {single})")
    stop.exit()
    return args.evaluate


def known_dynamics(envs: gym.vector.VectorEnv):
    """The environment, if it publishes its table P and initial_state_distrib: to measure the model, never to learn."""
    world = getattr(envs.unwrapped, "envs", [envs])[0].unwrapped
    known = isinstance(getattr(world, "P", None), dict) and hasattr(world, "initial_state_distrib")
    return world if known else None


def model_errors(model: Model, P: dict, start: np.ndarray) -> dict[str, float]:
    """The learners' models beside the environment's own table P[s][a] = [(probability, next, reward, terminated)].

    missing: share of the table's outcomes that no visit has shown, in states that can be reached from `start` (S,);
    wrong: share of the model's outcomes that the table does not have, or whose rewards it rules out.
    """
    num_outcomes = max(len(outcomes) for row in P.values() for outcomes in row.values())
    table = np.zeros((*model.pairs.shape[1:], num_outcomes, 4))
    for s, row in P.items():
        for a, outcomes in row.items():
            table[s, a, : len(outcomes)] = outcomes
    real, next_s, reward, terminal = table[..., 0] > 0, table[..., 1].astype(int), table[..., 2], table[..., 3] > 0
    live = np.asarray(start) > 0  # (S,)
    while not live[reached := next_s[live][(real & ~terminal)[live]]].all():
        live[reached] = True

    pairs, outcomes = model.pairs, model.outcomes
    known = np.arange(outcomes.shape[3]) < pairs["num_outcomes"][..., None]  # (N, S, A, K)
    ended, went_on = outcomes["terminations"] > 0, outcomes["count"] > outcomes["terminations"]
    same = (known[..., None] & real[:, :, None]) & (outcomes["next_obs"][..., None] == next_s[:, :, None])
    seen = same & np.where(terminal[:, :, None], ended[..., None], went_on[..., None])
    low, high = np.where(real, reward, np.inf).min(-1) - 1e-9, np.where(real, reward, -np.inf).max(-1) + 1e-9
    wrong = (ended & ~(same & terminal[:, :, None]).any(-1)) | (went_on & ~(same & ~terminal[:, :, None]).any(-1))
    wrong = known & (wrong | ((pairs["reward"] < low) | (pairs["reward"] > high))[..., None])
    missing = (real & ~seen.any(3))[:, live].sum() / (len(pairs) * real[live].sum())
    return {"model/missing": missing, "model/wrong": wrong.sum() / max(known.sum(), 1)}


# === Run: folder, log, checkpoints, Ctrl-C (same text in all five scripts) ===


def fail(message: str) -> NoReturn:
    """One clear line for a mistake of the user's, exit code 2."""
    print(f"error: {message}", file=sys.stderr, flush=True)
    raise SystemExit(2)


def parse_args() -> Args:
    """Command line; with --resume or --evaluate the run's own settings are the defaults."""
    args = tyro.cli(Args)
    if args.resume and args.evaluate:
        fail("--resume or --evaluate, not both")
    folder = args.resume or args.evaluate
    return tyro.cli(Args, default=Args(**load_checkpoint(folder, args)["args"])) if folder else args


def choose_device(args: Args) -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() and args.cuda else "cpu")


def next_multiple(step: int, frequency: int) -> float:
    """The next multiple of a frequency after this step; 0 = never."""
    return (step // frequency + 1) * frequency if frequency else math.inf


def save_checkpoint(run_dir: str, args: Args, global_step: int, parts: dict, rng: dict) -> None:
    """Writes all that a run needs to go on to checkpoint.pt, atomically: a kill at any instant leaves the old file.

    parts: name -> object with state_dict() or plain data; rng: name -> NumPy or torch generator.
    """
    state = {"version": 1, "args": asdict(args) | {"resume": None}, "global_step": global_step, "rng": {}}
    state["parts"] = {name: part.state_dict() if hasattr(part, "state_dict") else part for name, part in parts.items()}
    for name, generator in rng.items():
        is_torch = isinstance(generator, torch.Generator)
        state["rng"][name] = generator.get_state() if is_torch else generator.bit_generator.state
    path = f"{run_dir}/checkpoint.pt"
    try:
        with open(f"{path}.tmp", "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(f"{path}.tmp", path)
    except (OSError, RuntimeError) as error:  # a full disk, above all
        raise SystemExit(f"error: cannot write {path}, the last checkpoint is intact: {error}") from error


def load_checkpoint(run_dir: str, args: Args) -> dict:
    """Reads a run folder's checkpoint (tensors stay on disk until they are used); says in one line if it cannot."""
    path = os.path.join(run_dir, "checkpoint.pt")
    try:
        damaged = zipfile.ZipFile(path).testzip()  # torch does not look at the checksums
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # many types, for a missing, damaged or foreign file
        fail(f"no readable checkpoint at {path} ({type(error).__name__})")
    ours = isinstance(state, dict) and state.get("version") == 1
    if damaged or not ours or set(state.get("args", ())) != {field.name for field in fields(args)}:
        fail(f"{path} is damaged or was written by another script or version")
    return state


def refuse_changes(args: Args, checkpoint: dict, free: str) -> None:
    """Settings of a saved run must be as they were, but for those named in `free`."""
    for name, value in checkpoint["args"].items():
        if name not in free.split() and getattr(args, name) != value:
            fail(f"--{name.replace('_', '-')} {getattr(args, name)} clashes with the saved run, which has {value}")


def require_finite(metrics: dict, global_step: int) -> dict[str, float]:
    """Scalars read from the device; stops the run, last checkpoint intact, if one is not finite."""
    scalars = [torch.as_tensor(value) for value in metrics.values()]
    values = dict(zip(metrics, torch.stack(scalars).tolist(), strict=True)) if metrics else {}  # host sync
    if bad := [name for name, value in values.items() if not math.isfinite(value)]:
        raise SystemExit(f"error: not finite at step {global_step}: {', '.join(bad)}; the last checkpoint is intact")
    return values


class StopRequest:
    """Ctrl-C and SIGTERM ask the loop to stop at its next safe point; a second one stops at once."""

    def __init__(self):
        self.requested = 0
        self.previous = {s: signal.signal(s, self) for s in (signal.SIGINT, signal.SIGTERM)}

    def __call__(self, signum: int, frame) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = signum
        os.write(2, b"\nstopping at the next safe point (again: at once)\n")  # print is not safe here

    def exit(self) -> None:
        """Hands the signals back; ends the process with the usual code if one has come."""
        for signum, handler in self.previous.items():
            signal.signal(signum, handler)
        if self.requested:
            raise SystemExit(128 + self.requested)


class Run:
    """A run and its folder: log, progress bar, checkpoints. `step` counts environment steps, the only x axis."""

    def __init__(self, args: Args, checkpoint: dict | None):
        if checkpoint:
            free = "resume total_timesteps cuda track eval_frequency checkpoint_frequency compile cudagraphs"
            refuse_changes(args, checkpoint, free)
        if args.track:
            try:
                import wandb
            except ImportError:
                fail("--track needs Weights and Biases: pip install wandb")
        name = f"{args.env_id.replace('/', '-')}__{args.exp_name}__{args.seed}__{int(time.time())}"
        self.folder = (args.resume or f"runs/{name}").rstrip("/")
        self.args, self.checkpoint, self.step = args, checkpoint, checkpoint["global_step"] if checkpoint else 0
        try:
            os.makedirs(self.folder, exist_ok=args.resume is not None)
            if args.track:  # before the writer is made, which it listens to
                name = os.path.basename(self.folder)
                wandb.init(project=args.wandb_project_name, entity=args.wandb_entity, name=name, id=name,
                           resume="allow", config=asdict(args), sync_tensorboard=True)  # fmt: skip
            self.writer = SummaryWriter(self.folder, purge_step=self.step + 1 if checkpoint else None)
        except OSError as error:
            fail(f"cannot write the run folder {self.folder}: {error.strerror}")
        table = "\n".join(f"|{name}|{value}|" for name, value in asdict(args).items())
        self.writer.add_text("hyperparameters", f"|param|value|\n|-|-|\n{table}", self.step)
        random.seed(args.seed)
        np.random.seed(args.seed % 2**32)
        torch.manual_seed(args.seed)
        torch.backends.cudnn.deterministic = args.torch_deterministic
        self.device, self.stop = choose_device(args), StopRequest()
        pace = {"mininterval": 0.1 if sys.stderr.isatty() else 30, "miniters": 0}  # a line now and then into a file
        steps = {"total": args.total_timesteps, "initial": self.step, "unit": "step"}
        self.progress = tqdm(**steps, **pace, dynamic_ncols=True)
        self.say = self.progress.write if sys.stderr.isatty() else print  # tqdm's would draw the bar into the file
        self.metrics, self.reported = {}, (self.step, time.perf_counter())
        self.next_eval = next_multiple(self.step, args.eval_frequency)
        self.next_save = next_multiple(self.step, args.checkpoint_frequency) if checkpoint else 0  # a new run at once

    def keep(self, parts: dict, rng: dict) -> None:
        """Names what a checkpoint holds, see save_checkpoint; a resumed run finds its objects as they were saved."""
        self.parts, self.rng = parts, rng
        if not self.checkpoint:
            return
        for name, part in parts.items():
            if hasattr(part, "load_state_dict"):
                part.load_state_dict(self.checkpoint["parts"][name])
        for name, state in self.checkpoint["rng"].items():
            if not isinstance(rng[name], torch.Generator):
                rng[name].bit_generator.state = state
            elif state.shape == rng[name].get_state().shape:
                rng[name].set_state(state)
            else:
                print(f"random generator {name} starts anew: it was saved on another kind of device")

    def goes_on(self, dones: np.ndarray) -> bool:
        """Saves when it is due, with one environment at the end of an episode; False once the run has to end."""
        ending = self.stop.requested or self.step >= self.args.total_timesteps
        if ending or (self.step >= self.next_save and (dones.all() or len(dones) > 1)):
            self.next_save = next_multiple(self.step, self.args.checkpoint_frequency)
            self.report()  # a loss that is not finite must not reach the checkpoint
            self.writer.flush()  # curves without a gap, should the run be killed and resumed
            save_checkpoint(self.folder, self.args, self.step, self.parts, self.rng)
        return not ending

    def eval_due(self) -> bool:
        due = self.step >= self.next_eval and not self.stop.requested
        self.next_eval = next_multiple(self.step, self.args.eval_frequency)
        return due

    def report(self) -> None:
        """Logs self.metrics, which must be finite, and steps per second, once for each environment step."""
        values, (last_step, last_time) = require_finite(self.metrics, self.step), self.reported
        now = time.perf_counter()
        if values and self.step > last_step:
            self.log(values | {"charts/SPS": (self.step - last_step) / (now - last_time)})
            self.reported = self.step, now

    def log(self, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, self.step)

    def log_episodes(self, infos: dict, dones: np.ndarray) -> None:
        """Prints and logs the mean return and length of the episodes that ended at this step."""
        mean, length = infos["episode"]["r"][dones].mean(), infos["episode"]["l"][dones].mean()
        number = f", {dones.sum()} episodes" if dones.sum() > 1 else ""
        self.say(f"global_step={self.step}, episodic_return={mean:.1f}, length={length:.0f}{number}")
        self.progress.set_postfix({"return": f"{mean:.1f}"}, refresh=False)
        self.log({"charts/episodic_return": mean, "charts/episodic_length": length})

    def log_evaluation(self, returns: np.ndarray) -> None:
        self.say(f"global_step={self.step}, eval: {returns.mean():.1f} +- {returns.std():.1f}")
        self.log({"eval/episodic_return": returns.mean(), "eval/episodic_return_std": returns.std()})

    def close(self, weights: dict) -> str:
        """Ends the log, says how to go on, hands the signals back. Returns the run folder."""
        self.progress.close()
        self.writer.close()
        if self.args.save_model:
            torch.save(weights, f"{self.folder}/{self.args.exp_name}.pt")
        script = os.path.basename(__file__)
        print(f"checkpoint at step {self.step}; continue with: python {script} --resume {self.folder}")
        self.stop.exit()
        return self.folder


def check_args(args: Args) -> None:
    """Refuses impossible numbers in one line."""
    at_least = {
        1: "total_timesteps num_envs eval_episodes max_episode_steps report_frequency",
        0: "seed eval_frequency checkpoint_frequency gamma learning_rate epsilon planning_steps kappa theta",
    }
    for bound, names in at_least.items():
        for name in names.split():
            if not getattr(args, name) >= bound:
                fail(f"--{name.replace('_', '-')} must be at least {bound}, not {getattr(args, name)}")
    for name in ("gamma", "learning_rate", "epsilon"):
        if getattr(args, name) > 1:
            fail(f"--{name.replace('_', '-')} must be at most 1, not {getattr(args, name)}")
    if args.prioritized and (args.kappa > 0 or args.planning_steps == 0):
        fail("--prioritized goes with --planning-steps of at least 1 and without --kappa")


if __name__ == "__main__":
    main(parse_args())
