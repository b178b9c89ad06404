"""scripts/list_checkpoints.py and scripts/inspect_checkpoint.py: what they print, and what they do not read."""

import dataclasses
import math
import os
import subprocess
import sys

import pytest
import torch
from drive import ROOT, train
from foreign_programs import CHARS, golden_nano, meta, nanogpt
from records import WEIGHT, gpt2_record, record
from script import call, copied, family, script, train_family
from work import calls, opened

from milepost import ckpt
from milepost.ckpt.layouts import WRITERS, unified
from milepost.runtime.hardware import choose_device
from milepost.runtime.progress import amount

lister, inspector = script("list_checkpoints"), script("inspect_checkpoint")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return train_family(tmp_path_factory.mktemp("family"))


def save(folder, one, layout="unified"):
    (folder / "checkpoints").mkdir(exist_ok=True)
    return ckpt.save(one, folder / "checkpoints", layout=layout)


# ---------------------------------------------------------------------------------------------------------------------
# list


def test_a_link_whose_file_is_missing_is_not_called_damaged(tmp_path):
    (tmp_path / "gone.pt").symlink_to(tmp_path / "nowhere" / "x.pt")
    (found,) = ckpt.find(tmp_path)
    problem = f"{tmp_path / 'gone.pt'}: is a link to {tmp_path / 'nowhere' / 'x.pt'}, which is missing"
    assert (found.kind, found.problem) == ("not found", f"{problem}: restore that file, or delete the link")


def test_every_checkpoint_in_the_order_of_saving(trained):
    said = call(lister, trained)
    assert said.code == 0
    head, *lines = said.out.split("\n\n")[0].splitlines()
    assert head.split() == ["step", "loss", "size", "layout", "resumable", "saved", "(UTC)", "run", "path"]
    assert [line.split()[0] for line in lines] == ["2", "4", "6", "8", "5", "6"]
    assert [line.split()[1] for line in lines if "step0008" in line] == [f"{loss_at(trained, 8):.4f}"]
    assert all(" unified " in line and " yes " in line for line in lines)
    assert ["latest" in line for line in lines] == [False] * 5 + [True]


def loss_at(folder, step):
    return ckpt.load(family(folder)[step], optimizer=False).validation_loss


def test_the_best_of_the_latest_run_is_marked(tmp_path):
    for step, loss in ((1, 3.0), (2, 1.0), (3, 2.0)):
        save(tmp_path, record(step, validation_loss=loss))
    lines = [line.split() for line in call(lister, tmp_path).out.splitlines()[1:4]]
    assert [(words[1], [word for word in words if word in ("best", "latest")]) for words in lines] == [
        ("3.0000", []),
        ("1.0000", ["best"]),
        ("2.0000", ["latest"]),
    ]


def test_lineage_shows_where_each_run_began(trained):
    head, first, child = call(lister, trained).out.split("\n\n")[1].splitlines()
    assert head.split() == ["run", "checkpoints", "size", "began", "with", "changed"]
    size = amount(sum(each.size for each in ckpt.find(trained / "checkpoints") if each.run_id == first.split()[0]), "B")
    assert first.split()[1:] == ["4", size, "fresh", "weights"]
    parent = first.split()[0]
    assert f"{parent} at step 4 ({family(trained)[4].name})" in child
    assert child.endswith("  BATCH_SIZE 4 -> 2, LEARNING_RATE 0.001 -> 0.0001")


def test_a_damaged_checkpoint_is_a_row_and_a_reason(trained, tmp_path):
    folder = copied(trained, tmp_path)
    path = family(folder)[6]
    os.truncate(path, 5000)
    said = call(lister, folder)
    assert said.code == 0
    (row,) = [line for line in said.out.splitlines() if line.startswith("?")]
    assert row.endswith(f"  {path}")
    assert row.removesuffix(str(path)).split()[-1] == "damaged"
    assert f"damaged: {path}: is damaged or cut short" in said.out
    assert len(said.out.split("damaged: ")[0].splitlines()) == 1 + 6


