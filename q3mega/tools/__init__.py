"""Commands that no stage uses: convert, compare mixtures, doctor."""
