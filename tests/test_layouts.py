"""Every layout keeps every bit: what is saved in one is loaded from each of its names, and comes back from every other."""

import hashlib
import itertools
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from records import FULL, WEIGHT, assert_same, bits, flipped, gpt2_record, plain, record, refusal, refused, snapshot
from transformers import AutoTokenizer, GPT2LMHeadModel

from milepost import ckpt
from milepost.ckpt import Checkpoint, CheckpointError
from milepost.ckpt.layouts import layout_of
from milepost.ckpt.record import metadata
from milepost.ckpt.restore import build_model, build_tokenizer
from milepost.text import tokenization

FIXTURES = Path(__file__).parent / "fixtures"
sys.path.append(str(FIXTURES))
import make  # noqa: E402

NAMES = sorted(ckpt.WRITERS)
BY_STEP = {"stepfiles", "consolidated"}  # whose names repeat from run to run

UNTIED = {"tied": False, "activation": "relu"}
MADE = {
    "bigram": lambda: record(7, **FULL),
    "gpt2": lambda: gpt2_record(7, **FULL),
    "gpt2 without bias": lambda: gpt2_record(settings={"bias": False, "dropout": 0.25}),
    "gpt2 relu, untied": lambda: gpt2_record(settings=UNTIED),
    "gpt2 relu, untied, without bias": lambda: gpt2_record(settings=UNTIED | {"bias": False}),
    "gpt2 erf": lambda: gpt2_record(settings={"activation": "gelu_erf"}),
    "gpt2 muon": lambda: gpt2_record(optimizer="muon"),
    "gpt2 bfloat16": lambda: half(gpt2_record()),
}


def half(record: Checkpoint) -> Checkpoint:
    record.model_state = {name: tensor.bfloat16() for name, tensor in record.model_state.items()}
    return record


def model_only(record: Checkpoint) -> Checkpoint:
    record.optimizer_state = None
    return record


def names_of(home: Path, layout: str) -> list[Path]:
    """Every path by which somebody may mean the checkpoint: its home, each file, its stem with and without a suffix."""
    whole = ckpt.WRITERS[layout].files(home)
    inside = list(home.rglob("*")) if home.is_dir() else []
    stems = {
        "separated": [home.with_name(home.name.removesuffix("-model.pt") + suffix) for suffix in ("", ".pt")],
        "stepfiles": [home.with_suffix("")],
    }
    return [home, *whole, *inside, *stems.get(layout, [])]


# ---------------------------------------------------------------------------------------------------------------------
# There and back


@pytest.mark.parametrize("full", [True, False], ids=["full", "model-only"])
@pytest.mark.parametrize("made", MADE)
@pytest.mark.parametrize("layout", NAMES)
def test_what_is_saved_is_what_is_loaded_by_every_name(layout, made, full, tmp_path):
    written = MADE[made]() if full else model_only(MADE[made]())
    home = ckpt.save(written, tmp_path, layout=layout)
    for name in names_of(home, layout):
        path, _ = ckpt.resolve(str(name), tmp_path)
        assert path == home, name
    read = ckpt.load(home, verify=True)
    assert bits(read) == bits(written)
    assert plain(read) == plain(written)  # the numbers of the save too: the store gave them to what was written
    assert (read.path, read.layout, read.notes, read.edited) == (home, layout, [], {})
    assert read.parts == (["model", "optimizer"] if full else ["model"])
    assert ckpt.verify(home) == []
    with torch.no_grad():
        ids = torch.arange(4)[None]
        ours, theirs = (build_model(each, device=torch.device("cpu")).eval()(ids)[0] for each in (read, written))
    assert ours.equal(theirs)


