"""How many floating-point operations a run has spent on learning: measured, not estimated."""

import torch
from lightning.pytorch.callbacks import Callback
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count, shape_wrapper


def _forward(query, key, value, *args, out_shape=None, **kwargs) -> int:
    return sdpa_flop_count(query, key, value)


def _backward(grad_out, query, key, value, *args, out_shape=None, **kwargs) -> int:
    return sdpa_backward_flop_count(grad_out, query, key, value)


FORMULAS = dict(flop_registry) | {  # torch leaves out the attention of a CPU
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: shape_wrapper(_forward),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: shape_wrapper(_backward),
}


class Counter(TorchDispatchMode):
    """Adds up in ``total`` what runs while it is open, by torch's formulas; of attention all columns, masked or not.

    torch's own counter also tracks modules, and so breaks where a gradient is taken within a forward pass.
    """

    def __init__(self):
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if formula := FORMULAS.get(func._overloadpacket):
            self.total += formula(*args, **kwargs, out_val=out)
        return out


class Flops(Callback):
    """``train/flops``: all operations of the training batches so far, what is measured for them included.

    Validation is not counted. It is in the checkpoint, so a run that goes on counts on. Counting takes time.
    """

    def __init__(self):
        self.total, self.open = 0, None

    def state_dict(self) -> dict:
        return {"total": self.total}

    def load_state_dict(self, state: dict) -> None:
        self.total = int(state["total"])

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        self.open = Counter()
        self.open.__enter__()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self._close()
        pl_module.log("train/flops", torch.tensor(float(self.total), dtype=torch.float64))

    def on_exception(self, trainer, pl_module, exception) -> None:
        self._close()

    def _close(self) -> None:
        if self.open is not None:
            self.open.__exit__(None, None, None)
            self.total += int(self.open.total)
            self.open = None
