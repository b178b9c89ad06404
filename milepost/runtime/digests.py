"""Digests of tensors, taken where they lie and equal on every device, so cheap that training can take them.

A digest is the sum, modulo 2**64, of a tensor's 64-bit words, each multiplied by an odd number that belongs to its
place. One flipped bit always changes it; any other change is missed once in 2**64. It finds faults, not malice: what
must resist that has a sha256.
"""

import functools
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from milepost.splitmix import splitmix64

WORDS = 1 << 16  # words in a row: the odd numbers of a row stay in the cache
ROWS = 256  # rows at a time on a device, whose products take as much memory again


def digests(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Return the digest of each tensor's bytes by its name."""
    taken = {name: _digest(tensor.detach()) for name, tensor in tensors.items()}
    elsewhere = {name: value for name, value in taken.items() if isinstance(value, Tensor)}
    if elsewhere:  # one transfer for all
        values = torch.stack(list(elsewhere.values())).tolist()
        taken |= {name: value % 2**64 for name, value in zip(elsewhere, values, strict=True)}
    return taken  # type: ignore[return-value]


def differing(one: Mapping[str, object], other: Mapping[str, object]) -> list[str]:
    """Return the names whose digests differ, or that only one of the two has."""
    return [name for name in {**one, **other} if one.get(name) != other.get(name)]


def _digest(tensor: Tensor) -> int | Tensor:
    """Return the digest of the bytes; of a tensor on a device as a tensor there, which may not be computed yet."""
    flat = tensor.contiguous().reshape(-1)
    if flat.storage_offset() * flat.element_size() % 8:
        flat = flat.clone()  # so that its bytes can be read as words
    raw = flat.view(torch.uint8)
    if len(raw) % 8:
        raw = torch.cat([raw, raw.new_zeros(-len(raw) % 8)])
    words = raw.view(torch.int64)
    if tensor.device.type == "cpu":
        return _on_cpu(words.numpy().view(np.uint64))  # one thread: this may run beside training
    return _on_device(words)


def _on_cpu(words: np.ndarray) -> int:
    whole, odd = len(words) // WORDS, _odd_numbers(WORDS)
    sums = np.append(
        np.einsum("ij,j->i", words[: whole * WORDS].reshape(whole, WORDS), odd),
        np.dot(words[whole * WORDS :], odd[: len(words) % WORDS]),
    )  # one for each row
    return int(np.dot(sums, _odd_numbers(len(sums))))


def _on_device(words: Tensor) -> Tensor:
    """Return the same sum on the words' device, 0-dim int64: its bits are those of the unsigned sum."""
    odd = torch.from_numpy(_odd_numbers(WORDS).view(np.int64)).to(words.device)
    whole = len(words) // WORDS
    parts = [(rows * odd).sum(1) for rows in words[: whole * WORDS].view(whole, WORDS).split(ROWS)]
    rest = words[whole * WORDS :]
    sums = torch.cat([*parts, (rest * odd[: len(rest)]).sum().view(1)])
    return (sums * torch.from_numpy(_odd_numbers(len(sums)).view(np.int64)).to(words.device)).sum()


@functools.lru_cache(maxsize=16)
def _odd_numbers(count: int) -> np.ndarray:
    """Return the odd numbers of the first `count` places, uint64."""
    return splitmix64(np.arange(count, dtype=np.uint64)) | np.uint64(1)
