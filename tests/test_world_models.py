"""Numbers of world_models.py: each piece against plain loops from the equations, torch.distributions, or the sheets."""

import copy
import importlib
import io
import itertools
import math
import os
import re
import shutil
import signal
import socket
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import cma
import fake_envs
import gymnasium as gym
import matplotlib.figure
import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from runs import (
    ROOT,
    TWO_ENVS,
    assert_healthy,
    close_writers,
    command_line,
    copy_of,
    differences,
    error_of,
    image_tags,
    load,
    losses,
    resume,
    run,
    scalars,
    tiny,
)
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from torch.distributions import Categorical, MixtureSameFamily, Normal, kl_divergence

import world_models
from world_models import Args, ArrayFile, HeldActions, Latents, ReplayBuffer, Spec

SMALL = {"latent_size": 4, "vae_depth": 2, "hidden_size": 8, "num_mixtures": 3, "population": 4, "episodes": 2}
SMALL |= {"cuda": False, "dream_length": 12}
BOX = Spec("box", 2, 12, True, True)
DOOM = Spec("thirds", 1, 2100, True, False)
CAR = Spec("car", 3, 1000, False, False)
QUIET = SimpleNamespace(requested=0)


def make_args(**changes) -> Args:
    return world_models.with_task_defaults(Args(**SMALL | changes))


def make_agent(spec=BOX, seed=1, **changes):
    torch.manual_seed(seed)
    return world_models.Agent(spec, make_args(**changes))


def make_run(spec=BOX, envs=None, **changes):
    """What the stages work on, in a run folder of its own."""
    args = make_args(**{"total_timesteps": 48, "eval_frequency": 0, "checkpoint_frequency": 0} | changes)
    return world_models.Stages(args, None, spec, envs)


def generator(seed: int = 1) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, generator=generator(seed))


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)


def nothing(num_actions: int):
    """The policy of the zero action."""
    return lambda features, jobs, num_jobs: torch.zeros(len(jobs), num_actions)


# === Networks ===


@pytest.mark.parametrize(
    ("env_id", "spec", "vae", "model", "controller"),
    [("CarRacing-v3", CAR, 4_348_547, 422_368, 867), ("VizdoomTakeCover-v1", DOOM, 4_446_915, 1_678_785, 1_088)],
)
def test_parameter_counts_are_the_papers(env_id, spec, vae, model, controller):
    """The table of the paper's appendix; the second bias of torch's LSTM is not trained."""
    agent = world_models.Agent(spec, world_models.with_task_defaults(Args(env_id=env_id)))
    assert (count(agent.vae), count(agent.model), agent.controller.numel()) == (vae, model, controller)


def test_published_settings():
    """What a user gets with an id alone."""
    doom, car = (world_models.with_task_defaults(Args(env_id=i)) for i in ("VizdoomTakeCover-v1", "CarRacing-v3"))
    assert (doom.controller_env, doom.latent_size, doom.hidden_size, doom.model_updates) == ("dream", 64, 512, 24_400)
    assert (car.controller_env, car.latent_size, car.hidden_size, car.model_updates) == ("real", 32, 256, 4_000)
    assert (doom.heads, doom.at_rest, doom.pessimism, doom.dream_length) == (True, 1.0, 1.0, None)
    assert (car.heads, car.at_rest, car.pessimism, car.dream_length) == (False, 1.0, 1.0, None)
    assert world_models.with_task_defaults(Args(env_id="CarRacing-v3", controller_env="dream")).heads
    assert world_models.with_task_defaults(Args(env_id="CarRacing-v3", heads=True)).controller_env == "real"
    assert (doom.vae_lr, doom.vae_batch_size, doom.vae_epochs, doom.kl_tolerance) == (1e-4, 100, 10, 0.5)
    assert (doom.population, doom.episodes, doom.generations, doom.sigma, doom.temperature) == (64, 16, 1800, 0.1, 1.15)
    assert (doom.model_lr, doom.model_lr_decay, car.model_lr_decay) == (1e-3, 0.99999, 1.0)
    assert (doom.end_weight, car.end_weight) == (10.0, 1.0)
    assert world_models.with_task_defaults(Args(env_id="CarRacing-v3", latent_size=7)).latent_size == 7
    lengths = ("max_hold", "min_episode_length", "sequence_length")  # in actions, of 1, 4 and 300 steps
    for env_id, repeat, expected in (
        ("CarRacing-v3", 1, (8, 2, 1000)), ("CarRacing-v3", 4, (2, 2, 250)),
        ("VizdoomTakeCover-v1", 4, (3, 26, 125)), ("CarRacing-v3", 300, (1, 2, 4)),
    ):  # fmt: skip
        args = world_models.with_task_defaults(Args(env_id=env_id, action_repeat=repeat))
        assert tuple(getattr(args, name) for name in lengths) == expected


def test_decoder_equals_transposed_convolutions():
    """The two shortcuts (matrix product, pixel shuffle) give what the plain layers give, gradients included."""
    vae, z = world_models.VAE(4, 2).double(), normal(3, 4).double()
    x = vae.dense(z)[:, :, None, None]
    for layer in (vae.deconv1, vae.deconv2, vae.deconv3):
        x = F.relu(layer(x))
    plain = torch.sigmoid(vae.deconv4(x))
    torch.testing.assert_close(vae.decode(z), plain)
    parameters = [vae.deconv1.weight, vae.deconv1.bias, vae.deconv4.weight, vae.deconv4.bias]
    expected = torch.autograd.grad((plain**2).sum(), parameters)
    torch.testing.assert_close(torch.autograd.grad((vae.decode(z) ** 2).sum(), parameters), expected)


def test_encoder_and_preprocessing():
    """Pixels become [0, 1] in the order of channels, rows, columns; two layers on top of the four convolutions."""
    frames = torch.randint(256, (2, 64, 64, 3), dtype=torch.uint8, generator=generator())
    image = world_models.preprocess(frames)
    assert image.shape == (2, 3, 64, 64) and image[1, 2, 5, 7] == frames[1, 5, 7, 2] / 255
    vae = world_models.VAE(4, 2)
    x = image
    for layer in (vae.conv1, vae.conv2, vae.conv3, vae.conv4):
        x = F.relu(layer(x))
    assert x.shape == (2, 16, 2, 2)
    torch.testing.assert_close(vae.encode(image), (vae.mu(x.flatten(1)), vae.logvar(x.flatten(1))))


def test_initial_weights_are_tensorflows():
    """Glorot uniform within its bound and close to it, zero biases, forget-gate bias one."""
    agent = make_agent(DOOM, latent_size=64, hidden_size=64)
    model = agent.model
    bound = math.sqrt(6 / (66 + 64 + 4 * 64))  # of TensorFlow's one matrix
    for weight in (model.lstm.weight_ih_l0, model.lstm.weight_hh_l0):
        assert 0.99 * bound < weight.abs().max() <= bound
    assert model.lstm.bias_ih_l0.tolist() == [0] * 64 + [1] * 64 + [0] * 128
    assert not model.lstm.bias_hh_l0.any() and not model.lstm.bias_hh_l0.requires_grad
    assert not model.head.bias.any() and not agent.vae.conv1.bias.any()
    bound = math.sqrt(6 / (64 + model.head.out_features))
    assert 0.99 * bound < model.head.weight.abs().max() <= bound


def former_model(model, z, action, first, h, c):
    """M as it was before nn.LSTM: one matrix and one bias, a loop over the steps, gates in, forget, out, new."""
    i, f, g, o = torch.cat([model.lstm.weight_ih_l0, model.lstm.weight_hh_l0], 1).chunk(4)
    kernel, outputs = torch.cat([i, f, o, g]).t(), []
    bi, bf, bg, bo = model.lstm.bias_ih_l0.chunk(4)
    bias = torch.cat([bi, bf, bo, bg])
    for t in range(len(z)):
        x = [z[t], action[t]] + ([first[t, :, None]] if model.spec.is_takecover else [])
        i, f, o, g = (torch.cat([*x, h], 1) @ kernel + bias).chunk(4, 1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(c)
        outputs.append(h @ model.head.weight.t() + model.head.bias)
    return torch.stack(outputs), h, c


@pytest.mark.parametrize("spec", [BOX, DOOM], ids=["box", "takecover"])
def test_lstm_is_the_former_one(spec):
    """Outputs, last state and all gradients, those of the first state and of z too; single steps as in a dream."""
    model, T, B = make_agent(spec).model.double(), 7, 3
    nn.init.normal_(model.lstm.bias_ih_l0)
    z, action = normal(T, B, 4).double().requires_grad_(), normal(T, B, spec.action_dim, seed=2).double()
    first = torch.zeros(T, B).double()
    first[0, 1] = first[3, 0] = 1
    h0, c0 = (normal(B, 8, seed=seed).double().requires_grad_() for seed in (3, 4))
    out, (h, c) = model(z, action, first, (h0[None], c0[None]))
    expected = former_model(model, z, action, first, h0, c0)
    torch.testing.assert_close((out, h[0], c[0]), expected)
    variables = [z, h0, c0] + [parameter for parameter in model.parameters() if parameter.requires_grad]
    weight = normal(*out.shape, seed=5).double()
    ours, theirs = (torch.autograd.grad((x * weight).sum(), variables) for x in (out, expected[0]))
    torch.testing.assert_close(ours, theirs)
    state = h0[None], c0[None]
    for t in range(T):
        step, state = model(z[t : t + 1], action[t : t + 1], first[t : t + 1], state)
        torch.testing.assert_close(step[0], out[t])


@pytest.mark.parametrize(("spec", "heads"), [(CAR, 0), (DOOM, 1), (BOX, 2)])
def test_outputs_are_split_into_mixture_and_heads(spec, heads):
    model = make_agent(spec).model
    size = 3 * 3 * 4
    assert model.head.out_features == size + heads
    out = torch.arange(2.0 * (size + heads)).view(2, -1)
    log_pi, mu, log_sigma, done, reward = model.split(out)
    assert log_pi.shape == (2, 3, 4) and mu[0, 1, 2] == 12 + 4 + 2 and log_sigma[0, 2, 3] == 24 + 11
    assert (done is None) == (heads == 0) and (reward is None) == (heads < 2)
    assert done is None or done.tolist() == [size, 2 * size + heads]
    assert reward is None or reward.tolist() == [size + 1, 2 * size + 3]


# === Losses ===


def test_vae_loss_is_the_summed_error_and_the_kl_of_torch():
    """Per frame: squared error over all pixels, KL(N(mu, sigma) || N(0, 1)) over all dimensions; then the mean."""
    vae, image, noise = world_models.VAE(4, 2), torch.rand(5, 3, 64, 64, generator=generator()), normal(5, 4)
    with torch.no_grad():
        vae.mu.weight *= 30
    mu, logvar = vae.encode(image)
    std = torch.exp(logvar / 2)
    kl = kl_divergence(Normal(mu, std), Normal(0.0, 1.0)).sum(1)
    recon = torch.stack([((a - b) ** 2).sum() for a, b in zip(vae.decode(mu + std * noise), image, strict=True)])
    for tolerance in (0.0, kl.median().item() / 4, 10.0):
        loss, metrics = world_models.vae_loss(vae, image, noise, tolerance)
        expected = recon + torch.maximum(kl, torch.tensor(4 * tolerance))
        torch.testing.assert_close(loss, expected.mean())
        torch.testing.assert_close(metrics["losses/vae_recon_loss"], recon.mean())
        torch.testing.assert_close(metrics["losses/vae_kl_loss"], kl.mean())


def test_kl_gives_no_gradient_below_its_floor():
    """Far below: the gradient is the reconstruction's alone; above: it is not. The floor is per frame."""
    vae, image, noise = world_models.VAE(4, 2), torch.rand(2, 3, 64, 64, generator=generator()), normal(2, 4)
    weights = list(vae.parameters())

    def gradient(tolerance: float, part: slice = slice(None)) -> torch.Tensor:
        loss, _ = world_models.vae_loss(vae, image[part], noise[part], tolerance)
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, weights)])

    mu, logvar = vae.encode(image)
    recon = ((vae.decode(mu + torch.exp(logvar / 2) * noise) - image) ** 2).sum((1, 2, 3)).mean()
    alone = torch.cat([g.flatten() for g in torch.autograd.grad(recon, weights)])
    torch.testing.assert_close(gradient(100.0), alone, rtol=1e-4, atol=1e-6)
    assert not torch.allclose(gradient(0.0), alone, rtol=1e-3)
    kl = kl_divergence(Normal(mu, torch.exp(logvar / 2)), Normal(0.0, 1.0)).sum(1)
    between = kl.mean().item() / 4  # one frame above, one below
    low, high = int(kl.argmin()), int(kl.argmax())
    one = gradient(100.0, slice(low, low + 1)) + gradient(0.0, slice(high, high + 1))
    torch.testing.assert_close(gradient(between), one / 2, rtol=1e-4, atol=1e-6)
    before = torch.cat([weight.detach().flatten() for weight in weights])
    expected = 0.1 * gradient(0.0)
    world_models.update_vae(vae, torch.optim.SGD(weights, 0.1), image, noise, make_args(kl_tolerance=0.0))
    after = torch.cat([weight.detach().flatten() for weight in weights])
    torch.testing.assert_close(before - after, expected, rtol=1e-3, atol=1e-5)


def mixtures(*shape: int, seed: int = 1) -> tuple[torch.Tensor, ...]:
    """Weights' logits, means and log standard deviations (*shape, K, Z), in double precision."""
    log_pi, mu, log_sigma = normal(3, *shape, 5, 4, seed=seed).double()
    return 2 * log_pi, 2 * mu, 0.5 * log_sigma


def distribution(log_pi, mu, log_sigma):
    log_pi, mu, log_sigma = (x.transpose(-1, -2) for x in (log_pi, mu, log_sigma))
    return MixtureSameFamily(Categorical(logits=log_pi), Normal(mu, log_sigma.exp()))


def test_mixture_likelihood_is_that_of_torch_for_each_dimension():
    """Per dimension, far tails included, where log(sum(exp)) by hand is -inf."""
    parameters = mixtures(6, 3)
    for scale in (1.0, 1e3):
        target = scale * normal(6, 3, 4, seed=5).double()
        nll = world_models.mdn_nll(*parameters, target)
        assert nll.shape == (6, 3, 4) and nll.isfinite().all()
        torch.testing.assert_close(nll, -distribution(*parameters).log_prob(target))


def test_derivatives_of_the_likelihood_are_those_of_autograd():
    """Against those of torch's distributions, for uneven weights of the terms."""
    parameters = [x.requires_grad_() for x in mixtures(6, 3)]
    target, weight = 3 * normal(6, 3, 4, seed=5).double(), normal(6, 3, 4, seed=6).double()
    ours = torch.autograd.grad((world_models.mdn_nll(*parameters, target) * weight).sum(), parameters)
    expected = torch.autograd.grad((-distribution(*parameters).log_prob(target) * weight).sum(), parameters)
    torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("temperature", [0.1, 0.5, 1.0, 1.15, 2.0])
def test_samples_have_the_moments_of_the_tempered_mixture(temperature):
    """Weights softmax(logits / tau), variances sigma^2 tau: mean, variance and independence of the dimensions."""
    log_pi, mu, log_sigma = (x[0] for x in mixtures(1))
    num, tau = 200_000, temperature
    uniform, noise = torch.rand(num, 4, generator=generator()).double(), normal(num, 4, seed=7).double()
    stacked = (x.expand(num, -1, -1) for x in (log_pi, mu, log_sigma))
    z = world_models.mixture_sample(*stacked, uniform, noise, tau)
    pi = torch.softmax(log_pi / tau, 0)
    mean = (pi * mu).sum(0)
    variance = (pi * (mu**2 + tau * torch.exp(2 * log_sigma))).sum(0) - mean**2
    error = (variance / num).sqrt()
    assert ((z.mean(0) - mean).abs() < 5 * error).all()
    fourth = ((z - mean) ** 4).mean(0)
    assert ((z.var(0) - variance).abs() < 5 * ((fourth - variance**2) / num).sqrt()).all()
    correlation = torch.corrcoef(z.t())
    assert (correlation - torch.eye(4)).abs().max() < 0.015  # one component pick for each dimension


@pytest.mark.parametrize("pessimism", [1.0, 5.0])
def test_loss_of_the_model_is_that_of_a_loop(pessimism):
    """Mixture: mean over what has a successor in its episode. End: weighted, every step. Reward: every step, too much
    of it weighted.

    Two sequences are padded; what stands in the padding changes nothing.
    """
    model, T, B, lengths = make_agent(BOX).model, 6, 3, (6, 4, 5)
    model.reward_mean.fill_(0.5)
    model.reward_std.fill_(2.0)
    mask = (torch.arange(T)[:, None] < torch.tensor(lengths)).float()
    has_next, terminated = mask.clone(), torch.zeros(T, B)
    has_next[3, 1] = has_next[4, 2] = 0  # ends of episodes; the first sequence goes on after its last step
    terminated[3, 1] = 1  # the other one was a time limit
    batch = {"z": normal(T, B, 4), "next_z": normal(T, B, 4, seed=4), "first": torch.zeros(T, B), "mask": mask}
    batch |= {"action": normal(T, B, 2, seed=2), "reward": normal(T, B, seed=3)}
    batch |= {"has_next": has_next, "terminated": terminated}
    before = {name: tensor.clone() for name, tensor in batch.items()}
    loss, terms, logit = world_models.model_loss(model, batch, 10.0, pessimism)
    out, _ = model(batch["z"], batch["action"], batch["first"], model.initial(B))
    log_pi, mu, log_sigma, end_logit, reward = model.split(out)
    assert torch.equal(logit, end_logit)
    nll, end, error = [], [], []
    for b in range(B):
        for t in range(lengths[b]):
            p = torch.sigmoid(logit[t, b])
            end.append(-10 * torch.log(p) if terminated[t, b] else -torch.log(1 - p))
            off = reward[t, b] - (batch["reward"][t, b] - 0.5) / 2
            error.append((pessimism if off > 0 else 1) * off**2)
            if has_next[t, b]:
                d = distribution(log_pi[t, b], mu[t, b], log_sigma[t, b])
                nll.append(-d.log_prob(batch["next_z"][t, b]).mean())
    assert (len(nll), len(end)) == (13, 15)
    means = [torch.stack(values).mean() for values in (nll, end, error)]
    for name, mean in zip(("mdn_nll", "done_loss", "reward_loss"), means, strict=True):
        torch.testing.assert_close(terms[f"losses/{name}"], mean)
    torch.testing.assert_close(loss, sum(means))
    assert all(torch.equal(batch[name], before[name]) for name in batch)
    for name in ("z", "next_z", "action", "reward"):
        batch[name][4:, 1] = 1e3
    torch.testing.assert_close(world_models.model_loss(model, batch, 10.0, pessimism)[0], loss)


