# /// script
# requires-python = ">=3.11,<3.15"
# dependencies = [
#     "box2d>=2.3.10; python_version < '3.14'", "cma>=4.4", "gymnasium>=1.4", "matplotlib>=3.10", "moviepy>=2.2",
#     "numpy>=2.1", "opencv-python-headless>=4.11", "pillow>=11", "pygame-ce>=2.5", "tensorboard>=2.20", "torch>=2.6",
#     "tqdm>=4.67", "tyro>=1.0", "vizdoom>=1.3",
# ]
# ///
"""World Models: V (a VAE) and M (an LSTM) learn a dream from random play; C, one linear layer, is evolved on them.

The algorithm, with the functions that are its steps, one stage after the other:
  collect      play random actions, each held for some steps; keep frames, actions, rewards and ends
  train_vae    V: compress every frame into a vector z (VAE, vae_loss)
  train_model  M: encode every frame as the Gaussian of its z; from z_t, a_t and the past predict z_{t+1}, as a mixture
               of Gaussians (MDNRNN, mdn_nll), and, where dreams need them, the reward and the end (model_loss)
  evolve       C: a_t = tanh(W [z_t, h_t]), h_t M's state before it reads z_t (controller_action); CMA-ES looks for W
    dream      in M's own rollouts: z_{t+1} is sampled from M's mixture at a temperature (dream_step, mixture_sample),
               of several Ms that learned the same from one drawn for each step (dream_step_by_lot)
    play       or in the real environment: z_{t+1} is V's code of the next frame
In TakeCover C is evolved in the dream alone, then scored in the real game. In CarRacing, as published, C is evolved in
the real environment on what V and M make of it; --controller-env dream is this script's extension.
The first part of the file is the algorithm, up to main; environments, pictures and the run folder follow it.

Paper:      Ha & Schmidhuber 2018, World Models, arXiv 1803.10122   Reference code: hardmaru/WorldModelsExperiments
Run:        python world_models.py --env-id VizdoomTakeCover-v1          (or: uv run world_models.py ...)
Resume:     python world_models.py --resume runs/<run folder> [--from-stage m]
Evaluate:   python world_models.py --evaluate runs/<run folder> [--capture-video]
Watch:      tensorboard --logdir runs; curves stand at environment steps + all updates and generations made
In the stages some common flags mean:
  total_timesteps       counts what collect records; a resume with more goes on recording and learns V, M, C anew
  checkpoint_frequency  counts environment steps, then frames of V, then sequences of M; saving V and M takes 5 % of
                        the time at most, and so does saving C, which has no other count and is saved when evaluated
  eval_frequency        counts the environment steps that C's candidates make where they are evolved, in dreams too;
                        evaluations are also eval_generations apart at least, and C is evaluated at its end
Deviations from the reference code, each also marked at the line it concerns:
  1. Random actions of CarRacing are held random numbers (there: randomly initialised networks).
  2. Frames are scaled to [0, 1] as they are (there stretched in contrast, and black turns white by an overflow);
     TakeCover is drawn at 160 x 120 (there: 640 x 480).
  3. Episodes drawn at random (holdout_ratio) are kept from M, which is tested on them.
  4. M's sequences are pieces of episodes from the zero state, padded (there so for the car; TakeCover's episodes are
     joined end to end and the state is carried on), and z after an episode's last frame is no target.
  5. Only terminations are ends (there also where the time limit cut an episode off).
  6. Outside TakeCover, M of a dream predicts ends and rewards too, CarRacing's as if all tracks had as many tiles.
  7. All biases of M begin at zero, the forget gate's at one (there Glorot uniform, one added to the forget gate).
  8. The dream's temperature is the paper's 1.15 (there 1.25).
  9. All candidates of a generation share their episodes' seeds or their dreams' noise (there: pairs of candidates).
 10. No reward for large weights in C's fitness (there: by a wrong sign), and weights are not rounded to 1e-4.
 11. C is the last generation's mean (there: the best mean of all evaluations, every 25 generations on 1,024 episodes).
 12. Episodes of CarRacing are played to their end while C is evolved, too (there: cut short; see idle_limit).
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
import shutil
import signal
import sys
import tempfile
import threading
import time
import warnings
import zipfile
from collections.abc import Callable
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from types import SimpleNamespace
from typing import Annotated, Literal, NamedTuple, NoReturn, get_args, get_origin, get_type_hints

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
    env_id: str = "VizdoomTakeCover-v1"  # Gymnasium id with image observations (CarRacing-v3, my_module:MyEnv-v0)
    total_timesteps: Count | None = None  # environment steps of random actions, recorded for V and M; default by task
    num_envs: Few = 1  # environments played side by side in all stages, each in its own process if more than one
    max_episode_steps: Count | None = None  # most steps of an episode; default the task's, or 10,000, TakeCover 2,100
    action_repeat: Few = 1  # environment steps per action (rewards summed); what is called a step below is an action
    rounds: Count = 1  # times that the stages follow each other; C plays what the later rounds record; may be raised
    round_timesteps: Count = 15_000  # environment steps that each later round records
    record_sigma: Amount = 0.05  # standard deviation of the weights around C's that play an episode of a later round
    explore: Share = 0.3  # share of the held actions that are random in what later rounds record, the rest is C's
    play: str | None = None  # run folder whose dream is entered: the keyboard acts in a window, nothing is trained
    from_stage: Literal["collect", "v", "m", "c"] | None = None  # with --resume: the stage to repeat, with all after it
    render_obs: bool = False  # observe the rendered picture, where observations are no images (CartPole-v1)
    max_hold: Count | None = None  # a random action is held for 1 to this many steps; default by task, 10 elsewhere
    min_episode_length: Annotated[int, 2, 10**9] | None = None  # recordings of fewer steps are dropped; by task, 2

    # V, the variational autoencoder
    latent_size: Size | None = None  # size of z (Z); default by task, 32 elsewhere
    vae_depth: Size = 32  # V: channels of the first convolution; the others are multiples of it
    vae_epochs: Count = 10  # V: passes over all frames
    vae_batch_size: Size = 100  # V: frames per batch
    vae_lr: Positive = 1e-4  # V: learning rate
    kl_tolerance: Amount = 0.5  # V: nats per latent dimension, summed over them, below which a frame's KL costs nothing

    # M, the mixture-density LSTM
    hidden_size: Size | None = None  # M: units of the LSTM (H); default by task, 256 elsewhere
    num_mixtures: Size = 5  # M: Gaussians in the mixture of each latent dimension (K)
    num_models: Few = 1  # M: networks that dream by turns: one, by lot, says what comes next; C sees the first's state
    sequence_length: Count | None = None  # M: time steps per sequence at most (T); default by task, 500 elsewhere
    model_batch_size: Size = 100  # M: sequences per batch (B)
    model_updates: Count | None = None  # M: updates; default by task, 4000 elsewhere
    model_lr: Positive = 1e-3  # M: learning rate at first
    model_lr_decay: Share | None = None  # M: factor per update towards a rate of 1e-5; default by task, 1 elsewhere
    heads: bool | None = None  # M: predict ends and rewards too, as dreams need; default: where C is evolved in dreams
    end_weight: Amount | None = None  # M: weight of terminations in the loss of the ends; default by task, 1 elsewhere
    pessimism: Amount = 1.0  # M: weight of predicting too much reward, that of too little is 1
    reward_window: Count = 1  # M: CarRacing's tiles are paid for over this many steps around the one that reaches them
    holdout_ratio: Share = 0.05  # M: share of the episodes, one at least, that M is tested on, not trained with

    # C, the controller, and its dream
    controller_env: Literal["real", "dream"] | None = None  # where C is evolved; default by task, dream elsewhere
    temperature: Positive = 1.15  # dream: divides the mixture's logits, its root scales the noise (deviation 8)
    dream_length: Count | None = None  # steps of a dream at most; default, and never more: an episode's time limit
    at_rest: Share = 1.0  # share of dreams that begin at first frames, the others begin elsewhere in an episode
    population: Annotated[int, 2, 10**9] = 64  # C: candidates per generation (P)
    episodes: Count = 16  # C: episodes or dreams per candidate (E), the same ones for all candidates of a generation
    generations: Count = 1_800  # C: generations; may be raised on a resume
    sigma: Positive = 0.1  # C: standard deviation of the first generation's weights
    idle_limit: Natural = 0  # steps without reward that end an episode of collect or C, 0 = never (deviation 12)
    eval_generations: Count = 10  # C: generations between evaluations at least, beside eval_frequency


# === Networks ===


class Spec(NamedTuple):
    """What the networks must know of a task."""

    action_kind: str  # thirds (TakeCover: one number, three moves), car (steer, gas, brake), box or discrete
    action_dim: int  # numbers of an action as M receives it, and outputs of C (A)
    time_limit: int  # actions of an episode at most
    end_head: bool  # does M predict the end of an episode, and
    reward_head: bool  # the reward; not in TakeCover, where it is 1 per environment step

    @property
    def is_takecover(self) -> bool:
        """M also reads the restart flag (first = 1); C sees z, M's c and h, no bias. Elsewhere C sees z, h and a 1."""
        return self.action_kind == "thirds"


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
        for conv in (self.conv1, self.conv2, self.conv3, self.conv4):
            image = F.relu_(conv(image))
        x = image.flatten(1)
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


def glorot(module: nn.Module) -> None:
    """TensorFlow's initial weights of layers: Glorot uniform, zero bias."""
    if isinstance(module, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)


def preprocess(frames: torch.Tensor) -> torch.Tensor:
    """Frames (N, 64, 64, 3) uint8 -> (N, 3, 64, 64) in [0, 1] (deviation 2: as they are), a view, channels last."""
    return frames.movedim(-1, -3).float() / 255


