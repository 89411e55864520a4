"""The trained tokenizer: lossless, stable on arithmetic, and the same through transformers."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from q3mega.data.chat import render
from q3mega.data.tokenizer import SPECIAL_TOKENS, Tokenizer, train_tokenizer
from q3mega.errors import UserError

TEXT = [
    "the cat sat on the mat and the dog sang to the cat",
    "What is 12+34=46?\n" * 3,
    "größer 你好 мир",
] * 20


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(TEXT, 300, path)
    return Tokenizer(path)


@given(text=st.text(max_size=60) | st.text(alphabet=" \t\r\nax1+", max_size=20))
def test_text_survives_a_round_trip(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_special_tokens_are_the_last_ids(tokenizer):
    assert tokenizer.vocab_size == 300
    assert [tokenizer.id(t) for t in SPECIAL_TOKENS] == list(range(291, 300))
    assert (tokenizer.eod, tokenizer.eos) == (291, 293)
    assert (tokenizer.think_open, tokenizer.think_close) == (294, 295)
    assert tokenizer.encode("a<think>b")[1] == tokenizer.think_open


@pytest.mark.parametrize("text", ["12+34=46", '\n\n+-*/=(){}<>|:,.?![]"\\\n'])
def test_digits_signs_and_newlines_stand_alone(tmp_path, text):
    train_tokenizer([text] * 50, 256 + len(SPECIAL_TOKENS), tmp_path)
    with pytest.raises(UserError, match="more than the text gives"):  # so there is no pair to merge
        train_tokenizer([text] * 50, 257 + len(SPECIAL_TOKENS), tmp_path)


def test_letters_take_their_space_along(tokenizer):
    pieces = [tokenizer.decode([i]) for i in tokenizer.encode("1\n    the cat 1")]
    assert pieces == ["1", "\n", " ", " ", " ", " the", " cat", " ", "1"]


def test_transformers_reads_the_same_folder(tokenizer):
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(tokenizer.path)
    messages = [{"role": "user", "content": "cat /think"}, {"role": "assistant", "content": "4"}]
    for options in ({}, {"enable_thinking": False, "tools": [{"name": "größer"}]}):
        text = render(messages, add_generation_prompt=True, **options)
        assert text == theirs.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, **options
        )
        assert theirs(text)["input_ids"] == tokenizer.encode(text)
    assert (theirs.eos_token_id, theirs.pad_token_id) == (tokenizer.eos, tokenizer.eod)
    shown = "<think>a</think><tool_call>b</tool_call>"
    ids = tokenizer.encode(f"<|im_start|>{shown}<|im_end|>")
    assert theirs.decode(ids, skip_special_tokens=True) == shown


def test_a_tokenizer_of_qwens_own_class_loads(tmp_path):
    from transformers import Qwen2Tokenizer

    letters = {c: i for i, c in enumerate("Ġabcdefghij")}
    theirs = Qwen2Tokenizer(vocab=letters | {"ab": 11, "Ġab": 12}, merges=[("a", "b"), ("Ġ", "ab")])
    theirs.add_tokens(list(SPECIAL_TOKENS), special_tokens=True)
    theirs.save_pretrained(tmp_path)
    ours = Tokenizer(tmp_path)
    text = "abc ab<think>j</think> d<|im_end|>"
    assert ours.encode(text) == theirs.encode(text)
    assert ours.encode_batch([text, "ab"]) == [ours.encode(text), [11]]
    assert ours.decode(ours.encode(text)) == text
    assert ours.eos == theirs.convert_tokens_to_ids("<|im_end|>")


def test_training_is_deterministic(tokenizer, tmp_path):
    train_tokenizer(TEXT, 300, tmp_path)
    again = (tmp_path / "tokenizer.json").read_bytes()
    assert again == (tokenizer.path / "tokenizer.json").read_bytes()


@pytest.mark.parametrize(("size", "word"), [(100, "at least"), (5000, "more than the text gives")])
def test_an_impossible_size_is_named(tmp_path, size, word):
    with pytest.raises(UserError, match=f"vocab_size={size}.*{word}"):
        train_tokenizer(TEXT, size, tmp_path)


def test_a_folder_without_a_tokenizer_is_named(tmp_path):
    with pytest.raises(UserError, match=r"tokenizer\.path=.*give a HF folder"):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match=r"tokenizer\.path=.*give a HF folder"):
        Tokenizer(tmp_path)


def test_a_missing_token_is_named(tokenizer):
    with pytest.raises(UserError, match="<nothing>"):
        tokenizer.id("<nothing>")
