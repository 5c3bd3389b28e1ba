"""InternLM-XComposer2-4KHD: the files of InternLM-XComposer2 with two separators and a wider connector."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from vlm.checkpoints.published.family import PublishedFolder
from vlm.checkpoints.published.one_folder import OneFolderFamily
from vlm.checkpoints.published.xcomposer2 import SEPARATOR, XComposer2Family
from vlm.checkpoints.tables.rules import Axes

_TILE = 336
"""Side of a tile, a constant of the published code; `img_size` of `config.json` is what no line of it reads."""
_NUM = 55
"""Tiles that its authors let the model have where it counts; their code has 25 where nobody says a number."""
_CONTEXT = 16384


class XComposer2HD4KFamily(XComposer2Family):
    system = "xcomposer2_4khd"
    marks: ClassVar = {"official": SEPARATOR}
    own_entries = frozenset({"hd_num"})  # ours

    def claims(self, folder: PublishedFolder) -> bool:
        return OneFolderFamily.claims(self, folder)

    def connector_rules(self) -> tuple[Any, ...]:
        return (
            *super().connector_rules(),
            Axes(theirs=(SEPARATOR,), ours=("separators.between",), form="1 1 D -> D"),
            Axes(theirs=("plora_sub_GN",), ours=("separators.row_end",), form="1 1 1 D -> D"),
        )

    def describe_folder(self, config: Mapping[str, Any], folder: Path) -> dict[str, Any]:
        tile = (config.get("vision") or {}).get("img_size", _TILE)
        described = super().describe_folder({**config, "img_size": tile}, folder)
        described["init_args"] |= {
            "template": "xcomposer2",
            "hd_num": config.get("hd_num", _NUM),
            "max_tokens": config.get("max_length", _CONTEXT),
        }
        return described

    def config(self, module: Any, layout: str) -> dict[str, Any]:
        made = super().config(module, layout)
        if made["img_size"] != _TILE:
            made["vision"] = made.get("vision", {}) | {"img_size": made["img_size"]}
        num = module.arguments["hd_num"]
        return made if num == _NUM else made | {"hd_num": num}
