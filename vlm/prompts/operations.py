"""What an agent does on a screen, as CogAgent writes it: read back from its answers.

::

    Grounded Operation:[combobox] Search -> TYPE: CogVLM at the box [[212,498,787,564]]

The words before the arrow name the element, as Mind2Web's `action_reprs` do; the box is in the form of the system.
"""

import re
from dataclasses import dataclass

from vlm.geometry import Point, bounds
from vlm.prompts.regions import Region, RegionForm

MARK = "Grounded Operation:"
"""What stands before the operation in CogAgent's answers."""
_SAME = {"TAP": "CLICK", "HOVER": "CLICK", "ENTER": "CLICK"}
"""Mind2Web counts hovering and pressing Enter as a click."""
_ACTION = re.compile(
    r"(?:->|^)\s*(CLICK|TAP|HOVER|ENTER|TYPE|SELECT|SCROLL (?:UP|DOWN|LEFT|RIGHT)|PRESS (?:BACK|HOME|ENTER)"
    r"|TASK (?:COMPLETE|IMPOSSIBLE))(?![\w-])\s*(:?)",
    re.IGNORECASE | re.MULTILINE,
)
_PLACE = re.compile(r"\s*\bat the (?:box|point)\b", re.IGNORECASE)


@dataclass(frozen=True)
class Operation:
    """One step.

    Attributes:
        action: in capitals, as `CLICK`, `TYPE` or `SCROLL DOWN`.
        value: what is typed or selected.
        regions: boxes and points that it names, in shares of the image.
    """

    action: str
    value: str = ""
    regions: tuple[Region, ...] = ()

    @property
    def point(self) -> Point | None:
        """The middle of the first place that it names."""
        return middle(self.regions[0]) if self.regions else None


def read_operation(text: str, form: RegionForm) -> Operation | None:
    """The operation of an answer; None where it has none. What stands before `MARK`, a plan perhaps, does not count."""
    written = text.rpartition(MARK)[2]
    found = _ACTION.search(written)
    if found is None:
        return None
    action = " ".join(found[1].upper().split())
    value, *where = _PLACE.split(written[found.end() :], maxsplit=1)
    regions = form.find(where[0] if where else value)
    # a value ends with its line: behind it an answer may go on
    kept = value.strip().partition("\n")[0].strip() if found[2] else ""
    return Operation(_SAME.get(action, action), kept, tuple(regions))


def middle(region: Region) -> Point:
    left, top, right, bottom = bounds(region.points)
    return (left + right) / 2, (top + bottom) / 2
