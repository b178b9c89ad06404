"""Random settings, interruptions and what people do in between, each compared with the same training left alone.

    python tests/soak_exact.py 500          # 500 settings from seed 0
    python tests/soak_exact.py 1 1234       # setting 1234 again

A setting is drawn, trained to its end, and trained again in pieces: signals and kills at random steps and at random
writes; between them checkpoints are renamed, copied, converted, pruned and damaged, the text is moved, and the layout
is changed. Tensors, metrics, samples and best/ must be equal, copies must be there, and no temporary file may be left.
"""

import contextlib
import io
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from drive import environment, tensor_bytes  # noqa: E402

import training  # noqa: E402
from milepost import api, ckpt, config  # noqa: E402
from milepost.ckpt import Checkpoint, CheckpointError, Found  # noqa: E402
from milepost.run import text as run_text  # noqa: E402
from milepost.runtime.progress import Log, read_metrics  # noqa: E402

# Settings that may be recorded otherwise: what people changed in between, and what a resume takes over as it was
# resolved.
MAY_DIFFER = ("TRAINING_DATA_SOURCE", "CHECKPOINT_LAYOUT", "COMPILE", "DTYPE", "TOKENIZER")
WRITES = ("fsync", "replace", "rename", "link", "unlink", "open")  # calls of os at which a kill may come
LAYOUTS = ("unified", "separated", "directory", "stepfiles", "consolidated", "huggingface")
CHOICES: dict[str, list[str]] = {
    "MODEL_TYPE": ["gpt2", "gpt2", "gpt2", "bigram"],
    "TOKENIZER": ["char", "char", "byte", "bpe"],
    "BPE_VOCAB_SIZE": ["300"],
    "OPTIMIZER": ["adamw", "muon"],
    "LR_SCHEDULE": ["constant", "cosine", "linear", "wsd"],
    "WARMUP_STEPS": ["0", "3"],
    "DROPOUT": ["0", "0.2"],
    "BIAS": ["true", "false"],
    "BATCH_SIZE": ["2", "4"],
    "GRADIENT_ACCUMULATION_STEPS": ["1", "2"],
    "GRAD_CLIP": ["0", "0.5"],
    "DTYPE": ["float32", "bfloat16"],
    "SEED": ["1", "99"],
    "TRAINING_STEPS": ["9", "12"],
    "VALIDATION_FRACTION": ["0.1", "0.1", "0"],
    "EVAL_INTERVAL": ["0", "2", "3"],
    "SAMPLE_INTERVAL": ["0", "4"],
    "LOG_INTERVAL": ["1", "2"],
    "TEMPERATURE": ["0", "0.8", "2"],
    "CHECKPOINT_INTERVAL": ["1", "2", "3", "5"],
    "CHECKPOINT_LAYOUT": list(LAYOUTS),
    "CHECKPOINT_KEEP_LAST": ["0", "1", "2"],
    "CHECKPOINT_KEEP_BEST": ["0", "1", "2"],
    "CHECKPOINT_ASYNC": ["true", "false"],
    "CHECKPOINT_PREFIX": ["", "mine"],
    "REPLAY_CHECK_INTERVAL": ["0", "1", "2", "1000"],
    "TTT_LAYERS": ["", "", "", "0,1"],
}


def drawn(rng: random.Random) -> dict[str, str]:
    """Return settings drawn at random, without combinations that are refused."""
    settings = {name: rng.choice(values) for name, values in CHOICES.items()}
    if settings["MODEL_TYPE"] == "bigram":
        settings |= {"OPTIMIZER": "adamw", "TTT_LAYERS": "", "N_LAYER": "", "N_HEAD": "", "N_EMBD": ""}
    if settings["TTT_LAYERS"] and settings["CHECKPOINT_LAYOUT"] == "huggingface":
        settings["CHECKPOINT_LAYOUT"] = "unified"
    return settings


# ---------------------------------------------------------------------------------------------------------------------
# Train in a process of its own, which may be interrupted.


def trained(folder: Path, settings: dict[str, str], *, interrupt: Callable[[], None] | None = None) -> tuple[int, str]:
    """Train in a fork of this process; return its exit code (negative: the signal that ended it) and stderr."""
    said = folder / "said.txt"
    child = os.fork()
    if child == 0:
        code = 1
        with open(said, "w", encoding="utf-8") as stream, contextlib.redirect_stdout(io.StringIO()):
            try:
                run_text.CACHE_FOLDER = folder / "cache"
                if interrupt:
                    interrupt()
                code = training.guarded(training.main, config.read(environment(folder, **settings)), log=Log(stream))
            except BaseException:
                traceback.print_exc(file=stream)
        os._exit(code)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status), said.read_text(encoding="utf-8")


