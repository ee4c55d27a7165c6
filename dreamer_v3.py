# /// script
# requires-python = ">=3.11,<3.15"
# dependencies = [
#     "ale-py>=0.12", "box2d>=2.3.10; python_version < '3.14'", "dm_control==1.0.50", "gymnasium>=1.4",
#     "matplotlib>=3.10", "moviepy>=2.2", "mujoco>=3.17,<4", "numpy>=2.1", "opencv-python-headless>=4.11",
#     "pillow>=11", "pygame-ce>=2.5", "tensorboard>=2.20", "torch>=2.6", "tqdm>=4.67", "tyro>=1.0",
# ]
# [tool.uv]  # dm_control asks for labmaze, which it does not need here and which ends with Python 3.12
# override-dependencies = ["labmaze; python_version < '3.13'"]
# ///
"""DreamerV3: a world model with categorical latents; actor and critic learned in its dreams, one recipe for all tasks.

The algorithm, with the functions that are its steps, which main takes in turns:
  act           filter the observation into the latent state (RSSM.obs_step) and sample an action there; observation,
                reward, action before it and latent state go into the replay at once (ReplayBuffer.add)
  update        train_ratio / (B T) times per stored step, on B sequences of T steps that go on from stored latents:
    model_loss  filter the sequences (RSSM.observe); predict observation, reward and continuation from each state; pull
                posterior and prior together by kl_loss, each with a scale of its own, one free nat per state
    imagine     dream: from these states H steps of the prior, the actor choosing the actions
    critic_loss classify the lambda_return of dreamt and of replayed states into exponentially spaced bins
    actor_loss  REINFORCE on the same returns, divided by their percentile range if that exceeds 1
    LaProp      one optimizer for all, gradients clipped adaptively; then the slow critic follows, and the replay takes
                the new latents (ReplayBuffer.refresh)
The first part of the file is the algorithm, up to main; environments, pictures and the run folder follow it.

Paper:      Hafner et al. 2025, Mastering diverse control tasks through world models, Nature 640, arXiv 2301.04104
Reference code: danijar/dreamerv3 (JAX) at e3f0224
Run:        python dreamer_v3.py --env-id walker-walk          (or: uv run dreamer_v3.py --env-id walker-walk)
Resume:     python dreamer_v3.py --resume runs/<run folder>
Evaluate:   python dreamer_v3.py --evaluate runs/<run folder> [--capture-video]
Watch:      tensorboard --logdir runs
Deviations from the reference code, named again at their lines and explained in docs/dreamer_v3.md; where that code and
the paper differ, the code is followed: 1 precision, 2 entries, 3 defaults, 4 capacity, 5 samples, 6 last entries, 7 one
observation, 8 start, 9 equal slots, 10 evaluation, 11 log, 12 Atari, 13 time limit, 14 renderer, 15 overlap,
16 one bound.
"""

import contextlib
import ctypes
import difflib
import fcntl
import functools
import glob
import importlib
import math
import multiprocessing
import multiprocessing.connection
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
import warnings
import zipfile
from collections import deque
from collections.abc import Callable
from copy import copy, deepcopy
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from itertools import pairwise
from typing import Annotated, Literal, NoReturn, get_args, get_origin, get_type_hints

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports below leaves no traceback

import gymnasium as gym
import numpy as np
import torch
import torch._dynamo  # with Triton, which crashes if Mesa's OpenGL is loaded before it; optimizers need it anyway
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import tyro
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

# What a setting may be: its least and its greatest value.
Count = Annotated[int, 1, 10**9]
Natural = Annotated[int, 0, 10**9]
Seed = Annotated[int, 0, 2**53]
Few = Annotated[int, 1, 1024]
Size = Annotated[int, 1, 2**16]
Share = Annotated[float, 0.0, 1.0]
Positive = Annotated[float, 1e-12, 1e9]
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

    # Algorithm specific arguments: the task
    env_id: str = "walker-walk"  # dm_control task (walker-walk, cup-catch) or Gymnasium id (CarRacing-v3)
    total_timesteps: Count = 1_000_000  # environment steps of the run, action repeats counted
    num_envs: Few = 1  # environments played side by side, each in its own process if more than one
    obs_mode: Literal["pixels", "state"] = "pixels"  # what is seen of a dm_control task; a Gymnasium id has its own
    renderer: Literal["auto", "gl", "raycast"] = "auto"  # dm_control pixels: OpenGL, our ray-caster; auto = gl if there
    max_episode_steps: Count | None = None  # most steps of an episode; default the task's limit, or 1,000, Atari 27,000
    action_repeat: Few | None = None  # environment steps per action (rewards summed); default 2 on dm_control, else 1

    # replay, and how often to learn from it
    buffer_size: Count = 500_000  # capacity of the replay buffer in time steps (agent decisions plus one per episode)
    buffer_on_gpu: bool = True  # keep the replay on the training device; --no-buffer-on-gpu keeps it in host memory
    learning_starts: Count = 1_024  # sequences that can be drawn from the replay when learning starts
    train_ratio: Amount = 512.0  # time steps learned from for each time step stored; one update takes B T of them
    batch_size: Count = 16  # sequences per batch (B)
    batch_length: Count = 64  # time steps per sequence (T), after the one whose latent state it goes on from

    # world model
    size: Literal["laptop", "1m", "12m", "25m", "50m", "100m", "200m", "400m"] = "12m"  # of all networks, see SIZES
    free_nats: Amount = 1.0  # nats of KL of each time step that cost nothing
    dyn_scale: Amount = 1.0  # weight of the KL that moves the prior
    rep_scale: Amount = 0.1  # weight of the KL that moves the posterior

    # behavior
    horizon: Few = 15  # imagined decisions (H)
    imag_last: Natural = 0  # dream, and learn replayed values, from the last so many states of each sequence, 0 = all
    gamma: Share = 1 - 1 / 333  # discount per decision, which the continuation head learns
    td_lambda: Share = 0.95  # lambda of the lambda-return: 0 trusts the value after one step, 1 after all H
    entropy_scale: Amount = 3e-4  # weight of the policy's entropy
    replay_value_scale: Amount = 0.3  # weight of the critic's loss on replayed states

    # optimizer
    learning_rate: Positive = 4e-5  # of all networks
    warmup: Count = 1_000  # updates over which the learning rate rises from 0
    agc: Positive = 0.3  # norm to which each tensor's gradient is clipped, in norms of the tensor

    # Speed
    bfloat16: bool = False  # bfloat16 autocast for matrix products and convolutions
    compile: bool = False  # torch.compile the losses
    cudagraphs: bool = False  # replay an update as one CUDA graph (GPU only)


STOCH, BLOCKS, UNIMIX = 32, 8, 0.01  # latents, blocks of the GRU, share of the uniform in every latent's distribution
SLOW_RATE, RANGE_RATE = 0.02, 0.01  # by which the slow critic and the range of the returns follow, per update


# === Networks ===

# Shapes: T time steps, B sequences, H dreamt steps, N states or environments; S = STOCH x classes, D deter,
# F = S + D features, E embedding, A action, U units. Time comes first. Random numbers are drawn elsewhere, handed in.


@dataclass
class Widths:
    deter: int  # units of the GRU
    units: int  # of every other hidden layer
    classes: int  # of each latent
    depth: int  # channels of the convolutions, in multiples


