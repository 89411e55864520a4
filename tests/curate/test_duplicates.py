"""Near copies and evaluation texts: planted ones are found, others are not."""

import itertools
import os
import random
import re
import resource
from collections.abc import Iterator

import numpy as np
import pytest

from q3mega.curate import duplicates
from q3mega.curate.config import Decontamination, Duplicates, Evaluation
from q3mega.curate.contamination import EvalNgramIndex, evaluation_texts
from q3mega.curate.document import Document
from q3mega.data import package_text
from q3mega.data.ngrams import WORD

WORDS = [
    w for d in package_text.documents("stdlib_docs") for w in d.split()
]  # as frequent as in prose

DEFAULT = Duplicates()


def documents(texts: list[str]) -> list[Document]:
    return [Document(t, "s", "l") for t in texts]


def test_there_may_be_more_files_than_a_process_may_open(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    opened = len(os.listdir("/proc/self/fd"))
    files = [tmp_path / f"{i:05d}.bin" for i in range(60)]
    for i, file in enumerate(files):
        row = np.full(1, i // 2, duplicates.SKETCH)  # each after an even one is a copy
        row.tofile(file)
    resource.setrlimit(resource.RLIMIT_NOFILE, (opened + 20, hard))
    try:
        found = duplicates.find(files, 0.55, tmp_path / "keys")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert found.tolist() == [0, duplicates.REASONS.index("copy")] * 30


def find(tmp_path, texts: list[str], shards: int = 3, settings: Duplicates = DEFAULT) -> list[str]:
    files = []
    for i, part in enumerate(np.array_split(np.array(texts, object), shards)):
        some = documents(part.tolist())
        duplicates.identify(some)
        files.append(tmp_path / f"{i}.bin")
        duplicates.sketch(some, settings.words).tofile(files[-1])
    found = duplicates.find(files, settings.threshold, tmp_path / "keys")
    assert not (tmp_path / "keys").exists()
    return [duplicates.REASONS[v] for v in found]


def edited(words: list[str], share: float, rng: random.Random) -> list[str]:
    """A share of the words exchanged, left out or doubled, wherever they are."""
    words = list(words)
    for i in rng.sample(range(len(words)), round(share * len(words))):
        words[i] = rng.choice([rng.choice(WORDS), "", f"{words[i]} {rng.choice(WORDS)}"])
    return words


def test_planted_near_copies_are_found_and_halves_are_not(tmp_path):
    rng = random.Random(0)
    base = [rng.choices(WORDS, k=rng.randint(60, 600)) for _ in range(400)]
    near = [edited(words, rng.uniform(0.05, 0.1), rng) for words in base]
    far = []
    for words in base:
        n = round(rng.uniform(0.3, 0.5) * len(words))
        far.append([*words[:n], *rng.choices(WORDS, k=len(words) - n)])
    found = find(tmp_path, [" ".join(w) for w in (*base, *near, *far)])
    hits, false = found[400:800].count("near_copy"), found[:400] + found[800:]
    wrong = len(false) - false.count("")
    assert hits / 400 >= 0.95  # recall
    assert hits / (hits + wrong) >= 0.95  # precision


def test_real_documents_that_differ_stay(tmp_path):
    texts = [
        d
        for name in ("python_reference", "year_2889", "stdlib")
        for d in package_text.documents(name)
    ]
    kept, _ = package_text.deduplicate(texts, threshold=0.5)
    assert set(find(tmp_path, kept)) == {""}


def test_copies_are_told_from_near_copies_and_the_first_stays(tmp_path):
    rng = random.Random(1)
    words = rng.choices(WORDS, k=200)
    one, other = " ".join(words), " ".join([*words[:-1], "else"])
    texts = [one, "!?", one, other, "", "two words", "+", "Two, words!", "", other, "two others"]
    assert find(tmp_path, texts) == [
        "", "", "copy", "near_copy", "", "", "", "near_copy", "copy", "copy", "",
    ]  # fmt: skip


def test_it_agrees_with_the_comparison_of_all_pairs(tmp_path):
    """The greedy rule on exact Jaccard similarities, but for pairs too close to the threshold."""
    rng = random.Random(2)
    texts: list[str] = []
    for _ in range(40):
        words = rng.choices(WORDS, k=150)
        texts += [" ".join(edited(words, s, rng)) for s in (0.0, 0.02, 0.03, 0.5, 0.6)]
    rng.shuffle(texts)
    sets = [set(itertools.pairwise(w)) for w in (WORD.findall(t.lower()) for t in texts)]
    kept: list[int] = []
    slow = []
    for i, mine in enumerate(sets):
        drop = any(len(mine & sets[j]) / len(mine | sets[j]) >= 0.55 for j in kept)
        slow.append("near_copy" if drop else "")
        kept += [] if drop else [i]
    assert find(tmp_path, texts) == slow
    assert slow.count("near_copy") > 60


def test_a_chain_of_small_changes_does_not_drop_what_resembles_nothing_kept(tmp_path):
    rng = random.Random(3)
    words = rng.choices(WORDS, k=400)
    chain = [list(words)]
    for step in range(8):
        following = list(chain[-1])
        following[step * 50 : step * 50 + 50] = rng.choices(WORDS, k=50)
        chain.append(following)
    found = find(tmp_path, [" ".join(w) for w in chain])
    assert found[0] == "" and found[1] == "near_copy"
    assert "" in found[2:]  # the whole text has changed by the end


def test_no_document_at_all(tmp_path):
    assert find(tmp_path, [], shards=1) == []


QUESTION = (
    "A farmer's two sons share 12 apples, 30 pears and 7 plums: how many pieces of fruit does each "
    "get if none (not even one) is left over?"
)


def pairs(q: str) -> Iterator[tuple[str, str]]:
    words = q.split()
    return itertools.zip_longest(words[::2], words[1::2], fillvalue="")


FULL_WIDTH = {i: i + 0xFEE0 for i in range(0x21, 0x7F)} | {0x20: 0x3000}
SETTINGS = {
    "as it is": lambda q: q,
    "upper case": str.upper,
    "no punctuation": lambda q: re.sub(r"(?<!\w)[^\w\s]|[^\w\s](?!\w)", "", q),
    "other punctuation": lambda q: re.sub(r"[,:]", ";", q).replace("(", "[").replace(")", "]"),
    "line breaks": lambda q: q.replace(" ", "\n"),
    "indented lines": lambda q: q.replace(" ", "  \n\t> "),
    "no-break spaces": lambda q: q.replace(" ", "\u00a0\u2009"),
    "emphasis": lambda q: " ".join(f"**{w}** _{v}_" for w, v in pairs(q)),
    "typographic": lambda q: q.replace("'", "’").replace("(", "— “").replace(")", "”…"),
    "full width": lambda q: q.translate(FULL_WIDTH),
    "mathematical letters": lambda q: re.sub(
        "[a-z]", lambda m: chr(0x1D41A + ord(m[0]) - ord("a")), q
    ),
    "all at once": lambda q: f"**{q.upper().translate(FULL_WIDTH)}**".replace("\u3000", "\n_ _"),
}  # fmt: skip


def planted(question: str) -> str:
    rng = random.Random(question)
    before, after = rng.choices(WORDS, k=80), rng.choices(WORDS, k=80)
    return package_text.clean(" ".join(before) + "\n" + question + "\n" + " ".join(after))


@pytest.mark.parametrize("setting", SETTINGS)
def test_an_evaluation_text_is_found_however_it_is_set(setting):
    own = evaluation_texts(Decontamination(), 64)
    questions = [QUESTION, *own]
    forbidden, short = EvalNgramIndex.of(questions, 13, 4)
    assert short == 0
    hits = forbidden.step(documents([planted(SETTINGS[setting](q)) for q in questions]))
    assert hits == ["evaluation_text"] * len(questions)
    assert len(questions) > 1000


def test_other_documents_stay():
    forbidden, _ = EvalNgramIndex.of([QUESTION, *evaluation_texts(Decontamination(), 64)], 13, 4)
    texts = [
        planted(""),
        *package_text.documents("year_2889"),
        *package_text.documents("python_reference"),
    ]
    assert set(forbidden.step(documents(texts))) == {""}


def test_it_decides_as_the_filter_on_strings():
    rng = random.Random(4)
    some = [f"w{i}" for i in range(5)]
    for _ in range(30):
        evaluation = [" ".join(rng.choices(some, k=rng.randint(3, 9))) for _ in range(20)]
        texts = [" ".join(rng.choices(some, k=rng.randint(0, 60))) for _ in range(60)]
        forbidden, short = EvalNgramIndex.of(evaluation, 5, 3)
        kept = [
            t for t, hit in zip(texts, forbidden.step(documents(texts)), strict=True) if not hit
        ]
        assert (kept, 0) == (package_text.decontaminate(texts, evaluation, 5)[0], short)
        assert 0 < len(kept) < len(texts)


def test_it_is_the_same_from_a_file_and_counts_what_is_too_short(tmp_path):
    (tmp_path / "q.jsonl").write_text('{"q": "yes"}\n{"q": "what is the sixth number of it"}\n')
    limits = Decontamination(
        evaluation=(Evaluation(glob=str(tmp_path / "*"), text="q"),), own=False
    )
    forbidden, short = EvalNgramIndex.of(evaluation_texts(limits, 64), 13, 4)
    assert short == 1
    with (tmp_path / "f.npz").open("wb"):
        forbidden.write(tmp_path / "f.npz")
    read = EvalNgramIndex.read(tmp_path / "f.npz")
    texts = documents(["Yes.", "so What is the\nsixth number of it!", "what is the sixth number"])
    assert read.step(texts) == forbidden.step(texts) == ["", "evaluation_text", ""]
