"""scripts/evaluate_checkpoint.py: every figure against transformers or by hand, and errors."""

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from drive import ROOT, at_step, small_text, train
from records import record, save
from script import call, script
from transformers import AutoModelForCausalLM, AutoTokenizer

from milepost import ckpt
from milepost.ckpt.restore import build_model, build_tokenizer, merged, with_base
from milepost.evaluate.answers import Answers, answer, encode, pooled
from milepost.evaluate.choices import Item, read_benchmark
from milepost.evaluate.passages import byte_lengths, measure, opening, per_block
from milepost.evaluate.scoring import log_likelihoods
from milepost.run import text as run_text
from milepost.text import tokenization

evaluator = script("evaluate_checkpoint")
FILES = ROOT / "tests" / "fixtures" / "benchmarks"
WREN = (ROOT / "data" / "dear_wren.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A GPT-2 of 300 BPE tokens, saved at steps 30 and 60, a text of 8000 characters to measure it on,
    and its exports.
    """
    folder = tmp_path_factory.mktemp("evaluated")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_text, "CACHE_FOLDER", folder / "cache")
        code, said = train(
            folder, TOKENIZER="bpe", BPE_VOCAB_SIZE="300", TRAINING_STEPS="60", CHECKPOINT_INTERVAL="30",
            EVAL_INTERVAL="0",
            EVAL_STEPS="0", SAMPLE_INTERVAL="0", LEARNING_RATE="1e-2", DTYPE="float32", DROPOUT="0",
        )  # fmt: skip
    assert code == 0, said
    (folder / "held_out.txt").write_text(WREN[50_000:58_000], encoding="utf-8")
    ckpt.convert(at_step(folder, 60), folder / "exported", layout="huggingface", model_only=True)
    return folder


@pytest.fixture(scope="module")
def theirs(folder):
    """transformers' model and tokenizer from the export of step 60."""
    (home,) = (path for path in (folder / "exported").iterdir() if path.is_dir())
    return AutoModelForCausalLM.from_pretrained(home).eval(), AutoTokenizer.from_pretrained(home)


@torch.no_grad()
def log_probabilities(model, ids):
    """transformers' log-probabilities of all but the first of at most block_size + 1 ids."""
    logits = model(torch.tensor([ids[:-1]])).logits[0].double().log_softmax(-1)
    return [float(row[one]) for row, one in zip(logits, ids[1:], strict=True)]


def evaluate(folder, **changes):
    """The output and the figures of step 60, or of CHECKPOINT_PATH."""
    output = folder / "figures.json"
    output.unlink(missing_ok=True)
    path = changes.pop("CHECKPOINT_PATH", None) or at_step(folder, 60)
    said = call(evaluator, folder, CHECKPOINT_PATH=path, OUTPUT=output, **changes)
    return said, json.loads(output.read_text()) if said.code == 0 else None


# ---------------------------------------------------------------------------------------------------------------------
# standard


@pytest.mark.parametrize("stride", [0, 5])
def test_loss_perplexity_and_bits_per_byte_are_those_of_transformers(folder, theirs, stride):
    said, values = evaluate(folder, EVAL_DATA=folder / "held_out.txt", EVAL_STRIDE=str(stride))
    assert said.code == 0, said.err
    model, tokenizer = theirs
    text = (folder / "held_out.txt").read_text(encoding="utf-8")
    ids = [tokenizer.convert_tokens_to_ids("<|endoftext|>"), *tokenizer(text)["input_ids"]]
    found, read, step = [], 16, stride or 16
    while len(found) < len(ids) - 1:  # as docs/evaluating.md says it
        end = min(len(ids) - 1, len(found) + step if found else read)
        found += log_probabilities(model, ids[max(0, end - read) : end + 1])[len(found) - end :]
    loss, figures = -np.mean(found), values["checkpoints"][0]["standard"]
    assert figures["loss"] == pytest.approx(loss, abs=1e-4)
    assert figures["perplexity"] == pytest.approx(math.exp(loss), rel=1e-4)
    assert figures["bits_per_byte"] == pytest.approx(-sum(found) / math.log(2) / len(text.encode()), abs=1e-4)
    assert (figures["tokens"], figures["bytes"]) == (len(ids) - 1, len(text.encode()))
    assert f"{figures['loss']:.4f}" in said.out


def test_the_stride_gives_more_context_and_changes_the_figure(folder):
    values = [evaluate(folder, EVAL_DATA=folder / "held_out.txt", EVAL_STRIDE=stride)[1] for stride in ("0", "1")]
    apart, close = (one["checkpoints"][0]["standard"] for one in values)
    assert apart["tokens"] == close["tokens"]
    assert abs(apart["loss"] - close["loss"]) > 1e-4


def test_without_eval_data_it_is_the_validation_text(folder):
    said, values = evaluate(folder)
    figures = values["checkpoints"][0]["standard"]
    text = (folder / "letters.txt").read_text(encoding="utf-8")[5400:]
    assert (figures["bytes"], figures["text"]["first_character"]) == (len(text.encode()), 5400)
    (folder / "the_same.txt").write_text(text, encoding="utf-8")
    again = evaluate(folder, EVAL_DATA=folder / "the_same.txt")[1]["checkpoints"][0]["standard"]
    assert again["loss"] == figures["loss"]
    # Training's own validation reads the same tokens in the same windows, but neither the first one nor the rest of a
    # window.
    assert ckpt.load(at_step(folder, 60)).validation_loss == pytest.approx(figures["loss"], abs=0.05)
    assert f"measured on {folder / 'letters.txt'} from character 5,400 on (sha256 " in said.out


def test_dtype_is_float32_unless_set(folder):
    text = folder / "held_out.txt"
    usual, narrow = (evaluate(folder, EVAL_DATA=text, DTYPE=dtype)[1] for dtype in (None, "bfloat16"))
    assert (usual["dtype"], narrow["dtype"]) == ("float32", "bfloat16")
    losses = [one["checkpoints"][0]["standard"]["loss"] for one in (usual, narrow)]
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], abs=0.02)


