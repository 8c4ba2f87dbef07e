import errno
import hashlib
import json
import os
from pathlib import Path

import pytest
from datasets import Dataset
from hydra.utils import instantiate
from omegaconf import OmegaConf

from megactx.data.embedded import Embedded
from megactx.data.files import DOMAINS, Files
from megactx.data.hub import Hub
from megactx.data.mixture import Mixture
from megactx.framework.errors import RunFailed, verdict

CONFIGS = Path(__file__).parents[2] / "configs" / "data"


@pytest.fixture(scope="module")
def embedded():
    return Embedded()


@pytest.mark.slow
def test_the_embedded_corpus_has_enough_long_documents_of_every_domain(embedded):
    rows = embedded.load()
    assert set(rows.column_names) == {"text", "domain", "source"}
    for domain in DOMAINS:
        lengths = [len(text) for text, d in zip(rows["text"], rows["domain"], strict=True) if d == domain]
        assert sum(length > 3500 for length in lengths) >= 150, domain  # about 1,000 tokens
        assert 3e6 < sum(lengths) < 9.5e6, domain


@pytest.mark.slow
def test_the_embedded_corpus_has_no_tests_and_no_text_in_two_domains(embedded):
    rows = embedded.load()
    for package in ("torch", "transformers"):
        sources = [
            {s for s, d in zip(rows["source"], rows["domain"], strict=True) if d == domain and s.startswith(package)}
            for domain in DOMAINS
        ]
        assert len(set.union(*sources)) == sum(map(len, sources))
    paths = [path for path, _ in embedded.files()]
    assert len(paths) == len(set(paths))
    for path in paths:
        assert not {"test", "tests", "testing", "idle_test", "site-packages"} & set(path.split("/")), path
        assert not Path(path).name.startswith("test_"), path


@pytest.mark.slow
def test_the_embedded_corpus_is_the_same_every_time(embedded):
    small = [Embedded(megabytes=0.2) for _ in range(2)]
    assert small[0].load()[:] == small[1].load()[:]
    assert small[0].files() == small[1].files()
    assert small[0].fingerprint() == small[1].fingerprint() != embedded.fingerprint()


@pytest.mark.slow
def test_the_file_list_holds_the_hash_of_every_file(embedded, tmp_path):
    embedded.write_list(tmp_path / "files.sha256")
    listed = dict(line.split("  ", 1)[::-1] for line in (tmp_path / "files.sha256").read_text().splitlines())
    assert listed == dict(embedded.files())
    path = Path(json.__file__).parent / "decoder.py"
    listed_json = [name for name in listed if name.startswith("python/")]
    assert listed_json
    if "python/json/decoder.py" in listed:
        assert listed["python/json/decoder.py"] == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.slow
def test_the_file_list_needs_no_second_walk(embedded, monkeypatch):
    embedded.load()
    monkeypatch.setattr("megactx.data.embedded._candidates", None)
    assert Embedded().files() == embedded.files()


def test_a_size_that_is_not_above_zero_is_refused():
    with pytest.raises(ValueError, match="megabytes=0"):
        Embedded(megabytes=0)


@pytest.fixture
def folder(tmp_path):
    rows = [{"content": f"text {i} " * 20} for i in range(10)] + [{"content": "short"}]
    Dataset.from_list(rows).to_parquet(tmp_path / "hub" / "train.parquet")
    return str(tmp_path / "hub")


@pytest.mark.parametrize("streaming", [True, False])
def test_a_hub_source_reads_a_local_folder(folder, streaming):
    rows = Hub(folder, text_column="content", domain="code", streaming=streaming, max_documents=4).load()
    assert rows["domain"] == ["code"] * 4
    assert rows["text"][3] == "text 3 " * 20
    assert rows["source"][3] == f"{folder}#3"


def test_short_rows_of_a_hub_source_are_dropped_or_joined(folder):
    assert len(Hub(folder, text_column="content", min_characters=50).load()) == 10
    joined = Hub(folder, text_column="content", min_characters=300, short_rows="join").load()
    assert len(joined) == 3 and all(len(text) >= 300 for text in joined["text"])


@pytest.mark.parametrize(
    "settings, said",
    [
        (dict(text_column="text"), "data.text_column=text.*content"),
        (dict(text_column="content", split="nowhere"), "split=nowhere.*cannot be reached or read"),
        (dict(text_column="content", min_characters=10**6), "data.min_characters=1000000"),
        (dict(text_column="content", domain="poetry"), "data.domain=poetry is not allowed"),
        (dict(text_column="content", max_documents=0), "data.max_documents=0"),
        (dict(text_column="content", short_rows="keep"), "data.short_rows=keep is not allowed: drop or join"),
    ],
)
def test_a_hub_source_refuses_a_bad_setting_by_name(folder, settings, said):
    with pytest.raises(ValueError, match=said):
        Hub(folder, **settings).load()


