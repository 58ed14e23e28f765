"use strict";

// Values under the pointer, or the keyboard's cursor, for every chart.
const tip = document.getElementById("tip");
const show = (value, kind) =>
  value === null ? "–"
    : kind === "percent" ? (100 * value).toFixed(1) + "%"
    : String(Number(value.toPrecision(4)));

function tipRow(name, value, colour) {
  const row = document.createElement("div");
  const label = document.createElement("span");
  const number = document.createElement("b");
  label.textContent = name;
  number.textContent = value;
  if (colour !== undefined) label.className = "c" + colour;
  row.append(label, number);
  return row;
}

for (const svg of document.querySelectorAll("svg.chart")) {
  const data = JSON.parse(svg.dataset.chart);
  const cursor = svg.querySelector(".cursor");
  let at = data.x.length - 1;
  const showAt = (clientX, clientY) => {
    cursor.setAttribute("x1", data.x[at]);
    cursor.setAttribute("x2", data.x[at]);
    cursor.style.visibility = "visible";
    const order = (line) => (line.y[at] === null ? -Infinity : line.y[at]);
    const lines = [...data.lines].sort((a, b) => order(b) - order(a));
    tip.replaceChildren(
      tipRow("step", data.step[at].toLocaleString("en")),
      ...lines.map((line) => tipRow(line.name, show(line.y[at], data.kind), line.colour)),
    );
    tip.style.display = "block";
    const left = clientX + 18;
    const over = left + tip.offsetWidth > window.innerWidth - 8;
    tip.style.left = (over ? clientX - 18 - tip.offsetWidth : left) + "px";
    tip.style.top = Math.max(8, Math.min(clientY + 14, window.innerHeight - tip.offsetHeight - 8)) + "px";
  };
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const x = ((event.clientX - box.left) / box.width) * svg.viewBox.baseVal.width;
    at = 0;
    data.x.forEach((px, i) => {
      if (Math.abs(px - x) < Math.abs(data.x[at] - x)) at = i;
    });
    showAt(event.clientX, event.clientY);
  });
  // By keyboard: arrows step through the points, Shift by ten, Home and End to the ends.
  svg.addEventListener("keydown", (event) => {
    const by = event.shiftKey ? 10 : 1;
    const last = data.x.length - 1;
    const to = { ArrowLeft: at - by, ArrowRight: at + by, Home: 0, End: last }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    at = Math.max(0, Math.min(last, to));
    const box = svg.getBoundingClientRect();
    showAt(box.left + (data.x[at] / svg.viewBox.baseVal.width) * box.width, box.top + 40);
  });
  const hide = () => {
    cursor.style.visibility = "hidden";
    tip.style.display = "none";
  };
  svg.addEventListener("pointerleave", hide);
  svg.addEventListener("blur", hide);
}

// The table of sources: search, and sort by a click on a heading.
const table = document.getElementById("sources");
if (table) {
  const body = table.tBodies[0];
  const search = document.getElementById("search");
  search.addEventListener("input", () => {
    const wanted = search.value.toLowerCase();
    for (const row of body.rows)
      row.hidden = !row.cells[0].textContent.toLowerCase().includes(wanted);
  });
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const sort = () => {
      // Names start at A, numbers at the greatest; the next click turns them round.
      const now = head.getAttribute("aria-sort");
      const rising = column === 0 ? now !== "ascending" : now === "descending";
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", rising ? "ascending" : "descending");
      const key = (row) => row.cells[column].dataset.v ?? row.cells[column].textContent;
      const rows = [...body.rows].sort((a, b) =>
        column ? Number(key(a)) - Number(key(b)) : key(a).localeCompare(key(b)));
      body.append(...(rising ? rows : rows.reverse()));
    };
    head.addEventListener("click", sort);
    head.addEventListener("keydown", (event) => (event.key === "Enter" || event.key === " ") && (event.preventDefault(), sort()));
  });
}

// Copy buttons; a page opened from disk may not be let near the clipboard: then select the text.
for (const button of document.querySelectorAll("button.copy")) {
  const text = button.parentElement.querySelector("pre");
  button.addEventListener("click", async () => {
    try {
      await navigator.clipboard.writeText(text.textContent.trim());
      button.textContent = "Copied";
    } catch {
      getSelection().selectAllChildren(text);
      button.textContent = "Press Ctrl+C";
    }
    setTimeout(() => { button.textContent = "Copy"; }, 1800);
  });
}
