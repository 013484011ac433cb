"""The report's own style sheet, on top of what all pages share."""

STYLE = """
:root { --run1: #2158c7; --run2: #b4540a; --bar: #3b6fd0; --bar-ink: #fff; --good: #147a46; --bad: #c02f35; --hold: #8a6a10; }
@media (prefers-color-scheme: dark) { :root { --run1: #7aa7ff; --run2: #f0a35e; --bar: #4a7bd6; --bar-ink: #fff; --good: #4cc38a;
  --bad: #f0787d; --hold: #e0bf5a; } }
h2, h3 { scroll-margin-top: 12px; }
h3 { font-size: 15px; margin: 26px 0 10px; }
small { display: block; color: var(--muted); font-size: 12px; }
header.run h2 { margin: 0 0 6px; font-size: 22px; }
.lead { max-width: 74ch; }
.phase { font-size: 13px; font-weight: 600; letter-spacing: 0; vertical-align: middle; border: 1.5px solid; border-radius: 99px;
  padding: 2px 11px;
  white-space: nowrap; }
.succeeded { color: var(--good); } .failed, .cancelled { color: var(--bad); } .paused, .suspended, .stopped { color: var(--hold); }
.running { color: var(--run1); }
.why { margin-top: 8px; border-left: 3px solid var(--hold); padding-left: 12px; max-width: 90ch; }
.ids { display: flex; flex-wrap: wrap; gap: 2px 20px; margin-top: 10px; color: var(--muted); font-size: 13px; overflow-wrap: anywhere; }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 18px; margin-top: 18px; }
.pair > header { background: var(--panel); border: 1px solid var(--line); border-radius: 12px; padding: 18px 20px; }
.run-name { display: inline-block; border: 1.5px solid currentColor; border-radius: 6px; padding: 0 8px; font-weight: 700; }
nav { display: flex; flex-wrap: wrap; gap: 4px 18px; margin: 28px 0 0; padding: 10px 0; border-block: 1px solid var(--line);
  font-size: 13px; }
nav a { color: inherit; text-decoration: none; } nav a:hover { text-decoration: underline; }
.key { display: flex; flex-wrap: wrap; gap: 4px 20px; color: var(--muted); font-size: 12.5px; margin: 10px 0 0; }
.swatch { width: 34px; height: 12px; vertical-align: -1px; margin-right: 7px; }
section > .panel + .panel, section .panel + table { margin-top: 14px; }
.panel .grid { margin-top: 20px; } .panel > .grid:first-child { margin-top: 0; }
.panel h3:first-child { margin-top: 0; }
.grid { display: grid; gap: 20px 22px; }
.g2 { grid-template-columns: repeat(2, minmax(0, 1fr)); } .g3 { grid-template-columns: repeat(3, minmax(0, 1fr)); }
.chart { margin: 0; break-inside: avoid; } .chart svg, .timeline { display: block; width: 100%; height: auto; overflow: visible; }
.chart figcaption { font-size: 13px; margin-bottom: 4px; } .chart figcaption span { color: var(--muted); margin-left: 6px; }
.chart text, .timeline text { font: 11px system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; fill: var(--muted);
  font-variant-numeric: tabular-nums; }
.rule { stroke: var(--soft); } .axis { stroke: var(--line); } .border { stroke: var(--faint); stroke-dasharray: 2 3; }
.chart text.stage { fill: var(--ink); } .chart text.empty { fill: var(--faint); font-style: italic; }
.run1 { --c: var(--run1); } .run2 { --c: var(--run2); }
.line { fill: none; stroke: var(--c); stroke-width: 1.8; stroke-linejoin: round; stroke-linecap: round; }
.band { fill: var(--c); opacity: 0.17; } .dot { fill: var(--panel); stroke: var(--c); stroke-width: 1.8; }
.chart text.end { fill: var(--c); font-weight: 600; paint-order: stroke; stroke: var(--panel); stroke-width: 3px; }
  .chart text.bad { fill: var(--bad); font-weight: 700; font-size: 13px; }
line.resume { stroke: var(--hold); stroke-dasharray: 1 3; stroke-width: 1.5; } .chart text.resume { fill: var(--hold); font-weight: 700; }
.timeline text.name { fill: var(--ink); font-size: 13px; font-weight: 600; }
.bar { fill: var(--bar); stroke: var(--bar); } .bar.running { fill-opacity: 0.75; stroke-dasharray: 3 2; }
.bar.failed, .bar.interrupted { stroke: var(--bad); } .bar.preempted { stroke: var(--hold); }
pattern .back { fill: var(--panel); } pattern line.failed { stroke: var(--bad); opacity: 0.45; }
  pattern line.stopped { stroke: var(--hold); opacity: 0.4; }
.timeline text.sign { font-weight: 700; } .timeline text.sign.on { fill: var(--bar-ink); }
.timeline text.sign.over { fill: var(--ink); paint-order: stroke; stroke: var(--panel); stroke-width: 3px; }
.saved { fill: var(--muted); } .handover { fill: none; stroke: var(--muted); stroke-width: 1.3; } .tip { fill: var(--muted); }
.asked { stroke: var(--hold); stroke-dasharray: 3 3; } .cut { fill: var(--soft); }
.gate path { fill: var(--panel); stroke: var(--good); stroke-width: 1.5; } .gate.missed path { stroke: var(--bad); }
.timeline .gate text { fill: var(--good); font-weight: 700; } .timeline .gate.missed text { fill: var(--bad); }
td.text, th.text { text-align: left; white-space: normal; overflow-wrap: anywhere; min-width: 170px; }
.timeline { min-width: 640px; }
td .arrow { color: var(--faint); padding: 0 5px; } td b { font-weight: 600; }
td.worse { color: var(--bad); } .none { color: var(--faint); }
td { vertical-align: top; }
.shares .meter { display: block; position: relative; height: 5px; background: var(--soft); border-radius: 3px; margin-top: 3px;
  min-width: 90px; }
.shares .meter i { position: absolute; inset: 0 auto 0 0; background: var(--run1); border-radius: 3px; max-width: 100%; }
.shares .meter u { position: absolute; top: -3px; bottom: -3px; width: 2px; background: var(--ink); }
table.plan td, table.plan th { padding-inline: 7px; } table.plan td { font-size: 13.5px; }
.bar.unknown { stroke: var(--hold); }
.flow { display: flex; flex-wrap: wrap; gap: 10px; align-items: stretch; margin-bottom: 14px; }
.flow > div { background: var(--panel); border: 1px solid var(--line); border-radius: 10px; padding: 11px 15px; min-width: 150px; }
.flow > div.pending { border-style: dashed; color: var(--muted); } .flow > span { align-self: center; color: var(--muted);
  font-size: 18px; }
.flow code { font-size: 12px; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(204px, 1fr)); gap: 14px;
  align-items: start; }
.card { background: var(--panel); border: 1px solid var(--line); border-radius: 10px; overflow: hidden; break-inside: avoid;
  font-size: 13.5px; }
.card .picture { display: block; width: 100%; max-height: 210px; background: var(--soft); border-bottom: 1px solid var(--line); }
.card > div { padding: 10px 13px 12px; } .card p { white-space: pre-line; overflow-wrap: anywhere; }
.card .task { font-size: 11px; letter-spacing: 0.05em; text-transform: uppercase; color: var(--muted); }
.card .asked-for, .card .expected { color: var(--muted); font-size: 13px; }
.card .said { font-weight: 600; margin-top: 3px; } .card.right .said::before { content: "✓ "; color: var(--good); }
.card.wrong .said::before { content: "✗ "; color: var(--bad); }
.judgements img { float: left; margin: 2px 12px 2px 0; border-radius: 6px; }
.said-table td, .judgements td { white-space: pre-wrap; overflow-wrap: anywhere; min-width: 120px; }
details { margin-top: 10px; } summary { cursor: pointer; font-weight: 600; }
pre { font: 12px/1.5 ui-monospace, "SF Mono", Menlo, Consolas, monospace; background: var(--panel); border: 1px solid var(--line);
  border-radius: 10px; padding: 14px 16px; white-space: pre-wrap; overflow-wrap: anywhere; }
@media screen and (max-width: 820px) { .g3 { grid-template-columns: repeat(2, minmax(0, 1fr)); }
  .pair { grid-template-columns: minmax(0, 1fr); } .timeline { min-width: 860px; }
  .panel > .chart text, .g2 > .chart text { font-size: 16px; } }
@media screen and (max-width: 600px) { .g2, .g3 { grid-template-columns: minmax(0, 1fr); } .panel > .chart svg { min-width: 560px; }
  .panel > .chart text { font-size: 19px; } }
@media print { @page { size: A4 landscape; margin: 12mm; } :root { --run1: #123c8c; --run2: #8a3f05; --bar: #4a4f5a; --good: #0a5a32;
  --bad: #8f1d22; --hold: #5c4708; }
  body { font-size: 12px; } nav, #recipe { display: none; } .panel { padding: 10px 12px; border-radius: 0; border-width: 1px 0; }
  h2 { margin-top: 26px; }
  td.text, th.text, .said-table td, .judgements td { min-width: 0; } .timeline { min-width: 0; }
  .cards { grid-template-columns: repeat(6, minmax(0, 1fr)); gap: 10px; } .card { font-size: 10.5px; }
  .card .picture { max-height: 130px; }
  .card, tr, .flow > div, .timeline, header.run { break-inside: avoid; }
  h2, h3 { break-after: avoid; } }
"""
