import subprocess
import sys
from pathlib import Path

import fake_stages
import pytest

from trl_diffusion_rank.recipe import (
    STAGES,
    RecipeError,
    check_shared,
    dump_recipe,
    load_recipe,
    parse_stage,
    run_stage,
    stage_actions,
    stage_inputs,
    stage_module,
    stage_options,
    stage_parser,
)


@pytest.fixture(autouse=True)
def stages(tmp_path, monkeypatch):
    fake_stages.install(tmp_path, monkeypatch)


def write(text, name="r.yaml"):
    with open(name, "w") as file:
        file.write(text)
    return name


def grow(section, *argv):
    """The options of `grow` with this recipe section and these flags."""
    return parse_stage("grow", ["--recipe", write(f"grow: {{{section}}}"), *argv])[0]


class TestFile:
    def test_reads_in_order(self):
        recipe = load_recipe(write("shared: {seed: 1}\nlaunch: {cpu: true}\ngrow: {number: 5}\ncount:\ntotal: {}\n"))
        assert recipe.name == "r"
        assert recipe.shared == {"seed": 1}
        assert recipe.launch == {"cpu": True}
        assert list(recipe.sections.items()) == [("grow", {"number": 5}), ("count", {}), ("total", {})]

    def test_dump_is_read_back(self, tmp_path):
        recipe = load_recipe(
            write(
                "shared: {seed: 1}\ncount: {step: 1e-5}\ngrow: {extra: {a: [1, 2]}, title: 'no'}\n".replace(
                    "count: {step: 1e-5}\n", ""
                )
            )
        )
        dump_recipe(recipe, tmp_path / "copy.yaml")
        copy = load_recipe(tmp_path / "copy.yaml")
        assert (copy.shared, copy.launch, copy.sections) == (recipe.shared, recipe.launch, recipe.sections)

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("- grow", "`r.yaml` holds a list, expected a mapping with one section per stage: grow, count"),
            ("", "`r.yaml` holds a NoneType"),
            ("grow: [", "`r.yaml` is not valid YAML"),
            ("grwo: {}", "unknown stage `grwo` in r.yaml; did you mean `grow`\\? \\(stages: grow, count, total"),
            ("grow: 3", "section `grow` in r.yaml is 3, expected a mapping"),
            ("grow: {number: 1, number: 2}", "the key `number` appears twice"),
            ("grow: {output_dir: x}", "`output_dir` in section `grow` of r.yaml: remove it"),
            ("shared: {output_dir: x}", "`output_dir` in section `shared` of r.yaml: remove it"),
            ("count: {}\ngrow: {}", "`count` reads what `grow` writes, but stands before it: move the section `grow`"),
        ],
    )
    def test_refuses(self, text, message):
        with pytest.raises(RecipeError, match=message):
            load_recipe(write(text))

    def test_missing_file(self):
        write("grow: {}", "digits.yaml")
        with pytest.raises(RecipeError, match=r"`digit.yaml` does not exist; did you mean `digits.yaml`\?"):
            load_recipe("digit.yaml")

    def test_shared_option_that_no_stage_has(self):
        recipe = load_recipe(write("shared: {sede: 1}\ngrow: {}\ncount: {}"))
        with pytest.raises(RecipeError, match=r"`sede` in section `shared` of r.yaml.*did you mean `seed`\?"):
            check_shared(recipe, lambda stage, name: name in stage_actions(stage_parser(stage)))


