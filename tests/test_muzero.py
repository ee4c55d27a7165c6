"""muzero.py in numbers: the searches against hand-worked tables and a plain recursion, targets, replay, boards."""

import importlib
import importlib.util
import itertools
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import fields, replace
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from runs import (
    TWO_ENVS,
    assert_healthy,
    command_line,
    differences,
    error_of,
    image_tags,
    load,
    resume,
    run,
    scalars,
    tiny,
)

import muzero

F64 = torch.float64
CPU = torch.device("cpu")


@pytest.fixture(autouse=True, scope="module")
def compiled():
    """The loops of the search, from the disk if they are there."""
    muzero.compile_search()


def never(doing: str) -> bool:
    """Nobody asks an evaluation to stop."""
    return False


def make_args(**changes) -> muzero.Args:
    return muzero.with_task_defaults(muzero.Args(**{"cuda": False} | changes))


# === The searches by hand ===


def hand_model(rewards, values, discount, dtype=F64):
    """Every state has prior (0.2, 0.5, 0.3); action a earns rewards[a] and leads to a state worth values[a]."""
    prior, rewards, values = (torch.tensor(x, dtype=dtype) for x in ((0.2, 0.5, 0.3), rewards, values))

    def model(latent, action):
        reward = rewards[action]
        return latent, reward, torch.full_like(reward, discount), prior.log().expand(len(action), 3), values[action]

    return model, prior.log()[None]


puct_search, gumbel_search = muzero.puct_search, muzero.gumbel_search


def hand_search(
    search, num_simulations, root_value=0.3, problem=((0.5, 0, 0), (0.1, 0.2, 0.8), 0.9), dtype=F64, **kwargs
):
    model, logits = hand_model(*problem, dtype)
    root = torch.zeros(1, 1, dtype=dtype), logits, torch.tensor([root_value], dtype=dtype)
    args = make_args(num_simulations=num_simulations, c_scale=kwargs.pop("c_scale", 0.1))
    legal = torch.ones(1, 3, dtype=torch.bool)
    if search is puct_search:
        return search(model, root, legal, None, None, args, **kwargs)
    return search(model, root, legal, kwargs.pop("noise", None), args, **kwargs)


PUCT = {  # simulations: (visits, Q, mean of the root)
    1: ((0, 1, 0), (0, 0.18, 0), 0.24),
    2: ((0, 1, 1), (0, 0.18, 0.72), 0.4),
    3: ((0, 1, 2), (0, 0.18, 0.441), 0.3405),
    4: ((0, 1, 3), (0, 0.18, 0.51), 0.402),
    5: ((0, 1, 4), (0, 0.18, 0.41895), 0.3593),
    6: ((0, 1, 5), (0, 0.18, 0.4518), 0.391286),
    7: ((0, 2, 5), (0, 0.171, 0.4518), 0.362625),
    8: ((1, 2, 5), (0.59, 0.171, 0.4518), 0.387889),
    50: ((41, 4, 5), (1.48175, 0.28395, 0.4518), 1.263658),
}


@pytest.mark.parametrize("num_simulations", PUCT)
def test_puct_by_hand(num_simulations):
    """One player; the bounds of Q are those of the whole tree."""
    visits, qvalues, mean = PUCT[num_simulations]
    result = hand_search(puct_search, num_simulations)
    assert result.visit_counts[0].tolist() == list(visits)
    assert result.qvalues[0].tolist() == pytest.approx(qvalues, abs=5e-7)
    assert result.value.item() == pytest.approx(mean, abs=5e-7)
    assert result.policy[0].tolist() == pytest.approx([v / num_simulations for v in visits])


SCORES = {  # simulations before: (Qn, U) of the root's actions, hand-worked to six digits
    0: ((0, 0, 0), (0.250020, 0.625051, 0.375031)),
    1: ((0, 0, 0), (0.353597, 0.441996, 0.530395)),
    4: ((0, 0, 0.611111), (0.559154, 0.698942, 0.209683)),
}


@pytest.mark.parametrize("num_simulations", SCORES)
def test_puct_scores_by_hand(num_simulations):
    """Q rescaled and U at the root, before simulations 1, 2 and 5; the choice is the argmax of their sum."""
    (model, logits), args = hand_model((0.5, 0, 0), (0.1, 0.2, 0.8), 0.9), make_args(num_simulations=num_simulations)
    root = torch.zeros(1, 1, dtype=F64), logits, torch.tensor([0.3], dtype=F64)
    legal = torch.ones(1, 3, dtype=torch.bool)
    nodes, edges = muzero.grow(model, root, legal, None, args, True, None)
    bounds = muzero.tree_bounds(nodes[0], num_simulations + 1, 0.0)
    visits, q, count = edges[0, 0]["visits"], edges[0, 0]["q"], nodes[0, 0]["count"]
    qn = [muzero.rescale(q[a], bounds) if visits[a] > 0 else 0.0 for a in range(3)]
    u = edges[0, 0]["prior"] * math.sqrt(count) * (1.25 + math.log((count + 19653) / 19652)) / (1 + visits)
    assert qn == pytest.approx(SCORES[num_simulations][0], abs=5e-7)
    assert u.tolist() == pytest.approx(SCORES[num_simulations][1], abs=5e-7)
    assert muzero.puct_choice(nodes[0, 0], edges[0, 0], bounds) == np.argmax(qn + u)


TWO_PLAYERS = ((0, 0, 0), (0.4, -0.5, 0.1), -1.0)


def test_two_players_by_hand():
    """d = -1 and known bounds; with the sign forgotten the visits are others."""
    visits = {1: (0, 1, 0), 2: (0, 2, 0), 3: (0, 3, 0), 4: (0, 4, 0), 5: (0, 4, 1), 8: (0, 6, 2), 50: (8, 26, 16)}
    means = {1: 0.25, 2: 0, 3: 0.125, 4: 0, 5: -0.016667, 8: 0, 50: 0.019608}
    for num_simulations, expected in visits.items():
        result = hand_search(puct_search, num_simulations, 0.0, TWO_PLAYERS, value_range=(-1.0, 1.0))
        assert result.visit_counts[0].tolist() == list(expected)
        assert result.value.item() == pytest.approx(means[num_simulations], abs=5e-7)
    assert result.qvalues[0].tolist() == pytest.approx((-0.0375, 0.015385, 0.05625), abs=5e-7)
    for num_simulations, expected, mean in ((8, [1, 4, 3], -0.211111), (50, [11, 24, 15], -0.272549)):
        result = hand_search(puct_search, num_simulations, 0.0, (*TWO_PLAYERS[:2], 1.0), value_range=(-1.0, 1.0))
        assert result.visit_counts[0].tolist() == expected
        assert result.value.item() == pytest.approx(mean, abs=5e-7)


GUMBEL = {  # simulations: (visits, improved policy, action)
    2: ((0, 1, 1), (0.020577, 0.009852, 0.969571), 2),
    4: ((1, 1, 2), (0.806156, 0.011118, 0.182726), 2),
    8: ((4, 1, 3), (0.854847, 0.009652, 0.1355), 0),
    16: ((7, 2, 7), (0.895537, 0.007491, 0.096972), 0),
}


@pytest.mark.parametrize("num_simulations", GUMBEL)
def test_gumbel_by_hand(num_simulations):
    visits, policy, action = GUMBEL[num_simulations]
    result = hand_search(gumbel_search, num_simulations)
    assert result.visit_counts[0].tolist() == list(visits)
    assert result.policy[0].tolist() == pytest.approx(policy, abs=5e-7)
    assert result.action.item() == action


def test_gumbel_noise_by_hand():
    noise = torch.tensor([[[0, 0, 0], [1, -0.5, 0.2]]], dtype=F64)
    result = hand_search(gumbel_search, 2, noise=noise)
    assert result.visit_counts[0].tolist() == [1, 0, 1] and result.action.item() == 2
    assert result.policy[0].tolist() == pytest.approx((0.014609, 0.009912, 0.975479), abs=5e-7)


HALVING = {
    (2, 16): [8, 8],
    (4, 4): [1] * 4,
    (4, 8): [3, 3, 1, 1],
    (4, 16): [6, 6, 2, 2],
    (8, 16): [4, 4, 2, 2, 1, 1, 1, 1],
    (16, 16): [1] * 16,
    (16, 32): [4] * 4 + [2] * 4 + [1] * 8,
    (16, 50): [12, 12, 5, 5] + [2] * 4 + [1] * 8,
    (3, 4): [2, 1, 1],
    (7, 50): [18, 17, 7] + [2] * 4,
    (1, 5): [5],
}


@pytest.mark.parametrize(("num_actions", "num_simulations"), HALVING)
def test_sequential_halving_by_hand(num_actions, num_simulations):
    """Visits of each candidate in final rank order, when the candidates' order never changes."""
    eligible, visits = muzero.halving_visits(num_actions, num_simulations), [0] * num_actions
    assert len(eligible) == num_simulations
    for wanted in eligible:
        visits[visits.index(wanted)] += 1
    assert visits == HALVING[num_actions, num_simulations]


def test_eligible_counts_by_hand():
    assert muzero.halving_visits(4, 8).tolist() == [0, 0, 0, 0, 1, 1, 2, 2]


# === Degenerate problems ===


@pytest.mark.parametrize(
    "problem", [((0, 0, 0), (0.7, 0.7, 0.7), 1.0), ((0.0021, 0.0021, 0.0021), (0.7, 0.7, 0.7), 0.997)]
)
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_equal_values_leave_the_choice_to_the_prior(problem, dtype):
    """Rounding must not become a preference: visits as if Q were not there, in float32 too."""
    result = hand_search(puct_search, 50, 0.7, problem, dtype)
    counts = np.zeros(3)
    for _ in range(50):
        counts[np.argmax(np.array([0.2, 0.5, 0.3]) / (1 + counts))] += 1
    assert result.visit_counts[0].tolist() == counts.tolist()
    improved = hand_search(gumbel_search, 50, 0.7, problem, dtype).policy[0].tolist()
    assert improved == pytest.approx((0.2, 0.5, 0.3), abs=1e-6)


@pytest.mark.parametrize("num_simulations", [1, 2, 3, 10, 50])
@pytest.mark.parametrize("search", [puct_search, gumbel_search])
def test_a_constant_model_has_its_value(search, num_simulations):
    """Value 1, reward 0, gamma 1: the root's mean is exactly 1, it does not shrink with few simulations."""
    result = hand_search(search, num_simulations, 1.0, ((0, 0, 0), (1, 1, 1), 1.0), torch.float32)
    assert result.value.item() == 1.0 and result.visit_counts.sum() == num_simulations


def test_values_of_a_terminal_edge_do_not_come_back():
    """Discount 0 on an edge: only its reward counts above it, whatever the states below are worth."""
    result = hand_search(puct_search, 20, 0.0, ((0.25, 0.25, 0.25), (9.0, -9.0, 5.0), 0.0))
    assert result.qvalues[0].tolist() == pytest.approx([0.25] * 3)


# === The searches against a plain recursion, one root at a time ===


class Problem:
    """A random model of M states: tables of transitions, rewards, discounts, prior logits and values."""

    def __init__(self, seed: int, num_actions: int, two_players: bool, batch: int, mask: bool):
        rng = np.random.default_rng(seed)
        M, A = 40, num_actions
        self.next = torch.from_numpy(rng.integers(M, size=(M, A)))
        scale = 1.0 if two_players else 10.0 ** rng.uniform(-2, 2)
        self.reward = torch.from_numpy(scale * rng.normal(size=(M, A)) * (rng.random((M, A)) < 0.5))
        d = -1.0 if two_players else 0.95
        self.discount = torch.from_numpy(np.where(rng.random((M, A)) < 0.1, 0.0, d))
        self.logits = torch.from_numpy(2 * rng.normal(size=(M, A)))
        self.value = torch.from_numpy(scale * rng.normal(size=M))
        self.value_range, self.floor = (-3.0, 3.0) if two_players else None, 0.0
        self.start = torch.from_numpy(rng.integers(M, size=batch))
        legal = rng.random((batch, A)) < 0.6
        legal[np.arange(batch), rng.integers(A, size=batch)] = True
        self.legal = torch.from_numpy(legal | (not mask))
        dirichlet = rng.dirichlet(np.full(A, 0.3), size=batch) * legal
        dirichlet /= np.maximum(dirichlet.sum(1, keepdims=True), 1e-30)
        self.noise = torch.from_numpy(np.stack([dirichlet, rng.gumbel(size=(batch, A))], 1))

    def __call__(self, latent, action):
        state = latent[:, 0].long()
        new = self.next[state, action]
        reward, discount = self.reward[state, action], self.discount[state, action]
        return new[:, None].double(), reward, discount, self.logits[new], self.value[new]

    def roots(self, rows):
        state = self.start[rows]
        return state[:, None].double(), self.logits[state], self.value[state]


class Node:
    def __init__(self, problem: Problem, state: int):
        self.state, A = state, problem.logits.shape[1]
        self.logits = problem.logits[state].numpy().copy()
        self.raw_value = problem.value[state].item()
        self.returns = [self.raw_value]
        self.N, self.Q, self.children = np.zeros(A), np.zeros(A), {}

    def prior(self) -> np.ndarray:
        p = np.exp(self.logits - self.logits.max())
        return p / p.sum()


def plain_simulation(problem: Problem, node: Node, choose) -> float:
    """Down to a new node and back: the return at this node."""
    a = choose(node)
    reward, discount = problem.reward[node.state, a].item(), problem.discount[node.state, a].item()
    if a in node.children:
        value = plain_simulation(problem, node.children[a], choose)
    else:
        node.children[a] = Node(problem, problem.next[node.state, a].item())
        value = node.children[a].raw_value
    node.N[a] += 1
    node.Q[a] = reward + discount * np.mean(node.children[a].returns)
    node.returns.append(reward + discount * value)
    return node.returns[-1]


def all_q(node: Node) -> list[float]:
    return [node.Q[a] for a in node.children] + [q for child in node.children.values() for q in all_q(child)]


def plain_rescale(q, low: float, high: float, floor: float):
    size = max(1, abs(low), abs(high))
    return (q - low) / max(high - low, floor * size) if high - low > 1e-5 * size else 0 * q


def plain_puct(problem: Problem, row: int, num_simulations: int, fraction=0.25):
    root = Node(problem, problem.start[row].item())
    legal = problem.legal[row].numpy()
    root.logits[~legal] = -1e300
    noisy = (1 - fraction) * root.prior() + fraction * problem.noise[row, 0].numpy()

    def choose(node):
        found = all_q(root)
        low, high = problem.value_range or ((min(found), max(found)) if found else (0, 0))
        best, best_score = None, -math.inf
        total = 1 + node.N.sum()
        for a in range(len(node.N)):
            if node is root and not legal[a]:
                continue
            q = plain_rescale(node.Q[a], low, high, problem.floor) if node.N[a] else 0
            p = noisy[a] if node is root else node.prior()[a]
            score = q + p * math.sqrt(total) / (1 + node.N[a]) * (1.25 + math.log((total + 19653) / 19652))
            if score > best_score:
                best, best_score = a, score
        return best

    for _ in range(num_simulations):
        plain_simulation(problem, root, choose)
    return root


def plain_scores(node: Node, problem: Problem, c_visit=50.0, c_scale=0.1) -> np.ndarray:
    """logits + sigma(completed Q)."""
    visited, prior, value = node.N > 0, node.prior(), node.raw_value
    if visited.any():
        mean = sum(prior[a] * node.Q[a] for a in np.flatnonzero(visited)) / max(prior[visited].sum(), 1e-30)
        value = (node.raw_value + node.N.sum() * mean) / (1 + node.N.sum())
    completed = np.where(visited, node.Q, value)
    low, high = problem.value_range or (completed.min(), completed.max())
    return node.logits + (c_visit + node.N.max()) * c_scale * plain_rescale(completed, low, high, problem.floor)


