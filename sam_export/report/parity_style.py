"""The style sheet of the HTML report: light and dark, from 360 pixels up.

The lines of the plots are colours that Okabe and Ito ("Color universal design", 2008) chose to be
told apart by people with any kind of colour vision, and each has its own dash pattern. The heat
map goes from pale to strong blue within the bound and turns to orange, with a mark, outside.
"""

STYLE = """
:root{color-scheme:light dark;--bg:#fff;--card:#f6f8fa;--ink:#1b1f24;--soft:#57606a;--rule:#d0d7de;
--ok:#0b6b3a;--ok-bg:#e2f4e8;--bad:#9c2a0c;--bad-bg:#fdeae3;--link:#0b5cad;--outside:#fbeee8;
--blue:#0072b2;--red:#c44e00;--green:#00795a;--pink:#a8457f;
--h0:#f1f4f8;--h1:#d6e6f4;--h2:#abd0e6;--h3:#6aaed6;--h4:#2879b9;--h5:#fdbe85;--h6:#f07a28;--h7:#8c2d04;
--t5:#1b1f24;--t6:#1b1f24;--t7:#fff}
@media (prefers-color-scheme:dark){:root{--bg:#0f1419;--card:#171d24;--ink:#e6e9ec;--soft:#a3aeb9;
--rule:#313b46;--ok:#67d79b;--ok-bg:#10301f;--bad:#ffa287;--bad-bg:#3b1a11;--link:#7cc0f5;
--outside:#251a18;--blue:#56b4e9;--red:#f5a02c;--green:#3ecfa5;--pink:#e39ac4;
--h0:#1b222b;--h1:#1f3247;--h2:#27507a;--h3:#3b7fb8;--h4:#86c5f0;--h5:#a64b1a;--h6:#f08a3c;--h7:#ffd9b5;
--t5:#fff;--t6:#111;--t7:#111}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--ink);
font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
main{max-width:1120px;margin:0 auto;padding:20px 16px 60px}
h1{font-size:1.1rem;margin:0 0 12px;color:var(--soft);font-weight:600}
h2{font-size:1.3rem;margin:44px 0 12px;padding-top:14px;border-top:1px solid var(--rule)}
h3{font-size:1.02rem;margin:26px 0 8px}
a{color:var(--link)}
code,pre,.name{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,"Liberation Mono",monospace;
font-size:.92em;overflow-wrap:anywhere}
pre{background:var(--card);border:1px solid var(--rule);border-radius:8px;padding:12px 14px;
white-space:pre-wrap;margin:0}
.soft{color:var(--soft)}.small{font-size:.88rem}
p{margin:8px 0}
.verdict{border-radius:12px;padding:18px 20px;border:1px solid;border-left-width:8px}
.verdict.ok{background:var(--ok-bg);border-color:var(--ok)}
.verdict.bad{background:var(--bad-bg);border-color:var(--bad)}
.verdict .word{font-size:1.9rem;line-height:1.15;font-weight:700;margin:0}
.ok .word,.word.ok{color:var(--ok)}.bad .word,.word.bad{color:var(--bad)}
.word{font-weight:700;white-space:nowrap}
.verdict p{margin:6px 0 0;overflow-wrap:anywhere}
table{border-collapse:collapse;font-size:.9rem}
caption{text-align:left;color:var(--soft);padding:0 0 6px}
th,td{text-align:left;padding:5px 12px 5px 0;border-bottom:1px solid var(--rule);vertical-align:top}
th{font-weight:600}
thead th{color:var(--soft);font-weight:600;vertical-align:bottom}
.num{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
.wide{width:100%}
.scroll{overflow-x:auto;max-width:100%}
.scroll:focus-visible,summary:focus-visible{outline:2px solid var(--link);outline-offset:2px}
th.name{white-space:nowrap;overflow-wrap:normal;font-weight:400}
.summary tbody th{font-weight:700;overflow-wrap:break-word;min-width:130px;max-width:260px}
details{margin:14px 0}
summary{cursor:pointer;color:var(--link);padding:4px 0}
.first{background:var(--card);border:1px solid var(--rule);border-left:6px solid var(--bad);
border-radius:8px;padding:14px 16px;margin:12px 0}
.first h4{margin:0 0 4px;font-size:1rem;overflow-wrap:anywhere}
.split{display:grid;grid-template-columns:minmax(0,1fr) minmax(0,1fr);gap:8px 28px;
align-items:start}
dl{display:grid;grid-template-columns:max-content minmax(0,1fr);gap:3px 14px;margin:8px 0;
font-size:.92rem}
dt{color:var(--soft)}dd{margin:0;overflow-wrap:anywhere;font-variant-numeric:tabular-nums}
ol.stages{list-style:none;display:flex;flex-wrap:wrap;gap:6px;padding:0;margin:10px 0;
font-size:.85rem}
ol.stages li{border:1px solid var(--rule);border-radius:999px;padding:1px 10px;background:var(--bg)}
ol.stages .differs{border-color:var(--bad);color:var(--bad);background:var(--bad-bg);
font-weight:600}
ol.stages .ok{border-color:var(--ok);color:var(--ok)}
ol.stages .none{color:var(--soft);border-style:dashed}
figure{margin:0}figcaption{font-size:.9rem;font-weight:600;margin-bottom:2px}
svg.plot{width:100%;height:auto;display:block;max-width:560px}
svg text{fill:var(--soft);font-size:12.5px;font-family:inherit}
svg .grid{stroke:var(--rule);stroke-width:1}svg .axis{stroke:var(--soft)}
svg .outside{fill:var(--outside)}
svg .band{stroke:var(--bad);stroke-width:1.6;stroke-dasharray:6 4}
svg .band-label{fill:var(--bad);font-weight:600;paint-order:stroke;stroke:var(--outside);
stroke-width:4px}
svg polyline{fill:none;stroke-width:2;stroke-linejoin:round}
.l0 polyline{stroke:var(--blue)}.l0 circle,.l0 text{fill:var(--blue)}
.l1 polyline{stroke:var(--red);stroke-dasharray:7 3}.l1 circle,.l1 text{fill:var(--red)}
.l2 polyline{stroke:var(--green);stroke-dasharray:2 3}.l2 circle,.l2 text{fill:var(--green)}
.l3 polyline{stroke:var(--pink);stroke-dasharray:9 3 2 3}.l3 circle,.l3 text{fill:var(--pink)}
.l4 polyline{stroke:var(--ink);stroke-dasharray:2 5}.l4 circle,.l4 text{fill:var(--ink)}
svg .within{fill:var(--blue)}svg .over{fill:var(--red)}
.swatch{width:28px;height:10px;vertical-align:middle}
ul.legend{list-style:none;display:flex;flex-wrap:wrap;gap:4px 16px;padding:0;margin:8px 0;
font-size:.86rem;color:var(--soft)}
.cell{display:inline-block;width:18px;height:18px;line-height:18px;text-align:center;
vertical-align:middle;border:1px solid var(--rule);font-size:12px}
table.heat{border-collapse:separate;border-spacing:1px;font-size:.8rem}
table.heat th,table.heat td{border:0;padding:0}
table.heat thead th{font-weight:400;text-align:center;min-width:18px}
table.heat thead th:first-child{text-align:right;padding-right:8px}
table.heat th[scope=row]{position:sticky;left:0;background:var(--bg);font-weight:400;
padding-right:8px;white-space:nowrap;text-align:right}
table.heat th[scope=row] span{display:inline-block;max-width:300px;overflow:hidden;
text-overflow:ellipsis;vertical-align:bottom;direction:rtl}
table.heat bdi{direction:ltr}
.maps{display:flex;flex-wrap:wrap;gap:6px 36px}.maps>div{min-width:0;max-width:100%}
.maps p{width:0;min-width:100%}
table.heat b{color:var(--bad)}table.heat i{color:var(--soft)}
table.heat td{width:18px;min-width:14px;height:18px;line-height:18px;text-align:center;
font-size:12px}
.h0{background:var(--h0)}.h1{background:var(--h1)}.h2{background:var(--h2)}.h3{background:var(--h3)}
.h4{background:var(--h4)}.h5{background:var(--h5);color:var(--t5)}
.h6{background:var(--h6);color:var(--t6)}.h7{background:var(--h7);color:var(--t7)}
.rows td{white-space:nowrap}.rows td:last-child{white-space:normal;min-width:180px}
tr.fail td{background:var(--bad-bg)}tr.fail th{background:var(--bad-bg)}
.columns{columns:2;column-gap:32px}
.columns>div{break-inside:avoid;padding-bottom:12px}
.columns h3{margin-top:0}.columns table{width:100%}.columns td{overflow-wrap:anywhere}
.columns th{font-weight:400;color:var(--soft);width:46%;overflow-wrap:anywhere}
@media (max-width:720px){
.split{grid-template-columns:minmax(0,1fr)}
.columns{columns:1}
.verdict .word{font-size:1.5rem}
svg text{font-size:15px}
.summary tbody th{max-width:none}
table.heat th[scope=row] span{max-width:46vw}
table.heat{font-size:.72rem}
th.name{white-space:normal;overflow-wrap:anywhere;min-width:96px}
.rows th.name{min-width:170px}
.summary thead{position:absolute;width:1px;height:1px;overflow:hidden;clip-path:inset(50%)}
.summary tr{display:block;border:1px solid var(--rule);border-radius:8px;padding:8px 12px;
margin:0 0 10px}
.summary th,.summary td{display:flex;justify-content:space-between;gap:12px;border:0;padding:2px 0;
text-align:right;white-space:normal}
.summary tbody th{font-size:1rem;text-align:left}
.summary td::before{content:attr(data-label);color:var(--soft);text-align:left}
.tolerances td:last-child{min-width:220px}
}
@media print{details>*{display:block}.scroll{overflow:visible}}
"""
