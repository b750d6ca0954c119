"""Verdicts, tables, plots, HTML pages and model cards, made from metrics."""
