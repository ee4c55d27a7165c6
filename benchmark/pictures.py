"""The moving pictures of the README and two of the World Models page, written into docs/.

Run:  python benchmark/pictures.py maze                              dyna_q_maze.gif: without and with planning
      python benchmark/pictures.py board RUN                         muzero_tictactoe.gif: what the search visits
      python benchmark/pictures.py dream WEIGHTS [flags of the run]  world_models_dream.gif: the game and the dream
      python benchmark/pictures.py takecover FOLDER                  world_models_takecover_*.png: a run folder has them
      python benchmark/pictures.py film VIDEO NAME FIRST LAST EVERY LEFT TOP SIZE    NAME: a square of frames
RUN is a run folder of muzero.py, FOLDER one of world_models.py, WEIGHTS a round_N.pt of world_models.py, VIDEO an MP4
that --capture-video has written.
"""

import functools
import sys
from pathlib import Path

import numpy as np
import torch
import tyro
from PIL import Image, ImageDraw, ImageFont

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmark")]
MOVES = (0, -1), (0, 1), (-1, 0), (1, 0)  # of the maze's actions: up, down, left, right
FONT, SMALL = (ImageFont.load_default(size) for size in (14, 11))


def save(name: str, frames: list[Image.Image], milliseconds: int | list[int]) -> None:
    """A GIF of 64 colours that are the same in all frames, so that what stands still costs nothing."""
    palette = frames[len(frames) // 2].quantize(64)
    first, *others = (frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames)
    path = ROOT / "docs" / name
    first.save(path, save_all=True, append_images=others, duration=milliseconds, loop=0, optimize=True)
    print(path, f"{path.stat().st_size / 1e3:.0f} KB, {len(frames)} frames")


def maze_panel(trial, title: str, cell: int = 28) -> Image.Image:
    """The maze with max Q of each cell as its colour, arrows where an action is known to be better, and the learner."""
    grid, q = trial.envs.unwrapped.grids[0], trial.q[0]
    rows, columns = grid.shape
    image = Image.new("RGB", (columns * cell + 1, rows * cell + 42), "white")
    pen = ImageDraw.Draw(image)
    pen.text((2, 2), title, "black", FONT)
    for s, (y, x) in enumerate(np.ndindex(rows, columns)):
        box = (x * cell, y * cell + 22, (x + 1) * cell, (y + 1) * cell + 22)
        value = q[s].max()
        colors = {"#": (40, 40, 40), "G": (90, 190, 90)}
        color = tuple(round(255 - by * value) for by in (175, 135, 0)) if value > 1e-6 else (250, 250, 250)
        pen.rectangle(box, colors.get(grid[y, x], color), (215, 215, 215))
        if grid[y, x] not in "#G" and value - q[s].min() > 1e-6:
            dx, dy = MOVES[int(q[s].argmax())]
            cx, cy = box[0] + cell / 2, box[1] + cell / 2
            tip, base = (cx + 8 * dx, cy + 8 * dy), (cx - 4 * dx, cy - 4 * dy)
            pen.polygon(
                [tip, (base[0] + 5 * dy, base[1] + 5 * dx), (base[0] - 5 * dy, base[1] - 5 * dx)], (30, 60, 150)
            )
    y, x = divmod(int(trial.obs[0]), columns)
    pen.ellipse((x * cell + 8, y * cell + 30, x * cell + cell - 8, y * cell + cell + 14), (230, 90, 40))
    return image


def maze(until: int = 540) -> None:
    """Two learners with the same random numbers and real steps; one of them plans 50 updates a step."""
    import dyna_q_figures

    trials = [
        dyna_q_figures.Trial(env_id="DynaMaze-v0", planning_steps=n, seed=9) for n in (0, 50)
    ]  # equal until the goal is found
    ended, frames, since = [[], []], [], [0, 0]
    for step in range(1, until + 1):
        for i, trial in enumerate(trials):
            trial.step()
            since[i] += 1
            if trial.dones[0]:
                ended[i].append(since[i])
                since[i] = 0
        if step % (3 if ended[1] else 25) == 0:
            panels = []
            for trial, n, lengths in zip(trials, (0, 50), ended, strict=True):
                panel = maze_panel(trial, f"n = {n}" + (": real steps alone" if n == 0 else " planned updates a step"))
                text = f"real step {step}; newest episodes: " + ", ".join(map(str, lengths[-4:]))
                ImageDraw.Draw(panel).text((2, panel.height - 18), text, "black", SMALL)
                panels.append(panel)
            frame = Image.new("RGB", (2 * panels[0].width + 16, panels[0].height), "white")
            frame.paste(panels[0], (0, 0))
            frame.paste(panels[1], (panels[0].width + 16, 0))
            frames.append(frame)
    save("dyna_q_maze.gif", frames, [*[110] * (len(frames) - 1), 2500])


def board(run: str, games: int = 3, size: int = 240) -> None:
    """Games against a random player: before each move of the agent the visits of its search in the empty cells."""
    import muzero

    saved = torch.load(f"{run}/checkpoint.pt", map_location="cpu", weights_only=True)
    args = muzero.Args(**saved["args"] | {"cuda": False})
    game = muzero.make_vector_env(args, 1)
    agent = muzero.load_agent(game, args, saved)
    rng, frames, times, cell = np.random.default_rng(3), [], [], size // 3

    def draw(text: str, visits=None) -> None:
        image = Image.new("RGB", (size + 1, size + 27), "white")
        pen = ImageDraw.Draw(image)
        pen.text((4, size + 7), text, "black", FONT)
        marks = "XO" if game.moves[0] % 2 == 0 else "OX"
        for i, (mine, other) in enumerate(game.stones[0].T.tolist()):
            y, x = divmod(i, 3)
            box = (x * cell, y * cell, (x + 1) * cell, (y + 1) * cell)
            share = visits[i] / max(visits) if visits else 0
            pen.rectangle(box, tuple(round(255 - share * d) for d in (190, 110, 10)), (150, 150, 150))
            if mine or other:
                mark, inner = marks[0] if mine else marks[1], [box[0] + 18, box[1] + 18, box[2] - 18, box[3] - 18]
                if mark == "O":
                    pen.ellipse(inner, outline=(200, 80, 40), width=6)
                else:
                    pen.line(inner, (40, 40, 40), 7)
                    pen.line((inner[0], inner[3], inner[2], inner[1]), (40, 40, 40), 7)
            elif visits and visits[i]:
                pen.text((box[0] + cell / 2, box[1] + cell / 2), str(visits[i]), "black", FONT, "mm")
        frames.append(image)
        times.append(1500 if visits else 900)

    for number in range(games):
        obs, infos = game.reset()
        seat, result = number % 2, "a draw"
        for move in range(9):
            legal = muzero.legal_actions(infos, np.ones((1, 9), bool))
            if move % 2 == seat:
                found = muzero.act(agent, torch.as_tensor(obs), torch.as_tensor(legal), None, None, args)
                visits, action = found.visit_counts[0].long().tolist(), found.action.item()
                draw(f"MuZero ({'XO'[seat]}) searches: {sum(visits)} visits", visits)
            else:
                draw("a random player moves")
                action = int(rng.choice(np.flatnonzero(legal[0])))
            obs, rewards, terminations, _, infos = game.step(np.array([action]))
            if terminations[0]:
                result = result if not rewards[0] else "MuZero wins" if move % 2 == seat else "MuZero loses"
                break
        draw(f"{result}")
        times[-1] = 2000
        print(result)
    save("muzero_tictactoe.gif", frames, times)


@torch.no_grad()
def dream(path: str, flags: list[str], warm_up: int = 60, length: int = 110) -> None:
    """C drives on a track; from frame `warm_up` on also in M's dream of that moment, which sees no frame more."""
    import world_models as wm

    args = wm.with_task_defaults(tyro.cli(wm.Args, args=[*flags, "--no-cuda"]))
    envs = wm.make_vector_env(args, 1)
    agent = wm.Agent(wm.make_spec(envs, args), args)
    agent.load_state_dict(torch.load(path, map_location="cpu", weights_only=True), strict=False)
    model, kind = agent.model, agent.model.spec.action_kind
    policy, generator = wm.linear_policy(agent.controller[None], kind), torch.Generator().manual_seed(args.seed)
    policy = functools.partial(policy, jobs=torch.zeros(1, dtype=torch.long), num_jobs=1)

    def normal() -> torch.Tensor:
        return torch.randn(1, args.latent_size, generator=generator)

    obs, _ = envs.reset(seed=args.seed)
    state, done, seen, dreamed, total = model.initial(1), np.ones(1, bool), [], [], 0.0
    for t in range(warm_up + length):
        if t == warm_up:
            mu, _ = agent.vae.encode(wm.preprocess(torch.as_tensor(obs)))
            z, inner = mu, state
        if t >= warm_up:
            seen.append(obs[0])
            dreamed.append(wm.decode_frames(agent, z)[0])
            action, uniform = policy(agent.features(z, inner)), torch.rand(1, args.latent_size, generator=generator)
            z, inner, *_ = wm.dream_step(model, z, action, torch.zeros(1), inner, uniform, normal(), args.temperature)
        action, state = wm.act(agent, obs, done, state, normal(), policy)
        obs, reward, terminations, truncations, _ = envs.step(wm.env_action(action.numpy(), kind))
        done, total = terminations | truncations, total + reward[0]
        if done[0]:
            break
    print(f"return: {total:.0f}")
    frames = []
    for real, own in zip(seen, dreamed, strict=True):
        frame = Image.new("RGB", (400, 214), "white")
        for x, picture, text in ((0, real, "the game"), (208, own, "its dream")):
            frame.paste(Image.fromarray(wm.enlarged(picture[None], 3)[0]), (x, 22))
            ImageDraw.Draw(frame).text((x + 2, 2), text, "black", FONT)
        frames.append(frame)
    save("world_models_dream.gif", frames, 80)


def takecover(run: str, steps: tuple[int, ...] = (0, 30, 60, 80, 95), context: int = 5) -> None:
    """A run's newest reconstructions, and its newest open loop some steps after the last observation, row by row."""

    def newest(pattern: str) -> Image.Image:
        return Image.open(max(Path(run).glob(pattern), key=lambda path: int(path.stem.split("_")[-1])))

    newest("reconstructions_*.png").save(ROOT / "docs/world_models_takecover_reconstructions.png")
    film, rows = newest("open_loop_[0-9]*.gif"), []
    for step in steps:
        film.seek(context - 1 + step)
        rows.append(film.convert("RGB").resize((film.width // 2, film.height // 2), Image.Resampling.NEAREST))
    high = rows[0].height + 6
    image = Image.new("RGB", (rows[0].width, high * len(rows) - 6), "white")
    for i, row in enumerate(rows):
        image.paste(row, (0, i * high))
    image.save(ROOT / "docs/world_models_takecover_open_loop.png")


def film(video: str, name: str, first: int, last: int, every: int, left: int, top: int, size: int) -> None:
    """Every so many frames from first to last, a square of each; no faster and no slower than they were."""
    from moviepy import VideoFileClip

    with VideoFileClip(video) as clip:
        frames = [Image.fromarray(frame) for i, frame in enumerate(clip.iter_frames()) if first <= i < last]
        pause = round(1000 * every / clip.fps)
    box = left, top, left + size, top + size
    save(name, [frame.resize((240, 240), Image.Resampling.LANCZOS, box) for frame in frames[::every]], pause)


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["maze"]:
            maze()
        case ["board", run]:
            board(run)
        case ["dream", weights, *flags]:
            dream(weights, flags)
        case ["takecover", folder]:
            takecover(folder)
        case ["film", video, name, *numbers]:
            film(video, name, *map(int, numbers))
        case _:
            sys.exit(__doc__)
