"""Numbers of mbpo.py: each piece against plain loops from the equations, torch.distributions, or the simulator."""

import contextlib
import dataclasses
import functools
import math
import os
import re
import shutil
import signal
from collections import deque
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import fake_envs
import gymnasium as gym
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from runs import TWO_ENVS, assert_healthy, differences, load, resume, run, scalars, tiny
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.distributions import Normal, TransformedDistribution
from torch.distributions.transforms import TanhTransform

import mbpo
from mbpo import Args, ReplayBuffer

CPU = torch.device("cpu")
D, A = 3, 2  # numbers of observations and actions, unless a test says otherwise
ROW = 2 * D + A + 2  # numbers of a transition
LOSSES = mbpo.critic_loss, mbpo.actor_loss
SMALL = {"num_nets": 5, "num_elites": 3, "model_hidden_size": 8, "hidden_size": 8, "model_batch_size": 16}
SMALL |= {"learning_starts": 24, "target_entropy": -1.5, "model_max_epochs": 3}


def make_args(**changes) -> Args:
    return mbpo.with_task_defaults(Args(**SMALL | changes))


def published(env_id: str, **changes) -> Args:
    """The settings of a task as a user gets them."""
    return mbpo.with_task_defaults(Args(env_id=env_id, **changes))


def generator(seed: int = 1) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, generator=generator(seed))


@pytest.fixture
def args():
    return make_args()


@pytest.fixture
def agent(args):
    return make_agent(args)


def make_agent(args: Args, obs_dim: int = D, action_dim: int = A, seed: int = 1):
    """Biases, bounds, normaliser, targets and temperature are moved off their round initial values."""
    torch.manual_seed(seed)
    agent = mbpo.Agent(obs_dim, action_dim, args)
    with torch.no_grad():
        for parameter in agent.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        agent.ensemble.input_mean.normal_()
        agent.ensemble.input_std.uniform_(0.5, 2)
        agent.ensemble.elites.copy_(torch.randperm(args.num_nets)[: args.num_elites])
    return agent


def make_batch(size: int, seed: int = 1) -> torch.Tensor:
    """Rows (size, 2 D + A + 2): actions in [-1, 1], every third row terminated."""
    rows = normal(size, 2 * D + A + 2, seed=seed)
    rows[:, D : D + A].tanh_()
    rows[:, -1] = (torch.arange(size) % 3 == 0).float()
    return rows


def count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def forward(ensemble, net: int, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and log-variance (1 + D) of one network for one input (D + A)."""
    h = (x - ensemble.input_mean) / ensemble.input_std
    for i, layer in enumerate(ensemble.layers):
        h = h @ layer.weight[net] + layer.bias[net, 0]
        h = h * torch.sigmoid(h) if i < 4 else h
    mean, logvar = h[: len(h) // 2], h[len(h) // 2 :]
    logvar = ensemble.max_logvar - torch.log1p(torch.exp(ensemble.max_logvar - logvar))
    return mean, ensemble.min_logvar + torch.log1p(torch.exp(logvar - ensemble.min_logvar))


def policy(actor, obs: torch.Tensor, noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """One action (A) and its log-probability, by torch.distributions."""
    mean, log_std = actor.net(obs).split(len(noise))
    std = log_std.clamp(-20, 2).exp()
    distribution = TransformedDistribution(Normal(mean, std), TanhTransform(cache_size=1))
    action = torch.tanh(mean + std * noise)
    return action, distribution.log_prob(action).sum()


def value(critics, net: int, obs: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
    h = torch.cat([obs, action])
    for i, layer in enumerate(critics.layers):
        h = h @ layer.weight[net] + layer.bias[net, 0]
        h = h.clamp(min=0) if i < 2 else h
    return h[0]


# === Sizes and initial values ===

SIZES = {
    "InvertedPendulum-v5": (4, 1, 123_810, 866_680, 67_586, 67_585, 337_926),
    "Hopper-v5": (11, 3, 128_424, 898_992, 70_406, 69_889, 349_962),
    "HalfCheetah-v5": (17, 6, 132_636, 928_488, 73_484, 72_193, 362_256),
    "Ant-v5": (27, 8, 139_056, 973_448, 77_072, 75_265, 378_132),
    "Humanoid-v5": (45, 17, 543_292, 3_803_136, 86_306, 82_177, 415_014),
}


@pytest.mark.parametrize("env_id", SIZES)
def test_parameter_counts(env_id):
    """Those of the official networks: one net, the ensemble with its bounds, actor, critic, all of SAC."""
    obs_dim, action_dim, net, ensemble, actor, critic, everything = SIZES[env_id]
    settings = published(env_id)
    agent = mbpo.Agent(obs_dim, action_dim, settings)
    envs = mbpo.make_vector_env(settings, 1)
    assert (envs.single_observation_space.shape, envs.single_action_space.shape) == ((obs_dim,), (action_dim,))
    envs.close()
    assert (count(agent.ensemble) - 2 * (obs_dim + 1)) / 7 == net and count(agent.ensemble) == ensemble
    assert count(agent.actor) == actor and count(agent.critics) / 2 == critic
    assert count(agent.actor) + count(agent.critics) + count(agent.target_critics) == everything


def test_initial_weights_are_truncated_normal():
    """Never beyond 2 sigma, nothing piled up there, standard deviation 0.8796 sigma; nets differ; biases are 0."""
    ensemble = mbpo.Agent(D, A, published("Hopper-v5")).ensemble
    for layer in ensemble.layers:
        weight = layer.weight.detach()
        sigma = 1 / (2 * math.sqrt(weight.shape[1]))
        size = weight.abs() / sigma
        assert size.max() <= 2 + 1e-6 and (size > 2 - 1e-5).float().mean() < 1e-3
        assert weight.std().item() == pytest.approx(0.8796 * sigma, rel=0.05 if weight.numel() < 10**5 else 0.01)
        assert weight.mean().abs() < 0.1 * sigma and (layer.bias == 0).all()
        assert len(weight.flatten(1).unique(dim=0)) == 7
    assert (ensemble.max_logvar == 0.5).all() and (ensemble.min_logvar == -10).all()


def test_initial_policy():
    """Glorot uniform weights, zero biases, targets equal to the critics, alpha 1."""
    agent = mbpo.Agent(D, A, published("Hopper-v5"))
    weights = [(layer.weight, layer.bias) for layer in (*agent.actor.net[::2], *agent.critics.layers)]
    for weight, bias in weights:
        bound = math.sqrt(6 / sum(weight.shape[-2:]))
        assert weight.abs().max() <= bound and weight.abs().max() > 0.95 * bound and (bias == 0).all()
    assert not torch.equal(*agent.critics.layers[0].weight)
    for live, target in zip(agent.critics.parameters(), agent.target_critics.parameters(), strict=True):
        assert torch.equal(live, target) and live.data_ptr() != target.data_ptr() and not target.requires_grad
    assert agent.log_alpha.exp() == 1


# === Ensemble ===


def test_ensemble_equals_its_networks_one_by_one(agent):
    """One batched product, each network with its own inputs; or those asked for, in their order."""
    inputs = normal(5, 4, D + A)
    mean, logvar = agent.ensemble(inputs)
    some = torch.tensor([3, 0, 3])
    some_mean, some_logvar = agent.ensemble(inputs[:3], some)
    for e, b in np.ndindex(5, 4):
        for got, expected in zip((mean, logvar), forward(agent.ensemble, e, inputs[e, b]), strict=True):
            torch.testing.assert_close(got[e, b], expected)
    for i, e in enumerate(some.tolist()):
        alone = [forward(agent.ensemble, e, x) for x in inputs[i]]
        torch.testing.assert_close(some_mean[i], torch.stack([mean for mean, _ in alone]))
        torch.testing.assert_close(some_logvar[i], torch.stack([logvar for _, logvar in alone]))


def test_soft_clamp_of_the_log_variance(args):
    """max - softplus(max - x), then min + softplus(x - min): close to x between the bounds, beyond it one of them."""
    ensemble = mbpo.Agent(D, A, args).ensemble
    with torch.no_grad():
        ensemble.layers[-1].weight.zero_()
        ensemble.max_logvar.copy_(torch.tensor([0.5, 1.0, -1.0, 2.0]))
        ensemble.min_logvar.copy_(torch.tensor([-10.0, -9.0, -12.0, -8.0]))
        for x in (-1e4, -30.0, -10.0, -5.0, 0.0, 3.0, 1e4):
            ensemble.layers[-1].bias[..., D + 1 :] = x
            logvar = ensemble(torch.zeros(5, 1, D + A))[1][2, 0].double().numpy()
            high, low = (bound.double().numpy() for bound in (ensemble.max_logvar, ensemble.min_logvar))
            expected = high - np.logaddexp(0, high - x)
            np.testing.assert_allclose(logvar, low + np.logaddexp(0, expected - low), rtol=1e-5)
            assert (logvar >= low).all() and (logvar <= high + 1e-3).all()
            if abs(x) == 1e4:
                np.testing.assert_allclose(logvar, high if x > 0 else low, atol=1e-3)
            elif x == -5:
                np.testing.assert_allclose(logvar, x, atol=0.05)


def test_model_loss_is_the_negative_log_likelihood(agent):
    """Twice the Gaussian's, less log 2 pi, mean over rows and outputs, summed over networks; 0.01 of the bounds."""
    ensemble, inputs, targets = agent.ensemble, normal(5, 6, D + A), normal(5, 6, D + 1, seed=2)
    expected = 0.0
    for e in range(5):
        terms = []
        for b in range(6):
            mean, logvar = forward(ensemble, e, inputs[e, b])
            nll = -Normal(mean, torch.exp(logvar / 2)).log_prob(targets[e, b])
            terms.append(2 * nll - math.log(2 * math.pi))
        expected += torch.stack(terms).mean()
    bounds = 0.01 * sum(ensemble.max_logvar) - 0.01 * sum(ensemble.min_logvar)
    loss = mbpo.model_loss(ensemble, inputs, targets)
    torch.testing.assert_close(loss, expected + bounds)
    loss.backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in ensemble.parameters()), "the bounds are trained too"


def test_bounds_are_drawn_together(args):
    """Where the likelihood does not feel them, their gradients are +0.01 and -0.01."""
    ensemble = mbpo.Agent(D, A, args).ensemble
    with torch.no_grad():
        ensemble.max_logvar.fill_(200)
        ensemble.min_logvar.fill_(-200)
    mbpo.model_loss(ensemble, normal(5, 4, D + A), normal(5, 4, D + 1)).backward()
    torch.testing.assert_close(ensemble.max_logvar.grad, torch.full((D + 1,), 0.01))
    torch.testing.assert_close(ensemble.min_logvar.grad, torch.full((D + 1,), -0.01))


