"""LocalChat: what the sampler gets and what comes back, with a real sampler and a scripted one."""

from dataclasses import replace

import pytest

from q3mega import device  # noqa: F401

# isort: split
from helpers.tiny_models import LAYOUT, SHAPES

from q3mega.chat_models.base import LocalChat
from q3mega.data.chat import parse, render
from q3mega.data.tokenizer import Tokenizer, train_tokenizer
from q3mega.engine import Engine
from q3mega.errors import UserError
from q3mega.rollout import Completion, SamplingParams
from q3mega.rollout.base import text_of
from q3mega.rollout.in_process import InProcessSampler

CHATS = [
    [{"role": "user", "content": "What is 2+2?"}],
    [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Hello."}],
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(["What is 2+2? Be short. Hello."] * 20, 280, folder)
    return Tokenizer(folder)


def test_replies_are_the_samplers(tokenizer):
    sampler = InProcessSampler(
        Engine(replace(SHAPES["dense"], vocab=280), LAYOUT(), seed=5), tokenizer
    )
    model = LocalChat(sampler, tokenizer, seed=3)
    found = model.ask(CHATS, n=6, max_tokens=100, temperature=1.0)
    prompts = [tokenizer.encode(render(chat, add_generation_prompt=True)) for chat in CHATS]
    expected = sampler.generate(prompts, SamplingParams(100, n=6, seed=4))
    assert found == [[text_of(c, tokenizer) for c in group] for group in expected]
    assert model.ask(CHATS, n=6, max_tokens=100, temperature=1.0) != found
    again = LocalChat(sampler, tokenizer, seed=3)
    assert again.ask(CHATS, n=6, max_tokens=100, temperature=1.0) == found
    cold = [again.ask(CHATS, max_tokens=9) for _ in range(2)]
    assert cold[0] == cold[1]  # greedy unless told otherwise


class Parrot:
    """A sampler that writes one text, and keeps what it was asked."""

    def __init__(self, tokenizer, text):
        self.tokens, self.asked = [*tokenizer.encode(text), tokenizer.eos], []

    def generate(self, prompts, params):
        self.asked += prompts
        n = len(self.tokens)
        one = Completion(self.tokens, [0.0] * n, [1] * n, "stop")
        return [[one] * params.n for _ in prompts]


@pytest.mark.parametrize("thinking", [True, False])
def test_the_prompt_and_the_raw_form(tokenizer, thinking):
    text = "<think>\n2 and 2\n</think>\n\n4" if thinking else "4"
    parrot = Parrot(tokenizer, text)
    model = LocalChat(parrot, tokenizer, seed=0)
    assert model.ask(CHATS, n=2, max_tokens=50, thinking=thinking) == [[text] * 2] * 2
    tail = "<|im_start|>assistant\n" + ("" if thinking else "<think>\n\n</think>\n\n")
    for chat, prompt in zip(CHATS, parrot.asked, strict=True):
        said = tokenizer.decode(prompt)
        assert said.endswith(f"{chat[-1]['content']}<|im_end|>\n{tail}")
    assert parse(text).content == "4"


def test_what_is_no_chat_is_refused(tokenizer):
    parrot = Parrot(tokenizer, "x")
    model = LocalChat(parrot, tokenizer, seed=0)
    with pytest.raises(UserError, match="role"):
        model.ask([*CHATS, [{"role": "robot", "content": "a"}]], max_tokens=5)
    with pytest.raises(UserError, match="max_tokens=0"):
        model.ask(CHATS, max_tokens=0)
    assert not parrot.asked
