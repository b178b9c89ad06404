"""The guides of docs/coming-from/: their variables and files exist,
and every command and line of Python in them runs in a folder made for it.
"""

import contextlib
import dataclasses
import importlib.util
import io
import json
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pages
import pytest
import torch
from drive import ROOT, TINY, small_text, train
from script import Said, script

import models
import training
from milepost import ckpt, config
from milepost.run import text as run_text
from milepost.runtime.progress import Log

PAGES = sorted((ROOT / "docs" / "coming-from").glob("*.md"))
FOREIGN = ROOT / "tests" / "fixtures" / "foreign"
NAMES = [page.stem for page in PAGES]
# What the pages by task name, from what lies in the folder.
NEEDED = {
    "held_out.txt": "letters.txt",
    "SmolLM2-135M": "gpt2",
    "checkpoints/base.pt": "checkpoints/*gpt2*step0004*.pt",
    "blimp/pairs.jsonl": "pairs.jsonl",
    "hellaswag_val.jsonl": "endings.jsonl",
    "dante/latest.pt": "old/legacy/latest.pt",
    "dante/tokenizer.json": "old/legacy/tokenizer.json",
}
ELSEWHERE = {  # page -> the test that runs all of its commands
    "README.md": "test_readme.py",
    "docs/commands.md": "test_readme.py",
    "docs/fine-tuning.md": "exchange/test_fine_tuning.py",
    "docs/conversations.md": "test_conversations_guide.py",
    "docs/data.md": "test_data_guide.py",
    "docs/chat.md": "test_chat.py",
    "docs/publishing.md": "test_publish.py",
    "docs/serving.md": "test_serve_checkpoint.py",
}
# The only commands of a page that no test runs as they are written: how they begin, and why.
NOT_RUN = {
    "uv ": "a registry of packages",
    "pip install ": "a registry of packages",
    "%pip install ": "a registry of packages; tests/test_installed.py installs from a wheel",
    "python3 -m venv ": "a registry of packages follows it",
    ".venv/bin/python -m pip ": "a registry of packages",
    "docker ": "a daemon of Docker; tests/test_installing.py checks its files",
    "python3 scripts/watch_runs.py": "a server, which runs until a signal; tests/test_page_routes.py starts it",
    "make test": "these tests, from inside themselves",
    "make check": "ruff and mypy, which CI runs",
    "make coverage": "these tests, from inside themselves",
    "make train": "tests/test_readme.py runs it",
    "make gpu": "a GPU; tests/test_gpu.py runs what a CPU can",
    "GPU_DEVICE=cpu ": "tests/test_gpu.py runs a part of it",
    ".venv/bin/python benchmarks/gpu.py --small": "minutes; it only measures",
    "MODEL_TYPE=gpt2 BATCH_SIZE=512 ": "eight machines; tests/test_distributed.py has two nodes of one machine",
    "lm_eval ": "another program, and questions from the hub",
    "NOTIFY_URL=https://ntfy.sh/": "a server elsewhere; tests/test_notices.py has one of its own",
    "PRETRAINED=HuggingFaceTB/SmolLM2-135M LORA_RANK": "a model from the hub; tests/test_pretrained.py has a hub of its own",
    "llama-completion ": "llama.cpp; tests/llama opens the file",
    "cp -r exported/FOLDER nanoGPT": "a checkout of nanoGPT; tests/test_export.py opens the file as it does",
    "python3 -m torch.distributed.checkpoint.format_utils ": "tests/test_sharded.py calls its function",
}
WINDOWS = ("powershell", "bat")  # read, not run: tests/test_installing.py
SLURM = "#!/bin/bash"  # the job runs in tests/test_interrupt.py
# Words in capitals that are no variable of ours: of git and the shell, of their projects, and what a reader puts in.
NO_VARIABLES = {"CHECKPOINT", "DIR", "FILE", "SIGTERM", "FORMAT", "CONFIG", "TOKENIZER", "STATE", "TRAINING", "TENSORS",
"WARNING", "SYSTEM",
                "VERIFICATION", "PASSED", "LR", "MB", "JSON", "BPE", "GPT", "RUN", "NAME"}  # fmt: skip
A_FEW = {"TRAINING_STEPS": "8", "RESUME_TRAINING_STEPS": "2", "MAX_NEW_TOKENS": "8"}  # steps and tokens are enough

