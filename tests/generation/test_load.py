"""Many generations in one process, generations that end in an error, and several threads on one model."""

import gc
import random
import sys
import threading

import pytest
import torch

from layerskip_moe.generation import (
    Autoregressive,
    EarlyExit,
    LayerSkipping,
    LookupSpeculative,
    PromptLookup,
    SelfSpeculative,
    Session,
    SparseSpeculative,
    Speculative,
    generate,
)
from layerskip_moe.generation.policies import DEL, Cascade, DraftVerify, Heuristic
from layerskip_moe.generation.sampling import Sampling
from layerskip_moe.nn import KVCache
from layerskip_moe.nn.modes import evaluating, in_mode

VOCABULARY = 29


def lossless(model):
    """A maker of each strategy that gives the text of plain decoding."""
    return {
        "plain": Autoregressive,
        "fixed": lambda: SelfSpeculative(1, 3),
        "adaptive": SelfSpeculative,
        "heuristic": lambda: SelfSpeculative(policy=Heuristic(1, length=4)),
        "cascade": lambda: SelfSpeculative(policy=Cascade(1)),
        "del": lambda: SelfSpeculative(policy=DEL(length=3)),
        "draft and verify": lambda: SelfSpeculative(policy=DraftVerify(2)),
        "lookup": lambda: PromptLookup(3, 2),
        "lookup and layers": lambda: LookupSpeculative(1),
        "sparse": lambda: SparseSpeculative(draft_top_k=1),
        "draft model": lambda: Speculative(model, 3),
    }


