"""Talk to a checkpoint: the model stays loaded, answers stream, and what was said stays in the context.

CHECKPOINT_PATH=latest python3 scripts/chat.py
printf 'Dear Wren,\n' | SAMPLE_SEED=7 STOP='\\n' python3 scripts/chat.py > answers.txt
"""

import sys

sys.path.insert(0, __file__.rpartition("scripts")[0])  # runs from any folder, without installing
from milepost import config

READS = (
    "CHECKPOINT_PATH", "MAX_NEW_TOKENS", "TEMPERATURE", "TOP_K", "TOP_P", "SAMPLE_SEED", "REPETITION_PENALTY", "STOP", "STREAM",
    "QUANTIZE", "SPECULATE", "DEVICE", "DEVICE_CHECK", "DTYPE", "CHECKPOINT_DIR", "CACHE_GB", "BASE_CHECKPOINT", "GPT2_MODEL_NAME", "INIT_FROM",
    "TRAINING_DATA_SOURCE", "TEXT_FIELD", "DOCUMENT_SEPARATOR", "PROMPT_FIELD", "ANSWER_FIELD", "TOKENIZER", "UNKNOWN_CHARACTERS", "N_HEAD",
)  # fmt: skip
SETTINGS = config.from_command_line(__name__, __doc__, READS)  # before torch is imported

import contextlib
import dataclasses
import difflib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from milepost.cli import EXIT_CODES, guarded, report
from milepost.config import Config, ConfigError
from milepost.files import replacing
from milepost.generation.conversation import answer_stops, continued, fitted, message_ids
from milepost.generation.prefixes import Prefixes
from milepost.generation.texts import Sampling, texts
from milepost.remote import local
from milepost.runtime.interrupt import ctrl_c_noted, ctrl_c_raises, was_interrupted
from milepost.runtime.progress import Log, shown
from milepost.samples import (
    MANY,
    PROMPT_LIMIT,
    Loaded,
    blame_checkpoint,
    drop_conflicts,
    encoder_for,
    open_named,
    opened,
    prompt_for,
    sample_seed,
    sampling,
)
from milepost.screen import ignore, put, put_pieces
from milepost.text.blocks import decoded, not_decoded
from milepost.text.templates import Message
from milepost.text.tokenization import Tokenizer

BLOCK = '"""'  # begins and ends a text of several lines
HISTORY = "chat_history"  # in the user's folder of caches
REMEMBERED = 1000  # lines of it
MISTAKES: tuple[type[Exception], ...] = (
    *(kind for kind, _ in EXIT_CODES),
    OSError,
)  # reported; the conversation continues


@dataclass
class Chat:
    """A conversation: what generates, the settings, and all messages. `number` counts the answers since the seed was set."""

    loaded: Loaded
    settings: Config
    log: Log
    seed: int
    terminal: bool
    messages: list[Message] = field(default_factory=list)
    number: int = 0
    dropping: bool = False  # whether it was reported that the oldest turns are dropped
    other: Loaded | None = None  # what /compare opened last
    prefixes: Prefixes = field(default_factory=lambda: Prefixes(most=2))  # what both have read of it
    code: int = 0  # of the first mistake


def main(settings: Config, log: Log) -> int:
    """Answer each text that is typed or piped in until its end; return the exit code."""
    settings = local(settings, log)
    loaded = open_named(settings.checkpoint_path, settings, log)
    terminal = sys.stdin.isatty() and sys.stdout.isatty()
    chat = Chat(loaded, settings, log, sample_seed(settings), terminal)
    describe(chat, loaded)
    try:
        if terminal:
            log("/help lists the commands; Ctrl-C stops an answer, Ctrl-D ends")
            with history(), ctrl_c_raises():
                talk(chat, typed)
        else:
            talk(chat, piped)
    except BrokenPipeError:
        ignore(sys.stdout)  # the reader closed the pipe, as `| head` does
    return 0 if terminal else chat.code


