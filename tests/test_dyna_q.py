"""Numbers of dyna_q.py: each piece against the book's boxes written plainly, a known result, or dynamic programming.

S&B is Sutton & Barto 2018, chapter 8. Expected numbers of the mazes and of Gymnasium's tables are exact unless a
comment says how they were measured.
"""

import glob
import heapq
import math
import os
import types
from collections import deque
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import fake_envs
import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from runs import (
    LAKE,
    TWO_ENVS,
    Started,
    assert_healthy,
    command_line,
    copy_of,
    differences,
    error_of,
    flags_of,
    load,
    losses,
    model_of,
    not_finite,
    resume,
    run,
    scalars,
    tiny,
)

import dyna_q
from dyna_q import CHANGES_AT, MAZES, Args, EpisodeStatistics, MazeVector, Settings

ALMOST_ONE = np.nextafter(1, 0)  # the largest number that a generator hands out
CHI_SQUARE = {1: 10.83, 2: 13.82, 3: 16.27, 4: 18.47, 11: 31.26}  # exceeded once in 1,000 times, by degrees of freedom
UP, DOWN, LEFT, RIGHT = range(4)


def make_settings(**flags) -> Settings:
    """The settings of an update, by the names of the flags."""
    plain = {"gamma": 0.9, "learning_rate": 0.5, "planning_steps": 3, "model": "counts"}
    return dyna_q.make_settings(Args(**(plain | flags)))


@pytest.fixture
def register():
    """gym.register, undone after the test."""
    known = set(gym.registry)
    yield gym.register
    for env_id in set(gym.registry) - known:
        del gym.registry[env_id]


class Fixed:
    """Stands in for a generator and hands out given numbers (N, n, 2); where n = 0 is asked for, none."""

    def __init__(self, numbers):
        self.numbers = np.asarray(numbers, float)

    def random(self, size: tuple) -> np.ndarray:
        numbers = np.ascontiguousarray(self.numbers[:, : size[1]])
        assert numbers.shape == size
        return numbers


def columns(transitions: list[tuple]) -> tuple[np.ndarray, ...]:
    """The arrays (N,) of one transition (s, a, r, s', terminated) of each learner, typed as main has them."""
    types = np.int64, np.int64, np.float64, np.int64, np.bool_
    return tuple(np.array(column, dtype) for column, dtype in zip(zip(*transitions, strict=True), types, strict=True))


class Learners:
    """q, model and sums of N learners, updated from lists of transitions, one transition for each learner at a time."""

    def __init__(self, q, settings: Settings):
        self.q, self.settings, self.step = np.array(q, float), settings, 0
        self.model, self.sums = dyna_q.make_model(*self.q.shape), np.zeros((len(self.q), 3))

    def update(self, *transitions, uniforms=None) -> "Learners":
        """One real step; uniforms (N, n, 2)."""
        self.step += 1
        if uniforms is None:
            uniforms = np.zeros((len(self.q), self.settings.planning_steps, 2))
        args = columns(transitions), self.step, Fixed(uniforms), self.settings
        self.model = dyna_q.update(self.q, self.model, self.sums, *args)
        return self


# === The book's boxes, for one learner, with dictionaries, lists and a heap ===


class Book:
    """S&B "Tabular Dyna-Q", "Prioritized sweeping" and the footnote of section 8.3, read off the page.

    model: (s, a) -> {(r, s', terminated): how often}; with settings.last_alone the last outcome replaces all others.
    """

    def __init__(self, q, settings: Settings):
        self.q, self.settings = np.array(q, float).tolist(), settings
        self.model, self.stamps = {}, {}
        self.tried = {}  # visited state -> actions taken there, both in order of appearance
        self.heap, self.queued = [], {}  # entries of the heap that are not in queued any more are skipped
        self.sums = [0.0, 0.0, 0]

    def backup(self, reward, next_s, terminated):
        return reward if terminated else reward + self.settings.gamma * max(self.q[next_s])

    def target(self, s, a):
        """Sum over the outcomes of p(s', r | s, a) [r + gamma max Q(s', .)]."""
        outcomes = self.model.get((s, a), {(0.0, s, False): 1})
        visits = sum(outcomes.values())
        return sum(count / visits * self.backup(*outcome) for outcome, count in outcomes.items())

    def learn(self, s, a, outcome, step):
        self.stamps[s, a] = step
        if (s, a) not in self.model:
            self.tried.setdefault(s, []).append(a)
        if (s, a) not in self.model or self.settings.last_alone:
            self.model[s, a] = {}
        self.model[s, a][outcome] = self.model[s, a].get(outcome, 0) + 1

    def dyna_q(self, s, a, *outcome, step, uniforms):
        """Steps (d), (e) and (f) of the box."""
        td_error = self.backup(*outcome) - self.q[s][a]
        self.q[s][a] += self.settings.learning_rate * td_error
        self.sums[0] += abs(td_error)
        self.learn(s, a, outcome, step)
        for u, v in uniforms:
            states = list(self.tried)
            s = states[int(u * len(states))]
            actions = list(range(len(self.q[s]))) if self.settings.kappa else self.tried[s]
            a = actions[int(v * len(actions))]
            bonus = self.settings.kappa * math.sqrt(step - self.stamps.get((s, a), 0))
            td_error = self.target(s, a) + bonus - self.q[s][a]
            self.q[s][a] += self.settings.learning_rate * td_error
            self.sums[1] += abs(td_error)
            self.sums[2] += 1

    def push(self, s, a):
        priority = abs(self.target(s, a) - self.q[s][a])
        if priority > self.settings.theta and priority > self.queued.get((s, a), 0):
            self.queued[s, a] = priority
            heapq.heappush(self.heap, (-priority, s, a))

    def sweep(self, s, a, *outcome, step, uniforms):
        """Steps (d) to (g) of the box."""
        self.sums[0] += abs(self.backup(*outcome) - self.q[s][a])
        self.learn(s, a, outcome, step)
        self.push(s, a)
        for _ in range(self.settings.planning_steps):
            while self.heap and self.queued.get(self.heap[0][1:]) != -self.heap[0][0]:
                heapq.heappop(self.heap)
            if not self.heap:
                break
            _, s, a = heapq.heappop(self.heap)
            del self.queued[s, a]
            td_error = self.target(s, a) - self.q[s][a]
            self.q[s][a] += self.settings.learning_rate * td_error
            self.sums[1] += abs(td_error)
            self.sums[2] += 1
            for pair, outcomes in self.model.items():
                if any(next_s == s for _, next_s, _ in outcomes):
                    self.push(*pair)


def random_walk(seed: int, steps: int, num_states: int, num_actions: int, branches: int) -> list[tuple]:
    """Transitions of a random policy in a random world, each pair with so many equally likely outcomes.

    Any state can be the last of an episode and the middle of another; one step in twenty is truncated.
    """
    rng = np.random.default_rng(seed)
    shape = num_states, num_actions, branches
    next_states, rewards, terminal = rng.integers(num_states, size=shape), rng.normal(size=shape), rng.random(shape)
    s, walk = 0, []
    for _ in range(steps):
        a, branch = int(rng.integers(num_actions)), int(rng.integers(branches))
        next_s, terminated = int(next_states[s, a, branch]), bool(terminal[s, a, branch] < 0.15)
        walk.append((s, a, float(rewards[s, a, branch]), next_s, terminated))
        s = int(rng.integers(num_states)) if terminated or rng.random() < 0.05 else next_s
    return walk


def drive(
    settings: Settings, branches: int, seed: int = 0, num_learners=3, steps=300, room=1, sizes=(6, 3)
) -> SimpleNamespace:
    """Several learners in worlds of their own; q after each step (steps, N, S, A), beside that of the book's boxes."""
    rng = np.random.default_rng(seed)
    learners = Learners(rng.normal(size=(num_learners, *sizes)), settings)
    books = [Book(q, settings) for q in learners.q]
    while learners.model.counts.shape[-1] < room:
        learners.model = dyna_q.grow(learners.model)
    walks = [random_walk(100 * seed + i, steps, *sizes, branches) for i in range(num_learners)]
    history, expected = [], []
    for step in range(steps):
        uniforms = rng.random((num_learners, settings.planning_steps, 2))
        learners.update(*[walk[step] for walk in walks], uniforms=uniforms)
        for book, walk, numbers in zip(books, walks, uniforms, strict=True):
            learn = book.sweep if settings.prioritized else book.dyna_q
            learn(*walk[step], step=step + 1, uniforms=numbers)
        history.append(learners.q.copy())
        expected.append(np.array([book.q for book in books]))
    assert np.abs(history[-1] - history[0]).max() > 0.1  # there was something to learn
    return SimpleNamespace(
        q=np.array(history), expected=np.array(expected), sums=learners.sums, books=books, model=learners.model
    )


@pytest.mark.parametrize("kappa", [0.0, 0.05])
@pytest.mark.parametrize("model", ["counts", "last"])
def test_dyna_q_is_the_box_where_the_world_is_deterministic(model, kappa):
    """Counts and last outcome are the same model there, and Q is the book's to the last bit after every step."""
    run = drive(make_settings(model=model, kappa=kappa, learning_rate=0.3), branches=1)
    assert np.array_equal(run.q, run.expected)
    np.testing.assert_allclose(run.sums, [book.sums for book in run.books], rtol=1e-12)


def test_deterministic_counts_and_last_agree():
    """The two models give the same Q in a deterministic world and different ones in a stochastic world."""
    same = [drive(make_settings(model=model, gamma=0.95), branches=1, seed=2).q for model in ("counts", "last")]
    assert np.array_equal(*same)
    other = [drive(make_settings(model=model, gamma=0.95), branches=3, seed=2).q for model in ("counts", "last")]
    assert np.abs(other[0][-1] - other[1][-1]).max() > 0.1


@pytest.mark.parametrize("kappa", [0.0, 0.05])
def test_dyna_q_backs_up_the_expectation_over_counted_outcomes(kappa):
    """In a stochastic world planning is the expected update under a dictionary of counts."""
    run = drive(make_settings(kappa=kappa, learning_rate=0.3), branches=4)
    np.testing.assert_allclose(run.q, run.expected, rtol=0, atol=1e-11)
    np.testing.assert_allclose(run.sums, [book.sums for book in run.books], rtol=1e-11)
    assert max(len(outcomes) for outcomes in run.books[0].model.values()) == 4


def test_last_outcome_overwrites():
    """In a stochastic world --model last is the book's table, which the newest transition overwrites."""
    run = drive(make_settings(model="last", learning_rate=0.3), branches=4)
    assert np.array_equal(run.q, run.expected)
    assert run.model.counts.shape[-1] == 2 and not run.model.counts[..., 1].any()


@pytest.mark.parametrize("n, theta", [(1, 1e-4), (5, 0.05), (40, 1e-4)])
@pytest.mark.parametrize("model", ["counts", "last"])
def test_prioritized_sweeping_is_the_box_where_the_world_is_deterministic(model, n, theta):
    """Q is that of a plain implementation with a heap, to the last bit after every step."""
    settings = make_settings(model=model, prioritized=True, planning_steps=n, theta=theta)
    run = drive(settings, branches=1)
    assert np.array_equal(run.q, run.expected)
    np.testing.assert_allclose(run.sums, [book.sums for book in run.books], rtol=1e-12)
    assert 0 < run.sums[0, 2] <= 300 * n and (n == 1 or run.sums[0, 2] < 300 * n)


@pytest.mark.parametrize("model", ["counts", "last"])
def test_prioritized_sweeping_in_a_stochastic_world(model):
    """Priorities come from the expected update; what no longer leads to a state is no predecessor of it."""
    run = drive(make_settings(model=model, prioritized=True, planning_steps=4, theta=0.01), branches=3)
    np.testing.assert_allclose(run.q, run.expected, rtol=0, atol=1e-11)
    np.testing.assert_allclose(run.sums, [book.sums for book in run.books], rtol=1e-11)
    for book, i in zip(run.books, range(3), strict=True):
        for (s, a), outcomes in book.model.items():
            known = run.model.next_states[i, s, a][run.model.counts[i, s, a] > 0]
            assert sorted(known) == sorted({o[1] for o in outcomes})


@pytest.mark.parametrize("settings", [{}, {"kappa": 0.1}, {"prioritized": True, "theta": 0.01}, {"model": "last"}])
def test_learners_do_not_mix(settings):
    """Five learners side by side end as five learners alone do, model and all."""
    settings, sizes = make_settings(**settings), (5, 4)
    rng = np.random.default_rng(3)
    q, uniforms = rng.normal(size=(5, *sizes)), rng.random((120, 5, 3, 2))
    walks = [random_walk(i, 120, *sizes, branches=2) for i in range(5)]
    together, alone = Learners(q, settings), [Learners(q[i : i + 1], settings) for i in range(5)]
    for step in range(120):
        together.update(*[walk[step] for walk in walks], uniforms=uniforms[step])
        for i in range(5):
            alone[i].update(walks[i][step], uniforms=uniforms[step, i : i + 1])
    for i in range(5):
        assert np.array_equal(together.q[i], alone[i].q[0])
        assert np.array_equal(together.sums[i], alone[i].sums[0])
        for ours, single in zip(together.model, alone[i].model, strict=True):
            room = tuple(slice(0, size) for size in single.shape[1:])
            assert np.array_equal(ours[i][room], single[0])


# === Updates worked by hand ===


def test_four_steps_of_dyna_q_by_hand():
    """n = 2, alpha = gamma = 1/2, three states, two actions, Q = 0, every number worked out in the comments."""
    learners = Learners(np.zeros((1, 3, 2)), make_settings(gamma=0.5, learning_rate=0.5, planning_steps=2))
    # (0, 1) gives 4 and leads to 1. Direct: 0 + (4 - 0) / 2 = 2. Planning knows this pair alone, twice:
    # 2 + (4 + 0/2 - 2) / 2 = 3, then 3 + (4 - 3) / 2 = 3.5
    learners.update((0, 1, 4.0, 1, False), uniforms=[[[0.9, 0.9], [0.1, 0.1]]])
    assert learners.q.tolist() == [[[0, 3.5], [0, 0], [0, 0]]]
    # (1, 0) gives 8 and ends in 2. Direct: 0 + (8 - 0) / 2 = 4. States visited: 0, 1.
    # 0.4 * 2 -> state 0, action 1: 3.5 + (4 + 4/2 - 3.5) / 2 = 4.75; 0.5 * 2 -> state 1, action 0: 4 + (8 - 4) / 2 = 6
    learners.update((1, 0, 8.0, 2, True), uniforms=[[[0.4, 0.9], [0.5, 0.0]]])
    assert learners.q.tolist() == [[[0, 4.75], [6, 0], [0, 0]]]
    # (0, 0) gives -2 and leads to 0. Direct: 0 + (-2 + 4.75/2 - 0) / 2 = 0.1875. Actions tried in 0: 1, 0.
    # 0.6 * 2 -> action 0: 0.1875 + (0.375 - 0.1875) / 2 = 0.28125;
    # 0.3 * 2 -> action 1: 4.75 + (4 + 6/2 - 4.75) / 2 = 5.875
    learners.update((0, 0, -2.0, 0, False), uniforms=[[[0.1, 0.6], [0.2, 0.3]]])
    assert learners.q.tolist() == [[[0.28125, 5.875], [6, 0], [0, 0]]]
    # (0, 1) gives 2 this time and leads to 0. Direct: 5.875 + (2 + 5.875/2 - 5.875) / 2 = 5.40625.
    # Its model: mean reward 3, half of the time to 1, half of the time to 0.
    # (0, 1): 5.40625 + (3 + (6/2 + 5.40625/2) / 2 - 5.40625) / 2 = 5.62890625; (1, 0): 6 + (8 - 6) / 2 = 7
    learners.update((0, 1, 2.0, 0, False), uniforms=[[[0.0, 0.0], [0.99, 0.99]]])
    assert learners.q.tolist() == [[[0.28125, 5.62890625], [7, 0], [0, 0]]]
    # the TD errors of the real steps: 4, 8, 0.375, -0.9375
    # and of planning: 2 + 1, 2.5 + 4, 0.1875 + 2.25, 0.4453125 + 2
    assert learners.sums.tolist() == [[13.3125, 14.3828125, 8]]


