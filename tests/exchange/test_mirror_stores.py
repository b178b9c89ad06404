"""Mirrors on servers of other kinds, each with a client of its own: a full run, a resume on an empty disk, opening by an address,
and what becomes of them when a connection breaks or is refused.

Nothing leaves this computer.
"""

import asyncio
import itertools
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
from drive import logged, newest, tensor_bytes, train
from mirrors import SMALL, halves, lose, steps, taken
from s3_server import free_ports
from script import call, script
from work import HANGING

from milepost.locks import RunHeldElsewhereError
from milepost.mirror import Lease, StoreError, attempted, holding, opened, runs_in

pytestmark = pytest.mark.exchange
PASSWORD = "pass-word"


@contextmanager
def sftp(root: Path, *, port: int = 0, broken: list[Callable[[], object]] | None = None) -> Iterator[str]:
    """A server of asyncssh, whose root is the folder; `broken` gets what breaks each connection."""
    import asyncssh

    class Server(asyncssh.SSHServer):
        def connection_made(self, connection: asyncssh.SSHServerConnection) -> None:
            if broken is not None:
                broken.append(lambda: loop.call_soon_threadsafe(connection.abort))

        def password_auth_supported(self) -> bool:
            return True

        def validate_password(self, username: str, password: str) -> bool:
            return (username, password) == ("me", PASSWORD)

    async def start() -> asyncssh.SSHAcceptor:
        return await asyncssh.create_server(
            Server, "127.0.0.1", port, server_host_keys=[asyncssh.generate_private_key("ssh-ed25519")],
            sftp_factory=lambda channel: asyncssh.SFTPServer(channel, chroot=str(root)),
        )  # fmt: skip

    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    server = asyncio.run_coroutine_threadsafe(start(), loop).result()
    try:
        yield f"sftp://me:{PASSWORD}@127.0.0.1:{server.get_port()}/run"
    finally:
        loop.call_soon_threadsafe(server.close)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()


@contextmanager
def webdav(root: Path) -> Iterator[str]:
    """A server of wsgidav, whose root is the folder."""
    from cheroot import wsgi
    from wsgidav.wsgidav_app import WsgiDAVApp

    users = {"*": {"me": {"password": PASSWORD}}}
    app = WsgiDAVApp({"provider_mapping": {"/": str(root)}, "simple_dc": {"user_mapping": users}, "verbose": 0})
    server = wsgi.Server(("127.0.0.1", 0), app)
    server.prepare()
    thread = threading.Thread(target=server.serve, daemon=True)
    thread.start()
    try:
        yield f"webdav+http://me:{PASSWORD}@127.0.0.1:{server.bind_addr[1]}/run"
    finally:
        server.stop()
        thread.join()


