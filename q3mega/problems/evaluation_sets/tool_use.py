"""Evaluation: one turn in which the right tools have to be called, or none (as in BFCL, ToolUse).

Every row shows five tools that are not needed as well. Its `calls` say what is right: for each call
a name, the accepted values of each argument, and those of arguments that may be left out.
"""

import random
from collections.abc import Callable
from typing import Any

from q3mega.problems.base import Row

Call = dict[str, Any]
_CITIES = ("Lisbon", "Oslo", "Nairobi", "Lima", "Kyoto", "Toronto", "Prague", "Hanoi")
_PEOPLE = ("Amara Diallo", "Chen Wei", "Elif Kaya", "Jonas Berg", "Maria Silva", "Noor Haddad")
_GOODS = ("olive oil", "printer paper", "tennis balls", "green tea", "bicycle lamps")


def _tool(name: str, description: str, required: str = "", /, **properties: Any) -> dict[str, Any]:
    parameters = _object(required, **properties)
    function = {"name": name, "description": description, "parameters": parameters}
    return {"type": "function", "function": function}


def _object(required: str, /, **properties: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": required.split(),
        "additionalProperties": False,
    }


def _text(description: str) -> dict[str, Any]:
    return {"type": "string", "description": description}


def _whole(description: str, lowest: int = 1) -> dict[str, Any]:
    return {"type": "integer", "minimum": lowest, "description": description}


def _one_of(*values: str) -> dict[str, Any]:
    return {"type": "string", "enum": list(values)}


TOOLS = [
    _tool(
        "get_weather", "The weather of a city now.", "city",
        city=_text("name of the city"), unit=_one_of("celsius", "fahrenheit"),
    ),
    _tool(
        "get_forecast", "The weather of a city on the coming days.", "city days",
        city=_text("name of the city"), days=_whole("how many days ahead"),
    ),
    _tool("get_time", "The local time of a city.", "city", city=_text("name of the city")),
    _tool(
        "convert_currency", "An amount of money in another currency.", "amount source target",
        amount={"type": "number", "minimum": 0}, source=_one_of("EUR", "USD", "GBP", "JPY"),
        target=_one_of("EUR", "USD", "GBP", "JPY"),
    ),
    _tool(
        "set_alarm", "Sets an alarm on the phone.", "time",
        time=_text("24 hour clock, HH:MM"), label=_text("what it is for"),
    ),
    _tool(
        "start_timer", "Starts a countdown.", "minutes",
        minutes=_whole("until it rings"), label=_text("what it is for"),
    ),
    _tool(
        "book_table", "Books a table in a restaurant.", "restaurant guests time",
        restaurant=_text("its name"), guests=_whole("how many people"),
        time=_text("24 hour clock, HH:MM"), outside={"type": "boolean", "default": False},
    ),
    _tool(
        "send_message", "Sends a text message.", "to text",
        to={"type": "array", "items": {"type": "string"}, "minItems": 1},
        text=_text("of the message"), urgent={"type": "boolean", "default": False},
    ),
    _tool(
        "order_goods", "Orders goods from the shop.", "items address",
        items={
            "type": "array", "minItems": 1,
            "items": _object("product quantity", product=_text("name"), quantity=_whole("pieces")),
        },
        address=_object("street city", street=_text("and number"), city=_text("name of the city")),
    ),
    _tool("find_contact", "Looks a person up in the address book.", "name", name=_text("in full")),
    _tool("list_alarms", "All alarms that are set."),
    _tool("play_music", "Plays music.", "artist", artist=_text("who"), shuffle={"type": "boolean"}),
]  # fmt: skip


def _named(tool: str, optional: dict[str, list[Any]] | None = None, /, **arguments: Any) -> Call:
    """Arguments with one accepted value each."""
    accepted = {key: [value] for key, value in arguments.items()}
    return {"name": tool, "arguments": accepted, "optional": optional or {}}


def _clock(rng: random.Random) -> str:
    return f"{rng.randint(10, 23)}:{rng.choice(('00', '15', '30', '45'))}"


def _simple(rng: random.Random) -> tuple[str, list[Call]]:
    city, days, minutes = rng.choice(_CITIES), rng.randint(2, 9), rng.randint(3, 55)
    who = rng.choice(_PEOPLE)
    return rng.choice([
        (f"What time is it in {city}?", [_named("get_time", city=city)]),
        (f"Will it rain in {city} over the next {days} days?",
         [_named("get_forecast", city=city, days=days)]),
        (f"Look {who} up in my address book.", [_named("find_contact", name=who)]),
        (f"Start a timer of {minutes} minutes.", [_named(
            "start_timer", {"label": ["", "timer"]}, minutes=minutes)]),
        ("Which alarms have I set?", [_named("list_alarms")]),
    ])  # fmt: skip


