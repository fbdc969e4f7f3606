"""`layerskip-moe calibrate`: from a checkpoint and a text to a file that generate decodes by."""

import json
from pathlib import Path

import pytest

from layerskip_moe.analysis.calibrate import NEW_DOCUMENTS, THESE_DOCUMENTS
from layerskip_moe.generation import EarlyExit

SMALL = ["--prompt-length", 4, "--max-new-tokens", 4, "--steps", 3]
TINY = [*SMALL, "--tolerance", 0.5, "--risk", 0.3, "--sequences", 12]


@pytest.fixture
def story(tmp_path):
    path = tmp_path / "story.txt"
    path.write_text("The quick brown foxes jump over the lazy dogs, again and again.\n" * 200)
    return path


@pytest.mark.parametrize("confidence", ["softmax_diff", "classifier"])
@pytest.mark.parametrize("consistency", ["textual", "token", "risk"])
def test_what_is_written_decodes(shell, checkpoint, story, tmp_path, confidence, consistency):
    given = ["--checkpoint", checkpoint, "--prompts", story, "--consistency", consistency, "--out", "found/exit.json"]
    more = ["--confidence", confidence, "--classifier-sequences", 3, "--cache", "exact", "--decay", "--exits", 2]
    code, out, err = shell("calibrate", *given, *TINY, *more)
    assert code == 0, err
    told = json.loads((tmp_path / "found" / "exit.json").read_text())
    found = told["calibration"]
    assert (found["sequences"], found["shape_sequences"], found["consistency"]) == (9, 3, consistency)
    assert found["confidence"] == confidence and found["text"] == str(story)
    assert found["command"].startswith("layerskip-moe calibrate --checkpoint ")
    assert (told["early_exit"]["cache"], told["early_exit"]["decay"]) == ("exact", True)
    assert {layer for layer, depth in enumerate(found["shape"], start=1) if depth} <= {2, 3}
    assert (tmp_path / "found" / "exit.safetensors").exists() == (confidence == "classifier")
    lines = out.splitlines()
    assert lines[0].startswith("certified: ") and lines[-1] == "found/exit.json"
    assert "promise: at most 0.5 of " in out
    assert f"at risk 0.3, over 4 new tokens, greedy, for {THESE_DOCUMENTS}" in out and found["holds_for"] in out
    probes = "; probes: 3 of 1" if confidence == "classifier" else ""
    assert f"on 9 sequences of 1 of 1 documents (shape: 3 of 1{probes}): {found['mean_loss']:.4f}, p-value" in out
    assert "sequences share documents, and are not independent; for a promise about new documents give 3 " in out
    assert f"mean exit layer {found['mean_layers']:.2f} of 5" in out
    EarlyExit(tmp_path / "found" / "exit.json")

    asked = ["--checkpoint", checkpoint, "--prompt", "The", "--json", "--strategy", "early-exit"]
    asked += ["--threshold", "found/exit.json"]
    code, out, err = shell("generate", *asked, "--max-new-tokens", 4)
    assert code == 0, err
    strategy = json.loads(out)["strategy"]
    assert (strategy["confidence"], strategy["threshold"]) == (confidence, told["early_exit"]["threshold"])
    code, out, err = shell("generate", *asked, "--max-new-tokens", 5)
    assert (code, out) == (1, "") and "was calibrated for exactly 4 new tokens" in err.splitlines()[-1]


def test_documents_are_split_whole_and_certify_one_sequence_each_where_there_are_enough(shell, checkpoint, tmp_path):
    """At tolerance 0.5 and risk 0.3, 2 sequences certify; of 6 documents one trains the probes, one makes the shape."""
    (tmp_path / "stories").mkdir()
    for number in range(6):
        (tmp_path / "stories" / f"{number}.md").write_text(f"{number} brown foxes jump over the lazy dogs.\n" * 9)
    given = ["--checkpoint", checkpoint, "--prompts", "stories", "--out", "exit.json", "--confidence", "classifier"]
    code, out, err = shell("calibrate", *given, *TINY, "--classifier-sequences", 3)
    assert code == 0, err
    found = json.loads(Path("exit.json").read_text())["calibration"]
    names = ("sequences", "documents", "shape_documents", "classifier_documents", "text_documents")
    assert [found[name] for name in names] == [4, 4, 1, 1, 6]
    assert f"greedy, for {NEW_DOCUMENTS}\non 4 sequences of 4 of 6 documents (shape: " in out
    assert "share documents" not in out


def test_held_out_text_is_the_default_and_the_file_lies_beside_the_checkpoint(shell, checkpoint, text):
    code, out, err = shell("calibrate", "--checkpoint", checkpoint, "--dataset", text, *TINY)
    assert code == 0, err
    path = checkpoint.parent / "early_exit.json"
    assert out.splitlines()[-1] == str(path)
    assert json.loads(path.read_text())["calibration"]["text"] == str(text)
    path.unlink()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            ["--sequences", 77],
            "--sequences 77 are too few to certify anything: --tolerance 0.05 at --risk 0.05 takes at",
        ),
        (["--sequences", 77], "at least 78, a quarter of them for the shape, even without any loss."),
        (
            ["--prompt-length", 900],
            "stretches of 904 tokens, not 90; give a longer text, or fewer --sequences, of which",
        ),
        (["--prompt-length", 900], "--tolerance 0.05 at --risk 0.05 takes at least 78, or shorter ones."),
        (["--prompts", "None"], "takes at least 78 sequences, and 90 were asked for. The validation split of"),
        (["--tolerance", 1.5], "tolerance=1.5 must be above 0 and below 1"),
        (["--min-layer", 9], "min_layer=9 must be between 1 and n_layers=5"),
        (
            ["--prompts", "none.txt"],
            "--prompts none.txt is no text to cut prompts from (none.txt cannot be read (No such file or",
        ),
        (["--confidence", "entropy"], "--confidence entropy does not fit"),
        (["--threshold", 0.5], "--threshold is no option"),
    ],
    ids=str,
)
def test_a_mistake_is_one_sentence_and_writes_nothing(shell, checkpoint, story, arguments, sentence):
    Path("short.txt").write_text("The quick brown foxes.\n" * 20)
    given = [
        "--checkpoint",
        checkpoint,
        "--prompts",
        story,
        "--dataset",
        "short.txt",
        "--sequences",
        90,
        "--out",
        "out.json",
        *SMALL,
    ]
    code, out, err = shell("calibrate", *given, *arguments)
    assert (code, out) == (1, "")
    assert sentence in err.splitlines()[-1]
    assert not story.with_name("out.json").exists()
