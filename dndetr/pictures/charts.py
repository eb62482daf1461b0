"""What all charts share: a figure that needs no display, its colours, axes that say what they show, a PNG of it."""

import io
import warnings

from .fonts import plain

BLUE, CORAL, GREEN, VIOLET, AMBER = "#2d7dd2", "#f0544f", "#1fa774", "#8b5cf6", "#e69f00"
INK, GREY, FAINT = "#22252b", "#8a8f98", "#d9dce1"
DASHED = (0, (4, 2))
DPI = 110


def figure(size: tuple[float, float], title: str = "", letters: float = 15):
    """A figure of this size in inches, in whose constrained layout axes can be made; letters: size of the title's."""
    # Without pyplot there is no global figure list, and no display is ever looked for.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    made = Figure(figsize=size, dpi=DPI, facecolor="white", layout="constrained")
    FigureCanvasAgg(made)
    if title:
        made.suptitle(plain(title), fontsize=letters, fontweight="bold", color=INK, x=0.01, ha="left")
    return made


def png(figure) -> bytes:
    """The figure as a file's content."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        # Of letters that another font of the user's lacks; texts hold what the default one has.
        warnings.filterwarnings("ignore", message="(Glyph .* missing|Matplotlib currently does not support)")
        figure.savefig(buffer, format="png")
    return buffer.getvalue()


def head(axes, title: str) -> None:
    """A title, a faint grid, and no frame above and at the right."""
    axes.set_title(title, loc="left", fontsize=11.5, fontweight="bold", color=INK)
    axes.grid(True, color=FAINT, linewidth=0.7)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.tick_params(colors=INK, labelsize=9, length=0)


def finish(axes, title: str, x: str, log: bool = False, legend: bool = True, whole: bool = True) -> None:
    """What axes with all their lines still lack; whole: x is counted. Without lines they say so."""
    head(axes, title)
    axes.set_xlabel(x, color=INK, fontsize=9.5)
    if whole:
        axes.locator_params(axis="x", integer=True, min_n_ticks=1)
    axes.set_axisbelow(True)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(FAINT)
    if not axes.lines:
        axes.set_xticks([])
        axes.set_yticks([])
        axes.text(0.5, 0.5, "nothing recorded yet", transform=axes.transAxes, ha="center", color=GREY)
        return
    if log and all(value > 0 for line in axes.lines for value in line.get_ydata()):
        axes.set_yscale("log")
        axes.yaxis.get_major_locator().set_params(subs=(1, 2, 5))
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.yaxis.set_minor_formatter(lambda value, _: "")
    if legend:
        axes.legend(frameon=False, fontsize=9, labelcolor=INK)
