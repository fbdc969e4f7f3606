"""Hub datasets, with local files in the hub's place: `datasets` reads and streams them for real."""

import os
import subprocess
import sys
import warnings

import datasets
import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from layerskip_moe.data import load_corpus
from layerskip_moe.data.hub import SHORT_NAMES, hub_source

SMALL = dict(vocab_size=300, progress=False)


class FakeHub:
    """Answers for every name with one folder of parquet files, and records what was asked."""

    def __init__(self, folder):
        self.folder, self.commit, self.down, self.asked = folder, "c" * 40, False, []

    def dataset_info(self, repo, timeout):
        assert timeout <= 20
        if self.down:
            raise ConnectionError("Name or service not known\nand more")
        return huggingface_hub.hf_api.DatasetInfo(id=repo, sha=self.commit)

    def load_dataset(self, repo, config, *, revision, streaming):
        self.asked.append((repo, config, revision, streaming))
        return self._load(str(self.folder), streaming=streaming)

    _load = staticmethod(datasets.load_dataset)

    def fill(self, **splits):
        for path in self.folder.glob("*.parquet"):
            path.unlink()
        for name, columns in splits.items():
            columns = {"text": columns} if isinstance(columns, list) else columns
            pq.write_table(pa.table(columns), self.folder / f"{name}-00000-of-00001.parquet")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    (tmp_path / "served").mkdir()
    hub = FakeHub(tmp_path / "served")
    hub.fill(train=[f"story {i} of the river" for i in range(100)], validation=["held out"] * 3)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda _, repo, timeout: hub.dataset_info(repo, timeout))
    monkeypatch.setattr(datasets, "load_dataset", hub.load_dataset)
    return hub


def read(tmp_path, repo="acme/stories", config=None, fraction=1.0, seed=0):
    found = {"train": [], "validation": []}
    for split, text in hub_source("x", repo, config, fraction, seed, tmp_path / "remembered").read():
        found[split].append(text)
    return found


def test_a_dataset_is_streamed_at_one_commit_and_then_found(hub):
    first = load_corpus("acme/stories", config="small", **SMALL)
    assert set(hub.asked) == {("acme/stories", "small", "c" * 40, True)}
    assert first.tokenizer.decode(first.validation.tolist()) == "held out" * 3
    asked = len(hub.asked)
    again = load_corpus("acme/stories", config="small", **SMALL)
    assert len(hub.asked) == asked and first.train.equal(again.train)
    hub.commit = "d" * 40
    load_corpus("acme/stories", config="small", **SMALL)
    assert hub.asked[-1][2] == "d" * 40


def test_short_names_stand_for_their_datasets(hub):
    for name, (repo, config) in SHORT_NAMES.items():
        assert load_corpus(name, **SMALL).name == name
        assert hub.asked[-1][:2] == (repo, config)


def test_without_a_validation_split_every_twentieth_document_is_held_back(hub, tmp_path):
    texts = [f"text {i}" for i in range(100)]
    hub.fill(train=texts, test=["never read"])
    found = read(tmp_path)
    assert found["validation"] == texts[::20]
    assert found["train"] == [text for text in texts if text not in texts[::20]]


def test_a_sample_of_unstated_length_is_drawn_by_the_seed(hub, tmp_path):
    texts = [f"text {i}" for i in range(1000)]
    hub.fill(train=texts, validation=["held out"])
    some = read(tmp_path, fraction=0.3)
    assert 230 < len(some["train"]) < 370  # 300 expected, 14.5 the standard deviation
    assert set(some["train"]) <= set(texts) and some["validation"] == ["held out"]
    assert read(tmp_path, fraction=0.3) == some != read(tmp_path, fraction=0.3, seed=1)


def test_a_sample_of_stated_length_reads_no_further(hub, tmp_path, monkeypatch):
    read_rows = []

    def rows():
        for i in range(1000):
            read_rows.append(i)
            yield {"text": f"text {i}"}

    stream = datasets.IterableDataset.from_generator(rows)
    stream.info.splits = datasets.SplitDict({"train": datasets.SplitInfo("train", num_examples=1000)})
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **settings: {"train": stream})
    found = read(tmp_path, fraction=0.1)
    assert len(found["train"]) + len(found["validation"]) == 100
    assert max(read_rows) <= 100


