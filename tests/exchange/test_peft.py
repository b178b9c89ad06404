"""LoRA beside peft: the same weights give the same logits and the same gradients."""

import peft
import pytest
import torch
import transformers

import models
from ckpt.layouts.huggingface import CONV1D

SIZES = {"vocab_size": 31, "block_size": 16, "n_layer": 2, "n_head": 2, "n_embd": 16}
IDS = torch.arange(24).view(2, 12) % 31


def theirs(ours, lora):
    """peft's model over transformers' GPT-2 with our weights."""
    torch.manual_seed(0)
    shape = {"vocab_size": 31, "n_positions": 16, "n_layer": 2, "n_head": 2, "n_embd": 16}
    base = transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape, attn_pdrop=0, embd_pdrop=0, resid_pdrop=0))
    form = peft.LoraConfig(
        r=lora["rank"], lora_alpha=lora["alpha"], target_modules=lora["targets"].split(","), fan_in_fan_out=True, task_type="CAUSAL_LM"
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
