import pytest
import tiny_run

from trl_diffusion_rank.report import words
from trl_diffusion_rank.report.run import Run, read_run


@pytest.fixture
def run(tmp_path):
    """Makes a run of the stages that a test writes."""
    return lambda: read_run(tmp_path)


def heads(run: Run) -> list[str]:
    return [finding.head for finding in words.findings(run)]


def test_what_was_done(full_run):
    text = words.what_was_done(read_run(full_run))
    # Of the path on this machine only the last name
    assert text.startswith("DPO of tiny (LoRA of rank 8), on 6 rows of images; CPO of tiny")


def test_what_was_done_without_training(tmp_path, run):
    tiny_run.write_score(tmp_path)
    assert words.what_was_done(run()) == "The stage score"
    tiny_run.write_discriminator(tmp_path)
    assert words.what_was_done(run()) == "The stages discriminator and score"


@pytest.mark.parametrize(
    ("use_peft", "how"), [(True, "LoRA"), ("true", "LoRA"), (False, "all weights"), (None, "all weights")]
)
def test_lora_or_all_weights(tmp_path, run, use_peft, how):
    tiny_run.stage(
        tmp_path, "dpo", {"model_name_or_path": "x/y", "loss_type": ["ipo", "linear"], "use_peft": use_peft}
    )
    assert words.what_was_done(run()) == f"DPO of x/y (ipo and linear, {how})"


def test_a_verdict_in_words(tmp_path, run):
    tiny_run.write_evaluate(tmp_path, ["a"], [tiny_run.noise(16, 0)], adapters=("dpo",), steps=(4,))
    finding, warning = words.findings(run())
    assert finding.tone == "better"
    assert finding.head == "At 4 steps dpo is better than base"
    good, frechet, others = finding.sentences
    assert good == (
        "digits good went from 0.45 to 0.9; the tuned images won 70.4 % [66.4, 75.4] of the pairs, "
        "ties counted one half."
    )
    assert frechet == "digits frechet (lower is better) went from 0.45 to 0.9, a difference of +0.45 [0.4, 0.5]."
    assert others == "Other metrics: digits clean 0.45 → 0.9 (better); diversity 0.45 → 0.9 (higher)."
    assert (warning.tone, warning.sentences) == ("warning", ["The only judge labelled the training data."])


@pytest.mark.parametrize(
    ("verdict", "text"),
    [
        ("worse", "is worse than base"),
        ("mixed", "is better in some metrics and worse in others than base"),
        ("no clear difference", "is not clearly different from base"),
    ],
)
def test_losses_are_told_as_wins_are(tmp_path, run, verdict, text):
    tiny_run.write_evaluate(tmp_path, ["a"], [tiny_run.noise(16, 0)], adapters=("dpo",), steps=(4,))
    stage = run()
    stage.stages["evaluate"].metrics["verdicts"][0]["verdict"] = verdict
    finding = words.findings(stage)[0]
    assert finding.tone == verdict
    assert finding.head == f"At 4 steps dpo {text}"


def test_metrics_from_before_adapters_had_names_are_left_out(tmp_path, run):
    tiny_run.write_json(tiny_run.stage(tmp_path, "evaluate") / "metrics.json", {"results": [], "verdicts": {}})
    assert words.comparison(run()) is None
    assert words.findings(run()) == []


def test_displacement_and_skipped_steps(tmp_path, run):
    tiny_run.write_training(tmp_path, "dpo", displaced=100)
    assert heads(run()) == [
        "dpo: displacement found at step 100",
        "dpo: 3 steps were skipped, the gradient was not finite",
    ]


def test_no_displacement(tmp_path, run):
    tiny_run.write_training(tmp_path, "dpo")
    assert heads(run()) == ["dpo: no displacement was found in training."]


def test_a_stage_that_runs(tmp_path, run):
    tiny_run.write_training(tmp_path, "dpo", status="running")
    tiny_run.stage(tmp_path, "score", status="running")
    assert heads(run())[:2] == [
        "score is not finished: it is running, or was cut off.",
        "dpo is not finished: it is running, or was cut off. Its last log is of step 200 of 200.",
    ]
    assert words.total_time(run()) == ""


def test_the_discriminator_and_the_time(tmp_path, run):
    tiny_run.write_discriminator(tmp_path)
    tiny_run.stage(tmp_path, "score", seconds=75.0)
    assert heads(run()) == [
        "The discriminator picks the real image in 96.8 % [92.6, 100.0] of held-out rows; chance is 20.0 %."
    ]
    assert words.total_time(run()) == "2 stages took 2 min 15 s"
