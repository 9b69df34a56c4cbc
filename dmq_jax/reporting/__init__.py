"""What a report is made of: results read back, tables of text, sections of HTML, charts."""
