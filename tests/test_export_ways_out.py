"""The lecture's export, and every refusal of an export: the remedy that it names works."""

import ast
import dataclasses
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from foreign_programs import (
    CHARS,
    LectureModel,
    NanoGPT,
    golden_lecture,
    golden_moments,
    golden_nano,
    nanogpt,
    shaken,
    write_lecture_folder,
)
from records import gpt2_record, record
from script import call, files_of, script
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoTokenizer,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
)

from milepost import ckpt
from milepost.ckpt import Checkpoint, CheckpointError
from milepost.ckpt.restore import build_model, build_tokenizer
from milepost.text.tokenization import BpeTokenizer

converter = script("convert_checkpoint")
CHAR = {"token_kind": "char", "chars": CHARS}


def export_of(folder: Path, path: Path, to: str = "lecture") -> Path:
    said = call(converter, folder, CHECKPOINT_PATH=path, CONVERT_TO=to, OUTPUT=folder / "out")
    assert said.code == 0, said.err
    return Path(said.out.split(" -> ")[1].splitlines()[0])


def test_the_lecture_s_program_gets_back_what_it_wrote(tmp_path):
    """Its own files -> a checkpoint of ours -> its files: every tensor to the last bit, masks included."""
    model = golden_lecture()
    ours = ckpt.convert(
        write_lecture_folder(tmp_path / "dante", model, CHAR, step=7), tmp_path / "new", layout="unified"
    )
    path = export_of(tmp_path, ours.target)
    assert path.name == "dante"
    weights = torch.load(path / "model.pt", weights_only=True)
    assert weights.keys() == model.state_dict().keys()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    config, old = (json.loads((folder / "config.json").read_text()) for folder in (path, tmp_path / "dante"))
    assert config.keys() == old.keys()
    assert all(config[name] == old[name] for name in ("n_layer", "n_head", "n_embd", "block_size", "vocab_size"))
    assert json.loads((path / "tokenizer.json").read_text()) == CHAR
    assert json.loads((path / "training_state.json").read_text())["step"] == 7


@pytest.mark.parametrize("tied", [True, False])
def test_the_lecture_s_model_computes_the_export(tmp_path, tied):
    one = relu_model(tied=tied)
    path = export_of(tmp_path, ckpt.save(one, tmp_path / "checkpoints"))
    sizes = {name: one.model_settings[name] for name in ("vocab_size", "block_size", "n_layer", "n_head", "n_embd")}
    model = shaken(LectureModel(**sizes))
    model.load_state_dict(torch.load(path / "model.pt", weights_only=True), strict=True)
    ids = torch.randint(sizes["vocab_size"], (3, sizes["block_size"]))
    with torch.no_grad():
        theirs, ours = model(ids), build_model(one, device=torch.device("cpu")).eval()(ids)[0]
    torch.testing.assert_close(theirs, ours, atol=1e-5, rtol=0)


ODD = 'it\'s my "model" $HOME'


@pytest.mark.parametrize("to", ["lecture", "peft"])
def test_the_python_that_it_prints_names_the_export(tmp_path, monkeypatch, to):
    """Also where the path has spaces and quotes, which a shell and Python quote differently."""
    folder = tmp_path / ODD
    folder.mkdir()
    one = relu_model()
    if to == "peft":
        model = build_model(one, device=torch.device("cpu"), adapters={"lora": {"rank": 2, "alpha": 4.0}})
        state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
        lora = {"lora": {"rank": 2, "alpha": 4.0, "dropout": 0.0, "targets": "c_attn,c_proj,c_fc"}}
        one = dataclasses.replace(
            one, model_state=state, model_settings=one.model_settings | lora, optimizer_state=None
        )
    said = call(
        converter, folder, CHECKPOINT_PATH=ckpt.save(one, folder / "checkpoints"), CONVERT_TO=to, OUTPUT=folder / "out"
    )
    assert said.code == 0, said.err
    (code,) = [line for line in said.out.splitlines() if line.startswith("next: in Python: ")]
    call_of, _, _ = code.removeprefix("next: in Python: ").partition(", where ")
    (path,) = [node.value for node in ast.walk(ast.parse(call_of)) if isinstance(node, ast.Constant)]
    assert Path(path).exists()


