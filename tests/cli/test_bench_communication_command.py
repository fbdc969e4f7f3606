"""`layerskip-moe bench communication`."""

import json

from layerskip_moe.bench.communication import on_paper
from layerskip_moe.cli import bench_communication


def test_a_table_and_a_file(shell, tmp_path, monkeypatch):
    def no_processes(config, settings):
        assert (config.n_layers, settings.processes) == (1, 3)
        return dict.fromkeys(("measured", "paper"), on_paper(config, settings))

    monkeypatch.setattr(bench_communication, "communication", no_processes)
    small = ["--n-layers", 1, "--d-model", 8, "--d-ff", 8, "--num-experts", 2, "--top-k", 1, "--n-heads", 2]
    code, out, err = shell("bench", "communication", "--processes", 3, *small, "--out", "made/out.json")
    assert code == 0, err
    assert out.splitlines()[0].split() == ["a", "step", "calls", "on", "paper", "kB", "on", "paper"]
    result = json.loads((tmp_path / "made" / "out.json").read_text())
    assert result["measured"].keys() == result["paper"].keys()


def test_what_is_refused(shell):
    for more, told in (
        (["--batch-size", 3], "batch_size=3 is shared by 2 processes"),
        (["--expert-parallel", 3], "expert_parallel=3 must divide the number of processes, which is 2"),
        (["--processes", 1], "processes=1 must be 2 or more"),
    ):
        code, _, err = shell("bench", "communication", *more)
        assert code != 0 and told in err, err
