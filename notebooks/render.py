"""`make notebooks`: executes each notebook and writes what it shows as a page of the docs.

    python -m notebooks.render            # all of them
    python -m notebooks.render tokens     # those whose name has this in it

The notebooks themselves stay without outputs. Pages are the same from start to start, but for how fast the machine is,
which is left out, and for the last digits of what was trained.
"""

import base64
import io
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from PIL import Image

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
PAGES = ROOT / "docs" / "notebooks"
_MAX_LINES = 40
_SPEED = re.compile(r", [\d.e+-]+ steps/s, [\d:?]+ left")
_ESCAPES = re.compile(r"\x1b\[[0-9;]*m")


def main(arguments: list[str]) -> int:
    """Executes the notebooks that are named, or all, and writes their pages."""
    for file in sorted(HERE.glob("*.ipynb")):
        if arguments and not any(name in file.stem for name in arguments):
            continue
        shutil.rmtree(ROOT / "runs" / "notebooks", ignore_errors=True)
        page = write_page(execute(file), file.stem, PAGES)
        print(f"{page.relative_to(ROOT)}: {sum(f.stat().st_size for f in PAGES.rglob('*')):,} bytes of pages in all")
    return 0


def execute(file: Path, *, timeout_s: int = 600, folder: Path = HERE) -> Any:
    """The notebook with its outputs, run in a kernel of its own that starts in `folder`."""
    notebook = nbformat.read(file, as_version=4)
    client = NotebookClient(
        notebook, timeout=timeout_s, kernel_name="python3", resources={"metadata": {"path": folder}}
    )
    client.execute()
    return notebook


def write_page(notebook: Any, name: str, folder: Path) -> Path:
    """A page in Markdown, and beside it a folder with its images."""
    images = folder / name
    shutil.rmtree(images, ignore_errors=True)
    images.mkdir(parents=True)
    parts = []
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            parts.append(_for_the_docs(cell.source))
            continue
        parts.append(f"```python\n{cell.source}\n```")
        shown = "\n\n".join(found for output in cell.outputs if (found := _shown(output, images)))
        parts += [_folded(shown.replace("\n```\n\n```text\n", "\n"))] if shown else []
    title, *rest = parts
    note = f"This page is what `notebooks/{name}.ipynb` shows; `make notebooks` makes it."
    page = folder / f"{name}.md"
    page.write_text("\n\n".join([title, note, *rest]) + "\n", encoding="utf-8")
    return page


def _folded(shown: str) -> str:
    """An output that would push everything else from the screen, to be opened by whoever wants to see it."""
    if shown.count("\n") <= _MAX_LINES:
        return shown
    return f"<details><summary>what it prints</summary>\n\n{shown}\n\n</details>"


def _for_the_docs(text: str) -> str:
    """Links of a notebook as seen from its page."""
    links = re.sub(r"\]\(\.\./docs/", "](../", text)
    return re.sub(r"\]\((\w+)\.ipynb\)", r"](\1.md)", links)


def _shown(output: Any, images: Path) -> str | None:
    if output.output_type == "stream":
        if output.name == "stderr":
            return None
        text = _SPEED.sub("", _ESCAPES.sub("", output.text)).replace(f"{ROOT}/", "").rstrip()
        return f"```text\n{text}\n```" if text else None
    data = output.get("data", {})
    if "image/png" in data:
        file = images / f"{len(list(images.iterdir())) + 1}.webp"
        image = Image.open(io.BytesIO(base64.b64decode(data["image/png"]))).convert("RGB")
        image.save(file, "WEBP", quality=82, method=6)
        return f"![]({images.name}/{file.name})"
    if "text/markdown" in data:
        return str(data["text/markdown"])
    return f"```text\n{data['text/plain']}\n```" if "text/plain" in data else None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