class TestOptions:
    def test_yaml_1_1_float_without_a_dot(self):
        assert grow("rate: 1e-5").rate == 1e-5
        assert grow("weights: [1e-5, 2]").weights == [1e-5, 2.0]

    @pytest.mark.parametrize(
        ("section", "name", "value"),
        [
            ("rate: 2", "rate", 2.0),
            ("number: '4'", "number", 4),
            ("loud: false", "loud", False),
            ("loud: 'no'", "loud", False),
            ("limit: null", "limit", None),
            ("title: null", "title", None),
            ("strategy: steps", "strategy", "steps"),
            ("weights: 3", "weights", [3.0]),
            ("report_to: a", "report_to", "a"),
            ("report_to: [a, b]", "report_to", ["a", "b"]),
            ("extra: {a: {b: 1}}", "extra", {"a": {"b": 1}}),
            ("sources: [{model: x}, {model: y}]", "sources", [{"model": "x"}, {"model": "y"}]),
        ],
    )
    def test_accepts(self, section, name, value):
        assert getattr(grow(section), name) == value

    @pytest.mark.parametrize(
        ("section", "message"),
        [
            ("rate: [1]", r"`rate` in section `grow` of r.yaml: got \[1\] of type list, expected float"),
            ("rate: true", "`rate` .* got True of type bool, expected float"),
            ("rate: null", "`rate` .* got None of type NoneType, expected float"),
            ("number: abc", "`number` .* got 'abc', expected int"),
            ("number: 2.5", "`number` .* got 2.5 of type float, expected int"),
            ("loud: maybe", "`loud` .* got 'maybe', expected bool"),
            ("title: 1.10", r"`title` .* got 1.1 of type float, expected str or null \(in YAML, put .* in quotes\)"),
            ("strategy: no", "`strategy` .* got False of type bool, expected one of 'no', 'steps' .*quotes"),
            ("strategy: step", r"`strategy` .* got 'step', expected one of no, steps; did you mean `steps`\?"),
            ("weights: [a]", "`weights` .* got 'a', expected float"),
            ("number: {a: 1}", "`number` .* of type dict, expected int"),
            ("numbr: 1", r"unknown option `numbr` in section `grow` of r.yaml; did you mean `number`\?"),
            ("no_loud: true", "unknown option `no_loud` .* write `loud: false`"),
        ],
    )
    def test_refuses(self, section, message):
        recipe = load_recipe(write(f"grow: {{{section}}}"))
        with pytest.raises(RecipeError, match=message):
            stage_options(recipe, "grow", stage_parser("grow"))

    def test_section_wins_over_shared_and_flags_over_both(self):
        path = write("shared: {seed: 1, rate: 0.1, step: 9}\ngrow: {rate: 0.2, number: 5}\ncount: {}")
        args = parse_stage("grow", ["--recipe", path, "--number", "6", "--no_loud"])[0]
        assert (args.seed, args.rate, args.number, args.loud) == (1, 0.2, 6, False)
        assert parse_stage("count", ["--recipe", path])[0].step == 9


def test_a_stages_error_is_one_line_and_its_origin_a_file(monkeypatch, capsys):
    def fail(args):
        raise ValueError("`number` is too odd")

    monkeypatch.setattr("sys.argv", ["grow", "--output_dir", "out"])
    monkeypatch.setattr(stage_module("grow"), "main", fail)
    with pytest.raises(SystemExit) as end:
        run_stage("grow")
    assert end.value.code == 1
    assert capsys.readouterr().err == ("trl-diffusion-rank grow: error: `number` is too odd (out/traceback.txt)\n")
    assert "in fail" in Path("out/traceback.txt").read_text()
    monkeypatch.setattr(stage_module("grow"), "main", fake_stages.main)
    run_stage("grow")
    assert not Path("out/traceback.txt").exists(), "it worked at last"


