"""The generated sets: an oracle earns 1 on every row, whoever always says the same earns little."""

import functools
import itertools
import json
import re
from statistics import mean

import pytest

from q3mega.cli import command_parser
from q3mega.data import package_text
from q3mega.data.chat import EMPTY_THINKING, last_flag, render
from q3mega.data.tokenizer import Tokenizer, train_tokenizer
from q3mega.errors import UserError
from q3mega.problems import files
from q3mega.problems.evaluation_sets.counterfactual import TABLES
from q3mega.problems.evaluation_sets.ruler import TASKS
from q3mega.rewards import score
from q3mega.rewards.instructions.constraints import check_constraints
from q3mega.rewards.instructions.text_units import sentences, words

THOUGHT = "<think>\nLet me see.\n</think>\n\n"
_SOURCES = {"en": "year_2889", "de": "django_de", "fr": "django_fr", "es": "django_es",
            "zh": "django_zh_Hans"}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(package_text.documents("year_2889"), 2000, folder)
    return Tokenizer(folder)


def earned(row, completion: str) -> float:
    return score(row["reward"], completion, row).score


@functools.cache
def real_sentences(language: str) -> list[str]:
    all_lines = itertools.chain.from_iterable(
        map(str.splitlines, package_text.documents(_SOURCES[language]))
    )
    # A Django catalogue alternates English and translation.
    lines = list(all_lines) if language == "en" else list(all_lines)[1::2]
    longer = [s.rstrip(".。") for line in lines for s in sentences(line) if len(words(s)) > 5]
    return list(dict.fromkeys(longer))


def write(language: str, row) -> str:
    """A text of exactly as many words as asked, of real sentences, with the words to be used."""
    wanted = next(iter(row["length"].values()))
    stop = "。" if language == "zh" else ". "
    begin = [c["word"] for c in row["constraints"] if c["kind"] == "keyword"]
    room, parts = wanted - sum(len(words(w)) for w in begin), [" ".join(begin)]
    for sentence in real_sentences(language):
        taken = words(sentence)[:room]
        parts, room = [*parts, " ".join(taken)], room - len(taken)
        if not room:
            break
    assert room == 0, "the source is too short"
    return stop.join(parts) + stop


def call(made) -> str:
    return f"<tool_call>\n{json.dumps(made, ensure_ascii=False)}\n</tool_call>"


def solution(name: str, row) -> str:
    match name:
        case "think_flags":
            thinking = (last_flag(row["messages"]) or "think") == "think"
            return f"{THOUGHT if thinking else EMPTY_THINKING}It is \\boxed{{{row['answer']}}}."
        case "length_control":
            return THOUGHT + write(row["constraints"][-1]["code"], row)
        case "counterfactual":
            right = "".join(row["accepted"][:1])
            says = {"true": f"It is {right}.", "false": f"False premise: it is {right}."}
            return THOUGHT + says.get(row["premise"], "Cannot be answered: it is not said.")
        case "tool_use":
            made = [
                {"name": c["name"], "arguments": {k: v[-1] for k, v in c["arguments"].items()}}
                for c in row["calls"]
            ]
            return THOUGHT + ("\n".join(map(call, made[::-1])) or f"So: {row['says'][0]}, right?")
        case "agent_search" | "agent_sql" | "agent_python" | "rag":
            return rf"{THOUGHT}\boxed{{{row['answer']}}}"
    return f"{THOUGHT}They are {', '.join(row['items'])}."


@pytest.mark.parametrize("name", files.SETS)
def test_a_right_reply_earns_all_and_the_same_seed_draws_the_same(name, tokenizer):
    rows = files.rows(name, 120, tokenizer)
    assert rows == files.rows(name, 120, tokenizer) != files.rows(name, 120, tokenizer, seed=1)
    assert len(rows) == 120 and rows[:7] == files.rows(name, 7, tokenizer)
    for row in rows:
        assert render(row["messages"], tools=row.get("tools", ()), add_generation_prompt=True)
        verdict = score(row["reward"], solution(name, row), row)
        assert verdict.score == 1, (row, verdict)


CONSTANT = [
    "",
    THOUGHT,
    "I do not know.",
    "False premise: that is not so.",
    "Cannot be answered: it is not said.",
    "Yes? No? Which one do you mean?",
    "<think>\nnever closed \\boxed{7}",
    "<tool_call>\n{}\n</tool_call>",
    "\\boxed{1} \\boxed{2}",
    call({"name": "get_time", "arguments": {"city": "Lima"}}),
]


