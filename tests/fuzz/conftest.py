"""What the fuzzers share: how many cases, what counts as well refused, and ways of damaging real files.

Every input either works or is refused: ValueError, one sentence that ends in a full stop, in bounded time and memory.
The cases of the everyday run are the same each time (a red test is the change's fault); the slow tier draws new ones.
"""

import copy
import json
import os
import pickle
import resource
import signal
import sys
from contextlib import contextmanager

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

# Cases of an everyday run; the slow tier has 20 times as many.
CASES = {
    "networks": 30,
    "recipes": 10,
    "other people's networks": 24,
    "corpora": 40,
    "logs": 6,
    "results": 10,
    "prompts and sampling": 60,
    "exit layers": 50,
    "threshold files": 20,
    "threshold files with probes": 20,
    "traces": 50,
    "checkpoint folders": 80,
    "tokenizers": 30,
    "sentencepiece": 10,
    "command lines": 60,
}
assert sum(CASES.values()) == 500
SECONDS, BYTES, LETTERS = 20, 2**30, 1200  # of processor time, of further address space; of a sentence


@pytest.fixture(params=[1, pytest.param(20, marks=pytest.mark.slow)], ids=["few", "many"])
def cases(request):
    """cases(entry) -> hypothesis settings with the number of cases that this entry has in this tier."""

    def how_many(entry):
        return settings(
            max_examples=CASES[entry] * request.param,
            deadline=None,
            derandomize=request.param == 1,
            database=None,
            suppress_health_check=list(HealthCheck),
        )

    return how_many


class TooSlow(BaseException):
    """Not an Exception, so that nothing in the library takes it for one of its own."""


@contextmanager
def _bounds():
    """SECONDS of processor time (a busy machine's clock tells nothing) and BYTES of further memory, or it fails."""

    def stop(*_):
        raise TooSlow(f"more than {SECONDS} s of processor time")

    with open("/proc/self/statm") as file:
        mapped = int(file.read().split()[0]) * resource.getpagesize()
    limits, handler = resource.getrlimit(resource.RLIMIT_AS), signal.signal(signal.SIGPROF, stop)
    resource.setrlimit(resource.RLIMIT_AS, (mapped + BYTES, limits[1]))
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, handler)
        resource.setrlimit(resource.RLIMIT_AS, limits)


def _is_a_sentence(message):
    return "\n" not in message and 10 < len(message) <= LETTERS and message.endswith((".", "?"))


@pytest.fixture(scope="session")
def is_a_sentence():
    """is_a_sentence(message): one line that is no flood and ends as sentences do."""
    return _is_a_sentence


@pytest.fixture(scope="session")
def bounds():
    """The bounds alone, for calls that refuse in another way."""
    if sys.platform != "linux":
        pytest.skip("memory is bounded by what Linux offers")
    return _bounds


@pytest.fixture(scope="session")
def refused(bounds):
    """refused(call): the sentence that it was refused with, None where it worked. Any other exception goes through."""

    def run(call):
        with bounds():
            try:
                call()
            except ValueError as error:
                message = str(error)
            else:
                return None
        assert _is_a_sentence(message), f"{len(message)} letters: {message[:2000]!r}"
        return message

    return run


# Values where others are expected: of each kind of JSON, at the ends of what numbers can be, and too long to be shown.
JUNK = (
    *(None, True, False, 0, 1, -1, 2, 3, 7, 2**31, 2**63, -(2**63), 10**400, 1e-320, 0.5, -0.5, 1e308),
    *(float("nan"), float("inf"), "", "0", "nan", "x" * 10**5, "../../etc/passwd", "\ud800", "\n\n", "\0"),
    *([], {}, [[]], [None], [0] * 1000, [2**40], {"a": 1}, {"": None}, ["silu"] * 2, "<deep>", "<digits>"),
)
# Written instead of the words above: what json.dumps cannot write, or would not.
_RAW = {'"<deep>"': "[" * 10**5 + "]" * 10**5, '"<digits>"': "9" * 10**4}


def _paths(value, path=()):
    """The place of every value in a document."""
    if path:
        yield path
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        yield from _paths(child, (*path, key))


@st.composite
def _damaged_json(draw, contents):
    """The text of a document with one to three places dropped, exchanged or moved, written so that some readers trip:
    with a name twice, cut off, or nested without end."""
    contents = copy.deepcopy(contents)
    for _ in range(draw(st.integers(1, 3))):
        paths = list(_paths(contents))
        if not paths:
            break
        *way, last = draw(st.sampled_from(paths))
        parent = contents
        for key in way:
            parent = parent[key]
        match draw(st.sampled_from(["drop", "junk", "junk", "junk", "wrap", "rename", "number"])):
            case "drop":
                del parent[last]
            case "junk":
                parent[last] = copy.deepcopy(draw(st.sampled_from(JUNK)))
            case "wrap":
                parent[last] = [parent[last]]
            case "rename" if isinstance(parent, dict):
                parent[draw(st.sampled_from(["other", "", "x" * 10**4, "a\nb"]))] = parent.pop(last)
            case _:
                parent[last] = draw(st.integers(-4, 10**6) | st.floats())
    text = json.dumps(contents)
    for word, raw in _RAW.items():
        text = text.replace(word, raw)
    match draw(st.integers(0, 9)):
        case 0:
            text = text[: draw(st.integers(0, len(text)))]
        case 1:
            text = '{"config": null, "config": {}, ' + text[1:]
    return text.encode("utf-8", "surrogatepass")


class _Bomb:
    """Says so in the environment when it is unpickled."""

    def __reduce__(self):
        return (os.putenv, ("LAYERSKIP_MOE_EXPLODED", "1"))


@st.composite
def _damaged_bytes(draw, data):
    """A file's bytes: flipped here and there, cut off, lengthened, of another kind, or a pickle that runs code."""
    how = draw(st.sampled_from(["flip", "flip", "flip", "cut", "more", "splice", "random", "pickle", "length"]))
    if how == "pickle":
        return pickle.dumps(_Bomb())
    if how == "random":
        return draw(st.binary(max_size=200))
    if how == "length":  # as the header of safetensors, and many others, begin
        return draw(st.sampled_from([2**62, 2**64 - 1, 2**40, 0, 99])).to_bytes(8, "little") + data[8:]
    if how == "cut" or not data:
        return data[: draw(st.integers(0, len(data)))]
    if how == "more":
        return data + draw(st.binary(min_size=1, max_size=50))
    if how == "splice":
        begin, end = sorted(draw(st.tuples(*[st.integers(0, len(data))] * 2)))
        return data[:begin] + data[end:]
    changed = bytearray(data)
    for _ in range(draw(st.integers(1, 8))):
        # Half of them near the beginning, where headers are.
        most = draw(st.sampled_from([len(data), min(len(data), 512)]))
        changed[draw(st.integers(0, most - 1))] = draw(st.integers(0, 255))
    return bytes(changed)


@pytest.fixture(scope="session")
def damaged_json():
    """damaged_json(contents) -> a strategy of bytes that were that document once."""
    return _damaged_json


@pytest.fixture(scope="session")
def damaged_bytes():
    """damaged_bytes(data) -> a strategy of bytes that were that file once."""
    return _damaged_bytes


@pytest.fixture(scope="session")
def junk():
    """A strategy of values where others are expected."""
    return st.sampled_from(JUNK) | st.integers(-3, 40) | st.floats(-2, 2)


@pytest.fixture
def nothing_ran():
    """Fails a test after which a pickle was found to have been executed."""
    yield
    assert os.system('test -z "$LAYERSKIP_MOE_EXPLODED"') == 0, "code in a file was run"
