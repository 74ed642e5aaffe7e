"""The one base of every error that a user can cause; whoever shows errors prints its text and no traceback."""


class GpunetError(ValueError):
    """`place: argument: expected X, got Y; what would be accepted` in one line."""
