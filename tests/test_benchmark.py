"""Measures and files that pages' numbers come from: benchmark/open_loop.py, dreamer_sizes.py and export.py."""

import csv
import io
import math
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from runs import ROOT, run
from torch.utils.tensorboard import SummaryWriter

import dreamer

sys.path.append(str(ROOT / "benchmark"))
import dreamer_sizes
import export
import open_loop

# === open_loop.py ===


@pytest.mark.parametrize("shape", [(), (3,), (2, 4, 5)], ids=["rewards", "vectors", "pictures"])
def test_relative_errors_of_knowing_all_the_mean_and_nothing(shape):
    """What came true: 0; the mean of the moments: 1; another sample of the same distribution: 2."""
    gen = torch.Generator().manual_seed(1)
    truth, other = (7 + 3 * torch.randn(2, 20_000, *shape, generator=gen) for _ in range(2))
    for predicted, error in ((truth, 0), (truth.mean((0, 1)).expand_as(truth), 1), (other, 2)):
        np.testing.assert_allclose(open_loop.relative_errors(truth, predicted), [error] * 2, atol=0.07)


def test_relative_errors_by_hand():
    """Errors by step, averaged over predictions and moments, over the spread of all steps.

    Of vectors each number is divided by its own spread, and one that never varies is left out; of pictures the sums.
    """
    truth = torch.tensor([[2.0, 2.0], [0.0, 4.0]])  # spread 2
    two = torch.stack([truth + 1, truth - 3], 1)  # of two models: errors 1 and 9
    assert open_loop.relative_errors(truth, two).tolist() == [2.5, 2.5]
    assert open_loop.relative_errors(truth, truth + torch.tensor([[1.0], [2.0]])).tolist() == [0.5, 2]
    vectors = torch.stack([truth, 10 * truth, torch.full((2, 2), 5.0)], -1)  # spreads 2, 200, 0
    wrong = vectors + torch.tensor([2.0, 10.0, 7.0])
    assert open_loop.relative_errors(vectors, wrong).tolist() == [1.25, 1.25]  # of 4 / 2 and 100 / 200
    pictures, wrong = vectors[..., None], wrong[..., None]
    np.testing.assert_allclose(open_loop.relative_errors(pictures, wrong), [(4 + 100 + 49) / 202] * 2)


def test_pieces_begin_at_every_fifth_moment_that_has_enough_left():
    """Of each episode by itself; moments are columns."""
    tracks = [{"reward": np.arange(float(n)) + start} for n, start in ((12, 0), (6, 100), (7, 200))]
    starts = torch.tensor([0.0, 5, 200])
    assert torch.equal(open_loop.pieces(tracks, 7)["reward"], starts + torch.arange(7.0)[:, None])


# === dreamer_sizes.py ===

PICTURES = gym.spaces.Box(0, 255, (64, 64, 3), np.uint8)


def entries(count: int, number: int) -> dict[str, np.ndarray]:
    """An episode whose rewards are its number, of white pictures."""
    episode = {"obs": np.full((count, 64, 64, 3), 255, np.uint8), "action": np.zeros((count, 2))}
    episode |= {"reward": np.full(count, float(number)), "cont": np.ones(count), "is_first": np.eye(1, count)[0]}
    return episode


def test_every_fifth_episode_is_held_out_whole():
    """Also of a ring that has come round, in the middle of an episode."""
    rb = dreamer.ReplayBuffer(52, PICTURES, 2, torch.device("cpu"))
    for number in range(12):
        rb.add(entries(4 + number % 3, number))
    across = rb.starts % 52 + rb.lengths > 52
    buffers = dreamer_sizes.divided(rb.state_dict(), PICTURES, 2)
    expected = [[], []]
    for i, number in enumerate(range(1, 12)):  # of the second episode one entry is left
        expected[i % 5 == 4] += [float(number)] * (4 + number % 3 if i else 1)
    assert [buffer.data["reward"].tolist() for buffer in buffers] == expected and across.any()
    assert [len(buffer.starts) for buffer in buffers] == [9, 2]
    assert [buffer.data["is_first"].sum().item() for buffer in buffers] == [8, 2]


