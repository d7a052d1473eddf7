"""`python -m passes` is the command `fxpress`."""

from passes.cli import app

app(prog_name="fxpress")
