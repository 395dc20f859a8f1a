"""How the report looks: light, dark, phone and paper. Figures use the same variables as the text."""

from __future__ import annotations

PALETTE = ("#0072b2", "#d55e00", "#009e73", "#b0679b", "#6b4a00", "#3f3a8c", "#6b6b6b")
"""Four of Okabe and Ito's, darkened until thin lines show on white, and three that the colour-blind tell from them."""
DARK_PALETTE = ("#4aa8e0", "#ff8c42", "#2fc79a", "#dd94c8", "#ffe45c", "#9a7bff", "#8d8d8d")

INK, MUTED, GRID, CARD = "#1b2028", "#5b6472", "#dfe3e8", "#ffffff"
DARK_INK, DARK_MUTED, DARK_GRID, DARK_CARD = "#e7eaee", "#9ea8b5", "#39424e", "#1b2129"


def _variables(ink: str, muted: str, grid: str, card: str, palette: tuple[str, ...], rest: str) -> str:
    colours = "".join(f"--c{i}:{colour};" for i, colour in enumerate(palette))
    return f":root{{--ink:{ink};--muted:{muted};--grid:{grid};--card:{card};{colours}{rest}}}"


_LIGHT = _variables(INK, MUTED, GRID, CARD, PALETTE, "--page:#f5f6f8;--soft:#eef1f5;--warn:#fff6e0;--edge:#d99a00;")
_DARK = _variables(
    DARK_INK, DARK_MUTED, DARK_GRID, DARK_CARD, DARK_PALETTE,
    "--page:#12161b;--soft:#242c36;--warn:#33290f;--edge:#d9a520;",
)  # fmt: skip