@pytest.mark.parametrize("full", [True, False], ids=["full", "model-only"])
@pytest.mark.parametrize("layout", NAMES)
def test_a_look_gives_the_metadata_of_a_load(layout, full, tmp_path):
    home = ckpt.save(MADE["gpt2"]() if full else model_only(MADE["gpt2"]()), tmp_path, layout=layout)
    peeked = ckpt.WRITERS[layout].read_metadata(home)
    assert peeked == json.loads(json.dumps(metadata(ckpt.load(home))))
    (one,) = ckpt.find(tmp_path)
    assert (one.path, one.layout, one.resumable, one.problem) == (home, layout, full, None)
    assert one.metadata == {name: value for name, value in peeked.items() if name != "tokenizer"}
    assert one.size == sum(map(len, snapshot(tmp_path).values()))
    assert ckpt.load(home, optimizer=False).optimizer_state is None


@pytest.mark.parametrize("layout", NAMES)
def test_the_optimizers_groups_are_as_torch_has_them(layout, tmp_path):
    """Restored, they and the moments are the optimizer's own again."""
    written = gpt2_record(optimizer="muon")
    read = ckpt.load(ckpt.save(written, tmp_path, layout=layout))
    assert read.optimizer_state is not None
    assert written.optimizer_state is not None
    assert list(read.optimizer_state) == ["state", "param_groups"]
    assert list(read.optimizer_state["state"]) == sorted(written.optimizer_state["state"])
    kinds = {index: set(moments) for index, moments in written.optimizer_state["state"].items()}
    assert {index: set(moments) for index, moments in read.optimizer_state["state"].items()} == kinds
    assert {"momentum_buffer"} in kinds.values()
    assert {"step", "exp_avg", "exp_avg_sq"} in kinds.values()


def hand_over(record: Checkpoint, layout: str, folder: Path) -> Checkpoint:
    """The record after it was written in another layout, under the numbers that it has, and read again."""
    folder.mkdir()
    return ckpt.load(ckpt.WRITERS[layout].write(record, folder, "same"), verify=True)


@pytest.mark.parametrize(("first", "second"), list(itertools.permutations(NAMES, 2)))
def test_into_a_second_layout_and_back_nothing_changes(first, second, tmp_path):
    saved = ckpt.load(ckpt.save(MADE["bigram"](), tmp_path, layout=first))
    between = hand_over(saved, second, tmp_path / "second")
    again = hand_over(between, first, tmp_path / "third")
    for each in (between, again):
        assert_same(each, saved, but=set())
        assert each.notes == []
    assert (between.layout, again.layout) == (second, first)


@pytest.mark.parametrize("full", [True, False], ids=["full", "model-only"])
@pytest.mark.parametrize("made", [made for made in MADE if made != "bigram"])
def test_a_tour_of_all_layouts_changes_nothing(made, full, tmp_path):
    written = MADE[made]() if full else model_only(MADE[made]())
    read = written
    for number, layout in enumerate([*NAMES, *reversed(NAMES)]):
        read = hand_over(read, layout, tmp_path / str(number))
        assert_same(read, written, but=set())


@pytest.mark.parametrize("layout", NAMES)
def test_the_same_record_is_the_same_files(layout, tmp_path):
    for name in ("a", "b"):
        hand_over(MADE["gpt2"](), layout, tmp_path / name)
    assert snapshot(tmp_path / "a") == snapshot(tmp_path / "b")


@pytest.mark.parametrize("layout", NAMES)
def test_control_one_bit_more_or_less_would_be_seen(layout, tmp_path):
    """Negative control for the tests above."""
    read = ckpt.load(ckpt.save(MADE["gpt2"](), tmp_path, layout=layout))
    other = MADE["gpt2"]()
    other.model_state["ln_f.bias"].view(torch.int32)[3] ^= 1
    assert bits(read) != bits(other)
    with pytest.raises(AssertionError):
        assert_same(read, gpt2_record(7, **(FULL | {"tokens_seen": 4801})))


# ---------------------------------------------------------------------------------------------------------------------
# Which layout it is


def claims(path: Path) -> list[str]:
    """Return the name of the layout that reads `path`: the first in the registry that detects it. Empty if none does."""
    layout = layout_of(path)
    return [] if layout is None else [layout.name]


