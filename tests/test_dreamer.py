"""Numbers of dreamer.py: each piece against its equation written out plainly, a known result or torch.distributions."""

import dataclasses
import math
import os
import re
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
import torch.distributions as td
import torch.nn as nn
import torch.nn.functional as F
from runs import (
    TWO_ENVS,
    VECTORS,
    assert_healthy,
    command_line,
    differences,
    episodes,
    error_of,
    load,
    resume,
    run,
    scalars,
    tiny,
)
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor, FakeTensorMode
from torch.utils.tensorboard import SummaryWriter

import dreamer
import dreamer_v3
from dreamer import Args, EpisodeRecorder, ReplayBuffer

IMAGE = gym.spaces.Box(0, 255, (64, 64, 3), np.uint8)
VECTOR = gym.spaces.Box(-np.inf, np.inf, (5,), np.float32)
BOX = gym.spaces.Box(-1, 1, (2,), np.float32)
DISCRETE = gym.spaces.Discrete(3)
HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)
CPU = torch.device("cpu")


def tiny_args(**overrides) -> Args:
    """Settings small enough for milliseconds; the continuation head is off unless asked for."""
    sizes = {"batch_size": 3, "batch_length": 5, "horizon": 4, "cnn_depth": 2, "stoch_size": 3, "deter_size": 8}
    others = {"dense_size": 10, "cont_head": False, "cuda": False, "env_id": "Toy-v0"}
    return Args(**(sizes | others | overrides))


def make_agent(args: Args, obs_space=VECTOR, action_space=BOX, biases: bool = True) -> dreamer.Agent:
    """An agent from a fixed seed, with random biases because zero ones would hide mistakes."""
    torch.manual_seed(0)
    agent = dreamer.Agent(obs_space, action_space, args)
    with torch.no_grad():
        for name, param in agent.named_parameters():
            if biases and "bias" in name:
                param.normal_(0, 0.3)
    return agent


