"""Numbers of dhmbpo.py: each piece against hand-worked tables, plain loops from the equations, or the simulator."""

import dataclasses
import functools
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.distributions import Normal, TransformedDistribution
from torch.distributions.transforms import TanhTransform

import dhmbpo
from dhmbpo import Args, RingBuffer, Rollout

CPU = torch.device("cpu")
D, A = 3, 2  # numbers of observations and actions, unless a test says otherwise
SMALL = {"num_nets": 4, "model_hidden_size": 8, "hidden_size": 8, "model_batch_size": 16, "batch_size": 8}
SMALL |= {"learning_starts": 24, "model_train_frequency": 8, "critic_warmup": 2, "first_block": 2, "rollout_length": 3}
SMALL |= {"rollout_frequency": 2, "rollout_retain": 2, "model_patience": 1.0, "model_max_epochs": 3.0}
SMALL |= {"target_entropy": -2.0}


class Even(gym.Env):
    """A point that the action moves, for episodes of 4 steps; the reward is its nearness to 0."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (D,), np.float64)
    action_space = gym.spaces.Box(-2, 2, (A,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.point, self.count = self.np_random.normal(size=D), 0
        return self.point, {}

    def step(self, action):
        self.point = 0.9 * self.point + 0.1 * np.append(action, action.sum())
        self.count += 1
        speed = float(action[0])
        return self.point, -float(np.abs(self.point).sum()), False, self.count == 4, {"x_velocity": speed}


gym.register("Even-v0", entry_point=Even)
dhmbpo.TERMINATIONS["Even"] = dhmbpo.never_terminates


def make_args(**changes) -> Args:
    return dhmbpo.with_task_defaults(Args(**SMALL | changes))


def published(env_id: str, **changes) -> Args:
    """The settings of a task as a user gets them."""
    return dhmbpo.with_task_defaults(Args(env_id=env_id, **changes))


def generator(seed: int = 1) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def generators(seed: int = 1) -> dict[str, torch.Generator]:
    return {name: generator(seed + i) for i, name in enumerate(("model", "replay", "rollout", "update"))}


def normal(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, generator=generator(seed))


def numbers(*values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def close(found, expected, rtol: float = 1e-9, atol: float = 1e-10) -> None:
    torch.testing.assert_close(found, expected, rtol=rtol, atol=atol)


@pytest.fixture
def args():
    return make_args()


@pytest.fixture
def agent(args):
    return make_agent(args)


def make_agent(args: Args, obs_dim: int = D, action_dim: int = A, seed: int = 1):
    """All parameters, bounds and statistics are moved off their round initial values."""
    torch.manual_seed(seed)
    agent = dhmbpo.Agent(obs_dim, action_dim, args)
    with torch.no_grad():
        for parameter in agent.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        agent.bounds.copy_(torch.tensor([-3.0, 7.0]))
        for name in ("obs", "out"):
            getattr(agent, f"{name}_mean").normal_()
            getattr(agent, f"{name}_std").uniform_(0.5, 2)
    return agent


def count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def never(o: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(o[..., 0], dtype=torch.bool)


def quiet(doing: str) -> None:
    """A tick that never stops anything."""


def eager(function):
    """What a function is made faster by: nothing."""
    return function


# === Layers and networks ===


def test_published_settings():
    """One set for all tasks of the paper; the pendulums, which are not in it, have shorter blocks."""
    wanted = {
        "total_timesteps": 100_000,
        "learning_starts": 5_000,
        "model_train_frequency": 1_000,
        "critic_warmup": 250,
    }
    small = {"total_timesteps": 10_000, "learning_starts": 500, "model_train_frequency": 250, "critic_warmup": 62}
    both = {"buffer_size": 1_000_000, "gamma": 0.995, "tau": 0.005, "learning_rate": 3e-4, "batch_size": 256}
    both |= {"hidden_size": 256, "num_critics": 5, "num_targets": 2, "critic_dropout": 1e-3, "initial_alpha": 0.1}
    both |= {"target_entropy": None, "value_quantile": 0.01, "train_horizon": 3, "rollout_length": 20}
    both |= {"rollout_frequency": 20, "rollout_retain": 10, "updates_per_step": 1, "first_block": 5, "num_nets": 8}
    both |= {"model_hidden_size": 256, "model_lr": 1e-3, "model_batch_size": 2_048, "model_batches": 6}
    both |= {"model_patience": 50, "model_max_epochs": 250, "holdout_ratio": 0.2, "holdout_rows": 12_288}
    cases = {"Hopper-v5": wanted, "Humanoid-v5": wanted, "walker-walk": wanted, "Pendulum-v1": small}
    for env_id, own in (cases | {"InvertedPendulum-v5": small, "InvertedDoublePendulum-v5": small}).items():
        args = published(env_id)
        assert {name: getattr(args, name) for name in own | both} == own | both


SIZES = {  # env: D, A, one net, critics, actor, patience and cap of the ensemble, the same in the first block
    "InvertedPendulum-v5": (4, 1, 134_410, 666_885, 133_378, 80, 402, 402, 2_011),
    "Hopper-v5": (11, 3, 138_520, 678_405, 136_198, 124, 621, 621, 3_106),
    "HalfCheetah-v5": (17, 6, 142_372, 689_925, 139_276, 144, 722, 722, 3_612),
    "Walker2d-v5": (17, 6, 142_372, 689_925, 139_276, 144, 722, 722, 3_612),
    "Ant-v5": (27, 8, 148_024, 705_285, 142_864, 166, 833, 833, 4_165),
    "Humanoid-v5": (45, 17, 159_580, 739_845, 152_098, 191, 957, 957, 4_785),
}


@pytest.mark.parametrize("env_id", SIZES)
def test_parameter_counts(env_id):
    """Observations of the environment itself, and the parameters of each network."""
    args = published(env_id)
    env = dhmbpo.make_env(args)()
    obs_dim, action_dim = env.observation_space.shape[0], env.action_space.shape[0]
    agent = dhmbpo.Agent(obs_dim, action_dim, args)
    found = obs_dim, action_dim, count(agent.ensemble) // 8, count(agent.critics), count(agent.actor)
    assert found == SIZES[env_id][:5]
    assert count(agent.ensemble) == 8 * SIZES[env_id][2]


@pytest.mark.parametrize(
    ("eps", "expected"),
    [
        (1.0, (0, 0.3651483717, 1.095445115, -1.4605934867)),
        (0.1, (0, 0.3892494721, 1.1677484162, -1.5569978883)),
        (0.01, (0, 0.3919309008, 1.1757927025, -1.5677236033)),
        (1e-5, (0, 0.3922319686, 1.1766959057, -1.5689278742)),
    ],
)
def test_layer_norm_is_before_the_linear_map(eps, expected):
    """With the identity as weight the layer gives the normed input; another weight as worked by hand."""
    layer = dhmbpo.StackedLinear(1, 4, 4, eps).double()
    layer.weight.data.copy_(torch.eye(4))
    layer.bias.data.zero_()
    close(layer(numbers(1, 2, 4, -3)[None, None])[0, 0], numbers(*expected), atol=1e-9)


def test_layer_by_hand():
    """Norm, linear map, SiLU."""
    layer = dhmbpo.StackedLinear(1, 4, 2, 1.0).double()
    layer.weight.data.copy_(numbers((0.5, -1), (0.25, 0), (-0.5, 2), (1, 1)))
    layer.bias.data.copy_(numbers(0.1, -0.2))
    found = layer(numbers(1, 2, 4, -3)[None, None])[0, 0]
    close(found, numbers(-1.8170289513, 0.5302967433), atol=1e-9)
    close(F.silu(found), numbers(-0.2540038531, 0.333849545), atol=1e-9)


def forward(layers, log_eps: tuple, net: int, x: torch.Tensor) -> torch.Tensor:
    """One network for one input, in eval mode."""
    for i, (layer, eps) in enumerate(zip(layers, log_eps, strict=True)):
        if eps:
            centred = x - x.mean()
            x = centred / torch.sqrt((centred**2).mean() + eps)
        x = x @ layer.weight[net] + layer.bias[net, 0]
        x = x * torch.sigmoid(x) if i < 3 else x
    return x


def test_networks_equal_plain_loops(agent):
    """Layer norm before hidden layers 2 and 3 and the output, by their epsilons; critics scaled into their bounds."""
    inputs = normal(4, 6, D + A)
    found = agent.ensemble(inputs)
    for net in range(4):
        for row in range(6):
            expected = forward(agent.ensemble.layers, (0, 1.0, 0.1, 0.01), net, inputs[net, row])
            close(found[net, row], expected, 1e-5, 1e-6)
    obs, actions = normal(6, D), normal(6, A, seed=2)
    values = agent.critics(obs, actions, agent.bounds)
    for net in range(5):
        for row in range(6):
            h = forward(agent.critics.layers, (0, 1e-5, 1e-5, 1e-5), net, torch.cat([obs[row], actions[row]]))
            close(values[net, row], 2 + 5 * h[0], 1e-5, 1e-5)
    close(agent.critics(obs, actions, agent.bounds, torch.tensor([3, 1])), values[[3, 1]], 1e-6, 1e-6)


def test_initial_weights():
    """Kaiming normal weights, normal biases; critics start in the middle of the bounds, log_std at 0."""
    torch.manual_seed(1)
    agent = dhmbpo.Agent(17, 6, published("HalfCheetah-v5", target_entropy=-6.0))
    for layer in [*agent.ensemble.layers, *agent.critics.layers[:-1]]:
        fan_in = layer.weight.shape[1]
        assert abs(layer.weight.std().item() * math.sqrt(fan_in / 2) - 1) < 0.03
        assert abs(layer.bias.std().item() * 2 * math.sqrt(fan_in) - 1) < 0.15
    obs, actions = normal(5, 17), normal(5, 6)
    assert (agent.critics(obs, actions, torch.tensor([-20.0, 180.0])) == 80).all()
    assert (agent.ensemble.log_std == 0).all() and agent.ensemble.log_std.shape == (8, 1, 18)
    assert agent.log_alpha.item() == pytest.approx(math.log(0.1))
    for linear in agent.actor.net[::2]:
        product = linear.weight @ linear.weight.T if len(linear.weight) <= linear.in_features else None
        product = linear.weight.T @ linear.weight if product is None else product
        close(product, torch.eye(len(product)), 1e-4, 1e-5)
        assert (linear.bias == 0).all()
    assert agent.ensemble.decays == (2.5e-4, 5e-4, 7.5e-4, 1e-3, 1e-2)
    assert [layer.dropout for layer in agent.ensemble.layers] == [0.0075, 0.005, 0.0025, 0.0]
    assert [layer.dropout for layer in agent.critics.layers] == [1e-3, 1e-3, 1e-3, 0.0]


def test_dropout():
    """A share p of the pre-activations is zero, others are scaled by 1 / (1 - p), and so are their gradients."""
    torch.manual_seed(1)
    layer = dhmbpo.StackedLinear(4, 5, 100, 0.1, dropout=0.05)
    x = normal(4, 50, 5).requires_grad_()
    plain, dropped = layer(x), layer(x, generator=generator())
    zero = dropped == 0
    assert 0.045 < zero.float().mean() < 0.05  # double hits
    close(dropped[~zero], plain[~zero] / 0.95, 1e-5, 1e-6)
    assert zero.any((0, 1)).all() and zero.any((1, 2)).all() and zero.any((0, 2)).all()
    found = torch.autograd.grad(dropped.square().sum(), (x, layer.weight, layer.bias))
    expected = torch.autograd.grad((plain * ~zero / 0.95).square().sum(), (x, layer.weight, layer.bias))
    close(found, expected, 1e-4, 1e-4)
    assert not torch.equal(layer(x, generator=generator(2)), dropped)


def test_policy_by_hand():
    """Action, log-probability and mode of a policy with given mean and raw standard deviation."""
    actor = dhmbpo.Actor(1, 2, dhmbpo.Args(hidden_size=4)).double()
    actor.net[-1].weight.data.zero_()
    actor.net[-1].bias.data.copy_(numbers(0.3, -1.1, -0.5, 0.8))
    actions, log_prob = actor(numbers([0.7]), numbers([1.2, -0.4]))
    close(actions[0], numbers(0.7008170472, -0.9167779472), atol=1e-9)
    close(log_prob[0], numbers(0.4617233550)[0], atol=1e-9)
    close(actor.mode(numbers([0.7]))[0], numbers(0.2913126125, -0.8004990218), atol=1e-9)
    std = F.softplus(numbers(-0.5, 0.8)) + 1e-5
    distribution = TransformedDistribution(Normal(numbers(0.3, -1.1), std), TanhTransform(cache_size=1))
    close(log_prob[0], distribution.log_prob(torch.tanh(numbers(0.3, -1.1) + std * numbers(1.2, -0.4))).sum())


# === Statistics, replay ===


def test_statistics_by_hand():
    """Population variance, at least 1e-8; outputs are reward and change of the observation, in that order."""
    args = make_args()
    agent = dhmbpo.Agent(2, 1, args)
    obs = torch.tensor([[1.0, 5], [3, 5], [2, 5], [6, 5]])
    rows = torch.cat([obs, torch.zeros(4, 1), torch.tensor([[1.0], [2], [3], [4]]), obs * 3, torch.ones(4, 5)], 1)
    agent.fit_statistics(rows)
    close(agent.obs_mean, torch.tensor([3.0, 5]), 1e-6)
    close(agent.obs_std, torch.tensor([1.8708286934, 0.0001]), 1e-6)
    close(agent.out_mean, torch.tensor([2.5, 6, 10]), 1e-6)
    close(agent.out_std, torch.tensor([math.sqrt(1.25), 2 * 1.8708286934, 0.0001]), 1e-6)
    close(agent.standardize(obs), (obs - agent.obs_mean) / agent.obs_std)


def test_labels_and_weights():
    """A fifth is held out, weights are Exp(1), one for each network; rows come apart as they were put together."""
    args = make_args()
    agent = make_agent(args)
    rows = dhmbpo.labelled(normal(20_000, 2 * D + A + 1), generator(), args)
    obs, actions, outputs, held_out, weights = agent.unpack(rows)
    assert abs(held_out.float().mean().item() - 0.2) < 0.01 and weights.shape == (20_000, 4)
    assert abs(weights.mean().item() - 1) < 0.01 and abs(weights.var().item() - 1) < 0.03 and (weights >= 0).all()
    assert abs(np.corrcoef(weights.numpy().T) - np.eye(4)).max() < 0.03
    again = normal(20_000, 2 * D + A + 1)
    close(torch.cat([obs, actions], 1), again[:, : D + A])
    close(outputs, torch.cat([again[:, D + A : D + A + 1], again[:, D + A + 1 :] - again[:, :D]], 1))


# === Losses ===


def path_of(rewards, log_probs, alive) -> Rollout:
    """A rollout with these numbers (T, B), (T + 1, B), (T + 1, B), and states and actions of width 1 that are zero."""
    zeros = [torch.zeros(log_probs.shape[1], 1, dtype=torch.float64)] * len(log_probs)
    return Rollout(zeros, zeros, log_probs, rewards, alive)


def table_path() -> Rollout:
    """r = (1, 2, -0.5) and log pi = (-1.2, 0.3, -0.7, 0.9); alive, terminated in the 2nd, in the 1st step."""
    alive = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 0], [1, 0, 0]]).bool()
    return path_of(
        numbers(1, 2, -0.5)[:, None].expand(3, 3), numbers(-1.2, 0.3, -0.7, 0.9)[:, None].expand(4, 3), alive
    )


def test_soft_return_by_hand():
    """The actor's return, and the critics' target, which has no entropy of the first action."""
    path, alpha = table_path(), numbers(0.1)[0]
    found = dhmbpo.soft_return(path, numbers(52, 52, 52), alpha, 0.995)
    close(found, numbers(53.78967601125, 3.08015, 1.12))
    found = dhmbpo.soft_return(path, numbers(50, 50, 50), alpha, 0.995) + alpha * path.log_probs[0]
    close(found, numbers(51.69952626125, 2.96015, 1.0))


def test_what_comes_after_a_termination_does_not_matter():
    """Not even what is not a number."""
    path = table_path()
    rewards = path.rewards.clone()
    rewards[2, 1], rewards[1:, 2] = math.inf, math.nan
    found = dhmbpo.soft_return(path._replace(rewards=rewards), numbers(52, math.nan, math.inf), numbers(0.1)[0], 0.995)
    close(found, numbers(53.78967601125, 3.08015, 1.12))


@pytest.mark.parametrize("size", [1e30, math.inf])
def test_a_rollout_survives_what_runs_off_after_a_termination(size, monkeypatch):
    """Return, gradients and bounds stay finite, other rows as they were; while alive nothing is hidden."""
    args, agent = make_args(), make_agent(make_args())
    model_step, obs = dhmbpo.model_step, normal(8, D)

    def runs_off(*inputs):
        """Row 0, in the second step."""
        calls.append(1)
        next_obs, reward = model_step(*inputs)
        first = (torch.arange(len(next_obs)) == 0) & (len(calls) == 2)
        return next_obs + torch.where(first[:, None], size, 0.0), torch.where(first, size, reward)

    def rollout(terminated_after):
        calls.clear()
        alive = torch.arange(8) > 0
        return dhmbpo.rollout(agent, obs, 3, lambda o: ~alive & (len(calls) >= terminated_after), generator())

    calls, calm = [], dhmbpo.rollout(agent, obs, 3, dhmbpo.never_terminates, generator())
    monkeypatch.setattr(dhmbpo, "model_step", runs_off)
    path = rollout(terminated_after=1)
    assert path.alive[:, 0].tolist() == [True, False, False, False] and path.alive[:, 1:].all()
    assert all(torch.equal(a[1:], b[1:]) for a, b in zip(calm.obs, path.obs, strict=True))
    dhmbpo.track_bounds(agent, path, args)
    dhmbpo.actor_loss(agent, path, args.gamma).backward()
    assert agent.bounds.isfinite().all() and agent.bounds.abs().max() < 1e4
    assert all(parameter.grad.isfinite().all() for parameter in agent.actor.parameters())
    assert rollout(terminated_after=2).obs[2][0].abs().min() >= size


class Lookup(torch.nn.Module):
    """Critics whose outputs at the first and last state are given: their place is told by the observation."""

    def __init__(self, first, last):
        super().__init__()
        self.first, self.last = torch.nn.Parameter(first), torch.nn.Parameter(last)

    def forward(self, obs, actions, bounds, nets=None, generator=None):
        net = self.last if obs[0, 0] == 1 else self.first
        net = net if nets is None else net[nets]
        return bounds.mean() + (bounds[1] - bounds[0]) / 2 * net


def test_losses_by_hand():
    """Scaling, smaller of the pair, clip of it, squared error without a half, mean of all critics for the actor."""
    rows = numbers([0.5, -0.2, 1.3, 0.1, 0.9], [1.4, 1.2, 1.3, 1.1, 1.9]).T
    first = numbers(0, 0.1, -0.1, 0.2, 0.3)[:, None].expand(5, 2).clone()
    critics = Lookup(first, rows.clone())
    agent = SimpleNamespace(critics=critics, target_critics=Lookup(first * math.nan, rows.clone()))
    agent.bounds, agent.log_alpha = numbers(-20, 180), torch.nn.Parameter(numbers(0.1)[0].log())
    path = table_path()
    path = Rollout(path.obs, path.actions, path.log_probs[:, :2], path.rewards[:, :2], path.alive[:, :2])
    path = path._replace(obs=[obs[:2] for obs in path.obs[:3]] + [torch.ones(2, 1, dtype=torch.float64)])
    losses, values = dhmbpo.critic_loss(agent, path, torch.tensor([0, 4]), 0.995, None)
    close(losses.sum(), numbers(24_041.58083903222)[0])
    close(values[:, 0], numbers(80, 90, 70, 100, 110))
    close(dhmbpo.actor_loss(agent, path, 0.995), numbers(-67.837908005625)[0])


def test_the_targets_value_is_clipped():
    """After the smaller one of the pair is taken, at both bounds; the returns before it are not."""
    nets = numbers([1.4, 1.2, 1.3, 1.1, 1.9], [-1.5, 0.2, 0.3, 0.4, 0.5], [0.5, -0.2, 1.3, 0.1, 0.9]).T
    agent = SimpleNamespace(critics=Lookup(nets * 0, nets), target_critics=Lookup(nets, nets))
    agent.bounds, agent.log_alpha = numbers(-20, 180), numbers(0.1)[0].log()
    path = table_path()
    path = path._replace(alive=torch.ones(4, 3, dtype=torch.bool), obs=[*path.obs[:3], torch.ones(3, 1).double()])
    losses, values = dhmbpo.critic_loss(agent, path, torch.tensor([0, 4]), 0.995, None)
    expected = dhmbpo.soft_return(path, numbers(180, -20, 130), numbers(0.1)[0], 0.995) - 0.12
    assert (values == 80).all()
    close(losses, ((expected - 80) ** 2).mean().expand(5))


def test_bounds_by_hand():
    """The first call sets them, later ones move them by the learning rate; terminated entries count."""
    agent = SimpleNamespace(bounds=numbers(math.nan, math.nan), log_alpha=numbers(0.1)[0].log())
    args = published("Hopper-v5")
    alive = torch.zeros(4, 2, dtype=torch.bool)
    path = path_of(numbers(1, 2, -0.5)[:, None].expand(3, 2), numbers(-1.2, 8.8, 0.7, 5)[:, None].expand(4, 2), alive)
    dhmbpo.track_bounds(agent, path, args)  # r - alpha log pi = 1.12, 1.12, -0.57
    close(agent.bounds, numbers(-0.57, 1.12) * 200, 1e-9)
    agent.bounds.fill_(math.nan)
    dhmbpo.track_bounds(agent, table_path(), args)  # 1.12, 1.97, -0.43 in each row
    close(agent.bounds, numbers(-86, 394), 1e-9)

    def track(values):
        rewards = torch.tensor(values, dtype=torch.float64).reshape(2, 5)
        zeros = torch.zeros(3, 5, dtype=torch.float64)
        dhmbpo.track_bounds(agent, path_of(rewards, zeros, zeros.bool()), args)

    agent.bounds.fill_(math.nan)
    rewards, zeros = torch.arange(10.0).double().reshape(2, 5), torch.zeros(3, 5, dtype=torch.float64)
    mixed = torch.arange(15).reshape(3, 5) < 4  # all but four have ended: they count like the others
    dhmbpo.track_bounds(agent, path_of(rewards, zeros, mixed), args)
    close(agent.bounds, torch.quantile(rewards.flatten(), numbers(0.01, 0.99)) * 200, 1e-9)
    agent.bounds.fill_(math.nan)
    track([i / 10 for i in range(1, 11)])
    close(agent.bounds, numbers(21.8, 198.2))
    expected = {1: (21.80654, 198.25946), 10: (21.8653117806, 198.7937979318), 1000: (27.4508896608, 249.5764371916)}
    for calls in range(1, 1001):
        track([i / 5 for i in range(1, 11)])
        if calls in expected:
            close(agent.bounds, numbers(*expected[calls]), 1e-10)


def test_alpha_loss_by_hand():
    """It falls while the entropy is above its target; the entropy gets no gradient."""
    log_alpha, log_prob = torch.nn.Parameter(numbers(0.1)[0].log()), numbers(-1.2, 0.4, 2.0).requires_grad_()
    loss = dhmbpo.alpha_loss(log_alpha, -log_prob.mean(), -3.0)
    loss.backward()
    close(loss, numbers(0.26)[0])
    close(log_alpha.grad, numbers(0.26)[0])
    assert log_prob.grad is None


def test_model_loss_by_hand():
    """The floor acts on the second term only."""
    mean, log_std = numbers([[0.2, -1]], [[0.5, 0]]), numbers([[-0.5, 0.1]], [[-8, 0.3]]).requires_grad_()
    targets, weights = numbers([[0, -0.5]], [[0.5004, -0.5]]), numbers([0.7], [1.6])
    loss = dhmbpo.model_loss(mean, log_std, targets, weights)
    loss.backward()
    close(loss, numbers(-9.495529086035)[0])
    expected = numbers([[0.6238881088, 0.5567221182]], [[-2.2748442932, 1.3804753456]])
    close(log_std.grad, expected, 1e-9)


def test_model_loss_is_a_mean_over_rows_and_a_sum_over_networks(agent):
    mean, targets, weights = normal(4, 6, 1 + D), normal(4, 6, 1 + D, seed=2), normal(4, 6, seed=3).exp()
    expected = 0.0
    for net in range(4):
        for row in range(6):
            gaussian = Normal(mean[net, row], agent.ensemble.log_std[net, 0].exp())
            nll = -gaussian.log_prob(targets[net, row]) - 0.5 * math.log(2 * math.pi)
            expected += weights[net, row] * nll.sum() / 6
    close(dhmbpo.model_loss(mean, agent.ensemble.log_std, targets, weights), expected, 1e-5, 1e-5)


class Means(torch.nn.Module):
    """An ensemble whose means are its inputs."""

    def __init__(self, log_std):
        super().__init__()
        self.log_std = log_std

    def forward(self, x, generator=None):
        return numbers([0.2, -1], [0.5, 0], [0.8, -0.2])[:, None].expand(3, x.shape[1], 2)


def test_holdout_score_by_hand():
    """Variance over the networks with ddof 1, plus the noise of the mean log standard deviation; rows stay rows."""
    ensemble = Means(numbers([[-0.5, 0.1]], [[-0.7, 0.3]], [[-0.6, 0.2]]))
    found = dhmbpo.holdout_scores(ensemble, torch.zeros(5_000, 4), numbers([0.4, -0.5]).expand(5_000, 2))
    assert found.shape == (5_000,)
    close(found, numbers(-0.167667284426).expand(5_000), 1e-10)


# === Model steps and rollouts ===


class Constant(torch.nn.Module):
    """An ensemble of one network with given outputs."""

    def __init__(self, mean, log_std):
        super().__init__()
        self.mean, self.log_std = mean, log_std[None, None]

    def forward(self, x, generator=None):
        return self.mean.expand(1, x.shape[1], -1)


def test_model_step_by_hand():
    """In standardised space: the reward without noise, the change of obs with it, over obs_std."""
    agent = SimpleNamespace(ensemble=Constant(numbers(0.7, -0.25, 1.1), numbers(-1, -2, -1.5)))
    agent.obs_std, agent.out_mean, agent.out_std = numbers(2, 0.5), numbers(0.3, 0.01, -0.02), numbers(1.5, 0.4, 0.2)
    obs = numbers([0.5, -1])
    next_obs, reward = dhmbpo.model_step(agent, obs, numbers([0.0]), torch.tensor([0]), numbers([0.8, -0.6]))
    close(reward, numbers(1.35))
    close(next_obs, numbers([0.4766536453, -0.6535512384]), 1e-9)
    close(numbers(1, 2) + agent.obs_std * next_obs, numbers([1.9533072906, 1.6732243808]), 1e-9)


def test_each_network_gets_one_block(agent):
    """Network k predicts block order[k], mean and noise; against one row at a time."""
    obs, actions, noise = normal(8, D), normal(8, A, seed=2).tanh(), normal(8, D, seed=3)
    next_obs, rewards = dhmbpo.model_step(agent, obs, actions, torch.tensor([2, 0, 3, 1]), noise)
    for row in range(8):
        net = (1, 3, 0, 2)[row // 2]
        x = torch.cat([obs[row], actions[row]])
        outputs = forward(agent.ensemble.layers, (0, 1.0, 0.1, 0.01), net, x)
        outputs[1:] += agent.ensemble.log_std[net, 0, 1:].exp() * noise[row]
        outputs = agent.out_mean + agent.out_std * outputs
        close(rewards[row], outputs[0], 1e-5, 1e-5)
        close(next_obs[row], obs[row] + outputs[1:] / agent.obs_std, 1e-5, 1e-5)


def test_rollout_against_a_plain_loop(agent):
    """Alive until the first termination, which is asked of raw observations; a new deal in each step."""
    starts, limit = normal(8, D), agent.obs_mean[0] + 0.5

    def high(o):
        return o[..., 0] > limit

    path = dhmbpo.rollout(agent, starts, 3, high, generator(5))
    draws, obs, alive = generator(5), starts, torch.ones(8, dtype=torch.bool)
    normal_of = functools.partial(torch.randn, generator=draws)
    deals = []
    for t in range(4):
        action, log_prob = agent.actor(obs, normal_of(8, A))
        close(path.obs[t], obs)
        close(path.actions[t], action)
        close(path.log_probs[t], log_prob)
        assert torch.equal(path.alive[t], alive)
        if t == 3:
            break
        deals.append(torch.randperm(4, generator=draws))
        obs, reward = dhmbpo.model_step(agent, obs, action, deals[-1], normal_of(8, D))
        close(path.rewards[t], reward)
        alive = alive & (agent.obs_mean + agent.obs_std * obs)[:, 0].le(limit)
    assert path.alive.float().mean(1).tolist() == sorted(path.alive.float().mean(1).tolist(), reverse=True)
    assert 0 < path.alive[-1].sum() < 8 and path.rewards.shape == (3, 8)
    assert len({tuple(deal.tolist()) for deal in deals}) > 1


def test_every_network_is_dealt_one_block_in_every_step(agent, monkeypatch):
    """TS1: orders are permutations, and all of them come up."""
    seen, step = [], dhmbpo.model_step

    def spy(agent, obs, actions, order, noise):
        seen.append(tuple(order.tolist()))
        return step(agent, obs, actions, order, noise)

    monkeypatch.setattr(dhmbpo, "model_step", spy)
    dhmbpo.rollout(agent, normal(8, D), 300, never, generator())
    assert all(sorted(order) == [0, 1, 2, 3] for order in seen)
    assert len(set(seen)) == 24


def test_no_dropout_in_rollouts_and_scores(agent, monkeypatch):
    """Only training losses see it."""
    monkeypatch.setattr(torch, "randint", None)
    dhmbpo.rollout(agent, normal(8, D), 2, never, generator())
    dhmbpo.holdout_scores(agent.ensemble, normal(5, D + A), normal(5, 1 + D))


class Line(torch.nn.Module):
    """The dynamics s' = s + a / 2 with r = -s^2 - a^2 / 10, as an ensemble of one network."""

    def __init__(self):
        super().__init__()
        self.log_std = torch.full((1, 1, 2), -math.inf, dtype=torch.float64)

    def forward(self, x, generator=None):
        obs, actions = x.split(1, -1)
        return torch.cat([-(obs**2) - 0.1 * actions**2, 0.5 * actions], -1)


