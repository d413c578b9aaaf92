"""Base against tuned: judges, statistics with intervals, and a picture."""
