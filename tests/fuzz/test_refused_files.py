"""Bad input that was not refused well once, each in the least that shows it; and what must go on working."""

import json
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file

from layerskip_moe.analysis.metrics_file import read_metrics
from layerskip_moe.analysis.trace import load_trace
from layerskip_moe.cli import main
from layerskip_moe.constants import user_error
from layerskip_moe.data import load_corpus
from layerskip_moe.data.tokenizer import train_tokenizer
from layerskip_moe.generation import EarlyExit, LayerSkipping, Sampling, SelfSpeculative, SparseSpeculative, generate
from layerskip_moe.generation.policies import DEL, Adaptive, Cascade, DraftVerify, Heuristic
from layerskip_moe.nn import ModelConfig, MoEDecoder
from layerskip_moe.pretrained import load_model, load_tokenizer, quantize, save_model
from layerskip_moe.pretrained.families import read_config

SIZES = dict(vocab_size=11, n_layers=2, d_model=8, n_heads=2, num_experts=2, d_ff=8)


def make_model(**switches):
    return MoEDecoder(ModelConfig(**SIZES, **switches))


@pytest.fixture
def says(refused):
    """says(words, call): it is refused with a sentence that has these words."""

    def check(words, call):
        message = refused(call)
        assert message is not None and re.search(words, message), message

    return check


@pytest.fixture
def folder(tmp_path):
    """A checkpoint without the record that would tell of any change."""
    save_model(make_model(), tmp_path / "model")
    (tmp_path / "model" / "layerskip_moe.json").unlink()
    return tmp_path / "model"


def edit(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(num_hidden_layers=10**12), "num_hidden_layers=10+ is more than any network has"),
        (dict(num_hidden_layers=10**4), "holds .* tensors, but its config tells of 10000 layers"),
        (dict(num_experts=2**19), "tells of 2 layers and 524288 experts"),
        (dict(num_experts=2**40), "num_experts=.* is more than any network has"),
        (dict(hidden_size=2**62), "hidden_size=.* is more than any network has"),
        (dict(rms_norm_eps=10**400), "rms_norm_eps=.* must be a finite number"),
        (dict(model_type="x" * 10**6), "model_type='xxx"),
        (dict(decoder_sparse_step=10**12, num_hidden_layers=10**12), "more than any network has"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_sizes_without_end(folder, says, changes, words):
    edit(folder, **changes)
    says(words, lambda: load_model(folder))


def test_layers_without_end_of_our_own_type(tmp_path, says):
    save_model(make_model(bias_balancing=True), tmp_path)
    (tmp_path / "layerskip_moe.json").unlink()
    contents = json.loads((tmp_path / "config.json").read_text())
    for n_layers, words in ((2**40, "n_layers=.* more than any network"), (2**13, "tells of 8192 layers")):
        edit(tmp_path, config=contents["config"] | {"n_layers": n_layers})
        says(words, lambda: load_model(tmp_path))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite(folder, says, value):
    state = load_file(folder / "model.safetensors")
    state["model.layers.1.mlp.experts.1.up_proj.weight"][3, 2] = value
    save_file(state, folder / "model.safetensors")
    says(r"layers.1.mlp.experts.1.up_proj.weight with numbers that are NaN or infinite", lambda: load_model(folder))


def test_quantised_weights_that_are_not_finite(tmp_path, says):
    save_model(quantize(make_model(), "int8"), tmp_path)
    (tmp_path / "layerskip_moe.json").unlink()
    state = load_file(tmp_path / "model.safetensors")
    name = next(name for name in state if name.endswith(".scale"))
    state[name].view(-1)[0] = float("nan")
    save_file(state, tmp_path / "model.safetensors")
    says("NaN or infinite", lambda: load_model(tmp_path))


def test_weights_that_a_type_cannot_hold(folder, says):
    state = load_file(folder / "model.safetensors")
    state["model.norm.weight"][0] = 1e6
    save_file(state, folder / "model.safetensors")
    says("model.norm.weight .* infinite in float16", lambda: load_model(folder, dtype=torch.float16))
    load_model(folder, dtype=torch.bfloat16)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_link_out_of_the_folder(folder, says, name):
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to("/etc/passwd")
    for load in (load_model, load_tokenizer):
        says(f"{name} is a link that leads out of the folder, to /etc/passwd", lambda load=load: load(folder))


def test_links_in_a_circle(folder, says):
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to("tokenizer.json")
    (folder / "tokenizer.json").symlink_to("config.json")
    says("config.json", lambda: load_model(folder))


def test_links_of_the_hub_s_cache_work(folder, tmp_path, says):
    """models--owner--name/snapshots/<commit>/<file> -> ../../blobs/<digest>, the folder itself by a link too."""
    repo = tmp_path / "hub" / "models--owner--name"
    snapshot = repo / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (repo / "blobs").mkdir()
    for path in folder.iterdir():
        path.rename(repo / "blobs" / f"{path.name}-digest")
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}-digest")
    (tmp_path / "short").symlink_to(snapshot)
    for place in (snapshot, tmp_path / "short"):
        assert load_model(place).config.n_layers == 2
    (snapshot / "config.json").unlink()
    (snapshot / "config.json").symlink_to("../../../../elsewhere.json")
    says("leads out of the folder", lambda: load_model(snapshot))