def test_errors_by_hand(monkeypatch):
    """Filtered and ahead of the observations, on random numbers, beside loops over steps and batches."""
    args = dreamer.Args(size="laptop", cuda=False, cnn_depth=1, dense_size=4, deter_size=4, stoch_size=2)
    args, rng = dreamer.with_task_defaults(args), np.random.default_rng(3)
    torch.manual_seed(3)
    agent, rb = dreamer.Agent(PICTURES, gym.spaces.Box(-1, 1, (2,)), args), dreamer.ReplayBuffer(90, PICTURES, 2, "cpu")
    for _ in range(3):
        episode = entries(30, 0) | {"action": rng.uniform(-1, 1, (30, 2)), "reward": rng.normal(size=30)}
        rb.add(episode | {"obs": rng.integers(0, 256, (30, 64, 64, 3), np.uint8)})
    batches, sample = [], rb.sample

    def sampled(*given) -> dict:
        batches.append(sample(*given))
        return batches[-1]

    monkeypatch.setattr(rb, "sample", sampled)
    found = dreamer_sizes.measure(agent, rb, args)
    model, generator, errors = agent.world_model, torch.Generator().manual_seed(5), []
    for batch in batches:
        steps, obs = len(batch["reward"]), dreamer.preprocess(batch["obs"])
        filtered, ahead = torch.randn(2, *batch["reward"].shape, 2, generator=generator)
        with torch.no_grad():
            embed, rows = model.embed(obs), []
            state, predicted = model.rssm.initial(32), model.rssm.initial(32)
            for t in range(steps):
                given = batch["action"][t], embed[t], batch["is_first"][t]
                *state, mean, std = model.rssm.obs_step(*state, *given, filtered[t])
                prior = torch.distributions.Normal(*model.rssm.prior(state[1]))
                kl = torch.distributions.kl_divergence(torch.distributions.Normal(mean, std), prior).sum(-1)
                if t < 5:
                    predicted = model.rssm.obs_step(*predicted, *given, ahead[t])[:2]
                else:
                    predicted = model.rssm.img_step(*predicted, batch["action"][t], ahead[t])
                row = []
                for feat in (torch.cat([*state], -1)[None], torch.cat([*predicted], -1)[None]):
                    row.append(((model.decode(feat)[0] - obs[t]) ** 2).sum((1, 2, 3)).mean().item())
                    row.append(((model.reward(feat)[0, :, 0] - batch["reward"][t]) ** 2).mean().item())
                rows.append([*row[:2], kl.mean().item(), *row[2:]])
        errors.append([*np.mean(rows, 0)[:3], *np.mean(rows[5:], 0)[3:]])
    assert len(batches) == 4 and batches[0]["reward"].shape == (20, 32)
    np.testing.assert_allclose(found, np.mean(errors, 0), rtol=1e-4)


def test_sizes_as_a_table(capsys, monkeypatch):
    """Rows at equal parts of the seconds, with the settings and the seed asked for; what has no use is refused."""

    def main(folder: str, *flags: str) -> None:
        monkeypatch.setattr("sys.argv", ["dreamer_sizes.py", folder, "--episodes", "2", "--seconds", "0.2", *flags])
        dreamer_sizes.main()

    common = {"env_id": "fake_envs:MovingPixels-v0", "cont_head": True, "learning_starts": 64}
    pixels = run(dreamer, **common, total_timesteps=96)
    capsys.readouterr()
    size = "--batch-size 2 --batch-length 4 --cnn-depth 1 --dense-size 8 --deter-size 8 --horizon 2".split()
    main(pixels, "--rows", "2", "--seed", "7", *size)
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [[row[name] for name in ("seed", *dreamer_sizes.VARIED)] for row in rows] == [["7", *size[1::2]]] * 2
    assert int(rows[1]["updates"]) > int(rows[0]["updates"]) > 0
    assert all(int(row["time_steps"]) == 8 * int(row["updates"]) for row in rows)
    assert all(math.isfinite(float(row[name])) for row in rows for name in dreamer_sizes.COLUMNS)
    for useless in ({"env_id": "fake_envs:Counter-v0"}, common | {"save_buffer": False}):
        folder = run(dreamer, **useless, total_timesteps=96)
        with pytest.raises(SystemExit):
            main(folder)
        assert "wanted: a run from pixels, with its replay" in capsys.readouterr().err


