"""Recovery by block size: ladders of several sizes in one table and one picture."""

import csv
import json

import pytest

from megactx.studies.block_sizes import by_size, costs, long_table, main


def interval(point, low=None, high=None):
    return {"point": point, "low": low, "high": high}


def ladder(size, recovery, history=0.1, **changes):
    """The numbers of a finished ladder, as ``rungs`` writes them, of two carriers."""
    carriers = {
        "gistnet": {"recovery": interval(recovery, recovery - 0.02, recovery + 0.02), "history": interval(history)},
        "last token": {"recovery": interval(recovery / 2, 0.0, recovery), "history": interval(None)},
    }
    for carrier in carriers.values():
        carrier |= {"bytes_per_token": 512 / size, "parameters": 9, "first": 0, "body": interval(0.05, 0.0, 0.1)}
    about = {"subject": "gistnet", "base": "asset:tiny-base", "horizon": 6, "blocks": 10, "documents": 5}
    about |= {"block_hash": f"h{size}", "history_hash": f"s{size}", "cost_of_no_history": 0.25}
    dropped = {"by_offset": {"dropped": [4.0, 0.6, 0.3, 0.3, 0.1, 0.2]}}
    return about | {"block_size": size, "carriers": carriers} | dropped | changes


@pytest.fixture
def folders(tmp_path):
    out = []
    for name, numbers in {"k32": ladder(32, 0.2), "k8": ladder(8, 0.4), "k8b": ladder(8, 0.5)}.items():
        out.append(tmp_path / name)
        out[-1].mkdir()
        (out[-1] / "ladder.json").write_text(json.dumps({"runs": [numbers]}))
    return out


def test_sizes_stand_in_order_and_seeds_of_one_size_are_combined():
    ladders = by_size([ladder(32, 0.2), ladder(8, 0.4), ladder(8, 0.5)])
    assert list(ladders) == [8, 32] and [run["seeds"] for run in ladders.values()] == [2, 1]
    assert ladders[8]["carriers"]["gistnet"]["recovery"]["point"] == pytest.approx(0.45)
    assert long_table(ladders).names("carrier") == ["gistnet", "last token"]


def test_the_cost_of_a_dropped_block_is_a_mean_over_the_offsets_that_are_scored():
    found = costs(ladder(8, 0.4))
    assert found["h >= 1"] == pytest.approx((0.6 + 0.3 + 0.3 + 0.1 + 0.2) / 5)
    assert found["h >= 4"] == pytest.approx(0.15) and found["history"] == 0.25


def test_table_rows_and_picture_are_written(folders, tmp_path, capsys):
    out = tmp_path / "out" / "sizes"
    assert main([*map(str, folders), "--out", str(out)]) == 0
    text = out.with_name("sizes.md").read_text()
    assert "0.45 [0.43, 0.47] ± 0.071" in text and "0.20 [0.18, 0.22]" in text and "undefined" in text
    assert "cost of none, nats" in text and "recovery by block size" in capsys.readouterr().out
    with out.with_name("sizes.csv").open() as file:
        rows = {(row["carrier"], row["run"], row["metric"], row["span"]): row for row in csv.DictReader(file)}
    assert float(rows["gistnet", "8", "bytes_per_token", ""]["point"]) == 64
    assert float(rows["gistnet", "8", "recovery", "h >= 1"]["point"]) == pytest.approx(0.45)
    assert rows["last token", "8", "recovery", "history"]["point"] == "", "undefined"
    assert set(json.loads(out.with_name("sizes.json").read_text())["ladders"]) == {"8", "32"}
    assert out.with_name("sizes.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    ("second", "named"),
    [
        (ladder(32, 0.2, base="another"), "differ in base"),
        (ladder(32, 0.2, horizon=8), "differ in horizon"),
        (ladder(8, 0.2), "block_size=8; give ladders of at least two sizes"),
        (ladder(32, 0.2, carriers={"other": {}}), "no carrier in common"),
        (ladder(8, 0.2, block_hash="other"), "at least two sizes"),
    ],
)
def test_ladders_that_do_not_belong_together_are_refused(second, named):
    with pytest.raises(ValueError, match=named):
        by_size([ladder(8, 0.4), second])


def test_a_folder_without_a_ladder_is_told_in_one_message(tmp_path, capsys):
    assert main([str(tmp_path)]) == 2
    assert "there is no ladder.json" in capsys.readouterr().err