def test_links_within_the_folder_work(folder):
    (folder / "model.safetensors").rename(folder / "weights")
    (folder / "model.safetensors").symlink_to("weights")
    assert load_model(folder).config.n_layers == 2


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer.model"])
def test_files_of_a_terabyte(folder, says, name):
    """Holes take no disk, but reading them would take the memory."""
    with open(folder / name, "wb") as file:
        file.truncate(2**40)
    says("1099511627776 bytes, far more", lambda: (load_model if name == "config.json" else load_tokenizer)(folder))


def test_json_nested_without_end(tmp_path, says):
    deep = "[" * 10**5
    for name in ("calibration.json", "metrics.jsonl", "text.jsonl"):
        (tmp_path / name).write_text(deep + "\n")
    says("is not JSON", lambda: EarlyExit(tmp_path / "calibration.json"))
    says("Line 1 .* is not a JSON object", lambda: read_metrics(tmp_path / "metrics.jsonl"))
    says("line 1 is not JSON", lambda: load_corpus(tmp_path / "text.jsonl", cache_dir=tmp_path, progress=False))
    header = np.frombuffer(deep.encode(), dtype=np.uint8)
    np.savez(
        tmp_path / "trace.npz",
        header=header,
        tokens=header,
        said=header,
        second=header,
        confidence=header,
        experts=header,
    )
    says("is not a trace", lambda: load_trace(tmp_path / "trace.npz"))


def write_bomb(path, kind):
    """A few kilobytes that say they hold gigabytes, and do: one text in many rows, many that are empty or none, or
    texts of one letter."""
    if kind == "one text in many rows":
        column = pa.DictionaryArray.from_arrays(pa.array([0] * 10**5, pa.int32()), pa.array(["x" * 10**6]))
    elif kind == "nothing in many rows":
        column = pa.nulls(5 * 10**6, pa.string())
    elif kind == "empty texts":
        column = pa.array([""] * 5 * 10**6)
    else:
        column = pa.array(["x" * 2**26] * 5)
    dictionary = kind != "texts of one letter"
    pq.write_table(pa.table({"text": column}), path, compression="zstd", use_dictionary=dictionary, store_schema=False)
    assert path.stat().st_size < 10**6


@pytest.mark.parametrize(
    "kind", ["one text in many rows", "nothing in many rows", "empty texts", "texts of one letter"]
)
def test_a_parquet_file_that_would_fill_the_memory(tmp_path, says, kind):
    write_bomb(tmp_path / "a.parquet", kind)
    says(
        r"a.parquet is of \d+ bytes, but its texts would take more than 268435456",
        lambda: load_corpus(tmp_path / "a.parquet", cache_dir=tmp_path, progress=False),
    )


