"""What MkDocs calls while it builds the site: links that lead out of docs/ become plain text.

In the repository they work; the site has no such page, and they would be dead. Nothing else is changed.
"""

import re
from pathlib import Path
from typing import Any

OUTSIDE = re.compile(r"\[([^\]]+)\]\((\.\./[^)\s]*)\)")
"""[text](../somewhere); pages of docs/ lie in one folder, so `..` leaves it."""


def on_page_markdown(markdown: str, *, page: Any, config: Any, **_: Any) -> str:
    """Return the page's text with links out of docs/ replaced by their text and the path they name.

    Raises:
        FileNotFoundError: such a link leads nowhere.
    """
    folder = Path(config["docs_dir"])

    def unlinked(found: re.Match[str]) -> str:
        text, target = found[1], found[2].partition("#")[0]
        if not (folder / target).exists():
            raise FileNotFoundError(f"{page.file.src_uri} links to {target}, which does not exist")
        path = target.removeprefix("../").rstrip("/")
        return text if path in text else f"{text} (`{path}`)"

    return OUTSIDE.sub(unlinked, markdown)