class TestParseStage:
    def test_run_folder_fills_inputs_and_output(self):
        path = write("grow: {}\ncount: {}")
        args = parse_stage("count", ["--recipe", path])[0]
        assert (args.dataset_name, args.output_dir) == ("runs/r/grow", "runs/r/count")
        args = parse_stage("count", ["--recipe", path, "--run_dir", "x", "--dataset_name", "mine"])[0]
        assert (args.dataset_name, args.output_dir) == ("mine", "x/count")

    def test_an_input_stays_unset_when_the_recipe_lacks_the_stage(self):
        assert parse_stage("count", ["--recipe", write("count: {}")])[0].dataset_name is None

    def test_an_input_that_several_stages_can_fill(self, monkeypatch):
        monkeypatch.setattr(stage_module("total"), "INPUTS", {"counts": ("grow", "count")})
        for sections, stage in (("grow: {}", "grow"), ("count: {}", "count")):
            args = parse_stage("total", ["--recipe", write(f"{sections}\ntotal: {{}}")])[0]
            assert args.counts == f"runs/r/{stage}"
        both = write("grow: {}\ncount: {}\ntotal: {counts: runs/r/grow}")
        assert parse_stage("total", ["--recipe", both])[0].counts == "runs/r/grow"
        recipe = load_recipe(write("grow: {}\ncount: {}\ntotal: {}"))
        assert stage_inputs(recipe, "total", []) == {"counts": "count"}, "`count` has read `grow`"
        monkeypatch.setattr(stage_module("count"), "INPUTS", {})
        message = (
            "`grow` and `count`, and either could fill `counts` of the stage `total`: set `counts` in its section"
        )
        with pytest.raises(RecipeError, match=message):
            stage_inputs(recipe, "total", [])
        with pytest.raises(RecipeError, match="reads what `count` writes, but stands before it"):
            load_recipe(write("total: {}\ncount: {}"))

    def test_an_input_that_takes_all_the_recipe_has(self, monkeypatch):
        monkeypatch.setattr(stage_module("total"), "INPUTS", {"all_counts": ["grow", "count"]})
        monkeypatch.setattr(stage_module("count"), "INPUTS", {})
        for sections, folders in (("grow: {}", ["grow"]), ("count: {}\ngrow: {}", ["grow", "count"])):
            args = parse_stage("total", ["--recipe", write(f"{sections}\ntotal: {{}}")])[0]
            assert args.all_counts == [f"runs/r/{stage}" for stage in folders]
        assert parse_stage("total", ["--recipe", write("total: {}")])[0].all_counts is None
        with pytest.raises(RecipeError, match="reads what `count` writes, but stands before it"):
            load_recipe(write("grow: {}\ntotal: {}\ncount: {}"))

    def test_without_a_recipe(self):
        args = parse_stage("count", ["--output_dir", "out", "--step", "2"])[0]
        assert (args.step, args.output_dir, args.dataset_name) == (2, "out", None)

    @pytest.mark.parametrize(
        ("argv", "message"),
        [
            (["--output_dir", "o", "--numbr", "3"], "unknown option `--numbr`; did you mean `--number`?"),
            (["--output_dir", "o", "--numb", "3"], "unknown option `--numb`"),  # no abbreviations
            (["--output_dir", "o", "--numbr=3"], "unknown option `--numbr`; did you mean `--number`?"),
            (["--output_dir", "o", "stray"], "unexpected argument `stray`"),
            (["--config", "r.yaml"], "unknown option `--config`; recipes are given with `--recipe FILE`"),
            (["--output_dir", "o", "--number", "x"], "argument --number: invalid int value: 'x'"),
            (["--output_dir", "o", "--number", "-1"], "`number` is -1; it must be at least 0"),
            (["--recipe", "none.yaml"], "the recipe `none.yaml` does not exist"),
            (["--run_dir", "x"], "`--run_dir` is the run folder of a recipe"),
            ([], "the stage `grow` needs `--output_dir DIR` (or `--recipe FILE`"),
        ],
    )
    def test_usage_errors(self, argv, message, capsys):
        with pytest.raises(SystemExit) as end:
            parse_stage("grow", argv)
        assert end.value.code == 2
        assert f"trl-diffusion-rank grow: error: {message}" in capsys.readouterr().err


@pytest.mark.parametrize("stage", ["prompts", "generate", "score", "evaluate"])
def test_light_stages_parse_without_torch(stage):
    code = (
        "import sys\n"
        "from trl_diffusion_rank.recipe import stage_actions, stage_parser\n"
        f"assert 'output_dir' in stage_actions(stage_parser({stage!r}))\n"
        "heavy = {'torch', 'transformers', 'diffusers', 'datasets'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_real_training_options(monkeypatch):
    """Options of TrainingArguments: enums, unions, YAML's `no`."""
    monkeypatch.setitem(STAGES, "dpo", "trl_diffusion_rank.stages.dpo")
    parser = stage_parser("dpo")

    def options(section):
        return stage_options(load_recipe(write(f"dpo: {{{section}}}")), "dpo", parser)

    section = "learning_rate: 1e-5, eval_strategy: 'no', save_steps: 0.5, lora_target_modules: to_q, report_to: [a, b]"
    assert options(section + ", gradient_checkpointing_kwargs: {use_reentrant: false}, loss_type: [hinge]") == {
        "learning_rate": 1e-5,
        "eval_strategy": "no",
        "save_steps": 0.5,
        "lora_target_modules": ["to_q"],
        "report_to": ["a", "b"],
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
        "loss_type": ["hinge"],
    }
    for wrong, message in (
        ("eval_strategy: no", "`eval_strategy` .* got False of type bool, expected one of 'no', 'steps', .* quotes"),
        ("lerning_rate: 1", r"did you mean `learning_rate`\?"),
        ("no_gradient_checkpointing: true", "write `gradient_checkpointing: false`"),
    ):
        with pytest.raises(RecipeError, match=message):
            options(wrong)
