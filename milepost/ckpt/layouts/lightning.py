"""Lightning's `.ckpt`, read only: the weights are in `state_dict`, under the module's name in the LightningModule."""

from milepost.ckpt.layouts.foreign_layout import torch_archive

LAYOUT = torch_archive("lightning", lambda keys: "pytorch-lightning_version" in keys)