def at_step(number: int, sign: signal.Signals) -> Callable[[], None]:
    """Return a function that makes this process send itself a signal before its `number`-th step."""

    def arm() -> None:
        real, count = training.training_step, 0

        def step(*args: Any) -> Any:
            nonlocal count
            count += 1
            if count == number:
                os.kill(os.getpid(), sign)
            return real(*args)

        training.training_step = step

    return arm


def at_write(number: int) -> Callable[[], None]:
    """Return a function that makes this process kill itself at its `number`-th call of WRITES."""

    def arm() -> None:
        count = 0

        def counted(real: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                nonlocal count
                count += 1
                if count == number:
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*args, **kwargs)

            return call

        for name in WRITES:
            setattr(os, name, counted(getattr(os, name)))

    return arm


def interruption(rng: random.Random) -> tuple[str, Callable[[], None]]:
    """Return an interruption, and its name."""
    if rng.random() < 0.5:
        number = rng.randint(20, 600)
        return f"kill at write {number}", at_write(number)
    sign, number = rng.choice([signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGKILL]), rng.randint(1, 8)
    return f"{sign.name} at step {number}", at_step(number, sign)


# ---------------------------------------------------------------------------------------------------------------------
# What people do between interruptions. Each returns further settings of all that follows.


def regular(folder: Path) -> list[Found]:
    """Return the readable checkpoints outside best/, oldest first."""
    found = ckpt.find(folder / "checkpoints")
    return [each for each in found if not each.problem and "best" not in each.path.parts]


def rename(folder: Path, rng: random.Random) -> dict[str, str]:
    """Give the newest checkpoint a name of the user's own."""
    if (found := regular(folder)) and found[-1].layout in ("unified", "directory"):
        path = found[-1].path
        path.rename(path.with_name(f"my favourite {rng.randrange(1000)}{path.suffix}"))
    return {}


def copy(folder: Path, rng: random.Random) -> dict[str, str]:
    """Copy a checkpoint under a name of the user's own; it must be there at the end."""
    if (found := regular(folder)) and found[-1].layout == "unified":
        path = rng.choice(found).path
        shutil.copy(path, path.with_name(f"{path.stem}-keep.pt"))
    return {}


def convert(folder: Path, rng: random.Random) -> dict[str, str]:
    """Convert the newest checkpoint, beside it."""
    if found := regular(folder):
        with contextlib.suppress(CheckpointError):  # to a layout that cannot hold it
            ckpt.convert(found[-1].path, None, layout=rng.choice(LAYOUTS))
    return {}


def prune(folder: Path, rng: random.Random) -> dict[str, str]:
    """Prune by hand."""
    if regular(folder):
        api.prune(folder / "checkpoints", keep_last=rng.randint(1, 2))
    return {}


def damage(folder: Path, rng: random.Random) -> dict[str, str]:
    """Flip a bit of the newest checkpoint, where there is another to fall back on."""
    if len(found := regular(folder)) > 1:
        path = found[-1].path
        files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
        file = max(files, key=lambda each: each.stat().st_size)
        content = bytearray(file.read_bytes())
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        replacement = file.with_name("damaged")  # not in place: best/ may be a link to the same bytes
        replacement.write_bytes(content)
        replacement.rename(file)
    return {}


def move_text(folder: Path, rng: random.Random) -> dict[str, str]:
    """Move the text to another name; what training writes anew under its first name is no longer the text."""
    name = folder / f"moved{rng.randrange(1000)}.txt"
    texts = [path for path in folder.glob("*.txt") if path.name != "said.txt"]
    text = max(texts, key=lambda path: path.name.startswith("moved"))
    text.rename(name)
    return {"TRAINING_DATA_SOURCE": str(name)}


def change_layout(folder: Path, rng: random.Random) -> dict[str, str]:
    """Save in another layout from now on."""
    return {"CHECKPOINT_LAYOUT": rng.choice(LAYOUTS[:-1])}


ACTIONS = [rename, copy, convert, prune, damage, move_text, change_layout]


# ---------------------------------------------------------------------------------------------------------------------
# Compare.


def intact(folder: Path) -> Iterator[Checkpoint]:
    """Yield the checkpoints whose every byte is as it was written, oldest save first."""
    for found in ckpt.find(folder / "checkpoints"):
        with contextlib.suppress(CheckpointError):
            yield ckpt.load(found.path, verify=True)


