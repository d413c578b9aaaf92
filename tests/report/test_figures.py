import json

import numpy as np
import pytest
import tiny_run

from trl_diffusion_rank.report import figures
from trl_diffusion_rank.report.dataset import Lists
from trl_diffusion_rank.report.run import read_run


def as_json(figure) -> dict:
    return json.loads(figure.to_json())


PANELS = {panel.title: panel for panel in figures.PANELS}


def test_forest_shows_the_win_rates_with_their_intervals():
    results = [
        tiny_run.result("dpo", steps, metric, metric == "good") for steps in (4, 20) for metric in ("clean", "good")
    ]
    figure = as_json(figures.forest(results))
    four, twenty = figure["data"]
    assert [four["name"], twenty["name"]] == ["4 steps", "20 steps"]
    # The metric that decides comes first, and is filled
    assert figure["layout"]["yaxis"]["ticktext"] == ["digits good", "digits clean"]
    assert four["marker"]["symbol"] == ["circle", "circle-open"]
    assert four["x"] == pytest.approx([70.4, 50])
    assert four["error_x"]["array"] == pytest.approx([5, 5])
    assert four["error_x"]["arrayminus"] == pytest.approx([4, 4])
    assert twenty["x"] == pytest.approx([72, 50])
    assert figure["layout"]["shapes"][0]["x0"] == 50
    low, high = figure["layout"]["xaxis"]["range"]
    assert low < 46 < 77 < high


def test_forest_of_categories_and_adapters():
    results = [
        {**tiny_run.result(adapter, 4, "good", True), "category": category}
        for category in ("Animals", "a<b>")
        for adapter in ("dpo", "cpo")
    ]
    figure = as_json(figures.forest(results, "category"))
    assert figure["layout"]["yaxis"]["ticktext"] == ["Animals", "a&lt;b&gt;"]
    assert [trace["name"] for trace in figure["data"]] == ["dpo, 4 steps", "cpo, 4 steps"]
    assert len({trace["marker"]["color"] for trace in figure["data"]}) == 2


def test_the_interval_of_50_percent_is_always_in_view():
    results = [tiny_run.result("dpo", 4, "good", True)]
    low, high = as_json(figures.forest(results))["layout"]["xaxis"]["range"]
    assert low < 50 < high


def test_curves_are_what_was_logged(tmp_path):
    tiny_run.write_training(tmp_path, displaced=120)
    log = read_run(tmp_path).stages["dpo"].log
    best, worst = as_json(figures.panel_figure(log, PANELS["Errors against the reference"]))["data"]
    assert best["x"] == worst["x"] == list(range(20, 201, 20))
    assert best["y"] == pytest.approx([step / 2000 for step in range(20, 201, 20)])
    assert worst["y"] == pytest.approx([step / 1000 for step in range(20, 201, 20)])
    loss, evaluation = as_json(figures.panel_figure(log, PANELS["Loss"]))["data"]
    assert loss["y"][0] == pytest.approx(0.95)
    assert (evaluation["name"], evaluation["x"], evaluation["y"]) == ("loss, evaluation", [200], [0.6])


def test_displacement_is_marked_in_all_panels(tmp_path):
    tiny_run.write_training(tmp_path, displaced=120)
    log = read_run(tmp_path).stages["dpo"].log
    assert figures.displacement_step(log) == 120
    for title in ("Loss", "Rewards", "Errors against the reference"):
        (line,) = as_json(figures.panel_figure(log, PANELS[title]))["layout"]["shapes"]
        assert line["x0"] == line["x1"] == 120
    healthy = [{key: value for key, value in entry.items() if key != "displacement"} for entry in log]
    assert figures.displacement_step(healthy) is None
    assert "shapes" not in as_json(figures.panel_figure(healthy, PANELS["Loss"]))["layout"]


def test_panels_without_anything_to_show():
    log = [{"step": 1, "loss": None}, {"step": 2, "loss": None}]
    assert figures.panel_figure(log, PANELS["Loss"]) is None
    assert figures.panel_figure(log, PANELS["Discriminator in the loss"]) is None


def test_what_is_not_finite_is_a_gap():
    log = [{"step": 1, "loss": 1.0}, {"step": 2, "loss": None}, {"step": 3, "loss": 2.0}]
    (trace,) = as_json(figures.panel_figure(log, PANELS["Loss"]))["data"]
    assert trace["y"] == [1.0, None, 2.0]


def test_long_curves_are_thinned_between_their_ends():
    log = [{"step": step, "loss": float(step)} for step in range(10_000)]
    steps, values = figures.curve(log, "loss")
    assert len(steps) == figures.POINTS
    assert (steps[0], steps[-1], values[-1]) == (0, 9999, 9999.0)


def test_histogram_is_of_the_lists():
    lists = Lists("score", np.array([4]), np.array(["a", "a", "<i>", "<i>"]), None, {"x": np.array([0, 1, 1, 2.0])})
    figure = as_json(figures.histogram(lists, "x"))
    edges, shares = lists.histograms("x")
    assert [trace["name"] for trace in figure["data"]] == ["&lt;i&gt;", "a"]
    assert figure["data"][1]["y"] == pytest.approx(100 * shares["a"])
    assert figure["data"][0]["x"] == pytest.approx((edges[1:] + edges[:-1]) / 2)
