"""The harness over our model gives what its own HFLM gives over the checkpoint that the model saves."""

import copy
import importlib
import json
import logging
import sys
from types import SimpleNamespace

import pytest
import torch

from layerskip_moe.analysis import held_out
from layerskip_moe.data.tokenizer import train_tokenizer
from layerskip_moe.generation import Autoregressive, EarlyExit, LayerSkipping, SelfSpeculative, Speculative, generate
from layerskip_moe.pretrained import quantize, stop_tokens

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed: pip install -e '.[lm-eval]'")
transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate", reason="HFLM needs accelerate")

from lm_eval import simple_evaluate  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from layerskip_moe.analysis.lm_eval import LayerSkipLM  # noqa: E402

logging.getLogger("lm_eval").setLevel(logging.ERROR)
transformers.logging.set_verbosity_error()

TEXTS = [
    "The cat sat on the mat, and the dog sat on the cat.",
    "A cat is no dog; a dog is no mat.",
    "On the mat: one cat, two dogs, and the end of the story.",
    "Seen by the dog, the cat ran. The dog ran too, and neither of them came back to the mat that day, or the next.",
    "",
]
CONTEXTS = ["The cat", "The dog sat on the mat. The cat", "A dog is no cat" * 6, "On the mat:\n", "<|endoftext|>so"]
ENDINGS = [" sat", " sat on the mat.", "x", " a", " and the dog" * 4]
LENGTH = 48


def make_tokenizer(begin=False):
    """Byte-level BPE; with `begin`, one that puts <s> before a text, as Llama's does."""
    from tokenizers import processors

    tokenizer = train_tokenizer("bpe", 290, [("train", text) for text in TEXTS], progress=False)
    if begin:
        tokenizer.add_special_tokens(["<s>"])
        pair = ("<s>", tokenizer.token_to_id("<s>"))
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[pair])
    return tokenizer


def make_reference(model, tokenizer, folder, n_layers=3):
    """HFLM over the checkpoint of a model, of which it reads the first layers and the head."""
    model.save_pretrained(folder, tokenizer=tokenizer)
    return open_reference(folder, n_layers)


def open_reference(folder, n_layers=3):
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, num_hidden_layers=n_layers)
    return HFLM(pretrained=theirs, tokenizer=transformers.AutoTokenizer.from_pretrained(folder), batch_size=3)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """pairs(begin=False, n_layers=3) -> our model, its tokenizer, and HFLM over its first layers."""
    from layerskip_moe.nn import ModelConfig, MoEDecoder

    made = {}

    def pair(begin=False, n_layers=3):
        if (begin, n_layers) not in made:
            tokenizer = make_tokenizer(begin)
            sizes = dict(n_layers=3, d_model=16, n_heads=2, n_kv_heads=1, d_ff=16, num_experts=4, top_k=2, init_std=0.4)
            model = MoEDecoder(ModelConfig(vocab_size=300, max_seq_len=LENGTH, **sizes)).eval()
            reference = make_reference(model, tokenizer, tmp_path_factory.mktemp("checkpoint"), n_layers)
            made[begin, n_layers] = (model, tokenizer, reference)
        return made[begin, n_layers]

    return pair


def asked(*arguments):
    """What the harness hands to a model: only these are looked at."""
    return SimpleNamespace(args=arguments, task_name="test")


SCORED = [asked(context, ending) for context in [*CONTEXTS, ""] for ending in ENDINGS]


@pytest.mark.filterwarnings("ignore:.*lose their beginning")
@pytest.mark.parametrize(("begin", "exit_layer"), [(False, None), (True, None), (False, 1), (True, 2)])
def test_log_likelihoods_equal_hflm(pairs, begin, exit_layer):
    model, tokenizer, reference = pairs(begin, exit_layer or 3)
    expected = reference.loglikelihood(SCORED, True)
    for batch_size in (1, 4, 64):
        ours = LayerSkipLM(model, tokenizer, score_exit_layer=exit_layer, batch_size=batch_size)
        found = ours.loglikelihood(SCORED, True)
        assert [value for value, _ in found] == pytest.approx([value for value, _ in expected], rel=1e-5, abs=1e-4)
        assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert (ours.eot_token_id, ours.prefix_token_id) == (reference.eot_token_id, reference.prefix_token_id)


