"""Text as people have it: line ends and marks, characters that a vocabulary lacks, formats and folders, at training and at resume."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from drive import at_step, logged, newest, small_text, tensor_bytes, train
from script import call, script

from milepost import ckpt
from milepost.ckpt.restore import build_tokenizer
from milepost.run import text as text_module
from milepost.text.known import Known, has_carriage_returns, known_text
from milepost.text.tokenization import ByteTokenizer, CharTokenizer, UnknownCharacters
from milepost.text.unknown import lenient, occurrences, unknown_characters

FAST = {"SAMPLE_INTERVAL": "0", "EVAL_STEPS": "1", "DROPOUT": "0"}
PLAIN_END = 4  # the step of the checkpoints that are resumed


def letters(
    folder: Path, *, end: str = "\n", mark: str = "", name: str = "letters.txt", characters: int = 3000
) -> Path:
    """The beginning of the bundled text with other line ends, which is what `train` reads in a folder."""
    folder.mkdir(exist_ok=True)
    path = small_text(folder, characters=characters, name=name)
    text = path.read_text(encoding="utf-8")
    path.write_bytes((mark + text.replace("\n", end)).encode())
    return path


def verbatim_before(patch: pytest.MonkeyPatch) -> None:
    """Read text as it is and record no form, as the first version did."""
    plain = text_module.scan_source

    def scan_text(settings, log, known=None):
        return plain(settings.training_data_source, log, known=Known(carriage_returns=True))

    patch.setattr(text_module, "scan_text", scan_text)


def resumable_copy(folder: Path, to: Path) -> Path:
    """The checkpoint at PLAIN_END alone, in a folder of its own; the text is the caller's."""
    (to / "checkpoints").mkdir(parents=True)
    shutil.copy(at_step(folder, PLAIN_END), to / "checkpoints")
    return to


def resume(folder: Path, **changes: str) -> str:
    code, said = train(folder, RESUME="auto", **FAST, **changes)
    assert code == 0, said
    return said


# Line ends and marks


@pytest.mark.parametrize("tokenizer", ["char", "byte", "bpe"])
def test_line_ends_and_a_mark_do_not_change_the_training(tokenizer, tmp_path):
    ends = {"lf": ("\n", ""), "crlf": ("\r\n", "\ufeff"), "cr": ("\r", "")}
    for name, (end, mark) in ends.items():
        letters(tmp_path / name, end=end, mark=mark)
        assert train(tmp_path / name, TOKENIZER=tokenizer, BPE_VOCAB_SIZE="300", **FAST)[0] == 0
    records = {name: newest(tmp_path / name) for name in ends}
    assert tensor_bytes(records["crlf"]) == tensor_bytes(records["cr"]) == tensor_bytes(records["lf"])
    assert records["crlf"].data == records["lf"].data | {"source": records["crlf"].data["source"]}
    assert records["lf"].data["text_form"] == "normalized"
    assert "\r" not in (records["crlf"].tokenizer or {}).get("chars", ())


@pytest.mark.parametrize("tokenizer", ["char", "byte", "bpe"])
def test_a_checkpoint_trained_on_carriage_returns_resumes_bit_exactly(tokenizer, tmp_path, monkeypatch):
    """Checkpoints of the first version: their text was read as it is."""
    old = tmp_path / "old"
    text, variables = letters(old, end="\r\n", mark="\ufeff"), {"TOKENIZER": tokenizer, "BPE_VOCAB_SIZE": "300"}
    with pytest.MonkeyPatch.context() as patch:
        verbatim_before(patch)
        assert train(old, **variables, **FAST)[0] == 0
    assert newest(old).data.keys() == {"source", "name", "sha256", "characters", "validation_fraction"}
    assert tokenizer != "char" or has_carriage_returns(newest(old).tokenizer)
    resumed = resumable_copy(old, tmp_path / "resumed")
    said = resume(resumed, TRAINING_DATA_SOURCE=str(text), **variables)
    assert "not bit-exact" not in said
    assert tensor_bytes(newest(resumed)) == tensor_bytes(newest(old))
    assert logged(resumed) == [line for line in logged(old) if line[0] > PLAIN_END]
    assert newest(resumed).data == newest(old).data
    assert newest(resumed).run_id == newest(old).run_id
    # The control: normalized, it is another text.
    monkeypatch.setattr(text_module, "known_text", lambda data, tokenizer: Known())
    monkeypatch.setattr("milepost.run.same_text.known_text", lambda data, tokenizer: Known())
    again = resumable_copy(old, tmp_path / "again")
    assert train(again, RESUME="auto", TRAINING_DATA_SOURCE=str(text), **variables, **FAST)[0] == 2


