"""Other projects' checkpoints as files: found, told apart, opened, generated from, trained on, converted; or refused in one sentence."""

import io
import json
import os
import pickle
import shutil
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import torch
from drive import environment, newest, train
from foreign_programs import (
    CHARS,
    GOLDEN,
    SIZES,
    SMALL,
    LectureModel,
    NanoGPT,
    bare,
    golden_lecture,
    golden_nano,
    lightning,
    make,
    meta,
    nanogpt,
    pair,
    shaken,
    write_consolidated,
    write_lecture_folder,
    write_pair,
    write_step,
)
from records import assert_same, bits, mapped_and_touched, refused, save, snapshot
from safetensors.torch import save_file
from script import NOTHING_OF_TRAINING, Said, script
from torch import Tensor, nn

import training
from milepost import ckpt, config
from milepost.ckpt import Checkpoint, archive
from milepost.ckpt.foreign.importing import adopted, adopted_metadata
from milepost.ckpt.layouts import known_layout
from milepost.ckpt.record import metadata
from milepost.ckpt.restore import build_model, build_tokenizer, restore_optimizer
from milepost.runtime.optim import build_optimizer
from milepost.runtime.progress import Log
from milepost.text import tokenization

LOAD = script("load_checkpoint")
SHAPE = ("MODEL_TYPE", "N_LAYER", "N_HEAD", "N_EMBD", "BLOCK_SIZE")  # which the weights bring
IDS = torch.randint(5, (3, 4), generator=torch.Generator().manual_seed(3))  # (B, T), for every model here
ELEVEN = list("\n abcdefghi")  # as many as SIZES has rows


def answer(record: Checkpoint) -> Tensor:
    """What the record's model computes, through the same door as every checkpoint."""
    with torch.no_grad():
        return build_model(record, device=torch.device("cpu")).eval()(IDS)[0]


def name_of(path: Path) -> str:
    """Return the name of the layout that reads `path`."""
    return known_layout(path).name


def assert_computes(record: Checkpoint, theirs: nn.Module, *, atol: float = 1e-5) -> None:
    """The record's logits are those of the other program's model."""
    with torch.no_grad():
        expected = theirs(IDS)
    assert expected.std() > 0.1  # large enough for the tolerance to mean something
    torch.testing.assert_close(answer(record), expected, atol=atol, rtol=0)


def call(folder: Path, **changes: str | Path | None) -> Said:
    """What scripts/load_checkpoint.py says; nothing is set but the folders of `folder` and `changes`."""
    out, err = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", newline=""), io.StringIO()
    texts = {name: None if value is None else str(value) for name, value in changes.items()}
    settings = config.read(environment(folder, **NOTHING_OF_TRAINING | {"CHECKPOINT_DIR": None} | texts))
    with redirect_stdout(out):
        code = training.guarded(LOAD.main, settings, log=Log(err))
    out.flush()
    return Said(code, out.buffer.getvalue().decode(), err.getvalue())


def nano(**changes: Any) -> NanoGPT:
    torch.manual_seed(1)
    return shaken(NanoGPT(**SIZES | changes))


def lecture(**changes: Any) -> LectureModel:
    torch.manual_seed(2)
    return shaken(LectureModel(**SIZES | changes))


def stepped(model: NanoGPT, *, steps: int = 2) -> torch.optim.AdamW:
    """nanoGPT's optimizer after some steps."""
    optimizer = model.configure_optimizers()
    for _ in range(steps):
        model(IDS).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


def saved(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path)
    return path


# ---------------------------------------------------------------------------------------------------------------------
# Golden files


GOLDENS = {  # folder below the golden files: what is opened, its layout, step, epoch, validation loss, whether it has moments
    "nanogpt": ("ckpt.pt", "nanogpt", 250, None, 1.75, True),
    "lightning": ("epoch=1-step=20.ckpt", "lightning", 20, 1.0, 1.5, False),
    "lecture": ("latest.pt", "lecture", 30, None, None, False),
    "directory": ("dante", "directory", 1000, None, None, False),
    "unified": ("checkpoint-step001000.pt", "unified", 1000, 5.0, None, False),
    "pair": ("checkpoint-step001000-model.pt", "separated", 1000, 5.0, None, False),
    "mlx": ("step_000100.safetensors", "mlx", 100, 5.0, 2.5, False),
    "consolidated": ("checkpoint_001000", "consolidated", 0, None, None, False),
}


