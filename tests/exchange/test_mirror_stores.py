"""Mirrors on servers of other kinds, each with a client of its own: a full run, a resume on an empty disk, and opening by an address.

Nothing leaves this computer.
"""

import asyncio
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from drive import logged, newest, tensor_bytes, train
from mirrors import SMALL, halves, lose
from script import call, script

from milepost.mirror import opened

pytestmark = pytest.mark.exchange
PASSWORD = "pass-word"


@contextmanager
def sftp(root: Path) -> Iterator[str]:
    """A server of asyncssh, whose root is the folder."""
    import asyncssh

    class Server(asyncssh.SSHServer):
        def password_auth_supported(self) -> bool:
            return True

        def validate_password(self, username: str, password: str) -> bool:
            return (username, password) == ("me", PASSWORD)

    async def start() -> asyncssh.SSHAcceptor:
        return await asyncssh.create_server(
            Server, "127.0.0.1", 0, server_host_keys=[asyncssh.generate_private_key("ssh-ed25519")],
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
        assert halves(opened(address)) == []
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
