"""The settings that tell runs apart."""

import os

import pytest

from milepost import config


def test_only_settings_that_differ_and_change_the_weights():
    one = {"LEARNING_RATE": 0.001, "DROPOUT": 0.1, "EVAL_INTERVAL": 5, "BIAS": True, "TRAINING_STEPS": 9}
    other = one | {"LEARNING_RATE": "1e-2", "EVAL_INTERVAL": 6, "DROPOUT": "0.10", "TRAINING_STEPS": "10"}
    assert config.labels({"a": one, "b": other, "c": {}}) == {
        "a": "LEARNING_RATE=0.001 TRAINING_STEPS=9",
        "b": "LEARNING_RATE=0.01 TRAINING_STEPS=10",
        "c": "",
    }
    assert config.labels({"a": one}) == {"a": ""}


def test_auto_is_not_called_different_from_what_it_came_to():
    assert config.labels({"a": {"TOKENIZER": "auto"}, "b": {"TOKENIZER": "char"}}) == {"a": "", "b": ""}


def test_many_are_counted():
    names = ("LEARNING_RATE", "DROPOUT", "SEED", "N_LAYER", "N_HEAD", "N_EMBD")
    many = config.labels({run: dict.fromkeys(names, value) for run, value in (("a", 1), ("b", 2))})
    assert many["a"].count("=") == 4
    assert many["a"].endswith(" and 2 more")


def test_the_settings_that_tell_runs_apart_come_first():
    """Two runs of each size: without the last setting, the labels of both would be alike."""
    sizes = (
        {"N_LAYER": n, "N_HEAD": n, "N_EMBD": 8 * n, "BLOCK_SIZE": 8 * n, "TRAINING_STEPS": n} for n in (1, 1, 2, 2)
    )
    runs = {str(at): size | {"SEED": at % 2, "LEARNING_RATE": 1 + at} for at, size in enumerate(sizes)}
    assert [text.split()[0] for text in config.labels(runs).values()] == [f"LEARNING_RATE={n}" for n in (1, 2, 3, 4)]
    for own in runs.values():
        own["LEARNING_RATE"] = 1
    assert len(set(config.labels(runs).values())) == 4


def test_a_config_env_that_cannot_be_read_is_no_setting(tmp_path):
    (tmp_path / "config.env").write_bytes(b"\xff\xfe\x00")
    assert config.env_values(tmp_path / "nowhere") == {}
    assert config.env_values(tmp_path / "config.env") == {}


@pytest.mark.parametrize("kind", ["pipe", "link"])
def test_a_config_env_that_is_no_file_is_not_opened(kind, tmp_path):
    """Reading a pipe would block, and a link may lead anywhere."""
    path, other = tmp_path / "config.env", tmp_path / "other.env"
    other.write_text("SEED=1\n")
    assert config.env_values(other) == {"SEED": "1"}
    os.mkfifo(path) if kind == "pipe" else path.symlink_to(other)
    assert config.env_values(path) == {}
