"""Command lines that cannot work, generated from the types of the settings: each is refused at once in one line."""

import collections
import contextlib
import dataclasses
import io
import os
import sys
import time
import typing

import gymnasium as gym
import pytest
from runs import TINY, flags_of, tiny

MODULES = [
    "",
    " ",
    ":",
    "::",
    "a:b:c",
    "a:b:c-v0",
    ":CartPole-v1",
    "CartPole-v1:",
    "no_such_module:Thing-v0",
    "os:Thing-v0",
]
ENV_IDS = [
    *MODULES,
    "Nonsense-v0",
    "CartPole-v99",
    "CartPole-v",
    "Hopper",
    "../x",
    "a/b/c-v0",
    "-v1",
    "walker-",
    "\n",
    "*",
]
FOLDERS = ["", " ", "runs/none", "/nonexistent/run", "/dev/null", "checkpoint.pt"]
NAMES = ["", " ", "a/b", "../a", "a b", "checkpoint", "a:b", "\n"]


class Accepted(Exception):
    """The run would begin now."""


def bad_numbers(kind) -> list[str]:
    """What a number with bounds may not be."""
    low, high = getattr(kind, "__metadata__", (-(10**20), 10**20))
    whole = (kind.__origin__ if hasattr(kind, "__metadata__") else kind) is int
    numbers = [
        low - 1,
        high + 1 if whole else 2 * high,
        10**30,
        -(10**30),
        "nan",
        "inf",
        "-inf",
        "text",
        "",
        "1,5",
        "0x1g",
    ]
    return [str(number) for number in numbers] + (["1.5", "1e400"] if whole else ["1e400"])


def bad_lines(script) -> list[list[str]]:
    """Flags that must be refused, whatever else is asked for."""
    lines, hints = [["--no-such-flag"], ["stray"]], typing.get_type_hints(script.Args, include_extras=True)
    texts = {"env_id": ENV_IDS, "resume": FOLDERS, "evaluate": FOLDERS, "exp_name": NAMES}
    for name, kind in hints.items():
        flag = f"--{name.replace('_', '-')}"
        options = [option for option in typing.get_args(kind) if option is not type(None)]
        if type(None) in typing.get_args(kind):
            (kind,) = options
        if kind is bool:
            lines += [[flag, "7"], [f"{flag}=maybe"]]
            continue
        if ... not in typing.get_args(kind):
            lines.append([flag])  # without its value
        if name in texts:
            lines += [[f"{flag}={text}"] for text in texts[name]]
        elif typing.get_origin(kind) is typing.Literal:
            lines += [[flag, "nonsense"], [f"{flag}="]]
        elif typing.get_origin(kind) is tuple and ... not in typing.get_args(kind):
            kinds = typing.get_args(kind)
            good = [str(getattr(one, "__metadata__", (1, 1))[0]) for one in kinds]
            lines += [
                [flag, *good[:i], bad, *good[i + 1 :]] for i in range(len(kinds)) for bad in bad_numbers(kinds[i])
            ]
        elif kind in (int, float) or hasattr(kind, "__metadata__"):
            lines += [[f"{flag}={bad}"] for bad in bad_numbers(kind)]
    return lines


def extreme_lines(script) -> list[list[str]]:
    """The least and the greatest of each number: legal, or refused for what it needs."""
    lines = []
    for name, kind in typing.get_type_hints(script.Args, include_extras=True).items():
        kind = typing.get_args(kind)[0] if type(None) in typing.get_args(kind) else kind
        lines += [[f"--{name.replace('_', '-')}={bound}"] for bound in getattr(kind, "__metadata__", ())]
    return lines


def outcome(script, flags: list[str], monkeypatch) -> tuple[str, float]:
    """What `python script.py`, tiny but for these flags, comes to: "refused", "accepted" or what is wrong; seconds."""

    def begin(*args):
        raise Accepted

    names = [flag[2:].partition("=")[0].replace("-", "_") for flag in flags[:1]]
    given = {name: getattr(script.Args, name, dataclasses.MISSING) for name in names if name in TINY[script.__name__]}
    monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *flags_of(tiny(script, **given)), *flags])
    monkeypatch.setattr(script, "new_folder", begin)
    monkeypatch.setattr(
        gym.vector, "AsyncVectorEnv", lambda envs, context, **mode: gym.vector.SyncVectorEnv(envs, **mode)
    )
    out, start = io.StringIO(), time.process_time()  # of the processor: others may keep it busy
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            script.main(script.parse_args())
        found = "ended without a word"
    except Accepted:
        found = "accepted"
    except SystemExit as stopped:
        lines = [line for line in out.getvalue().splitlines() if line.strip()]
        boxed = "For full helptext" in out.getvalue()  # tyro's answer to what has another type
        one = [line for line in lines if line.startswith("error: ")]
        found = "refused" if stopped.code == 2 and (boxed or len(one) == len(lines) == 1) else f"said {lines}"
    except Exception as error:
        found = f"{type(error).__name__}: {error}"
    seconds = time.process_time() - start
    return found if not os.listdir() else f"{found}, left {os.listdir()}", seconds


def judged(script, lines: list[list[str]], allowed: tuple[str, ...], monkeypatch) -> list[str]:
    """Prints how often each outcome came; returns the lines with another one than those allowed, or a slow one."""
    wrong, counts, slowest = [], collections.Counter(), 0.0
    for flags in lines:
        found, seconds = outcome(script, flags, monkeypatch)
        slowest = max(slowest, seconds)
        counts[found if found in ("refused", "accepted") else "wrong"] += 1
        if found not in allowed or seconds > 5:
            wrong.append(f"{' '.join(map(repr, flags))}: {found} ({seconds:.1f} s)")
    row = script.__name__, len(lines), counts["refused"], counts["accepted"], counts["wrong"], f"{slowest:.1f} s"
    print(*row, *wrong, sep=" | ")
    return wrong


@pytest.mark.slow
def test_no_bad_line_is_let_in(script, monkeypatch):
    """Prints script, lines, refused, accepted, wrong, slowest."""
    lines = bad_lines(script)
    assert len(lines) >= 200
    assert judged(script, lines, ("refused",), monkeypatch) == []


def test_no_bad_line_is_let_in_a_sample(script, monkeypatch):
    """Every 61st."""
    assert judged(script, bad_lines(script)[::61], ("refused",), monkeypatch) == []


@pytest.mark.slow
def test_extremes_are_legal_or_refused(script, monkeypatch):
    """Sizes that fit no memory are named before there is a folder."""
    assert judged(script, extreme_lines(script), ("refused", "accepted"), monkeypatch) == []
