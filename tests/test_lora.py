"""LoRA: the base's function at first, only adapters train, checkpoints with and without their base, merging."""

import shutil
from pathlib import Path

import pytest
import torch
from drive import newest, tensor_bytes, train
from script import call, script

import models
from milepost import ckpt, config
from milepost.ckpt.layouts import WRITERS
from milepost.ckpt.restore import build_model, merged, with_base
from models.lora import LoraLinear, LoraSettings

merger, loader, inspector = script("merge_adapters"), script("load_checkpoint"), script("inspect_checkpoint")
pruner = script("prune_checkpoints")
SIZES = {"vocab_size": 11, "block_size": 8, "n_layer": 2, "n_head": 2, "n_embd": 16}
LORA = {"rank": 2, "alpha": 6.0, "dropout": 0.0, "targets": "c_attn,c_proj,c_fc"}
WITH = {
    "LORA_RANK": "2",
    "LORA_ALPHA": "6",
    "TRAINING_STEPS": "6",
    "CHECKPOINT_INTERVAL": "2",
    "DROPOUT": None,
    "LEARNING_RATE": "1e-2",
}
SHAPE_OF_THE_BASE = dict.fromkeys(["MODEL_TYPE", "N_LAYER", "N_HEAD", "N_EMBD", "BLOCK_SIZE"])


def pair(**changes):
    """A GPT-2 and the same one with LoRA, whose adapters are drawn, B too; in float64."""
    torch.manual_seed(1)
    base = models.build("gpt2", SIZES).double().eval()
    other = models.build("gpt2", SIZES | {"lora": LORA | changes}).double().eval()
    other.load_state_dict(base.state_dict(), strict=False)
    return base, other


def drawn(model):
    """The model with adapters that do something."""
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):
            torch.nn.init.normal_(parameter, std=0.3)
    return model


IDS = torch.arange(16).view(2, 8) % 11


def test_fresh_adapters_change_no_bit():
    base, other = pair()
    assert torch.equal(base(IDS)[0], other(IDS)[0])
    assert not torch.equal(base(IDS)[0], drawn(other)(IDS)[0])


def test_a_layer_is_its_formula_in_float64():
    torch.manual_seed(2)
    layer = LoraLinear(5, 7, bias=True, settings=LoraSettings(rank=3, alpha=4.0)).double()
    torch.nn.init.normal_(layer.lora_B)
    x = torch.randn(2, 6, 5, dtype=torch.float64, requires_grad=True)
    expected = x @ layer.weight.T + layer.bias + 4 / 3 * (x @ layer.lora_A.T @ layer.lora_B.T)
    assert torch.allclose(layer(x), expected, rtol=0, atol=1e-14)
    wanted = torch.autograd.grad(expected.square().sum(), [x, layer.lora_A, layer.lora_B])
    found = torch.autograd.grad(layer(x).square().sum(), [x, layer.lora_A, layer.lora_B])
    assert all(torch.allclose(one, other, rtol=1e-12) for one, other in zip(found, wanted, strict=True))


def test_dropout_applies_to_the_adapters_input_in_training_only():
    torch.manual_seed(3)
    layer = LoraLinear(64, 8, bias=False, settings=LoraSettings(rank=4, alpha=4.0, dropout=0.5))
    x = torch.randn(3, 64)
    assert torch.equal(layer(x), x @ layer.weight.T)  # B is zero
    torch.nn.init.normal_(layer.lora_B)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))


@pytest.mark.parametrize(("targets", "per_block"), [("c_attn", 1), ("c_proj", 2), ("c_fc", 1), ("c_attn,c_fc", 2)])
def test_targets_choose_the_layers(targets, per_block):
    _, model = pair(targets=targets)
    layers = {name for name, module in model.named_modules() if isinstance(module, LoraLinear)}
    assert len(layers) == 2 * per_block
    assert {name.rpartition(".")[2] for name in layers} == set(targets.split(","))


