"""Training on the files of ids that nanoGPT and llm.c write, which are written here as their own scripts do."""

import json
import pickle
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from drive import ROOT, newest, tensor_bytes, train
from exactly import resumes_exactly
from script import call, script

from milepost.run import text as run_text
from milepost.text.corpus import Corpus, open_corpus
from milepost.text.errors import DataError
from milepost.text.prepared import GPT2, LLAMA3, Vocabulary, validation_beside
from milepost.text.scan import cached_scan, scan
from milepost.text.token_files import prepare_ids
from milepost.text.tokenization import CharTokenizer, Gpt2Tokenizer
from milepost.text.tokenization.base import FixedTokenizer
from milepost.text.tokenization.gpt2 import gpt2_encoding

LETTERS = (ROOT / "data" / "dear_wren.md").read_text(encoding="utf-8")
TRAINING, VALIDATION = LETTERS[:6000], LETTERS[6000:8000]
DOCUMENTS = [LETTERS[:3000], "Grüße, ☃ and 𝄞!\n", LETTERS[3000:5000]]
EDGE = 50256


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_text, "CACHE_FOLDER", tmp_path / "cache" / "tokens")


def of_characters(folder: Path) -> Path:
    """Write what nanoGPT's data/shakespeare_char/prepare.py writes."""
    folder.mkdir()
    stoi = write_meta(folder, sorted(set(TRAINING + VALIDATION)))
    for name, text in (("train", TRAINING), ("val", VALIDATION)):
        np.array([stoi[c] for c in text], dtype=np.uint16).tofile(folder / f"{name}.bin")
    return folder / "train.bin"


def write_meta(folder: Path, chars: list[str]) -> dict[str, int]:
    """Write a meta.pkl as nanoGPT does, and return its `stoi`."""
    stoi, itos = {ch: i for i, ch in enumerate(chars)}, dict(enumerate(chars))
    with open(folder / "meta.pkl", "wb") as file:
        pickle.dump({"vocab_size": len(chars), "itos": itos, "stoi": stoi}, file)
    return stoi


def gpt2_ids(documents: list[str], *, before: bool = False) -> list[int]:
    """Return the ids of data/openwebtext/prepare.py, or with `before` those of llm.c's dev/data/fineweb.py."""
    ids = [gpt2_encoding().encode_ordinary(document) for document in documents]
    return [token for each in ids for token in ([EDGE, *each] if before else [*each, EDGE])]


def of_gpt2(path: Path, ids: list[int]) -> Path:
    """Write ids as nanoGPT's data/openwebtext/prepare.py does."""
    array = np.memmap(path, dtype=np.uint16, mode="w+", shape=(len(ids),))
    array[:] = ids
    array.flush()
    return path


def of_llm_c(path: Path, ids: list[int], *, magic: int = 20240520, version: int = 1, dtype: Any = np.uint16) -> Path:
    """Write ids as `write_datafile` of llm.c's dev/data/data_common.py does."""
    header = np.zeros(256, dtype=np.int32)
    header[0], header[1], header[2] = magic, version, len(ids)
    with open(path, "wb") as file:
        file.write(header.tobytes())
        file.write(np.array(ids, dtype=dtype).tobytes())
    return path


def opened(source: object) -> Corpus:
    return open_corpus(str(source), data_dir=Path("nowhere"))


def all_ids(corpus: Corpus) -> list[int]:
    assert corpus.prepared is not None
    return np.concatenate(list(corpus.prepared.ids())).tolist()


def texts(corpus: Corpus) -> list[str]:
    """Return the documents."""
    found = [""]
    for text, ends in corpus.pieces():
        found[-1] += text
        found += [""] * ends
    return found[:-1]


# Characters


def test_characters_train_as_their_text_does(tmp_path: Path) -> None:
    """The weights are those of the same text with the same vocabulary, and the resume is exact."""
    source = of_characters(tmp_path / "data")
    record, said = resumes_exactly(tmp_path, TRAINING_DATA_SOURCE=str(source))
    assert record.tokenizer == {"kind": "char", "chars": sorted(set(TRAINING + VALIDATION))}
    assert record.data["validation_source"] == str(tmp_path / "data" / "val.bin")
    assert "6000 tokens to train on, 2000 to validate on" in said
    assert f"nanoGPT's data: 6,000 ids of the {len(set(TRAINING + VALIDATION))} characters of meta.pkl" in said
    for name, text in (("train.txt", TRAINING), ("val.txt", VALIDATION)):
        (tmp_path / name).write_text(text, encoding="utf-8")
    plain = tmp_path / "plain"
    plain.mkdir()
    code, said = train(
        plain, TRAINING_DATA_SOURCE=str(tmp_path / "train.txt"), VALIDATION_DATA=str(tmp_path / "val.txt")
    )
    assert code == 0, said
    assert tensor_bytes(newest(plain)) == tensor_bytes(record)
    assert newest(plain).validation_loss == record.validation_loss