class Linear(torch.nn.Module):
    """The policy tanh(theta s + 0.3 noise)."""

    def __init__(self, theta):
        super().__init__()
        self.theta = torch.nn.Parameter(numbers(theta))

    def forward(self, obs, noise):
        mean, std = self.theta * obs, numbers(0.3)
        x = mean + std * noise
        log_prob = Normal(mean, std).log_prob(x) - 2 * (math.log(2) - x - F.softplus(-2 * x))
        return torch.tanh(x), log_prob.sum(-1)


class Square(torch.nn.Module):
    """Q(s, a) = -2 s^2."""

    def forward(self, obs, actions, bounds, nets=None, generator=None):
        return -2 * obs.T.expand(5, -1) ** 2


def line_return(theta: float, horizon: int = 2) -> tuple[torch.Tensor, Linear]:
    """The actor's return from s = 1 with the noises 0.5, -1, 0.8."""
    actor = Linear(theta)
    agent = SimpleNamespace(ensemble=Line(), actor=actor, critics=Square(), sizes=[1, 1], bounds=numbers(0, 1))
    agent.log_alpha = numbers(0.1)[0].log()
    agent.obs_mean, agent.obs_std, agent.out_mean, agent.out_std = numbers(0), numbers(1), numbers(0, 0), numbers(1, 1)
    noises = iter([0.5, None, -1.0, None, 0.8])

    def given(shape, **_):
        value = next(noises)
        return torch.full(shape, 0.0 if value is None else value, dtype=torch.float64)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "randn", given)
        path = dhmbpo.rollout(agent, numbers([1.0]), horizon, never, generator())
    return -dhmbpo.actor_loss(agent, path, 0.995), actor


