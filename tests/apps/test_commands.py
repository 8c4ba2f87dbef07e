"""generate, chat and ingest as a person calls them: what they print, keep, refuse, and end with."""

import fcntl
import gzip
import io
import json
import os
import pty
import shutil
import signal
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from megactx.apps import chat, generate, ingest
from megactx.framework.errors import RunFailed
from megactx.memory.prediction import Readout
from megactx.parts.write import save_prediction
from megactx.runtime import Controller, Session, Settings, load_models
from megactx.runtime.session_files import MANIFEST

REPOSITORY = Path(__file__).parents[2]
TEXT = "def read(path):\n    return path.read_text()\n"


@pytest.fixture
def own(exported):
    """Arguments that every command takes."""
    return ["--model", str(exported), "--budget", "400"]


@pytest.fixture
def typed(monkeypatch):
    """What is piped into a command."""

    def make(content: bytes | str):
        raw = content.encode() if isinstance(content, str) else content
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(raw)))

    return make


def folder_of(tmp_path, **files):
    for name, content in files.items():
        (tmp_path / name.replace("__", ".")).write_bytes(content if isinstance(content, bytes) else content.encode())
    return tmp_path


def test_a_prompt_is_continued_the_same_from_the_command_line_a_file_and_stdin(own, typed, tmp_path, capsys):
    (tmp_path / "prompt.txt").write_text(TEXT)
    asked = (["--file", str(tmp_path / "prompt.txt")], [TEXT], [])
    told = []
    for arguments in asked:
        typed(TEXT)
        assert generate.main([*arguments, "--tokens", "12", *own]) == 0
        told.append(capsys.readouterr().out)
    assert len(told[0]) > 5 and told[0] == told[1] == told[2]


def test_several_prompts_are_a_batch_and_each_gets_its_own_answer(own, capsys):
    alone = []
    for prompt in (TEXT, "import os"):
        assert generate.main([prompt, "--tokens", "8", *own]) == 0
        alone.append(prompt + capsys.readouterr().out + "\n")
    assert generate.main([TEXT, "import os", "--tokens", "8", *own]) == 0
    assert capsys.readouterr().out == "".join(alone)


def test_a_session_is_read_under_megaattention_where_that_is_asked_for(own, tmp_path, capsys):
    mega = ["--attention", "mega", "--segment", "64", "--mid", "64", "--live", "32", "--overlap", "16"]
    where = ["--session", str(tmp_path / "talk"), "--tokens", "8"]
    assert generate.main([TEXT * 40, *own, *where, *mega]) == 0
    settings = json.loads((tmp_path / "talk" / MANIFEST).read_text())["settings"]
    assert (settings["attention"], settings["segment"], settings["overlap"]) == ("mega", 64, 16)
    assert generate.main([TEXT, *own, *where]) == 0  # and without it goes on with the same window
    capsys.readouterr()
    for wrong, said in (
        (["--segment", "6"], "--segment=6 is not allowed"),
        (["--overlap", "68"], "--overlap=68 is not allowed"),
        (["--earn"], "earn=true is not allowed with attention=mega"),
    ):
        assert generate.main([TEXT, *own, *mega, *wrong]) == 2
        assert said in (told := capsys.readouterr().err) and "Traceback" not in told


def test_generate_goes_on_with_a_session(own, tmp_path, capsys):
    folder = tmp_path / "session"
    assert generate.main([TEXT, "--tokens", "5", "--session", str(folder), *own]) == 0
    first = json.loads((folder / MANIFEST).read_text())["tokens"]
    assert generate.main(["more", "--tokens", "5", "--session", str(folder), *own]) == 0
    session = Session.load(folder, Controller(load_models(own[1], "cpu"), Settings(budget=400)))
    assert session.length > first + 5 and TEXT + capsys.readouterr().out[:3] in session.text()
    session.close()


def test_plain_generation_needs_no_gistnet(base_folder, capsys):
    assert generate.main([TEXT, "--tokens", "5", "--model", str(base_folder), "--megacontext", "none"]) == 0
    assert generate.main([TEXT, "--tokens", "5", "--model", str(base_folder)]) == 2
    assert "there is no GistNet" in capsys.readouterr().err


