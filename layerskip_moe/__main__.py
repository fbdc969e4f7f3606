"""`python -m layerskip_moe` is the shell command `layerskip-moe`. Next: `cli/dispatch.py`."""

import sys

from layerskip_moe.cli import main

sys.exit(main())
