"""SFTP as fsspec has it, over connections that may break: one on which something went wrong is replaced by another."""

import contextlib
from pathlib import Path
from typing import Any, Literal

import paramiko
from fsspec.callbacks import Callback, NoOpCallback
from fsspec.implementations.sftp import SFTPFileSystem

SILENCE = 60.0  # seconds without an answer after which a server counts as gone
CONFIG = Path("~/.ssh/config")


class Sftp(SFTPFileSystem):  # type: ignore[misc]
    """A file system that connects at the first request and, after `disconnect`, at the next one."""

    cachable = False

    def _connect(self) -> None:
        """Do nothing yet: a server that is away when a run starts may be there later."""

    def __getattr__(self, name: str) -> Any:
        if name != "ftp":  # which is missing while there is no connection
            raise AttributeError(name)
        self.client = paramiko.SSHClient()
        self.client.load_system_host_keys()  # so that the key of a known host may not change
        self.client.set_missing_host_key_policy(paramiko.AutoAddPolicy())
        seconds = dict.fromkeys(("timeout", "banner_timeout", "auth_timeout", "channel_timeout"), SILENCE)
        self.client.connect(**{**_configured(self.host), **self.ssh_kwargs, **seconds})
        self.ftp = self.client.open_sftp()
        self.ftp.get_channel().settimeout(SILENCE)
        return self.ftp

    def disconnect(self) -> None:
        """Close the connection, if there is one."""
        for name in ("ftp", "client"):
            if (end := self.__dict__.pop(name, None)) is not None:
                with contextlib.suppress(Exception):  # it is broken
                    end.close()

    def pipe_file(self, path: str, value: bytes, mode: Literal["overwrite", "create"] = "overwrite", **_: Any) -> None:
        """Write bytes; with the mode "create" only if the server creates the file, else raise FileExistsError."""
        try:
            file = self.ftp.open(path, "wxb" if mode == "create" else "wb")
        except OSError as error:  # servers have no common code for a file that exists
            if mode == "create" and self.exists(path):
                raise FileExistsError(path) from error
            raise
        with file:
            file.write(value)

    def put_file(self, lpath: str, rpath: str, callback: Callback | None = None, **_: Any) -> None:
        """Write a file, and report what has arrived."""
        moved = callback or NoOpCallback()
        self.ftp.put(lpath, rpath, callback=lambda done, _: moved.absolute_update(done))


def _configured(host: str) -> dict[str, Any]:
    """Return how to connect to a host by the user's own configuration of ssh, if there is one."""
    try:
        own = paramiko.SSHConfig.from_path(str(CONFIG.expanduser())).lookup(host)
    except OSError:
        return {"hostname": host}
    named = {"hostname": own["hostname"], "username": own.get("user"), "key_filename": own.get("identityfile")}
    return {name: value for name, value in named.items() if value} | (
        {"port": int(own["port"])} if "port" in own else {}
    )
