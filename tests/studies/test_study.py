"""What all studies share."""

import importlib

import pytest

from megactx.framework.bar import SHORTER
from megactx.studies.study import Options, command


def test_a_study_says_by_which_of_its_options_it_is_made_shorter():
    def options(given: Options) -> None:
        given.number("count", 5, "things")
        given.number("blocks", 7, "others")
        given.number("seed", 0, "of both", least=0)

    def study(args):
        assert SHORTER.get() == "lower --count, --blocks"
        yield from ()
        raise ValueError("seen")

    assert command("some", "A study.", options, study)([]) == 2


@pytest.mark.parametrize(
    ("study", "options", "said"),
    [
        ("base_card", ["nobody"], "MODEL=nobody: there is no such"),
        ("gist_card", ["nobody"], "MODEL=nobody: there is no such"),
        ("keys", ["nobody"], "MODEL=nobody: there is no such"),
        ("mega_attention", ["nobody"], "MODEL=nobody: there is no such"),
        ("prediction", ["nobody"], "MODEL=nobody: there is no such"),
        ("presets", ["nobody"], "MODEL=nobody: there is no such"),
        ("qa", ["nobody"], "MODEL=nobody: there is no such"),
        ("curation", ["nobody"], "MODEL=nobody: there is no such"),
        ("length", ["--model", "nobody"], "--model=nobody: there is no such"),
        ("ruler", ["--model", "nobody"], "--model=nobody: there is no such"),
    ],
)
def test_a_model_that_is_not_there_is_told_as_it_was_given(study, options, said, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    assert importlib.import_module(f"megactx.studies.{study}").main(options) == 2
    assert f"megactx: {said}" in capsys.readouterr().err
