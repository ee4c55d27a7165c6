"""What bfloat16 does to the gradients of a dhmbpo.py checkpoint, beside what other rows of the replay do, as CSV.

Run:  python benchmark/dhmbpo_bfloat16.py runs/<run folder>
For each network the loss and the gradient of some batches of the run's sizes (the rewards without their noise), in
float32 and with --bfloat16, from the same random numbers. Columns: cosine of the two gradients, norm of the second over
that of the first; cosine of the float32 gradients of this batch and of the next; the two losses.
"""

import argparse
import csv
import sys
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))
import dhmbpo


def gradients(agent: dhmbpo.Agent, states, rows, args: dhmbpo.Args, seed: int) -> dict[str, tuple[float, torch.Tensor]]:
    """Loss and gradient of each network from states (N, D) and rows of the replay (N, ...)."""
    generator = torch.Generator().manual_seed(seed)
    starts = states[torch.randint(len(states), (args.batch_size,), generator=generator)]
    terminated_fn = dhmbpo.termination_function(args.env_id, states.shape[1])
    path = dhmbpo.rollout(agent, agent.standardize(starts), args.train_horizon, terminated_fn, generator)
    pair = torch.randperm(args.num_critics, generator=generator)[: args.num_targets]
    losses = {
        "actor": dhmbpo.actor_loss(agent, path, args.gamma),
        "critics": dhmbpo.critic_loss(agent, path, pair, args.gamma, generator)[0].sum(),
    }
    batch = rows[torch.randint(len(rows), (args.model_batch_size,), generator=generator)]  # held out or not
    obs, actions, outputs, _, weights = agent.unpack(batch)
    inputs = torch.cat([agent.standardize(obs), actions], -1).expand(args.num_nets, -1, -1)
    targets = ((outputs - agent.out_mean) / agent.out_std).expand(args.num_nets, -1, -1)
    ensemble = agent.ensemble.requires_grad_(True)
    losses["ensemble"] = dhmbpo.model_loss(ensemble(inputs, generator), ensemble.log_std, targets, weights.T)
    found = {}
    for name, loss in losses.items():
        parts = torch.autograd.grad(loss, list(getattr(agent, name).parameters()))
        found[name] = loss.item(), torch.cat([part.flatten() for part in parts])
    ensemble.requires_grad_(False)
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("--batches", type=int, default=16)
    flags = parser.parse_args()
    torch.set_num_threads(1)
    checkpoint = dhmbpo.load_checkpoint(flags.folder, dhmbpo.Args())
    args, parts = dhmbpo.Args(**checkpoint["args"]), checkpoint["parts"]
    if "replay" not in parts or flags.batches < 2:
        parser.error("wanted: a run with its buffers, two batches or more")
    states, rows = parts["states"]["rows"], parts["replay"]["rows"]
    found = {}
    for bfloat16 in (False, True):
        settings = replace(args, bfloat16=bfloat16)
        obs_dim = states.shape[1]
        agent = dhmbpo.Agent(obs_dim, rows.shape[1] - 2 * obs_dim - 2 - args.num_nets, settings)
        agent.load_state_dict(parts["agent"])
        found[bfloat16] = [gradients(agent, states, rows, settings, seed) for seed in range(flags.batches)]
    table = csv.writer(sys.stdout, lineterminator="\n")
    table.writerow("step network batch cosine norm_ratio cosine_with_next_batch loss_float32 loss_bfloat16".split())
    for i, (full, low) in enumerate(zip(found[False], found[True], strict=True)):
        for name in full:
            (loss, gradient), (low_loss, low_gradient) = full[name], low[name]
            following = found[False][(i + 1) % flags.batches][name][1]
            cosines = [F.cosine_similarity(gradient, other, 0).item() for other in (low_gradient, following)]
            values = cosines[0], (low_gradient.norm() / gradient.norm()).item(), cosines[1], loss, low_loss
            table.writerow([checkpoint["global_step"], name, i, *(f"{value:.5g}" for value in values)])


if __name__ == "__main__":
    main()
