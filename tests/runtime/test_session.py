"""A session on disk: the same next token, whole after any kill, one process at a time, nobody else's files."""

import errno
import json
import os
import random
import shutil
import signal
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from byte_fallback import KINDS

from megactx.framework.errors import FAILED, RunFailed, verdict
from megactx.framework.files import PART
from megactx.lm import adapters
from megactx.memory import MegaContextTree
from megactx.memory.encoding import identity_of_base
from megactx.memory.page_file import PageFile
from megactx.runtime import Controller, Models, Sampling, Session, Settings
from megactx.runtime.session_files import MANIFEST, STATE, lock

TEXT = "def read(path):\n    return path.read_text()\n" * 12  # some 400 tokens


@pytest.fixture
def session(controller):
    session = Session(controller())
    session.append(TEXT)
    yield session
    session.close()


def tokens(session, count, sampling=None, stop=()):
    return [piece.token for piece in session.generate(count, sampling or Sampling(), stop)]


def test_a_session_opens_with_bos_and_takes_text_as_text(controller):
    session = Session(controller())
    assert session.ids().tolist() == [0] and session.context is None
    session.append("<|bos|>")
    assert session.length > 2 and not (session.ids()[1:] < 2).any()
    assert session.text() == "<|bos|>" and session.append("") is None and session.append([], score=True).numel() == 0


@pytest.mark.parametrize("more", [0, 3])
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=1.5, top_k=40, repetition_penalty=1.2, seed=5)])
def test_a_resumed_session_goes_on_with_the_same_tokens(session, controller, tmp_path, more, sampling):
    tokens(session, 18 + more, sampling)
    session.save(tmp_path / "saved")
    window = session.context.copy()
    session.close()
    expected = tokens(session, 24, sampling)
    resumed = Session.load(tmp_path / "saved", controller())
    assert torch.equal(resumed.context.lod, window.lod) and torch.equal(resumed.context.index, window.index)
    assert tokens(resumed, 24, sampling) == expected
    resumed.close()


def test_a_resumed_session_makes_its_edits_in_the_same_blocks(controller, tmp_path):
    own = controller(edit_every=3)
    session = Session(own)
    session.append(TEXT * 3)
    tokens(session, 30)
    session.save(tmp_path / "saved")
    session.close()
    expected = tokens(session, 40)
    resumed = Session.load(tmp_path / "saved", own)
    assert tokens(resumed, 40) == expected
    assert torch.equal(resumed.context.lod, session.context.lod)
    resumed.close()


def test_a_session_that_was_saved_before_a_setting_was_there_keeps_its_window(session, controller, tmp_path):
    tokens(session, 30)
    folder = session.save(tmp_path / "saved")
    session.close()
    manifest = json.loads((folder / "session.json").read_text())
    del manifest["settings"]["edit_every"]
    (folder / "session.json").write_text(json.dumps(manifest))
    resumed = Session.load(folder, controller())
    assert torch.equal(resumed.context.lod, session.context.lod)
    resumed.close()


def test_a_session_that_was_just_opened_or_only_ingested_comes_back_too(controller, tmp_path):
    for name, text in (("new", ""), ("long", TEXT * 3)):
        session = Session(controller())
        session.append(text)
        session.about["note"] = [1, "two"]
        session.save(tmp_path / name)
        session.close()
        resumed = Session.load(tmp_path / name, controller())
        assert torch.equal(resumed.ids(), session.ids()) and resumed.about == {"note": [1, "two"]}
        assert tokens(resumed, 20) == tokens(session, 20)
        resumed.close()


def test_under_other_settings_the_history_comes_back_and_the_window_is_new(session, controller, models, tmp_path):
    session.save(tmp_path / "saved")
    session.close()
    other = Controller(models, Settings(budget=120, megacontext="recency", allocator={"protected": 8}))
    resumed = Session.load(tmp_path / "saved", other)
    assert torch.equal(resumed.ids(), session.ids())
    assert resumed.context.budget == 120 and resumed.context.ends().tolist() == resumed.tree.lengths.tolist()
    resumed.close()


