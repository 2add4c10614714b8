// The explorer itself: choose a token, see whom it looks at, or who looks at it, under one condition or two.

function mount(root, source) {
  const told = source.manifest;
  const { grid } = told;
  const colours = Uint8Array.from(atob(told.colours), (letter) => letter.charCodeAt(0));
  const state = { ...told.start, opacity: 0.65, rooted: false, hovered: null };
  let panels = [];
  let answers = [];
  let question = 0;

  const status = element("p", { class: "rlx-status", role: "status", "aria-live": "polite" });
  const area = element("div", { class: "rlx-panels" });
  const below = element("div", { class: "rlx-below" });
  const controls = makeControls();
  root.replaceChildren(
    element("div", { class: "rlx-title" }, element("strong", {}, told.model), ` ${told.outliers.words}`),
    controls.node,
    status,
    area,
    below,
    element(
      "p",
      { class: "rlx-small" },
      "Click a patch, or move with the arrow keys; Q makes it the query, K the key. ",
      [told.left_out, told.quantisation].filter(Boolean).join(" "),
    ),
  );
  root.classList.add("rl-explorer");
  const shade = () => (root.dataset.theme = isDark(root.parentNode ?? root) ? "dark" : "light");
  const scheme = matchMedia("(prefers-color-scheme: dark)");
  scheme.addEventListener("change", shade);
  const watcher = new MutationObserver(shade);
  for (const node of [document.documentElement, document.body]) {
    watcher.observe(node, { attributes: true, attributeFilter: ["class", "style", "data-theme", "data-jp-theme-light"] });
  }
  requestAnimationFrame(shade);
  shade();
  build();

  return () => {
    scheme.removeEventListener("change", shade);
    watcher.disconnect();
    source.close?.();
  };

  // What may be chosen ------------------------------------------------------------------------------------------------

  function headsOf(layer) {
    const every = ["mean", "rollout", ...Array.from({ length: told.heads }, (_, head) => head)];
    if (!told.kept) return told.heads > 1 ? every : ["mean", "rollout"];
    return every.filter((head) => told.kept.some(([at, kind]) => at === layer && kind === head));
  }

  function layersKept() {
    const every = Array.from({ length: told.layers }, (_, layer) => layer);
    return every.filter((layer) => headsOf(layer).length > 0);
  }

  function conditionsShown() {
    const names = [state.condition];
    if (state.compare !== null && state.compare !== state.condition) names.push(state.compare);
    return names;
  }

  function tokensOf(name) {
    return told.conditions.find((condition) => condition.name === name);
  }

  function headName(head) {
    if (head === "mean") return told.heads > 1 ? `mean over ${told.heads} heads` : "the only head";
    return head === "rollout" ? "rollout (blocks 0 to this one)" : `head ${head}`;
  }

  // Controls ----------------------------------------------------------------------------------------------------------

  function makeControls() {
    const image = chooser("Image", told.images.map(({ name }, i) => [i, name]), "image");
    const names = told.conditions.map(({ name }) => [name, name]);
    const condition = chooser("Model", names, "condition");
    const compare = chooser("Compare with", [[null, "nothing"], ...names], "compare");
    const head = chooser("Attention", [], "head");
    const layers = layersKept();
    const layer = slider("Block", 0, layers.length - 1, 1, layers.indexOf(state.layer), (at) => {
      state.layer = layers[at];
      return String(state.layer);
    });
    const opacity = slider("Overlay", 0, 100, 5, state.opacity * 100, (percent) => {
      state.opacity = percent / 100;
      root.style.setProperty("--rlx-opacity", state.opacity);
      return `${percent}%`;
    });
    const role = chooser("The patch", [["query", "looks (query)"], ["key", "is looked at (key)"]], "role");
    const rooted = element("input", { type: "checkbox" });
    rooted.addEventListener("change", () => {
      state.rooted = rooted.checked;
      draw();
    });
    const about = element("label", { class: "rlx-check" }, rooted, " square-root colours");
    const several = told.conditions.length > 1 ? [condition.node, compare.node] : [];
    const node = element(
      "div",
      { class: "rlx-controls", role: "group", "aria-label": "What is shown" },
      ...[image.node, ...several, layer, head.node, role.node, opacity, about],
    );
    fillHeads(head);
    return { node, head, role };

    function chooser(label, options, field) {
      const select = element("select", { "data-field": field });
      const fill = (entries) => {
        const given = entries.map(([value, text]) => {
          const option = element("option", {}, text);
          option.selected = value === state[field];
          return option;
        });
        select.replaceChildren(...given);
        select.values = entries.map(([value]) => value);
      };
      fill(options);
      select.addEventListener("change", () => {
        state[field] = select.values[select.selectedIndex];
        build();
      });
      return { node: element("label", {}, `${label} `, select), select, fill };
    }

    function slider(label, low, high, step, value, act) {
      const input = element("input", { type: "range", min: low, max: high, step, "data-field": label.toLowerCase() });
      input.value = value;
      const output = element("output", {}, act(value));
      input.addEventListener("input", () => {
        output.textContent = act(Number(input.value));
        input.setAttribute("aria-valuetext", output.textContent);
        if (label === "Block") build();
      });
      return element("label", {}, `${label} `, input, output);
    }
  }

  function fillHeads(chooser) {
    const heads = headsOf(state.layer);
    if (!heads.includes(state.head)) [state.head] = heads;
    chooser.fill(heads.map((head) => [head, headName(head)]));
  }

  // Panels: one a condition -------------------------------------------------------------------------------------------

  function build() {
    fillHeads(controls.head);
    const wanted = JSON.stringify([state.image, conditionsShown()]);
    if (area.dataset.shows !== wanted) {
      const focused = area.contains(document.activeElement);
      area.dataset.shows = wanted;
      panels = conditionsShown().map(makePanel);
      area.replaceChildren(...panels.map(({ node }) => node));
      if (focused) panels[0].attention.place.focus();
    }
    ask();
  }

  function makePanel(name) {
    const attention = makePicture(name, true);
    const reference = makePicture(name, false);
    const others = element("div", { class: "rlx-others" });
    const most = element("p", { class: "rlx-most" });
    const pictures = element("div", { class: "rlx-pictures" }, attention.node, reference.node);
    const head = element("h4", {}, name);
    const node = element("section", { class: "rlx-panel", "aria-label": name, "data-condition": name }, head, pictures, most, others);
    return { name, node, attention, reference, others, most };
  }

  function makePicture(condition, first) {
    const { name, src } = told.images[state.image];
    const overlay = element("canvas", { class: "rlx-overlay", "aria-hidden": "true" });
    const mark = element("div", { class: "rlx-mark", hidden: true });
    const what = first ? "Attention of the selected token" : `Attention of the ${told.reference} query`;
    const place = element(
      "div",
      {
        class: "rlx-picture",
        tabindex: first ? 0 : -1,
        role: "application",
        "aria-roledescription": "patch grid",
        "aria-label": `${what}, ${condition}: ${name}, ${grid.rows} rows of ${grid.columns} patches. Arrow keys move the selected patch.`,
      },
      element("img", { src, alt: "", draggable: "false" }),
      element("div", { class: "rlx-cells" }, overlay, element("div", { class: "rlx-lines" }), mark),
    );
    place.style.aspectRatio = `${grid.width} / ${grid.height}`;
    if (grid.width * grid.height <= 160 ** 2) place.classList.add("rlx-pixels");
    const cells = place.lastChild;
    cells.style.width = `${grid.covered[0] * 100}%`;
    cells.style.height = `${grid.covered[1] * 100}%`;
    cells.style.setProperty("--rlx-columns", grid.columns);
    cells.style.setProperty("--rlx-rows", grid.rows);
    cells.addEventListener("click", (event) => select(patchAt(cells, event)));
    cells.addEventListener("pointermove", (event) => hover(patchAt(cells, event)));
    cells.addEventListener("pointerleave", () => hover(null));
    place.addEventListener("keydown", pressed);
    const bar = colourBar();
    const caption = element("figcaption");
    return { node: element("figure", {}, place, bar.node, caption), place, overlay, mark, bar, caption };
  }

  function patchAt(cells, event) {
    const box = cells.getBoundingClientRect();
    const column = Math.floor(((event.clientX - box.left) / box.width) * grid.columns);
    const row = Math.floor(((event.clientY - box.top) / box.height) * grid.rows);
    return [clamp(row, grid.rows), clamp(column, grid.columns)];
  }

  function clamp(value, size) {
    return Math.max(0, Math.min(size - 1, value));
  }

  function selectedPatch() {
    const [, row, column] = state.token.match(/^\((\d+),(\d+)\)$/) ?? [];
    return row === undefined ? null : [Number(row), Number(column)];
  }

  function select(patch) {
    state.token = `(${patch[0]},${patch[1]})`;
    ask();
  }

  function pressed(event) {
    const steps = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
    const step = steps[event.key];
    const role = { q: "query", k: "key" }[event.key.toLowerCase()];
    if (event.ctrlKey || event.metaKey || event.altKey || !(step || role)) return;
    event.preventDefault();
    event.stopPropagation();
    if (role) {
      state.role = role;
      controls.role.select.selectedIndex = role === "query" ? 0 : 1;
      return ask();
    }
    const from = selectedPatch() ?? [Math.floor(grid.rows / 2), Math.floor(grid.columns / 2)];
    select([clamp(from[0] + step[0], grid.rows), clamp(from[1] + step[1], grid.columns)]);
  }

  function hover(patch) {
    state.hovered = patch;
    panels.forEach((panel, i) => captions(panel, answers[i]));
  }

  // Asking and showing ------------------------------------------------------------------------------------------------

  async function ask() {
    const mine = ++question;
    root.dataset.asked = String(mine);
    const { image, layer, head, token, role } = state;
    const asked = performance.now();
    try {
      const found = await source.ask({ image, conditions: conditionsShown(), layer, head, token, role });
      if (mine !== question) return; // something else was asked meanwhile
      answers = found;
      draw();
      root.dataset.answered = String(mine);
      root.dataset.milliseconds = (performance.now() - asked).toFixed(1);
    } catch (error) {
      if (mine === question) status.textContent = `This could not be shown: ${error.message}`;
    }
  }

  function patchesOf(values) {
    return values.subarray(grid.first, grid.first + grid.rows * grid.columns);
  }

  function highest(part) {
    return Math.max(0, ...answers.filter(Boolean).map((answer) => Math.max(...patchesOf(answer[part]))));
  }

  function draw() {
    const scales = { attention: highest("attention"), reference: highest("reference") };
    panels.forEach((panel, i) => {
      for (const part of ["attention", "reference"]) {
        const { overlay, bar, mark } = panel[part];
        const values = answers[i] ? patchesOf(answers[i][part]) : new Float32Array(grid.rows * grid.columns);
        paint(overlay, values, grid.columns, scales[part], colours, state.rooted);
        overlay.hidden = !answers[i];
        paintBar(bar, scales[part], colours, state.rooted);
        const patch = selectedPatch();
        mark.hidden = patch === null;
        if (patch) {
          mark.style.left = `${(patch[1] / grid.columns) * 100}%`;
          mark.style.top = `${(patch[0] / grid.rows) * 100}%`;
        }
      }
      captions(panel, answers[i]);
      showMost(panel, answers[i]);
      showOthers(panel, answers[i]);
    });
    showBelow();
    say();
  }

  function captions(panel, answer) {
    const looks = state.role === "query" ? `${state.token} looks` : `looked at: ${state.token}`;
    const at = state.hovered && grid.first + state.hovered[0] * grid.columns + state.hovered[1];
    const hovered = (values) => (at === null || !values ? "" : ` · (${state.hovered}): ${digits(values[at])}`);
    const missing = answer === null ? " · this model has no such token" : "";
    panel.attention.caption.textContent = looks + hovered(answer?.attention) + missing;
    panel.reference.caption.textContent = `${told.reference} looks${hovered(answer?.reference)}`;
  }

  // The tokens with the most attention, in numbers: for those who cannot see colours, and for those who doubt them.
  function strongest(panel, answer, n) {
    const names = tokensOf(panel.name).tokens;
    const ranked = Array.from(answer.attention, (value, i) => [value, i]).sort((a, b) => b[0] - a[0]);
    return ranked.slice(0, n).map(([value, i]) => ({ name: names[i], value }));
  }

  function showMost(panel, answer) {
    if (!answer) return panel.most.replaceChildren();
    const lead = state.role === "query" ? "Most to: " : "Most from: ";
    const entries = strongest(panel, answer, 4).map(({ name, value }) =>
      element("span", { "data-token": name, "data-value": value }, `${name} ${digits(value)}`),
    );
    panel.most.replaceChildren(lead, ...entries.flatMap((entry, i) => (i ? [", ", entry] : [entry])));
  }

  // Tokens without a place on the photograph.
  function showOthers(panel, answer) {
    const { tokens, n_tokens: nTokens } = tokensOf(panel.name);
    const focused = panel.others.contains(document.activeElement) ? document.activeElement.dataset.token : null;
    const last = grid.first + grid.rows * grid.columns;
    const buttons = tokens.flatMap((name, i) => {
      if (i >= grid.first && i < last) return [];
      const known = answer && i < answer.attention.length;
      const button = element(
        "button",
        { type: "button", "data-token": name, "aria-pressed": String(name === state.token) },
        name,
        element("span", {}, known ? ` · ${digits(answer.attention[i])}` : ""),
      );
      button.addEventListener("click", () => {
        state.token = name;
        if (i >= nTokens) {
          state.role = "key"; // it is looked at, and looks at nothing
          controls.role.select.selectedIndex = 1;
        }
        ask();
      });
      return [button];
    });
    panel.others.replaceChildren(...buttons);
    if (focused) buttons.find((button) => button.dataset.token === focused)?.focus();
  }

  function say() {
    const parts = panels.flatMap((panel, i) => {
      if (!answers[i]) return [`${panel.name}: no such token`];
      const [first] = strongest(panel, answers[i], 1);
      return [`${panel.name}: most ${state.role === "query" ? "to" : "from"} ${first.name}, ${digits(first.value)}`];
    });
    status.textContent = `${state.token} as ${state.role}, block ${state.layer}, ${headName(state.head)}. ${parts.join(". ")}.`;
  }

  // Below: norms, verdict, neurons ------------------------------------------------------------------------------------

  function showBelow() {
    const shown = panels.flatMap((panel, i) => (answers[i] ? [{ name: panel.name, ...answers[i] }] : []));
    const real = shown.filter(({ norms }) => norms.length);
    if (!real.length) {
      return below.replaceChildren(element("p", {}, "An attention bias is a key without a token: it has no norm and no neurons."));
    }
    const { sublayer } = told.outliers;
    const cutoff = real[0].cutoff === null ? null : { norm: real[0].cutoff, sublayer };
    const chart = normStrip(told.sublayers, real, cutoff, state.layer);
    const verdicts = real.map((panel) => ({ name: panel.name, words: verdict(panel) }));
    chart.setAttribute("aria-label", `Residual norms of ${state.token}. ${verdicts.map(({ name, words }) => `${name}: ${words}`).join(" ")}`);
    const lines = verdicts.map(({ name, words }, i) =>
      element("p", { class: "rlx-verdict", "data-condition": name }, element("span", { class: `rlx-key rlx-series-${i}` }), element("b", {}, name), `: ${words}`),
    );
    const norms = element(
      "div",
      { class: "rlx-norms" },
      element("h4", {}, `Residual norm of ${state.token}`),
      chart,
      element("p", { class: "rlx-small" }, `Solid: the token. Dashed: the image's median patch.${cutoff ? " Short bar: the cut-off of outliers." : ""}`),
      ...lines,
    );
    below.replaceChildren(norms, element("div", { class: "rlx-neurons" }, ...real.map(neuronTable)));
  }

  function verdict({ norms, cutoff }) {
    const place = told.sublayers.indexOf(told.outliers.sublayer);
    const norm = `norm ${digits(norms[place])} at ${told.outliers.sublayer}`;
    if (selectedPatch() === null) return `${norm}; only patches are judged.`;
    if (cutoff === null) return `${norm}; not an outlier: the model has none on these images.`;
    return norms[place] > cutoff
      ? `an outlier: ${norm}, above the cut-off ${digits(cutoff)}.`
      : `not an outlier: ${norm}, below the cut-off ${digits(cutoff)}.`;
  }

  function neuronTable({ name, neurons, chosen }) {
    const isChosen = (layer, neuron) => told.neurons.some(([at, n]) => at === layer && n === neuron);
    const row = (cells, marked) => element("tr", marked ? { class: "rlx-marked" } : {}, ...cells.map((cell) => element("td", {}, cell)));
    const rows = neurons.slice(0, 6).map(({ layer, neuron, activation, written }) =>
      row([`${layer}.${neuron}${isChosen(layer, neuron) ? " ●" : ""}`, digits(activation), digits(written)], isChosen(layer, neuron)),
    );
    const head = element("tr", {}, ...["neuron", "activation", "writes"].map((text) => element("th", { scope: "col" }, text)));
    const caption = element("caption", {}, `Strongest neurons at ${state.token}, ${name}`);
    const table = element("table", {}, caption, element("thead", {}, head), element("tbody", {}, ...rows));
    if (!told.neurons.length) return element("div", {}, table);
    const given = told.neurons.slice(0, 12).map(([layer, neuron], i) => `${layer}.${neuron}: ${digits(chosen[i])}`);
    const more = told.neurons.length > 12 ? `, and ${told.neurons.length - 12} more` : "";
    return element("div", {}, table, element("p", { class: "rlx-small" }, `● Neurons asked for, their activations here: ${given.join(", ")}${more}.`));
  }
}

export default {
  render({ model, el }) {
    const root = document.createElement("div");
    el.replaceChildren(root);
    return mount(root, live(model));
  },
};
