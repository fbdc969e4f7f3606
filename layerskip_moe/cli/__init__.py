"""The shell command: `layerskip-moe train | generate | evaluate | report | export | calibrate | plan | bench`.
Start at `dispatch.py`.

Every command is one file: its options, as dataclasses, and what is done with them. `flags.py` turns options into
flags. No room imports this one.
"""

from layerskip_moe.cli.dispatch import main

__all__ = ["main"]