def draw_work(draw, longest=200):
    """Prompts and settings of one generation."""
    prompts = [
        [draw.randrange(VOCABULARY) for _ in range(draw.randint(1, longest // 4))] for _ in range(draw.randint(1, 4))
    ]
    how = dict(max_new_tokens=draw.randint(1, longest // 2), seed=draw.randrange(2**40))
    how["temperature"] = draw.choice([0.0, 0.7, 1.0])
    if draw.random() < 0.3:
        how["top_k"] = draw.randint(1, VOCABULARY)
    if draw.random() < 0.3:
        how["stop_tokens"] = [draw.randrange(VOCABULARY)]
    if draw.random() < 0.3:
        how["batch_size"] = draw.randint(1, len(prompts))
    return prompts, how


def resident_bytes():
    with open("/proc/self/statm") as told:
        return int(told.read().split()[1]) * 4096


def living(*kinds):
    """How many objects of these classes there are."""
    gc.collect()
    return sum(type(one) in kinds for one in gc.get_objects())


def soak(model, generations, assert_same_text, *, warm_up):
    """Memory after the warm-up, and at the end; strategies go on from generation to generation."""
    draw, sizes = random.Random(0), []
    strategies = {name: make() for name, make in lossless(model).items()}
    lossy = [EarlyExit(0.3, cache="exact"), EarlyExit(0.3), LayerSkipping((1,)), LayerSkipping(random=1)]
    for number in range(generations):
        if number in (warm_up, generations - 1):
            gc.collect()
            sizes.append(resident_bytes() if sys.platform == "linux" else 0)
        prompts, how = draw_work(draw)
        if draw.random() < 0.1:
            texts = generate(model, prompts, draw.choice(lossy), **how).tokens
            assert [len(text) <= how["max_new_tokens"] for text in texts]
            continue
        got = generate(model, prompts, draw.choice(list(strategies.values())), **how).tokens
        how.pop("batch_size", None)
        expected = generate(model, prompts, **how, compile=draw.random() < 0.7).tokens
        sampling = Sampling(how["temperature"], how.get("top_k"), None, how["seed"])
        assert_same_text(model, prompts, expected, got, sampling)
    return sizes


def test_a_short_soak(trained_model, assert_same_text):
    """What a generation is made of does not stay, but the one cache that a model keeps for the next."""
    model = trained_model(max_seq_len=256)
    before = living(Session, KVCache)
    soak(model, 40, assert_same_text, warm_up=25)
    assert living(Session, KVCache) - before <= 1


@pytest.mark.slow
def test_two_thousand_generations(trained_model, assert_same_text):
    model = trained_model(max_seq_len=256)
    before, after = soak(model, 2000, assert_same_text, warm_up=500)
    assert after - before < 16 * 2**20, f"{(after - before) / 2**20:.1f} MiB more after 1,500 generations"


class Stopped(Exception):
    """What a callback raises."""


@pytest.mark.parametrize("error", [Stopped, KeyboardInterrupt])
@pytest.mark.parametrize("name", lossless(None))
def test_a_callback_that_raises_leaves_the_model_usable(trained_model, name, error):
    model = trained_model(max_seq_len=256)
    make, draw = lossless(model)[name], random.Random(1)
    strategy, training = make(), model.training
    for place in (0, 1, 5, 17):
        prompts = [[draw.randrange(VOCABULARY) for _ in range(length)] for length in (3, 9)]
        expected = generate(model, prompts, max_new_tokens=30, temperature=0.7).tokens
        seen = []

        def stop(row, token, seen=seen, place=place):
            seen.append((row, token))
            if len(seen) > place:
                raise error

        with pytest.raises(error):
            generate(model, prompts, strategy, max_new_tokens=30, temperature=0.7, on_token=stop)
        for row, tokens in enumerate(expected):  # what was streamed is the text so far
            streamed = [token for of_row, token in seen if of_row == row]
            assert streamed == tokens[: len(streamed)]
        assert model.training == training and not torch.is_inference_mode_enabled()
        for again in (strategy, make()):
            assert generate(model, prompts, again, max_new_tokens=30, temperature=0.7).tokens == expected


def test_a_callback_may_decode_too(trained_model):
    """With the same model and the same strategy, in the middle of a text."""
    model, prompts = trained_model(max_seq_len=256), [[3, 4, 5], [7]]
    for name, make in lossless(model).items():
        strategy, inner = make(), []
        expected = generate(model, prompts, max_new_tokens=12).tokens

        def decode(row, token, strategy=strategy, inner=inner):
            if len(inner) < 3:
                inner.append(generate(model, prompts[:1], strategy, max_new_tokens=12).tokens)

        assert generate(model, prompts, strategy, max_new_tokens=12, on_token=decode).tokens == expected, name
        assert inner == [expected[:1]] * 3, name


def in_threads(*functions):
    """Run functions side by side; what each raised, if anything."""
    errors, start = [], threading.Barrier(len(functions))

    def run(function):
        try:
            start.wait()
            function()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(function,)) for function in functions]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)  # as often as may be, so that what is not whole falls apart
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    if errors:
        raise errors[0]


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("name", lossless(None))
def test_two_threads_give_what_each_gives_alone(trained_model, name, shared):
    """On one model, with one strategy or each with its own."""
    model = trained_model(max_seq_len=256)
    make, works = lossless(model)[name], []
    for seed in range(2):
        draw = random.Random(seed)
        works.append([draw_work(draw, 80) for _ in range(6)])
    for work in works:  # what is fitted, compiled or recorded once is not what is asked here
        for _, how in work:
            how.pop("batch_size", None)
    alone = [[generate(model, prompts, **how).tokens for prompts, how in work] for work in works]
    common, found = make(), [[], []]

    def decode(thread):
        strategy = common if shared else make()
        for prompts, how in works[thread]:
            found[thread].append(generate(model, prompts, strategy, **how).tokens)

    in_threads(lambda: decode(0), lambda: decode(1))
    assert found == alone


def test_threads_that_record_and_threads_that_do_not(trained_model):
    """Plain decoding, recorded and not, and early exit, on a model that is in training mode outside."""
    model = trained_model(max_seq_len=256, dropout=0.5)
    model.train()
    try:
        prompts, how = [[1, 2, 3], [4]], dict(max_new_tokens=40, temperature=0.9)
        ways = [
            lambda: generate(model, prompts, **how).tokens,
            lambda: generate(model, prompts, compile=False, **how).tokens,
            lambda: generate(model, prompts, EarlyExit(0.3), **how).layers_run,
        ]
        alone, found = [way() for way in ways], [[], [], []]

        def repeat(number):
            for _ in range(5):
                found[number].append(ways[number]())

        in_threads(*(lambda number=number: repeat(number) for number in range(3)))
        assert found == [[one] * 5 for one in alone]
        assert all(module.training for module in model.modules())
    finally:
        model.eval()


def test_modes_of_threads_that_overlap(tiny_model):
    """Who leaves first does not take evaluation mode from who is still in it."""
    model = tiny_model(dropout=0.5).train()
    model.blocks[1].eval()
    modes = [module.training for module in model.modules()]
    inside, leave = threading.Event(), threading.Event()

    def other():
        with evaluating(model):
            inside.set()
            leave.wait()

    thread = threading.Thread(target=other)
    with evaluating(model):
        thread.start()
        inside.wait()
    assert not any(module.training for module in model.modules())
    leave.set()
    thread.join()
    assert [module.training for module in model.modules()] == modes


def test_modes_that_overlap_and_differ(tiny_model):
    """Whoever leaves first, the last one puts back what was there before all of them."""
    model = tiny_model().train()
    for first_out in (0, 1):
        evaluation, training = in_mode(model, training=False), in_mode(model, training=True)
        with evaluating(model):
            modes = [evaluation, training]
            for mode in modes:
                mode.__enter__()
            assert model.training, "the latest has its way"
            for mode in (modes[first_out], modes[1 - first_out]):
                mode.__exit__(None, None, None)
            assert not model.training
        assert model.training


def test_modes_within_modes(tiny_model):
    model = tiny_model().train()
    with in_mode(model, training=True):
        with evaluating(model):
            assert not model.training
            model.train()  # by hand
            with evaluating(model):
                assert not any(module.training for module in model.modules())
            assert model.training
        assert all(module.training for module in model.modules())
        with pytest.raises(Stopped), evaluating(model):
            raise Stopped
        assert all(module.training for module in model.modules())
    assert model.training
