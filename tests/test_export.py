"""Exports: what nanoGPT and transformers make of them, what has no place in them, and that nothing else is touched."""

import dataclasses
import json
import sys
from pathlib import Path

import programs
import pytest
import torch
from foreign_programs import NanoGPT
from records import gpt2_record, record
from script import call, files_of, script
from transformers import AutoModelForCausalLM, AutoTokenizer

from milepost import ckpt
from milepost.ckpt import Checkpoint, CheckpointError
from milepost.ckpt.foreign.tokenizer import read_meta
from milepost.ckpt.layouts import WRITERS, huggingface, layout_of
from milepost.ckpt.restore import build_model, build_tokenizer
from milepost.text import tokenization
from milepost.text.registry import TOKENIZERS

converter = script("convert_checkpoint")
TEXT = "Dear Wren,\n\nmy neighbour's naïve cat (“Señor” 😀 日本…) has adopted me.\tWhat do I owe?\r\n"


def model_of(kind: str, **settings: object) -> Checkpoint:
    """A tiny GPT-2's record whose tokenizer is of this kind and knows TEXT; its weights are random,
    and large enough to tell.
    """
    tokenizer = tokenization.build(
        kind, [(TEXT * 9, True)], alphabet="".join(sorted({*TEXT})), documents=1, vocab_size=300
    )
    one = gpt2_record(settings={"vocab_size": tokenizer.vocab_size, "n_embd": 8, "block_size": 16} | settings)
    state = {name: tensor + torch.randn_like(tensor) * 0.3 for name, tensor in one.model_state.items()}
    return dataclasses.replace(one, model_state=state, tokenizer=tokenizer.to_dict())


def saved(folder: Path, one: Checkpoint) -> Path:
    (folder / "checkpoints").mkdir(exist_ok=True)
    return ckpt.save(one, folder / "checkpoints")


def exported(folder: Path, one: Checkpoint, to: str, **changes: str) -> tuple[Path, str]:
    """What the script wrote, and what it said."""
    said = call(converter, folder, CHECKPOINT_PATH=saved(folder, one), CONVERT_TO=to, OUTPUT=folder / "out", **changes)
    assert said.code == 0, said.err
    return Path(said.out.split(" -> ")[1].splitlines()[0]), said.out


# ---------------------------------------------------------------------------------------------------------------------
# transformers


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_transformers_opens_the_model_and_its_tokenizer(tmp_path, kind):
    """The same logits to 1e-4 and the same ids, of a text of many scripts, for every kind of tokenizer."""
    torch.manual_seed(1)
    one = model_of(kind)
    path, said = exported(tmp_path, one, "huggingface")
    assert "Converted: " in said
    theirs, tokenizer = AutoModelForCausalLM.from_pretrained(path).eval(), AutoTokenizer.from_pretrained(path)
    ids = build_tokenizer(one).encode_whole(TEXT)
    assert tokenizer.encode(TEXT) == ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == TEXT
    assert len(tokenizer) == one.model_settings["vocab_size"]
    if tokenizer.eos_token_id is not None:
        assert theirs.config.eos_token_id == theirs.generation_config.eos_token_id == tokenizer.eos_token_id
    batch = torch.tensor([ids[:16]])
    with torch.no_grad():
        ours = build_model(one, device=torch.device("cpu")).eval()(batch)[0]
        assert ours.std() > 0.5
        torch.testing.assert_close(theirs(batch).logits, ours, atol=1e-4, rtol=0)
    assert layout_of(path) is huggingface.LAYOUT


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_transformers_generates_our_text_without_a_warning(tmp_path, kind):
    """Tokens that end a text are named as they are: null for characters and bytes."""
    path, _ = exported(tmp_path, one := model_of(kind), "huggingface")
    asked = {"CHECKPOINT_PATH": path, "PROMPT": "Dear", "MAX_NEW_TOKENS": "12", "TEMPERATURE": "0"}
    ours = call(script("load_checkpoint"), tmp_path, **asked).out
    program = (
        "import json, sys, warnings; warnings.simplefilter('always')\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "model, tokenizer = (auto.from_pretrained(sys.argv[1]) for auto in (AutoModelForCausalLM, AutoTokenizer))\n"
        "print('opened', file=sys.stderr)\n"
        "ids = model.generate(**tokenizer('Dear', return_tensors='pt'), max_new_tokens=12, do_sample=False)\n"
        "print(json.dumps([ids[0].tolist(), tokenizer.decode(ids[0], skip_special_tokens=True)]))\n"
    )
    said = programs.run([sys.executable, "-c", program, path], capture_output=True, check=True)
    ids, text = json.loads(said.stdout)
    tokenizer = tokenization.from_dict(one.tokenizer)
    shown = [i for i in ids[tokenizer.begin_of_text is not None :] if i not in tokenizer.stop_ids]
    assert tokenizer.decode(shown).strip() == ours.strip()
    if (
        kind != "sentencepiece" or "\ufffd" not in text
    ):  # it shows all bytes of a run that is not UTF-8 as that, ours only those
        assert text.strip() == ours.strip()
    warned = [line for line in said.stderr.decode().splitlines() if line and "%|" not in line]  # its progress bar
    assert warned == ["opened"]