@pytest.mark.parametrize("batch", ["1", "7", "500"])
def test_the_batch_size_changes_no_figure(folder, batch):
    figures = [
        evaluate(folder, EVAL_DATA=folder / "held_out.txt", BATCH_SIZE=size)[1]["checkpoints"][0]["standard"]["loss"]
        for size in (batch, None)
    ]
    assert figures[0] == pytest.approx(figures[1], abs=1e-6)


def test_the_figures_are_those_of_the_stored_weights_and_repeat(folder):
    path = at_step(folder, 60)
    before = path.read_bytes()
    assert evaluate(folder) == evaluate(folder)
    assert path.read_bytes() == before


def test_a_bigram_of_characters_is_its_table(tmp_path):
    path = save(tmp_path / "checkpoints", 2)
    (tmp_path / "text.txt").write_text("abcabdhg", encoding="utf-8")
    said, values = evaluate(tmp_path, CHECKPOINT_PATH=path, EVAL_DATA=tmp_path / "text.txt")
    assert said.code == 0, said.err
    table = record(2).model_state["token_embedding_table.weight"].double().log_softmax(-1)
    ids = ["abcdefgh".index(one) for one in "abcabdhg"]
    nats = [-float(table[a, b]) for a, b in itertools.pairwise(ids)]  # no line break to begin after: "a" is only read
    figures = values["checkpoints"][0]["standard"]
    assert figures["loss"] == pytest.approx(np.mean(nats), abs=1e-6)
    assert figures["bits_per_byte"] == pytest.approx(np.mean(nats) / math.log(2), abs=1e-6)
    assert (figures["tokens"], figures["bytes"]) == (7, 7)


