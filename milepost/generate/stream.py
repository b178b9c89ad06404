"""Text out of token ids that arrive one by one."""

import codecs
from collections.abc import Sequence

from milepost.text.tokenization import Tokenizer


class StreamDecoder:
    """Text that may be shown while ids arrive: no half characters, nothing of a stop string.

    Everything pushed and flushed together is `decode(ids)` up to the stop string that begins first; `stopped` says
    that one was found.
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
        """The text that can be shown now that `token_id` has come."""
        return self._shown(self._utf8.decode(self._tokenizer.decode_bytes([token_id])), final=False)

    def flush(self) -> str:
        """The text still held back, when no more ids come."""
        return self._shown(self._utf8.decode(b"", final=True), final=True)

    def _shown(self, text: str, *, final: bool) -> str:
        if self.stopped:
            return ""
        self._held += text
        found = min((at for stop in self._stop if (at := self._held.find(stop)) >= 0), default=len(self._held))
        pending = len(self._held) if final else self._pending()
        self.stopped = found < len(self._held) and found <= pending
        end = min(found, pending)
        shown, self._held = self._held[:end], self._held[end:]
        return shown

    def _pending(self) -> int:
        """Where the text held begins to look like a stop string that has not wholly arrived."""
        longest = max(map(len, self._stop), default=1)
        for at in range(max(0, len(self._held) - longest + 1), len(self._held)):
            if any(stop.startswith(self._held[at:]) for stop in self._stop):
                return at
        return len(self._held)
