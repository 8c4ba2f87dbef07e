"""MegaContext: a fixed-size working context over a tree of gists.

The public names are imported on first use, so that ``import megactx`` costs nothing. "Method 3" in a docstring is
section 3 of docs/method.md: definitions and formulas.
"""

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


def __getattr__(name: str):
    if name not in _EXPORTS:
        raise AttributeError(f"module 'megactx' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_EXPORTS[name]), name)


def __dir__():
    return sorted([*globals(), *_EXPORTS])