def test_bits_per_byte_count_every_byte_whatever_the_tokenizer():
    """Uniform models: each token of V costs log2(V) bits, so the figure is known for each tokenizer."""
    texts = ["Grüße,\nWren — 木", "a b"]
    pieces = [(text, True) for text in texts]
    made = (
        tokenization.build(kind, pieces, alphabet="", documents=2, vocab_size=300) for kind in ("sentencepiece", "bpe")
    )
    for tokenizer in (tokenization.CharTokenizer(sorted(set("\n".join(texts)))), tokenization.ByteTokenizer(), *made):
        size = tokenizer.vocab_size
        figures = measure(
            texts,
            tokenizer,
            lambda each, size=size: [np.full(len(ids) - 1, -math.log(size)) for ids in each],
            lambda _: None,
        )
        tokens = sum(len(tokenizer.encode(text)) for text in texts)
        assert figures.bytes == sum(len(text.encode()) for text in texts)
        assert figures.tokens == tokens
        assert figures.perplexity == pytest.approx(size)
        assert figures.bits_per_byte == pytest.approx(tokens * math.log2(size) / figures.bytes)


def test_documents_are_measured_separately(folder):
    lines = [WREN[51_000:51_300].strip(), WREN[52_000:52_017].strip()]
    rows = folder / "documents.jsonl"
    rows.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines), encoding="utf-8")
    both = evaluate(folder, EVAL_DATA=rows)[1]["checkpoints"][0]["standard"]
    nats = 0.0
    for line in lines:
        (folder / "one.txt").write_text(line, encoding="utf-8")
        one = evaluate(folder, EVAL_DATA=folder / "one.txt")[1]["checkpoints"][0]["standard"]
        nats += one["loss"] * one["tokens"]
    assert both["loss"] * both["tokens"] == pytest.approx(nats, abs=1e-4)


def test_byte_lengths_and_blocks():
    tokenizer = tokenization.CharTokenizer("aü木")
    assert byte_lengths(tokenizer.encode_array("a木üa"), tokenizer).tolist() == [1, 3, 2, 1]
    values, lengths = np.array([1.0, 6.0, 2.0, 1.0]), np.array([1, 3, 2, 2])
    # 8 bytes in 2 blocks of 4: the first two tokens, and the rest. In 4 of 2: the 3 bytes of the second are shared 1 to
    # 2.
    assert per_block(values, lengths, 2).tolist() == [7.0, 3.0]
    np.testing.assert_allclose(per_block(values, lengths, 4), [3.0, 4.0, 2.0, 1.0])


# ---------------------------------------------------------------------------------------------------------------------
# benchmark


def choices_of(theirs, item):
    """transformers' log-likelihood of each choice, as lm-evaluation-harness takes it."""
    model, tokenizer = theirs
    sums = []
    for choice in item.choices:
        head = (
            tokenizer(item.context.rstrip())["input_ids"]
            if item.context
            else [tokenizer.convert_tokens_to_ids("<|endoftext|>")]
        )
        whole = (
            tokenizer(f"{item.context} {choice}")["input_ids"]
            if item.context
            else head + tokenizer(choice)["input_ids"]
        )
        count = len(whole) - len(head)
        sums.append(sum(log_probabilities(model, whole[-17:])[-count:]) if count <= 16 else None)
    return sums


def short_items(theirs):
    """Items whose choices fit the model's 16 tokens, in both forms."""
    pairs = [("I am.", "I is."), ("She sings.", "She sing."), ("We two.", "We too are."), ("It was.", "It were.")]
    items = [Item("", pair, 0) for pair in pairs]
    contexts = [
        "Dear Wren,",
        "My sister and I do not speak, and the letters I write to her",
        "He said that it was ",
        "Then",
    ]
    endings = [("I am.", "You were.", "A tea."), ("come back.", "sing."), ("late.", "lately so."), ("we go.", "go we.")]
    return items, [Item(context, ending, 1) for context, ending in zip(contexts, endings, strict=True)]