def test_weight_decay_is_in_the_gradient_that_adam_sees(agent, args):
    """After the first step Adam's mean is (1 - beta1) (g + lambda W), layer by layer; no decay elsewhere."""
    optimizers = mbpo.make_optimizers(agent, args)
    weights = [id(layer.weight) for layer in agent.ensemble.layers]
    decays = dict(zip(weights, (2.5e-5, 5e-5, 7.5e-5, 7.5e-5, 1e-4), strict=True))
    owned = {}
    for name, optimizer in optimizers.items():
        owned[name] = {id(p) for group in optimizer.param_groups for p in group["params"]}
        before = {}
        for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"]):
            p.grad = 1e-4 * normal(*p.shape, seed=i)
            before[p] = p.detach().clone()
        optimizer.step()
        for p, old in before.items():
            expected = 0.1 * (p.grad + decays.get(id(p), 0) * old)
            torch.testing.assert_close(optimizer.state[p]["exp_avg"], expected, rtol=1e-4, atol=1e-10)
    assert owned["model"] == {id(p) for p in agent.ensemble.parameters()}
    assert owned["policy"] == {id(p) for p in (*agent.actor.parameters(), *agent.critics.parameters(), agent.log_alpha)}
    assert [optimizers[name].defaults["lr"] for name in ("model", "policy")] == [1e-3, 3e-4]


# === Training of the ensemble ===


def train(agent, rows, rng, args, loss_fn=mbpo.model_loss, optimizer=None) -> dict:
    optimizer = optimizer or mbpo.make_optimizers(agent, args)["model"]
    step = functools.partial(mbpo.update_model, agent, optimizer, loss_fn=loss_fn)
    return mbpo.train_model(agent, rows, rng, args, step, lambda doing: False)


class Recorder:
    """Trains on rows whose first observation is their number; keeps what each network saw and how it was tested.

    table (epochs, E): errors that the tests of the epochs are made to return, and last those of the restored networks.
    """

    def __init__(self, monkeypatch, num_rows: int, table=None, **changes):
        self.args = make_args(**changes)
        self.agent = make_agent(self.args)
        self.rows = make_batch(num_rows)
        self.rows[:, 0] = torch.arange(num_rows)
        self.rows[:, 1] = 7  # without variance
        self.rows[:, 2] *= 1e-14  # with next to none
        self.epochs, self.tests, self.states, self.sizes, self.holdouts = [[]], 0, [], [[]], []
        errors = mbpo.holdout_errors

        def tested(ensemble, inputs, targets):
            self.tests += 1
            self.epochs.append([])
            self.sizes.append([])
            self.states.append({name: p.detach().clone() for name, p in ensemble.named_parameters()})
            self.holdouts.append(inputs[:, 0].long().tolist())
            self.holdout = inputs, targets
            found = errors(ensemble, inputs, targets)
            return found if table is None else found | {"mse": torch.tensor(table[min(self.tests, len(table)) - 1])}

        def loss(ensemble, inputs, targets):
            self.epochs[-1].append(inputs[..., 0].long())
            self.sizes[-1].append(inputs.shape[1])
            numbers = inputs[..., 0].long()
            expected = torch.cat([self.rows[:, D + A, None], self.rows[:, -1 - D : -1] - self.rows[:, :D]], 1)
            assert torch.equal(targets, expected[numbers])
            assert torch.equal(inputs, self.rows[:, : D + A][numbers])
            return mbpo.model_loss(ensemble, inputs, targets)

        monkeypatch.setattr(mbpo, "holdout_errors", tested)
        self.result = train(self.agent, self.rows, generator(), self.args, loss)
        self.epochs = [torch.cat(epoch, 1) for epoch in self.epochs if epoch]


def test_each_network_sees_its_own_bootstrap(monkeypatch):
    """Drawn once with replacement from the training split; each epoch is another order of it, for each network."""
    recorder = Recorder(monkeypatch, 100)
    assert len(recorder.epochs) == 3
    first = recorder.epochs[0]
    assert first.shape == (5, 80) and len(first.sort(1)[0].unique(dim=0)) == 5
    for row in first:
        assert 0.5 * 80 < len(row.unique()) < 0.75 * 80, "63 percent of the rows are expected"
    for epoch in recorder.epochs[1:]:
        assert torch.equal(epoch.sort(1)[0], first.sort(1)[0])
        assert all((a != b).any() for a, b in zip(epoch, first, strict=True))
    shuffles = [recorder.epochs[1][e].argsort(stable=True) for e in range(5)]
    assert len(torch.stack(shuffles).unique(dim=0)) == 5


def test_the_last_short_batch_is_kept(monkeypatch):
    """80 rows in batches of 16 are 5; 84 are 6, the last of 4."""
    assert Recorder(monkeypatch, 100).sizes[0] == [16] * 5
    assert Recorder(monkeypatch, 105).sizes[0] == [16] * 5 + [4]


@pytest.mark.parametrize(("num_rows", "held"), [(24, 4), (100, 20), (24_999, 4999), (25_000, 5000), (26_000, 5000)])
def test_holdout_is_a_fifth_and_at_most_5000(monkeypatch, num_rows, held):
    """The same rows in every epoch, common to all networks, never trained on, drawn at random."""
    recorder = Recorder(monkeypatch, num_rows, model_max_epochs=2, model_batch_size=8192)
    (holdout,) = {tuple(rows) for rows in recorder.holdouts}
    assert len(set(holdout)) == len(holdout) == held
    trained = set(torch.stack(recorder.epochs).unique().tolist())
    assert not trained & set(holdout) and trained <= set(range(num_rows))
    assert list(holdout) != sorted(holdout) and max(holdout) - min(holdout) > num_rows / 2


def test_normalizer_is_fitted_on_the_training_split(monkeypatch):
    """Mean and population standard deviation of all of its rows, each once; one below 1e-12 becomes 1."""
    recorder = Recorder(monkeypatch, 100)
    inputs = recorder.rows[sorted(set(range(100)) - set(recorder.holdouts[0]))][:, : D + A]
    assert len(inputs) == 80
    torch.testing.assert_close(recorder.agent.ensemble.input_mean, inputs.mean(0))
    std = inputs.std(0, correction=0)
    assert 0 < std[2] < 1e-12
    std[1:3] = 1
    torch.testing.assert_close(recorder.agent.ensemble.input_std, std)


def test_holdout_errors(agent):
    """MSE, MSE over the predicted variance, standard deviation of the networks' means; row by row."""
    inputs, targets = normal(7, D + A), normal(7, D + 1, seed=2)
    errors = mbpo.holdout_errors(agent.ensemble, inputs, targets)
    means = torch.stack([torch.stack([forward(agent.ensemble, e, x)[0] for x in inputs]) for e in range(5)])
    logvars = torch.stack([torch.stack([forward(agent.ensemble, e, x)[1] for x in inputs]) for e in range(5)])
    for e in range(5):
        torch.testing.assert_close(errors["mse"][e], F.mse_loss(means[e], targets))
        weighted = ((means[e] - targets) ** 2 / logvars[e].exp()).mean()
        torch.testing.assert_close(errors["weighted_mse"][e], weighted)
    torch.testing.assert_close(errors["disagreement"], means.std(0, correction=0).mean())
    assert not any(error.requires_grad for error in errors.values())


FINAL = [0.5, 0.2, 0.9, 0.1, 0.3]
TABLES = {
    "each at its own epoch": [
        [1.0, 1.0, 1.0, 1.0, 1.0],
        [0.9, 1.1, 1.0, 0.5, 0.995],  # 0.995 is not 1 percent better
        [0.8, 0.9, 1.2, 0.6, 0.98],
        [0.795, 0.95, 1.2, 0.4, 0.98],
        *[[2.0] * 5] * 20,
    ],
    "one goes on": [[1.0] * 5, *[[2.0, 2.0, 2.0, 2.0, 0.9**i] for i in range(1, 10)], *[[2.0] * 5] * 20],
    "slow gains add up": [[1.0, 2, 2, 2, 2], *[[1 - 0.004 * i, 2, 2, 2, 2] for i in range(1, 8)], *[[2.0] * 5] * 20],
    "worse is no best": [[1.0] * 5, [2, 1, 1, 1, 0.5], [1.5, 1, 1, 1, 0.4], [1.2, 1, 1, 1, 0.3], *[[2.0] * 5] * 20],
    "small errors": [[1e-3] * 5, [5e-4, 2e-3, 9.8e-4, 1e-3, 9.95e-4], *[[2.0] * 5] * 20],
    "never": [[1.0] * 5] * 30,
}


@pytest.mark.parametrize("patience", [0, 2, 5])
@pytest.mark.parametrize("kind", TABLES)
def test_each_network_is_restored_to_its_own_best(monkeypatch, kind, patience):
    """More than 1 percent better than its own best is a snapshot; patience + 1 epochs without one end the training."""
    table = np.array(TABLES[kind])
    best, best_epoch, since, epoch = np.full(5, 1e10), np.zeros(5, int), 0, 0
    while since <= patience:
        better = [e for e in range(5) if (best[e] - table[epoch, e]) / best[e] > 0.01]
        for e in better:
            best[e], best_epoch[e] = table[epoch, e], epoch
        epoch, since = epoch + 1, 0 if better else since + 1
    table = [*table[:epoch].astype(np.float32).tolist(), FINAL]
    monkeypatch.setattr(mbpo, "PATIENCE", patience)
    recorder = Recorder(monkeypatch, 40, table, model_max_epochs=None)
    assert recorder.tests == epoch + 1 == recorder.result["epochs"] + 1
    for name, parameter in recorder.agent.ensemble.named_parameters():
        if "logvar" in name:
            assert torch.equal(parameter, recorder.states[epoch - 1][name]), "the shared bounds are the last ones"
            continue
        for e in range(5):
            assert torch.equal(parameter[e], recorder.states[best_epoch[e]][name][e]), (name, e)
        assert len({hash(state[name][0].numpy().tobytes()) for state in recorder.states[:epoch]}) == epoch
    assert recorder.agent.ensemble.elites.tolist() == [3, 1, 4], "the lowest errors of the restored networks"


def test_errors_and_elites_are_those_of_the_restored_networks(monkeypatch):
    """Without a script: the errors that are returned are those of the final networks on the holdout."""
    recorder = Recorder(monkeypatch, 200, model_max_epochs=8)
    monkeypatch.undo()
    found = mbpo.holdout_errors(recorder.agent.ensemble, *recorder.holdout)
    assert torch.equal(found["mse"], recorder.result["mse"])
    assert torch.equal(found["mse"].sort()[1][:3], recorder.agent.ensemble.elites)


def test_training_goes_on_from_the_weights_and_the_optimizer_of_the_last(agent):
    """Adam counts its steps over trainings; all errors go down on rows that can be predicted."""
    args = make_args(model_max_epochs=10)
    rows = make_batch(200)
    rows[:, -1 - D : -1] = rows[:, :D] + rows[:, D : D + 1]
    rows[:, D + A] = rows[:, 0]
    optimizer, rng = mbpo.make_optimizers(agent, args)["model"], generator()
    errors = [train(agent, rows, rng, args, optimizer=optimizer)["mse"] for _ in range(3)]
    assert (errors[2] < errors[1]).all() and (errors[1] < errors[0]).all()
    steps = {int(state["step"]) for state in optimizer.state.values()}
    assert steps == {3 * 10 * 10}


