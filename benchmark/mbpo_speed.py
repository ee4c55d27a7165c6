"""Speed of mbpo.py at Hopper's sizes, as JSON, each beside the time that its matrix products alone would take.

Run:  python benchmark/mbpo_speed.py [--threads 2] [--compile] [--no-cuda]
The floor is the counted arithmetic over the rate of a large matrix product, measured in the same run.
"""

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import mbpo


def seconds(function: Callable, calls: int, device: torch.device) -> float:
    """Fastest of five stretches of calls, after one for warming up."""
    stretches = []
    for _ in range(6):
        start = time.perf_counter()
        for _ in range(calls):
            function()
        if device.type == "cuda":
            torch.cuda.synchronize()
        stretches.append((time.perf_counter() - start) / calls)
    return min(stretches[1:])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--no-cuda", action="store_true")
    flags = parser.parse_args()
    torch.set_num_threads(flags.threads)
    args = mbpo.with_task_defaults(mbpo.Args(cuda=not flags.no_cuda, compile=flags.compile, model_max_epochs=1))
    device = mbpo.choose_device(args)
    agent = mbpo.Agent(11, 3, args).to(device)
    optimizers = mbpo.make_optimizers(agent, args)
    losses_fn, model_loss_fn = (torch.compile(f) if args.compile else f for f in (mbpo.sac_losses, mbpo.model_loss))
    generator = torch.Generator(device).manual_seed(0)
    matrix = torch.randn(2000, 2000, device=device)
    rate = 2 * 2000**3 / seconds(lambda: matrix @ matrix, 5, device)

    rows, noise = torch.randn(256, 27, device=device), torch.randn(2, 256, 3, device=device)
    transitions = torch.randn(5_000, 27, device=device)
    starts = torch.randn(100_000, 11, device=device)
    measured = {  # name: (function, calls, FLOPs)
        "sac_update": (
            lambda: mbpo.update(agent, optimizers["policy"], rows, noise, args, losses_fn), 50, 0.56e9,
        ),
        "ensemble_epoch": (
            lambda: mbpo.train_model(agent, optimizers["model"], transitions, generator, args, model_loss_fn), 1,
            1.36e9 * 4_000 / 256 + 2 * 1.8e6 * 1_000,
        ),
        "rollout_100k": (
            lambda: list(mbpo.rollout(agent, starts, 1, mbpo.never, generator)), 1, 100_000 * (0.26e6 + 0.14e6),
        ),
    }  # fmt: skip
    result = {
        "device": str(device),
        "torch": torch.__version__,
        "machine": platform.machine(),
        "threads": flags.threads,
    }
    result |= {"compile": args.compile, "matmul_gflops": rate / 1e9}
    for name, (function, calls, flops) in measured.items():
        result |= {f"{name}_s": seconds(function, calls, device), f"{name}_floor_s": flops / rate}
    result["sac_updates_per_s"] = 1 / result["sac_update_s"]

    envs = mbpo.make_vector_env(replace(args, env_id="InvertedPendulum-v5"), 1)
    envs.reset(seed=[0])
    action = envs.single_action_space.sample()[None] * 0
    result["env_step_s"] = seconds(lambda: (envs.reset(seed=[0]), envs.step(action)), 50, device)
    per_step = args.updates_per_step * result["sac_update_s"] + result["rollout_100k_s"] / args.model_train_frequency
    result["hopper_steps_per_s_without_model_training"] = 1 / (per_step + result["env_step_s"])
    print(json.dumps({k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in result.items()}, indent=1))


if __name__ == "__main__":
    main()
