import torch

from megactx.focus.keys import padded

from . import BLOCK, filled, near


class Keys:
    """Raw blocks whose learned key is most like the question's, with their neighbours; a quarter is the newest tokens.

    All keys are compared. Keys of the context are those that a tree of it keeps.

    Raises:
        ValueError: there is no net of keys for these models.
    """

    needs_models = True

    def __init__(self, models, keys=None):
        from megactx.parts.read import load_keys

        self.tokenizer, self.net = models.base.tokenizer, models.keys if keys is None else load_keys(keys, models.base)
        if self.net is None:
            raise ValueError(
                "--policies=keys: these models have no keys; train some (megactx.studies.keys), name --keys"
            )
        self.net.ready()

    def keep(self, asked, budget):
        whole = len(asked.ids) // BLOCK
        if "keys" not in asked.shared:
            asked.shared["keys"] = self.net.encode(torch.tensor(asked.ids[: whole * BLOCK]).view(-1, BLOCK))
        if not (questions := self.questions(asked)):
            return filled(asked, budget, [], 0)
        found = self.net.likeness(self.net(*padded(questions)), asked.shared["keys"]).amax(0)
        order = found.argsort(descending=True, stable=True)[:budget].tolist()
        return filled(asked, budget, near(order, len(asked.blocks)), budget // 4)

    def questions(self, asked):
        """Ids by which the keys are asked, of one question or several; none: nobody asks."""
        return [self.tokenizer(asked.question, add_special_tokens=False)["input_ids"]]
