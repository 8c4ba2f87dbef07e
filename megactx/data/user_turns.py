"""Where what a user says begins and ends: around it in a chat template, and among the newest ids of a history."""

from dataclasses import dataclass, field

from .tokenizer import TextEncoder

TOLD, ANSWERED = "\ue000told\ue000", "\ue000answered\ue000"  # stand for what is said; private-use characters


def around(tokenizer) -> tuple[tuple[str, str], tuple[str, str]]:
    """What a chat template has before and behind what a user says: at the beginning of a talk, without BOS, and behind
    what the model has said.

    Raises:
        ValueError: the template does not show what is said, or cannot be rendered.
    """
    first, bos = _rendered(tokenizer, [{"role": "user", "content": TOLD}]), tokenizer.bos_token or ""
    first = _parted(first.removeprefix(bos) if bos else first)
    whole = [
        {"role": "user", "content": "."},
        {"role": "assistant", "content": ANSWERED},
        {"role": "user", "content": TOLD},
    ]
    later = _rendered(tokenizer, whole)
    if ANSWERED not in later:
        raise ValueError("chat_template: it does not show the model's answer")
    return first, _parted(later.partition(ANSWERED)[2])


def _rendered(tokenizer, messages: list[dict]) -> str:
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # it is a program of whoever made the tokenizer
        raise ValueError(f"chat_template: it cannot be rendered ({error})") from error


def _parted(rendered: str) -> tuple[str, str]:
    if rendered.count(TOLD) != 1:
        raise ValueError("chat_template: it does not show once what the user says")
    before, _, after = rendered.partition(TOLD)
    return before, after


@dataclass(frozen=True)
class UserTurns:
    """Ids right before and right behind all that a user says; none where a tokenizer has no chat template, or one
    without special tokens of its own, which a text might have too. The tokenizer tells where lines end."""

    opening: tuple[int, ...] = ()
    closing: tuple[int, ...] = ()
    tokenizer: object = field(default=None, repr=False, compare=False)

    @classmethod
    def of(cls, tokenizer) -> "UserTurns":
        """Those of a tokenizer."""
        nothing = cls(tokenizer=tokenizer)
        if not getattr(tokenizer, "chat_template", None):
            return nothing
        try:
            first, later = around(tokenizer)
        except ValueError:  # whoever talks by this template is told so there
            return nothing
        encoder = TextEncoder(tokenizer)
        before = encoder(later[0], begins=False, plain=False)
        closing = encoder(later[1], begins=False, plain=False)
        same = 0
        for one, other in zip(reversed(encoder.opening(first[0])), reversed(before), strict=False):
            if one != other:
                break
            same += 1
        opening = before[len(before) - same :]
        special = {*tokenizer.all_special_ids, *(i for i, t in tokenizer.added_tokens_decoder.items() if t.special)}
        if not special.intersection(opening) or not special.intersection(closing):
            return nothing
        return cls(tuple(opening), tuple(closing), tokenizer)

    def place(self, ids: list[int]) -> tuple[int, int] | None:
        """Where what the user said last begins among the newest ids of a history, 0 if before them, and where it ends;
        ``None``: no user's turn ends there."""
        if (end := _last(ids, self.closing)) is None:
            return None
        begin = _last(ids[:end], self.opening)
        return 0 if begin is None else begin + len(self.opening), end

    def last_line(self, ids: list[int], least: int) -> list[int]:
        """What stands behind the last end of a line that has at least so many tokens behind it; all without one."""
        for at in range(len(ids) - least, 0, -1) if self.tokenizer is not None else ():
            if "\n" in self.tokenizer.decode([ids[at - 1]]):
                return ids[at:]
        return ids


def _last(ids: list[int], part: tuple[int, ...]) -> int | None:
    """Where a part stands last."""
    for at in range(len(ids) - len(part), -1, -1) if part else ():
        if ids[at] == part[0] and tuple(ids[at : at + len(part)]) == part:
            return at
    return None
