"""Ids to text, piece by piece: what is said is certain, and the pieces together are the text."""

from collections.abc import Callable, Sequence
from os.path import commonprefix

# Ids before the text that decide how it begins: a space, or bytes of a character.
CONTEXT = 4
_UNFINISHED = "\ufffd"


class TextStream:
    """The text of ids that come one by one, after the ids `before` it; it ends where one of `stop` begins.

    Ids are decoded together with those that the text so far ended in: alone, many lose a space or are no character.
    """

    def __init__(self, decode: Callable[[list[int]], str], before: Sequence[int], stop: Sequence[str] = ()) -> None:
        self._decode = decode
        self._ids = list(before[-CONTEXT:])
        self._known = decode(self._ids)  # the text of `_ids` before the first that is not certain yet
        self._certain = len(self._ids)
        self._stop = tuple(stop)
        self._given = 0
        self.text = ""
        self.stopped = False

    def add(self, token_id: int) -> str:
        """The piece that is certain with one more id; mostly a word, or nothing."""
        self._ids.append(token_id)
        whole = self._decode(self._ids)
        if len(whole) > len(self._known) and not whole.endswith(_UNFINISHED):
            self._take(whole)
        return self._give(self._held())

    def end(self) -> str:
        """The rest, when no id follows."""
        if not self.stopped:
            self._take(self._decode(self._ids))
        return self._give(0)

    def _take(self, whole: str) -> None:
        start = len(self.text)
        self.text += whole[len(commonprefix([self._known, whole])) :]  # noqa: RUF071 - characters are wanted
        self._ids = self._ids[self._certain :]
        self._certain = len(self._ids)
        self._known = self._decode(self._ids)
        places = [self.text.find(stop, max(0, start - len(stop) + 1)) for stop in self._stop]
        if found := [place for place in places if place >= 0]:
            self.text = self.text[: min(found)]
            self.stopped = True

    def _held(self) -> int:
        """How many characters at the end could begin a stop text."""
        if self.stopped:
            return 0
        return max((n for stop in self._stop for n in range(1, len(stop)) if self.text.endswith(stop[:n])), default=0)

    def _give(self, held: int) -> str:
        end = max(self._given, len(self.text) - held)
        piece, self._given = self.text[self._given : end], end
        return piece


def written(text: str) -> str:
    """`text` for a terminal: line breaks and tabs stay, other control characters are spelled out."""
    return "".join(
        c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape", "surrogatepass").decode() for c in text
    )
