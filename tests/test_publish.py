"""scripts/publish_checkpoint.py against a hub on this computer, with the real client: what is published, and what never is."""

import dataclasses
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from drive import ROOT, child_environment, newest, train
from hub_server import COMMIT, UploadHub, upload_hub
from pages import commands
from transformers import AutoModelForCausalLM, AutoTokenizer
from work import HANGING

from milepost import ckpt
from milepost.ckpt.restore import logits
from milepost.publish.card import card, code
from milepost.publish.public import file_names, hub_name, public_record

NOTE = "a note that is nobody's business"


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A folder with a run of a GPT-2."""
    folder = tmp_path_factory.mktemp("publish")
    assert train(folder, RUN_NOTE=NOTE, CHECKPOINT_KEEP_BEST="0")[0] == 0
    return folder


@pytest.fixture
def hub() -> Iterator[UploadHub]:
    with upload_hub() as server:
        yield server


def publish(folder: Path, hub: UploadHub, **changes: str) -> subprocess.CompletedProcess[str]:
    """Run the script as a user would, whose client asks this hub."""
    of_hub = {
        "HF_ENDPOINT": hub.address, "HF_HOME": str(folder / "hf"), "HF_TOKEN": "hf_secret", "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }  # fmt: skip
    values = {"CHECKPOINT_PATH": "latest", "PUSH_TO_HUB": "me/letters", **changes}
    return subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "publish_checkpoint.py")], cwd=folder, env=child_environment(folder, **values) | of_hub,
        capture_output=True, text=True, timeout=HANGING, check=False,
    )  # fmt: skip


def test_the_commands_of_the_page_show_and_then_publish(trained, hub):
    written = commands((ROOT / "docs" / "publishing.md").read_text(encoding="utf-8"))
    for number, line in enumerate(written):
        *settings, program, script = shlex.split(line)
        assert (program, script) == ("python3", "scripts/publish_checkpoint.py")
        done = publish(trained, hub, **dict(setting.split("=", 1) for setting in settings))
        assert done.returncode == 0, done.stderr
        assert len(hub.files) == number
    assert number == 1


def test_without_being_asked_twice_it_only_shows(trained, hub):
    shown = publish(trained, hub)
    assert shown.returncode == 0, shown.stderr
    assert hub.seen == []
    assert "me/letters (private)" in shown.stdout
    for name in ("README.md", "config.json", "model.safetensors", "tokenizer.json"):
        assert f"  {name}  " in shown.stdout
    assert "# letters" in shown.stdout
    assert "DRY_RUN=false" in shown.stderr


def test_what_is_published_opens_in_transformers_and_here(trained, hub, tmp_path):
    done = publish(trained, hub, DRY_RUN="false")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"{hub.address}/me/letters/commit/{COMMIT}"
    assert hub.private == {"me/letters": True}
    copy, record = hub.write("me/letters", tmp_path), newest(trained)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(copy), AutoTokenizer.from_pretrained(copy)
    again = ckpt.load(copy, verify=True)
    assert (again.step, again.run_id, again.optimizer_state) == (record.step, record.run_id, None)
    assert torch.equal(logits(again), logits(record))
    ids = torch.arange(16)[None] % record.model_settings["vocab_size"]
    with torch.no_grad():
        ours = ckpt.restore.build_model(record, device=torch.device("cpu")).eval()(ids).logits
        torch.testing.assert_close(model(ids).logits, ours, rtol=1e-4, atol=1e-4)
    assert tokenizer.decode(tokenizer("Dear").input_ids).replace(" ", "") == "Dear"
    assert model.generation_config.eos_token_id is None


def test_no_file_tells_of_the_machine_or_what_was_not_asked_for(trained, hub):
    assert publish(trained, hub, DRY_RUN="false").returncode == 0
    files = hub.files["me/letters"]
    assert not any("optimizer" in name for name in files)
    whole = b"".join(files.values()).decode(errors="replace")
    record = newest(trained)
    held = json.dumps(record.hyperparameters, ensure_ascii=False)  # the control: the checkpoint has all of these
    assert str(trained) in held
    assert NOTE in held
    for secret in (str(trained), str(ROOT), os.uname().nodename, NOTE, record.runtime["platform"], "hf_secret"):
        assert secret not in whole
        assert json.dumps(secret)[1:-1] not in whole  # as JSON writes letters beyond ASCII
    assert "letters.txt" in whole
    assert record.data["sha256"] in whole


def test_an_upload_that_broke_off_is_not_sent_again(trained, hub):
    hub.refuses = 1
    broken = publish(trained, hub, DRY_RUN="false")
    assert broken.returncode == 1
    assert "exceeded your storage" in broken.stderr
    assert len(hub.sent) == 1
    assert hub.files == {}
    assert publish(trained, hub, DRY_RUN="false").returncode == 0
    assert len(hub.sent) == 1
    assert "model.safetensors" in hub.files["me/letters"]


def test_what_an_earlier_publication_left_goes_and_what_its_owner_added_stays(trained, hub):
    assert publish(trained, hub, DRY_RUN="false").returncode == 0
    files = hub.files["me/letters"]
    published = set(files)
    old, own = (
        {"adapter_config.json": b"{}", "adapter_model.safetensors": b""},
        {"notes.txt": b"mine", ".gitattributes": b""},
    )
    files.update(old | own)
    again = publish(trained, hub, DRY_RUN="false")
    assert again.returncode == 0, again.stderr
    assert set(files) == published | set(own)


def test_the_printed_command_publishes_as_openly_as_it_was_shown(trained, hub):
    for private, expected in (("true", {"me/letters": True}), ("false", {"me/letters": False})):
        shown = publish(trained, hub, HUB_PRIVATE=private)
        assert ("HUB_PRIVATE=false" in shown.stderr) == (private == "false"), shown.stderr
        words = shlex.split(shown.stderr.splitlines()[-1].partition("to publish: ")[2])
        settings = dict(word.split("=", 1) for word in words if "=" in word)
        done = publish(trained, hub, **settings)
        assert done.returncode == 0, done.stderr
        assert hub.private == expected
        hub.private.clear()


def test_a_public_model_is_published_to_only_if_asked(trained, hub):
    hub.private["me/letters"] = False
    refused = publish(trained, hub, DRY_RUN="false")
    assert refused.returncode == 1
    assert "HUB_PRIVATE=false" in refused.stderr
    assert hub.files == {}
    assert publish(trained, hub, DRY_RUN="false", HUB_PRIVATE="false").returncode == 0
    assert "README.md" in hub.files["me/letters"]


def test_a_refused_token_and_a_silent_hub_are_a_sentence(trained, hub):
    hub.token = None
    refused = publish(trained, hub, DRY_RUN="false")
    assert refused.returncode == 1
    assert "HF_TOKEN" in refused.stderr
    assert "hf_secret" not in refused.stderr + refused.stdout
    hub.shutdown()
    hub.server_close()
    silent = publish(trained, hub, DRY_RUN="false")
    assert silent.returncode == 1
    assert "cannot be reached" in silent.stderr
    assert "Traceback" not in silent.stderr


@pytest.mark.parametrize("name", ["letters", "a/b/c", "../x", "me/ letters"])
def test_a_wrong_name_is_refused(trained, hub, name):
    refused = publish(trained, hub, PUSH_TO_HUB=name)
    assert refused.returncode == 2
    assert "PUSH_TO_HUB" in refused.stderr


def test_output_keeps_what_would_be_published(trained, hub, tmp_path):
    target = tmp_path / "new" / "published"
    assert publish(trained, hub, OUTPUT=str(target)).returncode == 0
    assert sorted(path.name for path in target.parent.iterdir()) == ["published"]
    assert (target / "README.md").read_text(encoding="utf-8").startswith("---\n")
    again = publish(trained, hub, OUTPUT=str(target))
    assert again.returncode == 2
    assert "exists" in again.stderr
    assert hub.seen == []


def test_adapters_are_published_for_peft_without_the_path_of_their_base(trained, hub, tmp_path):
    (base,) = (trained / "checkpoints").glob("*step0008*")
    begun = {"INIT_FROM": str(base), "LORA_RANK": "2", "CHECKPOINT_ADAPTERS_ONLY": "true", "CHECKPOINT_KEEP_BEST": "0"}
    (tmp_path / "letters.txt").write_bytes((trained / "letters.txt").read_bytes())
    assert train(tmp_path, **begun)[0] == 0
    assert publish(tmp_path, hub, DRY_RUN="false").returncode == 0
    files = hub.files["me/letters"]
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md"} <= files.keys()
    config, text = json.loads(files["adapter_config.json"]), files["README.md"].decode()
    assert (config["r"], config["base_model_name_or_path"]) == (2, None)
    assert newest(tmp_path).base["sha256"] in text
    assert 'library_name: "peft"' in text
    assert str(trained) not in b"".join(files.values()).decode(errors="replace")


# ---------------------------------------------------------------------------------------------------------------------
# At the end of a training.


NO_SIZES = dict.fromkeys(("N_LAYER", "N_HEAD", "N_EMBD", "DROPOUT"))
BIGRAM = {"MODEL_TYPE": "bigram", "TRAINING_STEPS": "2", "CHECKPOINT_KEEP_BEST": "0", **NO_SIZES}


@pytest.fixture
def of_hub(hub, tmp_path, monkeypatch) -> UploadHub:
    """The hub, as the client in this process sees it: its addresses are read when it is imported."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.address)
    monkeypatch.setattr("huggingface_hub.hf_api.ENDPOINT", hub.address, raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    return hub


def bytes_in(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (folder / "checkpoints").glob("*.pt")}


def test_a_finished_run_shows_what_it_would_publish_and_uploads_if_asked(of_hub, tmp_path):
    code, said = train(tmp_path, **BIGRAM, PUSH_TO_HUB="me/letters")
    assert (code, of_hub.seen) == (0, []), said
    assert "me/letters (private" in said
    assert "DRY_RUN=false" in said
    code, said = train(tmp_path, PUSH_TO_HUB="me/letters", DRY_RUN="false", CHECKPOINT_KEEP_BEST="0")
    assert (code, of_hub.private) == (0, {"me/letters": True}), said
    assert f"{of_hub.address}/me/letters/commit/{COMMIT}" in said
    record = newest(tmp_path)
    again = ckpt.load(of_hub.write("me/letters", tmp_path / "copy"), verify=True)
    assert (again.step, again.run_id, torch.equal(logits(again), logits(record))) == (8, record.run_id, True)


@pytest.mark.parametrize("how", ["refused", "public", "away"])
def test_a_run_that_cannot_be_published_is_saved_and_says_why(of_hub, tmp_path, how):
    if how == "away":
        of_hub.shutdown()
        of_hub.server_close()
    elif how == "public":
        of_hub.private["me/letters"] = False
    else:
        of_hub.token = None
    code, said = train(tmp_path, **BIGRAM, PUSH_TO_HUB="me/letters", DRY_RUN="false")
    assert (code, newest(tmp_path).step) == (9, 2), said
    (line,) = (line for line in said.splitlines() if line.startswith("not published: "))
    assert "scripts/publish_checkpoint.py" in said.replace(os.sep, "/")
    assert "hf_secret" not in said
    assert of_hub.files == {}, line


def test_a_run_that_has_no_token_is_refused_before_its_first_step(tmp_path, monkeypatch):
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "absent"))
    asked = BIGRAM | {"PUSH_TO_HUB": "me/letters", "DRY_RUN": "false"}
    code, said = train(tmp_path, **asked)
    assert (code, "HF_TOKEN" in said) == (2, True), said
    assert not (tmp_path / "checkpoints").exists()
    assert train(tmp_path, **asked, ENABLE_CHECKPOINTS="false")[0] == 0  # publishes nothing


