"""The GPU code of whole scripts, on a CPU that plays the GPU (pretended_gpu.py): numbers, CUDA graphs, syncs, resuming.

The last part plants bugs in copies of the scripts, each of which has to be found.
"""

import contextlib
import importlib
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from pretended_gpu import PretendedGPU
from runs import ROOT, SCRIPTS, VECTORS, differences, load, resume, run

NAMES = [name for name in SCRIPTS if name != "dyna_q"]  # which has nothing for a GPU
GRAPHED = [name for name in NAMES if name != "world_models"]

# Beside TINY of runs.py: just the updates that a graph needs to be replayed.
SETTINGS = {name: {"total_timesteps": 36} for name in GRAPHED} | {"world_models": {}}
SETTINGS["dreamer"] |= VECTORS | {"total_timesteps": 26, "train_steps": 5, "pretrain_steps": 5, "size": "laptop"}
SETTINGS["mbpo"] |= {"total_timesteps": 30, "model_batch_size": 10}
SETTINGS["muzero"] |= {"total_timesteps": 24, "replay_ratio": 0.5}

# Functions that wait for nothing and copy nothing to the GPU.
UPDATES = {
    "dreamer": ["update", "draw_noise"],
    "dreamer_v3": ["update", "draw_noise"],
    "mbpo": ["update_model", "update_policy", "holdout_errors", "model_step"],
    "dhmbpo": ["update", "minimize", "holdout_scores", "model_step"],
    "muzero": ["update", "recurrent", "bootstrap_now"],
    "world_models": ["update_vae", "update_model", "dream_step"],
}

# Where a run waits for the GPU, and nowhere else: a function, and how the statement begins.
SYNCS = {
    "dreamer": """
        act: return action.cpu().numpy()
        announce: losses["model"].item()
        ReplayBuffer.state_dict: data = {name: torch.from_numpy(
        require_finite: values = dict(zip(metrics, torch.stack(scalars).tolist()
    """,
    "dreamer_v3": """
        act: return action.cpu().numpy()
        ReplayBuffer.state_dict: data = {name: torch.from_numpy(
        require_finite: values = dict(zip(metrics, torch.stack(scalars).tolist()
    """,
    "mbpo": """
        act: return agent.actor(torch.as_tensor(obs, device=device), noise)[0].cpu().numpy()
        rollout: obs = next_obs[~terminations]
        train_model: without_improvement = 0 if improved.any()
        ReplayBuffer.state_dict: return {"rows": self.newest(len(self)).cpu()
        require_finite: values = dict(zip(metrics, torch.stack(scalars).tolist()
    """,
    "dhmbpo": """
        act: return agent.actor(obs, noise)[0].cpu().numpy()
        distribution_rollout: visited = torch.stack(path.obs)[path.alive]
        learn: return {name: float(value)
        p_value: return 0.5 * (1 + math.erf(z.item()
        train_model: train, held_out = (which.nonzero()
        RingBuffer.state_dict: return {"rows": self.newest(len(self)).cpu()
    """,
    "muzero": """
        act: reward, logits, value = decode(outputs.cpu().numpy())
        closing_rows: value = agent.initial(obs)[2].cpu()
        host: return np.ascontiguousarray(x.cpu()
        ReplayBuffer.state_dict: arrays = {name: np.ascontiguousarray(tensor[:filled].cpu()
        require_finite: values = dict(zip(metrics, torch.stack(scalars).tolist()
    """,
    "world_models": """
        encode: if not mu_logvar.isfinite().all()
        encode: run.latents.append(mu_logvar.cpu().numpy())
        log_holdout_scores: live = int(
        holdout_scores: nll.append(float(
        holdout_scores: deaths += [float(
        calibrate: dreamed, recorded = dreamed.cpu()
        decode_frames: return (agent.vae.decode(z)
        evolve: run.start = {"mean": controller.cpu()
        play_candidates: return tuple(tensor.cpu().numpy()
        require_finite: values = dict(zip(metrics, torch.stack(scalars).tolist()
    """,
}


