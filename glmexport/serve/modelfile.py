"""Modelfiles: what a model is made from and how it is asked, as Ollama's users write them."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from glmexport.errors import GlmExportError
from glmexport.untrusted import quoted

ROLES = ("system", "user", "assistant")
MAX_CHARACTERS = 1 << 20

INTEGER, NUMBER, TEXT = "a whole number", "a number", "a text"
PARAMETERS: Mapping[str, str] = {
    "num_ctx": INTEGER,
    "num_predict": INTEGER,
    "seed": INTEGER,
    "temperature": NUMBER,
    "top_k": INTEGER,
    "top_p": NUMBER,
    "min_p": NUMBER,
    "repeat_penalty": NUMBER,
    "repeat_last_n": INTEGER,
    "presence_penalty": NUMBER,
    "frequency_penalty": NUMBER,
    "stop": TEXT,
}
"""Name -> what it must be. `stop` may be given several times."""

ELSEWHERE = frozenset(
    (
        *("mirostat", "mirostat_eta", "mirostat_tau", "typical_p", "tfs_z", "penalize_newline", "num_keep"),
        *("num_gpu", "num_thread", "num_batch", "main_gpu", "low_vram", "numa", "num_gqa", "use_mmap", "use_mlock"),
        *("f16_kv", "vocab_only", "rope_frequency_base", "rope_frequency_scale"),
    )
)
"""What other servers know and this one has no use for; they are passed over, with a word about it."""

PASSED_OVER = ("REQUIRES", "RENDERER", "PARSER")
"""Instructions about Ollama's own program."""

_INSTRUCTION = re.compile(r"[ \t]*([A-Za-z]+)(?:[ \t]+|$)")
_QUOTES = '"""'


@dataclass(frozen=True)
class Modelfile:
    """A parsed Modelfile.

    source: what FROM names. parameters: by name, `stop` a tuple of texts. system: empty for none. messages: (role,
    text), which every chat begins with. license: the texts. ignored: parameters and instructions that were passed
    over.
    """

    source: str
    parameters: Mapping[str, Any] = field(default_factory=dict)
    system: str = ""
    messages: tuple[tuple[str, str], ...] = ()
    license: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()

    def over(self, base: Modelfile) -> Modelfile:
        """On top of the one of the model that it is made from, with that one's source."""
        return Modelfile(
            base.source,
            {**base.parameters, **self.parameters},
            self.system or base.system,
            self.messages or base.messages,
            self.license or base.license,
            self.ignored,
        )

    def with_source(self, source: str) -> Modelfile:
        """The same, made from something else."""
        return dataclasses.replace(self, source=source)

    def text(self) -> str:
        """A Modelfile that parses to this."""
        lines = [f"FROM {self.source}"]
        lines += [f"PARAMETER {line}" for line in self.parameter_lines()]
        lines += [f"SYSTEM {_quoted(self.system)}"] if self.system else []
        lines += [f"MESSAGE {role} {_quoted(text)}" for role, text in self.messages]
        lines += [f"LICENSE {_quoted(text)}" for text in self.license]
        return "\n".join(lines) + "\n"

    def parameter_lines(self) -> list[str]:
        """One `name value` for each value."""
        lines = []
        for name, value in self.parameters.items():
            values = value if isinstance(value, tuple) else (value,)
            lines += [f"{name} {_quoted(one) if isinstance(one, str) else one}" for one in values]
        return lines

    def to_json(self) -> dict[str, Any]:
        """All but what was ignored, for `modelfile_from_json`."""
        values = dataclasses.asdict(self)
        del values["ignored"]
        return values


def modelfile_from_json(values: Mapping[str, Any], where: str) -> Modelfile:
    """The same from JSON values, as the store and requests hold them; every key may be absent.

    Raises GlmExportError, which begins with `where`, for values of another type.
    """
    licenses = values.get("license") or ()
    licenses = (licenses,) if isinstance(licenses, str) else tuple(licenses)
    messages = []
    for message in values.get("messages") or ():
        pair = (message.get("role"), message.get("content")) if isinstance(message, Mapping) else tuple(message)
        if len(pair) != 2 or pair[0] not in ROLES or not isinstance(pair[1], str):
            raise GlmExportError(
                f"{where} has a message that is none; expected a role of {', '.join(ROLES)} and a text."
            )
        messages.append(pair)
    source, system = values.get("source") or "", values.get("system") or ""
    if not all(isinstance(text, str) for text in (source, system, *licenses)):
        raise GlmExportError(f"{where} has something else than texts as from, system or license.")
    parameters, ignored = checked_parameters(values.get("parameters") or {}, where)
    return Modelfile(source, parameters, system, tuple(messages), licenses, ignored)


