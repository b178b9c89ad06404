"""Which questions of a benchmark a model answers rightly: those whose right choice it finds the likeliest."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from milepost.evaluate.choices import Benchmark, Item
from milepost.evaluate.passages import Score, opening
from milepost.text.tokenization import Tokenizer

GROUP = 64  # items whose choices are scored together


@dataclass(frozen=True)
class Answers:
    """Which items (N,) are answered rightly: by the likeliest choice, and where choices go on from a context, by the likeliest per character."""

    name: str
    format: str
    right: np.ndarray
    right_by_length: np.ndarray | None


def answer(
    benchmark: Benchmark, tokenizer: Tokenizer, score: Score, add: Callable[[int], None], *, context: int
) -> Answers:
    """What a model answers that reads `context` tokens; `add` hears of each few items that are done.

    The length of a choice is counted in characters, as lm-evaluation-harness' acc_norm does. A tie is a wrong answer.
    """
    right, by_length = [], []
    for first in range(0, len(benchmark.items), GROUP):
        group = benchmark.items[first : first + GROUP]
        encoded = [encode(item, choice, tokenizer, context=context) for item in group for choice in item.choices]
        found = score([ids for ids, _ in encoded])
        sums = iter([each[len(each) - count :].sum() for each, (_, count) in zip(found, encoded, strict=True)])
        for item in group:
            own = np.array([next(sums) for _ in item.choices])
            right.append(_wins(own, item.answer))
            by_length.append(_wins(own / [len(choice) for choice in item.choices], item.answer))
        add(len(group))
    goes_on = any(item.context for item in benchmark.items)
    return Answers(benchmark.name, benchmark.format, np.array(right), np.array(by_length) if goes_on else None)


def encode(item: Item, choice: str, tokenizer: Tokenizer, *, context: int) -> tuple[np.ndarray, int]:
    """The ids of a choice after its context, and how many of them, from the end, are the choice's; of what is too long, the end.

    As in lm-evaluation-harness 0.4: the text is tokenized as a whole, spaces that end the context count to the choice, and a choice
    without context follows what stands before a document.
    """
    if item.context:
        whole, head = tokenizer.encode_array(f"{item.context} {choice}"), tokenizer.encode_array(item.context.rstrip())
    else:
        head = opening(tokenizer)
        whole = np.concatenate([head, tokenizer.encode_array(choice)])
    count = min(len(whole) - len(head), len(whole) - 1)
    return whole[-(max(context, count) + 1) :], count


def _wins(values: np.ndarray, answer: int) -> bool:
    """Whether the value of the right choice is above all others."""
    return bool((np.delete(values, answer) < values[answer]).all())


def pooled(answers: list[Answers]) -> list[Answers]:
    """Of each format that several files have, all of their items together."""
    together = []
    for kind in dict.fromkeys(one.format for one in answers):
        same = [one for one in answers if one.format == kind]
        by_length = [one.right_by_length for one in same if one.right_by_length is not None]
        if len(same) > 1:
            right = np.concatenate([one.right for one in same])
            together.append(
                Answers(f"all {len(same)} {kind} files", kind, right, np.concatenate(by_length) if by_length else None)
            )
    return together
