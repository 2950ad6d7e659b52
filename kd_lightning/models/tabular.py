"""Networks for rows of numbers."""

from collections.abc import Sequence

from torch import Tensor, nn


class TabularMLP(nn.Module):
    """Hidden layers with ReLU, and a linear one.

    Args:
        outputs: Number of values, or of classes.
        in_features: Numbers in a row.
        widths: Units of each hidden layer.
        dropout: After each hidden layer.

    Shape: (B, in_features) to (B, outputs). Layers to tap: ``hidden.0`` (B, widths[0]), ``hidden.1`` and so on.

    Raises:
        ValueError: For no hidden layer, or one without units.
    """

    def __init__(
        self, outputs: int = 1, in_features: int = 10, widths: Sequence[int] = (64, 64), dropout: float = 0.0
    ) -> None:
        super().__init__()
        if not widths or min(widths) < 1:
            raise ValueError(f"expected widths of one or more hidden layers, 1 or more each, got {list(widths)}")
        self.hidden = nn.ModuleList(
            nn.Sequential(nn.Linear(a, b), nn.ReLU()) for a, b in zip([in_features, *widths], widths, strict=False)
        )
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(widths[-1], outputs)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.hidden:
            x = self.dropout(layer(x))
        values: Tensor = self.head(x)
        return values
