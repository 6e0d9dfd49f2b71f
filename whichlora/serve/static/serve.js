"use strict";
// The first page: what the server predicted for a card is filtered here while a slider moves; only a new card, length,
// rank or method asks the server again.
(() => {
  const GIB = 2 ** 30;
  const COLOURS = ["#3478c0", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#8f7ee6"];
  const OTHERS = "#8a93a0";
  const SEQ_LENS = [128, 256, 512, 1024, 2048, 4096, 8192, 16384];
  const TOLERANCE = 0.05; // of time: a larger batch that is slower by more is of no use
  const root = document.body.dataset.root;
  const $ = (id) => document.getElementById(id);
  let found = { rows: [], total_bytes: 0, gpu: "" };
  let asked = null;
  let shown = [];

  const bytes = (n) => (n >= GIB ? `${(n / GIB).toFixed(2)} GiB` : `${(n / 2 ** 20).toFixed(1)} MiB`);
  const count = (n) => (n >= 1e9 ? `${(n / 1e9).toPrecision(3)} B` : `${(n / 1e6).toPrecision(3)} M`);
  function time(s) {
    if (s === null) return "-";
    if (s < 1) return `${(s * 1000).toPrecision(3)} ms`;
    if (s < 120) return `${s.toPrecision(3)} s`;
    return s < 7200 ? `${(s / 60).toPrecision(3)} min` : `${(s / 3600).toPrecision(3)} h`;
  }
  function element(name, text, attributes = {}) {
    const made = document.createElement(name);
    if (text !== null) made.textContent = text;
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    return made;
  }

  function limits() {
    return {
      seq_len: SEQ_LENS[Number($("seq_len").value)],
      samples: Math.round(10 ** Number($("samples").value)),
      epochs: Number($("epochs").value),
      memory_bytes: (found.total_bytes * Number($("memory").value)) / 100,
      limit_s: 3600 * 10 ** Number($("hours").value),
    };
  }
  function tell(limit) {
    $("seq_len_shown").value = limit.seq_len.toLocaleString("en");
    $("samples_shown").value = limit.samples.toLocaleString("en");
    $("epochs_shown").value = limit.epochs;
    $("memory_shown").value = bytes(limit.memory_bytes);
    $("hours_shown").value = time(limit.limit_s);
  }

  function judged(row, limit) {
    if (!row.process_bytes) return { ...row, time_s: null, why: row.rejected.join("; ") || "does not fit", ok: false };
    const time_s = row.step_s === null ? null : limit.epochs * Math.ceil(limit.samples / row.batch_size) * row.step_s;
    const [low, high] = row.process_bytes;
    const why = [];
    if (low > limit.memory_bytes) why.push(`does not fit: at least ${bytes(low)}`);
    else if (high > limit.memory_bytes) why.push(`tight: up to ${bytes(high)}`);
    if (time_s !== null && time_s > limit.limit_s) why.push(`too slow: ${time(time_s)}`);
    return { ...row, time_s, why: why.join("; "), ok: why.length === 0 };
  }
  // Of one model and method: the largest batch within the limits that is clearly slower than no smaller one, else the smallest.
  function best(rows) {
    const fine = rows.filter((row) => row.ok);
    const useful = fine.filter((row) => !fine.some((other) => other.batch_size < row.batch_size && other.time_s * (1 + TOLERANCE) < row.time_s));
    return useful.length ? useful.reduce((a, b) => (b.batch_size > a.batch_size ? b : a)) : rows[0];
  }
  function frontier(rows) {
    const kept = [];
    const fine = rows.filter((row) => row.ok && row.time_s !== null);
    fine.sort((a, b) => b.parameters - a.parameters || a.time_s - b.time_s || a.process_bytes[1] - b.process_bytes[1]);
    for (const row of fine) {
      if (!kept.some((other) => other.time_s <= row.time_s && other.process_bytes[1] <= row.process_bytes[1])) kept.push(row);
    }
    return kept;
  }

  function draw() {
    const limit = limits();
    tell(limit);
    const rows = found.rows.map((row) => judged(row, limit));
    const groups = new Map();
    for (const row of rows) {
      const key = `${row.model}\n${row.method}`;
      if (!groups.has(key)) groups.set(key, []);
      groups.get(key).push(row);
    }
    shown = [...groups.values()].map(best).sort((a, b) => b.parameters - a.parameters || Number(b.ok) - Number(a.ok));
    const choice = shown.find((row) => row.ok);
    $("headline").textContent = choice
      ? `${choice.model} with ${choice.method}, batch ${choice.batch_size}, in ${time(choice.time_s)}`
      : found.rows.length ? "Nothing keeps these limits" : "What fits?";
    table(choice);
    plot(rows, limit);
  }
  function table(choice) {
    const body = $("rows").tBodies[0];
    body.replaceChildren(...shown.map((row) => {
      const line = element("tr", null, row === choice ? { class: "chosen" } : {});
      const name = element("td", null);
      const button = element("button", row.model, { type: "button" });
      button.addEventListener("click", () => select(row));
      name.append(button);
      const known = row.process_bytes !== null;
      line.append(name, element("td", count(row.parameters), { class: "num" }), element("td", `${row.method} r${row.rank}`),
        element("td", known ? row.batch_size : "any", { class: "num" }),
        element("td", known ? bytes(row.process_bytes[1]) : "-", { class: "num" }),
        element("td", time(row.time_s), { class: "num" }),
        element("td", row.ok ? "within every limit" : row.why, { class: `wide ${row.ok ? "yes" : "no"}` }),
        element("td", row.evidence || "-"));
      return line;
    }));
  }

  function plot(rows, limit) {
    const style = getComputedStyle(document.documentElement);
    const ink = style.getPropertyValue("--ink").trim();
    const grid = style.getPropertyValue("--grid").trim();
    const drawn = rows.filter((row) => row.time_s !== null);
    const models = [...new Set([...drawn].sort((a, b) => b.parameters - a.parameters).filter((row) => row.ok).map((row) => row.model))];
    const coloured = models.slice(0, COLOURS.length);
    const hours = (row) => row.time_s / 3600;
    const traces = [...coloured, null].map((model, place) => {
      const own = drawn.filter((row) => (model === null ? !coloured.includes(row.model) : row.model === model));
      return {
        type: "scatter", mode: "markers", name: model === null ? "other models" : model.split("/").pop(), x: own.map(hours),
        y: own.map((row) => row.process_bytes[1] / GIB), customdata: own.map((row) => drawn.indexOf(row)),
        text: own.map((row) => `${row.model}, ${row.method} r${row.rank}, batch ${row.batch_size}<br>${bytes(row.process_bytes[1])}, ${time(row.time_s)}`),
        hoverinfo: "text",
        marker: { color: model === null ? OTHERS : COLOURS[place], size: own.map((row) => (row.ok ? 9 : 6)),
          symbol: own.map((row) => (row.ok ? "circle" : "x-thin-open")), opacity: model === null ? 0.55 : 0.95 },
      };
    });
    const ringed = frontier(rows);
    traces.unshift({ type: "scatter", mode: "markers", name: "frontier", x: ringed.map(hours), y: ringed.map((row) => row.process_bytes[1] / GIB),
      marker: { color: ink, symbol: "circle-open", size: 15, line: { width: 1.2 } }, hoverinfo: "skip" });
    const axis = { gridcolor: grid, zeroline: false, linecolor: grid, tickcolor: grid };
    const limitLine = { color: "#dc4055", width: 1.5, dash: "dash" };
    const layout = {
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: { color: ink, family: "system-ui, sans-serif", size: 12.5 },
      margin: { l: 56, r: 12, t: 8, b: 48 }, hovermode: "closest", uirevision: found.gpu, showlegend: innerWidth > 600,
      legend: { orientation: "h", y: -0.18, yanchor: "top" },
      xaxis: { ...axis, type: "log", title: { text: "time of fine-tuning, hours" } },
      yaxis: { ...axis, title: { text: "process bytes up to, GiB" }, range: [0, Math.max(1, (1.25 * found.total_bytes) / GIB)] },
      shapes: [
        { type: "line", xref: "paper", x0: 0, x1: 1, y0: limit.memory_bytes / GIB, y1: limit.memory_bytes / GIB, line: limitLine },
        { type: "line", yref: "paper", y0: 0, y1: 1, x0: limit.limit_s / 3600, x1: limit.limit_s / 3600, line: limitLine },
      ],
    };
    Plotly.react("plot", traces, layout, { displayModeBar: false, responsive: true }).then((place) => {
      place.removeAllListeners("plotly_click");
      place.on("plotly_click", (event) => {
        const at = event.points[0].customdata;
        if (at !== undefined) select(drawn[at]);
      });
    });
  }

  async function ask(path, fields, signal) {
    const answer = await fetch(root + path, { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(fields), signal });
    const content = await answer.json();
    if (!answer.ok) throw new Error(`${content.error.what}. ${content.error.todo}`);
    return content;
  }
  async function load() {
    if (asked) asked.abort();
    asked = new AbortController();
    const mine = asked;
    const methods = [...document.querySelectorAll("input[name=method]:checked")].map((box) => box.value);
    tell(limits());
    if (!methods.length) { $("status").textContent = "Choose a method."; return; }
    $("status").textContent = "Predicting …";
    try {
      found = await ask("/v1/explore", { gpu: $("gpu").value, methods, rank: Number($("rank").value), seq_len: limits().seq_len }, mine.signal);
      $("status").textContent = `${found.rows.length.toLocaleString("en")} configurations predicted.`;
      draw();
    } catch (error) {
      if (mine === asked && error.name !== "AbortError") $("status").textContent = error.message;
    }
  }

  async function select(row) {
    if (!row.process_bytes) { $("status").textContent = `${row.model}: ${row.why}`; return; }
    const limit = limits();
    const setup = { gpu: found.gpu, model: row.model, method: row.method, rank: row.rank, batch_size: row.batch_size,
      seq_len: limit.seq_len, checkpointing: row.checkpointing };
    let answer;
    try { answer = await ask("/v1/estimate", setup); } catch (error) { $("status").textContent = error.message; return; }
    $("detail").hidden = false;
    $("detail-name").textContent = `${row.model}, ${row.method} r${row.rank}, batch ${row.batch_size}`;
    cards(answer, limit, row);
    breakdown(answer);
    texts(setup, limit, answer);
    $("detail").focus({ preventScroll: true });
    $("detail").scrollIntoView({ block: "start" });
  }
  function cards(answer, limit, row) {
    const steps = limit.epochs * Math.ceil(limit.samples / row.batch_size);
    const span = (name) => (answer[name] ? answer[name].map(time).join(" to ") : "");
    const facts = [
      ["process bytes", bytes(answer.process_bytes), `${bytes(answer.process_interval_bytes[0])} to ${bytes(answer.process_interval_bytes[1])} with ${Math.round(100 * answer.coverage)}%`],
      ["allocated at the peak", bytes(answer.allocated_peak_bytes), answer.peak_phase],
      ["a step", time(answer.step_s ?? null), span("step_s_interval")],
      ["in all", time(answer.step_s ? steps * answer.step_s : null), `${steps.toLocaleString("en")} steps`],
      ["verdict", answer.verdict, `on all of the card`],
    ];
    $("detail-cards").replaceChildren(...facts.map(([name, value, note]) => {
      const card = element("div", null, { class: "card" });
      card.append(element("p", name, { class: "name" }), element("p", value, { class: "value" }), element("p", note, { class: "note" }),
        element("span", answer.evidence, { class: "chip" }));
      return card;
    }));
  }
  function breakdown(answer) {
    const parts = Object.entries(answer.breakdown).sort((a, b) => b[1] - a[1]);
    const whole = Math.max(found.total_bytes, answer.process_bytes);
    $("detail-bar").replaceChildren(...parts.map(([, size], place) => {
      const part = element("span", null, { class: `c${place % 12}` });
      part.style.width = `${(100 * size) / whole}%`;
      return part;
    }));
    $("detail-bar").setAttribute("aria-label", parts.map(([name, size]) => `${name} ${bytes(size)}`).join(", "));
    $("detail-legend").replaceChildren(...parts.map(([name, size], place) => {
      const line = element("li", null);
      line.append(element("i", "", { class: `c${place % 12}` }), `${name} `, element("b", bytes(size)));
      return line;
    }));
  }
  function texts(setup, limit, answer) {
    const checkpointing = setup.checkpointing ? "--checkpointing" : "--no-checkpointing";
    $("command").textContent = `whichlora estimate ${setup.model} --gpu ${setup.gpu} --method ${setup.method} --rank ${setup.rank} --batch-size ${setup.batch_size} --seq-len ${setup.seq_len} ${checkpointing}`;
    const config = [`gpu: ${setup.gpu}`, "stage1_profile:", `  model_names: [${setup.model}]`, "stage2_profile:", `  batch_size: [${setup.batch_size}]`,
      `  total_time_mins: ${Math.ceil(limit.limit_s / 60)}`, `methods: [${setup.method}]`, `ranks: [${setup.rank}]`, `seq_len: ${setup.seq_len}`,
      `checkpointing: ${setup.checkpointing}`, "dataset:", `  samples: ${limit.samples}  # or source: your-data.jsonl`, `epochs: ${limit.epochs}`, ""].join("\n");
    $("config").textContent = config;
    const steps = limit.epochs * Math.ceil(limit.samples / setup.batch_size);
    const minutes = Math.max(30, Math.ceil((1.5 * steps * (answer.step_s || 0)) / 60) + 10);
    $("job").textContent = ["#!/bin/bash", "#SBATCH --job-name=whichlora", "#SBATCH --gres=gpu:1", `#SBATCH --time=${minutes}`, "#SBATCH --requeue",
      "# The config above, with your data in it, in pick.yaml.", "set -euo pipefail", "whichlora pick pick.yaml --out pick", "whichlora finetune pick", ""].join("\n");
  }
  async function copy(button) {
    const text = $(button.dataset.copy).textContent;
    try {
      await navigator.clipboard.writeText(text);
    } catch { // no clipboard without https: select it, and let the browser copy what is selected
      getSelection().selectAllChildren($(button.dataset.copy));
      document.execCommand("copy");
    }
    $("status").textContent = "Copied.";
  }

  document.addEventListener("DOMContentLoaded", () => {
    let frame = 0;
    const soon = () => { cancelAnimationFrame(frame); frame = requestAnimationFrame(draw); };
    for (const id of ["samples", "epochs", "memory", "hours"]) $(id).addEventListener("input", soon);
    let pause = 0;
    $("seq_len").addEventListener("input", () => { tell(limits()); clearTimeout(pause); pause = setTimeout(load, 120); });
    for (const id of ["gpu", "rank"]) $(id).addEventListener("change", load);
    for (const box of document.querySelectorAll("input[name=method]")) box.addEventListener("change", load);
    for (const button of document.querySelectorAll("[data-copy]")) button.addEventListener("click", () => copy(button));
    document.addEventListener("theme", draw);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
    $("choose").addEventListener("submit", (event) => event.preventDefault());
    load();
  });
})();
