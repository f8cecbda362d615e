"""Documents of several sources of text."""

from collections.abc import Iterable

from ..eval.text_sources import read_documents


def read_sources(
    sources: Iterable[str], flag: str, *, endings: tuple[str, ...] = (), named: dict[str, list[str]]
) -> list[str]:
    """Read all sources, in their order.

    Args:
        sources: files, folders and data sets as in `read_documents`, and names in `named`.
        flag: the flag that gives them, for messages.
        endings: as in `read_documents`.
        named: name of a source -> its documents.

    Raises:
        UserError: as in `read_documents`.
    """
    documents: list[str] = []
    for source in sources:
        is_named = source in named
        documents += named[source] if is_named else read_documents(source, name=f"{flag} {source}", endings=endings)
    return documents