def test_the_base_is_frozen():
    _, model = pair()
    models.freeze_base(model)
    model(IDS, IDS)[1].backward()
    learned = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert learned == {name for name, _ in model.named_parameters() if name.endswith(("lora_A", "lora_B"))}
    assert len(learned) == 2 * 4 * 2
    assert models.trained_count(model) == 2 * 2 * ((16 + 48) + (16 + 16) + (16 + 64) + (64 + 16))


def test_a_merged_checkpoint_is_a_run_of_its_own(base, tmp_path):
    """Beside the adapters of an interrupted run it is not the last of them, for which retention would delete the others."""
    tune(base, tmp_path, CHECKPOINT_ADAPTERS_ONLY="true", CHECKPOINT_KEEP_BEST="0", EVAL_INTERVAL="0")
    folder = tmp_path / "checkpoints"
    newest(tmp_path).path.unlink()  # the run was killed before its last step
    last = newest(tmp_path)
    said = call(merger, tmp_path, OUTPUT=folder)
    assert said.code == 0, said.err
    merged_here = newest(tmp_path)
    assert (merged_here.parts, merged_here.step, merged_here.run_id != last.run_id) == (["model"], last.step, True)
    assert merged_here.parent["run_id"] == last.run_id
    assert merged_here.parent["changed"] == {"LORA_RANK": [2, 0]}
    # The step of fixed numbers that the adapters' run recorded is none of this model.
    shown = call(loader, tmp_path, CHECKPOINT_PATH=merged_here.path, MODE="resume", RESUME_TRAINING_STEPS="0")
    assert (shown.code, "parameters have no optimizer state" in shown.out) == (0, True), shown.err
    assert "computes otherwise" not in shown.out
    pruned = call(pruner, tmp_path, CHECKPOINT_KEEP_LAST="1", DRY_RUN="false")
    assert pruned.code == 0, pruned.err
    assert sorted(path for path in folder.glob("*.pt")) == sorted([last.path, merged_here.path])
    code, said = tune(base, tmp_path, CHECKPOINT_ADAPTERS_ONLY="true", RESUME="auto")
    assert (code, newest(tmp_path).run_id, newest(tmp_path).step) == (0, last.run_id, 6), said


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"targets": "c_attn,wte"}, "targets='c_attn,wte': 'wte' .* c_attn, c_proj, c_fc"),
        ({"targets": "c_fc,c_fc"}, "names a layer twice"),
        ({"rank": 0}, "at least 1"),
        ({"alpha": 0.0}, "alpha=0.0: expected a number above 0"),
        ({"dropout": 1.0}, "dropout=1.0"),
        ({"size": 1}, "lora has rank, alpha, dropout, targets and no such setting"),
    ],
)
def test_settings_that_make_no_adapters(changes, said):
    with pytest.raises(ValueError, match=said):
        models.build("gpt2", SIZES | {"lora": LORA | changes})
    with pytest.raises(ValueError, match="expected a mapping"):
        models.build("gpt2", SIZES | {"lora": 8})


def test_merged_weights_answer_as_the_adapters_did():
    base, model = pair()
    drawn(model.float())
    record = ckpt.Checkpoint(
        model_state=model.state_dict(), model_type="gpt2", model_settings=models.plain(model.settings), step=1
    )
    whole = merged(record)
    assert whole.model_settings == models.plain(base.settings)
    assert whole.model_state.keys() == base.state_dict().keys()
    again = build_model(whole, device=torch.device("cpu")).eval()
    assert (again(IDS)[0] - model(IDS)[0]).abs().max() < 1e-5
    assert (again(IDS)[0] - base.float()(IDS)[0]).abs().max() > 1e-2
    assert merged(whole) is whole


def test_a_model_without_adapters_does_not_mention_them():
    base, model = pair()
    assert "lora" not in models.plain(base.settings)
    assert models.plain(model.settings)["lora"] == LORA


