"""Repositories and buckets of the Hugging Face hub as files. Each is sent from where it lies.

The file system of huggingface_hub copies a file into a temporary one first, which stays on the disk when the hub refuses it.
"""

from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, HfFileSystem
from huggingface_hub.hf_file_system import HfFileSystemResolvedBucketPath


class Hub(HfFileSystem):  # type: ignore[misc]
    """A file system of the hub."""

    cachable = False

    def put_file(self, lpath: str, rpath: str, **_: Any) -> None:
        """Write a file."""
        self._send(Path(lpath), rpath)

    def pipe_file(self, path: str, value: bytes, **_: Any) -> None:
        """Write bytes."""
        self._send(value, path)

    def _send(self, source: Path | bytes, path: str) -> None:
        place, api = self.resolve_path(path), HfApi(endpoint=self.endpoint, token=self.token, library_name="milepost")
        if isinstance(place, HfFileSystemResolvedBucketPath):
            api.batch_bucket_files(place.bucket_id, add=[(source, place.path)])
        else:
            named: dict[str, Any] = {"repo_id": place.repo_id, "repo_type": place.repo_type, "revision": place.revision}
            api.upload_file(path_or_fileobj=source, path_in_repo=place.path_in_repo, **named)
        self.invalidate_cache(place.unresolve())
