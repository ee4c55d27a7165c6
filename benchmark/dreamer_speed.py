"""Seconds per Dreamer update and per part of it, as JSON, beside the floor that its floating-point operations set.

Run (from the repository root):  python benchmark/dreamer_speed.py --size laptop
The floor: the operations of an update (counted by torch) over the rate of a large matrix product in the same run.
"""

import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import gymnasium as gym
import numpy as np
import torch
import tyro
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import dreamer


@dataclass
class Args:
    size: Literal["published", "laptop"] = "published"  # dreamer.py's flag of this name
    batch_size: int | None = None  # sequences per batch (B), if not the size's
    batch_length: int | None = None  # time steps per sequence (L), if not the size's
    action_dim: int = 6  # dimensions of the action (A)
    updates: int = 10  # timed updates, after three that are not
    threads: int | None = None  # CPU threads; default: torch's own choice
    cuda: bool = True  # use the GPU if there is one
    bfloat16: bool = False  # dreamer.py's flag of this name
    compile: bool = False  # dreamer.py's flag of this name
    cudagraphs: bool = False  # dreamer.py's flag of this name
    keep: bool = True  # keep freed memory, as a run on a CPU does


def timed(function: Callable[[], object], repeats: int, device: torch.device) -> list[float]:
    """Seconds of each call, device work included."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return seconds


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a square matrix product, best of ten."""
    size = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / min(timed(lambda: a @ b, 10, device))


def main(bench: Args) -> None:
    if bench.threads:
        torch.set_num_threads(bench.threads)
    flags = "size batch_size batch_length cuda bfloat16 compile cudagraphs".split()
    args = dreamer.with_task_defaults(dreamer.Args(**{name: getattr(bench, name) for name in flags}))
    device = dreamer.choose_device(args)
    if bench.keep:
        dreamer.keep_freed_memory(device)
    torch.manual_seed(1)
    obs_space = gym.spaces.Box(0, 255, (64, 64, 3), np.uint8)
    agent = dreamer.Agent(obs_space, gym.spaces.Box(-1, 1, (bench.action_dim,)), args).to(device)
    optimizers = dreamer.make_optimizers(agent, args)
    generator, rng = torch.Generator(device).manual_seed(1), np.random.default_rng(1)
    rb = dreamer.ReplayBuffer(3000, obs_space, bench.action_dim, device)
    for _ in range(5):
        rb.add(
            {
                "obs": rng.integers(0, 256, (501, 64, 64, 3), np.uint8),
                "action": rng.uniform(-1, 1, (501, bench.action_dim)),
                "reward": rng.uniform(0, 1, 501),
                "cont": np.ones(501),
                "is_first": np.eye(1, 501)[0],
            }
        )
    update_fn = dreamer.make_update(agent, optimizers, args)

    def sample() -> dict:
        return rb.sample(args.batch_size, args.batch_length, rng, device)

    def noise() -> dict:
        return dreamer.draw_noise(agent, args, generator)

    batch, draw = sample(), noise()
    twin = deepcopy(agent)  # a CUDA graph must not meet what an eager backward pass has left at its parameters
    networks = {"model": twin.world_model, "actor": twin.actor, "value": twin.value}
    with FlopCounterMode(display=False) as counter:
        for name, loss in dreamer.compute_losses(twin, batch, draw, args)[0].items():
            loss.backward(inputs=list(networks[name].parameters()))
    timed(lambda: update_fn(sample(), noise()), 4 if bench.cudagraphs else 3, device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    full = timed(lambda: update_fn(sample(), noise()), bench.updates, device)
    memory = torch.cuda.max_memory_allocated() if device.type == "cuda" else None

    # the parts, eager and each forward + backward by itself
    model, obs = agent.world_model, dreamer.preprocess(batch["obs"])
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=args.bfloat16)
    with torch.no_grad(), autocast:
        embed = model.embed(obs)
        post = model.rssm.observe(embed, batch["action"], batch["is_first"], draw["post"])
    feat = torch.cat([post["stoch"], post["deter"]], -1).requires_grad_()
    ones = torch.ones_like(batch["cont"]).flatten()

    def part(function: Callable[[], torch.Tensor], inputs: list[torch.Tensor] | None = None) -> float:
        def call() -> None:
            with autocast:
                loss = function()
            loss.backward(inputs=inputs)

        timed(call, 1, device)
        return statistics.median(timed(call, max(bench.updates // 2, 3), device))

    def observe() -> torch.Tensor:
        states = model.rssm.observe(embed.requires_grad_(), batch["action"], batch["is_first"], draw["post"])
        return sum(state.sum() for state in states.values())

    def optimize() -> None:
        for optimizer in optimizers.values():
            torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], args.max_grad_norm)
            optimizer.step()

    dreams = dreamer.actor_loss(agent, post, ones, draw, args)[1]
    parameters = {name: optimizer.param_groups[0]["params"] for name, optimizer in optimizers.items()}
    parts = {
        "encoder": part(lambda: model.embed(obs).float().square().mean()),
        "rssm": part(observe),
        "decoder": part(lambda: model.decode(feat).square().mean()),
        "dreams_and_actor": part(lambda: dreamer.actor_loss(agent, post, ones, draw, args)[0], parameters["actor"]),
        "value": part(lambda: dreamer.value_loss(agent.value, *dreams), parameters["value"]),
        "clip_and_adam": statistics.median(timed(optimize, bench.updates, device)),
        "sample_and_noise": statistics.median(timed(lambda: (sample(), noise()), bench.updates, device)),
    }
    flops = counter.get_total_flops()
    rate = matmul_rate(device, torch.bfloat16 if bench.bfloat16 else torch.float32)
    result = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "load": os.getloadavg()[0],  # processes that wanted to compute meanwhile, this one among them
        **{name: getattr(args, name) for name in flags},
        "keep": bench.keep,
        "update_seconds_median": statistics.median(full),
        "update_seconds_min": min(full),
        "update_seconds_max": max(full),
        "parts_seconds_median": parts,
        "update_tflop": flops / 1e12,
        "matmul_tflop_per_second": rate / 1e12,
        "floor_seconds": flops / rate,
        "peak_memory_gb": memory and memory / 1e9,
    }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main(tyro.cli(Args))
