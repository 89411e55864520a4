"""What a run showed: results.json, and one self-contained report.html with the claims judged.

Everything is read from the run folder, so a partial run gives a partial report.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from html import escape
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from q3mega.errors import UserError
from q3mega.io import whole_records, write_json
from q3mega.report import figures
from q3mega.report.claims import CLAIMS
from q3mega.train import ledger

Evals = dict[str, dict[str, Any]]

# Which metrics the picture of accuracies shows, by the mode that was asked for.
_MODES = {
    "thinking": ("think_accuracy", "pass1"),
    "no flag": ("default_accuracy",),
    "not thinking": ("no_think_accuracy",),
}
_LONG_CONTEXT = {"plain RoPE": "rope", "YaRN + dual-chunk attention": "yarn_dca"}
_TRACES = {
    "loss": "loss",
    "reward": "reward",
    "entropy": "entropy",
    "response_length": "response length",
}
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
    results = {stage: dict(_metrics(evaluation)) for stage, evaluation in evals.items()}
    write_json(run_dir / "results.json", results, indent=2)
    path = run_dir / "report.html"
    path.write_text(render(run_dir, evals), encoding="utf-8")
    _print(results)
    print(path)
    return path


def read_evals(run_dir: Path) -> Evals:
    """stage -> its eval.json, in the order of the folders; stages without one are left out."""
    evals = {stage: _json(folder / "eval.json") for stage, folder in _stages(run_dir)}
    return {stage: content for stage, content in evals.items() if content}


def _stages(run_dir: Path) -> Iterator[tuple[str, Path]]:
    for folder in sorted(run_dir.glob("[0-9][0-9]-*")):
        yield folder.name[3:], folder


def _metrics(evaluation: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    return ((k, v) for k, v in evaluation.items() if isinstance(v, dict) and "value" in v)


def _json(path: Path) -> dict[str, Any]:
    """A JSON object; {} where there is none, or where a cut left half of one."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


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
        _pretraining(run_dir),
        _accuracies(evals),
        _long_context(evals),
        _capabilities(evals),
        *(_curve(stage, *item) for stage in evals for item in _curves(evals[stage])),
        "<h2>Results</h2>",
        _results(evals),
    ]
    for _, folder in _stages(run_dir):
        state = "" if (folder / "DONE").exists() else " (not finished)"
        body.append(f"<h2>{escape(folder.name)}{state}</h2>")
        parts = (_training, _curation, _rewards, _rollouts, _audit, _samples)
        body += [part(folder) for part in parts]
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
        for stage, evaluation in evals.items()
        for name, metric in _metrics(evaluation)
        if not name.startswith("capability_")
    ]
    return _table(["stage", "metric", "value", "95 % interval", "n"], rows)


def _pretraining(run_dir: Path) -> str:
    """Loss and learning rate over the pre-training steps, end to end."""
    panels: dict[str, dict[str, list[tuple[float, float]]]] = {"loss": {}, "learning rate": {}}
    before = 0.0
    for stage, folder in _stages(run_dir):
        if not stage.startswith("pretrain_"):
            continue
        traces = _traces(folder, ("loss", "lr"))
        for panel, key in zip(panels.values(), ("loss", "lr"), strict=True):
            if key in traces:
                panel[stage] = [(before + step, value) for step, value in traces[key]]
        before = max([before, *(x for panel in panels.values() for x, _ in panel.get(stage, ()))])
    title = "Pre-training"
    return _titled("h2", title, figures.traces(panels, title)) if all(panels.values()) else ""


def _accuracies(evals: Evals) -> str:
    series = {
        mode: {
            s: evaluation[n] for s, evaluation in evals.items() for n in names if n in evaluation
        }
        for mode, names in _MODES.items()
    }
    return _bars("Accuracy by stage and mode", series)


def _long_context(evals: Evals) -> str:
    evaluation = evals.get("pretrain_long", {})
    matches = (re.fullmatch(r"retrieval_(\S+?x)_rope", name) for name in evaluation)
    lengths = [match[1] for match in matches if match]
    series = {
        label: {f"{length} the trained length": evaluation[f"retrieval_{length}_{kind}"]
                for length in lengths if f"retrieval_{length}_{kind}" in evaluation}
        for label, kind in _LONG_CONTEXT.items()
    }  # fmt: skip
    return _bars("Retrieval at and beyond the trained length", series)


def _capabilities(evals: Evals) -> str:
    series = {
        stage: {
            name.removeprefix("capability_"): metric
            for name, metric in _metrics(evaluation)
            if name.startswith("capability_")
        }
        for stage, evaluation in evals.items()
    }
    return _bars("Capabilities", series)


