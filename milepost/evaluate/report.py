"""Evaluations as tables and as JSON values."""

import math
from typing import Any

import numpy as np

from milepost.evaluate.evaluation import Evaluation
from milepost.evaluate.passages import Text
from milepost.evaluate.statistics import wilson
from milepost.runtime.progress import shown
from milepost.runtime.tables import table
from milepost.screen import stdout_columns

FIGURES = ("checkpoint", "step", "loss", "perplexity", "bits/byte", "tokens", "bytes")
ACCURACIES = ("benchmark", "format", "items", "checkpoint", "accuracy", "95 % interval", "by length", "95 % interval")


def summary(evaluation: Evaluation) -> str:
    """Return the main figures in one line."""
    parts = [evaluation.name + ":"]
    if it := evaluation.figures:
        parts.append(f"loss {it.loss:.4f}, {it.bits_per_byte:.4f} bits per byte;")
    last = {answers.format: answers for answers in evaluation.answers}.values()  # of several files, the pooled answers
    parts += [f"{answers.name} {answers.correct.mean():.1%};" for answers in last]
    return " ".join(parts).removesuffix(";")


def tables(evaluations: list[Evaluation], comparisons: list[dict[str, Any]]) -> str:
    """Return the texts and the tables of figures, accuracies and comparisons, omitting empty tables."""
    figures: list[tuple[str, ...]] = [
        (
            evaluation.name, str(evaluation.identity["step"]), f"{it.loss:.4f}", f"{it.perplexity:.4g}",
            f"{it.bits_per_byte:.4f}",
            f"{it.tokens:,}", f"{it.bytes:,}",
        )
        for evaluation in evaluations if (it := evaluation.figures)
    ]  # fmt: skip
    accuracies: list[tuple[str, ...]] = [
        (
            answers.name, answers.format, f"{len(answers.correct):,}", evaluation.name,
            *_accuracy(answers.correct), *_accuracy(answers.correct_by_length),
        )
        for row in zip(*[evaluation.answers for evaluation in evaluations], strict=True)
        for evaluation, answers in zip(evaluations, row, strict=True)
    ]  # fmt: skip
    differences: list[tuple[str, ...]] = [
        (shown(row["checkpoint"]), row["figure"], *_evidence(row), f"{row['p']:.2g}") for row in comparisons
    ]
    compared = (f"compared with {evaluations[0].name}", "", "difference", "evidence", "p")
    heads = (FIGURES, ACCURACIES, compared)
    parts = ["\n".join(dict.fromkeys(_source(it.text) for it in evaluations if it.text))]
    parts += [
        table([head, *rows], columns=stdout_columns())
        for head, rows in zip(heads, (figures, accuracies, differences), strict=True)
        if rows
    ]
    return "\n\n".join(filter(None, parts))


def _source(text: Text) -> str:
    part = f" from {text.unit} {text.start:,} on" if text.start else ""
    return f"measured on {shown(text.corpus.source)}{part} (sha256 {text.scan.sha256[:12]})"


def _accuracy(correct: np.ndarray | None) -> tuple[str, str]:
    """Return the proportion of correct items and its interval."""
    if correct is None:
        return "", ""
    low, high = wilson(int(correct.sum()), len(correct))
    return f"{correct.mean():.1%}", f"{low:.1%} to {high:.1%}"


def _evidence(row: dict[str, Any]) -> tuple[str, str]:
    """Return a difference, and its interval or the items on which the models differ."""
    if "interval" in row:
        return f"{row['difference']:+.4f}", "{:+.4f} to {:+.4f} (95 %)".format(*row["interval"])
    return f"{row['difference']:+.1%}", f"{row['only_it']} items correct here only, {row['only_the_other']} there only"


def as_json(evaluation: Evaluation) -> dict[str, Any]:
    """Return all figures as JSON values."""
    values = dict(evaluation.identity)
    if evaluation.figures and evaluation.text:
        names = ("loss", "perplexity", "bits_per_byte", "tokens", "bytes")
        standard = {name: getattr(evaluation.figures, name) for name in names}
        if not math.isfinite(evaluation.figures.perplexity):
            standard["perplexity"] = None  # JSON has no infinity
        text = evaluation.text
        source: dict[str, Any] = {
            "source": text.corpus.source,
            "sha256": text.scan.sha256,
            f"first_{text.unit}": text.start,
        }
        if text.stand_ins:
            source["unknown_characters"] = {chr(code): instead for code, instead in text.stand_ins.items()}
        values["standard"] = standard | {"text": source}
    values["benchmarks"] = [
        {"name": answers.name, "format": answers.format, "items": len(answers.correct)}
        | _accuracy_as_json("accuracy", answers.correct)
        | _accuracy_as_json("accuracy_by_length", answers.correct_by_length)
        for answers in evaluation.answers
    ]
    return values


def _accuracy_as_json(name: str, correct: np.ndarray | None) -> dict[str, Any]:
    if correct is None:
        return {}
    return {name: float(correct.mean()), f"{name}_interval": wilson(int(correct.sum()), len(correct))}
