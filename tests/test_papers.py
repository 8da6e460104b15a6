"""docs/papers.md and the citations in the package, the scripts and the recipes, held against each other."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAPER = re.compile(r"https://(?:huggingface\.co/papers|arxiv\.org/(?:abs|pdf)|doi\.org)/[\w./-]*\w")


def test_every_citation_is_listed_with_its_files_and_nothing_else_is():
    cited: dict[str, set[str]] = {}
    for file in [*ROOT.glob("hf_vqgan/**/*.py"), *ROOT.glob("scripts/**/*.py"), *ROOT.glob("scripts/recipes/*.yaml")]:
        for link in PAPER.findall(file.read_text()):
            cited.setdefault(link, set()).add(file.name)
    listed = {}
    for line in (ROOT / "docs" / "papers.md").read_text().splitlines():
        for link in PAPER.findall(line):
            assert link not in listed, f"{link} is listed twice"
            listed[link] = set(re.findall(r"`(\w+\.(?:py|yaml))`", line))
    assert listed == cited
    assert len(cited) > 20  # or the pattern has stopped matching
