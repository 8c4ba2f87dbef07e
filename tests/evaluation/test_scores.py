import pytest
import torch
from block_scores import synthetic

from megactx.evaluation.scores import BlockScores


def test_scores_survive_saving_and_loading(tmp_path):
    scores = synthetic()
    scores.save(tmp_path / "folder" / "scores.safetensors")
    again = BlockScores.load(tmp_path / "folder" / "scores.safetensors")
    assert again.domain == scores.domain and again.block_hash() == scores.block_hash()
    for name, values in scores._per_offset().items():
        assert torch.equal(values, again._per_offset()[name]) and values.dtype == again._per_offset()[name].dtype
    assert sorted(path.name for path in (tmp_path / "folder").iterdir()) == ["scores.json", "scores.safetensors"]


def test_files_of_two_different_saves_are_refused(tmp_path):
    synthetic(blocks=20).save(tmp_path / "one")
    synthetic(blocks=20, first=64).save(tmp_path / "two")
    (tmp_path / "two.json").replace(tmp_path / "one.json")
    with pytest.raises(ValueError, match="different blocks"):
        BlockScores.load(tmp_path / "one")


def test_a_missing_or_damaged_file_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match="gone.safetensors"):
        BlockScores.load(tmp_path / "gone")
    synthetic().save(tmp_path / "half")
    (tmp_path / "half.safetensors").write_bytes((tmp_path / "half.safetensors").read_bytes()[:100])
    with pytest.raises(ValueError, match="half.safetensors"):
        BlockScores.load(tmp_path / "half")


def test_a_failed_save_leaves_the_old_file_and_no_rest(tmp_path):
    scores = synthetic()
    scores.save(tmp_path / "scores")
    before = (tmp_path / "scores.safetensors").read_bytes()
    scores.carriers["gistnet"] = "no tensor"
    with pytest.raises(AttributeError):
        scores.save(tmp_path / "scores")
    assert (tmp_path / "scores.safetensors").read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("change", ["document", "start", "horizon", "fewer"])
def test_block_hash_changes_with_any_block(change):
    scores = synthetic(blocks=30)
    document, start, horizon = scores.document.clone(), scores.start.clone(), scores.horizon
    rows = 30
    if change == "document":
        document[17] += 100
    elif change == "start":
        start[17] += 32
    elif change == "horizon":
        horizon -= 1
    else:
        rows = 29
    full, drop = scores.full[:rows, :horizon], scores.drop[:rows, :horizon]
    other = BlockScores(full, drop, {}, domain=scores.domain[:rows], document=document[:rows], start=start[:rows])
    assert other.block_hash() != scores.block_hash()
    assert len(scores.block_hash()) == 12


def test_block_hash_does_not_depend_on_the_order_in_which_processes_are_merged():
    one, two = synthetic(blocks=30), synthetic(blocks=30, first=3200)
    merged = BlockScores.concatenate([one, two])
    assert merged.block_hash() == BlockScores.concatenate([two, one]).block_hash()
    assert len(merged) == 60 and torch.equal(merged.carriers["gistnet"][30:], two.carriers["gistnet"])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinity_are_refused_by_name(value):
    scores = synthetic()
    scores.carriers["last token"][3, 2] = value
    with pytest.raises(ValueError, match="carriers/last token holds 1 values"):
        BlockScores(**vars(scores))


@pytest.mark.parametrize(
    "wrong, message",
    [
        (dict(drop=torch.zeros(5, 3)), r"drop has shape \[5, 3\]"),
        (dict(full=torch.zeros(0, 32)), "full has shape"),
        (dict(document=torch.zeros(40)), "document must be int64"),
        (dict(domain=["code"]), "1 domains for 40 blocks"),
        (dict(kl={"nobody": torch.zeros(40, 32)}), "'nobody'"),
        (dict(agree={"gistnet": torch.zeros(40, 32)}), "agree/gistnet has dtype"),
    ],
)
def test_wrong_shapes_types_and_names_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        BlockScores(**(vars(synthetic(blocks=40)) | wrong))


def test_parts_with_other_carriers_cannot_be_merged():
    one, two = synthetic(), synthetic()
    two.carriers.pop("last token")
    with pytest.raises(ValueError, match="last token"):
        BlockScores.concatenate([one, two])
    with pytest.raises(ValueError, match="no blocks"):
        BlockScores.concatenate([])
