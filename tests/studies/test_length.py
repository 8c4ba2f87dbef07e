"""Evaluation at length: histories are what they say, policies see what they may, and the study in miniature."""

import json
import math
from dataclasses import replace

import pytest
import torch

from megactx.evaluation.planted import in_detail
from megactx.evaluation.table import Table
from megactx.focus.keys import KeyNet
from megactx.lm.chunked_head import nll
from megactx.memory import MegaContextTree
from megactx.runtime import Controller, Settings
from megactx.studies import length_planted as planted
from megactx.studies.length import main
from megactx.studies.length_policies import (
    DROP,
    EARNED,
    FOCUS,
    FULL,
    KEYS,
    RECENCY,
    dropping,
    full_context,
    recalled,
    session,
)
from megactx.studies.length_report import notes_on, report_of, summarise
from megactx.studies.length_text import Texts, gather, tree_of

K, NEAR, SCORED, BUDGET, LIMIT = 4, 256, 32, 232, 256


@pytest.fixture(scope="module")
def found(models, texts) -> Texts:
    return gather(models.base.tokenizer, str(texts), None, NEAR, SCORED, 2048, 4, ["narrative", "code"], 0)


@pytest.fixture
def ids():
    def make(count, seed=0):
        return torch.randint(2, 512, (count,), generator=torch.Generator().manual_seed(seed))

    return make


def test_histories_of_a_target_end_alike_and_those_of_a_domain_begin_alike(models, found):
    target = found.targets[0]
    for length in (NEAR, 512, 2048):
        ids = found.history(target, length)
        assert len(ids) == length and torch.equal(ids[-NEAR:], target["ids"][:NEAR])
        assert ids[0] == ids[-NEAR] == models.base.tokenizer.bos_token_id
        assert len(found.scored(target)) == SCORED
    assert torch.equal(found.history(target, 2048)[: 512 - NEAR], found.history(target, 512)[: 512 - NEAR])


def test_no_target_stands_in_a_filler(found):
    for target in found.targets:
        middle = target["ids"][100:130]
        for filler in found.fillers.values():
            assert not (filler.unfold(0, 30, 1) == middle).all(1).any()


def test_too_little_text_is_told(models, texts):
    with pytest.raises(ValueError, match="the longest history needs 1,000,000"):
        gather(models.base.tokenizer, str(texts), None, NEAR, SCORED, 1_000_000 + NEAR, 2, None, 0)
    with pytest.raises(ValueError, match="no text of structured has 288 tokens"):
        gather(models.base.tokenizer, str(texts), None, NEAR, SCORED, NEAR, 2, ["structured"], 0)


def test_a_tree_that_takes_over_what_it_can_is_that_of_the_whole_history(models, ids):
    filler, history = ids(1000), ids(1300)
    history[:900] = filler[:900]
    history[333] += 1
    known = tree_of(models, filler, None)
    tree, plain = (
        tree_of(models, history, known),
        MegaContextTree.from_tokens(history[None], models.gistnet, models.base),
    )
    assert torch.equal(tree.tokens, plain.tokens) and tree.depth == plain.depth
    for level in range(1, plain.depth + 1):
        torch.testing.assert_close(tree.gists(level), plain.gists(level))
    assert int(known.lengths[0]) == 1000


def test_dropping_reads_the_sink_and_the_newest_tokens_at_each_block(models, ids):
    history, scored, budget = ids(100), ids(2 * K, seed=1), 40
    whole = torch.cat([history, scored])
    for positions in ("absolute", "rebased"):
        out = dropping(models.base, history, scored, budget, K, positions)
        for block in (0, 1):
            end = 100 + block * K
            place = torch.cat([torch.arange(K), torch.arange(end - budget + K, end + K)])
            at = place if positions == "absolute" else torch.arange(len(place))
            mask = torch.ones(len(place), len(place)).tril().bool()[None, None]
            hidden = models.base(models.base.embed(whole[place][None]), at[None], mask)[0, budget - 1 : -1]
            expected = nll(models.base, hidden, whole[end : end + K])
            torch.testing.assert_close(out.nll[block * K : (block + 1) * K], expected, atol=1e-4, rtol=1e-4)
    short = dropping(models.base, history, scored[: K + 1], budget, K, "absolute")
    torch.testing.assert_close(short.nll[:K], dropping(models.base, history, scored, budget, K, "absolute").nll[:K])
    assert len(short.nll) == K + 1


def test_while_all_of_a_history_fits_a_session_costs_what_full_context_costs(models, ids):
    history, scored = ids(120), ids(SCORED, seed=1)
    tree = tree_of(models, history, None)
    full = full_context(models, history, scored)
    for kind in (RECENCY, FOCUS):
        own = session(models, tree, scored, kind, BUDGET, "absolute", LIMIT, 0)
        torch.testing.assert_close(own.nll, full.nll, atol=1e-3, rtol=1e-3)
        assert int(tree.lengths[0]) == 120  # it read a copy


