"""Where detail is worth having: measured values, LensNet, FocusAllocator (SPEC 10, 11)."""

from .edits import Edits, Moves, moves

__all__ = ["Edits", "Moves", "moves"]
