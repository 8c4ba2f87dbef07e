import torch

from megactx.lm.prefill import prefill
from megactx.memory import MegaContextTree
from megactx.memory.prediction import expected

from . import BLOCK, filled, near


class Foretold:
    """Raw blocks whose gist is nearest to the one that is foretold behind the question, with their neighbours; a
    quarter is the newest tokens.

    What comes next is foretold from the state of the base LM that has read the newest tokens and the question.

    Raises:
        ValueError: there is no readout for these models, or blocks have another size.
    """

    needs_models = True

    def __init__(self, models, keys=None):
        self.models = models
        if models.prediction is None or models.gistnet is None:
            raise ValueError(
                "--policies=foretold: these models have no readout of what comes next; train one with"
                " experiment=mega_prediction"
            )
        if models.gistnet.block_size != BLOCK:
            raise ValueError(f"--policies=foretold: block_size={models.gistnet.block_size}, allowed is {BLOCK}")

    def keep(self, asked, budget):
        base, net = self.models.base, self.models.gistnet
        if "tree" not in asked.shared:
            ids = torch.tensor([asked.ids], device=base.model.device)
            asked.shared["tree"] = MegaContextTree.from_tokens(ids, net, base, max_level=1)
        newest = max(0, min(budget, base.max_positions - len(asked.begin) - len(asked.end)))
        read = [*asked.begin, *asked.ids[len(asked.ids) - newest :], *asked.end]
        state = prefill(base, torch.tensor([read], device=base.model.device)).hidden[0, -1]
        order = [block for block, _ in expected(self.models.prediction, asked.shared["tree"], state, budget)]
        return filled(asked, budget, near(order, len(asked.blocks)), budget // 4)
