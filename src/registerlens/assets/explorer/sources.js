// Where answers come from: the data on the page itself, or a Python process that is asked.
// The files of this folder are joined in the order sources, drawing, explorer; they need nothing else.
//
// A source has a `manifest` and `ask(question)`, which promises one panel a condition, or null where the condition has
// no such token. A question is {image, conditions, layer, head, token, role}. A panel has
//   attention  what the token pays to every key (role "query"), or draws from every token (role "key")
//   reference  what [CLS], or the average query, pays to every key
//   norms, medians  of the token and of the image's patches, at every sublayer
//   cutoff     the norm above which a patch is an outlier where that is judged, or null
//   neurons    [{layer, neuron, activation, written}], the strongest first
//   chosen     activations of the neurons asked for

const LEVELS = 255;

// One byte a value: the square root of its share of the row's largest value.
function decode(codes, largest) {
  return Float32Array.from(codes, (code) => (code / LEVELS) ** 2 * largest);
}

async function bytesOf(text) {
  const packed = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(stream).arrayBuffer();
}

// The data that registerlens.explorer.page put on the page.
function embedded({ manifest, facts, maps }) {
  const unpacked = new Map();
  const unpack = (table, key) => {
    const name = (table === facts ? "facts/" : "maps/") + key;
    if (!unpacked.has(name)) unpacked.set(name, bytesOf(table[key]));
    return unpacked.get(name);
  };
  const places = manifest.sublayers.length;

  async function factsOf(image, index) {
    const values = new Float32Array(await unpack(facts, `${image}/${index}`));
    const nTokens = manifest.conditions[index].n_tokens;
    const nChosen = manifest.neurons.length;
    const nRanks = (values.length - places * (nTokens + 1) - nTokens * nChosen) / nTokens / 4;
    const medians = values.subarray(places * nTokens, places * (nTokens + 1));
    const table = places * (nTokens + 1);
    const chosen = table + nTokens * nRanks * 4;
    const place = manifest.sublayers.indexOf(manifest.outliers.sublayer);
    return {
      medians,
      medianAtPlace: medians[place],
      norms: (token) => Float32Array.from({ length: places }, (_, i) => values[i * nTokens + token]),
      neurons: (token) =>
        Array.from({ length: nRanks }, (_, rank) => {
          const start = table + (token * nRanks + rank) * 4;
          const [layer, neuron, activation, written] = values.subarray(start, start + 4);
          return { layer, neuron, activation, written };
        }),
      chosen: (token) => Array.from(values.subarray(chosen + token * nChosen, chosen + (token + 1) * nChosen)),
    };
  }

  async function panel({ image, layer, head, token, role }, name) {
    const index = manifest.conditions.findIndex((condition) => condition.name === name);
    const { tokens, n_tokens: nTokens } = manifest.conditions[index];
    const at = tokens.indexOf(token);
    if (at < 0 || (role === "query" && at >= nTokens)) return null;
    const buffer = await unpack(maps, `${image}/${index}/${layer}/${head}`);
    const largest = new Float32Array(buffer, 0, nTokens);
    const codes = new Uint8Array(buffer, 4 * nTokens);
    const row = (query) => decode(codes.subarray(query * tokens.length, (query + 1) * tokens.length), largest[query]);
    const rows = () => Array.from({ length: nTokens }, (_, query) => row(query));
    const average = () => {
      const sum = new Float32Array(tokens.length);
      for (const values of rows()) values.forEach((value, key) => (sum[key] += value / nTokens));
      return sum;
    };
    const own = await factsOf(image, index);
    const clean = await factsOf(image, 0);
    const { threshold } = manifest.outliers;
    const isToken = at < nTokens;
    return {
      attention: role === "query" ? row(at) : Float32Array.from(rows(), (values) => values[at]),
      reference: tokens.includes("[CLS]") ? row(tokens.indexOf("[CLS]")) : average(),
      norms: isToken ? own.norms(at) : [],
      medians: own.medians,
      cutoff: threshold === null ? null : threshold * clean.medianAtPlace,
      neurons: isToken ? own.neurons(at) : [],
      chosen: isToken ? own.chosen(at) : [],
    };
  }

  return {
    manifest,
    ask: (question) => Promise.all(question.conditions.map((name) => panel(question, name))),
  };
}

// A Python process behind an anywidget model: questions are messages, the maps come back as buffers.
function live(model) {
  const waiting = new Map();
  let asked = 0;

  function answered(message, buffers) {
    const { resolve, reject } = waiting.get(message.id) ?? {};
    if (!resolve) return;
    waiting.delete(message.id);
    if (message.error) return reject(new Error(message.error));
    const codes = (buffers ?? []).map((view) => new Uint8Array(view.buffer ?? view, view.byteOffset ?? 0, view.byteLength));
    let next = 0;
    resolve(
      message.panels.map((told) => {
        if (told === null) return null;
        const [attention, reference] = told.largest.map((largest) => decode(codes[next++], largest));
        return { ...told, attention, reference };
      }),
    );
  }

  model.on("msg:custom", answered);
  return {
    manifest: model.get("manifest"),
    ask: (question) =>
      new Promise((resolve, reject) => {
        asked += 1;
        waiting.set(asked, { resolve, reject });
        model.send({ ...question, id: asked });
      }),
    close: () => model.off("msg:custom", answered),
  };
}
