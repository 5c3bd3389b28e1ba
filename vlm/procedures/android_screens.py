"""`vlm run android-screens`: Android in the Wild's published records as images and episodes.

    data/aitw/images/googleapps/7_0.png     the screens, by subset, episode and step
    data/aitw/aitw_data_train.json          {subset: episodes}, what `vlm.data.AndroidInTheWild` reads

The records are TensorFlow's (`tf.train.Example` in gzipped TFRecord files), which can be read from front to back alone.
Here they are read without TensorFlow.
"""

import argparse
import gzip
import json
import struct
import zlib
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError
from PIL import Image

from vlm.checkpoints.files.atomic import atomic_file
from vlm.data.sources.fields import read_object
from vlm.errors import UserError

SPLITS = {"train": "train", "validation": "val", "test": "test"}
"""Of the published lists of episodes, and in our file names."""
_LENGTH, _CHECKSUMS = 8, 4
Features = Mapping[str, list[Any]]


def read_records(path: Path) -> Iterator[Features]:
    """The records of a gzipped TFRecord file, {name: values}.

    Raises:
        UserError: it cannot be read, or ends within a record.
    """
    try:
        with gzip.open(path, "rb") as file:
            while head := file.read(_LENGTH + _CHECKSUMS):
                length = struct.unpack("<Q", head[:_LENGTH])[0] if len(head) == _LENGTH + _CHECKSUMS else -1
                record = file.read(length + _CHECKSUMS) if length >= 0 else b""
                if len(record) != length + _CHECKSUMS:
                    raise UserError(f"{path}: ends within a record; fetch it again")
                yield _features(record[:length])
    except (OSError, EOFError, zlib.error, DecodeError) as error:
        raise UserError(f"{path}: is no gzipped TFRecord file of examples ({error}); fetch it again") from error


def read_step(features: Features, *, subset: str, path: Path) -> tuple[dict[str, Any], Image.Image]:
    """A step as `vlm.data.AndroidInTheWild` has it, with `ep_id` and `step_id`, and its screen.

    Raises:
        UserError: a feature is missing, or the screen has another size than it says.
    """

    def one(name: str) -> Any:
        if not features.get(name):
            raise UserError(f"{path}: a record has no {name!r}; it is no file of Android in the Wild")
        return features[name][0]

    episode, step = one("episode_id").decode(), int(one("step_id"))
    (y, x), (to_y, to_x) = (features.get(f"results/yx_{name}") or [-1.0, -1.0] for name in ("touch", "lift"))
    width, height, pixels = int(one("image/width")), int(one("image/height")), one("image/encoded")
    if len(pixels) != 3 * width * height:
        raise UserError(f"{path}: step {step} of episode {episode}: {len(pixels)} bytes are no {width}x{height} pixels")
    return {
        "ep_id": episode,
        "step_id": step,
        "img_filename": f"{subset}/{episode}_{step}",
        "goal": one("goal_info").decode(),
        "action_type_id": int(one("results/action_type")),
        "touch": [x, y],
        "lift": [to_x, to_y],
        "type_text": (features.get("results/type_action") or [b""])[0].decode(),
        "annot_position": [round(value, 6) for value in features.get("image/ui_annotations_positions", [])],
    }, Image.frombytes("RGB", (width, height), pixels)


def write_episodes(
    files: Sequence[Path], out: Path, *, subset: str, splits: Mapping[str, str] | None = None
) -> dict[str, int]:
    """Writes screens, and the subset's episodes beside those of others; returns the number of steps of each split.

    Args:
        splits: {episode: split}; episodes that it does not name are left out. None: all are of `train`.
    """
    episodes: dict[str, dict[str, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for path in files:
        for features in read_records(path):
            step, screen = read_step(features, subset=subset, path=path)
            split = "train" if splits is None else splits.get(step["ep_id"])
            if split is None:
                continue
            file = out / f"images/{step['img_filename']}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            screen.save(file)
            episodes[split][step["ep_id"]].append(step)
    for split, found in episodes.items():
        target = out / f"aitw_data_{split}.json"
        others = read_object(target) if target.is_file() else {}
        steps = [sorted(episode, key=lambda step: step["step_id"]) for episode in found.values()]
        with atomic_file(target) as written:
            written.write(json.dumps({**others, subset: steps}).encode())
    return {split: sum(map(len, found.values())) for split, found in episodes.items()}


def main(arguments: list[str]) -> int:
    """`vlm run android-screens FILE ... --subset NAME --out FOLDER`."""
    parser = argparse.ArgumentParser(
        prog="vlm run android-screens", description="Android in the Wild's records as images and episodes."
    )
    parser.add_argument("files", nargs="+", type=Path, help="of one subset, as published: google_apps-00000-of-...")
    parser.add_argument("--subset", required=True, help="general, single, webshopping, install or googleapps")
    parser.add_argument("--out", type=Path, required=True, help="folder; other subsets may lie there already")
    parser.add_argument(
        "--splits", type=Path, help="published list of episodes (standard.json); without, all are train"
    )
    options = parser.parse_args(arguments)
    splits = None
    if options.splits is not None:
        lists = read_object(options.splits)
        if missing := sorted(SPLITS.keys() - lists.keys()):
            raise UserError(f"{options.splits}: has no {missing[0]!r}; it lists episodes under {', '.join(SPLITS)}")
        splits = {str(episode): ours for theirs, ours in SPLITS.items() for episode in lists[theirs]}
    counts = write_episodes(options.files, options.out, subset=options.subset, splits=splits)
    if not counts:
        raise UserError(f"{options.splits}: names none of the episodes in these files; give the list of their release")
    print(f"{options.out}: {', '.join(f'{count:,} steps of {split}' for split, count in counts.items())}")
    return 0


def _features(record: bytes) -> Features:
    found: dict[str, list[Any]] = {}
    for entry in _example().FromString(record).features.feature:
        value = entry.value
        found[entry.key] = [*value.bytes_list.value, *value.float_list.value, *value.int64_list.value]
    return found


@cache
def _example() -> Any:
    """`tf.train.Example`, of which a map is a repeated pair of key and value."""
    kinds = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="vlm_example.proto", package="vlm_example", syntax="proto3")

    def message(name: str, *fields: tuple[str, Any, bool]) -> None:
        made = file.message_type.add(name=name)
        for number, (field, kind, repeated) in enumerate(fields, start=1):
            label = kinds.LABEL_REPEATED if repeated else kinds.LABEL_OPTIONAL
            is_message = isinstance(kind, str)
            of = {"type": kinds.TYPE_MESSAGE, "type_name": f".{file.package}.{kind}"} if is_message else {"type": kind}
            made.field.add(name=field, number=number, label=label, **of)

    message("BytesList", ("value", kinds.TYPE_BYTES, True))
    message("FloatList", ("value", kinds.TYPE_FLOAT, True))
    message("Int64List", ("value", kinds.TYPE_INT64, True))
    message("Feature", ("bytes_list", "BytesList", False), ("float_list", "FloatList", False),
            ("int64_list", "Int64List", False))  # fmt: skip
    message("Entry", ("key", kinds.TYPE_STRING, False), ("value", "Feature", False))
    message("Features", ("feature", "Entry", True))
    message("Example", ("features", "Features", False))
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("vlm_example.Example"))