def test_a_talk_through_a_pipe_with_all_of_its_commands(own, typed, tmp_path, capsys):
    folder = tmp_path / "kept"
    lines = [
        "hello there",
        "/focus",
        "/tree",
        "/history 5",
        f"/save {folder}",
        "/save",
        f"/load {folder}",
        "/help",
        "/quit",
    ]
    typed("\n".join([*lines, "not read any more"]))
    assert chat.main(["--tokens", "40", *own]) == 0
    out = capsys.readouterr().out
    for part in ("refocus ", "of 400 entries", "sees ", f"saved to {folder}", "/history", "/quit"):
        assert part in out, part
    assert f"({folder} is in use" not in out or "in use by process" in out
    assert json.loads((folder / MANIFEST).read_text())["tokens"] > 40


def test_a_talk_shows_what_lensnet_decided(own, typed, capsys):
    typed("words " * 500 + "\n/focus\n")
    assert chat.main(["--tokens", "8", *own]) == 0
    out = capsys.readouterr().out
    assert "price " in out and "swap rate" in out and "score" in out


def test_a_talk_shows_which_blocks_the_model_expects(exported, models, typed, tmp_path, capsys):
    folder = shutil.copytree(exported, tmp_path / "models")
    own = ["--model", str(folder), "--budget", "400"]
    typed("words " * 200 + "\n/expects\n")
    assert chat.main(["--tokens", "8", *own]) == 0
    assert "no readout of what comes next" in capsys.readouterr().out
    save_prediction(Readout(models.base.width), {}, models.gistnet, folder / "prediction")
    typed("/expects\n" + "words " * 200 + "\n/expects\n")
    assert chat.main(["--tokens", "8", *own]) == 0
    out = capsys.readouterr().out
    assert "no block yet" in out and "cosine" in out and " .. " in out and "s word" in out.partition("cosine")[2]


def test_a_talk_is_kept_and_gone_on_with(own, typed, tmp_path, capsys):
    folder = tmp_path / "talk"
    for _ in range(2):
        typed("good morning\n")
        assert chat.main(["--tokens", "6", "--session", str(folder), *own]) == 0
    session = Session.load(folder, Controller(load_models(own[1], "cpu"), Settings(budget=400)))
    assert session.text().count("User: good morning\nAssistant:") == 2
    session.close()


def test_mistakes_at_the_prompt_do_not_end_a_talk(own, typed, capsys):
    typed(b"\xff\xfe\n/nosuch\n/load\n/load /nowhere\n/save\n/history x\n\n  \n/history 3\nstill here\n")
    assert chat.main(["--tokens", "3", *own]) == 0
    out = capsys.readouterr().out
    for part in ("not UTF-8", "no such command", "name a folder", "there is no session", "a number of tokens"):
        assert part in out, part


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_who_ends_a_talk_or_closes_its_terminal_finds_it_saved(name, own, typed, tmp_path, monkeypatch):
    number, calls, generated = getattr(signal, name), [], Session.generate
    before = signal.signal(number, signal.SIG_DFL)  # these tests may be run by something that ignores it

    def ended(self, *arguments):
        for count, piece in enumerate(generated(self, *arguments)):
            calls.append(piece)
            if count == 3:
                signal.raise_signal(number)
            yield piece

    typed("one\ntwo\n")
    monkeypatch.setattr(Session, "generate", ended)
    try:
        with pytest.raises(SystemExit) as end:
            chat.main(["--tokens", "6", "--session", str(tmp_path / "talk"), *own])
        assert signal.getsignal(number) is signal.SIG_DFL  # as it was
    finally:
        signal.signal(number, before)
    assert end.value.code == 128 + number and len(calls) == 4
    with Session.load(tmp_path / "talk", Controller(load_models(own[1], "cpu"), Settings(budget=400))) as session:
        assert "User: one" in session.text() and "two" not in session.text()


@pytest.mark.slow
def test_a_chat_whose_terminal_is_closed_is_saved(own, tmp_path):
    """Its input ends, and the signal comes while it saves; readline passes on a second one."""
    master, terminal = pty.openpty()

    def leader():
        os.setsid()
        fcntl.ioctl(terminal, termios.TIOCSCTTY, 0)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)

    command = [sys.executable, "-m", "megactx.apps.chat", "--session", str(tmp_path / "talk"), "--tokens", "6", *own]
    given = dict(stdin=terminal, stdout=terminal, stderr=terminal, preexec_fn=leader)
    with subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(REPOSITORY)}, **given) as process:
        os.close(terminal)
        told = b""
        while told.count(b"> ") < 2:
            told += os.read(master, 1024)
            if told.endswith(b"> ") and told.count(b"> ") == 1:
                os.write(master, b"one\n")
        os.close(master)
        assert process.wait(60) == 128 + signal.SIGHUP
    with Session.load(tmp_path / "talk", Controller(load_models(own[1], "cpu"), Settings(budget=400))) as session:
        assert "User: one" in session.text()


