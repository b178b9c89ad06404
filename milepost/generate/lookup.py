"""Prompt lookup: what followed the last few tokens before is drafted to follow them now.

Saxena 2023, https://github.com/apoorvumang/prompt-lookup-decoding. Where text repeats itself, several tokens are then
verified in a pass that costs little more than one token's. Where it does not, drafting soon rests.
"""

from collections.abc import Sequence
from typing import Final

NGRAM: Final = 3  # tokens that must recur
LONGEST_REST: Final = 64  # tokens without a draft after many that failed


class Lookup:
    """Drafts for one text. `longest` is the most tokens of a draft: as many as cost little in a pass.

    Every failure doubles a rest, every success ends it, so that a text without repeats costs a few passes in all.
    """

    def __init__(self, *, longest: int) -> None:
        self.longest, self.length = longest, longest
        self.resting, self.rest = 0, 1
        self.follows: dict[tuple[int, ...], int] = {}  # the last NGRAM tokens -> where that which followed begins
        self.indexed = NGRAM

    def draft(self, history: Sequence[int], room: int) -> list[int]:
        """Up to `room` tokens that may follow; none if the end of history is new or drafting rests."""
        for end in range(self.indexed, len(history)):
            self.follows[tuple(history[end - NGRAM : end])] = end
        self.indexed = max(self.indexed, len(history))
        if self.resting:
            self.resting -= 1
            return []
        begin = self.follows.get(tuple(history[-NGRAM:]))
        if begin is None:
            return []
        again = history[begin:]  # in a circle, as long as the text itself turns in one
        return [again[i % len(again)] for i in range(min(self.length, room))]

    def learn(self, drafted: int, accepted: int) -> None:
        """Takes note of how many tokens of a draft were right: the next is twice as long, as long as that, or later."""
        if accepted == drafted:
            self.length = min(self.longest, 2 * self.length)
        else:
            self.length = max(1, accepted)
        if accepted:
            self.rest = 1
        else:
            self.resting, self.rest = self.rest, min(LONGEST_REST, 2 * self.rest)
