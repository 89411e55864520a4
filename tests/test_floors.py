"""The house's one law: an import only points down."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

FLOORS = [  # from the ground up; rooms of one floor may import each other
    {"kernels", "_data", "_cpu", "_cuda"},
    {"ops"},
    {"model", "data", "device"},
    {"algorithms", "rewards", "rollout", "engine", "teacher"},
    {"train"},
    {"stages", "evaluate", "claims", "figures", "report"},
    {
        "driver",
        "console",
        "doctor",
        "run_folder",
        "progress",
        "preflight",
        "slurm",
        "try_out",
        "plan",
        "cost",
        "throughput",
        "convert",
        "mixtures",
        "cli",
        "__main__",
    },
]
HEIGHT = {room: height for height, rooms in enumerate(FLOORS) for room in rooms}
# Plain words that every floor speaks, and what the recipe itself may lean on.
EVERYWHERE = {
    "cluster",
    "errors",
    "io",
    "keys",
    "layout",
    "recipe",
    "sections",
    "server_settings",
    "settings",
}
BELOW_RECIPE = {
    "q3mega.cluster",
    "q3mega.errors",
    "q3mega.io",
    "q3mega.keys",
    "q3mega.layout",
    "q3mega.model.sizes",
    "q3mega.sections",
    "q3mega.server_settings",
    "q3mega.settings",
}


def modules() -> dict[str, str]:
    """Dotted name -> source, of everything the package ships but its front door."""
    found = {}
    for folder, package in (("q3mega", ""), ("kernels", "q3mega.")):
        for path in sorted((ROOT / folder).rglob("*.py")):
            name = package + ".".join(path.relative_to(ROOT).with_suffix("").parts)
            found[name.removesuffix(".__init__")] = path.read_text()
    del found["q3mega"]
    return found


def imports(source: str) -> Iterator[str]:
    """Names of q3mega that a source imports, wherever in it the import stands."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "say where you import from: q3mega.<room>"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from (name for name in names if name.split(".")[0] == "q3mega")


def room(name: str) -> str:
    return name.split(".")[1]


def upward(name: str, source: str) -> list[str]:
    """What module `name` imports from a floor above its own."""
    return [
        target
        for target in imports(source)
        if room(target) not in EVERYWHERE and HEIGHT[room(target)] > HEIGHT[room(name)]
    ]


@pytest.mark.parametrize("name", [n for n in modules() if room(n) not in EVERYWHERE])
def test_imports_point_down(name):
    assert upward(name, modules()[name]) == []


def test_the_recipe_leans_on_tables_alone():
    for name, source in modules().items():
        if room(name) in EVERYWHERE:
            for target in imports(source):
                assert any(f"{target}.".startswith(f"{below}.") for below in BELOW_RECIPE), name


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("from q3mega.train import supervised", ["q3mega.train.supervised"]),
        ("from q3mega import stages", ["q3mega.stages"]),
        ("def f():\n    import q3mega.driver", ["q3mega.driver"]),
        ("from q3mega.rollout.base import Sampler", []),
        ("from q3mega.model.sizes import QWEN3\nimport torch", []),
        ("from q3mega.recipe import Recipe", []),
    ],
)
def test_the_law_sees_what_breaks_it(source, found):
    assert upward("q3mega.rewards.answer", source) == found
