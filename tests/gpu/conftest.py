"""Every check of this folder runs on the CPU too, so that it is right on the day that it first meets a card."""

import pytest
import torch

no_card = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=no_card)])
def device(request):
    return request.param
