"""An optimizer: signs of a momentum in bfloat16, with a scale for each row and a count,
as Lion and Adafactor keep them.
"""

import torch

from milepost.runtime import optimizers


class Signs(torch.optim.Optimizer):
    def __init__(self, named, *, lr, weight_decay, **_):
        super().__init__(named, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state, gradient = (
                    self.state[parameter],
                    parameter.grad.flatten(1) if parameter.dim() > 1 else parameter.grad[:, None],
                )
                if not state:
                    state["momentum"] = torch.zeros_like(parameter, dtype=torch.bfloat16)
                    state["rows"] = torch.zeros(len(parameter))
                    state["count"] = torch.zeros((), dtype=torch.int64)
                state["count"] += 1
                state["rows"].lerp_(gradient.square().mean(1), 0.1)
                state["momentum"].lerp_(parameter.grad.bfloat16(), 0.1)
                scale = (state["rows"] / (1 - 0.9 ** state["count"].item())).sqrt().clamp(max=1.0)
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.sub_(group["lr"] * state["momentum"].sign() * scale.view(-1, *[1] * (parameter.dim() - 1)))


optimizers.register("signs", lambda model, **settings: Signs(model.named_parameters(), **settings))
