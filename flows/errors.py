"""The one public error type of the flow and its command line."""


class FlowError(Exception):
    """What a person can put right: the message says what was found, what was expected, what to do."""