def test_training_leaves_the_policy_alone(agent, args):
    """No parameter but the ensemble's gets a gradient or moves."""
    before = {name: p.detach().clone() for name, p in agent.named_parameters()}
    train(agent, make_batch(60), generator(), args)
    for name, p in agent.named_parameters():
        assert torch.equal(p, before[name]) != name.startswith("ensemble"), name
        assert name.startswith("ensemble") or p.grad is None


# === Schedules and settings ===


def test_rollout_lengths_at_published_points():
    """Hopper 1 to 15 over epochs 20 to 150, Ant to 25 at 100, Humanoid to 25 at 300, else 1."""
    points = {
        "Hopper-v5": {0: 1, 20: 1, 29: 1, 30: 2, 85: 8, 125: 12, 149: 14, 150: 15, 400: 15},
        "Ant-v5": {0: 1, 20: 1, 60: 13, 99: 24, 100: 25, 300: 25},
        "Humanoid-v5": {0: 1, 20: 1, 160: 13, 299: 24, 300: 25},
        "HalfCheetah-v5": {0: 1, 100: 1, 400: 1},
        "Walker2d-v5": {300: 1},
        "InvertedPendulum-v5": {80: 1},
    }
    for env_id, lengths in points.items():
        args = published(env_id)
        for epoch, k in lengths.items():
            first = args.learning_starts + epoch * args.epoch_length
            last = first + args.epoch_length - 1
            assert mbpo.rollout_length(first, args) == mbpo.rollout_length(last, args) == k, (env_id, epoch)
        assert mbpo.rollout_length(0, args) == 1


@pytest.mark.parametrize("schedule", [(20, 150, 1, 15), (20, 100, 1, 25), (20, 300, 1, 25), (0, 1, 1, 1), (5, 5, 2, 7)])
def test_rollout_length_is_linear_and_cut(schedule):
    """k0 + (epoch - e0) / (e1 - e0) (k1 - k0), exactly, cut to an integer; a jump where e0 = e1."""
    args = published("Hopper-v5", rollout_schedule=schedule)
    e0, e1, k0, k1 = schedule
    for epoch in range(400):
        share = min(max(Fraction(epoch - e0, max(e1 - e0, 1)), Fraction(0)), Fraction(1))
        assert mbpo.rollout_length(5000 + 1000 * epoch, args) == int(k0 + share * (k1 - k0)), epoch


def test_memory_is_that_of_the_longest_rollouts(monkeypatch):
    """At either end of the schedule; a checkpoint copies both buffers; without a model there is none of its rows."""
    asked = []
    monkeypatch.setattr(mbpo, "require_memory", lambda num_bytes, *rest: asked.append(num_bytes))

    def floats(**settings) -> float:
        mbpo.check_memory(published("Hopper-v5", total_timesteps=200_000, **settings), 11, 3)
        return asked.pop() / 4 / (2 * 11 + 3 + 2)

    rising, falling = (floats(rollout_schedule=schedule) for schedule in ((0, 100, 1, 25), (0, 100, 25, 1)))
    assert rising == falling
    assert rising - floats(rollout_schedule=(0, 1, 1, 1)) == pytest.approx(2 * 24 * 400_000)
    assert rising - floats(rollout_schedule=(0, 100, 1, 25), save_buffer=False) == pytest.approx(11_000_000, rel=1e-3)
    assert rising - floats(rollout_schedule=(0, 100, 1, 25), real_ratio=1.0) == pytest.approx(2 * 25 * 400_000)


def test_model_buffer_sizes():
    """400,000 k rows; Humanoid 5 epochs of one training of 100,000 k; the pendulums one of 100,000."""
    for k in (1, 2, 15, 25):
        assert mbpo.model_buffer_size(k, published("Hopper-v5")) == 400_000 * k
        assert mbpo.model_buffer_size(k, published("Humanoid-v5")) == 500_000 * k
    assert mbpo.model_buffer_size(1, published("InvertedPendulum-v5")) == 100_000
    odd = published("Hopper-v5", model_train_frequency=300, rollout_batch_size=90)
    assert mbpo.model_buffer_size(3, odd) == int(1000 / 300 * 90 * 3)


TABLE = {  # G, schedule, target entropy, F, retained epochs, units, random steps, E, all steps
    "InvertedPendulum": (10, (0, 1, 1, 1), -0.05, 250, 1, 200, 500, 250, 20_500),
    "InvertedDoublePendulum": (20, (0, 1, 1, 1), -0.5, 250, 1, 200, 500, 250, 20_500),
    "Hopper": (20, (20, 150, 1, 15), -1, 250, 1, 200, 5000, 1000, 130_000),
    "Walker2d": (20, (0, 1, 1, 1), -3, 250, 1, 200, 5000, 1000, 305_000),
    "HalfCheetah": (40, (0, 1, 1, 1), -3, 250, 1, 200, 5000, 1000, 405_000),
    "Ant": (20, (20, 100, 1, 25), -4, 250, 1, 200, 5000, 1000, 305_000),
    "Humanoid": (20, (20, 300, 1, 25), -2, 1000, 5, 400, 5000, 1000, 305_000),
    "Pendulum": (20, (0, 1, 1, 1), None, 250, 1, 200, 500, 250, 10_000),  # not the paper's
}
COLUMNS = ["updates_per_step", "rollout_schedule", "target_entropy", "model_train_frequency", "model_retain_epochs"]
COLUMNS += ["model_hidden_size", "learning_starts", "epoch_length", "total_timesteps"]


@pytest.mark.parametrize("task", TABLE)
def test_published_settings(task):
    """The official configuration of each task, and what is common to all."""
    args = published(f"{task}-v5")
    assert tuple(getattr(args, name) for name in COLUMNS) == TABLE[task]
    assert (args.num_nets, args.num_elites, args.rollout_batch_size, args.real_ratio) == (7, 5, 100_000, 0.05)
    assert (args.gamma, args.tau, args.learning_rate, args.model_lr) == (0.99, 0.005, 3e-4, 1e-3)
    assert (args.batch_size, args.model_batch_size, args.hidden_size, mbpo.PATIENCE) == (256, 256, 256, 5)
    assert args.model_max_epochs is None and args.buffer_size == 10**6
    assert (mbpo.HOLDOUT_RATIO, mbpo.MAX_HOLDOUT, mbpo.MIN_GAIN) == (0.2, 5_000, 0.01)


def test_a_flag_wins_over_the_task():
    """Also one that is falsy; elsewhere the defaults; the module of an environment does not matter."""
    args = published("Humanoid-v5", model_hidden_size=16, rollout_schedule=(1, 2, 3, 4), updates_per_step=0)
    assert (args.model_hidden_size, args.rollout_schedule, args.updates_per_step) == (16, (1, 2, 3, 4), 0)
    assert args.model_train_frequency == 1000 and args.target_entropy == -2
    for env_id in ("walker-walk", "fake_envs:Unknown-v3"):
        args = published(env_id)
        assert {name: getattr(args, name) for name in mbpo.DEFAULTS} == mbpo.DEFAULTS
        assert args.target_entropy is None
    assert published("my_module:Hopper-v4").rollout_schedule == (20, 150, 1, 15)
    assert published("dm_control/walker-walk-v0").env_id == "walker-walk", "Shimmy's name of a task"
    args = Args(env_id="Hopper-v5")
    mbpo.with_task_defaults(args)
    assert args.updates_per_step is None, "settings are not changed in place"


def test_every_task_is_made_of_settings():
    """No entry of TASKS has a name that Args lacks or a value of another type."""
    names = {field.name for field in dataclasses.fields(Args)}
    for task in (mbpo.DEFAULTS, *mbpo.TASKS.values()):
        assert set(task) <= names
    assert set(mbpo.TASKS) <= set(mbpo.TERMINATIONS)


# === Replay buffer ===


