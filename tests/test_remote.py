"""Scripts on a checkpoint of a mirror: what they print and write is what they print and write of the same checkpoint on disk."""

import json
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
from drive import command, tensor_bytes, train
from mirrors import in_folder, send
from script import NOTHING_OF_TRAINING, Said, call, script
from test_lazy import HEAVY, run

import milepost
from milepost import ckpt, config, remote
from milepost.config import ConfigError
from milepost.mirror import Mirrored, retrying
from milepost.mirror import cache as caching
from milepost.runtime.progress import Log

SMALL = {
    "N_LAYER": "1",
    "N_EMBD": "8",
    "TRAINING_STEPS": "6",
    "CHECKPOINT_INTERVAL": "2",
    "EVAL_INTERVAL": "2",
    "SAMPLE_INTERVAL": "0",
}
NAMED = {"latest": 6, "best": 6, "4": 4, "*step0002*": 2}


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A folder with a run of a GPT-2, its checkpoints and their mirror."""
    folder = tmp_path_factory.mktemp("remote")
    code, said = train(folder, **SMALL, CHECKPOINT_KEEP_BEST="0")
    assert code == 0, said
    found = ckpt.find(folder / "checkpoints")
    mirrored = Mirrored(
        in_folder(folder / "mirror"), found[0].run_id, folder / "runs" / found[0].run_id, folder / "checkpoints"
    )
    for each in found:  # all of them, where a run would pass over those that a newer one overtakes
        send(mirrored, each.path, folder / "checkpoints")
    return folder


@pytest.fixture(autouse=True)
def caches(tmp_path, monkeypatch) -> Path:
    """The user's folder of caches."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    return tmp_path / "caches"


def address(folder: Path, name: str = "") -> str:
    return f"file://{folder / 'mirror' / name}"


def of_step(folder: Path, step: int) -> Path:
    (path,) = (found.path for found in ckpt.find(folder / "checkpoints") if found.step == step)
    return path


def empty(folder: Path, tmp_path: Path) -> Path:
    """A fresh machine: the text is there, and no checkpoint."""
    (tmp_path / "letters.txt").write_bytes((folder / "letters.txt").read_bytes())
    return tmp_path


def settings_of(**values: str) -> config.Config:
    return config.read({"PYTHON_DOTENV_DISABLED": "1", **values})


# ---------------------------------------------------------------------------------------------------------------------
# Every script.

