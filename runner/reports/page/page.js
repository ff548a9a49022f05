"use strict";
(() => {
  const charts = JSON.parse(document.getElementById("charts").textContent);
  const plots = [...document.querySelectorAll(".plot")];
  const drawn = new Set();
  const root = document.documentElement;
  const colour = (name) => getComputedStyle(root).getPropertyValue(`--${name}`).trim();
  const seriesColour = (number) => colour(`c${number % 8}`);

  function themedTrace(trace, width) {
    const meta = trace.meta || {};
    const made = { ...trace };
    if (meta.colour !== undefined) {
      const own = seriesColour(meta.colour);
      made.line = { width: 2, ...trace.line, color: own };
      made.marker = { size: trace.x.length > 60 ? 3 : 6, ...trace.marker, color: own };
      if (meta.fill) made.fillcolor = `${own}26`;
      if (meta.path) Object.assign(made.marker, { opacity: 1, line: { width: 0 }, size: trace.x.map((_, i) => (i === trace.x.length - 1 ? 12 : 6)) });
    }
    if (meta.ink) {
      made.marker = { ...trace.marker, color: colour("ink") };
      made.textfont = { color: colour("ink") };
    }
    if (meta.diverging) {
      made.colorscale = [[0, colour("low")], [0.5, colour("middle")], [1, colour("high")]];
      made.textfont = { size: 12 };
      if (width < 130 + 38 * trace.x.length) made.texttemplate = "";
      made.colorbar = { ...trace.colorbar, tickfont: { color: colour("dim") } };
    }
    return made;
  }

  function axis(own) {
    const common = { gridcolor: colour("grid"), linecolor: colour("line"), zeroline: false, automargin: true };
    return { ...common, ...own, title: { standoff: 8, ...(own || {}).title } };
  }

  function named(chart) {
    return chart.data.filter((trace) => trace.showlegend !== false && trace.type === "scatter");
  }

  // A legend of many lines makes its chart taller, not its curves flatter.
  function height(chart, width) {
    const names = named(chart).map((trace) => trace.name.length);
    const columns = Math.max(1, Math.floor((width - 60) / (50 + 7 * Math.max(...names))));
    const rows = names.length > 1 ? Math.ceil(names.length / columns) : 0;
    return 20 * Math.max(0, rows - 2);
  }

  function themedLayout(chart, width) {
    const given = chart.layout;
    const legends = named(chart).length;
    return {
      hovermode: width < 600 ? "closest" : "x unified",
      ...given,
      shapes: (given.shapes || []).map((shape) => ({ ...shape, fillcolor: colour(`band-${shape.name}`) })),
      annotations: (given.annotations || []).map((note) => ({ ...note, font: { ...note.font, color: colour("dim") } })),
      xaxis: axis(given.xaxis),
      yaxis: axis(given.yaxis),
      showlegend: given.showlegend || legends > 1,
      legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom", font: { size: 12 }, tracegroupgap: 0, maxheight: 0.75 },
      margin: { l: 8, r: 12, t: 10, b: 8 },
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      font: { color: colour("ink"), family: getComputedStyle(document.body).fontFamily, size: 12.5 },
      hoverlabel: { bgcolor: colour("ground"), bordercolor: colour("line"), font: { color: colour("ink") } },
      modebar: { bgcolor: "rgba(0,0,0,0)", color: colour("dim"), activecolor: colour("ink") },
      dragmode: matchMedia("(pointer: coarse)").matches || width < 600 ? false : "zoom",
    };
  }

  function draw(plot) {
    const chart = charts[Number(plot.dataset.chart)];
    const data = chart.data.map((trace) => themedTrace(trace, plot.clientWidth));
    const options = { responsive: true, displaylogo: false, displayModeBar: plot.clientWidth >= 400, modeBarButtons: [["toImage", "zoom2d", "pan2d", "resetScale2d"]] };
    drawn.add(plot);
    plot.dataset.height ||= parseInt(plot.style.height, 10);
    plot.style.height = `${Number(plot.dataset.height) + height(chart, plot.clientWidth)}px`;
    // A sheet of paper does not resize: the size is given.
    const size = root.classList.contains("printed") ? { width: plot.clientWidth, height: plot.clientHeight, autosize: false } : { autosize: true };
    return window.Plotly.react(plot, data, { ...themedLayout(chart, plot.clientWidth), ...size }, options);
  }

  function paintDots() {
    for (const dot of document.querySelectorAll(".dot")) dot.style.background = seriesColour(Number(dot.dataset.colour));
  }

  function redraw() {
    paintDots();
    if (window.Plotly) drawn.forEach(draw);
  }

  async function loadPlotly() {
    const packed = Uint8Array.from(atob(document.getElementById("plotly").textContent), (c) => c.charCodeAt(0));
    const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
    const script = document.createElement("script");
    script.textContent = await new Response(stream).text();
    document.head.append(script);
  }

  async function start() {
    if (!plots.length) return;
    try {
      await loadPlotly();
    } catch (error) {
      for (const plot of plots) plot.textContent = `This browser cannot draw the charts (${error.message}); see comparison.svg.`;
      return;
    }
    const seen = new IntersectionObserver((entries) => {
      for (const { isIntersecting, target } of entries) {
        if (!isIntersecting) continue;
        seen.unobserve(target);
        draw(target);
      }
    }, { rootMargin: "300px" });
    plots.forEach((plot) => seen.observe(plot));
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
    addEventListener("beforeprint", () => {
      root.dataset.theme = "light";
      for (const details of document.querySelectorAll("details")) details.open = true;
      root.classList.add("printed");
      paintDots();
      for (const plot of plots) {
        draw(plot);
      }
    });
    addEventListener("afterprint", () => {
      delete root.dataset.theme;
      root.classList.remove("printed");
      redraw();
    });
  }

  function sortBy(table, column, ascending) {
    const key = (row) => {
      const cell = row.cells[column];
      const value = cell.dataset.sort ?? cell.textContent.trim();
      return value === "" || value === "–" ? null : Number.isNaN(Number(value)) ? value : Number(value);
    };
    const compare = (a, b) => (typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b), undefined, { numeric: true }));
    const rows = [...table.tBodies[0].rows].map((row) => [key(row), row]);
    rows.sort(([a], [b]) => (a === null || b === null ? (a === null) - (b === null) : ascending ? compare(a, b) : compare(b, a)));
    table.tBodies[0].append(...rows.map(([, row]) => row));
  }

  for (const table of document.querySelectorAll("table.sortable")) {
    const heads = [...table.tHead.rows[0].cells];
    heads.forEach((head, column) => {
      const button = head.querySelector("button");
      if (!button) return;
      button.addEventListener("click", () => {
        const ascending = head.getAttribute("aria-sort") !== "ascending";
        heads.forEach((other) => other.removeAttribute("aria-sort"));
        head.setAttribute("aria-sort", ascending ? "ascending" : "descending");
        sortBy(table, column, ascending);
      });
    });
  }
  paintDots();
  addEventListener("load", () => setTimeout(start, 0));
})();
