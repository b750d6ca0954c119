"""MkDocs hook: resolve links from the pages to other files of the repository, such as ../params.yaml.

On a code host, such a link opens the file. In the site, the Markdown files in `PAGES` are pages, and any other file is
copied to files/. Links to missing files stay unchanged, so `mkdocs build --strict` reports them.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[1]
DOCS = "docs"
COPIES = "files"
PAGES = {
    "ARCHITECTURE.md": "architecture.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
}
_LINK = re.compile(r"(?<=\]\()(?!\w+:|#)(?P<path>[^)\s#]+)(?P<anchor>#[^)\s]*)?(?=\))")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages at the top of the repository and a copy of each other file that a page links to."""
    for name, uri in PAGES.items():
        files.append(File.generated(config, uri, abs_src_path=str(ROOT / name)))
    for file in list(files.documentation_pages()):
        for path in linked(file.content_string, file.src_uri):
            uri = site_path(path)
            if uri.startswith(f"{COPIES}/") and files.get_file_from_path(uri) is None:
                files.append(File.generated(config, uri, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Rewrite the page's links to paths in the site."""
    return rewritten(markdown, page.file.src_uri)


def rewritten(markdown: str, page: str) -> str:
    """Rewrite links to files of the repository as links inside the site. page: the page's path in the site."""

    def link(match: re.Match[str]) -> str:
        path = repository_path(match["path"], page)
        if not (ROOT / path).is_file():
            return match[0]
        return os.path.relpath(site_path(path), PurePosixPath(page).parent) + (match["anchor"] or "")

    return _LINK.sub(link, markdown)


def linked(markdown: str, page: str) -> Iterator[str]:
    """The repository paths of the files that the text of `page` links to."""
    for match in _LINK.finditer(markdown):
        path = repository_path(match["path"], page)
        if (ROOT / path).is_file():
            yield path


def repository_path(target: str, page: str) -> str:
    """The repository path of the link `target` on a page of the site."""
    sources = {uri: name for name, uri in PAGES.items()}
    here = PurePosixPath(sources.get(page, f"{DOCS}/{page}")).parent
    return os.path.normpath(here / target)


def site_path(path: str) -> str:
    """The site path of a file of the repository."""
    return path.removeprefix(f"{DOCS}/") if path.startswith(f"{DOCS}/") else PAGES.get(path, f"{COPIES}/{path}")
