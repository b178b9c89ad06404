"""Real file systems, mounted: each name of MOUNTS is a function that yields a new folder on one below a folder.

They need root, /dev/fuse and the programs of Debian that NEEDS names; `bucket` is an S3 bucket of moto's server.
"""

import contextlib
import os
import shutil
import socket
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from work import HANGING

# The programs that each needs, and Debian's packages of them.
NEEDS = {
    "rclone": (["rclone"], "rclone"),
    "sshfs": (["sshfs", "sshd"], "sshfs and openssh-server"),
    "s3fs": (["s3fs"], "s3fs"),
    "ntfs-3g": (["mkntfs", "ntfs-3g"], "ntfs-3g"),
    "fusefat": (["mkfs.vfat", "fusefat"], "dosfstools and fusefat"),
    "btrfs with a quota": (["mkfs.btrfs", "btrfs"], "btrfs-progs"),
    "exfat": (["mkfs.exfat", "mount.exfat-fuse"], "exfatprogs and exfat-fuse"),
}
IMAGE = 64  # MiB of a file system that is an image
Words = Sequence[str | Path]


def missing(name: str) -> str | None:
    """Return what has to be installed to mount `name`; None if nothing has."""
    programs, packages = NEEDS.get(name.partition(",")[0], ([], ""))
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    return None if all(shutil.which(program, path=path) for program in programs) else packages


def await_that(holds: Callable[[], bool], what: Callable[[], str]) -> None:
    """Return as soon as it holds; fail if that never happens."""
    until = time.monotonic() + HANGING
    while not holds():
        if time.monotonic() > until:
            raise AssertionError(what())
        time.sleep(0.05)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def ordinary() -> dict[str, str]:
    """Return the environment without what would send a client of buckets elsewhere."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "RCLONE_"))}


def do(*words: str | Path) -> None:
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{words}: {done.stderr}{done.stdout}"


@contextlib.contextmanager
def serving(
    words: Words, log: Path, ready: Callable[[], bool], **environment: str
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a server until the block ends."""
    with open(log, "ab") as said, subprocess.Popen(
        list(map(str, words)), stdout=said, stderr=said, stdin=subprocess.DEVNULL, env=ordinary() | environment
    ) as server:  # fmt: skip
        try:
            await_that(lambda: server.poll() is not None or ready(), lambda: log.read_text())
            assert server.poll() is None, log.read_text()
            yield server
        finally:
            server.terminate()


@contextlib.contextmanager
def mounted_by(words: Words, folder: Path, *, log: Path | None = None, **environment: str) -> Iterator[Path]:
    """Mount `folder`/mount by a server in the foreground; unmount it when the block ends."""
    place = folder / "mount"
    with serving(words, log or folder / "mount.log", lambda: os.path.ismount(place), **environment) as server:
        (folder / "pid").write_text(str(server.pid))
        try:
            yield place
        finally:
            unmount(place)


def unmount(place: Path) -> None:
    """Unmount, after what is in use was closed; what a server writes late is written by then."""
    for _ in range(200):
        if subprocess.run(["umount", str(place)], capture_output=True, check=False).returncode == 0:
            return
        time.sleep(0.05)
    subprocess.run(["umount", "-l", str(place)], check=False)


def new_places(folder: Path) -> tuple[Path, Path]:
    """Make the folder that a file system keeps its files in, and the one that it is mounted at."""
    back, place = folder / "back", folder / "mount"
    back.mkdir(parents=True, exist_ok=True)
    place.mkdir(exist_ok=True)
    return back, place


# ---------------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def rclone(folder: Path, mode: str = "off", *, remote: str | None = None, **environment: str) -> Iterator[Path]:
    """Mount a folder by rclone, with its cache of files `mode`."""
    back, place = new_places(folder)
    words = ["rclone", "mount", remote or str(back), str(place), "--vfs-cache-mode", mode, "--config", "/dev/null"]
    words += ["--cache-dir", str(folder / "cache"), "--vfs-write-back", "1s", "--dir-cache-time", "2s"]
    with mounted_by(words, folder, **environment) as mount:
        yield mount


@contextlib.contextmanager
def bucket(folder: Path, server: str = "moto_server") -> Iterator[dict[str, str]]:
    """Serve an S3 bucket named `bucket`; yield the settings of a client."""
    folder.mkdir(parents=True, exist_ok=True)
    port = free_port()
    address = f"http://127.0.0.1:{port}"

    def answers() -> bool:
        with contextlib.suppress(OSError), urllib.request.urlopen(address, timeout=10):
            return True
        return False

    with serving([server, "-H", "127.0.0.1", "-p", str(port)], folder / "moto.log", answers):
        urllib.request.urlopen(urllib.request.Request(f"{address}/bucket", method="PUT"), timeout=60).close()
        yield {"endpoint": address}


@contextlib.contextmanager
def s3fs(folder: Path) -> Iterator[Path]:
    new_places(folder)
    secret = folder / "secret"
    secret.write_text("a:b")
    secret.chmod(0o600)
    with bucket(folder) as client:
        options = f"passwd_file={secret},use_path_request_style,url={client['endpoint']}"
        with mounted_by(["s3fs", "bucket", folder / "mount", "-f", "-o", options], folder) as place:
            yield place


@contextlib.contextmanager
def rclone_bucket(folder: Path, mode: str = "off") -> Iterator[Path]:
    with bucket(folder) as client:
        remote = f":s3,provider=Other,access_key_id=a,secret_access_key=b,endpoint='{client['endpoint']}':bucket"
        with rclone(folder, mode, remote=remote) as place:
            yield place