@contextlib.contextmanager
def pretended_gpu(script):
    """The GPU, on which the script's updates must not wait."""
    with PretendedGPU() as gpu, pytest.MonkeyPatch.context() as patch:
        for name in UPDATES[script.__name__]:
            patch.setattr(script, name, gpu.no_waiting()(getattr(script, name)))
        yield gpu


def outcome(run_dir: str) -> dict:
    """What a run has made: its checkpoint, without what may differ between two devices."""
    state = load(run_dir)
    for part in state["parts"].values():
        for group in part.get("param_groups", ()) if isinstance(part, dict) else ():
            group.pop("capturable")
    return {name: state[name] for name in ("global_step", "parts", "rng")}


def largest_difference(a, b) -> float:
    """Of the numbers in two nested states that are alike otherwise."""
    if isinstance(a, dict | list | tuple):
        pairs = [(a[key], b[key]) for key in a] if isinstance(a, dict) else zip(a, b, strict=True)
        return max((largest_difference(*pair) for pair in pairs), default=0.0)
    if isinstance(a, torch.Tensor | float):
        gaps = (torch.as_tensor(a).double() - torch.as_tensor(b).double()).abs()
        return gaps.max().item() if gaps.numel() else 0.0
    return 0.0 if a == b else torch.inf


def unexpected(gpu: PretendedGPU, name: str) -> set[str]:
    """Syncs of a run that are not in its list, and lines of the list that did not come."""
    listed = {line.strip() for line in SYNCS[name].splitlines() if line.strip()}
    found = {f"{function.split('.<')[0]}: {statement}" for kind, function, statement in gpu.waits if kind == "sync"}
    new = {line for line in found if not line.startswith(tuple(listed))}
    return new | {line for line in listed if not any(other.startswith(line) for other in found)}


def some_are_slow(names: list[str], *fast: str):
    return [pytest.param(name, marks=() if name in fast else pytest.mark.slow) for name in names]


@pytest.mark.parametrize("name", some_are_slow(NAMES, "mbpo", "dreamer", "muzero"))
def test_the_gpu_gives_the_numbers_of_the_cpu_and_waits_where_it_may(name):
    """A whole run: on the CPU, on the GPU, there with CUDA graphs. Bit for bit, generators and replay included.

    Not so world_models.py on CPU and GPU: the CPU's nn.LSTM adds in another order.
    """
    script, settings = importlib.import_module(name), SETTINGS[name]
    cpu = outcome(run(script, **settings))
    with pretended_gpu(script) as gpu:
        eager = outcome(run(script, **settings, cuda=True))
    assert unexpected(gpu, name) == set()
    if name == "world_models":
        assert 0 < largest_difference(cpu, eager) < 1e-6
    else:
        assert differences(cpu, eager) == []
    if name in GRAPHED:
        with pretended_gpu(script) as gpu:
            graphs = outcome(run(script, **settings, cuda=True, cudagraphs=True))
        assert gpu.replays > 0 and unexpected(gpu, name) == set()
        assert differences(eager, graphs) == []


@pytest.mark.parametrize("name", some_are_slow(GRAPHED, "mbpo"))
def test_a_run_goes_to_a_gpu_and_back(name):
    """Begun on a CPU, continued with CUDA graphs, ended on a CPU: as if it had never moved."""
    script, settings = importlib.import_module(name), SETTINGS[name]
    whole = outcome(run(script, **settings | {"total_timesteps": 60}))
    run_dir = run(script, **settings | {"total_timesteps": 24})
    with pretended_gpu(script) as gpu:
        resume(script, run_dir, **settings | {"total_timesteps": 48}, cuda=True, cudagraphs=True)
    assert gpu.replays > 0
    resume(script, run_dir, **settings | {"total_timesteps": 60})
    assert differences(whole, outcome(run_dir)) == []


