"use strict";
// Charts and tables from the numbers in the page. Colours are CSS variables, so that a change of theme needs no redraw.
(function () {
  const read = (id) => JSON.parse(document.getElementById(id).textContent);
  const report = read("numbers"), specs = read("specs"), parts = {};
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
