"""``python plain_sgd.py OVERRIDE...``: train.py with plain SGD; what it saw is in ``seen.pt`` of the run folder.

``gradients``: of the GistNet, per step, before clipping. ``dnll``: of the batches of the first process. And a name of
each batch, process by process, is in ``batches-RANK.txt``.
"""

import hashlib
import sys
from pathlib import Path

import torch

from megactx.framework import app
from megactx.gist.losses.block import Block
from megactx.stages.gist import GistStage

seen, batches = {"gradients": [], "dnll": []}, []
per_net = Block.per_net


def configure_optimizers(self):
    return torch.optim.SGD(self.nets.parameters(), lr=0.05)


def on_before_optimizer_step(self, optimizer):
    seen["gradients"].append({name: p.grad.clone() for name, p in self.gistnet.named_parameters()})


def kept(self, context):
    losses, dnll = per_net(self, context)
    seen["dnll"].append(dnll[0].detach())
    batches.append(hashlib.sha256(context.batch["ids"].numpy().tobytes()).hexdigest()[:16])
    return losses, dnll


def on_fit_end(self):
    folder = Path(self.trainer.default_root_dir)
    (folder / f"batches-{self.trainer.global_rank}.txt").write_text("\n".join(batches))
    if self.trainer.is_global_zero:
        torch.save(seen, folder / "seen.pt")


for hook in (configure_optimizers, on_before_optimizer_step, on_fit_end):
    setattr(GistStage, hook.__name__, hook)
Block.per_net = kept
sys.exit(app.run())
