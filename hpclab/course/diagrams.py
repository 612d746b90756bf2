"""Figures of ideas, which show no measurement."""

from matplotlib.axes import Axes

from hpclab import figures
from hpclab.figures import Values, curve, look
from hpclab.language import translate_drawn as _

Steps = list[list[tuple[int, int]]]
"""Of each step, the messages: from which rank to which."""


def speedups(workers: Values, curves: dict[str, Values], ax: Axes | None = None) -> Axes:
    """Draw speed-up against workers, a line a law.

    Parameters
    ----------
    workers : array_like, shape (k,)
    curves : dict of str to array_like, shape (k,)
        By the name to show.
    """
    ax = figures.axes(ax)
    for place, (name, values) in enumerate(curves.items()):
        ax.plot(workers, values, label=name, markevery=max(1, len(workers) // 8), **look(place))
    words = [curve(name, workers, values) for name, values in curves.items()]
    return figures.finish(ax, [{"source": "formula"}], _("workers"), _("speed-up"), words)


def collectives(ranks: int = 8) -> None:
    """Draw who sends to whom when a ring and a tree sum up a vector: time runs down, a thick arrow is all of its bytes.

    Parameters
    ----------
    ranks : int, default 8
        A power of two.
    """
    _shown, axes = figures.subplots(1, 2, size=(9, 5))
    ring: Steps = [[(rank, rank + 1) for rank in range(ranks)]] * (2 * (ranks - 1))
    _messages(axes[0], _("ring"), ring, ranks, _("{parts} of the bytes", parts=f"1/{ranks}"), 0.8)
    _messages(axes[1], _("tree"), tree(ranks), ranks, _("all of the bytes"), 3)
    axes[1].set_ylim(axes[0].get_ylim())


def tree(ranks: int) -> Steps:
    """Who sends to whom in each step: first sums on their way to rank 0, then the whole sum on its way back.

    Examples
    --------
    >>> tree(4)
    [[(1, 0), (3, 2)], [(2, 0)], [(0, 2)], [(0, 1), (2, 3)]]
    """
    halves = [2**level for level in range(ranks.bit_length() - 1)]
    up = [[(rank + half, rank) for rank in range(0, ranks, 2 * half)] for half in halves]
    return up + [[(to, source) for source, to in step] for step in reversed(up)]


def _messages(ax: Axes, name: str, steps: Steps, ranks: int, share: str, width: float) -> None:
    """Draw an arrow a message; one beyond the last rank goes around to the first."""
    arrow = {"arrowstyle": "->", "color": figures.COLOURS[0], "linewidth": width, "shrinkA": 0, "shrinkB": 0}
    for time, step in enumerate(steps):
        for source, to in step:
            if to < ranks:
                ax.annotate("", (to, time + 1), (source, time), arrowprops=arrow)
            else:
                ax.annotate("", (source + 0.5, time + 0.5), (source, time), arrowprops=arrow | {"arrowstyle": "-"})
                ax.annotate("", (0, time + 1), (-0.5, time + 0.5), arrowprops=arrow)
    ax.set_xlim(-0.6, ranks - 0.4)
    ax.set_ylim(len(steps) + 0.2, -0.2)
    ax.set_xticks(range(ranks))
    title = _("{name}: {count} messages in turn, each {share}", name=name, count=len(steps), share=share)
    ax.set_title(title, fontsize="medium")
    ax.set_xlabel(_("rank"))
    ax.set_ylabel(_("messages, one after the other"))
    ax.spines[["top", "right"]].set_visible(False)
    figures.set_font(ax)
