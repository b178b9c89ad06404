"""Measure one model on a text and on benchmarks, and compare two results."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from milepost.evaluate.answers import Answers, answer, pooled
from milepost.evaluate.choices import Benchmark
from milepost.evaluate.passages import BLOCK, Figures, Text, measure
from milepost.evaluate.scoring import log_likelihoods
from milepost.evaluate.statistics import FEWEST, mcnemar, paired
from milepost.evaluate.talks import measure_talks
from milepost.runtime.progress import QUIET_SECONDS
from milepost.text.tokenization.base import Tokenizer
from models.model import Model

Log = Callable[[str], None]
NOT_FINITE = "the model's probabilities are not finite: its weights are damaged, or its training diverged"


class NotFiniteError(ValueError):
    """A model gives probabilities that are NaN or Inf."""


@dataclass(frozen=True)
class Evaluation:
    """All figures of one model. `identity` says which model it is, as JSON values: its path, type, step,
    run_id and save_id.
    """

    name: str  # for people
    identity: dict[str, Any]
    text: Text | None
    figures: Figures | None
    answers: list[Answers]


def evaluate(
    model: Model,
    tokenizer: Tokenizer,
    text: Text | None,
    benchmarks: list[Benchmark],
    *,
    name: str,
    identity: dict[str, Any],
    batch_size: int,
    stride: int,
    template: str | None = None,
    log: Log,
) -> Evaluation:
    """Return the figures of a model in eval mode: of `text`, if it is not None, and of each benchmark. `template` is the
    model's for conversations; of these only the answers count, and how many are exact is an answer too.

    `stride` is the number of tokens between windows, 0 for adjacent windows. Raise NotFiniteError if the model's
    probabilities are not finite.
    """
    context = model.settings.block_size
    if stride > context:
        log(f"{name} has a context of {context} tokens, shorter than the stride of {stride}: its windows are adjacent")

    def score(sequences: list[np.ndarray]) -> list[np.ndarray]:
        found = log_likelihoods(model, sequences, batch_size=batch_size, stride=min(stride, context) or context)
        if not all(np.isfinite(row).all() for row in found):
            raise NotFiniteError(NOT_FINITE)
        return found

    figures, answers = None, list[Answers]()
    if text and text.is_talks:
        talks = text.talks()
        progress = _log_progress(log, name, len(talks))
        figures, exact, past = measure_talks(talks, model, tokenizer, template, batch_size=batch_size, add=progress)
        answers.append(exact)
        if past:
            count = f"{past:,} of {len(exact.correct):,} answers"
            log(f"{name}: {count} reach past its context of {context} tokens: measured up to there, and not exact")
        if not np.isfinite(figures.nats):
            raise NotFiniteError(NOT_FINITE)
    elif text:
        progress = _log_progress(log, name, text.scan.characters - text.start)
        figures = measure(text.passages(), tokenizer, score, progress)
    for benchmark in benchmarks:
        progress = _log_progress(log, f"{name}: {benchmark.name}", len(benchmark.items))
        answers.append(answer(benchmark, tokenizer, score, progress, context=context))
    return Evaluation(name, identity, text, figures, answers + pooled(answers))


def _log_progress(log: Log, what: str, total: int) -> Callable[[int], None]:
    """Return a function that adds up what is done and logs it every QUIET_SECONDS."""
    done, logged = 0, time.monotonic()

    def add(amount: int) -> None:
        nonlocal done, logged
        done += amount
        if time.monotonic() - logged >= QUIET_SECONDS and done < total:
            logged = time.monotonic()
            log(f"{what}: {done:,} of {total:,} done")

    return add


def compare(base: Evaluation, other: Evaluation, *, log: Log) -> list[dict[str, Any]]:
    """Return the differences of `other`'s figures to `base`'s as JSON values, with p-values.

    Log what cannot be compared.
    """
    pair = {"checkpoint": other.identity["path"], "compared_with": base.identity["path"]}
    rows = [*_compare_text(base, other, log), *_compare_answers(base, other)]
    return [pair | row for row in rows]


def _compare_text(base: Evaluation, other: Evaluation, log: Log) -> list[dict[str, Any]]:
    if not (base.figures and other.figures and base.text and other.text):
        return []
    if base.text.identity != other.text.identity:
        log(f"{other.name} was measured on another text than {base.name}: they are not compared")
        return []
    if base.figures.bytes != other.figures.bytes:  # answers past a context, or turns that end in another way
        sizes = f"{other.name} was measured on {other.figures.bytes:,} bytes, {base.name} on {base.figures.bytes:,}"
        log(f"{sizes}: their bits per byte are not compared")
        return []
    found = paired(other.figures.blocks - base.figures.blocks)
    if found is None:
        log(f"the text is too short to compare {other.name} with {base.name}: it needs {FEWEST * BLOCK:,} bytes")
        return []
    interval = [found.low, found.high]
    row = {"figure": "bits per byte", "difference": found.mean, "interval": interval, "p": found.p}
    return [row | {"pieces": len(base.figures.blocks)}]


def _compare_answers(base: Evaluation, other: Evaluation) -> list[dict[str, Any]]:
    rows = []
    for first, second in zip(base.answers, other.answers, strict=True):
        only_other = int((second.correct & ~first.correct).sum())
        only_base = int((first.correct & ~second.correct).sum())
        row = {
            "figure": f"accuracy on {second.name}",
            "difference": (only_other - only_base) / len(first.correct),
            "only_it": only_other,
            "only_the_other": only_base,
            "p": mcnemar(only_other, only_base),
        }
        rows.append(row)
    return rows
