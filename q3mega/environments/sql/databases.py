"""Invented databases and questions about them that take a join or an aggregate to answer.

Every theme has the same shape: a table of actors, one of items, and one that links them with an
amount and a day. A theme gives the words; the queries are shared.
"""

import random
import sqlite3
from dataclasses import dataclass, fields
from datetime import date, timedelta

from q3mega.problems.generated.synthetic_documents import FIRST_NAMES

_FAMILY_NAMES = """
Abel Brandt Corvin Dahl Ekholm Falk Gruber Holt Iversen Jansky Keller Lorenz Marek Novak Oster Pohl
Quist Rehn Sorel Thorn
"""


@dataclass(frozen=True)
class Theme:
    """Names of tables and columns, and words for questions: "how many copies did members borrow".

    actor, item: singular of the tables' rows. groups, kinds: values of the columns group and kind.
    """

    actors: str
    actor: str
    group: str
    groups: tuple[str, ...]
    items: str
    item: str
    kind: str
    kinds: tuple[str, ...]
    value: str
    links: str
    amount: str
    day: str
    did: str
    units: str
    names: tuple[str, ...]


THEMES = (
    Theme(
        "customers", "customer", "city", ("Lund", "Graz", "Turku", "Porto"),
        "products", "product", "category", ("garden", "kitchen", "office", "camping"),
        "price", "orders", "quantity", "ordered_on", "ordered", "pieces",
        ("rake", "kettle", "stapler", "tent", "hose", "pan", "desk lamp", "stove", "spade",
         "grater", "binder", "sleeping bag"),
    ),
    Theme(
        "members", "member", "district", ("North", "Harbour", "Old Town", "Mill Hill"),
        "books", "book", "genre", ("crime", "travel", "poetry", "history"),
        "pages", "loans", "days", "lent_on", "borrowed", "days",
        ("The Ferry", "Salt", "Nine Maps", "Winter Bees", "The Clerk", "Low Water", "Lanterns",
         "A Debt", "Granite", "The Orchard", "Far Stations", "Copper"),
    ),
    Theme(
        "drivers", "driver", "depot", ("East", "West", "Airport", "Canal"),
        "routes", "route", "type", ("express", "local", "night", "mountain"),
        "kilometres", "trips", "passengers", "driven_on", "carried on their trips", "passengers",
        ("Amber", "Birch", "Cedar", "Delta", "Elm", "Fjord", "Glacier", "Heath", "Iris", "Juniper",
         "Krone", "Linden"),
    ),
    Theme(
        "farmers", "farmer", "valley", ("Upper", "Lower", "Stony", "Green"),
        "crops", "crop", "family", ("grain", "root", "fruit", "legume"),
        "grams", "harvests", "sacks", "brought_in_on", "harvested", "sacks",
        ("rye", "beet", "plum", "lentil", "oat", "carrot", "pear", "pea", "barley", "turnip",
         "quince", "bean"),
    ),
    Theme(
        "students", "student", "house", ("Eagle", "Otter", "Heron", "Lynx"),
        "courses", "course", "subject", ("music", "science", "languages", "crafts"),
        "credits", "sessions", "minutes", "held_on", "practised", "minutes",
        ("Choir", "Optics", "Danish", "Weaving", "Strings", "Botany", "Latin", "Pottery", "Drums",
         "Acids", "Welsh", "Carving"),
    ),
)  # fmt: skip