def checked_parameters(values: Mapping[str, Any], where: str) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Parameters of JSON values, each of the type it must be, and the names that mean nothing here.

    A null is as if it were absent. Raises GlmExportError, which begins with `where`.
    """
    checked: dict[str, Any] = {}
    ignored = []
    for name, value in values.items():
        kind = PARAMETERS.get(name)
        if value is None:
            continue
        if kind is None:
            ignored.append(name)
        elif kind == TEXT:
            texts = (value,) if isinstance(value, str) else value
            if not isinstance(texts, list | tuple) or not all(isinstance(text, str) and text for text in texts):
                raise GlmExportError(
                    f"{where} has a {name} that is no text and no list of texts; an empty one is none."
                )
            checked[name] = tuple(texts)
        else:
            checked[name] = _number(name, value, kind, where)
    return checked, tuple(ignored)


def _number(name: str, value: Any, kind: str, where: str) -> int | float:
    whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    if isinstance(value, bool) or not isinstance(value, int | float) or (kind == INTEGER and not whole):
        raise GlmExportError(f"{where} sets {name} to {value!r:.60}, expected {kind}.")
    try:
        return int(value) if kind == INTEGER else float(value)
    except OverflowError as error:
        raise GlmExportError(f"{where} sets {name} to a number that is too large.") from error


def parse_modelfile(text: str) -> Modelfile:
    """Read a Modelfile. Raises GlmExportError, which names the line."""
    if len(text) > MAX_CHARACTERS:
        raise GlmExportError(f"The Modelfile has {len(text)} characters, expected at most {MAX_CHARACTERS}.")
    source, system = "", ""
    parameters: dict[str, Any] = {}
    messages: list[tuple[str, str]] = []
    licenses, ignored = list[str](), list[str]()
    for number, word, argument in _instructions(text):
        if word == "FROM":
            if source:
                raise GlmExportError(f"Line {number} of the Modelfile is a second FROM, expected one.")
            source = argument
        elif word == "PARAMETER":
            name, value = _first_word(argument)
            if name.lower() in ELSEWHERE:
                ignored.append(name.lower())
                continue
            add_parameter(parameters, name.lower(), _unquoted(value.strip()), f"Line {number} of the Modelfile")
        elif word == "SYSTEM":
            system = argument
        elif word == "LICENSE":
            licenses.append(argument)
        elif word == "MESSAGE":
            messages.append(_message(argument, number))
        elif word in PASSED_OVER:
            ignored.append(word)
        else:
            _refuse(word, number)
    if not source:
        raise GlmExportError("The Modelfile has no FROM; expected `FROM` and a bundle's directory or a model's name.")
    return Modelfile(source, parameters, system, tuple(messages), tuple(licenses), tuple(ignored))


def add_parameter(parameters: dict[str, Any], name: str, value: str, where: str) -> None:
    """Add one from a text; a `stop` is added to those before it. Raises GlmExportError, which begins with `where`."""
    kind = PARAMETERS.get(name)
    if kind is None:
        known = ", ".join(PARAMETERS)
        raise GlmExportError(f"{where} sets {quoted(name)}, expected one of {known}; leave it out.")
    if kind == TEXT:
        if not value:
            raise GlmExportError(f"{where} has an empty {name}; give a text.")
        parameters[name] = (*parameters.get(name, ()), value)
        return
    try:
        parameters[name] = int(value) if kind == INTEGER else float(value)
    except ValueError as error:
        raise GlmExportError(f"{where} sets {name} to {quoted(value)}, expected {kind}.") from error


def _refuse(word: str, number: int) -> None:
    if word == "TEMPLATE":
        raise GlmExportError(
            f"Line {number} of the Modelfile is a TEMPLATE in Go's language, which is not run here: leave it out for "
            "the model's own chat format, or give a Jinja template with `glmexport serve --chat-template FILE`."
        )
    if word == "ADAPTER":
        raise GlmExportError(
            f"Line {number} of the Modelfile is an ADAPTER; merge it into the checkpoint and split that."
        )
    raise GlmExportError(
        f"Line {number} of the Modelfile begins with {quoted(word)}, expected FROM, PARAMETER, SYSTEM, "
        "MESSAGE or LICENSE."
    )


def _message(argument: str, number: int) -> tuple[str, str]:
    role, text = _first_word(argument)
    if role not in ROLES:
        raise GlmExportError(
            f"Line {number} of the Modelfile has a MESSAGE of {quoted(role)}, expected one of {', '.join(ROLES)}."
        )
    return role, _unquoted(text.strip())


def _instructions(text: str) -> Iterator[tuple[int, str, str]]:
    """(line, instruction in capitals, argument without its quotes) of each; comments and empty lines are not."""
    lines = iter(enumerate(text.removeprefix("\ufeff").splitlines(), 1))
    for number, line in lines:
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        match = _INSTRUCTION.match(line)
        if match is None:
            raise GlmExportError(f"Line {number} of the Modelfile is {quoted(line)}, expected an instruction.")
        argument = line[match.end() :].strip()
        opened = argument.count(_QUOTES) == 1 and re.match(r'(?:\w+[ \t]+)*"""', argument)
        while opened:
            following = next(lines, None)
            if following is None:
                raise GlmExportError(f"Line {number} of the Modelfile opens {_QUOTES} and nothing closes it.")
            argument += "\n" + following[1]
            opened = None if _QUOTES in following[1] else opened
        word = match[1].upper()
        yield number, word, argument if word in ("MESSAGE", "PARAMETER") else _unquoted(argument)


def _first_word(text: str) -> tuple[str, str]:
    """A word and what follows it."""
    word, *rest = text.split(maxsplit=1) or [""]
    return word, rest[0] if rest else ""


def _unquoted(text: str) -> str:
    for quotes in (_QUOTES, '"'):
        if len(text) >= 2 * len(quotes) and text.startswith(quotes) and text.endswith(quotes):
            return text[len(quotes) : -len(quotes)]
    return text


def _quoted(text: str) -> str:
    plain = text.isprintable() and '"' not in text and text == text.strip() and text
    if plain:
        return text
    return f"{_QUOTES}{text}{_QUOTES}" if "\n" in text or '"' in text else f'"{text}"'
