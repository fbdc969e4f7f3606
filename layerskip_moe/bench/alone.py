"""A function run in a fresh interpreter, for what can be measured only once in a process.

Knows nothing of what is measured. Next: `memory.py`, `first_token.py`.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import layerskip_moe

_CHILD = """
import importlib, json, sys
asked = json.loads(sys.argv[1])
answer = getattr(importlib.import_module(asked["module"]), asked["function"])(**asked["arguments"])
print("\\n" + json.dumps(answer))
"""


def in_fresh_process(
    function: Callable[..., Any], arguments: dict[str, Any], environment: Mapping[str, str] = {}
) -> Any:
    """What a function of a module gives in a new interpreter; arguments and answer are such as JSON has.

    environment: set there in addition. Raises RuntimeError with the end of what the process said where it fails.
    """
    asked = {"module": function.__module__, "function": function.__name__, "arguments": arguments}
    root = str(Path(layerskip_moe.__file__).parent.parent)  # the library may run from a checkout
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-c", _CHILD, json.dumps(asked)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path, **environment},
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{function.__name__} failed in a process of its own:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])
