"""From metrics to verdicts, tables, plots, pages and cards."""
