"""nanoGPT's `ckpt.pt`, read only: its settings are in `model_args`, and its characters in a `meta.pkl` beside it."""

from milepost.ckpt.layouts.foreign_layout import torch_archive

LAYOUT = torch_archive("nanogpt", lambda keys: keys >= {"model", "model_args"})