def test_an_old_checkpoint_of_a_text_with_line_feeds_knows_it_with_any_line_ends(tmp_path):
    old = tmp_path / "old"
    letters(old)
    with pytest.MonkeyPatch.context() as patch:
        verbatim_before(patch)
        assert train(old, **FAST)[0] == 0
    for name, end in (("same", "\n"), ("windows", "\r\n")):
        resumed = resumable_copy(old, tmp_path / name)
        letters(resumed, end=end, mark="\ufeff")
        assert "not bit-exact" not in resume(resumed)
        assert tensor_bytes(newest(resumed)) == tensor_bytes(newest(old))


def test_a_text_saved_with_other_line_ends_is_the_same_text(tmp_path):
    first = tmp_path / "first"
    letters(first)
    assert train(first, **FAST)[0] == 0
    resumed = resumable_copy(first, tmp_path / "resumed")
    letters(resumed, end="\r\n")
    assert "not bit-exact" not in resume(resumed)
    assert tensor_bytes(newest(resumed)) == tensor_bytes(newest(first))
    edited = resumable_copy(first, tmp_path / "edited")
    letters(edited, end="\n\n")  # the control: another text
    assert train(edited, RESUME="auto", **FAST)[0] == 2


def test_a_new_text_with_carriage_returns_trains_a_model_that_has_none(tmp_path):
    first = tmp_path / "first"
    letters(first)
    assert train(first, **FAST)[0] == 0
    new = letters(tmp_path / "new", end="\r\n", mark="\ufeff", characters=2500)
    changes = {"CHECKPOINT_PATH": str(at_step(first, 8)), "MODE": "resume", "RESUME_TRAINING_STEPS": "1"}
    said = call(script("load_checkpoint"), first, **changes, TRAINING_DATA_SOURCE=str(new))
    assert said.code == 0, said.err
    assert newest(first).data["characters"] == 2500


def test_what_is_known_of_a_text():
    char = {"kind": "char", "chars": ["\n", "\r", "a"]}
    assert known_text({}, None) == Known()
    assert known_text({"sha256": "ab"}, {"kind": "byte"}) == Known("ab", verbatim=True)
    assert known_text({"sha256": "ab", "text_form": "normalized"}, {"kind": "byte"}) == Known("ab")
    assert known_text({}, char) == Known(carriage_returns=True)


# Prompts


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A finished run with a char vocabulary."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_module, "CACHE_FOLDER", folder / "cache")
        assert train(folder, **FAST)[0] == 0
    return folder


def generated(folder: Path, **changes: str | Path) -> tuple[int, str, str]:
    values = {"CHECKPOINT_PATH": str(newest(folder).path), "MAX_NEW_TOKENS": "4", "TEMPERATURE": "0"}
    return call(script("load_checkpoint"), folder, **values | changes)


def test_a_prompt_file_may_have_any_line_ends_and_a_mark(trained, tmp_path):
    texts = {
        "lf": "Dear Wren,\nI",
        "crlf": "\ufeffDear Wren,\r\nI",
        "cr": "Dear Wren,\rI",
        "wide": "\ufeffDear Wren,\r\nI",
    }
    for name, text in texts.items():
        (tmp_path / name).write_bytes(text.encode("utf-16-le" if name == "wide" else "utf-8"))
    shown = {name: generated(trained, PROMPT_FILE=tmp_path / name) for name in texts}
    assert shown["lf"].code == 0
    assert shown["lf"].out.startswith(texts["lf"])
    assert shown["crlf"].out == shown["cr"].out == shown["wide"].out == shown["lf"].out


def test_a_prompt_keeps_carriage_returns_that_the_vocabulary_has(trained, tmp_path):
    """A model that was trained on them has never seen a line feed alone."""
    record = newest(trained)
    chars = list(record.tokenizer["chars"])
    chars[chars.index("Z") if "Z" in chars else -1] = "\r"
    record.tokenizer, record.tokenizer_sha256 = {"kind": "char", "chars": chars}, None
    ckpt.save(record, tmp_path / "checkpoints")
    said = generated(tmp_path, PROMPT="a\r\nb")
    assert said.code == 0, said.err
    assert said.out.startswith("a\r\nb")


