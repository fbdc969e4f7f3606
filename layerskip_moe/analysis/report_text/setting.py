"""What a reader needs to repeat a run: the model, the text, the command, every constant, the machine."""

from layerskip_moe.analysis.report_text.markdown import Report, fenced, number, settings, table


def model_lines(report: Report) -> list[str]:
    """`corpus` and `model`."""
    lines = []
    corpus, model = report.get("corpus"), report.get("model")
    if corpus:
        lines += [
            f"Text: {corpus['name']}, {number(corpus['train_tokens'])} tokens for training and "
            f"{number(corpus['validation_tokens'])} held out, a vocabulary of {number(corpus['vocab_size'])}.",
            "",
        ]
    if model:
        lines += [
            f"Model: {number(model['parameters'])} parameters, of which one token uses "
            f"{number(model['active_parameters'])}.",
            "",
            *settings("field", model["config"]),
        ]
    return lines


def setting_lines(report: Report) -> list[str]:
    """`command`, `constants`, `machine` and `seconds`."""
    lines = []
    if report.get("command"):
        lines += fenced(report["command"])
    if report.get("constants"):
        lines += settings("constant", report["constants"])
    if report.get("machine"):
        machine = dict(report["machine"])
        versions = machine.pop("versions", {})
        lines += settings("machine", machine) + (settings("package", versions) if versions else [])
    if report.get("seconds"):
        spent = [(stage, number(seconds, 1)) for stage, seconds in report["seconds"].items()]
        lines += table(("stage", "seconds"), spent)
    return lines