@pytest.mark.parametrize("made", ["bigram", "gpt2"])
@pytest.mark.parametrize("layout", NAMES)
def test_a_checkpoint_and_each_of_its_files_are_read_by_its_layout(layout, made, tmp_path):
    home = ckpt.save(MADE[made](), tmp_path, layout=layout)
    for path in {home, *ckpt.WRITERS[layout].files(home)}:
        assert claims(path) == [layout], path


@pytest.mark.parametrize("layout", NAMES)
def test_a_damaged_checkpoint_is_still_its_layouts_to_refuse(layout, tmp_path):
    home = ckpt.save(MADE["gpt2"](), tmp_path, layout=layout)
    head = next(path for path in (home, *sorted(home.glob("*.json"))) if path.is_file())
    for path in (head, *([ckpt.WRITERS[layout].files(home)[-1]] if not home.is_dir() else [])):
        path.write_bytes(path.read_bytes()[:40])
    assert len(claims(home)) == 1
    refused(home)


def test_no_layout_claims_what_is_none(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("no checkpoint")
    (tmp_path / "settings").mkdir()
    (tmp_path / "settings" / "config.json").write_text("{}")
    (tmp_path / "loss_state.json").write_text('{"loss": 1}')
    for path in sorted(tmp_path.rglob("*")):
        assert claims(path) == [], path
    assert ckpt.find(tmp_path) == []


@pytest.mark.parametrize("layout", NAMES)
def test_names_mean_nothing_to_a_layout(layout, tmp_path):
    """Under another stem it is the same checkpoint."""
    home = ckpt.save(MADE["bigram"](), tmp_path, layout=layout)
    stem = home.name.removesuffix("-model.pt").removesuffix(".safetensors").removesuffix(".pt")
    for path in ckpt.WRITERS[layout].files(home):
        path.rename(path.with_name(path.name.replace(stem, "renamed")))
    read = ckpt.load(home.with_name(home.name.replace(stem, "renamed")), verify=True)
    assert_same(read, MADE["bigram"]())


# ---------------------------------------------------------------------------------------------------------------------
# Golden files


def golden_paths() -> list[Path]:
    layouts = [(layout, FIXTURES / name) for name, layout in ckpt.WRITERS.items()]
    paths = [layout.targets(place, make.STEM)[-1] for layout, place in layouts]
    first = [ckpt.WRITERS[path.relative_to(FIXTURES).parts[0]].primary_file(path) or path for path in paths]
    return first + [FIXTURES / place / make.STEM for place in make.SINCE.values()]


@pytest.mark.parametrize("path", golden_paths(), ids=lambda path: path.relative_to(FIXTURES).parts[0])
def test_the_golden_files_are_read_to_the_bit(path):
    """Committed with format 2. Their tensors are those of the first file that any version wrote."""
    read = ckpt.load(path, verify=True)
    place = path.relative_to(FIXTURES).parts[0]
    layout = next((name for name, later in make.SINCE.items() if later == place), place)
    assert claims(path) == [layout]
    assert (read.layout, read.format_version, read.written_by) == (layout, 2, "milepost 0.1.0")
    assert {name: getattr(read, name) for name in FULL} == FULL
    assert (read.step, read.save_id, read.save_number) == (7, "00112233445566aa", 3)
    assert read.tokenizer == {"kind": "char", "chars": list("abcdefgh")}
    moments = [f"optimizer {WEIGHT} {kind}" for kind in ("step", "exp_avg", "exp_avg_sq")]
    data = b"".join(bits(read)[name][2] for name in (WEIGHT, *moments))
    assert hashlib.sha256(data).hexdigest() == "c60e4fc937608ab542c38233f583ded0fe7abf4224ae306da22a79a537ab8765"
    assert sum(len(content) for content in snapshot(path.parent).values()) < 40_000
    assert read.notes == []


def test_the_golden_gpt2_is_read_in_our_orientation():
    read = ckpt.load(FIXTURES / "huggingface" / "golden-gpt2", verify=True)
    assert read.model_state["h.0.attn.c_attn.weight"].shape == (12, 4)
    assert read.model_state["h.0.attn.c_attn.weight"][0].tolist() == [0, 7 / 64, 14 / 64, 21 / 64]
    assert bits(read) == bits(make.golden_gpt2())
    assert read.parts == ["model"]


def test_the_golden_files_are_what_the_writer_writes_today(tmp_path):
    """If this fails, the format has changed: raise FORMAT_VERSION, add a migration, keep the old files and make new ones."""
    make.make(tmp_path)
    made = snapshot(tmp_path)
    assert len(made) > 20
    golden = {name: (FIXTURES / name).read_bytes() for name in made}
    assert {name: as_written_then(name, data) for name, data in made.items()} == {
        name: as_written_then(name, data) for name, data in golden.items()
    }
    changed = {name for name in made if made[name] != golden[name]}
    assert {name.rpartition("/")[2] for name in changed} == {*WITH_ENDS, "milepost.json"}
    assert all(name.startswith("huggingface/") for name in changed)


# For transformers alone: since the golden files were written, null is written there for a token that a tokenizer lacks.
WITH_ENDS = ("config.json", "generation_config.json")


def as_written_then(name: str, data: bytes) -> bytes:
    """The file without the null ids, and a manifest without the sums of the files that have them."""
    folder, _, file = name.rpartition("/")
    if not folder.startswith("huggingface") or file not in (*WITH_ENDS, "milepost.json"):
        return data
    values = json.loads(data)
    if file in WITH_ENDS:
        ends = {"bos_token_id", "eos_token_id"}
        return json.dumps(
            {key: value for key, value in values.items() if key not in ends or value is not None}
        ).encode()
    del values["sha256"]
    values["files"] = {key: entry for key, entry in values["files"].items() if key not in WITH_ENDS}
    return json.dumps(values).encode()


# ---------------------------------------------------------------------------------------------------------------------
# What others open


@pytest.mark.parametrize("made", [made for made in MADE if made.startswith("gpt2") and made != "gpt2 bfloat16"])
def test_transformers_computes_the_same_and_reads_the_same_ids(made, tmp_path):
    home = ckpt.save(MADE[made](), tmp_path, layout="huggingface")
    theirs, ids = GPT2LMHeadModel.from_pretrained(home).eval(), torch.arange(12).reshape(2, 6)
    with torch.no_grad():
        ours = build_model(ckpt.load(home), device=torch.device("cpu")).eval()(ids)[0]
        expected = theirs(ids).logits
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=0)
    assert expected.std() > 0.001
    tokenizer = AutoTokenizer.from_pretrained(home)
    assert tokenizer("a bad cab")["input_ids"] == build_tokenizer(ckpt.load(home)).encode("a bad cab")
    assert tokenizer.decode([1, 0, 3, 11, 2]) == "bad c"