@pytest.mark.parametrize(("mode", "code", "expected"), [("refuse", 2, None), ("skip", 0, "Dear "), ("replace", 0, "Dear ??")])  # fmt: skip
def test_unknown_characters_of_a_prompt(mode, code, expected, trained):
    said = generated(trained, PROMPT="Dear \u65e5\u65e5", UNKNOWN_CHARACTERS=mode)
    assert said.code == code
    assert "U+65E5" in said.err
    if expected is None:
        assert "UNKNOWN_CHARACTERS" in said.err
    else:
        continued = said.out.removeprefix("Dear \u65e5\u65e5")
        assert continued == generated(trained, PROMPT=expected).out.removeprefix(expected)
        assert "PROMPT: 2 characters" in said.err


# Unknown characters of a new text


def with_unknown(folder: Path, text: Path) -> Path:
    path = folder / "diary.txt"
    path.write_text(
        text.read_text(encoding="utf-8")[:2500].replace("a", "\u00df", 7).replace("b", "\u65e5", 2), encoding="utf-8"
    )
    return path


@pytest.mark.parametrize("mode", ["refuse", "skip", "replace"])
def test_unknown_characters_of_a_new_text(mode, trained, tmp_path):
    diary = with_unknown(tmp_path, trained / "letters.txt")
    place = {"CHECKPOINT_DIR": str(tmp_path / "checkpoints"), "TRAINING_DATA_SOURCE": str(diary)}
    changes = {"CHECKPOINT_PATH": str(at_step(trained, 8)), "MODE": "resume", "RESUME_TRAINING_STEPS": "2"}
    said = call(script("load_checkpoint"), trained, **changes, **place, UNKNOWN_CHARACTERS=mode)
    if mode == "refuse":
        assert said.code == 4
        assert "UNKNOWN_CHARACTERS" in said.err
        return
    assert said.code == 0, said.err
    assert "9 characters" in said.err
    assert "(U+00DF) x 7" in said.err
    record = newest(tmp_path)
    assert record.data["unknown_characters"] == mode
    assert record.tokenizer == newest(trained).tokenizer
    # The text whose characters were changed by hand gives the same weights.
    by_hand = tmp_path / "by_hand"
    by_hand.mkdir()
    stand_in = "" if mode == "skip" else "?"
    edited = diary.read_text(encoding="utf-8").replace("\u00df", stand_in).replace("\u65e5", stand_in)
    if mode == "replace":  # skipping moves the place where the validation text begins
        (by_hand / "diary.txt").write_text(edited, encoding="utf-8")
        place = {"CHECKPOINT_DIR": str(by_hand / "checkpoints"), "TRAINING_DATA_SOURCE": str(by_hand / "diary.txt")}
        assert call(script("load_checkpoint"), trained, **changes, **place).code == 0
        assert tensor_bytes(newest(by_hand)) == tensor_bytes(record)


@pytest.mark.parametrize("mode", ["refuse", "skip", "replace"])
def test_the_line_feed_between_documents_may_be_unknown(mode, tmp_path):
    """No document has a line feed, and neither has the vocabulary."""
    flat = small_text(tmp_path, characters=6000).read_text(encoding="utf-8").replace("\n", " ")
    (tmp_path / "flat.txt").write_text(flat[:3000], encoding="utf-8")
    assert train(tmp_path, TRAINING_DATA_SOURCE=str(tmp_path / "flat.txt"), **FAST)[0] == 0
    lines = tmp_path / "lines.jsonl"
    lines.write_text(
        "".join(json.dumps({"text": flat[at : at + 500]}) + "\n" for at in range(0, 2500, 500)), encoding="utf-8"
    )
    source = {"TRAINING_DATA_SOURCE": str(lines), "INIT_FROM": str(newest(tmp_path).path)}
    (tmp_path / "next").mkdir()
    code, said = train(tmp_path / "next", UNKNOWN_CHARACTERS=mode, **source, **FAST)
    if mode == "refuse":
        assert (code, "lines.jsonl: '\\n' (U+000A): not in the vocabulary" in said) == (4, True), said
        assert "set UNKNOWN_CHARACTERS=skip" in said
        return
    assert code == 0, said
    assert f"4 characters that the vocabulary lacks {'skipped' if mode == 'skip' else 'replaced by'}" in said
    assert newest(tmp_path / "next").data["unknown_characters"] == mode


