"""What the tests of `vlm run instruct` share."""

import json
import re
from pathlib import Path
from typing import Any

from tests.support.chat_server import Asked

ROOT = Path(__file__).parents[2]
KEY = "sk-very-secret-0123456789"
TALK = (
    "Question:\nHow many dogs are there in {0}?\n===\nAnswer:\nThere are two.\n===\n"
    "Question:\nWhat do they do?\n===\nAnswer:\nThey run."
)
LONG = (
    "A dog runs over the wide green meadow. Behind it a red ball rolls down the gentle slope, and far away a man waits "
    "under a tree. {0}"
)


def records(num: int) -> list[dict[str, Any]]:
    return [{"id": f"r{i}", "image": f"{i}.png", "captions": [f"Caption {i}.", "Two dogs."]} for i in range(num)]


def write(path: Path, content: Any) -> Path:
    path.write_text(json.dumps(content))
    return path


def command_line(tmp_path: Path, url: str, *options: str, source: Any = None, kind: str = "conversation") -> list[str]:
    if not (tmp_path / "in.json").exists():
        write(tmp_path / "in.json", records(6) if source is None else source)
    files = ["--records", str(tmp_path / "in.json"), "--out", str(tmp_path / "out.json")]
    return ["instruct", "--kind", kind, *files, "--endpoint", url, "--model", "writer", *options]


def about(asked: Asked) -> str:
    """Number of the record that is asked about."""
    return re.findall(r"Caption (\d+)", asked.text)[0]


def talk(asked: Asked) -> str:
    return TALK.format(about(asked))


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]