def _bars(title: str, series: Mapping[str, Mapping[str, Any]]) -> str:
    """The picture and the same numbers as a table."""
    series = {label: metrics for label, metrics in series.items() if metrics}
    if not series:
        return ""
    groups = dict.fromkeys(group for metrics in series.values() for group in metrics)
    rows = [[g, *(_score(metrics, g) for metrics in series.values())] for g in groups]
    return _titled("h2", title, figures.bars(series, title) + _table(["", *series], rows))


def _score(evaluation: Mapping[str, Any], name: str) -> str:
    return " · ".join(_cells(evaluation[name])[:2]) if name in evaluation else ""


def _curves(evaluation: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    yield from evaluation.get("curves", {}).items()


def _curve(stage: str, name: str, curve: Mapping[str, Any]) -> str:
    title = f"{name.replace('_', ' ').capitalize()} ({stage})"
    return _titled("h2", title, figures.curves(curve, title))


def _training(folder: Path) -> str:
    traces = _traces(folder, _TRACES)
    panels = {_TRACES[key]: {"": points} for key, points in traces.items()}
    return figures.traces(panels, f"training of {folder.name}") if panels else ""


def _traces(folder: Path, keys: Iterable[str]) -> dict[str, list[tuple[float, float]]]:
    """The (step, value) pairs of each key that a stage's metrics hold.

    A resumed stage may repeat steps: the later line of a step is the one that counts.
    """
    steps = {
        r["step"]: r for r in whole_records(folder / "metrics.jsonl") if _number(r.get("step"))
    }
    traces = {
        key: [(step, steps[step][key]) for step in sorted(steps) if _number(steps[step].get(key))]
        for key in keys
    }
    return {key: points for key, points in traces.items() if points}


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _curation(folder: Path) -> str:
    """How many items came to each step, and how many each rule dropped."""
    parts = []
    for name, head in (
        ("filter_report", ["curation", "items"]),
        ("drops", ["dropped by", "items"]),
    ):
        counts = _json(folder / "data" / f"{name}.json")
        if counts:
            parts.append(_table(head, [[step, str(n)] for step, n in counts.items()]))
    return _titled("h3", "Curation of the data", "\n".join(parts)) if parts else ""


def _rewards(folder: Path) -> str:
    """Mean of each task's score, and of each reward's own, at the start and at the end."""
    kinds = {"reward": "task", "score": "reward"}
    lines = whole_records(folder / "metrics.jsonl")
    keys = sorted({key for line in lines for key in line if key.split("/")[0] in kinds})
    rows = []
    for key, points in _traces(folder, keys).items():
        kind, _, name = key.partition("/")
        name = name or "all"
        values, part = [value for _, value in points], max(1, len(points) // 10)
        spread = _traces(folder, [f"reward_std/{name}"]) if kind == "score" else {}
        spreads = [value for _, value in spread.get(f"reward_std/{name}", [])][-part:]
        means = [sum(some) / len(some) for some in (values[:part], values[-part:], spreads) if some]
        rows.append([kinds[kind], name, *map(_text, means), *[""] * (3 - len(means))])
    head = ["", "name", "first tenth of the steps", "last tenth", "standard deviation"]
    return _titled("h3", "Rewards", _table(head, rows)) if rows else ""


def _rollouts(folder: Path) -> str:
    """What became of every rollout: the ledger of the stage, and of its comparison runs."""
    tables = []
    for path in sorted(folder.rglob(ledger.FILE)):
        try:
            balance = ledger.Ledger(path, writes=False).balance()
        except UserError as error:
            tables.append(f"<p>{escape(str(error))}</p>")
            continue
        rows = {"drawn": balance.drawn, "used": balance.used, "pending": balance.pending}
        rows |= {"prompts in flight": balance.in_flight}
        rows |= {f"dropped: {why}": n for why, n in balance.dropped.items()}
        head = ["/".join(path.relative_to(folder).parts[:-1]) or "rollouts", ""]
        tables.append(_table(head, [[name, str(n)] for name, n in rows.items()]))
    return _titled("h3", "Ledger of the rollouts", "\n".join(tables)) if tables else ""


def _audit(folder: Path) -> str:
    """What the known ways to cheat earn from the rewards of this stage."""
    rows = [
        [task, r["reward"], str(r["probes"]), _text(r["mean"]), _text(r["highest"]), r["probe"]]
        for task, r in _json(folder / "data" / "audit.json").items()
    ]
    head = ["task", "reward", "cheats tried", "mean score", "highest", "of"]
    return _titled("h3", "Audit of the rewards", _table(head, rows)) if rows else ""


def _samples(folder: Path) -> str:
    parts = []
    for record in whole_records(folder / "samples.jsonl")[-_SAMPLES:]:
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