def test_log_likelihoods_of_choices_are_those_of_transformers(folder, theirs):
    one = ckpt.load(at_step(folder, 60))
    tokenizer, model = build_tokenizer(one), build_model(one, device=torch.device("cpu")).eval()
    for item in [item for items in short_items(theirs) for item in items]:
        encoded = [encode(item, choice, tokenizer, context=16) for choice in item.choices]
        found = log_likelihoods(model, [ids for ids, _ in encoded], batch_size=2)
        ours = [each[-count:].sum() for each, (_, count) in zip(found, encoded, strict=True)]
        assert ours == pytest.approx(choices_of(theirs, item), abs=1e-3)


def test_accuracies_are_those_of_transformers(folder, theirs):
    pairs, endings = short_items(theirs)
    (folder / "p.jsonl").write_text(
        "".join(json.dumps({"sentence_good": i.choices[0], "sentence_bad": i.choices[1]}) + "\n" for i in pairs)
    )
    rows = [{"ctx": i.context, "endings": i.choices, "label": i.answer} for i in endings]
    (folder / "h.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    said, values = evaluate(folder, EVAL_TYPE="benchmark", BENCHMARK_DATA=f"{folder / 'p.jsonl'},{folder / 'h.jsonl'}")
    assert said.code == 0, said.err
    first, second = values["checkpoints"][0]["benchmarks"]
    assert "standard" not in values["checkpoints"][0]
    assert (first["format"], second["format"], first["items"], second["items"]) == ("blimp", "hellaswag", 4, 4)
    right = [int(np.argmax(choices_of(theirs, item)) == item.answer) for item in pairs]
    assert first["accuracy"] == np.mean(right)
    assert "accuracy_by_length" not in first
    asked = read_benchmark(folder / "h.jsonl").items
    sums = [np.array(choices_of(theirs, item)) for item in asked]
    by_length = [each / [len(choice) for choice in item.choices] for each, item in zip(sums, asked, strict=True)]
    assert second["accuracy"] == np.mean([each.argmax() == 1 for each in sums])
    assert second["accuracy_by_length"] == np.mean([each.argmax() == 1 for each in by_length])


def test_encoding_truncates_long_contexts_from_the_left():
    tokenizer = tokenization.ByteTokenizer()
    ids, count = encode(Item("a long context", ("yes", "no"), 0), "yes", tokenizer, context=6)
    assert (tokenizer.decode(ids), count) == ("ext yes", 4)  # 7 ids are 6 predictions
    ids, count = encode(Item("short", ("a long ending", "no"), 0), "a long ending", tokenizer, context=6)
    assert (tokenizer.decode(ids), count) == ("t a long ending", 14)  # read in several windows
    ids, count = encode(Item("", ("a pair", "b"), 0), "a pair", tokenizer, context=64)
    assert (tokenizer.decode(ids), count) == ("\na pair", 6)
    ids, count = encode(Item("ends in space ", ("x", "y"), 0), "x", tokenizer, context=64)
    assert (tokenizer.decode(ids[-count:]), tokenizer.decode(ids)) == ("  x", "ends in space  x")


def test_a_tie_is_wrong(folder):
    (folder / "ties.jsonl").write_text(json.dumps({"sentence_good": "The same.", "sentence_bad": "The same."}))
    _, values = evaluate(folder, EVAL_TYPE="benchmark", BENCHMARK_DATA=folder / "ties.jsonl")
    assert values["checkpoints"][0]["benchmarks"][0]["accuracy"] == 0


def test_length_is_normalised_by_characters():
    """With all bytes equally likely the shorter ending is the likelier.

    Per character it is not: the space before it weighs more.
    """
    benchmark = read_benchmark(FILES / "stories.csv")
    lengths = [tuple(map(len, item.choices)) for item in benchmark.items]
    assert lengths == [(40, 39), (36, 23)]
    uniform = lambda each: [np.full(len(ids) - 1, -math.log(256)) for ids in each]  # noqa: E731
    found = answer(benchmark, tokenization.ByteTokenizer(), uniform, lambda _: None, context=512)
    assert [item.answer for item in benchmark.items] == [0, 1]
    assert found.correct.tolist() == [False, True]
    assert found.correct_by_length.tolist() == [True, False]


def test_files_of_the_same_format_are_also_pooled():
    one, two = (Answers(name, "blimp", np.array(right), None) for name, right in (("a", [True]), ("b", [True, False])))
    story = Answers("c", "storycloze", np.array([True]), np.array([False]))
    (together,) = pooled([one, story, two])
    assert (together.name, together.correct.tolist()) == ("all 2 blimp files", [True, True, False])
    assert pooled([one, story]) == []


def test_openings():
    assert opening(tokenization.CharTokenizer("ab")).tolist() == []
    assert opening(tokenization.CharTokenizer("\nab")).tolist() == [0]
    assert opening(tokenization.Gpt2Tokenizer()).tolist() == [50256]


# ---------------------------------------------------------------------------------------------------------------------
# several


def test_two_checkpoints_side_by_side(folder):
    said, values = evaluate(
        folder, CHECKPOINT_PATH=f"{at_step(folder, 30)},{at_step(folder, 60)}", EVAL_TYPE="both",
        EVAL_DATA=folder / "held_out.txt", BENCHMARK_DATA=FILES / "pairs.jsonl",
    )  # fmt: skip
    assert said.code == 0, said.err
    early, late = values["checkpoints"]
    assert (early["step"], late["step"]) == (30, 60)
    by_bytes, by_items = values["comparisons"]
    assert by_bytes["checkpoint"] == str(at_step(folder, 60))
    assert by_bytes["compared_with"] == str(at_step(folder, 30))
    difference = late["standard"]["bits_per_byte"] - early["standard"]["bits_per_byte"]
    assert by_bytes["difference"] == pytest.approx(difference, abs=1e-9)
    assert difference < -0.01  # thirty more steps help
    assert by_bytes["interval"][0] < difference < by_bytes["interval"][1] < 0
    assert by_bytes["p"] < 0.01
    assert by_bytes["pieces"] == 8000 // 512
    assert by_items["only_it"] - by_items["only_the_other"] == 4 * round(by_items["difference"] * 4) / 4
    assert [line.split("  ")[0] for line in said.out.splitlines() if line.startswith(str(folder))] == [
        *(str(at_step(folder, step)) for step in (30, 60)), *[str(at_step(folder, 60))] * 2
    ]  # fmt: skip


def test_comparisons_name_checkpoints_by_path(folder, monkeypatch):
    monkeypatch.chdir(folder)  # where the shortest names are relative
    said, values = evaluate(folder, CHECKPOINT_PATH="checkpoints", EVAL_DATA=folder / "held_out.txt")
    paths = [one["path"] for one in values["checkpoints"]]
    assert [(row["compared_with"], row["checkpoint"]) for row in values["comparisons"]] == [tuple(paths)]
    assert str(folder) not in said.out.split("\n\n")[-1]


def test_a_folder_is_all_its_checkpoints_and_a_copy_does_not_differ(folder, tmp_path):
    said, values = evaluate(folder, CHECKPOINT_PATH=folder / "checkpoints")
    assert [one["step"] for one in values["checkpoints"]] == [30, 60]
    assert "the text is too short to compare" in said.err
    assert values["comparisons"] == []
    again = ckpt.save(ckpt.load(at_step(folder, 60)), tmp_path, layout="directory")
    _, values = evaluate(folder, CHECKPOINT_PATH=f"{at_step(folder, 60)},{again}", EVAL_DATA=folder / "held_out.txt")
    (same,) = values["comparisons"]
    assert (same["difference"], same["interval"], same["p"]) == (0.0, [0.0, 0.0], 1.0)


def test_different_tokenizers_are_compared_by_bytes(folder, tmp_path):
    """A byte bigram, whose 8000 bytes of text have as many tokens, beside the GPT-2 with its own."""
    (tmp_path / "checkpoints").mkdir()
    table = torch.zeros(256, 256)
    flat = ckpt.Checkpoint(
        model_state={"token_embedding_table.weight": table}, model_type="bigram",
        model_settings={"vocab_size": 256, "block_size": 8}, tokenizer={"kind": "byte"},
    )  # fmt: skip
    path = ckpt.save(flat, tmp_path / "checkpoints")
    said, values = evaluate(folder, CHECKPOINT_PATH=f"{path},{at_step(folder, 60)}", EVAL_DATA=folder / "held_out.txt")
    assert said.code == 0, said.err
    uniform, trained = (one["standard"] for one in values["checkpoints"])
    assert uniform["bits_per_byte"] == pytest.approx(8.0, abs=1e-5)
    assert uniform["bytes"] == trained["bytes"]
    assert uniform["tokens"] > trained["tokens"]
    (row,) = values["comparisons"]
    assert row["difference"] == pytest.approx(trained["bits_per_byte"] - 8, abs=1e-5)


def test_different_texts_are_not_compared(folder, tmp_path):
    small_text(tmp_path, characters=3000)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_text, "CACHE_FOLDER", tmp_path / "cache")
        assert train(tmp_path, MODEL_TYPE="bigram", N_LAYER=None, N_HEAD=None, N_EMBD=None, DROPOUT=None)[0] == 0
    said, values = evaluate(folder, CHECKPOINT_PATH=f"{at_step(folder, 60)},{at_step(tmp_path, 8)}")
    assert said.code == 0, said.err
    assert values["comparisons"] == []
    assert f"{at_step(tmp_path, 8)} was measured on another text" in said.err
    assert said.out.count("measured on ") == 2