TEXT = "Dear Wren, my neighbour's cat has adopted me.\r\nWhat do I owe? <|endoftext|> 日本 é\n" * 5


@pytest.mark.parametrize("kind", ["char", "byte", "bpe", "gpt2"])
def test_transformers_reads_every_tokenizer_of_ours(kind, tmp_path):
    ours = tokenization.build(kind, [(TEXT, True)], alphabet="".join(sorted(set(TEXT))), documents=1, vocab_size=300)
    one = gpt2_record(
        settings={"vocab_size": ours.vocab_size, "n_layer": 1}, tokenizer=ours.to_dict(), tokenizer_sha256=ours.digest
    )
    home = ckpt.save(one, tmp_path, layout="huggingface")
    theirs = AutoTokenizer.from_pretrained(home, split_special_tokens=True)
    assert theirs(TEXT)["input_ids"] == ours.encode(TEXT)
    assert theirs.decode(ours.encode(TEXT), clean_up_tokenization_spaces=False) == TEXT
    assert build_tokenizer(ckpt.load(home)).digest == ours.digest
    (home / "milepost.json").unlink()
    assert build_tokenizer(ckpt.load(home)).encode(TEXT) == ours.encode(TEXT)


def test_transformers_finds_every_tensor_and_no_other(tmp_path):
    for made in ("gpt2", "gpt2 without bias", "gpt2 relu, untied, without bias"):
        home = ckpt.save(MADE[made](), tmp_path, layout="huggingface")
        _, told = GPT2LMHeadModel.from_pretrained(home, output_loading_info=True)
        assert {name: list(names) for name, names in told.items() if names} == {}