def test_a_fraction_is_held_out_where_it_is_asked_for(tmp_path: Path) -> None:
    """The held-out part is measured as evaluate_checkpoint.py finds it, and is the text that it says."""
    source = of_characters(tmp_path / "data")
    code, said = train(tmp_path, TRAINING_DATA_SOURCE=str(source), VALIDATION_FRACTION="0.25")
    assert code == 0, said
    assert "4500 tokens to train on, 1500 to validate on" in said
    assert "validation_source" not in newest(tmp_path).data
    (tmp_path / "rest.txt").write_text(TRAINING[4500:], encoding="utf-8")
    assert evaluated(tmp_path) == evaluated(tmp_path, EVAL_DATA=str(tmp_path / "rest.txt"))
    assert evaluated(tmp_path) != evaluated(tmp_path, EVAL_DATA=str(source))


def evaluated(folder: Path, **changes: str) -> dict[str, Any]:
    place = {"CHECKPOINT_DIR": str(folder / "checkpoints"), "CHECKPOINT_PATH": "latest", "FORMAT": "json"}
    done = call(script("evaluate_checkpoint"), folder, **place, **changes)
    assert done.code == 0, done.err
    figures = json.loads(done.out)["checkpoints"][0]["standard"]
    return {name: figures[name] for name in ("loss", "tokens", "bytes")}


def test_other_characters_are_refused_at_a_resume(tmp_path: Path) -> None:
    source = of_characters(tmp_path / "data")
    assert train(tmp_path, TRAINING_DATA_SOURCE=str(source), TRAINING_STEPS="4")[0] == 0
    write_meta(tmp_path / "data", sorted(set(TRAINING + VALIDATION))[::-1])
    code, said = train(tmp_path, TRAINING_DATA_SOURCE=str(source), RESUME="auto")
    assert (code, "characters of meta.pkl" in said) == (4, True)


# GPT-2's tokens


def test_ids_of_gpt2_are_used_as_they_are(tmp_path: Path) -> None:
    ids = gpt2_ids(DOCUMENTS)
    corpus = opened(of_gpt2(tmp_path / "train.bin", ids))
    assert corpus.prepared is not None
    assert corpus.prepared.vocabulary == GPT2
    assert all_ids(corpus) == ids
    assert texts(corpus) == DOCUMENTS
    seen = scan(corpus)
    assert (seen.characters, seen.documents) == (sum(map(len, DOCUMENTS)), len(DOCUMENTS))
    assert set(seen.alphabet) <= set("".join(DOCUMENTS))
    at = int(len(ids) * 0.75)
    split = prepare_ids(corpus, corpus.prepared, seen, validation_fraction=0.25, cache_dir=tmp_path / "cache")
    assert (split.train.tolist(), split.validation.tolist()) == (ids[:at], ids[at:])  # type: ignore[union-attr]


def test_shards_of_llm_c_follow_one_another(tmp_path: Path) -> None:
    ids = gpt2_ids(DOCUMENTS, before=True)
    cut = ids.index(EDGE, 5) - 2  # within a document
    of_llm_c(tmp_path / "wren_train_000001.bin", ids[:cut])
    of_llm_c(tmp_path / "wren_train_000002.bin", ids[cut:])
    of_llm_c(tmp_path / "wren_val_000000.bin", gpt2_ids([VALIDATION], before=True))
    code, said = train(tmp_path, TRAINING_DATA_SOURCE=str(tmp_path / "wren_train_*.bin"), TRAINING_STEPS="2")
    assert code == 0, said
    record = newest(tmp_path)
    assert record.tokenizer == {"kind": "gpt2"}
    assert record.data["validation_source"] == str(tmp_path / "wren_val_*.bin")
    assert f"llm.c's data: {len(ids):,} ids of GPT-2's tokens" in said
    corpus = opened(tmp_path / "wren_train_*.bin")
    assert all_ids(corpus) == ids
    assert texts(corpus) == DOCUMENTS
    whole = of_gpt2(tmp_path / "whole.bin", ids)  # the same ids in one file of nanoGPT are the same data
    assert scan(opened(whole)).sha256 == scan(corpus).sha256 == record.data["sha256"]


