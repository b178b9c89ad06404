"""The error of a training that must stop."""


class TrainingError(Exception):
    """Training cannot continue: a loss, a gradient or a weight is NaN or Inf. Exit code 1."""
