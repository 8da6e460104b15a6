"""What `mkdocs build` adds to the pages of this folder: the project's own top-level files, and the API reference."""

import itertools
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
TOP_LEVEL = {"README.md": "index.md", "CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}


def modules() -> dict[str, list[str]]:
    """Dotted names of the package's modules by folder, those at the package's root first."""
    package = ROOT / "hf_vqgan"
    found: dict[str, list[str]] = {"hf_vqgan": []}
    for file in sorted(package.rglob("*.py"), key=lambda file: (len(file.parts), file)):
        folder = ".".join(file.parent.relative_to(ROOT).parts)
        if not file.stem.startswith("_"):
            found.setdefault(folder, []).append(f"{folder}.{file.stem}")
    return found


def on_config(config: MkDocsConfig) -> None:
    """The API reference in the navigation, before the pages on the project."""
    folders = [
        {folder: [{name.rpartition(".")[2]: f"api/{name}.md"} for name in names]} for folder, names in modules().items()
    ]
    reference = {"API reference": folders}
    config.nav.insert(-1, reference)


def on_files(files: Files, config: MkDocsConfig) -> None:
    """Pages that are made and not written."""
    for source, page in TOP_LEVEL.items():
        text = (ROOT / source).read_text().replace("](docs/", "](")
        files.append(File.generated(config, page, content=_with_links_to_pages(text)))
    for name in itertools.chain.from_iterable(modules().values()):
        files.append(File.generated(config, f"api/{name}.md", content=f"# {name}\n\n::: {name}\n"))


def on_page_markdown(markdown: str, **_) -> str:
    return _with_links_to_pages(markdown)


def _with_links_to_pages(markdown: str) -> str:
    """Links that work in the repository, to the same files as pages of the site."""
    for source, page in TOP_LEVEL.items():
        markdown = re.sub(rf"\]\((?:\.\./)?{source}", f"]({page}", markdown)
    return markdown
