"""LoRA beside peft: the same weights give the same logits and the same gradients."""

import dataclasses
from pathlib import Path

import peft
import pytest
import torch
import transformers
from records import gpt2_record
from script import call, script

import models
from milepost import ckpt
from milepost.ckpt.foreign.gpt2_architecture import CONV1D
from milepost.ckpt.restore import build_model, build_tokenizer, with_base

SIZES = {"vocab_size": 31, "block_size": 16, "n_layer": 2, "n_head": 2, "n_embd": 16}
IDS = torch.arange(24).view(2, 12) % 31


def theirs(ours, lora):
    """peft's model over transformers' GPT-2 with our weights."""
    torch.manual_seed(0)
    shape = {"vocab_size": 31, "n_positions": 16, "n_layer": 2, "n_head": 2, "n_embd": 16}
    base = transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape, attn_pdrop=0, embd_pdrop=0, resid_pdrop=0))
    form = peft.LoraConfig(
        r=lora["rank"], lora_alpha=lora["alpha"], target_modules=lora["targets"].split(","), fan_in_fan_out=True,
        task_type="CAUSAL_LM"
    )  # fmt: skip
    model = peft.get_peft_model(base, form).eval()
    state = model.state_dict()
    for name, tensor in ours.state_dict().items():
        layer, _, kind = name.rpartition(".")
        key = f"base_model.model.transformer.{name}"
        if kind in ("lora_A", "lora_B"):
            key = f"base_model.model.transformer.{name}.default.weight"
        elif key not in state:
            key = f"base_model.model.transformer.{layer}.base_layer.{kind}"
        state[key] = tensor.t() if name.endswith(CONV1D) else tensor
    model.load_state_dict(state | {"base_model.model.lm_head.weight": ours.wte.weight.detach()})
    return model


@pytest.mark.parametrize("targets", ["c_attn,c_proj,c_fc", "c_attn", "c_proj"])
def test_logits_and_gradients_are_pefts(targets):
    torch.manual_seed(1)
    lora = {"rank": 3, "alpha": 5.0, "dropout": 0.0, "targets": targets}
    ours = models.build("gpt2", SIZES | {"lora": lora})
    for name, parameter in ours.named_parameters():
        if name.endswith("lora_B"):
            torch.nn.init.normal_(parameter, std=0.3)
    models.freeze_base(ours)
    peer = theirs(ours, lora)
    assert (ours(IDS)[0] - peer(IDS).logits).abs().max() < 1e-5

    loss = torch.nn.functional.cross_entropy(ours(IDS)[0].flatten(0, 1), IDS.flatten())
    other = torch.nn.functional.cross_entropy(peer(IDS).logits.flatten(0, 1), IDS.flatten())
    loss.backward()
    other.backward()
    trained = {name.removeprefix("base_model.model.transformer.").removesuffix(".default.weight"): parameter.grad
               for name, parameter in peer.named_parameters() if parameter.requires_grad}  # fmt: skip
    mine = {name: parameter.grad for name, parameter in ours.named_parameters() if parameter.requires_grad}
    assert mine.keys() == trained.keys()
    for name, grad in mine.items():
        assert (grad - trained[name]).abs().max() < 1e-6 + 1e-4 * grad.abs().max(), name
    assert any(grad.abs().max() > 1e-3 for grad in mine.values())


def drawn(**lora):
    """A record of a small GPT-2 with LoRA whose B is not zero."""
    torch.manual_seed(2)
    plain = gpt2_record(settings={"vocab_size": 31, "n_embd": 16, "block_size": 16})
    adapters = {"rank": 3, "alpha": 5.0, "dropout": 0.0, "targets": "c_attn,c_proj,c_fc"} | lora
    model = build_model(plain, device=torch.device("cpu"), adapters={"lora": adapters}).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):
            torch.nn.init.normal_(parameter, std=0.3)
    state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    base = {"sha256": "0" * 64, "source": "gpt2", "step": 0}
    whole = dataclasses.replace(plain, model_state=state, model_settings=models.plain(model.settings), base=base)
    return plain, dataclasses.replace(whole, optimizer_state=None), model