def test_pieces_are_told_up_to_a_stop_string_which_is_part_of_the_history(session):
    free = list(session.generate(30))
    assert free[-1].stopped == "length" and all(piece.stopped is None for piece in free[:-1])
    text = "".join(piece.text for piece in free)
    assert text == session.text(session.length - 30)


def test_a_stop_string_ends_an_answer(controller):
    one, other = Session(controller()), Session(controller())
    for session in (one, other):
        session.append(TEXT)
    text = "".join(piece.text for piece in one.generate(40))
    stop = text[10:13]
    told = list(other.generate(40, stop=[stop]))
    assert "".join(piece.text for piece in told) == text[: text.index(stop)] and told[-1].stopped == stop
    assert stop in other.text(other.length - 40)


def test_scores_of_text_are_nats_per_token(session):
    found = session.append(" return path", score=True)
    assert found.shape == (len(session.encode(" return path")),) and (found > 0).all()


def test_half_characters_and_foreign_ids_are_refused_and_nothing_is_taken(session):
    before = session.length
    with pytest.raises(ValueError, match="not valid Unicode"):
        session.append("a\ud800b")
    with pytest.raises(ValueError, match="id 600 is not allowed"):
        session.append([5, 600])
    with pytest.raises(ValueError, match=r"ids have shape \[1, 2\]"):
        session.append(torch.tensor([[5, 6]]))
    assert session.length == before


def test_a_folder_is_held_by_one_session_at_a_time(session, controller, tmp_path):
    folder = session.save(tmp_path / "saved")
    with pytest.raises(ValueError, match=f"in use by process {os.getpid()}"):
        Session.load(folder, controller())
    session.close()
    resumed = Session.load(folder, controller())
    with pytest.raises(ValueError, match="holds another session"):
        session.save(folder)
    resumed.close()


def test_another_process_is_told_who_holds_the_folder(session, tmp_path):
    folder, (reading, writing) = session.save(tmp_path / "saved"), os.pipe()
    if os.fork() == 0:
        try:
            lock(folder)
        except ValueError as error:
            os.write(writing, str(error).encode())
        finally:
            os._exit(0)
    os.wait()
    assert f"{folder} is in use by process {os.getpid()}" in os.read(reading, 1000).decode()


def test_a_folder_of_other_files_is_left_alone(session, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds other files"):
        session.save(tmp_path)
    with pytest.raises(ValueError, match="is not a folder"):
        session.save(tmp_path / "notes.txt")
    with pytest.raises(ValueError, match="name a folder"):
        session.save()
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_tree_of_another_gistnet_or_tokenizer_is_refused(session, models, make_models, tmp_path, controller):
    folder = session.save(tmp_path / "saved")
    session.close()
    settings = Settings(budget=96, allocator={"protected": 8})
    with pytest.raises(ValueError, match="another GistNet made it"):
        Session.load(folder, Controller(make_models(seed=1), settings))
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps(manifest | {"tokenizer": "0" * 16, "model": "smollm2"}))
    with pytest.raises(ValueError, match="belongs to another tokenizer, that of smollm2; name it with --model"):
        Session.load(folder, controller())
    with pytest.raises(ValueError, match="there is no session"):
        Session.load(tmp_path / "nowhere", controller())
    with pytest.raises(ValueError, match="megacontext=none"):
        Session.load(folder, controller("none"))
    with pytest.raises(ValueError, match="megacontext=none keeps no tree"):
        Session(controller("none")).save(tmp_path / "other")


