"""`layerskip-moe bench speculation`."""

import json

SMALL = ["--num-prompts", 2, "--prompt-length", 3, "--max-new-tokens", 4, "--wrong-tokens", 5, "--batch-size", 2]
SMALL += ["--batches", 1, "--draft-lengths", 1, "--device", "cpu"]


def test_tables_and_a_file(shell, checkpoint, text, tmp_path):
    (tmp_path / "story.txt").write_text("Once upon a time there was a fox. " * 9)
    given = ["--checkpoint", checkpoint, "--dataset", text, "--prompts", "story.txt", "--out", "made/out.json"]
    code, out, err = shell("bench", "speculation", *given, *SMALL)
    assert code == 0, err
    assert "| story.txt | greedy |" in out and "| no draft ever right, at |" in out and "| batch, at |" in out
    result = json.loads((tmp_path / "made" / "out.json").read_text())
    assert result["command"].startswith("layerskip-moe bench speculation --checkpoint")
    assert [row["text"] for row in result["rows"]] == [str(text), "story.txt"] * 2
    assert all(row["identical_in_grid"] == row["outputs_in_grid"] for row in result["rows"])


def test_what_is_refused(shell, checkpoint, text, tmp_path):
    given = ["bench", "speculation", "--checkpoint", checkpoint, "--dataset", text, *SMALL[2:]]
    for more, told in (
        (["--num-prompts", 2, "--prompts", "absent.txt"], "absent.txt cannot be read"),
        (["--num-prompts", 0], "num_prompts=0 must be 1 or more"),
        (["--num-prompts", 2, "--wrong-tokens", 100_000], "max_seq_len"),
        (["--num-prompts", 2, "--threads", 0], "threads=0 must be 1 or more"),
    ):
        code, _, err = shell(*given, *more)
        assert code != 0 and told in err, err