@pytest.mark.parametrize("mode", ["skip", "replace"])
def test_a_run_that_skips_unknown_characters_resumes_bit_exactly(mode, trained, tmp_path):
    diary = with_unknown(tmp_path, trained / "letters.txt")
    first = tmp_path / "first"
    first.mkdir()
    variables = {"INIT_FROM": str(at_step(trained, 8)), "TRAINING_DATA_SOURCE": str(diary)}
    assert train(first, UNKNOWN_CHARACTERS=mode, **variables, **FAST)[0] == 0
    resumed = resumable_copy(first, tmp_path / "resumed")
    assert "not bit-exact" not in resume(resumed, TRAINING_DATA_SOURCE=str(diary))  # the mode comes from the checkpoint
    assert tensor_bytes(newest(resumed)) == tensor_bytes(newest(first))
    assert newest(resumed).run_id == newest(first).run_id
    other = resumable_copy(first, tmp_path / "other")
    said = resume(other, TRAINING_DATA_SOURCE=str(diary), UNKNOWN_CHARACTERS="skip" if mode == "replace" else "replace")
    assert "not bit-exact" in said
    assert newest(other).run_id != newest(first).run_id


@pytest.mark.parametrize("mode", ["skip", "replace"])
def test_a_run_is_evaluated_on_the_characters_that_it_read(mode, trained, tmp_path):
    """The figures are those of the validation text edited by hand."""
    diary = with_unknown(tmp_path, trained / "letters.txt")
    text = "".join(reversed(diary.read_text(encoding="utf-8")))  # they are near its beginning
    diary.write_text(text, encoding="utf-8")
    source = {"INIT_FROM": str(at_step(trained, 8)), "TRAINING_DATA_SOURCE": str(diary)}
    assert train(tmp_path, UNKNOWN_CHARACTERS=mode, **source, **FAST)[0] == 0
    held_out, instead = text[int(len(text) * 0.9) :], "" if mode == "skip" else "?"
    edited = held_out.replace("\u00df", instead).replace("\u65e5", instead)
    assert edited != held_out
    (tmp_path / "edited.txt").write_text(edited, encoding="utf-8")
    place = {"CHECKPOINT_PATH": "latest", "CHECKPOINT_DIR": str(tmp_path / "checkpoints"), "FORMAT": "json"}
    said = call(script("evaluate_checkpoint"), tmp_path, **place)
    assert said.code == 0, said.err
    assert "characters that the vocabulary lacks" in said.err
    found = json.loads(said.out)["checkpoints"][0]["standard"]
    by_hand = call(script("evaluate_checkpoint"), tmp_path, EVAL_DATA=str(tmp_path / "edited.txt"), **place)
    expected = json.loads(by_hand.out)["checkpoints"][0]["standard"]
    assert found["text"].pop("unknown_characters")["\u00df"] == instead
    assert "unknown_characters" not in expected["text"]
    assert (found["bytes"], found["tokens"]) == (expected["bytes"], expected["tokens"]) == (len(edited), len(edited))
    assert found["loss"] == pytest.approx(expected["loss"], abs=1e-6)
    refused = call(script("evaluate_checkpoint"), tmp_path, UNKNOWN_CHARACTERS="refuse", EVAL_DATA=str(diary), **place)
    assert (refused.code, "set UNKNOWN_CHARACTERS=skip or replace" in refused.err) == (4, True), refused.err


def test_conversations_are_evaluated_without_the_characters_of_the_template_that_a_vocabulary_lacks(tmp_path):
    """The characters of <|end|> and User are in no letter."""
    flat = re.sub("[<|>U]", "", small_text(tmp_path, characters=3000).read_text(encoding="utf-8"))
    (tmp_path / "flat.txt").write_text(flat, encoding="utf-8")
    assert train(tmp_path, TRAINING_DATA_SOURCE=str(tmp_path / "flat.txt"), BLOCK_SIZE="64", **FAST)[0] == 0
    talks = tmp_path / "talks.jsonl"
    talks.write_text((json.dumps({"prompt": "who came", "completion": "the lark"}) + "\n") * 9, encoding="utf-8")
    place = {"CHECKPOINT_PATH": "latest", "CHECKPOINT_DIR": str(tmp_path / "checkpoints"), "FORMAT": "json"}
    said = call(script("evaluate_checkpoint"), tmp_path, EVAL_DATA=str(talks), UNKNOWN_CHARACTERS="skip", **place)
    assert said.code == 0, said.err
    assert "'|' (U+007C) x 36" in said.err
    assert json.loads(said.out)["checkpoints"][0]["standard"]["tokens"] == 9 * len("the larkend")


