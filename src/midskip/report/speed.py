"""Picture of a measurement of speed: time against the work that really ran."""

import os
from collections.abc import Mapping, Sequence

from midskip.report.tokens import visible

# for each task: what its time should follow
WORK = {"decode": "bytes read"}  # others: FLOPs run
Points = Sequence[tuple[float, float]]


def write_speed_picture(
    path: str | os.PathLike[str], lines_by_task: Mapping[str, Mapping[str, Points]], title: str = ""
) -> None:
    """Writes a PNG: a panel for each task, a line for each case, its points (share of Llama's work, of its time).

    On the dashed diagonal a share of the work takes the same share of the time; below 1 the model is faster than
    Llama. Raises ValueError if there is nothing to draw.
    """
    tasks = [task for task, lines in lines_by_task.items() if any(lines.values())]
    if not tasks:
        raise ValueError("there are no points to draw; expected at least one task with one case")

    # Imported here, because matplotlib is slow to import and only pictures need it.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6 * len(tasks) + 0.4, 5.2), dpi=120, layout="constrained")
    for task, axis in zip(tasks, figure.subplots(1, len(tasks), squeeze=False)[0], strict=True):
        lines = lines_by_task[task]
        highest = max(max(point) for points in lines.values() for point in points)
        edge = 1.05 * max(1.0, highest)
        axis.plot((0, edge), (0, edge), linestyle="--", color="#9a9aa6", linewidth=1)
        axis.axhline(1, color="#c3c3cc", linewidth=1)
        for name, points in lines.items():
            works, times = zip(*sorted(points), strict=True)
            axis.plot(works, times, marker="o", markersize=4, linewidth=1.5, label=name)
        axis.set(xlim=(0, edge), ylim=(0, edge), title=task)
        axis.set(xlabel=f"{WORK.get(task, 'FLOPs run')}, of Llama's", ylabel="time, of Llama's")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2, frameon=False)
    if title:
        figure.suptitle(visible(title), parse_math=False)
    figure.savefig(path, format="png")
