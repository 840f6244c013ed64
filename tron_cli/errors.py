"""The two kinds of failure that a user sees, each as one sentence without a traceback."""


class InputError(Exception):
    """Wrong usage or bad input: what was expected, what came, where, what to do. Exit 2."""


class RunError(Exception):
    """A run that started properly and failed, such as a loss that is no longer finite. Exit 1."""
