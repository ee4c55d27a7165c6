# /// script
# requires-python = ">=3.11,<3.13"
# dependencies = [
#     "box2d>=2.3.10", "cma>=4.4", "gymnasium>=1.4", "matplotlib>=3.10", "moviepy>=2.2", "numpy>=2.1",
#     "opencv-python-headless>=4.11", "pillow>=11", "pygame-ce>=2.5", "tensorboard>=2.20", "torch>=2.6", "tqdm>=4.67",
#     "tyro>=1.0", "vizdoom>=1.3",
# ]
# ///
"""World Models: a VAE (V) and a mixture-density LSTM (M) learned from random play; a linear controller (C) by CMA-ES.

In TakeCover C is evolved inside M's dream alone, then scored in the real game. In CarRacing, as published, C is evolved
in the real environment on what V and M make of it; --controller-env dream is this script's extension.

Paper:      Ha & Schmidhuber 2018, World Models, arXiv 1803.10122   Reference code: hardmaru/WorldModelsExperiments
Run:        python world_models.py --env-id VizdoomTakeCover-v1          (or: uv run world_models.py ...)
            python world_models.py --env-id CarRacing-v3 [--envpool]
Resume:     python world_models.py --resume runs/<run folder> [--from-stage m]
Evaluate:   python world_models.py --evaluate runs/<run folder> [--capture-video]
Watch:      tensorboard --logdir runs
Stages:     collect -> v -> encode -> m -> c -> evaluate. The common flags mean in them:
  total_timesteps       environment steps of collect; a resume with more goes on recording and learns V, M, C anew
  checkpoint_frequency  counts environment steps, frames of V, sequences of M; C is saved after every generation
  eval_frequency        0 = no evaluation; otherwise after every eval_generations generations and at the end
  save_buffer           without it the recorded data is not in the checkpoint: a run interrupted before C starts over
Curves of V, M and C stand at global_step + their own updates or generations.
Deviations from the reference code, each also marked at the line it concerns:
  1. M is not trained on the last episodes (holdout_ratio), which its calibration is measured on.
  2. The z after the last frame of an episode is not a target of the mixture (there: the next episode's first frame).
  3. Random actions of CarRacing are held random numbers (there: randomly initialised networks).
  4. All candidates of a generation share their episodes' seeds or their dreams' noise (there: pairs of candidates).
  5. No reward for large weights in C's fitness (there: by a wrong sign).
"""

import contextlib
import ctypes
import difflib
import functools
import io
import json
import math
import multiprocessing
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from types import SimpleNamespace
from typing import Literal, NamedTuple, NoReturn

import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


@dataclass
class Args:
    exp_name: str = os.path.basename(__file__)[: -len(".py")]  # name of the experiment, part of the run folder's name
    seed: int = 1  # seed of every random generator of the run
    torch_deterministic: bool = True  # ask cuDNN for deterministic algorithms
    cuda: bool = True  # train on the GPU if there is one
    track: bool = False  # also log to Weights and Biases
    wandb_project_name: str = "model-based-rl"  # the project name at Weights and Biases
    wandb_entity: str | None = None  # the team at Weights and Biases
    capture_video: bool = False  # write an MP4 of the first episode of every evaluation into the run folder
    save_model: bool = False  # write the weights alone to {exp_name}.pt in the run folder at the end
    eval_frequency: int = 10_000  # environment steps between evaluations, 0 = none
    eval_episodes: int = 10  # episodes of one evaluation
    checkpoint_frequency: int = 50_000  # environment steps between checkpoints, 0 = only at the end or when interrupted
    save_buffer: bool = True  # keep the replay buffer in the checkpoint
    resume: str | None = None  # run folder to continue
    evaluate: str | None = None  # run folder to evaluate: plays eval_episodes, prints their returns, trains nothing

    # Algorithm specific arguments: the task
    env_id: str = "VizdoomTakeCover-v1"  # Gymnasium id with image observations (CarRacing-v3, my_module:MyEnv-v0)
    total_timesteps: int | None = None  # environment steps of random actions, recorded for V and M; default by task
    num_envs: int = 1  # environments played side by side in all stages, each in its own process if more than one
    from_stage: Literal["collect", "v", "encode", "m", "c", "evaluate"] | None = None  # with --resume: again from here
    controller_env: Literal["real", "dream"] | None = None  # where C is evolved; default by task, dream elsewhere
    render_obs: bool = False  # observe the rendered picture, where observations are no images (CartPole-v1)
    envpool: bool = False  # CarRacing-v3 by EnvPool's renderer, 8 times faster; other pictures: a run stays with it
    max_hold: int | None = None  # a random action is held for 1 to this many steps; default by task, 10 elsewhere
    min_episode_length: int | None = None  # shorter recordings are thrown away, steps; default by task, 2 elsewhere

    # V
    latent_size: int | None = None  # size of z; default by task, 32 elsewhere
    vae_depth: int = 32  # V: channels of the first convolution; the others are multiples of it
    vae_epochs: int = 10  # V: passes over all frames
    vae_batch_size: int = 100  # V: frames per batch
    vae_lr: float = 1e-4  # V: learning rate
    kl_tolerance: float = 0.5  # V: nats per latent dimension, summed over them, below which a frame's KL costs nothing

    # M
    hidden_size: int | None = None  # M: units of the LSTM; default by task, 256 elsewhere
    num_mixtures: int = 5  # M: Gaussians in the mixture of each latent dimension (K)
    sequence_length: int | None = None  # M: time steps per sequence (T); default by task, 500 elsewhere
    model_batch_size: int = 100  # M: sequences per batch (B)
    model_updates: int | None = None  # M: updates; default by task, 4000 elsewhere
    model_lr: float = 1e-3  # M: learning rate at first
    model_lr_decay: float | None = None  # M: factor per update towards a rate of 1e-5; default by task, 1 elsewhere
    done_weight: float = 10.0  # M: weight of the terminations in the loss of the end head
    holdout_ratio: float = 0.05  # M: share of the episodes, the last ones, that it is tested on and not trained with

    # the dream and C
    temperature: float = 1.15  # temperature of the dream: of the mixture's weights and, as its root, of the noise
    dream_length: int | None = None  # C: steps of a dream at most; default: the time limit of the environment
    population: int = 64  # C: candidates per generation (P)
    episodes: int = 16  # C: episodes or dreams per candidate (E), the same ones for all candidates of a generation
    generations: int = 1_800  # C: generations; may be raised on a resume
    sigma: float = 0.1  # C: standard deviation of the first generation's weights
    idle_limit: int = 0  # C in the real environment: an episode ends after so many steps without reward, 0 = never
    eval_generations: int = 10  # C: generations between evaluations, none at all with --eval-frequency 0

    # Speed
    compile: bool = False  # torch.compile the loss of V


# === Networks ===


class Spec(NamedTuple):
    """What the networks must know of a task."""

    action_kind: str
    action_dim: int  # numbers of an action as M receives it, and outputs of C (A)
    time_limit: int
    done_head: bool  # does M predict the end of an episode, and
    reward_head: bool  # the reward; not in TakeCover, where it is 1 per step

    @property
    def is_doom(self) -> bool:
        """TakeCover: M also receives the restart flag; C sees z, c and h, and has no bias. Elsewhere: z, h and 1."""
        return self.action_kind == "thirds"

    @property
    def intro(self) -> int:
        """Steps of an episode that dreams do not begin in: CarRacing opens with a zoom of 50 frames."""
        return 100 if self.action_kind == "car" else 0


