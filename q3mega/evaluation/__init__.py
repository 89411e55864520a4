"""What a model can do: accuracies with intervals, capabilities, losses, log-prob mismatch."""
