"""Trees of requests: branches that share the path from the root."""

from __future__ import annotations

import numpy as np

from sim.registry import NonNegativeFloat, NonNegativeInt, PositiveInt
from workloads.sessions import Script, SessionKind, gamma_times, session


@session("tree", "tree_of_thought")
class Tree(SessionKind):
    """Breadth-first search over thoughts (Yao et al., NeurIPS 2023): each step tries several ways on from the best.

    The first wave asks the same question `branches` times; then `keep` of its answers are kept, which ones is drawn,
    and each is gone on from `branches` times, its path repeated. A wave begins when the one before is answered. The
    defaults are those of the game of 24: 3 steps, 5 kept, and 5 ways on from each. Judging the thoughts is a pause,
    and no requests.

    Fields:
        branches: Requests that go on from each answer that is kept.
        depth: Steps from the question to the last thoughts.
        keep: Answers of a step that are gone on from.
        judging_time_s: Mean pause between a step's last answer and the next step.
        judging_time_cv: Standard deviation of that pause over its mean; 0 makes all equal.
        step_tokens: Tokens that each later step adds to the path.
    """

    def __init__(
        self,
        *,
        branches: PositiveInt = 5,
        depth: PositiveInt = 3,
        keep: PositiveInt = 5,
        judging_time_s: NonNegativeFloat = 0.0,
        judging_time_cv: NonNegativeFloat = 0.0,
        step_tokens: NonNegativeInt = 0,
    ) -> None:
        self.branches = branches
        self.depth = depth
        self.keep = keep
        self.judging_time = (judging_time_s, judging_time_cv)
        self.step_tokens = step_tokens

    def scripts(self, rng: np.random.Generator, count: int) -> list[Script]:
        """Waves of equal sizes, on from other answers in each session."""
        branches, keep = self.branches, self.keep
        scripts = []
        for _ in range(count):
            waves = [[0] * branches]
            for _ in range(1, self.depth):
                kept = np.sort(rng.permutation(len(waves[-1]))[:keep]).tolist()
                waves.append([place for place in kept for _ in range(branches)])
            added = [self.step_tokens] * (sum(map(len, waves)) - branches)
            scripts.append(Script(waves, gamma_times(rng, self.depth, *self.judging_time), added))
        return scripts