def test_model_only_is_marked(tmp_path):
    save(tmp_path, record(1, optimizer_state=None))
    save(tmp_path, record(2))
    lines = call(lister, tmp_path).out.splitlines()[1:3]
    assert [[word for word in line.split() if word in ("yes", "no")] for line in lines] == [["no"], ["yes"]]


@pytest.mark.parametrize("layout", WRITERS)
def test_every_layout_is_listed_once(tmp_path, layout):
    path = save(tmp_path, record(3, validation_loss=0.5), layout)
    (line,) = call(lister, tmp_path).out.split("\n\n")[0].splitlines()[1:]
    size = sum(file.stat().st_size for file in (tmp_path / "checkpoints").rglob("*") if file.is_file())
    assert line.split()[:2] == ["3", "0.5000"]
    assert line.split()[3] == layout
    assert line.endswith(f"  {path}  latest, best")
    assert line.split()[2] == f"{size / 1000:.3g}kB"


def test_another_folder_by_checkpoint_path(trained, tmp_path):
    said = call(lister, tmp_path, CHECKPOINT_PATH=trained / "checkpoints")
    assert said.code == 0
    assert said.out.count("step000") >= 6


def test_other_than_a_folder_of_checkpoints_is_refused(trained, tmp_path):
    said = call(lister, trained, CHECKPOINT_PATH=family(trained)[2])
    assert (said.code, said.out) == (2, "")
    assert "is not a folder of checkpoints" in said.err
    assert call(lister, tmp_path).code == 3
    (tmp_path / "checkpoints").mkdir()
    said = call(lister, tmp_path)
    assert (said.code, said.out) == (3, "")
    assert "holds no checkpoint; was ENABLE_CHECKPOINTS=true set when training?" in said.err


def many(folder, tokenizer, *, count=200):
    (folder / "checkpoints").mkdir(parents=True)
    for step in range(1, count + 1):
        one = record(step, save_id=f"{step:016x}", save_number=step, tokenizer=tokenizer)
        unified.LAYOUT.write(one, folder / "checkpoints", f"checkpoint_step{step}")


def test_listing_opens_a_file_as_often_and_works_as_little_among_200_as_among_20(tmp_path):
    work = {}
    for count in (2, 20, 200):  # the first has what is done once, like an import
        folder = tmp_path / str(count)
        many(folder, {"kind": "char", "chars": ["a"] * 8}, count=count)
        (said, openings), made = calls(lambda folder=folder: opened(lambda: call(lister, folder), folder))
        assert [line.split()[0] for line in said.out.splitlines()[1 : count + 1]] == [str(n + 1) for n in range(count)]
        work[count] = openings, made
    assert work[200][0] - work[20][0] == 180
    assert work[200][1] < 11 * work[20][1]


def test_unchanged_files_are_not_opened_again(tmp_path):
    many(tmp_path, {"kind": "bpe", "tokenizer": {"model": {"vocab": {f"piece{id}": id for id in range(2000)}}}})
    first, before = opened(lambda: call(lister, tmp_path), tmp_path)
    again, after = opened(lambda: call(lister, tmp_path), tmp_path)
    assert before >= 200  # the control: it does see them
    assert after == 0
    assert again == first
    changed = next((tmp_path / "checkpoints").glob("*step7.pt"))
    os.utime(changed, ns=(1, 1))
    _, once_more = opened(lambda: call(lister, tmp_path), tmp_path)
    assert 0 < once_more <= before // 200


def test_a_narrow_terminal_shows_every_path_whole_and_no_line_is_broken_by_it(trained, monkeypatch):
    monkeypatch.setattr(lister, "stdout_columns", lambda: 80)
    monkeypatch.chdir(trained)
    text, runs = call(lister, trained).out.split("\n\n")
    common, head, under, *lines = text.splitlines()
    assert common == "all 6: layout unified, resumable yes"
    assert head.split() + under.split() == ["step", "loss", "size", "saved", "(UTC)", "run", "path"]
    found = ckpt.find(trained / "checkpoints")
    assert [line.split()[0] for line in lines if not line.startswith(" ")] == [str(each.step) for each in found]
    assert [line.split()[0] for line in lines if line.startswith("    checkpoints/")] == [
        str(each.path.relative_to(trained)) for each in found
    ]
    assert max(map(len, (text + runs).splitlines())) <= 80


