import json
import os
import time
from pathlib import Path

import fake_stages
import pytest

from trl_diffusion_rank import cli, runner
from trl_diffusion_rank.recipe import RecipeError, dump_recipe, load_recipe, stage_module
from trl_diffusion_rank.runner import Step, canonical, fingerprint, read_record


RECIPE = "shared: {seed: 3}\ngrow: {number: 4, rate: 1e-5}\ncount: {step: 2}\ntotal: {}\n"


@pytest.fixture(autouse=True)
def stages(tmp_path, monkeypatch):
    fake_stages.install(tmp_path, monkeypatch)
    Path("r.yaml").write_text(RECIPE)


def run(*argv):
    return cli.main(["run", "--recipe", "r.yaml", *argv])


def refused(*argv) -> bool:
    """Whether the run ends as wrong usage does: returned for a recipe, by argparse's exit for a stage's parser."""
    try:
        return run(*argv) == 2
    except SystemExit as end:
        return end.code == 2


def lines(capfd):
    """What `run` printed about its stages, without the times."""
    out = capfd.readouterr().out.splitlines()
    return [line.split(" finished in ")[0] + " finished" if " finished in " in line else line for line in out]


def executions(folder):
    return len(Path(folder, "executions").read_text().splitlines())


class TestFingerprint:
    def test_the_same_value_in_other_words(self):
        for value in (500, 500.0, "500", "5e2", ["500"]):
            assert canonical(value) == 500.0
        assert canonical("false") is canonical(False) is False
        assert canonical("None") is canonical(None) is None

    def test_changes_with_stage_option_and_input_but_not_with_the_output_folder(self):
        base = fingerprint("dpo", {"beta": 1, "output_dir": "a"}, {"dataset_name": "f"})
        assert base == fingerprint("dpo", {"output_dir": "b", "beta": 1.0}, {"dataset_name": "f"})
        others = [
            fingerprint("cpo", {"beta": 1}, {"dataset_name": "f"}),
            fingerprint("dpo", {"beta": 2}, {"dataset_name": "f"}),
            fingerprint("dpo", {"beta": 1}, {"dataset_name": "g"}),
            fingerprint("dpo", {"beta": 1}, {}),
        ]
        assert len({base, *others}) == 5

    def test_changes_with_a_local_file_and_a_file_in_a_local_folder(self):
        Path("data").mkdir()
        Path("data/rows.csv").write_text("a")
        for value in ("data/rows.csv", "data", [{"path": "data"}, 1]):
            before = fingerprint("grow", {"data_file": value}, {})
            assert before == fingerprint("grow", {"data_file": value}, {})
            with open("data/rows.csv", "a") as file:
                file.write("b")
            assert before != fingerprint("grow", {"data_file": value}, {})

    def test_a_folder_that_the_stage_writes_to_is_not_looked_into(self):
        Path("cache").mkdir()
        before = fingerprint("grow", {"cache_dir": "cache"}, {})
        Path("cache/file").write_text("a")
        assert before == fingerprint("grow", {"cache_dir": "cache"}, {})


class TestPublishing:
    """Turning publishing on runs a finished stage again in its place, and makes nothing anew by it."""

    def step(self, **options):
        return Step("generate", Path("out"), fingerprint("generate", options, {}), options)

    @pytest.mark.parametrize(
        ("had", "wanted", "done"),
        [
            ({}, {}, True),
            ({}, {"push_to_hub": True, "hub_dataset_id": "me/a"}, False),
            ({"push_to_hub": True, "hub_dataset_id": "me/a"}, {"push_to_hub": "true", "hub_dataset_id": "me/a"}, True),
            ({"push_to_hub": True, "hub_dataset_id": "me/a"}, {"push_to_hub": True, "hub_dataset_id": "me/b"}, False),
            ({"push_to_hub": True, "hub_dataset_id": "me/a"}, {}, True),
        ],
    )
    def test_a_stage_is_done_when_it_is_published_as_wanted(self, had, wanted, done):
        before, step = self.step(seed=1, **had), self.step(seed=1, **wanted)
        assert step.fingerprint == before.fingerprint
        record = {"fingerprint": before.fingerprint, "status": "finished", "options": before.options}
        assert step.is_done(record) is done
        assert not step.is_done(record | {"status": "running"})
        assert not self.step(seed=2, **wanted).is_done(record)

    def test_the_stage_push_does_nothing_but_publish(self):
        assert fingerprint("push", {"hub_model_id": "me/a"}, {}) != fingerprint("push", {"hub_model_id": "me/b"}, {})

    def test_a_token_is_written_nowhere(self, monkeypatch):
        assert fingerprint("dpo", {"hub_token": "hf_x"}, {}) == fingerprint("dpo", {}, {})
        monkeypatch.setattr(runner, "launch", lambda *args: 0)
        step = Step("grow", Path("out"), fingerprint("grow", {}, {}), {"number": 4, "hub_token": "hf_x"})
        assert runner.execute(step, [], [], "grow") == 0
        assert read_record(Path("out"))["options"] == {"number": 4}

    @pytest.mark.parametrize("section", ["shared", "grow"])
    def test_a_run_refuses_a_token(self, section):
        recipe = load_recipe("r.yaml")
        {"shared": recipe.shared, **recipe.sections}[section]["hub_token"] = "hf_x"
        with pytest.raises(RecipeError, match=f"`hub_token` in section `{section}`: .*Log in with `hf auth login`"):
            dump_recipe(recipe, Path("copy.yaml"))
        assert not Path("copy.yaml").exists()