def test_gradient_through_the_model_by_hand():
    """The return and its derivative, which without the chain through the states would be +0.335."""
    found, actor = line_return(-0.7)
    found.backward()
    close(found, numbers(-2.045741573047)[0])
    close(actor.theta.grad, numbers(-1.10638269), 1e-8)
    ahead, behind = (line_return(-0.7 + step)[0].item() for step in (1e-5, -1e-5))
    assert actor.theta.grad.item() == pytest.approx((ahead - behind) / 2e-5, abs=1e-8)


def test_gradient_through_networks_equals_differences():
    """Every kind of the actor's parameters, in float64, with terminations on the way, against central differences."""
    args = make_args(train_horizon=3)
    agent = make_agent(args).double()
    starts = normal(8, D).double()
    limit = agent.obs_mean[0] + agent.obs_std[0]

    def high(o):
        return o[..., 0] > limit

    def loss():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "randn", functools.partial(torch.randn, dtype=torch.float64))
            path = dhmbpo.rollout(agent, starts, 3, high, generator(7))
        assert 0 < path.alive[-1].sum() < 8
        return dhmbpo.actor_loss(agent, path, args.gamma)

    loss().backward()
    for parameter in agent.actor.parameters():
        flat, gradient = parameter.data.view(-1), parameter.grad.view(-1)
        for i in gradient.abs().topk(2).indices.tolist():
            old, values = flat[i].item(), []
            for step in (1e-6, -1e-6):
                flat[i] = old + step
                values.append(loss().item())
            flat[i] = old
            assert gradient[i].item() == pytest.approx((values[0] - values[1]) / 2e-6, rel=1e-5, abs=1e-8)


