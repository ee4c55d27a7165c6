"""What the scripts have in common stays the same text; each of them is a file that stands alone."""

import ast
import builtins
import importlib
import json
import os
import re
import shutil
import subprocess
import symtable
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
NAMES = ("dyna_q.py", "mbpo.py", "dhmbpo.py", "world_models.py", "dreamer.py", "dreamer_v3.py", "muzero.py")
SCRIPTS = sorted(ROOT / name for name in NAMES if (ROOT / name).exists())

PLUMBING = "Run: folder, log, checkpoints, signals (same text in every script)"
ALGORITHM_PART = ["Model", "Networks", "Targets", "Losses", "Targets and losses", "Search", "Acting", "Updates"]
ALGORITHM_PART += ["Replay buffer", "Training"]
APPENDIX = ["Environment", "Evaluation", PLUMBING]
BANNERS = ALGORITHM_PART + APPENDIX
ALGORITHM = "    # Algorithm specific arguments"
COMMON = ["fail", "parse_args", "choose_device", "next_multiple", "write_file", "save_checkpoint", "load_checkpoint"]
COMMON += ["refuse_changes", "require_finite", "warn_of_failure", "folder_name", "new_folder", "StopRequest"]
COMMON += ["print_exception", "check_bounds", "require_memory"]
COMMON += ["Bar", "Run", "GraphedFunction", "write_gif"]
SOMEWHERE = {"GraphedFunction", "write_gif"}  # where they are needed
# What each script has in a form of its own under the name of its role; all else that two files define is one text.
OWN = "Args main Agent Actor ReplayBuffer act update evaluate evaluate_and_log evaluate_run check_args".split()
OWN += "with_task_defaults make_env make_vector_env make_frames fit_spaces model_loss actor_loss compute_losses".split()
OWN += "make_optimizers train_model check_memory".split()
OWN += "DynamicsEnsemble Critics critic_loss alpha_loss rollout model_step holdout_scores".split()
OWN += "update_model open_loop open_loop_errors log_open_loop preprocess env_action draw_noise updates_due grow".split()
OWN += "RSSM WorldModel init_weights imagine lambda_return make_update warn_if_slow".split()
FLAGS = "exp_name seed torch_deterministic cuda track wandb_project_name wandb_entity capture_video save_model".split()
FLAGS += "keep_pictures eval_frequency eval_episodes checkpoint_frequency save_buffer resume evaluate".split()
FLAGS += "env_id total_timesteps num_envs".split()
SPEED = {"bfloat16", "compile", "cudagraphs"}  # in a block of their own, which a script without them does without
LAZY = {"dm_control", "mujoco", "ale_py", "wandb", "moviepy", "cv2", "matplotlib", "PIL", "pygame"}
LAZY |= {"cma", "envpool", "vizdoom"}
BY_TASK = {"dm_control", "mujoco", "ale_py", "pygame", "envpool", "vizdoom"}  # asked for by env_id
OPTIONAL = {"wandb", "envpool"}  # asked for by a flag; its absence is one line with the pip command
# where import and distribution have other names
DISTRIBUTIONS = {"PIL": "pillow", "cv2": "opencv-python-headless", "pygame": "pygame-ce"}

each_script = pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)


