"""Recorded runs: what they give is what the run itself would, whatever happened since it was recorded."""

import gc
import threading

import pytest
import torch

from layerskip_moe.nn import KVCache, steps
from layerskip_moe.nn.compiling import compiling
from layerskip_moe.nn.kernels import has_kernels
from layerskip_moe.nn.rotary import rotary_table
from layerskip_moe.pretrained.quantize import quantize

pytestmark = pytest.mark.skipif(not has_kernels(), reason="there is no C++ compiler")

LAYERS = range(4)


class Pair:
    """A model and two caches: one run with recordings, the other without. `step` asserts that they agree bitwise."""

    def __init__(self, model, rows=3, capacity=40):
        self.model = model
        self.caches = [KVCache(model.config, rows, capacity, dtype=model.dtype) for _ in range(2)]
        self.text = torch.Generator().manual_seed(0)

    @torch.no_grad()
    def step(self, count=1, *, rows=None, layers=LAYERS, **how):
        """`count` random tokens after what each row holds."""
        cache = self.caches[0] if rows is None else self.caches[0].subset(torch.tensor(rows))
        tokens = torch.randint(23, (len(cache.lengths), count), generator=self.text)
        positions = cache.lengths[:, None] + torch.arange(count)
        outputs = []
        for whole, compiled in zip(self.caches, (True, False), strict=True):
            part = whole if rows is None else whole.subset(torch.tensor(rows))
            with compiling(self.model, compiled):
                outputs.append(self.model.run(self.model.embed(tokens), layers, positions=positions, cache=part, **how))
        recorded, made = outputs
        assert torch.equal(recorded.hidden, made.hidden)
        assert recorded.collected.keys() == made.collected.keys()
        for layer, states in made.collected.items():
            assert torch.equal(recorded.collected[layer], states)
        assert torch.equal(self.caches[0].keys, self.caches[1].keys)
        assert torch.equal(self.caches[0].values, self.caches[1].values)
        if self.model.config.router_remembers:
            assert torch.equal(self.caches[0].router_logits, self.caches[1].router_logits)
        return recorded.hidden

    def extend(self, counts):
        for cache in self.caches:
            cache.extend(counts)

    @property
    def recordings(self):
        return self.caches[0].recordings


@pytest.fixture
def pair(tiny_model):
    """pair(dtype=float32, **ModelConfig fields) -> a Pair."""
    return lambda dtype=torch.float32, **fields: Pair(tiny_model(dtype, **fields))


@pytest.fixture
def recorded(monkeypatch):
    """The recordings made from now on."""
    made = []

    class Counted(steps.Recording):
        def __init__(self, *arguments, **how):
            made.append(self)
            super().__init__(*arguments, **how)

    monkeypatch.setattr(steps, "Recording", Counted)
    return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_growing_text(pair, recorded, dtype):
    rotary_table.cache_clear()  # as in a process's first run, which makes the table
    pair = pair(dtype)
    for counts in ([2, 5, 1], 1, 1, [1, 3, 2], 1, 1):
        pair.extend(torch.tensor(counts) if isinstance(counts, list) else counts)
        pair.step(1)
    assert len(recorded) == 1 and recorded[0].complete
    for count in (4, 2, 4, 1, 2):
        pair.step(count)
        pair.extend(count)
    assert len(recorded) == 2, "for up to 8 rows, and up to 16"


@pytest.mark.parametrize("fields", [{}, dict(router_average=0.6, router_hold=3)], ids=str)
def test_some_rows_some_layers_fewer_experts_and_what_is_collected(pair, fields):
    pair = pair(**fields)
    for _ in range(3):
        pair.step(2, layers=range(2))
        pair.step(2)
        pair.step(2, layers=(0, 3))
        pair.step(2, top_k=1)
        pair.step(2, top_k=5)
        pair.step(2, collect=(1, 3))
        pair.step(2, collect=(3, 0))
        pair.step(2, rows=[2, 0])
        pair.step(3, rows=[1])
        pair.step(1, rows=[0, 1])
        pair.step(2, rows=[0, 1])
        pair.extend(torch.tensor([1, 2, 3]))
    assert all(recording.complete for recording in pair.recordings.values())


def test_rows_that_leave_leave_the_recordings(pair):
    pair = pair()
    pair.step()
    pair.extend(1)
    pair.step()
    assert len(pair.recordings) == 1
    for cache in pair.caches:
        cache.select(torch.tensor([2, 0]))
    for _ in range(3):
        pair.step()
        pair.extend(1)
    assert len(pair.recordings) == 1, "fewer rows are repeated from the same"
    for cache in pair.caches:
        cache.clear()
    for _ in range(3):
        pair.step()
        pair.extend(1)
    assert len(pair.recordings) == 1


def test_two_caches_at_once(tiny_model):
    model = tiny_model(torch.float32)
    one, other = Pair(model), Pair(model, rows=3, capacity=17)
    for count in (1, 2, 1, 1, 2):
        one.step(count)
        other.step(count)
        one.extend(count)
        other.extend(count)
    assert one.recordings.keys() == other.recordings.keys()


def test_two_models_on_one_cache(tiny_model):
    models = [tiny_model(torch.float32, seed=seed) for seed in (0, 1)]
    pair = Pair(models[0])
    for turn in range(6):
        pair.model = models[turn % 2]
        pair.step()
    assert len(pair.recordings) == 2


