"""Prompt-lookup (n-gram) speculative decoding: draft what followed the last few tokens at their previous occurrence.

Saxena 2023, https://github.com/apoorvumang/prompt-lookup-decoding. Where text repeats itself, several tokens are
verified in a pass that costs little more than one token's. Where it does not, drafting soon pauses.
"""

from collections.abc import Sequence
from typing import Final

NGRAM: Final = 3  # tokens that must match
LONGEST_PAUSE: Final = 64  # tokens without a draft after many failures


class Lookup:
    """Drafts for one text. `longest` is the most tokens of a draft: as many as cost little in a pass.

    Every failure doubles the pause before the next draft, every success resets it, so a text without repeats costs only
    a few wasted passes.
    """

    def __init__(self, *, longest: int) -> None:
        self.longest, self.length = longest, longest
        self.waiting, self.pause = 0, 1
        self.follows: dict[tuple[int, ...], int] = {}  # NGRAM tokens -> the position after them
        self.indexed = NGRAM

    def draft(self, history: Sequence[int], room: int) -> list[int]:
        """Return up to `room` tokens that may follow; none if the last NGRAM tokens are new or drafting is paused."""
        for end in range(self.indexed, len(history)):
            self.follows[tuple(history[end - NGRAM : end])] = end
        self.indexed = max(self.indexed, len(history))
        if self.waiting:
            self.waiting -= 1
            return []
        begin = self.follows.get(tuple(history[-NGRAM:]))
        if begin is None:
            return []
        repeated = history[begin:]  # shorter than the draft if the text loops: then the draft loops too
        return [repeated[i % len(repeated)] for i in range(min(self.length, room))]

    def learn(self, drafted: int, accepted: int) -> None:
        """Adapt to the result of a draft: double the next one's length, cut it to what was accepted, or pause."""
        if accepted == drafted:
            self.length = min(self.longest, 2 * self.length)
        else:
            self.length = max(1, accepted)
        if accepted:
            self.pause = 1
        else:
            self.waiting, self.pause = self.pause, min(LONGEST_PAUSE, 2 * self.pause)