def test_adapter_checkpoints_are_measured_with_their_base(folder, tmp_path):
    base = at_step(folder, 60)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_text, "CACHE_FOLDER", folder / "cache")
        code, said = train(
            tmp_path, INIT_FROM=str(base), LORA_RANK="2", LEARNING_RATE="0.05", CHECKPOINT_ADAPTERS_ONLY="true",
            DTYPE="float32",
            N_LAYER=None, N_HEAD=None, N_EMBD=None, BLOCK_SIZE=None,
        )  # fmt: skip
    assert code == 0, said
    path, text = at_step(tmp_path, 8), folder / "held_out.txt"
    moved = base.rename(tmp_path / "moved.pt")  # where it was, it is found
    said = call(evaluator, folder, CHECKPOINT_PATH=path, EVAL_DATA=text)
    assert (said.code, "BASE_CHECKPOINT" in said.err) == (2, True)
    said, values = evaluate(folder, CHECKPOINT_PATH=path, EVAL_DATA=text, BASE_CHECKPOINT=moved)
    moved.rename(base)
    assert said.code == 0, said.err
    whole = ckpt.save(merged(with_base(ckpt.load(path, optimizer=False), ckpt.load(base))), tmp_path)
    losses = [
        one["checkpoints"][0]["standard"]["loss"]
        for one in (values, evaluate(folder, CHECKPOINT_PATH=whole, EVAL_DATA=text)[1])
    ]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert abs(losses[0] - evaluate(folder, EVAL_DATA=text)[1]["checkpoints"][0]["standard"]["loss"]) > 1e-4


