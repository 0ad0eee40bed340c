"""A long text is split into several documents here, so that memory is bounded whatever the size of a text."""

from collections.abc import Iterable, Iterator

from inl_core.corpus.reading.rows import BadRow, Document, Item

MAX_DOCUMENT = 1 << 20
"""Characters of the longest document of plain text."""


def longest_whole() -> int:
    """The most characters of a text that cannot be split: of a conversation, or of a line with a prompt."""
    return 4 * MAX_DOCUMENT


def split_text(blocks: Iterable[str]) -> Iterator[str]:
    """The blocks joined and cut into pieces of at most MAX_DOCUMENT characters, after a line end where there is one."""
    rest = ""
    for block in blocks:
        rest += block
        start = 0
        while len(rest) - start > MAX_DOCUMENT:
            cut = rest.rfind("\n", start, start + MAX_DOCUMENT) + 1 or start + MAX_DOCUMENT
            yield rest[start:cut]
            start = cut
        rest = rest[start:]
    if rest:
        yield rest


def split_row(item: Item) -> Iterator[Item]:
    """A row whose text is long as several documents. A conversation cannot be split: a very long one is a bad row."""
    size = sum(map(len, item.texts)) if isinstance(item, Document) else 0
    if isinstance(item, BadRow) or size <= MAX_DOCUMENT:
        yield item
    elif item.roles and size > longest_whole():
        yield BadRow(item.origin, f"{size:,} characters in one conversation; at most {longest_whole():,} are possible")
    elif item.roles:
        yield item
    else:
        for number, piece in enumerate(split_text(item.texts)):
            yield Document(f"{item.origin}#{number}", (piece,), continues=number > 0)