def make_batch(agent: dreamer.Agent, args: Args, obs_space=VECTOR, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random entries (L, B, ...): an episode begins in mid-sequence here and there, one state is terminal."""
    gen = torch.Generator().manual_seed(seed)
    shape = args.batch_length, args.batch_size
    if obs_space is IMAGE:
        obs = torch.randint(256, (*shape, 64, 64, 3), generator=gen, dtype=torch.uint8)
    else:
        obs = torch.randn(*shape, *obs_space.shape, generator=gen)
    action = torch.rand(*shape, agent.action_dim, generator=gen) * 2 - 1
    if agent.discrete:
        action = F.one_hot(action.argmax(-1), agent.action_dim).to(action.dtype)
    is_first, cont = torch.zeros(shape), torch.ones(shape)
    is_first[0, 0] = is_first[2, 1] = is_first[3:4, 0] = 1  # if there is a fourth entry
    cont[1, 1] = 0
    action = action * (1 - is_first[..., None])
    reward = torch.randn(shape, generator=gen)
    return {"obs": obs, "action": action, "reward": reward, "cont": cont, "is_first": is_first}


def make_noise(agent: dreamer.Agent, args: Args, seed: int = 0) -> dict[str, torch.Tensor]:
    return dreamer.draw_noise(agent, args, torch.Generator().manual_seed(seed))


def setup(args: Args, obs_space=VECTOR, action_space=BOX) -> tuple:
    """Agent, batch and noise for one update."""
    agent = make_agent(args, obs_space, action_space)
    return agent, make_batch(agent, args, obs_space), make_noise(agent, args)


@pytest.fixture
def float64(monkeypatch):
    """Everything in float64, the casts to float32 inside dreamer.py included."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


# === The equations, written out plainly ===


def dense(layer: nn.Linear, *inputs: torch.Tensor) -> torch.Tensor:
    return torch.cat(inputs, -1) @ layer.weight.T + layer.bias


def elu(x: torch.Tensor) -> torch.Tensor:
    return torch.where(x > 0, x, torch.exp(x.clamp(max=0)) - 1)


def head(net: nn.Sequential, x: torch.Tensor) -> torch.Tensor:
    """A stack of dense layers, ELU between them."""
    layers = [layer for layer in net if isinstance(layer, nn.Linear)]
    for layer in layers[:-1]:
        x = elu(dense(layer, x))
    return dense(layers[-1], x)


def gru(cell: nn.GRUCell, x: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
    x_reset, x_update, x_new = (x @ cell.weight_ih.T + cell.bias_ih).chunk(3, -1)
    h_reset, h_update, h_new = (h @ cell.weight_hh.T + cell.bias_hh).chunk(3, -1)
    reset, keep = torch.sigmoid(x_reset + h_reset), torch.sigmoid(x_update + h_update)
    return (1 - keep) * torch.tanh(x_new + reset * h_new) + keep * h


def latent(out: torch.Tensor, noise: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Sample, mean and standard deviation from the 2S outputs of a layer."""
    mean, raw = out.chunk(2, -1)
    std = torch.log(1 + torch.exp(raw)) + 0.1
    return mean + std * noise, mean, std


def next_deter(rssm: dreamer.RSSM, stoch, deter, action) -> torch.Tensor:
    return gru(rssm.cell, elu(dense(rssm.img_in, stoch, action)), deter)


def prior(rssm: dreamer.RSSM, deter, noise) -> tuple[torch.Tensor, ...]:
    return latent(dense(rssm.prior_out, elu(dense(rssm.prior_hidden, deter))), noise)


def posterior(rssm: dreamer.RSSM, deter, embed, noise) -> tuple[torch.Tensor, ...]:
    return latent(dense(rssm.post_out, elu(dense(rssm.post_hidden, deter, embed))), noise)


def filter_sequence(rssm: dreamer.RSSM, embed, action, is_first, noise) -> dict[str, torch.Tensor]:
    """Posterior states row by row and step by step; a state is forgotten where an episode begins."""
    rows = {"stoch": [], "deter": [], "mean": [], "std": []}
    for b in range(action.shape[1]):
        stoch, deter = torch.zeros(1, rssm.stoch), torch.zeros(1, rssm.deter)
        steps = {name: [] for name in rows}
        for t in range(action.shape[0]):
            if is_first[t, b] == 1:
                stoch, deter = torch.zeros_like(stoch), torch.zeros_like(deter)
            deter = next_deter(rssm, stoch, deter, action[t, b : b + 1])
            stoch, mean, std = posterior(rssm, deter, embed[t, b : b + 1], noise[t, b : b + 1])
            for name, value in zip(rows, (stoch, deter, mean, std), strict=True):
                steps[name].append(value)
        for name, values in steps.items():
            rows[name].append(torch.cat(values))
    return {name: torch.stack(values, 1) for name, values in rows.items()}


def choose(actor: dreamer.Actor, feat: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """The actor's action on a feature, with its gradient."""
    out = head(actor.net, feat)
    if actor.discrete:
        probs = torch.exp(out) / torch.exp(out).sum(-1, keepdim=True)
        return F.one_hot((out + noise).argmax(-1), actor.action_dim) + probs - probs.detach()
    m, s = out.chunk(2, -1)
    std = torch.log(1 + torch.exp(s + math.log(math.exp(5) - 1))) + 1e-4
    return torch.tanh(5 * torch.tanh(m / 5) + std * noise)


def reference_behavior(agent, stoch, deter, start_weight, noise, args, actor_inputs=None, weights=None) -> dict:
    """Actor and value loss with the live networks and detach() where the equations have a stop-gradient.

    actor_inputs and weights replace the stop-gradient quantities, to hold them still under finite differences.
    """
    model, inputs, feats = agent.world_model, [], []
    for k in range(args.horizon):
        inputs.append(torch.cat([stoch, deter], -1).detach() if actor_inputs is None else actor_inputs[k])
        action = choose(agent.actor, inputs[-1], noise["action"][k])
        deter = next_deter(model.rssm, stoch, deter, action)
        stoch = prior(model.rssm, deter, noise["prior"][k])[0]
        feats.append(torch.cat([stoch, deter], -1))
    rewards, values = ([head(net, f)[:, 0] for f in feats] for net in (model.reward, agent.value))
    conts = [torch.full_like(r, args.gamma) for r in rewards]
    if model.cont is not None:
        conts = [torch.sigmoid(head(model.cont, f)[:, 0]) for f in feats]
    returns, weight, new_weights = {args.horizon - 1: values[-1]}, start_weight, []
    for k in reversed(range(args.horizon - 1)):
        mixed = (1 - args.td_lambda) * values[k + 1] + args.td_lambda * returns[k + 1]
        returns[k] = rewards[k] + conts[k] * mixed
    actor_loss, value_loss = 0, 0
    for k in range(args.horizon - 1):
        new_weights.append(weight.detach() if weights is None else weights[k])
        weight = weight * conts[k]
        likelihood = td.Normal(head(agent.value, feats[k].detach())[:, 0], 1.0).log_prob(returns[k].detach())
        actor_loss = actor_loss - (new_weights[-1] * returns[k]).mean() / (args.horizon - 1)
        value_loss = value_loss - (new_weights[-1] * likelihood).mean() / (args.horizon - 1)
    feats = torch.stack(feats)
    return {"actor": actor_loss, "value": value_loss, "feats": feats, "inputs": inputs, "weights": new_weights}


# === Sizes and initial quantities ===


@pytest.fixture(scope="module")
def walker() -> tuple:
    """The full-size agent of walker-walk, freshly initialised, and the pieces of its model loss on random images."""
    torch.manual_seed(0)
    args = dreamer.with_task_defaults(Args(cuda=False, size="published", batch_size=2, batch_length=4))
    agent = dreamer.Agent(IMAGE, gym.spaces.Box(-1, 1, (6,), np.float32), args)
    batch = make_batch(agent, args, IMAGE)
    batch["is_first"].zero_()
    loss, post, metrics = dreamer.model_loss(agent.world_model, batch, make_noise(agent, args)["post"], args)
    return agent, args, batch, loss, post, metrics


def count(module: nn.Module) -> int:
    return sum(param.numel() for param in module.parameters())


def test_parameter_counts_of_walker(walker):
    """Every module has the size of the reference code's."""
    agent = walker[0]
    model, rssm = agent.world_model, agent.world_model.rssm
    assert [count(m) for m in model.encoder.children()] == [1_568, 32_832, 131_200, 524_544]
    decoder = model.decoder
    deconvs = (decoder.deconv1, decoder.deconv2, decoder.deconv3, decoder.deconv4)
    assert [count(m) for m in (decoder.dense, *deconvs)] == [236_544, 3_276_928, 204_864, 73_760, 3_459]
    assert [count(m) for m in (rssm.img_in, rssm.cell)] == [7_400, 241_200]
    assert [count(m) for m in (rssm.prior_hidden, rssm.prior_out)] == [40_200, 12_060]
    assert [count(m) for m in (rssm.post_hidden, rssm.post_out)] == [245_000, 12_060]
    assert [count(m) for m in (model.encoder, rssm, decoder)] == [690_144, 557_920, 3_795_555]
    assert [count(m) for m in (model.reward, model, agent.value, agent.actor)] == [253_201, 5_296_820, 413_601, 578_412]
    assert count(agent) == 6_288_833 and model.cont is None


def test_continuation_head_size_and_presence():
    """413,601 parameters; there by default outside dm_control, and on request."""
    args = dreamer.with_task_defaults(Args(env_id="ALE/Pong-v5", size="published"))
    agent = dreamer.Agent(gym.spaces.Box(-1, 1, (3,), np.float32), gym.spaces.Discrete(6), args)
    assert count(agent.world_model.cont) == 413_601
    for env_id, wanted, has_one in (
        ("Toy-v0", None, True),
        ("walker-walk", None, False),
        ("walker-walk", True, True),
        ("Toy-v0", False, False),
    ):
        args = dreamer.with_task_defaults(tiny_args(cont_head=wanted, env_id=env_id))
        assert (make_agent(args).world_model.cont is not None) == has_one == args.cont_head


@pytest.mark.parametrize(
    ("env_id", "given", "repeat"), [("Toy-v0", None, 1), ("cup-catch", None, 2), ("cup-catch", 4, 4)]
)
def test_action_repeat_of_the_environment(env_id, given, repeat):
    """2 on dm_control, 1 elsewhere, or what was asked for."""
    assert dreamer.with_task_defaults(tiny_args(env_id=env_id, action_repeat=given)).action_repeat == repeat


SIZED = "buffer_size batch_size batch_length cnn_depth dense_size".split()


@pytest.mark.parametrize("gpu", [False, True])
def test_size_of_the_machine(gpu, monkeypatch):
    """Published on a GPU, laptop without one; what is asked for wins; a saved run keeps what it had."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    sizes = {"published": [500_000, 50, 50, 32, 400], "laptop": [250_000, 16, 32, 16, 200]}

    def filled(**given) -> tuple[str, list]:
        args = dreamer.with_task_defaults(Args(**given))
        assert dreamer.with_task_defaults(args) == args  # as a resumed run has it
        return args.size, [getattr(args, name) for name in SIZED]

    name = "published" if gpu else "laptop"
    assert filled() == (name, sizes[name]) and filled(cuda=False) == ("laptop", sizes["laptop"])
    for size, values in sizes.items():
        assert filled(size=size) == (size, values)
    assert filled(batch_length=7)[1] == sizes[name][:2] + [7] + sizes[name][3:]
    saved = dreamer.with_task_defaults(Args(size="laptop"))
    assert dreamer.with_task_defaults(dreamer.replace(saved, cuda=gpu)).dense_size == 200


def test_published_settings():
    """Those of the reference code, beside what belongs to a size."""
    wanted = {"total_timesteps": 1_000_000, "action_repeat": 2, "learning_starts": 5_000, "train_frequency": 1_000}
    wanted |= {"train_steps": 100, "pretrain_steps": 100, "stoch_size": 30, "deter_size": 200, "horizon": 15}
    wanted |= {"free_nats": 3, "kl_scale": 1, "gamma": 0.99, "td_lambda": 0.95, "max_grad_norm": 100}
    wanted |= {"model_lr": 6e-4, "actor_lr": 8e-5, "value_lr": 8e-5, "expl_noise": 0.3, "clip_rewards": "none"}
    wanted |= {"expl_epsilon": (0.4, 0.1, 200_000)}
    args = dreamer.with_task_defaults(Args())
    assert {name: getattr(args, name) for name in wanted} == wanted
    assert (dreamer.ADAM_EPS, dreamer.CONT_SCALE) == (1e-7, 10)


def test_initial_latents(walker):
    """Standard deviation softplus(0) + 0.1 = 0.793 and entropy 35.6 nats, prior and posterior."""
    agent, _, _, _, post, metrics = walker
    mean, std = agent.world_model.rssm.prior(torch.zeros(1, 200))
    assert torch.all(mean == 0) and std.shape == (1, 30)
    torch.testing.assert_close(std, torch.full_like(std, math.log(2) + 0.1))
    assert post["std"].mean().item() == pytest.approx(0.793, abs=0.02)
    for name in ("prior", "post"):
        assert metrics[f"model/{name}_entropy"].item() == pytest.approx(35.6, abs=0.4)


def test_initial_losses(walker):
    """Grey prediction: image loss = floor + half the squared image; reward loss near its floor plus half the square."""
    agent, _, batch, loss, post, metrics = walker
    floor = 12288 * HALF_LOG_2PI
    assert floor == pytest.approx(11_291.9, abs=0.1)
    output = agent.world_model.decode(torch.cat([post["stoch"], post["deter"]], -1))
    assert output.shape == (4, 2, 3, 64, 64) and 1e-4 < output.std().item() < 0.03
    image = dreamer.preprocess(batch["obs"])
    expected = floor + 0.5 * image.square().sum((2, 3, 4)).mean().item()
    assert metrics["losses/image_loss"].item() == pytest.approx(expected, abs=5)
    expected = 0.9189 + 0.5 * batch["reward"].square().mean().item()
    assert metrics["losses/reward_loss"].item() == pytest.approx(expected, abs=0.3)
    parts = sum(metrics[f"losses/{name}_loss"] for name in ("image", "reward", "kl"))
    torch.testing.assert_close(loss, parts)


def test_initial_kl_is_clipped_and_has_no_gradient(walker):
    """The mean KL starts below three free nats: exactly 3.0 is logged and the term's gradient is exactly zero."""
    agent, args, batch, _, _, metrics = walker
    assert 0 < metrics["model/kl"].item() < 2
    assert metrics["losses/kl_loss"].item() == 3.0
    params = list(agent.world_model.parameters())
    gradients = torch.autograd.grad(metrics["losses/kl_loss"], params, retain_graph=True, allow_unused=True)
    assert all(g is None or not g.any() for g in gradients)
    metrics = dreamer.model_loss(
        agent.world_model, batch, make_noise(agent, args)["post"], Args(batch_size=2, batch_length=4, free_nats=0.0)
    )[2]
    gradients = torch.autograd.grad(metrics["losses/kl_loss"], params, allow_unused=True)
    assert sum(g.abs().sum() for g in gradients if g is not None) > 0


def test_initial_policy(walker):
    """Bang-bang: std 5.0, 71.5 % of |a| over 0.95, mean |a| 0.89, 18.2 nats before and -22.2 after the tanh."""
    actor = walker[0].actor
    mean, std = actor.dist(torch.zeros(1, 230))
    assert torch.all(mean == 0)
    torch.testing.assert_close(std, torch.full_like(std, 5.0001))
    assert actor.entropy((mean, std)).item() == pytest.approx(18.2, abs=0.05)
    noise = actor.draw_noise((50_000, 1), torch.Generator().manual_seed(0))
    action = actor.sample((mean, std), noise)
    assert action.shape == (50_000, 1, 6)
    assert (action.abs() > 0.95).float().mean().item() == pytest.approx(0.715, abs=0.005)
    assert action.abs().mean().item() == pytest.approx(0.89, abs=0.005)
    log_slope = -2 * torch.log(torch.cosh((mean + std * noise).double()))
    assert (18.17 + log_slope.sum(-1).mean()).item() == pytest.approx(-22.2, abs=0.3)


def test_initial_continuation_is_one_half():
    """Zero bias: on the zero feature, and nearly so on others, the head says 0.5."""
    agent = make_agent(tiny_args(cont_head=True, dense_size=400), biases=False)
    head = agent.world_model.cont
    assert torch.sigmoid(head(torch.zeros(1, 11))).item() == 0.5
    assert torch.sigmoid(head(torch.randn(500, 11) * 0.3)).mean().item() == pytest.approx(0.5, abs=0.1)


def test_weight_initialisation(walker):
    """Xavier-uniform weights, zero biases everywhere; recurrent weights with orthonormal columns."""
    agent, seen = walker[0], 0
    for module in agent.modules():
        weights = {}
        if isinstance(module, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
            weights[module.bias] = module.weight
        elif isinstance(module, nn.GRUCell):
            weights[module.bias_ih] = module.weight_ih
            assert not module.bias_hh.any()
            torch.testing.assert_close(module.weight_hh.T @ module.weight_hh, torch.eye(200), atol=1e-5, rtol=0)
        for bias, weight in weights.items():
            seen += weight.numel() + bias.numel()
            assert not bias.any()
            bound = math.sqrt(6 / ((weight.shape[0] + weight.shape[1]) * math.prod(weight.shape[2:])))
            assert 0.98 * bound < weight.abs().max().item() <= bound
            assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.06)
    assert seen == count(agent) - 600 * 200 - 600


# === Targets and losses ===


def random_returns_input(horizon: int = 6, num: int = 4) -> tuple[torch.Tensor, ...]:
    gen = torch.Generator().manual_seed(1)
    rewards, values, conts = (torch.rand(horizon, num, generator=gen, dtype=torch.float64) for _ in range(3))
    return rewards * 2 - 1, values * 10, conts


@pytest.mark.parametrize("lam", [0.0, 0.5, 0.95, 1.0])
def test_lambda_return_is_the_mixture_of_n_step_returns(lam):
    """G_k = (1 - lam) sum_n lam^(n-1) V_k^n + lam^(m-1) V_k^m with m = H - k, discounts varying."""
    rewards, values, conts = random_returns_input()
    horizon = len(rewards)

    def n_step(k: int, n: int) -> torch.Tensor:
        total, discount = torch.zeros(4), torch.ones(4)
        for j in range(k, k + n):
            total, discount = total + discount * rewards[j], discount * conts[j]
        return total + discount * values[k + n]

    result = dreamer.lambda_return(rewards, values, conts, lam)
    assert result.shape == (horizon - 1, 4)
    for k in range(horizon - 1):
        last = horizon - 1 - k
        mixture = lam ** (last - 1) * n_step(k, last)
        for n in range(1, last):
            mixture = mixture + (1 - lam) * lam ** (n - 1) * n_step(k, n)
        torch.testing.assert_close(result[k], mixture)


def test_lambda_return_against_a_loop():
    """One number at a time, from the last state backwards; and known values for constant input."""
    rewards, values, conts = random_returns_input()
    result = dreamer.lambda_return(rewards, values, conts, 0.95)
    for i in range(4):
        last = values[5, i].item()
        for k in (4, 3, 2, 1, 0):
            mixed = 0.05 * values[k + 1, i].item() + 0.95 * last
            last = rewards[k, i].item() + conts[k, i].item() * mixed
            assert result[k, i].item() == pytest.approx(last, rel=1e-12)
    ones = torch.ones(6, 1)
    torch.testing.assert_close(dreamer.lambda_return(ones, 100 * ones, 0.99 * ones, 0.95), 100 * ones[1:])


def test_dream_weights_are_products_of_earlier_discounts():
    """w_1 = the start's weight, w_k = w_1 c_1 ... c_(k-1); never a gradient."""
    conts = torch.rand(6, 4, requires_grad=True)
    start = torch.tensor([1.0, 0.0, 1.0, 0.5])
    weights = dreamer.dream_weights(conts, start)
    assert weights.shape == (5, 4) and not weights.requires_grad
    for k in range(5):
        torch.testing.assert_close(weights[k], start * conts[:k].detach().prod(0))
    gamma = dreamer.dream_weights(torch.full((15, 1), 0.99), torch.ones(1))[:, 0]
    torch.testing.assert_close(gamma, 0.99 ** torch.arange(14.0))


def test_kl_is_posterior_from_prior():
    """KL(post || prior) of torch.distributions, summed over the latent dimensions; the other direction differs."""
    gen = torch.Generator().manual_seed(0)
    mean_p, mean_q = torch.randn(2, 7, 30, generator=gen)
    std_p, std_q = torch.rand(2, 7, 30, generator=gen) + 0.1
    forward = td.kl_divergence(td.Normal(mean_p, std_p), td.Normal(mean_q, std_q)).sum(-1)
    backward = td.kl_divergence(td.Normal(mean_q, std_q), td.Normal(mean_p, std_p)).sum(-1)
    result = dreamer.kl_divergence(mean_p, std_p, mean_q, std_q)
    torch.testing.assert_close(result, forward, rtol=1e-4, atol=1e-4)
    assert (result - backward).abs().min() > 0.1
    assert dreamer.kl_divergence(mean_p, std_p, mean_p, std_p).abs().max() < 1e-5


@pytest.mark.parametrize("std", [1.0, 0.1])
def test_normal_loss(std):
    """The negative log-likelihood of torch's Normal; its floor at standard deviation 1 is 0.9189."""
    pred, target = torch.randn(2, 50)
    torch.testing.assert_close(dreamer.normal_loss(pred, target, std), -td.Normal(pred, std).log_prob(target))
    assert dreamer.normal_loss(pred, pred)[0].item() == pytest.approx(0.9189, abs=1e-4)


def test_preprocess():
    """uint8 images to [-0.5, 0.5] with channels first; vectors through symlog."""
    image = torch.randint(256, (2, 3, 4, 5, 3), dtype=torch.uint8)
    result = dreamer.preprocess(image)
    assert result.shape == (2, 3, 3, 4, 5) and result.dtype == torch.float32
    assert result[1, 2, 0, 3, 4].item() == pytest.approx(image[1, 2, 3, 4, 0].item() / 255 - 0.5)
    extremes = torch.tensor([0, 255], dtype=torch.uint8).reshape(2, 1, 1)
    assert dreamer.preprocess(extremes).flatten().tolist() == pytest.approx([-0.5, 0.5])
    vector = torch.tensor([0.0, math.e - 1, 1 - math.e, 999.0])
    torch.testing.assert_close(dreamer.preprocess(vector), torch.tensor([0.0, 1.0, -1.0, math.log(1000)]))


@pytest.mark.parametrize("obs_space", [VECTOR, IMAGE], ids=["vector", "image"])
def test_model_loss_against_torch_distributions(float64, obs_space):
    """Sums over pixels and latents, means over batch and time, KL clipped after its mean, soft continuation targets."""
    args = tiny_args(cont_head=True, kl_scale=0.3, gamma=0.9)
    agent, batch, noise = setup(args, obs_space)
    model = agent.world_model
    embed = model.encoder(dreamer.preprocess(batch["obs"]).flatten(0, 1)).unflatten(0, (5, 3))
    post = filter_sequence(model.rssm, embed, batch["action"], batch["is_first"], noise["post"])
    feat = torch.cat([post["stoch"], post["deter"]], -1)
    _, prior_mean, prior_std = prior(model.rssm, post["deter"], 0)
    kl = td.kl_divergence(td.Normal(post["mean"], post["std"]), td.Normal(prior_mean, prior_std)).sum(-1)
    assert kl.min() < 0.9 * kl.mean()  # clipping each step would give something else
    obs = dreamer.preprocess(batch["obs"])
    recon = model.decoder(feat.flatten(0, 1)).unflatten(0, (5, 3))
    image = -td.Normal(recon, 1.0 if obs_space is IMAGE else 0.1).log_prob(obs).flatten(2).sum(-1).mean()
    reward = -td.Normal(head(model.reward, feat)[..., 0], 1.0).log_prob(batch["reward"]).mean()
    prob = torch.sigmoid(head(model.cont, feat)[..., 0])
    target = torch.where(batch["cont"] == 1, 0.9, 0.0)
    cont = -(target * prob.log() + (1 - target) * (1 - prob).log()).mean()
    for free, clipped in ((0.9 * kl.mean().item(), kl.mean()), (2 * kl.mean().item(), 2 * kl.mean())):
        args.free_nats = free
        loss, states, metrics = dreamer.model_loss(model, batch, noise["post"], args)
        expected = {"image_loss": image, "reward_loss": reward, "kl_loss": clipped, "cont_loss": cont}
        for name, value in expected.items():
            torch.testing.assert_close(metrics[f"losses/{name}"], value)
        torch.testing.assert_close(loss, image + reward + 0.3 * clipped + 10 * cont)
    torch.testing.assert_close(states["stoch"], post["stoch"])
    args.clip_rewards = "tanh"
    reward = -td.Normal(head(model.reward, feat)[..., 0], 1.0).log_prob(torch.tanh(batch["reward"])).mean()
    metrics = dreamer.model_loss(model, batch, noise["post"], args)[2]
    torch.testing.assert_close(metrics["losses/reward_loss"], reward)


# === Networks ===


def test_encoder_and_decoder_are_the_plain_convolutions(float64):
    """Stride 2, no padding, ReLU on all but the picture; the products that replace two of the convolutions agree."""
    args = tiny_args(cnn_depth=3)
    model = make_agent(args, IMAGE).world_model
    x = image = torch.rand(2, 3, 64, 64) - 0.5
    for conv, size in zip(model.encoder.children(), (31, 14, 6, 2), strict=True):
        x = F.conv2d(x, conv.weight, conv.bias, stride=2).clamp(min=0)
        assert x.shape[-2:] == (size, size)
    torch.testing.assert_close(model.encoder(image), x.flatten(1))
    feat, decoder = torch.randn(2, 11), model.decoder
    x = dense(decoder.dense, feat)[..., None, None]
    for conv, size in zip((decoder.deconv1, decoder.deconv2, decoder.deconv3), (5, 13, 30), strict=True):
        x = F.conv_transpose2d(x, conv.weight, conv.bias, stride=2).clamp(min=0)
        assert x.shape[-2:] == (size, size)
    x = F.conv_transpose2d(x, decoder.deconv4.weight, decoder.deconv4.bias, stride=2)
    torch.testing.assert_close(decoder(feat), x)


def test_observe_against_a_loop_from_the_equations(float64):
    """Row by row: same states, and the same gradients."""
    args = tiny_args()
    agent, batch, noise = setup(args)
    rssm, embed = agent.world_model.rssm, torch.randn(5, 3, 10, requires_grad=True)
    inputs = embed, batch["action"], batch["is_first"], noise["post"]
    result, expected = rssm.observe(*inputs), filter_sequence(rssm, *inputs)
    assert set(result) == {"stoch", "deter", "mean", "std"}
    for name, value in expected.items():
        torch.testing.assert_close(result[name], value)
    params = [embed, *(p for n, p in rssm.named_parameters() if "prior" not in n)]
    gradients = [
        torch.autograd.grad(states["stoch"].square().sum() + states["deter"].sum(), params)
        for states in (result, expected)
    ]
    for ours, plain in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, plain)


def test_first_entries_reset_the_state():
    """From is_first on, a sequence is as if it began there; before it and without it, it is not."""
    args = tiny_args(batch_length=6)
    agent, batch, noise = setup(args)
    rssm, embed = agent.world_model.rssm, torch.randn(6, 3, 10)
    is_first = torch.zeros(6, 3)
    is_first[3, 1] = 1
    whole = rssm.observe(embed, batch["action"], is_first, noise["post"])
    never = rssm.observe(embed, batch["action"], torch.zeros(6, 3), noise["post"])
    tail = rssm.observe(embed[3:], batch["action"][3:], torch.zeros(3, 3), noise["post"][3:])
    for name in ("stoch", "deter"):
        torch.testing.assert_close(whole[name][3:, 1], tail[name][:, 1])
        assert (never[name][3:, 1] - tail[name][:, 1]).abs().max() > 1e-3
        torch.testing.assert_close(whole[name][:, [0, 2]], never[name][:, [0, 2]])
        torch.testing.assert_close(whole[name][:3], never[name][:3])


def test_img_step_against_the_equations(float64):
    """Deterministic path, then the prior's sample; noise enters as mean + std * noise in prior and posterior."""
    agent = make_agent(tiny_args())
    rssm = agent.world_model.rssm
    stoch, deter, action, noise = (torch.randn(4, n) for n in (3, 8, 2, 3))
    new_stoch, new_deter = rssm.img_step(stoch, deter, action, noise)
    torch.testing.assert_close(new_deter, next_deter(rssm, stoch, deter, action))
    sample, mean, std = prior(rssm, new_deter, noise)
    torch.testing.assert_close(new_stoch, sample)
    torch.testing.assert_close(rssm.prior(new_deter)[0], mean)
    torch.testing.assert_close(rssm.prior(new_deter)[1], std)
    for amount in (0.0, 1.0, -2.0):
        step = rssm.obs_step(stoch, deter, action, torch.randn(4, 10), torch.zeros(4), torch.full((4, 3), amount))
        torch.testing.assert_close(step[0], step[2] + amount * step[3])
        torch.testing.assert_close(step[1], new_deter)


def test_actor_dist_formulas(float64):
    """mean = 5 tanh(m / 5), std = softplus(s + ln(e^5 - 1)) + 1e-4, sample = tanh(mean + std * noise)."""
    actor = make_agent(tiny_args()).actor
    feat, noise = torch.randn(7, 11), torch.randn(7, 2)
    m, s = (30 * head(actor.net, feat)).chunk(2, -1)
    actor.net[-1].weight.data *= 30
    actor.net[-1].bias.data *= 30
    mean, std = actor.dist(feat)
    torch.testing.assert_close(mean, 5 * torch.tanh(m / 5))
    torch.testing.assert_close(std, torch.log1p((s + 4.993239).exp()) + 1e-4, rtol=1e-6, atol=1e-6)
    assert mean.abs().max() > 2
    torch.testing.assert_close(actor.sample((mean, std), noise), torch.tanh(mean + std * noise))
    torch.testing.assert_close(actor.entropy((mean, std)), td.Normal(mean, std).entropy().sum(-1))


def test_mode_is_the_likeliest_sample_of_each_row(float64):
    """Per environment, the sample of highest log-prob under torch's tanh-transformed Normal."""
    actor = make_agent(tiny_args()).actor
    mean, std = torch.randn(6, 2), torch.rand(6, 2) * 1.5 + 0.2
    noise = torch.randn(100, 6, 2)
    result, winners = actor.mode((mean, std), noise), []
    for i in range(6):
        squashed = td.Independent(td.TransformedDistribution(td.Normal(mean[i], std[i]), td.TanhTransform()), 1)
        samples = torch.tanh(mean[i] + std[i] * noise[:, i])
        winners.append(squashed.log_prob(samples).argmax().item())
        torch.testing.assert_close(result[i], samples[winners[-1]])
    assert len(set(winners)) > 1


def test_discrete_actions_are_one_hot_with_the_gradient_of_the_softmax(float64):
    """Straight-through: the value is one-hot, the gradient that of the probabilities; the mode is the arg-max."""
    actor = make_agent(tiny_args(), action_space=DISCRETE).actor
    logits, noise, slope = torch.randn(8, 3, requires_grad=True), torch.randn(8, 3), torch.randn(8, 3)
    action = actor.sample((logits,), noise)
    torch.testing.assert_close(action, F.one_hot((logits + noise).argmax(-1), 3).double())
    expected = torch.autograd.grad((logits.softmax(-1) * slope).sum(), logits)[0]
    torch.testing.assert_close(torch.autograd.grad((action * slope).sum(), logits)[0], expected)
    assert expected.abs().min() > 1e-4
    torch.testing.assert_close(actor.mode((logits,), noise), F.one_hot(logits.argmax(-1), 3).double())
    torch.testing.assert_close(actor.entropy((logits,)), td.Categorical(logits=logits).entropy())
    assert actor.dist(torch.randn(8, 11))[0].shape == (8, 3)


def test_gumbel_noise_draws_from_the_categorical():
    """Sampled frequencies are the softmax of the logits."""
    actor = make_agent(tiny_args(), action_space=DISCRETE).actor
    noise = actor.draw_noise((60_000,), torch.Generator().manual_seed(0))
    logits = torch.tensor([1.0, -0.5, 0.2])
    frequencies = actor.sample((logits.expand(60_000, 3),), noise).mean(0)
    torch.testing.assert_close(frequencies, logits.softmax(-1), atol=0.01, rtol=0)


def test_update_noise_shapes_and_seed():
    """Standard Normals (L, B, S), (H, N, S), (H, N, A): new each time, the same again from the same seed."""
    args = tiny_args(batch_size=20, batch_length=10)
    agent = make_agent(args)
    gen = torch.Generator().manual_seed(3)
    first, second = dreamer.draw_noise(agent, args, gen), dreamer.draw_noise(agent, args, gen)
    shapes = {name: tuple(noise.shape) for name, noise in first.items()}
    assert shapes == {"post": (10, 20, 3), "prior": (4, 200, 3), "action": (4, 200, 2)}
    again = make_noise(agent, args, seed=3)
    for name, noise in first.items():
        assert noise.mean().abs() < 0.15 and abs(noise.std() - 1) < 0.1
        assert torch.equal(noise, again[name]) and not torch.equal(noise, second[name])
    assert not torch.equal(first["post"].flatten()[:600], first["prior"].flatten()[:600])


# === Gradients ===


def networks(agent: dreamer.Agent) -> dict[str, nn.Module]:
    """Which loss is whose."""
    return {"model": agent.world_model, "actor": agent.actor, "value": agent.value}


def gradients_of(agent: dreamer.Agent, losses: dict[str, torch.Tensor]) -> dict[str, list[torch.Tensor]]:
    """For each network the gradients of its own loss."""
    nets = networks(agent).items()
    return {
        name: list(torch.autograd.grad(losses[name], list(net.parameters()), retain_graph=True)) for name, net in nets
    }


@pytest.mark.parametrize("action_space", [BOX, DISCRETE], ids=["continuous", "discrete"])
@pytest.mark.parametrize("obs_space", [VECTOR, IMAGE], ids=["vector", "image"])
def test_each_network_gets_the_gradient_of_its_own_loss(obs_space, action_space):
    """All of each network does, and nothing of the others' losses, though that of the actor passes through them."""
    args = tiny_args(free_nats=0.0, cont_head=True, max_grad_norm=1e9)
    agent, batch, noise = setup(args, obs_space, action_space)
    losses, _ = dreamer.compute_losses(agent, batch, noise, args)
    expected = gradients_of(agent, losses)
    dreamer.update(agent, dreamer.make_optimizers(agent, args), batch, noise, args)
    for name, net in networks(agent).items():
        for param, gradient in zip(net.parameters(), expected[name], strict=True):
            assert gradient.any()
            torch.testing.assert_close(param.grad, gradient)


@pytest.mark.parametrize("obs_space", [VECTOR, IMAGE], ids=["vector", "image"])
def test_losses_stop_where_they_should(obs_space):
    """Each reaches all of its own network and no other; afterwards every parameter can be learned again."""
    args = tiny_args(free_nats=0.0, cont_head=True)
    agent, batch, noise = setup(args, obs_space)
    losses, _ = dreamer.compute_losses(agent, batch, noise, args)
    reached = {}
    for name, loss in losses.items():
        agent.zero_grad()
        loss.backward()
        reached[name] = {n for n, param in agent.named_parameters() if param.grad is not None and param.grad.any()}
    names = [name for name, _ in agent.named_parameters()]
    assert reached["model"] == {name for name in names if name.startswith("world_model.")}
    assert reached["value"] == {name for name in names if name.startswith("value.")}
    assert reached["actor"] == {name for name in names if name.startswith("actor.")}
    assert all(param.requires_grad for param in agent.parameters())


@pytest.mark.parametrize("action_space", [BOX, DISCRETE], ids=["continuous", "discrete"])
@pytest.mark.parametrize("cont_head", [False, True])
def test_behavior_losses_and_gradients_against_a_plain_reference(float64, cont_head, action_space):
    """Losses and gradients of actor and value equal those of dreams written out state by state."""
    args = tiny_args(cont_head=cont_head, td_lambda=0.8, gamma=0.9)
    agent, batch, noise = setup(args, action_space=action_space)
    losses, metrics = dreamer.compute_losses(agent, batch, noise, args)
    ours = gradients_of(agent, losses)
    _, post, _ = dreamer.model_loss(agent.world_model, batch, noise["post"], args)
    stoch, deter = (torch.cat(list(post[k].detach())) for k in ("stoch", "deter"))  # L*B starts, time by time
    expected = reference_behavior(agent, stoch, deter, torch.cat(list(batch["cont"])), noise, args)
    for name in ("actor", "value"):
        torch.testing.assert_close(metrics[f"losses/{name}_loss"], expected[name])
        plain = torch.autograd.grad(expected[name], list(networks(agent)[name].parameters()), retain_graph=True)
        for gradient, reference in zip(ours[name], plain, strict=True):
            assert reference.any()
            torch.testing.assert_close(gradient, reference)


def test_actor_gradient_against_finite_differences(float64):
    """With the actor's inputs held still (they are detached), d loss / d weight is the slope of the loss."""
    args = tiny_args(cont_head=True)
    agent, batch, noise = setup(args)
    _, post, _ = dreamer.model_loss(agent.world_model, batch, noise["post"], args)
    stoch, deter = (post[k].detach().flatten(0, 1) for k in ("stoch", "deter"))
    start = batch["cont"].flatten()
    dreamer.actor_loss(agent, post, start, noise, args)[0].backward()
    base = reference_behavior(agent, stoch, deter, start, noise, args)
    first, last = agent.actor.net[0], agent.actor.net[-1]
    for weight, index in ((first.weight, (1, 2)), (last.weight, (0, 4)), (last.bias, (3,))):
        losses = []
        for step in (1e-5, -1e-5):
            with torch.no_grad():
                weight[index] += step
                held = reference_behavior(agent, stoch, deter, start, noise, args, base["inputs"], base["weights"])
                losses.append(held["actor"])
                weight[index] -= step
        slope = (losses[0] - losses[1]) / 2e-5
        assert abs(slope) > 1e-6
        torch.testing.assert_close(weight.grad[index], slope, rtol=1e-5, atol=1e-10)


def test_dreams_start_from_every_posterior_state():
    """Moving any single one of the L*B states changes the actor loss; a terminal start does not count."""
    args = tiny_args()
    agent, batch, noise = setup(args)
    _, post, _ = dreamer.model_loss(agent.world_model, batch, noise["post"], args)
    start = torch.ones(15)
    start[4] = 0
    before = dreamer.actor_loss(agent, post, start, noise, args)[0]
    for i in range(15):
        moved = {k: v.detach().clone() for k, v in post.items()}
        moved["deter"].view(15, -1)[i] += 0.5
        after = dreamer.actor_loss(agent, moved, start, noise, args)[0]
        assert (abs(after - before).item() > 1e-6) == (i != 4)


def test_imagined_features_exclude_the_start(float64):
    """(H, N, F) = [stoch, deter] of states 1..H, each the prior's step from the one before under the actor's action."""
    args = tiny_args()
    agent, _, noise = setup(args)
    stoch, deter = torch.randn(15, 3), torch.randn(15, 8)
    feats, _ = dreamer.imagine(agent.world_model.rssm, agent.actor, stoch, deter, noise)
    assert feats.shape == (4, 15, 11)
    expected = reference_behavior(agent, stoch, deter, torch.ones(15), noise, args)["feats"]
    torch.testing.assert_close(feats, expected)
    assert (feats[0] - torch.cat([stoch, deter], -1)).abs().min(0).values.max() > 1e-3


# === One update ===


def test_update_moves_every_weight():
    """Each element of actor and value, and something of every tensor of the model."""
    args = tiny_args(free_nats=0.0, cont_head=True)
    agent, batch, noise = setup(args, IMAGE)
    before = {name: param.detach().clone() for name, param in agent.named_parameters()}
    dreamer.update(agent, dreamer.make_optimizers(agent, args), batch, noise, args)
    for name, param in agent.named_parameters():
        assert (param != before[name]).any(), name
        assert name.startswith("world_model.") or (param != before[name]).all(), name


def test_each_optimizer_clips_its_own_norm():
    """A limit between the two norms scales the model's gradient down to it and leaves the actor's as it is."""
    args = tiny_args()
    agent, batch, noise = setup(args)
    plain = gradients_of(agent, dreamer.compute_losses(agent, batch, noise, args)[0])
    norms = {name: torch.cat([g.flatten() for g in grads]).norm().item() for name, grads in plain.items()}
    assert norms["actor"] < norms["value"] < norms["model"]
    limit = args.max_grad_norm = math.sqrt(norms["value"] * norms["model"])
    metrics = dreamer.update(agent, dreamer.make_optimizers(agent, args), batch, noise, args)
    for name, net in networks(agent).items():
        assert metrics[f"grad_norm/{name}"].item() == pytest.approx(norms[name], rel=1e-5)
        scale = min(1, limit / norms[name])
        for param, gradient in zip(net.parameters(), plain[name], strict=True):
            torch.testing.assert_close(param.grad, gradient * scale, rtol=1e-4, atol=1e-8)


def test_first_step_is_adams():
    """Weight - lr * g / (|g| + eps), with the learning rate of each network and epsilon 1e-7."""
    args = tiny_args()
    agent, batch, noise = setup(args)
    before = {name: param.detach().clone() for name, param in agent.named_parameters()}
    dreamer.update(agent, dreamer.make_optimizers(agent, args), batch, noise, args)
    rates = {"world_model": 6e-4, "actor": 8e-5, "value": 8e-5}
    for name, param in agent.named_parameters():
        if param.grad is not None:
            step = rates[name.split(".")[0]] * param.grad / (param.grad.abs() + 1e-7)
            torch.testing.assert_close(param.detach(), before[name] - step, rtol=0, atol=2e-7)


def test_update_leaves_its_inputs_alone():
    """Neither the batch nor the noise is changed in place; the metrics carry no graph."""
    args = tiny_args(cont_head=True)
    agent, batch, noise = setup(args, IMAGE)
    copies = {k: v.clone() for k, v in (batch | noise).items()}
    metrics = dreamer.update(agent, dreamer.make_optimizers(agent, args), batch, noise, args)
    assert all(torch.equal(v, copies[k]) for k, v in (batch | noise).items())
    assert all(v.shape == () and not v.requires_grad for v in metrics.values())


@pytest.mark.parametrize("action_space", [BOX, DISCRETE], ids=["continuous", "discrete"])
def test_losses_never_wait_for_a_tensor(action_space):
    """No host sync: forward and backward run on tensors without content, which refuse item() and branches."""
    args = tiny_args(cont_head=True, batch_length=3, horizon=2)
    agent, batch, noise = setup(args, IMAGE, action_space)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        batch, noise = ({k: mode.from_tensor(v) for k, v in x.items()} for x in (batch, noise))
        with pytest.raises(DataDependentOutputException):
            bool(batch["reward"].sum() > 0)
        losses, metrics = dreamer.compute_losses(agent, batch, noise, args)
        gradients_of(agent, losses)
    assert all(isinstance(value, FakeTensor) for value in metrics.values())


def updated(obs_space, action_space=BOX, device: str = "cpu", updates: int = 1, **flags) -> tuple[dict, dict, dict]:
    """Metrics, gradients and weights after updates with flags; a large epsilon makes Adam's step smooth."""
    small = {"batch_length": 4, "horizon": 2, "model_lr": 0.1, "actor_lr": 0.1, "value_lr": 0.1}
    args = tiny_args(**small | flags)
    agent = make_agent(args, obs_space, action_space).to(device)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dreamer, "ADAM_EPS", 1.0)
        optimizers = dreamer.make_optimizers(agent, args)
    update_fn = dreamer.make_update(agent, optimizers, args)
    for i in range(updates):
        batch, noise = make_batch(agent, args, obs_space, seed=i), make_noise(agent, args, seed=i)
        metrics = update_fn(*({k: v.to(device) for k, v in x.items()} for x in (batch, noise)))
    gradients = {n: p.grad.float() for n, p in agent.named_parameters() if p.grad is not None}
    metrics = {name: value.cpu() for name, value in metrics.items()}
    return metrics, gradients, {n: p.detach() for n, p in agent.named_parameters()}


def test_bfloat16_update_is_close_to_float32():
    """Losses within 1 %, gradients of each network within 2 degrees, weights and metrics still float32."""
    metrics, gradients, weights = updated(IMAGE)
    low_metrics, low_gradients, low_weights = updated(IMAGE, bfloat16=True)
    for name in metrics:
        if name.startswith("losses/"):
            assert low_metrics[name].item() == pytest.approx(metrics[name].item(), rel=0.01, abs=0.01), name
    for prefix in ("world_model.", "actor.", "value."):
        names = [name for name in gradients if name.startswith(prefix)]
        full, low = (torch.cat([g[n].flatten() for n in names]) for g in (gradients, low_gradients))
        assert F.cosine_similarity(full, low, 0) > math.cos(math.radians(2)), prefix
        assert full.norm().item() == pytest.approx(low.norm().item(), rel=0.02)
    assert all(x.dtype == torch.float32 for x in (*low_weights.values(), *low_metrics.values()))
    assert any(not torch.equal(weights[n], w) for n, w in low_weights.items())


def assert_same_update(fast: tuple, eager: tuple, tolerance: float) -> None:
    """Metrics, gradients and weights agree, name by name."""
    for ours, plain in zip(fast, eager, strict=True):
        assert ours.keys() == plain.keys()
        for name in plain:
            torch.testing.assert_close(ours[name], plain[name], rtol=tolerance, atol=tolerance / 10)


@pytest.mark.parametrize("action_space", [DISCRETE, pytest.param(BOX, marks=pytest.mark.slow)], ids=["discrete", "box"])
def test_compiled_losses_are_one_graph_each(action_space, monkeypatch):
    """Each loss is traced without a break; together they give the eager update (traced, not yet made into code)."""
    settings = {"action_space": action_space, "cont_head": True, "batch_length": 3}
    eager = updated(IMAGE, **settings)
    compiled, plain = [], torch.compile

    def traced(function):
        compiled.append(function)
        return plain(function, backend="eager", fullgraph=True)

    monkeypatch.setattr(torch, "compile", traced)
    torch._dynamo.reset()
    assert_same_update(updated(IMAGE, **settings, compile=True), eager, 1e-4)
    assert compiled == [dreamer.model_loss, dreamer.actor_loss, dreamer.value_loss]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs g++, which is not installed.")
@pytest.mark.parametrize("obs_space", [VECTOR, IMAGE], ids=["vector", "image"])
def test_compiled_update_equals_eager(obs_space):
    """Losses, gradients and weights after one update through generated code, to rounding."""
    torch._dynamo.reset()
    assert_same_update(updated(obs_space, compile=True), updated(obs_space), 1e-4)


def test_what_a_graph_is_given_are_the_tensors_of_batch_and_noise(monkeypatch):
    """With a stand-in that calls its function each time: the same losses and weights, bit for bit."""
    monkeypatch.setattr(dreamer, "GraphedFunction", lambda function: lambda *tensors: function(*tensors))
    assert_same_update(updated(VECTOR, updates=3, cudagraphs=True), updated(VECTOR, updates=3), 0.0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU, and there is none on this machine.")
@pytest.mark.parametrize("compile", [False, True])
def test_cuda_graph_updates_equal_eager(compile, monkeypatch):
    """Six updates on six batches, the last three replayed from the graph: same losses and weights."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    eager = updated(IMAGE, device="cuda", updates=6)
    assert_same_update(updated(IMAGE, device="cuda", updates=6, cudagraphs=True, compile=compile), eager, 1e-3)


# === Alignment ===


def toy_episodes(num: int, length: int, shift: int = 0) -> ReplayBuffer:
    """Episodes recorded in the order of the training loop: of an action, one sign is seen and the other paid.

    shift = 1 stores each entry with the action after it, shift = -1 with the one before the right one.
    """
    space, rng = gym.spaces.Box(-np.inf, np.inf, (2,), np.float32), np.random.default_rng(0)
    buffer, recorder = ReplayBuffer(num * length, space, 2, CPU), EpisodeRecorder(1, 2)
    for _ in range(num):
        recorder.begin(np.zeros((1, 2), np.float32), np.ones(1, bool))
        for _ in range(length - 1):
            action = rng.choice([-1.0, 1.0], (1, 2)).astype(np.float32)
            obs = np.stack([action[:, 0], -action[:, 0]], -1)
            recorder.add(obs, action, action[:, 1].astype(np.float64), np.zeros(1, bool))
        episode = recorder.end(0)
        if shift:
            episode["action"] = np.roll(episode["action"], -shift, 0)
        buffer.add(episode)
    return buffer


def train_model(buffer: ReplayBuffer, updates: int) -> tuple[dreamer.Agent, float]:
    """World model alone on the toy data; the mean reward loss of the last 20 updates."""
    args = tiny_args(batch_size=16, batch_length=8, stoch_size=4, deter_size=24, dense_size=24, free_nats=1.0)
    agent = make_agent(args, gym.spaces.Box(-np.inf, np.inf, (2,), np.float32), biases=False)
    optimizer = torch.optim.Adam(agent.world_model.parameters(), 1e-2)
    rng, gen, losses = np.random.default_rng(1), torch.Generator().manual_seed(1), []
    for _ in range(updates):
        batch = buffer.sample(16, 8, rng, CPU)
        noise = torch.randn(8, 16, 4, generator=gen)
        loss, _, metrics = dreamer.model_loss(agent.world_model, batch, noise, args)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(metrics["losses/reward_loss"].item())
    return agent, float(np.mean(losses[-20:]))


def test_rewards_and_observations_belong_to_the_last_action():
    """What only the last action can tell is predicted to the floor, in open loop too."""
    buffer = toy_episodes(100, 30)
    agent, reward_loss = train_model(buffer, 200)
    assert reward_loss < 0.9189 + 0.01
    batch = buffer.sample(32, 8, np.random.default_rng(2), CPU)
    truth, prediction, rewards = dreamer.open_loop(agent, batch, torch.Generator().manual_seed(0))
    assert (truth - prediction)[5:].square().mean() < 0.02
    assert (rewards - batch["reward"])[5:].square().mean() < 0.02


@pytest.mark.parametrize(("shift", "excess"), [(1, 0.0625), (-1, 0.5)])
def test_shifted_actions_keep_the_reward_loss_off_its_floor(shift, excess):
    """One entry early, the first reward of each chunk of 8 is left to chance; one entry late, every reward is."""
    _, reward_loss = train_model(toy_episodes(100, 30, shift), 150)
    assert reward_loss > 0.9189 + 0.8 * excess


# === Replay ===


def numbered_episode(number: int, length: int) -> dict[str, np.ndarray]:
    """Every entry says which episode and which step it is, in each field."""
    steps = np.arange(length, dtype=np.float32)
    ids = np.stack([np.full(length, number, np.float32), steps], -1)
    ends = np.ones(length, np.float32)
    ends[-1] = 0
    return {"obs": ids, "action": ids, "reward": 1000 * number + steps, "cont": ends, "is_first": (steps == 0) * 1.0}


def numbered_buffer(capacity: int, lengths: list[int]) -> ReplayBuffer:
    buffer = ReplayBuffer(capacity, gym.spaces.Box(-np.inf, np.inf, (2,), np.float32), 2, CPU)
    for number, length in enumerate(lengths):
        buffer.add(numbered_episode(number, length))
    return buffer


LONG = [8, 5, 12, 7, 5, 9]
MIXED = [9, 2, 3, 12, 1, 7, 2]
BUFFERS = [(1000, LONG), (30, LONG), (23, LONG), (14, LONG), (1000, MIXED), (25, MIXED), (10, MIXED)]


@pytest.mark.parametrize("chunk", [1, 4, 5])
@pytest.mark.parametrize(("capacity", "lengths"), BUFFERS)
def test_replay_chunks(capacity, lengths, chunk):
    """Contiguous, inside one episode if it is long enough, else crossing at is_first only; the oldest entries leave."""
    buffer = numbered_buffer(capacity, lengths)
    stored = [(i, t) for i, length in enumerate(lengths) for t in range(length)][-capacity:]
    left = [sum(i == episode for i, _ in stored) for episode in range(len(lengths))]  # of each episode its end
    assert len(buffer) == len(stored) and buffer.nbytes == capacity * 7 * 4
    assert buffer.steps == sum(lengths) - len(lengths)
    batch = buffer.sample(3000, chunk, np.random.default_rng(0), CPU)
    shapes = {"obs": (2,), "action": (2,), "reward": (), "cont": (), "is_first": ()}
    assert {k: tuple(v.shape) for k, v in batch.items()} == {k: (chunk, 3000, *v) for k, v in shapes.items()}
    assert torch.equal(batch["obs"], batch["action"])
    assert torch.equal(batch["reward"], batch["obs"][..., 0] * 1000 + batch["obs"][..., 1])
    assert torch.equal(batch["is_first"], (batch["obs"][..., 1] == 0).float())
    seen = set()
    for column in batch["obs"].transpose(0, 1).to(torch.int64).tolist():
        seen.update(map(tuple, column))
        crossings = 0
        for (episode, step), following in pairwise(column):
            last = step == lengths[episode] - 1
            crossings += last
            assert following == ([episode + 1, 0] if last else [episode, step + 1])
        episode, step = column[0]
        short = left[episode] < chunk and step == lengths[episode] - left[episode]
        newest = lengths[-1] < chunk and column[-1] == [len(lengths) - 1, lengths[-1] - 1]
        assert crossings == 0 or short or newest
    assert seen == set(stored)  # last entries too, evicted ones never
    ends = batch["obs"][..., 1] == torch.tensor(lengths)[batch["obs"][..., 0].long()] - 1
    assert torch.equal(batch["cont"] == 0, ends)


def test_replay_draws_episodes_and_starts_uniformly():
    """An episode is as likely as any other whatever its length, and so is each start in it, the last included."""
    lengths = [4, 20, 5, 11]
    batch = numbered_buffer(100, lengths).sample(40_000, 4, np.random.default_rng(0), CPU)
    first = batch["obs"][0].long()
    for episode, length in enumerate(lengths):
        starts = first[first[:, 0] == episode, 1]
        assert len(starts) / 40_000 == pytest.approx(0.25, abs=0.01)
        counts = torch.bincount(starts, minlength=length - 3) / len(starts)
        torch.testing.assert_close(counts, torch.full((length - 3,), 1 / (length - 3)), atol=0.02, rtol=0)


def test_replay_wraps_around_for_long():
    """Many episodes through a small ring: full once and for all, always the newest entries, with their own content."""
    rng, buffer, lengths = np.random.default_rng(0), numbered_buffer(17, []), []
    for number in range(60):
        lengths.append(int(rng.integers(2, 9)))
        buffer.add(numbered_episode(number, lengths[-1]))
        batch = buffer.sample(300, 2, rng, CPU)
        stored = [(i, t) for i, length in enumerate(lengths) for t in range(length)][-17:]
        assert len(buffer) == len(stored) == min(sum(lengths), 17)
        assert set(map(tuple, batch["obs"].flatten(0, 1).int().tolist())) == set(stored)
        assert torch.equal(batch["reward"], batch["obs"][..., 0] * 1000 + batch["obs"][..., 1])


def test_replay_episode_longer_than_the_ring_keeps_its_end():
    """The head is lost, the last entries are there."""
    buffer = numbered_buffer(10, [4, 25])
    batch = buffer.sample(500, 3, np.random.default_rng(0), CPU)
    assert len(buffer) == 10
    assert set(map(tuple, batch["obs"].flatten(0, 1).int().tolist())) == {(1, t) for t in range(15, 25)}


@pytest.mark.parametrize("size", [1, 20])
def test_replay_aliases_nothing(size):
    """Writing into the source arrays or into a sampled batch changes no stored entry."""
    episode = numbered_episode(0, 9)
    buffer = numbered_buffer(30, [])
    buffer.add(episode)
    expected = {k: v.clone() for k, v in buffer.sample(size, 4, np.random.default_rng(0), CPU).items()}
    for array in episode.values():
        array += 77
    batch = buffer.sample(size, 4, np.random.default_rng(0), CPU)
    for name, tensor in batch.items():
        assert torch.equal(tensor, expected[name])
        tensor += 5
    again = buffer.sample(size, 4, np.random.default_rng(0), CPU)
    assert all(torch.equal(again[name], expected[name]) for name in expected)


def test_replay_stores_images_as_bytes():
    """uint8 in, uint8 out, once: 12,288 bytes per step and a few floats."""
    buffer = ReplayBuffer(20, IMAGE, 6, CPU)
    images = np.random.default_rng(0).integers(256, size=(7, 64, 64, 3), dtype=np.uint8)
    buffer.add(numbered_episode(0, 7) | {"obs": images, "action": np.zeros((7, 6), np.float32)})
    batch = buffer.sample(1, 7, np.random.default_rng(0), CPU)
    assert batch["obs"].dtype == torch.uint8 and np.array_equal(batch["obs"][:, 0], images)
    assert batch["action"].shape == (7, 1, 6) and buffer.nbytes == 20 * (12_288 + 4 * (6 + 3))


@pytest.mark.parametrize("capacity", [100, 23])
def test_replay_state_round_trip(tmp_path, capacity):
    """Saved and loaded, partly filled or wrapped: the same samples from the same generator, now and after more data."""
    buffer = numbered_buffer(capacity, LONG)
    torch.save(buffer.state_dict(), tmp_path / "replay.pt")
    restored = numbered_buffer(capacity, [3])
    restored.load_state_dict(torch.load(tmp_path / "replay.pt", weights_only=True))
    for _ in range(4):
        rngs = np.random.default_rng(5), np.random.default_rng(5)
        batches = [b.sample(50, 5, rng, CPU) for b, rng in zip((buffer, restored), rngs, strict=True)]
        assert all(torch.equal(batches[0][name], batches[1][name]) for name in batches[0])
        assert len(buffer) == len(restored)
        for b in (buffer, restored):
            b.add(numbered_episode(50, 6))


def test_recorder_entries():
    """Entry 0 is the reset (no action, no reward); entry t is what led to it; only a termination ends the world."""
    recorder = EpisodeRecorder(2, 2)
    obs = np.arange(24, dtype=np.float32).reshape(4, 2, 3)
    actions = np.linspace(-1, 1, 12, dtype=np.float32).reshape(3, 2, 2)
    recorder.begin(obs[0], np.array([True, True]))
    for t in range(3):
        last = t == 2
        recorder.add(obs[t + 1], actions[t], np.array([t + 1.0, -t - 1.0]), np.array([last, False]))
    for i, sign in ((0, 1), (1, -1)):
        episode = recorder.end(i)
        assert np.array_equal(episode["obs"], obs[:, i])
        assert np.array_equal(episode["action"], np.concatenate([np.zeros((1, 2)), actions[:, i]]))
        assert episode["reward"].tolist() == [0, sign, 2 * sign, 3 * sign]
        assert episode["cont"].tolist() == ([1, 1, 1, 0] if i == 0 else [1, 1, 1, 1])
        assert episode["is_first"].tolist() == [1, 0, 0, 0]


def test_recorder_keeps_environments_apart():
    """An episode that ends and begins again leaves its neighbour's open; open ones are saved as not terminal."""
    recorder = EpisodeRecorder(2, 1)
    recorder.begin(np.array([[0.0], [100.0]]), np.array([True, True]))
    recorder.add(np.array([[1.0], [101.0]]), np.zeros((2, 1), np.float32), np.ones(2), np.array([True, False]))
    assert recorder.end(0)["obs"].tolist() == [[0.0], [1.0]]
    recorder.begin(np.array([[50.0], [-1.0]]), np.array([True, False]))
    (saved,) = recorder.state_dict()  # an episode of the reset alone is not worth keeping
    assert saved["obs"].tolist() == [[100.0], [101.0]] and saved["cont"].tolist() == [1.0, 1.0]
    recorder.add(np.array([[51.0], [102.0]]), np.ones((2, 1), np.float32), np.ones(2), np.array([False, True]))
    first, second = recorder.end(0), recorder.end(1)
    assert first["obs"].tolist() == [[50.0], [51.0]] and first["action"].tolist() == [[0.0], [1.0]]
    assert second["obs"].tolist() == [[100.0], [101.0], [102.0]] and second["cont"].tolist() == [1.0, 1.0, 0.0]


# === Schedules ===


@pytest.mark.parametrize("num_envs", [1, 4, 16])
def test_updates_due(num_envs):
    """100 updates at 5K steps, then 0.1 per step in blocks of 100, whatever the number of environments."""
    args = Args(num_envs=num_envs)
    table = {0: 0, 4_998: 0, 5_000: 100, 5_998: 100, 6_000: 200, 100_000: 9_600, 500_000: 49_600, 1_000_000: 99_600}
    assert {step: dreamer.updates_due(step, args) for step in table} == table


def test_exploration_schedule():
    """Constant noise for continuous actions; epsilon from 0.4 to 0.1 over 200K environment steps for discrete ones."""
    args = tiny_args()
    continuous, discrete = make_agent(args), make_agent(args, action_space=DISCRETE)
    assert {dreamer.exploration(continuous, n, args) for n in (0, 10_000, 10**6)} == {0.3}
    epsilons = [dreamer.exploration(discrete, n, args) for n in (0, 50_000, 100_000, 200_000, 10**6)]
    assert epsilons == pytest.approx([0.4, 0.325, 0.25, 0.1, 0.1])
    rising = tiny_args(expl_epsilon=(0.1, 0.5, 1000))
    epsilons = [dreamer.exploration(discrete, n, rising) for n in (0, 250, 1000, 2000)]
    assert epsilons == pytest.approx([0.1, 0.2, 0.5, 0.5])


@pytest.mark.parametrize("clip_rewards", ["none", "tanh"])
def test_open_loop_rewards_are_those_that_are_learned(clip_rewards, monkeypatch, tmp_path):
    """With --clip-rewards tanh the reward head predicts tanh(r): predicted exactly, the error is 0."""
    args, logged = tiny_args(clip_rewards=clip_rewards, batch_length=12), {}
    learned = {"none": lambda r: r, "tanh": torch.tanh}[clip_rewards]
    monkeypatch.setattr(
        dreamer, "open_loop", lambda agent, batch, *_: (batch["obs"], batch["obs"], learned(batch["reward"]))
    )
    length = args.batch_length
    episode = {"obs": np.zeros((length, 3), np.float32), "reward": np.arange(length, dtype=np.float32)}
    run = SimpleNamespace(args=args, device=CPU, log=logged.update, picture=lambda kind: f"{tmp_path}/{kind}")
    dreamer.log_open_loop(None, [episode], run)
    assert logged["open_loop/reward_error_horizon_1"] == 0


def test_open_loop_sees_nothing_beyond_its_context():
    """Other observations there change no prediction, other actions do; the context itself is seen."""
    args = tiny_args(batch_length=12)
    agent = make_agent(args)
    batch = make_batch(agent, args)

    def predictions(**changes):
        return dreamer.open_loop(agent, batch | changes, torch.Generator().manual_seed(1))[1:]

    later, action = batch["obs"].clone(), batch["action"].clone()
    later[5:] += 1
    action[7] *= -1
    expected = predictions()
    for found, wanted in zip(predictions(obs=later), expected, strict=True):
        assert torch.equal(found, wanted)
    assert not torch.equal(predictions(obs=batch["obs"] + 1)[0], expected[0])
    changed = (predictions(action=action)[0] != expected[0]).flatten(1).any(1)
    assert not changed[:7].any() and changed[7:].all()


def test_epsilon_falls_with_environment_steps(monkeypatch):
    """In a run, with an action for two steps: what act is given is exploration at the step, not at the update."""
    args = tiny_args(env_id="CartPole-v1", action_repeat=2, total_timesteps=120, expl_epsilon=(0.4, 0.1, 200))
    given, act = [], dreamer.act

    def spy(*rest):
        given.append(rest[-1])
        return act(*rest)

    monkeypatch.setattr(dreamer, "act", spy)
    dreamer.main(dataclasses.replace(args, eval_frequency=0, learning_starts=60))
    steps = np.arange(120 - 2 * len(given), 120, 2)
    assert len(given) >= 20 and given == pytest.approx(0.4 - 0.3 * steps / 200)


def test_no_two_streams_of_random_numbers_are_one():
    """Neither between seeds nor between the generators of a run."""
    first = [torch.rand(3, generator=dreamer.make_generator(CPU, seed, i)) for seed in range(3) for i in range(5)]
    assert len({tuple(numbers.tolist()) for numbers in first}) == 15
    again = torch.rand(3, generator=dreamer.make_generator(CPU, 2, 4))
    assert torch.equal(again, first[-1])


# === Acting ===


def quiet_agent(args: Args, obs_space=VECTOR, action_space=BOX) -> dreamer.Agent:
    """An agent whose latents and actions have next to no noise of their own."""
    agent = make_agent(args, obs_space, action_space)
    rssm, last = agent.world_model.rssm, agent.actor.net[-1]
    rssm.min_std = 0.0
    with torch.no_grad():
        rssm.post_out.weight[args.stoch_size :] = 0
        rssm.post_out.bias[args.stoch_size :] = -50
        if agent.discrete:
            agent.actor.net[0].weight *= 10
            last.weight *= 30
            last.bias.zero_()
        else:
            last.weight[agent.action_dim :] = 0
            last.bias[agent.action_dim :] = -50
    return agent


def act_input(agent: dreamer.Agent, args: Args, num_envs: int, obs_space=VECTOR) -> tuple:
    """Observations, last actions and states of several environments in mid-episode."""
    rng, gen = np.random.default_rng(0), torch.Generator().manual_seed(4)
    obs = rng.standard_normal((num_envs, 5)).astype(np.float32)
    if obs_space is IMAGE:
        obs = rng.integers(256, size=(num_envs, 64, 64, 3), dtype=np.uint8)
    state = torch.randn(num_envs, args.stoch_size, generator=gen), torch.randn(num_envs, args.deter_size, generator=gen)
    return obs, dreamer.random_action(agent, num_envs, rng), state


@pytest.mark.parametrize("greedy", [True, False])
@pytest.mark.parametrize("action_space", [BOX, DISCRETE], ids=["continuous", "discrete"])
def test_act_treats_each_environment_by_itself(action_space, greedy, monkeypatch):
    """Row i of eight environments is what environment i gets alone under the same noise."""
    args = tiny_args()
    agent = quiet_agent(args, action_space=action_space)
    obs, action, state = act_input(agent, args, 8)
    noise = torch.randn(100, 8, agent.action_dim) if greedy else torch.randn(8, agent.action_dim)
    dones = np.arange(8) % 3 == 1
    if greedy and not agent.discrete:
        with torch.no_grad():
            agent.actor.net[-1].bias[agent.action_dim :] = 0  # std about 5: each row has its own likeliest sample

    def decide(rows: list[int]) -> tuple:
        monkeypatch.setattr(agent.actor, "draw_noise", lambda shape, generator: noise[..., rows, :])
        states = tuple(s[rows] for s in state)
        return dreamer.act(agent, obs[rows], action[rows], dones[rows], states, torch.Generator(), greedy=greedy)

    together, (stoch, deter) = decide(list(range(8)))
    assert together.shape == (8, agent.action_dim) and together.dtype == np.float32
    for i in range(8):
        alone, alone_state = decide([i])
        np.testing.assert_allclose(together[i], alone[0], atol=1e-5)
        torch.testing.assert_close(stoch[i], alone_state[0][0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(deter[i], alone_state[1][0], atol=1e-5, rtol=1e-5)
    assert len(np.unique(together.round(4), axis=0)) > 1


def test_act_forgets_the_state_where_an_episode_begins():
    """With is_first any state does as well as the zero state; without it, it does not."""
    args = tiny_args()
    agent = quiet_agent(args)
    obs, action, state = act_input(agent, args, 2)
    zero = agent.world_model.rssm.initial(2)
    new = [dreamer.act(agent, obs, action, [1, 1], s, torch.Generator(), 0.0)[1] for s in (state, zero)]
    old = [dreamer.act(agent, obs, action, [0, 0], s, torch.Generator(), 0.0)[1] for s in (state, zero)]
    for k in (0, 1):
        torch.testing.assert_close(new[0][k], new[1][k])
        torch.testing.assert_close(old[1][k], new[1][k])
        assert (old[0][k] - new[0][k]).abs().max() > 1e-3


@pytest.mark.parametrize("obs_space", [VECTOR, IMAGE], ids=["vector", "image"])
def test_act_filters_as_training_does(obs_space):
    """Step by step through raw observations it reaches the states that observe() finds for the stored sequence."""
    args = tiny_args()
    agent = quiet_agent(args, obs_space)
    batch = make_batch(agent, args, obs_space)
    embed = agent.world_model.embed(dreamer.preprocess(batch["obs"]))
    zeros = torch.zeros(5, 3, 3)
    expected = agent.world_model.rssm.observe(embed, batch["action"], batch["is_first"], zeros)
    state = agent.world_model.rssm.initial(3)
    for t in range(5):
        obs, action, is_first = (batch[k][t].numpy() for k in ("obs", "action", "is_first"))
        decision, state = dreamer.act(agent, obs, action, is_first, state, torch.Generator(), 0.0)
        torch.testing.assert_close(state[0], expected["stoch"][t], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(state[1], expected["deter"][t], atol=1e-5, rtol=1e-4)
        mean = agent.actor.dist(torch.cat(state, -1))[0]
        np.testing.assert_allclose(decision, torch.tanh(mean).detach().numpy(), atol=1e-3)


def test_exploration_noise_only_while_collecting():
    """Continuous: Normal(0, scale) on the action, clipped to [-1, 1]; the greedy action is free of it."""
    args = tiny_args()
    agent = quiet_agent(args)
    obs, action, state = act_input(agent, args, 1)
    agent.actor.net[-1].bias.data[:2] = torch.tensor([0.1, 4.0])
    agent.actor.net[-1].weight.data[:2] = 0
    mean = np.tanh(5 * np.tanh(np.array([0.1, 4.0]) / 5))
    many = [np.repeat(x, 4000, 0) for x in (obs, action)]
    states = tuple(s.repeat(4000, 1) for s in state)
    gen = torch.Generator().manual_seed(0)
    greedy, _ = dreamer.act(agent, *many, np.zeros(4000), states, gen, greedy=True)
    np.testing.assert_allclose(greedy, np.tile(mean, (4000, 1)), atol=1e-3)
    noisy, _ = dreamer.act(agent, *many, np.zeros(4000), states, gen, 0.3)
    assert noisy[:, 0].mean() == pytest.approx(mean[0], abs=0.02)
    assert noisy[:, 0].std() == pytest.approx(0.3, abs=0.015)
    assert abs(noisy).max() == 1.0 and (noisy[:, 1] == 1.0).mean() == pytest.approx(0.5, abs=0.05)
    assert abs(np.corrcoef(noisy[:, 0], np.minimum(noisy[:, 1], 0.99))[0, 1]) < 0.1


def test_epsilon_greedy_only_while_collecting():
    """Discrete: a share epsilon of uniform actions around the sample; the greedy action is the arg-max; all one-hot."""
    args = tiny_args()
    agent = make_agent(args, action_space=DISCRETE)
    with torch.no_grad():
        agent.actor.net[-1].weight.zero_()
        agent.actor.net[-1].bias.copy_(torch.tensor([0.0, 1.0, 0.0]))
    num = 9000
    obs, action, state = act_input(agent, args, num)
    gen = torch.Generator().manual_seed(0)
    probs = torch.tensor([0.0, 1.0, 0.0]).softmax(-1).numpy()
    for greedy, epsilon, expected in ((True, 0.0, [0, 1, 0]), (False, 0.0, probs), (False, 0.4, 0.6 * probs + 0.4 / 3)):
        chosen, _ = dreamer.act(agent, obs, action, np.zeros(num), state, gen, epsilon, greedy)
        np.testing.assert_allclose(np.sort(chosen, -1), np.tile([0, 0, 1], (num, 1)), atol=1e-6)
        np.testing.assert_allclose(chosen.mean(0), expected, atol=0.02)


def test_random_actions_and_what_the_environment_gets():
    """Uniform over the box or the choices; one-hot rows become indices."""
    args, rng = tiny_args(), np.random.default_rng(0)
    agent = make_agent(args)
    actions = dreamer.random_action(agent, 20_000, rng)
    assert actions.dtype == np.float32 and abs(actions).max() <= 1
    assert np.abs(actions).mean(0) == pytest.approx([0.5, 0.5], abs=0.02) and abs(actions.mean()) < 0.02
    assert dreamer.env_action(agent, actions) is actions
    agent = make_agent(args, action_space=DISCRETE)
    actions = dreamer.random_action(agent, 20_000, rng)
    assert actions.mean(0) == pytest.approx([1 / 3] * 3, abs=0.02) and (actions.sum(-1) == 1).all()
    assert np.array_equal(np.eye(3)[dreamer.env_action(agent, actions)], actions)


@pytest.mark.parametrize("buffer_on_gpu", [True, False])
def test_memory_is_asked_for_where_it_will_be_needed(buffer_on_gpu, monkeypatch):
    """The replay may lie beside the GPU; weights and batches may not."""
    asked, cuda = [], torch.device("cuda")
    monkeypatch.setattr(dreamer, "choose_device", lambda args: cuda)
    monkeypatch.setattr(dreamer, "require_memory", lambda *args: asked.append(args))
    args = tiny(dreamer, buffer_on_gpu=buffer_on_gpu, buffer_size=1000)
    image, box = gym.spaces.Box(0, 255, (64, 64, 3), np.uint8), gym.spaces.Box(-1, 1, (2,))
    dreamer.check_memory(args, image, box)
    (replay, _, at), (_, _, device) = asked
    assert at == (cuda if buffer_on_gpu else torch.device("cpu")) and device == cuda
    assert replay == dreamer.ReplayBuffer(1000, image, 2, "cpu").nbytes > 1000 * 64 * 64 * 3


def test_memory_that_is_asked_for_is_little_less_than_an_update_takes(monkeypatch):
    """Resident megabytes that two updates took, one thread, measured: images of two depths, short dreams, vectors."""
    asked, box = [], gym.spaces.Box(-1, 1, (6,))
    monkeypatch.setattr(dreamer, "require_memory", lambda size, *rest: asked.append(size / 1e6))
    image, vector = gym.spaces.Box(0, 255, (64, 64, 3), np.uint8), gym.spaces.Box(-1, 1, (24,))
    laptop = {"cuda": False, "cnn_depth": 16, "dense_size": 200, "batch_size": 16, "batch_length": 32}
    laptop["buffer_size"] = 1000
    for changes, space, measured in (
        ({}, image, 511),
        ({"cnn_depth": 32, "batch_length": 16, "batch_size": 8}, image, 245),
        ({"cnn_depth": 32}, image, 721),
        ({"horizon": 5}, image, 399),
        ({}, vector, 230),
    ):
        dreamer.check_memory(Args(**laptop | changes), space, box)
        assert 0.75 * measured < asked[-1] < 1.02 * measured, (changes, asked[-1])


# === Learning ===


def moving_square(args: Args) -> dict[str, torch.Tensor]:
    """Sequences of a bright square pushed about by the actions; paid for being on the right, fined on the left."""
    rng = np.random.default_rng(0)
    shape = args.batch_length, args.batch_size
    obs = np.full((*shape, 64, 64, 3), 40, np.uint8)
    action = rng.uniform(-1, 1, (*shape, 2)).astype(np.float32)
    action[0] = 0
    place, reward = rng.uniform(16, 40, (args.batch_size, 2)), np.zeros(shape, np.float32)
    for t in range(args.batch_length):
        place = np.clip(place + 6 * action[t], 0, 52)
        reward[t] = place[:, 1] / 26 - 1
        for b, (row, column) in enumerate(place.astype(int)):
            obs[t, b, row : row + 12, column : column + 12] = (250, 120, 30)
    is_first = np.zeros(shape, np.float32)
    is_first[0] = 1
    arrays = {"obs": obs, "action": action, "reward": reward, "cont": np.ones(shape, np.float32), "is_first": is_first}
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


@pytest.mark.slow
def test_world_model_overfits_one_batch():
    """The mean picture misses the floor by 44 nats; after 600 updates the model's misses by less than 5."""
    args = tiny_args(batch_size=4, batch_length=8, cnn_depth=8, stoch_size=8, deter_size=64, dense_size=64, horizon=3)
    agent, batch = make_agent(args, IMAGE, biases=False), moving_square(args)
    args.model_lr = 2e-3
    optimizers, gen = dreamer.make_optimizers(agent, args), torch.Generator().manual_seed(0)
    floor = 12288 * HALF_LOG_2PI
    for _ in range(600):
        metrics = dreamer.update(agent, optimizers, batch, dreamer.draw_noise(agent, args, gen), args)
    image = dreamer.preprocess(batch["obs"])
    misses = dreamer.normal_loss(image.mean((0, 1)), image).sum((2, 3, 4)).mean().item() - floor
    assert misses == pytest.approx(44, abs=1)
    assert 0 < metrics["losses/image_loss"].item() - floor < 5
    assert 0.9189 <= metrics["losses/reward_loss"].item() < 0.9189 + 0.02


# === Whole runs ===

WALKER = {"env_id": "walker-walk", "action_repeat": 50, "total_timesteps": 1100, "learning_starts": 1000}


WALKER |= {"train_frequency": 50, "eval_frequency": 1100, "eval_episodes": 1, "checkpoint_frequency": 0}


CLASSIC = {"learning_starts": 200, "total_timesteps": 400, "train_frequency": 100, "eval_frequency": 200}


DREAMS = {
    "pixels": {"env_id": "fake_envs:TinyPixels-v0"},
    "discrete pixels": {"env_id": "fake_envs:TinyPixelsDiscrete-v0", "total_timesteps": 72},
    "two environments": {"env_id": "fake_envs:TinyPixels-v0", "num_envs": 2, "total_timesteps": 72},
    "CartPole": {"env_id": "CartPole-v1", **CLASSIC},
    "Pendulum": {"env_id": "Pendulum-v1", "eval_episodes": 1, **CLASSIC},
    "walker state": {"obs_mode": "state", **WALKER},
    "walker pixels": {"renderer": "raycast", **WALKER},
}


@pytest.mark.parametrize("kind", DREAMS)
def test_dreamer_logs_everything_and_moves_all_parameters(kind):
    """Each kind of environment: tags, finite values, growing steps, files in the run folder, trained parameters."""
    settings = {"eval_frequency": 24} | DREAMS[kind]
    run_dir = run(dreamer, **settings)
    vectors, suite = kind in ("CartPole", "Pendulum", "walker state"), kind.startswith("walker")
    expected = {"charts/episodic_return", "charts/episodic_length", "charts/SPS"}
    expected |= {"eval/episodic_return", "eval/episodic_return_std"}
    expected |= {f"losses/{name}_loss" for name in ("model", "image", "reward", "kl", "actor", "value")}
    expected |= set() if suite else {"losses/cont_loss"}
    expected |= {f"grad_norm/{name}" for name in ("model", "actor", "value")}
    expected |= {"model/kl", "model/prior_entropy", "model/post_entropy"}
    expected |= {"model/imag_reward", "model/imag_value", "model/actor_entropy"}
    if "discrete" not in kind:  # its episodes may be too short for a prediction
        expected |= {"open_loop/obs_mse_horizon_1", "open_loop/reward_error_horizon_1"}
    tags = scalars(run_dir)
    assert expected <= set(tags), expected - set(tags)
    assert_healthy(run_dir)
    if "discrete" not in kind:
        files = {re.sub(r"\d+", "N", name) for name in os.listdir(run_dir) if name.endswith((".png", ".gif"))}
        strips = set() if vectors else {"open_loop_truth_model_error_N.gif", "evaluation_N.gif"}
        assert files == {"open_loop_error_N.png", "returns.png"} | strips
    state = load(run_dir)
    args, saved = dreamer.with_task_defaults(tiny(dreamer, **settings)), state["parts"]
    assert state["global_step"] == args.total_timesteps
    assert saved["counters"]["num_updates"] == dreamer.updates_due(args.total_timesteps, args) > 0
    torch.manual_seed(args.seed)
    envs = dreamer.make_vector_env(args, dreamer.choose_renderer(args, None), 1)
    untrained = dreamer.Agent(envs.single_observation_space, envs.single_action_space, args).state_dict()
    envs.close()
    assert untrained.keys() == saved["agent"].keys()
    still = [name for name, tensor in untrained.items() if torch.equal(tensor, saved["agent"][name])]
    assert not still


def test_steps_increase_where_many_updates_fall_on_one_step(monkeypatch):
    """Hundreds of updates may be due at one environment step: that is one point of each curve, not three."""
    monkeypatch.setattr(dreamer, "make_update", lambda *_: lambda batch, _: {"losses/model_loss": batch["cont"].sum()})
    run_dir = run(dreamer, **VECTORS, pretrain_steps=201, batch_size=1)
    assert_healthy(run_dir)
    assert all(value > 0 for _, value in scalars(run_dir)["charts/SPS"]) and scalars(run_dir)["losses/model_loss"]


@pytest.mark.parametrize("changes", [{}, TWO_ENVS], ids=["one", "two"])
def test_dreamer_keeps_open_episodes_as_truncated(changes):
    """One environment, and two, stopped in the middle of their episodes."""
    steps = 24 + 6 * changes.get("num_envs", 1)
    run_dir = run(dreamer, **changes, total_timesteps=steps)
    before = episodes(run_dir)
    open_now = load(run_dir)["parts"]["open_episodes"]
    assert len(open_now) == changes.get("num_envs", 1)
    resume(dreamer, run_dir, **changes, total_timesteps=60)
    after = episodes(run_dir)
    for old, new in zip(before, after, strict=False):
        assert all(np.array_equal(old[name], new[name]) for name in old)
    assert all(episode["cont"].all() for episode in after), "a stopped episode is not a terminated one"
    assert all(episode["is_first"][0] == 1 and episode["is_first"][1:].sum() == 0 for episode in after)
    assert len(after) > len(before)


def test_resumed_networks_share_no_storage():
    """No two of the agent's loaded tensors are one."""
    run_dir = run(dreamer)
    args = dreamer.with_task_defaults(tiny(dreamer))
    envs = dreamer.make_vector_env(args, "none", 1)
    agent = dreamer.Agent(envs.single_observation_space, envs.single_action_space, args)
    agent.load_state_dict(load(run_dir)["parts"]["agent"])
    pointers = [parameter.data_ptr() for parameter in agent.parameters()]
    assert len(set(pointers)) == len(pointers)


def test_dreamer_refills_a_replay_that_was_not_saved():
    """Random actions until learning_starts steps are stored again, then the updates that are due."""
    settings = {"save_buffer": False, **VECTORS}
    run_dir = run(dreamer, **settings)
    saved = load(run_dir)
    resume(dreamer, run_dir, **settings, total_timesteps=108)
    values = scalars(run_dir)["losses/value_loss"]
    new = [step for step, _ in values if step > 48]
    assert new and min(new) >= 48 + 24 and max(new) == 108
    state = load(run_dir)
    assert state["global_step"] == 108
    assert differences(saved["rng"]["prefill"], state["rng"]["prefill"]) != []


def test_gl_without_opengl_names_the_packages(capsys, monkeypatch):
    """--renderer gl on a machine without OpenGL; auto takes the ray-caster there, and stays with a saved run's."""

    def broken(command, **kwargs):
        raise subprocess.CalledProcessError(1, command)

    monkeypatch.setattr(dreamer.subprocess, "run", broken)
    line = error_of(capsys, dreamer.main, tiny(dreamer, env_id="walker-walk", renderer="gl"))
    assert "libegl1" in line and "--renderer raycast" in line
    assert dreamer.choose_renderer(tiny(dreamer, env_id="walker-walk"), None) == "raycast"
    saved = {"parts": {"counters": {"renderer": "gl"}}}
    assert "libegl1" in error_of(capsys, dreamer.choose_renderer, tiny(dreamer, env_id="walker-walk"), saved)


def test_a_run_made_by_ray_casting_stays_with_it(monkeypatch):
    """`auto` means what the run began with, also once OpenGL has been installed."""
    monkeypatch.setattr(dreamer.subprocess, "run", lambda command, **kwargs: None)
    args, saved = tiny(dreamer, env_id="walker-walk"), {"parts": {"counters": {"renderer": "raycast"}}}
    monkeypatch.delenv("MUJOCO_GL", raising=False)
    assert dreamer.choose_renderer(args, saved) == "raycast"
    monkeypatch.delenv("MUJOCO_GL", raising=False)
    assert dreamer.choose_renderer(args, None) == "gl"


@pytest.mark.parametrize(("env_id", "package"), [("ALE/Pong-v5", "ale_py"), ("walker-walk", "dm_control")])
def test_missing_simulators_are_named(capsys, monkeypatch, env_id, package):
    """The pip command of a simulator that is not installed."""
    monkeypatch.setitem(sys.modules, package, None)
    settings = {"obs_mode": "state"} if package == "dm_control" else {}
    line = error_of(capsys, dreamer.main, tiny(dreamer, env_id=env_id, **settings))
    assert f"pip install {package}" in line


@pytest.mark.parametrize("changes", [VECTORS, WALKER | {"obs_mode": "state"}], ids=["vectors", "walker"])
def test_poisoned_parameter_stops_before_anything_is_played_or_saved(changes):
    """A parameter that is not finite is reported as a loss, not as a simulator's complaint about its actions."""
    settings = {"obs_mode": "pixels"} | changes
    run_dir = run(dreamer, **settings)
    path = Path(run_dir, "checkpoint.pt")
    state = torch.load(path, weights_only=True)
    state["parts"]["agent"]["actor.net.0.weight"][0, 0] = math.nan
    torch.save(state, path)
    poisoned = path.read_bytes()
    with pytest.raises(SystemExit, match=r"not finite at step \d+: (losses/actor_loss|the policy's action)"):
        resume(dreamer, run_dir, **settings | {"total_timesteps": 2 * settings.get("total_timesteps", 48)})
    assert path.read_bytes() == poisoned


def test_speed_flags_do_not_bind_an_evaluation(monkeypatch, capsys):
    """A run made with CUDA graphs can be played without a GPU."""
    run_dir = run(dreamer)
    state = load(run_dir)
    state["args"] |= {"cudagraphs": True, "bfloat16": True}
    torch.save(state, Path(run_dir, "checkpoint.pt"))
    command_line(monkeypatch, dreamer, "--evaluate", run_dir)
    said = capsys.readouterr().out
    assert "(2 episodes:" in said and f"at step {state['global_step']}, renderer none:" in said


def test_resume_on_another_kind_of_device(capsys):
    """The state of a GPU's random generator does not fit a CPU's: it starts anew, and says so."""
    run_dir = run(dreamer)
    state = load(run_dir)
    state["rng"]["act"] = torch.zeros(16, dtype=torch.uint8)
    torch.save(state, Path(run_dir, "checkpoint.pt"))
    resume(dreamer, run_dir, total_timesteps=72)
    assert "act starts anew" in capsys.readouterr().out and load(run_dir)["global_step"] == 72


def test_lqr_ends_and_is_the_same_system_every_time():
    """The one task without a time limit of its own, whose springs are drawn when it is loaded."""
    args = dreamer.with_task_defaults(tiny(dreamer, env_id="lqr-lqr-2-1", obs_mode="state"))
    first, second = (dreamer.make_env(args, "none")() for _ in range(2))
    stiffness = [env.unwrapped.env.physics.model.jnt_stiffness.copy() for env in (first, second)]
    assert np.array_equal(*stiffness) and stiffness[0].any()
    first.action_space.seed(1)
    for seed in range(5):
        first.reset(seed=seed)
        steps, done = 0, False
        while not done:
            obs, _, terminated, truncated, _ = first.step(first.action_space.sample())
            steps, done = steps + 1, terminated or truncated
        assert steps <= 500 and np.abs(obs).max() < 100  # its bounds of 1e10 mean none: actions stay in [-1, 1]


def test_environment_without_a_render_mode():
    """Rendering is asked for only where a video is."""
    gym.register("Plain-v0", lambda: gym.make("fake_envs:Counter-v0").unwrapped, max_episode_steps=12)
    args = dreamer.with_task_defaults(tiny(dreamer, env_id="Plain-v0"))
    assert dreamer.make_env(args, "none")().reset(seed=1)[0].shape == (3,)


def joined(pieces: list[dict]) -> list[dict]:
    """Whole episodes of Counter, whose first number names them: a piece begins with the observation it was cut at."""
    whole = {}
    for piece in pieces:
        assert piece["is_first"].tolist() == [1] + [0] * (len(piece["reward"]) - 1)
        assert piece["action"][0] == piece["reward"][0] == 0 and piece["cont"][0] == 1
        name = piece["obs"][0, 0]
        if name in whole:
            assert np.array_equal(piece["obs"][0], whole[name]["obs"][-1])
            piece = {column: np.concatenate([whole[name][column], array[1:]]) for column, array in piece.items()}
        whole[name] = piece
    return list(whole.values())


def test_an_episode_without_end_is_learned_from(monkeypatch):
    """From learning_starts on, in pieces, of PIECE decisions at the most; the flag's limit ends an evaluation."""
    monkeypatch.setattr(dreamer, "PIECE", 10)
    gym.register("Endless-v0", lambda: gym.make("fake_envs:Counter-v0").unwrapped)
    settings = {"env_id": "Endless-v0", "max_episode_steps": 100, "total_timesteps": 60}
    run_dir = run(dreamer, **settings, eval_frequency=60, eval_episodes=1)
    pieces, curves = episodes(run_dir), scalars(run_dir)
    assert [len(piece["reward"]) - 1 for piece in pieces] == [10, 10, 4, 10, 10, 10, 6]  # the last: still open
    assert len(joined(pieces)) == 1
    assert load(run_dir)["parts"]["counters"]["num_updates"] == 2 + 3 * 2
    assert load(run(dreamer, **settings | {"total_timesteps": 24}))["parts"]["counters"]["num_updates"] == 2
    assert curves["eval/episodic_return"] == [(60, sum(range(101)))]


@pytest.mark.parametrize("repeat", [1, 2, 5])
@pytest.mark.parametrize("num_envs", [1, 2])
def test_replay_holds_what_was_played(repeat, num_envs):
    """Each episode is of one environment, from first to last entry; rewards of repeated actions are summed.

    Those that are open where learning begins are in two pieces.
    """
    run_dir = run(dreamer, **VECTORS, num_envs=num_envs, action_repeat=repeat, total_timesteps=120, learning_starts=48)
    pieces = episodes(run_dir)
    stored = joined(pieces)
    assert len(stored) >= 120 // (-(-12 // repeat) * repeat) and len(pieces) - len(stored) <= num_envs
    for i, episode in enumerate(stored):
        obs, length = episode["obs"], len(episode["reward"])
        steps = np.minimum(np.arange(length) * repeat, 12)
        assert (obs[:, 0] == obs[0, 0]).all() and (obs[:, 1] == steps).all()
        sums = [sum(range(steps[t - 1] + 1, steps[t] + 1)) for t in range(1, length)]
        assert episode["reward"].tolist() == [0, *sums]
        assert episode["is_first"].tolist() == [1] + [0] * (length - 1)
        assert episode["action"][0] == 0 and np.abs(episode["action"]).max() <= 1
        np.testing.assert_allclose(obs[1:, 2], 2 * episode["action"][1:, 0], rtol=1e-5)  # the Box is [-2, 2]
        assert episode["cont"].all(), "a time limit is not a termination"
        assert steps[-1] == 12 or i >= len(stored) - num_envs
    assert load(run_dir)["global_step"] == 120


@pytest.mark.parametrize(("env_id", "length"), [("DeadlyCounter-v0", 8), ("BothEndsCounter-v0", 12)])
@pytest.mark.parametrize("num_envs", [1, 2])
def test_terminations_are_stored_as_such(env_id, length, num_envs):
    """cont is 0 on the last entry alone, also where the time limit falls on the same step."""
    run_dir = run(dreamer, env_id=f"fake_envs:{env_id}", num_envs=num_envs, total_timesteps=96, learning_starts=48)
    closed = [episode for episode in episodes(run_dir) if episode["obs"][-1, 1] == length]
    assert len(closed) == 96 // length
    for episode in closed:
        assert episode["cont"].tolist() == [1] * length + [0]


def test_cartpole_terminates_and_the_head_learns_from_it():
    """Random play ends by falling, never by the time limit of 500."""
    run_dir = run(dreamer, env_id="CartPole-v1", total_timesteps=200, learning_starts=200, buffer_size=400)
    closed = [episode for episode in episodes(run_dir) if episode["cont"][-1] == 0]
    assert len(closed) >= 3
    for episode in closed:
        assert episode["cont"][:-1].all()
        assert (episode["action"][1:].sum(-1) == 1).all() and set(np.unique(episode["action"])) == {0, 1}


@pytest.mark.parametrize(("repeat", "num_envs"), [(1, 1), (4, 1), (1, 2)])
def test_global_step_counts_steps_of_the_environment(repeat, num_envs):
    """The lengths of the episodes, action repeats counted and all environments together, add up to the step."""
    run_dir = run(dreamer, **VECTORS, action_repeat=repeat, num_envs=num_envs, total_timesteps=72, learning_starts=72)
    events = scalars(run_dir)
    step = 12 * num_envs
    assert events["charts/episodic_length"] == [(step * (i + 1), 12) for i in range(72 // step)]
    assert events["charts/episodic_return"] == [(step * (i + 1), sum(range(13))) for i in range(72 // step)]


@pytest.mark.parametrize("repeat", [1, 2])
def test_the_prefill_is_as_long_as_it_says(repeat, monkeypatch):
    """Learning starts after that many environment steps of random actions: an episode has one entry more than that."""
    random_action, played = dreamer.random_action, []
    monkeypatch.setattr(dreamer, "random_action", lambda *args: (played.append(args), random_action(*args))[1])
    run(dreamer, **VECTORS, action_repeat=repeat, total_timesteps=96, learning_starts=62)
    assert len(played) == 62 // repeat


@pytest.mark.slow
def test_dreamer_learns_a_tiny_pixel_task():
    """The picture shows the right action: random play returns -40 an episode, the best constant one -30, perfect 0."""
    run_dir = run(
        dreamer, total_timesteps=1800, learning_starts=720, pretrain_steps=300, train_frequency=12, train_steps=8,
        batch_size=16, batch_length=6, buffer_size=5000, horizon=3, cnn_depth=4, stoch_size=8, deter_size=64,
        dense_size=64, free_nats=1.0, gamma=0.5, model_lr=2e-3, actor_lr=4e-4, value_lr=1e-3, eval_frequency=1800,
        eval_episodes=20, checkpoint_frequency=0,
    )  # fmt: skip
    mean = scalars(run_dir)["eval/episodic_return"][-1][1]
    print(f"evaluation return {mean:.1f}")
    assert mean > -20


@pytest.mark.parametrize("kind", ["walker", "cup", "vectors"])
def test_the_first_line_says_what_a_run_will_take(kind, capsys, monkeypatch):
    """An update that takes 2 s: 9,600 of them to step 100K, 49,600 to 500K; what was measured leaves no trace."""
    env_id = {"walker": "walker_walk", "cup": "ball_in_cup-catch", "vectors": "Toy-v0"}[kind]
    laptop = {"batch_size": 16, "batch_length": 32, "cnn_depth": 16} | ({} if kind == "cup" else {"dense_size": 200})
    steps = {"total_timesteps": 600_000, "buffer_size": 250_000}
    args = tiny_args(env_id=env_id, size="laptop", compile=kind == "cup", **steps, **laptop)
    rb = ReplayBuffer(10, IMAGE if kind != "vectors" else VECTOR, 2, CPU)
    agent = make_agent(args, IMAGE if kind != "vectors" else VECTOR)
    clock = iter([0.0, 9.0, 10.0, 12.0])  # the first update takes longer
    monkeypatch.setattr(dreamer.time, "perf_counter", lambda: next(clock))
    standin = SimpleNamespace(args=args, device=CPU, step=0, folder="runs/x", say=print)
    dreamer.announce(agent, rb, args, "raycast", standin)
    assert all(parameter.grad is None for parameter in agent.parameters())
    first = capsys.readouterr().out.splitlines()[0]
    times = {100: 5.3, 500: 28, 600: 33}
    hours = "".join(f"; {step},000 steps: {hours} h of updates" for step, hours in times.items())
    published = {"walker": "137 at 105K, 886 at 505K steps", "cup": "73 at 105K, 962 at 505K steps"}.get(kind)
    published = f"; published at full size: {published}" if published else ""
    eager = " eager" if kind == "cup" else ""
    given = f", dense_size {args.dense_size}" if kind == "cup" else ""
    assert first == f"size laptop{given} on cpu, an{eager} update takes 2.000 s{hours}{published}"
    standin.step, clock = 200_000, iter([0.0, 9.0, 10.0, 12.0])
    dreamer.announce(agent, rb, args, "raycast", standin)
    assert "2.000 s; 500,000 steps: 17 h of updates; 600,000" in capsys.readouterr().out  # 30,000 of 49,600
    standin.step, args.total_timesteps, clock = 0, 6_250, iter([0.0, 9.0, 10.0, 10.1])
    dreamer.announce(agent, rb, args, "raycast", standin)
    assert "takes 0.100 s; 6,250 steps: 0.0056 h of updates" in capsys.readouterr().out  # 100 after pretraining's 100


def test_the_table_of_the_replays_passes_over_other_folders(tmp_path, monkeypatch, capsys):
    """What is not named task__way__seed__time, and runs without an evaluation; seeds of one way are one line."""
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "benchmark")
    import dreamer_replay

    runs = {"CartPole-v1__ends__1__9": [1.0, 2.0, 4.0], "CartPole-v1__ends__2__9": [6.0], "CartPole-v1__ends__3__9": []}
    for name, returns in runs.items():
        with SummaryWriter(str(tmp_path / name)) as writer:
            for step, mean in enumerate(returns):
                writer.add_scalar("eval/episodic_return", mean, step)
                writer.add_scalar("eval/episodic_return_std", 0.0, step)
    (tmp_path / "lost+found").mkdir()
    dreamer_replay.table([str(path) for path in sorted(tmp_path.iterdir())])
    line = "CartPole-v1 ends: second half 4.5 (3.0 6.0), last 5.0, best 5.0, evaluations [3, 1]\n"
    assert capsys.readouterr().out == line


def stepped(env: gym.Env, actions: list) -> list:
    """What the environment itself gets where the agent acts."""
    got = []
    inner = env.unwrapped
    inner.step = lambda action: (got.append(action), (inner.observation_space.sample(), 0.0, False, False, {}))[1]
    env.reset(seed=1)
    for action in actions:
        env.step(action)
    return got


INF = math.inf
ACTIONS = {
    "bounded": (gym.spaces.Box(np.float32([0, -2]), np.float32([10, 6])), [[10, 2], [0, 6], [5, 2]]),
    "half": (gym.spaces.Box(np.float32([0, -INF]), np.float32([INF, 0.5])), [[2, -0.5], [0, 0.5], [1, -0.5]]),
    "half, far": (gym.spaces.Box(np.float32([2, -INF]), np.float32([INF, -3])), [[4, -4], [2, -3], [3, -4]]),
    "float's largest": (gym.spaces.Box(-3e38, 3e38, (2,), np.float32), [[1, 0], [-1, 1], [0, 0]]),
    "one so large": (gym.spaces.Box(0, 3e38, (2,), np.float32), [[2, 1], [0, 2], [1, 1]]),
    "integers": (gym.spaces.Box(0, 11, (2,), np.int32), [[11, 6], [0, 11], [6, 6]]),  # 5.5 is rounded to the even 6
    "a matrix": (gym.spaces.Box(-2, 2, (2, 1), np.float32), [[[2], [0]], [[-2], [2]], [[0], [0]]]),
}


class Spaces(gym.Env):
    """Any spaces."""

    def __init__(self, observation_space: gym.Space, action_space: gym.Space):
        self.observation_space, self.action_space = observation_space, action_space

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.observation_space.sample(), {}


@pytest.mark.parametrize("kind", ACTIONS)
def test_actions_stay_in_the_environments_space(kind):
    """[-1, 1] is the range between the bounds; without two of them it stays as long, moved within the one there is."""
    space, expected = ACTIONS[kind]
    env = dreamer.fit_spaces(Spaces(VECTOR, space), "x")
    got = stepped(env, [np.float32(a) for a in ([1, 0], [-1, 1], [0, 0])])
    assert env.action_space == gym.spaces.Box(-1, 1, (2,), np.float32)
    for action, values in zip(got, expected, strict=True):
        assert space.contains(action) and action.tolist() == values


def test_discrete_actions_may_begin_anywhere():
    """The agent counts from 0."""
    env = dreamer.fit_spaces(Spaces(VECTOR, gym.spaces.Discrete(3, start=5)), "x")
    assert stepped(env, [0, 2]) == [5, 7] and env.action_space == DISCRETE


NAMES_OF_TASKS = {  # what is typed: the id it stands for, --max-episode-steps
    "dm_control/cup-catch-v0": ("cup-catch", None),
    "ALE/Pong-v5": ("ALE/Pong-v5", 27_000),
    "PongNoFrameskip-v4": ("PongNoFrameskip-v4", 27_000),
    "ale_py:ALE/Pong-v5": ("ALE/Pong-v5", 27_000),
}


@pytest.mark.parametrize("script", [dreamer, dreamer_v3], ids=["dreamer", "dreamer_v3"])
@pytest.mark.parametrize("env_id", NAMES_OF_TASKS)
def test_names_of_tasks_elsewhere_are_understood(script, env_id):
    """Shimmy's of a dm_control task, the old ones of Atari games, also with ALE's module: the same preprocessing."""
    args = script.with_task_defaults(script.Args(env_id=env_id))
    assert (args.env_id, args.max_episode_steps) == NAMES_OF_TASKS[env_id]
    if "Pong" in env_id:
        assert script.make_env(args, "none")().observation_space.shape == (64, 64, 3)


@pytest.mark.parametrize("script", [dreamer, dreamer_v3], ids=["dreamer", "dreamer_v3"])
def test_other_names_of_atari_games_are_told(script, capsys):
    """In a process that has registered none of them."""
    pytest.importorskip("ale_py", reason="ale_py is not installed.")
    gym.registry.pop("Pong-v5", None)
    args = script.with_task_defaults(script.Args(env_id="Pong-v5"))
    line = error_of(capsys, script.make_vector_env, args, "none", 1)
    assert line == "error: 'Pong-v5' is played as ALE/Pong-v5"


@pytest.mark.parametrize("script", [dreamer, dreamer_v3], ids=["dreamer", "dreamer_v3"])
def test_float64_observations_are_no_warning(script, recwarn):
    """As every MuJoCo task of Gymnasium has them; whatever their bounds."""
    for low in (-1e300, -np.pi):
        env = script.fit_spaces(Spaces(gym.spaces.Box(low, np.pi, (3,), np.float64), BOX), "x")
    obs, _ = env.reset(seed=1)
    assert obs.dtype == env.observation_space.dtype == np.float32 and obs.shape == (3,) and not recwarn.list


@pytest.mark.parametrize("script", [dreamer, dreamer_v3], ids=["dreamer", "dreamer_v3"])
@pytest.mark.parametrize("flag", [{"obs_mode": "state"}, {"renderer": "raycast"}], ids=["obs_mode", "renderer"])
def test_flags_of_dm_control_are_refused_elsewhere(script, flag, capsys):
    """They would do nothing."""
    args = tiny(script, env_id="fake_envs:Counter-v0", **flag)
    assert "fake_envs:Counter-v0 has its own" in error_of(capsys, script.main, args)


@pytest.mark.parametrize("script", [dreamer, dreamer_v3], ids=["dreamer", "dreamer_v3"])
def test_a_renderer_without_pictures_is_refused(script, capsys):
    """A film is one; a run that was saved with it goes on."""
    args = script.with_task_defaults(script.Args(env_id="walker-walk", obs_mode="state", renderer="raycast"))
    assert "--renderer raycast has nothing to draw" in error_of(capsys, script.check_args, args)
    for change in ({"capture_video": True}, {"resume": "runs/x"}, {"evaluate": "runs/x"}):
        script.check_args(dataclasses.replace(args, **change))


@pytest.mark.parametrize("shape", [(84, 84), (84, 84, 1), (64, 64, 4), (48, 96, 3), (64, 64)])
def test_grey_and_stacked_frames(shape):
    """Any number of channels is learned from and decoded; two dimensions are one channel."""
    env = dreamer.fit_spaces(Spaces(gym.spaces.Box(0, 255, shape, np.uint8), BOX), "x")
    channels = shape[2] if len(shape) == 3 else 1
    assert env.observation_space.shape == (64, 64, channels) == env.reset(seed=1)[0].shape
    agent = make_agent(tiny_args(), env.observation_space)
    assert agent.world_model.decode(torch.zeros(1, 1, 11)).shape == (1, 1, channels, 64, 64)


@pytest.mark.parametrize("script", [dreamer, dreamer_v3])
def test_more_channels_than_are_resized(script, capsys):
    """Five are taken at 64 x 64 and whole multiples; of another size they are refused, and what to do is said."""
    make = lambda shape: Spaces(gym.spaces.Box(0, 255, shape, np.uint8), BOX)  # noqa: E731
    for size in (64, 128):
        assert script.fit_spaces(make((size, size, 5)), "x").observation_space.shape == (64, 64, 5)
    line = error_of(capsys, script.fit_spaces, make((84, 84, 5)), "x")
    assert "(84, 84, 5)" in line and "cannot be resized to 64x64, make it so yourself (error: OpenCV" in line


@pytest.mark.parametrize("num_envs", [1, 3])
def test_evaluation_episodes_are_the_same_however_many_play(num_envs, monkeypatch):
    """Seven episodes begin with seven seeds, one environment or three at once; of long ones the first entries stay.

    The action before an episode's first observation is 0. An environment that has played its share may end one more
    before the last has: it does not count.
    """
    monkeypatch.setattr(dreamer, "PIECE", 3)
    args = tiny_args(eval_episodes=7, seed=17)  # of 5, 2, 2, 2, 1, 1 and 3 steps
    agent, seeds = make_agent(args, gym.spaces.Box(-1, 1, (3,), np.float32)), []

    class Envs:
        """Ends after as many steps as the seed says."""

        def __init__(self):
            self.num_envs, self.left, self.length = num_envs, np.zeros(num_envs, int), np.zeros(num_envs)

        def reset(self, seed, options):
            for i in np.flatnonzero(options["reset_mask"]):
                seeds.append(seed[i])
                self.length[i] = self.left[i] = seed[i] % 5 + 1
            return np.zeros((num_envs, 3), np.float32), {}

        def step(self, action):
            self.left -= 1
            zeros, infos = np.zeros(num_envs), {"episode": {"r": self.length.copy()}}
            return np.zeros((num_envs, 3), np.float32), zeros, zeros > 1, self.left == 0, infos

    act, firsts, others = dreamer.act, [], []

    def spy(agent, obs, action, is_first, *rest, **kwargs):
        firsts.append(action[is_first])
        others.append(action[~is_first])
        return act(agent, obs, action, is_first, *rest, **kwargs)

    monkeypatch.setattr(dreamer, "act", spy)
    returns, episodes = dreamer.evaluate(agent, Envs(), args, CPU, SimpleNamespace(requested=0))
    assert len(np.concatenate(firsts)) >= 7 and not np.concatenate(firsts).any() and np.concatenate(others).all()
    assert [len(episode["reward"]) for episode in episodes] == [min(seed % 5 + 2, 3) for seed in seeds[:num_envs]]
    wanted = np.random.default_rng([17, 99]).integers(2**31, size=7).tolist()
    assert set(seeds) == set(wanted) and sorted(returns) == sorted(seed % 5 + 1 for seed in wanted)
