"""Measure one checkpoint, or several side by side: loss, perplexity and bits per byte on a text, accuracy on benchmarks.

CHECKPOINT_PATH=latest python3 scripts/evaluate_checkpoint.py
CHECKPOINT_PATH=best,latest EVAL_TYPE=both EVAL_DATA=letters.txt BENCHMARK_DATA=blimp/*.jsonl OUTPUT=figures.json python3 scripts/evaluate_checkpoint.py
"""

import sys

sys.path.insert(0, __file__.rpartition("scripts")[0])  # runs from any folder, without installing
from milepost import config

READS = (
    "CHECKPOINT_PATH", "EVAL_TYPE", "EVAL_DATA", "BENCHMARK_DATA", "OUTPUT", "EVAL_STRIDE", "BATCH_SIZE", "DEVICE", "DTYPE", "DETERMINISTIC",
    "CHECKPOINT_DIR", "BASE_CHECKPOINT", "GPT2_MODEL_NAME", "INIT_FROM", "TRAINING_DATA_SOURCE",
)  # fmt: skip
SETTINGS = config.from_command_line(__name__, __doc__, READS)  # before torch is imported

import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from milepost import ckpt
from milepost.ckpt import Checkpoint, CheckpointError
from milepost.ckpt.record import VERSION
from milepost.ckpt.restore import build_model, build_tokenizer, merged
from milepost.cli import guarded
from milepost.config import Config, ConfigError
from milepost.evaluate.answers import Answers, answer, pooled
from milepost.evaluate.choices import Benchmark, read_benchmark
from milepost.evaluate.passages import BLOCK, Figures, Text, measure
from milepost.evaluate.scoring import log_likelihoods
from milepost.evaluate.statistics import FEWEST, mcnemar, paired, wilson
from milepost.resume import saved_settings
from milepost.run import DATA_FOLDER, scan_source, with_its_base, with_tokenizer
from milepost.runtime import hardware
from milepost.runtime.progress import QUIET_SECONDS, Log, replacing, shown, table, tell
from milepost.text.corpus import open_corpus
from milepost.text.errors import DataError
from milepost.text.token_files import split_at
from milepost.text.tokenization import UnknownCharacters


@dataclass(frozen=True)
class Evaluation:
    """Everything measured of one checkpoint."""

    record: Checkpoint
    text: Text | None
    figures: Figures | None
    answers: list[Answers]

    @property
    def name(self) -> str:
        """Its path, as short as it can be typed."""
        return shown(self.record.path or "")


def main(settings: Config, log: Log) -> int:
    """Measures what CHECKPOINT_PATH means; a table to stdout, all figures to OUTPUT; returns the exit code."""
    check(settings, log)
    paths, notes = ckpt.several(settings.checkpoint_path, Path(settings.checkpoint_dir))
    for note in notes:
        log(note)
    device = hardware.choose_device(settings.device)
    hardware.make_deterministic(settings.deterministic, device)
    dtype = hardware.choose_dtype("float32" if settings.dtype == "auto" else settings.dtype, device, width=0)
    records = [opened(path, settings, log) for path in paths]
    texts = [text_of(record, settings, log) if settings.eval_type != "benchmark" else None for record in records]
    benchmarks = read_benchmarks(settings) if settings.eval_type != "standard" else []
    for record, text in zip(records, texts, strict=True):
        check_characters(record, text, benchmarks)
    done = []
    for record, text in zip(records, texts, strict=True):
        with hardware.autocast(device, dtype):
            done.append(evaluated(record, text, benchmarks, settings, log, device=device))
        log(f"{done[-1].name}: {'; '.join(summary(done[-1]))}")
    compared = [row for other in done[1:] for row in differences(done[0], other, log)]
    tell("\n\n".join(tables(done, compared)))
    if settings.output:
        how = {"milepost": VERSION, "device": device.type, "dtype": dtype, "eval_stride": settings.eval_stride}
        figures = {"checkpoints": [as_json(one) for one in done], "comparisons": compared}
        write_json(Path(settings.output), how | figures, log)
    return 0


def check(settings: Config, log: Log) -> None:
    """Raises ConfigError for what could only fail, or overwrite something, after a long time of measuring."""
    problems = []
    if settings.eval_type != "standard" and settings.benchmark_data is None:
        problems.append(f"EVAL_TYPE={settings.eval_type} answers questions: set BENCHMARK_DATA to their files")
    output = Path(settings.output or "figures.json")
    if output.suffix != ".json" or output.is_dir():
        problems.append(f"OUTPUT={output}: the figures are written as JSON; name a file that ends in .json")
    elif settings.output and not os.access(output.parent, os.W_OK):
        problems.append(f"OUTPUT={output}: nothing can be written to {output.parent}; name a folder that is there")
    if problems:
        raise ConfigError(problems)
    if settings.eval_type == "standard" and settings.benchmark_data is not None:
        log("BENCHMARK_DATA is not used: EVAL_TYPE=benchmark or both answers it")
    if settings.eval_type == "benchmark" and settings.eval_data is not None:
        log("EVAL_DATA is not used: EVAL_TYPE=standard or both measures it")


