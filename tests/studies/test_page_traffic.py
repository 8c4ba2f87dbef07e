"""Which pages a session uses, and what a cache would have kept of them."""

import csv
import json
import shutil

import pytest

from megactx.apps.ingest import main as ingest
from megactx.runtime.session_files import is_session
from megactx.studies.page_traffic import NEVER, hit_rate, main, next_uses

pytest.importorskip("libcachesim")
USES = list("abcabdaebcabcd") * 20


def kept_by_hand(room: int, later: bool) -> float:
    """Pages of one size: the least recently used leaves, or with ``later`` the one that is used last of all."""
    held, hits = {}, 0
    for place, (page, following) in enumerate(zip(USES, next_uses(USES), strict=True)):
        hits += page in held
        if page not in held and len(held) == room:
            del held[max(held, key=held.get) if later else min(held, key=held.get)]
        held[page] = following if later else place
    return hits / len(USES)


@pytest.mark.parametrize("room", [1, 2, 3, 5])
def test_the_library_keeps_what_least_recently_used_and_beladys_rule_keep(room):
    sizes = [100] * len(USES)
    assert hit_rate("LRU", USES, sizes, 100 * room) == kept_by_hand(room, later=False)
    assert hit_rate("Belady", USES, sizes, 100 * room) == kept_by_hand(room, later=True)


def test_the_next_use_of_a_page():
    assert next_uses("abacb") == [2, 4, NEVER, NEVER, NEVER]


@pytest.fixture
def saved(exported, texts, tmp_path):
    """Options of a model, and a session over a tree on disk."""
    model = shutil.copytree(exported, tmp_path / "model")
    shutil.copytree(exported.parent / "lensnet", model / "lensnet")
    own = ["--model", str(model), "--budget", "400"]
    assert ingest([str(texts), str(tmp_path / "session"), *own]) == 0 and is_session(tmp_path / "session")
    return own, texts, tmp_path / "session"


@pytest.mark.slow
def test_the_pages_of_a_session_are_written_down_and_replayed_and_the_session_stays_as_it_was(saved, tmp_path, capsys):
    own, texts, session = saved
    before = {path: path.read_bytes() for path in session.rglob("*") if path.is_file() and path.suffix == ".json"}
    out = tmp_path / "out"
    command = [str(session), *own, "--path", str(texts), "--tokens", "600", "--out", str(out)]
    assert main(command) == 0
    assert "What a cache would have kept" in capsys.readouterr().out
    uses = list(csv.DictReader((out / "uses.csv").open()))
    found = json.loads((out / "page_traffic.json").read_text())
    assert len(uses) > 20 and {"0", "1"} <= {row["level"] for row in uses}
    seen = {(row["level"], row["part"], row["page"]) for row in uses}
    rates = {(row["carrier"], row["span"]): row["point"] for row in found["table"]}
    assert all(0 <= rate <= 1 - len(seen) / len(uses) + 1e-9 for rate in rates.values()), "a first use is never a hit"
    rooms = sorted({room for _, room in rates})
    assert all(rates["LRU", a] <= rates["LRU", b] for a, b in zip(rooms, rooms[1:], strict=False))
    assert before == {path: path.read_bytes() for path in before}
    assert (out / "page_traffic.png").stat().st_size > 1000


def test_what_is_not_a_session_is_refused(tmp_path, capsys):
    nowhere = ["--path", str(tmp_path / "nowhere")]  # text is looked for later: of much it takes long
    assert main([str(tmp_path / "nothing"), *nowhere, "--out", str(tmp_path / "out")]) == 2
    assert "nothing" in capsys.readouterr().err