@pytest.mark.parametrize("capacity", [1, 2, 5, 8, 33])
def test_buffer_is_a_ring(capacity):
    """Against a deque: the newest `capacity` rows in their order, whatever the sizes of what is added."""
    rb, kept, rng, step = ReplayBuffer(capacity, ROW, CPU), deque(maxlen=capacity), np.random.default_rng(1), 0
    assert len(rb) == 0 and rb.rows.shape == (capacity, ROW)
    for size in rng.integers(0, 12, 60).tolist():
        rows = torch.arange(step, step + size)[:, None].expand(-1, ROW).float()
        rb.add(rows)
        kept.extend(range(step, step + size))
        step += size
        assert len(rb) == len(kept)
        for n in {0, 1, len(kept) // 2, len(kept)} if kept else {0}:
            newest = rb.newest(n)
            assert newest[:, 0].tolist() == list(kept)[len(kept) - n :] and newest.shape == (n, ROW)


@pytest.mark.parametrize("added", [0, 3, 5, 12])
def test_resize_keeps_the_newest(added):
    """Smaller, larger and back; then the ring goes on, also after it had wrapped."""
    for sizes in ((3, 9), (9, 3), (5,), (20, 2, 7)):
        rb, expected = ReplayBuffer(5, ROW, CPU), deque(maxlen=5)
        numbers = list(range(added))
        expected.extend(numbers)
        rb.add(torch.tensor(numbers).float()[:, None].expand(-1, ROW))
        for capacity in sizes:
            rb.resize(capacity)
            expected = deque(expected, maxlen=capacity)
            assert rb.newest(len(rb))[:, 0].tolist() == list(expected) and len(rb.rows) == capacity
            for number in range(100, 104):
                rb.add(torch.full((1, ROW), float(number)))
                expected.append(number)
                assert rb.newest(len(rb))[:, 0].tolist() == list(expected)


def test_buffer_hands_out_copies():
    """Changing what was added, sampled, read or saved changes nothing stored."""
    rb, rows = ReplayBuffer(8, ROW, CPU), make_batch(8)
    original = rows.clone()
    rb.add(rows)
    saved = rb.state_dict()
    loaded = ReplayBuffer(8, ROW, CPU)
    loaded.load_state_dict(saved)
    for handed_out in (rows, rb.newest(8), rb.newest(3), rb.sample(4, generator=generator()), saved["rows"]):
        handed_out.fill_(math.nan)
    assert torch.equal(rb.newest(8), original) and torch.equal(loaded.newest(8), original)


@pytest.mark.parametrize("added", [0, 3, 8, 21])
def test_buffer_state_round_trip(added):
    """Bit exact, also after wrapping and into another capacity: the same rows, the same samples, the same future."""
    rb, other = ReplayBuffer(8, ROW, CPU), ReplayBuffer(3, ROW, CPU)
    for i in range(added):
        rb.add(make_batch(1, seed=i))
    other.load_state_dict(rb.state_dict())
    assert len(other.rows) == 8
    for i in range(12):
        assert torch.equal(rb.newest(len(rb)), other.newest(len(other))) and rb.end == other.end
        if len(rb):
            assert torch.equal(rb.sample(3, 4, generator=generator(i)), other.sample(3, 4, generator=generator(i)))
        for buffer in (rb, other):
            buffer.add(make_batch(1 + i % 3, seed=100 + i))


def test_samples_are_uniform_over_what_is_there():
    """Shape as asked; every stored row, no other, with replacement."""
    rb = ReplayBuffer(50, ROW, CPU)
    rb.add(torch.arange(10.0)[:, None].expand(-1, ROW))
    rows = rb.sample(100, 200, generator=generator())
    assert rows.shape == (100, 200, ROW)
    counts = rows[..., 0].long().flatten().bincount()
    assert len(counts) == 10 and ((counts - 2000) ** 2 / 2000).sum() < 27.9  # once in 1,000 times, 9 degrees


def test_rows_come_apart_as_they_were_put_together(agent):
    """The columns of a row, in their order."""
    row = torch.arange(2 * D + A + 2.0)
    parts = agent.unpack(row.expand(4, 2, -1))
    assert [part.shape[2:] for part in parts] == [(D,), (A,), (), (D,), ()]
    assert torch.equal(torch.cat([part.reshape(8, -1)[0] for part in parts]), row)


# === Policy ===


def test_log_probabilities(agent):
    """Tanh-squashed Gaussian of torch.distributions; the log standard deviation is cut at -20 and 2."""
    obs, noise = normal(16, D), normal(16, A, seed=2)
    actor = agent.actor.double()
    for scale in (1, 5):
        with torch.no_grad():
            actor.net[-1].bias[A:] *= scale
        actions, log_prob = actor(obs.double(), noise.double())
        for i in range(16):
            action, expected = policy(actor, obs[i].double(), noise[i].double())
            torch.testing.assert_close(actions[i], action)
            torch.testing.assert_close(log_prob[i], expected, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        actor.net[-1].weight.zero_()
        for x, std in ((-50.0, math.exp(-20)), (50.0, math.exp(2))):
            actor.net[-1].bias.copy_(torch.tensor([0.0, 0, x, x]))
            actions, log_prob = actor(obs.double(), 0.1 * noise.double())
            torch.testing.assert_close(actions, torch.tanh(std * 0.1 * noise.double()))
            gaussian = Normal(0.0, torch.tensor(std).double()).log_prob(std * 0.1 * noise.double())
            torch.testing.assert_close(log_prob, (gaussian - torch.log1p(-(actions**2))).sum(-1))


def test_log_probabilities_of_saturated_actions_are_finite(agent):
    """tanh(x) is 1 in float32, log(1 - tanh(x)^2) is about -2 |x| + log 4."""
    with torch.no_grad():
        agent.actor.net[-1].weight.zero_()
        agent.actor.net[-1].bias.copy_(torch.tensor([60.0, -60.0, 0, 0]))
    actions, log_prob = agent.actor(normal(4, D), torch.zeros(4, A))
    assert actions.tolist() == [[1, -1]] * 4
    torch.testing.assert_close(log_prob, torch.full((4,), 2 * (120 - math.log(4)) - math.log(2 * math.pi)))


def test_acting(agent):
    """Sampled with a generator, the mode without; float32 arrays."""
    obs = normal(4, D).numpy()
    mode = mbpo.act(agent, obs, CPU, None)
    mean = agent.actor.net(torch.from_numpy(obs))[:, :A]
    np.testing.assert_allclose(mode, torch.tanh(mean).detach().numpy(), rtol=1e-6)
    sampled = mbpo.act(agent, obs, CPU, generator(3))
    expected, _ = agent.actor(torch.from_numpy(obs), torch.randn(4, A, generator=generator(3)))
    assert np.array_equal(sampled, expected.detach().numpy()) and not np.allclose(sampled, mode)
    assert sampled.dtype == mode.dtype == np.float32


def sac_reference(agent, rows, noise, gamma):
    """Losses of the two critics, actor and alpha, one transition at a time."""
    alpha, obs, size = agent.log_alpha.exp().item(), rows[:, :D], len(rows)
    critic_losses, actor_terms, alpha_terms = [[], []], [], []
    for i in range(size):
        action, reward, next_obs, terminated = rows[i].split([D, A, 1, D, 1])[1:]
        next_action, next_log_prob = policy(agent.actor, next_obs, noise[0, i])
        next_value = min(value(agent.target_critics, c, next_obs, next_action).item() for c in (0, 1))
        target = reward.item()
        if not terminated:
            target += gamma * (next_value - alpha * next_log_prob.item())
        for c in (0, 1):
            critic_losses[c].append((value(agent.critics, c, obs[i], action).item() - target) ** 2 / 2)
        new_action, log_prob = policy(agent.actor, obs[i], noise[1, i])
        q = min(value(agent.critics, c, obs[i], new_action).item() for c in (0, 1))
        actor_terms.append(alpha * log_prob.item() - q)
        alpha_terms.append(-agent.log_alpha.item() * (log_prob.item() + agent.target_entropy))
    return np.mean(critic_losses, 1), np.mean(actor_terms), np.mean(alpha_terms)


def test_losses_against_a_plain_loop(agent):
    """Critics, actor and alpha from the equations; what an update logs of them, from before its step."""
    rows, noise = make_batch(12), normal(2, 12, A, seed=3)
    args = make_args(gamma=0.9)
    critics, actor, alpha = sac_reference(agent, rows, noise, 0.9)
    values = [value(agent.critics, c, row[:D], row[D : D + A]).item() for row in rows for c in (0, 1)]
    expected = {"qf1_loss": critics[0], "qf2_loss": critics[1], "qf_loss": critics.mean(), "actor_loss": actor}
    expected |= {"alpha_loss": alpha, "alpha": agent.log_alpha.exp().item(), "qf_values": np.mean(values)}
    optimizer = mbpo.make_optimizers(agent, args)["policy"]
    metrics = mbpo.update(agent, optimizer, rows, noise, args, LOSSES)
    assert set(metrics) == {f"losses/{name}" for name in expected}
    for name, number in expected.items():
        assert metrics[f"losses/{name}"].item() == pytest.approx(number, rel=1e-3, abs=1e-4), name
    assert not any(metric.requires_grad for metric in metrics.values())


def test_terminations_cut_the_target(agent):
    """At a termination nothing of the next observation counts; elsewhere gamma does."""
    rows, noise = make_batch(9), normal(9, A)
    rows[:, -1] = 1
    (a, _), (b, _) = (mbpo.critic_loss(agent, agent.unpack(rows), noise, gamma) for gamma in (0.99, 0.0))
    other = rows.clone()
    other[:, -1 - D : -1] = 50.0
    c, _ = mbpo.critic_loss(agent, agent.unpack(other), noise, 0.99)
    assert torch.equal(a, b) and torch.equal(a, c)
    other[:, -1] = 0
    assert not torch.equal(mbpo.critic_loss(agent, agent.unpack(other), noise, 0.99)[0], c)


def grads(agent) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in agent.named_parameters() if p.grad is not None}


def test_each_gradient_goes_to_its_own_network(agent, args):
    """Of an update: actor loss to the actor, critic losses to the critics, alpha loss to alpha; none to the others."""
    rows, noise = make_batch(12), normal(2, 12, A, seed=3)
    batch, expected = agent.unpack(rows), {}
    policy_loss, log_prob = mbpo.actor_loss(agent, batch[0], noise[1])
    temperature_loss = mbpo.alpha_loss(agent.log_alpha, log_prob, agent.target_entropy)
    qf_loss = mbpo.critic_loss(agent, batch, noise[0], args.gamma)[0].sum()
    for part, loss in (("critics", qf_loss), ("actor", policy_loss), ("log_alpha", temperature_loss)):
        agent.zero_grad(set_to_none=True)
        loss.backward()
        expected |= {name: gradient for name, gradient in grads(agent).items() if name.startswith(part)}
        reached = {name.split(".")[0] for name in grads(agent)}
        assert reached == ({"actor", "critics"} if part == "actor" else {part}), "the actor's goes through the critics"
    mbpo.update(agent, mbpo.make_optimizers(agent, args)["policy"], rows, noise, args, LOSSES)
    found = grads(agent)
    assert set(found) == set(expected) and all(gradient.abs().sum() > 0 for gradient in found.values())
    assert {name.split(".")[0] for name in found} == {"critics", "actor", "log_alpha"}
    for name, gradient in expected.items():
        assert torch.equal(found[name], gradient), name


def test_the_actor_follows_the_smaller_value_and_the_entropy(agent):
    """Its gradient is that of alpha log pi - min Q with the actions' dependence on the noise (autograd of the loop)."""
    rows, noise = make_batch(6), normal(6, A, seed=3)
    mbpo.actor_loss(agent, rows[:, :D], noise)[0].backward()
    gradient = agent.actor.net[0].weight.grad.clone()
    agent.zero_grad(set_to_none=True)
    terms = []
    for obs, z in zip(rows[:, :D], noise, strict=True):
        mean, log_std = agent.actor.net(obs).split(A)
        x = mean + log_std.exp() * z
        action = torch.tanh(x)
        log_prob = (Normal(mean, log_std.exp()).log_prob(x) - torch.log(1 - action**2)).sum()
        q = torch.minimum(*(value(agent.critics, c, obs, action) for c in (0, 1)))
        terms.append(agent.log_alpha.exp().detach() * log_prob - q)
    torch.stack(terms).mean().backward()
    torch.testing.assert_close(agent.actor.net[0].weight.grad, gradient, rtol=1e-3, atol=1e-5)


def test_alpha_goes_to_the_target_entropy():
    """Its gradient is minus the mean of log pi + target: too random lowers alpha, too certain raises it."""
    log_alpha = torch.tensor(0.3, requires_grad=True)
    log_prob = torch.tensor([1.0, 2.0, 6.0], requires_grad=True)
    mbpo.alpha_loss(log_alpha, log_prob, -1.5).backward()
    assert log_alpha.grad.item() == pytest.approx(-(3 - 1.5)) and log_prob.grad is None


def test_update(agent, args):
    """One Adam step of critics, actor and alpha from the same parameters; targets move by 0.005; the model does not."""
    rows, noise = make_batch(12), normal(2, 12, A, seed=3)
    twin = make_agent(args)
    optimizer, plain = (mbpo.make_optimizers(a, args)["policy"] for a in (agent, twin))
    for step in range(3):
        before = {name: p.detach().clone() for name, p in agent.named_parameters()}
        mbpo.update(agent, optimizer, rows, noise, args, LOSSES)
        batch = twin.unpack(rows)
        policy_loss, log_prob = mbpo.actor_loss(twin, batch[0], noise[1])
        losses = {"critics": mbpo.critic_loss(twin, batch, noise[0], args.gamma)[0].sum(), "actor": policy_loss}
        losses["log_alpha"] = mbpo.alpha_loss(twin.log_alpha, log_prob, twin.target_entropy)
        for part, loss in losses.items():
            own = [p for name, p in twin.named_parameters() if name.startswith(part)]
            for p, gradient in zip(own, torch.autograd.grad(loss, own), strict=True):
                p.grad = gradient
        plain.step()
        for name, p in agent.named_parameters():
            if name.startswith("target_critics"):
                live = agent.get_parameter(name.removeprefix("target_"))
                torch.testing.assert_close(p, 0.995 * before[name] + 0.005 * live)
                twin.get_parameter(name).data.copy_(p)
                assert not torch.equal(p, before[name])
            else:
                torch.testing.assert_close(p, twin.get_parameter(name))
                assert torch.equal(p, before[name]) == name.startswith("ensemble"), (name, step)


# === Rollouts ===


def labelled(inputs, nets):
    """Stands in for an ensemble whose network i predicts the reward i and stays where it is."""
    mean = torch.zeros(*inputs.shape[:2], D + 1)
    mean[..., 0] = nets[:, None]
    return mean, torch.zeros_like(mean)


@pytest.mark.parametrize("size", [1, 2, 5, 6, 7, 10, 13, 100])
@pytest.mark.parametrize("num_elites", [1, 3, 5])
def test_every_row_goes_to_one_elite_in_equal_groups(size, num_elites):
    """By its place in the order; the last groups are short where the rows are not a multiple of the elites."""
    order, noise = torch.randperm(size, generator=generator()), torch.zeros(size, D + 1)
    obs, elites = normal(size, D), torch.arange(num_elites) + 2
    next_obs, rewards = mbpo.model_step(labelled, obs, torch.zeros(size, A), order, elites, noise)
    group = math.ceil(size / num_elites)
    assert rewards[order].tolist() == [2 + i // group for i in range(size)]
    assert torch.equal(next_obs, obs)
    if size % num_elites == 0:
        assert rewards.long().bincount()[2:].tolist() == [group] * num_elites


@pytest.mark.parametrize("size", [1, 2, 3, 7, 12, 13])
def test_model_step_against_one_row_at_a_time(agent, size):
    """Mean plus noise times the standard deviation of the row's own elite: next observation and reward."""
    obs, actions, noise = normal(size, D), normal(size, A, seed=2).tanh(), normal(size, D + 1, seed=3)
    order, elites = torch.randperm(size, generator=generator()), torch.tensor([4, 0, 3])
    next_obs, rewards = mbpo.model_step(agent.ensemble, obs, actions, order, elites, noise)
    assert next_obs.shape == (size, D) and rewards.shape == (size,)
    for place, row in enumerate(order.tolist()):
        mean, logvar = forward(
            agent.ensemble, elites[place // math.ceil(size / 3)], torch.cat([obs[row], actions[row]])
        )
        sample = mean + noise[row] * torch.exp(logvar / 2)
        torch.testing.assert_close(next_obs[row], obs[row] + sample[1:])
        torch.testing.assert_close(rewards[row], sample[0])


def far(o: torch.Tensor) -> torch.Tensor:
    return o[..., 0].abs() > 1


@pytest.mark.parametrize(("size", "length"), [(1, 4), (2, 3), (20, 6), (41, 3), (41, 1)])
def test_rollouts_against_one_row_at_a_time(agent, size, length):
    """Same noise, same order; rows that terminated are handed out with their flag, and not continued."""
    start, rng = normal(size, D) * 0.5, generator(4)
    steps = list(mbpo.rollout(agent, start, length, far, generator(4)))
    live, ended = list(start), 0
    for rows in steps:
        n = len(live)
        action_noise, order = torch.randn(n, A, generator=rng), torch.randperm(n, generator=rng)
        elites = agent.ensemble.elites[torch.randperm(3, generator=rng)]
        model_noise, place = torch.randn(n, D + 1, generator=rng), order.argsort()
        assert rows.shape == (n, ROW) and not rows.requires_grad
        following = []
        for i, obs in enumerate(live):
            action, _ = policy(agent.actor, obs, action_noise[i])
            elite = elites[place[i] // math.ceil(n / 3)]
            mean, logvar = forward(agent.ensemble, elite, torch.cat([obs, action]))
            sample = mean + model_noise[i] * torch.exp(logvar / 2)
            next_obs = obs + sample[1:]
            done = bool(abs(next_obs[0]) > 1)
            expected = torch.cat([obs, action, sample[:1], next_obs, torch.tensor([float(done)])])
            torch.testing.assert_close(rows[i], expected.detach(), rtol=1e-4, atol=1e-5)
            ended += done
            if not done:
                following.append(rows[i, -1 - D : -1])
        live = following
    assert len(steps) == length or not live
    assert ended or size < 20


def test_rollouts_stop_when_none_is_left(agent):
    """Everything terminates at once: one step, all of it stored; nothing does: every row, every step."""
    everywhere = mbpo.rollout(agent, normal(6, D), 5, lambda o: torch.ones(len(o), dtype=torch.bool), generator())
    (rows,) = everywhere
    assert len(rows) == 6 and (rows[:, -1] == 1).all()
    steps = list(mbpo.rollout(agent, normal(6, D), 5, mbpo.never_terminates, generator()))
    assert [len(rows) for rows in steps] == [6] * 5 and not torch.cat(steps)[:, -1].any()
    for a, b in zip(steps[:-1], steps[1:], strict=True):
        assert torch.equal(a[:, -1 - D : -1], b[:, :D])


def test_large_rollouts_go_block_by_block(agent):
    """Every start once and in order; the second step of a block goes on from its own first one; nobody is lost."""
    starts, ends = normal(45_000, D), lambda o: o[:, 0] > 1.5
    steps = list(mbpo.rollout(agent, starts, 2, ends, generator()))
    assert [len(first) for first in steps[::2]] == [20_000, 20_000, 5_000]
    assert torch.equal(torch.cat(steps[::2])[:, :D], starts)
    for first, second in zip(steps[::2], steps[1::2], strict=True):
        assert 0 < first[:, -1].sum() < len(first)
        assert torch.equal(second[:, :D], first[first[:, -1] == 0][:, -1 - D : -1])


def test_rows_change_their_elite(agent, monkeypatch):
    """A new order of rows and of elites at every step: also a single row meets each of them equally often."""
    orders, dealt, step = [], [], mbpo.model_step
    monkeypatch.setattr(mbpo, "model_step", lambda *a: (orders.append(a[3]), dealt.append(a[4]), step(*a))[2])
    list(mbpo.rollout(agent, normal(30, D), 4, mbpo.never_terminates, generator()))
    assert len(torch.stack(orders).unique(dim=0)) == 4
    assert all(order.sort()[0].tolist() == list(range(30)) for order in orders)
    list(mbpo.rollout(agent, normal(1, D), 600, mbpo.never_terminates, generator()))
    elites = agent.ensemble.elites.sort()[0].tolist()
    assert all(sorted(elite.tolist()) == elites for elite in dealt)
    firsts = [elite[0].item() for elite in dealt[4:]]
    assert all(150 < firsts.count(elite) < 250 for elite in elites), "200 are expected, with a deviation of 12"


def test_open_loop_errors_against_a_loop(agent):
    """Mean predictions of each elite, fed back; observations in standard deviations of the inputs, rewards plain."""
    K, B = 4, 3
    obs, actions, rewards = normal(K + 1, B, D), normal(K, B, A, seed=2).tanh(), normal(K, B, seed=3)
    obs_errors, reward_errors = mbpo.open_loop_errors(agent.ensemble, obs, actions, rewards)
    squares, misses = np.zeros((K, 3, B, D)), np.zeros((K, 3, B))
    for i, elite in enumerate(agent.ensemble.elites.tolist()):
        for b in range(B):
            predicted = obs[0, b]
            for k in range(K):
                mean, _ = forward(agent.ensemble, elite, torch.cat([predicted, actions[k, b]]))
                predicted = predicted + mean[1:]
                difference = (predicted - obs[k + 1, b]) / agent.ensemble.input_std[:D]
                squares[k, i, b] = difference.detach().numpy() ** 2
                misses[k, i, b] = abs((mean[0] - rewards[k, b]).item())
    np.testing.assert_allclose(obs_errors, np.sqrt(squares.mean((1, 2, 3))), rtol=1e-4)
    np.testing.assert_allclose(reward_errors, misses.mean((1, 2)), rtol=1e-4)
    assert not obs_errors.requires_grad


def test_open_loop_pieces_are_cut_from_the_trajectories(agent, monkeypatch, tmp_path):
    """25 steps from every fifth step on that has so many left; if no episode has 25 steps, as many as the longest.

    What is logged is drawn, too.
    """
    asked, logged, figures, savefig = [], {}, [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, path: (figures.append(self), savefig(self, path)))

    def errors(ensemble, *parts):
        asked.append(parts)
        count = torch.arange(1.0, len(parts[1]) + 1)
        return count, -count

    run = SimpleNamespace(picture=lambda kind: tmp_path / f"{run.step}_{kind}")
    run.log = lambda values: logged.update({tag: (value, run.step) for tag, value in values.items()})
    monkeypatch.setattr(mbpo, "open_loop_errors", errors)
    trajectories = []
    for number, length in enumerate((24, 25, 36)):
        count = np.arange(length + 1, dtype=np.float32) + 100 * number
        trajectories.append((count[:, None].repeat(D, 1), count[:-1, None].repeat(A, 1), count[:-1]))
    for number, (known, length, starts) in enumerate(((3, 25, [100, 200, 205, 210]), (1, 24, [0]))):
        logged.clear()
        run.step = number
        mbpo.log_open_loop(agent, trajectories[:known], run)
        obs, actions, rewards = asked.pop()
        for part, steps in ((obs[..., 0], length + 1), (actions[..., 0], length), (rewards, length)):
            assert torch.equal(part, torch.tensor(starts) + torch.arange(float(steps))[:, None])
        points = {f"open_loop/obs_error_{k}": (k, number) for k in range(1, length + 1)}
        points |= {f"open_loop/reward_error_{k}": (-k, number) for k in range(1, length + 1)}
        assert logged == points
        drawn = [axis.lines[0].get_xydata().tolist() for axis in figures.pop().axes]
        assert drawn == [[[k, sign * k] for k in range(1, length + 1)] for sign in (1, -1)]
        assert (tmp_path / f"{number}_open_loop_error.png").exists()


# === Terminations ===

HEIGHTS = {  # index of the height or angle in qpos, and from where to where it is set now and then
    "Hopper-v5": (1, 0.6, 1.3),
    "Walker2d-v5": (1, 0.7, 2.1),
    "Ant-v5": (2, 0.1, 1.2),
    "Humanoid-v5": (2, 0.8, 2.2),
    "InvertedPendulum-v5": (1, -0.3, 0.3),
    "InvertedDoublePendulum-v5": (1, -1.0, 1.0),
}


def count_disagreements(env_id: str, steps: int) -> tuple[int, int]:
    """Steps at which the function of observations and the environment disagree, and terminations."""
    env = mbpo.make_env(published(env_id))()
    function, wrong, ended, done = mbpo.termination_function(env_id, env.observation_space.shape[0]), 0, 0, True
    index, low, high = HEIGHTS.get(env_id, (None, 0, 0))
    rng = np.random.default_rng(1)
    env.action_space.seed(1)
    for step in range(steps):
        if done:
            env.reset(seed=step)
        if index is not None and step % 7 == 0:
            qpos, qvel = env.unwrapped.data.qpos.copy(), env.unwrapped.data.qvel.copy()
            qpos[index] = rng.uniform(low, high)
            env.unwrapped.set_state(qpos, qvel)
        obs, _, terminated, truncated, _ = env.step(env.action_space.sample())
        wrong += bool(function(torch.from_numpy(obs))) != bool(terminated)
        ended += bool(terminated)
        done = terminated or truncated
    env.close()
    return wrong, ended


@pytest.mark.parametrize("env_id", HEIGHTS)
def test_terminations_are_those_of_the_environment(env_id):
    """300 random steps, some from heights and angles near the limits: no disagreement, both answers."""
    wrong, ended = count_disagreements(env_id, 300)
    assert wrong == 0 and 10 < ended < 290


NEVER = ["HalfCheetah-v5", "Swimmer-v5", "Reacher-v5", "Pusher-v5", "Pendulum-v1", "walker-walk", "cheetah-run"]


@pytest.mark.slow
@pytest.mark.parametrize("env_id", [*HEIGHTS, *NEVER])
def test_terminations_over_8000_steps(env_id):
    """The same, longer, and where nothing ever terminates."""
    wrong, ended = count_disagreements(env_id, 8000)
    assert wrong == 0 and (ended > 0) == (env_id in HEIGHTS)


def test_terminations_at_and_beyond_their_limits():
    """Values on either side of each limit, NaN and infinity; any leading shape; the tables of the official code."""
    hopper, walker, ant, humanoid = (torch.zeros(2, 3, n) for n in (11, 17, 27, 45))
    hopper[..., 0] = walker[..., 0] = humanoid[..., 0] = 1.2
    ant[..., 0] = 0.6
    cases = [
        ("Hopper", hopper, {(0, 0.71): 0, (0, 0.69): 1, (1, 0.199): 0, (1, -0.201): 1, (1, 0.201): 1, (5, 99.0): 0}),
        ("Hopper", hopper, {(5, 101.0): 1, (10, -101.0): 1, (0, math.inf): 1, (3, math.nan): 1, (0, 150.0): 0}),
        ("Walker2d", walker, {(0, 0.81): 0, (0, 0.79): 1, (0, 1.99): 0, (0, 2.01): 1, (1, -0.99): 0, (1, 1.01): 1}),
        ("Walker2d", walker, {(0, math.nan): 1, (9, 500.0): 0}),
        ("Ant", ant, {(0, 0.2): 0, (0, 0.199): 1, (0, 1.0): 0, (0, 1.001): 1, (20, math.inf): 1, (20, 500.0): 0}),
        ("Humanoid", humanoid, {(0, 1.0): 0, (0, 0.999): 1, (0, 2.0): 0, (0, 2.001): 1, (0, math.nan): 1}),
        ("InvertedPendulum", torch.zeros(2, 3, 4), {(1, 0.2): 0, (1, -0.201): 1, (3, math.nan): 1, (0, 9.0): 0}),
    ]
    double = torch.zeros(2, 3, 9)
    double[..., 3:5] = 1  # upright: height 1.2
    cases.append(("InvertedDoublePendulum", double, {(1, 0.5): 0, (1, 0.7): 1, (4, -1.0): 1, (2, math.nan): 1}))
    for name, obs, expected in cases:
        function = mbpo.TERMINATIONS[name]
        assert function(obs).tolist() == [[False] * 3] * 2 and function(obs).dtype == torch.bool
        for (index, number), ends in expected.items():
            changed = obs.clone()
            changed[1, 2, index] = number
            assert function(changed).tolist() == [[False] * 3, [False, False, bool(ends)]], (name, index, number)


def test_unknown_terminations_are_refused(capsys):
    """One line that names the table; versions and modules do not matter."""
    for env_id in ("fake_envs:Counter-v0", "CartPole-v1"):
        with pytest.raises(SystemExit) as stopped:
            mbpo.termination_function(env_id, 4)
        (line,) = capsys.readouterr().err.splitlines()
        assert stopped.value.code == 2 and env_id in line and "TERMINATIONS" in line
    assert mbpo.termination_function("some_module:Hopper-v4", 11) is mbpo.hopper_terminated
    for env_id in ("walker-walk", "HalfCheetah-v5"):
        assert mbpo.termination_function(env_id, 17) is mbpo.never_terminates


def test_lqr_which_terminates_is_refused(capsys):
    """The one family of dm_control that ends by itself: its actions have no bounds."""
    pytest.importorskip("dm_control", reason="dm_control is not installed.")
    with pytest.raises(SystemExit):
        mbpo.main(Args(env_id="lqr-lqr_2_1"))
    assert "bounded vector Box" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("rule", "text"),
    [
        (lambda o: o[..., 2] > 1 or o[..., 2] < -1, "ambiguous"),
        (lambda o: (o[..., 2] > 1).float(), "torch.float32 (2,)"),
        (lambda o: o > 1, "torch.bool (2, 3)"),
        (lambda o: o[..., 3] > 1, "index 3 is out of bounds"),
    ],
)
def test_a_rule_that_is_not_of_batches_is_refused(monkeypatch, capsys, rule, text):
    """Before there is a run folder, not after the first training."""
    monkeypatch.setitem(mbpo.TERMINATIONS, "Mine", rule)
    with pytest.raises(SystemExit) as stopped:
        mbpo.termination_function("Mine-v0", 3)
    (line,) = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2 and "TERMINATIONS['Mine'] must make a bool (N,)" in line and text in line


@pytest.mark.parametrize(
    ("wrong", "terminations", "stops_at"),
    [(2, 2, None), (3, 3, 3), (3, 99, 3), (3, 100, None), (4, 101, 4), (12, 1000, None), (13, 1001, 13)],
)
def test_a_rule_that_is_not_the_environments_is_refused(wrong, terminations, stops_at):
    """After more than two disagreements and one in a hundred terminations, in both directions."""
    for ends, rule in ((True, mbpo.never_terminates), (False, lambda o: ~mbpo.never_terminates(o))):
        counters = {"num_terminations": terminations - wrong, "num_rule_errors": 0}
        obs, truth = np.zeros((2, D), np.float32), np.array([ends, not ends])  # about the second one the rule is right
        try:
            for seen in range(1, wrong + 1):
                mbpo.require_rule(rule, obs, truth, counters, seen)
        except SystemExit as stopped:
            assert seen == stops_at and "TERMINATIONS" in stopped.code and f"{seen} disagreements" in stopped.code
        else:
            assert stops_at is None and counters["num_terminations"] == terminations
            assert counters["num_rule_errors"] == wrong


# === Whole runs ===

TINY = {
    "env_id": "fake_envs:Point-v0", "cuda": False, "total_timesteps": 60, "eval_frequency": 0, "epoch_length": 12,
    "checkpoint_frequency": 0, "updates_per_step": 2, "model_train_frequency": 12, "rollout_batch_size": 20,
    "model_max_epochs": 2, "num_nets": 3, "num_elites": 2,
}  # fmt: skip


@pytest.fixture
def played(monkeypatch):
    """What runs do: (name, environment steps so far, data) of each training, sample and update."""
    calls, steps, added, noises, actions = [], [0], [], [], []
    train, sample, update, step = mbpo.train_model, ReplayBuffer.sample, mbpo.update, fake_envs.Point.step
    act = mbpo.act

    def trained(agent, rows, *args):
        calls.append(("train", steps[0], rows.clone()))
        return train(agent, rows, *args)

    def sampled(self, *shape, **kwargs):
        rows = sample(self, *shape, **kwargs)
        calls.append(("sample", steps[0], (len(self.rows), rows)))
        return rows

    def updated(agent, optimizer, rows, noise, *args):
        calls.append(("update", steps[0], rows.clone()))
        noises.append(noise.clone())
        return update(agent, optimizer, rows, noise, *args)

    def acted(agent, obs, device, generator):
        actions.append(generator)
        return act(agent, obs, device, generator)

    def stepped(self, action):
        before, result = self.state, step(self, action)
        added.append([*before, action[0] / 2, result[1], *result[0], result[2]])
        steps[0] += 1
        return result

    for owner, name, function in (
        (mbpo, "train_model", trained), (ReplayBuffer, "sample", sampled), (mbpo, "update", updated),
        (fake_envs.Point, "step", stepped), (mbpo, "act", acted),
    ):  # fmt: skip
        monkeypatch.setattr(owner, name, function)
    monkeypatch.setattr(mbpo, "rehearse", lambda *args: None)  # which plays a step of its own
    calls.append(added)
    yield calls
    assert len({noise.numpy().tobytes() for noise in noises}) == len(noises), "each update has noise of its own"
    assert actions and None not in actions, "actions are sampled"


def run_small(**changes) -> dict:
    run_dir = mbpo.main(Args(**SMALL | TINY | changes))
    return torch.load(os.path.join(run_dir, "checkpoint.pt"), weights_only=True)


def test_order_and_amount_of_work(played):
    """Trainings on all real rows before steps 24, 36 and 48, then rollouts from real states; G updates a step."""
    state = run_small()
    added = played.pop(0)
    assert [(at, len(rows)) for name, at, rows in played if name == "train"] == [(24, 24), (36, 36), (48, 48)]
    updates = [at for name, at, _ in played if name == "update"]
    assert updates == [at for at in range(25, 61) for _ in range(2)]
    assert state["parts"]["counters"]["num_updates"] == 72
    real = np.array(added, np.float32)
    assert real[:24, 3].min() < -0.7 and real[:24, 3].max() > 0.7 and abs(real[:24, 3]).max() <= 1, "random at first"
    np.testing.assert_allclose(state["parts"]["replay"]["rows"], real, rtol=1e-6, atol=1e-7)
    starts = [rows for name, _, (_, rows) in (call for call in played if call[0] == "sample") if rows.dim() == 2]
    assert [len(rows) for rows in starts] == [20] * 3 and played[0][0] == "train"
    assert torch.equal(state["parts"]["model_replay"]["rows"][:, :3], starts[-1][:, :3])


@pytest.mark.parametrize(("share", "num_real"), [(0.05, 12), (0.0, 0), (0.5, 128), (1.0, 256)])
def test_batches_mix_real_and_model_rows(played, share, num_real):
    """256 rows, the first int(256 share) of them played, the others imagined; 1 trains no model at all."""
    run_small(real_ratio=share, batch_size=256)
    known = np.array(played.pop(0), np.float32)
    batches = [rows for name, _, rows in played if name == "update"]
    assert len(batches) == 72
    for rows in batches:
        distance = np.abs(rows.numpy()[:, None] - known).max(-1).min(1)
        assert rows.shape == (256, 9) and (distance[:num_real] < 1e-6).all() and (distance[num_real:] > 1e-6).all()
    assert any(name == "train" for name, *_ in played) == (share < 1)


def test_terminations_are_stored_and_truncations_are_not(played):
    """A point that goes too far is terminated; the time limit is not."""
    state = run_small(env_id="fake_envs:DeadlyPoint-v0", total_timesteps=96)
    rows, edge = state["parts"]["replay"]["rows"], fake_envs.POINT_ENDS["DeadlyPoint"]
    assert torch.equal(rows[:, -1].bool(), rows[:, 5].abs() > edge) and 0 < rows[:, -1].sum() < 48
    truncated = rows[:, 7].isclose(torch.tensor(1.0)) & (rows[:, -1] == 0)
    assert truncated.any()
    imagined = state["parts"]["model_replay"]["rows"]
    assert torch.equal(imagined[:, -1].bool(), imagined[:, 5].abs() > edge)


def test_model_buffer_grows_with_the_rollouts(played):
    """Its size follows the length at each training; the rows of the last epochs stay."""
    state = run_small(total_timesteps=72, rollout_schedule=(0, 3, 1, 4), model_retain_epochs=2)
    kept = state["parts"]["model_replay"]
    assert kept["capacity"] == 2 * 20 * 4 and len(kept["rows"]) == 20 * (3 + 4) + 20
    sizes = [data[0] for name, _, data in played[1:] if name == "sample" and data[0] != 10**6]
    assert sorted(set(sizes)) == [40, 80, 120, 160] and sizes == sorted(sizes)


def test_two_environments_do_twice_the_updates():
    """G updates for each step of each environment."""
    state = run_small(num_envs=2, total_timesteps=72)
    assert state["parts"]["counters"]["num_updates"] == 2 * (72 - 24) and state["global_step"] == 72


def test_target_entropy_elsewhere_is_minus_the_number_of_actions():
    """And it is saved with the settings."""
    assert run_small(target_entropy=None)["args"]["target_entropy"] == -1
    assert run_small(target_entropy=-0.3, seed=2)["args"]["target_entropy"] == pytest.approx(-0.3)


def test_evaluation_plays_the_mode_and_returns_whole_trajectories(args):
    """T + 1 observations, T actions and rewards of each episode; returns are their sums."""
    agent = make_agent(args, 3, 1)
    settings = make_args(**TINY | {"eval_episodes": 3})
    envs = mbpo.make_vector_env(settings, 1)
    stop = SimpleNamespace(requested=0)
    returns, trajectories = mbpo.evaluate(agent, envs, settings, CPU, stop)
    again, _ = mbpo.evaluate(agent, envs, settings, CPU, stop)
    envs.close()
    assert np.array_equal(returns, again) and len(returns) == 3 and len(set(returns)) == 3
    for total, (obs, actions, rewards) in zip(returns, trajectories, strict=True):
        assert obs.shape == (13, 3) and actions.shape == (12, 1) and rewards.shape == (12,)
        assert total == pytest.approx(rewards.sum(), rel=1e-5)
        np.testing.assert_allclose(obs[:, 2], np.arange(13) / 12, atol=1e-6)
        np.testing.assert_allclose(np.diff(obs[:, 1]), 0.2 * actions[:, 0], atol=1e-5)  # the Box is [-2, 2]
        np.testing.assert_allclose(actions, mbpo.act(agent, obs[:-1], CPU, None), atol=1e-6)


def test_paper_observations_of_ant_and_humanoid():
    """The environments' own switches leave 27 and 45 numbers; other versions are left as they are."""
    for env_id, size in (("Ant-v5", 27), ("Humanoid-v5", 45)):
        env = mbpo.make_env(published(env_id))()
        assert env.observation_space.shape == (size,) and env.observation_space.dtype == np.float32
        env.close()


@pytest.mark.parametrize("script", ["mbpo", "dhmbpo"], indirect=True)
def test_actions_are_rescaled_to_the_box(script):
    """-1, 0 and 1 are the ends and the middle of each dimension, even of the widest."""
    seen, most = [], np.finfo(np.float32).max
    box = gym.spaces.Box(np.float32([-3, 0, -most]), np.float32([1, 5, most]))
    env = fake_envs.OddSpaces(fake_envs.VECTOR, box)
    env.step = lambda action: (seen.append(action), (np.zeros(3), 0.0, False, False, {}))[1]
    fitted = script.fit_spaces(env, "Odd-v0")
    assert fitted.action_space == gym.spaces.Box(-1, 1, (3,), np.float32)
    for number in (-1, 0, 1):
        fitted.step(np.full(3, number, np.float32))
    assert np.array_equal(seen, [[-3, 0, -most], [-1, 2.5, 0], [1, 5, most]])


def test_actions_must_be_finite(monkeypatch):
    """Whose fault it is, before anything enters the replay."""
    act = mbpo.act
    monkeypatch.setattr(mbpo, "act", lambda *args: act(*args) * math.nan)
    with pytest.raises(SystemExit, match="not finite at step 24: the policy's action; the last checkpoint is intact"):
        run_small()


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_an_observation_that_is_not_finite_stops_the_run(monkeypatch, number):
    """At the step that shows it; what was before it is saved."""
    step = fake_envs.Point.step

    def spoiled(self, action):
        obs, *rest = step(self, action)
        return (obs * number if self.total_steps == 30 else obs), *rest

    monkeypatch.setattr(fake_envs.Point, "step", spoiled)
    with pytest.raises(SystemExit) as stopped:
        run_small(checkpoint_frequency=12)
    (run_dir,) = os.listdir("runs")
    state = torch.load(f"runs/{run_dir}/checkpoint.pt", weights_only=True)
    assert stopped.value.code == 1 and state["global_step"] == len(state["parts"]["replay"]["rows"]) == 29
    assert state["parts"]["replay"]["rows"].isfinite().all()


def test_updates_of_a_step_are_single_ones_in_order(args):
    """`update_policy` on three batches is `update` three times; the scalars are those of the last; none for none."""
    rows, noise = make_batch(36).unflatten(0, (3, 12)), normal(3, 2, 12, A, seed=3)
    together, single = make_agent(args), make_agent(args)
    optimizers = [mbpo.make_optimizers(agent, args)["policy"] for agent in (together, single)]
    metrics = mbpo.update_policy(together, optimizers[0], rows, noise, args, LOSSES)
    for i in range(3):
        expected = mbpo.update(single, optimizers[1], rows[i], noise[i], args, LOSSES)
    assert all(torch.equal(metrics[name], expected[name]) for name in expected)
    assert all(torch.equal(a, b) for a, b in zip(together.parameters(), single.parameters(), strict=True))
    assert mbpo.update_policy(together, optimizers[0], rows[:0], noise[:0], args, LOSSES) == {}


def learned(device="cpu", steps: int = 1, **flags) -> list[torch.Tensor]:
    """Scalars and parameters after `steps` steps of three policy updates and of a full and a short ensemble batch."""
    args = make_args(**flags)
    agent = make_agent(args).to(device)
    update_model, update_policy = mbpo.make_updates(agent, mbpo.make_optimizers(agent, args), args)
    result = []
    for step in range(steps):
        rows, noise = make_batch(36, seed=step).unflatten(0, (3, 12)), normal(3, 2, 12, A, seed=step)
        inputs, targets = normal(5, 16, D + A, seed=step), normal(5, 16, D + 1, seed=step + 99)
        result += [v.clone() for v in update_policy(rows.to(device), noise.to(device)).values()]
        for count in (16, 4):
            batch = (tensor[:, :count].to(device) for tensor in (inputs, targets))
            result.append(update_model(*batch).clone())
    return [tensor.detach().cpu() for tensor in (*result, *agent.parameters())]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs g++, which is not installed.")
def test_compiled_updates_equal_eager():
    """Losses and parameters after one step through generated code, to rounding."""
    torch._dynamo.reset()
    for fast, eager in zip(learned(compile=True), learned(), strict=True):
        torch.testing.assert_close(fast, eager, rtol=1e-4, atol=1e-5)


def test_graphs_are_of_the_largest_shape(monkeypatch):
    """With stand-ins for CUDA: three eager calls, then replays on the new numbers; smaller calls stay eager."""
    eager, captured = [], []

    class Graph:
        def replay(self):
            captured[-1].result.copy_(captured[-1].static[0].sum() + captured[-1].static[1].sum())

    class Capture(contextlib.nullcontext):
        def __enter__(self):
            captured.append(graphed)

    monkeypatch.setattr(torch.cuda, "Stream", lambda: SimpleNamespace(wait_stream=lambda other: None))
    monkeypatch.setattr(torch.cuda, "current_stream", torch.cuda.Stream)
    monkeypatch.setattr(torch.cuda, "stream", contextlib.nullcontext)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph: Capture())

    def add(x, y):
        eager.append(x.numel())
        return x.sum() + y.sum()

    graphed = mbpo.GraphedFunction(add)
    for i, size in enumerate([2, 2, 4, 2, 4, 4, 4, 2, 4]):
        x, y = normal(size, seed=i), normal(size, seed=i + 50)
        torch.testing.assert_close(graphed(x, y), x.sum() + y.sum())
    assert eager == [2, 2, 4, 2, 4, 4, 4, 2], "the fourth of size 4 is captured, the fifth only replayed"
    assert len(captured) == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="There is no GPU on this machine.")
@pytest.mark.parametrize("cudagraphs", [False, True])
def test_whole_runs_on_a_gpu(cudagraphs):
    """Trainings, rollouts, updates, an evaluation and a resume."""
    settings = SMALL | TINY | {"cuda": True, "cudagraphs": cudagraphs, "eval_frequency": 30}
    run_dir = mbpo.main(Args(**settings | {"total_timesteps": 36}))
    mbpo.main(Args(**settings | {"resume": run_dir}))
    state = torch.load(os.path.join(run_dir, "checkpoint.pt"), weights_only=True)
    assert state["parts"]["counters"]["num_updates"] == 72


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU, and there is none on this machine.")
@pytest.mark.parametrize("compile", [False, True])
def test_cuda_graph_updates_equal_eager(compile):
    """Six steps, the last three of them replayed from the graphs: the same losses and parameters."""
    for fast, eager in zip(learned("cuda", 6, cudagraphs=True, compile=compile), learned("cuda", 6), strict=True):
        torch.testing.assert_close(fast, eager, rtol=1e-3, atol=1e-4)


def test_compile_compiles_the_losses(monkeypatch):
    """--compile: the three large losses, and nothing else is changed."""
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda function: (compiled.append(function), function)[1])
    eager, fast = run_small(seed=3), run_small(compile=True, exp_name="compiled", seed=3)
    assert compiled == [mbpo.model_loss, mbpo.critic_loss, mbpo.actor_loss]
    for name, tensor in eager["parts"]["agent"].items():
        assert torch.equal(tensor, fast["parts"]["agent"][name]), name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("env_id", "steps", "expected"), [("InvertedPendulum-v5", 4_000, 950), ("Pendulum-v1", 2_500, -300)]
)
def test_learns(env_id, steps, expected):
    """Published settings, about ten minutes on one core: the last evaluation, where random play has 5 and -1,174."""
    run_dir = mbpo.main(Args(env_id=env_id, total_timesteps=steps, eval_frequency=steps, eval_episodes=5, cuda=False))
    events = EventAccumulator(run_dir)
    events.Reload()
    assert events.Scalars("eval/episodic_return")[-1].value > expected


