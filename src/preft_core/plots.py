"""The style of every plot: one colour per system, labels on the data, plain numbers on log axes, spread shown.

Nothing is imported from matplotlib before a plot is drawn, so a command line can import this file.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NAMES = {"base": "base model", "lora": "all-token LoRA", "lora-p": "LoRA-P", "direft-p": "DiReFT-P"}
# colours that stay apart for the colour-blind (Okabe and Ito, 2008)
COLOURS = {"base": "#555555", "lora": "#D55E00", "lora-p": "#0072B2", "direft-p": "#009E73"}
MARKERS = {"base": "D", "lora": "s", "lora-p": "o", "direft-p": "^"}
DPI = 200
_FONT_SIZE = 9


def new_figure(width: float, height: float) -> "Figure":
    """Returns an empty figure of this size in inches.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('plots need matplotlib: pip install "preft-hf[plots]"') from error
    return Figure(figsize=(width, height), layout="constrained")


def draw(
    axes: "Axes",
    system: str,
    x: Sequence[float],
    y: Sequence[float],
    spread: Sequence[tuple[float, float]] | None = None,
    label: str | None = None,
    **style: Any,
) -> None:
    """Draws one system's figures, labelled at its last point. Fewer than three points are no curve.

    Args:
        system: a key of COLOURS
        spread: (low, high) of each point, drawn as a bar
        label: text at the last point; the system's name if it is left out, "" for none
        style: passed on to matplotlib's plot, such as linestyle, alpha or marker
    """
    if not x:
        return
    color = COLOURS[system]
    line = {"linestyle": "-" if len(x) > 2 else "none", "marker": MARKERS[system], "markersize": 4, "linewidth": 1.4}
    axes.plot(x, y, color=color, **(line | style))
    if spread is not None:
        bars = [[abs(value - pair[side]) for value, pair in zip(y, spread, strict=True)] for side in (0, 1)]
        axes.errorbar(x, y, yerr=bars, fmt="none", ecolor=color, elinewidth=1, capsize=2)
    text = NAMES[system] if label is None else label
    if text:
        axes.annotate(
            text, (x[-1], y[-1]), (6, 0), textcoords="offset points", color=color, fontsize=_FONT_SIZE, va="center"
        )


def separate_labels(axes: "Axes") -> None:
    """Moves labels apart that lie over each other, within the axes. The figure must have been laid out."""
    from matplotlib.text import Annotation

    figure = axes.figure
    labels = [text for text in axes.texts if isinstance(text, Annotation) and text.xyann[1] == 0]
    at = {id(text): float(axes.transData.transform(text.xy)[1]) for text in labels}
    gap = 1.25 * _FONT_SIZE * figure.dpi / 72
    labels.sort(key=lambda text: at[id(text)])
    top = axes.bbox.y1 - gap / 2
    places: list[float] = []
    for text in labels:
        places.append(max(at[id(text)], places[-1] + gap) if places else at[id(text)])
    # what was pushed over the top is moved down again, and what is below it with it
    for i in reversed(range(len(places))):
        places[i] = min(places[i], top)
        top = places[i] - gap
    for text, place in zip(labels, places, strict=True):
        text.xyann = (text.xyann[0], (place - at[id(text)]) * 72 / figure.dpi)


def finish_axes(
    axes: "Axes",
    title: str,
    x_label: str,
    y_label: str,
    *,
    log_x: Sequence[float] | None = None,
    log_y: Sequence[float] | None = None,
    room: float = 0.28,
) -> None:
    """Sets what every plot has: a title that says the finding, units, plain numbers on log axes, room for labels.

    Args:
        title: the finding, in one short sentence
        log_x: ticks of a logarithmic x axis; None for a linear one
        log_y: possible ticks of a logarithmic y axis, of which those near the data are shown; None for a linear one
        room: share of the width that is kept free for labels at the right
    """
    import numpy as np

    if log_y is not None:
        values = [y for line in axes.lines for y in np.asarray(line.get_ydata(), dtype=float) if y > 0]
        log_y = [tick for tick in log_y if min(values) / 1.5 <= tick <= max(values) * 1.5]
        axes.set_ylim(min(*values, *log_y) / 1.2, max(*values, *log_y) * 1.2)
        axes.set_yscale("log")
        axes.set_yticks(log_y, labels=[f"{tick:g}" for tick in log_y])
        axes.set_yticks([], minor=True)
    low, high = axes.get_xlim()
    if log_x is not None:
        axes.set_xscale("log")
        axes.set_xticks(list(log_x), labels=[f"{tick:g}" for tick in log_x])
        axes.set_xticks([], minor=True)
        low, high = min(log_x) / 1.15, max(log_x) * 1.15
        axes.set_xlim(low, low * (high / low) ** (1 / (1 - room)))
    else:
        axes.set_xticks([tick for tick in axes.get_xticks() if low <= tick <= high])
        axes.set_xlim(low, low + (high - low) / (1 - room))
    axes.set_title(title, fontsize=_FONT_SIZE + 1, loc="left", fontweight="bold")
    axes.set_xlabel(x_label, fontsize=_FONT_SIZE)
    axes.set_ylabel(y_label, fontsize=_FONT_SIZE)
    axes.tick_params(labelsize=_FONT_SIZE - 1)
    axes.grid(alpha=0.25, linewidth=0.6)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def save(figure: "Figure", file: Path, source: str) -> None:
    """Writes the figure with a line below it that says what was measured, and where.

    Args:
        file: with a suffix, such as .png or .svg, this file; without one an SVG and a PNG of 200 dpi
        source: device, model and command
    """
    from matplotlib import rc_context

    figure.supxlabel(source, fontsize=_FONT_SIZE - 2, color="#555555", x=0.01, ha="left")
    figure.draw_without_rendering()
    for axes in figure.axes:
        separate_labels(axes)
    file.parent.mkdir(parents=True, exist_ok=True)
    # no date and no random ids: the same results give the same file
    with rc_context({"svg.hashsalt": "preft"}):
        for suffix in [file.suffix] if file.suffix else [".svg", ".png"]:
            metadata = {".svg": {"Date": None}, ".png": {"Software": None}}.get(suffix)
            figure.savefig(file.with_suffix(suffix), dpi=DPI, metadata=metadata)
