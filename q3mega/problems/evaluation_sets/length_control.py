"""Evaluation: texts of a given length in five languages (LengthCtrl of the Qwen3 report).

Two words and the language are asked for as well, so that a reply of the right length has to be
about something. In Chinese a character counts as a word, as everywhere here.
"""

import random

from q3mega.problems.base import Row

_GENRES = {
    "en": ("a short story", "a letter to a friend", "a blog post", "a speech"),
    "de": ("eine kurze Geschichte", "einen Brief an eine Freundin", "eine Rede"),
    "fr": ("une courte histoire", "une lettre à une amie", "un discours"),
    "es": ("un cuento corto", "una carta a un amigo", "un discurso"),
    "zh": ("一个短故事", "一封给朋友的信", "一篇演讲"),
}
_WORDS = {
    "en": ("river", "window", "bread", "winter", "music", "garden", "train", "silence"),
    "de": ("Fluss", "Fenster", "Brot", "Winter", "Musik", "Garten", "Zug", "Stille"),
    "fr": ("rivière", "fenêtre", "pain", "hiver", "musique", "jardin", "train", "silence"),
    "es": ("río", "ventana", "pan", "invierno", "música", "jardín", "tren", "silencio"),
    "zh": ("河流", "窗户", "面包", "冬天", "音乐", "花园", "火车", "安静"),
}
_BOUNDS = {
    "en": {
        "about": "about {n} words",
        "at_most": "at most {n} words, but more than half of that",
        "at_least": "at least {n} words",
    },
    "de": {
        "about": "ungefähr {n} Wörter",
        "at_most": "höchstens {n} Wörter, aber mehr als die Hälfte davon",
        "at_least": "mindestens {n} Wörter",
    },
    "fr": {
        "about": "environ {n} mots",
        "at_most": "au plus {n} mots, mais plus de la moitié",
        "at_least": "au moins {n} mots",
    },
    "es": {
        "about": "unas {n} palabras",
        "at_most": "como máximo {n} palabras, pero más de la mitad",
        "at_least": "al menos {n} palabras",
    },
    "zh": {
        "about": "大约{n}个字",
        "at_most": "最多{n}个字，但要超过一半",
        "at_least": "至少{n}个字",
    },
}
_ASK = {
    "en": 'Write {genre} of {bound}, in English. Use the words "{a}" and "{b}" just so.',
    "de": "Schreibe {genre} auf Deutsch: {bound}. Verwende die Wörter „{a}“ und „{b}“ genau so.",
    "fr": "Écris {genre} en français : {bound}. Utilise les mots « {a} » et « {b} » tels quels.",
    "es": "Escribe {genre} en español: {bound}. Usa las palabras «{a}» y «{b}» tal cual.",
    "zh": "请用中文写{genre}，{bound}。文中要出现“{a}”和“{b}”这两个词。",
}
LENGTHS = (60, 100, 150, 200, 300, 400, 600, 800)


def rows(n: int, seed: int) -> list[Row]:
    """n requests, languages and bounds in turn. Group: about, at_most or at_least."""
    rng = random.Random(f"length_control/{seed}")
    languages, bounds = list(_ASK), list(_BOUNDS["en"])
    return [_row(rng, languages[i % 5], bounds[i % 3]) for i in range(n)]


def _row(rng: random.Random, language: str, bound: str) -> Row:
    number, (a, b) = rng.choice(LENGTHS), rng.sample(_WORDS[language], 2)
    sentence = _BOUNDS[language][bound].format(n=number)
    genre = rng.choice(_GENRES[language])
    text = _ASK[language].format(genre=genre, bound=sentence, a=a, b=b)
    return {
        "messages": [{"role": "user", "content": text}],
        "reward": ["length_control", "constraints_strict"],
        "length": {bound: number},
        "constraints": [
            {"kind": "keyword", "word": a, "at_least": 1},
            {"kind": "keyword", "word": b, "at_least": 1},
            {"kind": "language", "code": language},
        ],
        "group": bound,
    }