# What a page's commands must have printed, all together, and files that they must have left.
PRINTED = {
    "env-scripts": ["Dear Wren,", "matches", "step      ", "gpt2 at step"],
    "hf-trainer": ["perplexity", "Conversion complete!", "bit-exact"],
    "nanogpt": ["Dear", "=== FORMAT ===", "is finished: 8 of 8 steps"],
    "json-directory": ["=== FORMAT ===", "layout: ", "Location: ", "=== CONFIG ===", "=== TOKENIZER ===",
    "=== TRAINING STATE ===",
                       "Last recorded training step: ", "Number of tensors: ", "Conversion complete!", "Converted: "],
    "separated": ["Optimizer state available - can resume training", "Conversion complete!", "Original size: ",
    "Model-only size: ", "Converted: ",
                  "Unified checkpoint split into separated format!", "Conversion complete! Check new-checkpoints"],
    "step-files": ["overridden", "all bytes equal", "bytes ", "tensor", "restored"],
    "ttt-and-lora": ["tensors, ", "Found ", "Loaded ", "all bytes equal", "perplexity", "accuracy"],
}  # fmt: skip
LEFT = {
    "env-scripts": ["checkpoints/checkpoint_gpt2_letters_gpt2_step0008_*.pt", "checkpoints/checkpoint_gpt2_letters_gpt2medium_step0008_*.pt"],
    "hf-trainer": ["exported/*/model.safetensors"],
    "nanogpt": ["exported/*/ckpt.pt", "checkpoints/*step0008*"],
    "json-directory": ["converted/*/model.pt", "all/*/manifest.json", "to-share/*/tokenizer.json", "checkpoints/dante/checkpoint_gpt2_letters_step0008_*/optimizer.pt"],
    "separated": ["checkpoints/*-optimizer.pt", "split/*-model.pt", "to-share/*/config.json", "new-checkpoints/*-model.pt"],
    "step-files": ["checkpoints/*/step_000008.safetensors", "checkpoints/*/step_000008_state.json", "checkpoints/*/best/step_*_optimizer.safetensors"],
    "ttt-and-lora": ["adapters/*/checkpoint_000008/consolidated/lora.safetensors", "checkpoints/*/checkpoint_000008/consolidated/consolidated.safetensors"],
}  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# What is on a page.


def blocks(page: str, language: str) -> list[str]:
    text = (ROOT / "docs" / "coming-from" / f"{page}.md").read_text(encoding="utf-8")
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def our_side(page: str) -> list[str]:
    """The last cell of every row of a table, and every other line of prose."""
    text = (ROOT / "docs" / "coming-from" / f"{page}.md").read_text(encoding="utf-8")
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    return [line.strip().strip("|").split(" | ")[-1] for line in prose.splitlines()]


def spans(page: str) -> list[str]:
    """What of our side is set as code."""
    return [span for line in our_side(page) for span in re.findall(r"`([^`]+)`", line)]


def commands(page: str) -> list[str]:
    """Every command of ours, each once: tables first, then the blocks."""
    lines = [line.strip() for block in blocks(page, "bash") for line in block.splitlines()]
    both = [*spans(page), *lines]
    return list(dict.fromkeys(one for one in both if re.search(r"\bpython3 \S+\.py$", one)))


def parsed(command: str) -> tuple[dict[str, str], str]:
    """The variables and the script of a command."""
    *assignments, program, name = shlex.split(command)
    assert program == "python3", command
    return dict(one.split("=", 1) for one in assignments), name


def uses(text: str) -> set[str]:
    """The names in a piece of code that look like variables."""
    return {name for name in re.findall(r"\b[A-Z][A-Z0-9_]{1,}\b", text) if "_" in name or f"{name}=" in text}


# ---------------------------------------------------------------------------------------------------------------------
# A folder with what the pages speak of.


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    """A text, a run of 8 steps that was killed after 4, older checkpoints, and other programs' files."""
    folder = tmp_path_factory.mktemp("guides")
    small_text(folder)
    small_text(folder, characters=3000, name="new.txt")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_text, "CACHE_FOLDER", folder / "cache")
        older(folder, "gpt2", 1000)
        older(folder, "bigram", 500)
        trained(folder)
        trained(
            folder,
            INIT_FROM="checkpoints",
            LORA_RANK="2",
            TTT_LAYERS="1",
            CHECKPOINT_DIR="adapted",
            CHECKPOINT_KEEP_BEST="0",
        )
    shutil.move(next(folder.glob("adapted/*step0008*")), folder / "adapters.pt")
    for path in folder.glob("checkpoints/**/*step0008*"):  # as if it had been killed
        path.unlink()
    pretrained(folder / "gpt2")
    pretrained(folder / "gpt2-medium")
    theirs(folder)
    for name in ("cache", "adapted", "older"):
        shutil.rmtree(folder / name, ignore_errors=True)
    return folder


