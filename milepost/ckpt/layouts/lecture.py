"""The model of Karpathy's GPT lecture in one file, read only: the weights of its separate heads are joined, and its ReLU
is kept.
"""

import re

from milepost.ckpt.layouts.foreign_layout import torch_archive

HEAD = re.compile(r"blocks\.0\.sa\.heads\.0\.key\.weight$")

LAYOUT = torch_archive("lecture", lambda keys: any(map(HEAD.search, keys)))