CSS = (
    f"""
{_LIGHT}
@media screen and (prefers-color-scheme:dark){{{_DARK}}}
"""
    + """
:root{color-scheme:light dark}
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%}
body{margin:0;background:var(--page);color:var(--ink);font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,
"Helvetica Neue",Arial,sans-serif}
main,header.top{max-width:1120px;margin:0 auto;padding:0 20px}
header.top{padding-top:44px}
.eyebrow{margin:0;color:var(--muted);font-size:13px;letter-spacing:.06em;text-transform:uppercase}
h1{margin:.15em 0 .2em;font-size:clamp(26px,5vw,38px);line-height:1.15;letter-spacing:-.015em;overflow-wrap:anywhere}
h2{margin:56px 0 6px;font-size:22px;letter-spacing:-.01em;scroll-margin-top:16px}
h3{margin:26px 0 4px;font-size:16px}
p{margin:.5em 0;max-width:74ch}
.lead{font-size:18px;max-width:66ch;margin:18px 0 0}
.muted,small{color:var(--muted)}
.meta{color:var(--muted);font-size:14px}
nav{margin:18px 0 0;font-size:14px;display:flex;flex-wrap:wrap;gap:4px 18px}
nav a{color:var(--c0);text-decoration:none}
nav a:hover{text-decoration:underline}
code,.hash{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,"Liberation Mono",monospace;font-size:.86em;
overflow-wrap:anywhere}
.warn{margin:22px 0 0;padding:12px 18px;background:var(--warn);border-left:4px solid var(--edge);border-radius:6px}
.warn h2{margin:0;font-size:16px}
.warn ul{margin:.3em 0 0;padding-left:1.2em}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(165px,1fr));gap:12px;margin:22px 0 0}
.card{background:var(--card);border:1px solid var(--grid);border-radius:10px;padding:14px 16px;min-width:0}
.card .name{color:var(--muted);font-size:13px}
.card .value{font-size:28px;line-height:1.25;font-weight:620;letter-spacing:-.02em;font-variant-numeric:tabular-nums}
.card .value.small{font-size:17px;line-height:1.5;padding:6px 0 1px;letter-spacing:0;font-weight:500}
.card .more{color:var(--muted);font-size:13px;line-height:1.4}
.scroll{overflow-x:auto;background:var(--card);border:1px solid var(--grid);border-radius:10px;margin:14px 0}
.scroll:focus-visible{outline:2px solid var(--c0)}
table{border-collapse:collapse;width:100%;font-size:14px;font-variant-numeric:tabular-nums}
caption{text-align:left;padding:10px 14px 6px;color:var(--muted);font-size:13px}
caption span{display:inline-block;position:sticky;left:14px;max-width:min(80ch,calc(100vw - 60px))}
td:not(.n){min-width:11em}
th,td{padding:7px 14px;text-align:left;vertical-align:top;border-top:1px solid var(--grid)}
thead th{color:var(--muted);font-weight:500;font-size:13px;vertical-align:bottom;border-top:0;line-height:1.3}
tbody th{font-weight:550;overflow-wrap:anywhere;max-width:22em}
tbody th::before{content:"";display:block;width:8.5em}
td.n,th.n{text-align:right}
td.n{white-space:nowrap}
td .sub,th .sub{display:block;color:var(--muted);font-size:12px;white-space:nowrap;font-weight:400}
.hidden-cell{color:var(--muted);font-style:italic;font-size:13px}
.confusion td{padding:0;border:2px solid var(--card);min-width:6.5em}
.confusion td>div{padding:7px 14px;border-radius:4px;
background:color-mix(in srgb,var(--c0) calc(var(--share)*50%),var(--soft))}
.confusion td .sub{color:inherit;opacity:.8}
.figures{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,430px),1fr));gap:14px;margin:14px 0;
align-items:start}
figure{margin:0;background:var(--card);border:1px solid var(--grid);border-radius:10px;padding:14px 16px 12px;
min-width:0}
.wide{grid-column:1/-1}
figure h3{margin:0 0 2px}
figure svg.plot{display:block;width:100%;height:auto;max-width:640px;margin:4px auto 0}
figure svg.plot text{font-family:system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif!important}
figcaption{color:var(--muted);font-size:13px;line-height:1.45}
ul.legend{list-style:none;display:flex;flex-wrap:wrap;gap:2px 16px;margin:8px 0 6px;padding:0;font-size:13px}
ul.legend li{display:flex;align-items:center;gap:6px;min-width:0;overflow-wrap:anywhere}
ul.legend svg{flex:none}
details{background:var(--card);border:1px solid var(--grid);border-radius:10px;padding:10px 16px;margin:14px 0}
summary{cursor:pointer;font-weight:550}
pre{overflow-x:auto;font-size:13px;line-height:1.45;margin:10px 0 4px;
font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,"Liberation Mono",monospace}
dl{display:grid;grid-template-columns:minmax(8em,max-content) 1fr;gap:6px 20px;margin:10px 0;max-width:90ch}
dt{font-weight:550}
dd{margin:0}
section ul:not(.legend){padding-left:1.25em;max-width:78ch}
footer{max-width:1120px;margin:56px auto 0;padding:16px 20px 40px;color:var(--muted);font-size:13px;
overflow-wrap:anywhere}
@media (max-width:560px){
main,header.top,footer{padding-left:14px;padding-right:14px}
header.top{padding-top:24px}
h2{margin-top:40px}
.cards{grid-template-columns:repeat(2,minmax(0,1fr));gap:8px}
.card{padding:10px 12px}
.card .value{font-size:23px}
figure{padding:12px 10px}
th,td{padding:6px 10px}
dl{grid-template-columns:1fr;gap:0}
dd{margin-bottom:10px}
}
@media print{
body{background:#fff;font-size:10.5pt}
main,header.top,footer{max-width:none;padding-left:0;padding-right:0}
nav{display:none}
h2{margin-top:24px}
h2,h3{break-after:avoid}
figure,.card,tr,.warn{break-inside:avoid}
.scroll{overflow:visible}
.figures{grid-template-columns:1fr 1fr}
pre{white-space:pre-wrap}
details::details-content{content-visibility:visible;block-size:auto}
}
"""
)
