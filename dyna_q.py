# /// script
# requires-python = ">=3.11,<3.15"
# dependencies = [
#     "gymnasium>=1.4", "moviepy>=2.2", "numba>=0.68", "numpy>=2.1", "pygame-ce>=2.5", "tensorboard>=2.20",
#     "torch>=2.6", "tqdm>=4.67", "tyro>=1.0",
# ]
# ///
"""Dyna-Q: a table of action values learned from real steps and, many times more often, from steps of a learned model.

The algorithm, with the functions that are its steps; (a) to (f) as in the box "Tabular Dyna-Q" of S&B:
  (a) s                  the state of the environment
  (b) act                a random action with probability epsilon, else one of the largest Q(s, .)
  (c) envs.step          the environment gives the reward r and the next state s', and says whether that was the end
  (d) dyna_q_step        direct update: Q(s, a) += alpha (r + gamma max Q(s', .) - Q(s, a)), no Q(s', .) after the end
  (e) record             model learning: count that a in s has led to s', and take r into the mean reward
  (f) dyna_q_step        planning, n times: Q(s, a) += alpha (expected_target - Q(s, a)) of a pair (s, a) tried before
Dyna-Q+ (--kappa) adds a bonus to (f) for what was not tried for long. prioritized_sweeping_step (--prioritized) has no
(d) and takes the pairs of (f) by the size of their errors. (d) to (f) are written for one learner; main calls update,
which runs them for all (for_each_learner).

Paper:      Sutton 1990, Integrated Architectures for Learning, Planning, and Reacting, ICML
            Sutton & Barto 2018, Reinforcement Learning, 2nd edition, chapter 8 (cited as S&B)
Run:        python dyna_q.py --env-id FrozenLake-v1          (or: uv run dyna_q.py --env-id FrozenLake-v1)
Resume:     python dyna_q.py --resume runs/<run folder>
Evaluate:   python dyna_q.py --evaluate runs/<run folder> [--capture-video]
Watch:      tensorboard --logdir runs
Look in:    NUMBA_DISABLE_JIT=1 python dyna_q.py             (not compiled: print and breakpoints work everywhere)
Deviations from the book, each also marked at the line it concerns:
  1. The model counts outcomes and planning backs up their expectation (S&B exercise 8.5). Where the world is
     deterministic this is the book's model; --model last is the book's table, which holds the last outcome alone.
  2. Prioritized sweeping takes its priorities from the same expectation.
  3. An episode ends after max_episode_steps, truncated, not terminated: the value of its last state counts.
  4. The time since the last try of Dyna-Q+ counts from the start of the run for what was never tried.
  5. Dyna-Q+ is evaluated by the values of its model without the bonus, which is there to explore.
  6. The book prints no alpha, n and kappa for its changing mazes: alpha is 1 there, n and kappa are yours to set.
It runs on the CPU, compiled: the updates of a learner follow one another, there is nothing to spread over a GPU.
"""

import ast
import contextlib
import difflib
import fcntl
import functools
import glob
import importlib
import inspect
import math
import multiprocessing
import os
import random
import re
import shlex
import signal
import sys
import tempfile
import threading
import time
import warnings
import zipfile
from collections.abc import Callable
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from typing import Annotated, Literal, NamedTuple, NoReturn, get_args, get_origin, get_type_hints

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports below leaves no traceback

import gymnasium as gym
import numpy as np
import torch
import tyro
from numba import njit
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

# What a setting may be: its least and its greatest value.
Count = Annotated[int, 1, 10**9]
Natural = Annotated[int, 0, 10**9]
Seed = Annotated[int, 0, 2**53]
Size = Annotated[int, 1, 2**16]
Share = Annotated[float, 0.0, 1.0]
Part = Annotated[float, 1e-9, 1.0]
Amount = Annotated[float, 0.0, 1e9]


@dataclass
class Args:
    exp_name: str = os.path.basename(__file__)[: -len(".py")]  # name of the experiment, part of the run folder's name
    seed: Seed = 1  # seed of every random generator of the run
    torch_deterministic: bool = True  # ask cuDNN for deterministic algorithms
    cuda: bool = True  # train on the GPU if there is one
    track: bool = False  # also log to Weights and Biases
    wandb_project_name: str = "model-based-rl"  # the project name at Weights and Biases
    wandb_entity: str | None = None  # the team at Weights and Biases
    capture_video: bool = False  # write an MP4 of the first episode of every evaluation into the run folder
    save_model: bool = False  # write the weights alone to {exp_name}.pt in the run folder at the end
    keep_pictures: Count = 10  # pictures and films of each kind that stay in the run folder, the newest
    eval_frequency: Natural = 10_000  # environment steps between evaluations, 0 = none
    eval_episodes: Size = 10  # episodes of one evaluation
    checkpoint_frequency: Natural = 10_000  # environment steps between checkpoints, 0 = only when the run ends
    save_buffer: bool = True  # keep the replay buffer in the checkpoint
    resume: str | None = None  # run folder to continue; auto = the newest of the same script, task and seed, if any
    evaluate: str | None = None  # run folder to evaluate: plays eval_episodes, prints their returns, trains nothing

    # Algorithm specific arguments
    env_id: str = "FrozenLake-v1"  # discrete Gymnasium id, or DynaMaze-v0, BlockingMaze-v0, ShortcutMaze-v0
    total_timesteps: Count = 20_000  # environment steps of the run, summed over all learners: each gets its share
    num_envs: Annotated[int, 1, 10_000] = 1  # learners side by side, independent runs, each with its own environment
    env_kwargs: tuple[str, ...] | None = None  # settings of the environment (map_name=8x8), added to the task's own
    max_episode_steps: Count = 10_000  # environment steps after which an episode is truncated at the latest
    # learning
    gamma: Share | None = None  # discount per step; default by task, 0.99 elsewhere
    learning_rate: Part | None = None  # step size of an update (alpha); default by task, 0.1 elsewhere
    epsilon: Share = 0.1  # share of random actions
    # planning
    planning_steps: Annotated[int, 0, 10**6] = 10  # updates from the model after each real step (n); 0 = Q-learning
    model: Literal["counts", "last"] | None = None  # what is kept of a pair: all outcomes or the last; default by task
    kappa: Amount = 0.0  # Dyna-Q+ if > 0: planning adds kappa * sqrt(steps since an action was tried) to its reward
    prioritized: bool = False  # prioritized sweeping: pairs of largest error first, no direct update
    theta: Amount = 1e-4  # prioritized sweeping: absolute TD errors up to this are not queued
    # logs
    report_frequency: Count = 100  # steps of each environment between reports of losses and model errors


# === Model ===

# Numba's counting of references to arrays is off, which makes the functions below about four times as fast. They make
# no arrays, therefore, and what model_of returns must not leave them.
compiled = njit(_nrt=False)


class Model(NamedTuple):
    """What a learner knows of its world: S states, A actions, room for K outcomes of a pair of state and action.

    It takes the place of a replay buffer. make_model makes it for N learners: every array has N as its first axis.
    """

    visits: np.ndarray  # (S, A) how often the action was taken in the state
    rewards: np.ndarray  # (S, A) mean reward
    next_states: np.ndarray  # (S, A, K) the states that followed, in order of appearance
    counts: np.ndarray  # (S, A, K) how often each of them followed; 0 = no such outcome
    terminations: np.ndarray  # (S, A, K) how often the episode ended with it
    last_tried: np.ndarray  # (S, A) step of the run, 0 = never (deviation 4: as if tried at the start)
    visited: np.ndarray  # (S,) the states in which an action was taken, in order of appearance
    num_visited: np.ndarray  # (1,) length of that list
    tried: np.ndarray  # (S, A) the actions taken in a state, in order of appearance
    num_tried: np.ndarray  # (S,) length of each of these lists
    priority: np.ndarray  # (S * A,) absolute error of pair s * A + a, 0 = not in the queue of prioritized sweeping

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The arrays as tensors that share memory with them."""
        return {name: torch.from_numpy(array) for name, array in self._asdict().items()}


def make_model(num_learners: int, num_states: int, num_actions: int) -> Model:
    """The models of N learners that know nothing. Small types: the CPU's cache is the limit."""
    states = num_learners, num_states
    pairs = *states, num_actions
    outcomes = *pairs, 2  # the last place stays free for what is new; grow doubles them
    return Model(
        visits=np.zeros(pairs, np.int32), rewards=np.zeros(pairs),
        next_states=np.zeros(outcomes, np.int32), counts=np.zeros(outcomes, np.int32),
        terminations=np.zeros(outcomes, np.int32), last_tried=np.zeros(pairs, np.int64),
        visited=np.zeros(states, np.int32), num_visited=np.zeros((num_learners, 1), np.int32),
        tried=np.zeros(pairs, np.int32), num_tried=np.zeros(states, np.int32),
        priority=np.zeros((num_learners, num_states * num_actions)),
    )  # fmt: skip


