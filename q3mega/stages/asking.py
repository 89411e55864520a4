"""Teachers and judges that a stage asks in text: behind an endpoint, or in a folder."""

from pathlib import Path
from typing import Any

from q3mega.data.tokenizer import Tokenizer
from q3mega.engine import parallel
from q3mega.rollout.chat_model import ChatModel, LocalChat
from q3mega.rollout.endpoint import Endpoint
from q3mega.rollout.in_process import InProcessSampler
from q3mega.settings import ChatModelSpec
from q3mega.stages.stage import Stage

Chats = list[list[dict[str, Any]]]


class Asked:
    """One model of the recipe. Every rank asks the same and gets all replies.

    An endpoint is asked by one rank, and what it said is kept in data/replies.sqlite: a run that
    was killed pays for no reply twice. A folder's model samples on all ranks.
    Raises UserError before anything is computed for an endpoint that does not have the model.
    """

    def __init__(self, stage: Stage, spec: ChatModelSpec) -> None:
        self.spec = spec
        self.remote = spec.url is not None
        self.leads = stage.leads
        self.model: ChatModel
        if spec.url is not None and spec.model is not None:
            endpoint = Endpoint(
                spec.url, spec.model, key_env=spec.key_env, concurrency=spec.concurrency,
                token_budget=spec.token_budget, cache=stage.data / "replies.sqlite",
            )  # fmt: skip
            if self.leads:
                endpoint.check()
            self.model = endpoint
        else:
            folder = Path(str(spec.path))
            tokenizer = Tokenizer(folder)
            batch = stage.config.sample_batch
            sampler = InProcessSampler(stage.engine(folder), tokenizer, max_batch=batch)
            self.model = LocalChat(sampler, tokenizer, stage.seed("ask", parallel.data_rank()))

    def __call__(
        self, chats: Chats, *, n: int = 1, temperature: float | None = None, thinking: bool = True
    ) -> list[list[str]]:
        """n replies to each chat, as raw assistant text; temperature: by default the recipe's."""
        heat = self.spec.temperature if temperature is None else temperature
        mine = list(enumerate(chats))
        if self.remote:
            mine = mine if self.leads else []
        else:
            mine = mine[parallel.data_rank() :: parallel.data_size()]
        said = self.model.ask(
            [chat for _, chat in mine], n=n, max_tokens=self.spec.max_tokens, temperature=heat,
            thinking=thinking,
        )  # fmt: skip
        gather = parallel.gather_over_all if self.remote else parallel.gather_over_data
        found = dict(gather([(i, replies) for (i, _), replies in zip(mine, said, strict=True)]))
        return [found[i] for i in range(len(chats))]

    def opinion(self, chats: Chats, temperature: float) -> list[str]:
        """One reply to each chat, without thinking: what `data.opinions` asks for."""
        return [reply for (reply,) in self(chats, temperature=temperature, thinking=False)]
