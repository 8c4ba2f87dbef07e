"""What docs/runtime.md shows works as it stands there."""

import re
from pathlib import Path

PAGE = (Path(__file__).parents[2] / "docs" / "runtime.md").read_text(encoding="utf-8")


def test_the_python_of_the_page_runs_as_written(capsys):
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    names = {}
    exec(compile(code, "runtime.md", "exec"), names)
    assert capsys.readouterr().out and names["nll"].isfinite().all()


def test_every_option_that_the_page_names_is_one():
    import argparse

    from megactx.apps.chat_commands import COMMANDS
    from megactx.apps.command_line import add_talk
    from megactx.framework.workers import add_engine

    parser = argparse.ArgumentParser()
    add_talk(parser, 1)
    add_engine(parser.add_argument)
    known = {name for action in parser._actions for name in action.option_strings}
    named = {*re.findall(r"--[a-z][a-z-]+", PAGE)} - {"--file", "--stop"}
    assert named <= known
    assert all(f"`{command}`" in PAGE for command in COMMANDS if command != "/help")