@pytest.mark.parametrize("apart", [False, True])
def test_peft_opens_the_export_beside_the_base(tmp_path: Path, apart):
    plain, whole, ours = drawn(targets="c_attn,c_fc")
    if apart:
        state = {name: tensor for name, tensor in whole.model_state.items() if models.is_adapter(name)}
        whole = dataclasses.replace(whole, model_state=state, parts=["adapters"])
    converter = script("convert_checkpoint")
    (tmp_path / "checkpoints").mkdir()
    paths = []
    for name, record, to in (
        ("base", dataclasses.replace(plain, optimizer_state=None), "huggingface"),
        ("lora", whole, "peft"),
    ):
        source = ckpt.save(record, tmp_path / "checkpoints")
        said = call(converter, tmp_path, CHECKPOINT_PATH=source, CONVERT_TO=to, OUTPUT=tmp_path / name)
        assert said.code == 0, said.err
        paths.append(Path(said.out.split(" -> ")[1].splitlines()[0]))
    base = transformers.AutoModelForCausalLM.from_pretrained(paths[0]).eval()
    before = base(IDS).logits
    theirs = peft.PeftModel.from_pretrained(base, str(paths[1])).eval()
    assert (theirs(IDS).logits - ours(IDS)[0]).abs().max() < 1e-4
    assert (theirs(IDS).logits - before).abs().max() > 1e-2
    assert (theirs.merge_and_unload()(IDS).logits - ours(IDS)[0]).abs().max() < 1e-4


@pytest.mark.parametrize("to", ["gguf", "nanogpt", "huggingface"])
def test_an_export_without_a_place_for_adapters_refuses_them(tmp_path, to):
    _, whole, _ = drawn()
    (tmp_path / "checkpoints").mkdir()
    source = ckpt.save(whole, tmp_path / "checkpoints")
    said = call(script("convert_checkpoint"), tmp_path, CHECKPOINT_PATH=source, CONVERT_TO=to, OUTPUT=tmp_path / "out")
    assert said.code == 3
    assert "LoRA adapters" in said.err
    assert "scripts/merge_adapters.py" in said.err
    assert not list((tmp_path / "out").glob("[!.]*"))


def test_peft_keeps_nothing_but_adapters(tmp_path):
    plain, _, _ = drawn()
    (tmp_path / "checkpoints").mkdir()
    source = ckpt.save(dataclasses.replace(plain, optimizer_state=None), tmp_path / "checkpoints")
    said = call(
        script("convert_checkpoint"), tmp_path, CHECKPOINT_PATH=source, CONVERT_TO="peft", OUTPUT=tmp_path / "out"
    )
    assert said.code == 3
    assert "has no LoRA adapters" in said.err


@pytest.mark.parametrize("safe", [True, False])
@pytest.mark.parametrize("headless", [False, True])
def test_an_adapter_that_peft_saved_opens_beside_its_base(tmp_path: Path, safe, headless):
    plain, _, _ = drawn()
    source = ckpt.save(dataclasses.replace(plain, optimizer_state=None), tmp_path / "checkpoints")
    said = call(
        script("convert_checkpoint"),
        tmp_path,
        CHECKPOINT_PATH=source,
        CONVERT_TO="huggingface",
        OUTPUT=tmp_path / "base",
    )
    assert said.code == 0, said.err
    (folder,) = (tmp_path / "base").glob("[!.]*")
    kind = transformers.AutoModel if headless else transformers.AutoModelForCausalLM
    config = peft.LoraConfig(
        r=3, lora_alpha=5, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True, init_lora_weights=False
    )
    theirs = peft.get_peft_model(kind.from_pretrained(folder), config).eval()
    theirs.save_pretrained(tmp_path / "adapter", safe_serialization=safe)
    record = with_base(ckpt.load(tmp_path / "adapter", verify=True), ckpt.load(folder))
    ours = build_model(record, device=torch.device("cpu")).eval()
    with torch.no_grad():
        found = theirs(IDS).last_hidden_state @ theirs.base_model.model.wte.weight.T if headless else theirs(IDS).logits
        assert (found - ours(IDS)[0]).abs().max() < 1e-4
        assert (found - build_model(plain, device=torch.device("cpu")).eval()(IDS)[0]).abs().max() > 1e-2


def folder_of(tmp_path: Path) -> Path:
    """A GPT-2 as transformers saves it, to be the base of an adapter."""
    torch.manual_seed(3)
    shape = {"vocab_size": 31, "n_positions": 16, "n_layer": 2, "n_head": 2, "n_embd": 16}
    base = transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape, bos_token_id=None, eos_token_id=None))
    base.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def adapter(base: Path, folder: Path, **form):
    """The model of an adapter that does something, saved in `folder`, and opened there again by peft."""
    form = {"r": 4, "lora_alpha": 8, "fan_in_fan_out": True, "task_type": "CAUSAL_LM", **form}
    model = peft.get_peft_model(transformers.AutoModelForCausalLM.from_pretrained(base), peft.LoraConfig(**form))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    model.save_pretrained(folder)
    return peft.AutoPeftModelForCausalLM.from_pretrained(folder).eval()


def logits_over_its_base(folder: Path):
    record = ckpt.load(folder)
    whole = with_base(record, ckpt.load(Path(record.base["source"])))
    with torch.no_grad():
        return build_model(whole, device=torch.device("cpu")).eval()(IDS)[0]


