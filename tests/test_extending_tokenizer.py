"""A tokenizer from outside the package: one file and one line, and everything works with it."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import programs
import pytest
from drive import ROOT, at_step, environment, logged, newest, tensor_bytes
from script import NOTHING_OF_TRAINING
from work import HANGING

from milepost import ckpt
from milepost.text.registry import TOKENIZERS

TOY = '''
from milepost.text.errors import UnknownCharacters
from milepost.text.tokenization.base import Tokenizer, checked_ids
import numpy as np


class PairTokenizer(Tokenizer):
    """One token per pair of characters; a last character without a partner is a token of its own."""

    kind = "pairs"

    def __init__(self, chars):
        self.chars = chars
        self.tokens = [*chars, *(a + b for a in chars for b in chars)]
        self.ids = {token: i for i, token in enumerate(self.tokens)}
        self.vocab_size = len(self.tokens)

    @classmethod
    def build(cls, pieces, *, alphabet, documents, vocab_size):
        return cls("".join(sorted({*alphabet, "\\n"})))

    @classmethod
    def from_dict(cls, saved):
        return cls(saved["chars"])

    def to_dict(self):
        return {"kind": "pairs", "chars": self.chars}

    def encode_array(self, text):
        if unknown := {*text} - {*self.chars}:
            raise UnknownCharacters("".join(sorted(unknown)), len(self.chars))
        return np.array([self.ids[text[i : i + 2]] for i in range(0, len(text), 2)], dtype=np.uint32)

    def decode_bytes(self, ids):
        return "".join(self.tokens[i] for i in checked_ids(ids, self.vocab_size)).encode()
'''
LINE = 'TOKENIZERS["pairs"] = "pairs:PairTokenizer"'
# Runs a script of the project with the toy registered; a number behind the script kills the process before that step.
DRIVER = f"""
import os, runpy, signal, sys
sys.path[:0] = [{str(ROOT)!r}, os.path.dirname(__file__)]
from milepost.text.registry import TOKENIZERS
{LINE}
_, script, *fatal = sys.argv
if fatal:
    from milepost.text.batches import Batches
    at = Batches.at
    def kill_or_at(self, step):
        return os.kill(os.getpid(), signal.SIGKILL) if step == int(fatal[0]) else at(self, step)
    Batches.at = kill_or_at
sys.argv = [script]
runpy.run_path(script, run_name="__main__")
"""
SETTINGS = {"TOKENIZER": "pairs", "CHECKPOINT_INTERVAL": "2", "CHECKPOINT_ASYNC": "false"}
STEPS, KILLED = 8, 5


def run(place: Path, script: str, folder: Path, *arguments: str, **changes: object) -> subprocess.CompletedProcess[str]:
    """Run a script with the toy of `place` as a user would, with output below `folder`."""
    folder.mkdir(exist_ok=True)
    base = {name: os.environ[name] for name in ("PATH", "HOME", "TMPDIR", "OMP_WAIT_POLICY") if name in os.environ}
    changes = {name: None if value is None else str(value) for name, value in changes.items()}
    command = [sys.executable, str(place / "driver.py"), str(ROOT / script), *arguments]
    env = base | environment(folder, **changes)
    return programs.run(command, env=env, cwd=place, capture_output=True, text=True, timeout=HANGING, check=False)


def look(place: Path, script: str, folder: Path, **changes: object) -> subprocess.CompletedProcess[str]:
    """Run a script that takes no settings of a training."""
    return run(place, script, folder, **NOTHING_OF_TRAINING | changes)


def install(place: Path, toy: str = TOY) -> Path:
    (place / "pairs.py").write_text(toy, encoding="utf-8")
    (place / "driver.py").write_text(DRIVER, encoding="utf-8")
    return place


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the toy, a run without interruption, and a run that was killed and resumed."""
    place = install(tmp_path_factory.mktemp("extending"))
    done = run(place, "training.py", place / "straight", **SETTINGS)
    assert done.returncode == 0, done.stderr
    done = run(place, "training.py", place / "killed", str(KILLED), **SETTINGS)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert newest(place / "killed").step == KILLED - 1
    done = run(place, "training.py", place / "killed", **SETTINGS, RESUME="auto")
    assert done.returncode == 0, done.stderr
    return place


def test_the_toy_is_small_and_not_in_the_package(place: Path) -> None:
    assert len(TOY.strip().splitlines()) <= 40
    assert len(LINE.splitlines()) == 1
    assert "pairs" not in TOKENIZERS


