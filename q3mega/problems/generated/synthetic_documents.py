"""A small invented world, told in documents, and questions about it.

People, towns and companies have facts; a document tells those of one of them, each fact in this
document alone, among sentences that say nothing to the purpose. Names are drawn so that many share
a word. A question follows one fact or two; leaving one of them out of the documents makes a
question that they do not answer.
"""

import random
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field

NOT_FOUND = "not found"
_VOCABULARY = """
January February March April May June July August September October November December /
Bram Cald Dorn Elst Fenn Garl Hav Ist Jarn Kelb Lorm Marn Nors Osk Pell Quar Rosk Selv Tarn Ulm Veld
Wern Yst Zell Ald Birk Crane Drav Esk Frost Grim Holm /
mar burg stead ford wick haven moor holt bury field mouth dale minster gate /
en er ovic ström ini quist aux land ley son well by /
Ada Bela Carin Dov Edda Fritz Greta Hugo Ilse Jonas Kaja Lars Mira Nils Olga Piet Rosa Sven Tilda
Ugo Vera Wim Yara Zeno Alma Bruno Clara Darius Enzo Freya /
Glassworks Shipping Foundry Mills Instruments Brewery Printing Textiles Railways Ceramics Optics
Timber /
architect botanist cartographer chemist clockmaker composer engineer geologist historian lawyer
librarian painter surgeon surveyor translator /
Ava Brenne Corve Dessa Erne Fural Gleide Hamble Isk Jura Kolm Lavant Mese Nadder
"""
MONTHS, _STEMS, _PLACE, _FAMILY, FIRST_NAMES, _TRADES, PROFESSIONS, _RIVERS = (
    words.split() for words in _VOCABULARY.split("/")
)


@dataclass(frozen=True)
class Relation:
    """A fact of `kind`. to: the kind of its value, "" for a plain one. phrase: its value as part of
    a question, of {}. questions: of {}. statements: in a document, of {s}, with the value {v}."""

    kind: str
    to: str
    phrase: str
    questions: tuple[str, ...]
    statements: tuple[str, ...]


RELATIONS = {
    "birthplace": Relation(
        "person", "town", "the town where {} was born",
        ("In which town was {} born?", "Name the birthplace of {}.", "Where was {} born?"),
        ("{s} was born in {v}.", "The family of {s} came from {v}, where the child was born.",
         "{v} was the birthplace of {s}."),
    ),
    "birthday": Relation(
        "person", "", "",
        ("On what date was {} born?", "What is the date of birth of {}?"),
        ("The date of birth of {s} is given as {v}.", "{s} came into the world on {v}."),
    ),
    "profession": Relation(
        "person", "", "",
        ("What was the profession of {}?", "What did {} work as?"),
        ("By profession {s} was a trained {v}.", "{s} earned a living as a {v} by trade."),
    ),
    "employer": Relation(
        "person", "company", "the company that employed {}",
        ("Which company employed {}?", "Name the company that {} worked for."),
        ("For most of a long career {s} worked for {v}.", "{v} employed {s} for many years."),
    ),
    "teacher": Relation(
        "person", "person", "the person who taught {}",
        ("Who was the teacher of {}?", "Who taught {}?"),
        ("The teacher of {s} was {v}.", "As a student {s} was taught by {v}."),
    ),
    "mayor": Relation(
        "town", "person", "the mayor of {}",
        ("Who is the mayor of {}?", "Name the mayor of {}."),
        ("{v} is the mayor of {s}.", "The office of mayor of {s} is held by {v}."),
    ),
    "river": Relation(
        "town", "", "",
        ("Which river flows through {}?", "On which river does {} lie?"),
        ("The river {v} flows through {s}.", "{s} lies on both banks of the river {v}."),
    ),
    "population": Relation(
        "town", "", "",
        ("How many inhabitants does {} have?", "What is the population of {}?"),
        ("At the last count {s} had {v} inhabitants.", "The population of {s} stands at {v}."),
    ),
    "charter": Relation(
        "town", "", "",
        ("In which year did {} receive its charter?", "When was {} given its town charter?"),
        ("{s} received its charter in {v}.", "The town charter of {s} dates from the year {v}."),
    ),
    "founder": Relation(
        "company", "person", "the founder of {}",
        ("Who founded {}?", "Name the founder of {}."),
        ("{s} was founded by {v}.", "The founder of {s} was {v}."),
    ),
    "seat": Relation(
        "company", "town", "the town where {} has its head office",
        ("In which town does {} have its head office?", "Where is the head office of {}?"),
        ("The head office of {s} stands in {v}.", "{s} is run from its head office in {v}."),
    ),
    "opening": Relation(
        "company", "", "",
        ("In which year did {} open for business?", "When did {} open for business?"),
        ("{s} opened for business in {v}.", "The first customers of {s} were served in {v}."),
    ),
    "staff": Relation(
        "company", "", "",
        ("How many people does {} have on its payroll?", "What is the number of staff of {}?"),
        ("{s} has {v} people on its payroll.", "The staff of {s} numbers {v}."),
    ),
}  # fmt: skip

