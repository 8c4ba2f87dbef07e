import gzip
import json
import logging

import pytest
from datasets import Dataset

from megactx.data.files import ALL_DOMAINS, DOMAINS, Files, code_share


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


FENCED = "# How to\n\nRun it.\n\n```python\nx = 1\n\ny = 2\n```\nThat is all.\n"
LITERAL = "Title\n=====\n\nRun::\n\n    x = 1\n\n    y = 2\n\nThat is all.\n"


@pytest.mark.parametrize(
    "text, share",
    [
        (FENCED, 4 / 7),
        (FENCED.replace("```", "~~~~"), 4 / 7),
        (FENCED.replace("y = 2\n```\n", "y = 2\n"), 4 / 6),  # never closed: code to the end
        (FENCED.replace("x = 1", "~~~\n``` py"), 5 / 8),  # neither of them closes the fence
        (LITERAL, 2 / 6),
        (LITERAL.replace("Run::", ".. code-block:: python\n   :linenos:"), 3 / 7),
        (LITERAL.replace("Run::", ".. note::"), 0),  # the content of other directives is prose
        (LITERAL.replace("    x", "\tx").replace("    y", "\ty"), 2 / 6),
        ("- a list\n\n    of two paragraphs\n", 0),
        ("", 0),
    ],
)
def test_the_share_of_code_counts_fenced_lines_and_lines_indented_under_two_colons(text, share):
    assert code_share(text) == pytest.approx(share)


@pytest.mark.parametrize("name, text", [("a.md", FENCED), ("b.rst", LITERAL), ("c.md.gz", FENCED)])
def test_a_readme_with_much_code_is_structured_unless_the_setting_says_otherwise(tmp_path, name, text):
    raw = text.encode()
    (tmp_path / name).write_bytes(gzip.compress(raw) if name.endswith(".gz") else raw)
    assert Files(str(tmp_path / name)).load()["domain"] == ["structured"]
    assert Files(str(tmp_path / name), domain="narrative").load()["domain"] == ["narrative"]
    few = text + "More prose here.\n" * 20
    (tmp_path / name).write_bytes(gzip.compress(few.encode()) if name.endswith(".gz") else few.encode())
    assert Files(str(tmp_path / name)).load()["domain"] == ["narrative"]


def test_a_plain_text_with_fences_stays_narrative_and_so_do_rows(tmp_path):
    (tmp_path / "a.txt").write_text(FENCED)
    (tmp_path / "b.jsonl").write_bytes(jsonl([{"text": FENCED}]))
    assert set(Files(str(tmp_path)).load()["domain"]) == {"narrative"}


def test_a_user_cannot_label_a_text_as_what_is_made_from_texts(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    assert set(ALL_DOMAINS) - set(DOMAINS) == {"mixed", "adversarial"}
    for domain in ("mixed", "adversarial"):
        with pytest.raises(ValueError, match=f"data.domain={domain} is not allowed"):
            Files(str(tmp_path), domain=domain)


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
        ("a.txt.gz", gzip.compress(b"", mtime=0), "empty"),
        ("a.jsonl.gz", gzip.compress(b"", mtime=0), "empty"),
        ("a.txt", b"caf\xe9", "not UTF-8"),
        ("a.txt.gz", gzip.compress(b"x" * 10_000, mtime=0)[:-12], "cannot be read"),
        ("a.txt.gz", b"not a gz", "cannot be read"),
        ("a.txt.gz", gzip.compress(b"abc" * 100, mtime=0)[:10] + b"\xff" * 40, "cannot be read"),
        ("a.jsonl.gz", gzip.compress(jsonl([{"text": "x" * 5000}]), mtime=0)[:-12], "cannot be read"),
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
