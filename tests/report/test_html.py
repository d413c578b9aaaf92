import json
import re
import subprocess
import sys

import pytest
import tiny_run

from trl_diffusion_rank import cli
from trl_diffusion_rank.recipe import RecipeError
from trl_diffusion_rank.report import html, make_report
from trl_diffusion_rank.report.run import read_run


SECTIONS = ["summary", "comparison", "pairs", "samples", "training", "dataset", "discriminator", "made"]


def sections_of(page: str) -> list[str]:
    assert re.findall(r'<li><a href="#(\w+)">', page) == re.findall(r'<section id="(\w+)">', page)
    return re.findall(r'<section id="(\w+)">', page)


def data_of(page: str, name: str):
    return json.loads(re.search(rf'<script type="application/json" id="{name}">(.*?)</script>', page, re.S)[1])


@pytest.fixture(scope="module")
def page(full_run, tmp_path_factory) -> str:
    path = make_report(full_run, tmp_path_factory.mktemp("report") / "new" / "page.html")
    return path.read_text(encoding="utf-8")


def test_all_sections(page):
    assert sections_of(page) == SECTIONS


def test_nothing_is_loaded_and_plotly_stands_in_it_once(page):
    assert "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'" in page
    assert not re.search(r'<(script|img|link|iframe)[^>]*(src|href)="(?!data:)', page)
    assert page.count("plotly.js v") == 1


def test_texts_of_the_data_are_no_tags(page):
    assert "<script>document.title" not in page
    assert "<b>bold</b>" not in page
    assert data_of(page, "pairs-data")["prompts"][:4] == tiny_run.NASTY
    assert "a&lt;b&gt;" in page  # a source


def test_pairs_and_their_images_belong_together(page):
    data = data_of(page, "pairs-data")
    assert data["models"] == ["base", "dpo", "cpo"]
    assert len(data["pairs"]) == 48
    prompt, steps, index, seed, scores = data["pairs"][-1]
    assert (data["prompts"][prompt], data["categories"][prompt]) == ("prompt number 11", "People")
    assert (steps, index, seed) == (20, 1, str(2**62 + 23))
    assert scores[0] == [0.25, 0.36, 0.47]
    chunks = re.findall(r'<script type="text/plain" id="images-\d+">(.*?)</script>', page, re.S)
    assert sum(len(chunk.split("\n")) for chunk in chunks) == 48 * 3


def test_no_path_of_the_machine_and_no_token(page, tmp_path):
    assert "somebody" not in page
    assert "tiny" in page


def test_figures_times_machine_and_recipe(page):
    assert len(data_of(page, "plots")) == page.count('class="plot"')
    assert "2 × Some GPU (80 GB); Some CPU, 8 cores, 31.2 GB of memory; Linux x86_64, Python 3.11.7" in page
    assert "torch <b>2.13.0</b>" in page
    assert "model_name_or_path: tiny" in page
    assert 'href="https://huggingface.co/me/x"' in page


def test_stages_on_different_machines(tmp_path):
    tiny_run.stage(tmp_path, "generate")
    tiny_run.stage(tmp_path, "score")
    folder = tiny_run.stage(tmp_path, "dpo")
    record = json.loads((folder / "stage.json").read_text())
    record["hardware"] |= {"gpus": [], "cpu": "Other CPU"}
    record["versions"]["torch"] = "2.14.0"
    tiny_run.write_json(folder / "stage.json", record)
    run = read_run(tmp_path)
    assert html.versions(run) == [("trl", "1.16.0"), ("torch", "2.13.0 (generate, score); 2.14.0 (dpo)")]
    assert "(generate, score); no GPU; Other CPU" in html.hardware(run)


def test_a_run_that_has_just_begun(tmp_path):
    tiny_run.stage(tmp_path, "prompts", status="running")
    page = make_report(tmp_path).read_text()
    assert sections_of(page) == ["summary", "made"]
    assert "prompts is not finished" in page
    assert "plotly.js v" not in page  # five megabytes for nothing


