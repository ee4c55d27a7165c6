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
"""Dreamer (V1): a latent world model learned from pixels; actor and value learned by back-propagation through dreams.

The algorithm, with the functions that are its steps, which main takes in turns:
  act           filter the observation into the latent state (RSSM.obs_step), sample an action there, add noise;
                once an episode has ended, what was seen and done goes into the replay (ReplayBuffer.add)
  update        train_steps times for every train_frequency environment steps, on B sequences of L steps of the replay:
    model_loss  filter the sequences into states (RSSM.observe); reconstruct observations and rewards from each state,
                and pull its posterior and its prior, the prediction without the observation, together (Eq. 10)
    imagine     dream: from every one of these states H steps of the prior, the actor choosing the actions
    actor_loss  maximise the lambda_return of the dreams; its gradient passes back through value, reward, model (Eq. 7)
    value_loss  regress the values of the dreamt states on the same lambda_return (Eq. 8)
  evaluate      now and then: play the policy's mode, without noise
The first part of the file is the algorithm, up to main; environments, pictures and the run folder follow it.

Paper:      Hafner et al. 2020, Dream to Control, arXiv 1912.01603   Reference code: danijar/dreamer (TensorFlow 2)
Run:        python dreamer.py --env-id walker-walk          (or: uv run dreamer.py --env-id walker-walk)
Resume:     python dreamer.py --resume runs/<run folder>
Evaluate:   python dreamer.py --evaluate runs/<run folder> [--capture-video]
Watch:      tensorboard --logdir runs
Deviations from the reference code, named again at their lines and explained in docs/dreamer.md; where that code and the
paper differ, the code is followed: 1 precision, 2 replay, 3 terminal starts, 4 mode, 5 vectors, 6 length, 7 epsilon,
8 Adam, 9 first update, 10 evaluation, 11 log, 12 Atari, 13 time limit, 14 renderer, 15 overlap, 16 laptop size,
17 one bound.
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
from collections.abc import Callable
from copy import copy, deepcopy
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
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
    size: Literal["auto", "published", "laptop"] = "auto"  # SIZES, of what is None below; auto: laptop without a GPU
    obs_mode: Literal["pixels", "state"] = "pixels"  # what is seen of a dm_control task; a Gymnasium id has its own
    renderer: Literal["auto", "gl", "raycast"] = "auto"  # dm_control pixels: OpenGL, our ray-caster; auto = gl if there
    max_episode_steps: Count | None = None  # most steps of an episode; default the task's limit, or 1,000, Atari 27,000
    action_repeat: Count | None = None  # environment steps per action (rewards summed); default 2 on dm_control, else 1
    cont_head: bool | None = None  # learn when episodes terminate; default: not on dm_control, else yes
    clip_rewards: Literal["none", "tanh"] = "none"  # squash rewards before learning (tanh in V1's Atari experiments)

    # replay, and how often to learn from it
    buffer_size: Count | None = None  # capacity of the replay buffer in time steps (decisions plus one per episode)
    buffer_on_gpu: bool = True  # keep the replay on the training device; --no-buffer-on-gpu keeps it in host memory
    learning_starts: Count = 5_000  # environment steps of random actions before learning
    train_frequency: Count = 1_000  # environment steps between blocks of updates, summed over all environments
    train_steps: Natural = 100  # updates per block
    pretrain_steps: Natural = 100  # updates when learning starts
    batch_size: Count | None = None  # sequences per batch (B)
    batch_length: Count | None = None  # time steps per sequence (L)

    # networks
    cnn_depth: Size | None = None  # channels of the first convolution; the others are multiples of it
    stoch_size: Size = 30  # size of the stochastic part of the latent state
    deter_size: Size = 200  # size of the deterministic part of the latent state and of the RSSM's hidden layers
    dense_size: Size | None = None  # units per hidden layer of reward, continuation, value, actor, vector observations

    # world model
    free_nats: Amount = 3.0  # nats of KL between posterior and prior, averaged over the batch, that cost nothing
    kl_scale: Amount = 1.0  # weight of the KL between posterior and prior in the world model's loss
    model_lr: Positive = 6e-4  # learning rate of the world model

    # behavior
    horizon: Annotated[int, 2, 1000] = 15  # imagined decisions (H)
    gamma: Share = 0.99  # discount per decision
    td_lambda: Share = 0.95  # lambda of the lambda-return: 0 trusts the value after one step, 1 after all H
    actor_lr: Positive = 8e-5  # learning rate of the actor
    value_lr: Positive = 8e-5  # learning rate of the value network
    max_grad_norm: Positive = 100.0  # norm to which the gradients of model, actor and value are clipped, each by itself
    expl_noise: Amount = 0.3  # standard deviation of the Normal added to continuous actions while collecting
    expl_epsilon: tuple[Share, Share, Count] = (0.4, 0.1, 200_000)  # discrete: random share first, last, steps between

    # Speed
    bfloat16: bool = False  # bfloat16 autocast for matrix products and convolutions
    compile: bool = False  # torch.compile the losses
    cudagraphs: bool = False  # replay an update as one CUDA graph (GPU only)


ADAM_EPS = 1e-7  # Keras' default, which the reference code keeps
CONT_SCALE = 10.0  # weight of the continuation loss
PIECE = 1_000  # decisions; of an episode that is longer, pieces are stored


# === Networks ===

# Shapes: T (in a batch L) time steps, B sequences, H dreamt steps, N states or environments; S stoch, D deter,
# F = S + D features, E embedding, A action. Time comes first. Noise is drawn elsewhere and handed in.


class RSSM(nn.Module):
    """Recurrent state-space model (PlaNet, Eq. 4), whose state is (stoch, deter), the papers' s and h.

    deter_t = GRU([stoch_t-1, action_t], deter_t-1), where action_t is the one that led to time step t. Then stoch_t is
    drawn from a Normal: the posterior, given deter_t and the embedded observation, or else the prior, given deter_t.
    """

    def __init__(self, action_dim: int, embed_dim: int, stoch: int, deter: int, min_std: float = 0.1):
        super().__init__()
        self.stoch, self.deter, self.min_std = stoch, deter, min_std
        self.img_in = nn.Linear(stoch + action_dim, deter)
        self.cell = nn.GRUCell(deter, deter)
        self.prior_hidden = nn.Linear(deter, deter)
        self.prior_out = nn.Linear(deter, 2 * stoch)
        self.post_hidden = nn.Linear(deter + embed_dim, deter)
        self.post_out = nn.Linear(deter, 2 * stoch)

    def initial(self, batch_size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The zero state: stoch (B, S), deter (B, D)."""
        weight = self.img_in.weight
        return weight.new_zeros(batch_size, self.stoch), weight.new_zeros(batch_size, self.deter)

    def deter_step(self, stoch: torch.Tensor, deter: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
        """The next deter (B, D); float32 under autocast too, for it is carried on from step to step."""
        x = F.elu(self.img_in(torch.cat([stoch, action], -1)))
        with torch.autocast(x.device.type, enabled=False):
            return self.cell(x.float(), deter)

    def mean_std(self, out: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Outputs of a layer (..., 2S) -> mean and standard deviation (..., S)."""
        mean, std = out.float().chunk(2, -1)
        return mean, F.softplus(std) + self.min_std

    def prior(self, deter: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and standard deviation (..., S) of p(stoch | deter)."""
        return self.mean_std(self.prior_out(F.elu(self.prior_hidden(deter))))

    def posterior(self, deter: torch.Tensor, embed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and standard deviation (..., S) of q(stoch | deter, observation)."""
        return self.mean_std(self.post_out(F.elu(self.post_hidden(torch.cat([deter, embed], -1)))))

    def img_step(self, stoch, deter, action, noise) -> tuple[torch.Tensor, torch.Tensor]:
        """One step without an observation: stoch (B, S), a sample of the prior by Normal noise, and deter (B, D)."""
        deter = self.deter_step(stoch, deter, action)
        mean, std = self.prior(deter)
        return mean + std * noise, deter

    def obs_step(self, stoch, deter, action, embed, is_first, noise) -> tuple[torch.Tensor, ...]:
        """One step with an observation, from the zero state where is_first (B,) is 1: stoch, deter, mean, std."""
        keep = 1 - is_first[:, None]  # action needs none: that of a first entry is 0
        deter = self.deter_step(stoch * keep, deter * keep, action)
        mean, std = self.posterior(deter, embed)
        return mean + std * noise, deter, mean, std

    def observe(self, embed, action, is_first, noise) -> dict[str, torch.Tensor]:
        """Posterior states along sequences (T, B, ...) from the zero state: stoch, deter, mean, std (T, B, ...)."""
        stoch, deter = self.initial(action.shape[1])
        steps, names = [], ("stoch", "deter", "mean", "std")
        for t in range(len(action)):
            steps.append(self.obs_step(stoch, deter, action[t], embed[t], is_first[t], noise[t]))
            stoch, deter = steps[-1][:2]
        return {name: torch.stack(column) for name, column in zip(names, zip(*steps, strict=True), strict=True)}


class WorldModel(nn.Module):
    """Encoder, RSSM, decoder, reward head and (where episodes can terminate) continuation head.

    The heads read features (..., F) = [stoch, deter]. The continuation head's sigmoid is the discount after a state:
    it learns gamma where the episode goes on and 0 where it has terminated.
    """

    def __init__(self, obs_space: gym.Space, action_dim: int, args: Args):
        super().__init__()
        image, channels, units = len(obs_space.shape) == 3, obs_space.shape[-1], args.dense_size
        feat_dim, embed_dim = args.stoch_size + args.deter_size, 32 * args.cnn_depth if image else units
        self.obs_std = 1.0 if image else 0.1  # deviation 5: vectors, too
        self.encoder = ConvEncoder(channels, args.cnn_depth) if image else mlp(channels, units, 2, embed_dim)
        self.rssm = RSSM(action_dim, embed_dim, args.stoch_size, args.deter_size)
        self.decoder = ConvDecoder(feat_dim, channels, args.cnn_depth) if image else mlp(feat_dim, units, 3, channels)
        self.reward = mlp(feat_dim, units, 2, 1)
        self.cont = mlp(feat_dim, units, 3, 1) if args.cont_head else None
        self.apply(init_weights)
        self.to(memory_format=torch.channels_last)

    def embed(self, obs: torch.Tensor) -> torch.Tensor:
        """Preprocessed observations (T, B, ...) -> (T, B, E)."""
        return self.encoder(obs.flatten(0, 1)).unflatten(0, obs.shape[:2])

    def decode(self, feat: torch.Tensor) -> torch.Tensor:
        """Features (T, B, F) -> mean of the preprocessed observations (T, B, ...)."""
        return self.decoder(feat.flatten(0, 1)).float().unflatten(0, feat.shape[:2])


class Actor(nn.Module):
    """The policy. Continuous: tanh of a Normal, its mean bounded by 5, its std 5 at first. Discrete: one-hot action."""

    RAW_INIT_STD = math.log(math.exp(5) - 1)  # whose softplus is 5

    def __init__(self, feat_dim: int, action_dim: int, discrete: bool, units: int):
        super().__init__()
        self.discrete, self.action_dim = discrete, action_dim
        self.net = mlp(feat_dim, units, 4, action_dim if discrete else 2 * action_dim)
        self.apply(init_weights)

    def dist(self, feat: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Features (..., F) -> the policy there: (mean, std) before the tanh, or (logits,), each (..., A)."""
        out = self.net(feat).float()
        if self.discrete:
            return (out,)
        mean, std = out.chunk(2, -1)
        return 5 * torch.tanh(mean / 5), F.softplus(std + self.RAW_INIT_STD) + 1e-4

    def draw_noise(self, shape: tuple, generator: torch.Generator) -> torch.Tensor:
        """The random part (*shape, A) of `sample` and `mode`: standard Normal, or Gumbel for discrete actions."""
        noise = torch.empty(*shape, self.action_dim, device=generator.device)
        if self.discrete:
            return -noise.exponential_(generator=generator).log_()
        return noise.normal_(generator=generator)

    def sample(self, policy: tuple[torch.Tensor, ...], noise: torch.Tensor) -> torch.Tensor:
        """Action (..., A) with a gradient: reparameterised, or straight-through for one-hot actions."""
        if self.discrete:
            (logits,) = policy
            one_hot = F.one_hot((logits + noise).argmax(-1), self.action_dim).float()
            probs = logits.softmax(-1)
            return one_hot + probs - probs.detach()
        mean, std = policy
        return torch.tanh(mean + std * noise)

    def mode(self, policy: tuple[torch.Tensor, ...], noise: torch.Tensor) -> torch.Tensor:
        """Most likely action (N, A): arg-max, or each row's likeliest of 100 samples, made with noise (100, N, A)."""
        if self.discrete:
            return F.one_hot(policy[0].argmax(-1), self.action_dim).float()
        mean, std = policy
        x = mean + std * noise
        log_tanh_grad = 2 * (math.log(2) - x - F.softplus(-2 * x))  # log(1 - tanh(x)^2)
        log_prob = (-0.5 * noise**2 - std.log() - log_tanh_grad).sum(-1)  # (100, N), up to a constant
        rows = torch.arange(len(mean), device=mean.device)
        return torch.tanh(x[log_prob.argmax(0), rows])  # deviation 4: each row has a best sample of its own

    def entropy(self, policy: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """Nats (...): of the Normal before the tanh, or of the categorical. For logging only (deviation 11)."""
        if self.discrete:
            log_probs = policy[0].log_softmax(-1)
            return -(log_probs.exp() * log_probs).sum(-1)
        return (policy[1].log() + 0.5 * math.log(2 * math.pi * math.e)).sum(-1)


class Agent(nn.Module):
    """All networks of a run: world model, actor and value."""

    def __init__(self, obs_space: gym.Space, action_space: gym.Space, args: Args):
        super().__init__()
        self.discrete = isinstance(action_space, gym.spaces.Discrete)
        self.action_dim = int(action_space.n) if self.discrete else action_space.shape[0]
        feat_dim = args.stoch_size + args.deter_size
        self.world_model = WorldModel(obs_space, self.action_dim, args)
        self.actor = Actor(feat_dim, self.action_dim, self.discrete, args.dense_size)
        self.value = mlp(feat_dim, args.dense_size, 3, 1).apply(init_weights)


def preprocess(obs: torch.Tensor) -> torch.Tensor:
    """Images (..., H, W, C) uint8 -> (..., C, H, W) in [-0.5, 0.5]; vectors -> symlog: sign(x) ln(1 + |x|)."""
    if obs.dtype == torch.uint8:
        return torch.add(-0.5, obs.movedim(-1, -3), alpha=1 / 255)  # in channels-last order, which convolutions like
    return torch.sign(obs) * torch.log1p(torch.abs(obs))  # deviation 5: vectors


def mlp(in_dim: int, units: int, layers: int, out_dim: int) -> nn.Sequential:
    """`layers` hidden layers with ELU, then a linear output."""
    modules = []
    for _ in range(layers):
        modules += [nn.Linear(in_dim, units), nn.ELU(inplace=True)]
        in_dim = units
    return nn.Sequential(*modules, nn.Linear(in_dim, out_dim))


class ConvEncoder(nn.Module):
    """(N, C, 64, 64) -> (N, 32 * depth)."""

    def __init__(self, channels: int, depth: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, depth, 4, stride=2)  # 31 x 31
        self.conv2 = nn.Conv2d(depth, 2 * depth, 4, stride=2)  # 14 x 14
        self.conv3 = nn.Conv2d(2 * depth, 4 * depth, 4, stride=2)  # 6 x 6
        self.conv4 = nn.Conv2d(4 * depth, 8 * depth, 4, stride=2)  # 2 x 2

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        for conv in (self.conv1, self.conv2, self.conv3, self.conv4):
            image = F.relu_(conv(image))
        return image.flatten(1)


class ConvDecoder(nn.Module):
    """(N, F) -> (N, C, 64, 64), the mean of a Normal with standard deviation 1."""

    def __init__(self, feat_dim: int, channels: int, depth: int):
        super().__init__()
        self.dense = nn.Linear(feat_dim, 32 * depth)
        self.deconv1 = nn.ConvTranspose2d(32 * depth, 4 * depth, 5, stride=2)  # 5 x 5
        self.deconv2 = nn.ConvTranspose2d(4 * depth, 2 * depth, 5, stride=2)  # 13 x 13
        self.deconv3 = nn.ConvTranspose2d(2 * depth, depth, 6, stride=2)  # 30 x 30
        self.deconv4 = nn.ConvTranspose2d(depth, channels, 6, stride=2)  # 64 x 64

    def forward(self, feat: torch.Tensor) -> torch.Tensor:
        x = F.relu_(deconv_of_one_pixel(self.deconv1, self.dense(feat)))
        x = F.relu_(self.deconv2(x))
        x = F.relu_(self.deconv3(x))
        return deconv_to_few_channels(self.deconv4, x)


def deconv_of_one_pixel(deconv: nn.ConvTranspose2d, x: torch.Tensor) -> torch.Tensor:
    """deconv(x) for 1 x 1 pictures, given as (N, C): one matrix product, several times faster. -> (N, C', K, K)."""
    size = deconv.kernel_size[0]
    product = F.linear(x, deconv.weight.flatten(1).t(), deconv.bias.repeat_interleave(size**2))
    return product.unflatten(1, (-1, size, size)).contiguous(memory_format=torch.channels_last)


def deconv_to_few_channels(deconv: nn.ConvTranspose2d, x: torch.Tensor) -> torch.Tensor:
    """deconv(x) of stride 2 as stride 1 to four times the channels and a shuffle: twice as fast where they are few."""
    weight, bias = F.pixel_unshuffle(deconv.weight, 2), deconv.bias.repeat_interleave(4)
    return F.pixel_shuffle(F.conv_transpose2d(x, weight, bias), 2)


def init_weights(module: nn.Module) -> None:
    """Keras' defaults, which the reference's scores rest on: Xavier uniform, zero bias, orthogonal recurrence."""
    for name, weight in module.named_parameters(recurse=False):
        init = nn.init.orthogonal_ if name == "weight_hh" else nn.init.xavier_uniform_
        (nn.init.zeros_ if "bias" in name else init)(weight)


# === Losses ===


def normal_loss(pred: torch.Tensor, target: torch.Tensor, std: float = 1.0) -> torch.Tensor:
    """Negative log-likelihood under Normal(pred, std), elementwise."""
    constant = math.log(std) + 0.5 * math.log(2 * math.pi)
    return F.mse_loss(pred, target, reduction="none") * (0.5 / std**2) + constant  # (pred - target)^2 in one pass


def kl_divergence(post_mean, post_std, prior_mean, prior_std) -> torch.Tensor:
    """KL(post || prior) of diagonal Normals (..., S) -> (...), in nats."""
    ratio = (post_std / prior_std) ** 2
    distance = ((post_mean - prior_mean) / prior_std) ** 2
    return 0.5 * (ratio + distance - 1 - ratio.log()).sum(-1)


def model_loss(world_model: WorldModel, batch: dict, noise: torch.Tensor, args: Args) -> tuple:
    """Eq. 10 over a batch (L, B, ...): - ln p(obs | state) - ln p(reward | state) + kl_scale max(KL, free_nats).

    Means over L and B, taken before the max; KL is KL(posterior || prior). Where there is a continuation head its
    cross-entropy is added, CONT_SCALE times.

    Returns the loss, the posterior states (from `observe`) and metrics.
    """
    obs = preprocess(batch["obs"])
    post = world_model.rssm.observe(world_model.embed(obs), batch["action"], batch["is_first"], noise)
    prior_mean, prior_std = world_model.rssm.prior(post["deter"])
    kl = kl_divergence(post["mean"], post["std"], prior_mean, prior_std).mean()
    average([mean_kl := kl.detach().clone()])
    kl = kl + (mean_kl - kl.detach())  # the mean over the whole batch, wherever its parts are
    kl_loss = kl.clamp(min=args.free_nats)  # no gradient below the free nats
    feat = torch.cat([post["stoch"], post["deter"]], -1)  # (L, B, F)
    image_loss = normal_loss(world_model.decode(feat), obs, world_model.obs_std)
    image_loss = image_loss.flatten(2).sum(-1).mean()  # summed over pixels
    rewards = torch.tanh(batch["reward"]) if args.clip_rewards == "tanh" else batch["reward"]
    reward_loss = normal_loss(world_model.reward(feat).squeeze(-1).float(), rewards).mean()
    loss = image_loss + reward_loss + args.kl_scale * kl_loss
    metrics = {"losses/image_loss": image_loss, "losses/reward_loss": reward_loss, "losses/kl_loss": kl_loss}
    if world_model.cont is not None:
        logit = world_model.cont(feat).squeeze(-1).float()  # towards gamma, and 0 where a state is terminal
        cont_loss = F.binary_cross_entropy_with_logits(logit, args.gamma * batch["cont"])
        loss = loss + CONT_SCALE * cont_loss
        metrics["losses/cont_loss"] = cont_loss
    with torch.no_grad():
        constant = 0.5 * math.log(2 * math.pi * math.e) * args.stoch_size
        metrics["model/kl"] = kl
        metrics["model/prior_entropy"] = prior_std.log().sum(-1).mean() + constant
        metrics["model/post_entropy"] = post["std"].log().sum(-1).mean() + constant
    return loss, post, metrics


def imagine(rssm: RSSM, actor: Actor, stoch, deter, noise: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """Dreams of H steps from N states: features (H, N, F) of states 1..H (the start is not kept) and policy entropy."""
    feats, entropies = [], []
    for k in range(len(noise["action"])):
        policy = actor.dist(torch.cat([stoch, deter], -1).detach())  # only the actor's input is cut from the graph
        action = actor.sample(policy, noise["action"][k])
        stoch, deter = rssm.img_step(stoch, deter, action, noise["prior"][k])
        feats.append(torch.cat([stoch, deter], -1))
        entropies.append(actor.entropy(policy).mean().detach())
    return torch.stack(feats), torch.stack(entropies).mean()


def lambda_return(rewards, values, discounts, td_lambda: float) -> torch.Tensor:
    """Lambda-return of states 1..H-1 (Eq. 6): rewards, values, discounts (H, N) -> (H-1, N).

    G_k = r_k + d_k ((1 - lambda) v_k+1 + lambda G_k+1), G_H = v_H. The indices are the reference code's: r_k is
    collected on arriving at state k, v_k includes it, d_k is the discount after state k.
    """
    returns, last = [], values[-1]
    for k in reversed(range(len(values) - 1)):
        last = rewards[k] + discounts[k] * ((1 - td_lambda) * values[k + 1] + td_lambda * last)
        returns.append(last)
    return torch.stack(returns[::-1])


def dream_weights(discounts: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
    """w_k = start d_1 ... d_k-1, the weights of states 1..H-1: discounts (H, N), start (N,) -> (H-1, N), detached."""
    return torch.cumprod(torch.cat([start[None], discounts[:-2]]), 0).detach()


def actor_loss(agent: Agent, post: dict, start_weight: torch.Tensor, noise: dict, args: Args) -> tuple:
    """Eq. 7: minus the mean of w_k G_k over dreams from all N = L*B posterior states; start_weight (N,).

    Returns the loss, what `value_loss` needs of the dreams (states 1..H-1, their returns and weights), and metrics.
    """
    model = agent.world_model
    stoch, deter = post["stoch"].detach().flatten(0, 1), post["deter"].detach().flatten(0, 1)
    imag_feat, entropy = imagine(model.rssm, agent.actor, stoch, deter, noise)  # (H, N, F)
    rewards = model.reward(imag_feat).squeeze(-1).float()
    values = agent.value(imag_feat).squeeze(-1).float()
    if model.cont is None:
        discounts = torch.full_like(rewards, args.gamma)
    else:
        discounts = torch.sigmoid(model.cont(imag_feat).squeeze(-1).float())
    returns = lambda_return(rewards, values, discounts, args.td_lambda)
    weights = dream_weights(discounts, start_weight)
    metrics = {"model/imag_reward": rewards.mean(), "model/imag_value": values.mean(), "model/actor_entropy": entropy}
    return -(weights * returns).mean(), (imag_feat[:-1].detach(), returns.detach(), weights), metrics


def value_loss(value: nn.Module, feat: torch.Tensor, returns: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Eq. 8: mean of w_k (v_k - G_k)^2 / 2, up to a constant; feat, returns, weights (H-1, N, ...) have no gradient."""
    return (weights * normal_loss(value(feat).squeeze(-1).float(), returns)).mean()


LOSSES = model_loss, actor_loss, value_loss  # three graphs; --compile compiles each


def compute_losses(agent: Agent, batch: dict, noise: dict, args: Args, functions: tuple = LOSSES) -> tuple[dict, dict]:
    """The losses of model, actor and value, each with a gradient for its own network only; detached metrics."""
    model_fn, actor_fn, value_fn = functions
    with torch.autocast(batch["obs"].device.type, torch.bfloat16, enabled=args.bfloat16):  # deviation 1: no float16
        model, post, metrics = model_fn(agent.world_model, batch, noise["post"], args)
        start_weight = batch["cont"].flatten()  # deviation 3: a dream from a terminal state weighs 0
        agent.requires_grad_(False).actor.requires_grad_(True)  # its gradient passes through the others, not into them
        actor, dreams, dream_metrics = actor_fn(agent, post, start_weight, noise, args)
        agent.requires_grad_(True)
        value = value_fn(agent.value, *dreams)
    losses = {"model": model, "actor": actor, "value": value}
    metrics |= {f"losses/{name}_loss": loss for name, loss in losses.items()} | dream_metrics
    return losses, {name: value.detach() for name, value in metrics.items()}


# === Acting ===


@torch.no_grad()
def act(agent: Agent, obs, action, is_first, state, generator, noise_scale: float = 0.0, greedy: bool = False) -> tuple:
    """One decision for N environments: actions (N, A), an array, and the new state, (stoch, deter).

    From arrays obs (N, ...), the action (N, A) executed before it and is_first (N,), and from the state that the last
    decision returned. The action is the policy's mode if greedy, else a sample with the noise of `exploration`.
    """
    device, num_envs, model, actor = generator.device, len(obs), agent.world_model, agent.actor
    action = torch.as_tensor(action, dtype=torch.float32, device=device)
    is_first = torch.as_tensor(is_first, dtype=torch.float32, device=device)
    embed = model.embed(preprocess(torch.as_tensor(obs, device=device)[None]))[0]
    noise = torch.randn(num_envs, model.rssm.stoch, generator=generator, device=device)
    stoch, deter, _, _ = model.rssm.obs_step(*state, action, embed, is_first, noise)  # if greedy, too, a sample
    policy = actor.dist(torch.cat([stoch, deter], -1))
    if greedy:
        action = actor.mode(policy, actor.draw_noise((100, num_envs), generator))
    else:
        action = actor.sample(policy, actor.draw_noise((num_envs,), generator))
        if agent.discrete:
            uniform = torch.randint(agent.action_dim, (num_envs,), generator=generator, device=device)
            swap = torch.rand(num_envs, 1, generator=generator, device=device) < noise_scale
            action = torch.where(swap, F.one_hot(uniform, agent.action_dim), action.round())  # exactly one-hot
        else:
            noise = torch.randn(action.shape, generator=generator, device=device)
            action = (action + noise_scale * noise).clamp(-1, 1)
    return action.cpu().numpy(), (stoch, deter)  # host sync


def exploration(agent: Agent, global_step: int, args: Args) -> float:
    """Standard deviation of the Normal added to actions; for discrete ones epsilon, the share drawn uniformly."""
    if not agent.discrete:
        return args.expl_noise
    first, last, decay = args.expl_epsilon
    return first + (last - first) * min(global_step / decay, 1.0)  # deviation 7: epsilon falls


# === Updates ===


def draw_noise(agent: Agent, args: Args, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """All randomness of one update, drawn up front: a compiled or recorded update then is a function of its inputs."""
    normal = functools.partial(torch.randn, generator=generator, device=generator.device)
    num_starts = args.batch_length * args.batch_size
    return {
        "post": normal(args.batch_length, args.batch_size, args.stoch_size),
        "prior": normal(args.horizon, num_starts, args.stoch_size),
        "action": agent.actor.draw_noise((args.horizon, num_starts), generator),
    }


def make_optimizers(agent: Agent, args: Args) -> dict[str, torch.optim.Adam]:
    """One for each loss; deviation 8: torch's Adam adds epsilon after the bias correction."""
    learned = {"model": (agent.world_model, args.model_lr), "actor": (agent.actor, args.actor_lr)}
    learned["value"] = (agent.value, args.value_lr)
    flags = {"eps": ADAM_EPS, "fused": True, "capturable": next(agent.parameters()).device.type == "cuda"}
    return {name: torch.optim.Adam(net.parameters(), lr, **flags) for name, (net, lr) in learned.items()}


def average(tensors: list[torch.Tensor]) -> None:
    """Under torchrun each becomes its mean over all processes; a process on its own leaves them alone."""
    if dist.is_initialized():
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        dist.all_reduce(flat)
        means = (flat / dist.get_world_size()).split([tensor.numel() for tensor in tensors])
        for tensor, mean in zip(tensors, means, strict=True):
            tensor.copy_(mean.view_as(tensor))


def update(agent: Agent, optimizers: dict, batch: dict, noise: dict, args: Args, functions: tuple = LOSSES) -> dict:
    """One gradient step of model, actor and value, all from the same parameters. Detached metrics, no host sync."""
    losses, metrics = compute_losses(agent, batch, noise, args, functions)
    for name, optimizer in optimizers.items():
        optimizer.zero_grad(set_to_none=True)
        losses[name].backward()  # each before the first step
    average([parameter.grad for parameter in agent.parameters()])
    for name, optimizer in optimizers.items():
        parameters = optimizer.param_groups[0]["params"]
        metrics[f"grad_norm/{name}"] = nn.utils.clip_grad_norm_(parameters, args.max_grad_norm)
        optimizer.step()
    return metrics


def updates_due(global_step: int, args: Args) -> int:
    """Updates that a run has made once it is at this step: tied to environment steps, whatever the number of envs."""
    if global_step < args.learning_starts:
        return 0
    blocks = (global_step - args.learning_starts) // args.train_frequency
    return args.pretrain_steps + blocks * args.train_steps  # deviation 9: none for building a graph


# === Replay buffer ===


class ReplayBuffer:
    """Whole episodes end to end in one ring of `capacity` time steps, each stored once.

    Entry t belongs to *arriving* at obs[t]: action[t] led to it, reward[t] was collected on the way, cont[t] is 0 only
    if obs[t] is terminal. The first entry of an episode has is_first 1, action and reward 0.
    """

    def __init__(self, capacity: int, obs_space: gym.Space, action_dim: int, device: torch.device):
        self.capacity, self.device = capacity, device
        dtype = torch.uint8 if obs_space.dtype == np.uint8 else torch.float32
        shapes = {"obs": obs_space.shape, "action": (action_dim,), "reward": (), "cont": (), "is_first": ()}
        self.data = {
            name: torch.empty(capacity, *shape, dtype=dtype if name == "obs" else torch.float32, device=device)
            for name, shape in shapes.items()
        }
        self.nbytes = sum(tensor.nbytes for tensor in self.data.values())
        self.end, self.steps = 0, 0  # entries and decisions ever written; entry i lives in slot i % capacity
        self.starts, self.lengths = np.zeros((2, 0), np.int64)  # of the stored episodes, oldest first, on that count

    def __len__(self) -> int:
        return min(self.end, self.capacity)

    def add(self, episode: dict[str, np.ndarray]) -> None:
        """Stores an episode of arrays (T, ...); deviation 6: the oldest entries leave."""
        length = min(len(episode["reward"]), self.capacity)
        slots = torch.from_numpy((self.end + np.arange(length)) % self.capacity).to(self.device)
        for name, tensor in self.data.items():
            tensor[slots] = torch.from_numpy(episode[name][-length:]).to(self.device, tensor.dtype)
        self.starts, self.lengths = np.append(self.starts, self.end), np.append(self.lengths, length)
        self.end, self.steps = self.end + length, self.steps + len(episode["reward"]) - 1
        lost = np.maximum(self.end - self.capacity - self.starts, 0)  # entries of each episode
        kept = lost < self.lengths
        self.starts, self.lengths = (self.starts + lost)[kept], (self.lengths - lost)[kept]

    def sample(self, batch_size: int, length: int, rng: np.random.Generator, device: torch.device) -> dict:
        """Chunks (L, B, ...), copies: an episode uniformly, then a start uniformly.

        Deviation 2: the last possible start is one of them, and episodes shorter than a chunk are not left out.
        """
        i = rng.integers(len(self.starts), size=batch_size)
        start = self.starts[i] + rng.integers(np.maximum(self.lengths[i] - length, 0) + 1)
        start = np.minimum(start, self.end - length)  # the newest episode, if short, is preceded by its neighbours
        slots = torch.from_numpy((start + np.arange(length)[:, None]) % self.capacity)
        slots = slots.to(self.device, non_blocking=True)
        return {name: tensor[slots].to(device, non_blocking=True) for name, tensor in self.data.items()}

    def state_dict(self) -> dict:
        """The filled part; through NumPy, because torch would save the whole storage behind a slice."""
        data = {name: torch.from_numpy(tensor[: len(self)].cpu().numpy()) for name, tensor in self.data.items()}
        counts = {"end": self.end, "steps": self.steps}
        return {"data": data, **counts, "starts": self.starts.tolist(), "lengths": self.lengths.tolist()}

    def load_state_dict(self, state: dict) -> None:
        for name, tensor in state["data"].items():
            self.data[name][: len(tensor)] = tensor.to(self.device)
        self.end, self.steps = state["end"], state["steps"]
        self.starts, self.lengths = np.array(state["starts"], np.int64), np.array(state["lengths"], np.int64)


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
    obs_space = envs.single_observation_space
    check_memory(args, obs_space, envs.single_action_space)
    run = (RankedRun if dist.is_initialized() else Run)(whole, checkpoint)
    device = run.device

    # what a checkpoint holds: networks, optimizers, replay, counters, generators
    agent = Agent(obs_space, envs.single_action_space, args).to(device)
    optimizers = make_optimizers(agent, args)
    rb = ReplayBuffer(args.buffer_size, obs_space, agent.action_dim, device if args.buffer_on_gpu else "cpu")
    recorder = EpisodeRecorder(args.num_envs, agent.action_dim)
    counters = {"num_updates": 0, "renderer": renderer}  # a run stays with the renderer that it began with
    rng = {name: np.random.default_rng([args.seed, i]) for name, i in {"reset": 0, "prefill": 1, "replay": 2}.items()}
    rng |= {name: make_generator(device, args.seed, i) for name, i in {"act": 3, "update": 4}.items()}
    parts = {"agent": agent, **{f"{name}_optimizer": optimizer for name, optimizer in optimizers.items()}}
    parts |= {"replay": rb, "open_episodes": recorder} if args.save_buffer else {}
    run.keep(parts | {"counters": counters}, rng)
    if checkpoint:
        counters |= checkpoint["parts"]["counters"]
        for episode in checkpoint["parts"].get("open_episodes", ()):  # a simulator cannot be saved: cut off there
            rb.add({name: tensor.numpy() for name, tensor in episode.items()})
        checkpoint = episode = None  # what refers to the file keeps it on the disk
    update_fn = make_update(agent, optimizers, args)
    envs.on_fault = run.abort
    keep_freed_memory(device)
    announce(agent, rb, args, renderer, run)

    def filled() -> bool:
        """Is the random prefill there? After a resume without the saved replay it is played again."""
        return rb.steps * repeat >= args.learning_starts

    def train() -> None:
        """Makes the updates that are due, unless the run is asked to stop."""
        due = updates_due(run.step, whole) if filled() else 0
        while counters["num_updates"] < due and not run.stop.requested:
            batch = rb.sample(args.batch_size, args.batch_length, rng["replay"], device)
            run.metrics = update_fn(batch, draw_noise(agent, args, rng["update"]))
            counters["num_updates"] += 1
            run.tick(f"update {counters['num_updates']}/{due}")
            if counters["num_updates"] % 100 == 0:
                run.report()  # deviation 11: losses of the last batch

    dones, state = np.ones(args.num_envs, bool), agent.world_model.rssm.initial(args.num_envs)  # all begin an episode
    action, eval_envs = np.zeros((args.num_envs, agent.action_dim), np.float32), None
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
            action = np.where(dones[:, None], np.float32(0), action)
            recorder.begin(obs, dones)
        if filled():
            action, state = act(agent, obs, action, dones, state, rng["act"], exploration(agent, run.step, args))
        else:
            action = random_action(agent, args.num_envs, rng["prefill"])
        require_finite({"the policy's action": action.sum()}, run.step)
        if args.num_envs == 1:
            obs, rewards, terminations, truncations, infos = envs.step(env_action(agent, action))
        else:
            envs.step_async(env_action(agent, action))
            train()  # deviation 15: several environments, while they step
            obs, rewards, terminations, truncations, infos = envs.step_wait()
        recorder.add(obs, action, rewards, terminations)
        dones = terminations | truncations
        run.step += whole.num_envs * repeat
        run.progress.update(whole.num_envs * repeat)
        played = recorder.decisions()  # of the open episodes; the prefill is learned from where it ends
        cut = dones | (played >= PIECE) | (not filled() and (rb.steps + played.sum()) * repeat >= args.learning_starts)
        for i in np.flatnonzero(cut):
            rb.add(recorder.end(i))
        recorder.begin(obs, cut & ~dones)  # deviation 13: a piece is stored like a truncated episode
        if dones.any():
            run.log_episodes(infos, dones)

    envs.close()
    if eval_envs is not None:
        eval_envs.close()
    return run.close(agent.state_dict())


# === Environment ===


LATE_IMPORTS = ["PIL", "matplotlib"]  # packages that are imported where they are used
ATARI = r"ALE/|\w+NoFrameskip-v4$"  # ids of games
SIZES = {  # what --size stands for; deviations 6 (the buffer) and 16
    "published": {"buffer_size": 500_000, "batch_size": 50, "batch_length": 50, "cnn_depth": 32, "dense_size": 400},
    "laptop": {"buffer_size": 250_000, "batch_size": 16, "batch_length": 32, "cnn_depth": 16, "dense_size": 200},
}


def is_dm_control(env_id: str) -> bool:
    """Gymnasium ids end in a version (-v0) or name a module (my_module:MyEnv); dm_control tasks do neither."""
    return re.search(r":|-v\d+$", env_id) is None


def with_task_defaults(args: Args) -> Args:
    """The settings in force: what was not given depends on the kind of environment."""
    env_id = re.sub(r"^dm_control/(.+)-v0$|^ale_py:", r"\1", args.env_id)  # what Shimmy calls a task; ALE's own module
    args = replace(args, env_id=env_id)
    suite = is_dm_control(args.env_id)
    size = {"cuda": "published", "cpu": "laptop"}[choose_device(args).type] if args.size == "auto" else args.size
    defaults = {"action_repeat": 2 if suite else 1, "cont_head": not suite, **SIZES[size]}
    defaults |= {"max_episode_steps": 27_000} if re.match(ATARI, args.env_id) else {}
    args = replace(args, size=size)
    return replace(args, **{name: value for name, value in defaults.items() if getattr(args, name) is None})


def make_env(args: Args, renderer: str, video: str | None = None) -> Callable[[], gym.Env]:
    """Thunk of one environment: observations (64, 64, 3) uint8 or (D,) float32, actions in [-1, 1] or discrete."""
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
    """Refuses what Dreamer cannot use; resizes images to 64x64, rescales the bounded action dimensions to [-1, 1]."""
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
        bounded = (low > -1e6) & (high < 1e6)  # deviation 17: else [-1, 1], moved into the one bound
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


def random_action(agent: Agent, num_envs: int, rng: np.random.Generator) -> np.ndarray:
    """Uniform actions (N, A): in [-1, 1], or one-hot."""
    if agent.discrete:
        return np.eye(agent.action_dim, dtype=np.float32)[rng.integers(agent.action_dim, size=num_envs)]
    return rng.uniform(-1, 1, (num_envs, agent.action_dim)).astype(np.float32)


def env_action(agent: Agent, action: np.ndarray) -> np.ndarray:
    """What the environments take: indices (N,) in place of one-hot actions (N, A)."""
    return action.argmax(-1) if agent.discrete else action


class EpisodeRecorder:
    """The episodes being played: for each environment its entries so far, the values of ReplayBuffer's columns."""

    def __init__(self, num_envs: int, action_dim: int):
        self.no_action = np.zeros(action_dim, np.float32)
        self.open: list[list[tuple]] = [[] for _ in range(num_envs)]

    def begin(self, obs: np.ndarray, mask: np.ndarray) -> None:
        """First entries, of the environments in the mask."""
        for i in np.flatnonzero(mask):
            self.open[i] = [(obs[i].copy(), self.no_action, 0.0, 1.0, 1.0)]

    def add(self, obs: np.ndarray, action: np.ndarray, rewards: np.ndarray, terminations: np.ndarray) -> None:
        """The next entry of each environment."""
        for i, entries in enumerate(self.open):
            entries.append((obs[i].copy(), action[i].copy(), rewards[i], 1.0 - terminations[i], 0.0))

    def decisions(self) -> np.ndarray:
        """Of each open episode (N,)."""
        return np.array([len(entries) - 1 for entries in self.open])

    def episode(self, i: int) -> dict[str, np.ndarray]:
        """Episode i so far, as arrays (T, ...)."""
        names = "obs", "action", "reward", "cont", "is_first"
        return {name: np.stack(column) for name, column in zip(names, zip(*self.open[i], strict=True), strict=True)}

    def end(self, i: int) -> dict[str, np.ndarray]:
        """Closes episode i and returns it."""
        episode, self.open[i] = self.episode(i), []
        return episode

    def state_dict(self) -> list[dict[str, torch.Tensor]]:
        """The open episodes; a simulator cannot be saved, so a resumed run stores them as truncated."""
        started = [i for i, entries in enumerate(self.open) if len(entries) > 1]
        return [{name: torch.from_numpy(array) for name, array in self.episode(i).items()} for i in started]


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


def make_generator(device: torch.device, seed: int, stream: int) -> torch.Generator:
    """Random numbers that neither another seed nor another stream of this one has."""
    return torch.Generator(device).manual_seed(int(np.random.default_rng([seed, stream]).integers(2**63)))


def evaluate(agent: Agent, envs: gym.vector.VectorEnv, args: Args, device: torch.device, stop: "StopRequest"):
    """Plays args.eval_episodes with the policy's mode, with generators and seeds of its own: training does not notice.

    Returns the returns (episodes,) and the first episode of each environment as replay entries, never trained on.
    """
    generator = make_generator(device, args.seed, 98)
    seeds = np.random.default_rng([args.seed, 99]).integers(2**31, size=args.eval_episodes)  # deviation 10: the same
    number = np.arange(envs.num_envs)  # of each environment's episode: all play their share, or short ones would win
    returns, episodes = [], {}
    recorder = EpisodeRecorder(envs.num_envs, agent.action_dim)
    dones, state = np.ones(envs.num_envs, bool), agent.world_model.rssm.initial(envs.num_envs)
    action = np.zeros((envs.num_envs, agent.action_dim), np.float32)
    while (number < args.eval_episodes).any() and not stop.requested:
        if dones.any():
            obs, _ = envs.reset(seed=seeds[number % args.eval_episodes].tolist(), options={"reset_mask": dones})
            action = np.where(dones[:, None], np.float32(0), action)
            recorder.begin(obs, dones)
        action, state = act(agent, obs, action, dones, state, generator, greedy=True)
        obs, rewards, terminations, truncations, infos = envs.step(env_action(agent, action))
        recorder.add(obs, action, rewards, terminations)
        for entries in recorder.open:
            del entries[PIECE:]  # enough for pictures
        dones = terminations | truncations
        for i in np.flatnonzero(dones):
            episode = recorder.end(i)
            if number[i] < args.eval_episodes:
                returns.append(float(infos["episode"]["r"][i]))
                episodes.setdefault(i, episode)
            number[i] += envs.num_envs
    return np.array(returns), list(episodes.values())


def evaluate_and_log(agent: Agent, envs: gym.vector.VectorEnv | None, renderer: str, run: "Run"):
    """Evaluates and logs at a run's present step. Returns the environments for the next time; None: to be made anew."""
    args = run.args
    if envs is None:
        video = run.picture("videos/evaluation.mp4") if args.capture_video else None
        envs = run.make_envs(make_vector_env, args, renderer, args.eval_episodes, video)
        envs.on_fault = run.abort
    returns, episodes = evaluate(agent, envs, args, run.device, run.stop)
    if not run.stop.requested:
        run.log_evaluation(returns)
        warn_of_failure(draw_returns, run)
        warn_of_failure(log_open_loop, agent, episodes, run)
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
def open_loop(agent: Agent, batch: dict, generator: torch.Generator, context: int = 5) -> tuple:
    """Filters `context` steps of a batch (T, B, ...), then predicts the rest from the actions alone.

    Returns truth and prediction (T, B, ...) of the preprocessed observations and predicted rewards (T, B).
    """
    model, rssm = agent.world_model, agent.world_model.rssm
    truth = preprocess(batch["obs"])
    noise = torch.randn(*batch["reward"].shape, rssm.stoch, generator=generator, device=generator.device)
    head = slice(None, context)
    post = rssm.observe(model.embed(truth[head]), batch["action"][head], batch["is_first"][head], noise[head])
    feats = [torch.cat([post["stoch"], post["deter"]], -1)]
    stoch, deter = post["stoch"][-1], post["deter"][-1]
    for action, step_noise in zip(batch["action"][context:], noise[context:], strict=True):
        stoch, deter = rssm.img_step(stoch, deter, action, step_noise)
        feats.append(torch.cat([stoch, deter], -1)[None])
    feat = torch.cat(feats)
    return truth, model.decode(feat), model.reward(feat).squeeze(-1).float()


def draw_returns(run: "Run") -> None:
    """The return of all evaluations so far, mean +- standard deviation: returns.png."""
    from matplotlib.figure import Figure

    figure, evaluations = Figure(figsize=(5, 3), layout="constrained"), run.evaluations()
    axis = figure.subplots()
    axis.errorbar(list(evaluations), *zip(*evaluations.values(), strict=True), fmt="o-", capsize=2)
    axis.set(xlabel="environment steps", ylabel="return", title=run.args.env_id)
    figure.savefig(f"{run.folder}/returns.png")


def log_open_loop(agent: Agent, episodes: list[dict], run: "Run") -> None:
    """Open-loop predictions on held-out episodes: error by horizon (scalars, figure), strips truth / model / error."""
    args, context, device = run.args, 5, run.device
    episodes = [episode for episode in episodes if len(episode["reward"]) > context + 1]
    if not episodes or args.batch_length < context + 2:
        return
    length = min(args.batch_length, *(len(episode["reward"]) for episode in episodes))
    chunks = []
    for start in np.linspace(0, 1, 6):  # six chunks, spread over the episodes
        episode = episodes[len(chunks) % len(episodes)]
        first = int(start * (len(episode["reward"]) - length))
        chunks.append({name: array[first : first + length] for name, array in episode.items()})
    batch = {name: torch.from_numpy(np.stack([c[name] for c in chunks], 1)).to(device) for name in chunks[0]}
    batch = {name: tensor if tensor.dtype == torch.uint8 else tensor.float() for name, tensor in batch.items()}
    truth, model, reward = open_loop(agent, batch, make_generator(device, args.seed, 97), context)
    rewards = torch.tanh(batch["reward"]) if args.clip_rewards == "tanh" else batch["reward"]
    obs_mse, reward_error = ((model - truth) ** 2).flatten(2).mean((1, 2)), (reward - rewards).abs().mean(1)
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3), layout="constrained")
    curves, horizons = {"obs_mse": obs_mse, "reward_error": reward_error}, range(1 - context, length - context + 1)
    for axis, (name, error) in zip(figure.subplots(1, 2), curves.items(), strict=True):  # (T,)
        run.log({f"open_loop/{name}_horizon_{k}": error[k - 1 + context] for k in (1, 5, 15, 45) if k in horizons})
        axis.plot(horizons, error.cpu())
        axis.axvline(0.5, color="grey", linestyle="--")
        axis.set(xlabel="steps since the last observation", ylabel=name, ylim=(0, None))
    figure.savefig(run.picture("open_loop_error.png"))
    if batch["obs"].dtype == torch.uint8:
        rows = truth + 0.5, (model + 0.5).clamp(0, 1), ((model - truth + 1) / 2).clamp(0, 1)
        rgb = [0, 1, 2] if truth.shape[2] == 3 else [-1, -1, -1]  # grey, or the newest of stacked frames
        strips = torch.cat(rows, -2)[:, :, rgb]  # (T, B, 3, 3 * 64, 64)
        frames = strips.permute(0, 3, 1, 4, 2).flatten(2, 3)  # (T, 3 * 64, B * 64, 3)
        write_gif(run.picture("open_loop_truth_model_error.gif"), (frames * 255).byte().cpu().numpy())
        played = episodes[0]["obs"][..., rgb]
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


def make_update(agent: Agent, optimizers: dict, args: Args) -> Callable[[dict, dict], dict]:
    """`update` as (batch, noise) -> metrics, made fast as the flags ask; the eager one is the reference."""
    functions = tuple(torch.compile(function) for function in LOSSES) if args.compile else LOSSES
    update_fn = functools.partial(update, agent, optimizers, args=args, functions=functions)
    if not args.cudagraphs:
        return update_fn
    keys = []  # of batch and noise, whose tensors a graph takes one by one

    def update_tensors(*tensors: torch.Tensor) -> dict:
        parts = iter(tensors)
        return update_fn(*({name: next(parts) for name in names} for names in keys))

    def update_dicts(batch: dict, noise: dict) -> dict:
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


# The author's evaluations at 105K and 505K environment steps: pixels, published size, mean of 5 seeds.
PUBLISHED = """
acrobot-swingup 37 337, cartpole-balance 472 982, cartpole-balance-sparse 611 998, cartpole-swingup 139 678,
cartpole-swingup-sparse 45 800, cheetah-run 128 630, cup-catch 73 962, finger-spin 8 339, finger-turn-easy 131 474,
finger-turn-hard 38 240, hopper-hop 0 120, hopper-stand 3 610, pendulum-swingup 365 789, quadruped-run 68 201,
quadruped-walk 59 223, reacher-easy 125 430, reacher-hard 3 95, walker-run 83 463, walker-stand 315 960,
walker-walk 137 886"""


def announce(agent: Agent, rb: ReplayBuffer, args: Args, renderer: str, run: "Run") -> None:
    """The first line: size and what of it was given otherwise, what an update takes here (eager, on zeros), hours of
    updates to 100K, 500K and the last step, what was published."""
    shape, device = (args.batch_length, args.batch_size), run.device
    batch = {name: tensor.new_zeros(*shape, *tensor.shape[1:]).to(device) for name, tensor in rb.data.items()}
    for _ in range(2):  # the first call has more to do
        start = time.perf_counter()
        losses, _ = compute_losses(agent, batch, draw_noise(agent, args, torch.Generator(device)), args)
        sum(losses.values()).backward()
        losses["model"].item()  # host sync
        agent.zero_grad()
        seconds = time.perf_counter() - start
    eager = " eager" * (args.compile or args.cudagraphs)
    given, total = vars(run.args), args.total_timesteps
    size = ", ".join(
        [args.size] + [f"{name} {given[name]}" for name, x in SIZES[args.size].items() if given[name] != x]
    )
    line = f"size {size} on {device}, an{eager} update takes {seconds:.3f} s"
    for step in sorted({100_000, 500_000, total}):
        if run.step < step <= total:
            hours = seconds * (updates_due(step, run.args) - updates_due(run.step, run.args)) / 3600
            line += f"; {step:,} steps: {hours:.2g} h of updates"
    name = args.env_id.replace("_", "-").replace("ball-in-cup", "cup")
    published = re.search(rf"\b{name} (\d+) (\d+)", PUBLISHED)
    if published and args.obs_mode == "pixels":
        line += "; published at full size: {} at 105K, {} at 505K steps".format(*published.groups())
    run.say(line)
    run.say(f"{run.folder}: renderer {renderer}, replay {rb.nbytes / 1e9:.2f} GB on {rb.device}")


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
    """Refuses impossible numbers in one line."""
    check_bounds(args)
    if args.batch_length > args.buffer_size:
        fail(f"--batch-length {args.batch_length} does not fit into --buffer-size {args.buffer_size}")
    least, most = args.batch_length * args.action_repeat, args.total_timesteps
    if not least <= args.learning_starts <= most:  # a sequence, the run
        bounds = f"{least} (--batch-length) to {most} (--total-timesteps)"
        fail(f"--learning-starts {args.learning_starts} must be from {bounds}")
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
    """Refuses what the device cannot hold: the replay; weights, gradients, Adam's moments, a batch and its dreams.

    A batch as measured in float32: images through both stacks of convolutions, dreams through GRU and heads.
    """
    with torch.device("meta"):  # tensors that have shapes alone
        agent = Agent(obs_space, action_space, args)
        rb = ReplayBuffer(args.buffer_size, obs_space, agent.action_dim, "meta")
    weights = sum(weight.nbytes for weight in agent.parameters())
    entry = math.prod(obs_space.shape) * (10 + 2 * args.cnn_depth * (len(obs_space.shape) == 3))  # bytes
    entry += 56 * args.horizon * (args.deter_size + args.dense_size)
    batch = args.batch_size * args.batch_length * entry // (1 + args.bfloat16)
    device = choose_device(args)
    require_memory(rb.nbytes, "--buffer-size", device if args.buffer_on_gpu else torch.device("cpu"))
    require_memory(4 * weights + batch, "sizes of networks and batches", device)


if __name__ == "__main__":
    main(parse_args())
