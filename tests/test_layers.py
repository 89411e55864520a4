"""The architecture: an import only points down, and what is written of it is generated from it."""

import ast
from collections.abc import Iterator

import pytest
from helpers.architecture import LAYERS, PAGES, ROOT, TABLES, written

HEIGHT = {package: height for height, packages in enumerate(LAYERS) for package in packages}
# Compiled extensions, and what every layer may ask: which device there is.
BELOW_ALL = {"_cpu", "_cuda", "_data", "device", "console"}


def modules() -> dict[str, str]:
    """Dotted name -> source, of everything the package ships but its front door."""
    sources = {}
    for folder, package in (("q3mega", "q3mega"), ("kernels/triton", "q3mega.kernels")):
        for path in sorted((ROOT / folder).rglob("*.py")):
            name = ".".join((package, *path.relative_to(ROOT / folder).with_suffix("").parts))
            sources[name.removesuffix(".__init__")] = path.read_text()
    del sources["q3mega"]
    return sources


def imports(source: str) -> Iterator[str]:
    """Names of q3mega that a source imports, wherever in it the import stands."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "write the absolute name"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from (name for name in names if name.split(".")[0] == "q3mega")


def package(name: str) -> str:
    """The package, or the module, that a dotted name lies in, below q3mega."""
    return name.split(".")[1]


def upward(name: str, source: str) -> list[str]:
    """What module `name` imports from a layer above its own."""
    height = HEIGHT[package(name)] if not name.startswith(TABLES) else 0
    return [
        target
        for target in imports(source)
        if package(target) not in BELOW_ALL
        and not target.startswith(TABLES)
        and HEIGHT[package(target)] > height
    ]


@pytest.mark.parametrize("name", [n for n in modules() if package(n) not in BELOW_ALL])
def test_imports_point_down(name):
    assert upward(name, modules()[name]) == []


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("from q3mega.train import supervised", ["q3mega.train.supervised"]),
        ("from q3mega import stages", ["q3mega.stages"]),
        ("def f():\n    import q3mega.launch.driver", ["q3mega.launch.driver"]),
        ("from q3mega.problems.base import Problem", []),
        ("from q3mega.model.sizes import QWEN3\nimport torch", []),
        ("from q3mega.config.recipe import Recipe", []),
    ],
)
def test_the_law_sees_what_breaks_it(source, found):
    assert upward("q3mega.rewards.math.answer", source) == found


MOST_LINES = 400
STAGES = {path.stem for path in (ROOT / "q3mega/stages").glob("*.py")} - {"__init__", "__main__"}


@pytest.mark.parametrize("name", modules())
def test_a_module_can_be_read_at_once(name):
    assert modules()[name].count("\n") <= MOST_LINES


@pytest.mark.parametrize("stage", sorted(STAGES))
def test_a_stage_imports_no_other(stage):
    others = {f"q3mega.stages.{other}" for other in STAGES - {stage}}
    found = imports(modules()[f"q3mega.stages.{stage}"])
    assert not [name for name in found if ".".join(name.split(".")[:3]) in others]


def undocumented(source: str) -> list[str]:
    """Public functions and methods without a docstring."""
    bodies = [ast.parse(source).body]
    names = []
    while bodies:
        for node in bodies.pop():
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                bodies.append(node.body)
            function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
            if function and not node.name.startswith("_") and not ast.get_docstring(node):
                names.append(node.name)
    return names


@pytest.mark.parametrize("name", modules())
def test_what_is_public_says_what_it_does(name):
    assert undocumented(modules()[name]) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_the_trees_in_the_pages_are_the_package(page):
    assert page.read_text() == written(page.read_text()), "python tests/helpers/architecture.py"
