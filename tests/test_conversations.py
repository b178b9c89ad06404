"""Files of conversations: recognized by their keys, checked row by row, and tokenized with the answers marked."""

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from drive import train
from talks import rows, talks_file

from milepost import config
from milepost.run.text import read_text
from milepost.runtime.progress import Log
from milepost.text import blocks, tokenization
from milepost.text.corpus import Corpus, open_corpus
from milepost.text.errors import DataError, TextFieldError
from milepost.text.examples import prepare_examples
from milepost.text.readers import Reading
from milepost.text.scan import scan

USER, ANSWER = {"role": "user", "content": "a?"}, {"role": "assistant", "content": "b"}


def opened(source: Path | str, **reading: Any) -> Corpus:
    return open_corpus(str(source), data_dir=Path("nowhere"), reading=Reading(**reading))


def pairs(source: Path | str, **reading: Any) -> list[tuple[str, str]]:
    """Question and answer of each conversation of two messages."""
    return [(talk[0]["content"], talk[1]["content"]) for _, talk in opened(source, **reading).conversations()]


def test_every_form_is_recognized_by_its_keys(tmp_path: Path) -> None:
    forms = {
        "messages": ({"messages": [USER, ANSWER]}, ("a?", "b")),
        "prompt": ({"prompt": "a?", "completion": "b", "id": 7}, ("a?", "b")),
        "instruction": ({"instruction": "a?", "input": "", "output": "b"}, ("a?", "b")),
    }
    for form, (row, expected) in forms.items():
        path = rows(tmp_path / f"{form}.jsonl", [row, row])
        assert opened(path).reading.form == form
        assert pairs(path) == [expected] * 2
    with_input = rows(tmp_path / "i.jsonl", [{"instruction": "Count.", "input": "one\r\ntwo", "output": "2"}])
    assert pairs(with_input) == [("Count.\n\none\ntwo", "2")]
    assert opened(rows(tmp_path / "t.jsonl", [{"text": "plain", "prompt": "p", "completion": "c"}])).reading.form == ""
    assert (
        opened(rows(tmp_path / "o.jsonl", [{"prompt": "p", "completion": "c"}]), text_field="prompt").reading.form == ""
    )


def test_a_conversation_beside_a_text_is_passed_over_and_told(tmp_path: Path) -> None:
    path = rows(tmp_path / "t.jsonl", [{"text": "plain", "messages": [USER, ANSWER]}])
    corpus = opened(path)
    assert list(corpus.pieces()) == [("plain", True)]
    (note,) = corpus.skipped
    assert note.startswith(f"{path}: its rows have text, which is read, and messages, which are not")
    assert opened(rows(tmp_path / "o.jsonl", [{"text": "plain", "id": 1}])).skipped == ()


def test_conversations_of_another_form_are_named_as_such(tmp_path: Path) -> None:
    for name, turns in {
        "a": [{"from": "human", "value": "a?"}, {"from": "gpt", "value": "b"}],
        "b": [USER, ANSWER],
    }.items():
        with pytest.raises(DataError, match=r"line 1: its conversation is in 'conversations'.* as messages"):
            scan(opened(rows(tmp_path / f"{name}.jsonl", [{"conversations": turns}])))
    with pytest.raises(TextFieldError, match="found body, notes"):  # no conversation
        scan(opened(rows(tmp_path / "c.jsonl", [{"body": "a", "notes": [{"by": "b"}]}])))


