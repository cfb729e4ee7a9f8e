"""`python -m pipelines`: the same as `ldm-batch`."""

from pipelines.cli import main

main()