# ---------------------------------------------------------------------------------------------------------------------
# Runs.


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """The folder of a run of 8 steps, its checkpoint renamed so that it is easily named."""
    folder = tmp_path_factory.mktemp("base")
    assert train(folder, SAMPLE_INTERVAL="0")[0] == 0
    (folder / "checkpoints" / newest(folder).path.name).rename(folder / "base.pt")
    return folder


def tune(base: Path, folder: Path, **changes: str | None) -> tuple[int, str]:
    """A run with adapters from the base, in a folder of its own."""
    if not (folder / "letters.txt").exists():
        folder.mkdir(exist_ok=True)
        shutil.copy(base / "letters.txt", folder)
    return train(folder, INIT_FROM=str(base / "base.pt"), **SHAPE_OF_THE_BASE | WITH | changes)


def test_a_run_trains_only_the_adapters(base, tmp_path):
    code, said = tune(base, tmp_path)
    assert code == 0, said
    record, before = newest(tmp_path), ckpt.load(base / "base.pt")
    assert "of them trained" in said
    assert all(torch.equal(tensor, record.model_state[name]) for name, tensor in before.model_state.items())
    added = record.model_state.keys() - before.model_state.keys()
    assert len(added) == 16
    assert all(record.model_state[name].abs().sum() > 0 for name in added if name.endswith("lora_B"))
    assert len(record.optimizer_state["state"]) == 16
    assert record.base["source"] == str(base / "base.pt")
    assert record.hyperparameters["OPTIMIZER"] == "adamw"


def test_a_checkpoint_of_adapters_is_a_part_of_the_full_checkpoint(base, tmp_path):
    tune(base, tmp_path / "whole")
    tune(base, tmp_path / "apart", CHECKPOINT_ADAPTERS_ONLY="true")
    whole, apart = newest(tmp_path / "whole"), newest(tmp_path / "apart")
    assert apart.parts == ["adapters", "optimizer"]
    assert len(apart.model_state) == 16
    assert all(torch.equal(tensor, whole.model_state[name]) for name, tensor in apart.model_state.items())
    told = [call(inspector, tmp_path, CHECKPOINT_PATH=one.path).out for one in (whole, apart)]
    assert ["(without their base)" in text for text in told] == [False, True]
    size = sum(tensor.numel() for tensor in apart.model_state.values())
    assert f"\nFound 16 LoRA tensors, {size:,} elements of {size:,} (without their base)\n" in told[1]
    again = with_base(apart, ckpt.load(base / "base.pt"))
    assert again.parts == ["model", "optimizer"]
    assert {name: tensor.tolist() for name, tensor in again.model_state.items()} == {
        name: tensor.tolist() for name, tensor in whole.model_state.items()
    }


