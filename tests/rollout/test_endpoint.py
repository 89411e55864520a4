"""An OpenAI-compatible server, a real one on this machine, that behaves well and badly."""

import sqlite3
from concurrent.futures import ThreadPoolExecutor

import pytest
from served import served, slowly

from q3mega.data.chat import parse
from q3mega.errors import UserError
from q3mega.rollout.endpoint import Endpoint, EndpointFailed


def chat(text):
    return [{"role": "user", "content": text}]


def echo(request, number):
    return [f"{request['messages'][-1]['content']} {number}.{i}" for i in range(request["n"])]


def test_replies_come_in_the_order_of_the_chats():
    with served(lambda r, k: slowly(0.02 * (k % 3), [r["messages"][-1]["content"]])) as server:
        endpoint = Endpoint(server.url, "judge", concurrency=4)
        texts = [f"chat {i}" for i in range(20)]
        assert endpoint.ask(list(map(chat, texts)), max_tokens=9) == [[t] for t in texts]
        assert 1 < server.most_at_once <= 4


def test_what_is_asked_for_reaches_the_server():
    with served(echo) as server:
        Endpoint(server.url, "judge").ask(
            [chat("a")], n=2, max_tokens=9, temperature=0.5, thinking=False
        )
        (request,) = server.requests
        assert request == {
            "model": "judge", "messages": chat("a"), "n": 2, "max_tokens": 9, "temperature": 0.5,
            "chat_template_kwargs": {"enable_thinking": False},
        }  # fmt: skip
        Endpoint(server.url, "judge", switch=False).ask([chat("a")], max_tokens=9)
        assert "chat_template_kwargs" not in server.requests[-1]


def test_a_server_of_one_choice_is_asked_until_there_are_n():
    with served(lambda r, k: [f"reply {k}"]) as server:
        (replies,) = Endpoint(server.url, "judge").ask([chat("a")], n=3, max_tokens=9)
        assert replies == ["reply 1", "reply 2", "reply 3"]
        assert [r["n"] for r in server.requests] == [3, 2, 1]


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning"])
def test_thinking_in_a_field_of_its_own_is_put_before_the_reply(field):
    with served(lambda r, k: [{field: "\nhm\n", "content": "\n\n4"}]) as server:
        [[text]] = Endpoint(server.url, "judge").ask([chat("a")], max_tokens=9)
    assert text == "<think>\nhm\n</think>\n\n4" and parse(text).thinking == "hm"


def test_thinking_that_was_cut_stays_open():
    cut = {"reasoning_content": "hm", "content": None, "finish_reason": "length"}
    with served(lambda r, k: [cut]) as server:
        [[text]] = Endpoint(server.url, "judge").ask([chat("a")], max_tokens=9)
    assert not parse(text).closed


def test_equal_chats_are_asked_once():
    with served(echo) as server:
        a, b, c = Endpoint(server.url, "judge").ask(list(map(chat, "aba")), max_tokens=9)
        assert a == c != b and len(server.requests) == 2


def test_nothing_is_paid_for_twice(tmp_path):
    cache = tmp_path / "replies.sqlite"
    with served(echo) as server:
        first = Endpoint(server.url, "judge", cache=cache).ask([chat("a")], n=2, max_tokens=9)
        again = Endpoint(server.url, "judge", cache=cache)
        assert again.ask([chat("a")], n=2, max_tokens=9) == first
        assert len(server.requests) == 1
        (more,) = again.ask([chat("a")], n=3, max_tokens=9)
        assert more[:2] == first[0] and len(server.requests) == 2
        again.ask([chat("a")], max_tokens=9, temperature=1.0)
        again.ask([chat("a")], max_tokens=8)
        again.ask([chat("a")], max_tokens=9, thinking=False)
        assert len(server.requests) == 5  # other settings are other questions
        assert again.cache.spent() == 20 + 15 + 15 + 15 + 15


def test_what_was_answered_before_a_failure_is_kept(tmp_path):
    cache = tmp_path / "replies.sqlite"

    def script(request, number):
        bad = request["messages"][-1]["content"] == "c"
        return (401, {}, '{"error": {"message": "no"}}') if bad else ["yes"]

    with served(script) as server:
        endpoint = Endpoint(server.url, "judge", cache=cache, concurrency=1)
        with pytest.raises(EndpointFailed, match="no"):
            endpoint.ask(list(map(chat, "abcd")), max_tokens=9)
        server.requests.clear()
        server.reply = lambda r, k: ["yes"]
        Endpoint(server.url, "judge", cache=cache).ask(list(map(chat, "abcd")), max_tokens=9)
        assert sorted(r["messages"][-1]["content"] for r in server.requests) == ["c", "d"]


