"""
The report's plots, as Plotly figures.

Colours are CSS variables: the page puts in their values when it draws, so that plots follow its light or dark theme.
Those of series, `--c1` and on, are Okabe and Ito's (https://jfly.uni-koeln.de/color/), which colour-blind people can
tell apart.
"""

from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np
import plotly.graph_objects as go

from trl_diffusion_rank.report.dataset import Lists
from trl_diffusion_rank.report.pictures import evenly


COLORS = [f"var(--c{number})" for number in range(1, 7)]
DASHES = ("solid", "dash", "dot", "dashdot")
SYMBOLS = ("circle", "square", "diamond", "triangle-up")
TEXT, RULE, BACKGROUND = "var(--text)", "var(--rule)", "var(--bg)"

# Points of a curve: more than there are pixels across
POINTS = 1500


def figure(height: int, **layout: Any) -> go.Figure:
    """An empty figure in the report's style."""
    title = {"font": {"size": 13}, "standoff": 8}
    axis = {
        "title": title,
        "gridcolor": RULE,
        "zerolinecolor": RULE,
        "linecolor": RULE,
        "automargin": True,
        "ticks": "",
    }
    made = go.Figure(
        layout={
            "template": "none",
            "height": height,
            "margin": {"l": 8, "r": 12, "t": 8, "b": 8},
            "paper_bgcolor": "rgba(0,0,0,0)",
            "plot_bgcolor": "rgba(0,0,0,0)",
            "font": {"family": "system-ui, sans-serif", "size": 13, "color": TEXT},
            "xaxis": axis,
            "yaxis": axis,
            "legend": {"orientation": "h", "x": 0, "y": 1.02, "xanchor": "left", "yanchor": "bottom"},
            "hoverlabel": {"bgcolor": BACKGROUND, "bordercolor": RULE, "font": {"color": TEXT}},
        }
    )
    return made.update_layout(**layout)


def label(text: Any) -> str:
    """A text of the data: Plotly would read `<b>` in it as bold."""
    return escape(str(text), quote=False)


# The comparison --------------------------------------------------------


def metric_name(result: dict[str, Any]) -> str:
    """`good` of the judge `digits` is `digits good`, and `pickscore` of `pickscore` is itself."""
    return " ".join(dict.fromkeys(part for part in (result["judge"], result["metric"]) if part))


def forest(results: list[dict[str, Any]], rows: str = "metric") -> go.Figure:
    """
    Win rates with their intervals; a line at 50 %, where nothing is won.

    Args:
        results: those of `metrics.json` that have a win rate.
        rows: `metric` or `category`: what each row of the figure is; adapters and numbers of steps share it.
    """
    results = sorted(results, key=lambda result: not result["decides"])  # first what decides
    names = [metric_name(result) if rows == "metric" else str(result["category"]) for result in results]
    lines = list(dict.fromkeys(names))
    adapters = list(dict.fromkeys(result["adapter"] for result in results))
    steps = list(dict.fromkeys(result["num_inference_steps"] for result in results))
    series = [(adapter, count) for adapter in adapters for count in steps]
    apart = min(0.22, 0.7 / len(series))

    made = figure(70 + len(lines) * (22 + 16 * len(series)), hovermode="closest")
    for number, (adapter, count) in enumerate(series):
        own = [
            (name, result)
            for name, result in zip(names, results, strict=True)
            if (result["adapter"], result["num_inference_steps"]) == (adapter, count)
        ]
        rates = [100 * result["win_rate"] for _, result in own]
        low, high = np.transpose([[100 * bound for bound in result["win_rate_interval"]] for _, result in own])
        # Colours tell adapters apart where there are several, else numbers of steps
        color, symbol = (adapters.index(adapter), steps.index(count)) if len(adapters) > 1 else (number, number)
        shape = SYMBOLS[symbol % len(SYMBOLS)]
        made.add_scatter(
            x=rates,
            y=[-lines.index(name) - (number - (len(series) - 1) / 2) * apart for name, _ in own],
            error_x={
                "type": "data",
                "symmetric": False,
                "array": (high - rates).tolist(),
                "arrayminus": (rates - low).tolist(),
                "thickness": 1.5,
                "width": 3,
            },
            mode="markers",
            marker={
                "color": COLORS[color % len(COLORS)],
                "size": 9,
                "symbol": [shape if result["decides"] else f"{shape}-open" for _, result in own],
            },
            name=label(f"{adapter}, {count} steps" if len(adapters) > 1 else f"{count} steps"),
            text=[
                f"<b>{label(name)}</b>, {label(adapter)}, {count} steps<br>wins {rate:.1f} % [{a:.1f}, {b:.1f}]"
                for (name, _), rate, a, b in zip(own, rates, low, high, strict=True)
            ],
            hoverinfo="text",
            showlegend=len(series) > 1,
        )
    bounds = [100 * bound for result in results for bound in result["win_rate_interval"]]
    made.update_xaxes(
        ticksuffix=" %",
        title_text="pairs won against base",
        zeroline=False,
        range=[min(48, *bounds) - 1, max(52, *bounds) + 1],
    )
    made.update_yaxes(
        tickvals=[-line for line in range(len(lines))],
        ticktext=[label(name) for name in lines],
        range=[0.6 - len(lines), 0.6],
        showgrid=False,
        zeroline=False,
    )
    made.add_vline(x=50, line={"color": TEXT, "width": 1, "dash": "dot"})
    return made


