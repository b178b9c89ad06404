"""Passwords and signatures in the address of a text are stored and shown nowhere, and its runs resume all the same."""

import base64
import io
import json
import os
import shutil
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from drive import at_step, environment, newest, small_text, tensor_bytes, train
from script import call, script
from test_corpus import Web, no_network

from milepost import ckpt, config
from milepost.config.names import refuse_arguments
from milepost.run import text as text_module
from milepost.text import download
from milepost.text.addresses import credentials, is_masked, masked, without_secrets
from milepost.text.corpus import open_corpus
from milepost.text.download import fetch
from milepost.text.errors import DataError

PASSWORD, SIGNATURE, AGAIN = "hunter2secret", "AKIA0123456789sig", "FEDC9876543210new"
URL = f"https://wren:{PASSWORD}@example.org:8443/letters/first.txt?X-Signature={SIGNATURE}&expires=9#part"
SHOWN = "https://***@example.org:8443/letters/first.txt?***"
FAST = {"SAMPLE_INTERVAL": "0", "EVAL_STEPS": "1"}


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        (URL, SHOWN),
        ("https://example.org/a.txt", "https://example.org/a.txt"),
        ("https://example.org:443/@wren/a.txt", "https://example.org:443/@wren/a.txt"),
        ("https://example.org/a.txt?raw=1", "https://example.org/a.txt?***"),
        ("https://wren@example.org/a.txt", "https://***@example.org/a.txt"),
        ("https://wren:p/w@example.org/a.txt", "https://***@example.org/a.txt"),
        ("https://wren:a@b@example.org/a.txt", "https://***@example.org/a.txt"),
        ("s3://key:secret@bucket/a.txt", "s3://***@bucket/a.txt"),
        (f"/data/a.txt,{URL.replace('#part', '')},tinyshakespeare", f"/data/a.txt,{SHOWN},tinyshakespeare"),
        ("/data/who@home?.txt", "/data/who@home?.txt"),
        ("--data=https://wren:pw@example.org/a.txt", "--data=https://***@example.org/a.txt"),
    ],
)
def test_masked_addresses(address, expected):
    assert masked(address) == expected
    assert masked(expected) == expected
    assert is_masked(expected) == ("***" in expected)


def test_a_password_cut_off_at_a_comma_is_masked():
    assert "secret" not in masked("https://wren:secret,more@example.org/a.txt").split(",")[0]


def test_parts_of_an_address_are_masked_in_messages():
    for message in (
        URL,
        f"nonnumeric port: '{PASSWORD}@example.org'",
        f"URL can't contain '/first.txt?X-Signature={SIGNATURE}'",
    ):
        hidden = without_secrets(message, URL)
        assert not any(secret in hidden for secret in (PASSWORD, SIGNATURE))


def test_a_password_is_sent_as_basic_authentication_and_not_to_where_a_redirect_leads(monkeypatch):
    sent: list[urllib.request.Request] = []
    monkeypatch.setattr(urllib.request.OpenerDirector, "open", lambda self, request, timeout: sent.append(request))
    download.open_https("https://wren:p%40ss@example.org/a.txt?b=1")
    (request,) = sent
    assert request.full_url == "https://example.org/a.txt?b=1"
    assert request.get_header("Authorization") == "Basic " + base64.b64encode(b"wren:p@ss").decode()
    assert "Authorization" not in request.headers  # of which a redirect takes a copy
    assert credentials("https://example.org/a.txt") == ("https://example.org/a.txt", None)


# Messages


def refused(url: str, **changes: Any) -> str:
    with pytest.raises(DataError) as caught:
        open_corpus(url, data_dir=changes.pop("data_dir", Path("unused")), **changes)
    error: BaseException | None = caught.value
    said = str(error)
    while error := error and (error.__cause__ or (None if error.__suppress_context__ else error.__context__)):
        said += f" {error}"
    return said


def invalid(url: str) -> Any:
    raise ValueError(f"nonnumeric port: '{PASSWORD}@example.org' in {url}")


