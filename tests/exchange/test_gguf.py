"""CONVERT_TO=gguf as llama.cpp's own package reads it: names, shapes, values, sizes and tokens."""

import dataclasses
import re
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from drive import ROOT
from gguf.quants import dequantize
from script import call, script
from test_export import TEXT, exported, model_of, saved
from transformers.convert_slow_tokenizer import generate_merges

from milepost import ckpt
from milepost.ckpt import Checkpoint, CheckpointError
from milepost.ckpt.exports.gguf import TYPES
from milepost.ckpt.exports.gguf_gpt2 import MODEL
from milepost.ckpt.exports.gguf_tokens import tokens_of
from milepost.ckpt.restore import build_tokenizer
from milepost.text import tokenization
from milepost.text.templates import plain_jinja
from milepost.text.tokenization.sentencepiece import SentencePieceTokenizer

converter = script("convert_checkpoint")
README = (ROOT / "README.md").read_text(encoding="utf-8")
# An independent statement of what llama.cpp's src/models/gpt2.cpp asks for, in its order.
WANTED = [
    "token_embd.weight",
    "position_embd.weight",
    "output_norm.weight",
    "output_norm.bias",
    "blk.N.attn_norm.weight",
    "blk.N.attn_norm.bias",
    "blk.N.attn_qkv.weight",
    "blk.N.attn_qkv.bias",
    "blk.N.attn_output.weight",
    "blk.N.attn_output.bias",
    "blk.N.ffn_norm.weight",
    "blk.N.ffn_norm.bias",
    "blk.N.ffn_down.weight",
    "blk.N.ffn_down.bias",
    "blk.N.ffn_up.weight",
    "blk.N.ffn_up.bias",
]


def model(**settings: object) -> Checkpoint:
    torch.manual_seed(1)
    return model_of("bpe", n_embd=32, **settings)


def opened(folder: Path, one: Checkpoint, kind: str) -> gguf.GGUFReader:
    path, _ = exported(folder, one, "gguf", GGUF_TYPE=kind)
    assert path.name.endswith(f"-{kind}.gguf")
    return gguf.GGUFReader(path)


def field(reader: gguf.GGUFReader, name: str):
    return reader.fields[name].contents()


@pytest.mark.parametrize("kind", TYPES)
def test_names_shapes_and_values(tmp_path, kind):
    """Every tensor that llama.cpp expects is there, rows last, rounded no more than its type requires."""
    one = model()
    tensors = {each.name: each for each in opened(tmp_path, one, kind).tensors}
    assert set(tensors) == {name.replace("N", n) for name in WANTED for n in "01"}
    known = set(gguf.MODEL_TENSORS[gguf.MODEL_ARCH.GPT2])
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GPT2, 2)
    for name, tensor in one.model_state.items():
        theirs = tensors[MODEL.their_name(name)]
        assert table.get_type_and_name(f"transformer.{name}", try_suffixes=(".weight", ".bias"))[0] in known
        assert table.get_name(f"transformer.{name}", try_suffixes=(".weight", ".bias")) == theirs.name
        assert theirs.shape.tolist() == list(reversed(tensor.shape))
        matrix = tensor.dim() == 2 and name != "wpe.weight"
        assert theirs.tensor_type.name == (kind.upper() if matrix else "F32")
        found = dequantize(theirs.data, theirs.tensor_type)
        largest = tensor.abs().amax(dim=-1, keepdim=True).numpy()
        step = {"f32": 0.0, "f16": 2**-11, "q8_0": 1 / 254 + 2**-11}[kind if matrix else "f32"]
        assert (np.abs(found - tensor.numpy()) <= step * largest + 1e-7 * bool(step)).all()
        assert MODEL.our_name(theirs.name) == name


