"""scripts/verify_checkpoint.py: every check passes on an intact checkpoint and fails on a bad one,
and a replay proves the bytes.
"""

import dataclasses
import math
import os
import struct

import pytest
import torch
from drive import named_tensors, small_text
from records import WEIGHT, flipped, gpt2_record, record
from script import call, copied, family, rows, script, train_family

from milepost import ckpt
from milepost.ckpt.layouts import WRITERS, unified
from milepost.run import text as run_text

verifier = script("verify_checkpoint")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return train_family(tmp_path_factory.mktemp("family"))


def save(folder, one, layout="unified"):
    (folder / "checkpoints").mkdir(exist_ok=True)
    return ckpt.save(one, folder / "checkpoints", layout=layout)


def flipped_in(file, tensor):
    """Flips a bit of the file in the bytes of a tensor."""
    place = file.read_bytes().find(tensor.contiguous().numpy().tobytes())
    assert place > 0
    flipped(file, place + 1)


@pytest.mark.parametrize("layout", WRITERS)
def test_a_saved_run_passes_in_every_layout(trained, tmp_path, layout):
    path = save(tmp_path, ckpt.load(family(trained)[8]), layout)
    said = call(verifier, tmp_path, CHECKPOINT_PATH=path)
    assert said.code == 0, said.out
    seen = rows(said.out)
    assert [(name, status) for name, (status, _) in seen.items()] == [
        ("bytes", "ok"), ("shapes", "ok"), ("numbers", "ok"), ("tokenizer", "ok"), ("exactly", "yes"),
    ]  # fmt: skip
    tensors = dict(named_tensors(ckpt.load(path)))
    assert seen["numbers"][1] == f"{len(tensors)} tensors are finite"
    assert said.out.startswith(f"{path}\n")


@pytest.mark.parametrize("layout", WRITERS)
def test_a_flipped_bit_is_found_in_every_layout(trained, tmp_path, layout):
    original = ckpt.load(family(trained)[8])
    path = save(tmp_path, original, layout)
    moment = max(original.optimizer_state["state"][0].values(), key=torch.numel)
    for file in (tmp_path / "checkpoints").rglob("*"):
        if file.is_file() and moment.numpy().tobytes() in file.read_bytes():
            flipped_in(file, moment)
            break
    said = call(verifier, tmp_path, CHECKPOINT_PATH=path)
    assert said.code == 3
    seen = rows(said.out)
    assert seen["bytes"][0] == "FAILED"
    assert "checksum" in seen["bytes"][1] or "sha256" in seen["bytes"][1]
    if layout in ("unified", "separated"):
        assert seen["exactly"] == ("no", "it is damaged")
    else:  # a small file's beginning, which every load looks at, is all of it
        assert seen["opens"][0] == "FAILED"


def test_nan_and_inf(tmp_path):
    one = record(1, optimizer_state=None)
    one.model_state[WEIGHT][2, 3] = math.nan
    said = call(verifier, tmp_path, CHECKPOINT_PATH=save(tmp_path, one))
    assert said.code == 3
    assert rows(said.out)["numbers"] == ("FAILED", f"NaN or Inf in {WEIGHT}")
    assert rows(said.out)["bytes"][0] == "ok"
    other = record(2)
    other.optimizer_state["state"][0]["exp_avg"][0, 0] = math.inf
    said = call(verifier, tmp_path, CHECKPOINT_PATH=save(tmp_path, other))
    assert rows(said.out)["numbers"] == ("FAILED", f"NaN or Inf in optimizer: {WEIGHT}.exp_avg")


def test_weights_that_do_not_fit_the_settings(tmp_path):
    path = save(tmp_path, record(1, model_settings={"vocab_size": 9, "block_size": 4}))
    said = call(verifier, tmp_path, CHECKPOINT_PATH=path)
    assert said.code == 3
    assert rows(said.out)["shapes"][0] == "FAILED"
    assert f"{WEIGHT} is (8, 8), expected (9, 9)" in rows(said.out)["shapes"][1]


