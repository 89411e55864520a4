"""One pass over a mixture of documents, for the model and for a student."""

from q3mega.config.pretraining import PretrainSettings
from q3mega.config.stage import StageConfig
from q3mega.corpus import documents
from q3mega.engine import Engine
from q3mega.stages.common.stage import Stage
from q3mega.train import supervised


def pretrain(
    stage: Stage[StageConfig], engine: Engine, settings: PretrainSettings, part: str = ""
) -> None:
    """One pass over the mixture; `part` keeps a student's apart from the stage's own."""
    folder = stage.data / part
    tokens = settings.steps * settings.tokens_per_step
    if not stage.prepared(f"{part}/READY"):
        if stage.leads:
            folder.mkdir(exist_ok=True)
            seed = stage.seed("corpus", part)
            held_out = [problem.question for problem in stage.held_out()]
            counts = documents.build(
                settings.mixture, tokens, settings.sequence, stage.tokenizer, seed, folder, held_out
            )
            stage.write(f"data/{part}/filter_report.json", counts.steps)
            stage.write(f"data/{part}/drops.json", counts.drops)
            (folder / "READY").touch()
        stage.barrier()
    supervised.train(
        engine,
        documents.Mixture(
            settings.mixture,
            folder,
            settings.steps,
            settings.tokens_per_step,
            stage.seed("order", part),
        ),
        steps=settings.steps,
        capacity=stage.config.micro_batch_tokens,
        folder=stage.dir / "checkpoints" / part,
        log=stage.log(settings.steps, part),
        save_every=stage.config.save_every,
    )
