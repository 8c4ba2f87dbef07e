import pytest
import torch
from metric_processes import BLOCKS, SPLIT, feed, process


@pytest.mark.slow
def test_two_processes_with_uneven_shares_give_every_figure_of_one_process_with_all(tmp_path):
    torch.multiprocessing.spawn(process, args=(str(tmp_path),), nprocs=2)
    whole, share = feed(range(BLOCKS)), feed(range(SPLIT))
    for rank in (0, 1):
        got = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert set(got) == set(whole)
        for name, value in whole.items():
            torch.testing.assert_close(got[name], value, rtol=1e-9, atol=1e-9, msg=f"{name} of process {rank}")
    assert {"GistGeometry: structured/diversity", "ReconstructionMetrics: code/reconstruction_top1"} <= set(whole)
    assert all(value.isfinite().all() for value in whole.values())
    assert not torch.equal(whole["GistMetrics: dnll"], share["GistMetrics: dnll"]), "one share alone says the same"
