"""Numbers of dreamer_v3.py: each piece against its equation written out plainly, a table or torch.distributions."""

import functools
import math
import os
import re
import shutil
import types
from collections import Counter as Tally
from itertools import pairwise
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
import torch.distributions as td
import torch.nn as nn
import torch.nn.functional as F
from runs import TWO_ENVS, assert_healthy, command_line, differences, image_tags, load, resume, run, scalars, tiny
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensor, FakeTensorMode

import dreamer_v3
from dreamer_v3 import BLOCKS, SIZES, STOCH, Args, LaProp, ReplayBuffer, Widths, lambda_return

IMAGE = gym.spaces.Box(0, 255, (64, 64, 3), np.uint8)
VECTOR = gym.spaces.Box(-np.inf, np.inf, (5,), np.float32)
BOX = gym.spaces.Box(-1, 1, (2,), np.float32)
DISCRETE = gym.spaces.Discrete(3)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """A size of milliseconds under the name of the smallest."""
    monkeypatch.setitem(SIZES, "laptop", Widths(16, 8, 3, 2))


def tiny_args(**overrides) -> Args:
    sizes = {"size": "laptop", "batch_size": 3, "batch_length": 5, "horizon": 4, "buffer_size": 200, "warmup": 10}
    return Args(**({"cuda": False, "env_id": "Toy-v0"} | sizes | overrides))


def make_agent(args: Args, obs_space=VECTOR, action_space=BOX) -> dreamer_v3.Agent:
    """From a fixed seed, with random biases, scales and output layers because zeros and ones would hide mistakes."""
    gen = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    agent = dreamer_v3.Agent(obs_space, action_space, args)
    with torch.no_grad():
        for name, param in agent.named_parameters():
            if param.dim() == 1:
                param.add_(0.3 * torch.randn(param.shape, generator=gen))
            elif not param.any() or name.startswith("actor"):
                param.add_(0.1 * torch.randn(param.shape, generator=gen))
    return agent