CONTROL = {"learning_starts": 200, "total_timesteps": 400, "epoch_length": 100, "model_train_frequency": 100}


CONTROL |= {"eval_frequency": 400, "eval_episodes": 1, "checkpoint_frequency": 0}


LATE = CONTROL | {"total_timesteps": 1000, "learning_starts": 800, "eval_frequency": 1000}


MODELS = {
    "point": {"eval_frequency": 24},
    "two points": {"eval_frequency": 24, "total_timesteps": 72, **TWO_ENVS},
    "deadly": {"env_id": "fake_envs:DeadlyPoint-v0", "eval_frequency": 24},
    "Pendulum": {"env_id": "Pendulum-v1", **CONTROL},
    "Hopper": {"env_id": "Hopper-v5", **CONTROL},
    "walker": {"env_id": "walker-walk", **LATE, "buffer_size": 1000},
}


@pytest.mark.parametrize("kind", MODELS)
def test_mbpo_logs_everything_and_moves_all_parameters(kind):
    """Each kind of environment: tags, finite values, growing steps, files in the run folder, trained parameters."""
    settings = MODELS[kind]
    args, run_dir = mbpo.with_task_defaults(tiny(mbpo, **settings)), run(mbpo, **settings)
    expected = {"charts/episodic_return", "charts/episodic_length", "charts/SPS"}
    expected |= {"eval/episodic_return", "eval/episodic_return_std"}
    expected |= {f"losses/{name}" for name in ("qf1_loss", "qf2_loss", "qf_loss", "actor_loss", "alpha_loss", "alpha")}
    expected |= {"losses/qf_values", "losses/model_nll", "losses/model_holdout_mse"}
    expected |= {f"model/{name}" for name in ("weighted_mse", "disagreement", "max_logvar", "min_logvar", "epochs")}
    expected |= {"model/rollout_length", "model/mean_rollout"}
    expected |= {f"model/{name}_{i}" for name in ("holdout_mse", "weighted_mse") for i in range(3)}
    curves = {f"open_loop/{name}_error_{k}" for name in ("obs", "reward") for k in range(1, 26)}
    tags = scalars(run_dir)
    assert expected <= set(tags) <= expected | curves
    assert curves <= set(tags) or kind not in ("Pendulum", "walker")
    assert list(Path(run_dir).glob("open_loop_error_*.png"))
    assert_healthy(run_dir)
    trained = list(range(args.learning_starts, args.total_timesteps, args.model_train_frequency))
    assert [step for step, _ in tags["losses/model_nll"]] == [step + args.num_envs for step in trained]
    state = load(run_dir)
    saved = state["parts"]
    assert state["global_step"] == args.total_timesteps
    assert saved["counters"]["num_updates"] == args.total_timesteps - args.learning_starts > 0
    envs = mbpo.make_vector_env(args, 1)
    torch.manual_seed(args.seed)
    spaces = envs.single_observation_space, envs.single_action_space
    untrained = mbpo.Agent(*(space.shape[0] for space in spaces), args).state_dict()
    envs.close()
    assert untrained.keys() == saved["agent"].keys()
    still = [name for name, tensor in untrained.items() if torch.equal(tensor, saved["agent"][name])]
    assert set(still) <= {"ensemble.elites"}


