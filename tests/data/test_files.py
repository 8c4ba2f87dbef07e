import gzip
import json
import logging
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset

from megactx.data.documents import tokenised
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
        ("a.jsonl", jsonl([{"text": "x"}, {"text": None}]), "row 1 .* has no text"),
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


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_bytes(jsonl(rows))


@pytest.mark.parametrize("ending", [".jsonl", ".parquet"])
@pytest.mark.parametrize("name", ["a[1]", "a*", "a?", "x::a1", "a[!2]"])
def test_a_literal_path_with_pattern_characters_reads_that_file(tmp_path, name, ending):
    write(tmp_path / f"a1{ending}", [{"text": "ONE"}])
    write(tmp_path / f"{name}{ending}", [{"text": "two"}])
    assert texts(tmp_path) == ["ONE", "two"]
    assert texts(tmp_path / f"{name}{ending}") == ["two"]
    (tmp_path / "b[1]").mkdir()
    (tmp_path / f"{name}{ending}").rename(tmp_path / "b[1]" / f"{name}{ending}")
    assert texts(tmp_path / "b[1]") == ["two"]


def test_a_folder_with_brackets_on_the_way_of_a_glob_means_itself(tmp_path):
    for folder, text in (("c1", "ONE"), ("c[1]", "two")):
        (tmp_path / folder / "d*").mkdir(parents=True)
        write(tmp_path / folder / "d*" / "a.jsonl", [{"text": text}])
    assert texts(tmp_path / "c[1]" / "*" / "*.jsonl") == ["two"]
    assert texts(tmp_path / "c[1]" / "**" / "*.jsonl") == ["two"]
    assert texts(tmp_path / "c[12]" / "*" / "*.jsonl") == ["ONE"]  # no such folder: a pattern


def test_rows_are_rows_under_either_name_of_their_format(tmp_path):
    write(tmp_path / "a.jsonl", [{"text": "one"}, {"text": "two"}])
    (tmp_path / "a.jsonl").rename(tmp_path / "a.ndjson")
    assert texts(tmp_path) == texts(tmp_path / "a.ndjson") == ["one", "two"]


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone")
    assert texts(tmp_path / "a.txt") == ["one"]


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet", "a.txt"])
def test_a_changed_file_of_the_same_size_and_time_gives_the_new_text(tmp_path, tiny_tokenizer, name):
    def tokens():
        (ids,) = tokenised(Files(str(tmp_path / name)), tiny_tokenizer)["input_ids"]
        return tiny_tokenizer.decode(ids)

    for text in ("old", "new"):
        if name == "a.txt":
            (tmp_path / name).write_text(text)
        else:
            write(tmp_path / name, [{"text": text}])
        os.utime(tmp_path / name, (10**9, 10**9))
        assert texts(tmp_path / name) == [text]
        assert tokens() == text


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(jsonl([{"text": "one"}, {"text": "two"}]))
    documents = Files(str(tmp_path / "a.jsonl")).documents()
    next(documents)
    (tmp_path / "a.jsonl").write_bytes(jsonl([{"text": "other"}]))
    with pytest.raises(ValueError, match="a.jsonl: the file was changed while it was read"):
        list(documents)


@pytest.mark.parametrize("ending", [".jsonl", ".parquet"])
def test_columns_that_nobody_asked_for_do_not_stop_the_load(tmp_path, ending):
    write(tmp_path / f"a{ending}", [{"text": "one", "meta": None, "id": 1}, {"text": "two", "meta": None, "id": 2}])
    write(tmp_path / f"b{ending}", [{"text": "three", "meta": "x", "id": "x1", "more": [1]}])
    rows = Files(str(tmp_path)).load()
    assert rows["text"] == ["one", "two", "three"]
    assert rows["source"] == [f"a{ending}#0", f"a{ending}#1", f"b{ending}#0"]


def test_rows_of_one_file_may_differ_in_what_else_they_hold(tmp_path):
    (tmp_path / "a.jsonl").write_text(
        '{"text":"one","id":1}\n\n{"id":"x1","text":"two","meta":{"a":[1]}}\r\n{"text":"3"}'
    )
    assert Files(str(tmp_path)).load()["text"] == ["one", "two", "3"]


