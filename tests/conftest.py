"""Set-up of all tests: one thread, processes that start with the large packages imported, an empty folder for each.

The process that only hands tests out (pytest -n) imports none of the large packages: what needs them is imported late.
"""

import importlib
import multiprocessing
import os
import signal
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported

import pytest

ROOT = Path(__file__).parent.parent
SIGNALS = signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGALRM


@pytest.fixture(scope="session", autouse=True)
def warm():
    """One thread; the process from which others are forked, workers of environments and whole scripts, is ready."""
    import torch
    from runs import SCRIPTS
    from tensorboard.summary.writer import event_file_writer

    torch.set_num_threads(1)
    event_file_writer._global_uid = event_file_writer.AtomicCounter(10**6)  # so that names of logs sort by age
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{ROOT / 'tests'}")
        multiprocessing.set_forkserver_preload(["runs", "fake_envs", *SCRIPTS])
        multiprocessing.forkserver.ensure_running()


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path, monkeypatch):
    """Runs write into an empty folder; what a failed run leaves open, writers and signal handlers, is put in order."""
    from runs import WRITERS, close_writers
    from torch.utils.tensorboard import SummaryWriter

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MUJOCO_GL", "")  # so that what a run sets is undone
    monkeypatch.delenv("MUJOCO_GL")
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    init = SummaryWriter.__init__
    monkeypatch.setattr(SummaryWriter, "__init__", lambda self, *a, **k: (WRITERS.append(self), init(self, *a, **k))[1])
    yield
    close_writers()
    signal.setitimer(signal.ITIMER_REAL, 0)
    for number, handler in handlers.items():
        signal.signal(number, handler)


def pytest_generate_tests(metafunc):
    """A test that takes `script` is made for each of them, if it does not say for which."""
    names = [mark.args[0] for mark in metafunc.definition.iter_markers("parametrize")]
    given = any("script" in (name.split(",") if isinstance(name, str) else name) for name in names)
    if "script" in metafunc.fixturenames and not given:
        from runs import SCRIPTS

        metafunc.parametrize("script", SCRIPTS, indirect=True)


@pytest.fixture
def script(request):
    """Each script as a module."""
    return importlib.import_module(request.param)


def pytest_collection_modifyitems(items):
    """Tests that hold a promise of the common text are slow for all scripts but those named.

    The text is the same in every script (test_common.py), so a few of them stand for all where seconds count.
    """
    for item in items:
        named = item.get_closest_marker("stands_for_all")
        params = getattr(item, "callspec", None) and item.callspec.params
        if named and params.get("script", params.get("name")) not in named.args:
            item.add_marker(pytest.mark.slow)