class VAE(nn.Module):
    """V: a frame (3, 64, 64) in [0, 1] <-> Gaussian of z (Z,)."""

    def __init__(self, latent_size: int, depth: int):
        super().__init__()
        self.conv1 = nn.Conv2d(3, depth, 4, stride=2)  # 31 x 31
        self.conv2 = nn.Conv2d(depth, 2 * depth, 4, stride=2)  # 14 x 14
        self.conv3 = nn.Conv2d(2 * depth, 4 * depth, 4, stride=2)  # 6 x 6
        self.conv4 = nn.Conv2d(4 * depth, 8 * depth, 4, stride=2)  # 2 x 2
        self.mu = nn.Linear(32 * depth, latent_size)
        self.logvar = nn.Linear(32 * depth, latent_size)
        self.dense = nn.Linear(latent_size, 32 * depth)
        self.deconv1 = nn.ConvTranspose2d(32 * depth, 4 * depth, 5, stride=2)  # 5 x 5
        self.deconv2 = nn.ConvTranspose2d(4 * depth, 2 * depth, 5, stride=2)  # 13 x 13
        self.deconv3 = nn.ConvTranspose2d(2 * depth, depth, 6, stride=2)  # 30 x 30
        self.deconv4 = nn.ConvTranspose2d(depth, 3, 6, stride=2)  # 64 x 64
        self.apply(glorot)

    def encode(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Images (N, 3, 64, 64) -> mean and log-variance (N, Z)."""
        x = image
        for conv in (self.conv1, self.conv2, self.conv3, self.conv4):
            x = F.relu_(conv(x))
        x = x.flatten(1)
        return self.mu(x), self.logvar(x)

    def decode(self, z: torch.Tensor) -> torch.Tensor:
        """z (N, Z) -> images (N, 3, 64, 64) in [0, 1]."""
        # on a 1 x 1 input a transposed convolution is a matrix product, several times faster
        weight, bias = self.deconv1.weight, self.deconv1.bias.repeat_interleave(25)
        x = F.linear(self.dense(z), weight.flatten(1).t(), bias).unflatten(1, (-1, 5, 5))
        x = F.relu_(x).contiguous(memory_format=torch.channels_last)
        x = F.relu_(self.deconv2(x))
        x = F.relu_(self.deconv3(x))
        # stride 2 = stride 1 to four times the channels, then a shuffle: twice as fast where the channels are few
        weight, bias = F.pixel_unshuffle(self.deconv4.weight, 2), self.deconv4.bias.repeat_interleave(4)
        return torch.sigmoid(F.pixel_shuffle(F.conv_transpose2d(x, weight, bias), 2))


class MDNRNN(nn.Module):
    """M: LSTM on (z, action, TakeCover: restart flag) whose output is a mixture for each dimension of the next z.

    Dimensions are independent given h; each has K weights, means and log standard deviations of its own. With heads,
    the output ends in the logit of termination and the reward in standard deviations.
    """

    NUM_STARTS = 1000

    def __init__(self, spec: Spec, args: Args):
        super().__init__()
        self.spec, self.units, self.shape = spec, args.hidden_size, (3, args.num_mixtures, args.latent_size)
        self.inputs = args.latent_size + spec.action_dim + spec.is_doom
        self.kernel = nn.Parameter(torch.empty(self.inputs + self.units, 4 * self.units))
        self.bias = nn.Parameter(torch.zeros(4 * self.units))
        self.head = nn.Linear(self.units, math.prod(self.shape) + spec.done_head + spec.reward_head)
        nn.init.xavier_uniform_(self.kernel)
        glorot(self.head)
        with torch.no_grad():
            self.bias[self.units : 2 * self.units] = 1  # the forget gate's
        self.register_buffer("reward_mean", torch.zeros(()))
        self.register_buffer("reward_std", torch.ones(()))
        for name, size in {
            "mu": args.latent_size,
            "logvar": args.latent_size,
            "c": self.units,
            "h": self.units,
        }.items():
            self.register_buffer(f"start_{name}", torch.zeros(self.NUM_STARTS, size))  # where dreams begin

    def initial(self, batch_size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The zero state: c and h, (B, H) each."""
        return (self.bias.new_zeros(batch_size, self.units),) * 2

    def join(self, z: torch.Tensor, action: torch.Tensor, first: torch.Tensor) -> torch.Tensor:
        """The LSTM's input (..., Z + A + 0 or 1); first (...) is 1 where an episode begins."""
        return torch.cat([z, action, first[..., None]] if self.spec.is_doom else [z, action], -1)

    @staticmethod
    def cell(gates: torch.Tensor, c: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Next c and h (B, H) from the gates' inputs (B, 4 H): input, forget, output, new."""
        i, f, o, g = gates.chunk(4, -1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        return c, torch.sigmoid(o) * torch.tanh(c)

    def step(self, z, action, first, c, h) -> tuple[torch.Tensor, torch.Tensor]:
        """One step from z (B, Z), action (B, A), first (B,) and state c, h (B, H): the next state."""
        x = torch.cat([self.join(z, action, first), h], -1)
        return self.cell(torch.addmm(self.bias, x, self.kernel), c)

    def forward(self, z, action, first, c, h) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Sequences z (T, B, Z), action (T, B, A), first (T, B): outputs (T, B, ...) and the state after the last step.

        The state is zero before a step that begins an episode.
        """
        x = self.join(z, action, first)
        weight, keep = self.kernel[self.inputs :], 1 - first[..., None]
        parts = torch.addmm(self.bias, x.flatten(0, 1), self.kernel[: self.inputs]).unflatten(0, x.shape[:2])
        hs, c = LSTMSequence.apply(parts, weight, keep, c, h)
        return self.head(hs), c, hs[-1]

    def split(self, out: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Outputs -> log_pi (not normalised), mu, log_sigma (..., K, Z), end logit and reward (...) or None."""
        size, (done, reward) = math.prod(self.shape), (self.spec.done_head, self.spec.reward_head)
        mixture, *heads = out.split([size] + [1] * (done + reward), -1)
        log_pi, mu, log_sigma = mixture.unflatten(-1, self.shape).unbind(-3)
        return log_pi, mu, log_sigma, heads[0].squeeze(-1) if done else None, heads[-1].squeeze(-1) if reward else None


class LSTMSequence(torch.autograd.Function):
    """LSTM over a sequence with its derivatives written out, so that the weights' gradient is one matrix product.

    In: gates' inputs (T, B, 4 H) without the recurrent part, recurrent weights (H, 4 H), keep (T, B, 1), 0 where the
    state is zero before the step, and the state c, h (B, H). Out: all h (T, B, H) and the last c.
    """

    @staticmethod
    def forward(ctx, parts, weight, keep, c, h):
        (T, B, _), H = parts.shape, len(weight)
        gates, cs, hs = torch.empty_like(parts), parts.new_empty(T + 1, B, H), parts.new_empty(T + 1, B, H)
        cs[0], hs[0] = c, h  # before the first step
        for t in range(T):
            torch.addmm(parts[t], hs[t] * keep[t], weight, out=gates[t])
            gates[t, :, : 3 * H].sigmoid_()
            i, f, o, g = gates[t].chunk(4, 1)
            torch.addcmul(i * g.tanh_(), f, cs[t] * keep[t], out=cs[t + 1])
            torch.mul(o, torch.tanh(cs[t + 1]), out=hs[t + 1])
        ctx.save_for_backward(weight, keep, gates, cs, hs)
        return hs[1:], cs[-1]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, hs_grad, c_grad):
        weight, keep, gates, cs, hs = ctx.saved_tensors
        grads, H, h_grad = torch.empty_like(gates), len(weight), torch.zeros_like(c_grad)
        for t in reversed(range(len(gates))):
            (i, f, o, g), tanh_c = gates[t].chunk(4, 1), torch.tanh(cs[t + 1])
            i_grad, f_grad, o_grad, g_grad = grads[t].chunk(4, 1)
            h_grad = h_grad + hs_grad[t]
            c_grad = c_grad + torch.ops.aten.tanh_backward(h_grad * o, tanh_c)
            torch.mul(c_grad, g, out=i_grad)
            torch.mul(c_grad, cs[t] * keep[t], out=f_grad)
            torch.mul(h_grad, tanh_c, out=o_grad)
            g_grad.copy_(torch.ops.aten.tanh_backward(c_grad * i, g))
            sigmoids = grads[t, :, : 3 * H], gates[t, :, : 3 * H]
            sigmoids[0].copy_(torch.ops.aten.sigmoid_backward(*sigmoids))
            c_grad, h_grad = c_grad * f * keep[t], torch.mm(grads[t], weight.t()) * keep[t]
        return grads, (hs[:-1] * keep).flatten(0, 1).t() @ grads.flatten(0, 1), None, c_grad, h_grad


class Agent(nn.Module):
    """V, M and C."""

    def __init__(self, spec: Spec, args: Args):
        super().__init__()
        self.vae = VAE(args.latent_size, args.vae_depth).to(memory_format=torch.channels_last)
        self.model = MDNRNN(spec, args)
        features = args.latent_size + args.hidden_size * (2 if spec.is_doom else 1) + (not spec.is_doom)
        self.register_buffer("controller", torch.zeros(features, spec.action_dim))  # bias last

    def features(self, z: torch.Tensor, c: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
        """What C sees (B, features): z, c, h in TakeCover, else z, h and a one for the bias."""
        return torch.cat([z, c, h] if self.model.spec.is_doom else [z, h, torch.ones_like(h[:, :1])], 1)


def preprocess(frames: torch.Tensor) -> torch.Tensor:
    """Frames (N, 64, 64, 3) uint8 -> (N, 3, 64, 64) in [0, 1], a view in channels-last order."""
    return frames.movedim(-1, -3).float() / 255


def glorot(module: nn.Module) -> None:
    """TensorFlow's initial weights: Glorot uniform, zero bias."""
    if isinstance(module, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)


# === Losses ===


def vae_loss(vae: VAE, image: torch.Tensor, noise: torch.Tensor, kl_tolerance: float) -> tuple[torch.Tensor, dict]:
    """Squared error summed over an image (N, 3, 64, 64) plus KL to the unit Gaussian, mean over the batch.

    The KL, summed over the dimensions of z, counts at least kl_tolerance * Z: below that it gives no gradient.
    """
    mu, logvar = vae.encode(image)
    recon = ((vae.decode(mu + torch.exp(0.5 * logvar) * noise) - image) ** 2).sum((1, 2, 3))
    kl = -0.5 * (1 + logvar - mu**2 - torch.exp(logvar)).sum(1)
    assert recon.shape == kl.shape == image.shape[:1]
    loss = (recon + kl.clamp(min=kl_tolerance * mu.shape[1])).mean()
    return loss, {"losses/vae_recon_loss": recon.detach().mean(), "losses/vae_kl_loss": kl.detach().mean()}


def model_loss(model: MDNRNN, batch: dict, c, h, done_weight: float) -> tuple:
    """Loss of M on sequences (T, B, ...), each loss unscaled, and the state after the last step.

    batch: z, action, first, next_z, next_first, done, reward. The z after the last step of an episode belongs to the
    next one and does not count. Mixture: mean over dimensions and steps; end: cross-entropy in which terminations weigh
    done_weight; reward: squared error in standard deviations.
    """
    out, c, h = model(batch["z"], batch["action"], batch["first"], c, h)
    log_pi, mu, log_sigma, done_logit, reward = model.split(out)
    valid = 1 - batch["next_first"]  # deviation 2
    nll = mdn_nll(log_pi, mu, log_sigma, batch["next_z"]).mean(-1)
    assert nll.shape == valid.shape
    terms = {"losses/mdn_nll": (nll * valid).sum() / valid.sum().clamp(min=1)}
    if done_logit is not None:
        weight = 1 + (done_weight - 1) * batch["done"]
        terms["losses/done_loss"] = F.binary_cross_entropy_with_logits(done_logit, batch["done"], weight)
    if reward is not None:
        target = (batch["reward"] - model.reward_mean) / model.reward_std
        terms["losses/reward_loss"] = F.mse_loss(reward, target)
    return (
        sum(terms.values()),
        {name: term.detach() for name, term in terms.items()},
        done_logit,
        (c.detach(), h.detach()),
    )


def mdn_nll(log_pi: torch.Tensor, mu: torch.Tensor, log_sigma: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """-log p(target) in nats for each dimension (..., Z) under its own mixture of K Gaussians, given (..., K, Z).

    log_pi need not be normalised: -logsumexp over k of [log softmax(log_pi)_k + log N(target; mu_k, exp(log_sigma_k))].
    """
    return MixtureNLL.apply(log_pi, mu, log_sigma, target)


class MixtureNLL(torch.autograd.Function):
    """mdn_nll with its derivatives written out: a third of the passes over memory that autograd makes."""

    @staticmethod
    def forward(ctx, log_pi, mu, log_sigma, target):
        inverse = torch.exp(-log_sigma)
        scaled = (target.unsqueeze(-2) - mu).mul_(inverse)
        joint = (log_pi - log_sigma).addcmul_(scaled, scaled, value=-0.5)
        log_norm, log_prob = torch.logsumexp(log_pi, -2), torch.logsumexp(joint, -2)
        ctx.save_for_backward(log_pi, log_norm, joint, log_prob, scaled, inverse)
        return log_norm - log_prob + 0.5 * math.log(2 * math.pi)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        log_pi, log_norm, joint, log_prob, scaled, inverse = ctx.saved_tensors
        grad = grad.unsqueeze(-2)
        share = torch.exp(joint - log_prob.unsqueeze(-2)).mul_(grad)  # of the probability that each component has
        log_pi_grad = torch.exp(log_pi - log_norm.unsqueeze(-2)).mul_(grad).sub_(share)
        mu_grad = (share * scaled).neg_()
        log_sigma_grad = share.addcmul_(mu_grad, scaled)
        return log_pi_grad, mu_grad.mul_(inverse), log_sigma_grad, None


def learnable_rewards(rewards: np.ndarray, spec: Spec) -> np.ndarray:
    """Rewards (T,) of an episode without what no picture shows: CarRacing pays 1000 / (tiles of the track) for a tile.

    Here a tile is worth 3.4 on every track, the mean. It may be passed together with others; a step costs 0.1.
    """
    if spec.action_kind != "car" or not (rewards > 0).any():
        return rewards
    tile = rewards[rewards > 0].min() + 0.1
    return np.where(rewards > 0, np.round((rewards + 0.1) / tile) * 3.4 - 0.1, rewards)


# === Acting ===


def controller_action(features: torch.Tensor, weights: torch.Tensor, kind: str) -> torch.Tensor:
    """Actions (N, A), as M receives them, of N linear controllers: features (N, F), weights (N, F, A)."""
    raw = torch.tanh(torch.bmm(features.unsqueeze(1), weights).squeeze(1))
    if kind == "car":  # steer in [-1, 1]; gas in [0, 1], half at zero weights; brake the positive part
        steer, gas, brake = raw.unbind(1)
        return torch.stack([steer, (gas + 1) / 2, F.relu(brake)], 1)
    return F.one_hot(raw.argmax(1), raw.shape[1]).float() if kind == "discrete" else raw


def linear_policy(weights: torch.Tensor, kind: str) -> Callable:
    """Policy of controllers (P, F, A), each of which plays as many of the jobs as the others, one after another."""

    last_jobs, rows = None, None

    def policy(features: torch.Tensor, jobs: torch.Tensor, num_jobs: int) -> torch.Tensor:
        nonlocal last_jobs, rows
        if jobs is not last_jobs:  # a copy of megabytes, once for the many steps that the same jobs take
            last_jobs, rows = jobs, weights[jobs * len(weights) // num_jobs]
        return controller_action(features, rows, kind)

    return policy


def constant_policy(action: torch.Tensor) -> Callable:
    """Policy that always takes the same action (A,)."""
    return lambda features, jobs, num_jobs: action.expand(len(jobs), -1)


def env_action(action: np.ndarray, kind: str) -> np.ndarray:
    """Actions (N, A) as M receives them -> as the environment does."""
    if kind == "thirds":  # 0 nothing, 1 right, 2 left
        return np.where(action[:, 0] > 1 / 3, 1, np.where(action[:, 0] < -1 / 3, 2, 0))
    return action.argmax(-1) if kind == "discrete" else action


class HeldActions:
    """Random actions (N, A), each held for 1 to max_hold steps: white noise would hardly move anything."""

    def __init__(self, num: int, spec: Spec, max_hold: int, rng: np.random.Generator):
        self.spec, self.max_hold, self.rng = spec, max_hold, rng
        self.actions, self.left = np.zeros((num, spec.action_dim), np.float32), np.zeros(num, int)

    def __call__(self, restart: np.ndarray | None = None) -> np.ndarray:
        """The next actions; those where an episode begins are drawn anew."""
        new = self.left == 0 if restart is None else (self.left == 0) | restart
        actions = self.rng.uniform(-1, 1, self.actions.shape).astype(np.float32)
        if self.spec.action_kind == "discrete":
            actions = np.eye(self.spec.action_dim, dtype=np.float32)[
                self.rng.integers(self.spec.action_dim, size=len(new))
            ]
        if self.spec.action_kind == "car":  # brakes in one draw of ten (deviation 3)
            actions[:, 1:] = (actions[:, 1:] + 1) / 2
            actions[:, 2] *= self.rng.random(len(new)) < 0.1
        self.actions = np.where(new[:, None], actions, self.actions)
        self.left = np.where(new, self.rng.integers(1, self.max_hold + 1, len(new)), self.left) - 1
        return self.actions


@torch.no_grad()
def dream(agent: Agent, policy: Callable, num_jobs: int, num_dreams: int, seed: int, args: Args, stop=None, trace=None):
    """Returns and lengths (num_jobs,) of dreams that all step together.

    Job j dreams dream j % num_dreams: those with the same number begin alike and share their noise, as real episodes
    share a seed. Dreams that have ended are taken out every 50 steps. A list `trace` gets z of the first one.
    """
    model, device = agent.model, agent.controller.device
    generator = torch.Generator(device).manual_seed(seed)
    normal = functools.partial(torch.randn, num_dreams, args.latent_size, generator=generator, device=device)
    start = torch.randint(model.NUM_STARTS, (num_dreams,), generator=generator, device=device)
    jobs = torch.arange(num_jobs, device=device)
    which = jobs % num_dreams
    z = (model.start_mu[start] + torch.exp(0.5 * model.start_logvar[start]) * normal())[which]
    c, h = model.start_c[start][which], model.start_h[start][which]
    first = (c == 0).all(1).float()
    returns, lengths = torch.zeros(num_jobs, device=device), torch.zeros(num_jobs, device=device)
    alive = torch.ones(num_jobs, device=device)
    for t in range(args.dream_length):
        if t % 50 == 0 and t:
            kept = alive.nonzero().squeeze(1)  # host sync
            if not len(kept) or (stop and stop.requested):
                break
            jobs, which, z, c, h, first, alive = (x[kept] for x in (jobs, which, z, c, h, first, alive))
        if trace is not None:
            trace.append(z[0].clone())
        action = policy(agent.features(z, c, h), jobs, num_jobs)
        uniform = torch.rand(num_dreams, args.latent_size, generator=generator, device=device)
        noise = uniform[which], normal()[which]
        z, c, h, rewards, ends = dream_step(model, z, action, first, c, h, *noise, args.temperature)
        returns[jobs] += rewards * alive
        lengths[jobs] += alive
        alive, first = alive * ~ends, torch.zeros_like(first)
    if trace is not None:
        del trace[int(lengths[0]) :]  # the rest is of others
    return returns, lengths


def dream_step(model: MDNRNN, z, action, first, c, h, uniform, normal, temperature: float) -> tuple:
    """Next z (N, Z), c, h (N, H), rewards (N,) and ends (N,) of N dreams; it ends where P[termination] > 1/2."""
    c, h = model.step(z, action, first, c, h)
    log_pi, mu, log_sigma, done_logit, reward = model.split(model.head(h))
    z = mixture_sample(log_pi, mu, log_sigma, uniform, normal, temperature)
    if reward is not None:
        reward = reward * model.reward_std + model.reward_mean
    elif done_logit is not None:
        reward = torch.ones_like(done_logit)  # TakeCover: one for each step survived
    else:  # M of the car experiment predicts z alone
        return z, c, h, torch.zeros_like(z[:, 0]), torch.zeros_like(z[:, 0], dtype=torch.bool)
    return z, c, h, reward, done_logit > 0


def mixture_sample(log_pi, mu, log_sigma, uniform: torch.Tensor, normal: torch.Tensor, temperature: float):
    """z (N, Z) from mixtures (N, K, Z): one component for each dimension by `uniform` (N, Z), noise `normal` (N, Z).

    The logits of the weights are divided by the temperature; the noise is multiplied by its square root.
    """
    bounds = torch.softmax(log_pi / temperature, 1).cumsum(1)[:, :-1]
    component = (uniform.unsqueeze(1) > bounds).sum(1, keepdim=True)
    mu, log_sigma = mu.gather(1, component).squeeze(1), log_sigma.gather(1, component).squeeze(1)
    return mu + torch.exp(log_sigma) * math.sqrt(temperature) * normal


@torch.no_grad()
def play(agent: Agent, envs, policy: Callable, seeds: np.ndarray, generator, stop, idle_limit: int = 0):
    """Returns and lengths (J,) of real episodes with these seeds (J,); an environment takes the next as it ends one.

    Each step: z_t from frame t, action from [z_t, h_t], step, then (z_t, action) to M for h_{t+1}. With idle_limit an
    episode ends after so many steps without a positive reward, and the rest of its time is paid like its last step.
    """
    device, num_envs, model = agent.controller.device, envs.num_envs, agent.model
    kind, limit = model.spec.action_kind, model.spec.time_limit
    jobs, queue = np.full(num_envs, -1), iter(range(len(seeds)))
    returns, lengths = np.full(len(seeds), np.nan), np.zeros(len(seeds), int)
    total, steps, idle = np.zeros(num_envs), np.zeros(num_envs, int), np.zeros(num_envs, int)
    dones, (c, h) = np.ones(num_envs, bool), model.initial(num_envs)
    while np.isnan(returns).any() and not stop.requested:
        if dones.any():
            for i in np.flatnonzero(dones):
                jobs[i] = next(queue, -1)  # without a job left, an environment plays on uncounted
                total[i] = steps[i] = idle[i] = 0
            obs, _ = envs.reset(seed=[int(seed) for seed in seeds[jobs]], options={"reset_mask": dones})
        first = torch.as_tensor(dones, device=device, dtype=torch.float32)
        c, h = c * (1 - first[:, None]), h * (1 - first[:, None])
        mu, logvar = agent.vae.encode(preprocess(torch.as_tensor(obs, device=device)))
        z = mu + torch.exp(0.5 * logvar) * torch.randn(mu.shape, generator=generator, device=device)
        action = policy(agent.features(z, c, h), torch.as_tensor(jobs % len(seeds), device=device), len(seeds))
        obs, rewards, terminations, truncations, _ = envs.step(env_action(action.cpu().numpy(), kind))  # host sync
        c, h = model.step(z, action, first, c, h)
        total, steps, idle = total + rewards, steps + 1, np.where(rewards > 0, 0, idle + 1)
        given_up = (idle == idle_limit) & (idle_limit > 0)
        total += np.where(given_up & ~terminations, rewards * (limit - steps), 0)
        dones = terminations | truncations | given_up
        for i in np.flatnonzero(dones & (jobs >= 0)):
            returns[jobs[i]], lengths[jobs[i]] = total[i], steps[i]
    return returns, lengths


# === Updates ===


def update_vae(vae: VAE, optimizer, image: torch.Tensor, noise: torch.Tensor, args: Args, loss_fn=vae_loss) -> dict:
    """One step of V on images (N, 3, 64, 64) with noise (N, Z). Returns detached scalars, no host sync."""
    optimizer.zero_grad(set_to_none=True)
    loss, metrics = loss_fn(vae, image, noise, args.kl_tolerance)
    loss.backward()
    optimizer.step()
    return metrics


def update_model(model: MDNRNN, optimizer, batch: dict, state: tuple, args: Args) -> tuple[dict, tuple]:
    """One step of M on sequences (T, B, ...) from state c, h: detached scalars and the last state, no host sync."""
    optimizer.zero_grad(set_to_none=True)
    loss, metrics, _, state = model_loss(model, batch, *state, args.done_weight)
    loss.backward()
    nn.utils.clip_grad_value_(model.parameters(), 1.0)  # by value, not by norm
    optimizer.step()
    return metrics, state


def model_learning_rate(update: int, args: Args) -> float:
    """From model_lr towards 1e-5, geometrically; constant with a decay of 1."""
    return 1e-5 + (args.model_lr - 1e-5) * args.model_lr_decay**update


# === Replay buffer ===


class ReplayBuffer:
    """Recorded episodes end to end: frame t was seen, action t taken, reward t received for it.

    The frames are in a file of the run folder, the rest in memory and in the checkpoint. The frame after the last
    action of an episode is not kept (TakeCover's is black).
    """

    def __init__(self, frames):
        self.frames = frames  # the file, see ArrayFile
        self.episodes: list[tuple[np.ndarray, np.ndarray]] = []  # actions (T, A), rewards (T,)
        self.terminated: list[bool] = []
        self.checksums: list[int] = []

    def __len__(self) -> int:
        return sum(len(rewards) for _, rewards in self.episodes)

    def add(self, frames: np.ndarray, actions: np.ndarray, rewards: np.ndarray, terminated: bool) -> None:
        """An episode: frames (T, 64, 64, 3) uint8, actions (T, A), rewards (T,); was its last step a termination?"""
        self.frames.append(frames)
        self.episodes.append((actions.astype(np.float32), rewards.astype(np.float32)))
        self.terminated.append(bool(terminated))
        self.checksums.append(zlib.crc32(frames.tobytes()))

    @property
    def lengths(self) -> np.ndarray:
        return np.array([len(rewards) for _, rewards in self.episodes])

    @property
    def returns(self) -> np.ndarray:
        return np.array([rewards.sum() for _, rewards in self.episodes])

    def arrays(self) -> dict[str, np.ndarray]:
        """Of all time steps: action (N, A), reward (N,), first and done (N,): is it the first, does it terminate?"""
        starts = np.cumsum(self.lengths) - self.lengths
        first, done = np.zeros(len(self), np.float32), np.zeros(len(self), np.float32)
        first[starts], done[starts + self.lengths - 1] = 1, self.terminated
        action, reward = (np.concatenate(column) for column in zip(*self.episodes, strict=True))
        return {"action": action, "reward": reward, "first": first, "done": done}

    def state_dict(self) -> dict:
        self.frames.sync()
        state = {"lengths": self.lengths.tolist(), "terminated": list(self.terminated)}
        state["checksums"] = list(self.checksums)
        if not self.episodes:
            return state
        arrays = self.arrays()
        return state | {name: torch.from_numpy(arrays[name]) for name in ("action", "reward")}

    def load_state_dict(self, state: dict) -> None:
        """Also compares checksums of a few episodes: the file must be the one that was recorded."""
        lengths = state["lengths"]
        if not lengths:
            return
        self.frames.cut(sum(lengths))
        self.terminated, self.checksums = list(state["terminated"]), list(state["checksums"])
        columns = (state[name].numpy().copy() for name in ("action", "reward"))
        cuts = np.cumsum(lengths)[:-1]
        self.episodes = list(zip(*(np.split(column, cuts) for column in columns), strict=True))
        starts = np.cumsum(lengths) - lengths
        for i in np.unique(np.linspace(0, len(lengths) - 1, 16).astype(int)):
            self.frames.verify(starts[i], starts[i] + lengths[i], self.checksums[i])


class Latents:
    """All recorded time steps on the device, for M: mu and logvar (N, Z) float16, action, reward, first, done."""

    def __init__(self, rb: ReplayBuffer, rows: np.ndarray, spec: Spec, holdout_ratio: float, device: torch.device):
        rows = torch.from_numpy(np.array(rows)).to(device)  # (N, 2, Z)
        arrays = rb.arrays()
        learnable = [learnable_rewards(rewards, spec) for _, rewards in rb.episodes]
        arrays["reward"] = np.concatenate(learnable).astype(np.float32)
        self.data = {name: torch.from_numpy(array).to(device) for name, array in arrays.items()}
        self.data |= {"mu": rows[:, 0], "logvar": rows[:, 1]}
        ends = np.cumsum(rb.lengths)
        self.spans = np.stack([ends - rb.lengths, ends], 1)  # first row of each episode, and the one after its last
        # deviation 1
        held_out = min(max(int(holdout_ratio * len(ends)), 1), len(ends) - 1)
        self.train, self.holdout = (self.spans[:-held_out], self.spans[-held_out:]) if held_out else (self.spans,) * 2

    def streams(self, spans: np.ndarray, batch_size: int, length: int) -> torch.Tensor:
        """Rows of episodes joined end to end and cut into B streams, which are cut into S sequences: (S, T + 1, B).

        A sequence begins with the row that the one before it ends with: its last row is a target only.
        """
        rows = np.concatenate([np.arange(start, end) for start, end in spans])
        length = min(length, len(rows) - 1)
        batch_size = max(min(batch_size, len(rows) // (length + 1)), 1)
        per_stream = len(rows) // batch_size
        streams = rows[: per_stream * batch_size].reshape(batch_size, per_stream).T
        starts = range(0, per_stream - length, length)
        pieces = np.stack([streams[start : start + length + 1] for start in starts])
        return torch.from_numpy(pieces).to(self.data["mu"].device)

    def batch(self, rows: torch.Tensor, noise: torch.Tensor) -> dict:
        """Sequences for rows (T + 1, B), z drawn afresh by noise (T + 1, B, Z); what t predicts is what t + 1 sees."""
        columns = {name: column[rows] for name, column in self.data.items()}
        z = columns.pop("mu").float() + torch.exp(0.5 * columns.pop("logvar").float()) * noise
        batch = {name: column[:-1] for name, column in columns.items()}
        return batch | {"z": z[:-1], "next_z": z[1:], "next_first": columns["first"][1:]}


# === Training ===


def collect(run: "Stages") -> bool:
    """Records episodes of held random actions, until the run has made total_timesteps environment steps."""
    args, rb, num_envs = run.args, run.rb, run.args.num_envs
    held = HeldActions(num_envs, run.spec, args.max_hold, run.rng["actions"])
    tracks: list[list[tuple]] = [[] for _ in range(num_envs)]
    needed, free = (args.total_timesteps - run.step) * rb.frames.row_bytes, shutil.disk_usage(run.folder).free
    if needed > free:
        run.say(f"the frames need up to {needed / 1e9:.0f} GB, the disk has {free / 1e9:.0f} GB left")

    def store(i: int, terminated: bool) -> None:
        if len(tracks[i]) >= args.min_episode_length:
            rb.add(*(np.stack(column) for column in zip(*tracks[i], strict=True)), terminated)
        tracks[i] = []

    run.begin(args.total_timesteps)
    dones, last_report = np.ones(num_envs, bool), (run.step, time.perf_counter())
    while True:
        if run.stop.requested or run.step >= args.total_timesteps:
            for i in range(num_envs):
                store(i, False)  # cut off, not terminated
        run.done = run.step
        if not run.goes_on(dones):
            break
        if dones.any():
            seeds = run.rng["reset"].integers(2**31, size=num_envs).tolist()
            obs, _ = run.envs.reset(seed=seeds, options={"reset_mask": dones})
        actions = held(dones)
        next_obs, rewards, terminations, truncations, infos = run.envs.step(env_action(actions, run.spec.action_kind))
        if not np.isfinite(rewards).all():
            raise SystemExit(f"error: not finite at step {run.step}: the environment's reward")
        for i, track in enumerate(tracks):
            track.append((obs[i].copy(), actions[i], rewards[i]))
        obs, dones = next_obs, terminations | truncations
        run.step += num_envs
        run.progress.update(num_envs)
        for i in np.flatnonzero(dones):
            store(i, terminations[i])
        if dones.any():
            run.log_episodes(infos, dones)
            now = time.perf_counter()
            run.log({"charts/SPS": (run.step - last_report[0]) / (now - last_report[1])})
            last_report = run.step, now
    if run.stop.requested:
        return False
    if len(rb) < 2:
        short = f"no episode of {args.min_episode_length} steps in {run.step}"
        raise SystemExit(f"error: {short}: nothing to learn from")
    run.collected = run.step
    return True


def train_vae(run: "Stages") -> bool:
    """V: passes over all recorded frames, in an order drawn for each pass."""
    args, vae, frames = run.args, run.agent.vae, run.rb.frames.rows()
    batch_size = min(args.vae_batch_size, len(frames))
    per_epoch = len(frames) // batch_size
    optimizer = torch.optim.Adam(vae.parameters(), args.vae_lr, fused=True)
    run.keep_optimizer(optimizer)
    loss_fn, order = torch.compile(vae_loss) if args.compile else vae_loss, None

    def update(i: int) -> dict:
        nonlocal order
        if order is None or i % per_epoch == 0:
            order = np.random.default_rng([args.seed, 2, i // per_epoch]).permutation(len(frames))
        rows = np.sort(order[i % per_epoch * batch_size :][:batch_size])
        image = preprocess(torch.from_numpy(frames[rows]).to(run.device))
        noise = torch.randn(batch_size, args.latent_size, generator=run.rng["v"], device=run.device)
        return update_vae(vae, optimizer, image, noise, args, loss_fn)

    finished = run.updates(per_epoch * args.vae_epochs, batch_size, update)
    if finished:
        log_reconstructions(run, frames[np.linspace(0, len(frames) - 1, 16).astype(int)])
    return finished


@torch.no_grad()
def encode(run: "Stages") -> bool:
    """Means and log-variances of all frames, float16, to a file of the run folder."""
    frames, chunk = run.rb.frames.rows(), 500
    run.latents.cut(run.done)
    run.begin(len(frames))
    next_save = next_multiple(run.done, run.args.checkpoint_frequency)
    while run.done < len(frames) and not run.stop.requested:
        rows = frames[run.done : run.done + chunk]
        mu_logvar = torch.stack(run.agent.vae.encode(preprocess(torch.from_numpy(rows.copy()).to(run.device))), 1)
        mu_logvar = mu_logvar.half()
        if not mu_logvar.isfinite().all():  # host sync
            raise SystemExit("error: not finite: latents of V; train it again with a smaller --vae-lr: --from-stage v")
        run.latents.append(mu_logvar.cpu().numpy())
        run.done += len(rows)
        run.progress.update(len(rows))
        if run.done >= next_save and run.done < len(frames):
            next_save = next_multiple(run.done, run.args.checkpoint_frequency)
            run.save()
    if run.stop.requested:
        run.save()
        return False
    mu = run.latents.rows()[:: max(len(frames) // 10_000, 1), 0].astype(np.float32)
    if (mu.std(0) < 1e-3).all():
        again = "train it again with more --vae-epochs or a smaller --vae-lr: --from-stage v"
        raise SystemExit(f"error: the latents of V are constant; {again}")
    return True


def train_model(run: "Stages") -> bool:
    """M: passes over all episodes but the held-out ones, joined in an order drawn for each; the state is carried on."""
    args, model = run.args, run.agent.model
    latents = Latents(run.rb, run.latents.rows(), run.spec, args.holdout_ratio, run.device)
    if not run.done:
        model.reward_mean.copy_(latents.data["reward"].mean())
        model.reward_std.copy_(latents.data["reward"].std().clamp(min=1e-3))
    optimizer = torch.optim.Adam(model.parameters(), args.model_lr, fused=True)
    run.keep_optimizer(optimizer)
    sizes, pieces = (args.model_batch_size, args.sequence_length), None
    num_pieces = len(latents.streams(latents.train, *sizes))

    def update(i: int) -> dict:
        nonlocal pieces
        if pieces is None or i % num_pieces == 0:
            spans = np.random.default_rng([args.seed, 3, i // num_pieces]).permutation(latents.train)
            pieces = latents.streams(spans, *sizes)
        if i % num_pieces == 0:
            run.parts["carry"] = model.initial(pieces.shape[2])
        elif "carry" not in run.parts:
            run.parts["carry"] = tuple(tensor.to(run.device) for tensor in run.saved["carry"])
        rows = pieces[i % num_pieces]
        noise = torch.randn(*rows.shape, args.latent_size, generator=run.rng["m"], device=run.device)
        optimizer.param_groups[0]["lr"] = model_learning_rate(i, args)
        batch = latents.batch(rows, noise)
        metrics, run.parts["carry"] = update_model(model, optimizer, batch, run.parts["carry"], args)
        return metrics

    if not run.updates(args.model_updates, args.model_batch_size, update):
        return False
    set_dream_starts(model, latents, np.random.default_rng([args.seed, 4]), run.spec.intro)
    calibrate(run, latents)
    log_open_loop(run, latents)
    if run.stop.requested:
        run.save()
    return not run.stop.requested


@torch.no_grad()
def set_dream_starts(model: MDNRNN, latents: Latents, rng: np.random.Generator, context: int) -> None:
    """Draws where dreams begin: at first frames of recorded episodes with the zero state, or (context > 0) anywhere.

    Then M's state is what the `context` steps before have led to. The car starts so: its first frames are a zoom.
    """
    spans = latents.spans[latents.spans[:, 1] - latents.spans[:, 0] > context]
    spans, context = (spans, context) if len(spans) else (latents.spans, 0)
    start, end = spans[rng.integers(len(spans), size=model.NUM_STARTS)].T
    rows = rng.integers(start, end - context) if context else start
    rows = torch.from_numpy(rows + np.arange(context + 1)[:, None]).to(model.bias.device)
    c, h = model.initial(model.NUM_STARTS)
    if context:
        noise = torch.from_numpy(rng.standard_normal((*rows.shape, model.shape[2]), np.float32)).to(model.bias.device)
        batch = latents.batch(rows, noise)
        _, c, h = model(batch["z"], batch["action"], batch["first"], c, h)
    model.start_mu.copy_(latents.data["mu"][rows[-1]])
    model.start_logvar.copy_(latents.data["logvar"][rows[-1]])
    model.start_c.copy_(c)
    model.start_h.copy_(h)


def evolve(run: "Stages") -> bool:
    """C: CMA-ES on each candidate's mean return over the same episodes or dreams; the distribution's mean is kept."""
    import cma

    args, controller, kind = run.args, run.agent.controller, run.spec.action_kind
    normal = np.random.default_rng([args.seed, 5]).standard_normal
    options = {"popsize": args.population, "verbose": -9, "randn": lambda *size: normal(size), "seed": np.nan}
    es = cma.CMAEvolutionStrategy(np.zeros(controller.numel()), args.sigma, options)
    if not run.done:
        run.fitness, run.evaluated = [], 0
    for fitness in run.fitness:  # random numbers and fitness are all that CMA-ES depends on: a resume repeats its steps
        es.tell(es.ask(), fitness)
    run.begin(args.generations)
    num_jobs = args.population * args.episodes
    while run.done < args.generations:
        if args.eval_frequency and run.done % args.eval_generations == 0 and run.evaluated < run.done:
            if not log_scores(run):
                break
            run.save()
        candidates = es.ask()
        weights = torch.tensor(np.stack(candidates), dtype=torch.float32, device=run.device)
        policy = linear_policy(weights.view(-1, *controller.shape), kind)
        seeds = np.random.default_rng([args.seed, 6, run.done]).integers(2**31, size=args.episodes)  # deviation 4
        if args.controller_env == "dream":
            outcome = dream(run.agent, policy, num_jobs, args.episodes, int(seeds[0]), args, run.stop)
            returns, lengths = (tensor.cpu().numpy() for tensor in outcome)
        else:
            generator = torch.Generator(run.device).manual_seed(int(seeds[0]))
            seeds = np.tile(seeds, args.population)
            returns, lengths = play(run.agent, run.envs, policy, seeds, generator, run.stop, args.idle_limit)
        if run.stop.requested:
            break
        scores = returns.reshape(args.population, args.episodes).mean(1)
        if not np.isfinite(scores).all():
            raise SystemExit(f"error: not finite in generation {run.done + 1}: returns; the last checkpoint is intact")
        es.tell(candidates, -scores)  # deviation 5
        run.fitness.append((-scores).tolist())
        controller.copy_(torch.from_numpy(es.mean).view_as(controller))
        run.done += 1
        if args.controller_env == "real":
            run.step += int(lengths.sum())
        values = {"mean": scores.mean(), "best": scores.max(), "std": scores.std(), "sigma": es.sigma}
        values["length"] = lengths.mean()
        run.log({f"controller/{name}": value for name, value in values.items()})
        best = f"mean {scores.mean():.1f}, best {scores.max():.1f}"
        run.say(f"generation {run.done}: {best}, sigma {es.sigma:.4f}")
        run.progress.update()
        if args.checkpoint_frequency:
            run.save()
    if run.stop.requested:
        run.save()
    return run.done == args.generations and not run.stop.requested


def main(args: Args) -> str:
    args = with_task_defaults(args)
    check_args(args)
    if args.evaluate:
        return evaluate_run(args)
    checkpoint = load_checkpoint(args.resume, args) if args.resume else None
    envs = make_vector_env(args, args.num_envs)
    spec = make_spec(envs, args)
    if args.dream_length is None:
        args = replace(args, dream_length=spec.time_limit)
    if checkpoint:
        rewind(checkpoint, args)
    run = Stages(replace(args, from_stage=None), checkpoint, spec, envs)
    if run.device.type == "cpu":
        keep_freed_memory()
    parts = run.agent.named_children()
    sizes = ", ".join(f"{name} {sum(p.numel() for p in part.parameters()):,}" for name, part in parts)
    print(f"{run.folder}: {run.device}, parameters: {sizes}, controller {run.agent.controller.numel():,}")

    stages = {"collect": collect, "v": train_vae, "encode": encode, "m": train_model, "c": evolve, "evaluate": evaluate}
    while run.stage != "done" and not run.stop.requested and stages[run.stage](run):
        run.finish()

    envs.close()
    return run.close(run.agent.state_dict())


# === Environment ===


# The published settings by task (name of the environment without its version). A flag on the command line wins.
DEFAULTS = {
    "total_timesteps": 1_000_000, "controller_env": "dream", "max_hold": 10, "min_episode_length": 2, "latent_size": 32,
    "hidden_size": 256, "sequence_length": 500, "model_updates": 4_000, "model_lr_decay": 1.0,
}  # fmt: skip


TASKS = {
    "VizdoomTakeCover": {
        "total_timesteps": 3_080_000, "min_episode_length": 101, "latent_size": 64, "hidden_size": 512,
        "model_updates": 24_400, "model_lr_decay": 0.99999,
    },
    "CarRacing": {
        "total_timesteps": 10_000_000, "controller_env": "real", "max_hold": 8, "sequence_length": 1_000,
    },
}  # fmt: skip


TIME_LIMITS = {"VizdoomTakeCover": 2100}  # where the environment has none; without one a score cannot be compared


def task_name(env_id: str) -> str:
    """my_module:MyEnv-v0 -> MyEnv."""
    return re.sub(r"-v\d+$", "", env_id.split(":")[-1])


def with_task_defaults(args: Args) -> Args:
    """The settings in force: what was not given is filled in from TASKS."""
    task = DEFAULTS | TASKS.get(task_name(args.env_id), {})
    return replace(args, **{name: value for name, value in task.items() if getattr(args, name) is None})


def make_vector_env(args: Args, num_envs: int, video: str | None = None) -> gym.vector.VectorEnv:
    """Environments that the caller resets one by one, each episode with a seed (autoreset off)."""
    thunks = [make_env(args, video if i == 0 else None) for i in range(num_envs)]
    mode = gym.vector.AutoresetMode.DISABLED
    if num_envs == 1:
        return gym.vector.SyncVectorEnv(thunks, autoreset_mode=mode)
    multiprocessing.set_forkserver_preload(["torch.utils.tensorboard", "gymnasium", "tyro"])  # imported once for all
    return gym.vector.AsyncVectorEnv(thunks, context="forkserver", autoreset_mode=mode)


def make_env(args: Args, video: str | None = None) -> Callable[[], gym.Env]:
    """Thunk of one environment: observations (64, 64, 3) uint8, its own actions or a box [-1, 1]."""
    main_process = os.getpid()

    def thunk() -> gym.Env:
        if os.getpid() != main_process:
            os.setsid()  # signals to the process group are for the main process, which closes the workers
            torch.set_num_threads(1)
        env = make_gymnasium(args, video is not None)
        if env.get_wrapper_attr("spec") is not None and env.spec.max_episode_steps is None:
            env = gym.wrappers.TimeLimit(env, TIME_LIMITS.get(task_name(args.env_id), 10_000))
        env = gym.wrappers.RecordEpisodeStatistics(env)
        if video is not None:  # folder/prefix of the MP4
            folder, prefix = os.path.split(video)
            first = {"episode_trigger": lambda i: i == 0, "disable_logger": True}
            env = gym.wrappers.RecordVideo(env, folder, name_prefix=prefix, **first)
        return fit_spaces(env, args)

    return thunk


def fit_spaces(env: gym.Env, args: Args) -> gym.Env:
    """Refuses what World Models cannot use; crops and resizes pictures to 64x64, rescales a general action box."""
    if args.render_obs:
        env = gym.wrappers.AddRenderObservation(env, render_only=True)
    obs = env.observation_space
    if isinstance(obs, gym.spaces.Dict) and "screen" in obs.spaces:  # ViZDoom
        obs = obs["screen"]
        env = gym.wrappers.TransformObservation(env, lambda o: o["screen"], obs)
    if not (isinstance(obs, gym.spaces.Box) and obs.dtype == np.uint8 and len(obs.shape) == 3 and obs.shape[-1] == 3):
        fail(f"{args.env_id}: observations must be images (H, W, 3) of uint8, not {obs} (--render-obs draws them)")
    if action_kind(env.action_space, args) == "car":  # without the bar of instruments
        road = gym.spaces.Box(0, 255, (84, *obs.shape[1:]), np.uint8)
        env = gym.wrappers.TransformObservation(env, lambda o: o[:84], road)
    if env.observation_space.shape[:2] != (64, 64):
        env = gym.wrappers.ResizeObservation(env, (64, 64))
    if action_kind(env.action_space, args) == "box":
        low, high = env.action_space.low, env.action_space.high
        space = gym.spaces.Box(-1, 1, low.shape, np.float32)
        env = gym.wrappers.TransformAction(env, lambda a: (low + (a + 1) * (high - low) / 2).astype(low.dtype), space)
    return env


def action_kind(space: gym.Space, args: Args) -> str:
    """car (steer, gas, brake), thirds (TakeCover: one number, three moves), box, or discrete."""
    if task_name(args.env_id) == "VizdoomTakeCover":
        return "thirds"
    if task_name(args.env_id) == "CarRacing" and isinstance(space, gym.spaces.Box):
        return "car"
    if isinstance(space, gym.spaces.Box) and len(space.shape) == 1 and space.is_bounded("both"):
        return "box"
    if not (isinstance(space, gym.spaces.Discrete) and space.start == 0):
        fail(f"{args.env_id}: actions must be a bounded vector Box or Discrete starting at 0, not {space}")
    return "discrete"


def make_spec(envs: gym.vector.VectorEnv, args: Args) -> Spec:
    space = envs.single_action_space
    kind, dreaming = action_kind(space, args), args.controller_env == "dream"
    dim = {"thirds": 1, "discrete": getattr(space, "n", 0)}.get(kind) or space.shape[0]
    limit = envs.get_attr("_max_episode_steps")[0]
    return Spec(kind, int(dim), int(limit), dreaming, dreaming and kind != "thirds")


def make_gymnasium(args: Args, film: bool) -> gym.Env:
    """Any registered Gymnasium environment; TakeCover at a resolution that is drawn quickly."""
    env_id, settings = args.env_id, {"render_mode": "rgb_array"} if film or args.render_obs else {}
    try:
        if args.envpool:
            return gym.wrappers.TimeLimit(EnvPoolCarRacing(), 1000)
        if not env_id.startswith("Vizdoom"):
            return gym.make(env_id, **settings)
        import vizdoom.gymnasium_wrapper  # noqa: F401 (registers the ids)

        with contextlib.chdir(tempfile.gettempdir()):  # the game leaves files where its first episode begins
            env = gym.make(env_id, screen_resolution="RES_160X120", **settings)
            env.reset()
            return env
    except gym.error.DependencyNotInstalled as error:
        fail(str(error).replace("\n", " "))
    except ImportError as error:
        fail(f"{env_id} needs a package that is not installed: pip install {error.name or error}")
    except gym.error.Error as error:
        close = difflib.get_close_matches(env_id, gym.registry, n=3, cutoff=0.5)
        fail(f"cannot make {env_id!r}: {str(error).splitlines()[0]} Close: {', '.join(close) or 'none'}")


class EnvPoolCarRacing(gym.Env):
    """CarRacing-v3 of EnvPool as a Gymnasium environment; a pool of one is made for each episode, with its seed."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 50}
    render_mode = "rgb_array"
    observation_space = gym.spaces.Box(0, 255, (96, 96, 3), np.uint8)
    action_space = gym.spaces.Box(np.array([-1, 0, 0], np.float32), np.ones(3, np.float32))

    def __init__(self):
        import envpool

        self.make = functools.partial(envpool.make, "CarRacing-v3", env_type="gymnasium", num_envs=1)

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        super().reset(seed=seed)
        self.pool = self.make(seed=int(self.np_random.integers(2**31)))
        obs, _ = self.pool.reset()
        self.frame = obs[0]
        return self.frame, {}

    def step(self, action: np.ndarray):
        obs, rewards, terminations, truncations, _ = self.pool.step(np.asarray(action, np.float32)[None])
        self.frame = obs[0]
        return self.frame, float(rewards[0]), bool(terminations[0]), bool(truncations[0]), {}

    def render(self) -> np.ndarray:
        return self.frame


# === Evaluation ===


def evaluate(run: "Stages") -> bool:
    """The last generation's score."""
    if not run.args.eval_frequency:
        return True
    run.begin(1)
    finished = log_scores(run)
    run.progress.update(int(finished))
    return finished


def log_scores(run: "Stages") -> bool:
    """Real and dream score of the distribution's mean, side by side, and one of its dreams; False if interrupted."""
    args, trace, envs, generation = run.args, [], run.envs, len(run.fitness)
    if args.capture_video:  # a film of each evaluation needs a new recorder
        video = f"{run.folder}/videos/generation-{generation}"
        envs = make_vector_env(args, min(args.num_envs, args.eval_episodes), video)
    real, dreamed = real_and_dream_scores(run.agent, envs, args, run.stop, trace)
    if args.capture_video:
        envs.close()
    if run.stop.requested:
        return False
    run.log_evaluation(real)
    if dreamed is not None:
        run.say(f"global_step={run.step}, dream: {dreamed.mean():.1f} +- {dreamed.std():.1f}")
        run.log({"dream/episodic_return": dreamed.mean(), "dream/episodic_return_std": dreamed.std()})
    frames = decode_frames(run.agent, torch.stack(trace[:: max(len(trace) // 100, 1)]))
    log_gif(run.writer, "dream/episode", frames, run.folder, run.step + generation)
    run.evaluated = generation
    return True


def real_and_dream_scores(agent: Agent, envs, args: Args, stop: "StopRequest", trace: list | None = None) -> tuple:
    """Returns of eval_episodes real episodes and of 100 dreams (None if M does not predict rewards), on own seeds."""
    policy = linear_policy(agent.controller[None], agent.model.spec.action_kind)
    seeds = np.random.default_rng([args.seed, 99]).integers(2**31, size=args.eval_episodes)
    generator = torch.Generator(agent.controller.device).manual_seed(args.seed)
    real, _ = play(agent, envs, policy, seeds, generator, stop)
    dreamed, _ = dream(agent, policy, 100, 100, args.seed, args, stop, trace)
    return real, dreamed.cpu().numpy() if agent.model.spec.done_head else None


def calibrate(run: "Stages", latents: Latents) -> None:
    """Is the dream like the real environment? Measured before anything is evolved in it; says what to raise if not.

    Compares the returns of the recording policy and of constant actions in the dream and in the real environment. They
    disagree badly where the means differ by more than the standard deviation of the recorded returns.
    """
    args, spec, agent = run.args, run.spec, run.agent
    spread = latents.data["mu"].float().std(0)
    scores = {"model/live_dims": float((spread > 0.15).sum())} | holdout_scores(agent.model, latents, args)
    lines = [", ".join(f"{name.split('/')[1]} {value:.3g}" for name, value in scores.items())]
    off, spread_of_returns = {}, run.rb.returns.std()
    for name, policy in scripted_policies(spec, args, run.device).items() if spec.done_head else ():
        dreamed = dream(agent, policy, 100, 100, args.seed, args, run.stop)[0].cpu().numpy()
        if name == "recording":
            real = run.rb.returns
        else:
            seeds = np.random.default_rng([args.seed, 98]).integers(2**31, size=args.eval_episodes)
            generator = torch.Generator(run.device).manual_seed(args.seed)
            real, _ = play(agent, run.envs, policy, seeds, generator, run.stop)
            if run.stop.requested:
                return
        scores |= {f"calibration/{name}_dream": dreamed.mean(), f"calibration/{name}_real": real.mean()}
        dream_text = f"dream {dreamed.mean():.1f} +- {dreamed.std():.1f}"
        lines.append(f"{name}: {dream_text}, real {real.mean():.1f} +- {real.std():.1f}")
        if not abs(dreamed.mean() - real.mean()) <= spread_of_returns:  # also where it is not a number
            off[name] = dreamed.mean() - real.mean()
    few_live = scores["model/live_dims"] < args.latent_size / 2
    if few_live:
        lines.append("less than half of V's dimensions are live: raise --total-timesteps and --vae-epochs")
    if off:
        true, predicted = scores["model/deaths_true"], scores["model/deaths_predicted"]
        badly_predicted = scores["model/deaths_recall"] < 0.8 or predicted > 2 * true
        advice = ["--vae-epochs"] * bool(few_live) + ["--model-updates"] * bool(badly_predicted)
        harder = sum(off.values()) < 0
        if advice:
            advice = "raise " + " and ".join(["--total-timesteps", *advice])
        else:
            advice = f"{'lower' if harder else 'raise'} --temperature"
        where = f"{', '.join(off)}: {'harder' if harder else 'easier'} in the dream"
        lines.append(f"the dream is NOT like the real environment ({where}): {advice} before trusting it")
    print("calibration: " + "\ncalibration: ".join(lines))
    run.log(scores)


@torch.no_grad()
def holdout_scores(model: MDNRNN, latents: Latents, args: Args) -> dict[str, float]:
    """M on the held-out episodes, with teacher forcing: likelihood, and deaths true, predicted and found."""
    pieces = latents.streams(latents.holdout, args.model_batch_size, args.sequence_length)
    generator, (c, h) = torch.Generator(pieces.device).manual_seed(args.seed), model.initial(pieces.shape[2])
    nll, deaths = [], np.zeros(3)
    for rows in pieces:
        noise = torch.randn(*rows.shape, args.latent_size, generator=generator, device=rows.device)
        batch = latents.batch(rows, noise)
        _, terms, logit, (c, h) = model_loss(model, batch, c, h, args.done_weight)
        nll.append(float(terms["losses/mdn_nll"]))
        if logit is not None:
            true, found = batch["done"] > 0, logit > 0
            deaths += [float(x.sum()) for x in (true, found, true & found)]
    scores = {"model/holdout_mdn_nll": float(np.mean(nll))}
    if model.spec.done_head:
        true, predicted, found = deaths
        scores |= {
            "model/deaths_true": true,
            "model/deaths_predicted": predicted,
            "model/deaths_recall": found / true if true else 1.0,
        }
    return scores


def scripted_policies(spec: Spec, args: Args, device: torch.device) -> dict[str, Callable]:
    """Policies that need no learning: the recording one, and each discrete action or the ends and middle of the box."""
    held = HeldActions(100, spec, args.max_hold, np.random.default_rng([args.seed, 97]))

    def recording(features: torch.Tensor, jobs: torch.Tensor, num_jobs: int) -> torch.Tensor:
        return torch.from_numpy(held()).to(device)[jobs]

    if spec.action_kind == "discrete":
        constants = torch.eye(spec.action_dim, device=device)
    else:
        ends = (
            torch.tensor([-9.0, 0.0, 9.0], device=device).expand(1, -1).repeat_interleave(spec.action_dim, 0)
        )  # (A, 3)
        weights = ends.t()[:, None].contiguous()  # (3, 1, A): one feature, which is 1
        constants = controller_action(torch.ones(3, 1, device=device), weights, spec.action_kind)
    return {"recording": recording} | {f"constant_{i}": constant_policy(action) for i, action in enumerate(constants)}


def log_open_loop(run: "Stages", latents: Latents) -> None:
    """M left to itself on held-out episodes: error of the pictures by horizon, and a film of truth above dream."""
    from matplotlib.figure import Figure

    intro, spans = run.spec.intro, latents.holdout
    context, length = intro + 5, min(intro + 100, int((spans[:, 1] - spans[:, 0]).max()) - 1)
    starts = np.array([start for start, end in spans if end - start > length])[:8]
    if length <= context:
        return
    rows = torch.from_numpy(starts + np.arange(length + 1)[:, None]).to(run.device)
    generator, shape = torch.Generator(run.device).manual_seed(run.args.seed), (*rows.shape, run.args.latent_size)
    normal, noise = (torch.randn(shape, generator=generator, device=run.device) for _ in range(2))
    uniform = torch.rand(noise.shape, generator=generator, device=run.device)
    z = open_loop(run.agent.model, latents.batch(rows, noise), uniform, normal, run.args.temperature, context)
    dreamed = decode_frames(run.agent, z[intro:].flatten(0, 1)).reshape(-1, len(starts), 64, 64, 3)
    truth = run.rb.frames.rows()[rows[intro:-1].cpu().numpy()]
    error = ((dreamed / 255.0 - truth / 255.0) ** 2).mean((1, 2, 3, 4))
    context, length = context - intro, length - intro
    horizons = [k for k in (1, 5, 15, 45) if context + k <= length]
    run.log({f"open_loop/image_mse_horizon_{k}": error[context + k - 1] for k in horizons})
    figure = Figure(figsize=(4, 3), layout="constrained")
    axis = figure.subplots()
    axis.plot(np.arange(1 - context, length - context + 1), error)
    axis.axvline(0.5, color="grey", linestyle="--")
    axis.set(xlabel="steps since the last observation", ylabel="mean squared error of the picture", ylim=(0, None))
    figure.savefig(f"{run.folder}/open_loop_error.png")
    run.writer.add_figure("open_loop/error", figure, run.step)
    frames = np.concatenate([truth, dreamed], 2).transpose(0, 2, 1, 3, 4).reshape(length, 128, -1, 3)
    log_gif(run.writer, "open_loop/truth_dream", frames, run.folder, run.step)


@torch.no_grad()
def open_loop(model: MDNRNN, batch: dict, uniform, normal, temperature: float, context: int) -> torch.Tensor:
    """z (T, N, Z): that of a batch up to `context` steps, then M's own, sampled, with the batch's actions."""
    z, (c, h), path = batch["z"][0], model.initial(batch["z"].shape[1]), []
    for t, (action, first) in enumerate(zip(batch["action"], batch["first"], strict=True)):
        z = batch["z"][t] if t < context else z
        path.append(z)
        z, c, h, _, _ = dream_step(model, z, action, first, c, h, uniform[t], normal[t], temperature)
    return torch.stack(path)


def log_reconstructions(run: "Stages", frames: np.ndarray) -> None:
    """Frames (N, 64, 64, 3) above what V makes of their means, as PNG and in the log."""
    from PIL import Image

    with torch.no_grad():
        mu, _ = run.agent.vae.encode(preprocess(torch.from_numpy(frames.copy()).to(run.device)))
    rows = frames, decode_frames(run.agent, mu)
    image = np.concatenate([np.concatenate(list(row), 1) for row in rows])
    Image.fromarray(image).save(f"{run.folder}/reconstructions.png")
    run.writer.add_image("vae/reconstructions", image, run.step, dataformats="HWC")


@torch.no_grad()
def decode_frames(agent: Agent, z: torch.Tensor) -> np.ndarray:
    """z (N, Z) -> pictures (N, 64, 64, 3) uint8."""
    return (agent.vae.decode(z).permute(0, 2, 3, 1) * 255).round().byte().cpu().numpy()


def evaluate_run(args: Args) -> str:
    """Plays the controller of a run folder and prints its returns; with args.capture_video one episode is filmed."""
    checkpoint = load_checkpoint(args.evaluate, args)
    stage = checkpoint["parts"]["counters"]["stage"]
    if STAGES.index(stage) < STAGES.index("c"):
        fail(f"{args.evaluate} has no controller yet, it is at stage {stage}")
    refuse_changes(args, checkpoint, "evaluate eval_episodes num_envs capture_video cuda seed temperature compile")
    device, stop = choose_device(args), StopRequest()
    video = f"{args.evaluate}/videos/evaluate" if args.capture_video else None
    envs = make_vector_env(args, min(args.num_envs, args.eval_episodes), video)
    agent = Agent(make_spec(envs, args), args).to(device)
    agent.load_state_dict(checkpoint["parts"]["agent"])
    real, dreamed = real_and_dream_scores(agent, envs, args, stop)
    envs.close()
    if not stop.requested:
        print(f"{args.env_id} at step {checkpoint['global_step']}:")
        if dreamed is not None:
            print(f"dream {dreamed.mean():.1f} +- {dreamed.std():.1f} ({len(dreamed)} dreams at {args.temperature})")
        single = " ".join(f"{episodic_return:.1f}" for episodic_return in real)
        print(f"return {real.mean():.1f} +- {real.std():.1f} ({len(real)} episodes: {single})")
    stop.exit()
    return args.evaluate


# === Run: folder, log, checkpoints, Ctrl-C (same text in all five scripts) ===


def fail(message: str) -> NoReturn:
    """One clear line for a mistake of the user's, exit code 2."""
    print(f"error: {message}", file=sys.stderr, flush=True)
    raise SystemExit(2)


def parse_args() -> Args:
    """Command line; with --resume or --evaluate the run's own settings are the defaults."""
    args = tyro.cli(Args)
    if args.resume and args.evaluate:
        fail("--resume or --evaluate, not both")
    folder = args.resume or args.evaluate
    return tyro.cli(Args, default=Args(**load_checkpoint(folder, args)["args"])) if folder else args


def choose_device(args: Args) -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() and args.cuda else "cpu")


def next_multiple(step: int, frequency: int) -> float:
    """The next multiple of a frequency after this step; 0 = never."""
    return (step // frequency + 1) * frequency if frequency else math.inf


def save_checkpoint(run_dir: str, args: Args, global_step: int, parts: dict, rng: dict) -> None:
    """Writes all that a run needs to go on to checkpoint.pt, atomically: a kill at any instant leaves the old file.

    parts: name -> object with state_dict() or plain data; rng: name -> NumPy or torch generator.
    """
    state = {"version": 1, "args": asdict(args) | {"resume": None}, "global_step": global_step, "rng": {}}
    state["parts"] = {name: part.state_dict() if hasattr(part, "state_dict") else part for name, part in parts.items()}
    for name, generator in rng.items():
        is_torch = isinstance(generator, torch.Generator)
        state["rng"][name] = generator.get_state() if is_torch else generator.bit_generator.state
    path = f"{run_dir}/checkpoint.pt"
    try:
        with open(f"{path}.tmp", "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(f"{path}.tmp", path)
    except (OSError, RuntimeError) as error:  # a full disk, above all
        raise SystemExit(f"error: cannot write {path}, the last checkpoint is intact: {error}") from error


def load_checkpoint(run_dir: str, args: Args) -> dict:
    """Reads a run folder's checkpoint (tensors stay on disk until they are used); says in one line if it cannot."""
    path = os.path.join(run_dir, "checkpoint.pt")
    try:
        damaged = zipfile.ZipFile(path).testzip()  # torch does not look at the checksums
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # many types, for a missing, damaged or foreign file
        fail(f"no readable checkpoint at {path} ({type(error).__name__})")
    ours = isinstance(state, dict) and state.get("version") == 1
    if damaged or not ours or set(state.get("args", ())) != {field.name for field in fields(args)}:
        fail(f"{path} is damaged or was written by another script or version")
    return state


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
        raise SystemExit(f"error: not finite at step {global_step}: {', '.join(bad)}; the last checkpoint is intact")
    return values


class StopRequest:
    """Ctrl-C and SIGTERM ask the loop to stop at its next safe point; a second one stops at once."""

    def __init__(self):
        self.requested = 0
        self.previous = {s: signal.signal(s, self) for s in (signal.SIGINT, signal.SIGTERM)}

    def __call__(self, signum: int, frame) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = signum
        os.write(2, b"\nstopping at the next safe point (again: at once)\n")  # print is not safe here

    def exit(self) -> None:
        """Hands the signals back; ends the process with the usual code if one has come."""
        for signum, handler in self.previous.items():
            signal.signal(signum, handler)
        if self.requested:
            raise SystemExit(128 + self.requested)


class Run:
    """A run and its folder: log, progress bar, checkpoints. `step` counts environment steps, the only x axis."""

    def __init__(self, args: Args, checkpoint: dict | None):
        if checkpoint:
            free = "resume total_timesteps cuda track eval_frequency checkpoint_frequency compile cudagraphs"
            refuse_changes(args, checkpoint, free)
        if args.track:
            try:
                import wandb
            except ImportError:
                fail("--track needs Weights and Biases: pip install wandb")
        name = f"{args.env_id.replace('/', '-')}__{args.exp_name}__{args.seed}__{int(time.time())}"
        self.folder = (args.resume or f"runs/{name}").rstrip("/")
        self.args, self.checkpoint, self.step = args, checkpoint, checkpoint["global_step"] if checkpoint else 0
        try:
            os.makedirs(self.folder, exist_ok=args.resume is not None)
            if args.track:  # before the writer is made, which it listens to
                name = os.path.basename(self.folder)
                wandb.init(project=args.wandb_project_name, entity=args.wandb_entity, name=name, id=name,
                           resume="allow", config=asdict(args), sync_tensorboard=True)  # fmt: skip
            self.writer = SummaryWriter(self.folder, purge_step=self.step + 1 if checkpoint else None)
        except OSError as error:
            fail(f"cannot write the run folder {self.folder}: {error.strerror}")
        table = "\n".join(f"|{name}|{value}|" for name, value in asdict(args).items())
        self.writer.add_text("hyperparameters", f"|param|value|\n|-|-|\n{table}", self.step)
        random.seed(args.seed)
        np.random.seed(args.seed % 2**32)
        torch.manual_seed(args.seed)
        torch.backends.cudnn.deterministic = args.torch_deterministic
        self.device, self.stop = choose_device(args), StopRequest()
        pace = {"mininterval": 0.1 if sys.stderr.isatty() else 30, "miniters": 0}  # a line now and then into a file
        steps = {"total": args.total_timesteps, "initial": self.step, "unit": "step"}
        self.progress = tqdm(**steps, **pace, dynamic_ncols=True)
        self.say = self.progress.write if sys.stderr.isatty() else print  # tqdm's would draw the bar into the file
        self.metrics, self.reported = {}, (self.step, time.perf_counter())
        self.next_eval = next_multiple(self.step, args.eval_frequency)
        self.next_save = next_multiple(self.step, args.checkpoint_frequency) if checkpoint else 0  # a new run at once

    def keep(self, parts: dict, rng: dict) -> None:
        """Names what a checkpoint holds, see save_checkpoint; a resumed run finds its objects as they were saved."""
        self.parts, self.rng = parts, rng
        if not self.checkpoint:
            return
        for name, part in parts.items():
            if hasattr(part, "load_state_dict"):
                part.load_state_dict(self.checkpoint["parts"][name])
        for name, state in self.checkpoint["rng"].items():
            if not isinstance(rng[name], torch.Generator):
                rng[name].bit_generator.state = state
            elif state.shape == rng[name].get_state().shape:
                rng[name].set_state(state)
            else:
                print(f"random generator {name} starts anew: it was saved on another kind of device")

    def goes_on(self, dones: np.ndarray) -> bool:
        """Saves when it is due, with one environment at the end of an episode; False once the run has to end."""
        ending = self.stop.requested or self.step >= self.args.total_timesteps
        if ending or (self.step >= self.next_save and (dones.all() or len(dones) > 1)):
            self.next_save = next_multiple(self.step, self.args.checkpoint_frequency)
            self.report()  # a loss that is not finite must not reach the checkpoint
            self.writer.flush()  # curves without a gap, should the run be killed and resumed
            save_checkpoint(self.folder, self.args, self.step, self.parts, self.rng)
        return not ending

    def eval_due(self) -> bool:
        due = self.step >= self.next_eval and not self.stop.requested
        self.next_eval = next_multiple(self.step, self.args.eval_frequency)
        return due

    def report(self) -> None:
        """Logs self.metrics, which must be finite, and steps per second, once for each environment step."""
        values, (last_step, last_time) = require_finite(self.metrics, self.step), self.reported
        now = time.perf_counter()
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
        self.say(f"global_step={self.step}, eval: {returns.mean():.1f} +- {returns.std():.1f}")
        self.log({"eval/episodic_return": returns.mean(), "eval/episodic_return_std": returns.std()})

    def close(self, weights: dict) -> str:
        """Ends the log, says how to go on, hands the signals back. Returns the run folder."""
        self.progress.close()
        self.writer.close()
        if self.args.save_model:
            torch.save(weights, f"{self.folder}/{self.args.exp_name}.pt")
        script = os.path.basename(__file__)
        print(f"checkpoint at step {self.step}; continue with: python {script} --resume {self.folder}")
        self.stop.exit()
        return self.folder


def log_gif(writer: SummaryWriter, tag: str, frames: np.ndarray, run_dir: str, step: int) -> None:
    """Animation (T, H, W, 3) uint8 to TensorBoard and to the run folder (torch's add_video needs an old moviepy)."""
    from PIL import Image
    from tensorboard.compat.proto.summary_pb2 import Summary

    images = [Image.fromarray(frame).quantize(64) for frame in frames]
    file = io.BytesIO()
    images[0].save(file, "GIF", save_all=True, append_images=images[1:], duration=80, loop=0)
    with open(f"{run_dir}/{tag.replace('/', '_')}_{step}.gif", "wb") as out:
        out.write(file.getvalue())
    height, width = frames.shape[1:3]
    image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=file.getvalue())
    writer._get_file_writer().add_summary(Summary(value=[Summary.Value(tag=tag, image=image)]), step)


STAGES = ("collect", "v", "encode", "m", "c", "evaluate", "done")


STAGE_SETTINGS = {  # what a run repeated --from-stage may change
    "collect": "num_envs envpool max_hold min_episode_length save_buffer",
    "v": "latent_size vae_depth vae_epochs vae_batch_size vae_lr kl_tolerance",
    "encode": "",
    "m": "controller_env hidden_size num_mixtures sequence_length model_batch_size model_updates model_lr "
    "model_lr_decay done_weight holdout_ratio",
    "c": "num_envs temperature dream_length population episodes generations sigma idle_limit eval_generations",
    "evaluate": "eval_episodes",
}


class Stages(Run):
    """A run that goes through STAGES: what they share, how far it has come, what each of them adds to a checkpoint."""

    def __init__(self, args: Args, checkpoint: dict | None, spec: Spec, envs: gym.vector.VectorEnv):
        super().__init__(args, checkpoint)
        self.spec, self.envs, self.agent = spec, envs, Agent(spec, args).to(self.device)
        self.rb = ReplayBuffer(ArrayFile(f"{self.folder}/frames.bin", (64, 64, 3), np.uint8, "collect"))
        self.latents = ArrayFile(f"{self.folder}/latents.bin", (2, args.latent_size), np.float16, "encode")
        self.stage, self.done, self.collected = "collect", 0, 0  # done: steps, updates, frames or generations
        self.fitness: list[list[float]] = []  # of all candidates of all generations, as CMA-ES was told
        self.evaluated = 0  # the last generation of which both scores are logged
        self.saved: dict = {}  # what the stage in progress finds in a checkpoint
        self.scalars = f"{self.folder}/scalars.jsonl"
        if checkpoint:
            self.forget(checkpoint)
        counters = SimpleNamespace(state_dict=lambda: {x: getattr(self, x) for x in ("stage", "done", "collected")})
        fitness = SimpleNamespace(state_dict=lambda: torch.tensor(self.fitness, dtype=torch.float64))
        rng = {name: np.random.default_rng([args.seed, i]) for i, name in enumerate(("actions", "reset"))}
        rng |= {name: torch.Generator(self.device).manual_seed(args.seed + i) for i, name in enumerate(("v", "m"))}
        parts = {"agent": self.agent, "counters": counters, "fitness": fitness}
        self.keep(parts | ({"replay": self.rb} if args.save_buffer else {}), rng)
        if checkpoint:
            self.restore()

    def forget(self, checkpoint: dict) -> None:
        """Leaves in a checkpoint what its stages have finished, and the one in progress unless it starts anew."""
        parts, counters = checkpoint["parts"], checkpoint["parts"]["counters"]
        kept = STAGES[: STAGES.index(counters["stage"]) + (counters["done"] > 0)]
        owners = {"vae": "v", "model": "m", "controller": "c", "reset": "collect", "actions": "collect"}
        tensors = {name: t for name, t in parts["agent"].items() if owners[name.split(".")[0]] in kept}
        parts["agent"] = self.agent.state_dict() | tensors
        checkpoint["rng"] = {name: g for name, g in checkpoint["rng"].items() if owners.get(name, name) in kept}
        if "collect" not in kept:
            parts["replay"] = self.rb.state_dict()

    def restore(self) -> None:
        """Goes on where the checkpoint ends, after a look at what must be there for it."""
        self.saved = self.checkpoint["parts"]
        self.stage, self.done, self.collected = (self.saved["counters"][x] for x in ("stage", "done", "collected"))
        self.fitness = self.saved["fitness"].tolist()
        if self.stage == "m":
            self.latents.cut(len(self.rb))
        if self.stage in ("v", "encode", "m") and not len(self.rb):
            fail(f"{self.folder} has not kept what it recorded (--no-save-buffer): --from-stage collect")
        if not self.done:
            self.saved = {}
        if not self.done or self.stage in ("collect", "c"):
            self.save()  # what is begun anew, before anything of what was there is given up
        if not len(self.rb):
            self.rb.frames.cut(0)
        self.restore_scalars(STAGES.index(self.stage))

    def restore_scalars(self, at: int) -> None:
        """Logs again what the finished stages, and the one in progress up to now, have logged beyond the run's step.

        The log itself is purged from there on. Their last evaluation belongs to the generations that it follows.
        """
        with open(self.scalars, "a+") as file:
            file.seek(0)
            lines = file.read().splitlines()
        with open(f"{self.scalars}.tmp", "w") as file:
            for line in lines:
                try:
                    stage, count, tag, value, step = json.loads(line)
                except ValueError:  # half a line, of a process that was killed
                    continue
                index = STAGES.index(stage)
                if index < at or (index <= at + (self.stage == "c") and count <= self.done):
                    print(line, file=file)
                    self.evaluated = count if tag == "eval/episodic_return" else self.evaluated
                    if step > self.step:
                        self.writer.add_scalar(tag, value, step)
        os.replace(f"{self.scalars}.tmp", self.scalars)

    def log(self, values: dict[str, float]) -> None:
        """Scalars of a stage after recording stand at the environment steps made plus its updates or generations.

        They are in the run folder's scalars.jsonl too.
        """
        if self.stage == "collect":
            return super().log(values)
        count = self.done or self.args.generations
        with open(self.scalars, "a") as file:
            for name, value in values.items():
                print(json.dumps([self.stage, count, name, float(value), self.step + count]), file=file)
                self.writer.add_scalar(name, float(value), self.step + count)

    def keep_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Names the optimizer of the stage in progress, which a checkpoint then holds; a resume finds it as it was."""
        self.parts["optimizer"] = optimizer
        if self.saved:
            optimizer.load_state_dict(self.saved["optimizer"])

    def save(self) -> None:
        """A checkpoint of the stage in progress."""
        self.writer.flush()
        if self.stage == "encode":
            self.latents.sync()
        save_checkpoint(self.folder, self.args, self.step, self.parts, self.rng)

    def begin(self, total: int) -> None:
        """Sets the progress bar to the stage in progress."""
        self.progress.reset(total)
        self.progress.n = self.progress.initial = self.done
        self.progress.set_description(self.stage)

    def finish(self) -> None:
        """The stage in progress is done, the next one begins."""
        self.stage, self.done, self.saved = STAGES[STAGES.index(self.stage) + 1], 0, {}
        self.parts.pop("optimizer", None)
        self.parts.pop("carry", None)
        self.save()

    def updates(self, total: int, batch_size: int, update: Callable[[int], dict]) -> bool:
        """Makes the updates of V or M that are left, logs and saves now and then; False if the run was interrupted."""
        metrics, frequency = {}, self.args.checkpoint_frequency
        save_every = max(frequency // batch_size, 1) if frequency else math.inf
        self.begin(total)
        while self.done < total and not self.stop.requested:
            metrics = update(self.done)
            self.done += 1
            self.progress.update()
            saving = self.done % save_every == 0
            if self.done % 100 == 0 or self.done == total or saving:
                self.log(require_finite(metrics, self.step + self.done))
            if saving and self.done < total:
                self.save()
        if self.stop.requested:
            require_finite(metrics, self.step + self.done)
            self.save()
        return self.done == total


def rewind(checkpoint: dict, args: Args) -> None:
    """Sets a checkpoint back to the stage that a resume must go on with, and lets that stage's settings be changed."""
    counters, saved = checkpoint["parts"]["counters"], checkpoint["args"]
    if args.from_stage:
        if STAGES.index(args.from_stage) > STAGES.index(counters["stage"]):
            fail(f"--from-stage {args.from_stage}: this run has not come further than {counters['stage']}")
        counters |= {"stage": args.from_stage, "done": 0}
        for name in STAGES[STAGES.index(args.from_stage) : -1]:
            saved |= {setting: getattr(args, setting) for setting in STAGE_SETTINGS[name].split()}
    elif args.total_timesteps > counters["collected"] > 0 and counters["stage"] != "collect":
        counters |= {"stage": "collect", "done": counters["collected"]}  # records more and learns anew from everything
    elif args.generations > saved["generations"] and counters["stage"] in ("evaluate", "done"):
        counters |= {"stage": "c", "done": saved["generations"]}
    if counters["stage"] == "collect" and (args.from_stage or "replay" not in checkpoint["parts"]):
        counters |= {"done": 0, "collected": 0}  # records anew; without the buffer there is nothing to go on with
        checkpoint["global_step"] = 0
    if STAGES.index(counters["stage"]) < STAGES.index("c") or args.from_stage == "c":
        checkpoint["global_step"] = min(checkpoint["global_step"], counters["collected"] or checkpoint["global_step"])
    saved |= {"generations": max(saved["generations"], args.generations)}


class ArrayFile:
    """Rows of one shape and type in a file that only grows; what lies beyond the last checkpoint is cut off on load."""

    def __init__(self, path: str, shape: tuple[int, ...], dtype: type, stage: str):
        self.path, self.shape, self.dtype, self.stage = path, shape, np.dtype(dtype), stage  # the stage that writes it
        self.row_bytes = int(np.prod(shape)) * self.dtype.itemsize

    def cut(self, length: int) -> None:
        """Keeps the first `length` rows."""
        found = os.path.getsize(self.path) // self.row_bytes if os.path.exists(self.path) else 0
        if found < length:
            fail(f"{self.path} is incomplete: {found} rows of {length}; write it again: --from-stage {self.stage}")
        if found or os.path.exists(self.path):
            os.truncate(self.path, length * self.row_bytes)

    def append(self, rows: np.ndarray) -> None:
        assert rows.shape[1:] == self.shape and rows.dtype == self.dtype
        try:
            with open(self.path, "ab") as file:
                file.write(np.ascontiguousarray(rows).data)
        except OSError as error:  # a full disk, above all
            raise SystemExit(f"error: cannot write {self.path}, the last checkpoint is intact: {error}") from error

    def sync(self) -> None:
        """To the disk, before a checkpoint that counts on it."""
        if os.path.exists(self.path):
            with open(self.path, "rb") as file:
                os.fsync(file.fileno())

    def rows(self) -> np.ndarray:
        """All rows, read from the disk where they are used."""
        return np.memmap(self.path, self.dtype, "r").reshape(-1, *self.shape)

    def verify(self, start: int, end: int, checksum: int) -> None:
        """Refuses other rows than those that were written."""
        if zlib.crc32(self.rows()[start:end].tobytes()) != checksum:
            fail(f"{self.path} is not what this run has written; write it again: --from-stage {self.stage}")


def keep_freed_memory() -> None:
    """Lets glibc keep what is freed: mapping, clearing and giving back hundreds of MB takes a fifth of an update of M.

    Where the C library has no mallopt nothing happens.
    """
    with contextlib.suppress(AttributeError, OSError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: never give the end of the heap back
        mallopt(-4, 0)  # M_MMAP_MAX: take no block from elsewhere than the heap


def check_args(args: Args) -> None:
    """Refuses impossible numbers and combinations in one line."""
    at_least = {
        1: "total_timesteps num_envs eval_episodes max_hold latent_size vae_depth vae_epochs vae_batch_size "
        "hidden_size num_mixtures sequence_length model_batch_size model_updates dream_length episodes generations "
        "eval_generations",
        0: "seed eval_frequency checkpoint_frequency vae_lr kl_tolerance model_lr model_lr_decay done_weight "
        "idle_limit holdout_ratio",
        2: "min_episode_length population",
    }
    for bound, names in at_least.items():
        for name in names.split():
            value = getattr(args, name)
            if value is not None and not value >= bound:
                fail(f"--{name.replace('_', '-')} must be at least {bound}, not {value}")
    for name in ("model_lr_decay", "holdout_ratio"):
        if getattr(args, name) > 1:
            fail(f"--{name.replace('_', '-')} must be at most 1, not {getattr(args, name)}")
    if not (args.temperature > 0 and args.sigma > 0):
        fail("--temperature and --sigma must be greater than 0")
    if args.from_stage and not args.resume:
        fail("--from-stage needs --resume")
    if args.envpool and args.env_id != "CarRacing-v3":
        fail(f"--envpool is for CarRacing-v3, not {args.env_id}")


if __name__ == "__main__":
    main(parse_args())
