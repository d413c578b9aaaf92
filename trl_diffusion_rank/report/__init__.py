"""One self-contained page that says what a run did: `make_report`. Imports no torch."""

from trl_diffusion_rank.report.html import make_report


__all__ = ["make_report"]