def test_sizes_and_the_words_around_them(tmp_path):
    reader = opened(tmp_path, model(), "q8_0")
    settings = {"block_count": 2, "context_length": 16, "embedding_length": 32, "feed_forward_length": 128}
    settings |= {"attention.head_count": 2}
    assert {name: field(reader, f"gpt2.{name}") for name in settings} == settings
    assert field(reader, "gpt2.attention.layer_norm_epsilon") == pytest.approx(1e-5)
    assert field(reader, "general.architecture") == "gpt2"
    assert field(reader, "general.file_type") == gguf.LlamaFileType.MOSTLY_Q8_0
    assert field(reader, "general.quantization_version") == gguf.GGML_QUANT_VERSION


def test_tokens_merges_and_the_rows_without_a_token(tmp_path):
    one = model()
    tokenizer = build_tokenizer(one)
    rows = tokenizer.vocab_size + 3
    wte = torch.cat([one.model_state["wte.weight"], torch.zeros(3, 32)])
    settings = one.model_settings | {"vocab_size": rows}
    one = dataclasses.replace(one, model_settings=settings, model_state=one.model_state | {"wte.weight": wte})
    reader = opened(tmp_path, one, "f32")
    spec = one.tokenizer["tokenizer"]
    tokens, types = field(reader, "tokenizer.ggml.tokens"), field(reader, "tokenizer.ggml.token_type")
    assert len(tokens) == len(types) == len(set(tokens)) == rows
    assert {token: tokens.index(token) for token in spec["model"]["vocab"]} == spec["model"]["vocab"]
    end = tokenizer.end_of_text
    assert [types[end], types[end + 1], types[-3:]] == [3, 1, [5, 5, 5]]
    assert field(reader, "tokenizer.ggml.merges") == [" ".join(pair) for pair in spec["model"]["merges"]]
    words = {"model": "gpt2", "pre": "gpt-2", "bos_token_id": end, "eos_token_id": end, "add_bos_token": False}
    assert {name: field(reader, f"tokenizer.ggml.{name}") for name in words} == words


def test_tokens_like_sentencepieces(tmp_path):
    """Scores follow the order in which tokens are joined, as in a tokenizer.model; bytes and special tokens have types of their own."""
    tokenizer = SentencePieceTokenizer.build([(README, True)], alphabet="", documents=1, vocab_size=500)
    one = dataclasses.replace(model(vocab_size=503), tokenizer=tokenizer.to_dict())
    reader = opened(tmp_path, one, "f32")
    tokens, types = field(reader, "tokenizer.ggml.tokens"), field(reader, "tokenizer.ggml.token_type")
    scores, spec = field(reader, "tokenizer.ggml.scores"), tokenizer.to_dict()["tokenizer"]
    assert {token: tokens.index(token) for token in spec["model"]["vocab"]} == spec["model"]["vocab"]
    kinds = gguf.TokenType
    assert types[:4] == [kinds.UNKNOWN, kinds.CONTROL, kinds.CONTROL, kinds.BYTE]
    assert (types.count(kinds.BYTE), types[500:]) == (256, [kinds.UNUSED] * 3)
    joined = list(dict.fromkeys("".join(pair) for pair in spec["model"]["merges"]))
    assert sorted(joined, key=lambda token: -scores[tokens.index(token)]) == joined
    assert max(scores[i] for i, token in enumerate(tokens) if token not in joined) < min(
        scores[tokens.index(token)] for token in joined
    )
    words = {
        "model": "llama",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
        "add_bos_token": True,
        "add_space_prefix": True,
    }
    assert {name: field(reader, f"tokenizer.ggml.{name}") for name in words} == words


def test_merges_that_transformers_makes_of_a_tokenizer_model_are_taken(tmp_path):
    """It makes them of the scores in the file: every pair whose text is a token, by the score of the token. The scores come back."""
    spec = SentencePieceTokenizer.build([(README, True)], alphabet="", documents=1, vocab_size=500).to_dict()[
        "tokenizer"
    ]
    ours = tokens_of(dataclasses.replace(model(vocab_size=500), tokenizer={"kind": "sentencepiece", "tokenizer": spec}))
    ids = {token: i for token, i in spec["model"]["vocab"].items() if i > 258}  # after special tokens and bytes
    scores = {token: ours.scores[i] for token, i in ids.items()}
    merges = [list(pair) for pair in generate_merges(ids, scores)]
    theirs = spec | {"model": spec["model"] | {"merges": merges}}
    one = dataclasses.replace(model(vocab_size=500), tokenizer={"kind": "sentencepiece", "tokenizer": theirs})
    assert tokens_of(one).scores == ours.scores
    assert sorted(merges) == sorted(spec["model"]["merges"])


