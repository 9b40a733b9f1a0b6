"""The errors that a user can fix. Each message is one line: what was found, the rule with its numbers, the fix."""


class EcarError(Exception):
    """Base of the user-fixable errors; the command line prints the message alone and exits with 1."""


class ConfigError(EcarError):
    """The configuration, or a value on the command line, breaks a rule."""


class DataError(EcarError):
    """An image, a shard or a manifest is missing, damaged, or not what the run expects."""


class CheckpointError(EcarError):
    """A checkpoint is missing, damaged, or belongs to a different model."""


class TrainingError(EcarError):
    """A run did not do what it was asked to do."""


class FruitlessError(EcarError):
    """The run fails repeatedly without progress: exit status 93, which tells a scheduler not to requeue."""


class NodeError(EcarError):
    """Some nodes are unfit, the others are fine: exit status 75, because the same command may run without them."""


def reason_of(error: Exception) -> str:
    """What went wrong, for a message that already names the file: an OSError without its number and path."""
    reason = error.strerror if isinstance(error, OSError) else None
    return reason or str(error) or type(error).__name__
