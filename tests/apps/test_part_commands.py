"""Parts as a person uses them: on the command line, in a chat, and what each opened block is from."""

import io
import json
import sys
import time

import pytest
import torch
from range_server import serving

from megactx.apps import chat, curation, generate, ingest, publish
from megactx.apps.follow.follower import Follower
from megactx.apps.follow.sources import Folder
from megactx.apps.view.frames import standing
from megactx.focus.replay import View
from megactx.memory import archive
from megactx.memory.curation import Curated
from megactx.memory.invariants import violations
from megactx.runtime import Controller, Session, Settings, Wanted, load_models
from megactx.runtime.part_files import conflicts
from megactx.runtime.sources import opened, origin

K = 4


@pytest.fixture
def own(exported):
    """Arguments that every command takes."""
    return ["--model", str(exported), "--budget", "400"]


@pytest.fixture
def typed(monkeypatch):
    """What is piped into a command."""

    def make(content: str):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content.encode())))

    return make


def lines(name, count):
    return "".join(f"{name} {number} says {number * number}\n" for number in range(1, count + 1))


def follow(own, tmp_path):
    models = load_models(own[1], "cpu")
    follower = Follower(tmp_path / "memory", models, {"person": Folder(tmp_path / "person_texts")})
    follower.look("person")
    follower.close()


@pytest.fixture
def three(own, tmp_path):
    """Folders of an ingested session, of a followed folder and of another session, each of two files."""
    for part, names in (("project", ("main", "util")), ("person", ("mail", "diary")), ("library", ("guide", "faq"))):
        (tmp_path / f"{part}_texts").mkdir()
        for name in names:
            (tmp_path / f"{part}_texts" / f"{name}.txt").write_text(lines(name, 12))
    for part in ("project", "library"):
        assert ingest.main([str(tmp_path / f"{part}_texts"), str(tmp_path / part), *own]) == 0
    follow(own, tmp_path)
    return {"project": tmp_path / "project", "person": tmp_path / "memory" / "person", "library": tmp_path / "library"}


@pytest.fixture
def session(own, three):
    """A session over the three, with some text of its own, of another path each."""
    controller = Controller(load_models(own[1], "cpu"), Settings(budget=500, allocator={"protected": 8}))
    parts = [Wanted(name, path, share) for (name, path), share in zip(three.items(), (0.15, 0.25, 0.1), strict=True)]
    made = Session(controller, parts=parts)
    made.append("What does line 7 of the guide say? " * 3)
    yield made
    made.close()


def test_a_session_over_three_parts_shows_for_each_opened_block_the_part_and_the_file(session, tmp_path):
    session.stream.logits()
    runs = opened(session)
    assert [run.part for run in runs if run.part is not None] and not violations(session.stream.context)
    # Every block of the window that is raw is in one of the runs, and no other.
    seen, context = session.stream.seen, session.stream.context
    for number, (lod, index) in enumerate(seen.segments(context)):
        raw = {*index[lod == 0].tolist()}
        blocks = {n for n in raw if n % K == 0 and {n, n + 1, n + 2, n + 3} <= raw}
        told = [run for run in runs if run.part == seen.name_of(number)]
        assert {n for run in told for n in range(run.start, run.stop, K)} == blocks and (blocks or number < 3)
    names = {"project": ("main", "util"), "person": ("mail", "diary"), "library": ("guide", "faq")}
    for run in runs:
        if run.part is None:
            assert run.origin is None
            continue
        assert run.origin.file.endswith(tuple(f"{name}.txt" for name in names[run.part])) and run.origin.time > 1e9
        part = next(part for part in session.parts if part.name == run.part)
        file = (tmp_path / f"{run.part}_texts" / run.origin.file.split("/")[-1]).read_text().split("\n")
        begun = part.text(run.start, run.stop).split("\n")[0].strip()
        assert begun in file[run.origin.line - 1] or begun == ""
    assert {run.part for run in runs} >= {"project", "person", "library"}


