"""Bars around loops, where there is no terminal."""

from megactx.framework import bar as module
from megactx.framework.bar import bar


def test_without_a_terminal_a_long_loop_says_how_far_it_is_and_a_short_one_nothing(monkeypatch, capsys):
    assert list(bar("blocks")(range(3))) == [0, 1, 2]
    assert capsys.readouterr().out == ""
    monkeypatch.setattr(module, "EVERY", -1)
    assert list(bar("blocks")([5, 6])) == [5, 6]
    assert list(bar("others")(iter("a"))) == ["a"]
    first, *rest = capsys.readouterr().out.splitlines()
    assert first.startswith("blocks: 1 of 2, 0 s") and rest == ["blocks: 2 of 2, 0 s", "others: 1, 0 s"]


def test_work_of_more_than_ten_minutes_says_so_behind_its_first_part(monkeypatch, capsys):
    clock = iter([0.0, 20.0, 25.0])
    monkeypatch.setattr(module.time, "monotonic", lambda: next(clock))
    parts = bar("blocks")(range(50))
    next(parts)
    next(parts)
    assert capsys.readouterr().out == "blocks: 1 of 50, 20 s, about 980 s left\n"


def test_it_names_what_makes_the_command_shorter_where_there_is_such_a_thing(monkeypatch, capsys):
    clock = iter([0.0, 20.0, 25.0])
    monkeypatch.setattr(module.time, "monotonic", lambda: next(clock))
    token = module.SHORTER.set("lower --count")
    try:
        parts = bar("blocks")(range(50))
        next(parts)
        next(parts)
    finally:
        module.SHORTER.reset(token)
    assert capsys.readouterr().out.splitlines()[1] == "That is about 17 minutes. Shorter: lower --count."