def piece_tokenizers():
    """Tokenizers that llama.cpp would read otherwise, and why."""
    spec = SentencePieceTokenizer.build([(README, True)], alphabet="", documents=1, vocab_size=400).to_dict()[
        "tokenizer"
    ]
    merges = spec["model"]["merges"]
    first = next(i for i, pair in enumerate(merges) if "".join(pair) == "".join(merges[i + 1]))
    metaspace = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "first", "split": True}
    yield spec | {"normalizer": None, "pre_tokenizer": metaspace}, "puts no space"
    yield spec | {"model": spec["model"] | {"merges": merges[:-1]}}, "does not join"
    yield (
        spec | {"model": spec["model"] | {"merges": merges[:first] + merges[first + 1 :] + [merges[first]]}},
        "order of tokens",
    )
    yield spec | {"model": spec["model"] | {"ignore_merges": True}}, "takes words"
    vocab = [[token, -1.0] for token in sorted(spec["model"]["vocab"], key=spec["model"]["vocab"].get)]
    yield spec | {"model": {"type": "Unigram", "unk_id": 0, "vocab": vocab, "byte_fallback": True}}, "Unigram"


@pytest.mark.parametrize("number", range(5))
def test_tokens_that_llama_cpp_joins_otherwise_are_refused(tmp_path, number):
    spec, problem = list(piece_tokenizers())[number]
    one = dataclasses.replace(model(vocab_size=400), tokenizer={"kind": "sentencepiece", "tokenizer": spec})
    with pytest.raises(CheckpointError, match=problem) as found:
        ckpt.exporter("gguf").write(one, tmp_path, "x")
    assert found.value.kind == "refused"


def test_gpt2s_own_tokens(tmp_path):
    one = model_of("gpt2", n_layer=1, n_head=1, n_embd=2)
    reader = opened(tmp_path, one, "f16")
    tokens = field(reader, "tokenizer.ggml.tokens")
    ids = build_tokenizer(one).encode("Dear Wren,")
    assert [tokens[i] for i in ids] == ["Dear", "ĠW", "ren", ","]
    assert (len(tokens), tokens[50256], field(reader, "tokenizer.ggml.eos_token_id")) == (50257, "<|endoftext|>", 50256)


def test_biases_that_were_left_out_are_zeros(tmp_path):
    tensors = {each.name: each.data for each in opened(tmp_path, model(bias=False), "f32").tensors}
    biases = [data for name, data in tensors.items() if name.endswith(".bias")]
    assert len(biases) == 2 * 6 + 1
    assert not any(data.any() for data in biases)


def test_a_head_of_its_own_is_kept(tmp_path):
    bpe = model(tied=False)
    bpe.model_state["lm_head.bias"].zero_()
    tensors = {each.name: each.data for each in opened(tmp_path, bpe, "f32").tensors}
    assert (tensors["output.weight"] == bpe.model_state["lm_head.weight"].numpy()).all()
    assert "output.bias" not in tensors
    with pytest.raises(CheckpointError, match="it has no tokenizer"):
        ckpt.exporter("gguf").write(dataclasses.replace(bpe, tokenizer=None), tmp_path, "x")


def test_rows_that_are_no_whole_blocks_stay_in_f16(tmp_path):
    """A width of 24 makes no block of 32, but four times as wide makes three."""
    torch.manual_seed(1)
    kinds = {each.name: each.tensor_type.name for each in opened(tmp_path, model_of("bpe", n_embd=24), "q8_0").tensors}
    assert (kinds["token_embd.weight"], kinds["blk.0.ffn_down.weight"]) == ("F16", "Q8_0")


