"""A store of copies: a bucket, or a folder of another disk or machine, reached through fsspec by its address.

What a back end raises becomes a StoreError here: one line, without passwords and tokens, and a kind that says what to do.
"""

import contextlib
import errno
import io
import os
import posixpath
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

from milepost.files import CHUNK, discard, hidden_name, make_folder, new_file, sync_file, sync_folder, written
from milepost.mirror.back_ends import BUCKETS, CLOUDS, CONNECTED, file_system, scheme_of
from milepost.text.addresses import masked, without_secrets

PART, MOST_PARTS = 5 * 2**20, 9000  # bytes of a part of a large object at least, and how many parts S3 takes
UNSUPPORTED = (TypeError, NotImplementedError)  # of a back end that knows no such option
MODE: dict[str, Any] = {"mode": "create"}  # how most back ends are asked to create an object that must not exist
UNPROVED = ("hf",)  # whose back end would look first and write then, which proves nothing
# Servers of WebDAV look first and write then too, also if asked with `If-None-Match`; a folder they create in one step.
CLAIMED, CLAIM = ("webdav+https", "webdav+http"), ".created"
READ_AHEAD = 16 * 2**20  # bytes
COPIED = 2**18  # bytes of a file that are copied at a time: they fit into the processor's cache
# What S3 says if a signature is more than 15 minutes old or ahead, and if an object exists that must not.
CLOCK_IS_WRONG, EXISTS = "RequestTimeTooSkewed", "PreconditionFailed"
NO_CREDENTIALS = ("NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError", "TokenRetrievalError")
DENIALS = ("AuthenticationException", "BadHostKeyException")  # of SSH
NO_KEY = "No authentication methods available"  # what paramiko says without a class of its own
LONGEST = 300  # characters of what a back end says

# missing: no such object or bucket. refused: another attempt gets the same answer. passing: it may pass.
Kind = Literal["missing", "refused", "passing"]


class StoreError(Exception):
    """A store did not do what it was asked to; `kind` says whether another attempt may help."""

    def __init__(self, where: str, problem: str, kind: Kind) -> None:
        self.problem, self.kind = problem, kind
        super().__init__(f"{where}: {problem}")


