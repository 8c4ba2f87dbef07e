"""Bars around loops, where there is no terminal."""

from megactx.framework import bar as module
from megactx.framework.bar import bar


def test_without_a_terminal_a_long_loop_says_how_far_it_is_and_a_short_one_nothing(monkeypatch, capsys):
    assert list(bar("blocks")(range(3))) == [0, 1, 2]
    assert capsys.readouterr().out == ""
    monkeypatch.setattr(module, "EVERY", -1)
    assert list(bar("blocks")([5, 6])) == [5, 6]
    assert list(bar("others")(iter("a"))) == ["a"]
    assert capsys.readouterr().out.splitlines() == ["blocks: 1 of 2, 0 s", "blocks: 2 of 2, 0 s", "others: 1, 0 s"]
