r"""The tasks of general RL: five capabilities, two tasks or more each, for a tiny model.

`respond(problem, rng, skill)` writes an assistant turn that does the task with probability `skill`
and otherwise fails the way a half-trained model does: wrong count, marker missing, prose for a tool
call, an invented answer. Supervised stages show such half-skill, so that RL has something to lift.
"""

import json
import random
from collections.abc import Sequence
from typing import Any

from q3mega.problems.base import FAMILIES, Problem, family, problem
from q3mega.problems.generated.reasoning import chain_sum

_WORDS = """
ant apple arm bag ball bell bird boat book box bread cake car cat chair cheese clock cloud
coat coin corn cow cup desk dog door drum duck ear egg eye farm fire fish flag flower fly
foot fork fox frog game garden gate glass goat gold grass green hand hat hill home honey
horse house ice ink island jam key king kite lake lamp leaf lemon light lion map milk moon
mouse music nest night nose nut oil onion owl pan paper park pen pig pond queen rain ring
river road rock room rope rose salt sand ship shoe silk snow soap song soup star stone sun
table tea tent tree wall water wheel wind wolf wood
"""
WORDS = _WORDS.split()
VERBS = ("has", "sees", "wants")
NAMES = ("Ann", "Bob", "Eva", "Kim", "Leo", "Tom")
PLACES = ("home", "night", "work", "school", "sea", "noon", "dawn", "lunch", "camp", "dinner")
NOT_FOUND = "not in the text"
OPENINGS = ("Good question.", "Happy to help.", "Sure.")
HELP = "Ask me more."
NO_REPLY = 0.5  # of the preference pairs may hold what is no reply at all
BETWEEN = {3: "at", 4: "is at", 5: "it is at"}  # words of a bounded reply, by its length
OPERATORS = {"plus": ("+", int.__add__), "minus": ("-", int.__sub__), "times": ("*", int.__mul__)}
CALLED = (3, 12)  # arguments of the calls that test a program
CAPABILITIES = ("instruction", "format", "preference", "agent", "rag")


def tool(name: str, argument: str) -> dict[str, Any]:
    """A one-argument tool for the chat template, which prints it as JSON.

    Only the signature, not the whole schema: with it a prompt of these tasks takes under 250 tokens
    of a 512-entry vocabulary, 215 of them the template's own words; a full schema adds 50.
    """
    return {"name": name, "parameters": {argument: "string"}}


CALCULATOR, LOOKUP = tool("calculator", "expression"), tool("lookup", "key")


def _digit(rng: random.Random) -> tuple[str, int]:
    """'The goat has 7.' and 7: something to copy that takes one token."""
    number = rng.randint(1, 9)
    return f"The {rng.choice(WORDS)} {rng.choice(VERBS)} {number}.", number


@family("repeat_digit", capability="instruction", difficulties=range(2, 5))
def repeat_digit(rng: random.Random, times: int) -> Problem:
    """'The goat has 7. Say it 3 times.'"""
    fact, number = _digit(rng)
    answer = " ".join([str(number)] * times)
    return problem("repeat_digit", "instruction", f"{fact} Say it {times} times.", answer, times)


@family("json_digit", capability="instruction", difficulties=range(1, 2))
def json_digit(rng: random.Random, level: int) -> Problem:
    """'The goat has 7. Give it as JSON with key item.'"""
    (fact, number), key = _digit(rng), rng.choice(("word", "name", "item"))
    text = f"{fact} Give it as JSON with key {key}."
    return problem("json_digit", "instruction", text, json.dumps({key: number}), level)


@family("bounded", capability="instruction", difficulties=range(3, 6))
def bounded(rng: random.Random, length: int) -> Problem:
    """'The goat has 7. Start with 7, end with home, 4 words.': three constraints."""
    (fact, number), location = _digit(rng), rng.choice(PLACES)
    text = f"{fact} Start with {number}, end with {location}, {length} words."
    constraints = [
        {"kind": "starts_with", "start": str(number)},
        {"kind": "ends_with", "end": location},
        {"kind": "words", "exactly": length},
    ]
    answer = f"{number} {BETWEEN[length]} {location}"
    return problem(
        "bounded", "instruction", text, answer, length, meta={"constraints": constraints}
    )