def test_a_session_tells_of_its_refocuses_and_more_of_them_can_be_asked_for(models, ids):
    tree, scored = tree_of(models, ids(1200), None), ids(SCORED, seed=1)
    own = session(models, tree, scored, FOCUS, BUDGET, "rebased", LIMIT, 0)
    assert {"swap_rate", "utilisation", "reuse"} <= set(own.telemetry) and 0.8 <= own.telemetry["utilisation"] <= 1
    assert own.nll.isfinite().all() and own.seconds > 0 and int(own.context.ends()[0]) == 1200
    more = session(models, tree, scored, FOCUS, BUDGET, "rebased", LIMIT, 20)
    assert not torch.equal(more.context.lods(), own.context.lods())
    assert "swap_rate" not in session(models, tree, scored, RECENCY, BUDGET, "rebased", LIMIT, 0).telemetry


def test_a_planted_fact_stands_at_the_same_share_of_every_history_and_is_asked_for_at_its_end(models, found):
    cases = planted.cases(found, models.base.tokenizer, 4, K, seed=0)
    assert cases and {case["kind"] for case in cases} <= {"copy", "passage", "key-value"}
    for case in cases:
        answer, (first, told) = case["ids"][found.near :], case["told"][0]
        for length in (NEAR, 1024, 2048):
            ids, needed = planted.placed(found, case, length, K)
            start = first // K * length // NEAR * K
            assert torch.equal(ids[start : start + len(told)], told)
            assert torch.equal(torch.cat([told[: case["cue"]], answer]), told)
            assert torch.equal(ids[length - case["cue"] :], told[: case["cue"]])
            held = ids[needed * K : (needed + 1) * K]
            assert (held.unsqueeze(0) == told.unfold(0, min(K, len(told)), 1)[-1:]).any()
            changed = int((ids != found.history(case["target"], length)).sum())
            assert changed <= sum(len(part) for _, part in case["told"]) + case["cue"]