@pytest.mark.parametrize(
    ("form", "understood"),
    [
        ({"target_modules": ["c_attn"]}, True),
        ({"target_modules": ["c_attn"], "init_lora_weights": "gaussian"}, True),
        ({"target_modules": ["c_attn"], "init_lora_weights": "orthogonal"}, True),
        ({"target_modules": "all-linear"}, True),  # the layers by their whole names
        (
            {"target_modules": ["c_attn"], "init_lora_weights": "pissa"},
            False,
        ),  # these two change the base when it is opened
        ({"target_modules": ["c_attn"], "init_lora_weights": "olora"}, False),
        ({"target_modules": ["attn.c_proj"]}, False),
        ({"target_modules": ["c_attn"], "exclude_modules": ["h.1.attn.c_attn"]}, False),
    ],
    ids=str,
)
def test_an_adapter_is_computed_as_peft_does_or_refused(tmp_path: Path, form, understood):
    theirs = adapter(folder_of(tmp_path), tmp_path / "adapter", **form)
    if understood:
        with torch.no_grad():
            assert (theirs(IDS).logits - logits_over_its_base(tmp_path / "adapter")).abs().max() < 1e-4
    else:
        with pytest.raises(ckpt.CheckpointError) as caught:
            ckpt.load(tmp_path / "adapter")
        assert (caught.value.kind, "merge_and_unload" in caught.value.remedy) == ("not understood", True)


def test_the_trainer_saves_step_and_moments_beside_an_adapter(tmp_path: Path):
    folder = folder_of(tmp_path)
    form = peft.LoraConfig(
        r=2, lora_alpha=4, target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True, task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(transformers.AutoModelForCausalLM.from_pretrained(folder), form)
    asked = transformers.TrainingArguments(
        str(tmp_path / "out"), max_steps=4, save_steps=2, per_device_train_batch_size=2, learning_rate=1e-3,
        use_cpu=True, report_to=[], disable_tqdm=True,
    )  # fmt: skip
    data = [{"input_ids": row, "labels": row} for row in (torch.arange(64).view(8, 8) % 31)]
    trainer = transformers.Trainer(model, asked, train_dataset=data)
    trainer.train()

    record = ckpt.load(tmp_path / "out" / "checkpoint-4", verify=True)
    assert (record.step, record.parts, record.epoch) == (4, ["adapters", "optimizer"], 1.0)
    half = ckpt.load(tmp_path / "out" / "checkpoint-2")
    assert (half.step, half.hyperparameters["BATCH_SIZE"], half.schedule["kind"]) == (2, 2, "linear")
    assert record.left_out == ["rng_state.pth (of transformers' Trainer)"]
    own = {name.removeprefix("base_model.model.transformer.").removesuffix(".default.weight"): parameter
           for name, parameter in model.named_parameters() if parameter.requires_grad}  # fmt: skip
    (_, group) = sorted(record.optimizer_state["param_groups"], key=lambda group: len(group["params"]))
    assert {*group["param_names"]} == own.keys()
    moments = trainer.optimizer.optimizer.state
    for i, name in zip(group["params"], group["param_names"], strict=True):
        for kind in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(record.optimizer_state["state"][i][kind], moments[own[name]][kind]), name
    latest, _ = ckpt.resolve(str(tmp_path / "out"), tmp_path)
    assert latest.name == "checkpoint-4"
    said = call(
        script("convert_checkpoint"), tmp_path, CHECKPOINT_PATH=latest, CONVERT_TO="unified", OUTPUT=tmp_path / "new"
    )
    assert (said.code, "rng_state.pth" in said.err) == (3, True)
    again = ckpt.load(next((tmp_path / "new").glob("*.pt")))
    assert (again.step, again.parts) == (4, record.parts)


def test_the_tokenizer_beside_an_adapter_is_its_own(tmp_path: Path):
    """A fine-tuning to talk saves another chat template there; the tokens that end the base's texts still do."""
    from test_export_ways_out import ended_folder

    base = ended_folder(tmp_path / "base", generation_config=[3, 2])
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = "{% for m in messages %}base{{ m['content'] }}{% endfor %}"
    tokenizer.save_pretrained(base)
    adapter(base, tmp_path / "plain", target_modules=["c_attn"])
    adapter(base, tmp_path / "own", target_modules=["c_attn"])
    tokenizer.chat_template = "{% for m in messages %}own{{ m['content'] }}{% endfor %}"
    tokenizer.save_pretrained(tmp_path / "own")
    plain, own = (ckpt.load(tmp_path / name) for name in ("plain", "own"))
    assert plain.tokenizer == ckpt.load(base).tokenizer
    assert own.tokenizer == plain.tokenizer | {"chat_template": tokenizer.chat_template}
    assert any("its own tokenizer and template" in note for note in own.notes)
    assert list(build_tokenizer(own).stop_ids) == [3, 2]
    (found,) = [found for found in ckpt.find(tmp_path) if found.path == tmp_path / "own"]
    assert found.problem is None