VARIANTS = {
    "dreamer, pixels in host memory": ("dreamer", {"env_id": "fake_envs:TinyPixels-v0", "buffer_on_gpu": False}),
    "dreamer, discrete": ("dreamer", {"env_id": "fake_envs:DiscreteCounter-v0"}),
    "dreamer_v3, pixels": ("dreamer_v3", {"env_id": "fake_envs:CalmPixelsDiscrete-v0", "buffer_on_gpu": False}),
    "dreamer_v3, continuous": ("dreamer_v3", {"env_id": "fake_envs:Counter-v0"}),
    "mbpo, long rollouts": ("mbpo", {"rollout_schedule": (0, 3, 1, 4), "model_retain_epochs": 2}),
    "mbpo, two environments": ("mbpo", {"num_envs": 2}),
    "muzero, pUCT": ("muzero", {"search": "puct", "priority_alpha": 0.5}),
    "muzero, reanalyzed": ("muzero", {"reanalyze_ratio": 0.5, "consistency_scale": 1.0}),
    "muzero, continuous": ("muzero", {"env_id": "fake_envs:Counter-v0"}),
    "muzero, pixels": ("muzero", {"env_id": "fake_envs:CalmPixelsDiscrete-v0", "unroll_steps": 1}),
    "world_models, C in the environment": ("world_models", {"controller_env": "real"}),
}


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_give_the_numbers_of_the_cpu(variant):
    """What else the scripts can do, evaluations included."""
    name, changes = VARIANTS[variant]
    script, settings = importlib.import_module(name), SETTINGS[name] | changes | {"eval_frequency": 12}
    cpu, bound = outcome(run(script, **settings)), 0.0 if name in GRAPHED else 1e-5  # float32 returns of 32 to 64
    for ways in [{}, {"cudagraphs": True}] if name in GRAPHED else [{}]:
        with pretended_gpu(script):
            assert largest_difference(cpu, outcome(run(script, **settings, cuda=True, **ways))) <= bound


@pytest.mark.slow
def test_the_stages_of_world_models_go_to_a_gpu():
    """M and C learned again on a GPU from what a CPU has recorded, and there again on a CPU."""
    script = importlib.import_module("world_models")
    run_dir = run(script)
    cpu = outcome(run_dir)
    with pretended_gpu(script):
        resume(script, run_dir, cuda=True, from_stage="m")
    assert largest_difference(cpu, outcome(run_dir)) < 1e-6
    resume(script, run_dir, from_stage="m")
    assert differences(cpu, outcome(run_dir)) == []


# === The pretended GPU itself ===


def on_gpu(*numbers: float) -> torch.Tensor:
    return torch.tensor(numbers, device="cuda")


def captured(function, *generators) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    for generator in generators:
        graph.register_generator_state(generator)
    with torch.cuda.graph(graph):
        function()
    return graph


def read_elsewhere() -> None:
    x = on_gpu(1.0)
    with torch.cuda.stream(torch.cuda.Stream()):
        x.add(1)


REFUSED = {
    "two devices": (lambda x: x + torch.ones(2), "same device"),
    "two devices, in place": (lambda x: torch.ones(2).add_(x[0]), "same device"),
    "an operand of a product": (lambda x: torch.addmm(x, torch.ones(1, 2), torch.ones(2, 2)), "same device"),
    "numpy": (lambda x: x.numpy(), "cpu"),
    "a CPU's generator": (lambda x: x.normal_(generator=torch.Generator()), "generator"),
    "a GPU's generator": (lambda x: torch.rand(2, generator=torch.Generator("cuda")), "generator"),
    "another stream": (lambda x: read_elsewhere(), "no wait_stream"),
    "item in a capture": (lambda x: captured(lambda: x.sum().item()), "sync in a capture"),
    "a mask in a capture": (lambda x: captured(lambda: x[x > 1]), "sync in a capture"),
    "a constant in a capture": (lambda x: captured(lambda: on_gpu(1.0)), "upload in a capture"),
    "a stored number in a capture": (lambda x: captured(lambda: x.__setitem__(x.long() - 1, 0.0)), "upload"),
    "an unknown generator": (
        lambda x: captured(lambda: torch.rand(2, generator=torch.Generator("cuda"), device="cuda")), "does not know",
    ),
    "Adam in a capture": (
        lambda x: captured(torch.optim.Adam([{"params": [with_gradient(x)]}], fused=True).step), "capturable",
    ),
}  # fmt: skip