def grow(model: Model) -> Model:
    """Twice the room for outcomes."""
    lists = {name: getattr(model, name) for name in ("next_states", "counts", "terminations")}
    return model._replace(**{name: np.concatenate([x, np.zeros_like(x)], -1) for name, x in lists.items()})


@compiled
def model_of(models, i):
    """Learner i's part of the arrays."""
    return Model(
        models.visits[i], models.rewards[i], models.next_states[i], models.counts[i], models.terminations[i],
        models.last_tried[i], models.visited[i], models.num_visited[i], models.tried[i], models.num_tried[i],
        models.priority[i],
    )  # fmt: skip


@compiled
def record(model, s, a, reward, next_s, terminated, step, last_alone):
    """Model learning: counts one outcome of a pair (deviation 1); with last_alone it takes the place of all others."""
    if model.visits[s, a] == 0:  # a pair that planning can draw from now on
        if model.num_tried[s] == 0:
            model.visited[model.num_visited[0]] = s
            model.num_visited[0] += 1
        model.tried[s, model.num_tried[s]] = a
        model.num_tried[s] += 1
    if last_alone:
        model.visits[s, a], model.rewards[s, a], model.counts[s, a, 0], model.terminations[s, a, 0] = 0, 0.0, 0, 0
    k = 0
    while model.counts[s, a, k] > 0 and model.next_states[s, a, k] != next_s:
        k += 1  # the last place is always free
    model.next_states[s, a, k] = next_s
    model.counts[s, a, k] += 1
    model.terminations[s, a, k] += terminated
    model.visits[s, a] += 1
    model.rewards[s, a] += (reward - model.rewards[s, a]) / model.visits[s, a]
    model.last_tried[s, a] = step


# === Targets ===


@compiled
def max_value(q, s):
    """max_a Q(s, a)."""
    best = q[s, 0]
    for a in range(1, q.shape[1]):
        best = max(best, q[s, a])
    return best


@njit(_nrt=False, inline="always")  # a third of the time of a call with so many arrays
def expected_target(q, model, s, a, gamma):
    """Deviation 1, expected update of a pair (S&B section 8.5): r + gamma * sum_s' p(s') max_a' Q(s', a').

    Nothing is added beyond a termination. An untried pair leads back to its state with reward 0 (S&B section 8.3).
    """
    if model.visits[s, a] == 0:
        return gamma * max_value(q, s)
    value = 0.0
    for k in range(model.counts.shape[2]):
        if model.counts[s, a, k] == 0:
            break
        went_on = model.counts[s, a, k] - model.terminations[s, a, k]
        value += went_on / model.visits[s, a] * max_value(q, model.next_states[s, a, k])
    return model.rewards[s, a] + gamma * value


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
        best, ties = max_value(q[i], obs[i]), 0
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


class Settings(NamedTuple):
    """The flags that an update needs, in a form that compiled functions take."""

    gamma: float
    learning_rate: float
    planning_steps: int
    kappa: float
    prioritized: bool
    theta: float
    last_alone: bool  # --model last


def make_settings(args: Args) -> Settings:
    return Settings(**{name: getattr(args, name) for name in Settings._fields[:-1]}, last_alone=args.model == "last")


@compiled
def dyna_q_step(q, model, s, a, reward, next_s, terminated, uniforms, step, settings):
    """What follows one real step of one learner: direct update, model learning, planning; changes q and model.

    q (S, A), uniforms (n, 2) random numbers in [0, 1), step of the run counted from 1. Returns the absolute TD error of
    the direct update, the sum of those of planning, and the number of planning updates.
    """
    value = 0.0 if terminated else max_value(q, next_s)
    direct_error = reward + settings.gamma * value - q[s, a]
    q[s, a] += settings.learning_rate * direct_error  # (d)
    record(model, s, a, reward, next_s, terminated, step, settings.last_alone)  # (e)
    planning_error = 0.0
    for j in range(settings.planning_steps):  # (f)
        s = model.visited[int(uniforms[j, 0] * model.num_visited[0])]  # a random one of those visited
        bonus = 0.0
        if settings.kappa > 0:  # Dyna-Q+ (S&B section 8.3): any action, and a bonus for the time since it was tried
            a = int(uniforms[j, 1] * q.shape[1])
            bonus = settings.kappa * math.sqrt(step - model.last_tried[s, a])
        else:
            a = model.tried[s, int(uniforms[j, 1] * model.num_tried[s])]  # a random one of those tried in s
        td_error = bonus + expected_target(q, model, s, a, settings.gamma) - q[s, a]
        q[s, a] += settings.learning_rate * td_error
        planning_error += abs(td_error)
    return abs(direct_error), planning_error, settings.planning_steps


@compiled
def queue(q, model, s, a, settings):
    """Queues a pair by its absolute error if that exceeds theta; one that is queued is raised, never lowered."""
    error = abs(expected_target(q, model, s, a, settings.gamma) - q[s, a])  # deviation 2: an expected priority
    if error > settings.theta:
        pair = s * q.shape[1] + a
        model.priority[pair] = max(error, model.priority[pair])


@compiled
def prioritized_sweeping_step(q, model, s, a, reward, next_s, terminated, uniforms, step, settings):
    """In place of dyna_q_step: the box "Prioritized sweeping" of S&B, without direct update and random numbers.

    The highest priority and what leads to a state are found by looking at all pairs: plain, and for tables fast enough.
    """
    value = 0.0 if terminated else max_value(q, next_s)
    direct_error = reward + settings.gamma * value - q[s, a]
    record(model, s, a, reward, next_s, terminated, step, settings.last_alone)
    queue(q, model, s, a, settings)
    planning_error, num_updates = 0.0, 0
    while num_updates < settings.planning_steps:
        pair = model.priority.argmax()
        if model.priority[pair] == 0:  # the queue is empty
            break
        model.priority[pair] = 0
        s, a = pair // q.shape[1], pair % q.shape[1]
        td_error = expected_target(q, model, s, a, settings.gamma) - q[s, a]
        q[s, a] += settings.learning_rate * td_error
        planning_error += abs(td_error)
        num_updates += 1
        for before, action, k in np.ndindex(model.counts.shape):  # all pairs that are known to lead to s
            if model.counts[before, action, k] > 0 and model.next_states[before, action, k] == s:
                queue(q, model, before, action, settings)
    return abs(direct_error), planning_error, num_updates


def for_each_learner(step_of_one: Callable) -> Callable:
    """One real step of all learners by step_of_one. Made for each of the two: a run compiles only what it uses."""

    @compiled
    def learn(q, models, sums, obs, actions, rewards, next_obs, terminations, uniforms, step, settings):
        """q (N, S, A), transition (N,), uniforms (N, n, 2). Returns whether there must be room for more outcomes."""
        full = False
        for i in range(len(obs)):
            s, a, model = obs[i], actions[i], model_of(models, i)
            transition = s, a, rewards[i], next_obs[i], terminations[i]
            direct, planning, updates = step_of_one(q[i], model, *transition, uniforms[i], step, settings)
            sums[i, 0] += direct
            sums[i, 1] += planning
            sums[i, 2] += updates
            full |= model.counts[s, a, -1] > 0
        return full

    return learn


learn_by_dyna_q = for_each_learner(dyna_q_step)
learn_by_sweeping = for_each_learner(prioritized_sweeping_step)


