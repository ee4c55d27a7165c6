"""Numbers of dhmbpo.py: each piece against hand-worked tables, plain loops from the equations, or the simulator."""

import copy
import dataclasses
import functools
import math
import os
import signal
from collections.abc import Callable
from types import SimpleNamespace

import fake_envs
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


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path, monkeypatch):
    """Where runs, and MuJoCo with its warnings, may write."""
    monkeypatch.chdir(tmp_path)


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
dhmbpo.TERMINATIONS["Even"] = dhmbpo.never


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


# === Layers and networks ===

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
    actor = dhmbpo.Actor(1, 2, 4).double()
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


def test_statistics_are_summed_in_float64():
    """A mean far from 0 does not eat the variance."""
    agent = dhmbpo.Agent(1, 1, make_args())
    obs = 1000 + normal(5_000, 1)
    agent.fit_statistics(torch.cat([obs, torch.zeros(5_000, 2), obs, torch.zeros(5_000, 5)], 1))
    expected = obs.double().numpy()
    close(agent.obs_std, torch.tensor([expected.std()], dtype=torch.float32), 1e-6)


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


def test_bounds_by_hand():
    """The first call sets them, later ones move them by the learning rate; terminated entries count."""
    agent = SimpleNamespace(bounds=numbers(math.nan, math.nan), log_alpha=numbers(0.1)[0].log())
    args = published("Hopper-v5")
    alive = torch.zeros(4, 2, dtype=torch.bool)
    path = path_of(numbers(1, 2, -0.5)[:, None].expand(3, 2), numbers(-1.2, 8.8, 0.7, 5)[:, None].expand(4, 2), alive)
    dhmbpo.track_bounds(agent, path, args)  # r - alpha log pi = 1.12, 1.12, -0.57
    close(agent.bounds, numbers(-0.57, 1.12) * 200, 1e-9)

    def track(values):
        rewards = torch.tensor(values, dtype=torch.float64).reshape(2, 5)
        zeros = torch.zeros(3, 5, dtype=torch.float64)
        dhmbpo.track_bounds(agent, path_of(rewards, zeros, zeros.bool()), args)

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
    """The policy tanh(theta s + 0.3 noise), whose log-probability is 0 (no entropy in the numbers below)."""

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
    ("step", "text"), [(24, "ensemble, epoch 2"), (32, "critics"), (32, "update 0"), (32, "update 7"), (40, "update 1")]
)
def test_an_interrupted_block_is_learned_anew(monkeypatch, step, text):
    """Resumed, the run ends as the one that was not interrupted, with all of its points (blocks at episodes' ends)."""
    args = tiny(env_id="Even-v0")
    whole = dhmbpo.main(args)
    folder = interrupt(monkeypatch, lambda doing, end: end == step and doing.startswith(text), args)
    checkpoint = saved(folder)
    assert checkpoint["global_step"] == step and checkpoint["parts"]["counters"]["blocks"] == (step - 24) // 8
    dhmbpo.main(dataclasses.replace(args, resume=folder))
    assert same(saved(whole)["parts"], saved(folder)["parts"]) and same(saved(whole)["rng"], saved(folder)["rng"])
    found, expected = scalars(folder), scalars(whole)
    del found["charts/SPS"], expected["charts/SPS"]
    assert found == expected
    assert [s for s, _ in expected["eval/episodic_return"]] == [8, 16, 24, 32, 40]
