"""Curves of training runs: a figure over the seconds of training."""

from collections.abc import Sequence
from math import ceil

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from colt5_bench.records.derived import label, varying_fields
from colt5_bench.records.repeats import SEED, Repeats, repeats
from colt5_bench.records.results import Record
from colt5_bench.report.colours import colour

PANELS_PER_ROW = 3
PANEL_SIZE = 4.5, 3.2
"""Size in inches."""


def curves(records: Sequence[Record]) -> Figure | None:
    """The validation curve of the first metric over seconds, as a mean over seeds, with a panel for each case.

    None if no record has such a curve.
    """
    metric = next((name for record in records for name in record.metrics), "")
    curve = f"validation_{metric}"
    drawn = [record for record in records if curve in record.curves]
    if not drawn:
        return None
    groups, varying = repeats(drawn), [name for name in varying_fields(drawn) if name != SEED]
    rows, columns = ceil(len(groups) / PANELS_PER_ROW), min(len(groups), PANELS_PER_ROW)
    width, height = PANEL_SIZE
    figure = Figure(figsize=(columns * width + 2, rows * height), layout="constrained")
    figure.suptitle(f"{records[0].suite} on {records[0].device}", x=0.01, ha="left", weight="bold")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for ax, group in zip(axes, groups, strict=False):
        ax.set_title(label(group[0].records[0].fields, varying))
        _draw(ax, group, curve)
    for ax in axes[len(groups) :]:
        ax.set_visible(False)
    figure.supxlabel("seconds of training")
    figure.supylabel(curve.replace("_", " "))
    handles = {line.get_label(): line for ax in figure.axes for line in ax.get_lines()}
    figure.legend(handles=list(handles.values()), loc="outside right upper")
    return figure


def _draw(ax: Axes, group: Sequence[Repeats], curve: str) -> None:
    for each in group:
        seconds, values = (
            np.mean([record.curves[name] for record in each.records], axis=0) for name in ("seconds", curve)
        )
        ax.plot(seconds, values, color=colour(each.implementation), lw=1.2, label=each.implementation)
