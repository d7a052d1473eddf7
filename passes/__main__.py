"""`python -m passes` is the command `fxpress`."""

from passes.commands.cli import app

app(prog_name="fxpress")
