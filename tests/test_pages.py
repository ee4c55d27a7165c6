"""What the pages point at exists; pictures stay small; the version is one number; README's results are in results/."""

import csv
import re
from pathlib import Path
from statistics import mean

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("docs/*.md")), *sorted(ROOT.glob("benchmark/*.md"))]


def links(page: Path) -> list[str]:
    """Targets of links and pictures outside of code, web addresses and paths above the repository left out."""
    text = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(), flags=re.DOTALL)
    return [
        link
        for link in re.findall(r"\]\(([^)\s]+)\)|src=\"([^\"]+)\"", text)
        for link in link
        if link and "://" not in link
    ]


def anchors(page: Path) -> set[str]:
    """The names that GitHub gives to a page's headings."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links(page):
    """Every file that a page links to is there, and every heading."""
    for link in links(page):
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        if not target.is_relative_to(ROOT):  # the badge
            continue
        assert target.exists(), f"{page.name}: {link}"
        assert not anchor or anchor in anchors(target), f"{page.name}: {link}"


def test_pictures():
    """README's pictures load on a slow line: 6 MB in all; no picture in docs/ is without a page that shows it."""
    pictures = {ROOT / link for link in links(ROOT / "README.md") if link.endswith((".png", ".gif"))}
    assert sum(picture.stat().st_size for picture in pictures) < 6e6
    shown = {(page.parent / link).resolve() for page in PAGES for link in links(page)}
    assert {path for path in (ROOT / "docs").iterdir() if path.suffix in (".png", ".gif")} <= shown


def test_version():
    """CITATION.cff has the version of the newest entry of CHANGELOG.md."""
    newest = re.search(r"^## (\S+) \(([\d-]+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE).groups()
    cited = re.search(
        r"^version: (\S+)\ndate-released: (\S+)", (ROOT / "CITATION.cff").read_text(), re.MULTILINE
    ).groups()
    assert cited == newest


def rows_of(pattern: str) -> list[dict]:
    """All rows of these CSV files, with the group of runs that each is of: lines of comments are between groups."""
    rows = []
    for path in sorted(ROOT.glob(f"results/{pattern}.csv")):
        lines, head = path.read_text().splitlines(), None
        for i, line in enumerate(lines):
            if line.startswith("#"):
                group = f"{path} {i}"
            elif head:
                rows.append(dict(zip(["group", *head], [group, *next(csv.reader([line]))], strict=True)))
            else:
                head = line.split(",")
    return rows


def said(cell: str) -> list[str]:
    """Numbers of a cell of README's table that say how well it went: no steps (30K), seeds, generations, episodes."""
    cell = re.sub(r"`[^`]*`|[\d.]+K|(?:seed|support|generation|over|about) \d+", "", cell)
    return [number.replace(",", "") for number in re.findall(r"(?<!\w)-?\d+(?:,\d{3})*(?:\.\d+)?", cell)]


def is_from(number: str, known: list[float]) -> bool:
    """Whether a number is one of these, rounded."""
    return any(abs(x - float(number)) <= 0.5 / 10 ** len(number.partition(".")[2]) + 1e-9 for x in known)


RESULTS = (ROOT / "README.md").read_text().split("## Results\n")[1].split("\n## ")[0]
RESULTS = [[cell.strip() for cell in line.split("|")[1:-1]] for line in RESULTS.splitlines() if ".py" in line[:20]]
FILES = {"Taxi-v4, exact greedy return": ["tasks"], "tic-tac-toe, every reply of the opponent": ["tictactoe"]}
NOT_THERE = {("Taxi-v4", "-186")}  # of legal moves: docs/muzero.md alone


COUNTS = "group", "seed", "step", "steps", "generation", "episodes", "tracks", "real_steps"  # columns without returns


@pytest.mark.parametrize("row", RESULTS, ids=lambda row: "-".join(row[:3]))
def test_results_are_those_of_the_files(row):
    """Each return in README's table rounds from a number in the CSV files of its script and task.

    Or from the mean over seeds of the returns at one step, or is the mean of the numbers before it. Those of random
    actions are in results/random.csv, or with the others.
    """
    script, task, _, _, returns, random, _ = row
    names = FILES.get(task) or re.findall(r"\w+-[\w-]+|TakeCover", task)
    rows = [row for name in names for row in rows_of(f"{script.split('.py')[0]}/*{name}*")]
    known = [float(x) for row in rows for name, x in row.items() if name not in COUNTS and re.fullmatch(r"-?[\d.]+", x)]
    at_random = [float(row["return"]) for row in rows_of("random") if row["task"] in names] or known
    steps = {}
    for row in rows:
        if row.get("return"):
            steps.setdefault((row["group"], row.get("step")), []).append(float(row["return"]))
    first, _, last = returns.partition(": mean ")
    known += [mean(x) for x in steps.values()] + ([mean(map(float, said(first)))] if last else [])
    assert names and rows and said(returns)
    assert [x for x in said(returns) if not is_from(x, known) and (task, x) not in NOT_THERE] == []
    assert [x for x in said(random) if not is_from(x, at_random) and (task, x) not in NOT_THERE] == []