def test_a_pessimist_expects_less():
    """A constant prediction that minimises the loss on rewards 0 and 1: 1/2 by the plain error, 1/6 where too much
    costs five times as much: 5 p = 1 - p."""
    model = make_agent(BOX).model
    batch = {"z": torch.zeros(2, 1, 4), "next_z": torch.zeros(2, 1, 4), "action": torch.zeros(2, 1, 2)}
    batch |= {name: torch.zeros(2, 1) for name in ("first", "terminated", "has_next")}
    batch |= {"mask": torch.ones(2, 1), "reward": torch.tensor([[0.0], [1.0]])}
    nn.init.zeros_(model.head.weight)
    for pessimism, expected in ((1.0, 1 / 2), (5.0, 1 / 6)):
        for _ in range(200):
            loss, *_ = world_models.model_loss(model, batch, 1.0, pessimism)
            (gradient,) = torch.autograd.grad(loss, model.head.bias)
            model.head.bias.data[-1] -= 0.2 * gradient[-1]
        assert model.head.bias[-1].item() == pytest.approx(expected, abs=1e-4)


def test_gradients_of_the_model_are_clipped_by_value():
    """Each to [-1, 1] on its own, not the whole by its norm."""
    model = make_agent(BOX).model
    batch = {"z": normal(4, 2, 4), "next_z": 50 * normal(4, 2, 4, seed=2), "action": normal(4, 2, 2, seed=3)}
    batch |= {name: torch.zeros(4, 2) for name in ("first", "terminated", "reward")}
    batch |= {"mask": torch.ones(4, 2), "has_next": torch.ones(4, 2)}
    loss, *_ = world_models.model_loss(model, batch, 1.0, 1.0)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gradients = torch.autograd.grad(loss, parameters)
    before = [parameter.detach().clone() for parameter in parameters]
    world_models.update_model([model], torch.optim.SGD(model.parameters(), 1.0), batch, make_args())
    assert max(gradient.abs().max() for gradient in gradients) > 1 and not model.lstm.bias_hh_l0.any()
    for old, new, gradient in zip(before, parameters, gradients, strict=True):
        torch.testing.assert_close(old - new, gradient.clamp(-1, 1), rtol=1e-4, atol=1e-6)


def test_several_models_learn_each_for_itself():
    """From weights of their own, on the same batch, as each alone; their mean is logged, so nan of one is seen."""
    agent, alone = make_agent(BOX, num_models=3), make_agent(BOX, num_models=3)
    assert len(agent.models()) == 3 and agent.models()[0] is agent.model
    starts = torch.stack([model.head.weight for model in agent.models()])
    assert (starts[0] != starts[1]).any() and (starts[1] != starts[2]).any() and (starts[0] != starts[2]).any()
    weights = [weight for model in agent.models() for weight in model.parameters()]
    together = torch.optim.Adam(weights, 1e-2)
    single = [torch.optim.Adam(model.parameters(), 1e-2) for model in alone.models()]
    for step in range(3):
        batch = {"z": normal(4, 2, 4, seed=step), "next_z": 9 * normal(4, 2, 4, seed=9), "action": normal(4, 2, 2)}
        batch |= {name: torch.zeros(4, 2) for name in ("first", "terminated", "reward")}
        batch |= {"mask": torch.ones(4, 2), "has_next": torch.ones(4, 2)}
        logged = world_models.update_model(agent.models(), together, batch, make_args())
        pairs = zip(alone.models(), single, strict=True)
        expected = [world_models.update_model([model], optimizer, batch, make_args()) for model, optimizer in pairs]
        for name, mean in logged.items():
            torch.testing.assert_close(mean, sum(metrics[name] for metrics in expected) / 3)
        assert expected[0] != expected[1]
    assert all(torch.equal(x, alone.state_dict()[name]) for name, x in agent.state_dict().items())
    agent.models()[1].head.weight.data[0] = math.nan
    logged = world_models.update_model(agent.models(), together, batch, make_args())
    assert logged["losses/mdn_nll"].isnan() and agent.model.head.weight.isfinite().all()


def test_a_tile_is_worth_the_same_on_every_track():
    """0, 1 or 2 tiles of tracks of 224 to 366 tiles, and leaving the field."""
    for tiles in (230, 294, 366):
        rewards = np.array([-0.1, 1000 / tiles - 0.1, 2000 / tiles - 0.1, -100.0])
        np.testing.assert_allclose(world_models.learnable_rewards(rewards, CAR, 1, 1), [-0.1, 3.3, 6.7, -100])
        rewards[:3] -= 0.3  # actions of four steps
        np.testing.assert_allclose(world_models.learnable_rewards(rewards, CAR, 1, 4), [-0.4, 3.0, 6.4, -100])
    for rewards in (np.array([-0.1, -100.0]), np.zeros(0)):
        assert np.array_equal(world_models.learnable_rewards(rewards, CAR, 1, 1), rewards)
    assert world_models.learnable_rewards(np.array([1.3]), BOX, 5, 1) == [1.3]


def test_what_a_tile_pays_is_spread_over_the_steps_around_it():
    """3.4 for one tile, 6.8 for two, over five steps or those of them within the episode. Costs stay where they are."""
    rewards = np.full(12, -0.1)
    rewards[[4, 11]] += 1000 / 300, 2000 / 300
    expected = np.full(12, -0.1)
    expected[2:7] += 3.4 / 5
    expected[9:] += 6.8 / 3
    np.testing.assert_allclose(world_models.learnable_rewards(rewards, CAR, 5, 1), expected)
    for window in (1, 2, 3, 8, 11):
        assert world_models.learnable_rewards(rewards, CAR, window, 1).sum() == pytest.approx(3 * 3.4 - 12 * 0.1)
    rewards[-1] = -100
    assert world_models.learnable_rewards(rewards, CAR, 5, 1)[-1] == -100


def test_ten_frames_are_learned_by_heart():
    """V, by its own loss: from the error of the mean picture down to a twentieth of it."""
    torch.manual_seed(1)
    envs, frames = fake_envs.TinyPixels(), []
    for seed in range(10):
        frames.append(envs.reset(seed=seed)[0])
    image = world_models.preprocess(torch.from_numpy(np.stack(frames)))
    vae, draw = world_models.VAE(8, 8), generator()
    optimizer = torch.optim.Adam(vae.parameters(), 4e-3)
    for _ in range(300):
        optimizer.zero_grad()
        loss, metrics = world_models.vae_loss(vae, image, torch.randn(10, 8, generator=draw), 0.5)
        loss.backward()
        optimizer.step()
    baseline = ((image - image.mean(0)) ** 2).sum((1, 2, 3)).mean()
    assert metrics["losses/vae_recon_loss"] < baseline / 20


def test_model_learns_a_deterministic_sequence():
    """M on one episode whose z moves with the action: far below the entropy of what it is shown."""
    torch.manual_seed(1)
    model = make_agent(Spec("box", 1, 12, False, False), hidden_size=32, num_mixtures=2).model
    action = normal(20, 8, 1)
    z = torch.cat([torch.zeros(1, 8, 1), action.cumsum(0)[:-1]]).expand(-1, -1, 4) + 0.05 * normal(20, 8, 4, seed=2)
    first = torch.zeros(20, 8)
    first[0] = 1
    batch = {"z": z[:-1], "next_z": z[1:], "action": action[:-1], "first": first[:-1]}
    batch |= {name: torch.ones(19, 8) for name in ("mask", "has_next")}
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    for i in range(400):
        optimizer.zero_grad()
        loss, terms, _ = world_models.model_loss(model, batch, 10.0, 1.0)
        if i == 0:
            start = float(loss)
        loss.backward()
        nn.utils.clip_grad_value_(model.parameters(), 1.0)
        optimizer.step()
    assert start > 1.0 and terms["losses/mdn_nll"] < -0.3  # the noise alone: log 0.05 + 1.42 = -1.58


# === Acting ===


def test_actions_of_a_controller():
    """tanh, then the car's pedals, the one-hot maximum, or nothing; and what the environment gets."""
    features, weights = torch.ones(3, 1), torch.tensor([[[-2.0, 0.0, 0.5]], [[1.0, -9.0, -0.5]], [[0.1, 9.0, 9.0]]])
    raw = torch.tanh(weights[:, 0])
    car = world_models.controller_action(features, weights, "car")
    expected = [[float(s), (float(g) + 1) / 2, max(float(b), 0)] for s, g, b in raw]
    torch.testing.assert_close(car, torch.tensor(expected))
    assert car[0, 1] == 0.5  # zero weights drive at half throttle
    torch.testing.assert_close(world_models.controller_action(features, weights, "box"), raw)
    one_hot = world_models.controller_action(features, weights, "discrete")
    assert one_hot.tolist() == [[0, 0, 1], [1, 0, 0], [0, 1, 0]]
    assert world_models.env_action(one_hot.numpy(), "discrete").tolist() == [2, 0, 1]
    numbers = np.array([[-1], [-0.34], [-0.33], [0], [0.33], [0.34], [1]])
    assert world_models.env_action(numbers, "thirds").tolist() == [2, 2, 0, 0, 0, 1, 1]
    assert world_models.env_action(numbers, "box") is numbers


