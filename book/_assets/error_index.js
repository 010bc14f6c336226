// The paste box of book/error_index.md: finds the row of helpers/errors that a message belongs to.
"use strict";

(function () {
  // The same rule as `find` in helpers/errors: the row that matches last counts.
  function find(text, rows) {
    const line = text.replace(/\s+/g, " ");
    let found = null;
    for (const row of rows) {
      const match = new RegExp(row.pattern).exec(line);
      if (match && (!found || match.index > found.match.index)) found = { row, match };
    }
    return found;
  }

  function readNumbers({ row, match }) {
    if (match.includes(undefined)) return "";
    return row.numbers.replace(/\{(\d+)\}/g, (_, group) => match[group]);
  }

  if (typeof module !== "undefined") {
    module.exports = { find, readNumbers };
    return;
  }

  function element(tag, ...children) {
    const made = document.createElement(tag);
    made.append(...children);
    return made;
  }

  // Text with `code` in backticks; everything is inserted as text, never as HTML.
  function paragraph(lead, text) {
    const parts = text.split("`").map((part, i) => (i % 2 ? element("code", part) : part));
    return element("p", ...(lead ? [element("strong", lead), " "] : []), ...parts);
  }

  function link(text, address) {
    const made = element("a", ...paragraph("", text).childNodes);
    made.href = address;
    return made;
  }

  function explanation(found) {
    const { row } = found;
    const numbers = readNumbers(found);
    return [
      element("p", element("strong", link(row.title, "#error-" + row.slug))),
      ...(numbers ? [paragraph("Your numbers:", numbers)] : []),
      paragraph("Why:", row.cause),
      paragraph("Cure:", row.cure + " For example:"),
      element("pre", element("code", row.change)),
      element("p", "Read on: ", link(row.chapter, row.href)),
    ];
  }

  const { rows, unknown } = JSON.parse(document.getElementById("error-index").textContent);
  const box = document.getElementById("error-text");
  const result = document.getElementById("error-result");

  function show() {
    const text = box.value.trim();
    const found = find(text, rows);
    const content = found ? explanation(found) : text ? [paragraph("", unknown)] : [];
    result.replaceChildren(...content);
  }

  box.addEventListener("input", show);
  show(); // A browser that goes back to the page fills the box in by itself.
})();