def test_in_the_middle_of_training(tmp_path):
    tiny_run.write_score(tmp_path)
    tiny_run.write_training(tmp_path, "dpo", status="running")
    with open(tmp_path / "dpo" / "log_history.jsonl", "a") as file:
        file.write('{"step": 220, "lo')
    page = make_report(tmp_path).read_text()
    assert sections_of(page) == ["summary", "samples", "training", "dataset", "made"]
    assert "Its last log is of step 200 of 200" in page


def test_the_folder_of_one_stage(full_run, tmp_path):
    page = make_report(full_run / "evaluate", tmp_path / "page.html").read_text()
    assert sections_of(page) == ["summary", "comparison", "pairs", "made"]


def test_without_categories(tmp_path):
    images = [tiny_run.noise(16, 0)]
    tiny_run.write_evaluate(tmp_path, ["a", "b"], images, adapters=("dpo",), steps=(4,), categories=(None,))
    page = make_report(tmp_path).read_text()
    assert "By category" not in page
    assert data_of(page, "pairs-data")["categories"] == [None, None]


def test_made_again_in_place(tmp_path):
    tiny_run.write_discriminator(tmp_path)
    first = make_report(tmp_path)
    assert first == tmp_path / "report.html"
    tiny_run.write_score(tmp_path)
    make_report(tmp_path)
    assert sections_of(first.read_text()) == ["summary", "dataset", "discriminator", "made"]


def test_never_half_a_file(tmp_path, monkeypatch):
    tiny_run.write_discriminator(tmp_path)
    path = make_report(tmp_path)
    before = path.read_text()

    def full_disk(self, text, encoding):
        self.touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_text", full_disk)
    with pytest.raises(OSError, match="No space left"):
        make_report(tmp_path)
    assert path.read_text() == before
    assert list(tmp_path.glob("*.tmp")) == []


def test_what_does_not_fit_is_said(tmp_path, monkeypatch):
    images = [tiny_run.noise(112, seed) for seed in range(2)]
    tiny_run.write_evaluate(tmp_path, [f"prompt {row}" for row in range(30)], images, 1, ("dpo",), (4,))
    monkeypatch.setattr(html, "PAGE_BYTES", 5_150_000)
    page = make_report(tmp_path).read_text()
    shown = int(re.search(r"Shown are (\d+) of 30 prompts, evenly taken", page)[1])
    assert 2 <= shown < 30
    assert len(data_of(page, "pairs-data")["prompts"]) == shown
    assert len(page.encode()) < 5_150_000


@pytest.mark.slow
def test_500_prompts_of_4_images_are_below_30_megabytes(tmp_path):
    run = tiny_run.write_run(tmp_path / "run")
    # Noise at the size of a thumbnail is the hardest there is to compress
    images = [tiny_run.noise(224, seed, block=2) for seed in range(16)]
    prompts = [f"prompt {row}, of the length that prompts have, with the words that they have" for row in range(500)]
    tiny_run.write_evaluate(run, prompts, images, seeds=4, adapters=("dpo",), steps=(4,))
    path = make_report(run)
    assert 20_000_000 < path.stat().st_size < 30_000_000


# The command -----------------------------------------------------------


def test_the_command(tmp_path, capsys):
    tiny_run.write_discriminator(tmp_path)
    assert cli.main(["report", str(tmp_path), "--output", str(tmp_path / "other.html")]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "other.html")
    assert (tmp_path / "other.html").read_text().startswith("<!doctype html>")


def test_the_command_s_errors(tmp_path, capsys):
    assert cli.main(["report", str(tmp_path / "none")]) == 2
    assert "nothing to report in" in capsys.readouterr().err
    with pytest.raises(RecipeError, match="nothing to report"):
        make_report(tmp_path)
    tiny_run.write_discriminator(tmp_path)
    assert cli.main(["report", str(tmp_path), "--output", str(tmp_path)]) == 2
    assert (
        "is a folder, where the file of the report was expected; `--output` names another" in capsys.readouterr().err
    )


def test_imports_nothing_heavy(full_run, tmp_path):
    code = (
        "import sys\n"
        "from trl_diffusion_rank import cli\n"
        f"assert cli.main(['report', {str(full_run)!r}, '--output', {str(tmp_path / 'page.html')!r}]) == 0\n"
        "heavy = {'torch', 'transformers', 'diffusers', 'trl'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