def plain_gumbel(problem: Problem, row: int, num_simulations: int, max_considered=16):
    """Sequential halving round by round: of the survivors of a phase the best so far is visited first (as in mctx)."""
    root = Node(problem, problem.start[row].item())
    legal, g = problem.legal[row].numpy(), problem.noise[row, 1].numpy()
    root.logits[~legal] = -1e300

    def interior(node):
        scores = plain_scores(node, problem)
        pi = np.exp(scores - scores.max())
        return int(np.argmax(pi / pi.sum() - node.N / (1 + node.N.sum())))

    count = survivors = min(max_considered, int(legal.sum()))
    phases, rounds, spent = max(1, math.ceil(math.log2(count))), 0, 0
    while spent < num_simulations:
        for _ in range(max(1, num_simulations // (phases * survivors))):
            for _ in range(survivors):
                if spent < num_simulations:
                    behind = [a for a in np.flatnonzero(legal) if root.N[a] == rounds]
                    scores = g + plain_scores(root, problem)
                    first = max(behind, key=lambda a: scores[a])
                    plain_simulation(problem, root, lambda node: first if node is root else interior(node))  # noqa: B023
                    spent += 1
            rounds += 1
        survivors = max(min(2, survivors), survivors // 2)
    scores = plain_scores(root, problem)
    most = [a for a in np.flatnonzero(legal) if root.N[a] == root.N.max()]
    pi = np.where(legal, np.exp(scores - scores[legal].max()), 0)
    return root, pi / pi.sum(), max(most, key=lambda a: g[a] + scores[a])


SIZES = [(1, 3), (2, 1), (2, 50), (3, 16), (4, 100), (9, 25), (18, 7), (18, 100)]  # actions, simulations
CASES = [(A, S, two, mask) for (A, S), two, mask in itertools.product(SIZES, (False, True), (False, True))]


@pytest.mark.parametrize(("num_actions", "num_simulations", "two_players", "mask"), CASES)
def test_puct_equals_a_plain_recursion(num_actions, num_simulations, two_players, mask):
    """Visits, Q and mean of every root of a batch; masks, negative values, terminal edges, noise."""
    problem = Problem(num_actions * 1000 + num_simulations, num_actions, two_players, 6, mask)
    args, rows = make_args(num_simulations=num_simulations, c_scale=0.1), torch.arange(6)
    temperature = torch.zeros(6, dtype=F64)
    result = puct_search(
        problem,
        problem.roots(rows),
        problem.legal,
        problem.noise,
        temperature,
        args,
        problem.value_range,
    )
    for row in range(6):
        root = plain_puct(problem, row, num_simulations)
        assert result.visit_counts[row].tolist() == root.N.tolist()
        np.testing.assert_allclose(result.qvalues[row], root.Q, rtol=1e-9, atol=1e-12)
        assert result.value[row].item() == pytest.approx(np.mean(root.returns), rel=1e-9, abs=1e-12)
        assert result.action[row] == root.N.argmax()
    assert not result.visit_counts[~problem.legal].any() and not result.policy[~problem.legal].any()


@pytest.mark.parametrize(("num_actions", "num_simulations", "two_players", "mask"), CASES)
def test_gumbel_equals_a_plain_recursion(num_actions, num_simulations, two_players, mask):
    """Visits, Q, improved policy and action of every root of a batch."""
    problem = Problem(num_actions * 1000 + num_simulations, num_actions, two_players, 6, mask)
    args, rows = make_args(num_simulations=num_simulations, c_scale=0.1), torch.arange(6)
    result = gumbel_search(problem, problem.roots(rows), problem.legal, problem.noise, args, problem.value_range)
    for row in range(6):
        root, policy, action = plain_gumbel(problem, row, num_simulations)
        assert result.visit_counts[row].tolist() == root.N.tolist()
        np.testing.assert_allclose(result.qvalues[row], root.Q, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(result.policy[row], policy, rtol=1e-7, atol=1e-12)
        assert result.action[row] == action
    assert not result.policy[~problem.legal].any()


@pytest.mark.parametrize("floor", [0.5, 0.9])
def test_a_floor_under_the_spread_of_q(floor):
    """Both searches with a share of the largest |Q|, or of 1, as the least spread that is rescaled."""
    problem, rows, differs = Problem(12, 5, False, 6, True), torch.arange(6), False
    problem.floor, args = floor, make_args(num_simulations=30, c_scale=0.1, q_floor=floor)
    inputs = problem, problem.roots(rows), problem.legal, problem.noise
    paper, gumbel = puct_search(*inputs, torch.zeros(6), args), gumbel_search(*inputs, args)
    without = gumbel_search(*inputs, replace(args, q_floor=0.0))
    for row in range(6):
        assert paper.visit_counts[row].tolist() == plain_puct(problem, row, 30).N.tolist()
        root, policy, _ = plain_gumbel(problem, row, 30)
        assert gumbel.visit_counts[row].tolist() == root.N.tolist()
        np.testing.assert_allclose(gumbel.policy[row], policy, rtol=1e-7, atol=1e-12)
        differs |= not np.allclose(without.policy[row], policy)
    assert differs


@pytest.mark.parametrize("search", ["puct", "gumbel"])
def test_a_row_of_a_batch_equals_the_same_row_alone(search):
    """Bit for bit, in any company."""
    problem = Problem(5, 6, False, 9, True)
    args = make_args(num_simulations=40)

    def run(rows):
        noise = (problem.legal[rows], problem.noise[rows])
        if search == "puct":
            return puct_search(problem, problem.roots(rows), *noise, torch.ones(len(rows), dtype=F64), args)
        return gumbel_search(problem, problem.roots(rows), *noise, args)

    together = run(torch.arange(9))
    for row in range(9):
        alone = run(torch.tensor([row]))
        for a, b in zip(together, alone, strict=True):
            assert torch.equal(a[row], b[0])


@pytest.mark.parametrize("search", ["puct", "gumbel"])
def test_actions_without_a_chance_are_never_tried(search):
    """A logit of -inf closes an action at any node, not at the root alone."""
    problem, args = Problem(7, 5, False, 6, True), make_args(num_simulations=60)
    problem.logits[torch.arange(40) % 2 == 0, 1:3] = -torch.inf
    roots, legal = problem.roots(torch.arange(6)), problem.legal
    nodes, edges = muzero.grow(problem, roots, legal, problem.noise, args, search == "puct", None)
    closed = edges["logit"] == -np.inf
    assert closed[:, 1:].any() and not edges["visits"][closed].any() and not edges["child"][closed].any()
    assert (edges["visits"][:, 0].sum(1) == 60).all() and (nodes["depth"] > 1).any()


def test_trees_are_consistent():
    """Every node hangs where its parent says; counts are sums of visits; means are those of the returns below."""
    problem = Problem(8, 4, True, 5, True)
    for search in ("puct", "gumbel"):
        args, puct = make_args(num_simulations=40), search == "puct"
        roots, legal = problem.roots(torch.arange(5)), problem.legal
        nodes, edges = muzero.grow(problem, roots, legal, problem.noise, args, puct, (-3.0, 3.0))
        assert (nodes["count"] == 1 + edges["visits"].sum(2)).all()
        for b, n in itertools.product(range(5), range(1, 41)):
            parent, action = nodes["parent"][b, n], nodes["action"][b, n]
            assert parent < n and edges["child"][b, parent, action] == n
            assert edges["visits"][b, parent, action] == nodes["count"][b, n]
            assert nodes["depth"][b, n] == nodes["depth"][b, parent] + 1
        mean = nodes["raw_value"] + (edges["visits"] * edges["q"]).sum(2)
        np.testing.assert_allclose(nodes["value"], mean / nodes["count"], rtol=1e-9, atol=1e-12)


def test_the_search_runs_as_python_too():
    """NUMBA_DISABLE_JIT=1: the same trees, to step through them."""
    code = """
import muzero, torch
from test_muzero import Problem, gumbel_search, make_args, puct_search
problem, args, rows = Problem(5, 6, False, 3, True), make_args(num_simulations=20), torch.arange(3)
noise = problem.legal, problem.noise
muzero.compile_search()
print(type(muzero.select))
print(puct_search(problem, problem.roots(rows), *noise, torch.ones(3), args).visit_counts.tolist())
print(gumbel_search(problem, problem.roots(rows), *noise, args).visit_counts.tolist())
"""
    paths = os.pathsep.join([str(Path(muzero.__file__).parent), str(Path(__file__).parent)])
    env = os.environ | {"NUMBA_DISABLE_JIT": "1", "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    problem, args, rows = Problem(5, 6, False, 3, True), make_args(num_simulations=20), torch.arange(3)
    noise = problem.legal, problem.noise
    results = [
        puct_search(problem, problem.roots(rows), *noise, torch.ones(3), args),
        gumbel_search(problem, problem.roots(rows), *noise, args),
    ]
    plain, *counts = done.stdout.strip().splitlines()
    assert plain == "<class 'function'>" and counts == [str(result.visit_counts.tolist()) for result in results]


def test_compiling_is_said_and_survives_a_disk_that_cannot_be_written(monkeypatch, capsys, tmp_path):
    """A line when it takes long; without a folder for it the search is compiled anew at each start, no more."""
    shutil.copy(muzero.__file__, tmp_path)
    (tmp_path / "__pycache__").write_text("in the way")
    env = os.environ | {"XDG_CACHE_HOME": "/dev/null/none", "HOME": "/dev/null/none", "PYTHONDONTWRITEBYTECODE": "1"}
    code = "import muzero; muzero.select.enable_caching()"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert "RuntimeError" in done.stderr  # what the next lines stand in for

    def unwritable(self):
        raise RuntimeError("no locator available")

    def slow(*inputs):
        time.sleep(0.5)
        return search(*inputs)

    search = muzero.gumbel_search
    monkeypatch.setattr(type(muzero.select), "enable_caching", unwritable)
    muzero.compile_search(60.0)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(muzero, "gumbel_search", slow)
    muzero.compile_search(0.1)
    assert "compiling the search" in capsys.readouterr().err


def test_depth_is_that_of_the_nodes():
    """One action: a chain of depths 1 ... S."""
    problem = Problem(0, 1, False, 2, False)
    result = puct_search(
        problem, problem.roots(torch.arange(2)), problem.legal, None, None, make_args(num_simulations=9)
    )
    assert result.depth.tolist() == [5.0, 5.0]


@pytest.mark.parametrize("search", ["puct", "gumbel"])
def test_a_root_without_a_legal_action_stays_finite(search):
    """The board of a finished game, searched with the others."""
    problem = Problem(3, 4, True, 2, False)
    legal = torch.tensor([[False] * 4, [True] * 4])
    args = make_args(num_simulations=10)
    roots = problem.roots(torch.arange(2))
    if search == "puct":
        result = puct_search(problem, roots, legal, problem.noise, torch.ones(2, dtype=F64), args)
    else:
        result = gumbel_search(problem, roots, legal, problem.noise, args)
    assert all(x.isfinite().all() for x in result)


def test_illegal_actions_are_not_chosen_however_bad_the_others():
    """Q below the known bounds scores less than an unvisited action; at the root the mask still holds."""
    model, logits = hand_model((-5, -5, 0), (0, 0, 0), 1.0)
    root, legal = (torch.zeros(1, 1, dtype=F64), logits, torch.zeros(1, dtype=F64)), torch.tensor([[True, True, False]])
    args = make_args(num_simulations=20)
    for result in (
        puct_search(model, root, legal, None, None, args, (0.0, 1.0)),
        gumbel_search(model, root, legal, None, args, (0.0, 1.0)),
    ):
        assert result.visit_counts[0, 2] == 0 and result.policy[0, 2] == 0 and result.action < 2


def test_acting_temperature_and_noise():
    """Actions are drawn in proportion to N^(1/T); T = 0 and no noise play the most visited one."""
    problem = Problem(11, 4, False, 1, False)
    rows, args = torch.zeros(20_000, dtype=torch.long), make_args(num_simulations=20)
    rng = np.random.default_rng(0)
    dirichlet = problem.noise[rows, 0]
    noise = torch.stack([dirichlet, torch.from_numpy(rng.gumbel(size=(20_000, 4)))], 1)
    for temperature in (1.0, 0.5):
        t = torch.full((20_000,), temperature, dtype=F64)
        result = puct_search(problem, problem.roots(rows), problem.legal[rows], noise, t, args)
        wanted = result.visit_counts[0] ** (1 / temperature)
        share = torch.bincount(result.action, minlength=4) / 20_000
        np.testing.assert_allclose(share, wanted / wanted.sum(), atol=0.015)
    t = torch.zeros(20_000, dtype=F64)
    greedy = puct_search(problem, problem.roots(rows), problem.legal[rows], noise, t, args)
    assert (greedy.action == greedy.visit_counts[0].argmax()).all()


def test_gumbel_considers_the_best_by_noise_and_prior():
    """With more actions than are considered, those with the largest g + logits are visited, and no others."""
    problem = Problem(2, 18, False, 8, True)
    args = make_args(num_simulations=12, max_considered_actions=4)
    result = gumbel_search(problem, problem.roots(torch.arange(8)), problem.legal, problem.noise, args)
    for row in range(8):
        order = problem.noise[row, 1] + torch.where(problem.legal[row], problem.logits[problem.start[row]], -torch.inf)
        top = set(order.argsort(descending=True)[: min(4, int(problem.legal[row].sum()))].tolist())
        assert set(result.visit_counts[row].nonzero()[:, 0].tolist()) == top and result.action[row].item() in top


def test_noise_is_that_of_its_distributions():
    """Dirichlet over the legal actions, which sums to 1; standard Gumbel."""
    args = make_args(dirichlet_alpha=0.3)
    legal = np.ones((20_000, 4), bool)
    legal[:, 2] = False
    noise = muzero.draw_noise(legal, args, np.random.default_rng(0))
    assert noise.shape == (20_000, 2, 4) and noise.dtype == np.float32
    dirichlet, gumbel = noise[:, 0], noise[:, 1]
    np.testing.assert_allclose(dirichlet.sum(1), 1, rtol=1e-5)
    assert not dirichlet[:, 2].any()
    expected = np.random.default_rng(1).dirichlet([0.3] * 3, size=20_000)
    np.testing.assert_allclose(dirichlet[:, [0, 1, 3]].mean(0), 1 / 3, atol=0.01)
    np.testing.assert_allclose(dirichlet[:, 0].std(), expected[:, 0].std(), atol=0.01)
    assert gumbel.mean() == pytest.approx(0.5772, abs=0.02) and gumbel.std() == pytest.approx(
        math.pi / 6**0.5, abs=0.02
    )
    assert muzero.draw_noise(np.zeros((1, 4), bool), args, np.random.default_rng(0))[:, 0].tolist() == [[0.0] * 4]


def test_temperatures():
    args = make_args(temperature_steps=(100, 200), temperature_moves=3)
    moves = np.array([0, 2, 3])
    for step, expected in ((0, [1, 1, 0]), (99, [1, 1, 0]), (100, [0.5, 0.5, 0]), (200, [0.25, 0.25, 0])):
        assert muzero.temperature_of(moves, step, args).tolist() == expected
    assert muzero.temperature_of(moves, 0, make_args()).tolist() == [1, 1, 1]


# === Scalars as distributions ===

TRANSFORMED = {1: 0.415214, 2: 0.734051, 10: 2.326625, -10: -2.326625, 100: 9.149876, 500: 21.883029, 1000: 31.638584}
INVERTED = {1: 2.988057, 2: 7.952349, 5: 34.586162, 10: 117.430323, -10: -117.430323, 300: 58705.584017}


def test_transform_by_hand():
    x = torch.tensor(list(TRANSFORMED), dtype=F64)
    assert muzero.transform(x).tolist() == pytest.approx(list(TRANSFORMED.values()), abs=5e-7)
    y = torch.tensor(list(INVERTED), dtype=F64)
    for numbers in (y, y.numpy()):  # the search has arrays
        assert muzero.inverse_transform(numbers).tolist() == pytest.approx(list(INVERTED.values()), abs=5e-7)


def test_transform_and_back():
    """To 1e-4 relative in float32, for values of 1e-3 to 1e4 of either sign."""
    x = torch.logspace(-3, 4, 200)
    for values in (x, -x, torch.zeros(1)):
        torch.testing.assert_close(muzero.inverse_transform(muzero.transform(values)), values, rtol=1e-4, atol=1e-6)


TWO_HOT = {  # (value, support): {index: probability}
    (10, 300): {302: 0.673375, 303: 0.326625},
    (-10, 300): {297: 0.326625, 298: 0.673375},
    (3.7, 300): {301: 0.828352, 302: 0.171648},
    (0, 300): {300: 1},
    (1, 10): {10: 0.584786, 11: 0.415214},
    (200, 10): {20: 1},
}


@pytest.mark.parametrize(("value", "support"), TWO_HOT)
def test_two_hot_by_hand(value, support):
    found = muzero.two_hot(torch.tensor([value], dtype=F64), support)[0]
    assert found.shape == (2 * support + 1,)
    assert {i.item(): found[i].item() for i in found.nonzero()[:, 0]} == pytest.approx(
        TWO_HOT[value, support], abs=5e-7
    )


def test_distributions_decode_to_what_was_encoded():
    """Expectation first, then the inverse transform; what is beyond the support becomes its largest value."""
    twenty, ten = (torch.arange(-m, m + 1, dtype=F64) for m in (20, 10))
    x = torch.linspace(-300, 300, 121, dtype=F64)
    decoded = muzero.from_distribution(muzero.two_hot(x, 20).log().clamp_min(-1e9), twenty)
    torch.testing.assert_close(decoded, x)
    clipped = muzero.two_hot(torch.tensor([200.0, -1e9], dtype=F64), 10).log().clamp_min(-1e9)
    assert muzero.from_distribution(clipped, ten).tolist() == pytest.approx([117.430323, -117.430323])
    wide = torch.zeros(1, 21, dtype=F64)  # half of the mass at -10, half at 10: 0, and not the mean of +-117
    wide[0, [0, 20]] = 50.0
    assert muzero.from_distribution(wide, ten).item() == pytest.approx(0.0, abs=1e-9)


# === Returns and targets ===


def rows_of(rewards, values, ends) -> tuple[torch.Tensor, ...]:
    """Columns of one sequence, (L, 1)."""
    return (
        torch.tensor(rewards, dtype=F64)[:, None],
        torch.tensor(values, dtype=F64)[:, None],
        torch.tensor(ends)[:, None],
    )


def test_n_step_returns_by_hand():
    """Terminal after the fifth reward; rows after the end are another episode's."""
    rewards, values = [1, 0, 2, 0, 1, 0] + [7] * 16, [5, 4.5, 4, 3, 1, 9] + [8] * 16
    ends = [0] * 5 + [muzero.TERMINATED] + [0] * 16
    for n, expected in (
        (2, (4.976036, 4.976027, 2.994009, 0.997, 1, 0)),
        (10, (3.976072, 2.985027, 2.994009, 0.997, 1, 0)),
    ):
        found = muzero.n_step_returns(*rows_of(rewards, values, ends), n, 0.997)[:, 0]
        assert found[:6].tolist() == pytest.approx(expected, abs=5e-7)
        assert found[6:].tolist() == [0] * (len(found) - 6)


def test_a_truncation_is_bootstrapped_from_the_final_observation():
    """The same episode cut by a time limit: its last row's value stands in for the rest."""
    rewards, values = [1, 0, 2, 0, 1, 0, 7, 7, 7, 7], [5, 4.5, 4, 3, 1, 9, 8, 8, 8, 8]
    found = muzero.n_step_returns(*rows_of(rewards, values, [0] * 5 + [muzero.TRUNCATED] + [0] * 4), 3, 0.5)[:, 0]
    assert found.tolist() == [1 + 0.5 + 3 / 8, 1 + 1 / 8, 2 + 0.25 + 9 / 8, 0.5 + 9 / 4, 1 + 9 / 2, 9, 0]


def test_two_players_alternate_the_sign():
    """The winner's last move earns 1: +1 for the winner's positions, -1 for the loser's; a bootstrap changes too."""
    rewards, values = [0, 0, 0, 0, 1, 0, 0, 0, 0], [0.3, 0.2, 0.1, 0.4, 0.5, 0, 9, 9, 9]
    ends = [0] * 5 + [muzero.TERMINATED, 0, 0, 0]
    found = muzero.n_step_returns(*rows_of(rewards, values, ends), 3, -1.0)[:, 0]
    assert found.tolist() == pytest.approx([-0.4, -0.5, 1, -1, 1, 0])
    to_the_end = muzero.n_step_returns(*rows_of(rewards + [0] * 9, values + [9] * 9, ends + [0] * 9), 9, -1.0)[:, 0]
    assert to_the_end[:6].tolist() == [1, -1, 1, -1, 1, 0]


def loop_return(rewards, values, ends, k, n, d) -> float:
    """z_k from its equation, one term after the other."""
    if muzero.STEP not in ends[: k + 1] or any(end != muzero.STEP for end in ends[:k]):
        return values[k] if ends[k] == muzero.TRUNCATED and all(e == muzero.STEP for e in ends[:k]) else 0.0
    total = 0.0
    for i in range(n + 1):
        if ends[k + i] != muzero.STEP:
            return total + (d**i * values[k + i] if ends[k + i] == muzero.TRUNCATED else 0.0)
        total += d**i * (values[k + i] if i == n else rewards[k + i])
    return total


@pytest.mark.parametrize(("n", "K", "d"), [(1, 5, 0.9), (5, 5, 0.997), (9, 3, -1.0), (3, 1, -0.8)])
def test_targets_against_a_loop(n, K, d):
    """Random sequences with up to two ends of either kind."""
    rng = np.random.default_rng(n)
    B, L, A = 200, K + n + 1, 3
    ends = np.where(rng.random((L, B)) < 0.12, rng.integers(1, 3, size=(L, B)), 0)
    ends[0] = 0  # only steps are drawn
    rows = {
        "reward": torch.from_numpy(rng.normal(size=(L, B))), "value": torch.from_numpy(rng.normal(size=(L, B))),
        "kind": torch.from_numpy(ends), "policy": torch.from_numpy(rng.dirichlet(np.ones(A), size=(L, B))),
        "candidates": torch.from_numpy(rng.normal(size=(L, B, A, 2))),
    }  # fmt: skip
    targets = muzero.make_targets(rows, K, n, d)
    for b in range(B):
        column = ends[:, b].tolist()
        end = next((t for t, e in enumerate(column) if e), L)
        kind = column[end] if end < L else None
        for k in range(K + 1):
            known = not (kind == muzero.TRUNCATED and k > end)
            assert targets["value_mask"][k, b] == known and targets["policy_mask"][k, b] == (k < end)
            assert targets["obs_mask"][k, b] == (k <= end)
            if known:
                expected = loop_return(rows["reward"][:, b].tolist(), rows["value"][:, b].tolist(), column, k, n, d)
                assert targets["returns"][k, b].item() == pytest.approx(expected)
            if k < end:
                assert torch.equal(targets["policies"][k, b], rows["policy"][k, b])
                assert torch.equal(targets["candidates"][k, b], rows["candidates"][k, b])
            if k > 0:
                assert targets["reward_mask"][k - 1, b] == known
                wanted = rows["reward"][k - 1, b].item() if k <= end else 0.0
                assert not known or targets["rewards"][k - 1, b].item() == wanted


# === Replay ===


class TinyVector:
    """The spaces of a vector environment, as far as replay and networks ask for them; D continuous actions or three."""

    def __init__(self, num_envs: int, shape: tuple = (2,), dtype=np.float32, action_dim: int = 0):
        self.num_envs = num_envs
        self.single_observation_space = gym.spaces.Box(0, 255, shape, dtype)
        box = gym.spaces.Box(-1, 1, (action_dim,), np.float32)
        self.single_action_space = box if action_dim else gym.spaces.Discrete(3)


def fill(rb: muzero.ReplayBuffer, num_steps: int, seed: int = 0, mean_length: int = 7) -> list[list[list[dict]]]:
    """Plays random episodes into the replay; returns what each environment has written, episode by episode."""
    rng, N = np.random.default_rng(seed), rb.num_envs
    (A, D), frame = rb.data["candidates"].shape[2:], rb.data["obs"].shape[2:]
    shape = (N, rb.stack, *frame) if rb.stack > 1 else (N, *frame)

    def newest(rows: dict, i: int) -> dict:
        """What the replay keeps of row i."""
        return {name: column[i, -1] if name == "obs" and rb.stack > 1 else column[i] for name, column in rows.items()}

    written = [[[]] for _ in range(N)]
    for _ in range(num_steps):
        rows = {
            "obs": torch.from_numpy(rng.integers(0, 255, size=shape)).to(rb.data["obs"].dtype),
            "action": torch.from_numpy(rng.normal(size=(N, D)).astype(np.float32) if D else rng.integers(A, size=N)),
            "candidates": torch.from_numpy(rng.normal(size=(N, A, D)).astype(np.float32)),
            "reward": torch.from_numpy(rng.normal(size=N).astype(np.float32)),
            "policy": torch.from_numpy(rng.dirichlet(np.ones(A), size=N).astype(np.float32)),
            "value": torch.from_numpy(rng.normal(size=N).astype(np.float32)),
            "legal": torch.from_numpy(rng.random((N, A)) < 0.7),
        }
        rb.add(rows, np.arange(N))
        for i in range(N):
            written[i][-1].append(newest(rows, i) | {"kind": torch.tensor(0)})
        done = np.flatnonzero(rng.random(N) < 1 / mean_length)
        if len(done):
            last = {
                "obs": torch.from_numpy(rng.integers(0, 255, size=shape)).to(rb.data["obs"].dtype),
                "value": torch.from_numpy(rng.normal(size=N).astype(np.float32)),
                "kind": torch.from_numpy(rng.integers(1, 3, size=N)).to(torch.uint8),
            }
            rb.add(last, done, closing=True)
            for i in done:
                written[i][-1].append(newest(last, i))
                written[i].append([])
    return written


def make_rb(num_envs=3, capacity=300, shape=(2,), dtype=np.float32, action_dim=0, **changes) -> muzero.ReplayBuffer:
    args = {"buffer_size": capacity, "unroll_steps": 2, "td_steps": 3, "priority_alpha": 1.0} | changes
    args, envs = make_args(**args), TinyVector(num_envs, shape, dtype, action_dim)
    return muzero.ReplayBuffer(envs, muzero.make_agent(envs, args) if len(shape) == 1 else vector_agent()[0], args, CPU)


@pytest.mark.parametrize(("capacity", "action_dim"), [(300, 0), (90, 0), (90, 2)])
@pytest.mark.parametrize("priority_alpha", [0.0, 1.0])
def test_replay_holds_what_was_played(capacity, action_dim, priority_alpha):
    """Rows in their order; exactly the steps whose targets are known can be drawn; priorities are |nu - z|."""
    rb = make_rb(capacity=capacity, action_dim=action_dim, priority_alpha=priority_alpha)
    written = fill(rb, 80)
    for i, episodes in enumerate(written):
        flat = [(row, t, len(episode)) for episode in episodes for t, row in enumerate(episode)]
        assert rb.ends[i] == len(flat)
        rewards, values, ends = (
            torch.tensor([float(row.get(name, 0)) for row, _, _ in flat]) for name in ("reward", "value", "kind")
        )
        for number, (row, age, _) in enumerate(flat):
            if number < len(flat) - rb.capacity:
                continue
            slot = number % rb.capacity
            for name, value in row.items():
                assert torch.equal(rb.data[name][slot, i], value.to(rb.data[name].dtype)), name
            assert rb.data["age"][slot, i] == age
            after = ends[number:]
            ready = row["kind"] == 0 and (len(after) >= rb.span or after.any())
            assert (rb.priority[slot, i] > 0) == ready
            if ready and priority_alpha:
                pad = torch.zeros(rb.span)
                columns = (torch.cat([x[number:], pad])[:, None][: rb.td_steps + 1] for x in (rewards, values, ends))
                z = muzero.n_step_returns(*columns, rb.td_steps, rb.discount)[0, 0]
                assert rb.priority[slot, i].item() == pytest.approx(abs(values[number] - z).item() + 1e-3, rel=1e-4)


def test_sampled_sequences_are_those_that_were_played():
    """Consecutive rows of one environment and their observations; copies, not views."""
    rb = make_rb(capacity=90)
    fill(rb, 80)
    before = {name: column.clone() for name, column in rb.data.items()}
    rows = rb.sample(500, 1.0, torch.Generator().manual_seed(0))
    assert rows["reward"].shape == (rb.span, 500) and rows["policy"].shape == (rb.span, 500, 3)
    assert (rows["kind"][0] == muzero.STEP).all()
    for b in range(0, 500, 17):
        slot, env = rows["slots"][b].item(), rows["envs"][b].item()
        index = [(slot + t) % rb.capacity for t in range(rb.span)]
        for name in ("action", "reward", "policy", "candidates", "value", "legal", "kind"):
            assert torch.equal(rows[name][:, b], rb.data[name][index, env])
        obs = rb.observations(rows["slots"][b : b + 1], rows["envs"][b : b + 1])
        assert torch.equal(obs[0], rb.data["obs"][slot, env])
    for tensor in rows.values():
        tensor.zero_()
    assert all(torch.equal(column, before[name]) for name, column in rb.data.items())


@pytest.mark.parametrize("alpha", [0.0, 0.6, 1.0])
def test_chances_and_importance_weights(alpha):
    """P(i) = p_i^alpha / sum p^alpha, w_i = (N P(i))^-beta over the largest of the batch."""
    rb = make_rb(num_envs=2, capacity=40, priority_alpha=alpha)
    fill(rb, 19, mean_length=1000)
    live = rb.priority > 0
    rb.priority[live] = torch.linspace(0.1, 3, int(live.sum()))
    chances = torch.where(live, rb.priority**alpha, 0)
    chances /= chances.sum()
    counts, generator, beta = torch.zeros_like(chances), torch.Generator().manual_seed(0), 0.7
    for _ in range(100):
        rows = rb.sample(1000, beta, generator)
        counts.index_put_((rows["slots"], rows["envs"]), torch.ones(1000), accumulate=True)
    np.testing.assert_allclose(counts / counts.sum(), chances, atol=0.004)
    assert not counts[~live].any()
    expected = (live.sum() * chances[rows["slots"], rows["envs"]]) ** -beta
    torch.testing.assert_close(rows["weights"], expected / expected.max())
    assert rows["weights"].max() == 1


def test_frames_are_stacked_as_they_were_seen():
    """The last four of the episode, its first repeated at its start, also where the ring has wrapped round."""
    rb = make_rb(num_envs=2, capacity=80, shape=(4, 2, 2, 3), dtype=np.uint8)
    written = fill(rb, 70)
    assert rb.stack == 4 and rb.data["obs"].shape == (40, 2, 2, 2, 3)
    rows = rb.sample(300, 1.0, torch.Generator().manual_seed(0))
    stacks = rb.observations(rows["slots"], rows["envs"])
    for b in range(300):
        slot, env = rows["slots"][b].item(), rows["envs"][b].item()
        flat = [(episode, t) for episode in written[env] for t in range(len(episode))]
        number = max(n for n in range(slot, len(flat), rb.capacity))
        episode, t = flat[number]
        expected = torch.stack([episode[max(t - back, 0)]["obs"] for back in (3, 2, 1, 0)])
        assert torch.equal(stacks[b], expected)


def test_replay_state_round_trip():
    """Everything comes back, and both go on alike."""
    rb, other = make_rb(capacity=90), make_rb(capacity=90)
    fill(rb, 50)
    other.load_state_dict(rb.state_dict())
    for buffer in (rb, other):
        fill(buffer, 20, seed=1)
    assert rb.ends.tolist() == other.ends.tolist() and rb.ready.tolist() == other.ready.tolist()
    assert torch.equal(rb.priority, other.priority)
    assert all(torch.equal(column, other.data[name]) for name, column in rb.data.items())


@pytest.mark.parametrize("steps", [7, 200])
def test_a_checkpoint_copies_no_observations(steps):
    """They are written from where they lie; of the columns beside them no more than what is filled."""
    rb = make_rb(num_envs=2, capacity=60)
    fill(rb, steps)
    data = rb.state_dict()["data"]
    assert data["obs"].data_ptr() == rb.data["obs"].data_ptr()
    assert all(saved.untyped_storage().nbytes() == saved.nbytes for saved in data.values())


# === Networks and losses ===


def vector_agent(action_dim=0, **changes) -> tuple[muzero.Agent, muzero.Args]:
    args = make_args(**{"hidden_size": 16, "support_size": 10} | changes)
    torch.manual_seed(0)
    agent = muzero.make_agent(TinyVector(4, action_dim=action_dim), args)
    for parameter in agent.parameters():  # the last layers begin at 0
        torch.nn.init.normal_(parameter, std=0.3)
    return agent, args


def board_agent(name="tictactoe", **changes) -> tuple[muzero.Agent, muzero.Args, muzero.BoardGame]:
    args = make_args(**{"env_id": name, "hidden_size": 8, "num_simulations": 8} | changes)
    torch.manual_seed(0)
    game = muzero.BoardGame(name, 4)
    agent = muzero.make_agent(game, args)
    for parameter in agent.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return agent, args, game


def image_agent() -> tuple[muzero.Agent, muzero.Args]:
    args = make_args(hidden_size=8, support_size=10)
    torch.manual_seed(0)
    return muzero.make_agent(TinyVector(2, (4, 96, 96, 3), dtype=np.uint8), args), args


def observations(kind: str, count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    if kind == "vectors":
        return torch.randn(count, 2, generator=generator)
    if kind == "images":
        return torch.randint(256, (count, 4, 96, 96, 3), generator=generator, dtype=torch.uint8)
    return torch.randint(2, (count, 2, 3, 3), generator=generator).float()


MAKERS = {"vectors": vector_agent, "images": image_agent, "boards": board_agent}


@pytest.mark.parametrize("kind", MAKERS)
def test_networks(kind):
    """Latent states fill [0, 1] exactly, along any unroll; shapes; every observation is alone."""
    agent = MAKERS[kind]()[0]
    obs = observations(kind, 5)
    A = agent.num_actions
    latent, logits, value = agent.initial(obs)
    assert logits.shape == (5, A) and value.shape == (5,)
    alone = agent.initial(obs[2:3])
    for a, b in zip(alone, (latent, logits, value), strict=True):
        torch.testing.assert_close(a[0], b[2], rtol=1e-4, atol=1e-5)
    for step in range(3):
        assert torch.allclose(latent.flatten(1).amin(1), torch.zeros(5)) and torch.allclose(
            latent.flatten(1).amax(1), torch.ones(5)
        )
        latent, outputs = muzero.recurrent(agent, latent, torch.full((5,), step % A))
        reward, logits, value = muzero.decode(outputs.detach().numpy())
        assert reward.shape == value.shape == (5,) and logits.shape == (5, A)
    different = muzero.recurrent(agent, latent, torch.full((5,), 1))[0]
    assert not torch.allclose(different, muzero.recurrent(agent, latent, torch.full((5,), 2))[0])


def test_attributes_are_those_of_the_modules():
    """Found at once; the same after a copy, a change of type, loading, and when one is replaced; not the buffers."""
    agent, other, board = (
        muzero.with_attributes(muzero.make_agent(envs, args))
        for envs, args in (
            *[(TinyVector(2), make_args(consistency_scale=1.0))] * 2,
            (muzero.BoardGame("tictactoe", 1), make_args(env_id="tictactoe")),
        )
    )
    copied = muzero.deepcopy(agent).double()
    copied.load_state_dict(other.state_dict())
    for one in (agent, copied, board):
        for module in one.modules():
            own = module._modules | module._parameters
            assert all(vars(module)[name] is value for name, value in own.items())
            assert not set(module._buffers) & set(vars(module))
    assert {id(p) for p in agent.parameters()}.isdisjoint(id(p) for p in copied.parameters())
    assert copied.network.reward.weight.dtype == F64 and "weight" in vars(copied.network.reward)
    assigned, obs = muzero.deepcopy(agent), torch.rand(3, *TinyVector(2).single_observation_space.shape)
    assigned.load_state_dict(other.state_dict(), assign=True)
    assert torch.equal(assigned.initial(obs)[0], other.initial(obs)[0])
    agent.network.reward.bias = torch.nn.Parameter(bias := torch.arange(2.0 * make_args().support_size + 1))
    latent = agent.initial(obs)[0]
    assert torch.equal(agent.network.dynamics(latent, torch.zeros(3, dtype=torch.long))[1][0], bias)


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("search", ["puct", "gumbel"])
def test_the_search_sees_what_the_networks_say(kind, search):
    """One simulation: Q = r + d v of the network's own distributions, d = -1 on a board; the root's mean has both."""
    agent, args = MAKERS[kind]()[:2]
    args = muzero.replace(args, search=search, num_simulations=1)
    obs = observations(kind, 5)
    with torch.no_grad():
        result = muzero.act(agent, obs, torch.ones(5, agent.num_actions, dtype=torch.bool), None, None, args)
        latent, _, root_value = agent.initial(obs)
        latent, reward_logits = agent.network.dynamics(latent, result.visit_counts.argmax(1))
        _, value_logits = agent.network.predict(latent)
        r, v = (muzero.from_distribution(x, agent.bins) for x in (reward_logits, value_logits))
    d = -1.0 if kind == "boards" else 0.997
    assert args.discount == d and (result.visit_counts.sum(1) == 1).all()
    torch.testing.assert_close(result.qvalues.sum(1), r + d * v, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(result.value, (root_value + r + d * v) / 2, rtol=1e-4, atol=1e-5)


def test_an_untrained_agent_knows_nothing():
    """Uniform policy, value and reward 0."""
    for envs, args in (
        (TinyVector(2), make_args()),
        (muzero.BoardGame("connect_four", 2), make_args(env_id="connect_four")),
    ):
        agent = muzero.make_agent(envs, args)
        obs = torch.rand(2, *envs.single_observation_space.shape)
        latent, logits, value = agent.initial(obs)
        outputs = muzero.recurrent(agent, latent, torch.zeros(2, dtype=torch.long))[1].detach().numpy()
        numbers = muzero.decode(outputs)
        assert not logits.any() and max(np.abs(x).max() for x in (value.detach().numpy(), *numbers)) < 1e-5


def test_a_flat_latent_state_does_not_blow_up():
    assert muzero.scale_latent(torch.full((2, 5), 3.0)).tolist() == [[0.0] * 5] * 2


def sequence_batch(agent, args, B=6, obs=None):
    """Observations, actions and targets of a random batch."""
    rng, K, A = np.random.default_rng(0), args.unroll_steps, agent.num_actions
    obs = torch.from_numpy(rng.normal(size=(B, 2)).astype(np.float32)) if obs is None else obs
    actions = torch.from_numpy(rng.integers(A, size=(K, B)))
    targets = {
        "returns": torch.from_numpy(20 * rng.normal(size=(K + 1, B)).astype(np.float32)),
        "policies": torch.from_numpy(rng.dirichlet(np.ones(A), size=(K + 1, B)).astype(np.float32)),
        "candidates": torch.zeros(K + 1, B, A, 0),
        "rewards": torch.from_numpy(rng.normal(size=(K, B)).astype(np.float32)),
        "policy_mask": torch.from_numpy(rng.random((K + 1, B)) < 0.7),
        "value_mask": torch.from_numpy(rng.random((K + 1, B)) < 0.7),
        "reward_mask": torch.from_numpy(rng.random((K, B)) < 0.7),
    }
    return obs, actions, targets, torch.from_numpy(rng.random(B).astype(np.float32))


def test_losses_against_a_loop():
    """Sample by sample and step by step, from the definitions."""
    agent, args = vector_agent(unroll_steps=3)
    obs, actions, targets, weights = sequence_batch(agent, args)
    loss, metrics, values = muzero.compute_losses(agent, obs, actions, targets, weights, args)
    sums = dict.fromkeys(("policy", "value", "reward"), 0.0)
    for b in range(6):
        latent = agent.network.represent(obs[b : b + 1])
        for k in range(4):
            logits, value_logits = agent.network.predict(latent)
            scale = weights[b] * (1 if k == 0 else 1 / 3) / 6
            if targets["policy_mask"][k, b]:
                p = torch.distributions.Categorical(logits=logits)
                sums["policy"] -= scale * (targets["policies"][k, b] * p.logits[0]).sum()
            if targets["value_mask"][k, b]:
                y = muzero.two_hot(targets["returns"][k, b], 10)
                sums["value"] -= scale * (y * value_logits[0].log_softmax(-1)).sum()
            if k < 3:
                latent, reward_logits = agent.network.dynamics(latent, actions[k, b : b + 1])
                if targets["reward_mask"][k, b]:
                    y = muzero.two_hot(targets["rewards"][k, b], 10)
                    sums["reward"] -= weights[b] / 3 / 6 * (y * reward_logits[0].log_softmax(-1)).sum()
    for name, value in sums.items():
        torch.testing.assert_close(metrics[f"losses/{name}_loss"], value.detach(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(loss, sums["policy"] + 0.25 * sums["value"] + sums["reward"], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(values, agent.initial(obs)[2], rtol=1e-4, atol=1e-5)
    assert not metrics["losses/clipped_targets"]
    targets["returns"][2, 1] = -118.0
    metrics = muzero.compute_losses(agent, obs, actions, targets, weights, args)[1]
    assert metrics["losses/clipped_targets"].item() == pytest.approx(1 / 42)
    targets["rewards"][1, 1] = 118.0
    metrics = muzero.compute_losses(agent, obs, actions, targets, weights, args)[1]
    assert metrics["losses/clipped_targets"].item() == pytest.approx(2 / 42)


def test_gradients_are_halved_at_the_entrance_of_the_dynamics():
    """A loss at step k alone reaches the first latent state 2^-k times, and its own heads undivided."""
    agent, args = vector_agent(unroll_steps=2, value_scale=1.0)
    obs, actions, targets, weights = sequence_batch(agent, args)
    for name in ("policy_mask", "value_mask", "reward_mask"):
        targets[name] = torch.zeros_like(targets[name])
    targets["value_mask"][2] = True
    agent.zero_grad()
    muzero.compute_losses(agent, obs, actions, targets, weights, args)[0].backward()
    halved = {name: p.grad.clone() for name, p in agent.named_parameters() if p.grad is not None}

    agent.zero_grad()
    latent = agent.network.represent(obs)
    for action in actions:
        latent, _ = agent.network.dynamics(latent, action)
    terms = muzero.cross_entropy(agent.network.predict(latent)[1], muzero.two_hot(targets["returns"][2], 10))
    ((terms * weights).mean() / 2).backward()
    plain = {name: p.grad for name, p in agent.named_parameters() if p.grad is not None}
    for name, gradient in plain.items():
        if "encoder" in name:
            torch.testing.assert_close(halved[name], gradient / 4, rtol=1e-4, atol=1e-8)
        elif "policy_value" in name or "head" in name:
            torch.testing.assert_close(halved[name], gradient, rtol=1e-4, atol=1e-8)
    assert any("encoder" in name for name in plain)


def test_each_loss_reaches_what_it_should():
    """The reward loss does not touch the heads of policy and value; a policy loss at k = 0 not the dynamics."""
    agent, args = vector_agent(unroll_steps=2)
    obs, actions, targets, weights = sequence_batch(agent, args)

    def reached(mask: str, k: int) -> set[str]:
        masks = {name: torch.zeros_like(targets[name]) for name in ("policy_mask", "value_mask", "reward_mask")}
        masks[mask][k] = True
        agent.zero_grad()
        muzero.compute_losses(agent, obs, actions, targets | masks, weights, args)[0].backward()
        return {name.split(".")[1] for name, p in agent.named_parameters() if p.grad is not None and p.grad.any()}

    dynamics = {"action", "dynamics_in", "dynamics_norm", "dynamics_out"}
    assert reached("policy_mask", 0) == {"encoder", "head", "policy_value"}
    assert reached("reward_mask", 0) == {"encoder", "action", "dynamics_in", "dynamics_norm", "reward"}
    assert reached("reward_mask", 1) == {"encoder", "reward"} | dynamics
    assert reached("value_mask", 2) == {"encoder", "head", "policy_value"} | dynamics


# === Continuous actions ===


ACTIONS = torch.tensor([-0.5, 0, 0.2, 0.5, 0.9, 0.999], dtype=F64)
DENSITIES = {
    1: (-1.380751, -0.405791, -0.203891, -0.062416, -1.313257, -18.513500),
    3: (-1.197015, -1.344404, -1.285684, -1.050533, 0.030972, 2.168169),
}


def policy_of(mu, sigma) -> torch.Tensor:
    """What the network must say for this mean and deviation (..., D)."""
    mu, sigma = (torch.as_tensor(x, dtype=F64) for x in (mu, sigma))
    return torch.cat([5 * torch.atanh(mu / 5), torch.log(torch.expm1(sigma - 0.1)) - 1], -1)


def one_number() -> muzero.SampledAgent:
    """Its methods for policies take any number of dimensions."""
    return vector_agent(1)[0].double()


@pytest.mark.parametrize("times", DENSITIES)
def test_density_by_hand(times):
    """mu 0.3, sigma 0.5 or three times that; the policy begins with mean 0 and deviation 1.413."""
    found = one_number().log_policy(policy_of([0.3], [0.5 * times]), torch.atanh(ACTIONS)[:, None])
    np.testing.assert_allclose(found, DENSITIES[times], atol=6e-7)
    mu, sigma = muzero.gaussian(torch.zeros(1, 2))
    assert mu.item() == 0 and sigma.item() == pytest.approx(1.413262)


def test_density_of_two_numbers_against_torch():
    """The sum over the numbers of the logarithms, not the logarithm of the sum."""
    mu, sigma, u = torch.tensor([0.3, -1.0], dtype=F64), torch.tensor([0.5, 2.0], dtype=F64), torch.randn(7, 2).double()
    tanh = torch.distributions.TanhTransform(cache_size=1)
    theirs = torch.distributions.TransformedDistribution(torch.distributions.Normal(mu, sigma), tanh)
    expected = theirs.log_prob(tanh(u)).sum(-1)
    torch.testing.assert_close(one_number().log_policy(policy_of(mu, sigma), u), expected, rtol=1e-9, atol=1e-9)


def test_entropy_by_hand_and_by_sampling():
    """mu 0.3, sigma 0.5: 0.426249, not the 0.725791 of u; a wide one of two numbers against 200,000 draws."""
    agent = one_number()
    torch.testing.assert_close(agent.quadrature[1].sum(), torch.tensor(1.0, dtype=F64))
    assert agent.entropy(policy_of([0.3], [0.5])).item() == pytest.approx(0.426249, abs=1e-6)
    policy, generator = policy_of([2.0, -0.5], [3.0, 0.2]), torch.Generator().manual_seed(0)
    mu, sigma = muzero.gaussian(policy)
    u = mu + sigma * torch.randn(200_000, 2, generator=generator, dtype=F64)
    sampled = -agent.log_policy(policy, u).mean().item()
    assert agent.entropy(policy).item() == pytest.approx(sampled, abs=0.03)


def test_prior_of_candidates_by_hand():
    """log pi - log beta of four candidates, a quarter of beta pi and the rest three times as wide; 0, if none is."""
    u = torch.atanh(torch.tensor([0.2, -0.5, 0.5, 0.9], dtype=F64))
    noise = ((u - 0.3) / 0.5)[:, None]
    logits = muzero.candidate_logits(noise, 0.75)
    np.testing.assert_allclose(logits - logits[0], np.array([0, -0.825571, -0.048328, -1.824592]), atol=2e-6)
    np.testing.assert_allclose(logits.softmax(0), (0.391836, 0.171618, 0.373349, 0.063197), atol=1e-6)
    np.testing.assert_allclose(muzero.candidate_logits(noise, 1e-9), 0, atol=1e-8)


def test_prior_of_candidates_corrects_what_they_were_drawn_from():
    """Means over many candidates, weighted by it, are those of the policy itself: E a and E a^2 of two numbers."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(200_000, 2, generator=generator, dtype=F64)
    mu, sigma = torch.tensor([0.3, -1.0]), torch.tensor([0.5, 0.7])
    direct = torch.tanh(mu + sigma * noise)
    noise[100_000:] *= muzero.WIDE
    drawn, prior = torch.tanh(mu + sigma * noise), muzero.candidate_logits(noise, 0.5).softmax(0)[:, None]
    for power in (1, 2):
        np.testing.assert_allclose((prior * drawn**power).sum(0), (direct**power).mean(0), atol=0.01)
        assert (((drawn**power).mean(0) - (direct**power).mean(0)).abs() > 0.02).any()


def test_policy_loss_by_hand():
    """w = (.1 .2 .6 .1): value and gradients; it is least at the weighted mean and deviation of u."""
    u, w = torch.atanh(torch.tensor([0.2, -0.5, 0.5, 0.9], dtype=F64))[:, None], torch.tensor([0.1, 0.2, 0.6, 0.1])
    mu, sigma = (torch.tensor([x], dtype=F64, requires_grad=True) for x in (0.3, 0.5))
    agent = one_number()
    loss = -(w * agent.log_policy(policy_of(mu, sigma), u)).sum()
    assert loss.item() == pytest.approx(0.465315, abs=1e-6)
    gradients = torch.autograd.grad(loss, (mu, sigma))
    assert [x.item() for x in gradients] == pytest.approx([-0.348871, -0.559298], abs=1e-5)
    mean = (w[:, None] * u).sum(0)
    deviation = (w[:, None] * (u - mean) ** 2).sum(0).sqrt()
    assert (mean.item(), deviation.item()) == pytest.approx((0.387218, 0.558843), abs=1e-6)
    mu, sigma = mean.clone().requires_grad_(), deviation.clone().requires_grad_()
    gradients = torch.autograd.grad((w * agent.log_policy(policy_of(mu, sigma), u)).sum(), (mu, sigma))
    assert [x.item() for x in gradients] == pytest.approx([0, 0], abs=1e-6)


SAMPLED = {  # (search, simulations): visits and mean of the root with the uniform prior of candidates drawn from pi
    ("puct", 1): ((1, 0, 0), 0.445), ("puct", 2): ((1, 1, 0), 0.356667), ("puct", 3): ((2, 1, 0), 0.525250),
    ("puct", 4): ((3, 1, 0), 0.705780), ("puct", 8): ((6, 1, 1), 1.170728), ("puct", 50): ((44, 3, 3), 1.606112),
    ("gumbel", 2): ((1, 1, 0), 0.356667), ("gumbel", 4): ((1, 1, 2), 0.464200), ("gumbel", 8): ((4, 1, 3), 0.747446),
    ("gumbel", 16): ((7, 2, 7), 1.184261), ("gumbel", 32): ((14, 13, 5), 1.988312),
}  # fmt: skip


@pytest.mark.parametrize(("search", "num_simulations"), SAMPLED)
def test_search_over_candidates_by_hand(search, num_simulations):
    """Candidates drawn from the policy itself have the uniform prior, at the root and below it."""
    table, logits = hand_model((0.5, 0, 0), (0.1, 0.2, 0.8), 0.9)

    def model(latent, action):
        latent, reward, discount, prior, value = table(latent, action)
        return latent, reward, discount, torch.zeros_like(prior), value

    root = torch.zeros(1, 1, dtype=F64), torch.zeros_like(logits), torch.tensor([0.3], dtype=F64)
    args, legal = make_args(num_simulations=num_simulations, c_scale=0.1), torch.ones(1, 3, dtype=torch.bool)
    if search == "puct":
        result = puct_search(model, root, legal, None, None, args)
    else:
        result = gumbel_search(model, root, legal, None, args)
    visits, mean = SAMPLED[search, num_simulations]
    assert result.visit_counts[0].tolist() == list(visits)
    assert result.value.item() == pytest.approx(mean, abs=1e-6)


def sampled_agent(**changes) -> tuple[muzero.Agent, muzero.Args]:
    return vector_agent(2, **{"num_candidates": 6, "num_simulations": 12} | changes)


@pytest.mark.parametrize("search", ["gumbel", "puct"])
def test_a_search_over_candidates_is_a_function_of_their_noise(search):
    """The same noise gives the same result, alone or in a batch; the action played is the candidate that was chosen.

    Below the root only the first two candidates of a node are tried.
    """
    (agent, args), generator = sampled_agent(search=search), torch.Generator().manual_seed(0)
    obs, legal = observations("vectors", 5), torch.ones(5, 6, dtype=torch.bool)
    draws = agent.draws(5, args, generator)
    noise, logits = torch.stack([x for x, _ in draws]), draws[0][1]
    assert noise.shape == (13, 5, 6, 2) and torch.equal(logits, muzero.candidate_logits(noise[0], 0.5))
    assert 1.5 < noise[0, :, 3:].std() / noise[1:].std() < 4.5
    chosen = []

    def step_fn(agent, latent, action, *draw):
        chosen.append(action.clone())
        return muzero.recurrent(agent, latent, action, *draw)

    result = muzero.act(agent, obs, legal, None, None, args, step_fn, draws)
    for row in range(5):
        some = slice(row, row + 1)
        mine = [(x[some], prior[some]) for x, prior in draws]
        alone = muzero.act(agent, obs[some], legal[some], None, None, args, muzero.recurrent, mine)
        for name in ("action", "policy", "candidates", "visit_counts"):
            torch.testing.assert_close(getattr(alone, name)[0], getattr(result, name)[row], rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        mu, sigma = muzero.gaussian(agent.network.predict(agent.network.represent(obs))[0])
    expected = (mu[:, None] + sigma[:, None] * noise[0]).clamp(-3.8, 3.8)
    torch.testing.assert_close(result.candidates, expected, rtol=1e-4, atol=1e-5)
    assert all((result.action[b] == expected[b].tanh()).all(-1).any() for b in range(5))
    assert not torch.equal(result.candidates[0] - mu[0], result.candidates[1] - mu[1])
    tried = result.visit_counts[:, 2:] > 0  # each of them is one edge of the root
    assert sum((actions >= 2).sum() for actions in chosen[:12]) == tried.sum() > 5


def test_the_model_steps_along_the_candidate_that_was_chosen():
    """Its number stands for tanh(u); the latent state of the next node has candidates of its own behind it."""
    (agent, args), generator = sampled_agent(), torch.Generator().manual_seed(0)
    draws, number = agent.draws(3, args, generator), torch.tensor([0, 5, 2])
    with torch.no_grad():
        latent, policy, _ = agent.initial(observations("vectors", 3))
        joined, prior = agent.offer(latent, policy, *draws[0])
        apart, u = agent.split(joined)
        assert torch.equal(apart, latent) and u.shape == (3, 6, 2)
        found, outputs = muzero.recurrent(agent, joined, number, *draws[1])
        expected, reward_logits = agent.network.dynamics(latent, u[torch.arange(3), number].tanh())
        policy, value_logits = agent.network.predict(expected)
    assert torch.equal(found, agent.offer(expected, policy, *draws[1])[0]) and prior is draws[0][1]
    reward, logits, value = map(torch.from_numpy, muzero.decode(outputs.numpy()))
    assert logits.tolist() == [[0, 0, *[-math.inf] * 4]] * 3
    reward, value = reward.float(), value.float()
    torch.testing.assert_close(reward, muzero.from_distribution(reward_logits, agent.bins), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(value, muzero.from_distribution(value_logits, agent.bins), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("K", [2, 3, 5, 8])
def test_candidates_are_corrected_for_how_many_are_wide(K):
    """Weighted by their prior, candidates have the second moment of the policy, 1; also where K is odd."""
    agent, args = sampled_agent(num_candidates=K, inner_candidates=2, num_simulations=1)
    noise, logits = agent.draws(20_000, args, torch.Generator().manual_seed(1))[0]
    weights = logits.double().exp()
    moment = (weights * noise[..., 0].double() ** 2).sum() / weights.sum()
    assert abs(moment - 1) < 0.03


def test_greedy_candidates_hold_the_mode():
    """Without noise and without wide ones, all with the same prior."""
    (agent, args), generator = sampled_agent(), torch.Generator().manual_seed(0)
    noise, logits = agent.draws(50, args, generator, greedy=True)[0]
    assert not noise[:, 0].any() and not logits.any()
    assert noise[:, 1:].std().item() == pytest.approx(1, abs=0.1)
    assert next(vector_agent()[0].draws(50, args, generator)) == ()


def test_search_and_loss_find_the_best_action_of_a_bandit():
    """One state, reward -(a - 0.3)^2, the true model: after 300 improvements the policy's mode is 0.3."""
    policy, agent = torch.zeros(1, 2, requires_grad=True), vector_agent(1, num_candidates=6)[0]
    optimizer, generator = torch.optim.Adam([policy], 0.03), torch.Generator().manual_seed(0)
    args, rng, B, K = make_args(num_simulations=8), np.random.default_rng(0), 8, 6
    for _ in range(300):
        noise = torch.randn(B, K, 1, generator=generator)
        noise[:, 3:] *= muzero.WIDE
        u = agent.split(agent.offer(torch.zeros(B, 0), policy.detach().expand(B, -1), noise, None)[0])[1]
        zero, none = torch.zeros(B), torch.zeros(B, K)

        def model(latent, action, u=u, zero=zero, none=none):
            return latent, -((u[torch.arange(B), action, 0].tanh() - 0.3) ** 2), zero, none, zero

        root = torch.zeros(B, 1), muzero.candidate_logits(noise, 0.5), zero
        gumbel = torch.from_numpy(muzero.draw_noise(np.ones((B, K), bool), args, rng))
        result = gumbel_search(model, root, torch.ones(B, K, dtype=torch.bool), gumbel, args)
        loss = -(result.policy * agent.log_policy(policy.expand(B, -1), u)).sum(-1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    mu, sigma = muzero.gaussian(policy)
    assert mu.tanh().item() == pytest.approx(0.3, abs=0.05) and sigma.item() < 0.6


def test_losses_of_continuous_actions_against_a_loop():
    """Policy over its candidates, entropy, and the cosine of predicted and seen latent states; metrics with them."""
    agent, args = sampled_agent(unroll_steps=2, entropy_scale=0.07, consistency_scale=1.5)
    obs, _, targets, weights = sequence_batch(agent, args)
    generator = torch.Generator().manual_seed(0)
    actions = agent.random_actions((2, 6), generator)
    assert actions.shape == (2, 6, 2) and actions.abs().max() < 1 and actions.min() < 0
    targets["candidates"] = torch.randn(3, 6, 6, 2, generator=generator)
    targets["obs"], targets["obs_mask"] = torch.randn(2, 6, 2, generator=generator), torch.rand(3, 6) < 0.7
    loss, metrics, _ = muzero.compute_losses(agent, obs, actions, targets, weights, args)
    sums = dict.fromkeys(("policy", "entropy", "consistency"), 0.0)
    for b in range(6):
        latent = agent.network.represent(obs[b : b + 1])
        for k in range(3):
            if k:
                latent, _ = agent.network.dynamics(latent, actions[k - 1, b : b + 1])
                seen = agent.projector(agent.network.represent(targets["obs"][k - 1, b : b + 1]))[0]
                said = agent.predictor(agent.projector(latent))[0]
                cosine = (said @ seen / said.norm() / seen.norm()).item()
                sums["consistency"] -= cosine * weights[b].item() / 2 / 6 * targets["obs_mask"][k, b].item()
            if targets["policy_mask"][k, b]:
                policy, scale = agent.network.predict(latent)[0][0], weights[b].item() * (1 if k == 0 else 1 / 2) / 6
                for a in range(6):
                    density = agent.log_policy(policy, targets["candidates"][k, b, a : a + 1])
                    sums["policy"] -= scale * targets["policies"][k, b, a].item() * density.item()
                sums["entropy"] += scale * agent.entropy(policy).item()
    parts = {name: metrics[f"losses/{name}_loss"].item() for name in ("policy", "value", "reward", "consistency")}
    assert parts["policy"] == pytest.approx(sums["policy"], rel=1e-4)
    assert parts["consistency"] == pytest.approx(sums["consistency"], rel=1e-4)
    expected = parts["policy"] + 0.25 * parts["value"] + parts["reward"] - 0.07 * sums["entropy"]
    assert loss.item() == pytest.approx(expected + 1.5 * parts["consistency"], rel=1e-4)
    assert metrics["losses/wide_share"].item() == pytest.approx(targets["policies"][0, :, 3:].sum(-1).mean().item())
    with torch.no_grad():
        sigma = muzero.gaussian(agent.initial(obs)[1])[1]
    assert metrics["losses/sigma"].item() == pytest.approx(sigma.mean().item(), rel=1e-4)


def test_the_seen_latent_state_has_no_gradient():
    """Consistency alone: gradients of the unrolled branch, none through the observations that it is compared to."""
    agent, args = sampled_agent(unroll_steps=1, consistency_scale=1.0)
    seen = torch.randn(1, 6, 2, requires_grad=True)
    obs, _, targets, weights = sequence_batch(agent, args)
    targets |= {name: torch.zeros_like(targets[name]) for name in ("policy_mask", "value_mask", "reward_mask")}
    targets |= {"candidates": torch.zeros(2, 6, 6, 2), "obs": seen, "obs_mask": torch.ones(2, 6, dtype=torch.bool)}
    loss = muzero.compute_losses(agent, obs, torch.zeros(1, 6, 2), targets, weights, args)[0]
    loss.backward()
    assert seen.grad is None
    reached = {
        ".".join(name.split(".")[:2]) for name, p in agent.named_parameters() if p.grad is not None and p.grad.any()
    }
    assert {"network.encoder", "network.action", "network.dynamics_out"} <= reached
    assert {name.split(".")[0] for name in reached} == {"network", "projector", "predictor"}
    assert not reached & {"network.head", "network.policy_value", "network.reward"}


def test_reanalysis_renews_candidates_with_their_weights():
    """Policies of a search over new candidates, which are stored with them; both of the other columns stay."""
    agent, args = sampled_agent(unroll_steps=2, td_steps=3)
    rb = make_rb(action_dim=2, num_candidates=6)
    fill(rb, 60)
    rows, generator = rb.sample(8, 1.0, torch.Generator().manual_seed(0)), torch.Generator().manual_seed(5)
    fresh = muzero.reanalyze(agent, rb, rows, 5, args, muzero.recurrent, generator)
    draws = agent.draws(15, args, generator.manual_seed(5))
    obs = rb.observations((rows["slots"][:5] + torch.arange(3)[:, None]) % rb.capacity, rows["envs"][:5].expand(3, 5))
    legal = rows["legal"][:3, :5].flatten(0, 1)
    result = muzero.act(agent, obs.flatten(0, 1), legal, None, None, args, muzero.recurrent, draws)
    for name in ("policy", "candidates"):
        torch.testing.assert_close(fresh[name][:3, :5].flatten(0, 1), getattr(result, name))
        assert torch.equal(fresh[name][:, 5:], rows[name][:, 5:]) and torch.equal(fresh[name][3:], rows[name][3:])
        assert not torch.equal(fresh[name][:3, :5], rows[name][:3, :5])


def test_update_of_continuous_actions():
    """Past the end of an episode actions are random; the latent states are compared with what was seen k steps on."""
    agent, args = sampled_agent(unroll_steps=2, td_steps=3, consistency_scale=1.0)
    rb = make_rb(action_dim=2, num_candidates=6, priority_alpha=0.0)
    fill(rb, 60)
    rows, found = rb.sample(64, 1.0, torch.Generator().manual_seed(0)), {}

    def losses_fn(agent, obs, actions, targets, weights, args):
        found.update(actions=actions, **targets)
        return muzero.compute_losses(agent, obs, actions, targets, weights, args)

    random = agent.random_actions((2, 64), torch.Generator().manual_seed(1))
    muzero.update(agent, muzero.make_optimizer(agent, args), rb, rows, random, args, losses_fn)
    over = (rows["kind"][:2].cumsum(0) > 0)[..., None]
    assert over.any() and torch.equal(found["actions"], torch.where(over, random, rows["action"][:2]))
    for b in range(64):
        for k in (1, 2):
            slot = (rows["slots"][b] + k) % rb.capacity
            assert torch.equal(found["obs"][k - 1, b], rb.data["obs"][slot, rows["envs"][b]])


def test_box_actions_are_rescaled_to_the_environment():
    """-1 and 1 of the agent are the bounds of the box, each number's its own; a repeated action earns the sum."""
    most, taken = np.finfo(np.float32).max, []
    box = gym.spaces.Box(np.float32([-2, 0, -most]), np.float32([2, 1, most]))

    class Recorder(gym.Env):
        observation_space, action_space = gym.spaces.Box(-1, 1, (3,)), box

        def step(self, action):
            taken.append(action)
            return np.zeros(3), 1.5, False, len(taken) == 3, {}

    env = muzero.fit_spaces(muzero.RepeatedAction(Recorder(), 2), "recorder")
    assert env.action_space == gym.spaces.Box(-1, 1, (3,), np.float32)
    assert env.step(np.array([-1, 1, 1], np.float32))[1:4] == (3.0, False, False)
    obs, reward, _, truncated, _ = env.step(np.array([0, 0, 0], np.float32))
    assert (reward, truncated, obs.dtype) == (1.5, True, np.float32)
    np.testing.assert_allclose(taken, [[-2, 1, most], [-2, 1, most], [0, 0.5, 0]])


def test_dm_control_tasks_run():
    """From state, each action twice: steps and returns are the environment's own."""
    pytest.importorskip("dm_control", reason="dm_control is not installed.")
    args = make_args(env_id="cartpole-balance")
    assert (args.action_repeat, args.gamma, args.two_player) == (2, 0.994, False)
    envs = muzero.make_vector_env(args, 2)
    obs, _ = envs.reset(seed=[1, 2])
    assert obs.shape == (2, 5) and envs.single_action_space.shape == (1,)
    for _ in range(500):
        _, rewards, terminations, truncations, infos = envs.step(np.zeros((2, 1), np.float32))
        assert (rewards <= 2).all() and not terminations.any()
    assert truncations.all() and infos["episode"]["l"].tolist() == [1000, 1000]


# === Updates ===


def test_update(monkeypatch):
    """One step down the loss; new priorities |v - z| of the first positions alone; the target network stays."""
    agent, args = vector_agent(unroll_steps=2, td_steps=3, batch_size=32)
    rb = make_rb()
    fill(rb, 60)
    target, optimizer = muzero.deepcopy(agent), muzero.make_optimizer(agent, args)
    before = rb.priority.clone()
    rows = rb.sample(32, 1.0, torch.Generator().manual_seed(0))
    kept = {name: tensor.clone() for name, tensor in rows.items()}
    seen = {}

    def recorded(agent, obs, actions, targets, weights, args):
        seen.update(actions=actions, targets=targets, obs=obs)
        return muzero.compute_losses(agent, obs, actions, targets, weights, args)

    random_actions = torch.full((2, 32), 2)
    metrics = muzero.update(agent, optimizer, rb, rows, random_actions, args, recorded)
    assert all(torch.equal(kept[name], tensor) for name, tensor in rows.items())
    assert all(value.isfinite() and not value.requires_grad for value in metrics.values())
    over = (rows["kind"][:2] != muzero.STEP).cumsum(0) > 0
    assert over.any() and torch.equal(seen["actions"], torch.where(over, 2, rows["action"][:2].long()))
    assert torch.equal(seen["obs"], rb.observations(rows["slots"], rows["envs"]))
    values = target.initial(seen["obs"])[2]
    expected = before.clone()
    for b in range(32):
        expected[rows["slots"][b], rows["envs"][b]] = (values[b] - seen["targets"]["returns"][0, b]).abs() + 1e-3
    torch.testing.assert_close(rb.priority, expected, rtol=1e-4, atol=1e-5)
    moved = [not torch.equal(a, b) for a, b in zip(agent.parameters(), target.parameters(), strict=True)]
    assert all(moved)


def test_update_descends():
    """Sixty updates on one batch take its loss down towards the entropy of its targets."""
    agent, args = vector_agent(unroll_steps=2, td_steps=3, learning_rate=1e-2, hidden_size=32)
    rb = make_rb()
    fill(rb, 60)
    optimizer = muzero.make_optimizer(agent, args)
    rows = rb.sample(16, 1.0, torch.Generator().manual_seed(0))
    losses = [
        muzero.update(agent, optimizer, rb, rows, torch.zeros(2, 16, dtype=torch.long), args, muzero.compute_losses)[
            "losses/loss"
        ]
        for _ in range(60)
    ]
    assert losses[-1] < 0.7 * losses[0]


def test_gradients_are_clipped_by_their_norm():
    agent, args = vector_agent(unroll_steps=2, td_steps=3, max_grad_norm=0.5)
    rb = make_rb()
    fill(rb, 60)

    def steep(*inputs):
        loss, *rest = muzero.compute_losses(*inputs)
        return 1e4 * loss, *rest

    rows = rb.sample(16, 1.0, torch.Generator().manual_seed(0))
    actions = torch.zeros(2, 16, dtype=torch.long)
    metrics = muzero.update(agent, muzero.make_optimizer(agent, args), rb, rows, actions, args, steep)
    grads = torch.cat([p.grad.flatten() for p in agent.parameters()])
    assert grads.norm().item() == pytest.approx(0.5, rel=1e-3) and metrics["grad_norm/agent"] > 100


def test_decay_spares_biases_and_norms():
    agent, args = vector_agent()
    groups = muzero.make_optimizer(agent, args).param_groups
    assert [group["weight_decay"] for group in groups] == [1e-4, 0.0]
    assert [group["lr"] for group in groups] == [args.learning_rate] * 2 == [1e-3] * 2
    assert all(p.dim() > 1 for p in groups[0]["params"]) and all(p.dim() == 1 for p in groups[1]["params"])
    assert sum(len(group["params"]) for group in groups) == len(list(agent.parameters()))


@pytest.mark.parametrize("count", [5, 40])
@pytest.mark.parametrize("closed_rows", [60, 9])
def test_bootstrap_now_are_those_of_the_target_network_now(count, closed_rows):
    """Returns of the first columns, by a loop from the network's values of the observations; the others as stored."""
    n, K = 3, 2
    agent, args = vector_agent(unroll_steps=K, td_steps=n)
    rb = make_rb()
    fill(rb, closed_rows)
    rows = rb.sample(40, 1.0, torch.Generator().manual_seed(0))
    assert {muzero.TERMINATED, muzero.TRUNCATED} <= set(rows["kind"].flatten().tolist())
    kept = {name: tensor.clone() for name, tensor in rows.items()}
    fresh = muzero.bootstrap_now(agent, rb, rows, count, n)
    assert all(torch.equal(kept[name], tensor) for name, tensor in rows.items())
    assert all(fresh[name] is rows[name] for name in set(rows) - {"value"})
    assert torch.equal(fresh["value"][:, count:], rows["value"][:, count:])
    targets = muzero.make_targets(fresh, K, n, 0.9)
    for b in range(count):
        slots = [(rows["slots"][b].item() + k) % rb.capacity for k in range(rb.span)]
        values = [agent.initial(rb.data["obs"][slot, rows["envs"][b]][None])[2].item() for slot in slots]
        for k in range(K + 1):
            if targets["value_mask"][k, b]:
                wanted = loop_return(*(rows["reward"][:, b].tolist(), values, rows["kind"][:, b].tolist()), k, n, 0.9)
                assert targets["returns"][k, b].item() == pytest.approx(wanted, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("search", ["gumbel", "puct"])
def test_reanalyze_searches_again_with_the_target_network(search, monkeypatch):
    """The first columns: policies of a search from each observation, some at a time; the others as stored."""
    monkeypatch.setattr(muzero, "REANALYZED_AT_ONCE", 4)
    agent, args = vector_agent(unroll_steps=2, td_steps=3, num_simulations=6, search=search)
    rb = make_rb()
    fill(rb, 60)
    rows = rb.sample(8, 1.0, torch.Generator().manual_seed(0))
    kept = {name: tensor.clone() for name, tensor in rows.items()}
    fresh = muzero.reanalyze(agent, rb, rows, 5, args, muzero.recurrent, None)
    assert all(torch.equal(kept[name], tensor) for name, tensor in rows.items())
    assert torch.equal(fresh["policy"][:, 5:], rows["policy"][:, 5:])
    assert torch.equal(fresh["policy"][3:], rows["policy"][3:])
    assert all(fresh[name] is rows[name] for name in set(rows) - {"policy", "candidates"})
    for b in range(5):
        for k in range(3):
            slot, env = (rows["slots"][b] + k) % rb.capacity, rows["envs"][b]
            obs = rb.data["obs"][slot, env][None]
            result = muzero.act(agent, obs, rows["legal"][k, b][None], None, None, args)
            torch.testing.assert_close(fresh["policy"][k, b], result.policy[0], rtol=1e-3, atol=1e-4)
            closed = rows["legal"][k, b] == 0
            assert closed.all() or not fresh["policy"][k, b][closed].any()


def test_updates_are_tied_to_environment_steps():
    args = make_args(learning_starts=100, replay_ratio=0.3)
    due = [muzero.updates_due(step, args) for step in range(0, 1000, 16)]
    assert due[:7] == [0] * 7 and due[-1] == int(892 * 0.3)
    assert {b - a for a, b in zip(due[7:-1], due[8:], strict=True)} == {4, 5}


def test_learning_rate_falls_by_equal_factors():
    """0.004 at the start, half of its logarithm's way down in the middle, a hundredth at the end; 1 = it stays."""
    agent, args = vector_agent(learning_rate=0.004, learning_rate_decay=0.01, total_timesteps=1000)
    optimizer, rates = muzero.make_optimizer(agent, args), []
    for step in (0, 250, 500, 1000, 1007):  # the last turn goes a few steps beyond the end
        muzero.set_learning_rate(optimizer, step, args)
        rates.append([group["lr"] for group in optimizer.param_groups])
    np.testing.assert_allclose(rates, np.transpose([[0.004, 0.00126491, 0.0004, 0.00004, 0.00004]] * 2), rtol=1e-5)
    muzero.set_learning_rate(optimizer, 777, replace(args, learning_rate_decay=1.0))
    assert [group["lr"] for group in optimizer.param_groups] == [0.004, 0.004]


def test_a_run_has_the_learning_rate_of_its_last_update():
    """A quarter of the first one's at the end."""
    folder = run(muzero, learning_rate=0.002, learning_rate_decay=0.25, total_timesteps=36)
    rates = [group["lr"] for group in load(folder)["parts"]["optimizer"]["param_groups"]]
    assert load(folder)["global_step"] >= 36
    np.testing.assert_allclose(rates, 0.0005)


# === Board games ===


def plain_winner(cells: dict, rows: int, columns: int, connect: int) -> bool:
    """Whether one player's cells {(y, x)} hold a line."""
    for y, x in cells:
        for dy, dx in ((0, 1), (1, 0), (1, 1), (-1, 1)):
            if all((y + i * dy, x + i * dx) in cells for i in range(connect)):
                return True
    return False


def test_action_planes():
    """The cell of a move; with gravity its column."""
    cells = muzero.BoardGame("tictactoe", 1).action_planes.flatten(1)
    assert torch.equal(cells, torch.eye(9))
    columns = muzero.BoardGame("connect_four", 1).action_planes
    assert columns.shape == (7, 1, 6, 7)
    for action in range(7):
        assert columns[action, 0, :, action].all() and columns[action].sum() == 6


@pytest.mark.parametrize(("name", "opening_moves"), [("tictactoe", 4), ("connect_four", 6)])
def test_openings_are_random_legal_moves(name, opening_moves):
    """0 to so many moves with equal chances, as none of them can win, by the seeds; only where a game begins."""
    N = 500
    game = muzero.BoardGame(name, N, opening_moves)
    obs, _ = game.reset(list(range(N)))
    chances = np.bincount(game.moves, minlength=opening_moves + 1) / N
    assert len(chances) == opening_moves + 1 and abs(chances - 1 / len(chances)).max() < 0.08
    assert obs.sum((1, 2, 3)).tolist() == game.moves.tolist()
    stones = torch.from_numpy(obs).sum((2, 3))
    assert torch.equal(stones[:, 1] - stones[:, 0], game.moves % 2)  # the player to move has as many, or one fewer
    if name == "connect_four":
        filled = obs.sum(1)
        assert (filled[:, :-1] <= filled[:, 1:]).all()  # no stone above an empty cell
    assert len({board.tobytes() for board in obs}) > 100
    again, _ = muzero.BoardGame(name, N, opening_moves).reset(list(range(N)))
    assert np.array_equal(obs, again)
    mask = np.arange(N) % 2 == 0
    after, _ = game.reset(list(range(1, N + 1)), {"reset_mask": mask})
    assert np.array_equal(after[~mask], obs[~mask]) and not np.array_equal(after[mask], obs[mask])
    assert not muzero.make_vector_env(make_args(env_id=name), 3).reset([1, 2, 3])[0].any()


def test_an_opening_that_wins_is_taken_back():
    """Eight random moves of tic-tac-toe win often: those games begin with none, the others have no line."""
    game = muzero.BoardGame("tictactoe", 500, 8)
    obs, _ = game.reset(list(range(500)))
    counts = np.bincount(game.moves, minlength=9)
    assert counts[0] > 2 * 500 / 9 and (counts[1:] > 0).all() and counts.sum() == 500
    assert obs.sum((1, 2, 3)).tolist() == game.moves.tolist()
    for board in obs.reshape(500, 2, 9):
        assert not any(plain_winner({(i // 3, i % 3) for i in np.flatnonzero(side)}, 3, 3, 3) for side in board)
    assert game.legal.any(1).all()


@pytest.mark.parametrize("name", ["tictactoe", "connect_four"])
def test_board_rules_against_plain_ones(name):
    """Random games: legal moves, observations, ends, rewards, results and resets, game by game."""
    rows, columns, connect, gravity = muzero.BOARD_GAMES[name]
    rng, games = np.random.default_rng(0), muzero.BoardGame(name, 8)
    stones = [(set(), set()) for _ in range(8)]  # of the first and the second player
    obs, _ = games.reset()
    ended = {"first": 0, "second": 0, "draw": 0}
    for _ in range(400):
        legal = games.legal
        actions = np.array([rng.choice(np.flatnonzero(row)) for row in legal])
        for i, (own, other) in enumerate(stones):
            taken = own | other
            if gravity:
                expected = [(0, x) not in taken for x in range(columns)]
            else:
                expected = [(y, x) not in taken for y in range(rows) for x in range(columns)]
            assert legal[i].tolist() == expected
            mover = len(taken) % 2
            for plane, cells in enumerate((stones[i][mover], stones[i][1 - mover])):
                assert {(y, x) for y, x in zip(*np.nonzero(obs[i, plane]), strict=True)} == cells
            if gravity:
                y = max(y for y in range(rows) if (y, actions[i]) not in taken)
                stones[i][mover].add((y, int(actions[i])))
            else:
                stones[i][mover].add(divmod(int(actions[i]), columns))
        obs, rewards, terminations, truncations, infos = games.step(actions)
        assert not truncations.any()
        for i in range(8):
            moves = len(stones[i][0]) + len(stones[i][1])
            mover = (moves - 1) % 2
            won = plain_winner(stones[i][mover], rows, columns, connect)
            assert rewards[i] == won and terminations[i] == (won or moves == rows * columns)
            assert infos["episode"]["l"][i] == moves
            assert infos["episode"]["r"][i] == (0 if not won else 1 - 2 * mover)
            if terminations[i]:
                ended[("first", "second")[mover] if won else "draw"] += 1
                stones[i] = (set(), set())
        obs, _ = games.reset(options={"reset_mask": terminations})
    assert all(count > 0 for count in list(ended.values())[: 2 if gravity else 3])


@pytest.mark.parametrize(("name", "theirs"), [("tictactoe", "tic_tac_toe"), ("connect_four", "connect_four")])
def test_board_rules_against_open_spiel(name, theirs):
    """Move by move on 100 random games."""
    pyspiel = pytest.importorskip("pyspiel", reason="OpenSpiel is not installed.")
    rng, spiel = np.random.default_rng(0), pyspiel.load_game(theirs)
    for _ in range(100):
        game, state = muzero.BoardGame(name, 1), spiel.new_initial_state()
        game.reset()
        while not state.is_terminal():
            assert np.flatnonzero(game.legal[0]).tolist() == state.legal_actions()
            action = rng.choice(state.legal_actions())
            state.apply_action(action)
            _, _, terminations, _, infos = game.step(np.array([action]))
            assert terminations[0] == state.is_terminal()
        assert infos["episode"]["r"][0] == state.returns()[0]


def test_an_illegal_move_is_an_error():
    game = muzero.BoardGame("tictactoe", 2)
    game.reset()
    game.step(np.array([4, 0]))
    with pytest.raises(AssertionError):
        game.step(np.array([4, 1]))


def test_search_on_boards_plays_legal_moves():
    """Whatever the network says, with and without noise, to the end of the game."""
    for search in ("puct", "gumbel"):
        agent, args, game = board_agent(search=search)
        rng = np.random.default_rng(0)
        obs, _ = game.reset()
        for move in range(20):
            legal = game.legal
            noise = torch.as_tensor(muzero.draw_noise(legal, args, rng)) if move % 2 else None
            inputs = torch.as_tensor(obs), torch.as_tensor(legal), noise, torch.ones(4), args
            result = muzero.act(agent, *inputs)
            assert legal[np.arange(4), result.action.numpy()].all()
            assert not result.policy.numpy()[~legal].any()
            obs, _, terminations, _, _ = game.step(result.action.numpy())
            obs, _ = game.reset(options={"reset_mask": terminations})


def test_a_search_with_the_true_rules_finds_the_win():
    """The search takes any model: the rules of tic-tac-toe, one move from the end, for either player."""

    def rules(latent, action):
        games = muzero.BoardGame("tictactoe", len(action))
        games.stones = latent.clone()
        games.moves = latent.sum((1, 2)).long()
        free = games.legal[np.arange(len(action)), action.numpy()]
        moves = np.where(free, action.numpy(), games.legal.argmax(1))
        full = games.moves == 9
        moves[full.numpy()] = 0
        games.stones[full] = 0
        _, rewards, terminations, _, _ = games.step(moves)
        over = torch.from_numpy(terminations) | full | ~torch.from_numpy(free)
        reward = torch.where(full | ~torch.from_numpy(free), 0.0, torch.from_numpy(rewards))
        return games.stones, reward, torch.where(over, 0.0, -1.0), torch.zeros(len(action), 9), torch.zeros(len(action))

    for own, other, win, lose in (((0, 1), (3, 4), 2, None), ((3,), (0, 1), None, 2), ((0, 8), (1, 3), 4, None)):
        game = muzero.BoardGame("tictactoe", 1)
        for plane, cells in enumerate((own, other)):
            game.stones[0, plane, list(cells)] = 1
        args = make_args(env_id="tictactoe", num_simulations=200)
        root = game.stones.clone(), torch.zeros(1, 9), torch.zeros(1)
        legal = torch.from_numpy(game.legal)
        for result in (
            puct_search(rules, root, legal, None, None, args, (-1.0, 1.0)),
            gumbel_search(rules, root, legal, None, args, (-1.0, 1.0)),
        ):
            assert result.action.item() == (win if win is not None else lose)


# === Evaluation ===


def test_evaluation_of_a_board_game_takes_both_seats():
    """Returns are the agent's, from the first seat and the second; the replayed games end in the reported results."""
    agent, args, _ = board_agent(eval_episodes=4)
    seen = []

    def opponent(envs, games, rng):
        seen.append(envs.moves[games].clone())
        return muzero.random_player(envs, games, rng)

    game = muzero.BoardGame("tictactoe", 4)
    returns, tracks = muzero.evaluate(agent, game, args, CPU, never, opponent=opponent)
    again, _ = muzero.evaluate(agent, muzero.BoardGame("tictactoe", 4), args, CPU, never, opponent=muzero.random_player)
    assert returns.tolist() == again.tolist() and len(returns) == len(tracks) == 4 and seen
    results = []
    for seat, track in zip((0, 1, 0, 1), tracks, strict=True):
        replay = muzero.BoardGame("tictactoe", 1)
        obs, _ = replay.reset()
        for t, action in enumerate(track["action"]):
            assert np.array_equal(obs[0], track["obs"][t])
            obs, rewards, terminations, _, infos = replay.step(np.array([action]))
            assert rewards[0] == track["reward"][t]
        assert terminations[0]
        results.append((len(track["action"]), infos["episode"]["r"][0] * (1 - 2 * seat)))
        signs = (-1.0) ** np.arange(len(track["action"]))[::-1]
        assert track["realized"].tolist() == (signs * track["reward"][-1]).tolist()
    in_order = sorted(results, key=lambda result: result[0])  # returns come as the games end
    assert returns.tolist() == [result for _, result in in_order] and len(set(returns.tolist())) > 1


def test_realized_returns():
    found = muzero.discounted_sums(np.array([1.0, 2.0, 3.0]), 4.0, 0.5)
    assert found.tolist() == [1 + 1 + 0.75 + 0.5, 2 + 1.5 + 1, 3 + 2]


@pytest.mark.parametrize("action_dim", [0, 2])
def test_open_loop_errors_against_a_loop(action_dim):
    """Start by start and step by step, for two episodes of different lengths."""
    agent, _ = vector_agent(action_dim)
    rng = np.random.default_rng(0)
    tracks = []
    for T in (4, 9):
        actions = rng.uniform(-1, 1, (T, 2)).astype(np.float32) if action_dim else rng.integers(3, size=T)
        tracks.append({
            "obs": rng.normal(size=(min(T, 6), 2)).astype(np.float32), "action": actions,
            "reward": rng.normal(size=T), "policy": rng.dirichlet(np.ones(3), size=T).astype(np.float32),
            "candidates": rng.normal(size=(T, 3, action_dim)).astype(np.float32),
            "realized": rng.normal(size=T).astype(np.float32),
        })  # fmt: skip
    found = muzero.open_loop_errors(agent, tracks, 5)
    expected = {name: [[] for _ in range(6)] for name in ("value", "policy", "reward")}
    with torch.no_grad():
        for track in tracks:
            T = len(track["action"])
            for t in range(len(track["obs"])):  # not every step keeps its observation
                latent, logits, value = agent.initial(torch.from_numpy(track["obs"][t : t + 1]))
                for k in range(min(6, T - t)):
                    if k:
                        action = torch.as_tensor(track["action"][t + k - 1 : t + k])
                        latent, reward_logits = agent.network.dynamics(latent, action)
                        logits, value_logits = agent.network.predict(latent)
                        reward, value = (muzero.from_distribution(x, agent.bins) for x in (reward_logits, value_logits))
                        expected["reward"][k].append(abs(reward.item() - track["reward"][t + k - 1]))
                    expected["value"][k].append(abs(value.item() - track["realized"][t + k]))
                    w, u = (torch.from_numpy(track[name][t + k]).double() for name in ("policy", "candidates"))
                    if action_dim:
                        mu, sigma = (x.double() for x in muzero.gaussian(logits[0]))
                        normal = torch.distributions.Normal(mu, sigma).log_prob(u)
                        log_pi = (normal - (1 - u.tanh() ** 2).log()).sum(-1)
                    else:
                        log_pi = logits[0].double().log_softmax(-1)
                    expected["policy"][k].append((w * (w.log() - log_pi)).sum().item())
    for name, steps in expected.items():
        for k in range(int(name == "reward"), 6):
            assert found[name][k] == pytest.approx(np.mean(steps[k]), rel=1e-4), (name, k)


# === Environments ===


def spaces_env(observation_space, action_space=None):
    """An environment with these spaces, whose first observation is a sample."""

    class Odd(gym.Env):
        def reset(self, *, seed=None, options=None):
            super().reset(seed=seed)
            return observation_space.sample(), {}

        def step(self, action):
            return observation_space.sample(), 1.0, False, False, {}

    env = Odd()
    env.observation_space, env.action_space = observation_space, action_space or gym.spaces.Discrete(3)
    observation_space.seed(0)
    return env


MATRIX = gym.spaces.Box(-1, 1, (2, 3), np.float64)
FLAT = {
    "Discrete": (gym.spaces.Discrete(16), 16),
    "Tuple": (gym.spaces.Tuple((gym.spaces.Discrete(32), gym.spaces.Discrete(11), gym.spaces.Discrete(2))), 45),
    "Box": (MATRIX, 6),
    "Dict": (gym.spaces.Dict(a=MATRIX, b=gym.spaces.Discrete(2)), 8),
    "vector": (gym.spaces.Box(0, 255, (5,), np.uint8), 5),
    "vector without float32 bounds": (gym.spaces.Box(-1e300, 1e300, (4,), np.float64), 4),
}


@pytest.mark.filterwarnings("ignore:overflow encountered in cast")  # of 1e300, sampled
@pytest.mark.parametrize("kind", FLAT)
def test_observations_are_flattened(kind):
    """Whatever Gymnasium can flatten arrives as a float32 vector; numbers of a Discrete as one of so many."""
    space, size = FLAT[kind]
    env = muzero.fit_spaces(spaces_env(space), kind)
    obs, _ = env.reset()
    assert env.observation_space.shape == obs.shape == (size,) and obs.dtype == np.float32
    if kind == "Discrete":
        assert sorted(obs.tolist()) == [0.0] * 15 + [1.0]


def test_grids_are_seen_by_the_board_network():
    """Small grids (H, W, C) come as planes, their latent state has their size."""
    env = muzero.fit_spaces(spaces_env(gym.spaces.Box(0, 1, (10, 8, 4), bool)), "grid")
    obs, _ = env.reset()
    assert obs.shape == env.observation_space.shape == (4, 10, 8) and obs.dtype == np.float32
    envs = TinyVector(1, (4, 10, 8))
    agent = muzero.make_agent(envs, make_args(hidden_size=8, consistency_scale=1.0))
    latent, logits, _ = agent.initial(torch.from_numpy(obs)[None])
    assert latent.shape == (1, 8, 10, 8) and logits.shape == (1, 3)
    assert agent.network.action_planes.shape == (3, 3, 10, 8) and agent.projector(latent).shape == (1, 640)
    assert torch.equal(agent.network.action_planes[1].sum((1, 2)), torch.tensor([0.0, 80.0, 0.0]))
    colours = torch.randint(256, (5, 4, 10, 8), generator=torch.Generator().manual_seed(0))  # bytes need no division:
    latents = [agent.initial(x)[0] for x in (colours, colours / 255)]  # the first layer's norm takes out their size
    torch.testing.assert_close(*latents, atol=1e-3, rtol=0)


@pytest.mark.parametrize("space", [gym.spaces.Box(0, 1, (84, 84, 1)), gym.spaces.Sequence(gym.spaces.Discrete(2))])
def test_other_observations_are_refused(space, capsys):
    error_of(capsys, muzero.fit_spaces, spaces_env(space), "odd")
    line = error_of(capsys, muzero.fit_spaces, spaces_env(MATRIX, gym.spaces.Box(-1, np.inf, (1,))), "endless")
    assert "actions must be" in line


class Masked(gym.Env):
    """Each step forbids two of three actions, another one each time; what is forbidden is an error."""

    observation_space, action_space = gym.spaces.Box(0, 9, (1,), np.float32), gym.spaces.Discrete(3)

    def _show(self):
        self.allowed = (self.count + self.first) % 3
        return np.array([self.count], np.float32), {"action_mask": (np.arange(3) == self.allowed).astype(np.int8)}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.first, self.count = int(self.np_random.integers(3)), 0
        return self._show()

    def step(self, action):
        assert action == self.allowed
        self.count += 1
        obs, infos = self._show()
        return obs, 1.0, self.count == 6 + self.first, False, infos


def test_action_masks_are_obeyed():
    """In training, whose replay keeps them, and in evaluation, where episodes end at different times."""
    gym.register("Masked-v0", Masked, max_episode_steps=7, disable_env_checker=True)
    run_dir = run(muzero, env_id="Masked-v0", num_envs=2, total_timesteps=60, eval_frequency=30)
    data = load(run_dir)["parts"]["replay"]["data"]
    steps = data["kind"] == muzero.STEP
    legal = data["legal"][:30][steps[:30]]
    assert (legal.sum(-1) == 1)[data["legal"][:30].any(-1)[steps[:30]]].all()
    assert len(torch.unique(legal.long().argmax(-1))) == 3
    del gym.registry["Masked-v0"]


def test_a_repeated_action_ends_where_it_is_forbidden():
    """Another action is the only one after one step, after two, never."""
    for steps, repeats in ((1, 1), (2, 2), (9, 3)):

        class Slow(Masked):
            def _show(self, steps=steps):
                self.allowed = self.count // steps % 3
                return np.array([self.count], np.float32), {"action_mask": np.arange(3) == self.allowed}

        env = muzero.RepeatedAction(Slow(), 3)
        env.reset(seed=0)
        obs, reward, *_, info = env.step(0)
        assert (obs.item(), reward, info["action_mask"][0]) == (repeats, repeats, steps == 9)


def test_a_mask_between_two_repeats_is_handed_on():
    """It holds until another one is given."""

    class Once(Masked):
        def _show(self):
            self.allowed = 0
            return np.array([self.count], np.float32), {"action_mask": np.array([1, 0, 1])} if self.count == 1 else {}

    env = muzero.RepeatedAction(Once(), 3)
    env.reset(seed=0)
    obs, *_, info = env.step(0)
    assert obs.item() == 3 and info["action_mask"].tolist() == [1, 0, 1]


@pytest.mark.parametrize(("mask", "words"), [([0, 1, 1], ""), ((0, 1, 1), ""), ([1, 1], "action_mask must be numbers")])
def test_action_masks_as_lists(mask, words, capsys):
    """Of the wrong length: one line, before there is a run folder. Three environments, as many as actions."""

    class Listed(Masked):
        def _show(self):
            obs, _ = super()._show()
            self.allowed = 1
            return obs, {"action_mask": mask}

        def step(self, action):
            assert action in (1, 2)
            self.allowed = action
            return super().step(action)

    gym.register("Listed-v0", Listed, max_episode_steps=7, disable_env_checker=True)
    settings = {"env_id": "Listed-v0", "num_envs": 3, "total_timesteps": 60, "learning_starts": 24}
    if words:
        assert words in error_of(capsys, run, muzero, **settings)
    else:
        data = load(run(muzero, **settings))["parts"]["replay"]["data"]
        assert data["legal"][data["kind"] == muzero.STEP][:20].tolist() == [[0, 1, 1]] * 20
    del gym.registry["Listed-v0"]


def test_legal_actions_of_some_environments():
    """What has not been told stays as it was."""
    before = np.array([[True, False], [True, True]])
    infos = {"action_mask": np.array([[0, 0], [0, 1]], np.int8), "_action_mask": np.array([False, True])}
    assert muzero.legal_actions(infos, before).tolist() == [[True, False], [False, True]]
    assert muzero.legal_actions({}, before) is before


def test_evaluation_is_bounded_and_says_how_far_it_is():
    """An environment without an end: episodes of `longest` decisions, with the rewards until then."""
    agent, args = vector_agent(eval_episodes=3)
    said = []

    class Endless(TinyVector):
        def reset(self, seed=None, options=None):
            return np.zeros((2, 2), np.float32), {}

        def step(self, actions):
            no = np.zeros(2, bool)
            return np.zeros((2, 2), np.float32), np.array([1.0, 2.0]), no, no, {}

    returns, tracks = muzero.evaluate(agent, Endless(2), args, CPU, said.append, longest=5)
    assert returns.tolist() == [5.0, 10.0, 5.0] and said[-1] == "evaluating, 2 of 3" and len(said) == 10
    assert [len(track["action"]) for track in tracks] == [5, 5]
    assert tracks[0]["realized"][-1] == pytest.approx(1 + 0.997 * agent.initial(torch.zeros(1, 2))[2].item(), rel=1e-5)


def test_evaluation_keeps_few_images():
    """Of images 50 steps a track, of vectors 500: pictures of the model need no more."""
    agent, args = image_agent()

    class Still(TinyVector):
        def reset(self, seed=None, options=None):
            return np.zeros((1, 4, 96, 96, 3), np.uint8), {}

        def step(self, actions):
            no = np.zeros(1, bool)
            return np.zeros((1, 4, 96, 96, 3), np.uint8), np.ones(1), no, no, {}

    args = muzero.replace(args, eval_episodes=1, num_simulations=1)
    _, (track,) = muzero.evaluate(agent, Still(1, (4, 96, 96, 3), np.uint8), args, CPU, never, longest=52)
    assert len(track["obs"]) == 50 and len(track["action"]) == 52


def test_any_game_in_a_row_has_the_settings_of_a_board(monkeypatch):
    """An entry in BOARD_GAMES is enough: discount -1, values within -1 ... 1, the outcome as return."""
    monkeypatch.setattr(muzero, "BOARD_GAMES", muzero.BOARD_GAMES | {"five": (5, 5, 4, False), "nim": TinyVector})
    args = make_args(env_id="five")
    assert (args.two_player, args.discount, args.support_size, args.bootstrap) == (True, -1.0, 1, "search")
    muzero.check_args(args)
    assert muzero.make_agent(muzero.make_vector_env(args, 2), args).num_actions == 25
    muzero.BOARD_GAMES["gomoku"] = (15, 15, 5, False)
    lengths = {"five": 25, "gomoku": 225, "tictactoe": 9, "connect_four": 42, "nim": 42}  # no return is bootstrapped
    for name, td_steps in lengths.items():
        muzero.check_args(args := make_args(env_id=name))
        assert args.td_steps == td_steps
    assert make_args(env_id="gomoku", td_steps=7).td_steps == 7 and muzero.BOARD["td_steps"] == 42


# === Settings and speed flags ===


def test_support_is_checked_against_the_largest_return(capsys):
    """CartPole with gamma 0.997, its limit bootstrapped: 333.3 -> h = 17.62; 500 -> 21.88; 10 bins end at 117.4.

    Four steps an action earn four times as much: 400 with gamma 0.99, h = 19.42; but 500 in a whole episode.
    """
    for support, gamma, repeat, fits in (
        (10, 0.997, 1, False),
        (17, 0.997, 1, False),
        (18, 0.997, 1, True),
        (10, 0.99, 1, True),
        (9, 0.99, 1, False),
        (19, 0.99, 4, False),
        (20, 0.99, 4, True),
        (21, 1.0, 1, False),
        (22, 1.0, 1, True),
        (22, 1.0, 4, True),
    ):
        args = make_args(support_size=support, gamma=gamma, action_repeat=repeat)
        envs = muzero.make_vector_env(args, 1)
        if fits:
            muzero.check_support(args, envs)
            continue
        with pytest.raises(SystemExit):
            muzero.check_support(args, envs)
        assert "--support-size" in capsys.readouterr().err
    for env_id in ("CartPole-v1", "Acrobot-v1", "MountainCar-v0", "Pendulum-v1"):  # the defaults
        muzero.check_support(args := make_args(env_id=env_id), muzero.make_vector_env(args, 1))
    args = make_args(env_id="LunarLander-v3", support_size=10)
    muzero.check_support(args, muzero.make_vector_env(args, 1))
    assert "117" in capsys.readouterr().out


def test_a_task_has_its_settings_under_each_of_its_names():
    for names in (("cartpole-swingup", "cartpole_swingup"), ("cup-catch", "ball-in-cup-catch", "ball_in_cup-catch")):
        settings = [replace(make_args(env_id=name), env_id="") for name in names]
        assert settings[0].action_repeat == 4 and settings == [settings[0]] * len(names)


# with which README's results were made: steps, environments, replay, updates per step, steps an action, gamma, n, M,
# simulations, units, c_scale, weight of the consistency loss, share that is searched anew, floor
SETTINGS = "total_timesteps num_envs buffer_size replay_ratio action_repeat gamma td_steps support_size".split()
SETTINGS += "num_simulations hidden_size c_scale consistency_scale reanalyze_ratio q_floor".split()
BY_TASK = {
    "CartPole-v1": (40_000, 16, 40_000, 0.25, 1, 0.997, 20, 20, 16, 64, 0.03, 0, 0, 0),
    "Acrobot-v1": (40_000, 16, 50_000, 0.25, 4, 0.99, 20, 20, 16, 64, 0.1, 0, 0, 0),
    "MountainCar-v0": (60_000, 16, 50_000, 0.25, 8, 0.98, 20, 20, 16, 64, 0.1, 0, 0, 0),
    "LunarLander-v3": (200_000, 16, 50_000, 0.25, 4, 0.99, 20, 30, 25, 64, 0.1, 0, 0, 0),
    "Pendulum-v1": (20_000, 8, 50_000, 0.5, 1, 0.99, 5, 41, 16, 64, 0.1, 2, 0, 0),
    "Taxi-v4": (100_000, 16, 50_000, 0.25, 1, 0.95, 5, 10, 16, 64, 0.1, 2, 0, 0.1),
    "cartpole-swingup": (100_000, 8, 100_000, 0.5, 4, 0.98, 5, 18, 16, 128, 0.1, 2, 0, 0),
    "cup-catch": (100_000, 8, 100_000, 0.25, 4, 0.98, 5, 18, 16, 128, 0.1, 2, 0, 0),
    "reacher-easy": (100_000, 8, 100_000, 0.25, 4, 0.98, 5, 18, 16, 128, 0.1, 2, 0, 0),
    "walker-walk": (100_000, 8, 100_000, 0.5, 2, 0.994, 5, 18, 16, 128, 0.1, 2, 0.1, 0),
    "tictactoe": (200_000, 64, 100_000, 0.1, 1, 1, 9, 1, 25, 32, 0.25, 0, 0, 0),
    "connect_four": (200_000, 64, 100_000, 0.1, 1, 1, 42, 1, 32, 32, 0.25, 0, 0, 0),
    "ALE/Pong-v5": (500_000, 16, 100_000, 0.25, 1, 0.997, 5, 300, 50, 64, 0.1, 0, 0, 0),
    "Toy-v0": (200_000, 16, 50_000, 0.25, 1, 0.997, 20, 300, 16, 64, 0.1, 0, 0, 0),
}


@pytest.mark.parametrize("env_id", BY_TASK)
def test_settings_by_task(env_id):
    """What a user gets with an id alone; the rest goes by the kind of task."""
    args = make_args(env_id=env_id)
    assert tuple(getattr(args, name) for name in SETTINGS) == BY_TASK[env_id]
    board, atari = env_id in muzero.BOARD_GAMES, env_id.startswith("ALE/")
    rest = args.batch_size, args.learning_rate, args.priority_alpha, args.max_episode_steps, args.dirichlet_alpha
    assert rest == (
        (128, 3e-3, 0, None, 1) if board else (256, 5e-4, 1, 27_000, 0.3) if atari else (128, 1e-3, 0, None, 0.25)
    )
    moves = {"tictactoe": (6, 6), "connect_four": (12, 6)}.get(env_id, (None, 0))
    assert (args.temperature_moves, args.opening_moves) == moves
    assert args.learning_starts == (20_000 if env_id == "Taxi-v4" else 1_000)
    assert args.learning_rate_decay == (0.1 if env_id in muzero.BOARD_GAMES else 1.0)
    assert (args.two_player, args.bootstrap) == (board, "search" if board else "target")
    falls = {"CartPole-v1": (10_000, 20_000), "ALE/Pong-v5": (250_000, 375_000)}.get(env_id, (50_000, 100_000))
    assert args.temperature_steps == ((10**9, 10**9) if board else falls)
    wanted = {"unroll_steps": 5, "target_network_frequency": 200, "weight_decay": 1e-4}
    wanted |= {"max_grad_norm": 5, "value_scale": 0.25, "entropy_scale": 0.05, "num_blocks": 1, "search": "gumbel"}
    wanted |= {"num_candidates": 8, "inner_candidates": 2, "max_considered_actions": 16}
    assert {name: getattr(args, name) for name in wanted} == wanted


def test_constants_of_the_search():
    """Those of the papers."""
    assert (muzero.PB_C_INIT, muzero.PB_C_BASE, muzero.DIRICHLET_FRACTION, muzero.C_VISIT) == (1.25, 19_652, 0.25, 50)


def test_a_flag_wins_over_the_task():
    assert make_args().support_size == 20 and make_args(support_size=30).support_size == 30
    assert (
        make_args(env_id="cartpole-swingup").action_repeat == 4 and make_args(env_id="walker-walk").action_repeat == 2
    )
    assert make_args(env_id="ALE/Pong-v5").batch_size == 256 and make_args(env_id="tictactoe").gamma == 1.0
    names = {field.name for field in fields(muzero.Args)}
    for task in (muzero.DEFAULTS, muzero.ATARI, muzero.BOARD, *muzero.TASKS.values()):
        assert set(task) <= names


@pytest.mark.slow  # half a minute of compiling; dreamer.py's and dreamer_v3.py's stand for it
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs g++, which is not installed.")
def test_compiled_equals_eager():
    """The model's step as the search has it, and the losses with their gradients."""
    agent, args = vector_agent(num_simulations=4, unroll_steps=2)
    obs, actions, targets, weights = sequence_batch(agent, args)
    noise = torch.as_tensor(muzero.draw_noise(np.ones((6, 3), bool), args, np.random.default_rng(0)))
    inputs, results = (obs, torch.ones(6, 3, dtype=torch.bool), noise, torch.ones(6), args), []
    for step_fn in (muzero.recurrent, torch.compile(muzero.recurrent)):
        results.append(muzero.act(agent, *inputs, step_fn))
    assert torch.equal(results[0].visit_counts, results[1].visit_counts)
    torch.testing.assert_close(results[0].policy, results[1].policy, rtol=1e-4, atol=1e-5)
    gradients = []
    for losses_fn in (muzero.compute_losses, torch.compile(muzero.compute_losses)):
        agent.zero_grad()
        losses_fn(agent, obs, actions, targets, weights, args)[0].backward()
        gradients.append([p.grad.clone() for p in agent.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU, and there is none on this machine.")
@pytest.mark.parametrize(("search", "action_dim"), [("gumbel", 0), ("puct", 0), ("gumbel", 2)])
def test_captured_model_equals_eager(search, action_dim):
    """Searches of two sizes in turn, with new inputs and with weights that have changed since the capture."""
    args = make_args(cuda=True, hidden_size=16, search=search, num_simulations=20)
    agent, rng = muzero.make_agent(TinyVector(4, action_dim=action_dim), args).cuda(), np.random.default_rng(0)
    graphed, generator = muzero.GraphedModel(muzero.recurrent), torch.Generator("cuda").manual_seed(0)
    for B in (4, 2, 4, 2, 4):
        legal, obs = np.ones((B, agent.num_actions), bool), rng.normal(size=(B, 2)).astype(np.float32)
        inputs = obs, legal, muzero.draw_noise(legal, args, rng), np.ones(B, np.float32)
        inputs = [torch.from_numpy(x).cuda() for x in inputs]
        draws = agent.draws(B, args, generator)
        both = (muzero.act(agent, *inputs, args, step_fn, draws) for step_fn in (graphed, muzero.recurrent))
        for a, b in zip(*both, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        with torch.no_grad():
            for parameter in agent.parameters():
                parameter += 0.1 * torch.randn_like(parameter)


def test_missing_atari_package_is_named(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "ale_py", None)
    with pytest.raises(SystemExit):
        muzero.make_vector_env(make_args(env_id="ALE/Pong-v5"), 1)
    assert "pip install ale_py" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["Pong-v5", "Pong-v4", "PongNoFrameskip-v4", "PongDeterministic-v0"])
def test_other_names_of_atari_games_are_told(name, capsys):
    """In a process that has registered none of them."""
    pytest.importorskip("ale_py", reason="ale_py is not installed.")
    known = {key: gym.registry.pop(key) for key in list(gym.registry) if key == name}
    assert (
        error_of(capsys, muzero.make_vector_env, make_args(env_id=name), 1)
        == f"error: {name!r} is played as ALE/Pong-v5"
    )
    gym.registry.update(known)


def test_atari_frames():
    """Four frames of 96 x 96 in colour, the first repeated after a reset; games played out, not one life."""
    pytest.importorskip("ale_py", reason="ale_py is not installed.")
    envs = muzero.make_vector_env(make_args(env_id="ALE/Pong-v5"), 2)
    obs, _ = envs.reset(seed=[1, 2])
    assert obs.shape == (2, 4, 96, 96, 3) and obs.dtype == np.uint8 and (obs == obs[:, :1]).all()
    before = obs.copy()
    obs, rewards, terminations, truncations, _ = envs.step(np.array([2, 3]))
    assert np.array_equal(obs[:, :3], before[:, 1:]) and envs.single_action_space.n == 6


# === Players of benchmark/muzero_boards.py ===


@pytest.fixture(scope="module")
def boards():
    path = Path(__file__).parent.parent / "benchmark" / "muzero_boards.py"
    spec = importlib.util.spec_from_file_location("muzero_boards", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def first_of_the_best(boards):
    return lambda game: np.array([boards.solve(*map(boards.bits, game.stones[i]))[1][0] for i in range(game.num_envs)])


def first_legal(game: muzero.BoardGame) -> np.ndarray:
    return game.legal.argmax(1)


@pytest.mark.parametrize("seat", [0, 1])
def test_walk_meets_every_reply(boards, seat):
    """Against a plain recursion; a perfect chooser never loses, one that takes the first empty cell does."""

    def plain(choose, stones, move, found):
        game = muzero.BoardGame("tictactoe", 1)
        game.stones[:], game.moves[:] = stones, move
        for action in choose(game) if move % 2 == seat else np.flatnonzero(game.legal[0]):
            turn = muzero.BoardGame("tictactoe", 1)
            turn.stones[:], turn.moves[:] = stones, move
            _, rewards, terminations, _, _ = turn.step(np.array([action]))
            if terminations[0]:
                end = "drawn" if not rewards[0] else "won" if move % 2 == seat else "lost"
                found[end].add((move, *turn.stones.flatten().tolist()))
            else:
                plain(choose, turn.stones, move + 1, found)

    for choose, safe in ((first_of_the_best(boards), True), (first_legal, False)):
        found = {"won": set(), "drawn": set(), "lost": set()}
        plain(choose, torch.zeros(1, 2, 9), 0, found)
        ends = boards.walk(choose, seat)
        assert {name: ends[name] for name in found} == {name: len(positions) for name, positions in found.items()}
        assert (ends["lost"] == 0) == safe and ends["positions"] > 10


def test_tic_tac_toe_is_a_draw(boards):
    assert boards.solve(0, 0) == (0, tuple(range(9)))
    assert boards.solve(0b000000011, 0b000011000) == (1, (2,)) and boards.solve(0b011, 0b000010100)[0] == 0


def test_perfect_player_never_loses(boards):
    """Against random play, from both seats: an agent that knows nothing wins no game."""
    _, args, _ = board_agent(eval_episodes=40, num_simulations=2)
    agent = muzero.make_agent(muzero.BoardGame("tictactoe", 1), args)
    game = muzero.BoardGame("tictactoe", 40)
    returns, _ = muzero.evaluate(agent, game, args, CPU, never, opponent=boards.perfect_player)
    assert returns.max() <= 0 and returns.mean() < -0.5


@pytest.mark.parametrize("name", ["tictactoe", "connect_four"])
def test_mcts_player_beats_an_agent_that_knows_nothing(boards, name):
    pytest.importorskip("pyspiel", reason="OpenSpiel is not installed.")
    args = make_args(env_id=name, eval_episodes=6, num_simulations=2, hidden_size=8, num_blocks=1)
    agent = muzero.make_agent(muzero.BoardGame(name, 1), args)
    game = muzero.BoardGame(name, 3)
    player = boards.MCTSPlayer(name, 100)
    returns, _ = muzero.evaluate(agent, game, args, CPU, never, opponent=player)
    assert returns.mean() < 0


def test_the_solver_judges_moves(boards):
    """Connect four is won in the middle and lost at the border; three on three is answered or lost."""
    pytest.importorskip("bitbully", reason="bitbully is not installed.")
    tracks = [{"action": np.array([action])} for action in (3, 0, 2, 6)]
    assert boards.kept_values(tracks, [0] * 4) == (1, 4)
    blocked, open_ = ({"action": np.array([3, 0, 3, 0, 3, reply])} for reply in (3, 0))
    assert boards.kept_values([blocked], [1])[1] == boards.kept_values([open_], [1])[1] == 3
    assert boards.kept_values([blocked], [1])[0] > boards.kept_values([open_], [1])[0] - 1


# === Whole runs ===

FOUR_ENVS = {"num_envs": 4, "learning_starts": 24, "total_timesteps": 120}


GAMES = {
    "counter": {},
    "two": TWO_ENVS,
    "puct": {"search": "puct", "priority_alpha": 0.6},
    "reanalyzed": {"reanalyze_ratio": 0.5, "bootstrap": "search"},
    "deadly": {"env_id": "fake_envs:DeadlyDiscreteCounter-v0"},
    "pixels": {"env_id": "fake_envs:CalmPixelsDiscrete-v0", "total_timesteps": 36, "consistency_scale": 1.0},
    "sampled": {"env_id": "fake_envs:Point-v0", "reanalyze_ratio": 0.5, "consistency_scale": 2.0},
    "sampled puct": {"env_id": "fake_envs:DeadlyPoint-v0", "search": "puct", "action_repeat": 2, "inner_candidates": 1},
    "CartPole": {"env_id": "CartPole-v1", **FOUR_ENVS},
    "tictactoe": {"env_id": "tictactoe", **FOUR_ENVS},
    "connect_four": {"env_id": "connect_four", "search": "puct", **FOUR_ENVS},
}


@pytest.mark.parametrize("kind", GAMES)
def test_muzero_logs_everything_and_moves_all_parameters(kind):
    """Each kind of task: tags, finite values, growing steps, files in the run folder, trained parameters."""
    settings = {"total_timesteps": 60, "eval_frequency": 24} | GAMES[kind]
    args, run_dir = muzero.with_task_defaults(tiny(muzero, **settings)), run(muzero, **settings)
    expected = {"charts/episodic_return", "charts/episodic_length", "charts/SPS"}
    expected |= {"eval/episodic_return", "eval/episodic_return_std", "grad_norm/agent"}
    expected |= {f"losses/{name}" for name in ("policy_loss", "value_loss", "reward_loss", "loss", "clipped_targets")}
    expected |= {"search/depth", "search/root_value_error", "search/root_value_bias"}
    expected |= {"open_loop/value_error_0", "open_loop/policy_error_0"}
    expected |= {f"open_loop/{name}_error_1" for name in ("value", "policy", "reward")}
    expected |= {f"losses/{name}" for name in ("entropy", "sigma", "wide_share") if kind.startswith("sampled")}
    expected |= {"losses/consistency_loss"} if args.consistency_scale else set()
    tags = scalars(run_dir)
    assert expected <= set(tags), expected - set(tags)
    beyond = {f"open_loop/{name}_error_{k}" for name in ("value", "policy", "reward") for k in (2, 4)}
    if "DeadlyPoint" not in args.env_id:  # whose episodes may be too short
        assert beyond <= set(tags)
    assert set(tags) <= expected | beyond
    assert image_tags(run_dir) == set()  # stored once, as a file
    assert f"open_loop_error_{args.total_timesteps // 24 * 24}.png" in os.listdir(run_dir)
    assert_healthy(run_dir)
    state = load(run_dir)
    saved = state["parts"]
    assert state["global_step"] == args.total_timesteps
    assert saved["counters"]["num_updates"] == muzero.updates_due(args.total_timesteps, args) > 0
    torch.manual_seed(args.seed)
    untrained = muzero.make_agent(muzero.make_vector_env(args, 1), args).state_dict()
    assert untrained.keys() == saved["agent"].keys() == saved["target"].keys()
    still = [name for name, tensor in untrained.items() if torch.equal(tensor, saved["agent"][name])]
    assert set(still) <= {"network.action_planes"}
    assert any(not torch.equal(tensor, saved["target"][name]) for name, tensor in untrained.items())


@pytest.mark.parametrize("num_envs", [1, 2])
@pytest.mark.parametrize(("name", "length"), [("", 12), ("Deadly", 8), ("BothEnds", 12)])
def test_muzero_replay_holds_what_was_played(name, length, num_envs):
    """Each environment's steps in their order, the final observation after them; a time limit is no termination."""
    settings = {"env_id": f"fake_envs:{name}DiscreteCounter-v0", "num_envs": num_envs, "total_timesteps": 48 * num_envs}
    run_dir = run(muzero, **settings, buffer_size=200 * num_envs)
    replay = load(run_dir)["parts"]["replay"]
    data = {key: column[: replay["ends"][0]] for key, column in replay["data"].items()}
    count = torch.arange(replay["ends"][0])[:, None].expand(-1, num_envs) % (length + 1)
    assert replay["ends"] == [48 + 48 // length] * num_envs == replay["ready"]
    closing = count == length
    assert (data["obs"][..., 1] == count).all() and (data["age"] == count).all()
    assert (data["reward"] == torch.where(closing, 0, count + 1)).all()
    kind = muzero.TRUNCATED if name == "" else muzero.TERMINATED
    assert (data["kind"] == torch.where(closing, kind, muzero.STEP)).all()
    assert (data["value"][closing] == 0).all() == (kind == muzero.TERMINATED)
    steps = ~closing[:-1]
    assert (data["action"][:-1][steps] == data["obs"][1:, :, 2][steps]).all()
    assert (data["priority"] > 0).eq(~closing).all()
    torch.testing.assert_close(data["policy"].sum(-1), (~closing).float())


def test_muzero_stores_what_its_searches_found(monkeypatch):
    """Action, policy and root value of each search, drawn with new noise, beside the moves that the rules allowed."""
    act, temperature_of, results, noises, moves = muzero.act, muzero.temperature_of, [], [], []

    def recorded_act(agent, obs, legal, noise, *rest):
        noises.append(noise)
        results.append(act(agent, obs, legal, noise, *rest))
        return results[-1]

    def recorded_temperature(counts, global_step, args):
        moves.append(counts.copy())
        return temperature_of(counts, global_step, args)

    monkeypatch.setattr(muzero, "act", recorded_act)
    monkeypatch.setattr(muzero, "temperature_of", recorded_temperature)
    run_dir, openings = run(muzero, **FOUR_ENVS | {"env_id": "tictactoe", "total_timesteps": 100}), []
    replay = load(run_dir)["parts"]["replay"]
    assert len(results) == 25 and all(noise.any() for noise in noises)
    assert not any(np.array_equal(*pair) for pair in zip(noises[:-1], noises[1:], strict=True))
    for i, end in enumerate(replay["ends"]):
        data = {name: column[:end, i] for name, column in replay["data"].items()}
        data = {name: column[data["kind"] == muzero.STEP] for name, column in data.items()}
        for name in ("action", "policy", "value"):
            assert torch.equal(data[name], torch.stack([getattr(result, name)[i] for result in results]).float()), name
        assert torch.equal(data["legal"] > 0, data["obs"].sum(1).flatten(1) == 0) and not data["legal"].all()
        openings.append(data["obs"].flatten(1).sum(1).numpy() - [count[i] for count in moves])
    starts = np.array(moves).T == 0
    assert all((opening[1:] == opening[:-1])[~start[1:]].all() for opening, start in zip(openings, starts, strict=True))
    assert np.min(openings) == 0 and np.max(openings) == 6 and np.max(moves) <= 8 and starts.sum() > 8


@pytest.mark.parametrize(
    ("settings", "fresh"),
    [({}, 4), ({"bootstrap": "search"}, 0), ({"bootstrap": "search", "reanalyze_ratio": 0.3}, 2)],
)
def test_muzero_bootstraps_from_the_target_network(monkeypatch, settings, fresh):
    """How many of a batch of 4 end in the target network's value now; the target network is another than the agent."""
    bootstrap_now, update, counts, networks = muzero.bootstrap_now, muzero.update, [], []

    def recorded_bootstrap_now(target, rb, rows, count, td_steps):
        networks.append(target)
        counts.append(count)
        return bootstrap_now(target, rb, rows, count, td_steps)

    def recorded_update(agent, *rest):
        assert all(target is not agent for target in networks)
        return update(agent, *rest)

    monkeypatch.setattr(muzero, "bootstrap_now", recorded_bootstrap_now)
    monkeypatch.setattr(muzero, "update", recorded_update)
    run_dir = run(muzero, **settings)
    num_updates = load(run_dir)["parts"]["counters"]["num_updates"]
    assert counts == [fresh] * (num_updates if fresh else 0)


def test_muzero_resumes_continuous_actions_to_the_bit():
    """Stopped at the end of an episode and continued: every weight, generator and row is as without a stop."""
    settings = {"env_id": "fake_envs:Point-v0", "reanalyze_ratio": 0.5, "consistency_scale": 1.0, "exp_name": "x"}
    whole, half = run(muzero, **settings, total_timesteps=96), run(muzero, **settings, total_timesteps=48)
    resume(muzero, half, **settings, total_timesteps=96)
    states = [{name: load(folder)[name] for name in ("parts", "rng", "global_step")} for folder in (whole, half)]
    assert differences(*states) == []
    data = states[0]["parts"]["replay"]["data"]
    assert data["action"].abs().max() <= 1 and data["candidates"].abs().max() > 1
    played = (data["candidates"].tanh() == data["action"][:, :, None]).all(-1).any(-1)
    assert played[data["kind"] == muzero.STEP].all()


def test_muzero_stops_between_two_updates_and_resumes_to_the_bit(monkeypatch):
    """A turn of updates looks at the stop request after each of them; what it owes is made first after the resume."""
    settings, update, calls = {"replay_ratio": 5.0, "total_timesteps": 36}, muzero.update, []
    whole = run(muzero, **settings)

    def stopped_update(*inputs):
        calls.append(None)
        if len(calls) == 57:  # the second one of step 24, at the end of an episode
            os.kill(os.getpid(), signal.SIGTERM)
        return update(*inputs)

    monkeypatch.setattr(muzero, "update", stopped_update)
    with pytest.raises(SystemExit, match="143"):
        run(muzero, **settings)
    (part,) = Path("run_1").glob("runs/*")
    assert load(part)["parts"]["counters"] == {"num_updates": 57, "owed": 3} and load(part)["global_step"] == 24
    resume(muzero, str(part), **settings)
    states = [{name: load(folder)[name] for name in ("parts", "rng", "global_step")} for folder in (whole, part)]
    assert differences(*states) == [] and len(calls) == 120


def test_seeds_share_no_stream():
    """Of twenty neighbouring seeds and six streams each, none begins where another does."""
    generators = [muzero.make_generator(CPU, seed, stream) for seed in range(20) for stream in (2, 3, 4, 5, 6, 99)]
    assert len({generator.initial_seed() for generator in generators}) == 120
    rng = {name: state for name, state in load(run(muzero, total_timesteps=24))["rng"].items() if name != "act"}
    assert set(rng) == {"reset", "replay", "update", "candidates"}


def test_memory_is_that_of_the_arrays(monkeypatch):
    """What is refused before it is made: trees and latent states, weights, and for learning the replay and more."""
    asked, args = [], make_args(num_simulations=30, num_envs=4, eval_episodes=6, hidden_size=16, batch_size=1)
    monkeypatch.setattr(muzero, "require_memory", lambda num_bytes, *rest: asked.append(num_bytes))
    for action_dim in (0, 2):
        envs = TinyVector(4, action_dim=action_dim)
        agent = muzero.make_agent(envs, args)
        muzero.check_memory(replace(args, evaluate="x"), envs)
        A, weights = agent.num_actions, 4 * sum(p.numel() for p in agent.parameters())
        tree = np.zeros((6, 31), muzero.NODE).nbytes + np.zeros((6, 31, A), muzero.EDGE).nbytes
        candidates = 4 * 6 * 31 * A * action_dim
        assert asked[-1] == weights + tree + 4 * 6 * 31 * 16 + 2 * candidates
        muzero.check_memory(args, envs)
        rb = muzero.ReplayBuffer(envs, agent, args, CPU)
        replay = sum(column.nbytes for column in rb.data.values()) + rb.priority.nbytes
        replay += rb.numbers.nbytes  # a checkpoint's
        assert asked[-1] - asked[-2] - 4 * weights - replay == 16 * 6 * (len(agent.bins) + 16)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"replay_ratio": 1e-6}, "--replay-ratio 1e-06 gives no update"),
        ({"learning_starts": 40_000}, "gives no update between --learning-starts 40000 and --total-timesteps 40000"),
        ({"env_id": "Taxi-v4", "total_timesteps": 10_000}, "--learning-starts 20000 must be within --total-timesteps"),
        ({"learning_starts": 40_001}, "--learning-starts 40001 must be within"),
        ({"c_scale": 0.0}, "--c-scale must be at least"),
        ({"num_candidates": 1}, "--num-candidates must be at least 2"),
        ({"two_player": True}, "--two-player True: CartPole-v1 is no game of BOARD_GAMES"),
        ({"env_id": "tictactoe", "two_player": False}, "--two-player False: tictactoe is a game of BOARD_GAMES"),
        ({"num_candidates": 4, "inner_candidates": 5}, "--inner-candidates 5 must be at most --num-candidates 4"),
        ({"env_id": "tictactoe", "action_repeat": 2}, "tictactoe has no use for --action-repeat"),
        ({"env_id": "tictactoe", "max_episode_steps": 2}, "tictactoe has no use for --max-episode-steps"),
    ],
)
def test_settings_that_cannot_learn_are_refused(changes, line, capsys):
    assert line in error_of(capsys, muzero.check_args, make_args(**changes))


def test_a_saved_run_may_have_what_a_new_one_may_not():
    """One from before these were refused: it goes on, is evaluated and played."""
    for changes in ({"env_id": "tictactoe", "two_player": False}, {"num_candidates": 4, "inner_candidates": 5}):
        for what in ("resume", "evaluate", "play"):
            muzero.check_args(make_args(**changes, **{what: "x"}))


USELESS = {  # why, and settings of which the first is refused
    "with --search gumbel": [{"dirichlet_alpha": 0.5}, {"temperature_steps": (1, 2)}, {"temperature_moves": 3}],
    "with --search puct": [{"c_scale": 0.2, "search": "puct"}, {"max_considered_actions": 4, "search": "puct"}],
    "on discrete actions": [{"entropy_scale": 0.0}, {"num_candidates": 4}, {"inner_candidates": 3}],
    "on the network of vectors": [{"num_blocks": 2}],
    "where Q lies within -1 ... 1": [{"q_floor": 0.1, "env_id": "tictactoe"}],
    "where all is searched anew": [{"bootstrap": "target", "env_id": "tictactoe", "reanalyze_ratio": 1.0}],
}


@pytest.mark.parametrize("reason", USELESS)
def test_settings_without_effect_are_refused(reason, capsys):
    """Of a new run; where they have one, or are the task's own, nothing is said; a resumed run may have them."""
    for changes in USELESS[reason]:
        args, name = make_args(**changes), next(iter(changes)).replace("_", "-")
        envs = muzero.make_vector_env(args, 1)
        assert error_of(capsys, muzero.check_effects, args, envs) == f"error: --{name} has no effect {reason}"
        muzero.check_effects(replace(args, resume="x"), envs)
    envs, board = TinyVector(1, action_dim=2), muzero.make_vector_env(make_args(env_id="tictactoe"), 1)
    muzero.check_effects(make_args(entropy_scale=0.0, num_candidates=4, inner_candidates=3, q_floor=0.1), envs)
    settings = {"dirichlet_alpha": 0.5, "temperature_steps": (1, 2), "temperature_moves": 3, "num_blocks": 2}
    muzero.check_effects(make_args(env_id="tictactoe", search="puct", **settings), board)
    muzero.check_effects(make_args(env_id="tictactoe", c_scale=0.2, max_considered_actions=4), board)


def test_a_saved_run_keeps_its_settings_without_effect(monkeypatch, capsys):
    """One of an older version, say: it goes on and is evaluated, by the other search too; a GPU's without one."""
    assert "--num-blocks has no effect" in error_of(capsys, run, muzero, num_blocks=3)
    run_dir = run(muzero)
    state = load(run_dir)
    state["args"] |= {"dirichlet_alpha": 0.7, "num_blocks": 3, "num_candidates": 5}
    torch.save(state, Path(run_dir, "checkpoint.pt"))
    command_line(monkeypatch, muzero, "--resume", run_dir, "--total-timesteps", "60")
    state = load(run_dir)
    assert state["global_step"] == 60 and state["args"]["dirichlet_alpha"] == 0.7
    evaluate = "--evaluate", run_dir, "--eval-episodes", "1", "--search", "puct"
    command_line(monkeypatch, muzero, *evaluate)
    assert "(1 episodes:" in capsys.readouterr().out
    line = error_of(capsys, command_line, monkeypatch, muzero, *evaluate, "--cudagraphs")
    assert "--cudagraphs needs a GPU" in line
    state["args"] |= {"cudagraphs": True}
    torch.save(state, Path(run_dir, "checkpoint.pt"))
    command_line(monkeypatch, muzero, *evaluate)
    assert "(1 episodes:" in capsys.readouterr().out


def test_a_checkpoint_of_other_sizes_is_one_line(capsys, monkeypatch):
    """The environment shows something else than when the agent was trained."""
    run_dir = run(muzero)
    monkeypatch.setattr(muzero, "make_vector_env", lambda *rest: TinyVector(2, shape=(7,)))
    args = replace(muzero.Args(**load(run_dir)["args"]), evaluate=run_dir)
    assert "does not fit this script, or its environment has changed" in error_of(capsys, muzero.evaluate_run, args)


def test_muzero_keeps_open_episodes_as_truncated():
    """Stopped in the middle of its episodes: the resumed run closes them with the observation that came last."""
    run_dir = run(muzero, **TWO_ENVS, total_timesteps=36)
    saved = load(run_dir)["parts"]
    assert saved["open_episodes"]["obs"][:, 1].tolist() == [6, 6]
    resume(muzero, run_dir, **TWO_ENVS, total_timesteps=60)
    data = load(run_dir)["parts"]["replay"]["data"]
    row = saved["replay"]["ends"][0]
    assert data["kind"][row].tolist() == [muzero.TRUNCATED] * 2 and data["obs"][row, :, 1].tolist() == [6, 6]
    assert torch.equal(data["value"][row], saved["open_episodes"]["value"]) and data["value"][row].all()
    assert data["obs"][row + 1, :, 1].tolist() == [0, 0]


@pytest.mark.parametrize(
    ("part", "key", "words"),
    [
        ("agent", "network.encoder.0.weight", "the search's value"),
        ("agent", "network.reward.bias", "the search's value"),
        ("target", "network.policy_value.bias", "(losses/|the search's value)"),  # of the first update, or after it
    ],
)
def test_muzero_stops_where_something_is_not_finite(part, key, words):
    """A poisoned parameter is found in a search or in a loss; the last checkpoint stays."""
    run_dir = run(muzero)
    path = Path(run_dir, "checkpoint.pt")
    state = load(run_dir)
    state["parts"][part][key][:] = math.nan
    torch.save(state, path)
    poisoned = path.read_bytes()
    with pytest.raises(SystemExit, match=rf"not finite at step \d+: {words}"):
        resume(muzero, run_dir, total_timesteps=96)
    assert path.read_bytes() == poisoned


def test_muzero_stops_where_only_a_policy_is_not_finite():
    """Values stay numbers then; the policy would go into the replay."""
    run_dir = run(muzero)
    path, state = Path(run_dir, "checkpoint.pt"), load(run_dir)
    state["parts"]["agent"]["network.policy_value.bias"][0] = math.nan
    torch.save(state, path)
    with pytest.raises(SystemExit, match=r"not finite at step \d+: its policy"):
        resume(muzero, run_dir, total_timesteps=96)


def test_muzero_stops_on_a_board_where_values_are_not_finite():
    """Between two reports, too: a full column would be the next choice."""
    run_dir = run(muzero, env_id="tictactoe", num_simulations=4, **FOUR_ENVS | {"total_timesteps": 40})
    path, state = Path(run_dir, "checkpoint.pt"), load(run_dir)
    state["parts"]["agent"]["network.policy_value.bias"][:] = math.nan
    torch.save(state, path)
    with pytest.raises(SystemExit, match="not finite at step 40: the search's value"):
        resume(muzero, run_dir, env_id="tictactoe", num_simulations=4, **FOUR_ENVS | {"total_timesteps": 80})


def test_an_image_network_may_be_small():
    network = muzero.make_agent(TinyVector(2, (4, 96, 96, 3), dtype=np.uint8), make_args(hidden_size=1)).network
    assert network.represent(torch.zeros(2, 4, 96, 96, 3, dtype=torch.uint8)).shape == (2, 1, 6, 6)


# === Playing against it ===


def test_play_against_a_run_by_piped_moves(monkeypatch, capsys):
    """Whoever begins; a wrong answer is asked again; its visits are shown; the last line says who has won."""
    run_dir = run(muzero, env_id="tictactoe", num_simulations=16, **FOUR_ENVS | {"total_timesteps": 40})
    for begins in "yn":
        answers = iter([begins, "nine", "9", *"012345678012345678"])
        monkeypatch.setattr("builtins.input", lambda text, answers=answers: next(answers))
        capsys.readouterr()
        command_line(monkeypatch, muzero, "--play", run_dir, "--num-simulations", "5")
        lines = capsys.readouterr().out.splitlines()
        boards = [line for line in lines if re.fullmatch("( [.XO012345678] ?)+", line)]
        moves = [re.search(r"I play (\d) \(visits (.*); my value [+-][01]\.\d\d\)", line) for line in lines]
        moves = [move for move in moves if move]
        assert len(boards) % 3 == 0 and boards[:3] != boards[-3:] and "one of " in lines[3 if begins == "y" else 7]
        for move in moves:
            visits = dict(pair.split(": ") for pair in move[2].split(", "))
            assert sum(map(int, visits.values())) == 5 and move[1] in visits
        assert lines[-1] in ("you win", "I win", "a draw")
        last = "".join(boards[-3:])
        assert last.count("X") - last.count("O") in (0, 1) and "X" in boards[0] + boards[1] + boards[2] + last
        assert last.count("O" if begins == "y" else "X") == len(moves)


COMPILING = "compiling the search: about ten seconds, again only when this file has changed"


def test_play_ends_with_the_input_and_wants_a_game(monkeypatch, capsys):
    run_dir = run(muzero, env_id="connect_four", num_simulations=4, **FOUR_ENVS | {"total_timesteps": 40})
    command = [sys.executable, muzero.__file__, "--play", run_dir]
    done = subprocess.run(command, input="y\n3\n", capture_output=True, text=True, check=False)
    out = done.stdout
    assert done.returncode == 0 and not done.stderr.replace(COMPILING, "").strip(), done.stderr
    assert " 0  1  2  3  4  5  6" in out and " .  .  .  X  .  .  ." in out and out.count("I play") == 1
    line = error_of(capsys, command_line, monkeypatch, muzero, "--play", run_dir, "--search", "puct")
    assert "--play takes --num-simulations and no other setting" in line
    line = error_of(capsys, command_line, monkeypatch, muzero, "--play", run(muzero))
    assert "fake_envs:DiscreteCounter-v0 is no game of two players" in line


def test_a_game_of_ones_own(monkeypatch):
    """The example of the docs: it runs as it stands there, and what it plays are games of Nim."""
    text = Path(muzero.__file__).parent.joinpath("docs", "muzero.md").read_text()
    (code,) = [block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "class Nim" in block]
    assert len(code.splitlines()) <= 40
    monkeypatch.setattr(
        sys, "argv", ["nim.py", *"--env-id nim --no-cuda --total-timesteps 1280 --eval-frequency 640".split()]
    )
    monkeypatch.setattr(muzero, "BOARD_GAMES", dict(muzero.BOARD_GAMES))
    names = {"__name__": "__main__"}
    exec(compile(code, "nim.py", "exec"), names)
    (folder,) = Path("runs").iterdir()
    args = muzero.Args(**load(str(folder))["args"])
    assert (args.two_player, args.discount) == (True, -1.0)
    assert_plays_nim(folder)
    for numbers in ("uint8", "float64"):
        other = code.replace("float32", numbers).replace('"nim"', f'"nim-{numbers}"')
        sys.argv[2] = f"nim-{numbers}"
        exec(compile(other, "nim.py", "exec"), {"__name__": "__main__"})
        assert_plays_nim(next(Path("runs").glob(f"*{numbers}*")))


def assert_plays_nim(folder: Path) -> None:
    data = load(str(folder))["parts"]["replay"]["data"]
    steps, left = (data["kind"] == muzero.STEP)[:10], data["obs"][:11].argmax(-1)
    assert (data["reward"][:10] == (left[:10] == data["action"][:10] + 1) * steps).all()
    assert (left[1:] == left[:10] - data["action"][:10] - 1)[steps].all() and data["obs"][:10].sum(-1).all()
    assert {"eval/episodic_return", "losses/loss", "search/root_value_bias"} <= set(scalars(str(folder)))


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_muzero_learns_cartpole(seed):
    """The default command: at least 475 over 100 episodes, and 20K steps later still."""
    run_dir = muzero.main(muzero.Args(cuda=False, seed=seed, eval_episodes=100, eval_frequency=20_000))
    evaluations = [value for _, value in scalars(run_dir)["eval/episodic_return"]]
    print(f"evaluation returns {evaluations}")
    assert min(evaluations[-2:]) >= 475
