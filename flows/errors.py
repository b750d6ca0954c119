"""The public error type of the flows and the command line."""


class FlowError(Exception):
    """An error that the user can fix: the message says what was found, what was expected and what to do."""
