"""How well the ensemble of a dhmbpo.py checkpoint is trained on its replay after so many seconds, by settings, as CSV.

Run:  python benchmark/dhmbpo_ensemble.py runs/<run folder> --seconds 240 --model-batch-size 2048 --model-patience 50
Columns: settings; epoch; seconds of this process; mean score of the held out rows, in float32; the best so far.
"""

import argparse
import csv
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
import dhmbpo

CHANGED = "model_batch_size", "model_lr", "model_patience", "model_max_epochs", "bfloat16"


class Enough(Exception):
    """The seconds are over."""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("--seconds", type=float, default=240.0)
    parser.add_argument("--model-batch-size", type=int)
    parser.add_argument("--model-lr", type=float)
    parser.add_argument("--model-patience", type=float)
    parser.add_argument("--model-max-epochs", type=float)
    parser.add_argument("--bfloat16", action=argparse.BooleanOptionalAction)
    flags = parser.parse_args()
    torch.set_num_threads(1)
    checkpoint = torch.load(f"{flags.folder}/checkpoint.pt", weights_only=True)
    args = dhmbpo.Args(**checkpoint["args"])
    args = replace(args, **{name: getattr(flags, name) for name in CHANGED if getattr(flags, name) is not None})
    if "replay" not in checkpoint["parts"]:
        parser.error("wanted: a run with its buffers")
    state = checkpoint["parts"]["agent"]
    agent = dhmbpo.Agent(len(state["obs_mean"]), state["actor.net.6.weight"].shape[0] // 2, args)
    agent.load_state_dict(state)
    replay = dhmbpo.RingBuffer(args.buffer_size, sum(agent.sizes), torch.device("cpu"))
    replay.load_state_dict(checkpoint["parts"]["replay"])
    rows, generator = replay.newest(len(replay)), torch.Generator().manual_seed(3)
    agent.fit_statistics(rows)
    rows = rows[torch.randperm(len(rows), generator=generator)[: args.model_rows]]
    scores, found, pause = dhmbpo.holdout_scores, [], -time.process_time()

    def watched(*given) -> torch.Tensor:
        nonlocal pause
        score, seconds = scores(*given), time.process_time() + pause
        agent.ensemble.bfloat16 = False
        found.append((seconds, scores(*given).mean().item()))
        agent.ensemble.bfloat16 = args.bfloat16
        pause = seconds - time.process_time()
        return score

    def tick(_: str) -> None:
        if found[-1][0] > flags.seconds:
            raise Enough

    dhmbpo.holdout_scores = watched
    try:
        dhmbpo.train_model(agent, rows, 1, generator, args, lambda function: function, tick)
    except Enough:
        pass
    table = csv.writer(sys.stdout, lineterminator="\n")
    table.writerow("model_batch_size model_lr model_patience bfloat16 epoch seconds score best".split())
    settings = [args.model_batch_size, args.model_lr, f"{args.model_patience:g}", args.bfloat16]
    for epoch, (seconds, score) in enumerate(found):
        if epoch % 10 == 0 or epoch == len(found) - 1:
            best = min(score for _, score in found[: epoch + 1])
            table.writerow([*settings, epoch, f"{seconds:.0f}", f"{score:.3f}", f"{best:.3f}"])


if __name__ == "__main__":
    main()