def with_gradient(x: torch.Tensor) -> torch.nn.Parameter:
    parameter = torch.nn.Parameter(x)
    parameter.grad = torch.ones_like(x)
    return parameter


@pytest.mark.parametrize("kind", REFUSED)
def test_what_a_gpu_refuses_is_refused(kind):
    function, words = REFUSED[kind]
    with PretendedGPU(), pytest.raises((RuntimeError, TypeError), match=words):
        function(on_gpu(1.0, 2.0))


def test_what_a_gpu_allows_is_allowed():
    """Numbers and scalars of the CPU as operands; masks that only fill; what is waited for is counted."""
    with PretendedGPU() as gpu:
        x = on_gpu(1.0, 2.0)
        assert x.device == torch.device("cuda", 0) and x.is_cuda and not x.is_cpu
        with gpu.no_waiting():
            y = x * torch.tensor(3.0) + 1
            y[y > 5] = 5.0
        assert not any(kind == "sync" for kind, *_ in gpu.waits)
        assert y.tolist() == [4.0, 5.0] and x[x > 1].cpu().numpy() == [2.0]
        with pytest.raises(RuntimeError, match="sync where none may be"), gpu.no_waiting():
            x.sum().item()
        statements = {statement for kind, _, statement in gpu.waits if kind == "sync"}
        assert len(statements) == 2 and all("x" in statement for statement in statements)


def test_a_graph_replays_what_was_recorded():
    """Not executed when recorded; the same memory, frozen numbers, overwritten results, generators that go on."""
    with PretendedGPU():
        factor, x, total, results = 2.0, on_gpu(1.0), on_gpu(0.0), []
        generator = torch.Generator("cuda").manual_seed(1)
        expected = torch.rand(2, generator=torch.Generator().manual_seed(1)).tolist()

        def function() -> None:
            results.append((factor * x, torch.rand(1, generator=generator, device="cuda")))
            total.add_(results[0][0])

        graph = captured(function, generator)
        assert torch.isnan(results[0][0]).item() and total.item() == 0
        for i, (number, sum_so_far) in enumerate([(2.0, 2.0), (6.0, 8.0)]):
            graph.replay()
            assert [results[0][0].item(), total.item(), results[0][1].item()] == [number, sum_so_far, expected[i]]
            factor = 100.0
            x.copy_(on_gpu(3.0))
        x = on_gpu(7.0)  # another tensor, which the graph does not know
        graph.replay()
        assert results[0][0].item() == 6


# === Planted bugs ===


CAPTURABLE = """                for group in part.param_groups:  # of this device, not of the one that saved it
                    group["capturable"] = self.device.type == "cuda"
"""
LOSSES = "    losses, metrics = compute_losses(agent, batch, noise, args, functions)\n"
CONSTANT = "    constant = math.log(std) + 0.5 * math.log(2 * math.pi)\n"
GENERATOR = """    generator = torch.Generator(batch["obs"].device)
    noise["post"] = torch.randn(noise["post"].shape, generator=generator, device=generator.device)
"""
REGISTER = "                self.graph.register_generator_state(generator)\n"

