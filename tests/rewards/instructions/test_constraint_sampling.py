"""Sampled constraints can be met together: a slow writer that knows no clashes composes a reply."""

import itertools
import json
import random
from pathlib import Path

import pytest
import yaml

from q3mega.errors import UserError
from q3mega.rewards.instructions.constraints import (
    KINDS,
    check_constraints,
    describe,
    sample,
    unmet,
)
from q3mega.rewards.instructions.text_units import words

STORIES = yaml.safe_load(Path(__file__).with_name("stories.yaml").read_text())


def syllables(consonants, vowels):
    pairs = ["".join(p) for p in itertools.product(consonants, vowels)]
    return ["".join(p) for p in itertools.product(pairs, pairs)]


SCRIPTS = {
    "LATIN": syllables("bdfgjlmnpr", "aou"),
    "CYRILLIC": syllables("бвгдклмн", "ауо"),
    "CJK": [chr(c) for c in range(0x4E00, 0x5200)],
}


def amount(constraint):
    return constraint.get("exactly") or constraint.get("at_least", 0)


class Writer:
    def __init__(self, constraints):
        self.asked = {c["kind"]: c for c in constraints}
        if "language" in self.asked:
            self.stream = itertools.cycle(STORIES[self.asked["language"]["code"]].split())
        else:
            self.stream = iter(SCRIPTS[self.asked.get("script", {"name": "LATIN"})["name"]])

    def take(self, n):
        return " ".join(itertools.islice(self.stream, n))

    def several(self, kind, template, n=2):
        count = amount(self.asked.get(kind, {}))
        return [template.format(self.take(n), i + 1) for i in range(count)]

    def extras(self):
        """Words that stand anywhere."""
        found = []
        if "keyword" in self.asked:
            found += [self.asked["keyword"]["word"]] * max(1, amount(self.asked["keyword"]))
        if "letter" in self.asked:
            found.append(self.asked["letter"]["letter"] * amount(self.asked["letter"]))
        found += [f"{n + 7}" for n in range(amount(self.asked.get("numbers", {})))]
        found += self.several("placeholders", "[{}]", 3)
        found += self.several("highlighted", "*{}*", 3)
        found += [w.upper() for w in self.several("capital_words", "{}", 1)]
        return found

    def blocks(self, filler):
        body = [*self.extras(), *self.take(filler).split()]
        half = len(body) // 2
        parts = [f"{' '.join(body[:half])}.", f"{' '.join(body[half:])}."]
        if "paragraph_starts" in self.asked:
            c = self.asked["paragraph_starts"]
            parts.insert(c["n"] - 1, f"{c['word']} {self.take(2)}.")
        if "title" in self.asked:
            parts.append(f"<<{self.take(2)}>>")
        parts += self.several("headings", "# {}")
        parts += self.several("questions", "{}?", 4)
        parts += self.several("bullets", "- {}", 3) + self.several("numbered_items", "{1}. {0}", 3)
        if "sorted_list" in self.asked:
            down = self.asked["sorted_list"]["order"] == "descending"
            parts += [f"- {w}" for w in sorted(self.take(3).split(), reverse=down)]
        if "sections" in self.asked:
            parts += self.several("sections", self.asked["sections"]["marker"] + " {1}\n{0}", 4)
        if "table" in self.asked:
            n = self.asked["table"]["columns"]
            head, row = ("|".join(self.take(n).split()) for _ in range(2))
            parts.append(f"{head}\n{'|'.join(['---'] * n)}\n{row}")
        if "code_block" in self.asked:
            parts.append(f"```{self.asked['code_block']['language']}\n{self.take(2)}\n```")
        if "two_responses" in self.asked:
            parts.append("******")
        return [*parts, f"{self.take(4)}."]

    def chunks(self, n, filler):
        body = [*self.extras(), *self.take(filler).split()]
        size = len(body) // n
        cuts = [*range(0, size * n, size), len(body)]
        return [f"{' '.join(body[a:b])}." for a, b in itertools.pairwise(cuts)]

    def text(self, filler):
        asked = self.asked
        if "one_of" in asked:
            return asked["one_of"]["options"][0]
        if "palindrome" in asked:
            return "level, level"
        start = asked.get("starts_with", {}).get("start", "")
        start += asked.get("repeat_first", {}).get("question", "")
        end = asked.get("ends_with", {}).get("end", "")
        if "json" in asked or "json_keys" in asked:
            body = " ".join([*self.extras(), self.take(filler)])
            return json.dumps(
                dict.fromkeys(asked["json_keys"]["keys"], self.take(1)) | {"x": body}
                if "json_keys" in asked
                else [body],
                ensure_ascii=False,
            )
        if "acrostic" in asked:
            word = asked["acrostic"]["word"]
            found = "\n".join(
                f"{c} {part}" for c, part in zip(word, self.chunks(len(word), filler), strict=True)
            )
        elif "sentences" in asked:
            n = amount(asked["sentences"]) or asked["sentences"]["at_most"]
            found = " ".join(self.chunks(n - bool(end), filler))
        elif "lines" in asked:
            n = amount(asked["lines"]) or asked["lines"]["at_most"]
            found = "\n".join(self.chunks(n, filler))
        elif "paragraphs" in asked:
            n = amount(asked["paragraphs"]) or asked["paragraphs"]["at_most"]
            found = "\n\n".join(self.chunks(n, filler))
        else:
            found = "\n\n".join(self.blocks(filler))
        if "postscript" in asked:
            end = f"\n\n{asked['postscript']['marker']} {self.take(2)}"
        found = f"{start} {found} {end}".strip()
        case = {"upper_case": str.upper, "lower_case": str.lower, "title_case": str.title}
        for name in case.keys() & asked.keys():
            found = case[name](found)
        return f"“{found}”" if "quoted" in asked else found


def compose(constraints):
    """A reply that meets them all, of the length that is asked."""
    asked = {c["kind"]: c for c in constraints}
    filler = 50
    if "characters" in asked:
        filler = 350 if amount(asked["characters"]) else 50
    if "words" in asked:
        target = amount(asked["words"]) or asked["words"]["at_most"]
        filler += target - len(words(Writer(constraints).text(filler)))
    return Writer(constraints).text(filler)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 6])
def test_sampled_constraints_can_be_met_together(n):
    for seed in range(150):
        constraints = sample(random.Random(f"{n}/{seed}"), n)
        check_constraints(constraints)
        assert len({c["kind"] for c in constraints}) == n
        text = compose(constraints)
        assert unmet(text, constraints) == [], ([describe(c) for c in constraints], text)


def test_every_kind_is_drawn_alone_and_too_many_are_refused():
    drawn = {c["kind"] for seed in range(600) for c in sample(random.Random(seed), 1)}
    assert drawn == KINDS.keys()
    assert sample(random.Random(5), 4) == sample(random.Random(5), 4)
    with pytest.raises(UserError, match="n=40 constraints that go together were not found"):
        sample(random.Random(0), 40)
