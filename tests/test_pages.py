"""What the pages point at exists; pictures stay small; the version is one number."""

import re
from pathlib import Path

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
