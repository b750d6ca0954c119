"""The one public error type of the stages."""


class TaskError(Exception):
    """Something that a person can put right: the message says what was found, what was expected, what to do."""
