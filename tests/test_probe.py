"""The probe: a step of fixed numbers shows whether other hardware, a library setting or an edit changes bits."""

import json
import os
import sys

import programs
import pytest
import torch
from drive import ROOT, newest, train
from torch.nn import functional as F

from milepost.run.probe import probe
from milepost.runtime import hardware
from models.gpt2 import GPT2, GPT2Settings, LoraSettings
from models.ttt import TTTSettings

CPU = torch.device("cpu")
SIZES = {"vocab_size": 74, "block_size": 32, "n_layer": 3, "n_head": 2, "n_embd": 64}


def model(**changes: object) -> GPT2:
    return GPT2(GPT2Settings(**SIZES | changes))  # type: ignore[arg-type]


def digest(**changes: object) -> str:
    how = {"optimizer": "adamw", "dtype": "float32"} | {
        name: changes.pop(name) for name in ("optimizer", "dtype") if name in changes
    }
    return str(probe(model(**changes), device=CPU, **how)["sha256"])  # type: ignore[arg-type]


def test_equal_steps_have_equal_bits_whatever_the_weights():
    torch.manual_seed(0)
    first = digest(dropout=0.1)
    torch.manual_seed(1)
    assert digest(dropout=0.1) == first


@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer": "muon"},
        {"dtype": "bfloat16"},
        {"n_embd": 32},
        {"dropout": 0.1},
        {"lora": LoraSettings(rank=2, alpha=4.0)},
        {"ttt": TTTSettings(layers="1,2")},
    ],
    ids=str,
)
def test_what_the_step_computes_is_part_of_it(changes):
    assert digest(**changes) != digest()


def test_nothing_of_the_run_changes():
    torch.manual_seed(3)
    whole = model()
    before = {name: tensor.clone() for name, tensor in whole.state_dict().items()}
    state = torch.get_rng_state()
    probe(whole, optimizer="muon", device=CPU, dtype="float32")
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in whole.state_dict().items())
    assert all(parameter.grad is None for parameter in whole.parameters())


def edited(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make layer norms compute with another eps, as an edit of the model's code would."""
    real = F.layer_norm
    monkeypatch.setattr(F, "layer_norm", lambda x, shape, weight, bias, eps: real(x, shape, weight, bias, 2 * eps))


def test_an_edit_of_the_numerical_code_is_found_at_the_resume(tmp_path, monkeypatch):
    assert train(tmp_path, TRAINING_STEPS="4")[0] == 0
    with monkeypatch.context() as patch:
        edited(patch)
        code, said = train(tmp_path, TRAINING_STEPS="4", RESUME="auto", RESUME_STEP="4")
    assert code == 0
    assert "not bit-exact: a step of fixed numbers has other bits" in said
    code, said = train(tmp_path, TRAINING_STEPS="4", RESUME="auto", RESUME_STEP="4")  # control: as it was
    assert code == 0
    assert "not bit-exact" not in said


def test_probes_of_other_steps_are_not_compared():
    own = hardware.fingerprint(CPU, dtype="float32", compile_step=False, deterministic=True)
    here = {"inputs": {"optimizer": "adamw"}, "sha256": "a"}
    there = {"inputs": {"optimizer": "muon"}, "sha256": "b"}
    for before in ({}, None, there, here):  # older checkpoints have none; a changed optimizer is a reason of its own
        assert hardware.bit_changes(own | {"probe": before}, own | {"probe": here}) == []
    (reason,) = hardware.bit_changes(own | {"probe": here | {"sha256": "c"}}, own | {"probe": here})
    assert "other bits" in reason


def test_a_checkpoint_records_the_probe_where_equal_steps_have_equal_bits(tmp_path):
    assert train(tmp_path, TRAINING_STEPS="2", OPTIMIZER="adamw")[0] == 0
    recorded = newest(tmp_path).runtime["probe"]
    assert recorded["inputs"]["optimizer"] == "adamw"
    assert len(recorded["sha256"]) == 64
    assert train(tmp_path, TRAINING_STEPS="2", DETERMINISTIC="false")[0] == 0
    assert newest(tmp_path).runtime["probe"] == {}


# A probe and three steps of training, both as digests, in a process of their own.
COMPUTE = """
import json, sys, torch
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/tests"]
from test_probe import CPU, model
from milepost.ckpt.tensors import digest
from milepost.run.probe import probe
from milepost.runtime.optim import build_optimizer
torch.set_num_threads(int(sys.argv[2]))
sizes = {"n_embd": 192, "n_head": 6, "block_size": 96}
found = {}
for dtype in ("float32", "bfloat16"):
    torch.manual_seed(0)
    trained = model(**sizes)
    ids = torch.randint(74, (9, 97))
    optimizer = build_optimizer(trained, "adamw", lr=0.01, weight_decay=0.1, betas=(0.9, 0.99))
    for _ in range(3):
        with torch.autocast("cpu", dtype=getattr(torch, dtype), enabled=dtype != "float32"):
            loss = trained(ids[:, :-1], ids[:, 1:]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    step = probe(model(**sizes), optimizer="adamw", device=CPU, dtype=dtype)["sha256"]
    found[dtype] = [step, digest(trained.state_dict())]
print(json.dumps(found))
"""


def computed(threads: int = 2, **variables: str) -> dict[str, list[str]]:
    command = [sys.executable, "-c", COMPUTE, str(ROOT), str(threads)]
    done = programs.run(command, env=os.environ | variables, capture_output=True, text=True, check=True)
    found: dict[str, list[str]] = json.loads(done.stdout)
    return found


@pytest.fixture(scope="module")
def here() -> dict[str, list[str]]:
    return computed()


@pytest.mark.parametrize(
    "other",
    [{"MKL_CBWR": "COMPATIBLE"}, {"ONEDNN_MAX_CPU_ISA": "SSE41"}, {"ATEN_CPU_CAPABILITY": "default"}, {"threads": 1}],
    ids=str,
)
def test_where_training_has_other_bits_the_probe_has(other, here):
    """Settings that change bits depend on the hardware: where one changes a trained weight,
    the probe must differ too.
    """
    there = computed(**other)
    for dtype, (step, weights) in here.items():
        if there[dtype][1] != weights:
            assert there[dtype][0] != step, dtype


def test_the_same_settings_in_another_process_have_the_same_bits(here):
    assert computed() == here
