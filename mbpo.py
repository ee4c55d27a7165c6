# /// script
# requires-python = ">=3.11,<3.15"
# dependencies = [
#     "dm_control==1.0.50", "gymnasium>=1.4", "matplotlib>=3.10", "moviepy>=2.2", "mujoco>=3.17,<4", "numpy>=2.1",
#     "pygame-ce>=2.5", "tensorboard>=2.20", "torch>=2.6", "tqdm>=4.67", "tyro>=1.0",
# ]
# [tool.uv]  # dm_control asks for labmaze, which it does not need here and which ends with Python 3.12
# override-dependencies = ["labmaze; python_version < '3.13'"]
# ///
"""MBPO: soft actor-critic on short rollouts that an ensemble of dynamics models branches off from real states.

The algorithm, with the functions that are its steps:
  after learning_starts steps of random actions, before every F-th environment step
    train_model    fit the E networks of the ensemble to all real transitions by maximum likelihood (model_loss), until
                   none improves on held-out ones; those of lowest error there, the elites, make the rollouts
    rollout        from R real states k = rollout_length steps of the actor in the model (model_step), into model_rb
  at every environment step
    act            sample the actor; the transition goes into the replay, rb
    update_policy  G times update: a step of critics, actor and temperature (critic_loss, actor_loss, alpha_loss) on
                   5 % rows of rb and 95 % rows of model_rb; the target critics follow
The first part of the file is the algorithm, up to main; environments, evaluation and the run folder follow it.
Shapes: B rows of a batch, D numbers of an observation, A of an action, E networks; E, F, G, R are named at Args.

Paper:      Janner et al. 2019, When to Trust Your Model, arXiv 1906.08253   Reference code: jannerm/mbpo (TensorFlow 1)
Run:        python mbpo.py --env-id Hopper-v5          (or: uv run mbpo.py --env-id Hopper-v5)
Resume:     python mbpo.py --resume runs/<run folder>
Evaluate:   python mbpo.py --evaluate runs/<run folder> [--capture-video]
Watch:      tensorboard --logdir runs
Where the paper differs from the reference code (there it trains the ensemble once an epoch, the policy on model rows
alone, and Hopper's k is 15 at epoch 100) the code is followed. Deviations from it, each also marked at its line:
  1. A rollout step deals its rows to the elites in random groups of equal size (the reference draws one for each row);
     20,000 starts are rolled out at a time (there all).
  2. Evaluation by eval_frequency and eval_episodes (the reference: one episode at the end of each epoch).
  3. A transition is in the replay at once, and there are exactly learning_starts random ones (the reference adds whole
     episodes when they end); updates begin right after them (the reference waits for 1,000, twice the pendulums' 500).
  4. Critics, actor and temperature step from the same parameters (the reference's single call has no defined order).
  5. Both angles of the double pendulum's termination are normalised, Hopper's bound of 100 holds on both sides, and an
     observation that is not a number where its task's rule looks terminates.
  6. Gymnasium's v5 tasks (the reference: gym's v2), whose reward drops at the step that terminates. Tasks that the
     paper does not have (Pendulum, dm_control, Swimmer, Reacher, Pusher) have settings of ours.
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
from itertools import pairwise
from typing import Annotated, NoReturn, get_args, get_origin, get_type_hints

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
Real = Annotated[float, -1e9, 1e9]
Schedule = tuple[Natural, Natural, Count, Count]


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
    env_id: str = "Hopper-v5"  # Gymnasium id (my_module:MyEnv-v0) or dm_control task (walker-walk), observed by state
    total_timesteps: Count | None = None  # environment steps of the run, the random ones included; default by task
    num_envs: Few = 1  # environments played side by side, each in its own process if more than one
    max_episode_steps: Count | None = None  # most steps of an episode; default the task's limit, or 1,000

    # real experience
    buffer_size: Count = 1_000_000  # capacity of the replay buffer of real transitions
    learning_starts: Count | None = None  # environment steps of random actions before learning; default by task
    epoch_length: Count | None = None  # environment steps of an epoch, the schedules' unit; default by task

    # soft actor-critic
    updates_per_step: Natural | None = None  # policy updates for each environment step (G); default by task, else 20
    batch_size: Size = 256  # transitions of a policy update, real and model ones together
    real_ratio: Share = 0.05  # share of real transitions in a policy update's batch; 1 = no model, only real ones
    gamma: Share = 0.99  # discount per environment step
    tau: Part = 0.005  # share of the way to the critics that the target critics go after every policy update
    learning_rate: Positive = 3e-4  # Adam's learning rate for actor, critics and temperature
    hidden_size: Size = 256  # units of each of the two hidden layers of actor and critics
    target_entropy: Real | None = None  # entropy that alpha aims at, nats; default by task, else minus the action size

    # ensemble
    num_nets: Few = 7  # networks of the ensemble (E)
    num_elites: Few = 5  # networks of lowest held-out error, which make the rollouts
    model_hidden_size: Size | None = None  # units of each of a network's four hidden layers; default by task, else 200
    model_lr: Positive = 1e-3  # Adam's learning rate for the ensemble
    model_batch_size: Size = 256  # transitions in a batch of each network of the ensemble
    model_train_frequency: Count | None = None  # environment steps between trainings of the ensemble (F); by task
    model_max_epochs: Count | None = None  # passes over the data in a training of the ensemble at most; default: none

    # rollouts
    rollout_batch_size: Count = 100_000  # start states of the rollouts after each training of the ensemble (R)
    rollout_schedule: Schedule | None = None  # e0 e1 k0 k1: from k0 steps at epoch e0 to k1 at e1; default by task
    model_retain_epochs: Count | None = None  # epochs whose rollouts the model buffer holds; default by task, else 1

    # Speed
    compile: bool = False  # torch.compile the losses
    cudagraphs: bool = False  # replay a step's updates, and the ensemble's, as one CUDA graph each (GPU only)


# === Networks ===


class EnsembleLinear(nn.Module):
    """E linear layers side by side: (E, B, in) -> (E, B, out), one batched matrix product."""

    def __init__(self, num_nets: int, in_dim: int, out_dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_nets, in_dim, out_dim))
        self.bias = nn.Parameter(torch.zeros(num_nets, 1, out_dim))

    def forward(self, x: torch.Tensor, nets: torch.Tensor | None = None) -> torch.Tensor:
        """nets: indices of the layers to use, in their order; all if None."""
        weight, bias = (self.weight, self.bias) if nets is None else (self.weight[nets], self.bias[nets])
        return torch.baddbmm(bias, x, weight)


class DynamicsEnsemble(nn.Module):
    """E networks that each predict a Gaussian of (reward, next_obs - obs) from (obs, action)."""

    weight_decays = (2.5e-5, 5e-5, 7.5e-5, 7.5e-5, 1e-4)  # of the weights, layer by layer, as in the reference code

    def __init__(self, obs_dim: int, action_dim: int, args: Args):
        super().__init__()
        in_dim, width, out_dim = obs_dim + action_dim, args.model_hidden_size, obs_dim + 1
        sizes = [in_dim, width, width, width, width, 2 * out_dim]
        self.layers = nn.ModuleList(EnsembleLinear(args.num_nets, i, o) for i, o in pairwise(sizes))
        for layer in self.layers:
            std = 1 / (2 * math.sqrt(layer.weight.shape[1]))
            nn.init.trunc_normal_(layer.weight, std=std, a=-2 * std, b=2 * std)
        self.max_logvar = nn.Parameter(torch.full((out_dim,), 0.5))  # shared by the networks, and trained
        self.min_logvar = nn.Parameter(torch.full((out_dim,), -10.0))
        self.register_buffer("input_mean", torch.zeros(in_dim))
        self.register_buffer("input_std", torch.ones(in_dim))
        self.register_buffer("elites", torch.arange(args.num_elites))  # indices of the best networks

    def forward(self, inputs: torch.Tensor, nets: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and log-variance (E, B, 1 + D) for inputs (E, B, D + A), one batch for each of the networks `nets`.

        The log-variance is kept between its bounds softly: max - softplus(max - x), then min + softplus(x - min).
        """
        h = (inputs - self.input_mean) / self.input_std
        for layer in self.layers[:-1]:
            h = F.silu(layer(h, nets))
        mean, logvar = self.layers[-1](h, nets).chunk(2, -1)
        logvar = self.max_logvar - F.softplus(self.max_logvar - logvar)
        return mean, self.min_logvar + F.softplus(logvar - self.min_logvar)


