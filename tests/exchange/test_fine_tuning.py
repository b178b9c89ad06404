"""docs/fine-tuning.md: every command as it is written, on a tiny GPT-2 and a tiny Llama that lie in the hub's cache under the names
of the published ones.
"""

import json
import re
import shutil
from pathlib import Path

import gguf
import pytest
import torch
from drive import ROOT
from pages import blocks, commands, copied_checkout, run
from peft import PeftModel
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_templates import CHATML, bpe
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

import models
from milepost import ckpt
from milepost.runtime.progress import amount, read_metrics

PAGE = (ROOT / "docs" / "fine-tuning.md").read_text(encoding="utf-8")
COMMIT = "0123456789abcdef0123456789abcdef01234567"
SHORTER = {
    "TRAINING_STEPS=500": "TRAINING_STEPS=6",
    "TRAINING_STEPS=48": "TRAINING_STEPS=6",
    "EVAL_INTERVAL=24": "EVAL_INTERVAL=3",
    "scripts/chat.py": "scripts/chat.py <<< 'Which bird sings?'",
    "EVAL_INTERVAL=100": "EVAL_INTERVAL=3",
    "CHECKPOINT_INTERVAL=100": "CHECKPOINT_INTERVAL=3",
}
SMALL = {
    "BLOCK_SIZE": "48",
    "BATCH_SIZE": "2",
    "EVAL_STEPS": "2",
    "LOG_INTERVAL": "1",
    "WARMUP_STEPS": "0",
    "LEARNING_RATE": "1e-2",
}
PARAMETERS = 50257 * 32 + 64 * 32 + 2 * (12 * 32**2 + 13 * 32) + 2 * 32
CROPPED = (64 - 48) * 32  # positions beyond BLOCK_SIZE


def in_the_cache(home: Path) -> Path:
    """The folder in which huggingface_hub looks for gpt2, filled as it fills it:
    names in snapshots/ that are links to blobs/.
    """
    repository = home / ".cache" / "huggingface" / "hub" / "models--gpt2"
    snapshot, kept = repository / "snapshots" / COMMIT, repository / "blobs"
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=64, initializer_range=0.2))
    model.save_pretrained(kept)
    snapshot.mkdir(parents=True)
    for name in ("config.json", "generation_config.json", "model.safetensors"):
        (snapshot / name).symlink_to(f"../../blobs/{name}")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    return snapshot


