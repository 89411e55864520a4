"""Evaluation: questions that rest on something false or unknowable (CounterFactQA of the report).

Every second question is in order and looks the same, so that whoever always refuses gets half at
most. A question states one thing and asks for another: "On which continent is Peru, whose capital
is Lima?". The false ones state what belongs to another row of the table, or to another person of
a made-up text.
"""

import random
from dataclasses import dataclass

from q3mega.problems.base import Row

ASK = (
    "Answer in one short sentence. If the question assumes something that is not so, start with "
    '"False premise:" and say what is true instead; if nobody can tell from what is given, start '
    'with "Cannot be answered:".'
)


@dataclass(frozen=True)
class Table:
    """rows: name -> what a question states of it, what it asks for. Alternatives stand apart
    by |, the one that questions use first."""

    questions: tuple[str, ...]
    rows: dict[str, tuple[str, str]]


TABLES = {
    "capital": Table(
        (
            "On which continent is {name}, whose capital is {stated}?",
            "{stated} is the capital of {name}. On which continent does the country lie?",
        ),
        {
            "Peru": ("Lima", "South America"), "Kenya": ("Nairobi", "Africa"),
            "Australia": ("Canberra", "Oceania|Australia"), "Canada": ("Ottawa", "North America"),
            "Norway": ("Oslo", "Europe"), "Vietnam": ("Hanoi", "Asia"),
            "Morocco": ("Rabat", "Africa"), "Brazil": ("Brasília|Brasilia", "South America"),
            "Switzerland": ("Bern|Berne", "Europe"), "Mongolia": ("Ulaanbaatar|Ulan Bator", "Asia"),
            "Ghana": ("Accra", "Africa"), "Portugal": ("Lisbon", "Europe"),
            "Cuba": ("Havana", "North America"), "Nepal": ("Kathmandu", "Asia"),
            "Uruguay": ("Montevideo", "South America"), "Finland": ("Helsinki", "Europe"),
        },
    ),
    "element": Table(
        (
            "What is the atomic number of {name}, whose chemical symbol is {stated}?",
            "{name} has the chemical symbol {stated}. How many protons has one of its atoms?",
        ),
        {
            "Iron": ("Fe", "26|twenty-six"), "Gold": ("Au", "79|seventy-nine"),
            "Silver": ("Ag", "47|forty-seven"), "Copper": ("Cu", "29|twenty-nine"),
            "Sodium": ("Na", "11|eleven"), "Potassium": ("K", "19|nineteen"),
            "Lead": ("Pb", "82|eighty-two"), "Tin": ("Sn", "50|fifty"),
            "Mercury": ("Hg", "80|eighty"), "Oxygen": ("O", "8|eight"),
            "Carbon": ("C", "6|six"), "Neon": ("Ne", "10|ten"),
            "Zinc": ("Zn", "30|thirty"), "Tungsten": ("W", "74|seventy-four"),
        },
    ),
    "book": Table(
        (
            "In which language was {name} by {stated} written?",
            "{stated} wrote {name}. In which language was it first published?",
        ),
        {
            "Don Quixote": ("Miguel de Cervantes|Cervantes", "Spanish"),
            "War and Peace": ("Leo Tolstoy|Tolstoy", "Russian"),
            "The Divine Comedy": ("Dante Alighieri|Dante", "Italian|Tuscan"),
            "Faust": ("Johann Wolfgang von Goethe|Goethe", "German"),
            "Madame Bovary": ("Gustave Flaubert|Flaubert", "French"),
            "Pride and Prejudice": ("Jane Austen|Austen", "English"),
            "Les Misérables": ("Victor Hugo|Hugo", "French"),
            "The Trial": ("Franz Kafka|Kafka", "German"),
            "One Hundred Years of Solitude": (
                "Gabriel García Márquez|García Márquez|Garcia Marquez", "Spanish"),
            "The Brothers Karamazov": ("Fyodor Dostoevsky|Dostoevsky|Dostoyevsky", "Russian"),
            "The Little Prince": ("Antoine de Saint-Exupéry|Saint-Exupéry|Saint-Exupery", "French"),
            "The Magic Mountain": ("Thomas Mann|Mann", "German"),
            "A Doll's House": ("Henrik Ibsen|Ibsen", "Norwegian|Danish|Dano-Norwegian"),
            "Snow Country": ("Yasunari Kawabata|Kawabata", "Japanese"),
        },
    ),
    "discovery": Table(
        (
            "In which century did {stated} {name}?",
            "{stated} was the one to {name}. In which century was that?",
        ),
        {
            "discover penicillin": ("Alexander Fleming|Fleming", "20th|twentieth|1928"),
            "discover radium": ("Marie Curie|Curie", "19th|nineteenth|1898"),
            "publish the law of universal gravitation": (
                "Isaac Newton|Newton", "17th|seventeenth|1687"),
            "publish On the Origin of Species": ("Charles Darwin|Darwin", "19th|nineteenth|1859"),
            "publish the general theory of relativity": (
                "Albert Einstein|Einstein", "20th|twentieth|1915"),
            "discover the moons of Jupiter": ("Galileo Galilei|Galileo", "17th|seventeenth|1610"),
            "invent dynamite": ("Alfred Nobel|Nobel", "19th|nineteenth|1867|1866"),
            "vaccinate against smallpox with cowpox": (
                "Edward Jenner|Jenner", "18th|eighteenth|1796"),
            "arrange the elements in a periodic table": (
                "Dmitri Mendeleev|Mendeleev|Mendeleyev", "19th|nineteenth|1869"),
            "discover X-rays": ("Wilhelm Röntgen|Röntgen|Roentgen", "19th|nineteenth|1895"),
            "discover Uranus": ("William Herschel|Herschel", "18th|eighteenth|1781"),
            "build the first voltaic pile": ("Alessandro Volta|Volta", "18th|eighteenth|1799|1800"),
        },
    ),
    "sight": Table(
        (
            "In which country is the {name}, which stands in {stated}?",
            "The {name} is a sight of {stated}. Which country is it in?",
        ),
        {
            "Colosseum": ("Rome", "Italy"), "Eiffel Tower": ("Paris", "France"),
            "Brandenburg Gate": ("Berlin", "Germany"), "Sagrada Família": ("Barcelona", "Spain"),
            "Acropolis": ("Athens", "Greece"), "Taj Mahal": ("Agra", "India"),
            "Hagia Sophia": ("Istanbul", "Turkey|Türkiye"),
            "Forbidden City": ("Beijing", "China"), "Kremlin": ("Moscow", "Russia"),
            "Golden Gate Bridge": ("San Francisco", "United States|USA|U.S.|America"),
            "Charles Bridge": ("Prague", "Czech Republic|Czechia"),
            "Atomium": ("Brussels", "Belgium"), "Prater": ("Vienna", "Austria"),
            "Little Mermaid statue": ("Copenhagen", "Denmark"),
        },
    ),
    "animal": Table(
        (
            "What is the young of a {name} called, which belongs to the {stated}?",
            "A {name} is one of the {stated}. What is its young called?",
        ),
        {
            "frog": ("amphibians|amphibian", "tadpole|tadpoles|froglet"),
            "swan": ("birds|bird", "cygnet|cygnets"), "horse": ("mammals|mammal", "foal|foals"),
            "butterfly": ("insects|insect", "caterpillar|caterpillars"),
            "eel": ("fish|fishes", "elver|elvers|glass eel|leptocephalus"),
            "goat": ("mammals|mammal", "kid|kids"),
            "goose": ("birds|bird", "gosling|goslings"),
            "kangaroo": ("mammals|mammal|marsupial|marsupials", "joey|joeys"),
            "eagle": ("birds|bird", "eaglet|eaglets"),
        },
    ),
}  # fmt: skip
_PEOPLE = ("Ilse Brandt", "Tomas Rey", "Mina Okafor", "Pavel Horak", "Sara Lindqvist", "Yuto Mori")
_SHOPS = ("bakery", "bookshop", "pharmacy", "florist's", "hat shop", "bicycle shop", "tea room")
_STREETS = ("Mill Lane", "Harbour Street", "Oak Road", "Station Square", "King's Row", "Bell Alley")
_UNKNOWN = (
    "How old is {who}?",
    "What did {who} pay for the {shop}?",
    "Where did {who} go to school?",
    "How many people work in the {shop}?",
    "What is the name of {who}'s mother?",
    "On which day of the week is the {shop} closed?",
)


