"""Hooks of mkdocs: files of the repository outside of `docs/` become a part of the site.

The README is the first page. Links such as `../benchmarks/README.md`, which work in the repository,
lead to copies below `repository/`.
"""

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

DOCS = Path(__file__).parent
ROOT = DOCS.parent
COPIED = (
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "LICENSE",
    "SECURITY.md",
    "benchmarks/README.md",
    "benchmarks/results/*.md",
    "benchmarks/results/*.png",
    "examples/*.*",
    "examples/flower/*",
    "notebooks/*.ipynb",
)


@event_priority(100)  # before the plugin that renders notebooks
def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the README and the copied files."""
    sources = {"index.md": ROOT / "README.md"}
    for pattern in COPIED:
        for path in sorted(ROOT.glob(pattern)):
            sources[f"repository/{path.relative_to(ROOT).as_posix()}"] = path
    for uri, path in sources.items():
        files.append(File.generated(config, uri, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Redirects links between the repository and the site."""
    folder = page.file.src_uri.rpartition("/")[0]
    up = "../" * (folder.count("/") + 1 if folder else 0)

    def redirect(link: re.Match[str]) -> str:
        path, _, anchor = link[1].partition("#")
        target = _target(path, folder)
        if target is None:
            return link[0]
        return f"]({up}{target}{'#' * bool(anchor)}{anchor})"

    return re.sub(r"\]\((?!\w+:|#)([^)\s]+)\)", redirect, markdown)


def _target(path: str, folder: str) -> str | None:
    """Returns the place of a link on the site, or None if the link is right as it is."""
    # The folder of the page in the repository: that of a copy, or docs/. Links of the README, which
    # has become a page of docs/, start at the root.
    is_copy = folder.startswith("repository")
    home = ROOT / folder.removeprefix("repository").lstrip("/") if is_copy else DOCS / folder
    for base in (home, ROOT):
        found = (base / path).resolve()
        if found.exists() and found.is_relative_to(ROOT):
            break
    else:
        return None

    # A folder of the repository is shown by its first file.
    uri = found.relative_to(ROOT).as_posix()
    if uri == "notebooks":
        uri = "notebooks/01_quickstart.ipynb"
    if uri == "README.md":
        return "index.md"
    return uri.removeprefix("docs/") if uri.startswith("docs/") else f"repository/{uri}"
