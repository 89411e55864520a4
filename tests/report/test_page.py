"""The report: values, claims and escaping, on run folders written here."""

import base64
import json
import re
from pathlib import Path
from typing import Any

import pytest

from q3mega.errors import UserError
from q3mega.report.claims import CLAIMS
from q3mega.report.page import publish, read_evals
from q3mega.rollout import Completion
from q3mega.train.ledger import FILE, Ledger
from q3mega.train.rollouts import Rollout


def metric(value: float, half: float = 0.03) -> dict[str, float]:
    return {"value": value, "n": 200, "low": value - half, "high": value + half}


def curve(ys: list[float]) -> dict[str, Any]:
    return {
        "x": [1, 8, 24, 64][: len(ys)],
        "y": ys,
        "low": [y - 0.05 for y in ys],
        "high": [y + 0.05 for y in ys],
        "xlabel": "budget in $tokens$ $",
        "ylabel": "accuracy",
    }


FUSED = {f"capability_{name}": metric(0.5) for name in ("a", "b", "c", "d", "e")}
BETTER = {f"capability_{name}": metric(0.6) for name in ("a", "b", "c", "d")}

# A run that meets every bar, most of them exactly.
GOOD: dict[str, dict[str, Any]] = {
    "pretrain_long": {"retrieval_4x_yarn_dca": metric(0.6), "retrieval_4x_rope": metric(0.3)},
    "cold_start": {"think_accuracy": metric(0.55)},
    "reasoning_rl": {"think_accuracy": metric(0.80), "entropy_ratio": metric(0.5)},
    "mode_fusion": {
        "think_accuracy": metric(0.75),
        "no_think_accuracy": metric(0.45),
        "mode_obedience": metric(0.95),
        "answered_min": metric(0.95),
        "curves": {"thinking_budget": curve([0.1, 0.08, 0.4, 0.5])},
        **FUSED,
    },
    "general_rl": {
        "think_accuracy": metric(0.75),
        "mode_obedience": metric(0.98),
        "capability_e": metric(0.47),
        **BETTER,
    },
    "distill_off_policy": {"pass1": metric(0.40), "pass8": metric(0.70)},
    "distill_on_policy": {
        "pass1": metric(0.55),
        "pass8": metric(0.71),
        "rl_pass1": metric(0.55),
        "flops_ratio_rl_over_opd": metric(5.0),
    },
}


def write(run_dir: Path, evals: dict[str, dict[str, Any]]) -> Path:
    for number, (stage, content) in enumerate(evals.items(), 1):
        folder = run_dir / f"{number:02d}-{stage}"
        (folder / "data").mkdir(parents=True)
        (folder / "eval.json").write_text(json.dumps(content))
        (folder / "DONE").touch()
    return run_dir


def judged(evals: dict[str, dict[str, Any]]) -> dict[str, bool | None]:
    return {claim.text: claim.judge(evals)[1] for claim in CLAIMS}


def changed(stage: str, name: str, content: Any) -> dict[str, dict[str, Any]]:
    return GOOD | {stage: GOOD[stage] | {name: content}}


def test_a_run_at_the_bars_meets_every_claim() -> None:
    assert len(CLAIMS) == 13 and set(judged(GOOD).values()) == {True}


def test_an_empty_run_judges_nothing() -> None:
    assert set(judged({}).values()) == {None}


@pytest.mark.parametrize("stage", GOOD)
def test_a_missing_stage_leaves_its_claims_open(stage: str) -> None:
    without = judged({name: found for name, found in GOOD.items() if name != stage})
    assert None in without.values() and False not in without.values()


@pytest.mark.parametrize(
    ("stage", "name", "content", "claim"),
    [
        ("pretrain_long", "retrieval_4x_yarn_dca", metric(0.59), "Long-context"),
        ("pretrain_long", "retrieval_4x_rope", metric(0.31), "Long-context"),
        ("cold_start", "think_accuracy", metric(0.56), "Reinforcement learning teaches"),
        ("cold_start", "think_accuracy", metric(0.50, 0.4), "Reinforcement learning teaches"),
        ("reasoning_rl", "entropy_ratio", metric(0.49), "Entropy"),
        ("mode_fusion", "mode_obedience", metric(0.94), "After fusion one model obeys"),
        ("mode_fusion", "no_think_accuracy", metric(0.46), "Thinking pays"),
        ("mode_fusion", "answered_min", metric(0.94), "Accuracy follows"),
        ("mode_fusion", "curves", {"thinking_budget": curve([0.1, 0.3, 0.49])}, "Accuracy foll"),
        ("mode_fusion", "curves", {"thinking_budget": curve([0.1, 0.5, 0.39, 0.6])}, "Accuracy f"),
        ("mode_fusion", "capability_a", metric(0.61), "General RL lifts"),
        ("general_rl", "mode_obedience", metric(0.97), "General RL makes"),
        ("general_rl", "think_accuracy", metric(0.74), "General RL keeps"),
        ("general_rl", "capability_e", metric(0.46), "General RL lifts"),
        ("distill_off_policy", "pass1", metric(0.41), "On-policy distillation lifts pass@1"),
        ("distill_off_policy", "pass8", metric(0.71), "On-policy distillation lifts pass@8"),
        ("distill_on_policy", "rl_pass1", metric(0.56), "On-policy distillation beats RL"),
        ("distill_on_policy", "flops_ratio_rl_over_opd", metric(4.9), "On-policy distillation be"),
    ],
)
def test_each_bar_can_be_missed(stage: str, name: str, content: Any, claim: str) -> None:
    missed = [text for text, met in judged(changed(stage, name, content)).items() if met is False]
    assert len(missed) == 1 and missed[0].startswith(claim)


