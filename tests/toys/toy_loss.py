"""An auxiliary loss: a GPT-2 whose log-normalisers are drawn towards 0 in training (the z-loss of PaLM,
Chowdhery et al. 2022).
"""

from torch.nn import functional as F

import models
from models.gpt2 import GPT2
from models.model import Output

WEIGHT = 1e-4


class ZLossGPT2(GPT2):
    def forward(self, ids, targets=None, **options):
        logits = super().forward(ids, **options).logits
        if targets is None:
            return Output(logits, None, {})
        cross_entropy = F.cross_entropy(logits.float().mT, targets)
        if not self.training:  # validation is in nats per token
            return Output(logits, cross_entropy, {})
        z_loss = WEIGHT * logits.float().logsumexp(-1).square().mean()
        return Output(logits, cross_entropy + z_loss, {"cross_entropy": cross_entropy, "z_loss": z_loss})


models.register("zgpt2", ZLossGPT2, defaults=models.MODELS["gpt2"].defaults, hidden_matrices=True)