def trained(folder: Path, **changes: str | None) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        code, said = train(folder, **changes)
    assert code == 0, said


def older(folder: Path, model_type: str, step: int) -> None:
    """A checkpoint that says it is of `step`, of a run of its own."""
    sizes = dict.fromkeys(("N_LAYER", "N_HEAD", "N_EMBD", "DROPOUT"))
    place = folder / "older" / model_type
    trained(folder, CHECKPOINT_DIR=str(place), MODEL_TYPE=model_type, **(sizes if model_type == "bigram" else {}))
    record = dataclasses.replace(ckpt.load(next(place.glob("*step0008*"))), step=step, run_id=f"older-{model_type}")
    (folder / "checkpoints").mkdir(exist_ok=True)
    ckpt.save(record, folder / "checkpoints")


def pretrained(folder: Path) -> None:
    """A GPT-2 with the vocabulary of the published ones, as a Hugging Face folder."""
    settings = {"vocab_size": 50257, "block_size": 16, "n_layer": 1, "n_head": 1, "n_embd": 4}
    torch.manual_seed(0)
    model = models.build("gpt2", settings)
    record = ckpt.Checkpoint(
        model_state=model.state_dict(),
        model_type="gpt2",
        model_settings=models.plain(model.settings),
        tokenizer={"kind": "gpt2"},
    )
    (folder.parent / "hub").mkdir(exist_ok=True)
    shutil.move(ckpt.save(record, folder.parent / "hub", layout="huggingface"), folder)


def theirs(folder: Path) -> None:
    """Files of other programs, questions, and settings in a file."""
    shutil.copytree(FOREIGN / "pair", folder / "theirs")
    shutil.copytree(FOREIGN / "unified", folder / "theirs", dirs_exist_ok=True)
    shutil.copytree(FOREIGN / "nanogpt", folder / "nanogpt")
    np.tile(np.arange(5, dtype=np.uint16), 600).tofile(folder / "nanogpt" / "train.bin")
    shutil.copytree(FOREIGN / "directory" / "dante", folder / "old" / "dante")
    shutil.copytree(FOREIGN / "lecture", folder / "old" / "legacy")
    (folder / "old" / "text.txt").write_text("abc ab\nca b c\n" * 50, encoding="utf-8")
    pair = {"sentence_good": "the letter is here", "sentence_bad": "the letter are here"}
    (folder / "pairs.jsonl").write_text(json.dumps(pair) + "\n", encoding="utf-8")
    question = {"ctx": "the letter is", "endings": ["here", "there", "so", "as"], "label": 0}
    (folder / "endings.jsonl").write_text(json.dumps(question) + "\n", encoding="utf-8")
    for name in ("x.env", "separated.env"):
        (folder / name).write_text("MODEL_TYPE=gpt2\nCHECKPOINT_LAYOUT=separated\n", encoding="utf-8")


@pytest.fixture
def folder(prepared, tmp_path, monkeypatch) -> Path:
    """A copy of that folder, which is the current one."""
    shutil.copytree(prepared, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def environment(command: str, folder: Path) -> tuple[dict[str, str], str]:
    """The variables with which a command runs here, small and in this folder; and its script."""
    given, name = parsed(command)
    small = {one: value for one, value in A_FEW.items() if one in given}
    places = {"CHECKPOINT_DIR": "checkpoints", "RUNS_DIR": "runs", "DEVICE": "cpu"}
    if "ENV_FILE" not in given:
        places["PYTHON_DOTENV_DISABLED"] = "1"
    if name == "training.py":
        places |= {"TRAINING_DATA_SOURCE": "letters.txt", "TRAINING_STEPS": "8"}
        fresh = not given.keys() & {"INIT_FROM", "GPT2_MODEL_NAME"}
        places |= {
            one: value for one, value in TINY.items() if fresh and one not in ("MODEL_TYPE", "ENABLE_CHECKPOINTS")
        }
    return places | given | small, name


def called(command: str, folder: Path) -> Said:
    """What a command does, in this process."""
    variables, name = environment(command, folder)
    module = training if name == "training.py" else script(Path(name).stem)
    out, err = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True), io.StringIO()
    settings = config.read(variables, cwd=folder)
    with contextlib.redirect_stdout(out):
        code = training.guarded(module.main, settings, log=Log(err))
    return Said(code, out.buffer.getvalue().decode(), err.getvalue())


# ---------------------------------------------------------------------------------------------------------------------


def test_there_is_a_guide_for_each_kind_of_reader():
    assert set(NAMES) == {
        "step-files",
        "env-scripts",
        "separated",
        "ttt-and-lora",
        "json-directory",
        "nanogpt",
        "hf-trainer",
    }
    assert all(len(commands(page)) >= 3 for page in NAMES)


