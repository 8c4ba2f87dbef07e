"""MegaContext: a fixed-size working context over a tree of gists.

The public names are imported on first use, so that ``import megactx`` costs nothing. "Method 3" in a docstring is
section 3 of docs/method.md: definitions and formulas.
"""

import sys

_EXPORTS = {
    "BaseLM": "megactx.lm",
    "Controller": "megactx.runtime",
    "FocusAllocator": "megactx.focus",
    "GistNet": "megactx.gist",
    "LensNet": "megactx.focus",
    "MegaContextTree": "megactx.memory",
    "Session": "megactx.runtime",
    "WorkingContext": "megactx.memory",
}

__all__ = list(_EXPORTS)


def _one_line(kind, error, trace) -> None:
    """Ctrl-C while a command still imports: one line and exit code 130, as later."""
    if not issubclass(kind, KeyboardInterrupt):
        return sys.__excepthook__(kind, error, trace)
    import os

    print("\nmegactx: interrupted", file=sys.stderr, flush=True)
    os._exit(130)


if sys.argv[:1] == ["-m"] or sys.argv[0].endswith("train.py"):  # a command of ours begins; in a library nothing changes
    sys.excepthook = _one_line


def __getattr__(name: str):
    if name not in _EXPORTS:
        raise AttributeError(f"module 'megactx' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_EXPORTS[name]), name)


def __dir__():
    return sorted([*globals(), *_EXPORTS])
