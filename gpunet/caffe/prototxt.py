"""Reads protobuf's text format, the language of Caffe's .prototxt files. Knows its grammar, no schema.

    message = parse(text, "net.prototxt")

A message is a list of fields in order, each with its line, so that whoever gives them meaning can say where it was.
Nothing is imported, evaluated or compiled; time and memory are proportional to the text, which has at most LIMIT
characters and DEPTH messages within each other.
"""

import math
import re
from dataclasses import dataclass

from gpunet.errors import GpunetError

LIMIT = 1 << 20  # characters; the largest published networks have some 100,000
DEPTH = 32

TOKEN = re.compile(
    r"""[ \t\r\n\f\v]+ | \#[^\n]*
    | (?P<name> [A-Za-z_][A-Za-z0-9_]*)
    | (?P<number> (?:0[xX][0-9a-fA-F]+ | (?:[0-9]+\.?[0-9]* | \.[0-9]+)(?:[eE][+-]?[0-9]+)?[fF]?) (?![\w.]))
    | (?P<text> "(?:[^"\\\n]|\\[^\n])*" | '(?:[^'\\\n]|\\[^\n])*')
    | (?P<mark> [{}<>\[\]:;,-])""",
    re.VERBOSE,
)
STRANGE = re.compile(r".[^\s{}<>\"']{,39}", re.DOTALL)  # what to show of what is no token
ESCAPE = re.compile(r"\\(?:([0-7]{1,3})|[xX]([0-9a-fA-F]{1,2})|(.))", re.DOTALL)
ESCAPED = {"n": "\n", "t": "\t", "r": "\r", "a": "\a", "b": "\b", "f": "\f", "v": "\v"}
CLOSING = {"{": "}", "<": ">"}


@dataclass(frozen=True)
class Word:
    """A value without quotes: true, LMDB, WITHIN_CHANNEL."""

    name: str

    def __str__(self):
        return self.name


@dataclass
class Field:
    """One `name: value` or `name { ... }`: value is an int, a float, a str, a Word, or a Message."""

    name: str
    value: object
    line: int


@dataclass
class Message:
    """Fields in the order of the file, which is `place`; `line` is where it opens."""

    place: str
    line: int
    fields: list


def parse(text, place):
    """Return the Message that a text is; GpunetError "place:line: ..." where it is none."""
    if len(text) > LIMIT:
        raise GpunetError(f"{place}: expected at most {LIMIT:,} characters, got {len(text):,}")
    return _Parser(text, place).message(None, 1, 0)


class _Parser:
    """Recursive descent, one token ahead: (kind, text, line), of kind name, number, text, mark or end."""

    def __init__(self, text, place):
        self.place, self.tokens = place, self._tokens(text)
        self.kind = self.token = None
        self.line = 1
        self._next()

    def _tokens(self, text):
        at, line = 0, 1
        while at < len(text):
            found = TOKEN.match(text, at)
            if found is None:
                open_text = "a text that does not end on its line"
                what = open_text if text[at] in "\"'" else ascii(STRANGE.match(text, at).group())
                raise GpunetError(f"{self.place}:{line}: expected a field, got {what}")
            if found.lastgroup:
                yield found.lastgroup, found.group(), line
            line += found.group().count("\n")
            at = found.end()
        yield "end", "the end of the file", line

    def _next(self):
        self.kind, self.token, self.line = next(self.tokens)

    def _fail(self, expected):
        token = self.token if len(self.token) <= 40 else f"{self.token[:40]}..."
        got = token if self.kind == "end" else f"'{token}'"
        raise GpunetError(f"{self.place}:{self.line}: expected {expected}, got {got}")

    def _take(self, *marks):
        """Go on behind one of these marks, if one is next, and return it."""
        if self.kind == "mark" and self.token in marks:
            mark = self.token
            self._next()
            return mark
        return None

    def message(self, closing, line, depth):
        """Read fields up to the closing mark, or the end of the file."""
        if depth > DEPTH:
            raise GpunetError(f"{self.place}:{line}: expected at most {DEPTH} messages within each other")
        fields = []
        while not (self._take(closing) if closing else self.kind == "end"):
            if self.kind == "end":
                self._fail(f"'{closing}' for what opens in line {line}")
            if self.kind != "name":
                self._fail("the name of a field" + (f" or '{closing}'" if closing else ""))
            self._field(fields, depth)
        return Message(self.place, line, fields)

    def _field(self, fields, depth):
        """Append the field that comes next, or one for each value in a list of them."""
        name, line = self.token, self.line
        self._next()
        colon = self._take(":")
        if colon and self._take("["):
            while not self._take("]"):
                fields.append(Field(name, self._value(depth), line))
                if not self._take(",") and self.token != "]":
                    self._fail("',' or ']'")
        elif colon or self.token in CLOSING:
            fields.append(Field(name, self._value(depth), line))
        else:
            self._fail(f"':' or '{{' behind '{name[:40]}'")
        self._take(",", ";")

    def _value(self, depth):
        line = self.line
        if opening := self._take(*CLOSING):
            return self.message(CLOSING[opening], line, depth + 1)
        if self.kind == "text":
            parts = []
            while self.kind == "text":  # texts side by side are one
                parts.append(self._unquoted(self.token[1:-1]))
                self._next()
            return "".join(parts)
        sign = -1 if self._take("-") else 1
        if self.kind not in ("number", "name"):
            self._fail("a value")
        value = self._number(sign) if self.kind == "number" else self._word(sign)
        self._next()
        return value

    def _number(self, sign):
        text = self.token.lower()
        if text.startswith("0x"):
            return sign * int(text, 16) if len(text) <= 18 else self._fail("a number of at most 64 bits")
        if text.isdigit():
            if len(text) > 20:
                self._fail("a number of at most 64 bits")
            octal = len(text) > 1 and text[0] == "0"
            if octal and not set(text) <= set("01234567"):
                self._fail("an octal number, as a leading 0 says")
            return sign * int(text, 8 if octal else 10)
        value = sign * float(text.removesuffix("f"))
        return value if math.isfinite(value) else self._fail("a finite number")

    def _word(self, sign):
        if sign < 0 or self.token.lower() in ("inf", "infinity", "nan"):
            self._fail("a finite number" if sign > 0 else "a number behind '-'")
        return Word(self.token)

    def _unquoted(self, text):
        def plain(found):
            octal, hexadecimal, other = found.groups()
            if other is None:
                return chr(int(octal, 8) if octal else int(hexadecimal, 16))
            return ESCAPED.get(other, other)

        return ESCAPE.sub(plain, text)