def make_batch(agent: dreamer_v3.Agent, args: Args, obs_space=VECTOR, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random entries (T, B, ...): an episode begins in mid-sequence here and there, one state is terminal."""
    gen = torch.Generator().manual_seed(seed)
    shape, rssm = (args.batch_length, args.batch_size), agent.world_model.rssm
    obs = torch.randn(*shape, 5, generator=gen)
    if obs_space is IMAGE:
        obs = torch.randint(256, (*shape, 64, 64, 3), generator=gen, dtype=torch.uint8)
    action = torch.randn(*shape, agent.action_dim, generator=gen) * 1.5
    if agent.discrete:
        action = F.one_hot(action.argmax(-1), agent.action_dim).float()
    is_first, cont = torch.zeros(shape), torch.ones(shape)
    is_first[0, 0] = is_first[2, 1] = is_first[3:4, 0] = 1  # if there is a fourth entry
    cont[1, 1] = 0
    batch = {"obs": obs, "action": action * (1 - is_first[..., None]), "cont": cont, "is_first": is_first}
    batch["reward"] = 2 * torch.randn(shape, generator=gen) * (1 - is_first)
    batch["stoch"] = torch.randint(rssm.classes, (args.batch_size, STOCH), generator=gen, dtype=torch.uint8)
    return batch | {"deter": torch.randn(args.batch_size, rssm.deter, generator=gen)}


def make_noise(agent: dreamer_v3.Agent, args: Args, seed: int = 0) -> dict[str, torch.Tensor]:
    return dreamer_v3.draw_noise(agent, args, torch.Generator().manual_seed(seed))


def setup(args: Args, obs_space=VECTOR, action_space=BOX) -> tuple:
    """Agent, batch and noise for one update."""
    agent = make_agent(args, obs_space, action_space)
    return agent, make_batch(agent, args, obs_space), make_noise(agent, args)


@pytest.fixture
def float64(monkeypatch):
    """Everything in float64, the casts to float32 inside dreamer_v3.py included."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def close(result, expected, tolerance: float = 1e-6) -> None:
    """Equal to the digits of a table."""
    result, expected = (torch.as_tensor(x).detach().double() for x in (result, expected))
    torch.testing.assert_close(result, expected, rtol=tolerance, atol=tolerance)


# === The equations, written out plainly ===


def rms(norm: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return x / torch.sqrt((x**2).mean(-1, keepdim=True) + 1e-4) * norm.weight


def silu(x: torch.Tensor) -> torch.Tensor:
    return x / (1 + torch.exp(-x))


def plain(modules: nn.Sequential, x: torch.Tensor) -> torch.Tensor:
    """A stack of layers: linear, RMSNorm, SiLU, and perhaps a linear output."""
    for module in modules:
        if isinstance(module, nn.Linear):
            x = x @ module.weight.T + module.bias
        else:
            x = silu(x) if isinstance(module, nn.SiLU) else rms(module, x)
    return x


def gru(rssm: dreamer_v3.RSSM, stoch, deter, action) -> torch.Tensor:
    """The block GRU, block by block, of one state without batch."""
    action = torch.stack([a / max(1, abs(a)) for a in action])
    parts = plain(rssm.deter_in, deter), plain(rssm.stoch_in, stoch), plain(rssm.action_in, action)
    width, (first, norm, _), gates = rssm.deter // BLOCKS, rssm.gru_hidden, rssm.gru_gates
    blocks = [torch.cat([deter[k * width : (k + 1) * width], *parts]) @ first.weight[k] for k in range(BLOCKS)]
    x = silu(rms(norm, torch.cat(blocks) + first.bias))
    new = []
    for k in range(BLOCKS):
        own = slice(k * width, (k + 1) * width)
        out = x[own] @ gates.weight[k] + gates.bias[3 * k * width : 3 * (k + 1) * width]
        reset, cand, update = out[:width], out[width : 2 * width], out[2 * width :]
        cand, update = torch.tanh(torch.sigmoid(reset) * cand), torch.sigmoid(update - 1)
        new.append(update * cand + (1 - update) * deter[own])
    return torch.cat(new)


def latent(logits: torch.Tensor, noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sample, straight-through, and probabilities (STOCH, classes) from the outputs of a layer."""
    probs, rows = [], []
    for row, u in zip(logits.view(STOCH, -1), noise, strict=True):
        p = 0.99 * torch.exp(row) / torch.exp(row).sum() + 0.01 / len(row)
        index = next(i for i in range(len(row)) if i == len(row) - 1 or p[: i + 1].sum() >= u)
        rows.append(torch.eye(len(row))[index] + p - p.detach())
        probs.append(p)
    return torch.cat(rows), torch.stack(probs)


def filter_sequence(rssm: dreamer_v3.RSSM, stoch, deter, action, embed, is_first, noise) -> tuple:
    """Posterior states row by row and step by step; a state is forgotten where an episode begins."""
    rows = []
    for b in range(action.shape[1]):
        z, h, steps = stoch[b], deter[b], []
        for t in range(len(action)):
            if is_first[t, b] == 1:
                z, h = torch.zeros_like(z), torch.zeros_like(h)
            h = gru(rssm, z, h, action[t, b])
            z, probs = latent(plain(rssm.post_net, torch.cat([h, embed[t, b]])), noise[t, b])
            steps.append((z, h, probs))
        rows.append([torch.stack(x) for x in zip(*steps, strict=True)])
    return tuple(torch.stack(x, 1) for x in zip(*rows, strict=True))


def two_hot(bins: torch.Tensor, y: float) -> torch.Tensor:
    """The target distribution of a number, found by looking at all bins."""
    target = torch.zeros(len(bins))
    below = [i for i, value in enumerate(bins.tolist()) if value <= y]
    if not below or below[-1] == len(bins) - 1:
        target[-1 if below else 0] = 1
        return target
    k = below[-1]
    share = (y - bins[k]) / (bins[k + 1] - bins[k])
    target[k], target[k + 1] = 1 - share, share
    return target


# === Sizes and initial quantities ===


def count(module: nn.Module) -> int:
    return sum(param.numel() for param in module.parameters() if param.requires_grad)


def agent_of(size: str, obs_space) -> dreamer_v3.Agent:
    """Of walker-walk, without memory."""
    with torch.device("meta"):
        space = gym.spaces.Box(-np.inf, np.inf, (24,), np.float32) if obs_space is VECTOR else IMAGE
        return dreamer_v3.Agent(space, gym.spaces.Box(-1, 1, (6,), np.float32), Args(size=size))


COUNTS = {
    "1m": (640_867, 686_846),
    "12m": (9_738_019, 10_494_158),
    "25m": (21_782_947, 23_489_326),
    "50m": (38_612_003, 41_650_062),
    "100m": (86_622_499, 93_468_238),
    "200m": (153_769_507, 165_948_686),
    "400m": (345_473_059, 372_896_398),
}


@pytest.mark.parametrize("size", COUNTS)
def test_parameter_counts_of_the_size_table(size):
    """Walker, from states and from pixels, the slow critic not counted."""
    assert tuple(count(agent_of(size, space)) for space in (VECTOR, IMAGE)) == COUNTS[size]


def test_parameter_counts_by_part(monkeypatch):
    """Every module of the 1M agent; the size for laptops."""
    monkeypatch.setitem(SIZES, "laptop", Widths(256, 64, 4, 4))
    assert [count(agent_of("laptop", space)) for space in (VECTOR, IMAGE)] == [361_059, 415_230]
    agent = agent_of("1m", VECTOR)
    model, rssm = agent.world_model, agent.world_model.rssm
    parts = [rssm.deter_in, rssm.stoch_in, rssm.action_in, rssm.gru_hidden, rssm.gru_gates]
    assert [count(m) for m in parts] == [32_896, 8_320, 512, 132_096, 99_840]
    assert [count(m) for m in (rssm.post_net, rssm.prior_net)] == [36_992 + 8_320, 32_896 + 4_224 + 8_320]
    assert [count(m) for m in (model.encoder, rssm, model.decoder)] == [10_112, 364_416, 51_096]
    assert [count(m) for m in (model.reward, model.cont, agent.critic, agent.actor)] == [57_663, 41_153, 66_111, 50_316]
    model = agent_of("1m", IMAGE).world_model
    assert [count(m) for m in (model.encoder, model.rssm, model.decoder)] == [14_304, 376_704, 80_595]


def test_initial_weights():
    """Truncated at two of their own standard deviations, std 1 / sqrt(fan-in), all blocks counted; zero biases."""
    torch.manual_seed(0)
    agent = dreamer_v3.Agent(IMAGE, BOX, Args(size="1m"))
    rssm, encoder = agent.world_model.rssm, agent.world_model.encoder
    for layer, fan_in in (
        (rssm.gru_gates, 512),
        (rssm.gru_hidden[0], 512 + 8 * 3 * 64),
        (rssm.deter_in[0], 512),
        (encoder.convs[2], 25 * 12),
        (agent.actor.net[0], 640),
        (agent.world_model.decoder.deter_in, 512),
    ):
        assert layer.weight.std().item() * math.sqrt(fan_in) == pytest.approx(1, abs=0.03)
        assert layer.weight.abs().max().item() * math.sqrt(fan_in) == pytest.approx(2 * 1.1368, abs=0.03)
        assert not layer.bias.any()
    assert agent.actor.net[-1].weight.std().item() * math.sqrt(64) == pytest.approx(0.01, abs=0.002)
    for head in (agent.critic, agent.slow_critic, agent.world_model.reward):
        assert not head.net[-1].weight.any() and not head.net[-1].bias.any()


def test_initial_losses_of_the_smallest_published_size():
    """Walker from states: uniform predictions, value and reward exactly 0, nearly uniform latents, a wide policy."""
    torch.manual_seed(0)
    args = Args(size="1m", cuda=False, batch_size=4, batch_length=8)
    agent = dreamer_v3.Agent(VECTOR, gym.spaces.Box(-1, 1, (6,), np.float32), args)
    _, _, metrics = dreamer_v3.compute_losses(agent, make_batch(agent, args), make_noise(agent, args), args)
    assert metrics["losses/reward_loss"].item() == pytest.approx(math.log(255), abs=1e-5)
    assert metrics["losses/replay_value_loss"].item() == pytest.approx(2 * math.log(255) * 26 / 28, abs=1e-3)
    assert metrics["model/imag_reward"].item() == metrics["model/imag_value"].item() == 0
    assert 40 < metrics["model/post_entropy"].item() < 32 * math.log(4)
    assert metrics["model/actor_entropy"].item() == pytest.approx(6 * 1.3054532902, abs=0.01)
    assert metrics["losses/dyn_loss"].item() == metrics["losses/rep_loss"].item() > 1


# === Symlog and two-hot ===


def test_symlog():
    """The table; images become [-0.5, 0.5] with channels first."""
    close(
        dreamer_v3.preprocess(torch.tensor([0.5, 1, 10, 1000])),
        [0.4054651081, 0.6931471806, 2.3978952728, 6.9087547793],
    )
    close(dreamer_v3.preprocess(torch.tensor([-0.5, -1])), [-0.4054651081, -0.6931471806])
    image = torch.zeros(1, 64, 64, 3, dtype=torch.uint8)
    image[0, 5, 6, 1] = 255
    assert dreamer_v3.preprocess(image).shape == (1, 3, 64, 64)
    close(dreamer_v3.preprocess(image)[0, :, 5, 6], [-0.5, 0.5, -0.5])


@pytest.fixture
def head() -> dreamer_v3.TwoHotHead:
    torch.manual_seed(0)
    return dreamer_v3.TwoHotHead(4, 8, 1)


def test_bins(head):
    """255 of them, evenly spaced in symlog, the middle one 0, opposite ones exactly opposite."""
    bins = head.bins.double()
    close(bins[120:128], [-2.01127087, -1.57250952, -1.1976785, -0.87746274, -0.60390446, -0.37020536, -0.17055772, 0])
    assert len(bins) == 255 and torch.equal(bins, -bins.flip(0)) and bins[127] == 0
    assert bins[0].item() == pytest.approx(-485165194.41, rel=1e-6)
    close(torch.diff(torch.sign(bins) * torch.log1p(bins.abs())), np.full(254, 20 / 127), 1e-5)
    assert "bins" not in head.state_dict()


TWO_HOT = {
    0: {127: 1},
    0.1: {127: 0.4136882, 128: 0.5863118},
    0.5: {129: 0.4446079, 130: 0.5553921},
    1: {131: 0.6173291, 132: 0.3826709},
    -2: {120: 0.9743121, 121: 0.0256879},
    3.7: {136: 0.1844323, 137: 0.8155677},
    100: {156: 0.7105293, 157: 0.2894707},
    -1000: {83: 0.8615515, 84: 0.1384485},
    1e9: {254: 1},
    -1e9: {0: 1},
}


@pytest.mark.parametrize("y", TWO_HOT)
def test_two_hot_targets(head, y):
    """The gradient of the loss is prediction minus target; the target decodes to the number itself, clipped."""
    logits = torch.randn(255, requires_grad=True)
    loss = head.loss(logits, torch.tensor(float(y)))
    target = logits.softmax(-1) - torch.autograd.grad(loss, logits, retain_graph=True)[0]
    found = {i: target[i].item() for i in range(255) if target[i] > 1e-4}
    assert found.keys() == TWO_HOT[y].keys() and list(found.values()) == pytest.approx(
        list(TWO_HOT[y].values()), abs=1e-4
    )
    close(target, two_hot(head.bins, y), 1e-4)
    close(loss, -(two_hot(head.bins, y) * logits.log_softmax(-1)).sum(), 1e-5)
    decoded = head.mean(two_hot(head.bins, y).clamp(min=1e-45).log()).item()
    assert decoded == pytest.approx(max(min(y, 4.8516519e8), -4.8516519e8), rel=1e-3, abs=1e-4)


def test_two_hot_mean_and_loss(head):
    """Uniform logits cost ln 255 whatever the target and mean exactly 0; the table's other logits."""
    uniform = torch.zeros(7, 3, 255)
    targets = torch.randn(7, 3, generator=torch.Generator().manual_seed(0)) * 100
    close(head.loss(uniform, targets), np.full((7, 3), 5.5412635), 1e-5)
    assert torch.equal(head.mean(uniform), torch.zeros(7, 3))
    assert torch.equal(head.mean(uniform + 3.7), torch.zeros(7, 3))
    assert (uniform[0].softmax(-1) * head.bins).sum(-1).abs().max() > 0.01  # what the plain sum gives
    assert torch.equal(head.mean(head(torch.randn(50, 4))), torch.zeros(50))
    logits = torch.zeros(255)
    logits[127], logits[140] = 2, 1
    assert head.mean(logits).item() == pytest.approx(0.0440596901, rel=1e-4)
    close(head.loss(logits, torch.tensor(0.0)), 3.5725626)
    close(head.loss(logits, torch.tensor(3.7)), 5.5725626)


# === Networks ===


def test_norm_and_activation():
    """RMSNorm without mean and shift; eps is 1e-4."""
    x = torch.tensor([1, -2, 3, 0.5])
    close(dreamer_v3.RMSNorm(4)(x), [0.52980551, -1.05961101, 1.58941652, 0.26490275])
    close(nn.SiLU()(x), [0.73105858, -0.23840584, 2.85772238, 0.31122967])
    close(dreamer_v3.RMSNorm(2)(torch.tensor([1e-2, 0.0])), [1e-2 / math.sqrt(1.5e-4), 0])
    assert dreamer_v3.RMSNorm(4)(x.bfloat16()).dtype == torch.float32


def test_block_linear_against_a_loop(float64):
    """Each block has its own matrix."""
    layer = dreamer_v3.BlockLinear(24, 16)
    nn.init.normal_(layer.weight)
    nn.init.normal_(layer.bias)
    x = torch.randn(2, 5, 8, 3)
    rows = [x[..., k, :] @ layer.weight[k] for k in range(8)]
    torch.testing.assert_close(layer(x), torch.cat(rows, -1) + layer.bias)


def test_gates_of_the_table(monkeypatch):
    """Reset, candidate, update inside each of two blocks; what the gates say is put in by hand."""
    monkeypatch.setattr(dreamer_v3, "BLOCKS", 2)
    rssm = dreamer_v3.RSSM(1, 3, Widths(4, 8, 3, 2))
    out = torch.tensor([[0.1, -0.2, 0.3, 0.4, 0.5, -0.6, 0.7, 0.8, -0.9, 1.0, 1.1, -1.2]])
    for module in rssm.modules():
        dreamer_v3.init_weights(module)
    rssm.gru_gates.forward = lambda x: out
    h = rssm.deter_step(torch.zeros(1, 96), torch.tensor([[0.5, -0.5, 0.25, 1]]), torch.zeros(1, 1))
    close(h, [[0.37020317, -0.38608408, -0.16369567, 0.95989687]])


def test_steps_against_loops_from_the_equations(float64):
    """Filtering from stored latents, across first entries: states and gradients; then the prior's step."""
    args = tiny_args()
    agent, batch, noise = setup(args)
    rssm, embed = agent.world_model.rssm, torch.randn(5, 3, 8, requires_grad=True)
    start = F.one_hot(batch["stoch"].long(), 3).flatten(-2).double(), batch["deter"]
    inputs = *start, batch["action"], embed, batch["is_first"], noise["post"]
    result, expected = rssm.observe(*inputs), filter_sequence(rssm, *inputs)
    for ours, plainly in zip(result, (*expected[:2], expected[2].log()), strict=True):
        torch.testing.assert_close(ours, plainly)
    stoch, deter, _ = result
    assert ((stoch == 0) | (stoch == 1)).all() and (stoch.unflatten(-1, (STOCH, -1)).sum(-1) == 1).all()
    params = [embed, *(p for n, p in rssm.named_parameters() if "prior" not in n)]
    slopes = torch.randn(stoch.shape), torch.randn(deter.shape)
    gradients = [
        torch.autograd.grad((states[0] * slopes[0]).sum() + (states[1] * slopes[1]).sum(), params)
        for states in (result, expected)
    ]
    for ours, plainly in zip(*gradients, strict=True):
        assert plainly.any()
        torch.testing.assert_close(ours, plainly)
    new_stoch, new_deter = rssm.img_step(stoch[0], deter[0], batch["action"][0], noise["post"][1])
    for b in range(3):
        h = gru(rssm, stoch[0, b], deter[0, b], batch["action"][0, b])
        torch.testing.assert_close(new_deter[b], h)
        torch.testing.assert_close(new_stoch[b], latent(plain(rssm.prior_net, h), noise["post"][1, b])[0])


def test_unimix_kl_and_entropy_of_the_table(monkeypatch):
    """One percent uniform; KL summed over latents, then clipped at the free nats, then averaged."""
    monkeypatch.setattr(dreamer_v3, "STOCH", 2)
    rssm = types.SimpleNamespace(classes=4)
    probs = dreamer_v3.RSSM.log_probs(rssm, torch.tensor([[10.0, 0, 0, 0, 0, 0, 0, 0]])).exp()
    close(probs[0, 0], [0.99236518, 0.00254494, 0.00254494, 0.00254494], 1e-5)
    post = dreamer_v3.RSSM.log_probs(rssm, torch.tensor([[2.0, 0, -1, 0.5, 0, 3, 0, 0]]))
    prior = dreamer_v3.RSSM.log_probs(rssm, torch.tensor([[1.0, 1, 0, 0, 0, 0, 0, 0]]))
    close(post.exp()[0, 0], [0.70549892, 0.09764056, 0.03750026, 0.15936026])
    close(post.exp()[0, 1, :2], [0.04538399, 0.86384802])
    close(-(post.exp() * post).sum(-1), [[0.88907814, 0.54749448]])
    close(dreamer_v3.kl_loss(post, prior, 0.0), 1.15384947)
    kinds = td.Categorical(logits=post), td.Categorical(logits=prior)
    close(td.kl_divergence(*kinds).sum(-1), [1.15384947])
    both = torch.stack([post, prior]), torch.stack([prior, prior])  # KL 1.15 and 0
    close(dreamer_v3.kl_loss(*both, 0.0), 1.15384947 / 2)
    close(dreamer_v3.kl_loss(*both, 1.0), (1.15384947 + 1) / 2)  # not the mean clipped, which would be 1


def test_free_nats_stop_the_gradient():
    """A step whose KL is below one nat moves neither side; the two losses move one side each."""
    logits = torch.randn(2, STOCH, 3), torch.randn(2, STOCH, 3)
    post, prior = ((0.1 * x).log_softmax(-1).requires_grad_() for x in logits)
    assert 0 < dreamer_v3.kl_loss(post, prior, 0.0) < 1
    assert dreamer_v3.kl_loss(post, prior, 1.0) == 1
    gradients = torch.autograd.grad(dreamer_v3.kl_loss(post, prior, 1.0), (post, prior))
    assert not any(g.any() for g in gradients)
    assert all(g.all() for g in torch.autograd.grad(dreamer_v3.kl_loss(post, prior, 0.0), (post, prior)))


def test_samples_have_the_distribution_and_the_gradient_of_the_probabilities():
    """Inverted at uniform numbers, the edges included."""
    log_probs = torch.tensor([0.2, 0.5, 0.3]).log().requires_grad_()
    noise = torch.rand(40_000, generator=torch.Generator().manual_seed(0))
    sample = dreamer_v3.sample_one_hot(log_probs.expand(40_000, 3), noise)
    close(sample.mean(0), [0.2, 0.5, 0.3], 0.01)
    edges = dreamer_v3.sample_one_hot(log_probs.expand(6, 3), torch.tensor([0, 0.19, 0.21, 0.69, 0.71, 1 - 2**-24]))
    assert edges.argmax(-1).tolist() == [0, 0, 1, 1, 2, 2]
    slope = torch.tensor([1.0, -2, 0.5])
    (gradient,) = torch.autograd.grad((edges[0] * slope).sum(), log_probs)
    close(gradient, slope * torch.tensor([0.2, 0.5, 0.3]))


def test_encoder_and_decoder_of_images_are_the_plain_layers(float64, monkeypatch):
    """Convolution, pooling, norm over channels, SiLU; the first 4 x 4 pixels come from blocks of channels."""
    monkeypatch.setitem(SIZES, "laptop", Widths(16, 8, 3, 4))
    model = make_agent(tiny_args(), IMAGE).world_model
    x = image = torch.rand(2, 3, 64, 64) - 0.5
    for conv, norm, size in zip(model.encoder.convs, model.encoder.norms, (32, 16, 8, 4), strict=True):
        x = F.max_pool2d(F.conv2d(x, conv.weight, conv.bias, padding=2), 2)
        x = silu(rms(norm, x.movedim(1, -1))).movedim(-1, 1)
        assert x.shape[-2:] == (size, size)
    torch.testing.assert_close(model.encoder(image), x.flatten(1))
    feat, decoder = torch.randn(2, STOCH * 3 + 16), model.decoder
    stoch, deter = feat[:, : STOCH * 3], feat[:, STOCH * 3 :]
    a = torch.zeros(2, 4, 4, 16)
    for k in range(BLOCKS):  # of 16 channels, two to each block
        out = deter[:, 2 * k : 2 * k + 2] @ decoder.deter_in.weight[k] + decoder.deter_in.bias[32 * k : 32 * k + 32]
        a[..., 2 * k : 2 * k + 2] = out.view(2, 4, 4, 2)
    x = (a + plain(decoder.stoch_in, stoch).view(2, 4, 4, 16)).movedim(-1, 1)
    for conv, norm in zip(decoder.convs, decoder.norms, strict=True):
        x = silu(rms(norm, x.movedim(1, -1))).movedim(-1, 1)
        x = F.conv2d(x.repeat_interleave(2, -1).repeat_interleave(2, -2), conv.weight, conv.bias, padding=2)
    assert x.shape == (2, 3, 64, 64)
    torch.testing.assert_close(decoder(feat), 1 / (1 + torch.exp(-x)) - 0.5)


def test_policy_of_the_table():
    """Mean, standard deviation, log-probability and entropy; the discrete one is a plain softmax."""
    actor = make_agent(tiny_args()).actor
    actor.net = nn.Identity()
    close(torch.stack(actor.dist(torch.tensor([0.0, 0.0]))), [[0], [0.8927173702]])
    dist = actor.dist(torch.tensor([0.0, 0, 1, 0, 0, -2]).view(6).expand(1, 6))
    mean, std = dist
    close(mean, [[0, 0, 0.7615941560]])
    close(std, [[0.8927173702, 0.8927173702, 0.55]])
    zero, one = (tuple(x[..., i : i + 1] for x in dist) for i in (0, 2))
    close(actor.log_prob(zero, torch.tensor([[0.3]])), [-0.8619189677])
    close(actor.entropy(zero), [1.3054532902])
    close(actor.log_prob(one, torch.tensor([[-0.5]])), [-2.9518780851])
    action = torch.randn(1, 3)
    close(actor.log_prob(dist, action), td.Normal(mean, std).log_prob(action).sum(-1))
    close(actor.sample(dist, torch.full((1, 3), 2.0)), mean + 2 * std)  # not bounded
    actor = make_agent(tiny_args(), action_space=DISCRETE).actor
    actor.net = nn.Identity()
    logits = torch.tensor([[1.0, -0.5, 0.2]])
    dist, kind = actor.dist(logits), td.Categorical(logits=logits)
    close(actor.entropy(dist), kind.entropy())
    close(actor.log_prob(dist, torch.eye(3)[[2]]), kind.log_prob(torch.tensor([2])))
    noise = actor.draw_noise((20_000,), torch.Generator().manual_seed(0))
    close(actor.sample((dist[0].expand(20_000, 3),), noise).mean(0), logits[0].softmax(-1), 0.01)


# === Returns and losses ===

REWARD, CONT = torch.tensor([[0.3, 1, 0, -0.5, 2]]).T, torch.tensor([[0.997, 0.9, 0.5, 0.997, 0.1]]).T


def test_imagined_returns_of_the_table():
    """Rewards and discounts of the state that is reached, bootstrapped by the value of the last."""
    values = torch.tensor([[5.0, 4, 3, 2, 1]]).T
    returns = lambda_return(REWARD, values, CONT, torch.full_like(values, 0.95))
    close(returns[:, 0], [1.88934188, 0.82963962, 1.588715, 2.1])
    close(CONT[:-1].cumprod(0)[:, 0], [0.997, 0.8973, 0.44865, 0.44730405])
    close((returns - values[:-1])[:, 0], [-3.11065812, -3.17036038, -1.411285, 0.1])


@pytest.mark.parametrize(
    ("terminal", "expected"),
    [(True, [1.24924925, 0, 3.43244957, 3.99399399]), (False, [5.02646069, 3.98798799, 3.43244957, 3.99399399])],
)
def test_replayed_returns_of_the_table(terminal, expected):
    """Nothing follows a terminal state; beyond a truncation nothing is known but the dream's return."""
    boot, last = torch.tensor([[6.0, 5, 4, 3, 2]]).T, torch.tensor([[0.0, 0, 1, 0, 0]]).T
    cont = 1 - last if terminal else torch.ones_like(last)
    close(lambda_return(REWARD, boot, (1 - 1 / 333) * cont, 0.95 * (1 - last))[:, 0], expected)


def test_percentiles_and_range():
    """Linear interpolation; the range follows from zeros at a hundredth per update and is used at once."""
    x = torch.arange(100.0).flip(0) ** 1.5
    low, high = dreamer_v3.percentile(x, 0.05), dreamer_v3.percentile(x.view(4, 25), 0.95)
    close([low, high], [11.0213229, 912.0928957])
    close([low, high], np.percentile(x.numpy(), [5, 95]))
    assert dreamer_v3.percentile(x, 1.0) == 99**1.5 and dreamer_v3.percentile(x, 0.0) == 0
    bounds, limits = torch.zeros(2), torch.stack([low, high])
    bounds.lerp_(limits, dreamer_v3.RANGE_RATE)
    close(bounds[1] - bounds[0], 9.0107157)
    for _ in range(99):
        bounds.lerp_(limits, dreamer_v3.RANGE_RATE)
    close(bounds[1] - bounds[0], 571.2502353, 1e-5)


@pytest.mark.parametrize("obs_space", [VECTOR, IMAGE], ids=["vector", "image"])
def test_model_losses_against_plain_ones(float64, obs_space):
    """Sums over pixels and latents, means over batch and time, two KL scales, soft continuation targets."""
    args = tiny_args(gamma=0.9, free_nats=10.0)
    agent, batch, noise = setup(args, obs_space)
    model, obs = agent.world_model, dreamer_v3.preprocess(batch["obs"])
    embed = model.encoder(obs.flatten(0, 1)).unflatten(0, (5, 3))
    start = F.one_hot(batch["stoch"].long(), 3).flatten(-2).double(), batch["deter"]
    stoch, deter, probs = filter_sequence(model.rssm, *start, batch["action"], embed, batch["is_first"], noise["post"])
    feat = torch.cat([stoch, deter], -1)
    losses = {name: 0 for name in ("dyn", "rep", "image", "reward", "cont")}
    kls, halves = [], {"dyn": 0, "rep": 0}
    for t in range(5):
        for b in range(3):
            both = probs[t, b], latent(plain(model.rssm.prior_net, deter[t, b]), noise["post"][t, b])[1]
            post, prior = (td.Categorical(probs=p) for p in both)
            kls.append(td.kl_divergence(post, prior).sum())
            still = [td.Categorical(probs=p.detach()) for p in both]
            for half, pair in (("dyn", (still[0], prior)), ("rep", (post, still[1]))):
                halves[half] += max(td.kl_divergence(*pair).sum(), torch.tensor(10.0)) / 15
            recon = model.decoder(feat[t, b : b + 1])[0]
            losses["image"] += ((recon - obs[t, b]) ** 2).sum() / 15
            logits = plain(model.reward.net, feat[t, b])
            losses["reward"] -= (
                two_hot(model.reward.bins, batch["reward"][t, b].item()) * logits.log_softmax(-1)
            ).sum() / 15
            prob = torch.sigmoid(plain(model.cont, feat[t, b])[0])
            target = 0.9 if batch["cont"][t, b] == 1 else 0.0
            losses["cont"] -= (target * prob.log() + (1 - target) * (1 - prob).log()) / 15
    assert min(kls) < 10 < max(kls)
    losses["dyn"] = losses["rep"] = sum(max(kl, torch.tensor(10.0)) for kl in kls) / 15
    found, states, metrics = dreamer_v3.model_loss(model, batch, noise["post"], args)
    assert found.keys() == losses.keys()
    for name, value in losses.items():
        torch.testing.assert_close(found[name], value)
    torch.testing.assert_close(torch.cat(states, -1), feat)
    torch.testing.assert_close(metrics["model/kl"], sum(kls) / 15)
    for name, half in halves.items():  # the one moves the prior towards the posterior, the other the posterior
        nets = [*model.rssm.prior_net.parameters(), *model.rssm.post_net.parameters()]
        moved, expected = (
            torch.autograd.grad(x, nets, retain_graph=True, allow_unused=True) for x in (found[name], half)
        )
        for ours, plainly in zip(moved, expected, strict=True):
            torch.testing.assert_close(*(torch.zeros(1) if g is None else g for g in (ours, plainly)))
        assert (moved[0] is not None) == (name == "dyn") and moved[-1].any()


def reference_behavior(agent, batch, feats, actions, replayed, args) -> dict:
    """Actor, critic and replayed-value loss of one sequence after another, with detach() where nothing may pass."""
    model, critic, slow = agent.world_model, agent.critic, agent.slow_critic
    horizon, number = len(actions), feats.shape[1]

    def mean(head, feat):
        return (plain(head.net, feat).softmax(-1) * head.bins.double()).sum().item()

    def ce(feat, y):
        return -(two_hot(critic.bins, y) * plain(critic.net, feat).log_softmax(-1)).sum()

    returns = np.zeros((horizon, number))
    values, rewards, conts, weights = (np.zeros((horizon + 1, number)) for _ in range(4))
    for n in range(number):
        for k in range(horizon + 1):
            values[k, n], rewards[k, n] = mean(critic, feats[k, n]), mean(model.reward, feats[k, n])
            conts[k, n] = torch.sigmoid(plain(model.cont, feats[k, n])[0]).item()
            weights[k, n] = conts[: k + 1, n].prod()
        last = values[horizon, n]
        for k in reversed(range(horizon)):
            last = rewards[k + 1, n] + conts[k + 1, n] * (
                (1 - args.td_lambda) * values[k + 1, n] + args.td_lambda * last
            )
            returns[k, n] = last
    spread = 0.01 * (np.percentile(returns, 95) - np.percentile(returns, 5))
    losses = {"actor": 0, "critic": 0, "replay_value": 0}
    for n in range(number):
        for k in range(horizon):
            share, feat = weights[k, n] / number / horizon, feats[k, n]
            if agent.discrete:
                policy = td.Categorical(logits=plain(agent.actor.net, feat))
                log_prob, entropy = policy.log_prob(actions[k, n].argmax()), policy.entropy()
            else:
                m, s = plain(agent.actor.net, feat).chunk(2)
                policy = td.Normal(torch.tanh(m), 0.9 * torch.sigmoid(s + 2) + 0.1)
                log_prob, entropy = policy.log_prob(actions[k, n]).sum(), policy.entropy().sum()
            advantage = (returns[k, n] - values[k, n]) / max(1, spread)
            losses["actor"] -= share * (log_prob * advantage + args.entropy_scale * entropy)
            losses["critic"] += share * (ce(feat, returns[k, n]) + ce(feat, mean(slow, feat)))
    steps, size = replayed.shape[:2]
    boot = returns[0].reshape(steps, size)
    for b in range(size):
        ended = [t + 1 < steps and batch["is_first"][t + 1, b].item() == 1 for t in range(steps)]
        last = boot[-1, b]
        for t in reversed(range(steps - 1)):
            live, mix = args.gamma * batch["cont"][t + 1, b].item(), 0 if ended[t + 1] else args.td_lambda
            last = batch["reward"][t + 1, b].item() + live * ((1 - mix) * boot[t + 1, b] + mix * last)
            if not ended[t]:
                feat = replayed[t, b]
                loss = ce(feat, last) + ce(feat, mean(slow, feat.detach()))
                losses["replay_value"] += loss / size / (steps - 1)
    return losses


@pytest.mark.parametrize("action_space", [BOX, DISCRETE], ids=["continuous", "discrete"])
@pytest.mark.parametrize("imag_last", [0, 3])
def test_behavior_losses_and_gradients_against_a_plain_reference(float64, imag_last, action_space):
    """Every loss of one update, its sum, and the sum's gradient for every parameter."""
    args = tiny_args(td_lambda=0.8, gamma=0.9, imag_last=imag_last, horizon=3, entropy_scale=0.1, batch_size=2)
    agent, batch, noise = setup(args, action_space=action_space)
    with torch.no_grad():  # predictions of a few units, so that the spread of returns matters
        for head in (agent.critic, agent.slow_critic, agent.world_model.reward):
            head.net[-1].weight *= 10
            head.bins[:] = torch.linspace(-2000, 2000, 255)
    total, states, metrics = dreamer_v3.compute_losses(agent, batch, noise, args)
    ours = torch.autograd.grad(total, LaProp(agent, args).learned)
    model_losses, states, _ = dreamer_v3.model_loss(agent.world_model, batch, noise["post"], args)
    stoch, deter = (state[-imag_last:].detach().flatten(0, 1) for state in states)
    feats, actions = dreamer_v3.imagine(agent.world_model.rssm, agent.actor, stoch, deter, noise)
    kept = {name: batch[name][-imag_last:] for name in ("reward", "cont", "is_first")}
    replayed = torch.cat(states, -1)[-imag_last:]
    expected = model_losses | reference_behavior(agent, kept, feats, actions, replayed, args)
    for name, value in expected.items():
        close(metrics[f"losses/{name}_loss"], value.detach(), 1e-9)
    scales = {"dyn": 1, "rep": 0.1, "image": 1, "reward": 1, "cont": 1, "actor": 1, "critic": 1, "replay_value": 0.3}
    whole = sum(scales[name] * loss for name, loss in expected.items())
    torch.testing.assert_close(total, whole)
    assert metrics["model/return_range"] > 1
    for gradient, reference in zip(ours, torch.autograd.grad(whole, LaProp(agent, args).learned), strict=True):
        torch.testing.assert_close(gradient, reference)


def test_dreams_follow_the_prior_and_the_actor(float64):
    """(H+1, N, F): the start, then the prior's step under the action drawn there; nothing of it has a gradient."""
    args = tiny_args()
    agent, _, noise = setup(args)
    rssm, stoch, deter = agent.world_model.rssm, F.one_hot(torch.arange(15) % 96, 96).double(), torch.randn(15, 16)
    feats, actions = dreamer_v3.imagine(rssm, agent.actor, stoch, deter, noise)
    assert feats.shape == (5, 15, 112) and actions.shape == (4, 15, 2) and not feats.requires_grad
    torch.testing.assert_close(feats[0], torch.cat([stoch, deter], -1))
    for k in range(4):
        mean, std = agent.actor.dist(feats[k])
        torch.testing.assert_close(actions[k], mean + std * noise["action"][k])
        for n in (0, 7):
            z, h = feats[k, n].split([96, 16])
            h = gru(rssm, z, h, actions[k, n])
            z = latent(plain(rssm.prior_net, h), noise["prior"][k, n])[0]
            torch.testing.assert_close(feats[k + 1, n], torch.cat([z, h]))


# === Who is moved by what ===

PARTS = {"encoder": "encoder", "rssm": "rssm", "decoder": "decoder", "reward": "reward", "cont": "cont"}


@pytest.mark.parametrize("obs_space", [VECTOR, IMAGE], ids=["vector", "image"])
def test_losses_reach_what_they_should(obs_space):
    """The actor's and the dreamt value's loss stop at their networks; the replayed value's reaches the encoder."""
    args = tiny_args(free_nats=0.0)
    agent, batch, noise = setup(args, obs_space)
    losses, states, _ = dreamer_v3.model_loss(agent.world_model, batch, noise["post"], args)
    stoch, deter = (state.detach().flatten(0, 1) for state in states)
    dreams = dreamer_v3.imagine(agent.world_model.rssm, agent.actor, stoch, deter, noise)
    losses |= dreamer_v3.behavior_loss(agent, batch, states, dreams, args)[0]
    named, reached = dict(agent.named_parameters()), {}
    for name, loss in losses.items():
        learned = [param for param in named.values() if param.requires_grad]
        names = [n for n, param in named.items() if param.requires_grad]
        gradients = torch.autograd.grad(loss, learned, retain_graph=True, allow_unused=True)
        moved = [n for n, g in zip(names, gradients, strict=True) if g is not None and g.any()]
        reached[name] = {n.removeprefix("world_model.").split(".")[0] for n in moved}
    expected = {name: {"encoder", "rssm", part} for name, part in (("image", "decoder"), ("reward", "reward"))}
    expected |= {"cont": {"encoder", "rssm", "cont"}, "dyn": {"encoder", "rssm"}, "rep": {"encoder", "rssm"}}
    expected |= {"actor": {"actor"}, "critic": {"critic"}, "replay_value": {"encoder", "rssm", "critic"}}
    assert reached == expected
    assert not any(param.requires_grad for param in agent.slow_critic.parameters())


def test_terminal_starts_weigh_next_to_nothing(float64):
    """The start's own continuation is part of its weight."""
    args = tiny_args()
    agent, batch, noise = setup(args)
    for bias in (0.0, -30.0):
        torch.nn.init.zeros_(agent.world_model.cont[-1].weight)
        torch.nn.init.constant_(agent.world_model.cont[-1].bias, bias)
        metrics = dreamer_v3.compute_losses(agent, batch, noise, args)[2]
        assert (abs(metrics["losses/actor_loss"]) + metrics["losses/critic_loss"] < 1e-9) == (bias < 0)


# === Optimizer ===


def one_parameter(value, **settings) -> tuple:
    """A network of one tensor and its optimizer."""
    net = nn.Module()
    net.w = nn.Parameter(torch.tensor(value))
    return net, LaProp(net, tiny_args(**settings))


@pytest.mark.parametrize(
    ("weight", "clipped"), [([3.0, 4.0], [0.9, 1.2]), ([0.0, 0.0], [1.8e-4, 2.4e-4]), ([300.0, 400.0], [6.0, 8.0])]
)
def test_adaptive_clipping_of_the_table(weight, clipped):
    """0.3 of the tensor's norm, which counts as at least 1e-3; a smaller gradient stays as it is."""
    net, optimizer = one_parameter(weight)
    norm = optimizer.step((torch.tensor([6.0, 8.0]),))
    close(optimizer.square.sqrt() / math.sqrt(0.001), clipped, 1e-5)
    assert norm.item() == pytest.approx(10)


def test_laprop_of_the_table():
    """Four gradients, warm-up included: the first moves nothing."""
    net, optimizer = one_parameter([1000.0], learning_rate=4e-5, warmup=1000)
    net.w.data = net.w.data.double()
    for name in ("momentum", "square", "count"):
        setattr(optimizer, name, getattr(optimizer, name).double())
    moved = []
    for gradient in (0.1, -0.02, 0.05, 0.05):
        optimizer.step((torch.tensor([gradient]).double(),))
        moved.append(net.w.item() - 1000)
    close(np.array(moved) * 1e8, [0, -1.3107070, -5.2163658, -12.184069], 1e-4)
    net, optimizer = one_parameter([1.0])
    optimizer.step((torch.tensor([1e-12]),))
    close(optimizer.momentum, [0.1])  # of u = 1: epsilon is 1e-20


def test_laprop_against_a_hand_loop(float64):
    """Twelve steps of three tensors, the last a matrix in channels-last order, each clipped by its own norms."""
    gen, net = torch.Generator().manual_seed(0), nn.Module()
    shapes = (4,), (3, 2), (2, 3, 2, 2)
    for i, shape in enumerate(shapes):
        tensor = torch.randn(shape, generator=gen) * (0 if i == 1 else 1)
        net.register_parameter(f"p{i}", nn.Parameter(tensor))
    net.p2.data = net.p2.data.to(memory_format=torch.channels_last)
    net.fixed = nn.Parameter(torch.ones(2), requires_grad=False)
    optimizer = LaProp(net, tiny_args(learning_rate=0.01, warmup=5, agc=0.3))
    plainly = [p.detach().clone().numpy() for p in (net.p0, net.p1, net.p2)]
    m, v = [[np.zeros(shape) for shape in shapes] for _ in range(2)]
    for t in range(1, 13):
        gradients = tuple(torch.randn(shape, generator=gen) * 10 ** (t % 4 - 2) for shape in shapes)
        optimizer.step(gradients)
        for i, g in enumerate(x.numpy() for x in gradients):
            w = plainly[i]
            g = g / max(1, np.linalg.norm(g) / (0.3 * max(1e-3, np.linalg.norm(w))))
            v[i] = 0.999 * v[i] + 0.001 * g**2
            m[i] = 0.9 * m[i] + 0.1 * g / (np.sqrt(v[i] / (1 - 0.999**t)) + 1e-20)
            plainly[i] = w - 0.01 * min((t - 1) / 5, 1) * m[i] / (1 - 0.9**t)
    for ours, reference in zip((net.p0, net.p1, net.p2), plainly, strict=True):
        close(ours, reference, 1e-9)
    assert net.fixed.sum() == 2


def test_first_update_moves_nothing_and_the_second_everything():
    """But for the range of returns; the slow critic follows by a fiftieth."""
    args = tiny_args(learning_rate=1e-3, free_nats=0.0)
    agent, batch, noise = setup(args, IMAGE)
    optimizer = LaProp(agent, args)
    before = {name: tensor.clone() for name, tensor in agent.state_dict().items()}
    slow = {name: tensor for name, tensor in before.items() if name.startswith("slow")}
    for name, tensor in slow.items():
        tensor.copy_(before[name.removeprefix("slow_")] + 1)
    agent.load_state_dict(before)
    dreamer_v3.update(agent, optimizer, batch, noise, args)
    for name, tensor in agent.state_dict().items():
        assert torch.equal(tensor, before[name]) or name == "return_range" or name in slow, name
    dreamer_v3.update(agent, optimizer, batch, noise, args)
    after = agent.state_dict()
    assert not [name for name, tensor in after.items() if torch.equal(tensor, before[name])]
    for name, tensor in slow.items():
        online = before[name.removeprefix("slow_")], after[name.removeprefix("slow_")]
        expected = tensor
        for new in online:
            expected = 0.98 * expected + 0.02 * new
        torch.testing.assert_close(after[name], expected, rtol=1e-5, atol=1e-6)


# === One update ===


def test_update_leaves_its_inputs_alone():
    """Neither the batch nor the noise is changed; metrics carry no graph; latents are class numbers and deter."""
    args = tiny_args()
    agent, batch, noise = setup(args, IMAGE)
    copies = {k: v.clone() for k, v in (batch | noise).items()}
    metrics, latents = dreamer_v3.update(agent, LaProp(agent, args), batch, noise, args)
    assert all(torch.equal(v, copies[k]) for k, v in (batch | noise).items())
    assert all(v.shape == () and not v.requires_grad for v in metrics.values())
    _, (stoch, deter), _ = dreamer_v3.model_loss(agent.world_model, batch, noise["post"], args)
    assert torch.equal(F.one_hot(latents["stoch"].long(), 3).float().flatten(-2), stoch)
    assert torch.equal(latents["deter"], deter) and latents["stoch"].dtype == torch.uint8


def test_update_noise_shapes_and_seed():
    """Uniform (T, B, STOCH), (H, N, STOCH), Normal (H, N, A): new each time, the same again from the same seed."""
    args = tiny_args(imag_last=2)
    agent = make_agent(args)
    gen = torch.Generator().manual_seed(3)
    first, second = dreamer_v3.draw_noise(agent, args, gen), dreamer_v3.draw_noise(agent, args, gen)
    shapes = {name: tuple(noise.shape) for name, noise in first.items()}
    assert shapes == {"post": (5, 3, STOCH), "prior": (4, 6, STOCH), "action": (4, 6, 2)}
    assert 0 <= first["post"].min() and first["post"].max() < 1 and first["action"].min() < 0
    again = make_noise(agent, args, seed=3)
    assert all(torch.equal(again[name], first[name]) and not torch.equal(second[name], first[name]) for name in first)


@pytest.mark.parametrize("action_space", [BOX, DISCRETE], ids=["continuous", "discrete"])
def test_updates_never_wait_for_a_tensor(action_space):
    """No host sync: forward and backward run on tensors without content, which refuse item() and branches."""
    args = tiny_args(batch_length=3, horizon=2)
    agent, batch, noise = setup(args, IMAGE, action_space)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        batch, noise = ({k: mode.from_tensor(v) for k, v in x.items()} for x in (batch, noise))
        with pytest.raises(DataDependentOutputException):
            bool(batch["reward"].sum() > 0)
        total, _, metrics = dreamer_v3.compute_losses(agent, batch, noise, args)
        torch.autograd.grad(total, LaProp(agent, args).learned)
    assert all(isinstance(value, FakeTensor) for value in metrics.values())


def updated(obs_space, action_space=BOX, device: str = "cpu", updates: int = 2, **flags) -> tuple[dict, dict]:
    """Metrics of the last and weights after some updates with flags."""
    args = tiny_args(**{"batch_length": 4, "horizon": 2, "learning_rate": 1e-3, "warmup": 1} | flags)
    agent = make_agent(args, obs_space, action_space).to(device)
    update_fn = dreamer_v3.make_update(agent, LaProp(agent, args), args)
    for i in range(updates):
        batch, noise = make_batch(agent, args, obs_space, seed=i), make_noise(agent, args, seed=i)
        metrics, latents = update_fn(*({k: v.to(device) for k, v in x.items()} for x in (batch, noise)))
    metrics = {name: value.cpu() for name, value in (metrics | latents).items()}
    return metrics, {n: p.detach().cpu() for n, p in agent.named_parameters()}


def assert_same_update(fast: tuple, eager: tuple, tolerance: float) -> None:
    """Metrics, latents and weights agree, name by name."""
    for ours, plainly in zip(fast, eager, strict=True):
        assert ours.keys() == plainly.keys()
        for name in plainly:
            torch.testing.assert_close(ours[name], plainly[name], rtol=tolerance, atol=tolerance / 10)


def test_bfloat16_update_is_close_to_float32():
    """Losses within 2 %, weights, metrics and what is carried on from step to step still float32."""
    metrics, weights = updated(IMAGE, updates=1)
    low_metrics, low_weights = updated(IMAGE, updates=1, bfloat16=True)
    for name in ("image", "reward", "cont", "dyn", "replay_value", "critic"):
        assert low_metrics[f"losses/{name}_loss"].item() == pytest.approx(
            metrics[f"losses/{name}_loss"].item(), rel=0.02
        )
    assert low_metrics["deter"].dtype == torch.float32
    assert low_metrics["grad_norm/all"].item() == pytest.approx(metrics["grad_norm/all"].item(), rel=0.05)
    assert all(x.dtype == torch.float32 for x in low_weights.values())


def test_compiled_losses_are_one_graph_each(monkeypatch):
    """Each is traced without a break; together they give the eager update (traced, not yet made into code)."""
    eager = updated(VECTOR, batch_length=3)
    compiled, compile = [], torch.compile

    def traced(function):
        compiled.append(function)
        return compile(function, backend="eager", fullgraph=True)

    monkeypatch.setattr(torch, "compile", traced)
    torch._dynamo.reset()
    assert_same_update(updated(VECTOR, batch_length=3, compile=True), eager, 1e-4)
    assert compiled == list(dreamer_v3.LOSSES)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs g++, which is not installed.")
@pytest.mark.parametrize("obs_space", [VECTOR, IMAGE], ids=["vector", "image"])
def test_compiled_update_equals_eager(obs_space):
    """Losses and weights after two updates through generated code, to rounding."""
    torch._dynamo.reset()
    assert_same_update(updated(obs_space, compile=True), updated(obs_space), 1e-3)


def test_what_a_graph_is_given_are_the_tensors_of_batch_and_noise(monkeypatch):
    """With a stand-in that calls its function each time: the same losses and weights, bit for bit."""
    monkeypatch.setattr(dreamer_v3, "GraphedFunction", lambda function: lambda *tensors: function(*tensors))
    assert_same_update(updated(VECTOR, updates=3, cudagraphs=True), updated(VECTOR, updates=3), 0.0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU, and there is none on this machine.")
@pytest.mark.parametrize("compile", [False, True])
def test_cuda_graph_updates_equal_eager(compile, monkeypatch):
    """Six updates on six batches, the last three replayed from the graph: same losses and weights."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    eager = updated(IMAGE, device="cuda", updates=6)
    assert_same_update(updated(IMAGE, device="cuda", updates=6, cudagraphs=True, compile=compile), eager, 1e-2)


# === Replay ===


def replay(num_envs: int = 1, **settings) -> ReplayBuffer:
    """Observations of two numbers, windows of 5 + 1."""
    args = tiny_args(num_envs=num_envs, **settings)
    space = gym.spaces.Box(-np.inf, np.inf, (2,), np.float32)
    return ReplayBuffer(args, space, types.SimpleNamespace(action_dim=2), CPU)


def fill(buffer: ReplayBuffer, rows: list[int], episodes: int = 7) -> None:
    """The next entry of some environments: every field says which environment and which entry it is."""
    rows, index = np.array(rows), buffer.end[rows].astype(np.float32)
    pair = np.stack([rows, index], -1).astype(np.float32)
    buffer.add(
        rows, obs=pair, action=pair + 0.5, reward=1000.0 * rows + index, cont=index % 2, is_first=index % episodes == 0,
        stoch=torch.from_numpy(index).long()[:, None].expand(-1, STOCH) % 3,
        deter=torch.from_numpy(pair[:, 1:]).expand(-1, 16),
    )  # fmt: skip


def test_windows_are_contiguous_aligned_and_uniform():
    """Two environments of different pace in wrapped rings: every field of an entry, every window equally often."""
    buffer = replay(2, buffer_size=40)
    for i in range(60):
        fill(buffer, [0, 1] if i % 3 else [1])
    assert buffer.end.tolist() == [40, 60] and buffer.windows().tolist() == [15, 15] and len(buffer) == 30
    buffer.fresh.clear()
    batch, slots = buffer.sample(30_000, np.random.default_rng(0), CPU)
    assert {name: tuple(tensor.shape) for name, tensor in batch.items()} == {
        "obs": (5, 30_000, 2), "action": (5, 30_000, 2), "reward": (5, 30_000), "cont": (5, 30_000),
        "is_first": (5, 30_000), "stoch": (30_000, STOCH), "deter": (30_000, 16),
    }  # fmt: skip
    env, index = batch["obs"].unbind(-1)
    assert torch.equal(batch["action"], batch["obs"] + 0.5) and torch.equal(batch["reward"], 1000 * env + index)
    assert torch.equal(batch["cont"], index % 2) and torch.equal(batch["is_first"], (index % 7 == 0).float())
    assert torch.equal(index[1:], index[:-1] + 1) and torch.equal(env[1:], env[:-1])
    assert torch.equal(batch["deter"][:, 3], index[0] - 1)  # of the entry before
    assert torch.equal(batch["stoch"][:, 9].float(), (index[0] - 1) % 3)
    assert torch.equal(slots, (env * 20 + index % 20).long())
    starts = Tally(zip(env[0].tolist(), index[0].tolist(), strict=True))
    assert set(starts) == {(0, i) for i in range(21, 36)} | {(1, i) for i in range(41, 56)}
    assert min(starts.values()) > 850 and max(starts.values()) < 1150


def test_every_entry_is_drawn_once_soon_after_it_was_stored():
    """Windows that do not overlap, in order, before any at random; those that were overwritten are forgotten."""
    buffer, rng = replay(2, buffer_size=60), np.random.default_rng(0)
    for _ in range(13):
        fill(buffer, [0, 1])
    batch, _ = buffer.sample(3, rng, CPU)
    assert batch["obs"][0].tolist() == [[0, 1], [1, 1], [0, 7]]  # entries 0 and 6 give the latent state
    batch, _ = buffer.sample(2, rng, CPU)
    assert batch["obs"][0, 0].tolist() == [1, 7] and not buffer.fresh
    for _ in range(60):
        fill(buffer, [0])
    assert len(buffer.fresh) == 10
    batch, _ = buffer.sample(4, rng, CPU)
    assert batch["obs"][0].tolist() == [[0, 49], [0, 55], [0, 61], [0, 67]]  # of 73 entries the last 30 are there


def test_drawn_latents_are_replaced():
    """Those of the entries that were learned from, and no others; what was drawn shares no memory."""
    buffer = replay()
    for _ in range(12):
        fill(buffer, [0])
    before = {name: tensor.clone() for name, tensor in buffer.data.items()}
    batch, slots = buffer.sample(1, np.random.default_rng(0), CPU)
    for tensor in batch.values():
        tensor += 5
    assert all(torch.equal(buffer.data[name], tensor) for name, tensor in before.items())
    buffer.refresh(
        slots, {"stoch": torch.full((5, 1, STOCH), 2, dtype=torch.uint8), "deter": torch.full((5, 1, 16), 9.0)}
    )
    assert slots[:, 0].tolist() == [1, 2, 3, 4, 5]
    assert (buffer.data["deter"][1:6] == 9).all() and (buffer.data["stoch"][1:6] == 2).all()
    rest = [0, *range(6, 200)]
    assert torch.equal(buffer.data["deter"][rest], before["deter"][rest])


@pytest.mark.parametrize("steps", [9, 50])
def test_replay_state_round_trip(tmp_path, steps):
    """Saved and loaded, partly filled or wrapped, fresh windows kept: the same samples now and after more data."""
    buffer, restored = replay(2, buffer_size=40), replay(2, buffer_size=40)
    for _ in range(steps):
        fill(buffer, [0, 1])
    torch.save(buffer.state_dict(), tmp_path / "replay.pt")
    restored.load_state_dict(torch.load(tmp_path / "replay.pt", weights_only=True))
    rngs = np.random.default_rng(5), np.random.default_rng(5)
    for _ in range(4):
        drawn = [b.sample(3, rng, CPU)[0] for b, rng in zip((buffer, restored), rngs, strict=True)]
        assert all(torch.equal(drawn[0][name], drawn[1][name]) for name in drawn[0])
        for b in (buffer, restored):
            fill(b, [1])
    assert (tmp_path / "replay.pt").stat().st_size < 60_000


@pytest.mark.parametrize(("num_envs", "steps", "copied"), [(1, 9, False), (2, 50, False), (2, 9, True)])
def test_a_checkpoint_copies_no_replay(num_envs, steps, copied):
    """One ring, or several that are full, are written from where they lie; and never more than what is filled."""
    buffer = replay(num_envs, buffer_size=40)
    for _ in range(steps):
        fill(buffer, list(range(num_envs)))
    for name, saved in buffer.state_dict()["data"].items():
        assert (saved.data_ptr() != buffer.data[name].data_ptr()) == copied, name
        assert saved.untyped_storage().nbytes() == saved.nbytes, name


def test_images_are_stored_as_bytes_and_latents_as_class_numbers():
    """12,288 + 32 bytes per step, deter and a few floats."""
    args = tiny_args(buffer_size=20)
    buffer = ReplayBuffer(args, IMAGE, types.SimpleNamespace(action_dim=6), CPU)
    assert buffer.nbytes == 20 * (12_288 + 32 + 4 * (16 + 6 + 3))
    images = np.random.default_rng(0).integers(256, size=(7, 64, 64, 3), dtype=np.uint8)
    for image in images:
        rest = {"action": np.zeros((1, 6)), "reward": [0.0], "cont": [1.0], "is_first": [0.0]}
        latents = {"stoch": torch.full((1, STOCH), 2), "deter": torch.zeros(1, 16)}
        buffer.add(np.array([0]), obs=image[None], **rest, **latents)
    batch, _ = buffer.sample(1, np.random.default_rng(0), CPU)
    assert batch["obs"].dtype == torch.uint8 and np.array_equal(batch["obs"][:, 0], images[1:6])


# === Acting ===


def act_input(agent: dreamer_v3.Agent, num_envs: int) -> tuple:
    """Observations, last actions and states of several environments in mid-episode."""
    rng, gen, rssm = np.random.default_rng(0), torch.Generator().manual_seed(4), agent.world_model.rssm
    classes = torch.randint(3, (num_envs, STOCH), generator=gen)
    state = F.one_hot(classes, 3).float().flatten(-2), torch.randn(num_envs, rssm.deter, generator=gen)
    obs = rng.standard_normal((num_envs, 5)).astype(np.float32)
    return obs, rng.standard_normal((num_envs, agent.action_dim)).astype(np.float32), state


@pytest.mark.parametrize("action_space", [BOX, DISCRETE], ids=["continuous", "discrete"])
def test_act_filters_as_training_does(action_space, monkeypatch):
    """Step by step it reaches the states that observe() finds under the same noise, and samples the policy there."""
    args = tiny_args()
    agent, batch, noise = setup(args, action_space=action_space)
    embed = agent.world_model.embed(dreamer_v3.preprocess(batch["obs"]))
    state = agent.world_model.rssm.initial(3)
    expected = agent.world_model.rssm.observe(*state, batch["action"], embed, batch["is_first"], noise["post"])
    fixed = torch.tensor([0.1, 0.6, 0.95]) if agent.discrete else torch.randn(3, 2)
    monkeypatch.setattr(agent.actor, "draw_noise", lambda shape, generator: fixed)
    for t in range(5):
        monkeypatch.setattr(torch, "rand", lambda *shape, t=t, **kwargs: noise["post"][t])
        obs, action, is_first = (batch[k][t].numpy() for k in ("obs", "action", "is_first"))
        decision, state = dreamer_v3.act(agent, obs, action, is_first, state, torch.Generator())
        torch.testing.assert_close(state[0], expected[0][t], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(state[1], expected[1][t], atol=1e-5, rtol=1e-4)
        policy = agent.actor.dist(torch.cat(state, -1))
        np.testing.assert_allclose(decision, agent.actor.sample(policy, fixed).detach().numpy(), atol=1e-5)


def test_act_forgets_the_state_where_an_episode_begins():
    """With is_first any state does as well as the zero state; without it, it does not."""
    agent = make_agent(tiny_args())
    obs, action, state = act_input(agent, 2)
    zero = agent.world_model.rssm.initial(2)

    def deter(first: int, state: tuple) -> torch.Tensor:
        return dreamer_v3.act(agent, obs, action, [first, first], state, torch.Generator())[1][1]

    torch.testing.assert_close(deter(1, state), deter(1, zero))
    assert (deter(0, state) - deter(0, zero)).abs().max() > 1e-3


def test_what_the_environment_gets():
    """Indices in place of one-hot rows; continuous actions clipped, while they are stored as drawn."""
    agent = make_agent(tiny_args())
    assert dreamer_v3.env_action(agent, np.array([[-3.0, 0.5], [1.5, -0.2]])).tolist() == [[-1, 0.5], [1, -0.2]]
    agent = make_agent(tiny_args(), action_space=DISCRETE)
    assert dreamer_v3.env_action(agent, np.eye(3)[[2, 0]]).tolist() == [2, 0]


@pytest.mark.parametrize("shape", [(48, 60), (64, 64, 4)], ids=["grey", "stacked"])
def test_pictures_of_any_number_of_channels(shape):
    """Resized to 64 x 64, channels last; encoded and decoded with as many."""
    space = gym.spaces.Box(0, 255, shape, np.uint8)
    env = dreamer_v3.fit_spaces(gym.make("fake_envs:DictObservation-v0", observation_space=space), "x")
    channels = 4 if len(shape) == 3 else 1
    assert env.observation_space.shape == (64, 64, channels)
    model = make_agent(tiny_args(), env.observation_space).world_model
    feat = torch.randn(2, 3, STOCH * 3 + 16)
    assert model.decode(feat).shape == (2, 3, channels, 64, 64)
    assert model.embed(model.decode(feat)).shape[:2] == (2, 3)


def test_actions_are_rescaled_where_they_are_bounded():
    """One side open: as it is, moved within the other; integers are rounded; a Discrete may start anywhere."""
    box = gym.spaces.Box(np.array([-2, 0, -np.inf]), np.array([4, np.inf, np.inf]), dtype=np.float64)
    make = functools.partial(gym.make, "fake_envs:DictObservation-v0", observation_space=VECTOR)
    env = dreamer_v3.fit_spaces(make(action_space=box), "x")
    assert env.func(np.array([0.5, -0.5, -7], np.float32)).tolist() == [2.5, 0.5, -7]
    env = dreamer_v3.fit_spaces(make(action_space=gym.spaces.Box(0, 4, (1, 2), np.int64)), "x")
    assert env.func(np.array([-1, 0.4], np.float32)).tolist() == [[0, 3]]
    env = dreamer_v3.fit_spaces(make(action_space=gym.spaces.Discrete(3, start=-1)), "x")
    assert env.action_space == DISCRETE and env.func(2) == 1


def test_evaluations_play_the_same_episodes_however_many_at_once(monkeypatch):
    """Five by one, two and five environments: their seeds, which the environment shows, and their returns.

    The action before an episode's first observation is 0, any other one is one-hot.
    """
    args = dreamer_v3.with_task_defaults(tiny(dreamer_v3, eval_episodes=5))
    stop, seen, act = types.SimpleNamespace(requested=0), [], dreamer_v3.act

    def watched(agent, obs, action, is_first, *rest):
        assert action.sum(1).tolist() == (~is_first).tolist()
        return act(agent, obs, action, is_first, *rest)

    monkeypatch.setattr(dreamer_v3, "act", watched)
    for number in (1, 2, 5):
        envs = dreamer_v3.make_vector_env(args, "none", number)
        agent, reset, shown = make_agent(args, envs.single_observation_space, DISCRETE), envs.reset, set()

        def spy(*, seed, options, reset=reset, shown=shown):
            mask = options["reset_mask"]
            result = reset(seed=seed, options=options)
            shown.update(result[0][mask, 0].tolist())
            return result

        envs.reset = spy
        returns, episode = dreamer_v3.evaluate(agent, envs, args, CPU, stop)
        assert returns.tolist() == [78] * 5 and episode["reward"][:, 0].tolist() == list(range(13))
        seen.append(shown)
    assert seen[0] == seen[2] == seen[1] and len(seen[0]) == 5


@pytest.mark.parametrize(
    ("settings", "words"), [({"buffer_size": 10**9}, "--buffer-size"), ({"batch_size": 10**9}, "--size and sizes")]
)
def test_what_fits_no_memory_is_named(settings, words, capsys):
    """The replay; a batch and its dreams."""
    with pytest.raises(SystemExit):
        dreamer_v3.check_memory(tiny_args(**settings), IMAGE, BOX)
    assert words in capsys.readouterr().err


def test_memory_that_is_asked_for_is_little_less_than_an_update_takes(monkeypatch):
    """Resident megabytes that two updates took, one thread, measured: images, short dreams, vectors, three sizes."""
    monkeypatch.setitem(SIZES, "laptop", Widths(256, 64, 4, 4))
    asked, box = [], gym.spaces.Box(-1, 1, (6,))
    monkeypatch.setattr(dreamer_v3, "require_memory", lambda size, *rest: asked.append(size / 1e6))
    image, vector = gym.spaces.Box(0, 255, (64, 64, 3), np.uint8), gym.spaces.Box(-1, 1, (24,))
    settings = {"cuda": False, "batch_size": 16, "batch_length": 32, "buffer_size": 2000, "size": "1m"}
    for changes, space, measured in (
        ({"size": "laptop"}, image, 792),
        ({"size": "laptop", "horizon": 5}, image, 693),
        ({}, image, 764),
        ({}, vector, 174),
        ({"size": "12m", "batch_size": 4, "batch_length": 16}, image, 376),
    ):
        dreamer_v3.check_memory(Args(**settings | changes), space, box)
        assert 0.75 * measured < asked[-1] < 1.15 * measured, (changes, asked[-1])


def test_memory_is_asked_for_the_copy_of_several_rings(monkeypatch):
    """Which a checkpoint makes as long as they are not full; one ring is written from where it lies."""
    asked = []
    monkeypatch.setattr(dreamer_v3, "require_memory", lambda num_bytes, *rest: asked.append(num_bytes))
    for num_envs, save_buffer in ((1, True), (2, True), (2, False)):
        dreamer_v3.check_memory(tiny_args(num_envs=num_envs, save_buffer=save_buffer, buffer_size=80), IMAGE, BOX)
    one, two, unsaved = asked[::2]
    assert one == unsaved == two / 2


# === Learning ===


@pytest.mark.slow
def test_world_model_overfits_one_batch(monkeypatch):
    """A bright square pushed about by the actions: what each state must tell is where it is."""
    monkeypatch.setitem(SIZES, "laptop", Widths(128, 64, 8, 8))
    args = tiny_args(batch_size=4, batch_length=8, learning_rate=1e-3, horizon=2)
    agent, rng = make_agent(args, IMAGE), np.random.default_rng(0)
    batch = make_batch(agent, args, IMAGE) | {"obs": torch.full((8, 4, 64, 64, 3), 40, dtype=torch.uint8)}
    place = rng.uniform(16, 40, (4, 2))
    for t in range(8):
        place = np.clip(place + 6 * batch["action"][t].numpy(), 0, 52)
        batch["reward"][t] = torch.from_numpy(place[:, 1] / 26 - 1)
        for b, (row, column) in enumerate(place.astype(int)):
            batch["obs"][t, b, row : row + 12, column : column + 12] = torch.tensor([250, 120, 30], dtype=torch.uint8)
    batch["is_first"][1:] = 0
    optimizer, gen = LaProp(agent, args), torch.Generator().manual_seed(0)
    for _ in range(300):
        metrics, _ = dreamer_v3.update(agent, optimizer, batch, dreamer_v3.draw_noise(agent, args, gen), args)
    image = dreamer_v3.preprocess(batch["obs"])
    mean_picture = ((image - image.mean((0, 1))) ** 2).flatten(2).sum(-1).mean().item()
    print(mean_picture, metrics["losses/image_loss"].item(), metrics["losses/reward_loss"].item())
    assert mean_picture > 80 and metrics["losses/image_loss"].item() < 10
    assert metrics["losses/reward_loss"].item() < 1


# === Whole runs ===

WALKER = {"env_id": "walker-walk", "action_repeat": 50, "total_timesteps": 1100, "eval_frequency": 1100}
WALKER |= {"eval_episodes": 1, "checkpoint_frequency": 0, "train_ratio": 12.0}
CLASSIC = {"total_timesteps": 200, "train_ratio": 0.5, "eval_frequency": 200, "eval_episodes": 1}
KINDS = {
    "pixels": {"env_id": "fake_envs:TinyPixels-v0"},
    "discrete pixels": {"env_id": "fake_envs:TinyPixelsDiscrete-v0", "total_timesteps": 72},
    "two environments": TWO_ENVS | {"total_timesteps": 96},
    "last states": {"env_id": "fake_envs:Counter-v0", "imag_last": 3},
    "CartPole": {"env_id": "CartPole-v1", **CLASSIC},
    "Pendulum": {"env_id": "Pendulum-v1", **CLASSIC},
    "walker state": {"obs_mode": "state", **WALKER},
    "walker pixels": {"renderer": "raycast", **WALKER},
}


@pytest.mark.parametrize("kind", KINDS)
def test_runs_log_everything_and_move_all_parameters(kind):
    """Each kind of environment: tags, finite values, growing steps, files in the run folder, trained parameters."""
    settings = {"eval_frequency": 24} | KINDS[kind]
    run_dir = run(dreamer_v3, **settings)
    expected = {"charts/episodic_return", "charts/episodic_length", "charts/SPS", "grad_norm/all", "model/kl"}
    expected |= {"eval/episodic_return", "eval/episodic_return_std", "model/prior_entropy", "model/post_entropy"}
    losses = "image reward cont dyn rep actor critic replay_value".split()
    expected |= {f"losses/{name}_loss" for name in losses} | {"model/actor_entropy", "model/return_range"}
    expected |= {f"model/imag_{name}" for name in ("reward", "value", "return")}
    if kind not in ("discrete pixels", "CartPole"):  # whose episodes may be too short for a prediction
        expected |= {"open_loop/obs_mse_horizon_1", "open_loop/reward_error_horizon_1"}
        pixels = "pixels" in kind
        files = {re.sub(r"\d+", "N", name) for name in os.listdir(run_dir)}
        assert {"open_loop_error_N.png", "returns.png"} <= files and image_tags(run_dir) == set()
        assert ("open_loop_truth_model_error_N.gif" in files) == ("evaluation_N.gif" in files) == pixels
    tags = scalars(run_dir)
    assert expected <= set(tags), expected - set(tags)
    assert_healthy(run_dir)
    state = load(run_dir)
    args, saved = dreamer_v3.with_task_defaults(tiny(dreamer_v3, **settings)), state["parts"]
    assert state["global_step"] == args.total_timesteps and saved["counters"]["num_updates"] > 3
    torch.manual_seed(args.seed)
    envs = dreamer_v3.make_vector_env(args, dreamer_v3.choose_renderer(args, None), 1)
    untrained = dreamer_v3.Agent(envs.single_observation_space, envs.single_action_space, args).state_dict()
    envs.close()
    assert untrained.keys() == saved["agent"].keys()
    assert not [name for name, tensor in untrained.items() if torch.equal(tensor, saved["agent"][name])]


@pytest.mark.parametrize("num_envs", [1, 2])
@pytest.mark.parametrize("repeat", [1, 5])
def test_replay_holds_what_was_played(repeat, num_envs):
    """Episode after episode, first entries without action and reward, last ones with the latents seen there."""
    settings = {"num_envs": num_envs, "action_repeat": repeat, "train_ratio": 0.0, "buffer_size": 400}
    run_dir = run(dreamer_v3, env_id="fake_envs:Counter-v0", **settings, total_timesteps=120 * num_envs)
    replayed = load(run_dir)["parts"]["replay"]
    decisions = -(-12 // repeat)  # of an episode
    assert replayed["end"] == [120 // repeat // decisions * (decisions + 1)] * num_envs
    for i, end in enumerate(replayed["end"]):
        data = {name: tensor[i, :end].numpy() for name, tensor in replayed["data"].items()}
        step = np.arange(end) % (decisions + 1)
        shown = np.minimum(step * repeat, 12)
        assert (data["obs"][:, 1] == shown).all() and (data["is_first"] == (step == 0)).all()
        sums = [sum(range(before + 1, now + 1)) for before, now in zip([0, *shown[:-1]], shown, strict=True)]
        assert data["reward"].tolist() == [0 if t == 0 else total for t, total in zip(step, sums, strict=True)]
        assert not data["action"][step == 0].any() and np.abs(data["action"]).max() > 1  # as drawn, not as clipped
        np.testing.assert_allclose(data["obs"][step > 0, 2], 2 * data["action"][step > 0, 0].clip(-1, 1), atol=1e-5)
        assert data["cont"].all(), "a time limit is not a termination"
        assert (data["deter"][step > 0] != 0).any(1).all()
    assert load(run_dir)["parts"]["counters"] == {"num_updates": 1, "owed": 0.0, "renderer": "none"}


@pytest.mark.parametrize(("env_id", "length"), [("DeadlyCounter-v0", 8), ("BothEndsCounter-v0", 12)])
def test_terminations_are_stored_as_such(env_id, length):
    """cont is 0 on the last entry alone, also where the time limit falls on the same step."""
    data = load(run(dreamer_v3, env_id=f"fake_envs:{env_id}", train_ratio=0.5))["parts"]["replay"]["data"]
    assert data["cont"][0].tolist() == ([1] * length + [0]) * (48 // length)
    assert data["is_first"][0].tolist() == ([1] + [0] * length) * (48 // length)


def test_stored_latents_are_a_recomputation(monkeypatch):
    """The state after an entry is one step of the filter from the state before it, by the entry's own action."""
    monkeypatch.setattr(dreamer_v3, "check_args", lambda args: None)  # which refuses what never learns
    run_dir = run(dreamer_v3, learning_starts=100, total_timesteps=24)
    parts, args = load(run_dir)["parts"], dreamer_v3.with_task_defaults(tiny(dreamer_v3))
    envs = dreamer_v3.make_vector_env(args, "none", 1)
    agent = dreamer_v3.Agent(envs.single_observation_space, envs.single_action_space, args)
    agent.load_state_dict(parts["agent"])
    buffer = ReplayBuffer(args, envs.single_observation_space, agent, CPU)
    buffer.load_state_dict(parts["replay"])
    batch, slots = buffer.sample(40, np.random.default_rng(0), CPU)
    assert batch["is_first"][0].any() and not batch["is_first"][0].all()
    start = F.one_hot(batch["stoch"].long(), 3).float().flatten(-2), batch["deter"]
    embed = agent.world_model.embed(dreamer_v3.preprocess(batch["obs"]))
    noise = torch.rand(40, STOCH)
    step = agent.world_model.rssm.obs_step(*start, batch["action"][0], embed[0], batch["is_first"][0], noise)
    torch.testing.assert_close(step[1], buffer.data["deter"][slots[0]], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("num_envs", [1, 2])
def test_updates_are_owed_per_entry(num_envs):
    """One when learning starts, then train_ratio / (B T) for each entry, whatever the number of environments."""
    settings = {"num_envs": num_envs, "total_timesteps": 96, "train_ratio": 3.0, "learning_starts": 12}
    counters = load(run(dreamer_v3, **settings))["parts"]["counters"]
    entries = 96 // 12 * 13
    first = 18 if num_envs == 1 else 24  # entries until 12 windows of 7 are there
    owed = 1 + (entries - first + num_envs) * 3 / 12
    assert counters["num_updates"] + counters["owed"] == pytest.approx(owed, abs=0.3)
    assert 0 <= counters["owed"] < 1


def test_what_follows_a_resume_in_mid_episode_is_a_new_one():
    """The entry after the last one that was stored begins an episode: the one before it is cut off, not terminated."""
    run_dir = run(dreamer_v3, total_timesteps=30)
    before = load(run_dir)["parts"]["replay"]
    resume(dreamer_v3, run_dir, total_timesteps=60)
    after = load(run_dir)["parts"]["replay"]
    assert before["end"] == [33] and after["end"] == [33 + 33]
    assert after["data"]["is_first"][0, 33] == 1 and after["data"]["cont"].all()
    assert torch.equal(after["data"]["obs"][:, :33], before["data"]["obs"])


def test_an_episode_without_end_is_learned_from_and_cut_off():
    """Entries are learned from as they are played; the flag's limit ends training episodes and evaluations."""
    gym.register("EndlessV3-v0", lambda: gym.make("fake_envs:DiscreteCounter-v0").unwrapped)
    settings = {"env_id": "EndlessV3-v0", "total_timesteps": 60, "eval_frequency": 60, "eval_episodes": 1}
    run_dir = run(dreamer_v3, **settings, max_episode_steps=50)
    assert load(run_dir)["parts"]["counters"]["num_updates"] > 5
    assert scalars(run_dir)["charts/episodic_length"] == [(50, 50.0)]
    assert scalars(run_dir)["eval/episodic_return"] == [(60, sum(range(51)))]


def test_refills_a_replay_that_was_not_saved():
    """The policy plays until learning_starts sequences are there again."""
    run_dir = run(dreamer_v3, save_buffer=False)
    resume(dreamer_v3, run_dir, save_buffer=False, total_timesteps=108)
    steps = [step for step, _ in scalars(run_dir)["losses/critic_loss"]]
    later = [step for step in steps if step > 48]
    assert later and min(later) > 48 + 12 and load(run_dir)["global_step"] == 108


def test_poisoned_parameter_stops_before_anything_is_played_or_saved():
    """A parameter that is not finite is reported, not a simulator's complaint about its actions."""
    run_dir = run(dreamer_v3)
    path = Path(run_dir, "checkpoint.pt")
    state = torch.load(path, weights_only=True)
    state["parts"]["agent"]["actor.net.0.weight"][0, 0] = math.nan
    torch.save(state, path)
    poisoned = path.read_bytes()
    with pytest.raises(SystemExit, match=r"not finite at step \d+: (losses/actor_loss|the policy's action)"):
        resume(dreamer_v3, run_dir, total_timesteps=96)
    assert path.read_bytes() == poisoned


def test_speed_flags_do_not_bind_an_evaluation(monkeypatch, capsys):
    """A run made with CUDA graphs can be played without a GPU."""
    run_dir = run(dreamer_v3)
    state = load(run_dir)
    state["args"] |= {"cudagraphs": True, "bfloat16": True}
    torch.save(state, Path(run_dir, "checkpoint.pt"))
    command_line(monkeypatch, dreamer_v3, "--evaluate", run_dir)
    said = capsys.readouterr().out
    assert "(2 episodes:" in said and f"at step {state['global_step']}, renderer none:" in said


@pytest.mark.parametrize(("seconds", "days"), [(1.0, None), (4.0, "11.6")])
def test_a_run_of_days_is_said_at_its_start(capsys, monkeypatch, seconds, days):
    """The time of one update, measured, times those that are due: 250,000 here. What was measured leaves no trace."""
    args = tiny_args(total_timesteps=1_000_000 if days else 40_000, action_repeat=2, train_ratio=7.5)
    agent = make_agent(args)
    before, clock = {k: v.clone() for k, v in agent.state_dict().items()}, iter([0.0, seconds])
    monkeypatch.setattr(dreamer_v3.time, "perf_counter", lambda: next(clock))
    rb = ReplayBuffer(args, VECTOR, agent, CPU)
    dreamer_v3.warn_if_slow(agent, rb, args, types.SimpleNamespace(args=args, say=print))
    said = capsys.readouterr().out
    assert differences(before, dict(agent.state_dict())) == [] and all(p.grad is None for p in agent.parameters())
    assert (f"about {days} days. CPU-sized: python dreamer_v3.py" in said) if days else said == ""


def test_open_loop_goes_on_from_filtered_states(monkeypatch):
    """From each start, the prior's steps under the actions that were taken; truth and reward of the same entries."""
    args = tiny_args()
    agent, gen = make_agent(args), torch.Generator().manual_seed(0)
    episode = {"obs": torch.randn(12, 1, 5), "action": torch.randn(12, 1, 2), "reward": torch.arange(12.0)[:, None]}
    rssm, noise = agent.world_model.rssm, torch.full((12, 1, STOCH), 0.5)
    monkeypatch.setattr(torch, "rand", lambda *shape, **kwargs: torch.full(shape, 0.5))
    (truth, model), (reward, predicted) = dreamer_v3.open_loop(agent, episode, [3, 6], 4, gen)
    assert truth.shape == model.shape == (4, 2, 5) and reward.T.tolist() == [[4, 5, 6, 7], [7, 8, 9, 10]]
    obs = dreamer_v3.preprocess(episode["obs"])
    stoch, deter, _ = rssm.observe(
        *rssm.initial(1), episode["action"], agent.world_model.embed(obs), torch.zeros(12, 1), noise
    )
    stoch, deter = stoch[6], deter[6]
    for k, t in enumerate((7, 8, 9, 10)):
        stoch, deter = rssm.img_step(stoch, deter, episode["action"][t], noise[0])
        feat = torch.cat([stoch, deter], -1)
        torch.testing.assert_close(model[k, 1:], agent.world_model.decode(feat[None])[0])
        torch.testing.assert_close(truth[k, 1:], obs[t])
        torch.testing.assert_close(predicted[k, 1:], agent.world_model.reward.mean(agent.world_model.reward(feat)))


def test_published_settings():
    """What a user gets without a flag is what the paper's curves of dm_control were made with."""
    wanted = {"size": "12m", "batch_size": 16, "batch_length": 64, "train_ratio": 512, "learning_starts": 1_024}
    wanted |= {"learning_rate": 4e-5, "warmup": 1_000, "agc": 0.3, "horizon": 15, "imag_last": 0, "td_lambda": 0.95}
    wanted |= {"gamma": 1 - 1 / 333, "entropy_scale": 3e-4, "replay_value_scale": 0.3, "action_repeat": 2}
    wanted |= {"free_nats": 1, "dyn_scale": 1, "rep_scale": 0.1, "total_timesteps": 1_000_000}
    args = dreamer_v3.with_task_defaults(Args())
    assert {name: getattr(args, name) for name in wanted} == wanted
    assert dreamer_v3.with_task_defaults(Args(env_id="CarRacing-v3")).action_repeat == 1
    rates = dreamer_v3.SLOW_RATE, dreamer_v3.RANGE_RATE, dreamer_v3.UNIMIX, STOCH, BLOCKS
    assert rates == (0.02, 0.01, 0.01, 32, 8)


def test_names_of_sizes_are_those_of_the_command_line():
    """And every one is larger than the one before."""
    names = ["laptop", "1m", "12m", "25m", "50m", "100m", "200m", "400m"]
    assert set(SIZES) == set(names) == set(Args.__annotations__["size"].__args__)
    assert all(SIZES[a].deter < SIZES[b].deter for a, b in pairwise(names))
