"""What the site (mkdocs.yml) shows from outside of docs/, and links that hold on GitHub and on the site.

Nothing is copied: the front page is README.md itself.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

import mapet_ds

REPOSITORY = Path(__file__).resolve().parent.parent
PAGES = {
    "README.md": "index.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "tests/nullcuda/README.md": "nullcuda.md",
}
"""Pages that lie outside of docs/: the repository's path of each, and the site's."""
NOTEBOOKS = sorted(path.relative_to(REPOSITORY).as_posix() for path in REPOSITORY.glob("examples/*.ipynb"))


def site_links(markdown: str, page: str) -> str:
    """The text of a page with the site's links in the place of the repository's.

    page: where it lies in the repository. A link to what the site lacks stays; a strict build refuses it.
    """

    def on_site(found: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join(posixpath.dirname(page), found[1]))
        inside = PAGES.get(path, path if path in NOTEBOOKS else path.removeprefix("docs/"))
        return f"]({inside}" if inside != path or path in NOTEBOOKS else found[0]

    fences = re.sub(r"^```(\w+) \w+$", r"```\1", markdown, flags=re.M)  # the second word is for our tests
    return re.sub(r"\]\(([^)#:\s]+)", on_site, fences)


def names_page() -> str:
    """A page of the library's names, which mkdocstrings fills with their docstrings."""
    names = sorted(set(mapet_ds.__all__) - {"__version__"}, key=str.lower)
    head = "# Names\n\n`from mapet_ds import ...`; [As a library](library.md) shows their use.\n"
    return "\n".join([head, *(f"::: mapet_ds.{name}\n" for name in names)])


def on_files(files: Any, config: Any) -> Any:
    """mkdocs asks for the site's files."""
    from mkdocs.structure.files import File

    for page, place in PAGES.items():
        text = site_links((REPOSITORY / page).read_text(), page)
        files.append(File.generated(config, place, content=text))
    files.append(File.generated(config, "names.md", content=names_page()))
    for notebook in NOTEBOOKS:
        files.append(File(notebook, str(REPOSITORY), config.site_dir, config.use_directory_urls))
    return files


on_files.mkdocs_priority = 100  # before mkdocs-jupyter, which takes the notebooks on


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """mkdocs asks for the text of a page."""
    return markdown if page.file.generated_by else site_links(markdown, f"docs/{page.file.src_uri}")