@contextlib.contextmanager
def ssh_server(folder: Path) -> Iterator[int]:
    """Serve SSH to the present user on 127.0.0.1, with keys of its own; yield the port."""
    folder.mkdir(parents=True, exist_ok=True)
    port = free_port()
    for name in ("host", "user"):
        if not (folder / name).exists():
            do("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name)
    shutil.copy(folder / "user.pub", folder / "authorized")
    os.makedirs("/run/sshd", exist_ok=True)
    options = {
        "Port": port, "ListenAddress": "127.0.0.1", "HostKey": folder / "host", "StrictModes": "no", "UsePAM": "no",
        "AuthorizedKeysFile": folder / "authorized", "PidFile": "none", "PasswordAuthentication": "no",
        "Subsystem": "sftp internal-sftp", "PermitRootLogin": "yes",
    }  # fmt: skip
    (folder / "sshd_config").write_text("".join(f"{name} {value}\n" for name, value in options.items()))

    def listens() -> bool:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=5):
            return True
        return False

    words = [shutil.which("sshd") or "/usr/sbin/sshd", "-D", "-e", "-f", folder / "sshd_config"]
    with serving(words, folder / "sshd.log", listens):
        yield port


@contextlib.contextmanager
def sshfs_of(folder: Path, port: int) -> Iterator[Path]:
    """Mount `folder`/back by a running SSH server."""
    back, place = new_places(folder)
    options = f"IdentityFile={folder / 'user'},StrictHostKeyChecking=no,UserKnownHostsFile=/dev/null"
    with mounted_by(["sshfs", f"127.0.0.1:{back}", place, "-f", "-p", str(port), "-o", options], folder) as mount:
        yield mount


@contextlib.contextmanager
def sshfs(folder: Path) -> Iterator[Path]:
    with ssh_server(folder) as port, sshfs_of(folder, port) as place:
        yield place


@contextlib.contextmanager
def overlay(folder: Path) -> Iterator[Path]:
    """An overlay, as the disk of a container is."""
    _, place = new_places(folder)
    for name in ("lower", "work"):
        (folder / name).mkdir()
    options = f"lowerdir={folder / 'lower'},upperdir={folder / 'back'},workdir={folder / 'work'}"
    do("mount", "-t", "overlay", "overlay", "-o", options, place)
    try:
        yield place
    finally:
        unmount(place)


@contextlib.contextmanager
def image(folder: Path, make: Words, mount: Words | None, *, size: int = IMAGE) -> Iterator[Path]:
    """Make a file system in a file, on a loop device, and mount it by `mount` DEVICE PLACE; None: by the kernel."""
    _, place = new_places(folder)
    file = folder / "image"
    with open(file, "wb") as new:
        new.truncate(size * 2**20)
    do(*make, file)
    device = subprocess.run(["losetup", "-f", "--show", str(file)], capture_output=True, text=True, check=True).stdout
    try:
        do(*(mount or ["mount"]), device.strip(), place)
        try:
            yield place
        finally:
            unmount(place)
    finally:
        do("losetup", "-d", device.strip())


@contextlib.contextmanager
def quota(folder: Path) -> Iterator[Path]:
    """A part of a btrfs whose bytes can be limited, by `limit`."""
    with image(folder, ["mkfs.btrfs", "-q"], None, size=256) as place:
        do("btrfs", "quota", "enable", place)
        do("btrfs", "subvolume", "create", place / "part")
        yield place / "part"


def limit(part: Path, size: str) -> None:
    """Set the quota of `part` in bytes; "none" lifts it. Asked in `part` itself, the quota would refuse even that."""
    words = ["btrfs", "inspect-internal", "rootid", str(part)]
    number = subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()
    do("btrfs", "qgroup", "limit", size, f"0/{number}", part.parent)


def break_ext4(place: Path) -> None:
    """Make an ext4 that was mounted with errors=remount-ro read-only, as an error of its disk does."""
    device = subprocess.run(["findmnt", "-no", "SOURCE", str(place)], capture_output=True, text=True, check=True).stdout
    Path(f"/sys/fs/ext4/{Path(device.strip()).name}/trigger_fs_error").write_text("1")


MOUNTS: dict[str, Callable[[Path], contextlib.AbstractContextManager[Path]]] = {
    "rclone": rclone,
    "rclone, minimal": lambda folder: rclone(folder, "minimal"),
    "rclone, writes": lambda folder: rclone(folder, "writes"),
    "rclone, full": lambda folder: rclone(folder, "full"),
    "rclone of a bucket": rclone_bucket,
    "rclone of a bucket, writes": lambda folder: rclone_bucket(folder, "writes"),
    "sshfs": sshfs,
    "s3fs": s3fs,
    "overlay": overlay,
    "ext4": lambda folder: image(folder, ["mkfs.ext4", "-q"], None),
    "small ext4": lambda folder: image(folder, ["mkfs.ext4", "-q", "-m", "0", "-N", "64"], None, size=16),
    "ext4, read-only after an error": lambda folder: image(
        folder, ["mkfs.ext4", "-q"], ["mount", "-o", "errors=remount-ro"]
    ),
    "btrfs with a quota": quota,
    "xfs": lambda folder: image(folder, ["mkfs.xfs", "-q"], None, size=320),
    "ntfs-3g": lambda folder: image(folder, ["mkntfs", "-F", "-q"], ["ntfs-3g"]),
    "exfat": lambda folder: image(folder, ["mkfs.exfat"], ["mount.exfat-fuse"]),
    "fusefat": lambda folder: image(folder, ["mkfs.vfat"], ["fusefat", "-o", "rw+"]),
}