@pytest.fixture(params=[sftp, webdav])
def address(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    (tmp_path / "root").mkdir()
    with request.param(tmp_path / "root") as place:
        yield place


@pytest.mark.parametrize("serve", [sftp, webdav])
def test_a_run_resumes_on_an_empty_disk_and_its_checkpoint_opens_by_its_address(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, serve: Callable
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    (tmp_path / "root").mkdir()
    with serve(tmp_path / "root") as address:
        variables = SMALL | {"CHECKPOINT_MIRROR": address}
        code, said = train(tmp_path, **variables)
        assert (code, PASSWORD in said) == (0, False), said
        whole, lines = tensor_bytes(newest(tmp_path)), logged(tmp_path)
        store = opened(address)
        assert (steps(taken(store)), halves(store)) == ([6], [])
        assert {name for name in store.names() if not name.startswith(taken(store)[0].run_id)} == {"latest.json"}
        store.delete("latest.json")  # the listing is enough
        lose(tmp_path)
        code, said = train(tmp_path, **variables, RESUME="auto")
        assert (code, "from the mirror: " in said) == (0, True), said
        assert (tensor_bytes(newest(tmp_path)), logged(tmp_path)) == (whole, lines)
        for name in ("inspect_checkpoint", "verify_checkpoint"):
            seen = call(script(name), tmp_path, CHECKPOINT_PATH=f"{address}/latest")
            assert (seen.code, PASSWORD in seen.out + seen.err) == (0, False), seen.err
        listed = call(script("list_checkpoints"), tmp_path, CHECKPOINT_DIR=address)
        assert (listed.code, "step0006" in listed.out, PASSWORD in listed.out) == (0, True, False), listed.err
        refused = call(script("list_checkpoints"), tmp_path, CHECKPOINT_DIR=address.replace("/run", "/absent"))
        assert (refused.code, len(refused.err.strip().splitlines())) == (3, 1), refused.err


def test_a_lease_is_exclusive(address: str) -> None:
    own = Lease(opened(address), "one", say=pytest.fail)
    with holding(own):
        assert own.exclusive
        with pytest.raises(RunHeldElsewhereError):
            Lease(opened(address), "one", say=pytest.fail).hold()
    with holding(Lease(opened(address), "one", say=pytest.fail)):
        assert opened(address).names("one/lease") == ["one/lease/00000002.beat", "one/lease/00000002.json"]


def test_of_processes_that_create_one_object_at_once_one_succeeds(address: str) -> None:
    stores, barrier = [opened(address) for _ in range(4)], threading.Barrier(4)
    stores[0].put("there", b"")  # and with it the folder

    def create(number: int) -> bool:
        barrier.wait(HANGING)
        return stores[number].create("one", str(number).encode())

    with ThreadPoolExecutor(4) as threads:
        for _ in range(30):
            created = list(threads.map(create, range(4)))
            assert created.count(True) == 1
            assert stores[0].read("one", limit=10) == str(created.index(True)).encode()
            stores[0].delete("one")


def test_of_processes_that_take_a_lease_at_once_one_holds_it(address: str) -> None:
    leases, barrier = [Lease(opened(address), "one", say=print) for _ in range(4)], threading.Barrier(4)

    def take(lease: Lease) -> bool:
        barrier.wait(HANGING)
        try:
            attempted(lease.hold, pause=lambda seconds: None)
        except RunHeldElsewhereError:
            return False
        return True

    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(take, leases)).count(True) == 1
    for lease in leases:
        lease.release()


def test_a_process_that_died_while_it_took_a_lease_holds_it_no_longer_than_others(tmp_path: Path) -> None:
    (tmp_path / "root" / "run" / "one" / "lease" / "00000001.json.created").mkdir(parents=True)
    now = itertools.count()
    with (
        webdav(tmp_path / "root") as address,
        holding(Lease(opened(address), "one", say=print, pause=lambda seconds: None, clock=lambda: 5.0 * next(now))),
    ):
        assert opened(address).names("one/lease") == ["one/lease/00000002.beat", "one/lease/00000002.json"]
    assert 90 / 5 <= next(now) < 90 / 5 + 10


def test_a_wrong_password_is_refused_before_the_first_step(tmp_path: Path, address: str) -> None:
    code, said = train(tmp_path, **SMALL, CHECKPOINT_MIRROR=address.replace(PASSWORD, "wrong-word"))
    assert (code, said.count("access is refused")) == (2, 1), said
    assert (PASSWORD in said, "wrong-word" in said) == (False, False)
    assert list((tmp_path / "checkpoints").glob("checkpoint*")) == []


def test_a_connection_that_broke_is_replaced(tmp_path: Path) -> None:
    """A broken one is no empty store either."""
    (tmp_path / "root").mkdir()
    broken: list[Callable[[], object]] = []
    with sftp(tmp_path / "root", broken=broken) as address:
        store = opened(address)
        store.put("one/00000001-0123456789abcdef/manifest.json", b"{}")
        (tmp_path / "large").write_bytes(b"x" * 10**6)
        for number, ask in enumerate(
            (
                store.names,
                store.sizes,
                lambda: store.put("small", b"x"),
                lambda: store.put("large", tmp_path / "large"),
                lambda: store.put("large", tmp_path / "large", piece=10**5),
                lambda: store.get("large", tmp_path / "again"),
            )
        ):
            store.size("one/00000001-0123456789abcdef/manifest.json")
            assert len(broken) == number + 1
            transport = store.fs.client.get_transport()
            broken[-1]()
            transport.join(HANGING)  # it has noticed
            with pytest.raises(StoreError) as caught:
                ask()
            assert caught.value.kind == "passing"
        assert [*runs_in(store, pause=pytest.fail)] == ["one"]
        moved: list[int] = []
        store.put("large", tmp_path / "large", moved=moved.append)
        assert len(moved) > 10  # the end of a run sees that something arrives
        store.get("large", tmp_path / "again")
        assert (tmp_path / "again").read_bytes() == (tmp_path / "large").read_bytes()


def test_a_server_that_is_away_at_the_start_may_come_later(tmp_path: Path) -> None:
    (port,) = free_ports(1)
    (tmp_path / "root").mkdir()
    store = opened(f"sftp://me:{PASSWORD}@127.0.0.1:{port}/run")
    with pytest.raises(StoreError) as caught:
        store.names()
    assert caught.value.kind == "passing"
    with sftp(tmp_path / "root", port=port):
        attempted(lambda: store.put("x", b"1"), pause=pytest.fail)
        assert store.names() == ["x"]


def test_ssh_keeps_to_the_known_hosts_and_to_the_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A host may be unknown; the key of a known one may not be another."""
    import asyncssh

    (ssh := tmp_path / "home" / ".ssh").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(ssh.parent))
    (tmp_path / "root").mkdir()
    with sftp(tmp_path / "root") as address:
        port = address.rpartition(":")[2].partition("/")[0]
        (ssh / "config").write_text(f"Host box\n  HostName 127.0.0.1\n  Port {port}\n  User me\n", encoding="utf-8")
        store = opened(f"ssh://:{PASSWORD}@box/run")
        store.put("x", b"1")
        assert store.names() == ["x"]
        other = asyncssh.generate_private_key("ssh-ed25519").export_public_key().decode().split()[:2]
        (ssh / "known_hosts").write_text(f"[127.0.0.1]:{port} {' '.join(other)}\n", encoding="utf-8")
        with pytest.raises(StoreError, match="does not match") as caught:
            opened(address).names()
        assert caught.value.kind == "refused"