UNITS = {"1m": 64, "12m": 256, "25m": 384, "50m": 512, "100m": 768, "200m": 1024, "400m": 1536}
SIZES = {name: Widths(8 * units, units, units // 16, units // 16) for name, units in UNITS.items()}
SIZES["laptop"] = Widths(256, 64, 4, 4)


class RMSNorm(nn.RMSNorm):
    """x / sqrt(mean of x^2 + 1e-4) times a learned scale, over the last axis, in float32."""

    def __init__(self, units: int):
        super().__init__(units, eps=1e-4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return super().forward(x.float())


class BlockLinear(nn.Module):
    """A linear layer from I to O whose matrix is block-diagonal: BLOCKS blocks, each (I / BLOCKS, O / BLOCKS)."""

    def __init__(self, in_dim: int, out_dim: int):
        super().__init__()
        self.in_features = in_dim  # of all blocks: the fan-in of the initialisation there, too
        self.weight = nn.Parameter(torch.empty(BLOCKS, in_dim // BLOCKS, out_dim // BLOCKS))
        self.bias = nn.Parameter(torch.empty(out_dim))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., BLOCKS, I / BLOCKS) -> (..., O)."""
        return torch.einsum("...gi,gio->...go", x, self.weight).flatten(-2) + self.bias


def hidden(in_dim: int, units: int, layers: int) -> list[nn.Module]:
    """Modules of `layers` hidden layers, each linear, RMSNorm, SiLU."""
    widths = [in_dim] + layers * [units]
    return [module for i, o in pairwise(widths) for module in (nn.Linear(i, o), RMSNorm(o), nn.SiLU())]


def init_weights(module: nn.Module, scale: float = 1.0) -> None:
    """Truncated Normal with standard deviation scale / sqrt(fan-in), zero bias."""
    if isinstance(module, nn.Linear | nn.Conv2d | BlockLinear):
        fan_in = module.weight[0].numel() if isinstance(module, nn.Conv2d) else module.in_features
        nn.init.trunc_normal_(module.weight, 0, 1, -2, 2)
        module.weight.data *= 1.1368 * scale / math.sqrt(fan_in)  # 1.1368 makes up for the truncation
        nn.init.zeros_(module.bias)


class RSSM(nn.Module):
    """Recurrent state-space model, whose state is (stoch, deter), the paper's z and h.

    deter_t = GRU([stoch_t-1, action_t], deter_t-1), where action_t is the one that led to time step t. Then stoch_t,
    STOCH one-hot vectors flattened to (..., S), is drawn from the posterior, given deter_t and the embedded
    observation, or else from the prior, given deter_t.
    """

    def __init__(self, action_dim: int, embed_dim: int, size: Widths):
        super().__init__()
        deter, units, stoch = size.deter, size.units, STOCH * size.classes
        self.deter, self.classes = deter, size.classes
        self.deter_in = nn.Sequential(*hidden(deter, units, 1))
        self.stoch_in = nn.Sequential(*hidden(stoch, units, 1))
        self.action_in = nn.Sequential(*hidden(action_dim, units, 1))
        self.gru_hidden = nn.Sequential(BlockLinear(deter + BLOCKS * 3 * units, deter), RMSNorm(deter), nn.SiLU())
        self.gru_gates = BlockLinear(deter, 3 * deter)
        self.prior_net = nn.Sequential(*hidden(deter, units, 2), nn.Linear(units, stoch))
        self.post_net = nn.Sequential(*hidden(deter + embed_dim, units, 1), nn.Linear(units, stoch))

    def initial(self, batch_size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The zero state: stoch (B, S), deter (B, D)."""
        bias = self.gru_gates.bias
        return bias.new_zeros(batch_size, STOCH * self.classes), bias.new_zeros(batch_size, self.deter)

    def deter_step(self, stoch: torch.Tensor, deter: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
        """The next deter (B, D); float32 under autocast too, for it is carried on from step to step."""
        action = action / action.abs().clamp(min=1)
        x = torch.cat([self.deter_in(deter), self.stoch_in(stoch), self.action_in(action)], -1)
        x = torch.cat([deter.unflatten(-1, (BLOCKS, -1)), x[:, None].expand(-1, BLOCKS, -1)], -1)  # each block sees all
        x = self.gru_hidden(x).unflatten(-1, (BLOCKS, -1))
        gates = self.gru_gates(x).float().unflatten(-1, (BLOCKS, 3, -1))
        reset, cand, update = (gate.flatten(-2) for gate in gates.unbind(-2))
        cand, update = torch.tanh(torch.sigmoid(reset) * cand), torch.sigmoid(update - 1)
        return update * cand + (1 - update) * deter

    def log_probs(self, logits: torch.Tensor) -> torch.Tensor:
        """Outputs of a layer (..., S) -> log-probabilities (..., STOCH, classes), a share of them uniform."""
        probs = logits.float().unflatten(-1, (STOCH, -1)).softmax(-1)
        return torch.log((1 - UNIMIX) * probs + UNIMIX / self.classes)

    def prior(self, deter: torch.Tensor) -> torch.Tensor:
        """Log-probabilities of p(stoch | deter)."""
        return self.log_probs(self.prior_net(deter))

    def posterior(self, deter: torch.Tensor, embed: torch.Tensor) -> torch.Tensor:
        """Log-probabilities of q(stoch | deter, observation)."""
        return self.log_probs(self.post_net(torch.cat([deter, embed], -1)))

    def img_step(self, stoch, deter, action, noise) -> tuple[torch.Tensor, torch.Tensor]:
        """One step without an observation: stoch (B, S), a sample of the prior by uniform noise, and deter (B, D)."""
        deter = self.deter_step(stoch, deter, action)
        return sample_one_hot(self.prior(deter), noise).flatten(-2), deter

    def obs_step(self, stoch, deter, action, embed, is_first, noise) -> tuple[torch.Tensor, ...]:
        """One step with an observation, from the zero state where is_first (B,) is 1: stoch, deter, log_probs."""
        keep = 1 - is_first[:, None]  # action needs none: that of a first entry is 0
        deter = self.deter_step(stoch * keep, deter * keep, action)
        post = self.posterior(deter, embed)
        return sample_one_hot(post, noise).flatten(-2), deter, post

    def observe(self, stoch, deter, action, embed, is_first, noise) -> tuple[torch.Tensor, ...]:
        """Posterior states along sequences (T, B, ...) that go on from a state (B, ...): stoch, deter, log_probs."""
        steps = []
        for t in range(len(action)):
            stoch, deter, post = self.obs_step(stoch, deter, action[t], embed[t], is_first[t], noise[t])
            steps.append((stoch, deter, post))
        return tuple(torch.stack(tensors) for tensors in zip(*steps, strict=True))


def sample_one_hot(log_probs: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """One-hot samples (..., C) by uniform noise (...), with the gradient of the probabilities (straight-through)."""
    probs = log_probs.exp()
    index = (probs.cumsum(-1)[..., :-1] < noise[..., None]).sum(-1)  # deviation 5: inverted distribution function
    return F.one_hot(index, probs.shape[-1]).float() + (probs - probs.detach())


class TwoHotHead(nn.Module):
    """Predicts a number as a distribution over 255 bins, symexp(x) = sign(x) (exp(|x|) - 1) of x evenly in -20 ... 20.

    Its output layer begins with zeros, so the first prediction is 0.
    """

    def __init__(self, feat_dim: int, units: int, layers: int):
        super().__init__()
        half = -torch.expm1(torch.linspace(20, 0, 128))
        self.register_buffer("bins", torch.cat([half, -half[:-1].flip(0)]), persistent=False)
        self.net = nn.Sequential(*hidden(feat_dim, units, layers), nn.Linear(units, len(self.bins)))
        self.apply(init_weights)
        init_weights(self.net[-1], 0.0)

    def forward(self, feat: torch.Tensor) -> torch.Tensor:
        """Features (..., F) -> logits (..., 255)."""
        return self.net(feat).float()

    def mean(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits (..., 255) -> expectation (...), summed so that opposite bins of equal probability cancel exactly."""
        probs, half = logits.softmax(-1), len(self.bins) // 2
        return ((probs[..., half + 1 :] - probs[..., :half].flip(-1)) * self.bins[half + 1 :]).sum(-1)

    def loss(self, logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Cross-entropy (...) towards the two bins around each target (...), which share it by distance."""
        target = target.clamp(self.bins[0], self.bins[-1])
        above = torch.searchsorted(self.bins, target).clamp(min=1)
        low, high = self.bins[above - 1], self.bins[above]
        log_probs, share = logits.log_softmax(-1), (target - low) / (high - low)
        log_low, log_high = (log_probs.gather(-1, i[..., None])[..., 0] for i in (above - 1, above))
        return -(1 - share) * log_low - share * log_high


class ImageEncoder(nn.Module):
    """(N, C, 64, 64) -> (N, 64 * depth): convolution, max-pooling, norm over channels, SiLU, four times."""

    def __init__(self, image_channels: int, depth: int):
        super().__init__()
        channels = [image_channels, 2 * depth, 3 * depth, 4 * depth, 4 * depth]
        self.convs = nn.ModuleList(nn.Conv2d(i, o, 5, padding=2) for i, o in pairwise(channels))
        self.norms = nn.ModuleList(RMSNorm(o) for o in channels[1:])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = F.max_pool2d(conv(x), 2)
            x = F.silu(norm(x.movedim(1, -1))).movedim(-1, 1)
        return x.flatten(1)


class ImageDecoder(nn.Module):
    """Features (N, F) -> images (N, C, 64, 64) in [-0.5, 0.5]: 4 x 4 pixels of stoch and deter, doubled four times."""

    def __init__(self, image_channels: int, size: Widths):
        super().__init__()
        depth, stoch = size.depth, STOCH * size.classes
        self.deter_in = BlockLinear(size.deter, 64 * depth)
        self.stoch_in = nn.Sequential(*hidden(stoch, 2 * size.units, 1), nn.Linear(2 * size.units, 64 * depth))
        channels = [4 * depth, 4 * depth, 3 * depth, 2 * depth, image_channels]
        self.norms = nn.ModuleList(RMSNorm(i) for i in channels[:-1])
        self.convs = nn.ModuleList(nn.Conv2d(i, o, 5, padding=2) for i, o in pairwise(channels))
        taps = [[0, 0, 1, 1, 2], [0, 1, 1, 2, 2]]  # the pixel of a small image that each tap meets, by parity
        self.register_buffer("fold", F.one_hot(torch.tensor(taps), 3).float(), persistent=False)  # (2, 5, 3)

    def doubled(self, conv: nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
        """conv(x with every pixel doubled), as four convolutions of x, one for each parity: three times as fast."""
        weight = torch.einsum("ockl,pki,qlj->opqcij", conv.weight, self.fold, self.fold).flatten(0, 2)
        return F.pixel_shuffle(F.conv2d(x, weight, conv.bias.repeat_interleave(4), padding=1), 2)

    def forward(self, feat: torch.Tensor) -> torch.Tensor:
        stoch, deter = feat.split([self.stoch_in[0].in_features, self.deter_in.in_features], -1)
        a = self.deter_in(deter.unflatten(-1, (BLOCKS, -1))).unflatten(-1, (BLOCKS, 4, 4, -1))  # a block: some channels
        a = a.movedim(1, 3).flatten(3)
        x = a + self.stoch_in(stoch).view_as(a)  # (N, 4, 4, C)
        for norm, conv in zip(self.norms, self.convs, strict=True):
            x = F.silu(norm(x)).movedim(-1, 1)
            x = self.doubled(conv, x).movedim(1, -1)
        return torch.sigmoid(x.float()).movedim(-1, 1) - 0.5


class WorldModel(nn.Module):
    """Encoder, RSSM, decoder, reward head and continuation head; the heads read features (..., F) = [stoch, deter].

    The continuation head's sigmoid is the discount: it learns gamma, and 0 where a state is terminal.
    """

    def __init__(self, obs_space: gym.Space, action_dim: int, size: Widths):
        super().__init__()
        image, channels, units = len(obs_space.shape) == 3, obs_space.shape[-1], size.units
        feat_dim, embed_dim = STOCH * size.classes + size.deter, 64 * size.depth if image else units
        if image:
            self.encoder, self.decoder = ImageEncoder(channels, size.depth), ImageDecoder(channels, size)
        else:
            self.encoder = nn.Sequential(*hidden(channels, units, 3))
            self.decoder = nn.Sequential(*hidden(feat_dim, units, 3), nn.Linear(units, channels))
        self.rssm = RSSM(action_dim, embed_dim, size)
        self.cont = nn.Sequential(*hidden(feat_dim, units, 1), nn.Linear(units, 1))
        self.apply(init_weights)
        self.reward = TwoHotHead(feat_dim, units, 1)
        self.to(memory_format=torch.channels_last)

    def embed(self, obs: torch.Tensor) -> torch.Tensor:
        """Preprocessed observations (T, B, ...) -> (T, B, E)."""
        return self.encoder(obs.flatten(0, 1)).float().unflatten(0, obs.shape[:2])

    def decode(self, feat: torch.Tensor) -> torch.Tensor:
        """Features (T, B, F) -> the preprocessed observations (T, B, ...) as predicted."""
        return self.decoder(feat.flatten(0, 1)).float().unflatten(0, feat.shape[:2])

    def discount(self, feat: torch.Tensor) -> torch.Tensor:
        """Features (..., F) -> gamma times the probability that the episode goes on after this state (...)."""
        return torch.sigmoid(self.cont(feat).squeeze(-1).float())


class Actor(nn.Module):
    """The policy. Continuous: a Normal with mean in (-1, 1), std in (0.1, 1). Discrete: a one-hot action."""

    def __init__(self, feat_dim: int, action_dim: int, discrete: bool, units: int):
        super().__init__()
        self.discrete, self.action_dim = discrete, action_dim
        self.net = nn.Sequential(*hidden(feat_dim, units, 3), nn.Linear(units, action_dim * (1 if discrete else 2)))
        self.apply(init_weights)
        init_weights(self.net[-1], 0.01)

    def dist(self, feat: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Features (..., F) -> the policy there: (mean, std), or (log-probabilities,), each (..., A)."""
        out = self.net(feat).float()
        if self.discrete:
            return (out.log_softmax(-1),)
        mean, std = out.chunk(2, -1)  # deviation 7
        return torch.tanh(mean), 0.9 * torch.sigmoid(std + 2) + 0.1

    def draw_noise(self, shape: tuple, generator: torch.Generator) -> torch.Tensor:
        """The random part of `sample`: standard Normal (*shape, A), or uniform (*shape) for discrete actions."""
        if self.discrete:
            return torch.rand(shape, generator=generator, device=generator.device)
        return torch.randn(*shape, self.action_dim, generator=generator, device=generator.device)

    def sample(self, policy: tuple[torch.Tensor, ...], noise: torch.Tensor) -> torch.Tensor:
        """Action (..., A): one-hot, or not bounded; the environment is given it clipped."""
        return sample_one_hot(policy[0], noise) if self.discrete else policy[0] + policy[1] * noise

    def log_prob(self, policy: tuple[torch.Tensor, ...], action: torch.Tensor) -> torch.Tensor:
        """Of actions (..., A) -> (...)."""
        if self.discrete:
            return (policy[0] * action).sum(-1)
        mean, std = policy
        return (-0.5 * ((action - mean) / std) ** 2 - std.log() - 0.5 * math.log(2 * math.pi)).sum(-1)

    def entropy(self, policy: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """Nats (...)."""
        if self.discrete:
            return -(policy[0].exp() * policy[0]).sum(-1)
        return (policy[1].log() + 0.5 * math.log(2 * math.pi * math.e)).sum(-1)


class Agent(nn.Module):
    """All networks of a run: world model, actor, critic, the slow copy that it is held near; the range of returns."""

    def __init__(self, obs_space: gym.Space, action_space: gym.Space, args: Args):
        super().__init__()
        size = SIZES[args.size]
        self.discrete = isinstance(action_space, gym.spaces.Discrete)
        self.action_dim = int(action_space.n) if self.discrete else action_space.shape[0]
        feat_dim = STOCH * size.classes + size.deter
        self.world_model = WorldModel(obs_space, self.action_dim, size)
        self.actor = Actor(feat_dim, self.action_dim, self.discrete, size.units)
        self.critic = TwoHotHead(feat_dim, size.units, 3)
        self.slow_critic = deepcopy(self.critic).requires_grad_(False)
        self.register_buffer("return_range", torch.zeros(2))  # percentiles 5 and 95, followed slowly


def preprocess(obs: torch.Tensor) -> torch.Tensor:
    """Images (..., H, W, C) uint8 -> (..., C, H, W) in [-0.5, 0.5]; vectors -> symlog: sign(x) ln(1 + |x|)."""
    if obs.dtype == torch.uint8:
        return torch.add(-0.5, obs.movedim(-1, -3), alpha=1 / 255)  # in channels-last order, which convolutions like
    return torch.sign(obs) * torch.log1p(torch.abs(obs))


# === Losses ===


def kl_loss(post: torch.Tensor, prior: torch.Tensor, free_nats: float) -> torch.Tensor:
    """Mean of max(KL(post || prior), free_nats), log_probs (T, B, STOCH, C); no gradient below the free nats."""
    return (post.exp() * (post - prior)).sum((-1, -2)).clamp(min=free_nats).mean()


def model_loss(world_model: WorldModel, batch: dict, noise: torch.Tensor, args: Args) -> tuple:
    """The losses of the world model alone, over a batch (T, B, ...) that goes on from stored latents.

    Returns the losses by name, the posterior states stoch and deter (T, B, ...), and metrics.
    """
    obs = preprocess(batch["obs"])
    start = F.one_hot(batch["stoch"].long(), world_model.rssm.classes).float().flatten(-2), batch["deter"]
    embed = world_model.embed(obs)
    stoch, deter, post = world_model.rssm.observe(*start, batch["action"], embed, batch["is_first"], noise)
    prior = world_model.rssm.prior(deter)
    feat = torch.cat([stoch, deter], -1)  # (T, B, F)
    cont = world_model.cont(feat).squeeze(-1).float()
    losses = {
        "dyn": kl_loss(post.detach(), prior, args.free_nats),
        "rep": kl_loss(post, prior.detach(), args.free_nats),
        "image": ((world_model.decode(feat) - obs) ** 2).flatten(2).sum(-1).mean(),  # summed over pixels
        "reward": world_model.reward.loss(world_model.reward(feat), batch["reward"]).mean(),
        "cont": F.binary_cross_entropy_with_logits(cont, args.gamma * batch["cont"]),
    }
    latents = zip(("post", "prior"), (post, prior), strict=True)
    with torch.no_grad():
        metrics = {f"model/{name}_entropy": -(p.exp() * p).sum((-1, -2)).mean() for name, p in latents}
        metrics["model/kl"] = kl_loss(post, prior, 0.0)
    return losses, (stoch, deter), metrics


@torch.no_grad()
def imagine(rssm: RSSM, actor: Actor, stoch, deter, noise: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """Dreams of H steps from N states, which are states 0: features (H+1, N, F) of states 0..H, actions (H, N, A)."""
    feats, actions = [torch.cat([stoch, deter], -1)], []
    for k in range(len(noise["action"])):
        actions.append(actor.sample(actor.dist(feats[-1]), noise["action"][k]))
        stoch, deter = rssm.img_step(stoch, deter, actions[-1], noise["prior"][k])
        feats.append(torch.cat([stoch, deter], -1))
    return torch.stack(feats), torch.stack(actions)


def lambda_return(rewards, values, discounts, mix) -> torch.Tensor:
    """Lambda-return after states 0..H-1: rewards, values, discounts, mix (H+1, N) -> (H, N).

    R_k = r_k+1 + d_k+1 ((1 - mix_k+1) v_k+1 + mix_k+1 R_k+1), R_H = v_H: r_k is collected on arriving at state k, v_k
    and R_k are what follows it, d_k is the discount after it, mix_k is lambda, or 0 where nothing is known beyond it.
    """
    alone, carried = rewards + discounts * (1 - mix) * values, discounts * mix
    returns, last = [], values[-1]
    for k in reversed(range(len(values) - 1)):
        last = torch.addcmul(alone[k + 1], carried[k + 1], last)
        returns.append(last)
    return torch.stack(returns[::-1])


def percentile(x: torch.Tensor, share: float) -> torch.Tensor:
    """The number below which a share of all x lies, of all processes (torchrun), interpolated linearly."""
    if dist.is_initialized():
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x)
        x = torch.stack(parts)
    ordered = x.flatten().sort().values
    place = share * (len(ordered) - 1)
    below = min(int(place), len(ordered) - 2)
    return torch.lerp(ordered[below], ordered[below + 1], place - below)


def critic_loss(critic: TwoHotHead, slow_critic: TwoHotHead, feat, returns, weights) -> torch.Tensor:
    """Mean of weights times the cross-entropy to returns (H, N) and to the slow critic's own prediction."""
    logits = critic(feat)
    with torch.no_grad():
        slow = slow_critic.mean(slow_critic(feat))
    return (weights * (critic.loss(logits, returns) + critic.loss(logits, slow))).mean()


def actor_loss(actor: Actor, feat, action, advantage, weights, entropy_scale: float) -> tuple:
    """Minus the mean of weights times (advantage ln p(action) + entropy_scale entropy); all (H, N, ...)."""
    policy = actor.dist(feat)
    entropy = actor.entropy(policy)
    return -(weights * (advantage * actor.log_prob(policy, action) + entropy_scale * entropy)).mean(), entropy.mean()


def behavior_loss(agent: Agent, batch: dict, states: tuple, dreams: tuple, args: Args) -> tuple[dict, dict]:
    """The losses of actor and critic on dreams, and of the critic on the replayed states that these began with.

    The replayed value's gradient passes on into the world model through `states`; dreams have none.
    """
    model, critic, (feat, action) = agent.world_model, agent.critic, dreams
    replayed = torch.cat(states, -1)[-args.imag_last :]  # (K, B, F): all of them for 0
    reward, cont, is_first = (batch[name][-args.imag_last :] for name in ("reward", "cont", "is_first"))
    with torch.no_grad():
        values, rewards = critic.mean(critic(feat)), model.reward.mean(model.reward(feat))
        discounts = model.discount(feat)
        returns = lambda_return(rewards, values, discounts, torch.full_like(values, args.td_lambda))  # (H, N)
        weights = discounts[:-1].cumprod(0)  # of the start, too: a dream from a terminal state weighs next to nothing
        bounds = torch.stack([percentile(returns, share) for share in (0.05, 0.95)])
        agent.return_range.lerp_(bounds, RANGE_RATE)  # before it is used; from zeros
        low, high = agent.return_range
        advantage = (returns - values[:-1]) / (high - low).clamp(min=1)
        after = returns[0].view_as(reward)  # what dreams say of each replayed state
        ended = torch.cat([is_first[1:], torch.zeros_like(is_first[:1])])  # deviation 6
        replay_returns = lambda_return(reward, after, args.gamma * cont, args.td_lambda * (1 - ended))
    actor, entropy = actor_loss(agent.actor, feat[:-1], action, advantage, weights, args.entropy_scale)
    losses = {"actor": actor, "critic": critic_loss(critic, agent.slow_critic, feat[:-1], returns, weights)}
    weights = 1 - ended[:-1]
    losses["replay_value"] = critic_loss(critic, agent.slow_critic, replayed[:-1], replay_returns, weights)
    metrics = {"model/imag_reward": rewards.mean(), "model/imag_value": values.mean(), "model/actor_entropy": entropy}
    return losses, metrics | {"model/imag_return": returns.mean(), "model/return_range": high - low}


LOSSES = model_loss, imagine, behavior_loss  # --compile compiles each


def compute_losses(agent: Agent, batch: dict, noise: dict, args: Args, functions: tuple = LOSSES) -> tuple:
    """The one loss that all networks share, the posterior states (T, B, ...), and detached metrics."""
    model_fn, imagine_fn, behavior_fn = functions
    low = {"enabled": args.bfloat16, "cache_enabled": False}  # a weight that was cast in a dream has no gradient
    with torch.autocast(batch["obs"].device.type, torch.bfloat16, **low):  # deviation 1: not always
        losses, states, metrics = model_fn(agent.world_model, batch, noise["post"], args)
        starts = (state.detach()[-args.imag_last :].flatten(0, 1) for state in states)  # (N, ...), N = K B
        dreams = imagine_fn(agent.world_model.rssm, agent.actor, *starts, noise)
        more_losses, more_metrics = behavior_fn(agent, batch, states, dreams, args)
    losses |= more_losses
    scales = {"dyn": args.dyn_scale, "rep": args.rep_scale, "replay_value": args.replay_value_scale}
    total = sum(scales.get(name, 1.0) * loss for name, loss in losses.items())
    metrics |= {f"losses/{name}_loss": loss for name, loss in losses.items()} | more_metrics
    return total, states, {name: value.detach() for name, value in metrics.items()}


# === Acting ===


@torch.no_grad()
def act(agent: Agent, obs, action, is_first, state: tuple, generator: torch.Generator) -> tuple:
    """One decision for N environments: actions (N, A), an array, and the new state, (stoch, deter).

    From arrays obs (N, ...), the action (N, A) taken before it and is_first (N,), and from the state that the last
    decision returned. Always a sample, in evaluations too: the policy's own entropy is all the exploration there is.
    """
    device, model = generator.device, agent.world_model
    action, is_first = (torch.as_tensor(x, dtype=torch.float32, device=device) for x in (action, is_first))
    embed = model.embed(preprocess(torch.as_tensor(obs, device=device)[None]))[0]
    noise = torch.rand(len(obs), STOCH, generator=generator, device=device)
    stoch, deter, _ = model.rssm.obs_step(*state, action, embed, is_first, noise)
    policy = agent.actor.dist(torch.cat([stoch, deter], -1))
    action = agent.actor.sample(policy, agent.actor.draw_noise((len(obs),), generator))
    return action.cpu().numpy(), (stoch, deter)  # host sync


def env_action(agent: Agent, action: np.ndarray) -> np.ndarray:
    """What the environments take: indices (N,) in place of one-hot actions (N, A), others clipped to [-1, 1]."""
    return action.argmax(-1) if agent.discrete else action.clip(-1, 1)


# === Updates ===


def draw_noise(agent: Agent, args: Args, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """All randomness of one update, drawn up front: a compiled or recorded update then is a function of its inputs."""
    uniform = functools.partial(torch.rand, generator=generator, device=generator.device)
    num_starts = (args.imag_last or args.batch_length) * args.batch_size
    return {
        "post": uniform(args.batch_length, args.batch_size, STOCH),
        "prior": uniform(args.horizon, num_starts, STOCH),
        "action": agent.actor.draw_noise((args.horizon, num_starts), generator),
    }


def make_generator(device: torch.device, seed: int, stream: int) -> torch.Generator:
    """Random numbers that neither another seed nor another stream of this one has."""
    return torch.Generator(device).manual_seed(int(np.random.default_rng([seed, stream]).integers(2**63)))


class LaProp(nn.Module):
    """RMSProp with momentum after the division (LaProp), gradients clipped tensor by tensor (AGC), a warm-up.

    g <- g / max(1, |g| / (agc max(1e-3, |w|)));  v <- 0.999 v + 0.001 g^2;  m <- 0.9 m + 0.1 g / (sqrt(v / c2) + 1e-20)
    w <- w - lr m / c1, with c the corrections of the zeros that m and v begin with. The first update moves nothing.
    """

    def __init__(self, agent: Agent, args: Args):
        super().__init__()
        self.learned, self.args = [parameter for parameter in agent.parameters() if parameter.requires_grad], args
        self.sizes = [parameter.numel() for parameter in self.learned]
        zeros = torch.zeros(sum(self.sizes), device=self.learned[0].device)
        self.register_buffer("momentum", zeros)  # of all parameters end to end
        self.register_buffer("square", zeros.clone())
        self.register_buffer("count", zeros.new_zeros(()))

    @torch.no_grad()
    def step(self, gradients: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """Moves the parameters. Returns the norm of all gradients before they are clipped."""
        norms = torch.stack(torch._foreach_norm(gradients))
        limits = self.args.agc * torch.stack(torch._foreach_norm(self.learned)).clamp(min=1e-3)
        scales = 1 / (norms / limits).clamp(min=1)
        gradient = torch.cat([(g * scale).flatten() for g, scale in zip(gradients, scales.unbind(), strict=True)])
        self.count += 1
        unbiased, unbiased_square = (-torch.expm1(self.count * math.log(beta)) for beta in (0.9, 0.999))
        self.square.lerp_(gradient.square(), 0.001)
        self.momentum.lerp_(gradient / ((self.square / unbiased_square).sqrt() + 1e-20), 0.1)
        rate = self.args.learning_rate * ((self.count - 1) / self.args.warmup).clamp(max=1)
        steps = (self.momentum * (rate / unbiased)).split(self.sizes)
        for parameter, step in zip(self.learned, steps, strict=True):
            parameter.sub_(step.view_as(parameter))
        return norms.norm()


def average(tensors: list[torch.Tensor]) -> None:
    """Under torchrun each becomes its mean over all processes; a process on its own leaves them alone."""
    if dist.is_initialized():
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        dist.all_reduce(flat)
        means = (flat / dist.get_world_size()).split([tensor.numel() for tensor in tensors])
        for tensor, mean in zip(tensors, means, strict=True):
            tensor.copy_(mean.view_as(tensor))


def update(agent: Agent, optimizer: LaProp, batch: dict, noise: dict, args: Args, functions: tuple = LOSSES) -> tuple:
    """One gradient step of all networks. Detached metrics and the batch's new latents (T, B, ...); no host sync."""
    loss, (stoch, deter), metrics = compute_losses(agent, batch, noise, args, functions)
    gradients = torch.autograd.grad(loss, optimizer.learned)
    average(gradients)
    metrics["grad_norm/all"] = optimizer.step(gradients)
    with torch.no_grad():
        torch._foreach_lerp_(list(agent.slow_critic.parameters()), list(agent.critic.parameters()), SLOW_RATE)
    classes = stoch.detach().unflatten(-1, (STOCH, -1)).argmax(-1).to(torch.uint8)
    return metrics, {"stoch": classes, "deter": deter.detach()}


# === Replay buffer ===


class ReplayBuffer:
    """For each environment a ring of its last time steps, episodes end to end, each step stored as it is played.

    Entry t belongs to *arriving* at obs[t] (deviation 2): action[t] led to it, reward[t] was collected on the way,
    cont[t] is 0 only if obs[t] is terminal; stoch[t] (class numbers) and deter[t] are the latent state after seeing it.
    The first entry of an episode has is_first 1, action and reward 0. What is drawn are windows, of `length` entries
    for learning and one before them for its latent state: each once soon after it is complete, and any at random.
    """

    def __init__(self, args: Args, obs_space: gym.Space, agent: Agent, device: torch.device):
        self.size, self.length, self.device = args.buffer_size // args.num_envs, args.batch_length, device
        byte = torch.uint8
        kinds = {"obs": (obs_space.shape, byte if obs_space.dtype == np.uint8 else torch.float32)}
        kinds |= {"stoch": ((STOCH,), byte), "deter": ((SIZES[args.size].deter,), torch.float32)}  # deviation 4
        kinds |= {name: ((), torch.float32) for name in ("reward", "cont", "is_first")}
        kinds["action"] = (agent.action_dim,), torch.float32
        slots = args.num_envs * self.size  # zeros take no memory before they are written
        self.data = {key: torch.zeros(slots, *shape, dtype=kind, device=device) for key, (shape, kind) in kinds.items()}
        self.nbytes = sum(tensor.nbytes for tensor in self.data.values())
        self.end = np.zeros(args.num_envs, np.int64)  # entries ever written; entry i lives in slot i % size of its ring
        self.fresh = deque()  # complete windows that were not drawn yet: (environment, first entry)

    def windows(self) -> np.ndarray:
        """How many can be drawn of each environment."""
        return np.maximum(np.minimum(self.end, self.size) - self.length, 0)

    def __len__(self) -> int:
        return int(self.windows().sum())

    def add(self, rows: np.ndarray, **entry) -> None:
        """Stores the next entry of some environments: arrays or tensors (len(rows), ...) by name."""
        slots = torch.from_numpy(rows * self.size + self.end[rows] % self.size).to(self.device)
        for name, value in entry.items():
            self.data[name][slots] = torch.as_tensor(value).to(self.device, self.data[name].dtype)
        self.end[rows] += 1
        for i in rows[self.end[rows] % (self.length + 1) == 0]:
            self.fresh.append((int(i), int(self.end[i]) - self.length - 1))

    def sample(self, batch_size: int, rng: np.random.Generator, device: torch.device) -> tuple[dict, torch.Tensor]:
        """Windows (T, B, ...), copies, with stoch and deter (B, ...) of the entry before; slots (T, B) for refresh."""
        oldest, windows, drawn = np.maximum(self.end - self.size, 0), self.windows().cumsum(), []
        while self.fresh and len(drawn) < batch_size:
            env, first = self.fresh.popleft()
            drawn += [(env, first)] if first >= oldest[env] else []
        for i in rng.integers(windows[-1], size=batch_size - len(drawn)):
            env = int(np.searchsorted(windows, i, side="right"))
            drawn.append((env, self.end[env] - self.length - windows[env] + i))
        env, first = np.array(drawn).T
        slots = env * self.size + (first + np.arange(self.length + 1)[:, None]) % self.size
        slots = torch.from_numpy(slots).to(self.device, non_blocking=True)
        at = dict.fromkeys(self.data, slots[1:]) | {"stoch": slots[0], "deter": slots[0]}
        return {name: data[at[name]].to(device, non_blocking=True) for name, data in self.data.items()}, slots[1:]

    def refresh(self, slots: torch.Tensor, latents: dict[str, torch.Tensor]) -> None:
        """Replaces the latents of drawn entries by newer ones."""
        for name, tensor in latents.items():
            self.data[name][slots] = tensor.to(self.device)  # deviation 9: of equal slots any

    def state_dict(self) -> dict:
        """The filled part; through NumPy, because torch would save the whole storage behind a slice.

        Only several rings that are not full yet are copied in memory.
        """
        filled = min(int(self.end.max()), self.size)
        rings = {name: tensor.unflatten(0, (-1, self.size))[:, :filled] for name, tensor in self.data.items()}
        data = {name: torch.from_numpy(np.ascontiguousarray(tensor.cpu().numpy())) for name, tensor in rings.items()}
        return {"data": data, "end": self.end.tolist(), "fresh": list(self.fresh)}

    def load_state_dict(self, state: dict) -> None:
        for name, tensor in state["data"].items():
            self.data[name].unflatten(0, (-1, self.size))[:, : tensor.shape[1]] = tensor.to(self.device)
        self.end, self.fresh = np.array(state["end"], np.int64), deque(state["fresh"])


# === Training ===


def main(args: Args) -> str:
    whole = with_task_defaults(args)
    args = join_ranks(whole, "num_envs batch_size buffer_size learning_starts")
    check_args(args)
    if args.evaluate is not None:
        return evaluate_run(args)
    checkpoint = load_checkpoint(args.resume, args) if args.resume is not None else None
    renderer = choose_renderer(args, checkpoint)
    rehearse(functools.partial(make_vector_env, args, renderer, 1), args.capture_video)
    envs, repeat = make_vector_env(args, renderer, args.num_envs), args.action_repeat
    spaces = envs.single_observation_space, envs.single_action_space
    check_memory(args, *spaces)
    run = (RankedRun if dist.is_initialized() else Run)(whole, checkpoint)
    device = run.device

    # what a checkpoint holds: networks, optimizer, replay, counters, generators
    agent = Agent(*spaces, args).to(device)
    optimizer = LaProp(agent, args)
    rb = ReplayBuffer(args, spaces[0], agent, device if args.buffer_on_gpu else torch.device("cpu"))
    counters = {"num_updates": 0, "owed": 1.0, "renderer": renderer}  # a run stays with the renderer that it began with
    rng = {name: np.random.default_rng([args.seed, i]) for name, i in {"reset": 0, "replay": 1}.items()}
    rng |= {name: make_generator(device, args.seed, i) for name, i in {"act": 2, "update": 3}.items()}
    parts = {"agent": agent, "optimizer": optimizer, "counters": counters}
    run.keep(parts | ({"replay": rb} if args.save_buffer else {}), rng)
    if checkpoint:
        counters |= checkpoint["parts"]["counters"]
        checkpoint = None  # what refers to the file keeps it on the disk
    update_fn, envs.on_fault = make_update(agent, optimizer, args), run.abort
    keep_freed_memory(device)
    run.say(f"{run.folder}: {device}, renderer {renderer}, replay {rb.nbytes / 1e9:.2f} GB on {rb.device}")
    if device.type == "cpu" and run.step == 0:
        warn_if_slow(agent, rb, args, run)

    dones, rewards, conts = np.ones(args.num_envs, bool), np.zeros(args.num_envs), np.ones(args.num_envs)
    state, eval_envs = agent.world_model.rssm.initial(args.num_envs), None
    action = np.zeros((args.num_envs, agent.action_dim), np.float32)

    def decide(mask: np.ndarray, is_first: bool) -> None:
        """The next action of some environments, after what they show now, which is stored."""
        rows = np.flatnonzero(mask)
        index = torch.from_numpy(rows).to(device)
        entry = {"obs": obs[rows], "action": action[rows], "is_first": np.full(len(rows), is_first, np.float32)}
        before = tuple(tensor[index] for tensor in state)
        action[rows], after = act(agent, entry["obs"], entry["action"], entry["is_first"], before, rng["act"])
        require_finite({"the policy's action": action.sum()}, run.step)
        for tensor, new in zip(state, after, strict=True):
            tensor[index] = new
        latents = {"stoch": after[0].unflatten(-1, (STOCH, -1)).argmax(-1), "deter": after[1]}
        rb.add(rows, **entry, **latents, reward=rewards[rows], cont=conts[rows])
        if len(rb) >= args.learning_starts:
            counters["owed"] += len(rows) * args.train_ratio / (args.batch_size * args.batch_length)  # deviation 8

    def train() -> None:
        """Makes the updates that are owed, unless the run is asked to stop."""
        mean = torch.tensor([counters["owed"], len(rb) >= args.learning_starts], dtype=torch.float64)
        average([mean])  # all make the same updates, once each has what to learn from
        counters["owed"], ready = mean.tolist()
        while counters["owed"] >= 1 and ready == 1 and not run.stop.requested:
            batch, slots = rb.sample(args.batch_size, rng["replay"], device)
            run.metrics, latents = update_fn(batch, draw_noise(agent, args, rng["update"]))
            rb.refresh(slots, latents)
            counters["num_updates"] += 1
            counters["owed"] -= 1
            run.tick(f"update {counters['num_updates']}")
            if counters["num_updates"] % 100 == 0:
                run.report()  # deviation 11: losses of the last batch

    while True:
        if args.num_envs == 1 or run.step >= args.total_timesteps:
            train()  # one environment: after its step; at first what a resumed run owes
        if run.eval_due(dones):
            eval_envs = evaluate_and_log(agent, eval_envs, renderer, run)
        if not run.goes_on(dones):  # which saves, too, when it is due
            break
        if dones.any():
            seeds = rng["reset"].integers(2**31, size=args.num_envs).tolist()
            obs, _ = envs.reset(seed=seeds, options={"reset_mask": dones})
            action[dones], rewards[dones], conts[dones] = 0, 0, 1
            decide(dones, is_first=True)
        if args.num_envs == 1:
            obs, rewards, terminations, truncations, infos = envs.step(env_action(agent, action))
        else:
            envs.step_async(env_action(agent, action))
            train()  # deviation 15: several environments, while they step
            obs, rewards, terminations, truncations, infos = envs.step_wait()
        dones, conts = terminations | truncations, 1.0 - terminations
        decide(np.ones(args.num_envs, bool), is_first=False)
        run.step += whole.num_envs * repeat
        run.progress.update(whole.num_envs * repeat)
        if dones.any():
            run.log_episodes(infos, dones)

    envs.close()
    if eval_envs is not None:
        eval_envs.close()
    return run.close(agent.state_dict())


# === Environment ===


LATE_IMPORTS = ["PIL", "matplotlib"]  # packages that are imported where they are used
ATARI = r"ALE/|\w+NoFrameskip-v4$"  # ids of games


def is_dm_control(env_id: str) -> bool:
    """Gymnasium ids end in a version (-v0) or name a module (my_module:MyEnv); dm_control tasks do neither."""
    return re.search(r":|-v\d+$", env_id) is None


def with_task_defaults(args: Args) -> Args:
    """The settings in force: what was not given depends on the kind of environment."""
    env_id = re.sub(r"^dm_control/(.+)-v0$|^ale_py:", r"\1", args.env_id)  # what Shimmy calls a task; ALE's own module
    args = replace(args, env_id=env_id)
    defaults = {"action_repeat": 2 if is_dm_control(args.env_id) else 1}  # deviation 3
    defaults |= {"max_episode_steps": 27_000} if re.match(ATARI, args.env_id) else {}
    return replace(args, **{name: value for name, value in defaults.items() if getattr(args, name) is None})


def make_env(args: Args, renderer: str, video: str | None = None) -> Callable[[], gym.Env]:
    """Thunk of one environment: observations (64, 64, C) uint8 or (D,) float32, actions in [-1, 1] or discrete."""
    main_process = os.getpid()

    def thunk() -> gym.Env:
        if os.getpid() != main_process:
            be_a_worker()
        pixels = is_dm_control(args.env_id) and args.obs_mode == "pixels"
        if is_dm_control(args.env_id):
            try:
                env = DrawnTask(args.env_id, renderer, 64 if pixels else 240)
            except ImportError as error:
                package = "pip install dm_control==1.0.50 'mujoco>=3.17,<4' (from Python 3.13 on with --no-deps)"
                fail(f"{args.env_id} needs {package} ({error})")
        else:
            env = make_frames(args.env_id, **({"render_mode": "rgb_array"} if video else {}))
        limits = filter(None, (args.max_episode_steps, env.spec and env.spec.max_episode_steps))
        env = gym.wrappers.TimeLimit(env, min(limits, default=1_000))  # deviation 13
        env = gym.wrappers.RecordEpisodeStatistics(CheckedEnv(env))
        env = ActionRepeat(Film(env, video) if video else env, args.action_repeat)
        if pixels:
            env = gym.wrappers.AddRenderObservation(env, render_only=True)
        return fit_spaces(env, args.env_id)

    return thunk


def fit_spaces(env: gym.Env, env_id: str) -> gym.Env:
    """Refuses what DreamerV3 cannot use; resizes images to 64x64, rescales the bounded action dimensions to [-1, 1]."""
    obs, action = env.observation_space, env.action_space
    is_box = isinstance(obs, gym.spaces.Box)
    if is_box and obs.dtype == np.uint8 and len(obs.shape) in (2, 3) and min(obs.shape[:2]) > 8:
        if obs.shape[:2] != (64, 64):
            env = gym.wrappers.ResizeObservation(env, (64, 64))
            try:  # OpenCV shrinks more than four channels from whole multiples of 64 alone
                env.func(np.zeros(obs.shape, np.uint8))
            except Exception as error:  # one of its own
                fail(f"{env_id}: {obs} cannot be resized to 64x64, make it so yourself ({one_line(error)})")
        if len(env.observation_space.shape) == 2:  # grey
            env = gym.wrappers.ReshapeObservation(env, (64, 64, 1))
    elif is_box and len(obs.shape) == 1:
        space = gym.spaces.Box(-np.inf, np.inf, obs.shape, np.float32)
        env = gym.wrappers.TransformObservation(env, np.float32, space)
    else:
        hint = "larger than 8 x 8, channels come last; (obs * 255).astype(np.uint8) makes an image of floats"
        fail(f"{env_id}: observations must be images (H, W, C) or (H, W) of uint8 ({hint}) or vectors (D,), not {obs}")
    if isinstance(action, gym.spaces.Box):
        low, high = action.low.ravel().astype(float), action.high.ravel().astype(float)
        bounded = (low > -1e6) & (high < 1e6)  # deviation 16: else [-1, 1], moved into the one bound
        left = np.where(bounded, low, np.clip(-1, low, high - 2))
        right = np.where(bounded, high, left + 2)
        rounded = np.rint if np.issubdtype(action.dtype, np.integer) else np.asarray

        def rescale(a: np.ndarray) -> np.ndarray:
            wanted = np.clip(left + (a.astype(float) + 1) / 2 * (right - left), low, high)
            return rounded(wanted).astype(action.dtype).reshape(action.shape)

        env = gym.wrappers.TransformAction(env, rescale, gym.spaces.Box(-1, 1, low.shape, np.float32))
    elif isinstance(action, gym.spaces.Discrete):
        space = gym.spaces.Discrete(int(action.n))
        env = gym.wrappers.TransformAction(env, lambda a: a + action.start, space)
    else:
        fail(f"{env_id}: actions must be Box or Discrete, not {action}")
    return env


def make_vector_env(args: Args, renderer: str, num_envs: int, video: str | None = None) -> gym.vector.VectorEnv:
    """The task's environments side by side; the first episode of the first is filmed into `video`, path of an MP4."""
    workers = args.num_envs > 1
    most = max(args.num_envs, (os.cpu_count() or 1) if workers else 16)  # bounds an evaluation's
    thunks = [make_env(args, renderer, video if i == 0 else None) for i in range(min(num_envs, most))]
    return side_by_side(args.env_id, thunks, workers)


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


def be_a_worker() -> None:
    """Sets up a process that plays one environment: deaf to the terminal, on one thread, dead when its parent is."""
    os.setsid()  # signals to the process group are for the main process, which closes the workers
    torch.set_num_threads(1)
    parent = multiprocessing.parent_process().sentinel  # a pipe; when its other end closes, SIGIO ends this process
    fcntl.fcntl(parent, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(parent, fcntl.F_SETFL, os.O_ASYNC)
    if multiprocessing.connection.wait([parent], 0):  # it is gone already
        os._exit(1)


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


def refuse_old_game(env_id: str) -> None:
    """Pong-v5 and the like are no longer registered: says what the game is called now."""
    if ":" not in env_id and env_id not in gym.registry:
        with contextlib.suppress(Exception):  # it may be missing, or broken
            importlib.import_module("ale_py")  # which registers its games
        if (game := re.sub(r"(NoFrameskip|Deterministic)?-v\d$", "-v5", f"ALE/{env_id}")) in gym.registry:
            fail(f"{env_id!r} is played as {game}")


def make_frames(env_id: str, **settings) -> gym.Env:
    """A Gymnasium environment; Atari games with the usual preprocessing, in colour, with all lives (deviation 12)."""
    if not re.match(ATARI, env_id):
        refuse_old_game(env_id)
        return make_gymnasium(env_id, **settings)
    try:
        import ale_py
    except ImportError:
        fail(f"{env_id} needs its simulator: pip install ale_py")
    gym.register_envs(ale_py)
    env = make_gymnasium(env_id, frameskip=1, **settings)
    return gym.wrappers.AtariPreprocessing(env, noop_max=30, frame_skip=4, screen_size=64, grayscale_obs=False)


class DMControl(gym.Env):
    """A task of the dm_control suite with its flattened state as observation.

    An episode of 1000 steps ends by truncation; only a task that says discount 0 terminates.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 40}
    render_mode = "rgb_array"

    def __init__(self, env_id: str):
        from dm_control import suite

        names = {f"{domain}-{task}".replace("_", "-"): (domain, task) for domain, task in suite.ALL_TASKS}
        name = re.sub("^cup-", "ball-in-cup-", env_id.replace("_", "-"))
        if name not in names:
            close = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
            fail(f"unknown dm_control task {env_id!r}; close: {', '.join(close) or 'none'} (Gymnasium ids end in -v0)")
        self.env = suite.load(*names[name], task_kwargs={"random": 0})  # lqr draws its springs here: always the same
        self.camera = 2 if name.startswith("quadruped") else 0 if self.env.physics.model.ncam else -1
        spec = self.env.action_spec()
        low, high = spec.minimum.astype(np.float32), spec.maximum.astype(np.float32)
        low, high = np.where(low > -1e10, low, -np.inf), np.where(high < 1e10, high, np.inf)  # 1e10 means no bound
        self.action_space = gym.spaces.Box(low, high)
        dim = sum(int(np.prod(part.shape)) for part in self.env.observation_spec().values())
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (dim,), np.float32)

    def flatten(self, time_step) -> np.ndarray:
        return np.concatenate([np.ravel(part) for part in time_step.observation.values()]).astype(np.float32)

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        super().reset(seed=seed)
        if seed is not None:
            self.env.task._random = np.random.RandomState(seed)  # what suite.load(task_kwargs={"random": seed}) sets
        return self.flatten(self.env.reset()), {}

    def step(self, action: np.ndarray):
        time_step = self.env.step(action)
        terminated = time_step.last() and time_step.discount == 0.0
        return self.flatten(time_step), time_step.reward, terminated, time_step.last() and not terminated, {}

    def render(self) -> np.ndarray:
        return self.env.physics.render(240, 240, camera_id=self.camera)


class DrawnTask(DMControl):
    """The same with the published camera's pictures, by OpenGL or by ray-casting."""

    def __init__(self, env_id: str, renderer: str, size: int = 64):
        super().__init__(env_id)
        if renderer != "gl" and env_id.startswith("quadruped"):
            # escape copies its terrain into every GL context; without OpenGL there is none, so none is reported
            type(self.env.physics).contexts = property(lambda physics: None)
        self.renderer, self.size, self.ray_caster = renderer, size, None

    def render(self) -> np.ndarray:
        physics = self.env.physics
        if self.renderer == "gl":
            return physics.render(self.size, self.size, camera_id=self.camera)
        if self.ray_caster is None:
            self.ray_caster = RayCaster(physics.model.ptr, self.size, self.size, self.camera)
        return self.ray_caster.render(physics.data.ptr)


class ActionRepeat(gym.Wrapper):
    """Repeats each action, sums the rewards, stops at the end of the episode."""

    def __init__(self, env: gym.Env, repeat: int):
        super().__init__(env)
        self.repeat = repeat

    def step(self, action):
        total = 0.0
        for _ in range(self.repeat):
            obs, reward, terminated, truncated, info = self.env.step(action)
            total += reward
            if terminated or truncated:
                break
        return obs, total, terminated, truncated, info


def choose_renderer(args: Args, checkpoint: dict | None) -> str:
    """Returns "gl", "raycast" or "none" (no dm_control pictures) and sets MUJOCO_GL; "auto" stays with a saved run's.

    Whether a headless GL library works is tried in a process of its own: a failed import cannot be undone.
    """
    wanted = args.renderer
    if checkpoint and wanted == "auto" and checkpoint["parts"]["counters"]["renderer"] != "none":
        wanted = checkpoint["parts"]["counters"]["renderer"]
    if not (is_dm_control(args.env_id) and (args.obs_mode == "pixels" or args.capture_video)):
        os.environ.setdefault("MUJOCO_GL", "egl" if args.capture_video else "disable")
        return "none"
    backends = [os.environ["MUJOCO_GL"]] if "MUJOCO_GL" in os.environ else ["egl", "osmesa", "glfw"]
    probe = [sys.executable, "-c", "from dm_control import _render; _render.Renderer(64, 64).make_current()"]
    for backend in backends if wanted != "raycast" else ():
        try:
            subprocess.run(probe, env=os.environ | {"MUJOCO_GL": backend}, capture_output=True, timeout=60, check=True)
        except subprocess.SubprocessError:
            continue
        os.environ["MUJOCO_GL"] = backend
        return "gl"
    if wanted == "gl":
        fail("no OpenGL for --renderer gl: apt-get install -y libegl1 libgl1 (or, in a new run, --renderer raycast)")
    os.environ["MUJOCO_GL"] = "disable"
    return "raycast"  # deviation 14: pictures without OpenGL


class RayCaster:
    """GL-free picture of a MuJoCo scene: one ray per pixel, flat colour, Lambert shading, checker floor, sky."""

    def __init__(self, model, height, width, camera_id):
        self.model, self.shape, self.camera_id = model, (height, width, 3), camera_id
        self.focal = height / 2 / np.tan(np.deg2rad(model.cam_fovy[camera_id]) / 2)  # in pixels
        v, u = np.mgrid[:height, :width].reshape(2, -1) + 0.5
        self.uv = np.stack([u - width / 2, height / 2 - v], 1)  # (H*W, 2), y upwards
        rays = np.column_stack([self.uv, np.full(len(u), -self.focal)])  # a camera looks along its -z
        self.rays = rays / np.linalg.norm(rays, axis=1, keepdims=True)
        # GL shows groups 0-2; no ray meets a skin (dog), so its hidden collision geoms in group 3 stand in for it
        self.groups = np.array([1, 1, 1, model.nskin > 0, 0, 0], np.uint8)
        rgba, matid = model.geom_rgba.copy(), model.geom_matid.copy()
        if model.nskin:
            rgba[model.geom_group > 2], matid[model.geom_group > 2] = model.skin_rgba[0], model.skin_matid[0]
        self.colors, self.planes = self._rgba(rgba, matid)[:, :3].astype(float), []
        for i in range(model.ngeom):
            texture = self._texture(matid[i]) * self.colors[i]
            if model.geom_type[i] == 0 and texture.size > 3:
                self.planes.append((i, texture))
            self.colors[i] = texture.mean((0, 1))
        i = np.flatnonzero(model.tex_type == 2)[0]
        size, n, start = model.tex_width[i], model.tex_nchannel[i], model.tex_adr[i]
        side = model.tex_data[start : start + size * size * n].reshape(size, size, n)  # of a cube, the first
        self.sky = side[:, size * 3 // 8 : size * 5 // 8 + 1, :3].mean(1) / 255  # by elevation: the middle columns
        # mj_multiRay culls by the box of a body's colliding geoms, and misplaces it: balls around all geoms do not cull
        reach, bodies = np.zeros(model.nbody), np.flatnonzero(model.body_bvhnum)
        center = np.linalg.norm(model.geom_pos - model.body_ipos[model.geom_bodyid], axis=1)
        np.maximum.at(reach, model.geom_bodyid, center + np.where(model.geom_rbound > 0, model.geom_rbound, 1e10))
        self.roots, self.boxes = model.body_bvhadr[bodies], reach[bodies, None] * [0, 0, 0, 1, 1, 1]

    def _rgba(self, rgba, matid):
        """The viewer's rule: a material gives the colour unless the object's own differs from the default grey."""
        own = (matid < 0) | (rgba != np.float32([0.5, 0.5, 0.5, 1])).any(1)
        return np.where(own[:, None], rgba, self.model.mat_rgba[matid])

    def _texture(self, matid, cells=10):
        """The material's texture as cells x cells mean colours (coarse: checkers stay, fine grain goes), else white."""
        m, i = self.model, self.model.mat_texid[matid, 1] if matid >= 0 else -1
        if i < 0:
            return np.ones((1, 1, 3))
        h, w, n, start = m.tex_height[i], m.tex_width[i], m.tex_nchannel[i], m.tex_adr[i]
        texture, c = m.tex_data[start : start + h * w * n].reshape(h, w, n), min(cells, h, w)
        return texture[: h // c * c, : w // c * c, :3].reshape(c, h // c, c, w // c, 3).mean((1, 3)) / 255

    def _cast(self, data, origin, rays):
        import mujoco  # here, so that runs without pictures do without it

        hits, distance, normals = np.zeros(len(rays), np.int32), np.zeros(len(rays)), np.zeros(rays.shape)
        kept, n = self.model.bvh_aabb[self.roots], len(rays)
        self.model.bvh_aabb[self.roots] = self.boxes
        mujoco.mj_multiRay(
            self.model, data, origin, rays.ravel(), self.groups, True, -1, hits, distance, normals.ravel(), n, 1e9
        )
        self.model.bvh_aabb[self.roots] = kept  # collision detection finds its own boxes again
        return hits, distance, normals

    def render(self, data):
        """Picture (H, W, 3) uint8 of the current state, a fresh array."""
        m, origin, frame = self.model, data.cam_xpos[self.camera_id], data.cam_xmat[self.camera_id].reshape(3, 3)
        rays = self.rays @ frame.T
        hits, distance, normals = self._cast(data, origin, rays)
        slope = np.clip(rays[:, 2] / np.hypot(rays[:, 0], rays[:, 1]), -1, 1)  # texture row, as on a cube's side
        color = self.sky[((1 - slope) / 2 * (len(self.sky) - 1)).astype(int)]
        seen = np.flatnonzero(hits >= 0)
        rays, hits, distance, normals = rays[seen], hits[seen], distance[seen], normals[seen]
        points, paint, head = origin + rays * distance[:, None], self.colors[hits], m.vis.headlight
        facing = np.einsum("ij,ij->i", normals, rays)
        light = head.ambient + head.diffuse * np.maximum(normals @ frame[:, 2], 0)[:, None]
        for i, texture in self.planes:
            on, mat, size = np.flatnonzero(hits == i), m.geom_matid[i], m.geom_size[i, :2]
            local = (points[on] - data.geom_xpos[i]) @ data.geom_xmat[i].reshape(3, 3)[:, :2]
            # one image covers two units (uniform) or the whole plane, laid from the corner at -x, +y
            scale = m.mat_texrepeat[mat] / 2 / (1 if m.mat_texuniform[mat] else np.where(size > 0, size, 1))
            s, t = ((local * [1, -1] + size) * scale % 1 * len(texture)).astype(int).T
            blur = np.clip(1.5 + distance[on] / self.focal * 2 * scale.max() / np.minimum(facing[on], -1e-3), 0, 1)
            paint[on] += (texture[t, s] - paint[on]) * blur[:, None]  # squares smaller than a pixel become their mean
            light[on] = np.minimum(light[on], 1)  # GL clips light before it meets a texture
        for i in range(m.nlight):
            axis = data.light_xdir[i]  # a directional light (type 1) is a far one
            source = m.stat.center - 100 * m.stat.extent * axis if m.light_type[i] == 1 else data.light_xpos[i]
            to = source - points
            far = np.sqrt(np.einsum("ij,ij->i", to, to))
            to /= far[:, None]
            lit = np.maximum(np.einsum("ij,ij->i", normals, to), 0)
            if m.light_type[i] == 0:  # a spot
                cosine = np.maximum(-to @ axis, 0)
                lit *= (cosine > np.cos(np.deg2rad(m.light_cutoff[i]))) * cosine ** m.light_exponent[i]
            if len(on := np.flatnonzero(lit > 0.05)):
                lit[on] *= self._cast(data, source, -to[on])[1] > far[on] - 1e-3 * m.stat.extent
            light += m.light_ambient[i] + m.light_diffuse[i] * lit[:, None]
        color[seen], depth = paint * light, np.full(len(color), np.inf)
        depth[seen] = -distance * self.rays[seen, 2]
        self._markers(data, origin, frame, color, depth)
        return (np.clip(color, 0, 1) * 255 + 0.5).astype(np.uint8).reshape(self.shape)

    def _markers(self, data, origin, frame, color, depth):
        """Draws what rays do not meet, sphere sites and spatial tendons, over `color` as shaded discs and lines."""
        m, head, points = self.model, self.model.vis.headlight, data.wrap_xpos.reshape(-1, 3)
        rgba = self._rgba(m.site_rgba, m.site_matid)
        sites = np.flatnonzero((m.site_group < 3) & (m.site_type == 2) & (m.site_rgba[:, 3] > 0))
        todo = [(data.site_xpos[[i, i]], m.site_size[i, 0], rgba[i]) for i in sites]
        rgba = self._rgba(m.tendon_rgba, m.tendon_matid)
        for i in np.flatnonzero((m.tendon_group < 3) & (data.ten_wrapnum > 1)):
            taut = m.tendon_limited[i] and data.ten_length[i] > m.tendon_range[i, 1]  # GL shows it in a warning colour
            path = points[data.ten_wrapadr[i] :][: data.ten_wrapnum[i]]
            color_i = m.vis.rgba.constraint if taut else rgba[i]
            todo += [(ends, m.tendon_width[i], color_i) for ends in zip(path[:-1], path[1:], strict=True)]
        for ends, radius, rgba in todo:
            ends = (np.array(ends) - origin) @ frame
            if ends[:, 2].max() < -radius:  # in front of the camera
                a, b = -self.focal * ends[:, :2] / ends[:, 2:]
                along = np.clip((self.uv - a) @ (b - a) / max((b - a) @ (b - a), 1e-9), 0, 1)
                z = -ends[0, 2] - along * (ends[1, 2] - ends[0, 2])
                r, d = radius * self.focal / z, np.hypot(*(self.uv - a - along[:, None] * (b - a)).T)
                cover = np.clip(r - d + 0.5, 0, 1) - np.clip(-r - d + 0.5, 0, 1)  # share of the pixel, also for r < 0.5
                shade = np.sqrt(np.clip(1 - (d / np.maximum(r, 0.5)) ** 2, 0, 1))[:, None]
                cover = (cover * rgba[3] * (z - radius < depth))[:, None]
                color += cover * (rgba[:3] * (head.ambient + head.diffuse * shade) - color)


# === Evaluation ===


def evaluate(agent: Agent, envs: gym.vector.VectorEnv, args: Args, device: torch.device, stop: "StopRequest"):
    """Plays args.eval_episodes, actions sampled, with generators and seeds of its own: training does not notice.

    Returns the returns (episodes,) and of the first environment's first episode 1,000 steps at most: obs, action,
    reward (T, 1, ...).
    """
    generator = make_generator(device, args.seed, 98)
    seeds = np.random.default_rng([args.seed, 99]).integers(2**31, size=args.eval_episodes)  # deviation 10: the same
    number = np.arange(envs.num_envs)  # of each environment's episode: all play their share, or short ones would win
    returns, played = [], []
    dones, state = np.ones(envs.num_envs, bool), agent.world_model.rssm.initial(envs.num_envs)
    action, rewards = np.zeros((envs.num_envs, agent.action_dim), np.float32), np.zeros(envs.num_envs)
    while (number < args.eval_episodes).any() and not stop.requested:
        if dones.any():
            obs, _ = envs.reset(seed=seeds[number % args.eval_episodes].tolist(), options={"reset_mask": dones})
            action, rewards = np.where(dones[:, None], np.float32(0), action), np.where(dones, 0, rewards)
            played += [(obs[:1], action[:1], rewards[:1])] if not played else []
        action, state = act(agent, obs, action, dones, state, generator)
        obs, rewards, terminations, truncations, infos = envs.step(env_action(agent, action))
        dones = terminations | truncations
        played += [(obs[:1], action[:1], rewards[:1])] if number[0] == 0 and len(played) < 1_000 else []
        returns += infos["episode"]["r"][dones & (number < args.eval_episodes)].tolist() if dones.any() else []
        number += envs.num_envs * dones
    fields = map(np.stack, zip(*played, strict=True))
    return np.array(returns), dict(zip(("obs", "action", "reward"), fields, strict=False))  # none, if stopped at once


def evaluate_and_log(agent: Agent, envs: gym.vector.VectorEnv | None, renderer: str, run: "Run"):
    """Evaluates and logs at a run's present step. Returns the environments for the next time; None: to be made anew."""
    args = run.args
    if envs is None:
        video = run.picture("videos/evaluation.mp4") if args.capture_video else None
        envs = run.make_envs(make_vector_env, args, renderer, args.eval_episodes, video)
        envs.on_fault = run.abort
    returns, episode = evaluate(agent, envs, args, run.device, run.stop)
    if not run.stop.requested:
        run.log_evaluation(returns)
        warn_of_failure(draw_returns, run)
        warn_of_failure(log_open_loop, agent, episode, run)
    if args.capture_video:  # the film is written when its environment closes
        envs.close()
        return None
    return envs


def evaluate_run(args: Args) -> str:
    """Plays the agent of a run folder and prints its returns; with args.capture_video one episode is filmed."""
    checkpoint = load_checkpoint(args.evaluate, args)
    free = "evaluate eval_episodes num_envs capture_video cuda seed renderer bfloat16 compile cudagraphs buffer_on_gpu"
    refuse_changes(args, checkpoint, free)
    device, stop, renderer = choose_device(args), StopRequest(), choose_renderer(args, checkpoint)
    video = f"{args.evaluate}/videos/evaluate.mp4" if args.capture_video else None
    envs = make_vector_env(args, renderer, args.eval_episodes, video)
    agent = Agent(envs.single_observation_space, envs.single_action_space, args).to(device)
    with must_fit(args.evaluate):
        agent.load_state_dict(checkpoint["parts"]["agent"])
    returns, _ = evaluate(agent, envs, args, device, stop)
    envs.close()
    if not stop.requested:
        single = " ".join(f"{episodic_return:.1f}" for episodic_return in returns)
        print(f"{args.env_id} at step {checkpoint['global_step']}, renderer {renderer}:")
        print(f"return {returns.mean():.1f} +- {returns.std():.1f} ({len(returns)} episodes: {single})")
    stop.exit()
    return args.evaluate


@torch.no_grad()
def open_loop(agent: Agent, episode: dict, starts: list[int], length: int, generator: torch.Generator) -> tuple:
    """Filters an episode (T, 1, ...), then predicts `length` steps after each start from the actions alone.

    Returns truth and prediction (length, starts, ...) of the preprocessed observations, and of the rewards.
    """
    model, rssm, device = agent.world_model, agent.world_model.rssm, generator.device
    obs, is_first = preprocess(episode["obs"]), torch.zeros(len(episode["obs"]), 1, device=device)
    noise = torch.rand(len(obs), 1, STOCH, generator=generator, device=device)
    states = rssm.observe(*rssm.initial(1), episode["action"], model.embed(obs), is_first, noise)
    (stoch, deter), feats = (state[starts, 0] for state in states[:2]), []
    steps = torch.tensor(starts, device=device) + torch.arange(1, length + 1, device=device)[:, None]
    for action in episode["action"][steps, 0]:
        noise = torch.rand(len(starts), STOCH, generator=generator, device=device)
        stoch, deter = rssm.img_step(stoch, deter, action, noise)
        feats.append(torch.cat([stoch, deter], -1))
    feat = torch.stack(feats)
    rewards = episode["reward"][steps, 0], model.reward.mean(model.reward(feat))
    return (obs[steps, 0], model.decode(feat)), rewards


def draw_returns(run: "Run") -> None:
    """The return of all evaluations so far, mean +- standard deviation: returns.png."""
    from matplotlib.figure import Figure

    figure, evaluations = Figure(figsize=(5, 3), layout="constrained"), run.evaluations()
    axis = figure.subplots()
    axis.errorbar(list(evaluations), *zip(*evaluations.values(), strict=True), fmt="o-", capsize=2)
    axis.set(xlabel="environment steps", ylabel="return", title=run.args.env_id)
    figure.savefig(f"{run.folder}/returns.png")


def log_open_loop(agent: Agent, episode: dict, run: "Run") -> None:
    """Open-loop predictions of an evaluation episode: error by horizon, strips truth / model / error."""
    context, longest = 5, len(episode["obs"]) - 1
    length = min(45, longest - context)
    if length < 1:
        return
    tensors = {name: torch.from_numpy(array).to(run.device) for name, array in episode.items()}
    starts = np.linspace(context, longest - length, 6).astype(int).tolist()
    generator = make_generator(run.device, run.args.seed, 97)
    (truth, model), (reward, predicted) = open_loop(agent, tensors, starts, length, generator)
    obs_mse, reward_error = ((model - truth) ** 2).flatten(2).mean((1, 2)), (predicted - reward).abs().mean(1)
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3), layout="constrained")
    curves = {"obs_mse": obs_mse, "reward_error": reward_error}
    for axis, (name, error) in zip(figure.subplots(1, 2), curves.items(), strict=True):  # (length,)
        run.log({f"open_loop/{name}_horizon_{k}": error[k - 1] for k in (1, 5, 15, 45) if k <= length})
        axis.plot(np.arange(1, length + 1), error.cpu())
        axis.set(xlabel="steps since the last observation", ylabel=name, ylim=(0, None))
    figure.savefig(run.picture("open_loop_error.png"))
    if episode["obs"].dtype == np.uint8:
        rows = truth + 0.5, (model + 0.5).clamp(0, 1), ((model - truth + 1) / 2).clamp(0, 1)
        rgb = [0, 1, 2] if truth.shape[2] == 3 else [-1, -1, -1]  # grey, or the newest of stacked frames
        strips = torch.cat(rows, -2)[:, :, rgb]  # (T, B, 3, 3 * 64, 64)
        frames = strips.permute(0, 3, 1, 4, 2).flatten(2, 3)  # (T, 3 * 64, B * 64, 3)
        write_gif(run.picture("open_loop_truth_model_error.gif"), (frames * 255).byte().cpu().numpy())
        played = episode["obs"][:, 0][..., rgb]
        write_gif(run.picture("evaluation.gif"), played[:: max(len(played) // 100, 1)])


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


def join_ranks(args: Args, shared: str) -> Args:
    """Joins the processes that torchrun has started. Returns the settings of this one: its share of those named.

    Each plays environments of its own, into a replay of its own, and learns from its share of every batch; gradients
    are averaged, so that all have the same networks. A process on its own has everything.
    """
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world > 1 and args.evaluate is not None:
        fail("--evaluate is for one process: python, not torchrun")
    shares, before, saves = {name: getattr(args, name) // world for name in shared.split()}, world, 0
    if args.resume is not None:
        before, saves = load_checkpoint(args.resume, args, verify=False)["parts"].get("ranks", (1, 0))
    if before != world:
        fail(f"{args.resume} was made by {before} processes, not {world}: torchrun --nproc-per-node {before} ...")
    for name, share in shares.items():
        if share * world != getattr(args, name):
            fail(f"--{name.replace('_', '-')} {getattr(args, name)} cannot be shared by {world} processes")
    if world == 1:
        return args
    cuda = choose_device(args).type == "cuda"
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=timedelta(hours=2))
    if rank and args.resume is not None:
        shares["resume"] = f"{args.resume}/rank{rank}"
        settle(shares["resume"], saves)
    return replace(args, seed=args.seed ^ rank << 40, **shares)


def agree(*values: float) -> list[float]:
    """The largest of each value over all processes, once all are here."""
    tensor = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return tensor.tolist()


def settle(folder: str, saves: int) -> None:
    """What a process wrote for the newest checkpoint takes the place of what it wrote for the one before."""
    with contextlib.suppress(FileNotFoundError):
        os.replace(f"{folder}/{saves}/checkpoint.pt", f"{folder}/checkpoint.pt")
    with contextlib.suppress(FileNotFoundError):
        os.rmdir(f"{folder}/{saves}")


class RankedRun(Run):
    """A run of several processes, which step, learn, save and stop together.

    The first, rank 0, evaluates and speaks. Every other has a folder in the run's, for its log and its checkpoints.
    """

    def __init__(self, args: Args, checkpoint: dict | None):
        self.rank, folders = dist.get_rank(), [None]
        self.launcher = "torchrun", "--nproc-per-node", os.environ.get("LOCAL_WORLD_SIZE", str(dist.get_world_size()))
        self.ranks = checkpoint["parts"]["ranks"] if checkpoint else [dist.get_world_size(), 0]  # and saves so far
        if self.rank == 0:
            super().__init__(args, checkpoint)
            folders = [self.folder]
        dist.broadcast_object_list(folders)
        if self.rank:
            folder = f"{folders[0]}/rank{self.rank}"
            os.makedirs(folder, exist_ok=True)
            super().__init__(replace(args, resume=folder, track=False, save_model=False), checkpoint)
            self.say = lambda line: None
            Bar.__init__ = functools.partialmethod(Bar.__init__, disable=True)
        if agree(*self.ranks) != self.ranks:
            fail(f"{self.folder}/checkpoint.pt is older than those of the other processes")
        self.asked, self.agreed = self.stop, copy(self.stop)  # what this process was asked; what all know of
        self.stop, self.agreed.lost = self.agreed, self.asked.lost

    def listen(self) -> None:
        """All learn what one was asked (to stop) and what the first has done (an evaluation)."""
        requested, self.next_eval = agree(self.asked.requested, self.next_eval)
        self.stop, self.agreed.requested = self.agreed, int(requested)

    def tick(self, doing: str) -> bool:
        self.listen()
        return super().tick(doing)

    def goes_on(self, dones: np.ndarray) -> bool:
        self.listen()
        return super().goes_on(np.ones(self.args.num_envs))  # all save at once, whatever has ended

    def eval_due(self, dones: np.ndarray) -> bool:
        due = super().eval_due(dones) and self.rank == 0
        if due:
            self.stop = self.asked  # until all meet again
        return due

    def save(self) -> None:
        """All write, the first one last: its file makes theirs the checkpoint."""
        home, self.ranks[1] = self.folder, self.ranks[1] + 1
        self.parts["ranks"], self.folder = self.ranks, home + f"/{self.ranks[1]}" * (self.rank > 0)
        os.makedirs(self.folder, exist_ok=True)
        self.report()
        began = self.eval_began = time.perf_counter()  # the writing of the others is left out, too
        for first in (False, True):
            if first == (self.rank == 0):
                super().save()
            agree(0)
        self.leave_out(began)
        self.eval_began, self.folder = None, home
        settle(home, self.ranks[1])

    def abort(self, fault: str) -> NoReturn:
        """One process alone cannot save."""
        raise SystemExit(f"\nerror: {fault}; the last checkpoint stays as it is")


def write_gif(path: str, frames: np.ndarray) -> None:
    """Animation of frames (T, H, W, 3) uint8; the 64 colours by octree, which keeps small bright things."""
    from PIL import Image

    first, *others = (Image.fromarray(frame).quantize(64, Image.Quantize.FASTOCTREE) for frame in frames)
    first.save(path, save_all=True, append_images=others, duration=80, loop=0)


def make_update(agent: Agent, optimizer: LaProp, args: Args) -> Callable[[dict, dict], tuple]:
    """`update` as (batch, noise) -> (metrics, latents), made fast as the flags ask; the eager one is the reference."""
    functions = tuple(torch.compile(function) for function in LOSSES) if args.compile else LOSSES
    update_fn = functools.partial(update, agent, optimizer, args=args, functions=functions)
    if not args.cudagraphs:
        return update_fn
    keys = []  # of batch and noise, whose tensors a graph takes one by one

    def update_tensors(*tensors: torch.Tensor) -> tuple:
        parts = iter(tensors)
        return update_fn(*({name: next(parts) for name in names} for names in keys))

    def update_dicts(batch: dict, noise: dict) -> tuple:
        keys[:] = list(batch), list(noise)
        return graphed(*batch.values(), *noise.values())

    graphed = GraphedFunction(update_tensors)
    return update_dicts


class GraphedFunction:
    """A function of tensors as one CUDA graph: three real calls on a side stream, then one is captured and replayed.

    The graph is of the largest shape seen; smaller calls (the last batch of an epoch) stay eager. Returned tensors are
    overwritten by the next call. Random numbers may come from those of the generators that live on the GPU.
    """

    def __init__(self, function: Callable, generators: dict | None = None):
        self.function, self.graph, self.static, self.calls = function, None, None, 0
        self.generators = [g for g in (generators or {}).values() if isinstance(g, torch.Generator)]
        self.stream = torch.cuda.Stream()

    def __call__(self, *tensors: torch.Tensor):
        if self.static is None or tensors[0].numel() > self.static[0].numel():
            self.static, self.graph, self.calls = [tensor.clone() for tensor in tensors], None, 0
        if tensors[0].shape != self.static[0].shape:
            return self.function(*tensors)
        for static, new in zip(self.static, tensors, strict=True):
            static.copy_(new)
        self.calls += 1
        if self.calls <= 3:
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                result = self.function(*self.static)
            torch.cuda.current_stream().wait_stream(self.stream)
            return result
        if self.graph is None:
            self.graph = torch.cuda.CUDAGraph()
            for generator in self.generators:
                self.graph.register_generator_state(generator)
            with torch.cuda.graph(self.graph):
                self.result = self.function(*self.static)
        self.graph.replay()
        return self.result


CPU_SIZED = (  # benchmark/dreamer_v3.sh cpu
    "python dreamer_v3.py --env-id cartpole-swingup --obs-mode state --size laptop --action-repeat 4 "
    "--total-timesteps 160000 --batch-length 32 --imag-last 8 --train-ratio 256 --learning-rate 3e-4 --warmup 200 "
    "--buffer-size 100000"
)


def warn_if_slow(agent: Agent, rb: ReplayBuffer, args: Args, run: "Run") -> None:
    """Without a GPU: times an update's passes on zeros and says if the run would take longer than a night."""
    shape = args.batch_length, args.batch_size
    batch = {name: tensor.new_zeros(*shape, *tensor.shape[1:]) for name, tensor in rb.data.items()}
    batch |= {name: batch[name][0] for name in ("stoch", "deter")}
    copied, start = deepcopy(agent), time.perf_counter()
    compute_losses(copied, batch, draw_noise(agent, args, torch.Generator()), args)[0].backward()
    seconds = time.perf_counter() - start
    learned = args.total_timesteps / args.action_repeat * args.train_ratio  # time steps
    hours = seconds * learned / (run.args.batch_size * args.batch_length) / 3600
    if hours > 12:
        days = f"an update takes {seconds:.1f} s, the whole run about {hours / 24:.1f} days"
        run.say(f"no GPU: {days}. CPU-sized: {CPU_SIZED}")


def keep_freed_memory(device: torch.device) -> None:
    """On a CPU: glibc keeps what is freed; mapping and clearing hundreds of MB anew takes up to a fifth of an update.

    Where the C library has no mallopt nothing happens.
    """
    with contextlib.suppress(AttributeError, OSError):
        if device.type == "cpu":
            mallopt = ctypes.CDLL(None).mallopt
            mallopt(-1, -1)  # M_TRIM_THRESHOLD: never give the end of the heap back
            mallopt(-4, 0)  # M_MMAP_MAX: take no block from elsewhere than the heap


def lacks_bfloat16(device: torch.device) -> bool:
    """Whether it is a processor that computes bfloat16 by way of float32, as far as torch tells."""
    known = getattr(torch.cpu, "get_capabilities", dict)()  # not in every torch; other keys on ARM
    extensions = {known.get("avx512_bf16"), known.get("amx_bf16")}
    return device.type == "cpu" and (torch.backends.cpu.get_cpu_capability() == "AVX2" or extensions == {False})


def check_args(args: Args) -> None:
    """Refuses settings that do not go together."""
    check_bounds(args)
    if not 2 <= (args.imag_last or args.batch_length) <= args.batch_length:
        fail(f"--imag-last {args.imag_last} must be 0 (all) or 2 to --batch-length {args.batch_length} (2 or more)")
    most = args.num_envs * (args.buffer_size // args.num_envs - args.batch_length)
    if most < args.learning_starts:
        fail(f"--buffer-size {args.buffer_size} must hold the --learning-starts {args.learning_starts} sequences")
    decisions = args.total_timesteps // args.action_repeat  # nothing is learned before there are so many, and T more
    if decisions - args.num_envs * args.batch_length < args.learning_starts:
        fail(f"--learning-starts {args.learning_starts} sequences never come in {decisions} decisions")
    if not is_dm_control(args.env_id) and (args.obs_mode, args.renderer) != ("pixels", "auto"):
        fail(f"--obs-mode and --renderer are for dm_control, {args.env_id} has its own")
    draws = args.obs_mode == "pixels" or args.capture_video or args.resume or args.evaluate  # what was saved stays
    if args.renderer != "auto" and not draws:
        fail(f"--renderer {args.renderer} has nothing to draw: no pixels are seen, and there is no --capture-video")
    if args.bfloat16 and lacks_bfloat16(choose_device(args)):
        print("warning: this processor has no bfloat16 arithmetic: --bfloat16 makes it slower", file=sys.stderr)
    if args.cudagraphs and not args.evaluate and choose_device(args).type != "cuda":
        fail("--cudagraphs needs a GPU")


def check_memory(args: Args, obs_space: gym.Space, action_space: gym.Space) -> None:
    """Refuses what there is no room for: the replay; weights, gradients and moments, a batch and its dreams.

    A batch as measured in float32: images through both stacks of convolutions, dreams through GRU and heads.
    """
    with torch.device("meta"):  # tensors that have shapes alone
        agent = Agent(obs_space, action_space, args)
        rb = ReplayBuffer(args, obs_space, agent, torch.device("meta"))
    device, size = choose_device(args), SIZES[args.size]
    home = device if args.buffer_on_gpu else torch.device("cpu")
    copies = 1 + (args.save_buffer and args.num_envs > 1 and home.type == "cpu")  # a checkpoint's, of several rings
    require_memory(copies * rb.nbytes, "--buffer-size", home)
    images = math.prod(obs_space.shape) * (60 + 8 * size.depth if len(obs_space.shape) == 3 else 8)  # bytes each
    dreams = 4 * args.horizon * (8 * size.deter + 20 * size.units)
    batch = args.batch_size * (args.batch_length * images + (args.imag_last or args.batch_length) * dreams)
    weights = sum(weight.nbytes for weight in agent.parameters())
    require_memory(4 * weights + batch // (1 + args.bfloat16), "--size and sizes of batches", device)


if __name__ == "__main__":
    main(parse_args())