# ---------------------------------------------------------------------------------------------------------------------
# nanoGPT


def nano(path: Path) -> NanoGPT:
    """What nanoGPT's sample.py builds from the export: model_args to the last, and every name of the state."""
    content = torch.load(path / "ckpt.pt", map_location="cpu", weights_only=True)
    args = dict(content["model_args"])
    assert args.pop("dropout") == 0.0
    model = NanoGPT(**args)
    model.load_state_dict(content["model"], strict=True)
    assert {"iter_num", "best_val_loss", "config", "optimizer"} <= content.keys()
    return model.eval()


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("activation", ["gelu", "gelu_erf"])
def test_nanogpt_computes_the_export(tmp_path, bias, activation):
    """With its own activation the logits are ours; a tanh GELU is told apart, measured, and printed."""
    torch.manual_seed(1)
    one = model_of("char", bias=bias, activation=activation)
    path, said = exported(tmp_path, one, "nanogpt")
    ids = torch.randint(one.model_settings["vocab_size"], (3, 16))
    with torch.no_grad():
        theirs = nano(path)(ids)
        exact = dataclasses.replace(one, model_settings=one.model_settings | {"activation": "gelu_erf"})
        ours, as_theirs = (build_model(each, device=torch.device("cpu")).eval()(ids)[0] for each in (one, exact))
    torch.testing.assert_close(theirs, as_theirs, atol=1e-5, rtol=0)
    apart = (theirs - ours).abs().max().item()
    assert (apart > 1e-4) == (activation == "gelu")
    assert apart < 0.02 * ours.std()
    assert ("it computes the exact GELU where this model has GELU's tanh form" in said) == (activation == "gelu")


def test_nanogpts_characters_are_ours(tmp_path):
    one = model_of("char")
    path, said = exported(tmp_path, one, "nanogpt")
    meta = read_meta((path / "meta.pkl").read_bytes(), where="meta.pkl")
    chars = one.tokenizer["chars"]
    assert meta == {
        "vocab_size": len(chars),
        "itos": dict(enumerate(chars)),
        "stoi": {c: i for i, c in enumerate(chars)},
    }
    content = torch.load(path / "ckpt.pt", weights_only=True)
    assert (content["iter_num"], content["config"]["dataset"]) == (one.step, path.name)
    assert f"--out_dir=data/{path.name}" in said
    assert {file.name for file in path.iterdir()} == {"ckpt.pt", "meta.pkl"}


def test_nanogpt_takes_gpt2s_tokens_where_no_characters_are(tmp_path):
    path, _ = exported(tmp_path, model_of("gpt2", n_layer=1, n_head=1, n_embd=2), "nanogpt")
    assert [file.name for file in path.iterdir()] == ["ckpt.pt"]


def test_a_lost_character_fails_the_proof(tmp_path):
    """The control: the file is written whole, and then one character of it is another."""
    one, to = model_of("char"), ckpt.exporter("nanogpt")
    path = to.write(one, tmp_path, "x")
    assert to.proof(one, path).tensors == len(one.model_state)
    meta = (path / "meta.pkl").read_bytes()
    (path / "meta.pkl").write_bytes(meta.replace(b"D", b"Q"))
    with pytest.raises(CheckpointError, match="its characters are not those of"):
        to.proof(one, path)


def test_a_changed_weight_fails_the_proof_and_leaves_nothing(tmp_path, monkeypatch):
    path, to = saved(tmp_path, model_of("char")), ckpt.exporter("nanogpt")
    write, before = type(to).write, files_of(tmp_path)

    def lossy(self, one, folder, stem):
        state = {name: tensor.clone() for name, tensor in one.model_state.items()}
        state["h.0.mlp.c_fc.weight"][0, 0] += 1e-3
        return write(self, dataclasses.replace(one, model_state=state), folder, stem)

    monkeypatch.setattr(type(to), "write", lossy)
    with pytest.raises(CheckpointError, match=r"its tensors are not those of .*h.0.mlp.c_fc.weight: max .* 0.001"):
        ckpt.export(path, tmp_path / "out", to=to)
    assert files_of(tmp_path) == before