@pytest.mark.parametrize(("kind", "most"), [("f32", 0), ("f16", 0.02), ("q8_0", 0.2)])
def test_what_is_printed_is_how_far_the_model_is_from_ours(tmp_path, kind, most):
    _, said = exported(tmp_path, model(), "gguf", GGUF_TYPE=kind)
    found = re.search(
        r"logits \(2 x 16 x 300\) differ by at most ([^ ]+), of a standard deviation of ([\d.]+)(.*)", said
    )
    apart, spread = float(found[1]), float(found[2])
    assert apart <= most * spread
    assert (apart == 0) == (kind == "f32")
    assert found[3] == ("" if kind == "f32" else f": its matrices are rounded to {kind}")


@pytest.mark.parametrize(("kind", "number", "fits"), [
    ("f16", 65504.0, True), ("f16", -65600.0, False), ("q8_0", 8.3e6, True), ("q8_0", 8.4e6, False), ("f32", 8.4e6, True),
])  # fmt: skip
def test_a_number_that_a_type_does_not_hold_is_refused(tmp_path, kind, number, fits):
    """It would be infinite in the file, and every logit NaN."""
    one, to = model(), ckpt.exporter("gguf", gguf_type=kind)
    one.model_state["h.0.mlp.c_fc.weight"][1, 2] = number
    if fits:
        found = {tensor.name: tensor for tensor in gguf.GGUFReader(to.write(one, tmp_path, "x")).tensors}
        values = dequantize(found["blk.0.ffn_up.weight"].data, found["blk.0.ffn_up.weight"].tensor_type)
        assert np.isfinite(values).all()
        return
    with pytest.raises(CheckpointError, match="use GGUF_TYPE=f32") as caught:
        to.write(one, tmp_path, "x")
    assert (caught.value.kind, list(tmp_path.iterdir())) == ("refused", [])


def test_the_exact_gelu_is_reported(tmp_path):
    _, said = exported(tmp_path, model(activation="gelu_erf"), "gguf", GGUF_TYPE="f32")
    assert "it computes GELU's tanh form where this model has the exact GELU" in said


def test_a_flipped_bit_fails_the_proof(tmp_path):
    one, to = model(), ckpt.exporter("gguf", gguf_type="q8_0")
    path = to.write(one, tmp_path, "x")
    to.proof(one, path)
    data = bytearray(path.read_bytes())
    data[-40] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="its tensors are not those of"):
        to.proof(one, path)


def test_nothing_is_left_of_what_was_not_finished(tmp_path, monkeypatch):
    """The disk refuses in the middle of the tensors: no file, no hidden one, no folder, and the sentence names it."""
    path, written = saved(tmp_path, model()), []

    def refuse(self, tensor, *_):
        written.append(tensor)
        if len(written) > 3:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", refuse)
    said = call(converter, tmp_path, CHECKPOINT_PATH=path, CONVERT_TO="gguf", OUTPUT=tmp_path / "out")
    assert (said.code, said.out) == (1, "")
    assert ".gguf" in said.err
    assert not (tmp_path / "out").exists()


def without_end(one: Checkpoint) -> Checkpoint:
    """The record with a BPE of 299 tokens that ends no text."""
    spec = tokenization.build("bpe", [(TEXT * 9, True)], alphabet="", documents=1, vocab_size=300).to_dict()[
        "tokenizer"
    ]
    vocab = {token: i - 1 for token, i in spec["model"]["vocab"].items() if i}
    bare = {"kind": "bpe", "tokenizer": spec | {"added_tokens": [], "model": spec["model"] | {"vocab": vocab}}}
    return dataclasses.replace(one, tokenizer=bare)


