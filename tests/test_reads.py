"""Every script declares exactly the settings that it reads, and all start with the same lines."""

import ast
import dataclasses
import sys
from pathlib import Path

import pytest
from drive import ROOT, environment
from reads import FIELDS, reads
from script import NOTHING_OF_TRAINING, call, script, train_family

import training
from milepost import config
from milepost.config import VARIABLES, Config

SCRIPTS = [ROOT / "training.py", *sorted((ROOT / "scripts").glob("*.py"))]
BY_SCOPE = {scope: {n for n, v in VARIABLES.items() if v.metadata["scope"] == scope} for scope in config.SCOPES}

# Settings that appear in functions which a script reaches, but that have no effect there.
NO_EFFECT = {
    # The checkpoint brings the model and the adapters: settings that differ are refused or dropped. RESUME and RESUME_STEP belong
    # to training.py; the processes of torchrun share the function that warns about the one, and printed commands undo the other.
    "load_checkpoint": BY_SCOPE["identity"] - {"TOKENIZER", "TRAINING_DATA_SOURCE", "TEXT_FIELD", "DOCUMENT_SEPARATOR", "PROMPT_FIELD", "ANSWER_FIELD", "VALIDATION_FRACTION", "VALIDATION_DATA", "GPT2_MODEL_NAME", "N_HEAD"} | {"RESUME", "RESUME_STEP"},
    # Training again takes the checkpoint's own settings (own_settings), and neither saves nor samples nor forms a group of processes.
    "verify_checkpoint": VARIABLES.keys() - BY_SCOPE["session"] - {"TRAINING_DATA_SOURCE", "VALIDATION_DATA", "N_HEAD"} | {
        "CHECKPOINT_ASYNC", "CHECKPOINT_FALLBACK_DIR", "CHECKPOINT_LAYOUT", "CHECKPOINT_MIRROR", "MIRROR_KEEP_LAST", "MIRROR_MB_S", "DISTRIBUTED", "RUNS_DIR", "RUN_NAME", "TEMPERATURE", "TOP_K", "TOP_P",
        "REPETITION_PENALTY",
    },
}  # fmt: skip


def declared(path: Path) -> set[str]:
    module = training if path.stem == "training" else script(path.stem)
    return {name for names in config.declared(module.READS).values() for name in names}


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_declares_the_settings_that_it_reads(path):
    assert declared(path) == reads(path) - NO_EFFECT.get(path.stem, set())


@pytest.mark.parametrize("name", NO_EFFECT)
def test_settings_without_effect_would_otherwise_be_declared(name):
    """Each list holds nothing that the script does not reach, but for whole scopes."""
    listed = NO_EFFECT[name] & BY_SCOPE["session"]
    assert listed <= reads(ROOT / "scripts" / f"{name}.py")


def test_every_setting_is_read_by_some_script():
    assert set().union(*map(declared, SCRIPTS)) == VARIABLES.keys() - {"ENV_FILE"}


def test_own_settings_drops_the_settings_of_training(tmp_path):
    """This is what NO_EFFECT says of verify_checkpoint."""
    everything = {"SEED": "5", "BATCH_SIZE": "2", "MODEL_TYPE": "gpt2", "EVAL_INTERVAL": "3", "DEVICE": "cpu"}
    settings = config.read(environment(tmp_path, **NOTHING_OF_TRAINING | everything))
    own = script("verify_checkpoint").own_settings(settings)
    dropped = {name for name in VARIABLES if settings.is_set(name) and not own.is_set(name)}
    assert dropped == everything.keys() - {"DEVICE"}


# ---------------------------------------------------------------------------------------------------------------------
# The code that reads is found in the source; these runs show that nothing is read in a way that the search misses.


@pytest.fixture
def read_fields(monkeypatch):
    """The fields of every Config that functions outside milepost.config read from now on."""
    seen: set[str] = set()
    plain = Config.__getattribute__

    def recording(self: Config, name: str) -> object:
        reader = sys._getframe(1).f_globals.get("__name__", "")
        if name in FIELDS and not reader.startswith("milepost.config") and reader != dataclasses.__name__:
            seen.add(FIELDS[name])
        return plain(self, name)

    monkeypatch.setattr(Config, "__getattribute__", recording)
    return seen


RUNS = {
    "load_checkpoint": {"MAX_NEW_TOKENS": "3", "PROMPT": "a"},
    "list_checkpoints": {},
    "inspect_checkpoint": {"COMPARE_WITH": "best"},
    "verify_checkpoint": {"REPLAY": "true"},
    "evaluate_checkpoint": {"EVAL_DATA": "letters.txt"},
    "compare_samples": {"MAX_NEW_TOKENS": "3", "PROMPT": "a"},
    "convert_checkpoint": {"CHECKPOINT_LAYOUT": "directory"},
    "plot_run": {"OUTPUT": "report.html"},
    "prune_checkpoints": {"CHECKPOINT_KEEP_LAST": "1"},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return train_family(tmp_path_factory.mktemp("reads"))


@pytest.mark.parametrize("name", RUNS)
def test_a_run_reads_nothing_undeclared(name, folder, monkeypatch, read_fields):
    monkeypatch.chdir(folder)
    done = call(script(name), folder, **RUNS[name])
    assert done.code == 0, done.err
    assert read_fields
    assert read_fields <= declared(ROOT / "scripts" / f"{name}.py") | NO_EFFECT.get(name, set())


def test_training_reads_nothing_undeclared(tmp_path, read_fields):
    assert training.guarded(training.main, config.read(environment(tmp_path))) == 0
    assert {"EVAL_INTERVAL", "N_LAYER", "BIAS"} <= read_fields  # read by computed names
    assert read_fields <= declared(ROOT / "training.py")


# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", SCRIPTS[1:], ids=lambda path: path.stem)
def test_scripts_start_alike(path):
    """Import path, settings and help take the same four lines in every script, before anything slow is imported."""
    body = ast.parse(path.read_text(encoding="utf-8")).body[1:6]
    assert [ast.unparse(node) for node in body if "READS = " not in ast.unparse(node)] == [
        "import sys",
        "sys.path.insert(0, __file__.rpartition('scripts')[0])",
        "from milepost import config",
        "SETTINGS = config.from_command_line(__name__, __doc__, READS)",
    ]
