"""A locked folder has one process; another one is told which, or waits."""

import os
import subprocess
import sys

import pytest

from megactx.framework.lock import Lock

PROGRAM = "import sys; from pathlib import Path; from megactx.framework.lock import Lock\n"
PROGRAM += "with Lock(Path(sys.argv[1]) / 'lock', 'held by {holder}', wait=len(sys.argv) > 2): print('mine')"


def other(folder, *wait) -> subprocess.Popen:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", PROGRAM, str(folder), *wait], **pipes)


def test_another_process_is_told_who_holds_the_folder_and_one_that_waits_gets_it(tmp_path):
    folder = tmp_path / "{curly}" / "run"
    with Lock(folder / "lock", ""):
        refused, waiting = other(folder), other(folder, "wait")
        assert f"ValueError: held by {os.getpid()}" in refused.communicate(timeout=60)[1]
        assert waiting.stderr.readline() == f"megactx: held by {os.getpid()}\n"
    assert waiting.communicate(timeout=60)[0] == "mine\n"


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"file cannot be written \(.*\): name another folder"):
        Lock(tmp_path / "file" / "lock", "", "name another folder")


def test_a_file_system_without_locks_holds_nothing_and_is_no_error(tmp_path, monkeypatch):
    def without(*args):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("fcntl.flock", without)
    lock = Lock(tmp_path / "lock", "")
    lock.release()
    lock.release()
    assert (tmp_path / "lock").read_text() == f"{os.getpid()}\n"
