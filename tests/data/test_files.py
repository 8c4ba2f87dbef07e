import gzip
import json
import logging

import pytest
from datasets import Dataset

from megactx.data.files import Files


def jsonl(rows) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def texts(path, **settings):
    return sorted(Files(str(path), **settings).load()["text"])


@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.txt.gz"])
def test_one_file_is_one_document(tmp_path, name):
    raw = "Zwölf Boxkämpfer\n".encode()
    (tmp_path / name).write_bytes(gzip.compress(raw) if name.endswith(".gz") else raw)
    assert Files(str(tmp_path / name)).load()[:] == {
        "text": ["Zwölf Boxkämpfer\n"],
        "domain": ["narrative"],
        "source": [str(tmp_path / name)],
    }


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.parquet"])
def test_rows_are_documents_with_the_text_column_that_was_asked_for(tmp_path, name):
    rows = [{"body": "one", "id": 1}, {"body": "two", "id": 2}]
    if name.endswith("parquet"):
        Dataset.from_list(rows).to_parquet(tmp_path / name)
    else:
        raw = jsonl(rows)
        (tmp_path / name).write_bytes(gzip.compress(raw) if name.endswith(".gz") else raw)
    assert texts(tmp_path / name, text_column="body") == ["one", "two"]


def test_a_folder_gives_all_its_files_with_domains_by_ending(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.py").write_text("x = 1")
    (tmp_path / "b.json").write_text('{"a": 1}')
    (tmp_path / "c.md").write_text("# Title")
    (tmp_path / "d.jsonl").write_bytes(jsonl([{"text": "row", "domain": "code", "source": "elsewhere"}]))
    (tmp_path / "e.png").write_bytes(b"\x89PNG")
    rows = Files(str(tmp_path)).load()
    assert sorted(zip(rows["text"], rows["domain"], strict=True)) == [
        ("# Title", "narrative"),
        ("row", "code"),
        ("x = 1", "code"),
        ('{"a": 1}', "structured"),
    ]
    assert "elsewhere" in rows["source"]


def test_a_glob_gives_what_it_matches(tmp_path):
    for name in ("a.txt", "b.txt", "c.md"):
        (tmp_path / name).write_text(name)
    assert texts(tmp_path / "*.txt") == ["a.txt", "b.txt"]


def test_the_domain_setting_wins_over_ending_and_column(tmp_path):
    (tmp_path / "a.py").write_text("x")
    (tmp_path / "b.jsonl").write_bytes(jsonl([{"text": "row", "domain": "code"}]))
    assert set(Files(str(tmp_path), domain="structured").load()["domain"]) == {"structured"}


def test_an_empty_file_of_a_folder_is_left_out_and_said(tmp_path, caplog):
    (tmp_path / "__init__.py").write_text("")
    (tmp_path / "empty.txt.gz").write_bytes(gzip.compress(b""))
    (tmp_path / "a.py").write_text("x")
    with caplog.at_level(logging.WARNING):
        assert texts(tmp_path) == ["x"]
    assert "__init__.py" in caplog.text and "empty.txt.gz" in caplog.text


@pytest.mark.parametrize(
    "name, raw, said",
    [
        ("a.txt", b"", "empty"),
        ("a.txt.gz", gzip.compress(b""), "empty"),
        ("a.jsonl.gz", gzip.compress(b""), "empty"),
        ("a.txt", b"caf\xe9", "not UTF-8"),
        ("a.txt.gz", gzip.compress(b"x" * 10_000)[:-12], "cannot be read"),
        ("a.txt.gz", b"not a gz", "cannot be read"),
        ("a.txt.gz", gzip.compress(b"abc" * 100)[:10] + b"\xff" * 40, "cannot be read"),
        ("a.jsonl.gz", gzip.compress(jsonl([{"text": "x" * 5000}]))[:-12], "cannot be read"),
        ("a.jsonl", jsonl([{"text": "good"}]) + b'{"text": "cut sho', "cannot be read as json"),
        ("a.jsonl", b'{"text": "caf\xe9"}\n', "not UTF-8"),
        ("a.jsonl", jsonl([{"body": "x"}]), "data.text_column=text"),
        ("a.jsonl", jsonl([{"text": "x"}, {"text": None}]), "row 1 has no text"),
        ("a.jsonl", jsonl([{"text": 3}]), "not text"),
        ("a.jsonl", jsonl([{"text": ["x"]}]), "not text"),
        ("a.jsonl", jsonl([{"text": "x", "domain": "poetry"}]), "domain=poetry is not allowed: one of narrative"),
        ("a.parquet", b"PAR1 but no more", "cannot be read as parquet"),
    ],
)
def test_a_bad_file_is_refused_by_name(tmp_path, name, raw, said):
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(ValueError, match=said) as error:
        Files(str(tmp_path / name)).load()
    assert str(tmp_path) in str(error.value) or name in str(error.value)


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.jsonl", "a.jsonl.gz", "a.parquet"])
def test_a_file_above_the_size_limit_is_refused_by_its_decompressed_size(tmp_path, name):
    rows = [{"text": "x" * 50_000}] * 4
    if name.endswith("parquet"):
        Dataset.from_list(rows).to_parquet(tmp_path / name)  # a dictionary and compression make it tiny
    else:
        raw = jsonl(rows)
        (tmp_path / name).write_bytes(gzip.compress(raw) if name.endswith(".gz") else raw)
    with pytest.raises(ValueError, match="data.max_bytes=100000"):
        Files(str(tmp_path / name), max_bytes=100_000).load()


@pytest.mark.parametrize("path", [None, ""])
def test_a_path_that_is_not_set_names_the_setting(path):
    with pytest.raises(ValueError, match="data.path is not set"):
        Files(path)


def test_a_path_without_files_names_the_setting(tmp_path):
    with pytest.raises(ValueError, match="data.path=.*no such file"):
        Files(str(tmp_path / "nothing.txt"))
    with pytest.raises(ValueError, match="data.path=.*holds none of"):
        Files(str(tmp_path))


def test_an_unknown_domain_names_what_is_allowed(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(ValueError, match="data.domain=poetry is not allowed: one of narrative, code, structured"):
        Files(str(tmp_path), domain="poetry")


def test_the_fingerprint_changes_with_the_files_and_the_settings(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    first = Files(str(tmp_path)).fingerprint()
    assert first == Files(str(tmp_path)).fingerprint()
    assert first != Files(str(tmp_path), domain="code").fingerprint()
    (tmp_path / "a.txt").write_text("xy")
    assert first != Files(str(tmp_path)).fingerprint()