def update(q, model: Model, sums, transition: tuple, step: int, rng: np.random.Generator, settings: Settings) -> Model:
    """One real step of all learners, which changes q and adds to sums (N, 3). Returns the model, with room for more."""
    learn = learn_by_sweeping if settings.prioritized else learn_by_dyna_q
    uniforms = rng.random((len(q), 0 if settings.prioritized else settings.planning_steps, 2))
    full = learn(q, model, sums, *transition, uniforms, step, settings)
    return grow(model) if full else model


# === Training ===


def main(args: Args) -> str:
    args = with_task_defaults(args)
    check_args(args)
    if args.evaluate is not None:
        return evaluate_run(args)
    checkpoint = load_checkpoint(args.resume, args) if args.resume is not None else None
    rehearse(functools.partial(make_vector_env, args, 1), args.capture_video)
    envs = make_vector_env(args, args.num_envs)
    num_states, num_actions = int(envs.single_observation_space.n), int(envs.single_action_space.n)
    num_bytes = args.num_envs * (100 * num_states * num_actions + 16 * args.planning_steps)
    require_memory(num_bytes, "tables and --planning-steps", torch.device("cpu"))
    run = Run(args, checkpoint)

    # what a checkpoint holds: tables, what is known of the worlds, sums since the last report, generators
    q = np.zeros((args.num_envs, num_states, num_actions))
    model, settings = make_model(*q.shape), make_settings(args)
    sums = np.zeros((args.num_envs, 3))  # absolute TD errors of real steps, those of planning, updates of planning
    rng = {name: np.random.default_rng([args.seed, i]) for i, name in enumerate(("reset", "act", "planning"))}
    if checkpoint:
        with must_fit(run.folder):
            q[:], sums[:] = checkpoint["parts"]["agent"]["q_table"], checkpoint["parts"]["sums"]
            model = load_model(checkpoint["parts"]["replay"]) if args.save_buffer else model
        checkpoint = None  # what refers to the file keeps it on the disk
    parts = {"agent": {"q_table": torch.from_numpy(q)}, "sums": torch.from_numpy(sums)}  # they share memory
    run.keep(parts | ({"replay": model} if args.save_buffer else {}), rng)
    print(f"{run.folder}: {math.ceil(args.total_timesteps / args.num_envs)} steps of each learner ({args.num_envs}), "
          f"{num_states} states, {num_actions} actions, gamma {args.gamma}, alpha {args.learning_rate}, "
          f"{args.model}, {' '.join(args.env_kwargs)}")  # fmt: skip

    envs.unwrapped.on_fault = run.abort
    dones, step = np.ones(args.num_envs, bool), run.step // args.num_envs
    eval_envs, world = None, known_dynamics(envs)

    while True:
        if run.eval_due(dones):
            eval_envs = evaluate_and_log(q, model, eval_envs, run, step)
        if not run.goes_on(dones):
            break
        if dones.any():
            seeds = rng["reset"].integers(2**31, size=args.num_envs).tolist()
            obs, _ = envs.reset(seed=seeds, options={"reset_mask": dones, "time": step})
        actions = act(q, obs, args.epsilon, rng["act"].random((args.num_envs, 2)))
        next_obs, rewards, terminations, truncations, infos = envs.step(actions)
        step, run.step = step + 1, run.step + args.num_envs
        transition = obs, actions, rewards, next_obs, terminations
        model = update(q, model, sums, transition, step, rng["planning"], settings)
        if args.save_buffer:
            run.parts["replay"] = model  # it may have grown
        obs, dones = next_obs, terminations | truncations
        run.progress.update(args.num_envs)
        if dones.any():
            run.log_episodes(infos, dones)
        if step % args.report_frequency == 0:
            report(model, sums, world, step, run)

    if step % args.report_frequency and run.step > run.reported[0]:
        report(model, sums, world, step, run)  # the rest; what was saved has the sums that a resumed run goes on with
    if arrows := draw_policy(values_to_play(q[:1], model, args)[0], envs):
        run.say(f"what the first learner would do:\n{arrows}")
    envs.close()
    if eval_envs is not None:
        eval_envs.close()
    return run.close(parts["agent"])


# === Environment ===


LATE_IMPORTS = []  # packages that are imported where they are used

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
# Counts would remember walls that are gone; alpha is that of other implementations (deviation 6: the book prints none).
CHANGING = {"gamma": 0.95, "learning_rate": 1.0, "model": "last"}
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
    env_id = {name.rpartition("-v")[0]: name for name in TASKS}.get(args.env_id, args.env_id)
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
        self.max_episode_steps = max_episode_steps
        self.returns, self.lengths = np.zeros(envs.num_envs), np.zeros(envs.num_envs, np.int64)

    def reset(self, *, seed=None, options=None):
        self.returns[options["reset_mask"]] = 0
        self.lengths[options["reset_mask"]] = 0
        return self.env.reset(seed=seed, options=options)

    def step(self, actions):
        obs, rewards, terminations, truncations, infos = self.env.step(actions)
        self.returns += rewards
        self.lengths += 1
        truncations = truncations | (self.lengths >= self.max_episode_steps)  # deviation 3
        return obs, rewards, terminations, truncations, infos | {"episode": {"r": self.returns, "l": self.lengths}}


def side_by_side(env_id: str, thunks: list[Callable[[], gym.Env]], workers: bool = True) -> gym.vector.VectorEnv:
    """Environments, with workers several in a process each. The caller resets them, each episode with a seed.

    A fault of theirs is told to `on_fault` in one line: `fail`, until there is a run that can be saved (Run.abort).
    """
    mode = gym.vector.AutoresetMode.DISABLED
    if len(thunks) == 1 or not workers:
        envs = gym.vector.SyncVectorEnv(thunks, autoreset_mode=mode)
    else:
        packages = ["torch._dynamo", "torch.utils.tensorboard", "gymnasium", "tyro"]
        multiprocessing.set_forkserver_preload(packages)  # once for all
        envs = gym.vector.AsyncVectorEnv(thunks, context="forkserver", autoreset_mode=mode)
        warnings.filterwarnings("ignore", ".*ERROR: ")  # Gymnasium's own account of a worker's fault

    def call(method: Callable, *args, **kwargs):
        try:
            return method(*args, **kwargs)
        except Exception as error:  # an environment may raise anything, and its process may die
            envs.closed = True  # they cannot be any more
            for process in getattr(envs, "processes", ()):
                process.kill()
            envs.on_fault(f"{env_id}: {str(error) or 'the process of an environment has died'}")

    envs.on_fault = fail
    for name in {"reset", "step", "step_async", "step_wait", "close"} & set(dir(envs)):
        setattr(envs, name, functools.partial(call, getattr(envs, name)))
    return envs


def rehearse(make_envs: Callable, film: bool, masks: bool = False) -> None:
    """Plays one step, filmed if films are asked for: what cannot work is said before there is a run folder.

    make_envs(video=path or None): one environment; masks: whether the script obeys action masks in info.
    """
    with tempfile.TemporaryDirectory() as folder:
        envs = make_envs(video=f"{folder}/film.mp4" if film else None)
        _, infos = envs.reset(seed=[0], options={"reset_mask": np.ones(1, bool)})
        if "action_mask" not in infos:
            envs.action_space.seed(0)
            envs.step(envs.action_space.sample())
        elif not masks:
            print("warning: this environment has action masks, which this script does not obey", file=sys.stderr)
        for env in getattr(envs.unwrapped, "envs", ()):
            spec = gym.registry.get(getattr(env.unwrapped.spec, "id", None))
            if spec and spec.max_episode_steps is None and (limit := env.spec.max_episode_steps):
                print(f"{spec.id} has no time limit: episodes are truncated after {limit} steps (--max-episode-steps)")
        envs.close()
        if film and not os.listdir(folder):
            fail("a film could not be written (is OpenGL there? apt-get install -y libegl1 libgl1)")


