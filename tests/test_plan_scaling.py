"""scripts/plan_scaling.py: the examples of docs/scaling.md, the command that it prints, what it refuses, and numbers from end to end of their limits."""

import math
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from drive import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from script import Said, call, script
from torch.distributed import run as torchrun
from work import NoTensorAbove, calls

import models
from milepost import config
from models.gpt2 import SIZES

planner = script("plan_scaling")
PAGE = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```bash\n([^\n]*plan_scaling\.py)\n```\n\n```text\n(.*?)\n```", PAGE, re.DOTALL)
SMALL = {"MODEL_TYPE": "gpt2", "TOKENIZER": "gpt2", "BATCH_SIZE": "16"}
SCALING = [name for name, each in config.VARIABLES.items() if each.metadata["group"] == "Scaling"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("plan")


def plan(folder: Path, **changes: str | None) -> Said:
    return call(planner, folder, **dict.fromkeys(("DEVICE", "CHECKPOINT_DIR", "RUNS_DIR")) | SMALL | changes)


def sections(text: str) -> set[str]:
    return set(re.split(r"\n\n(?==== )", text.rstrip()))


def rows(text: str, section: str) -> dict[str, list[str]]:
    """The lines of a section, by the first of their cells."""
    lines = text.split(f"=== {section}")[1].split("\n\n===")[0].splitlines()[1:]
    return {cells[0]: cells[1:] for cells in (re.split(r" {2,}", line) for line in lines)}


# ---------------------------------------------------------------------------------------------------------------------
# What the page shows.


def test_the_page_has_its_three_examples():
    assert [int(re.search(r"MACHINES=(\d+)", line)[1]) if "MACHINES" in line else 1 for line, _ in EXAMPLES] == [
        1,
        8,
        64,
    ]


@pytest.mark.parametrize(("command", "shown"), EXAMPLES, ids=["8 GPUs", "8 machines", "64 machines"])
def test_the_page_shows_what_is_printed(command, shown, folder):
    """Section for section; a page may leave some out."""
    *assignments, python, name = shlex.split(command)
    assert (python, name) == ("python3", "scripts/plan_scaling.py")
    said = plan(folder, **dict.fromkeys(SMALL) | dict(one.split("=", 1) for one in assignments))
    assert (said.code, said.err) == (0, "")
    assert sections(shown) - sections(said.out) == set()
    assert len(sections(shown)) >= 3
    for figure in re.findall(r"[\d.]+(?=GB| ms| %)", shown):  # any other would be noticed
        assert sections(shown.replace(figure, f"{figure}1")) - sections(said.out) != set()


def test_the_page_names_every_variable_with_its_default():
    table = dict(re.findall(r"^\| (`.*?) \| (.*?) \|", PAGE, re.MULTILINE))
    names = [name for cell in table for name in re.findall(r"`(\w+)`", cell)]
    assert names == SCALING
    defaults = [float(text) for cell in table.values() for text in cell.split(", ")]
    assert defaults == [config.VARIABLES[name].default for name in SCALING]


# ---------------------------------------------------------------------------------------------------------------------
# What is in it.


@pytest.mark.parametrize("name", SIZES)
def test_published_models_have_their_published_size(name, folder):
    said = plan(folder, GPT2_MODEL_NAME=name, BLOCK_SIZE="1024", TOKENIZER=None)
    sizes = {
        "gpt2": "124,439,808",
        "gpt2-medium": "354,823,168",
        "gpt2-large": "774,030,080",
        "gpt2-xl": "1,557,611,200",
    }
    assert rows(said.out, "MODEL AND STEP")["parameters"][0].startswith(sizes[name] + ":")
    plain = {each.upper(): str(getattr(SIZES[name], each)) for each in ("n_layer", "n_head", "n_embd")}
    other = plan(folder, BLOCK_SIZE="1024", DROPOUT="0.1", **plain)
    assert rows(other.out, "DDP OR FSDP") == rows(said.out, "DDP OR FSDP")


def test_a_model_of_a_trillion_weights_takes_no_memory(folder):
    def planned(layers: int) -> Said:
        return plan(folder, N_LAYER=str(layers), N_HEAD="100", N_EMBD="30000")

    with NoTensorAbove(2**20):
        planned(1)  # imports what it needs
        _, ten = calls(lambda: planned(10))
        said, _ = calls(lambda: planned(100), most=11 * ten)
    assert said.code == 0
    count = int(rows(said.out, "MODEL AND STEP")["parameters"][0].split(":")[0].replace(",", ""))
    assert count > 1e12


def test_adapters_send_and_keep_only_themselves(folder):
    adapted = plan(folder, GPT2_MODEL_NAME="gpt2", TOKENIZER=None, LORA_RANK="8", BLOCK_SIZE="1024")
    shape = {"vocab_size": 50257, "block_size": 1024, "n_layer": 12, "n_head": 12, "n_embd": 768}
    lora = {"rank": 8, "alpha": 16.0, "dropout": 0.0, "targets": "c_attn,c_proj,c_fc"}
    model = models.build("gpt2", shape | {"lora": lora})
    models.freeze_base(model)
    trained, count = models.trained_count(model), models.parameter_count(model)
    assert f"{count:,}, {trained:,} of them trained" in adapted.out
    sent = rows(adapted.out, "DDP OR FSDP")["a device sends in its machine"][0]
    assert sent == f"{2 * 4 * trained * 7 / 8 / 1e6:.3g}MB"
    assert rows(adapted.out, "SAVING")["a checkpoint"][0] == f"{4 * (count + 2 * trained) / 1e9:.3g}GB"
    apart = plan(
        folder,
        GPT2_MODEL_NAME="gpt2",
        TOKENIZER=None,
        LORA_RANK="8",
        BLOCK_SIZE="1024",
        CHECKPOINT_ADAPTERS_ONLY="true",
    )
    assert rows(apart.out, "SAVING")["a checkpoint"][0] == f"{12 * trained / 1e6:.3g}MB"


def test_fsdp_is_chosen_just_below_what_ddp_needs(folder):
    need = rows(plan(folder).out, "DDP OR FSDP")["memory of a device"][0].split("MB")[0]
    for factor, word in ((1.01, "ddp"), (0.99, "fsdp")):
        said = plan(folder, DEVICE_MEMORY_GB=str(factor * float(need) / 1000))
        head = said.out.split("=== DDP OR FSDP ===\n")[1].splitlines()[0]
        assert f"{word} (DISTRIBUTED=auto)" in head
        assert ("DISTRIBUTED=fsdp CHECKPOINT_LAYOUT=sharded" in said.out) is (word == "fsdp")
    assert "fsdp, too large" in plan(folder, DEVICE_MEMORY_GB="0.01").out


@pytest.mark.parametrize(("changes", "row"), [({}, 0), ({"CHECKPOINT_ASYNC": "false"}, 1)])
def test_the_interval_of_the_command_is_that_of_the_way_it_saves(changes, row, folder):
    said = plan(folder, TRAINING_STEPS="10000000", **changes)
    table = said.out.split("time lost\n")[1].split("\n\n")[0].splitlines()
    assert f"CHECKPOINT_INTERVAL={re.split(' {2,}', table[row])[5]} " in said.out.split("=== COMMAND")[1]
    assert "CHECKPOINT_INTERVAL=7 " in plan(folder, TRAINING_STEPS="7", **changes).out


@pytest.mark.parametrize("machines", [1, 3])
def test_the_command_can_be_run(machines, folder, monkeypatch):
    """torchrun takes its arguments, and training.py its variables: those that were given, and those of the plan."""
    source = folder / "a text, with a comma.txt"
    said = plan(
        folder,
        MACHINES=str(machines),
        BATCH_SIZE="48",
        TRAINING_DATA_SOURCE=str(source),
        BIAS="false",
        TEMPERATURE="0.5",
    )
    lines = said.out.split("=== COMMAND ===\n")[1].rstrip().splitlines()
    assert lines[0].startswith("# On each machine") is (machines > 1)
    *words, last = shlex.split(" ".join(lines[-2:]).replace("\\", ""))
    assignments = words[: words.index("torchrun")]
    arguments = torchrun.parse_args([*words[words.index("torchrun") + 1 :], last])
    assert (arguments.nproc_per_node, arguments.max_restarts, arguments.training_script) == ("8", 4, "training.py")
    assert arguments.standalone is (machines == 1)
    assert machines == 1 or (arguments.nnodes, arguments.rdzv_backend, arguments.rdzv_endpoint) == (
        "3",
        "c10d",
        "HOST:29400",
    )
    read = config.read({"PYTHON_DOTENV_DISABLED": "1", **dict(one.split("=", 1) for one in assignments)}, cwd=folder)
    assert (read.enable_checkpoints, read.resume, read.checkpoint_keep_last, read.bias) == (True, "auto", 2, False)
    assert (read.batch_size, read.tokenizer, read.model_type) == (48, "gpt2", "gpt2")
    assert "TEMPERATURE" not in said.out
    assert not any(name in said.out.split("=== COMMAND")[1] for name in SCALING)


def test_more_failures_get_more_restarts(folder):
    said = plan(folder, MACHINE_MTBF_HOURS="0.1", TRAINING_STEPS="10000000")
    expected = float(rows(said.out, "SAVING")["failures to expect"][0].split()[0])
    restarts = int(re.search(r"--max-restarts=(\d+)", said.out)[1])
    assert expected > 1
    assert restarts == pytest.approx(3 + 2 * expected, rel=0.1)


# ---------------------------------------------------------------------------------------------------------------------
# Nonsense, and the ends of what is allowed.


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"MODEL_TYPE": "bigram"}, "MODEL_TYPE=bigram: a bigram is one table"),
        ({"BATCH_SIZE": "12"}, "BATCH_SIZE=12 (environment): 8 devices share the rows evenly; set BATCH_SIZE=16"),
        ({"TTT_LAYERS": "1"}, "TTT_LAYERS=1: how long"),
        ({"INIT_FROM": "latest"}, "INIT_FROM=latest: no checkpoint is opened"),
        ({"N_LAYER": "1001"}, "N_LAYER=1001: a plan is made for up to 1000 blocks"),
        ({"N_EMBD": "400000000000"}, "these sizes make no model: Storage size calculation overflowed"),
        ({"GPT2_MODEL_NAME": "gpt3"}, "GPT2_MODEL_NAME=gpt3: expected one of gpt2, gpt2-medium, gpt2-large, gpt2-xl"),
        ({"GPT2_MODEL_NAME": "gpt2", "BLOCK_SIZE": "1025"}, "BLOCK_SIZE=1025: gpt2 has 1024 positions"),
        ({"GPT2_MODEL_NAME": "gpt2", "N_LAYER": "3"}, "N_LAYER=3: gpt2 has 12; unset N_LAYER"),
        ({"MACHINES": "0"}, "MACHINES='0' (environment): expected a whole number at least 1"),
        ({"DEVICE_TFLOPS": "0"}, "DEVICE_TFLOPS='0' (environment): expected a number at least 0.001"),
        ({"MACHINE_GB_S": "nan"}, "MACHINE_GB_S='nan' (environment): expected a number"),
        ({"MACHINE_MTBF_HOURS": "-1"}, "MACHINE_MTBF_HOURS='-1' (environment): expected a number at least"),
    ],
    ids=str,
)
def test_what_is_refused_in_one_sentence(changes, said, folder):
    done = plan(folder, **changes)
    assert (done.code, done.out) == (2, "")
    assert said in done.err
    assert done.err.strip().count("\n") == 0


