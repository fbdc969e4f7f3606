"""Steps as CUDA graphs: what can be told without a GPU, of the very step that is captured, and then on one.

Without one, a step runs on the CPU as it would on a GPU: PyTorch's own operations over a fixed number of slots.
"""

import copy
import warnings

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

from layerskip_moe.nn import KVCache, decoder, experts, few_rows, graphs, steps
from layerskip_moe.nn.attention import locate, locate_within
from layerskip_moe.nn.block import Block
from layerskip_moe.nn.compiling import compiling
from layerskip_moe.nn.experts import run_experts_gathered, run_experts_sorted
from layerskip_moe.nn.products import can_group
from layerskip_moe.nn.router import Routing

FAMILIES = {
    "Mixtral": dict(qk_norm=None),
    "Qwen3-MoE": dict(qk_norm="head", moe_layers="every other", head_dim=6, d_ff=7),
    "OLMoE": dict(qk_norm="full", clip_qkv=0.7, normalize_top_k=False, n_kv_heads=4),
    "Qwen2-MoE": dict(qk_norm=None, qkv_bias=True, shared_expert_d_ff=9, shared_expert_gate=True),
    "sliding window": dict(sliding_window=4, sliding_layers=(0, 2)),
    "dense": dict(num_experts=0, tie_embeddings=True, output_bias=True, mlp_bias=True),
    "bias for balance": dict(bias_balancing=True, top_k=5),
    "routers that look back": dict(router_average=0.6, router_hold=3, moe_layers=(0, 3)),
}
COUNTS = (4, 1, 3, 1, 1, 3, 1, 3, 3, 3, 3)  # tokens run together
WAITING = {"_local_scalar_dense", "nonzero", "item", "unique2", "_unique2", "masked_select", "equal", "is_nonzero"}