@pytest.mark.parametrize("page", NAMES)
def test_variables_and_files_exist(page):
    code = [*spans(page), *blocks(page, "bash")]
    for text in code:
        assert uses(text) - config.VARIABLES.keys() <= NO_VARIABLES, text
        for name in re.findall(
            r"(?:scripts|tests|docs)/\w+\.\w+|\btraining\.py|\b(?:milepost|models)/[\w/]*\.py", text
        ):
            assert (ROOT / name).is_file(), name


def test_links_lead_somewhere():
    """And, where they name a heading, to one that is there."""
    for page in [*PAGES, ROOT / "docs" / "fine-tuning.md"]:
        for target, _, heading in re.findall(r"\]\(([^)#:]+)(#([^)]+))?\)", page.read_text(encoding="utf-8")):
            text = (page.parent / target).read_text(encoding="utf-8")
            headings = [
                re.sub(r"[^\w -]", "", line.lower()).strip().replace(" ", "-")
                for line in re.findall(r"^#+ (.*)", text, re.MULTILINE)
            ]
            assert not heading or heading in headings, f"{page.name}: {target}#{heading}"


@pytest.mark.parametrize("page", NAMES)
def test_single_settings_are_accepted(page):
    """`CHECKPOINT_KEEP_LAST=3` without a command, too."""
    for span in spans(page):
        if re.fullmatch(r"([A-Z0-9_]+=\S+ ?)+", span) and "<" not in span:
            values = dict(one.split("=", 1) for one in shlex.split(span))
            base = {
                "MODEL_TYPE": "gpt2",
                "GPT2_MODEL_NAME": "gpt2",
                "PYTHON_DOTENV_DISABLED": "1",
                "N_LAYER": "12",
                "LORA_RANK": "8",
            }
            if "TTT_LAYERS" not in values and "CHECKPOINT_ADAPTERS_ONLY" not in values:
                del base["LORA_RANK"], base["N_LAYER"]
            config.read(base | values)


@pytest.mark.parametrize("page", NAMES)
def test_every_command_runs(page, folder):
    said = {command: called(command, folder) for command in commands(page)}
    for command, done in said.items():
        assert done.code == 0, f"{command}\n{done.out}\n{done.err}"
    everything = "\n".join(done.out + done.err for done in said.values())
    assert [text for text in PRINTED[page] if text not in everything] == []
    assert [pattern for pattern in LEFT[page] if not list(folder.glob(pattern))] == []


