"""Interrupted + resumed = uninterrupted on a GPU, bit for bit, in every dtype and with every optimizer and adapter; and what
only watches changes nothing.
"""

import pytest
from drive import ROOT, at_step, newest, tensor_bytes
from gpus import ON_GPU, STEPS, WIDE, assert_same, child, ended, resume_elsewhere, trained

from milepost import ckpt

TALKS = {
    "TRAINING_DATA_SOURCE": str(ROOT / "data" / "ask_wren.jsonl"), "VALIDATION_DATA": str(ROOT / "data" / "ask_wren_held_out.jsonl"),
    "BLOCK_SIZE": "256", "TOKENIZER": "byte", "N_EMBD": "32",
}  # fmt: skip
CASES = {
    "defaults": {},
    "bigram": {"MODEL_TYPE": "bigram"},
    "adamw, float32": {"OPTIMIZER": "adamw", "DTYPE": "float32"},
    "adamw, bfloat16, accumulation": {"OPTIMIZER": "adamw", "DTYPE": "bfloat16", "GRADIENT_ACCUMULATION_STEPS": "3"},
    "muon, bfloat16, no dropout": {"OPTIMIZER": "muon", "DTYPE": "bfloat16", "DROPOUT": "0"},
    "muon, float32, clipped": {"OPTIMIZER": "muon", "DTYPE": "float32", "GRAD_CLIP": "0.01"},
    "adamw, float16": {"OPTIMIZER": "adamw", "DTYPE": "float16"},
    "muon, float16": {"OPTIMIZER": "muon", "DTYPE": "float16"},
    "llama": {"MODEL_TYPE": "llama", "DROPOUT": None},
    "TTT": {"TTT_LAYERS": "1", "TTT_MINI_BATCH_SIZE": "5"},
    "conversations, packed": TALKS,
    "wide, bfloat16": WIDE | {"DTYPE": "bfloat16"},
    "wide, float32": WIDE | {"DTYPE": "float32"},
    "wide, float32, dropout": WIDE | {"DTYPE": "float32", "DROPOUT": "0.1"},
}  # fmt: skip
COMPILED = {
    "compiled, float32, dropout": {"COMPILE": "true", "DTYPE": "float32"},
    "compiled, wide, bfloat16": WIDE | {"COMPILE": "true", "DTYPE": "bfloat16", "OPTIMIZER": "adamw"},
}
FEW = {"CHECKPOINT_INTERVAL": "4", "SAMPLE_INTERVAL": str(STEPS), "CHECKPOINT_KEEP_BEST": "0"}


def resumes_exactly(folder, step: int, **changes: str):
    """Train to the end, resume from `step`, and assert that both end the same; the resume takes some steps twice."""
    straight = trained(folder / "straight", **FEW | {"CHECKPOINT_INTERVAL": str(step), **changes})
    assert tensor_bytes(ckpt.load(at_step(straight, step))) != tensor_bytes(newest(straight))  # the control
    again = resume_elsewhere(straight, folder / "again", step, **changes | {"REPLAY_CHECK_INTERVAL": "2"})
    assert newest(straight).step == STEPS
    assert_same(straight, again)
    return newest(straight)


@pytest.mark.parametrize("name", CASES)
def test_a_resumed_run_equals_the_uninterrupted_one(name, tmp_path):
    changes = CASES[name]
    if changes.get("DTYPE") == "float16" and not ON_GPU:
        pytest.skip("float16 is not for a CPU")
    record = resumes_exactly(tmp_path, 3, **changes)
    assert (record.scaler is not None) == (changes.get("DTYPE") == "float16")
    assert changes.get("DTYPE") in (None, record.runtime["dtype"])


@pytest.mark.parametrize("name", COMPILED)
def test_a_compiled_run_equals_too(name, tmp_path):
    assert resumes_exactly(tmp_path, 4, **COMPILED[name]).runtime["compile"] is True


def test_two_processes_that_compiled_anew_have_the_same_bits(tmp_path):
    """With nothing cached, so that the compiler makes all of its choices twice."""
    changes = FEW | WIDE | {"COMPILE": "true", "OPTIMIZER": "adamw"}
    processes = []
    for name in ("one", "other"):
        cache = str(tmp_path / f"cache_{name}")
        caches = {"TORCHINDUCTOR_CACHE_DIR": cache, "TRITON_CACHE_DIR": f"{cache}_triton"}
        processes.append(child(["training.py"], tmp_path / name, **changes, **caches))
    for code, _, said in map(ended, processes):
        assert code == 0, said
    assert newest(tmp_path / "one").runtime["compile"] is True
    assert_same(tmp_path / "one", tmp_path / "other")


def test_adapters_resume_exactly(tmp_path):
    base = trained(tmp_path / "base", TRAINING_STEPS="2")
    changes = {"INIT_FROM": str(newest(base).path), "LORA_RANK": "4", "DROPOUT": None, "LEARNING_RATE": "1e-2"}
    changes |= dict.fromkeys(("MODEL_TYPE", "N_LAYER", "N_HEAD", "N_EMBD", "BLOCK_SIZE"))
    record = resumes_exactly(tmp_path, 3, **changes)
    assert any(name.endswith("lora_B") for name in record.model_state)


HABITS = {
    "often": {"EVAL_INTERVAL": "1", "SAMPLE_INTERVAL": "2", "CHECKPOINT_INTERVAL": "1"},
    "never": {"EVAL_INTERVAL": "0", "SAMPLE_INTERVAL": "0", "LOG_INTERVAL": "5", "CHECKPOINT_INTERVAL": "0"},
    "in the foreground": {"CHECKPOINT_ASYNC": "false", "CHECKPOINT_INTERVAL": "2"},
    "twice": {"REPLAY_CHECK_INTERVAL": "1"},
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("plain"), OPTIMIZER="muon")


@pytest.mark.parametrize("habit", HABITS)
def test_watching_and_saving_change_no_weight(habit, plain, tmp_path):
    assert tensor_bytes(newest(trained(tmp_path, OPTIMIZER="muon", **HABITS[habit]))) == tensor_bytes(newest(plain))


def test_control_another_seed_changes_the_weights(plain, tmp_path):
    assert tensor_bytes(newest(trained(tmp_path, OPTIMIZER="muon", SEED="1"))) != tensor_bytes(newest(plain))


def test_killed_while_saving_it_resumes_exactly(plain, tmp_path):
    """SIGKILL after step 6, when the save of step 4 may still be on its way; then the steps are taken again."""
    code, _, said = ended(child(["-c", KILLED], tmp_path, OPTIMIZER="muon", CHECKPOINT_INTERVAL="2"))
    assert code == -9, said
    assert trained(tmp_path, RESUME="auto", OPTIMIZER="muon", CHECKPOINT_INTERVAL="2")
    assert tensor_bytes(newest(tmp_path)) == tensor_bytes(newest(plain))


KILLED = """
import os, signal, sys
sys.argv = ["training.py"]
from milepost import config
settings = config.from_command_line(__name__, __doc__, [])
import training
learn = training.training_step
def killed(run, lr):
    metrics = learn(run, lr)
    if run.state.step == 6:
        os.kill(os.getpid(), signal.SIGKILL)
    return metrics
training.training_step = killed
training.guarded(training.main, settings)
"""
