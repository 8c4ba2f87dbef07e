from collections.abc import Callable
from dataclasses import replace

import torch

from megactx.memory import MegaContextTree
from megactx.runtime import Controller, Settings
from megactx.runtime.controller import decode
from megactx.runtime.sampling import Sampling
from megactx.runtime.session import end_ids

from . import BLOCK


class Session:
    """A real session with keys: it has taken up the text, reads the newest and what its keys and LensNet find, answers.

    Its window has as many entries as those of the others: ``budget`` and what stands around the text. At most three
    quarters of them are blocks that keys find. What it keeps are tokens; gists that it reads are not among them. Of a
    text that is like the one before, the gists of what has not changed are kept.

    Raises:
        ValueError: there is no GistNet, or no net of keys, for these models.
    """

    needs_models = True

    def __init__(self, models, keys=None):
        from megactx.parts.read import load_keys

        self.models = models if keys is None else replace(models, keys=load_keys(keys, models.base))
        for part in ("gistnet", "keys"):
            if getattr(self.models, part) is None:
                raise ValueError(f"--policies=session: these models have no {part}; allowed are models with both")
        self.models.keys.ready()
        self.stream = self.tree = None

    def keep(self, asked, budget):
        entries = budget + len(asked.begin) + len(asked.end)
        settings = Settings(entries, earn=True, keys=budget * 3 // 4 // BLOCK, newest=asked.newest)
        text, self.stream = torch.tensor([[*asked.begin, *asked.ids]]), None
        if self.tree is None:
            base, net = self.models.base, self.models.gistnet
            text = text.to(base.model.device)
            self.tree = MegaContextTree.from_tokens(text, net, base, keys=self.models.keys)
        else:
            self.tree = self.tree.edited(text)
        self.stream = Controller(self.models, settings).stream(tree=self.tree)
        self.stream.append(torch.tensor([asked.end]))
        self.stream.logits()
        shown, first = self.stream.shown, len(asked.begin)
        there = shown.index[0][shown.mask[0] & (shown.lod[0] == 0)] - first
        return sorted(there[(there >= 0) & (there < len(asked.ids))].tolist())

    def say(self, tokens: int, over: Callable[[str], bool]) -> str:
        """A greedy answer to what was kept last, until it is ``over``."""
        said, tokenizer, ends = [], self.models.base.tokenizer, end_ids(self.models.base)
        for (token,) in decode(self.stream, tokens, Sampling(), lambda row, token: token in ends):
            said.append(token)
            if over(tokenizer.decode(said, skip_special_tokens=True)):
                break
        return tokenizer.decode(said, skip_special_tokens=True)
