"""Seconds per DreamerV3 update of dreamer_v3.py and of two other PyTorch implementations, one after the other in turns.

Run (from the repository root):  python benchmark/dreamer_v3_speed.py --r2dreamer CHECKOUT --sheeprl
CHECKOUT is a clone of github.com/NM512/r2dreamer (needs tensordict, omegaconf); --sheeprl needs sheeprl >= 0.8.4
installed. All have the same sizes, see the same random batch, compute in float32, dream from every state.
"""

import contextlib
import importlib
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import gymnasium as gym
import numpy as np
import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import dreamer_v3

ACTIONS, NUMBERS = 6, 24  # of walker-walk


@dataclass
class Args:
    r2dreamer: str | None = None  # folder with a clone of r2dreamer
    sheeprl: bool = False  # time sheeprl, too
    size: Literal["laptop", "1m", "12m", "25m", "50m", "100m", "200m", "400m"] = "1m"  # of all networks
    obs_mode: Literal["pixels", "state"] = "pixels"  # 64x64 pictures or 24 numbers
    batch_size: int = 16  # sequences per batch (B)
    batch_length: int = 64  # time steps per sequence (T)
    imag_last: int = 0  # dream from the last so many states of each sequence (dreamer_v3.py alone), 0 = all
    updates: int = 10  # timed updates of each, after three that are not
    threads: int = 1  # CPU threads
    cuda: bool = True  # use the GPU if there is one (dreamer_v3.py alone)
    bfloat16: bool = False  # dreamer_v3.py's flag of this name
    compile: bool = False  # dreamer_v3.py's flag of this name
    cudagraphs: bool = False  # dreamer_v3.py's flag of this name
    keep: bool = True  # keep freed memory, as a run on a CPU does; for all implementations


def ours(bench: Args, batch: dict) -> tuple[Callable, int]:
    """An update that waits for its end, and the number of parameters that it moves."""
    names = "size batch_size batch_length imag_last cuda bfloat16 compile cudagraphs".split()
    args = dreamer_v3.Args(**{name: getattr(bench, name) for name in names})
    device = dreamer_v3.choose_device(args)
    space = gym.spaces.Box(0, 255, (64, 64, 3), np.uint8)
    if bench.obs_mode == "state":
        space = gym.spaces.Box(-np.inf, np.inf, (NUMBERS,), np.float32)
    agent = dreamer_v3.Agent(space, gym.spaces.Box(-1, 1, (ACTIONS,), np.float32), args).to(device)
    optimizer, generator = dreamer_v3.LaProp(agent, args), torch.Generator(device)
    update = dreamer_v3.make_update(agent, optimizer, args)
    deter = torch.zeros(bench.batch_size, dreamer_v3.SIZES[bench.size].deter)
    stoch = torch.zeros(bench.batch_size, dreamer_v3.STOCH, dtype=torch.uint8)
    batch = {name: tensor.to(device) for name, tensor in (batch | {"deter": deter, "stoch": stoch}).items()}

    def step() -> None:
        metrics, _ = update(batch, dreamer_v3.draw_noise(agent, args, generator))
        metrics["losses/dyn_loss"].item()

    return step, sum(optimizer.sizes)


def r2dreamer(bench: Args, batch: dict) -> tuple[Callable, int]:
    """Its own update with the decoder's loss, without float16, from a replay that always has this batch."""
    sys.path.insert(0, bench.r2dreamer)
    from omegaconf import OmegaConf
    from tensordict import TensorDict

    theirs = importlib.import_module("dreamer")  # the clone's
    size, key = dreamer_v3.SIZES[bench.size], "image" if bench.obs_mode == "pixels" else "numbers"
    model = OmegaConf.load(f"{bench.r2dreamer}/configs/model/_base_.yaml")
    model |= {"deter": size.deter, "hidden": size.units, "units": size.units, "discrete": size.classes}
    model |= {"depth": size.depth, "act": "SiLU", "norm": True, "rep_loss": "dreamer", "compile": False}
    keys = {"cnn_keys": "image", "mlp_keys": "numbers"}
    config = OmegaConf.create({"model": model, "env": {"encoder": keys, "decoder": keys}, "device": "cpu"})
    theirs.autocast = lambda **settings: contextlib.nullcontext()
    spaces = gym.spaces.Dict({key: gym.spaces.Box(-np.inf, np.inf, batch["obs"].shape[2:])})
    agent = theirs.Dreamer(config.model, spaces, gym.spaces.Box(-1, 1, (ACTIONS,)))
    columns = {key: batch["obs"], "action": batch["action"], "reward": batch["reward"][..., None]}
    columns |= {name: torch.zeros_like(columns["reward"], dtype=torch.bool) for name in ("is_last", "is_terminal")}
    columns["is_first"] = torch.zeros_like(batch["reward"], dtype=torch.bool)
    columns = {name: tensor.transpose(0, 1).contiguous() for name, tensor in columns.items()}

    class Replay:
        def sample(self):
            shape = bench.batch_size, bench.batch_length
            return TensorDict(dict(columns), batch_size=shape), None, agent.rssm.initial(bench.batch_size)

        def update(self, index, stoch, deter):
            pass

    return lambda: agent.update(Replay()), sum(parameter.numel() for parameter in agent._named_params.values())


