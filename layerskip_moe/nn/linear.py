"""Linear: the one product of states with a weight matrix, by whichever way suits the number of rows.

Knows nothing of what is projected. Next: `few_rows.py`, `products.py`.
"""

from torch import Tensor, nn

from layerskip_moe.nn import few_rows
from layerskip_moe.nn.products import many_row_linear


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [..., K] times weight [O, K] transposed, plus bias [O] -> [..., O]. Few rows are computed one like the other,
    whatever their number (`few_rows.py`)."""
    if few_rows.are_few(x):
        return few_rows.linear(x.flatten(0, -2), weight, bias).view(*x.shape[:-1], weight.shape[0])
    return many_row_linear(x, weight, bias)


class Linear(nn.Linear):
    """`nn.Linear` by `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., K] -> [..., O]."""
        return linear(x, self.weight, self.bias)
