"""scripts/chat.py, in processes of its own: through a pipe and on a real terminal."""

import json
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

import pages
import programs
import pytest
from drive import ROOT, child_environment, command, environment, train
from script import NOTHING_OF_TRAINING, call, family, script, train_family
from terminal import Terminal
from test_templates import CHATML, bpe

import training
from milepost import ckpt, config
from milepost.generation.conversation import NO_TEMPLATE, answer_stops, continued, fitted, message_ids, turns
from milepost.generation.decoder import Decoder
from milepost.generation.texts import Sampling, steps, texts
from milepost.runtime.progress import Log
from milepost.samples import open_named, sampling
from milepost.text.templates import chat_ids

CHAT = "scripts/chat.py"
HERE = NOTHING_OF_TRAINING | {"MAX_NEW_TOKENS": "12", "SAMPLE_SEED": "7", "TOP_K": "0"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Checkpoints of two runs at steps 2, 4, 5, 6 and 8."""
    return train_family(tmp_path_factory.mktemp("chat"))


LEARNED = {
    "TRAINING_STEPS": "200",
    "LEARNING_RATE": "2e-2",
    "DROPOUT": "0",
    "EVAL_INTERVAL": "0",
    "SAMPLE_INTERVAL": "0",
}


@pytest.fixture(scope="module")
def roomy(tmp_path_factory) -> Path:
    """A checkpoint whose context holds several turns, and which heeds it."""
    folder = tmp_path_factory.mktemp("roomy")
    assert train(folder, **LEARNED, BLOCK_SIZE="64", CHECKPOINT_INTERVAL="0")[0] == 0
    return folder


@pytest.fixture(scope="module")
def narrow(tmp_path_factory) -> Path:
    """A checkpoint with a context of 16 tokens."""
    folder = tmp_path_factory.mktemp("narrow")
    assert train(folder, **LEARNED, BLOCK_SIZE="16", CHECKPOINT_INTERVAL="0")[0] == 0
    return folder


def chatted(folder: Path, text: str, **changes: str):
    return command(CHAT, folder, stdin=text, **HERE | changes)


def generated(folder: Path, prompt: str, **changes: str) -> str:
    """What load_checkpoint.py continues the prompt with."""
    said = call(script("load_checkpoint"), folder, **HERE | {"PROMPT": prompt} | changes)
    assert said.code == 0, said.err
    return said.out.removeprefix(prompt).removesuffix("\n")


# ---------------------------------------------------------------------------------------------------------------------
# A pipe.


def test_a_pipe_gets_an_answer_for_each_line_and_nothing_else(roomy):
    stop = {"STOP": "\\n"}
    done = chatted(roomy, "Dear Wren,\n/reset\nDear Wren,\n/reset\n\n/seed 9\nI am", **stop)
    first, other = generated(roomy, "Dear Wren,", **stop), generated(roomy, "I am", SAMPLE_SEED="9", **stop)
    assert (done.returncode, done.stdout) == (0, f"{first}\n{first}\n\n{other}\n"), done.stderr
    assert first != other


def test_a_conversation_stays_in_the_context(roomy):
    """The second answer continues the first turn, the first answer and the second turn."""
    done = chatted(roomy, "Dear\nWren\n", STOP="\\n", TEMPERATURE="0")
    first, second = done.stdout.splitlines()
    assert second == generated(roomy, f"Dear{first}\nWren", STOP="\\n", TEMPERATURE="0")
    assert second != generated(roomy, "Wren", STOP="\\n", TEMPERATURE="0")  # as it would be without


def test_the_answers_of_a_long_conversation_are_those_of_one_that_is_read_anew(tmp_path):
    """By the fast decoder, which keeps what it has read; another checkpoint answers in between."""
    assert train(tmp_path, **LEARNED | {"TRAINING_STEPS": "3"}, N_EMBD="256", N_LAYER="1", BLOCK_SIZE="256")[0] == 0
    lines = ["Dear Wren, I am the winter of the letters. " * 3, "the wind of the", "so long"]
    done = chatted(tmp_path, "\n/compare latest\n".join(lines) + "\n", STOP="\\n")
    answers = done.stdout.splitlines()
    assert (done.returncode, len(answers)) == (0, 5), done.stderr
    assert answers[0:4:2] == answers[1:4:2]
    settings = config.read(environment(tmp_path, **HERE | {"STOP": "\\n"}), reads=script("chat").READS)
    loaded = open_named("latest", settings, Log())
    assert isinstance(loaded.generator, Decoder)
    text = ""
    for number, (line, answer) in enumerate(zip(lines, answers[::2], strict=True)):
        text += line
        ids = loaded.tokenizer.encode(text)
        how = sampling(settings)
        drawn = texts(loaded.generator, loaded.tokenizer, ids, sampling=how, seed=7, first=number, count=1)
        assert "".join(next(drawn)) == answer
        text += answer + "\n"
    assert len(text) > 150


def test_the_oldest_turns_are_dropped_first_which_is_reported_once(narrow):
    """The context has 16 tokens, of which 8 are left for an answer."""
    done = chatted(narrow, "Dear\nletter\nthe wi\n", STOP="\\n", TEMPERATURE="0")
    assert done.stdout.splitlines()[2] == generated(narrow, "the wi", STOP="\\n", TEMPERATURE="0")
    assert done.stderr.count("oldest turns are dropped") == 1


def test_a_full_context_is_reported_of_the_conversation_and_not_of_another_checkpoint(roomy, narrow):
    """The contexts have 64 and 16 tokens; the conversation fills the first with its third text."""
    (other,) = (narrow / "checkpoints").glob("*.pt")
    asked = f"Dear letter\nWren\n/compare {other}\n{'Dear Wren, ' * 4}\n"
    done = chatted(roomy, asked, STOP="\\n")
    assert done.returncode == 0, done.stderr
    full = [line for line in done.stderr.splitlines() if "oldest turns are dropped" in line]
    assert full == ["the context of 64 tokens is full: from now on the oldest turns are dropped"]


def test_a_character_of_an_earlier_turn_that_a_smaller_vocabulary_lacks(roomy, tmp_path):
    """What is typed now is not at fault, so removing characters from it would not help."""
    (tmp_path / "letters.txt").write_text("dear letter\n" * 300, encoding="utf-8")
    assert train(tmp_path, CHECKPOINT_INTERVAL="0")[0] == 0
    (small,) = (tmp_path / "checkpoints").glob("*.pt")
    asked = f"Wren\n/compare {small}\n/checkpoint {small}\ndear\n/reset\ndear\n"
    done = chatted(roomy, asked, STOP="\\n")
    first, last = (generated(place, text, STOP="\\n") for place, text in ((roomy, "Wren"), (tmp_path, "dear")))
    assert (done.returncode, done.stdout) == (2, f"{first}\n\n{last}\n"), done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 2
    for error in errors:  # of /compare and of the text
        assert error.startswith("error: an earlier turn: ")
        assert "'W'" in error
        assert error.endswith("; /reset begins a new conversation")


def test_a_text_is_compared_with_the_seed_that_was_set_since(roomy):
    done = chatted(roomy, "Dear\n/seed 9\n/compare latest\n/quit now\nDear\n", STOP="\\n")
    first, second = (generated(roomy, "Dear", STOP="\\n", SAMPLE_SEED=seed) for seed in ("7", "9"))
    assert (done.returncode, done.stdout) == (0, f"{first}\n{second}\n"), done.stderr
    assert first != second


def test_several_lines_slashes_and_a_file_without_a_last_line_feed(roomy):
    done = chatted(roomy, '"""\nDear\nWren"""\n/reset\n"""I am"""')
    assert done.stdout == generated(roomy, "Dear\nWren") + "\n" + generated(roomy, "I am") + "\n", done.stderr
    said = chatted(roomy, "//x\n", UNKNOWN_CHARACTERS="skip")
    assert said.returncode == 0
    assert said.stdout == generated(roomy, "/x", UNKNOWN_CHARACTERS="skip") + "\n"


@pytest.mark.parametrize(
    ("line", "code", "answered"),
    [
        ("/temprature 1", 2, False), ("/temperature hot", 2, False), ("/checkpoint nowhere.pt", 3, False),
        ("/adapter", 2, False), ("/adapter latest", 2, False), ("/compare", 2, False), ("/save", 2, False), ("Ж", 2, True),
        ("/save nowhere/said", 2, False), ("/save a\0b", 2, False), ("/checkpoint\ta\0b", 2, False), ("/", 2, False),
    ],
)  # fmt: skip
def test_a_mistake_is_reported_and_the_next_line_is_answered(line, code, answered, roomy):
    """An empty line stands for the answer to a text, so that lines still correspond; a command has no answer."""
    done = chatted(roomy, f"{line}\nDear\n", STOP="\\n")
    assert done.returncode == code
    assert done.stdout == "\n" * answered + generated(roomy, "Dear", STOP="\\n") + "\n"
    assert done.stderr.count("error: ") == 1


def test_a_line_that_is_not_text_is_reported(roomy):
    done = programs.run(
        [sys.executable, CHAT], cwd=ROOT, env=child_environment(roomy, **HERE), input=b"\xff\xfe\xfd\n", check=False,
        capture_output=True,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, b"\n")


def test_settings_and_checkpoints_change_on_the_way(folder):
    paths = family(folder)
    asked = f"/temperature 0\nDear\n/reset\n/checkpoint {paths[2]}\nDear\n/compare {paths[8]}\n/quit\nDear\n"
    done = chatted(folder, asked, CHECKPOINT_PATH=str(paths[8]))
    old, new = (
        generated(folder, "Dear", TEMPERATURE="0", CHECKPOINT_PATH=str(paths[step]), SAMPLE_SEED=None)
        for step in (2, 8)
    )
    assert (done.returncode, done.stdout) == (0, f"{new}\n{old}\n{new}\n"), done.stderr
    assert old != new


def test_the_whole_conversation_is_saved_and_no_file_is_replaced(roomy, tmp_path):
    file, text = tmp_path / "said.json", tmp_path / "said.txt"
    done = chatted(roomy, f"Dear\nWren\n/save {file}\n/save {text}\n/save {file}\n", STOP="\\n")
    first, second = done.stdout.splitlines()
    messages = json.loads(file.read_text(encoding="utf-8"))["messages"]
    assert [each["content"] for each in messages] == ["Dear", first, "Wren", second]
    assert [each["role"] for each in messages] == ["user", "assistant"] * 2
    assert text.read_text(encoding="utf-8") == f"Dear{first}\nWren{second}\n"
    assert done.returncode == 2  # the file exists


def test_a_conversation_that_cannot_be_saved_is_reported_under_the_name_that_was_given(roomy, tmp_path):
    (tmp_path / "link").symlink_to("nowhere")  # a file too: what it points at may come back
    asked = [str(tmp_path / name) for name in ("nowhere/said.txt", "link")] + ["x" * 300]
    done = chatted(roomy, "Dear\n" + "".join(f"/save {name}\n" for name in asked), STOP="\n")
    expected = [
        "cannot be written (No such file or directory)",
        "the file exists",
        "cannot be written (File name too long)",
    ]
    told = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert [line.partition(";")[0] for line in told] == [
        f"error: /save {name}: {what}" for name, what in zip(asked, expected, strict=True)
    ]
    assert done.returncode == 2
    assert os.listdir(tmp_path) == ["link"]


def test_adapters_change_over_the_base_that_is_loaded(roomy, tmp_path):
    (base,) = (roomy / "checkpoints").glob("*.pt")
    adapters = tmp_path / "adapters"
    trained = environment(roomy, INIT_FROM=str(base), LORA_RANK="2", CHECKPOINT_ADAPTERS_ONLY="true", LEARNING_RATE="1",
                          CHECKPOINT_DIR=str(adapters), RUNS_DIR=str(tmp_path / "runs"), CHECKPOINT_INTERVAL="0")  # fmt: skip
    for name in ("MODEL_TYPE", "N_LAYER", "N_HEAD", "N_EMBD", "BLOCK_SIZE"):
        del trained[name]
    assert training.guarded(training.main, config.read(trained), log=Log()) == 0
    (adapted,) = adapters.glob("*.pt")
    with_it, without = generated(roomy, "Dear", CHECKPOINT_PATH=str(adapted)), generated(roomy, "Dear")
    asked = f"Dear\n/reset\n/adapter {adapted}\nDear\n/reset\n/adapter none\nDear\n/adapter {base}\n"
    copy = base.with_name("moved-away.pt")
    asked_without_base = f"/adapter {adapted}\nDear\n"
    done = chatted(roomy, asked, CHECKPOINT_PATH=str(base))
    assert done.stdout == f"{without}\n{with_it}\n{without}\n", done.stderr
    assert with_it != without
    assert done.returncode == 2  # the base has no adapters
    answering = [line for line in done.stderr.splitlines() if line.endswith("SAMPLE_SEED=7")]
    assert [Path(line.partition(": gpt2 at ")[0]).name for line in answering] == [base.name, adapted.name, base.name]
    alone = chatted(roomy, "/adapter none\nDear\n", CHECKPOINT_PATH=str(adapted))
    assert (alone.stdout, alone.stderr.count(", without its adapters, ")) == (f"{without}\n", 1), alone.stderr
    base.rename(copy)  # the base that is loaded is used: nothing looks for the recorded file
    try:
        moved = chatted(roomy, asked_without_base, CHECKPOINT_PATH=str(copy))
    finally:
        copy.rename(base)
    assert moved.stdout == f"{with_it}\n", moved.stderr
    assert "is found in" not in moved.stderr


def test_the_commands_of_the_page_run(roomy):
    written = pages.commands((ROOT / "docs" / "chat.md").read_text(encoding="utf-8"))
    done = [pages.run(line, ROOT, **environment(roomy, **HERE)) for line in written]
    assert [each.returncode for each in done] == [0, 0], done
    assert len(done[1].stdout.splitlines()) == 2


# ---------------------------------------------------------------------------------------------------------------------
# A terminal.


def test_ctrl_c_stops_the_answer_and_not_the_program_and_ctrl_d_ends(roomy, tmp_path):
    caches = tmp_path / "caches"
    endless = {"MAX_NEW_TOKENS": "1000000", "XDG_CACHE_HOME": str(caches)}
    terminal = Terminal(CHAT, roomy, **HERE | endless)
    at = terminal.until("> ")
    # At the prompt. Python sees a signal that comes just before it waits for a key only at the next key, which is the line feed.
    terminal.type("\x03\n")
    at = terminal.until("\n> ", after=at)
    terminal.type("Dear\n")
    at = terminal.until(r"Dear\n(.|\n){300}", after=at)  # it writes without end
    terminal.type("\x03")
    at = terminal.until(r"\n> ", after=at)
    terminal.type("/max_new_tokens 5\n")
    at = terminal.until(r"MAX_NEW_TOKENS=5\n> ", after=at)
    terminal.type("/reset\n")
    at = terminal.until("/reset\n> ", after=at)
    terminal.type("/seed 7\n")
    at = terminal.until("SAMPLE_SEED=7\n> ", after=at)
    terminal.type("Wren\n")
    start, at = at, terminal.until(r"Wren\n(.|\n){6,}> ", after=at)
    assert generated(roomy, "Wren", MAX_NEW_TOKENS="5") in terminal.shown[start:at]
    terminal.type("\x04")
    assert terminal.ended() == 0
    history = caches / "milepost" / "chat_history"
    assert [line for line in history.read_text().splitlines() if line in ("Dear", "Wren")] == ["Dear", "Wren"]
    assert history.stat().st_mode & 0o077 == 0  # only its owner reads it
    assert "\x1b[1m" not in terminal.shown


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGXCPU])
def test_a_signal_to_stop_ends_an_answer_and_the_program_and_keeps_the_history(number, roomy, tmp_path):
    terminal = Terminal(CHAT, roomy, **HERE | {"MAX_NEW_TOKENS": "1000000", "XDG_CACHE_HOME": str(tmp_path)})
    at = terminal.until("> ")
    terminal.type("Dear\n")
    at = terminal.until(r"Dear\n(.|\n){300}", after=at)
    os.kill(terminal.process.pid, number)
    terminal.until(r"\n(interrupted\n|> )", after=at)
    terminal.type("\x04")
    assert terminal.ended() == 130
    assert (tmp_path / "milepost" / "chat_history").read_text().splitlines()[-1] == "Dear"


def test_a_signal_to_stop_ends_the_program_at_the_prompt(roomy, tmp_path):
    terminal = Terminal(CHAT, roomy, **HERE, XDG_CACHE_HOME=str(tmp_path))
    at = terminal.until("> ")
    terminal.type("/top_k\n")
    at = terminal.until(r"TOP_K=0\n> ", after=at)
    os.kill(terminal.process.pid, signal.SIGTERM)
    terminal.type("\x04")  # a signal just before Python waits for a key is seen at the next key, as above
    terminal.until(r"interrupted\n", after=at)
    assert terminal.ended() == 130
    assert (tmp_path / "milepost" / "chat_history").read_text().splitlines()[-1] == "/top_k"


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])  # which of them Python takes depends on the locale
def test_bytes_that_are_no_text_are_reported_on_a_terminal_too(errors, roomy, tmp_path):
    terminal = Terminal(CHAT, roomy, **HERE, XDG_CACHE_HOME=str(tmp_path), PYTHONIOENCODING=f"utf-8:{errors}")
    at = terminal.until("> ")
    os.write(terminal.master, b"\xff\xfe\n")
    at = terminal.until("error: standard input: (.|\n)*> ", after=at)
    terminal.type("/quit\n")
    assert terminal.ended() == 0


def test_a_prompt_has_color_unless_no_color_is_set(roomy, tmp_path):
    terminal = Terminal(CHAT, roomy, **HERE, NO_COLOR="", XDG_CACHE_HOME=str(tmp_path))
    terminal.until(r"\x1b\[1m>")
    terminal.type("/quit\n")
    assert terminal.ended() == 0


def test_help_lists_every_command(roomy, tmp_path):
    terminal = Terminal(CHAT, roomy, **HERE, XDG_CACHE_HOME=str(tmp_path))
    at = terminal.until("> ")
    terminal.type("/help\n")
    terminal.until(r"/quit(.|\n)*> ", after=at)
    terminal.type("\x04")
    assert terminal.ended() == 0
    module = script("chat")
    listed = terminal.shown[at:]
    assert [name for name in [*module.COMMANDS, *module.SETTING_COMMANDS] if name not in listed] == []


# ---------------------------------------------------------------------------------------------------------------------
# Messages.


def said(*texts: str) -> list[dict[str, str]]:
    return [{"role": "assistant" if number % 2 else "user", "content": text} for number, text in enumerate(texts)]


def test_messages_without_a_template_are_one_text():
    assert continued(said("a", "b", "c")) == "ab\nc"
    assert continued(said("a", "b\n", "c", "d")) == "ab\ncd"
    assert continued([]) == ""


def test_what_fits_is_the_longest_end_that_begins_with_the_user():
    messages = said("aa", "bb", "cc", "dd", "ee")
    assert [len(group) for group in turns(messages)] == [2, 2, 1]
    encode = lambda some: list(continued(some).encode())  # noqa: E731
    whole = continued(messages)
    for room in range(1, len(whole) + 1):
        ids, dropped = fitted(messages, encode, room=room)
        assert bytes(ids).decode() == continued(messages[2 * dropped :])
        assert len(ids) <= room or dropped == 2
        assert dropped == 0 or len(continued(messages[2 * dropped - 2 :])) > room
    system = [{"role": "system", "content": "s:"}, *messages]
    assert bytes(fitted(system, encode, room=6)[0]).decode() == "s:ee"


def test_messages_with_a_template_take_its_form_and_its_stops():
    tokenizer = bpe(CHATML)
    asked = said("a", "b", "c")
    assert message_ids(asked, tokenizer, CHATML) == chat_ids(asked, tokenizer, CHATML, answer=True)
    assert message_ids(asked, tokenizer, NO_TEMPLATE) == tokenizer.encode("ab\nc")
    assert answer_stops(tokenizer, CHATML) == ((tokenizer.special_tokens["<|im_end|>"],), ())
    assert answer_stops(tokenizer, NO_TEMPLATE) == ((), ())


def test_a_checkpoint_of_conversations_answers_in_the_plain_form(roomy, tmp_path):
    """Its record names the template; null is the plain one. An answer ends where the template ends a turn."""
    (path,) = (roomy / "checkpoints").glob("*.pt")
    record = ckpt.load(path)
    record.data["template"] = None
    ckpt.save(record, tmp_path / "checkpoints")
    lines = {"CHECKPOINT_DIR": str(tmp_path / "checkpoints"), "UNKNOWN_CHARACTERS": "skip", "TEMPERATURE": "0"}
    module = script("chat")
    settings = config.read(environment(roomy, **HERE | lines))
    loaded = module.open_named("latest", settings, Log())
    assert loaded.template is None
    chat = module.Chat(loaded, settings, Log(), 7, terminal=False)
    assert module.how(chat, loaded).stop == ("<|end|>",)


# ---------------------------------------------------------------------------------------------------------------------
# Steps of a text.


def test_steps_give_the_text_its_tokens_their_logits_and_why_it_ends(roomy):
    module = script("chat")
    loaded = module.open_named("latest", config.read(environment(roomy, **HERE)), Log())
    ids = loaded.tokenizer.encode("Dear")
    greedy = Sampling(max_new_tokens=30, temperature=0)
    found = list(steps(loaded.generator, loaded.tokenizer, ids, sampling=greedy, seed=1))
    drawn = [step for step in found if step.token is not None]
    assert [int(step.logits.argmax()) for step in drawn] == [step.token for step in drawn]
    text = loaded.tokenizer.decode([step.token for step in drawn])
    (pieces,) = texts(loaded.generator, loaded.tokenizer, ids, sampling=greedy, seed=1, count=1)
    assert "".join(step.text for step in found) == text == "".join(pieces)
    assert [step.finish for step in found] == [""] * 30 + ["length"]
    for ending in ({"stop": (text[5:7],)}, {"stop_ids": (drawn[9].token,)}):
        ended = list(steps(loaded.generator, loaded.tokenizer, ids, sampling=replace(greedy, **ending), seed=1))
        assert ended[-1].finish == "stop"
        assert text.startswith("".join(step.text for step in ended))
        assert len(ended) < 30


def test_a_stop_that_the_last_token_completes_ends_the_text_although_a_longer_one_had_begun(roomy):
    """Of \"abc\" and \"b\" after \"xab\", the first may still come until no token follows."""
    loaded = script("chat").open_named("latest", config.read(environment(roomy, **HERE)), Log())
    ids, tokenizer = loaded.tokenizer.encode("Dear"), loaded.tokenizer
    greedy = Sampling(max_new_tokens=30, temperature=0)
    text = "".join(next(texts(loaded.generator, tokenizer, ids, sampling=greedy, seed=1, count=1)))
    last = next(at for at in range(2, 30) if text[at] not in text[:at])
    cut = replace(greedy, max_new_tokens=last + 1, stop=(f"{text[last - 1 : last + 1]}\u2603", text[last]))
    ended = list(steps(loaded.generator, tokenizer, ids, sampling=cut, seed=1))
    assert ("".join(step.text for step in ended), ended[-1].finish) == (text[:last], "stop")