def test_conversations_are_not_learned_without_the_characters_that_mark_turns(tmp_path):
    """Without <|end|> no answer would end, and no question could be asked; other characters may be skipped."""
    flat = re.sub("[<|>U\u00df]", "", small_text(tmp_path, characters=3000).read_text(encoding="utf-8"))
    (tmp_path / "flat.txt").write_text(flat, encoding="utf-8")
    (tmp_path / "marked.txt").write_text(f"{flat}\nUser:\nAssistant:\n<|end|>", encoding="utf-8")
    talks = tmp_path / "talks.jsonl"
    talks.write_text((json.dumps({"prompt": "who came", "completion": "the l\u00dfark"}) + "\n") * 9, encoding="utf-8")
    wanted = {"TRAINING_DATA_SOURCE": str(talks), "UNKNOWN_CHARACTERS": "skip"}
    for name, code in {"flat": 4, "marked": 0}.items():
        place = tmp_path / name
        place.mkdir()
        assert train(place, TRAINING_DATA_SOURCE=str(tmp_path / f"{name}.txt"), BLOCK_SIZE="64", **FAST)[0] == 0
        began = newest(place)
        (place / "next").mkdir()
        found, said = train(place / "next", INIT_FROM=str(began.path), BLOCK_SIZE="64", **wanted, **FAST)
        assert (found, "'|' (U+007C): not in the vocabulary" in said) == (code, code == 4), said
        changes = {"CHECKPOINT_PATH": str(began.path), "MODE": "resume", "RESUME_TRAINING_STEPS": "1"}
        resumed = call(script("load_checkpoint"), place, **changes, **wanted)
        assert (resumed.code, "the plain template marks turns" in resumed.err) == (code, code == 4), resumed.err


def test_the_setting_changes_nothing_where_all_characters_are_known(tmp_path):
    first = tmp_path / "first"
    letters(first)
    assert train(first, **FAST)[0] == 0
    resumed = resumable_copy(first, tmp_path / "resumed")
    letters(resumed)
    assert "not bit-exact" not in resume(resumed, UNKNOWN_CHARACTERS="skip")
    assert newest(resumed).data == newest(first).data | {"source": newest(resumed).data["source"]}


def test_the_letter_that_sentencepiece_lacks_is_refused_or_skipped(tmp_path):
    path = small_text(tmp_path, characters=3000)
    path.write_text(path.read_text(encoding="utf-8") + " a\u2581b", encoding="utf-8")
    changes = {"TOKENIZER": "sentencepiece", "BPE_VOCAB_SIZE": "300", **FAST}
    code, said = train(tmp_path, **changes)
    assert (code, bool(re.search(r"\(U\+2581\): not in the vocabulary of \d+ tokens", said))) == (4, True), said
    code, said = train(tmp_path, UNKNOWN_CHARACTERS="skip", **changes)
    assert code == 0, said
    assert "(U+2581) x 1" in said
    assert "no effect" not in said


def test_a_lenient_tokenizer_leaves_the_rest_as_it_is():
    char = CharTokenizer("ab?")
    assert unknown_characters(char, "abcad") == "cd"
    assert unknown_characters(ByteTokenizer(), "\u65e5") == ""
    assert lenient(char, "cd", "skip")[0].encode("acbd") == char.encode("ab")
    assert lenient(char, "cd", "replace")[0].encode("acbd") == char.encode("a?b?")
    digests = {char.digest, *(lenient(char, "c", mode)[0].digest for mode in ("skip", "replace"))}
    assert len(digests) == 3
    none, done = lenient(CharTokenizer("ab"), "c", "replace")  # nothing can stand in
    assert (none.encode("acb"), done) == ([0, 1], "skipped")
    with pytest.raises(UnknownCharacters):
        lenient(char, "cd", "refuse")
    assert occurrences([("abca", False), ("cd", True)], "cdz") == {"c": 2, "d": 1}


