"""Speed of muzero.py as JSON: simulations per second of both searches, updates and whole CartPole steps per second.

Run (from the repository root):  python benchmark/muzero_speed.py [--compile] [--batches 1 16 64 256] [--stretches 5]
Where jax and mctx are installed (pip install jax mctx), each search is also timed in mctx with the same network, one
directly after the other, and the ratio is printed: above 1 muzero.py is the faster one.
Each figure is the best of several stretches, and with one thread on the CPU its seconds are those of the processor
that the process got: on a machine that others use too, the wall clock measures the others.
"""

import functools
import importlib.util
import itertools
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import muzero


@dataclass
class Args:
    batches: tuple[int, ...] = (1, 16, 64, 256)
    """roots searched together (B); on a GPU also 1024"""
    simulations: tuple[int, ...] = (16, 50)
    """simulations (S)"""
    actions: tuple[int, ...] = (2, 18)
    """actions (A)"""
    hidden: tuple[int, ...] = (64, 256)
    """units of the network"""
    searches: tuple[str, ...] = ("puct", "gumbel")
    """searches"""
    compile: bool = False
    """torch.compile, as muzero.py --compile"""
    cuda: bool = True
    """use the GPU if there is one, with the search as one CUDA graph"""
    threads: int = 1
    """torch threads on the CPU"""
    stretches: int = 5
    """of which the best counts"""
    whole: bool = True
    """also updates and steps per second of CartPole"""


class Spaces:
    """What an agent asks of a vector environment."""

    def __init__(self, num_actions: int):
        self.single_observation_space = gym.spaces.Box(-1, 1, (8,), np.float32)
        self.single_action_space = gym.spaces.Discrete(num_actions)


def best_seconds(function: Callable, device: torch.device, stretches: int) -> float:
    """Fastest call, after two for warming up (a compilation among them)."""
    clock = time.process_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    seconds = []
    for _ in range(stretches + 2):
        start = clock()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(clock() - start)
    return min(seconds[2:])


def search_speed(batch: int, num_actions: int, args: muzero.Args, step_fn: Callable, stretches: int) -> float:
    """Simulations per second of `act` from `batch` observations, the network included."""
    device = muzero.choose_device(args)
    torch.manual_seed(0)
    agent = muzero.with_attributes(muzero.make_agent(Spaces(num_actions), args).to(device))
    for layer in (agent.network.reward, agent.network.policy_value):  # a trained network's preferences, not zeros
        torch.nn.init.normal_(layer.weight, std=0.1)
    legal = np.ones((batch, num_actions), bool)
    noise = muzero.draw_noise(legal, args, np.random.default_rng(0))
    inputs = torch.randn(batch, 8).to(device), legal, noise, np.ones(batch)
    seconds = best_seconds(lambda: muzero.act(agent, *inputs, args, step_fn), device, stretches)
    return batch * args.num_simulations / seconds


def mctx_speed(batch: int, num_actions: int, args: muzero.Args, stretches: int) -> float:
    """The same in mctx on the CPU, jitted, with muzero.py's network for vectors in JAX."""
    import jax
    import jax.numpy as jnp
    import mctx

    D, M, keys = args.hidden_size, args.support_size, iter(jax.random.split(jax.random.PRNGKey(0), 20))

    def dense(inputs: int, outputs: int) -> tuple:
        return jax.random.normal(next(keys), (inputs, outputs)) / inputs**0.5, jnp.zeros(outputs)

    sizes = {"obs": (8, D), "encoder": (D, D), "in": (D, D), "out": (D, D), "reward": (D, 2 * M + 1), "head": (D, D)}
    sizes |= {"policy_value": (D, num_actions + 2 * M + 1), "action": (num_actions, D)}
    params = {name: dense(*size) for name, size in sizes.items()}

    def linear(params: dict, name: str, x):
        return x @ params[name][0] + params[name][1]

    def hidden(x):
        x = (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-5)
        return jax.nn.silu(x)

    def scale(x):
        low, high = x.min(-1, keepdims=True), x.max(-1, keepdims=True)
        return (x - low) / jnp.maximum(high - low, 1e-5)

    def number(logits):
        return muzero.inverse_transform(jax.nn.softmax(logits) @ jnp.arange(-M, M + 1.0))

    def predict(params: dict, latent) -> tuple:
        outputs = linear(params, "policy_value", hidden(linear(params, "head", latent)))
        return outputs[:, :num_actions], number(outputs[:, num_actions:])

    def recurrent_fn(params: dict, key, action, latent) -> tuple:
        h = hidden(linear(params, "in", latent) + params["action"][0][action])
        latent = scale(latent + linear(params, "out", h))
        (logits, value), reward = predict(params, latent), number(linear(params, "reward", h))
        discount = jnp.full_like(reward, args.discount)
        outputs = mctx.RecurrentFnOutput(reward=reward, discount=discount, prior_logits=logits, value=value)
        return outputs, latent

    @jax.jit
    def search(params: dict, key, obs):
        latent = scale(linear(params, "encoder", hidden(linear(params, "obs", obs))))
        logits, value = predict(params, latent)
        root = mctx.RootFnOutput(prior_logits=logits, value=value, embedding=latent)
        if args.search == "puct":
            return mctx.muzero_policy(params, key, root, recurrent_fn, args.num_simulations)
        scale_q = {"value_scale": args.c_scale, "maxvisit_init": muzero.C_VISIT}
        transform = functools.partial(mctx.qtransform_completed_by_mix_value, **scale_q)
        return mctx.gumbel_muzero_policy(params, key, root, recurrent_fn, args.num_simulations, qtransform=transform)

    obs, key = jax.random.normal(next(keys), (batch, 8)), next(keys)
    cpu = torch.device("cpu")
    seconds = best_seconds(lambda: jax.block_until_ready(search(params, key, obs)), cpu, stretches)
    return batch * args.num_simulations / seconds


