r"""The tasks of general RL: five capabilities, two or three tasks each, for a tiny model.

`respond(problem, rng, skill)` writes an assistant turn that does the task with probability `skill`
and otherwise fails the way a half-trained model does: wrong count, marker missing, prose for a tool
call, an invented answer. Supervised stages show such half-skill, so that RL has something to lift.
"""

import json
import random
from collections.abc import Sequence
from typing import Any

from q3mega.data.tasks.base import FAMILIES, Problem, family, problem
from q3mega.data.tasks.reasoning import chain_sum

_WORDS = """
ant apple arm bag ball bell bird boat book box bread cake car cat chair cheese clock cloud
coat coin corn cow cup desk dog door drum duck ear egg eye farm fire fish flag flower fly
foot fork fox frog game garden gate glass goat gold grass green hand hat hill home honey
horse house ice ink island jam key king kite lake lamp leaf lemon light lion map milk moon
mouse music nest night nose nut oil onion owl pan paper park pen pig pond queen rain ring
river road rock room rope rose salt sand ship shoe silk snow soap song soup star stone sun
table tea tent tree wall water wheel wind wolf wood
"""
_NAMES = """
Ada Amy Ann Ben Bob Cal Dan Dora Eli Emma Eva Finn Gus Hal Hugo Ida Ines Ira Jan Joe June
Kai Kim Lea Leo Lily Lou Max Mia Ned Nina Nora Olga Otto Pam Paul Rosa Roy Sam Tess Tom
Uma Vera Zoe
"""
WORDS, NAMES = _WORDS.split(), _NAMES.split()
_ADVICE = "rest read learn sing run cook draw swim save plan talk wait walk work write play"
ADVICE = _ADVICE.split()
PLACES = ("home", "night", "work", "school", "sea", "noon", "dawn", "lunch", "camp", "dinner")
NOT_FOUND = "not in the text"
OPENINGS = ("Good question.", "Happy to help.", "Sure.")
HELP = "Ask me more."
CAPABILITIES = ("instruction", "format", "preference", "agent", "rag")


def tool(name: str, argument: str) -> dict[str, Any]:
    """A one-argument tool for the chat template, which prints it as JSON.

    Only the signature, not the whole schema: with it a prompt of these tasks takes under 250 tokens
    of a 512-entry vocabulary, 215 of them the template's own words; a full schema adds 50.
    """
    return {"name": name, "parameters": {argument: "string"}}


CALCULATOR, LOOKUP = tool("calculator", "expression"), tool("lookup", "key")


@family("repeat_word", capability="instruction", difficulties=range(2, 5))
def repeat_word(rng: random.Random, times: int) -> Problem:
    """'Say cat milk 3 times.'"""
    words = f"{rng.choice(WORDS)} {rng.choice(WORDS)}"
    answer = " ".join([words] * times)
    return problem("repeat_word", "instruction", f"Say {words} {times} times.", answer, times)


@family("json_word", capability="instruction", difficulties=range(1, 2))
def json_word(rng: random.Random, level: int) -> Problem:
    """'Give cat milk as JSON with key word.'"""
    word, key = f"{rng.choice(WORDS)} {rng.choice(WORDS)}", rng.choice(("word", "name", "item"))
    text = f"Give {word} as JSON with key {key}."
    return problem("json_word", "instruction", text, json.dumps({key: word}), level)


@family("end_with", capability="instruction", difficulties=range(1, 2))
def end_with(rng: random.Random, level: int) -> Problem:
    """'Name dog milk and end with done.'"""
    word, end = f"{rng.choice(WORDS)} {rng.choice(WORDS)}", rng.choice(("done", "over", "stop"))
    text = f"Name {word} and end with {end}."
    return problem("end_with", "instruction", text, f"{word} {end}", level)


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


@family("boxed_word", capability="format", difficulties=range(1, 2))
def boxed_word(rng: random.Random, level: int) -> Problem:
    """'Put cat in a box.': the box and nothing else."""
    first, second = rng.choice(WORDS), rng.choice(WORDS)
    text = f"Put {first} {second} in a box."
    return problem("boxed_word", "format", text, rf"\boxed{{{first} {second}}}", level)


@family("describe", capability="preference", difficulties=range(1, 2))
def describe(rng: random.Random, level: int) -> Problem:
    """'Tell me about tea at home.': an open query, scored by the preference model. meta: topic."""
    topic = rng.choice(WORDS)
    how = rng.choice(("Tell me about", "Say something about", "Talk about"))
    text = f"{how} {topic} at {rng.choice(PLACES)}."
    return problem("describe", "preference", text, "", level, meta={"topic": topic})


@family("advise", capability="preference", difficulties=range(1, 2))
def advise(rng: random.Random, level: int) -> Problem:
    """'How do I rest well at home with Ann?': likewise."""
    topic, place = rng.choice(ADVICE), rng.choice(PLACES)
    text = f"How do I {topic} well at {place} with {rng.choice(NAMES)}?"
    return problem("advise", "preference", text, "", level, meta={"topic": topic})


@family("calculator", capability="agent", difficulties=range(1, 3))
def calculator(rng: random.Random, digits: int) -> Problem:
    """A product or a sum beyond what the model can do itself, with a calculator at hand."""
    low, high = 10**digits, 10 ** (digits + 1) - 1
    a, b, sign = rng.randint(low, high), rng.randint(low, high), rng.choice("*+")
    expression = f"{a}{sign}{b}"
    answer = str(a * b if sign == "*" else a + b)
    text, meta = f"Use the tool: {expression}", {"argument": expression}
    return problem("calculator", "agent", text, answer, digits, meta=meta, tools=[CALCULATOR])


