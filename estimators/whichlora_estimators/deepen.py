"""Lay a few of the layers that are alike, and put the rest in their place on the tape.

What a layer allocates, frees and launches, the next one does with tensors of its own. So of a stack of layers that repeats
after `period` of them, the tape lays the first one, two periods, and what comes after (`Tape.layers`); `deepen` copies the
first of both periods as often as layers were left out, every copy with storages of its own. A storage is known by the
section of the tape that made it, counted from that section's end: "the last but two of the forward pass one layer before".
That both periods read the same in these words, size for size and launch for launch, is checked; where they do not, or where
something outside of layers frees what they made in an order that is not theirs, all layers have to be laid.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import groupby, pairwise
from operator import add

from .tape import Mark, Tape

_LAYER = re.compile(r"(?:(\w+) )?layer (\d+)")
#: The first number in a parameter's name is that of its layer.
_LAYER_OF_NAME = re.compile(r"(.*?\.)(\d+)(\..*)")
Name = tuple[int, int, int]  # segment, turn, and how many layers on


class NotAlike(Exception):
    """Layers do not repeat as they should: lay all of them."""


def laid_name(tape: Tape, name: str) -> str:
    """Return the name that a parameter has in the layer that was laid for its own: another one's where that was left out."""
    before, layer, behind = _parts_of_name(name)
    left = next((count for stack, count in tape.left_out.items() if name.startswith(stack)), 0)
    if not tape.period < layer <= tape.period + left * tape.period:
        return name
    return f"{before}{1 + (layer - 1) % tape.period}{behind}"


@lru_cache(maxsize=2**14)
def _parts_of_name(name: str) -> tuple[str, int, str]:
    """Return the number of the layer in a parameter's name (-1: none), and what is around it."""
    found = _LAYER_OF_NAME.match(name)
    return ("", -1, name) if found is None else (found[1], int(found[2]), found[3])


@dataclass(slots=True, eq=False)
class _Section:
    """What lies between two cuts of the tape: a part of a layer of some stack, or of none.

    `place` counts the layers that were laid; `turn` tells sections of one layer in one segment apart. `ends` says where
    the section's storages end on the deep tape, then those of its copies.
    """

    first: Mark
    last: Mark
    segment: int
    stack: str | None = None
    place: int = 0
    turn: int = 0
    ends: list[int] = field(default_factory=lambda: [0])

    @property
    def copied(self) -> bool:
        """Say whether layers that were left out are like this one's."""
        return len(self.ends) > 1


@dataclass(frozen=True, slots=True)
class _Text:
    """The events of a layer's section: whose storage each is of, by number, and how far from that one's end.

    Numbers count twice: even ones are allocations, odd ones frees.
    """

    names: dict[Name | None, _Section]
    numbers: list[int]
    distances: list[int]


def deepen(tape: Tape, segments: Sequence[Mark]) -> dict[int, Mark]:
    """Put in the layers that were left out, given where segments begin; returns all cuts anew, by the old ones' ids.

    Raises NotAlike.
    """
    deep = _Deep(tape, segments)
    sizes, tags, events, kernels = tape.sizes, tape.tags, tape.events, tape.kernels
    marked, marks, moved = {id(mark) for mark in tape.marks}, [], {}
    tape.sizes, tape.tags, tape.events, tape.kernels = [], [], [], []
    for section, copy in deep.order:
        first, last = section.first, section.last
        moved[id(first)] = mark = tape.here(deep.label(section, copy))
        if id(first) in marked:
            marks.append(mark)
        tape.sizes += sizes[first.storage : last.storage]
        tape.tags += tags[first.storage : last.storage]
        tape.kernels += kernels[first.kernel : last.kernel]
        tape.events += deep.events(section, copy)
    if len(tape.events) != sum(map(deep.times.__getitem__, events)):
        raise NotAlike  # a layer frees what another one made that is not next to it
    moved[id(tape.cuts[-1])] = tape.here(tape.cuts[-1].label)
    tape.marks, tape.cuts = marks, list(moved.values())
    tape.once = {
        end + index - home.last.storage for index in tape.once for home in [deep.homes[index]] for end in home.ends
    }
    return moved


