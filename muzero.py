# /// script
# requires-python = ">=3.11,<3.15"
# dependencies = [
#     "ale-py>=0.12", "box2d>=2.3.10; python_version < '3.14'", "dm_control==1.0.50", "gymnasium>=1.4",
#     "matplotlib>=3.10", "moviepy>=2.2", "mujoco>=3.17,<4", "numba>=0.68", "numpy>=2.1",
#     "opencv-python-headless>=4.10", "pygame-ce>=2.5", "tensorboard>=2.20", "torch>=2.6", "tqdm>=4.67", "tyro>=1.0",
# ]
# [tool.uv]  # dm_control asks for labmaze, which it does not need here and which ends with Python 3.12
# override-dependencies = ["labmaze; python_version < '3.13'"]
# ///
"""MuZero: tree search in a learned model that predicts reward, policy and value, and nothing else.

At every environment step
  act            a search from the latent state of the observation, S (num_simulations) times: select (down the tree),
                 recurrent (a step of the model), expand_and_backup (a new node, and up again); its action is played
  add            the replay keeps observation, action and reward, and what the search found: its policy and root value
and for each of the updates that are due
  sample         sequences of K (unroll_steps) + n (td_steps) steps, uniformly or by priority
  bootstrap_now  the values that their returns end in, by the target network as it is now (reanalyze: also policies)
  update         make_targets: the search's policies, n-step returns, rewards; compute_losses: the model unrolled K
                 steps along the actions that were played, cross-entropies of its policies, values and rewards

Paper:      Schrittwieser et al. 2020, Mastering Atari, Go, Chess and Shogi by Planning with a Learned Model,
            arXiv 1911.08265 (Nature 588); the Gumbel search: Danihelka et al. 2022 (ICLR, Policy improvement by
            planning with Gumbel); continuous actions: Hubert et al. 2021 (Sampled MuZero), arXiv 2104.06303
            Reference code: the paper's pseudocode.py; google-deepmind/mctx for the searches
Run:        python muzero.py --env-id CartPole-v1          (or: uv run muzero.py; tictactoe, connect_four, ALE/Pong-v5)
Resume:     python muzero.py --resume runs/<run folder>
Evaluate:   python muzero.py --evaluate runs/<run folder> [--capture-video]
Play:       python muzero.py --play runs/<run folder of a board game>
Watch:      tensorboard --logdir runs
Deviations from the paper, named again at their lines and explained in docs/muzero.md: 1 counts, 2 bounds of Q,
3 optimizer and layers, 4 truncation, 5 board games, 6 Gumbel search, 7 frames, 8 target network now, 9 value loss,
10 replay, 11 turns, 12 settings by task, 13 candidates, 14 losses of continuous actions.
"""

from __future__ import annotations

import contextlib
import difflib
import fcntl
import functools
import glob
import importlib
import itertools
import math
import multiprocessing
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
from copy import copy, deepcopy
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
from numba import njit
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

    # Algorithm specific arguments (None = by task, see DEFAULTS and TASKS)
    env_id: str = "CartPole-v1"  # Gymnasium id (ALE/Pong-v5), dm_control task (cartpole-swingup) or tictactoe
    total_timesteps: Count | None = None  # environment steps of the run; default by task
    num_envs: Few | None = None  # environments or games played side by side, one search for all; default by task
    max_episode_steps: Count | None = None  # most steps of an episode; default the task's limit, or 1,000, Atari 27,000
    action_repeat: Few | None = None  # environment steps per action (rewards summed); default by task
    gamma: Share | None = None  # discount per action; default by task
    two_player: bool | None = None  # players alternate, values are the mover's and within -1 ... 1; default by task

    # Replay and updates
    buffer_size: Count | None = None  # environment steps that the replay buffer holds; default by task
    learning_starts: Natural | None = None  # environment steps before the first update; default by task
    replay_ratio: Positive | None = None  # updates per environment step; default by task
    batch_size: Size | None = None  # sequences per update (B); default by task
    unroll_steps: Few = 5  # steps that the model is unrolled in an update (K)
    td_steps: Size | None = None  # rewards in a return before it is bootstrapped (n); default by task
    bootstrap: Literal["search", "target"] | None = None  # a return's last value: search then, target net now
    reanalyze_ratio: Share | None = None  # share of a batch searched and valued anew with the target network; by task
    target_network_frequency: Count = 200  # updates between copies to the target network
    priority_alpha: Amount | None = None  # exponent of the replay priorities, 0 = uniform replay; default by task
    learning_rate: Positive | None = None  # learning rate of AdamW; default by task
    learning_rate_decay: Part | None = None  # share left at the end, reached exponentially; 1 = constant; by task
    weight_decay: Amount = 1e-4  # weight decay of AdamW
    max_grad_norm: Positive = 5.0  # gradient norm that an update is clipped to (deviation 3)
    value_scale: Amount = 0.25  # weight of the value loss (deviation 9: not 1)
    consistency_scale: Amount | None = None  # weight of the loss between predicted and seen latent states; by task
    entropy_scale: Amount | None = None  # continuous actions: weight of the policy's entropy; default by task

    # Networks
    hidden_size: Size | None = None  # units of latent state and hidden layers, channels for images and grids; by task
    num_blocks: Few | None = None  # residual blocks of convolutional networks; default by task
    support_size: Size | None = None  # M: values and rewards are distributions over -M ... M, transformed; by task

    # Search and acting
    search: Literal["gumbel", "puct"] = "gumbel"  # sequential halving, or the paper's search (deviation 6: not puct)
    num_simulations: Size | None = None  # simulations per search (S); default by task
    num_candidates: Annotated[int, 2, 1024] = 8  # continuous actions: drawn at the root of a search (K)
    inner_candidates: Few = 2  # continuous actions: drawn at each node below the root
    max_considered_actions: Size = 16  # gumbel: actions at the root that sequential halving begins with
    c_scale: Positive | None = None  # gumbel: factor of Q, rescaled to [0, 1], in the improved policy; default by task
    q_floor: Share | None = None  # least spread of Q that is rescaled to [0, 1], as a share of its size; by task
    dirichlet_alpha: Positive | None = None  # puct: concentration of the noise in the root's prior; default by task
    temperature_steps: tuple[Natural, Natural] | None = None  # puct: steps where temperature falls to 0.5, 0.25
    temperature_moves: Natural | None = None  # puct: moves of an episode before the temperature is 0; by task, or never
    opening_moves: Natural | None = None  # board games: most random moves that begin a game of self-play (deviation 5)

    play: str | None = None  # run folder of a board game: plays against it in the terminal, trains nothing

    # Speed
    compile: bool = False  # torch.compile the model's step and the losses
    cudagraphs: bool = False  # replay the model's step in a search as one CUDA graph (GPU only)

    @property
    def discount(self) -> float:
        """d of one step: gamma, or -gamma where the players alternate, because every value is the mover's."""
        return -self.gamma if self.two_player else self.gamma


PB_C_INIT, PB_C_BASE = 1.25, 19652.0  # pUCT: weight of the prior (c1), visits over which it grows (c2)
DIRICHLET_FRACTION = 0.25  # pUCT: share of the noise in the root's prior
C_VISIT = 50.0  # Gumbel: visits added to the largest visit count in the scale of Q
WIDE, WIDE_SHARE = 3.0, 0.5  # continuous actions: share of the root's candidates that are drawn with WIDE sigma
PRIORITY_BETA = 1.0  # exponent of the importance weights
REANALYZED_AT_ONCE = 256  # reanalysis: roots of one search, whose trees fit into the processor's cache


# === Networks ===


def scale_latent(latent: torch.Tensor) -> torch.Tensor:
    """Each latent state (B, ...) to [0, 1] by its own minimum and maximum."""
    flat = latent.flatten(1)
    low, high = flat.amin(1, keepdim=True), flat.amax(1, keepdim=True)
    return ((flat - low) / (high - low).clamp_min(1e-5)).view_as(latent)


