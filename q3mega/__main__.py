"""`python -m q3mega` is the command."""

import sys

from q3mega.cli import main

sys.exit(main())
