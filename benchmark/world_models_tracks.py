"""The last controller of a run on tracks that none of its evaluations uses, one row for each.

Run:  PYTHONPATH=benchmark SDL_VIDEODRIVER=dummy python benchmark/world_models_tracks.py runs/<run folder> [TRACKS]
Resets with seeds 5000, 5001, ...; prints rows run,track,return,actions of results/world_models/*_tracks*.csv.
"""

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

import world_models


@torch.no_grad()
def main(folder: str, tracks: int) -> None:
    torch.set_num_threads(1)
    checkpoint = world_models.load_run(folder, world_models.Args(resume=folder))
    args = world_models.Args(**checkpoint["args"])
    envs = world_models.make_vector_env(args, 1)
    agent = world_models.trained_agent(folder, checkpoint, envs, args)
    policy = world_models.linear_policy(agent.controller[None], agent.model.spec.action_kind)
    seeds, generator = np.arange(5000, 5000 + tracks), torch.Generator().manual_seed(1)
    returns, lengths = world_models.play(agent, envs, policy, seeds, generator, SimpleNamespace(requested=0))
    envs.close()
    for row in zip(seeds, returns, lengths, strict=True):
        print("{},{},{:.0f},{}".format(Path(folder).name, *row))
    print(f"# mean {returns.mean():.2f}, standard deviation {returns.std():.2f}")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 100)
