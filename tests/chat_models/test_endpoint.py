"""An OpenAI-compatible server, a real one on this machine, that behaves well and badly."""

import json
import random
import sqlite3
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from helpers.chat_endpoint import served, slowly

from q3mega.chat_models import endpoint as client
from q3mega.chat_models.endpoint import Endpoint, EndpointFailed
from q3mega.data.chat import parse
from q3mega.errors import NoReply, UserError


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(client, "FIRST_BACK_OFF_S", 0.01)


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


# -- what fails for one chat, and what for all -----------------------------------------------------


def refusal(message, status=400, **more):
    return status, {}, json.dumps({"error": {"message": message} | more})


ODD = {
    "content filter": refusal("filtered by policy", code="content_filter"),
    "context too short": refusal("maximum context length is 9 tokens"),
    "request rejected": refusal("no such thing"),
    "server failed": refusal("a bug", 500),
    "empty reply": [{"content": ""}],
}


@pytest.mark.parametrize("rule", ODD)
def test_what_fails_for_one_chat_costs_that_chat(rule, tmp_path):
    def script(request, number):
        return ODD[rule] if request["messages"][-1]["content"] == "b" else ["fine"]

    cache = tmp_path / "replies.sqlite"
    with served(script) as server:
        endpoint = Endpoint(server.url, "judge", cache=cache, retries=1)
        [a], [b], [c], [d] = endpoint.ask(list(map(chat, "abcd")), max_tokens=9)
        assert (a, c, d) == ("fine", "fine", "fine")
        assert isinstance(b, NoReply) and b.rule == rule and f"judge at {server.url}" in b.detail
        server.reply = lambda r, k: ["fine now"]  # what failed is asked again, also after a resume
        again = Endpoint(server.url, "judge", cache=cache)
        assert again.ask(list(map(chat, "abcd")), max_tokens=9)[1] == ["fine now"]
        assert again.cache.spent() == endpoint.cache.spent() > 15 * 4 - 1


def test_one_candidate_may_fail_and_costs_its_tokens():
    said = ["one", {"content": None, "refusal": "no"}, "three"]
    with served(lambda r, k: said) as server:
        endpoint = Endpoint(server.url, "judge")
        [[one, three, none]] = endpoint.ask([chat("a")], n=3, max_tokens=9)
        assert (one, three, none.rule) == ("one", "three", "content filter")
        endpoint.ask([chat("a")], n=2, max_tokens=9)
        assert len(server.requests) == 1 and endpoint.cache.spent() == 25


@pytest.mark.parametrize("rule", ODD)
def test_what_fails_for_every_chat_is_an_error_soon(rule):
    with served(lambda r, k: ODD[rule]) as server:
        endpoint = Endpoint(server.url, "judge", retries=0, concurrency=4)
        with pytest.raises(EndpointFailed, match=f"judge at {server.url}"):
            endpoint.ask([chat(str(i)) for i in range(200)], max_tokens=9)
        assert len(server.requests) < 30


@pytest.mark.parametrize("answer", [refusal("no key", 401), refusal("busy", 429), None])
def test_what_is_down_is_an_error_and_no_lost_chat(answer):
    """None: the connections break, and then every one does."""
    with served(lambda r, k: ["fine"] if k == 1 else answer) as server:
        endpoint = Endpoint(server.url, "judge", retries=0, concurrency=1)
        with pytest.raises(EndpointFailed):
            endpoint.ask([chat(str(i)) for i in range(99)], max_tokens=9)


def test_a_broken_answer_is_asked_for_again():
    broken = [None, (200, {}, ""), (200, {}, '{"choices": [{"mess'), refusal("later", 500)]
    with served(lambda r, k: broken[k - 1] if k <= 4 else ["fine"]) as server:
        assert Endpoint(server.url, "judge").ask([chat("a")], max_tokens=9) == [["fine"]]