def opened(path: Path, settings: Config, log: Log) -> Checkpoint:
    """The checkpoint at `path` with its tokenizer, without the optimizer."""
    record = with_its_base(ckpt.load(path, optimizer=False), settings, log)
    record = merged(with_tokenizer(record, settings, log))
    for note in record.notes:
        log(note)
    return record


def text_of(record: Checkpoint, settings: Config, log: Log) -> Text:
    """EVAL_DATA, else the part of the checkpoint's own text that it was not trained on; DataError if there is none."""
    if settings.eval_data is not None:
        return Text(*scan_source(settings.eval_data, log), start=0)
    name, fraction = shown(record.path or ""), record.data.get("validation_fraction")
    if not fraction:
        reason = (
            "does not say what text it was trained on" if fraction is None else "was trained without validation text"
        )
        raise DataError(f"{name} {reason}: set EVAL_DATA to the text to measure it on")
    source = config.from_saved(settings, saved_settings(record)).training_data_source
    corpus, scanned = scan_source(source, log)
    if scanned.sha256 != record.data.get("sha256"):
        remedy = "set EVAL_DATA, or TRAINING_DATA_SOURCE to that text"
        raise DataError(f"{shown(source)} is not the text that {name} was trained on: {remedy}")
    return Text(corpus, scanned, start=split_at(scanned.characters, fraction))


def read_benchmarks(settings: Config) -> list[Benchmark]:
    """The benchmark in each file of BENCHMARK_DATA."""
    files = open_corpus(settings.benchmark_data or "", data_dir=DATA_FOLDER).paths
    return [read_benchmark(path) for path in files]


def check_characters(record: Checkpoint, text: Text | None, benchmarks: list[Benchmark]) -> None:
    """Raises DataError naming the characters that the checkpoint's vocabulary lacks, before anything is measured."""
    tokenizer = build_tokenizer(record)
    wanted = [(text.corpus.source, text.scan.alphabet)] if text else []
    for source, alphabet in [*wanted, *((str(one.path), one.alphabet) for one in benchmarks)]:
        try:
            tokenizer.encode(alphabet)
        except UnknownCharacters as error:
            remedy = "take other text, or a checkpoint with TOKENIZER=byte, bpe or gpt2"
            raise DataError(f"{shown(source)}: {shown(record.path or '')} cannot read it: {error}; {remedy}") from error


# ---------------------------------------------------------------------------------------------------------------------
# One checkpoint.


def evaluated(
    record: Checkpoint,
    text: Text | None,
    benchmarks: list[Benchmark],
    settings: Config,
    log: Log,
    *,
    device: torch.device,
) -> Evaluation:
    """Every figure of one checkpoint; raises CheckpointError if its model gives none."""
    model, tokenizer = build_model(record, device=device, shared=True).eval(), build_tokenizer(record)
    context = model.settings.block_size
    name, stride = shown(record.path or ""), min(settings.eval_stride, context) or context
    if stride < settings.eval_stride:
        log(f"{name} reads {context} tokens at once, fewer than EVAL_STRIDE: its windows lie side by side")

    def score(sequences: list[np.ndarray]) -> list[np.ndarray]:
        found = log_likelihoods(model, sequences, batch_size=settings.batch_size, stride=stride)
        if not all(np.isfinite(one).all() for one in found):
            problem = "its model gives no finite probabilities: its weights are damaged, or its training diverged"
            raise CheckpointError(f"{record.path}: {problem}")
        return found

    figures = None
    if text:
        figures = measure(text.passages(), tokenizer, score, heard(log, name, text.scan.characters - text.start))
    answers = [
        answer(one, tokenizer, score, heard(log, f"{name}: {one.name}", len(one.items)), context=context)
        for one in benchmarks
    ]
    return Evaluation(record, text, figures, answers + pooled(answers))


def heard(log: Log, what: str, total: int) -> Callable[[int], None]:
    """Adds up what is done and says so once in a while."""
    done, said = 0, time.monotonic()

    def add(amount: int) -> None:
        nonlocal done, said
        done += amount
        if time.monotonic() - said >= QUIET_SECONDS and done < total:
            said = time.monotonic()
            log(f"{what}: {done:,} of {total:,} done")

    return add


# ---------------------------------------------------------------------------------------------------------------------
# Two of them.


def differences(one: Evaluation, other: Evaluation, log: Log) -> list[dict[str, Any]]:
    """What of `other`'s figures differs from `one`'s, and how often chance alone would make them differ as much (p)."""
    pair = {"checkpoint": str(other.record.path), "compared_with": str(one.record.path)}  # as in as_json
    rows: list[dict[str, Any]] = []
    if one.figures and other.figures and one.text and other.text:
        mine, its = one.figures.blocks, other.figures.blocks
        if one.text.identity != other.text.identity:
            log(f"{other.name} was measured on other text than {one.name}, so they are not compared: set EVAL_DATA")
        elif found := paired(its - mine):
            values = {
                "figure": "bits per byte",
                "difference": found.mean,
                "interval": [found.low, found.high],
                "p": found.p,
            }
            rows.append(pair | values | {"pieces": len(mine)})
        else:
            log(f"the text is too short to compare {other.name} with {one.name}: it needs {FEWEST * BLOCK:,} bytes")
    for ours, theirs in zip(one.answers, other.answers, strict=True):
        only_it, only_other = (int((a & ~b).sum()) for a, b in ((theirs.right, ours.right), (ours.right, theirs.right)))
        values = {"figure": f"accuracy on {theirs.name}", "difference": (only_it - only_other) / len(ours.right)}
        rows.append(
            pair | values | {"only_it": only_it, "only_the_other": only_other, "p": mcnemar(only_it, only_other)}
        )
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# Showing.