def test_what_is_left_out_is_said(folder):
    assert "a vocabulary of 256 tokens is assumed" in plan(folder, TOKENIZER=None).err
    assert "OPTIMIZER=muon: counted as adamw" in plan(folder, OPTIMIZER="muon").err
    assert plan(folder, OPTIMIZER="adamw").err == ""


ENDS = {
    name: st.sampled_from([rules["minimum"], config.VARIABLES[name].default, rules["maximum"]])
    for name in SCALING
    for rules in [config.VARIABLES[name].metadata]
}


@settings(max_examples=40, deadline=None)
@given(
    numbers=st.fixed_dictionaries(ENDS),
    steps=st.sampled_from([1, 1000, 2**63 - 1]),
    rows_of_each=st.sampled_from([1, 8]),
)
def test_every_end_of_every_limit_makes_a_plan(folder, numbers, steps, rows_of_each):
    devices = int(numbers["MACHINES"]) * int(numbers["DEVICES_PER_MACHINE"])
    texts = {
        name: str(int(value) if name in ("MACHINES", "DEVICES_PER_MACHINE") else value)
        for name, value in numbers.items()
    }
    done = plan(folder, **texts, BATCH_SIZE=str(rows_of_each * devices), TRAINING_STEPS=str(steps))
    assert done.code == 0, done.err
    assert not re.search(r"\b(nan|inf)\b|Traceback", done.out)
    assert math.isfinite(float(re.search(r"CHECKPOINT_INTERVAL=(\d+)", done.out)[1]))


def test_help_costs_no_import(folder):
    done = subprocess.run(
        [sys.executable, "scripts/plan_scaling.py", "--help"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "MACHINE_MTBF_HOURS  (default: 6000)" in done.stdout