def test_a_head_with_a_bias_has_no_place_in_transformers(tmp_path):
    one = gpt2_record(settings=UNTIED)
    one.model_state["lm_head.bias"] = torch.ones(12)
    with pytest.raises(CheckpointError, match=r"lm_head.bias \(12,\)") as caught:
        ckpt.save(one, tmp_path, layout="huggingface")
    assert caught.value.kind == "refused"
    assert snapshot(tmp_path) == {}
    assert list(tmp_path.glob(".tmp-*")) == []


@pytest.mark.parametrize("made", ["gpt2", "gpt2 erf", "gpt2 relu, untied"])
def test_the_folder_without_our_manifest_is_still_a_model(made, tmp_path):
    home = ckpt.save(MADE[made](), tmp_path, layout="huggingface")
    (home / "milepost.json").unlink()
    read = ckpt.load(home)
    assert bits(read) == bits(model_only(MADE[made]()))
    assert read.model_settings == MADE[made]().model_settings
    assert read.tokenizer == MADE[made]().tokenizer
    assert (read.step, read.run_id) == (0, None)


# ---------------------------------------------------------------------------------------------------------------------
# separated


@pytest.fixture
def pair(tmp_path) -> Path:
    return ckpt.save(record(7, **FULL), tmp_path, layout="separated")


def other_half(model: Path) -> Path:
    return model.with_name(model.name.replace("-model.pt", "-optimizer.pt"))


def test_plain_torch_opens_either_half_and_finds_the_documented_keys(pair):
    model = torch.load(pair, weights_only=True)
    assert model.keys() == {"model_state_dict", "global_step", "config", "metadata"}
    assert (model["global_step"], model["config"]["model_type"]) == (7, "bigram")
    other = torch.load(other_half(pair), weights_only=True)
    assert other.keys() == {"optimizer_states", "lr_scheduler_states", "global_step", "epoch"}
    assert (other["global_step"], other["epoch"], other["lr_scheduler_states"]) == (7, 0.75, [FULL["schedule"]])


def test_loaded_by_either_half_it_is_the_pair(pair):
    for path in (pair, other_half(pair)):
        assert_same(ckpt.load(path, verify=True), record(7, **FULL))
        assert ckpt.load(path).path == pair


@pytest.mark.parametrize("options", [{}, {"optimizer": False}, {"verify": True}], ids=str)
def test_halves_of_two_saves_are_never_a_pair(options, pair, tmp_path):
    second = ckpt.save(record(8, **FULL), tmp_path, layout="separated")
    shutil.copy(other_half(second), other_half(pair))
    error = refusal(pair, **options)
    assert (error.kind, error.path) == ("refused", other_half(pair))
    assert "move it away to open" in error.remedy
    other_half(pair).unlink()
    assert ckpt.load(pair).step == 7


def test_without_the_optimizers_half_it_generates_and_says_so(pair):
    other_half(pair).unlink()
    read = ckpt.load(pair, verify=True)
    assert_same(read, record(7, **FULL, optimizer_state=None))
    assert read.notes == [
        f"{other_half(pair)}: not found; without it this checkpoint generates but cannot resume bit-exactly"
    ]
    (one,) = ckpt.find(pair.parent)
    assert (one.path, one.resumable) == (pair, False)


def test_an_optimizers_half_alone_is_no_checkpoint(pair):
    pair.unlink()
    other = other_half(pair)
    error = refusal(other)
    assert (error.kind, error.path) == ("lacking", other)
    assert pair.name in error.problem
    assert ckpt.find(pair.parent) == []
    assert len(ckpt.verify(other)) == 1


