"""Several processes that train one agent, as torchrun starts them: what they do together and what they leave behind."""

import functools
import multiprocessing
import os
import pickle
import re
import signal
import socket
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import test_dreamer
import test_dreamer_v3
import test_muzero
import torch
from runs import ROOT, TINY, TRAITS, copy_of, differences, error_of, flags_of, hear_signals, load, scalars, wait_for

import dreamer
import dreamer_v3
import muzero

SCRIPTS = {"dreamer": dreamer, "dreamer_v3": dreamer_v3, "muzero": muzero}
each_learner = pytest.mark.parametrize("learner", SCRIPTS.values(), ids=SCRIPTS)
learners = [dreamer, dreamer_v3, pytest.param(muzero, marks=pytest.mark.slow)]
each_in_time = pytest.mark.parametrize("learner", learners, ids=SCRIPTS)  # some stand for all where seconds count
WORLD = 2
LOST = "Connection (closed|reset)"  # what a process says whose neighbour has gone


def settings(learner, **changes) -> dict:
    """A tiny run of two environments, one for each process: several checkpoints, all at ends of episodes."""
    common = {"num_envs": WORLD, "batch_size": 4, "total_timesteps": 96, "eval_frequency": 48}
    return TINY[learner.__name__] | TRAITS[learner.__name__]["quick"] | common | changes


@pytest.fixture
def float64(monkeypatch):
    """Back to float32 after a test that computes in float64."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.float)
    yield
    torch.set_default_dtype(torch.float32)


# === Two processes without torchrun: forked, with the variables that it sets ===


def as_rank(rank: int, port: int, folder: str, function) -> None:
    """In a process of its own: function(rank), whose result, or last words, becomes a file."""
    torch.set_num_threads(1)
    os.chdir(folder)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(WORLD)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    try:
        result = function(rank)
    except BaseException as error:
        result = f"{type(error).__name__}: {error}"
    Path(f"rank{rank}.result").write_bytes(pickle.dumps(result))


def in_two(function) -> list:
    """What function(rank) returns, for each rank; None if it was killed."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    context, results = multiprocessing.get_context("forkserver"), []
    ranks = [context.Process(target=as_rank, args=(i, port, os.getcwd(), function)) for i in range(WORLD)]
    for process in ranks:
        process.start()
    for rank, process in enumerate(ranks):
        process.join(180)
        process.kill()
        path = Path(f"rank{rank}.result")
        results.append(pickle.loads(path.read_bytes()) if path.exists() else None)
        path.unlink(missing_ok=True)
    return results


def main_of(name: str, changes: dict, plant, rank: int) -> str:
    """A whole run; returns its folder. plant(learner, rank) may change the script before."""
    learner = SCRIPTS[name]
    if plant is not None:
        plant(learner, rank)
    return os.path.abspath(learner.main(learner.Args(**settings(learner, **changes))))


def run_in_two(learner, plant=None, **changes) -> list:
    """The results of both."""
    return in_two(functools.partial(main_of, learner.__name__, changes, plant))


@pytest.fixture(scope="module")
def whole_runs(tmp_path_factory):
    """The folder of a run of 96 steps, of each learner, made once."""
    made = {}

    def folder_of(learner) -> str:
        if learner not in made:
            here = os.getcwd()
            os.chdir(tmp_path_factory.mktemp(learner.__name__))
            made[learner], _ = run_in_two(learner)
            os.chdir(here)
        return made[learner]

    return folder_of


def states(run_dir: str) -> list[dict]:
    """The checkpoints of both, without what may differ: settings, the number of checkpoints before."""
    found = [load(folder) for folder in (run_dir, f"{run_dir}/rank1")]
    assert found[0]["parts"].pop("ranks") == found[1]["parts"].pop("ranks")
    return [state | {"args": None} for state in found]


# === The same mathematics ===