# === Training of the ensemble ===

PAIRED = [  # differences, times, p by the normal distribution, new best, progress
    ((-0.3, 0.1, -0.2, -0.1, -0.4, 0.2, -0.1, -0.2), 1, 0.0372309157, True, True),
    ((-0.3, 0.1, -0.2, 0.25, -0.4, 0.35, -0.1, 0.2), 1, 0.4490598936, False, True),
    ((0.3, -0.1, 0.2, -0.25, 0.4, -0.35, 0.1, -0.2), 1, 1 - 0.4490598936, False, False),
    ((-0.3, 0.1, -0.2, 0.25, -0.4, 0.35, -0.1, 0.2), 125, 0.0630618401, True, True),
    ((-0.3, 0.1, -0.2, 0.25, -0.4, 0.35, -0.1, 0.28), 125, 0.3839357411, False, True),
]


@pytest.mark.parametrize(("differences", "times", "expected", "best", "progress"), PAIRED)
def test_paired_test_by_hand(monkeypatch, differences, times, expected, best, progress):
    """The probability, and what a training makes of it: with patience 0 it ends without progress."""
    differences = numbers(*differences).repeat(times)
    assert dhmbpo.p_value(differences) == pytest.approx(expected, abs=1e-9)
    scores, args = iter((0 * differences, differences, differences)), make_args(model_patience=0.0)
    args = dataclasses.replace(args, model_max_epochs=2 / math.log(D + 1) + 1e-6)
    monkeypatch.setattr(dhmbpo, "holdout_scores", lambda *_: next(scores))
    metrics = train(make_agent(args), make_rows(100, args), args)
    assert (metrics["model/best_epoch"] == 1) == best and (metrics["model/epochs"] == 2) == progress


def test_equal_scores_are_no_progress():
    """0 / 0: neither below 0.5 nor below 0.1."""
    assert math.isnan(dhmbpo.p_value(torch.zeros(8)))


def make_rows(size: int, args: Args, seed: int = 1) -> torch.Tensor:
    """Rows of the replay, actions in [-1, 1]."""
    rows = normal(size, 2 * D + A + 1, seed=seed)
    rows[:, D : D + A].tanh_()
    return dhmbpo.labelled(rows, generator(seed), args)


def train(agent, rows, args: Args, scale: int = 1) -> dict:
    return dhmbpo.train_model(agent, rows, scale, generator(), args, eager, quiet)


@pytest.mark.parametrize("held_out", [0, 1, 10])
def test_rows_too_few_to_divide_are_trained_on_and_tested_on(held_out):
    """Chance may hold out none of a few rows, or all; and of one there is no standard deviation."""
    args = make_args(model_batch_size=4)
    agent, rows = make_agent(args), make_rows(10, args)
    rows[:, 2 * D + A + 1] = torch.arange(10) < held_out
    before = agent.ensemble.layers[0].weight.clone()
    metrics = train(agent, rows, args)
    assert math.isfinite(metrics["model/holdout_score"]) and metrics["model/best_epoch"] > 0
    assert not torch.equal(agent.ensemble.layers[0].weight, before)


def spied(monkeypatch, name: str, record: Callable) -> list:
    """Results of record(*arguments) for each call of a function of the script."""
    calls, function = [], getattr(dhmbpo, name)

    def spy(*arguments, **named):
        calls.append(record(*arguments))
        return function(*arguments, **named)

    monkeypatch.setattr(dhmbpo, name, spy)
    return calls


GOOD, FAINT, BAD = -1.0, -0.05, 1.0  # mean differences: a new best, progress without one, none


@pytest.mark.parametrize(
    ("kinds", "epochs", "best_epoch"),
    [
        ([BAD] * 99, 3, 0),  # patience 2: stops after the third epoch without progress
        ([GOOD, BAD, BAD, BAD], 4, 1),
        ([FAINT, FAINT, BAD, BAD, FAINT, BAD, BAD, BAD], 8, 0),  # progress starts the count anew, without a best
        ([GOOD, BAD, GOOD, FAINT, BAD, BAD, BAD], 7, 3),
        ([GOOD] * 99, 8, 8),  # the cap
        ([FAINT] * 99, 8, 0),
    ],
)
def test_early_stopping_by_score_lists(monkeypatch, kinds, epochs, best_epoch):
    """Scores are compared with the best yet, not with the last; the networks of the best epoch are restored."""
    args = make_args(model_patience=2 / math.log(D + 1) + 1e-6, model_max_epochs=8 / math.log(D + 1) + 1e-6)
    agent = make_agent(args)
    noise = normal(200)
    noise = (noise - noise.mean()) / noise.std()
    best, seen, script = torch.zeros(200), [], iter([None, *kinds])

    def scores(ensemble, inputs, targets):
        nonlocal best
        seen.append(copy_of(ensemble))  # before the first epoch, and after each
        kind = next(script)
        found = best if kind is None else best + kind + noise
        best = found if kind == GOOD else best
        return found

    monkeypatch.setattr(dhmbpo, "holdout_scores", scores)
    metrics = train(agent, make_rows(60, args), args)
    assert (metrics["model/epochs"], metrics["model/best_epoch"]) == (epochs, best_epoch)
    assert metrics["model/kept_old"] == (best_epoch == 0)
    assert same(agent.ensemble.state_dict(), seen[best_epoch])
    assert not same(seen[0], seen[1]) and not any(p.requires_grad for p in agent.ensemble.parameters())


def copy_of(module: torch.nn.Module) -> dict:
    return {name: value.clone() for name, value in module.state_dict().items()}


@pytest.mark.parametrize("env_id", SIZES)
def test_patience_and_cap(env_id, monkeypatch):
    """With scores that never improve, patience ends a training; with ones that always do, the cap."""
    args, obs_dim = published(env_id, model_hidden_size=8, model_batch_size=8), SIZES[env_id][0]
    agent = dhmbpo.Agent(obs_dim, 1, args)
    rows = dhmbpo.labelled(normal(40, 2 * obs_dim + 2), generator(), args)
    monkeypatch.setattr(dhmbpo, "minimize", lambda *_: None)
    monkeypatch.setattr(dhmbpo.DynamicsEnsemble, "forward", lambda *_: torch.zeros(8, 8, 1))
    monkeypatch.setattr(dhmbpo, "model_loss", lambda *_: None)
    found = []
    for scale in (1, 5):
        for p in (0.5, 0.2):
            monkeypatch.setattr(dhmbpo, "holdout_scores", lambda *_: torch.zeros(8))
            monkeypatch.setattr(dhmbpo, "p_value", lambda _, p=p: p)
            found.append(train(agent, rows, args, scale)["model/epochs"])
    patience, cap, first_patience, first_cap = SIZES[env_id][5:]
    assert found == [patience + 1, cap, first_patience + 1, first_cap]


@pytest.mark.parametrize(
    ("rows", "per_epoch", "size"),
    [
        (1_500, 1, 1_500),
        (4_000, 1, 2_048),
        (4_096, 2, 2_048),
        (8_000, 3, 2_048),
        (12_288, 6, 2_048),
        (20_000, 6, 2_048),
    ],
)
def test_batches_of_an_epoch(monkeypatch, rows, per_epoch, size):
    """As many as the training rows hold, at most 6; drawn without replacement over epochs, then in a new order."""
    args = make_args(model_batch_size=2_048, model_patience=2.0, model_max_epochs=3.1, model_hidden_size=1)
    agent, transitions = make_agent(args), torch.zeros(rows + 10, 2 * D + A + 2 + 4)
    transitions[:, 0] = torch.arange(rows + 10)  # the row's number, as an observation
    transitions[rows:, -5] = 1  # held out
    agent.obs_mean[0], agent.obs_std[0] = 0, 1
    seen = []
    monkeypatch.setattr(dhmbpo, "minimize", lambda *_: None)
    forward = dhmbpo.DynamicsEnsemble.forward

    def spy(self, x, generator=None):
        if generator is not None:
            seen.append(x[0, :, 0])
            assert torch.equal(x[0], x[3])  # the same rows for all networks
        return forward(self, x, generator)

    monkeypatch.setattr(dhmbpo.DynamicsEnsemble, "forward", spy)
    monkeypatch.setattr(dhmbpo, "p_value", lambda _: 0.2)
    epochs = train(agent, transitions, args)["model/epochs"]
    assert len(seen) == epochs * per_epoch == 4 * per_epoch and {len(batch) for batch in seen} == {size}
    full = rows // size
    for start in range(0, len(seen) - full + 1, full):
        passed = torch.cat(seen[start : start + full])
        assert len(passed.unique()) == len(passed) and passed.max() < rows  # none twice, none that is held out
    if len(seen) > full:
        assert not torch.equal(torch.cat(seen[:full])[:size], seen[full])


@pytest.mark.parametrize(("held", "judged"), [(1_500, 1_500), (8_000, 8_000), (13_000, 12_288)])
def test_a_training_is_judged_by_held_out_rows(monkeypatch, held, judged):
    """All of them or 12,288 at random; the same ones after every epoch."""
    args = make_args(model_patience=1.0, model_hidden_size=1)
    agent, rows = make_agent(args), torch.zeros(held + 50, 2 * D + A + 2 + 4)
    rows[:, 0] = torch.arange(held + 50)
    rows[:held, -5] = 1
    agent.obs_mean[0], agent.obs_std[0] = 0, 1
    calls = spied(monkeypatch, "holdout_scores", lambda ensemble, inputs, targets: inputs[:, 0].clone())
    train(agent, rows, args)
    assert len(calls) > 2 and all(torch.equal(call, calls[0]) for call in calls)
    assert len(calls[0].unique()) == judged and calls[0].max() < held


def test_targets_and_weights_of_a_batch(monkeypatch):
    """Standardised; the reward has a noise of 0.001 for each network and row, the rest has none; weights by network."""
    args = make_args(model_batch_size=4_000, model_hidden_size=2)
    agent, rows = make_agent(args), make_rows(6_000, args)
    agent.out_std[0] = 0.01
    calls = spied(monkeypatch, "model_loss", lambda mean, log_std, targets, weights: (targets.clone(), weights.clone()))
    train(agent, rows, args)
    obs, actions, outputs, held_out, weights = agent.unpack(rows)
    standardised = ((outputs - agent.out_mean) / agent.out_std)[~held_out]
    weights = weights[~held_out]
    found, found_weights = calls[0]
    assert found.shape == (4, 4_000, 1 + D)
    match = (found[0, :, None, 1:] == standardised[None, :, 1:]).all(-1)
    index = match.float().argmax(1)
    assert match.any(1).all()
    for net in range(4):
        assert torch.equal(found[net, :, 1:], standardised[index, 1:])
        assert torch.equal(found_weights[net], weights[index, net])
        noise = 0.01 * (found[net, :, 0] - standardised[index, 0])
        assert abs(noise.std().item() / 1e-3 - 1) < 0.05 and abs(noise.mean().item()) < 1e-4
    assert not torch.equal(found[0, :, 0], found[1, :, 0])