def describe(chat: Chat, loaded: Loaded) -> None:
    """Log which checkpoint answers, and the seed."""
    record = loaded.record
    name = shown(record.path) if record.path else "checkpoint"
    without = ", without its adapters" if "adapters" in record.left_out else ""
    what = f"{record.model_type} at step {record.step}{without}, {loaded.tokenizer.kind} tokenizer"
    chat.log(f"{name}: {what}, in {loaded.dtype}; SAMPLE_SEED={chat.seed}")


# ---------------------------------------------------------------------------------------------------------------------
# Input


def typed() -> str | None:
    """Return the next text from the terminal, or None at the end (Ctrl-D). Raise ConfigError for a line that is not text."""
    mark = "> " if config.no_color() else "\001\033[1m\002>\001\033[0m\002 "  # \001 and \002: no columns, for readline

    def line(prompt: str) -> str | None:
        try:
            with only_text():
                return input(prompt).encode("utf-8", "surrogateescape").decode()
        except EOFError:
            put("\n")
            return None

    return whole_text(line, first=mark, more=". ")


def piped() -> str | None:
    """Return the next text from a pipe or file, or None at its end. Raise ConfigError for a line that is not text."""

    def line(_: str) -> str | None:
        data = sys.stdin.buffer.readline(PROMPT_LIMIT)
        with only_text():
            return decoded(data).rstrip("\r\n") if data else None

    return whole_text(line, first="", more="")


