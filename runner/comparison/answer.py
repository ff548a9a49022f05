"""One answer to a question about a sweep."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Answer:
    """`level`: good, warn, bad or unknown; `short`: a clause for a headline; `words`: one or two sentences.

    `more`: what belongs to it, sentence by sentence.
    """

    level: str
    short: str
    words: str
    more: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """All of it."""
        return " ".join((self.words, *self.more))
