"""Measure one checkpoint, or several side by side: loss, perplexity and bits per byte on a text, accuracy on benchmarks.

CHECKPOINT_PATH=latest python3 scripts/evaluate_checkpoint.py
CHECKPOINT_PATH=best,latest EVAL_TYPE=both EVAL_DATA=letters.txt BENCHMARK_DATA=blimp/*.jsonl OUTPUT=figures.json python3 scripts/evaluate_checkpoint.py
"""

import sys

sys.path.insert(0, __file__.rpartition("scripts")[0])  # runs from any folder, without installing
from milepost import config

READS = (
    "CHECKPOINT_PATH", "EVAL_TYPE", "EVAL_DATA", "BENCHMARK_DATA", "OUTPUT", "EVAL_STRIDE", "BATCH_SIZE", "DEVICE", "DEVICE_CHECK", "DTYPE", "DETERMINISTIC",
    "CHECKPOINT_DIR", "CACHE_GB", "BASE_CHECKPOINT", "GPT2_MODEL_NAME", "INIT_FROM", "TRAINING_DATA_SOURCE", "TEXT_FIELD", "DOCUMENT_SEPARATOR", "UNKNOWN_CHARACTERS", "PROMPT_FIELD", "ANSWER_FIELD", "TOKENIZER",
    "FORMAT", "N_HEAD",
)  # fmt: skip
SETTINGS = config.from_command_line(__name__, __doc__, READS)  # before torch is imported

import dataclasses
import json
import os
from pathlib import Path
from typing import cast

import torch

from milepost import ckpt
from milepost.ckpt import Checkpoint, CheckpointError
from milepost.ckpt.record import VERSION
from milepost.ckpt.restore import build_model, build_tokenizer, merged
from milepost.cli import guarded
from milepost.config import Config, ConfigError
from milepost.evaluate.choices import Benchmark, read_benchmark
from milepost.evaluate.evaluation import Evaluation, NotFiniteError, compare, evaluate
from milepost.evaluate.passages import Text
from milepost.evaluate.report import as_json, summary, tables
from milepost.evaluate.scoring import rows_at_once
from milepost.files import replacing
from milepost.remote import local
from milepost.resume import saved_settings
from milepost.run import (
    completed,
    device_problem,
    open_source,
    reading_of,
    refuse_weights,
    refused,
    scan_source,
    scan_text,
    with_its_base,
)
from milepost.runtime import hardware
from milepost.runtime.progress import Log, shown
from milepost.screen import write_json, write_stdout
from milepost.text.conversations import as_pieces
from milepost.text.errors import DataError, UnknownCharacters
from milepost.text.known import Known, has_carriage_returns, known_text
from milepost.text.templates import template_of
from milepost.text.token_files import split_at
from milepost.text.unknown import Lenient, Mode, occurrences, stand_in, told, unknown_characters
from models.model import Model