def instructed(home: Path) -> None:
    """Put a small Llama with a chat template into the hub's cache."""
    repository = home / ".cache" / "huggingface" / "hub" / "models--HuggingFaceTB--SmolLM2-135M-Instruct"
    tokenizer = bpe(CHATML)
    torch.manual_seed(0)
    sizes = {"vocab_size": tokenizer.vocab_size, "block_size": 1024, "n_layer": 1, "n_head": 2, "n_embd": 16}
    model = models.build("llama", sizes)
    record = ckpt.Checkpoint(
        model_state=model.state_dict(),
        model_type="llama",
        model_settings=models.plain(model.settings),
        tokenizer=tokenizer.to_dict(),
    )
    (repository / "snapshots").mkdir(parents=True)
    shutil.move(ckpt.save(record, home / "saved", layout="huggingface"), repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    """Return the output of each command of the page, in order, and the folder that they ran in."""
    folder = copied_checkout(tmp_path_factory.mktemp("checkout"))
    in_the_cache(folder / "home")
    instructed(folder / "home")
    text = (ROOT / "data" / "dear_wren.md").read_text(encoding="utf-8")
    (folder / "letters.txt").write_text(text[:12_000], encoding="utf-8")
    (folder / "held_out.txt").write_text(text[-6_000:], encoding="utf-8")
    answers = {}
    for command in commands(PAGE):
        shorter = command
        for long, short in SHORTER.items():
            shorter = shorter.replace(long, short)
        variables = SMALL if "training.py" in command and "GPT2_MODEL_NAME" in command else {}
        answers[command] = run(shorter, folder, **variables)
        assert answers[command].returncode == 0, f"{command}\n{answers[command].stdout}\n{answers[command].stderr}"
    return folder, answers


def of(answers, *words):
    """Return the command that contains all these words."""
    (found,) = [done for command, done in answers.items() if all(word in command for word in words)]
    return found


def test_every_command_of_the_page_ran_without_a_traceback(said):
    _, answers = said
    assert len(answers) == len(commands(PAGE)) == 19
    assert [command for command, done in answers.items() if "Traceback" in done.stderr] == []


def test_training(said):
    """The weights are those in the cache; with LoRA only the adapters train, without it all weights."""
    folder, answers = said
    lora, full = of(answers, "TRACKER", "TRAINING_STEPS"), of(answers, "CHECKPOINT_DIR=full")
    trained = 2 * 8 * sum((32 + 96, 32 + 32, 32 + 128, 128 + 32))  # two blocks, A and B of rank 8 beside each matrix
    assert f"{amount(PARAMETERS - CROPPED + trained)} parameters" in lora.stderr
    assert f"{amount(trained)} of them trained" in lora.stderr
    assert "of them trained" not in full.stderr
    assert [
        len(list(folder.glob(f"checkpoints/checkpoint_gpt2_letters_gpt2_step{step}_*.pt"))) for step in ("0003", "0006")
    ] == [1, 1]
    assert len(list(folder.glob("full/checkpoint_gpt2_letters_gpt2_step0006_*.pt"))) == 1
    assert "is finished: 6 of 6 steps" in of(answers, "RESUME=auto", "GPT2_MODEL_NAME").stderr


def test_from_conversations_to_llama(said):
    """Each step has what the one before left; the record names the commit of the model, the file its template."""
    folder, answers = said
    trained = of(answers, "PRETRAINED", "TRAINING_STEPS").stderr
    assert "the model's own chat template" in trained
    assert "is finished: 6 of 6 steps" in of(answers, "PRETRAINED", "RESUME=auto").stderr
    newest = ckpt.load(next(folder.glob("wren/checkpoint_llama_ask_wren_smollm2135minstruct_step0006_*.pt")))
    assert newest.hyperparameters["PRETRAINED"] == f"HuggingFaceTB/SmolLM2-135M-Instruct@{COMMIT}"
    figures = json.loads((folder / "wren.json").read_text())["checkpoints"][0]
    assert figures["benchmarks"][0]["items"] == 36
    assert of(answers, "chat.py").stdout.strip()
    (pattern,) = re.findall(r"llama-cli -m (\S+)", PAGE)
    (path,) = folder.glob(pattern)
    fields = gguf.GGUFReader(path).fields
    assert fields["tokenizer.chat_template"].contents() == CHATML
    assert fields["general.architecture"].contents() == "llama"


def test_watching(said):
    folder, answers = said
    assert all(words in of(answers, "plot_run", "RUN='*'").stderr for words in ("curves.png",))
    heading, *chart = answers["python3 scripts/plot_run.py"].stdout.split("\n\n")[0].splitlines()
    assert heading == "loss (nats per token), validation as o"
    assert "".join(chart).count("o") >= 2  # GPT-2's own loss, and the last step's
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    (events,) = folder.glob("runs/**/events.out.tfevents.*")  # only the first command asks for a tracker
    (run_folder,) = (path for path in events.parents if path.parent.name == "runs")
    lines = read_metrics(run_folder / "metrics.jsonl")
    assert lines[0]["split"] == "validation"  # GPT-2's own loss
    assert lines[0]["step"] == 0
    shown = EventAccumulator(str(events.parent)).Reload()
    drawn = {(event.step, round(event.value, 4)) for tag in shown.Tags()["scalars"] for event in shown.Scalars(tag)}
    assert drawn >= {(line["step"], round(line["loss"], 4)) for line in lines}


def test_before_and_after(said):
    folder, answers = said
    figures = json.loads((folder / "figures.json").read_text())
    before, after = (one["standard"]["loss"] for one in figures["checkpoints"])
    assert after < before - 0.1  # nats a token
    assert {one["figure"] for one in figures["comparisons"]} == {"bits per byte"}
    assert "gpt2 at step 0" in of(answers, "compare_samples").stdout
    assert (folder / "compared.md").read_text().count("Dear Wren,") >= 3  # the prompt, and at the head of both texts


def test_the_merged_model_has_equal_logits_in_transformers(said):
    folder, answers = said
    ours = of(answers, "TEMPERATURE=0").stdout
    (code,) = blocks(PAGE, "python")
    theirs = run(f"python3 - <<'END'\n{code}END", folder)
    assert (theirs.returncode, theirs.stdout) == (0, ours), theirs.stderr
    assert ours.startswith("Dear Wren,")


def test_llama_gets_a_gguf_of_the_merged_model(said):
    folder, _ = said
    (pattern,) = re.findall(r"llama-completion -m (\S+)", "".join(blocks(PAGE, "text")))
    (path,) = folder.glob(pattern)
    reader = gguf.GGUFReader(path)
    assert reader.fields["general.file_type"].contents() == gguf.LlamaFileType.MOSTLY_Q8_0
    assert len(reader.fields["tokenizer.ggml.tokens"].contents()) == 50257
    assert sum(int(tensor.n_elements) for tensor in reader.tensors) == PARAMETERS - CROPPED


def test_peft_opens_the_adapters(said):
    folder, _ = said
    (adapters,) = (path.parent for path in folder.glob("exports/peft/**/adapter_config.json"))
    base = AutoModelForCausalLM.from_pretrained(
        in_cache := next((folder / "home").glob(".cache/huggingface/hub/models--gpt2/snapshots/*"))
    )
    merged = AutoModelForCausalLM.from_pretrained(next(folder.glob("exports/transformers/checkpoint_*")))
    ids = torch.arange(16)[None] * 700
    with torch.no_grad():
        wanted, found = merged(ids).logits, PeftModel.from_pretrained(base, adapters)(ids).logits
        without = AutoModelForCausalLM.from_pretrained(in_cache)(ids).logits
    assert torch.allclose(wanted, found, atol=1e-4)
    assert not torch.allclose(wanted, without, atol=1e-2)