def test_a_mixture_with_a_text_takes_the_tokens_of_the_ids(tmp_path: Path) -> None:
    of_gpt2(tmp_path / "train.bin", gpt2_ids(DOCUMENTS))
    (tmp_path / "more.txt").write_text(VALIDATION, encoding="utf-8")
    source = f"{tmp_path / 'train.bin'}*3,{tmp_path / 'more.txt'}*1"
    code, said = train(tmp_path, TRAINING_DATA_SOURCE=source, TRAINING_STEPS="2")
    assert code == 0, said
    assert newest(tmp_path).tokenizer == {"kind": "gpt2"}


def test_a_text_is_no_text_with_the_same_ids(tmp_path: Path) -> None:
    """A text and ids that spell it out are two fingerprints: their tokens may differ."""
    source = of_characters(tmp_path / "data")
    (tmp_path / "same.txt").write_text(TRAINING, encoding="utf-8")
    assert scan(opened(source)).sha256 != scan(opened(tmp_path / "same.txt")).sha256


@pytest.mark.parametrize(
    ("name", "beside"),
    [
        ("train.bin", "val.bin"),
        ("wren_train.bin", "wren_val.bin"),
        ("wren_train_000001.bin", "wren_val_*.bin"),
        ("wren_train_*.bin", "wren_val_*.bin"),
        ("trained.bin", None),
        ("train.txt", None),
        ("other_train.bin", None),
        ("train.bin*1,b.txt*1", None),
    ],
)
def test_validation_data_beside(tmp_path: Path, name: str, beside: str | None) -> None:
    for each in ("val.bin", "wren_val.bin", "wren_val_000000.bin"):
        (tmp_path / each).touch()
    assert validation_beside(str(tmp_path / name)) == (str(tmp_path / beside) if beside else None)


# Llama 3's tokens


class Toy(FixedTokenizer):
    kind = "toy"

    def __init__(self, size: int, begin: int | None) -> None:
        self.vocab_size, self.begin_of_text = size, begin


def test_ids_of_llama_3_need_its_model(tmp_path: Path) -> None:
    path = of_llm_c(tmp_path / "train.bin", [128000, 9906, 100000], magic=20240801, version=7, dtype=np.uint32)
    corpus = opened(path)
    assert all_ids(corpus) == [128000, 9906, 100000]
    assert scan(corpus).documents == 1
    code, said = train(tmp_path, TRAINING_DATA_SOURCE=str(path))
    assert (code, "INIT_FROM" in said) == (4, True)
    assert LLAMA3.is_of(Toy(128256, 128000))
    assert not any(LLAMA3.is_of(other) for other in (Toy(128256, None), Toy(50257, 128000), Gpt2Tokenizer()))


def test_a_vocabulary_is_known_by_its_tokens() -> None:
    assert GPT2.is_of(Gpt2Tokenizer())
    letters = Vocabulary("letters", 3, chars=("a", "b", "c"))
    assert letters.is_of(CharTokenizer("abc"))
    assert not letters.is_of(CharTokenizer("bac"))
    assert not letters.is_of(CharTokenizer("abcd"))


# What is refused


class Touch:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> Any:
        return open, (self.path, "w")


