"""A metric: the norm of the gradient of each block, beside the norm of all."""

from torch.nn.utils import get_total_norm

import training


def norm_of(block):
    return lambda run: get_total_norm([parameter.grad for parameter in run.model.blocks()[block].parameters()])


training.MEASURES |= {f"grad_norm_block{block}": norm_of(block) for block in range(2)}
