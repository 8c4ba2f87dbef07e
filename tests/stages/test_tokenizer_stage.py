import pytest

from megactx.data.files import Files
from megactx.data.tokenizer import load_tokenizer
from megactx.stages.tokenizer import TokenizerStage


@pytest.fixture
def source(tmp_path):
    for i in range(30):
        (tmp_path / f"{i}.txt").write_text(f"text number {i}: the quick brown fox jumps over the lazy dog. " * 5)
        (tmp_path / f"{i}.py").write_text(f"def f{i}(x):\n    return x + {i}\n" * 5)
    return Files(str(tmp_path))


def test_the_stage_saves_a_folder_and_says_what_it_measured_and_what_comes_next(source, tmp_path, capsys):
    folder = TokenizerStage(source, vocab_size=300).run(tmp_path / "run")
    said = capsys.readouterr().out
    tokenizer = load_tokenizer(folder)
    assert len(tokenizer) == 300 and str(folder) in said and "next: python train.py" in said
    assert "narrative" in said and "code" in said and "characters per token" in said
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["tokenizer"]


def test_a_second_run_replaces_the_first(source, tmp_path):
    TokenizerStage(source, vocab_size=300).run(tmp_path / "run")
    assert len(load_tokenizer(TokenizerStage(source, vocab_size=280).run(tmp_path / "run"))) == 280


def test_training_reads_no_more_than_it_was_asked_to(source, tmp_path):
    # One text only: far too little for 400 ids.
    assert len(load_tokenizer(TokenizerStage(source, vocab_size=400, sample_bytes=1).run(tmp_path / "run"))) < 400


@pytest.mark.parametrize(
    "settings, said", [(dict(vocab_size=100), "stage.vocab_size=100"), (dict(sample_bytes=0), "0")]
)
def test_bad_sizes_are_refused_by_name(source, settings, said):
    with pytest.raises(ValueError, match=said):
        TokenizerStage(source, **settings)