def test_adamw_by_hand():
    """Decay besides the gradient, by layer, biases and noise too; the first step is that of the table."""
    args = make_args()
    agent = make_agent(args)
    optimizers, adamw = [], torch.optim.AdamW

    def spy(*arguments, **named):
        optimizers.append(adamw(*arguments, **named))
        return optimizers[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim, "AdamW", spy)
        train(agent, make_rows(60, args), args)
        train(agent, make_rows(60, args), args)
    assert len(optimizers) == 2  # a new one for every training
    groups = optimizers[0].param_groups
    assert [group["weight_decay"] for group in groups] == [2.5e-4, 5e-4, 7.5e-4, 1e-3, 1e-2]
    for group, layer in zip(groups, agent.ensemble.layers, strict=False):
        assert [id(p) for p in group["params"]] == [id(layer.weight), id(layer.bias)]
    assert groups[-1]["params"][0] is agent.ensemble.log_std and {group["lr"] for group in groups} == {1e-3}
    parameter = torch.nn.Parameter(torch.tensor([0.5], dtype=torch.float64))
    optimizer = adamw([{"params": [parameter], "weight_decay": 7.5e-4}], 1e-3, fused=True)
    dhmbpo.minimize(optimizer, -0.02 * parameter.sum())
    close(parameter.data, numbers(0.5009996245), 1e-9)


def test_training_learns_and_leaves_the_policy_alone():
    """The held out score falls far on linear dynamics; actor, critics, temperature are as before."""
    args = make_args(model_hidden_size=32, model_batch_size=128, model_patience=10.0, model_max_epochs=30.0)
    agent, rows = make_agent(args), normal(1_000, 2 * D + A + 1)
    rows[:, D + A + 1 :] = rows[:, :D] + 0.5 * rows[:, D : 2 * D]
    rows[:, D + A] = rows[:, 0]
    rows = dhmbpo.labelled(rows, generator(), args)
    agent.fit_statistics(rows)
    before = copy_of(agent)
    metrics = train(agent, rows, args)
    assert metrics["model/holdout_score"] < metrics["model/old_score"] - 3
    for name, value in copy_of(agent).items():
        assert torch.equal(value, before[name]) != name.startswith("ensemble"), name


# === Updates ===


def make_optimizers(agent, args: Args) -> dict:
    adam = functools.partial(torch.optim.Adam, lr=args.learning_rate)
    actor = adam([*agent.actor.parameters(), agent.log_alpha])
    return {"critics": adam(agent.critics.parameters()), "actor": actor}


def update(agent, args: Args, only_critics: bool = False, seed: int = 3) -> dict:
    starts = agent.obs_mean + agent.obs_std * normal(8, D)
    return dhmbpo.update(agent, make_optimizers(agent, args), starts, never, generators(seed), args, only_critics)


def test_an_update_against_its_parts(agent, args):
    """Bounds, critics, targets, then the actor with the new critics, by autograd and Adam's first step."""
    expected, rng = make_agent(args), generators(3)
    starts = expected.obs_mean + expected.obs_std * normal(8, D)
    path = dhmbpo.rollout(expected, expected.standardize(starts), 3, never, rng["rollout"])
    dhmbpo.track_bounds(expected, path, args)
    pair = torch.randperm(5, generator=rng["update"])[:2]
    losses, values = dhmbpo.critic_loss(expected, path, pair, args.gamma, rng["update"])
    gradients = torch.autograd.grad(losses.sum(), list(expected.critics.parameters()))

    def step(parameters, gradients):
        with torch.no_grad():
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter -= args.learning_rate * gradient / (gradient.abs() + 1e-8)

    step(expected.critics.parameters(), gradients)
    with torch.no_grad():
        for target, critic in zip(expected.target_critics.parameters(), expected.critics.parameters(), strict=True):
            target += args.tau * (critic - target)
    pi_loss, entropy = dhmbpo.actor_loss(expected, path, args.gamma), -path.log_probs[0].mean()
    parameters = list(expected.actor.parameters())
    actor_gradients = torch.autograd.grad(pi_loss, parameters)
    alpha = expected.log_alpha.exp()
    metrics = update(agent, args)
    assert metrics["losses/actor_loss"] == pytest.approx(pi_loss.item(), abs=1e-5)
    assert metrics["losses/qf_loss"] == pytest.approx(losses.mean().item(), rel=1e-5)
    assert metrics["losses/qf_values"] == pytest.approx(values.mean().item(), rel=1e-5)
    assert metrics["losses/entropy"] == pytest.approx(entropy.item(), rel=1e-5)
    assert metrics["losses/alpha_loss"] == pytest.approx((alpha * (entropy + 2)).item(), rel=1e-4)
    assert [metrics["losses/qf_low"], metrics["losses/qf_high"]] == expected.bounds.tolist()
    step(parameters, actor_gradients)
    step([expected.log_alpha], [alpha * (entropy + 2)])
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(agent.state_dict()[name], value, rtol=1e-4, atol=2e-6, msg=name)


def test_each_step_moves_its_own_networks(agent, args):
    """Critics alone: critics, targets, bounds. In full: actor and temperature too. Never: ensemble, statistics."""
    before = copy_of(agent)
    update(agent, args, only_critics=True)
    moved = {name.split(".")[0] for name, value in copy_of(agent).items() if not torch.equal(value, before[name])}
    assert moved == {"critics", "target_critics", "bounds"}
    update(agent, args)
    moved = {name.split(".")[0] for name, value in copy_of(agent).items() if not torch.equal(value, before[name])}
    assert moved == {"critics", "target_critics", "bounds", "actor", "log_alpha"}


def test_the_actors_gradient_stays_out_of_critics_and_ensemble(agent, args):
    """None of their parameters gets one, and none is computed: they are frozen."""
    path = dhmbpo.rollout(agent, normal(8, D), 3, never, generator())
    agent.zero_grad(set_to_none=True)
    dhmbpo.actor_loss(agent, path, args.gamma).backward()
    with_gradient = {name.split(".")[0] for name, p in agent.named_parameters() if p.grad is not None}
    assert with_gradient == {"actor"}
    assert all(parameter.grad.abs().sum() > 0 for parameter in agent.actor.parameters())
    path = dhmbpo.rollout(agent, normal(8, D), 3, never, generator())
    agent.zero_grad(set_to_none=True)
    dhmbpo.critic_loss(agent, path, torch.tensor([0, 1]), args.gamma, None)[0].sum().backward()
    assert {name.split(".")[0] for name, p in agent.named_parameters() if p.grad is not None} == {"critics"}


def test_only_the_drawn_targets_are_asked(agent, args):
    """The loss does not change with the others, and all pairs come up."""
    path = dhmbpo.rollout(agent, normal(8, D), 3, never, generator())
    expected = dhmbpo.critic_loss(agent, path, torch.tensor([3, 1]), args.gamma, None)[0]
    for layer in agent.target_critics.layers:
        layer.weight[[0, 2, 4]] = math.nan
    assert torch.equal(dhmbpo.critic_loss(agent, path, torch.tensor([3, 1]), args.gamma, None)[0], expected)
    pairs, rng = set(), generators()
    agent = make_agent(args)
    with pytest.MonkeyPatch.context() as patch:
        calls = spied(patch, "critic_loss", lambda agent, path, pair, *_: pairs.add(tuple(sorted(pair.tolist()))))
        for _ in range(100):
            dhmbpo.update(agent, make_optimizers(agent, args), normal(8, D), never, rng, args, True)
    assert len(calls) == 100 and len(pairs) == 10


def losses_and_gradients(bfloat16: bool) -> dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """What each network makes, its loss and the loss's gradient, by networks of the same weights and the same noise."""
    args = make_args(hidden_size=64, model_hidden_size=64, bfloat16=bfloat16)
    agent = make_agent(args)
    agent.bounds.copy_(torch.tensor([-1.0, 1.0]))  # values are the critics' last layer as it is
    path = dhmbpo.rollout(agent, normal(64, D), 3, never, generator())
    inputs, targets = normal(4, 64, D + A), normal(4, 64, 1 + D, seed=2)
    means = agent.ensemble.requires_grad_(True)(inputs, generator(3))
    values = dhmbpo.critic_loss(agent, path, torch.tensor([1, 3]), args.gamma, generator(4))
    found = {
        "ensemble": (means, dhmbpo.model_loss(means, agent.ensemble.log_std, targets, torch.ones(4, 64))),
        "critics": (values[1], values[0].sum()),
        "actor": (agent.actor.outputs(normal(64, D))[0], dhmbpo.actor_loss(agent, path, args.gamma)),
    }
    result = {}
    for name, (outputs, loss) in found.items():
        gradients = torch.autograd.grad(loss, list(getattr(agent, name).parameters()), retain_graph=True)
        assert {x.dtype for x in (outputs, loss, *gradients)} == {torch.float32}
        result[name] = outputs, loss, torch.cat([gradient.flatten() for gradient in gradients])
    return result


def test_bfloat16_is_close_to_float32():
    """Losses within 1 % or 0.02, gradients of ensemble and critics within 2 degrees and 2 %; last layers in float32.

    The actor's gradient comes through three steps of a model of random weights, which multiply the rounding.
    """
    full, low = losses_and_gradients(False), losses_and_gradients(True)
    for name, (outputs, loss, gradient) in full.items():
        low_outputs, low_loss, low_gradient = low[name]
        assert not torch.equal(low_outputs, outputs), name
        torch.testing.assert_close(low_outputs, outputs, rtol=0.03, atol=0.03 * outputs.std().item())
        degrees, share = (5, 0.05) if name == "actor" else (2, 0.02)
        assert low_loss.item() == pytest.approx(loss.item(), rel=0.01, abs=0.02), name
        assert F.cosine_similarity(low_gradient, gradient, 0) > math.cos(math.radians(degrees)), name
        assert low_gradient.norm().item() == pytest.approx(gradient.norm().item(), rel=share), name
        assert not torch.equal(low_outputs, low_outputs.bfloat16().float()), name


def test_dropout_is_in_the_critics_loss_only(monkeypatch):
    """Online critics for their own loss, with dropout; targets and the actor's critics without."""
    args = make_args(critic_dropout=0.25)
    agent = make_agent(args)
    seen, forward = [], dhmbpo.Critics.forward

    def spy(self, obs, actions, bounds, nets=None, generator=None):
        seen.append((self is agent.critics, generator is not None))
        return forward(self, obs, actions, bounds, nets, generator)

    monkeypatch.setattr(dhmbpo.Critics, "forward", spy)
    update(agent, args)
    assert seen == [(False, False), (True, True), (True, False)]


def test_distribution_rollouts_keep_raw_states_that_are_alive(monkeypatch):
    """Starts and every later state before the termination, again and again until there are enough rows."""
    args = make_args()
    agent, rb = make_agent(args), RingBuffer(100, 2 * D + A + 2 + 4, CPU)
    rb.add(make_rows(50, args))
    states = RingBuffer(1_000, D, CPU)
    limit = rb.rows[:50, 0].median()

    def high(o):
        return o[..., 0] > limit

    paths, function = [], dhmbpo.rollout

    def spy(*arguments):
        paths.append(function(*arguments))
        return paths[-1]

    monkeypatch.setattr(dhmbpo, "rollout", spy)
    share = dhmbpo.distribution_rollout(agent, rb, states, 60, high, generators(), args)
    kept = torch.cat([obs[alive] for path in paths for obs, alive in zip(path.obs, path.alive, strict=True)])
    assert len(paths) > 1 and len(kept) >= 60 and len(kept) - paths[-1].alive.sum() < 60
    close(states.newest(len(states)), agent.obs_mean + agent.obs_std * kept, 1e-6, 1e-6)
    assert share == pytest.approx(len(kept) / (len(paths) * 4 * 8)) and share < 1
    starts = {tuple(row) for row in rb.rows[:50, :D].tolist()}
    close(
        states.rows[:8],
        torch.tensor([min(starts, key=lambda s: math.dist(s, row)) for row in states.rows[:8].tolist()]),
        1e-5,
        1e-5,
    )
    assert not any(obs.requires_grad for obs in paths[0].obs)
    paths.clear()
    dhmbpo.distribution_rollout(agent, rb, states, 2_000, high, generators(), args)
    starts = agent.obs_mean + agent.obs_std * torch.cat([path.obs[0] for path in paths])
    counts = torch.bincount(torch.cdist(starts, rb.rows[:50, :D]).argmin(1), minlength=50).double()
    # uniform: chi-square of 49 degrees of freedom, whose 0.999 quantile is 85
    assert len(starts) > 300 and ((counts - counts.mean()) ** 2).sum() < 85 * counts.mean()


