"""Download training text over https, once: a local copy is used as long as its sha256 is the recorded one."""

import base64
import contextlib
import hashlib
import http.client
import json
import re
import urllib.parse
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

from milepost.files import new_file, remove_abandoned
from milepost.text.addresses import credentials, is_masked, masked, without_secrets
from milepost.text.errors import DataError
from milepost.text.readers import READERS, SUPPORTED, suffix_of
from milepost.text.stamps import file_sha256, remembered

CHUNK = 1 << 20  # bytes per read
DOWNLOAD_LIMIT = 1 << 30  # bytes
TINY_SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
TINY_SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


class _HttpsOnly(urllib.request.HTTPRedirectHandler):
    """Follows redirects as urllib does, but only to https."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        if not newurl.lower().startswith("https://"):
            problem = f"{masked(req.full_url)} redirects to {masked(newurl)}, which is not https"
            raise DataError(f"{problem}: use another address")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def open_https(url: str) -> Any:
    """Return the response of an https address, for reading. `user:password@` before the host is sent as basic authentication."""
    plain, user = credentials(url)
    request = urllib.request.Request(plain, headers={"User-Agent": "milepost"})  # some servers refuse urllib's own name
    if user is not None:
        encoded = base64.b64encode(urllib.parse.unquote_to_bytes(user)).decode()
        request.add_unredirected_header("Authorization", f"Basic {encoded}")
    return urllib.request.build_opener(_HttpsOnly).open(request, timeout=30)


def fetch(
    url: str,
    *,
    data_dir: Path,
    cache_dir: Path | None = None,
    max_bytes: int = DOWNLOAD_LIMIT,
    open_url: Callable[[str], Any] = open_https,
    sha256: str | None = None,
) -> Path:
    """Return a local copy of `url`, downloaded into `cache_dir` (by default `data_dir/.cache`) unless an intact one is there.

    A copy in `data_dir/.cache`, which may be read-only, is used too. The JSON file beside a copy records sha256 and size.

    A masked address, as checkpoints hold it, names the latest download whose address is masked to the same. Raise DataError
    for a scheme other than https, an unsupported suffix, more than `max_bytes`, an incomplete download, a hash other than
    `sha256`, or a masked address of which there is no copy. No message holds a password or a query.
    """
    cache = cache_dir or data_dir / ".cache"
    target, packed = (folder / "downloads" / _download_name(url) for folder in (cache, data_dir / ".cache"))
    if is_masked(url):
        return _latest_copy(url, {target.parent, packed.parent}, cache)
    for copy in (target, packed):
        if _is_intact(copy, cache):
            return copy
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        remove_abandoned(target.parent)
        found = _download(url, target, max_bytes=max_bytes, open_url=open_url, sha256=sha256)
        with new_file(_record_of(target), replace=True) as file:
            file.write(json.dumps({"url": masked(url), **found}, indent=1).encode())
    except (OSError, ValueError, http.client.HTTPException) as error:
        reason = without_secrets(str(error), url).strip("<>")
        raise DataError(f"{masked(url)} could not be downloaded: {reason}") from None
    return target


def tiny_shakespeare(
    data_dir: Path, *, cache_dir: Path | None = None, open_url: Callable[[str], Any] = open_https
) -> Path:
    """Return the file of tiny Shakespeare, from `data_dir` or downloaded. Raise DataError if its sha256 is wrong."""
    local = data_dir / "tinyshakespeare.txt"
    if not local.is_file():
        try:
            return fetch(
                TINY_SHAKESPEARE_URL,
                data_dir=data_dir,
                cache_dir=cache_dir,
                open_url=open_url,
                sha256=TINY_SHAKESPEARE_SHA256,
            )
        except DataError as error:
            raise DataError(f"put the text of tiny Shakespeare at {local} and start again, because {error}") from error
    if (found := _cached_sha256(local, cache_dir or data_dir / ".cache")) != TINY_SHAKESPEARE_SHA256:
        expected = f"expected {TINY_SHAKESPEARE_SHA256} ({TINY_SHAKESPEARE_URL})"
        raise DataError(f"{local} is not tiny Shakespeare: its sha256 is {found}, {expected}; rename or replace it")
    return local


def _download_name(url: str) -> str:
    """Return the file name of a download. Raise DataError if the URL is not https or no reader exists for its suffix."""
    scheme, _, path = url.partition("://")
    if scheme.lower() != "https":
        raise DataError(
            f"{masked(url)}: only https is supported: write https://, or download the file and set its path"
        )
    name = re.split("[?#]", path)[0].rsplit("/", 1)[-1]
    if suffix_of(name) not in READERS:
        raise DataError(f"{masked(url)}: unsupported file type: expected {SUPPORTED}")
    safe = re.sub(r"[^A-Za-z0-9._-]", "_", name)[-80:]
    return f"{hashlib.sha256(url.encode()).hexdigest()[:16]}_{safe}"


def _download(
    url: str, target: Path, *, max_bytes: int, open_url: Callable[[str], Any], sha256: str | None
) -> dict[str, Any]:
    digest, size = hashlib.sha256(), 0
    shown = masked(url)
    too_large = DataError(f"{shown} is larger than {max_bytes:,} bytes: download it yourself and set its path")
    with open_url(url) as response, new_file(target, replace=True) as file:
        announced = response.headers.get("Content-Length")
        if announced and int(announced) > max_bytes:
            raise too_large
        while block := response.read(CHUNK):
            size += len(block)
            if size > max_bytes:
                raise too_large
            digest.update(block)
            file.write(block)
        if announced and size != int(announced):
            raise DataError(f"{shown} broke off after {size:,} of {int(announced):,} bytes: try again")
        if sha256 and digest.hexdigest() != sha256:
            raise DataError(f"{shown} is not the expected file: its sha256 is {digest.hexdigest()}, not {sha256}")
    return {"sha256": digest.hexdigest(), "bytes": size}


def _latest_copy(address: str, folders: set[Path], cache: Path) -> Path:
    """Return the latest intact download of a masked address. Raise DataError if there is none."""
    found: list[tuple[int, Path]] = []
    for record in (record for folder in folders for record in folder.glob("*.json")):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
            if masked(json.loads(record.read_bytes())["url"]) == address:
                found.append((record.stat().st_mtime_ns, record))
    for _, record in sorted(found, reverse=True):
        if _is_intact(copy := record.with_suffix(""), cache):
            return copy
    raise DataError(
        f"{address}: its user name and query were not stored, and no copy is left: set the whole address again"
    )


def _record_of(copy: Path) -> Path:
    return copy.with_name(copy.name + ".json")


def _is_intact(copy: Path, cache: Path) -> bool:
    try:
        return bool(json.loads(_record_of(copy).read_bytes())["sha256"] == _cached_sha256(copy, cache))
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _cached_sha256(path: Path, cache: Path) -> str:
    """Return the sha256 of a file, which is read whole only if it has changed."""
    return str(remembered("sha256", [path], cache / "hashes", lambda: file_sha256(path)))
