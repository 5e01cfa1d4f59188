"""The command line: parse, call pipeline, print. Each job is also `python -m jobs.NAME`."""
