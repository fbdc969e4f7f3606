"""layerskip-moe: Mixture-of-Experts decoders trained with the LayerSkip recipe, decoded faster with the same answers.

    layerskip-moe train      text to a trained model
    layerskip-moe generate   continue a prompt, under any decoding strategy
    layerskip-moe evaluate   perplexity and agreement with the last layer, at every exit
    layerskip-moe report     measure a trained model whole, and write it down with pictures
    layerskip-moe export     write a checkpoint for transformers (vLLM, SGLang) or for llama.cpp
    layerskip-moe calibrate  early exit whose loss is bounded, with a guarantee
    layerskip-moe trace      what every exit says of texts, to compare drafting policies on
    layerskip-moe ablate     what changes of network and recipe cost and buy, over several seeds
    layerskip-moe plan       memory and operations that a network needs, before it is built
    layerskip-moe bench      decoding, prompts, training and memory, timed beside transformers and llama.cpp

`layerskip-moe COMMAND --help` lists a command's options. A mistake is one sentence and exit code 1.
"""

# Knows nothing of what a command does, and imports only the one that is asked for. Next: `train.py`, `generate.py`.

import difflib
import importlib
import io
import os
import sys
from collections.abc import Sequence

from layerskip_moe.constants import user_error
from layerskip_moe.interrupts import Interrupted, is_first_process

COMMANDS = ("train", "generate", "evaluate", "report", "export", "calibrate", "trace", "ablate", "plan", "bench")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit code. arguments: without the program's name; None: the command line's.

    0: done. 1: a mistake of the user's, a run that diverged, or memory that ran out, told in one sentence on stderr.
    130: Ctrl-C; 143: SIGTERM in training. 141: nobody reads what is printed any more, as in
    `layerskip-moe generate ... | head`.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal may lack characters of a text, or of its name
    try:
        try:
            _run(list(sys.argv[1:] if arguments is None else arguments))
        except SystemExit as end:
            if end.code:  # a command's --help ends with 0
                raise
        sys.stdout.flush()  # here, where a closed pipe is understood, and not when the interpreter ends
        return 0
    except BrokenPipeError:
        # What is still buffered would be written, and fail, once more when the interpreter ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt as stop:
        print(file=sys.stderr)  # after the ^C, or a text half written
        code, told = stop.exit_status if isinstance(stop, Interrupted) else 130, str(stop) or "interrupted"
        if not is_first_process():
            return code
    except Exception as error:
        sentence = user_error(error)
        if sentence is None:
            raise
        code, told = 1, f"error: {sentence}"
    # Only now, when the error has gone and progress bars that it kept alive have cleared their line. Other people's
    # sentences may have several lines.
    print(" ".join(line.strip() for line in told.splitlines()), file=sys.stderr)
    return code


def _run(arguments: list[str]) -> None:
    command = arguments[0] if arguments else None
    if command in ("--help", "-h"):
        print(__doc__.strip())
    elif command == "--version":
        from layerskip_moe import __version__

        print(__version__)
    elif command in COMMANDS:
        importlib.import_module(f"layerskip_moe.cli.{command}").run(arguments[1:])
    else:
        given = "there is no command" if command is None else f"{command!r} is no command of layerskip-moe"
        close = difflib.get_close_matches(command or "", COMMANDS, n=1)
        advice = f"did you mean {close[0]}?" if close else f"give one of {', '.join(COMMANDS)}, or --help."
        raise ValueError(f"{given}; {advice}")