# ---------------------------------------------------------------------------------------------------------------------
# What is public, and the card.


def test_paths_become_names_and_hub_names_stay():
    assert file_names("/home/me/a.txt,https://host/x/b.jsonl?token=1,data/dear_wren.md") == "a.txt,b.jsonl,dear_wren.md"
    assert file_names("C:\\texts\\a.txt") == "a.txt"
    assert [hub_name(name) for name in ("gpt2", "me/SmolLM2-1.7B")] == ["gpt2", "me/SmolLM2-1.7B"]
    assert [hub_name(name) for name in ("/home/me/gpt2", "~/gpt2", "C:\\gpt2", "", None)] == [None] * 5


def test_the_card_names_the_base_and_shows_text_of_files_as_text(trained):
    hostile = "`</summary>`\n# <script>|x"
    record = dataclasses.replace(
        newest(trained), base={"sha256": "0" * 64, "source": "me/base"}, data={"name": hostile, "sha256": "1" * 64}
    )
    text = card(public_record(record), "me/x", parameters=7, sha256="2" * 64, curve=True)
    assert 'base_model: "me/base"' in text
    assert "(loss.svg)" in text
    assert "\n# <script>" not in text
    assert "<script>" in text.replace(code(hostile), "", 0)  # it is there, within a code span
    assert "<script>" not in text.replace(code(hostile), "")
    assert ("1" * 64 in text, "2" * 64 in text) == (True, True)


