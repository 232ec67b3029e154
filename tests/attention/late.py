"""Streams that copy late: on a CPU what a busy link does on a GPU, and a diary of what streams are told."""

from __future__ import annotations

from collections import deque
from random import Random


class LateStream:
    """Runs nothing until somebody waits for it, or, with a `random`, some of it whenever it is asked.

    Compute is on time, so that whoever does not wait reads what is not there yet, or writes what is still read.
    """

    def __init__(self, random: Random | None = None) -> None:
        self.random = random
        self.queue: deque = deque()
        self.num_started = 0

    def submit(self, work):
        self.queue.append(work)

    def record(self):
        event = LateEvent(self)
        self.queue.append(event.happen)
        return event

    def wait(self, event):
        self.queue.append(lambda: event.stream.run_until(event))

    def wait_for_compute(self):
        """It is on time."""

    def hold(self, event):
        event.stream.run_until(event)

    def keep(self, *tensors):
        """Nothing is freed here."""

    def synchronize(self):
        while self.queue:
            self.step()

    def step(self):
        self.num_started += 1
        self.queue.popleft()()

    def run_until(self, event):
        while not event.happened:
            self.step()


class LateEvent:
    def __init__(self, stream: LateStream) -> None:
        self.stream = stream
        self.happened = False

    def happen(self):
        self.happened = True

    def query(self):
        random = self.stream.random
        if random is not None and random.random() < 0.5:
            for _ in range(min(random.randrange(12), len(self.stream.queue))):
                self.stream.step()
        return self.happened


class PromptStream(LateStream):
    """Runs everything at once, beside another one that is late."""

    def submit(self, work):
        super().submit(work)
        self.synchronize()

    def record(self):
        event = super().record()
        self.synchronize()
        return event

    def wait(self, event):
        super().wait(event)
        self.synchronize()


class DiaryStream(LateStream):
    """Copies at once, and notes the order of what it is told."""

    def __init__(self, name: str, diary: list[str]) -> None:
        super().__init__()
        self.name, self.diary = name, diary

    def submit(self, work):
        self.diary.append(f"{self.name} copies")
        work()

    def record(self):
        event = LateEvent(self)
        event.happened = True
        return event

    def wait_for_compute(self):
        self.diary.append(f"{self.name} waits for compute")

    def hold(self, event):
        self.diary.append(f"compute waits for {self.name}")

    def hold_compute(self):
        self.hold(None)
