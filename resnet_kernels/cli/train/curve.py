"""The plot of a training run's loss and accuracy."""

from __future__ import annotations

from pathlib import Path

# Color-blind readers can tell Okabe and Ito's blue and vermilion apart; in gray print the line styles differ.
TRAINING, VALIDATION = {"color": "#0072B2"}, {"color": "#D55E00", "linestyle": "--"}


def draw(history: list[dict[str, float]], title: str, path: Path) -> None:
    """Writes a PNG: loss and accuracy against the epoch, of training and of validation.

    Args:
        history: one row per epoch: loss, accuracy, validation_loss, validation_accuracy.
        title: the figure's title.
        path: the file; its directory is made if need be.

    Raises:
        ImportError: if there is no matplotlib.
        OSError: if path can't be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    # A figure of its own, not pyplot's, opens no window and switches no backend for the program that imported us.
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    loss, accuracy = figure.subplots(1, 2)
    epochs = range(1, len(history) + 1)
    marker = "o" if len(history) <= 30 else None
    for axes, name, label, scale in ((loss, "loss", "loss", 1), (accuracy, "accuracy", "accuracy (%)", 100)):
        for key, part, style in ((name, "training", TRAINING), (f"validation_{name}", "validation", VALIDATION)):
            axes.plot(epochs, [scale * epoch[key] for epoch in history], label=part, marker=marker, ms=4, **style)
        axes.set(xlabel="epoch", ylabel=label)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.legend()
    loss.set_ylim(bottom=0)
    accuracy.set_ylim(top=101)
    figure.suptitle(title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
