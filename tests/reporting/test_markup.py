from html.parser import HTMLParser

from dmq_jax.reporting import markup

HOSTILE = '<script>alert("1 & 2")</script> \'x\''
VOID = {'meta'}


class Page(HTMLParser):
    """Texts by tag, classes, and whether every tag that opens closes in order."""

    def __init__(self, text):
        super().__init__()
        self.open, self.texts, self.attributes = [], {}, []
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag, attributes):
        self.attributes.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.setdefault(self.open[-1] if self.open else '', []).append(data)


def test_escaped_text_is_text_and_no_tag_between_tags_and_in_attributes():
    page = Page(f'<p title="{markup.escape(HOSTILE)}">{markup.escape(HOSTILE)}</p>')
    assert page.attributes == [('p', {'title': HOSTILE})]
    assert ''.join(page.texts['p']) == HOSTILE


def test_what_is_no_text_is_shown_as_its_text():
    assert markup.escape(1.5) == '1.5' and markup.escape(None) == 'None'


def test_absent_results_name_the_stage_that_makes_them():
    page = Page(markup.absent('images', 'sample'))
    assert page.attributes[0] == ('p', {'class': 'absent'})
    assert page.texts == {'p': ['images: the stage ', ' makes them.'], 'code': ['sample']}


def test_a_figure_holds_its_content_and_its_caption():
    page = Page(markup.figure('<b>content</b>', 'what <i>it</i> shows', 'wide'))
    assert page.attributes[0] == ('figure', {'class': 'wide'})
    assert page.texts['b'] == ['content'] and page.texts['i'] == ['it']
    assert page.texts['figcaption'] == ['what ', ' shows']


def test_a_document_is_one_page_that_needs_no_other_file():
    text = markup.document(HOSTILE, '<p>body</p>')
    page = Page(text)
    assert text.startswith('<!doctype html>')
    assert ''.join(page.texts['title']) == HOSTILE and page.texts['p'] == ['body']
    tags = [tag for tag, _ in page.attributes]
    assert tags.count('html') == tags.count('head') == tags.count('body') == 1
    assert ''.join(page.texts['style']).strip()
    assert not {'link', 'script', 'img'} & set(tags) and 'http' not in text