def test_one_line_of_six_million_letters(tmp_path, refused):
    (tmp_path / "text.txt").write_text("a" * 6 * 10**6)
    corpora = []

    def load():
        how = dict(vocab_size=260, cache_dir=tmp_path / "cache", progress=False)
        corpora.append(load_corpus(tmp_path / "text.txt", **how))

    assert refused(load) is None
    [corpus] = corpora
    ids = [*corpus.train.tolist(), *corpus.validation.tolist()]
    assert sum(len(piece) for piece in map(corpus.tokenizer.id_to_token, ids) if set(piece) == {"a"}) == 6 * 10**6


def test_a_classifier_elsewhere(tmp_path, says):
    settings = {"threshold": 0.5, "confidence": "classifier", "min_layer": 1, "decay": False, "cache": "exact"}
    settings |= {"tau": 4.0, "classifier": {"file": "../../etc/passwd", "sha256": ""}}
    certified = {"weights": "", "max_new_tokens": 1, "temperature": 0.0, "repetition_penalty": 1.0}
    (tmp_path / "calibration.json").write_text(json.dumps({"early_exit": settings, "certified": certified}))
    says("not a file of its own folder", lambda: EarlyExit(tmp_path / "calibration.json"))


@pytest.mark.parametrize(
    "arguments",
    [
        *(dict(temperature=None), dict(temperature="hot"), dict(top_k=2.5), dict(top_p="most"), dict(seed=0.5)),
        *(dict(repetition_penalty=[]), dict(max_new_tokens=1.5), dict(batch_size=1.5), dict(stop_tokens=["a"])),
        *(dict(temperature=10**400), dict(repetition_penalty=10**400), dict(top_k=True), dict(seed=False)),
        *(dict(stop_strings=3), dict(prompts=None), dict(prompts=[[1.5]]), dict(prompts=[2.5]), dict(prompts=[[None]])),
    ],
    ids=str,
)
def test_arguments_of_another_kind(says, arguments):
    how = dict(prompts=[[1]], max_new_tokens=1, temperature=1.0, compile=False) | arguments
    says("prompt" if "prompts" in arguments else next(iter(arguments)), lambda: generate(make_model().eval(), **how))


@pytest.mark.parametrize(
    ("words", "make"),
    [
        ("random=True must be a whole number", lambda: LayerSkipping(random=True)),
        ("draft_top_k=True must be a whole number", lambda: SparseSpeculative(draft_top_k=True)),
        ("tau=10+.*0 must be a number of 0 or more", lambda: EarlyExit(0.5, decay=True, tau=10**400)),
        ("exit_layer='x+.* must be a whole number", lambda: SelfSpeculative("x" * 10**5)),
        ("coupling='x+.* is unknown", lambda: SelfSpeculative(1, coupling="x" * 10**5)),
        ("threshold='a' must be between", lambda: SelfSpeculative(policy=Heuristic(1, threshold="a"))),
        ("length='a' must be a whole", lambda: SelfSpeculative(policy=DraftVerify(1, length="a"))),
        ("length=2147483648 is more than any round has", lambda: SelfSpeculative(policy=DEL(length=2**31))),
        ("length=10+.* is more than any", lambda: SelfSpeculative(policy=Adaptive(length=10**400))),
        ("decay=10+.* must be between", lambda: SelfSpeculative(policy=DEL(decay=10**400))),
        ("decay=None must be between", lambda: SelfSpeculative(policy=DEL(decay=None))),
        ("trials=2.5 must be a whole", lambda: SelfSpeculative(policy=Cascade(1, trials=2.5))),
        (r"no calibration file '\\n\\n'", lambda: EarlyExit("\n\n")),
    ],
    ids=lambda value: value.partition("=")[0] if isinstance(value, str) else "",
)
def test_settings_of_strategies_that_are_none(says, words, make):
    says(words, lambda: generate(make_model().eval(), [[1]], make(), max_new_tokens=1, compile=False))


