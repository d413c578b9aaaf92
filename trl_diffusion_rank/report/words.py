"""The report's summary: what the numbers say, in sentences."""

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

from trl_diffusion_rank.data.artefact import public
from trl_diffusion_rank.evaluation.comparison import direction
from trl_diffusion_rank.report.figures import displacement_step, metric_name
from trl_diffusion_rank.report.run import TRAINING, Run, Stage
from trl_diffusion_rank.runner import duration


@dataclass
class Finding:
    """A verdict, a warning or a remark: `tone` is better, worse, mixed, warning or plain."""

    tone: str
    head: str
    sentences: list[str] = field(default_factory=list)


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def percent_interval(measure: dict[str, Any]) -> str:
    """A share with its interval, as in `discriminator/metrics.json`."""
    low, high = measure["interval"]
    return f"{percent(measure['value'])} [{100 * low:.1f}, {100 * high:.1f}]"


def listing(names: list[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


# What was done ---------------------------------------------------------


def what_was_done(run: Run) -> str:
    """One line: which model was trained how, on what."""
    trained = [sentence(run, stage) for name, stage in run.stages.items() if name in TRAINING[1:]]
    if trained:
        return "; ".join(trained)
    return f"The {'stages' if len(run.stages) > 1 else 'stage'} {listing(list(run.stages))}"


def sentence(run: Run, stage: Stage) -> str:
    """One stage of training, in what its options say."""
    options = public(stage.options)
    loss = options.get("loss_type") or []
    how = [listing(loss if isinstance(loss, list) else [loss])] if loss else []
    if str(options.get("use_peft")).lower() == "true":
        how.append(f"LoRA of rank {options['lora_r']}" if "lora_r" in options else "LoRA")
    else:
        how.append("all weights")
    rows = f", on {sum(run.lists.rows.values()):,} rows of images" if run.lists else ""
    return f"{stage.name.upper()} of {options.get('model_name_or_path', 'a model')} ({', '.join(how)}){rows}"


def progress(stage: Stage) -> str:
    """How far a stage is that has not finished."""
    last = max((entry["step"] for entry in stage.log), default=None)
    if last is None:
        return f"{stage.name} is not finished: it is running, or was cut off."
    most = int(float(stage.options.get("max_steps") or -1))
    of = f" of {most}" if most > 0 else ""
    return f"{stage.name} is not finished: it is running, or was cut off. Its last log is of step {last}{of}."


# What came out ---------------------------------------------------------


def findings(run: Run) -> list[Finding]:
    """All that the summary says, what is not finished first."""
    found = [Finding("warning", progress(stage)) for stage in run.stages.values() if not stage.finished]
    metrics = comparison(run)
    if metrics is not None:
        found += [verdict(metrics, entry) for entry in metrics["verdicts"]]
        found += [Finding("warning", "How to read this", [text]) for text in metrics["warnings"]]
    for stage in run.training:
        found += training_findings(stage)
    found += discriminator_findings(run)
    return found


def comparison(run: Run) -> dict[str, Any] | None:
    """The metrics of `evaluate`; None when there are none, or they are of before evaluations named their adapters."""
    metrics = run.stages["evaluate"].metrics if "evaluate" in run.stages else None
    return metrics if metrics is not None and "adapters" in metrics else None


def verdict(metrics: dict[str, Any], entry: dict[str, Any]) -> Finding:
    """The word for an adapter at a number of steps, the metrics that decided it, and in which the others moved."""
    results = [
        result
        for result in metrics["results"]
        if (result["adapter"], result["num_inference_steps"]) == (entry["adapter"], entry["num_inference_steps"])
    ]
    word = {
        "mixed": "is better in some metrics and worse in others than",
        "no clear difference": "is not clearly different from",
    }
    is_what = word.get(entry["verdict"], f"is {entry['verdict']} than")
    head = f"At {entry['num_inference_steps']} steps {entry['adapter']} {is_what} base"
    sentences = [headline(result) for result in results if result["decides"]]
    others = defaultdict(list)
    for result in results:
        if not result["decides"]:
            others[direction(result)].append(f"{metric_name(result)} {change(result)}")
    rest = [f"{', '.join(names)} ({kind})" for kind, names in others.items()]
    if rest:
        sentences.append(f"Other metrics: {'; '.join(rest)}.")
    return Finding(entry["verdict"], head, sentences)


def change(result: dict[str, Any]) -> str:
    return f"{result['base']:.3g} → {result['tuned']:.3g}"


def headline(result: dict[str, Any]) -> str:
    """A metric that decides, with its win rate where it has one."""
    lower = " (lower is better)" if result["higher_is_better"] is False else ""
    moved = f"{metric_name(result)}{lower} went from {result['base']:.3g} to {result['tuned']:.3g}"
    if "win_rate" in result:
        low, high = result["win_rate_interval"]
        wins = f"{percent(result['win_rate'])} [{100 * low:.1f}, {100 * high:.1f}]"
        return f"{moved}; the tuned images won {wins} of the pairs, ties counted one half."
    low, high = result["difference_interval"]
    return f"{moved}, a difference of {result['difference']:+.3g} [{low:.3g}, {high:.3g}]."


def training_findings(stage: Stage) -> list[Finding]:
    """Displacement, and steps that were left out."""
    found = []
    step = displacement_step(stage.log)
    if step is not None:
        text = (
            "The errors of the best and of the worst images both rose: the loss may fall while samples get worse. "
            "Lower the learning rate, raise beta, or hold the best images."
        )
        found.append(Finding("warning", f"{stage.name}: displacement found at step {step}", [text]))
    skipped = max((entry["skipped_steps"] for entry in stage.log if entry.get("skipped_steps")), default=0)
    if skipped:
        steps = "step was" if skipped == 1 else "steps were"
        found.append(Finding("warning", f"{stage.name}: {skipped:.0f} {steps} skipped, the gradient was not finite"))
    if step is None and any("error/chosen_delta" in entry for entry in stage.log):
        found.append(Finding("plain", f"{stage.name}: no displacement was found in training."))
    return found


def discriminator_findings(run: Run) -> list[Finding]:
    metrics = run.stages["discriminator"].metrics if "discriminator" in run.stages else None
    if metrics is None:
        return []
    head = f"The discriminator picks the real image in {percent_interval(metrics['top1'])} of held-out rows"
    return [Finding("plain", f"{head}; chance is {percent(metrics['chance'])}.")]


def total_time(run: Run) -> str:
    """The sum over the stages that have finished."""
    seconds = [stage.record["seconds"] for stage in run.stages.values() if stage.finished]
    if not seconds:
        return ""
    return f"{len(seconds)} {'stages' if len(seconds) > 1 else 'stage'} took {duration(sum(seconds))}"
