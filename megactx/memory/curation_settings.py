"""How a tree is kept clean: one option of the config group ``curation``, see ``configs/curation``."""

from dataclasses import dataclass, field

from megactx.framework.config.types import Count, NonNegative, declared

from .curation import DEFAULT, names


@declared("curation")
@dataclass(frozen=True)
class CurationSettings:
    """What goes, how deep, and when.

    Args:
        policies: name -> settings; a policy that is ``None`` is not asked.
        floor: finest level that is kept of what goes.
        every: new tokens of a live session between two plans.
        spans: that one refocus of a live session archives at most.
        retention: days after which a live session purges what it archived; ``None``: never.

    Raises:
        ValueError: a setting that is not allowed, or a policy that is not known.
    """

    policies: dict | None = field(default_factory=lambda: {name: {} for name in DEFAULT})
    floor: Count = 1
    every: Count = 65_536
    spans: Count = 4
    retention: NonNegative | None = 90

    def __post_init__(self):
        for name in self.policies or {}:
            if name not in names():
                raise ValueError(f"curation.policies.{name} is not known, there are {', '.join(names())}")

    @property
    def named(self) -> dict[str, dict]:
        """The policies that are asked, with their settings."""
        return {name: settings for name, settings in (self.policies or {}).items() if settings is not None}