def test_another_tokenizer_than_was_saved_fails(tmp_path):
    said = call(verifier, tmp_path, CHECKPOINT_PATH=save(tmp_path, record(1, tokenizer_sha256="0" * 64)))
    assert said.code == 3
    assert "is not the one it was saved with" in rows(said.out)["tokenizer"][1]
    said = call(verifier, tmp_path, CHECKPOINT_PATH=save(tmp_path, record(2, tokenizer=None)))
    assert (said.code, rows(said.out)["tokenizer"]) == (0, ("none", "not saved with it"))


@pytest.mark.parametrize("kind", [{"kind": "byte"}, {"kind": "gpt2"}])
def test_tokenizers_round_trip(tmp_path, kind):
    rows_of_model = 256 if kind["kind"] == "byte" else 50257
    weights = torch.zeros(rows_of_model, 1).expand(-1, 1)
    one = record(1, tokenizer=kind, optimizer_state=None)
    if kind["kind"] == "byte":
        one = record(1, size=256, tokenizer=kind, optimizer_state=None)
    else:
        sizes = {"vocab_size": rows_of_model, "block_size": 4, "n_layer": 1, "n_head": 1, "n_embd": 1}
        one = dataclasses.replace(
            one, model_type="gpt2", model_settings=sizes, model_state={"wte.weight": weights.contiguous()}
        )
    seen = rows(call(verifier, tmp_path, CHECKPOINT_PATH=save(tmp_path, one)).out)
    assert seen["tokenizer"][0] == "ok"
    assert f"round trip of {len(verifier.SAMPLE)} characters" in seen["tokenizer"][1]


