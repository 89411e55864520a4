import pytest

from q3mega.rewards import score
from q3mega.rewards.programs.extraction import program

SUM = "a, b = map(int, input().split())\nprint(a + b)"
CASES = {"cases": [{"stdin": "1 2\n", "stdout": "3"}, {"stdin": "4 5", "stdout": "9\n"}]}
BLOCK = f"```python\n{SUM}\n```"


@pytest.mark.parametrize(
    "reply",
    [
        *(f"```{mark}\n{SUM}\n```" for mark in (
            "python", "python3", "Python", "PY", "py3", "python3.11", " python ", "{.python}",
            "{python, echo=FALSE}", "{.python .numberLines}", 'python title="a.py"',
            "python:main.py", "python,editable", "ipython", "",
        )),
        BLOCK.replace("\n", "\r\n"),
        f"So:\n\n~~~python\n{SUM}\n~~~\n",
        f"````python\n{SUM}\n````\n",
        f"```python\n{SUM}```\nIt adds.",
        f"```python\n{SUM}\n",
        "1. So:\n   " + BLOCK.replace("\n", "\n   "),
        "- " + BLOCK.replace("\n", "\n  "),
        BLOCK.replace("\n", "\n    ").replace("    ```", "```"),
        f"{BLOCK}\nIt prints\n```\n5\n```\n",
        f"{BLOCK}\n```text\nIt's 5\n```\n```bash\npython main.py\n```",
        f"```\npip install rich\n```\n```\n{SUM}\n```\n```\npython a.py < in\n```\n```\n5\n```",
        f"{BLOCK}\n```python\n>>> 2 + 3\n5\n```",
        f"{BLOCK}\n```python\n# Input: 2 3\n# Output: 5\n```",
        f"```cpp\nint x;\n```\n{BLOCK}\n```json\n{{}}\n```",
        SUM,
        f"<think>\n```python\nprint(0)\n```\n</think>\n\n{BLOCK}",
    ],
)  # fmt: skip
def test_a_program_in_any_form_of_fence(reply):
    assert score("code", reply, {"tests": CASES}).reason == "all tests passed"


def test_a_fence_in_a_string_or_a_comment_closes_nothing():
    text = "s = '''\n```\nexample\n```\n'''\nx = 1  # ends in ```\ny = \"'''\"\n"
    assert program(f"```python\n{text}```\n\n```\n5\n```") == text
    cut = "print('''\n```\nThat is all.\n```\nmore"  # a string that never ends hides nothing
    assert program(f"```python\n{cut}") == "print('''\n"


def test_what_holds_no_program_has_none():
    for reply in ("```cpp\nint x;\n```", " \n", "```python\n```", "```python\n\n```"):
        assert program(reply) is None, reply


@pytest.mark.parametrize(
    "text",
    [
        "```\n" * 30_000, "`" * 100_000, "```python\n" + '"\\' * 50_000, " " * 100_000 + "x",
        "```\n'''\n```\n\"\"\"\n" * 8000, "```python\n" + "a." * 50_000, "~~~ \t" * 20_000,
    ],
)  # fmt: skip
def test_no_text_takes_long_to_read(text):
    """A quadratic search takes half a minute for one of these."""
    chosen = program(text, "f")
    assert chosen is None or chosen in text


def test_the_block_that_defines_the_function_is_the_program():
    right = "```python\ndef add(a, b):\n    return a + b\n```"
    use = "```python\nprint(add(2, 3))\n```"
    assert "return" in program(f"{right}\nUse:\n{use}", "add")
    assert "return" not in program(f"{right}\nUse:\n{use}")
    assert program(f"{right}\n```python\nadd = 1\n```", "add") == "add = 1\n"