def test_last_step_by_hand_with_the_last_outcome():
    """The fourth step of the sequence above when the model holds the last outcome alone."""
    settings = make_settings(gamma=0.5, learning_rate=0.5, planning_steps=2, model="last")
    learners = Learners(np.zeros((1, 3, 2)), settings)
    learners.update((0, 1, 4.0, 1, False), uniforms=[[[0.9, 0.9], [0.1, 0.1]]])
    learners.update((1, 0, 8.0, 2, True), uniforms=[[[0.4, 0.9], [0.5, 0.0]]])
    learners.update((0, 0, -2.0, 0, False), uniforms=[[[0.1, 0.6], [0.2, 0.3]]])
    # Direct as above, 5.40625; (0, 1): 5.40625 + (2 + 5.40625/2 - 5.40625) / 2 = 5.0546875
    learners.update((0, 1, 2.0, 0, False), uniforms=[[[0.0, 0.0], [0.99, 0.99]]])
    assert learners.q.tolist() == [[[0.28125, 5.0546875], [7, 0], [0, 0]]]


def test_dyna_q_plus_by_hand():
    """kappa = 1, n = 2: untried actions are drawn, and the bonus is the root of the steps since the last try."""
    settings = make_settings(gamma=0.5, learning_rate=0.5, planning_steps=2, kappa=1.0)
    learners = Learners(np.zeros((1, 3, 2)), settings)
    # Direct, without bonus: 0 + (4 - 0) / 2 = 2. (0, 0), untried for 1 step, leads to itself: (0 + 1 + 2/2) / 2 = 1.
    # (0, 1), tried just now, no bonus: 2 + (4 + 0/2 - 2) / 2 = 3
    learners.update((0, 1, 4.0, 1, False), uniforms=[[[0.0, 0.0], [0.0, 0.5]]])
    assert learners.q.tolist() == [[[1, 3], [0, 0], [0, 0]]]
    for _ in range(3):  # 0 + 0/2 - 0: nothing; planning draws (1, 0), tried just now, and changes nothing either
        learners.update((1, 0, 0.0, 2, False), uniforms=[[[0.5, 0.0], [0.5, 0.0]]])
    assert learners.q.tolist() == [[[1, 3], [0, 0], [0, 0]]]
    # step 5: (0, 1), 4 steps ago: 3 + (4 + 2 + 0/2 - 3) / 2 = 4.5; (1, 1), untried for 5 steps: root 5 / 2
    learners.update((1, 0, 0.0, 2, False), uniforms=[[[0.0, 0.5], [0.5, 0.5]]])
    assert learners.q.tolist() == [[[1, 4.5], [0, math.sqrt(5) / 2], [0, 0]]]


def test_prioritized_sweeping_by_hand():
    """A chain 0 -> 1 -> 2 -> end: the reward walks back until the change no longer exceeds theta."""
    settings = make_settings(gamma=0.5, learning_rate=0.5, planning_steps=5, prioritized=True, theta=0.5)
    learners = Learners(np.zeros((1, 4, 2)), settings)
    learners.update((0, 0, 0.0, 1, False)).update((1, 0, 0.0, 2, False))  # no error, nothing queued
    assert not learners.q.any() and learners.sums.tolist() == [[0, 0, 0]]
    # priority 8: Q(2, 0) = 0 + (8 - 0) / 2 = 4. Into 2 leads (1, 0), priority 0 + 4/2 = 2: Q(1, 0) = (2 - 0) / 2 = 1.
    # Into 1 leads (0, 0), priority 0 + 1/2 = 0.5, which does not exceed theta: two updates, not five
    learners.update((2, 0, 8.0, 3, True))
    assert learners.q.tolist() == [[[0, 0], [1, 0], [4, 0], [0, 0]]]
    assert learners.sums.tolist() == [[8, 10, 2]]
    assert not learners.model.priority.any()


# === Terminal states and truncation ===


@pytest.mark.parametrize("prioritized", [False, True])
def test_terminal_gives_the_reward_alone(prioritized):
    """A terminal state adds no value, in direct and planning updates, even if Q is not 0 there."""
    settings = make_settings(learning_rate=1.0, planning_steps=1, prioritized=prioritized)
    learners = Learners(np.full((1, 2, 2), 7.0), settings).update((0, 1, 2.5, 1, True))
    assert learners.q.tolist() == [[[7, 2.5], [7, 7]]]
    assert learners.sums[0].tolist() == ([4.5, 4.5, 1] if prioritized else [4.5, 0, 1])


def test_direct_update_alone():
    """n = 0 is one-step Q-learning, with and without termination."""
    settings = make_settings(learning_rate=0.5, planning_steps=0)
    learners = Learners([[[1.0, 2.0], [6.0, 4.0]]], settings).update((0, 1, 2.5, 1, True))
    assert learners.q.tolist() == [[[1, 2.25], [6, 4]]]  # 2 + (2.5 - 2) / 2
    learners.update((0, 0, 1.0, 1, False))
    np.testing.assert_allclose(learners.q, [[[1 + (1 + 0.9 * 6 - 1) / 2, 2.25], [6, 4]]], rtol=1e-15)
    assert learners.sums[0, 1:].tolist() == [0, 0]


@pytest.mark.parametrize("prioritized", [False, True])
def test_terminal_observation_that_is_also_a_live_state(prioritized):
    """A pair that leads to state 1 and ends there one time in four takes three quarters of that state's value."""
    settings = make_settings(learning_rate=1.0, planning_steps=1, prioritized=prioritized, theta=0.0)
    learners = Learners(np.zeros((1, 2, 1)), settings)
    learners.update((1, 0, 8.0, 0, True), uniforms=[[[0.0, 0.0]]])
    for terminated in (False, False, True, False):
        learners.update((0, 0, 1.0, 1, terminated), uniforms=[[[0.9, 0.0]]])
    np.testing.assert_allclose(learners.q, [[[1 + 0.9 * 0.75 * 8], [8]]], rtol=1e-14)
    model = learners.model
    assert [x[0, 0, 0, 0] for x in (model.next_states, model.counts, model.terminations)] == [1, 4, 1]


class Corridor(gym.Env):
    """Cells 0 to 3, left and right, the reward 1 on every step into or at the last cell; it never ends by itself."""

    observation_space, action_space = gym.spaces.Discrete(4), gym.spaces.Discrete(2)

    def __init__(self, render_mode=None):
        self.render_mode = render_mode

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.cell = 0
        return self.cell, {}

    def step(self, action):
        self.cell = min(max(self.cell + 2 * int(action) - 1, 0), 3)
        return self.cell, float(self.cell == 3), False, False, {}


@pytest.mark.parametrize("limit", ["max_episode_steps", "TimeLimit"])
@pytest.mark.parametrize("prioritized", [False, True])
def test_truncation_bootstraps(prioritized, limit, register):
    """Episodes cut after 5 steps, by the script or by Gymnasium, leave the values of the endless world."""
    own, theirs = (5, None) if limit == "max_episode_steps" else (10_000, 5)
    register("TestCorridor-v0", Corridor, max_episode_steps=theirs)
    settings = {"gamma": 0.5, "prioritized": prioritized, "theta": 0.0, "epsilon": 1.0, "num_envs": 2}
    run = train(Args(env_id="TestCorridor-v0", max_episode_steps=own, **settings), 300)
    assert run.lengths[0][:50] == [5] * 50
    # the last cell is worth 1 / (1 - 1/2) = 2, a cell d steps before the last step 2 / 2^d
    for q in run.q:
        np.testing.assert_allclose(q[:, 1], [0.5, 1, 2, 2], atol=1e-8)
        np.testing.assert_allclose(q[:, 0], [0.25, 0.25, 0.5, 1], atol=1e-8)
    assert not run.model.terminations.any()


# === Acting ===


def test_ties_are_broken_evenly():
    """Every maximal action gets the same share of the second uniform number, from 0 to just below 1."""
    uniforms = np.stack([np.full(3000, 0.5), (np.arange(3000) + 0.5) / 3000], -1)
    q = np.tile([[1.0, 3.0, -2.0, 3.0, 3.0]], (3000, 2, 1))
    q[:, 1] = -1
    actions = dyna_q.act(q, np.zeros(3000, np.int64), 0.1, uniforms)
    assert np.bincount(actions, minlength=5).tolist() == [0, 1000, 0, 1000, 1000]
    assert (np.diff(actions) >= 0).all()
    ends = np.array([[0.5, 0.0], [0.5, ALMOST_ONE]])
    assert dyna_q.act(q[:2], np.zeros(2, np.int64), 0.1, ends).tolist() == [1, 4]
    assert dyna_q.act(q[:2], np.ones(2, np.int64), 0.1, ends).tolist() == [0, 4]


def test_greedy_actions_are_always_maximal():
    """With epsilon 0 each learner takes a maximal action of its own row of Q; ties evenly by the chi-square test."""
    rng = np.random.default_rng(0)
    q, obs = rng.integers(3, size=(4000, 3, 4)).astype(float), rng.integers(3, size=4000)
    uniforms = rng.random((4000, 2))
    uniforms[::7, 0] = 0.0
    rows = q[np.arange(4000), obs]
    actions = dyna_q.act(q, obs, 0.0, uniforms)
    best = rows == rows.max(-1, keepdims=True)
    assert best[np.arange(4000), actions].all()
    for ties in (2, 3, 4):
        some = best.sum(-1) == ties
        ranks = (best.cumsum(-1) - 1)[np.arange(4000), actions][some]
        assert chi_square(np.bincount(ranks, minlength=ties), np.full(ties, 1 / ties)) < CHI_SQUARE[ties - 1]


@pytest.mark.parametrize("epsilon", [0.1, 0.4, 1.0])
def test_epsilon_is_the_share_of_random_actions(epsilon):
    """The greedy action has probability 1 - epsilon + epsilon / A, every other epsilon / A; 1 is uniform."""
    rng = np.random.default_rng(1)
    q = np.tile([0.0, 0.5, 2.0, 1.0], (20_000, 2, 1))
    actions = dyna_q.act(q, np.ones(20_000, np.int64), epsilon, rng.random((20_000, 2)))
    shares = np.full(4, epsilon / 4) + np.eye(4)[2] * (1 - epsilon)
    assert chi_square(np.bincount(actions, minlength=4), shares) < CHI_SQUARE[3]


def test_random_actions_by_number():
    """A first number below epsilon makes the second one choose among all actions: the bounds are exact."""
    q = np.tile([0.0, 0.5, 2.0, 1.0], (5, 1, 1))
    uniforms = np.array([[0.0, 0.0], [0.0, 0.25], [0.2, ALMOST_ONE], [0.25, 0.0], [0.0, 0.74]])
    assert dyna_q.act(q, np.zeros(5, np.int64), 0.25, uniforms).tolist() == [0, 1, 3, 2, 2]


def chi_square(counts, shares) -> float:
    """Pearson's statistic of counts beside the expected shares."""
    expected = counts.sum() * np.asarray(shares)
    return float(((counts - expected) ** 2 / expected).sum())


# === What the planner draws ===

TRIED = [(2, 3), (5, 1), (2, 0), (2, 1), (0, 3)]  # of six states and four actions


def drawn_pairs(kappa: float, uniforms: np.ndarray) -> np.ndarray:
    """How often one planning step draws each pair (S, A), after the pairs above were tried; uniforms (N, 2).

    The last real step is to (0, 3) and has no error, so a draw shows as the one value that has changed, or as none.
    """
    size = len(uniforms)
    learners = Learners(np.zeros((size, 6, 4)), make_settings(planning_steps=0, kappa=kappa, learning_rate=0.5))
    for s, a in TRIED[:-1]:
        learners.update(*[(s, a, 100.0, 4, True)] * size)
    learners.settings = learners.settings._replace(planning_steps=1)
    before = learners.q.copy()
    learners.update(*[(0, 3, 0.0, 4, True)] * size, uniforms=uniforms[:, None])
    changed = learners.q != before
    assert (changed.sum((1, 2)) <= 1).all()
    counts = changed.sum(0)
    counts[0, 3] += size - changed.sum()
    return counts


def test_the_planner_draws_visited_pairs_alone_in_two_stages():
    """First a visited state, then an action tried in it; not a pair among all pairs, and never an untried one."""
    rng = np.random.default_rng(0)
    counts = drawn_pairs(0.0, rng.random((6000, 2)))
    shares = np.array([1 / 9, 1 / 3, 1 / 9, 1 / 9, 1 / 3])  # of the pairs in TRIED: states 2, 5 and 0 a third each
    drawn = np.array([counts[pair] for pair in TRIED])
    assert drawn.sum() == 6000 == counts.sum()
    assert chi_square(drawn, shares) < CHI_SQUARE[4]


def test_the_planner_draws_in_order_of_appearance():
    """The bounds between the pairs are exact, up to the largest number below 1."""
    third, below = 1 / 3 + 1e-12, 1 / 3 - 1e-12
    cases = {
        (0.0, 0.0): (2, 3), (below, below): (2, 3), (below, third): (2, 0), (0.0, 2 * third): (2, 1),
        (0.0, ALMOST_ONE): (2, 1), (third, 0.0): (5, 1), (2 * below, ALMOST_ONE): (5, 1), (2 * third, 0.5): (0, 3),
        (ALMOST_ONE, ALMOST_ONE): (0, 3),
    }  # fmt: skip
    for uniforms, pair in cases.items():
        counts = drawn_pairs(0.0, np.array([uniforms]))
        assert np.argwhere(counts).tolist() == [list(pair)]


def test_dyna_q_plus_draws_untried_actions_of_visited_states():
    """With a bonus every action of a visited state is drawn as often, and no action of an unvisited state."""
    rng = np.random.default_rng(0)
    counts = drawn_pairs(0.1, rng.random((6000, 2)))
    assert not counts[[1, 3, 4]].any()
    assert chi_square(counts[[0, 2, 5]].ravel(), np.full(12, 1 / 12)) < CHI_SQUARE[11]
    counts = drawn_pairs(0.1, np.array([[ALMOST_ONE, 0.5], [ALMOST_ONE, ALMOST_ONE], [0.0, 0.24]]))
    assert np.argwhere(counts).tolist() == [[0, 2], [0, 3], [2, 0]]


# === Dyna-Q+ ===


def test_bonus_is_kappa_times_the_root_of_the_time_since_the_last_try():
    """A planning update adds kappa sqrt(tau), tau the steps since the last try, or since the start if untried."""
    settings = make_settings(gamma=0.5, learning_rate=1.0, planning_steps=2, kappa=0.3)
    learners = Learners(np.zeros((1, 4, 3)), settings._replace(planning_steps=0))
    learners.update((1, 2, 6.0, 3, True))  # step 1
    learners.update((1, 1, 4.0, 3, True))  # step 2
    for _ in range(8):  # steps 3 to 10
        learners.update((0, 0, 0.0, 3, True))
    assert learners.q[0, :2].tolist() == [[0, 0, 0], [0, 4, 6]]  # the direct update knows no bonus
    learners.settings = settings
    uniforms = [[[0.0, 0.99], [0.0, 0.5]]]  # step 11: state 1, action 2, 10 steps ago; action 1, 9 steps ago
    learners.update((0, 0, 0.0, 3, True), uniforms=uniforms)
    assert learners.q[0, 1].tolist() == [0, 0.3 * math.sqrt(9) + 4, 0.3 * math.sqrt(10) + 6]
    best = learners.q[0, 1].max()  # step 12: action 0 untried, for 12 steps: back to state 1, reward 0
    learners.update((0, 0, 0.0, 3, True), uniforms=[[[0.0, 0.0], [0.9, 0.0]]])
    assert learners.q[0, 1, 0] == 0.3 * math.sqrt(12) + 0.5 * best
    assert learners.q[0, 0].tolist() == [0, 0, 0]  # the second draw: tried at this very step, no bonus


def test_untried_actions_are_not_written_into_the_model():
    """Planning an untried action leaves it untried: no visit, no outcome, not among the tried."""
    learners = Learners(np.ones((1, 3, 2)), make_settings(kappa=0.5)).update(
        (0, 0, 1.0, 1, False), uniforms=[[[0, 0.9]] * 3]
    )
    assert learners.q[0, 0, 1] != 1
    assert learners.model.visits[0].tolist() == [[1, 0], [0, 0], [0, 0]]
    assert learners.model.num_tried[0].tolist() == [1, 0, 0] and learners.model.last_tried[0, 0].tolist() == [1, 0]


# === Prioritized sweeping ===


def sweeping(n: int, theta: float, size=(4, 2), **settings) -> Learners:
    settings = make_settings(prioritized=True, planning_steps=n, theta=theta, gamma=0.5, **settings)
    return Learners(np.zeros((1, *size)), settings)


def test_only_changes_above_theta_are_queued():
    """A change of exactly theta is not queued, a larger one is, whatever its sign."""
    for reward, priority in ((0.25, 0), (-0.25, 0), (0.375, 0.375), (-0.375, 0.375)):
        learners = sweeping(0, 0.25).update((1, 1, reward, 2, True))
        assert learners.model.priority[0].tolist() == [0, 0, 0, priority, 0, 0, 0, 0]
        assert not learners.q.any()  # no direct update


