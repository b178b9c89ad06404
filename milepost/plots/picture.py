"""Draw runs into a file with matplotlib."""

import math
from pathlib import Path
from typing import Any

from milepost.files import replacing
from milepost.plots.curves import PANELS, Drawn, Panel, columns_of, origin, panels, points, smoothed, weights_only
from milepost.screen import harmless

SUFFIXES = {".png", ".svg", ".pdf"}
TITLE = "loss (nats per token): training thin, validation thick with dots"  # of a picture's first panel
HIDDEN = "_"  # label of a curve that the legend does not list


def draw_file(runs: list[Drawn], output: Path) -> None:
    """Write the charts and a legend to `output`, atomically."""
    from matplotlib.figure import Figure  # without pyplot, no screen is needed

    drawn = [panel for panel in panels(runs) if panel.split != "validation"]  # which the first panel has
    rows = 1 + math.ceil((len(drawn) - 1) / 2)
    figure = Figure(figsize=(12, 4 * rows), layout="constrained")
    cells = figure.add_gridspec(rows, 2)
    places = [
        cells[0, :],
        *(cells[1 + at // 2, at % 2] for at in range(len(drawn) - 1)),
    ]  # the losses over the whole width
    for panel, place in zip(drawn, places, strict=True):
        axes = figure.add_subplot(place, sharex=figure.axes[0] if figure.axes else None)
        for number, run in enumerate(runs):
            draw_curve(axes, run, panel, number)
        axes.set_title(TITLE if panel is PANELS[0] else panel.title, fontsize=10, parse_math=False)
        axes.grid(alpha=0.3)
        if panel.from_zero:
            axes.set_ylim(bottom=0)
    for axes in figure.axes[-2:]:  # the lowest of each column
        axes.set_xlabel("optimizer step", fontsize=9)
    handles = [line for line in figure.axes[1].lines if line.get_label() != HIDDEN]
    legend = figure.legend(handles, list(map(legend_of, runs)), loc="outside lower center", fontsize=8)
    for text in legend.get_texts():
        text.set_parse_math(False)  # a dollar sign in a name is not mathematics
    with replacing(output) as temporary:
        figure.savefig(temporary, dpi=120)
        if output.suffix.lower() == ".svg":
            temporary.write_text(dark_too(temporary.read_text(encoding="utf-8")), encoding="utf-8")


def draw_curve(axes: Any, run: Drawn, panel: Panel, number: int) -> None:
    """Draw a run into a panel; its validation loss too, thick and with dots, beside its training loss, smoothed if it is long."""
    style = {"color": f"C{number}", "linestyle": "-" if run.requested else "--"}
    xs, ys = columns_of(points(run, panel))
    if panel is not PANELS[0]:
        axes.plot(xs, ys, linewidth=1, label=legend_of(run), **style)
        return
    smooth = smoothed(ys)
    if smooth != ys:
        axes.plot(xs, ys, linewidth=0.6, alpha=0.25, label=HIDDEN, **style)
    axes.plot(xs, smooth, linewidth=1, label=legend_of(run), **style)
    axes.plot(*columns_of(points(run, PANELS[1])), marker="o", markersize=3, linewidth=2, label=HIDDEN, **style)


def dark_too(svg: str) -> str:
    """Return the picture with a style that turns its lightness around where the reader's screen is dark."""
    start, end, rest = svg.partition("<svg ")
    tag, close, content = rest.partition(">")
    style = "<style>@media (prefers-color-scheme: dark) { svg { filter: invert(1) hue-rotate(180deg); } }</style>"
    return f"{start}{end}{tag}{close}\n {style}{content}"


def legend_of(run: Drawn) -> str:
    """Return the run's name, its parent, and the settings in which it differs."""
    begun = "" if run.parent is None else f" ({origin(run)})" if weights_only(run) else f" (from {origin(run)})"
    return harmless(f"{run.name}{begun}{': ' * bool(run.label)}{run.label}", one_line=True)
