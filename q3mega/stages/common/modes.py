"""What a model of both modes is evaluated on."""

from typing import Any

from q3mega.config.stage import StageConfig
from q3mega.engine import Engine
from q3mega.evaluation import answers, capabilities, reasoning
from q3mega.rollout import SamplingParams
from q3mega.stages.common.stage import Stage


def both_modes(stage: Stage[StageConfig], engine: Engine) -> dict[str, Any]:
    """Accuracy in each mode and without a flag; with the generated tasks also obedience to flags,
    and the five capabilities."""
    sampler, tokenizer, problems = stage.sampler(engine), stage.tokenizer, stage.held_out()
    results: dict[str, Any] = reasoning.thinking(
        sampler, tokenizer, problems, stage.seed("eval"), mode="think",
        max_tokens=stage.answer_tokens,
    )  # fmt: skip
    params = SamplingParams(stage.answer_tokens, 0.6, seed=stage.seed("modes"))
    results["default_accuracy"] = answers.accuracy(
        answers.answer_problems(sampler, tokenizer, problems, params)
    )
    silent = answers.answer_problems(sampler, tokenizer, problems, params, "no_think")
    results["no_think_accuracy"] = answers.accuracy(silent)
    if stage.pool.generated:
        results |= capabilities.capabilities(
            sampler, tokenizer, stage.seed("capabilities"), stage.answer_tokens,
            per_family=stage.recipe.eval_problems // 2,
        )  # fmt: skip
    return results