# === export.py ===


def logged(seed: int, values: dict[str, list[tuple[int, float]]]) -> str:
    """A run folder with these scalars."""
    with SummaryWriter(f"runs/A-v0__x__{seed}__9") as writer:
        for tag, points in values.items():
            for step, value in points:
                writer.add_scalar(tag, value, step)
    return f"runs/A-v0__x__{seed}__9"


def test_what_is_exported():
    """A comment, a head and one row an evaluation, by seed; of one that was made again after a resume the later value.

    A run without an evaluation has no row. The episodes of training have no deviation.
    """
    episodes = {"charts/episodic_return": [(3, 1.004), (6, 2.0)]}
    means, stds = [(10, 1.25), (20, -3.006), (20, 4.0)], [(10, 0.5), (20, 0.125), (20, 1.0)]
    second = {"eval/episodic_return": [(10, 1000.0)], "eval/episodic_return_std": [(10, 0.0)]}
    first = logged(1, {"eval/episodic_return": means, "eval/episodic_return_std": stds} | episodes)
    folders = [logged(2, second | episodes), first]
    export.export("results/x/A-v0.csv", "a command", [*folders, logged(3, episodes)])
    rows = ["1,10,1.25,0.50", "1,20,4.00,1.00", "2,10,1000.00,0.00"]
    assert Path("results/x/A-v0.csv").read_text().split("\n") == ["# a command", "seed,step,return,std", *rows, ""]
    export.export("A-v0_training.csv", "another", folders)
    rows = ["1,3,1.00", "1,6,2.00", "2,3,1.00", "2,6,2.00"]
    assert Path("A-v0_training.csv").read_text().split("\n") == ["# another", "seed,step,return", *rows, ""]


def test_what_says_whether_it_walks_is_exported():
    """Three columns more, not for runs without a velocity; of an evaluation that was made again the later value."""
    points = {"eval/episodic_return": [(10, 1.0), (20, 2.0)], "eval/episodic_return_std": [(10, 0.0), (20, 0.5)]}
    more = {"eval/x_velocity": [(10, 0.1), (20, 0.7), (20, 0.8)], "eval/full_length_share": [(10, 0.25), (20, 1.0)]}
    folders = [logged(1, points | more | {"eval/walks": [(10, 0.0), (20, 1.0)]}), logged(2, points)]
    export.export("A-v0.csv", "a command", folders)
    head = "seed,step,return,std,x_velocity,full_length_share,walks"
    rows = ["1,10,1.00,0.00,0.10,0.25,0.00", "1,20,2.00,0.50,0.80,1.00,1.00", "2,10,1.00,0.00", "2,20,2.00,0.50"]
    assert Path("A-v0.csv").read_text().split("\n") == ["# a command", head, *rows, ""]


def test_points_are_not_lost(capsys):
    """A file with more points than the runs that are to replace them stays as it is, and this is said."""
    points = {"eval/episodic_return": [(10, 1.0), (20, 2.0)], "eval/episodic_return_std": [(10, 0.0), (20, 0.0)]}
    export.export("A-v0.csv", "long", [logged(1, points)])
    before = Path("A-v0.csv").read_text()
    export.export("A-v0.csv", "short", [logged(2, {name: pairs[:1] for name, pairs in points.items()})])
    assert Path("A-v0.csv").read_text() == before and "A-v0.csv has more points" in capsys.readouterr().err
    Path("A-v0.csv").write_text(f"# two comments\n{before}")
    export.export("A-v0.csv", "another", [logged(3, points)])
    assert Path("A-v0.csv").read_text().startswith("# another")