def test_mbpo_begins_where_its_random_steps_end():
    """A model's curves begin one step after learning_starts; rollouts of one step are as long as that."""
    run_dir = run(mbpo)
    tags = scalars(run_dir)
    for tag in ("model/rollout_length", "model/mean_rollout"):
        assert tags[tag] == [(25, 1), (37, 1)]
    assert [step for step, _ in tags["losses/model_nll"]] == [25, 37]
    for name in ("max_logvar", "min_logvar"):
        bounds = load(run_dir)["parts"]["agent"][f"ensemble.{name}"]
        assert tags[f"model/{name}"][-1][1] == pytest.approx(bounds.mean().item())
    errors = [[value for _, value in tags[f"model/holdout_mse_{i}"]] for i in range(3)]
    assert np.mean(errors, 0) == pytest.approx([value for _, value in tags["losses/model_holdout_mse"]])


def test_mbpo_trains_again_once_a_replay_is_refilled(monkeypatch):
    """Without the saved buffers there is nothing to sample from: the policy refills the replay, then the ensemble is
    trained although it is not yet due."""
    settings = {"save_buffer": False, "learning_starts": 6, "model_train_frequency": 24}
    run_dir, acted, act = run(mbpo, **settings, total_timesteps=36), [], mbpo.act
    monkeypatch.setattr(mbpo, "act", lambda *args: (acted.append(args), act(*args))[1])
    resume(mbpo, run_dir, **settings, total_timesteps=48)
    assert len(acted) == 12, "no random steps but those of the beginning"
    assert [step for step, _ in scalars(run_dir)["losses/model_nll"]] == [7, 31, 43]


