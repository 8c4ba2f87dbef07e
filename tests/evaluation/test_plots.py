import pytest
from block_scores import synthetic

from megactx.evaluation.plots import _points, offset_bins, plot_run


def size(path):
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    return int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")


def test_picture_is_drawn_from_rows_and_from_a_csv_with_gaps(tmp_path):
    rows = [{"step": i, "val/dnll": 1 / i, "val/recovery": 0.1 * i, "val/recovery_body": 0.05 * i} for i in range(1, 6)]
    plot_run(tmp_path / "rows.png", synthetic(), rows)
    csv = tmp_path / "metrics.csv"
    csv.write_text("step,train/loss,val/dnll,val/recovery\n1,0.5,,\n2,,0.4,0.1\n3,0.4,,\n4,,0.3,nan\n")
    plot_run(tmp_path / "csv.png", synthetic(), csv)
    assert size(tmp_path / "rows.png") == size(tmp_path / "csv.png") == (1400, 600)


def test_picture_without_a_training_curve(tmp_path):
    plot_run(tmp_path / "run.png", synthetic(horizon=1))
    assert size(tmp_path / "run.png") == (1400, 600)


def test_empty_cells_and_undefined_values_are_no_points():
    rows = [{"step": "1", "y": ""}, {"step": "2", "y": "0.5"}, {"step": "3", "y": "nan"}, {"step": "4"}]
    assert _points(rows, "step", "y") == ([2.0], [0.5])


@pytest.mark.parametrize("horizon", [1, 2, 5, 32, 33, 128])
def test_offset_bins_cover_every_offset_once(horizon):
    bins = offset_bins(horizon)
    assert [h for first, end in bins for h in range(first, end)] == list(range(horizon))
    assert bins[0] == (0, 1)
