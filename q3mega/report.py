"""What a run showed: results.json, and one self-contained report.html with the claims judged.

Everything is read from the run folder, so a partial run gives a partial report.
"""

import base64
import io
import json
from collections.abc import Iterator, Mapping
from html import escape
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from q3mega.claims import CLAIMS
from q3mega.errors import UserError

Evals = dict[str, dict[str, Any]]

_TRACES = {"loss": "loss", "reward": "reward", "entropy": "entropy", "length": "response length"}
_SAMPLES = 3
_SAMPLE_CHARS = 2_000
_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem;
       color: #222; background: #fff; }
h1, h2, h3 { line-height: 1.2; } h2 { margin-top: 2.5rem; border-bottom: 1px solid #ddd; }
table { border-collapse: collapse; margin: 1rem 0; }
th, td { padding: .3rem .8rem; border-bottom: 1px solid #e5e5e5; text-align: left; }
td.number { text-align: right; font-variant-numeric: tabular-nums; }
.met { color: #17692b; } .short { color: #b3261e; } .open { color: #777; }
img { max-width: 100%; } figure { margin: 1rem 0; }
pre { white-space: pre-wrap; background: #f6f6f6; padding: .6rem; margin: .2rem 0 1rem; }
"""


def publish(run_dir: str | Path) -> Path:
    """Write RUN/results.json and RUN/report.html, print the results, return the report's path."""
    run_dir = Path(run_dir)
    if not run_dir.is_dir():
        raise UserError(f"run folder {run_dir} does not exist: give the --run-dir of a run")
    evals = read_evals(run_dir)
    results = {stage: dict(_metrics(found)) for stage, found in evals.items()}
    (run_dir / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    path = run_dir / "report.html"
    path.write_text(render(run_dir, evals), encoding="utf-8")
    _print(results)
    print(path)
    return path


def read_evals(run_dir: Path) -> Evals:
    """stage -> its eval.json, in the order of the folders; stages without one are left out."""
    found = {stage: _json(folder / "eval.json") for stage, folder in _stages(run_dir)}
    return {stage: content for stage, content in found.items() if content}


def _stages(run_dir: Path) -> Iterator[tuple[str, Path]]:
    for folder in sorted(run_dir.glob("[0-9][0-9]-*")):
        yield folder.name[3:], folder


def _metrics(found: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    return ((k, v) for k, v in found.items() if isinstance(v, dict) and "value" in v)


def _json(path: Path) -> dict[str, Any]:
    """A JSON object; {} where there is none, or where a cut left half of one."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _json_lines(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    records = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except ValueError:  # the last line of a cut run
            continue
        if isinstance(record, dict):
            records.append(record)
    return records


def _print(results: Evals) -> None:
    table = Table("stage")
    table.add_column("metric", overflow="fold")  # narrow terminals must not cut names
    for title in ("value", "95 % interval", "n"):
        table.add_column(title, no_wrap=True)
    for stage, metrics in results.items():
        for name, metric in metrics.items():
            table.add_row(stage, name, *_cells(metric))
    Console(markup=False).print(table)


def _cells(metric: Mapping[str, Any]) -> tuple[str, str, str]:
    """Value, interval and n of a metric, as text."""
    low, high = metric.get("low"), metric.get("high")
    interval = "" if low is None or high is None else f"{_text(low)} to {_text(high)}"
    return _text(metric["value"]), interval, str(metric.get("n", ""))


def _text(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 1000 else f"{value:.4g}"


def render(run_dir: Path, evals: Evals) -> str:
    """The whole page as HTML; every text that comes from a file is escaped."""
    body = [
        f"<h1>Run {escape(run_dir.resolve().name)}</h1>",
        "<h2>Claims</h2>",
        _claims(evals),
        "<h2>Results</h2>",
        _results(evals),
        _capabilities(evals),
        *(_curve(stage, *item) for stage in evals for item in _curves(evals[stage])),
    ]
    for _, folder in _stages(run_dir):
        state = "" if (folder / "DONE").exists() else " (not finished)"
        body.append(f"<h2>{escape(folder.name)}{state}</h2>")
        body += [_training(folder), _drops(folder), _samples(folder)]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        f"<title>{escape(run_dir.resolve().name)}</title><style>{_STYLE}</style></head><body>"
        + "\n".join(filter(None, body))
        + "</body></html>\n"
    )


def _claims(evals: Evals) -> str:
    marks = {True: ("met", "✔ met"), False: ("short", "✘ falls short"), None: ("open", "not run")}
    rows = []
    for claim in CLAIMS:
        measured, met = claim.judge(evals)
        style, mark = marks[met]
        rows.append(
            [claim.text, claim.bar, measured, _Html(f'<span class="{style}">{mark}</span>')]
        )
    return _table(["claim", "bar", "measured", ""], rows)


def _results(evals: Evals) -> str:
    rows = [
        [stage, name, *_cells(metric)]
        for stage, found in evals.items()
        for name, metric in _metrics(found)
        if not name.startswith("capability_")
    ]
    return _table(["stage", "metric", "value", "95 % interval", "n"], rows)


def _capabilities(evals: Evals) -> str:
    names = {name for found in evals.values() for name in found if name.startswith("capability_")}
    stages = [stage for stage, found in evals.items() if names & found.keys()]
    rows = [
        [name.removeprefix("capability_"), *(_score(evals[stage], name) for stage in stages)]
        for name in sorted(names)
    ]
    return _titled("h2", "Capabilities", _table(["capability", *stages], rows)) if rows else ""


def _score(found: Mapping[str, Any], name: str) -> str:
    return " · ".join(_cells(found[name])[:2]) if name in found else ""


def _curves(found: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    yield from found.get("curves", {}).items()


def _curve(stage: str, name: str, curve: Mapping[str, Any]) -> str:
    figure, axes = _figure(1)
    for label, line in (curve.get("series") or {"": curve}).items():
        axes[0].plot(line["x"], line["y"], marker="o", label=label)
        if line.get("low") and line.get("high"):
            axes[0].fill_between(line["x"], line["low"], line["high"], alpha=0.2)
    if "series" in curve:
        axes[0].legend()
    axes[0].set_xlabel(curve.get("xlabel", ""), parse_math=False)
    axes[0].set_ylabel(curve.get("ylabel", ""), parse_math=False)
    title = f"{name.replace('_', ' ').capitalize()} ({stage})"
    return _titled("h2", title, _image(figure, title))


def _training(folder: Path) -> str:
    # A resumed stage may repeat steps: the later line of a step is the one that counts.
    steps = {r["step"]: r for r in _json_lines(folder / "metrics.jsonl") if _number(r.get("step"))}
    traces = {
        key: [(step, steps[step][key]) for step in sorted(steps) if _number(steps[step].get(key))]
        for key in _TRACES
    }
    traces = {key: points for key, points in traces.items() if points}
    if not traces:
        return ""
    figure, axes = _figure(len(traces))
    for axis, (key, points) in zip(axes, traces.items(), strict=True):
        axis.plot(*zip(*points, strict=True), linewidth=1)
        axis.set_title(_TRACES[key])
        axis.set_xlabel("step")
    return _image(figure, f"training of {folder.name}")


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _drops(folder: Path) -> str:
    drops = _json(folder / "data" / "drops.json")
    table = _table(["rule", "dropped"], [[rule, str(count)] for rule, count in drops.items()])
    return _titled("h3", "Data dropped by curation", table) if drops else ""


def _samples(folder: Path) -> str:
    parts = []
    for record in _json_lines(folder / "samples.jsonl")[-_SAMPLES:]:
        for key, value in record.items():
            text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            cut = "" if len(text) <= _SAMPLE_CHARS else " …"
            parts.append(f"<b>{escape(key)}</b><pre>{escape(text[:_SAMPLE_CHARS])}{cut}</pre>")
        parts.append("<hr>")
    return _titled("h3", "Samples", "\n".join(parts)) if parts else ""


class _Html(str):
    """Text that is HTML already."""


def _titled(level: str, title: str, content: str) -> str:
    return f"<{level}>{escape(title)}</{level}>\n{content}"


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = ["".join(f"<th>{escape(cell)}</th>" for cell in head)]
    lines += ["".join(map(_cell, row)) for row in rows]
    return "<table>\n" + "\n".join(f"<tr>{line}</tr>" for line in lines) + "\n</table>"


def _cell(text: str) -> str:
    return f"<td>{text if isinstance(text, _Html) else escape(text)}</td>"


def _figure(panels: int) -> tuple[Any, list[Any]]:
    from matplotlib.figure import Figure  # heavy, and no window: without pyplot

    width = 6.5 if panels == 1 else 3.6 * panels
    figure = Figure(figsize=(width, 3.2), layout="constrained")
    return figure, list(figure.subplots(1, panels, squeeze=False)[0])


def _image(figure: Any, text: str) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<figure><img alt="{escape(text)}" src="data:image/png;base64,{data}"></figure>'