def test_mbpo_rollouts_end_where_everything_dies(monkeypatch):
    """The mean length of rollouts is what was rolled, not what was planned."""
    monkeypatch.setitem(fake_envs.POINT_ENDS, "Point", -1.0)
    monkeypatch.setattr(mbpo, "require_rule", lambda *args: None)  # the real points do not die
    tags = scalars(run(mbpo, rollout_schedule=(0, 1, 3, 3)))
    assert tags["model/rollout_length"] == [(25, 3), (37, 3)] and tags["model/mean_rollout"] == [(25, 1), (37, 1)]


def test_mbpo_resumes_from_the_step_of_a_training(monkeypatch):
    """Killed right after the checkpoint that follows a training: its curves are kept and it is not done again."""
    whole = run(mbpo, checkpoint_frequency=12)
    folders, save = [], mbpo.save_checkpoint

    def save_and_die(run_dir, args, global_step, *rest):
        save(run_dir, args, global_step, *rest)
        if global_step == 36:
            folders.append(os.path.abspath(run_dir))
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(mbpo, "save_checkpoint", save_and_die)
        run(mbpo, checkpoint_frequency=12)
    resume(mbpo, folders[0], checkpoint_frequency=12)
    assert differences(load(whole)["parts"], load(folders[0])["parts"]) == []
    assert scalars(folders[0])["losses/model_nll"] == scalars(whole)["losses/model_nll"]


