"""What every stage stands on: its recipe, its folder, its tokenizer, its engine, its record."""

import json
import shutil
import zlib
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

import torch
import torch.distributed as dist

from q3mega.config.recipe import ModelSpec, Recipe
from q3mega.config.stage import StageConfig
from q3mega.data.tokenizer import Tokenizer
from q3mega.engine import Engine, OptimizerSpec, parallel
from q3mega.errors import UserError
from q3mega.evaluation.reasoning import MAX_ANSWER_TOKENS
from q3mega.io import write_json
from q3mega.model import Qwen3Shape
from q3mega.model.attention import Positions
from q3mega.model.config import shape_of, write_generation
from q3mega.model.sizes import Yarn
from q3mega.problems import Problem
from q3mega.problems.pool import Pool
from q3mega.rewards import plugins
from q3mega.rollout import Sampler, SamplingParams
from q3mega.rollout.in_process import InProcessSampler
from q3mega.rollout.servers.sampler import ServerSampler
from q3mega.rollout.weight_sync.sampler import WeightSyncedSampler
from q3mega.train.log import Log

PRECISION = {"fp32": torch.float32, "bf16": torch.bfloat16}


_Config = TypeVar("_Config", bound=StageConfig, covariant=True)


class Stage(Generic[_Config]):
    """One stage of one run, in one of its processes; `config` holds the stage's settings."""

    def __init__(self, run_dir: Path, name: str) -> None:
        self.recipe = Recipe.load(run_dir / "recipe.yaml")
        plugins.load(self.recipe.rewards)
        self.run_dir, self.name = run_dir, name
        self.config = cast(_Config, self.recipe.stages[name])
        self.dir = self.recipe.stage_dir(run_dir, name)
        self.data = self.dir / "data"
        self.data.mkdir(parents=True, exist_ok=True)
        parallel.initialise(self.config.layout, self.seed())

    def seed(self, *purpose: object) -> int:
        """A seed for one purpose, from the recipe's seed, the stage and the purpose alone."""
        return zlib.crc32(repr((self.recipe.seed, self.name, *purpose)).encode())

    # -- what it starts from ---------------------------------------------------------------------

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The run's tokenizer, or the one that the recipe names."""
        return Tokenizer(self.recipe.tokenizer.path or self.run_dir / "tokenizer")

    def shape(self, spec: ModelSpec) -> Qwen3Shape:
        """A model's shape with this tokenizer's vocabulary."""
        return spec.shape(self.tokenizer.vocab_size)

    def hf(self, stage: str) -> Path:
        """The weights that a stage of this run left."""
        return self.recipe.stage_dir(self.run_dir, stage) / "hf"

    def latest(self, *, model: str) -> Path | None:
        """The weights of the nearest stage before this one that trains `model`."""
        before = list(self.recipe.stages)[: list(self.recipe.stages).index(self.name)]
        stages = [s for s in before if self.recipe.stages[s].trains == model]
        return self.hf(stages[-1]) if stages else None

    @cached_property
    def pool(self) -> Pool:
        """The run's reasoning problems."""
        return Pool(self.recipe.problems)

    def problems(self, share: int, purpose: str) -> list[Problem]:
        """`share` training-side problems of every domain, drawn for one purpose."""
        pool = self.pool
        return [p for d in pool.domains for p in pool.draw(d, share, self.seed(purpose, d))]

    def held_out(self) -> list[Problem]:
        """What every stage evaluates on."""
        return self.pool.held_out(self.recipe.eval_problems)

    def cold_start_queries(self) -> list[Problem]:
        """What this run's cold start was built on; none when it had no cold start."""
        if "cold_start" not in self.recipe.stages:
            return []
        path = self.recipe.stage_dir(self.run_dir, "cold_start") / "data" / "queries.json"
        return [Problem(**row) for row in json.loads(path.read_text())] if path.exists() else []

    def start(self) -> Path:
        """Where this stage's weights come from; UserError when there is nothing."""
        source = (
            Path(self.config.init) if self.config.init else self.latest(model=self.config.trains)
        )
        if source is None or not (source / "config.json").exists():
            raise UserError(
                f"stages.{self.name}.init={source}: no checkpoint there; run the stages before it "
                "or name a Hugging Face folder"
            )
        return source

    def engine(
        self,
        source: Path | None,
        *,
        shape: Qwen3Shape | None = None,
        rows: int | None = None,
        steps: int = 0,
        **optimizer: Any,
    ) -> Engine:
        """An engine with the weights of `source` (None: fresh ones of `shape`).

        rows: of its lm_head, where they must be another's. steps > 0 makes it train for so many
        steps, by this stage's settings or `optimizer`'s.
        """
        if source is not None:
            shape = shape_of(source)
        assert shape is not None
        if rows is not None:
            shape = replace(shape, vocab=rows)
        spec = replace(self._optimizer(steps), **optimizer) if steps else None
        engine = Engine(
            shape, self.config.layout, seed=self.seed("init"), optimizer=spec,
            dtype=PRECISION[self.recipe.precision], fp8=self.config.fp8 and steps > 0,
            ids=self.tokenizer.vocab_size,
            fresh=source is None,
        )  # fmt: skip
        if source is not None:
            engine.load_hf(source)
        return engine

    def _optimizer(self, steps: int) -> OptimizerSpec:
        c = self.config
        return OptimizerSpec(
            lr=c.lr, steps=steps, kind=c.optimizer, adam_lr=c.adam_lr, min_lr=c.min_lr,
            warmup_steps=c.warmup_steps, decay=c.decay, weight_decay=c.weight_decay,
            clip_grad=c.clip_grad, betas=c.betas, max_skipped=c.max_skipped,
            expert_shares=c.expert_shares,
        )  # fmt: skip

    def sampler(self, engine: Engine) -> Sampler:
        """Samples from the engine's weights, in process or on the servers that the recipe names."""
        spec, reinforcement = self.config.sampling_servers, self.config.rl
        if spec is None or reinforcement is None:
            return InProcessSampler(engine, self.tokenizer, max_batch=self.config.sample_batch)
        callers = parallel.data_size()
        if reinforcement.schedule == "asynchronous":  # rank 0, for so many batches at once
            callers = reinforcement.staleness + 1
        servers = ServerSampler(
            spec.urls, self.tokenizer, kind=spec.kind, timeout=spec.timeout_s, retries=spec.retries,
            concurrency=max(1, spec.concurrency // callers), key_env=spec.key_env,
        )  # fmt: skip
        if reinforcement.routing_replay == "r3":  # do they tell their experts?
            servers.generate([[self.tokenizer.eos]], SamplingParams(1, routes=True))
        self.write("rollout_servers.json", servers.server_versions)
        folder = (
            Path(spec.weights_folder or self.dir / "weights")
            if spec.weight_sync == "folder"
            else None
        )
        return WeightSyncedSampler(engine, servers, folder)

    @property
    def answer_tokens(self) -> int:
        """The longest answer of an evaluation."""
        return max(MAX_ANSWER_TOKENS, self.config.longest_answer)

    def log(self, total: int, part: str = "") -> Log:
        """The log of this stage, or of a part of it, over `total` steps."""
        folder = self.dir / part
        folder.mkdir(exist_ok=True)
        return Log(folder, total)

    # -- what it leaves --------------------------------------------------------------------------

    @property
    def leads(self) -> bool:
        """Whether this process is rank 0."""
        return dist.get_rank() == 0

    def barrier(self) -> None:
        """Wait for every process of the stage."""
        dist.barrier()

    def write(self, name: str, content: Any) -> None:
        """A JSON file in the stage's folder, from rank 0, whole or not at all."""
        if self.leads:
            write_json(self.dir / name, content)

    def prepared(self, name: str) -> bool:
        """Did an earlier try of this stage finish preparing `data/<name>`? (same on every rank)"""
        exists = (self.data / name).exists()
        dist.barrier()
        return exists

    def save_hf(self, engine: Engine, folder: Path | None = None) -> None:
        """A folder that transformers loads, tokenizer and chat template included."""
        folder = folder or self.dir / "hf"
        tokens = {"eos_token_id": self.tokenizer.eos, "pad_token_id": self.tokenizer.eod}
        engine.save_hf(folder, tokens)
        if self.leads:
            write_generation(folder, [self.tokenizer.eos, self.tokenizer.eod], self.tokenizer.eod)
            for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
                source = self.tokenizer.path / file
                if source.exists():
                    (folder / file).write_bytes(source.read_bytes())

    def finish(self, engine: Engine, evaluation: dict[str, Any]) -> None:
        """Weights, evaluation, and DONE as the last thing."""
        self.save_hf(engine)
        self.write("eval.json", evaluation)
        if self.leads:
            shutil.rmtree(self.dir / "weights", ignore_errors=True)  # hf has them
            (self.dir / "DONE").touch()
        dist.barrier()


def extended(
    positions: Positions, original: int, factor: float, chunk: int, local: int
) -> Positions:
    """The same model at `factor` times its trained length: YaRN and dual-chunk attention."""
    yarn = Yarn(factor, original)
    return replace(positions, yarn=yarn, chunk_size=chunk, local_size=local)
