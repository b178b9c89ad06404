"""Llama, Qwen and Mistral folders of Hugging Face transformers, read and written: the logits are theirs."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from drive import newest, tensor_bytes, train
from safetensors.torch import load_file, save_file
from script import call, script

import models
from milepost import ckpt
from milepost.ckpt import CheckpointError
from milepost.ckpt.exports.peft import Peft
from milepost.ckpt.record import Checkpoint
from milepost.ckpt.restore import build_model, with_base

V, T = 61, 24
SIZES: dict[str, Any] = {
    "vocab_size": V, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 6, "intermediate_size": 80,
    "max_position_embeddings": 32, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "grouped, tied (SmolLM2)": ("Llama", {"num_key_value_heads": 2, "tie_word_embeddings": True}),
    "one head of keys": ("Llama", {"num_key_value_heads": 1}),
    "heads of another size": ("Llama", {"head_dim": 12}),
    "biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama3 scaling": ("Llama", {"rope_parameters": LLAMA3}),
    "linear scaling": ("Llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}),
    "qwen2": ("Qwen2", {"num_key_value_heads": 2}),
    "qwen3": ("Qwen3", {"num_key_value_heads": 2, "head_dim": 16}),
    "mistral": ("Mistral", {"num_key_value_heads": 2, "sliding_window": None, "head_dim": 8}),
}


def saved(folder: Path, kind: str, **changes: Any) -> transformers.PreTrainedModel:
    """A random model of transformers, saved in `folder`; its norms and biases are not what they start with."""
    torch.manual_seed(7)
    config = getattr(transformers, f"{kind}Config")(**SIZES | changes)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return model


def ids() -> torch.Tensor:
    return torch.randint(V, (3, T), generator=torch.Generator().manual_seed(1))


def logits_of(record: Checkpoint) -> torch.Tensor:
    model = build_model(record, device=torch.device("cpu")).eval()
    with torch.no_grad():
        return model(ids()).logits


@pytest.mark.parametrize("shape", SHAPES)
def test_a_folder_of_transformers_has_its_logits_here_and_back(shape: str, tmp_path: Path) -> None:
    kind, changes = SHAPES[shape]
    theirs = saved(tmp_path / "theirs", kind, **changes)
    with torch.no_grad():
        expected = theirs(ids()).logits
    record = ckpt.load(tmp_path / "theirs")
    assert record.model_type == "llama"
    torch.testing.assert_close(logits_of(record), expected, rtol=0, atol=1e-4)

    (tmp_path / "back").mkdir()
    path = ckpt.convert(tmp_path / "theirs", tmp_path / "back", layout="huggingface").target
    again = transformers.AutoModelForCausalLM.from_pretrained(path)
    with torch.no_grad():
        torch.testing.assert_close(again(ids()).logits, expected, rtol=0, atol=1e-5)
    assert tensor_bytes(ckpt.load(path)) == tensor_bytes(record)
    assert type(again).__name__ == type(theirs).__name__.replace("Mistral", "Llama")


@pytest.mark.parametrize("buffer", ["model.rotary_emb.inv_freq", "model.layers.0.self_attn.rotary_emb.inv_freq"])
def test_frequencies_that_old_versions_stored_are_left_out(buffer: str, tmp_path: Path) -> None:
    theirs = saved(tmp_path, "Llama")
    weights = load_file(tmp_path / "model.safetensors") | {buffer: torch.ones(4)}
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with torch.no_grad():
        torch.testing.assert_close(logits_of(ckpt.load(tmp_path)), theirs(ids()).logits, rtol=0, atol=1e-4)


def trainers_groups(model: transformers.PreTrainedModel) -> list[dict[str, Any]]:
    """The groups of transformers' Trainer, by its own function."""
    decayed = {*transformers.Trainer.get_decay_parameter_names(None, model)}
    parameters = dict(model.named_parameters())
    return [
        {"params": [one for name, one in parameters.items() if (name in decayed) is decays], "weight_decay": rate}
        for decays, rate in ((True, 0.1), (False, 0.0))
    ]