def damage(folder: Path, what: str) -> None:
    data = folder / json.loads((folder / MANIFEST).read_text())["data"]
    if what == "half a manifest":
        (folder / MANIFEST).write_text((folder / MANIFEST).read_text()[:40])
    elif what == "a list for a manifest":
        (folder / MANIFEST).write_text("[]")
    elif what == "another folder's data":
        text = (folder / MANIFEST).read_text().replace(data.name, "../elsewhere")
        (folder / MANIFEST).write_text(text)
    elif what == "a newer format":
        (folder / MANIFEST).write_text((folder / MANIFEST).read_text().replace('"format": 2', '"format": 99'))
    elif what == "half a state":
        (data / STATE).write_bytes((data / STATE).read_bytes()[:-9])
    elif what == "no state":
        (data / STATE).unlink()
    elif what == "a linked state":
        shutil.move(data / STATE, folder.parent / "state")
        (data / STATE).symlink_to(folder.parent / "state")
    elif what == "no tree":
        shutil.rmtree(folder / "tree")
    elif what == "another length":
        (folder / MANIFEST).write_text((folder / MANIFEST).read_text().replace('"tokens": ', '"tokens": 1'))


@pytest.mark.parametrize(
    "what",
    [
        "half a manifest",
        "a list for a manifest",
        "another folder's data",
        "a newer format",
        "half a state",
        "no state",
        "a linked state",
        "no tree",
        "another length",
    ],
)
def test_a_damaged_session_is_refused_by_name_and_its_lock_is_released(session, controller, tmp_path, what):
    folder = session.save(tmp_path / "saved")
    session.close()
    damage(folder, what)
    for _ in range(2):  # the second time would meet a lock that was left
        with pytest.raises(ValueError, match=str(folder)):
            Session.load(folder, controller())


@pytest.mark.parametrize("name", ["lod", "index", "waiting"])
def test_a_state_that_contradicts_the_tree_is_refused(session, controller, tmp_path, name):
    from safetensors.torch import load_file, save_file

    assert session.context is not None
    folder = session.save(tmp_path / "saved")
    session.close()
    path = folder / json.loads((folder / MANIFEST).read_text())["data"] / STATE
    state = load_file(path)
    state[name] = state[name] + 1 if name != "waiting" else torch.full((50,), 3)
    save_file(state, path)
    with pytest.raises(ValueError, match="working context|is damaged"):
        Session.load(folder, controller())


def test_a_save_after_a_few_tokens_writes_the_pages_that_have_changed(controller, tmp_path, monkeypatch, ids):
    monkeypatch.setattr("megactx.memory.tree.TOKENS", 256)
    monkeypatch.setattr("megactx.memory.tree.NODES", 16)
    session = Session(controller())
    session.append(ids(5_000))
    tokens(session, 8)
    folder = session.save(tmp_path / "saved")
    written, put = [], PageFile.put
    monkeypatch.setattr(PageFile, "put", lambda self, pages, **how: put(self, counted(pages, written), **how))
    for _ in range(2):
        written.clear()
        tokens(session, 32)
        session.save()
        bodies = [size for part, size in written if part == "body"]
        assert (
            1 <= len(bodies) <= session.tree.depth + 2 and sum(size for _, size in written) < session.tree.bytes() / 5
        )
        whole, window = session.tree, session.context.copy()
        session.close()
        session = Session.load(folder, controller())  # what was written is what is there
        assert torch.equal(session.tree.tokens, whole.tokens) and torch.equal(session.context.index, window.index)
        for lod in range(1, whole.depth + 1):
            assert torch.equal(session.tree.gists(lod), whole.gists(lod))
            for what in ("version", "access", "time", "protected"):
                assert torch.equal(session.tree.about(lod, what), whole.about(lod, what))


def counted(pages, written: list):
    for page in pages:
        written.append((page[1], len(page[3])))
        yield page


