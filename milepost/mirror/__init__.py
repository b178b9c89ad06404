"""Copies of checkpoints elsewhere, on a store that outlives this computer. docs/mirroring.md has the promises."""

from milepost.mirror.fetching import fetch, fetch_bests, fetch_run, readable, runs_in
from milepost.mirror.lease import Lease, holding
from milepost.mirror.retrying import attempted
from milepost.mirror.sharing import Helper, Sharing
from milepost.mirror.store import Store, StoreError, opened
from milepost.mirror.uploader import Uploader
from milepost.mirror.uploading import Mirrored

__all__ = [
    "Helper",
    "Lease",
    "Mirrored",
    "Sharing",
    "Store",
    "StoreError",
    "Uploader",
    "attempted",
    "fetch",
    "fetch_bests",
    "fetch_run",
    "holding",
    "opened",
    "readable",
    "runs_in",
]