def test_a_killed_run_resumes_bit_exactly(place: Path) -> None:
    straight, killed = newest(place / "straight"), newest(place / "killed")
    assert (straight.step, killed.step) == (STEPS, STEPS)
    assert straight.tokenizer is not None
    assert straight.tokenizer["kind"] == "pairs"
    assert straight.model_settings["vocab_size"] == len(straight.tokenizer["chars"]) * (
        len(straight.tokenizer["chars"]) + 1
    )
    assert tensor_bytes(straight) == tensor_bytes(killed)
    assert logged(place / "straight") == logged(place / "killed")
    assert tensor_bytes(ckpt.load(at_step(place / "killed", KILLED - 1))) != tensor_bytes(killed)  # the control


GENERATE = {"PROMPT": "Dear", "TEMPERATURE": "0", "MAX_NEW_TOKENS": "6", "SAMPLE_SEED": "1"}


@pytest.mark.parametrize("layout", ["directory", "sharded"])
def test_it_is_converted_and_generated_from(place: Path, layout: str, tmp_path: Path) -> None:
    source = at_step(place / "straight", STEPS)
    settings = {"CHECKPOINT_PATH": source, "CHECKPOINT_LAYOUT": layout, "OUTPUT": tmp_path / "converted"}
    done = look(place, "scripts/convert_checkpoint.py", tmp_path, **settings)
    assert done.returncode == 0, done.stderr
    (found,) = ckpt.find(tmp_path / "converted")
    assert ckpt.load(found.path).tokenizer == newest(place / "straight").tokenizer
    texts = [
        look(place, "scripts/load_checkpoint.py", tmp_path, CHECKPOINT_PATH=path, **GENERATE)
        for path in (source, found.path)
    ]
    assert [done.returncode for done in texts] == [0, 0], texts[1].stderr
    assert texts[0].stdout == texts[1].stdout
    assert re.fullmatch(r"Dear.{12}\n", texts[0].stdout, re.DOTALL)  # six pairs


def test_it_is_listed_and_inspected(place: Path) -> None:
    done = look(place, "scripts/list_checkpoints.py", place / "straight")
    assert done.returncode == 0, done.stderr
    assert at_step(place / "straight", STEPS).name in done.stdout
    done = look(place, "scripts/inspect_checkpoint.py", place / "straight")
    assert done.returncode == 0, done.stderr
    assert "pairs" in done.stdout


def test_a_layout_of_other_programs_refuses_it(place: Path, tmp_path: Path) -> None:
    source = at_step(place / "straight", STEPS)
    settings = {"CHECKPOINT_PATH": source, "CHECKPOINT_LAYOUT": "huggingface", "OUTPUT": tmp_path / "converted"}
    done = look(place, "scripts/convert_checkpoint.py", tmp_path, **settings)
    assert done.returncode == 3
    assert "pairs" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


# Controls


def test_a_missing_method_is_named(tmp_path: Path) -> None:
    install(tmp_path, TOY.replace("def decode_bytes", "def _decode_bytes"))
    done = run(tmp_path, "training.py", tmp_path / "run", **SETTINGS)
    assert done.returncode == 2
    assert re.search(r"^error: .*pairs\.PairTokenizer does not define decode_bytes\b", done.stderr.splitlines()[-1])
    assert not list((tmp_path / "run").glob("checkpoints/*"))


def test_a_checkpoint_is_not_called_damaged_because_a_method_is_missing(place: Path, tmp_path: Path) -> None:
    install(tmp_path, TOY.replace("def decode_bytes", "def _decode_bytes"))
    source = at_step(place / "straight", STEPS)
    done = look(tmp_path, "scripts/load_checkpoint.py", tmp_path / "run", CHECKPOINT_PATH=source, **GENERATE)
    assert done.returncode == 2
    assert re.search(r"^error: .*pairs\.PairTokenizer does not define decode_bytes\b", done.stderr.splitlines()[-1])


def test_without_its_line_the_name_is_refused_with_the_registered_ones(tmp_path: Path) -> None:
    install(tmp_path)
    (tmp_path / "driver.py").write_text(DRIVER.replace(LINE, ""), encoding="utf-8")
    done = run(tmp_path, "training.py", tmp_path / "run", **SETTINGS)
    assert done.returncode == 2
    assert re.search(f"TOKENIZER='pairs'.*: expected one of auto, {', '.join(TOKENIZERS)}$", done.stderr.strip())


def test_reading_the_settings_imports_no_tokenizer() -> None:
    code = "import sys; import milepost.config; print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "milepost.text.registry" in modules.stdout.split()
    assert not {"torch", "numpy", "tiktoken", "tokenizers"} & set(modules.stdout.split())
