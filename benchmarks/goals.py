"""What was aimed at, and whether it is met."""

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.readme import head, row, times


@dataclass(frozen=True)
class Goal:
    """Hold what was aimed at, in comparison with a peer or as such."""

    text: str
    bound: float
    at_least: bool
    unit: str = "times"

    def met(self, figure: float) -> bool:
        """Tell whether a figure is good enough."""
        return figure >= self.bound if self.at_least else figure <= self.bound


def goal_rows(judged: Sequence[tuple[Goal, float]]) -> list[str]:
    """Write goals down, the figure first."""
    lines = [*head("what", "found", "goal", "met")]
    for goal, figure in judged:
        said = times(figure) if goal.unit == "times" else f"{figure:,.3g} {goal.unit}"
        bound = f"{'at least' if goal.at_least else 'at most'} {goal.bound:g} {goal.unit}"
        lines.append(row(goal.text, f"**{said}**", bound, "yes" if goal.met(figure) else "no"))
    return lines