class Actor(nn.Module):
    """Tanh-squashed Gaussian policy."""

    def __init__(self, obs_dim: int, action_dim: int, units: int):
        super().__init__()
        layers = [nn.Linear(obs_dim, units), nn.Linear(units, units), nn.Linear(units, 2 * action_dim)]
        for layer in layers:
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)
        self.net = nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])

    def forward(self, obs: torch.Tensor, noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Actions (B, A) in [-1, 1] for obs (B, D) and normal noise (B, A), and their log-probabilities (B,)."""
        mean, log_std = self.net(obs).chunk(2, -1)
        log_std = log_std.clamp(-20, 2)
        x = mean + log_std.exp() * noise
        log_prob = -0.5 * noise**2 - log_std - 0.5 * math.log(2 * math.pi)  # of the Gaussian
        log_prob = log_prob - 2 * (math.log(2) - x - F.softplus(-2 * x))  # - log(1 - tanh(x)^2)
        return torch.tanh(x), log_prob.sum(-1)


class Critics(nn.Module):
    """Two action values, side by side; the smaller one is used."""

    def __init__(self, obs_dim: int, action_dim: int, units: int):
        super().__init__()
        sizes = [obs_dim + action_dim, units, units, 1]
        self.layers = nn.ModuleList(EnsembleLinear(2, i, o) for i, o in pairwise(sizes))
        for layer in self.layers:
            bound = math.sqrt(6 / sum(layer.weight.shape[1:]))  # Glorot uniform
            nn.init.uniform_(layer.weight, -bound, bound)

    def forward(self, obs: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
        """Values (2, B) of obs (B, D) and actions (B, A)."""
        h = torch.cat([obs, actions], -1).expand(2, -1, -1)
        for layer in self.layers[:-1]:
            h = F.relu(layer(h))
        return self.layers[-1](h).squeeze(-1)


class Agent(nn.Module):
    """Everything that is learned: ensemble, actor, critics and their targets, temperature alpha."""

    def __init__(self, obs_dim: int, action_dim: int, args: Args):
        super().__init__()
        self.obs_dim, self.action_dim, self.target_entropy = obs_dim, action_dim, args.target_entropy
        self.ensemble = DynamicsEnsemble(obs_dim, action_dim, args)
        self.actor = Actor(obs_dim, action_dim, args.hidden_size)
        self.critics = Critics(obs_dim, action_dim, args.hidden_size)
        self.target_critics = deepcopy(self.critics).requires_grad_(False)
        self.log_alpha = nn.Parameter(torch.zeros(()))

    def unpack(self, rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Rows of a buffer (..., 2 D + A + 2) as obs, actions, rewards (...), next_obs, terminations (...)."""
        sizes = [self.obs_dim, self.action_dim, 1, self.obs_dim, 1]
        obs, actions, rewards, next_obs, terminations = rows.split(sizes, -1)
        return obs, actions, rewards.squeeze(-1), next_obs, terminations.squeeze(-1)


# === Losses ===


def model_loss(ensemble: DynamicsEnsemble, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Gaussian negative log-likelihood of targets (E, B, 1 + D), summed over the networks.

    For each network the mean of (mean - target)^2 exp(-logvar) + logvar, which is twice the negative log-likelihood up
    to a constant. The bounds of the log-variance are drawn together by 0.01; weight decay is left to the optimizer.
    """
    mean, logvar = ensemble(inputs)
    nll = ((mean - targets) ** 2 * torch.exp(-logvar) + logvar).mean((1, 2)).sum()
    return nll + 0.01 * ensemble.max_logvar.sum() - 0.01 * ensemble.min_logvar.sum()


def critic_loss(agent: Agent, batch: tuple, noise: torch.Tensor, gamma: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Means of (Q(s, a) - y)^2 / 2 for both critics (2,); action values (2, B).

    y = r + gamma (min Q'(s', a') - alpha log pi(a' | s')), a' ~ pi(s'), Q' the target critics; y = r at a termination.
    """
    obs, actions, rewards, next_obs, terminations = batch
    with torch.no_grad():
        next_actions, log_prob = agent.actor(next_obs, noise)
        next_values = agent.target_critics(next_obs, next_actions).amin(0) - agent.log_alpha.exp() * log_prob
        returns = rewards + gamma * (1 - terminations) * next_values
    values = agent.critics(obs, actions)
    return 0.5 * ((values - returns) ** 2).mean(1), values


def actor_loss(agent: Agent, obs: torch.Tensor, noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean of alpha log pi(a | s) - min Q(s, a), a ~ pi(s), for the actor alone; log-probabilities (B,)."""
    actions, log_prob = agent.actor(obs, noise)
    values = agent.critics(obs, actions).amin(0)
    return (agent.log_alpha.exp().detach() * log_prob - values).mean(), log_prob


def alpha_loss(log_alpha: torch.Tensor, log_prob: torch.Tensor, target_entropy: float) -> torch.Tensor:
    """Minus the mean of log alpha (log pi + target entropy): too little entropy raises alpha."""
    return -(log_alpha * (log_prob.detach() + target_entropy)).mean()


# === Acting ===


@torch.no_grad()
def act(agent: Agent, obs: np.ndarray, device: torch.device, generator: torch.Generator | None) -> np.ndarray:
    """Actions (B, A) in [-1, 1] for obs (B, D): sampled, or the policy's mode without a generator."""
    noise = torch.zeros(len(obs), agent.action_dim, device=device)
    if generator is not None:
        noise.normal_(generator=generator)
    return agent.actor(torch.as_tensor(obs, device=device), noise)[0].cpu().numpy()  # host sync


@torch.no_grad()
def rollout(agent: Agent, starts: torch.Tensor, length: int, terminated_fn: Callable, generator: torch.Generator):
    """Rolls the model `length` steps from starts (R, D) under the current policy; yields the rows of each step.

    Rollouts that terminated end there. terminated_fn: next_obs (B, D) -> (B,), which of them end an episode.
    """
    elites, draws = agent.ensemble.elites, {"generator": generator, "device": starts.device}
    for obs in starts.split(20_000):  # a CPU takes twice as long for all rows at once, in page faults
        for _ in range(length):
            actions, _ = agent.actor(obs, torch.randn(len(obs), agent.action_dim, **draws))
            row_order = torch.randperm(len(obs), **draws)
            elite_order = elites[torch.randperm(len(elites), **draws)]
            noise = torch.randn(len(obs), agent.obs_dim + 1, **draws)
            next_obs, rewards = model_step(agent.ensemble, obs, actions, row_order, elite_order, noise)
            terminations = terminated_fn(next_obs)
            yield torch.cat([obs, actions, rewards[:, None], next_obs, terminations[:, None].float()], 1)
            obs = next_obs[~terminations]  # host sync
            if not len(obs):
                break


@torch.no_grad()
def model_step(ensemble: DynamicsEnsemble, obs: torch.Tensor, actions: torch.Tensor, row_order, elite_order, noise):
    """Next obs (B, D) and rewards (B,), sampled for each row from the Gaussian of one elite; noise (B, 1 + D).

    Deviation 1, equal groups: the rows in the order row_order (B,) are dealt to the elites in the order elite_order.
    Of seven rows three elites get 3, 3 and 1; the last group is filled up with rows whose sample is not used.
    """
    num_rows, size = len(obs), math.ceil(len(obs) / len(elite_order))
    places = torch.arange(len(elite_order) * size, device=obs.device) % num_rows
    rows_by_elite = row_order[places].view(-1, size)
    mean, logvar = ensemble(torch.cat([obs, actions], -1)[rows_by_elite], elite_order)
    sample = mean + torch.exp(0.5 * logvar) * noise[rows_by_elite]  # (elites, size, 1 + D)
    change = torch.empty_like(noise)
    change[row_order] = sample.flatten(0, 1)[:num_rows]
    return obs + change[:, 1:], change[:, 0]


def rollout_length(global_step: int, args: Args) -> int:
    """k of the schedule: k0 + (epoch - e0) / (e1 - e0) (k1 - k0), never outside of k0 and k1, cut to an integer."""
    e0, e1, k0, k1 = args.rollout_schedule
    epoch = (global_step - args.learning_starts) // args.epoch_length
    share = min(max((epoch - e0) / max(e1 - e0, 1), 0.0), 1.0)
    return int(k0 + share * (k1 - k0))


def model_buffer_size(length: int, args: Args) -> int:
    """Rows for the rollouts, `length` steps long, of the last model_retain_epochs epochs."""
    trainings = args.epoch_length / args.model_train_frequency
    return int(args.model_retain_epochs * trainings * args.rollout_batch_size * length)


# === Updates ===

# Of the real transitions, this share and at most so many are held out of a training, to compare the networks on them.
# A training ends after PATIENCE + 1 epochs in a row in which no network's error there fell by a share of MIN_GAIN.
HOLDOUT_RATIO, MAX_HOLDOUT, PATIENCE, MIN_GAIN = 0.2, 5_000, 5, 0.01


def make_optimizers(agent: Agent, args: Args) -> dict[str, torch.optim.Adam]:
    """Adam for the ensemble, whose weights decay as in L2 regularisation, and for actor, critics and alpha."""
    ensemble = agent.ensemble
    groups = [{"params": [ensemble.max_logvar, ensemble.min_logvar, *(layer.bias for layer in ensemble.layers)]}]
    for layer, decay in zip(ensemble.layers, ensemble.weight_decays, strict=True):
        groups.append({"params": [layer.weight], "weight_decay": decay})
    policy = [*agent.actor.parameters(), *agent.critics.parameters(), agent.log_alpha]
    adam = functools.partial(torch.optim.Adam, fused=True, capturable=agent.log_alpha.is_cuda)
    return {"model": adam(groups, args.model_lr), "policy": adam(policy, args.learning_rate)}


def train_model(agent: Agent, rows: torch.Tensor, generator, args: Args, update_fn: Callable, tick: Callable):
    """Trains the ensemble on all real rows (N, 2 D + A + 2) until no network improves on the held-out ones.

    Each network learns from a bootstrap of its own (as many of the other rows, with replacement), drawn once, and ends
    as its own best snapshot. update_fn: `update_model` as a function of inputs and targets; tick: asked before each
    batch whether to stop. Returns the errors on the held-out rows, the mean loss of the last epoch and the number of
    epochs, or None if it was stopped.
    """
    ensemble, draws = agent.ensemble, {"generator": generator, "device": rows.device}
    rows = rows[torch.randperm(len(rows), **draws)]
    obs, actions, rewards, next_obs, _ = agent.unpack(rows)
    inputs, targets = torch.cat([obs, actions], -1), torch.cat([rewards[:, None], next_obs - obs], -1)
    held = min(int(HOLDOUT_RATIO * len(rows)), MAX_HOLDOUT)
    holdout, inputs, targets = (inputs[:held], targets[:held]), inputs[held:], targets[held:]
    std, ensemble.input_mean[:] = torch.std_mean(inputs, 0, correction=0)  # the targets are not normalised
    ensemble.input_std[:] = torch.where(std < 1e-12, 1.0, std)
    bootstrap = torch.randint(len(inputs), (args.num_nets, len(inputs)), **draws)
    snapshot = deepcopy(ensemble.layers).requires_grad_(False)  # without the bounds, which the networks share
    best = torch.full((args.num_nets,), 1e10, device=rows.device)  # so that the first epoch is an improvement
    epochs = without_improvement = 0
    while without_improvement <= PATIENCE and epochs != args.model_max_epochs:
        order = bootstrap.gather(1, torch.rand(bootstrap.shape, **draws).argsort(1))  # each network's own shuffle
        batches = order.split(args.model_batch_size, 1)  # (E, B)
        loss = 0
        for batch in batches:
            if tick(f"ensemble, epoch {epochs + 1}"):
                return None
            loss = loss + update_fn(inputs[batch], targets[batch]) / len(batches)
        mse = holdout_errors(ensemble, *holdout)["mse"]
        improved = (best - mse) / best > MIN_GAIN
        best = torch.where(improved, mse, best)
        for saved, parameter in zip(snapshot.parameters(), ensemble.layers.parameters(), strict=True):
            saved.copy_(torch.where(improved[:, None, None], parameter, saved).detach())
        epochs += 1
        without_improvement = 0 if improved.any() else without_improvement + 1  # host sync
    ensemble.layers.load_state_dict(snapshot.state_dict())
    errors = holdout_errors(ensemble, *holdout)
    ensemble.elites.copy_(errors["mse"].argsort()[: args.num_elites])
    return errors | {"loss": loss, "epochs": epochs}


def update_model(agent: Agent, optimizer, inputs: torch.Tensor, targets: torch.Tensor, loss_fn) -> torch.Tensor:
    """One gradient step of the ensemble on inputs (E, B, D + A) and targets (E, B, 1 + D); the loss. No host sync."""
    optimizer.zero_grad(set_to_none=True)
    loss = loss_fn(agent.ensemble, inputs, targets)
    loss.backward()
    optimizer.step()
    return loss.detach()


@torch.no_grad()
def holdout_errors(ensemble: DynamicsEnsemble, inputs: torch.Tensor, targets: torch.Tensor) -> dict[str, torch.Tensor]:
    """Errors (E,) of each network on the same rows: MSE, MSE over the predicted variance; their disagreement."""
    mean, logvar = ensemble(inputs.expand(len(ensemble.layers[0].weight), -1, -1))
    error, disagreement = (mean - targets) ** 2, mean.std(0, correction=0).mean()
    weighted = (error * torch.exp(-logvar)).mean((1, 2))
    return {"mse": error.mean((1, 2)), "weighted_mse": weighted, "disagreement": disagreement}


def update(agent: Agent, optimizer, rows: torch.Tensor, noise: torch.Tensor, args: Args, loss_fns) -> dict:
    """One update of critics, actor and temperature, then of the targets, on rows (B, 2 D + A + 2), noise (2, B, A).

    loss_fns: critic_loss and actor_loss. Returns detached scalars. No host sync.
    """
    critic_loss_fn, actor_loss_fn = loss_fns
    batch, alpha = agent.unpack(rows), agent.log_alpha.exp()
    qf_losses, values = critic_loss_fn(agent, batch, noise[0], args.gamma)
    policy_loss, log_prob = actor_loss_fn(agent, batch[0], noise[1])
    temperature_loss = alpha_loss(agent.log_alpha, log_prob, agent.target_entropy)
    optimizer.zero_grad(set_to_none=True)
    qf_losses.sum().backward(inputs=list(agent.critics.parameters()))
    policy_loss.backward(inputs=list(agent.actor.parameters()))  # the critics do not learn from the actor's loss
    temperature_loss.backward(inputs=[agent.log_alpha])
    optimizer.step()  # deviation 4: all three at once, from the same parameters
    with torch.no_grad():
        for target, parameter in zip(agent.target_critics.parameters(), agent.critics.parameters(), strict=True):
            target.lerp_(parameter, args.tau)
    metrics = {"qf1_loss": qf_losses[0], "qf2_loss": qf_losses[1], "qf_loss": qf_losses.mean(), "alpha": alpha}
    metrics |= {"qf_values": values.mean(), "actor_loss": policy_loss, "alpha_loss": temperature_loss}
    return {f"losses/{name}": value.detach() for name, value in metrics.items()}


def update_policy(agent: Agent, optimizer, rows: torch.Tensor, noise: torch.Tensor, args: Args, loss_fns) -> dict:
    """The G updates of a step, on rows (G, B, 2 D + A + 2) with noise (G, 2, B, A); the scalars of the last."""
    metrics = {}
    for batch, batch_noise in zip(rows, noise, strict=True):
        metrics = update(agent, optimizer, batch, batch_noise, args, loss_fns)
    return metrics


# === Replay buffer ===


class ReplayBuffer:
    """Ring of rows, one a transition: obs (D), action (A), reward, next_obs (D), terminated (0 or 1); on the device."""

    def __init__(self, capacity: int, row_size: int, device: torch.device):
        self.rows = torch.empty(capacity, row_size, device=device)
        self.end = 0  # rows ever written; row i lives in slot i % capacity

    def __len__(self) -> int:
        return min(self.end, len(self.rows))

    def add(self, rows: torch.Tensor) -> None:
        """Appends rows (B, 2 D + A + 2); the oldest make room."""
        rows = rows[-len(self.rows) :]
        slots = (self.end + torch.arange(len(rows), device=rows.device)) % len(self.rows)
        self.rows[slots] = rows
        self.end += len(rows)

    def resize(self, capacity: int) -> None:
        """Changes the capacity and keeps the newest rows."""
        if capacity == len(self.rows):
            return
        kept = self.newest(min(len(self), capacity))
        self.rows = kept  # the old ones are freed before the new ones are made
        self.rows = kept.new_empty(capacity, kept.shape[1])
        self.rows[: len(kept)], self.end = kept, len(kept)

    def newest(self, count: int) -> torch.Tensor:
        """The last `count` rows, oldest first, a copy."""
        slots = torch.arange(self.end - count, self.end, device=self.rows.device) % len(self.rows)
        return self.rows[slots]

    def sample(self, *shape: int, generator: torch.Generator) -> torch.Tensor:
        """Copies of rows drawn uniformly with replacement, (*shape, 2 D + A + 2)."""
        return self.rows[torch.randint(len(self), shape, generator=generator, device=self.rows.device)]

    def state_dict(self) -> dict:
        return {"rows": self.newest(len(self)).cpu(), "capacity": len(self.rows), "end": self.end}

    def load_state_dict(self, state: dict) -> None:
        self.rows = self.rows.new_empty(state["capacity"], self.rows.shape[1])
        self.end = state["end"] - len(state["rows"])
        self.add(state["rows"].to(self.rows.device))


# === Training ===


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

    # what a checkpoint holds: networks, optimizers, buffers, counters, generators
    agent = Agent(obs_dim, action_dim, args).to(device)
    optimizers = make_optimizers(agent, args)
    rb, model_rb = (ReplayBuffer(size, 2 * obs_dim + action_dim + 2, device) for size in (args.buffer_size, 1))
    counters = {"num_updates": 0, "num_trainings": 0, "num_terminations": 0, "num_rule_errors": 0}
    rng = {name: np.random.default_rng([args.seed, i]) for i, name in enumerate(("reset", "prefill"))}
    for i, name in enumerate(("act", "model", "rollout", "replay", "update")):
        rng[name] = torch.Generator(device).manual_seed(10 * args.seed + i)
    parts = {"agent": agent, **{f"{name}_optimizer": optimizer for name, optimizer in optimizers.items()}}
    parts |= {"replay": rb, "model_replay": model_rb} if args.save_buffer else {}
    run.keep(parts | {"counters": counters}, rng)
    if checkpoint:
        counters |= checkpoint["parts"]["counters"]
        checkpoint = None  # what refers to the file keeps it on the disk
    update_model_fn, update_policy_fn = make_updates(agent, optimizers, args)
    envs.on_fault = run.abort
    print(f"{run.folder}: {device}, {obs_dim} observations, {action_dim} actions, target entropy {args.target_entropy}")

    def learn_model() -> dict[str, float] | None:
        """When it is due: trains the ensemble, fills the model buffer. Returns what there is to log; None: stopped."""
        trainings = 1 + (run.step - args.learning_starts) // args.model_train_frequency
        due = trainings > counters["num_trainings"] or not len(model_rb)  # empty: the buffers were not saved
        if args.real_ratio == 1 or not due:
            return {}
        training = agent, optimizers["model"], rb.newest(len(rb)), rng["model"], args, update_model_fn
        if (errors := train_model_or_undo(*training, run.tick)) is None:
            return None
        counters["num_trainings"] = trainings
        length, num_rows = rollout_length(run.step, args), 0
        model_rb.resize(model_buffer_size(length, args))
        starts = agent.unpack(rb.sample(args.rollout_batch_size, generator=rng["rollout"]))[0]
        for rows in rollout(agent, starts, length, terminated_fn, rng["rollout"]):
            model_rb.add(rows)
            num_rows += len(rows)
        lengths = {"model/rollout_length": length, "model/mean_rollout": num_rows / len(starts)}
        return training_metrics(agent, errors, run.step) | lengths

    def learn_policy(count: int) -> None:
        """Makes `count` updates on real and model transitions, all drawn at once."""
        real = int(args.batch_size * args.real_ratio)  # 12 of 256
        rows = rb.sample(count, real, generator=rng["replay"])
        if real < args.batch_size:
            rows = torch.cat([rows, model_rb.sample(count, args.batch_size - real, generator=rng["replay"])], 1)
        noise = torch.randn(count, 2, args.batch_size, action_dim, generator=rng["update"], device=device)
        run.metrics = update_policy_fn(rows, noise)
        counters["num_updates"] += count
        if counters["num_updates"] % 1000 < count:
            run.report()

    dones, eval_envs = np.ones(args.num_envs, bool), None
    while True:
        if run.eval_due(dones):
            eval_envs = evaluate_and_log(agent, eval_envs, run, counters["num_trainings"] > 0)
        if not run.goes_on(dones):
            break
        learning = rb.end >= args.learning_starts  # deviation 3: right after the random steps
        model_metrics = learn_model() if learning else {}
        if model_metrics is None:
            continue
        if dones.any():
            seeds = rng["reset"].integers(2**31, size=args.num_envs).tolist()
            obs, _ = envs.reset(seed=seeds, options={"reset_mask": dones})
        if learning or counters["num_updates"]:
            actions = act(agent, obs, device, rng["act"])
            require_finite({"the policy's action": actions.sum()}, run.step)
        else:
            actions = rng["prefill"].uniform(-1, 1, (args.num_envs, action_dim)).astype(np.float32)
        next_obs, rewards, terminations, truncations, infos = envs.step(actions)
        require_rule(terminated_fn, next_obs, terminations, counters, run.step)
        columns = obs, actions, rewards[:, None], next_obs, terminations[:, None]
        rb.add(torch.from_numpy(np.concatenate(columns, 1).astype(np.float32)).to(device))  # deviation 3: at once
        obs, dones = next_obs, terminations | truncations
        run.step += args.num_envs
        run.progress.update(args.num_envs)
        run.log(model_metrics)  # after the step: a run resumed from before it trains and logs again
        if dones.any():
            run.log_episodes(infos, dones)
        if learning:
            learn_policy(args.updates_per_step * args.num_envs)

    envs.close()
    if eval_envs is not None:
        eval_envs.close()
    return run.close(agent.state_dict())


# === Environment ===


LATE_IMPORTS = ["matplotlib"]  # packages that are imported where they are used

# The published settings by task (name of the environment without its version). A flag on the command line wins.
DEFAULTS = {
    "total_timesteps": 125_000, "learning_starts": 5_000, "epoch_length": 1_000, "updates_per_step": 20,
    "rollout_schedule": (0, 1, 1, 1), "model_train_frequency": 250, "model_retain_epochs": 1, "model_hidden_size": 200,
}  # fmt: skip
PENDULUM = {"total_timesteps": 20_500, "learning_starts": 500, "epoch_length": 250}
TASKS = {
    "InvertedPendulum": {**PENDULUM, "updates_per_step": 10, "target_entropy": -0.05},
    "InvertedDoublePendulum": {**PENDULUM, "target_entropy": -0.5},
    "Hopper": {"total_timesteps": 130_000, "rollout_schedule": (20, 150, 1, 15), "target_entropy": -1.0},
    "Walker2d": {"total_timesteps": 305_000, "target_entropy": -3.0},
    "HalfCheetah": {"total_timesteps": 405_000, "updates_per_step": 40, "target_entropy": -3.0},
    "Ant": {"total_timesteps": 305_000, "rollout_schedule": (20, 100, 1, 25), "target_entropy": -4.0},
    "Humanoid": {
        "total_timesteps": 305_000, "rollout_schedule": (20, 300, 1, 25), "target_entropy": -2.0,
        "model_train_frequency": 1_000, "model_retain_epochs": 5, "model_hidden_size": 400,
    },
    "Pendulum": {**PENDULUM, "total_timesteps": 10_000},  # deviation 6: not in the paper
}  # fmt: skip
# Deviation 6, v5 tasks: they have switches for the paper's truncated observations, 27 and 45 numbers.
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
    """Plays args.eval_episodes (deviation 2: not one) with the policy's mode, on seeds of its own.

    Returns the returns (episodes,) and the trajectories: obs (T + 1, D), actions (T, A), rewards (T,) of each episode.
    """
    seeds, n = np.random.default_rng([args.seed, 99]), envs.num_envs
    quota = args.eval_episodes // n + (np.arange(n) < args.eval_episodes % n)  # fixed, or short episodes would win
    returns, trajectories, tracks, dones = [], [], [[] for _ in range(n)], np.ones(n, bool)
    while quota.any() and not stop.requested:
        if dones.any():
            obs, _ = envs.reset(seed=seeds.integers(2**31, size=n).tolist(), options={"reset_mask": dones})
        actions = act(agent, obs, device, None)
        next_obs, rewards, terminations, truncations, infos = envs.step(actions)
        for i, track in enumerate(tracks):
            track.append((obs[i].copy(), actions[i], np.float32(rewards[i])))
        obs, dones = next_obs, terminations | truncations
        for i in np.flatnonzero(dones):
            if quota[i] > 0:
                quota[i] -= 1
                returns.append(float(infos["episode"]["r"][i]))
                past, acted, earned = map(np.stack, zip(*tracks[i], strict=True))
                trajectories.append((np.concatenate([past, next_obs[i][None]]), acted, earned))
            tracks[i] = []
    return np.array(returns), trajectories


def evaluate_and_log(agent: Agent, envs: gym.vector.VectorEnv | None, run: "Run", has_model: bool):
    """Evaluates and logs at a run's present step. Returns the environments for the next time; None: to be made anew."""
    args = run.args
    if envs is None:
        video = run.picture("videos/evaluation.mp4") if args.capture_video else None
        envs = run.make_envs(make_vector_env, args, min(args.num_envs, args.eval_episodes), video)
        envs.on_fault = run.abort
    returns, trajectories = evaluate(agent, envs, args, run.device, run.stop)
    if not run.stop.requested:
        run.log_evaluation(returns)
        if has_model:
            warn_of_failure(log_open_loop, agent, trajectories, run)
    if args.capture_video:  # the film is written when its environment closes
        envs.close()
        return None
    return envs


def evaluate_run(args: Args) -> str:
    """Plays the agent of a run folder and prints its returns; with args.capture_video one episode is filmed."""
    checkpoint = load_checkpoint(args.evaluate, args)
    refuse_changes(args, checkpoint, "evaluate eval_episodes num_envs capture_video cuda seed compile cudagraphs")
    device, stop = choose_device(args), StopRequest()
    video = f"{args.evaluate}/videos/evaluate.mp4" if args.capture_video else None
    envs = make_vector_env(args, min(args.num_envs, args.eval_episodes), video)
    agent = Agent(envs.single_observation_space.shape[0], envs.single_action_space.shape[0], args).to(device)
    with must_fit(args.evaluate):
        agent.load_state_dict(checkpoint["parts"]["agent"])
    returns, _ = evaluate(agent, envs, args, device, stop)
    envs.close()
    if not stop.requested:
        single = " ".join(f"{episodic_return:.1f}" for episodic_return in returns)
        print(f"{args.env_id} at step {checkpoint['global_step']}:")
        print(f"return {returns.mean():.1f} +- {returns.std():.1f} ({len(returns)} episodes: {single})")
    stop.exit()
    return args.evaluate


@torch.no_grad()
def open_loop_errors(ensemble: DynamicsEnsemble, obs: torch.Tensor, actions: torch.Tensor, rewards: torch.Tensor):
    """Error of each elite's mean prediction, k = 1 ... K steps after the last observation.

    obs (K + 1, B, D), actions (K, B, A), rewards (K, B). Returns, for each k, the root mean square error of obs in
    standard deviations of the training inputs and the mean absolute error of the reward: (K,), (K,).
    """
    std = ensemble.input_std[: obs.shape[-1]]
    predicted, obs_errors, reward_errors = obs[0].expand(len(ensemble.elites), -1, -1), [], []
    for next_obs, action, reward in zip(obs[1:], actions, rewards, strict=True):
        inputs = torch.cat([predicted, action.expand(len(predicted), -1, -1)], -1)
        mean, _ = ensemble(inputs, ensemble.elites)
        predicted = predicted + mean[..., 1:]
        obs_errors.append((((predicted - next_obs) / std) ** 2).mean().sqrt())
        reward_errors.append((mean[..., 0] - reward).abs().mean())
    return torch.stack(obs_errors), torch.stack(reward_errors)


def log_open_loop(agent: Agent, trajectories: list[tuple], run: "Run") -> None:
    """Open-loop errors on evaluation episodes, never trained on, as scalars and as a picture.

    25 steps from every fifth step of each episode on, or as many as the longest episode has.
    """
    device, length = agent.log_alpha.device, min(25, max(len(rewards) for _, _, rewards in trajectories))
    pieces = [
        (obs[t : t + length + 1], actions[t : t + length], rewards[t : t + length])
        for obs, actions, rewards in trajectories
        for t in range(0, len(rewards) - length + 1, 5)
    ]
    obs, actions, rewards = (torch.from_numpy(np.stack(part, 1)).to(device) for part in zip(*pieces, strict=True))
    errors = [error.cpu().numpy() for error in open_loop_errors(agent.ensemble, obs, actions, rewards)]
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3), layout="constrained")
    names = ("obs", "observation error (std)"), ("reward", "reward error")
    for axis, (name, label), error in zip(figure.subplots(1, 2), names, errors, strict=True):
        for k, value in enumerate(error, 1):
            run.log({f"open_loop/{name}_error_{k}": value})
        axis.plot(np.arange(1, length + 1), error)
        axis.set(xlabel="steps since the last observation", ylabel=label, ylim=(0, None))
    figure.savefig(run.picture("open_loop_error.png"))


def training_metrics(agent: Agent, errors: dict, global_step: int) -> dict[str, float]:
    """What `train_model` returned, which must be finite, and the bounds of the log-variance."""
    values = {
        "losses/model_nll": errors["loss"], "losses/model_holdout_mse": errors["mse"].mean(),
        "model/weighted_mse": errors["weighted_mse"].mean(), "model/disagreement": errors["disagreement"],
        "model/max_logvar": agent.ensemble.max_logvar.mean(), "model/min_logvar": agent.ensemble.min_logvar.mean(),
    }  # fmt: skip
    for i, (mse, weighted) in enumerate(zip(errors["mse"], errors["weighted_mse"], strict=True)):
        values |= {f"model/holdout_mse_{i}": mse, f"model/weighted_mse_{i}": weighted}
    return require_finite(values, global_step) | {"model/epochs": errors["epochs"]}


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


def check_args(args: Args) -> None:
    """Refuses impossible numbers in one line."""
    check_bounds(args)
    if args.num_elites > args.num_nets:
        fail(f"--num-elites must be at most --num-nets, not {args.num_elites} of {args.num_nets}")
    if not 1 / HOLDOUT_RATIO <= args.learning_starts <= args.total_timesteps:
        least, most = math.ceil(1 / HOLDOUT_RATIO), f"--total-timesteps {args.total_timesteps}"
        fail(f"--learning-starts {args.learning_starts} must be from {least} to {most}")
    if args.env_id == "Humanoid-v4":
        fail("Humanoid-v4 has 376 observations, too many for a model: use Humanoid-v5, which has the paper's 45 here")
    if args.cudagraphs and not args.evaluate and choose_device(args).type != "cuda":
        fail("--cudagraphs needs a GPU")
    if args.buffer_size < args.learning_starts:
        fail(f"--buffer-size {args.buffer_size} does not hold the {args.learning_starts} steps of --learning-starts")
    if model_buffer_size(1, args) < 1:
        fail(f"--rollout-batch-size {args.rollout_batch_size} leaves no room for rollouts in an epoch's buffer")


def check_memory(args: Args, obs_dim: int, action_dim: int) -> None:
    """Refuses what the device cannot hold: weights, gradients and Adam's moments, buffers, the rows of a step."""
    with torch.device("meta"):  # tensors that have shapes alone
        num_weights = sum(weight.numel() for weight in Agent(obs_dim, action_dim, args).parameters())
    lengths = [rollout_length(step, args) for step in (args.learning_starts, args.total_timesteps)]  # may fall
    num_rows = args.buffer_size + (model_buffer_size(max(lengths), args) if args.real_ratio < 1 else 0)
    num_rows *= 1 + args.save_buffer  # a checkpoint copies the buffers
    num_rows += args.rollout_batch_size + args.updates_per_step * args.batch_size
    num_floats = 4 * num_weights + num_rows * (2 * obs_dim + action_dim + 2)
    require_memory(4 * num_floats, "--buffer-size, rollouts, sizes of networks and batches", choose_device(args))


def train_model_or_undo(agent: Agent, optimizer, rows: torch.Tensor, generator, args: Args, update_fn, tick):
    """Like train_model; stopped, it leaves all as it was, so that a resumed run trains from the beginning."""
    before = deepcopy((agent.ensemble.state_dict(), optimizer.state_dict())), generator.get_state()
    errors = train_model(agent, rows, generator, args, update_fn, tick)
    if errors is None:
        agent.ensemble.load_state_dict(before[0][0])
        optimizer.load_state_dict(before[0][1])
        generator.set_state(before[1])
    return errors


def make_updates(agent: Agent, optimizers: dict, args: Args) -> tuple[Callable, Callable]:
    """`update_model` and `update_policy` as functions of their tensors, made fast as the flags ask."""
    losses = [torch.compile(f) if args.compile else f for f in (model_loss, critic_loss, actor_loss)]
    model_fn = functools.partial(update_model, agent, optimizers["model"], loss_fn=losses[0])
    policy_fn = functools.partial(update_policy, agent, optimizers["policy"], args=args, loss_fns=losses[1:])
    return tuple(GraphedFunction(f) if args.cudagraphs else f for f in (model_fn, policy_fn))


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


if __name__ == "__main__":
    main(parse_args())
