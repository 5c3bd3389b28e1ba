"""Published records of screens, made by hand byte by byte, as the files that readers take."""

import gzip
import io
import json
import struct
from pathlib import Path
from typing import Any

import vlm  # noqa: F401
import pyarrow
import pytest
from PIL import Image
from pyarrow import parquet

import cli
from vlm.data import AndroidInTheWild, Mind2Web
from vlm.errors import UserError
from vlm.procedures.android_screens import read_records
from vlm.sample import TextPart


def field(number: int, content: bytes) -> bytes:
    """A field of a protocol buffer that has a length."""
    return bytes([number << 3 | 2]) + varint(len(content)) + content


def varint(value: int) -> bytes:
    found = bytearray()
    while value > 127:
        found.append(value & 127 | 128)
        value >>= 7
    return bytes([*found, value])


def example(features: dict[str, Any]) -> bytes:
    entries = b""
    for name, value in features.items():
        if isinstance(value, str | bytes):
            feature = field(1, field(1, value.encode() if isinstance(value, str) else value))
        elif isinstance(value, list):
            feature = field(2, field(1, struct.pack(f"<{len(value)}f", *value)))
        else:
            feature = field(3, field(1, varint(value)))
        entries += field(1, field(1, name.encode()) + field(2, feature))
    return field(1, entries)


def record(content: bytes) -> bytes:
    return struct.pack("<Q", len(content)) + b"\0\0\0\0" + content + b"\0\0\0\0"


def step(episode: str, number: int, **changes: Any) -> bytes:
    pixels = bytes([10 * number, 100, 200]) * (8 * 6)
    return record(example({
        "episode_id": episode, "step_id": number, "goal_info": "turn off wifi", "image/encoded": pixels,
        "image/width": 6, "image/height": 8, "image/channels": 3, "results/action_type": 4,
        "results/yx_touch": [0.25, 0.5], "results/yx_lift": [0.25, 0.5], "results/type_action": "",
        "image/ui_annotations_positions": [0.2, 0.4, 0.1, 0.2], **changes,
    }))  # fmt: skip


def answer(sample: Any) -> str:
    return "".join(part.text for part in sample.messages[-1].content if isinstance(part, TextPart))


def test_records_of_android_become_episodes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, out = tmp_path / "google_apps-00000-of-00001", tmp_path / "aitw"
    typed = {"results/action_type": 3, "results/type_action": "wifi"}
    file.write_bytes(gzip.compress(step("7", 1, **typed) + step("7", 0) + step("8", 0)))
    splits = tmp_path / "standard.json"
    splits.write_text(json.dumps({"train": ["7"], "validation": [], "test": ["9"]}))
    command = ["run", "android-screens", str(file), "--out", str(out)]
    assert cli.main([*command, "--subset", "googleapps", "--splits", str(splits)]) == 0
    assert "2 steps of train" in capsys.readouterr().out
    assert cli.main([*command, "--subset", "single"]) == 0
    source = AndroidInTheWild(out / "aitw_data_train.json", "googleapps", image_root=out / "images")
    assert len(source) == 2, "episode 8 is of no split"
    assert answer(source[0]) == "Grounded Operation:CLICK at the box "
    assert answer(source[1]) == "Grounded Operation:TYPE: wifi"
    assert source[1].images[0].read(source[1]).getpixel((3, 3)) == (10, 100, 200)
    assert len(AndroidInTheWild(out / "aitw_data_train.json", "single", image_root=out / "images")) == 3


def test_broken_records_of_android_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "a"
    for content, message in (
        (b"no gzip", "a: is no gzipped TFRecord file"),
        (gzip.compress(step("7", 0)[:-9]), "a: ends within a record"),
        (gzip.compress(record(b"\xff\xff")), "a: is no gzipped TFRecord file of examples"),
    ):
        file.write_bytes(content)
        with pytest.raises(UserError, match=message):
            list(read_records(file))
    file.write_bytes(gzip.compress(step("7", 3, **{"image/width": 7})))
    assert cli.main(["run", "android-screens", str(file), "--subset", "single", "--out", str(tmp_path / "out")]) == 2
    assert "step 3 of episode 7: 144 bytes are no 7x8 pixels" in capsys.readouterr().err


def test_tables_of_mind2web_become_tasks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = io.BytesIO()
    Image.new("RGB", (100, 50)).save(image, "JPEG")

    def row(at: int, *candidates: tuple[str, bool], shot: bytes | None = image.getvalue()) -> dict[str, Any]:
        return {
            "annotation_id": "8f62", "action_uid": f"u{at}", "confirmed_task": "Find it.",
            "target_action_index": str(at),
            "action_reprs": ["[a] x -> CLICK", "[b] y -> TYPE: New York", "[c] z -> CLICK", "[d] w -> CLICK"],
            "operation": json.dumps({"op": "TYPE" if at == 1 else "CLICK", "value": "New York" if at == 1 else ""}),
            "pos_candidates": [
                json.dumps({"tag": "a", "is_top_level_target": top,
                            "attributes": json.dumps({"bounding_box_rect": box})}) for box, top in candidates],
            "screenshot": {"bytes": shot, "path": None}, "website": "w", "domain": "d", "subdomain": "s",
        }  # fmt: skip

    rows = [row(2, ("0,0,9,9", True), shot=None), row(1, ("0,0,9,9", False), ("20,10,40,20", True)), row(0)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    out = tmp_path / "mind2web"
    command = ["run", "mind2web-screens", str(tmp_path / "a.parquet"), "--name", "train", "--out", str(out)]
    assert cli.main(command) == 0
    assert "1 tasks, 1 actions with a screenshot and a box" in capsys.readouterr().out
    source = Mind2Web(out / "mind2web_data_train.json", image_root=out / "images")
    assert len(source) == 1
    assert source.notes() == ["mind2web_data_train: 3 steps without a 'bbox' left out"]
    assert (
        source[0]
        .answers[0][0]
        .startswith(
            "Grounded Operation:[b] y -> TYPE: New York at the box [0.200000000, 0.200000000, 0.600000000, 0.600000000]"
        )
    )
    parquet.write_table(pyarrow.table({"x": [1]}), tmp_path / "a.parquet")
    assert cli.main(command) == 2
    assert "has no column 'action_reprs'; it is no table of Multimodal-Mind2Web" in capsys.readouterr().err