# ---------------------------------------------------------------------------------------------------------------------
# inspect


@pytest.mark.parametrize("layout", WRITERS)
def test_sections_of_every_layout(trained, tmp_path, layout):
    original = ckpt.load(family(trained)[8])
    path = save(tmp_path, original, layout)
    said = call(inspector, tmp_path, CHECKPOINT_PATH=path)
    assert said.code == 0, said.err
    names = [line for line in said.out.splitlines() if line.startswith("===")]
    assert names == [f"=== {name} ===" for name in ("FORMAT", "CONFIG", "TOKENIZER", "TRAINING STATE", "TENSORS")]
    sections = dict(part.split(" ===\n", 1) for part in said.out.removeprefix("=== ").split("\n\n=== "))
    assert sections["FORMAT"].split()[:2] == ["layout:", layout]
    assert f"Location: {path}\n" in sections["FORMAT"]
    assert ["LEARNING_RATE:", "0.001"] in [line.split() for line in sections["CONFIG"].splitlines()]
    assert [line.split() for line in sections["TOKENIZER"].splitlines()][:2] == [
        ["kind:", "char"],
        ["vocab:", str(len(original.tokenizer["chars"])), "tokens"],
    ]
    assert sections["TRAINING STATE"].startswith("Last recorded training step: 8 of 8\n")
    assert sections["TRAINING STATE"].endswith("Optimizer state available - can resume training")
    check_tensors(sections["TENSORS"], original, tmp_path / "checkpoints")


def check_tensors(text, original, folder):
    """Bytes by part against the record's own tensors and the files' sizes."""
    weights = sum(tensor.nbytes for tensor in original.model_state.values())
    moments = [each for kinds in original.optimizer_state["state"].values() for each in kinds.values()]
    optimizer = sum(tensor.nbytes for tensor in moments)
    total = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    assert text.startswith(f"Number of tensors: {len(original.model_state) + len(moments)}\n")
    said = {line.split()[0]: line.split()[1] for line in text.splitlines()[-4:]}
    expected = {"weights": weights, "optimizer": optimizer, "rest": total - weights - optimizer, "total": total}
    assert said == {name: f"{size:,}" for name, size in expected.items()}
    assert "float32" in text


@pytest.mark.parametrize("layout", [layout for layout in WRITERS if layout != "huggingface"])
def test_ttt_tensors_are_counted(tmp_path, layout):
    saved = gpt2_record(settings={"ttt": {"layers": "1"}})
    said = call(inspector, tmp_path, CHECKPOINT_PATH=save(tmp_path, saved, layout))
    own = [tensor.numel() for name, tensor in saved.model_state.items() if name.startswith("h.1.ttt.")]
    total = sum(tensor.numel() for tensor in saved.model_state.values())
    assert len(own) == 19
    assert f"\nFound 19 TTT tensors, {sum(own):,} elements of {total:,}\n" in said.out
    assert ["ttt.layers:", "1"] in [line.split() for line in said.out.splitlines()]
    assert "TTT tensors" not in call(inspector, tmp_path, CHECKPOINT_PATH=save(tmp_path, gpt2_record(), layout)).out


def test_names_and_shapes_of_the_first_tensors(trained):
    text = call(inspector, trained, CHECKPOINT_PATH=family(trained)[8]).out
    lines = [line.split(maxsplit=2) for line in text.split("weights:\n")[1].splitlines()[:6]]
    state = ckpt.load(family(trained)[8]).model_state
    assert lines[:5] == [[name, "float32", str(tuple(state[name].shape))] for name in list(state)[:5]]
    assert lines[5][:2] == ["...", "and"]