@pytest.mark.parametrize("texts", [[None], ["x"], "abc", [[1]], {"a": 1}], ids=str)
def test_a_trace_whose_texts_are_no_texts(tmp_path, says, texts):
    header = dict(version=6, config=dict(vocab_size=11), about={}, texts=texts)
    names = ("tokens", "said", "second", "confidence", "margin", "experts", "int8_right", "int8_margin")
    arrays = {name: np.zeros(1) for name in names}
    np.savez(tmp_path / "trace.npz", header=np.frombuffer(json.dumps(header).encode(), dtype=np.uint8), **arrays)
    says("is damaged .it does not say of each text", lambda: load_trace(tmp_path / "trace.npz"))


@pytest.mark.parametrize("number", ["NaN", "Infinity", "null", "1.5", "true", '"x"', "[]", '"1e1"'])
def test_ids_of_tokens_that_are_none(tmp_path, says, number):
    train_tokenizer("bpe", 270, [("train", "The quick brown fox.\n" * 9)], progress=False).save(
        str(tmp_path / "tokenizer.json")
    )
    (tmp_path / "added_tokens.json").write_text(f'{{"<new>": {number}}}')
    says("does not list its tokens as transformers does", lambda: load_tokenizer(tmp_path))


def test_half_a_surrogate_pair(tmp_path, says, capsys, is_a_sentence):
    train_tokenizer("bpe", 270, [("train", "The quick brown fox.\n" * 9)], progress=False).save(
        str(tmp_path / "tokenizer.json")
    )
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "\\ud800"}')
    says("does not list its tokens as transformers does", lambda: load_tokenizer(tmp_path))
    assert main(["generate", "--checkpoint", "model", "--prompt", "a", "--max-new-tokens", "\ud800"]) == 1
    assert is_a_sentence(capsys.readouterr().err.strip())


@pytest.mark.parametrize(("family", "field"), [("mixtral", "num_experts"), ("olmoe", "num_local_experts")])
def test_experts_under_their_other_name_alone(says, family, field):
    says(f"{field}=nan must be a whole number", lambda: read_config({"model_type": family, field: float("nan")}))


def test_a_path_of_thousands_of_letters(says, is_a_sentence):
    long = "x" * 5000
    says(r"x\.\.\.x+ does not exist; give the folder", lambda: load_model(long))
    says(r"no dataset, file or folder 'x+\.\.\.", lambda: load_corpus(long))
    says(r"no file or folder .*x\.\.\.x+", lambda: load_corpus(Path(long)))
    says(r"no tokenizer 'x+\.\.\.", lambda: load_corpus(__file__, tokenizer=long))
    says(r"no calibration file 'x+\.\.\.", lambda: EarlyExit(long))
    with pytest.raises(OSError) as error:
        Path("x" * 5000).read_text()
    assert is_a_sentence(user_error(error.value)) and is_a_sentence(user_error(ValueError("x" * 10**6 + ".")))


def test_the_home_of_nobody(says):
    for load in (load_model, load_corpus, lambda path: load_corpus(__file__, tokenizer=path)):
        says("~nobody at all/file", lambda load=load: load("~nobody at all/file"))


def test_numbers_of_numpy_are_taken():
    assert Sampling(np.float32(0.5), top_k=np.int64(3), seed=np.int64(1)).top_k == 3


def test_a_sentence_on_many_tensors_is_no_flood(folder, says):
    state = load_file(folder / "model.safetensors")
    others = {f"another.{name}": tensor for name, tensor in [*state.items()][::2]}
    transposed = {name: tensor.t().contiguous() for name, tensor in state.items() if tensor.dim() == 2}
    save_file({**transposed, **others}, folder / "model.safetensors")
    says("missing: .* and .* more; not known: .* and .* more; of another shape: ", lambda: load_model(folder))
