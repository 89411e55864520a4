"""The Python of docs/operators.md runs as it stands, block after block."""

import re
from pathlib import Path

import torch

PAGE = Path(__file__).parents[2] / "docs/operators.md"


def test_the_python_of_the_page_runs():
    torch.manual_seed(0)
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    names: dict[str, object] = {}
    exec("\n".join(blocks), names)
    assert len(blocks) == 2 and "out" in names
