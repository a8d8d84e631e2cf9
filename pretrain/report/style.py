"""The page's style: one column on a phone, cards beside each other where there is room; dark; print."""

from __future__ import annotations

from pretrain.report.markup import Markup
from pretrain.report.palette import SERIES_DARK, SERIES_LIGHT


def _series(colors: tuple[str, ...]) -> str:
    return "".join(f"--c{place}:{color};" for place, color in enumerate(colors))


_LIGHT = """
--paper:#fff;--card:#fff;--ink:#1c2430;--soft:#586271;--rule:#d8dde4;--grid:#e6e9ee;--link:#0b5cad;
--good:#00714f;--bad:#b3331a;--note:#f4f6f9;
""" + _series(SERIES_LIGHT)
_DARK = """
--paper:#12161c;--card:#181d25;--ink:#e6eaf0;--soft:#a3adba;--rule:#333c48;--grid:#2a323d;--link:#7cb8f2;
--good:#4fd3a4;--bad:#ff9077;--note:#1d232c;
""" + _series(SERIES_DARK)
_FONT = 'system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif'

_COLORS = f"""
:root{{color-scheme:light dark;{_LIGHT}}}
@media (prefers-color-scheme:dark){{:root{{{_DARK}}}}}
"""

_TEXT = f"""
*{{box-sizing:border-box}}
html{{-webkit-text-size-adjust:100%}}
body{{margin:0 auto;padding:0 14px 3rem;max-width:1120px;background:var(--paper);color:var(--ink);
  font:16px/1.55 {_FONT};overflow-wrap:anywhere}}
h1{{font-size:1.7rem;line-height:1.2;margin:1.6rem 0 .2rem;letter-spacing:-.01em}}
h2{{font-size:1.3rem;line-height:1.25;margin:2.6rem 0 .6rem;padding-top:.7rem;
  border-top:1px solid var(--rule)}}
h3{{font-size:1.05rem;margin:1.6rem 0 .4rem}}
h4{{font-size:.95rem;margin:0 0 .2rem;font-weight:600}}
p{{margin:.5rem 0;max-width:46rem}}
a{{color:var(--link)}}
code{{font-size:.9em}}
.kicker{{margin:1.4rem 0 -1.3rem;color:var(--soft);font-size:.9rem}}
.verdict{{font-size:1.05rem;margin:.8rem 0;padding:.7rem .9rem;background:var(--note);max-width:none;
  border-left:4px solid var(--good)}}
.verdict.warn{{border-left-color:var(--bad)}}
.reading{{color:var(--soft);font-size:.93rem}}
.reading b{{color:var(--ink)}}
.aside{{margin:.1rem 0 0;font-size:.8rem;color:var(--soft)}}
.good{{color:var(--good)}}.bad{{color:var(--bad)}}
.facts{{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,15.5rem),1fr));
  gap:.5rem 1.4rem;margin:1rem 0}}
.facts div{{border-top:1px solid var(--rule);padding-top:.35rem}}
.facts dt{{color:var(--soft);font-size:.82rem}}
.facts dd{{margin:0;font-size:.95rem}}
nav h2{{border:0;font-size:.95rem;margin:1.4rem 0 .2rem;padding:0}}
nav ol{{margin:0;padding-left:1.7rem;columns:15rem;column-gap:2rem;font-size:.95rem}}
nav li{{break-inside:avoid;padding:.12rem 0}}
nav a{{text-decoration:none}}
nav a:hover,nav a:focus{{text-decoration:underline}}
.skip{{position:absolute;left:-9999px}}
.skip:focus{{left:8px;top:8px;background:var(--card);padding:.4rem .7rem}}
footer{{margin-top:3rem;border-top:1px solid var(--rule);color:var(--soft);font-size:.85rem}}
"""

_CHARTS = f"""
figure{{margin:0;min-width:0}}
.cards{{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,330px),1fr));
  gap:14px;margin:.9rem 0}}
.card{{border:1px solid var(--rule);border-radius:6px;background:var(--card);padding:10px 9px 8px;
  break-inside:avoid}}
.chart{{display:block;width:100%;height:auto}}
.chart text{{font:12.5px {_FONT};fill:var(--soft);font-variant-numeric:tabular-nums}}
.chart .end{{text-anchor:end}}
.chart .middle{{text-anchor:middle}}
.chart .grid{{stroke:var(--grid);stroke-width:1}}
.chart .axis{{stroke:var(--soft);stroke-width:1}}
.chart .mark{{stroke:var(--soft);stroke-width:1;stroke-dasharray:3 3}}
.line{{fill:none;stroke-width:2;stroke-linejoin:round;stroke-linecap:round}}
.pale{{opacity:.3;stroke-width:1.2}}
.reference{{stroke:var(--soft);stroke-dasharray:6 4;stroke-width:1.6}}
.arrow{{fill:var(--soft)}}
.alarm{{fill:var(--bad)}}
.legend{{list-style:none;margin:.1rem 0 0;padding:0;display:flex;flex-wrap:wrap;gap:.1rem .9rem;
  font-size:.85rem}}
.legend b{{font-variant-numeric:tabular-nums}}
.stroke{{width:22px;height:12px;margin-right:.35rem;vertical-align:-1px}}
.plane{{max-width:680px}}
.scatter{{display:block;width:100%;height:auto;margin:.6rem 0}}
.scatter text{{font:600 13px {_FONT};fill:var(--ink);stroke:var(--paper);stroke-width:3px;
  paint-order:stroke;text-anchor:middle}}
@media (max-width:359px){{.chart text{{font-size:14px}}.scatter text{{font-size:16px}}}}
.points{{list-style:none;margin:.3rem 0;padding:0;display:flex;flex-wrap:wrap;gap:.15rem 1rem;
  font-size:.9rem}}
"""