@pytest.mark.parametrize(
    "shape", ["grouped, tied (SmolLM2)", "biases", "qwen2", "qwen3", "eleven layers of equal squares"]
)
@pytest.mark.parametrize("groups", [trainers_groups, lambda model: model.parameters()], ids=["Trainer", "one group"])
def test_the_moments_of_its_trainer_are_those_of_the_parameters_of_the_same_name(
    shape: str, groups: Any, tmp_path: Path
) -> None:
    equal = ("Llama", {"num_hidden_layers": 11, "intermediate_size": 48})
    kind, changes = (SHAPES | {"eleven layers of equal squares": equal})[shape]
    theirs = saved(tmp_path, kind, **changes).train()
    optimizer = torch.optim.AdamW(groups(theirs), lr=1e-3)
    for _ in range(2):
        theirs(ids(), labels=ids()).loss.backward()
        optimizer.step()
    theirs.save_pretrained(tmp_path)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    record = ckpt.load(tmp_path, verify=True)
    assert record.optimizer_state is not None, record.notes
    parameters = {name.removeprefix("model."): parameter for name, parameter in theirs.named_parameters()}
    listed = [(i, name) for group in record.optimizer_state["param_groups"]
              for i, name in zip(group["params"], group["param_names"], strict=True)]  # fmt: skip
    assert {name for _, name in listed} == parameters.keys()
    for i, name in listed:
        for moment in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(record.optimizer_state["state"][i][moment], optimizer.state[parameters[name]][moment]), (
                name
            )


def test_mistrals_second_copy_of_the_weights_is_left_aside(tmp_path: Path) -> None:
    """Its folders on the hub hold consolidated.safetensors beside the files of transformers, under other names."""
    folder = tmp_path / "mistral"
    theirs = saved(folder, "Mistral", num_key_value_heads=2, sliding_window=None, head_dim=8)
    save_file({"tok_embeddings.weight": torch.zeros(V, 48)}, folder / "consolidated.safetensors")
    (folder / "params.json").write_text('{"dim": 48}', encoding="utf-8")
    with torch.no_grad():
        expected = theirs(ids()).logits
    for named in (folder, folder / "consolidated.safetensors"):
        path, _ = ckpt.resolve(str(named), tmp_path)
        torch.testing.assert_close(logits_of(ckpt.load(path)), expected, rtol=0, atol=1e-4)
    assert [(found.path, found.layout, found.problem) for found in ckpt.find(tmp_path)] == [
        (folder, "huggingface", None)
    ]
    assert [found.path for found in ckpt.find(folder)] == [folder]