class TestRun:
    def test_runs_skips_reruns_and_brings_back(self, capfd):
        assert run() == 0
        captured = capfd.readouterr()
        assert captured.err == ""  # no warnings of the launcher
        assert "[2/3] count ... finished in " in captured.out
        assert "r: 3 stages in " in captured.out
        assert json.loads(Path("runs/r/grow/options.json").read_text())["rate"] == 1e-5
        count = json.loads(Path("runs/r/count/options.json").read_text())
        assert count == {
            "dataset_name": "runs/r/grow",
            "step": 2,
            "exit_code": 0,
            "seed": 3,
            "output_dir": "runs/r/count",
        }

        start = time.monotonic()
        assert run() == 0
        assert time.monotonic() - start < 1
        assert lines(capfd)[:3] == [
            f"[{n}/3] {s}: unchanged, skipped" for n, s in enumerate(("grow", "count", "total"), 1)
        ]

        # one option: its stage and what depends on it, the old output is put away
        assert run("--count.step", "5") == 0
        assert lines(capfd)[:5] == [
            "[1/3] grow: unchanged, skipped",
            "[2/3] count ...",
            "[2/3] count ... finished",
            "[3/3] total ...",
            "[3/3] total ... finished",
        ]
        assert json.loads(Path("runs/r/count/options.json").read_text())["step"] == 5
        assert sorted(path.name.split("-")[0] for path in Path("runs/r/.superseded").iterdir()) == ["count", "total"]

        assert run() == 0
        assert lines(capfd)[:3] == [
            "[1/3] grow: unchanged, skipped",
            "[2/3] count: finished earlier with these options, brought back",
            "[3/3] total: finished earlier with these options, brought back",
        ]
        assert json.loads(Path("runs/r/count/options.json").read_text())["step"] == 2
        assert executions("runs/r/count") == 1

        # an option in which only the last stage differs, moved to `shared`, is the same option
        Path("r.yaml").write_text("shared: {seed: 3, step: 2.0}\ngrow: {number: '4', rate: 0.00001}\ncount:\ntotal:\n")
        assert run() == 0
        assert [line.split(": ")[1] for line in lines(capfd)[:3]] == ["unchanged, skipped"] * 3

    def test_record(self):
        assert run("--output_dir", "out", "--only", "grow") == 0
        assert run("--output_dir", "out", "--only", "count") == 0
        record = read_record(Path("out/count"))
        assert record["stage"] == "count"
        assert record["status"] == "finished"
        assert record["options"] == {"seed": 3, "step": 2, "dataset_name": "out/grow"}
        assert record["inputs"] == {
            "dataset_name": {"stage": "grow", "fingerprint": read_record(Path("out/grow"))["fingerprint"]}
        }
        assert set(record["versions"]) >= {
            "trl",
            "torch",
            "diffusers",
            "transformers",
            "peft",
            "accelerate",
            "datasets",
        }
        assert record["hardware"]["cpu_cores"] >= 1 and record["hardware"]["memory_gb"] > 0
        assert record["seconds"] > 0
        assert record["started"].endswith("+00:00")

    def test_ends_with_a_report(self, monkeypatch, capfd):
        page = Path("runs/r/report.html")
        assert run("--count.exit_code", "5") == 5 and not page.exists()
        assert run() == 0
        assert "Report: runs/r/report.html" in capfd.readouterr().out
        made = page.stat().st_mtime_ns
        assert run() == 0 and page.stat().st_mtime_ns == made, "nothing has changed"
        assert run("--only", "total", "--total.seed", "9") == 0 and page.stat().st_mtime_ns > made
        page.unlink()
        monkeypatch.setattr("trl_diffusion_rank.report.make_report", lambda run_dir: 1 / 0)
        assert run() == 0, "the stages are finished all the same"
        assert "could not be made (ZeroDivisionError: division by zero)" in capfd.readouterr().out

    def test_an_input_of_several_stages(self, monkeypatch, capfd):
        monkeypatch.setattr(stage_module("total"), "INPUTS", {"all_counts": ["grow", "count"]})
        monkeypatch.setattr(stage_module("count"), "INPUTS", {})
        assert run() == 0
        record = read_record(Path("runs/r/total"))
        assert record["options"]["all_counts"] == ["runs/r/grow", "runs/r/count"]
        fingerprints = [read_record(Path("runs/r", stage))["fingerprint"] for stage in ("grow", "count")]
        assert record["inputs"]["all_counts"] == {"stage": ["grow", "count"], "fingerprint": fingerprints}
        capfd.readouterr()
        assert run("--grow.number", "9") == 0
        out = capfd.readouterr().out
        assert "[2/3] count: unchanged, skipped" in out
        assert "[3/3] total ... finished" in out

    def test_failure_keeps_what_is_finished_and_continues(self, capfd):
        assert run("--count.exit_code", "5") == 5
        captured = capfd.readouterr()
        assert "[2/3] count failed with exit code 5 after" in captured.out
        assert "the same command continues" in captured.out
        assert "Traceback" not in captured.err
        assert read_record(Path("runs/r/count"))["status"] == "running"
        assert read_record(Path("runs/r/total")) is None

        # the same command starts the stage again on its folder
        assert run("--count.exit_code", "5") == 5
        assert lines(capfd)[0] == "[1/3] grow: unchanged, skipped"
        assert executions("runs/r/count") == 2
        assert not Path("runs/r/.superseded").exists()

    @pytest.mark.parametrize(
        ("argv", "message"),
        [
            (["--total.sede", "1"], "unknown option `sede` in section `total` of r.yaml; did you mean `seed`?"),
            (["--count.step", "x"], "`step` in section `count` of r.yaml: got 'x', expected int"),
            (["--grow.number", "-1"], "`number` is -1; it must be at least 0"),
            (["--cuont.step", "1"], "r.yaml has no section `cuont`; did you mean `count`?"),
            (["--count.output_dir", "x"], "`--output_dir` sets the run folder"),
            (["--only", "cont"], "r.yaml has no such section; did you mean `count`?"),
            (
                ["--only", "count"],
                "`count` reads what `grow` writes, which is not finished in runs/r: run `grow` first",
            ),
            (["--num_proceses", "2"], "unknown option `--num_proceses`; did you mean `--num_processes`?"),
            (["--num_processes", "x"], "argument --num_processes/--num-processes: invalid int value: 'x'"),
            (["--accelerate_config", "zero9"], "zero9 is neither a file nor a valid config"),
            (["--cpu", "yes"], "the launch option `--cpu` takes no value, got yes"),
        ],
    )
    def test_everything_is_checked_before_the_first_stage(self, argv, message, capfd):
        assert refused(*argv)
        assert message in capfd.readouterr().err
        assert not Path("runs").exists()

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("shared: {sede: 1}\ngrow: {}", "unknown option `sede` in section `shared` of r.yaml"),
            (
                "launch: {num_process: 1}\ngrow: {}",
                "unknown launch option `num_process` in section `launch` of r.yaml",
            ),
            ("launch: {num_processes: [1]}\ngrow: {}", "got [1], expected a single value"),
            ("shared: {seed: 1}", "r.yaml has no stage to run"),
            ("grow: {}\ncount: {}\nheavy: {beta: -1}", "`beta` must be positive, got -1"),
        ],
    )
    def test_refuses_recipes(self, text, message, capfd):
        Path("r.yaml").write_text(text)
        assert refused()
        assert message in capfd.readouterr().err

    def test_leaves_foreign_folders_alone(self, capfd):
        Path("runs/r/grow").mkdir(parents=True)
        Path("runs/r/grow/thesis.txt").write_text("x")
        assert run() == 2
        assert (
            "`runs/r/grow` of stage `grow` holds files that trl-diffusion-rank did not write" in capfd.readouterr().err
        )

    def test_a_changed_data_file_reruns(self, capfd):
        Path("rows.csv").write_text("a")
        assert run("--only", "grow", "--grow.data_file", "rows.csv") == 0
        assert run("--only", "grow", "--grow.data_file", "rows.csv") == 0
        assert "unchanged, skipped" in capfd.readouterr().out
        os.utime("rows.csv", (1, 1))
        assert run("--only", "grow", "--grow.data_file", "rows.csv") == 0
        assert "[1/1] grow ... finished" in lines(capfd)

    def test_launch_section_and_flags(self):
        Path("r.yaml").write_text("launch: {num_processes: 3, multi_gpu: true, main_process_port: 0}\ngrow: {}\n")
        assert run("--num-processes", "2") == 0
        assert sorted(Path("runs/r/grow/executions").read_text().split()) == ["0", "1"]

    def test_exit_code_of_several_processes(self, capfd):
        argv = ["--only", "grow", "--grow.exit_code", "6", "--multi_gpu", "--num_processes", "2"]
        assert run(*argv, "--main_process_port", "0") == 6
        assert "Traceback" not in capfd.readouterr().err


def test_a_stage_on_its_own_leaves_the_same_record(capfd):
    assert cli.main(["grow", "--recipe", "r.yaml", "--number", "9"]) == 0
    alone = read_record(Path("runs/r/grow"))
    assert cli.main(["grow", "--recipe", "r.yaml", "--number", "9"]) == 0
    assert "grow: unchanged, skipped" in capfd.readouterr().out
    assert run("--only", "grow", "--grow.number", "9") == 0
    assert lines(capfd)[0] == "[1/1] grow: unchanged, skipped"
    assert alone == read_record(Path("runs/r/grow"))
    # and what follows reads it
    assert cli.main(["count", "--recipe", "r.yaml"]) == 0
    assert read_record(Path("runs/r/count"))["inputs"]["dataset_name"]["fingerprint"] == alone["fingerprint"]
