// Drawing: elements, maps of patches, colour bars, and the strip of norms. Text is always set as text, never as HTML.

function element(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "class") node.className = value;
    else if (value !== null && value !== false) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children);
  return node;
}

function shape(tag, attributes = {}, ...children) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

// Numbers as people read them: three digits, no trailing exponent for ordinary sizes.
function digits(value) {
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size >= 1000) return value.toFixed(0);
  if (size >= 0.001) return value.toPrecision(3);
  return value.toExponential(1);
}

function share(value, highest, rooted) {
  const linear = highest > 0 ? Math.min(value / highest, 1) : 0;
  return rooted ? Math.sqrt(linear) : linear;
}

// One pixel a patch; the style sheet enlarges it.
function paint(canvas, values, columns, highest, colours, rooted) {
  canvas.width = columns;
  canvas.height = values.length / columns;
  const context = canvas.getContext("2d");
  const pixels = context.createImageData(canvas.width, canvas.height);
  values.forEach((value, patch) => {
    const colour = Math.round(share(value, highest, rooted) * 255) * 3;
    pixels.data.set([colours[colour], colours[colour + 1], colours[colour + 2], 255], patch * 4);
  });
  context.putImageData(pixels, 0, 0);
}

// A horizontal bar with five numbers; with square-root colours they are not evenly spaced in value.
function paintBar(bar, highest, colours, rooted) {
  const steps = Float32Array.from({ length: 256 }, (_, i) => i / 255);
  const numbers = [0, 0.25, 0.5, 0.75, 1].map((part) => digits((rooted ? part ** 2 : part) * highest));
  paint(bar.canvas, steps, 256, 1, colours, false);
  bar.numbers.replaceChildren(...numbers.map((number) => element("span", {}, number)));
  bar.canvas.setAttribute("aria-label", `Colours from ${numbers[0]} to ${numbers[4]}`);
}

function colourBar() {
  const canvas = element("canvas", { class: "rlx-colours", role: "img" });
  const numbers = element("div", { class: "rlx-ticks", "aria-hidden": "true" });
  return { node: element("div", { class: "rlx-bar" }, canvas, numbers), canvas, numbers };
}

// The norm of one token at every sublayer, beside the image's median, on a logarithmic axis.
function normStrip(sublayers, series, cutoff, layer) {
  const [width, height, left, right, top, bottom] = [560, 210, 52, 12, 10, 34];
  const values = series.flatMap(({ norms, medians }) => [...norms, ...medians]).filter((value) => value > 0);
  if (cutoff) values.push(cutoff.norm);
  const low = Math.log10(Math.min(...values)) - 0.05;
  const high = Math.log10(Math.max(...values)) + 0.08;
  const x = (i) => left + ((width - left - right) * i) / Math.max(sublayers.length - 1, 1);
  const y = (value) => top + (height - top - bottom) * (1 - (Math.log10(Math.max(value, 1e-12)) - low) / (high - low));
  const chart = shape("svg", { viewBox: `0 0 ${width} ${height}`, class: "rlx-chart", role: "img" });

  for (const tick of ticks(low, high)) {
    chart.append(
      shape("line", { x1: left, x2: width - right, y1: y(tick), y2: y(tick), class: "rlx-rule" }),
      shape("text", { x: left - 6, y: y(tick) + 4, "text-anchor": "end" }, String(tick)),
    );
  }
  const everyLayer = Math.ceil((sublayers.length - 1) / 2 / 12);
  sublayers.forEach((name, i) => {
    const [block, kind] = name.split(".");
    if (kind === "mlp" && Number(block) % everyLayer === 0) {
      chart.append(shape("text", { x: x(i), y: height - bottom + 16, "text-anchor": "middle" }, block));
    }
  });
  chart.append(shape("text", { x: (left + width - right) / 2, y: height - 2, "text-anchor": "middle" }, "block (after its MLP)"));
  const [enters, leaves] = [x(sublayers.indexOf(`${layer}.attn`) - 1), x(sublayers.indexOf(`${layer}.mlp`))];
  chart.prepend(
    shape("rect", { x: enters, y: top, width: leaves - enters, height: height - top - bottom, class: "rlx-block" }),
  );
  if (cutoff) {
    const at = x(sublayers.indexOf(cutoff.sublayer));
    chart.append(shape("line", { x1: at - 9, x2: at + 9, y1: y(cutoff.norm), y2: y(cutoff.norm), class: "rlx-cutoff" }));
  }
  series.forEach(({ norms, medians }, index) => {
    const line = (list) => list.map((value, i) => `${x(i).toFixed(1)},${y(value).toFixed(1)}`).join(" ");
    chart.append(shape("polyline", { points: line([...medians]), class: `rlx-median rlx-series-${index}` }));
    if (norms.length) chart.append(shape("polyline", { points: line([...norms]), class: `rlx-norm rlx-series-${index}` }));
    [...norms].forEach((value, i) => {
      const title = shape("title", {}, `${sublayers[i]}: ${digits(value)} (median ${digits(medians[i])})`);
      chart.append(shape("circle", { cx: x(i), cy: y(value), r: 3, class: `rlx-dot rlx-series-${index}` }, title));
    });
  });
  return chart;
}

// 1, 2, 5, 10, ... inside the axis; only powers of ten where it is long.
function ticks(low, high) {
  const steps = high - low > 2.5 ? [1] : [1, 2, 5];
  const found = [];
  for (let power = Math.floor(low); power <= high; power += 1) {
    for (const step of steps) {
      const value = Number((step * 10 ** power).toPrecision(3));
      if (Math.log10(value) >= low && Math.log10(value) <= high) found.push(value);
    }
  }
  return found;
}

// Whether the page around is dark: the first ground that is not transparent decides, whoever set it.
function isDark(node) {
  for (let at = node; at; at = at.parentNode ?? at.host) {
    if (!(at instanceof Element)) continue;
    const [red, green, blue, alpha] = channels(getComputedStyle(at).backgroundColor);
    if (alpha > 128) return 0.299 * red + 0.587 * green + 0.114 * blue < 128;
  }
  return false;
}

// A colour in whatever notation the style sheet used, as four numbers up to 255.
function channels(colour) {
  const canvas = document.createElement("canvas");
  canvas.width = canvas.height = 1;
  const context = canvas.getContext("2d");
  context.fillStyle = "transparent"; // stays if `colour` cannot be read
  context.fillStyle = colour;
  context.fillRect(0, 0, 1, 1);
  return context.getImageData(0, 0, 1, 1).data;
}