@pytest.mark.parametrize("which", ["model", "optimizer"])
def test_a_damaged_half_is_named(which, pair):
    path = pair if which == "model" else other_half(pair)
    whole = path.read_bytes()
    path.write_bytes(whole[:-30])
    assert refused(pair).startswith(f"{path}: is damaged")
    path.write_bytes(whole)
    flipped(path, whole.index(b"data/1" if which == "optimizer" else b"data/0") + 200)
    assert refused(pair, verify=True).startswith(f"{path}: is damaged")
    assert len(ckpt.verify(pair)) == 1


# ---------------------------------------------------------------------------------------------------------------------
# directory


@pytest.fixture
def folder(tmp_path) -> Path:
    """A GPT-2 with dropout, so that there is something to edit."""
    return ckpt.save(
        gpt2_record(settings={"dropout": 0.1}, hyperparameters={"BATCH_SIZE": 2, "DEVICE": "cpu"}),
        tmp_path,
        layout="directory",
    )


def edit(folder: Path, file: str = "config.json", **changes: Any) -> None:
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_it_holds_the_five_documented_files(folder):
    assert {"model.pt", "config.json", "tokenizer.json", "training_state.json", "optimizer.pt"} < set(snapshot(folder))
    bare = torch.load(folder / "model.pt", weights_only=True)
    assert bare.keys() == gpt2_record().model_state.keys()
    assert json.loads((folder / "tokenizer.json").read_text()) == {"token_kind": "char", "chars": list("abcdefghijk ")}
    assert json.loads((folder / "training_state.json").read_text())["optimizer_file"] == "optimizer.pt"


def test_what_a_hand_may_change_is_taken_and_told(folder):
    edit(folder, batch_size=16, dropout=0.25, device="cuda")
    read = ckpt.load(folder, verify=True)
    assert read.edited == {"BATCH_SIZE": [2, 16], "DROPOUT": [0.1, 0.25]}
    assert (read.hyperparameters["BATCH_SIZE"], read.model_settings["dropout"]) == (16, 0.25)
    assert len(read.notes) == 3
    config = folder / "config.json"
    assert f"{config}: batch_size was saved as 2 and is now 16: applied" in read.notes
    assert bits(read) == bits(gpt2_record())
    assert build_model(read, device=torch.device("cpu")).settings.dropout == 0.25
    assert ckpt.verify(folder) == []


def test_an_edit_that_was_taken_is_saved_as_it_is_now(folder, tmp_path):
    edit(folder, batch_size=16, dropout=0.25)
    for layout in NAMES:
        again = ckpt.load(ckpt.save(ckpt.load(folder), tmp_path, layout=layout))
        assert (again.edited, again.notes) == ({}, [])
        assert (again.hyperparameters["BATCH_SIZE"], again.model_settings["dropout"]) == (16, 0.25)


WRONG = [
    ({"n_layer": 3}, "n_layer was saved as 2 and is now 3, but the weights are those of 2"),
    ({"n_embd": 16}, "n_embd was saved as 8 and is now 16"),
    ({"vocab_size": 13}, "vocab_size was saved as 12 and is now 13"),
    ({"n_layer": 2.0}, "n_layer was saved as 2 and is now 2.0"),
    ({"bias": False}, "bias was saved as true and is now false"),
    ({"model_type": "bigram"}, 'model_type was saved as "gpt2" and is now "bigram"'),
    ({"batch_size": 0}, "batch_size was saved as 2 and is now 0, not a valid batch_size"),
    ({"batch_size": "8"}, 'is now "8", not a valid batch_size'),
    ({"batch_size": True}, "is now true, not a valid batch_size"),
    ({"dropout": 1.0}, "is now 1.0, not a valid dropout"),
    ({"dropout": None}, "is now null, not a valid dropout"),
    ({"device": 3}, "is now 3, not a valid device"),
]


@pytest.mark.parametrize(("changes", "reason"), WRONG, ids=[str(changes) for changes, _ in WRONG])
def test_what_a_hand_may_not_change_is_refused_by_name(changes, reason, folder):
    edit(folder, **changes)
    error = refusal(folder)
    assert (error.kind, error.path) == ("refused", folder / "config.json")
    assert reason in error.problem