@pytest.mark.parametrize("rows", [300, 299])
def test_a_row_without_a_token_ends_the_text_of_a_tokenizer_that_ends_none(tmp_path, rows):
    """llama.cpp takes token 11 for the end of a text where nothing else is named. A row that the model lacks is added:
    the mean of the others, whose logit is never the largest.
    """
    one = without_end(model())
    wte = one.model_state["wte.weight"][:rows]
    settings = one.model_settings | {"vocab_size": rows}
    one = dataclasses.replace(one, model_settings=settings, model_state=one.model_state | {"wte.weight": wte})
    reader = opened(tmp_path, one, "f32")
    assert field(reader, "tokenizer.ggml.eos_token_id") == 299
    assert field(reader, "tokenizer.ggml.token_type")[299] == 5
    (theirs,) = [each.data for each in reader.tensors if each.name == "token_embd.weight"]
    assert theirs.shape == (300, 32)
    assert (theirs[:rows] == wte.numpy()).all()
    if rows == 299:
        np.testing.assert_allclose(theirs[299], wte.mean(dim=0), rtol=1e-6)


# ---------------------------------------------------------------------------------------------------------------------
# Characters and bytes: llama.cpp's rwkv tokenizer.


def bytes_of(text: str) -> bytes:
    """An independent statement of llama_unescape_rwkv_token."""
    return re.sub(rb"\\x(..)", lambda found: bytes([int(found[1], 16)]), text.encode("latin-1"), flags=re.DOTALL)


@pytest.mark.parametrize(("kind", "spare"), [("char", 0), ("char", 100), ("byte", 0), ("byte", 100)])
def test_characters_and_bytes(tmp_path, kind, spare):
    torch.manual_seed(1)
    one = model_of(kind)
    known = build_tokenizer(one)
    rows = known.vocab_size + spare
    wte = torch.cat([one.model_state["wte.weight"], torch.zeros(spare, 8)])
    settings = one.model_settings | {"vocab_size": rows}
    one = dataclasses.replace(one, model_settings=settings, model_state=one.model_state | {"wte.weight": wte})
    reader = opened(tmp_path, one, "f32")
    assert field(reader, "tokenizer.ggml.model") == "rwkv"
    texts = [bytes_of(text) for text in field(reader, "tokenizer.ggml.tokens")]
    assert texts[: known.vocab_size] == [known.decode_bytes([i]) for i in range(known.vocab_size)]
    assert len(texts) == len({*texts})
    beginnings = {text[:length] for text in texts for length in range(1, len(text))}
    assert beginnings <= {*texts}  # else llama.cpp would never end on a character that the model lacks
    added = 9 if kind == "char" else 0  # of é ñ “ ” … 日 本 😀: C3, E2, E2 80, E6, E6 97, E6 9C, F0, F0 9F, F0 9F 98
    assert len(texts) == max(rows, known.vocab_size + added), sorted(beginnings - {*texts[: known.vocab_size]})
    assert not {"tokenizer.ggml.eos_token_id", "tokenizer.ggml.bos_token_id"} & reader.fields.keys()
    assert field(reader, "tokenizer.ggml.token_type") == [1] * known.vocab_size + [5] * (len(texts) - known.vocab_size)
    for unused in texts[known.vocab_size :]:  # in no text of UTF-8, whole or from a character's start
        with pytest.raises(UnicodeDecodeError):
            unused.decode()


@pytest.mark.parametrize(
    ("kind", "data", "own", "expected"),
    [
        ("bpe", {}, None, None),
        ("bpe", {"template": None}, None, plain_jinja("<|endoftext|>")),
        ("bpe", {"template": None}, "of the tokenizer", plain_jinja("<|endoftext|>")),
        ("bpe", {"template": "trained on"}, "of the tokenizer", "trained on"),
        ("bpe", {}, "of the tokenizer", "of the tokenizer"),
        ("char", {"template": None}, None, None),  # it has no token that ends a turn
    ],
)
def test_the_chat_template_is_that_of_the_conversations(tmp_path, kind, data, own, expected):
    torch.manual_seed(1)
    one = model_of(kind)
    tokenizer = one.tokenizer | ({"chat_template": own} if own else {})
    one = dataclasses.replace(one, tokenizer=tokenizer, data=one.data | data)
    reader = opened(tmp_path, one, "f32")
    name = "tokenizer.chat_template"
    assert (field(reader, name) if name in reader.fields else None) == expected