CONFLICTS = [
    [{"text": "one", "id": 1, "meta": None}, {"text": "two", "id": 2, "meta": None}],
    [{"text": "three", "id": "x1", "meta": "x", "more": [1]}],
]


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet"])
def test_columns_of_a_hub_that_nobody_asked_for_may_have_any_types(tmp_path, kind, streaming):
    (tmp_path / "hub").mkdir()
    for name, rows in zip("ab", CONFLICTS, strict=True):
        path = tmp_path / "hub" / f"{name}.{kind}"
        if kind == "parquet":
            Dataset.from_list(rows).to_parquet(path)
        else:
            path.write_text(json.dumps(rows) if kind == "json" else "".join(f"{json.dumps(row)}\n" for row in rows))
    found = Hub(str(tmp_path / "hub"), streaming=streaming).load()
    assert found["text"] == ["one", "two", "three"] and found["source"][2].endswith("#2")
    with pytest.raises(ValueError, match="data.text_column=nothing: .*id.*meta.*text"):
        Hub(str(tmp_path / "hub"), streaming=streaming, text_column="nothing").load()


@pytest.mark.parametrize("streaming", [True, False])
@pytest.mark.parametrize(
    "name, content, texts",
    [
        ("a.csv", "text,id\n7,1\n8,2\n", ["7", "8"]),
        ("a.csv", "text,id\n007,1\n1.50,2\n", ["007", "1.50"]),
        ("a.csv", "text,id\nNA,1\nnull,2\nword,3\n", ["NA", "null", "word"]),
        ("a.csv", "text\n" + "7\n" * 10_001 + "word\n", ["7"] * 10_001 + ["word"]),  # two pieces
        ("a.tsv", "text\tid\n7\t1\n", ["7"]),
        ("a.json", '[{"text": "2020-01-01"},\n{"text": "007"}]', ["2020-01-01", "007"]),
        ("a.json", '{"text": "2020-01-01",\n"id": 1}', ["2020-01-01"]),
    ],
    ids=["numbers", "zeros", "words for nothing", "pieces", "tsv", "dates", "one object"],
)
def test_text_of_a_hub_that_looks_like_a_number_a_date_or_nothing_is_text(tmp_path, name, content, texts, streaming):
    (tmp_path / name).write_text(content)
    source = Hub(str(tmp_path), streaming=streaming, max_documents=20_000)
    assert source.load()["text"][:] == texts
    assert [row["text"] for row in source._rows(streaming)] == texts


def test_an_empty_cell_of_a_hub_is_left_out_and_said(tmp_path, caplog):
    (tmp_path / "a.csv").write_text("text,id\none,1\n,2\n")
    assert Hub(str(tmp_path)).load()["text"] == ["one"]
    assert "1 rows have no text and are left out, the first is row 1" in caplog.text


@pytest.mark.parametrize(
    "content, said", [('[{"text": "one"},\n3]', r"row 1 \(from 0\) is no object"), ("[\n{", "cannot be read as json")]
)
def test_a_message_about_an_array_of_a_hub_names_its_file(tmp_path, content, said):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(ValueError, match=f"a.json:? {said}"):
        Hub(str(tmp_path)).load()


