"""What `q3mega slurm` asks a cluster for: the `slurm` section of a recipe."""

import re
from typing import Annotated, Self

from pydantic import Field, PositiveInt, field_validator, model_validator

from q3mega.config.section import Section
from q3mega.errors import UserError

# Each becomes part of one line of a script: a line break would begin another.
OneLine = Annotated[str, Field(pattern=r"^[^\x00-\x1f\x7f\x85\u2028\u2029]+$")]
SbatchOption = Annotated[str, Field(pattern=r"^--?[A-Za-z][^\x00-\x1f\x7f\x85\u2028\u2029]*$")]


class Slurm(Section):
    """Nodes follow from a stage's layout; every other name is sbatch's own."""

    processes_per_node: PositiveInt = Field(
        8, description="Processes of a node; the nodes follow from a stage's layout."
    )
    gpus: bool = Field(
        True, description="A GPU for each process; with a gres of GPUs, that instead."
    )
    cpus_per_process: PositiveInt = Field(8, description="Cores of a process.")
    partition: OneLine | None = Field(None, description="sbatch's own.")
    account: OneLine | None = Field(None, description="sbatch's own.")
    qos: OneLine | None = Field(None, description="sbatch's own.")
    reservation: OneLine | None = Field(None, description="sbatch's own.")
    constraint: OneLine | None = Field(None, description="sbatch's own.")
    gres: OneLine | None = Field(None, description="sbatch's own.")
    mem: OneLine | None = Field(None, description="Memory of a node; sbatch's own.")
    nodelist: OneLine | None = Field(None, description="sbatch's own.")
    exclude: OneLine | None = Field(None, description="sbatch's own.")
    exclusive: bool = Field(False, description="sbatch's own.")
    mail_type: OneLine | None = Field(None, description="sbatch's own.")
    mail_user: OneLine | None = Field(None, description="sbatch's own.")
    options: tuple[SbatchOption, ...] = Field(
        (), description="Further options, as on sbatch's command line: --licenses=a."
    )
    time: str = Field(
        "24:00:00",
        description="Limit of one job: MINUTES, H:MM:SS, D-HH or D-HH:MM:SS; a stage that needs "
        "more takes several.",
    )
    stop_before: PositiveInt = Field(
        10, description="Minutes before the limit at which a stage saves and its job is requeued."
    )
    setup: tuple[str, ...] = Field(
        (), description="Shell lines before the ranks start: modules, an environment."
    )
    container_image: OneLine | None = Field(None, description="Image of the ranks, through pyxis.")
    container_mounts: tuple[OneLine, ...] = Field(
        (), description="SOURCE:TARGET of each mount; the run folder is mounted anyway."
    )
    python: OneLine | None = Field(
        None, description="Python of the ranks; null: the one that writes the scripts."
    )

    @property
    def minutes(self) -> float:
        """The time limit; 0 is none."""
        days, dash, clock = self.time.rpartition("-")
        parts = [int(part) for part in clock.split(":")]
        if dash:  # hours, minutes, seconds
            hours, minutes, seconds = [*parts, 0, 0][:3]
            return int(days) * 1440 + hours * 60 + minutes + seconds / 60
        if len(parts) == 3:
            return parts[0] * 60 + parts[1] + parts[2] / 60
        return parts[0] + (parts[1] / 60 if len(parts) == 2 else 0)

    @property
    def lead(self) -> int:
        """Seconds before the limit at which a stage is told to save; half of a short limit."""
        ask = self.stop_before * 60
        return round(min(ask, self.minutes * 30)) if self.minutes else ask

    @field_validator("time")
    @classmethod
    def _is_a_time(cls, time: str) -> str:
        if not re.fullmatch(r"\d+-\d{1,2}(:\d{1,2}){0,2}|\d+(:\d{1,2}){0,2}", time, re.ASCII):
            raise UserError(
                f"{time!r:.40} is no time limit: write MINUTES, H:MM:SS, D-HH or D-HH:MM:SS"
            )
        return time

    @model_validator(mode="after")
    def _python_of_the_container(self) -> Self:
        if self.container_image and not self.python:
            raise UserError(
                f"slurm.container_image={self.container_image} has a Python of its own: name it "
                "in slurm.python"
            )
        return self