def test_order_and_amount_of_work_of_a_block(monkeypatch):
    """Statistics, ensemble, states, critics alone, updates with new states in between; the first has more of them."""
    published_args = args = published("Hopper-v5", target_entropy=-3.0)
    agent = dhmbpo.Agent(11, 3, args)
    rb, states = RingBuffer(100, sum(agent.sizes), CPU), RingBuffer(51_200, 11, CPU)
    rb.add(dhmbpo.labelled(normal(50, 26), generator(), args))
    log, optimizers = [], []

    def learned(agent, rows, scale, generator, args, *_):
        assert not torch.equal(agent.obs_mean, torch.zeros(11)) and len(rows) == 50
        log.append(("ensemble", scale))
        return {"model/epochs": 7}

    def visited(agent, rb, states, rows, terminated_fn, rng, args):
        log.append(("visit", rows))
        states.add(torch.full((1, 11), float(len(log))))
        return 0.5

    def updated(agent, optimizer, starts, only_critics=False, **_):
        optimizers.append(optimizer)
        assert starts.shape == (256, 11)
        log.append(("critics" if only_critics else "update", 1))
        return {"losses/qf_loss": float(len(log))}

    for name, function in (("train_model", learned), ("distribution_rollout", visited), ("update", updated)):
        monkeypatch.setattr(dhmbpo, name, function)
    for scale, per_step in ((5, 1), (1, 2), (1, 1)):
        log.clear()
        args = dataclasses.replace(published_args, updates_per_step=per_step)
        metrics = dhmbpo.learn(agent, rb, states, never, generators(), args, scale, eager, quiet)
        head = [("ensemble", scale), ("visit", 3_200)] + [("critics", 1)] * 250
        assert log == head + ([("visit", 5_120)] + [("update", 1)] * 20) * (50 * scale * per_step)
        assert metrics == {"model/epochs": 7, "model/alive_share": 0.5, "losses/qf_loss": float(len(log))}
    first, second = optimizers[0], optimizers[-1]
    assert first is not second and first["actor"].param_groups[0]["lr"] == 3e-4
    assert {id(p) for p in first["critics"].param_groups[0]["params"]} == {id(p) for p in agent.critics.parameters()}
    expected = {id(p) for p in [*agent.actor.parameters(), agent.log_alpha]}
    assert {id(p) for p in first["actor"].param_groups[0]["params"]} == expected


@pytest.mark.parametrize(("warmup", "rollouts"), [(0, [480]), (1, [12, 480]), (9, [36, 480])])
def test_states_asked_of_rollouts(monkeypatch, warmup, rollouts):
    """batch_size * rollout_frequency; for a warm-up batch_size * critic_warmup / H, a batch at least."""
    args = make_args(batch_size=12, critic_warmup=warmup, rollout_frequency=40, rollout_length=3, **{
        "updates_per_step": 1, "model_train_frequency": 1, "train_horizon": 5})  # fmt: skip
    agent, rb = make_agent(args), RingBuffer(200, 2 * D + A + 2 + 4, CPU)
    rb.add(make_rows(100, args))
    visit, rows = dhmbpo.distribution_rollout, []
    monkeypatch.setattr(dhmbpo, "distribution_rollout", lambda *a, **k: (rows.append(k["rows"]), visit(*a, **k))[1])
    metrics = dhmbpo.learn(agent, rb, RingBuffer(100, D, CPU), never, generators(), args, 1, eager, quiet)
    assert rows == rollouts and metrics["model/alive_share"] == 1


def test_more_environments_than_steps_between_blocks_are_refused(capsys):
    """Two blocks would be due at once and one be made. An evaluation has no blocks."""
    args = tiny(num_envs=9)
    with pytest.raises(SystemExit):
        dhmbpo.check_args(args)
    assert "--num-envs must be at most --model-train-frequency 8, not 9" in capsys.readouterr().err
    dhmbpo.check_args(dataclasses.replace(args, evaluate="runs/x"))


def test_a_large_replay_is_trained_on_in_part(monkeypatch):
    """A random part, without repetition; the statistics are over all."""
    args = make_args(model_rows=30)
    agent, rb = make_agent(args), RingBuffer(200, 2 * D + A + 2 + 4, CPU)
    rb.add(make_rows(100, args))
    calls = spied(monkeypatch, "train_model", lambda agent, rows, *_: rows.clone())
    states = RingBuffer(100, D, CPU)
    dhmbpo.learn(agent, rb, states, never, generators(), args, 1, eager, quiet)
    (rows,) = calls
    assert len(rows.unique(dim=0)) == 30 and {tuple(row) for row in rows.tolist()} <= {
        tuple(row) for row in rb.rows[:100].tolist()
    }
    close(agent.obs_mean, rb.rows[:100, :D].mean(0), 1e-5, 1e-6)


# === Buffer ===


@pytest.mark.parametrize("capacity", [5, 8, 100])
def test_buffer_is_a_ring(capacity):
    """The oldest rows make room, whatever the sizes of what is added."""
    buffer, added = RingBuffer(capacity, 2, CPU), []
    for size in (1, 3, 5, 2, 7, 1):
        rows = normal(size, 2, seed=len(added) + 1)
        buffer.add(rows)
        added += list(rows)
        kept = torch.stack(added[-capacity:])
        assert len(buffer) == len(kept) and torch.equal(buffer.newest(len(buffer)), kept)
    again = RingBuffer(capacity, 2, CPU)
    again.load_state_dict(buffer.state_dict())
    assert again.end == buffer.end and torch.equal(again.newest(len(again)), kept)
    sample = buffer.sample(4, 5, generator=generator())
    assert torch.equal(sample, again.sample(4, 5, generator=generator())) and sample.shape == (4, 5, 2)
    sample.zero_()
    buffer.newest(len(buffer)).zero_()
    assert torch.equal(buffer.newest(len(buffer)), kept)


def test_samples_are_uniform_over_what_is_there():
    buffer = RingBuffer(100, 1, CPU)
    buffer.add(torch.arange(10.0)[:, None])
    counts = buffer.sample(20_000, generator=generator()).flatten().long().bincount()
    assert len(counts) == 10 and (counts - 2_000).abs().max() < 200


# === Whole runs ===


def tiny(**changes) -> Args:
    """A run of three blocks, on a task whose episodes end by termination, every few steps."""
    base = {"env_id": "InvertedPendulum-v5", "cuda": False, "total_timesteps": 40, "eval_frequency": 8}
    return Args(**SMALL | base | {"eval_episodes": 2, "checkpoint_frequency": 8, "target_entropy": None} | changes)


def saved(folder: str) -> dict:
    return torch.load(f"{folder}/checkpoint.pt", weights_only=True)


def same(a, b) -> bool:
    """Whether two checkpoints' contents are bit-equal."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return a == b


def scalars(folder: str) -> dict[str, list]:
    accumulator = EventAccumulator(folder, size_guidance={"scalars": 0}).Reload()
    return {tag: [(e.step, e.value) for e in accumulator.Scalars(tag)] for tag in accumulator.Tags()["scalars"]}


def interrupt(monkeypatch, stop_at: Callable, args: Args) -> str:
    """A run that gets SIGTERM at the first safe point in a block whose text and environment step are stop_at's."""
    learn, folder = dhmbpo.learn, None

    def spy(agent, rb, *rest):
        *rest, tick = rest

        def ticking(doing):
            if stop_at(doing, rb.end):
                os.kill(os.getpid(), signal.SIGTERM)
            tick(doing)

        return learn(agent, rb, *rest, ticking)

    with monkeypatch.context() as patch:
        patch.setattr(dhmbpo, "learn", spy)
        patch.setattr(dhmbpo.time, "time", lambda: 12345)
        with pytest.raises(SystemExit) as stopped:
            dhmbpo.main(args)
    assert stopped.value.code == 128 + signal.SIGTERM
    (folder,) = (f"runs/{name}" for name in os.listdir("runs") if name.endswith("12345"))
    return folder


@pytest.mark.parametrize(
    ("step", "text", "bfloat16"),
    [
        (24, "ensemble, epoch 2", False), (32, "critics", False), (32, "update 0", False), (32, "update 7", False),
        (40, "update 1", False), (24, "ensemble, epoch 2", True), (40, "update 1", True),
    ],
)  # fmt: skip
def test_an_interrupted_block_is_learned_anew(monkeypatch, step, text, bfloat16):
    """Resumed, the run ends as the one that was not interrupted, with all of its points (blocks at episodes' ends)."""
    args = tiny(env_id="Even-v0", bfloat16=bfloat16)
    whole = dhmbpo.main(args)
    folder = interrupt(monkeypatch, lambda doing, end: end == step and doing.startswith(text), args)
    checkpoint = saved(folder)
    assert checkpoint["global_step"] == step and checkpoint["parts"]["counters"]["blocks"] == (step - 24) // 8
    dhmbpo.main(dataclasses.replace(args, resume=folder))
    assert same(saved(whole)["parts"], saved(folder)["parts"]) and same(saved(whole)["rng"], saved(folder)["rng"])
    found, expected = scalars(folder), scalars(whole)
    speeds, _ = [[at for at, _ in tags.pop("charts/SPS")] for tags in (found, expected)]
    assert speeds == [at for at in (24, 32, 40) if at != step]  # no steps were made between the resume and the block
    assert found == expected
    assert [s for s, _ in expected["eval/episodic_return"]] == [8, 16, 24, 32, 40]


KILL = """
import os, signal, sys
sys.path.insert(0, {tests!r})
import dhmbpo, test_dhmbpo
learn = dhmbpo.learn
def spy(agent, rb, *rest):
    def ticking(doing):
        if rb.end == {step} and doing.startswith({text!r}):
            os.kill(os.getpid(), signal.SIGKILL)
        rest[-1](doing)
    return learn(agent, rb, *rest[:-1], ticking)
def reset(self, **named):
    if {text!r} == "between" and {step} == dhmbpo_steps[0]:
        os.kill(os.getpid(), signal.SIGKILL)
    return function(self, **named)
dhmbpo_steps, function, step = [-1], test_dhmbpo.Even.reset, test_dhmbpo.Even.step
def count(self, action):
    dhmbpo_steps[0] += 1
    return step(self, action)
test_dhmbpo.Even.reset, test_dhmbpo.Even.step, dhmbpo.learn = reset, count, spy  # -1: a step is rehearsed
dhmbpo.main(test_dhmbpo.tiny(env_id="Even-v0", eval_frequency={evaluation}))
"""