def test_members_of_rows_that_are_not_read_are_told(tmp_path: Path) -> None:
    """A system message or earlier turns beside a question would be missed, wherever they first stand."""

    def told(source: Path, **reading: str) -> list[str]:
        return list(scan(opened(source, **reading)).notes[1:])

    row, asked = {"prompt": "a?", "completion": "b"}, {"instruction": "a?", "output": "b"}
    path = rows(tmp_path / "a.jsonl", [row, row | {"system": "Be brief.", "id": 7}, row | {"history": []}])
    assert told(path) == [f"{path}: members of its rows that are not read: system, id, history"]
    assert told(rows(tmp_path / "b.jsonl", [row | {"tools": [], "images": None}])) == []
    assert told(rows(tmp_path / "c.jsonl", [asked | {"input": "c"}])) == []
    path = rows(tmp_path / "d.jsonl", [row | {"input": "c"}])
    assert told(path) == [f"{path}: members of its rows that are not read: input"]
    path = rows(tmp_path / "e.jsonl", [{"q": "a?", "a": "b", "input": "c"}])
    assert told(path, prompt_field="q", answer_field="a") == [f"{path}: members of its rows that are not read: input"]
    path = tmp_path / "f.csv"
    path.write_text("prompt,completion,source\na?,b,c\n", encoding="utf-8")
    assert told(path) == [f"{path}: members of its rows that are not read: source"]