def test_a_session_of_the_format_before_opens_and_is_converted_by_its_next_save(session, controller, tmp_path):
    folder, history = session.save(tmp_path / "saved"), session.ids()
    session.close()
    manifest = json.loads((folder / MANIFEST).read_text())
    with Session.load(folder, controller()) as loaded:
        loaded.tree.export(tmp_path / "exported")
    shutil.rmtree(folder / "tree")
    shutil.move(tmp_path / "exported", folder / manifest["data"] / "tree")
    (folder / MANIFEST).write_text(json.dumps(manifest | {"format": 1}))
    for _ in range(2):
        with Session.load(folder, controller()) as loaded:
            assert torch.equal(loaded.ids(), history)
            expected = session.context
            assert torch.equal(loaded.context.lod, expected.lod) and torch.equal(loaded.context.index, expected.index)
            loaded.save()
        assert json.loads((folder / MANIFEST).read_text())["format"] == 2
        assert not list(folder.rglob("*level*")) and len(list(folder.glob("data-*"))) == 1


def test_what_a_tree_has_behind_the_session_that_was_saved_is_forgotten(session, controller, tmp_path, monkeypatch):
    folder, history = session.save(tmp_path / "saved"), session.ids()
    session.append(TEXT * 3)
    with monkeypatch.context() as patch, pytest.raises(RunFailed):
        patch.setattr("megactx.runtime.session_files._name", raising)
        session.save()
    session.close()
    with Session.load(folder, controller()) as resumed:
        assert torch.equal(resumed.ids(), history)
        expected = tokens(resumed, 40)
        resumed.save()
    with Session.load(folder, controller()) as resumed:
        assert resumed.ids().tolist() == history.tolist() + expected
        whole = MegaContextTree.from_tokens(resumed.tree.tokens, resumed.tree.encoder, resumed.tree.base)
        assert all(torch.equal(resumed.tree.gists(n), whole.gists(n)) for n in range(1, whole.depth + 1))