class CheckedEnv(gym.Wrapper):
    """An environment that raises one line, with its step, where it fails or returns what it may not.

    Observations must have the form of their space, rewards be numbers, both finite. Of info only KEPT is passed on.
    """

    KEPT = "action_mask", "x_velocity"

    def __init__(self, env: gym.Env, masks: bool = False):
        super().__init__(env)
        self.steps, self.masks = 0, masks  # does the script obey action masks?

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        return self.checked("reset", (), lambda: self.env.reset(seed=seed))

    def step(self, action):
        self.steps += 1
        return self.checked("step", ("reward", "terminated", "truncated"), lambda: self.env.step(action))

    def close(self) -> None:
        """What fails or does not return within five seconds is a warning."""
        handler = signal.signal(signal.SIGALRM, too_long)
        pending = signal.setitimer(signal.ITIMER_REAL, 5)
        warn_of_failure(super().close)
        if signal.getitimer(signal.ITIMER_REAL)[1] == 0:  # else a StopRequest has set its own meanwhile
            signal.setitimer(signal.ITIMER_REAL, *pending)
        signal.signal(signal.SIGALRM, handler)

    def checked(self, method: str, names: tuple, play: Callable) -> tuple:
        """What play() returned: observation, numbers of these names, info."""
        try:
            obs, *numbers, info = play()
            obs = in_form(obs, self.observation_space)
            numbers = [finite(name, number, ()).item() for name, number in zip(names, numbers, strict=True)]
            kept = {name: info[name] for name in self.KEPT if info.get(name) is not None}
            if self.masks and "action_mask" in kept:
                kept["action_mask"] = finite("action_mask", kept["action_mask"], (self.action_space.n,))
            return obs, *numbers, kept
        except (Exception, SystemExit) as error:  # an environment may raise anything, and call sys.exit
            returned = ", ".join(["observation", *names, "info"])
            raise gym.error.Error(f"step {self.steps}: {one_line(error)} ({method} must return {returned})") from error


def too_long(signum: int, frame) -> NoReturn:
    raise TimeoutError("the environment does not return")


def in_form(obs, space: gym.Space, is_part: bool = False):
    """The observation, its numbers as arrays; raises ValueError where it is not finite or not of the space's form.

    Numbers may leave the bounds of a Box. Those of a part must fit its type, to which flattening will cast them.
    """
    if isinstance(space, gym.spaces.Box):
        array = finite("observation", obs, space.shape)
        if is_part and not np.can_cast(array.dtype, space.dtype):
            raise ValueError(f"observation {obs} is not in {space}")
        return array
    if isinstance(space, gym.spaces.Dict) and isinstance(obs, dict) and obs.keys() == space.spaces.keys():
        return {name: in_form(obs[name], part, True) for name, part in space.spaces.items()}
    if isinstance(space, gym.spaces.Tuple) and isinstance(obs, tuple | list | np.ndarray) and len(obs) == len(space):
        return tuple(in_form(part_obs, part, True) for part_obs, part in zip(obs, space.spaces, strict=True))
    if not space.contains(obs):
        raise ValueError(f"observation {obs} is not in {space}")
    return (obs[0], in_form(obs[1], space.spaces[obs[0]], True)) if isinstance(space, gym.spaces.OneOf) else obs


def finite(name: str, value, shape: tuple) -> np.ndarray:
    """The value as an array of that shape; raises ValueError if it is another one, or not finite (1e10 is absurd)."""
    array = np.asarray(value)
    if array.dtype.kind not in "fiub" or array.size != math.prod(shape) or (shape and array.shape != shape):
        raise ValueError(f"{name} must be numbers of shape {shape}, not {array.dtype} of shape {array.shape}")
    if array.itemsize > 1 and not (np.abs(array) < np.float32(1e10)).all():  # a byte always is
        raise ValueError(f"{name} is not finite, or absurd: {array}")
    return array.reshape(shape)


class Film(gym.wrappers.RecordVideo):
    """MP4 of an environment's first episode; what cannot be written is a line, not the end of the run."""

    def __init__(self, env: gym.Env, path: str):
        folder, name = os.path.split(path.removesuffix(".mp4"))
        with warnings.catch_warnings(action="ignore"):  # that there are films in the folder
            super().__init__(env, folder, lambda episode: episode == 0, name_prefix=name, disable_logger=True)

    def _capture_frame(self) -> None:
        frames = len(self.recorded_frames)
        warn_of_failure(super()._capture_frame)
        if len(self.recorded_frames) == frames:
            self.recording, self.recorded_frames = False, []

    def stop_recording(self) -> None:
        warn_of_failure(super().stop_recording)
        self.recording, self.recorded_frames = False, []


def make_gymnasium(env_id: str, **settings) -> gym.Env:
    """Any registered Gymnasium environment, or one that a module of the user's registers (my_module:MyEnv-v0)."""
    sys.path += [os.getcwd()] * (os.getcwd() not in sys.path)  # where a user's module lies
    os.environ.setdefault("SDL_VIDEODRIVER", "dummy")  # pictures need no window
    try:
        env = gym.make(env_id, disable_env_checker=True, **settings)  # CheckedEnv says it in one line
        renderer = getattr(env.unwrapped, "mujoco_renderer", None)
        if getattr(renderer, "camera_id", None) == -1:  # a view that stands still: the camera that follows, if any
            cameras = [renderer.model.camera(i).name for i in range(renderer.model.ncam)]
            renderer.camera_id = cameras.index("track") if "track" in cameras else -1
        return env
    except gym.error.UnregisteredEnv as error:
        close = ", ".join(difflib.get_close_matches(env_id, gym.registry, n=3, cutoff=0.5)) or "none"
        yours = f"a module of yours is named before it, my_module:{env_id.split(':')[-1]}"
        fail(f"cannot make {env_id!r}: {str(error).splitlines()[0]} Close: {close}; {yours}")
    except (Exception, SystemExit) as error:  # many types, by environment and settings
        where = f" (modules are looked for in {os.getcwd()} and PYTHONPATH)" if isinstance(error, ImportError) else ""
        fail(f"cannot make {env_id!r} with {settings}: {one_line(error)}{where}")


def make_env(args: Args, video: str | None = None) -> Callable[[], gym.Env]:
    """Thunk of one environment; observations and actions are counted from 0."""

    def thunk() -> gym.Env:
        film = {"render_mode": "rgb_array"} if video else {}
        env = make_gymnasium(args.env_id, **film, **parse_kwargs(args))
        env = env if args.env_id in MAZES else CheckedEnv(env)  # which a maze, with its options, does not need
        obs, action = env.observation_space, env.action_space
        if isinstance(obs, gym.spaces.Discrete) and obs.start:
            env = gym.wrappers.TransformObservation(env, lambda o: o - obs.start, gym.spaces.Discrete(obs.n))
        if isinstance(action, gym.spaces.Discrete) and action.start:
            env = gym.wrappers.TransformAction(env, lambda a: a + action.start, gym.spaces.Discrete(action.n))
        return Film(env, video) if video else env

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
    """The task's environments side by side; the first episode of the first is filmed into `video`, path of an MP4."""
    register_mazes()
    if args.env_id in MAZES and not video:
        envs = MazeVector(num_envs, **make_gymnasium(args.env_id, **parse_kwargs(args)).spec.kwargs)
    else:
        thunks = [make_env(args, video if i == 0 else None) for i in range(num_envs)]
        envs = side_by_side(args.env_id, thunks, workers=False)
    for kind, space in (("observations", envs.single_observation_space), ("actions", envs.single_action_space)):
        if not isinstance(space, gym.spaces.Discrete):
            fail(f"{args.env_id}: {kind} must be Discrete, not {space}")
    return EpisodeStatistics(envs, args.max_episode_steps)


# === Evaluation ===