def test_every_block_of_an_ingested_file_is_known_by_file_and_line(session, tmp_path):
    for name in ("project", "person", "library"):
        part, found = next(part for part in session.parts if part.name == name), set()
        for token in range(0, int(part.tree.lengths[0]), K):
            if (own := part.origin(token)) is None:
                continue  # between two files
            text = part.text(0, token)
            file = own.file.split("/")[-1]
            before = text.rpartition(f"{file[:-4]} 1 says 1\n")
            line = 2 + before[2].count("\n") if before[1] else 1
            assert own.line == min(line, 12) or (own.line == line == 13), (name, token, own)
            found.add(own.file)
        assert len(found) == 2 and origin(session, name, 10) == part.origin(10)


def test_a_part_swapped_under_a_running_session_is_seen_by_file_at_the_next_refocus(session, own, tmp_path):
    session.stream.logits()
    (tmp_path / "person_texts" / "diary.txt").unlink()
    (tmp_path / "person_texts" / "letter.txt").write_text(lines("letter", 12))
    follow(own, tmp_path)
    before = [run.origin.file.split("/")[-1] for run in opened(session) if run.part == "person"]
    assert before and "letter.txt" not in before
    session.append(torch.full((K,), 5))  # one block: one refocus
    after = [run.origin.file.split("/")[-1] for run in opened(session) if run.part == "person"]
    assert "letter.txt" in after and "diary.txt" not in after and not violations(session.context)


def test_a_talk_shows_takes_and_drops_parts(own, three, typed, tmp_path, capsys):
    asked = (
        f"hello\n/parts\n/use library={three['library']}:0.28\n/parts\n/sources\n/tree\n/focus\n/pin library\n/parts\n"
    )
    typed(f"{asked}/drop project\n/drop project\n/use nothing\n/parts\n/quit\n")
    given = ["--part", f"project={three['project']}:0.1", "--session", str(tmp_path / "talk"), "--tokens", "6"]
    assert chat.main([*given, *own]) == 0
    told = capsys.readouterr().out
    for said in ("project", "library: ", "guide.txt:", "(history)", "pinned", "project is no part any more"):
        assert said in told, said
    assert "part project: there is no part of this name, there is library" in told
    assert "part='nothing' is not allowed: NAME=PATH or NAME=PATH:SHARE" in told
    saved = json.loads((tmp_path / "talk" / "session.json").read_text())
    assert [part["name"] for part in saved["parts"]] == ["library"] and saved["parts"][0]["pinned"]
    typed("/parts\n/quit\n")
    assert chat.main(["--session", str(tmp_path / "talk"), "--drop", "library", *own]) == 0
    assert "no parts: /use NAME=PATH[:SHARE] shows one" in capsys.readouterr().out


def test_a_prompt_is_continued_beside_parts_and_a_part_changes_what_is_written(own, three, capsys):
    told = []
    for part in ([], ["--part", f"library={three['library']}"], ["--part", f"person={three['person']}"]):
        assert generate.main(["guide 7 says", "--tokens", "20", *part, *own]) == 0
        told.append(capsys.readouterr().out)
    assert len({*told}) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["x", "--part", "a"], "part='a' is not allowed: NAME=PATH or NAME=PATH:SHARE"),
        (["x", "--part", "a=/nowhere"], "part a: "),
        (["x", "--part", "a=/nowhere:0.7"], "part a: share=0.7 is not allowed: above 0, at most 0.5"),
        (["x", "y", "--part", "a=/nowhere"], "give one prompt with --part or --preset"),
        (["x", "--drop", "a"], "--drop=a: a new session has no parts"),
        (["x", "--pin", "a"], "part a: there is no part of this name, there is none"),
        (["x", "--part", "a=/nowhere", "--megacontext", "none"], "no working context that could show parts"),
    ],
)
def test_a_mistake_about_parts_is_one_message(own, arguments, message, capsys):
    assert generate.main([*arguments, *own]) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("megactx: ") and error.count("\n") == 1


def test_a_library_of_earlier_days_which_notes_no_files_is_a_part_all_the_same(own, three, session):
    path = three["library"] / "session.json"
    saved = json.loads(path.read_text())
    for known in saved["about"]["ingested"].values():
        known.pop("spans"), known.pop("older")
    path.write_text(json.dumps(saved))
    session.drop("person")
    session.use(Wanted("old", three["library"]))
    session.stream.logits()
    assert all(run.origin is None for run in opened(session) if run.part == "old")
    # And it can be gone on with.
    more = path.parent.parent / "more.txt"
    more.write_text(lines("more", 5))
    assert ingest.main([str(more), str(three["library"]), *own]) == 0
    assert json.loads(path.read_text())["about"]["ingested"][str(more)]["spans"]


