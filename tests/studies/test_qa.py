"""Questions about a context: what stands in each window, what a normalised score is, and what others answered."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

from megactx.data.knowledge import value_ids
from megactx.data.questions import asked
from megactx.evaluation.knowledge import value_nll
from megactx.evaluation.rivals.newest import Newest
from megactx.evaluation.table import Table
from megactx.lm.masks import CAUSAL
from megactx.studies import qa
from megactx.studies.qa import FULL, GISTS, LAST_TOKEN, NOTHING, OTHER, RANDOM, Reader, main, summarise

K = 4
PROSE = [f"The river ran past mill {n} and on to the sea." for n in range(200)]


@pytest.fixture(scope="module")
def reader(models):
    return Reader(models, {"newest": Newest()}, [8, 40], plain=True)


@pytest.fixture(scope="module")
def cases(models):
    return [asked("fact", number, 160, models.base.tokenizer, PROSE) for number in range(2)]


def test_full_nothing_and_newest_are_what_the_base_says_behind_these_tokens(reader, cases, models):
    case, base = cases[0], models.base
    text = f"\n{case.text}{case.prefix}"
    end = base.tokenizer(f"\n{case.text}", add_special_tokens=False)["input_ids"]
    end = [*end, *base.tokenizer(case.prefix, add_special_tokens=False)["input_ids"]]
    assert base.tokenizer.decode(end) == text
    values, right = value_ids(base.tokenizer, case.values), case.values.index(case.answer)
    kept = {FULL: case.ids, NOTHING: [], "newest 8": [*case.ids[:4], *case.ids[-4:]]}
    for reading, ids in kept.items():
        found, plain = reader.answer(case, cases[1], reading), value_nll(base, [0, *ids, *end], values)
        assert found["entries"] == len(ids) and found["right"] == (int(plain.argmin()) == right)
        assert found["nll"] == pytest.approx(float(plain[right]), rel=1e-4)


def test_carriers_stand_at_the_positions_of_their_blocks_and_the_question_behind_the_whole_context(
    reader, cases, models
):
    case, base = cases[0], models.base
    last = [case.ids[n] for n in range(K - 1, 160, K)]
    (value,) = value_ids(base.tokenizer, [case.answer])
    end = reader.core.window([], case)[1:]
    ids = torch.tensor([[0, *last, *end, *value]])
    behind = torch.arange(161, 161 + len(end) + len(value))
    positions = torch.cat([torch.tensor([0]), 1 + torch.arange(K - 1, 160, K), behind])[None]
    with torch.no_grad():
        logits = base.logits(base(base.embed(ids), positions, CAUSAL))[0]
    at = torch.arange(len(value)) + ids.shape[1] - len(value)
    plain = -logits.log_softmax(-1)[at - 1, ids[0, at]].sum()
    found = reader.answer(case, cases[1], LAST_TOKEN)
    assert found["entries"] == 40 and found["nll"] == pytest.approx(float(plain), rel=1e-4)


def test_gists_are_those_of_the_context_and_another_ones_are_of_the_other(reader, cases):
    own, swapped = (reader.answer(cases[0], other, name) for other, name in ((cases[1], GISTS), (cases[0], OTHER)))
    assert own == swapped and own["entries"] == 40
    different = {name: reader.answer(cases[0], cases[1], name)["nll"] for name in reader.readings}
    assert len({*different.values()}) == len(different) and RANDOM in different and "newest 40" in different


def test_a_normalised_score_is_that_of_the_literature_and_lines_of_others_stand_beside_ours():
    def row(full, gists, nothing, theirs=None):
        names = {FULL: full, GISTS: gists, NOTHING: nothing} | ({"theirs 4": theirs} if theirs else {})
        return {name: {"right": right, "nll": nll, "entries": 4} for name, (right, nll) in names.items()}

    rows = {
        ("fact", 0): row((True, 1.0), (True, 2.0), (False, 5.0), (False, 4.0)),
        ("fact", 1): row((True, 1.0), (False, 4.0), (False, 5.0), (True, 2.0)),
        ("fact", 2): row((True, 2.0), (False, 4.0), (True, 3.0)),
        ("niah_single_2", 0): row((True, 1.0), (False, 9.0), (False, 9.0)),
    }
    table = summarise(rows)
    fact = table.pick(domain="fact")
    assert fact.point(carrier=GISTS, metric="normalised right") == pytest.approx((1 / 3 - 1 / 3) / (1 - 1 / 3))
    assert fact.point(carrier=GISTS, metric="normalised nll") == pytest.approx((13 - 10) / (13 - 4))
    assert fact.point(carrier="theirs 4", metric="normalised right") == pytest.approx(1 / 2)
    theirs = fact.one(carrier="theirs 4", metric="behind")
    assert theirs["point"] == pytest.approx(0.0) and theirs["n"] == 2
    assert table.one(domain="overall", carrier=GISTS, metric="right")["n"] == 4


@pytest.fixture
def command(exported, tmp_path):
    (tmp_path / "prose.md").write_text(" ".join(PROSE))
    sizes = ["--questions", "2", "--tokens", "160", "--tasks", "fact", "--policies", "newest"]
    return [str(exported), "--path", str(tmp_path / "prose.md"), *sizes, "--out", str(tmp_path / "out")]


@pytest.mark.slow
def test_the_command_goes_on_where_it_stopped_and_takes_more_budgets_and_the_answers_of_others(
    command, tmp_path, monkeypatch, capsys
):
    assert main(command) == 0
    path = tmp_path / "out" / "answers.jsonl"
    before = path.read_text().splitlines()
    path.write_text("\n".join([*before[:-1], before[-1][:40]]))  # a stop in the middle of a line
    asked_again, answer = [], Reader.answer

    def counted(self, case, other, reading):
        asked_again.append((case.number, reading))
        return answer(self, case, other, reading)

    monkeypatch.setattr(Reader, "answer", counted)
    assert main([*command, "--budgets", "40", "64"]) == 0
    assert sorted(asked_again) == [(0, "newest 64"), (1, "newest 40"), (1, "newest 64")]
    assert {*before} <= {*path.read_text().splitlines()}
    theirs = {"task": "fact", "number": 1, "carrier": "theirs 40", "right": True, "nll": 0.5, "entries": 40}
    (tmp_path / "theirs.jsonl").write_text(json.dumps(theirs) + "\n")
    assert main([*command, "--scores", str(tmp_path / "theirs.jsonl")]) == 0
    table = Table(json.loads((tmp_path / "out" / "qa.json").read_text())["table"])
    assert table.one(carrier="theirs 40", metric="nll")["n"] == 1 and table.one(carrier=GISTS, metric="nll")["n"] == 2
    assert table.point(carrier="newest 64", metric="entries") == 64
    capsys.readouterr()
    assert main([*command, "--seed", "1"]) == 2
    assert "holds answers of other settings: seed" in capsys.readouterr().err
    (tmp_path / "theirs.jsonl").write_text('{"task": "fact"}\n')
    assert main([*command, "--scores", str(tmp_path / "theirs.jsonl")]) == 2
    assert "it cannot be read as lines of answers (KeyError('right'))" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--tasks", "x"], "--tasks=x is not known"),
        (["--policies", "x"], "--policies=x is not known"),
        (["--budgets", "0"], "--budgets=0 is not allowed: 1 to --tokens=160"),
        (["--tokens", "161"], "--tokens=161 is not allowed: a multiple of block_size=4"),
        (["--questions", "1"], "--questions=1 is not allowed: at least 2"),
    ],
)
def test_what_cannot_be_asked_is_told_with_its_option(command, options, said, capsys):
    assert main([*command, *options]) == 2
    assert said in capsys.readouterr().err


@pytest.fixture(scope="module")
def outside():
    """``benchmarks/rivals.py``, which runs in another environment and knows nothing of megactx."""
    place = Path(__file__).parents[2] / "benchmarks" / "rivals.py"
    spec = importlib.util.spec_from_file_location("rivals_outside", place)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_program_of_the_other_environment_reads_the_full_context_as_we_do(
    outside, reader, cases, base_folder, tmp_path
):
    needles = [asked("niah_single_2", 0, 160, reader.base.tokenizer, PROSE)]
    qa.for_others(tmp_path / "cases.jsonl", [*cases, *needles], reader.core)
    given = [str(base_folder), str(tmp_path / "cases.jsonl"), "--budgets", "40", "--rivals", "full"]
    for _ in range(2):  # the second time nothing is missing
        assert outside.main([*given, "--out", str(tmp_path / "scores.jsonl")]) == 0
    lines = (tmp_path / "scores.jsonl").read_text().splitlines()
    found = qa.read_lines(lines)
    assert len(lines) == len(found) == 3
    for case in [*cases, *needles]:
        ours, theirs = reader.answer(case, case, FULL), found[case.task, case.number]["full"]
        assert theirs == ours | {"nll": pytest.approx(ours["nll"], rel=1e-4)}


@pytest.mark.parametrize("name", ["snapkv", "expected_attention", "knorm", "streaming_llm"])
def test_a_press_keeps_exactly_the_budget(outside, reader, cases, name, tmp_path):
    pytest.importorskip("kvpress")
    qa.for_others(tmp_path / "cases.jsonl", cases, reader.core)
    row = json.loads((tmp_path / "cases.jsonl").read_text().splitlines()[0])
    found = outside.measured(reader.base.model, row, [(name, 40), (name, 159), ("full", 40)])
    assert [answer["entries"] for answer in found] == [40, 159, 160]
    assert found[1]["nll"] != found[2]["nll"] == pytest.approx(reader.answer(cases[0], cases[1], FULL)["nll"], rel=1e-4)