TEXT = {"PROMPT": "Dear", "MAX_NEW_TOKENS": "20", "SAMPLE_SEED": "7"}
SCRIPTS = {
    "load_checkpoint": TEXT,
    "compare_samples": TEXT,
    "verify_checkpoint": {},
    "inspect_checkpoint": {},
    "evaluate_checkpoint": {},
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_prints_of_the_mirror_what_it_prints_of_the_disk(trained, tmp_path, caches, name):
    module, variables, there = script(name), SCRIPTS[name], of_step(trained, 4)
    on_disk = call(module, trained, CHECKPOINT_PATH=there, **variables)
    again = call(module, empty(trained, tmp_path), CHECKPOINT_PATH=address(trained, "4"), **variables)
    assert (on_disk.code, again.code) == (0, 0), again.err
    (cached,) = [*caches.rglob("*.pt")] or [trained / "mirror" / there.name]  # one is only looked at where it is

    def without_paths(said: Said) -> list[str]:
        text = said.out.replace("file://", "")
        for path in (there, cached, there.parent, cached.parent):
            text = text.replace(str(path), "PATH")
        return [" ".join(line.split()) for line in text.splitlines() if "resumes exactly" not in line]

    assert without_paths(again) == without_paths(on_disk)
    assert list(caches.rglob("*.pt")) == ([] if name == "inspect_checkpoint" else [cached])


def test_a_mirror_in_a_folder_with_a_space_in_its_name(trained, tmp_path):
    shutil.copytree(trained / "mirror", tmp_path / "my drive" / "mirror")
    said = call(script("load_checkpoint"), tmp_path, CHECKPOINT_PATH=address(tmp_path / "my drive", "4"), **TEXT)
    assert (said.code, "at step 4," in said.err) == (0, True), said.err


@pytest.mark.parametrize("name", NAMED)
def test_a_name_opens_its_step(trained, tmp_path, name):
    said = call(script("load_checkpoint"), empty(trained, tmp_path), CHECKPOINT_PATH=address(trained, name), **TEXT)
    assert said.code == 0, said.err
    assert f"at step {NAMED[name]}," in said.err


def test_latest_of_a_checkpoint_dir_that_is_an_address(trained, tmp_path):
    said = call(script("load_checkpoint"), empty(trained, tmp_path), CHECKPOINT_DIR=address(trained), **TEXT)
    assert (said.code, "at step 6," in said.err) == (0, True), said.err


def test_chat_answers_from_a_mirror(trained, tmp_path, caches):
    place, alone = (
        empty(trained, tmp_path),
        NOTHING_OF_TRAINING | TEXT | {"PROMPT": None, "XDG_CACHE_HOME": str(caches)},
    )
    said, there = (
        command("scripts/chat.py", place, stdin="Dear\n", **alone, CHECKPOINT_PATH=path)
        for path in (address(trained, "latest"), str(of_step(trained, 6)))
    )
    assert (said.returncode, said.stdout) == (0, there.stdout), said.stderr
    assert said.stdout.strip()


def test_a_run_resumed_from_a_mirror_ends_with_the_bytes_of_one_resumed_from_the_disk(trained, tmp_path, caches):
    more = {"MODE": "resume", "RESUME_TRAINING_STEPS": "2", "RESUME_LEARNING_RATE": "1e-4", "EVAL_INTERVAL": "2"}
    ends = []
    for number, path in enumerate((address(trained, "4"), of_step(trained, 4))):
        (place := tmp_path / str(number)).mkdir()
        said = call(script("load_checkpoint"), empty(trained, place), CHECKPOINT_PATH=path, **more)
        assert said.code == 0, said.err
        ends.append(tensor_bytes(ckpt.load(ckpt.latest(ckpt.find(place / "checkpoints")).path, verify=True)))
    assert ends[0] == ends[1]
    assert len(list(caches.rglob("*.pt"))) == 1  # nothing is saved in the cache


def test_a_checkpoint_is_converted_into_a_folder_here(trained, tmp_path):
    place, module = empty(trained, tmp_path), script("convert_checkpoint")
    refused = call(module, place, CHECKPOINT_PATH=address(trained, "latest"), CONVERT_TO="huggingface")
    assert (refused.code, "OUTPUT" in refused.err) == (2, True)
    done = call(module, place, CHECKPOINT_PATH=address(trained), CONVERT_TO="directory", OUTPUT=place / "new")
    assert done.code == 0, done.err
    assert sorted(found.step for found in ckpt.find(place / "new")) == [2, 4, 6]


def test_the_python_interface_opens_an_address(trained):
    assert milepost.load(address(trained, "best")).step == 6
    assert milepost.verify(address(trained, "2")) == []


# ---------------------------------------------------------------------------------------------------------------------
# List and inspect.


def test_a_list_of_a_mirror_has_the_rows_of_the_folder_that_it_copies(trained, tmp_path):
    module = script("list_checkpoints")
    there, here = (
        json.loads(call(module, trained, FORMAT="json", CHECKPOINT_DIR=place).out)
        for place in (address(trained), str(trained / "checkpoints"))
    )
    assert there["folder"] == address(trained).rstrip("/")
    for each in (*there["checkpoints"], *here["checkpoints"]):
        each["path"] = Path(each["path"]).name
    assert {**there, "folder": ""} == {**here, "folder": ""}


@pytest.mark.parametrize("name", ["list_checkpoints", "inspect_checkpoint"])
def test_looking_at_a_mirror_imports_nothing_heavy(trained, tmp_path, name):
    (tmp_path / "hook").mkdir()
    seen = run(tmp_path, f"scripts/{name}.py", CHECKPOINT_PATH=address(trained, "" if name[0] == "l" else "latest"))
    assert (seen.code, seen.modules & HEAVY) == (0, set()), seen.err
    assert "step0006" in seen.out


def test_two_of_a_mirror_are_compared(trained, tmp_path):
    said = call(
        script("inspect_checkpoint"),
        tmp_path,
        CHECKPOINT_PATH=address(trained, "2"),
        COMPARE_WITH=address(trained, "4"),
    )
    assert (said.code, "tensor" in said.out) == (0, True), said.err


# ---------------------------------------------------------------------------------------------------------------------
# Where a run begins: RESUME, INIT_FROM, BASE_CHECKPOINT.

LORA = {"LORA_RANK": "2", "CHECKPOINT_ADAPTERS_ONLY": "true", "EVAL_INTERVAL": "0"}


def ended(place: Path, **variables: str) -> ckpt.Checkpoint:
    """Train on a fresh machine; return the last checkpoint."""
    code, said = train(place, **SMALL | {"CHECKPOINT_KEEP_BEST": "0"} | variables)
    assert code == 0, said
    return ckpt.load(ckpt.latest(ckpt.find(place / "checkpoints")).path, verify=True)


def machines(trained: Path, tmp_path: Path) -> list[Path]:
    """Two fresh ones."""
    for place in (places := [tmp_path / "one", tmp_path / "other"]):
        place.mkdir()
    return [empty(trained, place) for place in places]


@pytest.mark.parametrize(
    ("name", "named"), [("4", {}), ("latest", {"RESUME_STEP": "4"}), ("best", {"RESUME_STEP": "4"}), ("*step0004*", {})]
)
def test_a_run_resumed_by_an_address_ends_with_the_bytes_of_one_resumed_by_a_path(trained, tmp_path, name, named):
    here, there = machines(trained, tmp_path)
    expected = ended(here, RESUME=str(of_step(trained, 4)))
    record = ended(there, RESUME=address(trained, name), **named)
    assert tensor_bytes(record) == tensor_bytes(expected)
    assert (record.run_id, record.step, record.parent) == (expected.run_id, 6, None)
    settings = (there / "runs" / record.run_id / "config.env").read_text(encoding="utf-8")
    assert f"RESUME={address(trained, name)}" in settings.replace("'", "").replace('"', "")


def test_a_run_that_starts_from_an_address_is_that_which_starts_from_the_path(trained, tmp_path):
    here, there = machines(trained, tmp_path)
    expected = ended(here, INIT_FROM=str(of_step(trained, 4)))
    record = ended(there, INIT_FROM=address(trained, "4"))
    assert tensor_bytes(record) == tensor_bytes(expected)
    assert record.parent == expected.parent
    assert record.parent["file"] == of_step(trained, 4).name


def test_adapters_record_the_address_of_their_base_and_find_it_there(trained, tmp_path, caches):
    """The cache is deleted in between; a base that is named is asked for its weights, as ever."""
    here, there = machines(trained, tmp_path)
    expected = ended(here, INIT_FROM=str(of_step(trained, 4)), **LORA)
    record = ended(there, INIT_FROM=address(trained, "4"), **LORA)
    assert tensor_bytes(record) == tensor_bytes(expected)
    recorded = f"{address(trained)}/{record.parent['run_id']}/{of_step(trained, 4).name}"
    assert record.base == expected.base | {"source": recorded}
    shutil.rmtree(caches)
    code, said = train(there, **SMALL | {"TRAINING_STEPS": "8", "RESUME": "auto"})
    assert code == 0, said
    again = ckpt.load(ckpt.latest(ckpt.find(there / "checkpoints")).path)
    assert (again.step, again.base["source"], len(list(caches.rglob("*.pt")))) == (8, recorded, 1)
    for name, code in (("4", 0), ("2", 3)):
        named = {"CHECKPOINT_PATH": record.path, "BASE_CHECKPOINT": address(trained, name)}
        said = call(script("load_checkpoint"), there, **named, **TEXT)
        assert said.code == code, said.err


@pytest.mark.parametrize("variable", ["RESUME", "INIT_FROM"])
def test_an_address_without_a_checkpoint_is_refused_without_its_secrets(trained, tmp_path, variable):
    code, said = train(empty(trained, tmp_path), **SMALL | {variable: f"{address(trained, 'absent')}?token=a-secret"})
    assert (code, "a-secret" in said, "absent" in said) == (3, False, True), said
    code, said = train(tmp_path, **SMALL | {variable: "nowhere://me:a-secret@b/latest"})
    assert (code, "a-secret" in said) == (2, False), said
    assert not (tmp_path / "checkpoints").exists()
    with pytest.raises(ConfigError) as caught:
        settings_of(INIT_FROM="sftp://me:a-secret@host/run/latest", GPT2_MODEL_NAME="gpt2", MODEL_TYPE="gpt2")
    assert "a-secret" not in str(caught.value)


# ---------------------------------------------------------------------------------------------------------------------
# Refusals.


@pytest.fixture
def damaged(trained, tmp_path) -> Path:
    """A folder with a copy of the mirror in which the newest checkpoint is damaged."""
    shutil.copytree(trained / "mirror", tmp_path / "copy" / "mirror")
    (path,) = (tmp_path / "copy" / "mirror").rglob("*step0006*.pt")
    path.write_bytes(path.read_bytes()[:-100] + bytes(100))
    return empty(trained, tmp_path / "copy")


def test_a_damaged_checkpoint_is_skipped_refused_or_failed(damaged):
    latest = call(script("load_checkpoint"), damaged, CHECKPOINT_PATH=address(damaged, "latest"), **TEXT)
    assert (latest.code, "at step 4," in latest.err, "skipped: " in latest.err) == (0, True, True), latest.err
    for name, path in (
        ("load_checkpoint", "6"),
        ("verify_checkpoint", "latest"),
        ("verify_checkpoint", ""),
        ("convert_checkpoint", "6"),
    ):
        said = call(script(name), damaged, CHECKPOINT_PATH=address(damaged, path), OUTPUT=damaged / "new")
        assert (said.code, "step0006" in said.err) == (3, True), said.err
    assert call(script("verify_checkpoint"), damaged, CHECKPOINT_PATH=address(damaged, "4")).code == 0


def test_what_writes_needs_a_folder(trained, tmp_path):
    place, there = empty(trained, tmp_path), address(trained)
    resume = call(
        script("load_checkpoint"), place, CHECKPOINT_PATH=address(trained, "4"), MODE="resume", CHECKPOINT_DIR=there
    )
    prune = call(script("prune_checkpoints"), place, CHECKPOINT_DIR=there, CHECKPOINT_KEEP_LAST="1")
    code, said = train(place, **SMALL, CHECKPOINT_DIR=there)
    assert [resume.code, prune.code, code] == [2, 2, 2]
    assert all("CHECKPOINT_MIRROR" in err for err in (resume.err, prune.err, said))


def test_a_cache_that_is_too_small_is_refused_with_what_is_needed(trained, tmp_path):
    said = call(
        script("load_checkpoint"), tmp_path, CHECKPOINT_PATH=address(trained, "latest"), CACHE_GB="1e-6", **TEXT
    )
    assert (said.code, "CACHE_GB" in said.err) == (2, True)


@pytest.mark.parametrize("name", ["nothing/latest", "nothing", "mirror/7"])
def test_what_is_not_there_is_not_found(trained, tmp_path, name):
    said = call(script("load_checkpoint"), tmp_path, CHECKPOINT_PATH=f"file://{trained}/{name}", **TEXT)
    assert said.code == 3
    assert len(said.err.strip().splitlines()) == 1


def test_a_password_is_shown_nowhere(tmp_path, monkeypatch):
    monkeypatch.setattr(retrying, "FIRST_PAUSE", 0.0)
    secret = "sftp://me:pass-word@127.0.0.1:1/run/latest?token=a-secret"
    said = call(script("load_checkpoint"), tmp_path, CHECKPOINT_PATH=f"{secret},{secret}", **TEXT)
    assert said.code == (3 if find_spec("paramiko") else 2)  # nothing answers there; the package of sftp is missing
    assert not any(word in said.err + said.out for word in ("pass-word", "a-secret"))
    shown = config.public(settings_of(CHECKPOINT_PATH=f"x={secret},latest"), "CHECKPOINT_PATH")
    assert shown == "x=sftp://***@127.0.0.1:1/run/latest?***,latest"


@pytest.mark.parametrize("value", ["s3://a b", "x=s3:// ", "://b"])
def test_what_is_no_address_is_refused(value):
    with pytest.raises(ConfigError):
        settings_of(CHECKPOINT_PATH=value)


def test_addresses_stay_as_they_are_beside_paths_and_words(tmp_path):
    settings = config.read(
        {"PYTHON_DOTENV_DISABLED": "1", "CHECKPOINT_PATH": "s3://b/run/latest, best,x=gs://b/run,a.pt"}, cwd=tmp_path
    )
    assert settings.checkpoint_path == f"s3://b/run/latest,best,x=gs://b/run,{tmp_path / 'a.pt'}"
    assert settings_of(INIT_FROM="s3://b/run/latest").init_from == "s3://b/run/latest"  # no path in this folder


def test_the_folder_of_a_resumed_run_counts_as_set(trained):
    """Else the run would be saved beside its checkpoint, in the cache."""
    before = settings_of(CHECKPOINT_PATH=address(trained, "4"))
    after = remote.local(before, Log())
    assert (before.is_set("CHECKPOINT_DIR"), after.is_set("CHECKPOINT_DIR")) == (False, True)
    assert after.checkpoint_dir == before.checkpoint_dir
    of_address = remote.local(settings_of(CHECKPOINT_DIR=address(trained)), Log())
    assert of_address.checkpoint_dir == before.checkpoint_dir
    assert caching._in_use