# ---------------------------------------------------------------------------------------------------------------------
# What has no place


def untied(bias: float) -> Checkpoint:
    one = model_of("char", tied=False)
    one.model_state["lm_head.bias"].fill_(bias)
    return one


def with_adapter() -> Checkpoint:
    one = model_of("char")
    one.model_state["h.0.attn.c_attn.lora_A"] = torch.ones(2, 8)
    return one


@pytest.mark.parametrize("to", [name for name in ckpt.EXPORTS if name not in ("peft", "lecture")])
@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: record(1), "bigram"),
        (lambda: model_of("char", activation="relu"), "relu.*CONVERT_TO=huggingface"),
        (lambda: untied(1.0), r"lm_head.bias \(\d+,\)"),
        (with_adapter, r"h.0.attn.c_attn.lora_A and 0 more"),
        (lambda: dataclasses.replace(model_of("char"), tokenizer=None), "no tokenizer"),
    ],
    ids=["bigram", "relu", "head bias", "adapter", "none"],
)
def test_what_has_no_place_is_refused_in_one_sentence(tmp_path, to, make, named):
    path = tmp_path / "x"
    with pytest.raises(CheckpointError, match=named) as caught:
        ckpt.exporter(to).write(make(), tmp_path, "x")
    assert caught.value.kind == "refused"
    assert "\n" not in str(caught.value)
    assert not path.exists()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["bpe", "byte"])
def test_a_tokenizer_that_nanogpt_has_not_is_refused_by_the_script(tmp_path, kind):
    path = saved(tmp_path, model_of(kind))
    said = call(converter, tmp_path, CHECKPOINT_PATH=path, CONVERT_TO="nanogpt", OUTPUT=tmp_path / "out")
    assert (said.code, said.out) == (3, "")
    assert f"{path}: its tokenizer is {kind}" in said.err
    assert "train with TOKENIZER=" in said.err
    assert files_of(tmp_path / "out") == {}


def test_nanogpt_ties_the_head(tmp_path):
    with pytest.raises(CheckpointError, match="has a head of its own") as caught:
        ckpt.exporter("nanogpt").write(untied(0.0), tmp_path, "x")
    assert caught.value.kind == "refused"


# ---------------------------------------------------------------------------------------------------------------------
# The script


def test_convert_to_wins_over_checkpoint_layout(tmp_path):
    path = saved(tmp_path, record(1))
    said = call(converter, tmp_path, CHECKPOINT_PATH=path, CONVERT_TO="directory", CHECKPOINT_LAYOUT="separated")
    assert said.code == 0, said.err
    assert layout_of(Path(said.out.split(" -> ")[1].splitlines()[0])).name == "directory"
    said = call(converter, tmp_path, CHECKPOINT_PATH=path, CONVERT_TO="unified", CHECKPOINT_LAYOUT="separated")
    assert (said.code, said.out) == (2, "")
    assert f"CONVERT_TO=unified: {path} is laid out so already" in said.err


def test_an_export_is_no_checkpoint(tmp_path):
    """It goes to a folder of its own, and nothing in checkpoints/ changes."""
    path = saved(tmp_path, model_of("char"))
    before = files_of(path.parent)
    for output in (path.parent, path.parent / "new"):
        said = call(converter, tmp_path, CHECKPOINT_PATH=path, CONVERT_TO="nanogpt", OUTPUT=output)
        assert (said.code, said.out) == (2, "")
        assert f"OUTPUT={output}: lies in the folder of checkpoints" in said.err
    assert files_of(path.parent) == before
    first, second = (exported(tmp_path, model_of("char"), "nanogpt")[0] for _ in range(2))
    assert first != second
    assert first.parent == second.parent == tmp_path / "out"


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    path = saved(tmp_path, model_of("bpe"))
    monkeypatch.setattr(converter.importlib.util, "find_spec", lambda name: None)
    said = call(converter, tmp_path, CHECKPOINT_PATH=path, CONVERT_TO="gguf", OUTPUT=tmp_path / "out")
    assert (said.code, said.out) == (2, "")
    assert said.err.strip().endswith("CONVERT_TO=gguf needs the package gguf: pip install gguf")
    assert not (tmp_path / "out").exists()


def test_the_choices_are_the_layouts_and_the_exports(tmp_path):
    said = call(converter, tmp_path, CONVERT_TO="onnx")
    assert said.code == 2
    listed = said.err.split("expected one of ")[1].strip().split(", ")
    assert set(listed) == {*WRITERS, *ckpt.EXPORTS}
