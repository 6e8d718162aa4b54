/**
 * Text on a node as it was written: one line a line, broken between words alone, and tables with columns.
 *
 * The server puts " · " between the columns of a table, for pages that do not have this; lines one after the other with as many
 * columns each, at least two of them, are a table here.
 */

import { html, style } from "./dom.js";

const COLUMN = " · ";

export function wordsElement() {
  return html("div", { class: "flux-poke-words" });
}

export function write(element, text) {
  const lines = text.split("\n").map((line) => line.split(COLUMN));
  const parts = [];
  for (let at = 0; at < lines.length; ) {
    const columns = lines[at].length;
    let end = at + 1;
    while (end < lines.length && lines[end].length === columns) end += 1;
    const rows = lines.slice(at, end);
    if (columns > 2 && rows.length > 1) {
      parts.push(html("table", {}, ...rows.map((row) => html("tr", {}, ...row.map((cell) => html("td", {}, cell))))));
    } else {
      parts.push(...rows.map((row) => html("div", {}, row.join(COLUMN) || " ")));
    }
    at = end;
  }
  element.replaceChildren(...parts, style());
}
