"""The style sheet of parity.html: light and dark, from a telephone to a wide screen, and on paper."""

STYLE = """\
:root{color-scheme:light dark;
--bg:#fff;--panel:#f6f7f9;--ink:#171a1f;--mute:#59626e;--line:#dde1e7;--link:#1f5fbf;
--pass:#0f6b3b;--pass-bg:#e9f5ee;--fail:#a81e17;--fail-bg:#fcedeb;--wait:#7d5200;--wait-bg:#fbf3e0;
--s1:#2563b8;--s2:#c2571a;--s3:#0f7f6e;--s4:#8a4fb8;--s5:#857300;--s6:#b03a6f;
--h1:#dbe8f8;--h2:#b0cdf0;--h3:#7aa9e2;--h4:#417fc9;--h5:#17508f;--h0:#fff}
@media (prefers-color-scheme:dark){:root{
--bg:#101317;--panel:#181c22;--ink:#e4e8ed;--mute:#98a3b0;--line:#2b323b;--link:#82b1ff;
--pass:#62d394;--pass-bg:#10271b;--fail:#ff8d83;--fail-bg:#331614;--wait:#ecc062;--wait-bg:#2c2310;
--s1:#7fb0ff;--s2:#f2a365;--s3:#55c7b3;--s4:#c79bf0;--s5:#d3c04a;--s6:#f08ab6;
--h1:#16263d;--h2:#1f3f69;--h3:#2d62a3;--h4:#5792dd;--h5:#abcffb;--h0:#101317}}
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%}
body{margin:0;background:var(--bg);color:var(--ink);font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif;
font-variant-numeric:tabular-nums}
main{max-width:1180px;margin:0 auto;padding:20px 24px 64px}
h1,h2,h3,p{margin:0}
h2{font-size:19px;line-height:1.3;margin:44px 0 4px;padding-top:16px;border-top:1px solid var(--line)}
h3{font-size:14px;font-weight:600;margin:18px 0 4px}
h3::first-letter{text-transform:uppercase}
p{max-width:78ch;overflow-wrap:anywhere}
.lead{color:var(--mute)}
.verdict{display:grid;grid-template-columns:auto 1fr;gap:2px 16px;align-items:center;padding:20px 22px;
border-radius:8px;border-left:6px solid var(--tone);background:var(--tone-bg)}
.verdict.pass{--tone:var(--pass);--tone-bg:var(--pass-bg)}
.verdict.fail{--tone:var(--fail);--tone-bg:var(--fail-bg)}
.verdict.wait{--tone:var(--wait);--tone-bg:var(--wait-bg)}
.verdict svg{width:44px;height:44px;grid-row:span 2}
.verdict .ring{fill:var(--tone)}
.verdict .sign{fill:none;stroke:var(--bg);stroke-width:3.2;stroke-linecap:round;stroke-linejoin:round}
h1{font-size:27px;line-height:1.2;letter-spacing:.01em}
h1 .word{color:var(--tone)}
h1 .target{display:inline-block;font-weight:500;overflow-wrap:anywhere}
.verdict p{max-width:96ch}
.loosened{grid-column:1/-1;margin-top:12px;padding:8px 12px;border:1px solid var(--fail);border-radius:6px;
color:var(--fail);font-weight:600}
nav{display:flex;flex-wrap:wrap;gap:2px 16px;margin:16px 0 0;font-size:14px}
a{color:var(--link);text-decoration-thickness:1px;text-underline-offset:2px}
.charts{display:grid;grid-template-columns:repeat(2,minmax(0,1fr));gap:28px 36px;margin:20px 0 8px}
figure{margin:0;min-width:0}
figure.wide{grid-column:1/-1}
figcaption{font-weight:600}
figure>p{color:var(--mute);font-size:13.5px;margin-bottom:6px}
figure svg{display:block;width:100%;height:auto}
.legend{display:flex;flex-wrap:wrap;gap:2px 16px;margin:4px 0 0;padding:0;list-style:none;font-size:13px;
color:var(--mute)}
.legend li{display:flex;align-items:center;gap:6px}
.legend svg{flex:none;width:18px;height:12px}
.box{overflow-x:auto;margin:8px 0 4px;border:1px solid var(--line);border-radius:6px;max-width:100%;width:fit-content}
.box:focus-visible,summary:focus-visible,a:focus-visible{outline:2px solid var(--link);outline-offset:2px}
.drawing{overflow-x:auto}
table{border-collapse:collapse;font-size:13px;line-height:1.4}
caption{position:absolute;width:1px;height:1px;overflow:hidden;clip-path:inset(50%)}
th,td{padding:5px 10px;text-align:left;vertical-align:top;white-space:nowrap;unicode-bidi:plaintext}
th{font-weight:600;color:var(--mute);background:var(--panel);border-bottom:1px solid var(--line)}
tr+tr>td{border-top:1px solid var(--line)}
.n{text-align:right}
.long{white-space:normal;min-width:24ch;max-width:56ch;overflow-wrap:anywhere}
.hash{font:12px/1.6 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
.bad{color:var(--fail);font-weight:600}
.good{color:var(--pass)}
.two{display:block}
details{margin:8px 0}
summary{cursor:pointer;color:var(--link);font-size:14px;width:fit-content}
footer{overflow-wrap:anywhere;
margin-top:44px;padding-top:14px;border-top:1px solid var(--line);color:var(--mute);font-size:13px}
svg text{font-size:12px;fill:var(--mute)}
.grid{stroke:var(--line);stroke-width:1;fill:none}
.axis{stroke:var(--mute);stroke-width:1;fill:none}
.line{fill:none;stroke:var(--c);stroke-width:1.8;stroke-linejoin:round}
.line.faint{opacity:.4;stroke-width:1.2}
.dot,.bar,.key{fill:var(--c)}
.bar.s1{fill-opacity:.8}
.mark,.cross{fill:none;stroke:var(--c);stroke-width:1.8}
.mark.gate{stroke-dasharray:7 4}
.mark.window{stroke-dasharray:2 4}
.s1{--c:var(--s1)}.s2{--c:var(--s2)}.s3{--c:var(--s3)}.s4{--c:var(--s4)}.s5{--c:var(--s5)}.s6{--c:var(--s6)}
.gate,.divergence{--c:var(--fail)}.window,.tie{--c:var(--mute)}.near-tie{--c:var(--s5)}.consequence{--c:var(--s2)}
.h0{fill:var(--h0)}.h1{fill:var(--h1)}.h2{fill:var(--h2)}.h3{fill:var(--h3)}.h4{fill:var(--h4)}.h5{fill:var(--h5)}
.hatch{fill:url(#hatching);stroke:var(--fail);stroke-width:.5}
.hatch-line{stroke:var(--fail);stroke-width:1.6}
@media (max-width:760px){
main{padding:12px 16px 48px}
.charts{grid-template-columns:minmax(0,1fr)}
.verdict{padding:16px;gap:8px 12px}
.verdict svg{width:34px;height:34px;grid-row:auto}
.verdict p{grid-column:1/-1}
h1{font-size:22px}
h2{margin-top:32px}
th,td{padding:5px 9px}
td:first-child:not(.n){white-space:normal}
.drawing.fits svg text{font-size:17px}}
@media print{details>*{display:block}nav{display:none}figure,tr{break-inside:avoid}}
@media (forced-colors:active){.verdict{border:2px solid}}
"""
