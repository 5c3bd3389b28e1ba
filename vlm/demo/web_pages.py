"""Fifty web pages of our own, as a browser shows them, with where their elements are.

    python -m vlm.demo.web_pages FOLDER [--browser chromium]

writes `html/*.html`, a screenshot of each (`*.webp`, in several sizes of window), and `train.jsonl` and `test.jsonl` in
the form of `vlm.data.ScreenElements`: each visible element in HTML, without the attributes that tell nothing, and its
box in pixels, both asked of the browser's document (DOM). `vlm/demo/assets/web` holds what Chromium 156 made with the
fonts of Debian's fonts-dejavu and fonts-wqy-microhei. The pages of two sites are the test.
"""

import argparse
import html
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from random import Random
from typing import Any

from PIL import Image

from vlm.demo.web_layouts import LAYOUTS, page
from vlm.demo.web_sites import SITES, TEST_SITES
from vlm.errors import UserError

WEB = Path(__file__).parent / "assets/web"
PER_SITE = 5
WINDOWS = ((1280, 800), (1024, 768), (1366, 768), (800, 600), (540, 960))
"""Width and height in pixels."""
_QUALITY = 60
_FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--force-device-scale-factor=1"),
    *("--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"),
)
_TIMEOUT_S = 120
_ASK = """
<script>
addEventListener("load", () => {
  const kept = ["type", "name", "placeholder", "aria-label"], found = [];
  for (const e of document.querySelectorAll("a,button,input,select,textarea,svg,h1,h2,p,th,b")) {
    const r = e.getBoundingClientRect();
    const box = [Math.round(r.left), Math.round(r.top), Math.round(r.right), Math.round(r.bottom)];
    if (box[0] < 0 || box[1] < 0 || box[2] > WIDTH || box[3] > HEIGHT) continue;
    if (box[2] - box[0] < 4 || box[3] - box[1] < 4) continue;
    const tag = e.tagName.toLowerCase() == "svg" ? "img" : e.tagName.toLowerCase();
    const said = ["input", "select", "textarea", "img"].includes(tag) ? "" : e.textContent.replace(/\\s+/g, " ").trim();
    const told = kept.filter(k => e.getAttribute(k)).map(k => ` ${k}="${e.getAttribute(k)}"`).join("");
    if (!said && !told) continue;
    found.push({html: `<${tag}${told}>` + (said ? `${said}</${tag}>` : ""), box});
  }
  const out = document.createElement("pre");
  out.id = "elements-found";
  out.textContent = JSON.stringify(found);
  document.body.append(out);
});
</script>
"""


def pages() -> dict[str, str]:
    """HTML of every page by its name, the same every time."""
    found = {}
    layouts = list(LAYOUTS)
    for number, site in enumerate(SITES):
        for at in range(PER_SITE):
            layout = layouts[(number + 2 * at) % len(layouts)]
            name = f"{number:02d}_{layout}"
            found[name] = page(site, layout, Random(f"web {name}"))
    return found


def write_pages(folder: Path, browser: str) -> int:
    """Writes pages, screenshots and elements; returns how many elements there are.

    Raises:
        UserError: the browser cannot be started, or does not show a page.
    """
    (folder / "html").mkdir(parents=True, exist_ok=True)
    lines: dict[str, list[dict[str, Any]]] = {"train": [], "test": []}
    for number, (name, text) in enumerate(pages().items()):
        (folder / f"html/{name}.html").write_text(text, encoding="utf-8")
        window = WINDOWS[number % len(WINDOWS)]
        image, found = _show(text, browser, window)
        if image.size != window:
            raise UserError(f"web pages: {browser} shows {image.size} in a window of {window}; give another --browser")
        image.save(folder / f"{name}.webp", quality=_QUALITY, method=6)
        split = "test" if SITES[number // PER_SITE].name in TEST_SITES else "train"
        lines[split].append({"id": name, "image": f"{name}.webp", "elements": _unambiguous(found)})
        print(f"{name}: {image.width}x{image.height}, {len(lines[split][-1]['elements'])} elements", flush=True)
    for split, records in lines.items():
        text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        (folder / f"{split}.jsonl").write_text(text, encoding="utf-8")
    return sum(len(record["elements"]) for records in lines.values() for record in records)


def _show(text: str, browser: str, window: tuple[int, int]) -> tuple[Image.Image, list[dict[str, Any]]]:
    """What the browser shows in a window of this size, and the elements of its document."""
    with tempfile.TemporaryDirectory() as place:
        shown, asked, file = (Path(place) / name for name in ("shown.html", "asked.html", "shown.png"))
        shown.write_text(text, encoding="utf-8")
        ask = _ASK.replace("WIDTH", str(window[0])).replace("HEIGHT", str(window[1]))
        asked.write_text(text.replace("</body>", f"{ask}</body>"), encoding="utf-8")
        start = [browser, *_FLAGS, f"--window-size={window[0]},{window[1]}", f"--user-data-dir={place}/profile"]
        _run([*start, f"--screenshot={file}", shown.as_uri()])
        document = _run([*start, "--dump-dom", asked.as_uri()])
        if not file.is_file():
            raise UserError(f"web pages: {browser} made no screenshot; give another one with --browser")
        found = re.search(r'<pre id="elements-found">(.*?)</pre>', document, re.DOTALL)
        if found is None:
            raise UserError(f"web pages: {browser} ran no script of the page; give another one with --browser")
        with Image.open(file) as image:
            return image.convert("RGB"), json.loads(html.unescape(found[1]))


def _run(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, check=True, timeout=_TIMEOUT_S).stdout.decode()
    except (OSError, subprocess.SubprocessError) as error:
        raise UserError(
            f"web pages: {command[0]} cannot show a page ({error}); give a browser with --browser"
        ) from error


def _unambiguous(elements: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those whose HTML stands on the page once: others have no one box."""
    told = [element["html"] for element in elements]
    return [element for element in elements if told.count(element["html"]) == 1]


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m vlm.demo.web_pages", description=write_pages.__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--browser", default="chromium", help="command of a Chromium (default %(default)s)")
    options = parser.parse_args(arguments)
    print(f"{write_pages(options.folder, options.browser)} elements")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
