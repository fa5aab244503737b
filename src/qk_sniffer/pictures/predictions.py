"""Position as it is predicted from the vectors of a head."""

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes


def draw_predictions(axes: Axes, positions: npt.ArrayLike, predicted: npt.ArrayLike) -> None:
    """Predicted against true positions, a dot for each token, and the line where they are equal.

    Args:
        axes: Where it is drawn.
        positions: (N,) true positions.
        predicted: (N,) what ``geometry.predicted_positions`` gives.
    """
    true = np.asarray(positions, float)
    ends = [true.min(), true.max()]
    axes.plot(
        ends, ends, color=axes.xaxis.label.get_color(), linewidth=1, linestyle="--", label="equal"
    )
    axes.scatter(true, np.asarray(predicted, float), s=6, alpha=0.5, linewidths=0, label="a token")
    axes.set(xlabel="position", ylabel="predicted position")
    axes.legend(loc="upper left", frameon=False)
