"""The two kinds of failure that a user sees, each as one sentence without a traceback."""

MAX_CHARACTERS = 500


class _SentenceError(Exception):
    """A failure whose sentence fits a screen, whatever it quotes."""

    def __init__(self, sentence: str) -> None:
        super().__init__(shortened(sentence))


class InputError(_SentenceError):
    """Wrong usage or bad input: what was expected, what came, where, what to do. Exit 2."""


class RunError(_SentenceError):
    """A run that started properly and failed, such as a loss that is no longer finite. Exit 1."""


def shortened(sentence: str) -> str:
    """Return at most MAX_CHARACTERS of a sentence, cut in the middle, in printable characters.

    Its start says where and what, its end what to do: what is quoted between them can go.
    """
    if len(sentence) > MAX_CHARACTERS:
        half = MAX_CHARACTERS // 2 - 3
        sentence = f"{sentence[:half]} ... {sentence[-half:]}"
    if sentence.isprintable():
        return sentence
    printable = "".join(
        char if char.isprintable() else " " if char.isspace() else ascii(char)[1:-1]
        for char in sentence
    )
    return printable if len(printable) <= MAX_CHARACTERS else shortened(printable)