@pytest.fixture(scope="module")
def made_today(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("golden")
    make(folder)
    return folder


@pytest.mark.parametrize("place", ["committed", "today"])
@pytest.mark.parametrize("name", GOLDENS)
def test_golden_files_open_to_their_values(name: str, place: str, made_today: Path) -> None:
    """Those of today's torch too, so that they can be made again."""
    opened, layout, step, epoch, loss, moments = GOLDENS[name]
    path = (GOLDEN if place == "committed" else made_today) / name / opened
    assert name_of(path) == layout
    record = ckpt.load(path, verify=True)
    assert (record.layout, record.path, record.run_id) == (layout, path, None)
    assert (record.step, record.epoch, record.validation_loss) == (step, epoch, loss)
    assert record.tokenizer == {"kind": "char", "chars": CHARS}
    assert record.parts == (["model", "optimizer"] if moments else ["model"])
    assert record.model_type == "gpt2"
    assert SMALL.items() <= record.model_settings.items()
    theirs = golden_lecture() if name in ("lecture", "directory") else golden_nano()
    assert record.model_state["wte.weight"][0].tolist() == [
        (index * 7 - 30) / 32 for index in range(4)
    ]  # as `filled` has it
    assert_computes(record, theirs)
    if moments:
        state = {name: record.optimizer_state["state"][index] for group in record.optimizer_state["param_groups"]
                 for index, name in zip(group["params"], group["param_names"], strict=True)}  # fmt: skip
        assert {name: (one["step"].item(), one["exp_avg"].unique().item()) for name, one in state.items()} == {
            name: (250.0, number / 64)
            for number, name in enumerate([
                "wte.weight", "wpe.weight", "h.0.attn.c_attn.weight", "h.0.attn.c_proj.weight", "h.0.mlp.c_fc.weight",
                "h.0.mlp.c_proj.weight", "h.0.ln_1.weight", "h.0.ln_2.weight", "ln_f.weight",
            ])
        }  # fmt: skip


@pytest.mark.parametrize("name", GOLDENS)
def test_a_listing_tells_what_opening_tells(name: str) -> None:
    opened = GOLDENS[name][0]
    verbs = known_layout(GOLDEN / name / opened)
    assert verbs.read_metadata(GOLDEN / name / opened) == metadata(ckpt.load(GOLDEN / name / opened))


WIDE = SIZES | {"vocab_size": 3000, "n_embd": 192, "n_head": 6}
LARGE: dict[str, Callable[[], Any]] = {
    "nanogpt": lambda: nanogpt(NanoGPT(**WIDE)),
    "lecture": lambda: {"model": LectureModel(**WIDE).state_dict(), "config": WIDE},
    "a head like the embedding": lambda: {"model": untwined(NanoGPT(**WIDE)), "config": WIDE},
}


def untwined(model: NanoGPT) -> dict[str, Tensor]:
    """The head as a copy, which torch stores once more."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("name", LARGE)
def test_a_listing_leaves_tensors_unread(name: str, tmp_path: Path) -> None:
    path = saved(tmp_path / "large.pt", LARGE[name]())
    content, _ = archive.load(path)
    listed = adopted_metadata(path, content, layout="any")
    touched = mapped_and_touched(path)[1]
    assert touched < path.stat().st_size / 8
    assert listed == metadata(adopted(path, content, layout="any"))
    more = mapped_and_touched(path)[1] - touched  # negative control: what reads them is seen
    assert more > 800_000 if name != "nanogpt" else more == 0


def test_a_listing_sees_by_the_first_rows_that_two_keys_disagree(tmp_path: Path) -> None:
    path = saved(tmp_path / "large.pt", {key: bare(NanoGPT(**WIDE)) for key in ("model", "state_dict")})
    content, _ = archive.load(path)
    with pytest.raises(ckpt.CheckpointError, match="both hold weights, but different ones"):
        adopted_metadata(path, content, layout="any")
    assert mapped_and_touched(path)[1] < path.stat().st_size / 8


def test_golden_files_of_today_are_those_that_are_committed(made_today: Path) -> None:
    places = {path.relative_to(GOLDEN) for path in GOLDEN.rglob("*") if path.is_file()}
    assert places == {path.relative_to(made_today) for path in made_today.rglob("*") if path.is_file()}
    assert sum((GOLDEN / place).stat().st_size for place in places) < 100_000
    for opened in (Path(name, values[0]) for name, values in GOLDENS.items()):
        assert bits(ckpt.load(GOLDEN / opened)) == bits(ckpt.load(made_today / opened))


# ---------------------------------------------------------------------------------------------------------------------
# nanoGPT


@pytest.mark.parametrize("prefix", ["", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
@pytest.mark.parametrize("bias", [True, False])
def test_nanogpts_ckpt_computes_what_nanogpt_computes(bias: bool, prefix: str, tmp_path: Path) -> None:
    model = nano(bias=bias)
    content = nanogpt(model, stepped(model), prefix=prefix)
    content["model"] |= {
        f"{prefix}transformer.h.0.attn.bias": torch.ones(1, 1, 6, 6).tril()
    }  # the mask of old versions
    record = ckpt.load(saved(tmp_path / "ckpt.pt", content), verify=True)
    assert_computes(record, model)
    assert record.model_settings == SIZES | {"bias": bias, "dropout": 0.0, "activation": "gelu_erf", "tied": True}
    assert (record.step, record.validation_loss, record.layout) == (250, 1.75, "nanogpt")
    assert record.written_by == "another program (nanogpt)"


def test_nanogpts_moments_are_restored_parameter_by_parameter(tmp_path: Path) -> None:
    model = nano()
    optimizer = stepped(model)
    record = ckpt.load(saved(tmp_path / "ckpt.pt", nanogpt(model, optimizer)))
    rebuilt = build_model(record, device=torch.device("cpu"))
    ours = build_optimizer(rebuilt, "adamw", lr=1.0, weight_decay=0.1, betas=(0.9, 0.95))
    restored = restore_optimizer(ours, record)
    assert (restored.restored, restored.missing) == (len(list(model.parameters())), ())
    names = dict(rebuilt.named_parameters())
    for theirs_name, parameter in model.named_parameters():
        state = ours.state[names[theirs_name.removeprefix("transformer.")]]
        assert state["step"] == 2
        for kind in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(state[kind], optimizer.state[parameter][kind]), theirs_name
    assert ckpt.load(tmp_path / "ckpt.pt", optimizer=False).optimizer_state is None


def test_meta_beside_it_is_the_tokenizer(tmp_path: Path) -> None:
    path = saved(tmp_path / "ckpt.pt", nanogpt(nano()))
    assert ckpt.load(path).tokenizer is None
    (tmp_path / "meta.pkl").write_bytes(meta(ELEVEN))
    record = ckpt.load(path)
    assert build_tokenizer(record).encode("a\nb") == [2, 0, 3]
    assert (
        f"{tmp_path / 'meta.pkl'}: the tokenizer is char with 11 tokens, from the file beside the weights"
        in record.notes
    )
    (tmp_path / "meta.pkl").write_bytes(meta([*ELEVEN, "j"]))
    assert refused(path).startswith(f"{tmp_path / 'meta.pkl'}: has 12 tokens, but the model beside it only 11 rows")


@pytest.mark.parametrize("rows", [50257, 50304])
def test_gpt2s_tokenizer_is_known_by_the_rows(rows: int, tmp_path: Path) -> None:
    path = saved(tmp_path / "ckpt.pt", nanogpt(nano(vocab_size=rows, n_embd=3, n_layer=1)))
    record = ckpt.load(path)
    assert record.tokenizer == {"kind": "gpt2"}
    assert any(f"GPT-2's own is used, because its vocabulary has {rows} rows" in note for note in record.notes)
    said = call(tmp_path, CHECKPOINT_PATH=path, PROMPT="Hello", MAX_NEW_TOKENS="4", SAMPLE_SEED="1")
    assert (said.code, said.out.startswith("Hello")) == (0, True), said.err


def touch(path: Path) -> bytes:
    """A meta.pkl that makes a file when it is unpickled, as only a program that trusts it would."""

    class Call:
        def __reduce__(self) -> Any:
            return os.system, (f"touch {path}",)

    return pickle.dumps({"vocab_size": 11, "itos": Call(), "stoi": {}})


def test_a_hostile_meta_is_refused_and_nothing_runs(tmp_path: Path) -> None:
    path, mark = saved(tmp_path / "ckpt.pt", nanogpt(nano())), tmp_path / "mark"
    (tmp_path / "meta.pkl").write_bytes(touch(mark))
    message = refused(path)
    assert message.startswith(f"{tmp_path / 'meta.pkl'}: asks for more than plain values")
    said = call(tmp_path, CHECKPOINT_PATH=path, PROMPT="a")
    assert (said.code, said.out) == (3, "")
    assert message in said.err
    (found,) = ckpt.find(tmp_path)
    assert found.problem == message
    assert not mark.exists()
    (tmp_path / "meta.pkl").write_bytes(b"\0" * (4 * 2**20 + 1))
    assert "is larger than 4194304 bytes" in refused(path)


def letters(folder: Path, chars: list[str]) -> Path:
    """A text with just these characters, of enough windows to train on."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "own.txt").write_text("".join(chars) * 60)
    return folder / "own.txt"


def test_the_characters_of_the_text_are_taken_if_their_number_fits(tmp_path: Path) -> None:
    path = saved(tmp_path / "out" / "ckpt.pt", nanogpt(nano()))
    asked = {"CHECKPOINT_PATH": path, "PROMPT": "abc", "MAX_NEW_TOKENS": "5", "SAMPLE_SEED": "1"}
    said = call(tmp_path, **asked, TRAINING_DATA_SOURCE=letters(tmp_path, ELEVEN))
    assert said.code == 0, said.err
    assert said.out.startswith("abc")
    assert set(said.out) <= set(ELEVEN)
    assert len(said.out) == len("abc") + 5 + 1
    assert "the 11 different characters of TRAINING_DATA_SOURCE are used" in said.err
    said = call(tmp_path, **asked, TRAINING_DATA_SOURCE=letters(tmp_path, [*ELEVEN, "j"]))
    assert (said.code, said.out) == (3, "")
    assert (
        f"{path}: carries no tokenizer, and no tokenizer that milepost knows has 11 tokens, nor do the 12 different characters of "
        "TRAINING_DATA_SOURCE; put its tokenizer.json or meta.pkl beside it, or name the text it was trained on in TRAINING_DATA_SOURCE"
    ) in said.err


def test_training_goes_on_from_nanogpt_and_saves_unified(tmp_path: Path) -> None:
    model = nano()
    path = saved(tmp_path / "out" / "ckpt.pt", nanogpt(model, stepped(model)))
    (path.parent / "meta.pkl").write_bytes(meta(ELEVEN))
    before = snapshot(path.parent)
    text = letters(tmp_path, ELEVEN)
    changes = {"RESUME_TRAINING_STEPS": "3", "RESUME_LEARNING_RATE": "1e-4", "BATCH_SIZE": "2", "SAMPLE_INTERVAL": "0"}
    said = call(tmp_path, CHECKPOINT_PATH=path, MODE="resume", TRAINING_DATA_SOURCE=text, EVAL_STEPS="1", **changes)
    assert said.code == 0, said.err
    count = len(list(model.parameters()))
    (row,) = [line for line in said.out.splitlines() if line.startswith("optimizer")]
    assert row.split(None, 2)[1:] == ["restored", f"moments of {count} of {count} parameters"]
    after = snapshot(path.parent)
    assert before.items() <= after.items()  # the old files stay as they were
    last = ckpt.latest(ckpt.find(path.parent))
    assert (last.step, last.layout, last.resumable) == (253, "unified", True)
    record = ckpt.load(last.path, verify=True)
    assert record.model_settings == SIZES | {"bias": True, "dropout": 0.0, "activation": "gelu_erf", "tied": True}
    assert record.tokenizer == {"kind": "char", "chars": ELEVEN}
    assert {moments["step"].item() for moments in record.optimizer_state["state"].values()} == {5.0}  # two and three
    assert record.hyperparameters["OPTIMIZER"] == "adamw"
    assert (record.parent["file"], record.parent["run_id"], record.parent["step"]) == ("ckpt.pt", None, 250)
    old = ckpt.load(path).model_state["wte.weight"]
    assert 0 < (record.model_state["wte.weight"] - old).abs().max() < 1e-2  # trained, from these weights
    again = call(tmp_path, CHECKPOINT_PATH=last.path, PROMPT="abc", MAX_NEW_TOKENS="3", SAMPLE_SEED="1")
    assert (again.code, again.out[:3]) == (0, "abc"), again.err


def test_a_fresh_run_begins_with_nanogpts_weights(tmp_path: Path) -> None:
    model = nano()
    path = saved(tmp_path / "out" / "ckpt.pt", nanogpt(model, stepped(model)))
    changes = {"TRAINING_DATA_SOURCE": str(letters(tmp_path, ELEVEN)), "TRAINING_STEPS": "1", "LEARNING_RATE": "1e-9"}
    small = {"SAMPLE_INTERVAL": "0", "BATCH_SIZE": "2", "WARMUP_STEPS": "0", **dict.fromkeys(SHAPE)}
    code, said = train(tmp_path, INIT_FROM=str(path), **changes, **small)
    assert code == 0, said
    assert "the 11 different characters of TRAINING_DATA_SOURCE are used" in said
    record = newest(tmp_path)
    assert (record.step, record.parent["file"], record.parent["step"]) == (1, "ckpt.pt", 250)
    assert record.model_settings["activation"] == "gelu_erf"
    assert_computes(record, model, atol=1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# Lightning


def test_lightnings_ckpt_computes_what_its_network_computes(tmp_path: Path) -> None:
    model = nano()
    content = lightning(model, {"lr": 1e-3, "config": SIZES | {"dropout": 0.1}}, step=20)
    record = ckpt.load(saved(tmp_path / "last.ckpt", content), verify=True)
    assert_computes(record, model)
    assert (record.layout, record.step, record.epoch, record.parts) == ("lightning", 20, 1.0, ["model"])
    assert record.model_settings["dropout"] == 0.1
    assert any("present but cannot be used: it is empty" in note for note in record.notes)
    theirs = lecture()
    assert_computes(ckpt.load(saved(tmp_path / "lecture.ckpt", lightning(theirs, {}))), theirs)


class Hyper:
    """Some class of another program."""


def test_lightnings_hyper_parameters_of_foreign_classes_are_read_as_their_fields(tmp_path: Path) -> None:
    hyper = Hyper()
    hyper.__dict__.update(SIZES | {"dropout": 0.25})
    content = lightning(nano(), {"module": hyper, "root": Path("/data"), "config": hyper})
    record = ckpt.load(saved(tmp_path / "last.ckpt", content))
    assert_computes(record, nano())
    assert record.model_settings["dropout"] == 0.25


def test_hyper_parameters_that_would_run_a_program_are_refused_by_name(tmp_path: Path) -> None:
    hyper = {"module": Hyper(), "root": Path("/data"), "call": os.system, **SIZES}
    path = saved(tmp_path / "last.ckpt", lightning(nano(), hyper))
    message = refused(path)
    assert "asks for Python objects that a checkpoint never needs (posix.system)" in message
    with pytest.raises(ckpt.CheckpointError) as caught:
        ckpt.load(path)
    assert caught.value.kind == "refused"


# ---------------------------------------------------------------------------------------------------------------------
# The lecture's model


@pytest.mark.parametrize(("name", "key"), [("latest.pt", "model_state_dict"), ("final.pt", ""), ("final.pt", "model")])
def test_the_lecture_model_in_one_file(name: str, key: str, tmp_path: Path) -> None:
    model = lecture()
    content = {key: model.state_dict(), "config": SIZES | {"dropout": 0.2}, "step": 77} if key else model.state_dict()
    path = saved(tmp_path / "dante" / name, content)
    (path.parent / "tokenizer.json").write_text(json.dumps({"token_kind": "char", "chars": ELEVEN}))
    assert name_of(path) == "lecture"
    record = ckpt.load(path, verify=True)
    assert_computes(record, model)
    assert record.model_settings["activation"] == "relu"
    assert record.model_settings["tied"] is False
    assert (record.step, record.model_settings["dropout"]) == ((77, 0.2) if key else (0, 0.0))
    assert ckpt.resolve(str(path.parent), tmp_path)[0] == path  # the folder's newest


def test_a_folder_of_the_lecture_model(tmp_path: Path) -> None:
    model = lecture()
    path = write_lecture_folder(tmp_path / "dante", model, {"token_kind": "char", "chars": ELEVEN})
    assert name_of(path) == "directory"
    for wish in (path, path / "model.pt", path / "config.json", path / "optimizer.pt"):
        assert ckpt.resolve(str(wish), tmp_path)[0] == path
    record = ckpt.load(path, verify=True)
    assert_computes(record, model)
    assert (record.layout, record.step, record.parts) == ("directory", 1000, ["model"])
    assert (record.model_settings["activation"], record.model_settings["dropout"]) == ("relu", 0.2)
    said = call(tmp_path, CHECKPOINT_PATH=path, PROMPT="abc", MAX_NEW_TOKENS="9", SAMPLE_SEED="1")
    assert said.code == 0, said.err
    assert len(said.out) == len("abc") + 9 + 1
    assert set(said.out) <= set(ELEVEN)
    for name in ("optimizer.pt", "training_state.json"):
        (path / name).unlink()
    alone = f"{path}: holds no optimizer state: it generates but cannot resume bit-exactly"
    assert (ckpt.load(path).step, ckpt.load(path).notes) == (0, [*record.notes[1:], alone])
    config_file = path / "config.json"
    config_file.write_text(config_file.read_text().replace('"n_layer": 2', '"n_layer": 3'))
    assert "n_layer is 3 in its config, but 2 by its weights" in refused(path)


def test_training_goes_on_from_a_folder_of_the_lecture_model(tmp_path: Path) -> None:
    """In its own layout, which can be written; ReLU and the head of its own stay, and the moments begin anew."""
    path = write_lecture_folder(tmp_path / "models" / "dante", lecture(), {"token_kind": "char", "chars": ELEVEN})
    before = snapshot(path)
    changes = {"RESUME_TRAINING_STEPS": "2", "BATCH_SIZE": "2", "SAMPLE_INTERVAL": "0", "EVAL_STEPS": "1"}
    text = letters(tmp_path, ELEVEN)
    said = call(tmp_path, CHECKPOINT_PATH=path, MODE="resume", TRAINING_DATA_SOURCE=text, **changes)
    assert said.code == 0, said.err
    assert "moments of 0 of" in said.out
    assert snapshot(path) == before
    last = ckpt.latest(ckpt.find(path.parent))
    assert (last.step, last.layout) == (1002, "directory")
    record = ckpt.load(last.path, verify=True)
    assert (record.model_settings["activation"], record.model_settings["tied"]) == ("relu", False)
    assert record.hyperparameters["OPTIMIZER"] == "adamw"  # as it was trained with, though none of its moments came


# ---------------------------------------------------------------------------------------------------------------------
# Document 002


@pytest.mark.parametrize("key", ["model", "state_dict", "model_state_dict"])
@pytest.mark.parametrize(
    "name", ["checkpoint-step001000.pt", "checkpoint-final.pt", "ckpt_epoch_10.ckpt", "model_best.pth", "latest.pt"]
)
def test_old_names_and_keys(name: str, key: str, tmp_path: Path) -> None:
    model = nano()
    config = SIZES | {"activation": "gelu"}  # nn.GELU()
    rest = {
        "optimizer": stepped(model).state_dict(),
        "lr_scheduler": {"last_epoch": 3},
        "global_step": 1000,
        "epoch": 5,
    }
    path = saved(tmp_path / name, {key: model.state_dict(), **rest, "config": config})
    assert name_of(path) == "unified"
    record = ckpt.load(path, verify=True)
    assert_computes(record, model)
    assert (record.step, record.epoch, record.layout) == (1000, 5.0, "unified")
    assert record.parts == ["model", "optimizer"]  # grouped as nanoGPT groups, so that its parameters are known
    assert [one.path for one in ckpt.find(tmp_path)] == [path]


@pytest.fixture
def halves(tmp_path: Path) -> tuple[Path, NanoGPT]:
    """A pair of another program's; the path of the model's half."""
    model = nano()
    content = pair(model, SIZES, stepped(model).state_dict())
    return write_pair(tmp_path, content), model


def test_a_pair_is_opened_by_either_name_and_by_the_stem(halves: tuple[Path, NanoGPT], tmp_path: Path) -> None:
    path, model = halves
    stem = tmp_path / "checkpoint-step001000"
    for wish in (path, f"{stem}-optimizer.pt", stem, f"{stem}.pt"):
        assert ckpt.resolve(str(wish), tmp_path)[0] == path
    (found,) = ckpt.find(tmp_path)
    assert (found.path, found.layout, found.step, found.resumable) == (path, "separated", 1000, True)
    for name in (path, Path(f"{stem}-optimizer.pt")):
        assert name_of(name) == "separated"
        record = ckpt.load(name)
        assert_computes(record, model)
        assert (record.path, record.epoch, record.parts) == (path, 5.0, ["model", "optimizer"])
    assert ckpt.load(path, optimizer=False).optimizer_state is None


def test_halves_of_two_steps_and_halves_alone(halves: tuple[Path, NanoGPT], tmp_path: Path) -> None:
    path, model = halves
    other = path.with_name("checkpoint-step001000-optimizer.pt")
    torch.save(torch.load(other, weights_only=True) | {"global_step": 2000}, other)
    assert "belongs to another step than checkpoint-step001000-model.pt" in refused(path)
    kept = other.rename(tmp_path / "kept")
    record = ckpt.load(path)
    assert (record.parts, record.step) == (["model"], 1000)
    assert_computes(record, model)
    assert ckpt.resolve(str(tmp_path / "checkpoint-step001000.pt"), tmp_path)[0] == path
    kept.rename(other)
    path.unlink()
    assert ckpt.find(tmp_path) == []
    assert "holds only an optimizer's state" in refused(other)


# ---------------------------------------------------------------------------------------------------------------------
# Documents 000 and 003


def nested(state: dict[str, Tensor]) -> dict[str, Any]:
    """Dotted names as MLX keeps them: dicts in dicts, and a list of blocks."""
    tree: dict[str, Any] = {}
    for name, tensor in state.items():
        *above, last = name.split(".")
        place = tree
        for word in above:
            place = place.setdefault(word, {})
        place[last] = tensor
    return tree | {"h": [tree["h"][str(number)] for number in range(len(tree["h"]))]}


def test_files_by_step(tmp_path: Path) -> None:
    first = write_step(tmp_path, bare(nano()), step=90, val_loss=2.0)
    model = shaken(nano())
    path = write_step(tmp_path, bare(model), step=100, val_loss=2.25)
    best = write_step(tmp_path / "best", bare(nano()), step=90, val_loss=2.0)
    for place in (tmp_path, tmp_path / "best"):
        (place / "config.json").write_text(json.dumps(SIZES | {"activation": "gelu_erf"}))
        (place / "tokenizer.json").write_text(json.dumps({"token_kind": "char", "chars": ELEVEN}))
    record = ckpt.load(path, verify=True)
    assert_computes(record, model)
    assert (record.step, record.epoch, record.validation_loss, record.layout) == (100, 5.0, 2.25, "mlx")
    state = tmp_path / "step_000100_state.json"
    for wish in (path, state, tmp_path / "step_000100", tmp_path):
        assert ckpt.resolve(str(wish), tmp_path)[0] == path
    assert name_of(state) == "mlx"
    assert sorted(one.path for one in ckpt.find(tmp_path)) == sorted([first, path, best])
    assert ckpt.resolve("best", tmp_path)[0] in (first, best)
    said = call(tmp_path, CHECKPOINT_PATH=best, PROMPT="abc", MAX_NEW_TOKENS="4", SAMPLE_SEED="1")
    assert (said.code, said.out[:3]) == (0, "abc"), said.err
    state.unlink()  # its step is told nowhere now, and it may be half of what is being written
    assert path not in [one.path for one in ckpt.find(tmp_path)]
    assert ckpt.load(path).step == 0


@pytest.mark.parametrize("metrics", [None, 3, {"val_loss": "low"}, {"validation_loss": -1.0}, {"val_loss": [1]}, {}])
def test_metrics_that_are_none_are_passed_over(metrics: Any, tmp_path: Path) -> None:
    path = write_step(tmp_path, bare(nano()))
    (tmp_path / "config.json").write_text('{"n_head": 3}')
    (tmp_path / "step_000100_state.json").write_text(json.dumps({"step": 100, "metrics": metrics}))
    assert (ckpt.load(path).step, ckpt.load(path).validation_loss) == (100, None)


def test_nested_names_in_an_archive(tmp_path: Path) -> None:
    model = nano()
    config = SIZES | {"activation": "gelu_erf"}
    path = saved(tmp_path / "weights.pt", {"model": nested(bare(model)), "config": config, "step": 4})
    record = ckpt.load(path)
    assert_computes(record, model)
    assert (record.step, record.layout) == (4, "unified")
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert bits(ckpt.load(saved(tmp_path / "bare.pt", nested(bare(model))))) == bits(record)


def test_consolidated_weights_without_training_state(tmp_path: Path) -> None:
    model = nano()
    path = write_consolidated(tmp_path / "checkpoint_001000", bare(model), SIZES | {"activation": "gelu_erf"})
    assert name_of(path) == "consolidated"
    record = ckpt.load(path, verify=True)
    assert_computes(record, model)
    assert (record.layout, record.path, record.parts) == ("consolidated", path, ["model"])
    (found,) = ckpt.find(tmp_path)
    assert (found.path, found.problem, found.resumable) == (path, None, False)
    for wish in (path / "consolidated", path / "consolidated" / "consolidated.safetensors"):
        assert ckpt.resolve(str(wish), tmp_path)[0] == path
    said = call(
        tmp_path, CHECKPOINT_PATH=path, PROMPT="abc", MAX_NEW_TOKENS="4", TRAINING_DATA_SOURCE=letters(tmp_path, ELEVEN)
    )
    assert (said.code, said.out[:3]) == (0, "abc"), said.err


# ---------------------------------------------------------------------------------------------------------------------
# Detection looks inside


ARCHIVES: dict[str, Callable[[], Any]] = {
    "nanogpt": lambda: nanogpt(nano()),
    "lightning": lambda: lightning(
        nano(), SIZES | {"model": "gpt", "model_args": {"x": 1}}
    ),  # with nanoGPT's words too
    "lecture": lambda: {"model_state_dict": lecture().state_dict(), "global_step": 3, "config": SIZES},
    "unified": lambda: {"state_dict": bare(nano()), "optimizer_states": [], "global_step": 3, "config": SIZES},
}
NAMES = [
    "ckpt.pt",
    "last.ckpt",
    "latest.pt",
    "model_best.pth",
    "x-model.pt",
    "x-optimizer.pt",
    "weights.bin",
    "noname",
    "step_000100_state.json",
]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("layout", ARCHIVES)
def test_a_misleading_name_misleads_nobody(layout: str, name: str, tmp_path: Path) -> None:
    path = saved(tmp_path / name, ARCHIVES[layout]())
    assert name_of(path) == layout
    assert ckpt.load(path).layout == layout
    if "lightning" in (layout, name) or layout == "unified":  # beside the optimizer's half of another
        torch.save(pair(nano(), SIZES)[1], tmp_path / "x-optimizer.pt")
        assert name_of(path) == (layout if name != "x-optimizer.pt" else "separated")


@pytest.mark.parametrize("layout", ARCHIVES)
def test_an_archive_under_the_name_of_safetensors_is_refused_by_what_it_is(layout: str, tmp_path: Path) -> None:
    path = saved(tmp_path / "model.pt", ARCHIVES[layout]()).rename(tmp_path / "step_000100.safetensors")
    (tmp_path / "step_000100_state.json").write_text('{"step": 100}')
    assert name_of(path) == "unified"
    assert "a torch archive under another format's name: rename it to .pt" in refused(path)


def test_safetensors_under_the_name_of_an_archive_are_refused_by_what_they_are(tmp_path: Path) -> None:
    path = tmp_path / "ckpt.pt"
    save_file({name: tensor.clone() for name, tensor in bare(nano()).items()}, path)
    assert name_of(path) == "unified"
    assert "is a safetensors file, not a torch file" in refused(path)


def test_a_lecture_pair_is_a_pair(tmp_path: Path) -> None:
    model = lecture()
    path = write_pair(tmp_path, pair(model, SIZES))
    assert name_of(path) == "separated"
    assert_computes(ckpt.load(path), model)


def test_both_meanings_of_tokenizer_json(tmp_path: Path) -> None:
    """Document 004's, and the one of the tokenizers library; whatever else it is, is refused."""
    path, beside = saved(tmp_path / "ckpt.pt", nanogpt(nano())), tmp_path / "tokenizer.json"
    beside.write_text(json.dumps({"token_kind": "char", "chars": ELEVEN}))
    assert ckpt.load(path).tokenizer == {"kind": "char", "chars": ELEVEN}
    (tmp_path / "meta.pkl").write_bytes(meta(ELEVEN[::-1]))
    assert ckpt.load(path).tokenizer["chars"] == ELEVEN  # the first of the two
    beside.write_text(json.dumps({"model_max_length": 5}))
    assert refused(path).startswith(f"{beside}: is not a tokenizer that milepost knows")
    beside.write_text('{"token_kind": "gpt2"}')
    assert refused(path).startswith(f"{beside}: has 50257 tokens, but the model beside it only 11 rows")
    bpe = tokenization.build("bpe", [("the cat and the hat " * 9, True)], alphabet="", documents=1, vocab_size=260)
    beside.write_text(json.dumps(bpe.to_dict()["tokenizer"]))  # as the tokenizers library has it
    assert refused(path).startswith(f"{beside}: has {bpe.vocab_size} tokens")
    record = ckpt.load(saved(path, nanogpt(nano(vocab_size=bpe.vocab_size))))
    assert record.tokenizer["kind"] == "bpe"
    assert build_tokenizer(record).encode("the cat") == bpe.encode("the cat")
    assert len(bpe.encode("the cat")) < len("the cat")


# ---------------------------------------------------------------------------------------------------------------------
# What is refused


def broken(change: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
    content = nanogpt(nano())
    change(content["model"])
    return content


REFUSED = {
    "collision": (
        broken(lambda state: state.update({"_orig_mod.transformer.ln_f.bias": torch.zeros(4)})),
        ["transformer.ln_f.bias (12,) and _orig_mod.transformer.ln_f.bias (4,) are both ln_f.bias"],
    ),
    "missing": (
        broken(lambda state: state.pop("transformer.h.1.mlp.c_fc.weight")),
        ["h.1.mlp.c_fc.weight (48, 12) is missing", "none were"],
    ),
    "shape": (
        broken(lambda state: state.update({"transformer.ln_f.weight": torch.ones(13)})),
        ["ln_f.weight is (13,), expected (12,)"],
    ),
    "more": (
        broken(lambda state: state.update({"transformer.h.0.moe.gate": torch.ones(2, 3), "rope.freqs": torch.ones(4)})),
        ["h.0.moe.gate (2, 3) is not known", "rope.freqs (4,) is not known"],
    ),
    "another model": (
        {"model": {"fc1.weight": torch.ones(3, 4)}, "model_args": SIZES},
        ["its weights are of no model that milepost knows: fc1.weight (3, 4)"],
    ),
    "two models": (
        {**nanogpt(nano()), "state_dict": shaken(nano()).state_dict()},
        ["state_dict and model both hold weights, but different ones"],
    ),
    "step": ({**nanogpt(nano()), "iter_num": -1}, ["iter_num is -1, expected a whole number"]),
    "heads": ({**nanogpt(nano()), "model_args": SIZES | {"n_head": 5}}, ["n_head is 5 in its config, which does not divide"]),
    "no weights": ({"weights": {"n": 1}, "step": 3}, ["does not contain model_state_dict (keys seen: 'weights', 'step')"]),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_translated_is_refused_by_name(name: str, tmp_path: Path) -> None:
    content, reasons = REFUSED[name]
    path = saved(tmp_path / "ckpt.pt", content)
    message = refused(path)
    assert message.startswith(f"{path}: ")
    for reason in reasons:
        assert reason in message
    (found,) = ckpt.find(tmp_path)
    assert found.problem == message
    said = call(tmp_path, CHECKPOINT_PATH=path, PROMPT="a")
    assert (said.code, said.out) == (3, "")
    assert message in said.err


def test_config_beside_the_file_tells_what_shapes_cannot(tmp_path: Path) -> None:
    """The remedy that building the model names; and one that contradicts the file is refused."""
    model = nano()
    path = saved(tmp_path / "ckpt.pt", {"model": model.state_dict()})
    with pytest.raises(ckpt.CheckpointError, match="has no n_head, which shapes do not determine") as caught:
        build_model(ckpt.load(path), device=torch.device("cpu"))
    assert caught.value.kind == "lacking"
    (tmp_path / "config.json").write_text('{"n_head": 3}')
    assert_computes(ckpt.load(path), model)
    (tmp_path / "config.json").write_text('{"n_head": 3, "n_layer": 4}')
    assert "n_layer is 4 in its config, but 2 by its weights" in refused(path)


def test_truncated_and_flipped_files_are_refused(tmp_path: Path) -> None:
    good = saved(tmp_path / "ckpt.pt", nanogpt(nano())).read_bytes()
    for length in (0, 10, len(good) // 2, len(good) - 1):
        (tmp_path / "cut.pt").write_bytes(good[:length])
        refused(tmp_path / "cut.pt")
    weights = nano().transformer.wte.weight.detach().numpy().tobytes()
    place = good.index(weights)
    (tmp_path / "flipped.pt").write_bytes(good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :])
    assert "do not match their checksum" in refused(tmp_path / "flipped.pt", verify=True)


# ---------------------------------------------------------------------------------------------------------------------
# Among ours


def test_ours_rank_above_other_programs_and_those_by_step(tmp_path: Path) -> None:
    for step in (900, 20_000, 10_000):
        saved(tmp_path / f"{'zz' if step == 900 else 'aa'}{step}.pt", nanogpt(nano(), step=step))
    late = saved(tmp_path / "last.ckpt", lightning(nano(), SIZES, step=15_000))
    order = [tmp_path / "zz900.pt", tmp_path / "aa10000.pt", late, tmp_path / "aa20000.pt"]
    assert [one.path for one in ckpt.find(tmp_path)] == order
    assert ckpt.latest(ckpt.find(tmp_path)).path == order[-1]
    ours = save(tmp_path, 3)
    assert [one.path for one in ckpt.find(tmp_path)] == [*order, ours]
    assert ckpt.latest(ckpt.find(tmp_path)).path == ours
    assert ckpt.resolve("latest", tmp_path)[0] == ours


# ---------------------------------------------------------------------------------------------------------------------
# Conversion


def same_model(one: Checkpoint, other: Checkpoint) -> None:
    assert bits(one) == bits(other)
    assert answer(one).numpy().tobytes() == answer(other).numpy().tobytes()


@pytest.mark.parametrize("target", sorted(ckpt.WRITERS))
@pytest.mark.parametrize("source", GOLDENS)
def test_what_was_adopted_is_written_in_every_layout_and_back(source: str, target: str, tmp_path: Path) -> None:
    record = ckpt.load(GOLDEN / source / GOLDENS[source][0])
    if target == "huggingface" and source in ("lecture", "directory"):
        with pytest.raises(ckpt.CheckpointError, match=r"lm_head\.bias \(5,\)"):
            ckpt.WRITERS[target].write(record, tmp_path, "stem")
        assert list(tmp_path.iterdir()) == []
        return
    first = ckpt.load(ckpt.WRITERS[target].write(record, tmp_path, "stem"), verify=True)
    same_model(first, record)
    assert first.layout == target
    (tmp_path / "back").mkdir()
    back = ckpt.load(ckpt.WRITERS["unified"].write(first, tmp_path / "back", "stem"), verify=True)
    same_model(back, record)
    assert_same(back, record, but=set())


@pytest.mark.parametrize("source", GOLDENS)
def test_the_verb_converts_and_leaves_the_source(source: str, tmp_path: Path) -> None:
    folder = shutil.copytree(GOLDEN / source, tmp_path / "theirs")
    before = snapshot(folder)
    made = ckpt.convert(folder / GOLDENS[source][0], tmp_path / "ours", layout="unified")
    assert snapshot(folder) == before
    assert made.layout_before == GOLDENS[source][1]
    same_model(ckpt.load(made.target, verify=True), ckpt.load(folder / GOLDENS[source][0]))
