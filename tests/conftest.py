"""Set-up of all tests: one thread, workers that start with the large packages imported, an empty folder for each."""

import importlib
import multiprocessing
import os
import signal

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported

import pytest
import torch
from runs import SCRIPTS, WRITERS, close_writers
from tensorboard.summary.writer import event_file_writer
from torch.utils.tensorboard import SummaryWriter

SIGNALS = signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGALRM

torch.set_num_threads(1)
multiprocessing.set_forkserver_preload(["torch.utils.tensorboard", "gymnasium", "tyro"])


@pytest.fixture(autouse=True)
def in_tmp_path(tmp_path, monkeypatch):
    """Runs write into an empty folder; what a failed run leaves open, writers and signal handlers, is put in order."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MUJOCO_GL", "")  # so that what a run sets is undone
    monkeypatch.delenv("MUJOCO_GL")
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(100))  # names sort by age
    init = SummaryWriter.__init__
    monkeypatch.setattr(SummaryWriter, "__init__", lambda self, *a, **k: (WRITERS.append(self), init(self, *a, **k))[1])
    yield
    close_writers()
    signal.setitimer(signal.ITIMER_REAL, 0)
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(params=SCRIPTS)
def script(request):
    """Each script as a module."""
    return importlib.import_module(request.param)
