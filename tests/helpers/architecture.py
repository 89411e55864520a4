"""The layers of the package, and the trees in the documentation, which come from them.

`python tests/helpers/architecture.py` writes both trees again; tests/test_layers.py holds them.
"""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = (ROOT / "CONTRIBUTING.md", ROOT / "docs" / "architecture.md")
BEGIN, END = "<!-- tree: python tests/helpers/architecture.py -->", "<!-- end of tree -->"
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


WORDS = {  # of what is one file
    "errors": "the errors that a user meets",
    "io": "JSON, JSON lines, whole files, locks",
    "kernels": "Triton kernels (`kernels/triton`)",
    "inference": "a checkpoint at work by hand: generate, chat, evaluate",
}


def summary(package: str) -> str:
    """The first sentence of a package's or module's docstring."""
    folder = ROOT / ("kernels/triton" if package == "kernels" else f"q3mega/{package}")
    path = folder / "__init__.py" if folder.is_dir() else folder.with_suffix(".py")
    text = ast.get_docstring(ast.parse(path.read_text())) or ""
    return " ".join(text.split("\n\n")[0].split()).removesuffix(".")


def tree() -> str:
    """The layers from the top down, a line for each package."""
    lines = []
    for packages in reversed(LAYERS):
        for package in packages:
            if package != "__main__":
                lines.append(f"{package:<16} {WORDS.get(package) or summary(package)}")
        lines.append("")
    return "\n".join(lines).rstrip("\n") + "\n"


def written(page: str) -> str:
    """A page with the tree between its two markers."""
    before, rest = page.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n```\n{tree()}```\n{END}{after}"


if __name__ == "__main__":
    for path in PAGES:
        path.write_text(written(path.read_text()))