def test_one_file_of_a_hub_may_change_the_type_of_a_column_in_the_middle(tmp_path):
    (tmp_path / "hub").mkdir()
    lines = [{"text": "word " * 20_000, "id": i if i < 150 else f"x{i}"} for i in range(160)]  # beyond 10 MB
    (tmp_path / "hub" / "a.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    assert len(Hub(str(tmp_path / "hub")).load()) == 160


def test_the_features_that_a_hub_says_it_has_do_not_stop_the_choice_of_a_column(tmp_path):
    (tmp_path / "hub").mkdir()
    Dataset.from_list(CONFLICTS[0]).to_parquet(tmp_path / "hub" / "train.parquet")
    features = "".join(f"  - name: {name}\n    dtype: {kind}\n" for name, kind in (("text", "string"), ("id", "int64")))
    (tmp_path / "hub" / "README.md").write_text(f"---\ndataset_info:\n  features:\n{features}---\n")
    assert Hub(str(tmp_path / "hub")).load()["text"] == ["one", "two"]


@pytest.mark.parametrize(
    "read, left", [("train.jsonl", "more.jsonl"), ("a.jsonl", "b.txt"), ("a.jsonl", ".hidden.jsonl")]
)
def test_files_that_a_hub_layout_leaves_out_are_said(tmp_path, caplog, read, left):
    (tmp_path / read).write_text('{"text": "one"}\n')
    (tmp_path / left).write_text('{"text": "two"}\n')
    (tmp_path / "README.md").write_text("about")
    assert Hub(str(tmp_path)).load()["text"] == ["one"]
    assert f"files that are of no split are left out: {tmp_path / left};" in caplog.text
    assert "README.md" not in caplog.text.partition("left out")[2]


@pytest.mark.parametrize("line, said", [("{", "cannot be read as json"), ("[1]", "is no object")])
def test_a_message_about_a_row_of_a_hub_names_its_file_and_the_row_in_it(tmp_path, line, said):
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n')
    (tmp_path / "b.jsonl").write_text('{"text": "two"}\n' + line + "\n")
    with pytest.raises(ValueError, match=rf"b.jsonl: row 1 \(from 0\) {said}"):
        Hub(str(tmp_path)).load()


def test_a_null_among_the_rows_of_a_hub_is_left_out_and_said(tmp_path, caplog):
    rows = [{"text": "one"}, {"text": None}, {"text": "three"}]
    Dataset.from_list(rows).to_parquet(tmp_path / "hub" / "train.parquet")
    assert Hub(str(tmp_path / "hub")).load()["text"] == ["one", "three"]
    assert "1 rows have no text and are left out, the first is row 1" in caplog.text


@pytest.mark.parametrize("streaming", [True, False])
def test_a_changed_folder_of_the_same_size_and_time_gives_the_new_text(tmp_path, streaming):
    fingerprints = set()
    for text in ("old", "new"):
        Dataset.from_list([{"text": text}]).to_parquet(tmp_path / "hub" / "train.parquet")
        os.utime(tmp_path / "hub" / "train.parquet", (10**9, 10**9))
        source = Hub(str(tmp_path / "hub"), streaming=streaming)
        assert source.load()["text"] == [text]
        fingerprints.add(source.fingerprint())
    assert len(fingerprints) == 2


def test_a_local_folder_that_would_be_taken_for_a_pattern_is_refused(tmp_path):
    for name in ("hub1", "hub[1]"):
        Dataset.from_list([{"text": name}]).to_parquet(tmp_path / name / "train.parquet")
    with pytest.raises(ValueError, match="for a pattern; rename it"):
        Hub(str(tmp_path / "hub[1]")).load()


def test_a_full_disk_under_a_hub_source_is_told_as_a_failed_run(folder, monkeypatch):
    def full(*args, **settings):
        try:
            raise OSError(errno.ENOSPC, "No space left on device", "/data/cache")
        except OSError as error:
            raise RuntimeError("An error occurred while generating the dataset") from error

    monkeypatch.setattr("datasets.load_dataset", full)
    with pytest.raises(RunFailed) as failed:
        Hub(folder, text_column="content").load()
    code, message = verdict(failed.value)
    assert code == 3 and "/data/cache" in message and "HF_HOME" in message


def test_a_data_set_that_cannot_be_reached_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match="data.name=.*cannot be reached"):
        Hub(str(tmp_path / "nothing")).load()
    with pytest.raises(ValueError, match="data.name is not set"):
        Hub(None)


def test_a_mixture_labels_each_source_with_its_domain(tmp_path):
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(name)
    sources = {"code": Files(str(tmp_path / "a.txt")), "structured": Files(str(tmp_path / "b.txt"))}
    mixture = Mixture(sources)
    rows = mixture.load()
    assert sorted(zip(rows["text"], rows["domain"], strict=True)) == [("a.txt", "code"), ("b.txt", "structured")]
    assert mixture.fingerprint() != Mixture({"code": sources["structured"]}).fingerprint()


@pytest.mark.parametrize("sources, said", [({}, "sources is empty"), ({"poetry": None}, "domain=poetry")])
def test_a_mixture_refuses_unknown_domains_and_nothing(sources, said):
    with pytest.raises(ValueError, match=said):
        Mixture(sources)


@pytest.mark.parametrize("name", ["embedded", "files", "hub", "wiki_code_json"])
def test_every_data_config_builds_its_source_and_explains_every_key(name, tmp_path):
    (tmp_path / "a.txt").write_text("x")
    config = OmegaConf.create({"data": OmegaConf.load(CONFIGS / f"{name}.yaml"), "preset": {"megabytes": 1.0}})
    for key in {"path", "name"} & set(config.data):
        config.data[key] = str(tmp_path)
    source = instantiate(config.data.source)
    assert len(source.fingerprint()) == 16
    assert set(config.data.weights) == set(DOMAINS)
    assert {"min_tokens", "max_tokens", "workers"} <= set(config.data)
    lines = (CONFIGS / f"{name}.yaml").read_text().splitlines()
    assert all("  # " in line or line.startswith("# ") or line.rstrip().endswith(":") for line in lines)


@pytest.mark.parametrize("name, said", [("files", "data.path is not set"), ("hub", "data.name is not set")])
def test_a_data_config_without_its_place_names_the_setting(name, said):
    config = OmegaConf.create({"data": OmegaConf.load(CONFIGS / f"{name}.yaml")})
    with pytest.raises(Exception, match=said):
        instantiate(config.data.source)