# A word at the first training


def test_a_first_training_with_a_char_vocabulary_names_the_tokenizers_that_take_any_text(tmp_path):
    letters(tmp_path)
    hint = "byte or bpe"
    assert hint in train(tmp_path, TRAINING_STEPS="2", **FAST)[1]
    assert hint not in train(tmp_path, TRAINING_STEPS="2", TOKENIZER="char", **FAST)[1]  # chosen, not guessed
    assert hint not in train(tmp_path, TRAINING_STEPS="2", TOKENIZER="byte", **FAST)[1]
    assert hint not in train(tmp_path, RESUME="auto", **FAST)[1]


# Formats and folders


@pytest.mark.parametrize("kind", ["csv", "jsonl", "json"])
def test_the_text_field_is_taken_from_the_settings_and_from_the_checkpoint(kind, tmp_path):
    text = letters(tmp_path).read_text(encoding="utf-8")
    rows = [{"id": 1, "body": text[:1500]}, {"id": 2, "body": text[1500:]}]
    path = tmp_path / f"letters.{kind}"
    if kind == "csv":
        quoted = "".join(f'{row["id"]};"{row["body"].replace(chr(34), chr(34) * 2)}"\r\n' for row in rows)
        path.write_bytes(b"\xef\xbb\xbfid;body\r\n" + quoted.encode())
    else:
        path.write_text(json.dumps(rows) if kind == "json" else "\n".join(map(json.dumps, rows)), encoding="utf-8")
    first = tmp_path / "first"
    first.mkdir()
    place = {"TRAINING_DATA_SOURCE": str(path)}
    code, said = train(first, **place, **FAST)
    assert code == 4
    assert "body" in said
    code, said = train(first, TEXT_FIELD="body", **place, **FAST)
    assert code == 0, said
    assert ("semicolons" in said) == (kind == "csv")
    assert newest(first).data["characters"] == len(text)
    resumed = resumable_copy(first, tmp_path / "resumed")
    said = resume(resumed, **place)
    assert "not bit-exact" not in said
    assert ("semicolons" in said) == (kind == "csv")
    assert tensor_bytes(newest(resumed)) == tensor_bytes(newest(first))


def test_a_separator_becomes_the_end_of_text_and_resumes_exactly(tmp_path, monkeypatch):
    """Also where the resume does not name it: the checkpoint has it."""
    monkeypatch.setattr(text_module, "CACHE_FOLDER", tmp_path / "cache")
    first, text, ends = tmp_path / "first", letters(tmp_path).read_text(encoding="utf-8"), "<|endoftext|>"
    first.mkdir()
    parts = [text[at : at + 300] for at in range(0, 3000, 300)]
    (tmp_path / "parts.txt").write_text(ends.join(parts) + ends, encoding="utf-8")
    place = {"TRAINING_DATA_SOURCE": str(tmp_path / "parts.txt"), "BPE_VOCAB_SIZE": "300"}
    code, said = train(first, TOKENIZER="bpe", DOCUMENT_SEPARATOR=ends, **place, **FAST)
    assert code == 0, said
    assert "10 documents" in said
    (tokens,) = (np.load(path) for path in (tmp_path / "cache").glob("*/train.npy"))
    tokenizer = build_tokenizer(newest(first))
    whole = tokenizer.decode(tokens)
    assert whole.split(ends) == parts[:9]  # the last is held out
    assert (tokens == tokenizer.end_of_text).sum() == 8
    resumed = resumable_copy(first, tmp_path / "resumed")
    assert "not bit-exact" not in resume(resumed, **place)
    assert tensor_bytes(newest(resumed)) == tensor_bytes(newest(first))
    other = resumable_copy(first, tmp_path / "other")
    assert train(other, RESUME="auto", DOCUMENT_SEPARATOR="<end>", **place, **FAST)[0] == 2