def test_a_queued_pair_is_raised_and_never_lowered():
    """A new change of a queued pair counts if it is larger; a smaller one, even none, leaves the pair where it is."""
    learners = sweeping(0, 0.25, model="last").update((1, 1, 4.0, 2, True))
    for reward, priority in ((3.0, 4), (5.0, 5), (0.0, 5), (-6.0, 6)):
        learners.update((1, 1, reward, 2, True))
        assert learners.model.priority[0, 3] == priority


def test_the_highest_priority_goes_first_and_n_is_the_most():
    """Each real step makes at most n updates; what is left stays queued for the next one."""
    learners = sweeping(0, 0.25, learning_rate=1.0)
    for s, a, reward in ((0, 1, 2.0), (1, 0, 4.0), (2, 1, 3.0)):
        learners.update((s, a, reward, 3, True))
    learners.settings = learners.settings._replace(planning_steps=2)
    learners.update((3, 0, 0.0, 3, True))  # 4 and 3 are done, 2 is left
    assert learners.q[0].tolist() == [[0, 0], [4, 0], [0, 3], [0, 0]]
    assert learners.model.priority[0].tolist() == [0, 2, 0, 0, 0, 0, 0, 0]
    assert learners.sums[0].tolist() == [9, 7, 2]
    learners.update((3, 0, 0.0, 3, True))
    assert learners.q[0].tolist() == [[0, 2], [4, 0], [0, 3], [0, 0]]
    assert learners.sums[0].tolist() == [9, 9, 3]


def test_all_predecessors_are_queued_each_with_its_own_change():
    """After an update every pair that leads to the state is queued by what would change for it."""
    learners = sweeping(0, 0.25, learning_rate=1.0)
    for s, a, reward in ((0, 0, 0.0), (0, 1, 1.0), (1, 1, -2.0), (2, 1, 0.0)):
        learners.update((s, a, reward, 2, False))
    learners.model.priority[:] = 0
    learners.settings = learners.settings._replace(planning_steps=1)
    learners.update((2, 0, 4.0, 3, True))  # Q(2, 0) = 4: into 2 lead 0 + 4/2, 1 + 4/2, -2 + 4/2 (no change), 0 + 4/2
    assert learners.q[0].tolist() == [[0, 0], [0, 0], [4, 0], [0, 0]]
    assert learners.model.priority[0].tolist() == [2, 3, 0, 0, 0, 2, 0, 0]


def test_a_pair_that_leads_to_a_state_in_some_way_is_a_predecessor():
    """Each pair that ever led to the state is queued after it, once, whichever of its outcomes that is; no other."""
    learners = sweeping(1, 0.0, learning_rate=1.0)
    for transition in [(0, 0, 0.0, 2, False)] * 5 + [(1, 1, 0.0, 3, False)] * 3 + [(1, 1, 0.0, 2, False)] * 2:
        learners.update(transition)
    learners.update((1, 0, 0.0, 3, False)).update((2, 0, 4.0, 3, True))  # Q(2, 0) = 4
    assert learners.model.priority[0].tolist() == [2, 0, 0, 0.5 * 2 / 5 * 4, 0, 0, 0, 0]


@pytest.mark.parametrize("moved", [0, 1, 2])
def test_stale_predecessors_are_dropped_by_the_last_outcome(moved):
    """With --model last a pair that leads elsewhere is no predecessor any more."""
    pairs = [(0, 0), (0, 1), (1, 1)]
    learners = sweeping(0, 0.0, model="last")
    for s, a in pairs:
        learners.update((s, a, 0.0, 2, False))
    s, a = pairs[moved]
    learners.update((s, a, 0.0, 3, False)).update((s, a, 0.0, 3, False))
    kept = [2 * s + a for i, (s, a) in enumerate(pairs) if i != moved]
    learners.model.priority[:] = 0
    learners.settings = learners.settings._replace(planning_steps=1)
    learners.update((2, 0, 4.0, 3, True))
    assert np.flatnonzero(learners.model.priority[0]).tolist() == kept


def test_prioritized_sweeping_needs_no_random_numbers():
    """It takes nothing from the planning generator; Dyna-Q takes two numbers for each planning step."""
    for settings, numbers in (({"prioritized": True, "theta": 1e-4}, 0), ({}, 2 * 3 * 2)):
        settings, rng, twin = make_settings(**settings), np.random.default_rng(5), np.random.default_rng(5)
        model = dyna_q.make_model(2, 3, 2)
        transition = columns([(0, 0, 1.0, 1, False)] * 2)
        dyna_q.update(np.zeros((2, 3, 2)), model, np.zeros((2, 3)), transition, 1, rng, settings)
        twin.random(numbers)
        assert rng.random() == twin.random()


# === The model ===


def test_model_keeps_counts_rewards_and_order():
    """Visits, mean rewards, outcomes with their terminations, and the order in which states and actions appeared."""
    learners = Learners(np.zeros((1, 4, 3)), make_settings())
    for transition in [(2, 1, 1.0, 3, False), (2, 1, 4.0, 0, True), (2, 1, 1.0, 3, True), (2, 0, 5.0, 2, False),
                       (1, 2, -1.0, 1, False), (2, 1, 0.0, 3, False)]:  # fmt: skip
        learners.update(transition)
    model = learners.model
    assert model.visits[0].tolist() == [[0, 0, 0], [0, 0, 1], [1, 4, 0], [0, 0, 0]]
    assert model.rewards[0, [2, 2, 1], [1, 0, 2]].tolist() == [1.5, 5, -1]
    assert (model.counts > 0).sum(-1)[0, 2].tolist() == [1, 2, 0]
    assert model.next_states[0, 2, 1, :2].tolist() == [3, 0] and model.counts[0, 2, 1, :2].tolist() == [3, 1]
    assert model.terminations[0, 2, 1, :2].tolist() == [1, 1]
    assert model.num_visited.tolist() == [[2]] and model.visited[0, :2].tolist() == [2, 1]
    assert model.num_tried[0].tolist() == [0, 1, 2, 0] and model.tried[0, 2, :2].tolist() == [1, 0]
    assert model.last_tried[0].tolist() == [[0, 0, 0], [0, 0, 5], [4, 6, 0], [0, 0, 0]]


@pytest.mark.parametrize("prioritized", [False, True])
def test_nothing_is_lost_when_the_model_grows(prioritized):
    """More outcomes than there was room for: the same as with room from the start, and the book."""
    settings = make_settings(prioritized=prioritized, theta=0.01)
    small = drive(settings, branches=6, seed=4, sizes=(7, 3))
    large = drive(settings, branches=6, seed=4, room=32, sizes=(7, 3))
    assert 4 < small.model.counts.shape[-1] < large.model.counts.shape[-1] == 32
    assert np.array_equal(small.q, large.q) and np.array_equal(small.sums, large.sums)
    np.testing.assert_allclose(small.q, small.expected, rtol=0, atol=1e-11)
    for one, other in zip(small.model, large.model, strict=True):
        room = tuple(slice(0, size) for size in one.shape)
        assert np.array_equal(one, other[room]) and not other.view(np.uint8).sum() > one.view(np.uint8).sum()


def test_there_is_always_room_for_one_outcome_more():
    """After every step each pair has a free place at the end, as record takes the first that is free."""
    learners = Learners(np.zeros((2, 6, 2)), make_settings())
    for next_s in (1, 2, 2, 3, 4, 5, 0):
        learners.update((0, 0, 1.0, next_s, False), (0, 1, 1.0, 1, False))
        assert not learners.model.counts[..., -1].any()
    assert learners.model.next_states[0, 0, 0].tolist() == [1, 2, 3, 4, 5, 0, 0, 0]
    assert learners.model.counts[0, 0, 0].tolist() == [1, 2, 1, 1, 1, 1, 0, 0]


def test_growing_makes_no_more_room_than_needed():
    """One outcome a pair: the model of a deterministic chain stays as it was made."""
    for settings in ({}, {"prioritized": True}, {"prioritized": True, "model": "last"}):
        learners = Learners(np.zeros((1, 4, 2)), make_settings(**settings))
        for s in (0, 1, 2, 0, 1, 2):
            learners.update((s, 1, 0.0, s + 1, False))
        assert learners.model.counts.shape == (1, 4, 2, 2)


@pytest.mark.parametrize("prioritized", [False, True])
def test_model_state_round_trip(prioritized):
    """load_model(model.state_dict()) is the model, grown or not, bit by bit, in memory of its own."""
    model = drive(make_settings(prioritized=prioritized), branches=3).model
    state = model.state_dict()
    copy = dyna_q.load_model(state)
    for name, array in model._asdict().items():
        loaded = getattr(copy, name)
        assert loaded.dtype == array.dtype and loaded.shape == array.shape and np.array_equal(loaded, array), name
        assert array.any() or (name == "priority" and not prioritized), name
        assert not np.shares_memory(loaded, array) and loaded.flags.writeable
    transitions, q = columns([(0, 0, 1.0, 1, False)] * 3), [np.zeros((3, 6, 3)) for _ in range(2)]
    for values, m in zip(q, (model, copy), strict=True):
        rng = np.random.default_rng(0)
        dyna_q.update(values, m, np.zeros((3, 3)), transitions, 301, rng, make_settings(prioritized=prioritized))
    assert q[0].any() and np.array_equal(*q)


# === Dynamic programming on a table P[s][a] = [(probability, next, reward, terminated)] ===


def arrays_of(P: dict) -> tuple[np.ndarray, ...]:
    """Probability, next state, reward, 1 - terminated, each (S, A, B)."""
    branches = max(len(outcomes) for row in P.values() for outcomes in row.values())
    table = np.zeros((len(P), len(P[0]), branches, 4))
    for s, row in P.items():
        for a, outcomes in row.items():
            for b, (probability, next_s, reward, terminated) in enumerate(outcomes):
                table[s, a, b] = probability, next_s, reward, not terminated
    return table[..., 0], table[..., 1].astype(int), table[..., 2], table[..., 3]


def backup(P: dict, values: np.ndarray, gamma: float, arrays=None) -> np.ndarray:
    """The expected update of every pair, (S, A)."""
    probability, next_s, reward, live = arrays or arrays_of(P)
    return (probability * (reward + gamma * live * values[next_s])).sum(-1)


def value_iteration(P: dict, gamma: float) -> np.ndarray:
    """The optimal Q (S, A)."""
    arrays, q = arrays_of(P), np.zeros((len(P), len(P[0])))
    for _ in range(20_000):
        previous, q = q, backup(P, q.max(-1), gamma, arrays)
        if np.abs(q - previous).max() < 1e-13:
            return q
    raise AssertionError("no convergence")


def greedy(q: np.ndarray) -> np.ndarray:
    """Probabilities (S, A) of the greedy policy, ties (up to rounding) at random."""
    best = q >= q.max(-1, keepdims=True) - 1e-9
    return best / best.sum(-1, keepdims=True)


def expected_return(P: dict, start: np.ndarray, policy: np.ndarray, steps: int) -> float:
    """Exact undiscounted return of a policy (S, A) within so many steps."""
    arrays, values = arrays_of(P), np.zeros(len(P))
    for _ in range(steps):
        values = (policy * backup(P, values, 1.0, arrays)).sum(-1)
    return float(start @ values)


def expected_length(P: dict, start: int, policy: np.ndarray) -> float:
    """Exact number of steps until termination, by a linear solve over the states that the policy can reach."""
    probability, next_s, _, live = arrays_of(P)
    num_states = len(P)
    chain = np.zeros((num_states, num_states))
    for s, a, b in product(*map(range, probability.shape)):
        chain[s, next_s[s, a, b]] += policy[s, a] * probability[s, a, b] * live[s, a, b]
    reached, states = {start}, [start]
    for s in states:
        new = [n for n in np.flatnonzero(chain[s]) if n not in reached]
        reached.update(new)
        states += new
    chain = chain[np.ix_(states, states)]
    return float(np.linalg.solve(np.eye(len(states)) - chain, np.ones(len(states)))[0])


def distances(P: dict, start: int) -> dict[int, int]:
    """Steps from the start to each state, breadth first; terminal states are not gone beyond."""
    found, queue = {start: 0}, deque([start])
    ends = set()
    while queue:
        s = queue.popleft()
        for outcomes in P[s].values():
            for _, next_s, _, terminated in outcomes:
                if next_s not in found and s not in ends:
                    found[next_s] = found[s] + 1
                    queue.append(next_s)
                    ends |= {next_s} if terminated else set()
    return found


def make_maze(env_id: str, time: int = 0, num_envs: int = 1, **settings) -> MazeVector:
    """A maze at this time of the run."""
    maze = MazeVector(num_envs, MAZES[env_id], CHANGES_AT.get(env_id, math.inf), **settings)
    maze.reset(options={"time": time})
    return maze


# === Mazes ===

SHORTEST = {
    ("DynaMaze-v0", 0): 14, ("DynaMaze-v0", 10**9): 14, ("BlockingMaze-v0", 999): 10, ("BlockingMaze-v0", 1000): 16,
    ("ShortcutMaze-v0", 2999): 16, ("ShortcutMaze-v0", 3000): 10,
}  # fmt: skip


