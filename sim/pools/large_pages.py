"""Large pages, each split into small pages of one kind."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from sim.errors import IntegrityError
from sim.pools.block_pool import OutOfBlocks


class LargePages:
    """Memory in equal large pages, each of which is split into small pages of one kind while one of them is used.

    A large page is as large as the least common multiple of the small ones (Jenga, SOSP 2025). A request gets a
    small page in a large one that it opened and has pages in, else it opens a new large page, else it takes any small
    page of its kind. Small page p of a kind that fits n times into a large page is number p % n of large page p // n.
    """

    def __init__(self, num_slots: int, sizes: Sequence[int]) -> None:
        self.sizes = list(sizes)
        self.size = math.lcm(*sizes)
        self.splits = [self.size // size for size in sizes]
        self.num_large = num_slots // self.size
        self.free = list(range(self.num_large - 1, -1, -1))
        self.loose = 0
        """Slots in large pages that are split, and not in a small page that is used."""
        self.vacant: list[dict[int, list[int]]] = [{} for _ in sizes]
        """By kind: small pages that are free in each large page of it that has any."""

    def fits(self, needs: Sequence[int], own: Sequence[Iterable[int]] = (), spare: int = 0) -> bool:
        """Whether so many small pages of each kind can be had, with `spare` large pages left over.

        `own` are the large pages that the request opened and has pages in, by kind.
        """
        large = len(self.free) - spare
        if large >= sum(
            [-(-need // split) for need, split in zip(needs, self.splits, strict=True) if need > 0]
        ):
            return True  # without those that are split already
        for kind, need in enumerate(needs):
            vacant = self.vacant[kind]
            if own:
                need -= sum([len(vacant.get(page, ())) for page in own[kind]])
            if need <= 0:
                continue
            opened = min(large, -(-need // self.splits[kind]))
            if opened > 0:
                large -= opened
                need -= opened * self.splits[kind]
            if need > 0:
                others = vacant if not own else vacant.keys() - set(own[kind])
                if need > sum([len(vacant[page]) for page in others]):
                    return False
        return large >= 0

    def lasts(self, rows: int, kinds: Sequence[int], own: Sequence[Iterable[int]]) -> bool:
        """Whether a request can have so many rows of a small page of each of these kinds, one row after the other."""
        large = len(self.free)
        near = [sum([len(self.vacant[kind].get(page, ())) for page in own[kind]]) for kind in kinds]
        far = [sum(map(len, self.vacant[kind].values())) - near[at] for at, kind in enumerate(kinds)]
        for _ in range(rows):
            for at, kind in enumerate(kinds):
                if near[at]:
                    near[at] -= 1
                elif large:
                    large -= 1
                    near[at] = self.splits[kind] - 1
                elif far[at]:
                    far[at] -= 1
                else:
                    return False
        return True

    def take(self, kind: int, count: int, own: dict[int, int]) -> list[int]:
        """So many small pages for a request, counted in `own` by the large pages that it opens. Raises OutOfBlocks."""
        vacant, split = self.vacant[kind], self.splits[kind]
        if split == 1:
            return self.take_whole(count)
        taken: list[int] = []
        while len(taken) < count:
            large = next((page for page in reversed(own) if page in vacant), None)
            if large is None and self.free:
                large = self.free.pop()
                vacant[large] = list(range((large + 1) * split - 1, large * split - 1, -1))
                self.loose += self.size
                own[large] = 0
            if large is None:
                large = next(iter(vacant), None)
            if large is None:
                self.give(kind, taken, own)
                raise OutOfBlocks(f"asked for {count} pages of kind {kind}, {len(taken)} can be had")
            pages = vacant[large]
            some = pages[: -(count - len(taken)) - 1 : -1]
            del pages[-len(some) :]
            if not pages:
                del vacant[large]
            if large in own:
                own[large] += len(some)
            taken += some
            self.loose -= len(some) * self.sizes[kind]
        return taken

    def take_whole(self, count: int) -> list[int]:
        """So many large pages, each of which is a small page of a kind. Raises OutOfBlocks and takes none."""
        free = self.free
        if count > len(free):
            raise OutOfBlocks(f"asked for {count} large pages, {len(free)} are free")
        if not count:
            return []
        pages = free[: -count - 1 : -1]
        del free[-count:]
        return pages

    def give(self, kind: int, pages: Iterable[int], own: dict[int, int]) -> None:
        """Take a request's small pages back; a large page without any in use is free for all kinds."""
        vacant, split = self.vacant[kind], self.splits[kind]
        if split == 1:
            self.free += pages
            return
        for page in pages:
            large = page // split
            if large in own:
                own[large] -= 1
                if not own[large]:
                    del own[large]  # somebody else may open it
            rest = vacant.setdefault(large, [])
            rest.append(page)
            self.loose += self.sizes[kind]
            if len(rest) == split:
                del vacant[large]
                self.free.append(large)
                self.loose -= self.size

    def check_integrity(self, tables: Sequence[Iterable[int]]) -> None:
        """Compare with the small pages in use, by kind. Raises IntegrityError with what is wrong."""
        split_into: dict[int, int] = {}
        loose = 0
        for kind, used in enumerate(tables):
            pages = list(used)
            if len(set(pages)) != len(pages):
                raise IntegrityError(
                    f"pages of kind {kind}: distinct({len(set(pages))}) != used({len(pages)})"
                )
            large = {page // self.splits[kind] for page in pages}
            vacant = self.vacant[kind]
            known = [page for rest in vacant.values() for page in rest]
            if set(known) & set(pages) or len(known) + len(pages) != len(large) * self.splits[kind]:
                raise IntegrityError(
                    f"pages of kind {kind}: used({len(pages)}) + vacant({len(known)}) "
                    f"!= pages of {len(large)} large ones"
                )
            for page in large:
                if split_into.setdefault(page, kind) != kind:
                    raise IntegrityError(
                        f"large page {page} is split into kinds {split_into[page]} and {kind}"
                    )
            loose += len(large) * self.size - len(pages) * self.sizes[kind]
        if sorted([*split_into, *self.free]) != list(range(self.num_large)):
            raise IntegrityError(
                f"large pages split({len(split_into)}) + free({len(self.free)}) != total({self.num_large})"
            )
        if loose != self.loose:
            raise IntegrityError(f"loose({self.loose}) != recount({loose})")