def test_a_file_that_has_changed_is_told_apart_from_what_it_was(own, three, tmp_path):
    (tmp_path / "project_texts" / "main.txt").write_text(lines("other", 6))
    assert ingest.main([str(tmp_path / "project_texts"), str(three["project"]), *own]) == 0
    made = Controller(load_models(own[1], "cpu"), Settings(budget=500))
    session = Session(made, parts=[Wanted("project", three["project"])])
    session.append("Some text, so that there is a window. " * 3)
    part = session.parts[0]
    found = [part.origin(token) for token in range(0, int(part.tree.lengths[0]), K)]
    names = [(own.file.split("/")[-1], own.state) for own in found if own is not None]
    assert {*names} == {("main.txt", "as it was before"), ("util.txt", ""), ("main.txt", "")} and names[0][1]
    assert str(part.origin(1)).endswith("main.txt:1 (as it was before)")
    # What it was stays closed beside what it is; of a file that is gone all does.
    assert closed(session, "project") == {("main.txt", "as it was before")}
    (tmp_path / "project_texts" / "util.txt").unlink()
    assert ingest.main([str(tmp_path / "project_texts"), str(three["project"]), *own]) == 0
    session.append("More text, so that there is a refocus. " * 3)
    assert closed(session, "project") == {("main.txt", "as it was before"), ("util.txt", "deleted")}
    (tmp_path / "project_texts" / "util.txt").write_text(lines("util", 12))  # it is back
    assert ingest.main([str(tmp_path / "project_texts"), str(three["project"]), *own]) == 0
    session.append("And more. " * 6)
    assert closed(session, "project") == {("main.txt", "as it was before")}