def _optional(rng: random.Random) -> tuple[str, list[Call]]:
    city, guests, clock = rng.choice(_CITIES), rng.randint(2, 9), _clock(rng)
    unit, label = rng.choice(("celsius", "fahrenheit")), rng.choice(("dentist", "yoga", "train"))
    amount, (source, target) = rng.randint(20, 900), rng.sample(("EUR", "USD", "GBP", "JPY"), 2)
    return rng.choice([
        (f"How warm is it in {city} now, in {unit}?",
         [_named("get_weather", city=city, unit=unit)]),
        (f'Set an alarm for {clock} and label it "{label}".',
         [_named("set_alarm", time=clock, label=label)]),
        (f"Book a table outside for {guests} at the Blue Lantern, {clock}.",
         [{"name": "book_table", "optional": {}, "arguments": {
             "restaurant": ["Blue Lantern", "The Blue Lantern"], "guests": [guests],
             "time": [clock], "outside": [True]}}]),
        (f"Book a table for {guests} at Casa Verde, {clock}.",
         [_named("book_table", {"outside": [False]}, restaurant="Casa Verde", guests=guests,
                 time=clock)]),
        (f"How much are {amount} {source} in {target}?",
         [_named("convert_currency", amount=amount, source=source, target=target)]),
    ])  # fmt: skip


def _nested(rng: random.Random) -> tuple[str, list[Call]]:
    (a, b), (m, n) = rng.sample(_GOODS, 2), (rng.randint(2, 9), rng.randint(10, 40))
    street, city = f"{rng.choice(('Elm', 'Park', 'River'))} Street {n}", rng.choice(_CITIES)
    to, clock = rng.sample(_PEOPLE, 2), _clock(rng)
    items = [{"product": a, "quantity": m}, {"product": b, "quantity": n}]
    both_ways, address = [items, items[::-1]], {"street": street, "city": city}
    order = {"name": "order_goods", "optional": {}}
    return rng.choice([
        (f"Order {m} of {a} and {n} of {b} to {street} in {city}.",
         [order | {"arguments": {"items": both_ways, "address": [address]}}]),
        (f"Please order {m} of {b}, to be sent to {street}, {city}.",
         [_named("order_goods", items=[{"product": b, "quantity": m}], address=address)]),
        (f'Text {to[0]} and {to[1]} exactly this, as urgent: "Meet me at {clock}".',
         [{"name": "send_message", "optional": {}, "arguments": {
             "to": [to, to[::-1]], "text": [f"Meet me at {clock}"], "urgent": [True]}}]),
    ])  # fmt: skip


def _parallel(rng: random.Random) -> tuple[str, list[Call]]:
    (a, b, c), minutes, clock = rng.sample(_CITIES, 3), rng.randint(3, 55), _clock(rng)
    who, artist = rng.choice(_PEOPLE), rng.choice(("Miriam Makeba", "Bach", "Björk"))
    label = {"label": [""]}
    return rng.choice([
        (f"What time is it in {a}, {b} and {c}?", [_named("get_time", city=x) for x in (a, b, c)]),
        (f"Start a timer of {minutes} minutes and set an alarm for {clock}.",
         [_named("start_timer", label, minutes=minutes), _named("set_alarm", label, time=clock)]),
        (f"How is the weather in {a} now, in celsius, and what time is it in {b}?",
         [_named("get_weather", city=a, unit="celsius"), _named("get_time", city=b)]),
        (f"Find {who} in my address book and play something by {artist}.",
         [_named("find_contact", name=who),
          _named("play_music", {"shuffle": [True, False]}, artist=artist)]),
    ])  # fmt: skip


def _no_call(rng: random.Random) -> tuple[str, list[str]]:
    """A question that no tool is for, with words that its answer holds; or one for a tool that
    lacks what the tool requires, to be asked back for."""
    a, b, what = rng.randint(11, 60), rng.randint(11, 60), rng.choice(_GOODS)
    return rng.choice([
        (f"What is {a} plus {b}?", [str(a + b)]),
        ("Which planet is the largest of the solar system?", ["Jupiter"]),
        ("How do you say thank you in Spanish?", ["gracias"]),
        (f"Order some {what} for me.", ["?"]),
        ("Book a table for tonight, please.", ["?"]),
        ("Set an alarm, please.", ["?"]),
    ])  # fmt: skip


KINDS: dict[str, Callable[[random.Random], tuple[str, Any]]] = {
    "simple": _simple,
    "optional": _optional,
    "nested": _nested,
    "parallel": _parallel,
    "no call": _no_call,
}


def rows(n: int, seed: int) -> list[Row]:
    """n rows, the kinds of call in turn; the last kind is that no call is due. Group: the kind."""
    rng = random.Random(f"tool_use/{seed}")
    kinds = list(KINDS)
    return [_row(rng, kinds[i % len(kinds)]) for i in range(n)]


def _row(rng: random.Random, kind: str) -> Row:
    question, right = KINDS[kind](rng)
    calls = [] if kind == "no call" else right
    called = {call["name"] for call in calls}
    needed = [t for t in TOOLS if t["function"]["name"] in called]
    tools = needed + rng.sample([t for t in TOOLS if t not in needed], 5)
    rng.shuffle(tools)
    row = {
        "messages": [{"role": "user", "content": question}],
        "reward": "tool_calls",
        "tools": tools,
        "calls": calls,
        "group": kind,
    }
    return row | ({"says": right} if kind == "no call" else {})
