"""What a loss minimises and how credit is given: supervised, GRPO's family, distillation, entropy control."""
