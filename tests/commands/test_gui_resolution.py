"""`benchmarks.gui_resolution`: the arm without CogAgent's fine view is its recipe, less what looks at that view."""

from pathlib import Path

import yaml

from benchmarks.gui_resolution import COGAGENT, coarse, table, write_coarse
from vlm.recipes import load_recipe


def test_the_coarse_arm_trains_all_but_the_fine_view(tmp_path: Path) -> None:
    recipe = load_recipe(write_coarse(tmp_path / "coarse"))
    whole = load_recipe(COGAGENT / "recipe.yaml")
    assert [node.name for node in recipe.nodes] == [node.name for node in whole.nodes][1:]
    for node in recipe.nodes:
        *_, last = node.overlays  # type: ignore[union-attr]
        trained = yaml.safe_load(last.read_text())["stage"]["train"]
        assert not [
            name for name in trained if "vision_high" in name or "cross" in name or name in ("places", "language")
        ]
        assert all(overlay.is_file() for overlay in node.overlays)  # type: ignore[union-attr]
    same = {"lr": 1.0}
    found = coarse({"places": same, "vision": same, "vision_high": same, "a.*cross_att*": same})
    assert found == dict.fromkeys(("places.low", "vision"), same)


def test_its_table_has_means_and_ranges() -> None:
    runs = [{"ground": 0.5, "refer": 0.25, "agent": 1.0}, {"ground": 1.0, "refer": 0.25, "agent": 0.0}]
    assert table({"both": runs}).splitlines()[-1] == (
        "| both | 2 | 0.75 (0.50 to 1.00) | 0.25 (0.25 to 0.25) | 0.50 (0.00 to 1.00) |"
    )
