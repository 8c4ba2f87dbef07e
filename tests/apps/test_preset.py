"""A prompt becomes a few gists that any session shows and none opens."""

import io
import json
import sys

import pytest
import torch

from megactx.apps import chat, generate, preset
from megactx.memory import MegaContextTree
from megactx.memory.invariants import violations
from megactx.runtime import Controller, Session, Settings, load_models

K = 4
PROMPT = "You answer in one sentence. You name the line. You never guess, and you say so when you do not know it."


@pytest.fixture
def own(exported):
    """Arguments that every command takes."""
    return ["--model", str(exported), "--budget", "400"]


@pytest.fixture
def made(exported, tmp_path, monkeypatch, capsys):
    """A preset ``support``, and its folder."""
    monkeypatch.setenv("MEGACTX_PRESETS", str(tmp_path / "presets"))
    (tmp_path / "prompt.txt").write_text(PROMPT)
    assert preset.main(["make", "support", str(tmp_path / "prompt.txt"), "--model", str(exported)]) == 0
    capsys.readouterr()
    return tmp_path / "presets" / "support"


def test_a_preset_keeps_the_tokens_of_its_prompt_in_whole_blocks_and_is_listed(made, models, capsys):
    tree = MegaContextTree.load(made / "tree", models.gistnet, models.base, refresh=True)
    tokens = tree.tokens[0].tolist()
    assert len(tokens) % K == 0 and tree.depth == 1 and tree.max_level == 1
    assert models.base.tokenizer.decode(tokens).rstrip("\n") == PROMPT
    assert preset.main(["list"]) == 0
    assert f"support: {len(tokens)} tokens of" in capsys.readouterr().out


def test_its_gists_stand_before_the_history_and_stay_closed(made, exported):
    control = Controller(load_models(str(exported), "cpu"), Settings(budget=240, allocator={"protected": 8}))
    session = Session(control, parts=[preset.wanted("support")])
    session.append(torch.randint(2, 512, (500,), generator=torch.Generator().manual_seed(0)))
    tokens = int(session.parts[0].tree.lengths[0])
    for token in torch.randint(2, 512, (80,), generator=torch.Generator().manual_seed(1)):
        session.stream.push(token[None])
    lod, index = session.stream.seen.segments(session.context)[0]
    assert (lod == 1).all() and index.tolist() == [*range(tokens // K)] and not violations(session.context)
    assert session.parts[0].closed and session.parts[0].origin(0).file.endswith("prompt.txt")


def test_with_earn_its_gists_are_read_beside_the_newest_tokens(made, exported):
    control = Controller(load_models(str(exported), "cpu"), Settings(budget=240, allocator={"protected": 8}, earn=True))
    session = Session(control, parts=[preset.wanted("support")])
    session.append(torch.randint(2, 512, (500,), generator=torch.Generator().manual_seed(0)))
    session.stream.logits()
    shown = session.stream.shown
    count = int(session.parts[0].tree.lengths[0]) // K
    assert (shown.lod[0, :count] == 1).all() and shown.index[0, :count].tolist() == [*range(count)]
    assert int(shown.counts[0]) <= 240


def test_commands_read_it_by_name_or_by_folder_and_it_changes_what_is_written(made, own, capsys, monkeypatch):
    told = []
    for given in ([], ["--preset", "support"], ["--preset", str(made)]):
        assert generate.main(["What is in line 7?", "--tokens", "16", *given, *own]) == 0
        told.append(capsys.readouterr().out)
    assert told[0] != told[1] == told[2]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"hello\n/parts\n/sources\n/quit\n")))
    assert chat.main(["--preset", "support", "--tokens", "4", *own]) == 0
    assert "closed" in capsys.readouterr().out


def test_a_preset_is_replaced_as_a_whole(made, exported, tmp_path, capsys):
    (tmp_path / "prompt.txt").write_text("Be brief.")
    assert preset.main(["make", "support", str(tmp_path / "prompt.txt"), "--model", str(exported)]) == 0
    about = json.loads((made / "preset.json").read_text())
    assert about["tokens"] < 20 and preset.known() == ["support"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["make"], "NAME and FILE are needed"),
        (["make", "a b", "FILE"], "NAME='a b' is not allowed"),
        (["make", "x", "/nowhere"], "FILE=/nowhere: there is no such file"),
        (["make", "x", "FILE", "--level", "0"], "--level=0 is not allowed: at least 1"),
        (["make", "x", "EMPTY"], "it is empty"),
    ],
)
def test_a_mistake_is_one_message(arguments, message, made, exported, tmp_path, capsys):
    (tmp_path / "empty.txt").write_text(" \n")
    given = {"FILE": str(tmp_path / "prompt.txt"), "EMPTY": str(tmp_path / "empty.txt")}
    assert preset.main([*(given.get(word, word) for word in arguments), "--model", str(exported)]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_an_unknown_preset_and_one_of_other_models_are_refused_by_name(made, own, make_models, capsys):
    assert generate.main(["x", "--preset", "nobody", *own]) == 2
    assert "--preset=nobody: there is no such preset, there is support" in capsys.readouterr().err
    other = make_models(seed=1)
    with pytest.raises(ValueError, match="part support: .*another GistNet made it"):
        Session(Controller(other, Settings(budget=240, allocator={"protected": 8})), parts=[preset.wanted("support")])