def test_sessions_read_the_old_block_whose_words_come_again(models, ids, monkeypatch):
    keys = KeyNet(models.base.model.get_input_embeddings().weight, 32).eval().requires_grad_(False)
    with torch.no_grad():
        keys.null.fill_(12.0)  # of 15: only what is nearly the same stands out
    monkeypatch.setattr("megactx.runtime.trial.PAYS", -math.inf)  # nothing makes a text likelier to a random base
    keyed, history, scored = replace(models, keys=keys, lensnet=None), ids(1200), ids(SCORED, seed=1)
    once, twice = history.clone(), history.clone()
    once[-K:], twice[-2 * K :] = history[400 : 400 + K], history[400 : 400 + K].repeat(2)
    # What stands twice at the end has come again right there; keys are asked for all of it, and rare tokens are few.
    for text, kind, rare, found in (
        (once, RECENCY, False, False),
        (once, EARNED, False, True),
        (twice, EARNED, False, False),
        (twice, KEYS, False, True),
        (twice, RECENCY, True, False),
        (twice, EARNED, True, True),
    ):
        monkeypatch.setattr("megactx.runtime.rare_tokens.LEAST", (3.0, 6.0) if rare else ())
        own = session(keyed, tree_of(keyed, text, None), scored, kind, BUDGET, "rebased", LIMIT, 0, 3 * K)
        assert in_detail(own.context, [400 // K]) == found and int(own.context.counts[0]) <= BUDGET
    assert tree_of(replace(keyed, keys=None), history, None).keys is None  # who has no use for them does not make them


def test_what_is_recalled_is_what_a_session_says_that_recalls(models, ids):
    models, history, scored = replace(models, lensnet=None), ids(1200), ids(80, seed=1)
    scored[20:60] = history[400:440]
    found = session(models, tree_of(models, history, None), scored, EARNED, BUDGET, "rebased", LIMIT, 0)
    again = recalled(found, history, scored)
    settings = Settings(BUDGET, FOCUS, "rebased", LIMIT, earn=True, recall=True)
    stream = Controller(models, settings).stream(tree=tree_of(models, history, None))
    assert torch.allclose(again.nll, stream.append(scored[None], score=True)[0], atol=2e-4)
    assert again.nll[36:60].mean() < 0.5 < found.nll[36:60].mean()  # behind 16 tokens that came again
    near = recalled(found, history, scored, BUDGET)  # dropping has not what stood there
    assert near.nll[20:60].mean() > found.nll[20:60].mean() - 0.1


def row(length, policy, nll, budget=512, positions="absolute", **more):
    blocks = {"nll": [nll], "mean": nll, "seconds": 0.001, "tree_bytes": 38 * length}
    return {"length": length, "policy": policy, "budget": budget, "positions": positions} | blocks | more


def report(learned=None, lensnet="x"):
    documents = []
    for text in range(20):
        hard = 2 + 0.1 * (text % 7)
        rows = [
            row(4096, FULL, hard, budget=None),
            row(4096, DROP, hard + 0.4),
            row(4096, FOCUS, hard + 0.1, swap_rate=0.1),
        ]
        rows += [row(32768, DROP, hard + 0.4, positions="rebased"), row(32768, FOCUS, hard + 0.2, positions="rebased")]
        documents.append({"text": text, "domain": "code", "rows": rows})
    answers = [
        [dict(length=4096, policy=FOCUS, budget=512, positions="absolute", mean=1.0, found=n < 3)] for n in range(5)
    ]
    cases = [
        {"kind": "copy", "domain": "code", "gain": gain, "rows": rows}
        for gain, rows in zip((1, 1, 1, 0.6, 0.4), answers, strict=True)
    ]
    about = {"lengths": [4096, 32768], "budgets": [512], "tokens": 32, "block_size": 32, "limit": 4096, "most": 8192}
    about |= {"device": "cpu", "lensnet": lensnet, "learned": learned or {}, "filler": None, "refocuses": 0}
    return report_of(summarise(documents, cases), cases, about)


def test_costs_are_paired_with_full_context_and_dropping_of_the_same_document():
    found = report()
    near, far = (found.table.pick(span=length, domain=None) for length in (4096, 32768))
    row = near.one(carrier=FOCUS, metric="vs_full")
    assert row["low"] == pytest.approx(0.1) and row["high"] == pytest.approx(0.1)
    assert far.point(carrier=FOCUS, metric="vs_full") == pytest.approx(0.2), "at the longest that it reads"
    assert far.one(carrier=FOCUS, metric="vs_dropping")["high"] == pytest.approx(-0.2)
    assert near.one(carrier=FULL, metric="vs_dropping") is None and near.one(carrier=FULL, metric="regret") is None
    assert near.point(carrier=FOCUS, metric="regret") == 0
    assert near.point(carrier=DROP, metric="regret") == pytest.approx(0.3)
    assert near.point(carrier=FOCUS, metric="tree_bytes_per_token") == 38
    assert any("focus +0.100 [+0.100, +0.100] at 0.100 swaps, dropping +0.400" in note for note in found.notes)
    table = Table(own | {"run": own["run"].replace("absolute", "rebased")} for own in found.table)
    assert any("focus +0.100 [+0.100, +0.100] at 0.100 swaps, dr" in note for note in notes_on(table, found.about))


def test_only_cases_that_the_base_can_use_count():
    found = report()
    row = found.table.one(domain="overall", metric="found")
    assert (found.about["usable"], found.about["cases"], row["n"]) == (4, 5, 4) and row["point"] == 0.75


def test_the_report_says_what_is_missing():
    found = report(learned={"code": 1000}, lensnet=None)
    told = " ".join(found.notes)
    assert "no LensNet" in told and "1,000 tokens of the filler of code" in told and "not at T = 32,768" in told
    for sheet in found.sheets:
        assert all(len(line) == len(sheet.header) for line in sheet.rows)
    assert found.sheets[-1].rows == [["4,096", FOCUS, "512", "absolute", "0.75 [0.30, 0.95]", "1.000"]]


@pytest.mark.slow
def test_the_study_in_miniature_goes_on_where_it_was_stopped(exported, texts, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    command = ["--model", str(exported), "--lensnet", str(exported.parent / "lensnet"), "--path", str(texts)]
    command += ["--lengths", str(NEAR), "512", "--budgets", str(BUDGET), "--tokens", str(SCORED), "--documents", "2"]
    command += ["--planted", "2", "--out", str(out)]
    assert main(command) == 0
    written = json.loads((out / "length.json").read_text())
    table = Table(written["table"]).pick(metric="nll", domain=None)
    policies = [(r["span"], r["carrier"], r["run"].split()[1]) for r in table]
    near = [(NEAR, FULL, "absolute")]
    near += [(NEAR, name, at) for at in ("absolute", "rebased") for name in (DROP, RECENCY, FOCUS)]
    assert policies == [*near, *((512, name, "rebased") for name in (DROP, RECENCY, FOCUS))]
    assert all((out / f"length.{ending}").stat().st_size > 100 for ending in ("md", "csv", "png"))
    (out / "documents" / "0001.json").unlink()
    stamps = {path: path.stat().st_mtime_ns for path in out.glob("*/*.json")}
    assert main(command) == 0
    assert len(list(out.glob("documents/*.json"))) == 2
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in stamps.items())
    again = json.loads((out / "length.json").read_text())
    assert Table(again["table"]).pick(metric="nll", domain=None) == table
    assert main([*command, "--seed", "1"]) == 2
    assert "other settings: " in capsys.readouterr().err


@pytest.mark.parametrize(
    "wrong, told",
    [
        (["--lengths", "130"], "--lengths=130"),
        (["--tokens", "6"], "--tokens=6"),
        (["--budgets", "40"], "budget=40"),
        (["--limit", "513"], "--limit=513"),
        (["--limit", "10"], "--limit=10"),
        (["--documents", "0"], "--documents=0"),
        (["--keys", "4"], "--keys=4 is not allowed: these models have no keys"),
        (["--lensnet", "/nowhere"], "--lensnet=/nowhere: there is no such folder"),
    ],
)
def test_a_mistake_is_one_message(exported, tmp_path, capsys, wrong, told):
    command = ["--model", str(exported), "--lengths", "256", "--budgets", "232", "--tokens", "32"]
    assert main([*command, "--out", str(tmp_path), *wrong]) == 2
    error = capsys.readouterr().err
    assert told in error and "Traceback" not in error
