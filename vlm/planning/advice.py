"""What to change where a stage does not fit, and what it would need then, by the same arithmetic."""

from vlm.planning.stage import Planner, StagePlan


def advise(planner: Planner, plan: StagePlan) -> list[str]:
    return []
