"""Files and folders are written whole or not at all, whatever happens meanwhile."""

import ast
import errno
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from megactx.framework import files
from megactx.framework.errors import FAILED, MISTAKE, RunFailed, verdict
from megactx.framework.files import PART, clear, replacing


def content(path):
    return sorted(p.name for p in path.iterdir())


def write_folder(path, text):
    with replacing(path) as part:
        part.mkdir()
        (part / "a.txt").write_text(text)
        (part / "deep").mkdir()
        (part / "deep" / "b.txt").write_text(text)


def test_a_file_and_a_folder_take_the_place_of_what_was_there(tmp_path):
    for text in ("old", "new"):
        with replacing(tmp_path / "below" / "x.txt") as part:
            part.write_text(text)
        write_folder(tmp_path / "folder", text)
        assert (tmp_path / "below" / "x.txt").read_text() == text
        assert (tmp_path / "folder" / "deep" / "b.txt").read_text() == text
    assert content(tmp_path) == ["below", "folder"] and content(tmp_path / "below") == ["x.txt"]


def test_a_block_that_fails_any_number_of_times_leaves_the_old_one_and_nothing_beside_it(tmp_path):
    write_folder(tmp_path / "folder", "old")
    for error in (KeyError("x"), KeyboardInterrupt(), RunFailed("y")):
        with pytest.raises(type(error)), replacing(tmp_path / "folder") as part:
            part.mkdir()
            (part / "a.txt").write_text("half")
            raise error
    assert content(tmp_path) == ["folder"] and (tmp_path / "folder" / "a.txt").read_text() == "old"


@pytest.mark.parametrize("swaps", [True, False])
def test_a_kill_at_any_step_of_taking_a_folders_place_leaves_the_old_or_the_new_one(tmp_path, monkeypatch, swaps):
    """Every system call that may be the last one is; the next writer removes what is left."""
    if not swaps:
        monkeypatch.setattr(files, "NO_SWAP", (0, *files.NO_SWAP))
        monkeypatch.setattr(files.ctypes, "CDLL", lambda *_, **__: object())
    steps = 0
    for last in range(100):
        folder = tmp_path / f"{last}" / "folder"
        write_folder(folder, "old")
        pid = os.fork()
        if pid == 0:
            left = last

            def step(*_):
                nonlocal left
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                left -= 1

            for name in ("rename", "replace", "fsync"):
                real = getattr(os, name)
                setattr(os, name, lambda *a, real=real, **k: (step(), real(*a, **k), step()))
            write_folder(folder, "new")
            os._exit(0)
        killed = os.waitpid(pid, 0)[1] != 0
        clear(folder.parent)
        assert content(folder.parent) == ["folder"]
        found = {(folder / name).read_text() for name in ("a.txt", "deep/b.txt")}
        assert found in ({"old"}, {"new"})
        if not killed:
            assert found == {"new"}
            break
        steps += 1
    assert steps > 8


def test_what_a_killed_writer_left_is_removed_by_the_next_one_and_a_living_ones_stays(tmp_path):
    program = (
        "import sys, time; from megactx.framework.files import replacing\n"
        "with replacing(sys.argv[1]) as part:\n"
        "    part.write_text('half'); print('writing', flush=True); time.sleep(60)"
    )
    writers = [
        subprocess.Popen([sys.executable, "-c", program, str(tmp_path / name)], stdout=subprocess.PIPE, text=True)
        for name in ("dead", "alive")
    ]
    for writer in writers:
        assert writer.stdout.readline() == "writing\n"
    writers[0].kill()
    writers[0].wait()
    with replacing(tmp_path / "other") as part:
        part.write_text("whole")
    (left,) = tmp_path.glob(f"{PART}*")
    assert content(left) == ["alive"]
    writers[1].kill()
    writers[1].wait()
    clear(tmp_path.parent)  # of a folder above too
    assert content(tmp_path) == ["other"]


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        RuntimeError("[enforce fail at inline_container.cc:664] . PytorchStreamWriter failed writing file data/0"),
    ],
)
def test_a_full_disk_fails_with_the_place_and_what_can_be_done_whoever_found_it(tmp_path, error):
    with pytest.raises(RunFailed) as found, replacing(tmp_path / "x", "set folder=... to another disk"):
        raise error
    code, text = verdict(found.value)
    assert code == FAILED and str(tmp_path / "x") in text and "set folder=" in text and "before is whole" in text


def test_a_place_where_nothing_may_be_written_is_a_mistake_that_is_told_with_the_place(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "folder" / "full").mkdir(parents=True)
    for path in (tmp_path / "file" / "x", tmp_path / "folder"):
        with pytest.raises(ValueError, match=f"{path.name} cannot be written .*; set here=") as found:
            with replacing(path, "set here=... to another place") as part:
                part.write_text("new")
        assert verdict(found.value)[0] == MISTAKE
    assert content(tmp_path) == ["file", "folder"] and content(tmp_path / "folder") == ["full"]


def test_what_cannot_be_read_while_something_is_written_is_told_as_it_is(tmp_path):
    with pytest.raises(FileNotFoundError), replacing(tmp_path / "x"):
        open("/there/is/nothing")
    with pytest.raises(RuntimeError, match="else"), replacing(tmp_path / "x"):
        raise RuntimeError("something else")


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_weights_may_be_read_by_whoever_may_read_the_files_beside_them(umask, mode, tmp_path):
    before = os.umask(umask)
    try:
        with replacing(tmp_path / "folder") as part:
            part.mkdir()
            (part / "about.json").write_text("{}")
            save_file({"x": torch.zeros(2)}, part / "model.safetensors")
        with replacing(tmp_path / "alone.safetensors") as part:
            save_file({"x": torch.zeros(2)}, part)
    finally:
        os.umask(before)
    for name in ("folder/about.json", "folder/model.safetensors", "alone.safetensors"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == mode, name


def test_nothing_else_takes_the_place_of_a_file_or_a_folder():
    """Rooms that keep data folders of their own name them by a file that ``replacing`` writes."""
    own = {
        "framework/files.py",
        "apps/follow/part.py",  # its table counts once its tree is saved, so it is swapped behind it
        "apps/market/uploads.py",  # an upload that came in pieces and was checked whole goes to its place
        "framework/callbacks/logs.py",  # puts a file aside from a library that would delete it, and back
    }
    package, found = Path(files.__file__).parents[1], set()
    for path in package.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            name, of = node.func.attr, ast.unparse(node.func.value)
            one = len(node.args) == 1 and not node.keywords  # Path.replace; a string's takes two
            if (of, name) in (("os", "replace"), ("os", "rename"), ("shutil", "move")) or (
                name in ("rename", "replace") and one and of != "dataclasses"
            ):
                found.add(str(path.relative_to(package)))
    assert found <= own