_JOIN = (
    "from {links} join {actors} on {actors}.id = {links}.{actor}_id "
    "join {items} on {items}.id = {links}.{item}_id"
)
# (questions, the query whose first row's first column is the answer). Of a ranking the second
# column is what it goes by: a draw in it makes no question.
_QUERIES = (
    (("How many {units} have {actors} of {group} {g} {did} in all of {kind} {k}?",
      "Take the {actors} whose {group} is {g} and the {items} whose {kind} is {k}. What is the sum "
      "of {amount} over their {links}?"),
     "select sum({links}.{amount}) {join} where {actors}.{group} = '{g}' and {items}.{kind} = "
     "'{k}'"),
    (("Which {actor} comes first by the sum of {amount} over all {links} with {items} of {kind} "
      "{k}?", "Name the {actor} with the largest total {amount} in {links} of {kind} {k}."),
     "select {actors}.name, sum({links}.{amount}) {join} where {items}.{kind} = '{k}' group by "
     "{actors}.id order by 2 desc"),
    (("Multiply {amount} by the {value} of the {item} in each of the {links} and add this up by "
      "{actor}. Whose sum is the largest?",
      "By the sum of {amount} times {value} over all {links}, which {actor} is on top?"),
     "select {actors}.name, sum({links}.{amount} * {items}.{value}) {join} group by {actors}.id "
     "order by 2 desc"),
    (("What is the sum of {amount} times {value} over all {links} since {d} (that day included)?",
      "Add up {amount} * {value} for every one of the {links} on {d} or later. What comes out?"),
     "select sum({links}.{amount} * {items}.{value}) {join} where {links}.{day} >= '{d}'"),
    (("How many {actors} have none of the {links} with {items} of {kind} {k}?",
      "Count the {actors} without a single entry in {links} for {kind} {k}."),
     "select count(*) from {actors} where id not in (select {links}.{actor}_id {join} where "
     "{items}.{kind} = '{k}')"),
    (("How many {actors} appear in at least {n} of the {links}?",
      "Count the {actors} that have {n} or more {links}."),
     "select count(*) from (select {actor}_id from {links} group by 1 having count(*) >= {n})"),
    (("Which {item} was had by the most different {actors}?",
      "Count for each {item} the different {actors} in its {links}. Which {item} has the most?"),
     "select {items}.name, count(distinct {links}.{actor}_id) {join} group by {items}.id "
     "order by 2 desc"),
    (("Which {group} has the largest sum of {amount} in {links} before {d}?",
      "Sum up {amount} by {group} of the {actors}, over {links} before {d}. Which {group} leads?"),
     "select {actors}.{group}, sum({links}.{amount}) {join} where {links}.{day} < '{d}' group by 1 "
     "order by 2 desc"),
    (("What is the largest {amount} in any of the {links} by {actors} of {group} {g} with an "
      "{item} of {value} {v} or more?",
      "Among {links} of {items} with {value} at least {v} and {actors} of {group} {g}, what is the "
      "highest {amount}?"),
     "select max({links}.{amount}) {join} where {actors}.{group} = '{g}' and {items}.{value} >= "
     "{v}"),
)  # fmt: skip


@dataclass(frozen=True)
class Database:
    """script: makes it; tables: its first part, without the rows. gold: finds the answer."""

    script: str
    tables: str
    question: str
    gold: str
    answer: str


def draw_database(rng: random.Random) -> Database:
    """A theme's database with 20 to 200 links, and a question that has one answer in it."""
    while True:
        theme = rng.choice(THEMES)
        words = {f.name: getattr(theme, f.name) for f in fields(theme)}
        words["join"] = _JOIN.format(**words)
        tables = _tables(theme)
        script = f"{tables}\n{_rows(rng, theme)}"
        words |= {
            "g": rng.choice(theme.groups),
            "k": rng.choice(theme.kinds),
            "d": _day(rng),
            "n": rng.randint(4, 9),
            "v": rng.randint(10, 60),
        }
        questions, query = rng.choice(_QUERIES)
        gold = query.format(**words)
        answer = _answer(script, gold)
        if answer is not None:
            return Database(script, tables, rng.choice(questions).format(**words), gold, answer)


def _answer(script: str, gold: str) -> str | None:
    """What the query finds first; None for nothing, a zero, or a draw between the first two."""
    database = sqlite3.connect(":memory:")
    database.executescript(script)
    first_rows = database.execute(gold).fetchmany(2)
    database.close()
    is_draw = len(first_rows) > 1 and first_rows[0][1] == first_rows[1][1]
    return None if is_draw or not first_rows or not first_rows[0][0] else str(first_rows[0][0])


def _tables(t: Theme) -> str:
    return (
        f"create table {t.actors} (id integer primary key, name text, {t.group} text);\n"
        f"create table {t.items} (id integer primary key, name text, {t.kind} text, "
        f"{t.value} integer);\n"
        f"create table {t.links} (id integer primary key, {t.actor}_id integer references "
        f"{t.actors}, {t.item}_id integer references {t.items}, {t.amount} integer, "
        f"{t.day} text);"
    )


def _rows(rng: random.Random, t: Theme) -> str:
    people = rng.sample(
        [f"{a} {b}" for a in FIRST_NAMES for b in _FAMILY_NAMES.split()], rng.randint(8, 30)
    )
    items = rng.sample(t.names, rng.randint(6, len(t.names)))
    actor_rows = [f"({i}, '{p}', '{rng.choice(t.groups)}')" for i, p in enumerate(people, 1)]
    item_rows = [
        f"({i}, '{name}', '{rng.choice(t.kinds)}', {rng.randint(3, 90)})"
        for i, name in enumerate(items, 1)
    ]
    link_rows = [
        f"({i}, {rng.randint(1, len(people))}, {rng.randint(1, len(items))}, {rng.randint(1, 40)}, "
        f"'{_day(rng)}')"
        for i in range(1, rng.randint(20, 200) + 1)
    ]
    tables = ((t.actors, actor_rows), (t.items, item_rows), (t.links, link_rows))
    return "\n".join(f"insert into {name} values {', '.join(rows)};" for name, rows in tables)


def _day(rng: random.Random) -> str:
    return (date(2031, 1, 1) + timedelta(days=rng.randrange(365))).isoformat()