@pytest.mark.parametrize("apart", ["false", "true"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_resumed_equals_uninterrupted(base, tmp_path, apart, optimizer):
    changes = {"CHECKPOINT_ADAPTERS_ONLY": apart, "LORA_DROPOUT": "0.2", "OPTIMIZER": optimizer}
    assert tune(base, tmp_path / "straight", **changes)[0] == 0
    straight = newest(tmp_path / "straight")
    for step in (2, 4):
        folder = tmp_path / f"from {step}"
        (folder / "checkpoints").mkdir(parents=True)
        (path,) = (tmp_path / "straight" / "checkpoints").glob(f"*step000{step}*")
        shutil.copy(path, folder / "checkpoints")
        shutil.copy(base / "letters.txt", folder)
        code, said = tune(base, folder, RESUME="auto", **changes)
        assert code == 0, said
        again = newest(folder)
        assert again.step == 6
        assert tensor_bytes(again) == tensor_bytes(straight)
        assert again.base == straight.base


@pytest.mark.parametrize("layout", [name for name in WRITERS if name != "huggingface"])
def test_every_layout_holds_a_checkpoint_of_adapters(base, tmp_path, layout):
    code, said = tune(
        base, tmp_path, CHECKPOINT_ADAPTERS_ONLY="true", CHECKPOINT_LAYOUT=layout, CHECKPOINT_KEEP_BEST="0"
    )
    assert code == 0, said
    record = newest(tmp_path)
    assert (record.layout, len(record.model_state), record.parts) == (layout, 16, ["adapters", "optimizer"])
    if layout == "consolidated":
        assert (record.path / "consolidated" / "lora.safetensors").is_file()
        assert not (record.path / "consolidated" / "consolidated.safetensors").exists()
    said = call(loader, tmp_path, BASE_CHECKPOINT=base / "base.pt", PROMPT="a", MAX_NEW_TOKENS="5", SAMPLE_SEED="1")
    assert said.code == 0, said.err
    assert len(said.out) == len("a12345\n")


def test_the_base_is_asked_for_and_another_refused(base, tmp_path):
    away = tmp_path / "away"
    shutil.copytree(base, away)
    tune(away, tmp_path, CHECKPOINT_ADAPTERS_ONLY="true")
    path = newest(tmp_path).path
    assert call(loader, tmp_path, PROMPT="a", MAX_NEW_TOKENS="1").code == 0  # it is where it was
    (away / "base.pt").unlink()
    said = call(loader, tmp_path, PROMPT="a")
    assert said.code == 2
    assert f"{path} holds only adapters: set GPT2_MODEL_NAME or BASE_CHECKPOINT to the base" in said.err
    assert str(away / "base.pt") in said.err  # where it was
    assert call(loader, tmp_path, PROMPT="a", MAX_NEW_TOKENS="1", BASE_CHECKPOINT=base / "base.pt").code == 0
    said = call(loader, tmp_path, PROMPT="a", BASE_CHECKPOINT=path)
    assert said.code == 3
    assert "holds adapters itself" in said.err
    other = tmp_path / "other.pt"
    record = ckpt.load(base / "base.pt")
    record.model_state = {name: tensor.clone() for name, tensor in record.model_state.items()}
    record.model_state["ln_f.bias"][0] += 1e-6
    ckpt.save(record, tmp_path / "other")
    (other,) = (tmp_path / "other").glob("*.pt")
    said = call(loader, tmp_path, PROMPT="a", BASE_CHECKPOINT=other)
    assert said.code == 3
    assert "has other weights (sha256" in said.err
    assert "is not the base of" in said.err


def test_inference_with_and_without_the_base_apart_is_the_same(base, tmp_path):
    told = {"PROMPT": "The", "MAX_NEW_TOKENS": "40", "SAMPLE_SEED": "5", "TEMPERATURE": "1"}
    tune(base, tmp_path / "whole")
    tune(base, tmp_path / "apart", CHECKPOINT_ADAPTERS_ONLY="true")
    whole = call(loader, tmp_path / "whole", **told)
    apart = call(loader, tmp_path / "apart", BASE_CHECKPOINT=base / "base.pt", **told)
    assert (whole.code, apart.code) == (0, 0)
    assert whole.out == apart.out
    plain = call(loader, tmp_path / "apart", CHECKPOINT_PATH=base / "base.pt", **told)
    assert plain.out != whole.out


def test_a_crashed_run_resumes_beside_its_base(base, tmp_path):
    """INIT_FROM=latest means the base at first, and the run's own checkpoint afterwards."""
    straight, folder = tmp_path / "straight", tmp_path / "crashed"
    tune(base, straight, CHECKPOINT_ADAPTERS_ONLY="true")
    (folder / "checkpoints").mkdir(parents=True)
    (path,) = (straight / "checkpoints").glob("*step0004*")
    shutil.copy(path, folder / "checkpoints")
    shutil.copy(base / "letters.txt", folder)
    changes = SHAPE_OF_THE_BASE | WITH | {"CHECKPOINT_ADAPTERS_ONLY": "true", "INIT_FROM": "latest", "RESUME": "auto"}
    code, said = train(folder, **changes)
    assert code == 0, said
    assert tensor_bytes(newest(folder)) == tensor_bytes(newest(straight))


def test_a_base_in_bfloat16_is_merged_without_rounding_what_was_learned(base, tmp_path):
    one = ckpt.load(base / "base.pt", optimizer=False)
    one.model_state = {name: tensor.bfloat16() for name, tensor in one.model_state.items()}
    narrow = ckpt.save(one, tmp_path / "narrow")
    shutil.copy(base / "letters.txt", tmp_path)
    code, said = train(tmp_path, **SHAPE_OF_THE_BASE | WITH, INIT_FROM=str(narrow), CHECKPOINT_ADAPTERS_ONLY="true")
    assert code == 0, said
    refused = call(merger, tmp_path, OUTPUT=tmp_path / "letters.txt" / "merged")
    assert (refused.code, f"OUTPUT: {tmp_path}/letters.txt/merged cannot be written" in refused.err) == (2, True)
    said = call(merger, tmp_path, OUTPUT=tmp_path / "merged")
    assert said.code == 0, said.err
    (path,) = (tmp_path / "merged").glob("*.pt")
    with_adapters = build_model(with_base(newest(tmp_path), ckpt.load(narrow)), device=torch.device("cpu")).eval()
    difference = with_adapters(IDS)[0] - build_model(ckpt.load(path), device=torch.device("cpu")).eval()(IDS)[0]
    assert difference.abs().max() < 1e-5


def test_a_base_is_known_by_its_weights_not_by_its_folder(base, tmp_path):
    convert = call(
        script("convert_checkpoint"),
        base,
        CHECKPOINT_PATH=base / "base.pt",
        CONVERT_TO="huggingface",
        OUTPUT=tmp_path / "hf",
    )
    assert convert.code == 0, convert.err
    (folder,) = (tmp_path / "hf").glob("[!.]*")
    shutil.copy(base / "letters.txt", tmp_path)
    own = SHAPE_OF_THE_BASE | WITH | {"MODEL_TYPE": "gpt2", "CHECKPOINT_ADAPTERS_ONLY": "true", "BLOCK_SIZE": "16"}
    code, said = train(tmp_path, **own, GPT2_MODEL_NAME=str(folder))
    assert code == 0, said
    straight = newest(tmp_path)
    moved = folder.rename(tmp_path / "moved")
    said = call(loader, tmp_path, MODEL_TYPE="gpt2", GPT2_MODEL_NAME=moved, PROMPT="a", MAX_NEW_TOKENS="3")
    assert said.code == 0, said.err
    for path in (tmp_path / "checkpoints").glob("*step0006*"):
        path.unlink()
    code, said = train(tmp_path, **own, GPT2_MODEL_NAME=str(moved), RESUME="auto")
    assert code == 0, said
    assert tensor_bytes(newest(tmp_path)) == tensor_bytes(straight)


def test_mode_resume_trains_the_adapters_further(base, tmp_path):
    tune(base, tmp_path, CHECKPOINT_ADAPTERS_ONLY="true")
    changes = {"MODE": "resume", "RESUME_TRAINING_STEPS": "2", "BASE_CHECKPOINT": base / "base.pt"}
    said = call(loader, tmp_path, **changes)
    assert said.code == 0, said.err
    assert "moments of 16 of 16 parameters" in said.out
    assert newest(tmp_path).step == 8
    assert newest(tmp_path).parts[0] == "adapters"


def test_a_new_run_takes_adapters_over(base, tmp_path):
    tune(base, tmp_path / "first", CHECKPOINT_ADAPTERS_ONLY="true")
    first = newest(tmp_path / "first")
    (tmp_path / "second").mkdir()
    shutil.copy(base / "letters.txt", tmp_path / "second")
    changes = SHAPE_OF_THE_BASE | {"INIT_FROM": str(first.path), "BASE_CHECKPOINT": str(base / "base.pt"),
    "TRAINING_STEPS": "1",
                                   "DROPOUT": None, "LEARNING_RATE": "1e-9", "WARMUP_STEPS": "0"}  # fmt: skip
    code, said = train(tmp_path / "second", **changes)
    assert code == 0, said
    second = newest(tmp_path / "second")
    assert second.base == first.base
    assert all(torch.allclose(second.model_state[name], one, atol=1e-6) for name, one in first.model_state.items())
    code, said = train(tmp_path / "second", **changes, LORA_RANK="3")
    assert code == 2
    assert "LORA_RANK=3: the initial weights have 2" in said


def test_merging_a_checkpoint(base, tmp_path):
    tune(base, tmp_path, CHECKPOINT_ADAPTERS_ONLY="true")
    said = call(merger, tmp_path, BASE_CHECKPOINT=base / "base.pt", OUTPUT=tmp_path / "merged")
    assert said.code == 0, said.err
    (path,) = (tmp_path / "merged").glob("*.pt")
    whole, apart = ckpt.load(path), with_base(newest(tmp_path), ckpt.load(base / "base.pt"))
    models_ = [build_model(one, device=torch.device("cpu")).eval() for one in (whole, apart)]
    ids = torch.arange(16)[None] % 20
    difference = (models_[0](ids)[0] - models_[1](ids)[0]).abs().max()
    assert 0 < difference < 1e-5
    assert (whole.base, whole.parts, "lora" in whole.model_settings) == (None, ["model"], False)
    assert whole.hyperparameters["LORA_RANK"] == 0
    again = call(merger, tmp_path, CHECKPOINT_PATH=path, OUTPUT=tmp_path / "twice")
    assert again.code == 3
    assert "has no LoRA adapters to merge" in again.err
    assert call(merger, tmp_path).code == 2
    named = call(merger, tmp_path, BASE_CHECKPOINT=base / "base.pt", OUTPUT=tmp_path / "mine.pt")
    assert (named.code, "names a file; name a folder" in named.err, (tmp_path / "mine.pt").exists()) == (2, True, False)
    hugging = call(
        merger, tmp_path, BASE_CHECKPOINT=base / "base.pt", OUTPUT=tmp_path / "hf", CHECKPOINT_LAYOUT="huggingface"
    )
    assert hugging.code == 0, hugging.err


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"LORA_RANK": "4", "MODEL_TYPE": "bigram"}, "LORA_RANK=4 (environment) needs MODEL_TYPE=gpt2"),
        ({"LORA_RANK": "4", "MODEL_TYPE": "gpt2"}, "freezes the base: name it with PRETRAINED, GPT2_MODEL_NAME or INIT_FROM"),
        ({"LORA_RANK": "4", "INIT_FROM": "x.pt", "MODEL_TYPE": "gpt2", "CHECKPOINT_LAYOUT": "huggingface"}, "transformers cannot hold adapters"),
        ({"CHECKPOINT_ADAPTERS_ONLY": "true"}, "saves adapters, but LORA_RANK=0 (default) adds none"),
        ({"LORA_TARGETS": "c_attn,wte"}, "expected some of c_attn, c_proj, c_fc, q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj, joined"),
        ({"LORA_RANK": "-1"}, "expected a whole number at least 0"),
        ({"LORA_ALPHA": "8"}, "LORA_ALPHA=8 (environment) has no effect without LORA_RANK: set that, or unset LORA_ALPHA"),
        ({"TTT_BASE_LR": "2"}, "TTT_BASE_LR=2 (environment) has no effect without TTT_LAYERS"),
    ],
)  # fmt: skip
def test_settings_that_contradict_each_other(changes, said):
    with pytest.raises(config.ConfigError) as caught:
        config.read(changes | {"PYTHON_DOTENV_DISABLED": "1"})
    assert said in str(caught.value)


def test_a_base_of_the_hub_has_its_own_defaults():
    read = config.read(
        {"LORA_RANK": "4", "MODEL_TYPE": "gpt2", "GPT2_MODEL_NAME": "gpt2", "PYTHON_DOTENV_DISABLED": "1"}
    )
    assert (read.learning_rate, read.optimizer, read.lora_targets) == (5e-4, "adamw", "c_attn,c_proj,c_fc")
