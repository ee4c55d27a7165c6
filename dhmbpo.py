# /// script
# requires-python = ">=3.11,<3.15"
# dependencies = [
#     "dm_control==1.0.50", "gymnasium>=1.4", "moviepy>=2.2", "mujoco>=3.17,<4", "numpy>=2.1", "pygame-ce>=2.5",
#     "tensorboard>=2.20", "torch>=2.6", "tqdm>=4.67", "tyro>=1.0",
# ]
# [tool.uv]  # dm_control asks for labmaze, which it does not need here and which ends with Python 3.12
# override-dependencies = ["labmaze; python_version < '3.13'"]
# ///
"""DHMBPO: SAC in a learned model, over two horizons: long rollouts find the states, short ones carry the gradient.

  act                     play 1,000 steps with a policy that does not change (the first 5,000 at random), then learn:
    fit_statistics        mean and standard deviation of observations, rewards, changes of the observation
    train_model           the ensemble on all real transitions, until a paired test sees no progress
    distribution_rollout  every 20 updates: 20 model steps from real states, no gradient; their states are kept
    update                first of the critics alone (critic_warmup), then of all, 1 per step played (at first 5):
      rollout             3 model steps from kept states, differentiable, for both losses
      critic_loss         the first action's value towards the return of these steps, then the target critics' value
      actor_loss          the return of these steps, then the critics' value, uphill through model, states and actions

Paper:      Kubo, Parmas, Ishii 2025, Double Horizon Model-Based Policy Optimization, arXiv 2512.15439
Code:       4kubo/erl_lib (PyTorch), which is followed
Run:        python dhmbpo.py --env-id Hopper-v5          (or: uv run dhmbpo.py --env-id Hopper-v5)
Resume:     python dhmbpo.py --resume runs/<run folder>
Evaluate:   python dhmbpo.py --evaluate runs/<run folder> [--capture-video]
Watch:      tensorboard --logdir runs
Deviations from the reference code, each also marked at the line it concerns:
  1. Three differentiable steps (the paper's main result: 5; the authors' result files have both).
  2. Evaluation by eval_frequency and eval_episodes, on seeds of its own (there: every 5,000, later 10,000 steps).
  3. The change of the observation at the end of an episode is the true one (there: to the next episode's first).
  4. The noise of a model step is that of the network that predicts (there: of another one).
  5. Gymnasium's v5 tasks and mbpo.py's rules of termination, Walker2d without its clip of velocities (there: variants
     of v4, no clip); DeepMind Control without action repeat (there: 2).
  6. The states of the distribution rollouts are kept in raw units (there: standardised as they were then).
  7. Dropout zeroes a fixed number of random positions, none in the actor's loss (there: each by chance, there too).
  8. The paired test is a z test for any number of rows (there: Student's t below 1,000).
  9. After a termination values are masked, and those beyond 1e6 go on as 0 (there: all are multiplied by 0).
 10. Statistics are those of the rows in the replay, in float32 (there: of all rows ever, observations' in float64).
 11. A block every 1,000 steps in all tasks but pendulums, which have settings of their own (there: also by episode).
 12. Rows too few to be divided are trained on and tested on (there: two at least are moved to those that test).
"""

import contextlib
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
import sys
import tempfile
import threading
import time
import warnings
import zipfile
from collections.abc import Callable
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from typing import Annotated, NamedTuple, NoReturn, get_args, get_origin, get_type_hints

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports below leaves no traceback

import gymnasium as gym
import numpy as np
import torch
import torch._dynamo  # with Triton, which crashes if Mesa's OpenGL is loaded before it; optimizers need it anyway
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
Part = Annotated[float, 1e-9, 1.0]
Positive = Annotated[float, 1e-12, 1e9]
Amount = Annotated[float, 0.0, 1e9]
Real = Annotated[float, -1e9, 1e9]


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

    # Algorithm specific arguments
    env_id: str = "Hopper-v5"  # Gymnasium id (my_module:MyEnv-v0) or dm_control task (walker-walk), observed by state
    total_timesteps: Count | None = None  # environment steps of the run, the random ones included; default by task
    num_envs: Few = 1  # environments played side by side, each in its own process if more than one
    max_episode_steps: Count | None = None  # most steps of an episode; default the task's limit, or 1,000
    buffer_size: Count = 1_000_000  # capacity of the replay buffer of real transitions
    learning_starts: Count | None = None  # environment steps of random actions before learning begins; default by task
    model_train_frequency: Count | None = None  # environment steps between blocks of learning; default by task
    first_block: Count = 5  # the first block's updates and its training's epochs are multiplied by this
    updates_per_step: Count = 1  # updates per environment step, made in blocks of learning
    critic_warmup: Natural | None = None  # updates of the critics alone, at the beginning of a block; default by task
    batch_size: Size = 256  # rows of an update, and of a distribution rollout
    gamma: Share = 0.995  # discount per step
    tau: Part = 0.005  # step of the target critics towards the critics, after every update
    learning_rate: Positive = 3e-4  # learning rate of actor, critics and alpha, and rate of the bounds of values
    hidden_size: Size = 256  # units of the three hidden layers of actor and critics
    num_critics: Few = 5  # number of critics (M)
    num_targets: Few = 2  # target critics drawn for each update: the smallest of their values is learned from
    critic_dropout: Share = 1e-3  # share of the critics' hidden units that is zero in their own loss
    initial_alpha: Positive = 0.1  # weight of the entropy (alpha) at the start
    target_entropy: Real | None = None  # entropy that alpha is tuned to, nats; default minus the size of an action
    value_quantile: Share = 0.01  # quantiles (it and 1 - it) of r - alpha log pi; over 1 - gamma they bound the values
    train_horizon: Few = 3  # model steps of the differentiable rollouts (T) (deviation 1: not 5)
    rollout_length: Few = 20  # model steps of the distribution rollouts (H)
    rollout_frequency: Count = 20  # updates between distribution rollouts
    rollout_retain: Count = 10  # batch_size * rollout_frequency states, times this, are kept
    num_nets: Annotated[int, 2, 1024] = 8  # networks of the ensemble (E)
    model_hidden_size: Size = 256  # units of the three hidden layers of each network of the ensemble
    model_lr: Positive = 1e-3  # learning rate of the ensemble
    model_batch_size: Size = 2_048  # transitions in a batch, the same for all networks
    model_batches: Count = 6  # batches of an epoch of the ensemble's training, at most
    model_patience: Amount = 50.0  # a training ends after this times ln(observations + 1) epochs without progress
    model_max_epochs: Amount = 250.0  # epochs of a training at most, times ln(observations + 1)
    model_rows: Annotated[int, 2, 10**9] = 100_000  # transitions of a training at most, drawn anew for each
    holdout_ratio: Share = 0.2  # share of transitions that is never trained on
    holdout_rows: Annotated[int, 2, 10**9] = 12_288  # transitions never trained on that judge a training, at most

    # Speed
    bfloat16: bool = False  # bfloat16 autocast for the hidden layers
    cudagraphs: bool = False  # replay updates, and batches of the ensemble, as one CUDA graph each (GPU only)


