"""A Hugging Face folder at work by hand: generate, chat, evaluate; teach other jobs."""

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist

from q3mega.config.layout import Layout, check_layout
from q3mega.config.secrets import key_of
from q3mega.data.chat import render
from q3mega.data.tokenizer import Tokenizer
from q3mega.distillation.service.server import serve
from q3mega.engine import Engine
from q3mega.errors import UserError
from q3mega.evaluation import evaluate
from q3mega.evaluation.logprob_mismatch import Gap, Record, between, measure, record
from q3mega.model.config import dtype_of, shape_of
from q3mega.model.reader import Reader
from q3mega.problems import files
from q3mega.problems.generated.reasoning import REASONING
from q3mega.problems.generated.solutions import solve, thinking_text
from q3mega.problems.pool import Pool
from q3mega.rollout import Completion, Sampler, SamplingParams
from q3mega.rollout.base import text_of
from q3mega.rollout.in_process import InProcessSampler
from q3mega.rollout.servers.sampler import ServerKind, ServerSampler

_LOG = logging.getLogger(__name__)
TASKS = (*REASONING, "capabilities")


LONGEST = 32_768  # tokens of an answer in the report's evaluations
SMALL, SHORT = 500_000_000, 1_024  # parameters below the released models', and their answers' limit


def longest_answer(folder: str | Path) -> int:
    """How many tokens an answer may have: the context, up to what real thinking takes. A model
    smaller than the released ones, which may never end, gets fewer. What is no checkpoint has no
    limit: loading it says what is wrong."""
    try:
        shape = shape_of(folder)
    except UserError:
        return LONGEST
    return min(LONGEST if shape.num_parameters() >= SMALL else SHORT, shape.max_positions)


class _Counted:
    """A `Sampler` that knows the share of its completions which were cut at the limit."""

    def __init__(self, sampler: Sampler) -> None:
        self.sampler, self.drawn, self.cut = sampler, 0, 0

    def generate(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams
    ) -> list[list[Completion]]:
        """See `Sampler`."""
        groups = self.sampler.generate(prompts, params)
        reasons = [c.finish_reason for group in groups for c in group]
        self.drawn += len(reasons)
        self.cut += reasons.count("length")
        return groups

    def cut_share(self) -> float:
        """Since the last call."""
        share = self.cut / max(1, self.drawn)
        self.drawn = self.cut = 0
        return share


class Checkpoint:
    """A model that answers."""

    def __init__(self, folder: str | Path, *, batch: int = 512) -> None:
        """batch: sequences decoded at once."""
        shape = shape_of(folder)
        self.tokenizer = Tokenizer(folder)
        ids = self.tokenizer.vocab_size
        engine = Engine(shape, Layout(processes=1), seed=0, ids=ids, fresh=False)
        engine.load_hf(folder)
        self.sampler = InProcessSampler(engine, self.tokenizer, max_batch=batch)
        self.counted = _Counted(self.sampler)

    def answer(
        self, messages: Sequence[dict[str, Any]], params: SamplingParams, *, think: bool = True
    ) -> str:
        """The assistant's raw text for a chat; think=False pre-fills the empty think block. The log
        tells of one that is cut at its limit."""
        prompt = render(
            messages, add_generation_prompt=True, enable_thinking=None if think else False
        )
        [[completion]] = self.sampler.generate([self.tokenizer.encode(prompt)], params)
        if completion.finish_reason == "length":
            _LOG.warning("cut at %d tokens: raise --max-tokens", params.max_tokens)
        return text_of(completion, self.tokenizer)

    def score(
        self, tasks: Sequence[str], mode: evaluate.Mode, params: SamplingParams, n: int
    ) -> Iterator[tuple[str, dict[str, float]]]:
        """(metric, {value, n, low, high}) for each task: accuracy, by group where its rows have
        one, and pass@k up to params.n.

        Raises UserError for an unknown task and wrong rows of any, before anything is sampled.
        """
        for task in tasks:
            if task not in TASKS and not files.named(task):
                known = ", ".join((*TASKS, *files.NAMES))
                raise UserError(f"--tasks {task} is unknown: use some of {known}")
        rows = {t: files.rows(t, n, self.tokenizer) for t in tasks if files.named(t)}
        for task in tasks:
            if task in rows:
                scores = evaluate.graded(self.counted, self.tokenizer, rows[task], params, mode)
                yield from _summary(task, rows[task], scores)
                continue
            if task == "capabilities":
                yield from evaluate.capabilities(
                    self.counted, self.tokenizer, params.seed, params.max_tokens
                ).items()
                continue
            problems = Pool().draw(task, n, seed=0, heldout=True)
            found = evaluate.answers(self.counted, self.tokenizer, problems, params, mode)
            yield f"{task} pass@1", evaluate.accuracy(found)
            if params.n > 1:
                correct = [[a.correct for a in tries] for tries in found]
                yield f"{task} pass@{params.n}", evaluate.pass_at_k(correct, params.n)


