"""A metric: the norm of the gradient of each block, beside the norm of all."""

from torch.nn.utils import get_total_norm

import training


def block_norms(run):
    gradients = [[p.grad for p in block.parameters() if p.grad is not None] for block in run.model.blocks()]
    return {f"grad_norm_block{number}": get_total_norm(each) for number, each in enumerate(gradients) if each}


training.MEASURES.append(block_norms)
