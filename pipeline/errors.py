"""Errors that are the user's to mend: each message names the file, key or value and what to do."""

import signal

from pipeline.credentials import redacted


class UserError(Exception):
    """Bad input. The command line prints the message as one paragraph, no traceback, and exits with `exit_code`.

    Passwords in addresses are taken out of the message: it goes to terminals, logs and run folders.
    """

    exit_code = 2

    def __init__(self, message: str) -> None:
        super().__init__(redacted(message))


class Interrupted(BaseException):
    """SIGINT or SIGTERM (`signal_number`). Not an Exception, so that nothing on the way takes it for a failure."""

    def __init__(self, signal_number: int = signal.SIGINT) -> None:
        super().__init__(signal_number)
        self.signal_number = signal_number


class ConfigError(UserError):
    """A configuration file or override that does not describe an experiment."""


class RunTaken(ConfigError):
    """Another process is working on a run of this name."""


class DataError(UserError):
    """A data set, shard or image that is missing, damaged or too small for the task."""


class Unfinished(UserError):
    """Work ended early; the same command goes on from where it was."""

    exit_code = 3


class TrackingError(UserError):
    """An MLflow server, run or registered model that cannot be reached or found."""


class ClusterError(UserError):
    """A Ray cluster or a job on it that cannot be reached or found."""


class TrainingStopped(UserError):
    """Training ended early for a reason that a rerun of the same command will not mend by itself."""

    exit_code = 3


class StopRequested(TrainingStopped):
    """Training ended early because it was asked to, after a checkpoint at the step it had reached."""


class WorkerLost(TrainingStopped):
    """A worker process died; starting the workers again goes on from the last checkpoint."""
