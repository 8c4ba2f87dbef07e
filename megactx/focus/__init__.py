"""Where detail is worth having: measured values, LensNet, FocusAllocator (method 10, 11)."""

from .allocator import FocusAllocator
from .edit_labels import measure_values
from .edits import Edits, Moves, moves
from .lensnet import LensNet

__all__ = ["Edits", "FocusAllocator", "LensNet", "Moves", "measure_values", "moves"]
