"""A checkpoint trained on conversations answers a prompt with its template, and is evaluated on held-out answers."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from drive import command, newest, train
from records import gpt2_record
from script import call, script
from talks import rows
from test_templates import CHATML, bpe

import models
from milepost import ckpt, config
from milepost.ckpt.layouts.huggingface import MANIFEST
from milepost.ckpt.restore import build_model, build_tokenizer
from milepost.generation.sampling import generate
from milepost.run.text import read_text
from milepost.runtime.progress import Log
from milepost.text.examples import ExampleSplit
from milepost.text.templates import NO_TEMPLATE, chat_ids, template_of

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


def test_answers_past_a_context_are_told_and_compared_item_by_item(trained: Path, tmp_path: Path) -> None:
    """One model knows the answers; the other, with the same weights, reads too little for the last token of each."""
    whole = newest(trained)
    tokenizer = build_tokenizer(whole)
    lengths = [
        len(
            chat_ids(
                [{"role": "user", "content": q}, {"role": "assistant", "content": a}], tokenizer, None, answer=False
            )
        )
        for q, a in PAIRS.items()
    ]
    context = min(lengths) - 3  # one target short of the end of the shortest: a line feed follows the end
    state = dict(whole.model_state)
    positions = next(name for name, tensor in state.items() if tensor.size(0) == 64 and tensor.dim() == 2)
    state[positions] = state[positions][:context].clone()
    settings = {**whole.model_settings, "block_size": context}
    short = ckpt.save(replace(whole, model_state=state, model_settings=settings), tmp_path)
    asked = [{"prompt": q, "completion": a} for q, a in PAIRS.items()]
    asked.append(
        {"prompt": "Who sings in the house in the sun?", "completion": "An owl hunts."}
    )  # the short context ends before
    path, output = rows(tmp_path / "asked.jsonl", asked), tmp_path / "o.json"
    done = command(
        "scripts/evaluate_checkpoint.py", trained, EVAL_DATA=str(path), OUTPUT=str(output), CHECKPOINT_PATH=f"latest,{short}", **QUIET  # type: ignore[arg-type]
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert f"4 of 4 answers reach past its context of {context} tokens" in done.stderr
    figures = json.loads(output.read_text(encoding="utf-8"))
    assert [each["benchmarks"][0]["accuracy"] for each in figures["checkpoints"]] == [0.75, 0]
    (compared,) = figures["comparisons"]  # of the bits per byte of other answers there is no comparison
    assert (compared["figure"], compared["difference"]) == ("accuracy on exact match", -0.75)
    assert "their bits per byte are not compared" in done.stderr


def test_the_validation_part_is_that_of_the_training(trained: Path) -> None:
    changes = QUIET | {"TRAINING_DATA_SOURCE": None, "BATCH_SIZE": None}
    output = trained / "own.json"
    done = command("scripts/evaluate_checkpoint.py", trained, OUTPUT=str(output), **changes)  # type: ignore[arg-type]
    assert done.returncode == 0, done.stderr
    (figures,) = json.loads(output.read_text(encoding="utf-8"))["checkpoints"]
    assert figures["standard"]["loss"] == pytest.approx(newest(trained).validation_loss, abs=1e-4)
    assert figures["benchmarks"][0]["items"] == 6


def instructed(folder: Path, template: str = CHATML) -> tuple[ckpt.Checkpoint, Path]:
    """A folder of random weights as another program leaves one: its tokenizer has a chat template, no record names any."""
    torch.manual_seed(3)
    tokenizer = bpe(template)
    model = models.build(
        "llama", {"vocab_size": tokenizer.vocab_size, "block_size": 64, "n_layer": 1, "n_head": 2, "n_embd": 16}
    )
    state = {name: 40 * tensor.detach() for name, tensor in model.state_dict().items()}
    fields = {"model_type": "llama", "model_settings": models.plain(model.settings), "tokenizer": tokenizer.to_dict()}
    path = ckpt.save(replace(gpt2_record(), model_state=state, data={}, **fields), folder, layout="huggingface")
    (path / MANIFEST).unlink()
    return ckpt.load(path), path


def test_a_run_trains_on_the_date_of_its_first_day_whenever_it_resumes(tmp_path: Path) -> None:
    """Of a template that writes the date: the token files of that day may be gone."""
    one, _ = instructed(tmp_path, "{{ strftime_now('%Y-%m-%d') }}" + CHATML)
    source = rows(tmp_path / "t.jsonl", [{"prompt": q, "completion": a} for q, a in PAIRS.items()] * 4)
    settings = config.read({"PYTHON_DOTENV_DISABLED": "1", "MODEL_TYPE": "llama", "TRAINING_DATA_SOURCE": str(source)})

    def read(data: dict[str, Any]) -> tuple[str, str]:
        text, tokenizer = read_text(settings, Log(), record=replace(one, data=data))
        assert isinstance(text.split, ExampleSplit)
        assert text.fingerprint()["template"] == text.template
        return text.template or "", tokenizer.decode(text.split.train.first_question())

    template, question = read({})
    day = template.removeprefix("{# date: ")[:10]
    assert question.startswith(f"{day}<|im_start|>user")
    assert read({"template": template}) == (template, question)
    earlier = template.replace(day, "2001-02-03")  # as a checkpoint of that day has it
    assert read({"template": earlier}) == (earlier, question.replace(day, "2001-02-03"))


def test_a_template_that_a_tokenizer_cannot_hold_is_passed_over_aloud(tmp_path: Path) -> None:
    for kind, told in (("byte", True), ("bpe", False)):
        tokenizer = {"kind": "byte"} if kind == "byte" else bpe().to_dict()
        path = ckpt.save(replace(instructed(tmp_path)[0], tokenizer=tokenizer), tmp_path, layout="huggingface")
        (path / MANIFEST).unlink()
        (path / "chat_template.jinja").write_text(CHATML)
        one = ckpt.load(path)
        assert one.tokenizer is not None
        assert one.tokenizer.get("chat_template") == (None if told else CHATML)
        assert [note for note in one.notes if "its chat template is passed over" in note] == (
            [f"{path}: its chat template is passed over, which a byte tokenizer cannot hold"] * told
        )


def test_a_prompt_to_an_imported_instruction_model_is_a_question(tmp_path: Path) -> None:
    one, path = instructed(tmp_path)
    assert one.data == {}
    tokenizer, model = build_tokenizer(one), build_model(one, device=torch.device("cpu")).eval()
    greedy = {
        "CHECKPOINT_PATH": path,
        "TEMPERATURE": "0",
        "TOP_K": "0",
        "MAX_NEW_TOKENS": "12",
        "PROMPT": "And a rook?",
    }
    asked = chat_ids([{"role": "user", "content": "And a rook?"}], tokenizer, CHATML, answer=True)
    expected = {}
    for raw, ids in (("false", asked), ("true", tokenizer.encode("And a rook?"))):
        stops = (*tokenizer.stop_ids, tokenizer.special_tokens["<|im_end|>"])
        text = tokenizer.decode(list(generate(model, ids, max_new_tokens=12, temperature=0, stop_ids=stops)))
        expected[raw] = ("And a rook?" if raw == "true" else "") + text
        said = call(script("load_checkpoint"), tmp_path, **greedy, RAW_PROMPT=raw)
        assert (said.code, said.out) == (0, expected[raw] + "\n"), said.err
        compared = call(script("compare_samples"), tmp_path, **greedy, RAW_PROMPT=raw, OUTPUT=tmp_path / "c.json")
        assert compared.code == 0, compared.err
        (values,) = json.loads((tmp_path / "c.json").read_text(encoding="utf-8"))["checkpoints"]
        assert values["texts"] == [expected[raw]]
    assert expected["false"] not in expected["true"]  # the negative control: the template changes the text


@pytest.mark.parametrize(
    ("data", "own", "expected"),
    [
        ({}, None, NO_TEMPLATE),
        ({}, CHATML, CHATML),
        ({"template": None}, CHATML, None),
        ({"template": "trained on"}, CHATML, "trained on"),
        ({"template": 7}, CHATML, NO_TEMPLATE),
    ],
)
def test_the_template_is_that_of_the_conversations_else_the_tokenizers(
    data: dict[str, Any], own: str | None, expected: str | None
) -> None:
    assert template_of(data, bpe(own)) == expected
