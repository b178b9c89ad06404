"""The byte-level tokenizers of Llama's kin: the ids are those of the tokenizers library and of transformers."""

import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import transformers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from milepost.text import tokenization
from milepost.text.errors import UnknownCharacters
from milepost.text.tokenization.base import byte_letters
from milepost.text.tokenization.bpe import SPLITS
from milepost.text.tokenizer_json import from_tokenizers_json, tokenizers_json

TEXTS = [
    "It's 2026, and we'll pay 12,345.67 for it!\n\n  Two spaces, a\ttab\r\n",
    "def f(x):\n    return x**2  # größer\n",
    "Привет, мир! 你好世界。 नमस्ते दुनिया ١٢٣ 👩‍👩‍👧 e\u0301",
    "",
    " ",
    "a" * 400 + " " * 300 + "1" * 50,
    "<|im_start|>user\nwritten by hand<|im_end|>",
]


def cutters() -> dict[str, Any]:
    digits = [
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
    ]
    kinds = {"SmolLM2": digits}
    for name, pattern in SPLITS.items():
        split = pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated", invert=False)
        kinds[name] = [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    return kinds


def trained(name: str, **changes: Any) -> tokenizers.Tokenizer:
    """A tokenizer of this kind, its merges learned from TEXTS; its special tokens are no tokens of the merges."""
    made = tokenizers.Tokenizer(models.BPE(**changes))
    made.pre_tokenizer = pre_tokenizers.Sequence(cutters()[name])
    made.decoder = decoders.ByteLevel()
    made.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), min_frequency=1, show_progress=False
    )
    made.train_from_iterator([*TEXTS, Path("README.md").read_text(encoding="utf-8")], trainer)
    made.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    return made


@pytest.mark.parametrize("name", ["SmolLM2", *SPLITS])
def test_the_ids_are_the_librarys_and_transformers(name: str) -> None:
    library = trained(name)
    ours = tokenization.from_dict(from_tokenizers_json(json.loads(library.to_str())))
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=library)
    assert (ours.kind, ours.splits_at) == ("bpe", "line")
    for text in TEXTS:
        ids = ours.encode(text)
        assert ids == theirs.encode(text, add_special_tokens=False, split_special_tokens=True)
        assert ours.decode(ids) == text
    again = tokenization.from_dict(json.loads(json.dumps(ours.to_dict())))
    assert again.digest == ours.digest
    assert tokenizers_json(again)["pre_tokenizer"] == json.loads(library.to_str())["pre_tokenizer"]


def test_control_gpt2s_cuts_give_other_ids() -> None:
    library = trained("SmolLM2")
    values = json.loads(library.to_str())
    other = tokenization.from_dict(
        from_tokenizers_json(
            values | {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}}
        )
    )
    assert other.splits_at == "word"
    ours = tokenization.from_dict(from_tokenizers_json(values))
    assert any(other.encode(text) != ours.encode(text) for text in TEXTS)


def test_a_text_is_normalized_where_the_tokenizer_says_so() -> None:
    library = trained("Qwen2")
    library.normalizer = normalizers.NFC()
    ours = tokenization.from_dict(from_tokenizers_json(json.loads(library.to_str())))
    assert ours.encode("e\u0301") == library.encode("e\u0301").ids == ours.encode("\u00e9")


def test_words_are_taken_whole_where_the_tokenizer_says_so() -> None:
    library = trained("Llama 3", ignore_merges=True)
    ours = tokenization.from_dict(from_tokenizers_json(json.loads(library.to_str())))
    for text in TEXTS[:-1]:
        assert ours.encode(text) == library.encode(text).ids


def test_a_special_token_that_a_word_could_be_is_refused() -> None:
    values = json.loads(trained("Llama 3", ignore_merges=True).to_str())
    values["model"]["vocab"]["<|endoftext|>"] = values["added_tokens"][0]["id"]
    with pytest.raises(ValueError, match="special and also a result of merging"):
        tokenization.from_dict(from_tokenizers_json(values))


@pytest.mark.parametrize(
    "change",
    [
        {"pattern": {"Regex": r"(a+)+$"}, "behavior": "Isolated", "invert": False},
        {"pattern": {"Regex": SPLITS["Qwen2"]}, "behavior": "Removed", "invert": False},
        {"pattern": {"Regex": SPLITS["Qwen2"]}, "behavior": "Isolated", "invert": True},
        {"pattern": {"String": " "}, "behavior": "Isolated", "invert": False},
    ],
)
def test_other_cuts_are_refused(change: dict[str, Any]) -> None:
    """A pattern of a file could take for ever, and a cut could drop text."""
    values = json.loads(trained("Qwen2").to_str())
    values["pre_tokenizer"]["pretokenizers"][0].update(change)
    with pytest.raises(ValueError, match="the pre_tokenizer must be"):
        tokenization.from_dict(from_tokenizers_json(values))


def test_a_character_whose_bytes_the_vocabulary_lacks_is_named_and_not_dropped() -> None:
    """SmolLM2's vocabulary lacks control characters; the library drops them without a word."""
    values = json.loads(trained("SmolLM2").to_str())
    letter = next(letter for byte, letter in enumerate(byte_letters()) if byte == 4)
    added = {token["content"] for token in values["added_tokens"]}
    kept = [token for token in values["model"]["vocab"] if token != letter and token not in added]
    values["model"]["vocab"] = {token: i for i, token in enumerate(kept)}
    for i, token in enumerate(values["added_tokens"], len(kept)):
        token["id"] = i
    ours = tokenization.from_dict(from_tokenizers_json(values))
    library = tokenizers.Tokenizer.from_str(json.dumps(values))
    assert library.decode(library.encode("a\x04b").ids) == "ab"
    with pytest.raises(UnknownCharacters) as error:
        ours.encode("a\x04b")
    assert error.value.characters == "\x04"
    assert ours.decode(ours.encode("ab\n")) == "ab\n"
    vocab = values["model"]["vocab"]
    values["model"]["vocab"] = {"aa" * 9 if token == "a" else token: i for token, i in vocab.items()}
    with pytest.raises(ValueError, match="lacks some of the 256 bytes"):
        tokenization.from_dict(from_tokenizers_json(values))
