"""What a dreamer.py agent of some size learns in some CPU seconds from the replay of a run from pixels, as CSV.

Run:  python benchmark/dreamer_sizes.py <copy of a run folder> --seconds 600 --cnn-depth 16 --batch-size 16
A new agent, eager, float32, one thread; what is not given is as in --size laptop. The seconds are those that this
process computes in sampling and updates. Of the replay every fifth episode is held out. --rows rows, at equal parts of
the seconds. Columns, on sequences held out: squared error of a picture (summed over its pixels), of a reward, KL, all
filtered; after five filtered steps, 15 by the actions alone: the first two again; mean and deviation of the returns.
"""

import argparse
import csv
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import dreamer

VARIED = "batch_size batch_length cnn_depth dense_size deter_size horizon".split()
COLUMNS = "parameters seconds updates time_steps picture reward kl picture_ahead reward_ahead return std".split()
CONTEXT, AHEAD = 5, 15


def divided(state: dict, obs_space: gym.Space, actions: int) -> list[dreamer.ReplayBuffer]:
    """The episodes of a saved replay in two: what is learned from, and every fifth, which is not."""
    capacity, device = len(state["data"]["reward"]), torch.device("cpu")
    whole = dreamer.ReplayBuffer(capacity, obs_space, actions, device)
    whole.load_state_dict(state)
    buffers = []
    for held_out in (False, True):
        numbers = [i for i in range(len(whole.starts)) if (i % 5 == 4) == held_out]
        buffers.append(dreamer.ReplayBuffer(int(whole.lengths[numbers].sum()), obs_space, actions, device))
        for i in numbers:
            slots = (whole.starts[i] + np.arange(whole.lengths[i])) % capacity
            buffers[-1].add({name: tensor[slots].numpy() for name, tensor in whole.data.items()})
    return buffers


@torch.no_grad()
def measure(agent: dreamer.Agent, held_out: dreamer.ReplayBuffer, args: dreamer.Args) -> list[float]:
    """Errors on the same 128 sequences, whatever the size: filtered, and ahead of the observations."""
    rng, generator = np.random.default_rng(5), torch.Generator().manual_seed(5)
    batches = [held_out.sample(32, CONTEXT + AHEAD, rng, torch.device("cpu")) for _ in range(4)]
    found = []
    for batch in batches:
        noise = torch.randn(*batch["reward"].shape, args.stoch_size, generator=generator)
        metrics = dreamer.model_loss(agent.world_model, batch, noise, args)[2]
        constant = 0.5 * np.log(2 * np.pi)  # of a Normal with variance 1, for each number
        found.append([2 * (metrics["losses/image_loss"].item() - constant * batch["obs"][0, 0].numel())])
        found[-1] += [2 * (metrics["losses/reward_loss"].item() - constant), metrics["model/kl"].item()]
        truth, pictures, rewards = dreamer.open_loop(agent, batch, generator, CONTEXT)
        errors = (pictures - truth)[CONTEXT:].square().flatten(2).sum(-1).mean().item()
        found[-1] += [errors, (rewards - batch["reward"])[CONTEXT:].square().mean().item()]
    return np.mean(found, 0).tolist()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--rows", type=int, default=3)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--episodes", type=int, default=5)
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--batch-length", type=int)
    parser.add_argument("--cnn-depth", type=int)
    parser.add_argument("--dense-size", type=int)
    parser.add_argument("--deter-size", type=int)
    parser.add_argument("--horizon", type=int)
    flags = parser.parse_args()
    torch.set_num_threads(1)
    checkpoint = dreamer.load_checkpoint(flags.folder, dreamer.Args())
    saved = dreamer.Args(**checkpoint["args"])
    replay = checkpoint["parts"].get("replay")
    if replay is None or replay["data"]["obs"].dim() != 4 or len(replay["starts"]) < 5:
        parser.error("wanted: a run from pixels, with its replay, of five episodes or more")
    given = {name: getattr(flags, name) for name in VARIED if getattr(flags, name) is not None}
    args = dreamer.Args(env_id=saved.env_id, size="laptop", cuda=False, eval_episodes=flags.episodes, **given)
    args = dreamer.with_task_defaults(replace(args, action_repeat=saved.action_repeat, seed=flags.seed))
    envs = dreamer.make_vector_env(args, dreamer.choose_renderer(args, checkpoint), flags.episodes)
    spaces = envs.single_observation_space, envs.single_action_space
    learned, held_out = divided(replay, spaces[0], spaces[1].shape[0])
    checkpoint = replay = None
    torch.manual_seed(args.seed)
    agent = dreamer.Agent(*spaces, args)
    optimizers = dreamer.make_optimizers(agent, args)
    dreamer.keep_freed_memory(torch.device("cpu"))
    rng, generator = np.random.default_rng([args.seed, 1]), torch.Generator().manual_seed(10 * args.seed + 1)
    parameters = sum(weight.numel() for weight in agent.parameters())
    table, used, updates = csv.writer(sys.stdout, lineterminator="\n"), 0.0, 0
    table.writerow(["seed", *VARIED, *COLUMNS])
    for row in range(1, flags.rows + 1):
        while used < flags.seconds * row / flags.rows:
            start = time.process_time()
            batch = learned.sample(args.batch_size, args.batch_length, rng, torch.device("cpu"))
            dreamer.update(agent, optimizers, batch, dreamer.draw_noise(agent, args, generator), args)
            used, updates = used + time.process_time() - start, updates + 1
        returns, _ = dreamer.evaluate(agent, envs, args, torch.device("cpu"), SimpleNamespace(requested=False))
        values = [*measure(agent, held_out, args), returns.mean(), returns.std()]
        steps = updates * args.batch_size * args.batch_length
        settings = [args.seed, *(getattr(args, name) for name in VARIED)]
        table.writerow([*settings, parameters, round(used), updates, steps, *(f"{value:.4g}" for value in values)])
        sys.stdout.flush()
    envs.close()


if __name__ == "__main__":
    main()
