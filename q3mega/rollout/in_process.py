"""The in-process sampler: the engine's own weights, a KV cache, many sequences at once.

The model that trains is the model that samples, so trainer and sampler agree to rounding. The
cache lives in the core attention; this file only decides which token comes next.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace

import torch
from torch import Tensor

from q3mega.data.batch import Sample, collate
from q3mega.data.tokenizer import Tokenizer
from q3mega.engine import Engine, LMHead, parallel
from q3mega.errors import UserError
from q3mega.model.attention import KVCache
from q3mega.rollout.base import Completion, SamplingParams

IDLE = -1  # the sequence of a row that only keeps the ranks in step
KEEP = 0.8  # of the rows still running: below that the finished ones are dropped


class InProcessSampler:
    """Samples from `engine`. Sequences beyond `max_batch` wait for the next round."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer, *, max_batch: int = 512) -> None:
        if engine.layout.pipeline > 1 or engine.layout.context > 1:
            raise UserError(
                "in-process sampling needs layout.pipeline=1 and layout.context=1: give the "
                "sampling stage such a layout"
            )
        self.engine, self.max_batch = engine, max_batch
        self.stops = (tokenizer.eos, tokenizer.eod)
        self.think_open, self.think_close = tokenizer.think_open, tokenizer.think_close
        self.tokenizer = tokenizer
        self.ids = min(tokenizer.vocab_size, engine.valid_vocab)  # others stand for no text
        # one token a sequence is cut over ranks as a batch of tokens is
        self.multiple = engine.layout.tensor if engine.config.sequence_parallel else 1

    @torch.no_grad()
    def generate(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams
    ) -> list[list[Completion]]:
        """See `Sampler`. A sequence's draws depend on its place in `prompts`, not its company.

        Raises UserError for routes of a dense model.
        """
        if params.routes and self.engine.routing is None:
            raise UserError("routes=True needs a model with experts, this is dense")
        queue = [list(p) for p in prompts for _ in range(params.n)]
        generator = torch.Generator().manual_seed(params.seed)
        stop_thinking = self.tokenizer.encode(params.stop_thinking)
        longest = params.max_tokens + len(stop_thinking)
        uniform = torch.rand(len(queue), longest, generator=generator)
        done: list[Completion] = []
        module = self.engine.chunks[0]
        training = module.training
        module.eval()
        rounds = parallel.max_over_expert_group(-(-len(queue) // self.max_batch))
        for start in range(0, rounds * self.max_batch, self.max_batch):
            part = slice(start, start + self.max_batch)
            done += self._run(queue[part], uniform[part], params, stop_thinking)
        module.train(training)
        return [done[i : i + params.n] for i in range(0, len(done), params.n)]

    def _run(
        self,
        prompts: list[list[int]],
        uniform: Tensor,
        params: SamplingParams,
        stop_thinking: list[int],
    ) -> list[Completion]:
        state = self.engine.chunks[0].attention_state
        longest = max(map(len, prompts), default=1)
        cache = KVCache(longest + uniform.shape[1])
        state.cache = cache
        routing = self.engine.routing
        try:
            with routing.recording() if params.routes and routing else nullcontext():
                return self._decode(prompts, uniform, params, stop_thinking, cache)
        finally:
            state.cache = None

    def _decode(
        self,
        prompts: list[list[int]],
        uniform: Tensor,
        params: SamplingParams,
        stop_thinking: list[int],
        cache: KVCache,
    ) -> list[Completion]:
        # A rank without prompts goes along with the experts' other ranks, for a sequence of none.
        fed = prompts or [[self.tokenizer.eos]]
        batch = collate([Sample(p, [0.0] * len(p)) for p in fed])
        fed_routes: list[tuple[Tensor, Tensor]] = []
        if params.routes:
            [head], [routes] = self.engine.evaluate_routed([batch], lambda head, _: head)
            fed_routes.append((batch.seq_ids if prompts else batch.seq_ids + IDLE, routes))
        else:
            [head] = self.engine.evaluate([batch], lambda head, _: head)
        ends = batch.cu_seqlens[1:].long() - 1
        logits = replace(head, hidden=head.hidden[ends], valid_vocab=self.ids).logits()
        out = [Completion([], [], [], "length") for _ in prompts]
        rows = torch.arange(len(prompts)) if prompts else torch.tensor([IDLE])
        uniform = uniform if prompts else uniform.new_zeros(1, uniform.shape[1])
        keep, kept = self._whole(rows, torch.arange(len(rows)))
        if len(keep) < len(cache.lengths) or len(keep) > len(rows):  # a document filled the pack
            rows, logits = kept, logits[keep]
            cache.keep(keep)
        thinking = [p[-1] == self.think_open for p in prompts]
        forced: list[list[int]] = [[] for _ in prompts]  # the stop text still to be written
        sampled = [0] * len(prompts)
        finished = [False] * len(prompts)
        step = 0
        while True:
            tokens, logprobs = self._choose(logits, uniform[rows, step], params)
            alive = []
            drawn, scores = tokens.tolist(), logprobs.tolist()
            for i, row in enumerate(rows.tolist()):
                if row == IDLE or finished[row]:
                    continue
                completion, token = out[row], drawn[i]
                inserted = bool(forced[row])
                if inserted:
                    token = tokens[i] = forced[row].pop(0)
                else:
                    sampled[row] += 1
                completion.tokens.append(token)
                completion.logprobs.append(0.0 if inserted else scores[i])
                completion.mask.append(0 if inserted else 1)
                if len(completion.tokens) == 1 and token == self.think_open:
                    thinking[row] = True
                if token == self.think_close:
                    thinking[row] = False
                if token in self.stops and not inserted:
                    completion.finish_reason = "stop"
                    finished[row] = True
                    continue
                over = params.thinking_budget is not None and sampled[row] >= params.thinking_budget
                if over and thinking[row] and not forced[row] and not inserted:
                    forced[row] = list(stop_thinking)
                finished[row] = sampled[row] >= params.max_tokens and not forced[row]
                if not finished[row]:
                    alive.append(i)
            if not parallel.max_over_expert_group(len(alive)):
                break
            if len(alive) < KEEP * len(rows):  # moving the cache costs more than a few idle rows
                keep, kept = self._whole(rows, torch.tensor(alive or [0]))
                if len(keep) < len(rows):
                    rows, tokens = kept, tokens[keep]
                    cache.keep(keep)
            logits = self._next(tokens, cache)
            if params.routes:
                [layers] = self.engine.routes()
                fed_routes.append((rows, torch.cat(list(layers.values()), 1).cpu()))
            step += 1
        if params.routes:
            _hand_out(fed_routes, prompts, out)
        return out

    def _whole(self, rows: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Places to go on with and the sequences there, filled up to a number that can be cut: by
        the first row again, for no sequence."""
        missing = -len(positions) % self.multiple
        idle = rows.new_full((missing,), IDLE)
        return torch.cat([positions, positions.new_zeros(missing)]), torch.cat(
            [rows[positions], idle]
        )

    def _next(self, tokens: Tensor, cache: KVCache) -> Tensor:
        """Feed one token a sequence (B,), return the next logits (B, V)."""
        head: LMHead = self.engine.chunks[0](
            tokens[None], None, None, output_processor=self._last_hidden
        )
        cache.lengths += 1
        return head.logits()

    def _last_hidden(
        self, hidden_states: Tensor, output_layer: object, output_weight: Tensor | None, **_: object
    ) -> LMHead:
        weight = output_layer.weight if output_weight is None else output_weight  # type: ignore[attr-defined]
        hidden = self.engine.gathered(hidden_states)[:, 0]
        return LMHead(hidden, weight, self.engine.tp_group, valid_vocab=self.ids)

    def _choose(
        self, logits: Tensor, uniform: Tensor, params: SamplingParams
    ) -> tuple[Tensor, Tensor]:
        """The next tokens (B,) by inverse transform, and their log-probabilities (B,)."""
        logprobs = (logits / (params.temperature or 1.0)).log_softmax(-1)
        if params.temperature == 0:
            tokens = logits.argmax(-1)
        else:
            probs = logprobs.exp()
            if params.top_k:
                kth = probs.topk(min(params.top_k, probs.shape[-1])).values[:, -1:]
                probs = probs * (probs >= kth)
            if params.top_p < 1:
                ordered, order = probs.sort(descending=True)
                before = (
                    ordered.cumsum(-1) - ordered
                )  # mass above each token: the first always stays
                ordered = ordered * (before < params.top_p * ordered.sum(-1, keepdim=True))
                probs = torch.zeros_like(probs).scatter(-1, order, ordered)
            mass = probs.cumsum(-1)
            target = uniform[:, None].to(mass) * mass[:, -1:]
            tokens = torch.searchsorted(mass, target, right=True)[:, 0]
            tokens = tokens.clamp(max=logits.shape[-1] - 1)
        return tokens, logprobs.gather(-1, tokens[:, None])[:, 0]


def _hand_out(
    fed: Sequence[tuple[Tensor, Tensor]], prompts: list[list[int]], out: list[Completion]
) -> None:
    """Each completion's routes, from (sequence (B,), routes (B, layers * topk)) of every pass; a
    sequence that has ended may have been fed on."""
    owner, routes = (torch.cat(parts) for parts in zip(*fed, strict=True))
    counts = torch.bincount(owner - IDLE, minlength=len(prompts) + 1).tolist()
    of_each = routes[owner.argsort(stable=True)].split(counts)[1:]
    for prompt, completion, layers in zip(prompts, out, of_each, strict=True):
        completion.routes = layers[: len(prompt) + len(completion.tokens) - 1].clone()
