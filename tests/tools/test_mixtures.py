"""Curations compared by small models: each is best at what it was given."""

import json
from pathlib import Path

from q3mega import device  # noqa: F401

# isort: split
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from q3mega import cli
from q3mega.curate.config import Config
from q3mega.curate.pipeline import curate
from q3mega.data import package_text
from q3mega.data.tokenizer import train_tokenizer
from q3mega.tools import mixtures

RECIPE = {
    "name": "proxy",
    "seed": 0,
    "model": {"layers": 2, "hidden": 64, "heads": 2, "kv_heads": 1, "head_dim": 32, "ffn": 128},
    "layout": {"processes": 1},
    "stages": {
        "pretrain_general": {
            "steps": 60, "tokens_per_step": 2048, "sequence": 128, "mixture": {"facts": 1},
            "lr": 0.01, "save_every": 60,
        },
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[Path, list[str]]:
    """A recipe, and two curations: of code alone, of docstrings alone."""
    folder = tmp_path_factory.mktemp("mixtures")
    train_tokenizer(package_text.documents("stdlib"), 1000, folder / "tokenizer")
    found = []
    for name in ("stdlib", "numpy_docs"):
        lines = [
            json.dumps({"text": part})
            for d in package_text.documents(name)
            for part in (d[i : i + 2000] for i in range(0, len(d), 2000))
        ]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
        config = {
            "sources": [{"name": name, "glob": f"{folder}/{name}.jsonl", "licence": "open"}],
            "tokenizer": {"path": f"{folder}/tokenizer"},
            "heldout": 0.05,
        }
        curate(Config.model_validate(config), folder / name, workers=1)
        found.append(str(folder / name))
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(RECIPE | {"tokenizer": {"path": f"{folder}/tokenizer"}}))
    return path, found


@pytest.mark.slow
def test_held_out_documents_are_read_once(folders):
    _, (code, docs) = folders
    one, both, twice = (mixtures.held_out(f) for f in ([code], [code, docs], [code, docs, code]))
    assert twice == both
    assert {cell[3] for cell in both} == {"stdlib", "numpy_docs"}
    count = sum(map(len, both.values()))
    assert count > sum(map(len, one.values())) > 10
    assert len({tuple(ids) for some in both.values() for ids in some}) == count


@pytest.mark.slow
@pytest.mark.dist
def test_each_model_is_best_at_what_it_was_given(folders, tmp_path, capsys):
    recipe, curations = folders
    command = ["mixtures", str(recipe), "--curated", *curations, "--out", str(tmp_path)]
    assert cli.main(command) == 0
    rows = {}
    for line in capsys.readouterr().out.splitlines():
        words = line.split()
        if words and words[0] in ("all", "source"):
            rows[words[-4] if words[0] == "all" else words[1]] = words[-2:]
    assert [v.endswith("*") for v in rows["stdlib"]] == [True, False]
    assert [v.endswith("*") for v in rows["numpy_docs"]] == [False, True]
    documents = [ids[:128] for some in mixtures.held_out(curations).values() for ids in some]
    for number, shown in enumerate(rows["all"], 1):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / f"{number}/01-pretrain_general/hf")
        total = n = 0.0
        with torch.no_grad():
            for ids in documents:
                batch = torch.tensor([ids])
                total += float(model(batch, labels=batch).loss) * (len(ids) - 1)
                n += len(ids) - 1
        assert float(shown.rstrip("*")) == pytest.approx(total / n, abs=2e-4)
