"""`python -m hpclab`, for where the command isn't on the path."""

import sys

from hpclab.cli import main

sys.exit(main())
