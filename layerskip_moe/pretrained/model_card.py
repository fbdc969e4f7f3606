"""README.md of a checkpoint, which the Hugging Face hub shows as the model's card.

It tells what the folder's own files say, and numbers of a report where one is given; what neither has is not told.
Knows nothing of how anything was measured. Next: `analysis/report.py`, which documents the report; `hub.py`.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from layerskip_moe.files import replacing
from layerskip_moe.nn import ModelConfig
from layerskip_moe.pretrained.config_file import CONFIG, empty_model, read_network
from layerskip_moe.pretrained.json_file import read_json
from layerskip_moe.pretrained.record import read_record

CARD = "README.md"
_OURS = "---\n# Written by layerskip_moe, anew by each save. Remove this line, and the file is yours and stays.\n"


def is_ours(text: str) -> bool:
    """Whether a card was written here, and its reader did not make it their own."""
    return text.startswith(_OURS)


def has_other_card(folder: Path) -> bool:
    """Whether folder has a card that was not written here."""
    path = folder / CARD
    return path.is_file() and not is_ours(path.read_text(encoding="utf-8", errors="replace"))


def write_model_card(folder: str | Path, report: Mapping[str, Any] | None = None) -> None:
    """Write README.md of the checkpoint in folder. Raises ValueError where somebody else wrote one.

    report: what report.json holds (`analysis.write_report`); its exits, its headlines and its machine are told
    """
    folder = Path(folder)
    if has_other_card(folder):
        raise ValueError(f"{folder / CARD} was not written by layerskip_moe; move it away to have the card written.")
    with replacing(folder / CARD) as beside:
        beside.write_text(model_card(folder, report), encoding="utf-8")


def model_card(folder: Path, report: Mapping[str, Any] | None = None) -> str:
    """The text of `write_model_card`."""
    family, config = read_network(folder)
    record = read_record(folder) or {}
    recipe, report = record.get("recipe"), report or {}
    header = [
        f"library_name: {'transformers' if family else 'layerskip_moe'}",
        "pipeline_tag: text-generation",
        "tags:",
        "- layerskip_moe",
        *(["- layerskip"] if recipe else []),
        *(["- mixture-of-experts"] if config.num_experts else []),
        "---",
    ]
    kind = "Mixture-of-Experts decoder" if config.num_experts else "decoder"
    sections = {
        f"# A {kind} of {config.n_layers} layers": _network_lines(folder, family, config),
        "## How it was trained": _recipe_lines(recipe),
        "## Measured": measured_lines(report),
        "## How to open it": _usage_lines(folder, family, config, report),
    }
    body = [f"{title}\n\n" + "\n".join(lines) for title, lines in sections.items() if lines]
    return _OURS + "\n".join(header) + "\n\n" + "\n\n".join(body) + "\n"


def _network_lines(folder: Path, family: str | None, config: ModelConfig) -> list[str]:
    contents = read_json(folder / CONFIG)
    total, used = empty_model(config).parameter_counts()
    sizes: dict[str, Any] = {
        "parameters": f"{total:,}" + (f", {used:,} of them used per token" if used != total else ""),
        "stored as": contents.get("quantization") or contents.get("dtype"),
        "architecture": ", ".join(contents.get("architectures") or []),
        "layers": config.n_layers,
        "width": config.d_model,
        "attention": f"{config.n_heads} heads of width {config.head_dim}, {config.n_kv_heads} of keys and values",
        "experts": _experts(config),
        "vocabulary": config.vocab_size,
        "longest text, in tokens": config.max_seq_len,
    }
    return _table(("", ""), [(name, value) for name, value in sizes.items() if value])


def _experts(config: ModelConfig) -> str:
    layers = sum(config.is_moe(layer) for layer in range(config.n_layers))
    if not layers:
        return ""
    where = "every layer" if layers == config.n_layers else f"{layers} of {config.n_layers} layers"
    return f"{config.num_experts} in {where}, {config.top_k} chosen per token, hidden width {config.d_ff}"


def _recipe_lines(recipe: Mapping[str, Any] | None) -> list[str]:
    if not recipe:
        return []
    return [
        "With the recipe of LayerSkip ([arXiv 2404.16710](https://arxiv.org/abs/2404.16710)), layer dropout and early"
        " exits, as far as these settings have them on:",
        "",
        *_table(("setting", "value"), _flat(recipe)),
    ]


def _flat(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Nested settings as rows, "outer.inner"; what is null is not told."""
    rows: list[tuple[str, Any]] = []
    for name, value in values.items():
        if isinstance(value, Mapping):
            rows += _flat(value, f"{prefix}{name}.")
        elif value is not None:
            rows.append((prefix + name, value if isinstance(value, str) else json.dumps(value)))
    return rows


