"""Documents and their tables, from the records in benchmarks/results: `python -m benchmarks.reports.NAME`."""
