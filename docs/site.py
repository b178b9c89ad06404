"""A hook of MkDocs: the documents of the repository's top level become pages of the site, README.md its front page."""

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "CONTRIBUTING.md",
    "CHANGELOG.md": "CHANGELOG.md",
    "SECURITY.md": "SECURITY.md",
}
TOP = Path(__file__).resolve().parent.parent


def on_files(files: Any, config: Any) -> Any:
    """Add the pages of the top level, their links as seen from docs/."""
    for name, page in PAGES.items():
        text = (TOP / name).read_text(encoding="utf-8").replace("](docs/", "](")
        text = re.sub(
            r"(?<!!)\[([^\]]+)\]\((?!https?:)[^)#]*(?<!\.md)(?<!\.svg)\)", r"\1", text
        )  # a file that is no page
        files.append(File.generated(config, page, content=_renamed(text)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Return a page with its links to the top level as links within the site."""
    return re.sub(r"\]\(\.\./(README|CONTRIBUTING|CHANGELOG|SECURITY)\.md", r"](\1.md", _renamed(markdown))


def _renamed(text: str) -> str:
    return text.replace("(../README.md", "(index.md").replace("](README.md", "](index.md")
