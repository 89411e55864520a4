"""From a recipe to processes: checks, the run folder, the driver, SLURM jobs."""
