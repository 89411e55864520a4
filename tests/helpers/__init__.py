"""What several tests share, and the programs that they start (`*_ranks.py`)."""