def share(tensors: dict, rank: int | None, starts: int = 0) -> dict:
    """A process's half of a batch (T, B, ...), which begins with latents (B, ...), or of noise (T, B, ...), of which
    that for dreams is (H, starts B, ...)."""
    if rank is None:
        return tensors
    found = {}
    for name, tensor in tensors.items():
        if name in ("stoch", "deter"):
            found[name] = tensor.chunk(WORLD)[rank]
        else:
            rows = tensor.unflatten(1, (starts if starts and name in ("prior", "action") else 1, -1))
            found[name] = rows.chunk(WORLD, 2)[rank].flatten(1, 2)
    return found


def updates_of(name: str, changes: dict, rank: int | None) -> list[np.ndarray]:
    """Parameters before and after four updates: of one process, or of one of two with half of each batch."""
    learner, kit = SCRIPTS[name], {"dreamer": test_dreamer, "dreamer_v3": test_dreamer_v3}[name]
    args = kit.tiny_args(batch_size=4, **changes)
    torch.set_default_dtype(torch.float64)
    torch.Tensor.float = torch.Tensor.double  # in float32 a gradient of 0 but for rounding moves a weight either way
    if rank is not None:
        learner.join_ranks(args, "batch_size")
    agent, found = kit.make_agent(args), []
    optimizer = learner.make_optimizers(agent, args) if learner is dreamer else learner.LaProp(agent, args)
    for i in range(5):
        found.append(torch.cat([parameter.detach().flatten() for parameter in agent.parameters()]).numpy())
        batch, noise = kit.make_batch(agent, args, seed=i), kit.make_noise(agent, args, seed=i)
        learner.update(agent, optimizer, share(batch, rank), share(noise, rank, args.batch_length), args)
    return [found[0], found[-1]]


# Two of the batches have a KL above these free nats, two below, and of most one half is on the other side.
UPDATES = {
    "dreamer": {"cont_head": True, "max_grad_norm": 1.0, "free_nats": 1.6},
    "dreamer_v3": {"warmup": 1, "learning_rate": 1e-3},
}


@pytest.mark.parametrize(("name", "changes"), UPDATES.items(), ids=UPDATES)
def test_two_processes_learn_what_one_learns_from_the_whole_batch(name, changes, float64):
    """All parameters are those of one process but for rounding, and have moved far more."""
    updates = functools.partial(updates_of, name, changes)
    (before, after), (_, first), (_, second) = updates(None), *in_two(updates)
    assert np.array_equal(first, second)
    assert np.abs(first - after).max() < 1e-12 < 1e-4 < np.abs(after - before).max()


def replays() -> list[muzero.ReplayBuffer]:
    """One of four environments, and two that are its halves: the second's episodes are shorter, its errors larger."""
    rb, halves = test_muzero.make_rb(4, 600), [test_muzero.make_rb(2) for _ in range(WORLD)]
    for seed, half in enumerate(halves):
        test_muzero.fill(half, 60, seed, mean_length=30 - 25 * seed)
        half.priority *= 1 + seed
    rb.data = {name: torch.cat([half.data[name] for half in halves], 1).double() for name in rb.data}
    rb.priority = torch.cat([half.priority for half in halves], 1).double()
    for i, half in enumerate(halves):
        half.data = {name: column[:, 2 * i : 2 * i + 2] for name, column in rb.data.items()}  # the same memory
        half.priority = rb.priority[:, 2 * i : 2 * i + 2]
    return [rb, *halves]


