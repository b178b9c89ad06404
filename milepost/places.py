"""Where the project lies, and the folders that follow from it: a checkout, or a package that pip installed.

An installed package is not a place to write to, so its defaults are relative to the current folder and its caches are
the user's.
"""

import os
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
ROOT = PACKAGE.parent  # of the repository; site-packages where the package is installed
IN_CHECKOUT = (ROOT / "pyproject.toml").is_file()
SHIPPED = ROOT if IN_CHECKOUT else PACKAGE  # its data/ and scripts/ are the repository's: setup.py puts them there
DATA_FOLDER = SHIPPED / "data"
SCRIPTS_FOLDER = SHIPPED / "scripts"
CACHES = ("tokens", "downloads", "hashes")


def base_folder() -> Path:
    """Return the folder that default paths are relative to: the checkout,
    or the current folder where the package is installed.
    """
    return ROOT if IN_CHECKOUT else Path.cwd()


def cache_folder(user_caches: Path) -> Path:
    """Return the folder of caches: data/.cache of a checkout that can be written,
    else `milepost` in the user's folder of caches.
    """
    own = DATA_FOLDER / ".cache"
    writable = IN_CHECKOUT and all(can_be_written(own / name) for name in CACHES)
    return own if writable else user_caches / "milepost"


def can_be_written(folder: Path) -> bool:
    """Return whether this process may write in the folder, or create it."""
    existing = next(place for place in (folder, *folder.parents) if place.exists())
    return os.access(existing, os.W_OK | os.X_OK)