def test_what_greedy_decoding_says_is_greedy(pairs):
    model, tokenizer, reference = pairs()
    prompts = [tokenizer.encode(context).ids for context in CONTEXTS[:2]]
    said = generate(model, prompts, max_new_tokens=5).tokens
    requests = [(None, prompt, tokens) for prompt, tokens in zip(prompts, said, strict=True)]
    requests += [(None, prompt, [*tokens[:-1], 7]) for prompt, tokens in zip(prompts, said, strict=True)]
    found = LayerSkipLM(model, tokenizer)._loglikelihood_tokens(requests, True)
    assert [greedy for _, greedy in found] == [True, True, False, False]
    for value, (other, greedy) in zip(found, reference._loglikelihood_tokens(requests, True), strict=True):
        assert value == (pytest.approx(other, rel=1e-5), greedy)


@pytest.mark.parametrize(("begin", "exit_layer"), [(False, None), (True, None), (False, 2)])
def test_rolling_log_likelihoods_equal_hflm(pairs, begin, exit_layer):
    model, tokenizer, reference = pairs(begin, exit_layer or 3)
    texts = [asked(text) for text in [*TEXTS, " ".join(TEXTS) * 2]]
    assert len(tokenizer.encode(texts[-1].args[0]).ids) > 3 * LENGTH
    found = LayerSkipLM(model, tokenizer, score_exit_layer=exit_layer).loglikelihood_rolling(texts, True)
    assert found == pytest.approx(reference.loglikelihood_rolling(texts, True), rel=1e-5, abs=1e-4)


@pytest.mark.filterwarnings("ignore:.*lose their beginning")
@pytest.mark.parametrize(("begin", "strategy"), [(False, None), (True, SelfSpeculative(exit_layer=1, draft_length=3))])
def test_generated_text_equals_hflm(pairs, begin, strategy):
    model, tokenizer, reference = pairs(begin)
    kinds = [
        {"until": ["e", "\n"], "max_gen_toks": 20, "do_sample": False, "temperature": 0.0},
        {"until": ["</s>", "<|endoftext|>", "at"], "max_new_tokens": 9},
        {"until": "t", "max_gen_toks": 40, "num_beams": 1, "length_penalty": 0.5},
        {"until": ["s"], "max_gen_toks": 9, "top_k": 0, "top_p": 0.0, "repetition_penalty": 1.3},
    ]
    requests = [asked(context, kind) for kind in kinds for context in CONTEXTS]
    expected = reference.generate_until(requests, True)
    found = LayerSkipLM(model, tokenizer, generation_strategy=strategy, batch_size=2).generate_until(requests, True)
    assert found == expected
    assert len(set(found)) > 4


def test_the_end_of_text_that_a_checkpoint_declares_gives_what_hflm_gives(pairs, tmp_path):
    model, _, _ = pairs()
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens(["<|im_end|>"])
    end = tokenizer.token_to_id("<|im_end|>")
    model = copy.deepcopy(model)
    said = generate(model, [tokenizer.encode(CONTEXTS[0]).ids], max_new_tokens=6).tokens[0]
    assert said[4] not in said[:4]
    with torch.no_grad():  # the end of a turn is said fifth
        model.head.weight[[end, said[4]]] = model.head.weight[[said[4], end]]
    model.save_pretrained(tmp_path, tokenizer=tokenizer)
    for name, field, value in [("generation", "eos_token_id", [end, 0]), ("tokenizer", "eos_token", "<|im_end|>")]:
        path = tmp_path / f"{name}_config.json"  # as the files of a chat model are
        path.write_text(json.dumps({**json.loads(path.read_text()), field: value}))
    reference = open_reference(tmp_path)

    ours = LayerSkipLM(model, tokenizer, stop_tokens=stop_tokens(tmp_path))
    assert ours.eot_token_id == ours.prefix_token_id == reference.eot_token_id == reference.prefix_token_id == end
    texts = [asked(text) for text in TEXTS]
    found, expected = (lm.loglikelihood_rolling(texts, True) for lm in (ours, reference))
    assert found == pytest.approx(expected, rel=1e-5, abs=1e-4)
    assert found != pytest.approx(LayerSkipLM(model, tokenizer).loglikelihood_rolling(texts, True), rel=1e-2)
    requests = [asked(context, {"until": [], "max_gen_toks": 8}) for context in CONTEXTS]
    found = ours.generate_until(requests, True)
    assert found == reference.generate_until(requests, True) and found[0] == tokenizer.decode(said[:4])