@pytest.mark.parametrize("refine", [1, 2, 3])
@pytest.mark.parametrize("env_id, time", SHORTEST)
def test_shortest_paths(env_id, time, refine):
    """6 x 9 cells, each split refine x refine; breadth first from S to G by the maze's own table."""
    maze = make_maze(env_id, time, refine=refine)
    assert maze.single_observation_space.n == len(maze.P) == 54 * refine**2 and maze.single_action_space.n == 4
    found = distances(maze.P, int(maze.start))
    goal = [s for s in found if maze.goal[s]]
    if refine == 1:
        assert min(found[s] for s in goal) == SHORTEST[env_id, time]
        assert goal == [8] and maze.start == {"D": 18}.get(env_id[0], 48)
    else:  # from the upper left cell of the block S to the nearest cell of the block G
        rows, columns = abs(maze.start // (9 * refine) - (refine - 1)), 8 * refine - maze.start % (9 * refine)
        assert rows + columns <= min(found[s] for s in goal) <= SHORTEST[env_id, time] * refine
        assert maze.goal.sum() == refine**2


def test_refined_dyna_maze_by_its_shortest_paths():
    """S is the upper left cell of its block: 2k cells down, 8k to the right, 3k + 1 up to the block of the goal."""
    for refine in (1, 2, 3, 4, 5):
        maze = make_maze("DynaMaze-v0", refine=refine)
        found = distances(maze.P, int(maze.start))
        assert min(found[s] for s in found if maze.goal[s]) == 13 * refine + 1


def test_table_of_a_small_maze():
    """Up, down, left, right in a drawing of four cells; a wall or the border leaves you where you are."""
    maze = MazeVector(1, "S .\n# G")
    stay = [(1.0, 0, 0.0, False)]
    assert maze.P[0] == {UP: stay, DOWN: stay, LEFT: stay, RIGHT: [(1.0, 1, 0.0, False)]}
    assert [maze.P[1][a][0][1:] for a in range(4)] == [(1, 0, False), (3, 1, True), (0, 0, False), (1, 0, False)]
    assert [maze.P[2][a][0][1] for a in range(4)] == [0, 2, 2, 3]  # out of a wall, but not from wall to wall
    assert maze.initial_state_distrib.tolist() == [True, False, False, False]


def test_steps_follow_the_table():
    """Every cell and action of the three mazes, before and after the change: step gives what P says."""
    for env_id, time in SHORTEST:
        maze = make_maze(env_id, time, num_envs=54 * 4)
        table, maze.position = maze.P, np.repeat(np.arange(54), 4)
        obs, rewards, terminations, truncations, _ = maze.step(np.tile(np.arange(4), 54))
        for i, (s, a) in enumerate(product(range(54), range(4))):
            assert table[s][a] == [(1.0, obs[i], rewards[i], terminations[i])]
        assert not truncations.any() and terminations.any()


def test_random_walk_on_the_dyna_maze():
    """The first episode is a random walk: 868.73 steps; epsilon 0.1 around the shortest paths costs 15.878."""
    table = make_maze("DynaMaze-v0").P
    assert round(expected_length(table, 18, np.full((54, 4), 0.25)), 2) == 868.73
    best = greedy(value_iteration(table, 0.95))
    assert round(expected_length(table, 18, best), 9) == 14
    assert round(expected_length(table, 18, 0.9 * best + 0.1 / 4), 3) == 15.878


def test_walls_change_at_the_exact_step():
    """The step counter decides, wherever reset has set it: the step of number 1000 is the first with the new walls."""
    for time, row in ((993, 3), (994, 4)):
        maze = make_maze("BlockingMaze-v0", time)
        for action in [RIGHT] * 5 + [UP]:
            maze.step(np.array([action]))
        assert maze.position == 4 * 9 + 8 and maze.time == time + 6
        assert maze.layout == time - 993
        maze.step(np.array([UP]))
        assert maze.position == row * 9 + 8
    maze.reset(options={"time": 999})
    assert maze.layout == 0
    maze.reset()  # without an option the clock goes on
    assert maze.time == 999
    maze.step(np.array([UP]))
    maze.reset()
    assert maze.time == 1000 and maze.layout == 1


def test_in_a_wall_one_can_stand_and_walk_out():
    """Who stands where a wall appears stays there, may bump into other walls and the border, walks out, not back in."""
    maze = make_maze("BlockingMaze-v0", 993)
    for action in [RIGHT] * 5 + [UP] * 2:
        maze.step(np.array([action]))
    gap = 3 * 9 + 8
    assert maze.position == gap and maze.layout == 1 and maze.grids[1].ravel()[gap] == "#"
    for action in (LEFT, RIGHT):
        obs, rewards, terminations, _, _ = maze.step(np.array([action]))
        assert obs == gap and not rewards.any() and not terminations.any()
    for action, cell in ((UP, gap - 9), (DOWN, gap - 9), (UP, gap - 18), (UP, 8)):
        obs, rewards, terminations, _, _ = maze.step(np.array([action]))
        assert obs == cell
    assert rewards.tolist() == [1] and terminations.tolist() == [True]
    maze.position[:] = gap
    assert maze.step(np.array([DOWN]))[0] == gap + 9


@pytest.mark.parametrize("env_id", MAZES)
def test_one_maze_is_the_vector_of_mazes(env_id):
    """gym.make and gym.make_vec give the same world action by action, across the change, through masked resets."""
    dyna_q.register_mazes()
    dyna_q.register_mazes()  # twice is no harm
    single = [gym.make(env_id) for _ in range(3)]
    many = gym.make_vec(env_id, 3, "vector_entry_point")
    rng, start = np.random.default_rng(0), CHANGES_AT.get(env_id, 0) - 300
    done = np.ones(3, bool)
    ends = 0
    for step in range(start, start + 2000):
        if done.any() or step % 500 == 0:
            mask = done | (rng.random(3) < 0.5)
            options = {"time": step}
            obs = many.reset(options=options | {"reset_mask": mask})[0]
            firsts = [single[i].reset(options=options)[0] for i in np.flatnonzero(mask)]
            assert obs[mask].tolist() == firsts
        actions = np.where(rng.random(3) < 0.5, rng.integers(4, size=3), rng.choice([UP, RIGHT], size=3))
        obs, rewards, done, truncations, _ = many.step(actions)
        for i, env in enumerate(single):
            assert env.step(int(actions[i]))[:4] == (obs[i], rewards[i], done[i], truncations[i])
        ends += done.sum()
        assert (many.unwrapped.P == single[0].unwrapped.vector.P) or step % 100
    assert ends > 5


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("env_id", MAZES)
def test_mazes_pass_gymnasiums_checker(env_id):
    """gym.make gives an environment as Gymnasium wants it."""
    dyna_q.register_mazes()
    env = gym.make(env_id, render_mode="rgb_array")
    check_env(env.unwrapped)
    assert env.observation_space == gym.spaces.Discrete(54) and env.action_space == gym.spaces.Discrete(4)


def test_picture_of_a_maze():
    """16 pixels a cell: walls black, goal green, agent blue, the rest white; the walls of the moment."""
    dyna_q.register_mazes()
    env = gym.make("BlockingMaze-v0", render_mode="rgb_array")
    for time in (0, 1000):
        env.reset(options={"time": time})
        image = env.render()
        assert image.shape == (96, 144, 3) and image.dtype == np.uint8
        cells = image.reshape(6, 16, 9, 16, 3)
        assert (cells == cells[:, :1, :, :1]).all()
        cells = cells[:, 0, :, 0]
        assert cells[0, 8].tolist() == [90, 200, 90] and cells[5, 3].tolist() == [70, 110, 220]
        black = np.argwhere(~cells.any(-1)).tolist()
        assert black == [[3, c] for c in range(9) if c != (0 if time else 8)]


# === Environments ===


def test_episode_statistics_under_masked_resets():
    """Each episode's return and length are its own, whichever others begin anew or are cut."""
    envs = EpisodeStatistics(MazeVector(3, "S . G"), max_episode_steps=4)
    obs, _ = envs.reset(options={"reset_mask": np.ones(3, bool), "time": 0})
    assert obs.tolist() == [0, 0, 0]
    script = [  # actions; then returns, lengths, terminated, truncated
        ([RIGHT, UP, RIGHT], [0, 0, 0], [1, 1, 1], [0, 0, 0], [0, 0, 0]),
        ([RIGHT, UP, LEFT], [1, 0, 0], [2, 2, 2], [1, 0, 0], [0, 0, 0]),
        ([UP, RIGHT, UP], [0, 0, 0], [1, 3, 3], [0, 0, 0], [0, 0, 0]),
        ([UP, RIGHT, UP], [0, 1, 0], [2, 4, 4], [0, 1, 0], [0, 1, 1]),
        ([RIGHT, UP, RIGHT], [0, 0, 0], [3, 1, 1], [0, 0, 0], [0, 0, 0]),
        ([LEFT, UP, RIGHT], [0, 0, 1], [4, 2, 2], [0, 0, 1], [1, 0, 0]),
    ]
    for actions, returns, lengths, terminated, truncated in script:
        _, rewards, terminations, truncations, infos = envs.step(np.array(actions))
        assert infos["episode"]["r"].tolist() == returns and infos["episode"]["l"].tolist() == lengths
        assert terminations.tolist() == [bool(x) for x in terminated] and rewards.tolist() == terminated
        assert truncations.tolist() == [bool(x) for x in truncated]
        done = terminations | truncations
        if done.any():
            envs.reset(options={"reset_mask": done, "time": 0})


def test_episode_statistics_of_a_gymnasium_environment():
    """Returns are sums of rewards; the limit truncates and is no termination; Gymnasium's own limit is kept."""
    args = dyna_q.with_task_defaults(Args(env_id="CliffWalking-v1", num_envs=2, max_episode_steps=4))
    envs = dyna_q.make_vector_env(args, args.num_envs)
    envs.reset(seed=[0, 1], options={"reset_mask": np.ones(2, bool), "time": 0})
    seen = []
    for actions in ([UP, 1], [UP, 0], [UP, 0], [UP, 1]):  # Cliff: 0 up, 1 right (into the cliff, back to the start)
        _, _, terminations, truncations, infos = envs.step(np.array(actions))
        seen.append((infos["episode"]["r"].tolist(), terminations.tolist(), truncations.tolist()))
    no, yes = [False, False], [True, True]
    assert seen == [([-1, -100], no, no), ([-2, -101], no, no), ([-3, -102], no, no), ([-4, -103], no, yes)]
    envs.reset(seed=[0, 1], options={"reset_mask": np.array([False, True]), "time": 0})
    infos = envs.step(np.array([UP, UP]))[4]
    assert infos["episode"]["r"].tolist() == [-5, -1] and infos["episode"]["l"].tolist() == [5, 1]
    envs.close()
    lake = dyna_q.make_vector_env(dyna_q.with_task_defaults(Args()), 1)
    lake.reset(seed=[0], options={"reset_mask": np.ones(1, bool), "time": 0})
    flags = [lake.step(np.array([0]))[2:4] for _ in range(100)]  # Gymnasium cuts FrozenLake at 100 steps
    assert [bool(t[0]) for _, t in flags] == [False] * 99 + [True] and not any(t[0] for t, _ in flags)
    lake.close()


def test_parse_kwargs():
    """Python literals are read as such, everything else is a string; only the first = divides."""
    settings = "a=True", "b=3", "c=0.5", "d=8x8", "e=[1, 'x']", "f=None", "g=x=y", "h="
    expected = {"a": True, "b": 3, "c": 0.5, "d": "8x8", "e": [1, "x"], "f": None, "g": "x=y", "h": ""}
    assert dyna_q.parse_kwargs(Args(env_kwargs=settings)) == expected
    assert dyna_q.parse_kwargs(Args(env_kwargs=())) == {}


@pytest.mark.parametrize("setting", ["slippery", "=3", "is slippery=True", "3=4", ""])
def test_parse_kwargs_refuses(setting, capsys):
    """What is no name=value is named in one line."""
    assert_refused(lambda: dyna_q.parse_kwargs(Args(env_kwargs=(setting,))), capsys, repr(setting))


def test_task_defaults():
    """What was not given comes from TASKS, else from the general defaults; a flag wins; ids may lack the version."""
    names = "env_kwargs", "gamma", "learning_rate", "model"
    expected = {
        "FrozenLake-v1": (("is_slippery=False",), 0.99, 0.1, "counts"),
        "FrozenLake8x8-v1": (("is_slippery=False",), 0.99, 0.1, "counts"),
        "CliffWalking-v1": ((), 1.0, 0.5, "counts"),
        "CliffWalkingSlippery-v1": ((), 1.0, 0.1, "counts"),
        "Taxi-v4": ((), 0.99, 0.5, "counts"),
        "DynaMaze-v0": ((), 0.95, 0.1, "counts"),
        "BlockingMaze-v0": ((), 0.95, 1.0, "last"),
        "ShortcutMaze-v0": ((), 0.95, 1.0, "last"),
        "Elsewhere-v0": ((), 0.99, 0.1, "counts"),
    }
    for env_id, values in expected.items():
        args = dyna_q.with_task_defaults(Args(env_id=env_id))
        assert tuple(getattr(args, name) for name in names) == values
        assert (
            dyna_q.with_task_defaults(Args(env_id=env_id.rpartition("-v")[0] if env_id in dyna_q.TASKS else env_id))
            == args
        )
        assert dyna_q.with_task_defaults(args) == args  # as when a run is resumed
        kwargs = ("is_slippery=True",)
        given = Args(env_id=env_id, env_kwargs=kwargs, gamma=0.0, learning_rate=0.0, model="counts", epsilon=0.7)
        assert dyna_q.with_task_defaults(given) == given
    merged = dyna_q.with_task_defaults(Args(env_id="FrozenLake", env_kwargs=("map_name=8x8",)))
    assert (merged.env_id, merged.env_kwargs) == ("FrozenLake-v1", ("is_slippery=False", "map_name=8x8"))
    odd = dyna_q.with_task_defaults(Args(env_kwargs=("is_slippery=a=b",)))  # the first = divides here too
    assert odd.env_kwargs == ("is_slippery=a=b",)


def test_a_maze_of_one_drawing_does_not_change():
    """change_at has nothing to change to there."""
    maze = MazeVector(1, "S . G", change_at=1)
    assert [int(maze.step(np.array([RIGHT]))[0][0]) for _ in range(2)] == [1, 2]


def test_an_environment_without_a_render_mode(register):
    """Rendering is asked for only where there is a video."""
    register("TestPlain-v0", lambda: Offset())
    args = dyna_q.with_task_defaults(Args(env_id="TestPlain-v0"))
    assert dyna_q.make_vector_env(args, 1).single_observation_space == gym.spaces.Discrete(3)


@pytest.mark.parametrize("obs", [3, -1, 1.0, np.array([1]), None])
@pytest.mark.parametrize("at_reset", [True, False])
def test_states_outside_of_the_space_end_the_run(register, capsys, obs, at_reset):
    """Compiled code would write anywhere: an observation that is too large, negative or no integer is refused."""

    class Escape(Offset):
        observation_space, action_space = gym.spaces.Discrete(3), gym.spaces.Discrete(2)

        def reset(self, *, seed=None, options=None):
            return obs if at_reset else 0, {}

        def step(self, action):
            return obs, 0.0, False, False, {}

    register("TestEscape-v0", lambda: Escape())
    envs = dyna_q.make_vector_env(dyna_q.with_task_defaults(Args(env_id="TestEscape-v0")), 1)
    play = [lambda: envs.reset(options={"reset_mask": np.ones(1, bool)}), lambda: envs.step(np.zeros(1, int))]
    if not at_reset:
        play.pop(0)()
    assert_refused(play[0], capsys, "TestEscape-v0: step ", "is not in Discrete(3)")


def test_an_evaluation_that_goes_in_circles_ends():
    """A greedy policy that stays where it is plays 1,000 steps."""
    q, steps = np.zeros((1, 3, 4)), []
    q[0, 0, LEFT] = 1
    maze = MazeVector(1, "S . G")
    envs = EpisodeStatistics(maze, max_episode_steps=10_000)
    step, maze.step = maze.step, lambda actions: (steps.append(1), step(actions))[1]
    returns, episodes = dyna_q.evaluate(q, envs, Args(eval_episodes=2), 0, SimpleNamespace(requested=0))
    assert returns.tolist() == [0, 0] and list(map(len, episodes)) == [1_000] * 2
    assert len(steps) == 2_000


def test_settings_take_the_flags():
    """The settings of an update are those of the command line; --model last keeps the last outcome alone."""
    args = Args(gamma=0.1, learning_rate=0.2, planning_steps=3, kappa=0.4, prioritized=True, theta=0.6, model="last")
    assert dyna_q.make_settings(args) == Settings(0.1, 0.2, 3, 0.4, True, 0.6, True)
    assert not dyna_q.make_settings(Args(model="counts")).last_alone


class Offset(gym.Env):
    """Observations 5, 6, 7 and actions -1, 0: action 0 goes on, action -1 stays; the reward tells the observation."""

    observation_space, action_space = gym.spaces.Discrete(3, start=5), gym.spaces.Discrete(2, start=-1)

    def __init__(self, render_mode=None):
        self.render_mode = render_mode

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.obs = 5
        return self.obs, {}

    def step(self, action):
        assert action in self.action_space
        self.obs += int(action) + 1
        return self.obs, float(self.obs), self.obs == 7, False, {}


def test_spaces_that_do_not_begin_at_0(register):
    """Observations and actions are counted from 0, whatever the environment's own numbers are."""
    register("TestOffset-v0", Offset)
    run = train(Args(env_id="TestOffset-v0", gamma=0.5, learning_rate=1.0, epsilon=1.0, num_envs=2), 100)
    envs = run.envs
    assert envs.single_observation_space == gym.spaces.Discrete(3)
    assert envs.single_action_space == gym.spaces.Discrete(2)
    obs, _ = envs.reset(seed=[0, 0], options={"reset_mask": np.ones(2, bool), "time": 0})
    assert obs.tolist() == [0, 0]
    obs, rewards, terminations, _, _ = envs.step(np.array([1, 0]))
    assert obs.tolist() == [1, 0] and rewards.tolist() == [6, 5] and not terminations.any()
    # on: 7 and the end; 6 + 7/2 = 9.5, staying at 6: the better of 6 + Q/2 and 6 + 7/2; the same at 5
    stay_6 = 6 / (1 - 0.5)  # 12, more than going on
    expected = [[[5 + 12 / 2, 6 + stay_6 / 2], [stay_6, 7], [0, 0]]] * 2
    np.testing.assert_allclose(run.q, expected, rtol=1e-6)


class Mixed(gym.Env):
    """Discrete observations, actions of a box."""

    observation_space, action_space = gym.spaces.Discrete(3), gym.spaces.Box(-1, 1, (2,))

    def __init__(self, render_mode=None):
        self.render_mode = render_mode

    def reset(self, *, seed=None, options=None):
        return 0, {}


def assert_refused(call, capsys, *words):
    """One line on stderr with these words, exit code 2."""
    with pytest.raises(SystemExit) as stop:
        call()
    assert stop.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    for word in words:
        assert word in lines[0]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "env_id, env_kwargs, words",
    [
        ("Blackjack-v1", (), ("Blackjack-v1", "observations must be Discrete")),
        ("CartPole-v1", (), ("CartPole-v1", "observations must be Discrete", "Box")),
        ("TestMixed-v0", (), ("TestMixed-v0", "actions must be Discrete", "Box")),
        ("FrozenLake-v1", ("is_slipery=True",), ("FrozenLake-v1", "is_slipery")),
        ("DynaMaze-v0", ("fog=True",), ("DynaMaze-v0", "fog")),
        ("DynaMaze-v0", ("change_at=soon",), ("DynaMaze-v0", "soon")),
        ("FrozenLake-v1", ("is_slippery",), ("name=value",)),
        ("DynaMaze-v1", (), ("DynaMaze-v1", "DynaMaze-v0")),
        ("FrozenLak-v1", (), ("FrozenLak-v1", "FrozenLake-v1")),
        ("xyz", (), ("'xyz'", "none")),
        ("no_such_module:Lake-v0", (), ("no_such_module:Lake-v0", "modules are looked for in", "PYTHONPATH")),
        ("Taxi-v3", (), ("Taxi-v3", "Taxi-v4")),
        ("CliffWalking-v0", (), ("CliffWalking-v0", "CliffWalking-v1")),
    ],
)
def test_refused_environments(env_id, env_kwargs, words, capsys, register):
    """What cannot be learned or made is said in one line that names it, exit code 2."""
    register("TestMixed-v0", Mixed)
    args = dyna_q.with_task_defaults(Args(env_id=env_id, env_kwargs=env_kwargs))
    assert_refused(lambda: dyna_q.make_vector_env(args, args.num_envs), capsys, *words)


