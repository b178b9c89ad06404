"""A mirror on the hub, by the real client and a server on this computer: how objects are sent. Listing is not tried."""

import tempfile
from pathlib import Path

import pytest
from hub_server import UploadHub, upload_hub

from milepost.mirror import Lease, Store, StoreError, opened
from milepost.mirror.lease import EXPIRY, SELDOM

ADDRESS = "hf://me/letters/run"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """The hub, as the client in this process sees it; a folder for temporary files of its own."""
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with upload_hub() as server:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.address)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
        server.private["me/letters"] = True
        yield server


def test_objects_are_sent_from_where_they_lie(hub: UploadHub, tmp_path: Path) -> None:
    store = opened(ADDRESS)
    (tmp_path / "model.safetensors").write_bytes(b"x" * 10**6)
    store.put("one/model.safetensors", tmp_path / "model.safetensors")
    store.put("one/manifest.json", b"{}")
    files = {"run/one/model.safetensors": b"x" * 10**6, "run/one/manifest.json": b"{}"}
    assert hub.files["me/letters"] == files
    hub.refuses = 1
    with pytest.raises(StoreError) as caught:
        store.put("two/model.safetensors", tmp_path / "model.safetensors")
    assert (caught.value.kind, "exceeded your storage" in str(caught.value)) == ("refused", True)
    assert hub.files["me/letters"] == files
    assert list((tmp_path / "temporary").iterdir()) == []


def test_the_file_system_of_the_client_leaves_a_copy(hub: UploadHub, tmp_path: Path) -> None:
    """Control: the same refusal, without what this project adds."""
    from huggingface_hub import HfFileSystem

    fs = HfFileSystem(endpoint=hub.address, skip_instance_cache=True)
    (tmp_path / "model.safetensors").write_bytes(b"x" * 10**6)
    hub.refuses = 1
    with pytest.raises(Exception, match="403"):
        fs.put_file(str(tmp_path / "model.safetensors"), "me/letters/run/model.safetensors")
    (copy,) = (tmp_path / "temporary").iterdir()
    assert copy.stat().st_size == 10**6


def test_a_repository_is_missing_or_refuses_the_token(hub: UploadHub) -> None:
    with pytest.raises(StoreError) as caught:
        opened("hf://me/absent/run").put("x", b"1")
    assert caught.value.kind == "missing"
    hub.token = None
    with pytest.raises(StoreError, match="check the credentials") as caught:
        opened(ADDRESS).put("x", b"1")
    assert (caught.value.kind, "hf_secret" in str(caught.value)) == ("refused", False)


def test_a_repository_gets_few_beats_and_no_store_there_counts_as_exclusive(hub: UploadHub) -> None:
    """Each beat is a commit. The client can only look first and write then."""
    stores: dict[str, Store] = {name: opened(f"hf://{name}/run") for name in ("me/letters", "buckets/me/letters")}
    assert [store.commits for store in stores.values()] == [True, False]
    leases = [Lease(store, "one", say=print) for store in stores.values()]
    assert [lease.expiry for lease in leases] == [SELDOM * EXPIRY, EXPIRY]
    assert [stores["me/letters"].create("x", content) for content in (b"1", b"2")] == [True, True]


@pytest.mark.parametrize("address", ["hf://letters", "hf://buckets/letters", "hf://buckets/letters/"])
def test_an_address_without_an_owner_is_refused(address: str) -> None:
    with pytest.raises(ValueError, match="hf://owner/name"):
        opened(address)