def test_a_pickle_is_not_run(tmp_path: Path) -> None:
    source, touched = of_characters(tmp_path / "data"), tmp_path / "touched"
    (tmp_path / "data" / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": Touch(touched)}))
    code, said = train(tmp_path, TRAINING_DATA_SOURCE=str(source))
    assert (code, "asks for more than plain values" in said) == (4, True)
    assert not touched.exists()


def words(folder: Path) -> None:
    write_meta(folder, ["the", "lark"])


def of_many(folder: Path) -> None:
    """Ids of a tokenizer that no file names, after more than are read at once."""
    np.array([5] * (1 << 20) + [50257], dtype=np.uint16).tofile(folder / "train.bin")


WRONG = {
    "an odd number of bytes": (lambda folder: (folder / "train.bin").write_bytes(b"abc"), "3 bytes"),
    "nothing": (lambda folder: (folder / "train.bin").write_bytes(b""), "0 bytes"),
    "a truncated file": (lambda folder: cut(of_llm_c(folder / "train.bin", [1, 2, 3])), "3 tokens"),
    "no tokens": (lambda folder: of_llm_c(folder / "train.bin", []), "0 tokens"),
    "another version": (lambda folder: of_llm_c(folder / "train.bin", [1], version=2), "20240520 and 2"),
    "questions of llm.c": (lambda folder: of_llm_c(folder / "train.bin", [1], magic=20240522), "20240522"),
    "weights of llm.c": (lambda folder: of_llm_c(folder / "train.bin", [1], magic=20240326, version=5), "20240326"),
    "an archive": (lambda folder: (folder / "train.bin").write_bytes(b"PK\x03\x04" * 300), "an archive"),
    "an id that is no token": (of_many, "id 50257 at position 1,048,576"),
    "a meta.pkl of words": (words, "single characters"),
    "a damaged meta.pkl": (lambda folder: (folder / "meta.pkl").write_bytes(b"\x80\x04}"), "damaged"),
}  # fmt: skip


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("what", WRONG)
def test_what_is_no_data_is_one_sentence(tmp_path: Path, what: str) -> None:
    write, found = WRONG[what]
    of_gpt2(tmp_path / "train.bin", [1, 2, 3])
    write(tmp_path)
    code, said = train(tmp_path, TRAINING_DATA_SOURCE=str(tmp_path / "train.bin"))
    assert code == 4
    assert found in said
    assert "Traceback" not in said
    assert len([line for line in said.splitlines() if "train.bin" in line or "meta.pkl" in line]) == 1


def test_files_of_two_kinds_are_refused_together(tmp_path: Path) -> None:
    source = of_characters(tmp_path / "data")
    other = of_llm_c(tmp_path / "other.bin", gpt2_ids(DOCUMENTS))
    (tmp_path / "text.txt").write_text("text", encoding="utf-8")
    for pair in (f"{source},{other}", f"{source},{tmp_path / 'text.txt'}"):
        with pytest.raises(DataError):
            opened(pair)
    for changes, code in (
        ({"VALIDATION_DATA": str(other)}, 4),
        ({"TRAINING_DATA_SOURCE": f"{source}*1,{other}*1"}, 4),
        ({"TOKENIZER": "bpe"}, 2),
    ):
        assert train(tmp_path, **{"TRAINING_DATA_SOURCE": str(source)} | changes)[0] == code


def test_a_folder_and_an_address_are_not_looked_into(tmp_path: Path) -> None:
    """A folder of nanoGPT has the text too, and a download would leave its meta.pkl behind."""
    of_characters(tmp_path / "data")
    (tmp_path / "data" / "input.txt").write_text(TRAINING, encoding="utf-8")
    corpus = opened(tmp_path / "data")
    assert [path.name for path in corpus.paths] == ["input.txt"]
    with pytest.raises(DataError, match="unsupported file type"):
        opened("https://example.com/train.bin")


def test_a_file_that_changes_is_noticed(tmp_path: Path) -> None:
    path = of_gpt2(tmp_path / "train.bin", [1, 2, 3, 4])
    corpus, cache = opened(path), tmp_path / "cache"
    seen = cached_scan(corpus, cache_dir=cache)
    of_gpt2(path, [1, 2, 3, 5])
    assert corpus.prepared is not None
    with pytest.raises(DataError, match="changed while it was read"):
        prepare_ids(corpus, corpus.prepared, seen, validation_fraction=0.5, cache_dir=cache)
    of_gpt2(path, [1, 2])
    with pytest.raises(DataError, match="became shorter"):
        prepare_ids(corpus, corpus.prepared, seen, validation_fraction=0.5, cache_dir=cache)


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    """A file of 16 MiB is scanned and copied in a third of that; reading it at once takes all of it."""
    path, count = tmp_path / "train.bin", 1 << 23
    (np.arange(count) % 50000).astype(np.uint16).tofile(path)

    def peak(work: Any) -> int:
        tracemalloc.start()
        work()
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    corpus = opened(path)
    assert corpus.prepared is not None

    def whole() -> None:
        seen = scan(corpus)
        prepare_ids(corpus, corpus.prepared, seen, validation_fraction=0.5, cache_dir=tmp_path / "cache")  # type: ignore[arg-type]

    assert peak(lambda: np.fromfile(path, dtype=np.uint16)) >= 2 * count
    assert peak(whole) < 2 * count // 3
