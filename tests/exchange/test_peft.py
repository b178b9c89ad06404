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
from milepost.ckpt.restore import build_model, with_base

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
