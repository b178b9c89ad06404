"""Accuracy on a benchmark: a model answers with the choice of highest likelihood."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from milepost.evaluate.choices import Benchmark, Item
from milepost.evaluate.passages import Score, opening
from milepost.text.tokenization.base import Tokenizer

GROUP = 64  # items scored together


@dataclass(frozen=True)
class Answers:
    """Which items (N,) are answered correctly: by likelihood, and for choices that continue a context,
    by likelihood per character.
    """

    name: str
    format: str
    correct: np.ndarray
    correct_by_length: np.ndarray | None


def answer(
    benchmark: Benchmark, tokenizer: Tokenizer, score: Score, add: Callable[[int], None], *, context: int
) -> Answers:
    """Return the answers of a model with a context of `context` tokens; `add` is called with the number of items just
    done.

    The length of a choice is its number of characters, as for lm-evaluation-harness' acc_norm. A tie is a wrong answer.
    """
    correct, by_length = [], []
    for first in range(0, len(benchmark.items), GROUP):
        group = benchmark.items[first : first + GROUP]
        encoded = [encode(item, choice, tokenizer, context=context) for item in group for choice in item.choices]
        found = score([ids for ids, _ in encoded])
        sums = iter([row[len(row) - count :].sum() for row, (_, count) in zip(found, encoded, strict=True)])
        for item in group:
            likelihoods = np.array([next(sums) for _ in item.choices])
            correct.append(_wins(likelihoods, item.answer))
            by_length.append(_wins(likelihoods / [len(choice) for choice in item.choices], item.answer))
        add(len(group))
    continues = any(item.context for item in benchmark.items)
    return Answers(benchmark.name, benchmark.format, np.array(correct), np.array(by_length) if continues else None)


def encode(item: Item, choice: str, tokenizer: Tokenizer, *, context: int) -> tuple[np.ndarray, int]:
    """Return the ids of a choice after its context, and how many of the last ids are the choice's. Long contexts lose
    their beginning.

    As in lm-evaluation-harness 0.4: the text is tokenized as a whole, spaces at the end of the context belong to the
    choice, and a choice without context follows what precedes a document in training. The token that begins every text,
    if the tokenizer has one, precedes the context.
    """
    if item.context:
        whole, head = (
            np.array(tokenizer.encode_whole(text), np.uint32)
            for text in (f"{item.context} {choice}", item.context.rstrip())
        )
    else:
        head = opening(tokenizer)
        whole = np.concatenate([head, tokenizer.encode_array(choice)])
    count = min(len(whole) - len(head), len(whole) - 1)
    return whole[-(max(context, count) + 1) :], count


def _wins(values: np.ndarray, answer: int) -> bool:
    """Return whether the value of the correct choice is above all others."""
    return bool((np.delete(values, answer) < values[answer]).all())


def pooled(answers: list[Answers]) -> list[Answers]:
    """Return, for each format that several files have, the answers of all its files together."""
    groups = []
    for kind in dict.fromkeys(answer.format for answer in answers):
        same = [answer for answer in answers if answer.format == kind]
        by_length = [answer.correct_by_length for answer in same if answer.correct_by_length is not None]
        if len(same) > 1:
            correct = np.concatenate([answer.correct for answer in same])
            joined = np.concatenate(by_length) if by_length else None
            groups.append(Answers(f"all {len(same)} {kind} files", kind, correct, joined))
    return groups