def test_model_only_cannot_resume(tmp_path):
    save(tmp_path, record(1, optimizer_state=None))
    text = call(inspector, tmp_path).out
    assert "No optimizer state - model-only checkpoint" in text
    assert "Optimizer state available" not in text
    assert [line.split()[1] for line in text.splitlines() if line.startswith("optimizer ")] == ["0"]


def test_a_prefix_with_the_word_optimizer_changes_nothing(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    ckpt.save(record(1, optimizer_state=None), tmp_path / "checkpoints", prefix="optimizer")
    assert "\noptimizer  0 bytes" in call(inspector, tmp_path).out


def test_a_damaged_checkpoint_is_refused_in_a_sentence(tmp_path):
    path = save(tmp_path, record(1))
    os.truncate(path, 1000)
    said = call(inspector, tmp_path, CHECKPOINT_PATH=path)
    assert (said.code, said.out) == (3, "")
    assert said.err.startswith(f"error: {path}: is damaged or cut short")
    assert call(inspector, tmp_path, CHECKPOINT_PATH=tmp_path / "nothing.pt").code == 3


PEAK = """
import sys; sys.path[:0] = [{root!r}, {root!r} + "/tests"]
from pathlib import Path
from script import call, script
module = script("inspect_checkpoint")
for path in {paths!r}:
    Path("/proc/self/clear_refs").write_text("5")  # the peak is forgotten
    assert call(module, Path({folder!r}), CHECKPOINT_PATH=path, **{changes!r}).code == 0
    print(*(line.split()[1] for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")))
"""


def peaks(folder, *paths, **changes):
    """The peak memory in bytes of a process while it looks at each path."""
    if not os.path.exists("/proc/self/clear_refs"):
        pytest.skip("the system does not report peak memory")
    program = PEAK.format(root=str(ROOT), paths=[str(path) for path in paths], folder=str(folder), changes=changes)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [int(line) * 1024 for line in done.stdout.split()]


@pytest.mark.parametrize("layout", ["unified", "directory", "huggingface"])
def test_no_tensor_is_loaded(tmp_path, layout):
    small = save(tmp_path, record(1, tokenizer=None), layout)
    large = save(tmp_path, record(2, size=2000, tokenizer=None), layout)  # 48 MB
    _, before, after = peaks(tmp_path, small, small, large)
    assert after - before < 4e6


def test_control_comparing_does_load_them(tmp_path):
    small = save(tmp_path, record(1, tokenizer=None))
    large = save(tmp_path, record(2, size=2000, tokenizer=None))
    _, before, after = peaks(tmp_path, small, small, large, COMPARE_WITH=str(large))
    assert after - before > 30e6


# COMPARE_WITH


def test_equal_checkpoints_print_nothing(trained, tmp_path):
    path = family(trained)[8]
    other = save(tmp_path, dataclasses.replace(ckpt.load(path)), "stepfiles")
    said = call(inspector, trained, CHECKPOINT_PATH=path, COMPARE_WITH=path)
    assert (said.code, said.out) == (0, "")
    assert "are identical" in said.err
    differing = call(inspector, trained, CHECKPOINT_PATH=path, COMPARE_WITH=other).out.splitlines()[1:]
    assert [line.split()[:2] for line in differing] == [["metadata", "save_number"], ["metadata", "saved_at"]]


def test_settings_metadata_and_tensors_that_differ(tmp_path):
    one, other = record(1), record(1, hyperparameters={"BATCH_SIZE": 3}, run_id="two")
    other.model_state = {WEIGHT: one.model_state[WEIGHT].clone()}
    other.model_state[WEIGHT][3, 4] += 0.5
    paths = [save(tmp_path, each) for each in (one, other)]
    said = call(inspector, tmp_path, CHECKPOINT_PATH=paths[0], COMPARE_WITH=paths[1])
    found = {tuple(line.split()[:2]): line.split()[2:] for line in said.out.splitlines()[1:]}
    assert found["setting", "BATCH_SIZE"] == ["2", "3"]
    assert found["metadata", "run_id"] == ["one", "two"]
    assert found["tensor", WEIGHT] == ["max", "|difference|", "0.5"]
    assert {kind for kind, _ in found} == {"setting", "metadata", "tensor"}
    assert sum(kind == "tensor" for kind, _ in found) == 1


def test_auto_is_compared_as_it_was_resolved(tmp_path):
    for name, changes in (("auto", {}), ("set", {"DTYPE": "float32", "COMPILE": "false", "TOKENIZER": "char"})):
        (tmp_path / name).mkdir()
        device = "auto" if name == "auto" else choose_device("auto").type
        assert train(tmp_path / name, TRAINING_STEPS="2", DEVICE=device, **changes)[0] == 0
    paths = [next((tmp_path / name / "checkpoints").glob("*.pt")) for name in ("auto", "set")]
    out = call(inspector, tmp_path, CHECKPOINT_PATH=paths[0], COMPARE_WITH=paths[1]).out
    assert ckpt.load(paths[0]).hyperparameters["DTYPE"] == "auto"  # the control: it is recorded as it was asked for
    assert [line.split()[1] for line in out.splitlines() if line.startswith("setting")] == ["TRAINING_DATA_SOURCE"]


def test_tensors_of_other_shapes_and_in_only_one(tmp_path):
    paths = [save(tmp_path, each) for each in (record(1), record(1, size=9, optimizer_state=None))]
    out = call(inspector, tmp_path, CHECKPOINT_PATH=paths[0], COMPARE_WITH=paths[1]).out
    assert f"{WEIGHT}" in out
    assert "float32 (8, 8) against float32 (9, 9)" in out
    assert out.count("only in the first") == 3


def test_signs_of_zero_and_nan_are_bytes(tmp_path):
    one, other = record(1), record(1)
    one.model_state, other.model_state = {WEIGHT: torch.zeros(8, 8)}, {WEIGHT: -torch.zeros(8, 8)}
    paths = [save(tmp_path, each) for each in (one, other)]
    assert (
        "max |difference| 0, but other bytes"
        in call(inspector, tmp_path, CHECKPOINT_PATH=paths[0], COMPARE_WITH=paths[1]).out
    )
    one.model_state = {WEIGHT: torch.full((8, 8), math.nan)}
    path = save(tmp_path, one)
    assert call(inspector, tmp_path, CHECKPOINT_PATH=path, COMPARE_WITH=path).out == ""


def test_tied_weights_are_counted_once(tmp_path):
    model = golden_nano()
    path = tmp_path / "ckpt.pt"
    torch.save(nanogpt(model) | {"best_val_loss": 1.75}, path)
    (tmp_path / "meta.pkl").write_bytes(meta(CHARS))
    out = call(inspector, tmp_path, CHECKPOINT_PATH=path).out
    sizes = {line.split()[0]: int(line.split()[1].replace(",", "")) for line in out.splitlines()[-4:]}
    assert sizes["weights"] == sum(parameter.nbytes for parameter in model.parameters())
    assert sizes["rest"] > 0
    assert sum(sizes.values()) == 2 * sizes["total"] == 2 * path.stat().st_size


def test_an_optimizer_state_that_cannot_be_used_is_not_denied(tmp_path):
    model = golden_nano()
    momentum = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    sum(parameter.sum() for parameter in model.parameters()).backward()
    momentum.step()
    path = tmp_path / "ckpt.pt"
    torch.save(nanogpt(model, momentum), path)
    (tmp_path / "meta.pkl").write_bytes(meta(CHARS))
    out = call(inspector, tmp_path, CHECKPOINT_PATH=path).out
    assert "No optimizer state" not in out
    assert "cannot be used" in out
    torch.save(nanogpt(model) | {"optimizer": None}, path)
    assert "No optimizer state" in call(inspector, tmp_path, CHECKPOINT_PATH=path).out