class _Deep:
    """The sections of a tape in their order on the deep one, and how events of theirs read there."""

    def __init__(self, tape: Tape, segments: Sequence[Mark]) -> None:
        self.tape, self.period, self.shallow = tape, tape.period, tape.events
        self.at: dict[tuple[int, int, str | None, int], _Section] = {}
        self.sections = list(self._cut({id(mark) for mark in segments}))
        if any(position > self.sections[0].last.event for position in tape.emptied):
            raise NotAlike
        self.homes = [section for section in self.sections for _ in range(section.last.storage - section.first.storage)]
        self.order = list(self._ordered())
        self._number()
        self.texts: dict[int, _Text] = {}
        for section in self.sections:
            if section.stack is not None and 0 < section.place <= 2 * self.period:
                self._check(section)

    def _cut(self, segments: set[int]) -> Iterator[_Section]:
        """Cut the tape into sections."""
        segment = -1
        for first, last in pairwise(self.tape.cuts):
            segment += id(first) in segments
            section = _Section(first, last, segment)
            found = _LAYER.match(first.label)
            if found is not None and (found[1] or "") in self.tape.left_out:
                self._place(section, found[1] or "", int(found[2]))
            yield section

    def _place(self, section: _Section, stack: str, layer: int) -> None:
        left = self.tape.left_out[stack]
        section.stack, section.place = stack, layer if layer <= self.period else layer - left * self.period
        while self._key(section, section.place) in self.at:
            section.turn += 1
        self.at[self._key(section, section.place)] = section
        if 0 < section.place <= self.period:
            section.ends = [0] * (left + 1)

    def _key(self, section: _Section, place: int) -> tuple[int, int, str | None, int]:
        return section.segment, section.turn, section.stack, place

    def _ordered(self) -> Iterator[tuple[_Section, int]]:
        """Go through sections as they come on the deep tape, with the numbers of copies (0: the section itself)."""
        index = 0
        while index < len(self.sections):
            section = self.sections[index]
            if not section.copied:
                yield section, 0
                index += 1
                continue
            run, before = self.sections[index : index + self.period], self.sections[index - 1]
            upwards = before.place == 0
            places = [(section.stack, place) for place in range(1, self.period + 1)]
            if [(each.stack, each.place) for each in run] != (places if upwards else places[::-1]):
                raise NotAlike
            if before.stack != section.stack or before.place not in (0, self.period + 1):
                raise NotAlike
            copies = range(len(section.ends))
            for copy in copies if upwards else reversed(copies):
                yield from ((each, copy) for each in run)
            index += self.period

    def _number(self) -> None:
        """Give the storages of the deep tape numbers, and find those of the shallow one by their old ones."""
        total = 0
        for section, copy in self.order:
            total += section.last.storage - section.first.storage
            section.ends[copy] = total
        numbers = [home.ends[0] + index - home.last.storage for index, home in enumerate(self.homes)]
        times = [len(home.ends) for home in self.homes]
        # an event indexes these like a storage's number, and a free (~number) finds its place from the end
        self.moved = numbers + [~number for number in reversed(numbers)]
        self.times = times + times[::-1]

    def layer(self, section: _Section, copy: int) -> int:
        """Return the number of a layer in the whole model."""
        assert section.stack is not None
        skipped = copy if section.place <= self.period else self.tape.left_out[section.stack]
        return section.place + skipped * self.period

    def label(self, section: _Section, copy: int) -> str:
        """Return the label of a section."""
        label = section.first.label
        return label if not copy else _LAYER.sub(lambda m: m[0].replace(m[2], str(self.layer(section, copy))), label, 1)

    def _end(self, home: _Section, layer: int) -> int:
        """Return where the storages end that a layer of the whole model made in a section like this one."""
        assert home.stack is not None
        place, copy = layer - self.tape.left_out[home.stack] * self.period, 0
        if layer <= self.period:
            place = layer
        elif place <= self.period:
            place, copy = 1 + (layer - 1) % self.period, (layer - 1) // self.period
        try:
            return self.at[self._key(home, place)].ends[copy]
        except KeyError:
            raise NotAlike from None

    def _text(self, section: _Section) -> _Text:
        if id(section) not in self.texts:
            self.texts[id(section)] = self._read(section)
        return self.texts[id(section)]

    def _read(self, section: _Section) -> _Text:
        names: dict[Name | None, _Section] = {}
        known: dict[_Section, tuple[int, int | None]] = {}
        numbers, distances = [], []
        homes, moved = self.homes, self.moved
        for event in self.shallow[section.first.event : section.last.event]:
            index = event if event >= 0 else ~event
            home = homes[index]
            if home not in known:
                name = self._name(home, section)
                names.setdefault(name, home)
                known[home] = 2 * list(names).index(name), None if name is None else home.last.storage
            number, end = known[home]
            distance = moved[index] if end is None else index - end
            numbers.append(number if event >= 0 else number + 1)
            distances.append(distance if event >= 0 else -distance)
        return _Text(names, numbers, distances)

    def _name(self, home: _Section, section: _Section) -> Name | None:
        """Name the section that made a storage as seen from one that frees it; None outside of the layers of its stack."""
        if home.stack != section.stack:
            if home.copied:
                raise NotAlike  # one stack frees what another one made
            return None
        checked = 0 < section.place <= 2 * self.period
        if not checked and (home.place <= self.period) != (section.place <= self.period):
            raise NotAlike  # a distance over all that was left out says nothing
        return home.segment, home.turn, home.place - section.place

    def _check(self, section: _Section) -> None:
        """Compare a section of the first period with that of the second one, or the other way round."""
        step = self.period if section.copied else -self.period
        other = self.at.get(self._key(section, section.place + step))
        if other is None:
            raise NotAlike
        if section.copied and self._content(section) != self._content(other):
            raise NotAlike

    def _content(self, section: _Section) -> tuple[object, ...]:
        tape, first, last, text = self.tape, section.first, section.last, self._text(section)
        storages, kernels = slice(first.storage, last.storage), slice(first.kernel, last.kernel)
        words = text.numbers, text.distances
        return list(text.names), words, tape.sizes[storages], tape.tags[storages], tape.kernels[kernels]

    def events(self, section: _Section, copy: int) -> list[int]:
        """Return what happens in a section, or in a copy of it, in numbers of the deep tape."""
        if section.stack is None:
            return self._outside(section)
        layer, text = self.layer(section, copy), self._text(section)
        ends: list[int] = []
        for name, home in text.names.items():
            end = 0 if name is None else self._end(home, layer + name[2])
            ends += [end, ~end]
        return list(map(add, map(ends.__getitem__, text.numbers), text.distances))

    def _outside(self, section: _Section) -> list[int]:
        """Return what happens outside of layers; where storages of all layers are freed in a row, those of copies are too."""
        events = self.shallow[section.first.event : section.last.event]
        if all(times == 1 for times in map(self.times.__getitem__, events)):
            return [self.moved[event] for event in events]
        found: list[int] = []
        for are_frees, group in groupby(events, (0).__gt__):
            run = list(group)
            found += self._freed(run) if are_frees else [self.moved[event] for event in run]
        return found

    def _freed(self, frees: list[int]) -> list[int]:
        """Free in a row, whose order does not matter, what copies made along with what the first period did.

        The second period's has to be among it.
        """
        names = {self._name_of(free, 0) for free in frees}
        found = []
        for free in frees:
            home, index = self.homes[~free], ~free
            found.append(self.moved[free])
            if home.copied and self._name_of(free, self.period) not in names:
                raise NotAlike
            found += [~(end + index - home.last.storage) for end in home.ends[1:]]
        return found

    def _name_of(self, free: int, further: int) -> tuple[object, ...]:
        home = self.homes[~free]
        return *self._key(home, home.place + further), ~free - home.last.storage
