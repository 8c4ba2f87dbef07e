"""Sessions that never end: a history of any length, a window of fixed size, the same cost per token."""

from megactx.parts.models import Models, load_models

from .controller import Controller
from .events import Observer, Refocused
from .part_files import Wanted
from .sampling import Sampling
from .session import Piece, Session
from .settings import Settings

__all__ = [
    "Controller",
    "Models",
    "Observer",
    "Piece",
    "Refocused",
    "Sampling",
    "Session",
    "Settings",
    "Wanted",
    "load_models",
]