def searched_updates_of(rank: int | None) -> list[np.ndarray]:
    """As updates_of, of sequences from two replays, by priority; also the weights of samples, and the new priorities.

    One process has all in one replay, and its weights are (N P)^-1 over the largest, P = p^alpha / (2 sum p^alpha).
    """
    changes = {"consistency_scale": 1.0, "max_grad_norm": 1.0, "learning_rate": 1e-2}
    agent, args = test_muzero.vector_agent(unroll_steps=2, td_steps=3, batch_size=8, **changes)
    whole, *halves = replays()
    torch.set_default_dtype(torch.float64)
    torch.Tensor.float = torch.Tensor.double
    agent.double()
    if rank is not None:
        muzero.join_ranks(args, "batch_size")
    optimizer, found, weights = muzero.make_optimizer(agent, args), [], []
    for i in range(5):
        found.append(torch.cat([parameter.detach().flatten() for parameter in agent.parameters()]).numpy())
        actions, parts = torch.randint(3, (2, 8), generator=torch.Generator().manual_seed(i)), []
        for part in range(WORLD) if rank is None else [rank]:
            chances = halves[part].priority ** halves[part].alpha
            parts.append(halves[part].sample(4, 1.0, torch.Generator().manual_seed(10 * i + part)))
            if rank is None:
                drawn = chances[parts[-1]["slots"], parts[-1]["envs"]]
                parts[-1] |= {"envs": parts[-1]["envs"] + 2 * part, "weights": WORLD * chances.sum() / drawn}
        rows = {name: torch.cat([part[name] for part in parts], -1) for name in ("slots", "envs", "weights")}
        rows |= {name: torch.cat([part[name] for part in parts], 1) for name in parts[0] if name not in rows}
        rows["weights"] /= rows["weights"].max() if rank is None else 1
        weights.append(rows["weights"].numpy())
        replay, actions = (whole, actions) if rank is None else (halves[rank], actions.chunk(WORLD, 1)[rank])
        muzero.update(agent, optimizer, replay, rows, actions, args, muzero.compute_losses)
    priorities = [half.priority.numpy() for half in (halves if rank is None else [halves[rank]])]
    return [found[0], found[-1], np.concatenate(weights), *priorities]


def test_two_processes_learn_what_one_learns_from_both_replays(float64):
    """muzero.py: parameters but for rounding, weights of samples, and priorities, which are of each replay."""
    one, first, second = searched_updates_of(None), *in_two(searched_updates_of)
    assert np.array_equal(first[1], second[1])
    assert np.abs(first[1] - one[1]).max() < 1e-12 < 1e-4 < np.abs(one[1] - one[0]).max()
    both = np.concatenate([first[2].reshape(5, 4), second[2].reshape(5, 4)], 1)
    np.testing.assert_allclose(both, one[2].reshape(5, 8), rtol=1e-12)
    for priorities, (mine,) in zip(one[3:], (first[3:], second[3:]), strict=True):
        np.testing.assert_allclose(mine, priorities, rtol=1e-9)


# === Whole runs ===


@each_in_time
def test_processes_share_networks_and_have_the_rest_for_themselves(learner, whole_runs):
    """Equal weights, optimizers, counters; other experience, other random numbers; the first evaluates."""
    first, second = states(whole_runs(learner))
    assert first["global_step"] == second["global_step"] == 96 and first["parts"]["counters"]["num_updates"] > 4
    own = {path.split("/")[2] for path in differences(first, second) if path.startswith("/parts")}
    assert own and own <= {"replay", "open_episodes"}
    streams = {path.split("/")[2] for path in differences(first["rng"], second["rng"], "/rng")}
    assert streams == set(first["rng"])
    logged, others = (scalars(folder) for folder in (whole_runs(learner), f"{whole_runs(learner)}/rank1"))
    assert [step for step, _ in logged["eval/episodic_return"]] == [48, 96]
    assert [step for step, _ in others["charts/episodic_return"]] == [24, 48, 72, 96]  # of 12 steps in each
    assert not [tag for tag in others if tag.startswith(("eval", "open_loop"))] and "losses/reward_loss" in others


@pytest.mark.slow
@each_learner
def test_stopped_and_resumed_is_bit_equal(learner, whole_runs):
    """The states of both processes."""
    folder, _ = run_in_two(learner, total_timesteps=48)
    run_in_two(learner, resume=folder)
    assert differences(states(folder), states(whole_runs(learner))) == []


