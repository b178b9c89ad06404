"""The engines of several processes with one, several processes on one GPU, and a GPU without memory left."""

import pytest
import torch
import torch.distributed as dist
from drive import at_step, newest, tensor_bytes
from gpus import ON_GPU, assert_same, child, ended, resume_elsewhere, trained

from milepost import ckpt
from milepost.run import build
from milepost.runtime import distributed

GPU_ONLY = "a CPU has no limit of its own, and may be shared"


@pytest.fixture
def group(monkeypatch):
    """A group of this process, as torchrun's would be: over NCCL on a GPU. Several runs may use it."""
    backend = "cpu:gloo,cuda:nccl" if ON_GPU else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    for name in ("leave", "ended"):  # else the first run would end the group, and the process with it
        monkeypatch.setattr(distributed, name, lambda code=None: code)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("kind", ["adamw", "muon"])
@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_an_engine_of_several_processes_trains_and_resumes_exactly_with_one(engine, kind, group, tmp_path, monkeypatch):
    changes = {"OPTIMIZER": kind, "DTYPE": "float32", "CHECKPOINT_KEEP_BEST": "0"}
    plain = trained(tmp_path / "plain", **changes)
    monkeypatch.setattr(build, "choose_engine", lambda *_, **__: engine)
    layout = {"CHECKPOINT_LAYOUT": "unified"}
    straight = trained(tmp_path / "straight", **changes, **layout)
    assert newest(straight).runtime["distributed"] == engine
    if engine == "ddp" or kind == "adamw":
        assert tensor_bytes(newest(straight)) == tensor_bytes(newest(plain))
    assert newest(straight).validation_loss == pytest.approx(newest(plain).validation_loss, abs=1e-3)
    assert_same(straight, resume_elsewhere(straight, tmp_path / "again", 4, **changes, **layout))
    assert tensor_bytes(ckpt.load(at_step(straight, 4))) != tensor_bytes(newest(straight))  # the control


def test_sharded_weights_are_saved_in_the_background(group, tmp_path, monkeypatch):
    monkeypatch.setattr(build, "choose_engine", lambda *_, **__: "fsdp")
    whole, parts = (
        trained(tmp_path / name, OPTIMIZER="adamw", CHECKPOINT_LAYOUT=name) for name in ("unified", "sharded")
    )
    assert tensor_bytes(newest(parts)) == tensor_bytes(newest(whole))


def test_two_processes_of_one_training_on_one_gpu_are_refused(tmp_path):
    if not ON_GPU:
        pytest.skip(GPU_ONLY)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "training.py"]
    code, _, said = ended(child(torchrun, tmp_path, CUDA_VISIBLE_DEVICES="0"))
    assert code != 0
    assert "2 processes on this machine, which has 1 GPUs" in said
    assert "exitcode  : 2" in said
    assert not list(tmp_path.glob("checkpoints/*"))


def test_two_trainings_share_one_gpu(tmp_path):
    if not ON_GPU:
        pytest.skip(GPU_ONLY)
    both = [child(["training.py"], tmp_path / name) for name in ("one", "other")]
    assert [ended(process)[0] for process in both] == [0, 0]
    assert tensor_bytes(newest(tmp_path / "one")) == tensor_bytes(newest(tmp_path / "other"))


def test_a_batch_that_does_not_fit_is_one_sentence(tmp_path):
    if not ON_GPU:
        pytest.skip(GPU_ONLY)
    free = torch.cuda.mem_get_info()[0]
    rows = str(2 * free // (1024 * 768 * 2 * 12))  # activations of twice the memory that is free
    sizes = {"N_LAYER": "12", "N_HEAD": "12", "N_EMBD": "768", "BLOCK_SIZE": "512", "TOKENIZER": "byte"}
    torch.cuda.empty_cache()
    code, _, said = ended(
        child(["training.py"], tmp_path, **sizes, BATCH_SIZE=rows, TRAINING_DATA_SOURCE="data/dear_wren.md")
    )
    assert code == 1, said
    assert "error: out of memory: lower BATCH_SIZE" in said
    assert "Traceback" not in said
    trained(tmp_path / "after")  # the next run is unharmed
