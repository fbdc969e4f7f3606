"""`layerskip-moe evaluate --quantize` and `generate --draft-quantization`: quantised copies of a saved model."""

import json
import math

import pytest

from layerskip_moe import MoEDecoder
from layerskip_moe.analysis import evaluate_exits
from layerskip_moe.data import load_corpus
from layerskip_moe.pretrained import load_tokenizer
from layerskip_moe.pretrained.quantize import quantize


@pytest.fixture
def evaluate(shell, text, checkpoint):
    """evaluate(...) -> stdout of the command on the tiny model."""

    def run(*arguments):
        code, out, err = shell("evaluate", "--checkpoint", checkpoint, "--dataset", text, "--seq-len", 16, *arguments)
        assert code == 0, err
        return out

    return run


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_json_has_the_quantised_model_s_perplexity_and_its_change(evaluate, checkpoint, text, kind):
    told = json.loads(evaluate("--quantize", kind, "--json"))
    model = MoEDecoder.from_pretrained(checkpoint)
    tokens = load_corpus(str(text), tokenizer=load_tokenizer(checkpoint)).validation
    plain, quantized = (
        evaluate_exits(each, tokens, seq_len=16, batch_size=8, max_windows=200, progress=False)
        for each in (model, quantize(model, kind))
    )
    assert told["perplexity"] == pytest.approx(plain.perplexity)
    assert told["quantized"]["quantization"] == kind
    assert told["quantized"]["perplexity"] == pytest.approx(quantized.perplexity)
    expected = [after / before - 1 for before, after in zip(plain.perplexity, quantized.perplexity, strict=True)]
    assert told["quantized"]["perplexity_change"] == pytest.approx(expected, rel=1e-3, abs=1e-7)
    assert 0 < max(map(abs, expected)) < 0.5 and len(expected) == 5
    assert told | {"quantized": None} == json.loads(evaluate("--json")) | {"quantized": None}


def test_the_table_has_both_at_every_exit(evaluate):
    told = json.loads(evaluate("--quantize", "int8", "--json"))
    header, *rows, last = evaluate("--quantize", "int8").splitlines()
    assert header.split() == ["exit", "layer", "perplexity", "agreement", "in", "int8", "change"]
    assert [row.split()[0] for row in rows] == ["1", "2", "3", "4", "5"] and last.startswith("over ")
    for row, before, after in zip(rows, told["perplexity"], told["quantized"]["perplexity"], strict=True):
        _, perplexity, _, quantized, change = row.split()
        assert (perplexity, quantized) == (f"{before:.2f}", f"{after:.2f}")
        assert change[0] in "+-" and math.isclose(float(change[:-1]), 100 * (after / before - 1), abs_tol=0.006)
    plain = evaluate().splitlines()
    assert plain == [line[: len(plain[0])] for line in (header, *rows)] + [last]


def test_a_word_that_is_none(shell, checkpoint):
    code, out, err = shell("evaluate", "--checkpoint", checkpoint, "--quantize", "int2")
    assert (code, out) == (1, "")
    assert "--quantize int2 does not fit: it is 'int8' or 'int4' or None." in err


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_a_quantised_copy_drafts_and_the_text_stays(shell, checkpoint, kind):
    given = ["generate", "--checkpoint", checkpoint, "--prompt", "The quick", "--max-new-tokens", 12, "--json"]
    plain = json.loads(shell(*given)[1])
    code, out, err = shell(*given, "--strategy", "self-speculative", "--exit-layer", 3, "--draft-quantization", kind)
    assert code == 0, err
    drafted = json.loads(out)
    assert drafted["tokens"] == plain["tokens"] and drafted["stats"]["drafted"] > 0
    assert drafted["strategy"]["draft_quantization"] == kind and "draft_model" not in drafted["strategy"]


def test_the_early_layers_of_another_checkpoint_draft(shell, checkpoint):
    given = ["generate", "--checkpoint", checkpoint, "--prompt", "The quick", "--max-new-tokens", 12, "--json"]
    plain = json.loads(shell(*given)[1])
    code, out, err = shell(*given, "--strategy=speculative", "--draft-checkpoint", checkpoint, "--exit-layer", 2)
    assert code == 0, err
    assert json.loads(out)["tokens"] == plain["tokens"] and json.loads(out)["strategy"]["exit_layer"] == 2