@pytest.mark.parametrize("where", ["before", "behind"])
def test_a_stop_while_the_tree_takes_up_a_block_leaves_a_session_that_goes_on(controller, tmp_path, monkeypatch, where):
    session, append = Session(controller()), MegaContextTree.append
    session.append(TEXT)
    told = []

    def stopped(*arguments):
        if where == "behind":
            append(*arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(MegaContextTree, "append", stopped)
        for piece in session.generate(40):
            told.append(piece.token)
    history = session.ids()
    folder = session.save(tmp_path / "saved")
    session.close()
    with Session.load(folder, controller()) as resumed:
        assert torch.equal(resumed.ids(), history) and history.tolist()[-len(told) - 1 : -1] == told
        expected = tokens(session, 20)  # the one that was stopped goes on, and so does the one on disk
        assert tokens(resumed, 20) == expected and len(expected) == 20
        resumed.save()


def raising(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_saves_that_fail_leave_the_last_one_and_nothing_beside_it(session, controller, tmp_path, monkeypatch):
    folder, length = session.save(tmp_path / "saved"), session.length
    before = sorted(path.name for path in folder.rglob("*"))
    session.append(TEXT)

    written = "megactx.memory.page_file.PageFile.put"
    for name in ("megactx.runtime.session_files.save_file", written, "megactx.runtime.session_files.sync"):
        with (
            monkeypatch.context() as patch,
            pytest.raises(RunFailed, match=f"{folder}.* full.*before is whole") as told,
        ):
            patch.setattr(name, raising)
            session.save()
        assert verdict(told.value)[0] == 3
        assert sorted(path.name for path in folder.rglob("*")) == before
    session.close()
    with Session.load(folder, controller()) as resumed:
        assert resumed.length == length


def test_a_session_that_does_not_fit_on_its_disk_leaves_the_one_before_whole(controller, disk, tmp_path, ids):
    folder = disk("300k") / "saved"
    session = Session(controller())
    session.append(ids(1_000))
    session.save(folder)
    before, length = sorted(path.name for path in folder.rglob("*")), session.length
    session.append(ids(6_000, seed=1))
    for _ in range(3):
        with pytest.raises(RunFailed, match=f"{folder}.*full.*before is whole.*--session, OUT or /save") as told:
            session.save()
        assert verdict(told.value)[0] == FAILED
        assert sorted(path.name for path in folder.rglob("*")) == before
    whole = session.length
    session.save(tmp_path / "elsewhere")  # the way out that the message names
    session.close()
    for place, tokens_there in ((folder, length), (tmp_path / "elsewhere", whole)):
        with Session.load(place, controller()) as resumed:
            assert resumed.length == tokens_there


@pytest.mark.parametrize("kind", ["full", "read-only"])
def test_a_session_that_cannot_be_saved_elsewhere_stays_in_its_folder(session, controller, disk, tmp_path, kind):
    folder, place = session.save(tmp_path / "saved"), disk("8k", read_only=kind == "read-only")
    session.append(TEXT)
    with pytest.raises(RunFailed if kind == "full" else ValueError, match=str(place)):
        session.save(place / "other")
    assert session.save() == folder
    session.close()
    assert not list(tmp_path.rglob(f"{PART}*")) and not list(place.rglob("data-*"))
    with Session.load(folder, controller()) as resumed:
        assert resumed.length == session.length


def test_a_disk_without_room_for_a_name_is_told_as_full(session, disk):
    place = disk("4k")
    (place / "other").write_bytes(b"x" * 4096)
    with pytest.raises(RunFailed, match=f"{place / 'saved'} cannot be written .*No space left") as told:
        session.save(place / "saved")
    assert verdict(told.value)[0] == FAILED and session.folder is None


def test_a_save_that_fails_at_its_end_is_made_good_by_the_next(session, controller, tmp_path, monkeypatch):
    folder = session.save(tmp_path / "saved")
    session.append(TEXT)
    with monkeypatch.context() as patch, pytest.raises(RunFailed):
        patch.setattr("megactx.runtime.session_files._name", raising)
        session.save()
    pages = next(folder.rglob("pages-*.db"))
    session.save()
    assert next(folder.rglob("pages-*.db")) == pages
    session.close()
    with Session.load(folder, controller()) as resumed:
        assert torch.equal(resumed.ids(), session.ids())


def test_what_a_killed_save_left_is_removed_by_the_next_load(session, controller, tmp_path):
    folder = session.save(tmp_path / "saved")
    session.close()
    before = sorted(path.name for path in folder.rglob("*"))
    (folder / f"data-{'a' * 16}" / "tree").mkdir(parents=True)
    (folder / f"{PART}x").mkdir()
    Session.load(folder, controller()).close()
    assert sorted(path.name for path in folder.rglob("*")) == before


class Stopped(BaseException):
    """Nothing may catch it and go on, as nothing can after a kill."""


@pytest.mark.parametrize("stride", [4, pytest.param(1, marks=pytest.mark.slow)])
def test_a_stop_at_any_step_of_a_save_leaves_the_old_session_or_the_new_one(controller, tmp_path, monkeypatch, stride):
    seen, step = set(), 0
    while True:
        session = Session(controller())
        session.append(TEXT[:100])
        folder, old = session.save(tmp_path / str(step)), session.length
        session.append(TEXT[:60])
        calls = iter(range(10**6))

        def count(call, stop=step, calls=calls):
            def counted(*arguments, **settings):
                if next(calls) == stop:
                    raise Stopped
                return call(*arguments, **settings)

            return counted

        with monkeypatch.context() as patch:
            for owner, name in (
                (os, "fsync"),
                (Path, "mkdir"),
                (os, "replace"),
                (Path, "write_text"),
            ):
                patch.setattr(owner, name, count(getattr(owner, name)))
            patch.setattr("shutil.rmtree", count(shutil.rmtree))
            try:
                session.save()
                stopped = False
            except Stopped:
                stopped = True
        session.close()
        resumed = Session.load(folder, controller())
        assert resumed.length in (old, session.length)
        seen.add(resumed.length == old)
        resumed.append("x")
        resumed.save()  # and it can be saved again, over what the stop has left
        assert len([path for path in folder.iterdir() if path.name.startswith("data-")]) == 1
        resumed.close()
        step += stride
        if not stopped:
            break
    assert seen == {True, False} and step > 10


def kill_writer(folder: Path, controller, wait: float) -> int:
    """A process that goes on with a session and saves it after every append, killed after ``wait`` s; -> its length."""
    child = os.fork()
    if child == 0:
        try:
            torch.set_num_threads(1)
            session = Session.load(folder, controller)
            while True:
                session.append([7, 8, 9])
                session.save()
        finally:
            os._exit(1)
    time.sleep(wait)
    os.kill(child, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL, "the writer failed by itself"
    session = Session.load(folder, controller)  # the lock went with the process
    ids = session.ids().tolist()
    assert ids[:1] == [0] and ids[1:] == [7, 8, 9] * (len(ids) // 3)
    session.close()
    return len(ids)


@pytest.mark.parametrize("kills", [2, pytest.param(40, marks=pytest.mark.slow)])
def test_a_session_that_is_killed_while_it_saves_loses_nothing_that_was_saved(controller, tmp_path, kills):
    own, rng = controller("recency"), random.Random(0)
    session = Session(own)
    folder = session.save(tmp_path / "saved")
    session.close()
    lengths = [kill_writer(folder, own, rng.uniform(0.1, 0.6)) for _ in range(kills)]
    while lengths[-1] == 1:  # a slow machine
        lengths.append(kill_writer(folder, own, 1.0))
    assert lengths == sorted(lengths)


def test_a_model_without_a_tokenizer_is_refused(models, controller):
    from megactx.lm import BaseLM

    bare = Models(BaseLM(models.base.model).freeze(), models.gistnet, models.lensnet)
    with pytest.raises(ValueError, match="no tokenizer"):
        Session(Controller(bare, Settings(budget=96, allocator={"protected": 8})))


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_session_tells_and_keeps_is_one_text_with_any_tokenizer(byte_models, kind):
    session = Session(Controller(byte_models(kind), Settings(budget=96, allocator={"protected": 8})))
    for piece in ("say", " voilà\n", "你好", "x"):
        session.append(piece)
    assert session.text() == "say voilà\n你好x"
    before = session.length
    sampling = Sampling(temperature=2.0, seed=1)
    told = "".join(piece.text for piece in session.generate(60, sampling))
    assert session.text(before) == told or "\ufffd" in told  # a run of bytes that became wrong only later
    words = session.encode(" one two")
    start = session.length
    session.append(words)
    assert session.text(start) == " one two"


def test_the_base_identity_of_a_tree_knows_adapters_on_the_embeddings(session, models):
    base = models.base.twin().freeze()
    plain = identity_of_base(base)
    adapters.adapt(base, rank=4, embeddings=True)
    assert identity_of_base(base) == plain  # they change nothing yet
    for name, parameter in adapters.adapters_of(base).items():
        if "lora_embedding_" in name:
            torch.nn.init.normal_(parameter)
    assert identity_of_base(base) != plain
    with adapters.switched_off(base):
        assert identity_of_base(base) == plain


def test_a_session_reads_again_what_it_read_with_another_adapter(make_models):
    models = make_models()
    adapters.adapt(models.base, rank=4, layers="all")
    for name, parameter in adapters.adapters_of(models.base).items():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    session = Session(Controller(models, Settings(budget=96, allocator={"protected": 8})))
    session.append(TEXT[:200])
    adapted, close = session.stream.logits(), partial(torch.allclose, atol=1e-3)
    with adapters.switched_off(models.base):
        plain = session.stream.logits()
        session.stream.prefill.forget()
        session.stream.hidden = None
        assert close(plain, session.stream.logits()) and not close(plain, adapted)
    assert close(session.stream.logits(), adapted)
