"""One history before and after curation: what the table says holds on a history in miniature."""

import json

import pytest

from megactx.studies import curation


@pytest.mark.slow
def test_what_a_window_had_opened_is_answered_still_and_all_comes_back(tmp_path):
    asked = ["--tokens", "60000", "--sessions", "2", "--planted", "8", "--continuation", "128", "--measured", "8"]
    config = "default,policies.unread.behind=20000"
    assert curation.main([*asked, "--out", str(tmp_path), "--configs", config]) == 0
    rows: dict[str, dict] = {}
    for row in json.loads((tmp_path / "curation.json").read_text())["table"]:
        rows.setdefault(row["carrier"], {})[row["metric"]] = row["point"]
    before, after, random, everything = rows[curation.BEFORE], rows[config], rows[curation.RANDOM], rows[curation.ALL]
    assert after["tokens"] < before["tokens"] / 2 and after["archive"] > 0 == before["archive"]
    assert after["opened"] == 1 and everything["opened"] == everything["others"] == 0 and after["kept"] == 1
    assert random["opened"] < 1
    for row in (after, random, everything):
        assert row["protected"] == row["restored"] == 1


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (["--tokens", "1000"], "--tokens=1000 is not allowed: at least 49152"),
        (["--configs", "nothing"], "curation=nothing: no such option"),
        (["--path", "/nowhere"], "/nowhere"),
    ],
)
def test_what_is_not_allowed_is_said_before_anything_is_built(tmp_path, capsys, wrong, said):
    assert curation.main(["--out", str(tmp_path), *wrong]) == 2
    assert said in capsys.readouterr().err