def test_no_message_about_a_download_holds_a_secret(tmp_path):
    limit = {"max_download_bytes": 100, "data_dir": tmp_path}
    said = [
        refused(URL, open_url=Web(b"x" * 101), **limit),
        refused(URL, open_url=Web(b"x" * 50, 60), **limit),
        refused(URL, open_url=no_network, **limit),
        refused(URL, open_url=invalid, **limit),
        refused(URL.replace("https", "http")),
        refused(URL.replace(".txt", ".zip")),
        refused(SHOWN, data_dir=tmp_path),
    ]
    handler, headers = download._HttpsOnly(), {}
    with pytest.raises(DataError) as caught:
        handler.redirect_request(urllib.request.Request(URL), None, 302, "", headers, URL.replace("https", "http"))
    for line in [*said, str(caught.value)]:
        assert "example.org" in line
        assert not any(secret in line for secret in (PASSWORD, SIGNATURE, "wren:"))


def test_settings_do_not_show_a_secret(tmp_path):
    settings = config.read(environment(tmp_path, TRAINING_DATA_SOURCE=URL, EVAL_DATA=URL, BENCHMARK_DATA=URL))
    assert settings.training_data_source == URL
    texts = ["\n".join(config.describe(settings)), config.as_env(settings, {}), json.dumps(config.to_dict(settings))]
    texts.append(refuse_arguments("training.py", ["--data", URL, f"--eval-data={URL}", URL]))
    for name in ("SEED", "MODEL_TYPE", "TRAINING_STEPS"):
        with pytest.raises(config.ConfigError) as caught:
            config.read(environment(tmp_path, **{name: URL}))
        texts.append(str(caught.value))
    for text in texts:
        assert "example.org" in text
        assert not any(secret in text for secret in (PASSWORD, SIGNATURE))


# A run


@pytest.fixture
def web(tmp_path, monkeypatch) -> Path:
    """A folder whose downloads hold the text of URL, and no network."""
    monkeypatch.setattr(text_module, "DATA_FOLDER", tmp_path / "data")
    monkeypatch.setattr(text_module, "CACHE_FOLDER", tmp_path / "cache")
    monkeypatch.setattr(urllib.request.OpenerDirector, "open", lambda *_, **__: no_network(""))
    downloaded(tmp_path, URL)
    return tmp_path


def downloaded(folder: Path, url: str) -> None:
    small_text(folder)
    text = (folder / "letters.txt").read_bytes()
    fetch(url, data_dir=folder / "data", open_url=lambda _: io_response(text))


def io_response(data: bytes) -> Any:
    response = io.BytesIO(data)
    response.headers = {}  # type: ignore[attr-defined]
    return response


def everything_in(folder: Path) -> bytes:
    """All names and bytes below a folder."""
    return b"\n".join(str(path).encode() + (path.read_bytes() if path.is_file() else b"") for path in folder.rglob("*"))


@pytest.mark.parametrize("layout", ["unified", "directory", "huggingface", "separated", "sharded", "stepfiles"])
def test_nothing_that_a_run_writes_or_shows_holds_a_secret(layout, web):
    code, said = train(web, TRAINING_DATA_SOURCE=URL, CHECKPOINT_LAYOUT=layout, TRACKER="none", **FAST)
    assert code == 0, said
    path = newest(web).path
    shown = [said]
    for name, changes in {
        "inspect_checkpoint": {"CHECKPOINT_PATH": path},
        "list_checkpoints": {},
        "load_checkpoint": {"CHECKPOINT_PATH": path, "MAX_NEW_TOKENS": "2"},
        "evaluate_checkpoint": {"CHECKPOINT_PATH": path, "OUTPUT": web / "figures.json"},
        "convert_checkpoint": {"CHECKPOINT_PATH": path, "CONVERT_TO": "unified", "OUTPUT": web / "converted"},
    }.items():
        done = call(script(name), web, **changes)
        assert done.code == 0, done.err
        shown += [done.out, done.err]
    assert SHOWN in said
    assert newest(web).data["source"] == SHOWN
    found = everything_in(web) + "\n".join(shown).encode()
    assert not any(secret.encode() in found for secret in (PASSWORD, SIGNATURE))
    assert b"example.org" in found


