"""A replay keeps what happened at each refocus, and its pictures show it."""

import pytest
import torch
from matplotlib.image import imread
from PIL import Image
from windows import K, small_base, tree_of

from megactx.focus import moves
from megactx.focus.allocator import FocusAllocator
from megactx.focus.pictures import animate_replay, plot_replay, plot_scores
from megactx.focus.replay import Replay, View
from megactx.memory import WorkingContext

REFOCUSES = 3


def scored(context) -> torch.Tensor:
    """Every legal edit is due: gists want to be expanded, siblings to be collapsed."""
    legal = moves(context, 8)
    score = torch.where(legal.expand, 0.9, 0.0)
    return torch.where(legal.first >= 0, -0.8, score)


@pytest.fixture(scope="module")
def session():
    """-> a replay of row 1, and the windows before and after, as they were."""
    tree = tree_of(small_base())
    context = WorkingContext.recency(tree, 60)
    allocator, replay, windows = FocusAllocator(protected=8, cooldown=0), Replay(row=1), [context.copy()]
    for _ in range(REFOCUSES):
        replay.refocus(allocator, context, scored(context), torch.tensor([0.5, 0.25]))
        windows.append(context.copy())
    return replay, windows


def drawn_in(colour: str, picture: torch.Tensor) -> int:
    """Pixels of a picture [height, width, 3], 0 .. 1, that have a colour."""
    rgb = torch.tensor([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    return int(((picture[..., :3] - rgb).abs().amax(-1) < 0.02).sum())


def test_a_replay_keeps_scores_edits_and_windows_of_its_row(session):
    replay, windows = session
    assert len(replay.steps) == REFOCUSES and len(replay.views) == REFOCUSES + 1
    for view, context in zip(replay.views, windows, strict=True):
        count = int(context.counts[1])
        assert torch.equal(view.start, context.starts()[1, :count]) and view.tokens == 97
        assert torch.equal(view.width, context.widths()[1, :count])
    for step, before in zip(replay.steps, windows, strict=False):
        assert torch.equal(step.score, scored(before)[1, : len(step.before.lod)])
        assert step.price == 0.25 and len(step.edits) > 0 and set(step.edits.row.tolist()) == {1}


def test_a_replay_makes_the_edits_of_the_allocator_and_returns_them(session):
    _, windows = session
    plain, kept = windows[0].copy(), windows[0].copy()
    expected = FocusAllocator(protected=8).refocus(plain, scored(plain))
    edits = Replay().refocus(FocusAllocator(protected=8), kept, scored(kept))
    assert torch.equal(edits.index, expected.index) and torch.equal(edits.row, expected.row)
    assert torch.equal(kept.lod, plain.lod) and torch.equal(kept.index, plain.index)


def test_what_is_kept_does_not_change_when_the_session_goes_on(session):
    context = session[1][0].copy()
    context.lod = context.lod.clone()
    view, lod = View.of(context, 0), context.lod[0, : int(context.counts[0])].clone()
    context.lod.zero_()
    assert torch.equal(view.lod, lod) and lod.any() and view.block_size == K


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


def test_what_cannot_be_drawn_or_kept_is_named(session, tmp_path):
    replay, windows = session
    with pytest.raises(ValueError, match=r"step=2 is not allowed: 0 to 1, .* of 3 refocuses"):
        plot_scores(tmp_path / "x.png", replay, step=2)
    with pytest.raises(ValueError, match=r"x\.png is not allowed: an animation is a \.gif"):
        animate_replay(tmp_path / "x.png", replay)
    with pytest.raises(ValueError, match="seconds=0 is not allowed: more than 0"):
        animate_replay(tmp_path / "x.gif", replay, seconds=0)
    context = windows[0].copy()
    with pytest.raises(ValueError, match="row=2 is not allowed: 0 to 1"):
        Replay(row=2).refocus(FocusAllocator(), context, torch.zeros(context.lod.shape))
    assert list(tmp_path.iterdir()) == []