def test_a_separator_with_line_ends_of_windows_is_found_and_shown_in_one_line(tmp_path):
    text = letters(tmp_path).read_text(encoding="utf-8")
    parts = "\r\n---\r\n".join(text[at : at + 300].replace("\n", "\r\n") for at in range(0, 3000, 300))
    (tmp_path / "parts.txt").write_text(parts, encoding="utf-8", newline="")
    changes = {"TRAINING_DATA_SOURCE": str(tmp_path / "parts.txt"), "TOKENIZER": "bpe", "BPE_VOCAB_SIZE": "300"}
    for separator in ("\r\n---\r\n", "\n---\n"):
        code, said = train(tmp_path, DOCUMENT_SEPARATOR=separator, **changes, **FAST)
        assert code == 0, said
        assert "parts.txt: 10 documents with '\\n---\\n' between them\n" in said
    said = train(tmp_path, DOCUMENT_SEPARATOR=r"\n---\n", **changes, **FAST)[1]  # as a shell passes it on
    assert r"DOCUMENT_SEPARATOR=\n---\n separates no documents: each file is one" in said


@pytest.mark.parametrize("tokenizer", ["char", "byte"])
def test_a_separator_is_refused_where_no_token_can_take_its_place(tokenizer, tmp_path):
    letters(tmp_path)
    code, said = train(tmp_path, TOKENIZER=tokenizer, DOCUMENT_SEPARATOR="<|endoftext|>", **FAST)
    assert code == 2
    assert {"DOCUMENT_SEPARATOR=<|endoftext|>", "TOKENIZER=bpe"} <= set(re.split(r"[ :]+", said))


def test_a_separator_of_records_is_told_to_have_no_effect(tmp_path):
    text = letters(tmp_path).read_text(encoding="utf-8")
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": text}) + "\n", encoding="utf-8")
    changes = {"TRAINING_DATA_SOURCE": str(tmp_path / "a.jsonl"), "TOKENIZER": "bpe", "BPE_VOCAB_SIZE": "300"}
    code, said = train(tmp_path, DOCUMENT_SEPARATOR="<end>", **changes, **FAST)
    said = " ".join(said.split())
    assert code == 0, said
    assert f"DOCUMENT_SEPARATOR=<end>: no effect on {tmp_path / 'a.jsonl'}, only in .txt and .md files" in said
    assert "documents with" not in said


@pytest.mark.parametrize(("name", "told"), [("letters.txt", True), ("letters.jsonl", False)])
def test_a_field_of_a_text_without_fields_is_told_to_have_no_effect(name, told, tmp_path):
    text = letters(tmp_path).read_text(encoding="utf-8")
    (tmp_path / "letters.jsonl").write_text(json.dumps({"body": text}) + "\n", encoding="utf-8")
    code, said = train(tmp_path, TEXT_FIELD="body", TRAINING_DATA_SOURCE=str(tmp_path / name), **FAST)
    assert code == 0, said
    said = " ".join(said.split())
    assert (f"TEXT_FIELD=body: no effect on {tmp_path / name}, only in .jsonl, .json, .csv," in said) == told


def test_skipped_files_of_a_folder_are_counted(tmp_path):
    folder = tmp_path / "letters"
    folder.mkdir()
    letters(folder)
    for name in ("a.docx", "b.DOCX", "c.jpg", "README", ".hidden.jpg"):
        (folder / name).write_bytes(b"x")
    for source in (folder, folder / "*"):
        _, said = train(
            tmp_path, TRAINING_DATA_SOURCE=str(source), TRAINING_STEPS="2", ENABLE_CHECKPOINTS="false", **FAST
        )
        (line,) = [line for line in said.splitlines() if "files skipped" in line]
        assert line.endswith("4 files skipped: .docx, .jpg, no suffix")


def test_a_run_on_a_text_whose_line_feeds_the_vocabulary_lacks_draws_its_samples(tmp_path):
    one_line, lines = tmp_path / "one_line.txt", tmp_path / "lines.txt"
    one_line.write_text("abcd efgh ijkl " * 200, encoding="utf-8")
    lines.write_text("!\nabcd \u00dfefgh\n" * 200, encoding="utf-8")
    assert train(tmp_path, TRAINING_DATA_SOURCE=str(one_line), **FAST)[0] == 0
    more = {"MODE": "resume", "RESUME_TRAINING_STEPS": "4", "SAMPLE_INTERVAL": "2", "UNKNOWN_CHARACTERS": "skip"}
    said = call(script("load_checkpoint"), tmp_path, TRAINING_DATA_SOURCE=lines, **more)
    assert said.code == 0, said.err
    drawn = [path.read_text(encoding="utf-8") for path in (tmp_path / "runs").rglob("samples/*.txt")]
    assert any(text.startswith(" ") for text in drawn)