def measured_lines(report: Mapping[str, Any]) -> list[str]:
    """What a report measured, as lines of Markdown; KeyError, TypeError or ValueError where it is not a report's."""
    lines = []
    exits = report.get("exits")
    if exits:
        of = f" of {report['corpus']['name']}" if report.get("corpus") else ""
        rows = [
            (layer, _number(perplexity, ".2f"), _number(agreement, ".1%"))
            for layer, (perplexity, agreement) in enumerate(
                zip(exits["perplexity"], exits["agreement"], strict=True), start=1
            )
        ]
        lines += [
            f"After each layer, on {exits['tokens']:,} held-out tokens{of}; agreement is with the last layer's first "
            "choice:",
            "",
            *_table(("exit layer", "perplexity", "agreement"), rows),
            "",
        ]
    best = report.get("summary") or []
    if best:
        machine = _machine(report.get("machine") or {})
        titles = (
            "",
            "exit layer, drafts per round",
            "tokens/s, plain and drafting",
            "speed-up",
            "accepted",
            "identical",
        )
        headlines = [
            (
                f"{row['name']}, {row['decoding']}",
                "" if row["exit_layer"] is None else f"{row['exit_layer']}, {row['draft_length']}",
                f"{_number(row['baseline_tokens_per_second'], '.1f')}, {_number(row['tokens_per_second'], '.1f')}",
                _number(row["speed_up"], ".2f"),
                _number(row["acceptance_rate"], ".1%"),
                f"{row['identical']} of {row['outputs']}",
            )
            for row in best
        ]
        lines += [
            "Decoding with its own early layers as the draft, against plain decoding of the same model, batch 1"
            f"{f', on {machine}' if machine else ''}:",
            "",
            *_table(titles, headlines),
        ]
    return lines


def _machine(machine: Mapping[str, Any]) -> str:
    cores = None if machine.get("cores") is None else f"{machine['cores']} cores"
    torch = (machine.get("versions") or {}).get("torch")
    parts = (machine.get("accelerator"), machine.get("cpu"), cores, torch and f"torch {torch}")
    return ", ".join(str(part) for part in parts if part)


def _usage_lines(folder: Path, family: str | None, config: ModelConfig, report: Mapping[str, Any]) -> list[str]:
    has_tokenizer = (folder / "tokenizer.json").is_file()
    best = next((row for row in report.get("summary") or [] if row["exit_layer"] is not None), None)
    exit_layer = best["exit_layer"] if best else max(1, config.n_layers // 4)
    draft_length = best["draft_length"] if best else 4
    loads = ", load_tokenizer" if has_tokenizer else ""
    prompt, tokenizer = ('"Once upon a time"', ", tokenizer=tokenizer") if has_tokenizer else ("[1, 2, 3]", "")
    ours = [
        "from layerskip_moe import MoEDecoder, SelfSpeculative, generate",
        *(["from layerskip_moe.pretrained import load_tokenizer"] if loads else []),
        "",
        "model = MoEDecoder.from_pretrained(FOLDER)",
        *(["tokenizer = load_tokenizer(FOLDER)"] if has_tokenizer else []),
        f"drafting = SelfSpeculative(exit_layer={exit_layer}, draft_length={draft_length})",
        f"out = generate(model, [{prompt}], drafting{tokenizer})",
    ]
    lines = [
        "`FOLDER` is this folder, or its id on the Hugging Face hub. With layerskip_moe, drafting with the first"
        " layers, which gives the text of plain decoding:",
        "",
        *_code("python", ours),
    ]
    if family is None:
        return [*lines, "", "No architecture of transformers computes this network as it is."]
    theirs = [
        f"from transformers import AutoModelForCausalLM{', AutoTokenizer' if has_tokenizer else ''}",
        "",
        "model = AutoModelForCausalLM.from_pretrained(FOLDER)",
        *(["tokenizer = AutoTokenizer.from_pretrained(FOLDER)"] if has_tokenizer else []),
    ]
    return [
        *lines,
        "",
        "With transformers, which gives the same logits:",
        "",
        *_code("python", theirs),
        "",
        "vLLM and SGLang read the same layout; whether they run this model has not been tried:",
        "",
        *_code("sh", ["vllm serve FOLDER", "python -m sglang.launch_server --model-path FOLDER"]),
    ]


def _code(language: str, lines: Sequence[str]) -> list[str]:
    return [f"```{language}", *lines, "```"]


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    cells = [header, ["---"] * len(header), *rows]
    return ["| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in row) + " |" for row in cells]
