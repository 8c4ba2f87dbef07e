"""The LM head on scored rows only, in chunks: no [rows, vocabulary] tensor outlives its chunk (method 3).

C students (branches of several carriers), M rows, D width, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .base import BaseLM

# fp32 logits of one chunk, rows x V x 4 bytes: on a CPU near the size of its last cache, on a GPU enough to fill it.
CHUNK_ELEMENTS = {"cpu": 2**21, "cuda": 2**26}
OBJECTIVES = ("kl", "delta_nll")


def score(
    base: BaseLM,
    students: Tensor,
    teacher: Tensor,
    targets: Tensor,
    objective: str = "kl",
    reference: BaseLM | None = None,
):
    """Compare students with the teacher on the same rows.

    Args:
        students: hidden states [C, M, D].
        teacher: hidden states [M, D] of the full context.
        targets: the true next tokens [M].
        objective: what the returned loss is: ``kl``, KL(P_full || P_student), or ``delta_nll``.
        reference: the teacher's base LM, if it has another head. The head of ``base`` then takes a gradient.

    Returns:
        ``(loss [C, M] with gradient, numbers)``; ``numbers`` is a dict without gradient: ``full`` [M] (teacher NLL),
        ``nll``, ``kl`` [C, M]. All in nats, fp32.
    """
    if objective not in OBJECTIVES:
        raise ValueError(f"objective={objective} is not known, allowed are {', '.join(OBJECTIVES)}")
    if reference is not None:
        return _with_trained_head(base, students, teacher, targets, objective, reference)
    if any(p.requires_grad for p in base.model.get_output_embeddings().parameters()):
        raise ValueError("the LM head must be frozen: its gradient is not computed by the packed pass")
    loss, full, nll, kl, _ = _Score.apply(students, teacher, targets, base, objective)
    return loss, {"full": full, "nll": nll, "kl": kl}


def _with_trained_head(base: BaseLM, students: Tensor, teacher: Tensor, targets: Tensor, objective: str, reference):
    """``score`` for a head that learns: one student at a time; backward computes its logits again."""
    with torch.no_grad():
        log_p = F.log_softmax(reference.logits(teacher).float(), dim=-1)  # [M, V]
        full = -log_p.gather(1, targets[:, None])[:, 0]

    def rows(student: Tensor) -> tuple[Tensor, ...]:
        log_q = F.log_softmax(base.logits(student).float(), dim=-1)
        nll = -log_q.gather(1, targets[:, None])[:, 0]
        kl = ((log_p - log_q) * log_p.exp()).sum(-1)
        return kl if objective == "kl" else nll - full, nll.detach(), kl.detach()

    found = [checkpoint(rows, student, use_reentrant=False) for student in students]
    loss, nll, kl = (torch.stack(values) for values in zip(*found, strict=True))
    return loss, {"full": full, "nll": nll, "kl": kl}


@torch.no_grad()
def score_exactly(base: BaseLM, students: Tensor, teacher: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """The numbers of ``score`` for a report, and ``agree`` bool [C, M]: the same best token.

    The head works in fp32: in bf16 the two best tokens are often equal.
    """
    weights = {name: p.float() for name, p in base.model.get_output_embeddings().named_parameters()}
    with torch.autocast(students.device.type, enabled=False):
        _, full, nll, kl, agree = _Score.apply(students.float(), teacher.float(), targets, base, "kl", weights, True)
    return {"full": full, "nll": nll, "kl": kl, "agree": agree}


@torch.no_grad()
def nll(base: BaseLM, hidden: Tensor, targets: Tensor) -> Tensor:
    """NLL of the true next tokens alone: hidden [M, D], targets [M] -> [M], in nats, fp32, without gradient."""
    out = hidden.new_empty(len(targets), dtype=torch.float32)
    size = max(1, CHUNK_ELEMENTS.get(hidden.device.type, 2**21) // base.vocab_size)
    for start in range(0, len(targets), size):
        part = slice(start, start + size)
        out[part] = F.cross_entropy(base.logits(hidden[part]).float(), targets[part], reduction="none")
    return out


class _Score(torch.autograd.Function):
    """Computes each row's gradient while its logits exist, so that backward needs neither logits nor a second pass.

    This is exact: a row's loss depends on that row's hidden state only, so d(sum_i w_i l_i)/dh_i = w_i dl_i/dh_i.
    """

    @staticmethod
    def forward(ctx, students, teacher, targets, base, objective, weights=None, top1=False):
        c, m, d = students.shape
        needs_grad = students.requires_grad
        gradient = torch.empty_like(students) if needs_grad else None
        full = students.new_empty(m, dtype=torch.float32)
        nll, kl = (students.new_empty(c, m, dtype=torch.float32) for _ in range(2))
        agree = torch.empty(c, m, dtype=torch.bool, device=students.device)
        size = max(1, CHUNK_ELEMENTS.get(students.device.type, 2**21) // base.vocab_size)
        # All chunks use the same memory: on a CPU new pages cost a third of this function.
        space = students.new_empty(4, min(size, m), base.vocab_size, dtype=torch.float32)
        for start in range(0, m, size):
            part = slice(start, start + size)
            target = targets[part]
            log_p, p, log_q, work = space[:, : len(target)]  # each [m, V]
            _log_softmax(work.copy_(base.logits(teacher[part], weights)), log_p)
            torch.exp(log_p, out=p)
            full[part] = -log_p.gather(1, target[:, None])[:, 0]
            best = log_p.argmax(dim=-1) if top1 else None
            for i in range(c):
                with torch.set_grad_enabled(needs_grad):
                    row = students[i, part].detach().requires_grad_(needs_grad)
                    logits = base.logits(row, weights)
                _log_softmax(work.copy_(logits.detach()), log_q)
                nll[i, part] = -log_q.gather(1, target[:, None])[:, 0]
                # 7 times faster than F.kl_div on a CPU
                kl[i, part] = torch.sub(log_p, log_q, out=work).mul_(p).sum(dim=-1)
                if top1:
                    agree[i, part] = log_q.argmax(dim=-1) == best
                if needs_grad:
                    # dKL/dlogits = q - p, dNLL/dlogits = q - onehot; autograd takes it through the model's own head.
                    slope = log_q.exp_()
                    if objective == "kl":
                        slope -= p
                    else:
                        slope.scatter_add_(1, target[:, None], slope.new_full((len(target), 1), -1.0))
                    gradient[i, part] = torch.autograd.grad(logits, row, slope.to(logits.dtype))[0]
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(full, nll, kl, agree)
        loss = kl.clone() if objective == "kl" else nll - full
        return loss, full, nll, kl, agree

    @staticmethod
    def backward(ctx, grad_loss, *_):
        (gradient,) = ctx.saved_tensors
        return (gradient * grad_loss[..., None]).to(gradient.dtype), None, None, None, None, None, None


def _log_softmax(logits: Tensor, out: Tensor) -> None:
    """``F.log_softmax`` over the last axis, into memory that is there."""
    torch.ops.aten._log_softmax.out(logits, -1, False, out=out)
