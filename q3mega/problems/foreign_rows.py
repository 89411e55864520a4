"""Rows in the columns of known data sets, made rows of ours: docs/your_own_data.md has the table.

What names no reward gets one only where its columns are tests of a program. What cannot be said in
our fields is refused by name.
"""

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from q3mega.config.section import short

Row = dict[str, Any]
_SPEAKERS = {"human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant",
             "assistant": "assistant", "system": "system", "tool": "tool", "observation": "tool",
             "function_call": "assistant"}  # fmt: skip
_ASSERTED = re.compile(r"assert\s+(?:\w+\()*?(?!(?:set|sorted|len|abs|round|math)\b)(\w+)\(")


def converted(row: Row) -> Row:
    """The row in our columns. Raises ValueError for what is known and cannot be used."""
    for convert in _CONVERSIONS:
        row = convert(row)
    return row


def _sharegpt(row: Row) -> Row:
    """conversations: turns of from and value; `system` beside them is the first turn."""
    turns = row.get("conversations")
    if "messages" in row or not isinstance(turns, list):
        return row
    messages = [_spoken(turn, f"conversations[{i}]") for i, turn in enumerate(turns)]
    if isinstance(system := row.get("system"), str) and system:
        messages.insert(0, {"role": "system", "content": system})
    return _without(row, "conversations", "system") | {"messages": messages}


def _spoken(turn: Any, name: str) -> Row:
    if not isinstance(turn, dict):
        raise ValueError(f"{name}={short(turn)} must have from and value")
    if "role" in turn:
        return turn
    role, value = _SPEAKERS.get(str(turn.get("from"))), turn.get("value")
    if role is None or not isinstance(value, str):
        known = ", ".join(_SPEAKERS)
        raise ValueError(f"{name}={short(turn)} must have value, a text, and from, one of {known}")
    if turn["from"] == "function_call":
        return {"role": role, "content": None, "tool_calls": _list(_json(value, f"{name}.value"))}
    return {"role": role, "content": value}


def _alpaca(row: Row) -> Row:
    """instruction, input, output."""
    question = row.get("instruction")
    if not isinstance(question, str) or "messages" in row or "question" in row:
        return row
    if isinstance(more := row.get("input"), str) and more:
        question = f"{question}\n\n{more}"
    answer = {"response": row["output"]} if isinstance(row.get("output"), str) else {}
    return answer | _without(row, "instruction", "input", "output") | {"question": question}


def _ifeval(row: Row) -> Row:
    if "instruction_id_list" in row and "constraints" not in row:
        raise ValueError(
            f"instruction_id_list={short(row['instruction_id_list'])} is IFEval's: write its "
            "demands as constraints (docs/rewards/instructions.md lists the kinds)"
        )
    return row


def _human_eval(row: Row) -> Row:
    """prompt, entry_point, test: the function is asked for, and `check(candidate)` judges it."""
    if not all(isinstance(row.get(k), str) for k in ("prompt", "entry_point", "test")):
        return row
    if "tests" in row:
        return row
    question = "Complete this function. Give the whole program in one ```python block.\n\n"
    question += f"```python\n{row['prompt']}```"
    tests = {
        "entry_point": row["entry_point"].removeprefix("Solution()."),
        "check": row["test"],
        "prompt": row["prompt"],
    }
    return _program(_without(row, "prompt", "entry_point", "test"), tests, question)


def _mbpp(row: Row) -> Row:
    """text or prompt, test_list: the function that the first assertion calls."""
    asserts = row.get("test_list")
    if "tests" in row or not isinstance(asserts, list) or not asserts:
        return row
    name = _ASSERTED.search(str(asserts[0]))
    if name is None or not all(isinstance(line, str) for line in asserts):
        raise ValueError(f"test_list={short(asserts)} must be assertions that call a function")
    imports = _list(row.get("test_setup_code") or row.get("test_imports") or [])
    lines = [line for one in asserts for line in one.split("\n")]
    check = "def check(candidate):\n" + "\n".join(f"    {line}" for line in lines)
    tests = {"entry_point": name[1], "check": "\n".join([*imports, check])}
    question = row.get("question") or row.get("text") or row.get("prompt")
    question = f"{question}\nYour function must be called {name[1]} and pass: {lines[0]}"
    return _program(_without(row, "test_list", "text", "prompt"), tests, question)


