"""Base LMs that make the tests of this room mean something."""

import pytest


@pytest.fixture(scope="session")
def make_base():
    """kind -> a small frozen base LM with random weights that make it care about what it reads."""
    from small_base import small

    def make(kind="llama"):
        base = small(kind)
        for p in base.parameters():
            p.data *= 1.5
        return base

    return make
