"""Hooks of the docs site: files outside of `docs/` are pages too, where they lie in the tree, and the README is the front page.

Links stay those that work where a file lies, so that a page reads the same on a code host.
"""

from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
TAKEN = ("CHANGELOG.md", "SECURITY.md", "LICENSE", "fixtures/README.md", "tools/results/*.md", "tools/results/*.png")


def on_files(files: Files, config: Any) -> Files:
    """Add the README, and what `TAKEN` names."""
    files.append(File.generated(config, "index.md", content=(ROOT / "README.md").read_text(encoding="utf-8")))
    for pattern in TAKEN:
        for path in sorted(ROOT.glob(pattern)):
            files.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Let links into `docs/`, and those that leave it, point to what was taken: the site has no such folder."""
    if page.file.generated_by is not None:
        return markdown.replace("](docs/", "](")
    up = "../" * page.file.src_uri.count("/")
    return markdown.replace(f"]({up}../", f"]({up}")
