"""The caches of earlier texts, so that a text that begins as one of them did is not read from its beginning.

A conversation grows at its end, and the texts of a request have one prompt. What a decoder has read of them in whole chunks
has the bits that it would have if it were read anew (decoder), so which texts were read before changes no text.
"""

import weakref
from collections import deque
from collections.abc import Sequence
from operator import itemgetter

from milepost.generation.decoder import DecodeCache, Decoder
from models.model import Cache, Model


class Prefixes:
    """The caches of the latest `most` texts, of any decoders. For one thread at a time."""

    def __init__(self, *, most: int) -> None:
        self._kept: deque[tuple[weakref.ref[Decoder], DecodeCache]] = deque(maxlen=most)

    def cache_for(self, generator: Model | Decoder, ids: Sequence[int]) -> Cache | None:
        """Return a cache for a text that begins with `ids`, which begins with as many of them, but the last, as a kept one has.

        It is kept too. That of a model without a fast decoder is new, or None if the model has none.
        """
        cache = generator.new_cache(batch_size=1)
        if not isinstance(generator, Decoder) or not isinstance(cache, DecodeCache):
            return cache
        if generator.chunk < len(ids) <= generator.max_length:
            same = [kept for decoder, kept in self._kept if decoder() is generator]
            lengths = ((_shared(kept.prefix, ids[:-1]), kept) for kept in same)
            shared, nearest = max(lengths, default=(0, cache), key=itemgetter(0))
            if whole := shared // generator.chunk * generator.chunk:
                cache.begin_as(nearest, whole)
            self._kept.append((weakref.ref(generator), cache))
        return cache


def _shared(left: Sequence[int], right: Sequence[int]) -> int:
    """Return how many items at the beginning are equal."""
    return next((at for at, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))
