"""The bigram model: the next token's logits are one row of a table, looked up by the current token."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn
from torch.nn import functional as F

from models.model import Model, Output

MAX_TABLE_BYTES = 2 * 2**30  # AdamW keeps four such tables while training


@dataclass(frozen=True)
class BigramSettings:
    """The settings of a Bigram. block_size is the length of its training sequences; the model itself sees one token."""

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
    """The count of tokens seen: there is nothing else to keep."""

    length: int = 0


class Bigram(Model):
    """One table of logits (V, V): row i scores every token as the successor of token i."""

    settings_type: ClassVar = BigramSettings
    settings: BigramSettings

    def __init__(self, settings: BigramSettings) -> None:
        super().__init__(settings)
        self.token_embedding_table = nn.Embedding(settings.vocab_size, settings.vocab_size)
        # Near-uniform predictions: training then starts at a loss of log(V), with nothing to unlearn.
        nn.init.normal_(self.token_embedding_table.weight, std=0.02)

    @property
    def packs(self) -> bool:
        return True

    def forward(
        self,
        ids: Tensor,
        targets: Tensor | None = None,
        positions: Tensor | None = None,
        *,
        cache: BigramCache | None = None,
        last_only: bool = False,
    ) -> Output:
        """Return the logits (B, T, V) of each next token, (B, 1, V) with last_only, and the mean loss in nats if
        targets are passed.

        ids and targets are int64 (B, T). A cache only counts; positions change nothing, as no token before the current one does.
        """
        if cache is not None:
            cache.length += ids.size(1)
        logits = self.token_embedding_table(ids[:, -1:] if last_only else ids)  # (B, T, V)
        if targets is None:
            return Output(logits, None, {})
        return Output(logits, F.cross_entropy(logits.float().flatten(0, 1), targets.flatten()), {})

    def new_cache(self, batch_size: int) -> BigramCache:
        """Return an empty cache for forward()."""
        return BigramCache()

    def activation_bytes(self, batch_size: int, *, bytes_per_value: int, device_type: str | None = None) -> int:
        """Return about how many bytes a training step needs besides weights, gradients and optimizer state:
        the logits' copies.
        """
        tokens = batch_size * self.settings.block_size
        return tokens * self.settings.vocab_size * (bytes_per_value + 12)
