"""Products of weights and rows in which a row that is not finite reaches only what attends it.

A weight outside the mask is 0, and 0 times NaN or infinity is NaN. So where rows are not finite, their part is added by itself, cell by
cell. Callers look once a call whether they are, by `all_finite`, and multiply as usual where they are.
"""

from __future__ import annotations

import torch
from torch import Tensor


def all_finite(*tensors: Tensor) -> bool:
    """Whether no tensor holds NaN or infinity. A tensor whose sum overflows counts as one that does; it waits for the device.

    While a CUDA graph is captured nobody can look at values, and the answer is True.
    """
    if tensors[0].is_cuda and torch.cuda.is_current_stream_capturing():
        return True
    # A sum makes no tensor of the inputs' size; of halves it is made in float32.
    sums = [x.sum(dtype=torch.float64 if x.dtype == torch.float64 else torch.float32) for x in tensors]
    return bool(torch.isfinite(torch.stack(sums)).all())


def attended_product(weights: Tensor, rows: Tensor, outside: Tensor | None) -> Tensor:
    """``weights [b, m, n] @ rows [b, n, e]``, where only the cells that are attended count.

    ``outside``: ``[m, n]`` bool, the cells that are not attended, whose weights are 0; None where all are attended.
    """
    is_bad = ~torch.isfinite(rows).all(dim=-1).all(dim=0)  # [n]
    product = torch.bmm(weights.masked_fill(is_bad, 0.0), rows.masked_fill(is_bad.unsqueeze(-1), 0.0))
    for n in torch.nonzero(is_bad).flatten().tolist():
        part = weights[:, :, n, None] * rows[:, n, None, :]  # [b, m, e]
        product += part if outside is None else part.masked_fill(outside[:, n, None], 0.0)
    return product
