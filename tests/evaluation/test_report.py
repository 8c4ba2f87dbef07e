import json

import pytest
import torch
from block_scores import synthetic

from megactx.evaluation.metrics import recovery
from megactx.evaluation.report import report_of
from megactx.evaluation.summary import summarise


def status(numbers):
    return {target["target"]: target["status"] for target in numbers["targets"]}


def test_a_target_that_dropping_also_meets_does_not_count_as_passed():
    weak = synthetic(cost=0.2)
    numbers = summarise(weak, targets={"dnll": 0.5, "recovery": 0.3, "recovery_body": 0.9, "structured/dnll": 1})
    assert status(numbers) == {
        "dnll": "not informative",
        "recovery": "passed",
        "recovery_body": "missed",
        "structured/dnll": "no blocks",
    }
    text = report_of(numbers).markdown()
    assert "targets: 1 of 4 passed" in text and "not informative" in text
    dropped = numbers["targets"][0]["dropped"]
    assert dropped == pytest.approx((weak.drop - weak.full).mean().item(), rel=1e-5) and f"{dropped:.3f}" in text


def test_a_weighted_target_is_the_mean_of_the_domains_by_their_share_without_those_that_have_none():
    scores = synthetic(domains=("narrative", "code", "adversarial"))
    weights = {"narrative": 0.6, "code": 0.3, "structured": 0.1}
    target = summarise(scores, targets={"weighted/dnll": 0.8}, weights=weights)["targets"][0]
    for name, nll in (("value", scores.carriers["gistnet"]), ("dropped", scores.drop)):
        narrative, code = ((nll - scores.full)[scores.rows(d)].double().mean().item() for d in ("narrative", "code"))
        assert target[name] == pytest.approx((0.6 * narrative + 0.3 * code) / 0.9)
    assert status(summarise(scores, targets={"weighted/dnll": 0.8})) == {"weighted/dnll": "undefined"}


def test_targets_per_domain_and_of_the_gist_space():
    numbers = summarise(
        synthetic(cost=3.0),
        targets={"code/substitutability": 0.1, "adjacent_distance": 0.3},
        geometry={"diversity": 0.2, "adjacent_distance": 0.4},
    )
    assert status(numbers) == {
        "code/substitutability": "missed",
        "adjacent_distance": "passed",
        "diversity": "missed",
    }
    assert any("collapse" in note for note in numbers["notes"])


def test_geometry_stands_per_domain_and_its_targets_are_found_there():
    geometry = {"diversity": 0.6, "code/diversity": 0.4, "narrative/diversity": 0.7, "attention_entropy": float("nan")}
    numbers = summarise(synthetic(), targets={"code/diversity": 0.5, "structured/diversity": 0.5}, geometry=geometry)
    assert status(numbers) == {
        "diversity": "passed",
        "attention_entropy": "undefined",
        "code/diversity": "missed",
        "structured/diversity": "no blocks",
    }
    text = report_of(numbers).markdown()
    assert "|  | overall | narrative | code | healthy |" in text
    assert "| diversity | 0.600 | 0.700 | 0.400 | > 0.5; < 0.3 is collapse |" in text
    assert "| attention_entropy | undefined | - | - | 2.0-4.0 bits |" in text


@pytest.mark.parametrize(
    ("bits", "result"), [(1.99, "missed"), (2.0, "passed"), (3.1, "passed"), (4.0, "passed"), (4.01, "missed")]
)
def test_attention_entropy_has_a_target_with_two_ends(bits, result):
    numbers = summarise(synthetic(), geometry={"attention_entropy": bits})
    assert status(numbers) == {"attention_entropy": result}
    assert f"| attention_entropy | 2-4 | {bits:.3f} | - | {result} |" in report_of(numbers).markdown()


def test_copy_recovery_stands_beside_its_controls_and_the_cost_of_dropping(tmp_path):
    copied = {64: synthetic(horizon=8), 128: synthetic(horizon=8, domains=("narrative",)), 256: synthetic(cost=0.001)}
    numbers = summarise(synthetic(), copies=copied)
    text = report_of(numbers).markdown()
    assert "| in place of the block | 64 tokens on | 128 tokens on | 256 tokens on |" in text
    near, far = copied[64], numbers["copies"]["256"]
    cost = (near.drop - near.full).mean().item()
    assert f"| cost of dropping, nats | {cost:.3f} |" in text
    own = recovery(near.full, near.drop, near.carriers["gistnet"])
    assert numbers["copies"]["64"]["recovery"]["overall"]["gistnet"]["point"] == pytest.approx(own)
    assert f"| **gistnet** | **{own:.2f} [" in text and "| last token | 0.3" in text
    assert far["recovery"]["overall"]["gistnet"]["point"] != far["recovery"]["overall"]["gistnet"]["point"]
    code = next(line for line in text.splitlines() if line.startswith("| code: gistnet"))
    assert "| - |" in code, "no copy of that distance in code"
    assert any("256 tokens" in note and "copy recovery is undefined" in note for note in numbers["notes"])
    assert not any("128 tokens" in note for note in numbers["notes"])
    report_of(numbers).write(tmp_path / "report", numbers)
    data = json.loads((tmp_path / "report.json").read_text())
    assert data["copies"]["256"]["recovery"]["overall"]["gistnet"]["point"] is None


