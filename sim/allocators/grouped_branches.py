"""Branches over layers of several kinds: pages of every group are shared by references, and copied on write."""

from __future__ import annotations

from abc import abstractmethod
from collections import Counter
from collections.abc import Sequence as Ordered

from sim.allocators.capacity import Capacity
from sim.allocators.grouped import GroupedAllocator
from sim.allocators.window_edge import NULL, Edge, Holding
from sim.layer_groups import Pages
from sim.request import NEVER, Request, Sequence


class BranchedAllocator(GroupedAllocator):
    """Layer groups whose pages branches of one request share, the last ones until they write on.

    A window gives a page back for its own branch only. Each branch has states of its own from its fork on, and as a
    fork may not fail, the pages for those of the first ones are taken with the prompt. A group of branches that is
    computed again has the full blocks of its prompt in common.
    """

    can_fork = True
    recomputes_groups = True

    def __init__(self, capacity: Capacity, pages: Pages) -> None:
        super().__init__(capacity, pages)
        self.state_groups = [index for index, group in enumerate(self.groups) if group.state_slots]

    # What a policy decides

    @abstractmethod
    def fresh(self, holding: Holding, counts: Ordered[int]) -> list[list[int]]:
        """So many new pages of each group for the request that a sequence is of."""

    @abstractmethod
    def hold(self, group: int, pages: list[int]) -> None:
        """One more reference to each of these pages of a group."""

    # Branches

    def fork(self, parent: Sequence, child: Sequence) -> None:
        """Share the pages of every group; their windows begin at the same place, and move each for itself."""
        held = self.holdings[parent]
        tables = [table.copy() for table in held.tables]
        for group in self.token_groups:
            self.hold(group, [page for page in tables[group] if page != NULL])
        for group in self.state_groups:
            tables[group] = [self._page_of_state(held, group)]
        holding = self.holdings[child] = Holding(tables, tables[self.token_groups[0]])
        holding.registered, holding.packed = held.registered, held.packed
        child.block_table = holding.rows_of
        child.tables = [tables[group] for group in self.token_groups]
        child.capacity = parent.capacity
        child.origin = parent.num_tokens
        child.edges = holding.edges
        for edge in held.edges:
            self._disclaim(edge)
            other = Edge(edge.group, edge.window, child, tables[edge.group], edge.freed, edge.left)
            other.moving, other.turn = edge.moving, edge.turn
            holding.edges.append(other)
        self.sequences.add(child)

    def _page_of_state(self, parent: Holding, group: int) -> int:
        """A page for the state of a new branch, in the end that of one that just died."""
        if parent.spare and parent.spare[group]:
            page = parent.spare[group].pop()
        else:
            counts = [int(index == group) for index in range(len(self.groups))]
            (page,) = self.fresh(parent, counts)[group]
            self.num_held += self.groups[group].page_slots
        self.num_tokens += self.groups[group].state_slots
        self.num_internal += self.pads[group]
        return page

    def to_fork(self, request: Request) -> int:
        """Branches that a request is yet to fork when its prompt is computed."""
        unforked = len(request.sequences) < 2 and request.first_token_time == NEVER
        return request.width - 1 if unforked else 0

    def keep_spare(self, sequence: Sequence) -> None:
        """Pages for the states of branches to come, which are reserved until then."""
        count = self.to_fork(sequence.request) if self.state_groups else 0
        if count:
            holding = self.holdings[sequence]
            holding.spare = self.fresh(holding, [count * (group.state_slots > 0) for group in self.groups])
            self.num_held += self.spare_slots(holding)

    def free(self, sequence: Sequence) -> None:
        """Take everything back, pages for branches that never came as well."""
        holding = self.holdings[sequence]
        if any(holding.spare):
            self.num_held -= self.spare_slots(holding)
            for group, pages in enumerate(holding.spare):
                self.give(sequence, group, pages)
            holding.spare = []
        super().free(sequence)

    def shares_tail(self, sequence: Sequence) -> bool:
        """Whether another branch has the pages that its next token goes to."""
        if not self.sharing or not sequence.num_tokens % self.block_size:
            return False
        return self.num_holders(self.token_groups[0], sequence.block_table[-1]) > 1

    def copies(self, branches: list[Sequence]) -> int:
        """Rows of pages; the last who has one keeps it."""
        held = Counter([each.block_table[-1] for each in branches])
        first = self.token_groups[0]
        return len(branches) - sum([self.num_holders(first, page) == count for page, count in held.items()])

    def copy_tail(self, sequence: Sequence) -> int:
        """Copy the last page of every group."""
        holding = self.holdings[sequence]
        pages = self.fresh(holding, [int(not group.state_slots) for group in self.groups])
        for group in self.token_groups:
            table, (page,) = holding.tables[group], pages[group]
            if self.probe is not None:
                self.probe.copy(*self.numbered(group, (table[-1], page)))
            shared, table[-1] = table[-1], page
            self.give(sequence, group, [shared])
        unused = max(0, sequence.capacity - sequence.final_tokens)
        self.num_held += self.row_slots
        self.num_tokens += sequence.num_tokens % self.block_size * self.slots_per_token
        self.num_internal += self.row_pads + unused * self.slots_per_token
        return 1

    def numbered(self, group: int, pages: Ordered[int]) -> Ordered[int]:
        """Pages of a group as `held_pages` numbers them."""
        return pages

    # Groups that are computed again

    def shared_rows(self, request: Request) -> int:
        """Rows of pages that branches have in common then: full blocks of the prompt."""
        return request.prompt_tokens // self.block_size

    def share_prompt(self, first: Sequence) -> list[list[int]]:
        """What another branch has from the first one, by token group."""
        holding, rows = self.holdings[first], self.shared_rows(first.request)
        for edge in holding.edges:
            self._disclaim(edge)
        return [holding.tables[group][:rows] for group in self.token_groups]

    def in_common(self, request: Request) -> list[tuple[Sequence, int] | None]:
        """The full blocks of the prompt."""
        shared = self.shared_rows(request)
        others = len(request.sequences) - 1
        return [None, *[(request.sequences[0], shared) if shared else None] * others]
