"""Keys and passwords are in no message, however a server or a client spells them."""

import base64
import html
import json
from urllib.parse import quote, quote_plus

import pytest
from hypothesis import given
from hypothesis import strategies as st

from q3mega.config import secrets
from q3mega.config.recipe import Recipe
from q3mega.errors import UserError

KEY = "sk-very/secret+key <4321>"


@pytest.fixture
def key(monkeypatch):
    monkeypatch.setattr(secrets, "_handed_out", set())
    monkeypatch.setenv("A_KEY", f"{KEY}\n")
    return secrets.key_of("key_env", "A_KEY")


@pytest.mark.parametrize(
    "spell",
    [
        str, str.upper, quote, quote_plus, lambda k: quote(k, safe="").lower(), repr, json.dumps,
        html.escape, lambda k: k.encode().hex(),
    ],
)  # fmt: skip
def test_a_key_is_taken_out_in_every_spelling(key, spell):
    assert key == KEY
    shown = secrets.redacted(f"bad key {spell(key)}, see /v1")
    assert "bad key" in shown and "***" in shown and ", see /v1" in shown
    assert "secret" not in shown.lower() and spell(key) not in shown


@given(st.binary(max_size=9), st.binary(max_size=9))
def test_a_key_amid_other_bytes_in_base64(before, after):
    secrets._handed_out.add(KEY)
    for encode in (base64.b64encode, base64.urlsafe_b64encode):
        shown = secrets.redacted(encode(before + KEY.encode() + after).decode())
        assert "***" in shown
        assert len(shown) <= len(encode(before + after)) + 3 + 8


def test_what_stands_where_a_key_would_is_taken_out_too():
    assert secrets.redacted("at http://me:pw@host/v1: no") == "at http://***@host/v1: no"
    assert secrets.redacted("/v1?api_key=abc&x=1") == "/v1?api_key=***&x=1"
    assert secrets.redacted("Bearer " + "x" * 20) == "Bearer ***"
    assert secrets.redacted("bearer authentication needed") == "bearer authentication needed"


def test_a_short_key_is_a_word_and_a_cut_leaves_no_half_of_one(monkeypatch):
    monkeypatch.setattr(secrets, "_handed_out", {"EMPTY", "k" * 40})
    assert secrets.redacted("EMPTY is no key, NONEMPTY a word") == "*** is no key, NONEMPTY a word"
    assert "kk" not in secrets.excerpt("a" * 280 + "k" * 40)


@pytest.mark.parametrize("name", ["sk-abc123", "hf_AbCdEfGhIjKl0123456789", "A KEY"])
def test_a_key_for_a_name_is_refused_and_not_shown(name):
    with pytest.raises(UserError, match="not the key itself") as refused:
        secrets.key_of("key_env", name)
    assert name not in str(refused.value)


@pytest.mark.parametrize("held", ["two\nlines", "“sk-1”"])
def test_what_no_header_takes_is_refused_and_not_shown(held, monkeypatch):
    monkeypatch.setenv("A_KEY", held)
    with pytest.raises(UserError, match="no line of ASCII") as refused:
        secrets.key_of("key_env", "A_KEY")
    assert held not in str(refused.value)


@pytest.mark.parametrize(
    "change",
    [
        "cold_start.teacher.url=http://me:s3cret@host/v1",
        "cold_start.teacher.url=http://host/v1?api_key=s3cret",
        "cold_start.teacher.url=ftp://me:s3cret@host/v1",
        "cold_start.teacher.key_env=sk-s3cret",
        "cold_start.teacher.api_key=s3cret",
        "cold_start.teacher.extra_body={headers: {authorization: s3cret}}",
        "reasoning_rl.rollout_servers={kind: vllm, urls: ['http://me:s3cret@host:8000']}",
    ],
)
def test_a_recipe_with_a_key_or_password_in_it_is_refused_and_does_not_show_it(change, own):
    with pytest.raises(UserError) as refused:
        Recipe.load(own, [change])
    assert "s3cret" not in str(refused.value)


@pytest.fixture
def own(tmp_path):
    from pathlib import Path

    text = (Path(__file__).parents[1] / "helpers/own_problems.yaml").read_text()
    path = tmp_path / "own.yaml"
    path.write_text(text.replace("URL", "http://127.0.0.1:9/v1"))
    return path