def test_the_page_shows_values_pictures_and_marks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = write(tmp_path / "run", changed("reasoning_rl", "entropy_ratio", metric(0.4217)))
    folder = run_dir / "03-reasoning_rl"
    lines = [{"step": s, "reward": s / 9, "entropy": 0.2, "loss": 0.1} for s in range(1, 9)]
    text = "\n".join(map(json.dumps, lines)) + '\n{"step": 9, "rew'
    (folder / "metrics.jsonl").write_text(text)
    (folder / "data" / "drops.json").write_text(json.dumps({"near_duplicate": 8123}))
    audit = {"reward": "judge", "probes": 77, "mean": 0.0123, "highest": 0.875, "probe": "stuffing"}
    (folder / "data" / "audit.json").write_text(json.dumps({"rag_name": audit}))
    (folder / "samples.jsonl").write_text(
        json.dumps({"prompt": "1+1?", "meta": {"terms": 2}}) + "\n"
    )
    ledger = Ledger(folder / FILE, writes=True)
    ledger.drawn(1, [Rollout([1], Completion([2], [-0.1], [1], "stop"), 0)] * 7719)
    ledger.dropped(1, dict.fromkeys(range(6428), "equal <rewards>"))
    path = publish(run_dir)
    page = path.read_text()
    assert page.count("✔ met") == len(CLAIMS) - 1 and page.count("✘ falls short") == 1
    for value in ("0.422", "0.392 to 0.452", "near_duplicate", "8123", "1+1?", "{&quot;terms",
                  "rag_name", "0.875", "stuffing", "7719", "1291", "6428",
                  "dropped: equal &lt;rewards&gt;"):  # fmt: skip
        assert value in page
    images = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    # Accuracies, long context, capabilities; the budget curve; the training of one stage.
    assert len(images) == 5
    assert all(base64.b64decode(image).startswith(b"\x89PNG") for image in images)
    assert "http" not in page.replace("<!doctype html>", "")
    results = json.loads((run_dir / "results.json").read_text())
    assert results["mode_fusion"]["answered_min"] == metric(0.95)
    assert "curves" not in results["mode_fusion"]
    assert "entropy_ratio" in capsys.readouterr().out


def test_a_comparison_of_curves_is_one_picture_that_names_them(tmp_path: Path) -> None:
    series = {"on-policy": curve([0.4, 0.6]), "RL": curve([0.4, 0.5])}
    compared = {"xlabel": "FLOPs", "ylabel": "accuracy", "series": series}
    evals = {"distill_on_policy": {"curves": {"distillation_flops": compared}}}
    page = publish(write(tmp_path / "run", evals)).read_text()
    assert page.count("data:image/png") == 1
    assert "Distillation flops (distill_on_policy)" in page


def test_pretraining_is_one_picture_over_its_steps(tmp_path: Path) -> None:
    run_dir = write(tmp_path / "run", {"pretrain_general": {}, "pretrain_long": {}, "other": {}})
    for folder in run_dir.iterdir():
        lines = [{"step": s, "loss": 3 / s, "lr": 1e-3} for s in (1, 2, 3)]
        (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert publish(run_dir).read_text().count('alt="Pre-training"') == 1


def test_bars_leave_out_what_a_stage_did_not_measure(tmp_path: Path) -> None:
    evals = {
        "cold_start": {"think_accuracy": metric(0.5)},
        "mode_fusion": {"think_accuracy": metric(0.75), "no_think_accuracy": metric(0.25)},
        "pretrain_long": {"retrieval_1x_rope": metric(0.9), "retrieval_1x_yarn_dca": metric(0.91)},
    }
    page = publish(write(tmp_path / "run", evals)).read_text()
    assert page.count("data:image/png") == 2
    assert "<td>cold_start</td><td>0.500 · 0.470 to 0.530</td><td></td>" in page
    assert "<td>1x the trained length</td><td>0.900" in page


def test_text_from_the_run_is_escaped(tmp_path: Path) -> None:
    attack = "<script>alert('x')</script>"
    evals = {"cold_start": {attack: metric(0.5), "curves": {attack: curve([0.1, 0.2])},
                            f"capability_{attack}": metric(0.1)}}  # fmt: skip
    run_dir = write(tmp_path / "run", evals)
    folder = run_dir / "01-cold_start"
    (folder / "samples.jsonl").write_text(json.dumps({attack: attack, "list": [attack]}) + "\n")
    (folder / "data" / "drops.json").write_text(json.dumps({attack: attack}))
    page = publish(run_dir).read_text().lower()
    assert "<script" not in page and page.count("&lt;script&gt;") >= 6


def test_a_cut_run_still_reports(tmp_path: Path) -> None:
    run_dir = write(tmp_path / "run", {"pretrain_long": {}, "cold_start": {}})
    (run_dir / "01-pretrain_long" / "eval.json").write_text('{"retrieval_4x_r')
    (run_dir / "02-cold_start" / "DONE").unlink()
    (run_dir / "02-cold_start" / "metrics.jsonl").write_text('{"step": 1, "loss": NaN}\n{"st')
    page = publish(run_dir).read_text()
    assert page.count("not run") == len(CLAIMS) and "02-cold_start (not finished)" in page
    assert read_evals(run_dir) == {} and json.loads((run_dir / "results.json").read_text()) == {}


def test_no_such_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        publish(tmp_path / "none")