# What is wrong: script, text, what stands in its place, what is said.
PLANTED = {
    "an item in an update": ("dreamer", LOSSES, LOSSES + '    metrics["a"] = losses["model"].item()\n', "sync where"),
    "an operand on the CPU": (
        "dreamer", "    returns, last = [], values[-1]\n",
        "    returns, last = [], values[-1] + torch.zeros(len(values[-1]))\n", "same device",
    ),
    "a constant made in an update": (
        "dreamer", CONSTANT, CONSTANT + "    constant = torch.tensor(constant, device=pred.device)\n", "upload where",
    ),
    "a boolean mask": (
        "dreamer", LOSSES, LOSSES + '    metrics["a"] = batch["reward"][batch["cont"] > 0].mean()\n', "sync where",
    ),
    "a generator that the graph does not know": ("dreamer", LOSSES, GENERATOR + LOSSES, "does not know"),
    "the side stream does not wait": (
        "dreamer", "            self.stream.wait_stream(torch.cuda.current_stream())\n", "", "no wait_stream",
    ),
    "nobody waits for the side stream": (
        "mbpo", "            torch.cuda.current_stream().wait_stream(self.stream)\n", "", "no wait_stream",
    ),
    "a learning rate that Python changes": (
        "dreamer", LOSSES, '    optimizers["model"].param_groups[0]["lr"] *= 0.9\n' + LOSSES, "graphs differ",
    ),
    "inputs that are not copied into the graph": (
        "dreamer", "            static.copy_(new)\n", "            pass\n", "graphs differ",
    ),
    "a CPU's optimizer on a GPU": ("mbpo", CAPTURABLE, "", "capturable"),
    "generators that are not registered": (
        "dhmbpo", REGISTER, REGISTER.replace("self.graph.register_generator_state(generator)", "pass"), "does not know",
    ),
    "the search's stream": (
        "muzero", "            stream.wait_stream(torch.cuda.current_stream())\n", "", "no wait_stream",
    ),
}  # fmt: skip


def fault_of(script) -> str:
    """What is wrong with a script on a GPU, in the words of the first complaint; "" if nothing is."""
    settings = SETTINGS[script.__name__]
    try:
        with pretended_gpu(script):
            eager = outcome(run(script, **settings, cuda=True))
            graphs = outcome(run(script, **settings, cuda=True, cudagraphs=True))
            run_dir = run(script, **settings | {"total_timesteps": 24})
            resume(script, run_dir, **settings, cuda=True, cudagraphs=True)
    except RuntimeError as error:
        return str(error)
    return "graphs differ from eager" if differences(eager, graphs) else ""


@pytest.mark.slow
@pytest.mark.parametrize("bug", [None, *PLANTED])
def test_planted_bugs_are_found(bug, tmp_path, monkeypatch):
    """Each in a copy of a script, in which nothing is found before."""
    name, old, new, words = PLANTED.get(bug, ("dreamer", "", "", ""))
    text = (ROOT / f"{name}.py").read_text()
    assert text.count(old) == 1 or bug is None
    path = tmp_path / f"{name}.py"
    path.write_text(text.replace(old, new) if bug else text)
    spec = importlib.util.spec_from_file_location(name, path)
    script = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, script)
    spec.loader.exec_module(script)
    found = fault_of(script)
    assert words in found and bool(found) == bool(bug), found


# === The commands for a GPU ===


@pytest.mark.slow
def test_the_commands_for_a_gpu_run_dry(tmp_path):
    """benchmark/gpu.sh on a CPU, some of its lines: how each ended, the table, and that nothing is done twice."""
    for path in [*ROOT.glob("*.py"), ROOT / "benchmark"]:
        (tmp_path / path.name).symlink_to(path)
    paths = os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]])
    lines = ["machine.gpu", "mbpo.eager", "mbpo.graphs", "moved.begun_on_cpu", "moved.on_gpu", "moved.back_on_cpu"]
    command = ["bash", "benchmark/gpu.sh", "out", f"^({'|'.join(lines)})$"]
    first, second = (
        subprocess.run(
            command, env=os.environ | {"DRY": "40", "PATH": paths}, capture_output=True, text=True, check=True
        )
        for _ in range(2)
    )
    assert {name: Path(f"out/{name}.code").read_text() for name in lines} == dict.fromkeys(lines, "0\n")
    assert [line.split(":")[0] for line in first.stdout.splitlines() if ": python" in line] == lines
    assert ": python" not in second.stdout
    rows = [line.strip("| ").split(" | ") for line in Path("out/table.md").read_text().splitlines()[2:]]
    table = {row[0]: row[1:] for row in rows}
    assert float(table["mbpo.eager"][2]) == pytest.approx(20 * float(table["mbpo.eager"][1]), rel=1e-3)
    assert float(table["mbpo.eager"][3]) == 1 and float(table["mbpo.graphs"][3]) > 0
    assert table["muzero.eager"][0] == "not run"
    assert "checkpoint at step 42" in Path("out/moved.back_on_cpu.log").read_text()
