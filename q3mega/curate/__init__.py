"""From raw text to the tokens a model is pre-trained on: `q3mega curate`, see pipeline.py."""