@family("lookup", capability="agent", difficulties=range(1, 2))
def lookup(rng: random.Random, level: int) -> Problem:
    """A value that only the environment's table knows. meta: argument, table."""
    key, number = rng.choice(NAMES), rng.randint(1, 99)
    entries = random.Random(f"list {number}")  # a list holds the same for everybody who asks
    table = {name: str(entries.randint(10, 99)) for name in NAMES}
    text, meta = f"Look up {key} in list {number}.", {"argument": key, "table": table}
    return problem("lookup", "agent", text, table[key], level, meta=meta, tools=[LOOKUP])


@family("rag_answer", capability="rag", difficulties=range(2, 4))
def rag_answer(rng: random.Random, facts: int) -> Problem:
    """'Text: Ann has 31. Bob has 24. How many has Bob?'; every third asks for who is not there."""
    people, rows = _facts(rng, facts)
    gone = rng.random() < 1 / 3
    who = rng.choice([n for n in NAMES if n not in people] if gone else sorted(people))
    answer = NOT_FOUND if gone else people[who]
    text = f"Text: {rows} How many has {who}?"
    meta = {"choices": sorted(people.values())}
    return problem("rag_answer", "rag", text, answer, facts, meta=meta)


@family("rag_name", capability="rag", difficulties=range(2, 4))
def rag_name(rng: random.Random, facts: int) -> Problem:
    """'Text: Ann has 31. Bob has 24. Who has 24?'; likewise."""
    people, rows = _facts(rng, facts)
    gone = rng.random() < 1 / 3
    who, free = rng.choice(sorted(people)), set(range(10, 100)) - set(map(int, people.values()))
    number = rng.choice(sorted(free)) if gone else people[who]
    answer = NOT_FOUND if gone else who
    text, meta = f"Text: {rows} Who has {number}?", {"choices": sorted(people)}
    return problem("rag_name", "rag", text, answer, facts, meta=meta)


def _facts(rng: random.Random, n: int) -> tuple[dict[str, str], str]:
    numbers = rng.sample(range(10, 100), n)
    people = dict(zip(rng.sample(NAMES, n), map(str, numbers), strict=True))
    return people, " ".join(f"{name} has {number}." for name, number in people.items())


GENERAL = tuple(name for name, f in FAMILIES.items() if f.capability in CAPABILITIES)


def draw(rng: random.Random, families: Sequence[str] = GENERAL) -> Problem:
    """A training-side problem of a random family."""
    while True:
        spec = FAMILIES[rng.choice(families)]
        found = spec.make(rng, rng.choice(spec.difficulties))
        if not found.heldout:
            return found


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


def _right(query: Problem, rng: random.Random) -> str:
    if query.tools:
        [(name, argument)] = [(t["name"], *t["parameters"]) for t in query.tools]
        return call(name, argument, query.meta["argument"])
    if query.capability == "preference":
        return styled(query, rng)
    return finish(query, query.answer) if query.family == "think_follow" else query.answer


def _wrong(query: Problem, rng: random.Random) -> str:
    asked = query.question.split()
    words = " ".join(asked[1:3])
    match query.family:
        case "repeat_word":
            times = [n for n in range(1, 6) if n != query.difficulty]
            return " ".join([words] * rng.choice(times))
        case "json_word":
            return rng.choice([f"{{{words}}}", words, json.dumps(words)])
        case "end_with":
            end = query.answer.split()[-1]
            return rng.choice([words, end, f"{words} and", query.answer.capitalize()])
        case "boxed_word":
            inside = query.answer[7:-1]
            return rng.choice(
                [inside, f"The box is {query.answer}.", rf"\boxed{{{inside.split()[0]}}}"]
            )
        case "think_follow":
            return f"The answer is {query.answer}."
        case "describe" | "advise":
            return plain(query, rng)
        case "calculator" | "lookup":  # an invented result, or prose where a call was due
            prose = f"I use the {query.family} with {query.meta['argument']}."
            return rng.choice([finish(query, str(rng.randint(10, 99))), prose])
        case _:  # rag: an answer from the text, whether or not it fits
            return rng.choice([c for c in query.meta["choices"] if c != query.answer])


def _on_topic(query: Problem, rng: random.Random) -> tuple[str, str]:
    """Two sentences that hold the topic."""
    topic = query.meta["topic"]
    if query.family == "advise":
        first, second = ("It is good to", "You can"), ("Take time to", "Begin early to")
    else:
        first, second = ("I like the", "Many like the"), ("Take time for the", "Look at the")
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
    """n (problem, chosen, rejected) by the hidden preference; some lack a single part of it."""
    rng = random.Random(f"pairs/{seed}/{heldout}")
    pairs: list[tuple[Problem, str, str]] = []
    while len(pairs) < n:
        spec = FAMILIES[rng.choice(("describe", "advise"))]
        query = spec.make(rng, 1)
        if query.heldout != heldout:
            continue
        replies = [styled(query, rng), plain(query, rng), plain(query, rng), _damaged(query, rng)]
        first, second = rng.sample(replies, 2)
        better, worse = rubric(first, query), rubric(second, query)
        if better != worse:
            pairs.append((query, first, second) if better > worse else (query, second, first))
    return pairs


def _damaged(query: Problem, rng: random.Random) -> str:
    parts = styled(query, rng).split(". ")
    parts.pop(rng.randrange(len(parts)))
    return ". ".join(parts)
