"""The style sheet of a report: one palette for light, one for dark; plots take theirs from the same
variables.
"""

CSS = """
:root {
  color-scheme: light dark;
  --paper: #ffffff; --card: #f6f7f9; --ink: #1d232b; --soft: #5b6572; --line: #d5dae1; --mark: #1f6feb;
}
@media (prefers-color-scheme: dark) {
  :root { --paper: #14171c; --card: #1c2027; --ink: #e4e8ee; --soft: #9ba6b4; --line: #353c47; --mark: #79b0ff; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.55 system-ui, sans-serif; }
header, main, footer { max-width: 1120px; margin: 0 auto; padding: 0 1.25rem; }
header { padding-top: 2rem; }
h1 { font-size: 1.8rem; line-height: 1.2; margin: 0 0 .3rem; }
h2 { font-size: 1.3rem; margin: 3rem 0 .8rem; padding-bottom: .3rem; border-bottom: 1px solid var(--line); }
h3 { font-size: 1.05rem; margin: 1.6rem 0 .6rem; }
h4 { font-size: .95rem; margin: 0 0 .5rem; font-weight: 600; }
p, ul { margin: .5rem 0; }
a { color: var(--mark); }
nav ul { display: flex; flex-wrap: wrap; gap: .2rem 1.1rem; list-style: none; padding: 0; }
.skip { position: absolute; left: -100vw; }
.skip:focus { left: 1rem; top: .5rem; background: var(--paper); padding: .4rem .8rem; }
.soft, figcaption, caption, footer { color: var(--soft); font-size: .875rem; }
.none { background: var(--card); border-left: 4px solid var(--line); padding: .6rem 1rem; border-radius: 4px; }
.scroll { overflow-x: auto; margin: .8rem 0; }
:focus-visible { outline: 2px solid var(--mark); outline-offset: 2px; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; padding-bottom: .4rem; }
th, td { padding: .35rem .9rem .35rem 0; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line); }
td { overflow-wrap: break-word; max-width: 26rem; }
thead th { color: var(--soft); font-weight: 600; }
tbody th { font-weight: 500; white-space: nowrap; }
.grid { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 330px), 1fr)); }
figure { margin: 0 0 1rem; overflow-x: auto; }
.grid figure { background: var(--card); border-radius: 8px; padding: .7rem .8rem .4rem; margin: 0; }
.grid figcaption { color: var(--ink); font-weight: 600; }
figure svg { display: block; height: auto; }
.grid svg { width: 100%; }
figure svg * { stroke-linejoin: round; stroke-linecap: butt; }
figure svg text { font-family: inherit !important; }
.legend { display: flex; flex-wrap: wrap; gap: .3rem 1.4rem; list-style: none; padding: 0; font-size: .875rem; }
.legend span { display: inline-block; width: 1.9rem; margin-right: .5rem; vertical-align: middle; }
.legend span { border-top: 3px solid; }
.legend .dashed { border-top-style: dashed; }
article { background: var(--card); border-radius: 8px; padding: 1rem 1.1rem; font-size: .9rem; }
article p, article li, dd { overflow-wrap: anywhere; }
article ul { padding-left: 1.1rem; }
article dl { margin: .7rem 0 0; }
dt { color: var(--soft); font-size: .8rem; margin-top: .5rem; }
dd { margin: 0; white-space: pre-wrap; }
.who { color: var(--soft); }
.cards { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 420px), 1fr)); }
.cards + p { margin-top: 1.3rem; }
details { margin: .5rem 0; }
summary { cursor: pointer; color: var(--mark); }
pre { overflow-x: auto; background: var(--card); padding: .8rem; border-radius: 6px; font-size: .8rem; }
footer { padding-top: 2rem; padding-bottom: 2rem; }
@media print { article, figure { break-inside: avoid; } nav, .skip { display: none; } }
"""
