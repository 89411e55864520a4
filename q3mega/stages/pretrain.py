"""Stages 1 to 3, pre-training: general text, then reasoning-heavy text, then long documents.

One pass over a mixture. The reasoning step has another mixture and a faster decay; the long step a
longer sequence and another RoPE base (ABF), and is then evaluated at four times its length with
YaRN and dual-chunk attention against plain RoPE (Qwen3 report, section 3).
"""

from dataclasses import replace
from typing import Any

from q3mega.config.pretraining import Pretrain
from q3mega.corpus import documents
from q3mega.data.tokenizer import train_tokenizer
from q3mega.engine import Engine
from q3mega.evaluation import language_model, retrieval
from q3mega.stages.common.pretraining import pretrain
from q3mega.stages.common.stage import Stage, extended

TOKENIZER_DOCUMENTS = 300  # of each kind


def run(stage: Stage[Pretrain]) -> None:
    """Train on the mixture from the stage before, or from fresh weights; then evaluate."""
    config = stage.config
    ensure_tokenizer(stage)
    source = stage.start() if config.init or stage.latest(model="model") else None
    engine = stage.engine(source, shape=stage.shape(stage.recipe.model), steps=config.steps)
    if config.rope_base:
        engine.positions = replace(engine.positions, base=config.rope_base)
    pretrain(stage, engine, config)
    stage.finish(engine, evaluation(stage, engine))


def ensure_tokenizer(stage: Stage[Pretrain]) -> None:
    """Train the run's tokenizer if the recipe asks for one and none is there yet."""
    spec = stage.recipe.tokenizer
    folder = stage.run_dir / "tokenizer"
    if spec.vocab_size and stage.leads and not (folder / "tokenizer_config.json").exists():
        stages = stage.recipe.stages.values()
        kinds = dict.fromkeys(
            kind for stage_config in stages for kind in stage_config.document_kinds
        )
        texts = []
        for kind in kinds:
            drawn = documents.documents(kind, seed=stage.recipe.seed)
            texts += [text for _, text in zip(range(TOKENIZER_DOCUMENTS), drawn, strict=False)]
        train_tokenizer(texts, spec.vocab_size, folder)
    stage.barrier()


def evaluation(stage: Stage[Pretrain], engine: Engine) -> dict[str, Any]:
    """Held-out loss by kind; after the long step, retrieval in and beyond the trained length."""
    config = stage.config
    results: dict[str, Any] = language_model.loss_by_kind(
        engine, stage.tokenizer, config.mixture, config.sequence, stage.seed("held out")
    )
    if engine.shape.experts:
        results |= language_model.expert_load(
            engine, stage.tokenizer, config.mixture, stage.seed("load")
        )
    if config.extension:
        x, trained = config.extension, engine.positions
        far = extended(trained, config.sequence, x.factor, x.chunk_size, x.local_size)
        lengths = {"1x": config.sequence, f"{x.factor:g}x": int(config.sequence * x.factor)}
        for times, length in lengths.items():
            seed = stage.seed("retrieval", length)
            samples = retrieval.haystacks(stage.tokenizer, length, x.documents, seed)
            for name, positions in (("rope", trained), ("yarn_dca", far)):
                engine.positions = positions
                results[f"retrieval_{times}_{name}"] = retrieval.retrieval(engine, samples)
        engine.positions = trained
    return results