def test_a_signal_that_the_caller_ignores_or_handles_ends_nothing(own, typed, monkeypatch, capsys):
    heard, before = [], {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    signal.signal(signal.SIGTERM, lambda *_: heard.append(1))
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    line = chat._line

    def signalled():
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGHUP)
        return line()

    typed("one\n")
    monkeypatch.setattr(chat, "_line", signalled)
    try:
        assert chat.main(["--tokens", "2", *own]) == 0
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert len(heard) == 2 and capsys.readouterr().out.strip()


def test_ctrl_c_ends_an_answer_and_at_the_prompt_the_talk_which_is_saved(own, typed, tmp_path, monkeypatch, capsys):
    folder, generated = tmp_path / "talk", Session.generate
    calls = []

    def stopped(self, *arguments):
        calls.append(1)
        for count, piece in enumerate(generated(self, *arguments)):
            if len(calls) == 1 and count == 3:
                raise KeyboardInterrupt
            yield piece

    def ctrl_c():
        raise KeyboardInterrupt

    typed("one\ntwo\n")
    line = chat._line
    monkeypatch.setattr(Session, "generate", stopped)
    monkeypatch.setattr(chat, "_line", lambda: line() or ctrl_c())
    assert chat.main(["--tokens", "6", "--session", str(folder), *own]) == 130
    told = capsys.readouterr()
    assert "(stopped)" in told.out and told.err == "\nmegactx: interrupted\n" and len(calls) == 2
    with Session.load(folder, Controller(load_models(own[1], "cpu"), Settings(budget=400))) as session:
        assert "User: one" in session.text() and "User: two" in session.text()


def test_files_of_every_kind_become_one_history_and_are_not_read_twice(own, tmp_path, capsys):
    files = folder_of(
        tmp_path, a__md="# Title\n" + TEXT, b__py=TEXT * 40, c__jsonl='{"text": "one row"}\n{"text": "two"}\n'
    )
    (tmp_path / "d.txt.gz").write_bytes(gzip.compress(b"packed words"))
    out = tmp_path / "library"
    assert ingest.main([str(files / "*.*"), str(out), *own]) == 0
    told = capsys.readouterr().out
    assert "new tokens" in told and "gists:" in told and "100 %" in told
    own_controller = Controller(load_models(own[1], "cpu"), Settings(budget=400))
    with Session.load(out, own_controller) as session:
        text, length = session.text(), session.length
        tree = own_controller.build_tree(session.ids()[None])
        assert int(tree.counts(1)[0]) == int(session.tree.counts(1)[0]) + int(session.stream.counts[0]) // 4
    for part in ("# Title", "one row\n\ntwo", "packed words", TEXT * 40):
        assert part in text
    (tmp_path / "e.txt").write_text("a new file")
    assert ingest.main([str(files / "*.*"), str(out), *own]) == 0
    with Session.load(out, own_controller) as session:
        assert session.text() == text + "a new file\n\n" and session.length > length