@pytest.mark.parametrize(
    "settings",
    [
        {"gamma": 1.01}, {"gamma": -0.1}, {"epsilon": 1.5}, {"epsilon": -0.1}, {"learning_rate": 2.0}, {"theta": -1.0},
        {"planning_steps": -1}, {"kappa": -0.1}, {"num_envs": 0}, {"max_episode_steps": 0}, {"total_timesteps": 0},
        {"report_frequency": 0}, {"eval_episodes": 0}, {"seed": -1}, {"gamma": math.nan}, {"eval_frequency": -1},
        {"checkpoint_frequency": -1}, {"prioritized": True, "kappa": 0.1}, {"prioritized": True, "planning_steps": 0},
        {"kappa": 0.1, "planning_steps": 0},
    ],
)  # fmt: skip
def test_refused_numbers(settings, capsys):
    """Impossible settings are refused in one line that names the flag; the bounds themselves are fine."""
    name = next(iter(settings)).replace("_", "-")
    args = dyna_q.with_task_defaults(Args(**settings))
    assert_refused(lambda: dyna_q.check_args(args), capsys, f"--{name}")
    bounds = {"gamma": 1.0, "epsilon": 1.0, "learning_rate": 1.0, "theta": 0.0, "planning_steps": 0, "num_envs": 1}
    dyna_q.check_args(dyna_q.with_task_defaults(Args(**bounds)))
    dyna_q.check_args(dyna_q.with_task_defaults(Args(prioritized=True, planning_steps=1, gamma=0.0, epsilon=0.0)))
    for saved in ("resume", "evaluate"):  # a run from before this was refused goes on
        dyna_q.check_args(dyna_q.with_task_defaults(Args(kappa=0.1, planning_steps=0, **{saved: "x"})))


def test_evaluation_plays_greedily_a_fixed_share_each():
    """Three episodes of two learners: two by the first, one by the second; short episodes win no larger share."""
    q = np.zeros((2, 3, 4))
    q[0, :2, RIGHT], q[1, 0, LEFT], q[1, 1, UP] = 1, 1, 1  # to the goal; not from the spot
    envs, before = EpisodeStatistics(MazeVector(2, "S . G"), max_episode_steps=9), q.copy()
    stop = SimpleNamespace(requested=0)
    returns, _ = dyna_q.evaluate(q, envs, Args(eval_episodes=3), 0, stop)
    assert returns.tolist() == [1, 1, 0] and np.array_equal(q, before)
    returns, episodes = dyna_q.evaluate(q, envs, Args(eval_episodes=5), 0, stop)
    way = [(0, RIGHT, 0, 1), (1, RIGHT, 1, 2)]  # of the first learner, which plays on until the second has lost twice
    assert returns.tolist() == [1, 1, 1, 0, 0] and episodes == [way] * 9
    assert dyna_q.evaluate(q, envs, Args(eval_episodes=1), 0, stop)[0].tolist() == [1]


@pytest.mark.parametrize("time, expected", [(990, 1.0), (999, 1.0), (1000, 0.0)])
def test_evaluation_takes_place_in_the_world_as_it_is(time, expected):
    """The ten steps of the old way earn the reward before the change (the clock stands still), nothing after it."""
    maze = make_maze("BlockingMaze-v0")
    q = value_iteration(maze.P, 0.95)[None]
    envs = EpisodeStatistics(maze, max_episode_steps=40)
    returns, _ = dyna_q.evaluate(q, envs, Args(eval_episodes=1), time, SimpleNamespace(requested=0))
    assert returns.tolist() == [expected]


def test_what_is_played_has_no_bonus():
    """Dyna-Q+: the values of the known pairs by value iteration on the model; what was never tried keeps its 0."""
    args, envs = Args(env_id="DynaMaze-v0", model="last", kappa=0.1, num_envs=3), MazeVector(3, "S . . .\n. # . G")
    run = train(args, 14, EpisodeStatistics(envs, max_episode_steps=99))
    assert dyna_q.values_to_play(run.q, run.model, dyna_q.replace(run.args, kappa=0.0)) is run.q
    values = dyna_q.values_to_play(run.q[:2], run.model, run.args)
    assert values.shape == (2, 8, 4) and np.abs(values - run.q[:2]).max() > 0.05 and values.any()
    for i in range(2):
        known, table = run.model.visits[i] > 0, {}
        assert (known.any(1) & ~known.all(1)).any()
        for s, a in np.ndindex(8, 4):  # --model last: one outcome a pair
            reward, next_s, ended = (x[i, s, a] for x in (run.model.rewards, *outcome_of(run.model)))
            outcome = (1.0, int(next_s), reward, bool(ended)) if known[s, a] else (1.0, s, 0.0, True)
            table.setdefault(s, {})[a] = [outcome]
        np.testing.assert_allclose(values[i], value_iteration(table, 0.95), atol=1e-8)


def outcome_of(model) -> tuple[np.ndarray, np.ndarray]:
    """The first outcome of each pair: next state and terminations, (N, S, A)."""
    return model.next_states[..., 0], model.terminations[..., 0]


def test_dyna_q_plus_is_evaluated_by_what_it_knows(monkeypatch, capsys):
    """What wins figure 8.5 would circle after its bonus while the clock stands still; evaluated by what it knows."""
    settings = {"env_id": "ShortcutMaze-v0", "kappa": 1e-3, "planning_steps": 50, "max_episode_steps": 10_000}
    run_dir = run(dyna_q, **settings, **LONG, total_timesteps=4000, eval_frequency=500, eval_episodes=1)
    assert [value for _, value in scalars(run_dir)["eval/episodic_return"]] == [1] * 8
    q, players = q_of(run_dir), EpisodeStatistics(make_maze("ShortcutMaze-v0"), 1000)
    stop, args = SimpleNamespace(requested=0), dyna_q.with_task_defaults(Args(**settings, eval_episodes=1))
    returns = [dyna_q.evaluate(q, players, args, step, stop)[0][0] for step in range(0, 3000, 100)]
    assert min(returns) == 0 or np.abs(q).max() > 1  # the table itself holds more than any return
    capsys.readouterr()
    command_line(monkeypatch, dyna_q, "--evaluate", run_dir)
    assert "return 1.0 +- 0.0" in capsys.readouterr().out


# === Open loop ===


def test_open_loop_against_a_plain_loop():
    """All paths of a model that branches, ends, and does not know everything, one by one, with their probabilities."""
    worlds = [(0, 0, 1.0, 1, False), (0, 0, 2.0, 2, False), (1, 1, 5.0, 3, True), (1, 1, 7.0, 0, False)]
    worlds += [(0, 0, 3.0, 1, False), (1, 1, 0.0, 3, False), (2, 1, -1.0, 2, False), (3, 0, 4.0, 0, False)]
    learners = Learners(np.zeros((2, 5, 2)), make_settings(planning_steps=0))
    for s, a, reward, next_s, ended in worlds:
        learners.update((4, 0, 9.0, 0, False), (s, a, reward, next_s, ended))  # the first learner's is another world

    def paths(s: int, actions: list, weight: float):
        """(step, state, weight, mean reward) of everything that may come."""
        if actions:
            seen = [x for x in worlds if x[:2] == (s, actions[0])] or [(s, actions[0], 0.0, s, False)]
            for _, _, _, next_s, ended in seen:
                yield len(actions), next_s, weight / len(seen), np.mean([x[2] for x in seen])
                yield from paths(next_s, [] if ended else actions[1:], weight / len(seen))

    actions = [0, 1, 0, 0, 1, 1]
    for start in range(5):
        expected, earned = np.zeros((6, 5)), np.zeros(6)
        for left, s, weight, reward in paths(start, actions, 1.0):
            expected[6 - left, s] += weight
            earned[6 - left] += weight * reward
        places, rewards = dyna_q.open_loop(learners.model, 1, start, np.array(actions))
        np.testing.assert_allclose(places, expected, atol=1e-12)
        np.testing.assert_allclose(rewards, earned, atol=1e-12)
    assert expected[0, 4] == 1 and dyna_q.open_loop(learners.model, 1, 0, np.array(actions))[0][1].sum() == 1
    assert dyna_q.open_loop(learners.model, 1, 0, np.array(actions))[0][2].sum() == pytest.approx(7 / 9)  # 2/3 of 1/3


@pytest.mark.parametrize("length", [6, 25, 60])
def test_open_loop_errors_by_hand(length):
    """A model that takes one step in two for a rest, against episodes that never rest, from every 25th step on."""
    learners, logged = Learners(np.zeros((1, 99, 1)), make_settings(planning_steps=0)), {}
    for s in range(90):
        learners.update((s, 0, 1.0, s + 1, False)).update((s, 0, 0.0, s, False))
    episodes = [[(s, 0, 1.0, s + 1) for s in range(length)], [(7, 0, 1.0, 0)] * 3, []]  # too short, and one that began
    dyna_q.log_open_loop(learners.model, episodes, SimpleNamespace(log=logged.update, tick=lambda doing: True))
    assert not logged  # the run was asked to stop
    dyna_q.log_open_loop(learners.model, episodes, SimpleNamespace(log=logged.update, tick=lambda doing: False))
    expected = {f"open_loop/obs_error_{k}": 1 - 0.5**k for k in range(1, min(25, length) + 1)}
    expected |= {f"open_loop/reward_error_{k}": 0.5 for k in range(1, min(25, length) + 1)}
    assert logged == pytest.approx(expected)


def test_open_loop_stretches(monkeypatch):
    """One behind the other, the first 100 of them: what an evaluation may cost has a bound."""
    asked = []

    def spy(model, i, s, actions):
        asked.append((i, s, *actions))
        return np.zeros((25, 9000)), np.zeros(25)

    monkeypatch.setattr(dyna_q, "open_loop", spy)
    run = SimpleNamespace(log=lambda values: None, tick=lambda doing: False)
    dyna_q.log_open_loop(None, [[(s, -s, 0.0, s + 1) for s in range(n)] for n in (60, 24, 2_900)], run)
    starts = [0, 25, *range(0, 98 * 25, 25)]
    assert asked == [(0, s, *range(-s, -s - 25, -1)) for s in starts]


# === Arrows ===


def test_arrows_of_mazes_lakes_and_cliffs():
    """The greedy action of each cell where one is better than another; walls, holes, cliff and goal as they are."""
    maze = MazeVector(1, "S . #\n. . G")
    q = np.zeros((6, 4))
    q[0, DOWN], q[3, RIGHT], q[4, RIGHT], q[1, LEFT], q[2, UP] = 1, 1, 1, 1, 1
    assert dyna_q.draw_policy(q, maze) == "v < #\n> > G"
    q[0] = 0
    assert dyna_q.draw_policy(q, maze) == ". < #\n> > G"
    lake = gym.make("FrozenLake-v1", is_slippery=False).unwrapped
    arrows = dyna_q.draw_policy(value_iteration(lake.P, 0.9), around(lake)).splitlines()
    assert arrows[1:] == ["v H v H", "> v v H", "H > > G"] and arrows[0][0] in "v>"
    cliff = gym.make("CliffWalking-v1").unwrapped
    arrows = dyna_q.draw_policy(value_iteration(cliff.P, 1.0), around(cliff))
    assert arrows.splitlines()[2:] == ["> > > > > > > > > > > v", "^ C C C C C C C C C C G"]
    taxi = around(gym.make("Taxi-v4").unwrapped)
    assert dyna_q.draw_policy(np.zeros((500, 6)), taxi) == ""


def test_a_run_ends_with_arrows(capsys):
    """Drawn once, from what would be evaluated."""
    run(dyna_q, env_id="DynaMaze-v0", **LONG, kappa=1e-4, planning_steps=50, total_timesteps=3000)
    said = capsys.readouterr().out.splitlines()
    rows = said[said.index("what the first learner would do:") + 1 :][:6]
    assert [len(row) for row in rows] == [17] * 6 and rows[0][-1] == "G" and rows[1][-1] == "^"


# === Not compiled ===


def test_it_runs_without_the_compiler():
    """NUMBA_DISABLE_JIT=1: the same run to the last bit, for a reader with a breakpoint."""
    settings = {"env_id": "DynaMaze-v0", "total_timesteps": 400, "eval_frequency": 200, "eval_episodes": 1}
    for name, changes in {"plus": {"kappa": 1e-3}, "sweeping": {"prioritized": True}}.items():
        args = Args(**settings, **changes, max_episode_steps=200, exp_name=name)
        process = Started(dyna_q, *flags_of(args))
        folder = dyna_q.main(args)
        assert process.communicate()[1].count("Error") == process.returncode == 0
        (other,) = set(glob.glob(f"runs/*{name}*")) - {folder}
        assert differences(load(folder)["parts"], load(other)["parts"]) == []


# === Model errors ===

WORLD = {  # four states, one action: 0 -> 1 or 2 (half and half), 1 -> the end in 3 with reward 1, 2 -> 0; 3 is dead
    0: {0: [(0.5, 1, 0.0, False), (0.5, 2, 0.0, False)]},
    1: {0: [(1.0, 3, 1.0, True)]},
    2: {0: [(1.0, 0, -1.0, False)]},
    3: {0: [(1.0, 0, 0.0, False)]},
}
ALL = [(0, 0, 0.0, 1, False), (0, 0, 0.0, 2, False), (1, 0, 1.0, 3, True), (2, 0, -1.0, 0, False)]


class World:
    """An environment's table and where it begins."""

    def __init__(self, P: dict, start: np.ndarray):
        self.P, self.initial_state_distrib = P, start


