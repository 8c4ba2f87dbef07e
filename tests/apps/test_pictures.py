"""Pictures of a replay show what happened at each refocus."""

import pytest
import torch
from matplotlib.image import imread
from PIL import Image
from windows import REFOCUSES, replayed

from megactx.apps.pictures import animate_replay, plot_replay, plot_scores
from megactx.focus.replay import Replay


@pytest.fixture(scope="module")
def session():
    return replayed()


def drawn_in(colour: str, picture: torch.Tensor) -> int:
    """Pixels of a picture [height, width, 3], 0 .. 1, that have a colour."""
    rgb = torch.tensor([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    return int(((picture[..., :3] - rgb).abs().amax(-1) < 0.02).sum())


def test_scores_before_and_after_a_refocus_are_a_png_in_the_colours_of_the_levels(session, tmp_path):
    plot_scores(tmp_path / "scores.png", session[0], step=1)
    picture = torch.tensor(imread(tmp_path / "scores.png"))
    assert picture.shape[:2] == (500, 1400)
    for colour in ("#009E73", "#0072B2"):
        assert drawn_in(colour, picture) > 500


def test_the_strips_are_a_png_with_a_row_per_refocus(session, tmp_path):
    replay, _ = session
    one = Replay(1, replay.steps[:1])
    for name, drawn in (("one", one), ("all", replay)):
        plot_replay(tmp_path / f"{name}.png", drawn)
    one, every = (torch.tensor(imread(tmp_path / f"{name}.png")) for name in ("one", "all"))
    assert every.shape[1] == 1400 and every.shape[0] - one.shape[0] == 50 * (REFOCUSES - 1)
    for colour in ("#009E73", "#0072B2"):
        assert drawn_in(colour, every) > drawn_in(colour, one) > 500


def test_the_animation_is_a_gif_with_a_frame_per_refocus_and_one_of_the_end(session, tmp_path):
    animate_replay(tmp_path / "replay.gif", session[0], seconds=0.5)
    with Image.open(tmp_path / "replay.gif") as picture:
        assert picture.format == "GIF" and picture.n_frames == REFOCUSES + 1
        for frame in range(picture.n_frames):
            picture.seek(frame)
            assert picture.info["duration"] == 500
            pixels = torch.frombuffer(bytearray(picture.convert("RGB").tobytes()), dtype=torch.uint8)
            assert drawn_in("#0072B2", pixels.view(picture.height, picture.width, 3) / 255) > 500


def test_an_empty_replay_is_refused(tmp_path):
    for draw in (plot_scores, plot_replay, animate_replay):
        with pytest.raises(ValueError, match="an empty replay cannot be drawn"):
            draw(tmp_path / "x.gif", Replay())
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_drawn_is_named(session, tmp_path):
    replay, _ = session
    with pytest.raises(ValueError, match=r"step=2 is not allowed: 0 to 1, .* of 3 refocuses"):
        plot_scores(tmp_path / "x.png", replay, step=2)
    with pytest.raises(ValueError, match=r"x\.png is not allowed: an animation is a \.gif"):
        animate_replay(tmp_path / "x.png", replay)
    with pytest.raises(ValueError, match="seconds=0 is not allowed: more than 0"):
        animate_replay(tmp_path / "x.gif", replay, seconds=0)
    assert list(tmp_path.iterdir()) == []
