"""The bigram model: the next token's logits are one row of a table, looked up by the current token."""

from dataclasses import dataclass
from typing import Final

from torch import Tensor, nn
from torch.nn import functional as F

MAX_TABLE_BYTES = 2 * 2**30  # AdamW keeps four such tables while training


@dataclass(frozen=True)
class BigramSettings:
    """What builds a Bigram. block_size is the length of its training windows; the model itself sees one token."""

    vocab_size: int
    block_size: int

    def __post_init__(self) -> None:
        table_bytes = 4 * self.vocab_size**2
        if table_bytes > MAX_TABLE_BYTES:
            raise ValueError(
                f"vocab_size={self.vocab_size}: the bigram model's table of vocab_size x vocab_size logits would take "
                f"{table_bytes / 2**30:.1f} GiB, at most {MAX_TABLE_BYTES // 2**30} GiB is expected; "
                "use TOKENIZER=char, byte or bpe, or MODEL_TYPE=gpt2."
            )


@dataclass
class BigramCache:
    """Takes the place of GPT2's cache: there is nothing to keep but the count of tokens seen."""

    length: int = 0


class Bigram(nn.Module):
    """One table of logits (V, V): row i scores every token as the successor of token i."""

    model_type: Final = "bigram"
    max_length: Final = None  # forward() takes any length, so generating never slides

    def __init__(self, settings: BigramSettings) -> None:
        super().__init__()
        self.settings = settings
        self.token_embedding_table = nn.Embedding(settings.vocab_size, settings.vocab_size)
        # Near-uniform predictions: training then starts at a loss of log(V), with nothing to unlearn.
        nn.init.normal_(self.token_embedding_table.weight, std=0.02)

    def forward(
        self,
        ids: Tensor,
        targets: Tensor | None = None,
        *,
        cache: BigramCache | None = None,
        last_only: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """The logits (B, T, V) of each next token, (B, 1, V) with last_only, and the mean loss in nats if targets.

        ids and targets are int64 (B, T). A cache only counts.
        """
        if cache is not None:
            cache.length += ids.size(1)
        logits = self.token_embedding_table(ids[:, -1:] if last_only else ids)  # (B, T, V)
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())

    def new_cache(self, batch_size: int) -> BigramCache:
        """An empty cache for forward(); the same call as GPT2's."""
        return BigramCache()

    def activation_bytes(self, batch_size: int, *, bytes_per_value: int) -> int:
        """About how many bytes a training step needs beside weights, gradients and optimizer: the logits' copies."""
        tokens = batch_size * self.settings.block_size
        return tokens * self.settings.vocab_size * (bytes_per_value + 12)