def test_a_file_that_is_not_a_checkpoint(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    path = tmp_path / "checkpoints" / "notes.pt"
    path.write_text("no checkpoint")
    said = call(verifier, tmp_path, CHECKPOINT_PATH=path)
    assert said.code == 3
    assert {name: status for name, (status, _) in rows(said.out).items()} == {"bytes": "FAILED", "opens": "FAILED"}


def test_a_broken_link_is_a_bad_checkpoint(tmp_path):
    whole = save(tmp_path, record(1))
    for name in ("x.pt", "y.pt"):
        (whole.parent / name).symlink_to(whole.parent / "nothing.pt")
    said = call(verifier, tmp_path, CHECKPOINT_PATH=whole.parent)
    assert said.code == 3
    assert "\n3 checkpoints, 2 bad\nFAILED: " in said.out
    bad, other, good = said.out.split("\n\n")[:3]
    assert bad.startswith(
        f"{whole.parent / 'x.pt'}\nbytes  FAILED  {whole.parent / 'x.pt'}: is a link to {whole.parent / 'nothing.pt'}"
    )
    assert other.startswith(f"{whole.parent / 'y.pt'}\n")
    assert rows(good)["bytes"][0] == "ok"


# Does it resume exactly?


def test_reasons_why_it_does_not_resume_exactly(trained, tmp_path):
    folder = copied(trained, tmp_path)
    small_text(tmp_path, characters=5000, name="other.txt")
    said = call(verifier, folder, CHECKPOINT_PATH=family(folder)[8], TRAINING_DATA_SOURCE=tmp_path / "other.txt")
    assert (said.code, rows(said.out)["exactly"]) == (0, ("no", "the training text differs"))
    said = call(verifier, folder, CHECKPOINT_PATH=family(folder)[8], TRAINING_DATA_SOURCE=tmp_path / "nothing.txt")
    status, why = rows(said.out)["exactly"]
    assert (said.code, status) == (0, "no")
    assert "nothing.txt" in why
    original = ckpt.load(family(folder)[8])
    other = dataclasses.replace(original, runtime=original.runtime | {"threads": 77}, optimizer_state=None)
    status, why = rows(call(verifier, folder, CHECKPOINT_PATH=save(folder, other)).out)["exactly"]
    assert status == "no"
    assert f"{len(original.model_state)} parameters have no optimizer state" in why
    assert "was 77" in why


def test_settings_of_training_are_ignored(trained):
    said = call(
        verifier, trained, CHECKPOINT_PATH=family(trained)[8], LEARNING_RATE="0.5", MODEL_TYPE="bigram", SEED="3"
    )
    assert rows(said.out)["exactly"] == ("yes", "")


# A folder


def test_every_checkpoint_of_a_folder(trained, tmp_path):
    folder = copied(trained, tmp_path)
    said = call(verifier, folder, CHECKPOINT_PATH=folder / "checkpoints")
    assert said.code == 0, said.out
    count = sum(1 for path in (folder / "checkpoints").rglob("*.pt"))
    assert said.out.endswith(f"{count} checkpoints, 0 bad\nPASSED\n")
    os.truncate(family(folder)[2], 3000)
    said = call(verifier, folder, CHECKPOINT_PATH=folder / "checkpoints")
    assert said.code == 3
    assert f"\n{count} checkpoints, 1 bad\nFAILED: " in said.out


def test_hard_links_are_verified_once(tmp_path):
    one = record(1, validation_loss=1.0)
    path = save(tmp_path, one)
    ckpt.keep_best(one, tmp_path / "checkpoints", saved=path)
    said = call(verifier, tmp_path, CHECKPOINT_PATH=tmp_path / "checkpoints")
    assert said.out.count("numbers") == 1
    assert said.out.startswith(f"{path}\n")


def test_an_empty_folder_is_refused(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    said = call(verifier, tmp_path, CHECKPOINT_PATH=tmp_path / "checkpoints")
    assert (said.code, said.out) == (3, "")
    assert "holds no checkpoint" in said.err


# REPLAY


@pytest.fixture
def cached(trained, monkeypatch):
    monkeypatch.setattr(run_text, "CACHE_FOLDER", trained / "cache")


@pytest.mark.parametrize(("step", "since"), [(2, "new weights"), (8, "step 6 ")])
@pytest.mark.usefixtures("cached")
def test_a_replay_ends_in_the_same_bytes(trained, step, since):
    path = family(trained)[step]
    said = call(verifier, trained, CHECKPOINT_PATH=path, REPLAY="true")
    assert said.code == 0, said.out
    status, how = rows(said.out)["replay"]
    tensors = len(dict(named_tensors(ckpt.load(path))))
    assert status == "ok"
    assert how.startswith(f"from {since}")
    assert how.endswith(f"{tensors} tensors, all bytes equal")
    hashes = [line.split()[-1] for line in said.out.splitlines() if line.startswith("sha256")]
    assert len(hashes) == 2
    assert len(set(hashes)) == 1
    assert len(hashes[0]) == 64


@pytest.mark.usefixtures("cached")
def test_children_are_replayed_from_their_parent_and_from_themselves(trained):
    children = [one for one in ckpt.find(trained / "checkpoints") if one.metadata["parent"]]
    seen = [call(verifier, trained, CHECKPOINT_PATH=one.path, REPLAY="true") for one in children]
    assert [said.code for said in seen] == [0, 0]
    assert [rows(said.out)["replay"][1].split("(")[0] for said in seen] == ["from step 4 ", "from step 5 "]
    for said in seen:
        assert rows(said.out)["replay"][0] == "ok"


@pytest.mark.usefixtures("cached")
def test_a_replay_leaves_nothing_behind(trained):
    before = sorted(path.name for path in [*(trained / "runs").iterdir(), *(trained / "checkpoints").iterdir()])
    call(verifier, trained, CHECKPOINT_PATH=family(trained)[4], REPLAY="true")
    assert sorted(path.name for path in [*(trained / "runs").iterdir(), *(trained / "checkpoints").iterdir()]) == before


@pytest.mark.usefixtures("cached")
def test_control_one_changed_bit_fails_the_replay(trained, tmp_path):
    folder = copied(trained, tmp_path)
    path = family(folder)[4]
    changed = ckpt.load(path)
    name, weight = next((name, tensor.clone()) for name, tensor in changed.model_state.items() if tensor.dim() == 2)
    weight[0, 0] = struct.unpack("<f", bytes([bytes_of(weight[0, 0])[0] ^ 1, *bytes_of(weight[0, 0])[1:]]))[0]
    changed.model_state = {**changed.model_state, name: weight}
    path.unlink()
    unified.LAYOUT.write(changed, path.parent, path.stem)
    said = call(verifier, folder, CHECKPOINT_PATH=path, REPLAY="true")
    assert said.code == 3
    status, how = rows(said.out)["replay"]
    assert status == "FAILED"
    assert f"1 of {len(dict(named_tensors(changed)))} tensors differ, first {name}: max |difference|" in how
    assert rows(said.out)["bytes"][0] == "ok"  # the file itself is as it was written


def bytes_of(scalar):
    return struct.pack("<f", scalar.item())


@pytest.mark.usefixtures("cached")
def test_model_only_is_replayed_by_its_weights(trained, tmp_path):
    folder = copied(trained, tmp_path)
    path = save(folder, dataclasses.replace(ckpt.load(family(folder)[8]), optimizer_state=None))
    said = call(verifier, folder, CHECKPOINT_PATH=path, REPLAY="true")
    assert said.code == 0, said.out
    assert rows(said.out)["replay"][1].endswith(f"{len(ckpt.load(path).model_state)} tensors, all bytes equal")


def test_reasons_why_it_cannot_be_replayed(trained, tmp_path):
    path = save(tmp_path, record(1, run_id=None))
    said = call(verifier, tmp_path, CHECKPOINT_PATH=path, REPLAY="true")
    assert (said.code, rows(said.out)["replay"][0]) == (3, "FAILED")
    assert "another program" in rows(said.out)["replay"][1]
    child = next(one for one in ckpt.find(trained / "checkpoints") if one.metadata["parent"])
    alone = save(tmp_path, ckpt.load(child.path))
    said = call(verifier, tmp_path, CHECKPOINT_PATH=alone, REPLAY="true")
    assert said.code == 3
    assert "its run began with step 4 of run" in rows(said.out)["replay"][1]


def test_the_last_line_is_the_verdict(trained, tmp_path):
    folder = copied(trained, tmp_path)
    assert call(verifier, folder, CHECKPOINT_PATH=family(folder)[8]).out.splitlines()[-1] == "PASSED"
    bad = family(folder)[4]
    os.truncate(bad, 4000)
    for chosen in (bad, folder / "checkpoints"):
        said = call(verifier, folder, CHECKPOINT_PATH=chosen)
        assert (said.code, said.out.splitlines()[-1]) == (3, f"FAILED: {bad}")


def test_the_adapters_are_counted(tmp_path):
    saved = gpt2_record(settings={"ttt": {"layers": "1"}})
    out = call(verifier, tmp_path, CHECKPOINT_PATH=save(tmp_path, saved)).out
    (line,) = [line for line in out.splitlines() if line.startswith("adapters ")]
    assert line.split()[:4] == ["adapters", "ok", "19", "TTT"]
    assert "adapters " not in call(verifier, tmp_path, CHECKPOINT_PATH=save(tmp_path, gpt2_record())).out


@pytest.mark.parametrize("chosen", ["{}/*.pt", "{}", "{0}/sub/*.pt,{0}/a.pt"])
def test_a_glob_and_a_list_verify_all_that_they_name(tmp_path, chosen):
    folder = tmp_path / "checkpoints"
    for name in ("a.pt", "sub/b.pt", "sub/broken.pt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        save(tmp_path, record(1)).rename(folder / name)
    os.truncate(folder / "sub" / "broken.pt", 900)
    said = call(verifier, tmp_path, CHECKPOINT_PATH=chosen.format(folder))
    shown = [line for line in said.out.splitlines() if line.startswith(str(folder))]
    expected = ["a.pt"] if chosen.endswith("/*.pt") else ["a.pt", "sub/b.pt", "sub/broken.pt"]
    assert sorted(shown) == [str(folder / name) for name in expected]
    assert said.code == (3 if len(expected) > 1 else 0)
    assert said.out.splitlines()[-1] == (f"FAILED: {folder / 'sub' / 'broken.pt'}" if said.code else "PASSED")


def test_a_checkpoint_that_records_no_text_is_not_compared_with_the_bundled_one(tmp_path):
    path = save(tmp_path, dataclasses.replace(gpt2_record(), data={}, run_id=None))
    said = call(verifier, tmp_path, CHECKPOINT_PATH=path)
    assert said.code == 0, said.out
    assert rows(said.out)["exactly"][0] == "no"
    assert "set TRAINING_DATA_SOURCE" in rows(said.out)["exactly"][1]
    assert "dear_wren" not in said.out