def test_wikitext_documents_are_articles(hub, tmp_path):
    lines = [
        "",
        " = River = \n",
        "",
        " It flows . \n",
        " = = Course = = \n",
        " South . \n",
        " = Stone = \n",
        " Hard . \n",
    ]
    hub.fill(train=lines, validation=lines)
    articles = [" = River = \n It flows . \n = = Course = = \n South . \n", " = Stone = \n Hard . \n"]
    assert read(tmp_path, "Salesforce/wikitext") == {"train": articles, "validation": articles}


def test_empty_rows_are_no_documents(hub, tmp_path):
    hub.fill(train=["a", "", None, " \n", "b"], validation=["c"])
    assert read(tmp_path) == {"train": ["a", "b"], "validation": ["c"]}


def test_without_a_network_a_corpus_loaded_before_still_loads(hub):
    first = load_corpus("acme/stories", **SMALL)
    hub.down = True
    with pytest.warns(UserWarning, match="could not be reached .* Using commit cccccccc"):
        assert load_corpus("acme/stories", **SMALL).train.equal(first.train)
    for settings in (dict(vocab_size=280), dict(config="other"), dict(sample_fraction=0.5)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with pytest.raises(ValueError, match="could not be reached"):
                load_corpus("acme/stories", **{**SMALL, **settings})


def test_a_commit_that_was_not_read_to_its_end_is_not_remembered(hub):
    load_corpus("acme/stories", **SMALL)
    hub.commit = "d" * 40
    hub.fill(train={"body": ["a"]})
    with pytest.raises(ValueError, match="needs a column 'text'"):
        load_corpus("acme/stories", **SMALL)
    hub.down = True
    with pytest.warns(UserWarning, match="Using commit cccccccc"):
        load_corpus("acme/stories", **SMALL)


@pytest.mark.parametrize("name", ["acme/stories", "tinystories"])
def test_an_unreachable_hub_gets_one_sentence(hub, name):
    hub.down = True
    with pytest.raises(
        ValueError, match=r"could not be reached .*\(ConnectionError: Name or service .*'python-stdlib'"
    ) as e:
        load_corpus(name, **SMALL)
    assert "\n" not in str(e.value) and hub.asked == []


def test_what_the_hub_does_not_have_is_named(hub, monkeypatch):
    for splits, complaint in [
        (dict(test=["a"]), r"no 'train' split but \['test'\]"),
        (dict(train={"body": ["a"], "id": [1]}), r"needs a column 'text' of strings.*\['body', 'id'\]"),
        (dict(train={"text": [1, 2]}), "needs a column 'text' of strings"),
    ]:
        hub.fill(**splits)
        hub.commit += "0"
        with pytest.raises(ValueError, match=complaint):
            load_corpus("acme/stories", **SMALL)

    def missing(self, repo, timeout):
        kind = huggingface_hub.errors.RepositoryNotFoundError
        raise kind.__new__(kind)  # not kind(...), whose arguments change from release to release

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", missing)
    with pytest.raises(ValueError, match=r"no public dataset 'acme/none'.*check the spelling"):
        load_corpus("acme/none", **SMALL)


def test_a_stream_that_breaks_gets_one_sentence_and_leaves_no_entry(hub, own_cache, monkeypatch):
    def rows():
        yield {"text": "a good row"}
        raise OSError("connection reset\nby peer\nwith a long story")

    stream = datasets.IterableDataset.from_generator(rows)
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **settings: {"train": stream})
    with pytest.raises(ValueError, match=r"'acme/stories' .* \(OSError: connection reset; by peer\)") as caught:
        load_corpus("acme/stories", **SMALL)
    assert "\n" not in str(caught.value)
    assert not [path for path in (own_cache / "corpora").iterdir() if path.is_dir()]


def test_local_names_win_over_hub_names(hub, tmp_path, monkeypatch, prose):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "acme").mkdir()
    (tmp_path / "acme" / "stories").mkdir()
    (tmp_path / "acme" / "stories" / "a.txt").write_text(prose(300))
    assert load_corpus("acme/stories", **SMALL).name == "stories" and hub.asked == []


@pytest.mark.slow
def test_a_refused_connection_is_reported_at_once_and_in_silence(tmp_path):
    code = (
        "from layerskip_moe.data import load_corpus\n"
        "try: load_corpus('tinystories')\n"
        "except ValueError as error: print(error)"
    )
    environment = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=30)
    assert done.stdout.count("\n") == 1 and "could not be reached for it" in done.stdout
    assert done.stderr == ""
