"""The architecture: an import only points down, and what is written of it is generated from it."""

import ast
from collections.abc import Iterator

import pytest
from helpers.architecture import LAYERS, ROOT, TABLES

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
