"""The tokenizer in a GGUF file, in the three forms that llama.cpp shares with ours.

`gpt2` is byte-level BPE that cuts a text as the model does that PRE names. `rwkv` takes the longest token that the text begins with, each token being
any bytes: characters and bytes are that exactly. `llama` is a BPE of characters that joins any two neighbours whose text is a token, the one
with the highest score first, and writes what is left as bytes (the same file, llm_tokenizer_spm). No other form of llama.cpp leaves the end of a text out
(llama.cpp, src/llama-vocab.cpp, llama_vocab::impl::load): where nothing is named it takes token 2 or 11.
"""

import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from milepost.ckpt.exports.common import cannot_represent, elsewhere
from milepost.ckpt.record import Checkpoint, Json
from milepost.ckpt.saved_tokenizer import build_tokenizer, tokenizer_files
from milepost.text.tokenization.base import Tokenizer
from milepost.text.tokenization.bpe import splits_as
from milepost.text.tokenization.library import stated_ids
from milepost.text.tokenization.sentencepiece import BYTES, merge_pairs, pairs_of_tokens

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # llama.cpp's types of tokens
PRE = {"GPT-2": "gpt-2", "SmolLM2": "smollm", "Qwen2": "qwen2", "Llama 3": "llama-bpe"}  # whose cuts: llama.cpp's name
MOST_ENDS = 3  # the ends of a text, of a turn and of a message


@dataclass(frozen=True)
class Tokens:
    """A vocabulary by id. It may have more tokens than the model has rows."""

    model: str  # llama.cpp's name for the form: gpt2, llama or rwkv
    texts: list[str]
    types: list[int]
    merges: list[str]
    ends: tuple[int, ...]  # the ids that end a text
    pre: str = ""  # llama.cpp's name for how a gpt2 cuts a text
    begin: int | None = None  # the id that precedes every text
    scores: tuple[float, ...] = ()  # of a llama: the token that comes about first has the highest
    unknown: int | None = None
    space_before: bool = False  # whether a text begins with a space that it does not have


def tokens_of(record: Checkpoint) -> Tokens:
    """Return the tokenizer with at least a token for each row; raise CheckpointError if llama.cpp has no such."""
    tokenizer, rows = record.tokenizer or {"kind": None}, record.model_settings["vocab_size"]
    if tokenizer["kind"] == "char":
        return _of_bytes([char.encode() for char in tokenizer["chars"]], rows)
    if tokenizer["kind"] == "byte":
        return _of_bytes([bytes([byte]) for byte in range(256)], rows)
    if tokenizer["kind"] in ("bpe", "gpt2"):
        return _of_merges(record, rows)
    if tokenizer["kind"] == "sentencepiece":
        return _of_pieces(record, rows)
    problem = f"its tokenizer is {tokenizer['kind']}, which llama.cpp does not have"
    if tokenizer["kind"] is None:
        problem = "it has no tokenizer, and llama.cpp needs one"
    raise cannot_represent(record, problem, f"{elsewhere(record)}, or train with TOKENIZER=char, byte, bpe or gpt2")


def add_tokens(writer: Any, tokens: Tokens) -> None:
    """Write the tokenizer into the header of a GGUFWriter."""
    writer.add_tokenizer_model(tokens.model)
    writer.add_token_list(tokens.texts)
    writer.add_token_types(tokens.types)
    if tokens.model == "gpt2":
        writer.add_tokenizer_pre(tokens.pre)
        writer.add_token_merges(tokens.merges)
    if tokens.scores:
        writer.add_token_scores(tokens.scores)
    if tokens.unknown is not None:
        writer.add_unk_token_id(tokens.unknown)
    begins = tokens.ends if tokens.begin is None else [tokens.begin]
    for begin in begins[:1]:
        writer.add_bos_token_id(begin)
    roles = (writer.add_eos_token_id, writer.add_eot_token_id, writer.add_eom_token_id)
    for add, end in zip(roles, tokens.ends, strict=False):
        add(end)
    writer.add_add_bos_token(tokens.begin is not None)
    writer.add_add_space_prefix(tokens.space_before)


def _of_merges(record: Checkpoint, rows: int) -> Tokens:
    """Return a byte-level BPE. If it has no end of a text, a row without a token, which never comes, stands for it."""
    spec = tokenizer_files(record)["tokenizer.json"]
    pre = _pre(spec)
    if not pre:
        problem = "its BPE cuts texts in a way that llama.cpp has not, and would read other tokens there"
        raise cannot_represent(record, problem, elsewhere(record))
    added = {token["content"]: token["id"] for token in spec["added_tokens"]}
    special = {token["content"]: token["id"] for token in spec["added_tokens"] if token["special"]}
    ids: dict[str, int] = spec["model"]["vocab"] | added
    texts = sorted(ids, key=ids.__getitem__)
    types = [CONTROL if text in special else USER_DEFINED if text in added else NORMAL for text in texts]
    tokenizer = build_tokenizer(record)
    ends = _ends(record, tokenizer)
    padding = _padding(record, ids, max(rows, len(texts) + (not ends)))
    if not spec["model"]["merges"]:
        raise cannot_represent(record, "its BPE has no merges, and llama.cpp has no such tokenizer", elsewhere(record))
    return Tokens(
        model="gpt2",
        texts=texts + padding,
        types=types + [UNUSED] * len(padding),
        merges=[" ".join(pair) for pair in merge_pairs(spec["model"])],
        ends=ends or (len(texts),),
        pre=pre,
        begin=tokenizer.begin_of_text,
    )


