"""Several devices that share the layers of a frozen base."""

import copy

from lightning.pytorch.strategies import DDPStrategy
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard


class ShardedBase(DDPStrategy):
    """DDP for what a stage trains, FSDP2 (``fully_shard``) for the layers of its frozen base.

    So what is trained stays whole on every device: Muon needs matrices, clipping needs whole gradients, and checkpoints
    are those of one device. Lightning's own FSDP strategy shards the trained part too, and writes its own checkpoints.
    Embeddings and head are not shared: they are used outside of a forward pass of the model. A validation has the base
    whole on every device: there they need not make the same number of passes, which a shared layer would wait for.

    Raises:
        ValueError: the stage has no base, or trains it.
    """

    def __init__(self, **settings):
        super().__init__(**settings)
        self.shared, self.plain = [], []

    def setup(self, trainer) -> None:
        base = dict(self.lightning_module.named_children()).get("base")
        if base is None or any(p.requires_grad for p in base.parameters()):
            raise ValueError("trainer=fsdp: it shares a frozen base, and this stage has none; use trainer=ddp")
        mesh = init_device_mesh(self.root_device.type, (self.world_size,))
        decoder = base.model.get_decoder()
        self.shared, same = decoder.layers, {id(config): config for config in (base.config, decoder.config)}
        for layer in self.shared:  # before the stage moves to its device: never more than a layer too much is there
            self.plain.append(copy.deepcopy(layer, dict(same)).to("meta"))
            fully_shard(layer, mesh=mesh, reshard_after_forward=True)
        super().setup(trainer)

    def _setup_model(self, model):
        # They are alike on all devices or shared on purpose, and none has a gradient: nothing for DDP to do.
        model._ddp_params_and_buffers_to_ignore = [f"base.{name}" for name in model.base.state_dict()] + [
            f"base.{name}" for name, _ in model.base.named_buffers()
        ]
        return super()._setup_model(model)

    def on_validation_start(self) -> None:
        for layer in self.shared:
            layer.set_reshard_after_forward(False)
            layer.unshard()

    def on_validation_end(self) -> None:
        for layer in self.shared:
            layer.set_reshard_after_forward(True)
            layer.reshard()

    def gather(self) -> None:
        """Behind the training: every process gets the base back as it was, and no longer needs the others."""
        for index, layer in enumerate(self.shared):
            whole = {name: parameter.full_tensor() for name, parameter in layer.named_parameters()}
            self.plain[index].load_state_dict(whole, assign=True)
            self.shared[index] = self.plain[index].requires_grad_(False)
