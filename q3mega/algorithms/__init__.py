"""What a loss minimises, how credit is given: supervised, GRPO's family, distillation, entropy."""