def update_speed(args: muzero.Args, losses_fn: Callable, stretches: int) -> float:
    """Updates per second at CartPole's settings, sampling included."""
    device = muzero.choose_device(args)
    envs = muzero.make_vector_env(args, args.num_envs)
    agent = muzero.make_agent(envs, args).to(device)
    optimizer, rb = muzero.make_optimizer(agent, args), muzero.ReplayBuffer(envs, agent, args, device)
    rows = {
        "obs": torch.randn(args.num_envs, 4, device=device),
        "policy": torch.full((args.num_envs, 2), 0.5, device=device),
    }
    for _ in range(200):
        rb.add(rows, np.arange(args.num_envs))
    generator = torch.Generator(device).manual_seed(0)
    actions = torch.zeros(args.unroll_steps, args.batch_size, dtype=torch.long, device=device)

    def update():
        batch = rb.sample(args.batch_size, muzero.PRIORITY_BETA, generator)
        muzero.update(agent, optimizer, rb, batch, actions, args, losses_fn)

    return 10 / best_seconds(lambda: [update() for _ in range(10)], device, stretches)


def loop_speed(args: muzero.Args) -> float:
    """Environment steps per second of `main` on CartPole by the wall clock, best report of a run that learns."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    here = os.getcwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            run_dir = muzero.main(replace(args, total_timesteps=4_000, eval_frequency=0, checkpoint_frequency=0))
            events = EventAccumulator(run_dir, size_guidance={"scalars": 0})
            events.Reload()
            return max(event.value for event in events.Scalars("charts/SPS")[2:])
        finally:
            os.chdir(here)


def main(flags: Args) -> None:
    torch.set_num_threads(flags.threads)
    if flags.threads == 1:  # before jax is imported
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
        os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1")
    base = muzero.with_task_defaults(muzero.Args(cuda=flags.cuda, compile=flags.compile))
    device = muzero.choose_device(base)
    step_fn, losses_fn = muzero.recurrent, muzero.compute_losses
    if flags.compile:
        step_fn, losses_fn = torch.compile(step_fn), torch.compile(losses_fn)
    if device.type == "cuda":
        step_fn = muzero.GraphedModel(step_fn)
    has_mctx = all(importlib.util.find_spec(name) for name in ("jax", "mctx"))
    muzero.compile_search()
    result = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or platform.machine(),
        "torch": torch.__version__, "threads": flags.threads, "compile": flags.compile, "simulations_per_s": {},
        "mctx_simulations_per_s": {}, "times_mctx": {},
    }  # fmt: skip
    settings = itertools.product(flags.searches, flags.hidden, flags.actions, flags.simulations, flags.batches)
    for search, hidden, num_actions, num_simulations, batch in settings:
        torch.compiler.reset()
        args = replace(base, search=search, hidden_size=hidden, num_simulations=num_simulations)
        speed = search_speed(batch, num_actions, args, step_fn, flags.stretches)
        name = f"{search} hidden={hidden} A={num_actions} S={num_simulations} B={batch}"
        result["simulations_per_s"][name], line = round(speed), f"{name} {speed:.0f}"
        if has_mctx:
            theirs = mctx_speed(batch, num_actions, args, flags.stretches)
            result["mctx_simulations_per_s"][name], result["times_mctx"][name] = round(theirs), round(speed / theirs, 2)
            line += f", mctx {theirs:.0f}: {speed / theirs:.2f} times"
        print(line, file=sys.stderr, flush=True)
    if flags.whole:
        result["updates_per_s"] = round(update_speed(base, losses_fn, flags.stretches), 1)
        sys.stdout, stdout = sys.stderr, sys.stdout  # the run's own lines are not part of the JSON
        result["cartpole_steps_per_s"] = round(loop_speed(base), 1)
        sys.stdout = stdout
    result["load"] = os.getloadavg()[0]  # processes that wanted to compute meanwhile, this one among them
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main(tyro.cli(Args))