@pytest.mark.parametrize(("cost", "result"), [(10.0, "missed"), (4.0, "passed"), (1.0, "not informative")])
def test_hierarchical_consistency_is_judged_beside_the_dropped_span(cost, result):
    level2 = synthetic(cost=cost, recovery={"gistnet": 0.75, "last token": 0.1})
    numbers = summarise(synthetic(), level2=level2)
    dropped = (level2.drop - level2.full).mean().item()
    target = numbers["targets"][-1]
    assert target["target"] == "level2/dnll" and target["dropped"] == pytest.approx(dropped, rel=1e-5)
    assert target["status"] == result
    assert "one gist of K gists in place of K^2 tokens: 40 blocks" in report_of(numbers).markdown()


def test_a_target_that_is_not_measured_is_refused():
    with pytest.raises(ValueError, match="targets.dNLL: not measured; measured are dnll"):
        summarise(synthetic(), targets={"dNLL": 0.5})


def test_an_unknown_subject_is_refused():
    with pytest.raises(ValueError, match="'gist' was not scored"):
        summarise(synthetic(), subject="gist")


def test_full_context_and_dropped_block_stand_at_one_and_zero():
    rows = summarise(synthetic())["groups"]["overall"]["rows"]
    assert rows["full"]["recovery"] == 1 and rows["full"]["kl"] == 0 and rows["full"]["top1"] == 1
    assert rows["dropped"]["recovery"] == 0 and rows["dropped"]["recovery_body"] == 0


def test_the_better_form_of_the_untrained_mean_is_quoted_for_each_range():
    scores = synthetic(blocks=200)
    # raw is worse at the seam, better behind it
    raw, rescaled = scores.carriers["untrained mean (raw)"], scores.carriers["untrained mean (rescaled)"]
    raw.copy_(rescaled)
    raw[:, 0] += 10
    raw[:, 4:] -= 0.2
    numbers = summarise(scores)
    group = numbers["groups"]["overall"]
    assert group["rows"]["untrained mean"]["quoted"] == "untrained mean (rescaled)"
    assert group["against"]["untrained mean"]["all"] == group["against"]["untrained mean (rescaled)"]["all"]
    assert group["against"]["untrained mean"]["body"] == group["against"]["untrained mean (raw)"]["body"]
    table = report_of(numbers).markdown()
    assert "untrained mean (rescaled) *" in table and "untrained mean (raw)" not in table


def test_verdicts_stand_for_all_h_and_for_the_body():
    against = summarise(synthetic(blocks=200))["groups"]["overall"]["against"]
    assert against["last token"]["all"]["verdict"] == "above"
    assert against["last token"]["body"]["verdict"] == "above"
    swapped = synthetic(blocks=200, recovery={"gistnet": 0.3, "last token": 0.6, "twin": 0.3})
    swapped.carriers["twin"] = swapped.carriers["gistnet"].clone()
    against = summarise(swapped)["groups"]["overall"]["against"]
    assert against["last token"]["all"]["verdict"] == "below"
    assert against["twin"]["body"]["verdict"] == "within the interval"


def test_a_weak_base_is_named():
    scores = synthetic(cost=0.5)
    scores.drop[:, 4:16] = scores.full[:, 4:16]
    numbers = summarise(scores)
    assert any("base too weak" in note and "4-15" in note for note in numbers["notes"])
    assert "undefined" in report_of(numbers).markdown()
    assert any("recovery is undefined" in note for note in summarise(synthetic(cost=0.001))["notes"])


def test_few_blocks_and_a_high_perplexity_ratio_are_said():
    notes = " ".join(summarise(synthetic(cost=5.0))["notes"])
    assert "40 blocks of 8 documents" in notes and "ALARM: perplexity ratio" in notes


def test_report_files_hold_every_row_the_hash_and_no_nan(tmp_path):
    scores = synthetic(cost=0.001)
    numbers = summarise(scores, targets={"recovery": 0.5})
    report_of(numbers).write(tmp_path / "run" / "report", numbers)
    text, data = (
        (tmp_path / "run" / "report.md").read_text(),
        json.loads((tmp_path / "run" / "report.json").read_text()),
    )
    assert scores.block_hash() in text and data["block_hash"] == scores.block_hash()
    assert "40 blocks of 8 documents" in text
    for row in ("full", "dropped", "last token", "gistnet"):
        assert f"{row} " in text and row in data["groups"]["code"]["rows"]
    assert data["groups"]["overall"]["rows"]["gistnet"]["recovery"] is None
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        f"report.{ending}" for ending in ("csv", "json", "md")
    ]


def test_tables_fit_in_120_columns_without_a_terminal():
    import io

    from rich.console import Console

    out = io.StringIO()
    extra = {"copies": {d: synthetic(horizon=8) for d in (64, 128, 256)}, "level2": synthetic()}
    numbers = summarise(synthetic(blocks=100), geometry={"diversity": 0.6}, **extra)
    report_of(numbers).show(Console(file=out))
    lines = out.getvalue().splitlines()
    assert max(map(len, lines)) <= 120
    assert any("untrained mean (rescaled) *" in line and "%" in line for line in lines)


def test_a_horizon_of_one_and_missing_kl_still_make_a_report():
    scores = synthetic(horizon=1)
    scores.kl.clear()
    scores.agree.pop("last token")
    text = report_of(summarise(scores)).markdown()
    assert "undefined" in text and "gistnet" in text
    assert torch.isfinite(scores.full).all()
