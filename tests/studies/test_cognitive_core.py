"""A core that reads a knowledge tree: what stands where in the tree, who reads it, and the whole study in miniature."""

import json
import random
from pathlib import Path

import pytest
import torch

from megactx.data.knowledge import Knowledge, encoded, tell
from megactx.evaluation.rivals.needed import Needed
from megactx.evaluation.table import Table
from megactx.lm import BaseLM
from megactx.parts.models import Models
from megactx.studies.cognitive_core import Answers, Core, Store, main, measured, tabled, windows

PROSE = ["Nothing is told of anybody here.", "It goes on like that for a while.", "Some readers skip such lines."]


@pytest.fixture(scope="module")
def core_models(base_folder):
    return Models(BaseLM.from_pretrained(str(base_folder), "float32").freeze(), name="small")


@pytest.fixture(scope="module")
def knowledge():
    return Knowledge(4, random.Random(0), changed=0.5)


@pytest.fixture
def store(core_models, knowledge, tmp_path):
    made = Store(tmp_path / "tree", core_models)
    made.write(*tell(knowledge.facts, PROSE, 1, random.Random(0)))
    return made


class Reader(Core):
    """A core that says the value that stands in its window, whichever came last."""

    name = "reader"

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def nll(self, kept, question, values=None):
        text = self.tokenizer.decode(kept)
        told = question.needed[-1]
        known = [text.rfind(told.form.format(what=told.what, name=told.name, value=v)) for v in question.values]
        values = values or question.values
        return torch.tensor([9.0 - 8 * (known[question.values.index(v)] == max(known) >= 0) for v in values])


def test_facts_stand_in_the_opened_tree_where_the_store_says_before_and_after_an_update(store, knowledge, core_models):
    tokenizer = core_models.base.tokenizer
    update = knowledge.newest(knowledge.names[0], "metal").update(random.Random(0))
    text, facts = tell([update], PROSE, 1, random.Random(1))
    before = store.open().tokens[0]
    store.append(text, facts)
    tree = store.open()
    assert torch.equal(tree.tokens[0, : len(before)], before) and tree.depth >= 1
    for fact in [*knowledge.facts, update]:
        span = store.spans[fact.key]
        assert tokenizer.decode(tree.tokens[0, span.start : span.stop]).strip() == fact.sentence
    assert store.spans[update.key].start >= len(before)


def test_a_reader_of_its_window_is_right_and_its_answers_rest_on_the_block_that_tells_the_fact(
    store, knowledge, core_models
):
    asked = knowledge.questions(12, random.Random(0))
    found = windows(store, asked, Needed().keep, 256)
    assert all(window.held and {*window.telling} <= {*window.needed} <= {*window.blocks} for window in found)
    assert all(len(window.ids()) == 256 for window in found)
    rows, table = measured(Reader(core_models.base.tokenizer), found), Table()
    tabled(table, rows, domain="x")
    assert table.point(metric="accuracy") == table.point(metric="in window") == table.point(metric="provenance") == 1
    assert table.point(metric="CKRI") == pytest.approx(8) and 0 < table.point(metric="by chance") < 0.5
    assert table.point(metric="without") < 0.5
    some = measured(Reader(core_models.base.tokenizer), found, provenance=2)
    assert [row["block"] for row in some] == [True, True, *[None] * 10]


def test_answers_are_kept_by_what_they_depend_on_and_one_that_a_stop_has_cut_is_asked_again(
    store, knowledge, core_models, tmp_path
):
    core, asked = Core(core_models, core_models.base.tokenizer, plain=True), knowledge.questions(5, random.Random(0))
    found, path = windows(store, asked, Needed().keep, 192), tmp_path / "answers.jsonl"
    rows = measured(core, found, 2, Answers(path))
    assert rows == measured(core, found, 2) and len(path.read_text().splitlines()) == 5
    path.write_text(path.read_text()[:-9])

    class Counted(Core):
        asked = 0

        def nll(self, *arguments):
            self.asked += 1
            return super().nll(*arguments)

    again = Counted(core_models, core_models.base.tokenizer, plain=True)
    assert measured(again, found, 2, Answers(path)) == rows
    assert again.asked == 2, "the last one, with and without the needed blocks"
    assert len(path.read_text().splitlines()) == 5
    other = windows(store, asked, Needed().keep, 160)
    assert measured(again, other, 2, Answers(path)) == measured(core, other, 2), "other windows are other questions"