def test_text_domain_and_source_are_strings_before_anything_is_joined(tmp_path):
    table = pa.table(
        {
            "text": pa.array(["large"], pa.large_string()),
            "domain": pa.array(["code"]).dictionary_encode(),
            "source": pa.array([{"url": "u", "line": 3}]),
        }
    )
    pq.write_table(table, tmp_path / "a.parquet")
    write(tmp_path / "b.parquet", [{"text": "number", "source": 7}])
    write(tmp_path / "c.jsonl", [{"text": "row", "source": {"url": "u"}}, {"text": "none", "source": None}])
    (tmp_path / "d.txt").write_text("whole")
    rows = Files(str(tmp_path)).load()
    found = dict(zip(rows["text"], zip(rows["domain"], rows["source"], strict=True), strict=True))
    assert found == {
        "large": ("code", '{"url": "u", "line": 3}'),
        "number": ("narrative", "7"),
        "row": ("narrative", '{"url": "u"}'),
        "none": ("narrative", "c.jsonl#1"),
        "whole": ("narrative", str(tmp_path / "d.txt")),
    }
    assert {str(feature.dtype) for feature in rows.features.values()} == {"string"}


@pytest.mark.parametrize(
    "rows, said",
    [
        ([{"text": "x"}, {"text": 3}], "b.jsonl: row 1 .* holds int 3, not text"),
        ([{"text": "x"}, {"text": None}], "b.jsonl: row 1 .* has no text"),
        ([{"text": "x"}, {"body": "x"}], "b.jsonl: row 1 .* has no column data.text_column=text, it has .*body"),
        ([{"text": "x"}, {"text": "x", "domain": "poetry"}], "b.jsonl: row 1 .*: domain=poetry is not allowed"),
        ([{"text": "x"}, ["x"]], "b.jsonl: row 1 holds list .*; a row is an object"),
        ([{"text": "x"}, {"text": "\ud800"}], "b.jsonl: row 1 .* has half of a surrogate pair"),
    ],
)
def test_a_message_about_a_row_names_its_file_and_the_row_in_it(tmp_path, rows, said):
    (tmp_path / "a.jsonl").write_bytes(jsonl([{"text": "x"}] * 3))
    (tmp_path / "b.jsonl").write_bytes(jsonl(rows))
    with pytest.raises(ValueError, match=said):
        Files(str(tmp_path)).load()


def test_a_file_whose_name_begins_with_a_tilde_is_that_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("~notes.txt", "~root"):
        (tmp_path / name).write_text(name)
        assert texts(name) == [name]


def test_a_column_that_is_there_twice_is_refused_by_name(tmp_path):
    table = pa.table([pa.array(["x"]), pa.array(["y"])], names=["text", "text"])
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="a.parquet: it has the column text 2 times"):
        Files(str(tmp_path / "a.parquet")).load()


def test_no_file_is_left_out_for_its_name(tmp_path):
    names = ["THE COMMUNIST MANIFESTO.txt", "MANIFEST.md", ".hidden.txt", "b.TXT"]
    for name in names:
        (tmp_path / name).write_text(name)
    assert texts(tmp_path) == sorted(names)


def test_files_behind_a_link_are_read_once(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "a.txt").write_text("linked")
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "link").symlink_to(tmp_path / "there")
    (tmp_path / "there" / "back").symlink_to(tmp_path / "there")
    assert texts(tmp_path / "here") == ["linked"]


def test_a_link_that_leads_nowhere_is_refused_by_name(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nothing")
    with pytest.raises(ValueError, match="gone.txt"):
        Files(str(tmp_path))


def test_what_a_folder_or_a_glob_leaves_out_is_said(tmp_path, caplog):
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "b.pdf").write_bytes(b"%PDF")
    (tmp_path / "c").mkdir()
    (tmp_path / "d.jsonl").write_text("\n")
    assert texts(tmp_path) == ["x"]
    assert ".pdf (1)" in caplog.text and "d.jsonl: the file is empty; left out" in caplog.text
    caplog.clear()
    assert texts(tmp_path / "[ac]*") == ["x"]
    assert f"it matches folders, which are left out: {tmp_path / 'c'}" in caplog.text
