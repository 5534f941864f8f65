"""`python -m server` is `multilora`."""

import sys

from server.cli import main

sys.exit(main())
