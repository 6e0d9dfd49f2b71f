"use strict";
// The first page: what the server predicted for a card is filtered here while a slider moves; only a new card, length,
// rank or method asks the server again. The choice is kept in the address, so that it can be sent to somebody.
(() => {
  const GIB = 2 ** 30;
  const SIZES = ["#6db3e8", "#3478c0", "#7b52c9", "#c2408f", "#e2552b"]; // small to large models
  const OTHERS = "#8a93a0";
  const SYMBOLS = { lora: "circle", qlora: "square", dora: "diamond", qdora: "cross", "lora-fa": "triangle-up", full: "star" };
  const TOLERANCE = 0.05; // of time: a larger batch that is slower by more is of no use
  const AT_ONCE = 4; // models in a request: the first are shown while the others are predicted
  const SERVED = { phase: "generate", prefill_len: 512, decode_len: 128 };
  const root = document.body.dataset.root;
  const $ = (id) => document.getElementById(id);
  let found = { rows: [], total_bytes: 0, gpu: "", serving: new Map() };
  let asked = null;
  let shown = [];
  let opened = null; // what is open below the plot: its row, its setup, the server's answer

  const bytes = (n) => (n >= GIB ? `${(n / GIB).toFixed(2)} GiB` : n >= 2 ** 20 ? `${(n / 2 ** 20).toFixed(1)} MiB` : `${(n / 1024).toFixed(1)} KiB`);
  const count = (n) => (n >= 1e9 ? `${(n / 1e9).toPrecision(3)} B` : `${(n / 1e6).toPrecision(3)} M`);
  function time(s) {
    if (s === null || s === undefined) return "-";
    if (s < 1) return `${(s * 1000).toPrecision(3)} ms`;
    if (s < 120) return `${s.toPrecision(3)} s`;
    if (s < 7200) return `${(s / 60).toPrecision(3)} min`;
    return s < 48 * 3600 ? `${(s / 3600).toPrecision(3)} h` : `${(s / 86400).toPrecision(3)} days`;
  }
  function element(name, text, attributes = {}) {
    const made = document.createElement(name);
    if (text !== null) made.textContent = text;
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    return made;
  }

  // --- what is asked: each slider has a field beside it that takes any number ---

  const round = (n) => Number(n.toPrecision(3));
  const LIMITS = {
    seq_len: { first: 1024, at: (place) => 2 ** place, place: Math.log2 },
    samples: { first: 10000, at: (place) => Math.round(round(10 ** place)), place: Math.log10 },
    epochs: { first: 1, at: Number, place: Number },
    // A share of the card; the field shows it in GiB.
    memory: { first: 100, at: Number, place: Number, show: (share) => round((share / 100) * (found.total_bytes / GIB)), read: (gib) => (100 * gib * GIB) / found.total_bytes },
    hours: { first: 10, at: (place) => round(10 ** place), place: Math.log10 },
    token_ms: { first: Infinity, at: (place) => (place > 3 ? Infinity : round(10 ** place)), place: (ms) => (ms === Infinity ? 3.02 : Math.log10(ms)) },
  };
  const asks = Object.fromEntries(Object.entries(LIMITS).map(([name, limit]) => [name, limit.first]));
  function showField(name) {
    const { show } = LIMITS[name];
    const value = show ? show(asks[name]) : asks[name];
    $(`${name}_exact`).value = Number.isFinite(value) && (name !== "memory" || found.total_bytes) ? value : "";
  }
  function showSlider(name) {
    $(name).value = LIMITS[name].place(asks[name]);
    const units = { memory: "% of the card", hours: " hours", token_ms: " ms" };
    const value = asks[name] === Infinity ? "any" : `${asks[name].toLocaleString("en", { maximumFractionDigits: 1 })}${units[name] || ""}`;
    $(name).setAttribute("aria-valuetext", value);
  }
  function bind(name, changed) {
    $(name).addEventListener("input", () => { asks[name] = LIMITS[name].at(Number($(name).value)); showField(name); showSlider(name); changed(); });
    const field = $(`${name}_exact`);
    field.addEventListener("input", () => {
      const { read, first } = LIMITS[name];
      const given = field.value === "" && name === "token_ms" ? Infinity : Number(field.value);
      const valid = given === Infinity || (field.value !== "" && field.checkValidity());
      field.setAttribute("aria-invalid", String(!valid));
      if (!valid) return;
      asks[name] = read ? read(given) : given;
      if (!(asks[name] > 0)) asks[name] = first;
      showSlider(name);
      changed();
    });
  }
  function limits() {
    return { ...asks, memory_bytes: (found.total_bytes * asks.memory) / 100, limit_s: 3600 * asks.hours, token_s: asks.token_ms / 1000 };
  }
  const methods = () => [...document.querySelectorAll("input[name=method]:checked")].map((box) => box.value);
  function keepAddress() {
    const said = new URLSearchParams({ gpu: $("gpu").value, rank: $("rank").value, methods: methods().join(" ") });
    for (const [name, { first }] of Object.entries(LIMITS)) if (asks[name] !== first) said.set(name, round(asks[name]) === asks[name] ? asks[name] : asks[name].toFixed(4));
    history.replaceState(null, "", `#${said}`);
  }
  function readAddress() {
    const said = new URLSearchParams(location.hash.slice(1));
    for (const name of ["gpu", "rank"]) {
      if ([...$(name).options].some((option) => option.value === said.get(name))) $(name).value = said.get(name);
    }
    const named = (said.get("methods") || "").split(" ").filter((name) => name in SYMBOLS);
    if (named.length) for (const box of document.querySelectorAll("input[name=method]")) box.checked = named.includes(box.value);
    for (const name of Object.keys(LIMITS)) {
      const value = Number(said.get(name));
      if (value > 0) asks[name] = ["seq_len", "samples", "epochs"].includes(name) ? Math.max(1, Math.round(value)) : value;
      showField(name);
      showSlider(name);
    }
  }

  // --- what keeps the limits ---

  function judged(row, limit) {
    const token_s = found.serving.get(row.model) ?? null;
    const serves = limit.token_s === Infinity || (token_s !== null && token_s <= limit.token_s) ? []
      : [token_s === null ? "time of serving is not known yet" : `serves too slowly: ${time(token_s)} a token`];
    if (!row.process_bytes) return { ...row, token_s, time_s: null, why: [...serves, ...row.rejected].join("; ") || "does not fit", ok: false };
    const time_s = row.step_s === null ? null : limit.epochs * Math.ceil(limit.samples / row.batch_size) * row.step_s;
    const [low, high] = row.process_bytes;
    const why = [...serves];
    if (low > limit.memory_bytes) why.push(`does not fit: at least ${bytes(low)}`);
    else if (high > limit.memory_bytes) why.push(`tight: up to ${bytes(high)}`);
    if (time_s !== null && time_s > limit.limit_s) why.push(`too slow: ${time(time_s)}`);
    return { ...row, token_s, time_s, why: why.join("; "), ok: why.length === 0 };
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
  const same = (a, b) => a.model === b.model && a.method === b.method && a.batch_size === b.batch_size && a.rank === b.rank;

  function draw() {
    keepAddress();
    const limit = limits();
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
    plot(rows, limit, choice);
    if (opened) detail(limit, rows.find((row) => same(row, opened.row)));
  }
  function table(choice) {
    const body = $("rows").tBodies[0];
    const focused = document.activeElement?.dataset?.row;
    body.replaceChildren(...shown.map((row) => {
      const line = element("tr", null, row === choice ? { class: "chosen" } : {});
      const name = element("td", null);
      const dot = element("i", "", { class: "dot", "aria-hidden": "true" });
      dot.style.background = row.ok ? colour(row.parameters) : OTHERS;
      const button = element("button", row.model, { type: "button", "data-row": `${row.model} ${row.method}` });
      button.prepend(dot);
      button.addEventListener("click", () => select(row));
      name.append(button);
      const known = row.process_bytes !== null;
      line.append(name, element("td", count(row.parameters), { class: "num" }), element("td", `${row.method} r${row.rank}`),
        element("td", known ? row.batch_size : "any", { class: "num" }),
        element("td", known ? bytes(row.process_bytes[1]) : "-", { class: "num" }),
        element("td", time(row.time_s), { class: "num" }),
        element("td", row.token_s === null ? "-" : `${time(row.token_s)}`, { class: "num" }),
        element("td", row.ok ? "within every limit" : row.why, { class: `wide ${row.ok ? "yes" : "no"}` }),
        element("td", row.evidence || "-"));
      return line;
    }));
    if (focused) body.querySelector(`[data-row="${CSS.escape(focused)}"]`)?.focus({ preventScroll: true });
  }

  // --- the plot ---

  let range = [8.6, 11];
  function colour(parameters) {
    const share = Math.min(1, Math.max(0, (Math.log10(parameters) - range[0]) / (range[1] - range[0] || 1))) * (SIZES.length - 1);
    const [from, to] = [Math.floor(share), Math.ceil(share)].map((place) => SIZES[place].match(/[0-9a-f]{2}/g).map((part) => parseInt(part, 16)));
    return `rgb(${from.map((part, place) => Math.round(part + (to[place] - part) * (share % 1))).join(",")})`;
  }
  const TIMES = [["1 s", 1], ["10 s", 10], ["1 min", 60], ["2", 120], ["5", 300], ["10 min", 600], ["20", 1200], ["30", 1800], ["1 h", 3600], ["2", 7200],
    ["5", 18000], ["10 h", 36000], ["1 day", 86400], ["2", 172800], ["5", 432000], ["10 days", 864000], ["30", 2592000], ["100 days", 8640000], ["1000 days", 86400000]];
  function plot(rows, limit, choice) {
    const style = getComputedStyle(document.documentElement);
    const ink = style.getPropertyValue("--ink").trim();
    const grid = style.getPropertyValue("--grid").trim();
    const drawn = rows.filter((row) => row.time_s !== null);
    const y = (row) => row.process_bytes[1] / GIB;
    const said = (row) => `${row.model}, ${row.method} r${row.rank}, batch ${row.batch_size}<br>${bytes(row.process_bytes[1])}, ${time(row.time_s)}${row.ok ? "" : `<br>${row.why}`}`;
    const trace = (name, own, marker) => ({ type: "scatter", mode: "markers", name, x: own.map((row) => row.time_s), y: own.map(y),
      customdata: own.map((row) => drawn.indexOf(row)), text: own.map(said), hoverinfo: "text", marker });
    const traces = [trace("beyond a limit", drawn.filter((row) => !row.ok), { color: OTHERS, size: 5, symbol: "x-thin-open", opacity: 0.5 })];
    for (const method of Object.keys(SYMBOLS)) {
      const own = drawn.filter((row) => row.ok && row.method === method);
      if (own.length) traces.push(trace(method, own, { color: own.map((row) => colour(row.parameters)), size: 9, symbol: SYMBOLS[method] }));
    }
    const ringed = frontier(rows);
    traces.unshift({ type: "scatter", mode: "markers", name: "frontier", x: ringed.map((row) => row.time_s), y: ringed.map(y),
      marker: { color: ink, symbol: "circle-open", size: 15, line: { width: 1.2 } }, hoverinfo: "skip" });
    const axis = { gridcolor: grid, zeroline: false, linecolor: grid, tickcolor: grid };
    const limitLine = { color: "#dc4055", width: 1.5, dash: "dash" };
    const note = choice && { x: Math.log10(choice.time_s), y: y(choice), text: `${choice.model.split("/").pop()}, ${choice.method}`, showarrow: true, arrowcolor: ink, arrowwidth: 1,
      ax: -30, ay: -34, font: { color: ink }, bgcolor: style.getPropertyValue("--card").trim(), borderpad: 3, bordercolor: grid };
    const layout = {
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: { color: ink, family: "system-ui, sans-serif", size: 12.5 },
      margin: { l: 52, r: 12, t: 8, b: 48 }, hovermode: "closest", uirevision: found.gpu, showlegend: true,
      legend: { orientation: "h", y: innerWidth > 600 ? -0.2 : -0.3, yanchor: "top", itemsizing: "constant" },
      xaxis: { ...axis, type: "log", title: { text: "time of fine-tuning" }, tickmode: "array", tickvals: TIMES.map((each) => each[1]), ticktext: TIMES.map((each) => each[0]), tickangle: 0 },
      yaxis: { ...axis, title: { text: "process bytes up to, GiB" }, range: [0, Math.max(1, (1.15 * found.total_bytes) / GIB)] },
      annotations: note ? [note] : [],
      shapes: [
        { type: "line", xref: "paper", x0: 0, x1: 1, y0: limit.memory_bytes / GIB, y1: limit.memory_bytes / GIB, line: limitLine },
        { type: "line", yref: "paper", y0: 0, y1: 1, x0: limit.limit_s, x1: limit.limit_s, line: limitLine },
      ],
    };
    Plotly.react("plot", traces, layout, { displayModeBar: false, responsive: true }).then((place) => {
      place.removeAllListeners("plotly_click");
      place.on("plotly_click", (event) => {
        const at = event.points.map((point) => point.customdata).find((one) => one !== undefined);
        if (at !== undefined) select(drawn[at]);
      });
    });
  }

  // --- asking the server ---

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
    const fields = { gpu: $("gpu").value, methods: methods(), rank: Number($("rank").value), seq_len: asks.seq_len };
    if (!fields.methods.length) { $("status").textContent = "Choose a method."; return; }
    const names = $("choose").dataset.models.split(" ");
    const parts = [];
    for (let place = 0; place < names.length; place += AT_ONCE) parts.push(names.slice(place, place + AT_ONCE));
    const fresh = { rows: [], total_bytes: 0, gpu: fields.gpu, serving: fields.gpu === found.gpu ? found.serving : new Map() };
    const told = (done) => { $("status").textContent = done < parts.length ? `Predicting … ${done} of ${parts.length}` : `${fresh.rows.length.toLocaleString("en")} configurations predicted.`; };
    told(0);
    try {
      if (asks.token_ms !== Infinity) await serving(fresh, names, mine.signal);
      for (const [place, models] of parts.entries()) {
        const answer = await ask("/v1/explore", { ...fields, models }, mine.signal);
        fresh.rows.push(...answer.rows);
        fresh.total_bytes = answer.total_bytes;
        found = fresh;
        const sizes = fresh.rows.map((row) => Math.log10(row.parameters));
        range = [Math.min(8.6, ...sizes), Math.max(...sizes)];
        showField("memory");
        draw();
        if (place + 1 < parts.length) told(place + 1);
      }
      await serving(fresh, names, mine.signal);
      draw();
      told(parts.length);
    } catch (error) {
      if (mine === asked && error.name !== "AbortError") $("status").textContent = error.message;
    }
  }
  // How fast a model answers on the card does not hang on how it is fine-tuned: it is asked once a card.
  async function serving(fresh, names, signal) {
    if (fresh.serving.size) return;
    const known = new Map();
    for (let place = 0; place < names.length; place += 2 * AT_ONCE) {
      const some = names.slice(place, place + 2 * AT_ONCE);
      const answer = await ask("/v1/estimates", { requests: some.map((model) => ({ gpu: fresh.gpu, model, ...SERVED })) }, signal);
      answer.predictions.forEach((one, at) => { if (one.decode_s_per_token) known.set(some[at], one.decode_s_per_token); });
    }
    fresh.serving = known;
  }

  // --- what is behind a mark ---

  async function select(row) {
    if (!row.process_bytes) { $("status").textContent = `${row.model}: ${row.why}`; return; }
    const setup = { gpu: found.gpu, model: row.model, method: row.method, rank: row.rank, batch_size: row.batch_size,
      seq_len: asks.seq_len, checkpointing: row.checkpointing };
    let answer;
    try { answer = await ask("/v1/estimate", setup); } catch (error) { $("status").textContent = error.message; return; }
    opened = { row, setup, answer };
    $("detail").hidden = false;
    $("detail-name").textContent = `${row.model}, ${row.method} r${row.rank}, batch ${row.batch_size}`;
    breakdown(answer);
    $("detail-caveats").hidden = !answer.caveats.length;
    $("detail-caveats").replaceChildren(...answer.caveats.map((text) => element("li", `${text}.`)));
    detail(limits(), row);
    $("detail").focus({ preventScroll: true });
    $("detail").scrollIntoView({ block: "start", behavior: matchMedia("(prefers-reduced-motion: reduce)").matches ? "auto" : "smooth" });
  }
  function close() {
    opened = null;
    $("detail").hidden = true;
    document.querySelector("#rows tr.chosen button")?.focus();
  }
  // What depends on the limits is written anew as they move; without a row, the server was asked for another setup since.
  function detail(limit, row) {
    if (!row || opened.setup.gpu !== found.gpu || opened.setup.seq_len !== limit.seq_len) { opened = null; $("detail").hidden = true; return; }
    $("detail-result").textContent = row.ok ? "Within every limit." : `Not within the limits: ${row.why}.`;
    cards(opened.answer, limit, row);
    texts(opened.setup, limit, opened.answer);
  }
  function cards(answer, limit, row) {
    const steps = limit.epochs * Math.ceil(limit.samples / row.batch_size);
    const span = (name, times) => (answer[name] ? answer[name].map((s) => time(s * times)).join(" to ") : "");
    const sure = `with ${Math.round(100 * answer.coverage)}%`;
    const facts = [
      ["process bytes", bytes(answer.process_bytes), `${answer.process_interval_bytes.map(bytes).join(" to ")} ${sure}; what nvidia-smi shows`],
      ["allocated at the peak", bytes(answer.allocated_peak_bytes), `in ${answer.peak_phase}`],
      ["a step", time(answer.step_s), span("step_s_interval", 1)],
      ["in all", time(answer.step_s ? steps * answer.step_s : null), `${span("step_s_interval", steps)}, ${steps.toLocaleString("en")} steps`],
    ];
    if (row.token_s !== null) facts.push(["serving, a token", time(row.token_s), "the base model in bf16, prompt of 512"]);
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
    const used = parts.reduce((sum, part) => sum + part[1], 0);
    const label = (name, size) => `${name} ${bytes(size)}`;
    $("detail-bar").replaceChildren(...parts.map(([name, size], place) => {
      const part = element("span", null, { class: `c${place % 12}`, title: label(name, size) });
      part.style.width = `${(100 * size) / whole}%`;
      return part;
    }));
    if (whole > used) parts.push(["free", whole - used]);
    $("detail-bar").setAttribute("aria-label", parts.map(([name, size]) => label(name, size)).join(", "));
    $("detail-legend").replaceChildren(...parts.map(([name, size], place) => {
      const line = element("li", null);
      line.append(element("i", "", { class: name === "free" ? "free" : `c${place % 12}` }), `${name} `, element("b", bytes(size)));
      return line;
    }));
  }
  function texts(setup, limit, answer) {
    const checkpointing = setup.checkpointing ? "--checkpointing" : "--no-checkpointing";
    $("command").textContent = `whichlora estimate ${setup.model} --gpu ${setup.gpu} --method ${setup.method} --rank ${setup.rank} --batch-size ${setup.batch_size} --seq-len ${setup.seq_len} ${checkpointing}`;
    const gb = Math.floor((limit.memory_bytes / 1e9) * 100) / 100;
    const config = [`gpu: ${setup.gpu}`, "stage1_profile:", `  model_names: [${setup.model}]`,
      ...(Number.isFinite(limit.token_ms) ? [`  time_per_token_ms: ${limit.token_ms}`] : []),
      "stage2_profile:", `  batch_size: [${setup.batch_size}]`, ...(limit.memory < 100 ? [`  peak_memory_gb: ${gb}`] : []),
      `  total_time_mins: ${Math.ceil(limit.limit_s / 60)}`, `methods: [${setup.method}]`, `ranks: [${setup.rank}]`, `seq_len: ${setup.seq_len}`,
      `checkpointing: ${setup.checkpointing}`, "dataset:", `  samples: ${limit.samples}  # or source: your-data.jsonl`, `epochs: ${limit.epochs}`, ""].join("\n");
    $("config").textContent = config;
    const steps = limit.epochs * Math.ceil(limit.samples / setup.batch_size);
    const minutes = Math.max(30, Math.ceil((1.5 * steps * (answer.step_s || 0)) / 60) + 10);
    $("job").textContent = ["#!/bin/bash", "# sbatch job.sh your-data.jsonl", "#SBATCH --job-name=whichlora", "#SBATCH --gres=gpu:1", `#SBATCH --time=${minutes}`, "#SBATCH --requeue",
      "set -euo pipefail", "data=${1:?name the data set: a file, or an id of the Hub}", "mkdir -p whichlora-job", "cat > whichlora-job/pick.yaml <<'CONFIG'", config.trimEnd(), "CONFIG",
      "[ -f whichlora-job/plan.json ] || whichlora pick whichlora-job/pick.yaml --out whichlora-job", "whichlora finetune whichlora-job --data \"$data\"  # goes on where it was interrupted", ""].join("\n");
  }
  async function copy(button) {
    const text = $(button.dataset.copy).textContent;
    try {
      await navigator.clipboard.writeText(text);
    } catch { // no clipboard without https: select it, and let the browser copy what is selected
      getSelection().selectAllChildren($(button.dataset.copy));
      document.execCommand("copy");
    }
    const said = button.dataset.said || button.textContent;
    button.dataset.said = said;
    button.textContent = "Copied";
    setTimeout(() => { button.textContent = said; }, 1500);
    $("status").textContent = "Copied.";
  }

  document.addEventListener("DOMContentLoaded", () => {
    let frame = 0;
    const soon = () => { cancelAnimationFrame(frame); frame = requestAnimationFrame(draw); };
    let pause = 0;
    const later = () => { clearTimeout(pause); pause = setTimeout(load, 150); };
    for (const name of Object.keys(LIMITS)) bind(name, name === "seq_len" ? later : soon);
    for (const id of ["gpu", "rank"]) $(id).addEventListener("change", load);
    for (const box of document.querySelectorAll("input[name=method]")) box.addEventListener("change", load);
    for (const button of document.querySelectorAll("[data-copy]")) button.addEventListener("click", () => copy(button));
    $("close").addEventListener("click", close);
    $("detail").addEventListener("keydown", (event) => { if (event.key === "Escape") close(); });
    document.addEventListener("theme", draw);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
    $("choose").addEventListener("submit", (event) => event.preventDefault());
    addEventListener("hashchange", () => { readAddress(); load(); });
    readAddress();
    load();
  });
})();
