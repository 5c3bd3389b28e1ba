"""The embedded world: small deterministic data and the tiny parts that the demo recipes train on it."""

import argparse
from pathlib import Path

from vlm.demo.formats import FORMATS, write_format
from vlm.demo.science_qa import main as science_qa
from vlm.demo.science_qa import write_science_qa
from vlm.demo.write import main as llava
from vlm.demo.write import write_demo_data

__all__ = ["main", "write_demo_data", "write_format", "write_science_qa"]

_OWN = {"llava": llava, "science_qa": science_qa}


def main(arguments: list[str]) -> int:
    """`vlm demo-data FOLDER [--format FORMAT]`; llava and science_qa have their own options."""
    parser = argparse.ArgumentParser(prog="vlm demo-data", add_help=False, allow_abbrev=False)
    parser.add_argument("--format", choices=(*_OWN, *FORMATS, "all"), default="llava")
    options, others = parser.parse_known_args(arguments)
    return _OWN[options.format](others) if options.format in _OWN else _published(options.format, others)


def _published(name: str, arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog=f"vlm demo-data --format {name}")
    parser.add_argument("folder", type=Path, help="where to; with `all`, of a folder for each format")
    parser.add_argument("--num", type=int, default=200, help="scenes (default %(default)s)")
    parser.add_argument("--size", type=int, default=96, help="mean shorter side in pixels (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    options = vars(parser.parse_args(arguments))
    folder = options.pop("folder")
    for each in FORMATS if name == "all" else (name,):
        target = folder / each if name == "all" else folder
        written = write_format(target, each, **options)
        print(f"{target}: {each}" if written else f"{target}: is there already")
    if name == "all":
        common = ["--size", str(options["size"]), "--seed", str(options["seed"])]
        llava([str(folder / "llava"), "--num_train", str(options["num"]), *common])
        science_qa([str(folder / "science_qa"), "--num_train", str(options["num"]), *common])
    return 0