@pytest.mark.parametrize("fields", [dict(clip_qkv=0.5), dict(clip_qkv=0.5, qk_norm="full")], ids=str)
def test_what_cannot_be_recorded_is_made_each_time(pair, fields):
    pair = pair(**fields)
    for _ in range(4):
        pair.step()
        pair.extend(1)
    assert [recording.complete for recording in pair.recordings.values()] == [False]


@pytest.mark.parametrize(("kind", "complete"), [("int8", True), ("int4", False)])
def test_quantised_weights(tiny_model, kind, complete):
    pair = Pair(quantize(tiny_model(torch.float32, d_ff=16), kind))
    for _ in range(3):
        pair.step(2)
        pair.extend(2)
    assert [recording.complete for recording in pair.recordings.values()] == [complete]


def test_outputs_stay_when_the_recording_is_repeated(pair):
    pair = pair()
    first = pair.step(collect=(1,))
    kept = first.clone()
    pair.extend(1)
    second = pair.step(collect=(1,))
    pair.extend(1)
    again = second.clone()
    pair.step(collect=(1,))
    assert torch.equal(first, kept) and torch.equal(second, again)


def test_recordings_are_forgotten_with_their_cache(pair):
    pair = pair()
    for count in (1, 4):
        pair.step(count)
    numbers = [recording.number for recording in pair.recordings.values()]
    del pair.caches[0]
    gc.collect()
    forgotten = [torch.ops.layerskip_moe_few_rows.forget(number) for number in numbers]
    assert len(numbers) == 2 and forgotten == [0, 0], "1 would say that it was there until now"


def test_a_run_that_fails_leaves_no_recording_under_way(pair):
    pair = pair()
    block = pair.model.blocks[2]
    handle = block.attention.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError), torch.no_grad(), compiling(pair.model):
        hidden = torch.randn(3, 1, 16)
        pair.model.run(hidden, LAYERS, positions=torch.zeros(3, 1, dtype=int), cache=pair.caches[0])
    handle.remove()
    assert not pair.recordings
    pair.step()


@torch.no_grad()
def test_positions_past_the_end_are_refused_when_repeated_too(pair):
    pair = pair()
    pair.step()
    for decode in (False, True):
        act = pair.model.decode if decode else pair.model.run
        start = torch.tensor([[1], [2], [3]]) if decode else torch.randn(3, 1, 16)
        with compiling(pair.model):
            act(start, LAYERS, positions=torch.zeros(3, 1, dtype=int), cache=pair.caches[0])
            with pytest.raises((ValueError, RuntimeError), match=r"too many|outside the cache|no angle"):
                act(start, LAYERS, positions=torch.tensor([[0], [40], [0]]), cache=pair.caches[0])


def test_weights_that_are_trained_or_loaded_in_place_are_seen(tiny_model):
    model, other = tiny_model(torch.float32), tiny_model(torch.float32, seed=5)
    pair = Pair(model)
    pair.step()
    before = pair.step()
    model.requires_grad_(True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    model(torch.tensor([[1, 2, 3]])).square().mean().backward()
    optimizer.step()
    trained = pair.step()
    model.load_state_dict(other.state_dict())
    loaded = pair.step()
    assert len(pair.recordings) == 1
    assert not torch.equal(before, trained) and not torch.equal(trained, loaded)


def test_another_type_of_weights_on_the_same_cache(tiny_model):
    """`model.to` puts other numbers behind the same parameters."""
    pair = Pair(tiny_model(torch.float32))
    for dtype in (torch.float32, torch.bfloat16, torch.float32, torch.float16):
        pair.model.to(dtype)
        for _ in range(2):
            assert pair.step().dtype == dtype
            pair.extend(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_a_step_of_decoding_is_embed_run_unembed(tiny_model, recorded, dtype):
    model = tiny_model(dtype)
    caches = [KVCache(model.config, 2, 30, dtype=dtype) for _ in range(2)]
    for place in range(8):
        tokens = torch.tensor([[place], [2 * place]])
        positions = torch.tensor([[place], [place + 3]])
        with compiling(model):
            early, exit_logits = model.decode(tokens, range(2), positions=positions, cache=caches[0])
            early = early.hidden
            late, logits = model.decode(early, range(2, 4), positions=positions, cache=caches[0])
        hidden = model.run(model.embed(tokens), range(2), positions=positions, cache=caches[1]).hidden
        assert torch.equal(early, hidden) and torch.equal(exit_logits, model.unembed(hidden))
        hidden = model.run(hidden, range(2, 4), positions=positions, cache=caches[1]).hidden
        assert torch.equal(late.hidden, hidden) and torch.equal(logits, model.unembed(hidden))
    assert len(recorded) == 2 and all(recording.complete for recording in recorded)


def test_threads_record_and_repeat_side_by_side(tiny_model):
    pairs = [Pair(tiny_model(torch.float32, seed=seed)) for seed in range(4)]
    failed = []

    def work(pair):
        try:
            for turn in range(30):
                pair.step(1 + turn % 4)
                if turn % 10 == 9:
                    pair.recordings.clear()
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(pair,)) for pair in pairs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