def main(settings: Config, log: Log) -> int:
    """Measure the checkpoints of CHECKPOINT_PATH, print tables, write all figures to OUTPUT, and return the exit code."""
    check(settings, log)
    settings = local(settings, log, every=True)
    paths, notes = ckpt.several(settings.checkpoint_path, Path(settings.checkpoint_dir))
    for note in notes:
        log(note)
    device = hardware.choose_device(settings.device)
    hardware.make_deterministic(settings.deterministic, device)
    dtype = hardware.choose_dtype("float32" if settings.dtype == "auto" else settings.dtype, device, width=0)
    records = [load(path, settings, log) for path in paths]
    texts = [text_for(record, settings, log) if settings.eval_type != "benchmark" else None for record in records]
    benchmarks = read_benchmarks(settings) if settings.eval_type != "standard" else []
    texts = [text and readable(record, text, settings, log) for record, text in zip(records, texts, strict=True)]
    for record, text in zip(records, texts, strict=True):
        check_characters(record, text, benchmarks)
    done: list[Evaluation] = []
    for record, text in zip(records, texts, strict=True):
        model = build_model(record, device=device, shared=True).eval()
        check_device(model, settings, device=device, dtype=dtype)
        with hardware.autocast(device, dtype):
            done.append(evaluate_record(record, model, text, benchmarks, settings, log))
        del model  # before the next one is built
        log(summary(done[-1]))
    comparisons = [row for other in done[1:] for row in compare(done[0], other, log=log)]
    how = {"milepost": VERSION, "device": device.type, "dtype": dtype, "eval_stride": settings.eval_stride}
    figures = how | {"checkpoints": [as_json(evaluation) for evaluation in done], "comparisons": comparisons}
    if settings.format == "json":
        write_json(figures)
    else:
        write_stdout(tables(done, comparisons))
    if settings.output:
        with replacing(Path(settings.output)) as temporary:
            temporary.write_text(json.dumps(figures, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        log(f"wrote {shown(settings.output)}")
    return 0


def check(settings: Config, log: Log) -> None:
    """Raise ConfigError for settings that would fail, or overwrite something, after a long time of measuring."""
    problems = []
    if settings.eval_type != "standard" and settings.benchmark_data is None:
        problems.append(f"EVAL_TYPE={settings.eval_type} needs questions: set BENCHMARK_DATA to their files")
    output = Path(settings.output or "figures.json")
    if output.suffix != ".json" or output.is_dir():
        problems.append(f"OUTPUT={output}: the figures are written as JSON; set a file name that ends in .json")
    elif settings.output and not (output.parent.is_dir() and os.access(output.parent, os.W_OK)):
        problems.append(f"OUTPUT={output}: cannot write to {output.parent}; set an existing, writable folder")
    if problems:
        raise ConfigError(problems)


def load(path: Path, settings: Config, log: Log) -> Checkpoint:
    """Return the checkpoint at `path` with tokenizer, base and merged adapters, without optimizer state."""
    record = with_its_base(ckpt.load(path, optimizer=False), settings, log)
    record = merged(completed(record, settings, log))
    for note in record.notes:
        log(note)
    return record


def text_for(record: Checkpoint, settings: Config, log: Log) -> Text:
    """Return EVAL_DATA, else the validation part of the checkpoint's own text. Raise DataError if there is none."""
    known = known_text(record.data, record.tokenizer)
    if settings.eval_data is not None:
        asked = config.from_saved(settings, saved_settings(record))
        found = scan_source(settings.eval_data, log, reading=reading_of(asked), known=known)
        refuse_weights(found[0])
        return Text(*found, start=0)
    name, fraction = shown(record.path or ""), record.data.get("validation_fraction")
    if "validation_sha256" in record.data:
        return given_validation(record, settings, log)
    if not fraction:
        reason = "does not record its training text" if fraction is None else "was trained without validation text"
        raise DataError(f"{name} {reason}: set EVAL_DATA to the text to measure it on")
    corpus, scanned = scan_text(config.from_saved(settings, saved_settings(record)), log, known)
    if scanned.sha256 != record.data.get("sha256"):
        remedy = "set EVAL_DATA, or TRAINING_DATA_SOURCE to that text"
        raise DataError(f"{shown(corpus.source)} is not the text that {name} was trained on: {remedy}")
    if corpus.parts:
        problem = f"{name} was trained on a mixture, of which a part of each source is validated on"
        raise DataError(f"{problem}: set EVAL_DATA to the text to measure it on")
    size = scanned.documents if corpus.reading.form else scanned.characters
    size = corpus.prepared.count if corpus.prepared else size
    return Text(corpus, scanned, start=split_at(size, fraction))


def given_validation(record: Checkpoint, settings: Config, log: Log) -> Text:
    """Return the text of its own that the checkpoint was validated on. Raise DataError if it has changed."""
    asked = config.from_saved(settings, saved_settings(record))
    known = Known(carriage_returns=has_carriage_returns(record.tokenizer))
    corpus, scanned = scan_source(asked.validation_data or "", log, reading=reading_of(asked), known=known)
    if scanned.sha256 != record.data["validation_sha256"]:
        problem = f"{shown(corpus.source)} is not the text that {shown(record.path or '')} was validated on"
        raise DataError(f"{problem}: set EVAL_DATA")
    return Text(corpus, scanned)


def read_benchmarks(settings: Config) -> list[Benchmark]:
    """Return the benchmark in each file of BENCHMARK_DATA."""
    corpus = open_source(settings.benchmark_data or "")
    refuse_weights(corpus)
    return [read_benchmark(path) for path in corpus.paths]


def readable(record: Checkpoint, text: Text, settings: Config, log: Log) -> Text:
    """Return the text as UNKNOWN_CHARACTERS has it read with the checkpoint's vocabulary: as in the run, unless it is set."""
    tokenizer, settings = build_tokenizer(record), config.from_saved(settings, saved_settings(record))
    unknown = unknown_characters(tokenizer, text.scan.alphabet)
    if not unknown or settings.unknown_characters == "refuse":
        return text
    character, done = stand_in(tokenizer, unknown, cast(Mode, settings.unknown_characters))
    pieces = (
        as_pieces(("", talk) for talk in text.talks()) if text.is_talks else ((part, True) for part in text.passages())
    )
    log(f"{shown(text.corpus.source)}: {told(occurrences(pieces, unknown), done)}")
    return dataclasses.replace(text, stand_ins=dict.fromkeys(map(ord, unknown), character))


def check_characters(record: Checkpoint, text: Text | None, benchmarks: list[Benchmark]) -> None:
    """Raise DataError naming the characters that the checkpoint's vocabulary lacks, before anything is measured."""
    tokenizer = build_tokenizer(record)
    remedy = "use another text, or a checkpoint with TOKENIZER=byte, bpe or gpt2"
    alphabets = (
        [(text.corpus.source, text.alphabet, f"set UNKNOWN_CHARACTERS=skip or replace, {remedy}")] if text else []
    )
    alphabets += [(str(benchmark.path), benchmark.alphabet, remedy) for benchmark in benchmarks]
    for source, alphabet, remedy in alphabets:
        try:
            tokenizer.encode(alphabet)
        except UnknownCharacters as error:
            raise DataError(f"{shown(source)}: {shown(record.path or '')} cannot read it: {error}; {remedy}") from error


def check_device(model: Model, settings: Config, *, device: torch.device, dtype: str) -> None:
    """Raise DeviceError if a batch of windows comes out otherwise on the device than on the CPU."""
    if device.type == "cpu" or not settings.device_check:
        return
    rows = rows_at_once(model, settings.batch_size)
    if problem := device_problem(model, device=device, dtype=dtype, rows=rows, seed=0, backward=False):
        raise refused(device, problem)


def evaluate_record(
    record: Checkpoint, model: Model, text: Text | None, benchmarks: list[Benchmark], settings: Config, log: Log
) -> Evaluation:
    """Return the figures of one checkpoint. Raise CheckpointError if its model's probabilities are not finite."""
    identity = {name: getattr(record, name) for name in ("model_type", "step", "run_id", "save_id")}
    tokenizer = build_tokenizer(record)
    stand_ins = text.stand_ins if text else {}
    try:
        return evaluate(
            model,
            Lenient(tokenizer, "".join(map(chr, stand_ins)), *{*stand_ins.values()}) if stand_ins else tokenizer,
            text,
            benchmarks,
            name=shown(record.path or ""),
            identity={"path": str(record.path)} | identity,
            batch_size=settings.batch_size,
            stride=settings.eval_stride,
            template=template_of(record.data, tokenizer) or None,
            log=log,
        )
    except NotFiniteError as error:
        raise CheckpointError(f"{record.path}: {error}") from error


if __name__ == "__main__":
    sys.exit(guarded(main, SETTINGS, reports=True))