def test_the_control_finds_a_secret(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b.txt").write_text(f"x{SIGNATURE}x")
    assert SIGNATURE.encode() in everything_in(tmp_path)


def test_a_run_resumes_without_the_address_and_with_a_new_signature(web, tmp_path):
    assert train(web, TRAINING_DATA_SOURCE=URL, **FAST)[0] == 0
    again = URL.replace(SIGNATURE, AGAIN).replace(PASSWORD, "another")
    downloaded(web, again)
    for name, source in (("without", None), ("again", again), ("stored", SHOWN)):
        folder = tmp_path / name
        (folder / "checkpoints").mkdir(parents=True)
        shutil.copy(at_step(web, 4), folder / "checkpoints")
        code, said = train(folder, TRAINING_DATA_SOURCE=source, RESUME="auto", **FAST)
        assert code == 0, said
        assert "not bit-exact" not in said
        assert tensor_bytes(newest(folder)) == tensor_bytes(newest(web))
        assert newest(folder).run_id == newest(web).run_id


def test_without_a_copy_the_whole_address_is_asked_for(web, tmp_path):
    assert train(web, TRAINING_DATA_SOURCE=URL, **FAST)[0] == 0
    shutil.rmtree(web / "data")
    code, said = train(web, TRAINING_DATA_SOURCE=None, RESUME="auto", TRAINING_STEPS="9", **FAST)
    assert code == 4
    assert SHOWN in said.splitlines()[-1]


def test_the_latest_copy_of_a_masked_address_is_taken(tmp_path):
    for number, signature in enumerate(("one", "two")):
        path = fetch(f"https://example.org/a.txt?{signature}", data_dir=tmp_path, open_url=Web(signature.encode()))
        record = path.with_name(path.name + ".json")
        os.utime(record, (number, number))
    found = fetch("https://example.org/a.txt?***", data_dir=tmp_path, open_url=no_network)
    assert found.read_bytes() == b"two"
    found.write_bytes(b"damaged")
    assert fetch("https://example.org/a.txt?***", data_dir=tmp_path, open_url=no_network).read_bytes() == b"one"


# Checkpoints of versions that stored the address


def test_the_address_in_an_old_checkpoint_is_shown_and_copied_masked(web, tmp_path, monkeypatch):
    assert train(web, TRAINING_DATA_SOURCE=URL, **FAST)[0] == 0
    record, old = newest(web), tmp_path / "old"
    record.data |= {"source": URL}
    record.hyperparameters |= {"TRAINING_DATA_SOURCE": URL}
    with monkeypatch.context() as patch:
        patch.setattr("milepost.ckpt.record.masked", str)
        path = ckpt.save(record, old / "checkpoints")
    assert SIGNATURE.encode() in path.read_bytes()  # the control
    said = call(script("inspect_checkpoint"), old, CHECKPOINT_PATH=path)
    assert "example.org" in said.out
    for other in (path, at_step(web, 8)):
        compared = call(script("inspect_checkpoint"), old, CHECKPOINT_PATH=path, COMPARE_WITH=other)
        said = said._replace(out=said.out + compared.out + compared.err)
    done = call(script("convert_checkpoint"), old, CHECKPOINT_PATH=path, CONVERT_TO="directory", OUTPUT=old / "new")
    assert done.code == 0, done.err
    said = said._replace(err=said.err + done.out + done.err)
    assert not any(secret in said.out + said.err for secret in (PASSWORD, SIGNATURE))
    assert SIGNATURE.encode() not in everything_in(old / "new")
    assert b"example.org" in everything_in(old / "new")
    code, said = train(old, TRAINING_DATA_SOURCE=None, RESUME="auto", TRAINING_STEPS="9", **FAST)
    assert code == 0, said
    assert not any(secret in said for secret in (PASSWORD, SIGNATURE))
    assert newest(old).data["source"] == SHOWN