def test_each_candidate_plays_its_own_jobs():
    """Job j belongs to candidate j // E, also when only some of the jobs are left."""
    weights = normal(4, 5, 2)
    features, jobs = normal(6, 5, seed=2), torch.tensor([0, 2, 3, 7, 10, 11])
    actions = world_models.linear_policy(weights, "box")(features, jobs, 12)
    for row, job in enumerate(jobs.tolist()):
        torch.testing.assert_close(actions[row], torch.tanh(features[row] @ weights[job // 3]))


def test_features_are_z_h_and_a_one_or_z_c_h():
    z, c, h = torch.full((2, 4), 1.0), torch.full((1, 2, 8), 2.0), torch.full((1, 2, 8), 3.0)
    assert make_agent(BOX).features(z, (h, c))[0].tolist() == [1] * 4 + [3] * 8 + [1]
    assert make_agent(DOOM).features(z, (h, c))[0].tolist() == [1] * 4 + [2] * 8 + [3] * 8


@pytest.mark.parametrize("spec", [BOX, CAR, DOOM, Spec("discrete", 3, 12, True, True)], ids=lambda s: s.action_kind)
def test_random_actions_are_held(spec):
    """For 1 to max_hold steps, equally often; a new episode draws anew; the car seldom brakes."""
    held = HeldActions(400, make_agent(spec), make_args(max_hold=5), np.random.default_rng(1))
    actions = np.stack([held().copy() for _ in range(200)])  # (T, N, A)
    low, high = ([-1, 0, 0], [1, 1, 1]) if spec is CAR else (-1, 1)
    assert (actions >= low).all() and (actions <= high).all()
    runs = []
    for n in range(400):
        changes = np.flatnonzero((np.diff(actions[:, n], axis=0) != 0).any(1))
        runs += np.diff(changes).tolist()
    if spec.action_kind == "discrete":
        assert (actions.sum(-1) == 1).all() and min(runs) >= 1
        np.testing.assert_allclose(actions.mean((0, 1)), 1 / 3, atol=0.02)
    else:
        np.testing.assert_allclose(np.bincount(runs, minlength=6) / len(runs), [0] + [0.2] * 5, atol=0.02)
    if spec is CAR:
        assert 0.07 < (actions[:, :, 2] > 0).mean() < 0.13
    restart = np.arange(400) % 2 == 0
    held.left[:] = 3
    before, after = held.actions.copy(), held(restart)
    changed = (before != after).any(1)
    assert not changed[~restart].any() and changed[restart].mean() > 0.6


# === Dreams ===


def plain_dream(agent, controller, which: int, num_dreams: int, seed: int, args) -> tuple[float, int]:
    """One dream, alone, on the noise that the batched one draws: the equations of a step written out."""
    model, models, draw = agent.model, agent.models(), generator(seed)
    start = int(torch.randint(model.NUM_STARTS, (num_dreams,), generator=draw)[which])
    start += model.NUM_STARTS * int(torch.rand(num_dreams, generator=draw)[which] >= args.at_rest)
    noise = torch.randn(num_dreams, 4, generator=draw)[which]
    z = model.start_mu[start] + torch.exp(model.start_logvar[start] / 2) * noise
    states, total = [(m.start_h[start], m.start_c[start]) for m in models], 0.0
    for t in range(args.dream_length):
        h, c = states[0]
        seen = torch.cat([z, c, h] if model.spec.is_takecover else [z, h, torch.ones(1)])
        action = torch.tanh(seen @ controller)
        uniform = torch.rand(num_dreams, 4, generator=draw)[which]
        noise = torch.randn(num_dreams, 4, generator=draw)[which]
        first = torch.full((1, 1), float(t == 0 and start < model.NUM_STARTS))
        outs = []
        for i, (h, c) in enumerate(states):
            (out,), *state = former_model(models[i], z[None, None], action[None, None], first, h[None], c[None])
            states[i] = [x[0] for x in state]
            outs.append(out[0])
        by = int(torch.randint(len(models), (num_dreams,), generator=draw)[which]) if len(models) > 1 else 0
        out, model = outs[by], models[by]
        log_pi, mu, log_sigma = out[:36].view(3, 3, 4)
        z = torch.empty(4)
        for d in range(4):
            pi = torch.softmax(log_pi[:, d] / args.temperature, 0)
            k = 0
            while k < 2 and uniform[d] > pi[: k + 1].sum():
                k += 1
            z[d] = mu[k, d] + torch.exp(log_sigma[k, d]) * math.sqrt(args.temperature) * noise[d]
        total += 1.0 if model.spec.is_takecover else float(out[37] * model.reward_std + model.reward_mean)
        if out[36] > 0:
            return total, t + 1
    return total, args.dream_length


@pytest.mark.parametrize(
    ("spec", "num_models"),
    [(BOX._replace(time_limit=1000), 1), (DOOM, 1), (BOX._replace(time_limit=1000), 2), (DOOM, 3)],
    ids=["z h 1", "z c h", "z h 1, two models", "z c h, three models"],
)
def test_batched_dream_equals_single_ones(spec, num_models):
    """4 candidates times 3 dreams that end at many different steps, beyond several removals of the dead.

    Where several models dream, each of them reads every step, by its own state, and one says what comes.
    """
    args = make_args(dream_length=180, temperature=1.3, at_rest=0.5)
    agent = make_agent(spec, num_models=num_models)
    for i, model in enumerate(agent.models()):
        with torch.no_grad():
            model.lstm.weight_ih_l0 *= 3
            model.lstm.weight_hh_l0 *= 3
            model.head.weight[36] *= 10
            model.head.bias[36] = -3 if num_models < 3 else -4
            model.reward_mean.fill_(0.3 + i)
            model.reward_std.fill_(1.7)
            model.start_mu.copy_(normal(2000, 4, seed=3))
            model.start_logvar.copy_(normal(2000, 4, seed=4))
            model.start_h[1000:] = normal(1000, 8, seed=6 + 2 * i)
            model.start_c[1000:] = normal(1000, 8, seed=7 + 2 * i)
    weights = normal(4, *agent.controller.shape, seed=5)
    policy = world_models.linear_policy(weights, "box")
    seed = 12 if spec is DOOM else 11
    returns, lengths = world_models.dream(agent, policy, 12, 3, generator(seed), args)
    with torch.no_grad():
        single = [plain_dream(agent, weights[j // 3], j % 3, 3, seed, args) for j in range(12)]
    assert lengths.tolist() == [length for _, length in single]
    torch.testing.assert_close(returns, torch.tensor([total for total, _ in single]), rtol=1e-3, atol=1e-3)
    assert len(set(lengths.tolist())) > 4 and lengths.min() < 50 and lengths.max() > 50
    trace, policy = [], world_models.linear_policy(weights.flip(0), "box")
    world_models.dream(agent, policy, 12, 3, generator(seed), args, trace=trace)
    assert len(trace) == lengths[9] < lengths.max()  # of the first dream alone


def test_a_dream_ends_with_the_time_limit():
    """Whatever --dream-length says, and without it."""
    policy = world_models.linear_policy(normal(4, *make_agent(BOX).controller.shape, seed=5), "box")
    for dream_length, longest in ((180, 12), (None, 12), (7, 7)):
        args, agent = make_args(dream_length=dream_length), make_agent(BOX)
        with torch.no_grad():
            agent.model.head.bias[36] = -100  # nobody dies
        assert world_models.dream(agent, policy, 12, 3, generator(1), args)[1].tolist() == 12 * [longest]


def test_takecover_pays_for_each_environment_step_survived():
    """As the game does, also where an action lasts four of them."""
    agent = make_agent(DOOM, action_repeat=4)
    with torch.no_grad():
        agent.model.head.bias[36] = -100  # nobody dies
    returns, lengths = world_models.dream(agent, nothing(1), 2, 2, generator(1), make_args(dream_length=7))
    assert lengths.tolist() == [7, 7] and returns.tolist() == [28, 28]


@pytest.mark.parametrize("at_rest", [0.0, 0.25, 1.0])
def test_a_share_of_the_dreams_begins_at_rest(at_rest):
    """Where z is the one of a first frame, and M's state zero."""
    agent, seen, num = make_agent(BOX), [], 1000
    agent.model.start_mu[num:], agent.model.start_logvar[:] = 1.0, -50.0
    agent.model.start_h[num:] = agent.model.start_c[num:] = 2.0

    def policy(features, jobs, num_jobs):
        seen.append(features)
        return torch.zeros(len(jobs), 2)

    world_models.dream(agent, policy, 4000, 4000, generator(), make_args(at_rest=at_rest, dream_length=1))
    z, h = seen[0][:, :4], seen[0][:, 4:12]
    rest = z[:, 0] < 0.5
    assert float(rest.float().mean()) == pytest.approx(at_rest, abs=0.02 if 0 < at_rest < 1 else 0)
    assert not z[rest].any() or z[rest].abs().max() < 1e-6
    assert (h[rest] == 0).all() and (h[~rest] == 2).all()


def test_death_is_a_cut_that_no_temperature_touches():
    """P[end] above one half ends the dream, below it never does."""
    agent = make_agent(DOOM)
    nn.init.zeros_(agent.model.head.weight)
    policy = nothing(1)
    for bias, length in ((1e-3, 1), (-1e-3, 12)):
        nn.init.constant_(agent.model.head.bias, bias)
        for temperature in (0.1, 3.0):
            args = make_args(temperature=temperature)
            returns, lengths = world_models.dream(agent, policy, 5, 5, generator(), args)
            assert set(lengths.tolist()) == set(returns.tolist()) == {length}


def test_dreams_with_one_number_share_their_noise():
    """Two equal candidates get equal returns; two dreams of one candidate do not; another seed, other dreams."""
    agent, args = make_agent(BOX), make_args()
    nn.init.constant_(agent.model.head.bias, -3)
    policy = world_models.linear_policy(normal(1, *agent.controller.shape).repeat(2, 1, 1), "box")
    returns, _ = world_models.dream(agent, policy, 6, 3, generator(1), args)
    torch.testing.assert_close(returns[:3], returns[3:])
    assert len(set(returns[:3].tolist())) == 3
    assert not torch.allclose(returns, world_models.dream(agent, policy, 6, 3, generator(2), args)[0])


def test_open_loop_follows_the_data_and_then_itself():
    """Up to `context` z is the recorded one; beyond it, what a dream's step makes of the actions."""
    model, T = make_agent(BOX).model, 8
    batch = {"z": normal(T, 2, 4), "action": normal(T, 2, 2, seed=2), "first": torch.zeros(T, 2)}
    uniform, noise = torch.rand(T + 1, 2, 4, generator=generator()), normal(T + 1, 2, 4, seed=3)
    path = world_models.open_loop(model, batch, uniform, noise, 1.2, 3)
    torch.testing.assert_close(path[:3], batch["z"][:3])
    state = model.initial(2)
    with torch.no_grad():
        for t in range(T - 1):
            step = model, path[t], batch["action"][t], batch["first"][t], state, uniform[t], noise[t], 1.2
            z, state, _, _ = world_models.dream_step(*step)
            if t >= 2:
                torch.testing.assert_close(path[t + 1], z)


# === Recorded data ===


def recorded(run_dir: str = ".", lengths=(5, 3, 6, 4), seed: int = 1) -> ReplayBuffer:
    """Episodes of random frames and actions, every second of which terminates; the reward counts all steps."""
    rb, rng, total = ReplayBuffer(world_models.frames_file(run_dir)), np.random.default_rng(seed), 0
    for i, length in enumerate(lengths):
        frames = rng.integers(0, 256, (length, 64, 64, 3), np.uint8)
        rb.add(frames, rng.uniform(-1, 1, (length, 2)), np.arange(total, total + length), i % 2 == 0)
        total += length
    return rb


def test_episodes_are_kept_in_order():
    """Rewards, terminations, spans and returns; the frames in the file."""
    rb = recorded()
    assert np.concatenate([rewards for _, rewards in rb.episodes]).tolist() == list(range(18)) and len(rb) == 18
    assert rb.spans.tolist() == [[0, 5], [5, 8], [8, 14], [14, 18]] and rb.terminated == [True, False, True, False]
    assert rb.episodes[1][0].shape == (3, 2)
    rng = np.random.default_rng(1)
    first = rng.integers(0, 256, (5, 64, 64, 3), np.uint8)
    assert np.array_equal(rb.frames.rows()[:5], first) and rb.frames.rows().shape == (18, 64, 64, 3)


def test_recorded_data_comes_back_and_later_frames_are_cut_off():
    """What was appended after the checkpoint does not count; the next episode continues after what does."""
    rb = recorded()
    state = rb.state_dict()
    rb.add(np.zeros((2, 64, 64, 3), np.uint8), np.zeros((2, 2)), np.zeros(2), False)
    with open("frames.bin", "ab") as file:
        file.write(b"half a frame")
    other = ReplayBuffer(world_models.frames_file("."))
    other.load_state_dict(state)
    assert os.path.getsize("frames.bin") == 18 * 64 * 64 * 3
    for ours, theirs in zip(other.episodes, recorded("..").episodes, strict=True):
        assert all(np.array_equal(*columns) for columns in zip(ours, theirs, strict=True))
    assert other.terminated == [True, False, True, False]
    os.remove("../frames.bin")
    other.add(np.full((2, 64, 64, 3), 7, np.uint8), np.zeros((2, 2)), np.zeros(2), False)
    assert (other.frames.rows()[18:] == 7).all() and len(other) == 20


def test_a_full_disk_while_recording(monkeypatch):
    """One line, nothing of the checkpoint is touched."""
    if not os.path.exists("/dev/full"):
        pytest.skip("There is no /dev/full on this machine.")
    with pytest.raises(SystemExit, match="cannot write /dev/full, the last checkpoint is intact"):
        ArrayFile("/dev/full", (1000,), np.uint8).append(np.zeros((100, 1000), np.uint8))


@pytest.fixture
def latents():
    """The recorded episodes with latents that name their row."""
    rb = recorded()
    file = ArrayFile("latents.bin", (2, 4), np.float16)
    rows = np.stack([np.arange(18)[:, None].repeat(4, 1), np.full((18, 4), -30)], 1)
    file.append(rows.astype(np.float16))
    return Latents(rb, file.rows(), BOX, make_args(holdout_ratio=0.25), torch.device("cpu"))


def test_a_pass_shows_every_step_once(latents):
    """Pieces of at most 4 steps of single episodes, none of the held-out one; another order for another seed."""
    both = latents.train.tolist() + latents.holdout.tolist()
    assert sorted(both) == [[0, 5], [5, 8], [8, 14], [14, 18]] and len(latents.holdout) == 1
    latents.train = latents.spans[:3]
    expected = [[0, 4], [4, 5], [5, 8], [8, 12], [12, 14]]
    passes = [latents.batches(latents.train, 4, 2, np.random.default_rng(seed)) for seed in (1, 1, 2)]
    for batches in passes:
        assert [len(pieces) for pieces in batches] == [2, 2, 1]
        assert sorted(np.concatenate(batches).tolist()) == expected
    first, same, other = (np.concatenate(batches).tolist() for batches in passes)
    assert first == same != other
    (whole,) = latents.batches(latents.train, 100, 10, np.random.default_rng(1))
    assert sorted(whole.tolist()) == [[0, 5], [5, 8], [8, 14]]


def test_held_out_episodes_are_drawn_at_random():
    """A quarter of 80, from everywhere, ends among them; what was held out stays so when there are more episodes, and
    what M was trained on too; one at least; of a single episode all is seen."""

    def split(number: int, ratio: float = 0.25) -> tuple[list[int], list[int]]:
        rb = recorded(lengths=[2] * number)
        latents = Latents(
            rb, np.zeros((2 * number, 2, 4), np.float16), BOX, make_args(holdout_ratio=ratio), torch.device("cpu")
        )
        return [(spans[:, 0] // 2).tolist() for spans in (latents.train, latents.holdout)]

    train, held = split(80)
    assert sorted(train + held) == list(range(80)) and len(held) in range(12, 29)
    assert sum(i < 40 for i in held) in range(4, 25)
    for number in range(20, 80, 7):  # in all rounds the same ones
        assert split(number) == [[i for i in part if i < number] for part in (train, held)]
    assert split(3, 0.0) == [[1, 2], [0]] and split(1) == [[0], [0]] and split(3, 1.0) == [[0, 1, 2]] * 2


def test_batch_draws_z_afresh_and_shifts_it_by_one(latents):
    """z = mu + exp(logvar / 2) noise; what is predicted at t is what is seen at t + 1; padding is masked."""
    latents.data["logvar"][:] = 2 * math.log(0.5)
    batch = latents.batch(np.array([[8, 14], [14, 18], [1, 4]]), generator(3))
    assert batch["mask"].t().tolist() == [[1] * 6, [1] * 4 + [0] * 2, [1] * 3 + [0] * 3]
    assert batch["has_next"].t().tolist() == [[1] * 5 + [0], [1] * 3 + [0] * 3, [1] * 3 + [0] * 3]
    rows = torch.tensor([[8, 9, 10, 11, 12, 13], [14, 15, 16, 17, 17, 17], [1, 2, 3, 4, 5, 6]]).t()
    noise = normal(7, 3, 4, seed=3)
    torch.testing.assert_close(batch["z"], rows[..., None] + 0.5 * noise[:-1], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(batch["next_z"][:-1], batch["z"][1:])
    assert not torch.allclose(latents.batch(np.array([[8, 14]]), generator(4))["z"], batch["z"][:, :1])
    assert batch["reward"][:, 0].tolist() == [8, 9, 10, 11, 12, 13]
    assert batch["terminated"].t()[:2].tolist() == [[0] * 5 + [1], [0] * 6]  # the second was cut off
    assert batch["first"][:, 0].tolist() == [1, 0, 0, 0, 0, 0] and batch["first"][0].tolist() == [1, 1, 0]
    batch["action"].zero_()
    assert latents.data["action"].any(), "a batch is a copy"


def test_dreams_begin_at_first_frames_and_with_the_state_of_what_came_before(latents, monkeypatch):
    """Half and half: z of first frames, zero state; and rows after a warm-up, with M's state after those steps.

    The warm-up is of 100 environment steps, 34 actions of three steps.
    """
    assert make_agent(BOX, action_repeat=3).model.warm_up == 34 and make_agent(BOX).model.warm_up == 100
    model = make_agent(BOX).model

    def draw(warm_up: int) -> list[int]:
        monkeypatch.setattr(model, "warm_up", warm_up)
        world_models.set_dream_starts(model, latents, np.random.default_rng(1))
        assert set(model.start_mu[:1000, 0].int().tolist()) == {0, 5, 8, 14}
        assert not model.start_c[:1000].any() and not model.start_h[:1000].any()
        return model.start_mu[1000:, 0].int().tolist()

    found = draw(3)
    assert set(found) == {3, 4, 11, 12, 13, 17}
    for row in (4, 11, 17):
        z, action = latents.data["mu"][row - 3 : row, None].float(), latents.data["action"][row - 3 : row, None]
        _, (h, c) = model(z, action, torch.zeros(3, 1), model.initial(1))
        i = 1000 + found.index(row)
        torch.testing.assert_close((model.start_c[i], model.start_h[i]), (c[0, 0], h[0, 0]), rtol=1e-4, atol=1e-6)
    assert set(draw(50)) == {0, 5, 8, 14} and not model.start_h.any()  # longer than every episode


def test_holdout_scores_count_deaths(latents):
    """True, predicted and found ones of the held-out episodes, here all four, the padding left out."""
    model = make_agent(BOX).model
    latents.holdout = latents.spans
    for bias, predicted, recall in ((9.0, 18, 1.0), (-9.0, 0, 0.0)):
        nn.init.constant_(model.head.bias[36:37], bias)
        scores = world_models.holdout_scores(model, latents, make_args(model_batch_size=3))
        assert (scores["model/deaths_true"], scores["model/deaths_predicted"]) == (2, predicted)
        assert scores["model/deaths_recall"] == recall and scores["model/holdout_mdn_nll"] > 0
    latents.holdout = latents.spans[1:2]  # where nobody dies, nobody can be found
    assert math.isnan(world_models.holdout_scores(model, latents, make_args())["model/deaths_recall"])


# === Real episodes ===


class Memory(gym.Env):
    """A flash of light in frame t asks for the action 1 in step t + 1, not in t: what only h can remember."""

    observation_space = gym.spaces.Box(0, 255, (64, 64, 3), np.uint8)
    action_space = gym.spaces.Box(-1, 1, (1,), np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.lights, self.t = self.np_random.integers(2, size=13), 0
        return self._frame(), {}

    def _frame(self):
        return np.full((64, 64, 3), 255 * self.lights[self.t], np.uint8)

    def step(self, action):
        wanted = self.lights[self.t - 1] if self.t else 0
        reward = float((action[0] > 0) == wanted)
        self.t += 1
        return self._frame(), reward, False, False, {}


fake_envs.register("Memory-v0", Memory, 12)


def memory_agent():
    """V says +1 for light and -1 for dark; M's h is what z was; C answers h. One step late or early would be wrong."""
    agent = make_agent(Spec("box", 1, 12, False, False), latent_size=1, hidden_size=1)
    model = agent.model
    agent.vae.encode = lambda image: (2 * image.mean((1, 2, 3))[:, None] - 1, torch.full((len(image), 1), -50.0))
    with torch.no_grad():
        model.lstm.weight_ih_l0.zero_()
        model.lstm.weight_hh_l0.zero_()
        model.lstm.bias_ih_l0.copy_(torch.tensor([20.0, -20.0, 0.0, 20.0]))  # takes in everything, forgets, shows
        model.lstm.weight_ih_l0[2, 0] = 5.0  # z
    agent.controller.copy_(torch.tensor([[0.0], [9.0], [-0.9]]))
    return agent


@pytest.mark.parametrize("num_envs", [1, 3])
def test_h_is_what_it_was_before_this_frame(num_envs):
    """The order z_t, a_t from (z_t, h_t), step, h_{t+1} from (z_t, a_t): only then is every step of Memory right."""
    agent, seeds = memory_agent(), np.arange(7)
    envs = world_models.make_vector_env(make_args(env_id="test_world_models:Memory-v0"), num_envs)
    play = {"generator": generator(), "stop": QUIET}
    policy = world_models.linear_policy(agent.controller[None], "box")
    returns, lengths = world_models.play(agent, envs, policy, seeds, **play)
    assert returns.tolist() == lengths.tolist() == [12] * 7
    late = world_models.linear_policy(torch.tensor([[[9.0], [0.0], [-0.9]]]), "box")  # looks at z instead
    assert world_models.play(agent, envs, late, seeds, **play)[0].mean() < 9
    envs.close()


@pytest.mark.parametrize("num_envs", [1, 2, 5])
def test_jobs_are_played_on_their_seeds(num_envs):
    """Each job's return is that of its seed and candidate, however many environments share them out."""
    agent = memory_agent()
    envs = world_models.make_vector_env(make_args(env_id="fake_envs:TinyPixels-v0"), num_envs)
    actions = torch.tensor([[-1.0], [0.5]])
    seeds = np.tile([3, 8, 5], 2)

    def policy(features, jobs, num_jobs):
        assert num_jobs == 6 and features.shape == (len(jobs), 3) and len(jobs) <= num_envs
        return actions[jobs // 3]

    returns, lengths = world_models.play(agent, envs, policy, seeds, generator(), QUIET)
    for job, seed in enumerate(seeds):
        target = np.random.Generator(np.random.PCG64(int(seed))).uniform(-1, 1)
        assert returns[job] == pytest.approx(-60 * abs(float(actions[job // 3]) - target), rel=1e-4)
    assert lengths.tolist() == [12] * 6
    envs.close()


class CountedSteps(fake_envs.MovingPixels):
    """Counts the steps of all its copies."""

    steps = 0

    def step(self, action):
        CountedSteps.steps += 1
        return super().step(action)


fake_envs.register("CountedSteps-v0", CountedSteps, 12)


@pytest.mark.parametrize("num_jobs", [1, 2, 5])
def test_environments_without_a_job_rest(num_jobs, monkeypatch):
    """Neither stepped nor encoded: so many steps are made, and so many frames seen, as the episodes have."""
    agent, frames = make_agent(Spec("box", 1, 12, False, False)), []
    make = world_models.make_env(make_args(env_id="test_world_models:CountedSteps-v0"))
    envs = gym.vector.SyncVectorEnv([make] * 4, autoreset_mode=gym.vector.AutoresetMode.DISABLED)
    encode = agent.vae.encode
    monkeypatch.setattr(agent.vae, "encode", lambda image: (frames.append(len(image)), encode(image))[1])
    counted = sys.modules["test_world_models"].CountedSteps
    monkeypatch.setattr(counted, "steps", 0)
    args = agent, envs, world_models.linear_policy(agent.controller[None], "box"), np.arange(num_jobs), generator()
    returns, lengths = world_models.play(*args, QUIET)
    assert lengths.tolist() == [12] * num_jobs and np.isfinite(returns).all()
    assert counted.steps == sum(frames) == 12 * num_jobs
    envs.close()


def test_an_idle_episode_is_given_up_and_its_rest_is_paid():
    """Nothing positive is ever earned: the return is that of the whole episode, in fewer steps; 0 = never."""
    agent = memory_agent()
    envs = world_models.make_vector_env(make_args(env_id="fake_envs:TinyPixels-v0"), 2)
    policy = nothing(1)
    play = agent, envs, policy, np.arange(5), generator(), QUIET
    whole, lengths = world_models.play(*play)
    short, steps = world_models.play(*play, idle_limit=4)
    assert lengths.tolist() == [12] * 5 and steps.tolist() == [4] * 5
    np.testing.assert_allclose(whole, short)
    envs.close()


def test_a_stop_ends_the_episodes():
    agent, envs = memory_agent(), world_models.make_vector_env(make_args(env_id="fake_envs:TinyPixels-v0"), 1)
    stop = SimpleNamespace(requested=2)
    policy = nothing(1)
    assert np.isnan(world_models.play(agent, envs, policy, np.arange(2), generator(), stop)[0]).all()


def test_z_of_a_real_episode_is_drawn_afresh():
    """z = mu + exp(logvar / 2) noise, which C has seen in its dreams; mu alone would be another distribution."""
    agent, seen = make_agent(Spec("box", 1, 12, False, False)), []
    envs = world_models.make_vector_env(make_args(env_id="fake_envs:MovingPixels-v0"), 1)

    def policy(features, jobs, num_jobs):
        seen.append(features[:, :4])
        return torch.full((1, 1), 0.5)

    world_models.play(agent, envs, policy, np.array([3]), generator(5), QUIET)
    env, draw = fake_envs.MovingPixels(), generator(5)
    frame, _ = env.reset(seed=3)
    for z in seen:
        mu, logvar = agent.vae.encode(world_models.preprocess(torch.from_numpy(frame[None])))
        torch.testing.assert_close(z, mu + torch.exp(logvar / 2) * torch.randn(1, 4, generator=draw))
        frame, *_ = env.step([0.5])
    assert len(seen) == 12
    envs.close()


def test_an_action_box_is_rescaled():
    """From [-1, 1] to the box of each number, here [-3, 1] and [0, 10]; the numbers themselves would cover a corner."""
    low, high, taken = np.array([-3, 0], np.float32), np.array([1, 10], np.float32), []
    env = fake_envs.OddSpaces(fake_envs.PIXELS, gym.spaces.Box(low, high))
    env.step = lambda action: (taken.append(action), 0.0, False, False, {})
    env = world_models.fit_spaces(env, make_args(env_id="Odd-v0"))
    assert env.action_space == gym.spaces.Box(-1, 1, (2,), np.float32)
    for action in ([-1, -1], [1, 1], [0, 0.5]):
        env.step(np.array(action, np.float32))
    assert np.stack(taken).tolist() == [[-3, 0], [1, 10], [-1, 7.5]] and taken[0].dtype == np.float32
    taken.clear()
    whole = fake_envs.OddSpaces(fake_envs.PIXELS, gym.spaces.Box(-128, 127, (1,), np.int8))
    whole.step = env.unwrapped.step
    whole = world_models.fit_spaces(whole, make_args(env_id="Odd-v0"))
    for action in (-1, -0.99, 0.997, 1):
        whole.step(np.array([action], np.float32))
    assert np.stack(taken)[:, 0].tolist() == [-128, -127, 127, 127] and taken[0].dtype == np.int8


def test_pictures_are_cropped_and_resized():
    """CarRacing: rows 0-83 without the instruments, 64 x 64; CartPole as it is drawn."""
    env = world_models.make_env(make_args(env_id="CarRacing-v3"))()
    obs, _ = env.reset(seed=1)
    import cv2

    assert np.array_equal(obs, cv2.resize(env.unwrapped.state[:84], (64, 64), interpolation=cv2.INTER_AREA))
    env.close()
    args = make_args(env_id="CartPole-v1", render_obs=True)
    envs = world_models.make_vector_env(args, 1)
    spec = world_models.make_spec(envs, args)
    assert envs.reset(seed=1)[0].shape == (1, 64, 64, 3)
    assert spec == Spec("discrete", 2, 500, True, True)
    envs.close()


def test_takecover_is_the_game_of_the_paper():
    """Pictures of the screen, an end after 2100 steps at most, death as termination, no file left behind."""
    pytest.importorskip("vizdoom", reason="vizdoom is not installed.")
    args = world_models.with_task_defaults(Args())
    envs = world_models.make_vector_env(args, 1)
    assert world_models.make_spec(envs, args) == DOOM
    obs, _ = envs.reset(seed=[3])
    assert obs.shape == (1, 64, 64, 3) and obs.std() > 10
    held, total, ended = HeldActions(1, make_agent(DOOM), args, np.random.default_rng(1)), 0, False
    while not ended:
        action = world_models.env_action(held(), "thirds")
        obs, rewards, terminations, truncations, infos = envs.step(action)
        total, ended = total + float(rewards[0]), bool(terminations[0])
        assert not truncations[0]
    assert total == infos["episode"]["r"][0] == infos["episode"]["l"][0] > 35
    envs.close()
    assert os.listdir() == []


def test_the_faster_car_is_drawn_pixel_for_pixel(monkeypatch):
    """Frames and rewards of benchmark/world_models_car.py are Gymnasium's, from zoom to grass, in two episodes."""
    monkeypatch.syspath_prepend(ROOT / "benchmark")
    importlib.import_module("world_models_car")
    plain, fast = gym.make("CarRacing-v3"), gym.make("Fast/CarRacing-v3")
    actions = np.random.default_rng(1).uniform([-1, 0.2, 0], [1, 1, 0.2], (8, 3)).astype(np.float32)
    for seed in (1, 2):
        assert np.array_equal(plain.reset(seed=seed)[0], fast.reset(seed=seed)[0])
        for t in range(48):
            (a, *others), (b, *same) = plain.step(actions[t // 6]), fast.step(actions[t // 6])
            assert np.array_equal(a, b) and others == same
    plain.close()
    fast.close()


def test_the_faster_car_is_drawn_where_it_is_seen(monkeypatch):
    """With repeated actions: every fourth of Gymnasium's frames, the sums of its rewards, also after an episode that
    ended within an action; and no frame more is drawn."""
    monkeypatch.syspath_prepend(ROOT / "benchmark")
    car, drawn, plain = importlib.import_module("world_models_car").FastCarRacing, [], gym.make("CarRacing-v3")
    draw = car._render_road
    monkeypatch.setattr(car, "_render_road", lambda self, *a: (drawn.append(1), draw(self, *a))[1])
    settings = {"env_id": "world_models_car:Fast/CarRacing-v3", "action_repeat": 4, "max_episode_steps": 10}
    env = world_models.make_env(make_args(**settings))()
    args = make_args(**settings)
    envs = gym.vector.SyncVectorEnv([world_models.make_env(args)])
    assert world_models.make_spec(envs, args).time_limit == 3  # 4, 4 and 2 steps
    envs.close()
    for seed in (1, 2):
        plain.reset(seed=seed)
        env.reset(seed=seed)
        for steps in (4, 4, 2):
            action = np.array([0.3, 0.8, 0], np.float32)
            *_, total, terminated, truncated, _ = env.step(action)
            assert (terminated, truncated) == (False, steps == 2) and not env.unwrapped.unseen
            outcomes = [plain.step(action) for _ in range(steps)]
            assert total == pytest.approx(sum(outcome[1] for outcome in outcomes))
            if steps == 4:
                assert np.array_equal(env.unwrapped.state, outcomes[-1][0])
    assert len(drawn) == 2 * (1 + 2)  # the frame after the last action is seen by nobody
    plain.close()
    env.close()


def test_envpool_plays_the_same_game(monkeypatch):
    """benchmark/envpool_car.py: a seed fixes track and pictures, another one changes them; gas earns new tiles."""
    pytest.importorskip("envpool", reason="envpool is not installed.")
    monkeypatch.syspath_prepend(ROOT / "benchmark")
    args = make_args(env_id="envpool_car:EnvPool/CarRacing-v3")
    assert (args.controller_env, args.sequence_length) == ("real", 1000)
    env = world_models.make_env(args)()
    assert env.get_wrapper_attr("spec").max_episode_steps == 1000
    sums = []
    for seed in (1, 1, 2):
        frames, total = [env.reset(seed=seed)[0]], 0.0
        for _ in range(60):
            obs, reward, terminated, truncated, _ = env.step(np.array([0, 0.5, 0], np.float32))
            frames.append(obs)
            total += reward
            assert not terminated and not truncated
        sums.append((int(np.stack(frames).sum()), round(total, 3)))
        assert total > 5 and frames[-1].shape == (64, 64, 3)
    assert sums[0] == sums[1] != sums[2]


# === Stages ===


fake_envs.register("DeadlyMovingPixels-v0", fake_envs.MovingPixels, 12, deadly=True)


@pytest.mark.parametrize(("repeat", "actions"), [(1, 230), (3, 234)])
def test_recording_is_that_of_a_plain_loop(repeat, actions):
    """Held actions, frames before them, episodes of 3 steps or more; a time limit or the last step is no death.

    With repeated actions a step is an action of three environment steps, or of those that the episode has left.
    """
    changes = {"env_id": "DeadlyMovingPixels-v0", "num_envs": 2, "max_hold": 4, "min_episode_length": 3}
    make = world_models.make_env(make_args(**changes))
    changes["action_repeat"] = repeat
    makes = [world_models.make_env(make_args(**changes))] * 2
    envs = gym.vector.SyncVectorEnv(makes, autoreset_mode=gym.vector.AutoresetMode.DISABLED)
    spec, limit = world_models.make_spec(envs, make_args(**changes)), 12 // repeat
    assert spec == Spec("box", 1, limit, True, True)
    run = make_run(spec, envs, total_timesteps=actions * repeat, **changes)
    assert world_models.collect(run) and run.collected == actions * repeat
    held, draw = HeldActions(2, run.agent, run.args, np.random.default_rng([1, 0])), np.random.default_rng([1, 1])
    plain, frames, tracks, ended = [make(), make()], [None] * 2, [[], []], np.ones(2, bool)
    expected = []  # frames, actions and rewards of an episode, and whether it terminated
    for _ in range(actions // 2):
        taken = held(ended)
        seeds = draw.integers(2**31, size=2) if ended.any() else None
        for i, env in enumerate(plain):
            if ended[i]:
                frames[i], _ = env.reset(seed=int(seeds[i]))
                tracks[i] = []
            total = 0.0
            for _ in range(repeat):
                new, reward, terminated, truncated, _ = env.step(taken[i])
                total += reward
                if terminated or truncated:
                    break
            tracks[i].append((frames[i], taken[i], total))
            frames[i], ended[i] = new, terminated or truncated
            if ended[i]:
                expected.append((tracks[i], terminated))
    expected += [(track, False) for track, end in zip(tracks, ended, strict=True) if not end]
    expected = [(track, terminated) for track, terminated in expected if len(track) >= 3]
    assert run.rb.terminated == [terminated for _, terminated in expected]
    assert np.diff(run.rb.spans)[:, 0].tolist() == [len(track) for track, _ in expected]
    ends = [(len(track) == limit, terminated) for track, terminated in expected]
    assert {(True, False), (False, True), (False, False)} <= set(ends)  # limits, deaths, and a cut at the last step
    steps = [step for track, _ in expected for step in track]
    assert np.array_equal(run.rb.frames.rows(), [frame for frame, _, _ in steps])
    actions, rewards = (np.concatenate(column) for column in zip(*run.rb.episodes, strict=True))
    assert np.array_equal(actions, [action for _, action, _ in steps])
    assert np.array_equal(rewards, np.array([reward for _, _, reward in steps], np.float32))


@pytest.mark.parametrize("num_envs", [1, 2])
def test_a_fault_while_recording_loses_nothing(num_envs, capsys):
    """What was recorded up to it stays, the episodes in progress too, cut off; the run goes on from there."""
    settings = {"env_id": "fake_envs:FaultyPixels-v0", "num_envs": num_envs, "total_timesteps": 62}
    Path("fault").touch()
    with pytest.raises(SystemExit) as stopped:
        world_models.main(tiny(world_models, **settings))
    assert stopped.value.code == 1 and "step 18: RuntimeError: no more" in capsys.readouterr().err
    close_writers()
    (run_dir,) = Path.cwd().glob("runs/*")
    state = load(str(run_dir))
    assert state["parts"]["replay"]["lengths"] == [12] * num_envs + [5] * num_envs
    assert state["parts"]["replay"]["terminated"] == [False] * 2 * num_envs and state["global_step"] == 17 * num_envs
    Path("fault").unlink()
    again = load(resume(world_models, str(run_dir), **settings))
    assert again["global_step"] == sum(again["parts"]["replay"]["lengths"]) == 62
    assert os.path.getsize(run_dir / "frames.bin") == 62 * 64 * 64 * 3


@pytest.mark.parametrize("idle_limit", [0, 5])
def test_later_rounds_are_recorded_by_controllers_drawn_around_c(idle_limit):
    """One for each episode, with held random actions in between; M reads what was done. With an idle limit episodes end
    early, as no death, and what they had left is paid like the last step."""
    changes = {"env_id": "fake_envs:MovingPixels-v0", "num_envs": 2, "explore": 0.5, "record_sigma": 0.7, "max_hold": 3}
    make = world_models.make_env(make_args(**changes))
    envs = gym.vector.SyncVectorEnv([make] * 2, autoreset_mode=gym.vector.AutoresetMode.DISABLED)
    spec = Spec("box", 1, 12, True, True)
    run = make_run(spec, envs, idle_limit=idle_limit, **changes)
    run.round, run.record_until = 2, 48
    run.agent.controller[:] = normal(13, 1, seed=4)
    assert world_models.collect(run) and run.step == run.collected == 48
    rng, draw, agent = np.random.default_rng([1, 0]), np.random.default_rng([1, 1]), run.agent
    held, length = HeldActions(2, agent, run.args, rng, 2), idle_limit or 12
    plain, states, kinds, expected = [make(), make()], [None] * 2, set(), []
    for t in range(24):
        begins = np.full(2, t % length == 0)
        if begins[0]:
            seeds, tracks = draw.integers(2**31, size=2), [[], []]
            frames = [env.reset(seed=int(seed))[0] for env, seed in zip(plain, seeds, strict=True)]
        twin = copy.deepcopy(rng)
        random = held(begins)
        if begins[0]:
            HeldActions(2, agent, run.args, twin)(begins)  # draws what is held, the controllers come after it
            drawn = [agent.controller.numpy() + 0.7 * twin.standard_normal((13, 1), np.float32) for _ in range(2)]
            drawn = [torch.from_numpy(weights) for weights in drawn]
            states = [agent.model.initial(1) for _ in range(2)]
        noise = torch.from_numpy(rng.standard_normal((2, 4), np.float32))
        for i, env in enumerate(plain):
            with torch.no_grad():
                mu, logvar = agent.vae.encode(world_models.preprocess(torch.from_numpy(frames[i][None])))
                z = mu + torch.exp(logvar / 2) * noise[i]
                action = torch.tanh(torch.cat([z, states[i][0][0], torch.ones(1, 1)], 1) @ drawn[i])
                action = torch.from_numpy(random[i][None]) if held.is_random[i] else action
                first = torch.full((1, 1), float(begins[i]))
                _, states[i] = agent.model(z[None], action[None], first, states[i])
            kinds.add(bool(held.is_random[i]))
            new, reward, *_ = env.step(action[0].numpy())
            tracks[i].append((frames[i], action[0].numpy(), reward))
            frames[i] = new
        if t % length == length - 1:
            expected += tracks
    if idle_limit:
        expected += tracks  # cut off in the middle
    assert kinds == {True, False} and not any(run.rb.terminated) and len(run.rb.episodes) == len(expected)
    for (actions, rewards), track in zip(run.rb.episodes, expected, strict=True):
        np.testing.assert_allclose(actions, [action for _, action, _ in track], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(rewards, [reward for *_, reward in track], rtol=1e-5, atol=1e-5)
    whole = [track for track in expected if len(track) == length]
    paid = [sum(reward for *_, reward in track) + (12 - length) * track[-1][2] for track in whole]
    np.testing.assert_allclose(run.returns, paid, rtol=1e-5)


def test_v_is_trained_on_where_it_does_not_know_the_scenery(monkeypatch, capsys):
    """Its error on the frames since it was last trained against that on those before."""
    run, calls = make_run(vae_batch_size=4, vae_epochs=2), []
    nn.init.constant_(run.agent.vae.deconv4.bias, -9)  # V draws black whatever it sees
    monkeypatch.setattr(world_models, "update_vae", lambda *args: calls.append(1) or {})
    run.stage, run.round, run.frames_seen = "v", 2, 30

    def add(number: int, shade: int) -> None:
        run.rb.add(np.full((number, 64, 64, 3), shade, np.uint8), np.zeros((number, 2)), np.zeros(number), False)

    add(30, 0)
    for shade, updates, seen in ((0, 0, 30), (255, 10, 50)):  # two passes over the 20 new frames, four in a batch
        add(10, shade)
        assert world_models.train_vae(run) and (len(calls), run.frames_seen) == (updates, seen)
        assert ("not trained on" in capsys.readouterr().out) == (updates == 0)


@pytest.mark.parametrize(("shade", "trains"), [(204, False), (206, True)])
def test_new_scenery_is_an_error_larger_by_five_percent(shade, trains):
    """V draws black, so its error goes with the square of the shade: 1.040 and 1.061 times that of 200."""
    run = make_run()
    nn.init.constant_(run.agent.vae.deconv4.bias, -20)
    run.rb.add(np.full((30, 64, 64, 3), 200, np.uint8), np.zeros((30, 2)), np.zeros(30), False)
    run.frames_seen = 30
    run.rb.add(np.full((10, 64, 64, 3), shade, np.uint8), np.zeros((10, 2)), np.zeros(10), False)
    assert world_models.sees_new_scenery(run, run.rb.frames.rows()) == trains


def test_a_later_round_may_keep_nothing(capsys):
    """Episodes of one step are too short: V has nothing new, M and C go on, and no return calibrates the dream."""
    run_dir = run(world_models, rounds=2, round_timesteps=1, generations=1)
    said = capsys.readouterr().out
    assert "round 2, 49 environment steps, 48 actions kept: 0 whole episodes" in said
    assert said.count("calibration: ") == 3 and "NOTHING to compare dreams with" in said and "V's error" not in said
    state = load(run_dir)
    assert state["global_step"] == 49 and state["parts"]["counters"]["stage"] == "finished"
    assert sum(state["parts"]["replay"]["lengths"]) == state["parts"]["counters"]["frames_seen"] == 48


def test_cma_es_that_cannot_be_repeated_starts_anew_from_its_mean(capsys):
    """Another LAPACK has other signs of eigenvectors: saved controller and sigma are kept, and a line says so."""
    run_dir = run(world_models)
    state = load(run_dir)
    moved = state["parts"]["agent"]["controller"] + 0.01
    assert state["parts"]["counters"]["sigma"] == pytest.approx(scalars(run_dir)["controller/sigma"][-1][1])
    state["parts"]["agent"]["controller"], state["parts"]["counters"]["sigma"] = moved, 0.237
    torch.save(state, Path(run_dir, "checkpoint.pt"))
    capsys.readouterr()
    resume(world_models, run_dir, generations=4)
    assert "starts anew from its mean and sigma" in capsys.readouterr().out
    counters = load(run_dir)["parts"]["counters"]
    assert torch.equal(counters["start"]["mean"], moved) and counters["start"]["generation"] == 2
    assert counters["start"]["sigma"] == 0.237 and 0 < scalars(run_dir)["controller/sigma"][2][1] / 0.237 - 0.5 < 1
    assert counters["units_done"] == 0 and len(counters["fitness"]) == 2
    resume(world_models, run_dir, generations=5)
    assert "starts anew" not in capsys.readouterr().out


def test_more_rounds_go_on_where_the_others_ended(capsys):
    """As if all had been asked for at once. Weights of each round are kept: scored until the next C is there."""
    settings = {"round_timesteps": 24, "generations": 1}
    whole, run_dir = run(world_models, rounds=2, **settings), run(world_models, **settings)
    resume(world_models, run_dir, rounds=2, **settings)
    assert differences(load(whole), load(run_dir)) == [] and losses(whole) == losses(run_dir)
    saved = load(run_dir)
    assert saved["global_step"] == 72 and saved["parts"]["counters"]["round"] == 2
    assert sorted(path.name for path in Path(whole).glob("round_*.pt")) == ["round_1.pt", "round_2.pt"]
    assert differences(dict(torch.load(Path(whole, "round_2.pt"))), dict(saved["parts"]["agent"])) == []
    saved["parts"]["counters"]["stage"] = "m"
    first = torch.load(Path(whole, "round_1.pt"), weights_only=True)
    assert world_models.weights_of(whole, saved).keys() == first.keys()
    assert differences(dict(world_models.weights_of(whole, saved)), dict(first)) == []
    assert "raise --rounds" in error_of(capsys, resume, world_models, run_dir, rounds=2, total_timesteps=60, **settings)


def test_the_bar_of_a_stage_that_is_resumed_tells_the_speed_of_this_process():
    """From the 500 units of before on: neither those nor another stage's count."""
    now, drawn = [100.0], io.StringIO()
    stand_in = SimpleNamespace(progress=world_models.Bar(total=9_000, initial=700, file=drawn, mininterval=0))
    stand_in.progress._time = lambda: now.append(now[-1] + 1e-6) or now[-1]
    world_models.Stages.begin(stand_in, "m", 1_000, 500)
    assert "-" not in drawn.getvalue()
    for _ in range(10):
        now.append(now[-1] + 1)
        stand_in.progress.update(2)
    bar = stand_in.progress.format_dict
    assert (bar["n"], bar["total"], bar["initial"], bar["prefix"], bar["unit"]) == (520, 1_000, 500, "m", "update")
    assert bar["rate"] == pytest.approx(2, rel=0.01)


def test_an_evaluation_says_of_which_controller(capsys):
    """Generation and round; while the next round is at work, the end of the one before. What is finished says so."""
    run_dir = run(world_models, rounds=2, round_timesteps=24, generations=1)
    assert "finished: the command below goes on with more --generations or --rounds" in capsys.readouterr().out
    state, task = load(run_dir), "fake_envs:MovingPixels-v0 at"

    def said(**changes) -> str:
        state["parts"]["counters"] |= changes
        torch.save(state, Path(run_dir, "checkpoint.pt"))
        settings = {"rounds": 2, "round_timesteps": 24, "generations": 1, "evaluate": run_dir}
        world_models.main(tiny(world_models, **settings))
        return capsys.readouterr().out

    assert f"{task} generation 1 of round 2, of a run at environment step 72:" in said()
    assert f"{task} generation 7 of round 2, of a run at environment step 72:" in said(stage="c", units_done=7)
    assert f"{task} the end of round 1, of a run at environment step 72:" in said(stage="c", units_done=0)
    assert f"{task} the end of round 1, of a run at environment step 72:" in said(stage="m", units_done=5)


def test_the_same_v_and_m_serve_both(capsys):
    """Heads are M's, where C is evolved is C's: the game and the dream can be compared on one M."""
    run_dir = run(world_models)
    before = load(run_dir)["parts"]["agent"]
    resume(world_models, run_dir, from_stage="c", controller_env="real", heads=True)
    after = load(run_dir)
    assert {name.split(".")[0] for name in before} == {"vae", "model", "controller"}
    changed = differences(dict(before), dict(after["parts"]["agent"]))
    assert changed == ["/controller"] and after["global_step"] > 48
    blind = run(world_models, controller_env="real")
    assert "--heads True" in error_of(capsys, resume, world_models, blind, from_stage="c", heads=False)


def test_every_pass_of_v_shows_the_frames_in_another_order(monkeypatch):
    """Each at most once a pass, mixed: batches of frames that follow each other would all look alike."""
    run, batches, noises = make_run(vae_batch_size=4, vae_epochs=3), [], []
    frames = np.arange(18, dtype=np.uint8)[:, None, None, None].repeat(64, 1).repeat(64, 2).repeat(3, 3)
    run.rb.add(frames, np.zeros((18, 2)), np.zeros(18), False)

    def update(vae, optimizer, image, noise, args):
        batches.append((255 * image[:, 0, 0, 0]).round().int().tolist())
        noises.append(noise)
        return {}

    monkeypatch.setattr(world_models, "update_vae", update)
    run.stage = "v"
    assert world_models.train_vae(run) and len(batches) == 12
    passes = [sum(batches[i : i + 4], []) for i in (0, 4, 8)]
    assert all(len(order) == len(set(order)) == 16 for order in passes)
    in_order = [list(range(i, i + 4)) for i in range(0, 16, 4)]
    assert not any(batch in in_order for batch in batches) and len(set(map(tuple, batches))) == 12
    assert len({float(noise[0, 0]) for noise in noises}) == 12


def test_all_frames_are_encoded():
    """Mean first, then log-variance, in the order of the frames, beyond one chunk; also where it was interrupted."""
    run = make_run()
    run.rb = recorded(lengths=(300, 207, 600))
    run.stage = "m"
    assert world_models.encode(run)
    with torch.no_grad():
        expected = run.agent.vae.encode(world_models.preprocess(torch.from_numpy(run.rb.frames.rows().copy())))
    rows = torch.from_numpy(run.latents.rows().copy())
    torch.testing.assert_close(rows, torch.stack(expected, 1).half())
    whole = Path(run.latents.path).read_bytes()
    for length in (0, 9, 7 * len(whole) // 10, len(whole)):  # nothing, half a row, half a chunk, all
        Path(run.latents.path).write_bytes(whole[:length])
        run.stop.requested = 2
        assert not world_models.encode(run)  # a stage that was told to stop is not done
        run.stop.requested = 0
        assert world_models.encode(run) and Path(run.latents.path).read_bytes() == whole


@pytest.mark.parametrize("kind", ["car", "box"])
def test_training_of_the_model(kind, monkeypatch):
    """What its updates are given: the decayed rate, pieces of 20 steps in a new order each pass, rewards of one scale.

    A tile of the car is paid over three actions. Afterwards half of the dreams begin 100 environment steps into an
    episode or later, the others at first frames.
    """
    settings = {"sequence_length": 20, "model_batch_size": 4, "model_updates": 12, "model_lr_decay": 0.9}
    settings |= {"end_weight": 7.0, "pessimism": 3.0}
    if kind == "car":
        settings |= {"num_models": 2, "reward_window": 3, "action_repeat": 2}
    held, weights, repeat = [], [], settings.get("action_repeat", 1)
    run, lengths, calls = make_run(Spec(kind, 3, 1000, True, True), **settings), (120, 130, 110, 105), []
    for length, tiles in zip(lengths, (230, 294, 366, 250), strict=True):
        rewards = np.where(np.arange(length) % 5 == 4, 1000 / tiles, 0) - 0.1 * repeat
        run.rb.add(np.zeros((length, 64, 64, 3), np.uint8), np.ones((length, 3)), rewards, True)
    names = np.arange(465)[:, None].repeat(4, 1) / 512  # of the rows, without rounding
    run.latents.append(np.stack([names, np.full((465, 4), -20)], 1).astype(np.float16))
    update_model, model_loss = world_models.update_model, world_models.model_loss

    def loss(model, batch, *given):
        weights.append(given)
        return model_loss(model, batch, *given)

    def update(models, optimizer, batch, args):
        calls.append((optimizer.param_groups[0]["lr"], batch))
        assert len(optimizer.param_groups[0]["params"]) == 6 * len(models) == 6 * run.args.num_models
        return update_model(models, optimizer, batch, args)

    monkeypatch.setattr(world_models, "update_model", update)
    monkeypatch.setattr(world_models, "model_loss", loss)
    monkeypatch.setattr(world_models, "encode", lambda *args: True)
    monkeypatch.setattr(world_models, "log_holdout_scores", lambda run, latents: held.append(latents.holdout))
    monkeypatch.setattr(world_models, "log_open_dream", lambda *args: None)
    run.stage = "m"
    assert world_models.train_model(run)
    rates, batches = zip(*calls, strict=True)
    assert rates == pytest.approx([1e-5 + 0.99e-3 * 0.9**i for i in range(12)], rel=1e-9)
    assert weights == [(7.0, 3.0)] * 12 * run.args.num_models
    episodes, shown = [], []
    for length, tiles in zip(lengths, (230, 294, 366, 250), strict=True):
        episodes.append(np.full(length, -0.1 * repeat))
        for i in range(4, length, 5):
            around = [j for j in ((i - 1, i, i + 1) if kind == "car" else (i,)) if j < length]
            episodes[-1][around] += (3.4 if kind == "car" else 1000 / tiles) / len(around)
    target = np.concatenate(episodes)
    for batch in batches:
        inside = batch["mask"] > 0
        rows = (512 * batch["z"][..., 0]).round().int()[inside]
        np.testing.assert_allclose(batch["reward"][inside], target[rows], rtol=1e-5)
        shown.append(rows.tolist())
    passes = [sum(shown[i : i + 5], []) for i in (0, 5)]  # 18 or 19 pieces; one episode is held out
    ((out, end),) = held[0]
    expected = [row for row in range(465) if not out <= row < end]
    assert all(sorted(rows) == expected for rows in passes) and passes[0] != passes[1]
    first = np.array([0, 120, 250, 360])
    for model in run.agent.models():
        assert float(model.reward_mean) == pytest.approx(target.mean(), rel=1e-5)
        assert float(model.reward_std) == pytest.approx(target.std(ddof=1), rel=1e-5)
        starts = (512 * model.start_mu[:, 0]).numpy()
        steps = starts - first[np.searchsorted(first, starts, "right") - 1]
        assert set(steps[:1000]) == {0} and not model.start_h[:1000].any()
        assert set(steps[1000:]) == set(range(100 // repeat, 130)) and model.start_h[1000:].any(1).all()
        assert torch.equal(model.start_mu, run.agent.model.start_mu)  # M of each stands in the same places
    assert len({model.start_h[1500].sum().item() for model in run.agent.models()}) == run.args.num_models


@pytest.mark.parametrize("where", ["dream", "real"])
def test_evolution_is_cma_es_on_mean_returns(where, monkeypatch):
    """C is the mean of a CMA-ES that makes returns larger. Candidates share seeds, generations do not."""
    run = make_run(controller_env=where, population=6, episodes=3, generations=4, idle_limit=7)
    features, seeds_used, draws, calibrated = normal(1, 13, seed=3), [], [], []

    def wanted(seed):  # the action, in the episode with this seed
        return np.random.default_rng(int(seed)).uniform(0.5, 1)

    def returns(policy, seeds):
        actions = policy(features.expand(18, -1), torch.arange(18), 18)
        targets = torch.tensor([wanted(seed) for seed in seeds])
        return -((actions - targets[:, None]) ** 2).sum(1), torch.arange(18)

    def dream(agent, policy, num_jobs, num_dreams, draw, args, stop):
        assert (num_jobs, num_dreams) == (18, 3)
        seeds_used.append(draw.initial_seed() + np.arange(3))
        draws.append(draw.initial_seed())
        return returns(policy, np.tile(seeds_used[-1], 6))

    def play(agent, envs, policy, seeds, draw, stop, idle_limit):
        assert idle_limit == 7
        seeds_used.append(seeds[:3])
        draws.append(draw.initial_seed())
        return [tensor.numpy() for tensor in returns(policy, seeds)]

    monkeypatch.setattr(world_models, "dream", dream)
    monkeypatch.setattr(world_models, "play", play)
    monkeypatch.setattr(world_models, "calibrate", lambda run: calibrated.append(run.stage) or True)
    run.stage = "c"
    assert world_models.evolve(run)
    assert len(np.unique(seeds_used)) == 12 and len(set(draws)) == 4
    assert calibrated == (["c"] if where == "dream" else [])
    rng = np.random.default_rng([1, 5, 1, 0])
    options = {"popsize": 6, "verbose": -9, "randn": lambda *size: rng.standard_normal(size), "seed": np.nan}
    es = cma.CMAEvolutionStrategy(np.zeros(26), 0.1, options)
    for seeds, fitness in zip(seeds_used, run.fitness, strict=True):
        candidates, costs = es.ask(), []
        for candidate in candidates:
            action = np.tanh(features.numpy() @ candidate.reshape(13, 2))
            costs.append(np.mean([((action - wanted(seed)) ** 2).sum() for seed in seeds]))
        np.testing.assert_allclose(fitness, costs, rtol=1e-4)
        es.tell(candidates, costs)
    assert torch.equal(run.agent.controller, torch.from_numpy(es.mean).float().view(13, 2))
    assert run.step == (4 * sum(range(18)) if where == "real" else 0)
    assert np.mean(run.fitness[-1]) < np.mean(run.fitness[0])


@pytest.mark.parametrize("repeat", [1, 3])
@pytest.mark.parametrize(("frequency", "generations"), [(0, []), (1, [2, 4, 6, 7]), (96, [2, 4, 6, 7]), (97, [4, 7])])
def test_evaluations_are_as_far_apart_as_is_asked_for(frequency, generations, repeat, monkeypatch):
    """Every second of seven generations of 48 steps, where C has made so many steps since the last; and at the end."""
    settings = {"population": 4, "episodes": 2, "action_repeat": repeat}
    run = make_run(eval_frequency=frequency, eval_generations=2, generations=7, **settings)
    found, outcome = [], (np.zeros(8), np.full(8, 6 // repeat))

    def scores(agent, envs, args, stop, trace):
        found.append(run.units_done)
        trace.append(torch.zeros(4))
        return np.zeros(2), None

    monkeypatch.setattr(world_models, "calibrate", lambda run: True)
    monkeypatch.setattr(world_models, "play_candidates", lambda run, weights: outcome)
    monkeypatch.setattr(world_models, "real_and_dream_scores", scores)
    run.stage = "c"
    assert world_models.evolve(run) and found == generations


def test_scores_are_those_of_episodes_and_dreams_of_the_runs_temperature():
    """Both for the controller as it is; none of a dream where M predicts no end."""
    changes = {"env_id": "fake_envs:MovingPixels-v0", "temperature": 1.7, "eval_episodes": 3}
    envs, args = world_models.make_vector_env(make_args(**changes), 1), make_args(**changes)
    agent, trace = make_agent(Spec("box", 1, 12, True, True)), []
    nn.init.constant_(agent.model.head.bias[36:37], -9)  # no end
    agent.controller.copy_(normal(13, 1, seed=2))
    real, dreamed = world_models.real_and_dream_scores(agent, envs, args, QUIET, trace)
    policy = world_models.linear_policy(agent.controller[None], "box")
    draw = [world_models.make_generator(torch.device("cpu"), 1, stream) for stream in (14, 14, 13)]
    assert np.array_equal(dreamed, world_models.dream(agent, policy, 100, 100, draw[0], args)[0].numpy())
    other = world_models.dream(agent, policy, 100, 100, draw[1], make_args(temperature=1.6))[0].numpy()
    assert not np.array_equal(dreamed, other) and len(trace) == 12
    seeds = np.random.default_rng([1, 99]).integers(2**31, size=3)
    assert np.array_equal(real, world_models.play(agent, envs, policy, seeds, draw[2], QUIET)[0])
    blind = make_agent(Spec("box", 1, 12, False, False))
    assert world_models.real_and_dream_scores(blind, envs, args, QUIET)[1] is None
    envs.close()


@pytest.mark.parametrize(("spec", "warm_up"), [(BOX, 0), (CAR, 100)])
def test_horizons_of_the_open_loop_are_counted_from_the_last_observed_frame(spec, warm_up, monkeypatch):
    """5 frames are seen, after the zoom of CarRacing, so horizon 1 is the error of the sixth, mean of three samples.

    Frame t shows t, and here its dream t more than the first of these frames, its second and third sample 2 and 4 more
    than that.
    """
    run, logged, T, noises = make_run(temperature=1.3), {}, warm_up + 60, []
    run.spec = spec
    for _ in range(4):
        frames = np.arange(T, dtype=np.uint8)[:, None, None, None].repeat(64, 1).repeat(64, 2).repeat(3, 3)
        run.rb.add(frames, np.zeros((T, 2)), np.zeros(T), False)
    run.latents.append(np.zeros((4 * T, 2, 4), np.float16))

    def open_loop(model, batch, uniform, noise, temperature, context):
        assert (temperature, context) == (1.3, warm_up + 5) and uniform.min() >= 0 and noise.min() < 0
        noises.append(float(noise.sum() + uniform.sum()))
        return len(noises) - 1 + torch.arange(T - 1)[:, None, None].expand(batch["z"].shape)

    def decode(agent, z):
        shades = (2 * z[:, 0].numpy() - warm_up).astype(np.uint8)
        return shades[:, None, None, None].repeat(64, 1).repeat(64, 2).repeat(3, 3)

    monkeypatch.setattr(world_models, "open_loop", open_loop)
    monkeypatch.setattr(world_models, "decode_frames", decode)
    monkeypatch.setattr(run, "log", logged.update)
    latents = Latents(run.rb, run.latents.rows(), spec, make_args(holdout_ratio=0.5), run.device)
    world_models.log_open_dream(run, latents, samples=3)
    horizons = {k: np.mean([((4 + k + more) / 255) ** 2 for more in (0, 2, 4)]) for k in (1, 5, 15, 45)}
    assert logged == pytest.approx({f"open_loop/image_mse_horizon_{k}": error for k, error in horizons.items()})
    assert len(set(noises)) == 3


def test_ratio_of_dreamed_and_recorded_returns():
    """Hand-worked: ratio, standard error by the delta method, what speaks against a dream, where nothing is said."""
    near = np.array([9.0, 11.0] * 50)  # mean 10, squared standard error 1 / 99
    ratio, error, verdict = world_models.compare(1.2 * near, near)
    assert ratio == pytest.approx(1.2) and "NOT like" in verdict  # 0.2 is 12 of its errors
    assert error == pytest.approx(1.2 * math.sqrt(2 / 99) / 10)
    wide = np.array([-10.0, 30.0] * 72)  # mean 10, squared standard error 400 / 143
    for factor, words in {1.0: "", 0.71: "", 1.38: "", 0.69: "NOT like", 1.42: "NOT like", -0.5: "NOT like"}.items():
        ratio, error, verdict = world_models.compare(factor * wide, wide)  # 1.42 is 1.25 errors away from 1
        assert error == pytest.approx(abs(factor) * 20 * math.sqrt(2 / 143) / 10) and ratio == pytest.approx(factor)
        assert bool(words) == bool(verdict) and words in verdict
    assert world_models.compare(-wide, -wide)[2] == "" and world_models.compare(-wide, wide)[2]  # costs
    for few in (wide[:36], wide - 5.0):  # an error of 0.48, by few episodes, by a mean of 5
        assert "NOTHING" in world_models.compare(few, few)[2]
    for factor in (3.0, 10.0):  # errors of 0.5 and 1.7, a sixth of the ratio
        assert "NOT like" in world_models.compare(factor * wide, wide)[2]
    ratio, error, verdict = world_models.compare(200 + 200 * np.sign(near - 10), near)  # 20 times, spread as widely
    assert ratio == pytest.approx(20) and error == pytest.approx(2.02, abs=0.01) and "NOT like" in verdict
    for unknown in (np.full(3, np.nan), np.array([np.nan]), np.zeros(9), np.ones(1), np.array([1.0, 1.1])):
        with warnings.catch_warnings(action="error"):
            assert "NOTHING" in world_models.compare(wide, unknown)[2]  # of zeros, of one or two there is no ratio
    assert "NOTHING" in world_models.compare(np.full(3, np.nan), wide)[2]


@pytest.mark.parametrize(("round_number", "share"), [(1, 1.0), (2, 0.25)])
def test_calibration_plays_as_was_recorded(round_number, share, monkeypatch, capsys):
    """Held random actions; in later rounds a share of them, the others those of controllers drawn around C. Whole
    episodes, from first frames."""
    settings = {"explore": 0.25, "dream_length": 5, "at_rest": 0.5, "record_sigma": 0.5, "max_hold": 1}
    run, logged, seen = make_run(**settings), {}, []
    run.round, run.returns = round_number, [10.0, 20.0, 30.0]
    monkeypatch.setattr(run, "log", logged.update)
    run.agent.controller[:] = 1.0

    def dream(agent, policy, num_jobs, num_dreams, draw, args, stop):
        assert (args.dream_length, args.at_rest, num_jobs, num_dreams) == (None, 1.0, 100, 100)
        jobs = torch.arange(50, 100)  # the others have ended
        for _ in range(40):
            seen.append(policy(torch.full((50, 13), 1.0), jobs, num_jobs))
        return torch.full((100,), factor * 20.0), None

    monkeypatch.setattr(world_models, "dream", dream)
    for factor, verdict in ((1.0, None), (3.0, "NOT like"), (0.5, "NOT like"), (math.nan, "NOTHING")):
        assert world_models.calibrate(run)  # one dream for all: the error, 0.29 of the ratio, is that of 10, 20, 30
        said = capsys.readouterr().out
        assert said.count("calibration") == 1 + bool(verdict) and (verdict or "") in said
        assert logged.pop("calibration/recording_real") == 20
        assert logged == ({} if math.isnan(factor) else {"calibration/recording_dream": factor * 20})
        logged.clear()
    actions = torch.stack(seen[:40])  # C's are all near one
    own = (actions > 0.99).all(-1).float().mean()
    assert float(own) == pytest.approx(1 - share, abs=0.03)  # of 2,000
    run.stop.requested = 2
    assert not world_models.calibrate(run)


def test_what_is_told_of_held_out_episodes(monkeypatch, capsys):
    """A dimension of V is live where its means spread by 0.15. No death: no recall, which is told and not logged.

    Of two Ms it is the mean.
    """
    run, logged = make_run(num_models=2), {}
    monkeypatch.setattr(run, "log", logged.update)

    def scores(model, *_):
        return {"model/holdout_mdn_nll": 1.0 if model is run.agent.model else 1.5, "model/deaths_recall": math.nan}

    monkeypatch.setattr(world_models, "holdout_scores", scores)
    for spreads, few in (((0.151, 0.151, 0.149, 0.0), False), ((0.151, 0.149, 0.149, 0.0), True)):
        mu = torch.tensor(spreads) * torch.tensor([[1.0], [-1.0]]).repeat(10**4, 1)
        world_models.log_holdout_scores(run, SimpleNamespace(data={"mu": mu}))
        said = capsys.readouterr().out
        assert ("less than half of V's dimensions are live" in said) == few and "deaths_recall nan" in said
        assert logged == {"model/live_dims": sum(spread > 0.15 for spread in spreads), "model/holdout_mdn_nll": 1.25}


# === Whole runs ===


def charts(run_dir: str) -> list[tuple[str, list[str]]]:
    """Titles and scalars of the charts that TensorBoard lays out under Custom Scalars."""
    events = EventAccumulator(run_dir)
    events.Reload()
    (event,) = events.Tensors("custom_scalars__config__")
    layout = Layout.FromString(event.tensor_proto.string_val[0])
    return [(chart.title, list(chart.multiline.tag)) for category in layout.category for chart in category.chart]


WORLDS = {
    "pixels": {},
    "deadly discrete": {"env_id": "fake_envs:TinyPixelsDiscrete-v0", "total_timesteps": 96},
    "real": {"controller_env": "real"},
    "repeated": {"action_repeat": 2, "total_timesteps": 96},
    "real, repeated": {"controller_env": "real", "action_repeat": 2, "total_timesteps": 96},
    "two": TWO_ENVS,
    "drawn": {"env_id": "CartPole-v1", "render_obs": True, "total_timesteps": 120, "dream_length": 20},
}


@pytest.mark.parametrize("kind", WORLDS)
def test_world_models_logs_everything_and_moves_all_parameters(kind):
    """Each kind of environment and of evolution: tags and their steps, files in the run folder, trained parameters."""
    settings = WORLDS[kind] | {"eval_frequency": 1}
    args, run_dir = world_models.with_task_defaults(tiny(world_models, **settings)), run(world_models, **settings)
    dreaming = args.controller_env != "real"
    heads = {"losses/done_loss", "losses/reward_loss", "dream/episodic_return", "dream/episodic_return_std"}
    heads |= {f"model/deaths_{name}" for name in ("true", "predicted")}
    heads |= {"calibration/recording_dream", "calibration/recording_real"}
    expected = {"charts/episodic_return", "charts/episodic_length", "charts/SPS"} | (heads if dreaming else set())
    expected |= {"eval/episodic_return", "eval/episodic_return_std", "model/live_dims", "model/holdout_mdn_nll"}
    expected |= {"losses/vae_recon_loss", "losses/vae_kl_loss", "losses/mdn_nll", "charts/global_step"}
    expected |= {f"controller/{name}" for name in ("mean", "best", "std", "sigma", "length")}
    horizons = {f"open_loop/image_mse_horizon_{k}" for k in (1, 5, 15, 45)}
    tags = scalars(run_dir)
    assert expected <= set(tags) <= expected | horizons | {"model/deaths_recall"}
    assert charts(run_dir) == [("real return beside the dream's", ["eval/episodic_return", "dream/episodic_return"])]
    assert_healthy(run_dir)
    assert image_tags(run_dir) == set()  # pictures are files, stored once
    files = [re.sub(r"\d+", "N", name) for name in os.listdir(run_dir)]
    assert {"frames.bin", "latents.bin", "reconstructions_N_N.png"} <= set(files)
    assert files.count("dream_N_N.gif") == 2  # one for each evaluation
    if kind in ("pixels", "real", "two"):  # whose held-out episode is long enough
        assert "open_loop/image_mse_horizon_5" in tags
        assert {"open_loop_error_N_N.png", "open_loop_N_N.gif"} <= set(files)
    state = load(run_dir)
    recorded, saved = state["parts"]["counters"]["collected"], state["parts"]
    assert recorded == args.total_timesteps and saved["counters"]["stage"] == "finished"
    lengths = [value for tag, *value in [(t, *v) for t in ("controller/length",) for v in tags[t]]]
    made = 0 if dreaming else round(sum(length for _, length in lengths) * args.population * args.episodes)
    made, actions = made * args.action_repeat, sum(saved["replay"]["lengths"])
    assert actions * args.action_repeat == recorded or kind == "deadly discrete"
    assert state["global_step"] == recorded + made
    steps = [step for step, _ in tags["controller/mean"]]
    updates = 2 * (len(saved["replay"]["reward"]) // 8) + args.model_updates  # two passes of V over batches of 8
    assert tags["losses/mdn_nll"][-1][0] == recorded + updates
    assert steps[-1] == state["global_step"] + updates + 2 and len(steps) == 2
    evaluated = [step for step, _ in tags["eval/episodic_return"]]
    assert evaluated[-1] == steps[-1] + 1 and len(evaluated) == 2  # where the next generation would stand
    assert tags["charts/global_step"][-1] == (evaluated[-1], state["global_step"])
    torch.manual_seed(args.seed)
    envs = world_models.make_vector_env(args, 1)
    untrained = world_models.Agent(world_models.make_spec(envs, args), args).state_dict()
    envs.close()
    assert untrained.keys() == saved["agent"].keys()
    still = [name for name, tensor in untrained.items() if torch.equal(tensor, saved["agent"][name])]
    assert set(still) <= {"model.start_c", "model.start_h", "model.lstm.bias_hh_l0"}  # zero where an episode begins
    rows = np.fromfile(Path(run_dir, "frames.bin"), np.uint8)
    assert len(rows) == len(saved["replay"]["reward"]) * 64 * 64 * 3


KILLS = [(1, "v", "update_vae", 7), (1, "m", "preprocess", 1), (1, "m", "update_model", 7), (1, "c", "dream", 2)]
KILLS += [(1, "c", "write_gif", 3), (1, "c", "write_file", 2), (2, "collect", "act", 20)]
KILLS += [(2, "collect", "save_checkpoint", 2), (2, "v", "sees_new_scenery", 1), (2, "v", "update_vae", 6)]
KILLS += [(2, "m", "encode", 1), (2, "m", "update_model", 7), (2, "m", "set_dream_starts", 1)]
KILLS += [(2, "c", "calibrate", 1), (2, "c", "dream", 4), (2, "c", "write_file", 2), (2, "c", "write_gif", 2)]
WHOLE: dict[int, tuple] = {}  # rounds -> end and log of a run that was never interrupted, its folder as stages began


@pytest.mark.parametrize(("number", "stage", "function", "call"), KILLS)
def test_killed_in_any_stage_and_resumed_equals_never_interrupted(
    monkeypatch, tmp_path_factory, number, stage, function, call
):
    """kill -9 after some of the stage's work: what was saved of it is not done again, and the end is the same.

    The run that is killed goes on from where the stage began in the one that is not.
    """
    settings = {"eval_frequency": 1, "checkpoint_frequency": 8, "model_updates": 9, "generations": 3, "num_models": 2}
    settings |= {"rounds": number, "round_timesteps": 30, "eval_episodes": 1, "idle_limit": 7, "explore": 0.5}
    running, init, finish, begun = [], world_models.Stages.__init__, world_models.Stages.finish, {}
    now = property(lambda run: 0.0, lambda run, seconds: None)  # saves whenever it may, however long that took
    monkeypatch.setattr(world_models.Stages, "next_save_time", now, raising=False)

    def copied(run) -> None:
        finish(run)
        begun[run.round, run.stage] = shutil.copytree(run.folder, tmp_path_factory.mktemp("stage") / "run")

    monkeypatch.setattr(world_models.Stages, "__init__", lambda self, *a: (running.append(self), init(self, *a))[1])
    monkeypatch.setattr(world_models, "sees_new_scenery", lambda run, frames: True)
    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", lambda *_: None)
    if number not in WHOLE:
        with monkeypatch.context() as patch:
            patch.setattr(world_models.Stages, "finish", copied)
            whole = run(world_models, **settings)
        WHOLE[number] = load(whole), losses(whole), begun
    run_dir = str(shutil.copytree(WHOLE[number][2][number, stage], Path.cwd() / "run"))
    original, calls = getattr(world_models, function), []

    def killed(*args, **kwargs):
        calls.append((running[-1].round, running[-1].stage))
        if calls[-1] == (number, stage) and calls.count((number, stage)) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    child = os.fork()
    if not child:
        try:
            setattr(world_models, function, killed)
            resume(world_models, run_dir, **settings)
        finally:
            os._exit(0)  # it has not been killed
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    events = sorted(Path(run_dir).glob("events*"), key=os.path.getmtime)
    for i, path in enumerate(events):  # names have seconds and process: they are to sort by age
        path.rename(path.with_name(re.sub(r"\d{10}", f"{i:010}", path.name, count=1)))
    counters = load(run_dir)["parts"]["counters"]
    assert (counters["round"], counters["stage"]) == (number, stage)
    resume(world_models, run_dir, **settings)
    assert differences(WHOLE[number][0], load(run_dir)) == []
    assert losses(run_dir) == WHOLE[number][1]
    assert_healthy(run_dir)


def in_two_processes(**settings) -> tuple[str, list[int]]:
    """A run as torchrun starts it; its folder, and the status of both processes."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(listener.getsockname()[1]), "WORLD_SIZE": "2"}
    children = []
    for rank in ("0", "1"):
        children.append(os.fork())
        if not children[-1]:
            os.environ |= place | {"RANK": rank, "LOCAL_RANK": rank}
            status = 99
            try:
                world_models.main(tiny(world_models, **settings))
                status = 0
            except SystemExit as stopped:
                print(stopped, file=sys.stderr)
                status = stopped.code if isinstance(stopped.code, int) else 1
            finally:
                os._exit(status)
    statuses = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    return str(next(Path.cwd().glob("runs/*"), "")), statuses


@pytest.mark.parametrize(("where", "replaced"), [("dream", False), ("real", False), ("real", True)])
def test_two_processes_share_the_candidates(where, replaced, monkeypatch):
    """Both play half of the population, C is that of one process. One folder.

    Dreams share their noise. Real episodes do not; to be compared they are replaced by returns of actions and seeds.
    """
    settings = {"population": 5, "generations": 3, "rounds": 2, "round_timesteps": 24, "controller_env": where}
    settings["num_models"] = 2

    def play(agent, envs, policy, seeds, generator, stop, idle_limit):
        features = torch.ones(len(seeds), len(agent.controller))
        actions = policy(features, torch.arange(len(seeds)), len(seeds))[:, 0]
        return -((actions.numpy() - seeds / 2**32) ** 2), np.full(len(seeds), 7)

    if replaced:
        monkeypatch.setattr(world_models, "play", play)
    run_dir, statuses = in_two_processes(**settings)
    assert statuses == [0, 0] and len(list(Path("runs").iterdir())) == 1
    found, alone = load(run_dir), load(run(world_models, **settings))
    counters, expected = found["parts"]["counters"], alone["parts"]["counters"]
    assert counters["stage"] == "finished" and np.shape(counters["fitness"]) == (3, 5)
    if where == "real" and not replaced:
        return
    assert found["global_step"] == alone["global_step"]
    np.testing.assert_allclose(counters["fitness"], expected["fitness"], rtol=1e-3, atol=1e-3)
    controllers = (checkpoint["parts"]["agent"]["controller"] for checkpoint in (found, alone))
    torch.testing.assert_close(*controllers, rtol=1e-2, atol=1e-3)


def test_more_processes_than_candidates_are_refused(monkeypatch, capfd):
    """In a line, by each of them, before there is a folder and before one waits for the others."""
    monkeypatch.setenv("WORLD_SIZE", "9")
    monkeypatch.setattr(world_models.dist, "init_process_group", lambda *_, **__: pytest.fail("waits for the others"))
    with pytest.raises(SystemExit, match="2"):
        world_models.main(tiny(world_models))
    assert "--population 4: fewer candidates than processes, 9" in capfd.readouterr().err and not Path("runs").exists()


def test_the_end_of_another_process_is_a_line(monkeypatch, capfd):
    """The first one ends with its last checkpoint intact, and goes on alone."""
    settings, play = {"generations": 3, "checkpoint_frequency": 1, "eval_frequency": 1}, world_models.play_candidates

    def killed(run, weights):
        if run.units_done == 1 and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGKILL)
        return play(run, weights)

    with monkeypatch.context() as patch:
        patch.setattr(world_models, "play_candidates", killed)
        run_dir, statuses = in_two_processes(**settings)
    assert statuses == [1, -signal.SIGKILL] and "another process has ended" in capfd.readouterr().err
    assert load(f"{run_dir}/c")["parts"]["counters"]["units_done"] == 1
    resume(world_models, run_dir, **settings)
    assert load(run_dir)["parts"]["counters"]["stage"] == "finished"


@pytest.mark.slow
@pytest.mark.parametrize("where", ["dream", "real"])
def test_a_stop_of_one_process_is_a_stop_of_all(monkeypatch, where):
    """Of one that helps: what it cut short counts for nothing, and both go on from the checkpoint bit for bit."""
    settings, play = {"generations": 3, "population": 4, "controller_env": where}, world_models.play_candidates

    def asked(run, weights):
        if run.units_done == 1 and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGTERM)
        return play(run, weights)

    with monkeypatch.context() as patch:
        patch.setattr(world_models, "play_candidates", asked)
        run_dir, statuses = in_two_processes(**settings)
    assert statuses == [128 + signal.SIGTERM] * 2
    assert load(f"{run_dir}/c")["parts"]["counters"]["units_done"] == 1
    assert in_two_processes(resume=run_dir, **settings)[1] == [0, 0]
    os.makedirs("whole")
    os.chdir("whole")
    whole, _ = in_two_processes(**settings)
    assert differences(load(whole)["parts"]["agent"], load(run_dir)["parts"]["agent"]) == []


def test_stages_are_done_again_on_purpose(capsys):
    """--from-stage keeps what comes before, takes new settings of what comes after, and purges its curves."""
    run_dir = run(world_models, eval_frequency=1)
    before, tags = load(run_dir), scalars(run_dir)
    again = copy_of(run_dir)
    resume(world_models, again, eval_frequency=1, from_stage="m")
    assert differences(before, load(again)) == [] and losses(again) == losses(run_dir)
    resume(world_models, again, eval_frequency=1, from_stage="m", model_updates=8, temperature=0.5)
    after = load(again)
    found = differences(before["parts"]["agent"], after["parts"]["agent"])
    changed = {path.removeprefix("/") for path in found}
    assert changed and all(name.startswith(("model.", "controller")) for name in changed)
    assert after["args"] == before["args"] | {"model_updates": 8, "temperature": 0.5}
    assert after["parts"]["counters"]["frames_seen"] == 48
    assert scalars(again)["losses/vae_kl_loss"] == tags["losses/vae_kl_loss"]
    assert [step for step, _ in scalars(again)["losses/mdn_nll"]] == [48 + 12 + 8]  # environment steps, updates
    assert_healthy(again)
    for stage, flags in (("c", {"model_updates": 9}), ("v", {"env_id": "fake_envs:TinyPixelsDiscrete-v0"})):
        line = error_of(capsys, resume, world_models, again, from_stage=stage, **flags)
        assert "clashes" in line
    assert differences(after, load(again)) == []


def test_stages_of_a_later_round_go_on_from_the_round_before(capsys, monkeypatch):
    """C again is the same C, V and M again begin with the weights of round 1; sizes stay, and nothing is recorded."""
    settings = {"rounds": 2, "round_timesteps": 30, "explore": 0.5, "num_models": 2}
    whole = run(world_models, **settings)

    def again() -> str:
        return shutil.copytree(whole, f"again_{len(os.listdir())}")

    same = resume(world_models, again(), from_stage="c", **settings)
    assert differences(load(whole), load(same)) == []
    before, seen = torch.load(f"{whole}/round_1.pt", weights_only=True), []
    monkeypatch.setattr(world_models, "sees_new_scenery", lambda run, frames: seen.append(run.frames_seen) or True)
    still = {"vae_lr": 1e-12, "model_lr": 1e-12, "model_lr_decay": 0.0}  # M's rate falls to 1e-5 from the second update
    networks = ("model.lstm", "model.head", "others.0.lstm", "others.0.head")
    for stage, parts in (("m", networks), ("v", ("vae", *networks))):
        flags = still if stage == "v" else {name: still[name] for name in still if name != "vae_lr"}
        found = load(resume(world_models, again(), from_stage=stage, **settings | flags))
        for name, tensor in before.items():
            if name.startswith(parts):
                torch.testing.assert_close(found["parts"]["agent"][name], tensor, rtol=0, atol=3e-4)
        counters = found["parts"]["counters"]
        assert counters["round"] == 2 and counters["frames_before"] == 48 <= counters["frames_seen"]
    assert seen == [48]  # asked once, by V, of what was new in the second round
    line = error_of(capsys, resume, world_models, again(), from_stage="m", **settings | {"hidden_size": 24})
    assert "--hidden-size 24 clashes" in line
    for number in (3, 1):  # Ms of the round before go on, further ones begin anew, or there are fewer
        flags = {name: still[name] for name in still if name != "vae_lr"} | {"num_models": number}
        several = resume(world_models, again(), from_stage="m", **settings | flags)
        found = load(several)["parts"]["agent"]
        heads = [tensor for name, tensor in found.items() if name.endswith("head.weight")]
        assert len(heads) == number and (number == 1 or heads[1].ne(heads[2]).any())
        for name in ["model.head.weight", "others.0.head.weight"][:number]:
            torch.testing.assert_close(found[name], before[name], rtol=0, atol=3e-4)
    for stage in ("v", "m", "c"):
        more = settings | {"total_timesteps": 96}
        line = error_of(capsys, resume, world_models, again(), from_stage=stage, **more)
        assert f"--from-stage {stage} records nothing" in line


@pytest.mark.parametrize("repeat", [1, 2])
def test_only_what_will_be_recorded_needs_room(repeat, monkeypatch, capsys):
    """Not what has been, nor the six steps of an episode that was dropped for being short, nor what will be cut off.

    Repeated actions have a frame each.
    """
    settings = {"rounds": 2, "round_timesteps": 30, "total_timesteps": 48, "min_episode_length": 8 // repeat}
    settings["action_repeat"] = repeat
    whole = run(world_models, **settings)
    assert sum(load(whole)["parts"]["replay"]["lengths"]) == 72 // repeat
    free = SimpleNamespace(free=0)  # bytes
    monkeypatch.setattr(world_models.shutil, "disk_usage", lambda path: free)
    resume(world_models, whole, from_stage="c", **settings)
    free.free = (30 // repeat - 1) * 12288  # for one frame less
    assert "frames do not fit" in error_of(capsys, resume, world_models, whole, **settings | {"rounds": 3})
    free.free += 12288
    resume(world_models, whole, **settings | {"rounds": 3})
    again = {"from_stage": "collect", "total_timesteps": 90, "action_repeat": repeat}  # 78 steps' frames will be cut
    again["min_episode_length"], free.free = 8 // repeat, 10**9
    single = run(world_models, **again | {"from_stage": None, "total_timesteps": 78})
    free.free = (18 // repeat - 1) * 12288  # of 72 // repeat
    assert "frames do not fit" in error_of(capsys, resume, world_models, single, **again)
    free.free += 12288
    resume(world_models, single, **again)


def test_rounds_are_not_thrown_away(capsys):
    """The first stage of a later round is not repeated alone: all rounds would begin anew."""
    settings = {"rounds": 2, "round_timesteps": 30, "total_timesteps": 48}
    run_dir = run(world_models, **settings)
    before = Path(run_dir, "checkpoint.pt").read_bytes()
    line = error_of(capsys, resume, world_models, run_dir, from_stage="collect", **settings)
    assert "throw away all 2 rounds" in line and Path(run_dir, "checkpoint.pt").read_bytes() == before


def test_frames_that_later_rounds_need_are_missed(capsys):
    """C needs none; but rounds that are left do."""
    settings = {"round_timesteps": 30, "total_timesteps": 48}
    whole = run(world_models, rounds=2, **settings)
    Path(whole, "frames.bin").unlink()
    resume(world_models, whole, from_stage="c", rounds=2, **settings)
    line = error_of(capsys, resume, world_models, whole, rounds=3, **settings)
    assert "has 0 frames of 78" in line and line.rstrip().endswith("begin a new run")


@pytest.mark.parametrize(("seconds", "units"), [(0.0, list(range(0, 100, 2))), (1.0, [0, 42, 84])])
def test_saving_takes_a_twentieth_of_the_time_of_updates(seconds, units, monkeypatch):
    """Where a save takes long the next one waits, 20 s for 1 s, 40 updates; what is logged does not depend on it."""
    run, saves, logged, now = make_run(checkpoint_frequency=2), [], [], [0.0]

    def save(run) -> None:
        saves.append(run.units_done)
        now[0] += seconds

    def update(batch: int) -> dict:
        now[0] += 0.5
        return {"losses/x": torch.tensor(1.0)}

    monkeypatch.setattr(world_models.Run, "save", save)
    monkeypatch.setattr(world_models.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(run, "log", lambda values: logged.append(run.units_done))
    run.stage = "v"
    run.save()
    assert run.updates(100, 1, lambda number: [0] * 100, update)
    assert saves == units and logged == list(range(2, 101, 2))


def test_play_takes_few_settings_and_a_display(monkeypatch, capsys):
    """Others would be ignored; and a window that nobody sees would run for ever."""
    run_dir = run(world_models)
    import pygame

    line = error_of(capsys, command_line, monkeypatch, world_models, "--play", run_dir, "--temperature", "0.5")
    assert "--play takes --seed and --cuda and no other setting" in line
    monkeypatch.delenv("SDL_VIDEODRIVER", raising=False)
    monkeypatch.setattr(pygame.display, "get_driver", lambda: "offscreen")
    monkeypatch.setattr(pygame.display, "set_mode", lambda size: pygame.Surface(size))
    line = error_of(capsys, command_line, monkeypatch, world_models, "--play", f"{run_dir}/checkpoint.pt")
    assert "there is no display" in line


def test_more_generations_go_on_where_the_others_ended():
    """As if all had been asked for at once, curves included; both scores of the old end stay."""
    whole = run(world_models, generations=4, eval_frequency=1)
    run_dir = run(world_models, generations=2, eval_frequency=1)
    resume(world_models, run_dir, generations=4, eval_frequency=1)
    assert differences(load(whole), load(run_dir)) == []
    assert losses(whole) == losses(run_dir)


def test_not_further_than_it_has_come(capsys):
    """A later stage than the one in progress cannot be done again."""
    run_dir = run(world_models)
    state = load(run_dir)
    state["parts"]["counters"]["stage"] = "v"
    torch.save(state, Path(run_dir, "checkpoint.pt"))
    assert "not come further than v" in error_of(capsys, resume, world_models, run_dir, from_stage="m")
    assert "no controller yet" in error_of(capsys, world_models.main, tiny(world_models, evaluate=run_dir))


@pytest.mark.parametrize("kind", ["short", "missing"])
def test_a_run_without_its_frames_is_refused(capsys, kind):
    """One line that names the file and the stage to repeat, the checkpoint stays; C needs no frames."""
    run_dir = run(world_models)
    before, frames = Path(run_dir, "checkpoint.pt").read_bytes(), Path(run_dir, "frames.bin")
    frames.unlink() if kind == "missing" else frames.write_bytes(frames.read_bytes()[:-1])
    for settings in ({"from_stage": "m"}, {"from_stage": "v"}, {"total_timesteps": 72}):
        line = error_of(capsys, resume, world_models, run_dir, **settings)
        assert str(frames) in line and "--from-stage collect" in line
        assert Path(run_dir, "checkpoint.pt").read_bytes() == before
    for stage in ("c", "collect"):
        repeated = resume(world_models, run_dir, from_stage=stage)
        assert load(repeated)["parts"]["counters"]["stage"] == "finished"


def test_latents_that_are_lost_are_encoded_again():
    """Whatever is left of the file, M learns the same."""
    run_dir = run(world_models)
    before, latents = load(run_dir), Path(run_dir, "latents.bin")
    latents.write_bytes(latents.read_bytes()[:100])
    resume(world_models, run_dir, from_stage="m")
    assert differences(before, load(run_dir)) == []


def test_while_c_is_evolved_only_what_changes_is_written(monkeypatch):
    """V, M and the replay once, at the beginning; then the controller and the counters; all of it at the end."""
    written, write = [], world_models.write_file

    def note(path, state):
        written.append("C" if sorted(state["parts"]) == ["controller", "counters"] else "all")
        write(path, state)

    monkeypatch.setattr(world_models, "write_file", note)
    run_dir = run(world_models, checkpoint_frequency=0)
    assert written == ["all"] * 5  # before and after each of the four stages
    written.clear()
    again = copy_of(run_dir)
    resume(world_models, again, from_stage="c", checkpoint_frequency=1, eval_frequency=1)
    assert written[0] == written[-1] == "all" and written[1:-1] == ["C"] * (len(written) - 2) and len(written) >= 4
    assert differences(load(run_dir)["parts"], load(again)["parts"]) == [] and not Path(again, "c").exists()


def test_what_was_written_of_another_c_is_not_taken(capsys):
    """A kill may leave it: of an earlier round, of other settings, or older than the checkpoint itself."""
    run_dir = run(world_models, generations=3)
    state = load(run_dir)
    folder, counters = Path(run_dir, "c"), state["parts"]["counters"]
    counters |= {"stage": "c", "units_done": 1}
    torch.save(state, Path(run_dir, "checkpoint.pt"))
    folder.mkdir()

    def found(args=None, **changes) -> int:
        parts = {"counters": counters | {"units_done": 2} | changes, "controller": torch.ones(13, 1)}
        newer = state | {"args": state["args"] | (args or {}), "parts": parts, "global_step": 77}
        torch.save(newer, folder / "checkpoint.pt")
        loaded = world_models.load_run(run_dir, Args())
        taken = loaded["global_step"] == 77
        assert taken == bool((loaded["parts"]["agent"]["controller"] == 1).all())
        assert loaded["parts"]["counters"]["units_done"] == (2 if taken else 1)
        return taken

    assert found() and not found(round=2) and not found(units_done=0) and not found({"sigma": 0.3})
    (folder / "checkpoint.pt").write_bytes(b"damaged")
    assert "no readable checkpoint" in error_of(capsys, world_models.load_run, run_dir, Args())
    counters["stage"] = "finished"
    torch.save(state, Path(run_dir, "checkpoint.pt"))
    assert not world_models.load_run(run_dir, Args())["global_step"] == 77


@pytest.mark.parametrize("way", ["resume", "evaluate", "play"])
def test_what_does_not_fit_is_a_line(way, capsys):
    """Another environment under the same id, and a checkpoint without its counters."""
    run_dir = run(world_models)
    state = load(run_dir)
    start = {
        "resume": lambda: resume(world_models, run_dir, from_stage="c"),
        "evaluate": lambda: world_models.main(tiny(world_models, evaluate=run_dir)),
        "play": lambda: world_models.main(Args(play=run_dir)),
    }[way]
    weights = state["parts"]["agent"]
    weights["model.lstm.weight_ih_l0"] = torch.zeros(32, 9)  # of actions of more numbers
    torch.save(state, Path(run_dir, "checkpoint.pt"))
    assert "does not fit this script" in error_of(capsys, start)
    for name in ("agent", "counters"):
        damaged = state | {"parts": {key: part for key, part in state["parts"].items() if key != name}}
        torch.save(damaged, Path(run_dir, "checkpoint.pt"))
        assert "does not fit this script" in error_of(capsys, start)


def test_streams_of_random_numbers_are_all_different():
    """Neither those of neighbouring seeds nor those of one seed have a beginning in common."""
    found = set()
    for seed in range(3):
        run = make_run(seed=seed)
        found |= {int(torch.randint(2**62, (), generator=run.rng[name])) for name in ("v", "m")}
        for stream in range(13, 19):
            draw = world_models.make_generator(torch.device("cpu"), seed, stream)
            found.add(int(torch.randint(2**62, (), generator=draw)))
        found |= {int(run.rng[name].integers(2**62)) for name in ("actions", "reset")}
    assert len(found) == 3 * (2 + 6 + 2)


SIZES = {
    "frames": ({"total_timesteps": 10**9}, "GB of frames do not fit on the disk"),
    "V": ({"vae_depth": 2**16}, "sizes of V, M and their batches"),
    "frames of a batch": ({"vae_batch_size": 2**16, "vae_depth": 1024}, "sizes of V, M and their batches"),
    "M": ({"hidden_size": 2**16}, "sizes of V, M and their batches"),
    "sequences": (
        {
            "env_id": "CartPole-v1",
            "render_obs": True,
            "model_batch_size": 2**16,
            "sequence_length": 10**4,
            "hidden_size": 256,
        },
        "sizes of V, M and their batches",
    ),
    "dreams": ({"population": 10**6, "episodes": 10**4}, "--population and --episodes"),
}


@pytest.mark.parametrize("name", SIZES)
def test_sizes_that_fit_no_memory_are_refused(name, capsys):
    """Before anything is allocated, or a folder is made."""
    changes, words = SIZES[name]
    assert words in error_of(capsys, world_models.main, tiny(world_models, **changes)) and os.listdir() == []
    assert "episodes end after 12" in error_of(capsys, world_models.main, tiny(world_models, min_episode_length=13))
    args, many = make_args(hidden_size=256, total_timesteps=99), Spec("discrete", 3000, 2100, True, True)
    assert "CMA-ES of so many weights" in error_of(capsys, world_models.check_sizes, args, many, None)
    short = make_args(sequence_length=10**9, total_timesteps=99, min_episode_length=2)
    world_models.check_sizes(short, BOX, None)  # as episodes are


def test_each_model_of_a_dream_needs_its_room(monkeypatch):
    """In bytes: outputs twice, four states of h and c each."""
    asked = []
    monkeypatch.setattr(world_models, "require_memory", lambda size, what, device: asked.append((what, size)))
    for number in (1, 3):
        args = make_args(num_models=number, total_timesteps=99, min_episode_length=2)
        world_models.check_sizes(args, BOX, None)
    one, three = (size for what, size in asked if what == "--population and --episodes")
    outputs = make_agent(BOX).model.head.out_features
    assert three - one == 2 * 4 * args.population * args.episodes * (2 * outputs + 8 * args.hidden_size)


def test_data_that_was_not_kept_is_missed(capsys):
    """--no-save-buffer: C can be evolved anew, V and M cannot."""
    run_dir = run(world_models, save_buffer=False)
    line = error_of(capsys, resume, world_models, run_dir, save_buffer=False, from_stage="m")
    assert "--no-save-buffer" in line and "--from-stage collect" in line
    resume(world_models, run_dir, save_buffer=False, from_stage="c")
    assert load(run_dir)["parts"]["counters"]["stage"] == "finished"


@pytest.mark.parametrize(
    ("poison", "words"), [(math.nan, "not finite: latents of V"), (0.0, "latents of V are constant")]
)
def test_latents_that_cannot_be_learned_from_stop_the_run(poison, words):
    """Not finite, or the same for every frame: one message, and the stage can be repeated."""
    run_dir = run(world_models)
    state = load(run_dir)
    state["parts"]["agent"]["vae.mu.weight"][:] = poison
    torch.save(state, Path(run_dir, "checkpoint.pt"))
    with pytest.raises(SystemExit, match=words):
        resume(world_models, run_dir, from_stage="m")
    resume(world_models, run_dir, from_stage="v")
    assert load(run_dir)["parts"]["counters"]["stage"] == "finished"


@pytest.mark.parametrize(
    ("package", "env_id"), [("vizdoom", "VizdoomTakeCover-v1"), ("envpool", "envpool_car:EnvPool/CarRacing-v3")]
)
def test_missing_simulators_of_world_models_are_named(capsys, monkeypatch, package, env_id):
    """The pip command of a simulator that is not installed."""
    monkeypatch.syspath_prepend(ROOT / "benchmark")
    monkeypatch.setitem(sys.modules, package, None)
    assert package in error_of(capsys, world_models.main, tiny(world_models, env_id=env_id)).partition(": ")[2]
    assert os.listdir() == []


def test_a_bad_dream_is_said_before_anything_is_evolved_in_it(capsys):
    """After six updates M knows nothing: the report says so and what to change."""
    run_dir = run(world_models)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("calibration: ")]
    assert "NOT like the real environment" in lines[-1] and "--total-timesteps" in lines[-1]
    tags = scalars(run_dir)
    real = tags["calibration/recording_real"][0][1]
    returns = [value for _, value in tags["charts/episodic_return"]]
    assert real == pytest.approx(np.mean(returns), rel=1e-5)
    assert f"real {real:.1f} +- {np.std(returns):.1f}" in lines[-2]


def test_a_stage_begun_anew_is_remembered_before_the_old_one_is_given_up(monkeypatch):
    """Killed in the first update of --from-stage m: a plain resume goes on with it, and V's curves are there once."""
    run_dir = run(world_models)
    before = scalars(run_dir)["losses/vae_kl_loss"]

    def killed(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(world_models, "update_model", killed)
        with pytest.raises(KeyboardInterrupt):
            resume(world_models, run_dir, from_stage="m", model_updates=9)
    state = load(run_dir)
    assert state["parts"]["counters"]["stage"] == "m" and state["args"]["model_updates"] == 9
    resume(world_models, run_dir, model_updates=9)
    counters = load(run_dir)["parts"]["counters"]
    assert scalars(run_dir)["losses/vae_kl_loss"] == before and counters["stage"] == "finished"
    assert max(step for step, _ in scalars(run_dir)["losses/mdn_nll"]) == 48 + 12 + 9


def test_a_run_that_kept_no_buffer_records_anew():
    """More steps than were recorded: all of them again, not only those that are missing."""
    run_dir = run(world_models, save_buffer=False)
    resume(world_models, run_dir, save_buffer=False, total_timesteps=72)
    state = load(run_dir)
    assert state["global_step"] == state["parts"]["counters"]["collected"] == 72
    assert os.path.getsize(Path(run_dir, "frames.bin")) == 72 * 64 * 64 * 3


@pytest.mark.parametrize("screen", [None, "dummy"])
def test_the_window_opens_where_the_user_wants_it(screen, monkeypatch):
    """Environments are made without a screen; that is not left to the window."""
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    import pygame

    asked, run_dir = [], run(world_models)
    if screen is None:
        monkeypatch.delenv("SDL_VIDEODRIVER")
    monkeypatch.setattr(pygame.display, "init", lambda: asked.append(os.environ.get("SDL_VIDEODRIVER")) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        world_models.main(Args(play=run_dir))
    assert asked == [screen] and not pygame.display.get_init()


def test_the_dream_is_entered_by_keyboard(monkeypatch):
    """Headless: what is pressed acts, C acts after c, a dream begins anew after r and where it ends, escape closes."""
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    import pygame

    run_dir, seen, shown, flips, lots, carried = run(world_models, num_models=2), [], [], [], [], []
    script = {2: ("down", pygame.K_RIGHT), 4: ("up", pygame.K_RIGHT), 6: ("down", pygame.K_c), 8: ("down", pygame.K_r)}
    script |= {9: ("up", pygame.K_r), 14: ("down", pygame.K_ESCAPE)}
    step = world_models.dream_step_by_lot

    def dream_step(models, z, action, first, states, by, *rest):
        assert len(models) == 2 and models[0] is not models[1] and (states is carried or bool(first[0]))
        z, carried[:], reward, _ = step(models, z, action, first, states, by, *rest)
        assert not torch.equal(*(h for h, _ in carried))
        lots.append(int(by))
        seen.append((float(action[0, 0]), bool(first[0])))
        return z, carried, reward, torch.full((1,), 9.0 if len(seen) == 12 else -9.0)

    def flip():
        flips.append(pygame.surfarray.array3d(pygame.display.get_surface()))
        kind, key = script.get(len(flips), (None, None))
        if kind:
            pygame.event.post(pygame.event.Event({"down": pygame.KEYDOWN, "up": pygame.KEYUP}[kind], key=key))

    monkeypatch.setattr(world_models, "dream_step_by_lot", dream_step)
    monkeypatch.setattr(pygame.display, "flip", flip)
    monkeypatch.setattr(world_models, "controller_action", lambda *args: torch.full((1, 1), 0.25))
    assert world_models.main(Args(play=run_dir)) == run_dir
    actions, firsts = zip(*seen, strict=True)
    assert actions == (0, 0, 1, 1, 0, 0, *[0.25] * 8)
    assert [i for i, first in enumerate(firsts) if first] == [0, 8, 12] and set(lots) == {0, 1}
    assert flips[0].shape == (512, 552, 3) and flips[0][:, :512].any() and flips[0][:, 512:].any()
    shown = world_models.keyboard_action({pygame.K_LEFT, pygame.K_DOWN}, CAR)
    assert shown.tolist() == [[-1, 0, 1]]
    assert world_models.keyboard_action({pygame.K_UP}, CAR).tolist() == [[0, 1, 0]]
    assert world_models.keyboard_action({pygame.K_LEFT, pygame.K_UP}, BOX).tolist() == [[-1, 1]]
    three = Spec("discrete", 3, 12, True, True)
    choices = {(): 0, (pygame.K_2,): 2, (pygame.K_1,): 1, (pygame.K_3,): 0, (pygame.K_RIGHT,): 0, (pygame.K_LEFT,): 0}
    for keys, choice in choices.items():
        assert world_models.keyboard_action(set(keys), three).argmax() == choice


def test_a_dream_of_z_alone_tells_of_nothing_else(monkeypatch):
    """M of the published car has no heads: dashes stand for reward and end, and a dream lasts as long as an episode.

    Actions that are repeated twice come half as often: 15 times a second.
    """
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    import pygame

    run_dir, firsts, told, rates = run(world_models, controller_env="real", action_repeat=2), [], [], []
    step, make_font = world_models.dream_step, pygame.font.Font

    def dream_step(model, z, action, first, *rest):
        firsts.append(int(first))
        return step(model, z, action, first, *rest)

    def render(text, *style):
        told.append(text)
        if len(told) == 14:
            pygame.event.post(pygame.event.Event(pygame.QUIT))
        return make_font(None, 28).render(text, *style)

    monkeypatch.setattr(world_models, "dream_step", dream_step)
    monkeypatch.setattr(pygame.font, "Font", lambda *size: SimpleNamespace(render=render))
    monkeypatch.setattr(pygame.time, "Clock", lambda: SimpleNamespace(tick=rates.append))
    world_models.main(Args(play=run_dir))
    assert told[1] == "you  step 2  reward -  sum -  P[end] -" and len(told) == 14
    assert [i for i, first in enumerate(firsts) if first] == [0, 6, 12] and set(rates) == {15.0}  # of 12 steps


def test_temperature_table(monkeypatch, capsys):
    """Two temperatures, each evolved in a copy of the run, which itself stays as it is; once more over the copies."""
    monkeypatch.syspath_prepend(ROOT / "benchmark")
    table = importlib.import_module("world_models_temperature")
    run_dir = run(world_models)
    kept = {path.name: path.read_bytes() for path in Path(run_dir).iterdir()}
    for _ in range(2):
        monkeypatch.setattr(sys, "argv", ["", run_dir, "--temperatures", "0.5", "1.3", "--eval-episodes", "2"])
        table.main()
        lines = capsys.readouterr().out.splitlines()[-4:]
        assert lines[0] == "| temperature | dream (100 dreams) | real (2 episodes) |"
        assert [line.split(" ")[1] for line in lines[2:]] == ["0.5", "1.3"] and all("±" in line for line in lines[2:])
    assert kept == {path.name: path.read_bytes() for path in Path(run_dir).iterdir()}
    for temperature in (0.5, 1.3):
        assert load(f"{run_dir}_tau{temperature}")["args"]["temperature"] == temperature


TINY_TASK = dict(  # the command of benchmark/world_models.sh small
    env_id="fake_envs:TinyPixels-v0", total_timesteps=6000, latent_size=32, vae_depth=8, vae_batch_size=32,
    vae_epochs=12, vae_lr=1e-3, hidden_size=32, num_mixtures=3, sequence_length=24, model_batch_size=16,
    model_updates=3000, model_lr=3e-3, model_lr_decay=0.999, temperature=1.0, population=24, episodes=8,
    generations=200, sigma=0.3, eval_frequency=1, eval_generations=1000, eval_episodes=20, checkpoint_frequency=0,
)  # fmt: skip


def test_the_price_is_said_before_it_is_paid(capsys):
    """TakeCover as published: 3.08M steps, V 10 times as many frames, M 24,400 x 100 x 500 steps, C 1,800 x 64 x 16
    dreams of 2,100. A frame is 12,288 bytes. Twice the units cost four times as much, half of them half as much."""

    def introduction(spec, device="cpu", **changes) -> str:
        args = world_models.with_task_defaults(Args(**changes))
        agent = SimpleNamespace(vae=nn.Linear(2, 3), model=nn.Linear(4, 5), controller=torch.zeros(6))
        run = SimpleNamespace(args=args, spec=spec, agent=agent, folder="runs/x", device=torch.device(device))
        return world_models.introduction(run)

    hours = [3.08e6 / 2300, 3.08e7 / 299, 24_400 * 50_000 / 26_500 * 4, 1800 * 1024 * 2100 / 64_200 * 4]
    prices = "recording {:.1f}, V {:.1f}, M {:.1f}, C {:.1f};"
    line = introduction(DOOM)
    assert prices.format(*(seconds / 3600 for seconds in hours)) in line and "V 9, M 25, C 6; 37.8 GB of" in line
    car = [10_015_000 / 138, 10_015_000 * 10 / 299 / 2, 2 * 4000 * 1e5 / 26_500 / 2, 2 * 1800 * 1024 * 1000 / 138]
    published = {"env_id": "CarRacing-v3", "rounds": 2, "hidden_size": 128, "vae_depth": 16}
    line = introduction(CAR, **published)
    assert prices.format(*(seconds / 3600 for seconds in car)) in line and "123.1 GB of frames" in line
    line = introduction(CAR._replace(time_limit=250), action_repeat=4, **published)  # a quarter of frames and lengths
    car[1:3] = car[1] / 4, car[2] / 4
    assert prices.format(*(seconds / 3600 for seconds in car)) in line and "30.8 GB of frames" in line
    line = introduction(CAR, controller_env="dream", num_models=2, **published)
    one = introduction(CAR, controller_env="dream", **published)
    hours = [[float(x) for x in re.findall(r"M ([\d.]+), C ([\d.]+);", text)[-1]] for text in (line, one)]
    assert hours[0] == pytest.approx([2 * x for x in hours[1]], abs=0.11) and hours[1][0] > 1
    assert "V 9, M 25, C 6;" in one and "V 9, M 2 x 25, C 6;" in line
    line = introduction(CAR, "meta", **published)  # networks are as fast as that device is
    assert f"one core: recording {car[0] / 3600:.1f}, C {car[3] / 3600:.1f};" in line
    assert f"one core: recording {3.08e6 / 2300 / 3600:.1f};" in introduction(DOOM, "meta")
    run(world_models)
    assert "hours of one core: recording 0.0, V 0.0, M 0.0, C 0.0;" in capsys.readouterr().out


@pytest.mark.slow
def test_two_rounds_are_worth_more_than_one_of_as_many_steps(capsys):
    """Steps, updates and generations are the same, three seeds. Where C goes in the dream random play has hardly been:
    it costs 5 a step, which M learns of what C recorded for the second round. Perfect play has 8.3."""
    scores, task = {1: [], 2: []}, TINY_TASK | {"env_id": "fake_envs:FarPixels-v0", "latent_size": 8}
    for rounds, seed in itertools.product((1, 2), (1, 2, 3)):
        shared = {"total_timesteps": 4000, "model_updates": 2000, "generations": 100}
        changes = {name: number // rounds for name, number in shared.items()}
        changes |= {"rounds": rounds, "round_timesteps": 2000, "max_hold": 1, "seed": seed}
        scores[rounds].append(scalars(run(world_models, **task | changes))["eval/episodic_return"][-1][1])
    print(scores)
    assert min(scores[2]) > 0 and np.mean(scores[2]) > np.mean(scores[1]) + 5


@pytest.mark.slow
def test_world_models_learn_a_tiny_pixel_task_in_their_dream(capsys):
    """The picture shows the right action: random play returns -40 an episode, the best constant one -30, perfect 0."""
    run_dir = run(world_models, **TINY_TASK)
    tags = scalars(run_dir)
    real, dreamed = (tags[f"{name}/episodic_return"][-1][1] for name in ("eval", "dream"))
    print(f"dream {dreamed:.1f}, real {real:.1f}")
    assert real > -25 and abs(real - dreamed) < 10  # the best constant action has -30
    assert "NOT like" not in capsys.readouterr().out