def evaluate(q: np.ndarray, envs: gym.vector.VectorEnv, args: Args, step: int, stop: "StopRequest") -> tuple:
    """Plays args.eval_episodes greedy episodes, dealt to the first learners, in the world as it is at this step.

    q (N, S, A) of as many learners as there are environments. Seeds of its own: training does not notice. Returns the
    returns (episodes,) and the first learner's episodes, each a list of its steps (s, a, r, s').
    """
    rng, seeds, num_envs = np.random.default_rng([args.seed, 98]), np.random.default_rng([args.seed, 99]), len(q)
    quota = np.bincount(np.arange(args.eval_episodes) % num_envs)  # fixed, so that short episodes do not win
    returns, episodes, dones = [], [], np.ones(num_envs, bool)
    while quota.any() and not stop.requested:
        if dones.any():
            seed = seeds.integers(2**31, size=num_envs).tolist()
            obs, _ = envs.reset(seed=seed, options={"reset_mask": dones, "time": step, "frozen": True})
            episodes += [[]] if dones[0] else []
        actions = act(q, obs, 0.0, rng.random((num_envs, 2)))
        next_obs, rewards, terminations, truncations, infos = envs.step(actions)
        episodes[-1].append((obs[0], actions[0], rewards[0], next_obs[0]))
        obs, dones = next_obs, terminations | truncations | (infos["episode"]["l"] >= 1_000)  # it may go in circles
        for i in np.flatnonzero(dones & (quota > 0)):
            quota[i] -= 1
            returns.append(float(infos["episode"]["r"][i]))
    return np.array(returns), episodes


def evaluate_and_log(q: np.ndarray, model: Model, envs: gym.vector.VectorEnv | None, run: "Run", step: int):
    """Evaluates and logs at this step of each learner. Returns the environments for the next time; None: made anew."""
    args = run.args
    q = values_to_play(q[: args.eval_episodes], model, args)
    if envs is None:
        video = run.picture("videos/evaluation.mp4") if args.capture_video else None
        envs = run.make_envs(make_vector_env, args, len(q), video)
        envs.unwrapped.on_fault = run.abort
    returns, episodes = evaluate(q, envs, args, step, run.stop)
    if not run.stop.requested:
        run.log_evaluation(returns)
        warn_of_failure(log_open_loop, model, episodes, run)
    if args.capture_video:  # the film is written when its environment closes
        envs.close()
        return None
    return envs


