"""The commands of this room run under their old names too, and without what only some of them need."""

import runpy
import sys

import pytest

from megactx.apps import chat, generate
from megactx.apps.view.__main__ import main as view

OLD = ("chat", "generate", "ingest", "view")


@pytest.fixture
def no_extra(monkeypatch):
    """Nothing of the extra ``apps`` is installed."""
    for name in {*sys.modules}:
        if name.startswith(("megactx.apps.guard", "megactx.apps.serving", "megactx.apps.view.app")):
            monkeypatch.delitem(sys.modules, name)
    for name in ("h11", "uvicorn", "starlette", "starlette.applications", "starlette.responses", "opentelemetry"):
        monkeypatch.setitem(sys.modules, name, None)


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
@pytest.mark.parametrize("name", OLD)
def test_a_command_runs_under_its_old_name_and_says_the_new_one(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module(f"megactx.runtime.{name}", run_name="__main__")
    told = capsys.readouterr()
    assert ended.value.code == 0 and f"usage: python -m megactx.apps.{name} " in told.out
    (line,) = told.err.splitlines()
    assert f"this command is now python -m megactx.apps.{name};" in line


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
def test_the_exit_code_and_the_message_of_a_mistake_come_through_an_old_name(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["generate", "text", "--model", "/no/such"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("megactx.runtime.generate", run_name="__main__")
    told = capsys.readouterr().err.strip().splitlines()
    assert ended.value.code == 2 and told[-1].startswith("megactx: ") and "/no/such" in told[-1]


def test_without_the_extra_the_page_says_in_one_line_what_to_install(no_extra, capsys):
    assert view([]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("megactx: view: pip install 'megactx[apps]' first (")


def test_without_the_extra_all_else_works(no_extra, exported, tmp_path, monkeypatch, capsys):
    own = ["--model", str(exported), "--budget", "400", "--tokens", "4"]
    assert generate.main(["def read(path):", *own]) == 0
    monkeypatch.setattr(sys, "stdin", open("/dev/null"))
    assert chat.main(own) == 0
    assert view(["import os", *own, "--export", str(tmp_path / "replay.html")]) == 0
    assert (tmp_path / "replay.html").stat().st_size > 10_000
