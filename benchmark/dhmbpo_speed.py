"""Speed of dhmbpo.py, as JSON, each item beside the time that its matrix products alone would take.

Run:  python benchmark/dhmbpo_speed.py [--env-id HalfCheetah-v5] [--threads 1] [--model-batch-size 2048] [--bfloat16]
The floor is the counted arithmetic over the rate of a large matrix product, measured in the same run.
"""

import argparse
import functools
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import dhmbpo

SIZES = {"Hopper-v5": (11, 3), "HalfCheetah-v5": (17, 6), "Humanoid-v5": (45, 17)}


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


def work(obs_dim: int, action_dim: int, args: dhmbpo.Args) -> dict[str, float]:
    """FLOPs of each item: 2 for each weight and row forwards, as many for the gradient of inputs, and of weights."""
    units, rows = args.hidden_size, args.batch_size
    hidden = 2 * units**2
    net = (obs_dim + action_dim) * units + hidden + units * (obs_dim + 1)
    actor, critic = obs_dim * units + hidden + 2 * action_dim * units, (obs_dim + action_dim) * units + hidden + units
    steps, critics = args.train_horizon, args.num_critics
    path = 2 * rows * ((steps + 1) * actor + steps * net)  # forwards
    learned = 2 * rows * (args.num_targets * critic + 3 * critics * critic)  # targets; the critics in both directions
    back = 2 * rows * ((steps + 1) * 2 * actor + steps * net + 2 * critics * critic)  # frozen: inputs alone
    step = 2 * rows * (actor + net)
    model = 2 * args.num_nets * net
    return {
        "update": path + learned + back, "critic_only_update": path + learned,
        "ensemble_batch": 3 * model * args.model_batch_size, "validation": model * args.holdout_rows,
        "distribution_rollout": args.rollout_length * step + 2 * rows * actor,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--env-id", choices=SIZES, default="HalfCheetah-v5")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--model-batch-size", type=int, default=2_048)
    parser.add_argument("--bfloat16", action="store_true")
    parser.add_argument("--no-cuda", action="store_true")
    flags = parser.parse_args()
    torch.set_num_threads(flags.threads)
    obs_dim, action_dim = SIZES[flags.env_id]
    args = dhmbpo.Args(env_id=flags.env_id, cuda=not flags.no_cuda, bfloat16=flags.bfloat16)
    args = replace(args, model_batch_size=flags.model_batch_size)
    args = replace(dhmbpo.with_task_defaults(args), target_entropy=-float(action_dim))
    device = dhmbpo.choose_device(args)
    agent = dhmbpo.Agent(obs_dim, action_dim, args).to(device)
    rng = {name: torch.Generator(device).manual_seed(0) for name in ("model", "replay", "rollout", "update")}
    states = dhmbpo.RingBuffer(51_200, obs_dim, device)
    replay = dhmbpo.RingBuffer(20_000, sum(agent.sizes), device)
    rows = torch.randn(20_000, sum(agent.sizes) - 1 - args.num_nets, device=device)
    replay.add(dhmbpo.labelled(rows, rng["replay"], args))
    adam = functools.partial(torch.optim.Adam, lr=args.learning_rate, fused=True)
    optimizers = {"critics": adam(agent.critics.parameters())}
    optimizers["actor"] = adam([*agent.actor.parameters(), agent.log_alpha])
    starts = torch.randn(args.batch_size, obs_dim, device=device)
    matrix = torch.randn(2000, 2000, device=device, dtype=torch.bfloat16 if args.bfloat16 else torch.float32)
    rate = 2 * 2000**3 / seconds(lambda: matrix @ matrix, 5, device)

    update = functools.partial(dhmbpo.update, agent, optimizers, starts, dhmbpo.never_terminates, rng, args)
    inputs = torch.randn(args.holdout_rows, obs_dim + action_dim, device=device)
    targets = torch.randn(args.holdout_rows, obs_dim + 1, device=device)
    # a training of one epoch of 6 batches, and one of none: the difference is the batches' and one validation
    one_epoch = replace(args, model_max_epochs=1.01 / torch.tensor(obs_dim + 1.0).log().item())
    everything = replay.newest(len(replay))
    eager = {"fast": lambda function: function, "tick": lambda _: None}
    train = functools.partial(dhmbpo.train_model, agent, everything, 1, rng["model"], **eager)
    measured = {
        "update": (update, 10),
        "critic_only_update": (functools.partial(update, only_critics=True), 10),
        "validation": (lambda: dhmbpo.holdout_scores(agent.ensemble, inputs, targets), 2),
        "distribution_rollout": (
            lambda: dhmbpo.distribution_rollout(agent, replay, states, 1, dhmbpo.never_terminates, rng, args), 2,
        ),
        "training_of_one_epoch": (lambda: train(args=one_epoch), 1),
        "training_of_no_epoch": (lambda: train(args=replace(args, model_max_epochs=0.0)), 1),
    }  # fmt: skip
    found = {name: seconds(function, calls, device) for name, (function, calls) in measured.items()}
    held = int(everything[:, -1 - args.num_nets].sum())
    judged = found["validation"] * min(held, args.holdout_rows) / args.holdout_rows
    batches = found.pop("training_of_one_epoch") - found.pop("training_of_no_epoch") - judged
    found["ensemble_batch"] = batches / min(args.model_batches, (len(replay) - held) // args.model_batch_size)
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"cpu, {flags.threads} threads"
    result = {"env_id": args.env_id, "device": name, "machine": platform.machine(), "torch": torch.__version__}
    result |= {"bfloat16": args.bfloat16, "model_batch_size": args.model_batch_size, "matmul_gflops": rate / 1e9}
    for item, flops in work(obs_dim, action_dim, args).items():
        result |= {f"{item}_ms": 1e3 * found[item], f"{item}_floor_ms": 1e3 * flops / rate}
    result["load"] = os.getloadavg()[0]  # processes that wanted to compute meanwhile, this one among them
    print(json.dumps({k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in result.items()}, indent=1))


if __name__ == "__main__":
    main()
