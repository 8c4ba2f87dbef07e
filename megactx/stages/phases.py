"""Who learns at which step of an alternating run: a function of the step, so a run goes on anywhere (method 12)."""

from dataclasses import dataclass

PHASES = ("gist", "lens", "lora")


@dataclass(frozen=True)
class Place:
    """Where a step lies."""

    cycle: int
    phase: str
    position: int  # steps of the phase before it, in this cycle


@dataclass(frozen=True)
class Schedule:
    """Cycles of phases.

    Args:
        steps: phase -> steps of it in each cycle; 0 leaves it out.
        cycles: how many.

    Raises:
        ValueError: a number that is not allowed, or nothing that learns.
    """

    steps: dict[str, int]
    cycles: int

    def __post_init__(self):
        for name in PHASES:
            if self.steps[name] < 0:
                raise ValueError(f"stage.steps.{name}={self.steps[name]} is not allowed: 0 (left out) or more")
        if not self.cycle:
            raise ValueError("stage.steps: nothing learns, at least one phase must have steps")
        if self.cycles < 1:
            raise ValueError(f"stage.cycles={self.cycles} is not allowed: at least 1")

    @property
    def cycle(self) -> int:
        """Steps of a cycle."""
        return sum(self.steps[name] for name in PHASES)

    def at(self, step: int) -> Place:
        """Where step ``step`` lies; behind the last one it is the start of one more cycle."""
        cycle, position = divmod(step, self.cycle)
        for name in PHASES:
            if position < self.steps[name]:
                return Place(cycle, name, position)
            position -= self.steps[name]
        raise AssertionError("phases make up the cycle")

    def before(self, step: int, phase: str) -> int:
        """How many steps of a phase lie before step ``step``, over all cycles."""
        cycle, position = divmod(step, self.cycle)
        first = sum(self.steps[name] for name in PHASES[: PHASES.index(phase)])
        return cycle * self.steps[phase] + min(max(position - first, 0), self.steps[phase])
