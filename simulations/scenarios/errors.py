"""Errors of scenario files."""

__all__ = ["ScenarioError"]


class ScenarioError(ValueError):
    """A scenario cannot be read, or a key of it cannot be used.

    Args:
        key: the key in question, with dots (``clients.count``); empty for the file as a whole.
        problem: what is wrong.
        remedy: what to do about it.
    """

    def __init__(self, key: str, problem: str, remedy: str) -> None:
        super().__init__(f"{key + ': ' if key else ''}{problem}; {remedy}")
        self.key, self.problem, self.remedy = key, problem, remedy
