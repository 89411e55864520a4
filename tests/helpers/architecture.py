"""The layers of the package, and the trees of README.md and CONTRIBUTING.md, which come from them.

`python tests/helpers/architecture.py` writes both trees again; tests/test_layers.py holds them.
"""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[2]
LAYERS = (  # from the bottom up; packages of one layer may import each other
    ("errors", "io"),
    ("kernels",),
    ("config",),
    ("ops",),
    ("model", "data", "sandbox"),
    ("problems", "rewards", "environments", "curate"),
    ("corpus",),
    ("engine",),
    ("algorithms", "rollout"),
    ("chat_models", "distillation"),
    ("train", "evaluation"),
    ("stages", "report"),
    ("launch", "planner", "inference"),
    ("tools",),
    ("cli", "__main__"),
)
# Tables that import nothing of the package, so that the lowest layers may read them.
TABLES = ("q3mega.model.sizes",)


def summary(package: str) -> str:
    """The first sentence of a package's or module's docstring."""
    folder = ROOT / ("kernels/triton" if package == "kernels" else f"q3mega/{package}")
    path = folder / "__init__.py" if folder.is_dir() else folder.with_suffix(".py")
    text = ast.get_docstring(ast.parse(path.read_text())) or ""
    return " ".join(text.split("\n\n")[0].split()).removesuffix(".")