def closed(session, name):
    """Files of whole blocks of a part that may not be opened."""
    number = [part.name for part in session.stream.seen.parts].index(name)
    tree, part = session.stream.seen, session.parts[number]
    index = torch.arange(int(part.tree.counts(1)[0]))
    nothing = torch.zeros_like(index)
    openable = tree.openable(nothing, nothing + 1, index + tree.bases[number] // K)
    found = [part.origin(int(block) * K) for block in index[~openable]]
    return {(own.file.split("/")[-1], own.state) for own in found}


def test_of_a_file_in_two_parts_the_newest_counts_and_a_pinned_one_before_it_and_both_are_told(
    own, tmp_path, typed, capsys
):
    source, control = tmp_path / "source", Controller(load_models(own[1], "cpu"), Settings(budget=500))
    source.mkdir()
    for name in ("a", "b"):
        (source / f"{name}.txt").write_text(lines(name, 12))
    assert ingest.main([str(source), str(tmp_path / "early"), *own]) == 0
    time.sleep(0.01)  # times are in milliseconds
    assert ingest.main([str(source / "a.txt"), str(tmp_path / "late"), *own]) == 0
    parts = [Wanted(name, tmp_path / name, 0.2) for name in ("early", "late")]
    session = Session(control, parts=parts)
    session.append("Which line? " * 8)
    assert conflicts(session.parts) == [(str(source / "a.txt"), "late", ("early",))]
    assert closed(session, "early") == {("a.txt", "")} and closed(session, "late") == set()
    session.pin("early")
    assert conflicts(session.parts)[0].winner == "early" and not violations(session.context)
    assert closed(session, "early") == set() and closed(session, "late") == {("a.txt", "")}
    shown = {run.part for run in opened(session)}
    assert "early" in shown
    typed("/parts\n/quit\n")
    given = [word for part in parts for word in ("--part", f"{part.name}={part.path}:0.15")]
    assert chat.main([*given, *own]) == 0
    assert "a.txt is in late and in early: that of late counts, the others stay closed" in capsys.readouterr().out


def test_each_source_tree_becomes_a_part_where_a_change_replaces_its_own_blocks(own, tmp_path, capsys):
    for name in ("src", "docs"):
        (tmp_path / name).mkdir()
        for file in ("a", "b"):
            (tmp_path / name / f"{file}.txt").write_text(lines(f"{name} {file}", 8))
    asked = ["--parts", str(tmp_path / "src"), str(tmp_path / "docs"), str(tmp_path / "memory"), *own]
    assert ingest.main(asked) == 0
    assert "src: 2 documents" in (told := capsys.readouterr().out) and "docs: 2 documents" in told
    session = Session(
        Controller(load_models(own[1], "cpu"), Settings(budget=500)),
        parts=[Wanted(name, tmp_path / "memory" / name) for name in ("src", "docs")],
    )
    session.append("What is there? " * 8)
    tokens = int(session.parts[0].tree.lengths[0])
    (tmp_path / "src" / "a.txt").write_text(lines("changed", 8))
    (tmp_path / "docs" / "b.txt").unlink()
    assert ingest.main(asked) == 0
    assert "(1 replaced)" in (told := capsys.readouterr().out) and "(1 removed)" in told
    session.append("And now? " * 8)
    files = {origin.file for part in session.parts for token in range(0, int(part.tree.lengths[0]), K)
             if (origin := part.origin(token))}  # fmt: skip
    assert files == {str(tmp_path / name) for name in ("src/a.txt", "src/b.txt", "docs/a.txt")}
    assert "changed 1 says 1" in session.parts[0].text(0, 40) and tokens
    assert ingest.main(["--parts", str(tmp_path / "src"), str(tmp_path / "src"), str(tmp_path / "memory"), *own]) == 2
    assert "a part src is there already" in capsys.readouterr().err


def test_a_published_part_shows_in_a_talk_with_its_files(own, three, typed, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("MEGACTX_CACHE", str(tmp_path / "cache"))
    for name in ("project", "person"):
        assert publish.main([str(three[name]), str(tmp_path / "www" / name)]) == 0
    assert publish.main([str(three["library"]), str(tmp_path / "www" / "library"), "--bare"]) == 0
    assert "MB of pages lie in" in capsys.readouterr().out
    with serving(tmp_path / "www") as server:
        given = [word for name in three for word in ("--part", f"{name}={server.url}/{name}:0.12")]
        typed("hello\n/parts\n/sources\n/quit\n")
        assert chat.main([*given, "--session", str(tmp_path / "talk"), "--tokens", "6", *own]) == 0
        told = capsys.readouterr().out
        assert f"{server.url}/project" in told and "util.txt:" in told and "mail.txt:" in told
        assert "guide.txt" not in told
        typed("/parts\n/quit\n")
        assert chat.main(["--session", str(tmp_path / "talk"), *own]) == 0
        assert f"{server.url}/library" in capsys.readouterr().out
        assert generate.main(["x", "--part", f"a={server.url}/none", *own]) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and "part a: " in said and "there is no published tree" in said
    assert publish.main([str(tmp_path), str(tmp_path / "www" / "project")]) == 2
    assert "there is no saved tree" in capsys.readouterr().err


def test_a_licence_is_told_with_the_part_its_blocks_and_the_page(own, tmp_path, typed, capsys):
    (tmp_path / "a.txt").write_text(lines("a", 30))
    library = tmp_path / "library"
    assert ingest.main([str(tmp_path / "a.txt"), str(library), "--licence", "CC-BY-4.0", *own]) == 0
    (tmp_path / "b.txt").write_text(lines("b", 30))
    assert ingest.main([str(tmp_path / "b.txt"), str(tmp_path / "bare"), *own]) == 0
    made = Controller(load_models(own[1], "cpu"), Settings(budget=500))
    session = Session(made, parts=[Wanted("library", library, 0.25), Wanted("bare", tmp_path / "bare", 0.2)])
    session.append("Which line? " * 8)
    told = {run.part: run.licence for run in opened(session)}
    assert told["library"] == "CC-BY-4.0" and told[None] == "" and told.get("bare", "") == ""
    lanes = standing(0, session.length, View.of(session.context, 0), 500)["lanes"]
    assert [(lane[0], lane[3]) for lane in lanes] == [("library", "CC-BY-4.0"), ("bare", ""), ("", "")]
    typed("hello\n/parts\n/sources\n/quit\n")
    shown = ["--part", f"library={library}:0.25", "--part", f"bare={tmp_path / 'bare'}:0.2"]
    assert chat.main([*own[:2], "--budget", "500", "--tokens", "4", *shown]) == 0
    said = capsys.readouterr().out
    assert "licence CC-BY-4.0" in said and "no licence is noted" in said and "  CC-BY-4.0\n" in said


def test_each_part_of_a_folder_of_parts_notes_the_licence_and_keeps_it(own, tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "text.txt").write_text(lines(name, 30))
    (tmp_path / "empty").mkdir()
    asked = ["--parts", *(str(tmp_path / name) for name in ("a", "b", "empty")), str(tmp_path / "m"), *own]
    assert ingest.main(asked) == 0

    def licences():
        parts = [Wanted(name, tmp_path / "m" / name) for name in ("a", "b")]
        session = Session(Controller(load_models(own[1], "cpu"), Settings(budget=500)), parts=parts)
        return [part.licence for part in session.parts]

    assert licences() == ["", ""]
    assert ingest.main([*asked, "--licence", "MIT"]) == 0 and licences() == ["MIT", "MIT"]  # nothing else has changed
    (tmp_path / "a" / "text.txt").unlink()
    (tmp_path / "a" / "more.txt").write_text(lines("c", 30))
    (tmp_path / "empty" / "text.txt").write_text(lines("d", 30))
    assert ingest.main(asked) == 0 and licences() == ["MIT", "MIT"]
    assert "licence" not in json.loads((tmp_path / "m" / "empty.json").read_text())
    assert ingest.main([*asked[:2], str(tmp_path / "m"), *own, "--licence", ""]) == 0 and licences() == ["", "MIT"]


def test_what_is_deleted_leaves_a_part_at_once_and_is_in_no_archive(own, tmp_path):
    (tmp_path / "a").mkdir()
    for name in ("one", "two"):
        (tmp_path / "a" / f"{name}.txt").write_text(lines(name, 30))
    asked = ["--parts", str(tmp_path / "a"), str(tmp_path / "m"), *own]
    assert ingest.main(asked) == 0
    before = Curated(tmp_path / "m" / "a").tokens
    (tmp_path / "a" / "one.txt").unlink()
    assert ingest.main(asked) == 0
    tree = Curated(tmp_path / "m" / "a")
    assert tree.tokens < before and tree.log() == [] and not tree.floor.any()
    assert [*json.loads((tmp_path / "m" / "a.json").read_text())["gone"]] == ["one.txt"]


def test_a_deleted_file_is_archived_and_one_that_is_back_is_restored(own, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(archive, "RECENT", 0)
    texts, out = tmp_path / "texts", tmp_path / "out"
    texts.mkdir()
    for name in ("a", "b", "c"):
        (texts / f"{name}.txt").write_text(lines(name, 30))
    assert ingest.main([str(texts), str(out), *own]) == 0
    before = Curated(out / "tree").levels[0].whole("token")
    kept = (texts / "b.txt").read_text()
    (texts / "b.txt").unlink()
    assert ingest.main([str(texts), str(out), *own]) == 0
    assert "tokens of deleted files went into the archive" in capsys.readouterr().out
    tree = Curated(out / "tree")
    noted = json.loads((out / "session.json").read_text())["about"]["ingested"]
    ((first, stop, *_),) = noted[str(texts / "b.txt")]["spans"]
    assert tree.floor.nonzero()[:, 0].tolist() == [*range(-(-first // K), stop // K)]
    assert all(action == "compact" and "b.txt" in reason for _, action, _, _, reason in tree.log())
    assert curation.main(["restore", str(out)]) == 0
    assert torch.equal(Curated(out / "tree").levels[0].whole("token"), before)
    assert ingest.main([str(texts), str(out), *own]) == 0  # it is deleted still
    assert (Curated(out / "tree").floor > 0).any()
    (texts / "b.txt").write_text(kept)
    assert ingest.main([str(texts), str(out), *own]) == 0
    assert torch.equal(Curated(out / "tree").levels[0].whole("token"), before)
    assert curation.main(["purge", str(out), "--days", "0"]) == 0 and not (Curated(out / "tree").floor > 0).any()