def test_a_server_that_asks_for_hours_is_an_error_that_says_so():
    busy = (429, {"retry-after": "86400"}, "{}")
    with served(lambda r, k: busy) as server:
        with pytest.raises(EndpointFailed, match=r"wait 86400 s.*run again then"):
            Endpoint(server.url, "judge").ask([chat("a")], max_tokens=9)
        assert len(server.requests) == 1


def test_what_is_under_way_when_the_budget_is_spent_is_kept(tmp_path):
    cache = tmp_path / "replies.sqlite"
    with served(lambda r, k: slowly(0.1 * (k % 4), ["yes"])) as server:
        endpoint = Endpoint(server.url, "judge", cache=cache, token_budget=15, concurrency=4)
        with pytest.raises(UserError, match="token_budget"):
            endpoint.ask([chat(str(i)) for i in range(20)], max_tokens=9)
        assert endpoint.cache.spent() == 15 * len(server.requests)


# -- what servers do not take ----------------------------------------------------------------------


def hosted(request, number):
    """A reasoning model as hosts serve it."""
    if "max_tokens" in request:
        return refusal("Unsupported parameter: 'max_tokens' is not supported with this model. Use "
                       "'max_completion_tokens' instead.", param="max_tokens")  # fmt: skip
    for name in ("chat_template_kwargs", "seed"):
        if name in request:
            return refusal(f"Unrecognized request argument supplied: {name}")
    if request.get("temperature", 1) != 1:
        return refusal("Unsupported value: 'temperature' does not support 0.7 with this model. "
                       "Only the default (1) value is supported.", param="temperature")  # fmt: skip
    return [f"reply {number}"]


def test_a_hosted_reasoning_model_answers_and_is_then_asked_as_it_wants(caplog):
    with served(hosted) as server:
        endpoint = Endpoint(server.url, "o9")
        assert len(endpoint.ask([chat("a")], n=2, max_tokens=9, temperature=0.7)[0]) == 2
        for word in ("token_limit: max_completion_tokens", "temperature: null", "switch: false"):
            assert word in caplog.text
        before = len(server.requests)
        endpoint.ask([chat("b")], max_tokens=9, temperature=0.7)
        assert len(server.requests) == before + 1
        assert set(server.requests[-1]) == {"model", "messages", "n", "max_completion_tokens"}


def test_settings_ask_it_so_from_the_start():
    with served(hosted) as server:
        endpoint = Endpoint(
            server.url, "o9", switch=False, token_limit="max_completion_tokens",
            extra_body={"reasoning_effort": "low", "chat_template_kwargs": {}, "top_p": 1},
        )  # fmt: skip
        endpoint.extra_body.pop("chat_template_kwargs")
        endpoint.ask([chat("a")], max_tokens=9, temperature=None)
        assert server.requests == [
            {"model": "o9", "messages": chat("a"), "n": 1, "max_completion_tokens": 9,
             "reasoning_effort": "low", "top_p": 1}
        ]  # fmt: skip


def test_candidates_are_drawn_with_seeds_of_their_own(tmp_path):
    def frozen(request, number):
        """One choice a request, and the same for the same request."""
        return [str(random.Random(request.get("seed", 0)).random())]

    cache = tmp_path / "replies.sqlite"
    with served(frozen) as server:
        [replies] = Endpoint(server.url, "judge", cache=cache).ask(
            [chat("a")], n=4, max_tokens=9, temperature=0.7
        )
        assert len(set(replies)) == 4
        again = Endpoint(server.url, "judge").ask([chat("a")], n=4, max_tokens=9, temperature=0.7)
        assert again == [replies]  # the seeds of another run are the same