def result(folder: Path, steps: int) -> dict[str, Any]:
    """Return what a finished training left that must be equal: of the run of its newest checkpoint at the last step."""
    records = list(intact(folder))
    last = [record for record in records if record.step == steps][-1]
    run = folder / "runs" / str(last.run_id)
    lines = [
        {name: value for name, value in line.items() if name not in ("time", "tok_s", "run_id")}
        for line in read_metrics(run / "metrics.jsonl")
    ]
    own = [record for record in records if record.run_id == last.run_id and record.validation_loss is not None]
    best = min(own, key=lambda each: (each.validation_loss, each.step), default=None)
    return {
        "tensors": tensor_bytes(last),
        "hyperparameters": {k: v for k, v in last.hyperparameters.items() if k not in MAY_DIFFER},
        "progress": (last.step, last.tokens_seen, last.best_step, last.best_loss, last.validation_loss, last.schedule),
        "metrics": lines,
        "samples": {path.name: path.read_text(encoding="utf-8") for path in sorted(run.glob("samples/*"))},
        "best": best and (best.step, best.validation_loss, tensor_bytes(best)),
    }


def leftovers(folder: Path) -> list[str]:
    """Return the hidden files that a finished training should not leave: of its checkpoints its own, in its runs none.

    A run that was killed before its first save is never resumed, and keeps what was there.
    """
    hidden = [path for path in (folder / "checkpoints").rglob(".*") if ".tmp" in path.name or ".owner" in path.name]
    saved = {found.run_id for found in ckpt.find(folder / "checkpoints")}
    hidden += [path for run in saved for path in (folder / "runs" / str(run)).rglob(".*") if path.name != ".lock"]
    return sorted(str(path.relative_to(folder)) for path in hidden)


def differences(whole: dict[str, Any], pieces: dict[str, Any]) -> list[str]:
    """Return what differs, by name; of settings and samples, which."""
    wrong = []
    for name, value in whole.items():
        other = pieces[name]
        if value != other and name in ("hyperparameters", "samples"):
            keys = [key for key in value.keys() | other.keys() if value.get(key) != other.get(key)]
            wrong.append(f"{name}: {', '.join(f'{k} {value.get(k)!r:.40} {other.get(k)!r:.40}' for k in sorted(keys))}")
        elif value != other:
            wrong.append(name)
    return wrong


def attempt(number: int, place: Path, did: list[str]) -> list[str]:
    """Return what went wrong with setting `number`; append what was done to `did`."""
    rng = random.Random(number)
    settings = drawn(rng)
    whole, pieces = place / "whole", place / "pieces"
    for folder in (whole, pieces):
        folder.mkdir(parents=True)
    code, said = trained(whole, settings)
    did.append(json.dumps(settings))
    if code:
        return [f"uninterrupted: exit code {code}: {said[-500:]}"]
    copies: set[Path] = set()
    more: dict[str, str] = {}
    for _ in range(rng.randint(1, 4)):
        name, interrupt = interruption(rng)
        code, said = trained(pieces, settings | more | {"RESUME": "auto"}, interrupt=interrupt)
        did.append(f"{name}: exit code {code}")
        if code not in (0, 130, -signal.SIGKILL):
            return [f"exit code {code}: {said[-800:]}"]
        if "not bit-exact" in said:
            return [line for line in said.splitlines() if "not bit-exact" in line]
        if rng.random() < 0.6:
            action = rng.choice(ACTIONS)
            more |= action(pieces, rng)
            did.append(action.__name__)
        copies.update((pieces / "checkpoints").glob("*keep.pt"))
    code, said = trained(pieces, settings | more | {"RESUME": "auto"})
    did.append(f"to the end: exit code {code}")
    if code:
        return [f"exit code {code}: {said[-800:]}"]
    steps = int(settings["TRAINING_STEPS"])
    wrong = differences(result(whole, steps), result(pieces, steps))
    wrong += [f"lost: {path.name}" for path in copies if not path.exists()]
    return wrong + [f"left: {name}" for name in leftovers(pieces)]


def main(count: int, first: int) -> int:
    """Try `count` settings from number `first`; return how many failed."""
    torch.set_num_threads(1)  # without a pool of threads a process may fork
    failed = 0
    for number in range(first, first + count):
        with tempfile.TemporaryDirectory(prefix="soak-") as place:
            did: list[str] = []
            try:
                wrong = attempt(number, Path(place), did)
            except Exception:
                wrong = [traceback.format_exc()]
        if wrong:
            failed += 1
            print(f"setting {number}: {'; '.join(wrong)}\n  " + "\n  ".join(did), flush=True)
        print(f"{number - first + 1} settings, {failed} failed", file=sys.stderr)
    return failed


if __name__ == "__main__":
    sys.exit(min(1, main(int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0)))
