"""milepost/lazy.py: what needs no tensors runs without torch and what comes with it, asserted on whole processes."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from drive import ROOT
from records import gpt2_record, save
from work import HANGING

from milepost.ckpt.layouts import WRITERS
from milepost.lazy import Tensor, torch_is_in_use

# Python imports it at its start; at its end it writes what was imported.
AT_EXIT = """
import atexit, sys

atexit.register(lambda: open({seen!r}, "w").write(" ".join(sys.modules)))
"""
HEAVY = {"torch", "numpy", "safetensors", "tokenizers", "tiktoken", "transformers", "matplotlib", "huggingface_hub"}
MOST_MODULES = 400  # that a script imports; torch alone imports 900
SCRIPTS = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "scripts").glob("*.py"))


class Seen(NamedTuple):
    """What a process printed, its exit code, and the modules that it had imported at its end."""

    code: int
    out: str
    err: str
    modules: set[str]

    @property
    def heavy(self) -> set[str]:
        """Those of HEAVY."""
        return self.modules & HEAVY


def run(place: Path, script: str, *arguments: str, **variables: object) -> Seen:
    """Run a script in a process of its own, its folders below `place`."""
    hook = place / "hook"
    hook.mkdir(exist_ok=True)
    (hook / "sitecustomize.py").write_text(AT_EXIT.format(seen=str(hook / "seen")))
    env = {name: os.environ[name] for name in ("PATH", "HOME", "TMPDIR", "LD_LIBRARY_PATH") if name in os.environ}
    env |= {"PYTHONPATH": str(hook), "PYTHON_DOTENV_DISABLED": "1", "CHECKPOINT_DIR": str(place / "checkpoints")}
    env |= {"RUNS_DIR": str(place / "runs")} | {name: str(value) for name, value in variables.items()}
    done = subprocess.run(
        [sys.executable, script, *arguments], cwd=ROOT, env=env, capture_output=True, text=True, check=False, timeout=HANGING
    )  # fmt: skip
    return Seen(done.returncode, done.stdout, done.stderr, set((hook / "seen").read_text().split()))


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Checkpoints of a run, the last of them in every layout, and the metrics of the run."""
    place = tmp_path_factory.mktemp("light")
    (place / "checkpoints").mkdir()
    for step in (1, 2):
        save(place / "checkpoints", step, run_id="one")
    for layout in WRITERS:
        (place / layout).mkdir()
        save(place / layout, 3, layout=layout, run_id="one")
    (place / "runs" / "one").mkdir(parents=True)
    line = {"time": 1000.0, "split": "train", "lr": 0.1, "tok_s": 9.0}
    lines = [line | {"step": step, "loss": 4.0 - step} for step in (1, 2)]
    (place / "runs" / "one" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return place


@pytest.mark.parametrize(("layout", "form"), [("checkpoints", "json"), *((layout, "text") for layout in WRITERS)])
def test_a_list_imports_nothing_heavy(place, layout, form):
    seen = run(place, "scripts/list_checkpoints.py", CHECKPOINT_PATH=place / layout, FORMAT=form)
    assert (seen.code, seen.heavy) == (0, set()), seen.err
    assert len(seen.modules) < MOST_MODULES
    assert "one" in seen.out


# The library of safetensors imports numpy; a char tokenizer or a torch archive needs neither.
NUMPY = {"numpy", "safetensors"}
LISTED_BY_LIBRARY = {"huggingface", "consolidated", "stepfiles"}


@pytest.mark.parametrize("layout", WRITERS)
def test_inspecting_our_own_layouts_imports_no_torch(place, layout):
    seen = run(place, "scripts/inspect_checkpoint.py", CHECKPOINT_PATH=place / layout)
    assert (seen.code, seen.heavy) == (0, NUMPY if layout in LISTED_BY_LIBRARY else set()), seen.err
    assert "Number of tensors: 4" in seen.out


def test_a_plot_on_the_terminal_imports_nothing_heavy(place):
    seen = run(place, "scripts/plot_run.py")
    assert (seen.code, seen.heavy) == (0, set()), seen.err
    assert len(seen.modules) < MOST_MODULES


@pytest.mark.exchange
def test_a_picture_imports_no_torch(place):
    seen = run(place, "scripts/plot_run.py", OUTPUT=place / "curves.png")
    assert (seen.code, "torch" in seen.modules, "matplotlib" in seen.modules) == (0, False, True), seen.err


@pytest.mark.parametrize("dry", ["true", "false"])
def test_pruning_where_nothing_expires_reads_no_weights_and_imports_no_torch(place, dry):
    seen = run(place, "scripts/prune_checkpoints.py", CHECKPOINT_KEEP_LAST=2, DRY_RUN=dry)
    assert (seen.code, seen.heavy, seen.out) == (0, set(), "nothing to delete\n"), seen.err
    assert len(seen.modules) < MOST_MODULES


def test_pruning_imports_torch_to_read_the_weights_of_what_stays(place):
    seen = run(place, "scripts/prune_checkpoints.py", CHECKPOINT_KEEP_LAST=1)
    assert (seen.code, "torch" in seen.modules) == (0, True), seen.err
    assert "step0001" in seen.out


@pytest.mark.parametrize("script", ["training.py", *SCRIPTS])
def test_help_and_a_mistake_in_a_setting_import_nothing_heavy(place, script):
    shown = run(place, script, "--help")
    assert (shown.code, shown.heavy) == (0, set())
    wrong = run(place, script, CHECKPOINT_DIR="", SEED="x", FORMAT="x", CHECKPOINT_PATH="")
    assert (wrong.code, wrong.heavy) == (2, set()), wrong.err
    assert max(len(shown.modules), len(wrong.modules)) < MOST_MODULES


@pytest.mark.parametrize("name", ["list_checkpoints", "inspect_checkpoint", "prune_checkpoints"])
def test_a_wrong_name_imports_nothing_heavy(place, name):
    absent = place / "absent"
    seen = run(place, f"scripts/{name}.py", CHECKPOINT_PATH=absent, CHECKPOINT_DIR=absent, CHECKPOINT_KEEP_LAST=1)
    assert (seen.code in (2, 3), seen.heavy) == (True, set()), seen.err
    assert "absent" in seen.err


def test_a_checkpoint_of_another_program_imports_torch_when_it_is_met(place, tmp_path):
    """Which also shows that the assertions above can fail."""
    torch.save({"model": gpt2_record(1).model_state}, tmp_path / "theirs.pt")
    for script in ("list_checkpoints", "inspect_checkpoint"):
        seen = run(place, f"scripts/{script}.py", CHECKPOINT_PATH=tmp_path, CHECKPOINT_DIR=tmp_path)
        assert "torch" in seen.heavy
        assert len(seen.modules) > MOST_MODULES


# ---------------------------------------------------------------------------------------------------------------------
# The stand-ins themselves.


def python(code: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    env = os.environ | variables
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        check=False,
        timeout=HANGING,
    )


def test_what_is_a_tensor():
    parameter = torch.nn.Parameter(torch.zeros(1))
    assert all(isinstance(each, Tensor) for each in (torch.zeros(2), parameter, torch.zeros(1, device="meta")))
    assert all(isinstance(each, Tensor | int) for each in (torch.zeros(2), 3))
    assert not any(
        isinstance(each, Tensor) for each in (3, None, "torch", torch.Tensor, torch.float32, [torch.zeros(1)])
    )
    assert torch_is_in_use()
    code = "import sys; from milepost.lazy import Tensor; print(isinstance(3, Tensor), 'torch' in sys.modules)"
    assert python(code).stdout == "False False\n"


RACE = """
import sys, threading
from milepost.lazy import np, torch
found, ready = [], threading.Barrier(8)
def use(name):
    ready.wait()
    found.append((torch if name % 2 else np).float32)
threads = [threading.Thread(target=use, args=(name,)) for name in range(8)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
import numpy, torch as real
print(len(found), {numpy.float32, real.float32} == set(found), real is sys.modules["torch"])
"""


def test_threads_may_race_to_the_first_use():
    done = python(RACE)
    assert (done.stdout, done.stderr) == ("8 True True\n", "")


def test_an_import_that_fails_at_the_first_use_fails_as_the_import_itself(tmp_path):
    (tmp_path / "torch.py").write_text("raise OSError('libtorch_cpu.so: cannot open shared object file')")
    names = {"lazy": "from milepost.lazy import torch; torch.zeros", "own": "import torch; torch.zeros"}
    last = {name: python(code, PYTHONPATH=str(tmp_path)).stderr.splitlines()[-1] for name, code in names.items()}
    assert last["lazy"] == last["own"] == "OSError: libtorch_cpu.so: cannot open shared object file"


@pytest.mark.parametrize("layout", ["theirs", *WRITERS])
def test_a_torch_that_cannot_be_imported_is_no_damage_of_a_file(tmp_path, layout):
    """As seen where tensors are read; what needs none goes on without it."""
    (tmp_path / "torch.py").write_text("raise OSError('libtorch_cpu.so: cannot open shared object file')")
    if layout == "theirs":
        torch.save({"model": gpt2_record(1).model_state}, path := tmp_path / "theirs.pt")
    else:
        path = save(tmp_path, 1, layout=layout)
    code = "import sys; from pathlib import Path; from milepost import ckpt; ckpt.load(Path(sys.argv[1]))"
    done = python(code, str(path), PYTHONPATH=str(tmp_path))
    assert done.stderr.splitlines()[-1] == "OSError: libtorch_cpu.so: cannot open shared object file"


SWALLOWED = """
import contextlib, sys
from milepost import cli, config, lazy
if {plain}:
    cli.ending_at_once = contextlib.nullcontext
def action(settings, log):
    lazy.np.zeros
    print("went on")
    return 0
sys.exit(cli.guarded(action, config.read({{}})))
"""


@pytest.mark.parametrize("plain", [False, True])
def test_a_signal_during_the_first_use_ends_the_process(tmp_path, plain):
    """An import may swallow the exception of a signal: `plain`, without the block in which it ends the process at once."""
    swallows = (
        f"import os\ntry: os.kill(os.getpid(), {int(signal.SIGTERM)})\nexcept KeyboardInterrupt: pass\nzeros = 0\n"
    )
    (tmp_path / "numpy.py").write_text(swallows)
    done = python(SWALLOWED.format(plain=plain), PYTHONPATH=str(tmp_path), PYTHON_DOTENV_DISABLED="1")
    assert (done.returncode, done.stdout) == ((0, "went on\n") if plain else (130, "")), done.stderr


def test_training_imports_before_it_starts_what_its_steps_use():
    """So that no first use falls into a step."""
    code = "import sys, training; print({'torch', 'torch.distributed', 'numpy'} <= set(sys.modules))"
    assert python(code).stdout == "True\n"