@pytest.mark.parametrize("num_envs", [1, 2])
def test_mbpo_replay_holds_what_was_played(monkeypatch, num_envs):
    """Each environment's steps in their order; a time limit is no termination, death is."""
    for name, fatal in (("Counter", None), ("DeadlyCounter", 8), ("BothEndsCounter", 12)):
        ends = (lambda o, fatal=fatal: o[..., 1] == fatal) if fatal else mbpo.never_terminates
        monkeypatch.setitem(mbpo.TERMINATIONS, name, ends)
        settings = {"env_id": f"fake_envs:{name}-v0", "num_envs": num_envs, "total_timesteps": 96}
        run_dir = run(mbpo, **settings, learning_starts=95, updates_per_step=0)
        rows = load(run_dir)["parts"]["replay"]["rows"].reshape(-1, num_envs, 9)
        obs, action, reward, next_obs, terminated = rows.split([3, 1, 1, 3, 1], -1)
        length = 8 if fatal == 8 else 12
        count = (torch.arange(96 // num_envs) % length + 1)[:, None].expand(-1, num_envs)
        assert (obs[..., 1] == count - 1).all() and (next_obs[..., 1] == count).all()
        assert (reward[..., 0] == count).all() and (obs[..., 0] == next_obs[..., 0]).all()
        assert torch.equal(terminated[..., 0].bool(), count == (fatal or -1))
        torch.testing.assert_close(next_obs[..., 2], 2 * action[..., 0])  # the Box is [-2, 2]
        assert (obs[1:, :, 2] == next_obs[:-1, :, 2])[count[1:, 0] > 1].all() and (action.abs() <= 1).all()


def test_mbpo_stops_where_the_rule_is_wrong(monkeypatch):
    """At the third termination that the rule does not know, long before anything is learned."""
    monkeypatch.setitem(mbpo.TERMINATIONS, "DeadlyCounter", mbpo.never_terminates)
    with pytest.raises(SystemExit, match="at step 23 the rule of TERMINATIONS in .*mbpo.py is not the environment's"):
        run(mbpo, env_id="fake_envs:DeadlyCounter-v0")


@pytest.mark.parametrize("kind", ["actor.net.0.weight", "ensemble.layers.0.weight"])
def test_mbpo_stops_where_a_loss_is_not_finite(kind):
    """A poisoned parameter is reported as a loss; the checkpoint from before stays."""
    run_dir = run(mbpo)
    path = Path(run_dir, "checkpoint.pt")
    state = load(run_dir)
    state["parts"]["agent"][kind][:] = math.nan
    torch.save(state, path)
    poisoned = path.read_bytes()
    with pytest.raises(SystemExit) as stopped:
        resume(mbpo, run_dir, total_timesteps=96)
    assert re.search(r"not finite at step \d+: ", str(stopped.value.code))
    assert path.read_bytes() == poisoned


def test_a_stopped_training_of_the_ensemble_is_made_again(monkeypatch):
    """SIGTERM between its batches: at once, the checkpoint from before it; resumed, all is as if never stopped."""
    whole = run(mbpo, total_timesteps=48)
    step = mbpo.update_model
    calls = []

    def stopping(*args, **kwargs):
        calls.append(1)
        if len(calls) == 5:  # in the second epoch of the second training
            os.kill(os.getpid(), signal.SIGTERM)
        return step(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(mbpo, "update_model", stopping)
        with pytest.raises(SystemExit) as stopped:
            run(mbpo, total_timesteps=48)
    assert stopped.value.code == 128 + signal.SIGTERM and len(calls) == 5
    folder = str(next(Path.cwd().glob("run_1/runs/*")))
    assert load(folder)["global_step"] in (24, 36)
    resume(mbpo, folder, total_timesteps=48)
    assert differences(load(whole), load(folder)) == []