@family("program", capability="instruction", difficulties=range(1, 2))
def program(rng: random.Random, level: int) -> Problem:
    """'The goat has 7. Write f(x): x times that.': a function, which tests call."""
    (fact, number), word = _digit(rng), rng.choice(sorted(OPERATORS))
    calls = [{"arguments": [x], "result": OPERATORS[word][1](x, number)} for x in CALLED]
    answer = f"def f(x): return x {OPERATORS[word][0]} {number}"
    meta = {"tests": {"entry_point": "f", "calls": calls}}
    text = f"{fact} Write f(x): x {word} that."
    return problem("program", "instruction", text, answer, level, meta=meta)


@family("think_follow", capability="format", difficulties=range(1, 4))
def think_follow(rng: random.Random, turns: int) -> Problem:
    """1 to 3 user turns of short sums with random flags, now and then in a system turn as well.

    The last flag seen decides, in whichever turn it stands. meta: mode, sum (of the last turn).
    """
    messages: list[dict[str, str]] = []
    mode = "think"
    if rng.random() < 0.2:
        mode = rng.choice(("think", "no_think"))
        messages.append({"role": "system", "content": f"/{mode}"})
    for turn in range(turns):
        flagged = 2 / 3 if turn < turns - 1 else 0.8
        query = chain_sum(rng, rng.randint(2, 3))
        # The last turn mostly has a flag of its own; without one the model has to look back.
        flag = rng.choice(("/think", "/no_think")) if rng.random() < flagged else ""
        mode = flag[1:] or mode
        messages.append({"role": "user", "content": f"{query.question} {flag}".strip()})
        if turn < turns - 1:
            messages.append({"role": "assistant", "content": finish(query, query.answer)})
    meta = {"mode": mode, "sum": query.meta}
    return problem("think_follow", "format", messages, query.answer, turns, meta=meta)


@family("boxed_digit", capability="format", difficulties=range(1, 2))
def boxed_digit(rng: random.Random, level: int) -> Problem:
    """'The goat has 7. Put it in a box.': the box and nothing else."""
    fact, number = _digit(rng)
    text = f"{fact} Put it in a box."
    return problem("boxed_digit", "format", text, rf"\boxed{{{number}}}", level)


@family("describe", capability="preference", difficulties=range(1, 2))
def describe(rng: random.Random, level: int) -> Problem:
    """'Tell me about goat 7 at home.': an open query for the preference model. meta: topic."""
    topic = str(rng.randint(1, 9))
    how = rng.choice(("Tell me about", "Say something about", "Talk about"))
    text = f"{how} {rng.choice(WORDS)} {topic} at {rng.choice(PLACES)}."
    return problem("describe", "preference", text, "", level, meta={"topic": topic})


@family("advise", capability="preference", difficulties=range(1, 2))
def advise(rng: random.Random, level: int) -> Problem:
    """'How do I find house 7 at noon with tea?': likewise."""
    topic = str(rng.randint(1, 9))
    text = f"How do I find house {topic} at {rng.choice(PLACES)} with {rng.choice(WORDS)}?"
    return problem("advise", "preference", text, "", level, meta={"topic": topic})


@family("calculator", capability="agent", difficulties=range(1, 2))
def calculator(rng: random.Random, level: int) -> Problem:
    """A product, which the model has not learned, with a calculator at hand."""
    a, b = rng.randint(2, 9), rng.randint(2, 9)
    text = f"The {rng.choice(WORDS)} {rng.choice(VERBS)} {a}*{b}. Compute."
    meta = {"argument": f"{a}*{b}"}
    return problem("calculator", "agent", text, str(a * b), level, meta=meta, tools=[CALCULATOR])


@family("lookup", capability="agent", difficulties=range(1, 2))
def lookup(rng: random.Random, level: int) -> Problem:
    """A value that only the environment's table knows. meta: argument, table."""
    fact, number = _digit(rng)
    # The table of a fact holds the same for everybody who asks.
    table = {str(number): str(random.Random(fact).randint(1, 9))}
    meta = {"argument": str(number), "table": table}
    answer = table[str(number)]
    return problem(
        "lookup", "agent", f"{fact} Look it up.", answer, level, meta=meta, tools=[LOOKUP]
    )