def table_of(P: dict, start: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return dyna_q.read_table(World(P, start), 0)


def errors_of(transitions: list[tuple], P: dict = WORLD, start=(1, 0, 0, 0), actions=1, model="counts") -> tuple:
    """(missing, wrong) of a learner that saw these transitions."""
    learners = Learners(np.zeros((1, len(P), actions)), make_settings(planning_steps=0, model=model))
    for transition in transitions:
        learners.update(transition)
    errors = dyna_q.model_errors(learners.model, *table_of(P, np.array(start, float)))
    assert list(errors) == ["model/missing", "model/wrong"]
    return tuple(errors.values())


def test_model_errors_count_what_is_missing():
    """Nothing known: all is missing and nothing wrong. All known: neither. State 3 is only an end: it never counts."""
    assert errors_of([]) == (1, 0)
    assert errors_of(ALL) == (0, 0) and errors_of(ALL * 3) == (0, 0)
    for i in range(4):  # of four outcomes one each
        assert errors_of(ALL[:i] + ALL[i + 1 :]) == (0.25, 0)
    assert errors_of([*ALL, (3, 0, 0.0, 0, False)]) == (0, 0)  # known, though out of reach
    assert errors_of([(1, 0, 1.0, 3, True)], start=(0, 1, 0, 0)) == (0, 0)  # from state 1 nothing else is in reach
    assert errors_of([], start=(0, 0, 0, 1)) == (1, 0)
    assert errors_of(ALL, start=(0, 0, 0, 1)) == (0.2, 0)  # from state 3 all five outcomes are in reach
    assert errors_of(ALL, start=(0.5, 0, 0, 0.5)) == (0.2, 0)


def test_model_errors_find_wrong_entries():
    """A wrong next state, a wrong end, a wrong reward are found, each as one of the outcomes that the model has."""
    one_of_five = (0, 0.2)
    assert errors_of([*ALL, (0, 0, 0.0, 3, False)]) == one_of_five  # wrong next state
    assert errors_of([*ALL, (0, 0, 0.0, 0, False)]) == one_of_five
    assert errors_of([*ALL, (3, 0, 0.0, 1, False)]) == one_of_five  # also out of reach
    assert errors_of([*ALL, (0, 0, 0.0, 2, True)]) == (0, 0.25)  # ended once where the table never does
    assert errors_of([*ALL, (1, 0, 1.0, 3, False)]) == (0, 0.25)  # went on once where the table always ends
    assert errors_of([*ALL[:2], ALL[3], (1, 0, 1.0, 3, False)]) == (0.25, 0.25)  # went on: the end is still missing
    assert errors_of([*ALL[:3], (2, 0, -1.0, 0, True)]) == (0.25, 0.25)  # ended: going on is still missing
    assert errors_of([*ALL[:3], (2, 0, -1.1, 0, False)]) == (0, 0.25)  # wrong reward, too low
    assert errors_of([*ALL[:3], (2, 0, -0.9, 0, False)]) == (0, 0.25)  # too high
    assert errors_of([*ALL, (0, 0, 0.3, 1, False)]) == (0, 0.5)  # a mean of 0.1: both outcomes of the pair


def test_model_errors_of_random_rewards_and_shared_outcomes():
    """A mean reward between those of the table is no error; nor is a state both gone through and ended in."""
    table = {0: {0: [(0.5, 1, 0.0, False), (0.25, 1, 2.0, True), (0.25, 1, 2.0, True)], 1: [(1.0, 0, 0.0, False)]}}
    table[1] = {a: [(1.0, 0, 0.0, False), (0.0, 1, 9.0, True)] for a in range(2)}  # what has probability 0 is none
    goes, ends, stays = (0, 0, 0.0, 1, False), (0, 0, 2.0, 1, True), (0, 1, 0.0, 0, False)
    back = [(1, a, 0.0, 0, False) for a in range(2)]
    known = {"P": table, "start": (1, 0), "actions": 2}
    assert errors_of([goes, ends, stays, *back], **known) == (0, 0)
    assert errors_of([goes, stays, *back], **known) == (2 / 6, 0)  # both ways to end there
    assert errors_of([ends, stays, *back], **known) == (1 / 6, 0)
    assert errors_of([goes, ends, stays, back[0]], **known) == (1 / 6, 0)
    assert errors_of([goes, ends, stays, *back, (1, 0, 0.0, 1, True)], **known) == (0, 1 / 5)
    assert errors_of([goes, ends, stays, back[0], (1, 1, 0.1, 0, False)], **known) == (0, 0.25)


def test_model_errors_of_several_learners():
    """The share is over all learners: one knows everything, one nothing, one something false."""
    learners = Learners(np.zeros((2, 4, 1)), make_settings(planning_steps=0))
    for good in ALL:
        learners.update(good, (3, 0, 0.0, 1, False))
    errors = dyna_q.model_errors(learners.model, *table_of(WORLD, np.eye(4)[0]))
    assert errors == {"model/missing": 0.5, "model/wrong": 0.2}


def test_model_errors_of_a_changing_maze():
    """Right after the change what was true is wrong, until it is tried again; counts keep it."""
    maze = MazeVector(1, "S . G    S # G", change_at=5)
    maze.reset(options={"time": 0})
    old = [(s, a, maze.P[s][a][0][2], maze.P[s][a][0][1], maze.P[s][a][0][3]) for s, a in product(range(2), range(4))]
    start = maze.initial_state_distrib
    assert errors_of(old, maze.P, start, 4, "last") == errors_of(old, maze.P, start, 4) == (0, 0)
    maze.time = 5  # the way from S to the right is shut: of 8 entries one is wrong, of 4 in reach one is missing
    assert errors_of(old, maze.P, start, 4, "last") == errors_of(old, maze.P, start, 4) == (1 / 4, 1 / 8)
    bump = (0, RIGHT, 0.0, 0, False)
    assert errors_of([*old, bump], maze.P, start, 4, "last") == (0, 0)
    assert errors_of([*old, bump], maze.P, start, 4) == (0, 1 / 9)


def around(world) -> SimpleNamespace:
    """Stands in for vector environments around this one."""
    spaces = {"single_observation_space": gym.spaces.Discrete(4), "single_action_space": gym.spaces.Discrete(1)}
    return SimpleNamespace(unwrapped=SimpleNamespace(envs=[SimpleNamespace(unwrapped=world)]), **spaces)


def test_a_table_of_another_form_is_none():
    """P must hold lists of four for every state: an environment with triples, or something else, does without it."""
    changes = {0: [(1.0, 0, 0.0)]}, {0: 3}, {0: [0.5]}, {}, {0: [(1.0, 4, 0.0, False)]}
    tables = [WORLD | {2: row} for row in changes] + [None, {s: WORLD[s] for s in range(3)}, np.full((4, 1, 4), 0.25)]
    for P in tables:
        assert dyna_q.known_dynamics(around(World(P, np.eye(4)[0]))) is None
    world = World(WORLD, np.eye(4)[0])
    assert dyna_q.known_dynamics(around(world)) is world
    del world.initial_state_distrib
    assert dyna_q.known_dynamics(around(world)) is None


def test_a_table_that_is_made_when_it_is_asked_for_is_made_once():
    """As that of a maze is: a table for each state and action would take minutes."""
    asked = []

    class Making(World):
        P = property(lambda self: asked.append(1) or WORLD, lambda self, P: None)

    world = Making(None, np.eye(4)[0])
    assert dyna_q.known_dynamics(around(world)) is world and len(asked) == 1


@pytest.mark.parametrize("env_id", ["FrozenLake-v1", "CliffWalking-v1", "Taxi-v4"])
def test_model_errors_of_gymnasiums_tables(env_id):
    """A learner that has seen every outcome of the table misses nothing and has nothing wrong."""
    args = dyna_q.with_task_defaults(Args(env_id=env_id, env_kwargs=()))
    envs = dyna_q.make_vector_env(args, args.num_envs)
    world = envs.unwrapped.envs[0].unwrapped
    table, start = world.P, world.initial_state_distrib
    envs.close()
    seen = [(s, a, o[2], o[1], o[3]) for s, row in table.items() for a in row for o in row[a]]
    sizes = {"start": start, "actions": len(table[0])}
    assert errors_of(seen, table, **sizes) == (0, 0)
    missing, wrong = errors_of(seen[: len(seen) // 2], table, **sizes)
    assert 0.1 < missing < 0.9 and wrong == 0


# === Learning: main's loop without its logs ===


class TableVector(gym.vector.VectorEnv):
    """Copies of a world given as a table, stepped at once: quick where hundreds of thousands of steps are needed."""

    def __init__(self, num_envs: int, P: dict, start: np.ndarray):
        self.num_envs, self.rng = num_envs, np.random.default_rng(0)
        self.P, self.initial_state_distrib = P, start
        probability, self.next_s, self.reward, self.live = arrays_of(P)
        self.cumulated, self.start = probability.cumsum(-1)[..., :-1], int(np.argmax(start))
        self.single_observation_space = gym.spaces.Discrete(len(P))
        self.single_action_space = gym.spaces.Discrete(len(P[0]))
        self.observation_space = gym.vector.utils.batch_space(self.single_observation_space, num_envs)
        self.action_space = gym.vector.utils.batch_space(self.single_action_space, num_envs)
        self.obs = np.full(num_envs, self.start)

    def reset(self, *, seed=None, options=None):
        self.obs = np.where(options["reset_mask"], self.start, self.obs)
        return self.obs, {}

    def step(self, actions):
        numbers = self.rng.random((self.num_envs, 1))
        index = self.obs, actions, (numbers > self.cumulated[self.obs, actions]).sum(-1)
        self.obs = self.next_s[index]
        return self.obs, self.reward[index], self.live[index] == 0, np.zeros(self.num_envs, bool), {}


def train(args: Args, steps: int, envs=None, until=None) -> SimpleNamespace:
    """steps real steps of each learner, or until until(run) says so: the loop of main without logs and files.

    Adds up rewards (steps, N) and the lengths of each learner's episodes.
    """
    args = dyna_q.with_task_defaults(args)
    dyna_q.check_args(args)
    envs = envs or dyna_q.make_vector_env(args, args.num_envs)
    shape = args.num_envs, int(envs.single_observation_space.n), int(envs.single_action_space.n)
    run = SimpleNamespace(args=args, envs=envs, q=np.zeros(shape), model=dyna_q.make_model(*shape), rewards=[])
    run.sums, run.settings, run.lengths = (
        np.zeros((shape[0], 3)),
        dyna_q.make_settings(args),
        [[] for _ in range(shape[0])],
    )
    generators = [np.random.default_rng([args.seed, i]) for i in range(3)]
    dones = np.ones(shape[0], bool)
    for step in range(steps):
        if dones.any():
            seeds = generators[0].integers(2**31, size=shape[0]).tolist()
            obs, _ = envs.reset(seed=seeds, options={"reset_mask": dones, "time": step})
        actions = dyna_q.act(run.q, obs, args.epsilon, generators[1].random((shape[0], 2)))
        next_obs, rewards, terminations, truncations, infos = envs.step(actions)
        transition = obs, actions, rewards, next_obs, terminations
        run.model = dyna_q.update(run.q, run.model, run.sums, transition, step + 1, generators[2], run.settings)
        obs, dones = next_obs, terminations | truncations
        run.rewards.append(rewards)
        for i in np.flatnonzero(dones):
            run.lengths[i].append(int(infos["episode"]["l"][i]))
        if until and until(run):
            break
    run.rewards = np.array(run.rewards)
    world = getattr(envs.unwrapped, "envs", [envs])[0].unwrapped
    run.P, run.start = getattr(world, "P", None), getattr(world, "initial_state_distrib", None)
    return run


@pytest.mark.parametrize(
    "settings",
    [
        {"env_id": "FrozenLake-v1", "env_kwargs": ("is_slippery=True",), "num_envs": 2, "total_timesteps": 600},
        {"env_id": "BlockingMaze-v0", "kappa": 1e-3, "num_envs": 3, "total_timesteps": 4200},
        {
            "prioritized": True,
            "env_id": "DynaMaze-v0",
            "max_episode_steps": 400,
            "num_envs": 2,
            "total_timesteps": 3000,
        },
    ],
)
def test_this_loop_is_that_of_main(settings, tmp_path, monkeypatch, capfd):
    """main, with its evaluations, reports and checkpoints, ends with the Q and the model of the loop of these tests."""
    monkeypatch.chdir(tmp_path)
    others = {"cuda": False, "eval_frequency": 500, "eval_episodes": 1, "checkpoint_frequency": 700}
    args = Args(**(others | settings), report_frequency=100)
    folder = dyna_q.main(args)
    saved = torch.load(f"{folder}/checkpoint.pt", weights_only=True)["parts"]
    run = train(args, args.total_timesteps // args.num_envs)
    assert run.q.any() and np.array_equal(saved["agent"]["q_table"].numpy(), run.q)
    model = dyna_q.load_model(saved["replay"])
    assert all(np.array_equal(one, other) for one, other in zip(model, run.model, strict=True))


def plan(run: SimpleNamespace, updates: int = 20_000) -> tuple[np.ndarray, np.ndarray]:
    """Q of the first learner after so many full backups from its model alone; beside it value iteration on that model.

    The backups come with one real step more, so the model is read after it.
    """
    settings = run.settings._replace(learning_rate=1.0, planning_steps=updates, prioritized=False)
    q, sums = run.q[:1].copy(), np.zeros((1, 3))
    model = dyna_q.Model(*[array[:1].copy() for array in run.model])
    s = int(model.visited[0, 0])
    a = int(model.tried[0, s, 0])
    _, next_s, reward, terminated = run.P[s][a][0]
    transition = columns([(s, a, reward, next_s, terminated)])
    model = dyna_q.update(q, model, sums, transition, 10**6, np.random.default_rng(0), settings)
    table = {}
    for s, a in np.ndindex(q.shape[1:]):
        visits, reward = model.visits[0, s, a], model.rewards[0, s, a]
        outcomes = zip(model.next_states[0, s, a], model.counts[0, s, a], model.terminations[0, s, a], strict=True)
        known = []
        for next_s, count, ends in outcomes:
            if count:
                known += [
                    ((count - ends) / visits, int(next_s), reward, False),
                    (ends / visits, int(next_s), reward, True),
                ]
        table.setdefault(s, {})[a] = known or [(1.0, s, 0.0, True)]  # what was never tried keeps its 0
    return q[0], value_iteration(table, settings.gamma)


def test_deterministic_frozen_lake_is_value_iteration():
    """The 4 x 4 lake that is not slippery: Q is that of dynamic programming, and the goal 6 moves away."""
    run = train(Args(epsilon=1.0, num_envs=2), 4000)
    optimal = value_iteration(run.P, 0.99)
    assert round(optimal[0].max(), 6) == round(0.99**5, 6)
    for q in run.q:
        np.testing.assert_allclose(q, optimal, atol=1e-9)
    assert expected_return(run.P, run.start, greedy(run.q[0]), 6) == 1
    assert dyna_q.model_errors(run.model, *table_of(run.P, run.start)) == {"model/missing": 0, "model/wrong": 0}


def test_slippery_frozen_lake_is_value_iteration():
    """20 learners on ice: Q is near that of the world, as near as counts and the last real steps allow."""
    world = gym.make("FrozenLake-v1").unwrapped
    args = Args(env_kwargs=(), epsilon=0.5, planning_steps=20, num_envs=20)
    envs = EpisodeStatistics(TableVector(20, world.P, world.initial_state_distrib), 100)
    q, optimal = train(args, 20_000, envs).q, value_iteration(world.P, 0.99)
    assert np.abs(q - optimal).max() < 0.25 and np.abs(q.mean(0) - optimal).max() < 0.05


def test_slippery_frozen_lake_and_its_model():
    """Planning alone solves the learned model exactly, which differs from the world by what chance has shown."""
    run = train(Args(env_kwargs=("is_slippery=True",), epsilon=0.5, num_envs=2), 12_000)
    optimal = value_iteration(run.P, 0.99)
    assert dyna_q.model_errors(run.model, *table_of(run.P, run.start)) == {"model/missing": 0, "model/wrong": 0}
    q, of_model = plan(run)
    np.testing.assert_allclose(q, of_model, atol=1e-9)
    assert 1e-3 < np.abs(of_model - optimal).max() < 0.15


def test_slippery_cliff_and_its_model():
    """CliffWalkingSlippery-v1 without discount: planning alone solves the learned model."""
    run = train(Args(env_id="CliffWalkingSlippery-v1", max_episode_steps=200), 6000)
    q, of_model = plan(run, 400_000)
    np.testing.assert_allclose(q, of_model, rtol=1e-7)


def test_cliff_walking_is_value_iteration():
    """The greedy path along the cliff takes 13 steps; Q is that of dynamic programming on every pair in reach."""
    run = train(Args(env_id="CliffWalking-v1", epsilon=1.0, planning_steps=50), 30_000)
    optimal = value_iteration(run.P, 1.0)
    known = run.model.visits[0] > 0
    assert known.any(-1).sum() == 37 and known.sum() == 37 * 4  # 48 cells less ten of cliff and the goal
    np.testing.assert_allclose(run.q[0][known], optimal[known], atol=1e-8)
    assert expected_return(run.P, run.start, greedy(run.q[0]), 13) == -13
    assert expected_return(run.P, run.start, greedy(run.q[0]), 10_000) == -13


@pytest.mark.slow
def test_taxi_is_value_iteration():
    """Taxi-v4: Q on every pair in reach, and 7.93 on average over the starts, by exact evaluation."""
    run = train(Args(env_id="Taxi-v4", epsilon=1.0, planning_steps=30), 100_000)
    optimal = value_iteration(run.P, 0.99)
    errors = dyna_q.model_errors(run.model, *table_of(run.P, run.start))
    assert errors["model/missing"] < 0.005 and errors["model/wrong"] == 0
    known = run.model.visits[0] > 0
    assert known.any(-1).sum() == 400 and round(errors["model/missing"] * 2400) == 2400 - known.sum()
    np.testing.assert_allclose(run.q[0][known], optimal[known], atol=1e-3)
    assert round(expected_return(run.P, run.start, greedy(run.q[0]), 200), 2) == 7.93


def lake_learners(map_name: str, limit: int, steps: int, **settings) -> tuple[np.ndarray, float]:
    """Exact success of the greedy policies of 20 learners on slippery ice, and of the best stationary one."""
    world = gym.make("FrozenLake-v1", map_name=map_name).unwrapped
    args = Args(env_kwargs=(), num_envs=20, max_episode_steps=limit, **settings)
    envs = EpisodeStatistics(TableVector(20, world.P, world.initial_state_distrib), limit)
    run = train(args, steps, envs)
    policies = [greedy(q) for q in [*run.q, value_iteration(world.P, 0.99)]]
    *success, best = [expected_return(world.P, world.initial_state_distrib, policy, limit) for policy in policies]
    return np.array(success), best


def test_counts_beat_the_last_outcome_on_slippery_ice():
    """4 x 4, n = 10: expected backups reach the best policy's 0.740, the last-outcome table about 0.3."""
    counts, best = lake_learners("4x4", 100, 20_000)
    assert round(best, 3) == 0.740
    assert counts.mean() > 0.725 and counts.max() > 0.739
    last, _ = lake_learners("4x4", 100, 20_000, model="last")
    assert 0.15 < last.mean() < 0.45


@pytest.mark.slow
def test_large_slippery_lake():
    """8 x 8: expected backups come near the best policy's 0.863."""
    counts, best = lake_learners("8x8", 200, 400_000, planning_steps=50)
    assert round(best, 3) == 0.863
    assert counts.mean() > 0.84 and counts.max() > 0.86


# === The book's figures ===


def episodes(num_learners: int, n: int, count: int, seed: int = 1) -> np.ndarray:
    """Steps of the first episodes of each learner on the Dyna maze, figure 8.2; (N, count)."""
    args = Args(env_id="DynaMaze-v0", num_envs=num_learners, planning_steps=n, max_episode_steps=10**9, seed=seed)
    run = train(args, 10**6, until=lambda run: min(map(len, run.lengths)) >= count)
    return np.array([lengths[:count] for lengths in run.lengths])


def test_figure_8_2():
    """30 learners: n = 50 is good in episode 3, n = 5 in episode 10, n = 0 is far from it in episode 2."""
    lengths = {n: episodes(30, n, count) for n, count in ((0, 2), (5, 10), (50, 50))}
    assert 15.5 < lengths[50][:, 2].mean() < 20
    assert lengths[50][:, 1:].sum(1).mean() < 1000
    assert 15.5 < lengths[5][:, 9].mean() < 19
    assert lengths[0][:, 1].mean() > 300
    assert lengths[50].min() >= 14
    for n in lengths:  # the random walk of the first episode: 869 +- 145 in the mean of 30, whatever n is
        assert abs(lengths[n][:, 0].mean() - 868.73) < 3 * 145
    assert np.array_equal(lengths[0][:, 0], lengths[50][:, 0])  # the planner has random numbers of its own


@pytest.mark.slow
def test_figure_8_2_with_a_thousand_learners():
    """Steps per episode within five standard errors of means over 2,000 runs of an independent implementation."""
    expected = {  # n: {episode: (mean, standard error of a 30-run mean)}
        0: {1: (868.73, 145), 2: (677, 110), 3: (500, 80), 5: (262, 39), 10: (130, 18), 20: (49, 8), 30: (18.8, 1.1)},
        5: {1: (868.73, 145), 2: (148, 12), 3: (61.6, 7), 4: (35.1, 4), 5: (23.4, 2.2), 6: (19.1, 1.1), 10: (17, 0.5)},
        50: {1: (868.73, 145), 2: (39.4, 1.8), 3: (17.5, 0.6), 4: (17, 0.5), 10: (16.9, 0.5), 50: (16.6, 0.5)},
    }
    for n, rows in expected.items():
        lengths = episodes(1000, n, max(rows), seed=n + 1)
        for episode, (mean, error) in rows.items():
            # of two means, over 1,000 and 2,000 runs (the first is exact), and the last digit of those
            tolerance = 5 * error * math.sqrt(30) * math.sqrt(1 / 1000 + 1 / 2000) + 0.06 + 0.5 * (mean > 100)
            assert abs(lengths[:, episode - 1].mean() - mean) < tolerance, (n, episode)


def scores(env_id: str, steps: int, num_learners: int = 20, **settings) -> np.ndarray:
    """Cumulative reward (steps, N) in a changing maze."""
    args = Args(env_id=env_id, num_envs=num_learners, max_episode_steps=10**9, **settings)
    return train(args, steps).rewards.cumsum(0)


def test_figure_8_4():
    """Blocking maze, alpha 1, n 10, 20 learners: with the bonus all find the new way, without it half of them."""
    plus, plain = scores("BlockingMaze-v0", 3000, kappa=1e-4), scores("BlockingMaze-v0", 3000)
    assert plus[-1].mean() > 115 and plain[-1].mean() < 105
    assert (plus[-1] > plus[2499]).all() and (plain[-1] == plain[2499]).any()
    assert 50 < plus[999].mean() < 72 and 20 < plain[999].mean() < 62


def test_figure_8_5():
    """Shortcut maze, alpha 1, n 50, 20 learners: only those with a large enough bonus find the short cut."""
    plus, plain = (scores("ShortcutMaze-v0", 6000, planning_steps=50, kappa=kappa) for kappa in (1e-3, 0.0))
    assert plus[-1].mean() > 350 and plain[-1].mean() < 315
    assert 128 < plus[2999].mean() < 144
    # the slopes at the end: about 0.081 a step for ten steps to the goal, 0.055 for sixteen
    slopes = [(x[-1] - x[-1001]).mean() / 1000 for x in (plus, plain)]
    assert slopes[0] > 0.07 and 0.045 < slopes[1] < 0.06


def updates_until_good(refine: int, **settings) -> np.ndarray:
    """Planning updates (N,) until the greedy path takes at most 1.2 times the shortest, Dyna maze refined."""
    args = Args(env_id="DynaMaze-v0", env_kwargs=(f"refine={refine}",), planning_steps=5, learning_rate=1.0,
                num_envs=10, max_episode_steps=10**9, **settings)  # fmt: skip
    maze = make_maze("DynaMaze-v0", refine=refine)
    moves, found = maze.moves[0], distances(maze.P, int(maze.start))
    limit = 1.2 * min(found[s] for s in found if maze.goal[s])
    needed = np.full(10, np.nan)

    def good(q) -> bool:
        s = int(maze.start)
        for _ in range(int(limit)):
            if not q[s].any():
                return False
            s = moves[s, q[s].argmax()]
            if maze.goal[s]:
                return True
        return False

    def all_good(run) -> bool:
        for i in np.flatnonzero(np.isnan(needed)):
            if run.lengths[i] and good(run.q[i]):
                needed[i] = run.sums[i, 2]
        return not np.isnan(needed).any()

    train(args, 10**6, until=all_good)
    return needed


def test_prioritized_sweeping_needs_far_fewer_updates():
    """Example 8.4 with alpha 1: about 150 updates beside thousands of Dyna-Q's, 650 beside tens of thousands."""
    for refine, most, least in ((1, 250, 3000), (2, 1000, 12_000)):
        sweeps, plain = updates_until_good(refine, prioritized=True), updates_until_good(refine)
        assert sweeps.mean() < most and plain.mean() > least


# === Whole runs ===


@pytest.fixture
def played(monkeypatch):
    """What the ladders of a run play: {environment: [(obs, action, reward, next_obs, terminated)]}, in their order."""
    logs, step = {}, fake_envs.Ladder.step

    def recorded(self, action):
        before, result = self.obs, step(self, action)
        logs.setdefault(self, []).append((before, int(action), result[1], result[0], result[2]))
        return result

    monkeypatch.setattr(fake_envs.Ladder, "step", recorded)
    monkeypatch.setattr(dyna_q, "rehearse", lambda *args: None)  # which plays a step of its own
    return logs


def q_of(run_dir: str) -> np.ndarray:
    return load(run_dir)["parts"]["agent"]["q_table"].numpy()


def q_learning(steps: list[tuple], shape: tuple[int, int], learning_rate: float, gamma: float):
    """The book's Q-learning on transitions (s, a, r, s', terminated): Q and the absolute TD errors."""
    q, errors = np.zeros(shape), []
    for s, a, reward, next_s, terminated in steps:
        td_error = reward + (0 if terminated else gamma * max(q[next_s])) - q[s, a]
        q[s, a] += learning_rate * td_error
        errors.append(abs(td_error))
    return q, errors


def table_errors(model, P: dict, start) -> tuple[float, float]:
    """model/missing and model/wrong, outcome by outcome."""
    live, todo = set(), [int(s) for s in np.flatnonzero(start)]
    while todo:
        if (s := todo.pop()) not in live:
            live.add(s)
            todo += [n for row in P[s].values() for chance, n, _, end in row if chance > 0 and not end]
    num_real = num_missing = num_known = num_wrong = 0
    for i, s, a in np.ndindex(model.visits.shape):
        visits, mean_reward = model.visits[i, s, a], model.rewards[i, s, a]
        outcomes = zip(model.next_states[i, s, a], model.counts[i, s, a], model.terminations[i, s, a], strict=True)
        known = [outcome for outcome in outcomes if outcome[1]]
        assert sum(count for _, count, _ in known) == visits
        seen = {(n, True) for n, _, ends in known if ends} | {(n, False) for n, count, ends in known if count > ends}
        real = [(n, bool(end)) for chance, n, _, end in P[s][a] if chance > 0]
        rewards = [reward for chance, _, reward, _ in P[s][a] if chance > 0]
        possible = min(rewards) - 1e-9 <= mean_reward <= max(rewards) + 1e-9
        num_real += len(real) if s in live else 0
        num_missing += sum(outcome not in seen for outcome in real) if s in live else 0
        num_known += len(known)
        num_wrong += sum(not possible or any(o not in real for o in seen if o[0] == n) for n, _, _ in known)
    return num_missing / num_real, num_wrong / num_known


LONG = {"checkpoint_frequency": 0, "report_frequency": 500}  # for runs of thousands of steps


BLOCKED = "........G ......... ......... .######## ......... ...S....."  # S&B example 8.2, from step 1000 on


def maze_table(rows: list[str]) -> tuple[dict, list[bool]]:
    """P of a drawing, cell by cell, and where it begins."""
    cells = {(y, x): (y * len(rows[0]) + x, cell) for y, row in enumerate(rows) for x, cell in enumerate(row)}
    P = {s: {} for s, _ in cells.values()}
    for (y, x), (s, cell) in cells.items():
        for a, (dy, dx) in enumerate(((-1, 0), (1, 0), (0, -1), (0, 1))):
            n, ahead = cells.get((y + dy, x + dx), (s, cell))
            n, ahead = (s, cell) if ahead == "#" else (n, ahead)
            P[s][a] = [(1.0, n, float(ahead == "G"), ahead == "G")]
    return P, [cell == "S" for _, cell in cells.values()]


SLIPPERY = {"env_id": "FrozenLake-v1", "env_kwargs": ("is_slippery=True",)}


TABLES = {
    "ladder": {"total_timesteps": 600},
    "lake": {**SLIPPERY, "total_timesteps": 600},
    "two lakes": {**SLIPPERY, "num_envs": 2, "total_timesteps": 1200},
    "lakes that forget": {**SLIPPERY, "model": "last", "num_envs": 3, "total_timesteps": 1800},
    "changing maze": {"env_id": "BlockingMaze-v0", "max_episode_steps": 60, "total_timesteps": 1800},
    "taxi": {"env_id": "Taxi-v4", "epsilon": 1.0, "total_timesteps": 600},
}


@pytest.mark.parametrize("kind", TABLES)
def test_dyna_q_logs_everything(kind):
    """Each kind of environment: tags, finite values, growing steps; the model beside the environment's own table."""
    settings = TABLES[kind] | LONG | {"report_frequency": 100, "eval_frequency": 600}
    args, run_dir = tiny(dyna_q, **settings), run(dyna_q, **settings)
    expected = {"charts/episodic_return", "charts/episodic_length", "charts/SPS"}
    expected |= {"eval/episodic_return", "eval/episodic_return_std"}
    expected |= {"losses/td_error", "model/planning_td_error", "model/states_visited"}
    tags = scalars(run_dir)
    horizons = {tag for tag in tags if tag.startswith("open_loop/")}
    assert horizons > {f"open_loop/{what}_error_{k}" for what in ("obs", "reward") for k in (1, 2)}
    assert set(tags) - horizons == expected | (set() if kind == "ladder" else {"model/missing", "model/wrong"})
    assert_healthy(run_dir)
    reports = list(range(100 * args.num_envs, args.total_timesteps + 1, 100 * args.num_envs))
    for tag in set(tags) - horizons - {"charts/episodic_return", "charts/episodic_length"}:
        steps = reports if not tag.startswith("eval/") else list(range(600, args.total_timesteps + 1, 600))
        assert [step for step, _ in tags[tag]] == steps, tag
    assert all(value > 0 for _, value in tags["charts/SPS"])

    model, visits = model_of(dyna_q, run_dir), model_of(dyna_q, run_dir).visits
    if dyna_q.with_task_defaults(args).model == "last":
        assert visits.max() == (model.counts > 0).sum(-1).max() == 1
    else:
        assert visits.sum() == args.total_timesteps
    visited = (visits > 0).any(-1).sum(-1)
    assert tags["model/states_visited"][-1][1] == pytest.approx(visited.mean())
    if kind == "ladder":
        return
    if kind == "changing maze":
        table = maze_table(BLOCKED.split())
    else:
        world = gym.make(args.env_id, **dyna_q.parse_kwargs(dyna_q.with_task_defaults(args))).unwrapped
        table = world.P, world.initial_state_distrib
    missing, wrong = table_errors(model, *table)
    assert tags["model/missing"][-1][1] == pytest.approx(missing) and 0 < missing < 1
    assert tags["model/wrong"][-1][1] == pytest.approx(wrong) and (wrong > 0) == (kind == "changing maze")
    if kind != "changing maze" and args.model != "last":
        assert all(a >= b for (_, a), (_, b) in zip(tags["model/missing"][:-1], tags["model/missing"][1:], strict=True))


ONE_STATE = {"plain": {}, "bonus": {"kappa": 1.0}, "two": TWO_ENVS, "no planning": {"planning_steps": 0}}


ONE_STATE |= {"prioritized": {"prioritized": True, "theta": 0.5}}


ONE_STATE |= {"two prioritized": ONE_STATE["prioritized"] | TWO_ENVS}


@pytest.mark.parametrize("kind", ONE_STATE)
def test_reported_errors_are_those_of_the_steps_since_the_last_report(kind):
    """One state, one action, reward 1: each update takes the same share off the error, so every report is known.

    A run that ends reports the two steps since the last report; the resumed one reports all five.
    """
    settings = {"env_id": "fake_envs:OneState-v0", "learning_rate": 0.5, "gamma": 0.9, **ONE_STATE[kind]}
    args = tiny(dyna_q, **settings)
    run_dir = run(dyna_q, **settings, total_timesteps=12 * args.num_envs)
    resume(dyna_q, run_dir, **settings, total_timesteps=20 * args.num_envs)
    error, errors, expected = 1.0, [], {"losses/td_error": [], "model/planning_td_error": []}
    for _ in range(4):
        direct, planning = [], []
        for _ in range(5):
            direct.append(error)
            if not args.prioritized:
                error *= 0.95
            for _ in range(args.planning_steps):
                if not args.prioritized or error > args.theta:
                    planning.append(error)
                    error *= 0.95
        errors += direct
        expected["losses/td_error"].append(np.mean(direct))
        expected["model/planning_td_error"].append(np.mean(planning) if planning else 0)
    assert (expected["model/planning_td_error"][-1] == 0) == (args.prioritized or not args.planning_steps)
    tags = scalars(run_dir)
    for tag, values in expected.items():
        regular = [value for step, value in tags[tag] if step % (5 * args.num_envs) == 0]
        assert regular == pytest.approx(values, rel=1e-5), tag
    assert dict(tags["losses/td_error"])[12 * args.num_envs] == pytest.approx(np.mean(errors[10:12]), rel=1e-5)
    assert [value for _, value in tags["model/states_visited"]] == [1] * 5
    np.testing.assert_allclose(q_of(run_dir), (1 - error) / (1 - 0.9))


@pytest.mark.parametrize("num_envs", [1, 2, 40])
@pytest.mark.parametrize(("env_id", "length"), [("Ladder-v0", 12), ("DeadlyLadder-v0", 6), ("BothEndsLadder-v0", 12)])
def test_each_environment_has_a_learner_of_its_own(played, capsys, num_envs, env_id, length):
    """Without planning every table is Q-learning on what its own environment played: a truncated episode goes on."""
    settings = {"env_id": f"fake_envs:{env_id}", "num_envs": num_envs, "planning_steps": 0, "epsilon": 0.5}
    settings |= {"total_timesteps": 60 * num_envs, "learning_rate": 0.5, "gamma": 0.9, **LONG, "report_frequency": 20}
    run_dir = run(dyna_q, **settings)
    said, tags = capsys.readouterr().out, scalars(run_dir)
    assert len(played) == num_envs and {len(steps) for steps in played.values()} == {60}
    assert load(run_dir)["global_step"] == 60 * num_envs
    q, model = q_of(run_dir), model_of(dyna_q, run_dir)
    assert q.shape == (num_envs, 26, 2)
    td_errors = []
    for i, steps in enumerate(played.values()):
        expected, errors = q_learning(steps, (26, 2), 0.5, 0.9)
        np.testing.assert_allclose(q[i], expected)
        td_errors.append(errors)
        visits, last_tried = np.zeros((2, 26, 2), int)
        for step, (s, a, *_) in enumerate(steps, 1):
            visits[s, a] += 1
            last_tried[s, a] = step
        assert np.array_equal(model.visits[i], visits) and np.array_equal(model.last_tried[i], last_tried)
    reports = [(20 * num_envs * (j + 1), part.mean()) for j, part in enumerate(np.split(np.array(td_errors), 3, 1))]
    np.testing.assert_allclose(tags["losses/td_error"], reports, rtol=1e-6)

    returns = np.array([[step[2] for step in steps] for steps in played.values()]).reshape(num_envs, -1, length).sum(-1)
    ends = [length * num_envs * (j + 1) for j in range(60 // length)]
    assert tags["charts/episodic_length"] == [(step, length) for step in ends]
    np.testing.assert_allclose(tags["charts/episodic_return"], list(zip(ends, returns.mean(0), strict=True)), rtol=1e-6)
    number = f", {num_envs} episodes" if num_envs > 1 else ""
    shown = [f"episodic_return={mean:.1f}, length={length}{number}" for mean in returns.mean(0)]
    lines = [line.split(", ", 1) for line in said.splitlines() if "episodic_return" in line]
    assert [words for _, words in lines] == shown
    assert [step for step, _ in lines] == [f"global_step={step}" for step in ends for _ in shown[:: len(ends)]]


@pytest.mark.parametrize("checkpoint", [0, 12])
def test_a_td_error_that_is_not_finite_is_found_at_once(checkpoint):
    """A reward of step 31 that is no number stops the run there: nothing has learned from it, and that is saved."""
    settings = {"env_id": "fake_envs:NanLadder-v0", "checkpoint_frequency": checkpoint}
    with pytest.raises(SystemExit) as stopped:
        run(dyna_q, **settings, total_timesteps=240)
    run_dir = str(next(Path.cwd().glob("run_0/runs/*")))
    assert stopped.value.code == 1 and load(run_dir)["global_step"] == model_of(dyna_q, run_dir).visits.sum() == 30
    assert not_finite(load(run_dir)["parts"]) == []


def test_spaces_that_do_not_begin_with_0():
    """Observations and actions from 5 on are learned as if they began with 0."""
    plain, shifted = run(dyna_q), run(dyna_q, env_id="fake_envs:ShiftedLadder-v0")
    assert differences(load(plain)["parts"], load(shifted)["parts"]) == []
    assert losses(plain) == losses(shifted)


def test_dyna_q_begins_new_episodes_after_a_stop_in_the_middle():
    """Nothing of an open episode is stored; what was played of it has been learned."""
    run_dir = run(dyna_q, total_timesteps=30)
    assert list(load(run_dir)["parts"]) == ["agent", "sums", "replay", "eval_owed"]
    assert model_of(dyna_q, run_dir).visits.sum() == 30
    resume(dyna_q, run_dir, total_timesteps=60)
    assert scalars(run_dir)["charts/episodic_length"] == [(step, 12) for step in (12, 24, 42, 54)]
    assert model_of(dyna_q, run_dir).visits.sum() == 60


def test_a_model_that_was_not_saved_is_learned_anew():
    """--no-save-buffer: the model knows the steps since the resume alone."""
    forgets, keeps = (run(dyna_q, save_buffer=saves) for saves in (False, True))
    visits = {}
    for saves, run_dir in ((False, forgets), (True, keeps)):
        resume(dyna_q, run_dir, save_buffer=saves, total_timesteps=60)
        visits[saves] = scalars(run_dir)["model/states_visited"]
    assert [step for step, _ in visits[False]] == [step for step, _ in visits[True]] == sorted([*range(5, 61, 5), 48])
    before, after = (max(value for step, value in visits[False] if (step <= 48) == early) for early in (True, False))
    assert after <= 12 < before
    assert [value for _, value in visits[True]] == sorted(value for _, value in visits[True])


def test_a_table_with_the_bonus_is_not_played_in_silence(capsys):
    """Without its model a Dyna-Q+ run can only play the table with the bonus: --evaluate says so."""
    for saves, kappa in ((False, 0.1), (True, 0.1), (False, 0.0)):
        run_dir = run(dyna_q, save_buffer=saves, kappa=kappa)
        capsys.readouterr()
        dyna_q.main(Args(**load(run_dir)["args"] | {"evaluate": run_dir}))
        assert ("the model was not saved" in capsys.readouterr().out) == (not saves and kappa > 0)


WALLS = {"env_id": "BlockingMaze-v0", "max_episode_steps": 30}


CHECKPOINTS = {
    "lake": ({**SLIPPERY, "total_timesteps": 600}, [100, 300]),
    "prioritized lake": ({**SLIPPERY, "prioritized": True, "total_timesteps": 600}, [300]),
    "before and after the walls change": ({**WALLS, "total_timesteps": 1500}, [900, 1100]),
    "bonus": ({**WALLS, "kappa": 1e-3, "total_timesteps": 1500}, [900]),
}


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_resume_from_the_end_of_an_episode_equals_never_stopped(monkeypatch, kind):
    """Bit for bit from checkpoints on the way; the clock that moves the walls goes on."""
    settings, wanted = CHECKPOINTS[kind]
    settings = {"checkpoint_frequency": 1, "planning_steps": 10, **settings}
    copies, save = {}, dyna_q.save_checkpoint

    def save_and_copy(run_dir, args, global_step, parts, rng):
        save(run_dir, args, global_step, parts, rng)
        if len(copies) < len(wanted) and global_step >= wanted[len(copies)]:
            copies[global_step] = copy_of(os.path.abspath(run_dir))

    with monkeypatch.context() as patch:
        patch.setattr(dyna_q, "save_checkpoint", save_and_copy)
        whole = run(dyna_q, **settings)
    assert len(copies) == len(wanted) and max(copies) < max(wanted) + 200
    assert "walls" not in kind or min(copies) < 1000 < max(copies)
    for step, folder in copies.items():
        assert load(folder)["global_step"] == step
        resume(dyna_q, folder, **settings)
        assert differences(load(whole), load(folder)) == [], step
        assert losses(whole) == losses(folder), step
        assert_healthy(folder)


VARIANTS = {"counts": {}, "last": {"model": "last"}, "kappa": {"kappa": 1e-4}, "prioritized": {"prioritized": True}}


def test_every_variant_finds_the_way_through_the_maze():
    """S&B example 8.1: 14 steps. Where nothing is random, counts are the book's table to the last bit."""
    tables = {}
    for kind, changes in VARIANTS.items():
        settings = {"env_id": "DynaMaze-v0", "learning_rate": 0.5, "epsilon": 0.5, "planning_steps": 30, **changes}
        run_dir = run(dyna_q, **settings, **LONG, total_timesteps=6000, eval_frequency=6000)
        maze = dyna_q.MazeVector(1, dyna_q.MAZES["DynaMaze-v0"])
        obs, _ = maze.reset()
        tables[kind], path = q_of(run_dir), []
        while not maze.goal[obs[0]] and len(path) < 20:
            obs = maze.step(np.array([tables[kind][0, obs[0]].argmax()]))[0]
            path.append(int(obs[0]))
        assert len(path) == 14 and path[-1] == 8, kind
        assert scalars(run_dir)["eval/episodic_return"] == [(6000, 1)], kind
        assert scalars(run_dir)["eval/episodic_return_std"] == [(6000, 0)], kind
    assert np.array_equal(tables["counts"], tables["last"])
    for a, b in (("counts", "kappa"), ("counts", "prioritized"), ("kappa", "prioritized")):
        assert not np.array_equal(tables[a], tables[b]), (a, b)


def test_evaluations_show_known_returns():
    """The best returns of the non-slippery lake and of the cliff; wins and losses on the slippery lake."""
    lake = scalars(run(dyna_q, **LAKE, **LONG, total_timesteps=3000, eval_frequency=3000))
    assert lake["eval/episodic_return"] == [(3000, 1)] and lake["eval/episodic_return_std"] == [(3000, 0)]
    cliff = {"env_id": "CliffWalking-v1", "planning_steps": 10, "total_timesteps": 4000, "max_episode_steps": 500}
    tags = scalars(run(dyna_q, **cliff, **LONG, eval_frequency=4000))
    assert tags["eval/episodic_return"] == [(4000, -13)] and tags["eval/episodic_return_std"] == [(4000, 0)]
    tags = scalars(run(dyna_q, **SLIPPERY, **LONG, total_timesteps=4000, eval_frequency=2000, eval_episodes=50))
    for (_, mean), (_, std) in zip(tags["eval/episodic_return"], tags["eval/episodic_return_std"], strict=True):
        assert 0 < mean < 1 and mean * 50 == pytest.approx(round(mean * 50), abs=1e-4)
        assert std == pytest.approx((mean * (1 - mean)) ** 0.5)


def test_every_learner_is_evaluated(monkeypatch, capsys):
    """The episodes that were asked for are shared out evenly, to the first learners if there are fewer."""
    run_dir = run(dyna_q, num_envs=3)
    for asked, played in ((1, 1), (3, 3), (7, 7)):
        capsys.readouterr()
        command_line(monkeypatch, dyna_q, "--evaluate", run_dir, "--eval-episodes", str(asked))
        assert f"({played} episodes: " in capsys.readouterr().out


FILMS = {
    "lake": {**SLIPPERY, "total_timesteps": 1000},
    "maze": {**WALLS, "max_episode_steps": 200, "planning_steps": 50, "kappa": 1e-4, "total_timesteps": 1000},
}


@pytest.mark.parametrize("kind", FILMS)
def test_films_change_no_figure(monkeypatch, capsys, kind):
    """Training and evaluations are the same with and without; the maze's way is blocked on the evaluation's clock."""
    pytest.importorskip("moviepy", reason="moviepy is not installed.")
    settings = FILMS[kind] | LONG | {"eval_frequency": 500}
    filmed, plain = run(dyna_q, **settings, capture_video=True), run(dyna_q, **settings)
    assert losses(filmed) == losses(plain)
    assert differences(load(filmed)["parts"], load(plain)["parts"]) == []
    videos = list(Path(filmed).rglob("*.mp4"))
    assert len(videos) == 2 and all(video.stat().st_size > 500 for video in videos)
    assert not list(Path(plain).rglob("*.mp4"))
    if kind == "maze":
        assert scalars(plain)["eval/episodic_return"] == [(500, 1), (1000, 0)]
    said = []
    for flags in ((), ("--capture-video",)):
        capsys.readouterr()
        command_line(monkeypatch, dyna_q, "--evaluate", plain, *flags)
        said.append(capsys.readouterr().out.splitlines()[-1])
    assert said[0] == said[1] and "(2 episodes: " in said[0]
    assert kind != "maze" or "return 0.0 +- 0.0" in said[0]
    assert len(list(Path(plain).rglob("*.mp4"))) == 1


def test_the_clock_of_the_walls_is_that_of_the_run(monkeypatch):
    """In the middle of an episode, over its end, over a stop and beside evaluations, for all learners at once."""
    times, step = [], dyna_q.MazeVector.step

    def recorded(self, actions):
        times.extend([self.time] if not self.frozen and self.num_envs == 2 else [])  # a rehearsal has one
        return step(self, actions)

    monkeypatch.setattr(dyna_q.MazeVector, "step", recorded)
    settings = {"env_id": "BlockingMaze-v0", "max_episode_steps": 30, "num_envs": 2, "eval_frequency": 40}
    run_dir = run(dyna_q, **settings, total_timesteps=100)
    resume(dyna_q, run_dir, **settings, total_timesteps=200)
    assert times == list(range(100))


@pytest.mark.parametrize("video", [None, "videos/film"], ids=["plain", "filmed"])
def test_the_walls_stand_still_while_an_evaluation_plays(video):
    """Two learners on the way that is open until step 1000, one of them late at times, evaluated 5 steps before it."""
    if video:
        pytest.importorskip("moviepy", reason="moviepy is not installed.")
    settings = {"env_id": "BlockingMaze-v0", "max_episode_steps": 60, "eval_episodes": 10}
    args, stop = dyna_q.with_task_defaults(tiny(dyna_q, **settings)), types.SimpleNamespace(requested=0)
    q = np.zeros((2, 54, 4))
    q[:, 45:53, 3] = q[:, [53, 44, 35, 26, 17], 0] = 1  # right along the last row, then up
    q[1, 48] = 0  # where it begins, any direction is as good
    q[1, 39, 1] = 1
    for evaluated, expected in ((995, 1.0), (1000, 0.0)):
        envs = dyna_q.make_vector_env(args, 2, video)
        assert dyna_q.evaluate(q, envs, args, evaluated, stop)[0].tolist() == [expected] * 10
        envs.close()


def test_settings_of_the_environment_on_the_command_line(monkeypatch, capsys):
    """--env-kwargs replaces the task's own; a resume takes the run's."""
    flags = ("--total-timesteps", "400", "--eval-frequency", "0", "--eval-episodes", "2", "--save-model")
    command_line(monkeypatch, dyna_q, "--env-kwargs", "is_slippery=True", "map_name=8x8", *flags)
    (run_dir,) = map(str, Path("runs").iterdir())
    assert load(run_dir)["args"]["env_kwargs"] == ("is_slippery=True", "map_name=8x8")
    model = model_of(dyna_q, run_dir)
    assert model.visits.shape == (1, 64, 4) and (model.counts > 0).sum(-1).max() > 1
    command_line(monkeypatch, dyna_q, "--resume", run_dir, "--total-timesteps", "500")
    state = load(run_dir)
    assert state["global_step"] == 500 and state["args"]["env_kwargs"] == ("is_slippery=True", "map_name=8x8")
    for setting in ("is_slippery=False", "is_slippery=True"):
        line = error_of(capsys, command_line, monkeypatch, dyna_q, "--resume", run_dir, "--env-kwargs", setting)
        assert "--env-kwargs" in line and setting in line
    command_line(monkeypatch, dyna_q, "--evaluate", run_dir)
    assert "(2 episodes: " in capsys.readouterr().out
    assert differences(state, load(run_dir)) == []


def test_settings_are_added_to_those_of_the_task():
    """An id without its version is the task's; what is set anew replaces the task's own setting, the rest stays."""
    for given, in_force in (
        (("map_name=8x8",), ("is_slippery=False", "map_name=8x8")),
        (("is_slippery=true",), ("is_slippery=true",)),
        (("is_slippery=false",), ("is_slippery=false",)),
    ):
        run_dir = run(dyna_q, env_id="FrozenLake", env_kwargs=given, epsilon=1.0, total_timesteps=400)
        args, model = load(run_dir)["args"], model_of(dyna_q, run_dir)
        assert args["env_id"] == "FrozenLake-v1" and args["env_kwargs"] == in_force
        assert model.visits.shape == (1, 64 if "8x8" in given[0] else 16, 4)
        assert ((model.counts > 0).sum(-1).max() > 1) == ("true" in given[0])


def test_settings_of_the_task_stay_in_force(monkeypatch, capsys):
    """What was left open is filled in and saved: a resume need not give it, may give the same, and nothing else."""
    short = ("--total-timesteps", "100", "--eval-frequency", "0")
    command_line(monkeypatch, dyna_q, *short)
    command_line(monkeypatch, dyna_q, "--env-id", "BlockingMaze-v0", "--learning-rate", "0.5", *short)
    lake, maze = (str(next(Path("runs").glob(f"{name}*"))) for name in ("FrozenLake", "BlockingMaze"))
    in_force = {"env_kwargs": ("is_slippery=False",), "gamma": 0.99, "learning_rate": 0.1, "model": "counts"}
    assert in_force.items() <= load(lake)["args"].items()
    in_force = {"env_kwargs": (), "gamma": 0.95, "learning_rate": 0.5, "model": "last"}
    assert in_force.items() <= load(maze)["args"].items()
    assert (model_of(dyna_q, lake).counts > 0).sum(-1).max() == 1
    for step, flags in ((120, ()), (140, ("--gamma", "0.99", "--env-kwargs", "is_slippery=False"))):
        command_line(monkeypatch, dyna_q, "--resume", lake, "--total-timesteps", str(step), *flags)
        assert load(lake)["global_step"] == step
    for flag, value, saved in (("gamma", "0.5", "0.99"), ("learning-rate", "1.0", "0.1"), ("model", "last", "counts")):
        line = error_of(capsys, command_line, monkeypatch, dyna_q, "--resume", lake, f"--{flag}", value)
        assert f"--{flag} {value} clashes" in line and saved in line
    resume(dyna_q, lake, **LAKE, **dict.fromkeys(("planning_steps",), 10), report_frequency=100, eval_episodes=10,
           checkpoint_frequency=50_000, total_timesteps=160)  # fmt: skip
    assert load(lake)["global_step"] == 160
