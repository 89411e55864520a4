"""A tokenizer for tests whose models know 64 ids and whose text does not matter."""

from types import SimpleNamespace

TOKENIZER = SimpleNamespace(
    vocab_size=64, eos=63, eod=62, think_open=61, think_close=60, encode=lambda text: [50, 51, 60]
)
