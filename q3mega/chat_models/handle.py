"""Teachers and judges that a stage asks in text: behind an endpoint, or in a folder."""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from q3mega.chat_models import judge_prompts
from q3mega.chat_models.base import ChatModel
from q3mega.chat_models.endpoint import Endpoint
from q3mega.config.servers import ChatModelSpec
from q3mega.engine import parallel
from q3mega.errors import NoReply, UserError

Chats = list[list[dict[str, Any]]]
Replies = list[list[str | NoReply]]
MIN_TEXTS = 1000  # texts of which a share is taken at least: a few failures at first end nothing
POLL_INTERVAL_S = 60.0  # seconds: a collective that waits for hours is given up


class ChatModelHandle:
    """One model of the recipe, in the stage's field `name`. Every rank asks the same and gets all
    replies, or why there is none.

    An endpoint is asked by one rank, which keeps the replies in a cache: a run that was killed pays
    for no reply twice. A folder's model samples on all ranks.
    Raises UserError before anything is computed for an endpoint that does not have the model.
    """

    def __init__(
        self,
        spec: ChatModelSpec,
        field: str,
        *,
        leads: bool,
        cache: Path,
        local: Callable[[Path], ChatModel],
    ) -> None:
        """field: the setting's dotted path, for messages. leads: this rank asks the endpoint.

        cache: a file of replies. local(folder): the model of a Hugging Face folder.
        """
        self.spec, self.field = spec, field
        self.leads, self.remote = leads, spec.url is not None
        self.asked = self.failed = 0
        self.model: ChatModel | None = None
        if spec.url is None or spec.model is None:
            self.model = local(Path(str(spec.path)))
        elif leads:
            self.model = endpoint = Endpoint(
                spec.url, spec.model, key_env=spec.key_env, concurrency=spec.concurrency,
                token_budget=spec.token_budget, cache=cache,
                send_enable_thinking=spec.send_enable_thinking,
                token_limit=spec.token_limit, extra_body=spec.extra_body,
                timeout=spec.timeout_s, retries=spec.retries,
            )  # fmt: skip
            endpoint.check()

    def __call__(
        self, chats: Chats, *, n: int = 1, temperature: float | None = None, thinking: bool = True
    ) -> Replies:
        """n replies to each chat, as raw assistant text; temperature: by default the recipe's.

        Raises UserError above the share of failures that the recipe allows.
        """
        heat = self.spec.temperature if temperature is None else temperature
        replies = self._replies(chats, n, heat, thinking)
        self.count(reply for some in replies for reply in some)
        return replies

    def opinion(self, chats: Chats, temperature: float) -> list[str | NoReply]:
        """One reply to each chat, without thinking: what `data.opinions` asks for, and counts.

        Where the recipe leaves the temperature to the server, another reply is asked for instead.
        """
        if self.spec.temperature is not None:
            return [reply for (reply,) in self._replies(chats, 1, temperature, False)]
        n = 1 + judge_prompts.TEMPERATURES.index(temperature)
        return [some[-1] for some in self._replies(chats, n, None, False)]

    def count(self, results: Iterable[object]) -> None:
        """Take in what was asked for and came, or did not come and costs a sample.

        Raises UserError above the share that the recipe allows.
        """
        last = None
        for result in results:
            self.asked += 1
            if isinstance(result, NoReply):
                self.failed, last = self.failed + 1, result
        share, every = self.spec.max_failures, self.asked == self.failed > 1
        if last and share < 1 and (every or self.failed > share * max(self.asked, MIN_TEXTS)):
            raise UserError(
                f"{self.field}.max_failures={share}: {self.failed} of {self.asked} texts have no "
                f"usable reply, the last by: {last.rule} ({last.detail}); see to that, or raise "
                "max_failures to go on without them"
            )

    def _replies(self, chats: Chats, n: int, heat: float | None, thinking: bool) -> Replies:
        def ask(some: Chats) -> Replies:
            assert self.model is not None
            return self.model.ask(
                some, n=n, max_tokens=self.spec.max_tokens, temperature=heat, thinking=thinking
            )

        if self.remote:
            return _from_lead(self.leads, lambda: ask(chats))
        return parallel.map_over_data_ranks(chats, ask)


def _from_lead(leads: bool, ask: Callable[[], Replies]) -> Replies:
    """What rank 0 gets, on every rank; the others look in on it now and then."""
    with ThreadPoolExecutor(1) as pool:
        job = pool.submit(ask) if leads else None
        done = False
        while not done:
            if job:
                wait([job], timeout=POLL_INTERVAL_S)
            done = all(parallel.gather_over_all([job.done()] if job else []))
        return parallel.gather_over_all(job.result() if job else [])