# ---------------------------------------------------------------------------------------------------------------------
# Errors


@pytest.mark.parametrize(
    ("changes", "code", "message"),
    [
        ({"EVAL_TYPE": "benchmark"}, 2, "EVAL_TYPE=benchmark needs questions: set BENCHMARK_DATA"),
        ({"EVAL_TYPE": "both"}, 2, "EVAL_TYPE=both needs questions"),
        ({"EVAL_TYPE": "accuracy"}, 2, "expected one of standard, benchmark, both"),
        ({"OUTPUT": "figures.txt"}, 2, "ends in .json"),
        ({"OUTPUT": "/no/such/folder/figures.json"}, 2, "OUTPUT=/no/such/folder/figures.json"),
        ({"OUTPUT": f"{__file__}/figures.json"}, 2, f"OUTPUT={__file__}/figures.json"),
        ({"EVAL_STRIDE": "-1"}, 2, "EVAL_STRIDE='-1'"),
        ({"EVAL_DATA": "/no/such.txt"}, 4, "/no/such.txt does not exist"),
        ({"CHECKPOINT_PATH": "/no/such.pt"}, 3, "Checkpoint not found"),
        ({"DTYPE": "float16"}, 2, "DTYPE=float16 is for cuda and mps"),
        ({"EVAL_TYPE": "benchmark", "BENCHMARK_DATA": str(ROOT / "data" / "dear_wren.md")}, 4, "are read from .jsonl"),
    ],
)
def test_errors(folder, changes, code, message):
    said = call(evaluator, folder, **{"CHECKPOINT_PATH": at_step(folder, 60)} | changes)
    assert (said.code, said.out) == (code, "")
    assert message in said.err
    assert "Traceback" not in said.err


