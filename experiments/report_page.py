"""The frame of a report: an HTML page that needs nothing from elsewhere, light or dark, and prints well."""

from __future__ import annotations

from html import escape


def page(title: str, body: list[str]) -> str:
    """A whole HTML document around parts that are HTML already."""
    return _PAGE.format(title=escape(title), style=_STYLE, body="\n".join(body))


_STYLE = """
:root { color-scheme: light dark;
  --ink: #1b1f24; --faint: #59636e; --line: #d5dae0; --paper: #ffffff; --soft: #f4f6f8; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e8ec; --faint: #9aa4af; --line: #3a424b; --paper: #15191d; --soft: #1f252b; } }
body { margin: 0 auto; max-width: 62rem; padding: 1.5rem 1.2rem 4rem; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
h1 { font-size: 1.7rem; margin: 0 0 .2rem; } h2 { font-size: 1.2rem; margin: 2.2rem 0 .6rem; }
h3 { font-size: 1rem; margin: 1.4rem 0 .4rem; }
.purpose { font-size: 1.05rem; color: var(--faint); margin-top: 0; }
.note { color: var(--faint); font-size: .87rem; }
.wide { overflow-x: auto; margin: 0 0 1.2rem; }
table { border-collapse: collapse; font-size: .87rem; font-variant-numeric: tabular-nums; min-width: 100%; }
caption { text-align: left; font-weight: 600; padding-bottom: .3rem; }
th, td { padding: .22rem .6rem; text-align: left; vertical-align: bottom; }
th { font-weight: 600; } tbody th { font-weight: 400; white-space: nowrap; }
thead th { border-bottom: 1.5px solid var(--ink); }
tr.first > * { border-top: 1px solid var(--line); } thead + tbody tr:first-child > * { border-top: 0; }
tbody tr:last-child > * { border-bottom: 1px solid var(--line); }
.n { text-align: right; } td.n { white-space: nowrap; } .unit { font-weight: 400; color: var(--faint); }
.again { color: var(--faint); } .half { color: var(--faint); font-size: .9em; }
.facts th { color: var(--faint); vertical-align: top; } .facts td { overflow-wrap: anywhere; }
figure { margin: 1.2rem 0 2rem; break-inside: avoid; }
figure img { max-width: 100%; height: auto; display: block; background: #fff; padding: 8px; box-sizing: border-box;
  border: 1px solid var(--line); border-radius: 4px; }
figcaption { margin-top: .5rem; font-size: .93rem; max-width: 52rem; }
pre { background: var(--soft); padding: .8rem 1rem; border-radius: 4px; overflow-x: auto;
  font-size: .84rem; line-height: 1.4; }
@media print {
  :root { --ink: #000; --faint: #444; --line: #999; --paper: #fff; --soft: #fff; }
  @page { margin: 14mm; }
  body { max-width: none; padding: 0; font-size: 10pt; }
  table { font-size: 7.5pt; } th, td { padding: .15rem .3rem; } .wide { overflow: visible; }
  figure img { border: 0; padding: 0; max-height: 90vh; } h2, h3 { break-after: avoid; } tr { break-inside: avoid; }
  pre { border: 1px solid var(--line); white-space: pre-wrap; columns: 2; font-size: 7.5pt; } }
"""

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
{body}
</body>
</html>
"""
