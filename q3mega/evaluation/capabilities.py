"""The five general capabilities, on the generated tasks."""

from dataclasses import replace

from q3mega.data.chat import parse, render
from q3mega.data.tokenizer import Tokenizer
from q3mega.engine import parallel
from q3mega.environments.environment import environment_of
from q3mega.evaluation.answers import flagged
from q3mega.evaluation.intervals import proportion
from q3mega.problems import Problem, generate
from q3mega.problems.generated import general
from q3mega.rewards import score_problem
from q3mega.rollout import Sampler, SamplingParams
from q3mega.rollout.episodes import run_episodes


def capabilities(
    sampler: Sampler, tokenizer: Tokenizer, seed: int, max_tokens: int, per_family: int = 200
) -> dict[str, dict[str, float]]:
    """`capability_<name>` by what the tasks really ask (the hidden rubric and the references, not
    the reward models), and `mode_obedience` on conversations with random flags."""
    problems = [
        p if f == "think_follow" else replace(p, messages=tuple(flagged(p, "no_think")))
        for f in general.GENERAL
        for p in generate(
            f, 2 * per_family if f == "think_follow" else per_family, seed=0, heldout=True
        )
    ]
    params = SamplingParams(max_tokens, 0.6, seed=seed + parallel.data_rank())

    def play(share: list[Problem]) -> list[float]:
        prompts = [
            tokenizer.encode(render(p.messages, tools=p.tools, add_generation_prompt=True))
            for p in share
        ]
        environments = [environment_of(p) for p in share]
        episodes = run_episodes(sampler, tokenizer, prompts, environments, params)
        return [success(p, turns) for p, (_, turns) in zip(share, episodes, strict=True)]

    scores = parallel.map_over_data_ranks(problems, play)
    results = {}
    for name in general.CAPABILITIES:
        scored = zip(problems, scores, strict=True)
        rows = [(p.family, score) for p, score in scored if p.capability == name]
        results[f"capability_{name}"] = proportion(s for _, s in rows)
        for family in dict.fromkeys(f for f, _ in rows):
            results[f"task/{family}"] = proportion(s for f, s in rows if f == family)
    results["mode_obedience"] = results["task/think_follow"]
    return results


def success(problem: Problem, turns: list[str]) -> float:
    """How well an episode did what its problem asks, in [0, 1]."""
    last = parse(turns[-1])
    if problem.capability == "preference":
        return general.rubric(last.content, problem) if last.closed else 0.0
    if problem.capability == "rag":
        return float(last.closed and last.content.strip() == problem.answer)
    if problem.tools and len(turns) == 1:
        return 0.0  # answered without the tool: a guess
    return float(score_problem(problem, turns[-1]).score == 1.0)