def sections(source: str) -> dict[str, str]:
    """The text under each banner, in order."""
    parts = re.split(r"^# === (.+) ===$", source, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def definitions(source: str) -> dict[str, str]:
    """Text of the functions and classes at the top level."""
    lines, found = source.splitlines(), {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            found[node.name] = "\n".join(lines[first - 1 : node.end_lineno])
    return found


def plumbing(source: str) -> list[str]:
    """Names that are defined in the common section (each script's own checks follow it)."""
    return [name for name in definitions(sections(source)[PLUMBING]) if name in COMMON]


def common_args(source: str) -> str:
    """The part of Args before the algorithm's own settings."""
    assert source.count(ALGORITHM) == 1
    return source.split(ALGORITHM)[0].split("@dataclass\nclass Args:\n")[1]


def drift(sources: dict[str, str]) -> list[str]:
    """What has another text somewhere although it is not a script's own: names that two files define, or "Args"."""
    texts = [definitions(source) for source in sources.values()]
    names = {name for text in texts for name in text} - set(OWN)
    found = sorted(name for name in names if len({text[name] for text in texts if name in text}) > 1)
    return found + (["Args"] if len({common_args(source) for source in sources.values()}) > 1 else [])


def undefined_globals(source: str, name: str) -> set[str]:
    """Names that functions and classes read from the module although it does not define them."""
    top = symtable.symtable(source, name, "exec")
    known = {symbol.get_name() for symbol in top.get_symbols() if symbol.is_assigned() or symbol.is_imported()}
    known |= {child.get_name() for child in top.get_children()} | set(dir(builtins)) | {"__file__", "__name__"}
    missing, todo = set(), [top]
    while todo:
        table = todo.pop()
        todo += table.get_children()
        used = {symbol.get_name() for symbol in table.get_symbols() if symbol.is_global() and symbol.is_referenced()}
        missing |= used - known
    return missing


def imports(source: str) -> set[str]:
    """Top-level names of everything that is imported, in functions too."""
    nodes = list(ast.walk(ast.parse(source)))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {"." * node.level + (node.module or "") for node in nodes if isinstance(node, ast.ImportFrom)}
    return {name.split(".")[0] if name[0] != "." else name for name in names}


def metadata(source: str) -> dict:
    """The inline script metadata (PEP 723)."""
    blocks = re.findall(r"(?m)^# /// script$\n((?:^#(?: .*)?$\n)+?)^# ///$", source)
    assert len(blocks) == 1
    return tomllib.loads("\n".join(line[2:] for line in blocks[0].splitlines()))


def pins() -> dict[str, str]:
    """Distribution -> version of requirements.txt."""
    lines = (line.split("#")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines())
    found = {}
    for requirement in map(Requirement, filter(None, lines)):
        (specifier,) = requirement.specifier
        assert specifier.operator == "==", f"{requirement} is not pinned"
        found[canonicalize_name(requirement.name)] = specifier.version
    return found


def fields(source: str) -> list[tuple[str, ast.AnnAssign, str | None]]:
    """The settings of Args: name, assignment, the text behind it."""
    (args,) = [node for node in ast.parse(source).body if isinstance(node, ast.ClassDef) and node.name == "Args"]
    lines = source.splitlines()
    nodes = [node for node in args.body if isinstance(node, ast.AnnAssign)]
    return [(node.target.id, node, lines[node.end_lineno - 1].partition("  # ")[2]) for node in nodes]


# === The same text ===


def test_common_parts_are_the_same_text():
    """Functions of the common section, and the common part of Args."""
    assert SCRIPTS
    assert drift({path.name: path.read_text() for path in SCRIPTS}) == []


def test_drift_is_noticed():
    """The comparison finds a changed function, class or setting, wherever it stands, and nothing else."""
    source = SCRIPTS[0].read_text()

    def planted(old: str, new: str) -> list[str]:
        assert source.count(old) == 1
        return drift({"a.py": source, "b.py": source.replace(old, new), "c.py": source})

    banner = f"# === {PLUMBING} ===\n"
    head, text = "def next_multiple(step: int, frequency: int) -> float:", "The next multiple of a frequency after"
    assert planted(head, head) == []
    assert planted(text, "The multiple of a frequency after") == ["next_multiple"]
    assert planted("self.since = signum, ", "self.since = True, ") == ["StopRequest"]
    assert planted("    seed: Seed = 1  #", "    seed: Seed = 2  #") == ["Args"]
    assert planted("def main(", "def extra():\n    pass\n\n\ndef main(") == []
    function = definitions(source)["next_multiple"]
    without = source.replace(function, "")
    elsewhere = without.replace(banner, f"{function}  # changed\n\n\n{banner}")
    assert drift({"a.py": source, "b.py": without}) == []
    assert drift({"a.py": source, "b.py": elsewhere}) == ["next_multiple"]


@each_script
def test_plumbing_is_complete(path):
    """Every script has the functions that all of them need, in the common section."""
    assert set(COMMON) - SOMEWHERE <= set(plumbing(path.read_text()))


@each_script
def test_banners_stand_in_the_agreed_order(path):
    """Sections may be left out, not moved; no other banners."""
    found = list(sections(path.read_text()))
    assert found == [banner for banner in BANNERS if banner in found]
    assert {PLUMBING, "Training"} <= set(found) and len(re.findall("(?m)^# ===", path.read_text())) == len(found)


@each_script
def test_the_guard_is_one_statement(path):
    """`main(parse_args())` is all that it does."""
    *_, guard = ast.parse(path.read_text()).body
    assert ast.unparse(guard) == "if __name__ == '__main__':\n    main(parse_args())"


@each_script
def test_the_algorithm_does_without_the_appendix(path):
    """What stands before the training loop names nothing that is defined in it or after it, functions or constants."""
    parts = sections(path.read_text())
    below = set()
    for banner in ["Training", *APPENDIX]:
        for node in ast.parse(parts[banner]).body:
            targets = node.targets if isinstance(node, ast.Assign) else []
            below |= {target.id for target in targets if isinstance(target, ast.Name)} | {getattr(node, "name", "main")}
    for banner in set(ALGORITHM_PART[:-1]) & set(parts):
        names = {node.id for node in ast.walk(ast.parse(parts[banner])) if isinstance(node, ast.Name)}
        assert not names & below, banner


@each_script
def test_lines_are_at_most_120_columns(path):
    """Whatever the formatter leaves alone."""
    assert [i for i, line in enumerate(path.read_text().splitlines(), 1) if len(line) > 120] == []


# === Settings ===


@each_script
def test_every_setting_has_one_line_of_text(path):
    """Behind each field stands what --help says of it."""
    for name, _, text in fields(path.read_text()):
        assert text, name


@each_script
def test_common_settings_come_first_and_speed_last(path):
    """The algorithm's begin with env_id, total_timesteps, num_envs; what only makes it faster comes last."""
    names = [name for name, _, _ in fields(path.read_text())]
    head = FLAGS[: FLAGS.index("env_id")]
    assert [name for name, _, _ in fields("class Args:\n" + common_args(path.read_text()))] == head
    assert names[: len(FLAGS)] == FLAGS
    speed = [name for name in names if name in SPEED]
    assert speed == names[len(names) - len(speed) :]


@each_script
def test_default_values_have_the_declared_type(path):
    """An int is written 5_000 and not 5e3, a float not 1: tyro would refuse what the default itself is."""
    for name, node, _ in fields(path.read_text()):
        kind = ast.unparse(node.annotation)
        if kind in ("int", "float", "bool", "str") and isinstance(node.value, ast.Constant):
            assert type(node.value.value).__name__ == kind, name


# === Standing alone ===


@each_script
def test_imports_no_sibling(path):
    """Nothing local: no other script, no relative import, no other file of the repository."""
    files = [*ROOT.glob("*.py"), *ROOT.glob("tests/*.py"), *ROOT.glob("benchmark/*.py"), *ROOT.glob("[a-z]*/")]
    found = imports(path.read_text())
    assert not found & ({other.stem for other in files if other != path} | {name.removesuffix(".py") for name in NAMES})
    assert not [name for name in found if name.startswith(".")]


@each_script
def test_no_function_uses_an_undefined_global(path):
    """Everything a function reads is an argument, a local or at module level, not a leftover of main."""
    assert undefined_globals(path.read_text(), path.name) == set()


def test_undefined_globals_are_noticed():
    """The check itself, on planted ones in a function, a nested function, a class and a comprehension."""
    source = "import os\nx = 1\ndef f(a):\n    def g():\n        return leak1 + a + x\n    return g, os, len\n"
    source += "class C:\n    y = leak2\n    def m(self):\n        return [leak3 for _ in range(3)]\n"
    assert undefined_globals(source, "planted") == {"leak1", "leak2", "leak3"}
    assert undefined_globals("def main():\n    envs = 1\ndef f():\n    return envs\n", "planted") == {"envs"}


SIDE_EFFECTS = """
import importlib, json, os, random, signal, sys, threading, warnings
scripts, packages = map(json.loads, sys.argv[2:])
for name in packages:
    importlib.import_module(name)
import numpy, torch
def state():
    return {
        "files": sorted(os.listdir()), "environment": dict(os.environ), "filters": list(warnings.filters),
        "threads": threading.active_count(), "signals": [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)],
        "torch": [torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled(), torch.initial_seed(),
                  torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark,
                  torch.get_float32_matmul_precision(), torch.are_deterministic_algorithms_enabled()],
        "random": [random.getstate(), repr(numpy.random.get_state()), torch.get_rng_state().tolist()],
        "cwd": os.getcwd(), "argv": list(sys.argv),
    }
changed = {}
for name in scripts:
    before = state()
    importlib.import_module(name)
    after = state()
    changed[name] = [key for key in before if before[key] != after[key]]
print(json.dumps([changed, sorted(sys.modules)]))
"""


def top_level_imports() -> list[str]:
    """What the scripts import where they begin."""
    nodes = [node for path in SCRIPTS for node in ast.parse(path.read_text()).body]
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    return sorted(names | {node.module for node in nodes if isinstance(node, ast.ImportFrom)})


def test_imports_have_no_side_effects(tmp_path):
    """No file, variable, thread, filter, signal, seed or switch; no parsing of argv; no simulator; nothing said."""
    lists = json.dumps([path.stem for path in SCRIPTS]), json.dumps(top_level_imports())
    command = [sys.executable, "-c", SIDE_EFFECTS, "--nonsense", *lists]
    env = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and not done.stderr, done.stderr
    changed, modules = json.loads(done.stdout)
    assert changed == {path.stem: [] for path in SCRIPTS}
    assert not LAZY - {"PIL"} & set(modules)


def test_triton_is_loaded_before_opengl():
    """Of PyTorch's wheel for GPUs. The first optimizer loads it, and if Mesa's OpenGL is there by then, it crashes."""
    for path in SCRIPTS:
        imports = {alias.name for node in ast.parse(path.read_text()).body for alias in getattr(node, "names", ())}
        assert ("torch._dynamo" in imports) == (path.stem != "dyna_q"), path.stem  # which has no networks


HELP = """
import importlib, json, os, runpy, sys
folders, packages = map(json.loads, sys.argv[1:])
for name in packages:
    importlib.import_module(name)
for folder in folders:
    if not os.fork():
        os.chdir(folder)
        os.dup2(os.open("../" + folder + ".out", os.O_WRONLY | os.O_CREAT), 1)
        sys.argv = [folder + ".py", "--help"]
        try:
            runpy.run_path(sys.argv[0], run_name="__main__")
        except SystemExit as ended:
            sys.stdout.flush()
            os._exit(ended.code or 0)  # to take an interpreter with torch apart takes a second
        os._exit(1)
    assert os.wait()[1] == 0, folder
"""


def test_copied_alone_they_show_their_help(tmp_path):
    """Each in an empty folder, away from the others: --help works, lists the common flags and writes nothing."""
    names = [path.stem for path in SCRIPTS]
    for path in SCRIPTS:
        Path(path.stem).mkdir()
        shutil.copy(path, path.stem)
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"COLUMNS": "200"}
    command = [sys.executable, "-B", "-c", HELP, json.dumps(names), json.dumps(top_level_imports())]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and not done.stderr, done.stderr
    for name in names:
        said = Path(f"{name}.out").read_text()
        assert not [flag for flag in FLAGS if f"--{flag.replace('_', '-')}" not in said], name
        assert os.listdir(name) == [f"{name}.py"]


# === Packages ===


@each_script
def test_metadata_admits_the_pins(path):
    """Inline metadata and requirements.txt name the same packages, and its ranges hold the tested versions."""
    block, pinned = metadata(path.read_text()), pins()
    python = SpecifierSet(block["requires-python"])
    assert "3.11" in python and "3.12" in python
    for requirement in map(Requirement, block["dependencies"]):
        version = pinned.get(canonicalize_name(requirement.name))
        assert version, f"{requirement.name} is not in requirements.txt"
        assert requirement.specifier.contains(version), f"{requirement} does not admit {version}"


@each_script
def test_metadata_lists_every_import(path):
    """Third-party packages, those that are imported in a function too."""
    source = path.read_text()
    third_party = imports(source) - set(sys.stdlib_module_names) - OPTIONAL
    listed = {canonicalize_name(Requirement(text).name) for text in metadata(source)["dependencies"]}
    assert "torch" in third_party
    assert {canonicalize_name(DISTRIBUTIONS.get(name, name)) for name in third_party} <= listed


def test_every_pin_is_used():
    """requirements.txt holds what a script lists, and the tools of the tests."""
    listed = {
        canonicalize_name(Requirement(text).name)
        for path in SCRIPTS
        for text in metadata(path.read_text())["dependencies"]
    }
    assert set(pins()) - listed <= {"pytest", "pytest-xdist", "ruff"}


@each_script
def test_lazy_packages_are_imported_where_they_are_used(path):
    """Simulators, video and plots stay out of the module's own imports."""
    body = ast.parse(path.read_text()).body
    top = "\n".join(ast.unparse(node) for node in body if isinstance(node, ast.Import | ast.ImportFrom))
    assert not imports(top) & LAZY
    assert importlib.import_module(path.stem).__name__ == path.stem


@each_script
def test_what_a_run_imports_late_is_looked_for_at_its_start(path):
    """LATE_IMPORTS names the packages that functions import, but for those of a flag or of a task."""
    source = path.read_text()
    top = [node for node in ast.parse(source).body if isinstance(node, ast.Import | ast.ImportFrom)]
    late = imports(source) - imports("\n".join(map(ast.unparse, top)))
    listed = importlib.import_module(path.stem).LATE_IMPORTS
    assert sorted(listed) == sorted(late & LAZY - OPTIONAL - BY_TASK)