def kill_at_the_third_save(rank: int, committed: bool, learner, here: int) -> None:
    """Kills this process once it has written, or once its file counts."""
    count, function = [0], "settle" if committed else "save_checkpoint"
    original = getattr(learner, function)

    def last(*args, **kwargs):
        count[0] += 1
        if count[0] == 3 and committed:
            os.kill(os.getpid(), signal.SIGKILL)
        original(*args, **kwargs)
        if count[0] == 3:
            os.kill(os.getpid(), signal.SIGKILL)

    if rank == here:
        setattr(learner, function, last)


@pytest.mark.slow
@each_learner
@pytest.mark.parametrize(("rank", "committed", "step"), [(1, False, 24), (0, False, 48), (1, True, 48)])
def test_a_kill_between_writes_leaves_one_whole_set(learner, rank, committed, step, whole_runs):
    """The old one until the first process has written, then the new one: a resume goes on from either."""
    results = run_in_two(learner, functools.partial(kill_at_the_third_save, rank, committed), resume=None)
    assert results[rank] is None and re.search(LOST, results[1 - rank])
    (folder,) = map(str, Path("runs").absolute().iterdir())
    assert load(folder)["global_step"] == step
    run_in_two(learner, resume=folder)
    assert differences(states(folder), states(whole_runs(learner))) == []


def interrupt(learner, rank: int) -> None:
    """The second process is asked to stop in the middle of a block of updates."""
    count, update = [0], learner.update

    def update_and_signal(*args, **kwargs):
        count[0] += 1
        if count[0] == 3 and rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return update(*args, **kwargs)

    learner.update = update_and_signal


@pytest.mark.slow
@each_learner
def test_a_stop_of_one_is_a_stop_of_all(learner):
    """After the same update, with a checkpoint of both, from which a resume goes on."""
    block = {"replay_ratio": 2.0} if learner is muzero else {}
    assert run_in_two(learner, interrupt, **block) == ["SystemExit: 143"] * 2
    (folder,) = map(str, Path("runs").absolute().iterdir())
    first, second = states(folder)
    assert first["parts"]["counters"]["num_updates"] == second["parts"]["counters"]["num_updates"] == 3
    assert first["global_step"] == second["global_step"] < 96
    run_in_two(learner, resume=folder, **block)
    first, second = states(folder)
    assert first["global_step"] == second["global_step"] == 96
    assert differences(first["parts"]["agent"], second["parts"]["agent"]) == []


@each_in_time
def test_another_number_of_processes_is_refused(learner, whole_runs, monkeypatch, capsys):
    """In one line, whether there are fewer or more; and what they cannot share."""
    resumed = learner.Args(**settings(learner, resume=whole_runs(learner)))
    assert "was made by 2 processes, not 1: torchrun" in error_of(capsys, learner.main, resumed)
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert "was made by 2 processes, not 3: torchrun" in error_of(capsys, learner.main, resumed)
    alone = learner.Args(**settings(learner, num_envs=4))
    assert "--num-envs 4 cannot be shared by 3 processes" in error_of(capsys, learner.main, alone)


@pytest.mark.slow
@each_learner
def test_files_of_different_saves_are_refused(learner, whole_runs):
    """In a line of the process whose file is old."""
    folder = copy_of(whole_runs(learner))
    state = load(f"{folder}/rank1")
    state["parts"]["ranks"][1] -= 1
    torch.save(state, f"{folder}/rank1/checkpoint.pt")
    first, second = run_in_two(learner, resume=folder)
    assert re.search(LOST, first) and second == "SystemExit: 2"


@pytest.mark.slow
@each_learner
def test_a_fault_of_one_leaves_the_last_checkpoint(learner):
    """One line, and nothing is written that the other does not have."""
    results = run_in_two(learner, env_id="fake_envs:NanCounter-v0")
    said = f"reward is not finite.*; the last checkpoint stays as it is|{LOST}"
    assert all(re.search(said, line) for line in results) and any("reward" in line for line in results)
    (folder,) = map(str, Path("runs").absolute().iterdir())
    assert [state["global_step"] for state in states(folder)] == [48, 48]