@pytest.mark.parametrize(
    ("kind", "changes", "named"),
    [
        ("Llama", {"hidden_act": "gelu"}, "hidden_act"),
        ("Mistral", {"sliding_window": 16, "head_dim": 8}, "sliding_window"),
        ("Qwen2", {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}, "sliding_window"),
        ("Llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "rope_type"),
    ],
)
def test_what_is_not_computed_is_refused(kind: str, changes: dict[str, Any], named: str, tmp_path: Path) -> None:
    """Negative control of the comparison above: these would have other logits."""
    saved(tmp_path, kind, **changes)
    with pytest.raises(CheckpointError) as error:
        ckpt.load(tmp_path)
    assert (error.value.kind, named in error.value.problem) == ("not understood", True)


def test_a_mistral_that_names_no_window_has_that_of_transformers(tmp_path: Path) -> None:
    """Its class takes 4096 then; a model that reads no further has no window."""
    for length, window in ((8192, 4096), (4096, None)):
        folder = tmp_path / str(length)
        saved(folder, "Mistral", head_dim=8, num_key_value_heads=2, max_position_embeddings=length, sliding_window=None)
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        del config["sliding_window"]
        (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
        assert transformers.AutoConfig.from_pretrained(folder).sliding_window == 4096
        if window is None:
            assert ckpt.load(folder).model_settings["block_size"] == length
            continue
        with pytest.raises(CheckpointError, match="sliding_window is 4096"):
            ckpt.load(folder)


def test_kinds_of_layers_that_are_no_list_are_refused(tmp_path: Path) -> None:
    saved(tmp_path, "Llama")
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "config.json").write_text(json.dumps(config | {"layer_types": 2}), encoding="utf-8")
    with pytest.raises(CheckpointError, match="layer_types is 2"):
        ckpt.load(tmp_path)


def test_of_two_rotary_settings_the_one_that_transformers_takes_counts(tmp_path: Path) -> None:
    saved(tmp_path, "Llama")
    path = tmp_path / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    rotary = {"rope_type": "default", "rope_theta": 500.0}
    both = config | {"rope_parameters": rotary, "rope_scaling": {"rope_type": "linear", "factor": 4.0}}
    path.write_text(json.dumps(both), encoding="utf-8")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(logits_of(ckpt.load(tmp_path)), theirs(ids()).logits, rtol=0, atol=1e-4)
    for rope, named in (
        ({"full_attention": rotary, "sliding_attention": rotary}, "rope_parameters"),
        (rotary | {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ):
        path.write_text(json.dumps(config | {"rope_parameters": rope}), encoding="utf-8")
        with pytest.raises(CheckpointError, match=named):
            ckpt.load(tmp_path)


def test_another_model_of_transformers_is_named(tmp_path: Path) -> None:
    config = transformers.GPTNeoXConfig(
        vocab_size=V, hidden_size=24, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24
    )
    transformers.GPTNeoXForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(
        CheckpointError, match="model_type is 'gpt_neox', expected one of gpt2, llama, qwen2, qwen3, mistral"
    ):
        ckpt.load(tmp_path)


def test_gradients_are_those_of_transformers(tmp_path: Path) -> None:
    theirs = saved(tmp_path, "Llama", num_key_value_heads=2).train()
    record = ckpt.load(tmp_path)
    model = build_model(record, device=torch.device("cpu")).train()
    text = ids()
    model(text[:, :-1], text[:, 1:]).loss.backward()
    theirs(text, labels=text).loss.backward()
    expected = {name.removeprefix("model."): parameter.grad for name, parameter in theirs.named_parameters()}
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_a_model_trained_here_generates_the_same_text_in_transformers(tmp_path: Path) -> None:
    settings = {"MODEL_TYPE": "llama", "N_KV_HEAD": "1", "TRAINING_STEPS": "20", "CHECKPOINT_LAYOUT": "huggingface"}
    code, said = train(tmp_path, **settings)
    assert code == 0, said
    path = newest(tmp_path).path
    ours = call(
        script("load_checkpoint"), tmp_path, CHECKPOINT_PATH=path, TEMPERATURE="0", MAX_NEW_TOKENS="12", PROMPT="ab"
    )
    theirs = transformers.AutoModelForCausalLM.from_pretrained(path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    given = tokenizer("ab", return_tensors="pt")
    whole = theirs.generate(**given, max_new_tokens=12, do_sample=False)
    assert ours.code == 0, ours.err
    assert tokenizer.decode(whole[0]) in ours.out
    assert models.MODELS["llama"].transformers == type(theirs).__name__


def test_adapters_are_pefts_there_and_back(tmp_path: Path) -> None:
    """peft computes what we trained, and what peft trained opens here, over the same base."""
    base = tmp_path / "base"
    saved(base, "Llama", num_key_value_heads=2)
    torch.manual_seed(5)
    form = peft.LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")
    theirs = peft.get_peft_model(transformers.AutoModelForCausalLM.from_pretrained(base), form).eval()
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
        expected = theirs(ids()).logits
        plain = transformers.AutoModelForCausalLM.from_pretrained(base)(ids()).logits
    assert (expected - plain).abs().max() > 0.01  # the adapters do something
    theirs.peft_config["default"].base_model_name_or_path = str(base)
    theirs.save_pretrained(tmp_path / "adapter")

    record = ckpt.load(tmp_path / "adapter")
    with_weights = with_base(record, ckpt.load(base))
    torch.testing.assert_close(logits_of(with_weights), expected, rtol=0, atol=1e-4)

    path = Peft().write(with_weights, tmp_path, "back")
    again = peft.PeftModel.from_pretrained(transformers.AutoModelForCausalLM.from_pretrained(base), path).eval()
    with torch.no_grad():
        torch.testing.assert_close(again(ids()).logits, expected, rtol=0, atol=1e-5)