@pytest.mark.parametrize(
    ("step", "text", "resumed_at"),
    [(32, "update 5", 24), (24, "ensemble, epoch 3", 16), (40, "ensemble, epoch 1", 32), (28, "between", 24)],
)
def test_killed_at_once(step, text, resumed_at):
    """SIGKILL in a training, in a block, between blocks: the run goes on from its last checkpoint, to the same end."""
    args = tiny(env_id="Even-v0", eval_frequency=8 if text != "between" else 0)
    tests = os.path.dirname(__file__)
    source = KILL.format(tests=tests, step=step, text=text, evaluation=args.eval_frequency)
    env = os.environ | {"PYTHONPATH": os.path.dirname(tests)}
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, env=env, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    (folder,) = (f"runs/{name}" for name in os.listdir("runs"))
    assert saved(folder)["global_step"] == resumed_at
    time.sleep(1)  # event files of one second are read in the order of their process numbers, and this one is the lower
    dhmbpo.main(dataclasses.replace(args, resume=folder))
    whole = dhmbpo.main(dataclasses.replace(args, exp_name="whole"))
    assert same(saved(whole)["parts"], saved(folder)["parts"]) and same(saved(whole)["rng"], saved(folder)["rng"])
    assert {tag: points for tag, points in scalars(folder).items() if tag != "charts/SPS"} == {
        tag: points for tag, points in scalars(whole).items() if tag != "charts/SPS"
    }


def test_an_interrupted_evaluation_is_made_up_for(monkeypatch):
    """SIGTERM while the policy is evaluated: the resumed run evaluates it first, and ends as if nothing had been."""
    args = tiny(env_id="Even-v0")
    whole = dhmbpo.main(args)
    evaluate, calls = dhmbpo.evaluate, []

    def spy(*arguments):
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(dhmbpo, "evaluate", spy)
        patch.setattr(dhmbpo.time, "time", lambda: 12345)
        with pytest.raises(SystemExit):
            dhmbpo.main(args)
    (folder,) = (f"runs/{name}" for name in os.listdir("runs") if name.endswith("12345"))
    assert saved(folder)["global_step"] == 24
    dhmbpo.main(dataclasses.replace(args, resume=folder))
    assert scalars(folder)["eval/episodic_return"] == scalars(whole)["eval/episodic_return"]
    assert same(saved(whole)["parts"], saved(folder)["parts"])


@pytest.fixture(scope="module")
def played(tmp_path_factory):
    """A run with two environments, its folder and what its blocks were given."""
    calls, learn = [], dhmbpo.learn
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("played"))

        def spy(agent, rb, states, terminated_fn, rng, args, scale, *rest):
            metrics = learn(agent, rb, states, terminated_fn, rng, args, scale, *rest)
            statistics = agent.obs_mean.clone(), agent.obs_std.clone()
            calls.append((rb.end, scale, rb.rows[: rb.end].clone(), statistics, len(states)))
            return metrics

        patch.setattr(dhmbpo, "learn", spy)
        folder = dhmbpo.main(tiny(num_envs=2, total_timesteps=48, save_model=True))
        yield os.path.abspath(folder), calls


def test_what_is_played_is_what_is_stored(monkeypatch):
    """Each row is obs, action, reward, next obs of one step; random actions, then the policy's samples; own seeds."""
    steps, seeds, sampled, act = [], [], [], dhmbpo.act

    class Recorded(Even):
        def reset(self, *, seed=None, options=None):
            seeds.append(seed)
            return super().reset(seed=seed)

        def step(self, action):
            before, (obs, reward, *rest) = self.point, super().step(action)
            steps.append([*before, *action / 2, reward, *obs])
            return obs, reward, *rest

    def spy(agent, obs, device, generator):
        before = generator.get_state()
        sampled.append(act(agent, obs, device, generator))
        after = generator.get_state()
        generator.set_state(before)
        assert np.array_equal(act(agent, obs, device, generator), sampled[-1]) and not torch.equal(before, after)
        assert generator.initial_seed() == 10 and not np.array_equal(act(agent, obs, device, None), sampled[-1])
        generator.set_state(after)
        return sampled[-1]

    gym.register("Recorded-v0", entry_point=Recorded)
    monkeypatch.setitem(dhmbpo.TERMINATIONS, "Recorded", dhmbpo.never_terminates)
    monkeypatch.setattr(dhmbpo, "act", spy)
    folder = dhmbpo.main(tiny(env_id="Recorded-v0", total_timesteps=40, eval_frequency=0, num_envs=1))
    rows = saved(folder)["parts"]["replay"]["rows"][:, : 2 * D + A + 1]
    close(rows, torch.tensor(np.array(steps[-40:]), dtype=torch.float32), 1e-6, 1e-6)
    actions = rows[:, D : D + A]
    random = np.random.default_rng([1, 1]).uniform(-1, 1, (24, A)).astype(np.float32)
    close(actions, torch.from_numpy(np.concatenate([random, *sampled])), 1e-6, 1e-6)
    generator = np.random.default_rng([1, 0])
    assert seeds[-10:] == [int(generator.integers(2**31, size=1)[0]) for _ in range(10)]


def test_schedule_of_the_blocks(played):
    """Right after the random steps, scaled, and then every model_train_frequency steps, the last step included."""
    assert [(end, scale) for end, scale, *_ in played[1]] == [(24, 2), (32, 1), (40, 1), (48, 1)]


def test_statistics_and_labels_belong_to_the_replay(played):
    """Statistics are those of all rows; labels and weights of old rows never change and are in the checkpoint."""
    folder, calls = played
    for end, _, rows, (mean, std), _ in calls:
        close(mean, rows[:, :4].double().mean(0).float(), 1e-5, 1e-6)
        close(std, rows[:, :4].double().std(0, correction=0).clamp(min=1e-4).float(), 1e-4, 1e-6)
        assert torch.equal(rows, calls[-1][2][:end])
    parts = saved(folder)["parts"]
    assert torch.equal(parts["replay"]["rows"], calls[-1][2]) and parts["replay"]["end"] == 48
    assert torch.equal(parts["agent"]["obs_mean"], calls[-1][3][0])
    assert len(set(parts["replay"]["rows"][:, -5].tolist())) == 2


def test_states_are_never_emptied(played):
    """They are a ring over the blocks, of batch_size * rollout_frequency * rollout_retain rows."""
    assert [states for *_, states in played[1]] == [32] * 4
    assert saved(played[0])["parts"]["states"]["end"] > 4 * 32


def test_what_is_logged(played):
    """Every metric of docs/dhmbpo.md, finite, at the steps of the blocks."""
    folder, _ = played
    found = scalars(folder)
    names = "qf_loss qf_values qf_low qf_high actor_loss alpha_loss alpha entropy".split()
    expected = {f"losses/{name}" for name in names}
    names = "epochs best_epoch holdout_score old_score kept_old noise alive_share".split()
    expected |= {f"model/{name}" for name in names}
    assert {tag for tag in found if tag.startswith(("losses/", "model/"))} == expected
    for tag in expected:
        assert [step for step, _ in found[tag]] == [24, 32, 40, 48]
        assert all(math.isfinite(value) for _, value in found[tag])
        with open(f"{os.path.dirname(os.path.dirname(__file__))}/docs/dhmbpo.md") as file:
            assert f"`{tag}`" in file.read()
    curves = {f"open_loop/{what}_error_{k}" for what in ("obs", "reward") for k in (1, 2)}
    assert curves < {tag for tag in found if tag.startswith("open_loop/")}
    assert all([step for step, _ in found[tag]] == [24, 32, 40, 48] for tag in curves)  # not before it has learned
    assert "eval/walks" not in found and [step for step, _ in found["eval/episodic_return"]] == [8, 16, 24, 32, 40, 48]
    assert torch.load(f"{folder}/dhmbpo.pt", weights_only=True).keys() == saved(folder)["parts"]["agent"].keys()


def test_evaluations_do_not_change_the_training():
    first = dhmbpo.main(tiny(exp_name="first"))
    second = dhmbpo.main(tiny(exp_name="second", eval_frequency=0))
    a, b = saved(first)["parts"], saved(second)["parts"]
    assert same(a["agent"], b["agent"]) and same(a["replay"], b["replay"])
    other = dhmbpo.main(tiny(exp_name="other", eval_frequency=0, seed=2))
    assert not same(b["agent"], saved(other)["parts"]["agent"])


def test_resume_without_the_buffer():
    """The policy fills it, no random steps; then one block with the networks of before, no second first block."""
    args = tiny(save_buffer=False, eval_frequency=0)
    folder = dhmbpo.main(args)
    calls, prefill = [], saved(folder)["rng"]["prefill"]
    learn = dhmbpo.learn

    def spy(agent, rb, states, terminated_fn, rng, args, scale, *rest):
        calls.append((rb.end, scale, len(states)))
        return learn(agent, rb, states, terminated_fn, rng, args, scale, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dhmbpo, "learn", spy)
        dhmbpo.main(dataclasses.replace(args, resume=folder, total_timesteps=76))
    assert calls == [(24, 1, 0), (32, 1, 32)] and "replay" not in saved(folder)["parts"]
    assert saved(folder)["rng"]["prefill"] == prefill


def test_the_policy_acts_on_standardised_observations(agent):
    """Sampled with a generator, the mode without."""
    obs = normal(6, D).numpy()
    standardised = agent.standardize(torch.from_numpy(obs))
    close(torch.from_numpy(dhmbpo.act(agent, obs, CPU, None)), agent.actor.mode(standardised).detach(), 1e-6, 1e-6)
    expected = agent.actor(standardised, normal(6, A, seed=4))[0].detach()
    close(torch.from_numpy(dhmbpo.act(agent, obs, CPU, generator(4))), expected, 1e-6, 1e-6)


# === Evaluation ===


def test_walking():
    """9 of 10 episodes have to last and to be fast; one that falls does not count; nothing without a velocity."""
    full, speeds = np.array([True] * 10), np.full(10, 0.6)
    found = dhmbpo.walking_metrics(full, speeds)
    assert found == pytest.approx({"eval/x_velocity": 0.6, "eval/full_length_share": 1.0, "eval/walks": 1.0})
    full[0] = False
    assert dhmbpo.walking_metrics(full, speeds)["eval/walks"] == 1
    speeds[0] = 0.4
    assert dhmbpo.walking_metrics(full, speeds)["eval/walks"] == 1
    speeds[1] = 0.49
    found = dhmbpo.walking_metrics(full, speeds)
    assert found["eval/walks"] == 0 and found["eval/full_length_share"] == pytest.approx(0.9)
    full[1], speeds[:] = False, 5.0
    assert dhmbpo.walking_metrics(full, speeds)["eval/walks"] == 0  # two fall, however fast
    assert dhmbpo.walking_metrics(full, np.full(10, np.nan)) == {} == dhmbpo.walking_metrics(full[:0], speeds[:0])


