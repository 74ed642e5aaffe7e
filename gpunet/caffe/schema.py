"""Holds messages to a schema: which fields there are, of what type; everything else is refused by name and line.

A schema is {field: kind}: WHOLE, NUMBER, TEXT, FLAG, MESSAGE, a tuple of the words that an enumeration has, another
schema, or a list of one of these where the field may come more than once.
"""

from difflib import get_close_matches

from gpunet.caffe.prototxt import Message, Word
from gpunet.errors import GpunetError

WHOLE, NUMBER, TEXT, FLAG = "a whole number", "a number", "a text in quotes", "true or false"
MESSAGE = "{ ... }"  # read later, by a schema of its own
TYPES = {WHOLE: int, NUMBER: int | float, TEXT: str, MESSAGE: Message}
FLAGS = {"true": True, "t": True, "True": True, "false": False, "f": False, "False": False}


class Values:
    """The values of a message by field; `get` and `all` return them, `fail` says where one was and what is wrong.

    owner: how messages name what it describes, such as "layer 'conv1'"; name: the message's own, if it is inside that.
    """

    def __init__(self, message, schema, owner="", name=""):
        self.place, self.line, self.owner, self.name, self.schema = message.place, message.line, owner, name, schema
        self.values, self.lines = {}, {}
        for field in message.fields:
            kind = schema.get(field.name)
            if kind is None:
                self._unknown(field)
            if field.name in self.values and not isinstance(kind, list):
                self.fail(f"'{field.name}' is given a second time", line=field.line)
            value = self._value(field, kind[0] if isinstance(kind, list) else kind)
            self.values.setdefault(field.name, []).append(value)
            self.lines.setdefault(field.name, field.line)

    def __contains__(self, name):
        return name in self.values

    def get(self, name, default=None):
        """Return the value of a field that may come once."""
        return self.values[name][0] if name in self.values else default

    def all(self, name):
        """Return the values of a field, in order."""
        return self.values.get(name, [])

    def inner(self, name):
        """Return the message in a field; one without fields where it is not given."""
        return self.get(name) or Values(Message(self.place, self.line, []), self.schema[name], self.owner, name)

    def fail(self, text, name=None, line=None):
        """Raise GpunetError for a field, or for all of it."""
        owner = f"{self.owner}: " if self.owner else ""
        raise GpunetError(f"{self.place}:{line or self.lines.get(name, self.line)}: {owner}{text}")

    def only(self, name, *allowed, why="gpunet has nothing like it"):
        """Refuse a field whose value is none of these; the first is the default."""
        if (value := self.get(name, allowed[0])) not in allowed:
            show = str if isinstance(self.schema[name], tuple) else shown
            self.fail(f"{name}: expected {' or '.join(map(show, allowed))}, got {show(value)}; {why}", name)

    def _unknown(self, field):
        close = get_close_matches(field.name, self.schema, 1)
        hint = f"did you mean '{close[0]}'? " if close else ""
        inside = f" in {self.name}" if self.name else ""
        known = ", ".join(self.schema) or "none"
        self.fail(f"unknown field '{shortened(field.name)}'{inside}; {hint}known: {known}", line=field.line)

    def _value(self, field, kind):
        """Return a field's value as the kind says."""
        value, name = field.value, field.name
        if isinstance(kind, dict):
            if isinstance(value, Message):
                return Values(value, kind, self.owner, name)
            expected = MESSAGE
        elif isinstance(kind, tuple):
            if isinstance(value, Word | str) and str(value) in kind:
                return str(value)
            expected = f"one of {', '.join(kind)}"
        elif kind == FLAG:
            if isinstance(value, Word) and value.name in FLAGS:
                return FLAGS[value.name]
            if type(value) is int and value in (0, 1):
                return bool(value)
            expected = kind
        else:
            if isinstance(value, TYPES[kind]):
                return value
            expected = kind
        got = MESSAGE if isinstance(value, Message) else shown(value)
        return self.fail(f"{name}: expected {expected}, got {got}", line=field.line)


def shown(value):
    """Return a value as a .prototxt writes it, shortened."""
    if isinstance(value, bool):
        return str(value).lower()
    return f'"{shortened(value)}"' if isinstance(value, str) else shortened(str(value))


def shortened(text, most=60):
    """Return a text of a file as a message may show it."""
    text = text if text.isprintable() else ascii(text)[1:-1]
    return text if len(text) <= most else f"{text[:most]}..."