class MDNRNN(nn.Module):
    """M: an LSTM reads z, action and, in TakeCover, the restart flag; its output predicts the next z as a mixture.

    Each dimension of z has a mixture of its own, p(z) = sum_k pi_k N(z; mu_k, sigma_k), independent of the others given
    h. The output is the logits of pi, then mu, then log sigma, K x Z numbers each; with heads it ends in the logit of
    termination and the reward in standard deviations. A state is torch's (h, c), (1, B, H) each.
    """

    NUM_STARTS = 1000  # recorded states that dreams begin in, at first frames and as many elsewhere: set_dream_starts

    def __init__(self, spec: Spec, args: Args):
        super().__init__()
        self.spec, self.shape = spec, (3, args.num_mixtures, args.latent_size)  # pi, mu and sigma; K; Z
        self.repeat = args.action_repeat  # environment steps of an action
        self.warm_up = math.ceil(100 / self.repeat)  # read before a dream that begins elsewhere; CarRacing's zoom is 50
        inputs, units = args.latent_size + spec.action_dim + spec.is_takecover, args.hidden_size
        self.lstm = nn.LSTM(inputs, units)
        self.head = nn.Linear(units, math.prod(self.shape) + spec.end_head + spec.reward_head)
        glorot(self.head)
        bound = math.sqrt(6 / (inputs + 5 * units))  # Glorot's, of one matrix from input and h to the four gates
        nn.init.uniform_(self.lstm.weight_ih_l0, -bound, bound)
        nn.init.uniform_(self.lstm.weight_hh_l0, -bound, bound)
        nn.init.zeros_(self.lstm.bias_hh_l0).requires_grad_(False)  # the paper's LSTM has one bias, not two
        nn.init.zeros_(self.lstm.bias_ih_l0)  # deviation 7: biases begin at zero,
        nn.init.ones_(self.lstm.bias_ih_l0.data[units : 2 * units])  # the forget gate's at one
        self.register_buffer("reward_mean", torch.zeros(()))
        self.register_buffer("reward_std", torch.ones(()))
        for name, size in (("mu", args.latent_size), ("logvar", args.latent_size), ("h", units), ("c", units)):
            self.register_buffer(f"start_{name}", torch.zeros(2 * self.NUM_STARTS, size))  # where dreams begin

    def initial(self, batch_size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The zero state."""
        return (self.start_h.new_zeros(1, batch_size, self.lstm.hidden_size),) * 2

    def forward(self, z, action, first, state) -> tuple[torch.Tensor, tuple]:
        """Sequences z (T, B, Z), action (T, B, A), first (T, B), 1 where episodes begin: outputs (T, B, ...), state."""
        x = torch.cat([z, action, first[..., None]] if self.spec.is_takecover else [z, action], -1)
        hs, state = self.lstm(x, state)
        return self.head(hs), state

    def split(self, out: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Outputs -> log_pi (not normalised), mu, log_sigma (..., K, Z), end logit and reward (...) or None."""
        has_end, has_reward = self.spec.end_head, self.spec.reward_head
        mixture, end_logit, reward = out.split([math.prod(self.shape), int(has_end), int(has_reward)], -1)
        log_pi, mu, log_sigma = mixture.unflatten(-1, self.shape).unbind(-3)
        heads = end_logit.squeeze(-1) if has_end else None, reward.squeeze(-1) if has_reward else None
        return log_pi, mu, log_sigma, *heads


class Agent(nn.Module):
    """V, M and C, whose weights are W: actions = tanh(features W)."""

    def __init__(self, spec: Spec, args: Args):
        super().__init__()
        self.vae = VAE(args.latent_size, args.vae_depth).to(memory_format=torch.channels_last)
        self.model = MDNRNN(spec, args)
        self.others = nn.ModuleList(MDNRNN(spec, args) for _ in range(args.num_models - 1))  # not seen by C
        features = args.latent_size + (2 * args.hidden_size if spec.is_takecover else args.hidden_size + 1)
        self.register_buffer("controller", torch.zeros(features, spec.action_dim))  # bias last

    def models(self) -> list[MDNRNN]:
        """All that dream, first the one whose state C sees."""
        return [self.model, *self.others]

    def features(self, z: torch.Tensor, state: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """What C sees (B, features): z, c, h in TakeCover, else z, h and a one for the bias."""
        h, c = state[0][0], state[1][0]
        return torch.cat([z, c, h] if self.model.spec.is_takecover else [z, h, torch.ones_like(h[:, :1])], 1)


# === Losses ===


def vae_loss(vae: VAE, image: torch.Tensor, noise: torch.Tensor, kl_tolerance: float) -> tuple[torch.Tensor, dict]:
    """Squared error summed over an image (N, 3, 64, 64) plus KL to the unit Gaussian, mean over the batch.

    KL = -1/2 sum(1 + logvar - mu^2 - exp(logvar)), over the dimensions of z (z = mu + exp(logvar / 2) noise), counts at
    least kl_tolerance * Z: below that it gives no gradient.
    """
    mu, logvar = vae.encode(image)
    recon = ((vae.decode(mu + torch.exp(0.5 * logvar) * noise) - image) ** 2).sum((1, 2, 3))
    kl = -0.5 * (1 + logvar - mu**2 - torch.exp(logvar)).sum(1)
    assert recon.shape == kl.shape == image.shape[:1]
    loss = (recon + kl.clamp(min=kl_tolerance * mu.shape[1])).mean()
    return loss, {"losses/vae_recon_loss": recon.detach().mean(), "losses/vae_kl_loss": kl.detach().mean()}


def mdn_nll(log_pi: torch.Tensor, mu: torch.Tensor, log_sigma: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """-log p(target) in nats for each dimension (..., Z) under its own mixture of K Gaussians, given (..., K, Z).

    -log sum_k softmax(log_pi)_k N(target; mu_k, sigma_k), with the softmax's sum and the Gaussians' 2 pi taken out.
    """
    scaled = (target.unsqueeze(-2) - mu) * torch.exp(-log_sigma)
    joint = torch.logsumexp(log_pi - log_sigma - 0.5 * scaled**2, -2)
    return torch.logsumexp(log_pi, -2) - joint + 0.5 * math.log(2 * math.pi)


def model_loss(model: MDNRNN, batch: dict, end_weight: float, pessimism: float) -> tuple:
    """Loss of M on sequences (T, B, ...) from the zero state; each of its terms; the logits of the end (T, B) or None.

    batch: z, action, first, next_z, has_next, terminated, reward, and mask, which is 0 in the padding. Mixture: mean
    over dimensions and over steps with a successor; end: cross-entropy in which terminations weigh end_weight; reward:
    squared error in standard deviations, in which too much weighs `pessimism`: C finds whatever is promised too much.
    """
    mask = batch["mask"]

    def mean(x: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
        assert x.shape == where.shape
        return (x * where).sum() / where.sum().clamp(min=1)

    out, _ = model(batch["z"], batch["action"], batch["first"], model.initial(mask.shape[1]))
    log_pi, mu, log_sigma, end_logit, reward = model.split(out)
    nll = mdn_nll(log_pi, mu, log_sigma, batch["next_z"]).mean(-1)
    terms = {"losses/mdn_nll": mean(nll, batch["has_next"])}
    if end_logit is not None:  # deviation 6: ends and rewards, where dreams need them
        weight = 1 + (end_weight - 1) * batch["terminated"]
        cross_entropy = F.binary_cross_entropy_with_logits(end_logit, batch["terminated"], weight, reduction="none")
        terms["losses/done_loss"] = mean(cross_entropy, mask)
    if reward is not None:
        target = (batch["reward"] - model.reward_mean) / model.reward_std
        error = reward - target
        terms["losses/reward_loss"] = mean(torch.where(error > 0, pessimism, 1.0) * error**2, mask)
    return sum(terms.values()), {name: term.detach() for name, term in terms.items()}, end_logit


# === Acting ===


def controller_action(features: torch.Tensor, weights: torch.Tensor, kind: str) -> torch.Tensor:
    """Actions (N, A), as M receives them, of N linear controllers: features (N, F), weights (N, F, A)."""
    raw = torch.tanh(torch.bmm(features.unsqueeze(1), weights).squeeze(1))
    if kind == "car":  # steer in [-1, 1]; gas in [0, 1], half at zero weights; brake the positive part
        steer, gas, brake = raw.unbind(1)
        return torch.stack([steer, (gas + 1) / 2, F.relu(brake)], 1)
    return F.one_hot(raw.argmax(1), raw.shape[1]).float() if kind == "discrete" else raw


def linear_policy(weights: torch.Tensor, kind: str) -> Callable:
    """Policy of P candidates (P, F, A). A job is an episode that one plays: first all of candidate 0, then of 1, ..."""
    return lambda features, jobs, num_jobs: controller_action(features, weights[jobs * len(weights) // num_jobs], kind)


def mixture_sample(log_pi, mu, log_sigma, uniform: torch.Tensor, normal: torch.Tensor, temperature: float):
    """z (N, Z) from mixtures (N, K, Z): one component for each dimension by `uniform` (N, Z), noise `normal` (N, Z).

    z = mu_k + sigma_k sqrt(temperature) normal, with k drawn from softmax(log_pi / temperature).
    """
    bounds = torch.softmax(log_pi / temperature, 1).cumsum(1)[:, :-1]
    component = (uniform.unsqueeze(1) > bounds).sum(1, keepdim=True)
    mu, log_sigma = mu.gather(1, component).squeeze(1), log_sigma.gather(1, component).squeeze(1)
    return mu + torch.exp(log_sigma) * math.sqrt(temperature) * normal


def dream_step(model: MDNRNN, z, action, first, state, uniform, normal, temperature: float) -> tuple:
    """Next z (N, Z), state, rewards (N,) and logits of P[termination] (N,) of N dreams; one ends where P > 1/2."""
    out, state = model(z[None], action[None], first[None], state)
    log_pi, mu, log_sigma, end_logit, reward = model.split(out[0])
    z = mixture_sample(log_pi, mu, log_sigma, uniform, normal, temperature)
    if end_logit is None:  # M of the published car predicts z alone
        return z, state, torch.zeros_like(first), torch.full_like(first, -math.inf)
    if reward is None:  # TakeCover: one for each environment step survived
        return z, state, torch.full_like(first, model.repeat), end_logit
    return z, state, reward * model.reward_std + model.reward_mean, end_logit


def dream_step_by_lot(models: list[MDNRNN], z, action, first, states: list[tuple], by, *noise_and_temperature) -> tuple:
    """dream_step of every M, each with its own state; dream i goes on with what M number by[i] says (N,)."""
    pairs = zip(models, states, strict=True)
    steps = [dream_step(model, z, action, first, state, *noise_and_temperature) for model, state in pairs]
    states, (z, _, rewards, end_logit) = [step[1] for step in steps], steps[0]
    if len(models) > 1:  # what C finds in one of them that is not in the data, another does not know
        says = (torch.stack([step[i] for step in steps]) for i in (0, 2, 3))
        z, rewards, end_logit = (values[by, torch.arange(len(by), device=by.device)] for values in says)
    return z, states, rewards, end_logit


@torch.no_grad()
def dream(agent: Agent, policy: Callable, num_jobs: int, num_dreams: int, generator, args: Args, stop=None, trace=None):
    """Returns and lengths (num_jobs,) of dreams that all step together, of dream_length steps or the time limit's.

    Job j dreams dream j % num_dreams: jobs of one dream begin in the same place and share their noise (deviation 9), as
    real episodes share a seed; so in evolve each of P candidates plays E dreams, P * E jobs. With several Ms the lot is
    that of the dream, too. Dreams that have ended are taken out every 50 steps. A list `trace` gets z of the first one.
    """
    model, models, device = agent.model, agent.models(), agent.controller.device
    normal = functools.partial(torch.randn, num_dreams, args.latent_size, generator=generator, device=device)
    start = torch.randint(model.NUM_STARTS, (num_dreams,), generator=generator, device=device)
    at_rest = torch.rand(num_dreams, generator=generator, device=device) < args.at_rest
    start = torch.where(at_rest, start, start + model.NUM_STARTS)
    jobs = torch.arange(num_jobs, device=device)
    which = jobs % num_dreams
    z = (model.start_mu[start] + torch.exp(0.5 * model.start_logvar[start]) * normal())[which]
    states = [(m.start_h[start][which][None], m.start_c[start][which][None]) for m in models]
    first = (states[0][1][0] == 0).all(1).float()  # a zero state is that of an episode's first step
    returns, lengths = torch.zeros(num_jobs, device=device), torch.zeros(num_jobs, device=device)
    alive = torch.ones(num_jobs, device=device)
    for t in range(min(args.dream_length or math.inf, model.spec.time_limit)):
        if t % 50 == 0 and t:
            kept = alive.nonzero().squeeze(1)  # host sync
            if not len(kept) or (stop and stop.requested):
                break
            jobs, which, z, first, alive = (x[kept] for x in (jobs, which, z, first, alive))
            states = [(h[:, kept], c[:, kept]) for h, c in states]
        if trace is not None:
            trace.append(z[0].clone())
        action = policy(agent.features(z, states[0]), jobs, num_jobs)
        uniform = torch.rand(num_dreams, args.latent_size, generator=generator, device=device)
        noise, by = (uniform[which], normal()[which]), None
        if len(models) > 1:
            by = torch.randint(len(models), (num_dreams,), generator=generator, device=device)[which]
        now = z, action, first, states, by, *noise, args.temperature
        z, states, rewards, end_logit = dream_step_by_lot(models, *now)
        returns[jobs] += rewards * alive
        lengths[jobs] += alive
        alive, first = alive * (end_logit <= 0), torch.zeros_like(first)
    if trace is not None:
        del trace[int(lengths[0]) :]  # the rest is of others
    return returns, lengths


@torch.no_grad()
def act(agent: Agent, obs: np.ndarray, dones: np.ndarray, state: tuple, noise: torch.Tensor, policy: Callable) -> tuple:
    """Actions (N, A) for frames (N, 64, 64, 3), M's next state; dones (N,): where an episode begins, noise (N, Z): z's.

    z_t from frame t, the action from [z_t, h_t], then both to M for h_{t+1}.
    """
    first = torch.as_tensor(dones, device=noise.device, dtype=torch.float32)
    state = tuple(x * (1 - first[:, None]) for x in state)
    mu, logvar = agent.vae.encode(preprocess(torch.as_tensor(obs, device=noise.device)))
    z = mu + torch.exp(0.5 * logvar) * noise
    action = policy(agent.features(z, state))
    _, state = agent.model(z[None], action[None], first[None], state)
    return action, state


def play(agent: Agent, envs, policy: Callable, seeds: np.ndarray, generator, stop, idle_limit: int = 0):
    """Returns and lengths (J,) of real episodes with these seeds (J,); an environment takes the next as it ends one.

    With idle_limit an episode ends after so many steps without a positive reward, and the rest of its time is paid like
    its last step (deviation 12: not by default).
    """
    device, num_envs, model = agent.controller.device, envs.num_envs, agent.model
    (kind, action_dim, limit, *_), latent_size = model.spec, agent.vae.mu.out_features
    jobs, queue = np.full(num_envs, -1), iter(range(len(seeds)))  # the job of each environment, and those not begun
    returns, lengths = np.full(len(seeds), np.nan), np.zeros(len(seeds), int)  # of the jobs
    total, steps, idle = np.zeros(num_envs), np.zeros(num_envs, int), np.zeros(num_envs, int)  # of episodes in progress
    dones, state, actions = np.ones(num_envs, bool), model.initial(num_envs), np.zeros((num_envs, action_dim))
    while np.isnan(returns).any() and not stop.requested:
        if dones.any():
            for i in np.flatnonzero(dones):
                jobs[i] = next(queue, -1)
                total[i] = steps[i] = idle[i] = 0
            own_seeds = [int(seeds[job]) if job >= 0 else None for job in jobs]  # without a job and a seed one rests
            obs, _ = envs.reset(seed=own_seeds, options={"reset_mask": dones})
        busy = np.flatnonzero(jobs >= 0)
        noise = torch.randn(num_envs, latent_size, generator=generator, device=device)[busy]
        own = functools.partial(policy, jobs=torch.as_tensor(jobs[busy], device=device), num_jobs=len(seeds))
        action, new = act(agent, obs[busy], dones[busy], tuple(x[:, busy] for x in state), noise, own)
        actions[busy] = action.cpu().numpy()  # host sync
        state = tuple(x.index_copy(1, torch.as_tensor(busy, device=device), y) for x, y in zip(state, new, strict=True))
        obs, rewards, terminations, truncations, _ = envs.step(env_action(actions, kind))
        total, steps, idle = total + rewards, steps + 1, np.where(rewards > 0, 0, idle + 1)
        given_up = (idle == idle_limit) & (idle_limit > 0)
        total += np.where(given_up & ~terminations, rewards * (limit - steps), 0)
        dones = terminations | truncations | given_up
        for i in np.flatnonzero(dones & (jobs >= 0)):
            returns[jobs[i]], lengths[jobs[i]] = total[i], steps[i]
    return returns, lengths


def env_action(action: np.ndarray, kind: str) -> np.ndarray:
    """Actions (N, A) as M receives them -> as the environment does."""
    if kind == "thirds":  # 0 nothing, 1 right, 2 left
        return np.where(action[:, 0] > 1 / 3, 1, np.where(action[:, 0] < -1 / 3, 2, 0))
    return action.argmax(-1) if kind == "discrete" else action


class HeldActions:
    """Random actions (N, A), each held for 1 to max_hold steps: white noise would hardly move anything.

    In later rounds a share `explore` of them is random, the others are those of controllers drawn around C.
    """

    def __init__(self, num: int, agent: Agent, args: Args, rng: np.random.Generator, round_number: int = 1):
        self.agent, self.spec, self.args, self.rng = agent, agent.model.spec, args, rng
        self.share = args.explore if round_number > 1 else 1.0
        self.is_random, self.weights = np.ones(num, bool), agent.controller.expand(num, -1, -1).clone()
        self.actions, self.left = np.zeros((num, self.spec.action_dim), np.float32), np.zeros(num, int)

    def __call__(self, restart: np.ndarray | bool = False) -> np.ndarray:
        """The next held actions; where an episode begins they are drawn anew, and so is its controller."""
        new = (self.left == 0) | restart
        self.left = self.left - 1
        if not new.any():  # drawing for nobody took 7 % of TakeCover's steps per second
            return self.actions
        actions = self.rng.uniform(-1, 1, self.actions.shape).astype(np.float32)
        if self.spec.action_kind == "discrete":
            choice = self.rng.integers(self.spec.action_dim, size=len(new))
            actions = np.eye(self.spec.action_dim, dtype=np.float32)[choice]
        if self.spec.action_kind == "car":  # deviation 1: held numbers, braking in one draw of ten
            actions[:, 1:] = (actions[:, 1:] + 1) / 2
            actions[:, 2] *= self.rng.random(len(new)) < 0.1
        self.actions = np.where(new[:, None], actions, self.actions)
        self.is_random = np.where(new, self.rng.random(len(new)) < self.share, self.is_random)
        self.left = np.where(new, self.rng.integers(self.args.max_hold, size=len(new)), self.left)
        for i in np.flatnonzero(restart) if self.share < 1 else ():
            noise = self.rng.standard_normal(self.agent.controller.shape, np.float32)
            self.weights[i] = self.agent.controller + self.args.record_sigma * torch.from_numpy(noise).to(self.weights)
        return self.actions

    def policy(self, features: torch.Tensor, jobs: torch.Tensor | slice = slice(None), num_jobs: int = 0):
        """Actions (jobs, A): the held ones where those are random, elsewhere those of the drawn controllers."""
        held = torch.from_numpy(self.actions).to(features)[jobs]
        is_random = torch.from_numpy(self.is_random).to(features.device)[jobs, None]
        return torch.where(is_random, held, controller_action(features, self.weights[jobs], self.spec.action_kind))


# === Updates ===


def update_vae(vae: VAE, optimizer, image: torch.Tensor, noise: torch.Tensor, args: Args) -> dict:
    """One step of V on images (N, 3, 64, 64) with noise (N, Z). Returns detached scalars, no host sync."""
    optimizer.zero_grad(set_to_none=True)
    loss, metrics = vae_loss(vae, image, noise, args.kl_tolerance)
    loss.backward()
    optimizer.step()
    return metrics


def update_model(models: list[MDNRNN], optimizer, batch: dict, args: Args) -> dict:
    """One step of M, each for itself, on sequences (T, B, ...). Returns detached scalars, their mean, no host sync."""
    optimizer.zero_grad(set_to_none=True)
    metrics = []
    for model in models:
        loss, terms, _ = model_loss(model, batch, args.end_weight, args.pessimism)
        loss.backward()
        nn.utils.clip_grad_value_(model.parameters(), 1.0)  # by value, not by norm
        metrics.append(terms)
    optimizer.step()
    return {name: sum(terms[name] for terms in metrics) / len(models) for name in metrics[0]}


# === Replay buffer ===


class ReplayBuffer:
    """Recorded episodes end to end: frame t was seen, action t taken, reward t received for it.

    The frames are in a file of the run folder, the rest in memory and in the checkpoint. The frame after the last
    action of an episode is not kept (TakeCover's is black).
    """

    def __init__(self, frames, num_envs: int = 1, min_length: int = 2):
        self.frames, self.min_length = frames, min_length  # rows (64, 64, 3) uint8, see ArrayFile
        self.episodes: list[tuple[np.ndarray, np.ndarray]] = []  # actions (T, A), rewards (T,)
        self.terminated: list[bool] = []
        self.open: list[list[tuple]] = [[] for _ in range(num_envs)]  # (frame, action, reward) of episodes in progress

    def __len__(self) -> int:
        return sum(len(rewards) for _, rewards in self.episodes)

    def close(self, i: int, terminated: bool) -> None:
        """The episode of environment i has ended: it is kept unless it is too short. Did its last step terminate?"""
        if len(self.open[i]) >= self.min_length:
            self.add(*(np.stack(column) for column in zip(*self.open[i], strict=True)), terminated)
        self.open[i] = []

    def cut_off(self) -> None:
        """Recording ends here: what is there of the episodes in progress is kept, as not terminated."""
        for i in range(len(self.open)):
            self.close(i, False)

    def add(self, frames: np.ndarray, actions: np.ndarray, rewards: np.ndarray, terminated: bool) -> None:
        """Keeps an episode: frames (T, 64, 64, 3) uint8, actions (T, A), rewards (T,)."""
        self.frames.append(frames)
        self.episodes.append((actions.astype(np.float32), rewards.astype(np.float32)))
        self.terminated.append(bool(terminated))

    @property
    def spans(self) -> np.ndarray:
        """First row of each episode, and the one after its last (episodes, 2)."""
        ends = np.cumsum([0] + [len(rewards) for _, rewards in self.episodes])
        return np.stack([ends[:-1], ends[1:]], 1)

    def state_dict(self) -> dict:
        self.frames.sync()
        state = {"lengths": np.diff(self.spans)[:, 0].tolist(), "terminated": list(self.terminated)}
        if self.episodes:
            action, reward = (np.concatenate(column) for column in zip(*self.episodes, strict=True))
            state |= {"action": torch.from_numpy(action), "reward": torch.from_numpy(reward)}
        return state

    def load_state_dict(self, state: dict) -> None:
        """Takes the episodes back; the file of frames loses what was recorded later."""
        if state["lengths"]:
            self.frames.cut(sum(state["lengths"]))
            self.terminated, cuts = list(state["terminated"]), np.cumsum(state["lengths"])[:-1]
            columns = (np.split(state[name].numpy().copy(), cuts) for name in ("action", "reward"))
            self.episodes = list(zip(*columns, strict=True))


def learnable_rewards(rewards: np.ndarray, spec: Spec, window: int, repeat: int) -> np.ndarray:
    """Rewards (T,) of an episode as M learns them (deviation 6): CarRacing pays 1000 / (tiles of the track) for a tile.

    How many tiles a track has is in no picture, so here each pays the mean, 3.4. An action may pass several; each of
    its `repeat` environment steps costs 0.1. Nor is where a tile begins: what tiles pay is spread evenly over a window
    of actions around it, within the episode.
    """
    cost = 0.1 * repeat
    if spec.action_kind != "car" or not (rewards > 0).any():
        return rewards
    tiles = np.where(rewards > 0, np.round((rewards + cost) / (rewards[rewards > 0].min() + cost)), 0)
    inside = np.convolve(np.ones(len(tiles)), np.ones(window))[(window - 1) // 2 :][: len(tiles)]  # of its window
    spread = np.convolve(tiles / inside, np.ones(window))[window // 2 :][: len(tiles)]
    return np.where(rewards > 0, -cost, rewards) + 3.4 * spread


class Latents:
    """All N recorded time steps on the device, as M is trained on them: z as its Gaussian, actions, rewards, ends."""

    def __init__(self, rb: ReplayBuffer, rows: np.ndarray, spec: Spec, args: Args, device: torch.device):
        rows, spans = torch.from_numpy(np.array(rows)).to(device), rb.spans  # (N, 2, Z), (episodes, 2)
        first, last, terminated = (np.zeros(len(rb), np.float32) for _ in range(3))  # of an episode; terminated?
        first[spans[:, 0]], last[spans[:, 1] - 1] = 1, 1
        terminated[spans[:, 1] - 1] = rb.terminated  # deviation 5: not where an episode was cut off
        action = np.concatenate([actions for actions, _ in rb.episodes])
        settings = spec, args.reward_window, args.action_repeat
        reward = np.concatenate([learnable_rewards(rewards, *settings) for _, rewards in rb.episodes])
        data = {"action": action, "reward": reward, "first": first, "last": last, "terminated": terminated}
        self.data = {name: torch.from_numpy(array.astype(np.float32)).to(device) for name, array in data.items()}
        self.data |= {"mu": rows[:, 0], "logvar": rows[:, 1]}  # float16
        held_out = np.random.default_rng(7).random(len(spans)) < args.holdout_ratio  # in all rounds the same ones
        held_out[0] |= not held_out.any()  # as long as there is no other
        self.spans, self.holdout = spans, spans[held_out]  # deviation 3
        self.train = spans if held_out.all() else spans[~held_out]  # a single episode is both

    def batches(self, spans: np.ndarray, length: int, batch_size: int, rng: np.random.Generator) -> list[np.ndarray]:
        """One pass over episodes, shuffled: batches of B pieces (B, 2) of at most `length` steps (deviation 4)."""
        pieces = [(i, min(i + length, end)) for start, end in spans for i in range(start, end, length)]
        return np.array_split(rng.permutation(pieces), math.ceil(len(pieces) / batch_size))

    def batch(self, pieces: np.ndarray, generator: torch.Generator) -> dict[str, torch.Tensor]:
        """Sequences (T, B, ...) of pieces (B, 2), padded to the longest; every z is drawn afresh from its Gaussian."""
        start, end = pieces.T
        rows = start + np.arange((end - start).max() + 1)[:, None]  # (T + 1, B)
        mask = torch.from_numpy((rows[:-1] < end).astype(np.float32)).to(self.data["mu"].device)
        rows = torch.from_numpy(np.minimum(rows, len(self.data["mu"]) - 1)).to(mask.device)
        mu, logvar = self.data["mu"][rows].float(), self.data["logvar"][rows].float()
        z = mu + torch.exp(0.5 * logvar) * torch.randn(mu.shape, generator=generator, device=mu.device)
        names = "action", "reward", "first", "last", "terminated"
        batch = {name: self.data[name][rows[:-1]] for name in names} | {"mask": mask, "z": z[:-1], "next_z": z[1:]}
        return batch | {"has_next": mask * (1 - batch.pop("last"))}  # deviation 4: none after the last frame


# === Training ===

# A stage is given the run (class Stages): agent, envs, rb, latents (a file of V's codes), rng, and how far it has come,
# `step` in environment steps and `units_done` of the stage: environment steps, frames, updates or generations.
# run.updates makes the updates that are left, pass after pass over the batches. Interrupted stages return False.


@torch.no_grad()
def collect(run: "Stages") -> bool:
    """Records episodes until the run has made record_until environment steps."""
    args, rb, agent, num_envs, rng = run.args, run.rb, run.agent, run.args.num_envs, run.rng["actions"]
    held, state = HeldActions(num_envs, agent, args, rng, run.round), agent.model.initial(num_envs)
    idle, dones, run.reported = np.zeros(num_envs, int), np.ones(num_envs, bool), (run.step, time.perf_counter())
    run.begin("collect", run.record_until, run.step)
    while run.step < run.record_until and not run.stop.requested:
        if run.step >= run.next_save and (dones.all() or num_envs > 1):
            run.save()
        if dones.any():
            seeds = run.rng["reset"].integers(2**31, size=num_envs).tolist()
            obs, _ = run.envs.reset(seed=seeds, options={"reset_mask": dones})
        actions = held(dones)
        if run.round > 1:
            noise = torch.from_numpy(rng.standard_normal((num_envs, args.latent_size), np.float32)).to(run.device)
            own, state = act(agent, obs, dones, state, noise, held.policy)
            actions = own.cpu().numpy()
        next_obs, rewards, terminations, truncations, infos = run.envs.step(env_action(actions, run.spec.action_kind))
        for i in range(num_envs):
            rb.open[i].append((obs[i].copy(), actions[i], rewards[i]))
        obs, ended, given_up = next_obs, terminations | truncations, False
        if args.idle_limit:
            idle = np.where(rewards > 0, 0, idle * ~dones + 1)
            given_up = idle == args.idle_limit
        dones = ended | given_up
        run.step += num_envs * args.action_repeat
        run.progress.update(num_envs * args.action_repeat)
        for i in np.flatnonzero(dones):  # what a given-up episode had left is paid like its last step
            rest = 0 if ended[i] else rewards[i] * (run.spec.time_limit - len(rb.open[i]))
            run.returns.append(float(sum(reward for *_, reward in rb.open[i]) + rest))
            rb.close(i, terminations[i])
        if ended.any():
            run.log_episodes(infos, ended)
            now = time.perf_counter()
            run.log({"charts/SPS": (run.step - run.reported[0]) / (now - run.reported[1])})
            run.reported = run.step, now
    rb.cut_off()
    if run.stop.requested:
        return False
    if len(rb) < 2:
        few = f"no episode of {args.min_episode_length} actions in {run.step} steps"
        raise SystemExit(f"\nerror: {few}: nothing to learn from")
    run.collected, returns = run.step, np.array(run.returns or [np.nan])
    text = f"{len(run.returns)} whole episodes recorded, {returns.mean():.1f} +- {returns.std():.1f}"
    run.say(f"round {run.round}, {run.step} environment steps, {len(rb)} actions kept: {text}")
    return True


def train_vae(run: "Stages") -> bool:
    """V: passes over all recorded frames, in an order drawn for each pass.

    In later rounds as many updates as passes over new frames would have, none where V needs none or no frame is new.
    """
    args, vae, frames = run.args, run.agent.vae, run.rb.frames.rows()
    new = (len(frames) - run.frames_seen) / len(frames)
    if not run.units_done and run.frames_seen and not (new and sees_new_scenery(run, frames)):
        return True
    run.latents.cut(0)  # those of another V
    batch_size = min(args.vae_batch_size, len(frames))
    per_pass = len(frames) // batch_size
    optimizer = torch.optim.Adam(vae.parameters(), args.vae_lr, fused=True)
    run.keep_optimizer(optimizer)

    def one_pass(number: int) -> np.ndarray:
        rng = np.random.default_rng([args.seed, 2, run.round, number])  # 2 ... 6: one for each purpose
        order = rng.permutation(len(frames))
        return order[: per_pass * batch_size].reshape(per_pass, batch_size)

    def update(rows: np.ndarray) -> dict:
        image = preprocess(torch.from_numpy(frames[np.sort(rows)]).to(run.device))
        noise = torch.randn(batch_size, args.latent_size, generator=run.rng["v"], device=run.device)
        return update_vae(vae, optimizer, image, noise, args)

    if not run.updates(math.ceil(per_pass * args.vae_epochs * new), batch_size, one_pass, update):
        return False
    run.frames_seen = len(frames)
    warn_of_failure(log_reconstructions, run, frames)
    return True


@torch.no_grad()
def sees_new_scenery(run: "Stages", frames: np.ndarray) -> bool:
    """Is V's error, on 1,000 frames each, larger on those that it was not trained on, by more than 5 %?"""
    vae, errors = run.agent.vae, []
    for part in (frames[: run.frames_seen], frames[run.frames_seen :]):
        image = preprocess(torch.from_numpy(part[:: math.ceil(len(part) / 1000)].copy()).to(run.device))
        errors.append(float(((vae.decode(vae.encode(image)[0]) - image) ** 2).sum((1, 2, 3)).mean()))
    trains, (old, new) = errors[1] > 1.05 * errors[0], errors
    run.say(f"V's error is {new:.1f} on new frames, {old:.1f} on old ones: it is {'' if trains else 'not '}trained on")
    return trains


@torch.no_grad()
def encode(run: "Stages") -> bool:
    """Means and log-variances of all frames, float16, to a file, from where it ends; False if interrupted."""
    frames, chunk, again = run.rb.frames.rows(), 500, "train it again with a smaller --vae-lr: --from-stage v"
    encoded = min(run.latents.num_rows(), len(frames)) // chunk * chunk  # the same chunks as without an interruption
    run.latents.cut(encoded)
    run.begin("encode", len(frames), encoded)
    for start in range(encoded, len(frames), chunk):
        rows = torch.from_numpy(frames[start : start + chunk].copy()).to(run.device)
        mu_logvar = torch.stack(run.agent.vae.encode(preprocess(rows)), 1).half()
        if not mu_logvar.isfinite().all():  # host sync
            raise SystemExit(f"\nerror: not finite: latents of V; {again}")
        run.latents.append(mu_logvar.cpu().numpy())
        run.progress.update(len(rows))
        if run.stop.requested:
            return False
    mu = run.latents.rows()[:: max(len(frames) // 10_000, 1), 0].astype(np.float32)
    if (mu.std(0) < 1e-3).all():
        raise SystemExit(f"\nerror: the latents of V are constant; {again} or more --vae-epochs")
    return True


def train_model(run: "Stages") -> bool:
    """M: passes over all episodes but the held-out ones, in an order drawn for each; then its dream is looked at."""
    if not encode(run):
        return False
    args, models = run.args, run.agent.models()
    latents = Latents(run.rb, run.latents.rows(), run.spec, args, run.device)
    for model in models if not run.units_done else ():
        model.reward_mean.copy_(latents.data["reward"].mean())
        model.reward_std.copy_(latents.data["reward"].std().clamp(min=1e-3))
    weights = [weight for model in models for weight in model.parameters()]
    optimizer = torch.optim.Adam(weights, args.model_lr, fused=True)
    run.keep_optimizer(optimizer)

    def one_pass(number: int) -> list[np.ndarray]:
        rng = np.random.default_rng([args.seed, 3, run.round, number])
        return latents.batches(latents.train, args.sequence_length, args.model_batch_size, rng)

    def update(pieces: np.ndarray) -> dict:  # the rate falls from model_lr towards 1e-5, not at all with a decay of 1
        optimizer.param_groups[0]["lr"] = 1e-5 + (args.model_lr - 1e-5) * args.model_lr_decay**run.units_done
        return update_model(models, optimizer, latents.batch(pieces, run.rng["m"]), args)

    if not run.updates(args.model_updates, args.model_batch_size, one_pass, update):
        return False
    for model in models:  # the same places for all
        set_dream_starts(model, latents, np.random.default_rng([args.seed, 4, run.round]))
    log_holdout_scores(run, latents)
    warn_of_failure(log_open_dream, run, latents)
    return True


@torch.no_grad()
def set_dream_starts(model: MDNRNN, latents: Latents, rng: np.random.Generator) -> None:
    """Draws where dreams begin: half of them at first frames of recorded episodes, at rest, with the zero state.

    The other half anywhere after warm_up steps, with the state of M that these have led to, from zero.
    """
    num, warm_up = model.NUM_STARTS, model.warm_up
    rest = latents.spans[rng.integers(len(latents.spans), size=num), 0]
    spans = latents.spans[latents.spans[:, 1] - latents.spans[:, 0] > warm_up]
    rows, (h, c) = rest, model.initial(num)
    if len(spans):  # or all begin at rest
        start, end = spans[rng.integers(len(spans), size=num)].T
        rows = rng.integers(start + warm_up, end)
        generator = torch.Generator(h.device).manual_seed(int(rng.integers(2**31)))
        batch = latents.batch(np.stack([rows - warm_up, rows], 1), generator)
        _, (h, c) = model(batch["z"], batch["action"], batch["first"], (h, c))
    rows = np.concatenate([rest, rows])
    model.start_mu.copy_(latents.data["mu"][rows])
    model.start_logvar.copy_(latents.data["logvar"][rows])
    model.start_h[num:].copy_(h[0])
    model.start_c[num:].copy_(c[0])


def play_candidates(run: "Stages", weights: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Returns and lengths (P * E,) of the episodes or dreams of a generation's candidates (P, weights of C)."""
    args, controller = run.args, run.agent.controller
    policy = linear_policy(weights.view(-1, *controller.shape).to(run.device), run.spec.action_kind)
    rng = np.random.default_rng([args.seed, 6, run.round, run.units_done])
    seeds = rng.integers(2**31, size=args.episodes)  # deviation 9: the same for all candidates
    generator, num_jobs = torch.Generator(run.device).manual_seed(int(seeds[0])), len(weights) * args.episodes
    if args.controller_env == "real":
        seeds = np.tile(seeds, len(weights))
        return play(run.agent, run.envs, policy, seeds, generator, run.stop, args.idle_limit)
    outcome = dream(run.agent, policy, num_jobs, args.episodes, generator, args, run.stop)
    return tuple(tensor.cpu().numpy() for tensor in outcome)


def evolve(run: "Stages") -> bool:
    """C: CMA-ES on each candidate's mean return over the same episodes or dreams; the distribution's mean is kept."""
    import cma

    args, controller = run.args, run.agent.controller
    if not run.units_done:
        run.fitness, run.sigma = [], args.sigma
        run.start = {"mean": controller.cpu().clone(), "sigma": run.sigma, "generation": 0}
        if args.controller_env == "dream" and not calibrate(run):
            return False

    def cma_es() -> "cma.CMAEvolutionStrategy":
        """At run.start. Seed nan: NumPy's global generator is left alone, random numbers come from one of its own."""
        normal = np.random.default_rng([args.seed, 5, run.round, run.start["generation"]]).standard_normal
        options = {"popsize": args.population, "verbose": -9, "randn": lambda *size: normal(size), "seed": np.nan}
        return cma.CMAEvolutionStrategy(run.start["mean"].double().flatten().numpy(), run.start["sigma"], options)

    es = cma_es()
    for fitness in run.fitness:  # random numbers and fitness are all that CMA-ES depends on: a resume repeats its steps
        es.tell(es.ask(), fitness)
    if run.fitness and not np.allclose(es.mean, controller.cpu().flatten().numpy(), atol=1e-4):
        run.say("CMA-ES could not be repeated, as with another LAPACK: it starts anew from its mean and sigma")
        run.start = {"mean": controller.cpu().clone(), "sigma": run.sigma, "generation": run.units_done}
        run.fitness, es = [], cma_es()
    run.begin("c", args.generations, run.units_done)
    while not run.stop.requested:
        at_end = run.units_done >= args.generations
        run.pause(at_end)  # is C to be saved, or evaluated (log_scores)?
        if at_end or run.stop.requested:
            break
        candidates = es.ask()
        returns, lengths = run.shared(play_candidates, torch.tensor(np.stack(candidates), dtype=torch.float32))
        if run.stop.requested:
            break
        scores = returns.reshape(args.population, args.episodes).mean(1)
        if not np.isfinite(scores).all():
            raise SystemExit(f"\nerror: not finite: generation {run.units_done + 1}; the last checkpoint is intact")
        es.tell(candidates, -scores)  # deviation 10: nothing for large weights
        run.fitness.append((-scores).tolist())
        run.sigma = float(es.sigma)
        controller.copy_(torch.from_numpy(es.mean).view_as(controller))  # deviation 11: the last mean, not the best
        run.count_unit()
        steps = int(lengths.sum()) * args.action_repeat
        run.unscored = steps + (0 if run.scored else run.unscored)
        run.step += steps if args.controller_env == "real" else 0
        values = {"mean": scores.mean(), "best": scores.max(), "std": scores.std(), "sigma": es.sigma}
        run.log({f"controller/{name}": value for name, value in (values | {"length": lengths.mean()}).items()})
        run.say(f"generation {run.units_done}: mean {scores.mean():.1f}, best {scores.max():.1f}, sigma {es.sigma:.4f}")
        run.progress.update()
    return not run.stop.requested


def main(args: Args) -> str:
    args = with_task_defaults(args)
    check_args(args)
    if args.evaluate is not None:
        return evaluate_run(args)
    if args.play is not None:
        return enter_dream(args)
    checkpoint = load_run(args.resume, args) if args.resume is not None else None
    rehearse(functools.partial(make_vector_env, args, 1), args.capture_video)
    envs = make_vector_env(args, args.num_envs)
    spec = make_spec(envs, args)
    if checkpoint:
        rewind(checkpoint, args)
    check_sizes(args, spec, checkpoint)
    keep_freed_memory(choose_device(args))
    help_first(args, spec, envs)  # under torchrun only the first process gets further
    run = Stages(replace(args, from_stage=None), checkpoint, spec, envs)
    envs.on_fault = run.abort
    checkpoint = None  # what refers to the file keeps it on the disk
    print(introduction(run))

    stages = {"collect": collect, "v": train_vae, "m": train_model, "c": evolve}
    while run.stage != "finished" and stages[run.stage](run):
        run.finish()
    if run.stop.requested:
        run.save()

    envs.close()
    return run.close(run.agent.state_dict())


# === Environment ===

LATE_IMPORTS = ["cma", "PIL", "matplotlib"]  # packages that are imported where they are used

# The published settings by task (name of the environment without its version). A flag on the command line wins.
LENGTHS = {"max_hold", "min_episode_length", "sequence_length"}  # here in environment steps
DEFAULTS = {
    "total_timesteps": 1_000_000, "controller_env": "dream", "max_hold": 10, "min_episode_length": 2, "latent_size": 32,
    "hidden_size": 256, "sequence_length": 500, "model_updates": 4_000, "model_lr_decay": 1.0, "end_weight": 1.0,
}  # fmt: skip
TASKS = {
    "VizdoomTakeCover": {
        "total_timesteps": 3_080_000, "min_episode_length": 101, "latent_size": 64, "hidden_size": 512,
        "model_updates": 24_400, "model_lr_decay": 0.99999, "end_weight": 10.0, "max_episode_steps": 2_100,
    },
    "CarRacing": {
        "total_timesteps": 10_000_000, "controller_env": "real", "max_hold": 8, "sequence_length": 1_000,
    },
}  # fmt: skip


def task_name(env_id: str) -> str:
    """my_module:MyNamespace/MyEnv-v0 -> MyEnv."""
    return re.sub(r"-v\d+$", "", re.split("[:/]", env_id)[-1])


def with_task_defaults(args: Args) -> Args:
    """The settings in force: what was not given is filled in from TASKS."""
    task = DEFAULTS | TASKS.get(task_name(args.env_id), {})
    for name in LENGTHS & set(task):
        actions = math.ceil(task[name] / max(args.action_repeat, 1))  # what is less than 1 is refused later
        task[name] = max(actions, 2 if name == "min_episode_length" else 1)
    args = replace(args, **{name: value for name, value in task.items() if getattr(args, name) is None})
    return replace(args, heads=args.controller_env == "dream" if args.heads is None else args.heads)


def make_vector_env(args: Args, num_envs: int, video: str | None = None) -> gym.vector.VectorEnv:
    """The task's environments side by side; the first episode of the first is filmed into `video`, path of an MP4."""
    return side_by_side(args.env_id, [make_env(args, video if i == 0 else None) for i in range(num_envs)])


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


class RepeatUnseen(gym.Wrapper):
    """Repeats each action, sums the rewards, stops at the end of the episode.

    Nobody sees the frames between: an environment whose attribute `unseen` is False is told so and need not draw them,
    which makes benchmark/world_models_car.py five times as fast with an action_repeat of 4 (218 and 1,131 steps/s).
    The observation of an episode that ends within an action may be an older one; it is not used.
    """

    def __init__(self, env: gym.Env, repeat: int):
        super().__init__(env)
        self.repeat, self.is_told = repeat, getattr(env.unwrapped, "unseen", None) is False

    def step(self, action):
        total = 0.0
        for left in reversed(range(self.repeat)):
            self.tell(left > 0)
            obs, reward, terminated, truncated, info = self.env.step(action)
            total += reward
            if terminated or truncated:
                break
        self.tell(False)
        return obs, total, terminated, truncated, info

    def tell(self, unseen: bool) -> None:
        if self.is_told:
            self.env.unwrapped.unseen = unseen


class Resting(gym.Wrapper):
    """An environment that stands still after a reset without a seed, until the next one with a seed."""

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        self.rests, space = seed is None, self.observation_space
        return (np.zeros(space.shape, space.dtype), {}) if self.rests else self.env.reset(seed=seed)

    def step(self, action):
        if not self.rests:
            return self.env.step(action)
        return np.zeros(self.observation_space.shape, self.observation_space.dtype), 0.0, False, False, {}


def make_env(args: Args, video: str | None = None) -> Callable[[], gym.Env]:
    """Thunk of one environment: observations (64, 64, 3) uint8, its own actions or a box [-1, 1]."""
    main_process = os.getpid()

    def thunk() -> gym.Env:
        if os.getpid() != main_process:
            be_a_worker()
        env = make_pictures(args, video is not None)
        limits = filter(None, (args.max_episode_steps, env.spec.max_episode_steps))
        env = gym.wrappers.TimeLimit(env, min(limits, default=10_000))
        env = gym.wrappers.RecordEpisodeStatistics(CheckedEnv(env))
        env = Film(env, video) if video else env
        env = RepeatUnseen(env, args.action_repeat) if args.action_repeat > 1 else env
        return Resting(fit_spaces(env, args))

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
    kind = kind_of_action(env.action_space, args)
    if kind == "car":  # without the bar of instruments
        road = gym.spaces.Box(0, 255, (84, *obs.shape[1:]), np.uint8)
        env = gym.wrappers.TransformObservation(env, lambda o: o[:84], road)
    if env.observation_space.shape[:2] != (64, 64):
        env = gym.wrappers.ResizeObservation(env, (64, 64))
    if kind == "box":
        low, high = (bound.astype(float) for bound in (env.action_space.low, env.action_space.high))
        space, kind = gym.spaces.Box(-1, 1, low.shape, np.float32), env.action_space.dtype
        rounded = np.rint if kind.kind in "iu" else np.asarray
        env = gym.wrappers.TransformAction(env, lambda a: rounded(low + (a + 1) * (high - low) / 2).astype(kind), space)
    return env


def kind_of_action(space: gym.Space, args: Args) -> str:
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
    """The task as the networks see it, from the spaces of its environments."""
    space = envs.single_action_space
    kind = kind_of_action(space, args)
    action_dim = {"thirds": 1, "discrete": getattr(space, "n", 0)}.get(kind) or space.shape[0]
    limit = math.ceil(envs.get_attr("_max_episode_steps")[0] / args.action_repeat)
    return Spec(kind, int(action_dim), limit, end_head=args.heads, reward_head=args.heads and kind != "thirds")


def make_pictures(args: Args, film: bool) -> gym.Env:
    """A Gymnasium environment that can be drawn if it has to be; ViZDoom at a size drawn quickly (deviation 2)."""
    settings = {"render_mode": "rgb_array"} if film or args.render_obs else {}
    os.environ.setdefault("MUJOCO_GL", "egl" if settings else "disable")
    if not args.env_id.startswith("Vizdoom"):
        return make_gymnasium(args.env_id, **settings)
    try:
        import vizdoom.gymnasium_wrapper  # noqa: F401 (registers the ids)
    except ImportError:
        fail(f"{args.env_id} needs its simulator: pip install vizdoom")
    with contextlib.chdir(tempfile.gettempdir()):  # the game leaves files where its first episode begins
        env = make_gymnasium(args.env_id, screen_resolution="RES_160X120", **settings)
        env.reset()
        return env


# === Evaluation ===


def log_scores(run: "Stages") -> None:
    """Real and dream score of the distribution's mean, side by side, and one of its dreams, unless interrupted."""
    args, trace, envs = run.args, [], run.envs
    if args.capture_video:  # a film of each evaluation needs a new recorder
        video = run.picture("videos/evaluation.mp4")
        envs = run.make_envs(make_vector_env, args, min(args.num_envs, args.eval_episodes), video)
        envs.on_fault = run.abort
    real, dreamed = real_and_dream_scores(run.agent, envs, args, run.stop, trace)
    if args.capture_video:
        envs.close()
    if run.stop.requested:
        return
    run.ticks += 1  # where the next generation will stand: an interrupted run evaluates again
    run.log_evaluation(real)
    run.log({"charts/global_step": run.step})
    if dreamed is not None:
        run.say(f"global_step={run.step}, dream: {dreamed.mean():.1f} +- {dreamed.std():.1f}")
        run.log({"dream/episodic_return": dreamed.mean(), "dream/episodic_return_std": dreamed.std()})
    frames = decode_frames(run.agent, torch.stack(trace[:: max(len(trace) // 100, 1)]))
    warn_of_failure(write_gif, run.picture("dream.gif"), enlarged(frames))
    run.ticks -= 1


def real_and_dream_scores(agent: Agent, envs, args: Args, stop: "StopRequest", trace: list | None = None) -> tuple:
    """Returns of eval_episodes real episodes and of 100 dreams of such (None if M predicts no ends), on own seeds."""
    policy, device = linear_policy(agent.controller[None], agent.model.spec.action_kind), agent.controller.device
    seeds = np.random.default_rng([args.seed, 99]).integers(2**31, size=args.eval_episodes)
    real, _ = play(agent, envs, policy, seeds, make_generator(device, args.seed, 13), stop)
    generator = make_generator(device, args.seed, 14)
    dreamed, _ = dream(agent, policy, 100, 100, generator, like_episodes(args), stop, trace)
    return real, dreamed.cpu().numpy() if agent.model.spec.end_head else None


def like_episodes(args: Args) -> Args:
    """Settings of dreams to compare with real episodes: they begin at rest and last as long."""
    return replace(args, at_rest=1.0, dream_length=None)


def make_generator(device: torch.device, seed: int, stream: int) -> torch.Generator:
    """Random numbers that neither another seed nor another stream of this one has."""
    return torch.Generator(device).manual_seed(int(np.random.default_rng([seed, stream]).integers(2**63)))


def load_run(folder: str, args: Args) -> dict:
    """The checkpoint of a run; while C is evolved, with what has changed since it was written (Stages.save)."""
    checkpoint = load_checkpoint(folder, args)
    with must_fit(folder):
        parts = checkpoint["parts"]
        counters, agent = {name: parts["counters"][name] for name in Stages.COUNTERS.split()}, parts["agent"]
        if counters["stage"] == "c" and os.path.exists(f"{folder}/c/checkpoint.pt"):
            newer = load_checkpoint(f"{folder}/c", args)
            new, same = newer["parts"]["counters"], newer["args"] == checkpoint["args"]
            if same and new["round"] == counters["round"] and new["units_done"] >= counters["units_done"]:
                parts["counters"], agent["controller"] = new, newer["parts"]["controller"]
                checkpoint["global_step"] = newer["global_step"]
    return checkpoint


def round_of(counters: dict) -> int:
    """The round that a run's controller is of: while the next C is not evolved, the one before."""
    is_new = counters["stage"] == "finished" or (counters["stage"] == "c" and counters["units_done"])
    return counters["round"] - (not is_new)


def weights_of(folder: str, checkpoint: dict) -> dict:
    """V, M and C of a run that belong together."""
    counters = checkpoint["parts"]["counters"]
    number = round_of(counters)
    if number == counters["round"]:
        return checkpoint["parts"]["agent"]
    if not number:
        fail(f"{folder} has no controller yet, it is at stage {counters['stage']}")
    return torch.load(f"{folder}/round_{number}.pt", map_location="cpu", weights_only=True)


def trained_agent(folder: str, checkpoint: dict, envs: gym.vector.VectorEnv, args: Args) -> Agent:
    """The networks and the controller of a run; one line if they are not of this script or of these environments."""
    agent = Agent(make_spec(envs, args), args).to(choose_device(args))
    with must_fit(folder):
        agent.load_state_dict(weights_of(folder, checkpoint))
    return agent


def evaluate_run(args: Args) -> str:
    """Plays the controller of a run folder and prints its returns; with args.capture_video one episode is filmed."""
    checkpoint = load_run(args.evaluate, args)
    refuse_changes(args, checkpoint, "evaluate eval_episodes num_envs capture_video cuda seed temperature")
    video, stop = f"{args.evaluate}/videos/evaluate.mp4" if args.capture_video else None, StopRequest()
    envs = make_vector_env(args, min(args.num_envs, args.eval_episodes), video)
    agent = trained_agent(args.evaluate, checkpoint, envs, args)
    real, dreamed = real_and_dream_scores(agent, envs, args, stop)
    envs.close()
    if not stop.requested:
        counters = checkpoint["parts"]["counters"]
        number, generation = round_of(counters), counters["units_done"] or args.generations
        when = f"generation {generation}" if number == counters["round"] else "the end"
        print(f"{args.env_id} at {when} of round {number}, of a run at environment step {checkpoint['global_step']}:")
        if dreamed is not None:
            print(f"dream {dreamed.mean():.1f} +- {dreamed.std():.1f} ({len(dreamed)} dreams at {args.temperature})")
        single = " ".join(f"{episodic_return:.1f}" for episodic_return in real)
        print(f"return {real.mean():.1f} +- {real.std():.1f} ({len(real)} episodes: {single})")
    stop.exit()
    return args.evaluate


def calibrate(run: "Stages") -> bool:
    """Is the dream like the real environment? Says so before anything is evolved in it; False if interrupted.

    Plays 100 dreams as this round's episodes were played, and compares the returns.
    """
    if not run.returns:
        run.say(f"calibration: NOTHING to compare dreams with, no whole episode was recorded in round {run.round}")
        return True
    held = HeldActions(100, run.agent, run.args, np.random.default_rng([run.args.seed, 97]), run.round)
    restart, generator = np.ones(100, bool), make_generator(run.device, run.args.seed, 15)

    def policy(*features_and_jobs) -> torch.Tensor:
        held(restart)
        restart[:] = False
        return held.policy(*features_and_jobs)

    dreamed, _ = dream(run.agent, policy, 100, 100, generator, like_episodes(run.args), run.stop)
    if run.stop.requested:
        return False
    dreamed, recorded = dreamed.cpu().numpy(), np.array(run.returns)
    ratio, error, verdict = compare(dreamed, recorded)
    both = [f"{returns.mean():.1f} +- {returns.std():.1f}" for returns in (dreamed, recorded)]
    run.say(f"calibration: as recorded, dream {both[0]}, real {both[1]}: {ratio:.2f} +- {error:.2f} times as much")
    if verdict:
        run.say(f"calibration: {verdict}")
    scores = {"calibration/recording_dream": dreamed.mean(), "calibration/recording_real": recorded.mean()}
    run.log({name: value for name, value in scores.items() if math.isfinite(value)})
    return True


def compare(dreamed: np.ndarray, recorded: np.ndarray) -> tuple[float, float, str]:
    """Mean dreamed return over mean recorded return; its standard error; what speaks against the dream, if anything.

    That is a ratio outside 0.7 to 1.4, or more than 4 errors away from 1. It says nothing if its error is above 0.35,
    or above 0.35 of a ratio over 1; of fewer than three recorded episodes, or a mean of 0, there is no ratio.
    """
    mean, nothing = recorded.mean(), "this ratio says NOTHING: returns are too few, or spread too widely around zero"
    if len(recorded) < 3 or mean == 0:
        return math.nan, math.nan, nothing
    variance = [returns.var(ddof=1) / len(returns) for returns in (dreamed, recorded)]
    ratio = dreamed.mean() / mean
    error = math.sqrt(variance[0] + ratio**2 * variance[1]) / abs(mean)  # by the delta method
    if not error <= 0.35 * max(1, ratio):
        return ratio, error, nothing
    if 0.7 <= ratio <= 1.4 and abs(ratio - 1) <= 4 * error:
        return ratio, error, ""
    advice = "raise --total-timesteps, --rounds, --vae-epochs or --model-updates, or change --temperature"
    return ratio, error, f"the dream is NOT like the real environment: {advice}, before trusting it"


def log_holdout_scores(run: "Stages", latents: Latents) -> None:
    """What is to be known of V and M before they are dreamed with."""
    live = int((latents.data["mu"].float().std(0) > 0.15).sum())
    each = [holdout_scores(model, latents, run.args) for model in run.agent.models()]
    scores = {"model/live_dims": live} | {name: float(np.mean([scores[name] for scores in each])) for name in each[0]}
    run.say("held out: " + ", ".join(f"{name.split('/')[1]} {value:.3g}" for name, value in scores.items()))
    if live < run.args.latent_size / 2:
        run.say("less than half of V's dimensions are live: raise --total-timesteps and --vae-epochs")
    run.log({name: value for name, value in scores.items() if math.isfinite(value)})  # no death, no recall of deaths


@torch.no_grad()
def holdout_scores(model: MDNRNN, latents: Latents, args: Args) -> dict[str, float]:
    """M on the held-out episodes, with the true past: likelihood, and deaths true, predicted and found."""
    rng, generator = np.random.default_rng([args.seed, 9]), make_generator(latents.data["mu"].device, args.seed, 16)
    nll, deaths = [], np.zeros(3)
    for pieces in latents.batches(latents.holdout, args.sequence_length, args.model_batch_size, rng):
        batch = latents.batch(pieces, generator)
        _, terms, end_logit = model_loss(model, batch, args.end_weight, args.pessimism)
        nll.append(float(terms["losses/mdn_nll"]))
        if end_logit is not None:
            inside = batch["mask"] > 0
            true, found = (batch["terminated"] > 0) & inside, (end_logit > 0) & inside
            deaths += [float(x.sum()) for x in (true, found, true & found)]
    scores = {"model/holdout_mdn_nll": float(np.mean(nll))}
    if model.spec.end_head:
        true, predicted, found = deaths
        scores |= {"model/deaths_true": true, "model/deaths_predicted": predicted}
        scores["model/deaths_recall"] = found / true if true else math.nan
    return scores


def log_open_dream(run: "Stages", latents: Latents, samples: int = 8) -> None:
    """M left to itself on held-out episodes: error of the pictures by horizon, and a film of truth above dream.

    The error is the mean over so many rollouts of each episode, all sampled at the run's temperature, as dreams are.
    """
    from matplotlib.figure import Figure

    spans, warm_up = latents.holdout, run.agent.model.warm_up
    longest = int((spans[:, 1] - spans[:, 0]).max()) - 1
    warm_up = warm_up if longest > warm_up + 50 else 0
    context, length = warm_up + 5, min(warm_up + 100, longest)
    starts = np.array([start for start, end in spans if end - start > length])[:8]
    if length <= context:
        return
    generator = make_generator(run.device, run.args.seed, 17)
    batch = latents.batch(np.stack([starts, starts + length], 1), generator)
    truth, error = run.rb.frames.rows()[starts + np.arange(warm_up, length)[:, None]], 0.0
    for _ in range(samples):
        normal = torch.randn(batch["z"].shape, generator=generator, device=run.device)
        uniform = torch.rand(normal.shape, generator=generator, device=run.device)
        z = open_loop(run.agent.model, batch, uniform, normal, run.args.temperature, context)
        dreamed = decode_frames(run.agent, z[warm_up:].flatten(0, 1)).reshape(-1, len(starts), 64, 64, 3)
        error = error + ((dreamed / 255.0 - truth / 255.0) ** 2).mean((1, 2, 3, 4)) / samples
    context, length = context - warm_up, length - warm_up
    horizons = [k for k in (1, 5, 15, 45) if context + k <= length]
    run.log({f"open_loop/image_mse_horizon_{k}": error[context + k - 1] for k in horizons})
    figure = Figure(figsize=(4, 3), layout="constrained")
    axis = figure.subplots()
    axis.plot(np.arange(1 - context, length - context + 1), error)
    axis.axvline(0.5, color="grey", linestyle="--")
    axis.set(xlabel="actions since the last observation", ylabel="mean squared error of the picture", ylim=(0, None))
    figure.savefig(run.picture("open_loop_error.png"))
    frames = np.concatenate([truth, dreamed], 2).transpose(0, 2, 1, 3, 4).reshape(length, 128, -1, 3)
    write_gif(run.picture("open_loop.gif"), enlarged(frames, 2))


@torch.no_grad()
def open_loop(model: MDNRNN, batch: dict, uniform, normal, temperature: float, context: int) -> torch.Tensor:
    """z (T, N, Z): that of a batch up to `context` steps, then M's own, sampled, with the batch's actions."""
    z, state, path = batch["z"][0], model.initial(batch["z"].shape[1]), []
    for t, (action, first) in enumerate(zip(batch["action"], batch["first"], strict=True)):
        z = batch["z"][t] if t < context else z
        path.append(z)
        z, state, _, _ = dream_step(model, z, action, first, state, uniform[t], normal[t], temperature)
    return torch.stack(path)


@torch.no_grad()
def log_reconstructions(run: "Stages", frames: np.ndarray) -> None:
    """Twelve frames above what V makes of their means, as PNG."""
    from PIL import Image, ImageDraw

    rows = np.random.default_rng([run.args.seed, 8]).choice(len(frames), min(len(frames), 12), replace=False)
    frames = frames[np.sort(rows)]
    mu, _ = run.agent.vae.encode(preprocess(torch.from_numpy(frames).to(run.device)))
    rows, gap = (frames, decode_frames(run.agent, mu)), ((0, 0), (1, 1), (1, 1), (0, 0))
    pairs = enlarged(np.concatenate([np.pad(row, gap, constant_values=255) for row in rows], 1), 2)
    image = np.pad(np.concatenate(list(pairs), 1), ((0, 0), (90, 0), (0, 0)), constant_values=255)
    picture = Image.fromarray(image)
    for text, height in (("seen", 60), ("what V\nmakes of it", 190)):
        ImageDraw.Draw(picture).text((6, height), text, "black")
    picture.save(run.picture("reconstructions.png"))


@torch.no_grad()
def enter_dream(args: Args) -> str:
    """A window in which M dreams and the keyboard acts: c hands over to C and back, r begins anew, escape ends."""
    import pygame

    args = replace(args, play=os.path.normpath(args.play.removesuffix("checkpoint.pt")))
    if args != with_task_defaults(Args(play=args.play, cuda=args.cuda, seed=args.seed)):
        fail("--play takes --seed and --cuda and no other setting")
    screen = os.environ.get("SDL_VIDEODRIVER")  # environments are made without one
    folder, checkpoint = args.play, load_run(args.play, args)
    args = replace(Args(**checkpoint["args"]), cuda=args.cuda, seed=args.seed)
    envs = make_vector_env(args, 1)
    agent = trained_agent(folder, checkpoint, envs, args)
    fps = envs.metadata.get("render_fps", 30) / args.action_repeat
    envs.close()
    pygame.quit()
    if screen is None:
        os.environ.pop("SDL_VIDEODRIVER", None)
    model, models, spec, device = agent.model, agent.models(), agent.model.spec, agent.controller.device
    generator = make_generator(device, args.seed, 18)
    pygame.display.init()
    pygame.font.init()  # no pygame.init: it opens sound, which few such machines have
    window, font, clock = pygame.display.set_mode((512, 552)), pygame.font.Font(None, 28), pygame.time.Clock()
    if screen is None and pygame.display.get_driver() in ("dummy", "offscreen"):
        fail("--play opens a window, and there is no display")
    pressed, own, z, states = set(), True, None, []
    while True:
        for event in pygame.event.get():
            if event.type == pygame.KEYDOWN:
                pressed.add(event.key)
            elif event.type == pygame.KEYUP:
                pressed.discard(event.key)
            if event.type == pygame.QUIT or pygame.K_ESCAPE in pressed:
                pygame.quit()
                return folder
            own ^= event.type == pygame.KEYDOWN and event.key == pygame.K_c
        normal = torch.randn(1, args.latent_size, generator=generator, device=device)
        if z is None or pygame.K_r in pressed:
            i = torch.randint(model.NUM_STARTS, (1,), generator=generator, device=device)
            z, states, total, steps = model.start_mu[i], [model.initial(1)] * len(models), 0.0, 0
        action = keyboard_action(pressed, spec).to(device)
        if not own:
            action = controller_action(agent.features(z, states[0]), agent.controller[None], spec.action_kind)
        image, first = decode_frames(agent, z)[0], torch.full((1,), float(steps == 0), device=device)
        uniform = torch.rand(normal.shape, generator=generator, device=device)
        by = torch.randint(len(models), (1,), generator=generator, device=device)
        now = z, action, first, states, by, uniform, normal, args.temperature
        z, states, reward, logit = dream_step_by_lot(models, *now)
        total, steps, end = total + float(reward), steps + 1, float(torch.sigmoid(logit))
        picture = pygame.surfarray.make_surface(enlarged(image[None], 8)[0].transpose(1, 0, 2))
        told = "reward -  sum -  P[end] -"  # where M predicts z alone
        if spec.end_head:
            told = f"reward {float(reward):.2f}  sum {total:.1f}  P[end] {end:.2f}"
        text = f"{'you' if own else 'C'}  step {steps}  {told}"
        window.fill("black")
        window.blit(picture, (0, 0))
        window.blit(font.render(text, True, "white"), (8, 522))
        pygame.display.flip()
        clock.tick(fps)
        z = None if end > 0.5 or steps == spec.time_limit else z


def keyboard_action(pressed: set, spec: Spec) -> torch.Tensor:
    """Keys -> an action (1, A): arrows steer (and give gas and brake), digits choose from discrete actions, else 0."""
    import pygame

    right = float(pygame.K_RIGHT in pressed) - float(pygame.K_LEFT in pressed)
    up, n = float(pygame.K_UP in pressed) - float(pygame.K_DOWN in pressed), spec.action_dim
    if spec.action_kind == "discrete":
        chosen = [i for i in range(min(n, 10)) if pygame.K_0 + i in pressed] or [0]
        return F.one_hot(torch.tensor(chosen[:1]), n).float()
    numbers = [right, max(up, 0.0), max(-up, 0.0)] if spec.action_kind == "car" else [right, up, *[0.0] * n]
    return torch.tensor([numbers[:n]])


@torch.no_grad()
def decode_frames(agent: Agent, z: torch.Tensor) -> np.ndarray:
    """z (N, Z) -> pictures (N, 64, 64, 3) uint8."""
    return (agent.vae.decode(z).permute(0, 2, 3, 1) * 255).round().byte().cpu().numpy()


def enlarged(frames: np.ndarray, factor: int = 4) -> np.ndarray:
    """Frames (T, H, W, 3), each pixel as a square."""
    return frames.repeat(factor, 1).repeat(factor, 2)


def write_gif(path: str, frames: np.ndarray) -> None:
    """Animation of frames (T, H, W, 3) uint8; the 64 colours by octree, which keeps small bright things."""
    from PIL import Image

    first, *others = (Image.fromarray(frame).quantize(64, Image.Quantize.FASTOCTREE) for frame in frames)
    first.save(path, save_all=True, append_images=others, duration=80, loop=0)


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


STAGES = ("collect", "v", "m", "c", "finished")
STAGE_SETTINGS = {  # what a run repeated --from-stage may change
    "collect": "num_envs action_repeat max_hold min_episode_length save_buffer round_timesteps record_sigma explore "
    "idle_limit",
    "v": "latent_size vae_depth vae_epochs vae_batch_size vae_lr kl_tolerance",
    "m": "hidden_size num_mixtures num_models sequence_length model_batch_size model_updates model_lr model_lr_decay "
    "heads end_weight pessimism reward_window holdout_ratio",
    "c": "controller_env num_envs temperature dream_length at_rest population episodes generations sigma idle_limit "
    "eval_generations eval_episodes",
}


class Stages(Run):
    """A run that goes through STAGES: what they share, how far it has come, what each of them adds to a checkpoint.

    Curves stand at the environment steps plus `ticks`: one for each update, generation, and end of C.
    """

    COUNTERS = "stage round units_done ticks began collected record_until returns frames_seen frames_before start "
    COUNTERS += "fitness sigma unscored"

    def __init__(self, args: Args, checkpoint: dict | None, spec: Spec, envs: gym.vector.VectorEnv):
        step, ticks = (checkpoint["global_step"], checkpoint["parts"]["counters"]["ticks"]) if checkpoint else (0, 0)
        super().__init__(args, checkpoint and checkpoint | {"global_step": step + ticks})
        self.step = step
        both = ["Multiline", ["eval/episodic_return", "dream/episodic_return"]]
        self.writer.add_custom_scalars({"controller": {"real return beside the dream's": both}})
        self.next_save = next_multiple(step, args.checkpoint_frequency) if checkpoint else 0
        self.spec, self.envs, self.agent = spec, envs, Agent(spec, args).to(self.device)
        self.rb = ReplayBuffer(frames_file(self.folder), args.num_envs, args.min_episode_length)
        self.latents = ArrayFile(f"{self.folder}/latents.bin", (2, args.latent_size), np.float16)  # mu, logvar
        self.stage, self.round, self.units_done = "collect", 1, 0  # units: updates, frames or generations
        self.ticks, self.began = 0, {"collect": 0}  # ticks when each stage of this round began
        self.collected, self.record_until = 0, args.total_timesteps  # steps when recording ended, and when it will
        self.returns: list[float] = []  # of the episodes that this round has recorded
        self.frames_seen, self.frames_before = 0, 0  # frames that V was trained on, by now and when this round began
        self.start: dict = {}  # where CMA-ES began: mean, sigma, generation
        self.fitness: list[list[float]] = []  # of all candidates of all generations since, as CMA-ES was told
        self.sigma = args.sigma  # of CMA-ES, now
        self.unscored = 0  # steps that C's candidates have made since the last evaluation
        self.scored = False  # has C been evaluated as it is?
        self.known = 0  # the round whose networks the other processes have
        self.saved_optimizer = deepcopy(checkpoint["parts"].get("optimizer")) if checkpoint else None
        self.next_save_time, self.only_c = 0.0, False  # seconds of perf_counter; is all but C on the disk?
        rng = {name: np.random.default_rng([args.seed, i]) for i, name in enumerate(("actions", "reset"))}
        rng |= {name: make_generator(self.device, args.seed, i) for i, name in ((11, "v"), (12, "m"))}
        if checkpoint:  # without what is to be learned, or recorded, anew
            parts = checkpoint["parts"]
            parts["agent"] = self.agent.state_dict() | parts["agent"]
            parts.setdefault("replay", {"lengths": []})
        self.keep({"agent": self.agent, "counters": self} | ({"replay": self.rb} if args.save_buffer else {}), rng)
        if checkpoint and (not self.units_done or self.stage in ("collect", "c")):
            self.save()  # first of all it is remembered what begins anew
        if not len(self.rb):
            self.rb.frames.cut(0)

    def state_dict(self) -> dict:
        """How far the run has come, for a checkpoint."""
        return {name: getattr(self, name) for name in self.COUNTERS.split()}

    def load_state_dict(self, state: dict) -> None:
        vars(self).update(deepcopy({name: state[name] for name in self.COUNTERS.split()}))

    def log(self, values: dict[str, float]) -> None:
        """What is logged before a stage's first unit stands where that unit will."""
        ahead = self.stage != "collect" and not self.units_done
        for name, value in values.items():
            self.writer.add_scalar(name, value, self.step + self.ticks + ahead)

    def picture(self, kind: str) -> str:
        """Of one environment step there may be several."""
        name, suffix = os.path.splitext(super().picture(kind))
        return f"{name}_{self.ticks}{suffix}"

    def count_unit(self) -> None:
        self.units_done += 1
        self.ticks += 1
        self.learned = True

    def keep_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Names the optimizer of the stage in progress, which a checkpoint then holds; a resume finds it as it was."""
        self.parts["optimizer"] = optimizer
        if self.units_done:
            optimizer.load_state_dict(self.saved_optimizer)

    def save(self) -> None:
        """A checkpoint of the stage in progress, in a folder of its own what changes while C is evolved (see load_run).

        Where updates and generations are short, writing takes a twentieth of the time.
        """
        begin, self.saved, folder = time.perf_counter(), None, f"{self.folder}/c"
        if self.only_c:
            self.writer.flush()
            os.makedirs(folder, exist_ok=True)
            save_checkpoint(folder, self.args, self.step, {"counters": self, "controller": self.agent.controller}, {})
        else:  # there may be many of one environment step
            super().save()
            shutil.rmtree(folder, ignore_errors=True)
        self.only_c, end = self.stage == "c", time.perf_counter()
        self.next_save_time = end + 20 * (end - begin)

    def abort(self, fault: str) -> NoReturn:
        self.rb.cut_off()
        super().abort(fault)

    def pause(self, at_end: bool) -> None:
        """Between generations: saves and evaluates C where that is due."""
        args, enough = self.args, self.unscored >= self.args.eval_frequency
        due = at_end or (self.units_done and self.units_done % args.eval_generations == 0 and enough)
        self.scored = bool(args.eval_frequency and due)
        if args.checkpoint_frequency and (self.scored or time.perf_counter() > self.next_save_time):
            self.save()
        if self.scored:
            log_scores(self)

    def shared(self, play: Callable, weights: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
        """What play(run, weights) returns; under torchrun each process plays its share of the candidates."""
        if not dist.is_initialized():
            return play(self, weights)
        networks = None if self.known == self.round else {k: x.cpu() for k, x in self.agent.state_dict().items()}
        outcomes, self.known = [None] * dist.get_world_size(), self.round
        with together():
            dist.broadcast_object_list([(self.round, self.units_done, networks, weights)])
            outcome = play(self, weights.tensor_split(len(outcomes))[0])
            dist.gather_object((self.stop.requested, *outcome), outcomes)
        asked, returns, lengths = zip(*outcomes, strict=True)
        self.stop.requested, self.stop.since = max(asked), time.monotonic()  # a stop of one is a stop of all
        return np.concatenate(returns), np.concatenate(lengths)

    def close(self, weights: dict) -> str:
        if self.stage == "finished":
            self.say("finished: the command below goes on with more --generations or --rounds, or with --from-stage")
        if dist.is_initialized():
            with together():
                dist.broadcast_object_list([None])
            dist.destroy_process_group()
        return super().close(weights)

    def begin(self, text: str, total: int, already: int) -> None:
        """Sets the progress bar to something new, of which some is already done."""
        self.progress.set_description_str(text, refresh=False)
        self.progress.unit = {"collect": "step", "encode": "frame", "c": "generation"}.get(text, "update")
        self.progress.initial = 0
        self.progress.reset(total)  # which draws it
        self.progress.n = self.progress.last_print_n = self.progress.initial = already

    def finish(self) -> None:
        """The stage in progress is done, the next one begins, or the next round; each round's weights are kept."""
        if self.stage == "c" and self.args.rounds > 1:
            write_file(f"{self.folder}/round_{self.round}.pt", self.agent.state_dict())
        self.ticks += self.stage == "c"
        self.stage, self.units_done = STAGES[STAGES.index(self.stage) + 1], 0
        if self.stage == "finished" and self.round < self.args.rounds:
            self.stage, self.round, self.returns = "collect", self.round + 1, []
            self.record_until, self.frames_before = self.step + self.args.round_timesteps, self.frames_seen
        self.began[self.stage], self.only_c, self.unscored = self.ticks, False, 0
        self.parts.pop("optimizer", None)
        self.save()

    def updates(self, total: int, batch_size: int, one_pass: Callable, update: Callable) -> bool:
        """Makes the updates of V or M that are left, logs and saves now and then; False if the run was interrupted.

        one_pass: number of a pass over the data -> its batches, always as many; update: a batch -> metrics.
        """
        metrics, frequency = {}, self.args.checkpoint_frequency
        save_every = max(frequency // batch_size, 1) if frequency else math.inf
        per_pass, batches = len(one_pass(0)), None
        self.begin(self.stage, total, self.units_done)
        while self.units_done < total and not self.stop.requested:
            number, i = divmod(self.units_done, per_pass)
            if i == 0 or batches is None:
                batches = one_pass(number)
            metrics = update(batches[i])
            self.count_unit()
            self.progress.update()
            due = self.units_done % save_every == 0
            if self.units_done % 100 == 0 or self.units_done == total or due:
                self.log(require_finite(metrics, self.step + self.units_done))
            if due and self.units_done < total and time.perf_counter() > self.next_save_time:
                self.save()
        require_finite(metrics, self.step + self.units_done)
        return self.units_done == total and not self.stop.requested


@contextlib.contextmanager
def together():
    """Around what processes do together: the end of one of them is a line of the others."""
    try:
        yield
    except RuntimeError as error:
        raise SystemExit(f"error: another process has ended; the checkpoint is intact: {one_line(error)}") from error


def help_first(args: Args, spec: Spec, envs: gym.vector.VectorEnv) -> None:
    """Under torchrun: all processes but the first play their shares of C's candidates for it, until it ends."""
    if (number := int(os.environ.get("WORLD_SIZE", 1))) == 1:
        return
    if torch.cuda.is_available() and args.cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("gloo", timeout=timedelta(days=30))  # V and M, which the first one trains, take their time
    rank, device = dist.get_rank(), choose_device(args)
    if not rank:
        return
    agent, stop = Agent(spec, args).to(device), StopRequest()
    run, task = SimpleNamespace(args=args, spec=spec, envs=envs, agent=agent, device=device, stop=stop), [()]
    while task[0] is not None:
        with together():
            dist.broadcast_object_list(task)
            if task[0] is not None:
                run.round, run.units_done, networks, weights = task[0]
                agent.load_state_dict(networks or {}, strict=bool(networks))
                outcome = play_candidates(run, weights.tensor_split(number)[rank])
                dist.gather_object((stop.requested, *outcome))
    envs.close()
    stop.exit()
    raise SystemExit(0)


def rewind(checkpoint: dict, args: Args) -> None:
    """Sets a checkpoint back to the stage that a resume must go on with, and lets that stage's settings be changed."""
    counters, saved, parts = checkpoint["parts"]["counters"], checkpoint["args"], checkpoint["parts"]
    if args.from_stage:
        if STAGES.index(args.from_stage) > STAGES.index(counters["stage"]):
            fail(f"--from-stage {args.from_stage}: this run has not come further than {counters['stage']}")
        if args.from_stage == "collect" and counters["round"] > 1:
            fail(f"--from-stage collect: would throw away all {counters['round']} rounds; begin a new run instead")
        if args.from_stage != "collect" and args.total_timesteps != saved["total_timesteps"]:
            fail(f"--from-stage {args.from_stage} records nothing: --total-timesteps alone, or --from-stage collect")
        forget(checkpoint, args.from_stage)
        if counters["round"] > 1:  # these stages went on from what the round before had left
            sizes = "latent_size vae_depth hidden_size num_mixtures heads"
            refuse_changes(args, checkpoint, " ".join(set(saved) - set(sizes.split())))
            before = torch.load(f"{args.resume}/round_{counters['round'] - 1}.pt", "cpu", weights_only=True)
            fits = {k: x for k, x in before.items() if k[:7] != "others." or int(k.split(".")[1]) < args.num_models - 1}
            parts["agent"] = fits | parts["agent"]  # further Ms begin anew
        for name in STAGES[STAGES.index(args.from_stage) : -1]:
            saved |= {setting: getattr(args, setting) for setting in STAGE_SETTINGS[name].split()}
    elif args.total_timesteps > saved["total_timesteps"] and (counters["stage"], counters["round"]) != ("collect", 1):
        if counters["round"] > 1:
            fail("--total-timesteps is what the first round records: raise --rounds")
        forget(checkpoint, "v")  # records more, learns anew from all
        counters["stage"] = "collect"
    elif counters["stage"] == "finished" and (args.generations > saved["generations"] or args.rounds > saved["rounds"]):
        counters |= {"stage": "c", "units_done": saved["generations"], "ticks": counters["ticks"] - 1}
        counters["unscored"] = 10**9  # the curves of the last evaluation are purged: it is made again
    saved |= {name: max(saved[name], getattr(args, name)) for name in ("generations", "rounds")}
    if counters["round"] == 1:
        counters["record_until"] = args.total_timesteps
    if counters["stage"] == "collect" and counters["round"] == 1 and "replay" not in parts:
        forget(checkpoint, "collect")  # there is nothing to go on with
    recorded, frames = sum(parts.get("replay", {"lengths": ()})["lengths"]), frames_file(args.resume)
    advice = "--from-stage collect" if counters["round"] == 1 else "begin a new run"
    if not recorded and counters["stage"] in ("v", "m"):
        fail(f"{args.resume} has not kept what it recorded (--no-save-buffer): {advice}")
    needed = counters["stage"] in ("collect", "v", "m") or counters["round"] < saved["rounds"]
    if needed and frames.num_rows() < recorded:
        fail(f"{frames.path} has {frames.num_rows()} frames of {recorded}: {advice}")


def forget(checkpoint: dict, stage: str) -> None:
    """Takes out of a checkpoint what this stage and those after it have left, so that they begin anew."""
    parts, counters, gone = checkpoint["parts"], checkpoint["parts"]["counters"], STAGES[STAGES.index(stage) :]
    stage_of = {"vae": "v", "model": "m", "others": "m", "controller": "c", "reset": "collect", "actions": "collect"}
    parts["agent"] = {k: tensor for k, tensor in parts["agent"].items() if stage_of[k.split(".")[0]] not in gone}
    checkpoint["rng"] = {k: state for k, state in checkpoint["rng"].items() if stage_of.get(k, k) not in gone}
    counters |= {"stage": stage, "units_done": 0, "ticks": counters["began"][stage], "unscored": 0}
    if "v" in gone:
        counters["frames_seen"] = counters["frames_before"]
    if "collect" in gone:
        parts.pop("replay", None)
        counters |= {"round": 1, "ticks": 0, "collected": 0, "returns": [], "frames_seen": 0, "frames_before": 0}
    checkpoint["global_step"] = min(checkpoint["global_step"], counters["collected"])


class ArrayFile:
    """Rows of one shape and type in a file that only grows; what lies beyond the last checkpoint is cut off on load."""

    def __init__(self, path: str, shape: tuple[int, ...], dtype: type):
        self.path, self.shape, self.dtype = path, shape, np.dtype(dtype)
        self.row_bytes = int(np.prod(shape)) * self.dtype.itemsize

    def num_rows(self) -> int:
        return os.path.getsize(self.path) // self.row_bytes if os.path.exists(self.path) else 0

    def cut(self, length: int) -> None:
        """Keeps the first `length` rows."""
        if os.path.exists(self.path):
            os.truncate(self.path, min(length, self.num_rows()) * self.row_bytes)

    def append(self, rows: np.ndarray) -> None:
        assert rows.shape[1:] == self.shape and rows.dtype == self.dtype
        try:
            with open(self.path, "ab") as file:
                file.write(np.ascontiguousarray(rows).data)
        except OSError as error:  # a full disk, above all
            raise SystemExit(f"\nerror: cannot write {self.path}, the last checkpoint is intact: {error}") from error

    def sync(self) -> None:
        """To the disk, before a checkpoint that counts on it."""
        if os.path.exists(self.path):
            with open(self.path, "rb") as file:
                os.fsync(file.fileno())

    def rows(self) -> np.ndarray:
        """All rows, read from the disk where they are used."""
        return np.memmap(self.path, self.dtype, "r").reshape(-1, *self.shape)


def frames_file(run_dir: str) -> ArrayFile:
    return ArrayFile(f"{run_dir}/frames.bin", (64, 64, 3), np.uint8)


def introduction(run: Stages) -> str:
    """Where the run writes, its size, and its price: disk, and hours of one core for all rounds (networks on a CPU).

    The rates are those of docs/world_models.md, of larger networks by the square of their size, of smaller ones, as
    measured, by their size alone, of other environments the car's.
    """
    args, agent, spec = run.args, run.agent, run.spec
    v, m = (sum(p.numel() for p in part.parameters() if p.requires_grad) for part in (agent.vae, agent.model))
    several = f"{args.num_models} x " * (args.num_models > 1)
    text = f"{run.folder}: {run.device}, parameters: V {v:,}, M {several}{m:,}, C {agent.controller.numel():,}"
    recorded = args.total_timesteps + (args.rounds - 1) * args.round_timesteps
    frames = recorded // args.action_repeat
    text += f"; {frames * 64 * 64 * 3 / 1e9:.1f} GB of frames"
    depth, size = (max(ratio, ratio**2) for ratio in (args.vae_depth / 32, args.hidden_size / 256))
    size *= args.num_models
    rate, longest = 2_300 if spec.is_takecover else 138, min(args.sequence_length, spec.time_limit)
    steps = args.population * args.episodes * args.generations * args.rounds
    dreamed = steps * min(args.dream_length or math.inf, spec.time_limit) / 64_200 * size
    hours = {
        "recording": recorded / rate,
        "V": frames * args.vae_epochs / 299 * depth,
        "M": args.rounds * args.model_updates * args.model_batch_size * longest / 26_500 * size,
        "C": dreamed if args.controller_env == "dream" else steps * spec.time_limit * args.action_repeat / rate,
    }
    known = list(hours) if run.device.type == "cpu" else ["recording"] + ["C"] * (args.controller_env == "real")
    parts = ", ".join(f"{name} {hours[name] / 3600:.1f}" for name in known)
    text += f"; without evaluations about so many hours of one core: {parts}"
    return f"{text}; minutes: bash benchmark/world_models.sh small"


def check_sizes(args: Args, spec: Spec, checkpoint: dict | None) -> None:
    """Refuses what the disk or the device cannot hold: frames; weights, latents and batches; dreams and CMA-ES."""
    later = args.round_timesteps  # environment steps of each round but the first
    frames = missing = args.total_timesteps + (args.rounds - 1) * later
    if checkpoint:  # as rewind has left it
        counters, missing = checkpoint["parts"]["counters"], 0
        if counters["stage"] == "collect":  # what lies in the file beyond the checkpoint will be cut off
            there = sum(checkpoint["parts"].get("replay", {"lengths": ()})["lengths"])
            missing = counters["record_until"] - checkpoint["global_step"]
            missing -= (frames_file(args.resume).num_rows() - there) * args.action_repeat
        missing += (args.rounds - counters["round"]) * later
    frames, missing = frames // args.action_repeat, missing // args.action_repeat
    needed, free = missing * 64 * 64 * 3 / 1e9, shutil.disk_usage(args.resume or ".").free / 1e9
    if needed > free:
        fail(f"--total-timesteps: {needed:.0f} GB of frames do not fit on the disk, which has {free:.0f} GB")
    if args.min_episode_length > spec.time_limit:
        fail(f"--min-episode-length {args.min_episode_length}: episodes end after {spec.time_limit} actions")
    device, cpu = choose_device(args), torch.device("cpu")
    with torch.device("meta"):  # tensors that have shapes alone
        agent = Agent(spec, args)
    outputs, weights = agent.model.head.out_features, sum(weight.numel() for weight in agent.parameters())
    longest = min(args.sequence_length, spec.time_limit)
    sequences = longest * args.model_batch_size * (8 * args.hidden_size + 4 * outputs)
    images = args.vae_batch_size * (6 * 64 * 64 + 6_000 * args.vae_depth)
    latents = frames * (args.latent_size + spec.action_dim + 4)
    require_memory(4 * (4 * weights + latents + max(sequences, images)), "sizes of V, M and their batches", device)
    jobs, size = args.population * args.episodes, agent.controller.numel()
    dreams = jobs * (args.num_models * (2 * outputs + 8 * args.hidden_size) + size) * (args.controller_env == "dream")
    require_memory(4 * dreams, "--population and --episodes", device)
    require_memory(8 * (3 * size**2 + 4 * args.population * size), "CMA-ES of so many weights of C", cpu)


def keep_freed_memory(device: torch.device) -> None:
    """On a CPU: glibc keeps what is freed; mapping and clearing hundreds of MB anew takes up to a fifth of an update.

    Where the C library has no mallopt nothing happens.
    """
    with contextlib.suppress(AttributeError, OSError):
        if device.type == "cpu":
            mallopt = ctypes.CDLL(None).mallopt
            mallopt(-1, -1)  # M_TRIM_THRESHOLD: never give the end of the heap back
            mallopt(-4, 0)  # M_MMAP_MAX: take no block from elsewhere than the heap


def check_args(args: Args) -> None:
    """Refuses impossible numbers and combinations in one line."""
    check_bounds(args)
    if args.rounds > 1 and not args.save_buffer:
        fail("--rounds needs what earlier rounds recorded, which --no-save-buffer does not keep")
    if args.from_stage and not args.resume:
        fail("--from-stage needs --resume")
    if args.population < (number := int(os.environ.get("WORLD_SIZE", 1))):
        fail(f"--population {args.population}: fewer candidates than processes, {number}")
    if args.controller_env == "dream" and not args.heads:
        fail("dreams need an M that predicts ends and rewards: --heads True, with --resume and --from-stage m")


if __name__ == "__main__":
    main(parse_args())
