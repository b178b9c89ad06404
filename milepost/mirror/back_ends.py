"""The file systems of fsspec that a mirror may be on, as it needs them."""

import importlib
import urllib.parse
from typing import Any

from milepost.text.addresses import credentials, without_secrets

# How an address begins -> the package that fsspec needs for it, besides itself.
PACKAGES = {
    "file": None, "s3": "s3fs", "gs": "gcsfs", "az": "adlfs", "abfs": "adlfs", "hf": "huggingface_hub", "sftp": "paramiko",
    "ssh": "paramiko", "webdav+https": "webdav4", "webdav+http": "webdav4",
}  # fmt: skip
# A part of a large file lies in memory while it is sent, so few are at a time. botocore repeats a request by itself, by default
# four times, so that of a large file only the part that broke is sent again.
OPTIONS: dict[str, dict[str, Any]] = {"s3": {"max_concurrency": 2, "use_listings_cache": False}}
CLOUDS = ("s3", "gs", "az", "abfs")  # whose addresses begin with a bucket
BUCKETS = (*CLOUDS, "hf")  # what has no folders
CONNECTED = ("sftp", "ssh")  # what has one connection
# Seconds without an answer after which a WebDAV server counts as gone: it may have to move a large file first.
SILENCE = 60.0


def scheme_of(address: str) -> str:
    """Return how an address begins, without `://`."""
    return address.partition("://")[0].lower()


def file_system(address: str) -> tuple[Any, str]:
    """Return the file system at an address and the path on it; ask it nothing yet.

    Raise ValueError if the address cannot be one, ImportError naming the package that it lacks.
    """
    scheme = scheme_of(address)
    if scheme not in PACKAGES:
        raise ValueError(f"expected an address that begins with {'://, '.join(PACKAGES)}://")
    package = PACKAGES[scheme]
    if package:
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise ImportError(f"{scheme}:// needs the package {package}: pip install {package}") from error
    try:
        fs, root = CONNECT.get(package or "", _by_fsspec)(address)
    except Exception as error:
        raise ValueError(without_secrets(str(error), address)) from None
    if not root.strip("/"):
        raise ValueError("expected a folder or a bucket in the address")
    return fs, root.rstrip("/")


def _by_fsspec(address: str) -> tuple[Any, str]:
    from fsspec.core import url_to_fs

    options = OPTIONS.get(scheme_of(address), {"use_listings_cache": False})
    return url_to_fs(address, skip_instance_cache=True, **options)


def _s3(address: str) -> tuple[Any, str]:
    """Return the file system of a bucket, whose session of botocore sends what it writes at once.

    By default it waits for a server's leave to send it, and aiohttp's timeouts do not count then: a server that says nothing
    would stop the mirror for ever.
    """
    from aiobotocore.session import AioSession
    from botocore.handlers import add_expect_header
    from fsspec.core import url_to_fs

    session = AioSession()
    session.unregister("before-call.s3", add_expect_header)
    fs, root = url_to_fs(address, skip_instance_cache=True, session=session, **OPTIONS["s3"])
    fs.retries = 1
    return fs, root


def _sftp(address: str) -> tuple[Any, str]:
    from milepost.mirror.sftp import Sftp

    place, secret = credentials(address)
    parts = urllib.parse.urlsplit(place)
    if not parts.hostname:
        raise ValueError("expected a host in the address")
    user, _, password = (secret or "").partition(":")
    named = {"username": urllib.parse.unquote(user), "password": urllib.parse.unquote(password), "port": parts.port}
    return Sftp(parts.hostname, **{name: value for name, value in named.items() if value}), parts.path


def _hub(address: str) -> tuple[Any, str]:
    from milepost.mirror.hub import Hub

    root = address.partition("://")[2].strip("/")
    if root.count("/") < (2 if root.startswith("buckets/") else 1):
        raise ValueError("expected hf://owner/name or hf://buckets/owner/name")
    return Hub(), root


def _webdav(address: str) -> tuple[Any, str]:
    """Return the file system of a WebDAV server and the path on it: what fsspec cannot tell from an address."""
    from webdav4.fsspec import WebdavFileSystem

    place, secret = credentials(address)
    parts = urllib.parse.urlsplit(place.partition("+")[2])
    user, _, password = urllib.parse.unquote(secret or "").partition(":")
    host = f"{parts.scheme}://{parts.netloc}"
    auth = (user, password) if secret else None
    return WebdavFileSystem(host, auth=auth, timeout=SILENCE, skip_instance_cache=True), parts.path


CONNECT = {"s3fs": _s3, "paramiko": _sftp, "huggingface_hub": _hub, "webdav4": _webdav}
