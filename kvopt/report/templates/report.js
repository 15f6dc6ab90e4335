"use strict";
// Sorting and filtering of tables, the arrow keys of the heat maps, copying, and opening what a link leads to.
(() => {
  const data = JSON.parse(document.getElementById("report-data").textContent);
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];

  // ---- sorting: a header's button sorts its column; the third press restores the first order
  for (const table of all("table.sortable")) {
    const body = table.tBodies[0];
    const first = [...body.rows];
    const heads = all("thead th", table);
    const value = (row, column) => {
      const cell = row.cells[column];
      const raw = cell.dataset.value ?? cell.textContent.trim();
      const number = Number(raw);
      return raw !== "" && Number.isFinite(number) ? number : raw;
    };
    const before = (a, b) => {
      if (a === "" || b === "") return (a === "") - (b === "");
      if (typeof a === "number" && typeof b === "number") return a - b;
      return String(a).localeCompare(String(b), "en", { numeric: true });
    };
    heads.forEach((head, column) => {
      const button = head.querySelector("button");
      if (!button) return;
      button.addEventListener("click", () => {
        const next = { none: "ascending", ascending: "descending", descending: "none" }[head.getAttribute("aria-sort")];
        for (const other of heads) if (other.hasAttribute("aria-sort")) other.setAttribute("aria-sort", "none");
        head.setAttribute("aria-sort", next);
        const sign = next === "descending" ? -1 : 1;
        const rows = next === "none" ? first : [...first].sort((x, y) => {
          const a = value(x, column), b = value(y, column);
          return a === "" || b === "" ? before(a, b) : sign * before(a, b);
        });
        body.append(...rows);
      });
    });
  }

  // ---- filtering: words in a row's text, and kinds
  for (const form of all("form.filter")) {
    const more = document.getElementById("more-mutations");
    const tables = [document.getElementById(form.dataset.table), ...(more ? all("table", more) : [])];
    const rows = tables.flatMap((table) => [...table.tBodies[0].rows]);
    const status = form.querySelector("output");
    const apply = () => {
      const words = form.elements.words.value.toLowerCase().split(/\s+/).filter(Boolean);
      const kinds = all("input[name=kind]:checked", form).map((box) => box.value);
      let shown = 0;
      for (const row of rows) {
        const text = row.dataset.words.toLowerCase();
        row.hidden = !(kinds.includes(row.dataset.kind) && words.every((word) => text.includes(word)));
        shown += !row.hidden;
      }
      if (more && words.length) more.open = all("tbody tr:not([hidden])", more).length > 0;
      status.textContent = shown === rows.length ? `${rows.length} contexts` : `${shown} of ${rows.length} contexts`;
    };
    form.addEventListener("input", apply);
    form.addEventListener("submit", (event) => event.preventDefault());
    form.addEventListener("reset", () => setTimeout(apply));
    apply();
  }

  // ---- heat maps: one tab stop each, arrow keys inside; the cell's two lists of tokens below
  const list = (tokens) => tokens.map((t) => `${JSON.stringify(t.token)} ${(100 * t.p).toFixed(1)} %`).join(", ");
  const part = (panel, words, strong) => {
    const node = strong ? document.createElement("b") : document.createElement("span");
    node.textContent = words;
    panel.append(node);
  };
  for (const table of all("table.heat")) {
    const cells = all("tbody tr", table).map((row) => all("td.cell", row));
    const panel = document.getElementById(table.dataset.panel);
    const example = data.runs[0].samples.examples[Number(table.dataset.example)];
    const show = (cell) => {
      const token = Number(cell.dataset.token), context = cell.dataset.context;
      const mine = example.contexts[context];
      panel.replaceChildren();
      part(panel, `${context} at ${JSON.stringify(example.gold[token])}: `, true);
      part(panel, `KL ${mine.kl[token].toPrecision(3)}, gold NLL ${mine.nll[token].toFixed(3)} ` +
        `(template ${example.reference.nll[token].toFixed(3)}). `);
      part(panel, `The template would say ${list(example.reference.top[token])}. `);
      const top = mine.top && mine.top[token];
      part(panel, top ? `${context} would rather say ${list(top)}.` : `${context} has the same first token.`);
    };
    const focus = (row, column) => {
      const cell = cells[row]?.[column];
      if (!cell) return;
      for (const other of cells.flat()) other.tabIndex = -1;
      cell.tabIndex = 0;
      cell.focus();
    };
    if (!cells[0]?.length) continue;
    cells[0][0].tabIndex = 0;
    table.addEventListener("focusin", (event) => event.target.matches("td.cell") && show(event.target));
    table.addEventListener("mouseover", (event) => {
      const cell = event.target.closest("td.cell");
      if (cell && !table.contains(document.activeElement)) show(cell);
    });
    table.addEventListener("click", (event) => {
      const cell = event.target.closest("td.cell");
      if (cell) focus(cells.findIndex((row) => row.includes(cell)), cells.find((row) => row.includes(cell)).indexOf(cell));
    });
    table.addEventListener("keydown", (event) => {
      const row = cells.findIndex((one) => one.includes(event.target));
      if (row < 0) return;
      const column = cells[row].indexOf(event.target);
      const moves = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
      const places = { Home: [row, 0], End: [row, cells[row].length - 1] };
      const to = moves[event.key] ? [row + moves[event.key][0], column + moves[event.key][1]] : places[event.key];
      if (!to) return;
      event.preventDefault();
      focus(...to);
    });
  }

  // ---- the data as a file
  for (const button of all("button.save")) {
    button.hidden = false;
    button.addEventListener("click", () => {
      const link = document.createElement("a");
      link.href = URL.createObjectURL(new Blob([JSON.stringify(data, null, 2)], { type: "application/json" }));
      link.download = "report.json";
      link.click();
      setTimeout(() => URL.revokeObjectURL(link.href));
    });
  }

  // ---- commands to copy; a page that may not use the clipboard selects the text instead
  for (const button of all("button.copy")) {
    const code = button.parentElement.querySelector("code");
    button.hidden = false;
    button.addEventListener("click", async () => {
      try {
        await navigator.clipboard.writeText(code.textContent);
        button.textContent = "Copied";
        setTimeout(() => { button.textContent = "Copy"; }, 2000);
      } catch {
        getSelection().selectAllChildren(code);
      }
    });
  }

  // ---- a link to a part that is folded away opens what it stands in
  const unfold = () => {
    const target = document.getElementById(decodeURIComponent(location.hash.slice(1)));
    if (!target) return;
    for (let one = target.closest("details"); one; one = one.parentElement.closest("details")) one.open = true;
    target.scrollIntoView();
  };
  addEventListener("hashchange", unfold);
  for (const link of all('a[href^="#"]')) link.addEventListener("click", () => setTimeout(unfold));
  if (location.hash) unfold();
})();