@pytest.mark.parametrize("to", ["gguf", "nanogpt"])
def test_the_shell_command_that_it_prints_names_the_export(tmp_path, to):
    path = tmp_path / ODD / "my model"
    words = shlex.split(ckpt.exporter(to).how(path).removeprefix("in nanoGPT's folder: "))
    assert str(path) in words
    assert to == "gguf" or "--out_dir=data/my model" in words


def relu_model(*, tied: bool = False, qkv_bias: float = 0.0, **settings: Any) -> Checkpoint:
    one = gpt2_record(settings={"activation": "relu", "tied": tied} | settings)
    for name, tensor in one.model_state.items():
        if name.endswith("attn.c_attn.bias"):
            tensor.fill_(qkv_bias)
    if not tied:
        one.model_state["lm_head.bias"].fill_(0.5)
    return one


def test_the_bigram_goes_back_too(tmp_path):
    one = record(3)
    path = export_of(tmp_path, ckpt.save(one, tmp_path / "checkpoints"))
    weights = torch.load(path / "model.pt", weights_only=True)
    assert [(name, torch.equal(tensor, one.model_state[name])) for name, tensor in weights.items()] == [
        ("token_embedding_table.weight", True)
    ]


def test_a_changed_weight_fails_the_proof(tmp_path):
    one, to = relu_model(), ckpt.exporter("lecture")
    path = to.write(one, tmp_path, "x")
    assert to.proof(one, path).tensors == len(one.model_state)
    weights = torch.load(path / "model.pt", weights_only=True)
    weights["blocks.1.sa.heads.1.value.weight"][0, 0] += 1
    torch.save(weights, path / "model.pt")
    with pytest.raises(CheckpointError, match="its tensors are not those of"):
        to.proof(one, path)


def with_tokenizer(one: Checkpoint, kind: str | None) -> Checkpoint:
    return dataclasses.replace(one, tokenizer=None if kind is None else {"kind": kind})


MODELS = {
    "bigram": lambda: record(1),
    "lecture": relu_model,
    "lecture with bytes": lambda: with_tokenizer(relu_model(), "byte"),
    "lecture without tokenizer": lambda: with_tokenizer(relu_model(), None),
    "relu and tied": lambda: relu_model(tied=True, qkv_bias=1.0),
    "relu, biased throughout": lambda: relu_model(qkv_bias=1.0),
    "gelu": gpt2_record,
    "untied": lambda: gpt2_record(settings={"tied": False}),
    "TTT": lambda: gpt2_record(settings={"ttt": {"layers": "1"}}),
    "LoRA": lambda: gpt2_record(settings={"lora": {"rank": 2, "alpha": 4.0, "dropout": 0.0, "targets": "c_attn"}}),
    "LoRA and TTT": lambda: gpt2_record(
        settings={"ttt": {"layers": "1"}, "lora": {"rank": 2, "alpha": 4.0, "dropout": 0.0, "targets": "c_attn"}}
    ),
}


@pytest.mark.parametrize(
    "to", [pytest.param(to, marks=pytest.mark.exchange) if to == "gguf" else to for to in ckpt.EXPORTS]
)
@pytest.mark.parametrize("model", MODELS)
def test_the_remedy_of_a_refusal_works(tmp_path, model, to):
    one = MODELS[model]()
    path = ckpt.save(one, tmp_path / "checkpoints")
    said = call(converter, tmp_path, CHECKPOINT_PATH=path, CONVERT_TO=to, OUTPUT=tmp_path / "out")
    if said.code == 0:
        return
    assert (said.code, files_of(tmp_path / "out")) == (3, {})
    named = re.findall(r"CONVERT_TO=([a-z]+)", said.err)
    for other in named:
        again = call(converter, tmp_path, CHECKPOINT_PATH=path, CONVERT_TO=other, OUTPUT=tmp_path / "other")
        assert again.code == 0 or "without a tokenizer" in again.err, again.err
    assert ("merge them first" in said.err) <= (model == "LoRA")


def test_a_tensor_that_the_lecture_lacks_is_refused(tmp_path):
    one = relu_model()
    one.model_state["h.0.attn.c_attn.lora_A"] = torch.ones(2, 8)
    with pytest.raises(CheckpointError, match=r"h\.0\.attn\.c_attn\.lora_A") as caught:
        ckpt.exporter("lecture").write(one, tmp_path, "x")
    assert (caught.value.kind, list(tmp_path.iterdir())) == ("refused", [])


