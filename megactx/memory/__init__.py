"""The tree of gists, and the working context: a view of it that fits a fixed budget."""

from .composite import Composite
from .selection import Selection
from .tree import MegaContextTree
from .working_context import WorkingContext

__all__ = ["Composite", "MegaContextTree", "Selection", "WorkingContext"]