ALL = {page.relative_to(ROOT).as_posix(): page.read_text(encoding="utf-8")
       for page in (*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"))}  # fmt: skip
OURS = re.compile(r"python3 (training|scripts/\w+)\.py$")


def typed(text: str, *, inline: bool = True) -> list[str]:
    """Every line that a page has to be typed: of its blocks for a shell or a notebook, and commands within its text."""
    shell = [block for language in ("bash", "sh") for block in pages.blocks(text, language) if SLURM not in block]
    notebook = [line for block in pages.blocks(text, "text") for line in block.splitlines() if line[:1] in ("!", "%")]
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    spans = [span for span in re.findall(r"`([^`\n]+)`", prose) if OURS.search(span) and "<" not in span]
    lines = [line.split("   #")[0].strip() for block in shell for line in block.splitlines()]
    return list(dict.fromkeys([*filter(None, lines), *notebook, *(spans if inline else [])]))


def not_excused(line: str) -> bool:
    return not line.startswith(tuple(NOT_RUN))


def to_run(page: str) -> list[str]:
    return [line for line in typed(ALL[page]) if not_excused(line)]


TASKS = [page for page in ALL if page not in ELSEWHERE and "coming-from" not in page and to_run(page)]


def in_a_checkout(line: str) -> bool:
    """Whether a line is no command of a script alone, and needs a shell in a checkout."""
    return not OURS.search(line) or "torchrun" in line


@pytest.mark.parametrize("page", TASKS)
def test_every_command_of_a_page_by_task_runs(page, folder):
    for target, pattern in NEEDED.items():
        source = next(folder.glob(pattern))
        (folder / target).parent.mkdir(exist_ok=True)
        (shutil.copytree if source.is_dir() else shutil.copy)(source, folder / target)
    for command in (line for line in to_run(page) if not in_a_checkout(line)):
        if "CONVERT_TO=gguf" in command or ("curves.png" in command and importlib.util.find_spec("matplotlib") is None):
            continue  # extras; make test-exchange exports and draws
        done = called(command.replace("BLOCK_SIZE=256", "BLOCK_SIZE=16"), folder)  # the text is short
        assert done.code == 0, f"{command}\n{done.out}\n{done.err}"


def test_what_needs_a_shell_runs_in_a_checkout(tmp_path):
    """torchrun with two processes in place of eight, cells of a notebook and Python; the tests are only collected."""
    checkout = pages.copied_checkout(tmp_path)
    small = {name: value for name, value in TINY.items() if name.startswith("N_")} | {
        "BLOCK_SIZE": "16", "TRAINING_STEPS": "4", "EVAL_STEPS": "1", "SAMPLE_INTERVAL": "0", "PYTEST_ADDOPTS": "--collect-only"}  # fmt: skip
    lines = [line for page in TASKS for line in to_run(page) if in_a_checkout(line)]
    assert {line.split()[-1] for line in lines} == {"training.py", "tests/test_config.py", "env"}
    for line in lines:
        here = line.removeprefix("!").replace("=/content/drive/MyDrive/", "=").replace("per-node=8", "per-node=2")
        done = pages.run(here, checkout, **small)
        assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
    for page in ("docs/installing.md", "docs/python.md"):
        for block in pages.blocks(ALL[page], "python"):
            (checkout / "cell.py").write_text(block, encoding="utf-8")
            done = pages.run("python3 cell.py", checkout)
            assert done.returncode == 0, done.stderr
            assert done.stdout.rstrip()
            assert any(checkout.glob("checkpoints/*step0020*"))


def test_the_python_of_the_other_pages_runs(folder):
    """A layout of one's own, and what transformers opens."""
    exec(compile(pages.blocks(ALL["docs/checkpoints.md"], "python")[0], "checkpoints.md", "exec"), given := {})
    assert given["LAYOUT"].name == "mine"
    command = next(line for line in to_run("docs/exporting.md") if "CONVERT_TO=huggingface" in line)
    assert called(command.replace("=exported", "=fresh"), folder).code == 0
    (exported,) = (path.parent for path in (folder / "fresh").rglob("config.json"))
    exec(
        compile(pages.blocks(ALL["docs/exporting.md"], "python")[0], "exporting.md", "exec"),
        given := {"folder": exported},
    )
    assert given["model"].num_parameters() > 0


def test_every_line_that_is_not_run_has_a_reason():
    """All lines to type are run by a test named here, or begin as one of NOT_RUN; none of these is left over."""
    lines = {page: typed(text) for page, text in ALL.items()}
    unused = [start for start in NOT_RUN if not any(line.startswith(start) for each in lines.values() for line in each)]
    assert unused == []
    for page in NAMES:
        typed_there = {line for line in typed(ALL[f"docs/coming-from/{page}.md"], inline=False) if not_excused(line)}
        assert typed_there <= set(commands(page)), page
    for page, test in ELSEWHERE.items():
        assert page.split("/")[-1] in (ROOT / "tests" / test).read_text(encoding="utf-8")
    python = {page for page, text in ALL.items() if pages.blocks(text, "python") and "coming-from" not in page}
    assert python == {
        f"docs/{name}.md" for name in ("installing", "python", "checkpoints", "exporting", "fine-tuning", "serving")
    }
    languages = {word for text in ALL.values() for word in re.findall(r"^```(\w+)\n(?:.*\n)+?```", text, re.MULTILINE)}
    assert languages <= {"bash", "sh", "python", "text", "mermaid", *WINDOWS}


@pytest.mark.parametrize("page", [page for page in NAMES if blocks(page, "python")])
def test_every_line_of_python_runs(page, folder):
    """And prints what its comments say."""
    for block in blocks(page, "python"):
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            exec(compile(block, page, "exec"), {})
        assert out.getvalue().splitlines() == re.findall(r"# prints (.*)", block)


def test_what_the_checks_look_for_can_fail(folder):
    """A variable that is none, a script that is not there, a setting that is refused, a line that nothing runs."""
    assert [line for line in typed("```sh\nuv sync\nnew-tool --now\n```\n") if not_excused(line)] == ["new-tool --now"]
    assert uses("CHECKPOINT_INTERVALS=5 python3 training.py") - config.VARIABLES.keys() - NO_VARIABLES == {
        "CHECKPOINT_INTERVALS"
    }
    assert called("CHECKPOINT_PATH=nowhere.pt python3 scripts/inspect_checkpoint.py", folder).code == 3
    with pytest.raises(config.ConfigError):
        called("CHECKPOINT_LAYOUT=pair python3 training.py", folder)
    with pytest.raises(FileNotFoundError):
        called("CHECKPOINT_PATH=latest python3 scripts/show_checkpoint.py", folder)
