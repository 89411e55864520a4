"""Rows of files as users have them: read, brought into our form, or refused by name."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from q3mega.data.chat import render
from q3mega.errors import UserError
from q3mega.problems import files
from q3mega.problems.rows import of_line
from q3mega.rewards import MODELS, Verdict, reward, score_problem

DOCS = Path(__file__).parents[2] / "docs" / "your_own_data.md"
FACTS = {"tokens": 0, "max_tokens": 1, "scored": dict.fromkeys(MODELS, Verdict(0.0, ""))}
CHAT = [{"role": "user", "content": "1+1?"}]
ASKED = {"question": "1+1?", "reward": "answer", "answer": "2"}


def read(row):
    return of_line(json.dumps(row).encode(), "x.jsonl:3")


def judged(row):
    score_problem(files.as_problem(read(row), "x"), "", **FACTS)


def test_every_row_of_the_documentation_can_be_judged(tmp_path):
    lines = [line for line in DOCS.read_text().splitlines() if line.startswith("{")]
    assert len(lines) > 3
    (tmp_path / "docs.jsonl").write_text("\n".join(lines))
    for problem in files.problems(str(tmp_path / "docs.jsonl")):
        score_problem(problem, "", **FACTS)


@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1))
def test_any_text_is_read_as_it_stands(text):
    row = {"messages": [{"role": "user", "content": text}], "note": [text]}
    for ascii_only in (True, False):
        line = json.dumps(row, ensure_ascii=ascii_only).encode()
        assert of_line(line, "x") == {"where": "x", **row}


def test_lines_end_at_a_newline_and_a_mark_may_stand_first(tmp_path):
    texts = ["a\u2028b", "c\u2029d", "e\x85f", "g\x1ch"]
    rows = [json.dumps(ASKED | {"question": t}, ensure_ascii=False) for t in texts]
    (tmp_path / "x.jsonl").write_bytes(b"\xef\xbb\xbf" + "\r\n\n".join(rows).encode())
    assert [p.question for p in files.problems(str(tmp_path / "x.jsonl"))] == texts


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"answer": ["2", "two"]}, "answer=.'2', 'two'. must be a text or a number"),
        ({"answer": True}, "answer=True must be a text or a number"),
        ({"answer": None}, "answer='' must be the reference"),
        ({"answer": " "}, "answer='' must be the reference"),
        ({"answer": "two", "reward": "json"}, "answer='two' must be JSON"),
        ({"mode": "nothink"}, "mode='nothink' is not allowed"),
        ({"difficulty": "hard"}, "difficulty='hard' must be a whole number"),
        ({"reward": {"answer": -1}}, "must give weights that are numbers above 0"),
        ({"reward": {"answer": True}}, "must give weights that are numbers above 0"),
        ({"reward": ["answer", "answer"]}, "names a reward twice"),
        ({"reward": [3]}, "must name a reward"),
        ({"reward": "constraints"}, "constraints=None must be a list"),
        ({"reward": "code"}, "tests"),
        ({"reward": "string_match", "items": [""]}, "items=.''. must be a list of texts"),
        ({"reward": "length_control", "length": 9}, "length=9 must be one of"),
        ({"reward": "false_premise"}, "premise=None must be true, false or unknown"),
        ({"reward": "tool_calls"}, "calls=None must be a list"),
        ({"reward": "tool_call"}, "must be one tool"),
        ({"meta": "x"}, "meta='x'"),
        ({"documents": [7]}, "documents"),
        ({"tools": {"name": "sql"}}, "tools"),
        ({"question": "a\ud800b"}, "question='a.*' holds half of a surrogate pair"),
        ({"tests": {"cases": [{"stdin": "\0"}]}}, "tests.cases.*stdin.*NUL"),
        ({"question": " "}, "question is blank"),
    ],
)
def test_what_no_stage_could_use_is_refused_with_line_and_field(change, says):
    with pytest.raises(UserError, match=says) as refused:
        judged(ASKED | change)
    assert "x.jsonl:3" in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize("constant", ["NaN", "Infinity", "-Infinity"])
def test_numbers_that_json_has_not_are_refused(constant):
    with pytest.raises(UserError, match=f"x:1: not JSON .{constant} is no number"):
        of_line(f'{{"question": "?", "answer": {constant}}}'.encode(), "x:1")


def test_numbers_are_references_and_null_is_absent():
    assert [read(ASKED | {"answer": n})["answer"] for n in (5, 5.5, " 7\n")] == ["5", "5.5", "7"]
    assert read(ASKED | {"mode": None, "tools": None}) == read(ASKED)


def test_ids_and_tools_are_checked_with_their_line(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text("\n".join(json.dumps(ASKED | {"id": i}) for i in (7, 8, "7")))
    with pytest.raises(UserError, match=r"x.jsonl:3: id='7' is that of .*x.jsonl:1"):
        files.problems(str(path))
    path.write_text(json.dumps(ASKED | {"tools": ["sqll"]}))
    with pytest.raises(UserError, match=r"x.jsonl:1: tools='sqll' is unknown"):
        files.problems(str(path))


def test_a_reward_of_ones_own_may_say_what_it_needs():
    def needs(row):
        if row["style"] not in ("plain", "rich"):
            raise ValueError(f"style={row['style']!r} must be plain or rich")

    reward("styled", needs=needs)(lambda completion, row: 1.0)
    judged(ASKED | {"reward": "styled", "style": "rich"})
    with pytest.raises(UserError, match=r"reward=styled of .*x.jsonl:3.*style='odd' must be plain"):
        judged(ASKED | {"reward": "styled", "style": "odd"})
    with pytest.raises(UserError, match="needs the field 'style'"):
        judged(ASKED | {"reward": "styled"})


CALL = {"type": "function", "function": {"name": "sql", "arguments": {"query": "q"}}}
ON_THE_WIRE = {"id": "1", "function": {"name": "sql", "arguments": '{"query": "q"}'}}


@pytest.mark.parametrize(
    ("turn", "becomes"),
    [
        ({"role": "developer", "content": "Be brief."}, {"role": "system", "content": "Be brief."}),
        ({"role": "assistant", "content": None, "tool_calls": [ON_THE_WIRE]},
         {"role": "assistant", "content": "", "tool_calls": [CALL]}),
        ({"role": "assistant", "tool_calls": [ON_THE_WIRE]},
         {"role": "assistant", "content": "", "tool_calls": [CALL]}),
        ({"role": "assistant", "content": None, "function_call": ON_THE_WIRE["function"]},
         {"role": "assistant", "content": "", "tool_calls": [CALL]}),
        ({"role": "assistant", "content": "x", "tool_calls": None},
         {"role": "assistant", "content": "x"}),
        ({"role": "user", "content": [{"type": "text", "text": c} for c in "ab"]},
         {"role": "user", "content": "ab"}),
    ],
)  # fmt: skip
def test_turns_of_other_interfaces_are_read(turn, becomes):
    row = read({"messages": [turn, *CHAT]})
    assert row["messages"] == [becomes, *CHAT]
    assert render(row["messages"])


@pytest.mark.parametrize(
    ("turn", "says"),
    [
        ({"role": "user", "content": [{"type": "image_url"}]}, r"content\[0\].type='image_url'"),
        ({"role": "user", "content": None}, "content=None"),
        ({"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f",
          "arguments": "{"}}]}, "arguments='{' must be an object"),
        ({"role": "critic", "content": "x"}, "role='critic'"),
        ("hello", "must be a list of role and content"),
    ],
)  # fmt: skip
def test_turns_that_cannot_be_read_are_named(turn, says):
    with pytest.raises(UserError, match=r"x.jsonl:3: messages\[1\].*" + says):
        read({"messages": [CHAT[0], turn]})


APPS = {"inputs": ["1 2\n", ["3", "4"]], "outputs": ["3\n", ["7"]]}
ADD = {"inputs": [[1, 2]], "outputs": [[3]], "fn_name": "add"}
CODE_BENCH = [{"input": "[1, 2]\n3", "output": "6", "testtype": "functional"}]


@pytest.mark.parametrize(
    ("row", "becomes"),
    [
        ({"conversations": [{"from": "human", "value": "1+1?"}]}, {"messages": CHAT}),
        ({"problem": "1+1?", "reward_model": {"ground_truth": "2"}}, {"answer": "2"}),
        ({"prompt": CHAT, "answer": "It is so.\n#### 2"}, {"answer": "2", "messages": CHAT}),
        ({"instruction": "1+1?", "input": "", "output": "2"}, {"response": "2"}),
        ({"chosen": [*CHAT, {"role": "assistant", "content": "2"}],
          "rejected": [*CHAT, {"role": "assistant", "content": "3"}]},
         {"chosen": "2", "rejected": "3", "messages": CHAT}),
        ({"question": "?", "input_output": json.dumps(APPS)},
         {"tests": {"cases": [{"stdin": "1 2\n", "stdout": "3\n"},
                              {"stdin": "3\n4", "stdout": "7"}]}, "reward": "code"}),
        ({"question": "?", "input_output": ADD},
         {"tests": {"entry_point": "add", "calls": [{"arguments": [1, 2], "result": 3}]}}),
        ({"question_content": "?", "public_test_cases": json.dumps(CODE_BENCH),
          "metadata": '{"func_name": "total"}'},
         {"tests": {"entry_point": "total", "calls": [{"arguments": [[1, 2], 3], "result": 6}]}}),
    ],
)  # fmt: skip
def test_rows_in_the_columns_of_known_sets_are_read(row, becomes):
    found = read(row)
    assert {name: found[name] for name in becomes} == becomes


def test_asserted_and_checked_functions_are_judged():
    mbpp = {"text": "Add two numbers.", "test_list": ["assert add(1, 2) == 3"]}
    human = {"prompt": 'def add(a, b):\n    """a + b"""\n', "entry_point": "add",
             "test": "def check(candidate):\n    assert candidate(1, 2) == 3"}  # fmt: skip
    for row in (mbpp, human):
        problem = files.as_problem(read(row), "x")
        reply = "```python\ndef add(a, b):\n    return a {} b\n```"
        assert score_problem(problem, reply.format("+")).score == 1
        assert score_problem(problem, reply.format("-")).score == 0


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"prompt": "?", "instruction_id_list": ["x:y"], "kwargs": [{}]}, "write its demands as"),
        ({"question": "?", "input_output": "{"}, "input_output='{' must be JSON"),
        ({"question": "?", "input_output": {"inputs": []}}, "an object of inputs and outputs"),
        ({"question_content": "?", "public_test_cases": "[]", "private_test_cases": "eJxr"},
         "private_test_cases='eJxr' is a packed pickle, which is never opened"),
        ({"conversations": [{"from": "narrator", "value": "x"}]}, r"conversations\[0\]"),
    ],
)  # fmt: skip
def test_what_is_known_and_cannot_be_used_is_refused_by_name(row, says):
    with pytest.raises(UserError, match=f"x.jsonl:3: .*{says}"):
        read(row)


def test_the_last_turn_of_a_chat_is_its_response(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps({"messages": [*CHAT, {"role": "assistant", "content": "2"}]}))
    (row,) = files.answered(str(path))
    assert (row["messages"], row["response"]) == (CHAT, "2")
    path.write_text(json.dumps({"messages": CHAT}))
    with pytest.raises(UserError, match="response=None must be a text"):
        files.answered(str(path))
    path.write_text(json.dumps({"question": "?", "answer": "1", "response": "2"}))
    with pytest.raises(UserError, match="right: true or false"):
        files.judged(str(path))
