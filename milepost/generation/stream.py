"""Text from token ids that arrive one by one."""

import codecs
from collections.abc import Sequence

from milepost.text.tokenization.base import Tokenizer


class StreamDecoder:
    """Decodes ids as they arrive, and holds back incomplete characters and possible stop strings.

    The concatenated output of push() and flush() is `decode(ids)` up to the stop string that begins first; `stopped` is
    True once one was found.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        if "" in stop:
            raise ValueError("a stop string is empty")
        self.stopped = False
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""

    def push(self, token_id: int) -> str:
        """Return the text that `token_id` completes."""
        return self._release(self._utf8.decode(self._tokenizer.decode_bytes([token_id])), final=False)

    def flush(self) -> str:
        """Return the text still held back, when no more ids follow."""
        return self._release(self._utf8.decode(b"", final=True), final=True)

    def _release(self, text: str, *, final: bool) -> str:
        if self.stopped:
            return ""
        self._held += text
        found = min((at for stop in self._stop if (at := self._held.find(stop)) >= 0), default=len(self._held))
        pending = len(self._held) if final else self._pending()
        self.stopped = found < len(self._held) and found <= pending
        end = min(found, pending)
        released, self._held = self._held[:end], self._held[end:]
        return released

    def _pending(self) -> int:
        """Return the position in the held text where an incomplete stop string may begin."""
        longest = max(map(len, self._stop), default=1)
        for at in range(max(0, len(self._held) - longest + 1), len(self._held)):
            if any(stop.startswith(self._held[at:]) for stop in self._stop):
                return at
        return len(self._held)