def test_an_unknown_and_a_missing_field_are_told(folder):
    edit(folder, invented=3)
    values = json.loads((folder / "config.json").read_text())
    del values["n_head"]
    (folder / "config.json").write_text(json.dumps(values))
    read = ckpt.load(folder)
    assert_same(read, gpt2_record(settings={"dropout": 0.1}, hyperparameters={"BATCH_SIZE": 2, "DEVICE": "cpu"}))
    assert [note.split(": ", 1)[1] for note in read.notes] == [
        "fields that this version does not know were left out: ['invented']",
        "lacks n_head; the saved values apply",
    ]


def test_without_config_json_the_manifests_settings_are_taken(folder):
    (folder / "config.json").unlink()
    read = ckpt.load(folder, verify=True)
    assert read.model_settings == gpt2_record(settings={"dropout": 0.1}).model_settings
    assert read.notes == [f"{folder / 'config.json'}: not found; the settings in manifest.json apply"]
    assert claims(folder) == ["directory"]


def test_without_optimizer_and_training_state_it_generates_and_says_so(folder):
    for name in ("optimizer.pt", "training_state.json"):
        (folder / name).unlink()
    read = ckpt.load(folder, verify=True)
    assert bits(read) == bits(model_only(gpt2_record()))
    assert read.notes == [
        f"{folder / 'optimizer.pt'}: not found; without it this checkpoint generates but cannot resume bit-exactly"
    ]
    assert (read.parts, read.step) == (["model"], 3)
    assert [one.resumable for one in ckpt.find(folder.parent)] == [False]


def test_another_tokenizer_is_refused(folder):
    path = folder / "tokenizer.json"
    path.write_text(path.read_text().replace('"a"', '"z"'))
    error = refusal(folder)
    assert (error.kind, error.path) == ("refused", path)
    path.write_text(path.read_text() + " ")
    assert str(path) in refused(folder)


# ---------------------------------------------------------------------------------------------------------------------
# stepfiles and consolidated


def test_files_by_step_as_documented(tmp_path):
    home = ckpt.save(record(100, **FULL), tmp_path, layout="stepfiles")
    assert home == tmp_path / FULL["run_id"] / "step_000100.safetensors"
    names = sorted(path.name for path in home.parent.iterdir())
    assert names == ["step_000100.safetensors", "step_000100_optimizer.safetensors", "step_000100_state.json"]
    state = json.loads(home.with_name("step_000100_state.json").read_text())
    assert (state["step"], state["epoch"]) == (100, 0.75)
    assert state["metrics"] == {"validation_loss": 2.25, "best_loss": 2.125}


def test_a_folder_by_step_as_documented(tmp_path):
    home = ckpt.save(record(1000, **FULL), tmp_path, layout="consolidated", prefix="mine")
    assert home == tmp_path / FULL["run_id"] / "mine_001000"
    assert sorted(snapshot(home)) == [
        "consolidated/config.json", "consolidated/consolidated.safetensors", "consolidated/tokenizer.json",
        "optimizer.safetensors", "training_state.json",
    ]  # fmt: skip
    assert json.loads((home / "consolidated" / "config.json").read_text()) == {
        "model_type": "bigram", "vocab_size": 8, "block_size": 4,
    }  # fmt: skip


@pytest.mark.parametrize("layout", sorted(BY_STEP))
def test_two_runs_at_one_step_do_not_meet(layout, tmp_path):
    paths = [ckpt.save(record(5, run_id=run), tmp_path, layout=layout) for run in ("a", "b", "a")]
    assert len(set(paths)) == 3
    assert paths[2].name.startswith(paths[0].stem + "_2")
    assert [one.run_id for one in ckpt.find(tmp_path)] == ["a", "b", "a"]
    assert [one.path for one in ckpt.find(tmp_path)] == paths


def test_a_step_without_its_state_is_not_there_yet(tmp_path):
    """The state JSON is the mark of completeness: until it is seen, no file of the step counts as a save of ours."""
    home = ckpt.save(record(5), tmp_path, layout="stepfiles")
    home.with_name("step_000005_state.json").unlink()
    assert [one for one in ckpt.find(tmp_path) if one.run_id] == []