@dataclass(frozen=True)
class Store:
    """The objects below an address. Names are relative to it, with slashes.

    Its folders on a disk of this computer are written durably, each object whole or not at all.
    """

    fs: Any  # an fsspec file system
    root: str
    address: str  # as it was set; never shown

    @property
    def shown(self) -> str:
        """The address without user name, password and query."""
        return masked(self.address)

    @property
    def is_local(self) -> bool:
        """Whether the objects are files of this computer."""
        return scheme_of(self.address) == "file"

    @property
    def has_folders(self) -> bool:
        """Whether a folder has to be created before an object in it."""
        return scheme_of(self.address) not in BUCKETS

    @property
    def claims(self) -> bool:
        """Whether an object is created by creating a folder first."""
        return scheme_of(self.address) in CLAIMED

    @property
    def commits(self) -> bool:
        """Whether each object that is written is a commit of a repository."""
        return scheme_of(self.address) == "hf" and not self.root.startswith("buckets/")

    def put(
        self, name: str, source: Path | bytes, *, moved: Callable[[int], None] = lambda size: None, piece: int = 0
    ) -> None:
        """Write an object from a file or from bytes, over one of the same name. Raise StoreError.

        Call `moved` with the bytes of each part that has arrived; with `piece`, this thread writes so many bytes at a
        time, and `moved` may pause.
        """
        path = self._path(name)
        with self._naming(name):
            if self.is_local:
                _copy_durably(source, Path(path), moved, piece=piece or COPIED)
                return
            if self.has_folders:
                self.fs.makedirs(posixpath.dirname(path), exist_ok=True)
            if piece:
                self._put_in_pieces(path, source, moved, piece=piece)
            elif isinstance(source, bytes):
                self.fs.pipe_file(path, source)
            else:
                from fsspec.callbacks import Callback

                self.fs.put_file(str(source), path, callback=Callback(hooks={"moved": lambda *_, **__: moved(0)}))

    def _put_in_pieces(self, path: str, source: Path | bytes, moved: Callable[[int], None], *, piece: int) -> None:
        size = len(source) if isinstance(source, bytes) else source.stat().st_size
        file = self.fs.open(path, "wb", block_size=max(PART, size // MOST_PARTS))
        try:
            with _content(source) as content:
                while data := content.read(piece):
                    file.write(data)
                    moved(len(data))
            file.close()
        except BaseException:
            with contextlib.suppress(Exception):  # parts that stay cost money
                file.discard()
            raise

    def create(self, name: str, content: bytes) -> bool:
        """Write a small object unless there is one of its name; return whether it was written. Raise StoreError.

        A store that cannot do that writes over it, and returns True. On WebDAV, a process that ends in the middle leaves a
        name that nothing can be created under, and no object.
        """
        path = self._path(name)
        with self._naming(name):
            try:
                if self.is_local:
                    _create_durably(Path(path), content)
                    return True
                if self.has_folders:
                    self.fs.makedirs(posixpath.dirname(path), exist_ok=True)
                if self.claims:
                    self._claim(path)
                self.fs.pipe_file(path, content, **({} if self.claims or scheme_of(self.address) in UNPROVED else MODE))
            except FileExistsError:
                return False
            except Exception as error:
                # s3fs knows the code only of Amazon's own servers, which say more.
                if _code(error) == EXISTS or _status(error) == 412:
                    return False
                if not (isinstance(error, UNSUPPORTED) or getattr(error, "errno", None) == errno.ENOSYS):
                    raise
                self.fs.pipe_file(path, content)
        return True

    def _claim(self, path: str) -> None:
        """Create the folder that gives the right to create an object. Raise FileExistsError if another process has it."""
        for attempt in range(2):
            try:
                return self.fs.mkdir(path + CLAIM, create_parents=False)
            except FileExistsError:
                raise
            except Exception:  # some servers answer so where another process was faster by a hair
                if attempt:
                    raise

    def size(self, name: str) -> int:
        """Return the bytes of an object. Raise StoreError."""
        with self._naming(name):
            self.fs.invalidate_cache()
            return int(self.fs.info(self._path(name))["size"])

    def read(self, name: str, *, limit: int) -> bytes:
        """Return the content of a small object. Raise StoreError, also if it has more than `limit` bytes."""
        if self.size(name) > limit:
            raise StoreError(f"{self.shown}/{name}", f"is larger than {limit} bytes", "refused")
        with self._naming(name):
            return bytes(self.fs.cat_file(self._path(name)))

    def ranges(self, name: str, spans: Sequence[tuple[int, int]]) -> list[tuple[int, bytes]]:
        """Return begin and bytes of each span of an object, given by begin and end. Raise StoreError."""
        begins, ends = [begin for begin, _ in spans], [end for _, end in spans]
        with self._naming(name):
            data = self.fs.cat_ranges([self._path(name)] * len(spans), begins, ends, on_error="raise")
        return [(begin, bytes(each)) for begin, each in zip(begins, data, strict=True)]

    def get(self, name: str, target: Path) -> dict[str, Any]:
        """Write an object into `target`, a file in a hidden folder, durably; return its size and sha256. Raise StoreError, and OSError
        if the disk here refuses it.
        """
        target.unlink(missing_ok=True)  # of an attempt that broke off
        with contextlib.ExitStack() as held:
            with self._naming(name):
                source = held.enter_context(self.fs.open(self._path(name), "rb", block_size=READ_AHEAD))
            file = held.enter_context(written(target, hashed=True))
            while data := self._next(name, source):
                file.write(data)
        return file.entry

    def _next(self, name: str, source: IO[bytes]) -> bytes:
        with self._naming(name):
            return source.read(CHUNK)

    def names(self, below: str = "") -> list[str]:
        """Return the names of all objects, or of those in the folder `below`, sorted; empty if there are none.

        Raise StoreError, also if the bucket is missing.
        """
        with self._naming(below):
            self.fs.invalidate_cache()
            found = self._found(self._path(below).rstrip("/"))
            if not found and scheme_of(self.address) in CLOUDS:
                self._check_bucket()
        return sorted(map(self._name, found))

    def _found(self, folder: str) -> dict[str, int]:
        """Return the bytes of all objects below a folder by their paths; empty if it is not there."""
        try:
            if not self.has_folders:
                return {path: int(entry["size"]) for path, entry in self.fs.find(folder, detail=True).items()}
            listed = self.fs.ls(folder, detail=True)  # fsspec's `find` leaves out a folder that it cannot list
        except FileNotFoundError:  # or it was deleted meanwhile
            return {}
        found: dict[str, int] = {}
        for entry in listed:
            found |= self._found(entry["name"]) if entry["type"] == "directory" else {entry["name"]: int(entry["size"])}
        return found

    def _check_bucket(self) -> None:
        """Raise StoreError if the bucket is missing: back ends list it as empty."""
        bucket = self.root.partition("/")[0]
        with contextlib.suppress(PermissionError):  # one may have rights in a part of a bucket only
            try:
                self.fs.info(bucket)
            except FileNotFoundError:
                raise StoreError(self.shown, f"there is no bucket {bucket}", "missing") from None

    def sizes(self) -> dict[str, int]:
        """Return the bytes of all objects by their names. Raise StoreError."""
        with self._naming(""):
            self.fs.invalidate_cache()
            found = self._found(self.root)
        return {self._name(path): size for path, size in found.items()}

    def delete(self, name: str) -> None:
        """Delete an object, if it is there. Raise StoreError."""
        with self._naming(name), contextlib.suppress(FileNotFoundError):
            self.fs.rm_file(self._path(name))
            if self.is_local:
                self._remove_empty_folders(Path(self._path(name)).parent)
        if self.claims:
            with self._naming(name), contextlib.suppress(FileNotFoundError):
                self.fs.rm_file(self._path(name) + CLAIM)

    def _remove_empty_folders(self, folder: Path) -> None:
        with contextlib.suppress(OSError):  # the first that holds something
            while folder.is_relative_to(self.root) and folder != Path(self.root):
                folder.rmdir()
                folder = folder.parent

    def _path(self, name: str) -> str:
        return f"{self.root}/{name}"

    def _name(self, path: str) -> str:
        """Return the name of an object by its path, which some back ends list without its first slash."""
        return path.lstrip("/").removeprefix(self.root.lstrip("/")).lstrip("/")

    @contextlib.contextmanager
    def _naming(self, name: str) -> Iterator[None]:
        """Raise StoreError naming the object instead of whatever a back end raises."""
        try:
            yield
        except StoreError:
            raise
        except Exception as error:
            text = " ".join(without_secrets(str(error) or type(error).__name__, self.address).split())
            where, kind = "/".join(filter(None, (self.shown, name))), _kind(error)
            if kind == "passing" and scheme_of(self.address) in CONNECTED:
                self.fs.disconnect()
            raise StoreError(where, f"{_sentence(error, text):.{LONGEST}}", kind) from None


def opened(address: str) -> Store:
    """Return the store at an address; ask it nothing yet.

    Raise ValueError if the address cannot be one, ImportError naming the package that it lacks.
    """
    fs, root = file_system(address)
    return Store(fs, root, address.rstrip("/"))


def _content(source: Path | bytes) -> IO[bytes]:
    return io.BytesIO(source) if isinstance(source, bytes) else open(source, "rb")


def _copy_durably(source: Path | bytes, target: Path, moved: Callable[[int], None], *, piece: int) -> None:
    make_folder(target.parent)
    with new_file(target, replace=True) as file, _content(source) as content:
        while data := content.read(piece):
            file.write(data)
            moved(len(data))


def _create_durably(target: Path, content: bytes) -> None:
    """Create a file that is seen whole, or raise FileExistsError. A rename would replace what another process created."""
    make_folder(target.parent)
    hidden = hidden_name(target)
    try:
        hidden.write_bytes(content)
        sync_file(hidden)
        try:
            os.link(hidden, target)
        except FileExistsError:
            raise
        except OSError:  # a file system without hard links
            with open(target, "xb") as file:
                file.write(content)
            sync_file(target)
    finally:
        discard(hidden)
    sync_folder(target.parent)


def _kind(error: Exception) -> Kind:
    if isinstance(error, FileNotFoundError):
        return "missing"
    refused = isinstance(error, PermissionError | NotADirectoryError | IsADirectoryError) or _is_denied(error)
    return "refused" if refused or type(error).__name__ in NO_CREDENTIALS else "passing"


def _is_denied(error: Exception) -> bool:
    """Whether a server knows who asks and refuses, or does not know it."""
    names = {each.__name__ for each in type(error).__mro__}
    return _status(error) in (401, 403) or not names.isdisjoint(DENIALS) or str(error) == NO_KEY


def _status(error: Exception) -> int | None:
    """Return the HTTP status with which a server answered, if it did."""
    status = getattr(error, "status_code", None) or getattr(getattr(error, "response", None), "status_code", None)
    return status if isinstance(status, int) else None


def _code(error: Exception) -> str:
    """Return the code with which a server that speaks S3 refused; empty if it did not."""
    response = getattr(error.__cause__, "response", None)
    return str(response.get("Error", {}).get("Code", "")) if isinstance(response, dict) else ""


def _sentence(error: Exception, text: str) -> str:
    """Return what went wrong and, where that is known, what to do."""
    if type(error).__name__ in NO_CREDENTIALS:
        return f"{text}: set the credentials where its own tools look for them"
    if _code(error) == CLOCK_IS_WRONG:
        return f"{text}: set the clock of this computer"
    if isinstance(error, PermissionError) or _is_denied(error):
        return f"access is refused ({text}): check the credentials and what they may do there"
    if isinstance(error, FileNotFoundError):
        return "not found" if error.strerror else f"not found ({text})"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return text