def rows(n: int, seed: int) -> list[Row]:
    """n questions: every second one in order, the others false by the tables or the text, or
    unknowable. Group: in order, false or unknowable."""
    rng = random.Random(f"counterfactual/{seed}")
    tables = list(TABLES.values())
    return [
        _of_table(rng, tables[i // 4 % len(tables)], "false" if i % 2 else "true")
        if i % 4 < 2
        else _of_text(rng, ("false", "unknown")[i // 4 % 2] if i % 2 else "true")
        for i in range(n)
    ]


def _of_table(rng: random.Random, table: Table, premise: str) -> Row:
    name = rng.choice(list(table.rows))
    stated, answer = (text.split("|") for text in table.rows[name])
    others = [[text.split("|") for text in row] for row in table.rows.values()]
    wrong = [other for other, _ in others if not set(other) & set(stated)]
    shown = rng.choice(wrong) if premise == "false" else stated
    question = rng.choice(table.questions).format(name=name, stated=shown[0])
    if premise == "false":
        return _row(question, premise, stated, [w for w in wrong if not set(w) & set(shown)])
    return _row(question, premise, answer, [o for _, o in others if not set(o) & set(answer)])


def _of_text(rng: random.Random, premise: str) -> Row:
    people, shops, streets = (rng.sample(names, 4) for names in (_PEOPLE, _SHOPS, _STREETS))
    text = " ".join(
        f"{who} runs the {shop} in {street}."
        for who, shop, street in zip(people, shops, streets, strict=True)
    )
    k = rng.randrange(4)
    if premise == "unknown":
        question = rng.choice(_UNKNOWN).format(who=people[k], shop=shops[k])
        return _row(f"{text} {question}", premise, [], [])
    other = rng.choice([j for j in range(4) if j != k])
    who = people[other] if premise == "false" else people[k]
    question = f"{text} In which street is the {shops[k]} that {who} runs?"
    if premise == "false":  # either who runs that shop, or what the person runs
        rivals = [[people[j]] for j in range(4) if j not in (k, other)]
        return _row(question, premise, [people[k], shops[other]], rivals)
    return _row(question, premise, [streets[k]], [[s] for s in streets if s != streets[k]])


def _row(question: str, premise: str, accepted: list[str], rivals: list[list[str]]) -> Row:
    return {
        "messages": [{"role": "user", "content": f"{question}\n\n{ASK}"}],
        "reward": "false_premise",
        "premise": premise,
        "accepted": accepted,
        "rivals": sorted({text for names in rivals for text in names}),
        "group": {"true": "in order", "false": "false", "unknown": "unknowable"}[premise],
    }