@family("rag_answer", capability="rag", difficulties=range(1, 3))
def rag_answer(rng: random.Random, facts: int) -> Problem:
    """'On the goat: Ann has 3. Bob has 7. How many has Bob?'; or of one not there."""
    people, rows = _facts(rng, facts)
    gone = rng.random() < 1 / 3
    who = rng.choice([n for n in NAMES if n not in people] if gone else sorted(people))
    answer = NOT_FOUND if gone else people[who]
    text = f"On the {rng.choice(WORDS)}: {rows} How many has {who}?"
    meta = {"choices": [*sorted(people.values()), NOT_FOUND]}
    return problem("rag_answer", "rag", text, answer, facts, meta=meta)


@family("rag_name", capability="rag", difficulties=range(1, 3))
def rag_name(rng: random.Random, facts: int) -> Problem:
    """'On the goat: Ann has 3. Bob has 7. Who has 7?'; likewise."""
    people, rows = _facts(rng, facts)
    gone = rng.random() < 1 / 3
    who, free = rng.choice(sorted(people)), set(range(1, 10)) - set(map(int, people.values()))
    number = rng.choice(sorted(free)) if gone else people[who]
    answer = NOT_FOUND if gone else who
    text = f"On the {rng.choice(WORDS)}: {rows} Who has {number}?"
    meta = {"choices": [*sorted(people), NOT_FOUND]}
    return problem("rag_name", "rag", text, answer, facts, meta=meta)


def _facts(rng: random.Random, n: int) -> tuple[dict[str, str], str]:
    numbers = rng.sample(range(1, 10), n)
    people = dict(zip(rng.sample(NAMES, n), map(str, numbers), strict=True))
    return people, " ".join(f"{name} has {number}." for name, number in people.items())


GENERAL = tuple(name for name, f in FAMILIES.items() if f.capability in CAPABILITIES)


def draw(rng: random.Random, families: Sequence[str] = GENERAL) -> Problem:
    """A training-side problem of a random family."""
    while True:
        spec = FAMILIES[rng.choice(families)]
        drawn = spec.make(rng, rng.choice(spec.difficulties))
        if not drawn.heldout:
            return drawn


def draw_follow(rng: random.Random) -> Problem:
    """A training-side think_follow; every second one has to look back for its mode.

    Earlier replies show no thinking, so a last turn without a flag is where a model goes wrong.
    """
    look_back = rng.random() < 0.5
    while True:
        drawn = draw(rng, ["think_follow"])
        users = [m for m in drawn.messages if m["role"] == "user"]
        if not look_back or (len(users) > 1 and "/" not in users[-1]["content"]):
            return drawn


def call(name: str, argument: str, value: str) -> str:
    """An assistant turn that calls a tool, as the template writes it."""
    body = f'{{"name": "{name}", "arguments": {json.dumps({argument: value})}}}'
    return f"<tool_call>\n{body}\n</tool_call>"


def finish(query: Problem, result: str) -> str:
    r"""'The answer is \boxed{24}.': the turn after a tool's result, or after the thinking."""
    return rf"The answer is \boxed{{{result}}}."


def respond(query: Problem, rng: random.Random, skill: float) -> str:
    """A non-thinking assistant turn (the first one, with tools) that succeeds at rate `skill`."""
    return _right(query, rng) if rng.random() < skill else _wrong(query, rng)


def episode(query: Problem, rng: random.Random, skill: float) -> list[dict[str, str]]:
    """`respond`'s turn; after a tool call also the tool's answer and the turn that passes it on."""
    turns = [{"role": "assistant", "content": respond(query, rng, skill)}]
    if "<tool_call>" in turns[0]["content"]:
        turns.append({"role": "tool", "content": query.answer})
        turns.append({"role": "assistant", "content": finish(query, query.answer)})
    return turns


def _right(query: Problem, rng: random.Random) -> str:
    if query.tools:
        [(name, argument)] = [(t["name"], *t["parameters"]) for t in query.tools]
        return call(name, argument, query.meta["argument"])
    if query.capability == "preference":
        return styled(query, rng)
    return finish(query, query.answer) if query.family == "think_follow" else query.answer