def test_rows_of_a_file_are_taken_up_together_and_from_any_cut_on_in_the_same_pieces(tmp_path):
    rows = [f"row {i}\n{'word ' * (i % 7)}" for i in range(60)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    # One look at the window, not sixty.
    assert [*ingest.pieces(path, 0, ingest.PIECE)] == [(0, 1, ingest.BETWEEN.join(rows))]
    found = [*ingest.pieces(path, 0, 100)]
    assert "".join(text for *_, text in found) == ingest.BETWEEN.join(rows) and len(found) > 10
    assert all(len(text) <= 100 for *_, text in found)
    assert all(line == 1 + ingest.BETWEEN.join(rows)[:first].count("\n") for first, line, _ in found)
    for number, (first, *_) in enumerate(found):
        assert [*ingest.pieces(path, first, 100)] == found[number:]
    of_earlier_days = ingest.pieces(path, 33, 100)
    assert "".join(text for *_, text in of_earlier_days) == ingest.BETWEEN.join(rows)[33:]


def test_a_stopped_ingestion_goes_on_where_it_was(own, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ingest, "PIECE", 2000)
    monkeypatch.setattr(ingest, "SAVE_EVERY", 0.0)
    (tmp_path / "long.txt").write_text("".join(f"line {n} of a long text\n" for n in range(900)))
    append, calls = Session.append, []

    def stopped(self, content, **how):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return append(self, content, **how)

    with monkeypatch.context() as patch:
        patch.setattr(Session, "append", stopped)
        assert ingest.main([str(tmp_path / "long.txt"), str(tmp_path / "out"), *own]) == 130
    assert ingest.main([str(tmp_path / "long.txt"), str(tmp_path / "out"), *own]) == 0
    assert ingest.main([str(tmp_path / "long.txt"), str(tmp_path / "whole"), *own]) == 0
    own_controller, texts = Controller(load_models(own[1], "cpu"), Settings(budget=400)), []
    for name in ("out", "whole"):
        with Session.load(tmp_path / name, own_controller) as session:
            texts.append(session.text())
    assert texts[0] == texts[1] and texts[0].count("line ") == 900


@pytest.mark.parametrize("call", range(1, 5))
def test_a_ctrl_c_between_a_piece_and_the_note_of_it_reads_no_piece_twice(own, tmp_path, monkeypatch, call):
    monkeypatch.setattr(ingest, "PIECE", 200)
    (tmp_path / "one.txt").write_text("".join(f"line {n} of a text\n" for n in range(25)))
    append, calls = Session.append, []

    def stopped(self, content, **how):
        append(self, content, **how)
        calls.append(1)
        if len(calls) == call:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Session, "append", stopped)
        assert ingest.main([str(tmp_path / "one.txt"), str(tmp_path / "out"), *own]) == 130
    assert ingest.main([str(tmp_path / "one.txt"), str(tmp_path / "out"), *own]) == 0
    with Session.load(tmp_path / "out", Controller(load_models(own[1], "cpu"), Settings(budget=400))) as session:
        assert session.text() == (tmp_path / "one.txt").read_text() + ingest.BETWEEN


@pytest.mark.parametrize(
    ("content", "message"), [(b"", "empty"), (b"ab\xff\xfe", "not UTF-8"), (b"PK\x00\x01", "binary, not text")]
)
def test_a_file_that_is_no_text_is_refused_by_name_and_what_was_read_is_kept(own, tmp_path, content, message, capsys):
    (tmp_path / "good.txt").write_text(TEXT)
    (tmp_path / "bad.txt").write_bytes(content)
    out = tmp_path / "out"
    assert ingest.main([str(tmp_path / "good.txt"), str(tmp_path / "bad.txt"), str(out), *own]) == 2
    error = capsys.readouterr().err
    assert "bad.txt" in error and message in error and "Traceback" not in error
    if message != "empty":  # that is seen before anything is read
        assert list(json.loads((out / MANIFEST).read_text())["about"]["ingested"].values())[0]["whole"]


