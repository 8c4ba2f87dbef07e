"""What all studies share."""

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