def open_loop(model: Model, i: int, s: int, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What learner i's model alone says of actions (K,) from s on: where each leads, (K, S), and its mean reward, (K,).

    What has ended is nowhere; an untried pair leads back to its state with reward 0, as in expected_target.
    """
    belief, places, rewards = np.eye(1, model.visits.shape[1], s)[0], [], []
    for a in actions:
        here, stays = np.flatnonzero(belief), np.zeros_like(belief)  # few of many states
        visits, counts, weights = model.visits[i, here, a], model.counts[i, here, a], belief[here]
        stays[here] = np.where(visits == 0, weights, 0)
        share = (weights / np.maximum(visits, 1))[:, None]
        arrive = functools.partial(np.bincount, model.next_states[i, here, a].ravel(), minlength=len(belief))
        places.append(stays + arrive((share * counts).ravel()))
        rewards.append(weights @ model.rewards[i, here, a])
        belief = stays + arrive((share * (counts - model.terminations[i, here, a])).ravel())
    return np.array(places), np.array(rewards)


def log_open_loop(model: Model, episodes: list[list[tuple]], run: "Run") -> None:
    """Errors of the first learner's model k steps ahead: 1 - probability of the state that came; absolute, of rewards.

    Stretches of 25 steps, one behind the other, at most 100; of as many as the longest episode has, if it is shorter.
    """
    length, errors = min(25, max(map(len, episodes))), []
    pieces = [steps[t : t + length] for steps in episodes for t in range(0, len(steps) - length + 1, length)]
    for piece in pieces[:100]:
        if run.tick("open loop"):
            return
        states, actions, rewards, next_states = map(np.array, zip(*piece, strict=True))
        places, expected = open_loop(model, 0, states[0], actions)
        errors.append((1 - places[np.arange(length), next_states], np.abs(expected - rewards)))
    for k, (obs_error, reward_error) in enumerate(np.mean(errors, 0).T, 1):
        run.log({f"open_loop/obs_error_{k}": obs_error, f"open_loop/reward_error_{k}": reward_error})


def load_model(state: dict[str, torch.Tensor]) -> Model:
    """The inverse of Model.state_dict, in memory of its own."""
    return Model(**{name: tensor.numpy().copy() for name, tensor in state.items()})


def evaluate_run(args: Args) -> str:
    """Plays the greedy policy of a run folder and prints its returns; with args.capture_video one episode is filmed."""
    checkpoint = load_checkpoint(args.evaluate, args)
    refuse_changes(args, checkpoint, "evaluate eval_episodes capture_video cuda seed")
    stop, step = StopRequest(), checkpoint["global_step"] // args.num_envs
    players = min(args.num_envs, args.eval_episodes)
    envs = make_vector_env(args, players, f"{args.evaluate}/videos/evaluate.mp4" if args.capture_video else None)
    q = np.zeros((players, envs.single_observation_space.n, envs.single_action_space.n))
    with must_fit(args.evaluate):
        q[:] = checkpoint["parts"]["agent"]["q_table"][:players]
        if "replay" in checkpoint["parts"]:
            q = values_to_play(q, load_model(checkpoint["parts"]["replay"]), args)
        elif args.kappa > 0:
            print("the model was not saved: what is played is greedy in the table with the bonus (deviation 5)")
    returns, _ = evaluate(q, envs, args, step, stop)
    envs.close()
    if not stop.requested:
        single = " ".join(f"{episodic_return:.1f}" for episodic_return in returns)
        print(f"{args.env_id} at step {checkpoint['global_step']}:")
        print(f"return {returns.mean():.1f} +- {returns.std():.1f} ({len(returns)} episodes: {single})")
    stop.exit()
    return args.evaluate


def values_to_play(q: np.ndarray, model: Model, args: Args) -> np.ndarray:
    """The tables (N, S, A) to be evaluated, of the first N learners; those of Dyna-Q+ without the bonus (deviation 5).

    Greedy in a table with the bonus, one goes to what was not tried for long, for ever while the clock stands still.
    """
    if args.kappa > 0:
        q = np.zeros_like(q)
        iterate_values(q, model, args.gamma)
    return q


@compiled
def iterate_values(q, models, gamma):
    """Value iteration on each learner's model: expected updates of the known pairs of q until none changes."""
    for i in range(len(q)):
        model, change, sweeps = model_of(models, i), 1.0, 0
        while change > 1e-9 and sweeps < 1_000:
            change, sweeps = 0.0, sweeps + 1
            for s, a in np.ndindex(model.visits.shape):
                if model.visits[s, a] > 0:
                    value = expected_target(q[i], model, s, a, gamma)
                    change, q[i, s, a] = max(change, abs(value - q[i, s, a])), value


ARROWS = {"MazeVector": "^v<>", "FrozenLakeEnv": "<v>^", "CliffWalkingEnv": "^>v<"}  # of actions 0 to 3


def draw_policy(q: np.ndarray, envs: gym.vector.VectorEnv) -> str:
    """The greedy actions of a table (S, A) as arrows, for mazes, lakes and cliffs; . where all actions are as good."""
    world = getattr(envs.unwrapped, "envs", [envs])[0].unwrapped
    if type(world).__name__ not in ARROWS:
        return ""
    if hasattr(world, "shape"):  # the cliff, C, in its last row, from the start to the goal
        cells = np.full(world.shape, ".")
        cells[-1, 1:-1], cells[-1, -1] = "C", "G"
    else:
        cells = world.desc.astype(str) if hasattr(world, "desc") else world.grids[world.layout].copy()
    arrows = np.array(list(ARROWS[type(world).__name__]))[q.argmax(1)].reshape(cells.shape)
    known = (q.max(1) > q.min(1)).reshape(cells.shape) & ~np.isin(cells, ["#", "G", "H", "C"])
    cells = np.where(known, arrows, np.where(np.isin(cells, ["S", "F"]), ".", cells))
    return "\n".join(" ".join(row) for row in cells)


def known_dynamics(envs: gym.vector.VectorEnv) -> gym.Env | None:
    """The environment, if it publishes P[s][a] = [(probability, next, reward, terminated)] and where it begins."""
    world = getattr(envs.unwrapped, "envs", [envs])[0].unwrapped
    S, A = int(envs.single_observation_space.n), int(envs.single_action_space.n)
    try:  # to measure the model, never to learn
        P = world.P  # of a maze it is made here
        outcomes = [outcome for s in range(S) for a in range(A) for outcome in P[s][a]]
        fits = all(len(outcome) == 4 and outcome[1] in range(S) for outcome in outcomes)
        return world if fits and len(world.initial_state_distrib) == S else None
    except (AttributeError, LookupError, TypeError):  # no P, or one of another form
        return None


@functools.lru_cache(maxsize=1)
def read_table(world: gym.Env, layout: int) -> tuple[np.ndarray, np.ndarray]:
    """The environment's P as (S, A, B, 4), and which states (S,) can be reached; once for each layout of a maze.

    An outcome of probability 0 is none.
    """
    P, new, reached = world.P, set(np.flatnonzero(world.initial_state_distrib).tolist()), set()
    S, A = len(world.initial_state_distrib), len(P[0])
    table = np.zeros((S, A, max(len(P[s][a]) for s in range(S) for a in range(A)), 4))
    for s, a in np.ndindex(S, A):
        table[s, a, : len(P[s][a])] = P[s][a]
    while new:
        reached |= new
        new = {n for s in new for a in range(A) for p, n, _, end in P[s][a] if p > 0 and not end} - reached
    return table, np.isin(np.arange(S), list(reached))


def report(model: Model, sums: np.ndarray, world: gym.Env | None, step: int, run: "Run") -> None:
    """TD errors since the last report, and the model beside the environment's own table, if it has one."""
    args, (direct, planning, updates) = run.args, sums.sum(0)
    steps = (step - 1) % args.report_frequency + 1  # since the last report
    run.metrics = {"losses/td_error": direct / steps / args.num_envs}
    run.metrics |= {"model/planning_td_error": planning / max(updates, 1)}
    run.metrics |= {"model/states_visited": model.num_visited.mean()}
    if world is not None:
        run.metrics |= model_errors(model, *read_table(world, getattr(world, "layout", 0)))
    run.report()
    run.metrics, sums[:] = {}, 0


def model_errors(model: Model, table: np.ndarray, reached: np.ndarray) -> dict[str, float]:
    """The learners' models beside the environment's own table, see read_table.

    missing: share of the table's outcomes that no visit has shown, in states that can be reached;
    wrong: share of the model's outcomes that the table does not have, or whose rewards it rules out.
    """
    real, next_s, reward, terminal = table[..., 0] > 0, table[..., 1], table[..., 2], table[..., 3] > 0  # (S, A, B)
    low, high = np.where(real, reward, np.inf).min(-1) - 1e-9, np.where(real, reward, -np.inf).max(-1) + 1e-9
    bad_reward = (model.rewards < low) | (model.rewards > high)  # (N, S, A)
    shown = np.zeros((len(model.visits), *real.shape), bool)  # (N, S, A, B)
    num_known = num_wrong = 0
    for k in range(model.counts.shape[-1]):  # an outcome of the model beside each of the table
        known, ended = model.counts[..., k] > 0, model.terminations[..., k] > 0
        went_on, can_end, can_go_on = model.counts[..., k] > model.terminations[..., k], False, False
        for b in range(real.shape[-1]):
            same = known & real[..., b] & (model.next_states[..., k] == next_s[..., b])
            shown[..., b] |= same & np.where(terminal[..., b], ended, went_on)
            can_end, can_go_on = can_end | (same & terminal[..., b]), can_go_on | (same & ~terminal[..., b])
        num_known += known.sum()
        num_wrong += (known & (bad_reward | (ended & ~can_end) | (went_on & ~can_go_on))).sum()
    missing = (real & ~shown)[:, reached].sum() / (len(shown) * real[reached].sum())
    return {"model/missing": missing, "model/wrong": num_wrong / max(num_known, 1)}


# === Run: folder, log, checkpoints, signals (same text in every script) ===


def fail(message: str) -> NoReturn:
    """One clear line for a mistake of the user's, exit code 2."""
    print(f"error: {message}", file=sys.stderr, flush=True)
    raise SystemExit(2)


def one_line(error: BaseException) -> str:
    """What an exception says, in the first of its lines."""
    return f"{type(error).__name__}: {str(error).strip()}".strip(": ").splitlines()[0]


def warn_of_failure(function: Callable, *args) -> None:
    """Makes what no run depends on, such as a picture: a failure is one line."""
    try:
        function(*args)
    except Exception as error:
        with contextlib.suppress(OSError):  # nobody may be there to read it
            print(f"warning: {function.__name__} failed: {one_line(error)}", file=sys.stderr)


@contextlib.contextmanager
def must_fit(folder: str):
    """Around what takes a checkpoint apart: if its inside is not what its outside says, this is one line."""
    try:
        yield
    except Exception as error:  # many types
        fail(f"{folder}/checkpoint.pt does not fit this script, or its environment has changed: {one_line(error)}")


def print_exception(kind: type, error: BaseException, trace, thread=None) -> None:
    """What ends the program or a thread: a failure of disk, memory or another process in one line; else as usual."""
    words = " allocate ", "Connection closed", "Connection reset"  # of NumPy and PyTorch
    if issubclass(kind, OSError) or any(said in str(error) for said in words):
        if thread is None:  # TensorBoard's threads fail for the main thread, too
            print(f"\nerror: {one_line(error)}; the last checkpoint stays as it is", file=sys.stderr)
    elif kind is not KeyboardInterrupt:  # a second request to stop
        sys.__excepthook__(kind, error, trace)


def check_bounds(args: Args) -> None:
    """Refuses in one line what is out of the bounds beside a setting (nan is), names of no file, a missing package."""
    for name in LATE_IMPORTS + ["wandb"] * args.track + ["moviepy"] * args.capture_video:
        try:
            importlib.import_module(name)
        except Exception as error:  # it may be missing, broken, or made for another version of another one
            fail(f"cannot import {name} ({one_line(error)}): pip install {name.replace('PIL', 'pillow')}")
    if re.fullmatch(r"[\w.+-]+", args.exp_name) is None or args.exp_name == "checkpoint":
        fail(f"--exp-name {args.exp_name!r} must be made of letters, digits and _.+-, and not be 'checkpoint'")
    for name, hint in get_type_hints(Args, include_extras=True).items():
        value = getattr(args, name)
        if type(None) in get_args(hint):  # Count | None
            hint = get_args(hint)[0]
        pairs = zip(get_args(hint), value, strict=False) if isinstance(value, tuple) else [(hint, value)]
        for kind, number in pairs:
            low, high = getattr(kind, "__metadata__", (None, None))
            if None not in (low, number) and not low <= number <= high:
                fail(f"--{name.replace('_', '-')} must be at least {low} and at most {high}, not {value}")


def require_memory(num_bytes: float, setting: str, device: torch.device) -> None:
    """Refuses in one line what the device has no room for, before it is made."""
    if device.type == "cuda":
        room = torch.cuda.mem_get_info(device)[0]
    else:
        room = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        with contextlib.suppress(OSError, TypeError), open("/proc/meminfo") as file:  # what of it is not in use
            room = 1024 * int(re.search(r"MemAvailable: *(\d+)", file.read())[1])
        with contextlib.suppress(OSError, ValueError), open("/sys/fs/cgroup/memory.max") as file:  # of a container
            room = min(room, int(file.read()))
    if num_bytes > room:
        fail(f"{setting}: {num_bytes / 1e9:.1f} GB do not fit into the free {room / 1e9:.1f} GB of {device}")


def parse_args() -> Args:
    """Command line; with --resume or --evaluate the run's own settings are the defaults."""
    sys.excepthook, threading.excepthook = print_exception, lambda hook: print_exception(*hook)
    args = tyro.cli(Args)
    if args.resume == "auto":
        found = glob.glob(f"{glob.escape(folder_name(with_task_defaults(args)))}__*/checkpoint.pt")
        args = replace(args, resume=max(found, key=os.path.getmtime, default=None))
    given = {name: getattr(args, name) for name in ("resume", "evaluate") if getattr(args, name) is not None}
    if len(given) == 2:
        fail("--resume or --evaluate, not both")
    for name, folder in given.items():
        folder = os.path.normpath(folder.removesuffix("checkpoint.pt"))  # "" is no folder that was forgotten
        saved = load_checkpoint(folder, args, verify=False)["args"]
        args = replace(tyro.cli(Args, default=Args(**saved)), **{name: folder})
    return args


def choose_device(args: Args) -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() and args.cuda else "cpu")


