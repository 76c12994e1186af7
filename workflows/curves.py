"""The curves of a training as a chart."""

import io
from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure


def chart(curves: Mapping[str, Sequence[tuple[int, float]]]) -> str:
    """Lines over steps as SVG, on a log scale; on a symlog scale if some value is not positive.

    Args:
        curves: Name -> (step, value) in the order of steps.
    """
    figure = Figure(figsize=(4.2, 2.7), layout="constrained")
    axes = figure.add_subplot()
    for name, points in curves.items():
        axes.plot(*zip(*points, strict=True), label=name, linewidth=1.2)
    if all(value > 0 for points in curves.values() for _, value in points):
        axes.set_yscale("log")
    else:
        axes.set_yscale("symlog", linthresh=1e-2)
    axes.grid(visible=True, which="both", linewidth=0.3, alpha=0.5)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel("step", fontsize=8)
    axes.tick_params(labelsize=7, which="both")
    figure.legend(frameon=False, fontsize=6, ncols=4, loc="outside lower center")
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()
