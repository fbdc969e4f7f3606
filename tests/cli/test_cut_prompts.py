"""Prompts cut from files: stretches of tokens, none across two documents."""

import json

import pytest

from layerskip_moe.cli.options import cut_prompts


@pytest.fixture
def stories(tmp_path):
    """Two documents, in a folder and in one .jsonl."""
    texts = [f"The {word} foxes jump over the lazy dogs, again and again. " * 9 for word in ("brown", "quick")]
    folder = tmp_path / "stories"
    folder.mkdir()
    for number, text in enumerate(texts):
        (folder / f"{number}.txt").write_text(text)
    file = tmp_path / "stories.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return texts, folder, file


def test_each_is_a_stretch_of_its_document(stories, tokenizer):
    texts, folder, file = stories
    ids = [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
    cut = cut_prompts(str(folder), tokenizer, 8, 5, seed=3)
    assert sorted(document for document, _ in cut) == [0] * 4 + [1] * 4
    for document, tokens in cut:
        assert any(ids[document][start : start + 5] == tokens for start in range(0, len(ids[document]), 5))
    assert cut_prompts(str(file), tokenizer, 8, 5, seed=3) == cut != cut_prompts(str(file), tokenizer, 8, 5, seed=4)
    assert cut_prompts(str(file), tokenizer, 0, 5) == []


def test_what_cannot_be_cut(stories, tokenizer, tmp_path):
    texts, folder, _ = stories
    held = sum(len(tokenizer.encode(text, add_special_tokens=False).ids) // 5 for text in texts)
    assert len(cut_prompts(str(folder), tokenizer, held, 5)) == held
    with pytest.raises(
        ValueError, match=f"holds {held} stretches of 5 tokens, not {held + 1}; give a longer text, or ask"
    ):
        cut_prompts(str(folder), tokenizer, held + 1, 5)
    (tmp_path / "blank.txt").write_text(" \n")
    for name in ("blank.txt", "absent.txt"):
        with pytest.raises(ValueError, match=f"--prompts {name} is no text to cut prompts from"):
            cut_prompts(name, tokenizer, 1, 5)
