"""The one base of every error that a user can cause; whoever shows errors prints its text and no traceback."""

BEGINNING, END = 1500, 300  # letters that are kept of a text that is longer


class GpunetError(ValueError):
    """`place: argument: expected X, got Y; what would be accepted` in one line; the log of a compiler may follow.

    The text may quote what a file or a command line holds. So what is not printable, which could end the line or speak
    to a terminal, is written as Python escapes it, and of a long text the middle is left out.
    """

    def __init__(self, text="", log=""):
        text = str(text)
        if not text.isprintable():
            text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
        if len(text) > BEGINNING + END:
            text = f"{text[:BEGINNING]} ... {text[-END:]}"
        super().__init__(f"{text}\n{log}" if log else text)
