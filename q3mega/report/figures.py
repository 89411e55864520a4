"""The report's pictures, each as an HTML figure with the PNG inside; drawn without a window."""

import base64
import io
from collections.abc import Mapping
from html import escape
from typing import Any

from matplotlib.figure import Figure

Metric = Mapping[str, Any]  # value, and low and high where it has an interval
Points = Mapping[str, list[tuple[float, float]]]  # label -> (x, y)


def curves(curve: Mapping[str, Any], title: str) -> str:
    """One line, or several named ones under "series", with their intervals as bands."""
    figure, (axis,) = _panels(1)
    for label, line in (curve.get("series") or {"": curve}).items():
        axis.plot(line["x"], line["y"], marker="o", label=label)
        if line.get("low") and line.get("high"):
            axis.fill_between(line["x"], line["low"], line["high"], alpha=0.2)
    if "series" in curve:
        _legend(axis)
    axis.set_xlabel(curve.get("xlabel", ""), parse_math=False)
    axis.set_ylabel(curve.get("ylabel", ""), parse_math=False)
    return _html(figure, title)


def traces(panels: Mapping[str, Points], title: str) -> str:
    """Panels side by side, each with one or more lines over the step."""
    figure, axes = _panels(len(panels))
    for axis, (name, lines) in zip(axes, panels.items(), strict=True):
        for label, points in lines.items():
            axis.plot(*zip(*points, strict=True), linewidth=1, label=label)
        if len(lines) > 1:
            _legend(axis)
        axis.set_title(name, parse_math=False)
        axis.set_xlabel("step")
    return _html(figure, title)


def bars(series: Mapping[str, Mapping[str, Metric]], title: str) -> str:
    """Bars in groups, label -> group -> metric, with intervals; a group may lack some labels."""
    groups = list(dict.fromkeys(group for metrics in series.values() for group in metrics))
    figure, (axis,) = _panels(1)
    width = 0.8 / len(series)
    for i, (label, metrics) in enumerate(series.items()):
        positions = [groups.index(group) + (i - (len(series) - 1) / 2) * width for group in metrics]
        values = [m["value"] for m in metrics.values()]
        reach = [[m["value"] - _end(m, "low") for m in metrics.values()],
                 [_end(m, "high") - m["value"] for m in metrics.values()]]  # fmt: skip
        axis.bar(positions, values, width, yerr=reach, capsize=2, label=label)
    axis.set_xticks(range(len(groups)))
    axis.set_xticklabels([g.replace("_", "\n", 1) for g in groups], parse_math=False, fontsize=8)
    axis.set_ylim(0, 1.05)
    axis.set_ylabel("accuracy")
    _legend(figure, loc="outside upper center", ncols=len(series))
    return _html(figure, title)


def _end(metric: Metric, name: str) -> float:
    end = metric.get(name)
    return metric["value"] if end is None else end


def _panels(n: int) -> tuple[Figure, list[Any]]:
    figure = Figure(figsize=(6.5 if n == 1 else 3.6 * n, 3.2), layout="constrained")
    return figure, list(figure.subplots(1, n, squeeze=False)[0])


def _legend(of: Any, **how: Any) -> None:
    for text in of.legend(fontsize=8, **how).get_texts():
        text.set_parse_math(False)


def _html(figure: Figure, title: str) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<figure><img alt="{escape(title)}" src="data:image/png;base64,{data}"></figure>'