class NeverWaits(TorchDispatchMode):
    """Fails where a GPU would be waited for: a number is read, or a size depends on numbers."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__.split(".")[0]
        assert name not in WAITING, f"{func} waits"
        assert name != "index" or not any(i is not None and i.dtype == torch.bool for i in args[1]), (
            "a size is waited for"
        )
        return func(*args, **(kwargs or {}))


class Stand:
    """A graph without a GPU: repeated from the very inputs, and outputs, that the captured one would have."""

    made = 0

    def __init__(self, run, inputs, *, pool=None, held=()):
        type(self).made += 1
        self._run, self._inputs = run, [tensor.clone() for tensor in inputs]
        self.complete, self.pool, self._held = True, (0, 1), held
        self._first = self._made()

    def _made(self):
        with NeverWaits():
            return self._run(self._inputs)

    def take_first(self):
        return self._first

    def __call__(self, inputs):
        for own, new in zip(self._inputs, inputs, strict=True):
            assert own.shape == new.shape and own.dtype == new.dtype
            own.copy_(new)
        return [output.clone() for output in self._made()]


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """From now on, what is compiled takes the way of a GPU; a graph for every 8 slots."""
    stand = type("Counted", (Stand,), {})
    monkeypatch.setattr(steps, "Graph", stand)
    monkeypatch.setattr(steps, "SLOTS", 8)
    monkeypatch.setattr(few_rows, "serves", lambda device: False)
    monkeypatch.setattr(decoder, "can_repeat", lambda count, dtype, device: count <= few_rows.MOST_ROWS)
    monkeypatch.setattr(experts, "gathers", lambda x, gate_up: len(x) <= few_rows.MOST_ROWS)
    return stand


def runs(model, cache, compiled):
    """COUNTS tokens of two rows at a time, by two layers, by the rest, and by all: all states and logits."""
    generator, outputs = torch.Generator().manual_seed(0), []
    with torch.no_grad(), compiling(model, compiled):
        for count in COUNTS:
            tokens = torch.randint(23, (2, count), generator=generator).to(model.device)
            positions = cache.lengths[:, None] + torch.arange(count, device=model.device)
            first, exit_logits = model.decode(tokens, range(2), positions=positions, cache=cache)
            early = first.hidden
            last, logits = model.decode(early, range(2, 4), positions=positions, cache=cache)
            late = last.hidden
            ran = model.run(model.embed(tokens), range(4), positions=positions, cache=cache, collect=(1,))
            outputs += [early, exit_logits, late, logits, ran.hidden, ran.collected[1]]
            cache.extend(torch.tensor([count, max(count - 1, 1)], device=model.device))
    return outputs


@pytest.mark.parametrize("family", FAMILIES)
def test_a_fixed_number_of_slots_gives_what_the_text_s_own_does(tiny_model, as_on_a_gpu, family):
    model = tiny_model(torch.float64, **FAMILIES[family])
    expected, found = (runs(model, KVCache(model.config, 2, 29, dtype=model.dtype), on) for on in (False, True))
    torch.testing.assert_close(found, expected)
    ends = [sum(COUNTS[: place + 1]) for place in range(len(COUNTS))]
    sizes = {(count, min(-(-end // 8) * 8, 29)) for count, end in zip(COUNTS, ends, strict=True)}
    assert len(sizes) == 7 and as_on_a_gpu.made == 3 * len(sizes)  # three kinds of step


def test_rows_that_are_few_or_leave_or_are_run_apart(tiny_model, as_on_a_gpu):
    model = tiny_model(torch.float64)
    caches = [KVCache(model.config, 3, 20, dtype=model.dtype) for _ in range(2)]
    generator = torch.Generator().manual_seed(0)

    def both(rows, count, **how):
        outputs, hidden = [], torch.randn(len(rows), count, 16, dtype=model.dtype, generator=generator)
        for cache, on in zip(caches, (True, False), strict=True):
            part = cache if len(rows) == len(cache.rows) else cache.subset(torch.tensor(rows))
            positions = part.lengths[:, None] + torch.arange(count)
            with torch.no_grad(), compiling(model, on):
                outputs.append(model.run(hidden, range(4), positions=positions, cache=part, **how).hidden)
        torch.testing.assert_close(*outputs)

    for _ in range(2):
        both([0, 1, 2], 3)
        both([0, 2], 2)
        both([1, 0], 2)
        both([1], 1, top_k=1)
        both([0, 1, 2], 1, top_k=1)
        for cache in caches:
            cache.extend(torch.tensor([1, 3, 2]))
    made = as_on_a_gpu.made
    assert made == len(caches[0].recordings) == 4 and not caches[1].recordings
    for cache in caches:
        cache.select(torch.tensor([2, 0]))
    both([0, 1], 2)
    assert as_on_a_gpu.made == made


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_drafts_one_after_another_are_one_step(tiny_model, as_on_a_gpu, temperature):
    model = tiny_model(torch.float64)
    generator, found = torch.Generator(), []
    for compiled in (False, True):
        cache = KVCache(model.config, 2, 29, dtype=model.dtype)
        generator.manual_seed(0)
        with torch.no_grad(), compiling(model, compiled):
            for _ in range(4):
                newest = torch.randint(23, (2, 1), generator=generator)
                noise = temperature * torch.randn(2, 3, 23, generator=generator).double() if temperature else None
                positions = cache.lengths[:, None] + torch.arange(4)
                how = dict(positions=positions, cache=cache, noise=noise)
                found.append(model.draft(newest, range(2), **how))
                cache.extend(torch.tensor([3, 2]))
    for (drafts, states), expected in zip(found[4:], found[:4], strict=True):
        assert torch.equal(drafts, expected[0])
        torch.testing.assert_close(states, expected[1])
    assert as_on_a_gpu.made == 2  # of 8 slots and of 16


def test_what_is_not_few_or_is_masked_is_not_captured(tiny_model, as_on_a_gpu):
    model = tiny_model(torch.float64)
    cache = KVCache(model.config, 5, 20, dtype=model.dtype)
    places, mask = torch.arange(13).expand(5, 13), torch.tensor([True, False, True, True, True])
    with torch.no_grad(), compiling(model):
        model.run(torch.randn(5, 13, 16).double(), range(4), positions=places, cache=cache)
        model.run(torch.randn(5, 2, 16).double(), range(4), positions=places[:, :2], cache=cache, expert_mask=mask)
    assert as_on_a_gpu.made == 0


@torch.no_grad()
def test_positions_past_the_end_are_refused_when_repeated_too(tiny_model, as_on_a_gpu):
    model = tiny_model(torch.float64)
    cache, tokens = KVCache(model.config, 2, 20, dtype=model.dtype), torch.tensor([[1], [2]])
    with compiling(model):
        model.decode(tokens, range(4), positions=torch.tensor([[18], [19]]), cache=cache)
        with pytest.raises(ValueError, match="too many"):
            model.decode(tokens, range(4), positions=torch.tensor([[0], [20]]), cache=cache)


@pytest.mark.parametrize(
    ("length", "capacity", "slots"), [(1, 999, 256), (256, 999, 256), (257, 999, 512), (700, 710, 710), (3, 20, 20)]
)
def test_slots_read(length, capacity, slots):
    assert steps.slots_read(length, capacity) == slots


@torch.no_grad()
def test_what_can_be_captured(monkeypatch):
    gpu = torch.device("cuda")
    assert all(steps.can_repeat(64, dtype, gpu) for dtype in (torch.float32, torch.bfloat16, torch.float16))
    assert not steps.can_repeat(65, torch.float32, gpu) and not steps.can_repeat(1, torch.float64, gpu)
    assert not steps.can_repeat(1, torch.float32, torch.device("mps"))
    with torch.enable_grad():
        assert not steps.can_repeat(1, torch.float32, gpu)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device_type: device_type == "cuda")
    assert not steps.can_repeat(1, torch.float32, gpu)


@pytest.mark.parametrize("window", [None, 4])
def test_places_within_more_slots_read_the_same_ones(tiny_model, window):
    config = tiny_model(sliding_window=window).config
    cache = KVCache(config, 2, 30)
    positions = torch.tensor([[5, 6, 7], [0, 1, 2]])
    exact = locate(positions, config, cache, length=8)
    wide = locate_within(positions, cache.rows_of(positions), config, 24, 30)
    for name in ("mask", "windowed"):
        mask = getattr(wide, name)
        assert torch.equal(mask[..., :8], getattr(exact, name)) and not mask[..., 8:].any()
    assert wide.length == 24 and all(map(torch.equal, exact[:4], wide[:4]))
    fresh = locate(positions[1:], config, cache.subset(torch.tensor([1])), length=3)  # these see only themselves
    assert fresh.fresh and fresh.mask is None and not wide.fresh


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 0.05)]
)
@pytest.mark.parametrize("tokens", [1, 5])
def test_gathered_experts_are_the_sorted_ones(tokens, dtype, tolerance):
    generator = torch.Generator().manual_seed(tokens)

    def random(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    weights, chosen = torch.randn(tokens, 4, generator=generator).softmax(-1).topk(3)
    arguments = random(tokens, 8), Routing(weights, chosen, weights), random(4, 24, 8), random(4, 8, 12)
    with NeverWaits():
        found = run_experts_gathered(arguments[0], Routing(torch.zeros(tokens, 4), chosen, weights), *arguments[2:])
    expected = run_experts_sorted(arguments[0], Routing(torch.zeros(tokens, 4), chosen, weights), *arguments[2:])
    torch.testing.assert_close(found, expected, atol=tolerance * 10, rtol=tolerance)


@pytest.mark.parametrize(("capability", "has"), [((8, 0), False), ((9, 0), True), ((10, 0), True), ((12, 0), False)])
def test_which_gpus_have_a_grouped_product(monkeypatch, capability, has):
    class There:
        device, dtype, shape = torch.device("cuda"), torch.bfloat16, (16, 16)

    class Weights(There):
        shape = (4, 32, 16)

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert can_group(There, Weights) is has


@pytest.mark.parametrize("switches", [{}, dict(router_average=0.6, router_hold=3)], ids=str)
def test_a_block_is_not_compiled_again_as_the_text_grows(tiny_model, monkeypatch, switches):
    torch._dynamo.reset()
    monkeypatch.setattr(experts, "gathers", lambda x, gate_up: len(x) <= few_rows.MOST_ROWS)
    counter = CompileCounterWithBackend("eager")
    forward = torch.compile(Block.forward, backend=counter, dynamic=True, fullgraph=True)
    model = tiny_model(torch.float64, **switches)
    cache, frames = KVCache(model.config, 1, 50, dtype=model.dtype), []
    with torch.no_grad():
        for slots in (8, 16, 24, 50):
            for count in (1, 2, 5):
                hidden = torch.randn(1, count, 16).double()
                positions = torch.arange(slots - count, slots)[None]
                places = locate_within(positions, cache.rows_of(positions), model.config, slots, 50)
                for layer, block in enumerate(model.blocks):
                    how = dict(memory=cache.memory(layer), router_memory=cache.router_memory(layer))
                    expected = block(hidden, places, **how)[0]
                    torch.testing.assert_close(forward(block, hidden, places, **how)[0], expected)
            frames.append(counter.frame_count)
    assert frames == [2, 2, 2, 4]  # for one state and for several; the compiler tells rows that are read whole


def refusing(reason):
    def capture(run, inputs, pool):
        raise RuntimeError(reason)

    return capture


def test_a_step_that_cannot_be_captured_is_made_as_always_and_that_is_said_once(tiny_model, as_on_a_gpu, monkeypatch):
    model = tiny_model(torch.float64)
    expected = runs(model, KVCache(model.config, 2, 29, dtype=model.dtype), False)
    monkeypatch.setattr(steps, "Graph", graphs.Graph)
    monkeypatch.setattr(graphs, "_capture", refusing("an operation waits for the GPU\nwith some lines of advice"))
    graphs._say_once.cache_clear()
    cache = KVCache(model.config, 2, 29, dtype=model.dtype)
    with pytest.warns(UserWarning, match="as a CUDA graph: an operation waits for the GPU$") as told:
        found = runs(model, cache, True)
    torch.testing.assert_close(found, expected)
    assert len(told) == 1 and not any(graph.complete for graph in cache.recordings.values())


def test_a_step_that_fails_by_itself_is_not_a_capture_that_failed(tiny_model, as_on_a_gpu, monkeypatch):
    monkeypatch.setattr(steps, "Graph", graphs.Graph)
    model = tiny_model(torch.float64)
    model.blocks[1].register_forward_pre_hook(lambda *_: 1 / 0)
    cache = KVCache(model.config, 2, 29, dtype=model.dtype)
    with pytest.raises(ZeroDivisionError):
        runs(model, cache, True)
    assert not cache.recordings


def test_a_run_that_waits_is_found_before_it_is_captured(monkeypatch):
    modes = ["default"]
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: modes[-1])
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)

    def waits(inputs):
        assert modes[-1] == "warn"
        warnings.warn("called a synchronizing CUDA operation", stacklevel=1)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(RuntimeError, match="waits"):
            graphs._check_never_waits(waits, [])
        graphs._check_never_waits(lambda inputs: warnings.warn("Synchronization debug mode is", stacklevel=1), [])
        with pytest.raises(ZeroDivisionError):
            graphs._check_never_waits(lambda inputs: 1 / 0, [])
    assert modes[-1] == "default"


def test_weights_that_moved_are_another_graph(tiny_model, as_on_a_gpu):
    model = tiny_model(torch.float64)
    cache, token = KVCache(model.config, 1, 20, dtype=model.dtype), torch.tensor([[1]])

    def graphs_made():
        with torch.no_grad(), compiling(model):
            model.decode(token, range(4), positions=token, cache=cache)
        return as_on_a_gpu.made

    assert graphs_made() == graphs_made() == 1
    for made in range(2, 12):  # often: what was let go would lie at an old address sooner or later
        model.float().double()  # other memory, of the same type
        assert graphs_made() == made


gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


@gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_on_a_gpu_captured_steps_are_the_eager_ones(tiny_model, monkeypatch, family, dtype):
    monkeypatch.setattr(steps, "SLOTS", 8)
    model = tiny_model(dtype, **FAMILIES[family]).cuda()
    caches = [KVCache(model.config, 2, 29, dtype=dtype, device="cuda") for _ in range(2)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = runs(model, caches[0], True)
    expected = runs(model, caches[1], False)
    if dtype == torch.float32:  # in the others a rounded state may choose another expert
        torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)
    assert len(caches[0].recordings) == 21 and all(graph.complete for graph in caches[0].recordings.values())
    assert len({graph.pool for graph in caches[0].recordings.values()}) == 1


@gpu
@torch.no_grad()
def test_on_a_gpu_a_step_that_waits_is_made_as_always(tiny_model):
    model = tiny_model(torch.float32).cuda()
    waiting = copy.deepcopy(model)
    waiting.unembed = lambda hidden: (hidden.sum().item(), model.unembed(hidden))[1]
    graphs._say_once.cache_clear()
    caches = [KVCache(model.config, 1, 20, device="cuda") for _ in range(2)]
    with compiling(model), compiling(waiting), pytest.warns(UserWarning, match="waits for the GPU"):
        for place in range(3):
            where = torch.tensor([[place]], device="cuda")
            found = waiting.decode(where, range(4), positions=where, cache=caches[0])
            expected = model.decode(where, range(4), positions=where, cache=caches[1])
            torch.testing.assert_close((found[0].hidden, found[1]), (expected[0].hidden, expected[1]))
    assert [[graph.complete for graph in cache.recordings.values()] for cache in caches] == [[False], [True]]