def gap_to(
    folder: str | Path,
    kind: ServerKind,
    urls: Sequence[str],
    problems: int,
    max_tokens: int,
    seed: int,
    *,
    routes: bool,
) -> Gap:
    """The gap between a checkpoint, computed here in its own precision, and servers that hold it.

    routes: of a mixture's experts, too. Raises UserError for what is no checkpoint, and for servers
    that do not answer.
    """
    params = SamplingParams(max_tokens, seed=seed, routes=routes)
    tokenizer = Tokenizer(folder)
    servers = ServerSampler(urls, tokenizer, kind=kind)
    engine = _engine(folder, Layout(processes=1), tokenizer)
    drawn = Pool().held_out(problems)
    prompts = [tokenizer.encode(render(p.messages, add_generation_prompt=True)) for p in drawn]
    return measure(engine, servers, prompts, params)


def gap_of_layouts(
    folder: Path, layout: Layout, problems: int, *, keep: Path | None, against: Path | None
) -> Gap | None:
    """A checkpoint's log-probabilities of solved problems under a layout, kept in a file, or
    compared with such a file's. Every rank calls.

    Raises UserError for a file that is no record, or one of other tokens.
    """
    known = None
    if against:
        try:
            known = Record.model_validate_json(against.read_bytes())
        except (OSError, ValueError) as error:
            said = str(error).splitlines()[0]
            raise UserError(f"--against {against} is no record of gap --record: {said}") from None
    tokenizer = Tokenizer(folder)
    engine = _engine(folder, layout, tokenizer)
    texts = [
        render(p.messages, add_generation_prompt=True) + thinking_text(solve(p)) + p.answer
        for p in Pool().held_out(problems)
    ]
    found = record(engine, tokenizer.encode_batch(texts))
    if keep and dist.get_rank() == 0:
        keep.write_text(found.model_dump_json())
    return between(found, known, engine.shape.topk) if known else None


def teach(
    folder: Path, layout: Layout, port: int, *, network: bool, key_env: str | None, idle: float
) -> None:
    """Be the teacher of other jobs' students: every rank of this job calls. See `serve`."""
    if network and not key_env:
        raise UserError("--network lets other machines in: name a key's variable in --key-env")
    key, tokenizer = key_of("--key-env", key_env).encode(), Tokenizer(folder)
    engine = _engine(folder, layout, tokenizer)
    serve(engine, tokenizer.digest(), port=port, key=key, network=network, idle=idle)


def _engine(folder: str | Path, layout: Layout, tokenizer: Tokenizer) -> Engine:
    """A frozen checkpoint in its own precision."""
    shape = shape_of(folder)
    check_layout(layout, shape)
    dtype = dtype_of(folder) or Reader(Path(folder), shape).dtype()
    engine = Engine(shape, layout, seed=0, dtype=dtype, ids=tokenizer.vocab_size, fresh=False)
    engine.load_hf(folder)
    return engine


def _summary(
    task: str, rows: Sequence[files.Row], scores: Sequence[Sequence[float | None]]
) -> Iterator[tuple[str, dict[str, float]]]:
    yield f"{task} score", evaluate.averages(scores)
    groups = [row.get("group") for row in rows]
    for group in sorted({str(g) for g in groups if g is not None}):
        members = [tries for tries, g in zip(scores, groups, strict=True) if str(g) == group]
        yield f"{task}/{group}", evaluate.averages(members)
    if (tries := len(scores[0])) > 1:
        passed = [[None if score is None else score >= 1 for score in some] for some in scores]
        yield f"{task} pass@{tries}", evaluate.pass_at_k(passed, tries)
