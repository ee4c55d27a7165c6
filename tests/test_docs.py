"""What README.md, docs/ and benchmark/ tell people to type is understood by the scripts."""

import contextlib
import importlib
import io
import re
import shlex
from pathlib import Path

import pytest
import tyro

ROOT = Path(__file__).parent.parent
SCRIPTS = [path.stem for path in ROOT.glob("*.py")]
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")), *sorted(ROOT.glob("benchmark/*.sh"))]
PAGES += [ROOT / f"{name}.py" for name in SCRIPTS]  # their docstrings


def commands(text: str) -> list[list[str]]:
    """The words after each `python script.py`, comments and shell syntax left out; <...> and $... stand for a word."""
    text = re.sub(r"\\\n", " ", text)
    found = []
    for name, rest in re.findall(rf"python (?:\S*/)?({'|'.join(SCRIPTS)})\.py\b([^\n`]*)", text):
        rest = re.sub(r"<[^>]*>|\"?\$\{?\w+\}?\"?", "1", rest)
        rest = re.split(r"\s#|\s\||&&|;|\)|\]\s|  \(|\s\[|\"$|>", rest)[0]
        with contextlib.suppress(ValueError):  # a quotation mark of the sentence around it
            found.append([name, *shlex.split(rest.rstrip("\".,:'"))])
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_commands_parse(page):
    """Every flag exists and takes what it is given."""
    for name, *flags in commands(page.read_text()):
        if "--help" in flags:
            continue
        said = io.StringIO()
        try:
            with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
                tyro.cli(importlib.import_module(name).Args, args=flags)
        except SystemExit:
            pytest.fail(f"{page.name}: python {name}.py {' '.join(flags)}\n{said.getvalue()}")


def test_commands_are_found():
    """The search above sees continued lines, comments and placeholders, and a flag that does not exist."""
    text = "`python dyna_q.py --seed 2`, then\npython dyna_q.py --env-id A-v0 \\\n  --seed $seed   # words\n"
    assert commands(text) == [["dyna_q", "--seed", "2"], ["dyna_q", "--env-id", "A-v0", "--seed", "1"]]
    assert sum(len(commands(page.read_text())) for page in PAGES) > 60
    with pytest.raises(SystemExit), contextlib.redirect_stderr(io.StringIO()):
        tyro.cli(importlib.import_module("dyna_q").Args, args=["--no-such-flag"])


def test_the_length_of_the_shortest_loop():
    """README says how far into dyna_q.py its loop ends; ten lines more or less are none."""
    (said,) = re.findall(r"\((\d+) lines to the end of its loop\)", (ROOT / "README.md").read_text())
    before, _ = (ROOT / "dyna_q.py").read_text().split("# === Environment ===")
    assert abs(int(said) - len(before.rstrip().splitlines())) <= 10
