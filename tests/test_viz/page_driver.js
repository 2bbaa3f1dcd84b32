// Runs the script of a page without a browser: a document of plain objects, and a canvas that keeps what is filled with which colour.
// node page_driver.js PAGE, then on stdin a JSON list of actions; prints what the page says after each.
"use strict";
const fs = require("fs");
const vm = require("vm");

const page = fs.readFileSync(process.argv[2], "utf8");
const data = page.match(/<script id="data" type="application\/json">([\s\S]*?)<\/script>/)[1];
const script = page.match(/<script>\n([\s\S]*?)<\/script>/)[1];

let filled = [];
let path = [];
const pen = {
  beginPath() { path = []; },
  moveTo(x, y) { path.push([x, y]); },
  lineTo(x, y) { path.push([x, y]); },
  closePath() {},
  fill() { filled.push({ colour: this.fillStyle, path }); },
  stroke() {},
};

const elements = {};
function element(id) {
  elements[id] ??= {
    handlers: {},
    innerHTML: id === "data" ? data : "",
    get textContent() { return this.innerHTML; },
    set textContent(text) { this.innerHTML = text; },
    value: "",
    clientWidth: 1000,
    addEventListener(kind, handler) { this.handlers[kind] = handler; },
    getContext: () => pen,
    getBoundingClientRect() { return { left: 0, top: 0, width: this.width, height: this.height }; },
  };
  return elements[id];
}

vm.runInNewContext(script, {
  document: { getElementById: element },
  window: element("window"),
  devicePixelRatio: 1,
});

const said = [];
for (const action of JSON.parse(fs.readFileSync(0, "utf8"))) {
  filled = [];
  const target = element(action.id);
  if (action.kind === "change") target.value = action.value;
  const canvas = element("mask");
  const at = action.cell && { clientX: (action.cell[1] + 0.5) * canvas.width / action.lengths[1],
                              clientY: (action.cell[0] + 0.5) * canvas.height / action.lengths[0] };
  target.handlers[action.kind]?.({ target, deltaY: action.delta, preventDefault() {}, ...at });
  said.push({
    under: element("under").textContent, step: element("step").innerHTML,
    keys: element("keys").innerHTML, queries: element("queries").innerHTML, legend: element("legend").innerHTML, ranks: element("ranks").innerHTML, filled, size: [canvas.width, canvas.height],
  });
}
console.log(JSON.stringify(said));