@pytest.mark.parametrize("kind", ["char", "byte"])
def test_a_tokenizer_without_an_end_exports_no_end(tmp_path, kind):
    """transformers would take 50256, which is outside the vocabulary."""
    one = gpt2_record() if kind == "char" else with_tokenizer(gpt2_record(settings={"vocab_size": 256}), "byte")
    path = export_of(tmp_path, ckpt.save(one, tmp_path / "checkpoints"), "huggingface")
    config, generation = AutoConfig.from_pretrained(path), GenerationConfig.from_pretrained(path)
    assert (config.eos_token_id, config.bos_token_id) == (None, None)
    assert (generation.eos_token_id, generation.bos_token_id) == (None, None)


SPECIAL = ["<s>", "<pad>", "</s>", "<|im_end|>"]


def ended_folder(folder: Path, *, end: str = "</s>", **ids: Any) -> Path:
    """A folder of transformers whose tokenizer ends texts with `end`; `ids` are the eos_token_id of its two configs."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    trained.train_from_iterator(["Dear Wren, dear Wren, dear wrens all"], trainer=trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=trained, bos_token="<s>", eos_token=end)
    sizes = {"vocab_size": len(tokenizer), "n_positions": 32, "n_embd": 32, "n_layer": 1, "n_head": 2}
    model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=2))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for name in ("config", "generation_config"):
        values = json.loads((folder / f"{name}.json").read_text())
        del values["eos_token_id"]
        named = {"eos_token_id": ids[name]} if name in ids else {}
        (folder / f"{name}.json").write_text(json.dumps(values | named))
    return folder


# What the files name, and the tokens at which generation stops.
ENDS = pytest.mark.parametrize(
    ("named", "expected"),
    [
        ({"config": 2}, [2]),
        ({"config": 3, "end": "<|im_end|>"}, [3]),
        ({"config": 2, "generation_config": 3}, [3]),
        ({"config": 2, "generation_config": [3, 2]}, [3, 2]),
        ({}, [2]),  # tokenizer_config.json
        ({"end": "<|im_end|>"}, [3]),
        ({"config": 50256, "generation_config": 50256}, [2]),  # the default of GPT2Config, outside the vocabulary
        ({"config": None}, [2]),
    ],
)


@ENDS
def test_the_tokens_that_end_a_text_come_from_the_file(tmp_path, named, expected):
    folder = ended_folder(tmp_path / "theirs", **named)
    assert list(build_tokenizer(ckpt.load(folder)).stop_ids) == expected
    ours = ckpt.convert(folder, tmp_path / "new", layout="unified").target
    assert list(build_tokenizer(ckpt.load(ours)).stop_ids) == expected
    back = export_of(tmp_path, ours, "huggingface")
    one = expected if expected[1:] else expected[0]
    assert AutoConfig.from_pretrained(back).eos_token_id == one
    assert GenerationConfig.from_pretrained(back).eos_token_id == one
    assert AutoTokenizer.from_pretrained(back).eos_token_id == expected[0]


def test_the_token_that_begins_a_text_is_not_the_one_that_ends_it(tmp_path):
    """A Llama's tokenizer puts <s> before a text; `generate()` without a prompt begins with the id in the config."""
    folder = ended_folder(tmp_path / "theirs", config=2)
    values = json.loads((folder / "tokenizer.json").read_text())
    before, text = {"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    tokens = {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}}
    form = {
        "type": "TemplateProcessing",
        "single": [before, text],
        "pair": [before, text, text],
        "special_tokens": tokens,
    }
    (folder / "tokenizer.json").write_text(json.dumps(values | {"post_processor": form}))
    back = export_of(tmp_path, folder, "huggingface")
    found = [kind.from_pretrained(back) for kind in (AutoConfig, GenerationConfig, AutoTokenizer)]
    assert [(each.bos_token_id, each.eos_token_id) for each in found] == [(0, 2)] * 3


@pytest.mark.exchange
@ENDS
def test_the_tokens_that_end_a_text_are_in_the_gguf(tmp_path, named, expected):
    import gguf

    folder = ended_folder(tmp_path / "theirs", **named)
    ours = ckpt.convert(folder, tmp_path / "new", layout="unified").target
    fields = gguf.GGUFReader(export_of(tmp_path, ours, "gguf")).fields
    ids = [fields[f"tokenizer.ggml.{role}_token_id"] for role in ("eos", "eot", "eom")[: len(expected)]]
    assert [int(each.parts[-1][0]) for each in ids] == expected


@pytest.mark.parametrize("stop", [2, 3])
def test_generation_stops_at_each_of_them(tmp_path, stop):
    """A model that says that token after any other: the embedding and the head are its own."""
    folder = ended_folder(tmp_path / "theirs", generation_config=[3, 2])
    one = ckpt.load(folder)
    tensors = {name: torch.zeros_like(tensor) for name, tensor in one.model_state.items()}
    tensors["ln_f.bias"] = torch.ones_like(tensors["ln_f.bias"])
    tensors["wte.weight"][stop] = 1
    path = ckpt.save(dataclasses.replace(one, model_state=tensors), tmp_path / "checkpoints")
    asked = {"CHECKPOINT_PATH": path, "PROMPT": "Dear", "MAX_NEW_TOKENS": "5", "TEMPERATURE": "0"}
    assert call(script("load_checkpoint"), tmp_path, **asked).out.strip() == "Dear"


def test_an_end_that_is_an_ordinary_token_is_named(tmp_path):
    folder = ended_folder(tmp_path / "theirs", generation_config=10)
    one = ckpt.load(folder)
    assert any("generation_config.json" in note and "10" in note for note in one.notes)
    assert build_tokenizer(one).stop_ids == ()


@pytest.mark.parametrize("stops", ["<|im_end|>", 3, ["nothing"]])
def test_stops_that_are_no_tokens_are_refused(tmp_path, stops):
    one = ckpt.load(ended_folder(tmp_path / "theirs"))
    with pytest.raises(ValueError, match="bpe tokenizer"):
        BpeTokenizer.from_dict(one.tokenizer | {"stops": stops})


def test_an_end_that_is_no_token_is_refused():
    trained = BpeTokenizer.build([("Dear Wren " * 40, True)], alphabet="", documents=1, vocab_size=270)
    assert BpeTokenizer.from_dict(trained.to_dict()).digest == trained.digest
    with pytest.raises(ValueError, match="</s>"):
        BpeTokenizer.from_dict(trained.to_dict() | {"end": "</s>"})


def test_nanogpt_trains_on_from_the_export(tmp_path):
    """Its own file -> a checkpoint of ours -> its file: model, settings, and every moment of its optimizer."""
    content = nanogpt(golden_nano(), golden_moments()) | {"tokenizer": CHAR}
    torch.save(content, tmp_path / "ckpt.pt")
    ours = ckpt.convert(tmp_path / "ckpt.pt", tmp_path / "new", layout="directory").target
    again = torch.load(export_of(tmp_path, ours, "nanogpt") / "ckpt.pt", weights_only=True)
    assert {name: again["config"][name] for name in ("learning_rate", "compile")} == {
        "learning_rate": 6e-4,
        "compile": True,
    }
    assert again["iter_num"] == content["iter_num"]
    model = NanoGPT(**{name: value for name, value in again["model_args"].items() if name != "dropout"})
    model.load_state_dict(again["model"], strict=True)
    optimizer = model.configure_optimizers()
    optimizer.load_state_dict(again["optimizer"])
    before, after = golden_moments().state_dict(), optimizer.state_dict()
    assert after["state"].keys() == before["state"].keys()
    for place, moments in before["state"].items():
        assert all(torch.equal(tensor, after["state"][place][name]) for name, tensor in moments.items())
    assert [(group["lr"], group["weight_decay"], group["params"]) for group in after["param_groups"]] == [
        (group["lr"], group["weight_decay"], group["params"]) for group in before["param_groups"]
    ]
    model(torch.zeros(1, 4, dtype=torch.long)).sum().backward()
    optimizer.step()


def test_our_own_adamw_goes_to_nanogpt_and_muon_does_not(tmp_path):
    one = gpt2_record(settings={"bias": True})
    path = export_of(tmp_path, ckpt.save(one, tmp_path / "checkpoints"), "nanogpt")
    state = torch.load(path / "ckpt.pt", weights_only=True)["optimizer"]["state"]
    shapes = [tuple(moments["exp_avg"].shape) for moments in state.values()]
    assert shapes == [*(shape for shape in shapes if len(shape) == 2), *(shape for shape in shapes if len(shape) == 1)]
    assert len(shapes) == len(one.model_state)
    other = gpt2_record(optimizer="muon")
    path = ckpt.exporter("nanogpt").write(other, tmp_path, "x")
    assert torch.load(path / "ckpt.pt", weights_only=True)["optimizer"] is None