class VectorNetwork(nn.Module):
    """Representation, dynamics and prediction for vectors; the latent state is (B, D). ConvNetwork is that of images.

    Layers are used by their forward: a call looks for hooks first, which is a fifth of the time of a step of the search
    with one root, a sixth with 64. action_dim 0: actions are discrete.
    """

    def __init__(self, obs_dim: int, num_actions: int, action_dim: int, num_bins: int, units: int):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(obs_dim, units), nn.LayerNorm(units), nn.SiLU(), nn.Linear(units, units))
        # an Embedding is a linear layer on the one-hot action
        self.action = nn.Linear(action_dim, units) if action_dim else nn.Embedding(num_actions, units)
        self.dynamics_in = nn.Linear(units, units)
        self.dynamics_norm = nn.LayerNorm(units)
        self.dynamics_out = nn.Linear(units, units)
        self.reward = nn.Linear(units, num_bins)
        self.head = nn.Sequential(nn.Linear(units, units), nn.LayerNorm(units), nn.SiLU())
        self.latent_size, self.outputs = units, (2 * action_dim or num_actions, num_bins)
        self.policy_value = nn.Linear(units, sum(self.outputs))

    def represent(self, obs: torch.Tensor) -> torch.Tensor:
        """Observations (B, D) -> latent state; symlog tames large numbers (deviation 3: vectors)."""
        obs = obs.float()
        return scale_latent(self.encoder(torch.sign(obs) * torch.log1p(torch.abs(obs))))

    def dynamics(self, latent: torch.Tensor, action: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Next latent state and reward logits (B, bins)."""
        h = F.silu(self.dynamics_norm.forward(self.dynamics_in.forward(latent) + self.action.forward(action)))
        return scale_latent(latent + self.dynamics_out.forward(h)), self.reward.forward(h)

    def predict(self, latent: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Policy logits (B, A) and value logits (B, bins)."""
        for layer in self.head:
            latent = layer.forward(latent)
        return self.policy_value.forward(latent).split(self.outputs, -1)


class Agent(nn.Module):
    """The networks, and what the search sees of them: numbers instead of distributions.

    What depends on the kind of actions is a method; SampledAgent, behind main, is that of continuous ones.
    """

    action_dim = 0  # numbers that an action consists of, 0 = it is one of num_actions

    def __init__(self, network: nn.Module, num_actions: int, args: Args):
        super().__init__()
        self.network, self.num_actions = network, num_actions
        for layer in (network.reward, network.policy_value):  # deviation 3: policy uniform, value 0 at first
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        bins = torch.arange(-args.support_size, args.support_size + 1.0)
        self.register_buffer("bins", bins, persistent=False)  # of distributions, see transform
        if args.consistency_scale:
            n, units = network.latent_size, args.hidden_size
            layers = [[nn.Linear(n, units), nn.LayerNorm(units), nn.SiLU(), nn.Linear(units, n)] for _ in range(2)]
            self.projector, self.predictor = (nn.Sequential(nn.Flatten(), *those) for those in layers)

    def initial(self, obs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Latent state, policy (B, A) and value (B,) of observations (B, ...): s = h(o); p, v = f(s)."""
        latent = self.network.represent(obs)
        policy, value_logits = self.network.predict(latent)
        return latent, policy, from_distribution(value_logits, self.bins)

    def offer(self, latent: torch.Tensor, policy: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What a search knows of latent states, and the prior logits of their actions."""
        return latent, policy

    def chosen(self, latent: torch.Tensor, action: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Latent states and actions for the network, of what was offered and the number of the action."""
        return latent, action

    def log_policy(self, policy: torch.Tensor, candidates: torch.Tensor) -> torch.Tensor:
        """Logarithm of the chance (..., A) that a policy gives to each action."""
        return policy.log_softmax(-1)

    def random_actions(self, shape: tuple, generator: torch.Generator) -> torch.Tensor:
        return torch.randint(self.num_actions, shape, generator=generator, device=generator.device)

    def draws(self, batch: int, args: Args, generator: torch.Generator, greedy: bool = False):
        """What `offer` needs besides, for the root and each simulation of a search: nothing."""
        return itertools.repeat(())

    def played(self, latent: torch.Tensor, result: SearchResult) -> SearchResult:
        """What a search from these latent states has found, with actions as the environment takes them."""
        return result


def recurrent(agent: Agent, latent: torch.Tensor, action: torch.Tensor, *draw: torch.Tensor):
    """One step of the model, r, s' = g(s, a); p, v = f(s'): s', and outputs (B, A + 2), see decode.

    In one tensor, because on a GPU each copy to the host costs as much as the network.
    """
    latent, reward_logits = agent.network.dynamics(*agent.chosen(latent, action))
    policy, value_logits = agent.network.predict(latent)
    expected = torch.stack([reward_logits, value_logits], 1).softmax(-1) @ agent.bins
    latent, policy = agent.offer(latent, policy, *draw)
    return latent, torch.cat([policy, expected], 1)


# === Targets and losses ===


def transform(x: torch.Tensor) -> torch.Tensor:
    """h(x) = sign(x) (sqrt(|x| + 1) - 1) + 0.001 x (not the h of h(o)), written to lose no digits near 0."""
    return x / (torch.sqrt(torch.abs(x) + 1) + 1) + 0.001 * x


def inverse_transform(y):
    """The x with h(x) = y, of tensors and numbers: u = sqrt(|x| + 1) solves 0.001 u^2 + u = |y| + 1.001.

    x = sign(y) (u^2 - 1), where u - 1 = |y| / (1.001 + 0.001 u) by the same equation, so that no digits are lost.
    """
    c = abs(y) + 1.001
    u = 2 * c / (1 + (1 + 0.004 * c) ** 0.5)
    return y * (u + 1) / (1.001 + 0.001 * u)


compiled_inverse = njit(inverse_transform)


@njit
def decode(outputs):
    """Reward (B,), policy (B, A), value (B,), float64, of outputs (B, A + 2), the last two columns transformed."""
    outputs = outputs.astype(np.float64)
    reward, value = np.empty((2, len(outputs)))
    for b in range(len(outputs)):
        reward[b], value[b] = compiled_inverse(outputs[b, -2]), compiled_inverse(outputs[b, -1])
    return reward, outputs[:, :-2], value


def two_hot(x: torch.Tensor, support_size: int) -> torch.Tensor:
    """Distribution (..., 2 M + 1) over -M ... M: h(x), clipped, shared by its two neighbours."""
    y = transform(x).clamp(-support_size, support_size)
    bins = torch.arange(-support_size, support_size + 1, device=x.device, dtype=y.dtype)
    return (1 - torch.abs(y[..., None] - bins)).clamp_min(0)


def from_distribution(logits: torch.Tensor, bins: torch.Tensor) -> torch.Tensor:
    """The number (...) that logits (..., 2 M + 1) over bins -M ... M stand for: expectation, then the inverse of h."""
    return inverse_transform(logits.softmax(-1) @ bins)


STEP, TERMINATED, TRUNCATED = 0, 1, 2  # kinds of replay rows: a step, or what closes an episode after its last step


def episode_end(kinds: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of rows (L, B): is it over, at the first closing row and after it? And is this row where it was truncated?"""
    num_closed = (kinds != STEP).cumsum(0)
    return num_closed > 0, (kinds == TRUNCATED) & (num_closed == 1)


def n_step_returns(rewards, values, kinds, td_steps: int, discount: float) -> torch.Tensor:
    """z_k = r_k + d r_{k+1} + ... + d^n nu_{k+n} for k = 0 ... L - n - 1, from rows (L, B); result (L - n, B).

    nu are the values, of the search then or the target network now. A closing row cuts the sum: with 0 where it is
    TERMINATED, with its own value where it is TRUNCATED (deviation 4: not with 0). Rows after it belong to the next
    episode, their returns are 0. For two players d is -gamma.
    """
    ended, truncated = episode_end(kinds)
    bootstrap = torch.where(ended & ~truncated, 0, values)
    count = len(rewards) - td_steps
    returns = bootstrap[td_steps:]
    for i in reversed(range(td_steps)):
        now = slice(i, i + count)
        returns = torch.where(ended[now], bootstrap[now], rewards[now] + discount * returns)
    return returns


def make_targets(rows: dict[str, torch.Tensor], unroll_steps: int, td_steps: int, discount: float) -> dict:
    """Targets of a sampled sequence for k = 0 ... K: returns, policies, rewards (K, B), and which of them count.

    After a termination the state absorbs: value and reward 0, no policy (deviation 5: in board games, too). After a
    truncation nothing counts (deviation 4), but the truncated state itself has its value. The reward of the last step
    counts either way.
    """
    first = slice(0, unroll_steps + 1)
    ended, truncated = episode_end(rows["kind"][first])
    after_truncation = truncated.cumsum(0) - truncated.long() > 0  # the truncated state itself is not
    return {
        "returns": n_step_returns(rows["reward"], rows["value"], rows["kind"], td_steps, discount),
        "policies": rows["policy"][first],
        "candidates": rows["candidates"][first],
        "rewards": torch.where(ended[:-1], 0, rows["reward"][:unroll_steps]),
        "policy_mask": ~ended,
        "obs_mask": ended.cumsum(0) <= 1,  # the final observation is seen, too
        "value_mask": ~after_truncation,
        "reward_mask": ~after_truncation[1:],
    }


def cross_entropy(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """- sum of target log softmax(logits), nats (...), both (..., n)."""
    return -(target * logits.log_softmax(-1)).sum(-1)


def compute_losses(agent: Agent, obs: torch.Tensor, actions: torch.Tensor, targets: dict, weights: torch.Tensor, args):
    """Loss of the model unrolled over actions (K, B) from obs (B, ...); detached metrics, and values (B,) at k = 0.

    Mean over the batch of w times the sum over k of CE(p_k, pi_k) + value_scale CE(v_k, z_k) + CE(r_k, u_k): what the
    model predicts after k steps against policies pi, returns z and rewards u. Terms at k = 0, where no reward is
    predicted, count once, those of the K steps 1/K each; weights w (B,) are the importance weights.
    Deviation 14: - entropy_scale H(p_k), continuous actions; - consistency_scale cos(q(p(s_k)), p(h(o_k))), k >= 1.
    """
    latents, reward_logits = [agent.network.represent(obs)], []
    for action in actions:
        halved = 0.5 * latents[-1] + 0.5 * latents[-1].detach()  # only the gradient out of the dynamics, not the heads'
        latent, logits = agent.network.dynamics(halved, action)
        latents.append(latent)
        reward_logits.append(logits)
    logits, value_logits = agent.network.predict(torch.cat(latents))
    shape = len(latents), len(weights)
    logits, value_logits = logits.unflatten(0, shape), value_logits.unflatten(0, shape)
    returns, rewards = two_hot(targets["returns"], args.support_size), two_hot(targets["rewards"], args.support_size)
    policy_terms = -(targets["policies"] * agent.log_policy(logits, targets["candidates"])).sum(-1)
    value_terms = cross_entropy(value_logits, returns) * targets["value_mask"]  # (K + 1, B)
    reward_terms = cross_entropy(torch.stack(reward_logits), rewards) * targets["reward_mask"]  # (K, B)
    scale = torch.full((len(latents), 1), 1 / len(actions), device=weights.device)
    scale[0] = 1.0

    def total(terms: torch.Tensor) -> torch.Tensor:
        return ((terms * scale[-len(terms) :]).sum(0) * weights).mean()

    policy_loss, value_loss = total(policy_terms * targets["policy_mask"]), total(value_terms)
    metrics = {"policy_loss": policy_loss, "value_loss": value_loss, "reward_loss": total(reward_terms)}
    loss = policy_loss + args.value_scale * value_loss + metrics["reward_loss"]
    values = from_distribution(value_logits[0].detach(), agent.bins)
    if agent.action_dim:
        entropies, more = agent.entropy_terms(logits, targets)
        loss, metrics = loss - args.entropy_scale * total(entropies), metrics | more
    if args.consistency_scale:
        with torch.no_grad():
            seen = agent.projector(agent.network.represent(targets["obs"].flatten(0, 1)))
        similarity = F.cosine_similarity(agent.predictor(agent.projector(torch.cat(latents[1:]))), seen)
        terms = -similarity.view(actions.shape[:2]) * targets["obs_mask"][1:]  # (K, B)
        metrics["consistency_loss"] = total(terms)
        loss = loss + args.consistency_scale * metrics["consistency_loss"]
    metrics["loss"] = loss
    limit = inverse_transform(torch.full_like(weights[0], args.support_size + 1e-4))
    metrics["clipped_targets"] = (torch.cat([targets["returns"], targets["rewards"]]).abs() > limit).float().mean()
    return loss, {f"losses/{name}": value.detach() for name, value in metrics.items()}, values


# === Search ===

# One simulation in a tree of four nodes: node 0 is the root, node n was made by simulation n, a and b are actions.
#
#          0          select             down from the root by the rule of the search: 0 -b-> 2 -a-> no child yet, so
#       a / \ b                          node 4 will hang there
#        1   2        model              one step of the network from the latent state of node 2 along a, in all trees
#       b|   |a                          at once: reward r and discount d of the edge, prior P and value v of node 4
#        3   4 (new)  expand_and_backup  all this goes into node 4; upwards go the returns G_4 = v, G_2 = r + d G_4,
#                                        G_0 = r' + d' G_2, each of them a term of its node's mean value
#
# The network runs in torch, and latent states stay on its device. The trees are arrays of records, their rules loops
# compiled by Numba, one tree after another; NUMBA_DISABLE_JIT=1 runs them as Python, to step through them.

NODE = np.dtype([  # nodes (B, S + 1)
    ("raw_value", "f8"),  # v, as the network gave it
    ("value", "f8"),  # mean of v and of all returns through the node
    ("count", "f8"),  # terms of that mean: 1 + sum over a of N(s, a) (deviation 1: v is one of them)
    ("reward", "f8"), ("discount", "f8"),  # r and d of the edge that leads to the node
    ("parent", "i8"), ("action", "i8"),  # that edge
    ("depth", "i8"),  # edges between the root and the node
])  # fmt: skip
EDGE = np.dtype([  # edges (B, S + 1, A): the actions of each node
    ("child", "i8"),  # node that the action leads to, 0 = none yet
    ("logit", "f8"), ("prior", "f8"),  # of the policy, -inf = not allowed at the root; their softmax P(s, a)
    ("visits", "f8"),  # N(s, a)
    ("q", "f8"),  # Q(s, a) = r + d * value of the child, 0 where unvisited
])  # fmt: skip
UNKNOWN = (math.inf, -math.inf)  # bounds of Q that a search finds in its tree


@njit
def extremes(x):
    """Minimum and maximum of x (A,)."""
    low, high = np.inf, -np.inf
    for value in x:
        low, high = min(low, value), max(high, value)
    return low, high


@njit
def softmax(x):
    """exp(x) / sum exp(x), (A,), in place of x."""
    (_, high), total = extremes(x), 0.0
    for i in range(len(x)):
        x[i] = math.exp(x[i] - high)
        total += x[i]
    for i in range(len(x)):
        x[i] /= total


@njit
def rescale(q, bounds):
    """Qn = (Q - low) / (high - low); 0 where these are equal up to rounding (deviation 2: the prior decides).

    The denominator is at least `floor` times the largest |Q|, or 1: what is nearly equal is not torn apart.
    """
    low, high, floor = bounds
    size = max(abs(low), abs(high), 1.0)
    return (q - low) / max(high - low, floor * size) if high - low > 1e-5 * size else 0.0


@njit
def tree_bounds(nodes, n, floor):
    """Minimum and maximum of the Q that the n - 1 edges of a tree have at present (deviation 2: not ever had)."""
    low, high = np.inf, -np.inf
    for node in nodes[1:n]:
        q = node["reward"] + node["discount"] * node["value"]
        low, high = min(low, q), max(high, q)
    return low, high, floor


@njit
def puct_choice(node, edges, bounds):
    """argmax over a of Qn + P sqrt(N_s) / (1 + N) (c1 + ln((N_s + c2 + 1) / c2)); Qn of an unvisited action is 0.

    N_s is the node's count, 1 + sum over a of N (deviation 1).
    """
    factor = math.sqrt(node["count"]) * (PB_C_INIT + math.log((node["count"] + PB_C_BASE + 1) / PB_C_BASE))
    choice, best = 0, -np.inf
    for a, edge in enumerate(edges):
        score = edge["prior"] * factor / (1 + edge["visits"])
        if edge["visits"] > 0:
            score += rescale(edge["q"], bounds)
        if score > best and edge["logit"] > -np.inf:
            choice, best = a, score
    return choice


@njit
def improved_logits(node, edges, bounds, c_scale, logits):
    """Logits (A,) of Gumbel MuZero's improved policy pi', into `logits`: logits + (c_visit + max N) c_scale Qn.

    Q of an unvisited action is the mixed value (v + sum N * sum P Q / sum P) / (1 + sum N), with P and Q of the visited
    ones. Where the bounds of Q are not known, they are its minimum and maximum at this node (deviation 2).
    """
    weight, weighted_q, most_visits = 0.0, 0.0, 0.0
    for edge in edges:
        if edge["visits"] > 0:
            weight, weighted_q = weight + edge["prior"], weighted_q + edge["prior"] * edge["q"]
            most_visits = max(most_visits, edge["visits"])
    mixed = (node["raw_value"] + (node["count"] - 1) * weighted_q / max(weight, 1e-30)) / node["count"]
    for a, edge in enumerate(edges):
        logits[a] = edge["q"] if edge["visits"] > 0 else mixed
    if bounds[0] > bounds[1]:
        low, high = extremes(logits)
        bounds = low, high, bounds[2]
    for a, edge in enumerate(edges):
        logits[a] = edge["logit"] + (C_VISIT + most_visits) * c_scale * rescale(logits[a], bounds)


@njit
def gumbel_choice(node, edges, bounds, c_scale, gumbel, eligible, scores):
    """Root: argmax of g + logits of pi' where N is `eligible`, see halving_visits. Below: of pi' - N / (1 + sum N).

    scores (A,) is room for the logits: new arrays, and their methods, cost two thirds more time in `select`.
    """
    improved_logits(node, edges, bounds, c_scale, scores)
    if node["depth"] > 0:
        softmax(scores)
    choice, best = 0, -np.inf
    for a, edge in enumerate(edges):
        if node["depth"] > 0:
            score = scores[a] - edge["visits"] / node["count"]
        else:
            score = scores[a] + gumbel[a] if edge["visits"] == eligible else -np.inf
        if score > best:
            choice, best = a, score
    return choice


@njit
def select(nodes, edges, n, puct, bounds, c_scale, gumbel, eligible, chosen):
    """Down each tree by the choices of the search to the first edge without a child, where node n hangs from now on.

    chosen (2, B) becomes the row of the parent's latent state in (S + 1) * B, and the action.
    """
    scores = np.empty(edges.shape[2])
    for b in range(len(nodes)):
        known = bounds[0] < bounds[1] or not puct  # Gumbel's search has them at each node
        tree = bounds if known else tree_bounds(nodes[b], n, bounds[2])
        child = 0
        while True:
            s = child
            if puct:
                a = puct_choice(nodes[b, s], edges[b, s], tree)
            else:
                a = gumbel_choice(nodes[b, s], edges[b, s], bounds, c_scale, gumbel[b], eligible[b, n - 1], scores)
            child = edges[b, s, a]["child"]
            if child == 0:
                break
        edges[b, s, a]["child"] = n
        node = nodes[b, n]
        node["parent"], node["action"], node["depth"] = s, a, nodes[b, s]["depth"] + 1
        chosen[0, b], chosen[1, b] = s * len(nodes) + b, a


@njit
def expand_and_backup(nodes, edges, n, reward, discount, logits, value):
    """What the model said, (B,) and (B, A), goes into node n, and the return G <- r + d G from there up to the root.

    On the way each edge counts a visit and has Q = r + d * value of its child; each node's mean gets the term G.
    """
    for b in range(len(nodes)):
        node = nodes[b, n]
        for a, edge in enumerate(edges[b, n]):
            edge["logit"] = edge["prior"] = logits[b, a]
        softmax(edges[b, n]["prior"])  # a view: in its place
        node["reward"], node["discount"], node["count"] = reward[b], discount[b], 1
        node["raw_value"] = node["value"] = G = value[b]
        while node["depth"] > 0:
            parent, edge = nodes[b, node["parent"]], edges[b, node["parent"], node["action"]]
            edge["visits"] += 1
            edge["q"] = node["reward"] + node["discount"] * node["value"]
            G = node["reward"] + node["discount"] * G
            parent["count"] += 1
            parent["value"] += (G - parent["value"]) / parent["count"]
            node = parent


@njit
def root_logits(nodes, edges, bounds, c_scale):
    """The improved_logits (B, A) of all roots."""
    logits = np.empty((len(nodes), edges.shape[2]))
    for b in range(len(nodes)):
        improved_logits(nodes[b, 0], edges[b, 0], bounds, c_scale, logits[b])
    return logits


class SearchResult(NamedTuple):
    """What a search found, on the host."""

    action: torch.Tensor  # (B,) to be played, or (B, D)
    policy: torch.Tensor  # (B, A) the training target: visit distribution, or Gumbel's improved policy pi'
    value: torch.Tensor  # (B,) mean of the root, its own value included
    visit_counts: torch.Tensor  # (B, A) of the root's actions
    qvalues: torch.Tensor  # (B, A) of the root's actions, 0 where unvisited
    depth: torch.Tensor  # (B,) mean depth of the nodes
    candidates: torch.Tensor  # (B, A, D) the root's actions as u, where continuous; otherwise D = 0


def host(x) -> np.ndarray:
    """A tensor or an array as the compiled functions take it."""
    return np.ascontiguousarray(x.cpu() if isinstance(x, torch.Tensor) else x, np.float64)


def grow(model: Callable, root: tuple, legal, noise, args: Args, puct: bool, value_range: tuple | None) -> tuple:
    """Nodes and edges of B trees after S simulations, from roots = latent (B, ...), logits (B, A) and value (B,).

    model(latent, action) gives latent state, reward, discount, policy logits and value, all but the first for the host.
    legal (B, A) holds at the root: below it the model may take any action, even past the end. noise (B, 2, A):
    Dirichlet, which the paper's search mixes into the root's prior, and Gumbel; None = 0.
    """
    latent, logits, value = root
    (B, A), N, legal = logits.shape, args.num_simulations + 1, host(legal) > 0
    bounds = tuple(map(float, (*(value_range or UNKNOWN), args.q_floor)))
    legal |= ~legal.any(1, keepdims=True)  # a finished game, searched with the others, has no legal move
    logits = np.where(legal, host(logits), -np.inf)
    considered = (logits > -np.inf).sum(1).clip(max=args.max_considered_actions).tolist()
    eligible = np.stack([halving_visits(m, args.num_simulations) for m in considered])  # (B, S)
    dirichlet, gumbel = np.zeros((2, B, A)) if noise is None else map(host, (noise[:, 0], noise[:, 1]))
    nodes, edges = np.zeros((B, N), NODE), np.zeros((B, N, A), EDGE)
    expand_and_backup(nodes, edges, 0, np.zeros(B), np.zeros(B), logits, host(value))  # no edge leads to the root
    if puct and noise is not None:
        edges["prior"][:, 0] += DIRICHLET_FRACTION * (dirichlet - edges["prior"][:, 0])
    latents = latent.new_empty(N, *latent.shape)
    latents[0] = latent
    rows = latents.flatten(0, 1)  # a view (N * B, ...)
    chosen = np.zeros((2, B), np.int64)
    on_host = torch.from_numpy(chosen)  # the same memory
    on_device = on_host.to(latent.device)  # on a CPU the same memory again
    parent, action = on_device
    for n in range(1, N):
        select(nodes, edges, n, puct, bounds, args.c_scale, gumbel, eligible, chosen)
        on_device.copy_(on_host)
        latents[n], *outputs = model(rows.index_select(0, parent), action)
        expand_and_backup(nodes, edges, n, *map(host, outputs))
    return nodes, edges


def puct_search(model, root, legal, noise, temperature, args: Args, value_range: tuple | None = None) -> SearchResult:
    """The paper's search: policy N / S; action drawn in proportion to N^(1 / temperature), temperature (B,).

    By the Gumbel noise: argmax over a of ln N / temperature + g; without it the most visited action is played.
    """
    nodes, edges = grow(model, root, legal, noise, args, True, value_range)
    visits = edges["visits"][:, 0]
    action = visits.argmax(1)
    if noise is not None:
        temperature = host(temperature)
        with np.errstate(divide="ignore"):
            scores = np.log(visits) / np.maximum(temperature, 1e-3)[:, None] + host(noise[:, 1])
        action = np.where(temperature > 0, scores.argmax(1), action)
    return summarize(nodes, edges, action, visits / args.num_simulations, root[2].dtype)


def gumbel_search(model, root, legal, noise, args: Args, value_range: tuple | None = None) -> SearchResult:
    """Gumbel MuZero's: policy pi'; of the most visited actions the best by g + logits of pi' is played."""
    nodes, edges = grow(model, root, legal, noise, args, False, value_range)
    bounds = tuple(map(float, (*(value_range or UNKNOWN), args.q_floor)))
    logits = root_logits(nodes, edges, bounds, args.c_scale)
    scores, visits = logits if noise is None else logits + host(noise[:, 1]), edges["visits"][:, 0]
    action = np.where(visits == visits.max(1, keepdims=True), scores, -np.inf).argmax(1)
    policy = np.exp(logits - logits.max(1, keepdims=True))
    return summarize(nodes, edges, action, policy / policy.sum(1, keepdims=True), root[2].dtype)


def summarize(nodes, edges, action: np.ndarray, policy: np.ndarray, dtype: torch.dtype) -> SearchResult:
    """What trees say at their roots."""
    numbers = policy, nodes["value"][:, 0], edges["visits"][:, 0], edges["q"][:, 0], nodes["depth"][:, 1:].mean(1)
    numbers = (torch.from_numpy(x).to(dtype) for x in numbers)
    return SearchResult(torch.from_numpy(action), *numbers, torch.empty(*policy.shape, 0))


@functools.cache
def halving_visits(num_actions: int, num_simulations: int) -> np.ndarray:
    """Sequential halving: the visits that an action must have to be eligible at each simulation, (S,)."""
    phases = max(1, math.ceil(math.log2(max(num_actions, 1))))
    survivors, visits, eligible = max(num_actions, 1), 0, []
    while len(eligible) < num_simulations:
        for _ in range(max(1, num_simulations // (phases * survivors))):
            eligible += [visits] * survivors
            visits += 1
        survivors = max(min(2, survivors), survivors // 2)  # the better half, never fewer than two
    return np.array(eligible[:num_simulations], np.int64)


# === Acting ===


@torch.inference_mode()
def act(agent: Agent, obs, legal, noise, temperature, args, step_fn=recurrent, draws=None) -> SearchResult:
    """Searches from observations (B, ...) with legal actions (B, A); without noise (B, 2, A) greedily.

    temperature (B,) is that of the paper's search; in a game of two players the bounds of Q are known. Only the
    observations need be on the agent's device. `draws` of Agent.draws, where actions are continuous.
    """
    draws, discount = iter(draws or itertools.repeat(())), np.full(len(obs), args.discount)
    latent, policy, value = agent.initial(obs)
    latent, logits = agent.offer(latent, policy, *next(draws))

    def model(latent: torch.Tensor, action: torch.Tensor) -> tuple:
        latent, outputs = step_fn(agent, latent, action, *next(draws))
        reward, logits, value = decode(outputs.cpu().numpy())
        return latent, reward, discount, logits, value

    inputs, value_range = (model, (latent, logits, value), legal, noise), (-1.0, 1.0) if args.two_player else None
    if args.search == "puct":
        return agent.played(latent, puct_search(*inputs, temperature, args, value_range))
    return agent.played(latent, gumbel_search(*inputs, args, value_range))


def draw_noise(legal: np.ndarray, args: Args, rng: np.random.Generator) -> np.ndarray:
    """Noise of a search, (B, 2, A): Dirichlet (Gamma variables over their sum) over the legal actions, and Gumbel."""
    gamma = rng.standard_gamma(args.dirichlet_alpha, legal.shape) * legal + 1e-30 * legal
    dirichlet = gamma / np.maximum(gamma.sum(1, keepdims=True), 1e-30)
    return np.stack([dirichlet, rng.gumbel(size=legal.shape)], 1).astype(np.float32)


def temperature_of(moves: np.ndarray, global_step: int, args: Args) -> np.ndarray:
    """Temperature (N,): 1, 0.5, 0.25 by environment steps (deviation 11: not by updates); 0 after temperature_moves."""
    falls = sum(global_step >= step for step in args.temperature_steps)
    early = moves < (math.inf if args.temperature_moves is None else args.temperature_moves)
    return np.where(early, 0.5**falls, 0).astype(np.float32)


# === Updates ===


def bootstrap_now(target: Agent, rb: ReplayBuffer, rows: dict, count: int, td_steps: int) -> dict:
    """Sampled rows (K + n + 1, B) whose first `count` columns are bootstrapped from the target network's values now.

    These are the values n steps after k = 0 ... K, or of the closing row, if the episode is over by then.
    """
    slots, envs, kinds = rows["slots"][:count], rows["envs"][:count], rows["kind"][:, :count]
    steps = torch.arange(len(kinds), device=kinds.device)[:, None]
    closing_row = torch.where(kinds != STEP, steps, len(kinds)).amin(0)
    index = torch.minimum(steps[td_steps:], closing_row)  # (K + 1, count)
    obs = rb.observations(slots + index, envs)
    with torch.no_grad():
        _, _, values_now = target.initial(obs.flatten(0, 1))
    value = rows["value"].clone()
    value[:, :count].scatter_(0, index, values_now.view_as(index))
    return rows | {"value": value}


def average(tensors: list[torch.Tensor]) -> None:
    """Under torchrun each becomes its mean over all processes; a process on its own leaves them alone."""
    if dist.is_initialized():
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        dist.all_reduce(flat)
        means = (flat / dist.get_world_size()).split([tensor.numel() for tensor in tensors])
        for tensor, mean in zip(tensors, means, strict=True):
            tensor.copy_(mean.view_as(tensor))


def update(agent: Agent, optimizer, rb: ReplayBuffer, rows: dict, random_actions, args: Args, losses_fn) -> dict:
    """One update on sampled rows (K + n + 1, B), then the priorities of their first steps. No host sync.

    Past the end of an episode the actions are random_actions (K, B) or (K, B, D). Returns detached scalars.
    """
    targets = make_targets(rows, args.unroll_steps, args.td_steps, args.discount)
    goes_on = targets["policy_mask"][:-1].view(*random_actions.shape[:2], *[1] * (random_actions.dim() - 2))
    actions = torch.where(goes_on, rows["action"][: args.unroll_steps].to(random_actions.dtype), random_actions)
    obs = rb.observations(rows["slots"], rows["envs"])
    if args.consistency_scale:
        steps = torch.arange(1, len(actions) + 1, device=actions.device)[:, None]
        targets["obs"] = rb.observations(rows["slots"] + steps, rows["envs"])
    optimizer.zero_grad(set_to_none=True)
    loss, metrics, values = losses_fn(agent, obs, actions, targets, rows["weights"], args)
    loss.backward()
    average([parameter.grad for parameter in agent.parameters()])
    metrics["grad_norm/agent"] = nn.utils.clip_grad_norm_(agent.parameters(), args.max_grad_norm)
    optimizer.step()
    if rb.alpha > 0:
        rb.set_priority(rows["slots"], rows["envs"], values - targets["returns"][0])
    return metrics


def set_learning_rate(optimizer: torch.optim.Optimizer, global_step: int, args: Args) -> None:
    """learning_rate decay^(t / T), t of the run's T environment steps (deviation 3)."""
    for group in optimizer.param_groups:
        group["lr"] = args.learning_rate * args.learning_rate_decay ** min(1, global_step / args.total_timesteps)


def updates_due(global_step: int, args: Args) -> int:
    """Updates of a run up to this step: tied to environment steps, whatever the number of envs.

    Those that fall due before a row can be drawn, or, after a resume without a replay, before it holds learning_starts
    steps again, are not made up for.
    """
    return max(0, int((global_step - args.learning_starts) * args.replay_ratio))


# === Replay buffer ===


class ReplayBuffer:
    """Sequences as they were played: a ring of rows (capacity, N) for each of N environments, on the device.

    A row is a step: observation, and numbers: action, its reward, legal actions, and of the search policy, root value
    and candidates. A closing row follows the last step of an episode: the final observation and its value, `kind`
    TERMINATED or TRUNCATED. Steps are drawn by priority, as soon as the K + n rows after them exist or their episode is
    closed. Of stacked frames each is stored once; `age`, steps since the episode began, tells how far back they go.
    """

    def __init__(self, envs, agent: Agent, args: Args, device: torch.device):
        space, A, D = envs.single_observation_space, agent.num_actions, agent.action_dim
        self.num_envs, self.stack = envs.num_envs, space.shape[0] if len(space.shape) == 4 else 1
        self.capacity = args.buffer_size // args.action_repeat // self.num_envs
        self.span = args.unroll_steps + args.td_steps + 1
        self.td_steps, self.discount, self.alpha = args.td_steps, args.discount, args.priority_alpha
        shapes = {"kind": (), "age": (), "reward": (), "value": (), "action": (D,) if D else ()}
        self.shapes = shapes | {"policy": (A,), "legal": (A,), "candidates": (A, D)}
        rows, widths = (self.capacity, self.num_envs), [math.prod(shape) for shape in self.shapes.values()]
        self.numbers = torch.zeros(*rows, sum(widths), device=device)  # of all columns but the observations
        parts = zip(self.shapes.items(), self.numbers.split(widths, -1), strict=True)
        self.data = {name: part.view(*rows, *shape) for (name, shape), part in parts}  # the same memory
        dtype = torch.uint8 if self.stack > 1 else torch.float32
        self.data["obs"] = torch.zeros(*rows, *space.shape[self.stack > 1 :], dtype=dtype, device=device)
        self.priority = torch.zeros(*rows, device=device)  # 0 = not to be drawn
        self.ends = np.zeros(self.num_envs, np.int64)  # rows ever written; row i lives in slot i % capacity
        self.ready = np.zeros(self.num_envs, np.int64)  # rows before this one have a priority
        self.age = np.zeros(self.num_envs, np.int64)

    def __len__(self) -> int:
        """Rows that can be drawn or soon will be."""
        return int(np.minimum(self.ends, self.capacity).sum())

    def add(self, rows: dict, envs: np.ndarray, closing: bool = False) -> None:
        """Appends one row to each of the environments `envs` (M,), of rows (N, ...); missing columns are 0.

        The numbers of a row go to the device together.
        """
        slots, index = self._places(self.ends[envs], envs)
        columns = {name: np.zeros((self.num_envs, *shape)) for name, shape in self.shapes.items()}
        columns |= rows | {"age": self.age}
        numbers = np.concatenate([host(columns[name]).reshape(self.num_envs, -1) for name in self.shapes], 1)
        self.numbers[slots, index] = torch.from_numpy(numbers[envs].astype(np.float32)).to(index.device)
        newest = rows["obs"][:, -1] if self.stack > 1 else rows["obs"]
        self.data["obs"][slots, index] = newest[index].to(self.data["obs"].dtype)
        for ahead in range(self.stack):  # the oldest rows have lost the frames before them
            self.priority[(slots + ahead) % self.capacity, index] = 0
        self.age[envs] = 0 if closing else self.age[envs] + 1
        self.ends[envs] += 1
        self._make_ready(envs, closing)

    def _places(self, rows: np.ndarray, envs: np.ndarray) -> torch.Tensor:
        """Slots and environments (2, M) on the device."""
        return torch.from_numpy(np.stack([rows % self.capacity, envs])).to(self.priority.device)

    def _make_ready(self, envs: np.ndarray, closing: bool) -> None:
        """First priorities, p = |nu - z|: search value minus return, of the steps whose targets are now complete."""
        limit = self.ends[envs] - (1 if closing else self.span - 1)  # all before the closing row; or K + n rows ago
        new = [np.arange(*pair) for pair in zip(self.ready[envs], limit, strict=True)]  # empty, unless ready < limit
        of = np.repeat(envs, [len(rows) for rows in new])
        self.ready[envs] = np.maximum(self.ready[envs], self.ends[envs] if closing else limit)
        if not len(of):
            return
        slots, index = self._places(np.concatenate(new), of)
        if self.alpha == 0:  # uniform replay
            self.priority[slots, index] = 1.0
        else:
            rows = self.window(slots, index, self.td_steps + 1)
            returns = n_step_returns(rows["reward"], rows["value"], rows["kind"], self.td_steps, self.discount)
            self.set_priority(slots, index, rows["value"][0] - returns[0])

    def set_priority(self, slots: torch.Tensor, envs: torch.Tensor, errors: torch.Tensor) -> None:
        """p = |error| + 0.001 of steps (M,) (deviation 10: the 0.001, and only for Atari)."""
        self.priority[slots, envs] = errors.abs() + 1e-3

    def window(self, slots: torch.Tensor, envs: torch.Tensor, length: int) -> dict[str, torch.Tensor]:
        """Copies of rows (L, B) from slots (B,) on, without observations; a closing row ends what belongs together."""
        index = (slots + torch.arange(length, device=slots.device)[:, None]) % self.capacity
        return {name: column[index, envs] for name, column in self.data.items() if name not in ("obs", "age")}

    def observations(self, slots: torch.Tensor, envs: torch.Tensor) -> torch.Tensor:
        """Copies (*slots.shape, ...), slots modulo the capacity; frames stacked, the first of an episode repeated."""
        slots, envs = slots % self.capacity, envs.expand_as(slots)
        if self.stack == 1:
            return self.data["obs"][slots, envs]
        back = torch.arange(self.stack - 1, -1, -1, device=slots.device)
        back = torch.minimum(back, self.data["age"][slots, envs].long()[..., None])
        return self.data["obs"][(slots[..., None] - back) % self.capacity, envs[..., None]]

    def sample(self, batch_size: int, beta: float, generator: torch.Generator) -> dict[str, torch.Tensor]:
        """Sequences (K + n + 1, B) drawn with P ~ p^alpha, and weights (B,) ~ P^-beta, the largest of them 1."""
        chances = torch.where(self.priority > 0, self.priority**self.alpha, 0).flatten()
        cdf = chances.double().cumsum(0)
        u = torch.rand(batch_size, generator=generator, device=cdf.device, dtype=torch.float64)
        drawn = torch.searchsorted(cdf, u * cdf[-1], right=True).clamp(max=len(cdf) - 1)
        slots, envs = drawn // self.num_envs, drawn % self.num_envs
        weights = chances[drawn] ** -beta
        largest = weights.amax()
        if dist.is_initialized():  # torchrun: P in the joint batch, of which each replay gives as much
            weights, largest = weights * cdf[-1] ** beta, largest * cdf[-1] ** beta
            dist.all_reduce(largest, dist.ReduceOp.MAX)
        return self.window(slots, envs, self.span) | {"slots": slots, "envs": envs, "weights": weights / largest}

    def state_dict(self) -> dict:
        """The filled part; through NumPy, because torch would save the whole storage behind a slice."""
        filled = min(int(self.ends.max()), self.capacity)
        tensors = self.data | {"priority": self.priority}
        arrays = {name: np.ascontiguousarray(tensor[:filled].cpu().numpy()) for name, tensor in tensors.items()}
        data = {name: torch.from_numpy(array) for name, array in arrays.items()}
        return {"data": data} | {name: getattr(self, name).tolist() for name in ("ends", "ready", "age")}

    def load_state_dict(self, state: dict) -> None:
        tensors = self.data | {"priority": self.priority}
        for name, tensor in state["data"].items():
            tensors[name][: len(tensor)] = tensor.to(self.priority.device)
        self.ends, self.ready, self.age = (np.array(state[name], np.int64) for name in ("ends", "ready", "age"))


# === Training ===


def main(args: Args) -> str:
    if args.play is not None:
        return play_against(args)
    whole = with_task_defaults(args)
    check_args(whole)
    args = join_ranks(whole, "num_envs batch_size buffer_size learning_starts")
    device = choose_device(args)
    if device.type == "cpu":
        torch.set_num_threads(1)  # many small operations: more threads only wait for each other
    if args.evaluate is not None:
        return evaluate_run(args)
    checkpoint = load_checkpoint(args.resume, args) if args.resume is not None else None
    if args.env_id not in BOARD_GAMES:
        rehearse(functools.partial(make_vector_env, args, 1), args.capture_video, True)  # masks of actions are obeyed
    envs = make_vector_env(args, args.num_envs, opening_moves=args.opening_moves)
    for check in (check_memory, check_effects, check_support):
        check(args, envs)
    compile_search()
    run = (RankedRun if dist.is_initialized() else Run)(whole, checkpoint)
    # what a checkpoint holds: networks, optimizer, replay, counters, generators
    agent = with_attributes(make_agent(envs, args).to(device))
    target, optimizer = deepcopy(agent).requires_grad_(False), make_optimizer(agent, args)
    rb = ReplayBuffer(envs, agent, args, device)
    counters = {"num_updates": 0, "owed": 0}
    rng = {name: np.random.default_rng([args.seed, i]) for i, name in enumerate(("reset", "act"))}
    rng |= {name: make_generator(device, args.seed, i) for i, name in enumerate(("replay", "update", "candidates"), 2)}
    steps = whole.num_envs * args.action_repeat  # of environments in one turn of the loop
    num_reanalyzed = math.ceil(args.reanalyze_ratio * args.batch_size)  # the first ones of a batch
    num_revalued = args.batch_size if args.bootstrap == "target" else num_reanalyzed  # deviation 8: target network now
    dones, moves, eval_envs = np.ones(args.num_envs, bool), np.zeros(args.num_envs, np.int64), None
    allowed = np.ones((args.num_envs, agent.num_actions), bool)

    def open_episodes() -> dict:
        """Rows that close the episodes being played as truncated: a simulator cannot be saved."""
        return {} if dones.all() else closing_rows(agent, obs, ~dones, np.zeros_like(dones), device)

    parts = {"agent": agent, "target": target, "optimizer": optimizer}
    parts |= {"replay": rb, "open_episodes": SimpleNamespace(state_dict=open_episodes)} if args.save_buffer else {}
    run.keep(parts | {"counters": counters}, rng)
    envs.on_fault = run.abort
    if checkpoint:
        counters |= checkpoint["parts"]["counters"]
        if rows := checkpoint["parts"].get("open_episodes"):
            rb.add(rows | {"obs": rows["obs"].to(device)}, np.flatnonzero(rows["kind"]), closing=True)
        counters["owed"] *= args.save_buffer  # there is nothing to learn from yet
        checkpoint = rows = None  # what refers to the file keeps it on the disk
    step_fn, losses_fn = executables(args)
    size = f"{agent.num_actions} actions, {sum(p.numel() for p in agent.parameters()):,} parameters"
    run.say(f"{run.folder}: {device}, {size}, {args.search} search")

    while True:
        while counters["owed"] and not run.tick(f"update {counters['num_updates'] + 1}"):  # deviation 11: acting waits
            rows = rb.sample(args.batch_size, PRIORITY_BETA, rng["replay"])
            if num_reanalyzed:
                rows = reanalyze(target, rb, rows, num_reanalyzed, args, step_fn, rng["candidates"])
            if num_revalued:
                rows = bootstrap_now(target, rb, rows, num_revalued, args.td_steps)
            actions = agent.random_actions((args.unroll_steps, args.batch_size), rng["update"])
            set_learning_rate(optimizer, run.step, args)
            run.metrics = update(agent, optimizer, rb, rows, actions, args, losses_fn)
            counters["num_updates"] += 1
            counters["owed"] -= 1
            if counters["num_updates"] % args.target_network_frequency == 0:
                target.load_state_dict(agent.state_dict())
            if counters["num_updates"] % 100 == 0:
                run.report()
                if (clipped := run.metrics["losses/clipped_targets"]) > 0:
                    run.say(f"{clipped:.1%} of the targets lie beyond --support-size {args.support_size}")
        if run.eval_due(dones):
            eval_envs = evaluate_and_log(agent, eval_envs, run, step_fn)
        if not run.goes_on(dones):
            break
        if dones.any():
            seeds = rng["reset"].integers(2**31, size=args.num_envs).tolist()
            obs, infos = envs.reset(seed=seeds, options={"reset_mask": dones})
            allowed = legal_actions(infos, allowed)
            moves[dones] = 0
        noise, temperature = draw_noise(allowed, args, rng["act"]), temperature_of(moves, run.step, args)
        obs, draws = torch.as_tensor(obs, device=device), agent.draws(args.num_envs, args, rng["candidates"])
        result = act(agent, obs, allowed, noise, temperature, args, step_fn, draws)
        require_finite({"the search's value": result.value.sum(), "its policy": result.policy.sum()}, run.step)
        next_obs, rewards, terminations, truncations, infos = envs.step(result.action.numpy())
        found = {name: getattr(result, name) for name in ("action", "policy", "value", "candidates")}
        rb.add(found | {"obs": obs, "legal": allowed, "reward": rewards}, np.arange(args.num_envs))
        obs, dones, allowed = next_obs, terminations | truncations, legal_actions(infos, allowed)
        moves += 1
        run.step += steps
        run.progress.update(steps)
        if dones.any():
            rb.add(closing_rows(agent, obs, dones, terminations, device), np.flatnonzero(dones), closing=True)
            run.log_episodes(infos, dones)
        filled = rb.ready.any() and len(rb) * args.action_repeat >= args.learning_starts
        average([ready := torch.tensor(float(filled))])  # all make the same updates, once each has what to learn from
        if ready == 1:
            counters["owed"] += updates_due(run.step, whole) - updates_due(run.step - steps, whole)

    envs.close()
    if eval_envs is not None:
        eval_envs.close()
    return run.close(agent.state_dict())


# === Environment ===


LATE_IMPORTS = ["matplotlib"]  # packages that are imported where they are used

# Settings by task (name of the environment without its version). A flag on the command line wins.
# Deviation 6, small c_scale: with two actions the rescaled Q are 0 and 1 however near they are (CartPole); on a board
# Q is mapped from [-1, 1] to [0, 1], so 0.25 means 0.125 for Q itself.
DEFAULTS = {
    "total_timesteps": 200_000, "num_envs": 16, "buffer_size": 50_000, "replay_ratio": 0.25, "batch_size": 128,
    "learning_rate": 1e-3, "gamma": 0.997, "td_steps": 20, "bootstrap": "target", "support_size": 300,
    "hidden_size": 64, "num_blocks": 1, "num_simulations": 16, "c_scale": 0.1, "dirichlet_alpha": 0.25,
    "opening_moves": 0, "temperature_steps": (50_000, 100_000), "priority_alpha": 0.0,  # deviation 10: uniform
    "two_player": False, "action_repeat": 1, "reanalyze_ratio": 0.0, "consistency_scale": 0.0,
    "entropy_scale": 0.05, "q_floor": 0.0, "learning_rate_decay": 1.0, "learning_starts": 1_000,
}  # fmt: skip
BOARD = {
    "num_envs": 64, "learning_rate": 3e-3, "gamma": 1.0, "support_size": 1, "c_scale": 0.25, "bootstrap": "search",
    "dirichlet_alpha": 1.0, "temperature_steps": (10**9, 10**9), "two_player": True, "td_steps": 42,
    "buffer_size": 100_000, "hidden_size": 32, "num_simulations": 32, "opening_moves": 6, "temperature_moves": 12,
    "learning_rate_decay": 0.1, "replay_ratio": 0.1,
}  # fmt: skip
TASKS = {
    "CartPole": {
        "total_timesteps": 40_000, "buffer_size": 40_000, "support_size": 20, "c_scale": 0.03,
        "temperature_steps": (10_000, 20_000),
    },
    # pushing at random reaches the goal in 2 % of the episodes, in steps of four in 63 %
    "Acrobot": {"total_timesteps": 40_000, "action_repeat": 4, "gamma": 0.99, "support_size": 20},
    # and the one of MountainCar in 0 of 400 in steps of four, in 1.5 % in steps of eight
    "MountainCar": {"total_timesteps": 60_000, "action_repeat": 8, "gamma": 0.98, "support_size": 20},
    "Pendulum": {
        "total_timesteps": 20_000, "num_envs": 8, "gamma": 0.99, "td_steps": 5, "support_size": 41, "replay_ratio": 0.5,
        "consistency_scale": 2.0,
    },
    # Gamma 0.99: after a step of the model values are 2 to 3 off, and a step is worth 1; 0.95: 1 off. A run that had
    # delivered nobody when learning began never did, and of 100 untrained episodes 11 deliver.
    "Taxi": {
        "total_timesteps": 100_000, "learning_starts": 20_000, "gamma": 0.95, "td_steps": 5, "support_size": 10,
        "q_floor": 0.1, "consistency_scale": 2.0,
    },
    "cartpole-swingup": {"action_repeat": 4, "gamma": 0.98, "reanalyze_ratio": 0.0},
    **dict.fromkeys(
        ("cup-catch", "reacher-easy"),
        {"action_repeat": 4, "gamma": 0.98, "replay_ratio": 0.25, "reanalyze_ratio": 0.0},
    ),
    "LunarLander": {"action_repeat": 4, "gamma": 0.99, "support_size": 30, "num_simulations": 25},
    "tictactoe": {"num_simulations": 25, "temperature_moves": 6},
}  # fmt: skip
ATARI = {  # deviation 12: EfficientZero's
    "total_timesteps": 500_000, "buffer_size": 100_000, "batch_size": 256, "td_steps": 5, "num_simulations": 50,
    "learning_rate": 5e-4, "dirichlet_alpha": 0.3, "temperature_steps": (250_000, 375_000),
    "priority_alpha": 1.0, "max_episode_steps": 27_000,  # 30 minutes of play
}  # fmt: skip
DM_CONTROL = {
    "total_timesteps": 100_000, "num_envs": 8, "buffer_size": 100_000, "action_repeat": 2, "gamma": 0.994,
    "td_steps": 5, "support_size": 18, "replay_ratio": 0.5, "hidden_size": 128, "reanalyze_ratio": 0.1,
    "consistency_scale": 2.0,
}  # fmt: skip
# Largest |reward| of a step, where it is known.
MAX_REWARD = {"CartPole": 1.0, "Acrobot": 1.0, "MountainCar": 1.0, "Pendulum": 16.28}
BOARD_GAMES = {"tictactoe": (3, 3, 3, False), "connect_four": (6, 7, 4, True)}  # rows, columns, in a row, gravity


def task_name(env_id: str) -> str:
    """my_module:MyNamespace/MyEnv-v0 -> MyEnv."""
    return re.sub(r"-v\d+$", "", re.split("[:/]", env_id)[-1])


def is_dm_control(env_id: str) -> bool:
    """Gymnasium ids end in a version (-v0) or name a module (my_module:MyEnv); dm_control tasks do neither."""
    return re.search(r":|-v\d+$", env_id) is None


def with_task_defaults(args: Args) -> Args:
    """The settings in force: what was not given is filled in from TASKS."""
    env_id = re.sub(r"^dm_control/(.+)-v0$|^ale_py:", r"\1", args.env_id)  # what Shimmy calls a task; ALE's own module
    args = replace(args, env_id=env_id)
    game, atari = BOARD_GAMES.get(args.env_id), args.env_id.startswith("ALE/")
    kind = BOARD if game else ATARI if atari else DM_CONTROL if is_dm_control(args.env_id) else {}
    if game and not callable(game):
        kind = kind | {"td_steps": math.prod(game[:2])}  # as many moves as a game may have: returns end in its result
    name = re.sub("^ball-in-cup-", "cup-", args.env_id.replace("_", "-")) if kind is DM_CONTROL else args.env_id
    task = DEFAULTS | kind | TASKS.get(task_name(name), {})
    return replace(args, **{name: value for name, value in task.items() if getattr(args, name) is None})


def make_env(args: Args, video: str | None = None) -> Callable[[], gym.Env]:
    """Thunk of one environment: observations (D,) float32, or the last four frames (4, 96, 96, 3) uint8."""

    def thunk() -> gym.Env:
        os.environ.setdefault("MUJOCO_GL", "egl" if args.capture_video else "disable")
        if is_dm_control(args.env_id):
            if games := difflib.get_close_matches(args.env_id, BOARD_GAMES):
                fail(f"unknown game {args.env_id!r}, close: {', '.join(games)}")
            try:
                env = DMControl(args.env_id)
            except ImportError as error:
                package = "pip install dm_control==1.0.50 'mujoco>=3.17,<4' (from Python 3.13 on with --no-deps)"
                fail(f"{args.env_id} needs {package} ({error})")
        else:
            env = make_frames(args.env_id, **({"render_mode": "rgb_array"} if video else {}))
        limits = filter(None, (args.max_episode_steps, env.spec and env.spec.max_episode_steps))
        env = gym.wrappers.TimeLimit(env, min(limits, default=1_000))
        env = gym.wrappers.RecordEpisodeStatistics(CheckedEnv(env, masks=True))
        env = RepeatedAction(Film(env, video) if video else env, args.action_repeat)
        return fit_spaces(env, args.env_id)

    return thunk


def fit_spaces(env: gym.Env, env_id: str) -> gym.Env:
    """Observations as stacks of four 96x96 frames, grids (C, h, w) or float32 vectors, continuous actions in [-1, 1].

    What MuZero cannot use is refused.
    """
    obs, action = env.observation_space, env.action_space
    is_box, vector = (isinstance(space, gym.spaces.Box) for space in (obs, action))
    if vector and len(action.shape) == 1 and action.is_bounded("both") and len(obs.shape or (1,)) == 1:
        low, high, kind = action.low.astype(float), action.high.astype(float), action.dtype
        space = gym.spaces.Box(-1, 1, action.shape, np.float32)
        rounded = np.rint if kind.kind in "iu" else np.asarray
        env = gym.wrappers.TransformAction(env, lambda a: rounded(low + (a + 1) / 2 * (high - low)).astype(kind), space)
    elif not (isinstance(action, gym.spaces.Discrete) and action.start == 0):
        fail(f"{env_id}: actions must be Discrete starting at 0, or with vectors a bounded vector Box, not {action}")
    if is_box and len(obs.shape) == 3 and max(obs.shape[:2]) <= 24:  # a grid
        space = gym.spaces.Box(-np.inf, np.inf, (obs.shape[2], *obs.shape[:2]), np.float32)
        return gym.wrappers.TransformObservation(env, lambda o: np.moveaxis(o, -1, 0).astype(np.float32), space)
    if is_box and obs.dtype == np.uint8 and len(obs.shape) == 3 and obs.shape[-1] == 3:
        if obs.shape[:2] != (96, 96):
            env = gym.wrappers.ResizeObservation(env, (96, 96))
        return gym.wrappers.FrameStackObservation(env, 4, padding_type="reset")
    if not obs.is_np_flattenable or is_box and len(obs.shape) > 2:
        fail(f"{env_id}: observations must be images (H, W, 3) of uint8, grids or what can be flattened, not {obs}")
    if not (is_box and len(obs.shape) == 1):
        env = gym.wrappers.FlattenObservation(env)
    unbounded = gym.spaces.Box(-np.inf, np.inf, env.observation_space.shape, np.float32)
    return gym.wrappers.TransformObservation(env, lambda o: np.asarray(o, np.float32), unbounded)


def make_vector_env(args: Args, num_envs: int, video: str | None = None, opening_moves: int = 0):
    """The task's environments, too quick for processes of their own; the caller resets them, each with a seed."""
    if args.env_id in BOARD_GAMES:
        game = BOARD_GAMES[args.env_id]
        return game(num_envs, opening_moves) if callable(game) else BoardGame(args.env_id, num_envs, opening_moves)
    thunks = [make_env(args, video if i == 0 else None) for i in range(num_envs)]
    return side_by_side(args.env_id, thunks, workers=False)


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
    """A Gymnasium environment; Atari games with the usual preprocessing, in colour, without sticky actions."""
    if not env_id.startswith("ALE/"):
        refuse_old_game(env_id)
        return make_gymnasium(env_id, **settings)
    try:
        import ale_py
    except ImportError:
        fail(f"{env_id} needs its simulator: pip install ale_py")
    gym.register_envs(ale_py)
    env = make_gymnasium(env_id, frameskip=1, repeat_action_probability=0.0, **settings)  # as in the published results
    return gym.wrappers.AtariPreprocessing(env, noop_max=30, frame_skip=4, screen_size=96, grayscale_obs=False)


def legal_actions(infos: dict, legal: np.ndarray) -> np.ndarray:
    """Actions allowed now, (N, A) bool: masks that a reset or step hands out, for the other environments `legal`."""
    if "action_mask" not in infos:
        return legal
    return np.where(infos["_action_mask"][:, None], infos["action_mask"] != 0, legal)


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


class RepeatedAction(gym.Wrapper):
    """Repeats each action, sums the rewards, stops at the end of the episode or where a mask forbids the action."""

    def __init__(self, env: gym.Env, repeat: int):
        super().__init__(env)
        self.repeat = repeat

    def step(self, action):
        total, info = 0.0, {}
        for _ in range(self.repeat):
            obs, reward, terminated, truncated, latest = self.env.step(action)
            total, info = total + reward, info | latest
            mask = info.get("action_mask")
            if terminated or truncated or mask is not None and not mask[action]:
                break
        return obs, total, terminated, truncated, info


def conv(in_channels: int, out_channels: int, kernel: int = 3, stride: int = 1) -> nn.Sequential:
    """Convolution and group norm of one group, which knows no batch (deviation 3: no batch norm)."""
    layer = nn.Conv2d(in_channels, out_channels, kernel, stride, kernel // 2, bias=False)
    return nn.Sequential(layer, nn.GroupNorm(1, out_channels))


class ResidualBlock(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv1, self.conv2 = conv(channels, channels), conv(channels, channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(x + self.conv2(F.relu(self.conv1(x))))


class ConvNetwork(nn.Module):
    """VectorNetwork for images and grids; the latent state is (B, C, h, w): 6 x 6, or as large as the grid or board."""

    def __init__(self, obs_shape: tuple, action_planes: torch.Tensor, num_bins: int, channels: int, num_blocks: int):
        super().__init__()
        num_actions, num_planes, height, width = action_planes.shape
        self.register_buffer("action_planes", action_planes.clone())
        self.image = len(obs_shape) == 4  # (4, 96, 96, 3)

        def blocks() -> list[nn.Module]:
            return [ResidualBlock(channels) for _ in range(num_blocks)]

        def head() -> nn.Sequential:
            reduced = conv(channels, 16, 1), nn.ReLU(), nn.Flatten()
            return nn.Sequential(*reduced, nn.Linear(16 * height * width, 64), nn.ReLU())

        if self.image:  # deviation 7: four frames, no actions
            half = math.ceil(channels / 2)
            self.encoder = nn.Sequential(
                conv(obs_shape[0] * obs_shape[3], half, stride=2), nn.ReLU(), ResidualBlock(half),  # 48 x 48
                conv(half, channels, stride=2), nn.ReLU(), *blocks(),  # 24 x 24
                nn.AvgPool2d(2), *blocks(),  # 12 x 12
                nn.AvgPool2d(2), *blocks(),  # 6 x 6
            )  # fmt: skip
        else:
            self.encoder = nn.Sequential(conv(obs_shape[0], channels), nn.ReLU(), *blocks())
        self.dynamics_in = conv(channels + num_planes, channels)
        self.dynamics_blocks = nn.Sequential(*blocks())
        self.reward_head, self.head = head(), head()
        self.reward, self.policy_value = nn.Linear(64, num_bins), nn.Linear(64, num_actions + num_bins)
        self.latent_size, self.outputs = channels * height * width, (num_actions, num_bins)

    def represent(self, obs: torch.Tensor) -> torch.Tensor:
        """Frames (B, 4, H, W, 3) of uint8, or grids (B, C, h, w) -> latent state."""
        obs = obs.float()
        if self.image:
            obs = obs.movedim(-1, 2).flatten(1, 2) / 255
        return scale_latent(self.encoder(obs))

    def dynamics(self, latent: torch.Tensor, action: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Next latent state and reward logits (B, bins)."""
        x = self.dynamics_in(torch.cat([latent, self.action_planes[action]], 1))
        latent = scale_latent(self.dynamics_blocks(F.relu(x + latent)))
        return latent, self.reward(self.reward_head(latent))

    def predict(self, latent: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Policy logits (B, A) and value logits (B, bins)."""
        return self.policy_value(self.head(latent)).split(self.outputs, -1)


class SampledAgent(Agent):
    """Continuous actions (Sampled MuZero): an action is a = tanh(u), u normal; a policy is what `gaussian` takes.

    A search knows num_actions candidates u at each node, by number. They stand behind the node's latent state, and
    their prior is log pi - log beta, if they were drawn from beta.
    """

    def __init__(self, network: nn.Module, num_actions: int, args: Args, action_dim: int):
        super().__init__(network, num_actions, args)
        self.action_dim = action_dim
        self.num_narrow = num_actions - int(num_actions * WIDE_SHARE)  # candidates of a root that are not WIDE
        nodes, weights = np.polynomial.hermite_e.hermegauss(32)
        quadrature = torch.tensor(np.stack([nodes, weights / weights.sum()]), dtype=torch.float32)
        self.register_buffer("quadrature", quadrature, persistent=False)  # see entropy

    def offer(self, latent: torch.Tensor, policy: torch.Tensor, noise: torch.Tensor, prior: torch.Tensor):
        """Candidates u = mu + sigma noise, noise (B, K, D), behind latent states (B, D'); |tanh u| < 0.999."""
        mu, sigma = gaussian(policy)
        candidates = (mu[:, None] + sigma[:, None] * noise).clamp(-3.8, 3.8)
        return torch.cat([latent, candidates.flatten(1)], 1), prior

    def split(self, latent: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What `offer` has joined: latent states (B, D') and candidates u (B, K, D)."""
        size = self.num_actions * self.action_dim
        return latent[:, :-size], latent[:, -size:].unflatten(1, (self.num_actions, self.action_dim))

    def chosen(self, latent: torch.Tensor, action: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        latent, candidates = self.split(latent)
        return latent, candidates[torch.arange(len(action), device=action.device), action].tanh()

    def draws(self, batch: int, args: Args, generator: torch.Generator, greedy: bool = False) -> list[tuple]:
        """Noise (B, K, D) and logits of the prior (B, K) for the root of a search and for each simulation.

        The last of a root's candidates have WIDE sigma (deviation 13). Greedily none has, and the first is the mode.
        """
        device, K = generator.device, self.num_actions
        noise = torch.randn(args.num_simulations + 1, batch, K, self.action_dim, generator=generator, device=device)
        inner = torch.zeros(batch, K, device=device)
        inner[:, args.inner_candidates :] = -torch.inf
        if greedy:
            noise[0, :, 0] = 0
        else:
            noise[0, :, self.num_narrow :] *= WIDE
        root = torch.zeros_like(inner) if greedy else candidate_logits(noise[0], 1 - self.num_narrow / K)
        return [(noise[0], root), *((x, inner) for x in noise[1:])]

    def played(self, latent: torch.Tensor, result: SearchResult) -> SearchResult:
        candidates = self.split(latent)[1].cpu()
        action = candidates[torch.arange(len(candidates)), result.action].tanh()
        return result._replace(action=action, candidates=candidates)

    def random_actions(self, shape: tuple, generator: torch.Generator) -> torch.Tensor:
        """Actions (*shape, D), uniformly."""
        return 2 * torch.rand(*shape, self.action_dim, generator=generator, device=generator.device) - 1

    def log_policy(self, policy: torch.Tensor, candidates: torch.Tensor) -> torch.Tensor:
        """log pi (..., K) of candidates u (..., K, D): sum over d of log N(u; mu, sigma) - ln(1 - tanh(u)^2)."""
        mu, sigma = (x.unsqueeze(-2) for x in gaussian(policy))
        normal = -0.5 * ((candidates - mu) / sigma) ** 2 - sigma.log() - 0.5 * math.log(2 * math.pi)
        return (normal - log_slope(candidates)).sum(-1)

    def entropy(self, policy: torch.Tensor) -> torch.Tensor:
        """Entropy (...) of actions tanh(u): sum over d of ln(2 pi e sigma^2) / 2 + E ln(1 - tanh(u)^2)."""
        mu, sigma = gaussian(policy)
        slopes = log_slope(mu[..., None] + sigma[..., None] * self.quadrature[0]) @ self.quadrature[1]
        return (0.5 + 0.5 * math.log(2 * math.pi) + sigma.log() + slopes).sum(-1)

    def entropy_terms(self, policy: torch.Tensor, targets: dict) -> tuple[torch.Tensor, dict]:
        """Entropies of policies (K + 1, B, 2 D), and what is logged of those at k = 0."""
        entropies, sigma = self.entropy(policy) * targets["policy_mask"], gaussian(policy[0])[1]
        wide = targets["policies"][0, :, self.num_narrow :].sum(-1)  # weight of the wide candidates
        return entropies, {"entropy": entropies[0].mean(), "sigma": sigma.mean(), "wide_share": wide.mean()}


def gaussian(policy: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and deviation (..., D) of u, 0 and 1.4 at first, from the network's (..., 2 D) (deviation 13: bounds)."""
    mu, sigma = policy.chunk(2, -1)
    return 5 * torch.tanh(mu / 5), F.softplus(sigma + 1) + 0.1


def candidate_logits(noise: torch.Tensor, share: float) -> torch.Tensor:
    """log pi - log beta (...) of candidates u = mu + sigma noise, noise (..., D), but for a constant.

    beta is pi, a `share` of it with WIDE sigma; mu, sigma and the slope of tanh cancel.
    """
    log_pi = -0.5 * (noise**2).sum(-1)
    log_wide = -0.5 * ((noise / WIDE) ** 2).sum(-1) - noise.shape[-1] * math.log(WIDE)
    return log_pi - torch.logaddexp(log_pi + math.log(1 - share), log_wide + math.log(share))


def log_slope(u: torch.Tensor) -> torch.Tensor:
    """ln(1 - tanh(u)^2), the logarithm of the slope of tanh."""
    return 2 * (math.log(2) - u - F.softplus(-2 * u))


def make_optimizer(agent: Agent, args: Args) -> torch.optim.AdamW:
    """AdamW (deviation 3: not SGD); only matrices and kernels decay."""
    groups = [
        {"params": [p for p in agent.parameters() if p.dim() > 1], "weight_decay": args.weight_decay},
        {"params": [p for p in agent.parameters() if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, args.learning_rate, fused=True)


@torch.no_grad()
def closing_rows(agent: Agent, obs: np.ndarray, dones: np.ndarray, terminations: np.ndarray, device) -> dict:
    """Replay rows (N, ...) that close episodes: final observations, and their values where they are not terminal."""
    obs = torch.as_tensor(obs, device=device)
    value = agent.initial(obs)[2].cpu() * torch.from_numpy(~terminations)  # deviation 4: truncated, not over
    return {"obs": obs, "value": value, "kind": torch.from_numpy(np.where(terminations, TERMINATED, TRUNCATED) * dones)}


def reanalyze(target: Agent, rb: ReplayBuffer, rows: dict, count: int, args: Args, step_fn: Callable, rng) -> dict:
    """Sampled rows whose first `count` columns have policies of a search with the target network, without noise.

    It starts from the observations at k = 0 ... K; continuous actions have new candidates, by the generator rng.
    """
    slots, envs, length = rows["slots"][:count], rows["envs"][:count], args.unroll_steps + 1
    obs = rb.observations(slots + torch.arange(length, device=slots.device)[:, None], envs).flatten(0, 1)
    legal = rows["legal"][:length, :count].flatten(0, 1)
    found = [
        act(target, *inputs, None, None, args, step_fn, target.draws(len(inputs[0]), args, rng))
        for inputs in zip(obs.split(REANALYZED_AT_ONCE), legal.split(REANALYZED_AT_ONCE), strict=True)
    ]
    new = {name: rows[name].clone() for name in ("policy", "candidates")}
    for name, column in new.items():
        column[:length, :count] = torch.cat([getattr(x, name) for x in found]).unflatten(0, (length, count))
    return rows | new


def make_agent(envs, args: Args) -> Agent:
    """The networks that fit the environments' spaces."""
    shape, num_bins = envs.single_observation_space.shape, 2 * args.support_size + 1
    actions, units = envs.single_action_space, args.hidden_size
    if isinstance(actions, gym.spaces.Box):
        network = VectorNetwork(shape[0], 0, actions.shape[0], num_bins, units)
        return SampledAgent(network, args.num_candidates, args, actions.shape[0])
    num_actions = int(actions.n)
    if len(shape) == 1:
        network = VectorNetwork(shape[0], num_actions, 0, num_bins, units)
    else:
        size = (6, 6) if len(shape) == 4 else shape[1:]  # of the latent state: images, grids
        one_hot = torch.eye(num_actions)[:, :, None, None].expand(-1, -1, *size)  # a plane for each action
        planes = getattr(envs, "action_planes", one_hot)  # on a board: where the move is made
        network = ConvNetwork(shape, planes, num_bins, units, args.num_blocks)
    return Agent(network, num_actions, args)


def with_attributes(agent: Agent) -> Agent:
    """Submodules and parameters as ordinary attributes, too, which Python finds before torch's slow __getattr__.

    That is a fifth of a step with few roots. Only once the agent is on its device: .to() may replace parameters, and
    does replace buffers, which are left out. Not for torch.func.functional_call.
    """
    for module in agent.modules():
        vars(module).update(module._modules | module._parameters)
    return agent


class BoardGame:
    """N games of m-in-a-row side by side, with the calls of a vector environment that its caller resets.

    Observations (N, 2, R, C): stones of the player to move and of the other; row 0 is the top. An action is a cell, or
    with gravity a column. A winning move earns its mover 1, everything else 0; statistics count for the first player.
    A reset with seeds begins games after 0 to opening_moves random moves, after none if one of these wins: so begin
    18 % of the games of tic-tac-toe with up to 6 (by equal chances 14 %), half of those of connect four with up to 41.
    """

    def __init__(self, name: str, num_envs: int, opening_moves: int = 0):
        rows, columns, self.connect, self.gravity = BOARD_GAMES[name]
        self.name, self.num_envs, self.shape, self.opening_moves = name, num_envs, (rows, columns), opening_moves
        self.single_observation_space = gym.spaces.Box(0, 1, (2, rows, columns), np.float32)
        self.single_action_space = gym.spaces.Discrete(columns if self.gravity else rows * columns)
        lines = []
        for dy, dx in ((0, 1), (1, 0), (1, 1), (-1, 1)):
            for y, x in np.ndindex(rows, columns):
                last_y, last_x = y + (self.connect - 1) * dy, x + (self.connect - 1) * dx
                if 0 <= last_y < rows and last_x < columns:
                    lines.append([(y + i * dy) * columns + x + i * dx for i in range(self.connect)])
        self.lines = torch.zeros(rows * columns, len(lines))
        self.lines[torch.tensor(lines).T, torch.arange(len(lines))] = 1
        self.stones = torch.zeros(num_envs, 2, rows * columns)
        self.moves = torch.zeros(num_envs, dtype=torch.long)

    @property
    def action_planes(self) -> torch.Tensor:
        """How an action enters the model: (A, 1, R, C), one at its cell or in its column."""
        rows, columns = self.shape
        if self.gravity:
            return torch.eye(columns)[:, None, None].expand(-1, 1, rows, -1)
        return torch.eye(rows * columns).view(-1, 1, rows, columns)

    @property
    def legal(self) -> np.ndarray:
        """Moves that the rules allow, (N, A): empty cells, or columns with room."""
        empty = self.stones.sum(1) == 0
        return (empty[:, : self.shape[1]] if self.gravity else empty).numpy()

    def observe(self) -> tuple[np.ndarray, dict]:
        """The stones as the network sees them, (N, 2, R, C), and masks of actions as Gymnasium hands them out."""
        masks = {"action_mask": self.legal, "_action_mask": np.ones(self.num_envs, bool)}
        return self.stones.view(self.num_envs, 2, *self.shape).numpy().copy(), masks

    def __str__(self) -> str:
        """The first of the games, X begins; with the numbers of the moves that are left."""
        marks = "XO" if self.moves[0] % 2 == 0 else "OX"  # of the mover and of the other
        numbers = list(map(str, range(self.single_action_space.n)))
        cells = [marks[0] if mine else marks[1] if other else "." for mine, other in self.stones[0].T.tolist()]
        if not self.gravity:
            cells = [number if cell == "." else cell for cell, number in zip(cells, numbers, strict=True)]
        rows = np.reshape(cells, self.shape).tolist() + [numbers] * self.gravity
        return "\n".join(" ".join(f"{cell:>2}" for cell in row) for row in rows)

    def reset(self, seed: list[int] | None = None, options: dict | None = None) -> tuple[np.ndarray, dict]:
        """Begins the games of options["reset_mask"] (N,) anew, all of them without."""
        mask = options["reset_mask"] if options else np.ones(self.num_envs, bool)
        self.stones[mask], self.moves[mask] = 0, 0
        if self.opening_moves:
            rng = np.random.default_rng(seed)
            counts = rng.integers(self.opening_moves + 1, size=self.num_envs) * mask
            for i in range(self.opening_moves):
                games = np.flatnonzero(counts > i)
                over = games[self._place(games, random_player(self, games, rng)).numpy()]
                self.stones[over], self.moves[over], counts[over] = 0, 0, 0  # an opening that wins is taken back
        return self.observe()

    def step(self, actions: np.ndarray):
        """Places a stone on each board and turns it to the other player; actions (N,) must be legal."""
        wins = self._place(np.arange(self.num_envs), actions)
        terminations = wins | (self.moves == self.stones.shape[2])
        results = torch.where(wins, self.moves % 2 * 2.0 - 1, 0.0)  # the first player makes the odd moves
        # deviation 5, a reward on a board: the mover's, with the winning move
        (obs, infos), never = self.observe(), np.zeros(self.num_envs, bool)
        infos |= {"episode": {"r": results.numpy(), "l": self.moves.numpy().copy()}}
        return obs, wins.float().numpy(), terminations.numpy(), never, infos

    def _place(self, games: np.ndarray, actions: np.ndarray) -> torch.Tensor:
        """Makes a move in each of these games (M,); returns for each whether the move won it."""
        games, cells = torch.as_tensor(games), torch.as_tensor(actions)
        assert self.legal[games, cells].all()
        if self.gravity:
            heights = self.stones.sum(1).view(-1, *self.shape).sum(1)[games, cells].long()
            cells = (self.shape[0] - 1 - heights) * self.shape[1] + cells
        self.stones[games, 0, cells] = 1
        self.moves[games] += 1
        wins = (self.stones[games, 0] @ self.lines == self.connect).any(1)
        self.stones[games] = self.stones[games].flip(1)
        return wins

    def close(self) -> None:
        """Nothing to close; vector environments have it."""


def random_player(envs: BoardGame, games: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A legal move for each of these games (M,), uniformly."""
    return np.where(envs.legal[games], rng.random((len(games), envs.legal.shape[1])), -1).argmax(1)


# === Evaluation ===


def make_generator(device: torch.device, seed: int, stream: int) -> torch.Generator:
    """Random numbers that neither another seed nor another stream of this one has."""
    return torch.Generator(device).manual_seed(int(np.random.default_rng([seed, stream]).integers(2**63)))


def evaluate(agent, envs, args: Args, device, tick: Callable, step_fn=recurrent, opponent=None, longest=3_000):
    """Plays args.eval_episodes greedily, without noise, on seeds of its own: training does not notice.

    Board games are played against `opponent(envs, games, rng)`, from either seat in turn, or by the agent alone.
    Episodes end after `longest` decisions. tick(text) says whether to stop. Returns the agent's returns (episodes,) and
    the first episodes of the first ten environments, in a game with the moves of both: action, reward, value,
    depth (T,), policy (T, A) and candidates of the search, realized (T,), the discounted return from there on, and obs
    (T, ...) of the first 500 steps at most, of images of fewer.
    """
    rng, N = np.random.default_rng([args.seed, 99]), envs.num_envs
    generator = make_generator(device, args.seed, 99)
    quota = args.eval_episodes // N + (np.arange(N) < args.eval_episodes % N)  # by environment: short ones do not win
    returns, trajectories = [], {}
    searched = "action", "policy", "candidates", "value", "depth"
    tracks = {i: {name: [] for name in ("obs", "reward", *searched)} for i in range(min(N, 10))}  # first episodes
    dones, seat, legal = np.ones(N, bool), np.arange(N) % 2, np.ones((N, agent.num_actions), bool)
    lengths, sums = np.zeros((2, N))
    while quota.any() and not tick(f"evaluating, {len(returns)} of {args.eval_episodes}"):
        if dones.any():
            obs, infos = envs.reset(seed=rng.integers(2**31, size=N).tolist(), options={"reset_mask": dones})
            legal, lengths[dones], sums[dones] = legal_actions(infos, legal), 0, 0
        draws = agent.draws(N, args, generator, greedy=True)
        result = act(agent, torch.as_tensor(obs, device=device), legal, None, None, args, step_fn, draws)
        row = {name: getattr(result, name).numpy() for name in searched} | {"obs": obs}
        if opponent:
            theirs = np.flatnonzero(np.asarray(envs.moves) % 2 != seat)
            row["action"][theirs] = opponent(envs, theirs, rng)
        obs, row["reward"], terminations, truncations, infos = envs.step(row["action"])
        lengths, sums, legal = lengths + 1, sums + row["reward"], legal_actions(infos, legal)
        dones = terminations | truncations | (lengths >= longest)
        for i, track in tracks.items():
            for name, column in track.items():
                if name != "obs" or len(column) < np.clip(5e6 / obs[0].nbytes, 50, 500):
                    column.append(row[name][i].copy())
        for i in np.flatnonzero(dones).tolist():
            if i in tracks:
                track = {name: np.stack(column) for name, column in tracks.pop(i).items()}
                ahead = closing_rows(agent, obs[i : i + 1], dones[i : i + 1], terminations[i : i + 1], device)["value"]
                track["realized"] = discounted_sums(track["reward"], ahead.item(), args.discount)
                trajectories[i] = track
            if quota[i] > 0:
                quota[i] -= 1
                sign = 1 - 2 * seat[i] if args.two_player else 1
                over = terminations[i] or truncations[i]
                returns.append(float(infos["episode"]["r"][i] if over else sums[i]) * sign)
                seat[i] = 1 - seat[i]
    return np.array(returns), [trajectories[i] for i in sorted(trajectories)]


def evaluate_and_log(agent: Agent, envs, run: Run, step_fn: Callable):
    """An evaluation between updates; its environments, made for the first one, are returned for the next."""
    args = run.args
    if envs is None:
        video = run.picture("videos/evaluation.mp4") if args.capture_video else None
        envs = run.make_envs(make_vector_env, args, min(args.eval_episodes, 100), video)
        envs.on_fault = run.abort
    opponent = random_player if args.two_player else None
    tick = functools.partial(Run.tick, run)  # of this process alone
    returns, trajectories = evaluate(agent, envs, args, run.device, tick, step_fn, opponent)
    if opponent:  # what the values of self-play are about
        _, trajectories = evaluate(agent, envs, args, run.device, tick, step_fn)
    if not run.stop.requested:
        run.log_evaluation(returns)
        warn_of_failure(log_diagnostics, agent, trajectories, run)
    if not args.capture_video:
        return envs
    envs.close()  # which writes the film
    return None


def load_agent(envs, args: Args, checkpoint: dict) -> Agent:
    """The agent of a checkpoint, and its search."""
    check_memory(args, envs)
    agent = make_agent(envs, args)
    with must_fit(args.evaluate or args.play):
        agent.load_state_dict(checkpoint["parts"]["agent"])
    compile_search()
    return agent


def evaluate_run(args: Args) -> str:
    """Plays the agent of a run folder and prints its returns; with args.capture_video one episode is filmed."""
    checkpoint = load_checkpoint(args.evaluate, args)
    free = "evaluate eval_episodes search num_simulations capture_video cuda seed compile cudagraphs"
    refuse_changes(args, checkpoint, free)
    if args.cudagraphs > checkpoint["args"]["cudagraphs"] and choose_device(args).type != "cuda":
        fail("--cudagraphs needs a GPU")
    device, stop = choose_device(args), StopRequest()
    video = f"{args.evaluate}/videos/evaluate.mp4" if args.capture_video else None
    envs = make_vector_env(args, min(args.eval_episodes, 100), video)
    agent, opponent = load_agent(envs, args, checkpoint).to(device), random_player if args.two_player else None
    pace = {"mininterval": 0.1 if sys.stderr.isatty() else 30, "miniters": 0}
    Bar.stop, bar = stop, Bar(bar_format="{desc} [{elapsed}]", leave=False, **pace)

    def tick(doing: str) -> bool:
        bar.set_description_str(doing, refresh=False)
        bar.update(0)
        return bool(stop.requested)

    returns, _ = evaluate(agent, envs, args, device, tick, executables(args)[0], opponent, longest=math.inf)
    bar.close()
    envs.close()
    if not stop.requested:
        single = " ".join(f"{episodic_return:.1f}" for episodic_return in returns)
        print(f"{args.env_id} at step {checkpoint['global_step']}:")
        print(f"return {returns.mean():.1f} +- {returns.std():.1f} ({len(returns)} episodes: {single})")
    stop.exit()
    return args.evaluate


def play_against(args: Args) -> str:
    """A board game in the terminal against the agent of a run folder, whose searches show their visits."""
    args = replace(args, play=os.path.normpath(args.play.removesuffix("checkpoint.pt")))
    torch.set_num_threads(1)
    check_bounds(args)
    if args != Args(play=args.play, num_simulations=args.num_simulations):
        fail("--play takes --num-simulations and no other setting")
    checkpoint = load_checkpoint(args.play, args)
    saved = Args(**checkpoint["args"])
    args = replace(saved, num_simulations=args.num_simulations or saved.num_simulations, play=args.play)
    if not args.two_player:
        fail(f"{args.env_id} is no game of two players")
    game = make_vector_env(args, 1)
    agent = load_agent(game, args, checkpoint)
    obs, infos = game.reset()
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        begins = input("Do you begin (y/n)? ").strip().lower() == "y"
        for your_move in itertools.cycle([begins, not begins]):
            legal = legal_actions(infos, np.ones((1, agent.num_actions), bool))
            print(game)
            if your_move:
                moves = [str(a) for a in np.flatnonzero(legal[0])]
                while (move := input("your move: ").strip()) not in moves:
                    print("one of", *moves)
                action = int(move)
            else:
                result = act(agent, torch.as_tensor(obs), legal, None, None, args)
                action, visits = result.action.item(), result.visit_counts[0].long().tolist()
                counts = ", ".join(f"{a}: {n}" for a, n in enumerate(visits) if n)
                print(f"I play {action} (visits {counts}; my value {result.value.item():+.2f})")
            obs, rewards, terminations, _, infos = game.step(np.array([action]))
            if terminations[0]:
                print(game, ("you win" if your_move else "I win") if rewards[0] else "a draw", sep="\n")
                break
    return args.play


def discounted_sums(rewards: np.ndarray, last: float, d: float) -> np.ndarray:
    """G_t = r_t + d G_{t+1} (T,), from G_T = last."""
    sums = np.zeros(len(rewards), np.float32)
    for t in reversed(range(len(rewards))):
        sums[t] = last = rewards[t] + d * last
    return sums


@torch.no_grad()
def open_loop_errors(agent: Agent, trajectories: list[dict], length: int) -> dict[str, np.ndarray]:
    """Errors of the model k = 0 ... length steps after the last observation, mean over all starts that last so long.

    value: |value head - realized return|; policy: KL from the search's policy there, nats (continuous actions: from its
    weights to the density at its candidates, which may be negative); reward: |reward head - reward| of the step that
    led there (k >= 1).
    """
    device = next(agent.parameters()).device
    sums = {name: np.zeros(length + 1) for name in ("value", "policy", "reward")}
    counts = np.zeros(length + 1)
    for track in trajectories:
        T = len(track["action"])
        latent, logits, value = agent.initial(torch.as_tensor(track["obs"], device=device))
        for k in range(min(length + 1, T)):
            starts = min(len(track["obs"]), T - k)
            if k > 0:
                actions = torch.as_tensor(track["action"][k - 1 : k - 1 + starts], device=device)
                latent, reward_logits = agent.network.dynamics(latent[:starts], actions)
                logits, value_logits = agent.network.predict(latent)
                reward, value = (from_distribution(x, agent.bins) for x in (reward_logits, value_logits))
                sums["reward"][k] += np.abs(reward.cpu().numpy() - track["reward"][k - 1 : k - 1 + starts]).sum()
            policy, u = (torch.as_tensor(track[x][k : k + starts], device=device) for x in ("policy", "candidates"))
            divergence = torch.xlogy(policy, policy).sum(-1) - (policy * agent.log_policy(logits, u)).sum(-1)
            sums["policy"][k] += divergence.sum().item()
            sums["value"][k] += np.abs(value.cpu().numpy() - track["realized"][k : k + starts]).sum()
            counts[k] += starts
    return {name: total[counts > 0] / counts[counts > 0] for name, total in sums.items()}


def log_diagnostics(agent, trajectories: list[dict], run: Run) -> None:
    """Open-loop errors to twice the trained unroll, on evaluation episodes, and the search against what came true."""
    args = run.args
    errors = open_loop_errors(agent, trajectories, 2 * args.unroll_steps)
    for name, error in errors.items():
        for k in {0, 1, args.unroll_steps, 2 * args.unroll_steps}:
            if k < len(error) and not (name == "reward" and k == 0):
                run.log({f"open_loop/{name}_error_{k}": error[k]})
    bias = np.concatenate([track["value"] - track["realized"] for track in trajectories])
    run.log({"search/root_value_error": np.abs(bias).mean(), "search/root_value_bias": bias.mean()})
    run.log({"search/depth": np.concatenate([track["depth"] for track in trajectories]).mean()})
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3), layout="constrained")
    for axis, (name, error) in zip(figure.subplots(1, 3), errors.items(), strict=True):
        first = int(name == "reward")
        axis.plot(np.arange(first, len(error)), error[first:])
        axis.axvline(args.unroll_steps, color="0.8")  # trained up to here
        axis.set(xlabel="steps since the last observation", ylabel=f"{name} error", ylim=(0, None))
    figure.savefig(run.picture("open_loop_error.png"))


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


def check_args(args: Args) -> None:
    """Refuses what cannot work, in one line."""
    check_bounds(args)
    steps = args.num_envs * args.action_repeat
    rows = 2 * (args.unroll_steps + args.td_steps + 1) * steps
    if args.buffer_size < rows:
        fail(f"--buffer-size {args.buffer_size} is too small: {args.num_envs} environments with --unroll-steps and "
             f"--td-steps need {rows}")  # fmt: skip
    if args.learning_starts > (most := min(args.total_timesteps, args.buffer_size // steps * steps)):
        fail(f"--learning-starts {args.learning_starts} must be within --total-timesteps and --buffer-size, {most}")
    if updates_due(args.total_timesteps, args) == 0:
        fail(f"--replay-ratio {args.replay_ratio} gives no update between --learning-starts {args.learning_starts} and "
             f"--total-timesteps {args.total_timesteps}")  # fmt: skip
    game = BOARD_GAMES.get(args.env_id, (1, 1))
    most = math.inf if callable(game) else game[0] * game[1] - 1  # a cell must be left
    if args.opening_moves > most:
        fail(f"--opening-moves of {args.env_id} must be at most {most}, not {args.opening_moves}")
    for flag, default in (("capture_video", False), ("max_episode_steps", None), ("action_repeat", 1)):
        if args.env_id in BOARD_GAMES and getattr(args, flag) != default:
            fail(f"{args.env_id} has no use for --{flag.replace('_', '-')}")
    is_new = args.resume is None and args.evaluate is None and args.play is None
    if is_new and args.two_player != (args.env_id in BOARD_GAMES) and not callable(game):
        fail(f"--two-player {args.two_player}: {args.env_id} is {'no' if args.two_player else 'a'} game of BOARD_GAMES")
    if is_new and args.inner_candidates > args.num_candidates:
        fail(f"--inner-candidates {args.inner_candidates} must be at most --num-candidates {args.num_candidates}")
    if args.cudagraphs and not args.evaluate and choose_device(args).type != "cuda":
        fail("--cudagraphs needs a GPU")


def check_memory(args: Args, envs: gym.vector.VectorEnv | BoardGame) -> None:
    """Refuses what the device cannot hold: trees and latent states of a search; weights; what learning needs besides.

    That is copies and moments of the weights, the replay and the rows of an update.
    """
    with torch.device("meta"):  # tensors that have shapes alone
        agent = make_agent(envs, args)
        rb = ReplayBuffer(envs, agent, args, torch.device("meta"))
    A, latent_size = agent.num_actions, agent.network.latent_size
    roots = max(envs.num_envs, min(args.eval_episodes, 100), REANALYZED_AT_ONCE * (args.reanalyze_ratio > 0))
    floats = latent_size + 2 * A * agent.action_dim  # of a node, candidates and their noise included
    num_bytes = roots * (args.num_simulations + 1) * (NODE.itemsize + A * EDGE.itemsize + 4 * floats)
    weights = 4 * sum(weight.numel() for weight in agent.parameters())
    num_bytes += weights
    if args.evaluate is None and args.play is None:
        copies = 1 + (choose_device(args).type == "cpu")  # a checkpoint copies the numbers
        num_bytes += 4 * weights + copies * rb.numbers.nbytes + rb.data["obs"].nbytes + rb.priority.nbytes
        num_bytes += 16 * args.batch_size * (args.unroll_steps + 1) * (len(agent.bins) + latent_size)
    require_memory(num_bytes, "--buffer-size, sizes of networks, batches and searches", choose_device(args))


def check_effects(args: Args, envs: gym.vector.VectorEnv | BoardGame) -> None:
    """Refuses settings of a new run that are not those of its task and change nothing."""
    own, is_box = with_task_defaults(Args(env_id=args.env_id)), isinstance(envs.single_action_space, gym.spaces.Box)
    for applies, reason, names in (
        (args.search == "gumbel", "with --search gumbel", "dirichlet_alpha temperature_steps temperature_moves"),
        (args.search == "puct", "with --search puct", "c_scale max_considered_actions"),
        (not is_box, "on discrete actions", "entropy_scale num_candidates inner_candidates"),
        (len(envs.single_observation_space.shape) == 1, "on the network of vectors", "num_blocks"),
        (args.two_player, "where Q lies within -1 ... 1", "q_floor"),
        (args.reanalyze_ratio == 1, "where all is searched anew", "bootstrap"),
    ):
        for name in names.split():
            if applies and args.resume is None and getattr(args, name) != getattr(own, name):
                fail(f"--{name.replace('_', '-')} has no effect {reason}")


def check_support(args: Args, envs: gym.vector.VectorEnv | BoardGame) -> None:
    """Refuses a support that does not hold the largest possible value; warns where that is not known."""
    reach = inverse_transform(torch.tensor(float(args.support_size), dtype=torch.float64)).item()
    if args.env_id in BOARD_GAMES:
        largest = 1.0
    elif task_name(args.env_id) in MAX_REWARD:
        steps = envs.envs[0].spec.max_episode_steps if args.gamma == 1 else args.action_repeat / (1 - args.gamma)
        largest = MAX_REWARD[task_name(args.env_id)] * steps  # a time limit is no end: discounted values go beyond it
    else:
        print(f"values of {args.env_id} beyond +-{reach:.0f} would be clipped (--support-size): losses/clipped_targets")
        return
    if largest > reach:
        enough = math.ceil(transform(torch.tensor(largest, dtype=torch.float64)).item())
        wide = f"returns reach {largest:.0f}, which needs {enough}"
        fail(f"--support-size {args.support_size} holds values up to {reach:.0f}: {wide}")


def compile_search(patience: float = 2.0) -> None:
    """Loads the loops of the search, or compiles them and says so, if that lasts longer than `patience` seconds.

    They are kept on disk, where Numba finds a folder that can be written: __pycache__ or the user's cache.
    """
    for function in (select, expand_and_backup, root_logits, decode):
        with contextlib.suppress(RuntimeError, AttributeError):  # no such folder; NUMBA_DISABLE_JIT
            function.enable_caching()
    text = "compiling the search: about ten seconds, again only when this file has changed"
    note = threading.Timer(patience, print, [text], {"file": sys.stderr, "flush": True})
    note.daemon = True
    note.start()
    zero, one = torch.zeros(1), torch.ones(1, 1)
    args, root = Args(num_simulations=1, c_scale=0.1, q_floor=0.0), (one, one, zero)
    gumbel_search(lambda latent, action: (latent, zero, zero, one, zero), root, one, None, args)
    decode(np.zeros((1, 3), np.float32))
    note.cancel()


def executables(args: Args) -> tuple[Callable, Callable]:
    """`recurrent` and `compute_losses`, compiled or captured if asked for."""
    step_fn, losses_fn = recurrent, compute_losses
    if args.compile:
        step_fn, losses_fn = torch.compile(recurrent), torch.compile(compute_losses)
    return GraphedModel(step_fn) if args.cudagraphs and choose_device(args).type == "cuda" else step_fn, losses_fn


class GraphedModel:
    """`recurrent` as CUDA graphs, one for each agent and number of roots; the next call overwrites what one returns."""

    def __init__(self, step_fn: Callable):
        self.step_fn, self.graphs = step_fn, {}

    def __call__(self, agent: Agent, latent: torch.Tensor, *others: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        key = agent, len(latent)
        if key not in self.graphs:
            inputs, stream = tuple(x.clone() for x in (latent, *others)), torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(3):
                    self.step_fn(agent, *inputs)
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                outputs = self.step_fn(agent, *inputs)
            self.graphs[key] = graph, inputs, outputs
        graph, inputs, outputs = self.graphs[key]
        for static, new in zip(inputs, (latent, *others), strict=True):
            static.copy_(new)
        graph.replay()
        return outputs


if __name__ == "__main__":
    main(parse_args())
