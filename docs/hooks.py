"""Pages of the site that are files of the checkout: their links lead to pages there as they lead to files here."""

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
"""Files of the checkout by their pages."""

LICENCE = "licence.md"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are not in docs/."""
    checkout = Path(config.docs_dir).parent
    texts = {page: (checkout / file).read_text() for file, page in PAGES.items()}
    texts[LICENCE] = f"# Licence\n\n{(checkout / 'LICENSE').read_text()}"
    for page, text in texts.items():
        files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Let links to files of the checkout lead to the pages that these are, and leave badges to the README."""
    uri = page.file.src_uri
    folder = "" if uri in PAGES.values() else posixpath.join("docs", posixpath.dirname(uri))

    def to_page(link: re.Match[str]) -> str:
        file = posixpath.normpath(posixpath.join(folder, link["file"]))
        target = {**PAGES, "LICENSE": LICENCE}.get(file, posixpath.relpath(file, "docs"))
        return f"]({posixpath.relpath(target, posixpath.dirname(uri) or '.')}{link['anchor'] or ''})"

    without_badges = re.sub(r"^\[!\[.*\n", "", markdown, flags=re.MULTILINE)
    return re.sub(r"\]\((?P<file>[^):#]+)(?P<anchor>#[^)]*)?\)", to_page, without_badges)