@pytest.mark.parametrize("num_envs", [1, 2])
def test_evaluation_against_a_plain_loop(num_envs):
    """Returns, whole episodes and mean velocities of the policy's mode, on seeds of its own."""
    args = make_args(env_id="Even-v0", eval_episodes=3)
    agent, stop = make_agent(args), SimpleNamespace(requested=0)
    envs = gym.vector.SyncVectorEnv(
        [dhmbpo.make_env(args)] * num_envs, autoreset_mode=gym.vector.AutoresetMode.DISABLED
    )
    returns, full_length, speeds, episodes = dhmbpo.evaluate(agent, envs, args, CPU, stop)
    expected, env, seeds = [], dhmbpo.make_env(args)(), np.random.default_rng([args.seed, 99])
    drawn = [seeds.integers(2**31, size=num_envs) for _ in range(3)]
    for seed in np.concatenate(drawn)[:3].tolist():
        obs, _ = env.reset(seed=seed)
        done, rewards, velocities, rows = False, [], [], []
        while not done:
            action = dhmbpo.act(agent, obs[None], CPU, None)[0]
            next_obs, reward, terminated, truncated, info = env.step(action)
            rewards.append(reward)
            velocities.append(info["x_velocity"])
            rows.append([*obs, *action, reward, *next_obs])
            obs, done = next_obs, terminated or truncated
        expected.append((sum(rewards), np.mean(velocities), np.array(rows)))
    found = sorted(zip(returns, speeds, episodes, strict=True), key=lambda episode: episode[0])
    for one, other in zip(found, sorted(expected, key=lambda episode: episode[0]), strict=True):
        np.testing.assert_allclose(one[:2], other[:2], rtol=1e-5)
        np.testing.assert_allclose(one[2], other[2], rtol=1e-5, atol=1e-6)
    assert full_length.tolist() == [True] * 3


def test_an_episode_that_falls_is_not_of_full_length():
    args = make_args(env_id="InvertedPendulum-v5", eval_episodes=2)
    envs = dhmbpo.make_vector_env(args, 1)
    returns, full_length, speeds, _ = dhmbpo.evaluate(
        make_agent(args, 4, 1), envs, args, CPU, SimpleNamespace(requested=0)
    )
    assert (returns < 1_000).all() and full_length.tolist() == [False] * 2 and np.isnan(speeds).all()


class Fall(Even):
    """Falls where the time limit comes, with a velocity that may be none."""

    def step(self, action):
        obs, reward, _, truncated, _ = super().step(action)
        return obs, reward, truncated, truncated, {"x_velocity": self.velocity}


gym.register("Fall-v0", entry_point=Fall)


@pytest.mark.parametrize(
    ("velocity", "told"), [(np.array([1.0, 2.0]), False), ("fast", False), (math.inf, False), (3, True)]
)
def test_a_fall_at_the_limit_and_velocities_that_are_none(monkeypatch, velocity, told):
    """It is not of full length; a velocity that is no finite number is not logged, and ends no run."""
    monkeypatch.setattr(Fall, "velocity", velocity, raising=False)
    args = make_args(env_id="Fall-v0", eval_episodes=2)
    envs = dhmbpo.make_vector_env(args, 1)
    _, full, speeds, _ = dhmbpo.evaluate(make_agent(args), envs, args, CPU, SimpleNamespace(requested=0))
    expected = {"eval/x_velocity": 3.0, "eval/full_length_share": 0.0, "eval/walks": 0.0} if told else {}
    assert full.tolist() == [False] * 2 and dhmbpo.walking_metrics(full, speeds) == expected


def test_open_loop_errors_against_a_plain_loop(agent):
    """Mean predictions of each network, fed back; 25 steps, one stretch behind the other, too short episodes left out.

    Observations in standard deviations of the replay's, rewards plain.
    """
    episodes = [normal(length, 2 * D + A + 1, seed=length).numpy() for length in (60, 24, 25)]
    squares, misses = [[] for _ in range(25)], [[] for _ in range(25)]
    for rows in (episodes[0][:25], episodes[0][25:50], episodes[2]):
        for i in range(len(agent.ensemble.log_std)):
            predicted = torch.from_numpy(rows[0, :D])
            for k, row in enumerate(torch.from_numpy(rows)):
                x = torch.cat([(predicted - agent.obs_mean) / agent.obs_std, row[D : D + A]])
                outputs = agent.ensemble(x.expand(len(agent.ensemble.log_std), 1, -1))[i, 0]
                outputs = agent.out_mean + agent.out_std * outputs
                predicted = predicted + outputs[1:]
                squares[k] += (((predicted - row[D + A + 1 :]) / agent.obs_std) ** 2).tolist()
                misses[k].append(abs(outputs[0] - row[D + A]).item())
    expected = {f"open_loop/obs_error_{k}": math.sqrt(np.mean(column)) for k, column in enumerate(squares, 1)}
    expected |= {f"open_loop/reward_error_{k}": np.mean(column) for k, column in enumerate(misses, 1)}
    logged = {}
    run = SimpleNamespace(device=CPU, log=logged.update)
    dhmbpo.log_open_loop(agent, episodes, run)
    assert logged == pytest.approx(expected, rel=1e-3)
    logged.clear()
    dhmbpo.log_open_loop(agent, [rows[:7] for rows in episodes[:1]] + [episodes[1][:9]], run)
    assert len(logged) == 18  # as many steps as the longest episode has


def test_evaluating_a_run_folder(capsys):
    """Returns, and how it walks where there is a velocity; of a run in bfloat16 on a machine that need not have it."""
    folder = dhmbpo.main(tiny(env_id="Even-v0", bfloat16=True))
    capsys.readouterr()
    assert dhmbpo.main(dataclasses.replace(tiny(env_id="Even-v0"), evaluate=folder, target_entropy=-2.0)) == folder
    said = capsys.readouterr().out
    assert "Even-v0 at step 40:" in said and "eval/x_velocity" in said and "eval/walks 0.00" in said


# === Environments ===


@pytest.mark.parametrize("env_id", [*SIZES, "InvertedDoublePendulum-v5", "Swimmer-v5"])
def test_terminations_are_those_of_the_environment(env_id):
    """At every one of 1,000 random steps, as the training compares them."""
    args = published(env_id)
    env = dhmbpo.make_env(args)()
    terminated_fn = dhmbpo.termination_function(env_id, env.observation_space.shape[0])
    rng, (obs, _) = np.random.default_rng(1), env.reset(seed=1)
    ends = 0
    for _ in range(1_000):
        obs, _, terminated, truncated, _ = env.step(rng.uniform(-1, 1, env.action_space.shape).astype(np.float32))
        assert terminated_fn(torch.from_numpy(obs)[None]).item() == terminated
        ends += terminated
        if terminated or truncated:
            obs, _ = env.reset(seed=int(rng.integers(1000)))
    assert (ends > 0) == (env_id not in ("HalfCheetah-v5", "Swimmer-v5"))


def test_a_wrong_rule_stops_the_run(monkeypatch):
    """Not at the first termination that it does not know, but at the third."""
    monkeypatch.setitem(dhmbpo.TERMINATIONS, "InvertedPendulum", dhmbpo.never_terminates)
    with pytest.raises(SystemExit, match="is not the environment's .3 disagreements, 3 terminations"):
        dhmbpo.main(tiny(total_timesteps=100, learning_starts=100, eval_frequency=0))


def test_walker_without_its_clip():
    """Positions but the first, and true velocities, some of them beyond 10; Hopper's are left as they are."""
    env, rng = dhmbpo.make_env(published("Walker2d-v5"))(), np.random.default_rng(1)
    env.reset(seed=1)
    largest = 0.0
    for _ in range(50):
        obs, _, terminated, *_ = env.step(rng.uniform(-1, 1, 6).astype(np.float32))
        data = env.unwrapped.data
        assert obs.dtype == np.float32
        close(torch.from_numpy(obs), torch.from_numpy(np.concatenate([data.qpos[1:], data.qvel])).float(), 1e-6, 1e-6)
        largest = max(largest, np.abs(obs[8:]).max())
        if terminated:
            env.reset(seed=2)
    assert largest > 10
    assert not isinstance(dhmbpo.make_env(published("Hopper-v5"))().env.env.env, dhmbpo.Unclipped)


def test_unknown_terminations_are_refused(capsys, monkeypatch):
    """And a task that is hopeless; one whose name is Walker2d by chance has no MuJoCo data to be asked for."""
    for env_id, message in (("MountainCarContinuous-v0", "TERMINATIONS"), ("Humanoid-v4", "376 observations")):
        with pytest.raises(SystemExit):
            dhmbpo.main(Args(env_id=env_id))
        assert message in capsys.readouterr().err
    monkeypatch.setattr(dhmbpo, "make_gymnasium", lambda *_, **__: gym.make("Pendulum-v1"))
    assert dhmbpo.make_env(published("mine:Walker2d-v0"))().reset(seed=1)[0].shape == (3,)


def test_dm_control_by_name():
    """Observations as float32 vectors, 1,000 steps without a termination; by Shimmy's name of the task, too."""
    pytest.importorskip("dm_control", reason="dm_control is not installed.")
    env = dhmbpo.make_env(published("dm_control/cartpole-swingup-v0"))()
    obs, _ = env.reset(seed=1)
    assert obs.dtype == np.float32 and dhmbpo.termination_function("cartpole-swingup", 5) is dhmbpo.never_terminates


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_nets": 1}, "--num-nets must be at least 2"),
        ({"batch_size": 250}, "--batch-size 250 cannot be dealt"),
        ({"gamma": 1.0}, "--gamma must be below 1"),
        ({"num_targets": 6}, "--num-targets must be at most 5"),
        ({"value_quantile": 0.5}, "--value-quantile must be below 0.5"),
        ({"buffer_size": 4_000}, "--buffer-size 4000 does not hold"),
        ({"holdout_ratio": 0.0}, "--holdout-ratio 0.0 leaves nothing"),
        ({"initial_alpha": 0.0}, "--initial-alpha must be at least"),
        ({"train_horizon": 0}, "--train-horizon must be at least 1"),
        ({"holdout_rows": 1}, "--holdout-rows must be at least 2"),
        ({"tau": 0.0}, "--tau must be at least"),
        ({"cudagraphs": True}, "--cudagraphs needs a GPU"),
    ],
)
def test_impossible_settings_are_refused(capsys, monkeypatch, changes, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        dhmbpo.main(Args(**changes))
    assert message in capsys.readouterr().err


@pytest.mark.skipif(not torch.cuda.is_available(), reason="There is no GPU on this machine.")
def test_whole_runs_on_a_gpu():
    """Finite metrics at all blocks, the same with CUDA graphs, and an update in which the host waits for nothing."""
    dhmbpo.main(tiny(cuda=True, cudagraphs=True, bfloat16=True))
    blocks = [scalars(dhmbpo.main(tiny(cuda=True, cudagraphs=graphs)))["losses/qf_loss"] for graphs in (False, True)]
    assert [step for step, _ in blocks[0]] == [24, 32, 40]
    torch.testing.assert_close(torch.tensor(blocks[1]), torch.tensor(blocks[0]), rtol=1e-3, atol=1e-3)
    args, device = make_args(), torch.device("cuda")
    agent = make_agent(args).to(device)
    rng = {name: torch.Generator(device).manual_seed(1) for name in generators()}
    optimizers, starts = make_optimizers(agent, args), torch.randn(8, D, device=device)
    dhmbpo.update(agent, optimizers, starts, never, rng, args)
    torch.cuda.set_sync_debug_mode("error")
    try:
        dhmbpo.update(agent, optimizers, starts, never, rng, args)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.slow
def test_learns():
    """InvertedPendulum is balanced for all of its 1,000 steps at 3,000 steps, and was at 2,500."""
    small = {"model_batch_size": 512, "model_patience": 25.0, "model_max_epochs": 125.0, "holdout_rows": 4_096}
    folder = dhmbpo.main(Args(env_id="InvertedPendulum-v5", total_timesteps=3_000, eval_frequency=500, **small))
    assert min(value for _, value in scalars(folder)["eval/episodic_return"][-2:]) > 950
