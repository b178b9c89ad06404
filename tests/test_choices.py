"""milepost/evaluate/choices.py: three published formats become one, and other rows are refused with their line."""

import gzip
import json

import pytest
from drive import ROOT

from milepost.evaluate.choices import Item, read_benchmark
from milepost.text.errors import DataError

FILES = ROOT / "tests" / "fixtures" / "benchmarks"
PAIR = {"sentence_good": "She sings.", "sentence_bad": "She sing."}
ENDINGS = {"ctx": "The man", "endings": ["sits.", "flows."], "label": 1}
STORY = {f"input_sentence_{n}": f"Sentence {n}." for n in (1, 2, 3, 4)} | {
    "sentence_quiz1": "It ends.",
    "sentence_quiz2": "It swims.",
    "answer_right_ending": 1,
}


def written(folder, *rows, name="items.jsonl"):
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def refused(path):
    with pytest.raises(DataError) as caught:
        read_benchmark(path)
    assert "\n" not in str(caught.value)
    return str(caught.value).replace(str(path), "FILE")


def test_minimal_pairs():
    found = read_benchmark(FILES / "pairs.jsonl")
    assert (found.name, found.format, len(found.items)) == ("pairs", "blimp", 4)
    assert found.items[1] == Item(
        "", ("These letters were never answered.", "These letters was never answered."), answer=0
    )


def test_hellaswag_items_are_those_of_the_harness():
    first, second, third = read_benchmark(FILES / "endings.jsonl").items
    assert first.context == "Mending a fence: A woman carries a board to the fence. She"
    assert first.choices[:2] == ("nails it to the two posts.", "pours it into a cup of tea.")
    assert (first.answer, second.answer, third.answer) == (0, 1, 0)
    # [header] and [step] go, " [title]" becomes a full stop, and of the double spaces that they leave each pair one.
    assert second.context == "Home and Garden: How to write a letter. Begin with a greeting. Say who it is for."
    assert second.choices[0] == " Feed the letter twice a day."
    assert third == Item(
        "The kettle whistles, so the man", ("takes it off the stove.", "plants it beside the door."), 0
    )


def test_story_cloze_as_csv_and_as_jsonl():
    first, second = read_benchmark(FILES / "stories.csv").items
    assert first.context.endswith("She wrote him a short, friendly note. He blushed when he read it.")
    assert first.context.startswith("Ann lent her ladder to a neighbour. Weeks")
    assert (first.answer, second.answer) == (0, 1)
    assert second.choices[1] == "She gave him four eggs."
    (third,) = read_benchmark(FILES / "stories.jsonl").items
    assert third.choices == ("She called a roofer in the morning.", "She invited the rain to dinner.")
    assert third.answer == 0


def test_a_compressed_file_with_a_byte_order_mark_and_empty_lines(tmp_path):
    path = tmp_path / "some.pairs.JSONL.gz"
    path.write_bytes(gzip.compress(b"\xef\xbb\xbf\n" + json.dumps(PAIR).encode() + b"\r\n\n"))
    found = read_benchmark(path)
    assert (found.name, [item.choices for item in found.items]) == ("some", [("She sings.", "She sing.")])


def test_the_alphabet_has_every_character_and_the_space_between():
    found = read_benchmark(FILES / "stories.csv")
    texts = [text for item in found.items for text in (item.context, *item.choices)]
    assert set(found.alphabet) == set("".join(texts)) | {" "}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([PAIR, {"text": "no item"}], "FILE line 2 has text, which is no known format: hellaswag has endings, label"),
        ([PAIR, ENDINGS], "FILE line 2 is of format hellaswag, the lines before are not"),
        ([PAIR, ["a", "list"]], "FILE line 2: expected an object, found a list"),
        ([PAIR | {"sentence_bad": None}], "FILE line 1: sentence_bad is None: expected text"),
        ([PAIR | {"sentence_good": " "}], "FILE line 1: sentence_good is ' ': expected text"),
        ([PAIR | {"sentence_good": "\ud800"}], "expected text"),
        ([ENDINGS | {"label": 2}], "FILE line 1: label is 2: expected 0 to 1"),
        ([ENDINGS | {"label": ""}], "label is '': expected 0 to 1 (a test split may come without answers)"),
        ([ENDINGS | {"label": True}], "label is True"),
        ([ENDINGS | {"label": -1}], "label is -1"),
        ([ENDINGS | {"endings": ["one"]}], "expected a list of 2 to 10 texts"),
        ([ENDINGS | {"endings": "ab"}], "endings is 'ab'"),
        ([ENDINGS | {"endings": ["a", 7]}], "ending is 7: expected text"),
        ([ENDINGS | {"endings": ["a", "[title]"]}], "FILE line 1: ending is '[title]': nothing of it is left"),
        ([ENDINGS | {"endings": ["[step] [substeps]", "a"]}], "FILE line 1: ending is '[step] [substeps]'"),
        ([ENDINGS, ENDINGS | {"ctx": "[header]"}], "FILE line 2: ctx is '[header]': nothing of it is left"),
        ([{"endings": ["a", "b"], "label": 0}], "FILE line 1 has no ctx"),
        ([STORY | {"answer_right_ending": 0}], "AnswerRightEnding is 0: expected 1 to 2"),
        ([{n: v for n, v in STORY.items() if "quiz2" not in n}], "FILE line 1 has no endings: expected"),
        ([], "FILE holds no item"),
    ],
)
def test_invalid_rows_are_refused(tmp_path, rows, message):
    assert message in refused(written(tmp_path, *rows))


def test_a_sentence_that_is_cut_at_a_comma_is_refused(tmp_path):
    path = tmp_path / "pairs.csv"
    path.write_text(
        'sentence_good,sentence_bad\nHe sings.,He sing.\nYes, he sings.,"Yes, he sing."\n', encoding="utf-8"
    )
    assert refused(path).startswith("FILE line 3: the row has 3 columns, the first line names 2: put quotes")
    path.write_text("sentence_good;sentence_bad\nYes, he sings.;Yes, he sing.\n", encoding="utf-8")
    assert read_benchmark(path).items == (Item("", ("Yes, he sings.", "Yes, he sing."), answer=0),)


def test_a_key_that_is_there_twice_is_refused(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text('{"sentence_good": "a", "sentence_good": "b", "sentence_bad": "c"}\n', encoding="utf-8")
    assert refused(path).startswith("FILE line 1: the key 'sentence_good' is there twice")


def test_broken_files_are_refused_with_their_line(tmp_path):
    path = written(tmp_path, PAIR)
    path.write_text(path.read_text() + '{"sentence_good": "cut', encoding="utf-8")
    assert "FILE line 2 is not valid JSON" in refused(path)
    path.write_text("[" * 100_000, encoding="utf-8")
    assert "FILE line 1 is not valid JSON" in refused(path)
    path.write_bytes(b'{"sentence_good": "\xff"}\n')
    assert "not valid UTF-8" in refused(path)
    lines = (FILES / "stories.csv").read_text(encoding="utf-8").splitlines()
    short = tmp_path / "short.csv"
    short.write_text("\n".join([lines[0], lines[1], "a2,Tom"]), encoding="utf-8")
    assert refused(short) == "FILE line 3: the row ends before the column 'InputSentence2'"
    short.write_text('InputSentence1\n"never closed', encoding="utf-8")
    assert "is not valid CSV" in refused(short)
    assert "benchmarks are read from .jsonl and .csv" in refused(ROOT / "data" / "dear_wren.md")
