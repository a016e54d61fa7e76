"""The pages as a site: python tools/docs_site.py [OUT] (./check docs).

A copy of the repository's pages, with the files that they link to, is laid out under OUT/pages as in the repository, so
that every link works unchanged, and Zensical makes OUT/site of it. A link that leads nowhere, or a page that would load
anything from another machine, is an error. Reading the site needs no network.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import yaml

REPOSITORY = Path(__file__).resolve().parents[1]
LINK = re.compile(r"!?\[[^\]]*\]\((?P<target>[^)\s]+)\)")
FENCE = re.compile(r"^```[^\n]*\n.*?^```$|`[^`\n]+`", re.MULTILINE | re.DOTALL)
WORDS = re.compile(r"^(```(?:console|python)) [^\n]*$", re.MULTILINE)
LOADED = re.compile(r"<(?:script|img|iframe|source|link)\b[^>]*?(?:src|href)=\"?(https?:)?//[^\s\">]+", re.IGNORECASE)
FAMILIES = {
    "Start": ("README.md", "README.zh-CN.md", "migrate", "claims", "benchmarks", "support"),
    "Language": ("language", "adapt", "decoding", "drafting", "quantization", "summarization", "serving", "scale"),
    "Parts": ("attention", "positions", "convolution", "resampling", "regions", "metrics", "collectives"),
    "Vision": ("backbones", "receptive-field", "segmentation", "sam", "detection"),
    "Generation": ("generation", "codecs", "priors"),
    "Training": ("data", "training", "precision", "memory", "distributed"),
    "The whole": ("studio", "extending", "architecture", "provenance", "CONTRIBUTING.md", "CHANGELOG.md"),
}  # fmt: skip


def pages() -> list[Path]:
    """Every page, as a path in the repository."""
    found = [*REPOSITORY.glob("*.md"), *(REPOSITORY / "docs").glob("*.md")]
    return sorted(path.relative_to(REPOSITORY) for path in found)


def links(page: Path) -> Iterator[Path]:
    """The files of the repository that a page links to, fences aside."""
    text = FENCE.sub("", (REPOSITORY / page).read_text(encoding="utf-8"))
    for target in LINK.findall(text):
        file = target.partition("#")[0]
        if file and "://" not in target and not target.startswith("mailto:"):
            yield (REPOSITORY / page.parent / file).resolve()


def lay_out(folder: Path) -> None:
    """Copy pages and what they link to; a link that leads nowhere ends it."""
    for page in pages():
        for path in (REPOSITORY / page, *links(page)):
            if not path.exists():
                sys.exit(f"error: {page} links to {path.relative_to(REPOSITORY)}, which is not there")
            to = folder / path.relative_to(REPOSITORY)
            to.parent.mkdir(parents=True, exist_ok=True)
            if path.suffix == ".md":  # the words behind a fence's language are for our tests
                to.write_text(WORDS.sub(r"\1", path.read_text(encoding="utf-8")), encoding="utf-8")
            elif path.is_file():
                shutil.copy(path, to)


def navigation() -> list[dict[str, list[str | dict[str, str]]]]:
    """The pages by family; one that is in none stands with the whole."""
    there = {path.as_posix() for path in pages()}
    menu = {
        family: [name for name in (n if n.endswith(".md") else f"docs/{n}.md" for n in names) if name in there]
        for family, names in FAMILIES.items()
    }
    listed = {name for names in menu.values() for name in names}
    menu["The whole"] += sorted(there - listed)
    named = {"README.md": {"Volvelle": "README.md"}, "README.zh-CN.md": {"中文": "README.zh-CN.md"}}
    return [{family: [named.get(name, name) for name in names]} for family, names in menu.items()]


def configuration(folder: Path) -> dict[str, object]:
    """What Zensical reads: no fonts and no scripts from elsewhere, light and dark by the reader's system."""
    palette = [
        {"media": f"(prefers-color-scheme: {name})", "scheme": scheme} for name, scheme in
        (("light", "default"), ("dark", "slate"))
    ]  # fmt: skip
    return {
        "site_name": "Volvelle",
        "docs_dir": "pages",
        "site_dir": "site",
        "use_directory_urls": False,
        "theme": {"name": "material", "font": False, "palette": palette, "features": ["navigation.sections"]},
        "markdown_extensions": ["tables", "toc", "md_in_html", "pymdownx.superfences", "pymdownx.highlight"],
        "nav": navigation(),
    }


def loads_from_elsewhere(site: Path) -> list[str]:
    """The places of the site at which a browser would ask another machine."""
    return [
        f"{page.relative_to(site)}: {found[0]}"
        for page in sorted(site.rglob("*.html"))
        for found in LOADED.finditer(page.read_text(encoding="utf-8"))
    ]


def main() -> int:
    """Lay out, build, look at what came out."""
    out = Path(sys.argv[1] if len(sys.argv) > 1 else REPOSITORY / "build" / "docs").resolve()
    shutil.rmtree(out, ignore_errors=True)
    lay_out(out / "pages")
    file = out / "mkdocs.yml"
    file.write_text(yaml.safe_dump(configuration(out), allow_unicode=True, sort_keys=False), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "zensical", "build", "--strict", "-f", str(file)], cwd=out, check=False
    )
    if done.returncode:
        return done.returncode
    asked = loads_from_elsewhere(out / "site")
    for place in asked[:20]:
        print(f"error: loads from another machine: {place}", file=sys.stderr)
    print(f"{out / 'site'}: {len(list((out / 'site').rglob('*.html')))} pages")
    return 1 if asked else 0


if __name__ == "__main__":
    raise SystemExit(main())