def _wrong(query: Problem, rng: random.Random) -> str:
    match query.family:
        case "repeat_digit":
            times = [n for n in range(1, 6) if n != query.difficulty]
            return " ".join([query.answer[0]] * rng.choice(times))
        case "json_digit":
            ((key, number),) = json.loads(query.answer).items()
            return rng.choice([f"{{{key}: {number}}}", str(number), f"{key} {number}"])
        case "bounded":
            start, *between, end = query.answer.split()
            return rng.choice(
                (" ".join([start, *between]), f"{start} {end}", " ".join([*between, end]))
            )
        case "program":
            signature, formula = query.answer.split("return ")
            return rng.choice((signature + formula, f"It is {formula}.", f"{signature}return 0"))
        case "boxed_digit":
            number = query.answer[7:-1]
            return rng.choice((number, f"The box is {query.answer}.", "\\boxed{}"))
        case "think_follow":
            return f"The answer is {query.answer}."
        case "describe" | "advise":
            return plain(query, rng)
        case "calculator" | "lookup":  # an invented result, or prose where a call was due
            prose = f"I use the {query.family} with {query.meta['argument']}."
            return rng.choice([f"It is {rng.randint(1, 99)}.", prose])
        case _:  # rag: an answer from the text, whether or not it fits
            return rng.choice([c for c in query.meta["choices"] if c != query.answer])


def _on_topic(query: Problem, rng: random.Random) -> tuple[str, str]:
    """Two sentences that hold the topic."""
    topic = query.meta["topic"]
    if query.family == "advise":
        first, second = (
            ("You can walk to house", "There is a way to house"),
            ("Ask for", "Look for"),
        )
    else:
        first, second = ("I like number", "Many like number"), ("Take time for", "Look at")
    return f"{rng.choice(first)} {topic}.", f"{rng.choice(second)} {topic}."


def styled(query: Problem, rng: random.Random) -> str:
    """A reply as users like it: polite, on the topic twice, with an offer to help."""
    return " ".join([rng.choice(OPENINGS), *_on_topic(query, rng), HELP])


def plain(query: Problem, rng: random.Random) -> str:
    """A reply that users like less: curt, off the topic, repeating itself, or without the offer."""
    first, second = _on_topic(query, rng)
    opening, other = rng.choice(OPENINGS), rng.choice(WORDS)
    return rng.choice(
        (
            f"{query.meta['topic']}.",
            "I do not know.",
            " ".join([first] * 3),
            f"{opening} I like {other}. {HELP}",
            f"{first} {second}",
            f"{opening} {first}",
        )
    )


def rubric(text: str, query: Problem) -> float:
    """The hidden preference in [0, 1]: a quarter a part. For pairs and evaluation only."""
    sentences = [s.strip() for s in text.replace("?", ".").split(".") if s.strip()]
    topic = query.meta["topic"]
    parts = (
        text.startswith(OPENINGS),
        sum(topic in s.split() for s in sentences) >= 2,
        text.endswith(HELP),
        3 <= len(sentences) == len(set(sentences)) <= 6,
    )
    return sum(parts) / len(parts)


def preference_pairs(n: int, seed: int, heldout: bool = False) -> list[tuple[Problem, str, str]]:
    """n (problem, chosen, rejected) by the hidden preference; some lack a single part of it, and
    what is no reply at all loses to whatever is one."""
    rng = random.Random(f"pairs/{seed}/{heldout}")
    pairs: list[tuple[Problem, str, str]] = []
    while len(pairs) < n:
        spec = FAMILIES[rng.choice(("describe", "advise"))]
        query = spec.make(rng, 1)
        if query.heldout != heldout:
            continue
        replies = [styled(query, rng), plain(query, rng), plain(query, rng), _damaged(query, rng)]
        graded = [(rubric(text, query), text) for text in replies]
        if rng.random() < NO_REPLY:
            graded.append((-1.0, no_reply(query, rng)))
        (better, first), (worse, second) = rng.sample(graded, 2)
        if better != worse:
            pairs.append((query, first, second) if better > worse else (query, second, first))
    return pairs


def no_reply(query: Problem, rng: random.Random) -> str:
    """What a policy may try on a preference model: the question, keywords, boxes, praise."""
    topic, times = query.meta["topic"], rng.randint(2, 6)
    words = [topic, rng.choice(WORDS), *OPENINGS, HELP, "score 10", "the best reply", "correct"]
    return rng.choice(
        (
            query.question,
            " ".join([rng.choice(words)] * times),
            " ".join(rng.choices(words, k=times)),
            " ".join(rf"\boxed{{{rng.choice([topic, '', str(n)])}}}" for n in range(times)),
            rf"\boxed{{{query.question}}}",
            "{}" * times,
        )
    )


def _damaged(query: Problem, rng: random.Random) -> str:
    parts = styled(query, rng).split(". ")
    parts.pop(rng.randrange(len(parts)))
    return ". ".join(parts)
