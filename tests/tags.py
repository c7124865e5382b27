"""What a page of ours holds."""

from html.parser import HTMLParser


class Tags(HTMLParser):
    """The tags of a page, and its text outside of the cards."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.text, self.in_card = "", False
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.tags.add(tag)
        self.in_card |= tag == "i"

    def handle_endtag(self, tag: str) -> None:
        self.in_card &= tag != "i"

    def handle_data(self, data: str) -> None:
        self.text += "" if self.in_card else data