# -- the list of models ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("models", "message"),
    [
        ((200, {"content-type": "text/html"}, "<html>log in</html>"), "log in.*log-in page"),
        ((200, {}, "not JSON"), "no list of models"),
        ((401, {}, "{}"), "key_env"),
        ((200, {}, '{"data": []}'), "it has none"),
        ((200, {}, "{}"), None),
        ((200, {}, '{"data": null}'), None),
        ((200, {}, '[{"id": "judge"}]'), None),
        ((200, {}, '{"models": [{"name": "models/judge"}]}'), None),
        ((200, {}, '{"data": [{"id": "judge:latest"}]}'), None),
        ((404, {}, ""), None),
        ((403, {}, '{"error": "Missing scopes: api.model.read"}'), None),
    ],
)
def test_odd_lists_of_models(models, message):
    with served(echo, models=models) as server:
        endpoint = Endpoint(server.url, "judge", retries=0)
        if message is None:
            endpoint.check()
        else:
            with pytest.raises(UserError, match=message):
                endpoint.check()


# -- keys ------------------------------------------------------------------------------------------


def test_a_key_that_a_reply_holds_is_not_kept(monkeypatch, tmp_path):
    key = "sk-0123456789abcdefghij"
    monkeypatch.setenv("KEY", key)
    cache = tmp_path / "replies.sqlite"
    with served(lambda r, k: [f"You are {key}; http://me:pw@host"]) as server:
        endpoint = Endpoint(server.url, "judge", key_env="KEY", cache=cache)
        assert endpoint.ask([chat("a")], max_tokens=9) == [["You are ***; http://me:pw@host"]]
    assert key.encode() not in cache.read_bytes()


def test_a_url_with_a_password_is_refused():
    with pytest.raises(UserError, match="key_env") as refused:
        Endpoint("http://me:s3cret@host/v1", "judge")
    assert "s3cret" not in str(refused.value)


# -- the cache -------------------------------------------------------------------------------------


def test_a_cache_with_a_write_ahead_log_is_taken_over(tmp_path):
    """Written by an older version, and by a process that was killed within it."""
    path = tmp_path / "replies.sqlite"
    with served(lambda r, k: ["fine"]) as server:
        Endpoint(server.url, "judge", cache=path).ask([chat("a")], max_tokens=9)
        script = (
            f"import os, sqlite3; d = sqlite3.connect({str(path)!r}); "
            "d.execute('pragma journal_mode = wal'); "
            "d.execute(\"insert into replies values ('k', 0, 'kept', 1)\"); d.commit(); os._exit(9)"
        )
        assert subprocess.run([sys.executable, "-c", script]).returncode == 9
        assert path.with_name("replies.sqlite-wal").exists()
        server.requests.clear()
        endpoint = Endpoint(server.url, "judge", cache=path)
        assert endpoint.ask([chat("a")], max_tokens=9) == [["fine"]] and not server.requests
    assert endpoint.cache.replies("k") == ["kept"]
    assert not path.with_name("replies.sqlite-wal").exists()


def test_a_writer_that_is_killed_leaves_a_cache_of_whole_replies(tmp_path):
    path = tmp_path / "replies.sqlite"
    script = (
        f"from pathlib import Path; from q3mega.chat_models.reply_cache import ReplyCache; "
        f"c = ReplyCache(Path({str(path)!r})); c.add('k', 0, ['whole'], 1); "
        "c.database.execute('pragma cache_spill = 1'); "
        "c.database.execute('pragma cache_size = 1'); "
        "c.database.executemany('insert into replies values (?, 0, ?, 1)', "
        "((str(i), 'x' * 9000) for i in range(200))); import os; os._exit(9)"
    )
    assert subprocess.run([sys.executable, "-c", script]).returncode == 9
    cache = Endpoint("http://x/v1", "judge", cache=path).cache
    assert cache.replies("k") == ["whole"] and cache.spent() == 1


def test_a_damaged_cache_is_refused_when_it_shows(tmp_path):
    path = tmp_path / "replies.sqlite"
    cache = Endpoint("http://x/v1", "judge", cache=path).cache
    for i in range(50):
        cache.add(str(i), 0, ["x" * 3000], 1)
    cache.database.close()
    data = bytearray(path.read_bytes())
    data[4096 * 2 :] = random.Random(0).randbytes(len(data) - 4096 * 2)
    path.write_bytes(data)
    with pytest.raises(UserError, match="is no cache of replies"):
        Endpoint("http://x/v1", "judge", cache=path).cache.spent()