@pytest.mark.slow
@each_learner
def test_episodes_may_end_at_different_times(learner):
    """Each process has its own; the updates, and so the weights, are the same."""
    folder, _ = run_in_two(learner, env_id="fake_envs:DeadlyPoint-v0", total_timesteps=120)
    first, second = states(folder)
    lengths = [scalars(path)["charts/episodic_length"] for path in (folder, f"{folder}/rank1")]
    assert lengths[0] != lengths[1] and first["parts"]["counters"]["num_updates"] > 4
    assert first["parts"]["counters"] == second["parts"]["counters"]
    assert differences(first["parts"]["agent"], second["parts"]["agent"]) == []


@pytest.mark.slow
def test_processes_play_against_themselves():
    """muzero.py on boards, by priority and searched anew: first games end at different times, networks are the same."""
    changes = {"td_steps": 9, "support_size": 1, "reanalyze_ratio": 0.5, "priority_alpha": 1.0, "opening_moves": 0}
    folder, _ = run_in_two(muzero, env_id="tictactoe", total_timesteps=200, buffer_size=400, num_envs=4, **changes)
    first, second = states(folder)
    assert differences(first["parts"]["replay"], second["parts"]["replay"])
    assert first["parts"]["counters"] == second["parts"]["counters"] and first["parts"]["counters"]["num_updates"] > 40
    for part in ("agent", "target", "optimizer"):
        assert differences(first["parts"][part], second["parts"][part]) == []


@pytest.mark.slow
@each_learner
def test_sigterm_to_torchrun_leaves_a_checkpoint_of_all(learner):
    """torchrun hands it to both; what they leave goes on."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(WORLD)]
    command = [*torchrun, str(ROOT / f"{learner.__name__}.py")]
    paths = {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]), "OMP_NUM_THREADS": "1"}
    begin = functools.partial(subprocess.Popen, env=os.environ | paths, preexec_fn=hear_signals)
    flags = flags_of(learner.Args(**settings(learner, total_timesteps=10**6, eval_frequency=0)))
    process = begin([*command, *flags], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    wait_for(lambda: "episodic_return" in process.stdout.readline())
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=60)[0]
    assert f"continue with: torchrun --nproc-per-node {WORLD} " in said and process.returncode != 0
    (folder,) = map(str, Path("runs").absolute().iterdir())
    step = load(folder)["global_step"]
    assert 24 <= step == load(f"{folder}/rank1")["global_step"]
    process = begin([*command, "--resume", folder, "--total-timesteps", str(step + 24)])
    assert process.wait(120) == 0
    assert [state["global_step"] for state in states(folder)] == [step + 24] * 2


@pytest.mark.parametrize("rank", range(2))
@each_learner
def test_steps_per_second_leave_out_what_the_others_write(learner, rank, monkeypatch):
    """Each of two processes writes for 50 seconds, in turns."""
    clock, run = [100.0], object.__new__(learner.RankedRun)

    def turn(*_) -> None:
        clock[0] += 50

    def report() -> None:
        if run.reported[0] < 5:
            run.reported = 5, clock[0]

    monkeypatch.setattr(learner.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(learner, "save_checkpoint", turn if rank else lambda *_: None)
    monkeypatch.setattr(learner, "agree", lambda *_: None if rank else turn())
    monkeypatch.setattr(learner, "settle", lambda *_: None)
    run.rank, run.ranks, run.parts, run.rng, run.folder = rank, [2, 0], {}, {}, str(Path.cwd())
    run.step, run.next_eval, run.saved, run.reported, run.eval_began = 5, 9, None, (3, 90.0), None
    run.args, run.writer = types.SimpleNamespace(checkpoint_frequency=2), types.SimpleNamespace(flush=lambda: None)
    run.report = report
    run.save()
    written = 50 if rank else 100  # `agree` is called twice
    assert run.reported == (5, 100.0 + written) == (5, clock[0]) and run.eval_began is None and run.saved[0] == 5