def _padding(record: Checkpoint, ids: Mapping[str, int], rows: int) -> list[str]:
    """Return names for the rows that have no token. Raise CheckpointError if tokens have these names."""
    names = [f"[PAD{row}]" for row in range(len(ids), rows)]
    if taken := set(names) & ids.keys():
        problem = f"its token {min(taken)} has the name that a row without a token gets in llama.cpp"
        raise cannot_represent(record, problem, elsewhere(record))
    return names


def _ends(record: Checkpoint, tokenizer: Tokenizer) -> tuple[int, ...]:
    """Return the ids that end a text. Raise CheckpointError if llama.cpp has no place for all of them."""
    if len(tokenizer.stop_ids) > MOST_ENDS:
        problem = f"{len(tokenizer.stop_ids)} tokens end its texts, and llama.cpp has places for {MOST_ENDS}"
        raise cannot_represent(record, problem, elsewhere(record))
    return tokenizer.stop_ids


def _pre(spec: dict[str, Json]) -> str:
    """Return llama.cpp's name for how the JSON of a BPE cuts a text; "" if it does otherwise than any that is known there.

    It takes words of the vocabulary whole where it cuts as Llama 3, and never writes a text in another form: Qwen2's NFC
    is left out there, as in its own converter.
    """
    cuts = splits_as(spec)
    whole = bool(spec["model"].get("ignore_merges"))  # type: ignore[index, union-attr, call-overload]
    if whole != (cuts == "Llama 3") or (spec.get("normalizer") is not None and cuts != "Qwen2"):
        return ""
    return PRE.get(cuts, "")


def _of_pieces(record: Checkpoint, rows: int) -> Tokens:
    """Return a tokenizer like SentencePiece's. A row without a token, which never comes, stands for the end of a text if it has none.

    Raise CheckpointError unless llama.cpp finds the same tokens in any text.
    """
    spec, tokenizer = tokenizer_files(record)["tokenizer.json"], build_tokenizer(record)
    model: Any = spec["model"]
    if problem := _unlike_llama(spec):
        raise cannot_represent(record, f"llama.cpp would read other tokens in a text: {problem}", elsewhere(record))
    ids, special = stated_ids(spec), {token["content"] for token in spec["added_tokens"]}
    unknown, ends = ids.get(model.get("unk_token")), _ends(record, tokenizer)
    places = {token: place for place, token in enumerate(dict.fromkeys(map("".join, merge_pairs(model))))}
    types = {**dict.fromkeys(special, CONTROL), **dict.fromkeys(BYTES, BYTE)}
    texts = sorted(ids, key=ids.__getitem__)
    padding = _padding(record, ids, max(rows, len(texts) + (not ends)))
    return Tokens(
        model="llama",
        texts=texts + padding,
        types=[UNKNOWN if ids[text] == unknown else types.get(text, NORMAL) for text in texts]
        + [UNUSED] * len(padding),
        merges=[],
        ends=ends or (len(texts),),
        begin=tokenizer.begin_of_text,
        scores=tuple(-float(places.get(text, len(places))) for text in texts + padding),
        unknown=unknown,
        space_before=bool(tokenizer.prefix),
    )


def _unlike_llama(spec: Mapping[str, Any]) -> str:
    """Return in what way llama.cpp would cut a text otherwise than a tokenizer like SentencePiece's; "" if it would not.

    It joins any two pieces whose text is a token, where the file may name only some of them, and knows one order of tokens, not of
    pairs. It puts its space before every text, also one that begins with a space.
    """
    model = spec["model"]
    if model["type"] == "Unigram":
        return "it is a Unigram, which has no bytes there"
    if model.get("ignore_merges"):
        return "it takes words of its vocabulary whole"
    if spec.get("pre_tokenizer") is not None:
        return "it puts no space before a text that begins with one, or after a special token, and llama.cpp does"
    pairs = dict.fromkeys(merge_pairs(model))
    joined = list(map("".join, pairs))
    if len(list(itertools.groupby(joined))) != len({*joined}):
        return "the order of its merges is not an order of tokens"
    if missing := next((pair for pair in pairs_of_tokens(spec) if pair not in pairs), None):
        return f"it does not join {missing[0]!r} and {missing[1]!r}, whose text is a token"
    return ""


def _of_bytes(known: list[bytes], rows: int) -> Tokens:
    """Return tokens of these bytes.

    Every beginning of a token is a token as well: where the text leaves a token half-way, llama.cpp would start again
    with the text's first byte, for ever. So it stops at a character that the model lacks, as we do.
    """
    spare = _spare(known)
    more = list(itertools.islice(spare, max(rows - len(known), len(_beginnings(known)))))
    texts = [_escaped(token) for token in known + more]
    return Tokens("rwkv", texts, [NORMAL] * len(known) + [UNUSED] * len(more), merges=[], ends=())


def _beginnings(known: Iterable[bytes]) -> list[bytes]:
    """Return the proper beginnings of tokens that are not tokens themselves, the shorter ones first."""
    parts = {token[:length] for token in known for length in range(1, len(token))}
    return sorted(parts - {*known}, key=lambda part: (len(part), part))


def _spare(known: list[bytes]) -> Iterator[bytes]:
    """Yield tokens for rows without one: the beginnings of the others, then bytes that are in no UTF-8 text.

    No token comes before its own beginnings.
    """
    yield from _beginnings(known)
    for length in itertools.count(1):
        never = map(bytes, itertools.product(range(0xF8, 0x100), repeat=length))
        yield from (token for token in never if length > 1 or token not in known)


def _escaped(token: bytes) -> str:
    """Return a token as the rwkv form writes it: printable ASCII as it is, any other byte as `\\xff`."""
    return "".join(chr(byte) if 0x20 <= byte < 0x7F and byte != ord("\\") else f"\\x{byte:02x}" for byte in token)
