"""Results of an ablation that were whole once: compared and told, or one sentence that names the file."""

import json
from dataclasses import asdict

from hypothesis import given
from hypothesis import strategies as st

from layerskip_moe.ablation import write
from layerskip_moe.ablation.measure import MeasureConfig
from layerskip_moe.ablation.result_files import as_json, check_machine, decoding_setting, read_result, read_timing
from layerskip_moe.ablation.timing import DecodingConfig
from layerskip_moe.nn import ModelConfig
from layerskip_moe.training import TrainConfig

NETWORK = ModelConfig(11, n_layers=2, d_model=8, n_heads=2, num_experts=2, d_ff=8)
SETTING = as_json(
    {"network": asdict(NETWORK), "recipe": asdict(TrainConfig()), "measures": asdict(MeasureConfig()), "device": "cpu"}
)
RESULT = {
    "variant": "base",
    "changes": {"network": {}, "recipe": {"seed": 3}},
    **{"seed": 0, "parameters": 900, "active_parameters": 700, "failed": None, "steps": 4, "tokens": 256},
    **{"training_seconds": 60.5, "measuring_seconds": 15.0},
    "exits": {"perplexity": [30.5, 20.5], "agreement": [0.5, 1.0], "tokens": 100},
    "union": {"spans": [2, 4], "over_top_k": [1.5, 1.75], "independent": [1.5, None]},
}
SPEEDS = {"speed_up": 1.2, "tokens_per_second": 99.0, "acceptance_rate": 0.5, "distinct_4grams": None}
MACHINE = {"cpu": "a CPU", "cores": 2, "torch_threads": 1, "device": "cpu", "accelerator": None}
MACHINE |= {"versions": {"torch": "2.13"}}
TIMED = {
    **{"variant": "base", "seed": 0, "machine": MACHINE},
    "decoding": [{"temperature": 0.0, "plain_tokens_per_second": 80, **SPEEDS}],
}
ABOUT = {"command": None, "corpus": {"name": "a text"}, "base": {"network": asdict(NETWORK), "recipe": {}}}


def test_results(cases, refused, damaged_json, damaged_bytes, tmp_path, monkeypatch):
    monkeypatch.setattr(write, "_draw", lambda out_dir, told: {})
    result, timing, decoding = tmp_path / "result.json", tmp_path / "decoding.json", decoding_setting(DecodingConfig())
    whole = {result: RESULT | {"setting": SETTING}, timing: TIMED | {"setting": decoding}}

    def tell():
        measured, timed = read_result(result, SETTING), read_timing(timing, decoding)
        check_machine(timing, MACHINE)
        parts = {"decoding": timed["decoding"], "timed_on": timed["machine"]}
        write.write_ablation(tmp_path / "told", ABOUT, [measured | parts, measured | parts | {"seed": 1}])

    for path, contents in whole.items():
        path.write_text(json.dumps(contents))
    assert refused(tell) is None

    @cases("results")
    @given(st.data())
    def check(data):
        for path, contents in whole.items():
            path.write_text(json.dumps(contents))
        path = data.draw(st.sampled_from([*whole]))
        path.write_bytes(data.draw(damaged_json(whole[path]) | damaged_bytes(path.read_bytes())))
        refused(tell)

    check()
