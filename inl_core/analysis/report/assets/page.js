"use strict";
// Charts and tables from the numbers in the page. Colours are CSS variables, so that a change of theme needs no redraw.
(function () {
  const read = (id) => JSON.parse(document.getElementById(id).textContent);
  const report = read("numbers"), specs = read("specs"), readings = read("readings"), parts = {};
  for (const section of report.sections) for (const part of section.parts) parts[part.key] = part;

  const ink = "var(--ink)", soft = "var(--soft)", line = "var(--line)";
  const text = { labelColor: soft, titleColor: ink, labelFont: "system-ui, sans-serif", titleFont: "system-ui, sans-serif", titleFontWeight: 500, labelFontSize: 12, titleFontSize: 12 };
  const config = {
    background: "transparent",
    font: "system-ui, sans-serif",
    view: { stroke: null },
    axis: { ...text, domainColor: line, tickColor: line, gridColor: line, labelLimit: 140 },
    legend: { ...text, orient: "bottom", direction: "horizontal", labelLimit: 220, columns: { expr: "width < 400 ? 1 : 3" } },
    header: text,
    title: { color: ink, subtitleColor: soft },
    text: { color: ink },
    rule: { color: soft },
    range: { category: [0, 1, 2, 3, 4, 5].map((index) => `var(--c${index})`), ramp: { scheme: "viridis" }, heatmap: { scheme: "viridis" } },
  };

  const records = (part) => part.rows.map((row) => Object.fromEntries(part.columns.map((name, index) => [name, row[index]])));

  function draw(place) {
    const key = place.dataset.part;
    const spec = { width: "container", autosize: { type: "fit-x", contains: "padding" }, ...specs[key][place.dataset.number], data: { values: records(parts[key]) } };
    return vegaEmbed(place, spec, { renderer: "svg", actions: false, config, tooltip: { disableDefaultStyle: false } }).catch((problem) => {
      place.classList.add("problem");
      place.textContent = `This chart could not be drawn: ${problem.message}`;
      console.error(problem);
    });
  }

  function shown(value) {
    if (value === null || value === undefined) return "-";
    if (typeof value === "boolean") return value ? "yes" : "no";
    if (typeof value !== "number") return String(value);
    if (Number.isInteger(value)) return Math.abs(value) < 1e15 ? value.toLocaleString("en") : value.toPrecision(4);
    return Math.abs(value) >= 1e7 || Math.abs(value) < 1e-4 ? value.toPrecision(4) : String(Number(value.toPrecision(6)));
  }

  function fill(details) {
    if (details.querySelector("table")) return;
    const part = parts[details.dataset.part], table = document.createElement("table");
    const names = part.columns.map((name) => name.replaceAll("_", " "));
    // A few wide rows are read more easily from top to bottom.
    const turned = names.length > part.rows.length + 4;
    const lines = turned ? names.map((name, index) => [name, ...part.rows.map((row) => row[index])]) : [names, ...part.rows];
    lines.forEach((values, number) => {
      const row = table.insertRow();
      values.forEach((value, index) => {
        const cell = document.createElement((turned ? index : number) === 0 ? "th" : "td");
        cell.textContent = shown(value);
        if (typeof value === "number") cell.className = "number";
        row.append(cell);
      });
    });
    details.append(table);
  }

  // A text whose tokens are coloured by one column: the share of ink grows with the value, so it reads without colours.
  function read_text(place) {
    const part = parts[place.dataset.part], reading = readings[place.dataset.part];
    const column = (name) => part.columns.indexOf(name);
    const menu = (label, names) => {
      const select = document.createElement("select"), frame = document.createElement("label");
      for (const name of names) select.add(new Option(name));
      frame.append(`${label} `, select);
      return [frame, select];
    };
    const [measureFrame, measure] = menu("colour by", Object.keys(reading));
    const [whereFrame, where] = menu("at", []);
    const controls = document.createElement("div"), body = document.createElement("div"), told = document.createElement("p");
    controls.className = "controls";
    body.className = "tokens";
    told.className = "told";
    controls.append(measureFrame, whereFrame);
    const spans = part.rows.map((row) => {
      const span = document.createElement("span");
      span.textContent = row[0].replaceAll("\n", "\u21b5\n");
      const tell = () => { told.textContent = describe(row); };
      span.addEventListener("pointerenter", tell);
      span.addEventListener("click", tell);
      body.append(span);
      return span;
    });
    function describe(row) {
      const name = reading[measure.value][where.value || ""], words = [`${JSON.stringify(row[0])}, next ${JSON.stringify(row[1])}`];
      words.push(`loss ${shown(row[2])} nats`);
      if (name !== "loss") words.push(`${name}: ${shown(row[column(name)])}`);
      return words.join("; ");
    }
    function colour() {
      const at = column(reading[measure.value][where.value || ""]);
      const values = part.rows.map((row) => row[at]), sorted = values.filter((value) => value !== null).sort((a, b) => a - b);
      const low = sorted[Math.floor(0.02 * (sorted.length - 1))], high = sorted[Math.ceil(0.98 * (sorted.length - 1))];
      spans.forEach((span, index) => {
        const share = values[index] === null ? 0 : Math.min(1, Math.max(0, (values[index] - low) / (high - low || 1)));
        span.style.background = `color-mix(in srgb, var(--c1) ${Math.round(70 * share)}%, transparent)`;
      });
      told.textContent = `from ${shown(low)} (no colour) to ${shown(high)} (full colour)`;
    }
    function choose() {
      const names = Object.keys(reading[measure.value]).filter((name) => name);
      where.replaceChildren(...names.map((name) => new Option(name)));
      whereFrame.hidden = !names.length;
      colour();
    }
    measure.addEventListener("change", choose);
    where.addEventListener("change", colour);
    place.append(controls, told, body);
    choose();
  }

  for (const place of document.querySelectorAll(".reading")) read_text(place);
  for (const details of document.querySelectorAll("details")) {
    if (details.open) fill(details);
    details.addEventListener("toggle", () => details.open && fill(details));
  }
  // One chart at a time, so that the page can be read and scrolled while the later ones are drawn.
  (async () => {
    for (const place of document.querySelectorAll(".chart")) {
      await draw(place);
      await new Promise((go) => setTimeout(go));
    }
    document.body.dataset.drawn = "yes";
  })();
})();