_PICTURES = """
.panels{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(46%,150px),1fr));
  gap:10px;margin:.7rem 0}
.panels.four{grid-template-columns:repeat(2,1fr)}
.panels.six{grid-template-columns:repeat(3,1fr)}
.panels.row{grid-template-columns:repeat(2,1fr)}
.panels.tokens{grid-template-columns:repeat(calc(var(--n)/2),1fr)}
.panels.row>:first-child{grid-column:1/-1;max-width:calc(50% - 5px)}
.panels.maps{grid-template-columns:repeat(auto-fill,minmax(min(30%,110px),1fr))}
.pairs{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,300px),1fr));
  gap:10px 20px;margin:.7rem 0}
.pair{display:grid;grid-template-columns:1fr 1fr;gap:6px}
.hero{display:grid;grid-template:"a b" auto "c c" auto "d d" auto/1fr 1fr;gap:10px;margin:.8rem 0}
.hero>:nth-child(1){grid-area:a}
.hero>:nth-child(2){grid-area:b}
.hero>:nth-child(3){grid-area:c}
.hero>:nth-child(4){grid-area:d}
@media (min-width:720px){
  .panels.four{grid-template-columns:repeat(4,1fr);max-width:860px}
  .panels.six{grid-template-columns:repeat(6,1fr);max-width:860px}
  .panels.row,.panels.tokens{grid-template-columns:repeat(var(--n),minmax(0,170px))}
  .panels.row>:first-child{grid-column:auto;max-width:none}
  .panels.fine{grid-template-columns:repeat(var(--n),1fr)}
  .hero{grid-template:"a b c" auto "d d c" 1fr/1fr 1fr 2fr;gap:10px 16px}
}
.panel{break-inside:avoid}
.panel img,.drawing{display:block;width:100%;height:auto;border-radius:3px;background:var(--grid)}
.pixels{image-rendering:pixelated}
figcaption{font-size:.82rem;line-height:1.35;color:var(--soft);margin-top:.25rem}
.ink{fill:none;stroke-width:2.4px;vector-effect:non-scaling-stroke;stroke-linejoin:round}
.halo{fill:none;stroke:#000;stroke-opacity:.55;stroke-width:4px;vector-effect:non-scaling-stroke;
  stroke-linejoin:round}
.fine .ink{stroke-width:1.6px}
.fine .halo{stroke-width:2.8px}
@media (max-width:719px){
  .many .ink{stroke-width:1.7px}
  .many .halo{stroke-width:2.8px}
}
.bar{display:block;width:100%;height:14px;margin:.2rem 0 .5rem}
.kinds{list-style:none;margin:.3rem 0;padding:0;font-size:.92rem}
.kinds li{margin:.25rem 0;padding-left:1.6rem;text-indent:-1.6rem}
.swatch{width:14px;height:14px;margin-right:.4rem;vertical-align:-2px;text-indent:0}
.scale{display:inline-block;width:7.5rem;height:.7rem;border-radius:2px;vertical-align:-1px}
"""

_TABLES = """
.wide{overflow-x:auto;margin:.7rem 0;border:1px solid var(--rule);border-radius:6px;
  width:fit-content;max-width:100%;min-width:min(100%,36rem)}
table{border-collapse:collapse;width:100%;font-size:.9rem;overflow-wrap:normal}
th,td{text-align:left;padding:.42rem .7rem;border-bottom:1px solid var(--rule);vertical-align:top;
  white-space:nowrap}
td.wrap{white-space:normal;min-width:17rem}
tbody tr:last-child>*{border-bottom:0}
thead th{color:var(--soft);font-weight:600;font-size:.82rem}
tbody th{font-weight:600}
th.number,td.number{text-align:right;font-variant-numeric:tabular-nums}
"""

_PRINT = f"""
@media print{{
  :root{{color-scheme:light;{_LIGHT}}}
  body{{max-width:none;font-size:10.5pt;padding:0}}
  nav,.skip{{display:none}}
  h2,h3{{break-after:avoid}}
  .wide{{overflow:visible}}
  a{{color:inherit;text-decoration:none}}
  *{{print-color-adjust:exact;-webkit-print-color-adjust:exact}}
}}
"""

# of lines in one chart: colours, and dashes from the third on
_DASHES = ("", "", "8 3", "2 4", "9 3 2 3", "4 4", "12 3", "1 5")
_LINES = "\n".join(
    f".s{place}{{stroke:var(--c{place})" + (f";stroke-dasharray:{dash}" if dash else "") + "}"
    for place, dash in enumerate(_DASHES)
)

STYLE = Markup(_COLORS + _TEXT + _CHARTS + _PICTURES + _TABLES + _LINES + _PRINT)