@pytest.mark.parametrize("name", [*files.SETS, "ruler:2048"])
@pytest.mark.parametrize("reply", CONSTANT)
def test_the_same_reply_to_everything_earns_little(name, reply, tokenizer):
    rows = files.rows(name, 60 if name in files.SETS else 9, tokenizer)
    assert mean(earned(row, reply) for row in rows) <= 0.32


@pytest.mark.parametrize("name", [*files.SETS, "ruler:2048"])
def test_the_question_said_again_earns_nothing(name, tokenizer):
    for row in files.rows(name, 60 if name in files.SETS else 9, tokenizer):
        asked = row["messages"][-1]["content"]
        # The beginning of a long list may hold an answer by chance.
        assert earned(row, THOUGHT + asked) <= (0 if name in files.SETS else 0.5), row["group"]


def test_flags_decide_wherever_they_stand_and_obeying_alone_is_nothing():
    rows = files.rows("think_flags", 400, None)
    modes = [last_flag(r["messages"]) or "think" for r in rows]
    assert modes.count("think") == 200
    back = [r for r in rows if "/" not in r["messages"][-1]["content"] and last_flag(r["messages"])]
    assert len(back) > 60 and any(last_flag(r["messages"][:1]) for r in back)
    row = next(r for r in rows if last_flag(r["messages"]) == "no_think")
    box = rf"\boxed{{{row['answer']}}}"
    assert earned(row, EMPTY_THINKING + box) == 1
    for wrong in (box, THOUGHT + box, EMPTY_THINKING + r"\boxed{-1}", EMPTY_THINKING):
        assert earned(row, wrong) == 0


