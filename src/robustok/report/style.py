"""How the page looks (CSS), and the one script it has: a slider that swaps before and after."""

STYLE = """
:root{color-scheme:light;--ink:#1f2430;--quiet:#5f6775;--line:#e2e4e9;--accent:#2f6690}
*{box-sizing:border-box}
body{margin:0;background:#fff;color:var(--ink);font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif;
-webkit-print-color-adjust:exact;print-color-adjust:exact}
main{max-width:1080px;margin:0 auto;padding:48px 24px 96px}
h1{font-size:2.1rem;line-height:1.2;letter-spacing:-.02em;font-weight:650;margin:0 0 20px}
h2{font-size:1.3rem;letter-spacing:-.01em;font-weight:620;margin:64px 0 16px;padding-top:16px;
border-top:1px solid var(--line)}
h3{font-size:1rem;font-weight:620;margin:32px 0 10px}
h4{font-size:.85rem;font-weight:620;color:var(--quiet);margin:28px 0 8px}
p{margin:0 0 12px}.kicker{color:var(--accent);font-size:.85rem;margin-bottom:4px}
.measure{max-width:78ch}.lede{font-size:1.1rem;line-height:1.65;max-width:68ch}
.small,small{font-size:.8rem;color:var(--quiet);font-weight:400}.small{max-width:90ch}
code,pre{font:.8rem/1.5 ui-monospace,Menlo,Consolas,monospace}
pre{background:#f6f7f9;padding:16px;border-radius:6px;overflow-x:auto}
.scroll{overflow-x:auto}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}
caption{text-align:left;font-size:.8rem;color:var(--quiet);padding-bottom:10px}
th{text-align:left;font-weight:560}
.results{font-size:.9rem}.results th,.results td{padding:8px 18px 8px 0;vertical-align:top;white-space:nowrap}
.results thead th{border-bottom:1px solid var(--ink);vertical-align:bottom;white-space:normal}
.results small{display:block}.results thead small{font-size:.7rem;line-height:1.3}
.results tbody{border-bottom:1px solid var(--line)}.results th[scope=row]{font-weight:400}
.results data{font-weight:600}.error{color:var(--quiet)}
.results th.seed,.results .seed~td{padding-top:0;padding-bottom:3px;font-size:.82rem;color:var(--quiet)}
.results th.seed{padding-left:14px}.results .seed~td data{font-weight:400}
.plain{font-size:.82rem}
.plain th,.plain td{padding:5px 16px 5px 0;border-bottom:1px solid var(--line);vertical-align:top}
.row{display:flex;flex-wrap:wrap;gap:24px 48px;align-items:flex-start}
.heat caption{color:var(--ink);font-weight:560;font-size:.95rem}.heat caption small{display:block}
.heat th{font-size:.8rem;color:var(--quiet);padding:4px 8px;font-weight:400;text-align:center}
.heat td{min-width:76px;padding:10px 8px;text-align:center;border:2px solid #fff}
.heat thead td{min-width:0}
figure{margin:0}figcaption{font-size:.8rem;color:var(--quiet)}
.curves{display:grid;grid-template-columns:repeat(auto-fill,minmax(220px,1fr));gap:18px 20px}
.curves img{display:block;width:100%;height:auto}
.legend{font-size:.8rem;font-weight:400;color:var(--quiet);margin-left:16px}
.legend i{display:inline-block;width:14px;height:3px;border-radius:2px;vertical-align:middle;margin:0 5px 0 10px}
img.pixels,.tile{image-rendering:pixelated}.row img{max-width:100%;display:block}
.grid{display:flex;gap:16px}.grid img{display:block;max-width:none}.titles{flex:none;width:min(30%,180px)}
.titles span{display:flex;align-items:center;height:var(--h);font-size:.82rem;line-height:1.3;color:var(--quiet)}
.tile{position:relative;display:inline-block;width:var(--w);height:var(--h);vertical-align:top;
background-repeat:no-repeat;background-position:calc(var(--x)*-1*var(--w)) calc(var(--y)*-1*var(--h))}
.viewer{--after:100%}.viewer label{display:block;font-size:.85rem;margin-bottom:6px}
.viewer input{width:min(320px,50vw);vertical-align:middle;margin:0 8px;accent-color:var(--accent)}
.tiles{display:flex;flex-wrap:wrap;gap:4px;line-height:0}
.top{position:absolute;inset:0;clip-path:inset(0 calc(100% - var(--after)) 0 0)}
.tile:hover>.top{clip-path:inset(0 0 0 var(--after))}
.cards{display:flex;flex-wrap:wrap;gap:16px 24px}.card{width:max-content;max-width:100%;line-height:0}
.card .tile{margin:0 2px 2px 0}.card figcaption{line-height:1.6;font-variant-numeric:tabular-nums}
details{border-bottom:1px solid var(--line);padding:10px 0}summary{cursor:pointer}
details>*:not(summary){margin-top:12px}
.notes{font-size:.85rem;color:var(--quiet);padding-left:20px}
@media (max-width:600px){main{padding:28px 16px 64px}.lede{font-size:1rem}}
"""

SCRIPT = """
for (const viewer of document.querySelectorAll('.viewer')) {
  const label = viewer.querySelector('label');
  label.hidden = false;
  label.querySelector('input').addEventListener('input',
    event => viewer.style.setProperty('--after', event.target.value + '%'));
}
"""