def test_a_checkpoint_is_never_overwritten_by_figures(folder):
    path = at_step(folder, 30)
    before = path.read_bytes()
    assert call(evaluator, folder, CHECKPOINT_PATH=path, OUTPUT=path).code == 2
    assert path.read_bytes() == before


def test_characters_that_a_vocabulary_lacks(tmp_path):
    path = save(tmp_path / "checkpoints", 1)
    (tmp_path / "text.txt").write_text("abcZ", encoding="utf-8")
    said = call(evaluator, tmp_path, CHECKPOINT_PATH=path, EVAL_DATA=tmp_path / "text.txt")
    assert (said.code, said.out) == (4, "")
    assert "'Z'" in said.err
    said = call(evaluator, tmp_path, CHECKPOINT_PATH=path, EVAL_TYPE="benchmark", BENCHMARK_DATA=FILES / "pairs.jsonl")
    assert (said.code, said.out) == (4, "")
    assert "pairs.jsonl" in said.err


def test_a_checkpoint_without_its_text(folder, tmp_path):
    said = call(evaluator, tmp_path, CHECKPOINT_PATH=save(tmp_path / "checkpoints", 1))
    assert (said.code, "does not record its training text: set EVAL_DATA" in said.err) == (4, True)
    changed = ckpt.load(at_step(folder, 60))
    changed.data = changed.data | {"sha256": "0" * 64}
    path = ckpt.save(changed, tmp_path)
    said = call(evaluator, folder, CHECKPOINT_PATH=path)
    assert (said.code, "is not the text that" in said.err) == (4, True)
    changed.data = changed.data | {"validation_fraction": 0.0}
    said = call(evaluator, folder, CHECKPOINT_PATH=ckpt.save(changed, tmp_path))
    assert (said.code, "was trained without validation text: set EVAL_DATA" in said.err) == (4, True)
    moved = Path(folder / "letters.txt").read_text(encoding="utf-8")
    (tmp_path / "moved.txt").write_text(moved, encoding="utf-8")
    assert (
        call(evaluator, folder, CHECKPOINT_PATH=at_step(folder, 60), TRAINING_DATA_SOURCE=tmp_path / "moved.txt").code
        == 0
    )


def test_nan_weights(folder, tmp_path):
    broken = ckpt.load(at_step(folder, 60))
    broken.model_state = broken.model_state | {
        "ln_f.weight": torch.full_like(broken.model_state["ln_f.weight"], math.nan)
    }
    said = call(evaluator, folder, CHECKPOINT_PATH=ckpt.save(broken, tmp_path), EVAL_DATA=folder / "held_out.txt")
    assert (said.code, said.out) == (3, "")
    assert "not finite" in said.err


def test_unused_settings_are_logged(folder):
    said, _ = evaluate(folder, BENCHMARK_DATA=FILES / "pairs.jsonl", EVAL_STRIDE="1000")
    assert "needs EVAL_TYPE=benchmark or both" in said.err
    assert "context of 16 tokens, shorter than the stride of 1000" in said.err
    said, _ = evaluate(folder, EVAL_TYPE="benchmark", BENCHMARK_DATA=FILES / "pairs.jsonl", EVAL_DATA="x.txt")
    assert "needs EVAL_TYPE=standard or both" in said.err
