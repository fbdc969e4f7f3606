"""The Hugging Face hub, with its answers and its cache made here: what is asked of it, and what its refusals become."""

import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from huggingface_hub import errors
from huggingface_hub.utils import filter_repo_objects
from tokenizers import Tokenizer
from tokenizers.models import BPE

from layerskip_moe.nn import ModelConfig, MoEDecoder
from layerskip_moe.pretrained import load_tokenizer, read_recipe
from layerskip_moe.pretrained.hub import local_folder


def make_model():
    return MoEDecoder(ModelConfig(vocab_size=11, n_layers=2, d_model=8, n_heads=2, num_experts=3, d_ff=8))


def make_tokenizer():
    return Tokenizer(BPE(vocab={"a": 0, "b": 1}, merges=[]))


def refused(call, *words):
    with pytest.raises(ValueError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message and message.endswith((".", "...")), message
    for word in words:
        assert word in message, message


# Bringing


@pytest.fixture
def downloads(tmp_path, monkeypatch):
    """A hub that gives one checkpoint under every name, each time to an empty cache; the questions it was asked."""
    make_model().save_pretrained(tmp_path / "hub", tokenizer=make_tokenizer(), recipe={"steps": 3})
    asked = []

    def snapshot_download(repo_id, *, allow_patterns, **settings):
        asked.append({"repo_id": repo_id, "allow_patterns": allow_patterns, **settings})
        cached = tmp_path / f"cached-{len(asked)}"
        cached.mkdir()
        for name in filter_repo_objects(os.listdir(tmp_path / "hub"), allow_patterns=allow_patterns):
            shutil.copyfile(tmp_path / "hub" / name, cached / name)
        return str(cached)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return asked


def test_an_id_is_looked_up_on_the_hub(downloads):
    model = MoEDecoder.from_pretrained("acme/tiny", revision="v2", token="secret", dtype=torch.bfloat16)
    assert all(torch.equal(a.bfloat16(), b) for a, b in zip(make_model().parameters(), model.parameters(), strict=True))
    asked = dict(repo_id="acme/tiny", revision="v2", token="secret")
    assert downloads == [asked | {"allow_patterns": ["*.json", "model*.safetensors", "model.safetensors.index.json"]}]
    assert load_tokenizer("acme/tiny", revision="v2", token="secret").get_vocab() == {"a": 0, "b": 1}
    assert read_recipe("acme/tiny", revision="v2", token="secret") == {"steps": 3}
    for request in downloads[1:]:
        assert request.items() >= asked.items() and not any("safetensors" in name for name in request["allow_patterns"])


def test_files_that_are_not_brought_are_not_asked_for(downloads, tmp_path):
    make_tokenizer().save(str(tmp_path / "tokenizer.json"))
    for name in ("chat_template.jinja", "tokenizer.model"):
        (tmp_path / name).write_text("as it came")
    make_model().save_pretrained(tmp_path / "hub", tokenizer=tmp_path)
    assert {"chat_template.jinja", "tokenizer.model"} < set(os.listdir(tmp_path / "hub"))
    assert MoEDecoder.from_pretrained("acme/tiny").config == make_model().config
    assert load_tokenizer("acme/tiny").get_vocab() == {"a": 0, "b": 1}


def test_weights_that_are_only_pickles_on_the_hub(downloads, tmp_path):
    (tmp_path / "hub" / "model.safetensors").rename(tmp_path / "hub" / "pytorch_model.bin")
    words = ["'acme/tiny' has no model*.safetensors on the", "check the connection", "weights_only=True"]
    refused(lambda: MoEDecoder.from_pretrained("acme/tiny"), *words)
    assert load_tokenizer("acme/tiny").get_vocab() == {"a": 0, "b": 1}  # which needs no weights


def test_a_folder_is_never_looked_up(downloads, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "acme" / "tiny").mkdir(parents=True)
    for name in ("acme/tiny", "./acme/tiny", "~/acme/tiny", str(tmp_path / "acme" / "tiny"), tmp_path / "acme/tiny"):
        assert os.path.samefile(local_folder(name), tmp_path / "acme" / "tiny")
    for name in ("./nowhere", "~/nowhere", "../acme/nowhere", "/nowhere", "nowhere", "runs/main/model", "runs\\model"):
        refused(lambda name=name: local_folder(name), "does not exist", "give the folder")
    refused(lambda: local_folder(tmp_path / "owner" / "name"), "does not exist")
    assert downloads == []


def test_a_revision_of_a_folder_is_refused(downloads, tmp_path):
    refused(lambda: local_folder(tmp_path, revision="v2"), "revision='v2' is for checkpoints on the hub")


def answer(kind, text="first line.\nsecond line"):
    return kind(text, response=SimpleNamespace(headers={}, request=None, status_code=404))


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (
            answer(errors.RepositoryNotFoundError),
            ["No folder here is called 'acme/tiny'", "no public model", "private"],
        ),
        (answer(errors.GatedRepoError), ["accept its terms", "`hf auth login`"]),
        (answer(errors.RevisionNotFoundError), ["has no revision 'v9'", "branches, tags or commits"]),
        (errors.LocalEntryNotFoundError("Got: ConnectError\nand more"), ["Got: ConnectError", "nor is it whole in"]),
        (answer(errors.HfHubHTTPError), ["HfHubHTTPError: first line)", "check the spelling and the connection"]),
        (OSError(28, "No space left on device"), ["No space left on device"]),
    ],
    ids=lambda value: type(value).__name__,
)
def test_every_refusal_is_one_sentence(monkeypatch, error, words):
    def fails(*args, **settings):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fails)
    refused(lambda: MoEDecoder.from_pretrained("acme/tiny", revision="v9"), *words)