# === Networks ===


class StackedLinear(nn.Module):
    """N linear layers side by side, (N, B, in) -> (N, B, out), with layer norm before and dropout behind."""

    def __init__(self, num_nets: int, in_dim: int, out_dim: int, eps: float | None = None, dropout: float = 0.0):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(num_nets, in_dim, out_dim) * math.sqrt(2 / in_dim))
        self.bias = nn.Parameter(torch.randn(num_nets, 1, out_dim) / (2 * math.sqrt(in_dim)))
        self.eps, self.dropout = eps, dropout

    def forward(self, x: torch.Tensor, nets=None, generator: torch.Generator | None = None) -> torch.Tensor:
        """nets: indices of the layers to use, all if None; generator: of the dropout, which is off without."""
        weight, bias = (self.weight, self.bias) if nets is None else (self.weight[nets], self.bias[nets])
        if self.eps is not None:
            x = F.layer_norm(x, x.shape[-1:], eps=self.eps)  # without scale and shift
        if generator is None or not self.dropout:
            return torch.baddbmm(bias, x, weight)
        scale = 1 / (1 - self.dropout)
        x = torch.baddbmm(bias, x, weight, beta=scale, alpha=scale)  # (x W + b) / (1 - dropout)
        count = round(self.dropout * x.numel())  # deviation 7: cheaper than a random number for each
        zeroed = torch.randint(x.numel(), (count,), generator=generator, device=x.device)
        return x.put_(zeroed, x.new_zeros(count))


class DynamicsEnsemble(nn.Module):
    """E networks that each predict the standardised mean of (reward, next_obs - obs), with a noise of its own."""

    # the reference code's, as are the eps of layer norm and the dropout below
    decays = (2.5e-4, 5e-4, 7.5e-4, 1e-3, 1e-2)  # weight decay, layer by layer, biases too; then of log_std

    def __init__(self, obs_dim: int, action_dim: int, args: Args):
        super().__init__()
        width, nets = args.model_hidden_size, args.num_nets
        first = StackedLinear(nets, obs_dim + action_dim, width, None, 0.0075)
        hidden = StackedLinear(nets, width, width, 1.0, 0.005), StackedLinear(nets, width, width, 0.1, 0.0025)
        self.layers = nn.ModuleList([first, *hidden, StackedLinear(nets, width, obs_dim + 1, 0.01)])
        self.log_std = nn.Parameter(torch.zeros(nets, 1, obs_dim + 1))  # of the noise, whatever the input
        self.bfloat16 = args.bfloat16

    def forward(self, x: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
        """Means (E, B, 1 + D) for standardised obs and actions (E, B, D + A)."""
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.bfloat16):
            for layer in self.layers[:-1]:
                x = F.silu(layer(x, generator=generator))
        return self.layers[-1](x.to(self.log_std.dtype))  # float32: its rounding would be the mean's


class Actor(nn.Module):
    """Tanh-squashed Gaussian policy of standardised observations."""

    def __init__(self, obs_dim: int, action_dim: int, args: Args):
        super().__init__()
        sizes = [obs_dim, *[args.hidden_size] * 3, 2 * action_dim]
        layers = [nn.Linear(i, o) for i, o in zip(sizes[:-1], sizes[1:], strict=True)]
        for layer in layers:
            nn.init.orthogonal_(layer.weight)
            nn.init.zeros_(layer.bias)
        self.net = nn.Sequential(*[module for layer in layers for module in (layer, nn.SiLU())][:-1])
        self.bfloat16 = args.bfloat16

    def outputs(self, obs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Means (B, A) before the tanh, and standard deviations before the softplus."""
        with torch.autocast(obs.device.type, torch.bfloat16, enabled=self.bfloat16):
            x = self.net[:-1](obs)
        return self.net[-1](x.to(obs.dtype)).chunk(2, -1)

    def forward(self, obs: torch.Tensor, noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Actions (B, A) in [-1, 1] for obs (B, D) and normal noise (B, A), and their log-probabilities (B,)."""
        mean, raw_std = self.outputs(obs)
        std = F.softplus(raw_std) + 1e-5
        x = mean + std * noise
        log_prob = -0.5 * noise**2 - std.log() - 0.5 * math.log(2 * math.pi)
        log_prob = log_prob - 2 * (math.log(2) - x - F.softplus(-2 * x))  # log(1 - tanh(x)^2)
        return torch.tanh(x), log_prob.sum(-1)

    def mode(self, obs: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.outputs(obs)[0])


class Critics(nn.Module):
    """M action values, side by side."""

    def __init__(self, obs_dim: int, action_dim: int, args: Args):
        super().__init__()
        nets, units, dropout = args.num_critics, args.hidden_size, args.critic_dropout
        first = StackedLinear(nets, obs_dim + action_dim, units, None, dropout)
        hidden = [StackedLinear(nets, units, units, 1e-5, dropout) for _ in range(2)]
        self.layers = nn.ModuleList([first, *hidden, StackedLinear(nets, units, 1, 1e-5)])
        for parameter in self.layers[-1].parameters():
            nn.init.zeros_(parameter)
        self.bfloat16 = args.bfloat16

    def forward(self, obs, actions, bounds: torch.Tensor, nets=None, generator=None) -> torch.Tensor:
        """Values (M, B), or of those nets: middle of the bounds (2,) + half their distance * output; obs (B, D)."""
        count = len(self.layers[-1].bias) if nets is None else len(nets)
        x = torch.cat([obs, actions], -1).expand(count, -1, -1)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.bfloat16):
            for layer in self.layers[:-1]:
                x = F.silu(layer(x, nets, generator))
        outputs = self.layers[-1](x.to(obs.dtype), nets).squeeze(-1)
        return bounds.mean() + (bounds[1] - bounds[0]) / 2 * outputs


