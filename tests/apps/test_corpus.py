"""Files in parts become the session that one process makes of them, bit for bit; tests/test_ray.py has Ray itself."""

import json
import os
import random
import sys
from pathlib import Path

import pytest
import torch
from small_sessions import GISTNET, LENSNET, K

from megactx.apps import corpus, ingest
from megactx.framework.workers import workers
from megactx.memory import build
from megactx.parts.write import save_gistnet, save_lensnet
from megactx.runtime import Controller, Session, Settings, load_models
from megactx.runtime.session_files import MANIFEST
from megactx.runtime.stream import Stream

WORDS = "def return path text read line for in the a of and 0 1 2".split()
COUNTS = (40, 600, 1, 150, 300)  # words of each file


@pytest.fixture(scope="module")
def left(make_models, tmp_path_factory):
    """Arguments of models whose GistNet reads tokens before a block too: what is left of a border matters."""
    models, folder = make_models(context=3 * K), tmp_path_factory.mktemp("left") / "models"
    models.base.model.save_pretrained(folder)
    models.base.tokenizer.save_pretrained(folder)
    save_gistnet(models.gistnet, GISTNET | {"context": 3 * K}, models.base, folder / "gistnet")
    save_lensnet(models.lensnet, LENSNET, models.gistnet, folder / "lensnet")
    return ["--model", str(folder), "--budget", "400"]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Files of unlike length: one is longer than a range, one is a word."""
    draw, folder = random.Random(0), tmp_path_factory.mktemp("files")
    for number, count in enumerate(COUNTS):
        words = draw.choices(WORDS, k=count)
        text = "".join(f"{word}{chr(10) if n % 9 == 0 else ' '}" for n, word in enumerate(words))
        (folder / f"{number}.txt").write_text(text)
    return folder


@pytest.fixture(scope="module")
def whole(left, files, tmp_path_factory):
    """What one process makes of the files."""
    folder = tmp_path_factory.mktemp("whole") / "session"
    assert ingest.main([str(files), str(folder), *left]) == 0
    return folder


@pytest.fixture
def shards(monkeypatch):
    """--engine=ray does its shards in this process; they are small."""
    monkeypatch.setattr(ingest, "workers", lambda engine: workers("process"))
    monkeypatch.setattr(corpus, "RANGE", 256)
    monkeypatch.setattr(corpus, "TEXT", 2_000)
    monkeypatch.setattr(ingest, "PIECE", 700)


def opened(folder: Path, own: list[str]) -> Session:
    return Session.load(folder, Controller(load_models(own[1], "cpu"), Settings(budget=400)))


def check_same(one: Path, other: Path, own: list[str]) -> None:
    """Ids, gists of all levels, what made them, what is known of the files, and what comes next."""
    with opened(one, own) as mine, opened(other, own) as theirs:
        assert {name: known["sha256"] for name, known in mine.about["ingested"].items()} == {
            name: known["sha256"] for name, known in theirs.about["ingested"].items()
        }
        assert all(known["whole"] for known in theirs.about["ingested"].values()) and "taking" not in theirs.about
        places = [
            [
                (known["spans"][0][0], known["spans"][0][2], known["spans"][-1][1])
                for known in own.about["ingested"].values()
            ]
            for own in (mine, theirs)
        ]
        assert places[0] == places[1] != []  # the same tokens of each file, whatever pieces it was read in
        assert torch.equal(mine.ids(), theirs.ids()) and mine.length > 1_500
        assert mine.tree.depth == theirs.tree.depth > 4 and mine.tree.versions == theirs.tree.versions
        for lod in range(1, mine.tree.depth + 1):
            for column in ("gist", "version", "protected"):
                assert torch.equal(*(s.tree.levels[lod].whole(column) for s in (mine, theirs))), (lod, column)
        assert torch.equal(mine.stream.logits(), theirs.stream.logits())


def test_parts_are_the_session_of_one_process_and_only_what_crosses_a_border_is_encoded_again(
    left, files, whole, shards, tmp_path, monkeypatch, capsys
):
    made, encode = {"part": 0, "whole": 0}, build.encode

    def counted(tree, lod, row, index):
        if lod <= corpus.LEVELS:
            made["part" if tree.max_level else "whole"] += len(row)
        encode(tree, lod, row, index)

    monkeypatch.setattr(build, "encode", counted)
    out = tmp_path / "out"
    assert ingest.main([str(files), str(out), "--engine", "ray", *left]) == 0
    told = capsys.readouterr().out
    assert "new tokens" in told and "gists:" in told and not out.with_name("out.parts").exists()
    check_same(whole, out, left)
    with opened(out, left) as session:
        ranges = session.length // 256
    assert ranges > 5 and made["whole"] <= 5 * ranges < 0.1 * made["part"]  # 3 of level 1, and 2 that are above those


def test_new_files_are_taken_up_behind_a_session_of_one_process(left, files, shards, tmp_path):
    for number in range(len(COUNTS)):
        engine = ["--engine", "ray"] if number % 2 else []
        assert ingest.main([str(files / f"{number}.txt"), str(tmp_path / "mixed"), *left, *engine]) == 0
        assert ingest.main([str(files / f"{number}.txt"), str(tmp_path / "one"), *left]) == 0
    check_same(tmp_path / "one", tmp_path / "mixed", left)


@pytest.mark.parametrize("call", [1, 3, 4, 9, 14])
def test_a_stop_at_any_moment_is_gone_on_from_with_the_parts_that_are_finished(
    left, files, whole, shards, tmp_path, monkeypatch, call
):
    monkeypatch.setattr(ingest, "SAVE_EVERY", 0.0)
    out, made, go_on, calls = tmp_path / "out", [], Stream.go_on, []
    make_gists = corpus.make_gists

    def noted(job):
        made.append((job.first, (job.folder / "manifest.json").exists()))
        return make_gists(job)

    def stopped(self, *place):
        calls.append(1)
        if len(calls) == call:
            raise KeyboardInterrupt
        go_on(self, *place)

    monkeypatch.setattr(corpus, "make_gists", noted)
    with monkeypatch.context() as patch:
        patch.setattr(Stream, "go_on", stopped)
        assert ingest.main([str(files), str(out), "--engine", "ray", *left]) == 130
    first, made[:] = [*made], []
    assert json.loads((out / MANIFEST).read_text())["about"].get("taking") is None
    assert ingest.main([str(files), str(out), "--engine", "ray", *left]) == 0
    check_same(whole, out, left)
    assert (first[-1][0], True) in made, "the part that was there is not made again"


@pytest.mark.parametrize(("content", "message"), [(b"ab\xff\xfe", "not UTF-8"), (b"PK\x00\x01", "binary, not text")])
def test_a_file_that_is_no_text_is_refused_by_name_before_any_gist_is_made(
    left, shards, tmp_path, content, message, capsys
):
    (tmp_path / "good.txt").write_text("def main():\n")
    (tmp_path / "bad.txt").write_bytes(content)
    given = [str(tmp_path / "good.txt"), str(tmp_path / "bad.txt"), str(tmp_path / "out"), "--engine", "ray"]
    assert ingest.main([*given, *left]) == 2
    (error,) = capsys.readouterr().err.strip().splitlines()
    assert error.startswith("megactx: ") and "bad.txt" in error and message in error
    (tmp_path / "bad.txt").write_text("mended\n")
    assert ingest.main([*given, *left]) == 0
    with opened(tmp_path / "out", left) as session:
        assert session.text() == "def main():\n\n\nmended\n\n\n"


def test_a_file_that_changes_after_it_was_listed_is_refused(left, shards, tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one")
    job = corpus.Text(left[1], ((str(path), "0" * 64, 0),), True, 100, tmp_path / "texts" / "text")
    with pytest.raises(ValueError, match="a.txt was changed while it was read"):
        corpus.tokenise(job)


def test_a_gistnet_of_hidden_states_is_refused_in_a_sentence(make_models, files, tmp_path):
    session = Session(Controller(make_models(input="hidden"), Settings(budget=400)))
    with pytest.raises(ValueError, match="--engine=ray is not allowed: this GistNet reads hidden states"):
        corpus.take(session, [*files.iterdir()], tmp_path, None, None)


def test_without_ray_and_without_a_cluster_one_message_says_so(left, files, tmp_path, monkeypatch, capsys):
    given = [str(files), str(tmp_path / "out"), "--engine", "ray", *left]
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "ray", None)
        assert ingest.main(given) == 2
    assert "--engine=ray: pip install 'megactx[ray]' first" in capsys.readouterr().err
    pytest.importorskip("ray", reason="ray is not installed (the extra ray)")
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:1")
    assert ingest.main(given) == 2
    (error,) = capsys.readouterr().err.strip().splitlines()
    assert "RAY_ADDRESS=127.0.0.1:1: no cluster of Ray can be used there" in error and os.environ["RAY_ADDRESS"]
