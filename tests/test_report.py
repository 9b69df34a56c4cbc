import html.parser

import pytest

from dmq_jax import report
from dmq_jax.config import ReportConfig
from tests.reporting import finished_run


@pytest.fixture(scope='module')
def workdir(tmp_path_factory):
    folder = tmp_path_factory.mktemp('run')
    finished_run.write(folder)
    return folder


@pytest.fixture(scope='module')
def page(workdir):
    report.run(workdir, ReportConfig(grid_size=3))
    return (workdir / 'report.html').read_text()


class Balance(html.parser.HTMLParser):
    """Checks that every element is closed, and collects what the page refers to."""

    def __init__(self):
        super().__init__()
        self.open, self.wrong, self.links, self.tags = [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ('src', 'href')]
        if tag not in ('meta', 'img', 'br'):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.wrong.append(tag)


def parse(page):
    balance = Balance()
    balance.feed(page)
    return balance


def test_the_page_is_well_formed_and_needs_no_other_file(page):
    parsed = parse(page)
    assert parsed.wrong == [] and parsed.open == []
    assert parsed.links and all(link.startswith('data:image/png;base64,') for link in parsed.links)
    assert 'http' not in page and 'script' not in parsed.tags and '@import' not in page


def test_a_finished_run_leaves_nothing_out(page):
    parsed = parse(page)
    assert parsed.tags.count('img') == 3
    assert 'class="absent"' not in page
    # Loss, six panels of scales at most, three of errors, sensitivity, kernels.
    assert page.count('class="chart"') >= 1 + 1 + 3 + 1 + 1


def test_the_page_says_which_implementation_ran_each_layer(page):
    _, _, table = page.partition('What ran each layer of')
    rows = table[: table.index('</pre>')].splitlines()
    (row,) = [row for row in rows if row.startswith('down_0/block_0/conv1 ')]
    assert ' xla ' in row and 'int_conv' in row


def test_names_of_classes_stand_beside_their_rows(page):
    assert '<span>T-shirt</span><span>Trouser</span><span>Pullover</span></div>' in page


def test_an_empty_run_says_which_stage_makes_what(tmp_path):
    report.run(tmp_path, ReportConfig())
    page = (tmp_path / 'report.html').read_text()
    parsed = parse(page)
    assert parsed.wrong == [] and parsed.open == []
    for stage in ('sample', 'evaluate', 'analyse', 'export'):
        assert f'the stage <code>{stage}</code>' in page
