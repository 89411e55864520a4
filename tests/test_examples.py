"""The examples run as they stand."""

import re
import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parent.parent / "examples"


def test_plain_pytorch_learns():
    command = [sys.executable, str(EXAMPLES / "plain_pytorch.py")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    rewards, losses = (
        [float(number) for number in re.findall(r"\d\.\d+", line)]
        for line in done.stdout.splitlines()
    )
    assert rewards[0] < 0.3 < 0.8 < rewards[-1]
    assert losses[-1] < 0.5 * losses[0]
