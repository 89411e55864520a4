import json
import math

import numpy as np
import pytest

from q3mega.errors import UserError
from q3mega.io import exclusive_lock, json_lines, read_json, to_json, whole_records, write_json

SEPARATORS = "a\u2028b\u2029c\u0085d\x0be\x0cf\x1cg\x1dh\x1ei"


def test_a_line_ends_at_a_newline_alone(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [{"text": SEPARATORS}, {"text": "next"}]
    path.write_bytes("".join(to_json(row) + "\n" for row in rows).encode())
    assert whole_records(path) == rows
    assert [number for number, _ in json_lines(path)] == [1, 2]


def test_a_byte_order_mark_and_windows_line_ends_are_no_content(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n\r\n{"a": 2}')
    assert [(n, json.loads(line)) for n, line in json_lines(path)] == [(1, {"a": 1}), (3, {"a": 2})]


def test_half_a_record_is_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n[2]\n{"step": 2, "lo')
    assert whole_records(path) == [{"step": 1}]
    assert whole_records(tmp_path / "none.jsonl") == []


@pytest.mark.parametrize(
    ("value", "read"),
    [
        (
            {"loss": math.nan, "n": [math.inf, -math.inf, 1.5]},
            {"loss": None, "n": [None, None, 1.5]},
        ),
        (
            {"r": np.float32(0.5), "b": np.bool_(True), "i": np.int64(3)},
            {"r": 0.5, "b": True, "i": 3},
        ),
        ({"r": np.float64("nan")}, {"r": None}),
        ("half \ud83d of a pair", "half \ufffd\ufffd\ufffd of a pair"),
        (
            "a whole pair \ud83d\ude00".encode("utf-16", "surrogatepass").decode("utf-16"),
            "a whole pair 😀",
        ),
    ],
)
def test_what_is_written_is_json(tmp_path, value, read):
    path = tmp_path / "results.json"
    write_json(path, value)
    assert json.loads(path.read_bytes(), parse_constant=pytest.fail) == read
    assert read_json(path) == read


def test_a_write_that_breaks_leaves_the_old_file(tmp_path):
    path = tmp_path / "results.json"
    write_json(path, 1)
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert read_json(path) == 1
    assert list(tmp_path.iterdir()) == [path]


def test_a_lock_says_who_holds_it(tmp_path):
    path = tmp_path / ".lock"
    with (
        exclusive_lock(path, ""),
        pytest.raises(UserError, match=r"in use by \d+$"),
        exclusive_lock(path, "in use by {holder}"),
    ):
        pytest.fail("held twice")