def write_tasks(folder, tokenizer):
    """Local tasks of the three kinds, as dictionaries that `simple_evaluate` takes."""
    questions = [
        {"text": text, "context": context, "choices": ENDINGS[:3], "answer": number % 3}
        for number, (text, context) in enumerate(zip(TEXTS[:4], CONTEXTS[:4], strict=True))
    ]
    path = folder / "questions.jsonl"
    path.write_text("".join(json.dumps(question) + "\n" for question in questions), encoding="utf-8")
    shared = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(path)}, "cache_dir": str(folder / "cache")},
        "test_split": "test",
    }
    choice = {
        "task": "which", "output_type": "multiple_choice", "doc_to_text": "{{context}}", "doc_to_choice": "choices",
        "doc_to_target": "answer", "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }  # fmt: skip
    rolling = {
        "task": "likely", "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
    }  # fmt: skip
    written = {
        "task": "said", "output_type": "generate_until", "doc_to_text": "{{context}}", "doc_to_target": "he he",
        "generation_kwargs": {"until": ["t"], "max_gen_toks": 12}, "metric_list": [{"metric": "exact_match"}],
    }  # fmt: skip
    return [{**shared, **task} for task in (choice, rolling, written)]


@pytest.mark.filterwarnings("ignore")  # the harness's own, and texts that are cut
def test_simple_evaluate_equals_hflm(pairs, tmp_path):
    model, tokenizer, reference = pairs()

    def run(lm):
        tasks = write_tasks(tmp_path, tokenizer)
        manager = TaskManager(include_defaults=False)
        return simple_evaluate(lm, tasks=tasks, task_manager=manager, bootstrap_iters=0)

    ours, theirs = run(LayerSkipLM(model, tokenizer)), run(reference)
    assert set(ours["results"]) == {"which", "likely", "said"}
    for task, expected in theirs["results"].items():
        numbers = {name: value for name, value in expected.items() if isinstance(value, float)}
        assert numbers and {name: ours["results"][task][name] for name in numbers} == pytest.approx(numbers, rel=1e-4)
    for mine, other in zip(ours["samples"]["said"], theirs["samples"]["said"], strict=True):
        assert mine["resps"] == other["resps"]
    assert ours["config"]["score_exit_layer"] is None and ours["config"]["model_dtype"] == "torch.float32"
    assert theirs["samples"]["said"][0]["resps"] != [[""]]
    with pytest.raises(NotImplementedError):
        simple_evaluate(
            LayerSkipLM(model, tokenizer), tasks=write_tasks(tmp_path, tokenizer), apply_chat_template=True,
            task_manager=TaskManager(include_defaults=False),
        )  # fmt: skip


def test_a_special_token_among_the_stops_ends_the_text_as_the_end_of_text_does(pairs, tmp_path):
    model, tokenizer, _ = pairs(begin=True)
    model = copy.deepcopy(model)
    prompt = tokenizer.encode(CONTEXTS[0]).ids
    tokens = generate(model, [prompt], max_new_tokens=8).tokens[0]
    begin, end = tokenizer.token_to_id("<s>"), tokenizer.token_to_id("<|endoftext|>")
    assert tokens[2] not in tokens[:2] and tokens[5] not in tokens[:5]
    with torch.no_grad():  # <s> is said third, and the end of text sixth
        model.head.weight[[begin, tokens[2], end, tokens[5]]] = model.head.weight[[tokens[2], begin, tokens[5], end]]
    ours = LayerSkipLM(model, tokenizer)
    text = ours.generate_until([asked(CONTEXTS[0], {"until": ["", "<s>"], "max_gen_toks": 8})], True)
    assert text == [tokenizer.decode(tokens[:2])]
    requests = [asked(context, {"until": [], "max_gen_toks": 8}) for context in CONTEXTS]
    reference = make_reference(model, tokenizer, tmp_path)
    assert ours.generate_until(requests, True) == reference.generate_until(requests, True)


def test_sampled_text_is_generates_and_follows_the_seed_alone(pairs):
    model, tokenizer, _ = pairs()
    kwargs = {"until": ["."], "max_gen_toks": 12, "do_sample": True, "temperature": 1.5, "top_p": 0.9}
    request = asked(CONTEXTS[0], kwargs)

    def texts(**how):
        return LayerSkipLM(model, tokenizer, **how).generate_until([request] * 3, True)

    expected = generate(
        model, [CONTEXTS[0]] * 3, max_new_tokens=12, temperature=1.5, top_p=0.9, seed=5, stop_strings=["."],
        tokenizer=tokenizer,
    ).text  # fmt: skip
    assert texts(seed=5) == texts(seed=5, batch_size=2) == expected and len(set(expected)) == 3
    assert texts(seed=6) != expected
    request.args[1]["top_p"] = 1.0
    every = texts(seed=5)
    request.args[1]["top_k"] = 0  # all, as transformers says it
    assert texts(seed=5) == every
    assert texts(seed=5, generation_strategy=Autoregressive(exit_layer=1)) != expected


def test_scoring_at_an_exit_and_generating_through_a_strategy_are_told_apart(pairs):
    model, tokenizer, reference = pairs()
    said, scored = [asked(CONTEXTS[0], {"max_gen_toks": 4})], [asked("The cat", " sat")]
    full, exit_2 = (LayerSkipLM(model, tokenizer, score_exit_layer=n).loglikelihood(scored, True) for n in (None, 2))
    assert full != exit_2
    with pytest.raises(ValueError, match="score_exit_layer=2 says how text is scored"):
        LayerSkipLM(model, tokenizer, score_exit_layer=2).generate_until(said, True)
    for lossless in (Autoregressive(), SelfSpeculative(exit_layer=2), Speculative(model)):
        ours = LayerSkipLM(model, tokenizer, generation_strategy=lossless)
        assert ours.loglikelihood(scored, True) == full
        assert ours.generate_until(said, True) == reference.generate_until(said, True)
    for lossy in (EarlyExit(0.5), LayerSkipping(every=2), Autoregressive(exit_layer=2)):
        ours = LayerSkipLM(model, tokenizer, generation_strategy=lossy)
        expected = generate(model, CONTEXTS[:1], lossy, max_new_tokens=4, tokenizer=tokenizer)
        assert ours.generate_until(said, True) == expected.text
        for ask in (ours.loglikelihood, ours.loglikelihood_rolling):
            with pytest.raises(ValueError, match=type(lossy).__name__ + ".*not clear whose"):
                ask(scored, True)
        both = LayerSkipLM(model, tokenizer, generation_strategy=lossy, score_exit_layer=2)
        assert both.loglikelihood(scored, True) == exit_2
    assert both.get_model_info()["score_exit_layer"] == 2


def test_results_tell_the_draft_model_and_how_each_model_is_quantised(pairs):
    model, tokenizer, _ = pairs()
    draft = quantize(model, "int8")
    facts = {"num_parameters": model.parameter_counts()[0], "dtype": "torch.float32", "quantization": None}
    for asked_of, quantization in [(model, None), (draft, "int8")]:
        strategy = SelfSpeculative(exit_layer=2, draft_model=draft)
        info = LayerSkipLM(asked_of, tokenizer, generation_strategy=strategy).get_model_info()
        assert json.loads(json.dumps(info)) == {
            "model_num_parameters": facts["num_parameters"],
            "model_dtype": "torch.float32",
            "model_quantization": quantization,
            "score_exit_layer": None,
            "generation_strategy": {
                "name": "SelfSpeculative", "exit_layer": 2, "draft_length": 4, "policy": None, "coupling": "shared",
                "draft_model": {**facts, "quantization": "int8"}, "int8_drafts": None,
            },
        }  # fmt: skip


def test_answers_of_one_token_share_a_pass_and_logits_come_in_chunks(pairs, monkeypatch):
    model, tokenizer, _ = pairs()
    ours, rows = LayerSkipLM(model, tokenizer, batch_size=2), []
    run = model.run
    monkeypatch.setattr(
        model, "run", lambda hidden, *args, **how: rows.append(len(hidden)) or run(hidden, *args, **how)
    )
    requests = [(None, [1, 2, number], [last]) for number in range(3) for last in range(4)]
    expected = ours._loglikelihood_tokens(requests, True)
    assert rows == [2, 1] and len({value for value, _ in expected}) == 12
    monkeypatch.setattr(held_out, "LIVE_LOGITS", 1)
    assert ours._loglikelihood_tokens(requests, True) == [(pytest.approx(value), best) for value, best in expected]


def test_answers_are_kept_for_the_harnesss_cache(pairs):
    model, tokenizer, _ = pairs()
    ours, kept = LayerSkipLM(model, tokenizer), {}
    ours.cache_hook = SimpleNamespace(
        add_partial=lambda kind, request, answer: kept.update({(kind, str(request)): answer})
    )
    scored = ours.loglikelihood(SCORED[:3], True)
    (whole,) = ours.loglikelihood_rolling([asked(TEXTS[0])], True)
    (text,) = ours.generate_until([asked("The", {"max_gen_toks": 3})], True)
    assert kept == {
        **{("loglikelihood", str(request.args)): answer for request, answer in zip(SCORED, scored, strict=False)},
        ("loglikelihood_rolling", str((TEXTS[0],))): whole,
        ("generate_until", str(("The", {"max_gen_toks": 3}))): text,
    }


def test_texts_too_long_are_told_and_lose_their_beginning(pairs):
    model, tokenizer, _ = pairs()
    ours = LayerSkipLM(model, tokenizer, max_length=10)
    with pytest.warns(UserWarning, match="1 of 2 texts are longer than 10 tokens"):
        (long, _), short = ours._loglikelihood_tokens([(None, [1, 2, *range(9)], [3, 4]), (None, [5], [6])], True)
    assert long == pytest.approx(ours._loglikelihood_tokens([(None, list(range(9)), [3, 4])], True)[0][0])
    assert short[0] == pytest.approx(ours._loglikelihood_tokens([(None, [5], [6])], True)[0][0])
    with pytest.warns(UserWarning, match="1 of 1 texts are longer than 4 tokens"):
        ours.generate_until([asked(TEXTS[0], {"max_gen_toks": 6})], True)


@pytest.mark.parametrize(
    ("kwargs", "said"),
    [
        ({"max_gen_toks": LENGTH}, "leaves no room for a prompt in max_length=48"),
        ({}, "max_gen_toks=256 leaves no room"),
        ({"max_gen_toks": 4, "num_beams": 2, "length_penalty": 1.0}, "num_beams, length_penalty, which cannot be"),
        ({"max_gen_toks": 4, "min_p": 0.1}, "min_p, which cannot be honoured"),
        ({"max_gen_toks": 4, "do_sample": True}, "needs a temperature above 0"),
    ],
)
def test_generation_settings_that_cannot_be_honoured_are_refused(pairs, kwargs, said):
    model, tokenizer, _ = pairs()
    with pytest.raises(ValueError, match=said):
        LayerSkipLM(model, tokenizer).generate_until([asked("The cat", kwargs)], True)


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"score_exit_layer": 4}, "exit_layer=4 must be between 1 and n_layers=3"),
        ({"generation_strategy": "greedy"}, "is not a strategy"),
        ({"generation_strategy": SelfSpeculative(exit_layer=9)}, "exit_layer=9"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"max_length": 49}, "max_length=49 must be between 1 and the model's max_seq_len=48"),
        ({"stop_tokens": []}, "no end of text"),
    ],
)
def test_bad_settings_are_refused(pairs, how, said):
    model, tokenizer, _ = pairs()
    with pytest.raises(ValueError, match=said):
        LayerSkipLM(model, tokenizer, **how)


def test_texts_that_cannot_be_scored_are_refused(pairs):
    model, tokenizer, _ = pairs()
    ours = LayerSkipLM(model, tokenizer)
    with pytest.raises(ValueError, match=r"\('The', ''\) has 0 tokens"):
        ours.loglikelihood([asked("The", "")], True)
    with pytest.raises(ValueError, match="between 1 and max_length=48"):
        ours.loglikelihood([asked("The", "x" * 60)], True)
    larger = make_tokenizer()
    larger.add_tokens([f"more{number}" for number in range(20)])
    with pytest.raises(ValueError, match="beyond the model's vocabulary of 300"):
        LayerSkipLM(model, larger).loglikelihood([asked("The", "more19")], True)


def test_without_the_harness_one_sentence_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    monkeypatch.delitem(sys.modules, "layerskip_moe.analysis.lm_eval")
    with pytest.raises(ModuleNotFoundError, match=r"install it by: pip install -e '\.\[lm-eval\]'"):
        importlib.import_module("layerskip_moe.analysis.lm_eval")
