"""RMSNorm: PyTorch's, and for few rows the one that gives each row the same beside any number of others.

Next: `few_rows.py`.
"""

from torch import Tensor, nn

from layerskip_moe.nn import few_rows


class RMSNorm(nn.RMSNorm):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension (arXiv 1910.07467)."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        if few_rows.are_few(x.flatten(2) if x.dim() == 4 else x):  # heads are not counted as rows
            assert self.eps is not None
            return few_rows.norm(x if x.dim() == 2 else x.flatten(0, 1), self.weight, self.eps).view(x.shape)
        return super().forward(x)
