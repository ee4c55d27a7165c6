"""How far a model may plan: the error of its predictions by horizon, of all scripts in one form.

Run:  python benchmark/open_loop.py SCRIPT RUN [flags of the run]    measures: SCRIPT's rows of results/open_loop.csv
      python benchmark/open_loop.py                                  draws docs/open_loop.png from all rows
RUN is a run folder, or a file of weights, for which the run's flags are given. The agent plays evaluation episodes;
from many moments on the model alone predicts what comes, from the actions that were then taken. Its squared error is
divided by that of predicting the mean of these moments: 0 = what came true, 1 = nothing is known but the mean. Of
vectors each number is taken by itself, then the mean; of pictures the sum over all pixels. A mean prediction ends at 1
when nothing is known any more, a sampled one (the Dreamers, World Models) at 2: what is likely, and what came, vary.
"""

import csv
import functools
import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import tyro

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmark")]
TABLE = ROOT / "results/open_loop.csv"
CONTEXT, LENGTH = 5, 40  # observations before a prediction, and predicted steps (decisions)
# script: how it is called in the picture, and the horizons that it learns with (World Models: whole episodes)
LABELS = {
    "dyna_q": ("dyna_q.py\nslippery cliff", (1,)),
    "mbpo": ("mbpo.py\nPendulum", (1,)),
    "dhmbpo": ("dhmbpo.py\nHalfCheetah", (3, 20)),
    "world_models": ("world_models.py\nCarRacing, pixels", ()),
    "dreamer": ("dreamer.py\nwalker-walk, pixels", (15,)),
    "dreamer_v3": ("dreamer_v3.py\nwalker-walk, pixels", (15,)),
    "muzero": ("muzero.py\nPendulum", (5,)),
}
running = SimpleNamespace(requested=False)  # a StopRequest that nobody makes


def pieces(tracks: list[dict], length: int, every: int = 5) -> dict[str, torch.Tensor]:
    """Stretches of `length` entries from every fifth moment of the episodes on, (length, B, ...)."""
    starts = [(track, t) for track in tracks for t in range(0, len(track["reward"]) - length + 1, every)]
    stacked = {name: np.stack([track[name][t : t + length] for track, t in starts], 1) for name in tracks[0]}
    return {name: torch.from_numpy(array) for name, array in stacked.items()}


def relative_errors(truth: torch.Tensor, predicted: torch.Tensor) -> np.ndarray:
    """(K,): squared errors over the spread around the mean; truth (K, B, ...), predicted (K, [M,] B, ...)."""
    spread = ((truth - truth.mean((0, 1))) ** 2).mean((0, 1))
    error = (predicted - (truth if predicted.dim() == truth.dim() else truth[:, None])) ** 2
    error = error.flatten(1, error.dim() - truth.dim() + 1).mean(1)  # (K, ...)
    if spread.dim() > 1:  # a picture
        return (error.flatten(1).sum(1) / spread.sum()).numpy()
    varies = spread > 1e-8
    return (error[:, varies] / spread[varies]).mean(1).numpy() if truth.dim() > 2 else (error / spread).numpy()


def of_mbpo(script, args, weights) -> dict:
    """Mean predictions of each elite by itself."""
    envs = script.make_vector_env(args, 1)
    agent = script.Agent(envs.single_observation_space.shape[0], envs.single_action_space.shape[0], args)
    agent.load_state_dict(weights)
    _, episodes = script.evaluate(agent, envs, args, torch.device("cpu"), running)
    batch = pieces(
        [dict(zip(("obs", "action", "reward"), (obs[:-1], *rest), strict=True)) for obs, *rest in episodes], LENGTH + 1
    )
    state, obs, rewards = batch["obs"][0].expand(len(agent.ensemble.elites), -1, -1), [], []
    for action in batch["action"][:-1]:
        inputs = torch.cat([state, action.expand(len(state), -1, -1)], -1)
        mean, _ = agent.ensemble(inputs, agent.ensemble.elites)
        state = state + mean[..., 1:]
        obs.append(state)
        rewards.append(mean[..., 0])
    return {"observation": (batch["obs"][1:], torch.stack(obs)), "reward": (batch["reward"][:-1], torch.stack(rewards))}


def of_dhmbpo(script, args, weights) -> dict:
    """Mean predictions of each network by itself, in raw units."""
    envs = script.make_vector_env(args, 1)
    agent = script.Agent(envs.single_observation_space.shape[0], envs.single_action_space.shape[0], args)
    agent.load_state_dict(weights)
    *_, episodes = script.evaluate(agent, envs, args, torch.device("cpu"), running)
    rows = pieces([{"reward": rows} for rows in episodes], LENGTH)["reward"]
    obs, actions, rewards, next_obs = rows.split(agent.sizes[:4], -1)
    predicted, earned = script.open_loop(agent, obs[0], actions)
    return {"observation": (next_obs, predicted), "reward": (rewards[..., 0], earned[..., 0])}