def test_a_policy_that_does_not_open_the_fact_does_not_hold_it(store, knowledge):
    asked = knowledge.questions(12, random.Random(0))
    found = windows(store, asked, lambda asked, budget: [*range(budget)], 512)
    assert {window.held for window in found} == {True, False}
    for window in found:
        spans = [store.spans[fact.key] for fact in window.question.needed]
        assert window.held == all(span.stop <= 512 for span in spans)


def test_a_core_with_another_tokenizer_reads_the_text_of_the_window(core_models, knowledge):
    from megactx.parts.models import load_models

    other = load_models("tiny-base")
    text, facts = tell(knowledge.facts[:2], PROSE, 1, random.Random(0))
    kept, question = encoded(text, facts, core_models.base.tokenizer)[0].tolist(), knowledge.questions(1, random)[0]
    own, theirs = (Core(models, core_models.base.tokenizer, plain=True) for models in (core_models, other))
    assert own.same and not theirs.same
    for core in (own, theirs):
        said = core.base.tokenizer.decode(core.window(kept, question)[1:])
        assert said == f"{text}\n{question.text}{question.prefix}"


@pytest.mark.slow
def test_the_study_measures_two_cores_over_one_tree(base_folder, texts, tmp_path, capsys):
    sizes = ["--entities", "4", "--questions", "3", "--policies", "needed", "newest", "--path", str(texts)]
    assert main([*sizes, "--model", "tiny-base", str(base_folder), "--budget", "192", "--out", str(tmp_path)]) == 0
    capsys.readouterr()
    table = Table(json.loads((tmp_path / "cognitive_core.json").read_text())["table"])
    assert table.point(metric="chance") == 1 / 8
    for run in ("tiny-base", str(base_folder)):
        for kind in ("as told", "updated", "poisoned", "two hops"):
            own = table.pick(run=run, domain=kind, span=192)
            assert {"needed", "newest"} == {*own.names("carrier")}
            assert own.point(metric="in window", carrier="needed") == 1
            assert own.one(metric="accuracy", carrier="newest")["n"] == 3
        assert table.one(run=run, carrier="no knowledge", metric="accuracy")["low"] is not None
    gained = table.pick(run="tiny-base", carrier="needed", domain="as told")
    assert gained.point(metric="L_drop") > gained.point(metric="L_full") and gained.point(metric="CKRI") > 0
    assert (tmp_path / "trees" / "told" / "manifest.json").exists()
    assert "by chance" in (tmp_path / "cognitive_core.md").read_text()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--policies", "nothing"], "--policies=nothing is not known"),
        (["--provenance", "-1"], "--provenance=-1 is not allowed: at least 0"),
        (["--budget", "64"], "--budget=64 is not allowed: at least 132"),
        (["--entities", "4", "--questions", "40"], "questions=40 is not allowed: 4 entities allow 24"),
        (["--model", "nobody"], "--model=nobody: there is no such folder"),
    ],
)
def test_what_cannot_be_asked_is_told_with_its_option(options, said, texts, tmp_path, capsys):
    assert main(["--path", str(texts), "--out", str(tmp_path), *options]) == 2
    assert said in capsys.readouterr().err


def test_prose_without_a_sentence_is_refused(tmp_path: Path, capsys):
    (tmp_path / "a.txt").write_text("x y z\n" * 2000)
    assert main(["--path", str(tmp_path / "a.txt"), "--out", str(tmp_path / "out")]) == 2
    assert "there is no sentence of prose" in capsys.readouterr().err
