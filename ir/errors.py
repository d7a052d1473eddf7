"""The errors users meet: what is wrong, where, and what to do about it."""


class FxpressError(Exception):
    """Base of every error that fxpress raises on purpose.

    Args:
        what: one sentence saying what is wrong.
        where: the place: a node with its module path, a file, an option.
        remedy: what the reader can do about it.
    """

    def __init__(self, what: str, *, where: str = "", remedy: str = "") -> None:
        self.what, self.where, self.remedy = what, where, remedy
        super().__init__(what + (f"\n  where: {where}" if where else "") + (f"\n  remedy: {remedy}" if remedy else ""))


class OptionError(FxpressError):
    """A pass, preset, backend, encoding or option that does not exist or has a value that is not allowed."""


class DataError(FxpressError):
    """Data that cannot be used: weights or calibration that are missing, empty, misnamed, misshapen or not finite."""


class CaptureError(FxpressError):
    """A model that `torch.export` cannot turn into a graph."""


class GraphError(FxpressError):
    """A graph that breaks a rule of the normal form."""


class PassError(FxpressError):
    """A pass failed or broke the promise of its effect; the cause is chained."""


class CoverageError(FxpressError):
    """The result covers less than the recipe asked for."""


class BackendError(FxpressError):
    """A backend cannot lower the graph, or its result failed a gate."""


class RanksError(FxpressError):
    """Of processes that work together, one has ended, does not answer, or was given other things than the rest."""