def summary(one: Evaluation) -> list[str]:
    """Its main figures in a few words."""
    figures = [f"loss {one.figures.loss:.4f}, {one.figures.bits_per_byte:.4f} bits per byte"] if one.figures else []
    last = {each.format: each for each in one.answers}.values()  # of several files of a format, all together
    return figures + [f"{each.name} {each.right.mean():.1%}" for each in last]


def tables(done: list[Evaluation], compared: list[dict[str, Any]]) -> list[str]:
    """Figures, answers and comparisons, those that there are."""
    figures: list[tuple[str, ...]] = [
        (one.name, str(one.record.step), f"{it.loss:.4f}", f"{it.perplexity:.4g}", f"{it.bits_per_byte:.4f}", f"{it.tokens:,}", f"{it.bytes:,}")
        for one in done if (it := one.figures)
    ]  # fmt: skip
    answers: list[tuple[str, ...]] = [
        (each.name, each.format, f"{len(each.right):,}", one.name, *share(each.right), *share(each.right_by_length))
        for row in zip(*[one.answers for one in done], strict=True)
        for one, each in zip(done, row, strict=True)
    ]
    differ: list[tuple[str, ...]] = [
        (shown(row["checkpoint"]), row["figure"], *evidence(row), f"{row['p']:.2g}") for row in compared
    ]
    heads = (
        ("checkpoint", "step", "loss", "perplexity", "bits/byte", "tokens", "bytes"),
        ("benchmark", "format", "items", "checkpoint", "accuracy", "95 % interval", "by length", "95 % interval"),
        (f"compared with {done[0].name}", "", "difference", "rests on", "p"),
    )
    texts = "\n".join(dict.fromkeys(where(one.text) for one in done if one.text))
    shown_ones = [table([head, *rows]) for head, rows in zip(heads, (figures, answers, differ), strict=True) if rows]
    return [texts, *shown_ones] if texts else shown_ones


def where(text: Text) -> str:
    """Which text it is."""
    part = f" from character {text.start:,} on" if text.start else ""
    return f"measured on {shown(text.corpus.source)}{part} (sha256 {text.scan.sha256[:12]})"


def share(right: np.ndarray | None) -> tuple[str, str]:
    """The share of items that are right, and its interval."""
    if right is None:
        return "", ""
    low, high = wilson(int(right.sum()), len(right))
    return f"{right.mean():.1%}", f"{low:.1%} to {high:.1%}"


def evidence(row: dict[str, Any]) -> tuple[str, str]:
    """A difference, and the interval or the items that it rests on."""
    if "interval" in row:
        return f"{row['difference']:+.4f}", "{:+.4f} to {:+.4f} (95 %)".format(*row["interval"])
    return (
        f"{row['difference']:+.1%}",
        f"{row['only_it']} items only it has right, {row['only_the_other']} only the other",
    )


def as_json(one: Evaluation) -> dict[str, Any]:
    """Everything measured of one checkpoint, as JSON values."""
    values: dict[str, Any] = {name: getattr(one.record, name) for name in ("model_type", "step", "run_id", "save_id")}
    values = {"path": str(one.record.path)} | values
    if one.figures and one.text:
        names = ("loss", "perplexity", "bits_per_byte", "tokens", "bytes")
        values["standard"] = {name: getattr(one.figures, name) for name in names}
        if not math.isfinite(one.figures.perplexity):
            values["standard"]["perplexity"] = None  # JSON has no infinity
        text = {"source": one.text.corpus.source, "sha256": one.text.scan.sha256, "first_character": one.text.start}
        values["standard"]["text"] = text
    values["benchmarks"] = [
        {"name": each.name, "format": each.format, "items": len(each.right)}
        | share_as_json("accuracy", each.right)
        | share_as_json("accuracy_by_length", each.right_by_length)
        for each in one.answers
    ]
    return values


def share_as_json(name: str, right: np.ndarray | None) -> dict[str, Any]:
    """The share of items that are right, and its 95 % interval; nothing if there is none."""
    if right is None:
        return {}
    return {name: float(right.mean()), f"{name}_interval": wilson(int(right.sum()), len(right))}


def write_json(path: Path, values: dict[str, Any], log: Log) -> None:
    """The figures as a file that is there whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(values, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    log(f"wrote {shown(path)}")


if __name__ == "__main__":
    sys.exit(guarded(main, SETTINGS))
