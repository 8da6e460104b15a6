"""What `mkdocs build` adds to the pages of this folder: the project's own top-level files, and the API reference."""

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
TOP_LEVEL = {"README.md": "index.md", "CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}


def modules() -> list[str]:
    """Names of the modules in reading order: README's file tree."""
    tree = re.search(r"```\nhf_vqgan/\n(.*?)^\S", (ROOT / "README.md").read_text(), flags=re.DOTALL | re.MULTILINE)
    return re.findall(r"^  (\w+)\.py ", tree.group(1), flags=re.MULTILINE)


def on_config(config: MkDocsConfig) -> None:
    """The API reference in the navigation, before the pages on the project."""
    reference = {"API reference": [{name: f"api/{name}.md"} for name in modules()]}
    config.nav.insert(-1, reference)


def on_files(files: Files, config: MkDocsConfig) -> None:
    """Pages that are made and not written."""
    for source, page in TOP_LEVEL.items():
        text = (ROOT / source).read_text().replace("](docs/", "](")
        files.append(File.generated(config, page, content=_with_links_to_pages(text)))
    for name in modules():
        text = f"# hf_vqgan.{name}\n\n::: hf_vqgan.{name}\n"
        files.append(File.generated(config, f"api/{name}.md", content=text))


def on_page_markdown(markdown: str, **_) -> str:
    return _with_links_to_pages(markdown)


def _with_links_to_pages(markdown: str) -> str:
    """Links that work in the repository, to the same files as pages of the site."""
    for source, page in TOP_LEVEL.items():
        markdown = re.sub(rf"\]\((?:\.\./)?{source}", f"]({page}", markdown)
    return markdown
