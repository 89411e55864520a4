"""Teachers and judges of a stage."""

from pathlib import Path

from q3mega.chat_models.base import ChatModel, LocalChat
from q3mega.chat_models.handle import ChatModelHandle
from q3mega.config.servers import ChatModelSpec
from q3mega.config.stage import StageConfig
from q3mega.data.tokenizer import Tokenizer
from q3mega.engine import parallel
from q3mega.rollout.in_process import InProcessSampler
from q3mega.stages.common.stage import Stage


def chat_model(stage: Stage[StageConfig], spec: ChatModelSpec, field: str) -> ChatModelHandle:
    """The teacher or judge that stands in the stage's `field`."""

    def local(folder: Path) -> ChatModel:
        tokenizer = Tokenizer(folder)
        batch = stage.config.sample_batch
        sampler = InProcessSampler(stage.engine(folder), tokenizer, max_batch=batch)
        return LocalChat(sampler, tokenizer, stage.seed("ask", parallel.data_rank()))

    return ChatModelHandle(
        spec, f"stages.{stage.name}.{field}", leads=stage.leads,
        cache=stage.data / "replies.sqlite", local=local,
    )  # fmt: skip