def _apps(row: Row) -> Row:
    """input_output of APPS and TACO: JSON of inputs, outputs and, for a function, fn_name."""
    if "tests" in row or "input_output" not in row:
        return row
    given = _json(row["input_output"], "input_output")
    if not isinstance(given, dict) or not all(
        isinstance(given.get(k), list) for k in ("inputs", "outputs")
    ):
        raise ValueError(f"input_output={short(given)} must be an object of inputs and outputs")
    inputs, outputs = given["inputs"], given["outputs"]
    if len(inputs) != len(outputs) or not inputs:
        raise ValueError(f"input_output has {len(inputs)} inputs and {len(outputs)} outputs")
    if name := given.get("fn_name"):
        if all(isinstance(result, list) and len(result) == 1 for result in outputs):
            outputs = [result for (result,) in outputs]  # APPS puts a list around a result
        calls = [{"arguments": a, "result": r} for a, r in zip(inputs, outputs, strict=True)]
        tests: Row = {"entry_point": name, "calls": calls}
    else:
        pairs = zip(map(_lines, inputs), map(_lines, outputs), strict=True)
        tests = {"cases": [{"stdin": i, "stdout": o} for i, o in pairs]}
    return _program(_without(row, "input_output"), tests)


def _live_code_bench(row: Row) -> Row:
    """public_test_cases and private_test_cases: JSON of input, output and testtype."""
    if "tests" in row or "public_test_cases" not in row:
        return row
    cases = _json(row["public_test_cases"], "public_test_cases")
    if private := row.get("private_test_cases"):
        try:
            cases = [*cases, *json.loads(private)]
        except (TypeError, ValueError):
            raise ValueError(
                f"private_test_cases={short(private)} is a packed pickle, which is never opened: "
                "unpack it to JSON yourself, or take the field out"
            ) from None
    if not all(isinstance(c, dict) and {"input", "output", "testtype"} <= c.keys() for c in cases):
        raise ValueError(f"public_test_cases={short(cases)} must have input, output and testtype")
    if all(case["testtype"] == "stdin" for case in cases):
        tests: Row = {"cases": [{"stdin": c["input"], "stdout": c["output"]} for c in cases]}
    else:
        about = _json(row.get("metadata", {}), "metadata")
        if not isinstance(about, dict) or not about.get("func_name"):
            raise ValueError("metadata.func_name is missing, the function that the tests call")
        calls = [
            {"arguments": [_json(line, "input") for line in c["input"].strip("\n").split("\n")],
             "result": _json(c["output"], "output")}
            for c in cases
        ]  # fmt: skip
        tests = {"entry_point": about["func_name"], "calls": calls}
    question = row.get("question_content")
    if isinstance(code := row.get("starter_code"), str) and code:
        question = f"{question}\n\n```python\n{code}\n```"
    gone = ("public_test_cases", "private_test_cases", "metadata", "starter_code")
    return _program(_without(row, *gone, "question_content"), tests, question)


def _question(row: Row) -> Row:
    """problem, prompt or query: a question, or a list of turns."""
    for name in ("problem", "prompt", "query"):
        if "question" in row or "messages" in row:
            break
        if isinstance(row.get(name), str):
            row = _without(row, name) | {"question": row[name]}
        elif isinstance(row.get(name), list):
            row = _without(row, name) | {"messages": row[name]}
    return row


def _reference(row: Row) -> Row:
    """reward_model.ground_truth (verl), and what follows #### in an answer (GSM8K)."""
    model = row.get("reward_model")
    if "answer" not in row and isinstance(model, Mapping) and "ground_truth" in model:
        row = _without(row, "reward_model") | {"answer": model["ground_truth"]}
    answer = row.get("answer")
    if isinstance(answer, str) and "\n#### " in answer:
        row = row | {"answer": answer.rpartition("\n#### ")[2]}
    return row


def _preferences(row: Row) -> Row:
    """chosen and rejected as lists of turns: the last of each is the reply."""
    both = [row.get(name) for name in ("chosen", "rejected")]
    if not all(isinstance(turns, list) and turns for turns in both):
        return row
    (*prompt, better), (*_, worse) = both  # type: ignore[misc]
    if not all(isinstance(t, dict) and t.get("role") == "assistant" for t in (better, worse)):
        raise ValueError("chosen and rejected must end in a turn of the assistant")
    replies = {"chosen": better.get("content"), "rejected": worse.get("content")}
    return ({"messages": prompt} if prompt and "messages" not in row else {}) | row | replies


_CONVERSIONS: tuple[Callable[[Row], Row], ...] = (
    _sharegpt, _alpaca, _ifeval, _human_eval, _mbpp, _apps, _live_code_bench, _preferences,
    _question, _reference,
)  # fmt: skip


def _program(row: Row, tests: Row, text: Any = None) -> Row:
    question = {"question": text} if isinstance(text, str) and "messages" not in row else {}
    return {"reward": "code"} | row | question | {"tests": tests}


def _without(row: Row, *names: str) -> Row:
    return {name: value for name, value in row.items() if name not in names}


def _json(value: Any, name: str) -> Any:
    """What JSON in a text says; anything else is itself."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name}={short(value)} must be JSON ({error})") from None


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _lines(text: Any) -> str:
    """A text, or the lines of one."""
    return "\n".join(map(str, text)) if isinstance(text, list) else str(text)
