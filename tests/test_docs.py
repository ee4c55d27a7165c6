"""What README.md, docs/ and benchmark/ tell people to type is understood by the scripts."""

import ast
import contextlib
import fnmatch
import importlib
import io
import re
import shlex
from pathlib import Path

import pytest
import tyro
from torch.distributed import run as torchrun

ROOT = Path(__file__).parent.parent
SCRIPTS = [path.stem for path in ROOT.glob("*.py")]
MEASURES = [path.stem for path in ROOT.glob("benchmark/*.py")]
PROSE = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/*.md"))]
PROSE += [ROOT / "benchmark/RUNS.md", ROOT / "results/README.md"]
PAGES = [*PROSE, *sorted(ROOT.glob("benchmark/*.sh")), *sorted(ROOT.glob("benchmark/*.py"))]
PAGES += [ROOT / f"{name}.py" for name in SCRIPTS]  # their docstrings
PASS_ON = {"dreamer_replay", "open_loop", "pictures", "sweep"}  # measures that hand flags on to a script
OTHERS = {"--help", "--logdir", "--no-deps", "--use-spot"}  # of tyro, TensorBoard, pip, SkyPilot


def commands(text: str) -> list[list[str]]:
    """The words after each `python script.py`, comments and shell syntax left out; <...> and $... stand for a word.

    Likewise behind torchrun, and of the scripts in benchmark/.
    """
    text = re.sub(r"\\\n", " ", text)
    names, found = "|".join(SCRIPTS + MEASURES), []
    for name, rest in re.findall(rf"(?:python|torchrun(?: --\S+ \S+)*) (?:\S*/)?({names})\.py\b([^\n`]*)", text):
        rest = re.sub(r"\"\$(@|\{@:\d\})\"", "", rest)  # what else is given
        rest = re.sub(r"<[^>]*>|\"?\$\{?\w+\}?\"?", "1", rest)
        rest = re.sub(r"\$\([^)]*\)", "1", rest)
        rest = re.split(r"\s#|\s\||&&|;|\)|\]\s|  \(|\s\[|\"$|>", rest)[0]
        found.append([name, *shlex.split(rest.rstrip("\".,:'"))])
    return found


def flags(path: Path) -> set[str]:
    """Of the class Args of a script in both forms, and all others that its text names."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    settings = [line for node in nodes if isinstance(node, ast.ClassDef) and node.name == "Args" for line in node.body]
    names = [line.target.id.replace("_", "-") for line in settings if isinstance(line, ast.AnnAssign)]
    texts = {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    return {f"--{form}{name}" for name in names for form in ("", "no-")} | {x for x in texts if x.startswith("--")}


ANY = set.union(*(flags(path) for path in [*ROOT.glob("*.py"), *ROOT.glob("benchmark/*.py")]))
ANY |= OTHERS | {flag for flag in torchrun.get_args_parser()._option_string_actions}


def unknown(text: str) -> set[str]:
    """Flags between backticks, outside of blocks, that nothing has; `--model-*` stands for all that begin so."""
    spans = re.findall(r"`([^`]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    found = {flag for span in spans for flag in re.findall(r"(?<![\w-])--[a-z][\w-]*\*?", span)}
    return {flag for flag in found if not fnmatch.filter(ANY, flag)}


def wrong_parts(text: str) -> set[tuple[str, str]]:
    """What is named behind `bash benchmark/....sh`, one or several as a|b, and is no case of that file."""
    found = re.findall(r"bash benchmark/(\w+)\.sh ([a-z_|]+)", text.replace("\\|", "|"))
    known = {}
    for path in ROOT.glob("benchmark/*.sh"):
        for case in re.findall(r'^case "\$\{1.*?^esac', path.read_text(), re.MULTILINE | re.DOTALL):
            known[path.stem] = set(re.findall(r"\w+", " ".join(re.findall(r"^  ([a-z_ |]+)\)", case, re.MULTILINE))))
    return {(name, part) for name, parts in found if name in known for part in set(parts.split("|")) - known[name]}


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_parse(page):
    """Every flag exists and takes what it is given; of the measures it exists."""
    for name, *words in commands(page.read_text()):
        if "--help" in words:
            continue
        if name in MEASURES:  # some of which hand flags on to a script
            own = flags(ROOT / f"benchmark/{name}.py")
            given = {re.split("[= ]", word)[0] for word in words if word.startswith("--")} - {"--"}
            assert given <= (ANY if name in PASS_ON else own), f"{page.name}: {name}.py {words}"
            continue
        said = io.StringIO()
        try:
            with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
                tyro.cli(importlib.import_module(name).Args, args=words)
        except SystemExit:
            pytest.fail(f"{page.name}: python {name}.py {' '.join(words)}\n{said.getvalue()}")


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_is_named_exists(page):
    """Flags in prose, and the parts of benchmark/*.sh."""
    text = page.read_text()
    assert wrong_parts(text) == set() and (page not in PROSE or unknown(text) == set())


def test_commands_are_found():
    """The search above sees continued lines, comments and placeholders, and a flag that does not exist."""
    text = "`python dyna_q.py --seed 2`, then\npython dyna_q.py --env-id A-v0 \\\n  --seed $seed   # words\n"
    assert commands(text) == [["dyna_q", "--seed", "2"], ["dyna_q", "--env-id", "A-v0", "--seed", "1"]]
    text = (
        '`torchrun --nproc-per-node 2 dreamer.py --num-envz 2 ...`\npython benchmark/muzero_boards.py "$run" "${@:2}"'
    )
    assert commands(text) == [["dreamer", "--num-envz", "2"], ["muzero_boards", "1"]]
    assert sum(len(commands(page.read_text())) for page in PAGES) > 60
    with pytest.raises(SystemExit), contextlib.redirect_stderr(io.StringIO()):
        tyro.cli(importlib.import_module("dyna_q").Args, args=["--no-such-flag"])


def test_what_does_not_exist_is_found():
    """A flag of no script in prose, one of a measure, a part of a file in benchmark/ that it does not have."""
    assert unknown("with `--bfloat17`, `--model-*` and `x --no-cuda`, not\n```\n--every\n```\n") == {"--bfloat17"}
    assert wrong_parts("`bash benchmark/world_models.sh smalll` | car_dream 3 1") == {("world_models", "smalll")}
    assert wrong_parts("bash benchmark/dyna_q.sh figures|task|speed; bash benchmark/gpu.sh x") == {("dyna_q", "task")}
    assert "--env-id" not in flags(ROOT / "benchmark/muzero_boards.py") > {"--games"}


def test_the_length_of_the_shortest_loop():
    """README says how far into dyna_q.py its loop ends; ten lines more or less are none."""
    (said,) = re.findall(r"\((\d+) lines to the end of its loop\)", (ROOT / "README.md").read_text())
    before, _ = (ROOT / "dyna_q.py").read_text().split("# === Environment ===")
    assert abs(int(said) - len(before.rstrip().splitlines())) <= 10