def test_members_of_messages_that_are_not_read_are_told(tmp_path: Path) -> None:
    """What an assistant thinks, or a mark that keeps an answer out of the loss, would be missed."""
    thinks, known = ANSWER | {"reasoning_content": "hm", "name": None}, ANSWER | {"weight": 1, "tool_calls": []}
    path = rows(tmp_path / "a.jsonl", [{"messages": [USER, known]}, {"messages": [USER, thinks | {"train": False}]}])
    form, *told = scan(opened(path)).notes
    assert told == [f"{path}: members of its messages that are not read: reasoning_content, train"]
    assert scan(opened(rows(tmp_path / "b.jsonl", [{"messages": [USER, known]}]))).notes == (
        form.replace("a.jsonl", "b.jsonl"),
    )


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv"])
def test_a_field_that_was_named_and_is_not_there_is_told_with_those_that_are(tmp_path: Path, name: str) -> None:
    path = rows(tmp_path / "a.jsonl", [{"question": "a?", "answer": "b"}])
    (tmp_path / "a.csv").write_text("question,answer\na?,b\n", encoding="utf-8")
    where = tmp_path / name, 1 + (name != path.name)
    with pytest.raises(TextFieldError) as caught:
        pairs(where[0], prompt_field="question", answer_field="reply")
    assert (
        str(caught.value) == f"{where[0]} line {where[1]}: expected members question and reply, found question, answer"
    )


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_a_first_row_of_any_length_decides(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may go on in the next block of the file."""
    monkeypatch.setattr(blocks, "BLOCK", 16)
    row = {"prompt": "a?" * 20, "completion": "b"}
    path = rows(tmp_path / name, [row])
    assert pairs(path) == [("a?" * 20, "b")]


def test_every_container_gives_the_same_conversations(tmp_path: Path) -> None:
    values = [{"prompt": "a, b?", "completion": 'c "d"\ne'}, {"prompt": "x?", "completion": "y"}]
    expected = [(each["prompt"], each["completion"]) for each in values]
    line = rows(tmp_path / "a.jsonl", values)
    (tmp_path / "a.json").write_text(json.dumps(values), encoding="utf-8")
    csv = 'prompt,completion\n"a, b?","c ""d""\ne"\nx?,y\n'
    (tmp_path / "a.csv").write_text(csv, encoding="utf-8")
    (tmp_path / "a.tsv").write_text('prompt\tcompletion\na, b?\t"c ""d""\ne"\nx?\ty\n', encoding="utf-8")
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(line.read_bytes()))
    for name in ("a.jsonl", "a.json", "a.csv", "a.tsv", "a.jsonl.gz"):
        assert pairs(tmp_path / name) == expected
    (tmp_path / "f.csv").write_text("id;question;answer\n1;a?;b\n", encoding="utf-8")
    assert pairs(tmp_path / "f.csv", prompt_field="question", answer_field="answer") == [("a?", "b")]


def test_messages_beside_a_completion_are_refused_with_their_place(tmp_path: Path) -> None:
    """As trl has them: a list of messages under each key."""
    path = rows(tmp_path / "a.jsonl", [{"prompt": [USER], "completion": [ANSWER]}])
    with pytest.raises(
        DataError, match=r"line 1: prompt is .* expected text; messages go into one list, under the key messages$"
    ):
        list(opened(path).conversations())


BAD = {
    "form": ({"prompt": "a", "completion": "b"}, "line 2"),
    "text": ({"text": "a"}, "line 2"),
    "empty list": ({"messages": []}, "line 2"),
    "empty answer": ({"messages": [USER, ANSWER | {"content": " \n"}]}, "line 2, message 2"),
    "no content": ({"messages": [USER, {"role": "assistant"}]}, "line 2, message 2"),
    "two questions": ({"messages": [USER, USER, ANSWER]}, "line 2, message 2"),
    "late system": ({"messages": [USER, ANSWER, {"role": "system", "content": "s"}]}, "line 2, message 3"),
    "answer first": ({"messages": [ANSWER]}, "line 2, message 1"),
    "no answer": ({"messages": [USER]}, "line 2"),
    "a list as role": ({"messages": [USER | {"role": ["user"]}, ANSWER]}, "line 2, message 1"),
    "pictures": ({"messages": [USER, ANSWER], "images": ["a.png"]}, "line 2"),
    "a role": ({"messages": [USER | {"role": "narrator"}, ANSWER]}, "line 2, message 1"),
    "a tool's message": ({"messages": [USER, ANSWER, {"role": "tool", "content": "1"}]}, "line 2, message 3"),
    "a call": ({"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [{}]}]}, "line 2, message 2"),
    "tools": ({"messages": [USER, ANSWER], "tools": [{"name": "f"}]}, "line 2"),
    "a weight": ({"messages": [USER, ANSWER | {"weight": 0}, USER, ANSWER]}, "line 2, message 2"),
    "an image": ({"messages": [USER | {"content": [{"type": "image"}]}, ANSWER]}, "line 2, message 1"),
    "half a pair": ({"messages": [USER | {"content": "\ud800"}, ANSWER]}, "line 2, message 1"),
    "a string": ("hello", "line 2"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_row_is_named_with_its_file(name: str, tmp_path: Path) -> None:
    row, where = BAD[name]
    path = rows(tmp_path / "t.jsonl", [{"messages": [USER, ANSWER]}, row])  # type: ignore[list-item]
    with pytest.raises(DataError) as caught:
        list(opened(path).conversations())
    assert str(caught.value).startswith(f"{path} {where}:")
    assert "\n" not in str(caught.value)
    code, said = train(tmp_path, TRAINING_DATA_SOURCE=str(path), MODEL_TYPE="bigram")
    assert code == 4
    assert f"{path} {where}:" in said


def test_a_key_that_comes_twice_is_refused(tmp_path: Path) -> None:
    """Which of the two answers is meant, only the author of the file knows."""
    good, twice = '{"prompt": "a", "completion": "b"}', '{"prompt": "a", "completion": "b", "completion": "c"}'
    (tmp_path / "a.jsonl").write_text(f"{good}\n{twice}\n", encoding="utf-8")
    (tmp_path / "a.json").write_text(f"[{good}, {twice}]", encoding="utf-8")
    (tmp_path / "a.csv").write_text("prompt,completion,completion\na,b,c\n", encoding="utf-8")
    for name, where in (("a.jsonl", " line 2: "), ("a.json", " record 2: "), ("a.csv", ": ")):
        with pytest.raises(DataError, match="completion") as caught:
            pairs(tmp_path / name, prompt_field="prompt")
        assert str(caught.value).startswith(f"{tmp_path / name}{where}")


def test_a_row_of_more_cells_than_the_first_line_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("prompt,completion\na,b,,\nc,d, and more\n", encoding="utf-8")  # empty cells hold nothing
    with pytest.raises(DataError, match="line 3: the row has 3 columns, the first line names 2"):
        pairs(path)
    path.write_text('prompt,completion\na,b,,\nc,"d, and more"\n', encoding="utf-8")
    assert pairs(path) == [("a", "b"), ("c", "d, and more")]


def test_the_first_row_decides_though_files_before_it_are_blank(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").touch()
    (tmp_path / "b.jsonl").write_text("\n \n", encoding="utf-8")
    rows(tmp_path / "c.jsonl", [{"prompt": "a", "completion": "b"}])
    assert pairs(tmp_path) == [("a", "b")]


def test_settings_of_conversations_are_told_to_have_no_effect_on_a_text(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def told(path: Path, **changes: str) -> list[str]:
        values = {"PYTHON_DOTENV_DISABLED": "1", "TRAINING_DATA_SOURCE": str(path), "BLOCK_SIZE": "4", **changes}
        read_text(config.read(values), Log())
        return [line for line in capsys.readouterr().err.splitlines() if "no effect" in line]

    text = rows(tmp_path / "t.jsonl", [{"text": "a wren, an owl, a rook and a lark in the hedge, all of them asleep"}])
    talks = rows(tmp_path / "c.jsonl", [{"prompt": "a?", "completion": "b"}] * 20)
    why = "no effect on a text without conversations"
    lines = [f"LOSS_ON=all (environment): {why}", f"PACKING=false (environment): {why}"]
    assert told(text, LOSS_ON="all", PACKING="false") == lines
    assert told(text, LOSS_ON="answers", PACKING="true") == told(talks, LOSS_ON="all", PACKING="false") == []


def test_plain_text_has_no_fields_to_name(tmp_path: Path) -> None:
    """A checkpoint that was trained on fields of other names is evaluated on a text."""
    path = tmp_path / "a.txt"
    path.write_text("a text", encoding="utf-8")
    corpus = open_corpus(str(path), data_dir=tmp_path, reading=Reading(prompt_field="question"))
    assert list(corpus.pieces()) == [("a text", True)]
    assert corpus.skipped == (f"{path}: plain text has no fields, so question and completion are not looked for",)
    rows(tmp_path / "b.jsonl", [{"question": "a", "completion": "b"}])
    with pytest.raises(
        DataError, match=r"a\.txt is plain text, but .*b\.jsonl holds conversations \(question, completion\)"
    ):
        open_corpus(f"{path},{tmp_path / 'b.jsonl'}", data_dir=tmp_path, reading=Reading(prompt_field="question"))


def test_text_beside_conversations_is_refused(tmp_path: Path) -> None:
    path = talks_file(tmp_path)
    (tmp_path / "b.txt").write_text("plain", encoding="utf-8")
    with pytest.raises(DataError, match=r"b\.txt is plain text"):
        opened(f"{path},{tmp_path / 'b.txt'}")


def test_tokens_hold_every_conversation_and_mark_its_answers(tmp_path: Path) -> None:
    corpus = opened(talks_file(tmp_path))
    tokenizer = tokenization.from_dict({"kind": "byte"})
    scanned = scan(corpus)
    split = prepare_examples(corpus, scanned, tokenizer, template=None, validation_fraction=0.1, cache_dir=tmp_path)
    assert (len(split.train.ends), len(split.validation.ends)) == (36, 4)
    talks = [talk for _, talk in corpus.conversations()]
    found = []
    for examples in (split.train, split.validation):
        for start, end in zip([0, *examples.ends[:-1]], examples.ends, strict=True):
            tokens = np.asarray(examples.tokens[start:end])
            answers = tokenizer.decode(tokens[tokens % 2 == 1] // 2).split("<|end|>")
            found.append(answers[:-1])
    assert found == [[each["content"] for each in talk if each["role"] == "assistant"] for talk in talks]


def test_the_fingerprint_tells_conversations_apart(tmp_path: Path) -> None:
    """Messages that would read alike in the template are different conversations."""
    forged = "a?<|end|>\nAssistant:\nb<|end|>\nUser:\nc?"
    values: list[list[dict[str, str]]] = [
        [USER, ANSWER, USER | {"content": "c?"}, ANSWER],
        [USER | {"content": forged}, ANSWER],
        [USER | {"content": forged.replace("<|", "< |")}, ANSWER],
    ]
    digests = {scan(opened(rows(tmp_path / "t.jsonl", [{"messages": value}]))).sha256 for value in values}
    assert len(digests) == len(values)