# Training --------------------------------------------------------------


@dataclass(frozen=True)
class Panel:
    """A small plot of some entries of the log: key -> what it is called."""

    title: str
    series: dict[str, str]
    note: str = ""
    from_zero: bool = False


PANELS = (
    Panel("Loss", {"loss": "loss"}),
    Panel(
        "Rewards",
        {"rewards/margins": "margin", "rewards/chosen": "best image", "rewards/rejected": "worst image"},
        "How much less than the reference the model errs, times beta/2. A margin of 1 is a clear preference.",
    ),
    Panel(
        "Order",
        {"rewards/accuracies": "accuracy", "rewards/kendall_tau": "Kendall's tau", "rewards/saturation": "saturation"},
        "How well rewards follow the ranks, and the share of pairs that are no longer learnt from.",
    ),
    Panel(
        "Errors against the reference",
        {"error/chosen_delta": "best image", "error/rejected_delta": "worst image"},
        "Good is the best image's at or below zero while the worst's rises; both rising on and on is displacement.",
    ),
    Panel(
        "Errors", {"error/chosen": "best image", "error/rejected": "worst image"}, "Of the noise that was predicted."
    ),
    Panel("Behaviour cloning", {"nll_loss": "best image"}),
    Panel(
        "Discriminator in the loss",
        {
            "adversarial/loss": "loss",
            "adversarial/score_real": "score, real",
            "adversarial/score_fake": "score, drawn",
            "adversarial/accuracy": "accuracy",
            "adversarial/weight": "weight",
        },
    ),
    Panel("Real image first", {"top1": "highest score", "accuracy": "pairs"}, "Share of rows, and of their pairs."),
    Panel("Scores", {"mean_reward": "mean", "min_reward": "lowest", "max_reward": "highest", "margin": "margin"}),
    Panel("Gradient norm", {"grad_norm": "gradient norm"}, from_zero=True),
    Panel("Learning rate", {"learning_rate": "learning rate"}, from_zero=True),
    Panel(
        "Skipped steps", {"skipped_steps": "skipped so far"}, "Steps whose gradient was not finite.", from_zero=True
    ),
)


def curve(log: list[dict[str, Any]], key: str) -> tuple[list[int], list[float | None]]:
    """Steps and values of one entry of the log; long ones are thinned evenly. None where it was not finite."""
    points = [(entry["step"], entry[key]) for entry in log if key in entry]
    points = [points[place] for place in evenly(len(points), POINTS)]
    return [step for step, _ in points], [value for _, value in points]


def displacement_step(log: list[dict[str, Any]]) -> int | None:
    """The step at which displacement was first found."""
    return next((entry["step"] for entry in log if entry.get("displacement")), None)


def panel_figure(log: list[dict[str, Any]], panel: Panel) -> go.Figure | None:
    """
    One panel's curves, dotted where they are of the evaluation set, and a dashed line where displacement was found;
    None when the log has none of them.
    """
    made = figure(240, hovermode="x unified")
    for number, (key, name) in enumerate(panel.series.items()):
        for entry, suffix, style in ((key, "", "lines"), (f"eval_{key}", ", evaluation", "lines+markers")):
            steps, values = curve(log, entry)
            if any(value is not None for value in values):
                made.add_scatter(
                    x=steps,
                    y=values,
                    mode="markers" if len(steps) == 1 else style,
                    line={"color": COLORS[number % len(COLORS)], "width": 2, "dash": "dot" if suffix else "solid"},
                    name=f"{name}{suffix}",
                )
    if not made.data:
        return None
    made.update_layout(showlegend=len(made.data) > 1)
    made.update_xaxes(title_text="step", range=[0, log[-1]["step"]], zeroline=False)
    made.update_yaxes(exponentformat="power", rangemode="tozero" if panel.from_zero else "normal")
    displaced = displacement_step(log)
    if displaced is not None:
        made.add_vline(x=displaced, line={"color": COLORS[1], "width": 1.5, "dash": "dash"})
    return made


# The dataset -----------------------------------------------------------


def histogram(lists: Lists, scorer: str) -> go.Figure:
    """Of each source, how its images' scores are distributed: a line through the middles of the bins."""
    edges, shares = lists.histograms(scorer)
    middles = ((edges[:-1] + edges[1:]) / 2).tolist()
    made = figure(260, hovermode="x unified")
    for number, (source, share) in enumerate(shares.items()):
        made.add_scatter(
            x=middles,
            y=(100 * share).tolist(),
            mode="lines",
            line={
                "shape": "hvh",
                "width": 2,
                "color": COLORS[number % len(COLORS)],
                "dash": DASHES[number // len(COLORS) % len(DASHES)],
            },
            name=label(source),
        )
    made.update_layout(showlegend=len(shares) > 1)
    made.update_xaxes(title_text=label(scorer), zeroline=False, hoverformat=".4g")
    made.update_yaxes(title_text="images", ticksuffix=" %", rangemode="tozero", hoverformat=".1f")
    return made
