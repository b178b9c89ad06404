"""A checkpoint trained on conversations answers a prompt with its template, and is evaluated on held-out answers."""

import json
from pathlib import Path

import pytest
from drive import command, newest, train
from talks import rows

PAIRS = {"Who sings?": "The wren.", "Who hunts?": "An owl.", "Who builds?": "A rook."}
LEARNS = {
    "N_LAYER": "1", "N_EMBD": "32", "BLOCK_SIZE": "64", "BATCH_SIZE": "8", "TRAINING_STEPS": "200", "LEARNING_RATE": "1e-2",
    "DROPOUT": "0", "EVAL_INTERVAL": "0", "SAMPLE_INTERVAL": "0", "CHECKPOINT_INTERVAL": "0", "OPTIMIZER": "adamw",
}  # fmt: skip
QUIET = dict.fromkeys((*LEARNS, "TRAINING_DATA_SOURCE", "MODEL_TYPE", "N_HEAD", "WARMUP_STEPS", "EVAL_STEPS", "LOG_INTERVAL", "ENABLE_CHECKPOINTS"))  # fmt: skip


@pytest.fixture(scope="module", params=["char", "bpe"])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("answers")
    source = rows(folder / "t.jsonl", [{"prompt": q, "completion": a} for q, a in PAIRS.items()] * 20)
    kind = {"TOKENIZER": request.param} | ({"BPE_VOCAB_SIZE": "270"} if request.param == "bpe" else {})
    sampled = {"SAMPLE_INTERVAL": LEARNS["TRAINING_STEPS"], "TEMPERATURE": "0"}
    code, said = train(folder, TRAINING_DATA_SOURCE=str(source), **kind, **LEARNS | sampled)
    assert code == 0, said
    return folder


def generated(folder: Path, **changes: str) -> str:
    done = command(
        "scripts/load_checkpoint.py", folder, TEMPERATURE="0", MAX_NEW_TOKENS="40", **(QUIET | changes)  # type: ignore[arg-type]
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_prompt_is_a_question_and_the_answer_ends_itself(trained: Path) -> None:
    assert newest(trained).data["template"] is None
    for question, answer in PAIRS.items():
        assert generated(trained, PROMPT=question) == answer + "\n"
    raw = generated(trained, PROMPT="Who sings?", RAW_PROMPT="true")
    assert raw.startswith("Who sings?")
    assert raw != "Who sings?The wren.\n"


def test_a_sample_of_the_training_is_an_answer(trained: Path) -> None:
    """To a question that is not trained on: the last tenth of 60 pairs begins with the first pair."""
    (path,) = (trained / "runs").glob("*/samples/*.txt")
    end = "<|endoftext|>" if newest(trained).tokenizer["kind"] == "bpe" else "<|end|>"
    question = f"User:\nWho sings?{end}\nAssistant:\n"
    assert path.read_text(encoding="utf-8") == f"{question}The wren.\n"


def test_the_template_stays_in_every_layout(trained: Path) -> None:
    out = trained / "other"
    done = command("scripts/convert_checkpoint.py", trained, CONVERT_TO="huggingface", OUTPUT=str(out), **QUIET)  # type: ignore[arg-type]
    assert done.returncode == 0, done.stderr
    (folder,) = (path.parent for path in out.rglob("config.json"))
    assert generated(trained, CHECKPOINT_PATH=str(folder), PROMPT="Who hunts?") == "An owl.\n"


def test_loss_and_exact_matches_of_answers(trained: Path) -> None:
    held_out = [{"prompt": q, "completion": a} for q, a in PAIRS.items()] + [
        {"prompt": "Who sings?", "completion": "An owl."}
    ]
    path, output = rows(trained / "held_out.jsonl", held_out), trained / "figures.json"
    done = command("scripts/evaluate_checkpoint.py", trained, EVAL_DATA=str(path), OUTPUT=str(output), **QUIET)  # type: ignore[arg-type]
    assert done.returncode == 0, done.stderr
    (figures,) = json.loads(output.read_text(encoding="utf-8"))["checkpoints"]
    (matches,) = figures["benchmarks"]
    assert (matches["items"], matches["accuracy"]) == (4, 0.75)
    assert figures["standard"]["bytes"] >= sum(len(each["completion"]) for each in held_out)
    good = [{"prompt": q, "completion": a} for q, a in PAIRS.items()]
    path = rows(trained / "good.jsonl", good)
    command("scripts/evaluate_checkpoint.py", trained, EVAL_DATA=str(path), OUTPUT=str(output), **QUIET)  # type: ignore[arg-type]
    (better,) = json.loads(output.read_text(encoding="utf-8"))["checkpoints"]
    assert better["standard"]["loss"] < 0.1 < figures["standard"]["loss"]


def test_the_validation_part_is_that_of_the_training(trained: Path) -> None:
    changes = QUIET | {"TRAINING_DATA_SOURCE": None, "BATCH_SIZE": None}
    output = trained / "own.json"
    done = command("scripts/evaluate_checkpoint.py", trained, OUTPUT=str(output), **changes)  # type: ignore[arg-type]
    assert done.returncode == 0, done.stderr
    (figures,) = json.loads(output.read_text(encoding="utf-8"))["checkpoints"]
    assert figures["standard"]["loss"] == pytest.approx(newest(trained).validation_loss, abs=1e-4)
    assert figures["benchmarks"][0]["items"] == 6