def test_lengths_fall_off_with_the_deviation():
    rows = files.rows("length_control", 60, None)
    for row in rows:
        check_constraints(row["constraints"])
    row = next(r for r in rows if "about" in r["length"] and "English" in str(r["messages"]))
    good = write("en", row)
    half = " ".join(good.split()[: row["length"]["about"] // 2])
    some = " ".join(good.split()[: row["length"]["about"] * 4 // 5])
    assert earned(row, good) == 1
    assert 0.5 < earned(row, some) < 0.8 and earned(row, half) < 0.1
    assert earned(row, f"{good} {good}") == 0  # twice as long
    assert earned(row, f"{half} {half}") < 0.2  # a second copy does not count
    off_topic = re.sub(row["constraints"][0]["word"], "thing", good, flags=re.I)
    german = write("de", row)
    assert earned(row, off_topic) == earned(row, german) == 0


def test_length_bounds_of_each_kind():
    said = " ".join(f"Word{i} is here." for i in range(50))  # 150 words

    def at(**length):
        return score("length_control", said, {"length": length}).score

    assert at(at_most=150) == at(at_most=299) == at(at_least=150) == at(about=145) == 1
    assert at(at_most=120) == pytest.approx(0.5) == at(at_least=200)
    assert at(at_most=600) == pytest.approx(0) == at(at_least=300)
    for wrong in ({"about": 0}, {"about": "9"}, {}, {"at_most": 3, "about": 3}, 7):
        with pytest.raises(UserError, match="length="):
            score("length_control", said, {"length": wrong})


def test_false_premises_are_many_and_controls_look_alike():
    assert sum(len(table.rows) for table in TABLES.values()) >= 60
    rows = files.rows("counterfactual", 1200, None)
    assert [r["premise"] for r in rows].count("true") == 600
    false = {r["messages"][0]["content"] for r in rows if r["premise"] == "false"}
    assert len(false) > 300
    for row in rows:  # what would be a wrong answer is never the right one
        assert not set(row["accepted"]) & set(row["rivals"])


def test_a_premise_is_judged_by_what_the_reply_says_of_it():
    def at(premise, said):
        row = {"messages": [{"role": "user", "content": "On which continent is Peru, whose capital "
                             "is Quito?"}], "reward": "false_premise",
               "premise": premise}  # fmt: skip
        right = {"true": ["South America"], "false": ["Lima"], "unknown": []}[premise]
        wrong = {"true": ["Asia"], "false": ["Oslo"], "unknown": []}[premise]
        return earned(row | {"accepted": right, "rivals": wrong}, THOUGHT + said)

    assert at("true", "South America.") == 1
    assert at("true", "It is not a false premise: South America.") == 1
    assert at("true", "The premise is not false. South America.") == 1
    assert at("true", "False premise. South America.") == 0
    assert at("true", "South America or Asia.") == at("true", "Asia.") == 0
    assert at("false", "False premise: its capital is Lima.") == 1
    assert at("false", "The premise of the question is wrong; the capital is Lima.") == 1
    assert at("false", "That can’t be answered.") == 0.5
    assert at("false", "South America; the capital is Lima.") == 0
    assert at("false", "False premise: Lima, Oslo, ...") == 0
    assert at("false", "The premise is not false; Lima.") == 0
    assert at("false", "False premise: Lima. " + "And so on. " * 30) == 0
    assert at("unknown", "The text does not say.") == at("unknown", "It is not mentioned.") == 1
    assert at("unknown", "He is 40.") == 0
    with pytest.raises(UserError, match="premise='maybe'"):
        score("false_premise", "x", {"premise": "maybe"})


def test_always_refusing_gets_half_at_most():
    rows = files.rows("counterfactual", 400, None)
    for said in ("False premise: no.", "Cannot be answered: it is not known."):
        assert mean(earned(row, said) for row in rows) <= 0.5


@pytest.mark.parametrize("length", [2048, 8192])
def test_ruler_fills_the_length_and_holds_what_it_asks_for(length, tokenizer):
    rows = files.rows(f"ruler:{length}", 18, tokenizer)
    assert rows == files.rows(f"ruler:{length}", 18, tokenizer)
    assert [r["group"] for r in rows[:9]] == list(TASKS)
    for row in rows:
        tokens = len(tokenizer.encode(render(row["messages"], add_generation_prompt=True)))
        assert 0.95 * length < tokens <= length, row["group"]
        asked = row["messages"][0]["content"]
        assert all(item in asked for item in [*row["items"], *row["rivals"][:50]])
        assert earned(row, solution("ruler", row)) == 1
        assert earned(row, f"{THOUGHT}{row['items'][0]}") == pytest.approx(1 / len(row["items"]))
        everything = " ".join([*row["items"], *row["rivals"]])
        assert earned(row, everything) <= (0.5 if row["rivals"] else 1)
        assert earned(row, "x" * 500 + f" {everything}") == 0


def test_ruler_answers_follow_from_the_text(tokenizer):
    """Solved from the prompt alone, by other means than the generator's."""
    for row in files.rows("ruler:4096", 27, tokenizer):
        asked = row["messages"][0]["content"]
        body, question = asked.split("\n\n", 1)[1].rsplit("\n\n", 1)
        match row["group"]:
            case "variables":
                value = dict.fromkeys(re.findall(r"value (\d+)", question), None)
                known = set(value)
                for name, source in re.findall(r"^VAR (\w+) = (\w+)$", body, re.M):
                    known |= {name} if source in known else set()
                found = known - set(value)
            case "common words" | "frequent words":
                counts = {w: body.split().count(w) for w in set(body.split())}
                found = set(sorted(counts, key=counts.__getitem__)[-len(row["items"]) :])
            case "question" | "two-hop question":
                people = re.findall(r"(\w+ \w+) became a (\w+) and .* from (\w+ \w+)\.", body)
                trade = {who: what for who, what, _ in people}
                source = {who: other for who, _, other in people}
                who = re.search(r"[A-Z]\w+ [A-Z]\w+", question)[0]
                found = {trade[source[who] if "learned" in question else who]}
            case _:
                pairs = re.findall(r"pass number of the (\w+ \w+) is (\d+)", body)
                found = {number for key, number in pairs if key in question}
        assert found == set(row["items"]), row["group"]


def test_found_reads_words_whole_and_refuses_what_is_no_list():
    row = {"items": ["12", "Ada B"], "rivals": ["13"]}
    for said, share in (("ada  b, 12", 1), ("12.", 0.5), ("120 Adab", 0), ("12 ada b 13", 2 / 3)):
        assert score("string_match", said, row).score == pytest.approx(share)
    assert score("string_match", "<think>\n12", row).score == 0
    for wrong in ({"items": []}, {"items": "12"}, {"items": [12]}, row | {"rivals": [" "]}):
        with pytest.raises(UserError, match=r"(items|rivals)="):
            score("string_match", "12", wrong)


@pytest.mark.parametrize("length", ["", "x", "-5", "²", "9" * 30, "0", "300"])
def test_a_length_that_cannot_be_is_named(length, tokenizer):
    with pytest.raises(UserError, match="ruler:"):
        files.rows(f"ruler:{length}", 9, tokenizer)


def test_the_help_names_every_set():
    commands = command_parser()._subparsers._group_actions[0].choices
    told = " ".join(commands["eval"].format_help().split())
    assert all(name in told for name in files.NAMES)
    with pytest.raises(UserError, match="n=0"):
        files.rows("tool_use", 0, None)