def next_multiple(step: int, frequency: int) -> float:
    """The next multiple of a frequency after this step; 0 = never."""
    return (step // frequency + 1) * frequency if frequency else math.inf


def write_file(path: str, state: dict) -> None:
    """torch.save, atomically: a kill at any instant leaves the old file, a failure no half of the new one."""
    try:
        with open(f"{path}.tmp", "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(f"{path}.tmp", path)
    except (OSError, RuntimeError) as error:  # a full disk, above all, which torch puts behind an error of its own
        cause = error.__context__ if isinstance(error.__context__, OSError) else error
        raise SystemExit(f"\nerror: cannot write {path}, the last checkpoint stays as it is: {cause}") from error
    finally:
        with contextlib.suppress(OSError):
            os.remove(f"{path}.tmp")


def save_checkpoint(run_dir: str, args: Args, global_step: int, parts: dict, rng: dict) -> None:
    """Writes all that a run needs to go on to checkpoint.pt.

    parts: name -> object with state_dict() or plain data; rng: name -> NumPy or torch generator.
    """
    state = {"version": 3, "args": asdict(args) | {"resume": None}, "global_step": global_step, "rng": {}}
    state["parts"] = {name: part.state_dict() if hasattr(part, "state_dict") else part for name, part in parts.items()}
    for name, generator in rng.items():
        is_torch = isinstance(generator, torch.Generator)
        state["rng"][name] = generator.get_state() if is_torch else generator.bit_generator.state
    write_file(f"{run_dir}/checkpoint.pt", state)


def load_checkpoint(run_dir: str, args: Args, verify: bool = True) -> dict:
    """Reads a run folder's checkpoint (tensors stay on disk until they are used); says in one line if it cannot."""
    path = os.path.join(run_dir, "checkpoint.pt")
    try:
        inode = os.stat(path).st_ino
        damaged = verify and zipfile.ZipFile(path).testzip()  # torch does not look at the checksums
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # many types, for a missing, damaged or foreign file
        fail(f"no readable checkpoint at {path} ({type(error).__name__})")
    kinds, hints = {"version": int, "args": dict, "global_step": int, "parts": dict, "rng": dict}, get_type_hints(Args)
    ours = isinstance(state, dict) and all(isinstance(state.get(name), kind) for name, kind in kinds.items())
    saved = state["args"] if ours and state["version"] == 3 else {}
    if damaged or set(saved) != set(hints) or not all(is_a(saved[name], hint) for name, hint in hints.items()):
        fail(f"{path} is damaged or was written by another script or version")
    return state | {"inode": inode}


def is_a(value, hint) -> bool:
    """Whether a setting's value is of its type; what is inside a tuple check_bounds looks at."""
    kind, inner = get_origin(hint) or hint, get_args(hint)
    if type(None) in inner:  # Count | None
        return value is None or is_a(value, inner[0])
    if inner and kind is not tuple:  # Literal
        return value in inner
    return isinstance(value, int | float if kind is float else kind)


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
        raise SystemExit(f"\nerror: not finite at step {global_step}: {', '.join(bad)}; the last checkpoint is intact")
    return values


def folder_name(args: Args) -> str:
    """runs/<task>__<script>__<seed>, in letters that every file system takes; a run's folder ends in its time."""
    return "runs/" + re.sub(r"[^\w.+-]", "-", f"{args.env_id}__{args.exp_name}__{args.seed}")


def new_folder(args: Args) -> str:
    """Makes the folder of a new run."""
    name = f"{folder_name(args)}__{int(time.time())}"
    while True:
        try:
            os.makedirs(name)
            return name
        except FileExistsError:  # runs that begin in the same second
            name += "+"


class StopRequest:
    """Ctrl-C, SIGTERM, SIGHUP and SIGUSR1 ask the loop to stop at its next safe point; a second one stops at once.

    An environment that keeps the loop from getting there is given up after five seconds.
    """

    def __init__(self):
        self.requested, self.since = 0, -math.inf  # the signal, and when it came
        signals = signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1
        heard = [s for s in signals if signal.getsignal(s) is not signal.SIG_IGN]  # nohup has SIGHUP ignored
        self.previous = {s: signal.signal(s, self) for s in heard}
        self.previous[signal.SIGALRM] = signal.signal(signal.SIGALRM, self.give_up)

    def __call__(self, signum: int, frame) -> None:
        if self.requested and time.monotonic() < self.since + 0.5:  # handed on by a launcher such as uv, too
            return
        if self.requested:
            raise KeyboardInterrupt
        self.requested, self.since = signum, time.monotonic()
        with contextlib.suppress(OSError):  # the terminal may be gone
            os.write(2, b"\nstopping at the next safe point (again: at once)\n")  # print is not safe here
        signal.setitimer(signal.ITIMER_REAL, 5, 1)  # seconds until the first alarm, and between alarms

    def give_up(self, signum: int, frame) -> None:
        """An alarm: if the program is in a reset or a step of its environments, this call is left."""
        while frame is not None:
            if "vector_env" in frame.f_code.co_filename and re.match("reset|step", frame.f_code.co_name):
                too_long(signum, frame)
            frame = frame.f_back

    def lost(self, stream) -> None:
        """The reader of standard output or error has gone: asks for the end, as Ctrl-C does, and writes to nobody."""
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        self.requested = self.requested or signal.SIGPIPE

    def exit(self) -> None:
        """Hands the signals back; ends the process with the usual code if one has come."""
        signal.setitimer(signal.ITIMER_REAL, 0)
        for signum, handler in self.previous.items():
            signal.signal(signum, handler)
        if self.requested:
            raise SystemExit(128 + self.requested)


class Bar(tqdm):
    """A progress bar that outlives its reader."""

    stop: StopRequest | None = None

    def display(self, *args, **kwargs):
        try:
            return super().display(*args, **kwargs)
        except OSError:
            self.stop.lost(sys.stderr)


# Settings that touch nothing that is learned: a resume may change them.
FREE = "resume total_timesteps cuda track wandb_project_name wandb_entity exp_name capture_video save_model "
FREE += "keep_pictures eval_frequency eval_episodes checkpoint_frequency compile cudagraphs buffer_on_gpu"


class Run:
    """A run and its folder: log, progress bar, checkpoints. `step` counts environment steps, the only x axis."""

    launcher = sys.orig_argv[:1]  # as it was called: python, .venv/bin/python

    def __init__(self, args: Args, checkpoint: dict | None):
        if checkpoint:
            refuse_changes(args, checkpoint, FREE)
        self.args, self.checkpoint, self.step = args, checkpoint, checkpoint["global_step"] if checkpoint else 0
        try:
            self.folder = args.resume or new_folder(args)
            self.lock = open(f"{self.folder}/.lock", "a")  # held until close
            fcntl.lockf(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if checkpoint and os.stat(f"{self.folder}/checkpoint.pt").st_ino != checkpoint["inode"]:
                fail(f"{self.folder} has gone on meanwhile: resume it again")
            if args.track:  # before the writer is made, which it listens to
                import wandb

                name = os.path.basename(self.folder)
                wandb.init(project=args.wandb_project_name, entity=args.wandb_entity, name=name, id=name,
                           resume="allow", config=asdict(args), sync_tensorboard=True)  # fmt: skip
            self.writer = SummaryWriter(self.folder, purge_step=self.step + 1 if checkpoint else None)
        except BlockingIOError:
            fail(f"another process works on {self.folder}")
        except OSError as error:
            fail(f"cannot write the run folder: {error}")
        table = "\n".join(f"|{name}|{value}|" for name, value in asdict(args).items())
        self.writer.add_text("hyperparameters", f"|param|value|\n|-|-|\n{table}", self.step)
        random.seed(args.seed)
        np.random.seed(args.seed % 2**32)
        torch.manual_seed(args.seed)
        torch.backends.cudnn.deterministic = args.torch_deterministic
        self.device, self.stop = choose_device(args), StopRequest()
        self.metrics, self.learned, self.saved = {}, checkpoint is not None, None
        self.reported = self.step, time.perf_counter()
        self.eval_began = None  # of the evaluation that is being made
        owed = checkpoint and args.eval_frequency and checkpoint["parts"].get("eval_owed")  # it was due at this step
        owed = owed and self.step not in self.evaluations()  # made, before the run was killed
        self.next_eval = self.step if owed else next_multiple(self.step, args.eval_frequency)
        self.next_save = next_multiple(self.step, args.checkpoint_frequency) if checkpoint else 0  # a new run at once

    def keep(self, parts: dict, rng: dict) -> None:
        """Names what a checkpoint holds, see save_checkpoint; a resumed run finds its objects as they were saved."""
        self.parts, self.rng = parts, rng
        with must_fit(self.folder):
            if self.checkpoint:
                self.restore(self.checkpoint)
        self.checkpoint = None  # whoever keeps it keeps its file on the disk when it has been replaced
        pace = {"mininterval": 0.1 if sys.stderr.isatty() else 30, "miniters": 0}  # a line now and then into a file
        steps = {"total": self.args.total_timesteps, "initial": self.step, "unit": "step"}
        Bar.stop = self.stop
        self.progress = Bar(**steps, **pace, dynamic_ncols=True)

    def restore(self, checkpoint: dict) -> None:
        """The saved states into the objects that `keep` was given."""
        for name, part in self.parts.items():
            if isinstance(part, torch.optim.Optimizer):  # which takes the tensors themselves, and so their file
                part.load_state_dict(deepcopy(checkpoint["parts"][name]))
                for group in part.param_groups:  # of this device, not of the one that saved it
                    group["capturable"] = self.device.type == "cuda"
            elif hasattr(part, "load_state_dict"):
                part.load_state_dict(checkpoint["parts"][name])
        for name, state in checkpoint["rng"].items():
            if not isinstance(self.rng[name], torch.Generator):
                self.rng[name].bit_generator.state = state
            elif state.shape == self.rng[name].get_state().shape:
                self.rng[name].set_state(state)
            else:
                print(f"random generator {name} starts anew: it was saved on another kind of device")

    def say(self, line: str) -> None:
        """Prints a line; where its reader has gone (| head) the run is asked to stop, as by Ctrl-C."""
        try:
            self.progress.write(line) if sys.stderr.isatty() else print(line)  # not into the bar
            sys.stdout.flush()
        except OSError:
            self.stop.lost(sys.stdout)

    def tick(self, doing: str) -> bool:
        """Shows what takes its time now; says whether the run is asked to stop."""
        self.progress.set_description_str(doing, refresh=False)
        self.progress.update(0)
        return bool(self.stop.requested)

    def goes_on(self, dones: np.ndarray) -> bool:
        """Saves when it is due, with one environment at the end of an episode; False once the run has to end."""
        if self.eval_began is not None:
            self.leave_out(self.eval_began)
            self.eval_began = None
        ending = self.stop.requested or self.step >= self.args.total_timesteps
        if ending or (self.step >= self.next_save and (dones.all() or len(dones) > 1)):
            self.save()
        return not ending

    def save(self) -> None:
        """Writes the checkpoint of this step, if it is not there yet; an evaluation that is due is left to a resume."""
        owed = {"eval_owed": self.step >= self.next_eval}
        if self.saved != (self.step, owed):
            self.next_save = next_multiple(self.step, self.args.checkpoint_frequency)
            self.report()  # a loss that is not finite must not reach the checkpoint
            self.writer.flush()  # curves without a gap, should the run be killed and resumed
            began = time.perf_counter()
            save_checkpoint(self.folder, self.args, self.step, self.parts | owed, self.rng)
            self.saved = self.step, owed
            if self.eval_began is None:  # otherwise it is left out with the evaluation
                self.leave_out(began)

    def leave_out(self, began: float) -> None:
        """What was done since then is not training, and does not count for steps per second."""
        self.reported = self.reported[0], self.reported[1] + time.perf_counter() - began

    def eval_due(self, dones: np.ndarray) -> bool:
        """Is it time for an evaluation? Saves first, if that is due too: whatever fails in it must cost nothing."""
        due = self.step >= self.next_eval and not self.stop.requested
        if due:
            self.goes_on(dones)
            self.progress.set_description_str("evaluating")
            self.eval_began = time.perf_counter()
        return due

    def report(self) -> None:
        """Logs self.metrics, which must be finite, and steps per second, once for each environment step."""
        values, (last_step, last_time) = require_finite(self.metrics, self.step), self.reported
        now = time.perf_counter()
        self.learned |= bool(values)
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
        self.next_eval = next_multiple(self.step, self.args.eval_frequency)
        self.progress.set_description_str("", refresh=False)
        self.say(f"global_step={self.step}, eval: {returns.mean():.1f} +- {returns.std():.1f}")
        self.log({"eval/episodic_return": returns.mean(), "eval/episodic_return_std": returns.std()})
        self.writer.flush()
        row = f"{self.step},{returns.mean():.6g},{returns.std():.6g}\n"
        with contextlib.suppress(OSError), open(f"{self.folder}/evaluations.csv", "a") as file:  # the disk may be full
            file.write("step,return,std\n" * (file.tell() == 0) + row)

    def evaluations(self) -> dict[int, tuple[float, float]]:
        """Mean and standard deviation of the returns by step; one that was made again after a kill counts once."""
        with contextlib.suppress(FileNotFoundError), open(f"{self.folder}/evaluations.csv") as file:
            rows = re.findall(r"^(\d+),([^,\s]+),([^,\s]+)$", file.read(), re.MULTILINE)
            return {int(step): (float(mean), float(std)) for step, mean, std in rows}
        return {}

    def picture(self, kind: str) -> str:
        """Path of a new picture, kind = name.suffix; of each kind the newest keep_pictures stay."""
        name, suffix = os.path.splitext(f"{self.folder}/{kind}")
        old = sorted(glob.glob(f"{glob.escape(name)}_*{suffix}"), key=os.path.getmtime)
        for path in old[: max(0, len(old) + 1 - self.args.keep_pictures)]:
            os.remove(path)
        return f"{name}_{self.step}{suffix}"

    def make_envs(self, make: Callable, *args) -> gym.vector.VectorEnv:
        """make(*args), the environments of an evaluation; where they cannot be made the run is saved and ends."""
        try:
            return make(*args)
        except (Exception, SystemExit) as error:
            reason = "" if isinstance(error, SystemExit) else f": {one_line(error)}"  # fail has given its own
            self.abort(f"cannot make the environments of an evaluation (--eval-frequency 0 makes none){reason}")

    def abort(self, fault: str) -> NoReturn:
        """Ends the run for a fault of its environments; what was before it is saved. Exit code 1."""
        self.save()
        self.progress.close()
        print(f"error: {fault}; checkpoint at step {self.step}", file=sys.stderr)
        self.stop.exit()
        raise SystemExit(1)

    def close(self, weights: dict) -> str:
        """Ends the log, says how to go on, hands the signals back. Returns the run folder."""
        self.progress.close()
        self.writer.close()
        if self.args.save_model:
            write_file(f"{self.folder}/{self.args.exp_name}.pt", weights)
        if not self.learned:
            self.say("no update was made")
        command = shlex.join([*self.launcher, sys.argv[0], "--resume", self.folder])
        self.say(f"checkpoint at step {self.step}; continue with: {command}")
        self.lock.close()
        self.stop.exit()
        return self.folder


def check_args(args: Args) -> None:
    """Refuses impossible numbers in one line."""
    check_bounds(args)
    if args.prioritized and (args.kappa > 0 or args.planning_steps == 0):
        fail("--prioritized goes with --planning-steps of at least 1 and without --kappa")
    if args.kappa > 0 and args.planning_steps == 0 and args.resume is None and args.evaluate is None:
        fail("--kappa is a bonus in planning: it goes with --planning-steps of at least 1")


if __name__ == "__main__":
    main(parse_args())