class Agent(nn.Module):
    """Everything that is learned: ensemble, actor, critics and their targets, temperature, statistics."""

    def __init__(self, obs_dim: int, action_dim: int, args: Args):
        super().__init__()
        self.ensemble = DynamicsEnsemble(obs_dim, action_dim, args).requires_grad_(False)  # but in train_model
        self.actor = Actor(obs_dim, action_dim, args)
        self.critics = Critics(obs_dim, action_dim, args)
        self.target_critics = deepcopy(self.critics).requires_grad_(False)
        self.log_alpha = nn.Parameter(torch.tensor(math.log(args.initial_alpha)))
        self.register_buffer("bounds", torch.full((2,), math.nan))  # of the values, known from the first update on
        for name, dim in (("obs", obs_dim), ("out", obs_dim + 1)):  # out: reward, next_obs - obs
            self.register_buffer(f"{name}_mean", torch.zeros(dim))
            self.register_buffer(f"{name}_std", torch.ones(dim))
        self.sizes = [obs_dim, action_dim, 1, obs_dim, 1, args.num_nets]
        self.target_entropy = args.target_entropy

    def unpack(self, rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Rows of the replay (B, 2 D + A + 2 + E) as obs, actions, outputs (B, 1 + D), held out (B,), weights."""
        obs, actions, rewards, next_obs, held_out, weights = rows.split(self.sizes, -1)
        return obs, actions, torch.cat([rewards, next_obs - obs], -1), held_out.squeeze(-1) > 0, weights

    def fit_statistics(self, rows: torch.Tensor) -> None:
        """Mean and population standard deviation of what the networks see and predict in the replay (deviation 10)."""
        obs, _, outputs, _, _ = self.unpack(rows)  # deviation 3: the true change at an episode's end
        for name, values in (("obs", obs), ("out", outputs)):
            variance, mean = torch.var_mean(values, 0, correction=0)
            getattr(self, f"{name}_mean").copy_(mean)
            getattr(self, f"{name}_std").copy_(variance.clamp(min=1e-8).sqrt())

    def standardize(self, obs: torch.Tensor) -> torch.Tensor:
        return (obs - self.obs_mean) / self.obs_std


# === Losses ===


def model_loss(mean: torch.Tensor, log_std: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood of targets y (E, B, 1 + D), weighted by (E, B), summed over networks and outputs.

    1/2 (mean - y)^2 / std^2 + log std, where log std counts at least log 0.001.
    """
    nll = 0.5 * (mean - targets) ** 2 * torch.exp(-2 * log_std) + log_std.clamp(min=math.log(1e-3))
    return (weights * nll.sum(-1)).sum(0).mean()


@torch.no_grad()
def holdout_scores(ensemble: DynamicsEnsemble, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood (B,) of targets (B, 1 + D) under one Gaussian of the ensemble's mean and variance."""
    noise = torch.exp(2 * ensemble.log_std.mean(0))
    scores = []
    for x, y in zip(inputs.split(2_048), targets.split(2_048), strict=True):  # in slices: they fit into the cache
        variance, mean = torch.var_mean(ensemble(x.expand(len(ensemble.log_std), -1, -1)), 0)
        variance = variance + noise
        scores.append((0.5 * (y - mean) ** 2 / variance + 0.5 * variance.log()).sum(-1))
    return torch.cat(scores)


class Rollout(NamedTuple):
    """T steps in standardised space, and the action that would follow."""

    obs: tuple[torch.Tensor, ...]  # T + 1 of (B, D)
    actions: tuple[torch.Tensor, ...]  # T + 1 of (B, A)
    log_probs: torch.Tensor  # (T + 1, B)
    rewards: torch.Tensor  # (T, B)
    alive: torch.Tensor  # (T + 1, B): not terminated before


def soft_return(path: Rollout, values: torch.Tensor, alpha: torch.Tensor, gamma: float) -> torch.Tensor:
    """sum_t gamma^t alive_t (r_t - alpha log pi_t), with the last observation's values (B,) as r_T: (B,)."""
    soft_rewards = torch.cat([path.rewards, values[None]]) - alpha * path.log_probs
    discounts = gamma ** torch.arange(len(soft_rewards), dtype=values.dtype, device=values.device)
    return (discounts[:, None] * torch.where(path.alive, soft_rewards, 0.0)).sum(0)


@torch.no_grad()
def track_bounds(agent: Agent, path: Rollout, args: Args) -> None:
    """Moves the bounds of values towards the outer quantiles of r - alpha log pi, over 1 - gamma: endless returns."""
    soft_rewards = path.rewards - agent.log_alpha.exp() * path.log_probs[:-1]
    low, like = args.value_quantile, {"dtype": soft_rewards.dtype, "device": soft_rewards.device}
    quantiles = torch.linspace(low, 1 - low, 2, **like)  # the two, without a copy from the host
    new = torch.quantile(soft_rewards.flatten(), quantiles) / (1 - args.gamma)
    agent.bounds.copy_(torch.where(agent.bounds.isnan(), new, agent.bounds.lerp(new, args.learning_rate)))


def critic_loss(agent: Agent, path: Rollout, pair: torch.Tensor, gamma: float, dropout: torch.Generator | None):
    """Squared errors (M,) towards the return that ends in the smaller of a pair of target critics; values (M, B).

    The return is soft_return without the entropy of the first action, which is no part of Q(s_0, a_0).
    """
    with torch.no_grad():
        alpha = agent.log_alpha.exp()
        last = agent.target_critics(path.obs[-1], path.actions[-1], agent.bounds, pair).amin(0).clamp(*agent.bounds)
        returns = soft_return(path, last, alpha, gamma) + alpha * path.log_probs[0]
    values = agent.critics(path.obs[0].detach(), path.actions[0].detach(), agent.bounds, generator=dropout)
    return ((values - returns) ** 2).mean(1), values


def actor_loss(agent: Agent, path: Rollout, gamma: float) -> torch.Tensor:
    """Minus the mean soft_return that ends in the mean of the frozen critics; the gradient follows the path."""
    frozen = {name: parameter.detach() for name, parameter in agent.critics.named_parameters()}
    inputs = path.obs[-1], path.actions[-1], agent.bounds
    last = torch.func.functional_call(agent.critics, frozen, inputs)  # deviation 7: no dropout here
    return -soft_return(path, last.mean(0), agent.log_alpha.exp().detach(), gamma).mean()


def alpha_loss(log_alpha: torch.Tensor, entropy: torch.Tensor, target_entropy: float) -> torch.Tensor:
    """alpha (entropy - target_entropy), scalars: alpha falls while the policy is more random than asked."""
    return log_alpha.exp() * (entropy.detach() - target_entropy)


# === Acting ===


@torch.no_grad()
def act(agent: Agent, obs: np.ndarray, device: torch.device, generator: torch.Generator | None) -> np.ndarray:
    """Actions (N, A) in [-1, 1] for obs (N, D): sampled, or the policy's mode without a generator."""
    obs = agent.standardize(torch.as_tensor(obs, device=device))
    if generator is None:
        return agent.actor.mode(obs).cpu().numpy()  # host sync
    noise = torch.randn(len(obs), agent.sizes[1], generator=generator, device=device)
    return agent.actor(obs, noise)[0].cpu().numpy()  # host sync


def model_step(agent: Agent, obs: torch.Tensor, actions: torch.Tensor, order: torch.Tensor, noise: torch.Tensor):
    """Next obs (B, D), standardised, and rewards (B,): the rows in E blocks, of which network k gets the order[k]-th.

    The reward is the mean; noise (B, D) is that of the change of obs.
    """
    ensemble, nets = agent.ensemble, len(order)
    inputs = torch.cat([obs, actions], -1).unflatten(0, (nets, -1))
    dealt = order.argsort()  # block b is read by network dealt[b]
    outputs = ensemble(inputs[order])[dealt]  # block by block, as they came
    spread = ensemble.log_std[dealt, :, 1:].exp() * noise.unflatten(0, (nets, -1))  # deviation 4: its own
    outputs = torch.cat([outputs[..., :1], outputs[..., 1:] + spread], -1).flatten(0, 1)
    outputs = agent.out_mean + agent.out_std * outputs  # in raw units, as the reward stays
    return obs + outputs[:, 1:] / agent.obs_std, outputs[:, 0]


def rollout(agent: Agent, obs: torch.Tensor, steps: int, terminated_fn: Callable, generator) -> Rollout:
    """Model steps from standardised obs (B, D) with sampled actions; what terminated goes on, marked as not alive."""
    device, shape = obs.device, (len(obs), agent.sizes[1])
    normal = functools.partial(torch.randn, generator=generator, device=device)
    action, log_prob = agent.actor(obs, normal(shape))
    alive = torch.ones(len(obs), dtype=torch.bool, device=device)
    path = [(obs, action, log_prob, None, alive)]
    for _ in range(steps):
        order = torch.randperm(len(agent.ensemble.log_std), generator=generator, device=device)  # anew in every step
        obs, reward = model_step(agent, obs, action, order, normal(obs.shape))
        # deviation 9: what terminated before may run off to infinity; its gradient, 0 times infinity, is no number
        obs = torch.where(alive[:, None] | (obs.abs() < 1e6), obs, 0.0)
        reward = torch.where(alive | (reward.abs() < 1e6), reward, 0.0)
        alive = alive & ~terminated_fn(agent.obs_mean + agent.obs_std * obs.detach())
        action, log_prob = agent.actor(obs, normal(shape))
        path.append((obs, action, log_prob, reward, alive))
    all_obs, actions, log_probs, rewards, alives = zip(*path, strict=True)
    return Rollout(all_obs, actions, torch.stack(log_probs), torch.stack(rewards[1:]), torch.stack(alives))


@torch.no_grad()
def distribution_rollout(agent: Agent, rb, states, rows: int, terminated_fn: Callable, rng: dict, args: Args) -> float:
    """Rollouts of H steps from real states, living ones kept, until there are `rows` of them; share that lived."""
    count = passes = 0
    while count < rows:
        starts = agent.unpack(rb.sample(args.batch_size, generator=rng["replay"]))[0]
        path = rollout(agent, agent.standardize(starts), args.rollout_length, terminated_fn, rng["rollout"])
        visited = torch.stack(path.obs)[path.alive]  # host sync
        states.add(agent.obs_mean + agent.obs_std * visited)  # deviation 6: in raw units
        count, passes = count + len(visited), passes + 1
    return count / (passes * path.alive.numel())


# === Updates ===


def minimize(optimizer: torch.optim.Optimizer, loss: torch.Tensor) -> None:
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()


def batches(rows: torch.Tensor, size: int, generator: torch.Generator):
    """Yields batches of rows (N,) without replacement, again and again, each time in a new order."""
    while True:
        order = torch.randperm(len(rows), generator=generator, device=rows.device)
        for i in range(0, len(rows) - size + 1, size):
            yield rows[order[i : i + size]]


def p_value(differences: torch.Tensor) -> float:
    """Of a paired, one-sided test that the mean of differences (N,) is below 0: small if it is (deviation 8)."""
    z = differences.mean() / (differences.std() / math.sqrt(len(differences)))
    return 0.5 * (1 + math.erf(z.item() / math.sqrt(2)))  # host sync; nan if all differences are 0


def train_model(agent: Agent, rows: torch.Tensor, scale: int, generator, args: Args, fast, tick: Callable) -> dict:
    """Trains the ensemble on rows of the replay (N, ...) until a paired test sees no progress; what to log.

    After every epoch the scores of the held out rows are compared with the best ones so far. Lower ones (p < 0.5) are
    progress, surely lower ones (p < 0.1) a new best. The best networks are kept: those from before, if there were none.
    scale multiplies the epochs; tick is told of each and may leave by an exception; fast as in `learn`.
    """
    ensemble, nets = agent.ensemble.requires_grad_(True), args.num_nets
    parts = [*(list(layer.parameters()) for layer in ensemble.layers), [ensemble.log_std]]
    groups = [{"params": part, "weight_decay": decay} for part, decay in zip(parts, ensemble.decays, strict=True)]
    optimizer = torch.optim.AdamW(groups, args.model_lr, fused=True, capturable=rows.is_cuda)
    obs, actions, outputs, is_held_out, weights = agent.unpack(rows)
    inputs, targets = torch.cat([agent.standardize(obs), actions], -1), (outputs - agent.out_mean) / agent.out_std
    train, held_out = (which.nonzero().squeeze(-1) for which in (~is_held_out, is_held_out))  # indices of rows
    if not len(train) or len(held_out) < 2:  # deviation 12: too few to divide
        train = held_out = torch.arange(len(rows), device=rows.device)
    chosen = torch.randperm(len(held_out), generator=generator, device=rows.device)[: args.holdout_rows]
    holdout = inputs[held_out[chosen]], targets[held_out[chosen]]
    size = min(args.model_batch_size, len(train))
    stream, per_epoch = batches(train, size, generator), min(args.model_batches, len(train) // size)
    unit = scale * math.log(agent.sizes[0] + 1)
    patience, max_epochs = int(unit * args.model_patience), int(unit * args.model_max_epochs)

    def step(x: torch.Tensor, y: torch.Tensor, weights: torch.Tensor) -> None:
        y = y.repeat(nets, 1, 1)
        noise = torch.randn(nets, size, generator=generator, device=rows.device)
        y[..., 0] += 1e-3 / agent.out_std[0] * noise  # rewards that are certain keep a noise
        mean = ensemble(x.expand(nets, -1, -1), generator)
        minimize(optimizer, model_loss(mean, ensemble.log_std, y, weights.T))

    step = fast(step)
    best = before = holdout_scores(ensemble, *holdout)
    snapshot, epochs, best_epoch, without_progress = deepcopy(ensemble.state_dict()), 0, 0, 0
    while without_progress <= patience and epochs < max_epochs:
        tick(f"ensemble, epoch {epochs}, best {best_epoch}")
        for _ in range(per_epoch):
            batch = next(stream)
            step(inputs[batch], targets[batch], weights[batch])
        scores = holdout_scores(ensemble, *holdout)
        p = p_value(scores - best)
        epochs += 1
        without_progress = 0 if p < 0.5 else without_progress + 1
        if p < 0.1:
            best, best_epoch, snapshot = scores, epochs, deepcopy(ensemble.state_dict())
    ensemble.load_state_dict(snapshot)
    ensemble.requires_grad_(False)
    metrics = {"epochs": epochs, "best_epoch": best_epoch, "holdout_score": best.mean(), "old_score": before.mean()}
    metrics |= {"kept_old": float(best_epoch == 0), "noise": ensemble.log_std.exp().mean()}
    return {f"model/{name}": value for name, value in metrics.items()}


def update(agent: Agent, optimizers: dict, starts, terminated_fn: Callable, rng: dict, args: Args, only_critics=False):
    """One update from starts (B, D): critics, their targets, then actor and alpha. No host sync. Detached scalars."""
    with torch.set_grad_enabled(not only_critics):
        path = rollout(agent, agent.standardize(starts), args.train_horizon, terminated_fn, rng["rollout"])
    track_bounds(agent, path, args)
    pair = torch.randperm(args.num_critics, generator=rng["update"], device=starts.device)[: args.num_targets]
    qf_losses, values = critic_loss(agent, path, pair, args.gamma, rng["update"])
    minimize(optimizers["critics"], qf_losses.sum())
    with torch.no_grad():
        torch._foreach_lerp_(list(agent.target_critics.parameters()), list(agent.critics.parameters()), args.tau)
    low, high = agent.bounds.clone()
    metrics = {"qf_loss": qf_losses.mean(), "qf_values": values.mean(), "qf_low": low, "qf_high": high}
    if not only_critics:
        pi_loss, entropy = actor_loss(agent, path, args.gamma), -path.log_probs[0].mean()
        temperature_loss = alpha_loss(agent.log_alpha, entropy, agent.target_entropy)
        minimize(optimizers["actor"], pi_loss + temperature_loss)
        metrics |= {"actor_loss": pi_loss, "alpha_loss": temperature_loss, "alpha": agent.log_alpha.exp()}
        metrics |= {"entropy": entropy}
    return {f"losses/{name}": value.detach() for name, value in metrics.items()}


def learn(agent: Agent, rb, states, terminated_fn: Callable, rng: dict, args: Args, scale: int, fast, tick) -> dict:
    """A block: statistics, ensemble, new optimizers, critics alone, updates (scale times as many); what to log.

    tick: told what is going on wherever the block may be left, which it does by an exception. fast: given a function
    of tensors that is called again and again, returns one that does the same, faster.
    """
    rows = rb.newest(len(rb))
    agent.fit_statistics(rows)
    chosen = torch.randperm(len(rows), generator=rng["model"], device=rows.device)[: args.model_rows]
    metrics = train_model(agent, rows[chosen], scale, rng["model"], args, fast, tick)
    adam = functools.partial(torch.optim.Adam, lr=args.learning_rate, fused=True, capturable=rows.is_cuda)
    optimizers = {"critics": adam(agent.critics.parameters())}
    optimizers["actor"] = adam([*agent.actor.parameters(), agent.log_alpha])
    update_all = functools.partial(update, agent, optimizers, terminated_fn=terminated_fn, rng=rng, args=args)
    update_critics, update_all = fast(functools.partial(update_all, only_critics=True)), fast(update_all)
    visit = functools.partial(distribution_rollout, agent, rb, states, terminated_fn=terminated_fn, rng=rng, args=args)
    if args.critic_warmup:  # from fewer states, as the reference has it
        visit(rows=max(args.batch_size * args.critic_warmup // args.rollout_length, args.batch_size))
    for i in range(args.critic_warmup):
        tick(f"critics, update {i}")
        update_critics(states.sample(args.batch_size, generator=rng["update"]))
    count = scale * args.updates_per_step * args.model_train_frequency
    for i in range(count):
        tick(f"update {i} of {count}")
        if i % args.rollout_frequency == 0:
            metrics["model/alive_share"] = visit(rows=args.batch_size * args.rollout_frequency)  # as many as are drawn
        losses = update_all(states.sample(args.batch_size, generator=rng["update"]))
    return {name: float(value) for name, value in (metrics | losses).items()}  # host sync


# === Replay buffer ===


class RingBuffer:
    """The newest rows (W,) of what is added, on the device."""

    def __init__(self, capacity: int, width: int, device: torch.device):
        self.rows = torch.empty(capacity, width, device=device)
        self.end = 0  # rows ever written; row i lives in slot i % capacity

    def __len__(self) -> int:
        return min(self.end, len(self.rows))

    def add(self, rows: torch.Tensor) -> None:
        """Rows (B, W); the oldest make room."""
        rows = rows[-len(self.rows) :]
        slots = (self.end + torch.arange(len(rows), device=rows.device)) % len(self.rows)
        self.rows[slots] = rows
        self.end += len(rows)

    def newest(self, count: int) -> torch.Tensor:
        """The last `count` rows, oldest first, a copy."""
        slots = torch.arange(self.end - count, self.end, device=self.rows.device) % len(self.rows)
        return self.rows[slots]

    def sample(self, *shape: int, generator: torch.Generator) -> torch.Tensor:
        """Copies of rows drawn uniformly with replacement, (*shape, W)."""
        return self.rows[torch.randint(len(self), shape, generator=generator, device=self.rows.device)]

    def state_dict(self) -> dict:
        return {"rows": self.newest(len(self)).cpu(), "end": self.end}

    def load_state_dict(self, state: dict) -> None:
        self.end = state["end"] - len(state["rows"])
        self.add(state["rows"].to(self.rows.device))


def labelled(rows: torch.Tensor, generator: torch.Generator, args: Args) -> torch.Tensor:
    """Transitions (B, 2 D + A + 1) with what stays theirs: held out or not, a bootstrap weight Exp(1) a network."""
    held_out = rows.new_empty(len(rows), 1).uniform_(generator=generator) < args.holdout_ratio
    weights = rows.new_empty(len(rows), args.num_nets).exponential_(generator=generator)
    return torch.cat([rows, held_out.float(), weights], 1)


# === Training ===


class Interrupted(Exception):
    """Leaves a block that is to be learned anew."""


def main(args: Args) -> str:
    args = with_task_defaults(args)
    check_args(args)
    if args.evaluate is not None:
        return evaluate_run(args)
    checkpoint = load_checkpoint(args.resume, args) if args.resume is not None else None
    rehearse(functools.partial(make_vector_env, args, 1), args.capture_video)
    envs = make_vector_env(args, args.num_envs)
    obs_dim, action_dim = envs.single_observation_space.shape[0], envs.single_action_space.shape[0]
    terminated_fn = termination_function(args.env_id, obs_dim)
    if args.target_entropy is None:
        args = replace(args, target_entropy=-float(action_dim))
    check_memory(args, obs_dim, action_dim)
    run = Run(args, checkpoint)
    device = run.device

    # what a checkpoint holds: networks, buffers, counters, generators (optimizers live no longer than a block)
    agent = Agent(obs_dim, action_dim, args).to(device)
    num_states = args.batch_size * args.rollout_frequency * args.rollout_retain
    rb = RingBuffer(args.buffer_size, sum(agent.sizes), device)
    states = RingBuffer(num_states, obs_dim, device)  # where rollouts start; never emptied, like the reference code's
    counters = {"blocks": 0, "num_terminations": 0, "num_rule_errors": 0}
    rng = {name: np.random.default_rng([args.seed, i]) for i, name in enumerate(("reset", "prefill"))}
    for i, name in enumerate(("act", "label", "model", "replay", "rollout", "update")):
        rng[name] = torch.Generator(device).manual_seed(10 * args.seed + i)
    parts = {"agent": agent, "counters": counters} | ({"replay": rb, "states": states} if args.save_buffer else {})
    run.keep(parts, rng)
    if checkpoint:
        counters |= checkpoint["parts"]["counters"]
        checkpoint = None  # what refers to the file keeps it on the disk
    fast = functools.partial(GraphedFunction, generators=rng) if args.cudagraphs else lambda function: function
    envs.on_fault = run.abort
    print(f"{run.folder}: {device}, {obs_dim} observations, {action_dim} actions")

    def tick(doing: str) -> None:
        if run.tick(doing):
            raise Interrupted

    def learn_block() -> None:
        """When it is due. If it is interrupted, all is as before: the resumed run learns it from its beginning."""
        blocks = (run.step - args.learning_starts) // args.model_train_frequency + 1
        if rb.end < args.learning_starts or blocks <= counters["blocks"] or run.stop.requested:
            return
        generators = {name: rng[name] for name in ("model", "replay", "rollout", "update")}
        before = deepcopy((agent.state_dict(), states.state_dict()))
        before_rng = {name: generator.get_state() for name, generator in generators.items()}
        try:
            scale = 1 if counters["blocks"] else args.first_block
            run.metrics = learn(agent, rb, states, terminated_fn, generators, args, scale, fast, tick)
            counters["blocks"] = blocks
            if run.step == run.reported[0]:  # a block that was interrupted: there is no speed to report with it
                run.log(require_finite(run.metrics, run.step))
            run.report()
            run.metrics = {}  # reported once
        except Interrupted:
            agent.load_state_dict(before[0])
            states.load_state_dict(before[1])
            for name, generator in generators.items():
                generator.set_state(before_rng[name])
        run.progress.set_description_str("", refresh=False)

    dones, eval_envs = np.ones(args.num_envs, bool), None
    while True:
        learn_block()
        if run.eval_due(dones):
            eval_envs = evaluate_and_log(agent, eval_envs, run)
        if not run.goes_on(dones):
            break
        if dones.any():
            seeds = rng["reset"].integers(2**31, size=args.num_envs).tolist()
            obs, _ = envs.reset(seed=seeds, options={"reset_mask": dones})
        if rb.end >= args.learning_starts or counters["blocks"]:  # resumed without its buffer: the policy fills it
            actions = act(agent, obs, device, rng["act"])
            require_finite({"the policy's action": actions.sum()}, run.step)
        else:
            actions = rng["prefill"].uniform(-1, 1, (args.num_envs, action_dim)).astype(np.float32)
        next_obs, rewards, terminations, truncations, infos = envs.step(actions)
        require_rule(terminated_fn, next_obs, terminations, counters, run.step)
        rows = np.concatenate([obs, actions, rewards[:, None], next_obs], 1).astype(np.float32)
        rb.add(labelled(torch.from_numpy(rows).to(device), rng["label"], args))
        obs, dones = next_obs, terminations | truncations
        run.step += args.num_envs
        run.progress.update(args.num_envs)
        if dones.any():
            run.log_episodes(infos, dones)

    envs.close()
    if eval_envs is not None:
        eval_envs.close()
    return run.close(agent.state_dict())


# === Environment ===


LATE_IMPORTS = []  # packages that are imported where they are used

# One set of settings for all tasks but the pendulums. A flag on the command line wins.
DEFAULTS = {
    "total_timesteps": 100_000, "learning_starts": 5_000, "model_train_frequency": 1_000, "critic_warmup": 250,
}  # fmt: skip
PENDULUM = {"total_timesteps": 10_000, "learning_starts": 500, "model_train_frequency": 250, "critic_warmup": 62}
TASKS = dict.fromkeys(("InvertedPendulum", "InvertedDoublePendulum", "Pendulum"), PENDULUM)  # deviation 11
# The paper's truncated observations, 27 and 45 numbers, by the environments' own switches.
ENV_KWARGS = {
    "Ant-v5": {"include_cfrc_ext_in_observation": False},
    "Humanoid-v5": {f"include_{x}_in_observation": False for x in ("cinert", "cvel", "qfrc_actuator", "cfrc_ext")},
}


def never_terminates(o: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(o[..., 0], dtype=torch.bool)


def inside(x: torch.Tensor, low: float, high: float) -> torch.Tensor:
    return (x > low) & (x < high)


def hopper_terminated(o: torch.Tensor) -> torch.Tensor:
    near = (o[..., 1:].abs() < 100).all(-1)  # deviation 5: on both sides
    return ~(near & inside(o[..., 0], 0.7, math.inf) & inside(o[..., 1], -0.2, 0.2))


def inverted_double_pendulum_terminated(o: torch.Tensor) -> torch.Tensor:
    first, second = torch.atan2(o[..., 1:3], o[..., 3:5]).unbind(-1)  # deviation 5: both normalised
    return ~(0.6 * (first.cos() + (first + second).cos()) > 1.0)


# Which next observations (..., D) end an episode; what is not a number where a rule looks does, too (deviation 5).
# To add a task: one line here and, if it needs other settings, one in TASKS.
TERMINATIONS = {
    "Hopper": hopper_terminated,
    "Walker2d": lambda o: ~(inside(o[..., 0], 0.8, 2.0) & inside(o[..., 1], -1.0, 1.0)),
    "Ant": lambda o: ~(o.isfinite().all(-1) & (o[..., 0] >= 0.2) & (o[..., 0] <= 1.0)),
    "Humanoid": lambda o: ~((o[..., 0] >= 1.0) & (o[..., 0] <= 2.0)),
    "InvertedPendulum": lambda o: ~(o.isfinite().all(-1) & (o[..., 1].abs() <= 0.2)),
    "InvertedDoublePendulum": inverted_double_pendulum_terminated,
} | dict.fromkeys(("HalfCheetah", "Swimmer", "Reacher", "Pusher", "Pendulum"), never_terminates)


def is_dm_control(env_id: str) -> bool:
    """Gymnasium ids end in a version (-v0) or name a module (my_module:MyEnv); dm_control tasks do neither."""
    return re.search(r":|-v\d+$", env_id) is None


def task_name(env_id: str) -> str:
    """my_module:MyNamespace/MyEnv-v0 -> MyEnv."""
    return re.sub(r"-v\d+$", "", re.split("[:/]", env_id)[-1])


def with_task_defaults(args: Args) -> Args:
    """The settings in force: what was not given is filled in from TASKS."""
    args = replace(args, env_id=re.sub(r"^dm_control/(.+)-v0$", r"\1", args.env_id))  # what Shimmy calls a task
    task = DEFAULTS | TASKS.get(task_name(args.env_id), {})
    return replace(args, **{name: value for name, value in task.items() if getattr(args, name) is None})


def termination_function(env_id: str, obs_dim: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """Which next observations (N, D) end an episode, bool (N,); a task without a rule is refused, none is assumed."""
    if is_dm_control(env_id):
        return never_terminates
    if task_name(env_id) not in TERMINATIONS:
        fail(f"when does {env_id} terminate? Add a function of its observations to TERMINATIONS in {__file__}")
    rule = TERMINATIONS[task_name(env_id)]
    try:
        known = rule(torch.zeros(2, obs_dim))
        form = f"{known.dtype} {tuple(known.shape)}"
    except Exception as error:
        form = one_line(error)
    if form != "torch.bool (2,)":
        fail(f"TERMINATIONS[{task_name(env_id)!r}] must make a bool (N,) of observations (N, {obs_dim}), not {form}")
    return rule


def require_rule(terminated_fn: Callable, next_obs: np.ndarray, terminations: np.ndarray, counters: dict, step: int):
    """Stops the run if the rule that ends the model's rollouts is not the environment's.

    Two disagreements and one in a hundred terminations pass: at high speed the double pendulum's observations lag.
    """
    wrong = terminated_fn(torch.from_numpy(next_obs)).numpy() != terminations
    counters["num_terminations"] += int(terminations.sum())
    counters["num_rule_errors"] += int(wrong.sum())
    if counters["num_rule_errors"] > 2 + counters["num_terminations"] / 100:
        rule = f"the rule of TERMINATIONS in {__file__} is not the environment's"
        errors = f"{counters['num_rule_errors']} disagreements, {counters['num_terminations']} terminations"
        where = f"the last at the observation {next_obs[wrong][0].tolist()}"
        raise SystemExit(f"\nerror: at step {step} {rule} ({errors}, {where}); the last checkpoint is intact")


def make_env(args: Args, video: str | None = None) -> Callable[[], gym.Env]:
    """Thunk of one environment: observations (D,) float32, actions in [-1, 1]."""
    main_process = os.getpid()

    def thunk() -> gym.Env:
        if os.getpid() != main_process:
            be_a_worker()
        os.environ.setdefault("MUJOCO_GL", "egl" if args.capture_video else "disable")
        if is_dm_control(args.env_id):
            try:
                env = DMControl(args.env_id)
            except ImportError as error:
                package = "pip install dm_control==1.0.50 'mujoco>=3.17,<4' (from Python 3.13 on with --no-deps)"
                fail(f"{args.env_id} needs {package} ({error})")
        else:
            render = {"render_mode": "rgb_array"} if video else {}
            env = make_gymnasium(args.env_id, **render, **ENV_KWARGS.get(args.env_id, {}))
            if re.fullmatch(r"Walker2d-v\d", args.env_id):
                env = Unclipped(env)  # deviation 5: velocities as they are
        limits = filter(None, (args.max_episode_steps, env.spec and env.spec.max_episode_steps))
        env = gym.wrappers.TimeLimit(env, min(limits, default=1_000))
        env = gym.wrappers.RecordEpisodeStatistics(CheckedEnv(env))
        return fit_spaces(Film(env, video) if video else env, args.env_id)

    return thunk


def fit_spaces(env: gym.Env, env_id: str) -> gym.Env:
    """Refuses what the algorithm cannot use; makes observations float32 and rescales the action box to [-1, 1]."""
    obs, action = env.observation_space, env.action_space
    if not (isinstance(obs, gym.spaces.Box) and len(obs.shape) == 1):
        fail(f"{env_id}: observations must be vectors (D,), not {obs}")
    if not (isinstance(action, gym.spaces.Box) and len(action.shape) == 1 and action.is_bounded("both")):
        fail(f"{env_id}: actions must be a bounded vector Box, not {action}")
    unbounded = gym.spaces.Box(-np.inf, np.inf, obs.shape, np.float32)
    env = gym.wrappers.TransformObservation(env, lambda o: np.asarray(o, np.float32), unbounded)
    low, high = action.low.astype(float), action.high.astype(float)
    space = gym.spaces.Box(-1, 1, action.shape, np.float32)
    rounded, kind = np.rint if action.dtype.kind in "iu" else np.asarray, action.dtype
    return gym.wrappers.TransformAction(env, lambda a: rounded(low + (a + 1) / 2 * (high - low)).astype(kind), space)


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


class Unclipped(gym.ObservationWrapper):
    """Walker2d's observation with its true velocities: 82 % of random steps have one beyond the environment's +-10."""

    def observation(self, observation: np.ndarray) -> np.ndarray:
        data = self.env.unwrapped.data
        return np.concatenate([data.qpos[1:], data.qvel])


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


# === Evaluation ===


def evaluate(agent: Agent, envs: gym.vector.VectorEnv, args: Args, device: torch.device, stop: "StopRequest"):
    """Plays args.eval_episodes with the policy's mode, on seeds of its own: training does not notice (deviation 2).

    Of each episode: the return, whether it lasted to the time limit, the mean x velocity (nan if it is not told), the
    transitions (obs, action, reward, next_obs) as rows (T, 2 D + A + 1).
    """
    seeds = np.random.default_rng([args.seed, 99])
    quota = np.bincount(np.arange(args.eval_episodes) % envs.num_envs)  # fixed, so that short episodes do not win
    returns, full_length, speeds, episodes, dones = [], [], [], [], np.ones(envs.num_envs, bool)
    tracks = [[] for _ in quota]
    while quota.any() and not stop.requested:
        if dones.any():
            obs, _ = envs.reset(seed=seeds.integers(2**31, size=envs.num_envs).tolist(), options={"reset_mask": dones})
        actions = act(agent, obs, device, None)
        next_obs, rewards, terminations, truncations, infos = envs.step(actions)
        rows = np.concatenate([obs, actions, rewards[:, None], next_obs], 1).astype(np.float32)
        velocities = infos.get("x_velocity", np.empty(0))
        told = velocities.shape == dones.shape and velocities.dtype.kind in "fi"
        for track, *step in zip(tracks, rows, velocities if told else np.full(len(rows), np.nan), strict=True):
            track.append(step)
        obs, dones = next_obs, terminations | truncations
        for i in np.flatnonzero(dones):
            if quota[i] > 0:
                quota[i] -= 1
                returns.append(infos["episode"]["r"][i])
                full_length.append(not terminations[i])
                rows, velocities = zip(*tracks[i], strict=True)
                speeds.append(np.mean(velocities))
                episodes.append(np.stack(rows))
            tracks[i].clear()
    return np.array(returns), np.array(full_length), np.array(speeds), episodes


def evaluate_and_log(agent: Agent, envs: gym.vector.VectorEnv | None, run: "Run") -> gym.vector.VectorEnv | None:
    """Evaluates and logs at a run's present step. Returns the environments for the next time; None: to be made anew."""
    args = run.args
    if envs is None:
        video = run.picture("videos/evaluation.mp4") if args.capture_video else None
        envs = run.make_envs(make_vector_env, args, min(args.num_envs, args.eval_episodes), video)
        envs.on_fault = run.abort
    returns, full_length, speeds, episodes = evaluate(agent, envs, args, run.device, run.stop)
    if not run.stop.requested:
        run.log_evaluation(returns)
        run.log(walking_metrics(full_length, speeds))
        if not agent.bounds.isnan().any():  # it has learned
            warn_of_failure(log_open_loop, agent, episodes, run)
    if args.capture_video:  # the film is written when its environment closes
        envs.close()
        return None
    return envs


@torch.no_grad()
def open_loop(agent: Agent, obs: torch.Tensor, actions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean predictions of each network by itself from obs (B, D) on: obs (K, E, B, D), rewards (K, E, B, 1).

    In raw units; actions (K, B, A).
    """
    state, predicted, rewards = agent.standardize(obs).expand(agent.sizes[-1], -1, -1), [], []
    for action in actions:
        inputs = torch.cat([state, action.expand(len(state), -1, -1)], -1)
        outputs = agent.out_mean + agent.out_std * agent.ensemble(inputs)
        state = state + outputs[..., 1:] / agent.obs_std
        predicted.append(agent.obs_mean + agent.obs_std * state)
        rewards.append(outputs[..., :1])
    return torch.stack(predicted), torch.stack(rewards)


def log_open_loop(agent: Agent, episodes: list[np.ndarray], run: "Run") -> None:
    """Errors k steps ahead: root mean square in standard deviations of the replay's obs; mean absolute, of rewards.

    Stretches of 25 steps, one behind the other; of as many as the longest episode has, if it is shorter.
    """
    length = min(25, max(map(len, episodes)))
    pieces = [rows[t : t + length] for rows in episodes for t in range(0, len(rows) - length + 1, length)]
    obs, actions, rewards, next_obs = torch.from_numpy(np.stack(pieces, 1)).to(run.device).split(agent.sizes[:4], -1)
    predicted, earned = open_loop(agent, obs[0], actions)
    obs_errors = ((predicted - next_obs[:, None]) / agent.obs_std).square().mean((1, 2, 3)).sqrt()
    reward_errors = (earned - rewards[:, None]).abs().mean((1, 2, 3))
    for k, (obs_error, reward_error) in enumerate(zip(obs_errors.tolist(), reward_errors.tolist(), strict=True), 1):
        run.log({f"open_loop/obs_error_{k}": obs_error, f"open_loop/reward_error_{k}": reward_error})


def walking_metrics(full_length: np.ndarray, speeds: np.ndarray) -> dict[str, float]:
    """If velocities are told. Walking: to last to the time limit at a mean of 0.5 m/s or more in 9 of 10 episodes."""
    if not len(speeds) or not np.isfinite(speeds).all():
        return {}
    walks = (full_length & (speeds >= 0.5)).mean() >= 0.9
    metrics = {"x_velocity": speeds.mean(), "full_length_share": full_length.mean(), "walks": float(walks)}
    return {f"eval/{name}": value for name, value in metrics.items()}


def evaluate_run(args: Args) -> str:
    """Plays the agent of a run folder and prints its returns; with args.capture_video one episode is filmed."""
    checkpoint = load_checkpoint(args.evaluate, args)
    refuse_changes(args, checkpoint, "evaluate eval_episodes num_envs capture_video cuda seed bfloat16 cudagraphs")
    device, stop = choose_device(args), StopRequest()
    video = f"{args.evaluate}/videos/evaluate.mp4" if args.capture_video else None
    envs = make_vector_env(args, min(args.num_envs, args.eval_episodes), video)
    agent = Agent(envs.single_observation_space.shape[0], envs.single_action_space.shape[0], args).to(device)
    with must_fit(args.evaluate):
        agent.load_state_dict(checkpoint["parts"]["agent"])
    returns, full_length, speeds, _ = evaluate(agent, envs, args, device, stop)
    envs.close()
    if not stop.requested:
        for name, value in walking_metrics(full_length, speeds).items():
            print(f"{name} {value:.2f}")
        single = " ".join(f"{episodic_return:.1f}" for episodic_return in returns)
        print(f"{args.env_id} at step {checkpoint['global_step']}:")
        print(f"return {returns.mean():.1f} +- {returns.std():.1f} ({len(returns)} episodes: {single})")
    stop.exit()
    return args.evaluate


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


def lacks_bfloat16(device: torch.device) -> bool:
    """Whether it is a processor that computes bfloat16 by way of float32, as far as torch tells."""
    known = getattr(torch.cpu, "get_capabilities", dict)()  # not in every torch; other keys on ARM
    extensions = {known.get("avx512_bf16"), known.get("amx_bf16")}
    return device.type == "cpu" and (torch.backends.cpu.get_cpu_capability() == "AVX2" or extensions == {False})


def check_args(args: Args) -> None:
    """Refuses impossible numbers in one line."""
    check_bounds(args)
    if args.num_targets > args.num_critics:
        fail(f"--num-targets must be at most {args.num_critics}, not {args.num_targets}")
    for name, bound in (("gamma", 1), ("critic_dropout", 1), ("holdout_ratio", 1), ("value_quantile", 0.5)):
        if getattr(args, name) >= bound:
            fail(f"--{name.replace('_', '-')} must be below {bound}")
    if not 2 <= args.learning_starts <= args.total_timesteps:
        fail(f"--learning-starts {args.learning_starts} must be from 2 to --total-timesteps {args.total_timesteps}")
    if args.buffer_size < args.learning_starts:
        fail(f"--buffer-size {args.buffer_size} does not hold the {args.learning_starts} steps of --learning-starts")
    if args.num_envs > args.model_train_frequency and not args.evaluate:
        fail(f"--num-envs must be at most --model-train-frequency {args.model_train_frequency}, not {args.num_envs}")
    if args.batch_size % args.num_nets:
        fail(f"--batch-size {args.batch_size} cannot be dealt to --num-nets {args.num_nets} in blocks of equal size")
    if not 1 <= args.holdout_ratio * args.learning_starts:
        fail(f"--holdout-ratio {args.holdout_ratio} leaves nothing to test on")
    if args.env_id == "Humanoid-v4":
        fail("Humanoid-v4 has 376 observations, too many for a model: use Humanoid-v5, which has the paper's 45 here")
    if args.bfloat16 and lacks_bfloat16(choose_device(args)):
        print("warning: this processor has no bfloat16 arithmetic: --bfloat16 makes it slower", file=sys.stderr)
    if args.cudagraphs and not args.evaluate and choose_device(args).type != "cuda":
        fail("--cudagraphs needs a GPU")


def check_memory(args: Args, obs_dim: int, action_dim: int) -> None:
    """Refuses what the device cannot hold: weights, gradients and Adam's moments, buffers, the rows of a rollout."""
    with torch.device("meta"):  # tensors that have shapes alone
        num_weights = sum(weight.numel() for weight in Agent(obs_dim, action_dim, args).parameters())
    num_states = args.rollout_frequency * args.rollout_retain + args.rollout_length  # kept, and of one pass
    num_floats = 4 * num_weights + args.batch_size * num_states * obs_dim
    num_floats += 3 * args.buffer_size * (2 * obs_dim + action_dim + 2 + args.num_nets)  # and a block's copies of it
    require_memory(4 * num_floats, "--buffer-size, sizes of networks and batches", choose_device(args))


if __name__ == "__main__":
    main(parse_args())