@contextlib.contextmanager
def only_text() -> Iterator[None]:
    """A block that reads. Raise ConfigError for bytes that are not text."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise ConfigError([f"standard input: {not_decoded(error)}"]) from error


def whole_text(line: Callable[[str], str | None], *, first: str, more: str) -> str | None:
    """Return the next line, or the lines between two BLOCK; None at the end of the input."""
    text = line(first)
    if text is None or not text.startswith(BLOCK):
        return text
    lines = [text.removeprefix(BLOCK)]
    while not lines[-1].endswith(BLOCK):
        following = line(more)
        if following is None:
            return "\n".join(lines)
        lines.append(following)
    lines[-1] = lines[-1].removesuffix(BLOCK)
    return "\n".join(lines[1:] if not lines[0] and len(lines) > 1 else lines).removesuffix("\n")


@contextlib.contextmanager
def history() -> Iterator[None]:
    """Edit lines with readline where Python has it, and keep what was typed in the user's folder of caches.

    A file that cannot be read or written is no reason to stop.
    """
    try:
        import readline
    except ImportError:
        yield
        return
    path = config.user_caches() / "milepost" / HISTORY
    readline.set_history_length(REMEMBERED)
    with contextlib.suppress(OSError):
        readline.read_history_file(path)
    before = readline.get_current_history_length()
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600))
            readline.append_history_file(readline.get_current_history_length() - before, path)


# ---------------------------------------------------------------------------------------------------------------------
# Turns


def talk(chat: Chat, read: Callable[[], str | None]) -> None:
    """Answer each text and obey each command. A mistake is reported, and the next text is read; a pipe gets an empty line."""
    while True:
        text: str | None = ""
        try:
            text = read()
            if text is None or text.split()[:1] == ["/quit"]:
                return
            respond(chat, text)
        except KeyboardInterrupt:
            if not chat.terminal:
                raise
            put("\n")
            if was_interrupted():  # another signal; Ctrl-C asks for nothing else here
                raise
        except BrokenPipeError:
            raise
        except MISTAKES as error:
            code = report(error, chat.log)
            chat.code = chat.code or code
            if not chat.terminal and not is_command(text or ""):
                put("\n")


def is_command(text: str) -> bool:
    """Return whether the text is a command; two slashes begin a text that begins with one."""
    return text.startswith("/") and not text.startswith("//")


def respond(chat: Chat, text: str) -> None:
    """Obey a command, or answer a text and add both to the conversation. An empty text gets no answer."""
    if is_command(text):
        name, *rest = text.split(maxsplit=1)
        argument = "".join(rest).strip()
        if "\0" in text:  # which no file can have in its name
            raise ConfigError([f"{name}: a NUL character stands in the command; write it again"])
        find_command(name)(chat, argument)
        return
    text = text[1:] if text.startswith("//") else text
    if not text.strip():
        if not chat.terminal:
            put("\n")
        return
    asked: list[Message] = [*chat.messages, {"role": "user", "content": prompt_for(chat.loaded.record, text)}]
    encoder_for(chat.loaded.tokenizer, asked[-1]["content"], chat.settings, chat.log)  # refuses unknown characters
    reply = answer(chat, chat.loaded, asked, number=chat.number)
    chat.messages = [*asked, {"role": "assistant", "content": reply}]
    chat.number += 1


def answer(chat: Chat, loaded: Loaded, messages: Sequence[Message], *, number: int) -> str:
    """Write the answer to the last message to stdout and return it; Ctrl-C on a terminal ends it early."""
    settings, context = chat.settings, loaded.model.settings.block_size
    room = context - min(settings.max_new_tokens, context // 2)
    tokenizer = loaded.tokenizer
    encoder = encoder_of_turns(loaded, messages, settings)
    ids, dropped = fitted(messages, lambda some: message_ids(some, encoder, loaded.template), room=room)
    full = [dropped] if dropped else []
    (pieces,) = texts(
        loaded.generator,
        tokenizer,
        ids,
        sampling=how(chat, loaded),
        seed=chat.seed,
        first=number,
        count=1,
        lookup=loaded.lookup,
        on_slide=lambda: full.append(0),
        prefixes=chat.prefixes,
    )
    pieces = blame_checkpoint(pieces, loaded.record)
    with ctrl_c_noted() if chat.terminal else contextlib.nullcontext(lambda: False) as stopped:
        until_stopped = until(pieces, stopped)
        reply = put_pieces(until_stopped if settings.stream else ["".join(until_stopped)])
    put("\n")
    if full and loaded is chat.loaded and not chat.dropping:  # /compare answers once, with another context
        chat.log(f"the context of {context} tokens is full: from now on the oldest turns are dropped")
        chat.dropping = True
    return reply


def encoder_of_turns(loaded: Loaded, messages: Sequence[Message], settings: Config) -> Tokenizer:
    """Return what encodes the conversation. Raise ConfigError if an earlier turn has characters that the vocabulary lacks."""
    try:
        return encoder_for(loaded.tokenizer, continued(messages), settings)
    except ConfigError as error:  # the text itself was encoded before: removing characters from it would not help
        raise ConfigError([f"an earlier turn: {error.__cause__}; /reset begins a new conversation"]) from error


def until(pieces: Iterator[str], stopped: Callable[[], bool]) -> Iterator[str]:
    """Yield the pieces until `stopped` returns True."""
    for piece in pieces:
        yield piece
        if stopped():
            return


def how(chat: Chat, loaded: Loaded) -> Sampling:
    """Return how tokens are drawn, and what ends an answer: what the settings and the chat template name."""
    ids, strings = answer_stops(loaded.tokenizer, loaded.template)
    asked = sampling(chat.settings)
    return dataclasses.replace(asked, stop=(*asked.stop, *strings), stop_ids=ids)


# ---------------------------------------------------------------------------------------------------------------------
# Commands


def show_help(chat: Chat, _: str) -> None:
    """list the commands"""
    for name, command in COMMANDS.items():
        chat.log(f"{name + ' ' + ARGUMENTS.get(name, ''):<24} {command.__doc__}")
    chat.log(f"{', '.join(SETTING_COMMANDS):<24} show a setting, or with a value change it")
    chat.log(f"{'/quit':<24} end, as Ctrl-D does")
    chat.log(f"{BLOCK + ' ... ' + BLOCK:<24} a text of several lines; // begins a text that begins with /")


def reset(chat: Chat, _: str) -> None:
    """forget the conversation"""
    chat.messages, chat.number, chat.dropping = [], 0, False


def save(chat: Chat, name: str) -> None:
    """write the whole conversation to a new file: .json as messages, any other name as text"""
    path = Path(os.path.expanduser(name))
    if not name or os.path.lexists(path):
        what = f"/save {name}: the file exists" if name else "/save: no file named"
        raise ConfigError([f"{what}; name a new file"])
    values = {"messages": chat.messages, "checkpoint": str(chat.loaded.record.path), "seed": chat.seed}
    as_json = json.dumps(values, ensure_ascii=False) + "\n"
    as_text = continued(chat.messages) + "\n"
    try:
        with replacing(path) as temporary:
            temporary.write_text(as_json if path.suffix == ".json" else as_text, encoding="utf-8")
    except OSError as error:  # of a temporary file, whose name nobody gave
        problem = f"cannot be written ({error.strerror}); name a file in a folder that can be"
        raise ConfigError([f"/save {name}: {problem}"]) from error
    chat.log(f"wrote {shown(path)}")


def use_checkpoint(chat: Chat, name: str) -> None:
    """continue with another checkpoint: a path, latest or best"""
    if name:
        chat.loaded = open_named(name, chat.settings, chat.log)
    describe(chat, chat.loaded)


def use_adapter(chat: Chat, name: str) -> None:
    """continue with other adapters over the base that is loaded, or with none"""
    if not name:
        raise ConfigError(["/adapter: no adapters named; name a checkpoint that holds adapters, or none"])
    settings, base = chat.settings, chat.loaded.base
    if name == "none":
        found = opened(drop_conflicts(base, settings, chat.log), base, chat.log, tokens=MANY)
    else:
        found = open_named(name, settings, chat.log, bases=[base])
        if not found.adapted:
            raise ConfigError([f"/adapter {name}: has no adapters; /checkpoint {name} continues with it"])
    chat.loaded = found
    describe(chat, found)


def compare(chat: Chat, name: str) -> None:
    """answer the last text again with another checkpoint; the conversation stays with the first"""
    if not name and chat.other is None:
        raise ConfigError(["/compare: no checkpoint named; name a path, latest or best"])
    asked = chat.messages[:-1]
    if not asked:
        raise ConfigError(["/compare: there is no text to answer yet; write one first"])
    if name:
        chat.other = open_named(name, chat.settings, chat.log)
    assert chat.other is not None
    describe(chat, chat.other)
    answer(chat, chat.other, asked, number=max(chat.number - 1, 0))  # 0: /seed has set another seed since the answer


COMMANDS: dict[str, Callable[[Chat, str], None]] = {
    "/help": show_help,
    "/reset": reset,
    "/save": save,
    "/checkpoint": use_checkpoint,
    "/adapter": use_adapter,
    "/compare": compare,
}
ARGUMENTS = {"/save": "FILE", "/checkpoint": "NAME", "/adapter": "NAME", "/compare": "NAME"}
# Commands that show or change a setting, and its variable.
SETTING_COMMANDS = {
    "/temperature": "TEMPERATURE",
    "/top_k": "TOP_K",
    "/top_p": "TOP_P",
    "/repetition_penalty": "REPETITION_PENALTY",
    "/max_new_tokens": "MAX_NEW_TOKENS",
    "/stop": "STOP",
    "/seed": "SAMPLE_SEED",
}


def find_command(name: str) -> Callable[[Chat, str], None]:
    """Return what a command does. Raise ConfigError naming the closest one if there is none of that name."""
    if name in SETTING_COMMANDS:
        return lambda chat, value: set_value(chat, name, value)
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, [*COMMANDS, *SETTING_COMMANDS, "/quit"], 1)
        hint = f"did you mean {close[0]}?" if close else "/help lists the commands"
        raise ConfigError([f"{name}: no such command; {hint} (// begins a text that begins with /)"])
    return COMMANDS[name]


def set_value(chat: Chat, command: str, value: str) -> None:
    """Show the setting of a command, or change it. A seed begins to count answers anew."""
    name = SETTING_COMMANDS[command]
    if value:
        chat.settings = config.with_text(chat.settings, name, value, source=command)
        if name == "SAMPLE_SEED":
            chat.seed, chat.number = sample_seed(chat.settings), 0
    shown_value = chat.seed if name == "SAMPLE_SEED" else getattr(chat.settings, name.lower())
    chat.log(f"{name}={config.as_text(shown_value)}")


if __name__ == "__main__":
    sys.exit(guarded(main, SETTINGS))