_OPENINGS = {
    "person": ("{} is remembered in several local papers.", "{} appears in the parish register."),
    "town": ("{} is a town of the northern district.", "{} is a market town with old walls."),
    "company": ("{} is a company known well beyond its region.", "{} is a family company."),
}
_SHORT = {"person": "{last}", "town": "the town", "company": "the company"}
_FILLERS = {
    "person": (
        "Letters from the {season} of that period mention {adjective} walks and {adjective} meals.",
        "Friends spoke of a {adjective} sense of humour and of {adjective} habits.",
        "A {adjective} portrait hangs in the {room}, though its painter is not known.",
        "Neighbours remembered the {adjective} garden and the sound of a {thing}.",
        "Two diaries survive, both {adjective}, and neither says much about work.",
        "In later years there were {adjective} journeys with a {thing} and little luggage.",
    ),
    "town": (
        "Visitors come in {season} for the {adjective} market and the {thing} festival.",
        "The {room} was restored with {adjective} stone after a fire.",
        "Most streets are {adjective}, and the square is closed to traffic in {season}.",
        "A {adjective} bridge leads to the old quarter, where a {thing} is on show.",
        "The museum keeps a {adjective} {thing} that nobody has been able to explain.",
        "Trains stop twice a day, less often in {season}.",
    ),
    "company": (
        "Its {adjective} catalogue appears every {season} and is free of charge.",
        "The workshops are {adjective} and may be seen by appointment.",
        "A strike one {season} ended with a {adjective} settlement.",
        "The emblem shows a {thing}, which was drawn by an apprentice.",
        "Its {room} burnt down once and was rebuilt with {adjective} brick.",
        "Customers praise the {adjective} service, less so the prices in {season}.",
    ),
}
_NOTES = (
    "{person} and the mayor's office exchanged {adjective} letters about a {thing}.",
    "A {adjective} delegation from {town} met people of {company} over lunch.",
    "{company} lent the {room} of {town} a {adjective} {thing} for the {season}.",
    "{person} gave a {adjective} talk in {town} and was thanked with a {thing}.",
    "The paper of {town} printed a {adjective} story about {person}, unsigned.",
    "At the fair in {town} a {thing} of {company} drew a {adjective} crowd.",
    "{person} was seen in {town} that {season}, on the way to somewhere else.",
    "Rumours that {company} would leave {town} were called {adjective} by all.",
)
_SLOTS = {
    "season": "spring summer autumn winter harvest carnival",
    "adjective": "quiet narrow generous plain bright old modest handsome curious sturdy dusty "
    "pleasant stubborn famous faded splendid",
    "thing": "harp clock lantern kite compass barrel bell loom globe mirror sledge drum",
    "room": "ballroom hall chamber library chapel attic",
}
_WORDS = {slot: words.split() for slot, words in _SLOTS.items()}
NamePools = dict[str, list[str]]


