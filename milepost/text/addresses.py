"""Web addresses without what may be secret in them, for whatever is stored or shown.

A user name, a password and the query, where signatures and keys stand, become `***`. Scheme, host and path stay.
"""

import re

from milepost.text.sources import with_places

HIDDEN = "***"
# What stands before the host. A password may hold a slash or be cut off: then what follows the colon is not a port.
_USER = r"[^/?#]*@|[^/?#@:]*:(?!\d*(?:[/?#]|$))[^?#@]*(?:@|$)"
_ADDRESS = re.compile(
    rf"(?P<before>.*?[A-Za-z][A-Za-z0-9+.-]*://)(?P<user>{_USER})?(?P<place>[^?#]*)(?P<rest>[?#].*)?", re.DOTALL
)

_FORM = re.compile(r"(?i:file)://[^,]+|[A-Za-z][A-Za-z0-9+.-]*://[^,\s]+")  # only names of folders hold spaces


def is_address(text: str) -> bool:
    """Return whether a text is an address, with a scheme."""
    return _FORM.fullmatch(text) is not None


def masked(source: str) -> str:
    """Return a text source, of which each part may be an address, without user names, passwords and queries."""
    return with_places(source, _masked) if "://" in source else source


def _masked(part: str) -> str:
    found = _ADDRESS.fullmatch(part)
    if not found:
        return part
    user, rest = f"{HIDDEN}@" if found["user"] else "", f"?{HIDDEN}" if found["rest"] else ""
    return f"{found['before']}{user}{found['place']}{rest}"


def is_masked(address: str) -> bool:
    """Return whether parts of an address were masked, so that it cannot be opened any more."""
    return masked(address) == address and (f"//{HIDDEN}@" in address or address.endswith(f"?{HIDDEN}"))


def without_secrets(text: str, address: str) -> str:
    """Return a message in which the address, or a part of it that is masked, may stand, with these parts masked."""
    found = _ADDRESS.fullmatch(address)
    text = text.replace(address, masked(address))
    secrets = [found["user"], found["rest"]] if found else []
    secrets += [word for secret in secrets if secret for word in re.split("[:@?#&]", secret) if len(word) > 3]
    for secret in sorted(filter(None, secrets), key=len, reverse=True):
        text = text.replace(secret, HIDDEN)
    return text


def credentials(address: str) -> tuple[str, str | None]:
    """Return the address without what stands before its host, and that part: `user:password`, percent-encoded; None if it has none."""
    found = _ADDRESS.fullmatch(address)
    if not found or not found["user"]:
        return address, None
    return f"{found['before']}{found['place']}{found['rest'] or ''}", found["user"].removesuffix("@")
