"""The parts that a stream shows beside its own history: other trees, opened, exchanged and dropped at any refocus."""

from collections.abc import Iterable

import torch

from megactx.memory import Composite, MegaContextTree, WorkingContext
from megactx.memory.composite import SLOTS, Part, cover
from megactx.memory.composite import slots as slots_of

from .events import views
from .part_files import OpenPart, Wanted, overruled


class ShownParts:
    """What of a ``Stream`` is about parts; ``parts`` are the open ones by slot, ``seen`` is what its windows are of."""

    def use(self, wanted: Iterable[Wanted], slots: dict[str, int] | None = None) -> None:
        """Show parts beside what is shown already; one of the same name takes the place of the one before. All or none.

        Args:
            slots: of names, where they are to stand; else behind those that are there.

        Raises:
            ValueError: a part cannot be opened, or does not fit; the window stays as it was.
        """
        if self.settings.attention == "mega":
            raise ValueError("attention=mega is not allowed with parts: its summaries are of one tree")
        found, opened, slots = dict(self.parts), [], slots or {}
        try:
            for one in wanted:
                opened.append(part := OpenPart(one, self.models, bool(self.settings.keys)))
                same = [slot for slot, other in found.items() if other.name == part.name]
                wish = [slots[part.name]] if slots.get(part.name) in range(SLOTS) else []
                free = [slot for slot in (*wish, *range(len(found), SLOTS), *range(SLOTS)) if slot not in found]
                if not same and not free:
                    raise ValueError(f"part {part.name}: there are {SLOTS} parts, no more are allowed")
                found[(same or free)[0]] = part
            self._compose(found)
        except BaseException:
            for part in opened:
                part.close()
            raise

    def drop(self, name: str) -> None:
        """Show a part no more.

        Raises:
            ValueError: there is none of this name.
        """
        slot = self._slot_of(name)
        self._compose({own: part for own, part in self.parts.items() if own != slot})

    def pin(self, name: str) -> None:
        """Show no newer version of a part than the one that is shown.

        Raises:
            ValueError: there is none of this name.
        """
        slot = self._slot_of(name)
        self._compose(self.parts | {slot: self.parts[slot].pin()})  # it wins over newer ones now

    def look(self) -> None:
        """Show newer versions of parts, where there are any; it costs microseconds where there are none."""
        found = {slot: part.newer() for slot, part in self.parts.items()}
        if any(found[slot] is not part for slot, part in self.parts.items()):
            try:
                self._compose(found)
            except ValueError as error:  # it has grown out of its share, say: what was shown is shown on
                for slot, part in self.parts.items():
                    if found[slot] is not part:
                        part.note = str(error)
                        found[slot].close()

    def _slot_of(self, name: str) -> int:
        for slot, part in self.parts.items():
            if part.name == name:
                return slot
        there = ", ".join(part.name for part in self.parts.values()) or "none"
        raise ValueError(f"part {name}: there is no part of this name, there is {there}")

    def _compose(self, found: dict[int, OpenPart]) -> None:
        """Show these parts from now on. What stays keeps its entries, what is new is shown as coarse as it must be."""
        found, old = dict(sorted(found.items())), self.parts
        ruled = overruled(found.values())
        shown = [
            Part(part.name, part.tree, slot, part.wanted.share, part.closed, ruled[part.name], part.licence)
            for slot, part in found.items()
            if int(part.tree.lengths[0]) > 0  # a part may be empty yet
        ]
        least = self.settings.least(self.block)
        seen = Composite(self.tree, shown, self.settings.budget, least) if shown else self.tree
        if shown:
            self.settings.check_parts(self.block, seen.spent)
        same = {slot for slot, part in found.items() if slot in old and old[slot].version == part.version}
        same = {slot for slot in same if old[slot].folder == found[slot].folder}
        before = {part.slot: part.overruled for part in getattr(self.seen, "parts", ()) if isinstance(part, Part)}
        same = {slot for slot in same if before.get(slot) == ruled[found[slot].name]}
        if self.context is not None:
            self.context = self._carried(seen, same)
        self.parts, self.seen, self.hidden, self.shown = found, seen, None, None
        for slot in {*old, *found} - same:
            width = slots_of(self.block)[0]
            self.focus.allocator.forget(slot * width, (slot + 1) * width, self.block)
        self.focus.mean_embeddings.forget()
        self.rebase.moved = []
        self._before = views(self.context) if self.observers else ()
        kept = [part.tree for part in found.values()]
        for part in old.values():
            if not any(part.tree is tree for tree in kept):
                part.close()

    def _carried(self, seen: MegaContextTree | Composite, same: set[int]) -> WorkingContext:
        """The window over other parts."""
        context, before = self.context, {}
        own = (context.lod[0, : int(context.counts[0])], context.index[0, : int(context.counts[0])])
        if isinstance(self.seen, Composite):
            *others, own = self.seen.segments(context)
            before = {part.slot: each for part, each in zip(self.seen.parts, others, strict=True)}
        if not isinstance(seen, Composite):
            return WorkingContext(seen, own[0][None], own[1][None], torch.tensor([len(own[0])]), context.budget)
        segments = []
        for part, cap in zip(seen.parts, seen.caps, strict=True):
            each = before.get(part.slot) if part.slot in same else None
            segments.append(cover(part, cap) if each is None or len(each[0]) > cap else each)
        if len(own[0]) > context.budget - seen.spent:
            own = seen.own_entries(context.budget - self.focus.reserve - seen.spent)
        return WorkingContext(seen, *seen.joined([*segments, own]), context.budget)

    def _trees(self) -> list[MegaContextTree]:
        """Those of the window: of the parts, and its own."""
        return self.seen.trees if isinstance(self.seen, Composite) else [self.tree]
