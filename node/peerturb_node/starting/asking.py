"""How `peerturb init` gets an answer: from a flag, from a person at a terminal, or from what suggests itself.

One `Asker` for each way, so that the questions and their order are one piece of code (`peerturb_node.starting.talk`).
"""

import difflib
from collections.abc import Callable, Collection
from typing import Protocol, TypeVar

from rich.prompt import InvalidResponse, PromptBase
from rich.text import Text

from peerturb.errors import PeerturbError, SpecError

T = TypeVar("T")


class Asker(Protocol):
    """Somebody, or something, that answers."""

    def ask(self, question: str, flag: str, suggestion: str | None, read: Callable[[str], T]) -> T:
        """Return an answer that `read` accepts.

        Args:
            question: for a person.
            flag: what gives the answer on the command line.
            suggestion: what is taken if nothing else is said; None: there is none.
            read: makes a value of the text, or raises a PeerturbError that says what is wrong.

        Raises:
            PeerturbError: no answer, or one that `read` refuses and nobody is there to correct.
        """


class Silent:
    """Takes every suggestion; what has none must be a flag."""

    def __init__(self, why: str) -> None:
        """`why` nobody is asked, for the error."""
        self._why = why

    def ask(self, question: str, flag: str, suggestion: str | None, read: Callable[[str], T]) -> T:
        """Return the suggestion's value; see `Asker`."""
        if suggestion is None:
            raise SpecError(f"{self._why}: {flag} must be given ({question[0].lower()}{question[1:]})")
        return read(suggestion)


class Terminal:
    """Asks, and asks again with the reason until the answer is usable."""

    def ask(self, question: str, flag: str, suggestion: str | None, read: Callable[[str], T]) -> T:
        """Return the person's answer; see `Asker`."""
        # A new line would break the question, but must be seen: it is typed as \\n, too.
        shown = "" if suggestion is None else f" [{suggestion}]".replace("\n", "\\n")
        answer: T = _Question(Text(f"{question}{shown}"), suggestion=suggestion, read=read)()
        return answer


class _Question(PromptBase[T]):
    """One question at the terminal."""

    def __init__(self, prompt: Text, *, suggestion: str | None, read: Callable[[str], T]) -> None:
        super().__init__(prompt)
        self._suggestion = suggestion
        self._read = read

    def process_response(self, value: str) -> T:
        """Make a value of what was typed."""
        text = self._suggestion if not value and self._suggestion is not None else value.replace("\\n", "\n")
        try:
            return self._read(text)
        except PeerturbError as error:
            raise InvalidResponse(Text(str(error), style="red")) from error


def given_or(asker: Asker, given: str | None, question: str, flag: str, suggestion: str | None,
             read: Callable[[str], T]) -> T:  # fmt: skip
    """Return what the flag says, else what the asker says."""
    return read(given) if given is not None else asker.ask(question, flag, suggestion, read)


def one_of(options: Collection[str], what: str) -> Callable[[str], str]:
    """Return a reader that takes one of some words, and suggests the nearest to any other."""

    def read(text: str) -> str:
        word = text.strip()
        if word in options:
            return word
        near = difflib.get_close_matches(word.lower(), options, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise SpecError(f"{what} {word!r} is none of {', '.join(options)}{hint}")

    return read