@pytest.mark.parametrize(
    ("command", "arguments", "message"),
    [
        (generate, ["x", "--budget", "40"], "budget=40 is not allowed: at least"),
        (generate, ["x", "--temperature", "-1"], "temperature=-1.0 is not allowed"),
        (generate, ["x", "--tokens", "-1"], "--tokens=-1 is not allowed"),
        (generate, ["x", "--stop", ""], "stop='' is not allowed"),
        (generate, ["x", "--file", "y"], "not both"),
        (generate, ["--file", "/nowhere"], "no such file"),
        (generate, ["x", "y", "--session", "z"], "one history"),
        (generate, ["x", "--model", "/nowhere"], "there is no such folder"),
        (chat, ["--session", "/proc/nowhere/x", "--budget", "400"], "/proc/nowhere/x cannot be written"),
        (ingest, ["/nowhere/x", "out"], "no such file"),
        (ingest, [__file__, "out", "--megacontext", "none"], "keeps no tree"),
    ],
)
def test_a_mistake_is_one_message_and_a_code(
    exported, command, arguments, message, capsys, typed, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    typed("")
    if "--model" not in arguments:
        arguments = [*arguments, "--model", str(exported)]
    code = command.main(arguments)
    error = capsys.readouterr().err
    assert code == 2 and message in error
    assert error.startswith("megactx: ") and "Traceback" not in error and error.count("\n") == 1


def test_a_folder_of_other_files_is_refused_before_anything_is_done(own, tmp_path, typed, capsys):
    (tmp_path / "thesis.txt").write_text("mine")
    typed("hello\n")
    assert chat.main(["--session", str(tmp_path), *own]) == 2
    assert "holds other files" in capsys.readouterr().err and os.listdir(tmp_path) == ["thesis.txt"]


@pytest.mark.slow
def test_the_commands_run_as_modules_with_nothing_but_the_package(tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def python(*arguments, stdin=b""):
        command = [sys.executable, "-m", *map(str, arguments)]
        return subprocess.run(command, input=stdin, capture_output=True, cwd=REPOSITORY, env=environment)

    done = python("megactx.apps.ingest", REPOSITORY / "README.md", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    done = python("megactx.apps.chat", "--session", tmp_path / "out", "--tokens", 20, stdin=b"hello\n/tree\n")
    assert done.returncode == 0 and b"sees" in done.stdout, done.stderr
    done = python("megactx.apps.generate", "import", "--tokens", 5, "--session", tmp_path / "out")
    assert done.returncode == 0 and len(done.stdout) > 3, done.stderr
    done = python("megactx.apps.generate", "import", "--tokens", "many")
    assert done.returncode == 2 and b"Traceback" not in done.stderr


def test_load_of_the_folder_that_the_talk_is_in_says_so_and_goes_on(own, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "talk"
    lines = f"/load {folder}\n/history\n/quit\n"
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(lines.encode())))
    assert chat.main(["--session", str(folder), *own]) == 0
    told = capsys.readouterr().out
    assert f"the talk is in {folder} already" in told and "in use by" not in told


def test_a_talk_goes_on_where_a_full_disk_refused_its_save(own, typed, disk, tmp_path, capsys):
    folder, place = tmp_path / "kept", disk("8k")
    typed(f"hello\n/save {place / 'small'}\nagain\n/quit\n")
    assert chat.main(["--session", str(folder), "--tokens", "3", *own]) == 0
    told = capsys.readouterr().out
    assert f"({place / 'small'}" in told and "full" in told
    assert not list(place.rglob("data-*"))
    with Session.load(folder, Controller(load_models(own[1], "cpu"), Settings(budget=400))) as session:
        assert "hello" in session.text() and "again" in session.text()


@pytest.mark.parametrize("command", ["generate", "ingest", "chat"])
def test_a_session_on_a_full_disk_ends_a_command_with_one_message_and_3(own, typed, disk, tmp_path, capsys, command):
    folder = disk("200k") / "kept"
    folder_of(tmp_path, short__txt=TEXT, long__txt=TEXT * 400)
    for code, name in ((0, "short.txt"), (3, "long.txt")):
        if command == "ingest":
            ended = ingest.main([str(tmp_path / name), str(folder), *own])
        else:
            text = (tmp_path / name).read_text()
            typed(text if command == "generate" else text.replace("\n", " ") + "\n")
            ended = {"generate": generate, "chat": chat}[command].main(
                ["--session", str(folder), "--tokens", "2", *own]
            )
        err = capsys.readouterr().err
        assert ended == code, err
        if not code:
            first = json.loads((folder / MANIFEST).read_text())["tokens"]
    assert err.count("megactx: ") == 1 and str(folder) in err and "full" in err and "Traceback" not in err
    assert len(list(folder.iterdir())) == 4  # its data, its tree, the manifest, the lock
    with Session.load(folder, Controller(load_models(own[1], "cpu"), Settings(budget=400))) as session:
        assert session.length == first


def test_a_talk_that_cannot_be_saved_loads_no_other(own, typed, tmp_path, monkeypatch, capsys):
    kept, other = tmp_path / "kept", tmp_path / "other"
    for folder in (kept, other):
        assert generate.main([TEXT, "--tokens", "1", "--session", str(folder), *own]) == 0
    save, failures = Session.save, [RunFailed("the disk is full")]

    def once(session, *folder):
        if session.folder == kept and session.length > before and failures:
            raise failures.pop()
        return save(session, *folder)

    before = json.loads((kept / MANIFEST).read_text())["tokens"]
    monkeypatch.setattr(Session, "save", once)
    typed(f"hello\n/load {other}\n/load {other}\n/quit\n")
    assert chat.main(["--session", str(kept), "--tokens", "1", *own]) == 0
    told = capsys.readouterr().out
    assert "(the disk is full)" in told and f"loaded {other}" in told and "in use" not in told


def test_a_long_file_says_what_was_read_and_an_empty_one_is_refused(own, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(generate, "PIECE", 100)
    (tmp_path / "long.txt").write_text("a line of a text\n" * 20)
    (tmp_path / "empty.txt").touch()
    assert generate.main(["--file", str(tmp_path / "long.txt"), "--tokens", "1", *own]) == 0
    told = capsys.readouterr().err
    assert "85 of 340 characters read" in told and "340 of 340 characters read" in told
    assert generate.main(["--file", str(tmp_path / "empty.txt"), *own]) == 2
    assert "it is empty" in capsys.readouterr().err


def test_nothing_on_stdin_is_refused_but_a_session_goes_on(own, typed, tmp_path, capsys):
    for more in ([], ["--session", str(tmp_path / "new")]):
        typed("")
        assert generate.main([*own, *more]) == 2
        assert "stdin is empty" in capsys.readouterr().err and not (tmp_path / "new").exists()
    kept = ["--session", str(tmp_path / "kept"), "--tokens", "3", *own]
    assert generate.main([TEXT, *kept]) == 0
    typed("")
    assert generate.main(kept) == 0


def test_ctrl_c_while_a_long_text_is_read_keeps_what_was_read(own, tmp_path, monkeypatch):
    monkeypatch.setattr(generate, "PIECE", 100)
    (tmp_path / "long.txt").write_text("a line of a text\n" * 20)
    append, calls = Session.append, []

    def stopped(self, *content):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return append(self, *content)

    with monkeypatch.context() as patch:
        patch.setattr(Session, "append", stopped)
        asked = ["--file", str(tmp_path / "long.txt"), "--session", str(tmp_path / "kept"), *own]
        assert generate.main(asked) == 130
    with Session.load(tmp_path / "kept", Controller(load_models(own[1], "cpu"), Settings(budget=400))) as session:
        assert session.text() == "a line of a text\n" * 10


def test_ctrl_c_while_a_command_imports_gives_one_line_and_130(tmp_path):
    (tmp_path / "torch.py").write_text("raise KeyboardInterrupt")
    path = {"PYTHONPATH": f"{tmp_path}{os.pathsep}{Path(generate.__file__).parents[2]}"}
    command = [sys.executable, "-m", "megactx.apps.chat"]
    done = subprocess.run(command, env=os.environ | path, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 130 and done.stderr == "\nmegactx: interrupted\n"


def test_a_plain_base_goes_on_past_its_positions_where_old_text_is_dropped(base_folder, tmp_path, capsys):
    long = tmp_path / "long.txt"
    long.write_text("def f(x):\n    return x + 1987\n\n" * 120)  # more than the 512 positions of the base
    own = ["--file", str(long), "--tokens", "40", "--model", str(base_folder)]
    assert generate.main([*own, "--megacontext", "none"]) == 2
    assert "megacontext=none takes at most 512" in capsys.readouterr().err
    assert generate.main([*own, "--megacontext", "recency"]) == 0
    told = capsys.readouterr()
    assert told.out.strip() and "dropped, not compressed" in told.err


def test_a_talk_with_a_plain_base_says_that_it_drops(base_folder, typed, capsys):
    typed("hello there\n/tree\nhow are you\n")
    assert chat.main(["--model", str(base_folder), "--megacontext", "recency", "--tokens", "5"]) == 0
    told = capsys.readouterr()
    assert "no tree" in told.out and told.err.count("dropped, not compressed") == 1


@pytest.mark.parametrize("command", [ingest, chat])
def test_without_a_gistnet_nothing_is_kept_in_a_folder(command, base_folder, typed, tmp_path, capsys):
    typed("hello\n")
    arguments = [__file__, str(tmp_path / "out")] if command is ingest else ["--session", str(tmp_path / "out")]
    assert command.main([*arguments, "--model", str(base_folder), "--megacontext", "recency"]) == 2
    assert "recency without a GistNet keeps no tree" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