def test_an_old_checkpoint_of_a_folder_reads_the_files_that_it_was_trained_on(tmp_path):
    folder = tmp_path / "letters"
    letters(folder, end="\r\n")
    (folder / "more.json").write_text(json.dumps(["Dear Wren,\n" * 20]))
    old, place = tmp_path / "old", {"TRAINING_DATA_SOURCE": str(folder)}
    old.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        verbatim_before(patch)
        assert train(old, **place, **FAST)[0] == 0
    resumed = resumable_copy(old, tmp_path / "resumed")
    assert "not bit-exact" not in resume(resumed, **place)
    assert tensor_bytes(newest(resumed)) == tensor_bytes(newest(old))
    new = tmp_path / "new"
    new.mkdir()
    assert train(new, **place, **FAST)[0] == 0
    assert newest(new).data["characters"] > newest(old).data["characters"] - 500


def test_evaluating_reads_the_text_as_the_checkpoint_knows_it(tmp_path):
    old = tmp_path / "old"
    letters(old, end="\r\n")
    with pytest.MonkeyPatch.context() as patch:
        verbatim_before(patch)
        assert train(old, **FAST)[0] == 0
    said = call(script("evaluate_checkpoint"), old, CHECKPOINT_PATH=str(newest(old).path))
    assert said.code == 0, said.err
    assert newest(old).data["sha256"][:12] in said.out


UMLAUTS = "Liebes Tagebuch,\r\nschön war es im Café.\r\n" * 80


@pytest.mark.parametrize("name", ["diary.txt", "diary.csv", "diary.jsonl"])
def test_a_text_in_the_code_page_of_windows_is_refused_with_the_letter_that_shows_it(name, tmp_path):
    """It could be any of several code pages, so it is neither assumed nor read with marks in place of its letters."""
    path = tmp_path / name
    path.write_bytes(UMLAUTS.encode("cp1252"))
    code, said = train(tmp_path, TRAINING_DATA_SOURCE=str(path), **FAST)
    assert code == 4
    assert "'ö' in Windows-1252" in said
    assert "save it as UTF-8" in said
    assert not list(tmp_path.glob("checkpoints/*"))


def test_a_prompt_in_the_code_page_of_windows_is_refused_with_the_letter_that_shows_it(trained, tmp_path):
    (tmp_path / "prompt.txt").write_bytes("schön".encode("cp1252"))
    said = call(script("load_checkpoint"), trained, PROMPT_FILE=str(tmp_path / "prompt.txt"))
    assert said.code == 2
    assert "'ö' in Windows-1252" in said.err


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("diary.csv", "date;entry\r\n" + "today;Dear diary\r\n" * 200),
        ("diary.tsv", "date\tentry\n" + "today\tDear diary\n" * 200),
        ("diary.jsonl", '{"date": 1, "entry": "Dear diary"}\n' * 200),
        ("diary.json", json.dumps([{"date": 1, "entry": "Dear diary"}] * 200)),
    ],
)
def test_records_without_the_text_field_name_the_setting_and_the_fields(name, text, tmp_path):
    (tmp_path / name).write_bytes(text.encode())
    changes = FAST | {"TRAINING_DATA_SOURCE": str(tmp_path / name)}
    code, said = train(tmp_path, **changes)
    assert code == 4
    assert "TEXT_FIELD" in said
    assert "entry" in said
    code, said = train(tmp_path, TEXT_FIELD="entry", **changes)  # what it says works
    assert code == 0, said


@pytest.mark.parametrize(
    ("kind", "size", "reason"),
    [
        ("bpe", "5000", "no other pair of tokens occurs twice in the text"),
        ("sentencepiece", "257", "this kind has no fewer"),
    ],
)
def test_a_vocabulary_of_another_size_than_was_set_is_told(tmp_path: Path, kind: str, size: str, reason: str) -> None:
    code, said = train(tmp_path, TOKENIZER=kind, BPE_VOCAB_SIZE=size, **FAST)
    (line,) = (line for line in said.splitlines() if line.startswith(f"BPE_VOCAB_SIZE={size}"))
    tokens = newest(tmp_path).model_settings["vocab_size"]
    assert (code, line.endswith(f": the vocabulary has {tokens} tokens, because {reason}")) == (0, True), line
    assert "the vocabulary has" not in train(tmp_path, TOKENIZER=kind, BPE_VOCAB_SIZE="300", RESUME="never", **FAST)[1]
