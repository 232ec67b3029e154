"""How long steps last: computing, moving blocks, waiting for copies; and what of it preemptions cost."""

from __future__ import annotations

from sim.link import Link
from sim.schedulers.recovery import Recovery
from sim.step import Step
from sim.tiers.tiered_store import TieredStore
from sim.timing.base import StepTime
from sim.timing.transfers import Transfers


class StepClock:
    """The duration of every step, and the sums behind the summary's figures of preemption (times in ns).

    `recompute_time` is what computing lost tokens again added to steps, `stall_time` how long computing stood still
    for swaps, `transfer_time` how long synchronous ones took on the link.
    """

    def __init__(
        self,
        timing: StepTime,
        transfers: Transfers,
        recovery: Recovery,
        link: Link[Transfers] | None,
        tiers: TieredStore | None = None,
    ) -> None:
        self.timing = timing
        self.transfers = transfers
        self.recovery = recovery
        self.link = link
        self.tiers = tiers
        self.preemptions = 0
        self.copied_blocks = 0
        self.swapped_out_blocks = 0
        self.swapped_in_blocks = 0
        self.recompute_time = 0
        self.stall_time = 0
        self.transfer_time = 0
        self._copying: dict[int, float] = {}

    def copy_seconds(self, blocks: int) -> float:
        """Seconds that copying so many blocks on the device adds to a step."""
        seconds = self._copying.get(blocks)
        if seconds is None:
            step = Step()
            step.copied_blocks = blocks
            seconds = self._copying[blocks] = self.transfers.seconds(step) if blocks else 0.0
        return seconds

    def duration(self, step: Step, start: int) -> int:
        """Time (ns) of a step that could begin at `start`."""
        seconds = self.timing.seconds(step)
        if step.recomputed:
            self.recompute_time += round(self.recovery.note_recomputed(step, seconds) * 1e9)
        if step.copied_blocks or step.swapped_in_blocks or step.swapped_out_blocks:
            seconds += self.transfers.seconds(step)
            self.copied_blocks += step.copied_blocks
            self.swapped_out_blocks += step.swapped_out_blocks
            self.swapped_in_blocks += step.swapped_in_blocks
            out, back = step.swapped_out_blocks, step.swapped_in_blocks
            quantizing = (out + back) * self.transfers.quantize_block
            swapping = 0.0 if self.link is not None else self.transfers.swap_seconds(out, back)
            self.stall_time += round((quantizing + swapping) * 1e9)
            self.transfer_time += round(swapping * 1e9)
        duration = round(seconds * 1e9) or 1
        if self.tiers is not None:
            return duration + self.tiers.stall(start, duration)
        if self.link is None:
            return duration
        stall = self.link.stall(start, duration)
        self.stall_time += stall
        return duration + stall
