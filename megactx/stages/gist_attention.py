"""What a gist stage can read under MegaAttention, and what it refuses to read plainly beside it."""

from megactx.gist import GistNet
from megactx.memory.trunk import check_room


def check_attention(stage) -> None:
    """See that all that a ``GistStage`` reads can be read under its attention.

    Raises:
        ValueError: the first setting with which it cannot.
    """
    h, attention = stage.hparams, stage.attention
    if attention.kind == "plain":
        return
    levels = 2 if stage.loss_settings("level2").get("weight") else 1
    check_room(attention, stage.main.block_size**levels, h.horizon)
    beside = f"is not allowed with attention.kind={attention.kind}"
    for loss in stage.weighted:
        if loss.windows:
            raise ValueError(
                f"{loss.setting}.weight={loss.weight} {beside}: that loss reads windows of its own, under plain"
                " attention; set it to 0"
            )
    if not (isinstance(stage.main, GistNet) and stage.main.makes_one_vector):
        raise ValueError(
            f"compressor={next(iter(stage.nets))} {beside}: summaries are gists of a GistNet with one vector of a block"
        )
    for name, net in stage.nets.items():
        if net.needs_hidden:
            raise ValueError(
                f"attention.kind={attention.kind} is not allowed with {name}, which reads states of the base LM under"
                " plain attention; take one that reads embeddings, such as gistnet.input=embedding"
            )
    # What documents are read as follows from the GistNet that learns, so nothing made from it may outlive a step.
    if gigabytes := (h.prefills or {}).get("gigabytes"):
        raise ValueError(f"stage.prefills.gigabytes={gigabytes} {beside}: documents are read anew in each step; set 0")
    if h.keep_controls:
        raise ValueError(
            f"stage.keep_controls=true {beside}: what a control learns follows from the GistNet beside it; set it to"
            " false"
        )
    if history := h.evaluate.get("history"):
        raise ValueError(f"stage.evaluate.history={history} {beside}: histories are read under plain attention; set 0")
