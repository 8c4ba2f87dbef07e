"""A loss of compressors, and what it reads.

    batch, prefill -> Context -> Loss -> a loss per net [C], and numbers to log

C nets, B documents, N blocks per document.
"""

import inspect
from collections.abc import Iterable

from torch import Tensor

from megactx.framework.config.types import NonNegative
from megactx.gist.carrier import Compressor, KVSlots, SoftTokens
from megactx.gist.parts import find
from megactx.lm import BaseLM
from megactx.lm.prefill import Prefill


class Context:
    """A batch that the base LM has read, and the nets that learn from it. No carrier is made twice.

    Args:
        base: the frozen base LM, or one with adapters, whose keys and values ``prefill`` then holds.
        nets: name -> net, all of one block size. The training is about the first.
        prefill: of the documents.
        batch: of ``SpanBatches``.
        horizon: H, tokens.
    """

    def __init__(self, base: BaseLM, nets: dict[str, Compressor], prefill: Prefill, batch: dict, horizon: int):
        self.base, self.nets, self.prefill, self.batch, self.horizon = base, nets, prefill, batch, horizon
        self._made: dict[tuple, tuple] = {}

    @property
    def main(self) -> str:
        return next(iter(self.nets))

    @property
    def block(self) -> int:
        return self.nets[self.main].block_size

    def carriers(self, starts: Tensor, lod: int = 1) -> list[SoftTokens | KVSlots]:
        """Of each net: carriers of the blocks at starts [B, N], or with ``lod`` 2 of spans of K^2 tokens."""
        return [self.carrier(name, starts, lod) for name in self.nets]

    def carrier(self, name: str, starts: Tensor, lod: int = 1) -> SoftTokens | KVSlots:
        """Carriers of one net. Only one and the same tensor counts as the same starts: to compare would be to wait."""
        key = (name, id(starts), lod)
        if key not in self._made:
            made = self.nets[name].compress_level(self.base, self.prefill, starts, lod)
            self._made[key] = (starts, made)  # with the tensor, so that its id stays its own
        return self._made[key][1]

    def kept(self, name: str, make) -> Tensor:
        """A tensor that several losses read: ``make`` makes it for the first, and its name finds it for the others."""
        key = ("kept", name)
        if key not in self._made:
            self._made[key] = (make(),)
        return self._made[key][0]


class Loss:
    """One term of the sum that compressors learn from.

    A subclass stands in a file of ``megactx/gist/losses``, called as the file in CamelCase, and says

        needs         entries of the batch that it reads
        all_vectors   all nets must make vectors, not keys and values
        main_vectors  the first net must
        judges        the best checkpoint is chosen by its ``held_out`` too, not by single blocks alone
        windows       it reads windows of its own, in which every entry sees all before it, whatever the run's attention

    Args:
        weight: its share of the sum, 0 or more; 0 leaves it out.

    Raises:
        ValueError: a setting that is not allowed; the message names it.
    """

    needs: tuple[str, ...] = ()
    all_vectors = main_vectors = judges = windows = False

    def __init__(self, weight: NonNegative):
        self.weight = weight

    @property
    def name(self) -> str:
        """That of its file."""
        return type(self).__module__.rpartition(".")[2]

    @property
    def setting(self) -> str:
        """Where a user sets it."""
        return f"loss.{self.name}"

    def __call__(self, context: Context) -> tuple[Tensor, dict[str, Tensor | float]]:
        """-> (the loss of each net that it trains [C] with gradient, numbers to log under ``train/``)."""
        raise NotImplementedError

    def check(self, nets: dict[str, Compressor]) -> None:
        """See that these nets can learn from it.

        Raises:
            ValueError: they cannot.
        """
        if not self.weight or not (self.all_vectors or self.main_vectors):
            return
        for name, net in list(nets.items())[: None if self.all_vectors else 1]:
            if not net.makes_one_vector:
                makes = "several vectors of a block" if net.makes_vectors else "keys and values, not vectors"
                raise ValueError(
                    f"{self.setting}.weight={self.weight} is not allowed with {name}, which makes {makes}: set it to 0"
                )

    def check_data(self, datamodule, nets: dict[str, Compressor]) -> None:
        """See that the data has what this loss needs. The data is set up already.

        Raises:
            ValueError: it has not; the message names the setting.
        """

    def flops(self, batch: dict, work) -> Tensor | float:
        """Floating-point operations of the rows that it passes and scores; ``work`` (``stages.work.Work``) counts them.

        Those of the nets come from ``encoded``. A loss that makes no pass of its own has none.
        """
        return 0.0

    def typical(self, data: dict, block: int) -> dict[str, Tensor]:
        """Entries of a batch that data of these settings draws for this loss alone, as ``flops`` reads them.

        For those that the stage does not know of itself.
        """
        return {}

    def held_out(self, base: BaseLM, net: Compressor, datamodule) -> dict[str, Tensor]:
        """What a validation logs of a net under ``val/NAME/``; ``nll`` is what ``judges`` says that it is judged by."""
        return {}

    def told(self, base: BaseLM, net: Compressor, datamodule) -> str:
        """What the end of a run says of a net; empty for nothing."""
        return ""

    def encoded(self, batch: dict, block: int) -> dict[str, int | Tensor]:
        """Blocks that each net encodes for it. Losses that share carriers call them by one name."""
        return {name: batch[name].numel() for name in self.needs if name == "block_starts"}

    def state(self) -> dict:
        """What a checkpoint stores of this loss."""
        return {}

    def load_state(self, state: dict) -> None:
        """Take what ``state`` gave."""

    def numbers(self, context: Context, losses: Tensor, dnll: Tensor) -> dict[str, Tensor]:
        """The usual numbers to log: loss and dNLL of the first net, dNLL of the others."""
        prefix = "" if self.name == "block" else f"{self.name}/"
        found = {f"{prefix}loss": losses[0].detach(), f"{prefix}dnll": dnll[0].detach()}
        rest = zip(list(context.nets)[1:], dnll[1:], strict=True)
        return found | {f"{prefix}{name}/dnll": value.detach() for name, value in rest}


def loss_kind(name: str) -> type[Loss]:
    """The class of a file of ``megactx/gist/losses``.

    Raises:
        ValueError: there is none.
    """
    from megactx.gist import losses

    return find(losses, name, "loss")


def build_losses(settings: dict[str, dict], nets: dict[str, Compressor]) -> list[Loss]:
    """Losses by name, in their order.

    Args:
        settings: name of a file of ``megactx/gist/losses`` -> its arguments.
        nets: that learn from them.

    Raises:
        ValueError: an unknown name or argument, or nets that cannot learn from one.
    """
    found = []
    for name, given in settings.items():
        kind = loss_kind(name)
        known = inspect.signature(kind).parameters
        if unknown := sorted(set(given) - set(known)):
            raise ValueError(f"loss.{name}.{unknown[0]}: there is no such setting, there is {', '.join(known)}")
        found.append(kind(**given))
        found[-1].check(nets)
    if not any(loss.weight for loss in found):
        raise ValueError("loss: all weights are 0, so nothing would be learned; set one, such as loss.block.weight=1")
    return found


def needed(losses: Iterable[Loss]) -> set[str]:
    """Entries of a batch that losses with a weight read."""
    return {name for loss in losses if loss.weight for name in loss.needs}
