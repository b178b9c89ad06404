"""Saving from a GPU in the background: pinned buffers, the state of its moment, and moves between a GPU and a CPU."""

import pytest
import torch
from drive import at_step, newest, tensor_bytes
from gpus import DEVICE, ON_GPU, prepare_resume, train, trained
from records import record

from milepost import ckpt
from milepost.ckpt import Checkpoint
from milepost.ckpt.writer import Writer
from milepost.runtime.digests import digests

MANY = 2**24 if ON_GPU else 2**16  # numbers of a tensor whose copy takes a while


def submitted(device: torch.device) -> tuple[Writer, Checkpoint, list[dict[str, bytes]]]:
    """A record on the device whose save is on its way, and where the bytes that it wrote will stand."""
    writer, seen = Writer(background=True, free_memory=lambda: 10**12, say=print), []
    one = record(1)
    one.model_state = {name: torch.full((MANY,), float(name), device=device) for name in map(str, range(8))}
    writer.submit(one, lambda copy: seen.append(tensor_bytes(copy)))
    return writer, one, seen


def test_what_is_written_is_the_state_of_its_moment(device):
    """Though the next update is queued at once behind the copy, and the device is busy before."""
    writer, one, seen = submitted(device)
    writer.wait()
    before = seen.pop()
    for tensor in one.model_state.values():  # work that the next copy must wait for
        for _ in range(50):
            tensor.add_(1).sub_(1)
    writer.submit(one, lambda copy: seen.append(tensor_bytes(copy)))
    writer.settle()
    for tensor in one.model_state.values():
        tensor.add_(1)
    writer.wait()
    assert seen == [before]
    assert {name: bytes(tensor.cpu().numpy()) for name, tensor in one.model_state.items()} != {
        name: before[name] for name in one.model_state
    }


def test_the_copies_lie_in_pinned_memory(device):
    writer, one, _ = submitted(device)
    writer.wait()
    copies = [writer._buffers[name] for name in one.model_state]
    assert all(copy.device.type == "cpu" and copy.is_pinned() == ON_GPU for copy in copies)


def test_digests_on_the_device_are_those_on_the_cpu(device):
    drawn = {str(size): torch.randn(size, generator=torch.Generator().manual_seed(size)) for size in (1, 3, 70_000)}
    drawn["half"] = drawn["70000"].bfloat16()
    drawn["step"] = torch.tensor(7.0)
    assert digests({name: tensor.to(device) for name, tensor in drawn.items()}) == digests(drawn)


@pytest.mark.parametrize(("made", "opened"), [(DEVICE, "cpu"), ("cpu", DEVICE)], ids=["to the CPU", "from the CPU"])
def test_a_run_moves_between_devices(made, opened, tmp_path):
    """The resume says that its bits are others now, and learns what it would have learned."""
    changes = {"OPTIMIZER": "adamw", "DTYPE": "float32", "DROPOUT": "0", "LEARNING_RATE": "1e-2"}
    straight = trained(tmp_path / "straight", DEVICE=made, **changes)
    prepare_resume(straight, tmp_path / "moved", 4)
    code, said = train(tmp_path / "moved", DEVICE=opened, RESUME="auto", **changes)
    assert code == 0, said
    assert (f"device is {opened}, was {made}" in said) == (made != opened)
    moved, stayed, before = newest(tmp_path / "moved"), newest(straight), ckpt.load(at_step(straight, 4))
    assert (moved.step, moved.runtime["device"]) == (8, opened)
    assert moved.validation_loss == pytest.approx(stayed.validation_loss, abs=2e-3)
    assert moved.validation_loss != pytest.approx(before.validation_loss, abs=2e-2)  # the control: it learned
