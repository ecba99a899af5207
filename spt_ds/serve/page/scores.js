// The scores of all prompts as a small bar chart, and the colour of each prompt.

const SVG = "http://www.w3.org/2000/svg";
const HUES = 8;
const ROW = 18, LEFT = 26, BAR = 120, WIDTH = 200;

export function hue(prompt) {
  return prompt === null ? "hue-all" : `hue-${prompt % HUES}`;
}

function add(parent, name, attributes, text) {
  const element = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  if (text !== undefined) element.textContent = text;
  parent.append(element);
  return element;
}

// scores: a number for each prompt; chosen: the prompt that answered, or null for all of them.
export function scoreChart(scores, chosen) {
  const height = scores.length * ROW;
  const chart = document.createElementNS(SVG, "svg");
  const told = scores.map((score, k) => `prompt ${k} ${score.toFixed(3)}`).join(", ");
  chart.setAttribute("viewBox", `0 0 ${WIDTH} ${height}`);
  chart.setAttribute("width", WIDTH);
  chart.setAttribute("height", height);
  chart.setAttribute("role", "img");
  chart.setAttribute("aria-label", `Scores: ${told}`);
  chart.classList.add("scores");
  // Bars begin at 0, or at the lowest score where one is negative.
  const low = Math.min(0, ...scores), high = Math.max(...scores, low + 1e-9);
  scores.forEach((score, k) => {
    const row = add(chart, "g", { class: `${hue(k)}${k === chosen ? " chosen" : ""}` });
    const middle = k * ROW + ROW / 2;
    add(row, "text", { x: LEFT - 6, y: middle, class: "name" }, k);
    add(row, "rect", { x: LEFT, y: middle - 5, width: BAR, height: 10, rx: 5, class: "track" });
    const width = Math.max(4, (BAR * (score - low)) / (high - low));
    add(row, "rect", { x: LEFT, y: middle - 5, width, height: 10, rx: 5, class: "bar" });
    add(row, "text", { x: LEFT + BAR + 8, y: middle, class: "value" }, score.toFixed(3));
  });
  return chart;
}
