"""What torch's compiler is told of every operator."""

from __future__ import annotations

import torch

# the kernels step through memory by the strides that were traced: a compiler may not choose others
TAGS = (torch.Tag.needs_exact_strides,)
