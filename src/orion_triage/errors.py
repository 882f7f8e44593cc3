"""The errors that reach a user: one sentence on what is wrong, one on what to do."""


class OrionError(Exception):
    """A mistake or an obstacle that the user can act on.

    `message` names the file, line and value; `fix` says what to do about it. The command line prints
    both and exits with status 1; library callers catch this one class.
    """

    def __init__(self, message: str, fix: str = "") -> None:
        super().__init__(message if not fix else f"{message} {fix}")
        self.message = message
        self.fix = fix


class FrameError(OrionError):
    """A frame that cannot be used: missing, damaged or of another size. Callers refuse it and go on."""


class RecordError(OrionError):
    """A dataset line that breaks the record format."""


class AnswerError(OrionError):
    """The server has an answer that it cannot hand over: its bytes are no UTF-8. The next question may go well."""


class ServerError(OrionError):
    """The llama.cpp server did not answer as it must."""
