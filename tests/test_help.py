"""--help on a terminal: the common settings on one screen, and the way to all others."""

import re
import sys

import pytest
from drive import ROOT
from script import script

import training
from milepost import config
from milepost.config import VARIABLES


@pytest.fixture
def helped(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Exit code, stdout and stderr of --help on a terminal of 80x24, or in a pipe."""

    def run(*words: str, module=training, terminal: bool = True) -> tuple[int, str, str]:
        monkeypatch.setenv("COLUMNS", "80")
        monkeypatch.setenv("LINES", "24")
        monkeypatch.setattr(sys, "argv", ["x.py", "--help", *words])
        monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
        with pytest.raises(SystemExit) as ended:
            config.from_command_line("__main__", module.__doc__, module.READS)
        return ended.value.code, *capsys.readouterr()

    return run


def in_full(text: str) -> list[str]:
    """The variables that are described with their values."""
    return re.findall(r"^  ([A-Z_0-9]+)  \(default: ", text, re.MULTILINE)


def in_short(text: str) -> list[str]:
    """The variables of the short list."""
    return re.findall(r"^  ([A-Z_0-9]+)  +\S", text, re.MULTILINE)


EVERYTHING = [name for names in config.declared(training.READS).values() for name in names]


def test_a_screen_holds_the_common_settings_and_the_way_to_the_others(helped) -> None:
    code, out, err = helped()
    (_, common), *groups = config.declared(training.READS).items()
    assert (code, err, in_short(out)) == (0, "", common)
    assert len(out.splitlines()) < 24
    assert max(map(len, out.splitlines())) <= 80
    words = " ".join(out.split())
    assert all(f"{group} ({len(own)})" in words for group, own in groups)
    assert "--help all" in words


def test_a_pipe_and_the_word_all_show_everything(helped) -> None:
    code, out, _ = helped("all")
    assert (code, in_full(out)) == (0, EVERYTHING)
    assert helped(terminal=False) == (0, out, "")
    assert max(map(len, out.splitlines()), default=0) <= 100


def test_names_and_subjects_are_described_in_full(helped) -> None:
    assert in_full(helped("lora_rank", "SEED")[1]) == ["LORA_RANK", "SEED"]
    group = [name for name, each in VARIABLES.items() if each.metadata["group"] == "Logging"]
    assert in_full(helped("logging")[1]) == group
    code, out, err = helped("PROMPT")
    assert (code, out) == (2, "")
    assert err.startswith("--help PROMPT: no setting of x.py; subjects: Common settings, Data, ")


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "scripts").glob("*.py")))
def test_the_help_of_every_script_is_short_on_a_terminal(name: str, helped) -> None:
    _, out, _ = helped(module=script(name))
    assert len(out.splitlines()) < 24
    (_, common), *_ = config.declared(script(name).READS).items()
    assert len(in_full(out) or in_short(out)) >= min(6, len(common))
    assert [each for each in common if each not in re.findall(r"[A-Z_0-9]+", out)] == []
    assert max(map(len, out.splitlines())) <= 80