def of_dreamer(script, args, weights) -> dict:
    """A sample of the dream from filtered states; what it shows is compared with what came."""
    envs = script.make_vector_env(args, script.choose_renderer(args, None), 1)
    agent = script.Agent(envs.single_observation_space, envs.single_action_space, args)
    agent.load_state_dict(weights)
    _, episodes = script.evaluate(agent, envs, args, torch.device("cpu"), running)
    generator = script.make_generator(torch.device("cpu"), args.seed, 97)
    if script.__name__ == "dreamer":
        batch = pieces(episodes, CONTEXT + LENGTH, every=10)
        batch = {name: x if x.dtype == torch.uint8 else x.float() for name, x in batch.items()}
        truth, model, reward = (x[CONTEXT:] for x in script.open_loop(agent, batch, generator, CONTEXT))
        return {"observation": (truth, model), "reward": (batch["reward"][CONTEXT:], reward)}
    episode = {name: torch.from_numpy(array) for name, array in episodes.items()}
    starts = list(range(CONTEXT, len(episode["obs"]) - LENGTH - 1, 10))
    observations, rewards = script.open_loop(agent, episode, starts, LENGTH, generator)
    return {"observation": observations, "reward": rewards}


def of_world_models(script, args, weights) -> dict:
    """A sample of M's dream, decoded, from episodes that C plays on two tracks."""
    envs = script.make_vector_env(args, 1)
    agent = script.Agent(script.make_spec(envs, args), args)
    agent.load_state_dict(weights, strict=False)  # where dreams begin is not needed
    policy = script.linear_policy(agent.controller[None], agent.model.spec.action_kind)
    policy = functools.partial(policy, jobs=torch.zeros(1, dtype=torch.long), num_jobs=1)
    generator, tracks = torch.Generator().manual_seed(args.seed), []
    for seed in (1, 2):
        obs, _ = envs.reset(seed=seed)
        state, done, track = agent.model.initial(1), np.ones(1, bool), []
        while len(track) < 400 and not (track and done[0]):
            noise = torch.randn(1, args.latent_size, generator=generator)
            action, state = script.act(agent, obs, done, state, noise, policy)
            next_obs, reward, terminations, truncations, _ = envs.step(script.env_action(action.numpy(), "car"))
            row = {"obs": obs[0], "action": action[0].numpy(), "reward": reward[0].astype(np.float32)}
            track.append(row | {"first": done[0].astype(np.float32)})
            obs, done = next_obs, terminations | truncations
        tracks.append({name: np.stack([row[name] for row in track]) for name in track[0]})
    context = 60  # frames that M has seen: the zoom at the beginning of a track is over
    batch = pieces(
        [{name: column[40:] for name, column in track.items()} for track in tracks], context + LENGTH, every=20
    )
    frames = script.preprocess(batch["obs"].flatten(0, 1))
    mu, logvar = agent.vae.encode(frames)
    z = mu + torch.exp(0.5 * logvar) * torch.randn(mu.shape, generator=generator)
    batch["z"] = z.unflatten(0, batch["reward"].shape)
    noise = torch.randn(batch["z"].shape, generator=generator)
    uniform = torch.rand(noise.shape, generator=generator)
    z = script.open_loop(agent.model, batch, uniform, noise, args.temperature, context)[context:]
    dreamed = torch.from_numpy(script.decode_frames(agent, z.flatten(0, 1))).unflatten(0, z.shape[:2])
    return {"observation": (batch["obs"][context:] / 255.0, dreamed / 255.0)}


def of_muzero(script, args, weights) -> dict:
    """Rewards of the unrolled network, which predicts no observation."""
    envs = script.make_vector_env(args, args.eval_episodes)
    agent = script.make_agent(envs, args)
    agent.load_state_dict(weights)
    script.compile_search()
    _, episodes = script.evaluate(agent, envs, args, torch.device("cpu"), lambda text: False)
    shortest = min(len(episode["obs"]) for episode in episodes)
    names = "obs", "action", "reward"
    batch = pieces([{name: episode[name][:shortest] for name in names} for episode in episodes], LENGTH + 1)
    latent, rewards = agent.initial(batch["obs"][0])[0], []
    for action in batch["action"][:-1]:
        latent, logits = agent.network.dynamics(latent, action)
        rewards.append(script.from_distribution(logits, agent.bins))
    return {"reward": (batch["reward"][:-1], torch.stack(rewards))}


