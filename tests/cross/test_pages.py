"""The pages hang together: links lead somewhere, the Chinese README shows what the English one does."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from volvelle.cli.table import available

REPOSITORY = Path(__file__).resolve().parents[2]
PAGES = sorted([*REPOSITORY.glob("*.md"), *(REPOSITORY / "docs").glob("*.md")])
LINK = re.compile(r"!?\[[^\]]*\]\((?P<target>[^)\s]+)\)")
FENCE = re.compile(r"^```[^\n]*\n.*?^```$", re.MULTILINE | re.DOTALL)
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)


def prose(path: Path) -> str:
    return FENCE.sub("", path.read_text(encoding="utf-8"))


def anchors(path: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    kept = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in HEADING.findall(prose(path)))
    return {heading.strip().replace(" ", "-") for heading in kept}


@pytest.mark.parametrize("page", PAGES, ids=[page.name for page in PAGES])
def test_links_lead_somewhere(page):
    text = re.sub(r"`[^`\n]+`", "", prose(page))
    for target in LINK.findall(text):
        if target.startswith(("https://", "http://", "mailto:")):
            continue
        file, _, anchor = target.partition("#")
        found = (page.parent / file).resolve() if file else page
        assert found.exists(), f"{page.name}: {target}"
        if anchor and found.suffix == ".md":
            assert anchor in anchors(found), f"{page.name}: {target}"


def test_every_page_is_linked_from_the_readme_or_a_page_that_is():
    start, seen = REPOSITORY / "README.md", set[Path]()
    waiting = [start]
    while waiting:
        page = waiting.pop()
        if page in seen or page.suffix != ".md" or not page.is_file():
            continue
        seen.add(page)
        waiting += [(page.parent / target.partition("#")[0]).resolve() for target in LINK.findall(prose(page))]
    assert set((REPOSITORY / "docs").glob("*.md")) <= seen


def test_both_readmes_show_the_same_commands_and_code():
    english, chinese = (
        [fence for fence in FENCE.findall((REPOSITORY / name).read_text(encoding="utf-8")) if "```sh" not in fence]
        for name in ("README.md", "README.zh-CN.md")
    )
    assert english == chinese


def test_both_readmes_have_the_same_sections_links_and_tables():
    english, chinese = (prose(REPOSITORY / name) for name in ("README.md", "README.zh-CN.md"))
    for count in (lambda text: text.count("\n## "), lambda text: text.count("\n- "), lambda text: text.count("\n|")):
        assert count(english) == count(chinese)
    links = [{link for link in LINK.findall(text) if link.startswith("docs/")} for text in (english, chinese)]
    assert links[0] == links[1]


def test_the_readme_lists_every_verb():
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    for verb in available():
        assert re.search(rf"^  {verb.name} +{re.escape(verb.help)}$", text, re.MULTILINE), verb.name
