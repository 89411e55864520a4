import pytest
from hypothesis import given
from hypothesis import strategies as st

from q3mega.problems.generated.synthetic_documents import NOT_FOUND
from q3mega.rewards import score
from q3mega.rewards.groundedness import normal

THOUGHT = "<think>\nThe archive says so.\n</think>\n\n"


def earned(reply, answer):
    return score("groundedness", reply, {"answer": answer}).score


@pytest.mark.parametrize(
    ("reply", "answer"),
    [
        (r"\boxed{Ada Tolland}", "Ada Tolland"),
        (r"It was her teacher: \boxed{\text{ada tolland.}}", "Ada Tolland"),
        (r"\boxed{Piet Veldström}", "Piet Veldstrom"),
        (r"\boxed{Eskmar} and again \boxed{Eskmar}", "Eskmar"),
        (r"Not Birkdale or Eskburg but \boxed{Eskmar}.", "Eskmar"),
        (r"\boxed{41188}", "41,188"),
        (r"\boxed{the Foundry}", "Foundry"),
        ("Eskmar.", "Eskmar"),
        ("**Eskmar**", "Eskmar"),
        ("The answer is Eskmar.", "Eskmar"),
        ("Final answer: 26 November 1859", "26 November 1859"),
        ("巴黎。", "巴黎"),
        ("答案是：“巴黎”。", "巴黎"),
        (rf"The archive does not say. \boxed{{{NOT_FOUND}}}", NOT_FOUND),
        (r"\boxed{Not found.}", NOT_FOUND),
    ],
)
def test_right_answers(reply, answer):
    assert earned(THOUGHT + reply, answer) == earned(reply, answer) == 1


@pytest.mark.parametrize(
    ("reply", "answer"),
    [
        ("", "Eskmar"),
        (r"\boxed{}", "Eskmar"),
        (r"\boxed{Tolland}", "Ada Tolland"),
        (r"\boxed{Eskmar, Birkdale}", "Eskmar"),
        (r"\boxed{Eskmar} or \boxed{Birkdale}", "Eskmar"),
        (r"\boxed{not found or Eskmar}", "Eskmar"),
        ("Eskmar or Birkdale", "Eskmar"),
        ("It is one of Eskmar, Birkdale, Veldmar and so on, as the archive says.", "Eskmar"),
        ("I read in the second of the documents that were found that it is Eskmar", "Eskmar"),
        (r"\boxed{4,1188}", "41,188"),
        (r"\boxed{1859}", "26 November 1859"),
        (rf"\boxed{{{NOT_FOUND}}}", "Eskmar"),
        (r"\boxed{Eskmar}", NOT_FOUND),
        ("not found", NOT_FOUND),
        ("The documents do not say.", NOT_FOUND),
        (r"\boxed{not found} or \boxed{Eskmar}", NOT_FOUND),
        (r"\boxed{not found, Eskmar}", NOT_FOUND),
        ("<think>\n\\boxed{Eskmar}", "Eskmar"),
        ("<think>\nEskmar\n</think>\n\n", "Eskmar"),
        ("<tool_response>\nEskmar\n</tool_response>", "Eskmar"),
        ('Eskmar<tool_call>\n{"name": "search", "arguments": {}}\n</tool_call>', "Eskmar"),
        ("Eskmar <tool_call>", "Eskmar"),
    ],
)  # fmt: skip
def test_everything_else(reply, answer):
    assert earned(reply, answer) == 0


@given(st.text(max_size=60), st.sampled_from(["Eskmar", "41,188", NOT_FOUND]))
def test_no_text_breaks_it_and_only_the_answer_earns(text, answer):
    for reply in (text, rf"\boxed{{{text}}}"):
        if earned(reply, answer):
            assert normal(answer) in normal(reply)
