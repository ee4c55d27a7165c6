"""Speed of mbpo.py at Hopper's sizes, as JSON, each beside the time that its matrix products alone would take.

Run:  python benchmark/mbpo_speed.py [--threads 2] [--compile] [--cudagraphs] [--no-cuda] [--no-loop]
The floor is the counted arithmetic over the rate of a large matrix product, measured in the same run. The loop is that
of Hopper-v5 right after its random steps, start of the script included: 250 steps with 5,000 updates, the rollouts and
one training of the ensemble, cut to 23 epochs. That is about the mean of a whole run; the very first one has hundreds.
"""

import argparse
import contextlib
import io
import json
import os
import platform
import sys
import tempfile
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


def loop_steps_per_second(args: mbpo.Args) -> float:
    """Environment steps per second of the whole script between steps 5,000 and 5,250 of Hopper-v5."""
    here = os.getcwd()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        os.chdir(folder)
        args = replace(args, total_timesteps=5_000, eval_frequency=0, checkpoint_frequency=0, model_max_epochs=23)
        run_dir = mbpo.main(args)
        start = time.perf_counter()
        mbpo.main(replace(args, resume=run_dir, total_timesteps=5_250))
        elapsed = time.perf_counter() - start
        os.chdir(here)
    return 250 / elapsed


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--cudagraphs", action="store_true")
    parser.add_argument("--no-cuda", action="store_true")
    parser.add_argument("--no-loop", action="store_true")
    flags = parser.parse_args()
    torch.set_num_threads(flags.threads)
    fast = {"cuda": not flags.no_cuda, "compile": flags.compile, "cudagraphs": flags.cudagraphs}
    args = mbpo.with_task_defaults(mbpo.Args(**fast, model_max_epochs=1))
    device = mbpo.choose_device(args)
    agent = mbpo.Agent(11, 3, args).to(device)
    update_model, update_policy = mbpo.make_updates(agent, mbpo.make_optimizers(agent, args), args)
    generator = torch.Generator(device).manual_seed(0)
    matrix = torch.randn(2000, 2000, device=device)
    rate = 2 * 2000**3 / seconds(lambda: matrix @ matrix, 5, device)

    count = args.updates_per_step
    rows, noise = torch.randn(count, 256, 27, device=device), torch.randn(count, 2, 256, 3, device=device)
    transitions = torch.randn(5_000, 27, device=device)
    starts = torch.randn(100_000, 11, device=device)
    measured = {  # name: (function, calls, FLOPs of a call)
        "sac_updates_of_a_step": (lambda: update_policy(rows, noise), 3, count * 0.56e9),
        "ensemble_epoch": (
            lambda: mbpo.train_model(agent, transitions, generator, args, update_model, lambda doing: False), 1,
            1.36e9 * 4_000 / 256 + 2 * 1.8e6 * 1_000,
        ),
        "rollout_100k": (
            lambda: [len(part) for part in mbpo.rollout(agent, starts, 1, mbpo.never_terminates, generator)], 1,
            100_000 * (0.26e6 + 0.14e6),
        ),
    }  # fmt: skip
    gpu = torch.cuda.get_device_name() if device.type == "cuda" else None
    result = {"device": gpu or f"cpu, {flags.threads} threads", "machine": platform.machine()}
    result |= {"torch": torch.__version__, "compile": args.compile, "cudagraphs": args.cudagraphs}
    result |= {"matmul_gflops": rate / 1e9}
    for name, (function, calls, flops) in measured.items():
        result |= {f"{name}_s": seconds(function, calls, device), f"{name}_floor_s": flops / rate}
    for suffix in ("", "_floor"):
        result[f"sac_updates_per_s{suffix}"] = count / result[f"sac_updates_of_a_step{suffix}_s"]
    if not flags.no_loop:
        result["loop_steps_per_s"] = loop_steps_per_second(args)
        work = 250 * count * 0.56e9 + 23 * 1.36e9 * 4_000 / 256 + 24 * 1.8e6 * 1_000 + 100_000 * 0.4e6
        result["loop_steps_per_s_floor"] = 250 * rate / work
    result["load"] = os.getloadavg()[0]  # processes that wanted to compute meanwhile, this one among them
    print(json.dumps({k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in result.items()}, indent=1))


if __name__ == "__main__":
    main()