def test_an_impossible_name_is_refused(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    refused(
        lambda: local_folder("acme/not a name!"),
        "'acme/not a name!' is neither a folder here nor a possible id on the hub",
    )


def test_without_a_network_what_was_brought_once_is_found(tmp_path, monkeypatch):
    """Through huggingface_hub itself, with its cache as it lays it out."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    repo, commit = tmp_path / "models--acme--tiny", "c" * 40
    model = make_model()
    model.save_pretrained(repo / "snapshots" / commit)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    loaded = MoEDecoder.from_pretrained("acme/tiny")
    assert all(map(torch.equal, model.parameters(), loaded.parameters()))
    assert local_folder("acme/tiny", revision=commit) == repo / "snapshots" / commit
    refused(lambda: MoEDecoder.from_pretrained("acme/other"), "No folder here is called 'acme/other'", "offline")
    (repo / "snapshots" / commit / "model.safetensors").unlink()  # as where only the tokenizer was brought
    refused(lambda: MoEDecoder.from_pretrained("acme/tiny"), "could not be reached and its cache has none")


# Putting there


class FakeApi:
    """What was put on the hub, and a README.md that may be there already."""

    def __init__(self):
        self.tokens, self.made, self.uploads, self.uploaded = [], [], [], {}
        self.card, self.error, self.asked = None, None, set()

    def __call__(self, token=None):
        self.tokens.append(token)
        return self

    def create_repo(self, repo_id, **settings):
        if self.error is not None:
            raise self.error
        self.made.append((repo_id, settings))
        return huggingface_hub.RepoUrl(f"https://huggingface.co/{repo_id if '/' in repo_id else 'me/' + repo_id}")

    def file_exists(self, repo_id, name):
        self.asked.add(repo_id)
        return name == "README.md" and self.card is not None

    def hf_hub_download(self, repo_id, name):
        return str(self.card)

    def upload_folder(self, *, folder_path, delete_patterns, **settings):
        for name in list(filter_repo_objects(self.uploaded, allow_patterns=delete_patterns)):
            del self.uploaded[name]
        self.uploaded |= {path.name: path.read_bytes() for path in Path(folder_path).iterdir()}
        self.uploads.append(settings)


@pytest.fixture
def api(monkeypatch):
    api = FakeApi()
    monkeypatch.setattr(huggingface_hub, "HfApi", api)
    return api


def test_push_uploads_what_save_pretrained_writes(api, tmp_path):
    address = make_model().push_to_hub(
        "acme/tiny", tokenizer=make_tokenizer(), recipe={"steps": 3}, private=True, token="secret"
    )
    assert address == "https://huggingface.co/acme/tiny"
    assert api.tokens == ["secret"] and api.made == [("acme/tiny", {"private": True, "exist_ok": True})]
    make_model().save_pretrained(tmp_path, tokenizer=make_tokenizer(), recipe={"steps": 3})
    assert api.uploaded == {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)}
    (settings,) = api.uploads
    assert settings["repo_id"] == "acme/tiny" and settings["ignore_patterns"] is None


def test_a_name_alone_is_the_account_s_own(api, tmp_path):
    make_model().save_pretrained(tmp_path)
    (tmp_path / "README.md").write_text("# My own words\n")
    api.card = tmp_path / "README.md"
    assert make_model().push_to_hub("tiny") == "https://huggingface.co/me/tiny"
    assert [settings["repo_id"] for settings in api.uploads] == ["me/tiny"] and api.asked == {"me/tiny"}


def test_weights_and_tokenizer_of_an_earlier_push_go(api, tmp_path):
    end = make_tokenizer()
    end.add_special_tokens(["<|endoftext|>"])
    end.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    (tmp_path / "generation_config.json").write_text("{}")
    api.uploaded = {"notes.txt": b"mine", "model-00001-of-00002.safetensors": b"", "model.safetensors.index.json": b""}
    make_model().push_to_hub("acme/tiny", tokenizer=tmp_path)
    assert {"tokenizer.json", "chat_template.jinja", "generation_config.json"} < set(api.uploaded)
    make_model().push_to_hub("acme/tiny")
    kept = {"README.md", "config.json", "layerskip_moe.json", "model.safetensors", "notes.txt"}
    assert set(api.uploaded) == kept


def test_a_push_carries_the_numbers_of_a_report(api):
    report = {"exits": {"perplexity": [31.25, 17.5], "agreement": [0.5, 1.0], "tokens": 640}}
    make_model().push_to_hub("acme/tiny", report=report)
    assert "31.25" in api.uploaded["README.md"].decode()


def test_a_card_that_somebody_else_wrote_stays(api, tmp_path):
    make_model().save_pretrained(tmp_path)
    for text, ignored in ((None, None), ("# My own words\n", ["README.md"])):
        if text is not None:
            (tmp_path / "README.md").write_text(text)
        api.card = tmp_path / "README.md"
        make_model().push_to_hub("acme/tiny")
        assert api.uploads[-1]["ignore_patterns"] == ignored


@pytest.mark.parametrize(
    "error",
    [answer(errors.HfHubHTTPError, "403 Forbidden.\nYou may not"), ConnectionError("Name or service not known")],
)
def test_what_the_hub_refuses_is_one_sentence(api, error):
    api.error = error
    first = str(error).splitlines()[0].rstrip(".")
    refused(lambda: make_model().push_to_hub("acme/tiny"), "as 'acme/tiny'", first, "`hf auth login`")
    assert api.uploads == []


def test_what_cannot_be_saved_is_not_put_anywhere(api):
    refused(lambda: make_model().push_to_hub("acme/tiny", recipe={"steps": torch.ones(1)}), "plain JSON values")
    assert api.made == [] and api.uploads == []