def sheeprl(bench: Args, batch: dict) -> tuple[Callable, int]:
    """Its own gradient step and slow critic, on a batch with the entry of the latents before it."""
    import hydra
    from lightning.fabric import Fabric
    from sheeprl.algos.dreamer_v3_5 import agent as agents
    from sheeprl.algos.dreamer_v3_5 import dreamer_v3_5 as theirs

    pixels, size = bench.obs_mode == "pixels", dreamer_v3.SIZES[bench.size]
    encoded = ["algo.cnn_keys.encoder=[rgb]", "algo.mlp_keys.encoder=[]"]
    if not pixels:
        encoded = ["algo.cnn_keys.encoder=[]", "algo.mlp_keys.encoder=[x]"]
    widths = [f"algo.dense_units={size.units}", f"algo.cnn_channels_multiplier={size.depth}"]
    widths += [f"algo.world_model.discrete_size={size.classes}"]
    widths += [f"algo.world_model.recurrent_model.recurrent_state_size={size.deter}"]
    widths += [f"algo.world_model.recurrent_model.hidden_size={size.units}"]
    with hydra.initialize_config_module("sheeprl.configs", version_base="1.3"):
        config = hydra.compose("config", ["exp=dreamer_v3_5_dmc_walker_walk", *encoded, *widths])
    config = theirs.dotdict(config)
    fabric, kind = Fabric(accelerator="cpu", devices=1), "rgb" if pixels else "x"
    obs = batch["obs"].movedim(-1, 2) if pixels else batch["obs"]
    spaces = gym.spaces.Dict({kind: gym.spaces.Box(-np.inf, np.inf, obs.shape[2:])})
    models = agents.build_agent(fabric, (ACTIONS,), True, config, spaces)[:4]
    learned = [parameter for model in models[:3] for parameter in model.parameters()]
    optimizer = fabric.setup_optimizers(hydra.utils.instantiate(config.algo.optimizer, params=learned, _convert_="all"))
    moments = theirs.Moments(0.99, 1.0, 0.05, 0.95)
    rows = torch.arange(-1, bench.batch_length).clamp(min=0)  # an entry before the first
    zeros = torch.zeros(bench.batch_length, bench.batch_size, 1)
    data = {kind: obs, "actions": batch["action"], "rewards": batch["reward"][..., None]}
    data |= {"is_first": zeros, "terminated": zeros, "truncated": zeros}
    data |= {"deter": zeros.expand(-1, -1, size.deter), "stoch": zeros.expand(-1, -1, dreamer_v3.STOCH)}
    data = {name: tensor[rows] for name, tensor in data.items()}

    def step() -> None:
        theirs.train(fabric, config, *models, optimizer, moments, data, None, (ACTIONS,))
        theirs.update_target_critic(models[2], models[3], 0.02)

    return step, sum(parameter.numel() for parameter in learned)


def main(bench: Args) -> None:
    torch.set_num_threads(bench.threads)
    if bench.keep:
        dreamer_v3.keep_freed_memory(torch.device("cuda" if bench.cuda and torch.cuda.is_available() else "cpu"))
    torch.manual_seed(1)
    shape = bench.batch_length, bench.batch_size
    obs = torch.randn(*shape, NUMBERS)
    if bench.obs_mode == "pixels":
        obs = torch.randint(256, (*shape, 64, 64, 3), dtype=torch.uint8)
    batch = {"obs": obs, "action": torch.randn(*shape, ACTIONS), "reward": torch.randn(shape)}
    batch |= {"cont": torch.ones(shape), "is_first": torch.zeros(shape)}
    made = {"dreamer_v3.py": ours(bench, batch)}
    if bench.r2dreamer:
        with contextlib.redirect_stdout(sys.stderr):
            made["r2dreamer"] = r2dreamer(bench, batch)
    if bench.sheeprl:
        made["sheeprl"] = sheeprl(bench, batch)
    wall, cpu = {name: [] for name in made}, {name: [] for name in made}
    for _ in range(3 + bench.updates):
        for name, (step, _) in made.items():
            start = time.perf_counter(), time.process_time()
            step()
            wall[name].append(time.perf_counter() - start[0])
            cpu[name].append(time.process_time() - start[1])
    result = {"torch": torch.__version__, "load": os.getloadavg()[0], "settings": asdict(bench), "updates": {}}
    for name, (_, parameters) in made.items():
        seconds, own = wall[name][3:], statistics.median(cpu[name][3:])
        result["updates"][name] = {"parameters": parameters, "seconds_median": statistics.median(seconds)}
        result["updates"][name] |= {"seconds_min": min(seconds), "cpu_seconds_median": own}
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main(tyro.cli(Args))
