"""An adapter folder of peft opens as adapters without their base, if its base is on this disk; else what is lacking is named."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from records import gpt2_record
from safetensors import torch as torch_safetensors
from script import call, script

import models
from milepost import ckpt
from milepost.ckpt import CheckpointError
from milepost.ckpt.layouts import known_layout
from milepost.ckpt.restore import build_model, with_base
from milepost.ckpt.tensors import digest, read_safetensors

IDS = torch.arange(8).reshape(2, 4) % 31


def exported(folder: Path, **lora: Any) -> tuple[Path, Path, ckpt.Checkpoint]:
    """Return an adapter folder as `CONVERT_TO=peft` writes it, its base, and the record of both."""
    torch.manual_seed(2)
    plain = dataclasses.replace(
        gpt2_record(settings={"vocab_size": 31, "n_embd": 16, "block_size": 16}), optimizer_state=None
    )
    base = ckpt.save(plain, folder / "base")
    adapters = {"rank": 3, "alpha": 5.0, "dropout": 0.0, "targets": "c_attn,c_fc"} | lora
    model = build_model(plain, device=torch.device("cpu"), adapters={"lora": adapters})
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):
            torch.nn.init.normal_(parameter, std=0.3)
    state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    named = {"sha256": digest(plain.model_state), "source": str(base), "step": plain.step}
    whole = dataclasses.replace(plain, model_state=state, model_settings=models.plain(model.settings), base=named)
    source = ckpt.save(whole, folder / "whole")
    path = ckpt.export(source, folder / "peft", to=ckpt.exporter("peft", gguf_type="f32")).target
    return path, base, whole


def changed(path: Path, **values: Any) -> None:
    config = json.loads((path / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(json.dumps(config | values))


@pytest.mark.parametrize("targets", ["c_attn", "c_attn,c_proj,c_fc"])
def test_the_exported_adapter_opens_again(tmp_path: Path, targets: str) -> None:
    path, base, whole = exported(tmp_path, targets=targets)
    record = ckpt.load(path, verify=True)
    own = {name: tensor for name, tensor in whole.model_state.items() if models.is_adapter(name)}
    assert (record.adapters_only, record.layout, record.base["sha256"]) == (True, "peft", whole.base["sha256"])
    assert record.model_state.keys() == own.keys()
    assert all(torch.equal(record.model_state[name], tensor) for name, tensor in own.items())
    assert record.tokenizer == whole.tokenizer
    with torch.no_grad():
        logits = [
            build_model(each, device=torch.device("cpu")).eval()(IDS).logits
            for each in (with_base(record, ckpt.load(base)), whole, ckpt.load(base))
        ]
    assert torch.equal(logits[0], logits[1])
    assert not torch.equal(logits[0], logits[2])  # control: the adapters change what is computed
    (found,) = ckpt.find(path.parent)
    assert (found.problem, found.path, found.metadata["parts"]) == (None, path, ["adapters"])


def test_every_script_takes_it(tmp_path: Path) -> None:
    path, base, whole = exported(tmp_path)
    asked = {"CHECKPOINT_PATH": path, "CHECKPOINT_DIR": path.parent}
    prompt = whole.tokenizer["chars"][0] if whole.tokenizer and "chars" in whole.tokenizer else "a"
    for name, more in {
        "inspect_checkpoint": {},
        "list_checkpoints": {"CHECKPOINT_PATH": None},
        "verify_checkpoint": {},
        "load_checkpoint": {"PROMPT": prompt, "MAX_NEW_TOKENS": "3", "SAMPLE_SEED": "1"},
        "merge_adapters": {"OUTPUT": tmp_path / "merged"},
        "convert_checkpoint": {"CONVERT_TO": "unified", "OUTPUT": tmp_path / "new"},
    }.items():
        said = call(script(name), tmp_path, **asked | more)
        assert said.code == 0, (name, said.err)
    (found,) = ckpt.find(tmp_path / "new")
    assert ckpt.load(found.path).base == ckpt.load(path).base
    before = list(path.parent.rglob("*"))
    said = call(
        script("prune_checkpoints"), tmp_path, CHECKPOINT_DIR=path.parent, CHECKPOINT_KEEP_LAST="1", DRY_RUN="false"
    )
    assert (said.code, list(path.parent.rglob("*"))) == (0, before)
    shutil.rmtree(base.parent)
    said = call(script("load_checkpoint"), tmp_path, **asked, PROMPT=prompt)
    assert said.code == 3
    assert "base_model_name_or_path" in said.err


@pytest.mark.parametrize("named", ["relative to the folder", "beside the folder", "absolute"])
def test_where_its_base_is_looked_for(tmp_path: Path, named: str) -> None:
    path, base, _ = exported(tmp_path)
    names = {"relative to the folder": f"../../base/{base.name}", "beside the folder": f"../base/{base.name}"}
    changed(path, base_model_name_or_path=names.get(named, str(base)))
    assert ckpt.load(path).base["source"] == str(base)


REFUSED: dict[str, dict[str, Any]] = {
    "another kind": {"peft_type": "LOHA"}, "DoRA": {"use_dora": True}, "another scale": {"use_rslora": True}, "ranks": {"rank_pattern": {"c_fc": 4}},
    "biases": {"bias": "all"}, "other layers": {"target_modules": ["wte"]}, "a pattern": {"target_modules": ".*c_fc"}, "no rank": {"r": None},
    "saved modules": {"modules_to_save": ["lm_head"]}, "PiSSA": {"init_lora_weights": "pissa"}, "OLoRA": {"init_lora_weights": "olora"},
    "a word for alpha": {"lora_alpha": "8"},
    "some layers": {"target_modules": ["h.0.mlp.wte"]}, "activated": {"alora_invocation_tokens": [3]},
}  # fmt: skip


@pytest.mark.parametrize("values", REFUSED.values(), ids=REFUSED)
def test_what_ours_does_not_compute_is_not_understood(tmp_path: Path, values: dict[str, Any]) -> None:
    path, _, _ = exported(tmp_path)
    changed(path, **values)
    with pytest.raises(CheckpointError) as caught:
        ckpt.load(path)
    assert caught.value.kind == "not understood"
    assert [found.kind for found in ckpt.find(path.parent)] == ["not understood"]


def test_an_embedding_beside_the_adapters_is_not_understood(tmp_path: Path) -> None:
    """peft saves it if the vocabulary grew: merging gives a whole model, another base would not."""
    path, _, _ = exported(tmp_path)
    weights = read_safetensors(path / "adapter_model.safetensors")
    grown = {"base_model.model.transformer.wte.weight": torch.zeros(33, 16)}
    torch_safetensors.save_file(
        {name: tensor.clone() for name, tensor in weights.items()} | grown, path / "adapter_model.safetensors"
    )
    with pytest.raises(CheckpointError) as caught:
        ckpt.load(path)
    assert (caught.value.kind, "wte (33, 16)" in caught.value.problem) == ("not understood", True)
    assert "merge" in str(caught.value.remedy)


@pytest.mark.parametrize(
    "name", ["gpt2", "/nowhere/base", None, "", ".", "../peft", "~nobody_of_this_name/base", "x" * 5000, "a\0b"]
)
def test_without_its_base_it_lacks_something(tmp_path: Path, name: str | None) -> None:
    path, _, _ = exported(tmp_path)
    changed(path, base_model_name_or_path=name)
    with pytest.raises(CheckpointError) as caught:
        ckpt.load(path)
    assert caught.value.kind == "lacking"
    assert [found.kind for found in ckpt.find(path.parent)] == ["lacking"]  # and no other checkpoint is hidden by it


def test_adapters_are_no_base(tmp_path: Path) -> None:
    path, _, whole = exported(tmp_path)
    own = {name: tensor for name, tensor in whole.model_state.items() if models.is_adapter(name)}
    changed(
        path,
        base_model_name_or_path=str(
            ckpt.save(dataclasses.replace(whole, model_state=own, parts=["adapters"]), tmp_path / "own")
        ),
    )
    with pytest.raises(CheckpointError, match="holds only adapters: set base_model_name_or_path") as caught:
        ckpt.load(path)
    assert caught.value.kind == "lacking"


def test_another_base_is_refused(tmp_path: Path) -> None:
    path, _, _ = exported(tmp_path)
    other = gpt2_record(settings={"vocab_size": 31, "n_embd": 8, "block_size": 16})
    changed(path, base_model_name_or_path=str(ckpt.save(other, tmp_path / "other")))
    with pytest.raises(CheckpointError) as caught:
        ckpt.load(path)
    assert caught.value.kind == "refused"
    assert known_layout(path).name == "peft"