@dataclass
class World:
    """names: of each kind. facts: (name, relation) -> value."""

    names: NamePools
    facts: dict[tuple[str, str], str] = field(default_factory=dict)

    @classmethod
    def draw(cls, rng: random.Random, size: int) -> "World":
        """A world of `size` people, towns and companies, a third each."""
        each = size // 3
        stems = rng.sample(_STEMS, 3 + each // 3)  # few, so that names look alike
        names = {
            "person": _some(rng, each, FIRST_NAMES, [s + e for s in stems for e in _FAMILY], " "),
            "town": _some(rng, each, stems, _PLACE, ""),
            "company": _some(rng, each, stems, _TRADES, " "),
        }
        world = cls(names)
        for name, relation in world.slots():
            world.facts[name, relation] = _value(rng, names, name, relation)
        return world

    def slots(self) -> Iterator[tuple[str, str]]:
        """(name, relation) of every fact."""
        for kind, names in self.names.items():
            relations = [r for r, about in RELATIONS.items() if about.kind == kind]
            yield from ((name, relation) for name in names for relation in relations)

    def follow(self, name: str, path: Collection[str]) -> str:
        """What one relation after the other leads to."""
        for relation in path:
            name = self.facts[name, relation]
        return name

    def documents(
        self, rng: random.Random, notes: int, without: tuple[str, str] | None = None
    ) -> list[str]:
        """One of each name and `notes` that state no fact, of 40 to 120 words, in any order; the
        fact `without` is in none of them."""
        sentences = [
            _document(rng, kind, name, [f for f in self._told(name) if f[:2] != without])
            for kind, names in self.names.items()
            for name in names
        ]
        sentences += [self._note(rng) for _ in range(notes)]
        rng.shuffle(sentences)
        return [re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", text) for text in sentences]

    def _told(self, name: str) -> list[tuple[str, str, str]]:
        return [(n, relation, value) for (n, relation), value in self.facts.items() if n == name]

    def _note(self, rng: random.Random) -> str:
        sentences: list[str] = []
        while _length(sentences) < 45:
            who = {kind: rng.choice(names) for kind, names in self.names.items()}
            sentences.append(_fill(rng, rng.choice(_NOTES), **who))
        return " ".join(sentences)


def paths(first: str) -> Iterator[tuple[str, str]]:
    """All pairs of relations that follow each other from a thing of kind `first`."""
    for one, about in RELATIONS.items():
        if about.kind == first and about.to:
            # not one relation twice: "the teacher of the person who taught"
            yield from (
                (one, two) for two, r in RELATIONS.items() if r.kind == about.to and two != one
            )


def question(rng: random.Random, name: str, path: tuple[str, ...]) -> str:
    """The question that the relations of `path`, one after the other, answer."""
    for relation in path[:-1]:
        name = RELATIONS[relation].phrase.format(name)
    return rng.choice(RELATIONS[path[-1]].questions).format(name)


def _some(rng: random.Random, n: int, first: list[str], last: list[str], glue: str) -> list[str]:
    return rng.sample([a + glue + b for a in first for b in last], n)


def _value(rng: random.Random, names: NamePools, name: str, relation: str) -> str:
    match relation:
        case "birthday":
            return f"{rng.randint(1, 28)} {rng.choice(MONTHS)} {rng.randint(1820, 1960)}"
        case "profession":
            return rng.choice(PROFESSIONS)
        case "river":
            return rng.choice(_RIVERS)
        case "population":
            return f"{rng.randint(2, 98)},{rng.randint(0, 999):03}"
        case "staff":
            return str(rng.randint(12, 980))
        case "charter" | "opening":
            return str(
                rng.randint(1100, 1700) if relation == "charter" else rng.randint(1780, 1950)
            )
        case _:
            return rng.choice([n for n in names[RELATIONS[relation].to] if n != name])


def _document(rng: random.Random, kind: str, name: str, facts: list[tuple[str, str, str]]) -> str:
    short = _SHORT[kind].format(last=name.split()[-1])
    sentences = []
    for i, (_, relation, value) in enumerate(rng.sample(facts, len(facts))):
        stated = rng.choice(RELATIONS[relation].statements)
        sentence = stated.format(s=rng.choice((name, short)) if i else name, v=value)
        sentences.append(sentence[0].upper() + sentence[1:])
    fillers = rng.sample(_FILLERS[kind], len(_FILLERS[kind]))
    least = rng.randint(45, 90)
    while fillers and _length(sentences) < least:
        index = rng.randint(0, len(sentences))
        sentences.insert(index, _fill(rng, fillers.pop()))
    return " ".join([rng.choice(_OPENINGS[kind]).format(name), *sentences])


def _fill(rng: random.Random, template: str, **names: str) -> str:
    while "{" in template:  # one slot at a time, so that a word may differ from the last one
        slot = template[template.index("{") + 1 : template.index("}")]
        word = names.get(slot) or rng.choice(_WORDS[slot])
        template = template.replace(f"{{{slot}}}", word, 1)
    return template


def _length(sentences: list[str]) -> int:
    return sum(len(s.split()) for s in sentences)