def test_two_processes_may_share_a_cache(tmp_path):
    cache = tmp_path / "replies.sqlite"
    with served(echo) as server, ThreadPoolExecutor() as pool:

        def work(_):
            endpoint = Endpoint(server.url, "judge", cache=cache)
            return endpoint.ask([chat(str(i)) for i in range(30)], max_tokens=9)

        list(pool.map(work, range(3)))
        one = Endpoint(server.url, "judge", cache=cache)
        server.requests.clear()
        assert len(one.ask([chat(str(i)) for i in range(30)], max_tokens=9)) == 30
        assert not server.requests


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_passing_failure_is_tried_again(status):
    def script(request, number):
        return ["fine"] if number > 2 else (status, {"retry-after": "0.05"}, "{}")

    with served(script) as server:
        assert Endpoint(server.url, "judge").ask([chat("a")], max_tokens=9) == [["fine"]]
        assert len(server.requests) == 3


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ((401, {}, '{"error": {"message": "bad key s3cret"}}'), r"bad key \*\*\*.*key_env"),
        ((404, {}, '{"error": {"message": "no model"}}'), "no model.*url must end in"),
        ((400, {}, '{"error": {"message": "too long"}}'), "too long.*a shorter prompt"),
        ((503, {"retry-after": "0.01"}, "{}"), "503.*see the server's log"),
        ((200, {}, "{broken"), "judge at http"),
        ((200, {}, '{"choices": []}'), "gave no reply"),
        ((200, {}, "{}"), "gave no reply"),
        ([{"content": None, "finish_reason": "content_filter"}], "without text.*content_filter"),
    ],
)
def test_a_lasting_failure_is_an_error_that_says_what_to_do(answer, message, monkeypatch):
    monkeypatch.setenv("KEY", "s3cret")
    with served(lambda r, k: answer) as server:
        endpoint = Endpoint(server.url, "judge", key_env="KEY", retries=1)
        with pytest.raises(EndpointFailed, match=message) as found:
            endpoint.ask([chat("a")], max_tokens=9)
        assert "s3cret" not in str(found.value)
        assert server.headers[0]["authorization"] == "Bearer s3cret"


def test_no_server_and_a_slow_one():
    with pytest.raises(EndpointFailed, match="is the server up"):
        Endpoint("http://127.0.0.1:9/v1", "judge", retries=0).ask([chat("a")], max_tokens=9)
    with served(lambda r, k: slowly(1.0, ["late"])) as server:
        endpoint = Endpoint(server.url, "judge", retries=0, timeout=0.2)
        with pytest.raises(EndpointFailed, match="it took too long"):
            endpoint.ask([chat("a")], max_tokens=9)


def test_the_budget_holds_over_runs(tmp_path):
    cache = tmp_path / "replies.sqlite"
    with served(echo) as server:
        endpoint = Endpoint(server.url, "judge", cache=cache, token_budget=40, concurrency=1)
        with pytest.raises(UserError, match=r"token_budget=40: 45 tokens of judge"):
            endpoint.ask(list(map(chat, "abcdef")), max_tokens=9)
        again = Endpoint(server.url, "judge", cache=cache, token_budget=40)
        assert len(again.ask(list(map(chat, "abc")), max_tokens=9)) == 3  # paid for before
        with pytest.raises(UserError, match="raise it to go on"):
            again.ask([chat("f")], max_tokens=9)
        assert len(server.requests) == 3


def test_the_models_of_a_server_are_looked_at_first():
    with served(echo, models=("qwen3-8b", "qwen3-32b")) as server:
        Endpoint(server.url, "qwen3-8b").check()
        with pytest.raises(UserError, match=r"model=judge is not served.*qwen3-8b, qwen3-32b"):
            Endpoint(server.url, "judge").check()
        assert not server.requests
    with pytest.raises(EndpointFailed, match="is the server up"):
        Endpoint("http://127.0.0.1:9/v1", "judge", retries=0).check()


def test_bad_settings_are_refused(tmp_path):
    with pytest.raises(UserError, match="key_env=NO_SUCH_KEY"):
        Endpoint("http://x/v1", "judge", key_env="NO_SUCH_KEY")
    text = tmp_path / "notes.txt"
    text.write_text("not a database, but longer than a header of one" * 40)
    with pytest.raises(UserError, match="is no cache of replies"):
        Endpoint("http://x/v1", "judge", cache=text)
    assert text.read_text().startswith("not a database")
    other = tmp_path / "other.sqlite"
    sqlite3.connect(other).execute("create table replies (x)").connection.commit()
    with pytest.raises(UserError, match="is no cache of replies"):
        Endpoint("http://x/v1", "judge", cache=other).ask([chat("a")], max_tokens=9)