@pytest.mark.parametrize(("steps", "again"), [(0, False), (1, True)])
def test_the_card_promises_to_train_again_only_what_was_trained(trained, steps, again):
    """Merged weights are a run of their own that has trained nothing since its parent."""
    record = newest(trained)
    record = dataclasses.replace(record, parent={"run_id": "adapters", "step": record.step - steps})
    text = card(public_record(record), "me/x", parameters=7, sha256="2" * 64, curve=False)
    assert ("REPLAY=true" in text) == again
    record = dataclasses.replace(record, run_id=None, written_by="another program (transformers)")
    assert "REPLAY=true" not in card(public_record(record), "me/x", parameters=7, sha256="2" * 64, curve=False)


def test_code_spans_hold_anything():
    assert code("a") == "`a`"
    assert code("a`b") == "``a`b``"
    assert code("`") == "`` ` ``"
    assert "\n" not in code("a\nb")


def test_a_model_that_transformers_lacks_is_published_for_this_program(hub, tmp_path):
    sizes = dict.fromkeys(("N_LAYER", "N_HEAD", "N_EMBD", "DROPOUT"))
    assert train(tmp_path, MODEL_TYPE="bigram", **sizes)[0] == 0
    assert publish(tmp_path, hub, DRY_RUN="false").returncode == 0
    copy = hub.write("me/letters", tmp_path / "copy")
    assert ckpt.load(copy, verify=True).model_type == "bigram"
    assert "Transformers has no such model" in (copy / "README.md").read_text(encoding="utf-8")
    assert "library_name" not in (copy / "README.md").read_text(encoding="utf-8")