def of_dyna_q(script, args, weights) -> dict:
    """Expected row and column by the table's counts, and by the environment's own table: the best there is.

    The actions are random ones here: those of a policy would give away where it was.
    """
    envs = script.make_vector_env(args, 1)
    world, model = script.known_dynamics(envs), script.load_model(weights["replay"])
    S, A = model.visits.shape[1:]
    true = script.grow(script.make_model(1, S, A))  # each pair has three outcomes, one as likely as the other
    for s, a in np.ndindex(S, A):
        for _, next_s, reward, terminated in world.P[s][a]:
            script.record(script.Model(*(array[0] for array in true)), s, a, reward, next_s, terminated, 0, False)
    rng, tracks, done = np.random.default_rng(args.seed), [], True
    for _ in range(20_000):
        if done:
            (s,), _ = envs.reset(seed=[int(rng.integers(2**31))], options={"reset_mask": np.ones(1, bool)})
            tracks.append({"obs": [], "action": [], "reward": []})
        a = rng.integers(A)
        (next_s,), reward, terminations, truncations, _ = envs.step(np.array([a]))
        for column, value in zip(tracks[-1].values(), (s, a, reward[0]), strict=True):
            column.append(value)
        s, done = next_s, terminations[0] or truncations[0]
    tracks = [{name: np.array(column) for name, column in track.items()} for track in tracks]
    batch = pieces([track for track in tracks if len(track["reward"]) > LENGTH], LENGTH + 1)
    place, found = np.stack(np.divmod(np.arange(S), world.shape[1]), 1), {}  # row and column of each state
    for name, table in (("observation", model), ("best possible", true)):
        expected = []
        for start, actions in zip(batch["obs"][0].numpy(), batch["action"][:-1].numpy().T, strict=True):
            beliefs, _ = script.open_loop(table, 0, start, actions)
            beliefs[:, -1] = 0  # the goal: these episodes went on
            expected.append(beliefs / beliefs.sum(1, keepdims=True) @ place)
        truth = torch.from_numpy(place)[batch["obs"][1:]].double()
        found[name] = truth, torch.from_numpy(np.stack(expected, 1))
    return found


@torch.no_grad()
def measure(name: str, run: str, flags: list[str]) -> None:
    script = importlib.import_module(name)
    saved = torch.load(f"{run}/checkpoint.pt" if Path(run).is_dir() else run, map_location="cpu", weights_only=True)
    if "parts" in saved:
        args, weights = script.Args(**saved["args"] | {"cuda": False}), saved["parts"]
        weights = weights if name == "dyna_q" else weights["agent"]
    else:
        args = script.with_task_defaults(tyro.cli(script.Args, args=[*flags, "--no-cuda"]))
        weights = saved.get("agent", saved)
    weights = {key: x.float() if getattr(x, "dtype", None) == torch.float16 else x for key, x in weights.items()}
    how: Callable = globals()["of_" + name.replace("dreamer_v3", "dreamer")]
    lines = open(TABLE).readlines() if TABLE.exists() else []
    comments = [line for line in lines if line.startswith("#")]
    rows = list(csv.DictReader(line for line in lines if not line.startswith("#")))
    rows = [row for row in rows if row["script"] != name]
    for what, (truth, predicted) in how(script, args, weights).items():
        errors = relative_errors(truth.float(), predicted.float())
        print(name, what, truth.shape[1], "stretches:", *(f"{k} {errors[k - 1]:.3f}" for k in (1, 5, 15, 40)))
        rows += [
            {"script": name, "task": args.env_id, "what": what, "step": k, "error": f"{e:.4f}"}
            for k, e in enumerate(errors, 1)
        ]
    with open(TABLE, "w", newline="") as file:
        file.writelines(comments)
        writer = csv.DictWriter(file, ["script", "task", "what", "step", "error"], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def draw() -> None:
    """Observations on the left, rewards on the right; dots at the horizons that a script learns with."""
    from matplotlib.figure import Figure

    curves = {}
    for row in csv.DictReader(line for line in open(TABLE) if not line.startswith("#")):
        curves.setdefault((row["script"], row["what"]), []).append(float(row["error"]))
    figure, handles = Figure(figsize=(11, 4.2), layout="constrained"), {}
    for axis, what in zip(figure.subplots(1, 2, sharey=True), ("observation", "reward"), strict=True):
        for i, (name, (label, horizons)) in enumerate(LABELS.items()):
            if (name, what) in curves:
                error = np.array(curves[name, what])
                steps = np.arange(1, len(error) + 1)
                handles[label] = axis.plot(steps, error, color=f"C{i}")[0]
                axis.plot(horizons, error[np.array(horizons, int) - 1], "o", color=f"C{i}")
            if (name, what) == ("dyna_q", "observation"):
                best = axis.plot(steps, curves[name, "best possible"], color="k", linestyle=":")[0]
                handles["the cliff's own table"] = best
        axis.axhline(1, color="k", linewidth=0.8)
        axis.text(1, 1.15, "no better than the mean", fontsize=8)
        axis.set(xscale="log", yscale="log", xlabel="decisions since the last observation", ylim=(1e-4, 40))
        axis.set_title({"observation": "what is observed", "reward": "the reward"}[what])
        axis.set_xticks([1, 2, 5, 10, 20, 40], ["1", "2", "5", "10", "20", "40"])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    figure.axes[0].set_ylabel("squared error / that of the mean")
    figure.legend(handles.values(), handles.keys(), fontsize=8, loc="outside right center")
    figure.savefig(ROOT / "docs/open_loop.png", dpi=110)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        measure(sys.argv[1], sys.argv[2], sys.argv[3:])
    else:
        draw()
