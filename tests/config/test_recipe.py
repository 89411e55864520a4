"""Recipes: what loads, what is refused and in which words."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from q3mega.config.layout import Layout, check_layout
from q3mega.config.recipe import ModelSpec, Recipe
from q3mega.config.rl import PRESETS
from q3mega.config.section import RENAMED_KEYS, parse_yaml
from q3mega.config.servers import ChatModelSpec, RolloutServers
from q3mega.config.stages import STAGES
from q3mega.errors import UserError
from q3mega.model.sizes import QWEN3

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
LAPTOP = yaml.safe_load((EXAMPLES / "laptop.yaml").read_text())
MODEL = {"layers": 4, "hidden": 64, "heads": 4, "kv_heads": 2, "head_dim": 32, "ffn": 128}
CHANGES: dict[str, dict[str, Any]] = {
    "pretrain_general": {"lr": 1e-3, "optimizer": "muon"},
    "cold_start": {"lr": 3e-4, "optimizer": "adamw", "layout": {"tensor": 1}},
    "reasoning_rl": {"lr": 1e-4, "betas": [0.9, 0.99]},
}
TINY = {
    "name": "tiny",
    "seed": 7,
    "tokenizer": {"vocab_size": 512},
    "model": MODEL,
    "layout": {"processes": 2, "tensor": 2},
    "stages": {stage: LAPTOP["stages"][stage] | changes for stage, changes in CHANGES.items()},
}


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(TINY, sort_keys=False))
    return path


def refusal(path: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        Recipe.load(path, overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_values_and_stage_layouts(tiny: Path) -> None:
    recipe = Recipe.load(tiny)
    assert list(recipe.stages) == ["pretrain_general", "cold_start", "reasoning_rl"]
    assert all(type(stage) is STAGES[name] for name, stage in recipe.stages.items())
    assert recipe.stages["pretrain_general"].layout == Layout(processes=2, tensor=2)
    assert recipe.stages["cold_start"].layout == Layout(processes=2, tensor=1)
    assert recipe.stages["reasoning_rl"].betas == (0.9, 0.99)


def test_stages_keep_the_order_of_the_file(tmp_path: Path) -> None:
    raw = TINY | {"stages": dict(reversed(TINY["stages"].items()))}
    path = tmp_path / "back.yaml"
    path.write_text(yaml.safe_dump(raw, sort_keys=False))
    recipe = Recipe.load(path)
    assert list(recipe.stages) == ["reasoning_rl", "cold_start", "pretrain_general"]
    assert recipe.stage_dir("runs/x", "cold_start") == Path("runs/x/02-cold_start")


def test_overrides_are_yaml_at_dotted_paths(tiny: Path) -> None:
    recipe = Recipe.load(
        tiny,
        ["cold_start.lr=5e-5", "model.hidden=128", "stages.reasoning_rl.betas=[0.8, 0.9]",
         "layout.distributed_optimizer=false", "reasoning_rl.layout.pipeline=1",
         "cold_start.init=null"],
    )  # fmt: skip
    assert recipe.stages["cold_start"].lr == 5e-5  # no dot needed, as in YAML 1.2
    assert recipe.model.hidden == 128
    assert recipe.stages["reasoning_rl"].betas == (0.8, 0.9)
    assert not recipe.stages["cold_start"].layout.distributed_optimizer


def test_dump_holds_every_value_and_loads_back(tiny: Path, tmp_path: Path) -> None:
    recipe = Recipe.load(tiny)
    recipe.dump(tmp_path / "resolved.yaml")
    assert Recipe.load(tmp_path / "resolved.yaml") == recipe
    stage = yaml.safe_load((tmp_path / "resolved.yaml").read_text())["stages"]["cold_start"]
    assert stage["weight_decay"] == 0.0 and stage["layout"]["processes"] == 2
    assert stage["optimizer"] == "adamw" and float(stage["lr"]) == 3e-4


def test_model_by_size_and_derived_from_it() -> None:
    assert ModelSpec.model_validate({"size": "qwen3-8b"}).shape() == QWEN3["qwen3-8b"]
    moe = ModelSpec.model_validate({"size": "qwen3-30b-a3b", "layers": 2})
    assert moe.shape() == dataclasses.replace(QWEN3["qwen3-30b-a3b"], layers=2)
    assert moe.shape(vocab=512).vocab == 512
    assert ModelSpec.model_validate(moe.model_dump()) == moe


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("cold_start.learning_rte=3", ["stages.cold_start.learning_rte=3", "not a field"]),
        ("cold_start.warmup_step=3", ["nearest is stages.cold_start.warmup_steps"]),
        ("stages.cold_stat={}", ["nearest is stages.cold_start"]),
        ("modle.hidden=3", ["modle=", "nearest is model"]),
        ("reasoning_rl.layout.tensr=2", ["nearest is stages.reasoning_rl.layout.tensor"]),
        (
            "pretrain_general.mixture.poems=0.5",
            ["mixture.poems", "nearest is stages.pretrain_general.mixture.prose"],
        ),
        ("student.hiden=2", ["student.", "is missing"]),
        ("cold_start.lr=-1", ["stages.cold_start.lr=-1", "greater than 0"]),
        ("cold_start.lr=.nan", ["stages.cold_start.lr=nan", "finite"]),
        ("cold_start.lr=fast", ["stages.cold_start.lr='fast'", "valid number"]),
        ("cold_start.min_lr=1", ["stages.cold_start", "min_lr=1.0", "lr=0.0003"]),
        ("cold_start.betas=[0.9]", ["stages.cold_start.betas", "missing"]),
        ("cold_start.optimizer=adam", ["optimizer='adam'", "'adamw' or 'muon'"]),
        (
            "reasoning_rl.rollout_servers={kind: vllm, urls: [node7]}",
            ["stages.reasoning_rl.rollout_servers.urls.0='node7'", "https?://"],
        ),
        (
            "reasoning_rl.rollout_servers={kind: vllm, urls: []}",
            ["rollout_servers.urls=[]", "at least 1"],
        ),
        (
            "reasoning_rl.rollout_servers={kind: tgi, urls: [http://a]}",
            ["rollout_servers.kind", "'sglang'"],
        ),
        (
            "reasoning_rl.rollout_servers={kind: sglang, urls: [http://a], weight_sync: broadcast, "
            "weights_folder: w}",
            ["weights_folder=w", "weight_sync: folder"],
        ),
        (
            "reasoning_rl.rollout_servers={kind: vllm, urls: [http://a], url: b}",
            ["nearest is stages.reasoning_rl.rollout_servers.urls"],
        ),
        ("cold_start=null", ["stages.cold_start=None", "dict"]),
        ("seed=-1", ["seed=-1", "greater than or equal to 0"]),
        ("layout.processes=0", ["layout.processes=0", "greater than 0"]),
        ("layout.processes=1.5", ["layout.processes=1.5", "integer"]),
        ("tokenizer.path=here", ["tokenizer", "vocab_size", "path"]),
        ("model.heads=3", ["model.heads=3", "model.kv_heads=2"]),
        ("model.experts=4", ["model", "experts=4", "moe_ffn"]),
        ("model.size=qwen3-9b", ["model.size='qwen3-9b'", "'qwen3-8b'"]),
        ("name=../up", ["name='../up'"]),
        ("stages={}", ["at least one of", "cold_start"]),
        ("mode_fusion.lr=1", ["no stage mode_fusion"]),
        ("model.hidden.x=1", ["hidden'=64", "no fields"]),
        ("model.hidden", ["stage.field=value"]),
        ("model..hidden=1", ["stage.field=value"]),
        ("model.hidden=[1", ["not valid YAML"]),
        ("model={a: 1,\n a: 2}", ["'a' is given twice"]),
        ("model.hid\nden=1", ["model.hid den=1", "nearest is model.hidden"]),
        ("mode_fusion.x\n.y=1", ["no stage mode_fusion"]),
        ("model.hidden.x\n.y=1", ["hidden'=64", "no fields"]),
    ],
)
def test_bad_values_are_named(tiny: Path, override: str, words: list[str]) -> None:
    message = refusal(tiny, override)
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("name: [", ["line 1", "not valid YAML"]),
        ("- a", ["must be a mapping"]),
        ("", ["must be a mapping"]),
        ("name: a\nname: b", ["line 1", "'name' is given twice"]),
        ("seed: !!timestamp 2024-99-99", ["not valid YAML"]),
        ("{[1]: 2}", ["not valid YAML"]),
        ("[" * 5000, ["not valid YAML"]),
        ("name: !!python/object/apply:os.getcwd []", ["not valid YAML"]),
        (yaml.safe_dump({k: v for k, v in TINY.items() if k != "seed"}), ["seed is missing"]),
    ],
)
def test_bad_files_are_named(tmp_path: Path, text: str, words: list[str]) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    message = refusal(path)
    assert all(word in message for word in words), message


def test_unreadable_files(tmp_path: Path) -> None:
    assert "No such file" in refusal(tmp_path / "none.yaml")
    assert "cannot be read" in refusal(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"name: caf\xe9")
    assert "UTF-8" in refusal(tmp_path / "latin.yaml")


MOE = {"experts": 8, "moe_ffn": 64}


@pytest.mark.parametrize(
    ("layout", "model", "words"),
    [
        ({"processes": 6, "tensor": 2, "pipeline": 2}, {}, "pipeline * context=4 does not divide"),
        ({"processes": 3, "tensor": 3}, {}, "tensor=3 does not divide heads=4"),
        ({"processes": 4, "tensor": 4}, {}, "tensor=4 does not divide kv_heads=2"),
        ({"processes": 2, "tensor": 2}, {"ffn": 127}, "tensor=2 does not divide ffn=127"),
        ({"processes": 5, "pipeline": 5}, {}, "virtual_pipeline=5 divides neither layers=4 nor"),
        ({"processes": 2, "pipeline": 2, "virtual_pipeline": 3}, {}, "=6 divides neither layers=4"),
        ({"processes": 1, "virtual_pipeline": 2}, {}, "needs layout.pipeline > 1"),
        ({"processes": 1, "sequence_parallel": True}, {}, "needs layout.tensor > 1"),
        ({"processes": 2, "expert": 2}, {}, "needs a model with experts"),
        ({"processes": 3, "expert": 3}, MOE, "expert=3 does not divide experts=8"),
        ({"processes": 2, "expert": 4}, MOE, "expert * expert_tensor * pipeline=4"),
        ({"processes": 3, "expert_tensor": 3}, MOE, "expert_tensor=3 does not divide moe_ffn=64"),
        ({"processes": 2, "tensor": 2}, MOE, "needs layout.sequence_parallel=true"),
    ],
)
def test_layouts_that_do_not_fit(layout: dict[str, Any], model: dict[str, Any], words: str) -> None:
    spec = MODEL | model
    with pytest.raises(UserError) as caught:
        check_layout(Layout(**layout), ModelSpec(**spec))
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("layout", "model"),
    [
        ({"processes": 8, "tensor": 2, "pipeline": 2, "context": 2}, {}),
        ({"processes": 2, "pipeline": 2, "virtual_pipeline": 2}, {}),
        ({"processes": 4, "tensor": 2, "expert": 4, "sequence_parallel": True}, MOE),
        ({"processes": 4, "expert": 2, "pipeline": 2}, MOE),
    ],
)
def test_layouts_that_fit(layout: dict[str, Any], model: dict[str, Any]) -> None:
    check_layout(Layout(**layout), ModelSpec(**(MODEL | model)))


def test_a_stage_that_does_not_fit_is_named(tiny: Path) -> None:
    assert "stages.cold_start (model): layout" in refusal(tiny, "cold_start.layout.pipeline=3")


def test_a_recipe_laid_over_another(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    middle, top = tmp_path / "deep" / "middle.yaml", tmp_path / "top.yaml"
    mixed = "{cold_start: {lr: 0.5}, pretrain_general: {mixture: {prose: 1.0}}}"
    middle.write_text(f"base: ../tiny.yaml\nseed: 8\nstages: {mixed}\n")
    top.write_text("base: deep/middle.yaml\nname: top\nstages: {reasoning_rl: null}\n")
    before, recipe = Recipe.load(tiny), Recipe.load(top, ["cold_start.epochs=9"])
    assert (recipe.name, recipe.seed) == ("top", 8)
    assert list(recipe.stages) == ["pretrain_general", "cold_start"]
    assert recipe.stages["pretrain_general"].mixture == {"prose": 1.0}
    changed = {"lr": 0.5, "epochs": 9}
    assert recipe.stages["cold_start"] == before.stages["cold_start"].model_copy(update=changed)


@pytest.mark.parametrize(
    ("base", "words"),
    [
        ("top.yaml", "base=top.yaml leads back to itself"),
        ("other.yaml", "base=top.yaml leads back to itself"),
        ("missing.yaml", "missing.yaml cannot be read"),
        ("[a]", "base=['a'] must name a recipe file"),
    ],
)
def test_bases_that_do_not_hold(tmp_path: Path, base: str, words: str) -> None:
    (tmp_path / "top.yaml").write_text(f"base: {base}\n")
    (tmp_path / "other.yaml").write_text("base: top.yaml\n")
    with pytest.raises(UserError) as error:
        Recipe.load(tmp_path / "top.yaml")
    assert words in str(error.value) and "\n" not in str(error.value)


def test_fp8_is_for_pretraining(tiny: Path) -> None:
    assert Recipe.load(tiny, ["pretrain_general.fp8=true"])
    with pytest.raises(UserError, match=r"stages\.cold_start\.fp8=True: only pre-training"):
        Recipe.load(tiny, ["cold_start.fp8=true"])


def test_distillation_needs_a_student(tmp_path: Path) -> None:
    path = tmp_path / "laptop.yaml"
    path.write_text(yaml.safe_dump({k: v for k, v in LAPTOP.items() if k != "student"}))
    assert "add a student section" in refusal(path)


def test_every_example_loads() -> None:
    for path in EXAMPLES.glob("*.yaml"):
        assert Recipe.load(path).stages


scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(scalars, inner, max_size=3),
    max_leaves=6,
)
paths = st.sampled_from(
    ["name", "seed", "tokenizer", "model", "student", "layout", "stages", "cold_start"]
    + [f"cold_start.{field}" for field in STAGES["cold_start"].model_fields]
    + [f"model.{field}" for field in ModelSpec.model_fields]
    + [f"cold_start.layout.{field}" for field in Layout.model_fields]
)


@settings(max_examples=150, deadline=None)
@given(path=paths, value=values)
def test_any_override_loads_and_dumps_or_is_refused_in_one_line(
    tmp_path_factory: pytest.TempPathFactory, path: str, value: Any
) -> None:
    folder = tmp_path_factory.mktemp("any")
    (folder / "in.yaml").write_text(yaml.safe_dump(TINY))
    try:
        recipe = Recipe.load(folder / "in.yaml", [f"{path}={yaml.safe_dump(value)}"])
    except UserError as error:
        assert "\n" not in str(error)
        return
    recipe.dump(folder / "out.yaml")
    assert Recipe.load(folder / "out.yaml") == recipe


@settings(max_examples=150, deadline=None)
@given(text=st.text(alphabet=" \n:-[]{},&*!|>'\"#?%ab1.e", max_size=60))
def test_any_text_is_refused_in_one_line(
    tmp_path_factory: pytest.TempPathFactory, text: str
) -> None:
    path = tmp_path_factory.mktemp("text") / "in.yaml"
    path.write_text(text)
    refusal(path)


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_fills_in_what_is_not_given(tiny: Path, tmp_path: Path, preset: str) -> None:
    given = f"reasoning_rl.preset={preset}"
    stage = Recipe.load(tiny, [given]).stages["reasoning_rl"]
    assert {name: getattr(stage, name) for name in PRESETS[preset]} == PRESETS[preset]
    recipe = Recipe.load(tiny, [given, "reasoning_rl.kl_coef=0.5", "reasoning_rl.clip_high=0.31"])
    stage = recipe.stages["reasoning_rl"]
    assert (stage.variant, stage.kl_coef, stage.clip_high) == (preset, 0.5, 0.31)
    recipe.dump(tmp_path / "resolved.yaml")
    assert Recipe.load(tmp_path / "resolved.yaml") == recipe


def test_policy_settings_are_refused_in_one_line(tiny: Path) -> None:
    assert "'grpo', 'dapo'" in refusal(tiny, "reasoning_rl.preset=ppo")
    assert "'tis', 'mis'" in refusal(tiny, "reasoning_rl.rollout_correction=is")
    band = refusal(tiny, "reasoning_rl.mis_band=[2.0, 0.5]")
    assert "mis_band=[2.0, 0.5] must rise: the published one is [0.5, 2.0]" in band
    assert "reasoning_rl.tis_cap=0" in refusal(tiny, "reasoning_rl.tis_cap=0")
    message = refusal(tiny, "reasoning_rl.schedule=asynchronous")  # without servers
    assert "name them in its `rollout_servers`, or take one_step_off" in message
    dense = refusal(tiny, "reasoning_rl.routing_replay=r2")
    assert "reasoning_rl: routing_replay=r2 needs a model with experts, this is dense" in dense


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["teacher_url=node9:29600"], r"teacher_url='node9:29600' is not allowed"),
        (["teacher_url=tcp://node9"], r"teacher_url='tcp://node9' is not allowed"),
        (["teacher_url=http://node9:8000"], "teacher_topk=0: a server .* so give teacher_topk"),
        (["teacher_url=tcp://node9:1", "teacher_topk=8"], "teacher_topk=8: .* so leave it 0"),
        (
            ["teacher_url=tcp://node9:1", "teacher=x"],
            "teacher_url=tcp://node9:1 and teacher=x: give",
        ),
        (
            ["teacher_url=http://node9:8000", "teacher_topk=8", "temperature=2"],
            "temperature=2.0: a server gives log-probabilities at temperature 1",
        ),
        (["teacher_url=tcp://node9:1"], "compare_sft_samples=.*writes no text; set it to 0"),
    ],
)
def test_teachers_that_do_not_go_together(words: list[str], told: str) -> None:
    given = [f"distill_on_policy.{word}" for word in words]
    with pytest.raises(UserError, match=told):
        Recipe.load(EXAMPLES / "laptop.yaml", given)


def test_a_teacher_elsewhere_need_not_fit_the_layout_of_its_student(tmp_path: Path) -> None:
    given = ["model.layers=3", "student.layers=4", "layout.processes=2"]
    path = tmp_path / "only.yaml"
    only = {"distill_on_policy": LAPTOP["stages"]["distill_on_policy"]}
    path.write_text(yaml.safe_dump(LAPTOP | {"stages": only}))
    given += ["distill_on_policy.compare_sft_samples=0", "distill_on_policy.layout.pipeline=2"]
    with pytest.raises(UserError, match=r"distill_on_policy \(model\): .*divides neither layers=3"):
        Recipe.load(path, given)
    Recipe.load(path, [*given, "distill_on_policy.teacher_url=tcp://node9:29600"])
    with pytest.raises(UserError, match=r"a q3mega serve-teacher \(tcp\) writes no text"):
        Recipe.load(EXAMPLES / "laptop.yaml", ["distill_off_policy.teacher_url=tcp://node9:1"])


def test_paths_are_those_beside_the_recipe_and_of_overrides_those_of_the_shell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "shell").mkdir()
    tiny = (Path(__file__).parents[1] / "helpers" / "tiny.yaml").read_text()
    (tmp_path / "base" / "b.yaml").write_text(tiny + "\nrewards: [mine.py]\n")
    (tmp_path / "r.yaml").write_text(
        "base: base/b.yaml\nstages:\n  general_rl: {problems: {rows/a.jsonl: 1, agent_sql: 2}}\n"
        "  pretrain_long: {init: hf}\n  reasoning_rl: {init: /models/x}\n"
    )
    monkeypatch.chdir(tmp_path / "shell")
    mixture = "pretrain_general.mixture={'curated:web': 1, facts: 1}"
    recipe = Recipe.load("../r.yaml", [mixture, "general_rl.judge_examples=~/j.jsonl"])
    stages = recipe.stages
    assert recipe.rewards == (f"{tmp_path}/base/mine.py",)
    assert set(stages["general_rl"].problems) == {f"{tmp_path}/rows/a.jsonl", "agent_sql"}
    assert stages["general_rl"].judge_examples == str(Path("~/j.jsonl").expanduser())
    assert stages["pretrain_long"].init == f"{tmp_path}/hf"
    assert stages["reasoning_rl"].init == "/models/x"
    assert set(stages["pretrain_general"].mixture) == {f"curated:{tmp_path}/shell/web", "facts"}


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("4:00:00", "4:00:00"), ("on", "on"), ("no", "no"), ("2024-01-01", "2024-01-01"),
        ("012", 12), ("0o17", 15), ("1_000", "1_000"), ("true", True), ("1e-4", 1e-4),
        ("1.10", 1.1), ("~", None), ("{a: &x {b: 1}, c: {<<: *x}}", {"a": {"b": 1}, "c": {"b": 1}}),
    ],
)  # fmt: skip
def test_scalars_are_those_of_yaml_1_2(text: str, value: Any) -> None:
    assert parse_yaml(text, "here") == value
    assert type(parse_yaml(text, "here")) in type(value).__mro__ or isinstance(value, int | float)


def test_a_number_keeps_its_spelling_where_text_is_meant(tiny: Path) -> None:
    given = ["slurm.account=012345", "slurm.qos=1.10", "slurm.gpus=off", "eval_problems=1_000"]
    recipe = Recipe.load(tiny, [*given, "seed=012", "slurm.setup=[on]"])
    assert (recipe.slurm.account, recipe.slurm.qos, recipe.slurm.setup) == (
        "012345",
        "1.10",
        ("on",),
    )
    assert (recipe.slurm.gpus, recipe.eval_problems, recipe.seed) == (False, 1000, 12)


@pytest.mark.parametrize(
    ("time", "minutes"),
    [("4:00:00", 240), ("90", 90), ("30:00", 30), ("1-2", 1560), ("2-00:30:00", 2910), ("0", 0)],
)
def test_time_limits_are_sbatchs(tiny: Path, time: str, minutes: float) -> None:
    slurm = Recipe.load(tiny, [f"slurm.time={time}"]).slurm
    assert (slurm.time, slurm.minutes) == (time, minutes)
    assert slurm.lead == 600 if minutes == 0 else slurm.lead <= minutes * 30


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("slurm.time=4h", "'4h' is no time limit: write MINUTES"),
        ('slurm.partition="a\\n#SBATCH --uid=0"', "slurm.partition"),
        ('slurm.options=["--x=1\\nrm"]', "slurm.options.0"),
        ("slurm.options=[licenses]", "slurm.options.0='licenses'"),
        ("slurm.container_image=a", "name it in slurm.python"),
        ("lr=1", "it belongs to a section: pretrain_general.lr, cold_start.lr, reasoning_rl.lr"),
        ("tensor=2", "it belongs to a section: layout.tensor"),
        ("qqqq=2", "there are name, seed, "),
    ],
)
def test_what_is_refused_of_a_cluster_and_of_names(tiny: Path, override: str, words: str) -> None:
    assert words in refusal(tiny, override)


def test_maps_by_files_are_replaced_and_sections_merged(tmp_path: Path) -> None:
    rl = LAPTOP["stages"]["general_rl"] | {"problems": {"a.jsonl": 1.0}, "judge_model": None}
    fusion = LAPTOP["stages"]["mode_fusion"] | {"non_thinking": {"b.jsonl": 3}}
    base = TINY | {"stages": {"mode_fusion": fusion, "general_rl": rl}, "rewards": ["x.py", "y.py"]}
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(base))
    (tmp_path / "top.yaml").write_text(
        "base: base.yaml\nrewards: [z.py]\nstages:\n  general_rl: {problems: {c.jsonl: 2}, "
        "judge: {steps: 5}}\n  mode_fusion: {non_thinking: {d.jsonl: 4}, lr: 0.5}\n"
    )
    recipe = Recipe.load(tmp_path / "top.yaml")
    assert recipe.stages["general_rl"].problems == {f"{tmp_path}/c.jsonl": 2}
    assert recipe.stages["general_rl"].judge.steps == 5
    assert recipe.stages["mode_fusion"].non_thinking == {f"{tmp_path}/d.jsonl": 4}
    assert recipe.stages["mode_fusion"].budgets == tuple(fusion["budgets"])
    assert recipe.rewards == (f"{tmp_path}/z.py",)


def test_a_size_takes_the_numbers_under_it_along(tmp_path: Path) -> None:
    (tmp_path / "top.yaml").write_text(
        f"base: {EXAMPLES / 'laptop.yaml'}\nmodel: {{size: qwen3-0.6b, layers: 4}}\n"
    )
    small = QWEN3["qwen3-0.6b"]
    over_base = Recipe.load(tmp_path / "top.yaml").model
    by_override = Recipe.load(EXAMPLES / "laptop.yaml", ["model.size=qwen3-0.6b"]).model
    assert (over_base.hidden, over_base.layers) == (small.hidden, 4)
    assert (by_override.hidden, by_override.layers) == (small.hidden, small.layers)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("evaluated=3", "evaluated is called eval_problems now"),
        ("model.balance=0.1", "model.balance is called router_aux_loss_coef now"),
        ("reasoning_rl.engine={kind: vllm}", "reasoning_rl.engine is called rollout_servers now"),
        ("reasoning_rl.entropy_hold=1", "entropy_hold is called entropy_target_ratio now"),
        (
            "reasoning_rl.rollout_servers={kind: vllm, urls: [http://a], sync: folder}",
            "rollout_servers.sync is called weight_sync now",
        ),
        (
            "reasoning_rl.rollout_servers={kind: vllm, urls: [http://a], timeout: 9}",
            "rollout_servers.timeout is called timeout_s now",
        ),
        (
            "cold_start.teacher={path: x, switch: false}",
            "switch is called send_enable_thinking now",
        ),
    ],
)
def test_an_old_key_is_answered_with_its_name_today(tiny: Path, override: str, words: str) -> None:
    assert words in refusal(tiny, override)


def test_no_old_key_is_a_field() -> None:
    for section in (Recipe, ModelSpec, ChatModelSpec, RolloutServers, *STAGES.values()):
        assert not RENAMED_KEYS.keys() & section.model_fields.keys()
