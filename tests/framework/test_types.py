from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Optional

import pytest

from megactx.framework.config.types import allowed, fits, hints, like


@pytest.mark.parametrize(
    ("value", "hint", "right"),
    [
        (1, int, True),
        (True, int, False),
        (1.0, int, False),
        (1, float, True),
        (True, float, False),
        (float("nan"), float, False),
        ("1", float, False),
        (None, int | None, True),
        (None, Optional[int], True),  # noqa: UP045
        (None, int, False),
        (1, bool, False),
        ([1], list[int], True),
        ([1], Sequence[int], True),
        ("ab", Sequence[int], False),
        ({}, dict[str, int], True),
        ([], dict, False),
        ("x", Literal["x", "y"], True),
        ("z", Literal["x", "y"], False),
        ("z", Literal["x"] | int, False),
        ("anything", Any, True),
        ("x", Path | None, True),  # a class of its own: what it takes is its business
        (5, int | Path, True),
    ],
)
def test_a_value_fits_an_annotation(value, hint, right):
    assert fits(value, hint) == right


def test_what_is_allowed_is_said_in_words():
    assert allowed(int | None) == "a whole number or null"
    assert allowed(Literal["x", "y"] | bool) == "x or y or true or false"


def test_a_value_is_like_the_one_that_it_replaces():
    assert like(0.5, 1) and like(1, 0.5) and like(None, 1) and like("x", None)
    assert not like("x", 1) and not like(1, "x") and not like(1, True) and not like([1], 1)


def test_annotations_that_cannot_be_read_say_nothing():
    def function(x: "NotImported"):  # noqa: F821
        pass

    assert hints(function) == {}
